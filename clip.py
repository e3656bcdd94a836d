"""CLIP: the model, its tokenizer, and reading and writing weights and checkpoints.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020. An image encoder (a ViT or a modified ResNet) and a causal text transformer map into one space,
where the cosine of an image and a text, times exp(logit_scale), is the logit that the two belong together.

It is used like OpenAI's package of the same name:

    import clip, torch
    model, preprocess = clip.load("ViT-B/32")      # or a file, a Hugging Face folder, a checkpoint of ours
    image = preprocess(Image.open("cone.png")).unsqueeze(0)
    logits_per_image, logits_per_text = model(image, clip.tokenize(["a red cone", "a blue torus"]))

One thing differs: weights stay float32 (mixed precision is autocast's job, see `autocast`), because weights
held in half precision overflow in fine-tuning. This file knows nothing of data sets or losses.
"""
import contextlib
import difflib
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import pickle
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from operator import methodcaller
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch import nn


class OneLineError(ValueError):
    """An error for whoever runs this: one line that says what is wrong, where (the file), and what to do.

    A message may quote a file: what would break the line or drive the terminal becomes "?".
    """

    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else "?" for c in message[:1500]))


class CheckpointError(OneLineError):
    """A model name, download, weight file or checkpoint that cannot be used."""


class DownloadError(CheckpointError):
    """A file that could not be fetched; the message says where to put it by hand."""


def expect(condition, where, problem):
    """Raise CheckpointError, naming the file (where) and its problem, if the condition does not hold."""
    if not condition:
        raise CheckpointError(f"{where}: {problem}")


@contextlib.contextmanager
def reading(path, advice, error=CheckpointError):
    """A context in which a file is read: what a broken one makes the readers raise becomes `error`, one line.

    advice: what to do, the end of that line. Errors that are such lines already (OneLineError) pass.
    """
    try:
        yield
    except OneLineError:
        raise
    except Exception as e:
        problem = "cannot be read" if getattr(e, "strerror", None) else "refused, damaged or of another kind"
        raise error(f"{path}: {problem} ({_line(e)}); {advice}") from None


def _line(error):
    """What an error says, as one short line."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())[:120] or type(error).__name__


# ---------------------------------------------------------------- architectures

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that CLIP was trained on: red, green, blue
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """What fixes a CLIP's function. `vision_layers` is one number for a ViT, four for a ModifiedResNet."""
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
    vision_mlp: int | None = None  # channels inside of a block's MLP; None: 4 times the width
    transformer_mlp: int | None = None
    end_token: int | None = None  # the id where a text's feature is read; None: the largest
    image_mean: tuple = IMAGE_MEAN
    image_std: tuple = IMAGE_STD
    image_resize: int | None = None  # a picture's shorter side before the crop; None: image_resolution
    squash: bool = False  # a picture is made square, not cropped
    interpolation: str = "bicubic"


