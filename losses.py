"""Losses that several methods share or compare, as plain functions of tensors; gathering over processes.

Features are rows of unit norm unless a docstring says otherwise. s = exp(logit_scale) is at most 100.
All losses are computed in float32: run the encoders under autocast, but not these functions.
This file knows nothing of models or data sets.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F


# ---------------------------------------------------------------- several processes

def several_processes():
    """Whether torchrun started more than one process and they have joined (eval.join)."""
    return dist.is_initialized() and dist.get_world_size() > 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # the sum of what every process's loss asks of every row
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Gather the rows of all processes: (B, ...) of this one -> (world B, ...), in the order of ranks.

    B must be the same on every process; `gather_rows` is for the other case. Gradients flow back to the
    process that a row came from. Every process then computes the same loss of all rows, so the gradient that
    reaches its own rows is `world` times that of the loss; `eval.average_gradients` divides by `world`, and
    the parameters' gradients are those of a single process with all rows.
    """
    if not several_processes():
        return x
    return _AllGather.apply(x.contiguous())


def gather_rows(x, owner):
    """Gather x (A, D) and owner (A,), int64 of 0 or more, where A may differ between processes."""
    if not several_processes():
        return x, owner
    most = torch.tensor([len(x)], device=x.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    fill = int(most) - len(x)
    x = gather(F.pad(x, (0, 0, 0, fill)))
    owner = gather(F.pad(owner, (0, fill), value=-1))
    return x[owner >= 0], owner[owner >= 0]


class BatchNorm(torch.nn.BatchNorm1d):
    """BatchNorm1d of rows (..., D) with the statistics of all processes' rows, so that several equal one.

    torch's SyncBatchNorm does this on GPUs only. The number of rows may differ between processes.
    """

    def forward(self, x):
        shape = x.shape
        x = x.flatten(0, -2)
        if not self.training or not several_processes():
            return super().forward(x).view(shape)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])  # (3, D)
            total, squares, count = gather(sums[None]).sum(0)  # each (D,)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            return ((x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias).view(shape)


# ---------------------------------------------------------------- CLIP's loss, and means of instances

def clip_loss(images, texts, scale):
    """CLIP's loss (Radford et al. 2021, figure 3): row i of images and texts is a pair, all else is negative.

    Mean of the cross-entropies of both directions.
    """
    logits = scale * images.float() @ texts.float().t()
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def instance_means(features, owner):
    """The renormalised mean of each instance's features.

    features (A, D), owner (A,) -> (means (N, D), position (A,)). Instances are in the order of their numbers,
    and position says which of them each row belongs to.
    """
    instances, position = owner.unique(return_inverse=True)
    sums = features.new_zeros(len(instances), features.shape[1]).index_add(0, position, features)
    return F.normalize(sums, dim=-1), position


# ---------------------------------------------------------------- supervised retrieval losses (CLIP4CMR)
# images (N, D) and texts (M, D) have unit norm; image_labels (N,) and text_labels (M,) are int64 classes. An
# image and a text are a positive pair where their classes agree, else a negative one. d is the squared
# Euclidean distance. A loss that has an anchor takes images and texts as anchors in turn and averages both
# directions.
# A temperature divides cosines (in lifted structure sqrt(d)), also where a loss is written with d: since d =
# 2 - 2 cos, e^(-d / (2 temperature)) is proportional to e^(cos / temperature). The authors' code below is
# github.com/zhixiongz/CLIP4CMR, commit d8b3901. What is said of it was found by reading it and by running its
# losses on the same features.

def _distances(a, b):
    """Squared Euclidean distances of the rows of a (N, D) and b (M, D) -> (N, M)."""
    a, b = a.float(), b.float()
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.t()).clamp(min=0)


def _square_root(d):
    """Euclidean from squared distances; the gradient at 0 is 0, not infinite."""
    return d.clamp(min=1e-12).sqrt()


def _both_directions(loss, scores, positive):
    return (loss(scores, positive) + loss(scores.t(), positive.t())) / 2


def _same_class(image_labels, text_labels):
    return image_labels[:, None] == text_labels[None, :]


def contrastive_loss(images, texts, image_labels, text_labels, margin=1.4):
    """Hadsell et al. 2006 (equation 4) across modalities, balanced:

        mean over positive pairs of d + mean over negative pairs of max(0, margin - sqrt(d))^2

    The margin is compared with unsquared distances, which are about sqrt(2) at the start. Each kind of pair
    has a mean of its own, so that the many negatives do not drown the positives. Both are ours: the authors'
    code divides all pairs by N and compares squared distances with a margin of 0.2, within which no negative
    is at the start.
    """
    d = _distances(images, texts)
    positive = _same_class(image_labels, text_labels)
    pull = d[positive].sum() / positive.sum().clamp(min=1)
    push = F.relu(margin - _square_root(d[~positive])).square().sum() / (~positive).sum().clamp(min=1)
    return pull + push


