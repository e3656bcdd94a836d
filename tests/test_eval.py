"""Tests of eval.py: metrics against brute force, exact and bounded search, tables and galleries."""
import argparse
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
from runs import command


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def instance(id, group=None, captions=1, query=True):
    return data.Instance(id, ["x.png"], [f"{id} {k}" for k in range(captions)], {}, group, query)


# ---------------------------------------------------------------- metrics

def brute_force(scores, query_group, gallery_group, ks=(1, 5, 10)):
    """Every metric from its definition. Of equal scores an irrelevant item comes first."""
    rows = []
    for row, group in zip(scores.tolist(), query_group.tolist()):
        relevant = [g == group for g in gallery_group.tolist()]
        order = sorted(range(len(row)), key=lambda j: (-row[j], relevant[j]))
        hits = [relevant[j] for j in order]
        places = [p for p, hit in enumerate(hits, 1) if hit]
        metrics = {"MRR": 100 / places[0], "MeanR": places[0]}
        metrics["mAP"] = 100 * mean(sum(hits[:p]) / p for p in places)
        for k in ks:
            metrics[f"R@{k}"] = 100.0 * any(hits[:k])
            metrics[f"P@{k}"] = 100 * sum(hits[:k]) / k
            gain = sum(1 / math.log2(p + 1) for p in places if p <= k)
            ideal = sum(1 / math.log2(p + 1) for p in range(1, min(k, len(places)) + 1))
            metrics[f"NDCG@{k}"] = 100 * gain / ideal
        rows.append(metrics)
    out = {name: mean(metrics[name] for metrics in rows) for name in rows[0]}
    return out | {"MedR": np.median([metrics["MeanR"] for metrics in rows])}


def without_map(metrics):
    return pytest.approx({name: value for name, value in metrics.items() if name != "mAP"}, abs=1e-9)


def cases():
    for seed in range(3):
        groups = integers(6, 40, seed=seed)
        queries = groups[integers(40, 9, seed=seed + 50)]
        yield "random", (random(9, 40, seed=seed) * 1000).round() / 1000, queries, groups
        yield "tied", integers(4, 9, 40, seed=seed + 20).float(), queries, groups
    yield "negative constant", torch.full((9, 40), -1.0), queries, groups
    yield "even number of queries", integers(30, 8, 40, seed=8).float(), queries[:8], groups
    yield "one item", torch.tensor([[0.3], [-2.0]]), torch.tensor([5, 5]), torch.tensor([5])
    yield "gallery smaller than k", random(3, 3).round(), torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    yield "all relevant", random(2, 7).round(), torch.tensor([3, 3]), torch.full((7,), 3)
    many = torch.tensor([0] * 30 + [1] * 25 + [2] * 3)  # more than 16 relevant items: the branch that sorts
    yield "many relevant", integers(12, 6, 58, seed=3).float(), torch.tensor([0, 1, 2, 2, 1, 0]), many


@pytest.mark.parametrize("name, scores, queries, gallery", cases())
@pytest.mark.parametrize("ks", [(1, 5, 10), (3, 40)])
def test_metrics_equal_brute_force(name, scores, queries, gallery, ks, monkeypatch):
    expected = brute_force(scores, queries, gallery, ks)
    metrics = eval.ranking_metrics(scores, queries, gallery, ks, average_precision=True)
    assert metrics == pytest.approx(expected, abs=1e-9)
    for block in (1, 100, 1 << 22):  # one query at a time, a few, all
        monkeypatch.setattr(eval, "BLOCK", block)
        asked = []

        def rows(begin, end):
            asked.append(scores[begin:end].numel())
            return scores[begin:end]
        assert eval.ranking_metrics(rows, queries, gallery, ks) == without_map(expected)
        assert sum(asked) == scores.numel() and max(asked) <= max(block, scores.shape[1])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scores_and_groups_of_any_kind(kind):
    scores = integers(40, 6, 9).to(kind)
    gallery = torch.arange(9) % 6
    expected = eval.ranking_metrics(scores.float(), torch.arange(6), gallery)
    names = torch.tensor([-3, 2 ** 62, 0, -(2 ** 62), 10 ** 12, 7])
    huge = np.array([2 ** 64 - 1, 5, 0, 2 ** 63, 1, 9], np.uint64)
    for number in (torch.arange(6), names, names.tolist(), huge):
        groups = np.asarray(number)[gallery]
        assert eval.ranking_metrics(scores, number, groups) == expected


