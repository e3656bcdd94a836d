"""Tests of eval.py: metrics against brute force, exact and bounded search, and what scripts share around their loops.

    python -m pytest tests/test_eval.py
"""
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- metrics

def brute_force(scores, query_group, gallery_group, ks):
    """Every metric from the definition: sort each query's gallery, an irrelevant item before a relevant one of the same score."""
    rows = []
    for row, group in zip(scores.tolist(), query_group.tolist()):
        relevant = [g == group for g in gallery_group.tolist()]
        order = sorted(range(len(row)), key=lambda j: (-row[j], relevant[j]))
        hits = [relevant[j] for j in order]
        places = [p for p, hit in enumerate(hits, 1) if hit]
        one = {"MRR": 100 / places[0], "first": places[0], "mAP": 100 * sum(sum(hits[:p]) / p for p in places) / len(places)}
        for k in ks:
            ideal = sum(1 / math.log2(p + 1) for p in range(1, min(k, len(places)) + 1))
            one |= {f"R@{k}": 100.0 * any(hits[:k]), f"P@{k}": 100 * sum(hits[:k]) / k,
                    f"NDCG@{k}": 100 * sum(1 / math.log2(p + 1) for p, hit in enumerate(hits[:k], 1) if hit) / ideal}
        rows.append(one)
    out = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    first = sorted(r["first"] for r in rows)
    return out | {"MeanR": out.pop("first"), "MedR": (first[(len(first) - 1) // 2] + first[len(first) // 2]) / 2}


def cases():
    for seed in range(3):
        groups = integers(6, 40, seed=seed)
        queries = groups[integers(40, 9, seed=seed + 50)]
        yield "random", (random(9, 40, seed=seed) * 1000).round() / 1000, queries, groups
        yield "tied", integers(4, 9, 40, seed=seed + 20).float(), queries, groups
    yield "constant", torch.full((9, 40), 0.25), queries, groups
    yield "negative constant", torch.full((9, 40), -1.0), queries, groups
    yield "duplicates", integers(9, 9, 10, seed=7).float().repeat(1, 4), queries, groups
    yield "even number of queries", integers(30, 8, 40, seed=8).float(), queries[:8], groups
    yield "one item", torch.tensor([[0.3], [-2.0]]), torch.tensor([5, 5]), torch.tensor([5])
    yield "one relevant of few", random(3, 3).round(), torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])  # gallery smaller than k
    yield "all relevant", random(2, 7).round(), torch.tensor([3, 3]), torch.full((7,), 3)
    many = torch.tensor([0] * 30 + [1] * 25 + [2] * 3)  # more than 16 relevant items: the branch that sorts
    yield "many relevant", integers(12, 6, 58, seed=3).float(), torch.tensor([0, 1, 2, 2, 1, 0]), many


@pytest.mark.parametrize("name, scores, queries, gallery", cases())
@pytest.mark.parametrize("ks", [(1, 5, 10), (3, 40)])
def test_metrics_equal_brute_force(name, scores, queries, gallery, ks, monkeypatch):
    expected = brute_force(scores, queries, gallery, ks)
    found = eval.ranking_metrics(scores, queries, gallery, ks, average_precision=True)
    assert found == pytest.approx(expected, abs=1e-9)
    expected.pop("mAP")
    for block in (1, 100, 1 << 22):  # one query at a time, a few, all
        monkeypatch.setattr(eval, "BLOCK", block)
        asked = []
        function = lambda begin, end: asked.append(scores[begin:end].numel()) or scores[begin:end]
        assert eval.ranking_metrics(function, queries, gallery, ks) == pytest.approx(expected, abs=1e-9)
        assert sum(asked) == scores.numel() and max(asked) <= max(block, scores.shape[1])


def test_both_ways_of_finding_positions_agree():
    relevant = integers(3, 7, 60, seed=1) == 0
    for scores in (random(7, 60), integers(5, 7, 60).float(), torch.zeros(7, 60)):
        for s in (scores, scores.double()):
            counted = torch.cat([eval.positions(s[:, :], relevant, 16)], 1)
            sorted_ = eval.positions(s, relevant)
            assert relevant.sum(1).max() > 16 and torch.equal(sorted_[:, :16], counted)
            assert torch.equal(sorted_.isfinite().sum(1), relevant.sum(1))


def test_a_constant_model_earns_nothing():
    groups = torch.arange(50)
    for images in (torch.ones(50, 8) / 8 ** 0.5, F.normalize(random(1, 8)).expand(50, 8)):
        found = eval.retrieval_metrics(images, images, groups, groups)
        for way in ("text_to_image", "image_to_text"):
            assert found[way]["MedR"] == found[way]["MeanR"] == 50 and found[way]["MRR"] == pytest.approx(2)
            assert all(found[way][f"{m}@{k}"] == 0 for m in ("R", "P", "NDCG") for k in (1, 5, 10))
        assert found["rSum"] == 0


def test_rounding_noise_is_a_tie():
    """The same picture many times among the images: products of equal rows differ in the last bits, which must not make a winner."""
    one, other = F.normalize(random(2, 513, seed=4), dim=1)
    texts, images = torch.stack([one, other]), torch.stack([one] * 37)
    scores = texts @ images.t()
    noisy = scores + 1e-7 * (torch.arange(37) == 5)  # what a matrix product may do to any column
    for s in (scores, noisy):
        assert eval.positions(s, torch.arange(37)[None] == torch.tensor([[5], [5]])).tolist() == [[37], [37]]
        wide = torch.cat([s, s - 1], 1)  # the branch that sorts: 20 relevant, 17 others of the same score
        assert eval.positions(wide, (torch.arange(74) < 20).expand(2, -1))[:, 0].tolist() == [18, 18]
    assert eval.positions(scores + 1e-4 * (torch.arange(37) == 5), torch.arange(37)[None] == torch.tensor([[5], [5]])).tolist() == [[1], [1]]


def test_nan_and_nothing_relevant_are_refused():
    groups = torch.arange(20) % 4
    for average_precision in (False, True):
        scores = random(20, 20)
        scores[13, 2] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            eval.ranking_metrics(scores, groups, groups, average_precision=average_precision)
        with pytest.raises(ValueError, match="query 2 .*no relevant"):
            eval.ranking_metrics(random(4, 20), torch.tensor([0, 1, 9, 2]), groups, average_precision=average_precision)
    gallery = random(9, 3)
    gallery[7, 1] = math.nan
    for k in (1, 20):
        with pytest.raises(ValueError, match="NaN"):
            eval.search(random(4, 3), gallery, k)


def test_retrieval_metrics_both_ways_and_distractors():
    images, texts = F.normalize(random(12, 5), dim=1), F.normalize(random(30, 5, seed=1), dim=1)
    image_group, text_group = torch.arange(12) // 2, torch.arange(30) % 6
    image_query, text_query = torch.arange(12) % 3 > 0, text_group != 4
    found = eval.retrieval_metrics(images, texts, image_group, text_group, image_query, text_query)
    ways = {"text_to_image": brute_force((texts @ images.t())[text_query], text_group[text_query], image_group, (1, 5, 10)),
            "image_to_text": brute_force((images @ texts.t())[image_query], image_group[image_query], text_group, (1, 5, 10))}
    for way, expected in ways.items():
        expected.pop("mAP")
        assert found[way] == pytest.approx(expected, abs=1e-9)
    assert found["rSum"] == pytest.approx(sum(ways[w][f"R@{k}"] for w in ways for k in (1, 5, 10)))


def instance(id, group=None, captions=1, query=True):
    return data.Instance(id, ["x.png"], [f"{id} {k}" for k in range(captions)], {}, group, query)


def test_layout_of_groups_and_distractors():
    at = eval.layout([instance("a", "g", 2), instance("b", None, 1, False), instance("c", "g", 3)])
    assert at["image_group"].tolist() == [0, 1, 0] and at["text_group"].tolist() == [0, 0, 1, 0, 0, 0]
    assert at["image_query"].tolist() == [True, False, True] and at["text_query"].tolist() == [True, True, False, True, True, True]
    distractors, _ = data.load("primitives", split="unseen")
    at = eval.layout(distractors)
    assert at["image_query"].sum() == 252 and len(at["image_query"]) == 756  # asked about 252, searched among all


# ---------------------------------------------------------------- search

@pytest.mark.parametrize("high", [1000, 3, 1])  # few ties, many, nothing but ties
def test_search_equals_a_full_sort(high, monkeypatch):
    queries, gallery = integers(high, 6, 4).float(), integers(high, 500, 4, seed=1).float()  # whole numbers: products are exact
    scores = queries @ gallery.t()
    order = [sorted(range(500), key=lambda j: (-row[j], j)) for row in scores.tolist()]
    for k in (1, 7, 500, 600):
        expected = torch.tensor([o[:k] for o in order])
        for block in (1, 6 * 50, 1 << 22):
            monkeypatch.setattr(eval, "BLOCK", block)
            for given in (gallery, gallery.split(33), iter(gallery.split(1)), [gallery[:490], gallery[490:490], gallery[490:]]):
                best, index = eval.search(queries, given, k)
                assert torch.equal(index, expected) and torch.equal(best, scores.gather(1, expected))


MEMORY = '''
import sys, torch
sys.path.insert(0, ".")
import eval
torch.set_num_threads(1)
def read(name):  # not getrusage, whose peak starts at that of the process which started this one
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
now, peak = lambda: read("VmRSS"), lambda: read("VmHWM")
queries = torch.randn(1000, 16)
eval.search(queries, torch.randn(50, 16), 10)  # what is loaded on first use
before = now()
best, index = eval.search(queries, (torch.randn(8192, 16) for _ in range(123)), 10)
assert index.shape == (1000, 10) and index.max() > 900_000
print(peak() - before)
group = torch.arange(5000)
images, texts = torch.randn(5000, 512), torch.randn(25000, 512)
before = now()
metrics = eval.retrieval_metrics(images, texts, group, group.repeat_interleave(5))
assert 1500 < metrics["text_to_image"]["MedR"] < 3500
print(peak() - before)
'''


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_grows_with_the_block_alone():
    """1,000 queries in 1,007,616 streamed rows under 300 MiB; COCO's 25,000 captions x 5,000 images x 512 under 1 GiB; above the inputs."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    search, retrieval = map(int, done.stdout.split())
    assert search < 300 << 20 and 0 < retrieval < 1 << 30, (search >> 20, retrieval >> 20)


# ---------------------------------------------------------------- chance and ceiling

def test_chance_is_the_mean_over_all_orders():
    from itertools import permutations
    gallery, queries = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2])
    orders = torch.tensor(list(permutations(range(6)))).float()
    ks = (1, 3, 10)
    every = [eval.ranking_metrics(order.expand(4, -1), queries, gallery, ks) for order in orders]
    expected = {m: sum(e[m] for e in every) / len(every) for m in every[0] if m != "MedR"}
    found = eval.chance(queries, gallery, ks)
    first = torch.cat([eval.positions(orders, (gallery == q).expand(720, -1))[:, 0] for q in queries])
    assert found.pop("MedR") == first.sort().values[(len(first) - 1) // 2]
    assert found == pytest.approx(expected, abs=1e-9)


def test_chance_of_a_data_set():
    instances = [instance(str(i), captions=1 + i % 3) for i in range(30)] + [instance(f"far{i}", captions=2, query=False) for i in range(20)]
    found = eval.bounds("mine.jsonl", instances)
    assert list(found) == ["chance"]
    assert found["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 50)  # one relevant image among 50
    assert found["chance"]["image_to_text"]["R@1"] == pytest.approx(100 * 2 / 100)  # two captions on average among 60 + 40
    assert found["chance"]["text_to_image"]["MeanR"] == pytest.approx(51 / 2)
    assert found["chance"]["text_to_image"]["R@10"] == pytest.approx(20)


@pytest.mark.parametrize("split", ["test", "unseen"])
def test_ceiling_is_relevant_over_fitting(split):
    instances = data.load("primitives", split=split)[0][::6]
    at = eval.layout(instances)
    fits = data.primitives_oracle(instances) > 0
    relevant = at["text_group"][:, None] == at["image_group"][None]
    assert (fits | ~relevant).all()  # a caption fits what it describes
    expected = ((relevant.sum(1) / fits.sum(1))[at["text_query"]].mean() * 100).item()
    ceiling = eval.bounds("primitives", instances, draws=200)["ceiling"]
    assert ceiling["text_to_image"]["R@1"] == pytest.approx(expected, abs=0.7)
    assert ceiling["image_to_text"]["R@1"] > eval.bounds("primitives", instances, draws=2)["chance"]["image_to_text"]["R@1"] + 20


def test_table():
    metrics = {m: v for m, v in zip(("R@1", "R@5", "R@10", "NDCG@5", "MRR", "MedR"), (12.345, 50, 99.96, 7, 33.3, 1234))}
    rows = {"a model": {"text_to_image": metrics, "image_to_text": metrics | {"R@1": 0.0}}, "chance": {"text_to_image": metrics, "image_to_text": metrics}}
    text = eval.table(rows)
    lines = text.split("\n")
    assert "text-to-image" in lines[0] and "image-to-text" in lines[0] and lines[1].split() == ["R@1", "R@5", "R@10", "MRR", "MedR"] * 2
    assert lines[2].split() == ["a", "model", "12.3", "50.0", "100.0", "33.3", "1234.0", "0.0", "50.0", "100.0", "33.3", "1234.0"]
    assert len({len(line) for line in lines[1:]}) == 1  # columns stand under their heads
    shapes = eval.table(rows, shapes=True).split("\n")
    assert "text-to-shape" in shapes[0] and shapes[1].split()[:5] == ["RR@1", "RR@5", "NDCG@5", "MRR", "MedR"]


# ---------------------------------------------------------------- pictures

def test_gallery_frames_and_captions(tmp_path):
    blue = np.full((eval.CELL, eval.CELL, 3), (0, 0, 255), np.uint8)
    long = "a very long caption that goes on and on about nothing at all, " * 9 + "W" * 300
    path = tmp_path / "new" / "gallery.png"
    eval.gallery_picture(path, [(blue, [("right", True), (blue, False), ("unknown", None)]), (long, [(blue, True), (long, False)])])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and os.listdir(tmp_path / "new") == ["gallery.png"]
    picture = np.asarray(Image.open(path)).astype(int)
    cell = eval.CELL + 16

    def frame(row, column):  # the colour halfway down the left edge of a result, two pixels into its frame
        return tuple(picture[8 + row * (cell + 8) + cell // 2, (column + 1) * cell + 8 + 2])
    assert [frame(0, 0), frame(0, 1), frame(1, 0), frame(1, 1)] == [eval.GREEN, eval.RED, eval.GREEN, eval.RED]
    assert frame(0, 2) not in (eval.GREEN, eval.RED)
    assert (picture == (0, 0, 255)).all(2).sum() == 3 * eval.CELL ** 2  # no frame or text covers a picture
    black = (picture < 60).all(2)
    query = black[8 + cell + 8:8 + 2 * cell + 8, 8:cell + 2]  # the long caption is broken into lines that keep to their cell
    assert query.any(1).sum() > 50 and not black[8 + 2 * cell + 8:].any()
    right_of_red = black[8 + cell + 8:, 8 + 3 * cell - 9:]  # neither over the frame nor beyond it
    assert not right_of_red.any() and not black[8 + cell + 8:, cell + 2:cell + 12].any()


def test_draw_gallery_marks_what_is_relevant(tmp_path, monkeypatch):
    instances, features = [], []
    for i in range(6):  # unit features of three groups; the last instance looks like another group
        Image.new("RGB", (20, 30), (40 * i, 90, 90)).save(tmp_path / f"{i}.png")
        instances.append(data.Instance(str(i), [str(tmp_path / f"{i}.png")], [f"caption {i}"], {}, f"g{i // 2}", query=i < 4))
        features.append(torch.eye(3)[i // 2 if i < 5 else 0])
    drawn = []
    monkeypatch.setattr(eval, "gallery_picture", lambda path, rows: drawn.extend(rows))
    each = torch.stack(features)
    eval.draw_gallery("x.png", instances, lambda c: each @ each[c], lambda i: each @ each[i], rows=6, top=3)
    texts, images = [r for r in drawn if isinstance(r[0], str)], [r for r in drawn if not isinstance(r[0], str)]
    assert sorted(r[0] for r in texts) == [f"caption {i}" for i in range(4)] and len(images) == 4  # distractors are not asked about
    for query, results in texts:  # ties by index: a query of group 0 finds 0, 1 and the impostor 5
        group0 = query in ("caption 0", "caption 1")
        assert [right for _, right in results] == ([True, True, False] if group0 else [True, True, False])
        assert results[0][0].shape == (eval.CELL, eval.CELL, 3)
    for query, results in images:
        assert results[0][1] and isinstance(results[0][0], str)


# ---------------------------------------------------------------- around a training loop

def test_progress_plain(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    progress = eval.Progress(10, start=4, every=0)
    progress.step(5, 64, loss=1.23456)
    progress.line("a remark")
    eval.Progress(10, every=1e9).step(5, 64, loss=2.0)  # too early
    eval.Progress(10, every=1e9).step(10, 64, loss=3.0)  # the last is always said
    eval.Progress(10, every=0, quiet=True).step(10, 64, loss=4.0)
    lines = out.getvalue().split("\n")
    assert re.fullmatch(r"step 5/10  loss 1\.235  [\d,]+ samples/s  \d+:\d\d left", lines[0])
    assert lines[1] == "a remark" and lines[2].startswith("step 10/10  loss 3 ") and lines[3:] == [""] and "\x1b" not in out.getvalue()


def test_progress_on_a_terminal(monkeypatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = eval.Progress(2)
        progress.last = 0
        progress.step(1, 64, loss=1.5)
        progress.step(2, 64, loss=0.5)
        progress.line("done")
        with pytest.raises(SystemExit), eval.one_line_errors():
            raise data.DataError("bad")
        monkeypatch.undo()
        shown = os.read(master, 4096).decode()
    os.close(master)
    first, second, rest = shown.split("\r\x1b[K", 3)[1:]
    assert first.startswith("step 1/2  loss 1.5") and second.startswith("step 2/2  loss 0.5") and "\n" not in first + second
    assert rest == "done\r\n\r\x1b[Kerror: bad\r\n"  # every text starts on a line of its own


@pytest.mark.parametrize("error, code, line", [
    (data.DataError("no such data"), 2, "error: no such data\n"), (clip.CheckpointError("no such file"), 2, "error: no such file\n"),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_one_line_errors(error, code, line, capsys):
    with pytest.raises(SystemExit) as stopped, eval.one_line_errors():
        raise error
    assert stopped.value.code == code and capsys.readouterr().err == line
    with pytest.raises(KeyError), eval.one_line_errors():  # a bug keeps its traceback
        {}["x"]
    with eval.one_line_errors():
        pass


def test_open_run_moves_an_old_run_aside(tmp_path, capsys):
    out = tmp_path / "run"
    for number in range(3):
        assert eval.open_run(f"{out}{os.sep}", {"lr": number}, False) is None  # a trailing slash changes nothing
        (out / "last.pt").write_text(str(number))
    assert [(tmp_path / f"run{end}" / "last.pt").read_text() for end in (".1", ".2", "")] == ["0", "1", "2"]
    assert json.loads((out / "config.json").read_text()) == {"lr": 2} and json.loads((tmp_path / "run.1" / "config.json").read_text()) == {"lr": 0}
    assert f"moved to {out}.2" in capsys.readouterr().err


def test_open_run_resumes(tmp_path):
    out, settings = tmp_path, {"lr": 0.1, "out": "x", "workers": 0, "resume": False, "new": None}
    with pytest.raises(clip.CheckpointError, match="there is no .*last.pt"):
        eval.open_run(out / "nothing", settings, True)
    assert not (out / "nothing").exists()
    clip.save_checkpoint(out / "last.pt", {"settings": {"lr": 0.1, "out": "y", "workers": 3}, "step": 6})
    lines = ['{"step": 3, "loss": 2}\n', '{"step": 6, "loss": 1}\n', '{"step": 9, "loss": 0.5}\n', '{"step": 6, "lo']
    (out / "log.jsonl").write_text("".join(lines))
    (out / ".writing-abc").write_text("left by a kill")
    assert eval.open_run(out, settings, True, first=False)["step"] == 6  # a process that is not the first only reads
    assert (out / "log.jsonl").read_text() == "".join(lines) and not (out / "config.json").exists()
    assert eval.open_run(out, settings | {"workers": 2}, True)["step"] == 6
    assert (out / "log.jsonl").read_text() == "".join(lines[:2]) and sorted(os.listdir(out)) == ["config.json", "last.pt", "log.jsonl"]
    with pytest.raises(clip.CheckpointError, match="--lr was 0.1 .* 0.2 now"):
        eval.open_run(out, settings | {"lr": 0.2}, True)
    with pytest.raises(clip.CheckpointError, match="log.jsonl: cannot be written"):
        eval.log_line(out / "config.json", step=1)


def test_restore_imports_nothing_but_the_methods(tmp_path, monkeypatch):
    (tmp_path / "evil_method.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for method in ("evil_method", "os", None, ["train_mxm"], "train_mxm.losses"):
        clip.save_checkpoint(tmp_path / "x.pt", {"method": method})
        with pytest.raises(clip.CheckpointError, match="which is none of train_"):
            eval.restore(tmp_path / "x.pt")


# ---------------------------------------------------------------- COCO's folds

def test_folds_are_the_mean_over_consecutive_parts():
    """Each with its own captions; of 11 instances in folds of 4 the last 3 are left out. No other data set has folds, nor one without a second."""
    captions = [2, 1, 3, 1, 2, 2, 1, 4, 1, 2, 3]
    instances = [instance(str(i), group=f"g{i // 2}", captions=n, query=i != 6) for i, n in enumerate(captions)]
    images, texts = F.normalize(random(11, 6), dim=1), F.normalize(random(sum(captions), 6, seed=1), dim=1)
    rows = eval.retrieval_rows("coco", images, texts, instances, fold=4)
    assert list(rows) == ["model", "model, 1K folds", "chance"]
    parts = []
    for fold in ([0, 1, 2, 3], [4, 5, 6, 7]):
        of_texts = [j for j, i in enumerate(i for i, n in enumerate(captions) for _ in range(n)) if i in fold]
        owner = torch.tensor([i for i in fold for _ in range(captions[i])])
        scores, asked, asked_texts = images[fold] @ texts[of_texts].t(), torch.tensor(fold) != 6, owner != 6
        parts.append({"text_to_image": brute_force(scores.t()[asked_texts], owner[asked_texts] // 2, torch.tensor(fold) // 2, (1, 5, 10)),
                      "image_to_text": brute_force(scores[asked], torch.tensor(fold)[asked] // 2, owner // 2, (1, 5, 10))})
    found, expected = rows["model, 1K folds"], {way: {m: (parts[0][way][m] + parts[1][way][m]) / 2 for m in parts[0][way]} for way in parts[0]}
    for way in expected:
        assert found[way] == pytest.approx({m: value for m, value in expected[way].items() if m != "mAP"})
    assert found["rSum"] == pytest.approx(sum(expected[way][f"R@{k}"] for way in expected for k in (1, 5, 10)))
    assert rows["model"] == eval.retrieval_metrics(images, texts, **eval.layout(instances)) != found
    assert all(list(eval.retrieval_rows(*a, fold=fold)) == ["model", "chance"] for *a, fold in (
        ("flickr30k", images, texts, instances, 4), ("coco", images, texts, instances, 11), ("coco", images, texts, instances, 1000)))
