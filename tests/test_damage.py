"""Damaged files of every kind that data.py reads, and a checkpoint: truncated, flipped, of a wrong type. Each
loads, or is refused in one line.

    python -m pytest tests/test_damage.py
"""
import functools
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

import clip
import data
from test_data import HEADER, cube, fresh_notes, nrrd, picture, write  # noqa: F401

SOME = range(24)  # of which the hash makes some val
PARTS = ("train", "val", "test")


def features():
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(12, 3)), "text": rng.normal(size=(12, 4)), "label": np.arange(12) % 3,
            "ids": np.array([f"row{i}" for i in range(12)], object)}


def json_sets(root):
    """{file: the JSON that it holds} of the published sets."""
    videos = [f"v_{i}" for i in SOME]
    images = [{"filename": f"{i}.jpg", "split": PARTS[i % 3], "sentences": [{"raw": "a dog"}]} for i in SOME]
    sentences = {v: {"sentences": ["a dog", "runs"], "timestamps": [[0, 1]]} for v in videos}
    return {"flickr8k/dataset_flickr8k.json": {"images": images},
            "msrvtt/MSRVTT_data.json": {"sentences": [{"video_id": v, "caption": "x"} for v in videos]},
            "didemo/train_data.json": [{"video": v, "description": "a dog"} for v in videos],
            "didemo/val_data.json": [{"video": v, "description": "a dog"} for v in videos],
            "didemo/test_data.json": [{"video": v, "description": "a dog"} for v in videos],
            "activitynet/train.json": sentences, "activitynet/val_1.json": sentences,
            "activitynet/train_ids.json": videos, "activitynet/val_ids.json": videos,
            "nus-wide/text/0.json": "a text"}


