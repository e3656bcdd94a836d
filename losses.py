"""Every loss, as a plain function of tensors, and what several processes need to compute one loss together.

Features are unit-norm float32 rows unless said otherwise; s = exp(logit_scale), at most 100. All losses are computed in
float32: wrap the encoders in autocast, not these. Knows nothing of models or data sets.
"""
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
