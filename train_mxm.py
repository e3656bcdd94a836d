"""MXM-CLR: contrastive learning of multifold cross-modal representations (arXiv 2303.10839).

A multifold instance is one thing with several images and several captions: a shape and its rendered views, a photo and its five
captions. CLIP's loss takes one pair of it at a time and calls everything else negative. MXM-CLR takes several observations of
each instance into a batch and trains on all of their relations at once: hard ones (of one instance: positive) and soft ones
(how alike two instances are, judged with all of their observations). `losses.py` has the equations.

A reconstruction: the published repository holds no code and the paper's formulas could not be consulted, only its abstract.

    python train_mxm.py                                                      # built-in shapes, tiny CLIP from scratch, minutes
    python train_mxm.py --data flickr8k --root path/to/flickr8k              # photos, five captions each
    python train_mxm.py --data text2shape --download --clip ViT-B/32         # fine-tune a pretrained CLIP
    python train_mxm.py --data mine.jsonl --loss clip --seed 1               # your own data, the baseline
    torchrun --nproc_per_node=2 train_mxm.py                                 # the same batch over two processes
    python train_mxm.py --resume                                             # go on after an interruption, to the same bits
"""
import math
import os
import time

import torch
import torch.nn.functional as F

import clip
import data
import eval
import losses

SCRATCH = dict(epochs=14, batch_size=64, lr=1e-3, weight_decay=0.1)  # a small CLIP with random weights
PRETRAINED = dict(epochs=10, batch_size=128, lr=1e-5, weight_decay=0.2)  # fine-tuning a published CLIP
WARMUP, CLIP_GRADIENT, SAVE_SECONDS = 0.05, 1.0, 300  # share of steps; norm; last.pt is written after every epoch and this often


