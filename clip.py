"""CLIP: the model, its tokenizer, and reading and writing weights and checkpoints.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
An image encoder (a ViT or a modified ResNet) and a causal text transformer map into one space, where the cosine
of an image and a text, times exp(logit_scale), is the logit that the two belong together.

Used like OpenAI's package of the same name:

    import clip, torch
    model, preprocess = clip.load("ViT-B/32")                  # or a file, a Hugging Face folder, a checkpoint of ours
    image = preprocess(Image.open("cone.png")).unsqueeze(0)
    logits_per_image, logits_per_text = model(image, clip.tokenize(["a red cone", "a blue torus"]))

One difference: weights stay float32 (mixed precision is autocast's job, see `autocast`), because fine-tuning weights
held in half precision overflows. Knows nothing of data sets or losses.
"""
import contextlib
import difflib
import gzip
import hashlib
import heapq
import html
import http.client
import io
import json
import math
import os
import pickle
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pixels
MODEL_URL = "https://openaipublic.azureedge.net/clip/models"
MERGES_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


class CheckpointError(ValueError):
    """A model name, weight file or checkpoint that cannot be used; the message is one line: what, where, what to do."""


# ---------------------------------------------------------------- the model

@dataclass(frozen=True)
class Config:
    """The numbers that fix an architecture. `vision_layers` is an int for a ViT, four ints for a ModifiedResNet."""
    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple
    vision_width: int
    vision_patch_size: int | None
    context_length: int
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    vision_heads: int
    quick_gelu: bool = True


