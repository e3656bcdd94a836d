"""Every loss, as a plain function of tensors, and what several processes need to compute one loss together.

Features are unit-norm float32 rows unless said otherwise; s = exp(logit_scale), at most 100. All losses are computed in
float32: wrap the encoders in autocast, not these. Knows nothing of models or data sets.
"""
import datetime
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---------------------------------------------------------------- several processes

def join(device=None):
    """Join the processes that torchrun started (gloo on CPU, nccl on GPU). Returns (rank, world, device); (0, 1, device) without."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))  # the first process downloads and evaluates while the others wait
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, world, device


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # what every process's loss asks of every row
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B, ...) of this process -> (world B, ...) of all, in the order of ranks; gradients flow back to where rows came from.
    Every process must have the same B; `gather_rows` is for those that do not.

    With the same loss of all rows computed on every process, the gradient of this process's rows is `world` times that
    loss's; `average_gradients`, which divides by `world`, makes the parameters' gradients those of one process with all rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _AllGather.apply(x.contiguous())


def gather_rows(x, owner):
    """x (A, D) and owner (A,), int64 of 0 or more, where A may differ between processes -> both from all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, owner
    most = torch.tensor([len(x)], device=x.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    fill = int(most) - len(x)
    x, owner = gather(F.pad(x, (0, 0, 0, fill))), gather(F.pad(owner, (0, fill), value=-1))
    return x[owner >= 0], owner[owner >= 0]


class BatchNorm(torch.nn.BatchNorm1d):
    """BatchNorm1d of rows (A, D) whose statistics in training are those of all processes' rows, so that several equal one (torch's
    SyncBatchNorm does this on GPUs only). A may differ between processes."""

    def forward(self, x):
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            count = torch.full((1, x.shape[1]), float(len(x)), device=x.device)
            total, squares, count = gather(torch.cat([x.sum(0, keepdim=True), x.square().sum(0, keepdim=True), count])[None]).sum(0)  # each (D,)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes (one message); does nothing in a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def any_process(flag, device):
    """True where the flag is set on any process (so that all of them stop at the same step)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    flag = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


# ---------------------------------------------------------------- contrastive losses on multifold data (MXM-CLR, section 5.1)
# images (A, D) and texts (C, D) are all observations of a batch; image_owner (A,) and text_owner (C,), int64, say which instance
# each shows. Owners may be any numbers; every instance has at least one observation of each modality.

def _logits(images, texts, scale, image_owner, text_owner):
    logits = scale * images.float() @ texts.float().t()  # (A, C)
    return logits, image_owner[:, None] == text_owner[None, :]  # positive: the same instance


def clip_loss(images, texts, scale):
    """Radford et al. 2021, figure 3: rows are pairs, everything off the diagonal is negative; mean of both directions."""
    logits, target = scale * images.float() @ texts.float().t(), torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def hard_loss(images, texts, scale, image_owner, text_owner):
    """MXM-CLR's hard relation: every cross-modal pair of observations of one instance is a positive, and no positive is
    another's negative. Mean over positive pairs (i, j) of -log(e^l_ij / (e^l_ij + sum over other instances' k of e^l_ik)),
    and the same with i and j exchanged."""
    logits, positive = _logits(images, texts, scale, image_owner, text_owner)
    total = 0
    for l, p in ((logits, positive), (logits.t(), positive.t())):
        negatives = l.masked_fill(p, -math.inf).logsumexp(1, keepdim=True)
        total = total + F.softplus(negatives - l)[p].mean() / 2  # -log(a / (a + b)) = softplus(log b - log a)
    return total


def hard_uniform_loss(images, texts, scale, image_owner, text_owner):
    """Cross-entropy against targets uniform over an observation's positives (Khosla et al. 2020's L_out, across modalities):
    positives compete with each other, so that each is held at the same score."""
    logits, positive = _logits(images, texts, scale, image_owner, text_owner)
    total = 0
    for l, p in ((logits, positive), (logits.t(), positive.t())):
        total = total - ((l.log_softmax(1) * p).sum(1) / p.sum(1)).mean() / 2
    return total


def mil_nce_loss(images, texts, scale, image_owner, text_owner):
    """Miech et al. 2020, arXiv 1912.06430, equation 1: -log of the positives' summed probability; one good positive is enough."""
    logits, positive = _logits(images, texts, scale, image_owner, text_owner)
    total = 0
    for l, p in ((logits, positive), (logits.t(), positive.t())):
        total = total + (l.logsumexp(1) - l.masked_fill(~p, -math.inf).logsumexp(1)).mean() / 2
    return total


