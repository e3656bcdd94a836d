"""Tests of eval.py for methods that learn from classes: metrics against loops over their definitions, attention pictures, and the
features of a frozen CLIP that are computed once.

    python -m pytest tests/test_eval_classes.py
"""
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import eval

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- retrieval by class

def places(row, label, gallery):
    """Where the relevant items stand; of equal scores the irrelevant ones come first."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], gallery[j] == label))
    return [p for p, j in enumerate(order, 1) if gallery[j] == label]


def average_precision(found):
    return mean(up_to_it / p for up_to_it, p in enumerate(found, 1))


def class_metrics(scores, query_label, gallery, classes):
    """Every number of eval.class_metrics from its definition, one query and one item at a time."""
    every = [places(row, label, gallery) for row, label in zip(scores, query_label)]
    scopes = [k for k in (1, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= len(gallery)]
    at = {k: 100 * mean(sum(p <= k for p in found) / k for found in every) for k in scopes}
    own = {name: [average_precision(found) for found, label in zip(every, query_label) if label == c] for c, name in enumerate(classes)}
    best = [mean(max(n / p for n, p in enumerate(found, 1) if 10 * n >= tenth * len(found)) for found in every) for tenth in range(11)]
    return {"mAP": 100 * mean(map(average_precision, every)), **{f"P@{k}": v for k, v in at.items()},
            "per_class": {name: 100 * mean(values) for name, values in own.items() if values},
            "precision_recall": {"recall": [10 * tenth for tenth in range(11)], "precision": [100 * b for b in best]},
            "precision_scope": {"scope": scopes, "precision": list(at.values())}}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            same(found[key], value)
        else:
            assert found[key] == pytest.approx(value, abs=1e-9), key


NAMES = [f"class {c}" for c in range(6)]  # 4 has no query, 5 neither query nor item


def cases():
    for seed in range(3):
        gallery = torch.cat([torch.arange(5), integers(0, 5, 35, seed=seed)])
        yield "few relevant", (random(9, 40, seed=seed) * 1000).round() / 1000, integers(0, 4, 9, seed=seed + 10), gallery
        yield "tied", integers(0, 4, 9, 40, seed=seed).float(), integers(0, 4, 9, seed=seed + 10), gallery
    uneven = torch.tensor([0] * 60 + [1] * 25 + [2] * 3 + [3] + [4] * 11)  # both ways of finding positions, and unlike counts in a block
    yield "uneven", integers(0, 12, 12, 100, seed=3).float(), torch.arange(12) % 4, uneven
    yield "only rare queries", integers(0, 12, 7, 100, seed=4).float(), torch.tensor([2, 3, 3, 2, 2, 3, 2]), uneven
    yield "constant", torch.full((9, 40), -0.25), integers(0, 4, 9), gallery
    yield "longer than every scope", integers(0, 50, 4, 1003, seed=5).float(), torch.arange(4), integers(0, 5, 1003, seed=6)
    yield "one item", torch.tensor([[0.3], [-2.0]]), torch.tensor([3, 3]), torch.tensor([3])
    yield "all relevant", random(2, 7).round(), torch.tensor([1, 1]), torch.ones(7, dtype=torch.int64)


@pytest.mark.parametrize("name, scores, queries, gallery", cases())
def test_class_metrics(name, scores, queries, gallery, monkeypatch):
    expected = class_metrics(scores.tolist(), queries.tolist(), gallery.tolist(), NAMES)
    same(eval.class_metrics(scores, queries, gallery, NAMES), expected)
    for block in (1, 250):  # one query at a time, a few
        monkeypatch.setattr(eval, "BLOCK", block)
        asked = []
        function = lambda begin, end: asked.append(scores[begin:end].numel()) or scores[begin:end]
        same(eval.class_metrics(function, queries.numpy(), gallery.numpy(), NAMES), expected)
        assert sum(asked) == scores.numel() and max(asked) <= max(block, len(gallery))


def test_class_metrics_refuse_what_cannot_be_ranked():
    scores, labels = random(8, 30), torch.arange(30) % 3
    for at in ((0, 0), (7, 29)):
        broken = scores.clone()
        broken[at] = math.nan
        with pytest.raises(clip.CheckpointError, match="NaN"):
            eval.class_metrics(broken, labels[:8], labels, NAMES)
    with pytest.raises(ValueError, match="query 2 .*no relevant"):
        eval.class_metrics(scores, torch.tensor([0, 1, 5, 2, 0, 0, 0, 0]), labels, NAMES)


def test_class_chance_is_the_mean_over_all_orders():
    gallery, queries = [0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 2]
    expected = 100 * mean(average_precision(places(order, q, gallery)) for order in permutations(range(6)) for q in queries)
    assert eval.class_chance(torch.tensor(queries), torch.tensor(gallery)) == {"mAP": pytest.approx(expected, abs=1e-10)}
    assert eval.class_chance(torch.tensor([1, 1]), torch.tensor([1])) == {"mAP": pytest.approx(100)}
    assert eval.class_chance(torch.tensor([0]), torch.tensor([0, 1])) == {"mAP": pytest.approx(75)}


@pytest.mark.parametrize("block", [1, 30, 1 << 22])
def test_class_retrieval_with_captions_and_distractors(block, monkeypatch):
    monkeypatch.setattr(eval, "BLOCK", block)
    captions, query = [1, 3, 2, 1, 1, 4, 2, 1, 1, 2], [True, True, False, True, False, True, True, False, True, True]
    labels = [0, 1, 1, 3, 3, 0, 1, 0, 3, 3]  # class 2 has nothing
    images, texts = integers(-2, 3, 10, 5).float(), integers(-2, 3, 18, 5, seed=1).float()  # whole numbers: products are exact, and often equal
    owner = [i for i, n in enumerate(captions) for _ in range(n)]
    score = lambda i, c: sum(a * b for a, b in zip(images[i].tolist(), texts[c].tolist()))
    asked_images, asked_texts = [i for i in range(10) if query[i]], [c for c in range(18) if query[owner[c]]]
    of_texts = [labels[i] for i in owner]
    image_labels, text_labels = [labels[i] for i in asked_images], [of_texts[c] for c in asked_texts]
    expected = {"image_to_text": class_metrics([[score(i, c) for c in range(18)] for i in asked_images], image_labels, of_texts, NAMES),
                "text_to_image": class_metrics([[score(i, c) for i in range(10)] for c in asked_texts], text_labels, labels, NAMES)}
    expected["mAP"] = mean(expected[way]["mAP"] for way in expected)
    found = eval.class_retrieval(images, texts, np.array(labels), np.array(captions), np.array(query), NAMES)
    same(found["model"], expected)
    number = torch.tensor
    chance = {"image_to_text": eval.class_chance(number(image_labels), number(of_texts)),
              "text_to_image": eval.class_chance(number(text_labels), number(labels))}
    same(found["chance"], chance | {"mAP": mean(chance[way]["mAP"] for way in chance)})


MEMORY = '''
import sys, torch
sys.path.insert(0, ".")
import eval
torch.set_num_threads(1)
read = lambda name: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
images, texts, labels = torch.randn(10_000, 16), torch.randn(10_000, 16), torch.arange(10_000) % 10
names = [str(c) for c in range(10)]
eval.class_metrics(lambda b, e: images[b:min(e, 20)] @ texts.t(), labels[:20], labels, names)  # what is loaded on first use
before = read("VmRSS")
metrics = eval.class_metrics(lambda b, e: images[b:e] @ texts.t(), labels, labels, names)
assert 9 < metrics["mAP"] < 11
print(read("VmHWM") - before)
'''


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_class_metrics_in_bounded_memory():
    """10,000 x 10,000, whose scores alone are 400 MB, in less than that above the inputs."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 400e6, int(done.stdout) / 1e6


