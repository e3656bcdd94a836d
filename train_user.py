"""USER: unified semantic enhancement with momentum contrast for image-text retrieval (arXiv 2301.06844).

Patches of a picture (or detected regions) and words of a caption are local features. Semantic enhancement adds to each of them what
matters in the whole: SGE weighs the local features into a global one, CGE takes CLIP's own global embedding, and both are added
back where the local features agree with them. GPO pools the result into one vector. Training compares with more negatives than a
batch holds: momentum encoders fill two queues, of images and of texts, and one objective (UTO) covers batch and queues.

    python train_user.py                                                      # built-in shapes, tiny CLIP from scratch, minutes
    python train_user.py --data flickr30k --root path/to/flickr30k --clip ViT-B/32        # the paper's schedule
    python train_user.py --data coco --root path/to/coco --clip ViT-B/32                  # the same, with its settings for COCO
    python train_user.py --data flickr30k --root path/to/flickr30k --clip ViT-B/32 --regions   # precomputed region features
    python train_user.py --enhance none --queue 0 --loss triplet              # a baseline
    torchrun --nproc_per_node=2 train_user.py                                 # the same batch and the same queues over two processes
    python train_user.py --resume                                             # go on after an interruption, to the same bits
"""
import copy
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=20, batch_size=128, lr=5e-4, dim=1024, queue=2048, batch_weight=20.0, lr_drop=0.5, infonce_first=0.0)  # the paper's for Flickr30K
COCO = PRETRAINED | dict(epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6)  # the paper's for COCO
SCRATCH = dict(epochs=14, batch_size=128, lr=1e-3, dim=256, queue=2048, batch_weight=1.0, lr_drop=0.85, infonce_first=0.7)  # random weights
WARMUP, CLIP_GRADIENT, SAVE_SECONDS = 0.03, 2.0, 300  # share of steps; norm; last.pt is written after every epoch and this often
MASKED, REPLACED = 0.5, 0.1  # of the words that augmentation changes; the rest is dropped


