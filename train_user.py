"""USER: unified semantic enhancement with momentum contrast for image-text retrieval (arXiv 2301.06844).

The patches of a picture (or detected regions) and the words of a caption are local features x_1, ..., x_L.
Those of pictures are enhanced with a global representation g of the same picture: the more a local feature
agrees with g, the more of g is added to it.

    guided enhancement:  x_l <- x_l + a_l g,   a = softmax over l of (lambda x_l . g), scaled to unit norm
    SGE (self-guided):   g = sum over l of w_l x_l, scaled to unit norm, with
                         w = softmax over l of Linear( tanh(BN(Linear(x_l))) * tanh(BN(Linear(mean of x))) )
    CGE (CLIP-guided):   g = Linear(ReLU(BN(Linear(BN(c))))), scaled to unit norm; c: CLIP's own embedding

GPO pools the enhanced features into one vector of unit norm: v_i of image i, t_j of text j, S_ij = v_i . t_j.
Training compares with more negatives than a batch holds: momentum encoders (MoCo) fill two queues, of images
and of texts, and one objective serves the batch and the queues. Its sums run over what shows another thing:

    UTO  = mean over pairs j of   log(1 + sum over i of e^(mu (S_ij - gamma))) / mu    text j, other images
                                + log(1 + sum over i of e^(mu (S_ji - gamma))) / mu    image j, other texts
                                - log(1 + max(0, S_jj))                                the pair itself
    loss = lambda_b UTO of the batch + UTO of images and queued texts + UTO of texts and queued images

UTO of a queue has one direction, and its S_jj is the cosine with the momentum embedding of j's other half.
An epoch is one pass over the image-caption pairs: every caption once, with its image.

The loss, the queues and SGE are the paper's, and the settings for Flickr30K and COCO, pooling, augmentation
and initial weights are those of the authors' code. That code has no CGE: its layers are a reconstruction from
what an author wrote in issue 4 of github.com/zhangy0822/USER, which leaves the activation and the width open.
CLIP's patches in place of regions, CLIP in place of BERT, the enhancement of texts, the settings from scratch
and the masking of what shows the same thing are ours. So is --unit-norm, which gives x_l unit norm first, as
g has it: patches of the CLIPs trained here have a norm of about 12, beside which a_l g is short.

    python train_user.py                                   # built-in shapes, tiny CLIP from scratch, minutes
    python train_user.py --data flickr30k --root path/to/flickr30k --clip ViT-B/32  # the paper's schedule
    python train_user.py --data coco --root path/to/coco --clip ViT-B/32            # its settings for COCO
    python train_user.py --data flickr30k --root path/to/flickr30k --clip ViT-B/32 --regions
    python train_user.py --enhance none --queue 0 --loss triplet                    # a baseline
    torchrun --nproc_per_node=2 train_user.py              # the same batch and queues over two processes
    python train_user.py --resume                          # go on after an interruption, to the same bits
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import data
import eval
import losses

PRETRAINED = dict(epochs=20, batch_size=128, lr=5e-4, dim=1024, queue=2048, batch_weight=20.0,
                  lr_drop=0.5)  # the paper's for Flickr30K
COCO = PRETRAINED | dict(epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6)  # the paper's for COCO
# a small CLIP with random weights; of 1e-4, 3e-4 and 1e-3 the best for UTO and for InfoNCE (tests/results.md)
SCRATCH = dict(epochs=3, batch_size=128, lr=3e-4, dim=256, queue=2048, batch_weight=1.0, lr_drop=0.85)
MU = 90.0  # UTO: how steeply the push on a negative rises with its cosine
GAMMA = 0.5  # UTO: the cosine from which negatives are pushed away
MAX_NORM = 2.0  # of the gradient
MASKED = 0.5  # share of the changed words of a caption that are masked
REPLACED = 0.1  # share of them that are replaced; the rest is dropped


def settings(argv=None):
    p = eval.common_arguments(__doc__, weight_decay=1e-4)
    p.add_argument("--enhance", choices=("none", "sge", "cge", "both"), default="both")
    p.add_argument("--enhance-texts", action="store_true",
                   help="enhance the words of captions too; the authors' code enhances images alone")
    p.add_argument("--loss", choices=("uto", "infonce", "triplet"), default="uto",
                   help="of the batch and of the queues; infonce and triplet are baselines")
    p.add_argument("--mu", type=eval.positive,
                   help="of UTO (default 90, the paper's): the larger, the more the hardest negative counts")
    p.add_argument("--queue", type=eval.non_negative_int,
                   help="keys per queue; 0: no queues, no momentum encoders (default 2048; coco 4096)")
    p.add_argument("--momentum", type=eval.fraction, default=0.999, help="m of the momentum encoders")
    p.add_argument("--batch-weight", type=eval.non_negative,
                   help="lambda_b: weight of the batch's loss (default 20; coco and from scratch 1)")
    p.add_argument("--dim", type=eval.positive_int,
                   help="dimensions of the common space (default 1024; from scratch 256)")
    p.add_argument("--unit-norm", action="store_true",
                   help="give local features of images unit norm before they are enhanced, so that g, which "
                        "has it, is as long as they are; the authors' code leaves them as they are")
    p.add_argument("--smooth", type=eval.positive, default=1.0, help="lambda of guided enhancement")
    p.add_argument("--dropout", type=eval.fraction, default=0.4, help="in SGE")
    p.add_argument("--augment", type=eval.fraction, default=0.2,
                   help="share of a training caption's words that are masked, replaced or dropped")
    p.add_argument("--clip-lr", type=eval.non_negative,
                   help="learning rate of CLIP's own weights; 0: they stay as they are "
                        "(default --lr; of a pretrained CLIP a tenth)")
    p.add_argument("--lr-drop", type=eval.fraction,
                   help="share of the steps after which learning rates are a tenth "
                        "(default 0.5; coco 0.6; from scratch 0.85)")
    p.add_argument("--regions", action="store_true",
                   help="read region features from <root>/precomp in place of pictures; CGE takes CLIP's "
                        "embedding from the pictures, or from precomp/{train,dev,test}_clip.npy (images, D)")
    args = eval.parse(p, argv)
    from_scratch = args.clip in clip.SCRATCH
    pretrained = COCO if args.data == "coco" else PRETRAINED
    eval.complete(args, "user", SCRATCH if from_scratch else pretrained)
    if args.clip_lr is None:
        args.clip_lr = args.lr if from_scratch else args.lr / 10
    if 0 < args.queue < args.batch_size:
        p.error(f"--batch-size {args.batch_size} is larger than --queue {args.queue}: the queue must hold a "
                f"batch of keys; give --queue {args.batch_size} or more, or 0")
    if args.batch_size < 2:
        p.error("--batch-size 1: batch norm and the losses compare what is in a batch; give it 2 or more")
    if args.mu and args.loss != "uto":
        p.error(f"--mu: --loss {args.loss} has none, only uto has")
    if args.dim < 2:
        p.error("--dim 1: the common space needs 2 dimensions or more")
    if args.regions and args.data == "primitives":
        p.error("--regions: the built-in shapes have none; add --data flickr30k or --data coco")
    return args


# ---------------------------------------------------------------- captions, as they are changed for training

def augmented(tokens, tokenizer, word_ends, fraction):
    """Training captions with about a fraction of their words masked, replaced or dropped (section 4.1).

    tokens (B, columns); word_ends (vocabulary,), bool: the tokens that end a word. A word is all of its
    tokens, and a caption keeps at least one word. The start symbol, which stands nowhere else, is the mask.
    Draws from torch's generator.
    """
    if not fraction:
        return tokens
    out = torch.zeros_like(tokens)
    word_ends = word_ends.numpy()  # numpy takes half of torch's time for arrays as short as these
    for row, caption in zip(out.numpy(), tokens.numpy()):
        ids = caption[1:caption.argmax()]  # (L,): between start and end (the largest id)
        ends = word_ends[ids]
        word = ends.cumsum() - ends  # (L,): the number of the word that each token belongs to
        words = int(word.max()) + 1 if len(ids) else 0
        chance, kind = torch.rand(2, words).numpy()
        changed = chance < fraction
        masked = changed & (kind < MASKED)
        replaced = changed & ~masked & (kind < MASKED + REPLACED)
        dropped = changed & ~masked & ~replaced
        if words and dropped.all():
            dropped[0] = False
        random_ids = torch.randint(0, tokenizer.start, ids.shape, dtype=tokens.dtype).numpy()
        ids = np.where(masked[word], tokenizer.start, ids)
        ids = np.where(replaced[word], random_ids, ids)
        ids = ids[~dropped[word]]
        row[0] = tokenizer.start
        row[1:len(ids) + 1] = ids
        row[len(ids) + 1] = tokenizer.end
    return out


# ---------------------------------------------------------------- the model
# Local features are x (B, L, D), and mask (B, L), bool, is True where there is one. Padding is zero and has
# no effect. A bias that batch norm or a softmax cancels is left out: its gradient would be rounding alone.

def guided_enhancement(x, mask, g, smooth):
    """Guided enhancement (section 3.2): x_l + a_l g for every place l of x (B, L, D).

    g (B, D): a global representation, unit norm. smooth: lambda of the softmax that gives a.
    """
    agreement = smooth * (x @ g[:, :, None])[..., 0]  # (B, L)
    a = F.normalize(agreement.masked_fill(~mask, -math.inf).softmax(1), dim=1)
    return x + a[..., None] * g[:, None, :]


def on_rows(function, x, mask):
    """Apply function to the real rows (rows, D) alone: batch norm must not see padding. -> (B, L, D')."""
    place = mask.flatten().nonzero()[:, 0]
    rows = function(x.flatten(0, 1).index_select(0, place))
    out = rows.new_zeros(mask.numel(), rows.shape[1]).index_copy(0, place, rows)
    return out.view(*mask.shape, -1)


def xavier(module):
    """Give a module's linear layers Xavier's uniform weights and biases of 0, as the authors do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SGE(nn.Module):
    """The global representation of self-guided enhancement: x (B, L, D) -> g (B, D), unit norm.

    Batch norm is over features: the authors' is over the 36 places of regions, which patches and words of
    varying number do not have.
    """

    def __init__(self, width, dropout):
        super().__init__()

        def branch():
            return nn.Sequential(nn.Linear(width, width, bias=False), losses.BatchNorm(width), nn.Tanh(),
                                 nn.Dropout(dropout))

        self.local_branch = branch()
        self.global_branch = branch()
        self.score = nn.Linear(width, 1, bias=False)
        xavier(self)

    def forward(self, x, mask):
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
        common = on_rows(self.local_branch, x, mask) * self.global_branch(mean)[:, None, :]  # (B, L, D)
        weights = self.score(common)[..., 0].masked_fill(~mask, -math.inf).softmax(1)  # (B, L)
        return F.normalize((weights[..., None] * x).sum(1), dim=-1)


class CGE(nn.Module):
    """The global representation of CLIP-guided enhancement: CLIP's own (B, E) -> g (B, D), unit norm."""

    def __init__(self, embed_dim, width):
        super().__init__()
        self.projection = nn.Sequential(losses.BatchNorm(embed_dim), nn.Linear(embed_dim, width, bias=False),
                                        losses.BatchNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.projection[0].bias.requires_grad_(False)  # the second batch norm cancels it
        xavier(self)

    def forward(self, clip_embedding):
        return F.normalize(self.projection(clip_embedding.float()), dim=-1)


class GPO(nn.Module):
    """Generalised pooling operator (Chen et al. 2021, arXiv 2011.04305): (B, L, D) -> (B, D).

    Each dimension's values are sorted and weighted by rank. The weights come from a BiGRU over sinusoidal
    encodings of the ranks, so they depend on the number of local features alone.
    """

    def __init__(self, encoding_dim=32, hidden=32, temperature=0.1):
        super().__init__()
        self.gru = nn.GRU(encoding_dim, hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.encoding_dim = encoding_dim
        self.temperature = temperature

    def weights(self, lengths, columns):
        """The weights of sets of `lengths` (U,) features -> (U, columns), 0 past a length; rows sum to 1."""
        rank = torch.arange(columns, device=lengths.device)[:, None]
        exponent = torch.arange(0, self.encoding_dim, 2, device=lengths.device) / self.encoding_dim
        angle = rank / 10000 ** exponent
        encoding = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # (columns, encoding_dim)
        packed = nn.utils.rnn.pack_padded_sequence(encoding.expand(len(lengths), -1, -1), lengths.cpu(),
                                                   batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=columns)
        forwards, backwards = out.chunk(2, dim=2)  # (U, columns, hidden) each
        scores = self.score((forwards + backwards) / 2)[..., 0] / self.temperature
        return scores.masked_fill(rank.t() >= lengths[:, None], -math.inf).softmax(1)

    def forward(self, x, mask):
        lengths, index = mask.sum(1).unique(return_inverse=True)
        # plain indexing would add up gradients in any order, F.embedding adds them in a fixed one
        weights = F.embedding(index, self.weights(lengths, x.shape[1]))  # (B, L)
        x = x.masked_fill(~mask[..., None], -1e4)  # padding comes last, where weights are 0
        ranked = x.sort(dim=1, descending=True).values
        return (ranked * weights[..., None]).sum(1)


class USER(nn.Module):
    """CLIP's local features, enhanced and pooled. encode_image and encode_text give (B, dim), unit norm.

    enhance: none, sge, cge or both, of images; enhance_texts: of texts as well. smooth: lambda of guided
    enhancement. regions: the width of the region features that take the place of pictures, or None.
    unit_norm: local features of images get unit norm first.
    """

    def __init__(self, clip_model, enhance="both", enhance_texts=False, dim=1024, smooth=1.0, dropout=0.4,
                 regions=None, unit_norm=False, seed=0):
        super().__init__()
        text_width = clip_model.config.embed_dim
        image_width = regions or text_width
        sge = enhance in ("sge", "both")
        cge = enhance in ("cge", "both")
        self.config = clip_model.config
        self.tokenizer = clip_model.tokenizer
        self.context_length = clip_model.context_length
        self.enhance = enhance
        self.smooth = smooth
        self.regions = regions
        self.unit_norm = unit_norm
        self.frozen = False
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.image_sge = SGE(image_width, dropout) if sge else None
            self.image_cge = CGE(text_width, image_width) if cge else None
            self.text_sge = SGE(text_width, dropout) if sge and enhance_texts else None
            self.text_cge = CGE(text_width, text_width) if cge and enhance_texts else None
            self.image_fc = nn.Linear(image_width, dim)
            xavier(self.image_fc)
            self.text_fc = nn.Linear(text_width, dim)
            self.image_mlp = nn.Sequential(nn.Linear(image_width, dim // 2, bias=False),
                                           losses.BatchNorm(dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
            self.image_gpo = GPO()
            self.text_gpo = GPO()
        self.clip = clip_model

    def freeze_clip(self):
        """CLIP's weights stay as they are, and it stays in evaluation mode."""
        self.frozen = True
        self.clip.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.clip.eval()
        return self

    def enhanced(self, x, mask, sge, cge, clip_embedding):
        """x after SGE and CGE, each a module or None. clip_embedding: CLIP's own (B, E); None without CGE."""
        out = x
        if sge is not None:
            out = guided_enhancement(out, mask, sge(x, mask), self.smooth)
        if cge is not None:
            out = guided_enhancement(out, mask, cge(clip_embedding), self.smooth)
        return out

    def region_inputs(self, images):
        """-> (region features (B, regions, width), CLIP's embedding of the images (B, E), None without CGE).

        images: region features, or data.Regions, which come with pictures or embeddings.
        """
        if not isinstance(images, data.Regions):
            return images.float(), None
        clip_embedding = None
        if self.image_cge is not None:
            clip_embedding = images.clip_input
            if clip_embedding.ndim == 4:  # pictures
                clip_embedding = self.clip.encode_image(clip_embedding)
        return images.features.float(), clip_embedding

    def encode_image(self, images):
        """images (B, 3, S, S), or data.Regions; without CGE also region features (B, regions, width)."""
        if self.regions:
            x, clip_embedding = self.region_inputs(images)
        else:
            clip_embedding, x = self.clip.encode_image(images, tokens=True)
            x = x[:, 1:].float()  # (B, patches, D): the class token is the global embedding, no patch
        if self.unit_norm:
            x = F.normalize(x, dim=-1)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x = self.enhanced(x, mask, self.image_sge, self.image_cge, clip_embedding)
        x = self.image_fc(x) + on_rows(self.image_mlp, x, mask)
        return F.normalize(self.image_gpo(x, mask), dim=-1)

    def encode_text(self, tokens):
        """tokens (B, columns), as CLIP's own encode_text takes them."""
        clip_embedding, x, mask = self.clip.encode_text(tokens, tokens=True)
        x = x[:, 1:].float()  # (B, L, D): the start symbol sees no word
        mask = mask[:, 1:]
        x = self.enhanced(x, mask, self.text_sge, self.text_cge, clip_embedding)
        return F.normalize(self.text_gpo(self.text_fc(x), mask), dim=-1)


# ---------------------------------------------------------------- momentum contrast

@torch.no_grad()
def momentum_update(momentum_model, model, m):
    """momentum_model <- m momentum_model + (1 - m) model, weight by weight (He et al. 2020, equation 2).

    Buffers (batch norm's running statistics) are copied. The model and all gradients stay as they are, and so
    do weights that are not trained (a frozen CLIP).
    """
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
        size = len(self.groups)
        place = (self.next + torch.arange(len(group), device=group.device)) % size
        self.images[place] = images.float()
        self.texts[place] = texts.float()
        self.groups[place] = group
        self.next.copy_((self.next + len(group)) % size)


# ---------------------------------------------------------------- the loss

# kind -> (loss of a batch, both directions; loss of queries, their keys and a queue, one direction)
LOSSES = {
    "uto": (losses.uto_loss, losses.uto_queue_loss),
    "infonce": (losses.info_nce_loss, losses.info_nce_queue_loss),
    "triplet": (losses.hardest_triplet_loss, losses.hardest_triplet_queue_loss),
}


def total_loss(kind, batch_weight, images, texts, group, keys, queue, mu=MU):
    """lambda_b times the loss of the batch, plus the losses of both queues.

    images, texts (N, D): unit norm; row j of both is one pair and shows group (N,).
    keys: the momentum embeddings (images, texts) of the same pairs; keys and queue are None without queues.
    mu: UTO's.
    """
    batch_loss, queue_loss = LOSSES[kind]
    if kind == "uto":
        batch_loss = partial(batch_loss, mu=mu, gamma=GAMMA)
        queue_loss = partial(queue_loss, mu=mu, gamma=GAMMA)
    same = group[:, None] == group[None, :]  # (N, N): what shows the same thing is no negative
    loss = batch_weight * batch_loss(images, texts, same)
    if queue is None:
        return loss
    image_keys, text_keys = keys
    same = group[:, None] == queue.groups[None, :]  # (N, K): nor is an older key of the same thing
    loss = loss + queue_loss(images, text_keys, queue.texts, same)
    return loss + queue_loss(texts, image_keys, queue.images, same)


# ---------------------------------------------------------------- training

def restore(checkpoint, path):
    """The model of a checkpoint of this script, for eval.py."""
    options = checkpoint["settings"]
    model = USER(clip.load(path, "cpu")[0], options["enhance"], options.get("enhance_texts", False),
                 options["dim"], options["smooth"], options["dropout"], checkpoint["regions"],
                 options.get("unit_norm", False))
    clip.load_heads(model, checkpoint["heads"])
    return model


def region_width(args, embed_dim, train, *others):
    """The width of the training split's region features.

    Raises DataError where another split's differs, or where CGE lacks CLIP's embedding of the images.
    """
    width = train[0].images[0].features().shape[1]
    for instances in (train, *others):
        view = instances[0].images[0]
        found = view.features().shape[1]
        data.expect(found == width, view.path,
                    f"features of width {found}; those of the training split have {width}")
        if args.enhance in ("cge", "both"):
            file = view.path.replace("_ims.npy", "_clip.npy")
            data.expect(view.has_clip_input(), file,
                        f"does not exist; --enhance {args.enhance} needs CLIP's embedding of each image: "
                        f"write them to this file, float32 (images, {embed_dim}), or lay out the pictures "
                        f"of {args.data} as README.md shows, or give --enhance sge")
            if view.embedding:
                found = len(view.clip_input(None))
                data.expect(found == embed_dim, file,
                            f"embeddings of width {found}; those of --clip {args.clip} have {embed_dim}")
    return width


def main(argv=None):
    args = settings(argv)
    rank, world, device = eval.join(args)
    load = data.load
    if args.regions:
        load = partial(data.load_regions, clip_input=args.enhance in ("cge", "both"))
    (train, _), (val, _), (test, _) = eval.load_splits(args, device, load)
    clip_model, tokenizer = eval.build_or_load(args, train, device)
    embed_dim = clip_model.config.embed_dim
    regions = region_width(args, embed_dim, train, val, test) if args.regions else None
    model = USER(clip_model, args.enhance, args.enhance_texts, args.dim, args.smooth, args.dropout, regions,
                 args.unit_norm, args.seed).to(device)
    if not args.clip_lr:
        model.freeze_clip()
    momentum_model = queue = modules = None
    if args.queue:
        # .train(), because a pretrained CLIP comes in evaluation mode
        momentum_model = copy.deepcopy(model).train().requires_grad_(False)
        queue = Queue(args.queue, args.dim, args.seed).to(device)
        modules = {"momentum": momentum_model, "queue": queue}  # going on needs them, evaluation does not
    loader = data.Loader(train, tokenizer, clip_model.context_length, clip_model.config.image_resolution,
                         args.batch_size, 1, 1, train=True, seed=args.seed, workers=args.workers,
                         rank=rank, world=world, pairs=True, crop=args.crop)
    val_loader = eval.evaluation_loader(model, val, tokenizer, args.workers)
    word_ends = torch.tensor([symbol.endswith("</w>") for symbol in tokenizer.symbols])
    train_group = eval.layout(train)["image_group"].to(device)  # (instances,): equal where they show the same
    heads = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    optimizer = torch.optim.AdamW([{"params": list(clip_model.parameters()), "peak": args.clip_lr},
                                   {"params": heads, "peak": args.lr}],
                                  lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * len(loader)

    def pack():
        return {"regions": regions, "clip": clip.describe(clip_model), "heads": clip.describe_heads(model)}

    def unpack(checkpoint):
        clip_model.load_state_dict(checkpoint["clip"]["state_dict"])
        clip.load_heads(model, checkpoint["heads"])

    run = eval.Run(args, "train_user", optimizer, steps, len(loader), pack, unpack, modules)
    run.say(eval.about(args, clip_model, loader))
    run.say(f"{args.data}: {len(train):,} instances, enhancement {args.enhance}, {args.loss}, "
            f"queues of {args.queue:,}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
            f"{steps:,} steps on {device.type}")
    model.train()
    for step, batch in run.batches(loader):
        for part in optimizer.param_groups:
            part["lr"] = part["peak"] * (0.1 if step >= args.lr_drop * steps else 1.0)
        data.seed_step(args.seed, step, rank)  # augmentation and dropout
        tokens = augmented(batch["tokens"][:, 0], tokenizer, word_ends, args.augment)
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
        loss = total_loss(args.loss, args.batch_weight, images, texts, group, keys, queue, args.mu or MU)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        eval.average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        run.check(loss, norm)
        optimizer.step()
        if args.queue:
            queue.enqueue(*keys, group)
        if run.log(loss, args.batch_size):
            metrics = eval.evaluate(model, val, tokenizer, args.amp, args.workers, val_loader)
            run.keep_best(metrics["rSum"], eval.recalls(metrics), val=metrics)
    eval.report(args, device)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