# ---------------------------------------------------------------- classification

def classification_metrics(rows, thresholds):
    """eval.classification_metrics from its definition. rows: [(probabilities, label)]."""
    rows = [(p, label) for p, label in rows if label >= 0]
    if not rows:
        return None
    C, predictions = len(rows[0][0]), []
    for p, label in rows:  # a class that is as probable as the right one is what is predicted
        others = [c for c in range(C) if c != label]
        predictions.append(label if all(p[label] > p[c] for c in others) else next(c for c in others if p[c] == max(p[o] for o in others)))
    count = lambda true, said: sum(true(label) and said(guess) for (_, label), guess in zip(rows, predictions))
    f1 = []
    for c in range(C):
        tp, fp, fn = (count(lambda x: (x == c) == t, lambda x: (x == c) == s) for t, s in ((True, True), (False, True), (True, False)))
        f1 += [2 * tp / (2 * tp + fp + fn)] if tp + fp + fn else []
    recall, kept, right = [], 0, 0
    for c in range(C):
        above = [label == c for p, label in rows if p[c] >= thresholds[c]]
        own = sum(label == c for _, label in rows)
        kept, right, recall = kept + len(above), right + sum(above), recall + ([sum(above) / own] if own else [])
    return {"accuracy": 100 * mean(guess == label for (_, label), guess in zip(rows, predictions)), "macro_f1": 100 * mean(f1),
            "recall_at_precision": 100 * mean(recall), "precision": 100 * right / kept if kept else 0.0}