def _config(embed_dim, resolution, layers, width, patch, text_width, text_layers=12, context=77, vocab=49408):
    """OpenAI's rule for heads: 64 channels each; a ResNet's attention pool works on 32 times its width."""
    heads = width // 64 if patch else width * 32 // 64
    return Config(embed_dim, resolution, layers, width, patch, context, vocab,
                  text_width, text_width // 64, text_layers, heads)


# name: (architecture, SHA-256 of the published file or None)
MODELS = {
    "RN50": (_config(1024, 224, (3, 4, 6, 3), 64, None, 512),
             "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": (_config(512, 224, (3, 4, 23, 3), 64, None, 512),
              "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": (_config(640, 288, (4, 6, 10, 6), 80, None, 640),
               "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": (_config(768, 384, (6, 8, 18, 8), 96, None, 768),
                "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": (_config(1024, 448, (3, 15, 36, 10), 128, None, 1024),
                "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": (_config(512, 224, 12, 768, 32, 512),
                 "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (_config(512, 224, 12, 768, 16, 512),
                 "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (_config(768, 224, 24, 1024, 14, 768),
                 "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (_config(768, 336, 24, 1024, 14, 768),
                       "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    # Trained from scratch, never published: for the built-in data and for small trials.
    "tiny": (_config(128, 32, 4, 128, 8, 128, text_layers=2, context=32, vocab=1024), None),
    "tiny-rn": (_config(128, 64, (1, 1, 1, 1), 16, None, 128, text_layers=4, context=32, vocab=1024), None),
    "small": (_config(256, 64, 6, 256, 8, 256, text_layers=4, context=48, vocab=2048), None),
}
SCRATCH = ("tiny", "tiny-rn", "small")


# ---------------------------------------------------------------- the model

class Packed(NamedTuple):
    """Where the rows of packed texts stand in their (B, L) grid.

    Only the N places that hold real tokens are computed. The others hold zeros in attention: they lie after a
    text's end, where no token of a causal transformer looks.
    """
    rows: torch.Tensor  # (N,) int64, places in the flattened grid
    B: int
    L: int


def _hooked(module):
    """Whether something looks at what goes through a module, or does its work."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or "forward" in module.__dict__


def _untouched(layer):
    """Whether a layer is still the nn.Linear that was made. Any other is called, its weights are not read."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is not None \
        and not _hooked(layer)


@torch.compiler.assume_constant_result
def _fused_on_cpu():
    return torch.backends.cuda.flash_sdp_enabled()  # the CPU's too, see fast_float32


class LayerNorm(nn.LayerNorm):
    """Of (L, B, width) that lies in memory as (B, L, width), of which torch's own would make a copy first."""

    def forward(self, x):
        return super().forward(x.transpose(0, -2)).transpose(0, -2)


class Attention(nn.Module):
    """Multi-head self-attention with torch's parameter names (`in_proj_weight`, `out_proj`).

    x: (L, B, width), as in OpenAI's code, or packed texts, (N, width), with `packed`.
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width ** -0.5)

    def forward(self, x, packed=None):
        x = x.transpose(0, -2)  # (B, L, width), as it lies in memory
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if packed is None:
            B, L = x.shape[:2]
        else:
            rows, B, L = packed
            qkv = qkv.new_zeros(B * L, qkv.shape[-1]).index_copy_(0, rows, qkv)
        qkv = qkv.reshape(B, L, 3, self.heads, x.shape[-1] // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # each (B, heads, L, width / heads)
        if x.is_cuda or _fused_on_cpu():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)  # (B, heads, L, L)
            if self.causal:
                scores += scores.new_full((L, L), -math.inf).triu(1)
            out = scores.softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        if packed is not None:
            out = out.flatten(0, 1).index_select(0, rows)
        return self.out_proj(out).transpose(0, -2)


class MLP(nn.Module):
    """The transformer's two-layer MLP. x: (..., width) -> (..., width)."""

    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def forward(self, x):
        if not (_untouched(self.c_fc) and _untouched(self.c_proj)):
            h = self.c_fc(x)
            return self.c_proj(h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))
        lying = x.transpose(0, -2)  # as it lies in memory
        rows = lying.reshape(-1, x.shape[-1])
        if self.quick_gelu:
            # h sigmoid(1.702 h) = silu(1.702 h) / 1.702. Both factors ride on the matrix products: passes of
            # their own over the widest activation would cost a fifth of this layer's time on a CPU.
            h = torch.addmm(self.c_fc.bias, rows, self.c_fc.weight.t(), beta=1.702, alpha=1.702)
            h = F.silu(h, inplace=not torch.is_grad_enabled() and not torch.jit.is_tracing())
            out = torch.addmm(self.c_proj.bias, h, self.c_proj.weight.t(), alpha=1 / 1.702)
        else:
            out = self.c_proj(F.gelu(self.c_fc(rows)))
        return out.view(lying.shape).transpose(0, -2)


class ResidualAttentionBlock(nn.Module):
    """x: (L, B, width), or (N, width) of packed texts -> the same."""

    def __init__(self, width, heads, mlp, causal, quick_gelu):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width, mlp or 4 * width, quick_gelu)
        self.ln_2 = LayerNorm(width)

    def forward(self, x, packed=None):
        h = self.ln_1(x)
        x = x + (self.attn(h) if packed is None else self.attn(h, packed))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """x: (L, B, width), or (N, width) of packed texts -> the same."""

    def __init__(self, width, layers, heads, mlp, causal, quick_gelu):
        super().__init__()
        self.width = width
        self.layers = layers
        blocks = (ResidualAttentionBlock(width, heads, mlp, causal, quick_gelu) for _ in range(layers))
        self.resblocks = nn.Sequential(*blocks)
        for block in self.resblocks:  # the paper's initialisation: residual branches shrink with depth
            nn.init.normal_(block.attn.out_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, x, packed=None):
        if packed is None:
            return self.resblocks(x)
        for block in self.resblocks:
            x = block(x, packed)
        return x


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product over the patches. What has been changed
    since it was made, or does not divide into patches, is left to torch."""

    def forward(self, x):
        p = self.kernel_size[0]
        as_made = self.stride == self.kernel_size and self.padding == (0, 0) and self.bias is None
        if not as_made or x.ndim != 4 or x.shape[2] != x.shape[3] or x.shape[2] % p:
            return super().forward(x)
        B, C, _, R = x.shape
        g = R // p  # g by g patches
        x = x.reshape(B, C, g, p, g, p).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(x.reshape(B, g * g, C * p * p), self.weight.flatten(1))
        return x.transpose(1, 2).unflatten(2, (g, g))  # (B, width, g, g)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with CLIP's extra norm before the blocks and a projection after them.

    `proj` may be set to None, as for linear probes; features then have `width` numbers, not `embed_dim`.
    """

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        p = config.vision_patch_size
        self.input_resolution = config.image_resolution
        self.output_dim = config.embed_dim
        scale = width ** -0.5
        self.conv1 = PatchConv(3, width, p, p, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        patches = (config.image_resolution // p) ** 2
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, config.vision_mlp,
                                       causal=False, quick_gelu=config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, x, tokens=False):
        """x: (B, 3, R, R) -> (B, embed_dim); with tokens also (B, 1 + patches, embed_dim), class first."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)  # (B, 1 + patches, width)
        x = self.ln_post(x if tokens else x[:, 0])
        if self.proj is not None:
            x = x @ self.proj
        return (x[:, 0], x) if tokens else x


class Bottleneck(nn.Module):
    """A residual block that halves resolution by average pooling, not by a stride (paper, section 2.4)."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # every block starts as the identity
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:
            conv = nn.Conv2d(inplanes, 4 * planes, 1, bias=False)
            layers = {"-1": nn.AvgPool2d(stride), "0": conv, "1": nn.BatchNorm2d(4 * planes)}
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Pools a feature map by one attention step whose query is the map's mean (paper, section 2.4)."""

    def __init__(self, positions, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) / width ** 0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width ** -0.5)

    def forward(self, x, tokens=False):
        """x: (B, width, h, w) -> (B, embed_dim); with tokens also (B, 1 + h w, embed_dim), all as queries."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, 1 + h w, width)
        q = self.q_proj(x if tokens else x[:, :1])
        qkv = (q, self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        out = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (out[:, 0], out) if tokens else out[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet-D: three convolutions as stem, anti-aliased strides, attention pooling (section 2.4)."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        self.input_resolution = config.image_resolution
        self.output_dim = config.embed_dim
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inplanes = width
        for i, blocks in enumerate(config.vision_layers):
            planes = width * 2 ** i
            stage = []
            for j in range(blocks):
                stage.append(Bottleneck(inplanes, planes, stride=2 if i > 0 and j == 0 else 1))
                inplanes = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        positions = (config.image_resolution // 32) ** 2
        self.attnpool = AttentionPool2d(positions, inplanes, config.vision_heads, config.embed_dim)

    def forward(self, x, tokens=False):
        """x: (B, 3, R, R) -> (B, embed_dim); with tokens also the pool's (B, 1 + (R/32)^2, embed_dim)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 width, R/32, R/32)
        return self.attnpool(x, tokens) if tokens else self.attnpool(x)


class CLIP(nn.Module):
    """The two encoders and the temperature. `tokenizer` is the model's own, None where it speaks OpenAI's.

    pack_texts: whether the blocks of the text encoder see packed texts, (N, width). None: unless a hook or a
    block that was exchanged would see the difference. State it as True where these work on single rows.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.visual = ModifiedResNet(c) if c.vision_patch_size is None else VisionTransformer(c)
        width = c.transformer_width
        self.transformer = Transformer(width, c.transformer_layers, c.transformer_heads, c.transformer_mlp,
                                       causal=True, quick_gelu=c.quick_gelu)
        self.token_embedding = nn.Embedding(c.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.context_length = c.context_length
        self.vocab_size = c.vocab_size
        self.tokenizer = None
        self.pack_texts = None
        self.register_state_dict_post_hook(_add_hints)

    @property
    def dtype(self):
        parameters = [*self.visual.conv1.parameters(), self.positional_embedding]  # a replica has the last
        return parameters[0].dtype

    def tokenize(self, texts, context_length=None, truncate=False):
        """`tokenize` with this model's own tokenizer (OpenAI's where it has none) and context length."""
        tokenizer = self.tokenizer or default_tokenizer()
        return tokenizer(texts, context_length or self.context_length, truncate)

    def encode_image(self, image, tokens=False):
        """image: (B, 3, R, R), normalised by `preprocess` -> (B, embed_dim), not of unit norm.

        tokens: also return (B, 1 + patches, embed_dim): a ViT's class and patch tokens after ln_post and the
        projection, or a ResNet's attention pool asked at every place. Raises ValueError for another R.
        """
        size = self.visual.input_resolution
        if image.ndim != 4 or image.shape[2:] != (size, size):
            raise ValueError(f"images are {tuple(image.shape)}; this model takes (B, 3, {size}, {size})")
        image = image.to(self.dtype)
        return self.visual(image, tokens) if tokens else self.visual(image)

    def encode_text(self, text, tokens=False):
        """text: (B, columns) token ids, the end token the largest id of its row -> (B, embed_dim).

        Attention is causal and the feature is read at the end token, so what stands after it changes nothing:
        only real tokens are computed, packed into one list of rows, several times less work than 77 columns.
        Where they stand is found on the CPU: text on a GPU waits for all that was queued there before.
        tokens: also return the features (B, L, embed_dim), zero after the end, and their mask (B, L), True at
        real tokens, where L is the longest text's length, or the columns where texts are not packed.
        Raises ValueError for a text longer than the context or an id outside the vocabulary.
        """
        if text.ndim != 2 or text.is_floating_point():
            raise ValueError(f"text is {text.dtype} {tuple(text.shape)}; token ids are integers (B, columns)")
        if _stands_for_any(text):
            return self._encode_columns(text, tokens)
        device = self.positional_embedding.device
        text = text.cpu().long()
        end = self._end(text)
        B = len(text)
        L = int(end.max()) + 1 if B else 1
        if L > self.context_length:
            raise ValueError(f"a text of {L} tokens; this model's context is {self.context_length}")
        mask = torch.arange(L, device="cpu") <= end[:, None]  # (B, L)
        real = mask.flatten().nonzero().squeeze(1)
        # Places after an end fill up to a multiple of 128 rows, so that a CPU reuses its prepared products.
        filling = (~mask).flatten().nonzero().squeeze(1)[:-len(real) % 128]
        rows = torch.cat([real, filling])
        ids = text[:, :L].flatten()[rows]
        known = getattr(self.token_embedding, "num_embeddings", math.inf)  # another module may know any
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise ValueError(f"a token id of {int(ids.max())}; this model's vocabulary is {known}: "
                             "it needs its own tokenizer (model.tokenize)")
        start = getattr(self.tokenizer, "start", 49406)
        if start != 49406 and B and (text[:, 0] == 49406).all():
            raise ValueError("these ids are of OpenAI's tokenizer; this model has its own (model.tokenize)")
        if not self._packs():
            return self._encode_columns(text[:, :self.context_length].to(device), tokens)
        last = mask.sum(1).cumsum(0) - 1  # the row of each text's end token
        ids, rows, last, mask = (x.to(device, non_blocking=True) for x in (ids, rows, last, mask))
        # F.embedding and not indexing, whose backward pass sums the rows of one position in any order.
        x = self.token_embedding(ids) + F.embedding(rows % L, self.positional_embedding)  # (rows, width)
        x = self.ln_final(self.transformer(x.to(self.dtype), Packed(rows, B, L)))
        if not tokens:
            return x[last] @ self.text_projection
        x = x[:len(real)] @ self.text_projection
        features = x.new_zeros(B * L, x.shape[-1]).index_copy(0, rows[:len(real)], x).view(B, L, -1)
        return x[last], features, mask

    def _end(self, text):
        """The column of each text's end token."""
        end = self.config.end_token
        return text.argmax(dim=-1) if end is None else (text == end).int().argmax(dim=-1)

    def _packs(self):
        """Whether the text encoder's layers may see packed rows, see `pack_texts`."""
        if self.pack_texts is not None:
            return self.pack_texts
        own = (nn.Embedding, Transformer, nn.Sequential, ResidualAttentionBlock, LayerNorm, Attention, MLP,
               nn.Linear, nn.LayerNorm)
        parts = (self.token_embedding, self.transformer, self.ln_final)
        return all(type(module) in own and not _hooked(module) for part in parts for module in part.modules())

    def _encode_columns(self, text, tokens):
        """`encode_text` of all columns, with (L, B, width) for the blocks, as in OpenAI's code."""
        B, L = text.shape
        x = self.token_embedding(text) + self.positional_embedding[:L]
        x = self.ln_final(self.transformer(x.to(self.dtype).transpose(0, 1)).transpose(0, 1))
        end = self._end(text)
        feature = x[torch.arange(B, device=x.device), end] @ self.text_projection
        if not tokens:
            return feature
        mask = torch.arange(L, device=x.device) <= end[:, None]
        return feature, (x @ self.text_projection) * mask[..., None], mask

    def forward(self, image, text):
        """-> logits_per_image (B_image, B_text), float32: cosine times exp(logit_scale); its transpose."""
        image = self.encode_image(image).float()
        text = self.encode_text(text).float()
        with torch.autocast(image.device.type, enabled=False):  # a caller's is for the encoders alone
            image = F.normalize(image, dim=-1)
            text = F.normalize(text, dim=-1)
            logits = self.logit_scale.float().exp() * image @ text.t()
        return logits, logits.t()


def _stands_for_any(x):
    """Whether a tensor stands for others, for which what depends on its numbers would be kept: in tracing,
    compiling, exporting and vmap."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor \
        or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)


def _add_hints(model, state, prefix, metadata):
    """A hook of `state_dict`: what no shape tells goes into the metadata, where only `load` looks."""
    metadata.update({key: getattr(model.config, key) for key in HINTS})
    metadata.update(_describe_tokenizer(model.tokenizer))


def build(name, tokenizer=None, seed=0, image_size=None, context_length=None):
    """A CLIP of a named architecture with random weights that depend on `seed` alone, in training mode.

    tokenizer: sets the vocabulary and travels with the model. image_size, context_length: pixels of a
    picture's side and tokens of a text, where they are not the architecture's.
    Raises CheckpointError for an unknown name or an image size that no whole number of patches fills.
    """
    config = MODELS[_known(name)][0]
    changes = {"image_resolution": image_size, "context_length": context_length,
               "vocab_size": tokenizer and tokenizer.vocab_size}
    config = replace(config, **{key: value for key, value in changes.items() if value})
    _check_size(config, config.image_resolution)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        model = CLIP(config)
    model.tokenizer = tokenizer
    return model


def resize_images(model, image_size):
    """Interpolate (bicubic) the positional embeddings in place, for another input size. Returns the model."""
    step = _check_size(model.config, image_size)
    holder = model.visual if model.config.vision_patch_size else model.visual.attnpool
    before = holder.positional_embedding
    old = math.isqrt(len(before) - 1)
    new = image_size // step
    first, grid = before.data.split([1, old * old])
    grid = grid.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=new < old)
    grid = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(before.dtype)
    holder.positional_embedding = nn.Parameter(torch.cat([first, grid]), before.requires_grad)
    resize = model.config.image_resize
    resize = resize and resize * image_size // model.config.image_resolution
    model.visual.input_resolution = image_size
    model.config = replace(model.config, image_resolution=image_size, image_resize=resize)
    return model


def shorten_context(model, context_length):
    """Keep the first `context_length` positions of a text, in place: shorter texts give what they gave.

    Returns the model. Raises CheckpointError where it has fewer positions.
    """
    expect(context_length <= model.context_length, f"--context {context_length}",
           f"this CLIP has {model.context_length} positions for the tokens of a text; choose that or less")
    before = model.positional_embedding
    model.positional_embedding = nn.Parameter(before.data[:context_length].clone(), before.requires_grad)
    model.context_length = context_length
    model.config = replace(model.config, context_length=context_length)
    return model


def _check_size(config, image_size):
    """The model's step in pixels, of which image_size must be a multiple."""
    step = config.vision_patch_size or 32
    fits = type(image_size) is int and image_size > 0 and image_size % step == 0
    expect(fits, f"--image-size {image_size}", f"must be a positive multiple of {step} for this model")
    return step


def compile_blocks(model):
    """Compile every residual block in place; state-dict keys stay. Packed texts make the shapes dynamic."""
    for module in model.modules():
        if isinstance(module, (ResidualAttentionBlock, Bottleneck)):
            module.compile(dynamic=True)


def fast_float32():
    """Let oneDNN compute the CPU's float32 matrix products where it is as exact as the default library.

    The default takes twice the time on some CPUs (AMD's). The switch, the whole process's, permits bfloat16
    too, which oneDNN takes only on a CPU with units for it (AMX), so the error of one product decides.
    torch's fused attention is five times slower with it, so `Attention` then forms the scores itself.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return  # an older torch, or another CPU
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    if (a @ b - exact).abs().max() > 1e-5 * exact.abs().max():
        matmul.fp32_precision = before
    else:
        torch.backends.cuda.enable_flash_sdp(False)  # this switch is the CPU's too


def autocast(amp, model):
    """The context that the encoders run in; losses and similarities are computed in float32 outside of it.

    amp: "bf16", "off", or "auto": bfloat16 where it pays, on a GPU that has it and on a CPU with AMX or
    AVX512-BF16 for models of width 256 or more. A training step of `small` then takes half the time; one of
    `tiny` would take four fifths, and stays in float32 to learn the same on every CPU (see tests/results.md).
    Raises ValueError for anything else.
    """
    if amp not in ("auto", "bf16", "off"):
        raise ValueError(f"--amp {amp}: choose auto, bf16 or off")
    device = next(model.parameters()).device.type
    pays = False
    if device == "cuda":
        pays = torch.cuda.is_bf16_supported()
    elif device == "cpu":  # the narrower, the more of the time is converting; a ResNet's stem widens 32 times
        c = model.config
        width = min(c.vision_width if c.vision_patch_size else 32 * c.vision_width, c.transformer_width)
        pays = width >= 256 and any(getattr(torch.cpu, f"_is_{units}_supported", bool)()  # bool() is False
                                    for units in ("amx_tile", "avx512_bf16"))
    if amp == "bf16" or amp == "auto" and pays:
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- loading, downloads, preprocessing

MODEL_URL = "https://openaipublic.azureedge.net/clip/models"
MERGES_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def available_models():
    """Names of OpenAI's published models, as `load` takes them."""
    return [name for name, (_, sha256) in MODELS.items() if sha256]


def load(name, device=None, jit=False, download_root=None, image_size=None, quick_gelu=None,
         context_length=None):
    """A pretrained CLIP and its preprocessing, as OpenAI's `clip.load`.

    name: a published model's name, or a file or folder, told apart by content: OpenAI's TorchScript archive
        or plain state dict, a Hugging Face `CLIPModel` (safetensors or bin), an open_clip checkpoint, weights
        of these kinds in another training's checkpoint, a checkpoint of this project.
    jit: accepted for old scripts; the archive's code is never run. download_root: as for `download`.
    image_size: another input size; the positional embeddings are interpolated.
    quick_gelu: the activation, for files that do not tell it.
    context_length: fewer tokens of a text than the weights have positions for, see `shorten_context`.
    Returns (model in eval mode, on `device`, in float32; preprocess). Raises CheckpointError.
    """
    path = os.fspath(name)
    if jit:
        warnings.warn("jit=True is ignored: the weights of the archive are read, its code is not run")
    if path in MODELS or not os.path.exists(path):
        sha256 = MODELS[_known(path)][1]
        train = f"train it (python train_mxm.py --clip {path}) and load the checkpoint"
        expect(sha256, repr(path), f"never published: {train}")
        file = path.replace("/", "-").replace("@", "-")
        path = download(f"{MODEL_URL}/{sha256}/{file}.pt", sha256, download_root,
                        also=f", and its tokenizer's beside it, of {MERGES_URL}")
    path = _weight_file(path)
    content, hints = _read_file(path)
    if content.get("format") == CHECKPOINT_FORMAT:
        model = from_description(content.get("clip"), path)
    else:
        with reading(path, "give a file of CLIP weights"):
            state, hints = _find_clip(content, hints, path, quick_gelu)
            model = _assemble(_infer_config(state, hints), state, hints.get("tokenizer"), path)
    if image_size is not None and image_size != model.config.image_resolution:
        resize_images(model, image_size)
    if context_length:
        shorten_context(model, context_length)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), Preprocess(model.config)


def _known(name):
    """The name, if it is that of a model. Raises CheckpointError, with the most similar one, if it is not."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(f"{name!r}: no such file, folder or model{hint} (models: {', '.join(MODELS)})")
    return name


def download(url, sha256, root=None, also=""):
    """The path of a published file, fetched once into `root` (default $CLIP_CACHE, then ~/.cache/clip).

    sha256: what the file's must be, 64 hex digits. also: what else to do where it cannot be had, which raises
    DownloadError.
    """
    root = root or os.environ.get("CLIP_CACHE") or os.path.expanduser("~/.cache/clip")
    path = os.path.join(root, url.rsplit("/", 1)[-1])
    if os.path.isfile(path) and file_sha256(path) != sha256:
        warnings.warn(f"{path} does not have the published checksum; fetching it again")
        os.unlink(path)
    if not os.path.isfile(path):
        fetch(url, path, sha256, also)
    return path


def fetch(url, path, sha256=None, also=""):
    """Download `url` to the file `path`, with progress on a terminal. Raises DownloadError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.hub.download_url_to_file(url, path, sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as e:  # RuntimeError: another checksum
        problem = f"could not be fetched ({_line(e)}); put the file at {path} by hand{also}"
        raise DownloadError(f"{url} {problem}") from None


def file_sha256(path):
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Preprocess:
    """A CLIP's preprocessing: a picture of PIL's -> float (3, R, R). `transforms` are its steps."""

    def __init__(self, config):
        self.config = config

    @cached_property
    def transforms(self):
        from torchvision import transforms as steps  # here, as it takes seconds, and few programs come here
        c = self.config
        square = (c.image_resolution, c.image_resolution)
        size = square if c.squash else c.image_resize or c.image_resolution  # a number is of the shorter side
        return [steps.Resize(size, steps.InterpolationMode(c.interpolation)),
                steps.CenterCrop(square),
                steps.Lambda(methodcaller("convert", "RGB")),
                steps.ToTensor(),
                steps.Normalize(c.image_mean, c.image_std)]

    def __call__(self, image):
        for step in self.transforms:
            image = step(image)
        return image


def transform(resolution):
    """OpenAI's preprocessing for this size."""
    return Preprocess(replace(MODELS["ViT-B/32"][0], image_resolution=resolution))


# ---------------------------------------------------------------- reading weights

CHECKPOINT_FORMAT = "clip-methods-1"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin",  # the next may be timm's
                "model.safetensors", "pytorch_model.bin", "best.pt", "last.pt")
HINTS = ("quick_gelu", "vision_heads", "transformer_heads", "end_token", "image_mean", "image_std",
         "image_resize", "squash", "interpolation")  # what the shapes of the tensors do not tell
PARTS = ("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
         "logit_scale")
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
NAMES = (  # transformers' parts of names and OpenAI's, replaced in this order
    ("text_model.", ""), ("vision_model.", "visual."), ("encoder.layers.", "transformer.resblocks."),
    ("embeddings.", ""), ("final_layer_norm", "ln_final"), ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"), ("layer_norm", "ln_"), ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.", "attn."), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("patch_embedding", "conv1"),
    ("position_embedding.weight", "positional_embedding"), ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"))
OTHER_KINDS = (  # parts of names, and what has them
    ("vision_model.head.", "a SigLIP"), ("visual.trunk.", "a CLIP with an image tower of timm's"),
    ("text.transformer.e", "a CLIP with a text tower of transformers'"),
    ("lora_A", "a CLIP with an adapter that is not merged"))


def _weight_file(path):
    """The file of weights in a folder; the path itself where it is none."""
    if not os.path.isdir(path):
        return path
    files = [os.path.join(path, name + index) for name in WEIGHT_FILES for index in ("", ".index.json")]
    files = [file for file in files if os.path.isfile(file)]
    expect(files, path, f"a folder with no weights in it; give a file, or one with {', '.join(WEIGHT_FILES)}")
    return files[0]


def _find_clip(content, hints, path, quick_gelu):
    """-> (state dict with OpenAI's keys, hints) of a file's content.

    hints: a dict of what is said beside the tensors, HINTS, `image_resolution` and `tokenizer`; given are
    those of the file's format. quick_gelu: the activation, None where the caller does not state it.
    """
    place, state, metadata, left = _pick(content, path)
    hints = hints | {key: metadata[key] for key in HINTS if key in metadata}  # `_add_hints` wrote them
    if "merges" in metadata:
        hints["tokenizer"] = _tokenizer_of(metadata)
    hugging_face = any(key.startswith("text_model.") for key in state)
    if hugging_face:
        state = _from_hugging_face(state)
    folder = os.path.dirname(path)
    if not hints:
        with reading(folder or ".", "fetch its configuration again, or move that away"):
            hints = _read_hugging_face(folder) if hugging_face else _read_open_clip(folder)
    if quick_gelu is None and "quick_gelu" not in hints:
        gelu = place.startswith("state_dict.") and not hugging_face  # as open_clip's training writes it
        quick_gelu = not gelu
        taken = "GELU, open_clip's default" if gelu else "QuickGELU, OpenAI's"
        warnings.warn(f"{path}: does not say its activation; taking {taken} "
                      f"(state it: clip.load(..., quick_gelu={gelu}))")
    if quick_gelu is not None:
        hints["quick_gelu"] = quick_gelu
    if "positional_embedding_res" in state:  # Long-CLIP's: the first 20 positions are CLIP's
        longer = state.pop("positional_embedding_res")
        state["positional_embedding"] = torch.cat([state["positional_embedding"][:20], longer[20:]])
    left += [key for key in state if key.split(".")[0] not in PARTS]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(f"{path}: left out, as no part of the CLIP: {', '.join(left[:5])}{more}")
    return {key: value for key, value in state.items() if key.split(".")[0] in PARTS}, hints


def _pick(content, path):
    """-> (place, tensors, what was written beside them, names of what is left out) of the first CLIP in a
    nest of dicts."""
    found = sorted(_candidates(content), key=lambda one: not _has_images(*one[1:]))  # whole ones first
    place, prefix, held = found[0] if found else ("", "", content)
    tensors = {str(key): value for key, value in held.items() if isinstance(value, torch.Tensor)}
    others = [kind for part, kind in OTHER_KINDS if any(part in key for key in tensors)]
    expect(not others, path, f"{' '.join(others)}, which is not supported; use the library that it is of")
    left = [other for other, _, _ in found[1:]] + [key for key in tensors if not key.startswith(prefix)]
    state = {key.removeprefix(prefix).replace("_orig_mod.", ""): value for key, value in tensors.items()
             if key.startswith(prefix) and key.split(".")[-1] not in NO_WEIGHTS}
    if "text.token_embedding.weight" in state:  # open_clip's custom text towers
        state = {key.removeprefix("text."): value for key, value in state.items()}
    shown = ", ".join(map(repr, [*tensors][:3])) or "no tensors"
    lacks = "image" if found else "text"
    expect(found and _has_images("", state), path,
           f"not CLIP weights: the {lacks} tower is missing; it holds {shown}. Give a file of CLIP weights")
    return place, state, getattr(held, "_metadata", {}).get(prefix.rstrip("."), {}), left


def _has_images(prefix, state):
    return any(str(key).startswith((f"{prefix}visual.", f"{prefix}vision_model.")) for key in state)


def _candidates(held, place=""):
    """Yield (place, prefix, dict) of each CLIP in a nest of dicts, found by a tensor that every CLIP has."""
    for key in held:
        if str(key).endswith("token_embedding.weight") and isinstance(held[key], torch.Tensor):
            prefix = key.removesuffix("token_embedding.weight")
            prefix = prefix.removesuffix("text_model.embeddings.").removesuffix("text.")
            yield place + prefix, prefix, held
    for key, inner in held.items():
        if isinstance(inner, dict):
            yield from _candidates(inner, f"{place}{key}.")


def _from_hugging_face(state):
    """transformers' `CLIPModel` keys to OpenAI's: q, k, v joined into in_proj, projections transposed."""
    out = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        key = name
        for theirs, ours in NAMES:
            key = key.replace(theirs, ours)
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
        out[key] = value.t() if key in ("visual.proj", "text_projection") else value
    return out


# ---------------------------------------------------------------- reading configurations

# What fields of transformers' and open_clip's configurations may be. Those of ANY may be anything: they are
# read, or in the tensors' shapes, or for training alone. open_clip's others have to be off.
FIELDS = {
    "model_type": ("clip", "clip_text_model", "clip_vision_model"),
    "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "num_channels": (3,),
    "do_resize": (True,), "do_rescale": (True,), "rescale_factor": (1 / 255,), "do_normalize": (True,),
    "resample": (2, 3), "pool_type": ("tok", "argmax", "eos"), "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "pos_embed_type": ("learnable",), "proj_type": ("linear",), "block_type": (None, "default"),
    "mode": ("RGB",), "resize_mode": ("shortest", "squash"), "interpolation": ("bicubic", "bilinear")}
ANY = """embed_dim quick_gelu custom_text init_logit_scale init_logit_bias nonscalar_logit_scale cast_dtype
    vision_cfg text_cfg layers width head_width heads mlp_ratio patch_size image_size patch_dropout
    output_tokens context_length vocab_size hf_tokenizer_name tokenizer_mode tokenizer_kwargs pad_id eos_id
    attn_pooler_queries attn_pooler_heads mean std size fill_color""".split()


def _supported(path, config, others=None):
    """Raise CheckpointError for a value that is not supported. others: what fields not listed may be."""
    for field, value in config.items():
        values = FIELDS.get(field, None if field in ANY else others)
        expect(values is None or value in values, path,
               f"{field} {value!r} is not supported; use the library that the model is of")


def _read_json(*path):
    """The content of a JSON file, a dict; {} without the file."""
    path = os.path.join(*path)
    if not os.path.isfile(path):
        return {}
    with reading(path, "fetch it again, or move it away"), open(path, encoding="utf-8") as f:
        return dict(json.load(f))


def _read_hugging_face(folder):
    """The hints of transformers' configuration of a CLIP, its preprocessing and tokenizer; {} without one."""
    path = os.path.join(folder, "config.json")
    config = _read_json(path)
    if not config:
        return {}
    _supported(path, config)
    towers = []
    for name, heads in (("vision_config", 12), ("text_config", 8)):
        stated = config.get(f"{name}_dict")  # which counts in older files, where both are
        if stated is None:
            stated = config.get(name) or {}
        defaults = {"num_attention_heads": heads, "hidden_act": "quick_gelu", "image_size": 224,
                    "eos_token_id": 49407}  # files leave out what is default
        towers.append(defaults | stated)
        _supported(path, towers[-1])
    vision, text = towers
    same = vision["hidden_act"] == text["hidden_act"]
    expect(same, path, "hidden_act is not the same for both towers: not supported; use transformers")

    path = os.path.join(folder, "preprocessor_config.json")
    pixels = _read_json(folder, "processor_config.json").get("image_processor") or _read_json(path)
    _supported(path, pixels)
    side = vision["image_size"]
    square = {"height": side, "width": side}
    size = pixels.get("size", side)
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = pixels.get("crop_size", side) if pixels.get("do_center_crop", True) else None
    expect(size == square or shorter and crop in (side, square), path,
           f"size {size} and crop {crop}: the model takes {side} pixels a side; correct them")
    return {"quick_gelu": text["hidden_act"] == "quick_gelu",
            "vision_layers": vision.get("num_hidden_layers"),
            "transformer_layers": text.get("num_hidden_layers"),
            "vision_heads": vision["num_attention_heads"],
            "transformer_heads": text["num_attention_heads"],
            "image_resolution": side,
            "end_token": None if text["eos_token_id"] == 2 else text["eos_token_id"],  # as transformers
            "squash": not shorter,
            "image_resize": None if shorter == side else shorter,
            "interpolation": "bilinear" if pixels.get("resample") == 2 else "bicubic",
            "image_mean": tuple(pixels.get("image_mean", IMAGE_MEAN)),
            "image_std": tuple(pixels.get("image_std", IMAGE_STD)),
            "tokenizer": _folder_tokenizer(folder)}


def _read_open_clip(folder):
    """The hints of open_clip's configuration and of the tokenizer beside it; {} without one."""
    path = os.path.join(folder, "open_clip_config.json")
    whole = _read_json(path)
    if not whole:
        return {}
    config = whole["model_cfg"]
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    pixels = whole.get("preprocess_cfg") or {}
    for part in (config, vision, text, pixels):
        _supported(path, part, others=(None, False, {}))
    layers = vision.get("layers")
    widening = 32 if isinstance(layers, list) else 1  # a ResNet's up to its pool
    return {"quick_gelu": bool(config.get("quick_gelu", False)),
            "vision_layers": tuple(layers) if isinstance(layers, list) else layers,
            "transformer_layers": text.get("layers"),
            "vision_heads": widening * vision.get("width", 768) // vision.get("head_width", 64),
            "transformer_heads": text.get("heads", 8),
            "image_resolution": vision.get("image_size", 224),
            "end_token": text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
            "squash": pixels.get("resize_mode") == "squash",
            "interpolation": pixels.get("interpolation") or "bicubic",
            "image_mean": tuple(pixels.get("mean") or IMAGE_MEAN),
            "image_std": tuple(pixels.get("std") or IMAGE_STD),
            "tokenizer": _folder_tokenizer(folder, text)}


def _folder_tokenizer(folder, text_config={}):
    """A folder's own tokenizer, None where it has none; a ForeignTokenizer where that is no CLIP BPE."""
    whole = _read_json(folder, "tokenizer.json")
    ids = _read_json(folder, "vocab.json")
    others = {"vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"}
    try:
        for key in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"):
            if text_config.get(key):
                raise ValueError(f"{key} {text_config[key]}")
        if whole:
            suffix = whole["model"].get("end_of_word_suffix")
            if suffix != "</w>" or "Lowercase" not in json.dumps(whole.get("normalizer")):
                raise ValueError("tokenizer.json has another normalizer or end of words")
            ids = whole["model"]["vocab"]
            pairs = whole["model"]["merges"]
        elif ids:
            with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as f:
                pairs = [line for line in f.read().splitlines() if line and not line.startswith("#version")]
        elif others.isdisjoint(os.listdir(folder or ".")):
            return None
        else:
            raise ValueError("it is of another kind")
        added = _read_json(folder, "added_tokens.json").keys()
        added |= {token["content"] for token in whole.get("added_tokens", ())}
        if not added <= ids.keys():
            raise ValueError("tokens were added")
        symbols = {i: symbol for symbol, i in ids.items()}
        vocabulary = [symbols.get(i, "") for i in range(max(symbols) + 1)]
        return Tokenizer([pair.split(" ") if isinstance(pair, str) else pair for pair in pairs], vocabulary)
    except Exception as e:
        problem = f"its tokenizer is no byte-level BPE as CLIP's ({_line(e)})"
        return ForeignTokenizer(f"{folder}: {problem}; make the ids of texts with the library that it is of",
                                ids.get("<|startoftext|>"))


# ---------------------------------------------------------------- putting a CLIP together

def from_description(description, where="the checkpoint"):
    """The CLIP that `describe` described, in eval mode, float32, on the CPU, with its own tokenizer.

    The architecture is the one that was stored; nothing is guessed from the tensors.
    where: the file, for errors: CheckpointError, where the description is damaged.
    """
    with reading(where, "write or fetch it again"):
        config = Config(**description["config"])
        return _assemble(config, description["state_dict"], _tokenizer_of(description), where).eval()


def _infer_config(state, hints):
    """The Config that shapes and hints tell. Raises a KeyError, a ValueError or the like if they do not."""
    def count(prefix):
        return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})

    def mlp(prefix, width):
        hidden = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"].shape[0]
        return None if hidden == 4 * width else hidden

    vocab_size, text_width = state["token_embedding.weight"].shape
    config = {"embed_dim": state["text_projection"].shape[1],
              "context_length": state["positional_embedding"].shape[0],
              "vocab_size": vocab_size,
              "transformer_width": text_width,
              "transformer_heads": text_width // 64,  # OpenAI's rule: 64 channels a head
              "transformer_layers": count("transformer.resblocks."),
              "transformer_mlp": mlp("", text_width)}
    patch = None
    if "visual.class_embedding" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions = state["visual.positional_embedding"].shape[0]
        heads = 16 if width in (1280, 1408, 1664) else width // 64  # open_clip's largest have wider heads
        config["vision_layers"] = count("visual.transformer.resblocks.")
        config["vision_mlp"] = mlp("visual.", width)
    else:  # a ResNet, whose attention pool works on 32 times the width of its stem
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        positions = state["visual.attnpool.positional_embedding"].shape[0]
        heads = 32 * width // 64
        config["vision_layers"] = tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4))
    size = (patch or 32) * math.isqrt(positions - 1)
    stated = {"image_size": (hints.get("image_resolution"), size),
              "text layers": (hints.get("transformer_layers"), config["transformer_layers"]),
              "image layers": (hints.get("vision_layers"), config["vision_layers"])}
    for name, (value, found) in stated.items():
        if value not in (None, found):
            raise ValueError(f"{name} {value} is not supported: the weights are of {found}")
    config |= {"vision_width": width, "vision_patch_size": patch, "vision_heads": heads,
               "image_resolution": size}
    config |= {key: hints[key] for key in HINTS if key in hints}
    if (config.get("end_token") or vocab_size) >= vocab_size - 1:
        config["end_token"] = None  # the largest id anyway
    return Config(**config)


