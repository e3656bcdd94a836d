"""CLIP4CMR: supervised cross-modal retrieval on CLIP's features (arXiv 2201.02772).

Every image and every text has a class, and a result is right where its class is that of the query. The
features of a frozen CLIP pass a small MLP of each modality onto one unit sphere, where a loss that knows the
classes arranges them. The paper compares such losses on equal footing, under modality imbalance and over the
dimension of the sphere. Below, v_i is an embedded image, t_j an embedded text, x_i one or the other, and y_i
the class of x_i.

Pair-wise losses compare images with texts. One of six, with u_ij = |v_i - t_j|:

    contrastive = mean over pairs of one class of u_ij^2 + mean over other pairs of max(0, margin - u_ij)^2

Class-wise losses compare both with prototypes p_c or a classifier W that the modalities share. Two of five,
each of them the sum of the images' and of the texts':

    pcl              = mean over i of -log( e^-z_i,yi / sum over classes c of e^-z_ic ),
                       with z_ic = |x_i - p_c|^2 / (2 temperature)
    label regression = mean over i of |W x_i - onehot(y_i)|

A hybrid is a weighted sum of several losses.

The MLPs, the losses and what is compared are the paper's. Sizes, rates, fixed prototypes and the way in which
imbalance cuts batches are those of the authors' code (github.com/zhixiongz/CLIP4CMR). Ours are: standardised
inputs; margins and temperatures chosen on validation data for every loss, so that the footing is equal; and
stopping on validation data, with patience counted in steps where evaluations follow each other closely. The
authors' code stops on test, so that published figures are chosen on test. It reads the first 50 words of a
text, without punctuation and digits, and one text for each Pascal picture; from raw data this script reads
all texts as they are, so that --features with the authors' files is the faithful path.

    python train_clip4cmr.py                                 # built-in shapes; a small CLIP is made first
    python train_clip4cmr.py --data wikipedia --features features_train.npz features_test.npz  # under --root
    python train_clip4cmr.py --data products --root path/to/products --task subCategory --clip RN50
    python train_clip4cmr.py --data mine.jsonl --clip ViT-B/32 --loss pcl+modality-invariant:0.1
    python train_clip4cmr.py --data pascal-sentence --clip RN50 --loss triplet --text-fraction 0.3
    torchrun --nproc_per_node=2 train_clip4cmr.py            # the same batch over two processes
    python train_clip4cmr.py --resume                        # go on where it stopped, to the same bits
"""
import argparse
import math
import os
import sys
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

FROZEN = dict(epochs=500, batch_size=300, lr=1e-4, weight_decay=0.0, eval_every=1)  # the authors'
SHAPES = dict(epochs=40, batch_size=300, lr=1e-3, weight_decay=0.0, eval_every=4)  # about a minute
BETAS = (0.5, 0.999)  # of Adam
PATIENCE = 10  # evaluations without a better mAP on val after which a run stops; the authors'
# Steps that these evaluations must span at least; ours. On little data ten epochs are a few dozen steps, and
# a chance peak on val would stop a run that still learns: on Wikipedia three seeds choose epochs 66 to 124
# with 70 steps, and 104 to 128 with 280 (D 64).
PATIENCE_STEPS = 300
BLOCK = 4096  # rows of features that are computed with at a time

PAIR_WISE = {
    "contrastive": losses.contrastive_loss,
    "modality-invariant": losses.modality_invariant_loss,
    "triplet": losses.triplet_loss,
    "lifted-structure": losses.lifted_structure_loss,
    "n-pairs": losses.n_pairs_loss,
    "supervised-contrastive": losses.supervised_contrastive_loss,
}
WITH_CLASSIFIER = ("label-regression", "cross-entropy")
WITH_PROTOTYPES = {
    "pcl": losses.prototype_contrastive_loss,
    "proxy-nca": losses.proxy_nca_loss,
    "proxy-anchor": losses.proxy_anchor_loss,
}
CLASS_WISE = (*WITH_CLASSIFIER, *WITH_PROTOTYPES)
LOSSES = (*PAIR_WISE, *CLASS_WISE)

