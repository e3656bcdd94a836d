"""Tests of features in place of pictures and of choosing a task (data.py), what tells models apart."""
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
from test_data import SHARED, Call, refused


@pytest.fixture(autouse=True)
def said(monkeypatch, capsys):
    """What data.note has said, in a run of its own."""
    monkeypatch.setattr(data, "_noted", set())
    return lambda: capsys.readouterr().err


def content(n=60, classes=3, seed=0, **changes):
    """A file's dict of n rows, image[i, 0] = text[i, 0] = i. A change to None leaves the key out."""
    rng, out = np.random.default_rng(seed), {}
    for key, width in (("image", 4), ("text", 3)):
        out[key] = rng.normal(size=(n, width)).astype(np.float32)
        out[key][:, 0] = np.arange(n)
    out |= {"label": np.arange(n) % classes, "ids": np.array([f"row{i}" for i in range(n)])} | changes
    return {key: value for key, value in out.items() if value is not None}


def npz(path, **values):
    np.savez(path, **values)
    return str(path)


def pkl(path, value):
    with open(path, "wb") as f:
        pickle.dump(value, f)
    return str(path)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), key
        assert found[key].dtype.kind == np.asarray(value).dtype.kind, key


# ---------------------------------------------------------------- files of features

def test_npz(tmp_path):
    expected = content()
    assert_same(data.read_features(npz(tmp_path / "a.npz", **expected, other=np.zeros(3))), expected)
    halves = expected["text"].astype(np.float16)
    np.savez_compressed(tmp_path / "b.npz", **expected | {"image": expected["image"].astype(">f8"),
                                                          "text": halves, "ids": np.arange(60)})
    found = data.read_features(str(tmp_path / "b.npz"))
    assert found["image"].dtype == found["text"].dtype == np.float32
    assert_same(found, expected | {"text": halves.astype(np.float32), "ids": np.arange(60)})
    column = content(label=(np.arange(60) % 3).astype(float)[:, None], ids=None)  # as MATLAB writes
    found = data.read_features(npz(tmp_path / "d.npz", **column))
    assert_same(found, expected | {"ids": np.arange(60)})


def test_pickles(tmp_path):
    expected = content()
    assert_same(data.read_features(pkl(tmp_path / "a.pkl", expected | {"other": [{"x": 1.5}]})), expected)
    plain = {key: value.tolist() for key, value in expected.items()}  # lists in place of arrays
    assert_same(data.read_features(pkl(tmp_path / "a.p", plain)), expected)
    strings = content(label=np.array(["art", "biology", "art"] * 20, dtype=object),
                      ids=np.array([7, "b", None] * 20, dtype=object))
    found = data.read_features(pkl(tmp_path / "a.pickle", strings))
    assert found["label"].tolist() == ["art", "biology", "art"] * 20
    assert found["ids"].tolist() == ["7", "b", "None"] * 20


def python2(values):
    """A pickle as Python 2 and numpy 1 write it: byte strings for the keys and for the arrays' content."""
    out = b"\x80\x02}("
    for key, array in values.items():
        kind = array.dtype.str[1:].encode()
        out += b"U" + bytes([len(key)]) + key.encode() + b"cnumpy.core.multiarray\n_reconstruct\n"
        out += b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        out += b"".join(b"J" + struct.pack("<i", n) for n in array.shape)
        out += b"tcnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R(K\x03U\x01<NNN"
        out += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        out += b"T" + struct.pack("<i", array.nbytes) + array.tobytes() + b"tb"
    return out + b"u."


def test_pickles_of_python_2(tmp_path):
    expected = content(ids=np.arange(60) * 7)
    (tmp_path / "clip_train.pkl").write_bytes(python2(expected))
    assert_same(data.read_features(str(tmp_path / "clip_train.pkl")), expected)


def test_npz_that_would_run_code(tmp_path):
    """Objects within a .npz, a pickle that calls itself .npz: both are pickles, and refused unread."""
    path = tmp_path / "a.npz"
    call = Call(os.mkdir, (str(tmp_path / "mark"),))
    npz(path, **content() | {"ids": np.array([call] * 60, dtype=object)})
    refused("a.npz: .*Object arrays cannot be loaded", data.read_features, str(path))
    pkl(path, content() | {"ids": call})
    refused("a.npz: refused.*pickle", data.read_features, str(path))
    assert os.listdir(tmp_path) == ["a.npz"]


