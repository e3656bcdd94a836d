"""CMA-CLIP: cross-modality attention CLIP for image-text classification (arXiv 2112.03562).

A product has a picture, a title and several attributes to predict (tasks), and either modality may tell
nothing about an attribute, or be wrong. CLIP's patch tokens p and text tokens t, projected to one width,
become one sequence; m and e are learned embeddings of the modality and of the position:

    x = [p_1 + m_image + e_1, ..., p_P + m_image + e_P,  t_1 + m_text + e'_1, ..., t_L + m_text + e'_L]

Sequence-wise attention is a transformer encoder over x, in which words and patches look at each other. In
each layer, with Q, K and V linear in LayerNorm(x) and d the width of a head:

    x <- x + softmax(Q K^T / sqrt(d)) V,   then   x <- x + MLP(LayerNorm(x))

What comes out at the class token is u_image, at the end token u_text. Modality-wise attention weighs the two,
for each task on its own, by how much they tell about it, and a small MLP classifies the weighted sum:

    e_m = u_m . w_(task, m),   m = image, text
    a_m = exp(e_m) / (exp(e_image) + exp(e_text))
    logits_task = MLP_task(a_image u_image + a_text u_text)
    loss = sum over tasks of the mean cross-entropy of logits_task, over the rows that have a label

In cma a_image is no longer a task's reliance on the picture: words and patches have mixed before, and u_image
holds what the words say, too. In --fusion modality, without sequence-wise attention, the two are apart.

Provenance. From the paper's abstract: the two attentions, modality-wise attention and an MLP for each task,
recall at one precision, and the question of robustness to noise. From notes of third parties: the keyless
attention e_m, with weights of their own for each modality. Ours: all else, so the sizes, the embeddings, the
sum of losses, the schedule and the kinds of noise. Neither the paper nor code of its authors was at hand.

    python train_cmaclip.py                            # built-in shapes: shape, colour, height and width
    python train_cmaclip.py --data products --root path/to/products --clip ViT-B/32
    python train_cmaclip.py --data mine.csv --tasks color,size --freeze --clip ViT-B/32  # CLIP stays as it is
    python train_cmaclip.py --fusion concat            # a baseline; also sequence, modality, image, text
    python train_cmaclip.py --train-noise-text 0.3 --robustness  # learn from wrong texts, test with noise
    python train_cmaclip.py --robustness --noise-kind foreign  # noise: random words and pixels
    torchrun --nproc_per_node=2 train_cmaclip.py       # the same batch over two processes
    python train_cmaclip.py --resume                   # go on where it stopped, to the same bits
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

SCRATCH = dict(epochs=12, batch_size=64, lr=1e-3, clip_lr=1e-3, weight_decay=0.05)  # random weights
PRETRAINED = dict(epochs=20, batch_size=64, lr=1e-4, clip_lr=1e-5, weight_decay=0.05)  # a published CLIP
WARMUP = 0.05  # share of the steps in which the learning rates rise
MAX_NORM = 1.0  # of the gradient
NOISE = (0.0, 0.25, 0.5, 1.0)  # shares of the images, or of the texts, that --robustness replaces


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--tasks", help="comma-separated tasks to learn (default: all that the data has)")
    p.add_argument("--fusion", choices=("cma", "sequence", "modality", "concat", "image", "text"),
                   default="cma", help="cma: both attentions; sequence, modality: one of them; "
                                       "concat: neither; image, text: one modality")
    p.add_argument("--freeze", action="store_true", help="leave CLIP's weights as they are")
    p.add_argument("--clip-lr", type=eval.positive, help="peak learning rate of CLIP's own weights")
    p.add_argument("--width", type=eval.positive_int, help="of the joint sequence (default: CLIP's own)")
    p.add_argument("--layers", type=eval.positive_int, default=2, help="of the sequence-wise attention")
    p.add_argument("--heads", type=eval.positive_int, default=4, help="of the sequence-wise attention")
    p.add_argument("--dropout", type=eval.fraction, default=0.1)
    for prefix, when in (("train-", "in training, drawn anew at every step"), ("", "when testing")):
        for kind in ("image", "text"):
            p.add_argument(f"--{prefix}noise-{kind}", type=eval.fraction, default=0.0, metavar="SHARE",
                           help=f"share of {kind}s replaced as --noise-kind says {when}")
            p.add_argument(f"--{prefix}missing-{kind}", type=eval.fraction, default=0.0, metavar="SHARE",
                           help=f"share of {kind}s left out {when}")
    p.add_argument("--noise-kind", choices=("swap", "foreign"), default="swap",
                   help="what replaces. swap: another instance's, in training one of the same batch and "
                        "process; foreign: another data set's, or random pixels and words of the captions")
    p.add_argument("--noise-data", help="the data set of --noise-kind foreign: a name or a file")
    p.add_argument("--noise-root", help="its folder (default data/<name>)")
    p.add_argument("--robustness", action="store_true",
                   help="also test with noise in a quarter, half and all of the images or of the texts")
    p.add_argument("--precision", type=eval.positive_fraction, default=0.9,
                   help="recall is also reported at this precision, reached on val")
    args = eval.parse(p, argv)
    if args.freeze and args.clip in clip.SCRATCH:
        p.error(f"--freeze: {args.clip} starts from random weights, which are worth nothing frozen; "
                "give --clip a pretrained one")
    if (args.noise_data or args.noise_root) and args.noise_kind == "swap":
        p.error("--noise-data, --noise-root: only --noise-kind foreign takes noise from other data")
    return eval.complete(args, "cmaclip", SCRATCH if args.clip in clip.SCRATCH else PRETRAINED)


# ---------------------------------------------------------------- the model and its loss

class CMACLIP(nn.Module):
    """CLIP with sequence-wise and modality-wise attention, or a baseline that leaves some of it out.

    clip_model: a CLIP.
    classes: {task: names of its classes}.
    fusion: cma: both attentions. sequence: the summaries of the sequence-wise attention, concatenated.
        modality: modality-wise attention over CLIP's own two features. concat: these features, concatenated.
        image, text: one of these features.
    width: W, of the joint sequence and the summaries; None: that of CLIP's embedding.
    layers, heads: of the sequence-wise attention. Raises DataError where heads does not divide the width.
    dropout: in the sequence-wise attention and the classifiers.
    seed: of the random weights.
    """

    def __init__(self, clip_model, classes, fusion="cma", width=None, layers=2, heads=4, dropout=0.1, seed=0):
        super().__init__()
        D = clip_model.config.embed_dim
        W = width or D
        if W % heads:
            raise data.DataError(f"--heads {heads} does not divide the width {W}; "
                                 "choose --heads or --width so that it does")
        self.tasks = list(classes)
        self.fusion = fusion
        self.sequence_wise = fusion in ("cma", "sequence")
        self.modality_wise = fusion in ("cma", "modality")
        self.config = clip_model.config
        self.tokenizer = clip_model.tokenizer
        with torch.random.fork_rng(devices=[]):  # the weights depend on the seed alone
            torch.default_generator.manual_seed(seed)
            self.project = nn.ModuleList([nn.Linear(D, W), nn.Linear(D, W)])  # of the image, of the text
            self.norm = nn.ModuleList([nn.LayerNorm(W), nn.LayerNorm(W)])  # of u_image, of u_text
            if self.sequence_wise:
                patch_size = self.config.vision_patch_size or 32  # a ResNet's stride is 32
                patches = (self.config.image_resolution // patch_size) ** 2
                self.modality = nn.Parameter(0.02 * torch.randn(2, W))  # m
                self.image_position = nn.Parameter(0.02 * torch.randn(1 + patches, W))  # e, class token first
                self.text_position = nn.Parameter(0.02 * torch.randn(self.config.context_length, W))  # e'
                self.layers = nn.ModuleList(
                    nn.TransformerEncoderLayer(W, heads, 4 * W, dropout, "gelu",
                                               batch_first=True, norm_first=True) for _ in range(layers))
            if self.modality_wise:
                self.importance = nn.Parameter(torch.zeros(len(classes), 2, W))  # w; at first a_m = 1/2
            in_width = 2 * W if fusion in ("sequence", "concat") else W
            self.classifiers = nn.ModuleList(
                nn.Sequential(nn.Linear(in_width, W), nn.GELU(), nn.Dropout(dropout),
                              nn.Linear(W, len(names))) for names in classes.values())
        self.clip = clip_model

    def train(self, mode=True):
        """A frozen CLIP stays in eval mode: BatchNorm would otherwise take up every batch's statistics."""
        super().train(mode)
        self.clip.train(mode and any(p.requires_grad for p in self.clip.parameters()))
        return self

    def sequence(self, images, tokens, present):
        """Both modalities' tokens as one sequence, as it enters the first layer. Arguments as in `forward`.

        -> x (B, P + L, W): P image tokens, the class token first, then L text tokens;
           hidden bool (B, P + L): what no token may look at, which is padding and a missing modality;
           mask bool (B, L): the text tokens that are no padding.
        """
        _, image_tokens = self.clip.encode_image(images, tokens=True)  # (B, P, D)
        _, text_tokens, mask = self.clip.encode_text(tokens, tokens=True)  # (B, L, D), (B, L)
        P = image_tokens.shape[1]
        L = text_tokens.shape[1]
        image = self.project[0](image_tokens.float()) + self.modality[0] + self.image_position
        text = self.project[1](text_tokens.float()) + self.modality[1] + self.text_position[:L]
        visible = torch.cat([present[:, :1].expand(-1, P), present[:, 1:] & mask], dim=1)
        return torch.cat([image, text], dim=1), ~visible, mask

    def summaries(self, images, tokens, present):
        """-> (B, 2, W): u_image and u_text, zero where one is missing. Arguments as in `forward`."""
        if self.sequence_wise:
            x, hidden, mask = self.sequence(images, tokens, present)
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=hidden)
            end = len(self.image_position) + mask.sum(1) - 1  # (B,): the place of each text's end token
            image = x[:, 0]
            text = x[torch.arange(len(x), device=x.device), end]
        elif self.fusion == "image":
            image = text = self.project[0](self.clip.encode_image(images).float())  # u_text will not be used
        elif self.fusion == "text":
            image = text = self.project[1](self.clip.encode_text(tokens).float())  # u_image will not be used
        else:
            image = self.project[0](self.clip.encode_image(images).float())
            text = self.project[1](self.clip.encode_text(tokens).float())
        return torch.stack([self.norm[0](image), self.norm[1](text)], dim=1) * present[..., None]

    def forward(self, images, tokens, present=None):
        """Classify images (B, 3, S, S) with texts, of which tokens (B, columns) are the ids.

        present: bool (B, 2), which of image and text there is; at least one of them. None: both.
        -> ({task: logits (B, C)}, the weights a (B, tasks, 2), or None where the fusion has none).
        """
        if present is None:
            present = torch.ones(len(images), 2, dtype=torch.bool, device=images.device)
        u = self.summaries(images, tokens, present)
        weights = None
        if self.modality_wise:
            relevance = torch.einsum("bmw,tmw->btm", u, self.importance)  # e_m = u_m . w_(task, m)
            weights = relevance.masked_fill(~present[:, None, :], -math.inf).softmax(-1)
            features = torch.einsum("btm,bmw->tbw", weights, u)
        elif self.fusion == "image":
            features = u[:, 0].expand(len(self.tasks), -1, -1)  # the same for every task
        elif self.fusion == "text":
            features = u[:, 1].expand(len(self.tasks), -1, -1)
        else:
            features = u.flatten(1).expand(len(self.tasks), -1, -1)  # one beside the other
        logits = {}
        for task, classifier, feature in zip(self.tasks, self.classifiers, features):
            logits[task] = classifier(feature)
        return logits, weights

    @torch.no_grad()
    def attention(self, images, tokens):
        """How much each text token looks at each patch in the last layer, as the mean over its heads.

        -> (maps (B, L, patches), whose rows sum to 1; mask bool (B, L): the text tokens that are no padding).
        """
        both = torch.ones(len(images), 2, dtype=torch.bool, device=images.device)
        x, hidden, mask = self.sequence(images, tokens, both)
        for layer in self.layers[:-1]:
            x = layer(x, src_key_padding_mask=hidden)
        last = self.layers[-1]
        x = last.norm1(x)
        _, weights = last.self_attn(x, x, x, key_padding_mask=hidden, need_weights=True)  # (B, P + L, P + L)
        P = len(self.image_position)
        maps = weights[:, P:, 1:P]  # from text tokens to patches; the class token is none
        return maps / maps.sum(-1, keepdim=True), mask


