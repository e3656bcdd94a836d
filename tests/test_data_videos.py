"""Tests of the video sets and of region features in data.py, each in a small copy of its official layout."""
import os

import numpy as np
import pytest
from PIL import Image

import clip
import data
from test_data import fresh_notes, refused, splits, write  # noqa: F401

WORDS = ("a man cooks", "a dog runs", "two people dance")


def frames(root, video, count):
    """Write frames whose red is 20 times their number; returns their paths."""
    folder = root / "frames" / video
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(folder / f"{k:04d}.jpg")
    return [str(folder / f"{k:04d}.jpg") for k in range(count)]


def by_hash(count, prefix="video"):
    """Names enough that both the last tenth of train and the rest have some."""
    names = [f"{prefix}{i}" for i in range(count)]
    assert {data.hash_tenth(n) == 9 for n in names} == {True, False}
    return names


def test_msrvtt(tmp_path, capsys):
    train, test = by_hash(20), ["video7010", "video7020"]
    sentences = [{"video_id": v, "caption": f"{w} in {v}", "sen_id": 0} for v in train + test for w in WORDS]
    write(tmp_path / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    write(tmp_path / "MSRVTT_train.9k.csv", "\n".join(["video_id", *train, ""]))
    rows = 'ret0,msr7010,video7010,"a cat, a dog"\nret1,msr7020,video7020,a ball\n'
    write(tmp_path / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\n" + rows)
    for video in train[:-1] + test:
        frames(tmp_path, video, 3)
    (tmp_path / "frames" / train[-1]).mkdir()  # an empty folder
    found = splits("msrvtt", tmp_path)
    assert {x.id for x in found["val"]} == {v for v in train[:-1] if data.hash_tenth(v) == 9}
    assert len(found["train"]) + len(found["val"]) == 19
    for x in found["train"] + found["val"]:
        assert x.captions == [f"{w} in {x.id}" for w in WORDS] and len(x.images) == 3
    assert [x.id for x in found["test"]] == test
    assert [x.captions for x in found["test"]] == [["a cat, a dog"], ["a ball"]]  # 1k-A: one sentence each
    split = "val" if data.hash_tenth(train[-1]) == 9 else "train"
    notes = capsys.readouterr().err
    assert f"of split {split}, 1 of" in notes and f"{train[-1]}{os.sep}*.jpg: No such file" in notes
    for file, content, said in (
            ("MSRVTT_JSFUSION_test.csv", "key,video_id\nret0,video7010\n",
             " line 1: no column 'sentence'; the first line must name video_id, sentence"),
            ("MSRVTT_train.9k.csv", "key,video_id\nret0\n", " line 2: 1 cells under 2 columns"),
            ("MSRVTT_data.json", {"sentences": [{"video_id": 3}]}, ": expected MSR-VTT's {sentences: ")):
        write(tmp_path / file, content)
        refused(file + said, data.load, "msrvtt", str(tmp_path), "test")


def test_frames_are_taken_evenly_and_in_order(tmp_path):
    instances = [data.Instance(str(count), frames(tmp_path, str(count), count), ["a"]) for count in (10, 3)]
    for train in (False, True):
        loader = data.Loader(instances, clip.Tokenizer([]), 8, 16, 2, captions=1, train=train, frames=4)
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
    loader = data.Loader(instances, clip.Tokenizer([]), 16, 32, 2, 1, 2, train=True, seed=3)
    batch = data.to_device(loader.make(0), "cpu")
    assert batch["images"].features.shape == (2, 1, 4, 6) and classes == {}
    shown = batch["images"][batch["image_mask"]]
    assert np.array_equal(shown.features, array[batch["index"]])  # untouched
    assert np.array_equal(shown.clip_input, embeddings[batch["index"]].astype(np.float32))
    regions(tmp_path, "dev", 10, 10)
    np.save(tmp_path / "precomp" / "dev_ims.npy", double := array[:2].repeat(5, axis=0))  # or one a caption
    val, _ = data.load_regions("flickr30k", str(tmp_path), "val")
    assert len(val) == 2 and np.array_equal(val[1].images[0].features(), double[5])
    loader = data.Loader(val, clip.Tokenizer([]), 16, 32, 2)
    assert np.array_equal(data.to_device(loader.make(0), "cpu")["images"][:, 0], double[::5])
    refused("no picture", data.pixels, val[0].images[0], 32)
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
