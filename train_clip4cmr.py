"""CLIP4CMR: supervised cross-modal retrieval on CLIP's features (arXiv 2201.02772).

Every image and every text has a class, and a result is right where its class is that of the query. The
features of a frozen CLIP pass a small MLP of each modality onto one unit sphere, where a loss that knows the
classes arranges them. The paper compares such losses on equal footing, under modality imbalance and over the
dimension of the sphere. Below, v_i is an embedded image, t_j an embedded text, x_i one or the other, and y_i
the class of x_i.

Pair-wise losses compare images with texts. One of eight, with u_ij = |v_i - t_j|:

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
authors' code stops on test, so that published figures are chosen on test.
Losses named *-published are as in that code.

    python train_clip4cmr.py                                 # built-in shapes; a tiny CLIP is trained along
    python train_clip4cmr.py --data wikipedia --features features_train.npz features_test.npz  # under --root
    python train_clip4cmr.py --data products --root path/to/products --task subCategory --clip RN50  # frozen
    python train_clip4cmr.py --data mine.jsonl --clip ViT-B/32 --finetune --loss pcl+modality-invariant:0.1
    python train_clip4cmr.py --data pascal-sentence --clip RN50 --loss triplet --text-fraction 0.3
    python train_clip4cmr.py --data pascal-sentence --clip RN50 --loss contrastive-published --no-standardise
    torchrun --nproc_per_node=2 train_clip4cmr.py            # the same batch over two processes
    python train_clip4cmr.py --resume                        # go on where it stopped, to the same bits
"""
import argparse
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

# the paper's, for features that do not change; a published CLIP trained along; one from random weights
FROZEN = dict(epochs=500, batch_size=300, lr=1e-4, clip_lr=0.0, weight_decay=0.0, eval_every=1)
FINETUNED = dict(epochs=20, batch_size=64, lr=1e-4, clip_lr=1e-6, weight_decay=0.0)
SCRATCH = dict(epochs=10, batch_size=64, lr=1e-3, clip_lr=1e-3, weight_decay=0.0)
BETAS = (0.5, 0.999)  # of Adam
WARMUP = 0.05  # share of the steps in which the learning rate rises, where CLIP is trained
PATIENCE = 10  # evaluations without a better mAP on val after which a run stops; the authors'
PATIENCE_STEPS = 300  # which these evaluations must span at least; ours
BLOCK = 4096  # rows of features that are computed with at a time