def instance_means(features, owner):
    """features (A, D), owner (A,) -> (renormalised mean per instance (N, D), position of each row's instance (A,)), instances in
    the order of their numbers."""
    instances, position = owner.unique(return_inverse=True)
    sums = features.new_zeros(len(instances), features.shape[1]).index_add(0, position, features)
    return F.normalize(sums, dim=-1), position


def soft_relation(images, texts, scale, image_owner, text_owner, sharpness=1.0):
    """(N, N) rows q_i = softmax_j( sharpness s (v_i . v_j + t_i . t_j) / 2 ): how alike two instances are, judged with all of their
    observations (v, t: renormalised means over an instance's images and texts). No gradient.

    The relation comes from the features that it trains, so what they cannot tell apart yet is called alike and stays so. A
    sharpness over 1 counts only instances that agree in nearly everything; at 2 it is the product of both modalities' softmaxes.
    """
    with torch.no_grad():
        v, t = instance_means(images.float(), image_owner)[0], instance_means(texts.float(), text_owner)[0]
        return (sharpness * scale * (v @ v.t() + t @ t.t()) / 2).softmax(1)


def group_relation(group):
    """(N, N): the relation where it is known. group (N,), integers: instances of one group are equally alike, others not at all."""
    same = (group[:, None] == group[None, :]).float()
    return same / same.sum(1, keepdim=True)


def soft_loss(images, texts, scale, image_owner, text_owner, relation=None):
    """MXM-CLR's soft relation: each observation's scores against the *instances* of the other modality, softmax_j(s v . t_j), are
    held to its instance's row of `relation` (N, N; default `soft_relation` of the same features) by cross-entropy, both directions."""
    if relation is None:
        relation = soft_relation(images, texts, scale, image_owner, text_owner)
    (v, v_at), (t, t_at) = instance_means(images.float(), image_owner), instance_means(texts.float(), text_owner)
    total = 0
    for x, at, means in ((images, v_at, t), (texts, t_at, v)):
        total = total - (relation[at] * (scale * x.float() @ means.t()).log_softmax(1)).sum(1).mean() / 2
    return total


def mxm_loss(images, texts, scale, image_owner, text_owner, weight, relation=None):
    """MXM-CLR's hybrid: (1 - weight) hard + weight soft, weight (lambda) in [0, 1]."""
    hard = hard_loss(images, texts, scale, image_owner, text_owner)
    return hard if weight == 0 else (1 - weight) * hard + weight * soft_loss(images, texts, scale, image_owner, text_owner, relation)


# ---------------------------------------------------------------- supervised retrieval losses (CLIP4CMR, section 5.2)
# images (N, D) and texts (M, D) are unit-norm, image_labels (N,) and text_labels (M,) int64 classes. Positive pairs are an image
# and a text of one class, negative pairs of two; d is the squared Euclidean distance. Each loss that has an anchor takes images
# and texts as anchors in turn and averages both directions.

def _distances(a, b):
    """Squared Euclidean distances of the rows of a (N, D) and b (M, D) -> (N, M)."""
    a, b = a.float(), b.float()
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.t()).clamp(min=0)


def _square_root(d):
    """Euclidean from squared distances; the gradient of 0 is 0, not infinite."""
    return d.clamp(min=1e-12).sqrt()


def _both_directions(loss, scores, positive):
    return (loss(scores, positive) + loss(scores.t(), positive.t())) / 2


def contrastive_loss(images, texts, image_labels, text_labels, margin=0.2):
    """Chopra et al. 2005 across modalities: (sum of d over positive pairs + sum of max(0, margin - d) over negative pairs) / N."""
    d, positive = _distances(images, texts), image_labels[:, None] == text_labels[None, :]
    return (d[positive].sum() + F.relu(margin - d[~positive]).sum()) / len(images)