def first_places(scores, relevant):
    """The position of each query's best relevant item, where the same items (G,) are relevant to all."""
    place, _ = next(eval.ranks(scores, [1] * len(scores), relevant.long()))
    return place[:, 0].tolist()


def test_rounding_noise_is_a_tie():
    """Products of equal pictures differ in the last bits, which must not make a winner."""
    shown, other = F.normalize(random(2, 513, seed=4), dim=1)
    scores = torch.stack([shown, other]) @ torch.stack([shown] * 37).t()
    fifth = torch.arange(37) == 5
    for s in (scores, scores + 1e-7 * fifth):  # what a matrix product may do to any column
        assert first_places(s, fifth) == [37, 37]
        wide = torch.cat([s, s - 1], 1)  # the branch that sorts: 20 relevant, 17 others of the same score
        assert first_places(wide, torch.arange(74) < 20) == [18, 18]
    assert first_places(scores + 1e-4 * fifth, fifth) == [1, 1]


def test_nan_and_nothing_relevant_are_refused():
    groups = torch.arange(20) % 4
    scores = random(20, 20)
    scores[13, 2] = math.nan
    for average_precision in (False, True):
        with pytest.raises(ValueError, match="NaN"):
            eval.ranking_metrics(scores, groups, groups, average_precision=average_precision)
        with pytest.raises(ValueError, match="query 2 .*no relevant"):
            eval.ranking_metrics(random(4, 20), torch.tensor([0, 1, 9, 2]), groups, (1,), average_precision)
    gallery = random(9, 3)
    gallery[7, 1] = math.nan
    for k in (1, 20):
        with pytest.raises(ValueError, match="NaN"):
            eval.search(random(4, 3), gallery, k)


def test_layout_of_groups_and_distractors():
    at = eval.layout([instance("a", "g", 2), instance("b", None, 1, False), instance("c", "g", 3)])
    assert {name: values.tolist() for name, values in at.items()} == {
        "image_group": [0, 1, 0], "image_query": [True, False, True],
        "text_group": [0, 0, 1, 0, 0, 0], "text_query": [True, True, False, True, True, True]}
    distractors, _ = data.load("primitives", split="unseen")
    asked = eval.layout(distractors)["image_query"]
    assert asked.sum() == 252 and len(asked) == 756  # asked about 252, searched among all


