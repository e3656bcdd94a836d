"""Damaged files of every kind that is read: empty, truncated, a byte flipped, another file's content. Each
gives a result or one line and nothing else; a pickle that would run code is refused by name.
"""
import gzip
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
from runs import SMALL
from test_clip import jit_archive
from test_data import Call

READERS = {  # file: the function that reads it, and its arguments where that is not the file alone
    "zip.pt": (clip.load,), "pickle.pt": (clip.load,), "script.pt": (clip.load,),
    "w.safetensors": (clip.load, "w.index.json"), "w.index.json": (clip.load,),
    "checkpoint.pt": (clip.load_checkpoint,), "a.npz": (data.read_features,), "a.pkl": (data.read_features,),
    "raw.nrrd": (data.read_nrrd,), "gzip.nrrd": (data.read_nrrd,), "a.png": (data.open_image,),
    "a.jpg": (data.open_image,), "a.gif": (data.open_image,), "mine.csv": (data.load,),
    "mine.jsonl": (data.load,), "dataset_flickr8k.json": (data.load, "flickr8k", "."),
    "raw-captions.pkl": (data.load, "msvd", "."), "voxels.zip": (data.unpack, "voxels.zip", "unpacked")}


def write_weights():
    """A very small CLIP in each format."""
    tokenizer = clip.Tokenizer.train(["a red chair", "a dog"] * 9, 520)
    model = clip.CLIP(replace(SMALL[0], vocab_size=tokenizer.vocab_size, image_resolution=8, context_length=8,
                              vision_width=64, transformer_width=64))
    clip.save(model, "zip.pt")
    torch.save(model.state_dict(), "pickle.pt", _use_new_zipfile_serialization=False)
    jit_archive(model, "script.pt", False)
    header = {}
    body = b""
    for key, value in model.state_dict().items():
        begin = len(body)
        body += value.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [begin, len(body)]}
    text = json.dumps(header).encode()
    Path("w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    Path("w.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(header, "w.safetensors")}))
    model.tokenizer = tokenizer
    clip.save_checkpoint("checkpoint.pt", {"clip": clip.describe(model), "settings": {"lr": 0.1}})


def write_data():
    """Features, voxels, pictures, tables, and published sets of 24 rows."""
    features = {"image": np.ones((6, 3)), "text": np.ones((6, 4)), "label": np.arange(6) % 2}
    np.savez("a.npz", **features)
    Path("a.pkl").write_bytes(pickle.dumps(features, 2))
    header = b"NRRD0004\ntype: uint8\ndimension: 4\nsizes: 4 6 6 6\n" \
             b"space directions: none (0,1,0) (0,0,1) (1,0,0)\nencoding: "
    Path("raw.nrrd").write_bytes(header + b"raw\n\n" + bytes(range(216)) * 4)
    Path("gzip.nrrd").write_bytes(header + b"gzip\n\n" + gzip.compress(bytes(range(216)) * 4))
    with zipfile.ZipFile("voxels.zip", "w") as z:
        z.writestr(f"{data.VOXEL_FOLDER}/a/a.nrrd", b"NRRD0004\n" * 20)
    for name in ("a.png", "a.jpg", "a.gif"):
        Image.effect_noise((9, 7), 90).save(name)
    os.mkdir("Images")
    table = "image,caption,id,split\n"
    rows = ""
    images = []
    for i in range(24):
        split = ("train", "val", "test")[i % 3]
        table += f'a.png,"a dog, ""so""",s{i},{split}\n'
        rows += json.dumps({"images": ["a.png"], "captions": ["x"], "split": split}) + "\n"
        images.append({"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": "a dog"}]})
        os.link("a.jpg", f"Images/{i}.jpg")
        os.makedirs(f"frames/{i}")
        os.link("a.jpg", f"frames/{i}/1.jpg")
    Path("mine.csv").write_text(table)
    Path("mine.jsonl").write_text(rows)
    Path("dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    Path("raw-captions.pkl").write_bytes(pickle.dumps({str(i): [["a", "dog"]] for i in range(24)}))
    for part in ("train", "val", "test"):
        Path(f"{part}_list.txt").write_text("\n".join(map(str, range(24))))


@pytest.fixture
def damaged(tmp_path, monkeypatch, request):
    """-> (content of the file, a function that reads it with another content)."""
    monkeypatch.chdir(tmp_path)
    write_data()
    write_weights()
    path = Path(request.param)
    function, *arguments = READERS[request.param]

    def read(changed):
        path.unlink()
        path.write_bytes(changed)
        return function(*arguments or [str(path)])
    return path.read_bytes(), read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damaged", READERS, indirect=True)
def test_damaged_files_load_or_are_refused_in_one_line(damaged):
    content, read = damaged
    rng = np.random.default_rng(0)
    read(content)
    changed = [content[:size] for size in (0, 1, len(content) // 3, len(content) * 9 // 10, len(content) - 1)]
    for at in rng.integers(len(content), size=6):
        changed.append(content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1:])
    changed += [pickle.dumps([1, {"a": "b"}]), b'{"a": [1]}\n', b"\x89PNG\r\n\x1a\n" + bytes(99)]
    refusals = 0
    for new in changed:
        try:
            read(new)
        except clip.OneLineError as e:
            assert str(e).isprintable()
            refusals += 1
    assert refusals >= 4


CALLS = {"mkdir": (os.mkdir, ("ran",)), "eval": (eval, ("__import__('os').mkdir('ran')",)),
         "load_state_dict_from_url": (torch.hub.load_state_dict_from_url, ("file://ran",))}  # torch's own


@pytest.mark.parametrize("damaged", ["zip.pt", "script.pt", "pickle.pt", "a.pkl", "raw-captions.pkl"],
                         indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_would_run_code_is_refused_by_name(name, damaged):
    content, read = damaged
    file = Path("evil")
    evil = {"a": Call(*CALLS[name])}
    if content[:2] != b"PK":
        file.write_bytes(pickle.dumps(evil, 2))
    elif b"/constants.pkl" in content:  # an archive of TorchScript
        with zipfile.ZipFile(file, "w") as z:
            z.writestr("a/data.pkl", pickle.dumps(evil, 2))
            z.writestr("a/constants.pkl", b"")
    else:
        torch.save(evil, file)
    with pytest.raises(clip.OneLineError, match=f"{name}.*nothing of it was run"):
        read(file.read_bytes())
    assert not os.path.exists("ran")