PAIR_WISE = {
    "contrastive": losses.contrastive_loss,
    "contrastive-published": losses.contrastive_published_loss,
    "modality-invariant": losses.modality_invariant_loss,
    "triplet": losses.triplet_loss,
    "lifted-structure": losses.lifted_structure_loss,
    "n-pairs": losses.n_pairs_loss,
    "supervised-contrastive": losses.supervised_contrastive_loss,
    "supervised-contrastive-published": losses.supervised_contrastive_published_loss,
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
# two to three apart. --margin, --temperature and --proxy-alpha replace them.
CONSTANTS = {
    "contrastive": {"margin": 1.4},
    "contrastive-published": {"margin": 0.2},  # of the authors' code, not chosen
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
    p = eval.common_arguments(__doc__)
    p.add_argument("--loss", default="pcl", metavar="NAME[:WEIGHT]+...",
                   help="weighted sum of " + ", ".join(LOSSES))
    p.add_argument("--task", help="which of the data's labels are the classes (default: its first task)")
    p.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"),
                   help=".npz or .pkl files of features under --root, in place of pictures and texts; or "
                        "folders of image.npy, text.npy, label.npy, ids.npy, which may be larger than memory")
    p.add_argument("--finetune", action="store_true", help="train CLIP too (always so from scratch)")
    p.add_argument("--clip-lr", type=eval.positive, help="peak learning rate of CLIP's own weights")
    p.add_argument("--dim", type=eval.positive_int, default=1024, help="D, dimension of the common space")
    p.add_argument("--hidden", type=eval.positive_int, default=256, help="width of the MLPs' hidden layer")
    p.add_argument("--dropout", type=eval.fraction, default=0.1, help="share of an embedding's entries")
    p.add_argument("--prototypes", choices=("fixed", "learned"), default="fixed",
                   help="fixed: random directions, as in the authors' code; learned: as in PAN")
    p.add_argument("--margin", type=eval.non_negative,
                   help="of the losses that have one (default: of each loss its own, chosen on validation)")
    p.add_argument("--temperature", type=eval.positive,
                   help="divides the cosines in the losses that have one (default: likewise)")
    p.add_argument("--proxy-alpha", type=eval.positive,
                   help="alpha of proxy-anchor, one over a temperature: 32 in its own paper")
    p.add_argument("--standardise", action=argparse.BooleanOptionalAction, default=True,
                   help="give frozen features a mean of 0 and a deviation of 1 in each dimension; ours: "
                        "the authors feed features as they are")
    p.add_argument("--image-fraction", type=eval.positive_fraction, default=1.0,
                   help="share of the training images that is used (modality imbalance)")
    p.add_argument("--text-fraction", type=eval.positive_fraction, default=1.0,
                   help="share of the training texts that is used")
    p.add_argument("--imbalance", choices=("batch", "subset"), default="batch",
                   help="batch: a fraction of each shuffled batch is used, as in the authors' code, so that "
                        "every sample is seen over the epochs; subset: a fraction of the training samples is "
                        "used, the same in every epoch, which measures scarcity")
    p.add_argument("--patience", type=eval.positive_int,
                   help="stop after as many evaluations on val without a better mAP "
                        f"(default: {PATIENCE}, or more where these span fewer than {PATIENCE_STEPS} steps)")
    p.add_argument("--cache", default=os.path.join("runs", "features"),
                   help="folder in which the features of frozen CLIPs are kept")
    args = eval.parse(p, argv)
    if args.features and (args.finetune or args.task):
        p.error("--features: these are read from files, so there is no CLIP to --finetune and no --task "
                "to choose; leave both out")
    if args.features and args.data == "primitives":
        args.data = "features"  # a name for the run: nothing of the built-in data is read
    args.finetune = not args.features and (args.finetune or args.clip in clip.SCRATCH)
    args.constants = constants(terms(args.loss), args.margin, args.temperature, args.proxy_alpha)
    trained_clip = SCRATCH if args.clip in clip.SCRATCH else FINETUNED
    return eval.complete(args, "clip4cmr", trained_clip if args.finetune else FROZEN)


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


def constants(weights, margin=None, temperature=None, alpha=None):
    """The constants of the losses in `weights`: those of CONSTANTS, or what the command line says.

    Returns {loss: {constant: value}}. Raises DataError where one is given that none of the losses has.
    """
    chosen = {name: dict(CONSTANTS.get(name, {})) for name in weights}
    given = {"margin": ("--margin", margin), "temperature": ("--temperature", temperature),
             "alpha": ("--proxy-alpha", alpha)}
    for constant, (option, value) in given.items():
        if value is None:
            continue
        having = [name for name in chosen if constant in chosen[name]]
        data.expect(having, option, f"{'+'.join(weights)} has none; leave it out")
        for name in having:
            chosen[name][constant] = value
    return chosen


# ---------------------------------------------------------------- the model

class CLIP4CMR(nn.Module):
    """An MLP of each modality into the common space (section 3):

        x = normalise( dropout( W2 gelu( W1 (features - mean) / std ) ) ),  of D dimensions and unit norm

    clip_model: a CLIP, frozen or not, or None where features come from files.
    widths: (Di, Dt), of the features of images and of texts.
    classes: how many there are, C.
    fixed: whether the prototypes stay at the random directions that they start from.

    mean and std are those of the training features. They are 0 and 1 with --no-standardise, and where CLIP is
    trained, since its features change.
    `classifier` (C, D) and `prototypes` (C, D) are shared by both modalities and used with rows of unit norm.
    As a CLIP the model has `encode_image` and `encode_text`, so that eval.py can search with it.
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
    return CLIP4CMR(clip_model, widths, len(classes), args.dim, args.hidden, args.dropout,
                    args.prototypes == "fixed", args.seed)


def standardise(model, features, image_used, text_used):
    """Set the mean and std of a model's inputs to those of the training features that a run uses.

    features: data.Features of N instances. image_used, text_used: bool (N,).
    """
    for modality, array, used in (("image", features.images, np.repeat(image_used, features.views)),
                                  ("text", features.texts, np.repeat(text_used, features.captions))):
        def blocks():  # the features may lie on disk and be larger than memory
            for begin in range(0, len(array), BLOCK):
                yield array[begin:begin + BLOCK][used[begin:begin + BLOCK]].astype(np.float64)

        mean = sum(block.sum(0) for block in blocks()) / used.sum()
        # the mean is taken off before squares are summed: rounding would swamp their difference
        std = np.sqrt(sum(np.square(block - mean).sum(0) for block in blocks()) / used.sum())
        std = np.where(std > 1e-6 * np.abs(mean), std, 1.0)  # a constant column deviates by rounding only
        getattr(model, f"{modality}_mean").copy_(torch.from_numpy(mean))
        getattr(model, f"{modality}_std").copy_(torch.from_numpy(std))


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
    Modality imbalance may leave N or M at 0; what needs the missing side is then left out.
    constants: {name: {constant: value}}.
    """
    total = 0.0 * (images.sum() + texts.sum())  # so that there is a gradient where no loss is left
    for name, weight in weights.items():
        its_constants = constants.get(name, {})
        if name in CLASS_WISE:
            if len(images):
                total = total + weight * class_wise_loss(name, model, images, image_labels, its_constants)
            if len(texts):
                total = total + weight * class_wise_loss(name, model, texts, text_labels, its_constants)
        elif len(images) and len(texts):
            pair_wise_loss = PAIR_WISE[name]
            total = total + weight * pair_wise_loss(images, texts, image_labels, text_labels, **its_constants)
    return total


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def embed_features(model, features):
    """As `eval.embed`: images (N, D), the renormalised mean over an instance's views, and texts (C, D)."""
    device = model.prototypes.device

    def embed(encode, array):
        def encode_block(begin):
            return encode(torch.from_numpy(np.array(array[begin:begin + BLOCK])).to(device))
        return torch.cat(list(eval.in_turns(encode_block, range(0, len(array), BLOCK), device)))

    was_training = model.training
    model.eval()
    images = embed(model.embed_image, features.images)
    texts = embed(model.embed_text, features.texts)
    model.train(was_training)
    views = torch.from_numpy(features.views).to(device)
    owner = torch.arange(len(views), device=device).repeat_interleave(views)
    return losses.instance_means(images, owner)[0], texts


# ---------------------------------------------------------------- for eval.py

def restore(checkpoint, path):
    """The model of a checkpoint of this script.

    A frozen CLIP is not in it, only the hash of its weights: it is loaded from where --clip says. Raises
    CheckpointError where the weights are no longer the same.
    """
    args = argparse.Namespace(**checkpoint["settings"])
    if args.features:
        clip_model = None
    elif args.finetune:
        clip_model, _ = clip.load(path, "cpu")
    else:
        clip_model, _ = clip.load(args.clip, "cpu", image_size=args.image_size, context_length=args.context)
        check_clip(checkpoint, clip.identity(clip_model), path)
    heads = checkpoint["heads"]
    widths = (len(heads["image_mean"]), len(heads["text_mean"]))
    model = build(args, clip_model, widths, checkpoint["classes"])
    clip.load_heads(model, heads)
    return model


def check_clip(checkpoint, identity, path):
    """Raise CheckpointError where the checkpoint at `path` belongs to another frozen CLIP than this one."""
    before = checkpoint["clip_identity"]
    if before != identity:
        name = checkpoint["settings"]["clip"]
        raise clip.CheckpointError(f"{path}: made with the CLIP {before[:12]}, but {name} is now "
                                   f"{identity[:12]}; put the weights back that it was trained on")


def embed_split(model, checkpoint, name, root, split, amp="auto", workers=0):
    """-> `eval.Embedded` of a split: of the instances that have a class, whose metrics are those by class.

    name, root: a data set; a model that was trained on features from files has those alone.
    """
    args = argparse.Namespace(**checkpoint["settings"])
    classes = checkpoint["classes"]
    if args.features:
        splits, names = data.feature_splits(args.features, root)
        data.expect(names == classes, "--features", f"files with the classes {', '.join(names)[:100]}; "
                    f"the model knows {', '.join(classes)[:100]}")
        data.expect(split in splits, "--split", f"features have {', '.join(splits)}, not {split!r}")
        features = splits[split]
        instances = []  # their ids are the numbers of the rows
        for row, label in enumerate(features.labels):
            instances.append(data.Instance(f"{split} {row}", [], [""], group=classes[label]))
    else:
        instances, _ = data.load_split(name, root, split, args.task, classes)
        tokenizer = model.tokenizer or clip.default_tokenizer()
    if args.finetune:
        images, texts = eval.embed(model, instances, tokenizer, amp, workers)
    else:
        if not args.features:
            features = eval.frozen_features(model.clip, instances, classes, tokenizer,
                                            args.cache, amp, workers)
        images, texts = embed_features(model, features)
    return eval.Embedded(instances, images, texts, {}, classes)


# ---------------------------------------------------------------- training

def load_splits(args, device):
    """-> (train, val, classes): the instances that have a class, and the names of the classes of --task."""
    (train, tasks), val, test = eval.load_splits(args, device)
    args.task = data.choose_task(tasks, args.task, args.data, train)
    train, classes = data.by_class(train, tasks, args.task, args.data, "train")
    val, _ = data.by_class(*val, args.task, args.data, "val", classes)
    data.by_class(*test, args.task, args.data, "test", classes)  # what it lacks is said before training
    return train, val, classes


def used_samples(args, count):
    """-> (images, texts), bool (count,) each: which training samples a run uses, the same in every epoch.

    With --imbalance subset a random share of each modality (--image-fraction, --text-fraction), at least one
    sample; else all of them.
    """
    masks = []
    for modality, fraction in enumerate((args.image_fraction, args.text_fraction)):
        if args.imbalance == "batch":
            fraction = 1.0
        order = np.random.default_rng([args.seed, modality]).permutation(count)
        mask = np.zeros(count, bool)
        mask[order[:max(1, round(fraction * count))]] = True
        masks.append(mask)
    return masks


def cut(embedded, labels, fraction):
    """A share of a batch of one modality, at least one sample: the first ones, since the batch is shuffled.

    embedded (N, D), labels (N,), of all processes, so that several cut what one does.
    """
    count = max(1, round(fraction * len(labels)))
    return embedded[:count], labels[:count]


def prepare_frozen(args, rank, world, device):
    """Prepare a run on features that do not change: from files, or computed once by a frozen CLIP.

    Returns what the training loop needs, the same from here and from `prepare_finetuning`:
        model       CLIP4CMR
        labels      int64 (N,): the class of each training instance
        classes     names of the classes
        loader      batches of the training instances
        encode      function of a batch -> features of images (b, Di) and of texts (b, Dt), index (b,)
        evaluate    function without arguments -> metrics on val
    """
    if args.features:
        clip_model = None
        splits, classes = data.feature_splits(args.features, args.root)
        train = splits["train"]
        val = splits["val"]
    else:
        train, val, classes = load_splits(args, device)
        args.crop = None  # a frozen CLIP sees each picture once
        clip_model, tokenizer = eval.build_or_load(args, train, device)
        clip_model.requires_grad_(False)
        common = (classes, tokenizer, args.cache, args.amp, args.workers)
        train = eval.frozen_features(clip_model, train, *common)
        val = eval.frozen_features(clip_model, val, *common)
    widths = (train.images.shape[1], train.texts.shape[1])
    model = build(args, clip_model, widths, classes).to(device)
    if args.standardise:
        standardise(model, train, *used_samples(args, len(train.labels)))
    loader = data.FeatureLoader(train, args.batch_size, args.seed, rank, world)

    def encode(batch):
        return batch["images"].to(device), batch["texts"].to(device), batch["index"].to(device)

    def evaluate():
        return eval.class_retrieval(*embed_features(model, val), *val.layout, classes)["model"]
    return model, train.labels, classes, loader, encode, evaluate


def prepare_finetuning(args, rank, world, device):
    """Prepare a run that trains CLIP too, on one view and one caption of each instance of a batch."""
    train, val, classes = load_splits(args, device)
    clip_model, tokenizer = eval.build_or_load(args, train, device)
    clip_model.logit_scale.requires_grad_(False)  # no loss here has it
    config = clip_model.config
    model = build(args, clip_model, (config.embed_dim, config.embed_dim), classes).to(device)
    loader = data.Loader(train, tokenizer, config.context_length, config.image_resolution, args.batch_size,
                         views=1, captions=1, train=True, seed=args.seed, workers=args.workers,
                         rank=rank, world=world, crop=args.crop)
    val_loader = eval.evaluation_loader(clip_model, val, tokenizer, args.workers)
    layout = data.class_layout(val, classes)

    def encode(batch):
        batch = data.to_device(batch, device)
        with clip.autocast(args.amp, clip_model):
            images = clip_model.encode_image(batch["images"][:, 0])
            texts = clip_model.encode_text(batch["tokens"][:, 0])
        return images, texts, batch["index"]

    def evaluate():
        embedded = eval.embed(model, val, tokenizer, args.amp, args.workers, val_loader)
        return eval.class_retrieval(*embedded, *layout, classes)["model"]
    return model, data.class_layout(train, classes)[0], classes, loader, encode, evaluate


def main(argv=None):
    args = settings(argv)
    weights = terms(args.loss)
    rank, world, device = eval.join(args)
    prepare = prepare_finetuning if args.finetune else prepare_frozen
    model, labels, classes, loader, encode, evaluate = prepare(args, rank, world, device)
    image_used, text_used = [torch.from_numpy(used).to(device) for used in used_samples(args, len(labels))]
    labels = torch.from_numpy(labels).to(device)
    heads = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("clip.")]
    groups = [{"params": heads, "peak": args.lr}]
    if args.finetune:
        clip_weights = [p for p in model.clip.parameters() if p.requires_grad]
        groups.append({"params": clip_weights, "peak": args.clip_lr})
    optimizer = torch.optim.Adam(groups, lr=args.lr, betas=BETAS, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(loader)
    # a trained CLIP is written into the checkpoints, of a frozen one only the hash
    identity = clip.identity(model.clip) if model.clip and not args.finetune else None

    def pack():
        checkpoint = {"classes": classes, "heads": clip.describe_heads(model), "clip_identity": identity}
        if args.finetune:
            checkpoint["clip"] = clip.describe(model.clip)
        return checkpoint

    def unpack(checkpoint):
        check_clip(checkpoint, identity, os.path.join(args.out, "last.pt"))
        clip.load_heads(model, checkpoint["heads"])
        if args.finetune:
            model.clip.load_state_dict(checkpoint["clip"]["state_dict"])

    run = eval.Run(args, "train_clip4cmr", optimizer, steps, len(loader), pack, unpack)
    if model.clip:
        run.say(eval.about(args, model.clip, loader))
    run.say(f"{args.data}: {len(labels):,} instances of {len(classes)} classes, "
            f"{'trained' if args.finetune else 'frozen'} features; at most {steps:,} steps on {device.type}")
    # On little data ten epochs are a few dozen steps, and a chance peak on val would stop a run that still
    # learns: on Wikipedia three seeds choose epochs 66 to 124 with 70 steps, and 104 to 128 with 280 (D 64).
    steps_between = args.eval_every * len(loader)
    patience = args.patience or max(PATIENCE, math.ceil(PATIENCE_STEPS / steps_between))
    model.train()
    for step, batch in run.batches(loader):
        # share of the peak rate; the paper's, on frozen features, is constant
        rate = eval.warmup_cosine(step, steps, WARMUP) if args.finetune else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        data.seed_step(args.seed, step, rank)  # dropout
        images, texts, index = encode(batch)  # (b, Di), (b, Dt), (b,)
        has_image = image_used[index]  # (b,): of a subset, an instance may lack one or both
        has_text = text_used[index]
        images = model.embed_image(images[has_image])  # (n, D)
        texts = model.embed_text(texts[has_text])  # (m, D)
        images, image_labels = losses.gather_rows(images, labels[index[has_image]])
        texts, text_labels = losses.gather_rows(texts, labels[index[has_text]])
        if args.imbalance == "batch":
            images, image_labels = cut(images, image_labels, args.image_fraction)
            texts, text_labels = cut(texts, text_labels, args.text_fraction)
        loss = total_loss(model, weights, images, image_labels, texts, text_labels, args.constants)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # measured, not clipped
        run.check(loss, norm)
        optimizer.step()
        if run.log(loss, len(index) * world):
            metrics = evaluate()
            val = {"mAP": metrics["mAP"], "image_to_text": metrics["image_to_text"]["mAP"],
                   "text_to_image": metrics["text_to_image"]["mAP"]}
            # the epochs on frozen features are many and short: they are only logged
            run.keep_best(val["mAP"], f"val mAP {val['mAP']:.1f}" if args.finetune else "", val=val)
            if run.state["waited"] >= patience:
                run.finish(f"no better val mAP than {run.state['best']:.1f} in {patience} evaluations; "
                           "stopped")
    eval.report(args, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