def modality_invariant_loss(images, texts, image_labels, text_labels):
    """Sum of d over positive pairs / N. The modalities of a class are drawn together and nothing is pushed
    apart."""
    return _distances(images, texts)[_same_class(image_labels, text_labels)].sum() / len(images)


def triplet_loss(images, texts, image_labels, text_labels, margin=0.2):
    """Mean over positive pairs of the sum over the anchor's negatives of max(0, d_positive - d_negative +
    margin). The authors' code takes the sum of both directions, not their mean.

    N^3 triplets without N^3 memory: an active triplet is linear in two distances, so the loss is a weighted
    sum of distances. The weights are counts. A positive's is the number of negatives nearer than d + margin;
    a negative's is minus the number of positives farther than d - margin.
    """
    def one_direction(d, positive):
        with torch.no_grad():
            negatives = d.masked_fill(positive, math.inf).sort(1).values
            positives = d.masked_fill(~positive, -math.inf).sort(1).values
            nearer = torch.searchsorted(negatives, (d + margin).contiguous(), side="left")
            farther = d.shape[1] - torch.searchsorted(positives, (d - margin).contiguous(), side="right")
            weight = torch.where(positive, nearer, -farther).to(d.dtype)
            constant = margin * nearer[positive].sum()
        return ((weight * d).sum() + constant) / positive.sum().clamp(min=1)
    return _both_directions(one_direction, _distances(images, texts), _same_class(image_labels, text_labels))


def lifted_structure_loss(images, texts, image_labels, text_labels, temperature=1.0):
    """Oh Song et al. 2016 (arXiv 1511.06452) across modalities, with u = sqrt(d). Mean over positive pairs of

        ( 2 u / temperature + log sum over the image's negatives of e^(-u / temperature)
            + log sum over the text's negatives of e^(-u / temperature) ) / 2

    The paper's margin is left out: without its outer hinge it adds a constant. The authors' code counts u
    once, and takes the text's negatives from the row of the image that has the text's number. Here the text
    has negatives of its own, and u counts once for each of the two sums: products' features reach a
    validation mAP of 97 with it and of 64 without, at a temperature of 0.1.
    """
    u = _square_root(_distances(images, texts)) / temperature
    positive = _same_class(image_labels, text_labels)
    pushed = (-u).masked_fill(positive, -math.inf)
    of_image = pushed.logsumexp(1, keepdim=True)
    of_text = pushed.logsumexp(0, keepdim=True)
    total = 2 * u + _finite(of_image) + _finite(of_text)
    return total[positive].sum() / positive.sum().clamp(min=1) / 2


def _finite(x):
    """0, without a gradient, in place of the -inf of an empty sum (an anchor that has no negatives)."""
    return torch.where(x == -math.inf, torch.zeros_like(x), x)


def n_pairs_loss(images, texts, image_labels, text_labels, temperature=1.0):
    """Sohn 2016 (equation 5) across modalities:

        mean over positive pairs of
        log(1 + sum over the anchor's negatives of e^((cos_negative - cos_positive) / temperature))

    The authors' code takes e^cos for the cosine, leaves out the 1, penalises norms that are 1 anyway, and
    stops at an undefined name, so that it cannot have been run as it stands.
    """
    def one_direction(logits, positive):
        negatives = logits.masked_fill(positive, -math.inf).logsumexp(1, keepdim=True)
        return F.softplus(negatives - logits)[positive].sum() / positive.sum().clamp(min=1)
    logits = images.float() @ texts.float().t() / temperature
    return _both_directions(one_direction, logits, _same_class(image_labels, text_labels))


def supervised_contrastive_loss(images, texts, image_labels, text_labels, temperature=0.07):
    """Khosla et al. 2020 (arXiv 2004.11362), equation 2, across modalities.

    Mean over the anchors that have a positive, of the mean over its positives, of -log softmax(cosines /
    temperature). The authors' code has -d, divided by its mean in the batch, in place of cosines over a
    temperature, leaves the positives out of the denominator, and takes images alone as anchors.
    """
    def one_direction(logits, positive):
        has_positive = positive.any(1)
        of_positives = (logits.log_softmax(1) * positive).sum(1) / positive.sum(1).clamp(min=1)
        return -of_positives[has_positive].sum() / has_positive.sum().clamp(min=1)
    logits = images.float() @ texts.float().t() / temperature
    return _both_directions(one_direction, logits, _same_class(image_labels, text_labels))