def multitask_loss(logits, labels):
    """The sum over tasks of the mean cross-entropy over the rows that have a label; zero where none has one.

    logits {task: (B, C)}, labels {task: int64 (B,)}, -1 where there is none.
    """
    total = 0.0
    for task in logits:
        summed = F.cross_entropy(logits[task].float(), labels[task], ignore_index=-1, reduction="sum")
        labelled = (labels[task] >= 0).sum()
        total = total + summed / labelled.clamp(min=1)
    return total


# ---------------------------------------------------------------- tasks, pairs, and their corruption

def choose_tasks(classes, asked, where, instances):
    """{task: names of its classes} to learn: what --tasks asked for, or all tasks of the training data.

    Raises DataError for an asked task that is not fit to learn, and where no task is. What was not asked for
    and is not fit is left out with a remark.
    """
    chosen = {}
    tasks = asked.split(",") if asked else list(classes)
    for task in tasks or [None]:  # None: data without labels, which choose_task refuses
        try:
            data.choose_task(classes, task, where, instances)
            chosen[task] = classes[task]
        except data.DataError as e:
            if asked or not classes:
                raise
            data.note(f"{e}; left out")
    data.expect(chosen, where, f"none of the tasks {', '.join(classes)} has two or more classes to learn")
    return chosen


