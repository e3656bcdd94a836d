"""Tests of train_user.py: its model against a plain version that takes each sample alone, without padding;
momentum, queues and augmentation against brute force; then whole runs.

    python -m pytest tests/test_user.py
"""
import copy
import itertools
import json
import math
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import losses
import runs
import train_user
from runs import in_process  # noqa: F401 (fixtures that act by being here)
from runs import FILES, SMALL, arguments, log, metrics, refused
from train_user import GPO, SGE, USER, Queue, augmented, guided_enhancement, main, momentum_update, settings
from train_user import total_loss

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
    """A smaller tiny CLIP; files of region features are read anew."""
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)
    data._regions.cache_clear()


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Squares of which three in a row count as the same thing."""
    path = runs.make_squares(tmp_path_factory.mktemp("squares"))
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    with open(path, "w") as f:
        for row in rows:
            row["group"] = f"g{int(row['id'][1:]) // 3}"
            f.write(json.dumps(row) + "\n")
    return path


def shaken(module, seed=0):
    """In place: no part but CLIP is at its starting value, running statistics included."""
    torch.manual_seed(seed)
    for name, value in module.state_dict().items():
        if not name.startswith("clip.") and value.is_floating_point():
            value += 0.3 * (torch.rand(value.shape) if name.endswith("_var") else torch.randn(value.shape))
    return module


def local_features(columns):
    """x (4, columns, 6) with LENGTHS features and garbage after them; the mask; each set alone, in double."""
    torch.manual_seed(0)
    x = torch.randn(4, columns, 6)
    mask = torch.arange(columns) < torch.tensor(LENGTHS)[:, None]
    x[~mask] = 7.0
    return x, mask, [row[:length].double() for row, length in zip(x, LENGTHS)]


# ---------------------------------------------------------------- the model: each set (L, D) alone, in double

def plain_guided(x, g, smooth):
    a = (smooth * x @ g).softmax(0)
    return x + torch.outer(a / (a @ a).sqrt(), g)


def plain_branch(branch, rows):
    linear, norm, _, _ = branch
    return norm(linear(rows)).tanh()


def plain_sge(sge, sets):
    local = plain_branch(sge.local_branch, torch.cat(sets)).split([len(x) for x in sets])
    of_means = plain_branch(sge.global_branch, torch.stack([x.mean(0) for x in sets]))
    out = []
    for x, places, of_mean in zip(sets, local, of_means):
        weights = ((places * of_mean) @ sge.score.weight[0]).softmax(0)
        out.append(F.normalize(weights @ x, dim=0))
    return out


def plain_gpo_weights(gpo, L):
    encoding = torch.zeros(L, 32, dtype=torch.float64)
    for rank, i in itertools.product(range(L), range(16)):
        angle = rank / 10000 ** (2 * i / 32)
        encoding[rank, 2 * i] = math.sin(angle)
        encoding[rank, 2 * i + 1] = math.cos(angle)
    states, _ = gpo.gru(encoding)
    return ((states[:, :32] + states[:, 32:]) / 2 @ gpo.score.weight[0] / 0.1).softmax(0)


def plain_gpo(gpo, x):
    return plain_gpo_weights(gpo, len(x)) @ x.sort(0, descending=True).values


def plain_cge(cge, clip_embedding):
    first_norm, first, norm, _, last = cge.projection
    return F.normalize(last(norm(first(first_norm(clip_embedding))).clamp(min=0)), dim=1)


def plain_enhanced(model, sets, sge, cge, clip_embedding):
    out = sets
    if sge is not None:  # it sees CLIP's own features
        out = [plain_guided(x, g, model.smooth) for x, g in zip(out, plain_sge(sge, sets))]
    if cge is not None:
        out = [plain_guided(x, g, model.smooth) for x, g in zip(out, plain_cge(cge, clip_embedding))]
    return out


def plain_image(model, images):
    """Patches without the class token; fc and a residual MLP; -> (B, dim)."""
    if model.regions:
        sets, clip_embedding = list(images.features), images.clip_input
        if clip_embedding.ndim == 4:
            clip_embedding = model.clip.encode_image(clip_embedding)
    else:
        clip_embedding, tokens = model.clip.encode_image(images, tokens=True)
        sets = [x[1:] for x in tokens]
    if model.unit_norm:
        sets = [x / x.square().sum(1, keepdim=True).sqrt() for x in sets]
    rows = torch.cat(plain_enhanced(model, sets, model.image_sge, model.image_cge, clip_embedding))
    first, norm, _, last = model.image_mlp
    rows = model.image_fc(rows) + last(norm(first(rows)).clamp(min=0))
    sets = rows.split([len(x) for x in sets])
    return F.normalize(torch.stack([plain_gpo(model.image_gpo, x) for x in sets]))


def plain_text(model, tokens):
    """Each caption alone and cut after its end; -> (B, dim)."""
    sets = []
    clip_embedding = []
    for row in tokens:
        g, x, _ = model.clip.encode_text(row[None, :int(row.argmax()) + 1], tokens=True)
        sets.append(x[0, 1:])
        clip_embedding.append(g[0])
    sets = plain_enhanced(model, sets, model.text_sge, model.text_cge, torch.stack(clip_embedding))
    return F.normalize(torch.stack([plain_gpo(model.text_gpo, model.text_fc(x)) for x in sets]))


PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2))  # of regions
EMBEDDINGS = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))  # CLIP's


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enhance, enhance_texts, clip_input, unit_norm", [
    ("none", True, None, False), ("sge", True, None, False), ("cge", True, None, False),
    ("both", True, None, False), ("both", False, None, False), ("both", False, PICTURES, False),
    ("cge", True, EMBEDDINGS, False), ("sge", False, EMBEDDINGS, False),
    ("both", True, None, True), ("none", True, EMBEDDINGS, True)])
def test_the_encoders_are_the_plain_version_of_each_sample(enhance, enhance_texts, clip_input, unit_norm,
                                                           training):
    """In value and in the gradient of every weight, CLIP's included; captions of several lengths; pictures,
    or regions with pictures or CLIP's embeddings of the same images."""
    regions = None if clip_input is None else 6
    images = PICTURES
    in_double = PICTURES.double()
    if regions:
        images = data.Regions(FEATURES, clip_input)
        in_double = data.Regions(FEATURES.double(), clip_input.double())
    model = USER(small_clip(), enhance, enhance_texts, 12, 3.0, 0.0, regions, unit_norm=unit_norm)
    model = shaken(model).train(training)
    plain = copy.deepcopy(model).double()
    tokens = model.tokenizer(CAPTIONS, 16)
    for found, expected in ((model.encode_image(images), plain_image(plain, in_double)),
                            (model.encode_text(tokens), plain_text(plain, tokens))):
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.ones(4))
        direction = torch.randn(4, 12)
        (found * direction).sum().backward()
        (expected * direction.double()).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    modules = {name.split(".")[0] for name in expected if "ge." in name}
    wanted = {"sge": ("sge",), "cge": ("cge",), "both": ("sge", "cge"), "none": ()}[enhance]
    sides = ("image", "text") if enhance_texts else ("image",)
    assert modules == {f"{side}_{kind}" for side in sides for kind in wanted}
    sees_pictures = clip_input is not EMBEDDINGS
    for name, p in model.named_parameters():
        reached = name != "clip.logit_scale" and (sees_pictures or not name.startswith("clip.visual."))
        reached = reached and not name.endswith("projection.0.bias")
        assert (p.grad is not None) == reached == (expected[name] is not None), name
        if reached:
            atol = 2e-5 * max(1, expected[name].abs().max())
            assert torch.allclose(p.grad.double(), expected[name], atol=atol), name
    assert model.clip.token_embedding.weight.grad.abs().max() > 1e-6
    assert not sees_pictures or model.clip.visual.conv1.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("columns", [5, 8])
