"""Tests of train_user.py: its model against a plain version of each sample without padding, momentum, queues and augmentation against brute
force, then whole runs.

    python -m pytest tests/test_user.py
"""
import copy
import itertools
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import eval
import losses
import train_user
from runs import (FILES, SMALL, arguments, assert_documented_commands_parse, in_process, kept_signals, log, make_squares, metrics,  # noqa: F401
                  refused)  # in_process acts by being here
from train_user import GPO, SGE, USER, Queue, augmented, guided_enhancement, main, momentum_update, settings, total_loss

ENHANCE = ("none", "sge", "cge", "both")
CAPTIONS = ["a red square on blue", "wet", "a blue thing that is soft to touch", "red"]
LENGTHS = (3, 5, 1, 5)  # of sets of local features


def small_clip(seed=0):
    """A very small CLIP with a tokenizer of its own."""
    tokenizer = clip.Tokenizer.train(CAPTIONS * 2, 600)
    torch.manual_seed(seed)
    model = clip.CLIP(clip.Config(16, 16, 1, 32, 8, 16, tokenizer.vocab_size, 32, 2, 1, 2))
    model.tokenizer = tokenizer
    return model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A smaller tiny CLIP; a remark is made once in a process: here once in a test; files of region features are read anew."""
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)
    monkeypatch.setattr(data, "_noted", set())
    data._regions.cache_clear()


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Squares of which three in a row count as the same thing."""
    path = make_squares(tmp_path_factory.mktemp("squares"))
    rows = [json.loads(line) for line in open(path)]
    with open(path, "w") as f:
        f.writelines(json.dumps(row | {"group": f"g{int(row['id'][1:]) // 3}"}) + "\n" for row in rows)
    return path


def shaken(module, seed=0):
    """In place: no part but CLIP is at its starting value, running statistics included."""
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.3 * torch.randn(p.shape)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b += 0.3 * torch.randn(b.shape)
        elif name.endswith("running_var"):
            b += torch.rand(b.shape)
    return module


def sets(width=6, most=5, seed=0):
    """x (4, most, width) of LENGTHS places, with garbage after them; keep; and the real places of each set, in double precision."""
    torch.manual_seed(seed)
    x, keep = torch.randn(4, most, width), torch.arange(most) < torch.tensor(LENGTHS)[:, None]
    x[~keep] = 7.0
    return x, keep, [one[:n].double() for one, n in zip(x, LENGTHS)]


# ---------------------------------------------------------------- the model, plainly: lists of sets (L, D) in double precision

def plain_softmax(scores):
    e = [score.exp() for score in scores]
    return [x / sum(e) for x in e]


def plain_guided(x, g, smooth):
    a = plain_softmax([smooth * (place @ g) for place in x])
    norm = sum(w ** 2 for w in a).sqrt()
    return torch.stack([place + w / norm * g for place, w in zip(x, a)])