def test_folds_are_the_mean_over_consecutive_parts():
    """Each with its own captions; of 11 instances in folds of 4 the last 3 are left out."""
    captions = [2, 1, 3, 1, 2, 2, 1, 4, 1, 2, 3]
    instances = [instance(str(i), f"g{i // 2}", n, query=i != 6) for i, n in enumerate(captions)]
    images, texts = F.normalize(random(11, 6), dim=1), F.normalize(random(sum(captions), 6, seed=1), dim=1)
    split = eval.Embedded(instances, images, texts, {})
    rows = eval.retrieval_rows("coco", split, fold=4)
    assert list(rows) == ["model", "model, 1K folds", "chance"]
    owner = torch.arange(11).repeat_interleave(torch.tensor(captions))
    parts = []
    for begin in (0, 4):
        fold = torch.arange(begin, begin + 4)
        of_texts = (owner >= begin) & (owner < begin + 4)
        fold_owner = owner[of_texts]
        scores = images[fold] @ texts[of_texts].t()
        asked, asked_texts = fold != 6, fold_owner != 6
        parts.append({
            "text_to_image": brute_force(scores.t()[asked_texts], fold_owner[asked_texts] // 2, fold // 2),
            "image_to_text": brute_force(scores[asked], fold[asked] // 2, fold_owner // 2)})
    rsum = 0
    for way in eval.WAYS:
        expected = {name: mean(part[way][name] for part in parts) for name in parts[0][way]}
        assert rows["model, 1K folds"][way] == without_map(expected)
        rsum += sum(expected[f"R@{k}"] for k in (1, 5, 10))
    assert rows["model, 1K folds"]["rSum"] == pytest.approx(rsum)
    assert rows["model"] == eval.retrieval_metrics(split.images, split.texts, **eval.layout(instances))
    assert rows["model"]["rSum"] != rows["model, 1K folds"]["rSum"]
    for name, fold in (("flickr30k", 4), ("coco", 11), ("coco", 1000)):  # other data, or no second fold
        assert list(eval.retrieval_rows(name, split, fold)) == ["model", "chance"]


# ---------------------------------------------------------------- several models, search

def embedded(seed, width, classes=None):
    """eval.Embedded of 7 instances, two of which are one group, with 1 to 3 captions."""
    instances = [instance(str(i), f"g{i // 2}", 1 + i % 3, i != 4) for i in range(7)]
    owner = eval.caption_owner(instances)
    images = F.normalize(random(7, width, seed=seed), dim=1)
    texts = F.normalize(random(len(owner), width, seed=seed + 50), dim=1)
    return eval.Embedded(instances, images, texts, {}, classes)


def test_videos_are_ranked_by_their_best_caption(monkeypatch):
    """MSVD's second row: video-to-text as its authors count it, each video once."""
    monkeypatch.setattr(eval, "BLOCK", 30)  # two videos with 13 captions
    split = embedded(1, 5)
    matrix = split.texts @ split.images.t()
    rows = eval.retrieval_rows("msvd", split)
    assert list(rows) == ["model", "model, by video", "chance"]
    owner = eval.caption_owner(split.instances)
    best = torch.tensor([[matrix[owner == other, video].max() for other in range(7)] for video in range(7)])
    group, asked = torch.arange(7) // 2, torch.arange(7) != 4
    row = rows["model, by video"]
    assert row["image_to_text"] == without_map(brute_force(best[asked], group[asked], group))
    assert row["image_to_text"] != rows["model"]["image_to_text"]
    assert row["text_to_image"] == rows["model"]["text_to_image"]
    assert row["rSum"] == pytest.approx(sum(row[way][f"R@{k}"] for way in eval.WAYS for k in (1, 5, 10)))
    args = argparse.Namespace(data="msvd", split="val", gallery=None)
    rows, text = eval.retrieval_evaluation(split, args, "mean of two")
    assert rows["mean of two, by video"] == row and "val mean of two, by video" in text


def test_models_of_other_things_are_not_averaged():
    part = embedded(1, 5, ["g0", "g1"])
    changed = [embedded(2, 5), embedded(2, 5, ["g0", "g2"])]
    for name, value in (("id", "another"), ("captions", ["another"]), ("group", "g9")):
        changed.append(embedded(2, 5, ["g0", "g1"]))
        setattr(changed[-1].instances[0], name, value)
    changed.append(embedded(2, 5, ["g0", "g1"]))
    changed[-1].instances.pop()
    for other in changed:
        with pytest.raises(clip.CheckpointError, match="do not rank the same instances"):
            eval.averaged([part, part, other])
    eval.averaged([part, embedded(2, 5, ["g0", "g1"])])


@pytest.mark.parametrize("high", [1000, 3])  # few ties, many
def test_search_equals_a_full_sort(high, monkeypatch):
    queries = integers(high, 6, 4).float()  # whole numbers: products are exact
    gallery = integers(high, 500, 4, seed=1).float()
    scores = queries @ gallery.t()
    order = torch.tensor([sorted(range(500), key=lambda j: (-row[j], j)) for row in scores.tolist()])
    for k in (1, 7, 500, 600):
        for block in (1, 2 * 500, 1 << 22):
            monkeypatch.setattr(eval, "BLOCK", block)
            best, index = eval.search(queries, gallery if block > 1 else gallery.split(7), k)
            assert torch.equal(index, order[:, :k]) and torch.equal(best, scores.gather(1, order[:, :k]))


MEMORY = '''
import resource
import torch
import eval

images, texts, group = torch.randn(5000, 64), torch.randn(25000, 64), torch.arange(5000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
eval.search(texts[:4000], texts, 10)
eval.retrieval_metrics(images, texts, group, group.repeat_interleave(5))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
'''


def test_memory_grows_with_the_block_alone():
    """Whole, the first has 1,200 MB of scores and their order, the second 500 MB of scores; about 150 to 350
    are taken, as the allocator gives memory back sooner or later."""
    assert int(command("-c", MEMORY).stdout) < 450e6


# ---------------------------------------------------------------- chance, ceiling, table

def test_chance_is_the_mean_over_all_orders():
    gallery, queries = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2])
    orders = torch.tensor(list(itertools.permutations(range(6)))).float()
    ks = (1, 3, 10)
    rows = [eval.ranking_metrics(order.expand(4, -1), queries, gallery, ks, True) for order in orders]
    expected = {name: mean(metrics[name] for metrics in rows) for name in rows[0]}
    first = sorted(place for q in queries for place in first_places(orders, gallery == q))
    expected["MedR"] = first[(len(first) - 1) // 2]
    assert eval.chance(queries, gallery, ks, average_precision=True) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("split", ["test", "unseen"])
def test_ceiling_is_relevant_over_fitting_and_chance_over_all(split):
    instances = data.load("primitives", split=split)[0][::6]
    at = eval.layout(instances)
    fits = data.primitives_oracle(instances) > 0
    relevant = at["text_group"][:, None] == at["image_group"][None]
    assert (fits | ~relevant).all()  # a caption fits what it describes
    expected = ((relevant.sum(1) / fits.sum(1))[at["text_query"]].mean() * 100).item()
    by_chance = ((relevant.sum(1) / len(instances))[at["text_query"]].mean() * 100).item()
    rows = eval.bounds("primitives", instances, draws=200)
    assert rows["chance"]["text_to_image"]["R@1"] == pytest.approx(by_chance)
    assert rows["ceiling"]["text_to_image"]["R@1"] == pytest.approx(expected, abs=0.7)
    assert rows["ceiling"]["image_to_text"]["R@1"] > rows["chance"]["image_to_text"]["R@1"] + 20


def test_table():
    names = ("R@1", "R@5", "R@10", "NDCG@5", "MRR", "MedR", "MeanR")
    metrics = dict(zip(names, (12.345, 50, 99.96, 7, 33.3, 1234, 1300.04)))
    rows = {"a model": {"text_to_image": metrics, "image_to_text": metrics | {"R@1": 0.0}},
            "chance": {"text_to_image": metrics, "image_to_text": metrics}}
    lines = eval.table(rows).split("\n")
    assert "text-to-image" in lines[0] and "image-to-text" in lines[0]
    assert lines[1].split() == ["R@1", "R@5", "R@10", "MRR", "MedR", "MnR"] * 2
    same = ["50.0", "100.0", "33.3", "1234.0", "1300.0"]
    assert lines[2].split() == ["a", "model", "12.3", *same, "0.0", *same]
    assert len({len(line) for line in lines[1:]}) == 1  # columns stand under their heads
    lines = eval.table(rows, shapes=True).split("\n")
    assert "text-to-shape" in lines[0] and lines[1].split()[:5] == ["RR@1", "RR@5", "NDCG@5", "MRR", "MedR"]


# ---------------------------------------------------------------- galleries and curves

def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for run in runs:  # of three epochs, one of them evaluated; the last line is cut
        rows = [{"step": 100, "loss": 1}, {"step": 200, "loss": 0.5, "score": 30, "val": {}},
                {"step": 300, "loss": 0.3}]
        os.mkdir(run)
        with open(f"{run}/log.jsonl", "w") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 400, "lo')
    eval.main(["--curves", *runs, "--out", str(tmp_path / "new" / "curves.png")])
    assert np.asarray(Image.open(tmp_path / "new" / "curves.png")).std() > 1
    with pytest.raises(data.DataError, match="c/log.jsonl: "):
        eval.draw_curves(tmp_path / "curves.png", [*runs, tmp_path / "c"])


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(clip.CheckpointError, match="pip install matplotlib"):
        eval.draw_curves(tmp_path / "curves.png", [])


def test_gallery_frames_and_captions(tmp_path):
    blue = np.full((eval.CELL, eval.CELL, 3), (0, 0, 255), np.uint8)
    long = "a very long caption that goes on and on about nothing at all, " * 9 + "W" * 300
    path = tmp_path / "new" / "gallery.png"
    eval.gallery_picture(path, [(blue, [("right", True), (blue, False), ("unknown", None)]),
                                (long, [(blue, True), (long, False)])])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and os.listdir(tmp_path / "new") == ["gallery.png"]
    picture = np.asarray(Image.open(path)).astype(int)
    cell = eval.CELL + 16

    def frame(row, column):  # the colour halfway down the left edge of a result, two pixels into its frame
        return tuple(picture[8 + row * (cell + 8) + cell // 2, (column + 1) * cell + 8 + 2])
    assert [frame(0, 0), frame(0, 1), frame(1, 0), frame(1, 1)] == [eval.GREEN, eval.RED] * 2
    assert frame(0, 2) not in (eval.GREEN, eval.RED)
    assert (picture == (0, 0, 255)).all(2).sum() == 3 * eval.CELL ** 2  # no frame or text covers a picture
    black = (picture < 60).all(2)
    query = black[8 + cell + 8:8 + 2 * cell + 8, 8:cell + 2]
    assert query.any(1).sum() > 50  # the long caption is broken into lines that keep to their cell:
    assert not black[8 + 2 * cell + 8:].any()  # not below it,
    assert not black[8 + cell + 8:, 8 + 3 * cell - 9:].any()  # not over the frame of a result nor beyond it,
    assert not black[8 + cell + 8:, cell + 2:cell + 12].any()  # not between the query and the first result


def test_draw_gallery_marks_what_is_relevant(tmp_path, monkeypatch):
    instances = []
    for i in range(6):  # pairs of three groups
        path = str(tmp_path / f"{i}.png")
        Image.new("RGB", (20, 30), (40 * i, 90, 90)).save(path)
        instances.append(data.Instance(str(i), [path], [f"caption {i}"], {}, f"g{i // 2}", query=i < 4))
    features = torch.eye(3)[[0, 0, 1, 1, 2, 0]]  # the last one looks like group 0
    drawn = []
    monkeypatch.setattr(eval, "gallery_picture", lambda path, rows: drawn.extend(rows))

    eval.draw_gallery("x.png", instances, eval.cosine_scores(features, features), top=3)
    texts, images = drawn[:4], drawn[4:]  # distractors are not asked about
    assert sorted(query for query, _ in texts) == [f"caption {i}" for i in range(4)] and len(images) == 4
    for query, results in texts:  # a query's own group, then the impostor or, of equal scores, the first
        assert [right for _, right in results] == [True, True, False]
        assert results[0][0].shape == (eval.CELL, eval.CELL, 3)
    for query, results in images:
        assert query.shape == (eval.CELL, eval.CELL, 3)
        assert results[0][1] and isinstance(results[0][0], str)