# Chosen for each loss by mAP on val, of Wikipedia and of products' CLIP features, among values a factor of
# two to three apart. --margin and --temperature replace them.
CONSTANTS = {
    "contrastive": {"margin": 1.4},
    "triplet": {"margin": 1.0},
    "lifted-structure": {"temperature": 0.1},
    "n-pairs": {"temperature": 0.1},
    "supervised-contrastive": {"temperature": 0.5},
    "cross-entropy": {"temperature": 1.0},
    "pcl": {"temperature": 0.5},
    "proxy-nca": {"temperature": 0.5},
    "proxy-anchor": {"margin": 0.1, "alpha": 1.0},
}


def settings(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = eval.arguments(__doc__, __file__, {"built-in shapes": SHAPES, "pretrained": FROZEN})
    p.add_argument("--loss", default="pcl", metavar="NAME[:WEIGHT]+...",
                   help="weighted sum of " + ", ".join(LOSSES))
    p.add_argument("--task", help="which of the data's labels are the classes (default: its first task)")
    p.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"),
                   help=".npz or .pkl files of features under --root, in place of pictures and texts")
    p.add_argument("--cache", default=os.path.join("runs", "features"),
                   help="folder in which the features of frozen CLIPs are kept")
    p.add_argument("--standardise", action=argparse.BooleanOptionalAction, default=True,
                   help="give features a mean of 0 and a deviation of 1 in each dimension; ours: the authors "
                        "take features as they are")
    p.add_argument("--hidden", type=eval.positive_int, default=256, help="width of the MLPs' hidden layer")
    p.add_argument("--dim", type=eval.positive_int, default=1024, help="D, dimension of the common space")
    p.add_argument("--dropout", type=eval.fraction, default=0.1,
                   help="share of an embedding's entries that training sets to 0")
    p.add_argument("--prototypes", choices=("fixed", "learned"), default="fixed",
                   help="fixed: random directions, as in the authors' code; learned: as in PAN")
    p.add_argument("--margin", type=eval.non_negative,
                   help="margin of the losses that have one (default: each its own, chosen on validation)")
    p.add_argument("--temperature", type=eval.positive,
                   help="divides the cosines in the losses that have a temperature (default: each its own, "
                        "chosen on validation)")
    p.add_argument("--image-fraction", type=eval.positive_fraction, default=1.0,
                   help="share of each batch's images that is used (modality imbalance)")
    p.add_argument("--text-fraction", type=eval.positive_fraction, default=1.0,
                   help="share of each batch's texts that is used")
    p.add_argument("--patience", type=eval.positive_int,
                   help="stop after as many evaluations on val without a better mAP "
                        f"(default: {PATIENCE}, or more where these span fewer than {PATIENCE_STEPS} steps)")
    args = eval.parse(p, argv)
    if args.features and args.data == "primitives":  # nothing of the built-in data is read: name the run anew
        return settings([*argv, "--data", "features"])
    if args.features and args.task:
        p.error("--features: the files have one label for each row; leave --task out")
    if args.clip in clip.SCRATCH and not args.features:
        p.error(f"--clip {args.clip} has random weights, and it stays frozen: its features say nothing; give "
                f"a trained CLIP, or {eval.how_to_train_one(args)}")
    args.constants = constants(terms(args.loss), args.margin, args.temperature)
    return args