@pytest.mark.parametrize("training", [False, True])
def test_sge_is_a_loop(training, columns):
    """Whatever stands in the padding; the statistics that batch norm uses and keeps are of real rows."""
    x, mask, sets = local_features(columns)
    sge = shaken(SGE(6, 0.0)).train(training)
    plain = copy.deepcopy(sge).double()
    g = sge(x, mask)
    expected = plain_sge(plain, sets)
    assert torch.allclose(g.double(), torch.stack(expected), atol=1e-5)
    for kept, real in zip(sge.buffers(), plain.buffers()):
        assert torch.allclose(kept.double(), real.double(), atol=1e-5)
    found = guided_enhancement(x, mask, g, 2.5)
    for row, length, real, g in zip(found, LENGTHS, sets, expected):
        assert torch.allclose(row[:length].double(), plain_guided(real, g, 2.5), atol=1e-5)
    assert torch.equal(found[~mask], x[~mask])


def test_dropout_is_in_sge_in_training_only():
    x, mask, _ = local_features(5)
    sge = shaken(SGE(6, 0.5))
    assert not torch.equal(sge(x, mask), sge(x, mask))
    sge.eval()
    assert torch.equal(sge(x, mask), sge(x, mask))
    model = USER(small_clip(), dropout=0.3, dim=8)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 2


@pytest.mark.parametrize("columns", [5, 8])
def test_gpo_is_a_loop(columns):
    x, mask, sets = local_features(columns)
    gpo = shaken(GPO())
    plain = copy.deepcopy(gpo).double()
    found = gpo(x, mask)
    assert torch.allclose(found.double(), torch.stack([plain_gpo(plain, x) for x in sets]), atol=1e-5)
    lengths = torch.tensor([4, 1, 3])
    weights = gpo.weights(lengths, columns)
    assert weights.shape == (3, columns)
    for row, L in zip(weights, lengths.tolist()):
        assert torch.allclose(row[:L].double(), plain_gpo_weights(plain, L), atol=1e-5)
        assert (row[L:] == 0).all() and (L == 1 or row[:L].std() > 1e-2)  # no mean
    x[1, :5] = x[1, torch.randperm(5)]
    assert torch.equal(gpo(x, mask), found)  # a set has no order


