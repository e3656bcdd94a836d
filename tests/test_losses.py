"""Tests of losses.py: every loss against loops over observations, written from the definitions; two processes against one.

    python -m pytest tests/test_losses.py
"""
import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# owners are any numbers, in any order; instances have 1 to 4 images and 1 to 3 captions
IMAGE_OWNER = torch.tensor([900, 3, 41, 3, 900, 17, 3, 41, 3, 5])
TEXT_OWNER = torch.tensor([41, 17, 3, 5, 17, 900, 41, 3, 41])
LOSSES = {"hard": losses.hard_loss, "hard-uniform": losses.hard_uniform_loss, "mil-nce": losses.mil_nce_loss, "soft": losses.soft_loss,
          "hybrid": functools.partial(losses.mxm_loss, weight=0.3)}


def features(rows, seed, dim=6):
    x = torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1)


# ---------------------------------------------------------------- the definitions, observation by observation

def one_way(name, score, owner, other):
    """Mean loss of the observations `owner` against `other`; score[i][j] is the logit of observation i and j."""
    terms, columns = [], range(len(other))
    for i in range(len(owner)):
        positives = [j for j in columns if other[j] == owner[i]]
        negatives = sum(score[i][k].exp() for k in columns if other[k] != owner[i])
        everything = sum(score[i][k].exp() for k in columns)
        if name == "hard":
            terms += [-torch.log(score[i][j].exp() / (score[i][j].exp() + negatives)) for j in positives]
        elif name == "hard-uniform":
            terms.append(sum(-torch.log(score[i][j].exp() / everything) for j in positives) / len(positives))
        elif name == "mil-nce":
            terms.append(-torch.log(sum(score[i][j].exp() for j in positives) / everything))
    return sum(terms) / len(terms)


def mean_of(x, owner, number):
    total = sum(x[i] for i in range(len(owner)) if owner[i] == number)
    return total / total.pow(2).sum().sqrt()


def relation_by_loops(images, texts, scale, image_owner, text_owner):
    numbers = sorted(set(image_owner))
    v, t = [mean_of(images, image_owner, n) for n in numbers], [mean_of(texts, text_owner, n) for n in numbers]
    rows = []
    for i in range(len(numbers)):
        e = [(scale * ((v[i] * v[j]).sum() + (t[i] * t[j]).sum()) / 2).exp() for j in range(len(numbers))]
        rows.append([x / sum(e) for x in e])
    return rows


def soft_by_loops(images, texts, scale, image_owner, text_owner):
    numbers = sorted(set(image_owner))
    q = relation_by_loops(images.detach(), texts.detach(), scale.detach(), image_owner, text_owner)
    total = 0
    for x, owner, y, other in ((images, image_owner, texts, text_owner), (texts, text_owner, images, image_owner)):
        means, terms = [mean_of(y, other, n) for n in numbers], []
        for i in range(len(owner)):
            e = [(scale * (x[i] * m).sum()).exp() for m in means]
            row = q[numbers.index(owner[i])]
            terms.append(-sum(row[j] * torch.log(e[j] / sum(e)) for j in range(len(numbers))))
        total = total + sum(terms) / len(terms) / 2
    return total


def by_loops(name, images, texts, scale, image_owner, text_owner):
    arguments = images, texts, scale, image_owner.tolist(), text_owner.tolist()
    if name == "soft":
        return soft_by_loops(*arguments)
    if name == "hybrid":
        return 0.7 * by_loops("hard", images, texts, scale, image_owner, text_owner) + 0.3 * soft_by_loops(*arguments)
    score = [[scale * (images[i] * texts[j]).sum() for j in range(len(texts))] for i in range(len(images))]
    transposed = [list(column) for column in zip(*score)]
    return (one_way(name, score, *arguments[3:]) + one_way(name, transposed, *arguments[:2:-1])) / 2


def value_and_gradients(loss, images, texts, scale, *owners):
    leaves = [x.detach().clone().requires_grad_() for x in (images, texts, scale)]
    value = loss(*leaves, *owners)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]


def close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert (f - e).abs().max() <= tolerance * max(1.0, e.abs().max()), (f, e)


# ---------------------------------------------------------------- one process

@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_loops(name):
    arguments = features(10, 0), features(9, 1), torch.tensor(7.0, dtype=torch.float64), IMAGE_OWNER, TEXT_OWNER
    close(value_and_gradients(LOSSES[name], *arguments), value_and_gradients(functools.partial(by_loops, name), *arguments))


