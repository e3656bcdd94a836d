"""CMA-CLIP: cross-modality attention CLIP for image-text classification (arXiv 2112.03562).

A product has a picture, a title and several attributes to predict, and either modality may be irrelevant to an attribute or wrong.
CLIP's patch tokens and text tokens are joined into one sequence; *sequence-wise attention*, a transformer encoder over it, lets words
and patches look at each other. Each modality's summary comes out, and *modality-wise attention*, one per attribute (task), weighs
the two by how much they tell about it; a small MLP per task classifies the weighted sum.

    python train_cmaclip.py                                                   # built-in shapes: shape, colour, height and width at once
    python train_cmaclip.py --data products --root path/to/products --clip ViT-B/32
    python train_cmaclip.py --data mine.csv --tasks color,size --freeze --clip ViT-B/32       # only the attentions and MLPs are trained
    python train_cmaclip.py --fusion concat                                   # a baseline; also sequence, modality, image, text
    python train_cmaclip.py --train-noise-text 0.3 --robustness               # learn from wrong texts; test with wrong pictures and texts
    torchrun --nproc_per_node=2 train_cmaclip.py                              # the same batch over two processes
    python train_cmaclip.py --resume                                          # go on after an interruption, to the same bits
"""
import math
import os
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

SCRATCH = dict(epochs=12, batch_size=64, lr=1e-3, clip_lr=1e-3, weight_decay=0.05)  # a small CLIP with random weights
PRETRAINED = dict(epochs=20, batch_size=64, lr=1e-4, clip_lr=1e-5, weight_decay=0.05)  # a published CLIP, at a rate of its own
WARMUP, CLIP_GRADIENT, SAVE_SECONDS = 0.05, 1.0, 300  # share of steps; norm; last.pt is written after every epoch and this often
NOISE = (0.0, 0.25, 0.5, 1.0)  # shares of --robustness


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--tasks", help="comma-separated tasks to learn (default: all that the data has)")
    p.add_argument("--fusion", choices=("cma", "sequence", "modality", "concat", "image", "text"), default="cma",
                   help="cma: both attentions; sequence, modality: one of them; concat: neither; image, text: one modality")
    p.add_argument("--freeze", action="store_true", help="leave CLIP's weights as they are")
    p.add_argument("--clip-lr", type=eval.positive, help="peak learning rate of CLIP's own weights")
    p.add_argument("--width", type=eval.positive_int, help="of the joint sequence (default: CLIP's embedding)")
    p.add_argument("--layers", type=eval.positive_int, default=2, help="of the sequence-wise attention")
    p.add_argument("--heads", type=eval.positive_int, default=4)
    p.add_argument("--dropout", type=eval.share, default=0.1)
    for when, meaning in (("train-", "in training, anew at every step"), ("", "when testing")):
        for what in ("noise", "missing"):
            for kind in ("image", "text"):
                p.add_argument(f"--{when}{what}-{kind}", type=eval.share, default=0.0, metavar="SHARE",
                               help=f"share of {kind}s {'replaced with those of another instance' if what == 'noise' else 'left out'} {meaning}")
    p.add_argument("--robustness", action="store_true", help="also test with noise in a quarter, half and all of the images or texts")
    p.add_argument("--precision", type=eval.fraction, default=0.9, help="recall is also reported at this precision, reached on val")
    p.add_argument("--eval-every", type=eval.positive_int, help="epochs between evaluations on val (default: five in a run)")
    args = p.parse_args(argv)
    for name, value in (SCRATCH if args.clip in clip.SCRATCH else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.freeze and args.clip in clip.SCRATCH:
        p.error(f"--freeze: {args.clip} starts from random weights, which are worth nothing frozen; give --clip a pretrained one")
    args.eval_every = args.eval_every or max(1, args.epochs // 5)
    args.out = args.out or os.path.join("runs", f"cmaclip-{os.path.splitext(os.path.basename(args.data))[0]}")
    return args


# ---------------------------------------------------------------- the model

class CMACLIP(nn.Module):
    """Figure 2 of the paper, and with other fusions its parts and baselines.

    classes: {task: class names}. fusion: cma: both attentions. sequence: summaries of the sequence-wise attention, concatenated.
    modality: modality-wise attention over CLIP's own two features. concat: these features concatenated. image, text: one of them.
    """

    def __init__(self, clip_model, classes, fusion="cma", width=None, layers=2, heads=4, dropout=0.1, seed=0):
        super().__init__()
        D, W = clip_model.config.embed_dim, width or clip_model.config.embed_dim
        if W % heads:
            raise data.DataError(f"--heads {heads} does not divide the width {W}; choose --heads or --width so that it does")
        self.tasks, self.fusion = list(classes), fusion
        self.config, self.tokenizer, self.context_length = clip_model.config, clip_model.tokenizer, clip_model.context_length
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.project = nn.ModuleList([nn.Linear(D, W), nn.Linear(D, W)])  # image, text
            self.norm = nn.ModuleList([nn.LayerNorm(W), nn.LayerNorm(W)])  # of the two summaries
            if fusion in ("cma", "sequence"):
                patches = 1 + (self.config.image_resolution // (self.config.vision_patch_size or 32)) ** 2  # with the class token; a ResNet's stride is 32
                self.modality = nn.Parameter(0.02 * torch.randn(2, W))
                self.image_position = nn.Parameter(0.02 * torch.randn(patches, W))
                self.text_position = nn.Parameter(0.02 * torch.randn(self.context_length, W))
                self.layers = nn.ModuleList(nn.TransformerEncoderLayer(W, heads, 4 * W, dropout, "gelu", batch_first=True, norm_first=True) for _ in range(layers))
            if fusion in ("cma", "modality"):
                self.importance = nn.Parameter(torch.zeros(len(classes), W))  # w_task; at first both modalities weigh the same
            wide = 2 * W if fusion in ("sequence", "concat") else W
            self.classifiers = nn.ModuleList(nn.Sequential(nn.Linear(wide, W), nn.GELU(), nn.Dropout(dropout), nn.Linear(W, len(names)))
                                             for names in classes.values())
        self.clip = clip_model

    def train(self, mode=True):
        """A frozen CLIP stays in eval mode: BatchNorm would otherwise take up the statistics of every batch."""
        super().train(mode)
        self.clip.train(mode and any(p.requires_grad for p in self.clip.parameters()))
        return self

    def join(self, images, tokens, present):
        """One sequence of both modalities' tokens: images (B, 3, S, S), tokens (B, columns), present (B, 2) -> x (B, P + L, W), padding
        (B, P + L): True where nothing may look, keep (B, L): real text tokens."""
        _, image_tokens = self.clip.encode_image(images, tokens=True)  # (B, P, D), the class token first
        _, text_tokens, keep = self.clip.encode_text(tokens, tokens=True)  # (B, L, D), (B, L)
        P, L = image_tokens.shape[1], text_tokens.shape[1]
        image = self.project[0](image_tokens.float()) + self.modality[0] + self.image_position
        text = self.project[1](text_tokens.float()) + self.modality[1] + self.text_position[:L]
        see = torch.cat([present[:, :1].expand(-1, P), present[:, 1:] & keep], dim=1)
        return torch.cat([image, text], dim=1), ~see, keep

    def summaries(self, images, tokens, present):
        """u (B, 2, W): what the image and the text come to; of --fusion image or text both are that one."""
        if self.fusion in ("cma", "sequence"):
            x, padding, keep = self.join(images, tokens, present)
            for layer in self.layers:  # sequence-wise attention (section 3.1)
                x = layer(x, src_key_padding_mask=padding)
            end = len(self.image_position) + keep.sum(1) - 1
            image, text = x[:, 0], x.gather(1, end[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
        else:
            image = self.project[0](self.clip.encode_image(images).float()) if self.fusion != "text" else None
            text = self.project[1](self.clip.encode_text(tokens).float()) if self.fusion != "image" else image
            image = text if image is None else image
        return torch.stack([self.norm[0](image), self.norm[1](text)], dim=1) * present[..., None]

    def forward(self, images, tokens, present=None):
        """images (B, 3, S, S), tokens (B, columns); present bool (B, 2): which of image and text there is (None: both; never neither).
        -> ({task: logits (B, C)}, modality weights (B, tasks, 2) or None where the fusion has none)."""
        if present is None:
            present = torch.ones(len(images), 2, dtype=torch.bool, device=images.device)
        u, weights = self.summaries(images, tokens, present), None
        if self.fusion in ("cma", "modality"):  # modality-wise attention (section 3.2): softmax over {image, text} of u . w_task
            scores = torch.einsum("bmw,tw->btm", u, self.importance).masked_fill(~present[:, None, :], -math.inf)
            weights = scores.softmax(-1)
            features = torch.einsum("btm,bmw->tbw", weights, u)  # (tasks, B, W)
        else:
            one = {"image": u[:, 0], "text": u[:, 1]}.get(self.fusion, u.flatten(1))
            features = one.expand(len(self.tasks), *one.shape)
        return {task: mlp(x) for task, mlp, x in zip(self.tasks, self.classifiers, features)}, weights

    @torch.no_grad()
    def attention(self, images, tokens):
        """How much each text token looks at each patch in the last layer, mean over heads: (B, L, patches), rows sum to 1; keep (B, L)."""
        x, padding, keep = self.join(images, tokens, torch.ones(len(images), 2, dtype=torch.bool, device=images.device))
        for layer in self.layers[:-1]:
            x = layer(x, src_key_padding_mask=padding)
        x, P = self.layers[-1].norm1(x), len(self.image_position)
        weights = self.layers[-1].self_attn(x, x, x, key_padding_mask=padding, need_weights=True)[1][:, P:, 1:P]  # text rows, patch columns
        return weights / weights.sum(-1, keepdim=True), keep


def multitask_loss(logits, labels):
    """Sum over tasks of the mean cross-entropy of the labelled rows. logits {task: (B, C)}, labels {task: int64 (B,)}, -1: unlabelled."""
    total = 0.0
    for task, scores in logits.items():
        each = F.cross_entropy(scores.float(), labels[task], ignore_index=-1, reduction="sum")
        total = total + each / (labels[task] >= 0).sum().clamp(min=1)
    return total


# ---------------------------------------------------------------- data: pairs, noise

def choose_tasks(classes, asked, where, instances):
    """{task: class names} to learn. Those asked for must be fit to learn; of all others, what is not is left out with a remark."""
    chosen = asked.split(",") if asked else list(classes) or [None]
    out = {}
    for task in chosen:
        try:
            out[data.choose_task(classes, task, where, instances)] = classes.get(task)
        except data.DataError as e:
            if asked or not classes:
                raise
            data.note(f"{e}; left out")
    if not out:
        raise data.DataError(f"{where}: none of the tasks {', '.join(classes)} has two or more classes to learn")
    return out


def pairs(instances, own, classes):
    """One instance per caption, with one of the views: what is classified. Labels are renumbered from the data's classes `own` to the
    model's `classes`; what the model does not know is unlabelled."""
    number = {task: [classes[task].index(name) if name in classes[task] else -1 for name in own.get(task, [])] for task in classes}
    out = []
    for x in instances:
        labels = {task: number[task][x.labels[task]] if x.labels.get(task, -1) >= 0 else -1 for task in classes}
        out += [replace(x, images=[x.images[k % len(x.images)]], captions=[caption], labels=labels) for k, caption in enumerate(x.captions)]
    return out


def corrupted(pairs, noise=(0.0, 0.0), missing=(0.0, 0.0), seed=0):
    """-> (pairs, present bool (N, 2)): shares `noise` of (images, texts) replaced with those of another instance, shares `missing` of them
    left out (a text only where the image stays). Which ones depends on the seed; a larger share takes in those of a smaller one."""
    rng = np.random.default_rng([seed, len(pairs)])
    chance, source = rng.random((4, len(pairs))), rng.integers(len(pairs), size=(2, len(pairs)))
    if max(noise) > 0 and len({x.id for x in pairs}) < 2:
        raise data.DataError("noise takes pictures and texts of other instances, and there is one instance only")
    present = torch.from_numpy(chance[2:] >= np.array(missing)[:, None]).t().contiguous()
    present[:, 1] |= ~present[:, 0]

    def another(i, k):  # the drawn pair, or the next of another instance
        j = source[k, i]
        while pairs[j].id == pairs[i].id:
            j = (j + 1) % len(pairs)
        return pairs[j]
    out = [replace(x, images=another(i, 0).images if chance[0, i] < noise[0] else x.images,
                   captions=another(i, 1).captions if chance[1, i] < noise[1] else x.captions) for i, x in enumerate(pairs)]
    return out, present


def corrupt_batch(images, tokens, noise, missing):
    """The same of a training batch, drawn from torch's generator: the replacement comes from the batch. -> images, tokens, present (B, 2)."""
    B, device = len(images), images.device
    chance = torch.rand(4, B).to(device)
    rows = torch.arange(B, device=device)
    if B > 1:
        other = (rows + torch.randint(1, B, (2, B)).to(device)) % B  # never the row itself
        images = images[torch.where(chance[0] < noise[0], other[0], rows)]
        tokens = tokens[torch.where(chance[1] < noise[1], other[1], rows)]
    present = torch.stack([chance[2] >= missing[0], chance[3] >= missing[1]], dim=1)
    present[:, 1] |= ~present[:, 0]
    return images, tokens, present


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(model, pairs, tokenizer, amp="auto", workers=0, present=None, loader=None):
    """-> ({task: probabilities (N, C)}, {task: labels (N,)}, modality weights (N, tasks, 2) or None), float32 on the CPU."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    loader = loader or data.Loader(pairs, tokenizer, model.context_length, model.config.image_resolution, 256, workers=workers)
    logits, weights = [], []
    for batch in loader.batches():
        batch = data.to_device(batch, device)
        here = None if present is None else present[batch["index"].cpu()].to(device)
        with clip.autocast(amp, model.clip):
            out, w = model(batch["images"][:, 0], batch["tokens"][:, 0], here)
        logits.append(out)
        weights.append(w)
    model.train(was_training)
    probabilities = {task: torch.cat([part[task].float() for part in logits]).softmax(-1).cpu() for task in model.tasks}
    labels = {task: torch.tensor([x.labels[task] for x in pairs]) for task in model.tasks}
    return probabilities, labels, None if weights[0] is None else torch.cat(weights).float().cpu()


def scores(predicted, thresholds=None):
    """{task: eval.classification_metrics and the mean weight of the image in percent} of `predict`'s output; a task without labels is
    left out. "mean" holds the means over tasks."""
    probabilities, labels, weights = predicted
    out = {}
    for k, task in enumerate(probabilities):
        found = eval.classification_metrics(probabilities[task], labels[task], thresholds[task] if thresholds else None)
        if found:
            out[task] = found | ({"image_weight": 100 * weights[:, k, 0].mean().item()} if weights is not None else {})
    if not out:
        raise data.DataError("nothing to evaluate: no instance has a label of a task that the model knows")
    return out | {"mean": {name: float(np.mean([found[name] for found in out.values()])) for name in next(iter(out.values()))}}


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    s = checkpoint["settings"]
    model = CMACLIP(clip.load(path, "cpu")[0], checkpoint["classes"], s["fusion"], s["width"], s["layers"], s["heads"], s["dropout"])
    clip.load_heads(model, checkpoint["heads"])
    return model


def evaluation(model, checkpoint, name, root, split, amp="auto", workers=0):
    """-> ({"model", "majority": {task: metrics}, with --robustness "noise"}, table) of a split, under the run's test-time noise.
    majority: the share of the split's commonest class."""
    s, classes = checkpoint["settings"], checkpoint["classes"]
    tokenizer = model.tokenizer or clip.default_tokenizer()
    instances, own = data.load(name, root, split)
    clean = pairs(instances, own, classes)

    @lru_cache  # --robustness asks for clean data more than once
    def run(noise, missing):
        changed, present = corrupted(clean, noise, missing, s["seed"])
        return scores(predict(model, changed, tokenizer, amp, workers, present), checkpoint["thresholds"])

    found = run((s["noise_image"], s["noise_text"]), (s["missing_image"], s["missing_text"]))
    majority = {}
    for task in found:
        if task != "mean":
            counts = torch.bincount(torch.tensor([x.labels[task] for x in clean if x.labels[task] >= 0]))
            majority[task] = {"accuracy": 100 * counts.max().item() / counts.sum().item()}
    rows = {"model": found, "majority": majority}
    width, recall = max(map(len, found)), f"R@P{100 * s['precision']:.0f}"
    lines = [f"{split:{width}} {'classes':>8} {'majority':>9} {'accuracy':>9} {'macro F1':>9} {recall:>9} {'image weight':>13}"]
    for task, m in found.items():
        cells = [f"{len(classes[task]) if task in classes else '':>8}", f"{majority[task]['accuracy']:9.1f}" if task in majority else " " * 9]
        cells += [f"{m[key]:{wide}.1f}" if key in m else " " * wide for key, wide in (("accuracy", 9), ("macro_f1", 9), ("recall_at_precision", 9), ("image_weight", 13))]
        lines.append(f"{task:{width}} " + " ".join(cells))
    if s["robustness"]:
        rows["noise"] = {kind: {str(share): run((share, 0.0) if kind == "image" else (0.0, share), (0.0, 0.0)) for share in NOISE} for kind in ("image", "text")}
        for kind, runs in rows["noise"].items():
            lines.append(f"noise in {kind:5}: " + "   ".join(
                f"{100 * float(share):.0f}%: {m['mean']['accuracy']:.1f}" + (f" (image weight {m['mean']['image_weight']:.0f})" if "image_weight" in m["mean"] else "")
                for share, m in runs.items()))
    return rows, "\n".join(lines)


# ---------------------------------------------------------------- pictures, for eval.py

def draw_pairs(name, root, split, checkpoint, count):
    """A few pairs of different instances, drawn from the split."""
    instances, own = data.load(name, root, split)
    every = pairs(instances, own, checkpoint["classes"])
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def gallery(model, checkpoint, name, root, split, path):
    """Pairs of a split with what the model takes them for: right predictions framed green, wrong ones red, unlabelled ones grey."""
    chosen, classes = draw_pairs(name, root, split, checkpoint, 10), checkpoint["classes"]
    probabilities, labels, _ = predict(model, chosen, model.tokenizer or clip.default_tokenizer())
    rows = []
    for i, x in enumerate(chosen):
        results = [(x.captions[0], None)]
        for task in model.tasks:
            p, label = probabilities[task][i], int(labels[task][i])
            text = f"{task}: {classes[task][int(p.argmax())]} ({100 * p.max():.0f}%)" + (f", is {classes[task][label]}" if label not in (-1, int(p.argmax())) else "")
            results.append((text, None if label == -1 else int(p.argmax()) == label))
        rows.append((data.pixels(x.images[0], eval.CELL), results))
    eval.gallery_picture(path, rows)


def attention_picture(model, checkpoint, name, root, split, path):
    """Where each text token looks in the picture, and how much each task weighs image and text, for a few pairs of a split."""
    if model.fusion not in ("cma", "sequence", "modality"):
        raise clip.CheckpointError(f"--attention: --fusion {model.fusion} has no attention between the modalities; cma, sequence and modality do")
    chosen, tokenizer = draw_pairs(name, root, split, checkpoint, 6), model.tokenizer or clip.default_tokenizer()
    loader = data.Loader(chosen, tokenizer, model.context_length, model.config.image_resolution, len(chosen))
    batch = data.to_device(loader.make(0), next(model.parameters()).device)
    images, tokens = batch["images"][:, 0], batch["tokens"][:, 0]
    weights = model(images, tokens)[1]
    rows = []
    for i, x in enumerate(chosen):
        words, bars = [], []
        if model.fusion != "modality":
            maps, keep = model.attention(images[i:i + 1], tokens[i:i + 1])
            side = math.isqrt(maps.shape[2])
            words = [(tokenizer.decode([t]).strip(), m.view(side, side).cpu().numpy()) for t, m in list(zip(tokens[i].tolist(), maps[0]))[1:int(keep.sum()) - 1]]
        if weights is not None:
            bars = [(task, weights[i, k, 0].item()) for k, task in enumerate(model.tasks)]
        rows.append((data.pixels(x.images[0], eval.CELL), x.captions[0], words, bars))
    eval.attention_picture(path, rows)


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    rank, world, device = losses.join(args.device)
    first = rank == 0  # the only process that writes
    data.seed_everything(args.seed)
    if device.type == "cpu":
        clip.fast_float32()

    # data
    if args.download and first:
        data.load(args.data, args.root, "train", download=True)
    losses.any_process(False, device)  # the others wait for what the first fetches
    train, own = data.load(args.data, args.root, "train")
    classes = choose_tasks(own, args.tasks, args.data, train)
    val = pairs(*data.load(args.data, args.root, "val"), classes)
    test = pairs(*data.load(args.data, args.root, "test"), classes)  # needed at the end: what is missing is said before training, not after
    for split, part in (("val", val), ("test", test)):
        if not any(label >= 0 for x in part for label in x.labels.values()):
            raise data.DataError(f"{args.data}: no instance of split {split!r} has a label of {', '.join(classes)}; label some")

    # model
    if args.clip in clip.SCRATCH:
        tokenizer = clip.Tokenizer.train([c for x in train for c in x.captions], args.vocab_size)
        inner = clip.build(args.clip, tokenizer, args.seed, args.image_size)
    else:
        inner, _ = clip.load(args.clip, "cpu", image_size=args.image_size)
        tokenizer = inner.tokenizer or clip.default_tokenizer()
    model = CMACLIP(inner, classes, args.fusion, args.width, args.layers, args.heads, args.dropout, args.seed).to(device)
    inner.requires_grad_(not args.freeze)
    if args.compile:
        clip.compile_blocks(inner)
    loader = data.Loader(train, tokenizer, inner.context_length, inner.config.image_resolution, args.batch_size, 1, 1, train=True, seed=args.seed,
                         workers=args.workers, rank=rank, world=world)
    val_loader = data.Loader(val, tokenizer, inner.context_length, inner.config.image_resolution, 256, workers=args.workers)
    groups = []  # CLIP at its own rate; only matrices are decayed
    for prefix, peak in (("clip.", args.clip_lr), ("", args.lr)):
        part = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("clip.") == bool(prefix)]
        groups += [{"params": [p for p in part if p.ndim >= 2], "peak": peak, "weight_decay": args.weight_decay},
                   {"params": [p for p in part if p.ndim < 2], "peak": peak, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, fused=True)
    steps = args.epochs * len(loader)

    # run: everything that changes is in `state`, the weights and the optimizer, so that a resumed run ends with the same bits
    state, thresholds = {"step": 0, "best": -1.0, "loss_sum": 0.0}, None
    checkpoint = eval.open_run(args.out, vars(args), args.resume, first) if first or args.resume else None
    if checkpoint:
        inner.load_state_dict(checkpoint["clip"]["state_dict"])
        clip.load_heads(model, checkpoint["heads"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state, thresholds = checkpoint["state"], checkpoint["thresholds"]

    def save(name):
        clip.save_checkpoint(os.path.join(args.out, name), {
            "method": "train_cmaclip", "settings": vars(args), "classes": classes, "thresholds": thresholds, "heads": clip.describe_heads(model),
            "clip": clip.describe(inner), "optimizer": optimizer.state_dict(), "state": state, "step": state["step"]})

    def rate(step):  # linear warm-up, then half a cosine down to zero
        warm = max(1, int(WARMUP * steps))
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    if first and not checkpoint:
        save("last.pt")  # from here on there is one to resume from; and a disk that is full is found before any work

    stop, saved = eval.StopSignal(), time.time()
    progress = eval.Progress(steps, state["step"], quiet=not first)
    progress.line(f"{args.data}: {len(train):,} instances, {len(classes)} tasks ({', '.join(classes)}), fusion {args.fusion}; "
                  f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M trained parameters; {steps:,} steps on {device.type}")
    model.train()
    for batch in loader.batches(state["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(state["step"])
        data.seed_step(args.seed, state["step"], rank)  # noise and dropout
        batch = data.to_device(batch, device)
        images, tokens, present = corrupt_batch(batch["images"][:, 0], batch["tokens"][:, 0], (args.train_noise_image, args.train_noise_text),
                                                (args.train_missing_image, args.train_missing_text))
        with clip.autocast(args.amp, inner):
            logits, weights = model(images, tokens, present)
        logits = {task: losses.gather(scores.float()) for task, scores in logits.items()}
        loss = multitask_loss(logits, {task: losses.gather(batch["labels"][task]) for task in classes})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights take it up
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {norm.item()} at step {state['step']}; "
                             f"try a lower --lr or --amp off. {args.out}/last.pt is from before")
        optimizer.step()

        state["step"] += 1
        state["loss_sum"] += loss.item()
        progress.step(state["step"], args.batch_size, loss=loss.item())
        epoch, inside = divmod(state["step"], len(loader))
        if inside == 0 and first:
            record = {"step": state["step"], "epoch": epoch, "loss": state["loss_sum"] / len(loader)}
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                predicted = predict(model, val, tokenizer, args.amp, args.workers, loader=val_loader)
                metrics = scores(predicted)
                record["val"] = metrics
                progress.line(f"epoch {epoch}: loss {record['loss']:.3f}, val accuracy {metrics['mean']['accuracy']:.1f}, the mean of {len(metrics) - 1} tasks")
                if metrics["mean"]["accuracy"] > state["best"]:  # the model and its thresholds are chosen on val, never on test
                    state["best"] = metrics["mean"]["accuracy"]
                    thresholds = {task: eval.precision_thresholds(p, predicted[1][task], args.precision) for task, p in predicted[0].items()}
                    save("best.pt")
            eval.log_line(args.out, **record)
        if inside == 0:
            state["loss_sum"] = 0.0
        stopping = losses.any_process(stop.requested, device)  # asked once: a signal after this waits for the next step
        if first and (inside == 0 or time.time() - saved > SAVE_SECONDS or stopping):
            save("last.pt")
            saved = time.time()
        if stopping:
            progress.line(f"stopped at step {state['step']}; the same command with --resume goes on")
            raise SystemExit(130)

    if first:
        report(args, device)


def report(args, device):
    """Evaluate best.pt on the test split (primitives: also on configurations never seen in training), print and keep the table."""
    model, _, checkpoint = eval.restore(os.path.join(args.out, "best.pt"), device)
    results = {}
    for split in ("test", "unseen") if args.data == "primitives" else ("test",):
        checkpoint["settings"]["robustness"] = args.robustness and split == "test"
        results[split], text = evaluation(model, checkpoint, args.data, args.root, split, args.amp, args.workers)
        print(text)
    eval.write_json(os.path.join(args.out, "metrics.json"), results)
    print(f"written to {os.path.join(args.out, 'metrics.json')}")


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