def modality_invariant_loss(images, texts, image_labels, text_labels):
    """Sum of d over positive pairs / N: both modalities of a class are drawn together, nothing is pushed apart."""
    return _distances(images, texts)[image_labels[:, None] == text_labels[None, :]].sum() / len(images)


def triplet_loss(images, texts, image_labels, text_labels, margin=0.2):
    """Mean over positive pairs of the sum over the anchor's negatives of max(0, d_positive - d_negative + margin).

    N^3 triplets without N^3 memory: where a triplet is active its value is linear in two distances, so the loss is a weighted sum
    of distances, and the weights are counts: of a positive, the negatives nearer than d + margin; of a negative, minus the
    positives farther than d - margin.
    """
    def one(d, positive):
        with torch.no_grad():
            negatives = d.masked_fill(positive, math.inf).sort(1).values
            positives = d.masked_fill(~positive, -math.inf).sort(1).values
            nearer = torch.searchsorted(negatives, (d + margin).contiguous(), side="left")
            farther = d.shape[1] - torch.searchsorted(positives, (d - margin).contiguous(), side="right")
            weight = torch.where(positive, nearer, -farther).to(d.dtype)
            constant = margin * nearer[positive].sum()
        return ((weight * d).sum() + constant) / positive.sum().clamp(min=1)
    return _both_directions(one, _distances(images, texts), image_labels[:, None] == text_labels[None, :])


def lifted_structure_loss(images, texts, image_labels, text_labels, margin=1.0):
    """Oh Song et al. 2016, arXiv 1511.06452, across modalities, with Euclidean (unsquared) distances: mean over positive pairs of
    (d + log sum over the anchor's negatives of e^(margin - d) + log sum over the positive's negatives of e^(margin - d)) / 2."""
    d, positive = _square_root(_distances(images, texts)), image_labels[:, None] == text_labels[None, :]
    pushed = (margin - d).masked_fill(positive, -math.inf)
    of_image, of_text = pushed.logsumexp(1, keepdim=True), pushed.logsumexp(0, keepdim=True)
    total = d + _finite(of_image) + _finite(of_text)
    return total[positive].sum() / positive.sum().clamp(min=1) / 2


def _finite(x):
    """0 in place of the -inf of an empty sum (an anchor without negatives), with no gradient there."""
    return torch.where(x == -math.inf, torch.zeros_like(x), x)


def n_pairs_loss(images, texts, image_labels, text_labels):
    """Sohn 2016: mean over positive pairs of log(1 + sum over the anchor's negatives of e^(cos_negative - cos_positive))."""
    def one(similarity, positive):
        negatives = similarity.masked_fill(positive, -math.inf).logsumexp(1, keepdim=True)
        return F.softplus(negatives - similarity)[positive].sum() / positive.sum().clamp(min=1)
    return _both_directions(one, images.float() @ texts.float().t(), image_labels[:, None] == text_labels[None, :])


def supervised_contrastive_loss(images, texts, image_labels, text_labels, temperature=0.07):
    """Khosla et al. 2020, arXiv 2004.11362, equation 2, across modalities: mean over anchors that have a positive of the mean over
    its positives of -log softmax of cosines / temperature."""
    def one(similarity, positive):
        has = positive.any(1)
        of_positives = (similarity.log_softmax(1) * positive).sum(1) / positive.sum(1).clamp(min=1)
        return -of_positives[has].sum() / has.sum().clamp(min=1)
    return _both_directions(one, images.float() @ texts.float().t() / temperature, image_labels[:, None] == text_labels[None, :])


# Class-wise losses see one modality's features x (N, D) at a time; a script adds those of both.

def label_regression_loss(logits, labels):
    """Mean Euclidean distance of the classifier's outputs (N, C) from one-hot labels."""
    return _square_root((logits.float() - F.one_hot(labels, logits.shape[1])).square().sum(1)).mean()


def prototype_contrastive_loss(x, prototypes, labels):
    """PCL: cross-entropy over minus the squared distances to the prototypes (C, D), unit-norm."""
    return F.cross_entropy(-_distances(x, prototypes), labels)


def proxy_nca_loss(x, prototypes, labels):
    """Movshovitz-Attias et al. 2017, arXiv 1703.07464: as PCL with the own prototype left out of the denominator; needs 2 classes."""
    d = _distances(x, prototypes)
    own = F.one_hot(labels, len(prototypes)).bool()
    return (d[own] + (-d).masked_fill(own, -math.inf).logsumexp(1)).mean()


