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

Provenance: the two attentions, an MLP for each task, recall at one precision and the question of noise are
from the paper's abstract, the keyless attention e_m from notes of third parties. All else is ours (sizes,
embeddings, sum of losses, schedule): neither the paper nor its authors' code was at hand.

    python train_cmaclip.py                            # built-in shapes: shape, colour, height and width
    python train_cmaclip.py --data products --root path/to/products --clip ViT-B/32
    python train_cmaclip.py --data mine.csv --tasks color,size --freeze --clip ViT-B/32  # CLIP stays as it is
    python train_cmaclip.py --fusion concat            # a baseline; also sequence, modality, image, text
    python train_cmaclip.py --train-noise-text 0.3 --robustness  # learn from wrong texts, test with noise
    torchrun --nproc_per_node=2 train_cmaclip.py       # the same batch over two processes
    python train_cmaclip.py --resume                   # go on where it stopped, to the same bits
"""
from functools import partial

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
    p = eval.arguments(__doc__, __file__, {"from scratch": SCRATCH, "pretrained": PRETRAINED})
    p.add_argument("--tasks", help="comma-separated tasks to learn (default: all that the data has)")
    p.add_argument("--fusion", default="cma",
                   choices=("cma", "sequence", "modality", "concat", "image", "text"),
                   help="cma: both attentions; sequence, modality: one of them; concat: neither; "
                        "image, text: one modality")
    p.add_argument("--freeze", action="store_true", help="leave CLIP's weights as they are")
    p.add_argument("--clip-lr", type=eval.positive, help="peak learning rate of CLIP's own weights")
    p.add_argument("--width", type=eval.positive_int, help="width of the joint sequence (default: CLIP's)")
    p.add_argument("--layers", type=eval.positive_int, default=2, help="layers of sequence-wise attention")
    p.add_argument("--heads", type=eval.positive_int, default=4, help="heads of sequence-wise attention")
    p.add_argument("--dropout", type=eval.fraction, default=0.1,
                   help="dropout in that attention and in the classifiers")
    for kind in ("image", "text"):
        p.add_argument(f"--train-noise-{kind}", type=eval.fraction, default=0.0, metavar="SHARE",
                       help=f"share of a training batch's {kind}s that others of the batch replace")
    p.add_argument("--robustness", action="store_true",
                   help="also test with a quarter, half and all of the images, or of the texts, replaced")
    p.add_argument("--precision", type=eval.positive_fraction, default=0.9,
                   help="recall is also reported at this precision, reached on val")
    args = eval.parse(p, argv)
    if args.freeze and args.clip in clip.SCRATCH:
        p.error(f"--freeze: {args.clip} starts from random weights, which are worth nothing frozen; "
                "give --clip a pretrained one")
    return args


def corrupt(images, tokens, noise):
    """Put in place of a share of a batch's images, and of its texts, those of other rows.

    images (B, 3, S, S), tokens (B, columns) -> the same shapes; noise: (share of the images, of the texts).
    Drawn from torch's global generator: seed it, and a larger share takes in the rows of a smaller one. The
    other row may be of the same instance or class. A batch of one row stays as it is.
    """
    B = len(images)
    rows = torch.arange(B)
    share = torch.tensor(noise, dtype=torch.float64)
    replaced = torch.rand(2, B, dtype=torch.float64) < share[:, None]
    shift = torch.randint(1, max(B, 2), (2, B))  # less than B: never to the row itself
    image_source, text_source = torch.where(replaced, (rows + shift) % B, rows)
    return images[image_source], tokens[text_source]


# ---------------------------------------------------------------- the model and its loss

class CMACLIP(nn.Module):
    """CLIP with sequence-wise and modality-wise attention, or a baseline that leaves some of it out.

    classes: {task: names of its classes}.
    fusion: cma: both attentions. sequence: the summaries of the sequence-wise attention, side by side.
        modality: modality-wise attention over CLIP's own two features. concat: these features, side by side.
        image, text: one of these features.
    width: W, of the joint sequence and the summaries; None: that of CLIP's embedding.
    layers, heads: of the sequence-wise attention. Raises DataError where heads does not divide the width.
    seed: of the random weights.
    """

    def __init__(self, clip_model, classes, fusion="cma", width=None, layers=2, heads=4, dropout=0.1, seed=0):
        super().__init__()
        D = clip_model.config.embed_dim
        W = width or D
        data.expect(W % heads == 0, f"--heads {heads}",
                    f"does not divide the width {W}; choose --heads or --width so that it does")
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
        for classifier, names in zip(self.classifiers, classes.values()):  # for recall at --precision
            classifier.register_buffer("threshold", torch.full((len(names),), torch.inf))
        self.clip = clip_model

    def train(self, mode=True):
        """A frozen CLIP stays in eval mode: BatchNorm would otherwise take up every batch's statistics."""
        super().train(mode)
        self.clip.train(mode and any(p.requires_grad for p in self.clip.parameters()))
        return self

    def sequence(self, images, tokens):
        """Both modalities' tokens as one sequence, as it enters the first layer. Arguments as in `forward`.

        -> x (B, P + L, W): P image tokens, the class token first, then L text tokens, padded after the end
           token; padding bool (B, P + L): what no token may look at.
        """
        _, image_tokens = self.clip.encode_image(images, tokens=True)  # (B, P, D)
        _, text_tokens, mask = self.clip.encode_text(tokens, tokens=True)  # (B, L, D), (B, L)
        L = text_tokens.shape[1]
        image = self.project[0](image_tokens.float()) + self.modality[0] + self.image_position
        text = self.project[1](text_tokens.float()) + self.modality[1] + self.text_position[:L]
        padding = F.pad(~mask, (image.shape[1], 0))  # none among the image tokens
        return torch.cat([image, text], dim=1), padding

    def summaries(self, images, tokens):
        """-> u (B, 2, W): u_image and u_text; of --fusion image and text (B, 1, W): one of them."""
        if self.sequence_wise:
            x, padding = self.sequence(images, tokens)
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=padding)
            end = (~padding).sum(1) - 1  # (B,): the place of each text's end token
            u_image = self.norm[0](x[:, 0])
            u_text = self.norm[1](x[torch.arange(len(x), device=x.device), end])
            return torch.stack([u_image, u_text], dim=1)
        u = []
        if self.fusion != "text":
            u.append(self.norm[0](self.project[0](self.clip.encode_image(images).float())))
        if self.fusion != "image":
            u.append(self.norm[1](self.project[1](self.clip.encode_text(tokens).float())))
        return torch.stack(u, dim=1)

    def forward(self, images, tokens):
        """Classify images (B, 3, S, S) with texts, of which tokens (B, columns) are the ids.

        -> ({task: logits (B, C)}, the weights a (B, tasks, 2), or None where the fusion has none).
        """
        u = self.summaries(images, tokens)
        if self.modality_wise:
            e = torch.einsum("bmw,tmw->btm", u, self.importance)  # e_m = u_m . w_(task, m)
            a = e.softmax(-1)
            features = torch.einsum("btm,bmw->tbw", a, u)  # a_image u_image + a_text u_text
        else:
            a = None
            features = u.flatten(1).expand(len(self.tasks), -1, -1)  # one beside the other, for every task
        logits = {task: mlp(feature) for task, mlp, feature in zip(self.tasks, self.classifiers, features)}
        return logits, a

    @torch.no_grad()
    def attention(self, images, tokens):
        """(B, L, patches): how much each text token looks at each patch in the last layer, whose heads are
        averaged; rows sum to 1."""
        x, padding = self.sequence(images, tokens)
        for layer in self.layers[:-1]:
            x = layer(x, src_key_padding_mask=padding)
        last = self.layers[-1]
        x = last.norm1(x)
        _, weights = last.self_attn(x, x, x, key_padding_mask=padding, need_weights=True)  # (B, P + L, P + L)
        P = len(self.image_position)
        maps = weights[:, P:, 1:P]  # from text tokens to patches; the class token is none
        return maps / maps.sum(-1, keepdim=True)


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


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    device = eval.join(args)
    rank, _ = eval.processes()
    (train, train_classes), (val, _), (test, _) = eval.load_splits(args)
    classes = data.choose_tasks(train_classes, args.tasks, args.data, train)
    val = data.pairs(val, classes)
    for split, part in (("val", val), ("test", data.pairs(test, classes))):
        data.expect(any(max(x.labels.values()) >= 0 for x in part), args.data,
                    f"no instance of split {split!r} has a label of {', '.join(classes)}; label some")
    clip_model = eval.build_or_load(args, train, device).requires_grad_(not args.freeze)
    model = CMACLIP(clip_model, classes, args.fusion, args.width, args.layers, args.heads, args.dropout,
                    args.seed).to(device).train()
    loader = eval.training_loader(args, train, model, views=1, captions=1)
    val_loader = eval.evaluation_loader(model, val, args.workers)
    heads = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    groups = [part | {"peak": args.lr} for part in eval.decayed_groups(heads, args.weight_decay)]
    for part in eval.decayed_groups(clip_model.parameters(), args.weight_decay):
        groups.append(part | {"peak": args.clip_lr})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    steps = args.epochs * len(loader)
    saved = {"clip": clip_model, "heads": model, "classes": classes}
    run = eval.Run(args, optimizer, steps, len(loader), saved)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances, {len(classes)} tasks ({', '.join(classes)}), fusion "
            f"{args.fusion}; {parameters / 1e6:.2f} M trained parameters; {steps:,} steps on {device.type}")
    for step, batch in run.batches(loader):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * eval.warmup_cosine(step, steps, WARMUP)
        data.seed_step(args.seed, step, rank)  # for the corruption and for dropout
        batch = data.to_device(batch, device)
        images, tokens = corrupt(batch["images"][:, 0], batch["tokens"][:, 0],
                                 (args.train_noise_image, args.train_noise_text))
        with clip.autocast(args.amp, clip_model):
            logits, _ = model(images, tokens)
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
            probabilities, labels, weights = eval.predict(model, val_loader, args.amp)
            for task, classifier in zip(classes, model.classifiers):
                threshold = eval.precision_thresholds(probabilities[task], labels[task], args.precision)
                classifier.threshold.copy_(threshold)
            metrics = eval.task_metrics(probabilities, labels, weights)
            accuracy = metrics["mean_of_tasks"]["accuracy"]
            run.keep_best(accuracy, f"val accuracy {accuracy:.1f}, the mean over tasks", val=metrics)
    eval.report(args, device)


