"""Tests of data.py: what it reads, what it refuses and how it says so, the loader, the renderer.

Real photos lie in ../shared/data; tests that need them skip where it is absent.
"""
import argparse
import collections
import functools
import glob
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

import clip
import data
import train_mxm
from data import DataError, Instance
from eval import evaluation_loader, load_splits, training_loader  # the name eval would hide Python's own
from runs import spy

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, "..", "shared", "data")
REAL = os.path.join(SHARED, "text2shape")
REAL_SHAPES = sorted(glob.glob(os.path.join(REAL, data.VOXEL_FOLDER, "*", "*.nrrd")))


# ---------------------------------------------------------------- helpers, for the other tests of data.py too

@pytest.fixture(autouse=True)
def fresh_notes(monkeypatch):
    monkeypatch.setattr(data, "_noted", set())


def refused(pattern, function, *args, **kwargs):
    """The call raises DataError whose message is one line and matches; returns the message."""
    with pytest.raises(DataError) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert re.search(pattern, message), message
    assert message.isprintable() and len(re.sub(r"/\S*/", "", message)) < 500  # but for folders
    return message


def picture(path, seed=0, size=(20, 14)):
    """Write a picture of random pixels; returns its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def write(path, content):
    """Write text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def splits(name, root):
    return {split: data.load(name, str(root), split)[0] for split in ("train", "val", "test")}


@functools.lru_cache
def primitives(split):
    return data.primitives(split)[0]


@functools.lru_cache
def tokenizer():
    return clip.Tokenizer.train(["a red box", "a tall blue cone", "the wide torus"] * 3, 530)


def photos(folder, views=(1, 2, 3, 1, 2, 3, 1), captions=(2, 1, 3, 2, 1, 2, 2)):
    """Instances with these numbers of views and captions."""
    instances = []
    for i, (v, c) in enumerate(zip(views, captions)):
        files = [picture(f"{folder}/{i}-{k}.png", 10 * i + k, (9 + i, 12)) for k in range(v)]
        labels = {"parity": i % 2} if i != 2 else {}
        instances.append(Instance(str(i), files, [f"number {i} caption {k}" for k in range(c)], labels))
    return instances


def config(context_length, image_size):
    return replace(data.OPENAI, context_length=context_length, image_resolution=image_size)


def loader(instances, batch_size=3, views=2, captions=2, train=True, **kwargs):
    return data.Loader(instances, tokenizer(), config(32, 8), batch_size, views, captions, train=train,
                       **kwargs)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- the built-in data set

def test_primitives_counts_and_splits():
    names = ("train", "val", "test", "unseen")
    parts = {n: primitives(n) for n in names}
    assert [len(parts[n]) for n in names] == [4032, 504, 504, 756]
    asked = [x for x in parts["unseen"] if x.query]
    assert len(asked) == 252 and all(x.query for n in names[:3] for x in parts[n])

    def pairs(instances):
        return {(x.labels["shape"], x.labels["color"]) for x in instances}

    unseen = pairs(asked)
    seen = pairs(parts["train"])
    assert not unseen & seen
    for k in (0, 1):  # every single attribute of them was seen
        assert {pair[k] for pair in unseen} <= {pair[k] for pair in seen}
    ids = [{x.id for x in parts[n] if x.query} for n in names]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 4032 + 504 + 504 + 252
    assert [len({x.group for x in parts[n]}) for n in ("train", "unseen")] == [504, 756]
    x = parts["train"][0]
    assert len(x.images) == 12 and len(x.captions) == 5 and set(x.labels) == set(data.TASKS)


def test_the_two_parts_of_the_built_in_shapes():
    parts = {part: splits(f"primitives-{part}", None) for part in ("source", "target")}
    sizes = {part: [len(instances) for instances in parts[part].values()] for part in parts}
    assert sizes == {"source": [2880, 360, 360], "target": [396, 396, 396]}
    groups = {part: {x.group for instances in parts[part].values() for x in instances} for part in parts}
    assert not groups["source"] & groups["target"] and len(groups["source"] | groups["target"]) == 756
    assert {x.labels["shape"] for x in parts["source"]["train"]} == set(range(4))
    assert {x.labels["color"] for x in parts["source"]["train"]} == set(range(10))
    refused("primitives-target: no split 'unseen'", data.load, "primitives-target", split="unseen")
    known = {"color": ["pink", "red"]}  # of a model that learned other data
    instances, classes = data.load("primitives-target", split="val", classes=known)
    red, pink = (list(data.COLOURS).index(colour) for colour in ("red", "pink"))
    number = {red: 1, pink: 0}
    assert classes == known and [x.labels for x in instances] == [
        {"color": number.get(x.labels["color"], -1)} for x in parts["target"]["val"]]


def test_primitives_are_the_same_bits():
    """The generated data is part of published numbers: a change here makes them incomparable."""
    assert zlib.crc32("\n".join(c for x in primitives("test") for c in x.captions).encode()) == 4070203048
    assert zlib.crc32(b"".join(data.primitive_voxels(n, 0).tobytes() for n in range(0, 756, 63))) == 526526862


def test_primitive_captions_state_only_true_attributes():
    words = {}
    for task, values in data.TASKS.items():
        for i, (name, synonyms) in enumerate(values.items()):
            words |= {word: (task, i) for word in ([name] if task == "color" else synonyms)}
    pattern = re.compile("|".join(rf"\b{w}\b" for w in words))
    for x in primitives("val"):
        number, sample = map(int, x.id.split("-"))
        for k, caption in enumerate(x.captions):
            said = [words[w] for w in pattern.findall(caption)]
            assert all(x.labels[task] == i for task, i in said), (caption, x.labels)
            stated = data.primitive_caption(number, sample, k)[1]
            assert {list(data.TASKS).index(task) for task, _ in said} == stated and len(said) == len(stated)


def test_oracle_equals_brute_force():
    some = primitives("unseen")[:300:7] + primitives("test")[::40]
    scores = data.primitives_oracle(some)
    row = 0
    for x in some:
        number, sample = map(int, x.id.split("-"))
        for k in range(5):
            stated = [list(data.TASKS)[i] for i in data.primitive_caption(number, sample, k)[1]]
            fits = [all(y.labels[t] == x.labels[t] for t in stated) for y in some]
            assert scores[row].tolist() == pytest.approx([f / sum(fits) for f in fits])
            row += 1
    assert row == len(scores) and scores.dtype == torch.float32


# ---------------------------------------------------------------- the words of captions

def test_word_terms():
    of_captions, of_instances = data.word_terms([Instance("0", [""], ["A RED, red cone.", "…"]),
                                                 Instance("1", [""], ["ein grüner Kegel"])])
    assert of_captions == [["a", "cone", "red"], ["…"], ["ein", "grüner", "kegel"]]
    assert of_instances == [["a", "cone", "red", "…"], ["ein", "grüner", "kegel"]]


def test_shared_terms_are_counted_by_a_loop():
    """In any order and choice of captions and instances."""
    of_instances = [["a", "box", "cone", "red"], ["a", "red"], ["box"], ["a", "thing"]]
    of_captions = [["a", "cone", "red"], ["box"], ["a", "red"], ["a"], ["box"], ["thing"], ["a"]]
    shared = data.SharedTerms(of_captions, of_instances, "cpu")
    captions, instances = torch.tensor([6, 0, 2, 5, 0]), torch.tensor([3, 0, 1])
    found = shared(captions, instances)
    assert found.shape == (5, 3)
    for row, c in zip(found, captions):
        idf = {w: math.log(5 / sum(w in terms for terms in of_instances)) for w in of_captions[c]}
        for score, j in zip(row, instances):
            expected = sum(idf[w] for w in idf if w in of_instances[j]) / sum(idf.values())
            assert score.item() == pytest.approx(expected, abs=1e-6)


BYTES = clip.Tokenizer([])  # a token for every letter


def between(row):
    """The tokens between start and end; the row is well formed."""
    end = int(row.argmax())
    assert row[0] == BYTES.start and row[end] == BYTES.end and (row[end + 1:] == 0).all()
    assert row.dtype == torch.int32
    return row[1:end].tolist()


