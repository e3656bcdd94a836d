"""CLIP4CMR: supervised cross-modal retrieval on CLIP's features (arXiv 2201.02772).

Every image and every text has a class, and retrieval is right where the classes agree. CLIP's frozen features of each modality pass a
small MLP into one unit sphere, where a loss that knows the classes arranges them: pair-wise losses compare images with texts,
class-wise losses compare both with a classifier or with prototypes that the modalities share, a hybrid is a weighted sum. The
paper compares these losses on equal footing, under modality imbalance and over the sphere's dimension. `losses.py` has the equations.

    python train_clip4cmr.py                                                  # built-in shapes; a tiny CLIP is trained along
    python train_clip4cmr.py --data wikipedia --root path/to/wikipedia --features features_train.npz features_test.npz
    python train_clip4cmr.py --data products --root path/to/products --task subCategory --clip RN50     # frozen CLIP features
    python train_clip4cmr.py --data mine.jsonl --clip ViT-B/32 --finetune --loss pcl+modality-invariant:0.1
    python train_clip4cmr.py --data pascal-sentence --clip RN50 --loss triplet --text-fraction 0.3      # fewer texts than images
    torchrun --nproc_per_node=2 train_clip4cmr.py                             # the same batch over two processes
    python train_clip4cmr.py --resume                                         # go on after an interruption, to the same bits
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

FROZEN = dict(epochs=500, batch_size=300, lr=1e-4, clip_lr=0.0)  # the paper's: MLPs on features that do not change
FINETUNED = dict(epochs=20, batch_size=64, lr=1e-4, clip_lr=1e-6)  # a published CLIP trained along, far more slowly than the MLPs
SCRATCH = dict(epochs=10, batch_size=64, lr=1e-3, clip_lr=1e-3)  # a small CLIP that starts from random weights
BETAS, WARMUP, SAVE_SECONDS = (0.5, 0.999), 0.05, 300  # Adam; share of steps; last.pt is written after every epoch and this often

PAIR_WISE = {"contrastive": losses.contrastive_loss, "modality-invariant": losses.modality_invariant_loss, "triplet": losses.triplet_loss,
             "lifted-structure": losses.lifted_structure_loss, "n-pairs": losses.n_pairs_loss, "supervised-contrastive": losses.supervised_contrastive_loss}
CLASS_WISE = ("label-regression", "cross-entropy", "pcl", "proxy-nca", "proxy-anchor")


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--loss", type=loss_terms, default="pcl", metavar="NAME[:WEIGHT]+...", help="weighted sum of " + ", ".join([*PAIR_WISE, *CLASS_WISE]))
    p.add_argument("--task", help="which of the data's labels are the classes (default: its first task)")
    p.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"), help=".npz or .pkl files of features under --root, in place of pictures and texts")
    p.add_argument("--finetune", action="store_true", help="train CLIP too (always so where it starts from scratch)")
    p.add_argument("--clip-lr", type=eval.positive, help="peak learning rate of CLIP's own weights")
    p.add_argument("--dim", type=eval.positive_int, default=1024, help="D, dimension of the common space")
    p.add_argument("--hidden", type=eval.positive_int, default=256, help="width of the MLPs' hidden layer")
    p.add_argument("--dropout", type=eval.share, default=0.1)
    p.add_argument("--prototypes", choices=("fixed", "learned"), default="fixed", help="fixed: random directions, as in the authors' code; learned: as in PAN")
    p.add_argument("--proxy-alpha", type=eval.positive, default=1.0, help="alpha of proxy-anchor: 1 in CLIP4CMR's code, 32 in its own paper")
    p.add_argument("--image-fraction", type=eval.fraction, default=1.0, help="share of the training images that is used (modality imbalance)")
    p.add_argument("--text-fraction", type=eval.fraction, default=1.0, help="share of the training texts that is used")
    p.add_argument("--patience", type=eval.positive_int, default=10, help="stop after as many evaluations on val without a better mAP")
    p.add_argument("--eval-every", type=eval.positive_int, help="epochs between evaluations on val (default 1; five in a run that trains CLIP)")
    p.add_argument("--cache", default=os.path.join("runs", "features"), help="where features of frozen CLIPs are kept")
    args = p.parse_args(argv)
    if args.features and (args.finetune or args.task):
        p.error("--features: these are read from files, so there is no CLIP to --finetune and one label, no --task; leave both out")
    if args.features and args.data == "primitives":
        args.data = "features"  # a name for the run: nothing of the built-in data is read
    args.finetune = not args.features and (args.finetune or args.clip in clip.SCRATCH)
    for name, value in (FROZEN if not args.finetune else SCRATCH if args.clip in clip.SCRATCH else FINETUNED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.weight_decay = args.weight_decay or 0.0
    args.eval_every = args.eval_every or (max(1, args.epochs // 5) if args.finetune else 1)
    args.out = args.out or os.path.join("runs", f"clip4cmr-{os.path.splitext(os.path.basename(args.data))[0]}")
    return args


def loss_terms(text):
    """argparse type of --loss: checks "name[:weight]+..." and returns it as it is."""
    terms(text)
    return text


def terms(text):
    """"pcl+modality-invariant:0.1" -> {"pcl": 1.0, "modality-invariant": 0.1}."""
    out = {}
    for part in text.split("+"):
        name, _, weight = part.partition(":")
        if name in out:
            raise argparse.ArgumentTypeError(f"{name} is named twice; give it one weight")
        if name not in PAIR_WISE and name not in CLASS_WISE:
            raise argparse.ArgumentTypeError(f"unknown loss {name!r}; known: {', '.join([*PAIR_WISE, *CLASS_WISE])}")
        try:
            out[name] = float(weight or 1)
        except ValueError:
            out[name] = math.nan
        if not 0 < out[name] < math.inf:
            raise argparse.ArgumentTypeError(f"weight {weight!r} of {name} is not a positive number")
    return out


# ---------------------------------------------------------------- the model

class CLIP4CMR(nn.Module):
    """Features of each modality -> the common space: Linear(in, hidden) - GELU - Linear(hidden, D) - dropout - unit norm (section 3).

    clip_model: a CLIP, frozen or not, or None where features come from files. widths: (Di, Dt) of the features. It embeds as a CLIP
    does (`encode_image`, `encode_text`), so that eval.py can search with it. `classifier` (C, D) and `prototypes` (C, D) are shared
    by both modalities; their rows are used at unit norm.
    """

    def __init__(self, clip_model, widths, classes, dim=1024, hidden=256, dropout=0.1, fixed=True, seed=0):
        super().__init__()
        mlp = lambda width: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.image_head, self.text_head = mlp(widths[0]), mlp(widths[1])
            self.classifier = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=-1))
            self.prototypes = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=-1), requires_grad=not fixed)
        for name, width in zip(("image", "text"), widths):  # of the training features; not used where these change
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.clip = clip_model
        self.config, self.tokenizer = (clip_model.config, clip_model.tokenizer) if clip_model else (None, None)

    def embed_image(self, features):
        """(A, Di) -> unit-norm float32 (A, D)."""
        return F.normalize(self.image_head((features.float() - self.image_mean) / self.image_std), dim=-1)

    def embed_text(self, features):
        """(C, Dt) -> unit-norm float32 (C, D)."""
        return F.normalize(self.text_head((features.float() - self.text_mean) / self.text_std), dim=-1)

    def encode_image(self, images):
        return self.embed_image(self.clip.encode_image(images))

    def encode_text(self, tokens):
        return self.embed_text(self.clip.encode_text(tokens))


def total_loss(model, weights, images, image_labels, texts, text_labels, alpha=1.0):
    """Weighted sum of losses. images (N, D), texts (M, D): unit-norm, of one batch, of which imbalance may leave either side empty;
    labels (N,), (M,) int64. Class-wise losses add both modalities' (section 3.2)."""
    total = 0.0 * (images.sum() + texts.sum())
    for name, weight in weights.items():
        if name in PAIR_WISE:
            if len(images) and len(texts):
                total = total + weight * PAIR_WISE[name](images, texts, image_labels, text_labels)
            continue
        for x, labels in ((images, image_labels), (texts, text_labels)):
            if not len(x):
                continue
            if name in ("label-regression", "cross-entropy"):
                logits = x @ F.normalize(model.classifier, dim=-1).t()  # (N, C)
                one = losses.label_regression_loss(logits, labels) if name == "label-regression" else F.cross_entropy(logits, labels)
            else:
                prototypes = F.normalize(model.prototypes, dim=-1)
                one = (losses.prototype_contrastive_loss(x, prototypes, labels) if name == "pcl" else losses.proxy_nca_loss(x, prototypes, labels)
                       if name == "proxy-nca" else losses.proxy_anchor_loss(x, prototypes, labels, alpha=alpha))
            total = total + weight * one
    return total


