"""Cross-Modal Adapter: parameter-efficient transfer of CLIP to text-video retrieval (Pattern Recognition 159,
arXiv 2211.09623).

CLIP is frozen. A small bottleneck, the adapter, is inserted into every block of both encoders, after
attention and after the MLP. Their output h, before it is added to the residual stream, becomes (section 3.2)

    h + [z W_unique, z W_share]   with   z = QuickGELU(h W_down)

W_down (D, r) and W_unique (r, D - d_s) belong to one encoder. W_share (r, d_s) is one matrix for both
encoders, so that the modalities interact from the first layer on, and neither waits for the other. With r = 8
and d_s = 16 a third of a percent of ViT-B/32's weights is trained.

A video is compared with a text t through those of its frames f_j that fit the text. This query-aware
similarity (section 3.3, equations 7 and 8) has no weights:

    v = sum over j of softmax_j(t . f_j / tau) f_j
    similarity = cos(t, v)

The loss is CLIP's symmetric cross-entropy of these similarities, with CLIP's own scale, which is frozen. An
epoch is one pass over pairs: every caption once, each time with the frames of its video.

From the paper are the adapters, the similarity, the loss, and r and d_s of each data set; from the authors'
code the initial weights, the schedule, and dropout of 0. Their rate of 1e-5 is that of adapters and of Adam's
moments in half precision, where the second moment underflows and steps become about a hundred times as long;
here all is float32, and 1e-3 moves the weights as far (and 1e-5 CLIP's own, for their 1e-7). The baselines follow their own
papers (named where they stand), but the paper's prompts are in every layer, and ours before the first alone.
Ours are AdamW (the authors' Adam has no bias correction, and its cosine is counted from the first step, not
from the end of the warm-up), the learning rates from scratch, and the built-in shapes as a task.

    python train_adapter.py                                          # shapes: pretrain a tiny CLIP, adapt it
    python train_adapter.py --data msrvtt --root path/to/msrvtt --clip ViT-B/32     # the paper's setting
    python train_adapter.py --data activitynet --clip ViT-B/32             # its settings for paragraphs
    python train_adapter.py --data mine.jsonl --clip ViT-B/32 --tune lora  # your data, one of the baselines
    python train_adapter.py --tune full --pool mean                        # another, by the frames' mean
    torchrun --nproc_per_node=2 train_adapter.py                           # the same batch over two processes
    python train_adapter.py --resume                              # go on where it stopped, to the same bits
"""
import argparse
import ctypes
import hashlib
import math
import os
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=5, batch_size=128, weight_decay=0.2, rank=8, share=16, frames=12)  # for MSR-VTT
DATA = {  # the paper's where they differ; texts of the last two are paragraphs, and their videos longer
    "msvd": PRETRAINED | dict(rank=16),
    "didemo": PRETRAINED | dict(share=8, frames=64),
    "activitynet": PRETRAINED | dict(rank=16, share=512, frames=64, epochs=20),
}
CONTEXT = {"didemo": 64, "activitynet": 64}  # tokens of a text, where the CLIP has as many; elsewhere 32
SCRATCH = PRETRAINED | dict(epochs=4, batch_size=32)  # a tiny CLIP that is pretrained here
RATES = {  # --tune: the peak learning rates for a pretrained CLIP and for one that is pretrained here
    "adapter": (1e-3, 1e-2),
    "adapter-unshared": (1e-3, 1e-2),
    "lora": (1e-3, 1e-2),
    "prompt": (1e-3, 3e-2),
    "bitfit": (1e-3, 3e-2),
    "head": (1e-5, 3e-3),
    "full": (1e-5, 3e-4),
}
WARMUP = 0.1  # share of the steps in which the learning rate rises
MAX_NORM = 1.0  # of the gradient
TAU = 5.0  # temperature of the softmax over a video's frames
LORA_ALPHA = 16.0  # LoRA's update is scaled by LORA_ALPHA / r