def _config(embed_dim, resolution, layers, width, patch, text_width, text_layers=12, context=77, vocab=49408):
    """OpenAI's rule for heads: 64 channels each; a ResNet's attention pool works on 32 times its width."""
    heads = width // 64 if patch else width * 32 // 64
    return Config(embed_dim, resolution, layers, width, patch, context, vocab, text_width, text_width // 64, text_layers, heads)


# name -> (architecture, SHA-256 of the published file or None)
MODELS = {
    "RN50": (_config(1024, 224, (3, 4, 6, 3), 64, None, 512), "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": (_config(512, 224, (3, 4, 23, 3), 64, None, 512), "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": (_config(640, 288, (4, 6, 10, 6), 80, None, 640), "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": (_config(768, 384, (6, 8, 18, 8), 96, None, 768), "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": (_config(1024, 448, (3, 15, 36, 10), 128, None, 1024), "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": (_config(512, 224, 12, 768, 32, 512), "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (_config(512, 224, 12, 768, 16, 512), "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (_config(768, 224, 24, 1024, 14, 768), "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (_config(768, 336, 24, 1024, 14, 768), "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    # trained from scratch, never published: for the built-in data and for small trials
    "tiny": (_config(128, 32, 4, 128, 8, 128, text_layers=2, context=32, vocab=1024), None),
    "tiny-rn": (_config(128, 64, (1, 1, 1, 1), 16, None, 128, text_layers=4, context=32, vocab=1024), None),
    "small": (_config(256, 64, 6, 256, 8, 256, text_layers=4, context=48, vocab=2048), None),
}
SCRATCH = ("tiny", "tiny-rn", "small")


class MLP(nn.Module):
    """The transformer's two-layer MLP. x: (..., width) -> (..., width)."""

    def __init__(self, width, quick_gelu):
        super().__init__()
        self.c_fc, self.c_proj, self.quick_gelu = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), quick_gelu

    def forward(self, x):
        if not self.quick_gelu:
            return self.c_proj(F.gelu(self.c_fc(x)))
        # QuickGELU(h) = h sigmoid(1.702 h) = silu(1.702 h) / 1.702. Both factors ride on the matrix products, which
        # saves the passes over the widest activation that would otherwise cost a fifth of this layer's time on a CPU.
        rows = x.reshape(-1, x.shape[-1])
        h = torch.addmm(self.c_fc.bias, rows, self.c_fc.weight.t(), beta=1.702, alpha=1.702)
        h = F.silu(h, inplace=not torch.is_grad_enabled())
        return torch.addmm(self.c_proj.bias, h, self.c_proj.weight.t(), alpha=1 / 1.702).view(x.shape)


class Attention(nn.Module):
    """Multi-head self-attention with torch's parameter names (`in_proj_weight`, `out_proj`).

    x: (B, L, width), or with `packed` = (rows, B, L) only the rows that hold real tokens, (len(rows), width), where
    rows (int64) says at which place of the flattened (B, L) grid each stands. Rows left out hold zeros; the text
    transformer is causal and leaves out only rows after a text's end, so no kept row ever sees one.
    With `keep_weights` set the softmax weights of the last call, (B, heads, L, L), are kept in `weights` (for pictures).
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * width, width)), nn.Parameter(torch.zeros(3 * width))
        self.out_proj, self.heads, self.causal = nn.Linear(width, width), heads, causal
        self.keep_weights, self.weights = False, None
        nn.init.normal_(self.in_proj_weight, std=width ** -0.5)

    def forward(self, x, packed=None):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if packed is None:
            B, L = x.shape[:2]
        else:
            rows, B, L = packed
            qkv = qkv.new_zeros(B * L, qkv.shape[-1]).index_copy(0, rows, qkv)
        q, k, v = qkv.view(B, L, 3, self.heads, x.shape[-1] // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, L, width / heads)
        if self.keep_weights:
            scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
            if self.causal:
                scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1), -math.inf)
            self.weights = scores.softmax(-1).detach()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)
        out = out.flatten(2) if packed is None else out.flatten(2).flatten(0, 1)[rows]
        return self.out_proj(out)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, causal, quick_gelu):
        super().__init__()
        self.attn, self.ln_1 = Attention(width, heads, causal), nn.LayerNorm(width)
        self.mlp, self.ln_2 = MLP(width, quick_gelu), nn.LayerNorm(width)

    def forward(self, x, packed=None):
        x = x + self.attn(self.ln_1(x), packed)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, causal, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, causal, quick_gelu) for _ in range(layers))
        for block in self.resblocks:  # the paper's initialisation: residual branches shrink with depth
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, x, packed=None):
        for block in self.resblocks:
            x = block(x, packed)
        return x


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with CLIP's extra norm before the blocks and a projection after them."""

    def __init__(self, resolution, patch_size, width, layers, heads, embed_dim, quick_gelu):
        super().__init__()
        self.input_resolution, self.output_dim, self.patch_size, scale = resolution, embed_dim, patch_size, width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, False, quick_gelu)
        self.ln_post, self.proj = nn.LayerNorm(width), nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, x, tokens=False):
        """x: (B, 3, R, R) -> (B, embed_dim); with tokens also (B, 1 + patches, embed_dim), the class token first."""
        B, p, g = x.shape[0], self.patch_size, x.shape[-1] // self.patch_size
        # A convolution whose stride is its kernel is one matrix product over the patches.
        x = x[..., :g * p, :g * p].reshape(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, 3 * p * p)
        x = F.linear(x, self.conv1.weight.flatten(1))  # (B, patches, width)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(B, 1, -1), x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x))  # (B, 1 + patches, width)
        x = self.ln_post(x if tokens else x[:, 0]) @ self.proj
        return (x[:, 0], x) if tokens else x


class Bottleneck(nn.Module):
    """A residual block that halves resolution by average pooling, never by a strided convolution (paper, section 2.4)."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # every block starts as the identity
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False)),
                                                         ("1", nn.BatchNorm2d(4 * planes))]))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Pools a feature map by one attention step whose query is the map's mean (paper, section 2.4)."""

    def __init__(self, positions, width, heads, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) / width ** 0.5)
        self.k_proj, self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.c_proj, self.heads = nn.Linear(width, embed_dim), heads
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width ** -0.5)

    def forward(self, x, tokens=False):
        """x: (B, width, h, w) -> (B, embed_dim); with tokens also (B, 1 + h w, embed_dim), every place as its own query."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, 1 + h w, width)
        query = x if tokens else x[:, :1]
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer, y in ((self.q_proj, query), (self.k_proj, x), (self.v_proj, x)))
        out = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (out[:, 0], out) if tokens else out[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet-D variant: a three-convolution stem, anti-aliased strides, attention pooling (paper, section 2.4)."""

    def __init__(self, layers, embed_dim, heads, resolution, width):
        super().__init__()
        self.input_resolution, self.output_dim = resolution, embed_dim
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes, stage = width * 2 ** i, []
            for j in range(blocks):
                stage.append(Bottleneck(inplanes, planes, 2 if i > 0 and j == 0 else 1))
                inplanes = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool2d((resolution // 32) ** 2, inplanes, heads, embed_dim)

    def forward(self, x, tokens=False):
        """x: (B, 3, R, R) -> (B, embed_dim); with tokens also (B, 1 + (R/32)^2, embed_dim), the attention pool's outputs."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 width, R/32, R/32)
        return self.attnpool(x, tokens)


class CLIP(nn.Module):
    """The two encoders and the temperature. State-dict keys are OpenAI's. `tokenizer` is None or the model's own `Tokenizer`."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.vision_patch_size is None:
            self.visual = ModifiedResNet(c.vision_layers, c.embed_dim, c.vision_heads, c.image_resolution, c.vision_width)
        else:
            self.visual = VisionTransformer(c.image_resolution, c.vision_patch_size, c.vision_width, c.vision_layers,
                                            c.vision_heads, c.embed_dim, c.quick_gelu)
        self.transformer = Transformer(c.transformer_width, c.transformer_layers, c.transformer_heads, True, c.quick_gelu)
        self.token_embedding = nn.Embedding(c.vocab_size, c.transformer_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context_length, c.transformer_width))
        self.ln_final = nn.LayerNorm(c.transformer_width)
        self.text_projection = nn.Parameter(c.transformer_width ** -0.5 * torch.randn(c.transformer_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.context_length, self.vocab_size, self.tokenizer = c.context_length, c.vocab_size, None

    @property
    def dtype(self):
        return self.visual.conv1.weight.dtype

    def encode_image(self, image, tokens=False):
        """image: (B, 3, R, R), normalised by `preprocess` -> (B, embed_dim), not unit-norm.

        tokens: also return (B, 1 + patches, embed_dim): a ViT's class and patch tokens after ln_post and the
        projection, or a ResNet's attention pool asked at every place. Raises ValueError where R is not the model's.
        """
        size = self.visual.input_resolution
        if image.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(image.shape)}; this model takes (B, 3, {size}, {size})")
        return self.visual(image.to(self.dtype), tokens)

    def encode_text(self, text, tokens=False):
        """text: (B, columns) token ids from `tokenize`, the end token the largest id of its row -> (B, embed_dim).

        Attention is causal and the feature is read at the end token, so what stands after it changes nothing: only
        real tokens are computed (packed into one list of rows; several times less work than 77 columns, equal output).
        tokens: also return (features (B, L, embed_dim), zero after the end; mask (B, L), True at real tokens), L the
        longest text's length. Raises ValueError for a text longer than the context or an id outside the vocabulary.
        """
        if text.ndim != 2:
            raise ValueError(f"text is {tuple(text.shape)}; token ids are (B, columns)")
        end = text.argmax(dim=-1)
        B, L = text.shape[0], int(end.max()) + 1 if text.shape[0] else 1
        if L > self.context_length:
            raise ValueError(f"a text of {L} tokens; this model's context is {self.context_length}")
        keep = torch.arange(L, device=text.device) <= end[:, None]  # (B, L)
        rows, real = keep.flatten().nonzero().squeeze(1), int(keep.sum())
        # Fill up to a multiple of 128 rows with places after an end: few row counts, so a CPU's prepared products are reused.
        rows = torch.cat([rows, (~keep).flatten().nonzero().squeeze(1)[:-real % 128]])
        ids = text[:, :L].flatten()[rows]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"a token id of {int(ids.max())}; this model's vocabulary is {self.vocab_size}: it needs its own tokenizer")
        x = self.token_embedding(ids) + F.embedding(rows % L, self.positional_embedding)  # (rows, width); indexing would sum gradients in any order
        x = self.ln_final(self.transformer(x.to(self.dtype), (rows, B, L)))
        last = keep.sum(1).cumsum(0) - 1
        if not tokens:
            return x[last] @ self.text_projection
        x = x[:real] @ self.text_projection
        return x[last], x.new_zeros(B * L, x.shape[-1]).index_copy(0, rows[:real], x).view(B, L, -1), keep

    def forward(self, image, text):
        """-> (logits_per_image (B_image, B_text), logits_per_text), cosine times exp(logit_scale), in float32."""
        image, text = self.encode_image(image).float(), self.encode_text(text).float()
        with torch.autocast(image.device.type, enabled=False):  # a caller's autocast is for the encoders, not for this product
            logits = self.logit_scale.float().exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).t()
        return logits, logits.t()


def build(name, tokenizer=None, seed=0, image_size=None):
    """A CLIP of a named architecture with random weights that depend on `seed` alone, in training mode.

    tokenizer: sets the vocabulary and travels with the model. Raises CheckpointError for an unknown name or image size.
    """
    config = MODELS[_known(name)][0]
    _check_size(config, image_size or config.image_resolution)
    config = replace(config, vocab_size=tokenizer.vocab_size if tokenizer else config.vocab_size,
                     image_resolution=image_size or config.image_resolution)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs, which fork_rng leaves alone here
        model = CLIP(config)
    model.tokenizer = tokenizer
    return model


def compile_blocks(model):
    """Compile every residual block in place (state-dict keys stay); shapes are dynamic, since texts are packed."""
    for module in model.modules():
        if isinstance(module, (ResidualAttentionBlock, Bottleneck)):
            module.compile(dynamic=True)


def fast_float32():
    """Let oneDNN compute the CPU's float32 matrix products where that is as exact as the default. Returns whether it does now.

    The default library uses half of the vector width of some CPUs (AMD's, twice the time). The switch permits bfloat16, which
    oneDNN takes only where the CPU has matrix units for it (AMX), so the result of one product decides. A setting of the
    whole process; attention's fused CPU kernel, five times slower with it, is switched off too.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not torch.backends.mkldnn.is_available():
        return False
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    if ((a @ b - exact).abs().max() / exact.abs().max()).item() > 1e-5:
        matmul.fp32_precision = before
        return False
    torch.backends.cuda.enable_flash_sdp(False)  # this switch is the CPU's too
    return True


def autocast(amp, model):
    """The context that the encoders run in. amp: "auto", "bf16" or "off".

    auto: bfloat16 where it pays: on a GPU that has it, and on a CPU with AMX or AVX512-BF16 for models of width 512 or more
    (narrow layers spend their time converting; a ResNet's last stage counts, 32 times its stem). Losses and similarities
    are computed in float32 outside. Raises ValueError for another amp.
    """
    if amp not in ("auto", "bf16", "off"):
        raise ValueError(f"--amp {amp}: choose auto, bf16 or off")
    device, c = next(model.parameters()).device.type, model.config
    if amp == "auto":
        if device == "cuda":
            amp = "bf16" if torch.cuda.is_bf16_supported() else "off"
        else:
            quick = any(getattr(torch.cpu, f, bool)() for f in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
            width = min(c.vision_width * (1 if c.vision_patch_size else 32), c.transformer_width)
            amp = "bf16" if device == "cpu" and quick and width >= 512 else "off"
    return torch.autocast(device, torch.bfloat16) if amp == "bf16" else contextlib.nullcontext()


# ---------------------------------------------------------------- names, downloads, images

def available_models():
    """Names of OpenAI's published models, as `load` takes them."""
    return [name for name, (_, sha) in MODELS.items() if sha]


def _known(name):
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.3)
        raise CheckpointError(f"{name!r}: no such file, folder or model{f'; did you mean {near[0]!r}?' if near else ''} "
                              f"(models: {', '.join(MODELS)})")
    return name


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def download(url, sha256, root=None):
    """Fetch `url` once into `root` (default $CLIP_CACHE, then ~/.cache/clip) and return its path.

    Goes through a temporary file, is verified against `sha256` (hex), shows progress on a terminal. Raises CheckpointError.
    """
    name = url.rsplit("/", 1)[-1]
    path = os.path.join(root or os.environ.get("CLIP_CACHE") or os.path.expanduser("~/.cache/clip"), name)
    if os.path.isfile(path):
        if _sha256(path) == sha256:
            return path
        warnings.warn(f"{path} does not have the published checksum; fetching it again")

    def fetch(f):
        digest, done = hashlib.sha256(), 0
        try:
            with urllib.request.urlopen(url, timeout=60) as source:
                size = source.headers.get("Content-Length")
                while chunk := source.read(1 << 20):
                    f.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():
                        print(f"\r{name}: {done >> 20} of {int(size) >> 20 if size else '?'} MiB", end="", file=sys.stderr)
            print(f"\r{name}: {done >> 20} MiB fetched    ", file=sys.stderr)
        except (OSError, http.client.HTTPException) as e:
            raise CheckpointError(f"could not fetch {url} ({e}); fetch it elsewhere and put it at {path}") from None
        if digest.hexdigest() != sha256:
            raise CheckpointError(f"{url}: what came does not have the published checksum; try again, or put the right file at {path}")

    write_file(path, fetch)
    return path


def _rgb(image):
    return image.convert("RGB")


def transform(resolution):
    """OpenAI's preprocessing: bicubic resize of the shorter side, centre crop, RGB, normalise -> float (3, R, R)."""
    return transforms.Compose([transforms.Resize(resolution, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(resolution),
                               _rgb, transforms.ToTensor(), transforms.Normalize(IMAGE_MEAN, IMAGE_STD)])


# ---------------------------------------------------------------- reading weights

def load(name, device=None, jit=False, download_root=None, image_size=None, quick_gelu=None):
    """A pretrained CLIP and its preprocessing, as OpenAI's `clip.load`.

    name: a published model's name, or a file or folder, told apart by content: OpenAI's TorchScript archive or plain state
    dict, a Hugging Face `CLIPModel` (folder or file, safetensors or bin), an open_clip checkpoint, a checkpoint of this project.
    jit: accepted for old scripts; the archive's code is never run. image_size: another input size (positions interpolated).
    quick_gelu: state the activation where the file does not tell it (open_clip's; a config beside the file is read).
    Returns (model in eval mode, on `device`, in float32; preprocess). Raises CheckpointError.
    """
    name, device = os.fspath(name), device or ("cuda" if torch.cuda.is_available() else "cpu")
    if jit:
        warnings.warn("jit=True is ignored: the weights of the archive are read, its code is not run")
    if name in MODELS or not os.path.exists(name):
        sha = MODELS[_known(name)][1]
        if sha is None:
            raise CheckpointError(f"{name!r} was never published: train it (python train_mxm.py --clip {name}) and load the checkpoint")
        name = download(f"{MODEL_URL}/{sha}/{name.replace('/', '-').replace('@', '-')}.pt", sha, download_root)
    model = from_state_dict(*read_weights(name), image_size=image_size, quick_gelu=quick_gelu, where=name)
    return model.to(device).eval(), transform(model.visual.input_resolution)


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "best.pt", "last.pt")


def read_weights(path):
    """Read any supported file or folder. Returns (state dict with OpenAI's keys, hints), nothing of the file executed.

    hints: what the file says beside tensors: quick_gelu (None: unknown), vision_heads, transformer_heads, tokenizer (merges).
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        found = [n for n in WEIGHT_FILES if os.path.isfile(os.path.join(path, n))]
        if not found:
            raise CheckpointError(f"{path}: a folder with no weights in it; give a file, or a folder with one of {', '.join(WEIGHT_FILES)}")
        path = os.path.join(path, found[0])
    weights, is_jit = _read_file(path)
    try:
        if weights.get("format") == CHECKPOINT_FORMAT:
            ours = weights["clip"]
            return ours["state_dict"], {**{k: ours["config"][k] for k in HINTS}, "tokenizer": ours["merges"]}
        nested = isinstance(weights.get("state_dict"), dict)
        state = weights["state_dict"] if nested else weights
        hints = {k: v for k, v in getattr(state, "_metadata", {}).get("", {}).items() if k in HINTS}  # `save` writes them there
        state = {str(k).replace("_orig_mod.", ""): v for k, v in state.items() if isinstance(v, torch.Tensor)}
        scale = min((k for k in state if k.endswith("logit_scale")), key=len, default="logit_scale")  # "module.logit_scale"
        state = {k.removeprefix(scale[:-len("logit_scale")]): v for k, v in state.items()}
        if "text.token_embedding.weight" in state:  # open_clip's custom text towers
            state = {k.removeprefix("text."): v for k, v in state.items()}
        if "vision_model.embeddings.class_embedding" in state:
            hints = {"quick_gelu": True} | _read_config(os.path.join(os.path.dirname(path), "config.json"))
            return _from_hugging_face(state), hints
        if not hints and not is_jit:  # OpenAI's, with QuickGELU; or open_clip's, whose training checkpoints (nested) do not say
            hints = {"quick_gelu": None} if nested or os.path.basename(path).startswith("open_clip_") else {}
            hints |= _read_config(os.path.join(os.path.dirname(path), "open_clip_config.json"))
        return state, hints
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as e:
        raise CheckpointError(f"{path}: is no CLIP that can be read: {_line(e)}; give a file of CLIP weights") from None


HINTS = ("quick_gelu", "vision_heads", "transformer_heads")  # what an architecture has that the tensors' shapes do not tell


def _line(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


def _read_file(path):
    """-> (a dict of tensors and plain values, whether it was a TorchScript archive)."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; give a file or folder of weights")
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if not head:
            raise CheckpointError(f"{path}: is empty; fetch or write it again")
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                if any(n.endswith("/constants.pkl") for n in archive.namelist()):
                    return read_torchscript(archive, path), True
        if head[8:] == b"{":
            return read_safetensors(path), False
        if path.endswith(".index.json"):  # Hugging Face's shards; only files of the same folder are opened
            with open(path, encoding="utf-8") as f:
                shards = sorted({os.path.basename(n) for n in json.load(f)["weight_map"].values()})
            return {k: v for n in shards for k, v in _read_file(os.path.join(os.path.dirname(path), n))[0].items()}, False
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict):
            raise CheckpointError(f"{path}: holds a {type(weights).__name__}, not a dictionary of weights; save model.state_dict()")
        return weights, False
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e}); check the path and its permissions") from None
    except Exception as e:  # torch.load raises many kinds on a damaged or unsafe file
        asks = regex.search(r"GLOBAL (\S+)|(?:class|function|type) (\S+\.\S+)", str(e))
        if isinstance(e, pickle.UnpicklingError) and asks:
            raise CheckpointError(f"{path}: asks for {asks[1] or asks[2]}, which weights do not need; refused, nothing of it was run. "
                                  "If you trust it, save its state_dict() alone") from None
        reason = "no weights in it" if isinstance(e, pickle.UnpicklingError) else _line(e)
        raise CheckpointError(f"{path}: is damaged, or no weight file ({reason}); fetch it again, nothing of it was run") from None