def standardise(model, features, used=None):
    """Set the mean and the deviation that the MLPs' inputs are standardised with to those of the training features.
    used: bool (N,) of images and of texts: the instances that training may see; None: all."""
    for k, (name, array, count) in enumerate((("image", features.images, features.views), ("text", features.texts, features.captions))):
        rows = np.ones(len(array), bool) if used is None else np.repeat(used[k], count)

        def mean(function):
            return sum(function(array[b:b + 4096][rows[b:b + 4096]].astype(np.float64)).sum(0) for b in range(0, len(array), 4096)) / rows.sum()
        centre = mean(lambda part: part)
        std = np.sqrt(mean(lambda part: np.square(part - centre)))  # not from the sum of squares, which rounding swamps
        getattr(model, f"{name}_mean").copy_(torch.from_numpy(centre))
        getattr(model, f"{name}_std").copy_(torch.from_numpy(np.where(std > 1e-6 * np.abs(centre), std, 1.0)))  # a constant column stays 0


@torch.no_grad()
def embed_features(model, features):
    """Unit-norm images (N, D), the renormalised mean over an instance's views, and texts (C, D), all captions; as eval.embed."""
    was_training, device = model.training, model.prototypes.device
    model.eval()
    images, texts = (torch.cat([embed(torch.from_numpy(np.array(array[i:i + 4096])).to(device)) for i in range(0, len(array), 4096)])
                     for embed, array in ((model.embed_image, features.images), (model.embed_text, features.texts)))
    owner = torch.arange(len(features.views), device=device).repeat_interleave(torch.from_numpy(features.views).to(device))
    model.train(was_training)
    return losses.instance_means(images, owner)[0], texts