def _assemble(config, state, tokenizer, where):
    """A CLIP of this configuration that holds a float32 copy of the tensors, which must be all of its own."""
    pooled_width = config.vision_width if config.vision_patch_size else 32 * config.vision_width
    text = config.transformer_width, config.transformer_heads
    for width, heads in ((pooled_width, config.vision_heads), text):
        expect(heads > 0 and width % heads == 0, where,
               f"a width of {width} has no {heads} attention heads; give a file of CLIP weights")
    with torch.device("meta"):
        model = CLIP(config)
    copies = {}
    for key, value in state.items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        copies[key] = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    missing, unexpected = model.load_state_dict(copies, strict=False, assign=True)
    wrong = {"missing": missing, "unexpected": unexpected}
    parts = [f"{len(keys)} {problem} (first {keys[0]!r})" for problem, keys in wrong.items() if keys]
    kind = "a ViT" if config.vision_patch_size else "a ResNet"
    expect(not parts, where, f"does not fit {kind} CLIP: {', '.join(parts)}; give a file of CLIP weights")
    model.tokenizer = tokenizer
    return model


# ---------------------------------------------------------------- file formats; nothing of a file is ever run

DTYPES = {  # torch's dtype: its name in safetensors, the name of its storages in pickles
    torch.float64: ("F64", "Double"), torch.float32: ("F32", "Float"), torch.float16: ("F16", "Half"),
    torch.bfloat16: ("BF16", "BFloat16"), torch.int64: ("I64", "Long"), torch.int32: ("I32", "Int"),
    torch.int16: ("I16", "Short"), torch.int8: ("I8", "Char"), torch.uint8: ("U8", "Byte"),
    torch.bool: ("BOOL", "Bool")}


