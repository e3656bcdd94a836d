"""Tests of clip.py: equal to its peers, safe on bad files, exact where it takes a shorter way.

Peers (open_clip_torch, transformers, safetensors) and ../shared are used where present, else tests skip.
"""
import copy
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import types
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import clip

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, "..", "shared")
BPE = "bpe_simple_vocab_16e6.txt.gz"
SMALL_VIT = clip.Config(48, 40, 2, 64, 10, 20, 700, 64, 2, 2, 4)  # patches and heads that nobody publishes
SMALL_RN = clip.Config(48, 64, (1, 2, 1, 1), 8, None, 20, 700, 64, 1, 2, 4)
OPENAI_VIT = replace(SMALL_VIT, vision_heads=1, transformer_heads=1)  # OpenAI's rule: 64 channels a head
GELU_VIT = replace(SMALL_VIT, quick_gelu=False)


# ---------------------------------------------------------------- helpers

def randomise(model, seed=0):
    """Fill every tensor with what matters: no zero bias, no identity as norm, no fresh statistics."""
    g = torch.Generator().manual_seed(seed)
    last = ("ln_post.bias", "ln_final.bias", "post_layernorm.bias", "final_layer_norm.bias")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=g)
            elif key.endswith("num_batches_tracked"):
                value.fill_(3)
            elif key == "logit_scale":
                value.fill_(3.1)
            elif value.ndim < 2:
                mean = 0.2 if key.endswith(last) else float(key.endswith("weight"))
                value.normal_(mean, 0.2, generator=g)
            elif value.ndim == 4 and "conv1" not in key:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=g)
            else:
                value.normal_(0, 0.5 * value.shape[-1] ** -0.5, generator=g)
                # Features share a direction: a cosine near 0 is all cancellation, and compares nothing.
                if key.endswith(("visual.proj", "projection", "projection.weight")):
                    value.add_(8 / max(value.shape))
    return model.eval()


def on_meta(model_class, *args, **kwargs):
    """The model with memory, but no time spent on weights that are replaced."""
    with torch.device("meta"):
        model = model_class(*args, **kwargs)
    return model.to_empty(device="cpu")


def make(config, seed=0):
    return randomise(on_meta(clip.CLIP, config), seed)


def open_clip_model(config, custom=False):
    """open_clip's model of the same architecture; custom: with the text encoder as a module of its own."""
    open_clip = pytest.importorskip("open_clip")
    c = config
    is_vit = c.vision_patch_size is not None
    vision = dict(layers=c.vision_layers if is_vit else list(c.vision_layers), width=c.vision_width,
                  patch_size=c.vision_patch_size, image_size=c.image_resolution,
                  head_width=c.vision_width * (1 if is_vit else 32) // c.vision_heads)
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.transformer_width,
                heads=c.transformer_heads, layers=c.transformer_layers)
    model_class = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    model = on_meta(model_class, c.embed_dim, vision, text, quick_gelu=c.quick_gelu)
    mask = model.text.attn_mask if custom else model.attn_mask
    mask.copy_(torch.full(mask.shape, -torch.inf).triu(1))
    return randomise(model)


def transformers_model(config, text={}, vision={}):
    """transformers' model of the same architecture but for changes to its configurations."""
    transformers = pytest.importorskip("transformers")
    c = config
    activation = "quick_gelu" if c.quick_gelu else "gelu"
    text = dict(hidden_act=activation, hidden_size=c.transformer_width,
                intermediate_size=4 * c.transformer_width, num_hidden_layers=c.transformer_layers,
                num_attention_heads=c.transformer_heads, vocab_size=c.vocab_size,
                max_position_embeddings=c.context_length,
                bos_token_id=c.vocab_size - 2, eos_token_id=c.vocab_size - 1) | text
    vision = dict(hidden_act=activation, hidden_size=c.vision_width, intermediate_size=4 * c.vision_width,
                  num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_heads,
                  image_size=c.image_resolution, patch_size=c.vision_patch_size) | vision
    whole = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=c.embed_dim)
    model = on_meta(transformers.CLIPModel, whole)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return randomise(model)


@torch.no_grad()
def outputs(model, image, text):
    """Image features, text features and logits of our model, open_clip's or transformers'."""
    if hasattr(model, "vision_model"):
        image_features = model.visual_projection(model.vision_model(image).pooler_output)
        text_features = model.text_projection(model.text_model(text).pooler_output)
        return image_features, text_features, model(text, image).logits_per_image
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    if isinstance(model, clip.CLIP):
        return image_features, text_features, model(image, text)[0]
    cosines = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).t()
    return image_features, text_features, model.logit_scale.exp() * cosines