def terms(text):
    """"pcl+modality-invariant:0.1" -> {"pcl": 1.0, "modality-invariant": 0.1}. Raises DataError."""
    weights = {}
    for term in text.split("+"):
        name, _, weight = term.partition(":")
        data.expect(name in LOSSES, "--loss", f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
        data.expect(name not in weights, "--loss", f"{name} is named twice; give it one weight")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        data.expect(0 < weights[name] < math.inf, "--loss",
                    f"weight {weight!r} of {name} is not a positive number")
    return weights


def constants(weights, margin=None, temperature=None):
    """The constants of the losses in `weights`: those of CONSTANTS, or what the command line says.

    Returns {loss: {constant: value}}. Raises DataError where one is given that none of the losses has.
    """
    chosen = {name: dict(CONSTANTS.get(name, {})) for name in weights}
    for constant, value in (("margin", margin), ("temperature", temperature)):
        if value is None:
            continue
        having = [name for name in chosen if constant in chosen[name]]
        data.expect(having, f"--{constant}", f"{'+'.join(weights)} has none; leave it out")
        for name in having:
            chosen[name][constant] = value
    return chosen


# ---------------------------------------------------------------- features

def load_features(args, device):
    """The features that a run learns from: from files, or computed once by a frozen CLIP and kept.

    Returns
        clip_model  the frozen CLIP, or None
        train, val  data.Features
        classes     names of the classes, whose numbers are the features' labels
    """
    if args.features:
        splits, classes = data.feature_splits(args.features, args.root)
        train = splits["train"]
        eval.note_training_data(args, (train.images, train.texts, train.labels), {"label": classes})
        return None, train, splits["val"], classes
    train, val, test = eval.load_splits(args)
    args.task = data.choose_task(train[1], args.task, args.data, train[0])
    train, classes = data.by_class(train, args.task, args.data, "train")
    val, _ = data.by_class(val, args.task, args.data, "val")
    data.by_class(test, args.task, args.data, "test")  # that there are any is checked before training
    args.crop = None  # a frozen CLIP sees each picture once
    clip_model = eval.build_or_load(args, train, device).requires_grad_(False)
    train = eval.frozen_features(clip_model, train, classes, args.cache, args.amp, args.workers)
    val = eval.frozen_features(clip_model, val, classes, args.cache, args.amp, args.workers)
    return clip_model, train, val, classes


# ---------------------------------------------------------------- the model

class CLIP4CMR(nn.Module):
    """An MLP of each modality into the common space (section 3):

        x = normalise( dropout( W2 gelu( W1 (features - mean) / std ) ) ),  of D dimensions and unit norm

    clip_model: the frozen CLIP, or None where features come from files.
    widths: (Di, Dt), of the features of images and of texts.
    classes: how many there are, C.
    dim, hidden: D and the width between W1 and W2; the authors' code says 1,024 and 256.
    fixed: whether the prototypes stay at the random directions that they start from.

    mean and std are those of the training features (`standardise`), else 0 and 1.
    `classifier` (C, D) and `prototypes` (C, D) are shared by both modalities and used with rows of unit norm.
    The authors' classifier has a bias too, and its rows are normalised in place before each forward pass: no
    gradient passes through the norm.
    As a CLIP the model has `encode_image` and `encode_text`, so that eval.py can search with words.
    """

    def __init__(self, clip_model, widths, classes, dim=1024, hidden=256, dropout=0.1, fixed=True, seed=0):
        super().__init__()

        def mlp(width):
            return nn.Sequential(nn.Linear(width, hidden), nn.GELU(),
                                 nn.Linear(hidden, dim), nn.Dropout(dropout))

        image_width, text_width = widths
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.image_head = mlp(image_width)
            self.text_head = mlp(text_width)
            self.classifier = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=-1))
            self.prototypes = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=-1))
        self.prototypes.requires_grad_(not fixed)
        self.register_buffer("image_mean", torch.zeros(image_width))
        self.register_buffer("image_std", torch.ones(image_width))
        self.register_buffer("text_mean", torch.zeros(text_width))
        self.register_buffer("text_std", torch.ones(text_width))
        self.clip = clip_model
        self.config = clip_model.config if clip_model else None
        self.tokenizer = clip_model.tokenizer if clip_model else None

    def embed_image(self, features):
        """(A, Di) -> float32 (A, D) of unit norm."""
        return F.normalize(self.image_head((features.float() - self.image_mean) / self.image_std), dim=-1)

    def embed_text(self, features):
        """(C, Dt) -> float32 (C, D) of unit norm."""
        return F.normalize(self.text_head((features.float() - self.text_mean) / self.text_std), dim=-1)

    def encode_image(self, images):
        return self.embed_image(self.clip.encode_image(images))

    def encode_text(self, tokens):
        return self.embed_text(self.clip.encode_text(tokens))