def _read_file(path):
    """-> (dict of tensors and plain values, hints that the format gives). Raises CheckpointError."""
    expect(os.path.exists(path), path, "no such file; give a file or folder of weights")
    with reading(path, "give a file of weights, or fetch it again; nothing of it was run"):
        with open(path, "rb") as f:
            head = f.read(64)
        expect(head, path, "is empty; fetch or write it again")
        expect(not head.startswith(b"version https://git-lfs"), path,
               "a pointer of Git LFS, not the file itself; fetch that (git lfs pull)")
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        if head[8:9] == b"{":
            return read_safetensors(path), {}
        if not path.endswith(".index.json"):
            return _read_pickle(path), {}
        with open(path, encoding="utf-8") as f:
            shards = {os.path.basename(name) for name in json.load(f)["weight_map"].values()}
        weights = {}
        for shard in sorted(shards):  # only files of the index's own folder
            weights |= _read_file(os.path.join(os.path.dirname(path), shard))[0]
        return weights, {}


class _Bag:
    """Stands for what is not needed of a file, and for every class of a TorchScript archive: attributes."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


def _read_pickle(path):
    """What torch.save wrote, if it is a dict of tensors and plain values. What is numpy's is left out."""
    numpy_names = ["numpy.dtype", "numpy.ndarray"]
    for name in ("scalar", "_reconstruct"):
        numpy_names += [f"numpy.core.multiarray.{name}", f"numpy._core.multiarray.{name}"]
    try:
        with torch.serialization.safe_globals([(_Bag, name) for name in numpy_names]):
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's own says in many lines how to run what is in the file
        asks = regex.search(r"GLOBAL (\S+)|(?:class|function|type) (\S+\.\S+)", str(e))
        reason = f"asks for {asks[1] or asks[2]}, which weights do not need" if asks else "no weight file"
        raise pickle.UnpicklingError(reason) from None
    expect(isinstance(weights, dict), path,
           f"holds a {type(weights).__name__}, not a dictionary of weights; save model.state_dict()")
    return weights