def test_clip_loss_and_gradient_equal_loops():
    def loops(images, texts, scale):
        n = len(images)
        score = [[scale * (images[i] * texts[j]).sum() for j in range(n)] for i in range(n)]
        rows = sum(-torch.log(score[i][i].exp() / sum(score[i][j].exp() for j in range(n))) for i in range(n)) / n
        columns = sum(-torch.log(score[i][i].exp() / sum(score[j][i].exp() for j in range(n))) for i in range(n)) / n
        return (rows + columns) / 2
    arguments = features(7, 0), features(7, 1), torch.tensor(7.0, dtype=torch.float64)
    close(value_and_gradients(losses.clip_loss, *arguments), value_and_gradients(loops, *arguments))
    one_of_each = torch.tensor([8, 2, 90, 4, 5, 11, 3])  # with one image and one caption of each, the relations are CLIP's
    for name in ("hard", "hard-uniform", "mil-nce"):
        close(value_and_gradients(LOSSES[name], *arguments, one_of_each, one_of_each), value_and_gradients(losses.clip_loss, *arguments))


def test_soft_relation_and_instance_means():
    images, texts, scale = features(10, 0), features(9, 1), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    found = losses.soft_relation(images.requires_grad_(), texts, scale, IMAGE_OWNER, TEXT_OWNER)
    expected = relation_by_loops(images.detach(), texts, scale.detach(), IMAGE_OWNER.tolist(), TEXT_OWNER.tolist())
    assert not found.requires_grad
    close([found.double()], [torch.tensor(expected)])
    close([losses.soft_relation(images, texts, scale, IMAGE_OWNER, TEXT_OWNER, 3.0)], [losses.soft_relation(images, texts, 3 * scale, IMAGE_OWNER, TEXT_OWNER)])
    assert losses.group_relation(torch.tensor([7, 2, 7, 7])).tolist() == [pytest.approx(row) for row in (
        [1 / 3, 0, 1 / 3, 1 / 3], [0, 1, 0, 0], [1 / 3, 0, 1 / 3, 1 / 3], [1 / 3, 0, 1 / 3, 1 / 3])]
    means, position = losses.instance_means(images.detach(), IMAGE_OWNER)
    assert position.tolist() == [sorted({3, 5, 17, 41, 900}).index(n) for n in IMAGE_OWNER.tolist()]
    close([means], [torch.stack([mean_of(images.detach(), IMAGE_OWNER.tolist(), n) for n in (3, 5, 17, 41, 900)])], 1e-12)
    given = torch.eye(5)  # a relation of your own is used instead: with it, only an observation's own instance counts
    assert losses.soft_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER, given) != losses.soft_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER)
    assert losses.mxm_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER, 1.0, given) == losses.soft_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER, given)
    assert losses.mxm_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER, 0.0) == losses.hard_loss(images, texts, scale, IMAGE_OWNER, TEXT_OWNER)


@pytest.mark.parametrize("name", LOSSES)
def test_order_and_numbers_of_observations_do_not_matter(name):
    images, texts, scale = features(10, 0), features(9, 1), torch.tensor(7.0)
    plain = LOSSES[name](images, texts, scale, IMAGE_OWNER, TEXT_OWNER).item()
    g = torch.Generator().manual_seed(5)
    a, b = torch.randperm(10, generator=g), torch.randperm(9, generator=g)
    renamed = {900: 4, 3: 77, 41: 0, 17: 12, 5: 2 ** 40}  # another order of the instances, too
    owners = [torch.tensor([renamed[n] for n in owner.tolist()]) for owner in (IMAGE_OWNER[a], TEXT_OWNER[b])]
    assert LOSSES[name](images[a], texts[b], scale, *owners).item() == pytest.approx(plain, rel=1e-6)
    assert LOSSES[name](images, texts.flip(0), scale, IMAGE_OWNER, TEXT_OWNER).item() != pytest.approx(plain, rel=1e-3)  # who owns what does matter


def test_hard_loss_a_second_positive_is_nobodys_negative():
    """How the first caption is drawn to its image depends on the second in the losses where positives compete, not in the hard one."""
    image, elsewhere = torch.eye(4)[:2]  # at right angles: what moves a caption along `image` are its own positive pairs alone
    first, second, third, other = features(4, 3, dim=4).float().unbind()

    def pull(loss, *captions):
        texts = torch.stack([*captions, other]).requires_grad_()
        owner = torch.tensor([1] * len(captions) + [2])
        value = loss(torch.stack([image, elsewhere]), texts, torch.tensor(5.0), torch.tensor([1, 2]), owner)
        return (torch.autograd.grad(value, texts)[0][0] @ image).item() * (len(captions) + 1)  # undoes the mean over positive pairs
    assert pull(losses.hard_loss, first, second) == pytest.approx(pull(losses.hard_loss, first, third), rel=1e-5)
    assert pull(losses.hard_loss, first, second) == pytest.approx(pull(losses.hard_loss, first), rel=1e-5)
    for loss in (losses.hard_uniform_loss, losses.mil_nce_loss):
        assert pull(loss, first, second) != pytest.approx(pull(loss, first, third), rel=1e-3)


