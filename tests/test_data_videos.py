"""Tests of the video sets and of region features in data.py, each in a small copy of its official layout."""
import os
import pickle

import numpy as np
import pytest
import torch
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


def test_msvd(tmp_path):
    lists = {"train": ["a_1_5", "b_2_9"], "val": ["c_0_3"], "test": ["d_4_8"]}
    captions = {video: [w.split() for w in WORDS] for videos in lists.values() for video in videos}
    for split, videos in lists.items():
        write(tmp_path / f"{split}_list.txt", "\n".join(videos) + "\n")
        for video in videos:
            frames(tmp_path, video, 2)
    for protocol in (0, 2, 4):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol))
        found = splits("msvd", tmp_path)
        assert {split: [x.id for x in part] for split, part in found.items()} == lists
        assert found["test"][0].captions == list(WORDS)
    for other in ([1, 2], {"a_1_5": ["a text"]}):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(other))
        refused("raw-captions.pkl: expected {video: captions", data.load, "msvd", str(tmp_path))


def test_didemo_joins_a_paragraph(tmp_path):
    for split in ("train", "val", "test"):
        moments = [{"video": f"{split}@1.mp4", "description": w, "times": []} for w in WORDS]
        write(tmp_path / f"{split}_data.json", moments)
        write(tmp_path / f"{split}_list.txt", f"{split}@1.mp4\n")
        frames(tmp_path, f"{split}@1", 2)
    for split, part in splits("didemo", tmp_path).items():
        assert [(x.id, x.captions) for x in part] == [(f"{split}@1.mp4", [" ".join(WORDS)])]
    write(tmp_path / "val_data.json", [{"video": "a"}])
    refused("val_data.json: expected DiDeMo's", data.load, "didemo", str(tmp_path))


def test_activitynet_joins_a_paragraph(tmp_path):
    train, test = by_hash(20, "v_"), ["v_t1", "v_t2"]
    for file, ids, names in (("train.json", "train_ids.json", train), ("val_1.json", "val_ids.json", test)):
        sentences = {v: [f" {WORDS[0]}.", f"{v} ends. "] for v in names}
        write(tmp_path / file, {v: {"timestamps": [[0, 1]], "sentences": sentences[v]} for v in names})
        write(tmp_path / ids, names)
    for video in [*train, "v_t1", "t2"]:  # with the prefix or without
        frames(tmp_path, video, 1)
    found = splits("activitynet", tmp_path)
    assert [x.captions for x in found["test"]] == [[f"{WORDS[0]}. v_t1 ends."], [f"{WORDS[0]}. v_t2 ends."]]
    assert found["test"][1].images[0].endswith(os.path.join("frames", "t2", "0000.jpg"))
    assert len(found["train"]) + len(found["val"]) == 20
    for content, said in (("{", "not JSON"), ({"v_1": ["no sentences"]}, "expected ActivityNet's")):
        write(tmp_path / "train.json", content)
        refused(f"train.json: {said}.*get the published file again", data.load, "activitynet", str(tmp_path))


def test_all_frames_missing(tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"x": [["a"]]}))
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}_list.txt", "x\n")
    refused("of split train, 1 of 1 rows .*frames/x/\\*.jpg: No such file", data.load, "msvd", str(tmp_path))


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
    regions(tmp_path, "dev", 10, 10)
    np.save(tmp_path / "precomp" / "dev_ims.npy", double := array[:2].repeat(5, axis=0))  # or one a caption
    instances, classes = data.load_regions("flickr30k", str(tmp_path), "train")
    assert [x.captions for x in instances] == [[f"caption {5 * i + k}" for k in range(5)] for i in range(3)]
    loader = data.Loader(instances, clip.Tokenizer([]), 16, 32, 2, 1, 2, train=True, seed=3)
    batch = data.to_device(loader.make(0), "cpu")
    assert batch["images"].shape == (2, 1, 4, 6) and classes == {}
    assert torch.equal(batch["images"][:, 0], torch.from_numpy(array[batch["index"]]))  # untouched
    val, _ = data.load_regions("flickr30k", str(tmp_path), "val")
    assert len(val) == 2 and np.array_equal(val[1].images[0].features(), double[5])
    refused("no picture", data.pixels, val[0].images[0], 32)
    refused("--regions: no split 'dev'; it has train", data.load_regions, "flickr30k", str(tmp_path), "dev")


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: regions(folder.parent, "train", 4, 15), "4 rows, but 15 lines in .*train_caps.txt"),
    (lambda folder: np.save(folder / "train_ims.npy", np.zeros((3, 8), np.float32)),
     r"float32 of shape \(3, 8\); expected floats \(images, regions, width\)"),
    (lambda folder: np.save(folder / "train_ims.npy", np.array([{}])), "refused, damaged or of another kind"),
    (lambda folder: (folder / "train_ims.npy").write_bytes(b"\\x93NUMPY"), "refused, damaged or of another"),
    (lambda folder: (folder / "train_caps.txt").unlink(), "train_caps.txt: No such file"),
    (lambda folder: regions(folder.parent, "train", 15, 15), "rows 0 to 4 differ: one caption to an image")])
def test_region_features_refused(spoil, said, tmp_path):
    regions(tmp_path, "train", 3, 15)
    spoil(tmp_path / "precomp")
    data._rows_of.cache_clear()
    refused(said, data.load_regions, "flickr30k", str(tmp_path), "train")
