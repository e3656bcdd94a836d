"""USER: unified semantic enhancement with momentum contrast for image-text retrieval (arXiv 2301.06844).

The patches of a picture (or detected regions) and the words of a caption are local features x_1, ..., x_L.
Those of pictures are enhanced with a global representation g of the same picture: the more a local feature
agrees with g, the more of g is added to it.

    guided enhancement:  x_l <- x_l + a_l g,   a = softmax over l of (x_l . g), scaled to unit norm
    SGE (self-guided):   g = sum over l of w_l x_l, scaled to unit norm, with
                         w = softmax over l of Linear( tanh(BN(Linear(x_l))) * tanh(BN(Linear(mean of x))) )
    CGE (CLIP-guided):   g = Linear(ReLU(BN(Linear(BN(c))))), scaled to unit norm; c: CLIP's own embedding

GPO pools the local features into one vector of unit norm: v_i of image i, t_j of text j, S_ij = v_i . t_j.
Training compares with more negatives than a batch holds: momentum encoders (MoCo) fill two queues, of images
and of texts, and one objective serves the batch and the queues. Its sums run over what shows another thing:

    UTO  = mean over pairs j of   log(1 + sum over i of e^(mu (S_ij - gamma))) / mu    text j, other images
                                + log(1 + sum over i of e^(mu (S_ji - gamma))) / mu    image j, other texts
                                - log(1 + max(0, S_jj))                                the pair itself
    loss = lambda_b UTO of the batch + UTO of images and queued texts + UTO of texts and queued images

UTO of a queue has one direction, and its S_jj is the cosine with the momentum embedding of j's other half.

Provenance: the loss, the queues, SGE and the settings for Flickr30K and COCO are the paper's and its authors'
code's, which has no CGE: its layers follow an author's words in issue 4 of github.com/zhangy0822/USER. CLIP's
patches and CLIP in place of regions and BERT, the settings from scratch, and --unit-norm are ours.

    python train_user.py                                   # built-in shapes, tiny CLIP from scratch, minutes
    python train_user.py --data flickr30k --root path/to/flickr30k            # ViT-B/32, the paper's schedule
    python train_user.py --data flickr30k --root path/to/flickr30k --regions  # region features as of SCAN
    python train_user.py --enhance none --queue 0 --loss triplet              # a baseline
    torchrun --nproc_per_node=2 train_user.py              # the same batch and queues over two processes
    python train_user.py --resume                          # go on after an interruption, to the same bits
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=20, batch_size=128, lr=5e-4, dim=1024, queue=2048, batch_weight=20.0, lr_drop=0.5,
                  weight_decay=1e-4, eval_every=1)  # the paper's for Flickr30K
COCO = PRETRAINED | dict(epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6)  # the paper's for COCO
# a small CLIP with random weights; of 1e-4, 3e-4 and 1e-3 the best for UTO and for InfoNCE
SCRATCH = dict(epochs=3, batch_size=128, lr=3e-4, dim=256, queue=2048, batch_weight=1.0, lr_drop=0.85,
               weight_decay=1e-4)
MU = 90.0  # UTO: how steeply the push on a negative rises with its cosine
GAMMA = 0.5  # UTO: the cosine from which negatives are pushed away
DROPOUT = 0.4  # in SGE
MAX_NORM = 2.0  # of the gradient


def settings(argv=None):
    p = eval.arguments(__doc__, __file__, {"from scratch": SCRATCH, "pretrained": PRETRAINED, "coco": COCO})
    p.add_argument("--enhance", choices=("none", "sge", "cge", "both"), default="both",
                   help="what enhances the local features of images")
    p.add_argument("--unit-norm", action="store_true", help="scale images' local features to unit norm first")
    p.add_argument("--loss", choices=("uto", "infonce", "triplet"), default="uto",
                   help="the loss of the batch and of the queues; infonce and triplet are baselines")
    p.add_argument("--mu", type=eval.positive, help="of UTO: weight of the hardest negatives (default: 90)")
    p.add_argument("--queue", type=eval.non_negative_int, help="embeddings in each queue; 0: no queues")
    p.add_argument("--momentum", type=eval.fraction, default=0.999, help="m of the momentum encoders")
    p.add_argument("--batch-weight", type=eval.non_negative, help="lambda_b: weight of the batch's loss")
    p.add_argument("--dim", type=eval.positive_int, help="dimensions of the common space")
    p.add_argument("--clip-lr", type=eval.non_negative,
                   help="peak rate of CLIP's own weights; 0: frozen (default: --lr; pretrained --lr / 10)")
    p.add_argument("--lr-drop", type=eval.fraction, help="share of steps after which rates fall to a tenth")
    p.add_argument("--regions", action="store_true",
                   help="read region features from <root>/precomp in place of pictures; CGE takes CLIP's "
                        "embeddings of the pictures from precomp/{train,dev,test}_clip.npy (images, D)")
    args = eval.parse(p, argv)
    if args.clip_lr is None:
        args.clip_lr = args.lr if args.clip in clip.SCRATCH else args.lr / 10
    if 0 < args.queue < args.batch_size:
        p.error(f"--queue {args.queue} cannot hold a batch of keys; give {args.batch_size} or more, or 0")
    if min(args.batch_size, args.dim) < 2:
        p.error("--batch-size, --dim: batch norm and the losses compare numbers; give both 2 or more")
    if args.mu and args.loss != "uto":
        p.error(f"--mu: --loss {args.loss} has none, only uto has")
    return args


# ---------------------------------------------------------------- the model
# Local features of images are x (B, L, D), as many of each image; of texts a mask (B, L) is True where there
# is one. A bias that batch norm or a softmax cancels is left out: its gradient would be rounding alone.

def guided_enhancement(x, g):
    """x_l + a_l g for every place l of x (B, L, D) (section 3.2). g (B, D): of the whole, unit norm."""
    agreement = (x @ g[:, :, None])[..., 0]  # x_l . g, (B, L)
    a = F.normalize(agreement.softmax(1), dim=1)
    return x + a[..., None] * g[:, None, :]


def xavier(module):
    """Give a module's linear layers Xavier's uniform weights and biases of 0, as the authors do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SGE(nn.Module):
    """The global representation of self-guided enhancement: x (B, L, D) -> g (B, D), unit norm.

    Batch norm is over features: the authors' is over the 36 places of regions, which patches do not have.
    """

    def __init__(self, width):
        super().__init__()

        def branch():
            return nn.Sequential(nn.Linear(width, width, bias=False), losses.BatchNorm(width), nn.Tanh(),
                                 nn.Dropout(DROPOUT))

        self.local_branch = branch()
        self.global_branch = branch()
        self.score = nn.Linear(width, 1, bias=False)
        xavier(self)

    def forward(self, x):
        mean = x.mean(1)  # (B, D)
        common = self.local_branch(x) * self.global_branch(mean)[:, None, :]  # (B, L, D)
        weights = self.score(common)[..., 0].softmax(1)  # (B, L)
        return F.normalize((weights[..., None] * x).sum(1), dim=-1)


