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
code the initial weights, the schedule, and dropout of 0. Their rate of 1e-5 is for adapters and moments of
Adam in half precision, where the second moment underflows and steps become about a hundred times as long.
Here all is float32, and 1e-3 moves the adapters as far (and 1e-5 CLIP's own weights, for their 1e-7).
Ours are AdamW (the authors' Adam has no bias correction, and its cosine is counted from the first step, not
from the end of the warm-up), a gradient norm of 1 that acts on the whole gradient (theirs on a quarter of it,
with four processes), the rates of LoRA and for the built-in shapes, and these shapes as a task.

    python train_adapter.py                                                # shapes, from a small CLIP
    python train_adapter.py --data msrvtt --root path/to/msrvtt            # the paper's setting, ViT-B/32
    python train_adapter.py --data activitynet                             # its settings for paragraphs
    python train_adapter.py --data mine.jsonl --clip ViT-B/16 --tune lora  # your data, one of the baselines
    python train_adapter.py --tune full --pool mean                        # another, by the frames' mean
    torchrun --nproc_per_node=2 train_adapter.py                           # the same batch over two processes
    python train_adapter.py --resume                                       # go on where it stopped; same bits
"""
import copy
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=5, batch_size=128, weight_decay=0.2, rank=8, share=16, frames=12, context=32)
KINDS = {  # the paper's settings are those of MSR-VTT, but for three data sets; the last two have paragraphs
    "built-in shapes": PRETRAINED | dict(epochs=4, batch_size=32),
    "pretrained": PRETRAINED,
    "msvd": PRETRAINED | dict(rank=16),
    "didemo": PRETRAINED | dict(share=8, frames=64, context=64),
    "activitynet": PRETRAINED | dict(epochs=20, rank=16, share=512, frames=64, context=64),
}
RATES = {  # --tune: the peak learning rates for real data and for the built-in shapes
    "adapter": (1e-3, 1e-2),
    "adapter-unshared": (1e-3, 1e-2),
    "lora": (1e-3, 1e-2),
    "full": (1e-5, 3e-4),
}
WARMUP = 0.1  # share of the steps in which the learning rate rises
MAX_NORM = 1.0  # of the gradient
TAU = 5.0  # temperature of the softmax over a video's frames
LORA_ALPHA = 16.0  # LoRA's update is scaled by LORA_ALPHA / r


def settings(argv=None):
    p = eval.arguments(__doc__, __file__, KINDS, data="primitives-target")
    p.add_argument("--tune", default="adapter", choices=tuple(RATES),
                   help="what is trained: adapters, with or without shared weights; lora: low-rank updates "
                        "of queries and values; full: all of CLIP. --lr is 1e-3 by default (full: 1e-5), "
                        "for the built-in shapes 1e-2 (full: 3e-4)")
    p.add_argument("--rank", type=eval.positive_int, help="r: width of the bottleneck, or rank of lora")
    p.add_argument("--share", type=eval.non_negative_int,
                   help="d_s: output channels of the matrix that both encoders share")
    p.add_argument("--dropout", type=eval.fraction, default=0.0,
                   help="dropout after the adapters' non-linearity")
    p.add_argument("--frames", type=eval.positive_int,
                   help="frames of a video, or images of a thing, at most; evenly taken")
    p.add_argument("--pool", choices=("query", "mean"), default="query",
                   help="compare a text with the mean of a video's frames: query, weighted by how well each "
                        "fits the text; mean, the plain one")
    p.add_argument("--tau", type=eval.positive, default=TAU,
                   help="temperature of --pool query: the higher, the more evenly frames count")
    args = eval.parse(p, argv)
    if args.clip in clip.SCRATCH:
        p.error(f"--clip {args.clip} has random weights, nothing to adapt: give a pretrained CLIP, or "
                f"{eval.how_to_train_one(args)}")
    if args.lr is None:
        real, shapes = RATES[args.tune]
        args.lr = shapes if args.data.startswith("primitives") else real
    return args


# ---------------------------------------------------------------- what is put into CLIP

def branches(clip_model):
    """Yield (key, module, width) of the residual branches of a CLIP: image_0_attn, image_0_mlp, ...

    Raises CheckpointError where the image encoder is a ResNet, which has none.
    """
    config = clip_model.config
    clip.expect(config.vision_patch_size is not None, "--tune",
                "adapters and lora go into transformer blocks, and this CLIP's image encoder is a ResNet; "
                "give a ViT, or choose --tune full")
    encoders = (("image", clip_model.visual, config.vision_width),
                ("text", clip_model, config.transformer_width))
    for name, encoder, width in encoders:
        for i, block in enumerate(encoder.transformer.resblocks):
            yield f"{name}_{i}_attn", block.attn, width
            yield f"{name}_{i}_mlp", block.mlp, width


class Linear(nn.Linear):
    """A linear layer of an adapter: truncated normal with a deviation of 0.01, biases 0."""

    def reset_parameters(self):
        nn.init.trunc_normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class Adapters(nn.Module):
    """The adapters of both encoders: h + [z W_unique, z W_share] with z = QuickGELU(h W_down) (section 3.2).

    rank is r. shared_dim is d_s, from 0 up to the narrower encoder's width; W_share gives the last channels.
    Every layer has one W_share after attention and one after the MLP, for both encoders. Layers that only the
    deeper encoder has share with none. shared=False, a baseline: each encoder has W_shares of its own, which
    start as the shared ones do, so that both ways start as the same function. dropout acts on z (appendix B).
    """

    def __init__(self, clip_model, rank, shared_dim, shared=True, dropout=0.0):
        super().__init__()
        self.shared = shared
        self.dropout = nn.Dropout(dropout)
        self.down = nn.ModuleDict()
        self.unique = nn.ModuleDict()
        self.share = nn.ModuleDict()
        widths = {key: width for key, _, width in branches(clip_model)}
        narrower = min(widths.values())
        clip.expect(shared_dim <= narrower, f"--share {shared_dim}",
                    f"more than the narrower encoder's width; choose {narrower} or less")
        for key, width in widths.items():
            self.down[key] = Linear(width, rank)
            self.unique[key] = Linear(rank, width - shared_dim)
        start = {}  # {place: its W_share}, drawn last: the rest is the same for both values of `shared`
        for key in widths:
            _, place = key.split("_", 1)
            if place not in start:
                start[place] = Linear(rank, shared_dim)
            self.share[self.share_key(key)] = start[place] if shared else copy.deepcopy(start[place])

    def share_key(self, key):
        """The name of a place's W_share: without the encoder ("0_attn") where the encoders share it."""
        return key.split("_", 1)[1] if self.shared else key

    def forward(self, key, h):
        z = self.down[key](h)
        z = self.dropout(z * torch.sigmoid(1.702 * z))  # QuickGELU
        return h + torch.cat([self.unique[key](z), self.share[self.share_key(key)](z)], dim=-1)

    def attach(self, clip_model):
        """Insert the adapters into a CLIP."""
        for key, module, _ in branches(clip_model):
            def adapt(module, inputs, h, key=key):
                return self(key, h.transpose(0, -2)).transpose(0, -2)  # as it lies in memory
            module.register_forward_hook(adapt)


class LowRank(nn.Module):
    """LoRA's update of one attention layer's matrices of queries and of values: W + (LORA_ALPHA / r) B A.

    A (r, width) is normal with a deviation of width^-1/2 and B (width, r) is zero, so that nothing is changed
    at the start.
    """

    def __init__(self, width, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, rank, width) * width ** -0.5)  # of queries, of values
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

    def __init__(self, clip_model, rank):
        super().__init__()
        self.updates = nn.ModuleDict()
        for key, _, width in branches(clip_model):
            if key.endswith("attn"):
                self.updates[key] = LowRank(width, rank)

    def attach(self, clip_model):
        """Update the matrices of a CLIP."""
        for key, module, _ in branches(clip_model):
            if key in self.updates:  # unsafe: without a trial pass, since the two may be on two devices
                parametrize.register_parametrization(module, "in_proj_weight", self.updates[key], unsafe=True)