def a_batch(config, images=2, texts=3):
    g = torch.Generator().manual_seed(0)
    n = config.context_length
    text = torch.zeros(texts, n, dtype=torch.int64)
    for i, length in enumerate([n, 2, n // 2, 5, 3][:texts]):  # a full row, an empty text, some between
        text[i, :length] = torch.randint(1, config.vocab_size - 2, (length,), generator=g)
        text[i, 0] = config.vocab_size - 2
        text[i, length - 1] = config.vocab_size - 1
    return torch.randn(images, 3, config.image_resolution, config.image_resolution, generator=g), text


def close(a, b, tol=1e-5):
    """Equal to tol, relative to the largest."""
    assert a.shape == b.shape and torch.isfinite(a).all() and a.abs().max() > 0
    assert (a - b).abs().max() <= tol * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


def same_outputs(model, other, tol=1e-5, images=2):
    """Two models, the first of them ours, agree on a batch."""
    image, text = a_batch(model.config, images)
    for a, b in zip(outputs(model, image, text), outputs(other, image, text), strict=True):
        close(a, b, tol)


def state_equal(a, b):
    assert dict(a).keys() == dict(b).keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


def fails(match, function, *args, **kwargs):
    """The call raises a CheckpointError of one line that matches, without the error that it comes from."""
    with pytest.raises(clip.CheckpointError, match=match) as e:
        function(*args, **kwargs)
    assert "\n" not in str(e.value) and len(str(e.value)) < 800
    assert e.value.__cause__ is None and (e.value.__suppress_context__ or e.value.__context__ is None)


def refused(path, match="", readers=(clip.load, clip.load_checkpoint)):
    """Every reader fails on the file and names it first."""
    for read in readers:
        fails(re.escape(os.path.basename(path)) + ".*" + match, read, path)


@pytest.fixture(scope="module")
def vit():
    return make(SMALL_VIT, seed=1)


@pytest.fixture(scope="module")
def tok():
    """OpenAI's tokenizer; its merges file from $CLIP_CACHE or ../shared/clip."""
    folders = [os.environ.get("CLIP_CACHE") or "", os.path.join(SHARED, "clip")]
    folder = next((f for f in folders if os.path.isfile(os.path.join(f, BPE))), None)
    if folder is None:
        pytest.skip(f"{BPE} is neither in $CLIP_CACHE nor in ../shared/clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", folder)
        yield clip.default_tokenizer()


# ---------------------------------------------------------------- the model

SMALL = {"small ViT": SMALL_VIT, "small ResNet": SMALL_RN, "small GELU ViT": GELU_VIT}
CONFIGS = SMALL | {"ViT-B/32": clip.MODELS["ViT-B/32"][0]}


@pytest.mark.parametrize("peer, name", [
    *[("open_clip", name) for name in CONFIGS],
    *[("transformers", name) for name in CONFIGS if "ViT" in name]])  # it has no CLIP with a ResNet
def test_equals_peers(peer, name):
    """Same weights: image features, text features and logits to 1e-5, relative to the largest."""
    config = CONFIGS[name]
    theirs = open_clip_model(config) if peer == "open_clip" else transformers_model(config)
    state, _ = clip._find_clip(theirs.state_dict(), {}, "weights.bin", True)
    model = clip._assemble(clip._infer_config(state, asdict(config)), state, None, "weights.bin").eval()
    assert model.config == config
    same_outputs(model, theirs, images=3 if name in SMALL else 1)


@pytest.mark.parametrize("config", [OPENAI_VIT, SMALL_RN])
def test_openai_builds_and_reads_what_save_writes(config, tmp_path):
    """open_clip keeps OpenAI's own loader: it infers the architecture from the keys and loads strictly."""
    openai = pytest.importorskip("open_clip.openai")
    model = make(config).half().float()  # that loader rounds to half precision
    clip.save(model, tmp_path / "w.pt")
    twin = openai.load_openai_model(str(tmp_path / "w.pt"), precision="fp32", device="cpu")
    same_outputs(model, twin.eval())


def plain_attention(q, k, v, heads, mask=0):
    """Attention as the equation says it: (B, L, width) each -> (B, L, width)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def block_attention(attn, x):
    """A block's attention by the equation, causal in that of a text."""
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1) if attn.causal else 0
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    return attn.out_proj(plain_attention(q, k, v, attn.heads, mask))


def plain_text(model, text):
    """The text encoder as the paper has it: every column, an explicit mask. -> (B, columns, embed_dim)."""
    x = model.token_embedding(text) + model.positional_embedding[:text.shape[1]]
    for block in model.transformer.resblocks:
        x = x + block_attention(block.attn, block.ln_1(x))
        h = block.mlp.c_fc(block.ln_2(x))
        h = h * torch.sigmoid(1.702 * h) if model.config.quick_gelu else F.gelu(h)
        x = x + block.mlp.c_proj(h)
    return model.ln_final(x) @ model.text_projection


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_packed_text_equals_all_columns(quick_gelu):
    """Packing changes no output and no gradient, nor does junk after the end, against all columns."""
    model = make(replace(SMALL_VIT, context_length=77, quick_gelu=quick_gelu))
    _, text = a_batch(model.config, texts=5)
    for t in (text, text[1:, :39]):  # every text but the first, cut to the longest
        end = t.argmax(-1)
        plain = plain_text(model, t)
        feature, tokens, mask = model.encode_text(t, tokens=True)
        assert torch.equal(mask, torch.arange(int(end.max()) + 1) <= end[:, None])
        close(feature, plain[torch.arange(len(t)), end])
        close(model.encode_text(t.int()), plain[torch.arange(len(t)), end])
        close(tokens, plain[:, :tokens.shape[1]] * mask[..., None])
        assert (tokens[~mask] == 0).all()
    junk = text.clone()
    junk[1, 2:] = 5
    assert torch.equal(model.encode_text(junk), model.encode_text(text))

    def gradients(feature):
        model.zero_grad()
        (feature * torch.randn(5, 48, generator=torch.Generator().manual_seed(3))).sum().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    got = gradients(model.encode_text(text))
    want = gradients(plain_text(model, text)[torch.arange(5), text.argmax(-1)])
    assert got.keys() == want.keys() and len(got) == 2 * 12 + 5
    for key in got:
        close(got[key], want[key], 1e-4)


def test_gradients_have_the_same_bits_every_time_on_several_threads():
    """Many rows of a packed text share a position: their gradients must be summed in one order."""
    before = torch.get_num_threads()
    model = clip.build("tiny")
    text = torch.zeros(128, 32, dtype=torch.int32)
    text[:, :9] = torch.randint(1, 600, (128, 9), generator=torch.Generator().manual_seed(0))
    text[:, 9] = model.vocab_size - 1
    gradients = set()
    try:
        torch.set_num_threads(2)
        for _ in range(8):
            model.zero_grad()
            model.encode_text(text).square().sum().backward()
            gradients.add(model.positional_embedding.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(gradients) == 1


def test_text_on_the_cpu_asks_the_device_for_nothing(vit):
    """A GPU would have to finish all that it was given before. The meta device has no number to tell."""
    _, text = a_batch(SMALL_VIT)
    on_cpu = vit.encode_text(text, tokens=True)
    on_meta = copy.deepcopy(vit).to("meta").encode_text(text, tokens=True)
    assert [x.shape for x in on_meta] == [x.shape for x in on_cpu]
    assert all(x.is_meta for x in on_meta)


def test_text_that_cannot_be_encoded(vit):
    _, text = a_batch(SMALL_VIT)
    long = torch.ones(1, 39, dtype=torch.int64)
    long[0, -1] = SMALL_VIT.vocab_size - 1
    foreign = text.clone()
    foreign[0, 3] = SMALL_VIT.vocab_size
    for wrong, match in ((long, "39 tokens.*context is 20"), (foreign, "vocabulary is 700"),
                         (text[0], r"\(B, columns\)")):
        with pytest.raises(ValueError, match=match):
            vit.encode_text(wrong)
    assert vit.encode_text(text[:0]).shape == (0, 48)


def test_image_tokens(vit):
    """The first token is the image feature; a ResNet's are its pool's attention, asked at every place."""
    resnet = make(SMALL_RN)
    for model in (vit, resnet):
        image, _ = a_batch(model.config)
        feature, tokens = model.encode_image(image, tokens=True)
        close(feature, model.encode_image(image))
        assert torch.equal(feature, tokens[:, 0])
        with pytest.raises(ValueError, match=r"takes \(B, 3, "):
            model.encode_image(torch.zeros(1, 3, 33, 33))

    pool = resnet.visual.attnpool
    feature_maps = []
    pool.register_forward_pre_hook(lambda module, args: feature_maps.append(args[0]))
    resnet.encode_image(image)
    x = feature_maps[0].flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
    out = plain_attention(pool.q_proj(x), pool.k_proj(x), pool.v_proj(x), pool.heads)
    close(tokens, pool.c_proj(out))

    image, _ = a_batch(SMALL_VIT)
    tokens = vit.encode_image(image, tokens=True)[1]
    assert tokens.shape == (2, 17, 48)
    image[..., :10, :10] = image[..., 10:20, 10:20]  # the first patch changes: its own token most of all
    moved = (vit.encode_image(image, tokens=True)[1] - tokens).norm(dim=-1)[0]
    assert moved[1:].argmax() == 0


def test_attention_without_torchs_fused_one(monkeypatch):
    """The output and the gradient are the equation's; those of the fused one, in the other tests."""
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    model = make(SMALL_VIT)
    for transformer in (model.transformer, model.visual.transformer):  # causal and not
        attn = transformer.resblocks[0].attn
        x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = attn(x.transpose(0, 1)).transpose(0, 1)
        expected = block_attention(attn, x)
        close(out, expected)
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)))


def coop_text(model, text):
    """How scripts for prompt learning call the parts of OpenAI's text encoder (Zhou et al. 2022, CoOp)."""
    x = model.token_embedding(text).type(model.dtype) + model.positional_embedding.type(model.dtype)
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    x = model.ln_final(x).type(model.dtype)
    return x[torch.arange(len(x)), text.argmax(-1)] @ model.text_projection