# ---------------------------------------------------------------- for eval.py

def restore(checkpoint, path):
    """The model of a checkpoint of this script. One with a frozen CLIP holds none of CLIP's weights, but what tells that they are the same."""
    s, inner = checkpoint["settings"], None
    if "clip" in checkpoint:
        inner = clip.load(path, "cpu")[0]
    elif not s["features"]:
        inner = clip.load(s["clip"], "cpu", image_size=s["image_size"])[0]
        check_clip(checkpoint, clip.identity(inner), path)
    state = checkpoint["heads"]
    model = CLIP4CMR(inner, (len(state["image_mean"]), len(state["text_mean"])), len(checkpoint["classes"]), s["dim"], s["hidden"], s["dropout"])
    clip.load_heads(model, state)
    return model


def check_clip(checkpoint, identity, path):
    """Raises CheckpointError where the checkpoint at `path` was made with another frozen CLIP than that of this identity."""
    if checkpoint["clip_identity"] != identity:
        raise clip.CheckpointError(f"{path}: made with the CLIP {checkpoint['clip_identity'][:12]}, but {checkpoint['settings']['clip']} is now {identity[:12]}; "
                                   "put the weights back that it was trained on")


def evaluation(model, checkpoint, name, root, split, amp="auto", workers=0):
    """-> ({"model": metrics, "chance": metrics}, table) of a split. name, root: a data set, or those of the checkpoint's own features."""
    s, classes = checkpoint["settings"], checkpoint["classes"]
    if s["features"]:
        splits, own = data.feature_splits(s["features"], root)
        if own != classes or split not in splits:
            raise data.DataError(f"--features: files with the classes {', '.join(own)[:100]}, splits {', '.join(splits)}; "
                                 f"the model knows {', '.join(classes)[:100]}" if own != classes else f"features have the splits {', '.join(splits)}, not {split!r}")
        features = splits[split]
        rows = eval.class_retrieval(*embed_features(model, features), *features.layout, classes)
    else:
        instances, _ = data.load_split(name, root, split, s["task"], classes)
        tokenizer = model.tokenizer or clip.default_tokenizer()
        if s["finetune"]:
            embedded = eval.embed(model, instances, tokenizer, amp, workers)
        else:
            embedded = embed_features(model, eval.frozen_features(model.clip, instances, classes, tokenizer, s["cache"], amp, workers))
        rows = eval.class_retrieval(*embedded, *data.class_layout(instances, classes), classes)
    lines = [f"{'':16} {'image-to-text':>16} {'text-to-image':>16} {'average':>9}   (mAP over the whole ranking)"]
    lines += [f"{split + ' ' + row:16} {m['image_to_text']['mAP']:16.1f} {m['text_to_image']['mAP']:16.1f} {m['mAP']:9.1f}" for row, m in rows.items()]
    return rows, "\n".join(lines)