def build(args, clip_model, widths, classes):
    """The CLIP4CMR that the settings of a run ask for."""
    return CLIP4CMR(clip_model, widths, len(classes), dim=args.dim, hidden=args.hidden, dropout=args.dropout,
                    fixed=args.prototypes == "fixed", seed=args.seed)


def standardise(model, features):
    """Set the mean and std of a model's inputs to those of the training features, data.Features."""
    for modality, array in (("image", features.images), ("text", features.texts)):
        mean = array.mean(0, dtype=np.float64)
        # the mean is taken off before squares are summed: rounding would swamp their difference
        blocks = (array[begin:begin + BLOCK] - mean for begin in range(0, len(array), BLOCK))
        std = np.sqrt(sum(np.square(block).sum(0) for block in blocks) / len(array))
        std = np.where(std > 1e-6 * np.abs(mean), std, 1.0)  # a constant column deviates by rounding only
        getattr(model, f"{modality}_mean").copy_(torch.from_numpy(mean))
        getattr(model, f"{modality}_std").copy_(torch.from_numpy(std))


def embed_features(model, features):
    """As `eval.embed`, of data.Features: images (N, D), the renormalised mean over an instance's views, and
    texts (C, D)."""
    device = model.prototypes.device

    def embed(head, array):
        blocks = torch.from_numpy(array).split(BLOCK)
        return torch.cat([head(block.to(device)) for block in blocks])

    with eval.evaluating(model):
        images = embed(model.embed_image, features.images)
        texts = embed(model.embed_text, features.texts)
    views = torch.from_numpy(features.views).to(device)
    owner = torch.arange(len(views), device=device).repeat_interleave(views)
    return losses.instance_means(images, owner)[0], texts


# ---------------------------------------------------------------- the loss

def class_wise_loss(name, model, x, labels, constants):
    """The loss of that name of one modality: embeddings x (N, D), labels (N,). constants: {name: value}."""
    if name in WITH_PROTOTYPES:
        prototypes = F.normalize(model.prototypes, dim=-1)  # (C, D)
        return WITH_PROTOTYPES[name](x, prototypes, labels, **constants)
    logits = x @ F.normalize(model.classifier, dim=-1).t()  # (N, C)
    if name == "label-regression":
        return losses.label_regression_loss(logits, labels)
    return F.cross_entropy(logits / constants["temperature"], labels)


def total_loss(model, weights, images, image_labels, texts, text_labels, constants=CONSTANTS):
    """The weighted sum of the losses that --loss names (section 3.2).

    weights: {name: weight}.
    images (N, D), texts (M, D): embeddings of a batch, of unit norm; their labels (N,), (M,): int64.
    constants: {name: {constant: value}}.
    """
    total = 0
    for name, weight in weights.items():
        of_loss = constants.get(name, {})
        if name in CLASS_WISE:
            total = total + weight * class_wise_loss(name, model, images, image_labels, of_loss)
            total = total + weight * class_wise_loss(name, model, texts, text_labels, of_loss)
        else:
            total = total + weight * PAIR_WISE[name](images, texts, image_labels, text_labels, **of_loss)
    return total


# ---------------------------------------------------------------- training

def cut(embedded, labels, fraction):
    """A share of a batch of one modality, at least one sample: the first ones, since the batch is shuffled.

    embedded (N, D), labels (N,), of all processes, so that several cut what one does.
    """
    count = max(1, round(fraction * len(labels)))
    return embedded[:count], labels[:count]