def plain_norm(norm, rows):
    """Batch norm: of the rows themselves in training, else of the running statistics."""
    mean, var = (rows.mean(0), ((rows - rows.mean(0)) ** 2).mean(0)) if norm.training else (norm.running_mean, norm.running_var)
    return (rows - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias


def plain_branch(branch, rows):
    linear, norm, _, _ = branch
    return plain_norm(norm, linear(rows)).tanh()


def plain_sge(sge, sets):
    local = plain_branch(sge.local, torch.cat(sets)).split([len(x) for x in sets])
    whole, out = plain_branch(sge.whole, torch.stack([x.mean(0) for x in sets])), []
    for x, places, one in zip(sets, local, whole):
        weights = plain_softmax([sge.score.weight[0] @ (place * one) for place in places])
        g = sum(w * place for w, place in zip(weights, x))
        out.append(g / (g @ g).sqrt())
    return out


def plain_gpo_weights(gpo, L):
    encoding = torch.tensor([[f(place / 10000 ** (2 * i / 32)) for i in range(16) for f in (math.sin, math.cos)] for place in range(L)], dtype=torch.float64)
    return plain_softmax([(both[:32] + both[32:]) / 2 @ gpo.score.weight[0] / 0.1 for both in gpo.gru(encoding[None])[0][0]])


def plain_gpo(gpo, x):
    weights = plain_gpo_weights(gpo, len(x))
    return sum(w * torch.stack([x[:, d].sort(descending=True).values[rank] for d in range(x.shape[1])]) for rank, w in enumerate(weights))


def plain_enhanced(model, sets, sge, own):
    out = sets
    if model.enhance in ("sge", "both"):
        out = [plain_guided(x, g, model.smooth) for x, g in zip(out, plain_sge(sge, sets))]  # SGE sees CLIP's own features
    if model.enhance in ("cge", "both") and own is not None:
        out = [plain_guided(x, g / (g @ g).sqrt(), model.smooth) for x, g in zip(out, own)]
    return out


def plain_image(model, images):
    """Patches without the class token; fc and a residual MLP; -> (B, dim)."""
    if model.regions:
        sets, own = list(images), None
    else:
        own, tokens = model.clip.encode_image(images, tokens=True)
        sets = [x[1:] for x in tokens]
    sets = plain_enhanced(model, sets, getattr(model, "image_sge", None), own)
    first, norm, _, last = model.image_mlp
    rows = torch.cat(sets)
    rows = model.image_fc(rows) + last(plain_norm(norm, first(rows)).clamp(min=0))
    pooled = [plain_gpo(model.image_gpo, x) for x in rows.split([len(x) for x in sets])]
    return torch.stack([x / (x @ x).sqrt() for x in pooled])


def plain_text(model, tokens):
    """Each caption alone and cut after its end; -> (B, dim)."""
    sets, own = [], []
    for row in tokens:
        g, x, _ = model.clip.encode_text(row[None, :int(row.argmax()) + 1], tokens=True)
        sets, own = sets + [x[0, 1:]], own + [g[0]]
    pooled = [plain_gpo(model.text_gpo, model.text_fc(x)) for x in plain_enhanced(model, sets, getattr(model, "text_sge", None), own)]
    return torch.stack([x / (x @ x).sqrt() for x in pooled])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enhance, regions", [*((enhance, None) for enhance in ENHANCE), ("both", 6), ("cge", 6)])
def test_the_encoders_are_the_plain_version_of_each_sample(enhance, regions, training):
    """In value and in the gradient of every weight, CLIP's included; captions of several lengths, one of a single word."""
    model = shaken(USER(small_clip(), enhance, 12, 3.0, 0.0, regions)).train(training)
    plain = copy.deepcopy(model).double()
    images, tokens = torch.randn(4, 3, 6) if regions else torch.randn(4, 3, 16, 16), model.tokenizer(CAPTIONS, 16)
    wanted = torch.randn(2, 4, 12)
    found_and_expected = ((model.encode_image(images), plain_image(plain, images.double())), (model.encode_text(tokens), plain_text(plain, tokens)))
    for direction, (found, expected) in zip(wanted, found_and_expected):
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.ones(4))
        (found * direction).sum().backward()
        (expected * direction.double()).sum().backward()
    slopes = dict(plain.named_parameters())
    assert any(name.startswith("image_sge.") for name in slopes) == (enhance in ("sge", "both"))
    for name, p in model.named_parameters():
        reached = name != "clip.logit_scale" and not (regions and name.startswith("clip.visual."))
        assert (p.grad is not None) == reached == (slopes[name].grad is not None), name
        if reached:
            assert torch.allclose(p.grad.double(), slopes[name].grad, atol=2e-5 * max(1, slopes[name].grad.abs().max())), name
    reached = [model.clip.token_embedding.weight] + ([] if regions else [model.clip.visual.conv1.weight])
    assert all(p.grad.abs().max() > 1e-6 for p in reached)


@pytest.mark.parametrize("most", [5, 8])
def test_guided_enhancement_is_a_loop(most):
    """Whatever stands in the padding, and however much of it there is."""
    x, keep, real = sets(most=most)
    g = F.normalize(torch.randn(4, 6), dim=1)
    found = guided_enhancement(x, keep, g, 2.5)
    for b in range(4):
        assert torch.allclose(found[b, :LENGTHS[b]].double(), plain_guided(real[b], g[b].double(), 2.5), atol=1e-5)
    assert torch.equal(found[~keep], x[~keep])


@pytest.mark.parametrize("most", [5, 8])
@pytest.mark.parametrize("training", [False, True])
def test_sge_is_a_loop(training, most):
    """Batch norm's statistics, those it uses and those it keeps, are of real places only."""
    x, keep, real = sets(most=most)
    sge = shaken(SGE(6, 0.0)).train(training)
    plain, before = copy.deepcopy(sge).double(), copy.deepcopy(sge)
    found = sge(x, keep)
    assert torch.allclose(found.double(), torch.stack(plain_sge(plain, real)), atol=1e-5) and torch.allclose(found.norm(dim=1), torch.ones(4))
    for branch, rows in (("local", torch.cat(real)), ("whole", torch.stack([one.mean(0) for one in real]))):
        (linear, norm, _, _), old = getattr(plain, branch), getattr(before, branch)[1]
        y, now = linear(rows), getattr(sge, branch)[1]
        for kept, was, of_batch in ((now.running_mean, old.running_mean, y.mean(0)), (now.running_var, old.running_var, y.var(0))):
            expected = 0.9 * was.double() + 0.1 * of_batch if training else was.double()
            assert torch.allclose(kept.double(), expected, atol=1e-5)