def test_starting_weights_depend_on_the_seed_alone():
    clip_model = small_clip()
    before = torch.get_rng_state()
    a, b, c = (USER(clip_model, dim=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.text_fc.weight, c.text_fc.weight)


def test_starting_weights_are_xaviers():
    """Of the layers that the authors start so, and of CGE: uniform, of variance 2 / (rows + columns)."""
    model = USER(small_clip(), dim=400, regions=300)
    layers = [m for part in (model.image_sge, model.image_cge) for m in part.modules()]
    for layer in [model.image_fc, *layers]:
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or not layer.bias.any()


def test_a_frozen_clip_stays_in_evaluation_mode():
    model = USER(small_clip(), dim=8)
    model.freeze_clip()
    for copied in (model.train(), copy.deepcopy(model).train()):
        assert copied.image_sge.training and not any(m.training for m in copied.clip.modules())
    assert not any(p.requires_grad for p in model.clip.parameters()) and model.image_fc.weight.requires_grad


# ---------------------------------------------------------------- momentum contrast

def test_momentum_update():
    """m times the old plus 1 - m times the model; buffers are copied; the model and all gradients stay."""
    model = shaken(SGE(6, 0.0))
    momentum_model = shaken(copy.deepcopy(model), seed=1).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    model.local_branch[1].num_batches_tracked += 5
    before = copy.deepcopy(model.state_dict())
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    expected = {name: p.double() for name, p in momentum_model.named_parameters()}
    for m in (0.9, 0.25):
        momentum_update(momentum_model, model, m)
        expected = {name: m * value + (1 - m) * before[name].double() for name, value in expected.items()}
    for name, p in momentum_model.named_parameters():
        assert torch.allclose(p.double(), expected[name], atol=1e-6)
        assert p.grad is None and not p.requires_grad
    assert all(torch.equal(buffer, before[name]) for name, buffer in momentum_model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for p, (gradient, value) in zip(model.parameters(), gradients):
        assert p.requires_grad and p.grad is gradient and torch.equal(gradient, value)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rows_of(images, texts, group):
    """[(image, text, group)] as plain numbers."""
    return list(zip(images.tolist(), texts.tolist(), group.tolist()))


def in_order(queue):
    """The pairs of a queue, the oldest first."""
    rows = rows_of(queue.images, queue.texts, queue.groups)
    return rows[int(queue.next):] + rows[:int(queue.next)]


def test_a_queue_starts_with_random_unit_rows_of_nothing():
    queue, same, other = Queue(7, 4, seed=3), Queue(7, 4, seed=3), Queue(7, 4, seed=4)
    both = torch.cat([queue.images, queue.texts])
    assert torch.allclose(both.norm(dim=1), torch.ones(14)) and len(both.unique(dim=0)) == 14
    assert queue.groups.tolist() == [-1] * 7 and not list(queue.parameters())
    assert in_order(queue) == in_order(same) and not torch.equal(queue.images, other.images)


def test_a_queue_holds_the_last_pairs():
    """As a list does, whatever the sizes of the batches; what is enqueued carries no gradient."""
    queue = Queue(7, 4)
    pairs = in_order(queue)
    sizes = np.random.default_rng(0).integers(1, 8, 40).tolist()
    for step, n in enumerate([3, 3, 3, 7, 1, *sizes, 7, 7]):
        images = unit(n, 4, seed=2 * step).requires_grad_()
        texts = unit(n, 4, seed=2 * step + 1)
        group = torch.arange(n) + 100 * step
        queue.enqueue(images, texts, group)
        pairs = (pairs + rows_of(images, texts, group))[-7:]
        assert in_order(queue) == pairs and not queue.images.requires_grad
    restored = Queue(7, 4, seed=9)
    restored.load_state_dict(queue.state_dict())
    for q in (queue, restored):  # also where it stood
        q.enqueue(unit(2, 4).bfloat16(), unit(2, 4, seed=1).bfloat16(), torch.tensor([1, 2]))
    assert in_order(restored) == in_order(queue) and queue.images.dtype == torch.float32


PAPER = dict(mu=90.0, gamma=0.5)
# kind -> of the batch, of a queue
LOSSES = {"uto": (partial(losses.uto_loss, **PAPER), partial(losses.uto_queue_loss, **PAPER)),
          "infonce": (losses.info_nce_loss, losses.info_nce_queue_loss),
          "triplet": (losses.hardest_triplet_loss, losses.hardest_triplet_queue_loss)}


@pytest.mark.parametrize("kind", LOSSES)
def test_total_loss_is_its_sum(kind):
    """Images against queued texts with the texts' keys, and the other way round."""
    images, texts, image_keys, text_keys = (unit(5, 4, seed=seed) for seed in (1, 2, 3, 4))
    group = torch.tensor([2, 3, 2, 7, 8])
    queue = Queue(6, 4, seed=5)
    queue.enqueue(unit(4, 4, seed=6), unit(4, 4, seed=7), torch.tensor([2, 9, 3, 2]))
    same = torch.tensor([[a == b for b in group.tolist()] for a in group.tolist()])
    queued = torch.tensor([[a == b for b in queue.groups.tolist()] for a in group.tolist()])
    assert queued.sum() == 5 and same.sum() == 7
    of_batch, of_queue = LOSSES[kind]
    batch = of_batch(images, texts, same).item()
    to_texts = of_queue(images, text_keys, queue.texts, queued).item()
    to_images = of_queue(texts, image_keys, queue.images, queued).item()
    for weight in (0.0, 1.0, 20.0):
        alone = total_loss(kind, weight, images, texts, group, None, None)
        assert alone.item() == pytest.approx(weight * batch, rel=1e-5)
        loss = total_loss(kind, weight, images, texts, group, (image_keys, text_keys), queue)
        assert loss.item() == pytest.approx(weight * batch + to_texts + to_images, rel=1e-5)
    if kind == "uto":
        steep = losses.uto_loss(images, texts, same, mu=20.0, gamma=0.5).item()
        loss = total_loss(kind, 1.0, images, texts, group, None, None, 20.0)
        assert loss.item() == pytest.approx(steep, rel=1e-5) and abs(steep - batch) > 1e-3


# ---------------------------------------------------------------- augmentation

BYTES = clip.Tokenizer([])  # a token for every letter
ENDS = torch.tensor([symbol.endswith("</w>") for symbol in BYTES.symbols])


def between(row):
    """The tokens between start and end; the row is well formed."""
    end = int(row.argmax())
    assert row[0] == BYTES.start and row[end] == BYTES.end and (row[end + 1:] == 0).all()
    assert row.dtype == torch.int32
    return row[1:end].tolist()


def test_augmentation_changes_words_at_its_rates():
    """10,000 words of two letters, each kept, masked, replaced by two other tokens or dropped; in order."""
    words = ["".join(letters) for letters in itertools.product("abcde", "vwxyz")]
    tokens = BYTES([" ".join(words)] * 400, 60)
    pairs = [tuple(BYTES.encode(word)) for word in words]
    mask = (BYTES.start, BYTES.start)
    before = tokens.clone()
    torch.manual_seed(0)
    out = augmented(tokens, BYTES, ENDS, 0.2)
    assert torch.equal(tokens, before) and out.shape == tokens.shape
    kept = masked = 0
    new = []
    for row in out:
        ids = between(row)
        found = list(zip(ids[::2], ids[1::2]))
        places = [pairs.index(pair) for pair in found if pair in pairs]
        assert len(ids) % 2 == 0 and places == sorted(set(places))
        kept += len(places)
        masked += found.count(mask)
        new += [pair for pair in found if pair not in pairs and pair != mask]
    dropped = 10_000 - kept - masked - len(new)
    for count, rate in ((masked, 0.1), (len(new), 0.02), (dropped, 0.08)):
        assert abs(count - 10_000 * rate) < 4 * math.sqrt(10_000 * rate * (1 - rate)), (count, rate)
    ids = sum(new, ())
    assert len(set(ids)) > 0.5 * len(ids) and max(ids) < BYTES.start < BYTES.end  # of the whole vocabulary
    torch.manual_seed(0)
    assert torch.equal(augmented(tokens, BYTES, ENDS, 0.2), out)
    assert not torch.equal(augmented(tokens, BYTES, ENDS, 0.2), out)


def test_augmentation_keeps_words_whole(monkeypatch):
    """Without replacement, what comes out of a caption are all ways to keep, mask or drop each of its words,
    and no other; the last word was cut where the row is full. One word at least remains."""
    monkeypatch.setattr(train_user, "REPLACED", 0.0)
    tokens = BYTES(["a bc defg hijklmnopq"], 17, truncate=True)
    words = [BYTES.encode(word)[:8] for word in ("a", "bc", "defg", "hijklmnopq")]
    ways = set()  # no two ways are the same tokens
    for kinds in itertools.product(("keep", "mask", "drop"), repeat=4):
        ids = []
        for word, kind in zip(words, kinds):
            ids += {"keep": word, "mask": [BYTES.start] * len(word), "drop": []}[kind]
        ways.add(tuple(ids or words[0]))
    torch.manual_seed(0)
    out = augmented(tokens.expand(3000, -1), BYTES, ENDS, 0.6)
    assert len(ways) == 80 and {tuple(between(row)) for row in out} == ways


def test_augmentation_at_its_ends():
    """Fraction 0 draws nothing. Where all words are dropped the first stays. No words stay no words."""
    tokens = BYTES(["ab c", "d"], 8)
    state = torch.get_rng_state()
    assert torch.equal(augmented(tokens, BYTES, ENDS, 0.0), tokens)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    found = [between(row) for row in augmented(BYTES(["d e"] * 1000, 8), BYTES, ENDS, 1.0)]
    assert {len(ids) for ids in found} == {1, 2}
    assert 160 - 46 < found.count(BYTES.encode("d")) < 160 + 46  # both dropped: 0.4 * 0.4
    assert 400 - 62 < found.count([BYTES.start]) < 400 + 62  # one masked, one dropped: 2 * 0.5 * 0.4
    assert found.count(BYTES.encode("e")) < 3  # only a random replacement can be that
    assert between(augmented(BYTES(["", "ab"], 8), BYTES, ENDS, 1.0)[0]) == []


# ---------------------------------------------------------------- settings

SHARED = dict(enhance="both", enhance_texts=False, unit_norm=False, loss="uto", mu=None, momentum=0.999,
              smooth=1.0, dropout=0.4, augment=0.2, weight_decay=1e-4, batch_size=128)
PRETRAINED = SHARED | dict(lr=5e-4, clip_lr=5e-5, dim=1024)


@pytest.mark.parametrize("words, expected", [
    ("--data flickr30k --clip ViT-B/32", PRETRAINED | dict(
        epochs=20, queue=2048, batch_weight=20.0, lr_drop=0.5, eval_every=4, out="runs/user-flickr30k")),
    ("--data coco --clip ViT-B/32", PRETRAINED | dict(
        epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6, eval_every=5, out="runs/user-coco")),
    ("", SHARED | dict(
        epochs=3, queue=2048, batch_weight=1.0, lr=3e-4, clip_lr=3e-4, dim=256, lr_drop=0.85, eval_every=1,
        out="runs/user-primitives")),
    ("--data coco", dict(queue=2048, lr=3e-4, clip_lr=3e-4, out="runs/user-coco")),
    ("--clip-lr 0", dict(lr=3e-4, clip_lr=0.0)),
    ("--clip ViT-B/32 --lr 0.3 --queue 0 --batch-weight 0 --epochs 3 --loss infonce", dict(
        lr=0.3, clip_lr=0.3 / 10, queue=0, batch_weight=0.0, eval_every=1)),
    ("--clip ViT-B/32 --clip-lr 0", dict(lr=5e-4, clip_lr=0.0)),
    ("--clip-lr 0.2 --enhance-texts", dict(clip_lr=0.2, enhance_texts=True)),
    ("--clip x.pt", dict(dim=1024))])
def test_settings_are_the_papers(words, expected):
    """Flickr30K, COCO, and those for random weights; CLIP's rate is a tenth where it is pretrained."""
    assert vars(settings(words.split())).items() >= expected.items()


@pytest.mark.parametrize("option, value, says", [
    ("--queue", 7, "--batch-size 8 is larger than --queue 7"), ("--queue", -1, "0 or more"),
    ("--momentum", 1.5, "a share from 0 to 1"), ("--batch-weight", -1, "0 or more"), ("--dim", 0, "positive"),
    ("--smooth", 0, "positive"), ("--dropout", 2, "a share"), ("--augment", -0.1, "a share"),
    ("--lr-drop", 1.1, "a share"), ("--clip-lr", -1, "0 or more"), ("--enhance", "all", "--enhance"),
    ("--loss", "clip", "--loss"), ("--batch-size", 1, "2 or more"), ("--dim", 1, "2 dimensions"),
    ("--mu", 0, "positive"), ("--mu", "20 --loss infonce", "only uto"),
    ("--data", "primitives --regions", "have none")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    argv = arguments(squares, "--out", tmp_path / "run", option, *str(value).split())
    assert says in refused(capsys, argv, main) and not (tmp_path / "run").exists()


def test_documented_commands_parse():
    runs.assert_documented_commands_parse(train_user)


# ---------------------------------------------------------------- a run, looked at from inside

def spy(patch, owner, name, record=lambda result, *a: (*a, result)):
    """A list that gets record(result, *arguments) of every call of a function from here on."""
    plain, calls = getattr(owner, name), []

    def function(*a):
        result = plain(*a)
        calls.append(record(result, *a))
        return result
    patch.setattr(owner, name, function)
    return calls


def seen_by_loss(result, kind, weight, images, texts, group, keys, queue, mu):
    embeddings = images.detach(), texts.detach()
    return SimpleNamespace(kind=kind, weight=weight, embeddings=embeddings, group=group, keys=keys,
                           queue=in_order(queue), mu=mu)


def seen_by_encoder(result, model, tokens):
    return SimpleNamespace(model=model, training=model.training, tokens=tokens)


@pytest.fixture(scope="module")
def spied(squares, tmp_path_factory):
    """Four epochs of three steps of 20 pairs, a queue of 52; what is seen at every step."""
    run = SimpleNamespace(out=tmp_path_factory.mktemp("runs") / "spied", steps=[])

    class AdamW(torch.optim.AdamW):
        def step(self):
            names = {p: name for name, p in run.models[0].named_parameters()}
            step = SimpleNamespace(groups=[], weights={name: p.detach().clone() for p, name in names.items()})
            for part in self.param_groups:
                step.groups.append((part["lr"], part["weight_decay"], [names[p] for p in part["params"]]))
            step.norm = math.sqrt(sum(p.grad.square().sum().item() for p in names if p.grad is not None))
            run.steps.append(step)
            super().step()

    with runs.kept_signals(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.MODELS, "tiny", SMALL)
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(torch.optim, "AdamW", AdamW)
        run.read = spy(patch, USER, "encode_text", seen_by_encoder)
        run.models = spy(patch, train_user, "USER", lambda model, *a: model)
        run.losses = spy(patch, train_user, "total_loss", seen_by_loss)
        run.captions = spy(patch, train_user, "augmented")
        run.val = spy(patch, eval, "embed", lambda embeddings, *a: embeddings)
        main(arguments(squares, "--out", run.out, "--epochs", 4, "--lr", 2e-3, "--clip-lr", 4e-4,
                       "--weight-decay", 0.3, "--dim", 12, "--batch-size", 20, "--queue", 52,
                       "--momentum", 0.75, "--augment", 0.5, "--lr-drop", 0.5, "--batch-weight", 3,
                       "--dropout", 0, "--mu", 35))
    assert len(run.steps) == 12
    return run


def test_learning_rates(spied):
    """CLIP has a rate of its own. Constant, a tenth after the drop; gradients are clipped."""
    rates = 6 * [1.0] + 6 * [0.1]
    for step, rate in zip(spied.steps, rates):
        (clip_lr, clip_decay, of_clip), (lr, decay, heads) = step.groups
        assert clip_lr == pytest.approx(4e-4 * rate) and lr == pytest.approx(2e-3 * rate)
        assert clip_decay == decay == 0.3
        assert of_clip == [name for name in step.weights if name.startswith("clip.")]
        assert sorted(of_clip + heads) == sorted(step.weights) and step.norm < 2.001
    assert max(step.norm for step in spied.steps) > 1.999


def test_an_epoch_is_one_pass_over_pairs(spied, squares):
    """Every caption once, with the group of its image."""
    assert {(x.kind, x.weight, x.mu) for x in spied.losses} == {("uto", 3.0, 35.0)}
    instances, _ = data.load(squares)
    group = eval.layout(instances)["image_group"].tolist()
    model, tokenizer, _ = eval.restore(spied.out / "last.pt", "cpu")
    expected = [(g, tokenizer.encode(caption)) for g, x in zip(group, instances) for caption in x.captions]
    assert len(expected) == 60
    for epoch in range(4):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            tokens = spied.captions[step][0]
            for g, row in zip(spied.losses[step].group.tolist(), tokens):
                seen.append((g, row[1:int(row.argmax())].tolist()))
        assert sorted(seen) == sorted(expected)


def test_keys_enter_the_queues_after_the_loss(spied):
    """At every step the queues hold the pairs of the steps before, with the group that each shows."""
    pairs = in_order(Queue(52, 12))
    for x in spied.losses:
        assert x.queue == pairs[-52:] and not any(k.requires_grad for k in x.keys)
        assert all(torch.allclose(k.norm(dim=1), torch.ones(20)) for k in x.keys)
        pairs += rows_of(*x.keys, x.group)
    queue = Queue(52, 12, seed=1)
    queue.load_state_dict(clip.load_checkpoint(spied.out / "last.pt")["queue"])
    assert in_order(queue) == pairs[-52:]
    first = spied.losses[0]  # the momentum encoders start as copies
    for key, embedding in zip(first.keys, first.embeddings):
        assert torch.allclose(key, embedding, atol=1e-5)
    assert max((x.keys[0] - x.embeddings[0]).abs().max() for x in spied.losses[1:]) > 1e-3


def test_momentum_encoders_follow(spied):
    """Through every step, by the weights before it."""
    expected = {name: value.double() for name, value in spied.steps[0].weights.items()}
    for step in spied.steps:
        expected = {name: 0.75 * value + 0.25 * step.weights[name] for name, value in expected.items()}
    found = clip.load_checkpoint(spied.out / "last.pt")["momentum"]
    assert found.keys() == spied.models[0].state_dict().keys()
    assert all(torch.allclose(found[name].double(), value, atol=1e-5) for name, value in expected.items())
    assert (expected["text_fc.weight"] - spied.steps[-1].weights["text_fc.weight"]).abs().max() > 1e-4


def test_both_encoders_read_the_same_changed_captions(spied):
    reads = [x for x in spied.read if x.training]
    assert len(spied.captions) == 12 and [x.model is spied.models[0] for x in reads] == [True, False] * 12
    for step, (tokens, tokenizer, ends, fraction, changed) in enumerate(spied.captions):
        assert fraction == 0.5 and not torch.equal(tokens, changed)
        assert all(torch.equal(x.tokens, changed) for x in reads[2 * step:2 * step + 2])
        assert len(ends) == tokenizer.vocab_size and not ends[[tokenizer.start, tokenizer.end]].any()
        for ids in map(tokenizer.encode, ("a", "frame", "middle", "qxz", "ä")):
            assert ends[ids].tolist() == [False] * (len(ids) - 1) + [True]
    assert len({tuple(changed.flatten().tolist()) for *_, changed in spied.captions}) == 12


def test_checkpoints(spied, squares):
    """best.pt is the model as it was in training; only last.pt carries what training goes on with."""
    best, last = (clip.load_checkpoint(spied.out / name) for name in ("best.pt", "last.pt"))
    assert last.keys() - best.keys() == {"momentum", "queue", "optimizer"} and best.keys() <= last.keys()
    found = [record["val"]["rSum"] for record in log(spied.out)]
    best_epoch = found.index(max(found))
    assert len(found) == 4 and best["step"] == 3 * (best_epoch + 1) and last["step"] == 12
    for name, embeddings in (("best.pt", spied.val[best_epoch]), ("last.pt", spied.val[3])):
        model, tokenizer, _ = eval.restore(spied.out / name, "cpu")
        again = eval.embed(model, data.load(squares, split="val")[0], tokenizer, "off")
        assert all(torch.equal(a, b) for a, b in zip(again, embeddings))
    assert not torch.equal(spied.val[0][0], spied.val[3][0])


# ---------------------------------------------------------------- other runs

def evaluated(out):
    """What the evaluation command says of a run's best.pt."""
    runs.evaluated(out / "best.pt", "--out", out / "again")
    return metrics(out / "again")["test"]


@pytest.mark.parametrize("enhance, more", [("none", ["--queue", 0, "--loss", "triplet"]),
                                           ("sge", ["--loss", "infonce", "--batch-weight", 0]),
                                           ("cge", ["--smooth", 9, "--enhance-texts", "--unit-norm"])])
def test_baselines_run_and_eval_repeats_their_metrics(enhance, more, squares, tmp_path):
    more = ["--epochs", 1, "--dim", 10, "--queue", 8, "--enhance", enhance, *more]
    main(arguments(squares, "--out", tmp_path, *more))
    assert sorted(os.listdir(tmp_path)) == FILES and math.isfinite(log(tmp_path)[0]["loss"])
    last = clip.load_checkpoint(tmp_path / "last.pt")
    assert ("queue" in last) == ("momentum" in last) == (enhance != "none")
    assert evaluated(tmp_path) == metrics(tmp_path)["test"]
    model = eval.restore(tmp_path / "best.pt", "cpu")[0]
    assert model.smooth == (9 if enhance == "cge" else 1) and model.enhance == enhance
    assert model.unit_norm == (enhance == "cge")
    assert (model.image_sge is not None) == (enhance == "sge") and model.text_sge is None
    assert (model.text_cge is not None) == (enhance == "cge")


def test_a_frozen_clip_keeps_its_weights(squares, tmp_path):
    """Bit for bit, batch norm's statistics included; the rest learns. So do the momentum encoders'."""
    argv = arguments(squares, "--image-size", 32, "--epochs", 1, "--dim", 12, "--queue", 16)
    main([*argv, "--clip", "tiny-rn", "--out", str(tmp_path / "before")])
    clip_file = str(tmp_path / "before" / "best.pt")
    main([*argv, "--clip", clip_file, "--out", str(tmp_path / "run"), "--clip-lr", "0"])
    expected = clip.load(clip_file, "cpu")[0].state_dict()
    last = clip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert "visual.bn1.running_mean" in expected
    for name, value in expected.items():
        assert torch.equal(last["clip"]["state_dict"][name], value), name
        assert torch.equal(last["momentum"][f"clip.{name}"], value), name
    assert not torch.equal(last["momentum"]["text_fc.weight"], last["heads"]["text_fc.weight"])


@pytest.fixture
def precomp(tmp_path):
    """16 / 8 / 8 pictures as four regions of six numbers, five captions each, and CLIP's embeddings; the
    arguments of a run."""
    words = ("red", "green", "blue", "wet", "dry", "soft", "hard", "round")
    (tmp_path / "precomp").mkdir()
    for file, rows in (("train", 16), ("dev", 8), ("test", 8)):
        features = np.random.default_rng(rows + len(file)).random((rows, 4, 6), np.float32)
        np.save(tmp_path / "precomp" / f"{file}_ims.npy", features)
        embeddings = features.reshape(rows, 24).repeat(2, axis=1)[:, :32]
        np.save(tmp_path / "precomp" / f"{file}_clip.npy", embeddings)
        captions = [f"a {words[i % 8]} thing, {words[i // 5 % 8]}\n" for i in range(5 * rows)]
        (tmp_path / "precomp" / f"{file}_caps.txt").write_text("".join(captions))
    return arguments("flickr30k", "--root", tmp_path, "--regions", "--epochs", 1, "--dim", 12, "--queue", 16,
                     "--out", tmp_path / "run")


def test_regions(precomp, tmp_path, capsys):
    """Trained and evaluated without a picture; pictures of results are refused in one line."""
    main(precomp)
    out = tmp_path / "run"
    found, checkpoint = metrics(out)["test"], clip.load_checkpoint(out / "best.pt")
    assert checkpoint["heads"]["image_fc.weight"].shape == (12, 6) and checkpoint["regions"] == 6
    assert checkpoint["step"] == 10 and math.isfinite(log(out)[0]["loss"]) and found["model"]["rSum"] > 0
    assert evaluated(out) == found
    argv = ["--checkpoint", out / "best.pt", "--device", "cpu", "--gallery", tmp_path / "gallery.png"]
    assert "have no picture to show" in refused(capsys, argv, eval.main)
    model, tokenizer, _ = eval.restore(out / "best.pt", "cpu")
    images, _ = eval.embed(model, data.load_regions("flickr30k", str(tmp_path), "test")[0], tokenizer, "off")
    regions, embeddings = (torch.from_numpy(np.load(tmp_path / "precomp" / f"test_{kind}.npy"))
                           for kind in ("ims", "clip"))
    with torch.no_grad():
        assert torch.allclose(images, model.encode_image(data.Regions(regions, embeddings)), atol=1e-5)


def test_regions_with_pictures(precomp, tmp_path):
    """CLIP embeds them, and is trained; pictures of results can be drawn."""
    rows = []
    (tmp_path / "flickr30k-images").mkdir()
    for file, split, count in (("train", "train", 16), ("dev", "val", 8), ("test", "test", 8)):
        captions = (tmp_path / "precomp" / f"{file}_caps.txt").read_text().splitlines()
        for i in range(count):
            picture = Image.fromarray(np.full((20, 24, 3), 8 * i, np.uint8))
            picture.save(tmp_path / "flickr30k-images" / f"{file}-{i}.png")
            sentences = [{"raw": caption.title()} for caption in captions[5 * i:5 * i + 5]]
            rows.append({"filename": f"{file}-{i}.png", "split": split, "sentences": sentences})
        (tmp_path / "precomp" / f"{file}_clip.npy").unlink()
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
    main(precomp)
    out = tmp_path / "run"
    assert evaluated(out) == metrics(out)["test"]
    weights = [clip.load_checkpoint(out / name)["clip"]["state_dict"] for name in ("best.pt", "last.pt")]
    first = clip.build("tiny", eval.restore(out / "best.pt", "cpu")[1], 0, 16).state_dict()
    assert not torch.equal(weights[0]["visual.conv1.weight"], first["visual.conv1.weight"])
    runs.evaluated(out / "best.pt", "--gallery", tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").exists()


@pytest.mark.parametrize("file", ["train", "dev", "test"])
def test_region_files_that_do_not_fit_are_refused(file, precomp, tmp_path, capsys):
    """In one line and before anything is trained."""
    ends = ("_caps.txt", "_ims.npy", "_clip.npy")
    caps, ims, embeddings = (tmp_path / "precomp" / f"{file}{end}" for end in ends)
    features = np.load(ims)
    captions = caps.read_text()
    caps.write_text("".join(captions.splitlines(keepends=True)[:-5]))
    line = refused(capsys, precomp, main)
    assert f"{file}_ims.npy" in line and "expected five captions to a row" in line
    caps.unlink()
    assert f"{file}_caps.txt" in refused(capsys, precomp, main)
    caps.write_text(captions)
    if file != "train":
        np.save(ims, np.zeros((8, 4, 7), np.float32))
        data._regions.cache_clear()
        assert f"{file}_ims.npy: features of width 7" in refused(capsys, precomp, main)
    np.save(ims, features)
    data._regions.cache_clear()
    for shape, problem in (((8, 31), "embeddings of width 31; those of --clip tiny have 32"),
                           ((9, 32), "9 rows"), ((8, 4, 32), "are floats (images, D)")):
        shape = (len(features), *shape[1:]) if shape[0] == 8 else shape
        np.save(embeddings, np.zeros(shape, np.float32))
        data._regions.cache_clear()
        line = refused(capsys, precomp, main)
        assert f"{file}_clip.npy" in line and problem in line
    embeddings.unlink()
    assert f"{file}_clip.npy: does not exist; --enhance both needs" in refused(capsys, precomp, main)
    ims.unlink()
    data._regions.cache_clear()
    assert f"{file}_ims.npy" in refused(capsys, precomp, main) and not (tmp_path / "run").exists()