def pairs(instances, data_classes, classes):
    """One instance for each caption, with one of the images: what is classified.

    A label is the number of a class; the data's numbers become those of the model's `classes`, by name: -1
    where there is no label or the model does not know its class.
    """
    number = {(task, name): c for task, names in classes.items() for c, name in enumerate(names)}
    out = []
    for x in instances:
        labels = dict.fromkeys(classes, -1)
        for task in classes:
            if x.labels.get(task, -1) >= 0:
                labels[task] = number.get((task, data_classes[task][x.labels[task]]), -1)
        for k, caption in enumerate(x.captions):
            image = x.images[k % len(x.images)]
            out.append(replace(x, images=[image], captions=[caption], labels=labels))
    return out


def another(pairs, start, x):
    """The first of the pairs, from number `start` on and around, that is of another instance than x."""
    while pairs[start].id == x.id:
        start = (start + 1) % len(pairs)
    return pairs[start]


def by_kind(kind, noise):
    """-> (shares to swap, shares to make foreign) of the shares of images and of texts that are replaced."""
    none = (0.0, 0.0)
    return (noise, none) if kind == "swap" else (none, noise)


def corrupt_pairs(pairs, noise=(0.0, 0.0), missing=(0.0, 0.0), seed=0):
    """Corrupt a split for testing -> (pairs, present bool (N, 2): which of image and text there is).

    noise: the shares of images and of texts that are swapped for those of another instance.
    missing: the shares that are left out; a text only where its image stays.
    seed: decides which. A larger share takes in those of a smaller one.

    Raises DataError for noise where there is no other instance.
    """
    if max(noise) > 0 and len({x.id for x in pairs}) < 2:
        raise data.DataError("noise takes images and texts of other instances; there is one instance only")
    rng = np.random.default_rng([seed, len(pairs)])
    image_noise, text_noise, image_missing, text_missing = rng.random((4, len(pairs)))
    image_source, text_source = rng.integers(len(pairs), size=(2, len(pairs)))
    out = []
    for i, x in enumerate(pairs):
        if image_noise[i] < noise[0]:
            x = replace(x, images=another(pairs, image_source[i], x).images)
        if text_noise[i] < noise[1]:
            x = replace(x, captions=another(pairs, text_source[i], x).captions)
        out.append(x)
    image_there = torch.from_numpy(image_missing >= missing[0])
    text_there = torch.from_numpy(text_missing >= missing[1]) | ~image_there
    return out, torch.stack([image_there, text_there], dim=1)


