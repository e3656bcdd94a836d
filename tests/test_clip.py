"""Tests of clip.py: equal to its peers, safe on bad files, exact where it takes a shorter way.

Peers (open_clip_torch, transformers, safetensors) and ../shared are used where present, else tests skip.
"""
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import types
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import clip  # noqa: E402

SHARED = os.path.join(ROOT, "..", "shared")
BPE = "bpe_simple_vocab_16e6.txt.gz"
SMALL_VIT = clip.Config(48, 40, 2, 64, 10, 20, 700, 64, 2, 2, 4)  # patches and heads that nobody publishes
SMALL_RN = clip.Config(48, 64, (1, 2, 1, 1), 8, None, 20, 700, 64, 1, 2, 4)


# ---------------------------------------------------------------- helpers

def randomise(model, seed=0):
    """Fill every tensor with what matters: no zero bias, no identity as norm, no fresh statistics."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=g)
            elif key.endswith("num_batches_tracked"):
                value.fill_(3)
            elif key == "logit_scale":
                value.fill_(3.1)
            elif value.ndim < 2:
                mean = 1.0 if key.endswith("weight") else 0.0
                last = ("ln_post.bias", "ln_final.bias", "post_layernorm.bias", "final_layer_norm.bias")
                if key.endswith(last):
                    mean = 0.2
                value.normal_(mean, 0.2, generator=g)
            elif value.ndim == 4 and "conv1" not in key:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=g)
            else:
                value.normal_(0, 0.5 * value.shape[-1] ** -0.5, generator=g)
                # Features share a direction: a cosine near 0 is all cancellation, and compares nothing.
                if key.endswith(("visual.proj", "projection", "projection.weight")):
                    value.add_(8 / max(value.shape))
    return model.eval()


def make(config, seed=0):
    with torch.device("meta"):
        model = clip.CLIP(config)
    model.to_empty(device="cpu")
    return randomise(model, seed)


def a_batch(config, images=2, texts=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = config.context_length
    text = torch.zeros(texts, n, dtype=torch.int64)
    for i, length in enumerate([n, 2, n // 2, 5, 3][:texts]):  # a full row, an empty text, some between
        text[i, :length] = torch.randint(1, config.vocab_size - 2, (length,), generator=g)
        text[i, 0] = config.vocab_size - 2
        text[i, length - 1] = config.vocab_size - 1
    return torch.randn(images, 3, config.image_resolution, config.image_resolution, generator=g), text


def close(a, b, tol=1e-5):
    assert a.shape == b.shape and torch.isfinite(a).all() and a.abs().max() > 0
    assert (a - b).abs().max() <= tol * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


def all_close(got, want, tol=1e-5):
    for a, b in zip(got, want, strict=True):
        close(a, b, tol)


def outputs(model, image, text):
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(text), model(image, text)[0]


def open_clip_twin(model):
    """open_clip's model of the same architecture, its weights not yet set."""
    open_clip = pytest.importorskip("open_clip")
    c = model.config
    is_vit = c.vision_patch_size is not None
    vision = dict(layers=c.vision_layers if is_vit else list(c.vision_layers), width=c.vision_width,
                  patch_size=c.vision_patch_size, image_size=c.image_resolution,
                  head_width=c.vision_width * (1 if is_vit else 32) // c.vision_heads)
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.transformer_width,
                heads=c.transformer_heads, layers=c.transformer_layers)
    with torch.device("meta"):  # no time spent on weights that are replaced
        twin = open_clip.model.CLIP(c.embed_dim, vision, text, quick_gelu=c.quick_gelu).eval()
    twin.to_empty(device="cpu")
    twin.attn_mask.copy_(torch.full(twin.attn_mask.shape, -torch.inf).triu(1))
    return twin


def open_clip_outputs(twin, image, text):
    with torch.no_grad():
        i = twin.encode_image(image)
        t = twin.encode_text(text)
        return i, t, twin.logit_scale.exp() * F.normalize(i, dim=-1) @ F.normalize(t, dim=-1).t()


HUGGING_FACE_NAMES = (  # written down here independently of clip.py's
    ("text_model.", ""), ("vision_model.", "visual."), ("encoder.layers.", "transformer.resblocks."),
    ("embeddings.", ""), ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"), ("self_attn.", "attn."), ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"), ("patch_embedding", "conv1"),
    ("position_embedding.weight", "positional_embedding"), ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"))


def hugging_face(model):
    """transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    act = "quick_gelu" if c.quick_gelu else "gelu"
    text_config = dict(
        hidden_size=c.transformer_width, num_attention_heads=c.transformer_heads, hidden_act=act,
        num_hidden_layers=c.transformer_layers, intermediate_size=4 * c.transformer_width,
        max_position_embeddings=c.context_length, vocab_size=c.vocab_size,
        bos_token_id=c.vocab_size - 2, eos_token_id=c.vocab_size - 1)
    vision_config = dict(
        hidden_size=c.vision_width, num_attention_heads=c.vision_heads, hidden_act=act,
        num_hidden_layers=c.vision_layers, intermediate_size=4 * c.vision_width,
        image_size=c.image_resolution, patch_size=c.vision_patch_size)
    config = transformers.CLIPConfig(
        text_config=text_config, vision_config=vision_config, projection_dim=c.embed_dim)
    with torch.device("meta"):
        twin = transformers.CLIPModel(config).eval()
    ours = model.state_dict()
    state = {}
    for theirs, value in twin.state_dict().items():
        key = theirs
        for old, new in HUGGING_FACE_NAMES:
            key = key.replace(old, new)
        part = next((x for x in "qkv" if f".{x}_proj." in key), None)
        if part:
            joined = ours[key.replace(f"{part}_proj.", "in_proj_")]
            state[theirs] = joined.chunk(3)["qkv".index(part)].clone()
        elif key.endswith(("visual.proj", "text_projection")):
            state[theirs] = ours[key].t().contiguous()
        else:
            state[theirs] = ours[key]
        assert state[theirs].shape == value.shape
    twin.load_state_dict(state, assign=True)
    for module in twin.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return twin


def same_as_hugging_face(ours, theirs, image, text):
    with torch.no_grad():
        out = theirs(input_ids=text, pixel_values=image)
    i, t, logits = outputs(ours, image, text)
    close(F.normalize(i, dim=-1), out.image_embeds)
    close(F.normalize(t, dim=-1), out.text_embeds)
    close(logits, out.logits_per_image)


def fails(match, function, *args, **kwargs):
    """The call raises a CheckpointError of one line that matches."""
    with pytest.raises(clip.CheckpointError, match=match) as e:
        function(*args, **kwargs)
    assert "\n" not in str(e.value)


def state_equal(a, b):
    assert dict(a).keys() == dict(b).keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


@pytest.fixture(scope="module")
def vit():
    return make(SMALL_VIT, seed=1)


@pytest.fixture(scope="module")
def resnet():
    return make(SMALL_RN, seed=2)


@pytest.fixture(scope="module")
def big():
    """Published architectures by name, made once."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = make(clip.MODELS[name][0])
        return models[name]

    return get


