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

Provenance. The paper's, from its abstract: multifold instances, hard and soft relations, their hybrid. The
published repository holds no code, and the paper's formulas could not be consulted: all formulas above are a
reconstruction, and so is the relation `features`. Ours, not the paper's: the relations `words` (the default,
since it helps where `features` does harm: tests/results.md), `teacher` and `oracle`, and that lambda rises.
Others': hard-uniform and mil-nce, with their sources in losses.py.

    python train_mxm.py                                               # built-in shapes, from scratch, minutes
    python train_mxm.py --data flickr8k --root path/to/flickr8k       # photos, five captions each
    python train_mxm.py --data text2shape --clip ViT-B/32             # fine-tune a pretrained CLIP
    python train_mxm.py --data mine.jsonl --loss clip --seed 1        # your own data, the baseline
    torchrun --nproc_per_node=2 train_mxm.py                          # the same batch over two processes
    python train_mxm.py --resume                                      # go on where it stopped; same bits
"""
import collections
import math
import time

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
ORACLE_SHARPNESS = 200.0  # nothing is left where an attribute is missing
SHAPES = ("primitives", "primitives-source", "primitives-target")  # of these the true relation is known


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--loss", default="hybrid",
                   choices=("hybrid", "hard", "hard-uniform", "soft", "clip", "mil-nce"))
    p.add_argument("--views", type=eval.positive_int,
                   help="images per instance and step (default 1)")
    p.add_argument("--captions", type=eval.positive_int,
                   help="captions per instance and step (default 4, or all where there are fewer; "
                        "1 for --loss clip)")
    p.add_argument("--soft-weight", type=eval.fraction, default=0.5,
                   help="lambda: the soft relation's share of the hybrid loss")
    p.add_argument("--soft-warmup", type=eval.fraction, default=0.5,
                   help="lambda rises from 0 over this share of training")
    p.add_argument("--soft-relation", choices=("words", "features", "teacher", "oracle"), default="words",
                   help="what judges which captions fit which images: words, those that captions share; "
                        "features, the model's own similarities within the modalities; teacher, another "
                        "CLIP; oracle, the attributes that are stated (built-in shapes)")
    p.add_argument("--soft-temperature", type=eval.positive, default=0.1,
                   help="of the similarities in --soft-relation features")
    p.add_argument("--teacher", metavar="CLIP",
                   help="of --soft-relation teacher: best.pt of a run on the same data, or a CLIP as of "
                        "--clip; it is frozen, and reads the training data once")
    args = eval.parse(p, argv)
    if args.loss == "clip" and (args.views or 1) != (args.captions or 1):
        p.error("--loss clip pairs an instance's k-th view with its k-th caption: "
                "give --views and --captions the same number (default 1)")
    if (args.soft_relation == "teacher") != (args.teacher is not None):
        p.error("--soft-relation teacher and --teacher belong together: give both or neither")
    if args.soft_relation == "oracle" and args.data not in SHAPES:
        p.error(f"--soft-relation oracle: what fits is known for {', '.join(SHAPES)} only; "
                "words needs nothing but captions")
    return eval.complete(args, "mxm", SCRATCH if args.clip in clip.SCRATCH else PRETRAINED)


def observations(args, train):
    """-> (views, captions) to draw of each instance: as asked for, else one view and up to four captions.

    At as many images, one view each of more instances teaches more than two views each of fewer, and captions
    cost less than images.
    """
    views = args.views or 1
    most = 1 if args.loss == "clip" else 4
    captions = args.captions or min(most, max(len(x.captions) for x in train))
    if args.loss == "clip" and min(min(len(x.images), len(x.captions)) for x in train) < views:
        raise data.DataError(f"--loss clip --views {views}: some instances have fewer views or captions; "
                             "pairs need as many of each")
    return views, captions


# ---------------------------------------------------------------- relations that are known before training

class SharedTerms:
    """scores(captions (C,), instances (N,)) -> (C, N) in 0..1: the share of a caption's terms that each
    instance has, where rare terms count more:

        score of caption c and instance j = sum of idf(w) over the terms of c that j has / sum over all of c's
        idf(w) = log((instances + 1) / instances that have w)

    of_captions, of_instances: lists of lists of terms, as of data.word_terms.
    """

    def __init__(self, of_captions, of_instances, device):
        count = collections.Counter(term for terms in of_instances for term in terms)
        number = {term: k for k, term in enumerate(count)}

        def padded(rows):
            out = torch.full((len(rows), max(map(len, rows))), len(number), dtype=torch.int32)
            for numbers, terms in zip(out.numpy(), rows):
                numbers[:len(terms)] = [number[term] for term in terms]
            return out.to(device)
        self.captions = padded(of_captions)
        self.instances = padded(of_instances)
        idf = [math.log((len(of_instances) + 1) / count[term]) for term in number]
        self.idf = torch.tensor([*idf, 0.0], device=device)  # the last one pads

    def __call__(self, captions, instances):
        terms = self.captions[captions].long()  # (C, most terms)
        weight = self.idf[terms]
        weight = weight / weight.sum(1, keepdim=True)
        has = torch.zeros(len(self.idf), len(instances), device=terms.device)  # (terms, N)
        has[self.instances[instances].long().t(), torch.arange(len(instances), device=terms.device)] = 1
        return F.embedding_bag(terms, has, per_sample_weights=weight, mode="sum")


class KnownRelation:
    """relation(instances (N,), captions (C,)) -> log P (N, C): how probable it is that caption c is about
    instance i, of all training instances j:

        P(i | c) = e^(k score(c, i)) / (sum over j of e^(k score(c, j)))

    scores: a function like SharedTerms; sharpness: k. The sums are taken once, over captions x instances, in
    blocks: of a million of each they need little memory, but hours.
    """

    def __init__(self, scores, sharpness, captions, instances, device):
        self.scores = scores
        self.sharpness = sharpness
        log_total = []
        began = time.perf_counter()
        for some in torch.arange(captions, device=device).split(4096):
            parts = [(sharpness * scores(some, part)).logsumexp(1)
                     for part in torch.arange(instances, device=device).split(1024)]
            log_total.append(torch.stack(parts).logsumexp(0).cpu())
            hours = (time.perf_counter() - began) / 3600 * captions / len(some)
            if len(log_total) == 1 and hours > 0.1:
                data.note(f"the relation is summed over {captions:,} captions x {instances:,} instances, "
                          f"which takes about {hours:.1f} hours; --loss hard needs no relation")
        self.log_total = torch.cat(log_total).to(device)  # (all captions,)

    def __call__(self, instances, captions):
        return (self.sharpness * self.scores(captions, instances) - self.log_total[captions, None]).t()


@torch.no_grad()
def known_relation(args, train, device):
    """The KnownRelation that --soft-relation names, or None where the model itself judges."""
    if args.loss not in ("hybrid", "soft") or args.soft_relation == "features":
        return None
    if args.soft_relation == "teacher":
        teacher, _ = clip.load(args.teacher, device)
        tokenizer = teacher.tokenizer or clip.default_tokenizer()
        images, texts = eval.embed(teacher, train, tokenizer, args.amp, args.workers)  # once, before training
        sharpness = teacher.logit_scale.exp()

        def scores(captions, instances):
            return texts[captions] @ images[instances].t()
    elif args.soft_relation == "oracle":
        scores = SharedTerms(*data.attribute_terms(train), device)
        sharpness = ORACLE_SHARPNESS
    else:
        scores = SharedTerms(*data.word_terms(train), device)
        sharpness = WORDS_SHARPNESS
    return KnownRelation(scores, sharpness, sum(len(x.captions) for x in train), len(train), device)


# ---------------------------------------------------------------- the loss

def total_loss(args, images, texts, scale, image_owner, text_owner, captions, known, soft_weight):
    """The loss that --loss names.

    images (A, D), texts (C, D): unit norm; image_owner (A,), text_owner (C,): the instance that each shows;
    captions (C,): the number of each text among all captions; known: of `known_relation`; soft_weight: lambda
    at this step.
    """
    batch = (images, texts, scale, image_owner, text_owner)
    if args.loss == "clip":  # the baseline: row k is a pair, all else is negative, also of the same instance
        return losses.clip_loss(images, texts, scale)
    if args.loss == "hard":
        return losses.hard_loss(*batch)
    if args.loss == "hard-uniform":
        return losses.hard_uniform_loss(*batch)
    if args.loss == "mil-nce":
        return losses.mil_nce_loss(*batch)
    if known:
        relation = known(image_owner.unique(), captions)  # (N, C)
    else:
        relation = losses.soft_relation(images, texts, image_owner, text_owner, args.soft_temperature)
    if args.loss == "soft":
        return losses.soft_loss(images, texts, scale, image_owner, relation)
    return losses.mxm_loss(*batch, soft_weight, relation)


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    return clip.load(path, "cpu")[0]


def main(argv=None):
    args = settings(argv)
    rank, world, device = eval.join(args)
    (train, _), (val, _), _ = eval.load_splits(args, device)
    V, L = observations(args, train)
    model, tokenizer = eval.build_or_load(args, train, device)
    loader = data.Loader(train, tokenizer, model.config.context_length, model.config.image_resolution,
                         args.batch_size, V, L, train=True, seed=args.seed, workers=args.workers,
                         rank=rank, world=world, crop=args.crop)
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    caption_owner = eval.caption_owner(train).to(device)  # (all captions,): the instance of each
    known = known_relation(args, train, device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # gains, biases, logit_scale: not decayed
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)

    def pack():
        return {"clip": clip.describe(model)}

    def unpack(checkpoint):
        model.load_state_dict(checkpoint["clip"]["state_dict"])

    run = eval.Run(args, "train_mxm", optimizer, steps, len(loader), pack, unpack)
    run.say(eval.about(args, model, loader))
    run.say(f"{args.data}: {len(train):,} instances, {V} views x {L} captions of each per step; "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{model.config.image_resolution} pixels; {steps:,} steps on {device.type}")
    model.train()
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
            metrics = eval.evaluate(model, val, tokenizer, args.amp, args.workers, val_loader)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    eval.report(args, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