def corrupt_batch(images, tokens, noise, missing):
    """The same for a training batch, from torch's generator; a replacement is another row of the batch.

    images (B, 3, S, S), tokens (B, columns) -> images, tokens, present bool (B, 2).
    """
    B = len(images)
    image_noise, text_noise, image_missing, text_missing = torch.rand(4, B)
    if B > 1:
        rows = torch.arange(B)
        shift = torch.randint(1, B, (2, B))  # less than B: never to the row itself
        image_source, text_source = (rows + shift) % B
        images = images[torch.where(image_noise < noise[0], image_source, rows)]
        tokens = tokens[torch.where(text_noise < noise[1], text_source, rows)]
    image_there = image_missing >= missing[0]
    text_there = (text_missing >= missing[1]) | ~image_there
    return images, tokens, torch.stack([image_there, text_there], dim=1).to(images.device)


def foreign_pool(name, root, split, tokenizer, config):
    """A Loader of single pairs of another data set, for ForeignLoader; None without a name."""
    if name is None:
        return None
    foreign = pairs(data.load(name, root, split)[0], {}, {})
    return data.Loader(foreign, tokenizer, config.context_length, config.image_resolution, batch_size=1)


def caption_words(instances, tokenizer):
    """Each word of the captions once, as the list of its tokens: what random texts consist of."""
    words = {word for x in instances for caption in x.captions for word in caption.split()}
    return [ids for ids in map(tokenizer.encode, sorted(words)) if ids]