def settings(argv=None):
    p = eval.common_arguments(__doc__, data="primitives-target")
    p.add_argument("--tune", default="adapter", choices=tuple(RATES),
                   help="what is trained: adapters, also without sharing; low-rank updates of queries and "
                        "values; prompts; biases; the projections; all of CLIP")
    p.add_argument("--rank", type=eval.positive_int,
                   help="r, width of the bottleneck; of lora the rank (default 8; msvd and activitynet 16)")
    p.add_argument("--share", type=eval.non_negative_int,
                   help="d_s, output channels of the matrix that both encoders share "
                        "(default 16; didemo 8, activitynet 512)")
    p.add_argument("--dropout", type=eval.fraction, default=0.0,
                   help="after the adapters' non-linearity (default 0, as the authors' command)")
    p.add_argument("--prompts", type=eval.positive_int, default=8,
                   help="learned tokens in each encoder, for --tune prompt")
    p.add_argument("--frames", type=eval.positive_int,
                   help="images of an instance, evenly taken (default 12; didemo and activitynet 64)")
    p.add_argument("--pool", choices=("query", "mean"), default="query",
                   help="compare a text with its own mean of a video's frames (default), or their plain mean")
    p.add_argument("--tau", type=eval.positive, default=TAU,
                   help="temperature of --pool query: the higher, the more evenly frames count (default 5)")
    p.add_argument("--pretrain-epochs", type=eval.positive_int, default=12,
                   help="epochs on primitives-source before --clip tiny or small is adapted")
    p.add_argument("--train-metrics", action="store_true",
                   help="evaluate training instances too, as many as val has")
    args = eval.parse(p, argv)
    if args.clip in clip.SCRATCH and args.data != "primitives-target":
        p.error(f"--clip {args.clip} has nothing to adapt: give a pretrained one "
                "(only with --data primitives-target is it pretrained here)")
    pretrained_rate, scratch_rate = RATES[args.tune]
    if args.clip in clip.SCRATCH:
        return eval.complete(args, "adapter", SCRATCH | dict(lr=scratch_rate))
    return eval.complete(args, "adapter", DATA.get(args.data, PRETRAINED) | dict(lr=pretrained_rate))


# ---------------------------------------------------------------- what is put into CLIP

def generator(seed, name):
    """A generator of its own for every initial matrix, so that what else is made does not change it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def linear(inputs, outputs, seed, name):
    """A linear layer of an adapter: truncated normal with a deviation of 0.01, biases 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.01, generator=generator(seed, name))
    nn.init.zeros_(layer.bias)
    return layer


class Adapters(nn.Module):
    """The adapters of both encoders: h + [z W_unique, z W_share] with z = QuickGELU(h W_down) (section 3.2).

    rank is r. shared_dim is d_s, from 0 up to the narrower encoder's width; W_share gives the last channels.
    Every layer has one W_share after attention and one after the MLP, for both encoders. Layers that only the
    deeper encoder has share with none. shared=False, a baseline: each encoder has W_shares of its own, which
    start as the shared ones do, so that both ways start as the same function. dropout acts on z (appendix B).
    """

    def __init__(self, clip_model, rank, shared_dim, shared=True, dropout=0.0, seed=0):
        super().__init__()
        self.shared = shared
        self.dropout = nn.Dropout(dropout)
        self.down = nn.ModuleDict()
        self.unique = nn.ModuleDict()
        self.share = nn.ModuleDict()
        for key, _, width in branches(clip_model):
            _, place = key.split("_", 1)
            self.down[key] = linear(width, rank, seed, f"down {key}")
            if shared_dim < width:
                self.unique[key] = linear(rank, width - shared_dim, seed, f"unique {key}")
            if shared_dim and self.share_key(key) not in self.share:
                self.share[self.share_key(key)] = linear(rank, shared_dim, seed, f"share {place}")

    def share_key(self, key):
        """The name of a place's W_share: without the encoder ("0_attn") where the encoders share it."""
        return key.split("_", 1)[1] if self.shared else key

    def forward(self, key, h):
        z = self.down[key](h)
        z = self.dropout(z * torch.sigmoid(1.702 * z))  # QuickGELU
        channels = []
        if key in self.unique:
            channels.append(self.unique[key](z))
        if self.share_key(key) in self.share:
            channels.append(self.share[self.share_key(key)](z))
        return h + torch.cat(channels, dim=-1)

    def attach(self, clip_model):
        """Insert the adapters into a CLIP. Returns functions that take them out again."""
        removals = []
        for key, module, _ in branches(clip_model):
            def adapt(module, inputs, h, key=key):
                return self(key, h.transpose(0, -2)).transpose(0, -2)  # as it lies in memory
            removals.append(module.register_forward_hook(adapt).remove)
        return removals


