"""Tests of data.py: what it reads, what it refuses and how it says so, the loader, the renderer, the built-in data set.

    python -m pytest tests/test_data.py

Real photos lie in ../shared/data; tests that need them skip where it is absent.
"""
import collections
import csv
import functools
import gzip
import http.server
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import clip  # noqa: E402
import data  # noqa: E402
from data import DataError, Instance  # noqa: E402

SHARED = os.path.join(ROOT, "..", "shared", "data")
needs_flickr8k = pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "flickr8k")), reason="needs ../shared/data/flickr8k")


# ---------------------------------------------------------------- helpers

@pytest.fixture(autouse=True)
def fresh_notes(monkeypatch):
    monkeypatch.setattr(data, "_noted", set())


def refused(pattern, function, *args, **kwargs):
    """The call raises DataError whose message is one line and matches; returns the message."""
    with pytest.raises(DataError) as e:
        function(*args, **kwargs)
    message = str(e.value)
    assert re.search(pattern, message), message
    assert message.isprintable() and len(message) < 500
    return message


@functools.lru_cache
def split(name):
    return data.primitives(name)[0]


@functools.lru_cache
def tokenizer():
    return clip.Tokenizer.train(["a red box", "a tall blue cone", "the wide torus"] * 3, 530)


def picture(path, seed=0, size=(20, 14), mode="RGB", **save):
    """Write a picture of random pixels; returns its path."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path, **save)
    return str(path)


def photos(folder, views=(1, 2, 3, 1, 2, 3, 1), captions=(2, 1, 3, 2, 1, 2, 2)):
    """Instances with these numbers of views and captions."""
    out = []
    for i, (v, c) in enumerate(zip(views, captions)):
        files = [picture(f"{folder}/{i}-{k}.png", 10 * i + k, (9 + i, 12)) for k in range(v)]
        out.append(Instance(str(i), files, [f"number {i} caption {k}" for k in range(c)], {"parity": i % 2} if i != 2 else {}))
    return out


def loader(instances, batch_size=3, views=2, captions=2, train=True, **kwargs):
    return data.Loader(instances, tokenizer(), 32, 8, batch_size, views, captions, train=train, **kwargs)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- the built-in data set

def test_primitives_counts_and_splits():
    names = ("train", "val", "test", "unseen")
    assert [len(split(n)) for n in names] == [4032, 504, 504, 756]
    asked = [x for x in split("unseen") if x.query]
    assert len(asked) == 252 and all(x.query for n in names[:3] for x in split(n))
    pair = lambda x: (x.labels["shape"], x.labels["color"])
    assert not {pair(x) for x in asked} & {pair(x) for x in split("train")}
    for value in (0, 1):  # every single attribute of them was seen
        assert {pair(x)[value] for x in asked} <= {pair(x)[value] for x in split("train")}
    ids = [{x.id for x in split(n) if x.query} for n in names]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 4032 + 504 + 504 + 252
    assert len({x.group for x in split("unseen")}) == 756 and len({x.group for x in split("train")}) == 504
    x = split("train")[0]
    assert len(x.images) == 12 and len(x.captions) == 5 and set(x.labels) == set(data.TASKS)
    refused("no split 'dev'.*train, val, test, unseen", data.load, "primitives", split="dev")


def test_primitives_are_deterministic():
    again = [data.primitive_caption(7, 3, k) for k in range(5)]
    voxels = data.primitive_voxels(7, 3).copy()
    data.primitive_voxels.cache_clear()
    np.random.seed(1)
    assert np.array_equal(voxels, data.primitive_voxels(7, 3)) and again == [data.primitive_caption(7, 3, k) for k in range(5)]
    assert not np.array_equal(voxels, data.primitive_voxels(7, 4))
    # the generated data is part of published numbers: a change here makes them incomparable
    assert zlib.crc32("\n".join(c for x in split("test") for c in x.captions).encode()) == 4070203048
    assert zlib.crc32(b"".join(data.primitive_voxels(n, 0).tobytes() for n in range(0, 756, 63))) == 526526862


def test_primitive_captions_state_only_true_attributes():
    words = {w: (task, i) for task, values in data.TASKS.items() for i, (name, v) in enumerate(values.items()) for w in ((name,) if task == "color" else v)}
    pattern = re.compile("|".join(rf"\b{w}\b" for w in words))
    lengths = collections.Counter()
    for x in [*split("val"), *split("unseen")]:
        number, sample = map(int, x.id.split("-"))
        for k, caption in enumerate(x.captions):
            said = [words[w] for w in pattern.findall(caption)]
            assert all(x.labels[task] == i for task, i in said), (caption, x.labels)
            assert {list(data.TASKS).index(task) for task, _ in said} == data.primitive_caption(number, sample, k)[1] and len(said) == len(dict(said))
            lengths[len(said)] += 1
    share = [lengths[n] / sum(lengths.values()) for n in (4, 3, 2)]
    assert np.allclose(share, (0.3, 0.4, 0.3), atol=0.03)


def test_primitive_colours_and_sizes_are_visible():
    for number in range(0, 756, 5):
        shape, colour, height, width = data._configuration(number)
        voxels = data.primitive_voxels(number, number % 10)
        solid = voxels[..., 3] > 0
        assert np.abs(voxels[solid][0, :3].astype(int) - list(data.COLOURS.values())[colour]).max() <= data.COLOUR_JITTER
        x, y, z = (np.ptp(axis) + 1 for axis in np.nonzero(solid))
        assert x == z and abs(y / 32 - data.FRACTIONS[height]) < 0.16 and abs(x / 32 - data.FRACTIONS[width]) < 0.16


def test_oracle_equals_brute_force():
    some = split("unseen")[:300:7] + split("test")[::40]
    scores, row = data.primitives_oracle(some), 0
    for x in some:
        number, sample = map(int, x.id.split("-"))
        for k in range(5):
            stated = [list(data.TASKS)[i] for i in data.primitive_caption(number, sample, k)[1]]
            fits = [all(y.labels[t] == x.labels[t] for t in stated) for y in some]
            assert scores[row].tolist() == pytest.approx([f / sum(fits) for f in fits])
            row += 1
    assert row == len(scores) and scores.dtype == torch.float32


# ---------------------------------------------------------------- the renderer

def march(voxels, view, size):
    """The renderer written as loops over pixels and steps."""
    n, a, e = len(voxels), math.radians(30 * view), math.radians(30)
    right, up = (math.cos(a), 0, -math.sin(a)), (-math.sin(a) * math.sin(e), math.cos(e), -math.cos(a) * math.sin(e))
    ahead = (-math.sin(a) * math.cos(e), -math.sin(e), -math.cos(a) * math.cos(e))
    steps, first, colour = math.ceil(3 ** 0.5 * n), np.full((size, size), np.nan), np.zeros((size, size, 3))
    for r in range(size):
        for c in range(size):
            u, v = (((k + 0.5) / size - 0.5) * 2 ** 0.5 * n for k in (c, size - 1 - r))
            for t in range(steps):
                p = [n / 2 + u * right[i] + v * up[i] + (t - (steps - 1) / 2) * ahead[i] for i in range(3)]
                x, y, z = map(math.floor, p)
                if min(x, y, z) >= 0 and max(x, y, z) < n and voxels[x, y, z, 3] > 127:
                    first[r, c], colour[r, c] = t, voxels[x, y, z, :3]
                    break
    image = np.full((size, size, 3), 255, np.uint8)
    if np.isnan(first).all():
        return image
    depth = np.where(np.isnan(first), np.nanmax(first) + 1, first) * size / (2 ** 0.5 * n)
    for r in range(size):
        for c in range(size):
            if not np.isnan(first[r, c]):
                (t, b), (w, o) = [(max(k - 1, 0), min(k + 1, size - 1)) for k in (r, c)]
                normal = np.array([(depth[r, o] - depth[r, w]) / (o - w), -(depth[b, c] - depth[t, c]) / (b - t), 1])
                light = max(0, normal @ data.LIGHT / np.linalg.norm(normal))
                image[r, c] = colour[r, c] * (0.55 + 0.45 * min(1, light))
    return image


@pytest.mark.parametrize("grid, size, view", [(1, 4, 0), (4, 10, 1), (5, 16, 5), (8, 18, 3), (9, 12, 11), (16, 20, 8)])
def test_renderer_equals_ray_marching(grid, size, view):
    rng = np.random.default_rng(grid)
    for solid in (0.06, 1.0):
        voxels = rng.integers(0, 256, (grid, grid, grid, 4), dtype=np.uint8)
        voxels[..., 3] = np.where(rng.random((grid, grid, grid)) < solid, 128, 127)  # only alpha over 127 is solid
        voxels[grid // 2, grid // 2, grid // 2, 3] = 128
        ours, loops = data.render(voxels, view, size), march(voxels, view, size)
        assert (ours != 255).any() and np.array_equal(ours == 255, loops == 255)
        assert np.abs(ours.astype(int) - loops).max() <= 1  # float32 against float64, cut to whole levels


def test_renderer_empty_wrong_and_smallest():
    empty = np.zeros((6, 6, 6, 4), np.uint8)
    assert (data.render(empty, 2, 9) == 255).all()
    assert data.render(np.full((6, 6, 6, 4), 200, np.uint8), 2, 1).shape == (1, 1, 3)
    refused(r"shape \(6, 6, 5, 4\)", data.render, empty[:, :, :5], 0, 8)


def test_renderer_orientation():
    """One voxel alone: y is up, x right and z to the viewer at view 0, and view k has turned by 30 k degrees."""
    def place(x, y, z, view, n=15, size=90):
        voxels = np.zeros((n, n, n, 4), np.uint8)
        voxels[x, y, z] = 255
        row, column = np.argwhere((data.render(voxels, view, size) != 255).any(-1)).mean(0)
        return column - (size - 1) / 2, (size - 1) / 2 - row  # right, up
    assert np.allclose(place(7, 7, 7, 0), 0, atol=1)
    assert place(7, 12, 7, 0)[1] > 15 and place(7, 2, 7, 0)[1] < -15
    assert place(12, 7, 7, 0)[0] > 20 and place(2, 7, 7, 0)[0] < -20
    assert place(7, 7, 12, 0)[1] < -5  # seen from above, what is nearer lies lower
    voxel = 90 / (2 ** 0.5 * 15)
    for k in range(12):
        assert place(12, 7, 7, k)[0] == pytest.approx(5 * voxel * math.cos(math.radians(30 * k)), abs=1.5)
        assert place(7, 7, 12, k)[0] == pytest.approx(-5 * voxel * math.sin(math.radians(30 * k)), abs=1.5)


def test_renderer_shades_alike_at_every_size():
    small, large = (data.render(data.primitive_voxels(200, 0), 1, size).astype(float) for size in (32, 128))
    pooled = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    inside = (large.reshape(32, 4, 32, 4, 3) != 255).all((1, 3, 4))
    assert inside.sum() > 100 and abs(pooled[inside].mean() - small[inside].mean()) < 8


# ---------------------------------------------------------------- pictures

def test_square_equals_torchvision():
    rng, sizes = np.random.default_rng(0), [(1, 300), (300, 1), (2, 300), (3, 180), (8, 8), (8, 31), (17, 8), (7, 7), (33, 34), (224, 225), (2, 3)]
    sizes += [tuple(rng.integers(1, 120, 2).tolist()) for _ in range(60)]
    for w, h in sizes:
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for size in (8, 31):
            theirs = transforms.CenterCrop(size)(transforms.Resize(size, transforms.InterpolationMode.BICUBIC)(image))
            away = np.abs(data.square(image, size).astype(int) - np.asarray(theirs))
            assert away.max() <= (20 if max(w, h) > 64 * min(w, h) else 0), (w, h, size)  # of noise, whose every level differs


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from the kernel")
def test_long_thin_picture_takes_little_memory(tmp_path):
    import resource
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((1, 5000), (5000, 1)):
        path = picture(tmp_path / "thin.png", 0, size)
        before = peak()
        assert data.pixels(path, 336).shape == (336, 336, 3)
        assert peak() - before < 200_000  # KiB; resizing all of it takes 2 GiB


def test_pictures_of_every_kind(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = np.stack([levels] * 3, -1)
    read = lambda name, image, **save: (image.save(tmp_path / name, **save), np.asarray(data.open_image(tmp_path / name)))[1]
    assert np.array_equal(read("grey.png", Image.fromarray(levels)), grey)
    assert np.array_equal(read("16.png", Image.fromarray(levels.astype(np.uint16) * 257)), grey)
    dark = read("dark.png", Image.fromarray(levels.astype(np.uint16)))  # 16 bits, all of them nearly black
    assert dark.max() == 0
    assert np.array_equal(read("32.tif", Image.fromarray(levels.astype(np.int32) * 257)), grey)
    assert np.array_equal(read("float.tif", Image.fromarray(levels.astype(np.float32))), grey)
    palette = Image.fromarray(levels)
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    assert np.array_equal(read("palette.png", palette), np.stack([255 - levels, levels, np.full_like(levels, 7)], -1))
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
    wide = Image.fromarray(np.concatenate([np.full((16, 16, 3), 250, np.uint8), np.zeros((16, 16, 3), np.uint8)], 1))
    turned = read("turned.jpg", wide, exif=exif)
    assert turned.shape == (32, 16, 3) and turned[:12].min() > 200 and turned[20:].max() < 50


def test_bad_pictures_are_named(tmp_path):
    good = picture(tmp_path / "good.jpg", size=(60, 60))
    content = open(good, "rb").read()
    for name, what, bytes in (("short.jpg", "damaged.*truncated", content[:len(content) // 2]), ("zero.jpg", "is empty", b""), ("text.jpg", "damaged or no picture", b"hello")):
        (tmp_path / name).write_bytes(bytes)
        refused(f"{name}: .*{what}.*; replace it", data.open_image, str(tmp_path / name))
    refused("gone.jpg: no such picture", data.open_image, str(tmp_path / "gone.jpg"))
    refused("damaged or no picture", data.open_image, str(tmp_path))
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    refused("bomb.png: .*DecompressionBomb", data.open_image, str(tmp_path / "bomb.png"))


# ---------------------------------------------------------------- batches

def test_loader_is_the_same_for_all_workers_and_starts(tmp_path):
    torch.manual_seed(5)
    instances, before = photos(tmp_path), torch.get_rng_state()
    plain = list(loader(instances).batches(0, 5))  # two and a half epochs
    assert len(plain) == 5 and len(loader(instances)) == 2
    for kwargs in (dict(workers=1), dict(workers=2), dict(cache_bytes=0), dict(cache_bytes=0, workers=2)):
        again = loader(instances, **kwargs)
        assert again.cached == ("cache_bytes" not in kwargs)
        assert all(map(equal, plain, again.batches(0, 5))) and all(map(equal, plain[3:], again.batches(3, 5)))
    assert list(loader(instances, workers=2).batches(4, 4)) == []
    assert torch.equal(before, torch.get_rng_state())  # a resumed run must not draw from it once more than an unbroken one
    other = list(loader(instances, seed=1).batches(0, 5))
    assert not all(map(equal, plain, other))
    assert not torch.equal(torch.cat([b["index"] for b in plain[:2]]), torch.cat([b["index"] for b in plain[2:4]]))  # another order each epoch


def test_loader_workers_fill_the_cache(tmp_path):
    instances = photos(tmp_path)
    twice = loader(instances, workers=1, train=False, views=None)
    first = list(twice.batches())
    assert twice.filled[:twice.first_image[-1]].all() or sys.platform != "linux"
    for x in instances:
        for path in x.images:
            os.unlink(path)
    if sys.platform == "linux":
        assert all(map(equal, first, twice.batches()))


def test_two_ranks_make_one_batch(tmp_path):
    instances = photos(tmp_path)
    for train in (True, False):
        kwargs = dict(batch_size=4, train=train, views=2, captions=2)
        whole, parts = loader(instances, **kwargs), [loader(instances, rank=r, world=2, **kwargs) for r in range(2)]
        assert len(whole) == len(parts[0]) == (1 if train else 2)
        for step in range(2):
            both = [p.make(step) for p in parts]
            for key in ("images", "image_mask", "tokens", "caption_mask", "index"):
                assert torch.equal(whole.make(step)[key], torch.cat([b[key] for b in both]))
            assert torch.equal(whole.make(step)["labels"]["parity"], torch.cat([b["labels"]["parity"] for b in both]))
    last = loader(instances[:5], batch_size=4, train=False, rank=1, world=2).make(1)  # the last batch leaves nothing for rank 1
    assert len(last["index"]) == 0 and last["labels"]["parity"].dtype == torch.int64
    refused("--batch-size 3 is no multiple of the 2 processes", loader, instances, world=2)


def test_loader_draws_without_replacement_and_masks(tmp_path, capsys):
    instances = photos(tmp_path, views=(1, 2, 3, 4), captions=(1, 3, 5, 2))
    l = loader(instances, batch_size=4, views=3, captions=3)
    assert "2 of 4 instances have fewer than 3 views" in capsys.readouterr().err
    known = {tuple(data.pixels(p, 8).ravel()): (i, k) for i, x in enumerate(instances) for k, p in enumerate(x.images)}
    drawn = collections.Counter()
    for step in range(40):
        b = l.make(step)
        assert sorted(b["index"].tolist()) == [0, 1, 2, 3]
        for row, i in enumerate(b["index"].tolist()):
            have, said = min(3, len(instances[i].images)), min(3, len(instances[i].captions))
            assert b["image_mask"][row].tolist() == [k < have for k in range(3)] and b["caption_mask"][row].tolist() == [k < said for k in range(3)]
            found = [known[tuple(v.permute(1, 2, 0).flatten().tolist())] for v in b["images"][row, :have]]
            assert len(set(found)) == have and all(f[0] == i for f in found)
            drawn.update(found)
            texts = {tuple(t.tolist()) for t in b["tokens"][row, :said]}
            assert len(texts) == said and texts <= {tuple(t.tolist()) for t in tokenizer()(instances[i].captions, 32)}
            assert not b["images"][row, have:].any() and not b["tokens"][row, said:].any()
            assert b["labels"]["parity"][row] == instances[i].labels.get("parity", -1)
    assert len(drawn) == 10 and min(drawn[3, k] for k in range(4)) > 15  # each of four views three times in four


def test_evaluation_covers_everything_once_in_order(tmp_path, capsys):
    instances = photos(tmp_path)
    l = loader(instances, views=None, captions=None, train=False)
    batches = list(l.batches())
    assert len(batches) == len(l) == 3 and torch.cat([b["index"] for b in batches]).tolist() == list(range(7))
    views = [v for b in batches for v in b["images"][b["image_mask"]]]
    assert np.array_equal(torch.stack(views).permute(0, 2, 3, 1).numpy(), [data.pixels(p, 8) for x in instances for p in x.images])
    texts = torch.cat([b["tokens"][b["caption_mask"]] for b in batches])
    assert torch.equal(texts, l.tokens) and torch.equal(texts, tokenizer()([c for x in instances for c in x.captions], 32))
    assert capsys.readouterr().err == ""


def test_long_captions_are_cut_counted_and_said_once(capsys):
    x = [Instance("a", [None], ["red box " * 60, "red box"]), Instance("b", [None], ["cone " * 90])]
    for _ in range(2):
        l = data.Loader(x, tokenizer(), 77, 8, 2)
    assert capsys.readouterr().err == "note: 2 of 3 captions are longer than 77 tokens and were cut\n"
    assert l.tokens.shape == (3, 77) and (l.tokens[[0, 2], -1] == tokenizer().end).all() and l.tokens[1, -1] == 0


def test_notes_come_from_the_first_process_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    data.note("something")
    assert capsys.readouterr().err == ""


def test_loader_errors(tmp_path):
    instances = photos(tmp_path)
    refused("--batch-size 8 is larger than the data set: 7 training instances; choose 7 or less", loader, instances, batch_size=8)
    assert len(loader(instances, batch_size=8, train=False)) == 1
    os.unlink(instances[3].images[0])
    for workers in (0, 2):
        message = refused("3-0.png: no such picture", list, loader(instances, train=False, workers=workers).batches())
        assert "Traceback" not in message


def test_to_device_normalises_as_clip(tmp_path):
    image = Image.open(picture(tmp_path / "a.png", 3, (21, 13)))
    batch = loader([Instance("a", [str(tmp_path / "a.png")], ["a"], {"t": 1})], 1, 1, 1).make(0)
    moved = data.to_device(batch, torch.device("cpu"))
    assert torch.allclose(moved["images"][0, 0], clip.transform(8)(image), atol=1e-5)
    assert batch["images"].dtype == torch.uint8 and moved["labels"]["t"].tolist() == [1] and torch.equal(moved["tokens"], batch["tokens"])


# ---------------------------------------------------------------- published photo sets

@needs_flickr8k
def test_flickr8k():
    root, ids = os.path.join(SHARED, "flickr8k"), []
    for name, count in (("train", 600), ("val", 100), ("test", 100)):
        instances, classes = data.load("flickr8k", root, name)
        assert len(instances) == count and classes == {} and all(len(x.captions) == 5 and len(x.images) == 1 for x in instances)
        ids += [x.id for x in instances]
    assert len(set(ids)) == 800
    batch = loader(instances, 4, 1, 5, train=False).make(0)
    assert batch["images"].float().std() > 20 and batch["caption_mask"].all()


def karpathy(root, name, rows, **more):
    """rows: (filename, split, captions, [folder])."""
    images = [dict(filename=f, split=s, sentences=[{"raw": c, "tokens": c.split()} for c in captions], **({"filepath": at[0]} if at else {}))
              for f, s, captions, *at in rows]
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, f"dataset_{name}.json"), "w") as f:
        json.dump({"images": images, "dataset": name} | more, f)


def test_coco_and_flickr30k_layouts(tmp_path, capsys):
    coco = tmp_path / "coco"
    karpathy(coco, "coco", [("a.jpg", "train", [" A dog. "], "train2014"), ("a.jpg", "restval", ["a cat", "  "], "val2014"), ("c.jpg", "val", ["c"], "val2014")])
    for file in ("train2014/a.jpg", "val2014/a.jpg"):
        picture(str(coco / file))
    train, _ = data.load("coco", str(coco), "train")
    assert [(x.id, x.images, x.captions) for x in train] == [(f"{d}/a.jpg", [str(coco / d / "a.jpg")], c) for d, c in (("train2014", ["A dog."]), ("val2014", ["a cat"]))]
    assert "1 empty captions were left out" in capsys.readouterr().err
    refused(r"val2014/c.jpg: no such picture \(1 of 1 in split val\)", data.load, "coco", str(coco), "val")
    refused("no captioned images in split 'test'; it has train, val", data.load, "coco", str(coco), "test")
    flickr = tmp_path / "f"
    karpathy(flickr, "flickr30k", [(f"{i}.jpg", "train", ["x"]) for i in range(40)])
    for i in range(40):
        picture(str(flickr / "flickr30k-images" / f"{i}.jpg"), size=(2, 2))
    parts = [{x.id for x in data.load("flickr30k", str(flickr), name)[0]} for name in ("train", "val")]  # no val: a tenth of train
    assert len(parts[0] | parts[1]) == 40 and not parts[0] & parts[1] and 0 < len(parts[1]) < 12


def test_broken_karpathy_files(tmp_path):
    path = tmp_path / "dataset_flickr8k.json"
    load = lambda: data.load("flickr8k", str(tmp_path))
    refused("dataset_flickr8k.json: cannot be read", load)
    for text in ("{", "[]", '{"images": 3}', '{"images": [3]}', '{"images": [{"filename": "a", "split": "train", "sentences": [{"raw": 4}]}]}',
                 '{"images": [{"filename": 1, "split": "train", "sentences": []}]}', '{"images": [{"filename": "a", "split": [], "sentences": []}]}', "[" * 100000):
        path.write_text(text)
        refused("dataset_flickr8k.json: image 0 is not in Karpathy's format", load)


def test_unknown_names_and_missing_roots(tmp_path):
    refused("unknown data set 'flicker8k'; did you mean 'flickr8k'", data.load, "flicker8k")
    refused("did you mean 'coco'", data.load, "COCO")
    refused("unknown data set '.*'; Known: primitives", data.load, "\n\x1b?")
    refused("nowhere: no such folder; give --root", data.load, "flickr8k", str(tmp_path / "nowhere"))
    assert "--download fetches it" in refused("no such folder", data.load, "text2shape", str(tmp_path / "nowhere"))
    refused("nowhere.csv: cannot be read.*No such file", data.load, str(tmp_path / "nowhere.csv"))
    refused("--download: coco cannot be fetched automatically", data.load, "coco", download=True)


# ---------------------------------------------------------------- Text2Shape

def nrrd(voxels, encoding="gzip", newline="\n", sizes=None, extra=(), kind="uint8", magic="NRRD0004"):
    """The bytes of a voxel file as published: axes channel, x, y, z, the first varying fastest. voxels: (x, y, z, 4)."""
    sizes = sizes or " ".join(map(str, (voxels.shape[3], *voxels.shape[:3])))
    header = [magic, "# Complete NRRD file format specification at:", f"type: {kind}", "dimension: 4", f"sizes: {sizes}", *extra, f"encoding: {encoding}", "", ""]
    body = voxels.transpose(2, 1, 0, 3).tobytes()
    return newline.join(header).encode("latin1") + (body if encoding == "raw" else gzip.compress(body))


def cube(seed, n=6):
    return np.random.default_rng(seed).integers(0, 256, (n, n, n, 4), dtype=np.uint8)


@pytest.mark.parametrize("options", [dict(), dict(encoding="raw"), dict(encoding="gz", newline="\r\n"), dict(encoding="raw", newline="\r\n"),
                                     dict(sizes="  4 \t6  6 6 "), dict(kind="unsigned char", extra=["# a: comment", "type:=float", "space directions: none (1,0,0)"])])
def test_nrrd(tmp_path, options):
    (tmp_path / "a.nrrd").write_bytes(nrrd(cube(1), **options))
    assert np.array_equal(data.read_nrrd(str(tmp_path / "a.nrrd")), cube(1))


def test_broken_nrrd(tmp_path):
    path, good, raw = tmp_path / "a.nrrd", nrrd(cube(1)), nrrd(cube(1), "raw")
    refused("a.nrrd: cannot be read", data.read_nrrd, str(path))
    bomb = gzip.compress(bytes(50 << 20))
    flipped = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
    for content, what in ((b"", "not an NRRD"), (b"PK" + good, "not an NRRD"), (b"NRRD0004\n" + b"a" * 100000, "not an NRRD"),
                          (nrrd(cube(1), kind="float"), "type float"), (good.replace(b"type:", b"tipe:"), r"type \?"),
                          (nrrd(cube(1), sizes="4 6 6 7"), "sizes 4 6 6 7; expected 4 n n n"), (nrrd(cube(1), sizes="3 6 6 6"), "sizes .*; expected 4 n n n"), (nrrd(cube(1), sizes="4 6 6"), "sizes .*; expected 4 n n n"),
                          (nrrd(cube(1), sizes="4 -6 -6 -6"), "sizes .*; expected 4 n n n"), (nrrd(cube(1), sizes="4 0 0 0"), "sizes .*; expected 4 n n n"), (nrrd(cube(1), sizes="4 \xb2 \xb2 \xb2"), "sizes .*; expected 4 n n n"),
                          (nrrd(cube(1), sizes="4 " + " ".join(["9" * 5000] * 3)), "sizes .*; expected 4 n n n"), (nrrd(cube(1), sizes="4 513 513 513"), "sizes .*; expected 4 n n n"),
                          (nrrd(cube(1), "hex"), "encoding hex"), (nrrd(cube(1), extra=["data file: b.raw"]), "in another file"),
                          (good[:-300], "truncated"), (good[:-4], "truncated"), (flipped, "damaged gzip"), (good[:400] + bytes(9) + good[409:], "damaged gzip"),
                          (raw[:-1], "holds 863 bytes of voxels, its sizes need 864"), (raw + b"x", "holds 865"), (good[:good.index(b"\n\n") + 2] + bomb, "holds 865 bytes")):
        path.write_bytes(content)
        refused(f"a.nrrd: .*{what}", data.read_nrrd, str(path))


MODELS = [f"{i:032x}" for i in range(60)]
HEADER = "id,modelId,description,category,topLevelSynsetId,subSynsetId\n"


def text2shape(root, models=MODELS, splits=True, voxels=True):
    """A small Text2Shape in the published layout."""
    os.makedirs(root, exist_ok=True)
    with open(root / "captions.tablechair.csv", "w", newline="") as f:
        f.write(HEADER)
        w = csv.writer(f)
        for i, m in enumerate(models):
            for text in (f"A brown chair, with a \"round\" seat number {i}.\nIt has four legs. ", "grey table", "  "):
                w.writerow([3 * i, m, text, ("Chair", "Table")[i % 2], "04379243", ""])
    for i, m in enumerate(models if voxels else ()):
        folder = root / data.VOXEL_FOLDER / m
        os.makedirs(folder, exist_ok=True)
        (folder / f"{m}.nrrd").write_bytes(nrrd(cube(i), ("gzip", "raw")[i % 2]))
    for name, part in zip(("train", "val", "test"), (models[:-4], models[-4:-2], models[-2:])) if splits else ():
        content = {"caption_tuples": [(np.arange(k, k + 5), "chair", m) for k, m in enumerate(part)], "caption_matches": {m: [k] for k, m in enumerate(part)},
                   "vocab_size": 3588, "max_caption_length": np.int64(96)}
        with open(root / f"processed_captions_{name}.p", "wb") as f:
            pickle.dump(content, f, protocol=2)


def test_text2shape(tmp_path, capsys):
    text2shape(tmp_path, MODELS[:8])
    parts = {name: data.load("text2shape", str(tmp_path), name) for name in ("train", "val", "test")}
    assert [[x.id for x in p[0]] for p in parts.values()] == [MODELS[:4], MODELS[4:6], MODELS[6:8]]
    instances, classes = parts["train"]
    assert classes == {"category": ["Chair", "Table"]} and [x.labels["category"] for x in instances] == [0, 1, 0, 1]
    assert instances[1].captions == ['A brown chair, with a "round" seat number 1.\nIt has four legs.', "grey table"]
    assert capsys.readouterr().err.count("8 rows without a description or a model were left out") == 1
    assert len(instances[1].images) == 12
    for i in (0, 1):  # gzip and raw
        assert np.array_equal(data.pixels(instances[i].images[4], 16), data.render(cube(i), 4, 16))
    batch = loader(instances, 2, 2, 2).make(0)
    assert batch["images"].shape == (2, 2, 3, 8, 8) and batch["image_mask"].all()


def test_text2shape_without_splits_voxels_or_with_views(tmp_path, capsys):
    text2shape(tmp_path, splits=False)
    parts = [{x.id for x in data.load("text2shape", str(tmp_path), name)[0]} for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60 and len(parts[0]) > 40 and parts[1] and parts[2]
    first, second, third = sorted(parts[0])[:3]
    for m in (second, third):
        os.unlink(tmp_path / data.VOXEL_FOLDER / m / f"{m}.nrrd")
    for k in (10, 2, 1):
        picture(str(tmp_path / "views" / first / f"{k:02d}.png"), k)
    os.makedirs(tmp_path / "views" / second)
    (tmp_path / "views" / second / "notes.txt").write_text("no picture")
    train, _ = data.load("text2shape", str(tmp_path), "train")
    assert "2 shapes of split train have captions but no voxels" in capsys.readouterr().err
    assert {x.id for x in train} == parts[0] - {second, third}
    assert train[0].id == first and [os.path.basename(v) for v in train[0].images] == ["01.png", "02.png", "10.png"]
    refused("no shapes in split 'dev'", data.load, "text2shape", str(tmp_path), "dev")


def test_broken_text2shape(tmp_path):
    text2shape(tmp_path, MODELS[:6], voxels=False)
    load = lambda: data.load("text2shape", str(tmp_path))
    refused(r"no shapes in split 'train' \(.*2 lack voxels\).*--download", load)
    splits = tmp_path / "processed_captions_val.p"
    for content, what in ((b"", "Ran out of input"), (pickle.dumps({"a": 1}), "no 'caption_tuples'"), (pickle.dumps([1]), "no 'caption_tuples'"),
                          (pickle.dumps({"caption_tuples": [(1, 2)]}), "no 'caption_tuples'"), (splits.read_bytes()[:60], "refused")):
        splits.write_bytes(content)
        refused(f"processed_captions_val.p: .*{what}", load)
    os.unlink(splits)
    refused("processed_captions_.* only for test, train; put all three there, or none", load)
    table = tmp_path / "captions.tablechair.csv"
    table.write_text("id,modelId,category\n1,a,Chair\n")
    refused("tablechair.csv line 1: no column 'description'; expected id, modelId", load)
    table.write_text(HEADER + '1,a,"' + "x" * 200_000)
    refused("tablechair.csv line 2: not CSV.*field", load)
    table.write_bytes(HEADER.encode() + b"1,a,caf\xe9,Chair,,\n")
    refused("tablechair.csv: cannot be read.*UTF-8", load)


class Call:
    """Pickles as a call of anything: what a malicious file does."""

    def __init__(self, function, *args):
        self.parts = (function, *args)

    def __reduce__(self):
        return (self.parts[0], *self.parts[1:])


RECONSTRUCT = np.zeros(0).__reduce__()[0]


def forged(dtype, content, shape=(1,)):
    """An array whose stated type and content disagree."""
    return Call(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_would_run_code_are_refused(tmp_path, protocol):
    mark, path = tmp_path / "mark", str(tmp_path / "a.p")
    plain_flags = (3, "|", None, None, None, -1, -1, 0)  # what makes numpy take bytes for object pointers
    evil = [Call(os.mkdir, (str(mark),)), Call(eval, (f"__import__('os').mkdir({str(mark)!r})",)), Call(getattr, ("a", "upper")), Call(np.load, ("a",)),
            Call(collections.defaultdict, (os.mkdir,)), collections.defaultdict(list, {1: Call(os.mkdir, (str(mark),))}), Call(str, ([1],)), Call(bytes, (5,)),
            Call(os.mkdir, (str(mark),), {"a": 1}), tokenizer, Instance("a", [], []), torch.zeros(2), np.dtype([("a", "O")]),
            forged(Call(np.dtype, ("O8", False, True), plain_flags), b"A" * 8), forged(np.dtype("O"), [], (3,)), forged(np.dtype("i8"), [1]),
            forged(np.dtype("i8"), b"short"), forged(np.dtype("i8"), b"A" * 8, (1 << 62, 4)), forged(Call(np.dtype, ("V8", False, True), plain_flags), b"A" * 8),
            Call(type(np.float64(0)).__reduce__(np.float64(0))[0], (Call(np.dtype, ("O8", False, True), plain_flags), b"A" * 8))]
    for number, what in enumerate(evil):
        with open(path, "wb") as f:
            pickle.dump({"caption_tuples": what}, f, protocol)
        refused("a.p: refused.*nothing of it was run", data.read_pickle, path)
        assert not mark.exists(), number


def test_honest_pickles_are_read(tmp_path):
    path = str(tmp_path / "a.p")
    content = {"i": np.arange(12).reshape(3, 4).T, "f": np.float32([[1.5]]), "big": np.arange(3, dtype=">i4"), "s": np.array(["ab", "c"]), "b": np.array([b"x"]),
               "o": np.array(["a", None, 3], object), "n": np.float64(2.5), "t": (True, None, {1}, [b"", b"raw"]), "empty": np.zeros((0, 3)),
               "d": collections.defaultdict(list, {1: [2]}), "od": collections.OrderedDict(a=1)}
    for protocol in (2, 3, 4, 5):
        with open(path, "wb") as f:
            pickle.dump(content, f, protocol)
        read = data.read_pickle(path)
        assert read.keys() == content.keys()
        for key, value in content.items():
            assert np.array_equal(read[key], value) if isinstance(value, np.ndarray) else read[key] == value, key
            assert not isinstance(value, np.ndarray) or isinstance(read[key], np.ndarray) and read[key].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
    with open(path, "wb") as f:  # as Python 2 with numpy 1 writes: byte strings for text and for an array's content
        f.write(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R"
                b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\xff\xfftb.")
    assert data.read_pickle(path).tolist() == [1, -1]


# ---------------------------------------------------------------- download

@pytest.fixture
def server(monkeypatch):
    """A local server of `files` {path: bytes}. breaks {path: bytes to send before hanging up}; ranges: answers them or not; asked: the requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            s.asked.append((self.path, self.headers.get("Range")))
            content, start = s.files.get(self.path), 0
            if content is None:
                return self.send_error(404)
            if s.ranges and self.headers.get("Range"):
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) - s.shift
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:s.breaks.pop(self.path, len(content))])

        def log_message(self, *args):
            pass

    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.breaks, s.ranges, s.asked, s.shift = {}, {}, True, [], 0
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(data, "TEXT2SHAPE_URL", f"http://127.0.0.1:{s.server_port}/d")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield s
    s.shutdown()
    thread.join()
    s.server_close()