def make_sets(root):
    """Small copies of all published sets in the current folder, and files of one's own."""
    for file, content in json_sets(root).items():
        write(root / file, json.dumps(content))
    for i in SOME:
        for folder in (".", "flickr8k/Images", "nus-wide/images", "products/images", "wikipedia/images/art",
                       "pascal-sentence/dataset/cat", "food101/images/train/pie", "food101/images/test/pie",
                       *[f"{name}/frames/v_{i}" for name in ("msrvtt", "msvd", "didemo", "activitynet")]):
            picture(root / folder / f"{i}.jpg", size=(6, 5))
        picture(root / f"text2shape/views/m{i}/1.png", size=(6, 5))
        write(root / f"nus-wide/text/{i}.json", '"a text"')
        write(root / f"wikipedia/texts/t{i}.xml", "<d><text id='1'>A <b>dog</b> &amp; &#233;</text></d>")
        write(root / f"pascal-sentence/sentence/cat/{i}.txt", "a dog\nruns\n")
    videos = "".join(f"v_{i}\n" for i in SOME)
    for part in PARTS:
        write(root / f"didemo/{part}_list.txt", videos)
        write(root / f"msvd/{part}_list.txt", videos)
        write(root / f"food101/texts/{part}_titles.csv", "".join(f"{i}.jpg,a pie, {i},pie\n" for i in SOME))
        write(root / f"wikipedia/{part}set_txt_img_cat.list", "".join(f"t{i}\t{i}\t1\n" for i in SOME))
        write(root / f"nus-wide/split/{part.replace('val', 'valid')}.txt", "".join(f"{i}:a\n" for i in SOME))
        tuples = [(np.arange(3), "chair", f"m{i}") for i in SOME if i % 3 == PARTS.index(part)]
        (root / f"text2shape/processed_captions_{part}.p").write_bytes(
            pickle.dumps({"caption_tuples": tuples}, 2))
    write(root / "msrvtt/MSRVTT_train.9k.csv", "video_id\n" + videos)
    write(root / "msrvtt/MSRVTT_JSFUSION_test.csv", "video_id,sentence\nv_0,a dog\nv_1,a cat\n")
    write(root / "text2shape/captions.tablechair.csv",
          HEADER + "".join(f'{i},m{i},"a, ""chair""",Chair,0,0\n' for i in SOME))
    write(root / "products/styles.csv", "id,gender,season,year,productDisplayName\n"
          + "".join(f"{i},Men,Fall,2011,Shirt, {i}\n" for i in SOME))
    write(root / "wikipedia/categories.list", "art\nlaw\n")
    (root / "msvd/raw-captions.pkl").write_bytes(pickle.dumps({f"v_{i}": [["a", "dog"]] for i in SOME}))
    rows = [f'{i}.jpg,"a dog, ""so""",s{i},{("train", "val", "test")[i % 3]},red\n' for i in SOME]
    write(root / "mine.csv", "image,caption,id,split,colour\n" + "".join(rows))
    rows = [{"images": [f"{i}.jpg"], "captions": ["x"], "labels": {"size": i % 2}, "split": PARTS[i % 3]}
            for i in SOME]
    write(root / "mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(root / "flickr8k/precomp/train_caps.txt", "".join(f"caption {i}\n" for i in range(10)))
    np.save(root / "flickr8k/precomp/train_ims.npy", np.ones((2, 3, 4), np.float32))
    np.save(root / "flickr8k/precomp/train_clip.npy", np.ones((2, 6), np.float32))
    np.savez(root / "a.npz", **features() | {"ids": np.arange(12)})
    (root / "a.pkl").write_bytes(pickle.dumps(features(), 4))
    (root / "gzip.nrrd").write_bytes(nrrd(cube(0)))
    (root / "raw.nrrd").write_bytes(nrrd(cube(0), "raw"))
    rgb = Image.open(root / "0.jpg")
    for name in ("a.png", "a.gif", "a.webp", "a.tif", "a.bmp"):
        rgb.save(root / name)
    with zipfile.ZipFile(root / "voxels.zip", "w") as z:
        z.writestr(f"{data.VOXEL_FOLDER}/a/a.nrrd", b"NRRD0004\n" * 20)
    weights = {"a": features()["image"].tolist()}
    clip.save_checkpoint(str(root / "a.pt"), {"settings": {"lr": 0.1}, "weights": weights})


def data_set(name):
    return lambda: data.load_splits(name, name)


def regions():
    for x in data.load_regions("flickr8k", "flickr8k", "train")[0]:
        x.images[0].features()
        x.images[0].clip_input()


READERS = {  # file: what reads it
    **{file: data_set(file.split("/")[0]) for file in (
        *json_sets(None), "didemo/val_list.txt", "msvd/raw-captions.pkl", "msvd/test_list.txt",
        "food101/texts/train_titles.csv", "wikipedia/trainset_txt_img_cat.list", "wikipedia/categories.list",
        "wikipedia/texts/t0.xml", "pascal-sentence/sentence/cat/0.txt", "nus-wide/split/valid.txt",
        "msrvtt/MSRVTT_train.9k.csv", "msrvtt/MSRVTT_JSFUSION_test.csv", "products/styles.csv",
        "text2shape/captions.tablechair.csv", "text2shape/processed_captions_val.p")},
    "mine.csv": lambda: data.load_splits("mine.csv"), "mine.jsonl": lambda: data.load_splits("mine.jsonl"),
    **{f"flickr8k/precomp/train_{file}": regions for file in ("caps.txt", "ims.npy", "clip.npy")},
    **{file: functools.partial(data.read_features, file) for file in ("a.npz", "a.pkl")},
    **{f"{kind}.nrrd": functools.partial(data.read_nrrd, f"{kind}.nrrd") for kind in ("gzip", "raw")},
    **{file: functools.partial(data.open_image, file)
       for file in ("0.jpg", "a.png", "a.gif", "a.webp", "a.tif", "a.bmp")},
    "voxels.zip": lambda: data.unpack("voxels.zip", "unpacked"),
    "a.pt": lambda: clip.load_checkpoint("a.pt")}


def damaged(content, rng):
    for size in (0, 1, len(content) // 3, len(content) - 1):
        yield content[:size]
    for _ in range(12):
        flipped = bytearray(content)
        for at in rng.integers(len(content), size=rng.integers(1, 4)):
            flipped[at] ^= 1 << rng.integers(8)
        yield bytes(flipped)


def of_wrong_types(value):
    """Copies of what a JSON or pickle holds, with one part replaced by another kind of thing."""
    yield from (7, "x", [], {}, None, [[1]], {"a": 2.5})
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts)[:3]:
        for other in of_wrong_types(part):
            copy = value.copy()
            copy[key] = other
            yield copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    make_sets(root)
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", READERS)
def test_damaged_files_load_or_are_refused_in_one_line(file, folder, monkeypatch):
    monkeypatch.chdir(folder)
    content = (folder / file).read_bytes()
    inputs = [content, *damaged(content, np.random.default_rng(0))]
    if file.endswith(".json"):
        inputs += [json.dumps(value).encode() for value in of_wrong_types(json.loads(content))]
    if file == "mine.jsonl":
        first, rest = content.split(b"\n", 1)
        inputs += [json.dumps(value).encode() + b"\n" + rest for value in of_wrong_types(json.loads(first))]
    if file.endswith((".pkl", ".p")):
        inputs += [pickle.dumps(value) for value in of_wrong_types(pickle.loads(content))]
    refusals = 0
    try:
        for number, changed in enumerate(inputs):
            (folder / file).write_bytes(changed)
            try:
                READERS[file]()
            except clip.OneLineError as e:
                assert str(e).isprintable() and number > 0, e
                refusals += 1
    finally:
        (folder / file).write_bytes(content)
    assert refusals > 0 or file.endswith((".jpg", ".txt", ".list", ".xml", ".bmp"))