class CGE(nn.Module):
    """The global representation of CLIP-guided enhancement: CLIP's own (B, E) -> g (B, D), unit norm.

    No gradient flows back into CLIP: the authors take embeddings that were extracted in advance.
    """

    def __init__(self, embed_dim, width):
        super().__init__()
        self.projection = nn.Sequential(losses.BatchNorm(embed_dim), nn.Linear(embed_dim, width, bias=False),
                                        losses.BatchNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.projection[0].bias.requires_grad_(False)  # the second batch norm cancels it
        xavier(self)

    def forward(self, clip_embedding):
        return F.normalize(self.projection(clip_embedding.detach().float()), dim=-1)


class GPO(nn.Module):
    """Generalised pooling operator (Chen et al. 2021, arXiv 2011.04305): (B, L, D) -> (B, D).

    Each dimension's values are sorted and weighted by rank. The weights come from a BiGRU over sinusoidal
    encodings of the ranks, so they depend on the number of local features alone.
    """

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(32, 32, batch_first=True, bidirectional=True)  # 32-d encodings and states
        self.score = nn.Linear(32, 1, bias=False)

    def weights(self, lengths, columns):
        """The weights of sets of `lengths` (U,) features -> (U, columns), 0 past a length; rows sum to 1."""
        rank = torch.arange(columns, device=lengths.device)[:, None]
        angle = rank / 10000 ** (torch.arange(0, 32, 2, device=lengths.device) / 32)  # (columns, 16)
        encoding = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # (columns, 32)
        packed = nn.utils.rnn.pack_padded_sequence(encoding.expand(len(lengths), -1, -1), lengths.cpu(),
                                                   batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=columns)
        forwards, backwards = out.chunk(2, dim=2)  # (U, columns, 32) each
        scores = self.score((forwards + backwards) / 2)[..., 0] / 0.1  # the temperature
        return scores.masked_fill(rank.t() >= lengths[:, None], -math.inf).softmax(1)

    def forward(self, x, mask):
        lengths, index = mask.sum(1).unique(return_inverse=True)
        # plain indexing would add up gradients in any order, F.embedding adds them in a fixed one
        weights = F.embedding(index, self.weights(lengths, x.shape[1]))  # (B, L)
        ranked = x.masked_fill(~mask[..., None], -1e4).sort(dim=1, descending=True).values  # padding last
        return (ranked * weights[..., None]).sum(1)


class USER(nn.Module):
    """CLIP's local features, enhanced and pooled. encode_image and encode_text give (B, dim), unit norm.

    enhance: none, sge, cge or both. unit_norm: local features of images get unit norm first. regions: the
    width of the region features that take the place of pictures, or None.
    """

    def __init__(self, clip_model, enhance="both", unit_norm=False, dim=1024, regions=None, seed=0):
        super().__init__()
        text_width = clip_model.config.embed_dim
        image_width = regions or text_width
        self.config = clip_model.config
        self.tokenizer = clip_model.tokenizer
        self.unit_norm = unit_norm
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.sge = SGE(image_width) if enhance in ("sge", "both") else None
            self.cge = CGE(text_width, image_width) if enhance in ("cge", "both") else None
            self.image_fc = nn.Linear(image_width, dim)
            xavier(self.image_fc)
            self.text_fc = nn.Linear(text_width, dim)
            self.image_mlp = nn.Sequential(nn.Linear(image_width, dim // 2, bias=False),
                                           losses.BatchNorm(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
            self.image_gpo = GPO()
            self.text_gpo = GPO()
        self.clip = clip_model

    def train(self, mode=True):
        """A CLIP that is not trained stays in evaluation mode."""
        super().train(mode)
        self.clip.train(mode and self.clip.logit_scale.requires_grad)
        return self

    def local_features(self, images):
        """Of images (B, 3, S, S), data.Regions, or region features alone (B, L, D): x (B, L, D), and CLIP's
        own embedding of the images (B, E), which region features alone do not have (None)."""
        if isinstance(images, data.Regions):
            return images.features.float(), images.clip_input
        if images.ndim == 3:
            data.expect(not self.cge, "--regions", "CGE needs CLIP's embeddings of the images, in *_clip.npy")
            return images.float(), None
        clip_embedding, x = self.clip.encode_image(images, tokens=True)
        return x[:, 1:].float(), clip_embedding  # the class token is the global embedding, no patch

    def encode_image(self, images):
        """images: as `local_features` takes them -> (B, dim)."""
        x, clip_embedding = self.local_features(images)
        if self.unit_norm:
            x = F.normalize(x, dim=-1)
        if self.sge:
            x = guided_enhancement(x, self.sge(x))
        if self.cge:
            x = guided_enhancement(x, self.cge(clip_embedding))
        x = self.image_fc(x) + self.image_mlp(x)
        every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return F.normalize(self.image_gpo(x, every), dim=-1)

    def encode_text(self, tokens):
        """tokens (B, columns), as CLIP's own encode_text takes them -> (B, dim)."""
        _, x, mask = self.clip.encode_text(tokens, tokens=True)
        x = self.text_fc(x[:, 1:].float())  # (B, L, dim): the start symbol sees no word
        return F.normalize(self.text_gpo(x, mask[:, 1:]), dim=-1)


# ---------------------------------------------------------------- momentum contrast

@torch.no_grad()
def momentum_update(momentum_model, model, m):
    """momentum_model <- m momentum_model + (1 - m) model (He et al. 2020, equation 2), of trained weights;
    buffers, such as batch norm's running statistics, are copied."""
    for average, weight in zip(momentum_model.parameters(), model.parameters()):
        if weight.requires_grad:
            average.mul_(m).add_(weight.detach(), alpha=1 - m)
    for kept, buffer in zip(momentum_model.buffers(), model.buffers()):
        kept.copy_(buffer)


class Queue(nn.Module):
    """The last `size` pairs of momentum embeddings: images and texts (size, dim), and groups (size,), which
    says what each pair shows. It starts with random unit vectors of no group (-1)."""

    def __init__(self, size, dim, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("images", F.normalize(torch.randn(size, dim, generator=generator), dim=-1))
        self.register_buffer("texts", F.normalize(torch.randn(size, dim, generator=generator), dim=-1))
        self.register_buffer("groups", torch.full((size,), -1))
        self.register_buffer("next", torch.tensor(0))  # the place of the oldest pair

    @torch.no_grad()
    def enqueue(self, images, texts, group):
        """Replace the oldest pairs by images, texts (N, dim) of group (N,), N <= size; wraps round."""
        place = (self.next + torch.arange(len(group), device=group.device)) % len(self.groups)
        self.images[place] = images.float()
        self.texts[place] = texts.float()
        self.groups[place] = group
        self.next = (self.next + len(group)) % len(self.groups)


# ---------------------------------------------------------------- the loss
# images, texts, queries and keys (N, D), of unit norm: row j of both is one pair. A queue (K, D) holds older
# keys. same, bool, (N, N) or (N, K), marks what shows the same thing as a query, and is no negative of it.

def log_one_plus_sum(exponents):
    """log(1 + sum over columns of e^x) of each row, by logsumexp: finite where e^x would overflow."""
    return F.pad(exponents, (1, 0)).logsumexp(-1)


def uto_loss(images, texts, same, mu=MU):
    """UTO of a batch, in both directions."""
    cosine = images.float() @ texts.float().t()
    pushed = (mu * (cosine - GAMMA)).masked_fill(same, -math.inf)
    pull = torch.log1p(cosine.diagonal().clamp(min=0))
    return (log_one_plus_sum(pushed.t()) / mu + log_one_plus_sum(pushed) / mu - pull).mean()


def uto_queue_loss(queries, keys, queue, same, mu=MU):
    """UTO of queries with the momentum embeddings of their counterparts (keys), and a queue of negatives."""
    pushed = (mu * (queries.float() @ queue.float().t() - GAMMA)).masked_fill(same, -math.inf)
    pull = torch.log1p((queries.float() * keys.float()).sum(1).clamp(min=0))
    return (log_one_plus_sum(pushed) / mu - pull).mean()


LOSSES = {  # --loss: that of a batch, both directions; of queries, their keys and a queue, one direction
    "uto": (uto_loss, uto_queue_loss),
    "infonce": (losses.info_nce_loss, losses.info_nce_queue_loss),
    "triplet": (losses.hardest_triplet_loss, losses.hardest_triplet_queue_loss),
}


def total_loss(args, images, texts, group, keys, queue):
    """lambda_b times the loss of the batch, plus the losses of both queues (None: there are none).

    group (N,): what each pair shows. keys: the momentum embeddings (images, texts) of the same pairs.
    """
    batch_loss, queue_loss = LOSSES[args.loss]
    mu = {"mu": args.mu} if args.mu else {}  # only uto has it
    same = group[:, None] == group[None, :]  # (N, N): what shows the same thing is no negative
    loss = args.batch_weight * batch_loss(images, texts, same, **mu)
    if queue is None:
        return loss
    image_keys, text_keys = keys
    same = group[:, None] == queue.groups[None, :]  # (N, K): nor is an older key of the same thing
    loss = loss + queue_loss(images, text_keys, queue.texts, same, **mu)
    return loss + queue_loss(texts, image_keys, queue.images, same, **mu)


# ---------------------------------------------------------------- training

def check_regions(model, *splits):
    """Raise DataError, before training, where the region files of a split are not what the model takes."""
    width = model.image_fc.in_features
    for view in (instances[0].images[0] for instances in splits):
        data.expect(view.features().shape[1] == width, view.path,
                    f"features of another width than the training split's, which is {width}")
        data.expect(not model.cge or view.embedding and len(view.clip_input()) == model.config.embed_dim,
                    view.path.replace("_ims.npy", "_clip.npy"), "CGE needs CLIP's embeddings there, float32 "
                    f"(images, {model.config.embed_dim}); or use --enhance sge")


def main(argv=None):
    args = settings(argv)
    device = eval.join(args)
    rank, _ = eval.processes()
    (train, _), (val, _), (test, _) = eval.load_splits(args, data.load_regions if args.regions else None)
    clip_model = eval.build_or_load(args, train, device)
    clip_model.requires_grad_(args.clip_lr > 0)
    regions = train[0].images[0].features().shape[1] if args.regions else None
    model = USER(clip_model, args.enhance, args.unit_norm, args.dim, regions, args.seed).to(device).train()
    if regions:
        check_regions(model, train, val, test)
    momentum_model = queue = None
    only_last = {}  # what going on needs and evaluation does not
    if args.queue:
        momentum_model = copy.deepcopy(model).requires_grad_(False)
        queue = Queue(args.queue, args.dim, args.seed).to(device)
        only_last = {"momentum": momentum_model, "queue": queue}
    loader = eval.training_loader(args, train, model, views=1, captions=1, pairs=True)  # every caption once
    val_loader = eval.evaluation_loader(model, val, args.workers)
    train_group = eval.layout(train)["image_group"].to(device)  # (instances,): equal where they show the same
    heads = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    optimizer = torch.optim.AdamW([{"params": list(clip_model.parameters()), "peak": args.clip_lr},
                                   {"params": heads, "peak": args.lr}],
                                  lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(loader)
    run = eval.Run(args, optimizer, steps, len(loader),
                   {"clip": clip_model, "heads": model, "regions": regions}, only_last)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances, --enhance {args.enhance}, --loss {args.loss}, queues of "
            f"{args.queue:,}; {steps:,} steps on {device.type}")
    for step, batch in run.batches(loader):
        for part in optimizer.param_groups:
            part["lr"] = part["peak"] * (0.1 if step >= args.lr_drop * steps else 1.0)
        data.seed_step(args.seed, step, rank)  # augmentation and dropout
        tokens = data.changed_words(batch["tokens"][:, 0], eval.tokenizer_of(model))
        batch = data.to_device(batch, device)
        pictures = batch["images"][:, 0]
        with clip.autocast(args.amp, clip_model):
            images = model.encode_image(pictures)  # (b, dim), b = B / world
            texts = model.encode_text(tokens)
        keys = None
        if args.queue:
            momentum_update(momentum_model, model, args.momentum)
            with torch.no_grad(), clip.autocast(args.amp, clip_model):
                image_keys = momentum_model.encode_image(pictures)
                text_keys = momentum_model.encode_text(tokens)
            keys = losses.gather(image_keys.float()), losses.gather(text_keys.float())
        images = losses.gather(images.float())  # (B, dim)
        texts = losses.gather(texts.float())
        group = losses.gather(train_group[batch["index"]])
        loss = total_loss(args, images, texts, group, keys, queue)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        if args.queue:
            queue.enqueue(*keys, group)
        if run.log(loss, args.batch_size):
            metrics = eval.evaluate(model, val, args.amp, args.workers, val_loader)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    eval.report(args, device)


# ---------------------------------------------------------------- for eval.py

def restore(checkpoint):
    """The model of a checkpoint of this script."""
    s = checkpoint["settings"]
    model = USER(clip.from_description(checkpoint["clip"]), s["enhance"], s["unit_norm"], s["dim"],
                 checkpoint["regions"])
    clip.load_heads(model, checkpoint["heads"])
    return model


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