@dataclass(eq=False, repr=False)
class ForeignLoader(data.Loader):
    """A Loader of one image and one text of each instance, of which shares are foreign to the data.

    What replaces them is drawn from (seed, step, row of the batch over all processes), so that any number of
    workers and processes makes the same batches. A larger share takes in the rows of a smaller one.
    """
    noise: tuple = (0.0, 0.0)  # the shares of images and of texts that are replaced
    pool: data.Loader = None  # of single pairs: where they come from; None: random pixels and words
    words: list = None  # of `caption_words`, where there is no pool

    def make(self, step):
        batch = super().make(step)
        first = self.rank * self.batch_size // self.world
        for b in range(len(batch["index"])):
            for side, kind in enumerate(("images", "tokens")):
                row = batch[kind][b, 0]  # (3, S, S) or (context_length,)
                rng = np.random.default_rng([self.seed, step, first + b, 1 + side])
                if rng.random() >= self.noise[side]:
                    continue
                if self.pool is not None:
                    row[:] = self.pool.make(int(rng.integers(len(self.pool))))[kind][0, 0]
                elif kind == "images":
                    row[:] = torch.from_numpy(rng.integers(256, size=row.shape, dtype=np.uint8))
                else:
                    length = int(row.argmax()) - 1  # without start and end; the end's id is the largest
                    drawn = rng.integers(len(self.words), size=length)
                    ids = [id for k in drawn for id in self.words[k]]
                    row[1:length + 1] = torch.tensor(ids[:length])
        return batch


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(model, loader, amp="auto", present=None):
    """What the model says of the N pairs of an evaluation loader; present: bool (N, 2) as in `forward`.

    -> ({task: probabilities (N, C)}, {task: labels (N,)}, weights (N, tasks, 2) or None), all on the CPU.
    """
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    logits = {task: [] for task in model.tasks}
    labels = {task: [] for task in model.tasks}
    weights = []

    def encode(batch):
        there = None if present is None else present[batch["index"]].to(device)
        batch = data.to_device(batch, device)
        with clip.autocast(amp, model.clip):
            batch_logits, batch_weights = model(batch["images"][:, 0], batch["tokens"][:, 0], there)
        return batch_logits, batch["labels"], batch_weights

    for batch_logits, batch_labels, batch_weights in eval.in_turns(encode, loader, device):
        for task in model.tasks:
            logits[task].append(batch_logits[task].float())
            labels[task].append(batch_labels[task])
        weights.append(batch_weights)
    model.train(was_training)
    probabilities = {task: torch.cat(parts).softmax(-1).cpu() for task, parts in logits.items()}
    labels = {task: torch.cat(parts).cpu() for task, parts in labels.items()}
    weights = torch.cat(weights).float().cpu() if model.modality_wise else None
    return probabilities, labels, weights