# torch's dtype -> its name in safetensors, the name of its storages in pickles
DTYPES = {torch.float64: ("F64", "Double"), torch.float32: ("F32", "Float"), torch.float16: ("F16", "Half"),
          torch.bfloat16: ("BF16", "BFloat16"), torch.int64: ("I64", "Long"), torch.int32: ("I32", "Int"),
          torch.int16: ("I16", "Short"), torch.int8: ("I8", "Char"), torch.uint8: ("U8", "Byte"), torch.bool: ("BOOL", "Bool")}


def _numbers(data, dtype):
    """bytes -> a flat tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_safetensors(path):
    """A safetensors file as {name: tensor}. Layout: uint64 header length, JSON header, bytes; every bound is checked."""
    size, dtypes = os.path.getsize(path), {name: dtype for dtype, (name, _) in DTYPES.items()}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, 100 << 20):
            raise CheckpointError(f"{path}: a header of {length} bytes in a file of {size}: truncated, or no safetensors file; fetch it again")
        header, left, tensors = json.loads(f.read(length)), size - 8 - length, {}
        body = left
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = dtypes.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if dtype is None:
                raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported; save it as F32")
            left -= end - begin  # tensors may not share bytes, else a small file could ask for much memory
            if not (all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end <= body and left >= 0
                    and end - begin == math.prod(shape) * dtype.itemsize):
                raise CheckpointError(f"{path}: tensor {name!r} lies outside the file or has a wrong size; fetch it again")
            f.seek(8 + length + begin)
            tensors[name] = _numbers(f.read(end - begin), dtype).reshape(shape)
    return tensors


class _Bag:
    """Stands in for every module class of a TorchScript archive: attributes, no code."""

    def __setstate__(self, state):
        self.__dict__.update(state)


def read_torchscript(archive, path):
    """The state dict of a TorchScript archive (an open ZipFile), without torch.jit and without running the archive's code.

    `data.pkl` in it is a pickle of module objects, whose tensors' bytes lie uncompressed under `data/` (or `constants/`).
    The unpickler knows tensors and plain lists; every class of the archive becomes a `_Bag`.
    """
    names = set(archive.namelist())
    root = next(n for n in names if n.endswith("/data.pkl") and n.count("/") == 1)[:-len("data.pkl")]

    def read(name):
        info = archive.getinfo(root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # torch stores, never compresses: this would be somebody's zip bomb
            raise CheckpointError(f"{path}: its record {name} is compressed, so torch did not write it; refused")
        return archive.read(info)

    if root + "byteorder" in names and read("byteorder") != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine; save it again on a little-endian one")

    def rebuild(storage, offset, shape, stride, *_):
        if math.prod(shape) > len(storage):
            raise pickle.UnpicklingError("a tensor larger than its storage")
        return torch.as_strided(storage, tuple(shape), tuple(stride), offset)  # raises where it would leave the storage

    known = {("torch._utils", "_rebuild_tensor_v2"): rebuild, ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
             ("collections", "OrderedDict"): OrderedDict, ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value}
    known |= {("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")}
    known |= {("torch", f"{name}Storage"): dtype for dtype, (_, name) in DTYPES.items()}
    storages = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return _Bag
            if (module, name) not in known:
                raise CheckpointError(f"{path}: asks for {module}.{name}, which weights do not need; refused, nothing of it was run")
            return known[module, name]

        def persistent_load(self, key):
            _, dtype, name, _, count = key
            if name not in storages:
                storages[name] = _numbers(read(("data/" if f"{root}data/{name}" in names else "constants/") + name), dtype)
            if len(storages[name]) < count:
                raise CheckpointError(f"{path}: storage {name} holds {len(storages[name])} of {count} numbers: truncated; fetch it again")
            return storages[name]

    def tensors(bag, prefix=""):
        for key, value in vars(bag).items():
            if isinstance(value, torch.Tensor) and key != "attn_mask":  # a constant of the code, no weight
                yield prefix + key, value
            elif isinstance(value, _Bag):
                yield from tensors(value, f"{prefix}{key}.")

    return dict(tensors(Unpickler(io.BytesIO(read("data.pkl"))).load()))


HUGGING_FACE_NAMES = (  # transformers' parts of names -> OpenAI's, in this order
    ("text_model.", ""), ("vision_model.", "visual."), ("encoder.layers.", "transformer.resblocks."), ("embeddings.", ""),
    ("final_layer_norm", "ln_final"), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("layer_norm", "ln_"),
    ("self_attn.q_proj.", "attn.in_proj_"), ("self_attn.", "attn."), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ("patch_embedding", "conv1"), ("position_embedding.weight", "positional_embedding"),
    ("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))


def _from_hugging_face(state):
    """transformers' `CLIPModel` keys to OpenAI's: q, k, v joined into in_proj, linear projections turned into matrices."""
    out = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name or name.endswith("position_ids"):
            continue
        key = name
        for theirs, ours in HUGGING_FACE_NAMES:
            key = key.replace(theirs, ours)
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
        out[key] = value.t() if key in ("visual.proj", "text_projection") else value
    return out


def _read_config(path):
    """quick_gelu and heads out of transformers' config.json or open_clip's open_clip_config.json; {} where there is none."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        if "model_cfg" in config:
            config = config["model_cfg"]
            vision, text = config["vision_cfg"], config["text_cfg"]
            hints = {"quick_gelu": bool(config.get("quick_gelu", False)), "transformer_heads": text.get("heads", 8)}
            if isinstance(vision.get("layers", 12), int):
                hints["vision_heads"] = vision.get("width", 768) // vision.get("head_width", 64)
            return hints
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}  # older files leave out what is default
        return {"quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu",
                "vision_heads": vision.get("num_attention_heads", 12), "transformer_heads": text.get("num_attention_heads", 8)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise CheckpointError(f"{path}: is no CLIP configuration ({_line(e)}); fetch it again or move it away") from None


def from_state_dict(state, hints=None, image_size=None, quick_gelu=None, where="the weights"):
    """A CLIP of the architecture that the tensors' shapes tell, with a float32 copy of the tensors.

    state: tensors under OpenAI's keys; hints: as `read_weights` returns them; image_size, quick_gelu: as for `load`; where:
    named in errors. Raises CheckpointError naming the first keys that do not fit.
    """
    hints = hints or {}
    state = {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size", "attn_mask")}
    quick_gelu = hints.get("quick_gelu", True) if quick_gelu is None else quick_gelu
    if quick_gelu is None:
        warnings.warn(f"{where}: does not say its activation; taking GELU, open_clip's default (state it: clip.load(..., quick_gelu=True))")

    def count(prefix):
        return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})

    try:
        width, embed_dim = state["ln_final.weight"].shape[0], state["text_projection"].shape[1]
        if "visual.proj" in state:
            vision_width, _, patch, _ = state["visual.conv1.weight"].shape
            layers, grid = count("visual.transformer.resblocks."), state["visual.positional_embedding"]
            heads = {1280: 16}.get(vision_width, vision_width // 64)  # 64 channels each, but for open_clip's ViT-H
        else:
            vision_width, patch = state["visual.layer1.0.conv1.weight"].shape[0], None
            layers, grid = tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4)), state["visual.attnpool.positional_embedding"]
            heads = vision_width * 32 // 64
        resolution = (patch or 32) * math.isqrt(grid.shape[0] - 1)
        heads, text_heads = hints.get("vision_heads", heads), hints.get("transformer_heads", width // 64)
        config = Config(embed_dim, resolution, layers, vision_width, patch, state["positional_embedding"].shape[0],
                        state["token_embedding.weight"].shape[0], width, text_heads, count("transformer.resblocks."), heads, bool(quick_gelu))
        for size, n in ((vision_width * (1 if patch else 32), heads), (width, text_heads)):
            if type(n) is not int or n < 1 or size % n:
                raise ValueError(f"{n} attention heads do not divide a width of {size}")
        with torch.device("meta"):
            model = CLIP(config)
    except KeyError as e:
        held = ", ".join(map(repr, list(state)[:3])) or "nothing"
        raise CheckpointError(f"{where}: not CLIP weights: {e.args[0]!r} is missing; it holds {held}. Give a file of CLIP weights") from None
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError, TypeError) as e:
        raise CheckpointError(f"{where}: the shapes are no CLIP's ({_line(e)}); give a file of CLIP weights") from None
    expected = model.state_dict()
    state = {k: torch.zeros(()) for k in expected if k.endswith("num_batches_tracked")} | state  # older files lack these counters
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())  # open_clip also writes shape (1,)
    wrong = {"missing": [k for k in expected if k not in state], "unexpected": [k for k in state if k not in expected],
             "of another shape": [k for k in expected if k in state and expected[k].shape != state[k].shape]}
    if any(wrong.values()):
        parts = ", ".join(f"{len(keys)} {what} (first {keys[0]!r})" for what, keys in wrong.items() if keys)
        raise CheckpointError(f"{where}: does not fit {'a ViT' if patch else 'a ResNet'} CLIP: {parts}; give a file of CLIP weights")
    copy = {k: v.detach().to(expected[k].dtype, copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
    model.load_state_dict(copy, assign=True)
    if hints.get("tokenizer") is not None:
        try:
            model.tokenizer = Tokenizer(hints["tokenizer"])
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{where}: its tokenizer's merges are no list of pairs ({_line(e)}); the file is damaged") from None
        if model.tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(f"{where}: its tokenizer has more symbols than its model ({config.vocab_size}); the file is damaged")
    return resize_images(model, image_size) if image_size and image_size != resolution else model


def _check_size(config, image_size):
    step = config.vision_patch_size or 32
    if image_size < step or image_size % step:
        raise CheckpointError(f"--image-size {image_size}: must be a positive multiple of {step} for this model")
    return step


def resize_images(model, image_size):
    """The same model for another input size: its grid of positional embeddings is interpolated (bicubic). Returns the model."""
    visual, holder = model.visual, model.visual if model.config.vision_patch_size else model.visual.attnpool
    old, new = math.isqrt(holder.positional_embedding.shape[0] - 1), image_size // _check_size(model.config, image_size)
    first, grid = holder.positional_embedding.data.split([1, old * old])
    grid = grid.view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=new < old).permute(0, 2, 3, 1).reshape(new * new, -1)
    holder.positional_embedding = nn.Parameter(torch.cat([first, grid]))
    visual.input_resolution, model.config = image_size, replace(model.config, image_resolution=image_size)
    return model


# ---------------------------------------------------------------- writing weights and checkpoints

CHECKPOINT_FORMAT = "clip-methods-1"


def write_file(path, write):
    """Call write(temporary file), then rename it to `path`: the file is always the old one or the new one, whole.

    Raises CheckpointError where it cannot be written (the old file stays); what `write` raises otherwise passes through.
    """
    temporary, folder = None, os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writing-", delete=False) as f:
            temporary = f.name
            write(f)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is private; the result is an ordinary file
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError of its inline_container.cc
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):
            raise  # not of writing, but of what is written: a model that ran out of memory, say
        reason = getattr(e, "strerror", None) or _line(e)
        raise CheckpointError(f"{path}: cannot be written ({reason}); the old file stays. Free space or choose another folder") from None
    finally:
        if temporary:
            os.unlink(temporary)