def main(argv=None):
    args = settings(argv)
    weights = terms(args.loss)
    device = eval.join(args)
    rank, world = eval.processes()
    clip_model, train, val, classes = load_features(args, device)
    model = build(args, clip_model, (train.images.shape[1], train.texts.shape[1]), classes).to(device)
    if args.standardise:
        standardise(model, train)
    loader = data.FeatureLoader(train, args.batch_size, args.seed, rank, world)
    labels = torch.from_numpy(train.labels).to(device)  # (N,): the class of each training instance
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, betas=BETAS, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(loader)
    identity = clip.identity(clip_model) if clip_model else None  # a checkpoint holds its hash in its place
    saved = {"heads": model, "classes": classes, "frozen_clip": identity}
    run = eval.Run(args, optimizer, steps, len(loader), saved, more_epochs=True)
    if clip_model:
        run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(labels):,} instances of {len(classes)} classes, frozen features; "
            f"at most {steps:,} steps on {device.type}")
    patience = args.patience or max(PATIENCE, math.ceil(PATIENCE_STEPS / (args.eval_every * len(loader))))
    model.train()
    for step, batch in run.batches(loader):
        data.seed_step(args.seed, step, rank)  # dropout
        index = batch["index"].to(device)  # (b,)
        images = model.embed_image(batch["images"].to(device))  # (b, D)
        texts = model.embed_text(batch["texts"].to(device))  # (b, D)
        images, image_labels = losses.gather_rows(images, labels[index])
        texts, text_labels = losses.gather_rows(texts, labels[index])
        images, image_labels = cut(images, image_labels, args.image_fraction)  # (n, D), (n,)
        texts, text_labels = cut(texts, text_labels, args.text_fraction)  # (m, D), (m,)
        loss = total_loss(model, weights, images, image_labels, texts, text_labels, args.constants)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(trained)
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # measured, not clipped
        run.check(loss, norm)
        optimizer.step()
        if run.log(loss, len(index) * world):
            metrics = eval.class_retrieval(partial(eval.class_metrics, classes=classes),
                                           eval.cosine_scores(*embed_features(model, val)), *val.layout)
            scores = {"mAP": metrics["mAP"], "image_to_text": metrics["image_to_text"]["mAP"],
                      "text_to_image": metrics["text_to_image"]["mAP"]}
            run.keep_best(metrics["mAP"], "", val=scores)  # epochs are many and short: they are only logged
            if run.state["waited"] >= patience:
                run.finish(f"no better val mAP than {run.state['best']:.1f} in {patience} evaluations; "
                           "stopped")
    eval.report(args, device)


# ---------------------------------------------------------------- for eval.py

def restore(checkpoint):
    """The model of a checkpoint of this script. Raises CheckpointError where its frozen CLIP has changed."""
    args = argparse.Namespace(**checkpoint["settings"])
    clip_model = None if args.features else eval.frozen_clip(checkpoint)
    heads = checkpoint["heads"]
    widths = (len(heads["image_mean"]), len(heads["text_mean"]))
    model = build(args, clip_model, widths, checkpoint["classes"])
    clip.load_heads(model, heads)
    return model


def embed_split(model, checkpoint, args):
    """-> `eval.Embedded` of the asked split: of the instances that have a class, whose metrics are those by
    class. A model that was trained on features from files has those alone."""
    run = argparse.Namespace(**checkpoint["settings"])
    classes = checkpoint["classes"]
    if run.features:
        splits, names = data.feature_splits(run.features, args.root)
        data.expect(names == classes, "--features", f"files with the classes {', '.join(names)[:100]}; "
                    f"the model knows {', '.join(classes)[:100]}")
        data.expect(args.split in splits, "--split", f"features have {', '.join(splits)}, not {args.split!r}")
        features = splits[args.split]
        instances = [data.Instance(f"{args.split} {row}", [], [""], group=classes[label])
                     for row, label in enumerate(features.labels)]
    else:
        loaded = data.load(args.data, args.root, args.split, classes={run.task: classes})
        instances, _ = data.by_class(loaded, run.task, args.data, args.split)
        features = eval.frozen_features(model.clip, instances, classes, run.cache, args.amp, args.workers)
    return eval.Embedded(instances, *embed_features(model, features), {}, classes)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