def named_tasks(instances):
    """For each of the `pairs` the tasks whose attribute its caption names; known of the built-in shapes only,
    else None."""
    if not isinstance(instances[0].images[0], data.PrimitiveView):
        return None
    named = []
    for x in instances:
        for k in range(len(x.captions)):
            _, stated = data.primitive_caption(x.images[0].number, x.images[0].sample, k)
            named.append([list(data.TASKS)[i] for i in stated])
    return named


def scores(probabilities, labels, weights, thresholds=None, named=None):
    """{task: metrics} of what `predict` returns, and "mean": the mean of eval.py's metrics over the tasks.

    metrics: those of `eval.classification_metrics`; image_weight, the mean of a_image in percent; where
    `named_tasks` is given also image_weight_named and image_weight_unnamed, over the pairs whose caption
    names the task's attribute and over the others.
    thresholds: {task: (C,)}, for recall at a precision.

    A task that no row has a label of is left out. Raises DataError where that is every task.
    """
    out = {}
    for task in probabilities:
        limits = thresholds[task] if thresholds else None
        metrics = eval.classification_metrics(probabilities[task], labels[task], limits)
        if metrics:
            out[task] = metrics
    data.expect(out, "nothing to evaluate", "no instance has a label of a task that the model knows")
    mean = {}
    for name in next(iter(out.values())):  # the same for every task
        mean[name] = float(np.mean([out[task][name] for task in out]))
    for k, task in enumerate(probabilities):
        if weights is None or task not in out:
            continue
        out[task]["image_weight"] = 100 * weights[:, k, 0].mean().item()
        if named:
            names_it = torch.tensor([task in tasks for tasks in named])
            out[task]["image_weight_named"] = 100 * weights[names_it, k, 0].mean().item()
            out[task]["image_weight_unnamed"] = 100 * weights[~names_it, k, 0].mean().item()
    return out | {"mean": mean}


def table(split, rows, classes, precision, fusion):
    """The rows of `evaluation` as text: a line for each task, for their mean, and for each kind of noise."""
    titles = {"accuracy": "accuracy", "macro_f1": "macro F1",
              "recall_at_precision": f"R@P{100 * precision:.0f}".rjust(8), "image_weight": "image weight",
              "image_weight_named": "named", "image_weight_unnamed": "not named"}
    reached = next(iter(rows["model"].values()))  # of the first task
    titles = {name: title for name, title in titles.items() if name in reached}
    width = max(map(len, rows["model"]))
    lines = ["  ".join([split.ljust(width), "classes", "majority", *titles.values()])]
    for task, metrics in rows["model"].items():
        cells = [" " * len("classes"), " " * len("majority")]  # the mean has none
        if task in rows["majority"]:
            cells = [f"{len(classes[task]):7}", f"{rows['majority'][task]['accuracy']:8.1f}"]
        for name, title in titles.items():
            cells.append(f"{metrics[name]:{len(title)}.1f}" if name in metrics else "")
        lines.append("  ".join([task.ljust(width), *cells]).rstrip())
    for kind, study in rows.get("noise", {}).items():
        cells = []
        for share, metrics in study.items():
            cells.append(f"{100 * float(share):.0f}%: {metrics['mean']['accuracy']:.1f}")
        lines.append(f"noise in {kind:5}: " + "   ".join(cells))
    if "image_weight_named" in titles:
        lines.append("named, not named: image weight where the caption names the attribute, and elsewhere")
    if "image_weight" in titles and fusion == "cma":
        lines.append("image weight: in cma both summaries have seen image and text, so this is not how far a "
                     "task relies on the picture")
    return "\n".join(lines)


# ---------------------------------------------------------------- what eval.py calls

def restore(checkpoint, path):
    """The model of a checkpoint of this script."""
    s = checkpoint["settings"]
    model = CMACLIP(clip.load(path, "cpu")[0], checkpoint["classes"], s["fusion"], s["width"], s["layers"],
                    s["heads"], s["dropout"])
    clip.load_heads(model, checkpoint["heads"])
    return model