def read_safetensors(path):
    """A safetensors file (uint64 header length, JSON header, bytes) as {name: tensor}; bounds are checked."""
    dtypes = {name: dtype for dtype, (name, _) in DTYPES.items()}
    content = np.memmap(path, np.uint8, mode="c")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = dtypes.get(entry["dtype"])
        expect(dtype, path, f"tensor {name!r}: dtype {entry['dtype']} is not supported; save it as F32")
        begin, end = entry["data_offsets"]
        fits = end - begin == math.prod(entry["shape"]) * dtype.itemsize
        expect(fits and 0 <= begin and start + end <= len(content), path,
               f"tensor {name!r} lies outside the file or has a wrong size; fetch it again")
        numbers = torch.from_numpy(content[start + begin:start + end])
        tensors[name] = numbers.view(dtype).reshape(entry["shape"])
    return tensors


class RestrictedUnpickler(pickle.Unpickler):
    """A reader of pickles that imports nothing: all that a pickle names is looked up in a table.

    file: open for reading bytes. admitted: {(top-level module, name): what stands for it}, "*" for any name.
    What stands for a function should be made for this reader alone: a pickle may set attributes of it.
    persistent: a function of the ids of what lies outside of the pickle. Raises UnpicklingError for others.
    """

    def __init__(self, file, admitted, persistent=None, **options):
        super().__init__(file, **options)
        self.admitted = admitted
        self.persistent = persistent

    def find_class(self, module, name):
        top = module.split(".")[0]
        for key in ((top, name), (top, "*")):
            if key in self.admitted:
                return self.admitted[key]
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which it does not need")

    def persistent_load(self, key):
        return self.persistent(key)