def settings(argv=None):
    p = eval.common_arguments(__doc__, weight_decay=1e-4)
    p.add_argument("--enhance", choices=("none", "sge", "cge", "both"), default="both")
    p.add_argument("--loss", choices=("uto", "infonce", "triplet"), default="uto", help="of the batch and of the queues; infonce, triplet: baselines")
    p.add_argument("--infonce-first", type=eval.share, help="share of the steps, at first, with infonce whatever --loss is (default: 0.7 from scratch, else 0)")
    p.add_argument("--queue", type=eval.whole, help="keys in each of the two queues; 0: none, and no momentum encoders (default 2048; coco 4096)")
    p.add_argument("--momentum", type=eval.share, default=0.999, help="of the encoders that fill the queues")
    p.add_argument("--batch-weight", type=eval.not_negative, help="lambda_b, of the batch's loss beside the queues' (default 20; coco, from scratch: 1)")
    p.add_argument("--dim", type=eval.positive_int, help="D of the common space (default 1024; from scratch: 256)")
    p.add_argument("--smooth", type=eval.positive, default=4.0, help="lambda of the guided enhancement's softmax")
    p.add_argument("--dropout", type=eval.share, default=0.4, help="in SGE")
    p.add_argument("--augment", type=eval.share, default=0.2, help="share of a training caption's words that are masked, replaced or dropped")
    p.add_argument("--clip-lr", type=eval.positive, help="learning rate of CLIP's own weights (default: --lr; where it is pretrained, a tenth)")
    p.add_argument("--lr-drop", type=eval.share, help="share of the steps after which rates are a tenth (default 0.5; coco 0.6; from scratch 0.85)")
    p.add_argument("--regions", action="store_true", help="region features from <root>/precomp in place of pictures")
    p.add_argument("--eval-every", type=eval.positive_int, help="epochs between evaluations on val (default: five in a run)")
    args = p.parse_args(argv)
    scratch = args.clip in clip.SCRATCH
    for name, value in (SCRATCH if scratch else COCO if args.data == "coco" else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if 0 < args.queue < args.batch_size:
        p.error(f"--batch-size {args.batch_size} is larger than --queue {args.queue}: the queue must hold a batch of keys; give it {args.batch_size} or more, or 0")
    if args.batch_size < 2:
        p.error("--batch-size 1: batch norm and the losses compare what is in a batch; give it 2 or more")
    if args.dim < 2:
        p.error("--dim 1: the common space needs 2 dimensions or more")
    if args.regions and args.data == "primitives":
        p.error("--regions: the built-in shapes have none; add --data flickr30k or --data coco")
    args.clip_lr = args.clip_lr or (args.lr if scratch else args.lr / 10)
    args.eval_every = args.eval_every or max(1, args.epochs // 5)
    args.out = args.out or os.path.join("runs", f"user-{os.path.splitext(os.path.basename(args.data))[0]}")
    return args


# ---------------------------------------------------------------- the model
# Local features are x (B, L, D) with keep (B, L), bool: which of them there are. What is padding is zero and stays without effect.
# A bias that batch norm or a softmax takes out again is left out: its gradient would be nothing but rounding.

def guided_enhancement(x, keep, g, smooth):
    """Add to the local features what they share with a global one g (B, D), unit-norm: a = softmax over the L places of smooth x . g,
    scaled to unit norm over the places; x + a g (section 3.2)."""
    a = (smooth * (x @ g[:, :, None])[..., 0]).masked_fill(~keep, -math.inf).softmax(1)  # (B, L)
    return x + F.normalize(a, dim=1)[..., None] * g[:, None, :]


def on_rows(function, x, keep):
    """function of the real rows (rows, D) only, back in place (B, L, D'): batch norm must not see padding."""
    at = keep.flatten().nonzero()[:, 0]
    rows = function(x.flatten(0, 1).index_select(0, at))
    return rows.new_zeros(keep.numel(), rows.shape[1]).index_copy(0, at, rows).view(*keep.shape, -1)


class SGE(nn.Module):
    """Self-guided enhancement's global feature: weights = softmax over the places of Linear(tanh(BN(Linear(x))) * tanh(BN(Linear(mean x)))).
    -> the weighted sum of x, unit-norm (B, D)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.local, self.whole = (nn.Sequential(nn.Linear(width, width, bias=False), losses.BatchNorm(width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2))
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, x, keep):
        mean = (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        common = on_rows(self.local, x, keep) * self.whole(mean)[:, None, :]  # (B, L, D)
        weights = self.score(common)[..., 0].masked_fill(~keep, -math.inf).softmax(1)  # (B, L)
        return F.normalize((weights[..., None] * x).sum(1), dim=-1)


class GPO(nn.Module):
    """Generalised pooling (Chen et al. 2021, arXiv 2011.04305): each dimension's values are sorted over the places and weighed by
    rank; the weights come from a BiGRU over the ranks' sinusoidal positions, so they depend on the number of places alone."""

    def __init__(self, positions=32, hidden=32, temperature=0.1):
        super().__init__()
        self.gru, self.score = nn.GRU(positions, hidden, batch_first=True, bidirectional=True), nn.Linear(hidden, 1, bias=False)
        self.positions, self.temperature = positions, temperature

    def weights(self, lengths, most):
        """(U, most): the weights of sets of `lengths` (U,) features, zero past a length; rows sum to 1."""
        place = torch.arange(most, device=lengths.device)[:, None]
        angle = place / 10000 ** (torch.arange(0, self.positions, 2, device=lengths.device) / self.positions)
        encoding = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # (most, positions)
        packed = nn.utils.rnn.pack_padded_sequence(encoding.expand(len(lengths), -1, -1), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=most)  # (U, most, 2 hidden)
        scores = self.score((out[..., :out.shape[2] // 2] + out[..., out.shape[2] // 2:]) / 2)[..., 0]
        return (scores / self.temperature).masked_fill(place.t() >= lengths[:, None], -math.inf).softmax(1)

    def forward(self, x, keep):
        lengths, which = keep.sum(1).unique(return_inverse=True)
        weights = F.embedding(which, self.weights(lengths, x.shape[1]))  # (B, L); indexing would sum gradients in any order
        ranked = x.masked_fill(~keep[..., None], -1e4).sort(dim=1, descending=True).values  # padding last, where weights are 0
        return (ranked * weights[..., None]).sum(1)


class USER(nn.Module):
    """CLIP's local features, enhanced and pooled; the interface of a CLIP (`encode_image`, `encode_text`: unit-norm (B, dim)).

    regions: the width of region features that stand in for pictures, or None. CGE then enhances texts only: regions have no CLIP embedding.
    """

    def __init__(self, clip_model, enhance="both", dim=1024, smooth=4.0, dropout=0.4, regions=None, seed=0):
        super().__init__()
        D = clip_model.config.embed_dim
        width = regions or D
        self.config, self.tokenizer, self.context_length = clip_model.config, clip_model.tokenizer, clip_model.context_length
        self.enhance, self.smooth, self.regions = enhance, smooth, regions
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if enhance in ("sge", "both"):
                self.image_sge, self.text_sge = SGE(width, dropout), SGE(D, dropout)
            self.image_fc, self.text_fc = nn.Linear(width, dim), nn.Linear(D, dim)
            self.image_mlp = nn.Sequential(nn.Linear(width, dim // 2, bias=False), losses.BatchNorm(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
            self.image_gpo, self.text_gpo = GPO(), GPO()
        self.clip = clip_model

    def enhanced(self, x, keep, sge, own):
        """own (B, D): CLIP's global embedding, or None."""
        out = x
        if self.enhance in ("sge", "both"):
            out = guided_enhancement(out, keep, sge(x, keep), self.smooth)
        if self.enhance in ("cge", "both") and own is not None:
            out = guided_enhancement(out, keep, F.normalize(own, dim=-1), self.smooth)
        return out

    def encode_image(self, images):
        """images (B, 3, S, S), or region features (B, regions, width)."""
        if self.regions:
            x, own = images.float(), None
        else:
            own, x = self.clip.encode_image(images, tokens=True)
            own, x = own.float(), x[:, 1:].float()  # (B, D), (B, patches, D): the class token is the global embedding, no patch
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x = self.enhanced(x, keep, getattr(self, "image_sge", None), own)
        x = self.image_fc(x) + on_rows(self.image_mlp, x, keep)
        return F.normalize(self.image_gpo(x, keep), dim=-1)

    def encode_text(self, tokens):
        own, x, keep = self.clip.encode_text(tokens, tokens=True)
        x, keep = x[:, 1:], keep[:, 1:]  # the start symbol sees no word
        x = self.enhanced(x.float(), keep, getattr(self, "text_sge", None), own.float())
        return F.normalize(self.text_gpo(self.text_fc(x), keep), dim=-1)


# ---------------------------------------------------------------- momentum contrast

@torch.no_grad()
def momentum_update(slow, fast, m):
    """Every weight of `slow` becomes m times itself plus 1 - m times that of `fast`; no gradient is touched (MoCo, equation 2).
    Buffers (batch norm's running statistics) are copied."""
    for a, b in zip(slow.parameters(), fast.parameters()):
        a.mul_(m).add_(b.detach(), alpha=1 - m)
    for a, b in zip(slow.buffers(), fast.buffers()):
        a.copy_(b)


class Queue(nn.Module):
    """The last `size` pairs of momentum embeddings, (size, dim) of images and of texts, with what they show. Starts with
    random unit vectors, of nothing (-1). A batch that does not divide the size wraps round."""

    def __init__(self, size, dim, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("images", "texts"):
            self.register_buffer(name, F.normalize(torch.randn(size, dim, generator=generator), dim=-1))
        self.register_buffer("things", torch.full((size,), -1))
        self.register_buffer("next", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, images, texts, thing):
        """Replace the oldest keys: images, texts (N, dim), thing (N,), N <= size."""
        at = (self.next + torch.arange(len(thing), device=thing.device)) % len(self.things)
        self.images[at], self.texts[at], self.things[at] = images.float(), texts.float(), thing
        self.next.copy_((self.next + len(thing)) % len(self.things))


def augmented(tokens, tokenizer, ends, share):
    """Training captions with a share of their words changed (section 4.1): half of those are masked, a tenth replaced, the rest dropped;
    a caption keeps at least one word. tokens (B, columns); a word is all of its tokens, ends (vocabulary,): which tokens end one; the
    mask is the start symbol, which stands nowhere else. Draws from torch's generator."""
    if not share:
        return tokens
    out, start, end = torch.zeros_like(tokens), tokenizer.start, tokenizer.end
    for i, row in enumerate(tokens):
        row = row[1:int(row.argmax())]
        word = ends[row.long()].long().cumsum(0) - ends[row.long()].long()  # which word each token belongs to
        words = int(word.max()) + 1 if len(row) else 0
        chance, kind = torch.rand(2, words)
        changed = chance < share
        dropped = changed & (kind >= MASKED + REPLACED)
        if words and dropped.all():
            dropped[0] = False
        masked, replaced = changed & (kind < MASKED), changed & (kind >= MASKED) & (kind < MASKED + REPLACED)
        row = torch.where(masked[word], torch.full_like(row, start), row)
        row = torch.where(replaced[word], torch.randint(0, start, row.shape, dtype=row.dtype), row)[~dropped[word]]
        out[i, :len(row) + 2] = torch.cat([row.new_tensor([start]), row, row.new_tensor([end])])
    return out


def total_loss(kind, batch_weight, images, texts, thing, keys, queue):
    """lambda_b times the batch's loss plus the queues'. images, texts (N, D): unit-norm, row j of both one pair; thing (N,): what it shows;
    keys: the pairs' momentum embeddings (images, texts); keys and queue: None without queues."""
    of_batch, of_queue = {"uto": (losses.uto_loss, losses.uto_queue_loss), "infonce": (losses.info_nce_loss, losses.info_nce_queue_loss),
                          "triplet": (losses.hardest_triplet_loss, losses.hardest_triplet_queue_loss)}[kind]
    loss = batch_weight * of_batch(images, texts, thing[:, None] == thing[None, :])
    if queue is not None:
        own = thing[:, None] == queue.things[None, :]  # (N, K): a thing's keys of earlier epochs are no negatives of it
        loss = loss + of_queue(images, keys[1], queue.texts, own) + of_queue(texts, keys[0], queue.images, own)
    return loss


def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    s = checkpoint["settings"]
    model = USER(clip.load(path, "cpu")[0], s["enhance"], s["dim"], s["smooth"], s["dropout"], checkpoint["regions"])
    clip.load_heads(model, checkpoint["heads"])
    return model


# ---------------------------------------------------------------- training

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
    load = data.load_regions if args.regions else data.load
    train, _ = load(args.data, args.root, "train")
    val, _ = load(args.data, args.root, "val")
    test, _ = load(args.data, args.root, "test")  # needed at the end: what is missing is said before training, not after
    regions = train[0].images[0].features().shape[1] if args.regions else None
    for view in (part[0].images[0] for part in (val, test) if args.regions):
        if view.features().shape[1] != regions:
            raise data.DataError(f"{view.path}: features of width {view.features().shape[1]}; those of the training split have {regions}")

    # model
    if args.clip in clip.SCRATCH:
        tokenizer = clip.Tokenizer.train([c for x in train for c in x.captions], args.vocab_size)
        inner = clip.build(args.clip, tokenizer, args.seed, args.image_size)
    else:
        inner, _ = clip.load(args.clip, "cpu", image_size=args.image_size)
        tokenizer = inner.tokenizer or clip.default_tokenizer()
    model = USER(inner, args.enhance, args.dim, args.smooth, args.dropout, regions, args.seed).to(device)
    slow = queue = None
    if args.queue:
        slow, queue = copy.deepcopy(model).train().requires_grad_(False), Queue(args.queue, args.dim, args.seed).to(device)
    if args.compile:
        clip.compile_blocks(inner)
    loader = data.Loader(train, tokenizer, inner.context_length, inner.config.image_resolution, args.batch_size, 1, 1, train=True, seed=args.seed,
                         workers=args.workers, rank=rank, world=world)
    word_ends = torch.tensor([symbol.endswith("</w>") for symbol in tokenizer.symbols])
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    train_group = eval.layout(train)["image_group"].to(device)  # (instances,): equal where they count as the same thing
    groups = [{"params": [p for n, p in model.named_parameters() if n.startswith("clip.") == inside], "peak": peak}
              for inside, peak in ((True, args.clip_lr), (False, args.lr))]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(loader)

    # run: everything that changes is in `state`, the weights, the queues and the optimizer, so that a resumed run ends with the same bits
    state = {"step": 0, "best": -1.0, "loss_sum": 0.0}
    checkpoint = eval.open_run(args.out, vars(args), args.resume, first) if first or args.resume else None
    if checkpoint:
        inner.load_state_dict(checkpoint["clip"]["state_dict"])
        clip.load_heads(model, checkpoint["heads"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if args.queue:
            slow.load_state_dict(checkpoint["momentum"])
            queue.load_state_dict(checkpoint["queue"])
        state = checkpoint["state"]

    def save(name):
        more = {"momentum": clip.weights(slow), "queue": clip.weights(queue)} if args.queue and name == "last.pt" else {}
        clip.save_checkpoint(os.path.join(args.out, name), {
            "method": "train_user", "settings": vars(args), "regions": regions, "clip": clip.describe(inner), "heads": clip.describe_heads(model),
            **more, "optimizer": optimizer.state_dict(), "state": state, "step": state["step"]})

    def rate(step):  # linear warm-up, constant, a tenth after the drop
        return min(1.0, (step + 1) / max(1, int(WARMUP * steps))) * (0.1 if step >= args.lr_drop * steps else 1.0)

    if first and not checkpoint:
        save("last.pt")  # from here on there is one to resume from; and a disk that is full is found before any work

    stop, saved = eval.StopSignal(), time.time()
    progress = eval.Progress(steps, state["step"], quiet=not first)
    progress.line(f"{args.data}: {len(train):,} instances, enhancement {args.enhance}, {args.loss}, queues of {args.queue:,}; "
                  f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {steps:,} steps on {device.type}")
    model.train()
    for batch in loader.batches(state["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(state["step"])
        data.seed_step(args.seed, state["step"], rank)  # augmentation and dropout
        tokens = augmented(batch["tokens"][:, 0], tokenizer, word_ends, args.augment)
        batch = data.to_device(batch, device)
        pictures, tokens = batch["images"][:, 0], tokens.to(device)
        with clip.autocast(args.amp, inner):
            images, texts = model.encode_image(pictures), model.encode_text(tokens)  # (b, D)
        keys = None
        if args.queue:
            momentum_update(slow, model, args.momentum)
            with torch.no_grad(), clip.autocast(args.amp, inner):
                keys = [losses.gather(slow.encode_image(pictures).float()), losses.gather(slow.encode_text(tokens).float())]
        images, texts, thing = losses.gather(images.float()), losses.gather(texts.float()), losses.gather(train_group[batch["index"]])
        # UTO's hardest negatives teach nothing as long as all similarities are alike: from random weights InfoNCE comes first (README)
        kind = "infonce" if state["step"] < args.infonce_first * steps else args.loss
        loss = total_loss(kind, args.batch_weight, images, texts, thing, keys, queue)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights take it up
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {norm.item()} at step {state['step']}; "
                             f"try a lower --lr or --amp off. {args.out}/last.pt is from before")
        optimizer.step()
        if args.queue:
            queue.enqueue(*keys, thing)

        state["step"] += 1
        state["loss_sum"] += loss.item()
        progress.step(state["step"], args.batch_size, loss=loss.item())
        epoch, inside = divmod(state["step"], len(loader))
        if inside == 0 and first:
            record = {"step": state["step"], "epoch": epoch, "loss": state["loss_sum"] / len(loader)}
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                metrics = eval.evaluate(model, val, tokenizer, args.amp, args.workers, val_loader)
                record["val"] = metrics
                progress.line(f"epoch {epoch}: loss {record['loss']:.3f}, val R@1 {metrics['text_to_image']['R@1']:.1f} / {metrics['image_to_text']['R@1']:.1f}, "
                              f"rSum {metrics['rSum']:.1f}")
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
    results = {}
    for split in ("test", "unseen") if args.data == "primitives" else ("test",):
        instances, _ = (data.load_regions if args.regions else data.load)(args.data, args.root, split)
        results[split] = eval.retrieval_rows(args.data, *eval.embed(model, instances, tokenizer, args.amp, args.workers), instances)
    eval.write_json(os.path.join(args.out, "metrics.json"), results)
    print(eval.table({f"{split} {row}": metrics for split, rows in results.items() for row, metrics in rows.items()}))
    print("   ".join(f"{split} rSum {rows['model']['rSum']:.1f}" for split, rows in results.items()))
    print(f"written to {os.path.join(args.out, 'metrics.json')}")


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