@pytest.fixture(scope="module")
def tok():
    """OpenAI's tokenizer; its merges file from $CLIP_CACHE or ../shared/clip."""
    folders = [os.environ.get("CLIP_CACHE") or "", os.path.join(SHARED, "clip")]
    path = next((p for p in (os.path.join(f, BPE) for f in folders) if os.path.isfile(p)), None)
    if path is None:
        pytest.skip(f"{BPE} is neither in $CLIP_CACHE nor in ../shared/clip")
    patch = pytest.MonkeyPatch()
    patch.setenv("CLIP_CACHE", os.path.dirname(path))
    yield clip.default_tokenizer()
    patch.undo()


def captions():
    """Real captions and product names from ../shared/data, as far as present."""
    texts = []
    for name, column in (("flickr8k/captions.txt", "caption"), ("fashion/styles.csv", "productDisplayName")):
        path = os.path.join(SHARED, "data", name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", newline="") as f:
                texts += [row[column] for row in csv.DictReader(f) if row[column]]
    return texts


NASTY = [
    "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "🫠", "e\u0301", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞", "&amp;amp;", "&lt;b&gt;", "&#x1F600;", "&nbsp;",
    "&notit;", "&#0;", "\x00", "\x07", "\x1b[31m", "\u200b", "\u202e", "\ufeff", "\u2028", "\r\n", "\t",
    "東京タワー", "雪だるま", "한국어",
    "ไทย", "العربية", "हिन्दी", "âœ”", "schÃ¶n", "İstanbul", "ǅ", "ﬁ", "ẞ", "½", "²", "Ⅷ", "٣", "1,000.50",
    "don't", "I'LL", "'S'", "''", "\ud83d", "<|x|>", "</w>", "!!!???", "__init__", "café", "naïve",
    "CamelCase",
    "a" * 40, "xyz" * 25, "-" * 60, "\U0010ffff", "\ue000", "µ", "“quoted”", "…", "—",
    "ÿ", "\xad", "\x85", "\xa0", " ", "  "]


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


# ---------------------------------------------------------------- the model

SMALL = {"small ViT": SMALL_VIT, "small ResNet": SMALL_RN,
         "small GELU ViT": replace(SMALL_VIT, quick_gelu=False)}


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B/16", "RN50", *SMALL])
@pytest.mark.parametrize("peer", ["open_clip", "transformers"])
def test_equals_peers(peer, name, big, tmp_path):
    """Same weights: image features, text features and logits to 1e-5, relative to the largest."""
    if peer == "transformers" and "ViT" not in name:
        pytest.skip("transformers has no CLIP with a ResNet")
    model = make(SMALL[name]) if name in SMALL else big(name)
    image, text = a_batch(model.config, images=3 if name in SMALL else 1)
    if peer == "transformers":
        twin = hugging_face(model)
        state_equal(clip._from_hugging_face(twin.state_dict()), model.state_dict())
        same_as_hugging_face(model, twin, image, text)
        return
    twin = open_clip_twin(model)
    if name in SMALL:  # what we save, open_clip loads
        clip.save(model, tmp_path / "weights.pt")
        pytest.importorskip("open_clip").load_checkpoint(twin, str(tmp_path / "weights.pt"))
    else:
        twin.load_state_dict(model.state_dict(), assign=True)
    all_close(outputs(model, image, text), open_clip_outputs(twin, image, text))


def test_openai_builds_and_reads_what_save_writes(tmp_path):
    """open_clip keeps OpenAI's own loader: it infers the architecture from the keys and loads strictly."""
    openai = pytest.importorskip("open_clip.openai")
    config = replace(SMALL_VIT, vision_heads=1, transformer_heads=1)  # OpenAI's rule: 64 channels a head
    for model in (make(config), make(SMALL_RN)):
        for p in model.parameters():
            p.data.copy_(p.half())  # that loader rounds to half precision
        clip.save(model, tmp_path / "w.pt")
        twin = openai.load_openai_model(str(tmp_path / "w.pt"), precision="fp32", device="cpu")
        image, text = a_batch(model.config)
        all_close(outputs(model, image, text), open_clip_outputs(twin.eval(), image, text))


def plain_text(model, text):
    """The text encoder as the paper has it: every column, an explicit mask. -> (B, columns, embed_dim)."""
    c = model.config
    x = model.token_embedding(text) + model.positional_embedding[:text.shape[1]]
    mask = torch.full((text.shape[1],) * 2, float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (c.transformer_heads, -1)).transpose(1, 2) for y in (q, k, v))
        a = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        x = x + block.attn.out_proj((a @ v).transpose(1, 2).flatten(2))
        h = block.mlp.c_fc(block.ln_2(x))
        h = h * torch.sigmoid(1.702 * h) if c.quick_gelu else F.gelu(h)
        x = x + block.mlp.c_proj(h)
    return model.ln_final(x) @ model.text_projection


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_packed_text_equals_all_columns(quick_gelu):
    """Packing changes no output and no gradient, nor does junk after the end, against all columns."""
    config = replace(SMALL_VIT, context_length=77, quick_gelu=quick_gelu)
    model = make(config)
    _, text = a_batch(config, texts=5)
    end = text.argmax(-1)
    for columns in (77, 39):  # 39: every text but the first, cut to the longest
        t = text if columns == 77 else text[1:, :columns]
        e = t.argmax(-1)
        plain = plain_text(model, t)
        feature, tokens, mask = model.encode_text(t, tokens=True)
        assert torch.equal(mask, torch.arange(int(e.max()) + 1) <= e[:, None])
        close(feature, plain[torch.arange(len(t)), e])
        close(model.encode_text(t.int()), plain[torch.arange(len(t)), e])
        close(tokens, plain[:, :tokens.shape[1]] * mask[..., None])
        assert (tokens[~mask] == 0).all()
    junk = text.clone()
    junk[1, 2:] = 5
    assert torch.equal(model.encode_text(junk), model.encode_text(text))

    pull = torch.randn(5, config.embed_dim, generator=torch.Generator().manual_seed(3))
    grads = []
    for feature in (model.encode_text(text), plain_text(model, text)[torch.arange(5), end]):
        model.zero_grad()
        (feature * pull).sum().backward()
        of_text = [(k, p) for k, p in model.named_parameters() if not k.startswith(("visual", "logit"))]
        grads.append({k: p.grad.clone() for k, p in of_text})
    assert len(grads[0]) == 2 * 12 + 5
    for key in grads[0]:
        close(grads[0][key], grads[1][key], 1e-4)


def test_text_that_cannot_be_encoded(vit):
    _, text = a_batch(SMALL_VIT)
    long = torch.cat([text[:1, :-1], text[:1]], 1).clamp(max=SMALL_VIT.vocab_size - 2)
    long[0, -1] = SMALL_VIT.vocab_size - 1
    with pytest.raises(ValueError, match="39 tokens.*context is 20"):
        vit.encode_text(long)
    text[0, 3] = SMALL_VIT.vocab_size
    with pytest.raises(ValueError, match="vocabulary is 700"):
        vit.encode_text(text)
    with pytest.raises(ValueError, match=r"\(B, columns\)"):
        vit.encode_text(text[0])
    assert vit.encode_text(text[:0]).shape == (0, 48)


