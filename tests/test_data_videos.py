"""Tests of the video sets and of region features in data.py: each in a small copy of its official layout; frames evenly taken; the
built-in shapes cut in two parts."""
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data

WORDS = ("a man cooks", "a dog runs", "two people dance")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def frames(root, video, count):
    folder = root / "frames" / video
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(folder / f"{k:04d}.jpg")


def splits(name, root):
    return {split: data.load(name, str(root), split)[0] for split in ("train", "val", "test")}


def by_hash(count, prefix="video"):
    """Names enough that both the last tenth of train and the rest have some."""
    names = [f"{prefix}{i}" for i in range(count)]
    assert {data.hash_tenth(n) == 9 for n in names} == {True, False}
    return names


def test_msrvtt(tmp_path, capsys):
    train, test = by_hash(20), ["video7010", "video7020"]
    write(tmp_path / "MSRVTT_data.json", {"videos": [], "sentences": [{"video_id": v, "caption": f"{w} in {v}", "sen_id": 0} for v in train + test for w in WORDS]})
    write(tmp_path / "MSRVTT_train.9k.csv", "video_id\n" + "\n".join(train) + "\n")
    write(tmp_path / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr7010,video7010,\"a cat, a dog\"\nret1,msr7020,video7020,a ball\n")
    for video in train[:-1] + test:
        frames(tmp_path, video, 3)
    (tmp_path / "frames" / train[-1]).mkdir()  # an empty folder
    found = splits("msrvtt", tmp_path)
    assert {x.id for x in found["val"]} == {v for v in train[:-1] if data.hash_tenth(v) == 9} and len(found["train"]) + len(found["val"]) == 19
    assert all(x.captions == [f"{w} in {x.id}" for w in WORDS] and len(x.images) == 3 for x in found["train"] + found["val"])
    assert [(x.id, x.captions) for x in found["test"]] == [("video7010", ["a cat, a dog"]), ("video7020", ["a ball"])]  # 1k-A: one sentence each
    assert f"1 videos of split {'val' if data.hash_tenth(train[-1]) == 9 else 'train'}" in (said := capsys.readouterr().err) and train[-1] in said
    write(tmp_path / "MSRVTT_JSFUSION_test.csv", "key,video_id\nret0,video7010\n")
    with pytest.raises(data.DataError, match="MSRVTT_JSFUSION_test.csv line 1: expected columns video_id, sentence"):
        data.load("msrvtt", str(tmp_path), "test")


def test_msvd(tmp_path):
    lists = {"train": ["a_1_5", "b_2_9"], "val": ["c_0_3"], "test": ["d_4_8"]}
    captions = {v: [w.split() for w in WORDS] for part in lists.values() for v in part}
    for protocol in (0, 2, 4):
        (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol))
        for split, names in lists.items():
            write(tmp_path / f"{split}_list.txt", "\n".join(names) + "\n")
            for video in names:
                frames(tmp_path, video, 2)
        found = splits("msvd", tmp_path)
        assert {s: [x.id for x in part] for s, part in found.items()} == lists and found["test"][0].captions == list(WORDS)
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(data.DataError, match="raw-captions.pkl: not a dict of lists of captions"):
        data.load("msvd", str(tmp_path), "train")


def test_didemo_and_activitynet_join_a_paragraph(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path / "d" / f"{split}_data.json", [{"video": f"{split}@1.mp4", "description": w, "times": []} for w in WORDS])
        write(tmp_path / "d" / f"{split}_list.txt", f"{split}@1.mp4\n")
        frames(tmp_path / "d", f"{split}@1", 2)
    for split, part in splits("didemo", tmp_path / "d").items():
        assert [(x.id, x.captions) for x in part] == [(f"{split}@1", [" ".join(WORDS)])]
    train, test = by_hash(20, "v_"), ["v_t1", "v_t2"]
    for file, ids, names in (("train.json", "train_ids.json", train), ("val_1.json", "val_ids.json", test)):
        write(tmp_path / "a" / file, {v: {"duration": 9.0, "timestamps": [[0, 1]], "sentences": [f" {WORDS[0]}.", f"{v} ends. "]} for v in names})
        write(tmp_path / "a" / ids, names)
    for video in train + test:
        frames(tmp_path / "a", video[2:] if video == "v_t2" else video, 1)  # with the prefix or without
    found = splits("activitynet", tmp_path / "a")
    assert [x.captions for x in found["test"]] == [[f"{WORDS[0]}. v_t1 ends."], [f"{WORDS[0]}. v_t2 ends."]]
    assert found["test"][1].images[0].endswith(os.path.join("frames", "t2", "0000.jpg")) and len(found["train"]) + len(found["val"]) == 20
    write(tmp_path / "a" / "train.json", "{")
    with pytest.raises(data.DataError, match="train.json: no valid JSON"):
        data.load("activitynet", str(tmp_path / "a"), "train")
    write(tmp_path / "a" / "train.json", {"v_1": ["no sentences"]})
    with pytest.raises(data.DataError, match="train.json: not ActivityNet's"):
        data.load("activitynet", str(tmp_path / "a"), "train")


