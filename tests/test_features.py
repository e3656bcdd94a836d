"""Tests of features in place of pictures (data.py), of choosing a task and its classes, and of what tells two models apart (clip.py).

    python -m pytest tests/test_features.py
"""
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data

SHARED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "..", "shared", "data")


@pytest.fixture(autouse=True)
def said(monkeypatch, capsys):
    """What data.note has said, in a run of its own."""
    monkeypatch.setattr(data, "_noted", set())
    return lambda: capsys.readouterr().err


def content(n=60, classes=3, seed=0, **changes):
    """A file's dict of n rows: row i has image[i, 0] = text[i, 0] = i. A change to None leaves the key out."""
    rng, out = np.random.default_rng(seed), {}
    for key, width in (("image", 4), ("text", 3)):
        out[key] = rng.normal(size=(n, width)).astype(np.float32)
        out[key][:, 0] = np.arange(n)
    out |= {"label": np.arange(n) % classes, "ids": np.array([f"row{i}" for i in range(n)])} | changes
    return {key: value for key, value in out.items() if value is not None}


def npz(path, **values):
    np.savez(path, **values)
    return str(path)


def pkl(path, value, protocol=4):
    with open(path, "wb") as f:
        pickle.dump(value, f, protocol)
    return str(path)


def refused(path, match, function, *args):
    """function(*args) is a DataError of one line that names the file and matches."""
    with pytest.raises(data.DataError, match=match) as e:
        function(*args)
    assert os.path.basename(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 700


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value) and found[key].dtype.kind == np.asarray(value).dtype.kind, key


# ---------------------------------------------------------------- files of features

def test_npz(tmp_path):
    expected = content()
    same(data.read_features(npz(tmp_path / "a.npz", **expected, other=np.zeros(3))), expected)
    compressed = tmp_path / "b.npz"
    halves = expected["text"].astype(np.float16)
    np.savez_compressed(compressed, **expected | {"image": expected["image"].astype(">f8"), "text": halves, "ids": np.arange(60)})
    found = data.read_features(str(compressed))
    assert found["image"].dtype == found["text"].dtype == np.float32
    same(found, expected | {"text": halves.astype(np.float32), "ids": np.arange(60)})
    same(data.read_features(npz(tmp_path / "c.npz", **content(ids=None))), expected | {"ids": np.arange(60)})


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles(protocol, tmp_path):
    expected = content()
    same(data.read_features(pkl(tmp_path / "a.pkl", expected | {"other": [{"x": 1.5}]}, protocol)), expected)
    plain = {key: value.tolist() for key, value in expected.items()}  # lists in place of arrays
    same(data.read_features(pkl(tmp_path / "a.p", plain, protocol)), expected)
    strings = content(label=np.array(["art", "biology", "art"] * 20, dtype=object), ids=np.array([7, "b", None] * 20, dtype=object))
    found = data.read_features(pkl(tmp_path / "a.pickle", strings, protocol))
    assert found["label"].tolist() == ["art", "biology", "art"] * 20 and found["ids"].tolist() == ["7", "b", "None"] * 20
    doubles = data.read_features(pkl(tmp_path / "b.pkl", content(image=np.arange(240.0).reshape(4, 60).T), protocol))  # Fortran's order
    assert doubles["image"].dtype == np.float32 and doubles["image"][7].tolist() == [7, 67, 127, 187]