def precision_thresholds(rows, C, precision):
    """eval.precision_thresholds from its definition, in exact arithmetic."""
    rows, out = [(p, label) for p, label in rows if label >= 0], []
    for c in range(C):
        reached = [math.inf]
        for threshold in {p[c] for p, _ in rows}:
            above = [label == c for p, label in rows if p[c] >= threshold]
            reached += [threshold] if Fraction(sum(above), len(above)) >= Fraction(str(precision)) else []
        out.append(min(reached))
    return out


def predictions():
    for seed in range(4):
        labels = integers(-1, 4, 40, seed=seed)  # class 4 has no row
        yield "random", random(40, 5, seed=seed).softmax(1), labels
        yield "tied", integers(0, 4, 40, 5, seed=seed) / 8, labels
        yield "one row", integers(0, 3, 1, 3, seed=seed) / 4, torch.tensor([seed - 1])
    yield "constant", torch.full((9, 3), 1 / 3), torch.arange(9) % 3
    yield "two classes", random(30, 2, seed=9).softmax(1), integers(0, 2, 30, seed=9)
    yield "one class", torch.ones(5, 1), torch.tensor([0, -1, 0, 0, -1])
    yield "nothing labelled", random(5, 3).softmax(1), torch.full((5,), -1)
    yield "no rows", torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    yield "in double", random(40, 5, seed=7).double().softmax(1), integers(-1, 5, 40, seed=7)


@pytest.mark.parametrize("name, probabilities, labels", predictions())
def test_classification_metrics_and_thresholds(name, probabilities, labels):
    rows, C = list(zip(probabilities.tolist(), labels.tolist())), probabilities.shape[1]
    for precision in (0.3, 0.5, 0.6, 0.9, 1.0):
        thresholds = eval.precision_thresholds(probabilities, labels, precision)
        assert thresholds.dtype == probabilities.dtype and thresholds.tolist() == precision_thresholds(rows, C, precision)
        other = integers(-1, C, len(labels), seed=5)  # thresholds come from other data than they are used on
        for used in (labels, other):
            expected = classification_metrics(list(zip(probabilities.tolist(), used.tolist())), thresholds.tolist())
            found = eval.classification_metrics(probabilities, used, thresholds)
            assert found == (expected and pytest.approx(expected, abs=1e-9))
            plain = eval.classification_metrics(probabilities, used)
            assert plain == (expected and pytest.approx({key: expected[key] for key in ("accuracy", "macro_f1")}, abs=1e-9))