def settings(argv=None):
    p = eval.common_arguments(__doc__)
    p.add_argument("--loss", choices=("hybrid", "hard", "hard-uniform", "soft", "clip", "mil-nce"), default="hybrid")
    p.add_argument("--views", type=eval.positive_int, help="images per instance and step (default 2; 1 for --loss clip)")
    p.add_argument("--captions", type=eval.positive_int, help="captions per instance and step (default 2; 1 for --loss clip)")
    p.add_argument("--soft-weight", type=eval.share, default=0.5, help="lambda: the soft relation's share of the hybrid loss")
    p.add_argument("--soft-warmup", type=eval.share, default=0.5, help="lambda rises from 0 over this share of training")
    p.add_argument("--soft-sharpness", type=eval.positive, default=4.0, help="how much more alike than by s alone instances must be")
    p.add_argument("--soft-relation", choices=("features", "group"), default="features",
                   help="features: the model's own judgement; group: known, instances of one group are alike (an upper bound)")
    p.add_argument("--eval-every", type=eval.positive_int, help="epochs between evaluations on val (default: five in a run)")
    args = p.parse_args(argv)
    for name, value in (SCRATCH if args.clip in clip.SCRATCH else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.loss == "clip" and (args.views or 1) != (args.captions or 1):
        p.error("--loss clip pairs an instance's k-th view with its k-th caption: give --views and --captions the same number (default 1)")
    args.eval_every = args.eval_every or max(1, args.epochs // 5)
    args.out = args.out or os.path.join("runs", f"mxm-{os.path.splitext(os.path.basename(args.data))[0]}")
    return args


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    return clip.load(path, "cpu")[0]


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
    train, _ = data.load(args.data, args.root, "train")
    val, _ = data.load(args.data, args.root, "val")
    data.load(args.data, args.root, "test")  # needed at the end: what is missing is said before training, not after
    most = lambda kind, default: min(default, max(len(getattr(x, kind)) for x in train))
    views = args.views or most("images", 1 if args.loss == "clip" else 2)
    captions = args.captions or most("captions", 1 if args.loss == "clip" else 2)
    if args.loss == "clip" and min(min(len(x.images), len(x.captions)) for x in train) < views:
        raise data.DataError(f"--loss clip --views {views}: some instances have fewer views or captions; pairs need as many of each")

    # model
    if args.clip in clip.SCRATCH:
        tokenizer = clip.Tokenizer.train([c for x in train for c in x.captions], args.vocab_size)
        model = clip.build(args.clip, tokenizer, args.seed, args.image_size).to(device)
    else:
        model, _ = clip.load(args.clip, device, image_size=args.image_size)
        tokenizer = model.tokenizer or clip.default_tokenizer()
    if args.compile:
        clip.compile_blocks(model)
    context, size = model.config.context_length, model.config.image_resolution
    loader = data.Loader(train, tokenizer, context, size, args.batch_size, views, captions, train=True, seed=args.seed,
                         workers=args.workers, rank=rank, world=world)
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    train_group = eval.layout(train)["image_group"].to(device)  # (instances,): equal where they count as the same thing
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # gains, biases, logit_scale: not decayed
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)

    # run: everything that changes is in `state`, the weights and the optimizer, so that a resumed run ends with the same bits
    state = {"step": 0, "best": -1.0, "loss_sum": 0.0}
    checkpoint = eval.open_run(args.out, vars(args), args.resume, first) if first or args.resume else None
    if checkpoint:
        model.load_state_dict(checkpoint["clip"]["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        state = checkpoint["state"]

    def save(name):
        clip.save_checkpoint(os.path.join(args.out, name), {
            "method": "train_mxm", "settings": vars(args), "clip": clip.describe(model), "optimizer": optimizer.state_dict(),
            "state": state, "step": state["step"], "rng": torch.get_rng_state()})

    def learning_rate(step):  # linear warm-up, then half a cosine down to zero
        warm = max(1, int(WARMUP * steps))
        return args.lr * (step + 1) / warm if step < warm else args.lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    if first and not checkpoint:
        save("last.pt")  # from here on there is one to resume from; and a disk that is full is found before any work

    stop, saved = eval.StopSignal(), time.time()
    progress = eval.Progress(steps, state["step"], quiet=not first)
    progress.line(f"{args.data}: {len(train):,} instances, {views} views x {captions} captions of each per step; "
                  f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size} pixels; {steps:,} steps on {device.type}")
    model.train()
    for batch in loader.batches(state["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"])
        batch = data.to_device(batch, device)
        image_mask, caption_mask = batch["image_mask"], batch["caption_mask"]  # (B, V), (B, L)
        with clip.autocast(args.amp, model):
            images = model.encode_image(batch["images"][image_mask])  # (A, D): all views of all instances
            texts = model.encode_text(batch["tokens"][caption_mask])  # (C, D)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        images, image_owner = losses.gather_rows(images, batch["index"][:, None].expand_as(image_mask)[image_mask])
        texts, text_owner = losses.gather_rows(texts, batch["index"][:, None].expand_as(caption_mask)[caption_mask])

        scale = model.logit_scale.exp()
        if args.loss in ("soft", "hybrid"):
            if args.soft_relation == "group":
                relation = losses.group_relation(train_group[image_owner.unique()])  # (N, N), instances in the order of their numbers
            else:
                relation = losses.soft_relation(images, texts, scale, image_owner, text_owner, args.soft_sharpness)
        if args.loss == "hybrid":  # at first the features tell no meaningful relation: lambda rises from 0
            ramp = min(1.0, state["step"] / (args.soft_warmup * steps)) if args.soft_warmup else 1.0
            loss = losses.mxm_loss(images, texts, scale, image_owner, text_owner, args.soft_weight * ramp, relation)
        elif args.loss == "soft":
            loss = losses.soft_loss(images, texts, scale, image_owner, text_owner, relation)
        elif args.loss == "clip":  # the baseline: pairs; a batch's other observations are negatives, those of the same instance too
            loss = losses.clip_loss(images, texts, scale)
        else:
            one = {"hard": losses.hard_loss, "hard-uniform": losses.hard_uniform_loss, "mil-nce": losses.mil_nce_loss}[args.loss]
            loss = one(images, texts, scale, image_owner, text_owner)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights take it up
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {norm.item()} at step {state['step']}; "
                             f"try a lower --lr or --amp off. {args.out}/last.pt is from before")
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

        state["step"] += 1
        state["loss_sum"] += loss.item()
        progress.step(state["step"], args.batch_size * views, loss=loss.item(), scale=scale.item())
        epoch, inside = divmod(state["step"], len(loader))
        if inside == 0 and first:
            record = {"step": state["step"], "epoch": epoch, "loss": state["loss_sum"] / len(loader), "scale": scale.item()}
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                metrics = eval.evaluate(model, val, tokenizer, args.amp, args.workers, val_loader)
                record |= {"val": metrics}
                progress.line(f"epoch {epoch}: loss {record['loss']:.3f}, val R@1 {metrics['text_to_image']['R@1']:.1f} / {metrics['image_to_text']['R@1']:.1f}")
                if metrics["rSum"] > state["best"]:  # the model is chosen on val, never on test
                    state["best"] = metrics["rSum"]
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
    model, tokenizer, _ = eval.restore(os.path.join(args.out, "best.pt"), device)
    results, shapes = {}, args.data in ("primitives", "text2shape")
    for split in ("test", "unseen") if args.data == "primitives" else ("test",):
        instances, _ = data.load(args.data, args.root, split)
        results[split] = eval.retrieval_rows(args.data, *eval.embed(model, instances, tokenizer, args.amp, args.workers), instances)
    eval.write_json(os.path.join(args.out, "metrics.json"), results)
    print(eval.table({f"{split} {row}": metrics for split, rows in results.items() for row, metrics in rows.items()}, shapes))
    if args.data == "primitives":
        for split, rows in results.items():
            found, ceiling = (rows[r]["text_to_image"]["R@1"] for r in ("model", "ceiling"))
            print(f"{split}: {100 * found / ceiling:.0f}% of the ceiling's text-to-shape RR@1")
    print(f"written to {os.path.join(args.out, 'metrics.json')}")


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