@pytest.mark.parametrize("name", [*LOSSES, "clip"])
def test_extremes_stay_finite(name):
    loss = LOSSES.get(name) or (lambda images, texts, scale, *_: losses.clip_loss(images[:9], texts, scale))
    images, texts = features(10, 0), features(9, 1)
    images[0], texts[0], texts[5] = texts[1], -images[2], -images[0]  # the worst: a negative at cosine 1, positives at -1
    for x, y in ((images, texts), (images.bfloat16(), texts.bfloat16())):
        parts = value_and_gradients(loss, x, y, torch.tensor(100.0), IMAGE_OWNER, TEXT_OWNER)
        assert all(p.isfinite().all() for p in parts) and parts[0] > 10
    low, high = (value_and_gradients(loss, x, y, torch.tensor(7.0), IMAGE_OWNER, TEXT_OWNER)[0]
                 for x, y in ((images.bfloat16(), texts.bfloat16()), (images.bfloat16().double(), texts.bfloat16().double())))
    assert low.item() == pytest.approx(high.item(), rel=1e-5)  # computed in float32, whatever comes
    if name not in ("clip", "soft"):  # a batch of one instance has no negatives: nothing to learn, and no NaN from an empty sum
        one = torch.zeros(9, dtype=torch.int64)
        parts = value_and_gradients(loss, images[:9], texts, torch.tensor(7.0), one, one)
        assert all(p.isfinite().all() for p in parts)


# ---------------------------------------------------------------- two processes

WORKERS = '''
import os, sys
import torch
import torch.distributed as dist
import losses
from tests.test_losses import LOSSES, small_model, rank_rows

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    out = {}
    x, x_owner, y, y_owner = rank_rows(rank)
    out["rows"] = losses.gather_rows(x, x_owner)
    out["none"] = losses.gather_rows(x[:3 * (1 - rank)], x_owner[:3 * (1 - rank)])  # rank 1 has nothing
    out["gather"] = losses.gather(torch.full((2, 1, 3), float(rank)))
    out["any"] = [losses.any_process(flag, "cpu") for flag in (rank == 1, False, True)]
    for name in (*LOSSES, "clip"):
        model = small_model()
        a, b, scale = model["image"](x).float(), model["text"](y).float(), model["scale"].scale.exp()
        if name == "clip":
            loss = losses.clip_loss(losses.gather(a[:2]), losses.gather(b[:2]), scale)
        else:
            (a, a_owner), (b, b_owner) = losses.gather_rows(a, x_owner), losses.gather_rows(b, y_owner)
            loss = LOSSES[name](a, b, scale, a_owner, b_owner)
        loss.backward()
        losses.average_gradients(model.parameters())
        out[name] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    torch.save(out, f"{folder}/{rank}.pt")

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
'''


def small_model():
    torch.manual_seed(4)
    model = torch.nn.ModuleDict({"image": torch.nn.Linear(6, 5), "text": torch.nn.Linear(6, 5), "scale": torch.nn.Module(), "unused": torch.nn.Linear(2, 2)})
    model["scale"].scale = torch.nn.Parameter(torch.tensor(1.0))
    return model


def rank_rows(rank):
    """One process's part: rank 0 has instances 900, 3 and 17, rank 1 has 5 and 41; other numbers of rows on each."""
    ours = (900, 3, 17) if rank == 0 else (5, 41)
    i, t = (torch.isin(owner, torch.tensor(ours)) for owner in (IMAGE_OWNER, TEXT_OWNER))
    return features(10, 0).float()[i], IMAGE_OWNER[i], features(9, 1).float()[t], TEXT_OWNER[t]


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    done = subprocess.run([sys.executable, tmp_path / "workers.py", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    parts = [rank_rows(0), rank_rows(1)]
    x, x_owner, y, y_owner = (torch.cat(both) for both in zip(*parts))
    for found in (zero, one):
        assert torch.equal(found["rows"][0], x) and torch.equal(found["rows"][1], x_owner)
        assert torch.equal(found["none"][0], parts[0][0][:3]) and torch.equal(found["none"][1], parts[0][1][:3])
        assert torch.equal(found["gather"], torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None, None].expand(4, 1, 3))
        assert found["any"] == [True, False, True]
    for name in (*LOSSES, "clip"):
        model = small_model()
        a, b, scale = model["image"](x), model["text"](y), model["scale"].scale.exp()
        if name == "clip":
            n = [len(p[0]) for p in parts], [len(p[2]) for p in parts]
            loss = losses.clip_loss(a[[0, 1, n[0][0], n[0][0] + 1]], b[[0, 1, n[1][0], n[1][0] + 1]], scale)
        else:
            loss = LOSSES[name](a, b, scale, x_owner, y_owner)
        loss.backward()
        expected = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        assert len(expected) == 6 and expected[-1].abs() > 1e-3
        close(zero[name], expected)
        assert all(torch.equal(p, q) for p, q in zip(zero[name], one[name]))


def test_one_process_gathers_nothing():
    x, owner = features(3, 0).requires_grad_(), torch.tensor([4, 4, 9])
    assert losses.gather(x) is x and losses.gather_rows(x, owner) == (x, owner) and losses.any_process(True, "cpu") is True
    losses.average_gradients([x])
    assert x.grad is None