def with_value(key, row, value):
    out = content()[key]
    out[row, 1] = value
    return {key: out}


BAD = {
    "NaN": (with_value("image", 7, np.nan), "image row 7 holds a NaN or an infinite number .1 such"),
    "too large": ({"text": np.full((60, 3), 1e39)}, "text row 0 holds a NaN or an infinite number .60 such"),
    "fewer images": ({"image": np.zeros((59, 4))}, "59 rows of image, but 60 labels"),
    "no text and label": ({"text": None, "label": None}, "text.*expected a .npz"),
    "image of pixels": ({"image": np.zeros((60, 3, 2, 2))}, r"image is float64 of shape \(60, 3, 2, 2\)"),
    "label one-hot": ({"label": np.eye(60)}, r"label is int64 of shape \(60, 60\); expected one class"),
    "label of fractions": ({"label": np.arange(60) / 7}, "label is float64"),
    "image of strings": ({"image": np.full((60, 4), "1.5")}, "image is <U3"),
    "no columns": ({"image": np.zeros((60, 0))}, r"image is float64 of shape \(60, 0\)"),
}


@pytest.mark.filterwarnings("error")  # what is said is said by the error
@pytest.mark.parametrize("name", BAD)
def test_features_that_do_not_fit_together(name, tmp_path):
    changes, said = BAD[name]
    refused(f"bad.pkl: .*({said})", data.read_features, pkl(tmp_path / "bad.pkl", content(**changes)))


# ---------------------------------------------------------------- splits of features

def late(count):
    """Of rows row0, row1, ..., those that are validation data."""
    return np.array([data.hash_tenth(f"row{i}") == 9 for i in range(count)])


def test_feature_splits(tmp_path, said):
    train = npz(tmp_path / "train.npz", **content(200))
    test = npz(tmp_path / "test.npz", **content(30, seed=1))
    splits, names = data.feature_splits(("train.npz", "test.npz"), str(tmp_path))
    assert names == ["0", "1", "2"] and said() == "" and list(splits) == ["train", "val", "test"]
    parts = (("train", train, ~late(200)), ("val", train, late(200)), ("test", test, slice(None)))
    for split, path, rows in parts:
        source = data.read_features(path)
        found = splits[split]
        assert np.array_equal(found.images, source["image"][rows])
        assert np.array_equal(found.texts, source["text"][rows])
        assert np.array_equal(found.labels, source["label"][rows]) and found.labels.dtype == np.int64
        for ones in (found.views, found.captions, found.query):
            assert len(ones) == len(found.labels) and ones.all()


def test_labels_that_train_lacks_are_left_out(tmp_path, said):
    """Of val and test, rows of another class go. One class is in val alone. Strings are Python 2's."""
    labels = []
    for i in range(100):
        tenth = data.hash_tenth(f"row{i}")
        labels.append("ab" if tenth == 9 and i % 2 else "b" if tenth < 5 else "d")
    files = []
    for name, values in (("train", labels), ("test", ["b", "a", "d", "c"] * 10)):
        values = content(len(values), label=np.array(values).astype("S"))
        files.append(npz(tmp_path / f"{name}.npz", **values))
    splits, names = data.feature_splits(files, None)
    assert names == ["b", "d"]
    assert splits["test"].labels.tolist() == [0, 1] * 10
    assert splits["test"].images[:, 0].tolist() == [i for i in range(40) if i % 4 in (0, 2)]
    val = [i for i in np.flatnonzero(late(100)) if labels[i] != "ab"]
    assert splits["val"].images[:, 0].tolist() == val and splits["val"].labels.tolist() == [1] * len(val)
    train = ["bd".index(labels[i]) for i in np.flatnonzero(~late(100))]
    assert splits["train"].labels.tolist() == train
    notes = said()
    assert f"val: {late(100).sum() - len(val)} of {late(100).sum()} rows have a label that train" in notes
    assert "test: 20 of 40 rows" in notes


UNUSABLE = [  # changes, rows, where the file stands (train, test), what is said
    ({"image": np.zeros((100, 5))}, 100, "test", "image has 5 columns, in .*good.npz it has 4"),
    ({"label": np.zeros(100, int)}, 100, "train", "one class only in train"),
    ({"label": np.arange(100) % 80}, 100, "train", "distinct values in .* rows; these look like ids"),
    ({"label": np.array(["0"] * 100)}, 100, "test", "no row of split 'test' has a label that train has")]


