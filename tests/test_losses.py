"""Tests of losses.py: every loss against loops over samples, in value and in gradient, at extremes and in
half precision. A function with the name of a loss is that loss by its definition.

Each script's own loss is tested with it, CLIP's and means of instances in test_mxm.py, gathering and batch
norm over two processes by the whole runs in test_runs.py.
"""
import functools

import pytest
import torch
import torch.nn.functional as F

import losses


def features(rows, seed, dim=6):
    x = torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def value_and_gradients(loss, leaves, *others):
    """The loss and its gradient for each of the leaves, in double precision."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves, *others)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]


def assert_close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert e.abs().max() > 0 and (f - e).abs().max() <= tolerance * e.abs().max(), (f, e)


def assert_finite(values):
    assert all(value.isfinite().all() for value in values)


# ---------------------------------------------------------------- supervised retrieval losses

def both_directions(terms_of, images, texts, scale, image_owner, text_owner):
    """The mean of the images' terms and that of the texts', averaged. terms_of: those of one observation,
    from e^logit of its pairs within its instance and of all others."""
    total = 0
    image_to_text = (images, image_owner, texts, text_owner)
    text_to_image = (texts, text_owner, images, image_owner)
    for x, owner, y, other in (image_to_text, text_to_image):
        terms = []
        for i in range(len(x)):
            e = [(scale * (x[i] * y[j]).sum()).exp() for j in range(len(y))]
            positives = [e[j] for j in range(len(y)) if other[j] == owner[i]]
            negatives = [e[j] for j in range(len(y)) if other[j] != owner[i]]
            terms += terms_of(positives, negatives)
        total = total + mean(terms) / 2
    return total


def pair_terms(positives, negatives):
    """Each positive against the negatives alone."""
    return [-torch.log(p / (p + sum(negatives))) for p in positives]


def mean_terms(positives, negatives):
    """The mean of the positives, each against all that there is."""
    if not positives:
        return []
    return [mean(-torch.log(p / sum(positives + negatives)) for p in positives)]


CLASSES = 5  # class 4 has no sample, class 3 only a text, class 2 only an image
IMAGE_LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 1])
TEXT_LABELS = torch.tensor([1, 0, 3, 1, 0, 1])


def squared(a, b):
    return ((a - b) ** 2).sum()


def pairs(x, y, x_labels, y_labels):
    """(anchor, positive, the anchor's negatives, the positive's negatives) of every positive pair."""
    for p, label in zip(x, x_labels):
        of_p = [n for n, other in zip(y, y_labels) if other != label]
        of_q = [n for n, other in zip(x, x_labels) if other != label]
        for q, other in zip(y, y_labels):
            if other == label:
                yield p, q, of_p, of_q


def contrastive_loss(x, y, a, b, margin=1.4):
    pull = [squared(p, q) for p, i in zip(x, a) for q, j in zip(y, b) if i == j]
    push = [(margin - squared(p, q).sqrt()).clamp(min=0) ** 2
            for p, i in zip(x, a) for q, j in zip(y, b) if i != j]
    return mean(pull) + mean(push)


def modality_invariant_loss(x, y, a, b):
    return sum(squared(p, q) for p, q, _, _ in pairs(x, y, a, b)) / len(x)


def triplet_loss(x, y, a, b, margin=0.2):
    total = 0
    for batch in ((x, y, a, b), (y, x, b, a)):
        terms = []
        for p, q, negatives, _ in pairs(*batch):
            terms.append(sum((squared(p, q) - squared(p, n) + margin).clamp(min=0) for n in negatives))
        total = total + mean(terms) / 2
    return total


def lifted_structure_loss(x, y, a, b, temperature=1.0):
    def distance(p, q):
        return squared(p, q).sqrt() / temperature

    def pushed(p, negatives):
        return torch.log(sum((-distance(p, n)).exp() for n in negatives))
    terms = []
    for p, q, of_p, of_q in pairs(x, y, a, b):
        terms.append((2 * distance(p, q) + pushed(p, of_p) + pushed(q, of_q)) / 2)
    return mean(terms)


def n_pairs_loss(x, y, a, b, temperature=1.0):
    return both_directions(pair_terms, x, y, 1 / temperature, a, b)


def supervised_contrastive_loss(x, y, a, b, temperature=0.07):
    return both_directions(mean_terms, x, y, 1 / temperature, a, b)


def label_regression_loss(logits, labels):
    return mean(squared(row, torch.eye(CLASSES)[c]).sqrt() for row, c in zip(logits, labels))


def prototype_contrastive_loss(x, prototypes, labels, temperature=0.5, without_right=False):
    terms = []
    for p, c in zip(x, labels):
        e = [(-squared(p, q) / (2 * temperature)).exp() for q in prototypes]
        terms.append(-torch.log(e[c] / (sum(e) - e[c] * without_right)))
    return mean(terms)


def proxy_nca_loss(x, prototypes, labels, temperature=0.5):
    return prototype_contrastive_loss(x, prototypes, labels, temperature, without_right=True)


def proxy_anchor_loss(x, prototypes, labels, margin=0.1, alpha=32.0):
    pull, push = [], []
    for k, q in enumerate(prototypes):
        of_class = [p for p, c in zip(x, labels) if c == k]
        others = [p for p, c in zip(x, labels) if c != k]
        if of_class:
            pull.append(torch.log(1 + sum((-alpha * (p @ q - margin)).exp() for p in of_class)))
        push.append(torch.log(1 + sum((alpha * (p @ q + margin)).exp() for p in others)))
    return mean(pull) + mean(push)


# each loss by its definition, and constants other than the defaults
PAIR_WISE = {contrastive_loss: {"margin": 0.9}, modality_invariant_loss: {},
             triplet_loss: {"margin": 1.0}, lifted_structure_loss: {"temperature": 0.2},
             n_pairs_loss: {"temperature": 0.2}, supervised_contrastive_loss: {"temperature": 0.5}}
CLASS_WISE = {prototype_contrastive_loss: {"temperature": 0.1}, proxy_nca_loss: {"temperature": 0.1},
              proxy_anchor_loss: {"margin": 0.3, "alpha": 4.0}, label_regression_loss: {}}


def assert_same_loss(definition, leaves, labels, constants):
    """With its defaults and with other constants, which give another value."""
    loss = getattr(losses, definition.__name__)
    values = []
    for chosen in ({}, constants):
        expected = value_and_gradients(functools.partial(definition, **chosen), leaves, *labels)
        found = value_and_gradients(functools.partial(loss, **chosen), leaves, *labels)
        assert_close(found, expected)
        values.append(expected[0].item())
    assert not constants or abs(values[0] - values[1]) > 0.01


@pytest.mark.parametrize("definition", PAIR_WISE)
def test_pair_wise(definition):
    leaves = (features(7, 0, dim=4), features(6, 1, dim=4))
    assert_same_loss(definition, leaves, (IMAGE_LABELS, TEXT_LABELS), PAIR_WISE[definition])


@pytest.mark.parametrize("definition", CLASS_WISE)
def test_class_wise(definition):
    leaves = [features(7, 2, dim=CLASSES)]
    if definition is not label_regression_loss:
        leaves.append(features(CLASSES, 3, dim=CLASSES))  # the prototypes
    assert_same_loss(definition, leaves, (IMAGE_LABELS,), CLASS_WISE[definition])


@pytest.mark.parametrize("definition", PAIR_WISE)
@pytest.mark.parametrize("case", ["no negatives", "no positives", "equal features"])
def test_pair_wise_extremes_stay_finite(definition, case):
    leaves = (features(6, 4).float(), features(6, 5).float())
    if case == "equal features":
        leaves = (torch.eye(6)[:1].repeat(6, 1),) * 2  # at distances of exactly 0
    image_labels = torch.arange(6) // 2 if case == "equal features" else torch.zeros(6)
    text_labels = image_labels + (case == "no positives")
    loss = getattr(losses, definition.__name__)
    assert_finite(value_and_gradients(loss, leaves, image_labels, text_labels))


def test_label_regression_of_what_is_right_stays_finite():
    """A distance of exactly 0, where a square root has no gradient."""
    assert_finite(value_and_gradients(losses.label_regression_loss, (torch.eye(3),), torch.arange(3)))


# ---------------------------------------------------------------- retrieval with queues

N, K = 5, 7


def log_one_plus(exponents):
    """log(1 + sum of e^x), in double precision without any trick."""
    return torch.log(1 + sum((x.exp() for x in exponents), torch.zeros((), dtype=torch.float64)))


def info_nce_term(positive, negatives):
    return log_one_plus([(n - positive) / 0.05 for n in negatives])


def triplet_term(positive, negatives):
    return max([(0.2 + n - positive).clamp(min=0) for n in negatives], default=0 * positive)


def queue_loss(term, queries, keys, queue, same):
    terms = []
    for i, query in enumerate(queries):
        negatives = [query @ key for key, is_same in zip(queue, same[i]) if not is_same]
        terms.append(term(query @ keys[i], negatives))
    return mean(terms)


def batch_loss(term, x, y, same):
    """The sum of both directions: texts are the queue of images, and images that of texts."""
    return queue_loss(term, x, y, y, same) + queue_loss(term, y, x, x, same.t())


def info_nce_loss(x, y, same):
    return batch_loss(info_nce_term, x, y, same) / 2


def hardest_triplet_loss(x, y, same):
    return batch_loss(triplet_term, x, y, same)


QUEUE_LOSSES = [(losses.info_nce_queue_loss, info_nce_term),
                (losses.hardest_triplet_queue_loss, triplet_term)]
BATCH_LOSSES = [(losses.info_nce_loss, info_nce_loss),
                (losses.hardest_triplet_loss, hardest_triplet_loss)]
SAME = torch.tensor([0, 1, 0, 3, 0])[:, None] == torch.tensor([0, 1, 0, 3, 0])


@pytest.mark.parametrize("loss, definition", BATCH_LOSSES)
def test_batch_losses(loss, definition):
    leaves = (features(N, 0, dim=3), features(N, 10, dim=3))
    expected = value_and_gradients(definition, leaves, SAME)
    assert_close(value_and_gradients(loss, leaves, SAME), expected)


@pytest.mark.parametrize("loss, term", QUEUE_LOSSES)
def test_queue_losses_leave_out_keys_of_the_same(loss, term):
    queries, keys, queue = features(N, 0, dim=3), features(N, 1, dim=3), features(K, 2, dim=3)
    same = torch.zeros(N, K, dtype=torch.bool)
    same[0, 3] = same[2, 0] = same[2, 6] = True
    same[4] = True  # no negatives at all
    expected = value_and_gradients(functools.partial(queue_loss, term), (queries,), keys, queue, same)
    assert_close(value_and_gradients(loss, (queries,), keys, queue, same), expected)


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_finite_for_any_cosine_in_half_precision(cosine):
    """All at one cosine: e^(1 / 0.05) of each of 4,096 keys would overflow."""
    x = F.normalize(torch.ones(4, 8, dtype=torch.float16), dim=1)
    y = cosine * x
    same = torch.zeros(4, 4096, dtype=torch.bool)
    for loss, _ in BATCH_LOSSES:
        assert_finite(value_and_gradients(loss, (x,), y, torch.eye(4, dtype=torch.bool)))
    for loss, _ in QUEUE_LOSSES:
        assert_finite(value_and_gradients(loss, (x,), y, y[:1].expand(4096, 8), same))