def weights(model):
    """The model's state dict, copied to the CPU: what is saved later is the model as it is now."""
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().clone()
    return state


def identity(model):
    """A hash of the names, shapes and values of all weights (64 hex digits): equal for equal models, wherever they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model, path):
    """Write the weights as a plain state dict with OpenAI's keys: OpenAI's `clip.load` and open_clip read it back.

    What shapes do not tell (the activation, the heads) goes into the state dict's metadata, where only `load` looks.
    """
    state = weights(model)
    state._metadata[""].update({k: getattr(model.config, k) for k in HINTS})
    write_file(path, partial(torch.save, state))


def describe(model):
    """The part of a checkpoint that rebuilds this CLIP: configuration, weights, and its own tokenizer's merges if it has one."""
    return {"config": asdict(model.config), "state_dict": weights(model), "merges": model.tokenizer.merges if model.tokenizer else None}


def describe_heads(model):
    """The weights of a module that has a CLIP as its `clip`, without the CLIP's: a state dict on the CPU."""
    return {name: value for name, value in weights(model).items() if not name.startswith("clip.")}


def load_heads(model, heads):
    """The inverse of `describe_heads`, in place. Raises CheckpointError where names or shapes are not the model's."""
    try:
        model.load_state_dict(heads | {name: value for name, value in model.state_dict().items() if name.startswith("clip.")})
    except RuntimeError as e:
        raise CheckpointError(f"the checkpoint's weights are not this model's ({_line(e)})") from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (a dict of tensors and plain values; "clip" from `describe`, "method" the script) atomically."""
    write_file(path, partial(torch.save, {"format": CHECKPOINT_FORMAT, **checkpoint}))


def load_checkpoint(path):
    """A checkpoint of this project as a dict, on the CPU. Raises CheckpointError for anything else."""
    checkpoint, _ = _read_file(os.fspath(path))
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project (weights alone are for --clip)")
    return checkpoint

# ---------------------------------------------------------------- the tokenizer

PATTERN = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _byte_symbols():
    """byte -> printable character: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def clean(text):
    """Repair mis-decoded Unicode, undo HTML escapes (twice: captions scraped from the web), fold white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """CLIP's byte-level BPE (Sennrich et al. 2016): text -> ids; any text can be written, and the last id ends a text.

    merges: list of (left, right) symbol pairs in order of rank; None for OpenAI's 48,894 (fetched once). Vocabulary: 256 byte
    symbols, the same with `</w>` (end of a word), one symbol per merge, start and end of text.
    """

    def __init__(self, merges=None):
        self.merges = [tuple(m) for m in (merges if merges is not None else _openai_merges())]
        self.bytes = _byte_symbols()
        symbols = list(self.bytes.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(m) for m in self.merges] + ["<|startoftext|>", "<|endoftext|>"]
        self.ids, self.symbols = {s: i for i, s in enumerate(symbols)}, symbols
        self.ranks = {m: r for r, m in enumerate(self.merges)}
        self.vocab_size, self.start, self.end = len(symbols), len(symbols) - 2, len(symbols) - 1
        self.cache = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    def _split(self, word):
        symbols = [self.bytes[b] for b in word.encode("utf-8")]
        return symbols[:-1] + [symbols[-1] + "</w>"]

    def _merge(self, word):
        """Merge the pair of lowest rank, leftmost first, until none is left. A heap over a linked list: n log n, as one
        word of a hostile or broken text can be thousands of characters long."""
        parts = self._split(word)
        n = len(parts)
        right, left = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(self.ranks[pair], i, pair) for i, pair in enumerate(zip(parts, parts[1:])) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank, fresh = heap[0][0], []  # pairs that come up wait until every occurrence of this one is merged
            while heap and heap[0][0] == rank:
                _, i, pair = heapq.heappop(heap)
                j = right[i]
                if parts[i] is None or j >= n or (parts[i], parts[j]) != pair:
                    continue  # one side was merged away since
                parts[i], parts[j], right[i] = parts[i] + parts[j], None, right[j]
                if right[j] < n:
                    left[right[j]] = i
                fresh += (left[i], i), (i, right[i])
            for a, b in fresh:
                if a >= 0 and b < n and parts[a] is not None and (parts[a], parts[b]) in self.ranks:
                    heapq.heappush(heap, (self.ranks[parts[a], parts[b]], a, (parts[a], parts[b])))
        return [self.ids[p] for p in parts if p is not None]

    def encode(self, text):
        """-> list of ids, without start and end."""
        ids = []
        for word in PATTERN.findall(clean(text)):
            known = self.cache.get(word) or self._merge(word)
            if len(self.cache) < 100_000:
                self.cache[word] = known
            ids += known
        return ids

    def decode(self, ids):
        """-> text, lower case, with a space after every word."""
        symbols = "".join(self.symbols[int(i)] for i in ids if int(i) not in (self.start, self.end))
        to_byte = {s: b for b, s in self.bytes.items()}
        return bytes(to_byte.get(c, 32) for c in symbols.replace("</w>", " ")).decode("utf-8", "replace")

    def rows(self, texts, context_length):
        """-> (int32 (len(texts), context_length): start, ids, end, zeros; how many texts were too long and were cut)."""
        out, cut = torch.zeros(len(texts), context_length, dtype=torch.int32), 0
        for row, text in zip(out, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                ids, cut = ids[:context_length - 1] + [self.end], cut + 1
            row[:len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return out, cut

    def __call__(self, texts, context_length=77, truncate=False):
        """texts: a string or a list of strings -> int32 (N, context_length). Raises RuntimeError for a text that is too long
        unless truncate, which cuts it and keeps the end token (as OpenAI's `tokenize`)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        out, cut = self.rows(texts, context_length)
        if cut and not truncate:
            long = next(t for t in texts if len(self.encode(t)) + 2 > context_length)
            raise RuntimeError(f"Input {long[:100]!r} is too long for context length {context_length}; truncate=True cuts it")
        return out

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from texts: join the most frequent pair of neighbouring symbols until `vocab_size` symbols exist or
        no pair occurs twice. Ties go to the pair that sorts first, so that the result depends on the texts alone."""
        if vocab_size < 514:
            raise ValueError(f"vocab_size {vocab_size}: at least 514 (every byte, inside and at the end of a word, start and end)")
        blank = cls([])
        words = Counter(w for text in texts for w in PATTERN.findall(clean(text)))
        parts = [[blank._split(w), n] for w, n in sorted(words.items())]
        pairs, where = Counter(), {}
        for i, (symbols, n) in enumerate(parts):
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
                where.setdefault(pair, set()).add(i)
        merges = {}  # as an ordered set: should other merges spell a pair anew, it is joined again but not listed twice
        while len(merges) < vocab_size - 514 and pairs:
            best = min(pairs, key=lambda p: (-pairs[p], p))
            if pairs[best] < 2:
                break
            merges[best] = None
            for i in where.pop(best):
                symbols, n = parts[i]
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] -= n
                merged, k = [], 0
                while k < len(symbols):
                    step = 2 if tuple(symbols[k:k + 2]) == best else 1
                    merged.append("".join(symbols[k:k + step]))
                    k += step
                parts[i][0] = merged
                for pair in zip(merged, merged[1:]):
                    pairs[pair] += n
                    where.setdefault(pair, set()).add(i)
            pairs = Counter({p: n for p, n in pairs.items() if n > 0})
        return cls(list(merges))


def _openai_merges():
    with gzip.open(download(MERGES_URL, MERGES_SHA256), "rt", encoding="utf-8") as f:  # its checksum vouches for its size
        return [tuple(line.split()) for line in f.read().split("\n")[1:49152 - 256 - 2 + 1]]


@lru_cache
def default_tokenizer():
    """OpenAI's tokenizer, built once."""
    return Tokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """OpenAI's `clip.tokenize`: a string or a list of strings -> int32 (N, context_length)."""
    return default_tokenizer()(texts, context_length, truncate)
