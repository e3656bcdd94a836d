"""MXM-CLR: contrastive learning of multifold cross-modal representations (arXiv 2303.10839).

A multifold instance is one thing with several images and several captions: a shape and its rendered views, a
photo and its five captions. CLIP's loss takes one image and one caption of it at a time and calls everything
else negative. MXM-CLR takes several observations of each instance into a batch and trains on all of their
relations at once, with l_ij = s v_i . t_j for image i and text j:

    hard = mean over pairs (i, j) of one instance of
               -log( e^l_ij / (e^l_ij + sum over k of other instances of e^l_ik) )
    soft = cross-entropy of softmax_j(s v_i . t_j), j running over instances,
               against q_i: how alike the instances are, judged with all of their observations
    loss = (1 - lambda) hard + lambda soft, each the mean of both directions

This is a reconstruction from the abstract: the published repository holds no code, and the paper's formulas
could not be consulted.

    python train_mxm.py                                               # built-in shapes, from scratch, minutes
    python train_mxm.py --data flickr8k --root path/to/flickr8k       # photos, five captions each
    python train_mxm.py --data text2shape --download --clip ViT-B/32  # fine-tune a pretrained CLIP
    python train_mxm.py --data mine.jsonl --loss clip --seed 1        # your own data, the baseline
    torchrun --nproc_per_node=2 train_mxm.py                          # the same batch over two processes
    python train_mxm.py --resume                                      # go on where it stopped, to the same bits
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


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--loss", default="hybrid",
                   choices=("hybrid", "hard", "hard-uniform", "soft", "clip", "mil-nce"))
    p.add_argument("--views", type=eval.positive_int,
                   help="images per instance and step (default 2; 1 for --loss clip)")
    p.add_argument("--captions", type=eval.positive_int,
                   help="captions per instance and step (default 2; 1 for --loss clip)")
    p.add_argument("--soft-weight", type=eval.fraction, default=0.5,
                   help="lambda: the soft relation's share of the hybrid loss")
    p.add_argument("--soft-warmup", type=eval.fraction, default=0.5,
                   help="lambda rises from 0 over this share of training")
    p.add_argument("--soft-sharpness", type=eval.positive, default=4.0,
                   help="the softmax of the relation is that much sharper than s alone makes it")
    p.add_argument("--soft-relation", choices=("features", "group"), default="features",
                   help="features: the model's own judgement; group: known, instances of one group are alike")
    args = p.parse_args(argv)
    if args.loss == "clip" and (args.views or 1) != (args.captions or 1):
        p.error("--loss clip pairs an instance's k-th view with its k-th caption: "
                "give --views and --captions the same number (default 1)")
    return eval.complete(args, "mxm", SCRATCH if args.clip in clip.SCRATCH else PRETRAINED)


def observations(args, train):
    """-> (views, captions) to draw of each instance: as asked for, else two where the data has two."""
    default = 1 if args.loss == "clip" else 2
    views = args.views or min(default, max(len(x.images) for x in train))
    captions = args.captions or min(default, max(len(x.captions) for x in train))
    if args.loss == "clip" and min(min(len(x.images), len(x.captions)) for x in train) < views:
        raise data.DataError(f"--loss clip --views {views}: some instances have fewer views or captions; "
                             "pairs need as many of each")
    return views, captions


def total_loss(args, images, texts, scale, image_owner, text_owner, group, soft_weight):
    """The loss that --loss names.

    images (A, D), texts (C, D): unit norm; image_owner (A,), text_owner (C,): the instance that each shows;
    group (instances,): what counts as the same thing; soft_weight: lambda at this step.
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
    if args.soft_relation == "group":
        relation = losses.group_relation(group[image_owner.unique()])  # (N, N), in the order of their numbers
    else:
        relation = losses.soft_relation(*batch, args.soft_sharpness)
    if args.loss == "soft":
        return losses.soft_loss(*batch, relation)
    return losses.mxm_loss(*batch, soft_weight, relation)


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    return clip.load(path, "cpu")[0]


def main(argv=None):
    args = settings(argv)
    rank, world, device = eval.join(args)
    (train, _), (val, _), _ = eval.load_splits(args, device)
    views, captions = observations(args, train)
    model, tokenizer = eval.build_or_load(args, train, device)
    loader = data.Loader(train, tokenizer, model.config.context_length, model.config.image_resolution,
                         args.batch_size, views, captions, train=True, seed=args.seed, workers=args.workers,
                         rank=rank, world=world)
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    group = eval.layout(train)["image_group"].to(device)  # (instances,): equal for what counts as the same
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
    run.say(f"{args.data}: {len(train):,} instances, {views} views x {captions} captions of each per step; "
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{model.config.image_resolution} pixels; {steps:,} steps on {device.type}")
    model.train()
    for step, batch in run.batches(loader):
        for part in optimizer.param_groups:
            part["lr"] = eval.warmup_cosine(step, steps, WARMUP, args.lr)
        batch = data.to_device(batch, device)
        image_mask, caption_mask = batch["image_mask"], batch["caption_mask"]  # (B, V), (B, L)
        with clip.autocast(args.amp, model):
            images = model.encode_image(batch["images"][image_mask])  # (A, D): all views of all instances
            texts = model.encode_text(batch["tokens"][caption_mask])  # (C, D)
        owner = batch["index"][:, None]  # (B, 1): the instance of each row
        images, image_owner = losses.gather_rows(F.normalize(images.float(), dim=-1),
                                                 owner.expand_as(image_mask)[image_mask])
        texts, text_owner = losses.gather_rows(F.normalize(texts.float(), dim=-1),
                                               owner.expand_as(caption_mask)[caption_mask])
        scale = model.logit_scale.exp()
        # at first the features tell no meaningful relation, so lambda rises from 0
        ramp = min(1.0, step / (args.soft_warmup * steps)) if args.soft_warmup else 1.0
        loss = total_loss(args, images, texts, scale, image_owner, text_owner, group, args.soft_weight * ramp)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if run.log(loss, args.batch_size * views, scale=scale.item()):
            metrics = eval.evaluate(model, val, tokenizer, args.amp, args.workers, val_loader)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    if run.first:
        eval.report(args, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