def test_all_frames_missing(tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"x": [["a"]]}))
    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}_list.txt", "x\n")
    with pytest.raises(data.DataError, match="no video of split 'train' has frames .1 lack them."):
        data.load("msvd", str(tmp_path), "train")


def test_frames_are_taken_evenly_and_in_order(tmp_path):
    for name, count in (("long", 10), ("short", 3)):
        frames(tmp_path, name, count)
    folder = lambda name, count: [str(tmp_path / "frames" / name / f"{k:04d}.jpg") for k in range(count)]
    instances = [data.Instance("long", folder("long", 10), ["a"]), data.Instance("short", folder("short", 3), ["b"])]
    for train in (False, True):
        loader = data.Loader(instances, clip.Tokenizer([]), 8, 16, 2, captions=1, train=train, frames=4)
        batch = loader.make(0)
        order = batch["index"].tolist()
        shown = {instances[i].id: batch["images"][b, :, 0, 8, 8][batch["image_mask"][b]].float().div(20).round().tolist() for b, i in enumerate(order)}
        assert batch["images"].shape == (2, 4, 3, 16, 16) and shown == {"long": [0, 3, 6, 9], "short": [0, 1, 2]}


def regions(root, file, rows, captions, width=6):
    (root / "precomp").mkdir(exist_ok=True)
    array = np.random.default_rng(len(file)).random((rows, 4, width), np.float32)
    np.save(root / "precomp" / f"{file}_ims.npy", array)
    (root / "precomp" / f"{file}_caps.txt").write_text("".join(f"caption {i}\n" for i in range(captions)))
    return array


def test_region_features(tmp_path):
    array, double = regions(tmp_path, "train", 3, 15), regions(tmp_path, "dev", 10, 10)  # one row an image, or one a caption
    instances, classes = data.load_regions("flickr30k", str(tmp_path), "train")
    assert [x.captions for x in instances] == [[f"caption {5 * i + k}" for k in range(5)] for i in range(3)] and classes == {}
    batch = data.to_device(data.Loader(instances, clip.Tokenizer([]), 16, 32, 2, 1, 2, train=True, seed=3).make(0), "cpu")
    assert batch["images"].shape == (2, 1, 4, 6) and torch.equal(batch["images"][:, 0], torch.from_numpy(array[batch["index"]]))  # untouched
    val, _ = data.load_regions("flickr30k", str(tmp_path), "val")
    assert len(val) == 2 and np.array_equal(val[1].images[0].features(), double[5])
    with pytest.raises(data.DataError, match="no picture"):
        data.pixels(val[0].images[0], 32)


@pytest.mark.parametrize("spoil, said", [
    (lambda root: regions(root, "train", 4, 15), "has 4 rows and .*train_caps.txt 15 captions"),
    (lambda root: np.save(root / "precomp" / "train_ims.npy", np.zeros((3, 8), np.float32)), r"float32 of shape \(3, 8\); region features are"),
    (lambda root: np.save(root / "precomp" / "train_ims.npy", np.array([{}] * 3), allow_pickle=True), "no region features"),
    (lambda root: (root / "precomp" / "train_ims.npy").write_bytes(b"\\x93NUMPY"), "no region features"),
    (lambda root: (root / "precomp" / "train_caps.txt").unlink(), "train_caps.txt")])
def test_region_features_refused(spoil, said, tmp_path):
    regions(tmp_path, "train", 3, 15)
    data._regions.cache_clear()
    spoil(tmp_path)
    with pytest.raises(data.DataError, match=said):
        data.load_regions("flickr30k", str(tmp_path), "train")


def test_the_two_parts_of_the_built_in_shapes():
    parts = {(part, split): data.load(f"primitives-{part}", split=split)[0] for part in ("source", "target") for split in ("train", "val", "test")}
    assert {key: len(part) for key, part in parts.items()} == {("source", "train"): 2880, ("source", "val"): 360, ("source", "test"): 360,
                                                               ("target", "train"): 396, ("target", "val"): 396, ("target", "test"): 396}
    groups = [{x.group for (part, _), found in parts.items() for x in found if part == which} for which in ("source", "target")]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 756
    seen = {(x.labels["shape"], x.labels["color"]) for x in parts["source", "train"]}
    assert {s for s, _ in seen} == set(range(4)) and {c for _, c in seen} == set(range(10))
    with pytest.raises(data.DataError, match="primitives-target has no split 'unseen'"):
        data.load("primitives-target", split="unseen")