def test_splits_that_cannot_be_used(tmp_path):
    good = npz(tmp_path / "good.npz", **content(100))
    for changes, rows, place, problem in UNUSABLE:
        bad = npz(tmp_path / "bad.npz", **content(rows, **changes))
        files = (bad, good) if place == "train" else (good, bad)
        refused(f"bad.npz: .*({problem})", data.feature_splits, files, None)


def test_published_wikipedia_features(said):
    root = os.path.join(SHARED, "wikipedia")
    if not os.path.exists(os.path.join(root, "features_train.npz")):
        pytest.skip("needs the published features in ../shared/data/wikipedia")
    splits, names = data.feature_splits(("features_train.npz", "features_test.npz"), root)
    assert sorted(map(int, names)) == list(range(10)) and said() == ""
    size = {split: len(found.labels) for split, found in splits.items()}
    assert size["train"] + size["val"] == 2173 and 150 < size["val"] < 280 and size["test"] == 693
    for found in splits.values():
        assert found.images.shape[1] == 128 and found.texts.shape[1] == 10
        assert set(found.labels) == set(range(10)) and found.images.min() >= 0
        assert np.abs(found.texts.sum(1) - 1).max() < 1e-4  # shares of topics


# ---------------------------------------------------------------- batches of features

VIEWS, CAPTIONS = np.tile([1, 3, 2], 9)[:23], np.tile([2, 1, 5, 1], 6)[:23]


def features():
    """23 instances; every row is (its instance, its number within it)."""
    def rows(counts):
        return np.array([(i, k) for i, n in enumerate(counts) for k in range(n)], np.float32)
    return data.Features(rows(VIEWS), rows(CAPTIONS), VIEWS, CAPTIONS, np.arange(23) % 4, np.ones(23, bool))


def test_every_instance_once_per_epoch_with_rows_of_its_own():
    loader = data.FeatureLoader(features(), 5, seed=3)
    assert len(loader) == 5 and len(list(loader.batches())) == 5
    seen = {"images": set(), "texts": set()}
    epochs = []
    for epoch in range(40):
        parts = list(loader.batches(5 * epoch, 5 * epoch + 5))
        assert [len(b["index"]) for b in parts] == [5, 5, 5, 5, 3]
        epochs.append(tuple(torch.cat([b["index"] for b in parts]).tolist()))
        for batch in parts:
            for kind in seen:
                assert torch.equal(batch[kind][:, 0], batch["index"].float())
                seen[kind] |= set(map(tuple, batch[kind].tolist()))
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs) and len(set(epochs)) == 40
    for kind, counts in (("images", VIEWS), ("texts", CAPTIONS)):  # of five, one is missed once in 7,500
        assert seen[kind] == {(i, k) for i, n in enumerate(counts) for k in range(n)}
    other = next(data.FeatureLoader(features(), 23, seed=4).batches())["index"].tolist()
    assert tuple(other) != epochs[0]


def test_seed_step():
    def draw(*numbers):
        data.seed_step(*numbers)
        return torch.rand(3).tolist()
    drawn = {(s, t, r): draw(s, t, r) for s in (0, 1, 2 ** 40) for t in (0, 1, 10 ** 6) for r in (0, 1)}
    assert len(set(map(tuple, drawn.values()))) == 18
    assert draw(1, 10 ** 6, 1) == drawn[1, 10 ** 6, 1] and draw(1, 1) == draw(1, 1, 0)


# ---------------------------------------------------------------- tasks and classes

def table(path, rows, columns="image,caption,split,color"):
    Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    rows = [f"{i},a.png,thing {i},{row}" for i, row in enumerate(rows)]
    path.write_text("\n".join(["id," + columns, *rows]))
    return str(path)


def chosen(path, task=None):
    instances, classes = data.load(path)
    return data.choose_task(classes, task, path, instances)