def evaluation(model, checkpoint, name, root, split, amp="auto", workers=0, gallery=None):
    """What the model reaches on a split under the run's test-time noise -> (rows, the text of a table).

    rows: "model": what `scores` returns.
          "majority": {task: the accuracy of always naming the commonest class}.
          "noise", with --robustness and not on `unseen`: {"image", "text": {share replaced: scores}}.
    gallery: a path for a picture of pairs and what the model takes them for.
    """
    s = checkpoint["settings"]
    classes = checkpoint["classes"]
    tokenizer = model.tokenizer or clip.default_tokenizer()
    instances, data_classes = data.load(name, root, split)
    clean = pairs(instances, data_classes, classes)
    pool = foreign_pool(s["noise_data"], s["noise_root"], "test", tokenizer, model.config)

    @lru_cache  # the study asks for clean pairs more than once
    def reached(noise, missing):
        swapped, foreign = by_kind(s["noise_kind"], noise)
        corrupted, present = corrupt_pairs(clean, swapped, missing, s["seed"])
        loader = ForeignLoader(corrupted, tokenizer, model.config.context_length,
                               model.config.image_resolution, 256, seed=s["seed"], workers=workers,
                               noise=foreign, pool=pool, words=checkpoint["words"])
        named = None if noise[1] or missing[1] else named_tasks(instances)  # of the instances' own captions
        return scores(*predict(model, loader, amp, present), checkpoint["thresholds"], named)

    metrics = reached((s["noise_image"], s["noise_text"]), (s["missing_image"], s["missing_text"]))
    rows = {"model": metrics, "majority": {}}
    for task in metrics:
        if task != "mean":
            counts = torch.bincount(torch.tensor([x.labels[task] for x in clean if x.labels[task] >= 0]))
            rows["majority"][task] = {"accuracy": 100 * counts.max().item() / counts.sum().item()}
    if s["robustness"] and split != "unseen":
        rows["noise"] = {"image": {str(share): reached((share, 0.0), (0.0, 0.0)) for share in NOISE},
                         "text": {str(share): reached((0.0, share), (0.0, 0.0)) for share in NOISE}}
    if gallery:
        draw_gallery(gallery, model, drawn(clean, 10), tokenizer, classes, amp)
    return rows, table(split, rows, classes, s["precision"], s["fusion"])


def drawn(pairs, count):
    """A few pairs at random, the same ones every time."""
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:count]]


def draw_gallery(path, model, chosen, tokenizer, classes, amp):
    """Draw pairs with what the model takes them for, framed green where right, red where wrong."""
    probabilities, labels, _ = predict(model, eval.evaluation_loader(model, chosen, tokenizer), amp)
    rows = []
    for i, x in enumerate(chosen):
        results = [(x.captions[0], None)]
        for task in model.tasks:
            best = int(probabilities[task][i].argmax())
            label = int(labels[task][i])
            text = f"{task}: {classes[task][best]} ({100 * probabilities[task][i, best]:.0f}%)"
            if label not in (-1, best):
                text += f", is {classes[task][label]}"
            results.append((text, None if label == -1 else best == label))
        rows.append((data.pixels(x.images[0], eval.CELL), results))
    eval.gallery_picture(path, rows)