def branches(clip_model):
    """Yield (key, module, width) of the residual branches of a ViT CLIP: image_0_attn, image_0_mlp, ..."""
    config = clip_model.config
    encoders = (("image", clip_model.visual, config.vision_width),
                ("text", clip_model, config.transformer_width))
    for name, encoder, width in encoders:
        for i, block in enumerate(encoder.transformer.resblocks):
            yield f"{name}_{i}_attn", block.attn, width
            yield f"{name}_{i}_mlp", block.mlp, width


class Prompts(nn.Module):
    """A baseline: learned tokens after a text's start symbol (CoOp, Zhou et al. 2022) and after an image's
    tokens (VPT, Jia et al. 2022).

    They are shallow: put in before the first layer alone. The paper's baseline has new ones in every layer.
    """

    def __init__(self, clip_model, count, seed=0):
        super().__init__()
        config = clip_model.config
        self.image = nn.Parameter(0.02 * torch.randn(count, config.vision_width,
                                                     generator=generator(seed, "image")))
        self.text = nn.Parameter(0.02 * torch.randn(count, config.transformer_width,
                                                    generator=generator(seed, "text")))

    def extend(self, tokens):
        """Token rows (B, L) with more start symbols, (B, L + count), whose embeddings will be replaced.

        CLIP packs the tokens of all texts into one list of rows; `self.at` is where they stand in it.
        """
        count = len(self.text)
        tokens = torch.cat([tokens[:, :1].expand(-1, count), tokens], dim=1)
        lengths = tokens.argmax(1) + 1
        starts = lengths.cumsum(0) - lengths
        self.at = (starts[:, None] + torch.arange(1, count + 1, device=tokens.device)).flatten()
        return tokens

    def attach(self, clip_model):
        """Insert the prompts into a CLIP. Returns functions that take them out again."""
        def replace_embeddings(module, inputs, x):
            texts = len(self.at) // len(self.text)
            return x.index_copy(0, self.at.to(x.device), self.text.to(x.dtype).repeat(texts, 1))

        def append_tokens(module, inputs, x):
            return torch.cat([x, self.image.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        return [clip_model.token_embedding.register_forward_hook(replace_embeddings).remove,
                clip_model.visual.ln_pre.register_forward_hook(append_tokens).remove]


class LowRank(nn.Module):
    """LoRA's update of one attention layer's matrices of queries and of values: W + (LORA_ALPHA / r) B A.

    A (r, width) is normal with a deviation of width^-1/2 and B (width, r) is zero, so that nothing is changed
    at the start.
    """

    def __init__(self, width, rank, seed, name):
        super().__init__()
        normal = torch.randn(2, rank, width, generator=generator(seed, name))  # of queries, of values
        self.A = nn.Parameter(normal * width ** -0.5)
        self.B = nn.Parameter(torch.zeros(2, width, rank))

    def forward(self, weight):
        """weight (3 width, width): those of queries, keys and values, one below the other."""
        queries, values = LORA_ALPHA / self.A.shape[1] * self.B @ self.A
        return weight + torch.cat([queries, torch.zeros_like(queries), values])


class LoRA(nn.Module):
    """A baseline: LoRA (Hu et al. 2022, arXiv 2106.09685) on queries and values of every block.

    The sum of matrix and update is made anew in every pass, so a step of training also pays for the gradient
    of the whole matrix, which an update beside the matrix would not.
    """

    def __init__(self, clip_model, rank, seed=0):
        super().__init__()
        self.updates = nn.ModuleDict()
        for key, _, width in branches(clip_model):
            if key.endswith("attn"):
                self.updates[key] = LowRank(width, rank, seed, key)

    def attach(self, clip_model):
        """Update the matrices of a CLIP. Returns functions that give it the old ones back."""
        removals = []
        for key, module, _ in branches(clip_model):
            if key in self.updates:
                parametrize.register_parametrization(module, "in_proj_weight", self.updates[key],
                                                     unsafe=True)  # no trial: the two may be on two devices
                removals.append(partial(parametrize.remove_parametrizations, module, "in_proj_weight",
                                        leave_parametrized=False))
        return removals


def check_tunable(config, tune, shared_dim, prompts):
    """Raise CheckpointError where a CLIP of this configuration cannot be tuned in this way."""
    narrower = min(config.vision_width, config.transformer_width)
    positions = config.context_length
    if config.vision_patch_size is None and tune in ("adapter", "adapter-unshared", "lora", "prompt"):
        raise clip.CheckpointError(f"--tune {tune} goes into transformer blocks, and this CLIP's image "
                                   "encoder is a ResNet; give a ViT, or choose --tune full, head or bitfit")
    if tune.startswith("adapter") and shared_dim > narrower:
        raise clip.CheckpointError(f"--share {shared_dim} is more than an encoder's width (images "
                                   f"{config.vision_width}, texts {config.transformer_width}); "
                                   f"choose {narrower} or less")
    if tune == "prompt" and prompts > positions - 3:  # a text needs a start, a word and an end
        raise clip.CheckpointError(f"--prompts {prompts}: this CLIP has {positions} positions for a text; "
                                   f"choose {positions - 3} or less")


def is_tuned(tune, name, parameter):
    """Whether --tune trains this parameter of CLIP itself: with full all, with head the projections, with
    bitfit (Ben Zaken et al. 2022) the biases. What is added to a CLIP leaves it as it is."""
    if name == "logit_scale":
        return False
    if tune == "full":
        return True
    if tune == "head":
        return name in ("visual.proj", "text_projection") or name.startswith("visual.attnpool.c_proj")
    return tune == "bitfit" and parameter.ndim == 1 and name.endswith("bias")


class Tuned(nn.Module):
    """A frozen CLIP and what is trained on it. It embeds images and texts as a CLIP does.

    The arguments are those of the command line; each initial matrix depends on `seed` and its name alone.
    Raises CheckpointError where the CLIP cannot be tuned so, or carries adapters, updates or prompts already.
    """

    def __init__(self, clip_model, tune="adapter", rank=8, shared_dim=16, prompts=8, seed=0, dropout=0.0):
        super().__init__()
        config = clip_model.config
        check_tunable(config, tune, shared_dim, prompts)
        if getattr(clip_model, "tuned", False):
            raise clip.CheckpointError("this CLIP carries adapters, updates or prompts already, or was "
                                       "trained itself: detach() them first, or load it anew")
        self.prompts = prompts if tune == "prompt" else 0
        self.config = replace(config, context_length=config.context_length - self.prompts)  # left for words
        self.tokenizer = clip_model.tokenizer
        self.extra = None  # adapters, updates or prompts; otherwise the CLIP itself is trained
        if tune.startswith("adapter"):
            self.extra = Adapters(clip_model, rank, shared_dim, tune == "adapter", dropout, seed)
        elif tune == "lora":
            self.extra = LoRA(clip_model, rank, seed)
        elif tune == "prompt":
            self.extra = Prompts(clip_model, prompts, seed)
        for name, parameter in clip_model.named_parameters():
            parameter.requires_grad_(is_tuned(tune, name, parameter))
        self.clip = clip_model
        self.clip.tuned = True
        self.clip.pack_texts = True  # what is added works on single rows
        self.removals = [] if self.extra is None else self.extra.attach(clip_model)

    def detach(self):
        """Take what was added out of the CLIP, which then computes what it did before."""
        for remove in self.removals:
            remove()
        self.removals = []
        self.clip.pack_texts = None
        self.clip.tuned = self.extra is None  # trained itself, a CLIP is no longer what it was

    def train(self, mode=True):
        """Training mode is for the adapters' dropout alone: the batch statistics of a frozen ResNet stay."""
        super().train(mode)
        self.clip.eval()
        return self

    def encode_image(self, images):
        return self.clip.encode_image(images)

    def encode_text(self, tokens):
        return self.clip.encode_text(self.extra.extend(tokens) if self.prompts else tokens)

    def trained_parameters(self):
        """{name: parameter} of all that is trained."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def trained(self):
        """{name: tensor} of the trained weights, copied to the CPU: what a checkpoint holds."""
        return {name: p.detach().cpu().clone() for name, p in self.trained_parameters().items()}

    def load_trained(self, state):
        """The inverse of `trained`. Raises CheckpointError where names or shapes are not the model's."""
        trained_parameters = self.trained_parameters()
        shapes = {name: parameter.shape for name, parameter in trained_parameters.items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise clip.CheckpointError("the checkpoint's trained weights are not this model's; "
                                       "were --tune, --rank or --share others?")
        with torch.no_grad():
            for name, value in state.items():
                trained_parameters[name].copy_(value)


# ---------------------------------------------------------------- videos and texts

def as_videos(features, mask):
    """Features of frames (A, D), in order, as videos (N, V, D): zero where mask (N, V) has no frame."""
    videos = features.new_zeros(mask.numel(), features.shape[1])
    return videos.index_copy(0, mask.flatten().nonzero()[:, 0], features).view(*mask.shape, -1)


def similarity(texts, frames, mask, tau=TAU):
    """The query-aware similarity of texts and videos (section 3.3, equations 7 and 8), which has no weights.

        alpha_j = t . f_j
        v = sum over j of w_j f_j   with   w = softmax(alpha / tau)
        similarity = t . v / (|t| |v|)

    texts (C, D) and frames (N, V, D) are not of unit norm; mask (N, V) is True at frames. Returns (C, N) in
    -1..1; with one frame the plain cosine, with an infinite tau that of the text and the frames' mean (--pool
    mean, as the authors' code takes it). v differs for every text, (C, N, D), and is never made: with the
    products G = f f^T of a video's frames, (V, V), t . v = sum over j of w_j alpha_j and |v|^2 = w G w^T.
    """
    texts = texts.float()
    frames = frames.float()
    alpha = torch.einsum("cd,nvd->cnv", texts, frames)
    weights = (alpha / tau).masked_fill(~mask, -math.inf).softmax(-1)
    products = frames @ frames.transpose(1, 2)
    video_norm = torch.einsum("cnv,nvw,cnw->cn", weights, products, weights).clamp(min=1e-12).sqrt()
    text_norm = texts.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (weights * alpha).sum(-1) / (video_norm * text_norm)


def frame_temperature(settings):
    """tau of `similarity` for a run's settings; old checkpoints know neither --pool nor --tau."""
    if settings.get("pool") == "mean":
        return math.inf
    return settings.get("tau", TAU)


def total_loss(texts, frames, mask, scale, tau=TAU):
    """CLIP's symmetric cross-entropy, where text i belongs to video i. Shapes as in `similarity`.

    A video that is in a batch twice, with two of its captions, is its own negative, as in the authors' code.
    """
    logits = scale * similarity(texts, frames, mask, tau)  # (B, B): texts x videos
    target = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


# ---------------------------------------------------------------- evaluation

def video_loader(model, instances, args, batch_size, **options):
    """A data.Loader of at most --frames images of each instance and --context tokens of each text."""
    positions = model.config.context_length
    context = args.context or min(CONTEXT.get(args.data, 32), positions)
    tokenizer = model.tokenizer or clip.default_tokenizer()
    return data.Loader(instances, tokenizer, context, model.config.image_resolution, batch_size,
                       frames=args.frames, workers=args.workers, **options)


def evaluation_loader(model, instances, args):
    """All instances and captions in order; a batch holds about 256 frames."""
    return video_loader(model, instances, args, max(1, 256 // args.frames))


def embed(model, loader, amp):
    """-> frames (N, V, D), mask (N, V), texts (C, D), as the encoders give them."""
    was_training = model.training
    model.eval()
    features, masks = zip(*eval.encode_images(model, loader, amp))
    most = max(mask.shape[1] for mask in masks)
    mask = torch.cat([F.pad(mask, (0, most - mask.shape[1])) for mask in masks])
    texts = torch.cat(list(eval.encode_texts(model, loader, amp)))
    model.train(was_training)
    return as_videos(torch.cat(features), mask), mask, texts


def video_scores(frames, mask, texts, tau=TAU):
    """-> (text_scores, image_scores), as of `eval.cosine_scores`, by `similarity`.

    They are computed in blocks, because texts x videos x frames do not fit into memory.
    """
    texts_at_once = max(1, eval.BLOCK // mask.numel())
    videos_at_once = max(1, eval.BLOCK // (len(texts) * mask.shape[1]))

    def text_scores(numbers):
        blocks = numbers.split(texts_at_once)
        return torch.cat([similarity(texts[block], frames, mask, tau) for block in blocks])

    def image_scores(numbers):
        blocks = numbers.split(videos_at_once)
        return torch.cat([similarity(texts, frames[block], mask[block], tau).t() for block in blocks])
    return text_scores, image_scores


@torch.no_grad()
def video_metrics(frames, mask, texts, layout, tau=TAU):
    """`eval.both_ways` by `similarity`; layout is `eval.layout` of the instances."""
    return eval.score_metrics(*video_scores(frames, mask, texts, tau), **layout)


def embed_split(model, checkpoint, name, root, split, amp="auto", workers=0):
    """-> `eval.Embedded` of a split, with the scores of `similarity`, for eval.py.

    The model is the checkpoint's, or the CLIP that it belongs to. The features of unit norm beside the scores
    are the means over frames.
    """
    args = argparse.Namespace(**checkpoint["settings"] | {"workers": workers})
    instances, tasks = data.load(name, root, split)
    frames, mask, texts = embed(model, evaluation_loader(model, instances, args), amp)
    means = F.normalize((F.normalize(frames, dim=-1) * mask[..., None]).sum(1), dim=-1)
    scores = video_scores(frames, mask, texts, frame_temperature(checkpoint["settings"]))
    return eval.Embedded(instances, means, F.normalize(texts, dim=-1), tasks, scores=scores)


# ---------------------------------------------------------------- checkpoints

def clip_of(settings, folder):
    """The path or name of the CLIP that a run adapts. One that is pretrained here lies beside the run's
    folder, because other runs use it too."""
    if settings["clip"] not in clip.SCRATCH:
        return settings["clip"]
    parts = [settings[name] for name in ("clip", "pretrain_epochs", "image_size", "vocab_size", "seed")]
    file = "-".join(["clip", *(str(part) for part in parts if part is not None)]) + ".pt"
    return os.path.join(os.path.dirname(os.path.abspath(folder)), file)


def check_identity(checkpoint, identity, name, path):
    """Raise CheckpointError where a checkpoint was trained on another CLIP than `name`, of this identity."""
    expected = checkpoint["clip_identity"]
    if identity != expected:
        raise clip.CheckpointError(f"{path} belongs to the CLIP {expected[:12]}, and {name} is "
                                   f"{identity[:12]}; give the weights that it was trained on")


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py: its CLIP with what was trained."""
    settings = checkpoint["settings"]
    clip_path = clip_of(settings, os.path.dirname(path))
    clip_model, _ = clip.load(clip_path, "cpu", image_size=settings["image_size"], context_length=settings["context"])
    return onto(clip_model, checkpoint, path)


def onto(clip_model, checkpoint, path="the checkpoint"):
    """Put a checkpoint's trained weights onto a CLIP in memory -> Tuned.

    Several can follow each other on one CLIP, each after the former's `detach()`. --tune full, head and
    bitfit change the CLIP itself, so nothing can follow them. Raises CheckpointError for another CLIP.
    """
    settings = checkpoint["settings"]
    check_identity(checkpoint, clip.identity(clip_model), settings["clip"], path)
    tuned = Tuned(clip_model, settings["tune"], settings["rank"], settings["share"], settings["prompts"])
    try:
        tuned.load_trained(checkpoint["trained"])
    except clip.CheckpointError:
        tuned.detach()
        raise
    return tuned


# ---------------------------------------------------------------- the report

def peak_memory(device):
    """The most memory this process has held since `reset_peak_memory`, in GiB: of the GPU, or main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20


def reset_peak_memory(device):
    """Forget an earlier peak. Returns what is held now, in GiB, or None where the system does not tell (only
    Linux with glibc does)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return peak_memory(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is held free, such as pretraining's
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # sets VmHWM to what is held now
        return peak_memory(device)
    except (AttributeError, OSError, StopIteration):
        return None


def report(args, costs, device):
    """Evaluate best.pt on the test split, and the CLIP before tuning; the first process prints and writes
    them and the costs."""
    rank, _ = eval.processes()
    test = (args.data, args.root, "test", args.amp, args.workers)
    model, _, checkpoint = eval.restore(os.path.join(args.out, "best.pt"), device)
    tuned, _ = eval.evaluation(model, checkpoint, *test)
    clip_model = eval.load_clip(args, clip_of(vars(args), args.out), device)
    before, _ = eval.evaluation(clip_model, checkpoint, *test)
    if rank == 0:
        write_report(args, costs, tuned, before)
    eval.any_process(False, device)  # the others stay until the first is done


def write_report(args, costs, tuned, before):
    """Print and write the metrics on test after and before tuning, and the costs."""
    path = os.path.join(args.out, "metrics.json")
    eval.write_json(path, {"test": tuned, "test, not tuned": before})
    eval.write_json(os.path.join(args.out, "costs.json"), costs)
    rows = {"test model": tuned["model"], "not tuned": before["model"], "chance": tuned["chance"]}
    print(eval.table(rows))
    count = costs["trained_parameters"]
    line = f"--tune {args.tune}: {count:,} trained parameters ({100 * costs['share']:.2f}%)"
    if costs["seconds_per_step"]:
        line += f", {costs['seconds_per_step']:.3f} s per step"
    if costs["peak_memory_gib"]:
        line += f", {costs['peak_memory_gib']:.2f} GiB at most in a step"
    print(line)
    print(f"written to {path}")


# ---------------------------------------------------------------- a CLIP to adapt, where none is given

def pretrain(args, path, device):
    """Train a small CLIP on primitives-source with CLIP's own loss, and keep it as `path`."""
    instances, _ = data.load("primitives-source")
    tokenizer = clip.Tokenizer.train([caption for x in instances for caption in x.captions], args.vocab_size)
    model = clip.build(args.clip, tokenizer, args.seed, args.image_size).to(device).train()
    loader = data.Loader(instances, tokenizer, model.config.context_length, model.config.image_resolution,
                         batch_size=128, views=1, captions=1, train=True, seed=args.seed,
                         workers=args.workers)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    steps = args.pretrain_epochs * len(loader)
    progress = eval.Progress(steps)
    progress.line(f"{args.clip} starts from scratch: it is trained on {len(instances):,} shapes of "
                  f"primitives-source first, {steps:,} steps, and kept as {path}")
    for step, batch in enumerate(loader.batches(0, steps)):
        rise = min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = 1e-3 * rise * (1 + math.cos(math.pi * step / steps)) / 2
        batch = data.to_device(batch, device)
        with clip.autocast(args.amp, model):
            images = model.encode_image(batch["images"][:, 0])  # (B, D)
            texts = model.encode_text(batch["tokens"][:, 0])  # (B, D)
        images = F.normalize(images.float(), dim=-1)
        texts = F.normalize(texts.float(), dim=-1)
        loss = losses.clip_loss(images, texts, model.logit_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        progress.step(step + 1, len(images), loss=loss.item())
    clip.save_checkpoint(path, {"method": "train_mxm", "settings": {}, "clip": clip.describe(model),
                                "step": steps})


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    rank, world, device = eval.join(args)
    (train, _), (val, _), _ = eval.load_splits(args, device)
    path = clip_of(vars(args), args.out)
    with eval.first_process_first(device):
        if args.clip in clip.SCRATCH and not os.path.exists(path):
            config, _ = clip.MODELS[args.clip]
            check_tunable(config, args.tune, args.share, args.prompts)  # said before the work, not after
            pretrain(args, path, device)
    clip_model = eval.load_clip(args, path, device)
    identity = clip.identity(clip_model)
    total = sum(p.numel() for p in clip_model.parameters())
    model = Tuned(clip_model, args.tune, args.rank, args.share, args.prompts, args.seed, args.dropout)
    model.to(device)
    tau = frame_temperature(vars(args))
    if args.compile:
        clip.compile_blocks(clip_model)
    loader = video_loader(model, train, args, args.batch_size, pairs=True, train=True, seed=args.seed,
                          rank=rank, world=world, crop=args.crop)
    loaders = {"val": evaluation_loader(model, val, args)}  # of what is evaluated during training
    if args.train_metrics:
        loaders["train"] = evaluation_loader(model, train[:len(val)], args)
    parameters = list(model.trained_parameters().values())
    count = sum(p.numel() for p in parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]  # not decayed
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)

    def pack():  # the CLIP is not in a checkpoint, but which one it belongs to is
        return {"trained": model.trained(), "clip_identity": identity}

    def unpack(checkpoint):
        check_identity(checkpoint, identity, args.clip, f"--resume: {args.out}/last.pt")
        model.load_trained(checkpoint["trained"])

    run = eval.Run(args, "train_adapter", optimizer, steps, len(loader), pack, unpack)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances with {len(loader.caption_owner):,} captions, up to "
            f"{args.frames} frames; --tune {args.tune}: {count:,} trained parameters, "
            f"{100 * count / total:.2f}% of CLIP's {total:,}; {steps:,} steps on {device.type}")
    model.train()
    peak = reset_peak_memory(device)  # that of the steps: pretraining and evaluations are left out
    for step, batch in run.batches(loader):
        for part in optimizer.param_groups:
            part["lr"] = eval.warmup_cosine(step, steps, WARMUP, args.lr)
        data.seed_step(args.seed, step, rank)  # dropout
        batch = data.to_device(batch, device)
        mask = batch["image_mask"]  # (B, V)
        with clip.autocast(args.amp, clip_model):
            features = model.encode_image(batch["images"][mask]).float()  # (A, D): all frames of all videos
            texts = model.encode_text(batch["tokens"][:, 0]).float()  # (B, D)
        mask = F.pad(mask, (0, args.frames - mask.shape[1]))  # of one shape on all processes
        frames = losses.gather(as_videos(features, mask))
        mask = losses.gather(mask)
        texts = losses.gather(texts)
        loss = total_loss(texts, frames, mask, clip_model.logit_scale.exp(), tau)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        if run.log(loss, args.batch_size):
            if peak is not None:
                peak = max(peak, peak_memory(device))
            metrics = {}
            for split, watched in loaders.items():
                layout = eval.layout(watched.instances)
                metrics[split] = video_metrics(*embed(model, watched, args.amp), layout, tau)
            run.keep_best(metrics["val"]["rSum"], eval.recalls(metrics["val"]), **metrics)
            reset_peak_memory(device)
    costs = {"trained_parameters": count, "share": count / total,
             "seconds_per_step": run.seconds_per_step(),
             "peak_memory_gib": peak if run.seconds else None}
    report(args, costs, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
