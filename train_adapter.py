"""Cross-Modal Adapter: parameter-efficient transfer of CLIP to text-video retrieval (Pattern Recognition 159, arXiv 2211.09623).

CLIP is frozen. Small bottlenecks are inserted into every block of both encoders, after attention and after the MLP, and a part of each
is one matrix shared by the two encoders, so that the modalities interact from the first layer on without either waiting for the
other. Half a percent of the weights is trained. A video is compared with a text through the frames that fit it, without further weights.

    python train_adapter.py                                                   # built-in shapes: pretrain a tiny CLIP, adapt it to others
    python train_adapter.py --data msrvtt --root path/to/msrvtt --clip ViT-B/32           # the paper's setting
    python train_adapter.py --data activitynet --root path/to/activitynet --clip ViT-B/32 --frames 64 --context 64 --epochs 20 --share 512
    python train_adapter.py --data mine.jsonl --clip ViT-B/32 --tune full     # baselines: adapter-unshared, full, head, bitfit, prompt
    torchrun --nproc_per_node=2 train_adapter.py                              # the same batch over two processes
    python train_adapter.py --resume                                          # go on after an interruption, to the same bits
"""
import argparse
import math
import os
import time
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=5, batch_size=128, lr=1e-5, weight_decay=0.2)  # the paper's
SCRATCH = dict(epochs=20, batch_size=32, lr=1e-2, weight_decay=0.2)  # a tiny CLIP, pretrained here
WARMUP, CLIP_GRADIENT, TAU, CONTEXT, SAVE_SECONDS = 0.1, 1.0, 5.0, 32, 300  # share of steps; norm; of the frames' softmax; tokens; last.pt at least this often