def gallery(model, checkpoint, name, root, split, path):
    """Queries both ways with their top results, framed by class."""
    if model.clip is None:
        raise clip.CheckpointError("--gallery: this model was trained on features from files; there are no pictures to show")
    instances, _ = data.load_split(name, root, split, checkpoint["settings"]["task"], checkpoint["classes"])
    images, texts = eval.embed(model, instances, model.tokenizer or clip.default_tokenizer())
    eval.draw_gallery(path, instances, lambda c: images @ texts[c], lambda i: texts @ images[i])


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    rank, world, device = losses.join(args.device)
    first = rank == 0  # the only process that writes
    data.seed_everything(args.seed)
    if device.type == "cpu":
        clip.fast_float32()
    weights = terms(args.loss)

    # data and model
    inner = tokenizer = None
    if args.features:
        splits, classes = data.feature_splits(args.features, args.root)
        train, val = splits["train"], splits["val"]
        widths, labels = (train.images.shape[1], train.texts.shape[1]), train.labels
    else:
        if args.download and first:
            data.load(args.data, args.root, "train", download=True)
        losses.any_process(False, device)  # the others wait for what the first fetches
        instances, tasks = data.load(args.data, args.root, "train")
        args.task = data.choose_task(tasks, args.task, args.data, instances)
        train, classes = data.by_class(instances, tasks, args.task, args.data, "train")
        val, _ = data.load_split(args.data, args.root, "val", args.task, classes)
        data.load_split(args.data, args.root, "test", args.task, classes)  # needed at the end: what is missing is said before training, not after
        if args.clip in clip.SCRATCH:
            tokenizer = clip.Tokenizer.train([c for x in train for c in x.captions], args.vocab_size)
            inner = clip.build(args.clip, tokenizer, args.seed, args.image_size).to(device)
        else:
            inner, _ = clip.load(args.clip, device, image_size=args.image_size)
            tokenizer = inner.tokenizer or clip.default_tokenizer()
        inner.requires_grad_(args.finetune)
        inner.logit_scale.requires_grad_(False)  # no loss here has it
        if args.compile:
            clip.compile_blocks(inner)
        widths, labels = (inner.config.embed_dim,) * 2, data.class_layout(train, classes)[0]
    model = CLIP4CMR(inner, widths, len(classes), args.dim, args.hidden, args.dropout, args.prototypes == "fixed", args.seed).to(device)
    if args.finetune:
        loader = data.Loader(train, tokenizer, inner.config.context_length, inner.config.image_resolution, args.batch_size, 1, 1, train=True,
                             seed=args.seed, workers=args.workers, rank=rank, world=world)
        val_loader, per_epoch = eval.evaluation_loader(inner, val, tokenizer, args.workers), len(loader)
    else:
        if not args.features:
            if not first:
                losses.any_process(False, device)  # the others wait, and read what the first kept
            train, val = (eval.frozen_features(inner, x, classes, tokenizer, args.cache, args.amp, args.workers) for x in (train, val))
            if first:
                losses.any_process(False, device)
        per_epoch = -(-len(train.labels) // args.batch_size)
    labels = torch.from_numpy(labels).to(device)
    used = [torch.zeros(len(labels), dtype=torch.bool, device=device) for _ in range(2)]  # images, texts that training may see
    for k, part in enumerate((args.image_fraction, args.text_fraction)):
        used[k][np.random.default_rng([args.seed, k]).permutation(len(labels))[:max(1, round(part * len(labels)))]] = True
    if not args.finetune:
        standardise(model, train, [rows.cpu().numpy() for rows in used])
    heads = [p for name, p in model.named_parameters() if not name.startswith("clip.") and p.requires_grad]
    groups = [{"params": heads, "peak": args.lr}]
    if args.finetune:
        groups.append({"params": [p for p in inner.parameters() if p.requires_grad], "peak": args.clip_lr})
    optimizer = torch.optim.Adam(groups, lr=args.lr, betas=BETAS, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * per_epoch

    # run: everything that changes is in `state`, the weights and the optimizer, so that a resumed run ends with the same bits
    state = {"step": 0, "best": -1.0, "waited": 0, "loss_sum": 0.0}
    checkpoint = eval.open_run(args.out, vars(args), args.resume, first) if first or args.resume else None
    frozen = {} if args.finetune or args.features else {"clip_identity": clip.identity(inner)}  # instead of its weights, again and again
    if checkpoint:
        if frozen:
            check_clip(checkpoint, frozen["clip_identity"], os.path.join(args.out, "last.pt"))
        clip.load_heads(model, checkpoint["heads"])
        if args.finetune:
            inner.load_state_dict(checkpoint["clip"]["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]

    def save(name):
        own = {"clip": clip.describe(inner)} if args.finetune else frozen
        clip.save_checkpoint(os.path.join(args.out, name), {
            "method": "train_clip4cmr", "settings": vars(args), "classes": classes, "heads": clip.describe_heads(model), **own,
            "optimizer": optimizer.state_dict(), "state": state, "step": state["step"]})

    def rate(step):  # frozen features: constant, as in the paper; a CLIP that is trained: linear warm-up, then half a cosine down to zero
        warm = max(1, int(WARMUP * steps))
        return 1.0 if not args.finetune else (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    if first and not checkpoint:
        save("last.pt")  # from here on there is one to resume from; and a disk that is full is found before any work

    stop, saved = eval.StopSignal(), time.time()
    progress = eval.Progress(steps, state["step"], quiet=not first)
    progress.line(f"{args.data}: {len(labels):,} instances of {len(classes)} classes, {'trained' if args.finetune else 'frozen'} features; "
                  f"at most {steps:,} steps on {device.type}")
    model.train()
    batches = (loader.batches(state["step"], steps) if args.finetune else
               data.feature_batches(train, args.batch_size, args.seed, state["step"], steps, rank, world))
    for batch in batches if state["waited"] < args.patience else ():
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(state["step"])
        data.seed_step(args.seed, state["step"], rank)  # dropout
        if args.finetune:
            batch = data.to_device(batch, device)
            with clip.autocast(args.amp, inner):
                images, texts = inner.encode_image(batch["images"][:, 0]), inner.encode_text(batch["tokens"][:, 0])  # (b, Di), (b, Dt)
        else:
            images, texts = batch["images"].to(device), batch["texts"].to(device)
        index = batch["index"].to(device)
        has_image, has_text = used[0][index], used[1][index]  # (b,): under imbalance some instances lack one or both
        images, image_labels = losses.gather_rows(model.embed_image(images[has_image]), labels[index[has_image]])
        texts, text_labels = losses.gather_rows(model.embed_text(texts[has_text]), labels[index[has_text]])
        loss = total_loss(model, weights, images, image_labels, texts, text_labels, args.proxy_alpha)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # measured, not clipped
        if not math.isfinite(loss.item() + norm.item()):  # before the weights take it up
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {norm.item()} at step {state['step']}; "
                             f"try a lower --lr or --amp off. {args.out}/last.pt is from before")
        optimizer.step()

        state["step"] += 1
        state["loss_sum"] += loss.item()
        progress.step(state["step"], len(index) * world, loss=loss.item())
        epoch, inside = divmod(state["step"], per_epoch)
        if inside == 0:
            record = {"step": state["step"], "epoch": epoch, "loss": state["loss_sum"] / per_epoch}
            if epoch % args.eval_every == 0 or epoch == args.epochs:  # on every process: all of them stop at the same epoch
                embedded = eval.embed(model, val, tokenizer, args.amp, args.workers, val_loader) if args.finetune else embed_features(model, val)
                metrics = eval.class_retrieval(*embedded, *(data.class_layout(val, classes) if args.finetune else val.layout), classes)["model"]
                record["val"] = {"mAP": metrics["mAP"], **{way: metrics[way]["mAP"] for way in ("image_to_text", "text_to_image")}}
                state["waited"] += 1
                if metrics["mAP"] > state["best"]:  # the model is chosen on val, never on test
                    state["best"], state["waited"] = metrics["mAP"], 0
                    if first:
                        save("best.pt")
                if args.finetune:
                    progress.line(f"epoch {epoch}: loss {record['loss']:.3f}, val mAP {metrics['mAP']:.1f}")
            state["loss_sum"] = 0.0
            if first:
                eval.log_line(args.out, **record)
        done = inside == 0 and losses.any_process(state["waited"] >= args.patience, device)
        stopping = losses.any_process(stop.requested, device)  # asked once: a signal after this waits for the next step
        if first and (inside == 0 or time.time() - saved > SAVE_SECONDS or stopping):
            save("last.pt")
            saved = time.time()
        if done:
            progress.line(f"epoch {epoch}: no better val mAP than {state['best']:.1f} in {args.patience} evaluations; stopped")
            break
        if stopping:
            progress.line(f"stopped at step {state['step']}; the same command with --resume goes on")
            raise SystemExit(130)

    if first:
        report(args, device)


def report(args, device):
    """Evaluate best.pt on the test split (primitives: also on configurations never seen in training), print and keep the table."""
    model, _, checkpoint = eval.restore(os.path.join(args.out, "best.pt"), device)
    results = {}
    for split in ("test", "unseen") if args.data == "primitives" and not args.features else ("test",):
        results[split], text = evaluation(model, checkpoint, args.data, args.root, split, args.amp, args.workers)
        print(text)
    eval.write_json(os.path.join(args.out, "metrics.json"), results)
    print(f"written to {os.path.join(args.out, 'metrics.json')}")


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
