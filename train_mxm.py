"""MXM-CLR: contrastive learning of multifold cross-modal representations (arXiv 2303.10839).

A multifold instance is one thing with several images and several captions: a shape and its rendered views, a
photo and its five captions. CLIP's loss takes one image and one caption of it at a time and calls everything
else negative. MXM-CLR takes several observations of each instance into a batch and trains on all of their
relations at once. Image a is embedded as v_a, caption c as t_c, and v_i is the mean of instance i's images.
All three have unit norm, s is CLIP's scale, and l_ac = s v_a . t_c:

    hard = mean over pairs (a, c) of one instance of
               -log( e^l_ac / (e^l_ac + sum over captions k of other instances of e^l_ak) )
    soft = cross-entropy of each observation's scores against a row of targets of its own:
               caption c:             softmax_i(s v_i . t_c) against P(i | c) / (sum over i' of P(i' | c))
               image a of instance i: softmax_c(s v_a . t_c) against P(i | c) / (sum over c' of P(i | c'))
    loss = (1 - lambda) hard + lambda soft

Each is the mean of both directions; of hard, the one from images is written out. P(i | c) is how probable it
is that caption c is about instance i. It is a relation of observations: of the captions of one instance, a
vague one fits many other instances and a precise one none. The second target is the first by Bayes' rule:
precise captions get more mass. --soft-relation says where P comes from.

Provenance: multifold instances, hard and soft relations and their hybrid are from the paper's abstract. The
published repository holds no code, and the formulas could not be consulted: those above are a reconstruction.
The relations `words` (the default) and `teacher`, and that lambda rises, are ours (see tests/results.md).

    python train_mxm.py                                               # built-in shapes, from scratch, minutes
    python train_mxm.py --data text2shape                             # fine-tune a pretrained CLIP, ViT-B/32
    python train_mxm.py --data flickr8k --root path/to/flickr8k --clip tiny  # photos, from scratch
    python train_mxm.py --data mine.jsonl --loss clip --seed 1        # your own data, the baseline
    torchrun --nproc_per_node=2 train_mxm.py                          # the same batch over two processes
    python train_mxm.py --resume                                      # go on where it stopped; same bits
"""
import math

import torch
import torch.nn.functional as F

import clip
import data
import eval
import losses

SCRATCH = dict(epochs=14, batch_size=64, lr=1e-3, weight_decay=0.1)  # a small CLIP with random weights
PRETRAINED = dict(epochs=10, batch_size=128, lr=1e-5, weight_decay=0.2)  # fine-tuning a published CLIP
WARMUP = 0.05  # share of the steps in which the learning rate rises
MAX_NORM = 1.0  # of the gradient
WORDS_SHARPNESS = 20.0  # e^-2 of the fit is left where a tenth of a caption's words is missing


def settings(argv=None):
    p = eval.arguments(__doc__, __file__, {"from scratch": SCRATCH, "pretrained": PRETRAINED})
    p.add_argument("--loss", choices=("hybrid", "hard", "soft", "clip"), default="hybrid",
                   help="clip: the baseline, one view and one caption of each instance, all else negative")
    p.add_argument("--views", type=eval.positive_int, default=1, help="images per instance and step")
    p.add_argument("--captions", type=eval.positive_int,
                   help="captions per instance and step (default: 4, or all where there are fewer; as many "
                        "as --views for --loss clip)")
    p.add_argument("--soft-weight", type=eval.fraction, default=0.5,
                   help="lambda: the soft relation's share of the hybrid loss")
    p.add_argument("--soft-warmup", type=eval.fraction, default=0.5,
                   help="lambda rises from 0 over this share of training")
    p.add_argument("--soft-relation", choices=("words", "features", "teacher"), default="words",
                   help="what judges which captions fit which instances: words, those that captions share; "
                        "features, the model's own similarities within the modalities; teacher, another CLIP")
    p.add_argument("--soft-temperature", type=eval.positive, default=0.1,
                   help="divides the similarities of --soft-relation features: the lower, the sharper")
    p.add_argument("--teacher", metavar="CLIP",
                   help="of --soft-relation teacher: best.pt of a run on the same data, or a CLIP as of "
                        "--clip; it is frozen, and reads the training data once")
    args = eval.parse(p, argv)
    if args.loss == "clip" and args.captions not in (None, args.views):
        p.error("--loss clip pairs an instance's k-th view with its k-th caption: "
                "give --views and --captions the same number")
    if (args.soft_relation == "teacher") != (args.teacher is not None):
        p.error("--soft-relation teacher and --teacher belong together: give both or neither")
    return args