VOXELS, SPLITS, TABLE = f"/d/shapenet/{data.VOXEL_FOLDER}.zip", "/d/text2shape-data.zip", "/d/captions.tablechair.csv"


def zipped(names):
    """The bytes of a zip of {name: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in names.items():
            z.writestr(name, content)
    return out.getvalue()


def publish(server, folder):
    """Serve a small Text2Shape in the published archives."""
    text2shape(folder, MODELS[:8])
    read = lambda p: (folder / p).read_bytes()
    server.files[TABLE] = read("captions.tablechair.csv")
    server.files[VOXELS] = zipped({f"{data.VOXEL_FOLDER}/{m}/{m}.nrrd": read(f"{data.VOXEL_FOLDER}/{m}/{m}.nrrd") for m in MODELS[:8]})
    server.files[SPLITS] = zipped({f"text2shape-data/{kind}/{n}": read(n) if kind == "shapenet" else b"other" for kind in ("shapenet", "primitives") for n in data.SPLIT_FILES})


def test_download_and_once_only(server, tmp_path):
    publish(server, tmp_path / "source")
    root = str(tmp_path / "new" / "root")
    instances, _ = data.load("text2shape", root, "val", download=True)
    assert [x.id for x in instances] == MODELS[4:6] and data.pixels(instances[0].images[0], 8).shape == (8, 8, 3)
    assert sorted(os.listdir(root)) == sorted(["captions.tablechair.csv", data.VOXEL_FOLDER, *data.SPLIT_FILES])  # no archive, no .part
    assert [path for path, _ in server.asked] == [TABLE, VOXELS, SPLITS]
    data.load("text2shape", root, "val", download=True)
    assert len(server.asked) == 3


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_break(server, tmp_path, ranges):
    publish(server, tmp_path / "source")
    root, server.ranges, server.breaks = str(tmp_path / "root"), ranges, {TABLE: 100, VOXELS: 1000}
    load = lambda: data.load("text2shape", root, "train", download=True)
    refused("captions.tablechair.csv: the connection broke after 100 of [0-9]+ bytes; run the command again", load)
    refused(f"the connection broke after 1000 of {len(server.files[VOXELS])} bytes", load)
    assert len(load()[0]) == 4
    assert [r for _, r in server.asked] == [None, "bytes=100-", None, "bytes=1000-", None]
    assert open(os.path.join(root, "captions.tablechair.csv"), "rb").read() == server.files[TABLE]


def test_interrupted_unpacking_is_finished_without_the_network(server, tmp_path, monkeypatch):
    publish(server, tmp_path / "source")
    root, replace, count = str(tmp_path / "root"), os.replace, []

    def stop(a, b):
        count.append(b)
        if b.endswith(".nrrd") and len(count) > 5:
            raise KeyboardInterrupt
        replace(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            data.load("text2shape", root, download=True)
    assert os.path.isdir(os.path.join(root, data.VOXEL_FOLDER))
    del server.files[VOXELS], server.files[TABLE]
    assert len(data.load("text2shape", root, download=True)[0]) == 4


def test_download_errors(server, tmp_path):
    publish(server, tmp_path / "source")
    root = tmp_path / "root"
    load = lambda: data.load("text2shape", str(root), "train", download=True)
    good = dict(server.files)
    server.files[TABLE] = b"<html>please sign in</html>"
    refused("captions.tablechair.csv: the server sent something else; fetch it by hand", load)
    assert os.listdir(root) == []
    del server.files[TABLE]
    refused("the server answers 404", load)
    server.files.update(good)
    (root / "captions.tablechair.csv.part").write_bytes(b"x" * 100_000)  # longer than the file: cannot be a part of it
    refused("does not fit it and was removed", load)
    (root / "captions.tablechair.csv.part").write_bytes(good[TABLE][:100])
    server.shift = 7
    refused("another part than asked for", load)
    server.shift = 0
    damaged = bytearray(good[VOXELS])
    damaged[300] ^= 255  # in the first file
    for content, what in ((bytes(damaged), "damaged"), (good[VOXELS][:-30], "damaged.*not a zip"), (zipped({"readme.txt": b""}), "no voxels")):
        server.files[VOXELS] = content
        refused(f"{data.VOXEL_FOLDER}.zip: .*{what}.*it was removed, run the command again", load)
        assert not (root / f"{data.VOXEL_FOLDER}.zip").exists()
    server.files[VOXELS] = good[VOXELS]
    (tmp_path / "file").write_text("")
    refused("could not be fetched", data.fetch, f"{data.TEXT2SHAPE_URL}/x", str(tmp_path / "file" / "x"))


def test_download_without_network(tmp_path, server, monkeypatch):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setattr(data, "TEXT2SHAPE_URL", f"http://127.0.0.1:{s.getsockname()[1]}/d")  # bound, but nobody listens
        message = refused("captions.tablechair.csv: could not be fetched", data.load, "text2shape", str(tmp_path / "r"), download=True)
    assert "fetch it by hand" in message and "README.md" in message


def test_archives_write_only_inside_the_root(tmp_path):
    outside, root, v = tmp_path / "outside", tmp_path / "root", data.VOXEL_FOLDER
    for name in (f"{v}/../...nrrd", f"../../{v}/a/a.nrrd", f"x/../{data.SPLIT_FILES[0]}", f"{v}/a\\b/a\\b.nrrd"):
        (tmp_path / "a.zip").write_bytes(zipped({name: b"x"}))
        refused("is no name or size of the published archive", data.unpack, str(tmp_path / "a.zip"), str(root))
    names = ["../evil.txt", f"{outside}/evil.nrrd", f"{v}/a/b.nrrd", "evil/processed_captions_train.py", f"/{v}/a/a.nrrd", f"{outside}/processed_captions_val.p"]
    (tmp_path / "a.zip").write_bytes(zipped({name: b"x" for name in names}))
    data.unpack(str(tmp_path / "a.zip"), str(root))
    found = sorted(os.path.relpath(os.path.join(folder, f), tmp_path) for folder, _, files in os.walk(tmp_path) for f in files)
    assert found == ["a.zip", f"root/{v}/a/a.nrrd", "root/processed_captions_val.p"]


# ---------------------------------------------------------------- your own data

@pytest.fixture
def own(tmp_path):
    """load(text, split, name): data.load of a file with this content, beside pictures 0.png .. 59.png."""
    for i in range(60):
        picture(str(tmp_path / f"{i}.png"), i, (4, 3))

    def load(text, split="train", name="mine.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return data.load(str(path), split=split)
    return load


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def test_jsonl(own, tmp_path):
    text = lines({"id": 7, "images": ["0.png", "1.png"], "captions": ["line \u2028 separator", "b"], "labels": {"color": "red", "size": 3}, "split": "train", "group": 1},
                 {"images": ["2.png"], "captions": ["c"], "labels": {"color": "blue", "size": None, "x": ""}, "split": "train", "id": None},
                 {"id": "t", "images": ["3.png"], "captions": ["d"], "labels": {"color": "red"}, "split": "test"})
    text = "\ufeff" + text.replace("\\u2028", "\u2028").replace("}\n", "}\r\n\n", 1)
    train, classes = own(text, "train", "mine.jsonl")
    assert classes == {"color": ["blue", "red"], "size": ["3"]}
    assert [(x.id, x.labels, x.group) for x in train] == [("7", {"color": 1, "size": 0}, "1"), ("3", {"color": 0}, "3")]
    assert train[0].captions == ["line \u2028 separator", "b"] and train[0].images == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    test, classes = own(text, "test", "mine.jsonl")
    assert [(x.id, x.labels) for x in test] == [("t", {"color": 1})] and classes["color"] == ["blue", "red"]


GOOD = {"id": "a", "images": ["0.png"], "captions": ["c"], "split": "train"}


@pytest.mark.parametrize("row, what", [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", 'needs "images" and "captions", each a list'), (GOOD | {"images": "0.png"}, 'needs "images"'),
    (GOOD | {"captions": "c"}, "each a list"), (GOOD | {"extra": 1}, "unknown key 'extra'; known are id, images"), (GOOD | {"labels": ["red"]}, '"labels" must be an object'),
    (GOOD | {"labels": {"color": ["red"]}}, r"color = \['red'\] must be a string or a number"), (GOOD | {"id": ["a"]}, "id = .* must be a string"),
    (GOOD | {"group": {}}, "group = {} must be"), (GOOD | {"split": [1]}, "split = .* must be"), (GOOD | {"split": "valid"}, "split 'valid'; it must be train, val or test"),
    (GOOD | {"images": []}, "no picture"), (GOOD | {"images": [3]}, "no picture, or one that is no path"), (GOOD | {"images": [""]}, "no picture"),
    (GOOD | {"captions": []}, "an empty caption"), (GOOD | {"captions": ["a", " \t"]}, "an empty caption"), (GOOD | {"captions": [None]}, "or one that is no text"),
    (GOOD | {"images": ["gone.png"]}, "picture .*gone.png does not exist"), (GOOD | {"images": ["."]}, "is no file"), (GOOD | {"images": ["a\0b\n.png"]}, r"a\?b\?.png does not exist"),
    (GOOD | {"captions": ["half \ud800"]}, "not valid text"), (GOOD | {"id": "ok"}, "id 'ok' was already used at .*mine.jsonl line 1"), (GOOD | {"id": "b", "split": None}, "no split, while other rows state one"),
    (GOOD | {"id": "b", "split": "val", "labels": {"color": "mauve"}}, "color = 'mauve' never occurs in the train split")])
def test_broken_jsonl(own, row, what):
    text = lines(GOOD | {"id": "ok", "labels": {"color": "red"}}) + (row if isinstance(row, str) else json.dumps(row)) + "\n"
    refused(f"mine.jsonl line 2: .*{what}", own, text, "val", "mine.jsonl")


def test_csv(own, tmp_path):
    text = 'caption,image,id,split,color\n"red, ""big""\nbox",0.png,1,train,red\nred box,1.png,1,train,red\nred box,0.png,1,train,red\n\nblue,2.png,,train,\nblue,3.png,4,test,red\n'
    for variant in (text, "\ufeff" + text, text.replace("\n", "\r\n").replace('""\r\n', '""\n')):
        train, classes = own(variant)
        assert classes == {"color": ["red"]} and [(x.id, x.labels, x.group) for x in train] == [("1", {"color": 0}, "1"), ("2.png", {}, "2.png")]
        assert train[0].captions == ['red, "big"\nbox', "red box"] and train[0].images == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
        assert [(x.id, x.labels) for x in own(variant, "test")[0]] == [("4", {"color": 0})]


@pytest.mark.parametrize("text, what", [
    ("", "line 1: no column 'image'.*it names: nothing"), ("image,text\n0.png,a\n", r"line 1: no column 'caption'; the first line must name them \(it names: image, text\)"),
    ("image,caption,caption\n", "line 1: a column has no name or that of another"), (",image,caption\n0,0.png,a\n", "line 1: a column has no name"), ("image,caption\n", "no rows"),
    ("image,caption\n0.png,a\n0.png,a, b\n", "line 3: 3 cells under 2 columns; quote a cell"), ("image,caption\n0.png\n", "line 2: 1 cells under 2 columns"),
    ("image,caption\n0.png,a\n0.png, \n", "line 3: an empty caption"), ("image,caption\n,a\n", "line 2: no picture"), ("image,caption\n0.png,a\ngone.png,b\n", "line 3: picture .*gone.png does not exist"),
    ('image,caption\n0.png,"a\nb,c\n', "line [23]: not CSV.*is a quote left open"), ('image,caption\n0.png,"' + "x" * 140_000 + '"\n', "line 2: not CSV.*field"),
    ('image,caption\n0.png,"a" b\n', "line 2: not CSV"), (b"image,caption\n0.png,caf\xe9\n", ": cannot be read.*UTF-8"), ("image,caption\n\0.png,a\n", r"line 2: (picture .*\?.png does not exist|not CSV)"),
    ("image,caption,id,color\n0.png,a,1,red\n1.png,b,1,blue\n", "line 3: another label or split than at .*line 2, for the same id '1'"),
    ("image,caption,id,split\n0.png,a,1,train\n1.png,b,1,val\n", "line 3: another label or split"), ("image,caption,split\n0.png,a,train\n1.png,b,\n", "line 3: no split, while other rows"),
    ("image,caption,split\n0.png,a,dev\n", "line 2: split 'dev'"), ("image,caption,split,c\n0.png,a,train,x\n1.png,b,val,y\n", "line 3: c = 'y' never occurs in the train split"),
    ("image,caption,split\n0.png,a,train\n", "no rows in split 'val'; it has train; add some")])
def test_broken_csv(own, text, what):
    refused(f"mine.csv.*{what}", own, text, "val")


def test_own_splits_by_hash(own, capsys):
    table = lambda f: "image,caption,split,note\n" + "".join(f"{i}.png,a,{f(i)},remark {i}\n" for i in range(60))
    ids = lambda text, names: [{x.id for x in own(text, n)[0]} for n in names]
    by_hash = ids(table(lambda i: ""), ("train", "val", "test"))  # none stated: 80/10/10
    assert sum(map(len, by_hash)) == len(set.union(*by_hash)) == 60 and len(by_hash[0]) > 40 and by_hash[1] and by_hash[2]
    stated = table(lambda i: "test" if i >= 30 else "train")  # no val: the last tenth of train
    train, val, test = ids(stated, ("train", "val", "test"))
    assert test == {f"{i}.png" for i in range(30, 60)} and len(train | val) == 30 and not train & val and 0 < len(val) < 10
    assert val == {i for i in train | val if data.hash_tenth(i) == 9}
    with_val = ids(table(lambda i: "val" if i == 5 else "train"), ("train", "val"))
    assert with_val[1] == {"5.png"} and len(with_val[0]) == 59
    assert own(stated)[1] == {} and "'note' has" in capsys.readouterr().err  # a remark, not a task