def test_inner_modules_take_length_first(vit):
    """Transformers and blocks, called as those of OpenAI's package, and what hooks on them see."""
    image, text = a_batch(SMALL_VIT, images=3)
    close(coop_text(vit, text), vit.encode_text(text))
    v = copy.deepcopy(vit.visual)
    x = v.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(3, 1, -1), x], 1) + v.positional_embedding
    x = v.transformer(v.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
    close(v.ln_post(x[:, 0]) @ v.proj, vit.encode_image(image))
    v.proj = None  # as linear probes set it
    close(v.ln_post(x[:, 0]), v(image))
    model = copy.deepcopy(vit)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, (clip.Transformer, clip.ResidualAttentionBlock, clip.MLP, nn.LayerNorm)):
            module.register_forward_hook(lambda _, args, out, name=name: shapes.update({name: out.shape}))
    close(model.encode_text(text), vit.encode_text(text))
    close(model.encode_image(image), vit.encode_image(image))
    assert len(shapes) == 2 * (1 + 2 * 4) + 3
    for name, shape in shapes.items():
        if "transformer" in name:
            assert shape == ((17, 3, 64) if "visual" in name else (20, 3, 64)), name


class Lora(nn.Module):
    """A layer within another, which keeps the weights of the first as its own, as peft's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        width = base.out_channels if isinstance(base, nn.Conv2d) else base.out_features
        self.scale = nn.Parameter(torch.ones(width))
        self.shape = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) * self.scale.view(self.shape)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_layers_may_be_exchanged_and_looked_at(quick_gelu):
    """What stands in the place of a layer is called, and has gradients; hooks on every layer fire."""
    model = make(replace(SMALL_VIT, quick_gelu=quick_gelu))
    image, text = a_batch(SMALL_VIT)
    exchanged = copy.deepcopy(model)
    for module in (*exchanged.modules(),):
        for name, layer in (*module.named_children(),):
            if name in ("c_fc", "c_proj", "conv1"):
                setattr(module, name, Lora(layer))
    same_outputs(model, exchanged)
    exchanged(image, text)[0].sum().backward()
    scales = [layer.scale for layer in exchanged.modules() if isinstance(layer, Lora)]
    assert len(scales) == 9 and all(scale.grad.abs().max() > 0 for scale in scales)
    fired = set()
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.add(name))
    same_outputs(model, exchanged)
    assert fired == layers
    pruned = make(SMALL_VIT)
    before = pruned.encode_text(text)
    prune.l1_unstructured(pruned.transformer.resblocks[0].mlp.c_fc, "weight", amount=0.5)
    assert not torch.allclose(pruned.encode_text(text), before, atol=1e-3)


class Around(nn.Module):
    """A module in the place of another, which it asks; shapes: of what it has seen."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.inner(x)


@pytest.mark.parametrize("name, shape", [
    ("token_embedding", (5, 20)), ("ln_final", (5, 20, 64)), ("transformer.resblocks", (20, 5, 64)),
    ("transformer.resblocks.1", (20, 5, 64)), ("transformer.resblocks.0.ln_1", (20, 5, 64)),
    ("transformer.resblocks.0.mlp", (20, 5, 64)), ("visual", (3, 3, 40, 40)),
    ("visual.transformer.resblocks", (17, 3, 64)), ("visual.transformer.resblocks.1.mlp", (17, 3, 64))])
def test_parts_may_be_exchanged(name, shape, vit):
    """What stands in the place of a part sees all columns of a text, as in OpenAI's code, no more."""
    image, text = a_batch(SMALL_VIT, images=3, texts=5)
    model = copy.deepcopy(vit)
    part = Around(model.get_submodule(name))
    if name == "visual":
        part.input_resolution = 40
        part.conv1 = part.inner.conv1
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    close(model.encode_text(text), vit.encode_text(text))
    close(model.encode_image(image), vit.encode_image(image))
    assert part.shapes == [shape]
    hooked = copy.deepcopy(vit)
    hooked.get_submodule(name).register_forward_hook(lambda _, args, out: out * 0)
    same = name.startswith("visual")
    assert torch.allclose(hooked.encode_text(text), vit.encode_text(text)) == same
    assert torch.allclose(hooked.encode_image(image), vit.encode_image(image)) != same


def test_a_vision_tower_may_be_changed(vit):
    """A bias, a smaller stride and other channels of the first layer; no pool at the end; more tokens."""
    visual = copy.deepcopy(vit.visual)
    image, text = a_batch(SMALL_VIT, images=2)
    conv = visual.conv1
    conv.bias = nn.Parameter(torch.linspace(-1, 1, 64))
    for stride in (10, 5):
        conv.stride = (stride, stride)
        close(conv(image), F.conv2d(image, conv.weight, conv.bias, stride))
    vit = copy.deepcopy(vit)
    vit.visual.conv1 = nn.Conv2d(1, 64, 10, 10, bias=False)
    assert vit.encode_image(image[:, :1]).shape == (2, 48)
    vit.token_embedding = nn.Embedding(702, 64)
    text[0, 2] = 701
    assert vit.encode_text(text).shape[1] == 48
    resnet = make(SMALL_RN)
    resnet.visual.attnpool = nn.Identity()
    assert resnet.encode_image(a_batch(SMALL_RN)[0]).shape[2:] == (2, 2)


def test_traced_and_exported_encoders_take_other_texts(vit):
    """torch.jit.trace, torch.export, torch.compile and vmap, then more texts, of other lengths."""
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = vit

        def forward(self, text):
            return self.clip.encode_text(text)

    image, text = a_batch(SMALL_VIT, images=4, texts=5)
    want = vit.encode_text(text)
    with torch.no_grad():
        traced = torch.jit.trace(Text(), text[1:2])
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(Text(), (text[1:3],), dynamic_shapes=(batch,)).module()
        compiled = torch.compile(Text(), backend="eager", fullgraph=True)
        compiled(text[1:3])
        mapped = torch.func.vmap(lambda row: vit.encode_text(row[None])[0])
        for encode in (traced, exported, compiled, mapped):
            close(encode(text), want)
        close(torch.jit.trace(vit.visual, image[:2])(image), vit.encode_image(image))
    gradient = torch.func.grad(lambda w, row: torch.func.functional_call(Text(), {"clip.text_projection": w},
                                                                         (row[None],)).sum())
    of_each = torch.func.vmap(gradient, (None, 0))(vit.text_projection.detach(), text)
    close(of_each.sum(0), torch.autograd.grad(vit.encode_text(text).sum(), vit.text_projection)[0])


@pytest.mark.parametrize("config, new, step, key", [
    (SMALL_VIT, 60, 10, "visual.positional_embedding"),
    (SMALL_RN, 96, 32, "visual.attnpool.positional_embedding")])