def captions_per_step(args, train):
    """How many captions of each instance a step takes. Four by default: they cost less than images."""
    if args.loss != "clip":
        return args.captions or min(4, max(len(x.captions) for x in train))
    fewest = min(min(len(x.images), len(x.captions)) for x in train)
    data.expect(fewest >= args.views, f"--loss clip --views {args.views}",
                f"an instance has {fewest} views or captions, and pairs need as many of each")
    return args.views


# ---------------------------------------------------------------- the loss
# images (A, D) and texts (C, D), of unit norm, are all observations of a batch of N instances. image_owner
# (A,) and text_owner (C,), int64, say which instance each shows; every instance has some of both modalities.

def hard_loss(images, texts, scale, image_owner, text_owner):
    """The hard relation: every pair of one instance is positive, and no positive is another's negative."""
    logits = scale * images @ texts.t()  # l_ac, (A, C)
    positive = image_owner[:, None] == text_owner[None, :]

    def one_direction(logits, positive):
        negatives = logits.masked_fill(positive, -math.inf).logsumexp(1, keepdim=True)
        # -log(a / (a + b)) = softplus(log b - log a)
        return F.softplus(negatives - logits)[positive].mean()
    return one_direction(logits, positive) / 2 + one_direction(logits.t(), positive.t()) / 2


def soft_loss(images, texts, scale, image_owner, relation):
    """The soft relation: every observation is held to a row of targets of its own.

    relation (N, C): log P(i | c) up to a term of c alone, the instances in the order of their numbers.

    Captions of one instance differ in what they fit, so images are compared with each of them. Images of one
    instance do not, so captions are compared with their mean, as in evaluation.
    """
    v, position = losses.instance_means(images, image_owner)  # (N, D), and the row of v of each image (A,)
    to_image = F.cross_entropy(scale * texts @ v.t(), relation.t().softmax(1))
    to_text = F.cross_entropy(scale * images @ texts.t(), relation.softmax(1)[position])
    return (to_image + to_text) / 2


@torch.no_grad()
def features_relation(images, texts, image_owner, text_owner, temperature):
    """log P (N, C) by the model's own judgement within the modalities:

        P(i | c) = softmax over i of (v_i . v_c + t_i . t_c) / (2 temperature)

    t_c is the caption itself, v_c the mean of the images of its instance; v_i and t_i are the means of
    instance i. The relation comes from the very features that it trains: what they cannot tell apart is
    called alike.
    """
    v, _ = losses.instance_means(images, image_owner)
    t, position = losses.instance_means(texts, text_owner)
    alike = (v @ v[position].t() + t @ texts.t()) / 2
    return (alike / temperature).log_softmax(0)


class KnownRelation:
    """relation(instances (N,), captions (C,)) -> log P (N, C) of a relation that is known before training:

        P(i | c) = e^(k score(c, i)) / (sum over all training instances j of e^(k score(c, j)))

    scores: a function (captions (C,), instances (N,)) -> (C, N); sharpness: k. The sums are taken once, over
    captions x instances, in blocks.
    """

    def __init__(self, scores, sharpness, captions, instances, device):
        self.scores = scores
        self.sharpness = sharpness
        log_total = []
        for some in torch.arange(captions, device=device).split(4096):
            parts = [(sharpness * scores(some, part)).logsumexp(1)
                     for part in torch.arange(instances, device=device).split(1024)]
            log_total.append(torch.stack(parts).logsumexp(0))
        self.log_total = torch.cat(log_total)  # (all captions,)

    def __call__(self, instances, captions):
        return (self.sharpness * self.scores(captions, instances) - self.log_total[captions, None]).t()