def test_image_tokens(vit, resnet):
    """The first token is the image feature; a ResNet's tokens are torch's attention, asked at every place."""
    image, _ = a_batch(SMALL_VIT)
    feature, tokens = vit.encode_image(image, tokens=True)
    assert tokens.shape == (2, 17, 48)
    close(feature, vit.encode_image(image))
    assert torch.equal(feature, tokens[:, 0])
    shuffled = image.clone()
    shuffled[..., :10, :10] = image[..., 10:20, 10:20]  # the first patch changes: its own token most of all
    moved = (vit.encode_image(shuffled, tokens=True)[1] - tokens).norm(dim=-1)[0]
    assert moved[1:].argmax() == 0

    image, _ = a_batch(SMALL_RN)
    seen = {}
    handle = resnet.visual.layer4.register_forward_hook(lambda m, i, o: seen.update(x=o))
    feature, tokens = resnet.encode_image(image, tokens=True)
    handle.remove()
    pool = resnet.visual.attnpool
    x = seen["x"].flatten(2).permute(2, 0, 1)  # (h w, B, C), as torch's own attention takes it
    x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
    biases = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    plain = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], pool.heads, None, biases, None, None, False, 0, pool.c_proj.weight,
        pool.c_proj.bias, use_separate_proj_weight=True, training=False, need_weights=False,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight)[0].transpose(0, 1)
    close(tokens, plain)
    close(feature, resnet.encode_image(image))
    assert torch.equal(feature, tokens[:, 0])
    for model in (vit, resnet):
        with pytest.raises(ValueError, match=r"takes \(B, 3, "):
            model.encode_image(torch.zeros(1, 3, 33, 33))


def test_attention_weights_on_request(vit):
    """The kept weights reproduce the block's output, so pictures show what the model computes."""
    attn = vit.transformer.resblocks[0].attn
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    vit.encode_text(a_batch(SMALL_VIT)[1])
    assert attn.weights is None
    attn.keep_weights = True
    out, weights = attn(x), attn.weights
    attn.keep_weights, attn.weights = False, None
    v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)[2]
    v = v.unflatten(-1, (2, -1)).transpose(1, 2)
    close(attn.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)
    assert weights.triu(1).abs().max() == 0 and weights.shape == (2, 2, 6, 6)


def test_image_size_interpolates_positions(vit, resnet, tmp_path):
    for model, new, step, key in ((vit, 60, 10, "visual.positional_embedding"),
                                  (resnet, 96, 32, "visual.attnpool.positional_embedding")):
        clip.save(model, tmp_path / "w.pt")
        grown, preprocess = clip.load(tmp_path / "w.pt", "cpu", image_size=new)
        assert grown.visual.input_resolution == grown.config.image_resolution == new
        assert preprocess.transforms[1].size == (new, new)
        assert grown.encode_image(torch.zeros(1, 3, new, new)).shape == (1, 48)
        old = model.state_dict()[key]
        got = grown.state_dict()[key]
        n = new // step
        assert torch.equal(old[0], got[0]) and got.shape == (n * n + 1, old.shape[1])
        side = int((len(old) - 1) ** 0.5)
        want = F.interpolate(old[1:].t().reshape(1, -1, side, side), (n, n), mode="bicubic").flatten(2)[0].t()
        close(got[1:], want)
        fails("multiple of", clip.load, tmp_path / "w.pt", "cpu", image_size=33)
    fails("multiple of 32", clip.build, "tiny-rn", image_size=50)