def python2(values):
    """A pickle as Python 2 and numpy 1 write it: byte strings for the keys and for the arrays' content."""
    out = b"\x80\x02}("
    for key, array in values.items():
        shape = b"".join(b"J" + struct.pack("<i", n) for n in array.shape)
        kind = array.dtype.str[1:].encode()
        out += (b"U" + bytes([len(key)]) + key.encode() + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(" + shape
                + b"tcnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
                + struct.pack("<i", array.nbytes) + array.tobytes() + b"tb")
    return out + b"u."


def test_pickles_of_python_2(tmp_path):
    expected = content(ids=np.arange(60) * 7)
    (tmp_path / "clip_train.pkl").write_bytes(python2(expected))
    same(data.read_features(str(tmp_path / "clip_train.pkl")), expected)


class Call:
    """Pickles as a call of anything: what a malicious file does."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_would_run_code(protocol, tmp_path):
    mark, path = tmp_path / "mark", str(tmp_path / "a.pkl")
    for call in (Call(os.system, f"touch {mark}"), Call(open, str(mark), "w"), Call(eval, f"open({str(mark)!r}, 'w')"), Call(os.mkdir, str(mark)),
                 Call(np.save, str(mark), 1), Call(getattr, "a", "upper"), Call(__import__, "antigravity"), Call(type, "X", (), {})):
        for key in ("image", "ids", "other"):
            refused(path, "refused.*nothing of it was run", data.read_features, pkl(path, content() | {key: call}, protocol))
        refused(path, "refused.*nothing of it was run", data.read_features, pkl(path, call, protocol))
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_npz_that_would_run_code(tmp_path):
    """Objects within a .npz, a pickle that calls itself .npz: both are pickles, and refused unread."""
    mark, path = tmp_path / "mark", str(tmp_path / "a.npz")
    for key in ("image", "label", "ids"):
        np.savez(path, **content() | {key: np.array([Call(os.mkdir, str(mark))] * 60, dtype=object)})
        refused(path, "Object arrays cannot be loaded", data.read_features, path)
    refused(path, "no features.*pickle", data.read_features, pkl(path, content() | {"ids": Call(os.mkdir, str(mark))}))
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in content().items():
            np.save(file := io.BytesIO(), value)
            archive.writestr(f"{key}.npy", pickle.dumps(Call(os.mkdir, str(mark))) if key == "image" else file.getvalue())  # a member that is no array
    refused(path, "no features|image is", data.read_features, path)
    assert os.listdir(tmp_path) == ["a.npz"]


def with_value(key, row, value):
    out = content()[key]
    out[row, 1] = value
    return {key: out}


BAD = {
    "NaN": (with_value("image", 7, np.nan), "image row 7 holds a NaN or an infinite number .1 such"),
    "infinite": (with_value("text", 59, -np.inf), "text row 59 holds a NaN or an infinite number"),
    "too large for float32": ({"text": np.full((60, 3), 1e39)}, "text row 0 holds a NaN or an infinite number .60 such"),
    "fewer images": ({"image": np.zeros((59, 4))}, "59 rows of image, but 60 labels"),
    "fewer texts": ({"text": np.zeros((1, 3))}, "1 rows of text, but 60 labels"),
    "more ids": ({"ids": np.arange(61)}, "61 rows of ids, but 60 labels"),
    "no image": ({"image": None}, "no image in it"),
    "no text and label": ({"text": None, "label": None}, "no text, label in it"),
    "image a scalar": ({"image": np.float32(1)}, r"image is float32 of shape \(\)"),
    "label a scalar": ({"label": np.int64(1)}, r"label is int64 of shape \(\)"),
    "label a scalar, no ids": ({"label": np.int64(1), "ids": None}, r"label is int64 of shape \(\)"),
    "ids a scalar": ({"ids": np.int64(1)}, r"ids is int64 of shape \(\)"),
    "image a vector": ({"image": np.zeros(60)}, r"image is float64 of shape \(60,\)"),
    "image of pixels": ({"image": np.zeros((60, 3, 2, 2))}, r"image is float64 of shape \(60, 3, 2, 2\)"),
    "label one-hot": ({"label": np.eye(60)}, r"label is float64 of shape \(60, 60\)"),
    "label of fractions": ({"label": np.arange(60) / 7}, "label is float64"),
    "image of strings": ({"image": np.full((60, 4), "1.5")}, "image is <U3"),
    "complex": ({"image": np.zeros((60, 4), complex)}, "image is complex"),
    "no rows": ({"image": np.zeros((0, 4)), "text": np.zeros((0, 3)), "label": np.zeros(0, int), "ids": None},
                r"image is float64 of shape \(0, 4\)|label is int64 of shape \(0,\)|no rows"),
    "no columns": ({"image": np.zeros((60, 0))}, r"image is float64 of shape \(60, 0\)|no columns"),
}


@pytest.mark.filterwarnings("error")  # what is said is said by the error
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("end", ["npz", "pkl"])
def test_features_that_do_not_fit_together(name, end, tmp_path):
    changes, match = BAD[name]
    path, values = tmp_path / f"bad.{end}", content(**changes)
    npz(path, **values) if end == "npz" else pkl(path, values)
    refused(f"bad.{end}", match, data.read_features, str(path))
    good = npz(tmp_path / "good.npz", **content())
    for files in ((str(path), good), (good, str(path))):
        refused(f"bad.{end}", match, data.feature_splits, files, None)


def test_files_that_hold_no_features(tmp_path):
    path = str(tmp_path / "bad.npz")
    refused(path, "cannot be read.*No such file", data.read_features, path)
    os.mkdir(path)
    refused(path, "cannot be read", data.read_features, path)
    os.rmdir(path)
    for save in (np.savez, np.savez_compressed):
        save(path, **content())
        whole = open(path, "rb").read()
        for size in (0, 1, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
            with open(path, "wb") as f:
                f.write(whole[:size])
            refused(path, "no features|cannot be read", data.read_features, path)
        for at, value in ((8, 99), (6, 1)):  # a compression that zipfile does not know; encrypted: in each member's header and in the table of contents
            broken = bytearray(whole)
            for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
                for start in [i for i in range(len(whole)) if whole[i:i + 4] == mark]:
                    broken[start + at + shift] = value
            with open(path, "wb") as f:
                f.write(broken)
            refused(path, "no features|cannot be read", data.read_features, path)
        flipped = bytearray(whole)
        flipped[whole.index(b"\x93NUMPY") + 200 if save is np.savez else 120] ^= 255
        with open(path, "wb") as f:
            f.write(flipped)
        refused(path, "no features|cannot be read", data.read_features, path)
    with open(path, "wb") as f:  # one array, not several
        np.save(f, np.zeros((3, 4)))
    refused(path, "no features", data.read_features, path)
    path = str(tmp_path / "bad.pkl")
    ragged = {"image": [[1.0], [2.0, 3.0]], "text": [[1.0]] * 2, "label": [0, 1]}
    for value in ([1, 2], "image, text, label", 7, None, {}, {"image"}, np.zeros(3), ragged, content() | {"label": {"a": 1}}):
        refused(path, "bad.pkl", data.read_features, pkl(path, value))
    whole = pickle.dumps(content())
    for size in (0, 1, 100, len(whole) - 1):
        with open(path, "wb") as f:
            f.write(whole[:size])
        refused(path, "refused", data.read_features, path)


# ---------------------------------------------------------------- splits of features

def tenth(id):
    return int(hashlib.sha1(str(id).encode()).hexdigest()[:8], 16) % 10


def test_feature_splits(tmp_path, said):
    train, test = npz(tmp_path / "train.npz", **content(200)), npz(tmp_path / "test.npz", **content(30, seed=1))
    splits, names = data.feature_splits(("train.npz", "test.npz"), str(tmp_path))
    late = np.array([tenth(f"row{i}") == 9 for i in range(200)])
    assert 5 < late.sum() < 40 and names == ["0", "1", "2"] and list(splits) == ["train", "val", "test"] and said() == ""
    for split, path, rows in (("train", train, ~late), ("val", train, late), ("test", test, np.ones(30, bool))):
        source, found = data.read_features(path), splits[split]
        assert np.array_equal(found.images, source["image"][rows]) and np.array_equal(found.texts, source["text"][rows])
        assert np.array_equal(found.labels, source["label"][rows]) and found.labels.dtype == np.int64
        assert (found.views == 1).all() and (found.captions == 1).all() and found.query.all() and found.query.dtype == bool
        assert len(found.views) == len(found.captions) == len(found.query) == rows.sum()
    npz(tmp_path / "train.npz", **content(200, ids=None))  # row numbers are the ids
    splits, _ = data.feature_splits((train, test), None)
    assert splits["val"].images[:, 0].tolist() == [i for i in range(200) if tenth(i) == 9]


@pytest.mark.parametrize("kind", [str, "S", object, np.uint8])
def test_labels_that_train_lacks_are_left_out(kind, tmp_path, said):
    """Names sort as strings; of val and test, rows of another class go. One class is in val alone."""
    number = {"b": 0, "a": 1, "d": 2, "c": 3, "ab": 4}
    labels = ["b" if tenth(f"row{i}") < 5 else "ab" if tenth(f"row{i}") == 9 and i % 2 else "d" for i in range(100)]
    label = lambda values: np.array([number[v] for v in values], kind) if kind is np.uint8 else np.array(values).astype(kind)
    save = pkl if kind is object else lambda path, values: npz(path, **values)
    train = save(tmp_path / "train.p" if kind is object else tmp_path / "train.npz", content(100, label=label(labels)))
    test = save(tmp_path / "test.p" if kind is object else tmp_path / "test.npz", content(40, label=label(list("badc") * 10)))
    splits, names = data.feature_splits((train, test), None)
    assert names == (["0", "2"] if kind is np.uint8 else ["b", "d"])
    assert splits["test"].labels.tolist() == [0, 1] * 10 and splits["test"].images[:, 0].tolist() == [i for i in range(40) if i % 4 in (0, 2)]
    val = [i for i in range(100) if tenth(f"row{i}") == 9 and labels[i] != "ab"]
    assert splits["val"].images[:, 0].tolist() == val and splits["val"].labels.tolist() == [1] * len(val)
    assert (splits["train"].labels == [["b", "d"].index(labels[i]) for i in range(100) if tenth(f"row{i}") != 9]).all()
    out = sum(v == "ab" for v in labels)
    notes = said()
    assert f"val: {out} of {out + len(val)} rows have a label that train does not" in notes and "test: 20 of 40 rows" in notes


def test_splits_that_cannot_be_used(tmp_path, said):
    good, bad = npz(tmp_path / "good.npz", **content(100)), str(tmp_path / "bad.npz")

    def both(match, first=True, second=True):  # as the first file, as the second
        for files in [(bad, good)] * first + [(good, bad)] * second:
            refused(bad, match, data.feature_splits, files, None)
    npz(bad, **content(100, image=np.zeros((100, 5))))
    with pytest.raises(data.DataError, match="bad.npz: image has 5 columns, in .*good.npz it has 4"):
        data.feature_splits((good, bad), None)
    npz(bad, **content(100, text=np.zeros((100, 1))))
    both("text has 3 columns, in .* it has 1|text has 1 columns, in .* it has 3")
    npz(bad, **content(100, classes=1))
    both("one class only in train", second=False)
    npz(bad, **content(4800, label=np.arange(4800) % 1200))
    both(r"1,\d\d\d distinct values in .* ids", second=False)
    npz(bad, **content(100, label=np.arange(100) % 80))
    both("distinct values in .* training rows; these look like ids", second=False)
    npz(bad, **content(100, label=np.full(100, 77)))
    both("no row of split 'test' has a label that train has", first=False)
    npz(bad, **content(100, label=np.array(["0", "1"] * 50)))  # names, where train has numbers
    both("no row of split 'test' has a label that train has", first=False)
    npz(bad, **content(2))
    both("one class only|no row of split 'val'", second=False)
    npz(bad, **content(3, ids=np.array([next(i for i in range(k, 99) if tenth(i) < 9) for k in (0, 20, 40)]), label=np.array([0, 1, 1])))
    both("no row of split 'val' has a label that train has", second=False)
    assert "1 of 2 classes have a single training instance" in said()


def test_published_wikipedia_features(said):
    root = os.path.join(SHARED, "wikipedia")
    if not os.path.exists(os.path.join(root, "features_train.npz")):
        pytest.skip("needs the published features in ../shared/data/wikipedia")
    splits, names = data.feature_splits(("features_train.npz", "features_test.npz"), root)
    assert sorted(map(int, names)) == list(range(10)) and said() == ""
    size = {split: len(found.labels) for split, found in splits.items()}
    assert size["train"] + size["val"] == 2173 and 150 < size["val"] < 280 and size["test"] == 693
    for found in splits.values():
        assert found.images.shape[1] == 128 and found.texts.shape[1] == 10 and set(found.labels) == set(range(10))
        assert np.abs(found.texts.sum(1) - 1).max() < 1e-4 and found.images.min() >= 0  # topics' shares; visual words' counts


# ---------------------------------------------------------------- batches of features

VIEWS, CAPTIONS = np.tile([1, 3, 2], 9)[:23], np.tile([2, 1, 5, 1], 6)[:23]


def features():
    """23 instances; every row is (its instance, its number within it)."""
    rows = lambda counts: np.array([(i, k) for i, n in enumerate(counts) for k in range(n)], np.float32)
    return data.Features(rows(VIEWS), rows(CAPTIONS), VIEWS, CAPTIONS, np.arange(23) % 4, np.ones(23, bool))


def equal(a, b):
    assert a.keys() == b.keys() == {"images", "texts", "index"}
    return all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_every_instance_once_per_epoch_with_rows_of_its_own():
    batches, seen = list(data.feature_batches(features(), 5, 3, 0, 5 * 40, 0, 1)), {"images": set(), "texts": set()}
    assert [len(b["index"]) for b in batches] == [5, 5, 5, 5, 3] * 40
    epochs = [torch.cat([b["index"] for b in batches[at:at + 5]]).tolist() for at in range(0, 200, 5)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs) and len(set(map(tuple, epochs))) == 40
    for batch in batches:
        assert batch["index"].dtype == torch.int64 and batch["images"].dtype == batch["texts"].dtype == torch.float32
        for kind in seen:
            assert torch.equal(batch[kind][:, 0], batch["index"].float())
            seen[kind] |= set(map(tuple, batch[kind].tolist()))
    for kind, counts in (("images", VIEWS), ("texts", CAPTIONS)):  # in 40 epochs each row is drawn: of five, one is missed once in 7,500
        assert seen[kind] == {(i, k) for i, n in enumerate(counts) for k in range(n)}
    other = next(data.feature_batches(features(), 23, 4, 0, 1, 0, 1))["index"].tolist()
    assert other != epochs[0] and sorted(other) == sorted(epochs[0])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_batch(world):
    """The parts of all processes, one after another, are the batch of a single one; a last batch of 3 leaves a fourth process none."""
    whole = list(data.feature_batches(features(), 5, 0, 0, 10, 0, 1))
    parts = [list(data.feature_batches(features(), 5, 0, 0, 10, rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert equal({key: torch.cat([p[step][key] for p in parts]) for key in batch}, batch)
        sizes = [len(p[step]["index"]) for p in parts]
        assert max(sizes) - min(sizes) <= 1 and all(p[step]["images"].shape[1] == 2 for p in parts)


def test_batches_resume_at_any_step():
    whole = list(data.feature_batches(features(), 5, 0, 0, 12, 1, 2))
    for start in range(13):
        rest = list(data.feature_batches(features(), 5, 0, start, 12, 1, 2))
        assert len(rest) == 12 - start and all(equal(a, b) for a, b in zip(rest, whole[start:]))


def test_seed_step():
    def draw(*numbers):
        data.seed_step(*numbers)
        return torch.rand(3).tolist()
    every = [draw(seed, step, rank) for seed in (0, 1, 2 ** 40) for step in (0, 1, 10 ** 6) for rank in (0, 1)]
    assert len(set(map(tuple, every))) == 18 and draw(1, 10 ** 6, 1) == every[11] and draw(1, 1) == draw(1, 1, 0)


# ---------------------------------------------------------------- tasks and classes

def table(path, rows, columns="image,caption,split,color"):
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    path.write_text("\n".join(["id," + columns, *(f"{i},a.png,thing {i},{row}" for i, row in enumerate(rows))]))
    return str(path)


def lines(path, rows):
    """rows: (split, labels)."""
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    path.write_text("\n".join(json.dumps({"images": ["a.png"], "captions": ["x"], "split": split, "labels": labels}) for split, labels in rows))
    return str(path)


def chosen(path, task=None):
    instances, classes = data.load(path)
    return data.choose_task(classes, task, path, instances)


def test_choose_task(tmp_path, said):
    rows = ["train,red,big", "train,blue,big", "train,red,", "train,blue,small", "val,red,", "test,blue,big"]
    path = table(tmp_path / "a.csv", rows, "image,caption,split,color,size")
    assert chosen(path) == "color" and said() == ""
    assert chosen(path, "size") == "size" and "task 'size': 1 of 2 classes have a single training instance" in said()
    refused("a.csv", "--task colour: .* has the tasks color, size", chosen, path, "colour")
    refused("a.csv", "--task id: ", chosen, path, "id")
    refused("a.csv", "no labels; this method learns from classes", chosen, table(tmp_path / "a.csv", ["train", "val", "test"], "image,caption,split"))
    refused("a.csv", "no labels", chosen, table(tmp_path / "a.csv", ["train,", "train,", "val,", "test,"]))
    one = table(tmp_path / "a.csv", ["train,red", "train,red", "train,", "val,red", "test,red"])
    refused("a.csv", "task 'color' has one class only in train", chosen, one)
    refused("a.jsonl", "no labels", chosen, lines(tmp_path / "a.jsonl", [("train", {}), ("train", None), ("val", {}), ("test", {})]))
    one = lines(tmp_path / "a.jsonl", [("train", {"t": 1}), ("train", {"t": "1"}), ("val", {"t": 1}), ("test", {})])
    refused("a.jsonl", "one class only", chosen, one)
    mixed = lines(tmp_path / "a.jsonl", [("train", {"t": 1}), ("train", {"t": 2, "other": "x"}), ("train", {"other": "y"}), ("val", {}), ("test", {})])
    assert chosen(mixed, "t") == "t" and chosen(mixed) == "other"  # the first by name
    said()


def test_a_column_of_ids_is_no_task(tmp_path, said):
    rows = [f"train,{'red' if i % 2 else 'blue'},n{i % 1000}" for i in range(2000)] + ["val,red,n1", "test,red,n1"]
    path = table(tmp_path / "a.csv", rows, "image,caption,split,color,number")
    assert chosen(path) == "color" and "'number' has 1000 distinct values in 2000 training instances: taken as a remark" in said()
    refused("a.csv", "--task number: .* has the tasks color .*remark", chosen, path, "number")
    refused("a.csv", "no labels", chosen, table(tmp_path / "a.csv", [f"train,n{i % 40}" for i in range(70)] + ["val,n1", "test,n1"]))
    for count, rows in ((np.full(1000, 9), "9,000"), (np.ones(21, int), "21"), (np.append(np.full(25, 1), np.zeros(30, int)), "25")):
        match = f"task 'x' has {(count > 0).sum():,} distinct values in {rows} training rows; these look like ids"
        refused("styles.csv", match, data.check_classes, count, "styles.csv: task 'x'")
    for fine in (np.full(999, 2), np.ones(20, int), np.array([1, 1])):
        data.check_classes(fine, "x")
    for one in (np.array([5]), np.array([0, 9, 0]), np.zeros(0, int)):
        with pytest.raises(data.DataError, match="x has one class only"):
            data.check_classes(one, "x")


def test_load_split(tmp_path, said):
    rows = ["train,red", "train,blue", "train,", "train,green", "train,blue", "val,blue", "val,", "test,green", "test,red"]
    path = table(tmp_path / "a.csv", rows)
    train, names = data.load_split(path, None, "train", "color")
    assert names == ["blue", "green", "red"] and [(x.id, x.group) for x in train] == [("0", "red"), ("1", "blue"), ("3", "green"), ("4", "blue")]
    assert f"{path} train: 1 of 5 instances have no known color; they were left out" in said()
    labels, captions, query = data.class_layout(train, names)
    assert labels.tolist() == [2, 0, 1, 0] and labels.dtype == np.int64 and captions.tolist() == [1] * 4 and query.tolist() == [True] * 4
    assert data.class_layout(train, ["red", "green", "blue"])[0].tolist() == [0, 2, 1, 2]  # the model's order counts
    test, _ = data.load_split(path, None, "test", "color", ["blue", "red"])  # a model that never saw green
    assert [x.id for x in test] == ["8"] and "test: 1 of 2 instances have no known color" in said()
    match = "no instance of split 'val' has a known color; label some, or choose another --task"
    refused("a.csv", match, data.load_split, path, None, "val", "color", ["green", "red"])
    refused("a.csv", "no instance of split 'test' has a known size", data.load_split, path, None, "test", "size")
    path = table(tmp_path / "a.csv", [*rows[:5], "val,", *rows[6:]])
    refused("a.csv", match, data.load_split, path, None, "val", "color")
    path = lines(tmp_path / "a.jsonl", [("train", {"t": "a"}), ("train", {"t": "b"}), ("val", {"other": "z"}), ("test", {"t": "a"})])
    refused("a.jsonl", "no instance of split 'val' has a known t", data.load_split, path, None, "val", "t")


# ---------------------------------------------------------------- what tells two models apart

@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
def test_identity(name, tmp_path):
    tokenizer = clip.Tokenizer.train(["a red cone", "a blue ball"], 520)
    model = clip.build(name, tokenizer, seed=1)
    known = clip.identity(model)
    again, other = (clip.identity(clip.build(name, tokenizer, seed=seed)) for seed in (1, 2))
    assert len(known) == 64 and int(known, 16) and known == again != other
    clip.save(model, tmp_path / "a.pt")
    clip.save_checkpoint(tmp_path / "b.pt", {"clip": clip.describe(model), "method": "train_x"})
    for file in ("a.pt", "b.pt"):
        assert clip.identity(clip.load(tmp_path / file, "cpu")[0]) == known
    for key, value in list(model.state_dict().items())[::1 if name == "tiny" else 5]:  # one number of any weight or statistic
        before = value.view(-1)[0].item()
        value.view(-1)[0] += 1
        assert clip.identity(model) != known, key
        value.view(-1)[0] = before
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        assert clip.identity(model.to(device).eval().requires_grad_(False)) == known
    assert clip.identity(model.cpu().to(memory_format=torch.channels_last)) == known  # in what order memory holds the numbers


def test_identity_of_orders_names_shapes_and_types():
    def module(*entries):
        out = torch.nn.Module()
        for name, value in entries:
            out.register_buffer(name, value)
        return clip.identity(out)
    a, b = torch.arange(6.0), torch.ones(2)
    assert module(("a", a), ("b", b)) == module(("b", b), ("a", a))
    different = [module(("a", a)), module(("a", a), ("c", b)), module(("b", a), ("a", b))]
    different += [module(("a", x), ("b", b)) for x in (a, a.view(2, 3), a.view(3, 2), a.double(), a.view(torch.int32), a.flip(0))]
    assert len(set(different)) == len(different)
    assert module(("a", torch.arange(6.0).view(2, 3).t())) == module(("a", torch.tensor([[0.0, 3], [1, 4], [2, 5]])))


class Head(torch.nn.Module):
    def __init__(self, inner, width=3):
        super().__init__()
        self.clip, self.out, self.clipped = inner, torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width)  # a name that begins like clip's is a head's


def inner(seed):
    out = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(out.weight, float(seed))
    return out


def test_heads_go_and_come_back(tmp_path):
    model, other = Head(inner(1)), Head(inner(2))
    model.clipped.running_mean += 3
    heads = clip.describe_heads(model)
    assert sorted(heads) == sorted(f"{k}" for k in model.state_dict() if not k.startswith("clip.")) and len(heads) == 7
    before = {key: value.clone() for key, value in heads.items()}
    clip.save_checkpoint(tmp_path / "a.pt", {"heads": heads})
    with torch.no_grad():
        model.out.weight += 1  # what was described is the model as it was
    assert all(torch.equal(heads[key], before[key]) for key in heads)
    assert clip.load_heads(other, clip.load_checkpoint(tmp_path / "a.pt")["heads"]) is None
    assert all(torch.equal(value, before[key]) for key, value in clip.describe_heads(other).items())
    assert (other.clip.weight == 2).all()
    clip.load_heads(other, heads | {"clip.weight": torch.full((2, 2), 9.0)})  # CLIP's own weights are no head's to set
    assert (other.clip.weight == 2).all()
    bare = Head(None)  # a model on features from files has no CLIP
    clip.load_heads(bare, heads)
    assert torch.equal(bare.out.weight, before["out.weight"])


def test_heads_of_another_model_are_refused():
    model = Head(inner(1))
    heads = clip.describe_heads(model)
    less = {key: value for key, value in heads.items() if key != "out.bias"}
    for wrong, match in ((less, "out.bias"), (heads | {"out.more": torch.zeros(1)}, "out.more"), ({}, "out.weight"),
                         (clip.describe_heads(Head(inner(1), 4)), "size mismatch|shape"), (heads | {"out.weight": [1, 2]}, "out.weight")):
        with pytest.raises(clip.CheckpointError, match="not this model's") as e:
            clip.load_heads(model, wrong)
        assert "\n" not in str(e.value) and (match in str(e.value) or any(m in str(e.value) for m in match.split("|"))), str(e.value)
