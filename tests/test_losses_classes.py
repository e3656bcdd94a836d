"""Tests of the supervised retrieval losses in losses.py: each against loops over pairs and triplets written from its definition,
in value and in gradient, with classes that have no positive, no negative or no sample in the batch."""
import pytest
import torch
import torch.nn.functional as F

import losses

CLASSES = 5  # class 4 has no sample, class 3 only texts, class 2 only an image
IMAGE_LABELS, TEXT_LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 1]), torch.tensor([1, 0, 3, 1, 0, 1])


def rows(n, seed, dim=4):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1).requires_grad_()


def squared(a, b):
    return ((a - b) ** 2).sum()


def pairs(x, y, labels_x, labels_y):
    """(anchor, positive, the anchor's negatives, the positive's negatives) of every positive pair."""
    for i in range(len(x)):
        for j in range(len(y)):
            if labels_x[i] == labels_y[j]:
                yield x[i], y[j], [y[k] for k in range(len(y)) if labels_y[k] != labels_x[i]], [x[k] for k in range(len(x)) if labels_x[k] != labels_y[j]]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def both(one, x, y, labels_x, labels_y):
    return (one(x, y, labels_x, labels_y) + one(y, x, labels_y, labels_x)) / 2


def contrastive(x, y, a, b, margin=0.2):
    d = [(squared(x[i], y[j]), a[i] == b[j]) for i in range(len(x)) for j in range(len(y))]
    return (sum(v for v, same in d if same) + sum((margin - v).clamp(min=0) for v, same in d if not same)) / len(x)


def modality_invariant(x, y, a, b):
    return sum(squared(p, q) for p, q, _, _ in pairs(x, y, a, b)) / len(x)


def triplet(x, y, a, b):
    return both(lambda *args: mean(sum((squared(p, q) - squared(p, n) + 0.2).clamp(min=0) for n in negatives) for p, q, negatives, _ in pairs(*args)), x, y, a, b)


def lifted_structure(x, y, a, b):
    e = lambda p, negatives: torch.log(sum((1 - squared(p, n).sqrt()).exp() for n in negatives))
    return mean((squared(p, q).sqrt() + e(p, of_p) + e(q, of_q)) / 2 for p, q, of_p, of_q in pairs(x, y, a, b))


def n_pairs(x, y, a, b):
    return both(lambda *args: mean(torch.log(1 + sum(((p * n).sum() - (p * q).sum()).exp() for n in negatives)) for p, q, negatives, _ in pairs(*args)), x, y, a, b)


def supervised_contrastive(x, y, a, b, temperature=0.07):
    def one(x, y, a, b):
        terms = []
        for i in range(len(x)):
            weights = [((x[i] * y[j]).sum() / temperature).exp() for j in range(len(y))]
            own = [-torch.log(w / sum(weights)) for j, w in enumerate(weights) if a[i] == b[j]]
            terms += [mean(own)] if own else []
        return mean(terms)
    return both(one, x, y, a, b)


def label_regression(x, prototypes, labels):
    one_hot = lambda c: torch.tensor([float(k == c) for k in range(CLASSES)])
    return mean(squared(p @ prototypes.t(), one_hot(c)).sqrt() for p, c in zip(x, labels))


def prototype_contrastive(x, prototypes, labels):
    return mean(-torch.log((-squared(p, prototypes[c])).exp() / sum((-squared(p, q)).exp() for q in prototypes)) for p, c in zip(x, labels))


def proxy_nca(x, prototypes, labels):
    return mean(-torch.log((-squared(p, prototypes[c])).exp() / sum((-squared(p, q)).exp() for k, q in enumerate(prototypes) if k != c)) for p, c in zip(x, labels))


def proxy_anchor(x, prototypes, labels, margin=0.1, alpha=32.0):
    pull, push = [], []
    for k, q in enumerate(prototypes):
        own, others = [p for p, c in zip(x, labels) if c == k], [p for p, c in zip(x, labels) if c != k]
        pull += [torch.log(1 + sum((-alpha * ((p * q).sum() - margin)).exp() for p in own))] if own else []
        push.append(torch.log(1 + sum((alpha * ((p * q).sum() + margin)).exp() for p in others)))
    return mean(pull) + mean(push)


def same(ours, plain, leaves):
    """Equal value, and equal gradient for every leaf."""
    value, expected = ours(), plain()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and value.item() != 0
    for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("plain", [contrastive, modality_invariant, triplet, lifted_structure, n_pairs, supervised_contrastive])
def test_pair_wise(plain):
    x, y, ours = rows(7, 0), rows(6, 1), getattr(losses, plain.__name__ + "_loss")
    same(lambda: ours(x, y, IMAGE_LABELS, TEXT_LABELS), lambda: plain(x, y, IMAGE_LABELS, TEXT_LABELS), [x, y])


@pytest.mark.parametrize("plain", [prototype_contrastive, proxy_nca, proxy_anchor, label_regression])
def test_class_wise(plain):
    x, prototypes, ours = rows(7, 2), rows(CLASSES, 3), getattr(losses, plain.__name__ + "_loss")
    call = (lambda: ours(x @ prototypes.t(), IMAGE_LABELS)) if plain is label_regression else (lambda: ours(x, prototypes, IMAGE_LABELS))
    same(call, lambda: plain(x, prototypes, IMAGE_LABELS.tolist()), [x, prototypes])


@pytest.mark.parametrize("name", ["contrastive", "modality_invariant", "triplet", "lifted_structure", "n_pairs", "supervised_contrastive"])
@pytest.mark.parametrize("case", ["one class", "nothing in common", "equal features"])
def test_batches_without_negatives_or_positives_have_finite_gradients(name, case):
    x, y = rows(6, 4), rows(6, 5)
    if case == "equal features":
        x, y = (rows(1, 6).detach().repeat(6, 1).requires_grad_() for _ in range(2))
    labels = {"one class": (torch.zeros(6, dtype=torch.int64),) * 2, "nothing in common": (torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)),
              "equal features": (torch.arange(6) // 2,) * 2}[case]
    loss = getattr(losses, name + "_loss")(x, y, *labels)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and y.grad.isfinite().all()


def test_triplet_of_ties_at_the_margin():
    """Distances that meet the margin exactly: the hinge is 0 there, from either side."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])  # squared distances 2, 2, 4
    labels = torch.tensor([0]), torch.tensor([0, 1, 1])
    assert losses.triplet_loss(x, y, *labels, margin=2.0).item() == pytest.approx((2.0 + 0.0) / 2)  # texts as anchors have no negative image