def test_a_task_is_chosen_and_a_column_of_ids_is_none(tmp_path, said):
    """What else is refused: test_cmaclip.py, test_clip4cmr.py."""
    rows = [f"train,n{i % 1000},{('blue', 'red')[i % 2]},{('big', '')[i > 0]}" for i in range(2000)]
    path = table(tmp_path / "a.csv", [*rows, "val,n1,red,"], "image,caption,split,number,color,size")
    assert chosen(path) == "color"  # the first by name
    notes = said()
    assert "'number' has 1000 distinct values in 2000 training instances: taken as a remark" in notes
    assert "2000 labels are missing" in notes
    refused("--task number: .*a.csv has the tasks color, size .*remark", chosen, path, "number")
    some = np.append(np.full(25, 1), np.zeros(30, int))
    for count, problem in ((np.full(1000, 9), "1,000 distinct values in 9,000"),
                           (some, "25 distinct values in 25")):
        refused(f"styles.csv: task 'x' has {problem} training rows; these look like ids",
                data.check_classes, count, "styles.csv", "task 'x'")
    for fine in (np.full(999, 2), np.ones(20, int)):
        data.check_classes(fine, "a.csv", "x")
    assert "a.csv: x: 20 of 20 classes have a single training instance" in said()


def test_load_split(tmp_path, said):
    rows = ["train,red", "train,blue", "train,", "train,green", "train,blue",
            "val,blue", "val,", "test,green", "test,red"]
    path = table(tmp_path / "a.csv", rows)

    def load_split(path, split, task, known=None):
        return data.by_class(data.load(path, split=split, classes=known and {task: known}), task, path, split)
    train, names = load_split(path, "train", "color")
    assert names == ["blue", "green", "red"]
    assert [(x.id, x.group) for x in train] == [("0", "red"), ("1", "blue"), ("3", "green"), ("4", "blue")]
    assert f"{path} train: 1 of 5 instances have no known color; they were left out" in said()
    labels, captions, query = data.class_layout(train, ["red", "green", "blue"])  # the model's order
    assert labels.tolist() == [0, 2, 1, 2] and labels.dtype == np.int64
    assert captions.tolist() == [1] * 4 and query.tolist() == [True] * 4
    test, _ = load_split(path, "test", "color", ["blue", "red"])  # a model that never saw green
    assert [x.id for x in test] == ["8"] and "test: 1 of 2 instances have no known color" in said()


# ---------------------------------------------------------------- what tells two models apart

def test_identity():
    """Equal weights have the same, wherever they lie; another number, name, shape or type changes it."""
    model = clip.build("tiny-rn")
    known = clip.identity(model)
    assert clip.identity(model.eval().requires_grad_(False).to(memory_format=torch.channels_last)) == known

    def of(**entries):
        out = torch.nn.Module()
        for name, value in entries.items():
            out.register_buffer(name, value)
        return clip.identity(out)
    a, b = torch.arange(6.0), torch.ones(2)
    assert of(a=a, b=b) == of(b=b, a=a)
    others = (a, a.view(2, 3), a.view(3, 2), a.double(), a.view(torch.int32), a.flip(0))
    different = [of(a=a), of(a=a, c=b), of(b=a, a=b), *(of(a=x, b=b) for x in others)]
    assert len(set(different)) == len(different)


class Head(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.clip = torch.nn.Linear(2, 2)
        self.out = torch.nn.Linear(2, width)
        self.clipped = torch.nn.BatchNorm1d(width)  # a name that begins like clip's is a head's


def test_heads_go_and_come_back():
    model, other = Head(), Head()
    model.clipped.running_mean += 3
    heads = clip.describe_heads(model)
    assert heads.keys() == {name for name in model.state_dict() if not name.startswith("clip.")}
    before = {key: value.clone() for key, value in heads.items()}
    with torch.no_grad():
        model.out.weight += 1  # what was described is the model as it was
    own = other.clip.weight.clone()
    clip.load_heads(other, heads | {"clip.weight": torch.full((2, 2), 9.0)})  # CLIP's own are no head's
    assert all(torch.equal(value, before[key]) for key, value in clip.describe_heads(other).items())
    assert torch.equal(other.clip.weight, own)
    other.clip = None  # a model on features from files has no CLIP
    clip.load_heads(other, heads)


def test_heads_of_another_model_are_refused():
    model = Head()
    heads = clip.describe_heads(model)
    less = {key: value for key, value in heads.items() if key != "out.bias"}
    wider = clip.describe_heads(Head(4))
    for wrong, said in ((less, "out.bias"), (heads | {"out.more": torch.zeros(1)}, "out.more"),
                        (wider, "size mismatch|shape"), (heads | {"out.weight": [1, 2]}, "out.weight")):
        with pytest.raises(clip.CheckpointError, match="not this model's") as e:
            clip.load_heads(model, wrong)
        assert "\n" not in str(e.value) and re.search(said, str(e.value))
