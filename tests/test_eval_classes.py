"""Tests of eval.py for methods that learn from classes: metrics against loops over their definitions,
attention pictures, and the features of a frozen CLIP that are computed once.
"""
import math
import os
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import clip
import data
import eval
import test_eval
from test_data import picture
from test_eval import integers, mean, random


# ---------------------------------------------------------------- retrieval by class

def places(row, label, gallery):
    """Where the relevant items stand; of equal scores the irrelevant ones come first."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], gallery[j] == label))
    return [p for p, j in enumerate(order, 1) if gallery[j] == label]


def average_precision(positions):
    return mean(up_to_it / p for up_to_it, p in enumerate(positions, 1))


def best_precision(positions, recall):
    """The highest precision at this recall or higher."""
    return max(n / p for n, p in enumerate(positions, 1) if n >= recall * len(positions))


def class_metrics(scores, query_label, gallery, classes):
    """Every number of eval.class_metrics from its definition, one query and one item at a time."""
    ranks = [places(row, label, gallery) for row, label in zip(scores, query_label)]
    scopes = [k for k in (1, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= len(gallery)]
    at_scope = [100 * mean(sum(p <= k for p in positions) / k for positions in ranks) for k in scopes]
    at_recall = [100 * mean(best_precision(positions, Fraction(tenth, 10)) for positions in ranks)
                 for tenth in range(11)]
    per_class = {}
    for c, name in enumerate(classes):
        if c in query_label:
            of_class = [positions for positions, label in zip(ranks, query_label) if label == c]
            per_class[name] = 100 * mean(map(average_precision, of_class))
    return {"mAP": 100 * mean(map(average_precision, ranks)),
            **{f"P@{k}": precision for k, precision in zip(scopes, at_scope)},
            "per_class": per_class,
            "precision_recall": {"recall": [10 * tenth for tenth in range(11)], "precision": at_recall},
            "precision_scope": {"scope": scopes, "precision": at_scope}}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        else:
            assert found[key] == pytest.approx(value, abs=1e-9), key


CLASSES = [f"class {c}" for c in range(6)]  # of "uneven", 4 has no query, 5 neither query nor item


def cases():
    yield from test_eval.cases()
    # both ways of finding positions, and unlike counts in a block
    uneven = torch.tensor([0] * 60 + [1] * 25 + [2] * 3 + [3] + [4] * 11)
    rare = torch.tensor([2, 3, 3, 2, 2, 3, 2])
    yield "uneven", integers(12, 12, 100, seed=3).float(), torch.arange(12) % 4, uneven
    yield "only rare queries", integers(12, 7, 100, seed=4).float(), rare, uneven
    many = integers(5, 1003, seed=6)
    yield "longer than every scope", integers(50, 4, 1003, seed=5).float(), torch.arange(4), many


@pytest.mark.parametrize("name, scores, queries, gallery", cases())
def test_class_metrics(name, scores, queries, gallery, monkeypatch):
    expected = class_metrics(scores.tolist(), queries.tolist(), gallery.tolist(), CLASSES)
    assert_equal(eval.class_metrics(scores, queries, gallery, CLASSES), expected)
    for block in (1, 250):  # one query at a time, a few
        monkeypatch.setattr(eval, "BLOCK", block)
        asked = []

        def rows(begin, end):
            asked.append(scores[begin:end].numel())
            return scores[begin:end]
        assert_equal(eval.class_metrics(rows, queries.numpy(), gallery.numpy(), CLASSES), expected)
        assert sum(asked) == scores.numel() and max(asked) <= max(block, len(gallery))


@pytest.mark.parametrize("block", [1, 30, 1 << 22])
def test_class_retrieval_with_captions_and_distractors(block, monkeypatch):
    monkeypatch.setattr(eval, "BLOCK", block)
    captions = torch.tensor([1, 3, 2, 1, 1, 4, 2, 1, 1, 2])
    query = torch.tensor([True, True, False, True, False, True, True, False, True, True])
    labels = torch.tensor([0, 1, 1, 3, 3, 0, 1, 0, 3, 3])  # class 2 has nothing
    images = integers(5, 10, 5).float() - 2  # whole numbers: products are exact, and often equal
    texts = integers(5, 18, 5, seed=1).float() - 2
    arguments = eval.cosine_scores(images, texts), labels.numpy(), captions.numpy(), query.numpy()
    by_model = partial(eval.class_metrics, classes=CLASSES)
    text_labels, text_query = labels.repeat_interleave(captions), query.repeat_interleave(captions)
    scores = images @ texts.t()
    to_text = (scores[query], labels[query], text_labels)
    to_image = (scores.t()[text_query], text_labels[text_query], labels)
    model, chance = {}, {}
    for way, (rows, asked, gallery) in {"image_to_text": to_text, "text_to_image": to_image}.items():
        model[way] = class_metrics(rows.tolist(), asked.tolist(), gallery.tolist(), CLASSES)
        chance[way] = {"mAP": eval.chance(asked, gallery, average_precision=True)["mAP"]}
    for metrics, row in ((by_model, model), (eval.class_chance, chance)):
        row["mAP"] = mean(row[way]["mAP"] for way in eval.WAYS)
        assert_equal(eval.class_retrieval(metrics, *arguments), row)


# ---------------------------------------------------------------- classification

def predicted_class(p, label):
    """The most probable class; one that is as probable as the right one is what is predicted."""
    others = [c for c in range(len(p)) if c != label]
    if all(p[label] > p[c] for c in others):
        return label
    return max(others, key=lambda c: p[c])


def classification_metrics(rows, thresholds):
    """eval.classification_metrics from its definition. rows: [(probabilities, label)]."""
    rows = [(p, label) for p, label in rows if label >= 0]
    if not rows:
        return None
    pairs = [(label, predicted_class(p, label)) for p, label in rows]
    f1, recall, above = [], [], []
    for c, threshold in enumerate(thresholds):
        tp = pairs.count((c, c))
        fn = sum(label == c for label, _ in pairs) - tp
        fp = sum(guess == c for _, guess in pairs) - tp
        if tp + fp + fn:
            f1.append(2 * tp / (2 * tp + fp + fn))
        of_class = [label == c for p, label in rows if p[c] >= threshold]
        above += of_class
        if tp + fn:
            recall.append(sum(of_class) / (tp + fn))
    return {"accuracy": 100 * mean(label == guess for label, guess in pairs), "macro_f1": 100 * mean(f1),
            "recall_at_precision": 100 * mean(recall), "precision": 100 * mean(above) if above else 0.0}


def precision_thresholds(rows, C, precision):
    """eval.precision_thresholds from its definition, in exact arithmetic."""
    rows = [(p, label) for p, label in rows if label >= 0]
    out = []
    for c in range(C):
        reached = [math.inf]
        for threshold in {p[c] for p, _ in rows}:
            above = [label == c for p, label in rows if p[c] >= threshold]
            if Fraction(sum(above), len(above)) >= Fraction(str(precision)):
                reached.append(threshold)
        out.append(min(reached))
    return out


def predictions():
    for seed in range(4):
        labels = integers(5, 40, seed=seed) - 1  # class 4 has no row
        yield "random", random(40, 5, seed=seed).softmax(1), labels
        yield "tied", integers(4, 40, 5, seed=seed) / 8, labels
        yield "one row", integers(3, 1, 3, seed=seed) / 4, torch.tensor([seed - 1])
    yield "constant", torch.full((9, 3), 1 / 3), torch.arange(9) % 3
    yield "two classes", random(30, 2, seed=9).softmax(1), integers(2, 30, seed=9)
    yield "one class", torch.ones(5, 1), torch.tensor([0, -1, 0, 0, -1])
    yield "nothing labelled", random(5, 3).softmax(1), torch.full((5,), -1)
    yield "no rows", torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    yield "in double", random(40, 5, seed=7).double().softmax(1), integers(6, 40, seed=7) - 1


@pytest.mark.parametrize("name, probabilities, labels", predictions())
def test_classification_metrics_and_thresholds(name, probabilities, labels):
    C = probabilities.shape[1]
    other = integers(C + 1, len(labels), seed=5) - 1  # thresholds come from other data than they are used on
    for precision in (0.3, 0.5, 0.6, 0.9, 1.0):
        thresholds = eval.precision_thresholds(probabilities, labels, precision)
        rows = list(zip(probabilities.tolist(), labels.tolist()))
        assert thresholds.dtype == probabilities.dtype
        assert thresholds.tolist() == precision_thresholds(rows, C, precision)
        for used in (labels, other):
            rows = list(zip(probabilities.tolist(), used.tolist()))
            expected = classification_metrics(rows, thresholds.tolist())
            without = eval.classification_metrics(probabilities, used)
            with_thresholds = eval.classification_metrics(probabilities, used, thresholds)
            if expected is None:
                assert with_thresholds is None and without is None
                continue
            assert with_thresholds == pytest.approx(expected, abs=1e-9)
            assert without == {name: with_thresholds[name] for name in ("accuracy", "macro_f1")}


@pytest.mark.parametrize("precision, right, rows", [(0.6, 3, 5), (0.6, 27, 45), (0.7, 21, 30), (0.9, 18, 20)])
def test_a_precision_that_is_met_exactly(precision, right, rows):
    """The wrong rows come first, so that only all rows together meet it; one right row less does not."""
    value = torch.linspace(0.9, 0.1, rows)
    probabilities = torch.stack([value, 1 - value], 1)
    labels = torch.tensor([1] * (rows - right) + [0] * right)
    assert eval.precision_thresholds(probabilities, labels, precision)[0] == value[-1]
    assert eval.precision_thresholds(probabilities[:-1], labels[:-1], precision)[0] == math.inf


@pytest.mark.parametrize("row", [0, 5])  # a labelled row, and one that is not
def test_nan_predictions_are_refused(row):
    probabilities, labels = random(6, 3).softmax(1), torch.tensor([2, 1, 0, 1, 2, -1])
    probabilities[row, 1] = math.nan
    with pytest.raises(clip.CheckpointError, match="NaN"):
        eval.classification_metrics(probabilities, labels)


# ---------------------------------------------------------------- attention pictures

def test_a_picture_is_red_where_a_word_looks():
    blue = np.full((eval.CELL, eval.CELL, 3), (0, 0, 250), np.uint8)

    def redness(weight):  # (4, 4), of the centre of each patch, where one patch has this weight
        weights = np.full((4, 4), (1 - weight) / 15, np.float32)
        weights[1, 3] = weight
        picture = eval.heat_picture(blue, "word", weights, 0.9).astype(int)
        at = np.arange(4) * 32 + 16
        pixels = picture[at][:, at]
        return pixels[..., 0] - pixels[..., 1:].max(-1)
    even = redness(1 / 16)
    assert (even == even[0, 0]).all()
    red = 0.85 * (eval.RED[0] - max(eval.RED[1:]))
    for weight in (0.9, 0.3):
        strength = (weight - 1 / 16) / (0.9 - 1 / 16)
        found = redness(weight)
        assert found[1, 3] == pytest.approx(strength * red + (1 - 0.85 * strength) * even[0, 0], abs=4)
        assert (np.delete(found.flatten(), 7) == even[0, 0]).all()
    words = [eval.heat_picture(blue, word, np.full((4, 4), 1 / 16), 0.5) for word in ("red", "blue")]
    assert (words[0] != words[1]).any(2).sum() > 20


# ---------------------------------------------------------------- features of a frozen CLIP

@pytest.fixture
def frozen(tmp_path):
    """(model, instances with 1 to 3 views and captions, cache folder, call of eval.frozen_features)."""
    instances = []
    for i in range(5):
        files = [picture(tmp_path / f"{i}-{k}.png", 10 * i + k, (32, 32)) for k in range(1 + i % 3)]
        captions = [f"thing {i} said {k} times" for k in range(1 + (i + 1) % 3)]
        instances.append(data.Instance(f"id{i}", files, captions, {}, "ab"[i % 2], query=i != 3))
    tokenizer = clip.Tokenizer.train([c for x in instances for c in x.captions], 530)
    model, cache = clip.build("tiny", tokenizer).eval(), tmp_path / "cache"

    def features():
        return eval.frozen_features(model, instances, ["a", "b"], str(cache), "off")
    return model, instances, cache, features


def test_frozen_features_are_the_models(frozen):
    model, instances, _, features = frozen
    found = features()
    pictures = torch.from_numpy(np.stack([data.pixels(file, 32) for x in instances for file in x.images]))
    mean_, std = (torch.tensor(x).view(3, 1, 1) for x in (clip.IMAGE_MEAN, clip.IMAGE_STD))
    captions = [c for x in instances for c in x.captions]
    with torch.no_grad():
        images = model.encode_image((pictures.permute(0, 3, 1, 2) / 255 - mean_) / std)
        texts = torch.cat([model.encode_text(model.tokenizer([c], model.context_length)) for c in captions])
    for array, expected in ((found.images, images), (found.texts, texts)):
        assert array.dtype == np.float32 and array.shape == expected.shape
        assert np.abs(array - expected.numpy()).max() < 1e-5 * expected.abs().max()
        assert expected.std(0).min() > 1e-3  # rows differ
    assert found.views.tolist() == [1, 2, 3, 1, 2] and found.captions.tolist() == [2, 3, 1, 2, 3]
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.query.tolist() == [True, True, True, False, True]
    assert found.layout == (found.labels, found.captions, found.query)


def change_weights(model, instances):
    with torch.no_grad():
        model.ln_final.bias[0] += 1e-3


@pytest.mark.parametrize("change", [
    change_weights,
    lambda model, instances: instances[2].captions.__setitem__(0, "thing 2 said 9 times"),
    lambda model, instances: instances[0].captions.append("one more"),
    lambda model, instances: picture(instances[4].images[1], 99),  # a file of another size
    lambda model, instances: os.utime(instances[4].images[1], (1, 1)),  # of the same size, at another time
    lambda model, instances: instances[0].images.append(instances[4].images[1]),
    lambda model, instances: instances.reverse()],
    ids=["weights", "caption", "captions", "size", "time", "images", "order"])
def test_frozen_features_are_computed_once_for_what_has_not_changed(frozen, change, monkeypatch):
    model, instances, cache, features = frozen
    found = features()
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_image", None)
        patch.setattr(model, "encode_text", None)
        again = features()
        assert all(np.array_equal(value, getattr(again, key)) for key, value in vars(found).items())
    assert len(os.listdir(cache)) == 2
    change(model, instances)
    found = features()
    assert len(os.listdir(cache)) == 4
    assert len(found.images) == sum(len(x.images) for x in instances)
    assert len(found.texts) == sum(len(x.captions) for x in instances)


def test_features_of_voxels_change_with_their_file(frozen, tmp_path):
    model, instances, _, _ = frozen
    path = tmp_path / "a.nrrd"
    path.write_text("voxels")
    instances[0].images[:] = [data.VoxelView(str(path), 0)]
    before = eval.fingerprint(model, instances, "off")
    assert eval.fingerprint(model, instances, "off") == before
    os.utime(path, (1, 1))
    assert eval.fingerprint(model, instances, "off") != before


@pytest.mark.parametrize("kind", ["image", "text"])
def test_damaged_features_are_refused(frozen, kind):
    _, _, cache, features = frozen
    features()
    path = next(p for p in cache.iterdir() if p.name.endswith(f"-{kind}.npy"))
    content = path.read_bytes()
    for damaged in (b"", content[:60], content[:-4], b"no such thing" * 50):
        path.write_bytes(damaged)
        with pytest.raises(clip.CheckpointError) as refused:
            features()
        assert str(refused.value).startswith(f"{path}: ")
        assert "remove it, and it is computed again" in str(refused.value)
    path.unlink()
    features()
    assert path.read_bytes() == content