def proxy_anchor_loss(x, prototypes, labels, margin=0.1, alpha=32.0):
    """Kim et al. 2020, arXiv 2003.13911, equation 4, with cosines: over the classes of the batch, the mean of log(1 + sum over their
    samples of e^(-alpha (cos - margin))); over all classes, the mean of log(1 + sum over the other samples of e^(alpha (cos + margin)))."""
    similarity, own = x.float() @ prototypes.float().t(), F.one_hot(labels, len(prototypes)).bool()
    pull = (-alpha * (similarity - margin)).masked_fill(~own, -math.inf).logsumexp(0)
    push = (alpha * (similarity + margin)).masked_fill(own, -math.inf).logsumexp(0)
    return F.softplus(pull)[own.any(0)].mean() + F.softplus(push).mean()


# ---------------------------------------------------------------- retrieval with queues (USER, section 5.3)
# images (N, D), texts (N, D): unit-norm, row j of both is one pair. A queue (K, D) holds unit-norm momentum embeddings of the other
# modality. own, bool, marks what shows the same thing as a query and is no negative of it: (N, N) of the batch, where the diagonal
# is always set, (N, K) of a queue. All are finite for every cosine: exponents go into logsumexp, never into exp.


def _one_plus(exponents):
    """log(1 + sum over the last dimension of e^x), with a finite gradient where all x are -inf."""
    return F.pad(exponents, (1, 0)).logsumexp(-1)


def uto_loss(images, texts, own, mu=90.0, gamma=0.5):
    """USER's unified training objective on a batch: with S_ij = v_i . t_j, the mean over j of log(1 + sum over the i not of `own` of
    e^(mu (S_ij - gamma))) / mu + the same of S_ji - log(1 + max(0, S_jj))."""
    similarity = images.float() @ texts.float().t()
    pushed = (mu * (similarity - gamma)).masked_fill(own, -math.inf)
    return (_one_plus(pushed.t()) / mu + _one_plus(pushed) / mu - torch.log1p(similarity.diagonal().clamp(min=0))).mean()


def uto_queue_loss(queries, keys, queue, own, mu=90.0, gamma=0.5):
    """The objective's queue term, one direction: queries (N, D) of one modality, keys (N, D) the momentum embeddings of their
    counterparts, queue (K, D) of older such keys: the negatives."""
    pushed = (mu * (queries.float() @ queue.float().t() - gamma)).masked_fill(own, -math.inf)
    return (_one_plus(pushed) / mu - torch.log1p((queries.float() * keys.float()).sum(1).clamp(min=0))).mean()


def info_nce_loss(images, texts, own, temperature=0.05):
    """Cross-entropy of each pair against the rest of the batch, mean of both directions; a baseline."""
    return (info_nce_queue_loss(images, texts, texts, own, temperature) + info_nce_queue_loss(texts, images, images, own.t(), temperature)) / 2


def info_nce_queue_loss(queries, keys, queue, own, temperature=0.05):
    """MoCo's loss (He et al. 2020, equation 1): cross-entropy of the own key against the queue; a baseline."""
    negatives = (queries.float() @ queue.float().t() / temperature).masked_fill(own, -math.inf)
    positive = (queries.float() * keys.float()).sum(1, keepdim=True) / temperature
    return (torch.cat([positive, negatives], 1).logsumexp(1) - positive[:, 0]).mean()


def hardest_triplet_loss(images, texts, own, margin=0.2):
    """VSE++ (Faghri et al. 2018, equation 6): hinge against the hardest negative of the batch, sum of both directions; a baseline."""
    similarity = images.float() @ texts.float().t()
    others, positive = similarity.masked_fill(own, -math.inf), similarity.diagonal()
    return (F.relu(margin + others.amax(1) - positive) + F.relu(margin + others.amax(0) - positive)).mean()


def hardest_triplet_queue_loss(queries, keys, queue, own, margin=0.2):
    """The same against the hardest key of a queue, one direction."""
    hardest = (queries.float() @ queue.float().t()).masked_fill(own, -math.inf).amax(1)
    return F.relu(margin + hardest - (queries.float() * keys.float()).sum(1)).mean()