def test_dropout_is_in_sge_in_training_only():
    x, keep, _ = sets()
    sge = shaken(SGE(6, 0.5))
    assert not torch.equal(sge(x, keep), sge(x, keep))
    sge.eval()
    assert torch.equal(sge(x, keep), sge(x, keep))
    assert [m.p for m in USER(small_clip(), dropout=0.3, dim=8).modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 4


@pytest.mark.parametrize("most", [5, 8])
def test_gpo_is_a_loop(most):
    x, keep, real = sets(most=most)
    gpo = shaken(GPO())
    plain = copy.deepcopy(gpo).double()
    assert torch.allclose(gpo(x, keep).double(), torch.stack([plain_gpo(plain, one) for one in real]), atol=1e-5)
    lengths = torch.tensor([4, 1, 3])
    weights = gpo.weights(lengths, most)
    assert weights.shape == (3, most)
    for row, L in zip(weights, lengths.tolist()):
        assert torch.allclose(row[:L].double(), torch.stack(plain_gpo_weights(plain, L)), atol=1e-5) and (row[L:] == 0).all()
        assert L == 1 or row[:L].std() > 1e-2  # no mean
    shuffled = x.clone()
    shuffled[1] = x[1][torch.randperm(5).tolist() + list(range(5, most))]
    assert torch.equal(gpo(shuffled, keep), gpo(x, keep))  # a set has no order


def test_starting_weights_depend_on_the_seed_alone():
    inner = small_clip()
    before = torch.get_rng_state()
    a, b, c = (USER(inner, dim=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state()) and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.text_fc.weight, c.text_fc.weight)


# ---------------------------------------------------------------- momentum contrast

def test_momentum_update():
    """m slow + (1 - m) fast; buffers are copied; fast and all gradients stay as they are."""
    fast = shaken(SGE(6, 0.0))
    slow = shaken(copy.deepcopy(fast), seed=1).requires_grad_(False)
    for p in fast.parameters():
        p.grad = torch.randn(p.shape)
    fast.local[1].num_batches_tracked += 5
    kept, gradients = copy.deepcopy(fast.state_dict()), [(p.grad, p.grad.clone()) for p in fast.parameters()]
    expected = {name: value.double() for name, value in slow.named_parameters()}
    for m in (0.9, 0.25):
        momentum_update(slow, fast, m)
        expected = {name: m * value + (1 - m) * kept[name].double() for name, value in expected.items()}
    assert all(torch.allclose(value.double(), expected[name], atol=1e-6) for name, value in slow.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in slow.named_buffers())
    assert all(torch.equal(value, kept[name]) for name, value in fast.state_dict().items())
    assert all(p.grad is grad and torch.equal(grad, value) for p, (grad, value) in zip(fast.parameters(), gradients))
    assert all(p.grad is None and not p.requires_grad for p in slow.parameters()) and all(p.requires_grad for p in fast.parameters())


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def in_order(queue):
    """[(image, text, thing)], the oldest first."""
    rows = list(zip(queue.images.tolist(), queue.texts.tolist(), queue.things.tolist()))
    return rows[int(queue.next):] + rows[:int(queue.next)]


def test_a_queue_starts_with_random_unit_rows_of_nothing():
    queue, same, other = Queue(7, 4, seed=3), Queue(7, 4, seed=3), Queue(7, 4, seed=4)
    assert torch.allclose(queue.images.norm(dim=1), torch.ones(7)) and torch.allclose(queue.texts.norm(dim=1), torch.ones(7))
    assert queue.things.tolist() == [-1] * 7 and in_order(queue) == in_order(same)
    assert len({tuple(row) for row in queue.images.tolist() + queue.texts.tolist()}) == 14
    assert not torch.equal(queue.images, other.images) and not list(queue.parameters())


def test_a_queue_holds_the_last_pairs():
    """As a list does, whatever the sizes of the batches; images, texts and things stay in step; what is enqueued carries no gradient."""
    queue, rng = Queue(7, 4), np.random.default_rng(0)
    pairs = in_order(queue)
    for step, n in enumerate([3, 3, 3, 7, 1, *rng.integers(1, 8, 40).tolist(), 7, 7]):
        images, texts, thing = unit(n, 4, seed=2 * step).requires_grad_(), unit(n, 4, seed=2 * step + 1), torch.arange(n) + 100 * step
        queue.enqueue(images, texts, thing)
        pairs = (pairs + list(zip(images.tolist(), texts.tolist(), thing.tolist())))[-7:]
        assert in_order(queue) == pairs and not queue.images.requires_grad
    restored = Queue(7, 4, seed=9)
    restored.load_state_dict(queue.state_dict())
    for q in (queue, restored):  # also where it stood
        q.enqueue(unit(2, 4).bfloat16(), unit(2, 4, seed=1).bfloat16(), torch.tensor([1, 2]))
    assert in_order(restored) == in_order(queue) and queue.images.dtype == torch.float32


# kind -> of the batch, of a queue
LOSSES = {"uto": (losses.uto_loss, losses.uto_queue_loss), "infonce": (losses.info_nce_loss, losses.info_nce_queue_loss),
          "triplet": (losses.hardest_triplet_loss, losses.hardest_triplet_queue_loss)}


def filled_queue():
    queue = Queue(6, 4, seed=5)
    queue.enqueue(unit(4, 4, seed=6), unit(4, 4, seed=7), torch.tensor([2, 9, 3, 2]))
    return queue


@pytest.mark.parametrize("kind", LOSSES)
def test_total_loss_is_its_sum(kind):
    """Images against the queue of texts with the texts' keys, and the other way round; the same thing is no negative."""
    images, texts, keys, thing = unit(5, 4, seed=1), unit(5, 4, seed=2), [unit(5, 4, seed=3), unit(5, 4, seed=4)], [2, 3, 2, 7, 8]
    queue, (of_batch, of_queue) = filled_queue(), LOSSES[kind]
    own = torch.tensor([[a == b for b in thing] for a in thing])
    in_queue = torch.tensor([[a == b for b in queue.things.tolist()] for a in thing])
    assert in_queue.sum() == 5 and own.sum() == 7
    batch, both = of_batch(images, texts, own), of_queue(images, keys[1], queue.texts, in_queue) + of_queue(texts, keys[0], queue.images, in_queue)
    for weight in (0.0, 1.0, 20.0):
        assert total_loss(kind, weight, images, texts, torch.tensor(thing), None, None).item() == pytest.approx(weight * batch.item(), rel=1e-5)
        assert total_loss(kind, weight, images, texts, torch.tensor(thing), keys, queue).item() == pytest.approx((weight * batch + both).item(), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_things_own_key_is_no_negative_until_it_is_replaced(kind):
    """However near that key is. Once it is another thing's, it counts."""
    queue, images, texts = Queue(3, 4), unit(2, 4, seed=1), unit(2, 4, seed=2)
    loss = lambda: total_loss(kind, 1.0, images, texts, torch.tensor([5, 5]), [texts, images], queue).item()
    queue.enqueue(-images[:1], -texts[:1], torch.tensor([5]))
    before = loss()
    queue.images[0], queue.texts[0] = texts[0], images[0]  # the worst negative that there could be
    assert loss() == before
    queue.enqueue(unit(2, 4, seed=3), unit(2, 4, seed=4), torch.tensor([6, 7]))
    before = loss()
    queue.enqueue(texts[:1], images[:1], torch.tensor([8]))
    assert queue.things.tolist() == [8, 6, 7] and loss() > before + 0.05


# ---------------------------------------------------------------- augmentation

BYTES = clip.Tokenizer([])  # a token for every letter
ENDS = torch.tensor([symbol.endswith("</w>") for symbol in BYTES.symbols])


def inner(row):
    """The tokens between start and end; the row is well formed."""
    end = int(row.argmax())
    assert row[0] == BYTES.start and row[end] == BYTES.end and (row[end + 1:] == 0).all() and row.dtype == torch.int32
    return row[1:end].tolist()


def test_augmentation_changes_words_at_its_rates():
    """Words of two letters: of 10,000 pairs of tokens each is kept, or masked, or two other tokens, or gone, in this order; none in half."""
    words, B, share = ["".join(w) for w in itertools.product("abcde", "vwxyz")], 400, 0.2
    tokens, pair = BYTES([" ".join(words)] * B, 60), [tuple(BYTES.encode(w)) for w in words]
    before = tokens.clone()
    torch.manual_seed(0)
    out, masked, kept, replaced, new = augmented(tokens, BYTES, ENDS, share), 0, 0, 0, []
    assert torch.equal(tokens, before) and out.shape == tokens.shape
    for row in out:
        ids = inner(row)
        assert len(ids) % 2 == 0 and len(ids) <= 50
        pairs, last = list(zip(ids[::2], ids[1::2])), -1
        for one in pairs:
            assert (one[0] == BYTES.start) == (one[1] == BYTES.start) and BYTES.end not in one
            if one in pair:
                assert pair.index(one) > last
                last, kept = pair.index(one), kept + 1
            elif one[0] == BYTES.start:
                masked += 1
            else:
                new, replaced = new + list(one), replaced + 1
    total = 25 * B
    dropped = total - masked - kept - replaced
    for count, rate in ((masked, 0.5 * share), (replaced, 0.1 * share), (dropped, 0.4 * share)):
        assert abs(count - total * rate) < 4 * math.sqrt(total * rate * (1 - rate)), (count, total * rate)
    assert len(set(new)) > 0.5 * len(new) and max(new) < BYTES.start  # of the whole vocabulary
    torch.manual_seed(0)
    assert torch.equal(augmented(tokens, BYTES, ENDS, share), out)
    assert not torch.equal(augmented(tokens, BYTES, ENDS, share), out)


def test_augmentation_keeps_words_whole(monkeypatch):
    """Without replacement, what comes out of a caption are all ways to keep, mask or drop each of its words, and no other; the last
    word was cut where the row is full. Of a caption whose words all go the first remains."""
    monkeypatch.setattr(train_user, "REPLACED", 0.0)
    tokens = BYTES(["a bc defg hijklmnopq"], 17, truncate=True)
    words = [BYTES.encode("a"), BYTES.encode("bc"), BYTES.encode("defg"), BYTES.encode("hijklmnopq")[:8]]  # no two ways are the same tokens
    ways = set()
    for kinds in itertools.product(("keep", "mask", "drop"), repeat=4):
        if kinds == ("drop",) * 4:
            kinds = ("keep",) + kinds[1:]
        ways.add(tuple(sum(({"keep": w, "mask": [BYTES.start] * len(w), "drop": []}[kind] for kind, w in zip(kinds, words)), [])))
    torch.manual_seed(0)
    out = augmented(tokens.expand(3000, -1), BYTES, ENDS, 0.6)
    assert len(ways) == 80 and {tuple(inner(row)) for row in out} == ways


def test_augmentation_without_anything_to_change():
    """Share 0 is the identity, and draws nothing. All words of a caption changed: one is left. A caption without words stays one."""
    tokens, state = BYTES(["ab c", "d"], 8), torch.get_rng_state()
    assert torch.equal(augmented(tokens, BYTES, ENDS, 0.0), tokens) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    found = [inner(row) for row in augmented(BYTES(["d"] * 500, 8), BYTES, ENDS, 1.0)]
    assert {len(ids) for ids in found} == {1}
    kept, masked = (sum(ids == one for ids in found) for one in (BYTES.encode("d"), [BYTES.start]))
    assert 160 < kept < 240 and 205 < masked < 295 and 25 < 500 - kept - masked < 80
    assert [inner(row) for row in augmented(BYTES(["", "ab"], 8), BYTES, ENDS, 1.0)][0] == []


# ---------------------------------------------------------------- settings

def test_settings_are_the_papers():
    """Flickr30K, COCO, and those for random weights; CLIP's rate is a tenth where it is pretrained."""
    shared = dict(enhance="both", loss="uto", momentum=0.999, smooth=4.0, dropout=0.4, augment=0.2, weight_decay=1e-4, batch_size=128)
    pretrained = shared | dict(lr=5e-4, clip_lr=5e-5, dim=1024, infonce_first=0.0)
    flickr30k = pretrained | dict(epochs=20, queue=2048, batch_weight=20.0, lr_drop=0.5, eval_every=4)
    coco = pretrained | dict(epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6, eval_every=5)
    for argv, expected in ((["--data", "flickr30k", "--clip", "ViT-B/32"], flickr30k), (["--data", "coco", "--clip", "ViT-B/32"], coco),
                           ([], shared | dict(epochs=14, queue=2048, batch_weight=1.0, lr=1e-3, clip_lr=1e-3, dim=256, infonce_first=0.7, lr_drop=0.85)),
                           (["--data", "coco"], dict(queue=2048, lr=1e-3, clip_lr=1e-3))):
        assert vars(settings(argv)).items() >= (expected | {"out": f"runs/user-{argv[1] if argv else 'primitives'}"}).items()
    own = settings(["--clip", "ViT-B/32", "--lr", "0.3", "--queue", "0", "--batch-weight", "0", "--infonce-first", "0.5", "--epochs", "3"])
    assert (own.clip_lr, own.queue, own.batch_weight, own.infonce_first, own.eval_every) == (0.3 / 10, 0, 0.0, 0.5, 1)
    assert settings(["--clip-lr", "0.2"]).clip_lr == 0.2 and settings(["--clip", "x.pt"]).dim == 1024


@pytest.mark.parametrize("option, value, says", [
    ("--queue", 7, "--batch-size 8 is larger than --queue 7"), ("--queue", -1, "0 or more"), ("--momentum", 1.5, "a share from 0 to 1"),
    ("--batch-weight", -1, "0 or more"), ("--dim", 0, "positive"), ("--smooth", 0, "positive"), ("--dropout", 2, "a share"), ("--augment", -0.1, "a share"),
    ("--lr-drop", 1.1, "a share"), ("--infonce-first", 3, "a share"), ("--enhance", "all", "--enhance"), ("--loss", "clip", "--loss")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    assert says in refused(capsys, arguments(squares, "--out", tmp_path / "run", option, value), main) and not (tmp_path / "run").exists()


def test_documented_commands_parse():
    assert_documented_commands_parse(train_user)


# ---------------------------------------------------------------- a run, looked at from inside

@pytest.fixture(scope="module")
def spied(squares, tmp_path_factory):
    """Four epochs of three steps of eight instances, a queue of 20; what is seen at every step."""
    run = SimpleNamespace(out=tmp_path_factory.mktemp("runs") / "spied", built=[], steps=[], losses=[], captions=[], read=[], val=[])
    plain_loss, plain_augmented, plain_evaluate, plain_encode = train_user.total_loss, augmented, eval.evaluate, USER.encode_text

    class AdamW(torch.optim.AdamW):
        def step(self):
            model = run.built[0]
            names = {p: name for name, p in model.named_parameters()}
            run.steps.append(SimpleNamespace(groups=[(g["lr"], g["weight_decay"], [names[p] for p in g["params"]]) for g in self.param_groups],
                                             weights={name: p.detach().clone() for p, name in names.items()},
                                             norm=math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))))
            super().step()

    def total_loss(kind, weight, images, texts, thing, keys, queue):
        run.losses.append(SimpleNamespace(kind=kind, weight=weight, images=images.detach(), texts=texts.detach(), thing=thing, keys=keys,
                                          queue=in_order(queue)))
        return plain_loss(kind, weight, images, texts, thing, keys, queue)

    def change(*a):
        run.captions.append((*a, plain_augmented(*a)))
        return run.captions[-1][-1]

    def evaluate(model, instances, tokenizer, *a):
        run.val.append(eval.embed(model, instances, tokenizer, "off"))
        return plain_evaluate(model, instances, tokenizer, *a)

    def encode_text(self, tokens):
        if self.training:
            run.read.append((self is run.built[0], tokens))
        return plain_encode(self, tokens)

    with kept_signals(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.MODELS, "tiny", SMALL)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(train_user, "USER", lambda *a: run.built.append(USER(*a)) or run.built[-1])
        patch.setattr(train_user, "WARMUP", 0.25)
        patch.setattr(train_user, "total_loss", total_loss)
        patch.setattr(train_user, "augmented", change)
        patch.setattr(USER, "encode_text", encode_text)
        patch.setattr(eval, "evaluate", evaluate)
        main(arguments(squares, "--out", run.out, "--epochs", 4, "--lr", 2e-3, "--clip-lr", 4e-4, "--weight-decay", 0.3, "--dim", 12, "--queue", 20,
                       "--momentum", 0.75, "--batch-weight", 3, "--dropout", 0, "--augment", 0.5, "--lr-drop", 0.5, "--infonce-first", 0.25))
    return run


def test_learning_rates(spied):
    """CLIP's weights have a rate of their own. Linear warm-up, constant, a tenth after the drop; the gradient's norm is at most two."""
    rates = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert len(spied.steps) == 12
    for step, rate in zip(spied.steps, rates):
        (inside, decay, of_clip), (outside, other_decay, heads) = step.groups
        assert (inside, outside) == (pytest.approx(4e-4 * rate), pytest.approx(2e-3 * rate)) and decay == other_decay == 0.3
        assert all(name.startswith("clip.") for name in of_clip) and not any(name.startswith("clip.") for name in heads)
        assert sorted(of_clip + heads) == sorted(step.weights) and step.norm < 2.001
    assert max(step.norm for step in spied.steps) > 1.999


def test_infonce_comes_first(spied):
    assert [x.kind for x in spied.losses] == ["infonce"] * 3 + ["uto"] * 9 and {x.weight for x in spied.losses} == {3.0}


def test_keys_enter_the_queues_after_the_loss(spied, squares):
    """At every step the queues hold the pairs of the steps before, with what they show: the instance's group."""
    initial = in_order(Queue(20, 12))
    pairs = initial
    for x in spied.losses:
        assert x.queue == pairs[-20:] and not any(k.requires_grad for k in x.keys)
        assert all(torch.allclose(k.norm(dim=1), torch.ones(8)) for k in x.keys)
        pairs = pairs + list(zip(x.keys[0].tolist(), x.keys[1].tolist(), x.thing.tolist()))
    queue = Queue(20, 12, seed=1)
    queue.load_state_dict(clip.load_checkpoint(spied.out / "last.pt")["queue"])
    assert in_order(queue) == pairs[-20:]
    group = eval.layout(data.load(squares)[0])["image_group"]
    for epoch in range(4):
        seen = torch.cat([x.thing for x in spied.losses[3 * epoch:3 * epoch + 3]])
        assert seen.sort().values.tolist() == group.sort().values.tolist() == sorted(list(range(8)) * 3)
    first = spied.losses[0]  # the momentum encoders start as copies
    assert torch.allclose(first.keys[0], first.images, atol=1e-5) and torch.allclose(first.keys[1], first.texts, atol=1e-5)
    assert max((x.keys[0] - x.images).abs().max() for x in spied.losses[1:]) > 1e-3


def test_momentum_encoders_follow(spied):
    """Through every step, by the weights before it."""
    slow = {name: value.double() for name, value in spied.steps[0].weights.items()}
    for step in spied.steps:
        slow = {name: 0.75 * value + 0.25 * step.weights[name].double() for name, value in slow.items()}
    found = clip.load_checkpoint(spied.out / "last.pt")["momentum"]
    assert found.keys() == spied.built[0].state_dict().keys() and all(torch.allclose(found[name].double(), value, atol=1e-5) for name, value in slow.items())
    assert (slow["text_fc.weight"] - spied.steps[-1].weights["text_fc.weight"]).abs().max() > 1e-4


def test_both_encoders_read_the_same_changed_captions(spied):
    assert len(spied.captions) == 12 and [own for own, _ in spied.read] == [True, False] * 12
    for (tokens, tokenizer, ends, share, changed), (_, fast), (_, slow) in zip(spied.captions, spied.read[::2], spied.read[1::2]):
        assert share == 0.5 and torch.equal(fast, changed) and torch.equal(slow, changed) and not torch.equal(tokens, changed)
        assert len(ends) == tokenizer.vocab_size and not ends[[tokenizer.start, tokenizer.end]].any()
        for ids in map(tokenizer.encode, ("a", "frame", "middle", "qxz", "ä")):
            assert ends[ids].tolist() == [False] * (len(ids) - 1) + [True]
    assert len({tuple(changed.flatten().tolist()) for *_, changed in spied.captions}) == 12


def test_checkpoints(spied, squares):
    """best.pt is the model as it was in training, and carries neither queues nor momentum encoders; last.pt does."""
    best, last = (clip.load_checkpoint(spied.out / name) for name in ("best.pt", "last.pt"))
    assert last.keys() - best.keys() == {"momentum", "queue"} and best.keys() <= last.keys() and last["step"] == 12
    found = [record["val"]["rSum"] for record in log(spied.out)]
    at = found.index(max(found))
    assert len(found) == len(spied.val) == 4 and best["step"] == 3 * (at + 1)
    for path, (images, texts) in ((spied.out / "best.pt", spied.val[at]), (spied.out / "last.pt", spied.val[3])):
        model, tokenizer, _ = eval.restore(path, "cpu")
        again = eval.embed(model, data.load(squares, split="val")[0], tokenizer, "off")
        assert torch.equal(again[0], images) and torch.equal(again[1], texts)
    assert not torch.equal(spied.val[0][0], spied.val[3][0])


# ---------------------------------------------------------------- other runs

def evaluated(out, *more):
    eval.main(["--checkpoint", str(out / "best.pt"), "--device", "cpu", "--amp", "off", "--out", str(out / "again"), *map(str, more)])
    return metrics(out / "again")["test"]


@pytest.mark.parametrize("enhance, more", [("none", ["--queue", 0, "--loss", "triplet"]), ("sge", ["--loss", "infonce", "--batch-weight", 0]),
                                           ("cge", ["--smooth", 9])])
def test_baselines_run_and_eval_repeats_their_metrics(enhance, more, squares, tmp_path):
    out = tmp_path / "run"
    main(arguments(squares, "--out", out, "--epochs", 1, "--dim", 10, "--queue", 8, "--enhance", enhance, *more))
    last = clip.load_checkpoint(out / "last.pt")
    assert sorted(os.listdir(out)) == FILES and math.isfinite(log(out)[0]["loss"]) and ("queue" in last) == ("momentum" in last) == (0 not in more[:2])
    assert evaluated(out) == metrics(out)["test"]
    model = eval.restore(out / "best.pt", "cpu")[0]
    assert model.smooth == (9 if enhance == "cge" else 4) and model.enhance == enhance and hasattr(model, "text_sge") == (enhance == "sge")


@pytest.fixture
def precomp(tmp_path):
    """16 / 8 / 8 pictures as four regions of six numbers, five captions each, as `load_regions` reads them. Returns the arguments of a run."""
    words = ("red", "green", "blue", "wet", "dry", "soft", "hard", "round")
    (tmp_path / "precomp").mkdir()
    for file, rows in (("train", 16), ("dev", 8), ("test", 8)):
        np.save(tmp_path / "precomp" / f"{file}_ims.npy", np.random.default_rng(rows + len(file)).random((rows, 4, 6), np.float32))
        (tmp_path / "precomp" / f"{file}_caps.txt").write_text("".join(f"a {words[i % 8]} thing, {words[i // 5 % 8]}\n" for i in range(5 * rows)))
    return arguments("flickr30k", "--root", tmp_path, "--regions", "--epochs", 1, "--dim", 12, "--queue", 16, "--out", tmp_path / "run")


def test_regions(precomp, tmp_path, capsys):
    """Trained and evaluated without a picture; pictures of results are refused in one line."""
    main(precomp)
    found, checkpoint = metrics(tmp_path / "run")["test"], clip.load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["regions"] == 6 and checkpoint["heads"]["image_fc.weight"].shape == (12, 6) and checkpoint["step"] == 2
    assert math.isfinite(log(tmp_path / "run")[0]["loss"]) and found["model"]["rSum"] > 0
    assert evaluated(tmp_path / "run") == found
    argv = ["--checkpoint", tmp_path / "run" / "best.pt", "--device", "cpu", "--gallery", tmp_path / "gallery.png"]
    assert "have no picture to show" in refused(capsys, argv, eval.main)
    model, tokenizer, _ = eval.restore(tmp_path / "run" / "best.pt", "cpu")
    images, _ = eval.embed(model, data.load_regions("flickr30k", str(tmp_path), "test")[0], tokenizer, "off")
    with torch.no_grad():
        assert torch.allclose(images, model.encode_image(torch.from_numpy(np.load(tmp_path / "precomp" / "test_ims.npy"))), atol=1e-5)


@pytest.mark.parametrize("file", ["train", "dev", "test"])
def test_region_files_that_do_not_fit_are_refused(file, precomp, tmp_path, capsys):
    """In one line and before anything is trained."""
    caps, ims = (tmp_path / "precomp" / f"{file}{end}" for end in ("_caps.txt", "_ims.npy"))
    lines = caps.read_text().splitlines()
    caps.write_text("\n".join(lines[:-5]) + "\n")
    assert f"{file}_ims.npy has" in (line := refused(capsys, precomp, main)) and "expected five captions to a row" in line
    caps.unlink()
    assert f"{file}_caps.txt" in refused(capsys, precomp, main)
    caps.write_text("\n".join(lines) + "\n")
    ims.unlink()
    data._regions.cache_clear()
    assert f"{file}_ims.npy" in refused(capsys, precomp, main) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["dev", "test"])
def test_region_features_of_another_width_are_refused(file, precomp, tmp_path, capsys):
    np.save(tmp_path / "precomp" / f"{file}_ims.npy", np.zeros((8, 4, 7), np.float32))
    assert f"{file}_ims.npy: features of width 7" in refused(capsys, precomp, main) and not (tmp_path / "run").exists()


def test_no_regions_of_shapes_and_no_batch_or_space_of_one(precomp, squares, capsys):
    assert "have none" in refused(capsys, ["--data", "primitives", *precomp[2:]], main)
    assert "2 or more" in refused(capsys, arguments(squares, "--batch-size", 1), main)
    assert "2 dimensions" in refused(capsys, arguments(squares, "--dim", 1), main)