def test_a_constant_prediction_and_an_unreached_threshold_earn_nothing():
    labels = torch.arange(12) % 3
    found = eval.classification_metrics(torch.full((12, 3), 1 / 3), labels, torch.full((3,), math.inf))
    assert found == {"accuracy": 0, "macro_f1": 0, "recall_at_precision": 0, "precision": 0}
    wrong = torch.nn.functional.one_hot((labels + 1) % 3).float()
    assert eval.precision_thresholds(wrong, labels, 0.5).tolist() == [math.inf] * 3


@pytest.mark.parametrize("precision, right, rows", [
    (0.5, 5, 10), (0.6, 3, 5), (0.6, 15, 25), (0.6, 27, 45), (0.7, 21, 30), (0.8, 4, 5), (0.9, 18, 20), (0.95, 19, 20)])
def test_a_precision_that_is_met_exactly(precision, right, rows):
    """The wrong rows come first, so that only all rows together meet it; one right row less does not."""
    value = torch.linspace(0.9, 0.1, rows)
    probabilities, labels = torch.stack([value, 1 - value], 1), torch.tensor([1] * (rows - right) + [0] * right)
    assert eval.precision_thresholds(probabilities, labels, precision)[0] == value[-1]
    assert eval.precision_thresholds(probabilities[:-1], labels[:-1], precision)[0] == math.inf


def test_nan_predictions_are_refused():
    for row, label in ((0, 2), (5, -1)):
        probabilities, labels = random(6, 3).softmax(1), torch.tensor([2, 1, 0, 1, 2, -1])
        probabilities[row, 1] = math.nan
        assert labels[row] == label
        with pytest.raises(clip.CheckpointError, match="NaN"):
            eval.classification_metrics(probabilities, labels)


# ---------------------------------------------------------------- pictures