def attention_picture(model, checkpoint, name, root, split, path):
    """Draw where each word of a few pairs looks in the picture, and how each task weighs image and text."""
    if not (model.sequence_wise or model.modality_wise):
        raise clip.CheckpointError(f"--attention: --fusion {model.fusion} has no attention between the "
                                   "modalities; cma, sequence and modality do")
    tokenizer = model.tokenizer or clip.default_tokenizer()
    chosen = drawn(pairs(*data.load(name, root, split), checkpoint["classes"]), 6)
    loader = eval.evaluation_loader(model, chosen, tokenizer)
    batch = data.to_device(loader.make(0), next(model.parameters()).device)
    images = batch["images"][:, 0]
    tokens = batch["tokens"][:, 0]
    _, weights = model(images, tokens)
    rows = []
    for i, x in enumerate(chosen):
        words = []
        bars = []
        if model.sequence_wise:
            maps, mask = model.attention(images[i:i + 1], tokens[i:i + 1])
            side = math.isqrt(maps.shape[2])
            for k in range(1, int(mask.sum()) - 1):  # without start and end
                word = tokenizer.decode([int(tokens[i, k])]).strip()
                words.append((word, maps[0, k].view(side, side).cpu().numpy()))
        if model.modality_wise:
            bars = [(task, weights[i, k, 0].item()) for k, task in enumerate(model.tasks)]
        rows.append((data.pixels(x.images[0], eval.CELL), x.captions[0], words, bars))
    eval.attention_picture(path, rows)


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    rank, world, device = eval.join(args)
    (train, train_classes), val, test = eval.load_splits(args, device)
    classes = choose_tasks(train_classes, args.tasks, args.data, train)
    val = pairs(*val, classes)
    for split, part in (("val", val), ("test", pairs(*test, classes))):
        data.expect(any(max(x.labels.values()) >= 0 for x in part), args.data,
                    f"no instance of split {split!r} has a label of {', '.join(classes)}; label some")
    clip_model, tokenizer = eval.build_or_load(args, train, device)
    clip_model.requires_grad_(not args.freeze)
    model = CMACLIP(clip_model, classes, args.fusion, args.width, args.layers, args.heads, args.dropout,
                    args.seed).to(device)
    swapped, foreign = by_kind(args.noise_kind, (args.train_noise_image, args.train_noise_text))
    pool, _ = [foreign_pool(args.noise_data, args.noise_root, split, tokenizer, model.config)
               for split in ("train", "test")]  # what is wrong with test is said before training, too
    random_words = args.noise_kind == "foreign" and pool is None
    words = caption_words(train, tokenizer) if random_words else None
    loader = ForeignLoader(train, tokenizer, model.config.context_length, model.config.image_resolution,
                           args.batch_size, 1, 1, train=True, seed=args.seed, workers=args.workers,
                           rank=rank, world=world, crop=args.crop, noise=foreign, pool=pool, words=words)
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    groups = {}  # (peak learning rate, weight decay) -> parameters
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = args.clip_lr if name.startswith("clip.") else args.lr
            decay = args.weight_decay if p.ndim >= 2 else 0.0  # none of gains, biases, logit_scale
            groups.setdefault((peak, decay), []).append(p)
    optimizer = torch.optim.AdamW([{"params": part, "peak": peak, "weight_decay": decay}
                                   for (peak, decay), part in groups.items()], lr=args.lr, fused=True)
    steps = args.epochs * len(loader)
    thresholds = {}  # task -> (C,), for recall at --precision: those of the latest evaluation on val

    def pack():
        return {"classes": classes, "thresholds": thresholds, "words": words,
                "heads": clip.describe_heads(model), "clip": clip.describe(clip_model)}

    def unpack(checkpoint):
        clip_model.load_state_dict(checkpoint["clip"]["state_dict"])
        clip.load_heads(model, checkpoint["heads"])
        thresholds.update(checkpoint["thresholds"])

    run = eval.Run(args, "train_cmaclip", optimizer, steps, len(loader), pack, unpack)
    parameters = sum(p.numel() for part in groups.values() for p in part)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances, {len(classes)} tasks ({', '.join(classes)}), "
            f"fusion {args.fusion}; {parameters / 1e6:.2f} M trained parameters; "
            f"{steps:,} steps on {device.type}")
    model.train()
    for step, batch in run.batches(loader):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * eval.warmup_cosine(step, steps, WARMUP)
        data.seed_step(args.seed, step, rank)  # for the corruption and for dropout
        batch = data.to_device(batch, device)
        images, tokens, present = corrupt_batch(batch["images"][:, 0], batch["tokens"][:, 0],
                                                swapped, (args.train_missing_image, args.train_missing_text))
        with clip.autocast(args.amp, clip_model):
            logits, _ = model(images, tokens, present)
        logits = {task: losses.gather(logits[task].float()) for task in classes}
        labels = {task: losses.gather(batch["labels"][task]) for task in classes}
        loss = multitask_loss(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        if run.log(loss, args.batch_size):
            probabilities, labels, weights = predict(model, val_loader, args.amp)
            for task in classes:
                thresholds[task] = eval.precision_thresholds(probabilities[task], labels[task],
                                                             args.precision)
            metrics = scores(probabilities, labels, weights)
            accuracy = metrics["mean"]["accuracy"]
            run.keep_best(accuracy, f"val accuracy {accuracy:.1f}, the mean of {len(metrics) - 1} tasks",
                          val=metrics)
    eval.report(args, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