def test_words_are_changed_at_their_rates():
    """10,000 words of two letters, each kept, masked, replaced by two other tokens or dropped; in order."""
    words = ["".join(letters) for letters in itertools.product("abcde", "vwxyz")]
    tokens = BYTES([" ".join(words)] * 400, 60)
    pairs = [tuple(BYTES.encode(word)) for word in words]
    mask = (BYTES.start, BYTES.start)
    before = tokens.clone()
    torch.manual_seed(0)
    out = data.changed_words(tokens, BYTES)
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


def test_words_are_kept_whole(monkeypatch):
    """Without replacement, what comes out of a caption are all ways to keep, mask or drop each of its words,
    and no other; the last word was cut where the row is full. One word at least remains."""
    monkeypatch.setattr(data, "CHANGED", 0.6)
    monkeypatch.setattr(data, "REPLACED", 0.0)
    torch.manual_seed(0)
    tokens = BYTES(["a bc defg hijklmnopq"], 17, truncate=True)
    words = [BYTES.encode(word)[:8] for word in ("a", "bc", "defg", "hijklmnopq")]
    ways = set()  # no two ways are the same tokens
    for kinds in itertools.product(("keep", "mask", "drop"), repeat=4):
        ids = []
        for word, kind in zip(words, kinds):
            ids += {"keep": word, "mask": [BYTES.start] * len(word), "drop": []}[kind]
        ways.add(tuple(ids or words[0]))
    out = data.changed_words(tokens.expand(3000, -1), BYTES)
    assert len(ways) == 80 and {tuple(between(row)) for row in out} == ways
    assert between(data.changed_words(BYTES(["", "ab"], 8), BYTES)[0]) == []
    monkeypatch.setattr(data, "CHANGED", 0.0)
    assert torch.equal(data.changed_words(tokens, BYTES), tokens)


# ---------------------------------------------------------------- the renderer

def march(voxels, view, size):
    """The renderer written as loops over pixels, steps and voxels."""
    n = len(voxels)
    where = np.argwhere(voxels[..., 3] > 127)
    solid = set(map(tuple, where.tolist()))
    image = np.full((size, size, 3), 255, np.uint8)
    if not solid:
        return image
    middle = (where.min(0) + where.max(0) + 1) / 2
    a = math.radians(30 * view)
    e = math.radians(30)
    right = np.array([math.cos(a), 0, -math.sin(a)])
    up = np.array([-math.sin(a) * math.sin(e), math.cos(e), -math.cos(a) * math.sin(e)])
    back = np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    light = data.LIGHT @ [right, up, back]
    wide, high, deep = where.max(0) + 1 - where.min(0)
    tallest = math.cos(e) * high + math.sin(e) * math.hypot(wide, deep)  # of all views
    window = n * (math.cos(e) + 2 ** 0.5 * math.sin(e)) if tallest > n * 2 ** 0.5 else n * 2 ** 0.5
    steps = math.ceil(3 ** 0.5 * (n + 8))

    @functools.cache
    def blurred(x, y, z):
        near = ((i, j, k) for i in range(5) for j in range(5) for k in range(5))
        return sum(math.prod((1, 4, 6, 4, 1)[q] for q in (i, j, k)) for i, j, k in near
                   if (x + i - 2, y + j - 2, z + k - 2) in solid)
    for r in range(size):
        for c in range(size):
            u, v = (((k + 0.5) / size - 0.5) * window for k in (c, size - 1 - r))
            for t in range(steps):
                at = middle + u * right + v * up - (t - (steps - 1) / 2) * back
                x, y, z = map(math.floor, at)
                if (x, y, z) in solid:
                    normal = np.array([blurred(i - 1, j, k) - blurred(i + 1, j, k),
                                       blurred(i, j - 1, k) - blurred(i, j + 1, k),
                                       blurred(i, j, k - 1) - blurred(i, j, k + 1)])
                    cosine = normal @ light / max(1, np.linalg.norm(normal))
                    image[r, c] = voxels[x, y, z, :3] * (0.55 + 0.45 * max(0, cosine))
                    break
                i, j, k = x, y, z  # where the ray was before
    return image


@pytest.mark.parametrize("grid, size, view",
                         [(1, 4, 0), (4, 10, 1), (5, 16, 5), (8, 18, 3), (9, 12, 11), (9, 16, 8)])
def test_renderer_equals_ray_marching(grid, size, view):
    rng = np.random.default_rng(grid)
    for solid, (x, y, z) in ((0, (0, 0, 0)), (0.06, (0, 0, 0)), (1, (0, 0, 0)), (0.7, (2, 1, 0)),
                             (0.7, (0, 3, 1))):
        voxels = rng.integers(0, 256, (grid, grid, grid, 4), dtype=np.uint8)
        voxels[..., 3] = np.where(rng.random((grid, grid, grid)) < solid, 128, 127)  # only over 127 is solid
        voxels[:x, ..., 3] = voxels[:, :y, :, 3] = voxels[:, :, :z, 3] = 0
        ours = data.render(voxels, view, size).astype(int)
        loops = march(voxels, view, size)
        assert (ours != 255).any() == (voxels[..., 3] > 127).any()
        assert np.abs(ours - loops).max() <= 1  # float32 against float64, cut to whole levels


def extent(image):
    """(first, last) row, (first, last) column of what is not white."""
    ink = (image != 255).any(-1)
    return [line.nonzero()[0][[0, -1]] for line in (ink.any(1), ink.any(0))]


# ---------------------------------------------------------------- pictures