@torch.no_grad()
def known_relation(args, train, device):
    """The KnownRelation that --soft-relation names, or None where the model itself judges."""
    if args.loss not in ("hybrid", "soft") or args.soft_relation == "features":
        return None
    if args.soft_relation == "teacher":
        teacher, _ = clip.load(args.teacher, device)
        images, texts = eval.embed(teacher, train, args.amp, args.workers)  # once, before training
        sharpness = teacher.logit_scale.exp()

        def scores(captions, instances):
            return texts[captions] @ images[instances].t()
    else:
        scores = data.SharedTerms(*data.word_terms(train), device)
        sharpness = WORDS_SHARPNESS
    return KnownRelation(scores, sharpness, sum(len(x.captions) for x in train), len(train), device)


def total_loss(args, images, texts, scale, image_owner, text_owner, captions, known, soft_weight):
    """The loss that --loss names.

    captions (C,): the number of each text among all captions; known: of `known_relation`; soft_weight: lambda
    at this step.
    """
    if args.loss == "clip":  # row k is a pair, all else is negative, also of the same instance
        return losses.clip_loss(images, texts, scale)
    if args.loss == "hard" or args.loss == "hybrid" and soft_weight == 0:
        return hard_loss(images, texts, scale, image_owner, text_owner)
    if known:
        relation = known(image_owner.unique(), captions)  # (N, C)
    else:
        relation = features_relation(images, texts, image_owner, text_owner, args.soft_temperature)
    if args.loss == "soft":
        return soft_loss(images, texts, scale, image_owner, relation)
    hard = hard_loss(images, texts, scale, image_owner, text_owner)
    return (1 - soft_weight) * hard + soft_weight * soft_loss(images, texts, scale, image_owner, relation)


# ---------------------------------------------------------------- training

def main(argv=None):
    args = settings(argv)
    device = eval.join(args)
    (train, _), (val, _), _ = eval.load_splits(args)
    V, L = args.views, captions_per_step(args, train)
    model = eval.build_or_load(args, train, device)
    loader = eval.training_loader(args, train, model, views=V, captions=L)
    val_loader = eval.evaluation_loader(model, val, args.workers)
    caption_owner = eval.caption_owner(train).to(device)  # (all captions,): the instance of each
    known = known_relation(args, train, device)
    optimizer = torch.optim.AdamW(eval.decayed_groups(model.parameters(), args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)
    run = eval.Run(args, optimizer, steps, len(loader), {"clip": model})
    run.say(eval.about(args, model, loader))
    run.say(f"{args.data}: {len(train):,} instances, {V} views x {L} captions of each per step; "
            f"{steps:,} steps on {device.type}")
    for step, batch in run.batches(loader):
        for part in optimizer.param_groups:
            part["lr"] = eval.warmup_cosine(step, steps, WARMUP, args.lr)
        batch = data.to_device(batch, device)
        image_mask, caption_mask = batch["image_mask"], batch["caption_mask"]  # (B, V), (B, L)
        owner = batch["index"][:, None].expand_as(image_mask)  # (B, V): the instance of each view
        captions = batch["caption"][caption_mask]  # (C,): their numbers among all captions
        with clip.autocast(args.amp, model):
            images = model.encode_image(batch["images"][image_mask])  # (A, D): all views of all instances
            texts = model.encode_text(batch["tokens"][caption_mask])  # (C, D)
        images, image_owner = losses.gather_rows(F.normalize(images.float(), dim=-1), owner[image_mask])
        texts, captions = losses.gather_rows(F.normalize(texts.float(), dim=-1), captions)
        text_owner = caption_owner[captions]
        scale = model.logit_scale.exp()
        # lambda rises from 0: what belongs together is learned first, and features tell no relation before
        ramp = min(1.0, step / (args.soft_warmup * steps)) if args.soft_warmup else 1.0
        loss = total_loss(args, images, texts, scale, image_owner, text_owner, captions, known,
                          args.soft_weight * ramp)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if run.log(loss, args.batch_size * V, scale=scale.item()):
            metrics = eval.evaluate(model, val, args.amp, args.workers, val_loader)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    eval.report(args, device)


def restore(checkpoint):
    """The model of a checkpoint of this script, for eval.py."""
    return clip.from_description(checkpoint["clip"])


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