def test_attention_picture(tmp_path):
    pad, cell, path = 8, eval.CELL + 8, tmp_path / "new" / "attention.png"
    even = np.full((4, 4), 1 / 16, np.float32)

    def looks_at(row, column, weight):
        out = np.full((4, 4), (1 - weight) / 15, np.float32)
        out[row, column] = weight
        return out
    first, second = (np.full((eval.CELL, eval.CELL, 3), colour, np.uint8) for colour in ((0, 0, 250), (10, 200, 30)))
    words = [("red", looks_at(1, 3, 0.9)), ("weak", looks_at(2, 0, 0.3)), ("even", even), *[("more", even)] * 4, ("eighth", looks_at(3, 2, 0.6))]
    bars = [("colour", 0.25), ("shape", 1.0), ("size", 0.0)]
    eval.attention_picture(path, [(first, "a red cone", words, bars), (second, "no attention within", [], [("colour", 0.9)]),
                                  (second, "last", [("word", even)], [])])
    assert os.listdir(tmp_path / "new") == ["attention.png"]
    picture = np.asarray(Image.open(path)).astype(int)
    assert (picture[pad + 24:pad + 24 + eval.CELL, pad:pad + eval.CELL] == first).all()  # as it is, with nothing over it
    assert (picture == first[0, 0]).all(2).sum() == eval.CELL ** 2 and (picture == second[0, 0]).all(2).sum() == 2 * eval.CELL ** 2

    def redness(k):  # (4, 4): of the centre of each patch of word k
        left, top = pad + cell * (1 + k % 7), pad + 24 + (eval.CELL + 22 + pad) * (k // 7)
        at = np.arange(4) * 32 + 16
        pixels = picture[top:top + eval.CELL, left:left + eval.CELL][at][:, at]
        return pixels[..., 0] - pixels[..., 1:].max(-1)
    paper = redness(2).max()  # what the pale picture itself has
    for k, hot, share in ((0, (1, 3), 1.0), (1, (2, 0), (0.3 - 1 / 16) / (0.9 - 1 / 16)), (7, (3, 2), (0.6 - 1 / 16) / (0.9 - 1 / 16))):
        found = redness(k)
        cold = np.delete(found.flatten(), hot[0] * 4 + hot[1])
        red = 0.85 * (eval.RED[0] - max(eval.RED[1:]))
        assert (cold == paper).all() and found[hot] == pytest.approx(share * red + (1 - 0.85 * share) * paper, abs=4), k
    assert all((redness(k) == paper).all() for k in range(2, 7))

    blue, orange = (picture == eval.BLUE).all(2), (picture == eval.ORANGE).all(2)
    lines = [y for y in range(len(picture)) if blue[y].sum() + orange[y].sum() > 300]
    bands = [y for y in lines if y - 1 not in lines]  # each bar's first line
    assert len(bands) == 4
    for y, weight in zip(bands, (0.25, 1.0, 0.0, 0.9)):
        split = np.flatnonzero(orange[y])[0]
        assert blue[y].sum() / (blue[y] | orange[y]).sum() == pytest.approx(weight, abs=0.004)
        assert not blue[y, split:].any() and np.ptp(np.flatnonzero(blue[y] | orange[y])) == 420  # image on the left, no gap


# ---------------------------------------------------------------- features of a frozen CLIP

def paint(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def frozen(tmp_path):
    """(model, instances with 1 to 3 views and captions, class names, cache folder, call of eval.frozen_features)."""
    instances = []
    for i in range(5):
        files = [str(tmp_path / f"{i}-{k}.png") for k in range(1 + i % 3)]
        for k, file in enumerate(files):
            paint(file, 10 * i + k)
        instances.append(data.Instance(f"id{i}", files, [f"thing {i} said {k} times" for k in range(1 + (i + 1) % 3)], {}, "ab"[i % 2], query=i != 3))
    tokenizer = clip.Tokenizer.train([c for x in instances for c in x.captions], 530)
    model, cache = clip.build("tiny", tokenizer).eval(), tmp_path / "cache"
    return model, instances, ["a", "b"], cache, lambda: eval.frozen_features(model, instances, ["a", "b"], tokenizer, str(cache), "off")


def equal(a, b):
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ("images", "texts", "views", "captions", "labels", "query"))


def never(*args):
    raise AssertionError("encoded again")


def test_frozen_features_are_the_models(frozen):
    model, instances, _, _, features = frozen
    found = features()
    pictures = torch.from_numpy(np.stack([data.pixels(file, 32) for x in instances for file in x.images])).permute(0, 3, 1, 2)
    mean_, std = (torch.tensor(x).view(3, 1, 1) for x in (data.IMAGE_MEAN, data.IMAGE_STD))
    with torch.no_grad():
        images = model.encode_image((pictures / 255 - mean_) / std)
        texts = torch.cat([model.encode_text(model.tokenizer([c], model.context_length)) for x in instances for c in x.captions])
    for array, expected in ((found.images, images), (found.texts, texts)):
        assert array.dtype == np.float32 and array.shape == expected.shape
        assert np.abs(array - expected.numpy()).max() < 1e-5 * expected.abs().max() and expected.std(0).min() > 1e-3  # rows differ
    assert found.views.tolist() == [1, 2, 3, 1, 2] and found.captions.tolist() == [2, 3, 1, 2, 3]
    assert found.labels.tolist() == [0, 1, 0, 1, 0] and found.query.tolist() == [True, True, True, False, True]
    assert found.layout == (found.labels, found.captions, found.query)


def test_frozen_features_are_computed_once(frozen, monkeypatch):
    model, _, _, cache, features = frozen
    found = features()
    assert len(os.listdir(cache)) == 2 and not isinstance(found.images, np.memmap)
    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(model, name, never)
    assert equal(features(), found)
    monkeypatch.setattr(eval, "LARGE", 0)
    mapped = features()
    assert isinstance(mapped.images, np.memmap) and isinstance(mapped.texts, np.memmap) and equal(mapped, found)
    batch = next(data.feature_batches(mapped, 5, 0, 0, 1, 0, 1))
    assert batch["images"].shape == (5, model.config.embed_dim)
    os.unlink(next(path for path in cache.iterdir() if path.name.endswith("-text.npy")))
    with pytest.raises(AssertionError, match="encoded again"):  # of the two only what is missing
        monkeypatch.setattr(model, "encode_text", never)
        features()


def test_frozen_features_of_other_weights_captions_and_pictures(frozen):
    model, instances, _, cache, features = frozen
    path = instances[4].images[1]

    def weights():
        with torch.no_grad():
            model.ln_final.bias[0] += 1e-3
    changes = [weights, lambda: instances[2].captions.__setitem__(0, "thing 2 said 9 times"), lambda: instances[0].captions.append("one more"),
               lambda: paint(path, 99), lambda: os.utime(path, (1, 1)),  # a file of another size; of the same size, at another time
               lambda: instances[0].images.append(path), lambda: instances.reverse()]
    features()
    for number, change in enumerate(changes, 1):
        change()
        found = features()
        assert len(os.listdir(cache)) == 2 * (number + 1), number
        assert len(found.images) == sum(len(x.images) for x in instances) and len(found.texts) == sum(len(x.captions) for x in instances)
    features()
    assert len(os.listdir(cache)) == 2 * (number + 1)


def test_frozen_features_of_a_changed_voxel_file(frozen, tmp_path):
    _, instances, _, cache, features = frozen
    path = tmp_path / "a.nrrd"

    def write(value):
        voxels = np.full((8, 8, 8, 4), value, np.uint8).tobytes()
        path.write_bytes(b"NRRD0004\ntype: uint8\ndimension: 4\nsizes: 4 8 8 8\nencoding: raw\n\n" + voxels)
        os.utime(path, (value, value))
    instances[0].images[:] = [data.VoxelView(str(path), 0)]
    write(200)
    features()
    write(90)
    data._voxels.cache_clear()
    features()
    assert len(os.listdir(cache)) == 4


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("by hand"), RuntimeError("out of memory")])
def test_interrupted_features_leave_nothing(frozen, side, error, monkeypatch):
    model, instances, _, cache, features = frozen
    instances[0].images += [instances[0].images[0]] * 128  # a batch holds 256 pictures and whole instances, or 256 captions: two batches and more
    instances[0].captions += ["many"] * 300
    name, calls = f"encode_{side}", []
    encode = getattr(model, name)

    def breaks(x):
        calls.append(len(x))
        if len(calls) == 2:
            raise error
        return encode(x)
    monkeypatch.setattr(model, name, breaks)
    with pytest.raises(type(error), match=str(error)):  # as it is: "cannot be written" would send one looking for space
        features()
    assert len(calls) == 2 and [p.name[-10:] for p in cache.iterdir()] == ([] if side == "image" else ["-image.npy"])
    monkeypatch.setattr(model, name, encode)
    whole = features()
    assert len(whole.images) == 9 + 128 and len(whole.texts) == 11 + 300 and len(os.listdir(cache)) == 2


@pytest.mark.parametrize("large", [1 << 28, 0])
def test_damaged_features_are_refused(frozen, large, monkeypatch):
    _, _, _, cache, features = frozen
    features()
    monkeypatch.setattr(eval, "LARGE", large)
    for kind in ("image", "text"):
        path = next(p for p in cache.iterdir() if p.name.endswith(f"-{kind}.npy"))
        whole = path.read_bytes()
        for damaged in (b"", whole[:7], whole[:60], whole[:128], whole[:-4], b"no such thing" * 50):
            path.write_bytes(damaged)
            with pytest.raises(data.DataError) as refused:
                features()
            assert f"{path}: damaged (" in str(refused.value) and "remove it, and it is computed again" in str(refused.value), len(damaged)
        path.unlink()
        features()
        assert path.read_bytes() == whole