def test_square_equals_torchvision():
    rng = np.random.default_rng(0)
    sizes = [(1, 300), (300, 1), (2, 300), (3, 180), (8, 8), (8, 31), (17, 8), (7, 7), (33, 34), (224, 225)]
    sizes += [(2, 3)] + [tuple(rng.integers(1, 120, 2).tolist()) for _ in range(60)]
    for w, h in sizes:
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for size in (8, 31):
            resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
            theirs = transforms.CenterCrop(size)(resize(image))
            away = np.abs(data.square(image, size).astype(int) - np.asarray(theirs)).max()
            assert away <= (20 if max(w, h) > 64 * min(w, h) else 0), (w, h, size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from the kernel")
def test_long_thin_picture_takes_little_memory(tmp_path):
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((1, 5000), (5000, 1)):
        path = picture(tmp_path / "thin.png", 0, size)
        before = peak()
        assert data.pixels(path, 336).shape == (336, 336, 3)
        assert peak() - before < 200_000  # KiB; resizing all of it takes 2 GiB


def test_pictures_of_every_kind(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = np.stack([levels] * 3, -1)

    def read(name, image, **save):
        image.save(tmp_path / name, **save)
        return np.asarray(data.open_image(tmp_path / name))
    for name, array in (("grey.png", levels), ("16.png", levels.astype(np.uint16) * 257),
                        ("32.tif", levels.astype(np.int32) * 257), ("float.tif", levels.astype(np.float32))):
        assert np.array_equal(read(name, Image.fromarray(array)), grey), name
    for top in (1 / 255, 1, 16, 257, 1 << 22):  # 0..1, 8, 12 and 16 bits, larger: each by its range
        kind = np.float32 if top < 1 else np.int32
        scaled = read("range.tif", Image.fromarray((levels * np.float64(top)).astype(kind))).astype(int)
        assert np.abs(scaled - grey).max() <= 1, top
    with_nan = (levels / np.float32(255))
    with_nan[3, 4] = np.nan
    assert read("nan.tif", Image.fromarray(with_nan))[3, 4].max() == 0
    for name, scale in (("12.png", 16), ("16.tif", 257)):
        deep = read(name, Image.fromarray(levels.astype(np.uint16) * scale)).astype(int)
        assert np.abs(deep - grey).max() <= 1
    stored = read("12.tif", Image.fromarray(levels.astype(np.uint16) * 16))  # a TIFF is shown as it is stored
    assert np.abs(stored - grey / 16).max() <= 1
    for array in (levels // 2 * np.uint16(257), levels // 2 / np.float32(255), levels * np.int32(0)):
        dark = read("dark.tif", Image.fromarray(array))  # by the range of its kind, not by its own maximum
        assert np.abs(dark - np.minimum(levels // 2, array * 255.0)[..., None]).max() <= 1
    palette = Image.fromarray(levels)
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    expected = np.stack([255 - levels, levels, np.full_like(levels, 7)], -1)
    assert np.array_equal(read("palette.png", palette), expected)
    cmyk = Image.fromarray(np.full((8, 8, 3), (200, 30, 60), np.uint8)).convert("CMYK")
    assert np.abs(read("cmyk.jpg", cmyk, quality=95)[4, 4].astype(int) - (200, 30, 60)).max() < 8
    clear = Image.fromarray(np.full((4, 4, 4), (10, 20, 30, 0), np.uint8))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert read("clear.png", clear)[0, :2].tolist() == [[255] * 3, [10, 20, 30]]
    index = Image.fromarray(np.eye(4, dtype=np.uint8))
    index.putpalette([0, 0, 0, 9, 9, 9])
    assert read("index.png", index, transparency=0)[0, :2].tolist() == [[9] * 3, [255] * 3]
    frames = [Image.new("RGB", (5, 4), c) for c in ("red", "blue", "lime")]
    assert (read("moving.gif", frames[0], save_all=True, append_images=frames[1:]) == (255, 0, 0)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn a quarter to the right
    halves = np.zeros((16, 32, 3), np.uint8)
    halves[:, :16] = 250
    turned = read("turned.jpg", Image.fromarray(halves), exif=exif)
    assert turned.shape == (32, 16, 3) and turned[:12].min() > 200 and turned[20:].max() < 50


def test_broken_metadata_never_stop_a_picture(tmp_path):
    texts = [b"interlace", b"transparency", b"exif", b"xmp", b"Raw profile type exif"]
    chunks = [(b"tEXt", key + b"\0\nno\n3\nzz") for key in texts]
    chunks += [(b"eXIf", b"garbage"), (b"iCCP", b""), (b"pHYs", b"x"), (b"zTXt", b"a\0\5"), (b"iTXt", b"a"),
               (b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    for kind, body in chunks:  # behind the header
        chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        (tmp_path / "a.png").write_bytes(out.getvalue()[:33] + chunk + out.getvalue()[33:])
        assert np.array_equal(data.open_image(tmp_path / "a.png"), pixels), chunk[:20]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg")
    good = out.getvalue()
    for mark, body in ((0xE1, b"Exif\0\0garbage"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff"),
                       (0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0x"), (0xFE, b"\xff"),
                       (0xED, b"Photoshop 3.0\x008BIM\x03\xed")):
        segment = bytes([0xFF, mark]) + struct.pack(">H", len(body) + 2) + body
        (tmp_path / "a.jpg").write_bytes(good[:2] + segment + good[2:])
        assert np.array_equal(data.open_image(tmp_path / "a.jpg"), np.asarray(Image.open(io.BytesIO(good))))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "b.jpg", exif=exif)  # truncated and turned: an error, not black
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-200])
    refused("b.jpg: .*truncated", data.open_image, str(tmp_path / "b.jpg"))


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("crop", [None, 0.5])
def test_loader_is_the_same_for_all_workers_and_starts(crop, tmp_path):
    torch.manual_seed(5)
    instances = photos(tmp_path)
    before = torch.get_rng_state()
    plain = list(loader(instances, crop=crop).batches(0, 5))  # two and a half epochs
    assert len(plain) == 5 and len(loader(instances)) == 2
    for kwargs in (dict(workers=1), dict(workers=2), dict(cache_bytes=0), dict(cache_bytes=0, workers=2)):
        again = loader(instances, crop=crop, **kwargs)
        assert (again.cache is None) == ("cache_bytes" in kwargs)
        assert all(map(equal, plain, again.batches(0, 5))) and all(map(equal, plain[3:], again.batches(3, 5)))
    assert list(loader(instances, workers=2).batches(4, 4)) == []
    assert torch.equal(before, torch.get_rng_state())  # a resumed run must not draw from it once more
    assert not all(map(equal, plain, loader(instances, crop=crop, seed=1).batches(0, 5)))
    epochs = [torch.cat([b["index"] for b in plain[at:at + 2]]) for at in (0, 2)]
    assert not torch.equal(*epochs)  # another order


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each worker has a cache of its own")
def test_loader_workers_fill_the_cache(tmp_path):
    instances = photos(tmp_path)
    twice = loader(instances, workers=1, train=False, views=None)
    first = list(twice.batches())
    assert twice.sides.all()
    for x in instances:
        for path in x.images:
            os.unlink(path)
    assert all(map(equal, first, twice.batches()))


def test_loader_draws_without_replacement_and_masks(tmp_path):
    instances = photos(tmp_path, views=(1, 2, 3, 4), captions=(1, 3, 5, 2))
    batches = loader(instances, batch_size=4, views=3, captions=3)
    known = {}
    for i, x in enumerate(instances):
        for k, path in enumerate(x.images):
            known[tuple(data.pixels(path, 8).ravel())] = (i, k)
    drawn = collections.Counter()
    for step in range(40):
        b = batches.make(step)
        assert sorted(b["index"].tolist()) == [0, 1, 2, 3]
        for row, i in enumerate(b["index"].tolist()):
            views = min(3, len(instances[i].images))
            captions = min(3, len(instances[i].captions))
            assert b["image_mask"][row].tolist() == [k < views for k in range(3)]
            assert b["caption_mask"][row].tolist() == [k < captions for k in range(3)]
            shown = [known[tuple(v.permute(1, 2, 0).flatten().tolist())] for v in b["images"][row, :views]]
            assert len(set(shown)) == views and all(instance == i for instance, _ in shown)
            drawn.update(shown)
            texts = set(map(tuple, b["tokens"][row, :captions].tolist()))
            assert len(texts) == captions
            assert texts <= set(map(tuple, tokenizer()(instances[i].captions, 32).tolist()))
            assert not b["images"][row, views:].any() and not b["tokens"][row, captions:].any()
            numbers = b["caption"][row, :captions]
            assert torch.equal(batches.tokens[numbers], b["tokens"][row, :captions])
            assert (batches.caption_owner[numbers] == i).all() and (b["caption"][row, captions:] == -1).all()
            assert b["labels"]["parity"][row] == instances[i].labels.get("parity", -1)
    assert len(drawn) == 10 and min(drawn[3, k] for k in range(4)) > 15  # each of four, three times in four


def test_long_captions_are_cut_counted_and_said_once(capsys, monkeypatch):
    instances = [Instance("a", [None], ["red box " * 60, "red box"]), Instance("b", [None], ["cone " * 90])]
    for _ in range(2):
        tokens = data.Loader(instances, tokenizer(), config(77, 8), 2).tokens
    assert capsys.readouterr().err.count("note: 2 of 3 captions are longer than 77 tokens and were cut") == 1
    assert tokens.shape == (3, 77) and (tokens[[0, 2], -1] == tokenizer().end).all() and tokens[1, -1] == 0
    monkeypatch.setenv("RANK", "1")  # notes come from the first process only
    data.note("something")
    assert capsys.readouterr().err == ""


def test_loader_errors(tmp_path):
    instances = photos(tmp_path)
    refused("--batch-size 3: no multiple of the 2 processes", loader, instances, world=2)
    os.unlink(instances[3].images[0])
    for workers in (0, 2):
        batches = loader(instances, train=False, workers=workers).batches()
        assert "Traceback" not in refused("3-0.png: No such file", list, batches)
        assert multiprocessing.active_children() == []  # what still holds the error does not hold workers


@pytest.mark.parametrize("how", [dict(), dict(image_mean=(0.5, 0.5, 0.4), image_std=(0.5, 0.4, 0.5)),
                                 dict(squash=True), dict(interpolation="bilinear"), dict(image_resize=40)])
def test_a_clips_pictures_are_what_its_own_preprocessing_gives(how, tmp_path):
    path = picture(tmp_path / "a.png", 3, (61, 43))
    instances = [Instance("a", [path], ["a"], {"t": 1})]
    model = clip.build("tiny", tokenizer())
    model.config = replace(model.config, **how)
    args = argparse.Namespace(batch_size=1, seed=0, workers=0, crop=None)
    for made in (training_loader(args, instances, model), evaluation_loader(model, instances)):
        batch = made.make(0)
        moved = data.to_device(batch, torch.device("cpu"))
        theirs = clip.Preprocess(model.config)(Image.open(path))
        assert torch.allclose(moved["images"][0, 0], theirs, atol=1e-5)
        assert batch["images"].dtype == torch.uint8 and moved["labels"]["t"].tolist() == [1]


# ---------------------------------------------------------------- random crops

class TorchDraws:
    """torch's global generator with the methods of numpy's that `crop_box` calls."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, n):
        return torch.randint(0, n, (1,)).item()


def test_crops_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    for w, h in ((40, 30), (30, 45), (64, 64), (50, 7), (3, 90), (1, 1)):
        picture = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        image = Image.fromarray(picture)
        for smallest in (0.1, 0.5, 0.9):
            theirs = transforms.RandomResizedCrop(8, (smallest, 1), data.RATIOS)
            for seed in range(20):
                torch.manual_seed(seed)
                top, left, height, width = theirs.get_params(image, theirs.scale, theirs.ratio)
                torch.manual_seed(seed)
                box = data.crop_box(w, h, smallest, TorchDraws())
                assert np.abs(np.subtract(box, (left, top, width, height))).max() <= 1  # theirs is float32
                part = data.random_crop(picture, 8, smallest, np.random.default_rng(seed), False)
                left, top, width, height = data.crop_box(w, h, smallest, np.random.default_rng(seed))
                expected = transforms.functional.resized_crop(
                    image, top, left, height, width, [8, 8], transforms.InterpolationMode.BICUBIC)
                assert np.array_equal(part, expected)


def test_what_is_kept_fills_the_smallest_crop(tmp_path):
    for w, h in ((300, 200), (97, 260), (200, 200)):
        instances = [Instance("a", [picture(tmp_path / f"{w}.png", 0, (w, h))], ["a"])]
        for crop in (0.5, 0.9):
            crops = data.Loader(instances, tokenizer(), config(32, 32), 1, 1, 1, train=True, crop=crop)
            crops.make(0)
            kept = crops._decoded(0, 0)
            assert kept.size <= crops.cache.size == 3 * crops.area < 32 * 32 * 3 * 3.1
            assert abs(kept.shape[1] / kept.shape[0] - w / h) < 0.05 * w / h
            assert (crop * 3 / 4 * kept.shape[0] * kept.shape[1]) ** 0.5 >= 32.5  # its shorter side
    small = data.crop_source(picture(tmp_path / "small.png", 0, (20, 14)), 5000)
    assert np.array_equal(small, data.open_image(str(tmp_path / "small.png")))  # never made larger
    assert data.crop_source(picture(tmp_path / "thin.png", 0, (5000, 1)), 600).shape == (1, 600, 3)
    caches = [loader(instances, 1, 1, 1, crop=crop, cache_bytes=8 * 8 * 3).cache for crop in (1, 0.9, 0.5)]
    assert [cache is None for cache in caches] == [False, True, True]  # more memory than allowed


def test_crops_change_with_epoch_view_and_pair_and_only_in_training(tmp_path):
    file = picture(tmp_path / "a.png", 0, (60, 50))
    instances = [Instance(str(i), [file, file], ["a", "b", "c"]) for i in range(2)]
    plain = loader(instances, 2)
    for off in (None, 0, 1):
        assert all(map(equal, plain.batches(0, 3), loader(instances, 2, crop=off).batches(0, 3)))
    both = [loader(instances, 2, train=False, crop=crop).make(0) for crop in (None, 0.5)]
    assert equal(*both)
    crops = loader(instances, 2, crop=0.5)
    shown = torch.cat([crops.make(step)["images"].flatten(0, 1) for step in range(3)])
    assert len(shown.unique(dim=0)) == 12  # two instances, two views, three epochs: never the same part
    shown = loader(instances, 6, 1, None, pairs=True, crop=0.5).make(0)["images"]
    assert len(shown.unique(dim=0)) == 6  # each caption with a part of its own


def test_no_mirror_where_a_caption_speaks_of_left_or_right(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, 10:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    captions = (["a cleft", "it is bright"], ["a thing", "the Left-hand side"], ["Turn right."])
    instances = [Instance(str(i), [str(tmp_path / "a.png")], texts) for i, texts in enumerate(captions)]
    crops = loader(instances, 3, 1, 1, crop=0.9)
    mirrored = np.zeros(3)
    for step in range(30):
        batch = crops.make(step)
        first, last = batch["images"][:, 0, 0, :, [0, -1]].float().mean(1).T
        mirrored[batch["index"]] += (first > last).numpy()
    assert 5 < mirrored[0] < 25 and mirrored[1:].tolist() == [0, 0]


def test_which_data_is_cropped_by_default(tmp_path):
    files = photos(tmp_path)
    assert [data.default_crop("flickr8k", files, pretrained) for pretrained in (False, True)] == [0.5, 0.9]
    for name in ("text2shape", "msrvtt", "msvd", "didemo", "activitynet"):
        assert data.default_crop(name, files, True) is None
    regions = [Instance("a", [data.RegionView("a.npy", 0)], ["a"])]
    for other in (primitives("val"), regions, [Instance("a", [data.H5View("a.h5", 0)], ["a"])]):
        assert data.default_crop("flickr30k", other, False) is None
    refused("--crop: only pictures in files can be cropped", loader, regions, 1, crop=0.5)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"images": [f"{i}-0.png"], "captions": ["x"], "split": split}) + "\n"
                            for i, split in enumerate(("train", "val", "test"))))
    for words, crop in (([], 0.9), (["--clip", "tiny"], 0.5), (["--crop", "0"], None)):
        args = train_mxm.settings(["--data", str(path), *words])
        load_splits(args)
        assert (args.crop or None) == crop


# ---------------------------------------------------------------- published photo sets, Text2Shape

@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/flickr8k"), reason="needs ../shared/data/flickr8k")
def test_flickr8k():
    parts = splits("flickr8k", f"{SHARED}/flickr8k")
    assert [len(part) for part in parts.values()] == [600, 100, 100]
    instances = [x for part in parts.values() for x in part]
    assert len({x.id for x in instances}) == 800
    assert all(len(x.captions) == 5 and len(x.images) == 1 and x.labels == {} for x in instances)
    batch = loader(instances, 4, 1, 5, train=False).make(0)
    assert batch["images"].float().std() > 20 and batch["caption_mask"].all()


def test_coco(tmp_path, capsys):
    images = []
    for file, split, captions, folder in (("a.jpg", "train", [" A dog. "], "train2014"),
                                          ("a.jpg", "restval", ["a cat", "  "], "val2014"),
                                          ("c.jpg", "val", ["c"], "val2014")):
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        images.append({"filename": file, "filepath": folder, "split": split, "sentences": sentences})
    write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    files = [picture(tmp_path / folder / "a.jpg") for folder in ("train2014", "val2014")]
    train, classes = data.load("coco", str(tmp_path), "train")
    assert [x.id for x in train] == ["train2014/a.jpg", "val2014/a.jpg"] and classes == {}
    assert [x.captions for x in train] == [["A dog."], ["a cat"]] and [x.images[0] for x in train] == files
    assert "and 1 empty captions were left out" in capsys.readouterr().err
    refused("val2014/c.jpg: No such file; .*val2014 holds a.jpg", data.load, "coco", str(tmp_path), "val")


def nrrd(voxels, encoding="gzip", newline="\n", sizes=None, extra=(), kind="uint8", axes=(1, 2, 0),
         signs=(1, 1, 1), directions=None):
    """The bytes of a voxel file. Its first axis, which varies fastest, is the channel; the others run along
    these of x, y, z (as published: y, z, x), or with a sign of -1 against them."""
    vectors = np.diag(signs)[:, np.argsort(axes)] * 0.0028756132815033197
    stated = " ".join(f"({','.join(map(repr, vector))})" for vector in vectors.tolist())
    directions = f"space directions: none {stated}" if directions is None else directions
    header = ["NRRD0004", "# Complete NRRD file format specification at:", f"type: {kind}", "dimension: 4",
              "space dimension: 3", f"sizes: {sizes or '4 ' + ' '.join(map(str, voxels.shape[:3]))}",
              *([directions] if directions else []), *extra, f"encoding: {encoding}", "", ""]
    body = voxels.transpose(*axes[::-1], 3)[tuple(slice(None, None, sign) for sign in signs[::-1])].tobytes()
    return newline.join(header).encode("latin1") + (body if encoding == "raw" else gzip.compress(body))


def cube(seed, n=6):
    return np.random.default_rng(seed).integers(0, 256, (n, n, n, 4), dtype=np.uint8)


COMMENTS = ["# a: comment", "type:=float", "space directions:=none (1,0,0)"]


@pytest.mark.parametrize("options", [
    dict(), dict(encoding="gz", newline="\r\n"), dict(encoding="raw", newline="\r\n"),
    dict(sizes="  4 \t6  6 6 "), dict(kind="unsigned char", extra=COMMENTS),
    dict(directions=""), dict(directions="space directions:  none(0, 2e-3,1e-19)\t( 0,-0.0,3) (1,0,0)")])
def test_nrrd(tmp_path, options):
    (tmp_path / "a.nrrd").write_bytes(nrrd(cube(1), **options))
    assert np.array_equal(data.read_nrrd(str(tmp_path / "a.nrrd")), cube(1))


def test_nrrd_axes(tmp_path):
    """However the axes of a file lie, x, y and z are read."""
    path = tmp_path / "a.nrrd"
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            path.write_bytes(nrrd(cube(2), "raw", axes=axes, signs=signs))
            assert np.array_equal(data.read_nrrd(str(path)), cube(2))


def test_nrrd_equals_pynrrd(tmp_path):
    pynrrd = pytest.importorskip("nrrd")
    (tmp_path / "a.nrrd").write_bytes(nrrd(cube(3), axes=(2, 0, 1), signs=(-1, 1, -1)))
    for path in [str(tmp_path / "a.nrrd"), *REAL_SHAPES]:
        theirs, header = pynrrd.read(path)  # axes as in the file
        directions = header["space directions"][1:]
        for i, vector in enumerate(directions, 1):
            theirs = np.flip(theirs, i) if vector.sum() < 0 else theirs
        order = [1 + np.flatnonzero(directions[:, axis]).item() for axis in range(3)]
        assert np.array_equal(data.read_nrrd(path), theirs.transpose(*order, 0))


GOOD_NRRD, RAW_NRRD = nrrd(cube(1)), nrrd(cube(1), "raw")
BAD_SIZES = ["3 6 6 6", "4 6 6 7", "4 0 0 0", "4 \xb2 \xb2 \xb2", "4 " + " ".join(["9" * 5000] * 3)]
BAD_DIRECTIONS = [
    "none (1,0,0)", "(1,0,0) (0,1,0) (0,0,1) none", "none (1,0,0) (0,1,0) (0,1,0)",
    "none (1,0,0) (0,1,0) (0,0,nan)", "none (1,0,0) (0,1,0.1) (0,-0.1,1)", "none (1,0,0) (0,1,0) (0,0,x)"]
BAD_NRRD = [
    (b"PK" + GOOD_NRRD, "not an NRRD"), (b"NRRD0004\n" + b"a" * 100000, "not an NRRD"),
    (nrrd(cube(1), kind="float"), "type float"), (GOOD_NRRD.replace(b"type:", b"tipe:"), r"type \?"),
    *[(nrrd(cube(1), sizes=sizes), "sizes .*; expected 4 n n n") for sizes in BAD_SIZES],
    *[(nrrd(cube(1), directions=f"space directions: {stated}"), "refused.*expected space directions of none")
      for stated in BAD_DIRECTIONS],
    (nrrd(cube(1), "hex"), "encoding hex; expected gzip or raw, in the same file"),
    (GOOD_NRRD[:-300], "ended before the end-of-stream.*get it again"),
    (RAW_NRRD[:-1], "holds 863 bytes of voxels, its sizes need 864"), (RAW_NRRD + b"x", "holds 865")]


def test_broken_nrrd(tmp_path):
    path = tmp_path / "a.nrrd"
    for content, said in BAD_NRRD:
        path.write_bytes(content)
        refused(f"a.nrrd: .*{said}", data.read_nrrd, str(path))


needs_shapes = pytest.mark.skipif(not REAL_SHAPES, reason="needs ../shared/data/text2shape")


def copy_shapes(root):
    shutil.copytree(REAL, root, dirs_exist_ok=True, copy_function=shutil.copyfile)


@needs_shapes
def test_text2shape_without_splits_voxels_or_with_views(tmp_path, capsys):
    copy_shapes(tmp_path)
    published = splits("text2shape", REAL)
    for name in data.SPLIT_FILES:
        os.unlink(tmp_path / name)
    first, second = sorted(x.id for x in published["train"])[:2]
    for k in (10, 2, 1):
        picture(tmp_path / "views" / first / f"{k:02d}.png", k)
    shutil.rmtree(tmp_path / data.VOXEL_FOLDER / second)
    write(tmp_path / "views" / second / "notes.txt", "no picture")
    capsys.readouterr()
    instances, _ = data.load("text2shape", str(tmp_path), "all")  # by hash: nothing of it is lost
    assert {x.id for x in instances} == {x.id for part in published.values() for x in part} - {second}
    assert re.search("all, 6 of 12 rows without a picture", capsys.readouterr().err)
    views = next(x.images for x in instances if x.id == first)
    assert [os.path.basename(view) for view in views] == ["01.png", "02.png", "10.png"]


@needs_shapes
def test_real_shapes_are_whole_and_in_the_middle():
    parts = splits("text2shape", REAL)
    assert [len(part) for part in parts.values()] == [5, 1, 1]
    assert [x.labels["category"] for x in parts["train"]] == [0, 0, 0, 1, 0]  # Chair, Table
    assert parts["test"][0].captions == ["the table is round and has 3 legs . the table is rotating ."]
    for x in itertools.chain(*parts.values()):
        voxels = data.read_nrrd(x.images[0].file)
        assert [image.view for image in x.images] == [*range(7, 12), *range(7)]
        assert np.array_equal(data.pixels(x.images[4], 16), data.render(voxels, 11, 16))
        voxels &= np.uint8([0, 0, 0, 255])  # black: all that is solid shows
        for view in range(12):
            (top, bottom), (left, right) = extent(data.render(voxels, view, 64))
            assert min(top, left) > 0 and max(bottom, right) < 63
            assert view % 3 or abs(left + right - 63) <= 1  # along an axis it is as wide as its box


def fitted(image):
    """float (32, 32, 3): what is not white, made as large as fits."""
    (top, bottom), (left, right) = extent(image)
    cut = Image.fromarray(image[top:bottom + 1, left:right + 1])
    return np.asarray(ImageOps.pad(cut, (32, 32), color="white"), float)


@needs_shapes
def test_real_shapes_look_like_their_reference():
    """The reference camera stands between views 7 and 8. Lying, upside down or turned, a shape differs more
    (mirrored it does not: most are symmetric)."""
    differ = collections.Counter()
    for path in REAL_SHAPES:
        voxels = data.read_nrrd(path)
        theirs = Image.open(os.path.join(REAL, "reference", os.path.basename(path)[:-5] + ".png"))
        white = Image.new("RGBA", theirs.size, "white")
        theirs = np.asarray(Image.alpha_composite(white, theirs).convert("RGB"))
        for axes in itertools.permutations(range(3)):
            for up, near in itertools.product((1, -1), repeat=2):
                turned = voxels.transpose(*axes, 3)[:, ::up, ::near]
                for view in (7, 8):
                    ours = data.render(turned, view, 64)
                    differ[axes, up, near] += np.abs(fitted(ours) - fitted(theirs)).mean()
                    if (axes, up, near) == ((0, 1, 2), 1, 1):
                        means = [image[(image != 255).any(-1)].mean(0) for image in (ours, theirs)]
                        assert means[0] @ means[1] > 0.995 * math.prod(map(np.linalg.norm, means))  # colours
    upright = differ.pop(((0, 1, 2), 1, 1))
    assert len(differ) == 23 and upright < 0.85 * min(differ.values())


@needs_shapes
def test_broken_text2shape(tmp_path):
    copy_shapes(tmp_path)
    val = tmp_path / "processed_captions_val.p"
    for value in ({"a": 1}, {"caption_tuples": [(1, 2)]}):
        val.write_bytes(pickle.dumps(value))
        refused("processed_captions_val.p: .*expected 'caption_tuples'",
                data.load, "text2shape", str(tmp_path))
    os.unlink(val)
    refused("only processed_captions_train.p, processed_captions_test.p; put all three there, or none",
            data.load, "text2shape", str(tmp_path))


# ---------------------------------------------------------------- pickles

class Call:
    """Pickles as a call of anything, with a state besides: what a malicious file does."""

    def __init__(self, function, arguments, *state):
        self.reduced = (function, arguments, *state)

    def __reduce__(self):
        return self.reduced


def forged(dtype, content, shape=(1,)):
    """An array whose stated type and content disagree."""
    reconstruct = np.zeros(0).__reduce__()[0]
    return Call(reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content))


def flagged(code):
    """A type whose flags make numpy take bytes for object pointers."""
    return Call(np.dtype, (code, False, True), (3, "|", None, None, None, -1, -1, 0))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_would_run_code_are_refused(tmp_path, protocol):
    mark = tmp_path / "mark"
    mkdir = Call(os.mkdir, (str(mark),))
    scalar = np.float64(0).__reduce__()[0]
    evil = [
        mkdir, Call(os.mkdir, (str(mark),), {"a": 1}), collections.defaultdict(list, {1: mkdir}),
        Call(collections.defaultdict, (os.mkdir,)), Call(eval, (f"open({str(mark)!r}, 'w')",)),
        Call(np.save, (str(mark), 1)), Call(getattr, ("a", "upper")), Call(type, ("X", (), {})),
        data.H5View("a", 0), torch.zeros(2), np.dtype([("a", "O")]),
        forged(flagged("O8"), b"A" * 8), forged(flagged("V8"), b"A" * 8),
        forged(np.dtype("O"), [], (3,)), forged(np.dtype("i8"), [1]), forged(np.dtype("i8"), b"short"),
        forged(np.dtype("i8"), b"A" * 8, (1 << 62, 4)), Call(scalar, (flagged("O8"), b"A" * 8))]
    for value in evil:
        for content in (value, {"image": value}, {"other": [value]}):
            (tmp_path / "a.p").write_bytes(pickle.dumps(content, protocol))
            for read in (data.read_pickle, data.read_features):
                refused("a.p: refused.*nothing of it was run", read, str(tmp_path / "a.p"))
    assert os.listdir(tmp_path) == ["a.p"]


def test_honest_pickles_are_read(tmp_path):
    path = tmp_path / "a.p"
    arrays = {"i": np.arange(12).reshape(3, 4).T, "f": np.float32([[1.5]]), "big": np.arange(3, dtype=">i4"),
              "s": np.array(["ab", "c"]), "b": np.array([b"x"]), "o": np.array(["a", None, 3], object),
              "empty": np.zeros((0, 3))}
    plain = {"n": np.float64(2.5), "t": (True, None, {1}, [b"", b"raw"]),
             "d": collections.defaultdict(list, {1: [2]}), "od": collections.OrderedDict(a=1)}
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(arrays | plain, protocol))
        content = data.read_pickle(str(path))
        assert list(content) == [*arrays, *plain]
        assert {key: content[key] for key in plain} == plain
        for key, value in arrays.items():
            assert isinstance(content[key], np.ndarray) and np.array_equal(content[key], value), key
            assert content[key].dtype.newbyteorder("=") == value.dtype.newbyteorder("="), key


# ---------------------------------------------------------------- download

VOXELS = f"{data.TEXT2SHAPE_URL}/shapenet/{data.VOXEL_FOLDER}.zip"
SPLITS = f"{data.TEXT2SHAPE_URL}/text2shape-data.zip"
TABLE = f"{data.TEXT2SHAPE_URL}/captions.tablechair.csv"


def zipped(names):
    """The bytes of a zip of {name: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in names.items():
            z.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """{url: bytes}: the seven real shapes in the published archives, for clip.fetch; "asked": urls."""
    if not REAL_SHAPES:
        pytest.skip("needs ../shared/data/text2shape")

    def read(name):
        with open(os.path.join(REAL, name), "rb") as f:
            return f.read()
    voxels = [os.path.relpath(path, REAL) for path in REAL_SHAPES]
    published = {f"text2shape-data/shapenet/{name}": read(name) for name in data.SPLIT_FILES}
    others = {f"text2shape-data/primitives/{name}": b"other" for name in data.SPLIT_FILES}
    files = {TABLE: read(data.CAPTION_FILE), VOXELS: zipped({name: read(name) for name in voxels}),
             SPLITS: zipped(published | others), "asked": []}

    def fetch(url, path):
        files["asked"].append(url)
        if url not in files:
            raise clip.DownloadError(f"{url} could not be fetched")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(files[url])
    monkeypatch.setattr(clip, "fetch", fetch)
    return files


def fetch_and_load(root, split="train"):
    data.fetch_missing("text2shape", str(root))
    return data.load("text2shape", str(root), split)[0]


def test_download_and_once_only(server, tmp_path, capsys):
    root = str(tmp_path / "new" / "root")
    for _ in range(2):
        [found] = fetch_and_load(root, "val")
        assert found.id == "df5b55da209637624b3c42e318f3affc"
        assert data.pixels(found.images[0], 8).std() > 20
        assert server["asked"] == [VOXELS, SPLITS, TABLE]
    files = ["captions.tablechair.csv", data.VOXEL_FOLDER, *data.SPLIT_FILES]
    assert sorted(os.listdir(root)) == sorted(files)  # no archive
    said = capsys.readouterr().err
    assert said.count(f"{root}: Text2Shape is not there") == said.count(data.TEXT2SHAPE_URL) == 1


def test_an_archive_that_is_still_there_is_unpacked(server, tmp_path):
    """Put there by hand, or left by a run that was stopped while it unpacked."""
    os.makedirs(tmp_path / data.VOXEL_FOLDER)
    (tmp_path / f"{data.VOXEL_FOLDER}.zip").write_bytes(server.pop(VOXELS))
    assert len(fetch_and_load(tmp_path)) == 5


def settings(root, *words):
    """The settings of a script on Text2Shape under this root."""
    return train_mxm.settings(["--data", "text2shape", "--root", str(root), *words])


def test_scripts_fetch_unless_told_not_to(tmp_path, monkeypatch):
    root = tmp_path / "root"
    monkeypatch.setattr(data, "TEXT2SHAPE_URL", "http://127.0.0.1:9")  # where nobody answers
    by_hand = f"put .* into {root} by hand and run without --no-download"
    refused(f"^http://127.0.0.1:.*solid.zip could not be fetched .*; {by_hand}", load_splits, settings(root))
    refused(f"^{root}: no captions.tablechair.csv there; without --no-download .*{by_hand}",
            load_splits, settings(root, "--no-download"))


@pytest.mark.parametrize("rank, order", [(0, ["fetch", "meet"]), (1, ["meet", "fetch"])])
def test_the_first_process_fetches_while_the_others_wait(rank, order, server, tmp_path, monkeypatch):
    done = spy(monkeypatch, data, "fetch_missing", lambda *_: "fetch")
    monkeypatch.setattr("eval.processes", lambda: (rank, 2))
    monkeypatch.setattr("eval.barrier", lambda: done.append("meet"))
    parts = load_splits(settings(tmp_path))
    assert done == order and [len(instances) for instances, _ in parts] == [5, 1, 1]


def test_archives_write_only_inside_the_root(tmp_path):
    folder = data.VOXEL_FOLDER

    def unpack(*names):
        (tmp_path / "a.zip").write_bytes(zipped({name: b"x" for name in names}))
        data.unpack(str(tmp_path / "a.zip"), str(tmp_path / "root"))
    outside = tmp_path / "outside"
    unpack("../evil.txt", f"{outside}/evil.nrrd", f"{folder}/a/b.nrrd", "evil/processed_captions_train.py",
           f"{folder}/../...nrrd", f"{folder}/a\\b/a\\b.nrrd", f"{folder}/../a/../a.nrrd",
           f"../../{folder}/a/a.nrrd", f"{outside}/processed_captions_val.p")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["a.zip", f"root/{folder}/a/a.nrrd"]


# ---------------------------------------------------------------- your own data

@pytest.fixture
def mine(tmp_path):
    """load(text, split, name): data.load of a file with this content, beside pictures 0.png .. 59.png."""
    for i in range(60):
        picture(tmp_path / f"{i}.png", i, (4, 3))

    def load(text, split="train", name="mine.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return data.load(str(tmp_path / name), split=split)
    return load


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl(mine, tmp_path, capsys):
    """Numbers are names, 3.0 is 3; NaN, None, null and nothing are missing: an id is then no other line's."""
    nan = float("nan")
    missing = {"size": nan, "x": "", "y": "None", "z": float("inf"), "w": None}
    captions = ["line \u2028 separator", nan, "b", None]
    text = lines({"id": 7.0, "images": ["0.png", "1.png"], "captions": captions,
                  "labels": {"color": "red", "size": 3}, "split": "train", "group": 1},
                 {"images": ["2.png"], "captions": ["c"], "labels": {"color": "blue"} | missing,
                  "split": "train", "id": nan, "group": None},
                 {"id": 3, "images": ["4.png"], "captions": ["e"], "labels": {"size": 3.0},
                  "split": "train"},
                 {"id": "t", "images": ["3.png"], "captions": ["d"], "labels": {"color": "red"},
                  "split": "test"})
    text = "\ufeff" + text.replace("\\u2028", "\u2028").replace("}\n", "}\r\n\n", 1)
    train, classes = mine(text, "train", "mine.jsonl")
    assert classes == {"color": ["blue", "red"], "size": ["3"]}
    assert [(x.id, x.group) for x in train] == [("7", "1"), ("line 3", "line 3"), ("3", "3")]
    assert [x.labels for x in train] == [{"color": 1, "size": 0}, {"color": 0}, {"size": 0}]
    assert train[0].captions == ["line \u2028 separator", "b"]
    assert "2 empty captions were left out" in capsys.readouterr().err
    assert train[0].images == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    test, classes = mine(text, "test", "mine.jsonl")
    assert [(x.id, x.labels) for x in test] == [("t", {"color": 1})] and classes["color"] == ["blue", "red"]


def test_bytes_per_pair(tmp_path):
    """A million pairs take what 5,000 here do, 200 times: what reading leaves, its peak, and the Loader."""
    picture(tmp_path / "0.png", 0, (4, 3))
    n = 5000
    caption = "a dog that is number {} runs over the grass of a field and looks back at somebody"
    parts = ["val", "test"] + ["train"] * (n - 2)
    rows = "".join(f"{i},0.png,{caption.format(i)},{part}\n" for i, part in enumerate(parts))
    write(tmp_path / "mine.csv", "id,image,caption,split\n" + rows)
    tracemalloc.start()
    splits = data.load_splits(str(tmp_path / "mine.csv"))
    left, peak = tracemalloc.get_traced_memory()
    loader = data.Loader(splits[0][0], clip.Tokenizer([]), config(32, 8), 4, 1, 1, train=True, cache_bytes=0)
    with_loader, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(instances) for instances, _ in splits] == [n - 2, 1, 1] and len(loader) > 0
    assert left < 660 * n and peak < 1200 * n and with_loader - left < 245 * n


@pytest.mark.parametrize("row, said", [
    ("[" * 100_000, "not JSON"), ({"captions": "c"}, 'expected an object with "images".* each a list'),
    ({"extra": 1}, "unknown key 'extra'; known are id, images"),
    ({"labels": ["red"]}, '"labels" must be an object'),
    ({"labels": {"color": ["red"]}}, r"color = \['red'\] must be a string or a number"),
    ({"group": {}}, "group = {} must be"),
    ({"split": "valid"}, "split 'valid'; it must be train, val or test"),
    ({"images": []}, "no picture"), ({"images": [3]}, "no picture, or one that is no path"),
    ({"images": [""]}, "no picture"), ({"images": ["."]}, "is no file"),
    ({"images": ["a\0b\n.png"]}, r"a\?b\?.png: No such file"),
    ({"captions": [3]}, "a caption that is no text"), ({"captions": ["half \ud800"]}, "not JSON.*surrogates"),
    ({"id": "ok"}, "another label or split than at .*mine.jsonl line 1, for the same id 'ok'"),
    ({"id": "b", "split": None}, "no split, while other rows state one")])
def test_broken_jsonl(mine, row, said):
    good = {"id": "a", "images": ["0.png"], "captions": ["c"], "split": "train"}
    first = lines(good | {"id": "ok", "labels": {"color": "red"}})
    second = row + "\n" if isinstance(row, str) else lines(good | row)
    refused(f"mine.jsonl line 2: .*{said}", mine, first + second, "val", "mine.jsonl")


def test_csv(mine, tmp_path, capsys):
    text = ('caption,image,id,split,color\n"red, ""big""\nbox",0.png,1,train,red\nred box,1.png,1,train,red\n'
            'red box,0.png,1,train,red\n\nblue,2.png,,train,\nblue,3.png,4,test,red\n')
    train, classes = mine(text)
    assert classes == {"color": ["red"]}
    assert [(x.id, x.group) for x in train] == [("1", "1"), ("2.png", "2.png")]
    assert [x.labels for x in train] == [{"color": 0}, {}]
    assert train[0].captions == ['red, "big"\nbox', "red box"]
    assert "mine.csv line 2: a cell goes over several lines; if that is not" in capsys.readouterr().err
    assert train[0].images == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_as_people_have_them(separator, mine, tmp_path, capsys):
    """Separators, blanks, line ends, missing values, 1 and 1.0, classes that differ in capitals, rows of
    nothing; the pictures in another folder."""
    rows = [("image", " caption", "id", "split", "color", "size"),
            ("0.png", "a", "s0 ", "train ", "red", "1.0"),
            ("1.png", "nan", "s1", "train", "blue\u00a0", "2"), ("2.png", "b", "s2", "train", "NaN", "1"),
            ("3.png", "c", "NA", "train", "Red", "2.0"), ("4.png", "d", "s4", "test", "blue ", "1"),
            ("5.png", "e", "s5", "val", "red", "1"), ("",) * 6]
    text = "\r\n".join(separator.join(row) for row in rows)
    train, classes = mine("\ufeff" + text)
    assert classes == {"color": ["Red", "blue", "red"], "size": ["1", "2"]}
    assert [(x.id, x.captions) for x in train] == [("s0", ["a"]), ("s2", ["b"]), ("3.png", ["c"])]
    assert [x.labels for x in train] == [{"color": 2, "size": 0}, {"size": 0}, {"color": 0, "size": 1}]
    said = capsys.readouterr().err
    for remark in ("1 labels are missing", "1 ids are missing .* 5 given",
                   "classes of color differ in capitals or blanks only, such as 'red'",
                   "train, 1 of 4 rows without a picture or a text .* line 3 has no caption"):
        assert re.search(remark, said), remark
    assert mine(text, "test")[0][0].labels == {"color": 1, "size": 0}
    write(tmp_path / "elsewhere" / "mine.csv", text)
    train, _ = data.load(str(tmp_path / "elsewhere" / "mine.csv"), root=str(tmp_path))
    assert train[0].images == [str(tmp_path / "0.png")]


def test_what_stands_in_two_splits_is_noted(mine, capsys):
    rows = "".join(f"{i},{i // 2}.png,a,{('train', 'test')[i % 2]}\n" for i in range(8))
    mine("id,image,caption,split\n" + rows)
    said = capsys.readouterr().err
    assert re.search("4 ids or pictures stand in two splits.* such as .*0.png .train and test", said)
    mine("id,image,caption,split\n0,0.png,a,train\n1,0.png,b,train\n2,1.png,a,test\n")  # row numbers as ids
    said = capsys.readouterr().err
    assert re.search("1 ids or pictures .*twice in one, such as .*0.png .train and train", said)
    mine("image,caption\n0.png,a\n0.png,b\n1.png,c\n2.png,c\n3.png,c\n9.png,c\n")
    said = capsys.readouterr().err
    assert "two splits" not in said and "80/10/10 by a hash of the id" in said


def test_a_folder_of_pictures_can_be_searched(tmp_path):
    files = [picture(tmp_path / "a" / name) for name in ("10.png", "2.png", "sub/x.jpg")]
    for junk in ("._2.png", "Thumbs.db", "desktop.ini", "notes.txt", ".thumbnails/2.png", "folder.png/x.txt"):
        write(tmp_path / "a" / junk, "x")
    found, classes = data.load(str(tmp_path / "a"), split="all")
    assert [x.images for x in found] == [[files[1]], [files[0]], [files[2]]] and classes == {}
    assert found[2].id == os.path.join("sub", "x.jpg") and found[0].captions == []
    refused("a folder has no captions to learn from", data.load_splits, str(tmp_path / "a"))


@pytest.mark.parametrize("text, said", [
    ("image,text\n0.png,a\n", r"line 1: no column 'caption'; the first line must name image, caption "
                              r"\(it names: image, text\)"),
    ("image,caption,caption\n", "line 1: a column has no name or that of another"),
    (",image,caption\n0,0.png,a\n", "line 1: a column has no name"), ("", "no column 'image'.*nothing"),
    ("image,caption\n0.png,a\n0.png,a, b\n", "line 3: 3 cells under 2 columns; quote a cell"),
    ("image,caption\n", "no rows"), ("image,caption\n0.png\n", "line 2: 1 cells under 2 columns"),
    ("image,caption,split\n0.png,a,val\ngone.png,b,val\n", "line 3: picture .*gone.png: No such file"),
    ('image,caption\n0.png,"a\nb,c\n', "line [23]: not CSV.*is a quote left open"),
    ('image,caption\n0.png,"a" b\n', "line 2: not CSV"),
    (b"image,caption\n0.png,caf\xe9\n", "line 2: cannot be read.*UTF-8"),
    ("image,caption,split\n0.png,a,train\n", "no rows in split 'val'; it has train; add some")])
def test_broken_csv(mine, text, said):
    refused(f"mine.csv.*{said}", mine, text, "val")


@pytest.mark.parametrize("name", ["4.jpg", "4.png", "4.webp"])
def test_a_test_picture_that_is_cut_off_is_found_before_training(name, mine, tmp_path):
    path = tmp_path / name
    picture(path, 4, (90, 60))
    text = f"image,caption,split\n0.png,a,train\n1.png,b,val\n{name},c,test\n"
    assert len(mine(text, "test")[0]) == 1
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    refused(f"{name}: ", mine, text, "test")


@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/hm"), reason="needs ../shared/data/hm")
def test_a_real_table_with_rare_classes(capsys):
    parts = splits(f"{SHARED}/hm/hm.jsonl", "")
    assert sum(map(len, parts.values())) == 2221
    unseen = [sum(x.labels["product_type"] == -1 for x in part) for part in parts.values()]
    assert unseen == [0, 1, 3]
    said = capsys.readouterr().err
    for split, count in (("val", 1), ("test", 3)):
        assert said.count(f"{count} labels of split {split} never occur in train; they count as unlab") == 1
    known, _ = data.by_class(data.load(f"{SHARED}/hm/hm.jsonl", split="test"), "product_type", "hm", "test")
    assert len(known) == len(parts["test"]) - unseen[2]


def test_splits_of_your_own_data_by_hash(mine, capsys):
    def ids(split_of, *names):
        """The ids of these splits of sixty rows, where split_of(i) is what row i states."""
        rows = "".join(f"{i}.png,a,{split_of(i)},remark {i}\n" for i in range(60))
        return [{x.id for x in mine("image,caption,split,note\n" + rows, name)[0]} for name in names]
    train, val, test = ids(lambda i: "", "train", "val", "test")  # none stated: 80/10/10
    assert len(train) + len(val) + len(test) == len(train | val | test) == 60
    assert len(train) > 40 and val and test
    train, val, test = ids(lambda i: "test" if i >= 30 else "train", "train", "val", "test")  # no val
    assert test == {f"{i}.png" for i in range(30, 60)} and len(train | val) == 30 and 0 < len(val) < 10
    assert val == {i for i in train | val if data.hash_tenth(i) == 9} and not train & val
    train, val = ids(lambda i: "val" if i == 5 else "train", "train", "val")
    assert val == {"5.png"} and len(train) == 59
    assert "'note' has" in capsys.readouterr().err  # a remark, not a task


def test_a_loader_that_is_still_held_at_exit_lets_the_process_end():
    """As the traceback of a bug holds it: its workers ignore the signal that Python ends them with."""
    code = ("import clip, data; instances, _ = data.load('primitives', split='val'); "
            "loader = data.Loader(instances, clip.Tokenizer([]), data.OPENAI, 8, 1, 1, workers=1); "
            "batches = loader.batches(0, 9); next(batches)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_pairs_show_every_caption_once_an_epoch_with_its_instance(tmp_path):
    instances = photos(tmp_path)
    captions = [(i, caption) for i, x in enumerate(instances) for caption in x.captions]

    pairs = loader(instances, 4, views=1, captions=None, pairs=True)
    assert len(captions) == 13 and len(pairs) == 3
    for epoch in range(2):
        shown = []
        for step in range(3 * epoch, 3 * epoch + 3):
            batch = pairs.make(step)
            assert batch["tokens"].shape == (4, 1, 32) and batch["images"].shape == (4, 1, 3, 8, 8)
            texts = [tokenizer().decode(row[:row.argmax()]).strip() for row in batch["tokens"][:, 0]]
            shown += list(zip(batch["index"].tolist(), texts))
        assert len(set(shown)) == 12 and set(shown) < set(captions)


# ---------------------------------------------------------------- frames and region features

def test_frames_are_taken_evenly_and_in_order(tmp_path):
    """Of ten frames and of three, whose red is 20 times their number."""
    for k in range(10):
        Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(tmp_path / f"{k}.jpg")
    files = [str(tmp_path / f"{k}.jpg") for k in range(10)]
    instances = [Instance(str(count), files[:count], ["a"]) for count in (10, 3)]
    for train in (False, True):
        loader = data.Loader(instances, clip.Tokenizer([]), config(8, 16), 2, None, 1, train, frames=4)
        batch = loader.make(0)
        assert batch["images"].shape == (2, 4, 3, 16, 16)
        for i, images, mask in zip(batch["index"].tolist(), batch["images"], batch["image_mask"]):
            shown = images[mask][:, 0, 8, 8].float().div(20).round().tolist()
            assert shown == ([0, 3, 6, 9], [0, 1, 2])[i]


def regions(root, file, rows, captions, width=6):
    (root / "precomp").mkdir(exist_ok=True)
    array = np.random.default_rng(len(file)).random((rows, 4, width), np.float32)
    np.save(root / "precomp" / f"{file}_ims.npy", array)
    write(root / "precomp" / f"{file}_caps.txt", "".join(f"caption {i}\n" for i in range(captions)))
    return array


def test_region_features(tmp_path):
    array = regions(tmp_path, "train", 3, 15)  # one row an image
    embeddings = np.arange(18, dtype=np.float16).reshape(3, 6)
    np.save(tmp_path / "precomp" / "train_clip.npy", embeddings)
    instances, classes = data.load_regions("flickr30k", str(tmp_path), "train")
    assert [x.captions for x in instances] == [[f"caption {5 * i + k}" for k in range(5)] for i in range(3)]
    loader = data.Loader(instances, clip.Tokenizer([]), config(16, 32), 2, 1, 2, train=True, seed=3)
    batch = data.to_device(loader.make(0), "cpu")
    assert batch["images"].features.shape == (2, 1, 4, 6) and classes == {}
    shown = batch["images"][batch["image_mask"]]
    assert np.array_equal(shown.features, array[batch["index"]])  # untouched
    assert np.array_equal(shown.clip_input, embeddings[batch["index"]].astype(np.float32))
    regions(tmp_path, "dev", 10, 10)
    np.save(tmp_path / "precomp" / "dev_ims.npy", double := array[:2].repeat(5, axis=0))  # or one a caption
    val, _ = data.load_regions("flickr30k", str(tmp_path), "val")
    assert len(val) == 2 and np.array_equal(val[1].images[0].features(), double[5])
    loader = data.Loader(val, clip.Tokenizer([]), config(16, 32), 2)
    assert np.array_equal(data.to_device(loader.make(0), "cpu")["images"][:, 0], double[::5])
    refused("--regions: no split 'dev'; it has train", data.load_regions, "flickr30k", str(tmp_path), "dev")


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: regions(folder.parent, "train", 4, 15), "4 rows, but 15 lines in .*train_caps.txt"),
    (lambda folder: np.save(folder / "train_ims.npy", np.zeros((3, 8), np.float32)),
     r"float32 of shape \(3, 8\); expected floats \(images, regions, width\)"),
    (lambda folder: np.save(folder / "train_ims.npy", np.array([{}])), "refused, damaged or of another kind"),
    (lambda folder: np.save(folder / "train_clip.npy", np.zeros((2, 6), np.float32)),
     "train_clip.npy: expected a row for each of the 3 images"),
    (lambda folder: (folder / "train_caps.txt").unlink(), "train_caps.txt: No such file"),
    (lambda folder: regions(folder.parent, "train", 15, 15), "rows 0 to 4 differ: one caption to an image")])
def test_region_features_refused(spoil, said, tmp_path):
    regions(tmp_path, "train", 3, 15)
    spoil(tmp_path / "precomp")
    data._rows_of.cache_clear()
    refused(said, data.load_regions, "flickr30k", str(tmp_path), "train")