# Class-wise losses see the features x (N, D) of one modality at a time; train_clip4cmr.py adds those of both.

def label_regression_loss(logits, labels):
    """Mean Euclidean distance of the classifier's outputs (N, C) from the one-hot labels."""
    return _square_root((logits.float() - F.one_hot(labels, logits.shape[1])).square().sum(1)).mean()


def prototype_contrastive_loss(x, prototypes, labels, temperature=0.5):
    """PCL: cross-entropy over -d / (2 temperature), with d to the prototypes (C, D), which have unit norm.

    The paper's -d is a temperature of 0.5. The authors' code divides by the batch's size twice, so that there
    a small last batch counts more.
    """
    return F.cross_entropy(-_distances(x, prototypes) / (2 * temperature), labels)


def proxy_nca_loss(x, prototypes, labels, temperature=0.5):
    """Proxy-NCA (Movshovitz-Attias et al. 2017, arXiv 1703.07464): PCL with the right prototype left out of
    the denominator. Needs two classes or more.

    The paper's -d is a temperature of 0.5. The authors' code has the cosine in its place, a temperature of 1;
    it cannot be run as it stands, since its docstring is not closed.
    """
    d = _distances(x, prototypes) / (2 * temperature)
    right = F.one_hot(labels, len(prototypes)).bool()
    return (d[right] + (-d).masked_fill(right, -math.inf).logsumexp(1)).mean()


def proxy_anchor_loss(x, prototypes, labels, margin=0.1, alpha=32.0):
    """Proxy-Anchor (Kim et al. 2020, arXiv 2003.13911, equation 4), with cosines:

        mean over the classes of the batch of log(1 + sum over their samples of e^(-alpha (cos - margin)))
        + mean over all classes of log(1 + sum over the other samples of e^(alpha (cos + margin)))
    """
    cosine = x.float() @ prototypes.float().t()
    right = F.one_hot(labels, len(prototypes)).bool()
    pull = (-alpha * (cosine - margin)).masked_fill(~right, -math.inf).logsumexp(0)
    push = (alpha * (cosine + margin)).masked_fill(right, -math.inf).logsumexp(0)
    return F.softplus(pull)[right.any(0)].mean() + F.softplus(push).mean()


# ---------------------------------------------------------------- baselines with queues (of USER)
# images (N, D) and texts (N, D) have unit norm; row j of both is one pair. A queue (K, D) holds unit-norm
# momentum embeddings of the other modality. same, bool, marks what shows the same thing as a query and is
# therefore no negative of it: (N, N) in the batch, where the diagonal is always set, (N, K) in a queue. All
# losses are finite for every cosine: exponents go into logsumexp, never into exp.

def info_nce_loss(images, texts, same, temperature=0.05):
    """A baseline: cross-entropy of each pair against the rest of the batch, mean of both directions."""
    to_text = info_nce_queue_loss(images, texts, texts, same, temperature)
    to_image = info_nce_queue_loss(texts, images, images, same.t(), temperature)
    return (to_text + to_image) / 2


def info_nce_queue_loss(queries, keys, queue, same, temperature=0.05):
    """A baseline, MoCo's loss (He et al. 2020, equation 1): cross-entropy of a query's key against the
    queue."""
    negatives = (queries.float() @ queue.float().t() / temperature).masked_fill(same, -math.inf)
    positive = (queries.float() * keys.float()).sum(1, keepdim=True) / temperature
    return (torch.cat([positive, negatives], 1).logsumexp(1) - positive[:, 0]).mean()


def hardest_triplet_loss(images, texts, same, margin=0.2):
    """A baseline, VSE++ (Faghri et al. 2018, equation 6): hinge against the batch's hardest negative, both
    directions."""
    cosine = images.float() @ texts.float().t()
    positive = cosine.diagonal()
    negatives = cosine.masked_fill(same, -math.inf)
    to_text = F.relu(margin + negatives.amax(1) - positive)
    to_image = F.relu(margin + negatives.amax(0) - positive)
    return (to_text + to_image).mean()


def hardest_triplet_queue_loss(queries, keys, queue, same, margin=0.2):
    """The same hinge against the hardest key of a queue, in one direction."""
    hardest = (queries.float() @ queue.float().t()).masked_fill(same, -math.inf).amax(1)
    return F.relu(margin + hardest - (queries.float() * keys.float()).sum(1)).mean()