def test_build():
    before = torch.random.get_rng_state()
    a, b, other = (clip.build("tiny", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    state_equal(a.state_dict(), b.state_dict())
    assert not torch.equal(a.visual.proj, other.visual.proj)
    assert clip.build("tiny", image_size=64).encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    small = clip.Tokenizer.train(["a red cone", "a red cube"], 520)
    assert clip.build("tiny", small).vocab_size == small.vocab_size


@pytest.mark.parametrize("fast_cpu", [True, False])
def test_autocast(fast_cpu, vit, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast_cpu, raising=False)

    def dtype(amp, config, device="cpu"):
        parameter = types.SimpleNamespace(device=torch.device(device))
        model = types.SimpleNamespace(parameters=lambda: iter([parameter]), config=config)
        with clip.autocast(amp, model):
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32

    real = torch.bfloat16 if fast_cpu else torch.float32
    assert dtype("auto", clip.MODELS["ViT-B/32"][0]) == dtype("auto", clip.MODELS["RN50"][0]) == real
    assert all(dtype("auto", clip.MODELS[name][0]) == torch.float32 for name in clip.SCRATCH)
    assert dtype("bf16", SMALL_VIT) == torch.bfloat16
    assert dtype("off", clip.MODELS["ViT-B/32"][0]) == torch.float32
    with pytest.raises(ValueError, match="fp16"):
        clip.autocast("fp16", vit)


def test_logits_are_float32_under_autocast(vit):
    image, text = a_batch(SMALL_VIT)
    with torch.no_grad(), clip.autocast("bf16", vit):
        i = vit.encode_image(image)
        t = vit.encode_text(text)
        logits = vit(image, text)[0]
    assert i.dtype == t.dtype == torch.bfloat16 and logits.dtype == torch.float32
    want = vit.logit_scale.exp() * F.normalize(i.float(), dim=-1) @ F.normalize(t.float(), dim=-1).t()
    assert torch.equal(logits, want)
    close(i.float(), vit.encode_image(image), 0.05)
    close(t.float(), vit.encode_text(text), 0.05)


def test_compile_blocks():
    if not any(shutil.which(c) for c in ("g++", "clang++", os.environ.get("CXX") or "g++")):
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    config = replace(SMALL_VIT, vision_layers=1, transformer_layers=1)
    model = make(config)
    keys = list(model.state_dict())
    image, text = a_batch(config)
    want = outputs(model, image, text)
    clip.compile_blocks(model)
    for transformer in (model.visual.transformer, model.transformer):
        assert transformer.resblocks[0]._compiled_call_impl is not None
    all_close(outputs(model, image, text), want)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("matmul", [None, types.SimpleNamespace()])
def test_fast_float32_where_torch_has_no_such_switch(matmul, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", matmul, raising=False)
    assert clip.fast_float32() is False


# ---------------------------------------------------------------- as OpenAI's package

def test_available_models():
    assert clip.available_models() == [
        "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]


def test_architectures_equal_open_clip():
    """Parameter names and shapes of all nine, on the meta device."""
    open_clip = pytest.importorskip("open_clip")
    for name in clip.available_models():
        with torch.device("meta"):
            ours = clip.CLIP(clip.MODELS[name][0])
            cfg = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336") + "-quickgelu")
            parts = (cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"])
            theirs = open_clip.model.CLIP(*parts, quick_gelu=True)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes, name
        vision = theirs.visual.attnpool if name[0] == "R" else theirs.visual.transformer.resblocks[0].attn
        assert ours.config.vision_heads == vision.num_heads, name
        assert ours.config.transformer_heads == theirs.transformer.resblocks[0].attn.num_heads, name


def test_a_script_written_for_openai_runs(tok, tmp_path):
    from PIL import Image
    config = replace(SMALL_VIT, context_length=77, vocab_size=49408)
    clip.save(make(config), tmp_path / "ours.pt")
    with pytest.warns(UserWarning, match="jit=True"):
        model, preprocess = clip.load(str(tmp_path / "ours.pt"), device="cpu", jit=True)
    assert not model.training and model.dtype == torch.float32 and model.visual.input_resolution == 40
    assert model.context_length == 77 and model.vocab_size == 49408 and model.visual.output_dim == 48
    text = clip.tokenize(["a diagram", "a dog", "a cat"])
    assert text.dtype == torch.int32 and text.shape == (3, 77)
    assert text[1].tolist() == [49406, 320, 1929, 49407] + [0] * 73  # as OpenAI's package has it
    assert clip.tokenize("a dog", context_length=5).tolist() == [[49406, 320, 1929, 49407, 0]]
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize(["fine", "dog " * 76])
    cut = clip.tokenize("dog " * 76, truncate=True)
    assert cut.tolist() == [[49406] + [1929] * 75 + [49407]]
    assert torch.equal(clip.tokenize("dog " * 75), cut)  # 75 words just fit

    picture = Image.effect_noise((90, 61), 80).convert("RGBA")
    image = preprocess(picture).unsqueeze(0)
    per_image, per_text = model(image, text)
    assert per_image.shape == (1, 3) and torch.equal(per_text, per_image.t())
    cosine = F.cosine_similarity(model.encode_image(image), model.encode_text(text))
    close(per_image, 22.197952 * cosine[None], 1e-5)  # exp(3.1)


def test_preprocess_equals_torchvision():
    from PIL import Image
    from torchvision.transforms import v2
    theirs = v2.Compose([
        v2.RGB(), v2.Resize(40, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(40),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])
    ours = pickle.loads(pickle.dumps(clip.transform(40)))  # it goes to worker processes
    for size, mode in (((90, 61), "RGB"), ((33, 70), "RGB"), ((64, 64), "L"), ((10, 12), "RGB")):
        noise = Image.effect_noise(size, 90).convert(mode)
        assert ours(noise).shape == (3, 40, 40) and torch.allclose(ours(noise), theirs(noise), atol=1e-6)
    assert ours(Image.new("P", (50, 50))).shape == (3, 40, 40)


def test_unknown_names(tmp_path):
    fails(r"did you mean 'ViT-B/32'.*RN50x64", clip.load, "ViT-B-32", "cpu")
    fails("'tiny' was never published", clip.load, "tiny")
    fails("no such file", clip.load, str(tmp_path / "none.pt"))


# ---------------------------------------------------------------- downloads

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        server.opened.wait(60)
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = 0
        if server.ranges and self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) - server.shift
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:server.breaks.pop(self.path, len(content))])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine.

    files: path -> content; asked: the (path, Range) of each request; ranges: whether it answers ranges, and
    `shift` bytes too early; breaks: path -> at which byte it hangs up, once; opened: not set, no answer.
    """
    monkeypatch.setenv("no_proxy", "*")
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.asked, s.breaks = {}, [], {}
    s.ranges = True
    s.shift = 0
    s.opened = threading.Event()
    s.opened.set()
    s.url = f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


CONTENT = bytes(range(256)) * 20  # 5120 bytes


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_after_a_break(ranges, server, tmp_path, monkeypatch, capsys):
    server.files["/x"] = CONTENT
    server.ranges = ranges
    url = server.url + "/x"
    part = tmp_path / "new" / "x.part"
    for broken in (1000, 2000):
        server.breaks["/x"] = broken
        fails(f"^{url}: the connection broke after {broken} of 5120 bytes; run the command again to go on$",
              clip.fetch, url, str(part))
        assert part.read_bytes() == CONTENT[:broken]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert clip.fetch(url, str(part)) == str(part)
    assert part.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=1000-", "bytes=2000-"]
    assert capsys.readouterr().err == "\rx: 0 of 0 MiB\n"  # progress, on a terminal alone


def test_fetch_errors(server, tmp_path):
    url = server.url + "/x"
    part = tmp_path / "x.part"
    fails(f"^{url}: the server answers 404 .*; fetch it by hand and see README", clip.fetch, url, str(part))
    assert not part.exists()
    server.files["/x"] = CONTENT
    part.write_bytes(CONTENT + b"more")  # longer than the file: cannot be a part of it
    fails("does not fit it and was removed; run the command again", clip.fetch, url, str(part))
    assert not part.exists()
    part.write_bytes(CONTENT[:100])
    server.shift = 7
    fails(f"another part than asked for; delete {part} and run", clip.fetch, url, str(part))
    assert part.read_bytes() == CONTENT[:100]
    (tmp_path / "file").write_text("")
    fails("could not be fetched .*by hand", clip.fetch, url, str(tmp_path / "file" / "x.part"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, but nobody listens
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}/x"
        fails("could not be fetched .*; run the command again to go on where it stopped, or fetch it by hand "
              "and see README.md", clip.fetch, nobody, str(tmp_path / "y.part"))
    assert not (tmp_path / "y.part").exists()


def test_download(server, tmp_path, monkeypatch, vit):
    clip.save(vit, tmp_path / "w.pt")
    body = (tmp_path / "w.pt").read_bytes()
    sha = clip.file_sha256(tmp_path / "w.pt")
    assert sha == hashlib.sha256(body).hexdigest()
    cache = tmp_path / "cache"
    monkeypatch.setitem(clip.MODELS, "ViT-L/14@336px", (SMALL_VIT, sha))
    monkeypatch.setattr(clip, "MODEL_URL", server.url)
    path = f"/{sha}/ViT-L-14-336px.pt"
    server.files[path] = body[:-1] + b"!"
    fails("checksum", clip.load, "ViT-L/14@336px", "cpu", download_root=str(cache))
    assert os.listdir(cache) == []
    server.files[path] = body
    server.breaks[path] = 700
    fails("the connection broke after 700 of", clip.load, "ViT-L/14@336px", "cpu", download_root=str(cache))
    for _ in range(2):
        model, _ = clip.load("ViT-L/14@336px", "cpu", download_root=str(cache))
    assert server.asked == [(path, None), (path, None), (path, "bytes=700-")]  # fetched to its end, then kept
    assert os.listdir(cache) == ["ViT-L-14-336px.pt"]
    state_equal(model.state_dict(), vit.state_dict())
    umask = os.umask(0)
    os.umask(umask)
    assert os.name != "posix" or (cache / "ViT-L-14-336px.pt").stat().st_mode & 0o777 == 0o666 & ~umask

    (cache / "ViT-L-14-336px.pt").write_bytes(b"rotten")
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    with pytest.warns(UserWarning, match="checksum"):
        clip.load("ViT-L/14@336px", "cpu")
    assert (cache / "ViT-L-14-336px.pt").read_bytes() == body
    fails("404 .*put it at .*absent", clip.download, server.url + "/absent", sha, str(cache))
    nobody = "http://127.0.0.1:9/x.pt"  # the discard port
    fails("could not be fetched .*put it at", clip.download, nobody, sha, str(cache))
    assert os.listdir(cache) == ["ViT-L-14-336px.pt"]
    fails("cannot be written", clip.download, server.url + "/x.pt", sha, str(cache / "ViT-L-14-336px.pt"))


def no_flock(*_):
    raise OSError(37, "No locks available")


@pytest.mark.parametrize("fcntl", [None, types.SimpleNamespace(flock=no_flock, LOCK_EX=2)])
def test_download_where_there_are_no_locks(fcntl, server, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "fcntl", fcntl)
    server.files["/x.pt"] = CONTENT
    path = clip.download(server.url + "/x.pt", hashlib.sha256(CONTENT).hexdigest(), str(tmp_path))
    assert path == str(tmp_path / "x.pt") and (tmp_path / "x.pt").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["x.pt"]


DOWNLOADER = """
import fcntl, sys, clip
flock = fcntl.flock
def announced(*args):
    print("waits", flush=True)
    flock(*args)
fcntl.flock = announced
print(clip.download(*sys.argv[1:]))
"""


def test_two_processes_that_download_at_once_end_with_one_good_file(server, tmp_path):
    pytest.importorskip("fcntl")
    server.files["/x.pt"] = CONTENT
    server.opened.clear()
    sha = hashlib.sha256(CONTENT).hexdigest()
    words = [sys.executable, "-c", DOWNLOADER, server.url + "/x.pt", sha, str(tmp_path)]
    processes = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "waits\n"  # the first has the lock and no answer yet
    server.opened.set()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out.splitlines()[-1] == str(tmp_path / "x.pt")
    assert server.asked == [("/x.pt", None)] and os.listdir(tmp_path) == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == CONTENT


# ---------------------------------------------------------------- files that load

class Holder(nn.Module):
    """A module of nothing but the given tensors, nested by their dotted names, as in OpenAI's archives."""

    def __init__(self, tensors, top=True):
        super().__init__()
        groups = {}
        for key, value in tensors.items():
            head, _, rest = key.partition(".")
            if rest:
                groups.setdefault(head, {})[rest] = value
            elif value.is_floating_point() and "running" not in key:
                setattr(self, key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)
        for head, group in groups.items():
            self.add_module(head, Holder(group, False))
            if head.isdigit():
                self.get_submodule(head).attn_mask = torch.full((3, 3), -torch.inf)  # no weight
        if top:
            for key, value in (("input_resolution", 40), ("context_length", 20), ("vocab_size", 700)):
                self.register_buffer(key, torch.tensor(value))
            self.patch_size, self.training_steps = 10, [1, 2, 3]

    def forward(self, x):
        return x


def jit_archive(model, path, half):
    state = {}
    for key, value in model.state_dict().items():
        to_half = half and value.is_floating_point() and "running" not in key
        state[key] = value.half() if to_half else value.clone()
    torch.jit.script(Holder(state)).save(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_torchscript_archive(kind, half, tmp_path, monkeypatch):
    model = make(replace(SMALL_VIT, vision_heads=1, transformer_heads=1) if kind == "vit" else SMALL_RN)
    jit_archive(model, tmp_path / "a.pt", half)
    want = torch.jit.load(str(tmp_path / "a.pt")).state_dict()
    assert "input_resolution" in want
    assert want["logit_scale"].dtype == (torch.float16 if half else torch.float32)
    another = '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}'  # not for this file
    (tmp_path / "open_clip_config.json").write_text(another)
    monkeypatch.setattr(torch.jit, "load", None)
    got, hints = clip.read_weights(str(tmp_path / "a.pt"))
    state_equal(got, want)
    assert hints == {}
    loaded, _ = clip.load(tmp_path / "a.pt", "cpu")
    assert loaded.config == model.config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    image, text = a_batch(model.config)
    all_close(outputs(loaded, image, text), outputs(model, image, text), 2e-2 if half else 1e-6)


def test_own_weights_round_trip(tmp_path):
    """`save` keeps what shapes do not tell (GELU, heads); torch's old format is read; no memory is shared."""
    model = make(replace(SMALL_VIT, quick_gelu=False))
    path = tmp_path / "deep" / "er" / "w.pt"
    clip.save(model, path)
    loaded, _ = clip.load(path, "cpu")
    assert loaded.config == model.config
    state_equal(loaded.state_dict(), model.state_dict())
    torch.save(model.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    legacy, _ = clip.load(tmp_path / "legacy.pt", "cpu", quick_gelu=False)
    state_equal(legacy.state_dict(), model.state_dict())
    copy = clip.from_state_dict(model.state_dict())
    with torch.no_grad():
        copy.visual.proj.zero_()
    assert model.visual.proj.abs().min() > 0


def test_own_checkpoint_round_trip(tmp_path):
    texts = ["a red cone", "a blue torus on a red table", "two red cones"] * 3
    tokenizer = clip.Tokenizer.train(texts, 540)
    config = replace(SMALL_VIT, vocab_size=tokenizer.vocab_size, quick_gelu=False)
    model = make(config)
    model.tokenizer = tokenizer
    described = clip.describe(model)
    written = {"method": "train_x", "clip": described, "epoch": 3, "config": {"lr": 1e-3}}
    clip.save_checkpoint(tmp_path / "best.pt", written)
    (tmp_path / "config.json").write_text('{"lr": 0.001, "data": "primitives"}')  # a run's settings
    checkpoint = clip.load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == 3 and checkpoint["method"] == "train_x"
    assert checkpoint["clip"]["config"] == asdict(config)
    for name in (tmp_path / "best.pt", tmp_path):  # the file, the run's folder
        loaded, _ = clip.load(name, "cpu")
        assert loaded.config == config and loaded.tokenizer.merges == tokenizer.merges
        state_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.tokenizer(texts, 20), tokenizer(texts, 20))
    clip.save(model, tmp_path / "w.pt")
    fails("not a checkpoint of this project", clip.load_checkpoint, tmp_path / "w.pt")
    for damaged in ({}, described | {"merges": [1, 2]}, described | {"merges": [("a", "b")] * 999},
                    described | {"state_dict": {"a": "text"}}, {"trained": {}, "of": "ViT-B/32"}):
        clip.save_checkpoint(tmp_path / "odd.pt", {"clip": damaged})
        fails("odd.pt", clip.load, tmp_path / "odd.pt", "cpu")
    clip.save_checkpoint(tmp_path / "odd.pt", {})
    fails("odd.pt", clip.load, tmp_path / "odd.pt", "cpu")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_hugging_face_folders_and_files(quick_gelu, tmp_path):
    """Folder and file, safetensors, bin and shards; heads and activation come from config.json."""
    pytest.importorskip("safetensors")
    config = replace(SMALL_VIT, quick_gelu=quick_gelu)
    theirs = hugging_face(make(config))
    image, text = a_batch(SMALL_VIT)
    theirs.save_pretrained(tmp_path / "st")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert os.path.isfile(tmp_path / "shards" / "model.safetensors.index.json")
    os.makedirs(tmp_path / "bin")
    shutil.copy(tmp_path / "st" / "config.json", tmp_path / "bin")
    wrapped = {f"module.clip.{key}": value for key, value in theirs.state_dict().items()}
    torch.save(wrapped, tmp_path / "bin" / "pytorch_model.bin")
    for name in ("st", "shards", "bin", "st/model.safetensors", "bin/pytorch_model.bin"):
        ours, _ = clip.load(tmp_path / name, "cpu")
        assert ours.config == config
        same_as_hugging_face(ours, theirs, image, text)
    state = {k: v for k, v in theirs.state_dict().items() if "layers.1.self_attn.k_proj.bias" not in k}
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    fails("k_proj.bias", clip.load, tmp_path / "bin", "cpu")


def test_safetensors_equal_the_library(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    g = torch.Generator().manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 4, generator=g), "f16": torch.randn(5, generator=g).half(),
        "bf16": torch.randn(2, 2, generator=g).bfloat16(), "f64": torch.randn(1, generator=g).double(),
        "i64": torch.arange(7), "i32": torch.arange(3).int(), "u8": torch.arange(9).byte(),
        "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    st.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    state_equal(clip.read_safetensors(str(tmp_path / "a.safetensors")), tensors)


def test_open_clip_checkpoints(tmp_path, vit):
    """Training checkpoints (nested, `module.`, compiled), custom text towers, hub folders; the activation is
    stated, configured or warned of."""
    open_clip = pytest.importorskip("open_clip")
    model = make(replace(SMALL_VIT, quick_gelu=False, vision_heads=1, transformer_heads=1))
    image, text = a_batch(SMALL_VIT)
    want = outputs(model, image, text)
    twin = open_clip_twin(model)
    twin.load_state_dict(model.state_dict())
    path = tmp_path / "epoch_1.pt"
    state = {f"module.{key}": value for key, value in twin.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    with pytest.warns(UserWarning, match="activation"):
        loaded, _ = clip.load(path, "cpu")
    assert not loaded.config.quick_gelu
    all_close(outputs(loaded, image, text), want, 1e-6)
    assert clip.load(path, "cpu", quick_gelu=True)[0].config.quick_gelu

    c = SMALL_VIT  # the heads and the activation of a hub folder come from its configuration
    custom = open_clip.model.CustomTextCLIP(
        c.embed_dim, dict(layers=2, width=64, patch_size=10, image_size=40, head_width=16),
        dict(context_length=20, vocab_size=700, width=64, heads=2, layers=2), quick_gelu=True).eval()
    randomise(custom)
    state = dict(custom.state_dict(), logit_scale=custom.logit_scale.detach().reshape(1))
    assert "text.token_embedding.weight" in state
    state = {f"module._orig_mod.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "open_clip_pytorch_model.bin")
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 10}
    text_config = {"heads": 2, "width": 64}
    config = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text_config}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    loaded, _ = clip.load(tmp_path, "cpu")
    assert loaded.config == SMALL_VIT
    all_close(outputs(loaded, image, text), open_clip_outputs(custom, image, text))
    (tmp_path / "open_clip_config.json").write_text("{broken")
    fails("open_clip_config.json", clip.load, tmp_path, "cpu")


def test_resnet_without_batch_counters_and_with_others(resnet):
    """Files from before torch counted batches load; BatchNorm's statistics are the file's."""
    state = {k: v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = clip.from_state_dict(state).eval()
    image, text = a_batch(SMALL_RN)
    all_close(outputs(loaded, image, text), outputs(resnet, image, text), 1e-6)


# ---------------------------------------------------------------- files that must not load

def refused(path, match=None, readers=(clip.load, clip.load_checkpoint)):
    """Every reader gives one CheckpointError of one line that names the file. Returns its text."""
    for read in readers:
        with pytest.raises(clip.CheckpointError) as e:
            read(path)
        message = str(e.value)
        assert "\n" not in message and os.path.basename(str(path)) in message and len(message) < 600
        assert e.value.__cause__ is None and e.value.__suppress_context__ or e.value.__context__ is None
        assert match is None or match in message, message
    return message


class Evil:
    """A pickle that makes a folder when it is loaded, by the function named."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "os":
            return os.mkdir, (self.path,)
        if self.how == "eval":
            return eval, (f"__import__('os').mkdir({self.path!r})",)
        return torch.hub.load_state_dict_from_url, ("file://" + self.path,)


@pytest.mark.parametrize("how, name", [("os", os.mkdir.__module__ + ".mkdir"), ("eval", "eval"),
                                       ("torch", "load_state_dict_from_url")])
def test_malicious_pickles(how, name, tmp_path):
    """Zip, legacy and bare pickles, an archive's data.pkl: refused, and nothing ran."""
    mark = tmp_path / "ran"
    evil = Evil(mark, how)
    torch.save({"state_dict": evil}, tmp_path / "zip.pt")
    torch.save({"state_dict": evil}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": evil}))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as z:
        z.writestr("a/data.pkl", pickle.dumps(evil, 2))
        z.writestr("a/constants.pkl", pickle.dumps(evil, 2))
        z.writestr("a/version", b"3\n")
    for file in ("zip.pt", "script.pt"):
        assert "nothing of it was run" in refused(tmp_path / file, name)
    refused(tmp_path / "legacy.pt")
    refused(tmp_path / "bare.pt")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark, "os")))
    assert mark.exists()  # the trap works


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
HALVES = struct.pack("<4e", 1, 2, 3, 4)


def script_archive(path, args, raw=FLOATS, compress=zipfile.ZIP_STORED, kind="FloatStorage", count=4,
                   record="data/0"):
    """A hand-made archive: one module, one tensor "w" = _rebuild_tensor_v2(storage "0" of `raw`, *args)."""
    class Mark:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Mark(), *args, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, kind), "0", "cpu", count) if isinstance(value, Mark) else None

    module = types.ModuleType("__torch__")
    module.M = type("M", (), {"__module__": "__torch__"})
    sys.modules["__torch__"] = module
    try:
        model = module.M()
        model.w = Tensor()
        out = io.BytesIO()
        Pickler(out, 2).dump(model)
    finally:
        del sys.modules["__torch__"]
    with zipfile.ZipFile(path, "w", compress) as z:
        for name, body in (("a/data.pkl", out.getvalue()), ("a/constants.pkl", b""), (f"a/{record}", raw)):
            z.writestr(name, body)


@pytest.mark.parametrize("args, more, want", [  # offset, shape, stride
    ((1, (2,), (1,)), {}, torch.tensor([2.0, 3.0])),
    ((3, (1, 1), (9, 9)), {}, torch.tensor([[4.0]])),
    ((0, (2,), (3,)), {}, torch.tensor([1.0, 4.0])),
    ((0, (3,), (0,)), {}, torch.tensor([1.0, 1.0, 1.0])),
    ((0, (0, 5), (5, 1)), {}, torch.zeros(0, 5)),
    ((0, (2, 2), (1, 2)), {"raw": HALVES, "kind": "HalfStorage", "record": "constants/0"},
     torch.tensor([[1.0, 3.0], [2.0, 4.0]]).half())])
def test_torchscript_tensors(args, more, want, tmp_path):
    script_archive(tmp_path / "a.pt", args, **more)
    state_equal(clip.read_weights(str(tmp_path / "a.pt"))[0], {"w": want})


@pytest.mark.parametrize("offset, shape, stride", [
    (-1, (2,), (1,)), (3, (2,), (1,)), (4, (1,), (1,)), (2 ** 62, (2,), (1,)), (2 ** 62, (1,), (0,)),
    (0, (2,), (4,)), (0, (2, 2), (2 ** 62, 1)), (0, (2, 2), (2, 3)), (0, (2,), (-1,)), (3, (2,), (-1,)),
    (0, (10 ** 12,), (0,)), (0, (-4,), (1,)), (0, (2 ** 40, 2 ** 40), (1, 1)), (0, ("a",), (1,)),
    (0, (2.0,), (1,)), (0.0, (2,), (1,)), (0, (True,), (1,)), (0, (5,), (1,)), (0, (2, 2), (1,)),
    (0, (2,), (1, 1))])
def test_torchscript_tensors_outside_their_storage(offset, shape, stride, tmp_path):
    script_archive(tmp_path / "a.pt", (offset, shape, stride))
    refused(tmp_path / "a.pt", "one of its tensors lies outside its storage", [clip.read_weights])


def test_torchscript_storages(tmp_path):
    path = tmp_path / "a.pt"
    script_archive(path, (0, (4,), (1,)), raw=b"12345678")
    refused(path, "truncated", [clip.read_weights])
    script_archive(path, (0, (4,), (1,)), count=-4, raw=b"123")
    refused(path, None, [clip.read_weights])
    script_archive(path, (0, (4,), (1,)), compress=zipfile.ZIP_DEFLATED)
    refused(path, "compressed", [clip.read_weights])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_damaged_files(tmp_path, vit):
    """Cut at many places, flipped, empty, or something else altogether."""
    clip.save(vit, tmp_path / "good.pt")
    jit_archive(vit, tmp_path / "jit.pt", True)
    torch.save(vit.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("good.pt", "jit.pt", "legacy.pt"):
        body = (tmp_path / name).read_bytes()
        for cut in (1, 5, 9, 300, len(body) // 2, len(body) - 10):
            (tmp_path / "cut.pt").write_bytes(body[:cut])
            refused(tmp_path / "cut.pt")
    jit = (tmp_path / "jit.pt").read_bytes()
    at = jit.index(b"data.pkl")
    (tmp_path / "flip.pt").write_bytes(jit[:at + 100] + b"\xff" * 40 + jit[at + 140:])
    refused(tmp_path / "flip.pt", "damaged")
    others = {
        "empty.pt": b"", "text.pt": b"these are no weights\n" * 9, "json.pt": b'{"a": 1}',
        "page.pt": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "pk.pt": b"PK\x03\x04 but no zip", "zero.pt": bytes(5000), "list.pt": pickle.dumps([1, 2], 2)}
    for name, body in others.items():
        (tmp_path / name).write_bytes(body)
        refused(tmp_path / name, "is empty" if not body else None)
    for value in (torch.ones(3), {1: torch.ones(3), "x": 2}, {}):
        torch.save(value, tmp_path / "odd.pt")
        refused(tmp_path / "odd.pt")
    os.mkdir(tmp_path / "folder")
    refused(tmp_path / "folder")
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read everything
        os.chmod(tmp_path / "good.pt", 0)
        refused(tmp_path / "good.pt", "ermission")


def test_safetensors_bounds(tmp_path):
    path = tmp_path / "model.safetensors"

    def write(header, body=bytes(16), length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)

    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    write({"w": good})
    state_equal(clip.read_safetensors(str(path)), {"w": torch.zeros(2, 2)})
    for key, value in (("data_offsets", [0, 32]), ("data_offsets", [-16, 0]), ("data_offsets", [8, 24]),
                       ("data_offsets", [16, 0]), ("data_offsets", [0.0, 16.0]), ("data_offsets", [0]),
                       ("shape", [2, 3]), ("shape", [-2, -2]), ("shape", [2 ** 62, 4]), ("shape", ["2", 2]),
                       ("shape", None), ("dtype", "F8_X"), ("dtype", "F64")):
        change = {key: value}
        write({"w": good | change})
        refused(path, None, [clip.read_weights])
    write({"w": good, "v": good})  # two tensors on the same bytes
    refused(path, "'v'", [clip.read_weights])
    for length in (2 ** 63, 10 ** 6):
        write({"w": good}, length=length)
        refused(path, "header", [clip.read_weights])
    write(b'{"w": ')
    refused(path, None, [clip.read_weights])
    write(b'{"w": [1]}')
    refused(path, None, [clip.read_weights])
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
    beside = str(tmp_path / "passwd")  # looked for beside the index, nowhere else
    fails(re.escape(beside), clip.load, tmp_path / "model.safetensors.index.json", "cpu")


def test_weights_of_something_else(tmp_path, vit, resnet):
    """The first missing and the first unexpected key are named; shapes that fit no CLIP are one error too."""
    state = vit.state_dict()
    del state["transformer.resblocks.1.ln_2.bias"]
    state["head.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "w.pt")
    fails(r"w.pt.*ViT.*1 missing \(first 'transformer.resblocks.1.ln_2.bias'\), "
          r"1 unexpected \(first 'head.weight'\)", clip.load, tmp_path / "w.pt", "cpu")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r.pt")
    refused(tmp_path / "r.pt", "'ln_final.weight' is missing; it holds 'conv1.weight'", [clip.load])
    refused(tmp_path / "r.pt")
    good = vit.state_dict()
    for key, *shape in (("positional_embedding", 20, 63), ("visual.positional_embedding", 18, 64),
                        ("ln_final.weight",), ("ln_final.weight", 0), ("visual.conv1.weight", 64, 3),
                        ("text_projection", 64), ("visual.positional_embedding", 0, 64), ("logit_scale", 3),
                        ("transformer.resblocks.99999999999.ln_1.bias", 64)):
        fails("^there: ", clip.from_state_dict, good | {key: torch.ones(shape)}, where="there")
    for heads in (0, 7, "4", -4):
        fails("heads", clip.from_state_dict, good, {"vision_heads": heads})


def test_writing_is_atomic(tmp_path, monkeypatch, vit):
    """A failure at any point leaves the old file whole and no other file behind."""
    path = tmp_path / "last.pt"
    clip.save_checkpoint(path, {"epoch": 1})
    old = path.read_bytes()

    def full(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    def torch_full(f):
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos\nmore lines")

    def interrupted(f):
        raise KeyboardInterrupt

    def no_replace(*_):
        raise OSError(5, "I/O error")

    for write in (full, torch_full):
        fails("last.pt: cannot be written", clip.write_file, path, write)
    with pytest.raises(KeyboardInterrupt):
        clip.write_file(path, interrupted)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        clip.save_checkpoint(path, {"epoch": 2, "bad": lambda: None})
    with monkeypatch.context() as m:
        m.setattr(os, "replace", no_replace)
        fails("I/O error", clip.save_checkpoint, path, {"epoch": 2})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["last.pt"]
    fails("cannot be written", clip.save, vit, path / "under a file" / "w.pt")
    clip.save_checkpoint(path, {"epoch": 2})
    assert clip.load_checkpoint(path)["epoch"] == 2
    umask = os.umask(0)
    os.umask(umask)
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o666 & ~umask


# ---------------------------------------------------------------- the tokenizer

def brute_force_bpe(tokenizer, word):
    """Sennrich's loop, word for word: find the best-ranked pair anywhere, merge it everywhere, again."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer.merges)}
    parts = tokenizer._split(word)
    while True:
        pairs = [pair for pair in zip(parts, parts[1:]) if pair in ranks]
        if not pairs:
            return parts
        best = min(pairs, key=ranks.get)
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == best:
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            i += 1


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
    for text in captions()[:500] + nasty(1000, seed=5):
        assert tok.decode(tok.encode(text)).replace(" ", "") == clip.clean(text).replace(" ", ""), repr(text)
    assert tok.encode("<|startoftext|>a dog<|endoftext|>") == [49406, 320, 1929, 49407]  # as OpenAI's
    ids = clip.tokenize("Two dogs, running!")[0]
    assert tok.decode(ids[:int(ids.argmax()) + 1]) == "two dogs , running ! "


def test_clean():
    assert clip.clean("  A &amp;amp; B\u00a0\n C schÃ¶n ") == "a & b c schön"
    assert clip.clean("half \ud83d a pair") == "half \ufffd a pair"  # broken JSON must not end a run


def test_merging_equals_brute_force(tok):
    """The heap against the plain loop, on real merges and random ones, whose symbols have many spellings."""
    r = random.Random(0)
    for _ in range(300):
        word = "".join(r.choice("abcdefghijklmnopqrstuvwxyzéü東") for _ in range(r.randrange(1, 40)))
        assert [tok.symbols[i] for i in tok._merge(word)] == brute_force_bpe(tok, word)
    # "aab" has two spellings: both copies are merged before the pair that the first makes with its neighbour.
    t = clip.Tokenizer([("a", "a"), ("a", "b"), ("a", "ab"), ("aab", "aa"), ("aa", "b")])
    assert brute_force_bpe(t, "aabaabc") == ["aab", "aab", "c</w>"]
    assert [t.symbols[i] for i in t._merge("aabaabc")] == ["aab", "aab", "c</w>"]
    for _ in range(400):
        symbols, merges = ["a", "b", "a</w>", "b</w>"], []
        for _ in range(r.randrange(1, 14)):
            pair = (r.choice([s for s in symbols if not s.endswith("</w>")]), r.choice(symbols))
            if pair not in merges:
                merges.append(pair)
                symbols.append("".join(pair))
        t = clip.Tokenizer(merges)
        word = "".join(r.choice("ab") for _ in range(r.randrange(1, 60)))
        assert [t.symbols[i] for i in t._merge(word)] == brute_force_bpe(t, word), (merges, word)


def test_one_word_of_ten_thousand_characters(tok):
    r = random.Random(0)
    word = "".join(r.choice("abcdefgh") for _ in range(10_000))
    ids = tok.encode(word)
    assert tok.decode(ids) == word + " " and len(ids) < 9000


def brute_force_training(texts, vocab_size):
    words = [w for t in texts for w in clip.PATTERN.findall(clip.clean(t))]
    words = [clip.Tokenizer([])._split(w) for w in words]
    merges = []
    while len(merges) < vocab_size - 514:
        counts = {}
        for w in words:
            for pair in zip(w, w[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda p: (-counts[p], p))
        if best not in merges:
            merges.append(best)
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [w[i] + w[i + 1]]
                i += 1
    return merges


def test_training_a_tokenizer(tmp_path):
    r = random.Random(0)
    words = ["".join(r.choice("abc") for _ in range(r.randrange(1, 9))) for _ in range(60)]
    cones = ["a tall red cone", "a small red cube", "the tall blue cone"] * 4
    for texts in (cones, nasty(40, seed=9), captions()[:150] or ["fallback text text"], [" ".join(words)]):
        for size in (514, 530, 640):
            trained = clip.Tokenizer.train(texts, size)
            assert trained.merges == brute_force_training(texts, size)
            assert trained.vocab_size == 514 + len(trained.merges) <= size
            assert len(set(trained.merges)) == len(trained.merges)
    small = clip.Tokenizer.train(cones, 640)
    assert clip.Tokenizer.train(cones[::-1], 640).merges == small.merges  # order does not matter
    assert len(small.encode("a tall red cone")) == 4
    assert small.decode(small.encode("Zebra ß!")) == "zebra ß ! "
    row = small("a tall red cone", 8)[0].tolist()
    assert row[0] == small.start and row[5:] == [small.end, 0, 0]
    assert small.end == small.vocab_size - 1 == max(row)
    rows, cut = small.rows(["a tall red cone", "a"], 4)
    assert cut == 1 and rows[0, -1] == small.end and rows.dtype == torch.int32
    with pytest.raises(ValueError, match="at least 514"):
        clip.Tokenizer.train(["a"], 513)


def test_merges_file(tok):
    """The published file: 48,894 merges, its SHA-256 the one that `download` demands."""
    with open(os.path.join(os.environ["CLIP_CACHE"], BPE), "rb") as f:
        body = f.read()
    assert hashlib.sha256(body).hexdigest() == clip.MERGES_SHA256
    lines = gzip.decompress(body).decode().split("\n")
    assert len(tok.merges) == 48894 and tok.merges[-1] == tuple(lines[48894].split())
    assert tok.merges[0] == tuple(lines[1].split()) == ("i", "n")


def test_gradients_have_the_same_bits_every_time_on_several_threads():
    """Many rows of a packed text share a position: their gradients must be summed in one order."""
    before = torch.get_num_threads()
    model = clip.build("tiny")
    text = torch.zeros(128, 32, dtype=torch.int32)
    text[:, :9] = torch.randint(1, 600, (128, 9), generator=torch.Generator().manual_seed(0))
    text[:, 9] = model.vocab_size - 1
    try:
        torch.set_num_threads(2)
        gradients = set()
        for _ in range(8):
            model.zero_grad()
            model.encode_text(text).square().sum().backward()
            gradients.add(model.positional_embedding.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(gradients) == 1