def test_image_size_interpolates_positions(config, new, step, key, tmp_path):
    model = make(config)
    clip.save(model, tmp_path / "w.pt")
    grown, preprocess = clip.load(tmp_path / "w.pt", "cpu", image_size=new)
    assert grown.visual.input_resolution == grown.config.image_resolution == new
    assert preprocess(Image.new("RGB", (90, 70))).shape == (3, new, new)
    assert grown.encode_image(torch.zeros(1, 3, new, new)).shape == (1, 48)
    old = model.state_dict()[key]
    got = grown.state_dict()[key]
    side = int((len(old) - 1) ** 0.5)
    grid = old[1:].t().reshape(1, -1, side, side)
    want = F.interpolate(grid, (new // step, new // step), mode="bicubic").flatten(2)[0].t()
    assert torch.equal(old[0], got[0])
    close(got[1:], want)
    for wrong in (33, 0, 32.0, "32", True):
        fails("multiple of", clip.load, tmp_path / "w.pt", "cpu", image_size=wrong)
    frozen = make(config).half().requires_grad_(False)
    assert not any(p.requires_grad for p in clip.resize_images(frozen, new).parameters())
    assert frozen.state_dict()[key].dtype == torch.float16
    close(frozen.state_dict()[key].float(), got, 1e-3)


def test_build():
    before = torch.random.get_rng_state()
    a, b, other = (clip.build("tiny", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    state_equal(a.state_dict(), b.state_dict())
    assert not torch.equal(a.visual.proj, other.visual.proj)


@pytest.mark.parametrize("fast_cpu", [True, False])
def test_autocast(fast_cpu, vit, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast_cpu, raising=False)

    def dtype(amp, config):
        model = types.SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), config=config)
        with clip.autocast(amp, model):
            return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32

    where_it_pays = torch.bfloat16 if fast_cpu else torch.float32
    for name in ("ViT-B/32", "RN50", "small"):
        assert dtype("auto", clip.MODELS[name][0]) == where_it_pays
    for name in ("tiny", "tiny-rn"):
        assert dtype("auto", clip.MODELS[name][0]) == torch.float32
    assert dtype("bf16", SMALL_VIT) == torch.bfloat16
    assert dtype("off", CONFIGS["ViT-B/32"]) == torch.float32
    with pytest.raises(ValueError, match="fp16"):
        clip.autocast("fp16", vit)


def test_logits_are_float32_under_autocast(vit):
    image, text = a_batch(SMALL_VIT)
    with clip.autocast("bf16", vit):
        i, t, logits = outputs(vit, image, text)
    assert i.dtype == t.dtype == torch.bfloat16 and logits.dtype == torch.float32
    want = vit.logit_scale.exp() * F.normalize(i.float(), dim=-1) @ F.normalize(t.float(), dim=-1).t()
    assert torch.equal(logits, want)
    close(i.float(), vit.encode_image(image), 0.05)
    close(t.float(), vit.encode_text(text), 0.05)


def test_compile_blocks():
    if not any(shutil.which(c) for c in ("g++", "clang++", os.environ.get("CXX") or "g++")):
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    model = make(replace(SMALL_VIT, vision_layers=1, transformer_layers=1))
    compiled = copy.deepcopy(model)
    clip.compile_blocks(compiled)
    for transformer in (compiled.visual.transformer, compiled.transformer):
        assert transformer.resblocks[0]._compiled_call_impl is not None
    same_outputs(compiled, model)
    state_equal(compiled.state_dict(), model.state_dict())


# ---------------------------------------------------------------- as OpenAI's package

def test_architectures_equal_open_clip():
    """Parameter names and shapes of all nine, on the meta device."""
    open_clip = pytest.importorskip("open_clip")
    assert len(clip.available_models()) == 9 and "ViT-L/14@336px" in clip.available_models()
    for name in clip.available_models():
        cfg = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336") + "-quickgelu")
        with torch.device("meta"):
            ours = clip.CLIP(clip.MODELS[name][0])
            parts = (cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"])
            theirs = open_clip.model.CLIP(*parts, quick_gelu=True)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes, name
        vision = theirs.visual.attnpool if name[0] == "R" else theirs.visual.transformer.resblocks[0].attn
        assert ours.config.vision_heads == vision.num_heads, name
        assert ours.config.transformer_heads == theirs.transformer.resblocks[0].attn.num_heads, name


def test_a_script_written_for_openai_runs(tok, tmp_path):
    clip.save(make(replace(SMALL_VIT, context_length=77, vocab_size=49408)), tmp_path / "ours.pt")
    with pytest.warns(UserWarning, match="jit=True"):
        model, preprocess = clip.load(str(tmp_path / "ours.pt"), device="cpu", jit=True)
    assert not model.training and model.dtype == torch.float32 and model.visual.input_resolution == 40
    assert model.context_length == 77 and model.vocab_size == 49408 and model.visual.output_dim == 48
    text = clip.tokenize(["a diagram", "a dog", "a cat"])
    assert text.dtype == torch.int32 and text.shape == (3, 77)
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize(["fine", "dog " * 76])
    # 75 words just fit
    assert torch.equal(clip.tokenize("dog " * 75), clip.tokenize("dog " * 76, truncate=True))

    picture = Image.effect_noise((90, 61), 80).convert("RGBA")
    image = preprocess(picture).unsqueeze(0)
    assert torch.equal(clip.transform(40)(picture), image[0])
    per_image, per_text = model(image, text)
    assert per_image.shape == (1, 3) and torch.equal(per_text, per_image.t())
    cosine = F.cosine_similarity(model.encode_image(image), model.encode_text(text))
    close(per_image, 22.197952 * cosine[None], 1e-5)  # exp(3.1)


# ---------------------------------------------------------------- downloads

@pytest.fixture
def published(tmp_path, monkeypatch, vit):
    """A file as ViT-B/32 is published, below an address on this machine."""
    folder = tmp_path / "web" / "sha"
    clip.save(vit, folder / "ViT-B-32.pt")
    sha256 = hashlib.sha256((folder / "ViT-B-32.pt").read_bytes()).hexdigest()
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clip, "MODEL_URL", (tmp_path / "web").as_uri())
    monkeypatch.setitem(clip.MODELS, "ViT-B/32", (SMALL_VIT, sha256))
    return folder.rename(tmp_path / "web" / sha256) / "ViT-B-32.pt"


def test_a_published_model_is_fetched_once(published, tmp_path, vit):
    clip.load("ViT-B/32", "cpu", download_root=str(tmp_path / "other"))
    clip.load("ViT-B/32", "cpu")
    content = published.read_bytes()
    published.unlink()
    for folder in ("cache", "other"):
        assert os.listdir(tmp_path / folder) == ["ViT-B-32.pt"]
        model, _ = clip.load("ViT-B/32", "cpu", download_root=str(tmp_path / folder))
        state_equal(model.state_dict(), vit.state_dict())
    (tmp_path / "cache" / "ViT-B-32.pt").write_bytes(b"rotten")
    published.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum"):
        clip.load("ViT-B/32", "cpu")
    assert (tmp_path / "cache" / "ViT-B-32.pt").read_bytes() == content


def test_downloads_that_fail_say_what_to_put_where(published, tmp_path):
    """Another file under the same name; no folder. The tokenizer's file may be missing too."""
    both = re.escape(f"put the file at {tmp_path / 'cache' / 'ViT-B-32.pt'} by hand") + ".*tokenizer.*" + BPE
    content = published.read_bytes()
    published.write_bytes(content[:-1] + b"!")
    fails("invalid hash value.*" + both, clip.load, "ViT-B/32", "cpu")
    assert os.listdir(tmp_path / "cache") == []
    published.write_bytes(content)
    fails("could not be fetched", clip.load, "ViT-B/32", "cpu", download_root=str(published))
    fails("'tiny': never published", clip.load, "tiny")
    fails("no such file", clip.load, "none.pt")


class Scripted(nn.Module):
    """A module's names and tensors with QuickGELU for its code, all of which torch.jit could not compile."""

    def __init__(self, module):
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in module.named_children():
            self.add_module(name, Scripted(child))

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def jit_archive(model, path, half):
    """Write a TorchScript archive as OpenAI's are: with sizes as buffers and constants of the code."""
    archive = Scripted(copy.deepcopy(model))
    for parameter in archive.parameters():
        parameter.data = parameter.data.half() if half else parameter.data
    for block in archive.transformer.resblocks.children():
        block.attn_mask = torch.full((3, 3), -torch.inf)  # no weight
    for key, value in (("input_resolution", 40), ("context_length", 20), ("vocab_size", 700)):
        archive.register_buffer(key, torch.tensor(value))
    archive.text_projection.data = archive.text_projection.data.t().contiguous().t()  # strides of its own
    archive.patch_size = 10
    archive.training_steps = [1, 2, 3]
    torch.jit.script(archive).save(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("config, half", [(OPENAI_VIT, True), (SMALL_RN, False)], ids=["vit", "resnet"])
def test_torchscript_archive(config, half, tmp_path, monkeypatch):
    model = make(config)
    path = tmp_path / "a.pt"
    jit_archive(model, path, half)
    want = torch.jit.load(str(path)).state_dict()
    assert "input_resolution" in want
    assert want["logit_scale"].dtype == (torch.float16 if half else torch.float32)
    another = '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}'  # not for this file
    (tmp_path / "open_clip_config.json").write_text(another)
    monkeypatch.setattr(torch.jit, "load", None)
    got, hints = clip._read_file(str(path))
    state_equal({key: got[key] for key in want}, want)
    assert hints == {"quick_gelu": True}
    loaded, _ = clip.load(path, "cpu")
    assert loaded.config == config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    same_outputs(loaded, model, 2e-2 if half else 1e-6)


def test_what_is_loaded_is_float32_on_the_device_asked_for(tmp_path, vit):
    torch.save(vit.state_dict(), tmp_path / "w.pt")
    _, text = a_batch(SMALL_VIT)
    try:
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        model, _ = clip.load(tmp_path / "w.pt", "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    state_equal(model.state_dict(), vit.state_dict())
    assert torch.equal(model.encode_text(text), vit.encode_text(text))


def test_own_weights_round_trip(tmp_path):
    """What shapes do not tell (GELU, heads) comes back from each format that keeps it, else a warning."""
    st = pytest.importorskip("safetensors.torch")
    model = make(GELU_VIT)
    state = model.state_dict()
    os.makedirs(tmp_path / "by")
    for name, wrapped in (("deep/er", model), ("by/parallel", nn.DataParallel(model)),
                          ("by/compiled", torch.compile(model))):
        clip.save(wrapped, tmp_path / name)
        torch.save({"model": {"state_dict": wrapped.state_dict()}}, tmp_path / (name + " within"))
        for file in (name, name + " within"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loaded, _ = clip.load(tmp_path / file, "cpu")
            assert loaded.config == GELU_VIT
            state_equal(loaded.state_dict(), state)
    fails("a Linear is no CLIP", clip.save, nn.Linear(2, 2), tmp_path / "w.pt")
    torch.save(dict(state), tmp_path / "dict")
    torch.save(dict(state), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    st.save_file(state, tmp_path / "tensors")
    for name in ("dict", "legacy", "tensors"):
        with pytest.warns(UserWarning, match="does not say its activation; taking QuickGELU"):
            assert clip.load(tmp_path / name, "cpu")[0].config.quick_gelu
        stated, _ = clip.load(tmp_path / name, "cpu", quick_gelu=False)
        assert not stated.config.quick_gelu
        state_equal(stated.state_dict(), state)


def test_own_checkpoint_round_trip(tmp_path):
    texts = ["a red cone", "a blue torus on a red table", "two red cones"] * 3
    tokenizer = clip.Tokenizer.train(texts, 540)
    model = make(replace(GELU_VIT, vocab_size=tokenizer.vocab_size))
    model.tokenizer = tokenizer
    described = clip.describe(model)
    written = {"method": "train_x", "clip": described, "epoch": 3, "config": {"lr": 1e-3}}
    clip.save_checkpoint(tmp_path / "best.pt", written)
    checkpoint = clip.load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == 3 and checkpoint["method"] == "train_x"
    assert checkpoint["clip"]["config"] == asdict(model.config)
    for name in (tmp_path / "best.pt", tmp_path):  # the file, the run's folder
        loaded, _ = clip.load(name, "cpu")
        assert loaded.config == model.config and loaded.tokenizer.merges == tokenizer.merges
        state_equal(loaded.state_dict(), model.state_dict())
    twin = clip.from_description(checkpoint["clip"])
    assert not twin.training
    twin.visual.proj.data += 1  # its memory is its own
    state_equal(checkpoint["clip"]["state_dict"], model.state_dict())
    clip.save(model, tmp_path / "w.pt")
    fails("not a checkpoint of this project", clip.load_checkpoint, tmp_path / "w.pt")
    wrong = [{"merges": [1, 2]}, {"state_dict": {"a": "text"}}]
    for change in ({"embed_dim": 47}, {"vision_heads": 7}, {"vision_heads": 0}, {"x": 1}):
        wrong.append({"config": described["config"] | change})
    for damaged in ({}, {"clip": {}}, *({"clip": described | change} for change in wrong)):
        clip.save_checkpoint(tmp_path / "odd.pt", damaged)
        refused(tmp_path / "odd.pt", readers=[clip.load])


def test_hugging_face_folders_and_files(tmp_path):
    """Folder and file, safetensors, bin and shards; heads and activation come from config.json."""
    pytest.importorskip("safetensors")
    theirs = transformers_model(GELU_VIT)
    theirs.save_pretrained(tmp_path / "st")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert os.path.isfile(tmp_path / "shards" / "model.safetensors.index.json")
    os.makedirs(tmp_path / "bin")
    shutil.copy(tmp_path / "st" / "config.json", tmp_path / "bin")
    state = {f"module.clip.{key}": value for key, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    for name in ("st", "shards", "bin", "st/model.safetensors", "bin/pytorch_model.bin"):
        ours, _ = clip.load(tmp_path / name, "cpu")
        assert ours.config == GELU_VIT
        same_outputs(ours, theirs)
    del state["module.clip.text_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    fails("k_proj.bias", clip.load, tmp_path / "bin", "cpu")


@pytest.mark.parametrize("text, vision, refusal", [
    ({"intermediate_size": 200}, {"intermediate_size": 300}, None),
    ({"vocab_size": 702}, {}, None),  # tokens were added behind the end token,
    ({"vocab_size": 49410, "eos_token_id": 49407}, {}, None),  # and the default is not in the file
    ({"eos_token_id": 5}, {}, None), ({"num_attention_heads": 4}, {"num_attention_heads": 1}, None),
    ({"hidden_act": "gelu"}, {}, "hidden_act"),
    ({"hidden_act": "relu"}, {"hidden_act": "relu"}, "hidden_act"), ({}, {"image_size": 44}, "image_size"),
    ({}, {"layer_norm_eps": 1e-6}, "layer_norm_eps")])
def test_hugging_face_configurations(text, vision, refusal, tmp_path):
    """What a configuration changes about the function is followed, or refused by its name."""
    theirs = transformers_model(SMALL_VIT, text, vision)
    theirs.save_pretrained(tmp_path)
    if refusal:
        return fails(f"{refusal} .*not supported|{refusal}.*both towers", clip.load, tmp_path, "cpu")
    ours, _ = clip.load(tmp_path, "cpu")
    image, ids = a_batch(ours.config)
    end = text.get("eos_token_id", 699)
    ids = torch.where(ids == ours.vocab_size - 1, end, ids.where(ids != end, 1))
    if "vocab_size" in text:
        ids[0, 2] = text["vocab_size"] - 1
    for got, want in zip(outputs(ours, image, ids), outputs(theirs, image, ids)):
        close(got, want)
    config = json.loads((tmp_path / "config.json").read_text())
    for more, said in (({"text_config": config["text_config"] | {"num_hidden_layers": 1}}, "text layers 1"),
                       ({"text_config_dict": {"hidden_act": "gelu_new"}}, "gelu_new")):  # which counts
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        fails(said, clip.load, tmp_path, "cpu")


@pytest.mark.parametrize("vision, text, top, refusal", [
    ({"mlp_ratio": 4.9231}, {"mlp_ratio": 3.0}, {}, None),
    ({"patch_dropout": 0.5}, {}, {"quick_gelu": True}, None),
    ({}, {"pool_type": "eos", "eos_id": 5}, {}, None),
    ({"head_width": 16}, {"heads": 4}, {}, None),
    ({"pool_type": "avg"}, {}, {}, "pool_type"), ({}, {"pool_type": "last"}, {}, "pool_type"),
    ({}, {"no_causal_mask": True}, {}, "no_causal_mask"),
    ({"norm_kwargs": {"eps": 1e-2}}, {}, {}, "norm_kwargs"),
    ({"act_kwargs": {"approximate": "tanh"}}, {}, {}, "act_kwargs"),
    ({"ls_init_value": 0.1}, {}, {}, "ls_init_value"),
    ({"final_ln_after_pool": True}, {}, {}, "final_ln_after_pool"),
    ({"image_size": [32, 64]}, {}, {}, "image_size")])
def test_open_clip_configurations(vision, text, top, refusal, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 40, "layers": 2, "width": 64, "patch_size": 10, **vision}
    text = {"context_length": 20, "vocab_size": 700, "width": 64, "heads": 2, "layers": 2, **text}
    theirs = open_clip.CLIP(48, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), **top)
    torch.save(randomise(theirs).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 48, **top, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if refusal:
        return fails(f"[:(] ?{refusal} .* is not supported", clip.load, tmp_path, "cpu")
    ours, _ = clip.load(tmp_path, "cpu")
    image, ids = a_batch(ours.config)
    if "eos_id" in text:
        ids = torch.where(ids == 699, 5, ids.where(ids != 5, 1))
    for got, want in zip(outputs(ours, image, ids), outputs(theirs, image, ids)):
        close(got, want)


def test_preprocessing_is_the_folders(tmp_path):
    """Means, resizing and interpolation, of both formats; they travel with the weights."""
    transformers = pytest.importorskip("transformers")
    open_clip = pytest.importorskip("open_clip")
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    transformers_model(SMALL_VIT).save_pretrained(tmp_path / "hf")
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    square = {"height": 40, "width": 40}
    for stated in ({}, half, {"resample": 2}, {"size": {"shortest_edge": 52}},
                   {"size": square, "do_center_crop": False}):
        stated = {"size": {"shortest_edge": 40}, "crop_size": square, **stated}
        processor = transformers.CLIPImageProcessor(**stated)
        if stated["size"] is square:  # and in the file that transformers 5 writes
            os.unlink(tmp_path / "hf" / "preprocessor_config.json")
            tokenizer = transformers.CLIPTokenizer(vocab={"a": 0}, merges=[])
            transformers.CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path / "hf")
        else:
            processor.save_pretrained(tmp_path / "hf")
        model, preprocess = clip.load(tmp_path / "hf", "cpu")
        preprocess = pickle.loads(pickle.dumps(preprocess))  # it goes to worker processes
        want = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])[0]
        assert (preprocess(picture) - want).abs().max() < 0.03  # of a range of about 4
        clip.save(model, tmp_path / "w.pt")
        assert torch.equal(clip.load(tmp_path / "w.pt", "cpu")[1](picture), preprocess(picture))
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": {"image_size": 40, "width": 64, "head_width": 32},
                            "text_cfg": {"heads": 2}}}
    for stated in ({"mean": [0.5] * 3, "std": [0.5] * 3},
                   {"resize_mode": "squash", "interpolation": "bilinear"}):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": stated}))
        torch.save(make(SMALL_VIT).state_dict().copy(), tmp_path / "open_clip_pytorch_model.bin")
        theirs = open_clip.transform.PreprocessCfg(size=40, **stated)
        want = open_clip.transform.image_transform_v2(theirs, is_train=False)(picture)
        close(clip.load(tmp_path / "open_clip_pytorch_model.bin", "cpu")[1](picture), want)
    os.unlink(tmp_path / "hf" / "processor_config.json")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"do_rescale": false}')
    fails("do_rescale", clip.load, tmp_path / "hf", "cpu")


@pytest.mark.parametrize("whole", [False, True])
def test_a_folders_own_tokenizer(whole, tmp_path):
    """Its ids are used, and saved with the model. One that is no CLIP BPE is refused for texts."""
    own = clip.Tokenizer.train(["a red cone", "a small red cube"] * 3, 540)
    ids = list(range(own.vocab_size - 2))
    random.Random(0).shuffle(ids)
    vocab = dict(zip(own.symbols, [*ids, own.start, own.end]))
    transformers_model(replace(SMALL_VIT, vocab_size=own.vocab_size)).save_pretrained(tmp_path)
    if whole:
        transformers = pytest.importorskip("transformers")
        transformers.CLIPTokenizer(vocab=vocab, merges=own.merges).save_pretrained(tmp_path)
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        merges = "".join(f"{a} {b}\n" for a, b in own.merges)
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    texts = ["a red cone", "small cubes é"]
    model, _ = clip.load(tmp_path, "cpu")
    want = [[vocab[own.symbols[i]] for i in [own.start, *own.encode(text), own.end]] for text in texts]
    assert [row[:len(ids)] for row, ids in zip(model.tokenize(texts).tolist(), want)] == want
    assert model.tokenizer.decode(want[0]) == "a red cone "
    clip.save(model, tmp_path / "w.pt")
    clip.save_checkpoint(tmp_path / "best.pt", {"clip": clip.describe(model)})
    for name in ("w.pt", "best.pt"):
        assert torch.equal(clip.load(tmp_path / name, "cpu")[0].tokenize(texts), model.tokenize(texts))
    if whole:
        other = json.loads((tmp_path / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        fails("another normalizer", clip.load(tmp_path, "cpu")[0].tokenize, texts)
        other["normalizer"] = {"type": "Lowercase"}
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "added_tokens.json").write_text('{"<cat>": 541}')
    foreign, _ = clip.load(tmp_path / "model.safetensors", "cpu")
    assert foreign.encode_text(model.tokenize(texts)).shape == (2, 48)
    clip.save(foreign, tmp_path / "w.pt")
    for other in (foreign, clip.load(tmp_path / "w.pt", "cpu")[0]):
        fails("no byte-level BPE as CLIP's .tokens were added", other.tokenize, texts)
        fails("tokens were added", other.tokenizer.encode, "a")
        assert other.tokenizer.start == vocab["<|startoftext|>"]


def test_weights_within_other_checkpoints(tmp_path, vit):
    """Found by their names; of several, the first; what is left out is named."""
    state = dict(vit.state_dict())
    other = {f"ema_model.{key}": value + 1 for key, value in state.items() if value.is_floating_point()}
    hugging_face = dict(transformers_model(SMALL_VIT).state_dict())
    contents = {
        "the model_state_dict": {"epoch": 3, "model_state_dict": state, "loss": torch.ones(())},
        "a wrapper's": {"net": {f"module.clip_model.{key}": value for key, value in state.items()}},
        "numpy's": {"state_dict": state, "best": np.float64(0.5), "random": np.random.get_state()},
        "prompt.": {"prompt.token_embedding.weight": torch.ones(2, 64), "lr": {"token_embedding.weight": 0.1},
                    **{f"clip.{key}": value for key, value in state.items()}},
        "ema_model.": {f"model.{key}": value for key, value in state.items()} | other,
        "teacher": {"student": state, "teacher": other},
        "head.weight": {"head.weight": torch.ones(3), "logit_scale": torch.ones(()),
                        **{f"clip.{key}": value for key, value in state.items()}},
        "classifier.weight": state | {"classifier.weight": torch.ones(3)},
        "masks": state | dict.fromkeys(("attn_mask", "transformer.resblocks.0.attn_mask"), torch.ones(2))}
    for name, content in contents.items():
        torch.save(content, tmp_path / "w.pt")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded, _ = clip.load(tmp_path / "w.pt", "cpu", quick_gelu=True)
        state_equal(loaded.state_dict(), state)
        left = name.endswith((".", "weight", "teacher"))
        assert [name in str(x.message) for x in said] == [True] * left, name
    torch.save({"model": hugging_face}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="does not say its activation"):
        clip.load(tmp_path / "w.pt", "cpu")
    images = {key: value for key, value in state.items() if key.startswith("visual.")}
    texts = {key: value for key, value in state.items() if key not in images}
    for content, said in ((images, "the text tower is missing"), (texts, "the image tower is missing"),
                          (hugging_face | {"vision_model.head.probe": torch.ones(1)}, "a SigLIP"),
                          (state | {"visual.trunk.norm": torch.ones(1)}, "timm's"),
                          (state | {"visual.a.lora_A.weight": torch.ones(1)}, "adapter that is not merged")):
        torch.save(content, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", said, [clip.load])
    longer = {"positional_embedding": torch.randn(50, 64), "positional_embedding_res": torch.randn(50, 64)}
    torch.save(state | longer, tmp_path / "long.pt")  # Long-CLIP's
    got = clip.load(tmp_path / "long.pt", "cpu", quick_gelu=True)[0].positional_embedding
    assert torch.equal(got, torch.cat([x[a:b] for x, a, b in zip(longer.values(), (0, 20), (20, 50))]))


def test_safetensors_equal_the_library(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    numbers = torch.tensor([[0.0, 1.0], [2.5, -3.0]])
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
              torch.uint8, torch.bool)
    tensors = {str(dtype): numbers.abs().to(dtype) for dtype in dtypes}
    tensors |= {"negative": numbers, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    st.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    state_equal(clip.read_safetensors(str(tmp_path / "a.safetensors")), tensors)


def test_open_clip_checkpoints(tmp_path):
    """Nested, of a compiled model in DataParallel, with a custom text tower. Heads and activation come from
    the configuration; without it GELU is taken, with a warning."""
    theirs = open_clip_model(replace(OPENAI_VIT, quick_gelu=False), custom=True)
    state = dict(theirs.state_dict(), logit_scale=theirs.logit_scale.detach().reshape(1))
    assert "text.token_embedding.weight" in state
    state = {f"module._orig_mod.{key}": value for key, value in state.items()}
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    with pytest.warns(UserWarning, match="activation; taking GELU"):
        same_outputs(clip.load(path, "cpu")[0], theirs)
    config = {"embed_dim": 48, "quick_gelu": True, "text_cfg": {"heads": 2, "width": 64},
              "vision_cfg": {"layers": 2, "width": 64, "head_width": 16, "image_size": 40}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert clip.load(tmp_path, "cpu")[0].config == SMALL_VIT
    for broken in ("{broken", '{"a": ' * 100_000, '{"model_cfg": {}}'):
        (tmp_path / "open_clip_config.json").write_text(broken)
        fails("open_clip_config.json|configuration", clip.load, tmp_path, "cpu")


# ---------------------------------------------------------------- files that must not load

def safetensors(tensors, length=None):
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}  # of a tensor in 16 bytes
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_an_archive_with_less_in_it_than_it_says(tmp_path, vit):
    jit_archive(vit, tmp_path / "whole.pt", False)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    for name in [name for name in records if "/data/" in name or "/constants/" in name][:5]:
        with zipfile.ZipFile(tmp_path / "less.pt", "w") as less:
            for other, content in records.items():
                less.writestr(other, content[:-4] if other == name else content)
        refused(tmp_path / "less.pt", "refused, damaged")


WRONG_ENTRIES = [
    ({"data_offsets": [-16, 0]}, "outside"), ({"data_offsets": [8, 24]}, "outside"),
    ({"data_offsets": [0, 32]}, "wrong size"), ({"shape": [2 ** 62, 4]}, "wrong size"),
    ({"shape": [-2, -2]}, "refused, damaged"), ({"dtype": "F8_X"}, "F8_X is not supported")]
REFUSED = {  # what it is: its content, what the error says
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "of Git LFS"),
    "page": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "refused, damaged"),
    "no zip": (b"PK\x03\x04 but no zip", "refused, damaged"),
    **{f"safetensors {change}": (safetensors({"w": ENTRY | change}), said) for change, said in WRONG_ENTRIES},
    "safetensors, huge header": (safetensors({"w": ENTRY}, 2 ** 63), "refused, damaged")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name, tmp_path):
    body, match = REFUSED[name]
    (tmp_path / "odd.pt").write_bytes(body)
    refused(tmp_path / "odd.pt", match)


def test_reading_makes_every_error_one_line():
    class MyError(clip.OneLineError):
        pass

    for raised, said in ((KeyError("a\nb"), "f.pt: refused, damaged.*a.*b.*; fetch it"),
                         (MyError("as it is"), "^as it is$"),
                         (PermissionError(13, "Permission denied"), "cannot be read .Permission denied.;")):
        with pytest.raises(MyError, match=said) as e, clip.reading("f.pt", "fetch it", MyError):
            raise raised
        assert e.value.__cause__ is None and "\n" not in str(e.value)
    with pytest.raises(KeyboardInterrupt), clip.reading("f.pt", "fetch it"):
        raise KeyboardInterrupt
    assert str(clip.CheckpointError("a\nb\x1b[31m")) == "a?b?[31m"


def test_shards_lie_beside_their_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../../etc/passwd"}}')
    fails(re.escape(str(tmp_path / "passwd")), clip.load, index, "cpu")


def test_weights_of_something_else(tmp_path, vit):
    """Also: the first missing and the first unexpected key are named."""
    refused(tmp_path, "a folder with no weights", [clip.load])
    state = vit.state_dict()
    del state["transformer.resblocks.1.ln_2.bias"]
    state["visual.head.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", r"ViT.*1 missing \(first 'transformer.resblocks.1.ln_2.bias'\), "
            r"1 unexpected \(first 'visual.head.weight'\)", [clip.load])
    for other in ({"conv1.weight": torch.ones(3)}, {1: torch.ones(3), "x": 2}, {}, torch.ones(3)):
        torch.save(other, tmp_path / "r.pt")
        refused(tmp_path / "r.pt")
    for key, shape in (("positional_embedding", (20, 63)), ("visual.positional_embedding", (18, 64)),
                       ("ln_final.weight", ()), ("visual.conv1.weight", (64, 3))):
        torch.save(vit.state_dict() | {key: torch.ones(shape)}, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", readers=[clip.load])


def test_writing_is_atomic(tmp_path, vit):
    """A failure at any point leaves the old file whole and no other file behind."""
    path = tmp_path / "last.pt"
    clip.save_checkpoint(path, {"epoch": 1})
    old = path.read_bytes()

    def half(error):
        def write(f):
            f.write(b"half")
            raise error
        return write

    for error in (OSError(28, "No space left on device"),
                  RuntimeError("[enforce fail at inline_container.cc] unexpected pos\nmore lines")):
        fails("last.pt: cannot be written", clip.write_file, path, half(error))
    with pytest.raises(KeyboardInterrupt):
        clip.write_file(path, half(KeyboardInterrupt()))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        clip.save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["last.pt"]
    fails("cannot be written", clip.save, vit, path / "under a file" / "w.pt")
    clip.save_checkpoint(path, {"epoch": 2})
    assert clip.load_checkpoint(path)["epoch"] == 2


# ---------------------------------------------------------------- the tokenizer

def captions():
    """Lines of real captions and of real products from ../shared/data, as far as present."""
    texts = []
    for name in ("flickr8k/captions.txt", "fashion/styles.csv"):
        path = os.path.join(SHARED, "data", name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                texts += f.read().split("\n")
    return texts


NASTY = [
    "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "🫠", "e\u0301", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞", "&amp;amp;", "&lt;b&gt;", "&#x1F600;", "&nbsp;",
    "&notit;", "&#0;", "\x00", "\x07", "\x1b[31m", "\u200b", "\u202e", "\ufeff", "\u2028", "\r\n", "\t",
    "東京タワー", "雪だるま", "한국어", "ไทย", "العربية", "हिन्दी", "âœ”", "schÃ¶n", "İstanbul", "ǅ", "ﬁ", "ẞ", "½",
    "²", "Ⅷ", "٣", "1,000.50", "don't", "I'LL", "'S'", "''", "\ud83d", "<|x|>", "</w>", "!!!???",
    "__init__", "café", "naïve", "CamelCase", "a" * 40, "xyz" * 25, "-" * 60, "\U0010ffff", "\ue000", "µ",
    "“quoted”", "…", "—", "ÿ", "\xad", "\x85", "\xa0", " ", "  "]


def nasty(n, seed=0):
    """Strings made to break tokenizers: emoji, combining marks, entities, controls, mojibake, long runs."""
    r = random.Random(seed)

    def piece():
        if r.random() < 0.6:
            return r.choice(NASTY)
        codes = [r.choice((r.randrange(32, 127), r.randrange(160, 0xd7ff))) for _ in range(r.randrange(1, 6))]
        return "".join(map(chr, codes))

    out = []
    for _ in range(n):
        pieces = [piece() for _ in range(r.randrange(0, 9))]
        out.append(r.choice(("", " ")).join(pieces))
    return out


def brute_force_training(texts, vocab_size):
    """Sennrich's loop, word for word: join the most frequent pair everywhere, from the left, again."""
    words = [word for text in texts for word in clip.PATTERN.findall(clip.clean(text))]
    words = [clip.Tokenizer([])._split(word) for word in words]
    merges = []
    while len(merges) < vocab_size - 514:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if best not in merges:
            merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [word[i] + word[i + 1]]
                i += 1
    return merges


def test_tokenizer_equals_open_clip(tok):
    """More than 5,000 strings: real captions where present, and what breaks tokenizers."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.tokenizer.SimpleTokenizer()
    r = random.Random(1)
    letters = "".join(r.choice("abc de,f ") for _ in range(10_000))
    long = [letters, "word " * 2000, "é🙂 " * 3334, "&amp;" * 2000, "東京 " * 3334, "x" * 700, "ab" * 300]
    texts = ["", " ", "\n\t"] + captions() + nasty(5000) + long
    assert len(texts) >= 5000 and tok.vocab_size == theirs.vocab_size == 49408
    for text in texts:
        assert tok.encode(text) == theirs.encode(text), repr(text[:200])
    some = texts[:200] + texts[-300:]
    assert torch.equal(tok(some, truncate=True).long(), theirs(some))


def test_decode_round_trip(tok):
    r = random.Random(0)
    long = "".join(r.choice("abcdefgh") for _ in range(10_000))  # one word
    for text in nasty(500, seed=5) + [long]:
        assert tok.decode(tok.encode(text)).replace(" ", "") == clip.clean(text).replace(" ", ""), repr(text)
    assert tok.encode("<|startoftext|>a dog<|endoftext|>") == [49406, 320, 1929, 49407]  # as OpenAI's
    ids = clip.tokenize("Two dogs, running!")[0]
    assert tok.decode(ids[:int(ids.argmax()) + 1]) == "two dogs , running ! "
    assert clip.clean("half \ud83d a pair") == "half \ufffd a pair"  # broken JSON must not end a run


def test_a_symbol_of_two_spellings():
    """Every copy of a pair is merged before the pair that the first copy makes with its neighbour."""
    merges = [("a", "a"), ("a", "b"), ("a", "ab"), ("aab", "aa"), ("aa", "b")]
    tokenizer = clip.Tokenizer(merges)
    assert [tokenizer.symbols[i] for i in tokenizer._merge("aabaabc")] == ["aab", "aab", "c</w>"]


def test_training_a_tokenizer():
    r = random.Random(0)
    words = ["".join(r.choice("abc") for _ in range(r.randrange(1, 9))) for _ in range(60)]
    cones = ["a tall red cone", "a small red cube", "the tall blue cone"] * 4
    for texts in (cones, nasty(40, seed=9), captions()[:60] or ["fallback text text"], [" ".join(words)]):
        for size in (514, 530, 640):
            trained = clip.Tokenizer.train(texts, size)
            assert trained.merges == brute_force_training(texts, size)
            assert trained.vocab_size == 514 + len(trained.merges) <= size
    small = clip.Tokenizer.train(cones, 640)
    assert clip.Tokenizer.train(cones[::-1], 640).merges == small.merges  # order does not matter
    assert len(small.encode("a tall red cone")) == 4
    assert small.decode(small.encode("Zebra ß!")) == "zebra ß ! "
    for nothing in (None, float("nan"), 3):
        with pytest.raises(TypeError, match="texts are strings; one is"):
            small(["a", nothing])
    with pytest.raises(ValueError, match="at least 514"):
        clip.Tokenizer.train(["a"], 513)