class Tuned(nn.Module):
    """A frozen CLIP and `extra`, which is trained on it; or with tune="full" a CLIP that is itself trained.

    It embeds images and texts as a CLIP does. CLIP's scale is always frozen. The arguments are those of the
    command line. Raises CheckpointError where the CLIP cannot be tuned so.
    """

    def __init__(self, clip_model, tune="adapter", rank=8, shared_dim=16, dropout=0.0, seed=0):
        super().__init__()
        self.config = clip_model.config
        self.tokenizer = clip_model.tokenizer
        clip_model.requires_grad_(tune == "full")
        clip_model.logit_scale.requires_grad_(False)
        if tune != "full":
            with torch.random.fork_rng(devices=[]):  # initial weights depend on the seed alone
                torch.default_generator.manual_seed(seed)
                if tune == "lora":
                    self.extra = LoRA(clip_model, rank)
                else:
                    self.extra = Adapters(clip_model, rank, shared_dim, tune == "adapter", dropout)
            self.extra.attach(clip_model)
            clip_model.pack_texts = True  # what is added works on single rows
        self.clip = clip_model

    def train(self, mode=True):
        """Training mode is for the adapters' dropout alone: the batch statistics of a ResNet stay."""
        super().train(mode)
        self.clip.eval()
        return self

    def encode_image(self, images):
        return self.clip.encode_image(images)

    def encode_text(self, tokens):
        return self.clip.encode_text(tokens)


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
    mean, a baseline). v differs for every text, (C, N, D), and is never made: with the products G = f f^T of
    a video's frames, (V, V), t . v = sum over j of w_j alpha_j and |v|^2 = w G w^T.
    """
    texts = texts.float()
    frames = frames.float()
    alpha = torch.einsum("cd,nvd->cnv", texts, frames)
    weights = (alpha / tau).masked_fill(~mask, -math.inf).softmax(-1)
    products = frames @ frames.transpose(1, 2)
    video_norm = torch.einsum("cnv,nvw,cnw->cn", weights, products, weights).clamp(min=1e-12).sqrt()
    text_norm = texts.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (weights * alpha).sum(-1) / (video_norm * text_norm)


def frame_temperature(pool, tau):
    """tau of `similarity` for --pool and --tau."""
    return math.inf if pool == "mean" else tau


def total_loss(texts, frames, mask, scale, tau=TAU):
    """CLIP's symmetric cross-entropy, where text i belongs to video i. Shapes as in `similarity`.

    A video that is in a batch twice, with two of its captions, is its own negative, as in the authors' code.
    """
    logits = scale * similarity(texts, frames, mask, tau)  # (B, B): texts x videos
    target = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    device = eval.join(args)
    rank, _ = eval.processes()
    (train, _), (val, _), _ = eval.load_splits(args)
    clip_model = eval.build_or_load(args, train, device)
    identity = clip.identity(clip_model)  # of the CLIP as it was, before anything is put into it
    total = sum(p.numel() for p in clip_model.parameters())
    model = Tuned(clip_model, args.tune, args.rank, args.share, args.dropout, args.seed)
    model.to(device).train()
    saved = {"clip": clip_model} if args.tune == "full" else {"heads": model, "frozen_clip": identity}
    tau = frame_temperature(args.pool, args.tau)
    loader = eval.training_loader(args, train, clip_model, pairs=True, frames=args.frames)
    val_loader = eval.evaluation_loader(clip_model, val, args.workers, frames=args.frames)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(eval.decayed_groups(trained, args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)
    run = eval.Run(args, optimizer, steps, len(loader), saved)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances with {len(loader.caption_owner):,} captions, up to "
            f"{args.frames} frames; --tune {args.tune}: {count:,} trained parameters, "
            f"{100 * count / total:.2f}% of CLIP's {total:,}; {steps:,} steps on {device.type}")
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
        eval.average_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        if run.log(loss, args.batch_size):
            metrics = video_metrics(*embed(model, val_loader, args.amp), eval.layout(val), tau)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    if run.first and run.seconds:  # no seconds: a finished run was asked to go on
        seconds = sorted(run.seconds)[len(run.seconds) // 2]  # the median
        eval.write_json(os.path.join(args.out, "costs.json"), {
            "trained_parameters": count, "share": count / total, "seconds_per_step": seconds})
        run.say(f"--tune {args.tune}: {seconds:.3f} s per step")
    eval.report(args, device, untuned=eval.load_clip(args, device))


# ---------------------------------------------------------------- evaluation

def restore(checkpoint):
    """The model of a checkpoint of this script, for eval.py: its CLIP with what was trained."""
    settings = checkpoint["settings"]
    if settings["tune"] == "full":
        return clip.from_description(checkpoint["clip"])
    model = Tuned(eval.frozen_clip(checkpoint), settings["tune"], settings["rank"], settings["share"])
    clip.load_heads(model, checkpoint["heads"])
    return model


def embed(model, loader, amp):
    """-> frames (N, V, D), mask (N, V), texts (C, D), as the encoders give them."""
    with eval.evaluating(model):
        features, masks = zip(*eval.encode_images(model, loader, amp))
        texts = torch.cat(list(eval.encode_texts(model, loader, amp)))
    most = max(mask.shape[1] for mask in masks)
    mask = torch.cat([F.pad(mask, (0, most - mask.shape[1])) for mask in masks])
    return as_videos(torch.cat(features), mask), mask, texts


def video_scores(frames, mask, texts, tau=TAU):
    """-> (text_scores, image_scores), as of `eval.cosine_scores`, by `similarity`.

    They are computed in blocks, because texts x videos x frames do not fit into memory.
    """
    texts_at_once = max(1, eval.BLOCK // mask.numel())
    videos_at_once = max(1, eval.BLOCK // (len(texts) * mask.shape[1]))

    def text_scores(indices):
        blocks = indices.split(texts_at_once)
        return torch.cat([similarity(texts[block], frames, mask, tau) for block in blocks])

    def image_scores(indices):
        blocks = indices.split(videos_at_once)
        return torch.cat([similarity(texts, frames[block], mask[block], tau).t() for block in blocks])
    return text_scores, image_scores


@torch.no_grad()
def video_metrics(frames, mask, texts, layout, tau=TAU):
    """`eval.score_metrics` by `similarity`; layout is `eval.layout` of the instances."""
    return eval.score_metrics(video_scores(frames, mask, texts, tau), **layout)


def embed_split(model, checkpoint, args):
    """-> `eval.Embedded` of a split, with the scores of `similarity`, for eval.py.

    The model is the checkpoint's, or the CLIP that it belongs to. The features of unit norm beside the scores
    are the means over frames.
    """
    settings = checkpoint["settings"]
    instances, tasks = data.load(args.data, args.root, args.split)
    loader = eval.evaluation_loader(model, instances, args.workers, frames=settings["frames"])
    frames, mask, texts = embed(model, loader, args.amp)
    means = F.normalize((F.normalize(frames, dim=-1) * mask[..., None]).sum(1), dim=-1)
    scores = video_scores(frames, mask, texts, frame_temperature(settings["pool"], settings["tau"]))
    return eval.Embedded(instances, means, F.normalize(texts, dim=-1), tasks, scores=scores)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