def read_torchscript(archive):
    """-> (state dict, hints) of a TorchScript archive, an open ZipFile; its code is not run.

    `data.pkl` is a pickle of modules; their tensors' bytes lie in `data/` or `constants/`. Only tensors and
    plain lists are made of it; every class of the archive becomes a `_Bag`.
    """
    names = set(archive.namelist())
    pickled = next(name for name in names if name.endswith("/data.pkl") and name.count("/") == 1)
    root = pickled.removesuffix("data.pkl")

    def storage_of(key):
        _, dtype, name, *_ = key
        folder = "data/" if f"{root}data/{name}" in names else "constants/"
        return torch.frombuffer(bytearray(archive.read(root + folder + name)), dtype=dtype)

    def rebuild_tensor(storage, offset, shape, stride, *_):
        return torch.as_strided(storage, shape, stride, offset)  # which refuses what lies outside

    admitted = {("__torch__", "*"): _Bag,
                ("torch", "_rebuild_tensor_v2"): rebuild_tensor,
                ("torch", "_rebuild_parameter"): lambda tensor, *_: tensor,
                ("torch", "restore_type_tag"): lambda value, _: value,
                ("collections", "OrderedDict"): OrderedDict}
    admitted |= {("torch", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")}
    admitted |= {("torch", f"{name}Storage"): dtype for dtype, (_, name) in DTYPES.items()}

    def tensors(bag, prefix=""):
        for key, value in vars(bag).items():
            if isinstance(value, torch.Tensor):
                yield prefix + key, value
            elif isinstance(value, _Bag):
                yield from tensors(value, f"{prefix}{key}.")

    with archive.open(pickled) as f:
        state = dict(tensors(RestrictedUnpickler(f, admitted, storage_of).load()))
    code = b"".join(archive.read(name) for name in names if name.endswith(".py"))  # only looked at
    gelu = b"gelu(" in code
    return state, {"quick_gelu": not gelu} if gelu or b"sigmoid(" in code else {}


# ---------------------------------------------------------------- writing weights and checkpoints

def weights(model):
    """The model's state dict, copied to the CPU: what is saved later is the model as it is now."""
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().clone()
    return state


def identity(model):
    """A hash of the names, shapes and values of all weights (64 hex digits): equal for equal models."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model, path):
    """Write the weights as a plain state dict, which OpenAI's `clip.load` and open_clip read too.

    What its shapes do not tell (the activation, the heads, the tokenizer) is in its metadata. A CLIP within
    DataParallel or the like, or compiled, is saved as itself. Raises CheckpointError.
    """
    while not isinstance(model, CLIP):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        expect(inner is not None, path, f"not written: a {type(model).__name__} is no CLIP; give the CLIP")
        model = inner
    write_file(path, partial(torch.save, weights(model)))


def describe(model):
    """What a checkpoint holds of a CLIP: its configuration, weights, and the merges of its own tokenizer."""
    return {"config": asdict(model.config), "state_dict": weights(model),
            **_describe_tokenizer(model.tokenizer)}


def describe_heads(model):
    """The weights of a module that has a CLIP as its `clip`, without the CLIP's: a state dict on the CPU."""
    return {name: value for name, value in weights(model).items() if not name.startswith("clip.")}


def load_heads(model, heads):
    """The inverse of `describe_heads`, in place. Raises CheckpointError where names or shapes do not fit."""
    clip_weights = {name: value for name, value in model.state_dict().items() if name.startswith("clip.")}
    try:
        model.load_state_dict(heads | clip_weights)
    except RuntimeError as e:
        raise CheckpointError(f"the checkpoint's weights are not this model's ({_line(e)})") from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint: a dict of tensors and plain values; "clip" from `describe`, "method" the script."""
    write_file(path, partial(torch.save, {"format": CHECKPOINT_FORMAT, **checkpoint}))


def load_checkpoint(path):
    """A checkpoint of this project as a dict, on the CPU. Raises CheckpointError for anything else."""
    checkpoint, _ = _read_file(os.fspath(path))
    expect(checkpoint.get("format") == CHECKPOINT_FORMAT, path,
           "not a checkpoint of this project (weights alone are for --clip)")
    return checkpoint


def write_file(path, write):
    """Call write(temporary file), then rename it to `path`, which is always all of the old or the new file.

    Raises CheckpointError where it cannot be written. What else `write` raises passes through.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".writing-{os.getpid()}-{name}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):  # which is how torch.save fails
            raise
        problem = f"cannot be written ({_line(e)}); the old file stays. Free space or choose another folder"
        raise CheckpointError(f"{path}: {problem}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# ---------------------------------------------------------------- the tokenizer

PATTERN = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clean(text):
    """Repair mis-decoded Unicode, undo HTML escapes (some are doubled), fold white space, lower case."""
    if text.isascii() and text.isprintable() and "&" not in text:  # most are: there is nothing to repair
        return " ".join(text.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def _byte_symbols():
    """{byte: printable character}: printable bytes are themselves, the others characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """CLIP's byte-level BPE (Sennrich et al. 2016): text -> ids. Any text has some; the last id ends a text.

    merges: list of (left, right) symbol pairs in order of rank; None for OpenAI's 48,894, fetched once.
    vocabulary: the symbols in order of their ids; None for 256 byte symbols, the same with `</w>` (end of a
    word), one symbol per merge, start, end. Raises ValueError where one of these is not in it.
    """

    def __init__(self, merges=None, vocabulary=None):
        self.merges = [tuple(pair) for pair in (_openai_merges() if merges is None else merges)]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.bytes = _byte_symbols()
        letters = list(self.bytes.values())
        symbols = letters + [letter + "</w>" for letter in letters]
        symbols += ["".join(pair) for pair in self.merges] + ["<|startoftext|>", "<|endoftext|>"]
        self.vocabulary = None if vocabulary == symbols else vocabulary
        self.symbols = self.vocabulary or symbols
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        lacking = [symbol for symbol in symbols if symbol not in self.ids]
        if lacking:
            raise ValueError(f"its vocabulary lacks {lacking[0]!r}")
        self.vocab_size = len(self.symbols)
        self.start = self.ids["<|startoftext|>"]
        self.end = self.ids["<|endoftext|>"]
        self.cache = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from texts: join the most frequent pair of neighbours until `vocab_size` symbols exist
        or no pair occurs twice. Ties go to the pair that sorts first, so the texts' order does not matter."""
        if vocab_size < 514:
            raise ValueError(f"vocab_size {vocab_size}: at least 514 (every byte, inside and at the end of a "
                             "word, start and end)")
        blank = cls([])
        frequency = Counter(word for text in texts for word in PATTERN.findall(clean(text)))
        words = [(blank._split(word), n) for word, n in frequency.items()]  # (symbols, how often)
        counts = Counter()  # of every pair

        def count(symbols, n):
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += n

        for symbols, n in words:
            count(symbols, n)
        merges = {}  # an ordered set: a pair that other merges spell anew is joined again, but listed once
        while len(merges) < vocab_size - 514:
            most = max(counts.values(), default=0)
            if most < 2:
                break
            best = min(pair for pair, n in counts.items() if n == most)
            merges[best] = None
            for i, (symbols, n) in enumerate(words):
                if best[0] in symbols and best[1] in symbols:
                    count(symbols, -n)
                    words[i] = _join(symbols, best), n
                    count(words[i][0], n)
        return cls(list(merges))

    def _split(self, word):
        symbols = [self.bytes[byte] for byte in word.encode("utf-8")]
        return symbols[:-1] + [symbols[-1] + "</w>"]

    def _merge(self, word):
        """The ids of a word: merge the pair of lowest rank, wherever it occurs, until no pair has a rank."""
        symbols = self._split(word)
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            symbols = _join(symbols, pair)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text):
        """The list of a text's ids, without start and end."""
        ids = []
        for word in PATTERN.findall(clean(text)):
            word_ids = self.cache.get(word) or self._merge(word)
            if len(self.cache) < 100_000:
                self.cache[word] = word_ids
            ids += word_ids
        return ids

    def decode(self, ids):
        """The text of ids: lower case, with a space after every word."""
        symbols = "".join(self.symbols[int(i)] for i in ids if int(i) not in (self.start, self.end))
        to_byte = {symbol: byte for byte, symbol in self.bytes.items()}
        return bytes(to_byte.get(c, 32) for c in symbols.replace("</w>", " ")).decode("utf-8", "replace")

    def rows(self, texts, context_length):
        """-> (int32 (len(texts), context_length): start, ids, end, zeros; how many texts were cut to fit).

        Raises TypeError for what is no string, as a missing value of a table.
        """
        out = np.zeros((len(texts), context_length), np.int32)
        cut = 0
        for row, text in zip(out, texts):
            if not isinstance(text, str):
                raise TypeError(f"texts are strings; one is {text!r}")
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                ids = ids[:context_length - 1] + [self.end]
                cut += 1
            row[:len(ids)] = ids
        return torch.from_numpy(out), cut

    def __call__(self, texts, context_length=77, truncate=False):
        """texts: a string or a list of strings -> int32 (N, context_length), as OpenAI's `tokenize`.

        Raises RuntimeError for a text that is too long, unless truncate: it is cut and keeps the end token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        out, cut = self.rows(texts, context_length)
        if cut and not truncate:
            long = next(text for text in texts if len(self.encode(text)) + 2 > context_length)
            raise RuntimeError(f"Input {long[:100]!r} is too long for context length {context_length}; "
                               "truncate=True cuts it")
        return out


class ForeignTokenizer:
    """Stands for one that is no CLIP BPE: a model takes its ids, texts are refused with a CheckpointError."""
    vocabulary = None

    def __init__(self, problem, start=None):
        self.merges = problem  # which a checkpoint keeps, and
        self.start = start  # the id that a text begins with, where it is known

    def refuse(self, *_, **__):
        raise CheckpointError(self.merges)

    __call__ = encode = decode = rows = refuse


def _describe_tokenizer(tokenizer):
    """A tokenizer (or None) as plain values, of which `_tokenizer_of` makes it again."""
    if tokenizer is None or tokenizer.vocabulary is None:
        return {"merges": tokenizer and tokenizer.merges, "start": tokenizer and tokenizer.start}
    return {"merges": tokenizer.merges, "vocabulary": tokenizer.vocabulary}


def _tokenizer_of(described):
    merges = described["merges"]
    if merges is None or isinstance(merges, str):
        return merges and ForeignTokenizer(merges, described.get("start"))
    return Tokenizer(merges, described.get("vocabulary"))


def _join(symbols, pair):
    """The symbols with every occurrence of the pair, from the left, as one."""
    joined = []
    i = 0
    while i < len(symbols):
        step = 2 if symbols[i] == pair[0] and symbols[i + 1:i + 2] == [pair[1]] else 1
        joined.append("".join(symbols[i:i + step]))
        i += step
    return joined


def _openai_merges():
    path = download(MERGES_URL, MERGES_SHA256)  # its checksum vouches for its size
    with gzip.open(path, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    return [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]


@lru_cache
def default_tokenizer():
    """OpenAI's tokenizer, built once."""
    return Tokenizer()


def tokenize(texts, context_length=77, truncate=False):
    """OpenAI's `clip.tokenize`: a string or a list of strings -> int32 (N, context_length)."""
    return default_tokenizer()(texts, context_length, truncate)