# ---------------------------------------------------------------- what eval.py calls

def restore(checkpoint):
    """The model of a checkpoint of this script, for eval.py."""
    s = checkpoint["settings"]
    model = CMACLIP(clip.from_description(checkpoint["clip"]), checkpoint["classes"], s["fusion"], s["width"],
                    s["layers"], s["heads"], s["dropout"])
    clip.load_heads(model, checkpoint["heads"])
    return model


def evaluation(model, checkpoint, args):
    """What the model reaches on a split -> (rows, the text of a table). rows: as in `eval.task_table`."""
    s = checkpoint["settings"]
    classes = checkpoint["classes"]
    instances, _ = data.load(args.data, args.root, args.split, classes=classes)
    pairs = data.pairs(instances, classes)
    data.expect(pairs, args.data, "no captions; this model judges pictures together with their texts")
    thresholds = [classifier.threshold.cpu() for classifier in model.classifiers]
    loader = eval.evaluation_loader(model, pairs, args.workers)
    probabilities, labels, weights = eval.predict(model, loader, args.amp)
    rows = {"model": eval.task_metrics(probabilities, labels, weights, thresholds),
            "majority": eval.majority(labels)}
    if s["robustness"]:
        order = np.random.default_rng(s["seed"]).permutation(len(pairs))  # neighbours are often alike
        loader = eval.evaluation_loader(model, [pairs[i] for i in order], args.workers)
        rows["noise"] = {"image": {}, "text": {}}
        for share in NOISE:
            for kind, noise in (("image", (share, 0.0)), ("text", (0.0, share))):
                predictions = eval.predict(model, loader, args.amp, partial(corrupt, noise=noise), s["seed"])
                rows["noise"][kind][str(share)] = eval.task_metrics(*predictions, thresholds)
    if args.gallery:
        eval.draw_predictions(args.gallery, pairs, probabilities, labels, classes)
    text = eval.task_table(args.split, rows, classes, s["precision"])
    text += f"\n{args.split}: {len(instances):,} instances, {len(pairs):,} pairs of image and text"
    if s["fusion"] == "cma":
        text += ("\nimage weight: in cma both summaries have seen image and text, so this is not how far a "
                 "task relies on the picture")
    return rows, text


def attention_picture(model, checkpoint, args, path):
    """Draw where each word of a few pairs looks in the picture, and how each task weighs image and text."""
    if not (model.sequence_wise or model.modality_wise):
        raise clip.CheckpointError(f"--attention: --fusion {model.fusion} has no attention between the "
                                   "modalities; cma, sequence and modality do")
    instances, _ = data.load(args.data, args.root, args.split, classes=checkpoint["classes"])
    eval.draw_attention(path, model, data.pairs(instances, checkpoint["classes"]))


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