def settings(argv=None):
    p = eval.common_arguments(__doc__, data="primitives-target")
    p.add_argument("--tune", choices=("adapter", "adapter-unshared", "full", "head", "bitfit", "prompt"), default="adapter",
                   help="what is trained: adapters with or without sharing; everything; the projections; biases; prompts")
    p.add_argument("--rank", type=eval.positive_int, default=8, help="r, width of the bottleneck")
    p.add_argument("--share", type=eval.whole, default=16, help="d_s, output channels of the matrix that both encoders share")
    p.add_argument("--prompts", type=eval.positive_int, default=8, help="learned tokens in each encoder, for --tune prompt")
    p.add_argument("--frames", type=eval.positive_int, default=12, help="images of an instance, evenly taken (paper: 12; paragraphs 64)")
    p.add_argument("--context", type=eval.positive_int, help="tokens of a text (default 32, or what the CLIP has; paragraphs 64)")
    p.add_argument("--pretrain-epochs", type=eval.positive_int, default=12, help="of --clip tiny or small on primitives-source, before it is adapted")
    p.add_argument("--train-metrics", action="store_true", help="evaluate training instances too, as many as val has (train and validation curves)")
    p.add_argument("--eval-every", type=eval.positive_int, help="epochs between evaluations on val (default: five in a run)")
    args = p.parse_args(argv)
    for name, value in (SCRATCH if args.clip in clip.SCRATCH else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.clip in clip.SCRATCH and args.data != "primitives-target":
        p.error(f"--clip {args.clip} has nothing to adapt: give a pretrained one (only with --data primitives-target is it pretrained here)")
    args.eval_every = args.eval_every or max(1, args.epochs // 5)
    args.out = args.out or os.path.join("runs", f"adapter-{os.path.splitext(os.path.basename(args.data))[0]}")
    return args


# ---------------------------------------------------------------- what is trained

class Adapters(nn.Module):
    """h + [z W_unique, z W_share] with z = QuickGELU(h W_down), for the output h of attention and of the MLP in every block of both encoders
    (section 3.2). W_share (r, share) gives the last channels and is one matrix for both encoders per layer and place, or with
    shared=False one for each; share is 0 up to the narrower encoder's width. Layers that only the deeper encoder has share with none."""

    def __init__(self, model, rank, share, shared=True):
        super().__init__()
        self.down, self.unique, self.share, self.shared = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict(), shared
        for key, module in branches(model):
            width = module_width(model, key)
            self.down[key] = nn.Linear(width, rank)
            if share < width:
                self.unique[key] = nn.Linear(rank, width - share)
            if share and self.share_key(key) not in self.share:
                self.share[self.share_key(key)] = nn.Linear(rank, share)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)

    def share_key(self, key):
        return key.split("_", 1)[1] if self.shared else key

    def forward(self, key, h):
        z = self.down[key](h)
        z = z * torch.sigmoid(1.702 * z)
        parts = [layers[name](z) for layers, name in ((self.unique, key), (self.share, self.share_key(key))) if name in layers]
        return h + torch.cat(parts, dim=-1)

    def attach(self, model):
        """Insert into a CLIP. Returns handles, whose remove() takes the adapters out again."""
        return [module.register_forward_hook(lambda _, inputs, h, key=key: self(key, h)) for key, module in branches(model)]


def branches(model):
    """("image_0_attn", the module), ...: the residual branches of both encoders of a ViT CLIP."""
    for side, encoder in (("image", model.visual), ("text", model)):
        for i, block in enumerate(encoder.transformer.resblocks):
            yield f"{side}_{i}_attn", block.attn
            yield f"{side}_{i}_mlp", block.mlp


def module_width(model, key):
    return model.config.vision_width if key.startswith("image") else model.config.transformer_width


class Prompts(nn.Module):
    """A baseline: learned tokens after the start symbol of every text (CoOp) and after the class token of every image (VPT, shallow).
    Texts come with as many start symbols more, whose embeddings are replaced."""

    def __init__(self, model, count):
        super().__init__()
        self.image, self.text = (nn.Parameter(0.02 * torch.randn(count, width)) for width in (model.config.vision_width, model.config.transformer_width))

    def attach(self, model):
        def text(_, inputs, x):
            return x.index_copy(0, self.at, self.text.to(x.dtype).repeat(len(self.at) // len(self.text), 1))

        def image(_, inputs, x):
            return torch.cat([x, self.image.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        return [model.token_embedding.register_forward_hook(text), model.visual.ln_pre.register_forward_hook(image)]

    def extend(self, tokens):
        """Token rows with more start symbols; `at` is where these stand in the list of real tokens that CLIP packs all texts into."""
        count = len(self.text)
        tokens = torch.cat([tokens[:, :1].expand(-1, count), tokens], dim=1)
        lengths = tokens.argmax(1) + 1
        self.at = ((lengths.cumsum(0) - lengths)[:, None] + torch.arange(1, count + 1, device=tokens.device)).flatten()
        return tokens


class Tuned(nn.Module):
    """A frozen CLIP and what is trained on it; embeds as a CLIP does. `trained()` is what a checkpoint holds."""

    def __init__(self, model, tune="adapter", rank=8, share=16, prompts=8, seed=0):
        super().__init__()
        c = model.config
        if c.vision_patch_size is None and tune in ("adapter", "adapter-unshared", "prompt"):
            raise clip.CheckpointError(f"--tune {tune} goes into transformer blocks, and this CLIP's image encoder is a ResNet; "
                                       "give a ViT (ViT-B/32, ...), or choose --tune full, head or bitfit")
        if share > min(c.vision_width, c.transformer_width) and tune.startswith("adapter"):
            raise clip.CheckpointError(f"--share {share} is more than an encoder's width (images {c.vision_width}, texts {c.transformer_width}); "
                                       f"choose {min(c.vision_width, c.transformer_width)} or less")
        if getattr(model, "tuned", False):
            raise clip.CheckpointError("this CLIP carries adapters or prompts already, or was trained itself: detach() them first, or load it anew")
        self.prompts = prompts if tune == "prompt" else 0
        if self.prompts > c.context_length - 3:  # start, a word, end
            raise clip.CheckpointError(f"--prompts {prompts}: this CLIP has {c.context_length} positions for a text; choose {c.context_length - 3} or less")
        self.config, self.tokenizer = replace(c, context_length=c.context_length - self.prompts), model.tokenizer  # prompts take up positions
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.extra = (Adapters(model, rank, share, tune == "adapter") if tune.startswith("adapter") else Prompts(model, prompts) if tune == "prompt" else None)
        for name, p in model.named_parameters():
            p.requires_grad_(name != "logit_scale" and (tune == "full" or tune == "bitfit" and p.ndim == 1 and name.endswith("bias") or
                             tune == "head" and (name in ("visual.proj", "text_projection") or name.startswith("visual.attnpool.c_proj"))))
        self.clip, model.tuned = model, True
        self.handles = self.extra.attach(model) if self.extra is not None else []

    def detach(self):
        """Take adapters or prompts out of the CLIP: it computes what it did before."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.clip.tuned = [], self.extra is None

    def encode_image(self, images):
        return self.clip.encode_image(images)

    def encode_text(self, tokens):
        return self.clip.encode_text(self.extra.extend(tokens) if self.prompts else tokens)

    def trained(self):
        """{name: tensor} of the trained weights, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, state):
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys() or any(own[name].shape != value.shape for name, value in state.items()):
            raise clip.CheckpointError("the checkpoint's trained weights are not this model's; were --tune, --rank or --share others?")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


# ---------------------------------------------------------------- videos and texts

def as_videos(rows, mask):
    """Rows of frames (A, D), in order -> (N, V, D), zero where mask (N, V) has none."""
    return rows.new_zeros(mask.numel(), rows.shape[1]).index_copy(0, mask.flatten().nonzero()[:, 0], rows).view(*mask.shape, -1)


def similarity(texts, frames, mask, tau=TAU):
    """Query-aware similarity (section 3.4), without weights. texts (C, D) and frames (N, V, D), not unit-norm; mask (N, V).
    alpha_j = t . f_j, v = sum_j softmax(alpha / tau)_j f_j -> cosines of t and v, (C, N). With one frame: the plain cosine.

    v itself, (C, N, D), is never made: t . v = sum_j w_j alpha_j and |v|^2 = w G w with the frames' products G (N, V, V).
    """
    texts, frames = texts.float(), frames.float()
    alpha = torch.einsum("cd,nvd->cnv", texts, frames)
    weights = (alpha / tau).masked_fill(~mask, -math.inf).softmax(-1)
    products = frames @ frames.transpose(1, 2)
    length = torch.einsum("cnv,nvw,cnw->cn", weights, products, weights).clamp(min=1e-12).sqrt()
    return (weights * alpha).sum(-1) / (length * texts.norm(dim=1, keepdim=True).clamp(min=1e-6))


def total_loss(texts, frames, mask, scale):
    """CLIP's symmetric cross-entropy with the query-aware similarity; text i belongs to video i. Shapes as in `similarity`."""
    logits, target = scale * similarity(texts, frames, mask), torch.arange(len(texts), device=texts.device)  # (B, B): texts x videos
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def embed(model, loader, amp):
    """-> frames (N, V, D), mask (N, V), texts (C, D), as the encoders give them."""
    found = [(as_videos(rows, mask), mask) for rows, mask in eval.encode_images(model, loader, amp)]
    most = max(mask.shape[1] for _, mask in found)
    frames = torch.cat([F.pad(x, (0, 0, 0, most - x.shape[1])) for x, _ in found])
    return frames, torch.cat([F.pad(mask, (0, most - mask.shape[1])) for _, mask in found]), torch.cat(list(eval.encode_texts(model, loader, amp)))


@torch.no_grad()
def video_metrics(frames, mask, texts, at):
    """eval.retrieval_metrics with the query-aware similarity, in blocks: texts x videos x frames is never whole in memory."""
    asked, block = texts[at["text_query"].to(texts.device)], max(1, eval.BLOCK // mask.numel())

    def of_texts(begin, end):
        return torch.cat([similarity(asked[b:min(b + block, end)], frames, mask) for b in range(begin, min(end, len(asked)), block)])

    def of_videos(begin, end):
        which = at["image_query"].nonzero()[:, 0][begin:end].to(texts.device)
        step = max(1, eval.BLOCK // (len(texts) * mask.shape[1]))
        return torch.cat([similarity(texts, frames[part], mask[part]).t() for part in which.split(step)])
    group = (at["text_group"], at["image_group"])
    t2v = eval.ranking_metrics(of_texts, group[0][at["text_query"]], group[1])
    v2t = eval.ranking_metrics(of_videos, group[1][at["image_query"]], group[0])
    return {"text_to_image": t2v, "image_to_text": v2t, "rSum": sum(d[f"R@{k}"] for d in (t2v, v2t) for k in (1, 5, 10))}


def loader_of(model, instances, tokenizer, args, batch_size, **more):
    most = model.config.context_length
    if (args.context or 0) > most:
        raise data.DataError(f"--context {args.context}: this CLIP has {most} positions for a text"
                             + (f" beside {model.prompts} prompts" if model.prompts else "") + f"; choose {most} or less")
    return data.Loader(instances, tokenizer, args.context or min(CONTEXT, most), model.config.image_resolution, batch_size, frames=args.frames, **more)


def evaluation_loader(model, instances, tokenizer, args):
    """In order; a batch holds about 256 frames."""
    return loader_of(model, instances, tokenizer, args, max(1, 256 // args.frames), workers=args.workers)


# ---------------------------------------------------------------- for eval.py

def clip_of(settings, folder):
    """The path or name of the CLIP that a run adapts. One that is pretrained here lies beside the folder of the run: others use it too."""
    if settings["clip"] not in clip.SCRATCH:
        return settings["clip"]
    what = [settings[k] for k in ("clip", "pretrain_epochs", "image_size", "vocab_size", "seed")]
    return os.path.join(os.path.dirname(os.path.abspath(folder)), "-".join(["clip", *(str(x) for x in what if x is not None)]) + ".pt")


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py: the CLIP it belongs to, with what was trained."""
    s = checkpoint["settings"]
    return onto(clip.load(clip_of(s, os.path.dirname(path)), "cpu", image_size=s["image_size"])[0], checkpoint, path)


def onto(model, checkpoint, path="the checkpoint"):
    """Put a checkpoint's trained weights onto a CLIP in memory -> Tuned. Several can be put on in turn, each after the former's
    `detach()`; --tune full, head and bitfit change the CLIP itself, so nothing can follow them. Raises CheckpointError for another CLIP."""
    s, found = checkpoint["settings"], clip.identity(model)
    if found != checkpoint["clip_identity"]:
        raise clip.CheckpointError(f"{path} belongs to the CLIP {checkpoint['clip_identity'][:12]}, and {s['clip']} is {found[:12]}; "
                                   "give the weights that it was trained on")
    tuned = Tuned(model, s["tune"], s["rank"], s["share"], s["prompts"])
    try:
        tuned.load_trained(checkpoint["trained"])
    except clip.CheckpointError:
        tuned.detach()
        raise
    return tuned


def embedded(model, checkpoint, name, root, split, amp, workers):
    """-> instances of a split and what `embed` gives of them."""
    args = argparse.Namespace(**checkpoint["settings"] | {"workers": workers})
    instances, _ = data.load(name, root, split)
    return instances, embed(model, evaluation_loader(model, instances, model.tokenizer or clip.default_tokenizer(), args), amp)


def evaluation(model, checkpoint, name, root, split, amp="auto", workers=0):
    """-> ({"model", "chance": metrics}, table) of a split."""
    instances, found = embedded(model, checkpoint, name, root, split, amp, workers)
    rows = {"model": video_metrics(*found, eval.layout(instances)), **eval.bounds("", instances)}
    return rows, eval.table({f"{split} {row}": metrics for row, metrics in rows.items()})


def gallery(model, checkpoint, name, root, split, path, amp="auto", workers=0):
    """Write a picture of queries and what they find, one frame of each video."""
    instances, (frames, mask, texts) = embedded(model, checkpoint, name, root, split, amp, workers)
    eval.draw_gallery(path, instances, lambda c: similarity(texts[c:c + 1], frames, mask)[0], lambda i: similarity(texts, frames[i:i + 1], mask[i:i + 1])[:, 0])


# ---------------------------------------------------------------- training

def pretrain(args, path, device):
    """Train a small CLIP on the source part of the built-in shapes with CLIP's own loss: what is adapted to the other part."""
    instances, _ = data.load("primitives-source")
    tokenizer = clip.Tokenizer.train([c for x in instances for c in x.captions], args.vocab_size)
    model = clip.build(args.clip, tokenizer, args.seed, args.image_size).to(device).train()
    loader = data.Loader(instances, tokenizer, model.context_length, model.config.image_resolution, 128, 1, 1, train=True, seed=args.seed, workers=args.workers)
    optimizer, steps = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True), args.pretrain_epochs * len(loader)
    progress = eval.Progress(steps)
    progress.line(f"{args.clip} starts from scratch: it is trained on {len(instances):,} shapes of primitives-source first, {steps:,} steps, and kept as {path}")
    for step, batch in enumerate(loader.batches(0, steps)):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        batch = data.to_device(batch, device)
        with clip.autocast(args.amp, model):
            images, texts = model.encode_image(batch["images"][:, 0]), model.encode_text(batch["tokens"][:, 0])
        loss = losses.clip_loss(F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1), model.logit_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT)
        optimizer.step()
        progress.step(step + 1, len(images), loss=loss.item())
    clip.save_checkpoint(path, {"method": "train_mxm", "settings": {}, "clip": clip.describe(model), "step": steps})


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

    # model
    path = clip_of(vars(args), args.out)
    if args.clip in clip.SCRATCH and first and not os.path.exists(path):
        with torch.device("meta"):  # what cannot be tuned is said before pretraining, not after
            Tuned(clip.CLIP(clip.MODELS[args.clip][0]), args.tune, args.rank, args.share, args.prompts)
        pretrain(args, path, device)
    losses.any_process(False, device)  # the others wait for it
    inner, _ = clip.load(path, device, image_size=args.image_size)
    identity, total = clip.identity(inner), sum(p.numel() for p in inner.parameters())
    tokenizer = inner.tokenizer or clip.default_tokenizer()
    model = Tuned(inner, args.tune, args.rank, args.share, args.prompts, args.seed).to(device)
    if args.compile:
        clip.compile_blocks(inner)
    loader = loader_of(model, train, tokenizer, args, args.batch_size, captions=1, train=True, seed=args.seed, workers=args.workers, rank=rank, world=world)
    watched = {"val": val} | ({"train": train[:len(val)]} if args.train_metrics else {})  # evaluated during training
    watched = {split: (evaluation_loader(model, instances, tokenizer, args), eval.layout(instances)) for split, instances in watched.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW([{"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
                                   {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = args.epochs * len(loader)

    # run: everything that changes is in `state`, the trained weights and the optimizer, so that a resumed run ends with the same bits
    state = {"step": 0, "best": -1.0, "loss_sum": 0.0}
    checkpoint = eval.open_run(args.out, vars(args), args.resume, first) if first or args.resume else None
    if checkpoint:
        if checkpoint["clip_identity"] != identity:
            raise clip.CheckpointError(f"--resume: {args.out}/last.pt belongs to the CLIP {checkpoint['clip_identity'][:12]}, and {args.clip} is {identity[:12]} now")
        model.load_trained(checkpoint["trained"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]

    def save(name):  # best.pt holds what was trained and which CLIP it belongs to; last.pt also what going on needs
        more = {"optimizer": optimizer.state_dict()} if name == "last.pt" else {}
        clip.save_checkpoint(os.path.join(args.out, name), {
            "method": "train_adapter", "settings": vars(args), "trained": model.trained(), "clip_identity": identity,
            **more, "state": state, "step": state["step"]})

    def learning_rate(step):  # linear warm-up, then half a cosine down to zero
        warm = max(1, int(WARMUP * steps))
        return args.lr * (step + 1) / warm if step < warm else args.lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    if first and not checkpoint:
        save("last.pt")  # from here on there is one to resume from; and a disk that is full is found before any work

    stop, saved, spent = eval.StopSignal(), time.time(), []
    progress = eval.Progress(steps, state["step"], quiet=not first)
    progress.line(f"{args.data}: {len(train):,} instances, up to {args.frames} frames; --tune {args.tune}: {count:,} trained parameters, "
                  f"{100 * count / total:.2f}% of CLIP's {total:,}; {steps:,} steps on {device.type}")
    model.eval()  # nothing drops out, and a frozen ResNet's batch statistics are frozen too
    for batch in loader.batches(state["step"], steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"])
        batch = data.to_device(batch, device)
        mask = batch["image_mask"]  # (B, V)
        with clip.autocast(args.amp, inner):
            rows = model.encode_image(batch["images"][mask]).float()  # (A, D): all frames of all videos
            texts = model.encode_text(batch["tokens"][:, 0]).float()  # (B, D)
        frames, mask = (F.pad(x, pad) for x, pad in ((as_videos(rows, mask), (0, 0, 0, args.frames - mask.shape[1])), (mask, (0, args.frames - mask.shape[1]))))
        frames, mask, texts = losses.gather(frames), losses.gather(mask), losses.gather(texts)  # of one shape on all processes
        loss = total_loss(texts, frames, mask, inner.logit_scale.exp())  # the scale stays as it was pretrained
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.average_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_GRADIENT)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights take it up
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {norm.item()} at step {state['step']}; "
                             f"try a lower --lr or --amp off. {args.out}/last.pt is from before")
        optimizer.step()

        state["step"] += 1
        state["loss_sum"] += loss.item()
        spent.append(time.perf_counter() - began)
        progress.step(state["step"], args.batch_size, loss=loss.item())
        epoch, inside = divmod(state["step"], len(loader))
        if inside == 0 and first:
            record = {"step": state["step"], "epoch": epoch, "loss": state["loss_sum"] / len(loader)}
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                record |= {split: video_metrics(*embed(model, load, args.amp), at) for split, (load, at) in watched.items()}
                metrics = record["val"]
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
        report(args, {"trained_parameters": count, "share": count / total, "seconds_per_step": sorted(spent)[len(spent) // 2] if spent else None,
                      "peak_memory_gib": peak_memory(device)}, device)


def peak_memory(device):
    """Most memory this process has held, in GiB: of the GPU, or of the main memory (where the system tells)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20
    except (OSError, StopIteration):
        return None


def report(args, costs, device):
    """Evaluate best.pt on the test split, beside the CLIP as it was; print and keep the table, and what it cost."""
    model, _, checkpoint = eval.restore(os.path.join(args.out, "best.pt"), device)
    results, _ = evaluation(model, checkpoint, args.data, args.root, "test", args.amp, args.workers)
    before = Tuned(clip.load(clip_of(vars(args), args.out), device, image_size=args.image_size)[0], "head")
    before, _ = evaluation(before, checkpoint, args.data, args.root, "test", args.amp, args.workers)
    eval.write_json(os.path.join(args.out, "metrics.json"), {"test": results, "test, not tuned": before})
    eval.write_json(os.path.join(args.out, "costs.json"), costs)
    print(eval.table({"test model": results["model"], "not tuned": before["model"], "chance": results["chance"]}))
    print(f"--tune {args.tune}: {costs['trained_parameters']:,} trained parameters ({100 * costs['share']:.2f}%)"
          + (f", {costs['seconds_per_step']:.3f} s per step" if costs["seconds_per_step"] else "")
          + (f", {costs['peak_memory_gib']:.2f} GiB at most" if costs["peak_memory_gib"] else ""))
    print(f"written to {os.path.join(args.out, 'metrics.json')}")


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
