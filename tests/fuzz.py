"""Damaged files of every kind that the project reads: each must load, or be refused in one line.

    python tests/fuzz.py                                          # 100,000 inputs, some minutes on two cores
    python tests/fuzz.py --inputs 5000 --kind pickle npz --seed 1
    python tests/fuzz.py --again fuzz-found/pickle-0-123.bin      # one input that was found, once more

Valid files are made, damaged by a seeded generator, and read as the project reads them. Allowed is that a
file loads, or that clip.CheckpointError or data.DataError is raised, whose message is one line. Anything else
is wrong: another exception, a crash, more than 2 seconds, more than 1 GiB. What is wrong is kept, in
`fuzz-found`, and the exit code is 1.
"""
import argparse
import contextlib
import copy
import csv
import gc
import gzip
import importlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    torch.set_num_threads(1)

import clip
import data
import eval
from runs import kept_signals

SECONDS = 2  # of processor time, for one input
BYTES = 1 << 30  # above what the process held before
STUCK = 20  # seconds of processor time after which an input is given up
ROOM = 4 << 30  # bytes of address space above the start: what asks for more gets a MemoryError
BATCH = 400  # inputs to a process
LARGEST = 1 << 19  # bytes of an input, before it is packed
WORDS = ("red", "green", "chair", "a", "with", "legs", "dog", "round", "table", "na\u00efve", "\u732b")


# ---------------------------------------------------------------- valid files, and how the project reads them

@dataclass
class Sample:
    """A valid file, and the function that reads it as the project does."""
    file: str
    read: callable


KINDS = {}  # name -> function that writes valid files into the current folder and returns their samples


def kind(function):
    KINDS[function.__name__] = function
    return function


def write(path, content):
    """A file of bytes, text, or what JSON makes of anything else."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())


def picture(path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def caption(i):
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 7))


def data_set(name, file, split="train"):
    """The sample of a file of a published data set, whose folder has its name."""
    return Sample(os.path.join(name, file), lambda: data.load(name, name, split))


def small_clip():
    """A CLIP with a tokenizer of its own, and another with a ResNet."""
    tokenizer = clip.Tokenizer.train([caption(i) for i in range(50)], 540)
    config = replace(clip.MODELS["tiny"][0], embed_dim=8, image_resolution=8, vision_patch_size=4,
                     vision_width=64, vision_layers=1, vision_heads=1, context_length=8,
                     transformer_width=64, transformer_layers=1, transformer_heads=1, vocab_size=540)
    torch.manual_seed(0)
    model = clip.CLIP(config)
    model.tokenizer = tokenizer
    return model


def read_clip(path):
    return lambda: clip.load(path, "cpu")


@kind
def checkpoint():
    """A checkpoint with little in it but a CLIP and its tokenizer."""
    clip.save_checkpoint("clip.pt", {"clip": clip.describe(small_clip()), "method": "train_mxm",
                                     "settings": {"data": "x", "root": None}, "state": {"step": 3}})
    return [Sample("clip.pt", lambda: eval.restore("clip.pt", "cpu"))]


@kind
def methods():
    """best.pt and last.pt of a run of each script."""
    checkpoint()
    samples = []
    for i in range(12):
        picture(f"{i}.png")
    rows = [{"images": [f"{i}.png"], "captions": [caption(i)], "labels": {"kind": "ab"[i // 2 % 2]},
             "split": ("train", "val", "test")[i % 3]} for i in range(12)]
    write("mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    common = ["--data", "mine.jsonl", "--clip", "clip.pt", "--epochs", "1", "--batch-size", "2",
              "--device", "cpu", "--workers", "0", "--crop", "0", "--amp", "off"]
    for method, words in (("clip4cmr", ["--dim", "8"]), ("user", ["--dim", "8", "--queue", "4"]),
                          ("mxm", []), ("adapter", ["--rank", "2", "--share", "2"]),
                          ("cmaclip", ["--layers", "1", "--width", "8", "--heads", "2"])):
        out = f"run-{method}"
        with kept_signals():
            importlib.import_module(f"train_{method}").main([*common, *words, "--out", out])
        for file in ("best.pt", "last.pt"):
            path = os.path.join(out, file)
            samples.append(Sample(path, lambda path=path: eval.restore(path, "cpu")))
    return samples


@kind
def weights():
    """State dicts as torch.save writes them, now and long ago, open_clip's and Hugging Face's among them."""
    model = small_clip()
    state = model.state_dict()
    clip.save(model, "saved.pt")
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 1, "state_dict": parallel}, "open.pt")
    return [Sample(path, read_clip(path)) for path in ("saved.pt", "old.pt", "open.pt")]


class Module(torch.nn.Module):
    """A tree of parameters: what TorchScript needs of a CLIP."""

    def forward(self, x):
        return x


@kind
def torchscript():
    """An archive as OpenAI publishes it."""
    root = Module()
    for key, value in small_clip().half().state_dict().items():
        module = root
        *path, name = key.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Module())
            module = getattr(module, part)
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(root, torch.zeros(1)), "jit.pt")
    return [Sample("jit.pt", read_clip("jit.pt"))]


def as_safetensors(state):
    header, body = {}, b""
    names = {dtype: name for dtype, (name, _) in clip.DTYPES.items()}
    for key, value in state.items():
        part = value.contiguous().numpy().tobytes()
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape),
                       "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@kind
def safetensors():
    write("w.safetensors", as_safetensors(small_clip().state_dict()))
    return [Sample("w.safetensors", read_clip("w.safetensors"))]


@kind
def config():
    """The small JSON files beside weights."""
    content = as_safetensors(small_clip().state_dict())
    write("open/open_clip_model.safetensors", content)
    write("shards/part.safetensors", content)
    tower = {"layers": 1, "width": 64, "patch_size": 4, "image_size": 8, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 540, "width": 64, "heads": 1, "layers": 1}
    write("open/open_clip_config.json",
          {"model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text}})
    write("shards/model.safetensors.index.json",
          {"metadata": {}, "weight_map": {"a": "part.safetensors"}})
    hidden = {"hidden_act": "gelu", "num_attention_heads": 1}
    write("config.json", {"vision_config": hidden, "text_config": hidden})
    return [Sample("open/open_clip_config.json", read_clip("open")),
            Sample("shards/model.safetensors.index.json", read_clip("shards")),
            Sample("config.json", lambda: clip._read_hugging_face("."))]


@kind
def log():
    """log.jsonl of a run, which is drawn and which --resume shortens; metrics.json, to which eval.py adds."""
    lines = [{"step": 3 * i, "loss": 3 / i, "epoch": i, "val": {"rSum": 10.0 * i}} for i in range(1, 6)]
    write("run/log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    clip.save_checkpoint("run/last.pt", {"settings": {"lr": 1.0}, "step": 9})
    write("run/metrics.json", {"test": {"model": {"rSum": 1.0}}})
    return [Sample("run/log.jsonl", lambda: eval.draw_curves("curves.png", ["run"])),
            Sample("run/log.jsonl", lambda: eval.open_run("run", {"lr": 1.0}, True)),
            Sample("run/metrics.json", lambda: eval.add_metrics("run/metrics.json", "test", {"a": {}}))]


@kind
def captions():
    """Texts, from which a vocabulary is learned and which are then encoded."""
    write("captions.txt", "\n".join(caption(i) for i in range(40)))
    tokenizer = clip.Tokenizer.train([caption(i) for i in range(50)], 540)

    def encode():
        texts = data.read_text("captions.txt").splitlines()
        tokenizer.rows(texts, 32)
        clip.Tokenizer.train(texts, 530)
    return [Sample("captions.txt", encode)]


@kind
def jsonl():
    for i in range(6):
        picture(f"{i}.png")
    rows = [{"id": f"s{i}", "images": [f"{i}.png"], "captions": [caption(i), "x"],
             "labels": {"colour": "red", "size": i // 2 % 2}, "group": i // 2,
             "split": ("train", "val")[i % 2]}
            for i in range(6)]
    write("mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return [Sample("mine.jsonl", lambda: data.load("mine.jsonl")),
            Sample("mine.jsonl", lambda: data.load("mine.jsonl", split="val"))]


@kind
def tables():
    """CSV files: one's own, and those of published data sets."""
    for i in range(6):
        for folder in (".", "products/images", "food101/images/train/pie", "food101/images/test/pie"):
            picture(f"{folder}/{i}.jpg")
        picture(f"msrvtt/frames/video{i}/1.jpg")
        picture(f"text2shape/views/{i:032x}/1.png")
    rows = [f"{i}.jpg,\"{caption(i)}, \"\"so\"\"\",s{i},{('train', 'val')[i % 2]},red" for i in range(6)]
    write("mine.csv", "image,caption,id,split,colour\r\n" + "\r\n".join(rows))
    columns = "id,gender,masterCategory,baseColour,year,productDisplayName\n"
    rows = "".join(f"{i},Men,Apparel,Red,2011,Shirt, {i}\n" for i in range(6))
    write("products/styles.csv", columns + rows)
    for part in ("train", "test"):
        write(f"food101/texts/{part}_titles.csv", "".join(f"{i}.jpg,a pie, {i},pie\n" for i in range(6)))
    write("text2shape/captions.tablechair.csv", "id,modelId,description,category\n"
          + "".join(f"{i},{i:032x},\"a {caption(i)}\",Chair\n" for i in range(6)))
    videos = [f"video{i}" for i in range(6)]
    write("msrvtt/MSRVTT_data.json", {"sentences": [{"video_id": video, "caption": "x"} for video in videos]})
    write("msrvtt/MSRVTT_train.9k.csv", "video_id\n" + "\n".join(videos))
    write("msrvtt/MSRVTT_JSFUSION_test.csv",
          "key,video_id,sentence\n" + "".join(f"r{v},{v},a b\n" for v in videos))
    return [Sample("mine.csv", lambda: data.load("mine.csv")), data_set("products", "styles.csv"),
            data_set("food101", "texts/train_titles.csv"), data_set("text2shape", "captions.tablechair.csv"),
            data_set("msrvtt", "MSRVTT_train.9k.csv"),
            data_set("msrvtt", "MSRVTT_JSFUSION_test.csv", "test")]


@kind
def jsons():
    """JSON files of published data sets."""
    videos = [f"v_{i}" for i in range(6)]
    for i, video in enumerate(videos):
        picture(f"flickr8k/Images/{i}.jpg")
        picture(f"nus-wide/images/{i}.jpg")
        write(f"nus-wide/text/{i}.json", f"\"a text {i} \\u732b\"")
        for name in ("msrvtt", "didemo", "activitynet"):
            picture(f"{name}/frames/{video}/1.jpg")
    images = [{"filename": f"{i}.jpg", "split": ("train", "restval")[i % 2],
               "sentences": [{"raw": caption(i), "tokens": ["a"]}]} for i in range(6)]
    write("flickr8k/dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    for part in ("train", "valid", "test"):
        write(f"nus-wide/split/{part}.txt", "".join(f"{i}:{i % 2}\n" for i in range(6)))
    write("msrvtt/MSRVTT_data.json",
          {"sentences": [{"video_id": video, "caption": caption(2), "sen_id": 1} for video in videos]})
    write("msrvtt/MSRVTT_train.9k.csv", "video_id\n" + "\n".join(videos))
    write("msrvtt/MSRVTT_JSFUSION_test.csv", "video_id,sentence\n" + "".join(f"{v},a b\n" for v in videos))
    for part in ("train", "val", "test"):
        write(f"didemo/{part}_data.json", [{"video": f"{v}.avi", "description": caption(3), "times": [[0, 1]]}
                                           for v in videos])
        write(f"didemo/{part}_list.txt", "\n".join(f"{v}.avi" for v in videos))
    content = {v: {"duration": 8.5, "sentences": [caption(1), "b"], "timestamps": [[0, 1]]} for v in videos}
    for name in ("train", "val_1"):
        write(f"activitynet/{name}.json", content)
    for name in ("train_ids", "val_ids"):
        write(f"activitynet/{name}.json", videos)
    return [data_set("flickr8k", "dataset_flickr8k.json"), data_set("msrvtt", "MSRVTT_data.json"),
            data_set("didemo", "train_data.json"), data_set("activitynet", "train.json"),
            data_set("activitynet", "train_ids.json"), data_set("nus-wide", "text/0.json")]


@kind
def lists():
    """Lists of ids, of fields with tabs, of captions; texts in XML and in lines."""
    for i in range(10):
        picture(f"nus-wide/images/{i}.jpg")
        picture(f"wikipedia/images/{('art', 'law')[i % 2]}/i{i}.jpg")
        picture(f"pascal-sentence/dataset/cat/{i}.jpg")
        picture(f"msvd/frames/v{i}/1.jpg")
        write(f"nus-wide/text/{i}.json", "\"text\"")
        text = f"{caption(i)}\n<b>b</b> &amp; &#233;"
        write(f"wikipedia/texts/t{i}.xml", f"<d><text id=\"1\">{text}</text></d>")
        write(f"pascal-sentence/sentence/cat/{i}.txt", "".join(f"{caption(k)}\n" for k in range(5)))
    for part in ("train", "valid", "test"):
        write(f"nus-wide/split/{part}.txt", "".join(f"{i}:{i % 2}\n" for i in range(10)))
    write("wikipedia/categories.list", "art\nlaw\n")
    for part in ("train", "test"):
        pairs = "".join(f"t{i}\ti{i}\t{1 + i % 2}\n" for i in range(10))
        write(f"wikipedia/{part}set_txt_img_cat.list", pairs)
    write("msvd/raw-captions.pkl", pickle.dumps({f"v{i}": [["a", "dog"]] for i in range(10)}))
    for part in ("train", "val", "test"):
        write(f"msvd/{part}_list.txt", "".join(f"v{i}\n" for i in range(10)))
    np.save("f.npy", np.zeros((2, 3, 4), np.float32))
    write("flickr8k/precomp/train_caps.txt", "\n".join(caption(i) for i in range(10)))
    shutil.copy("f.npy", "flickr8k/precomp/train_ims.npy")
    return [data_set("nus-wide", "split/train.txt"), data_set("wikipedia", "categories.list"),
            data_set("wikipedia", "trainset_txt_img_cat.list"), data_set("wikipedia", "texts/t0.xml"),
            data_set("pascal-sentence", "sentence/cat/0.txt"), data_set("msvd", "train_list.txt"),
            Sample("flickr8k/precomp/train_caps.txt",
                   lambda: data.load_regions("flickr8k", "flickr8k", "train"))]


def features():
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(12, 3)).astype(np.float32), "text": rng.normal(size=(12, 4)),
            "label": np.arange(12) % 3, "ids": np.array([f"row{i}" for i in range(12)])}


def python2(values):
    """A pickle as Python 2 and numpy 1 write it."""
    out = b"\x80\x02}("
    for key, array in values.items():
        code = array.dtype.str[1:].encode()
        out += b"U" + bytes([len(key)]) + key.encode() + b"cnumpy.core.multiarray\n_reconstruct\n"
        out += b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        out += b"".join(b"J" + struct.pack("<i", n) for n in array.shape)
        out += b"tcnumpy\ndtype\nU" + bytes([len(code)]) + code + b"K\x00K\x01\x87R(K\x03U\x01<NNN"
        out += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        out += b"T" + struct.pack("<i", array.nbytes) + array.tobytes() + b"tb"
    return out + b"u."


@kind
def pickles():
    """Features, Text2Shape's split and MSVD's captions, of several protocols."""
    arrays = features()
    rows = {key: value.tolist() for key, value in arrays.items()}
    contents = [pickle.dumps(arrays, protocol) for protocol in (0, 2, 5)]
    contents += [pickle.dumps(rows, 2), pickle.dumps(arrays | {"ids": arrays["ids"].astype(object)}, 4),
                 python2({key: arrays[key] for key in ("image", "text", "label")})]
    samples = []
    for i, content in enumerate(contents):
        path = f"features-{i}.pkl"
        write(path, content)
        samples.append(Sample(path, lambda path=path: data.read_features(path)))
    models = [f"{i:032x}" for i in range(6)]
    write("text2shape/captions.tablechair.csv",
          "id,modelId,description,category\n" + "".join(f"1,{model},a b,Chair\n" for model in models))
    for model in models:
        picture(f"text2shape/views/{model}/1.png")
    for k, part in enumerate(("train", "val", "test")):
        tuples = [(np.arange(k + 5), "chair", model) for model in models[2 * k:2 * k + 2]]
        write(f"text2shape/processed_captions_{part}.p",
              pickle.dumps({"caption_tuples": tuples, "caption_matches": {models[k]: [k]},
                            "max_caption_length": np.int64(96), "sets": {1, 2}}, 2))
    words = {f"v{i}": [caption(k).split() for k in range(3)] + [caption(i)] for i in range(6)}
    write("msvd/raw-captions.pkl", pickle.dumps(words, 4))
    for part in ("train", "val", "test"):
        write(f"msvd/{part}_list.txt", "".join(f"v{i}\n" for i in range(6)))
    for i in range(6):
        picture(f"msvd/frames/v{i}/1.jpg")
    return samples + [data_set("text2shape", "processed_captions_train.p"),
                      data_set("msvd", "raw-captions.pkl")]


@kind
def npz():
    np.savez("stored.npz", **features())
    np.savez_compressed("packed.npz", **features())
    return [Sample(path, lambda path=path: data.read_features(path)) for path in ("stored.npz", "packed.npz")]


@kind
def npy():
    """Region features and CLIP's embeddings beside them, which are memory-mapped."""
    write("flickr8k/precomp/train_caps.txt", "\n".join(caption(i) for i in range(20)))
    np.save("flickr8k/precomp/train_ims.npy", np.ones((4, 3, 4), np.float32))
    np.save("flickr8k/precomp/train_clip.npy", np.ones((4, 6), np.float16))

    def read():
        instances, _ = data.load_regions("flickr8k", "flickr8k", "train")
        for x in instances:
            x.images[0].features()
            x.images[0].clip_input(8)
    return [Sample(f"flickr8k/precomp/train_{name}.npy", read) for name in ("ims", "clip")]


@kind
def h5():
    """Fashion-Gen's file."""
    try:
        import h5py
    except ImportError:
        return []
    path = "fashiongen/fashiongen_256_256_train.h5"
    os.makedirs("fashiongen", exist_ok=True)
    with h5py.File(path, "w") as f:
        f["input_image"] = np.zeros((6, 8, 8, 3), np.uint8)
        f["input_productID"] = np.arange(6)[:, None] // 2
        for key in ("name", "description", "category"):
            f[f"input_{key}"] = np.array([[b"text"]] * 6)

    def read():
        instances, _ = data.load("fashiongen", "fashiongen", "train")
        for x in instances:
            for image in x.images:
                data.pixels(image, 8)
    return [Sample(path, read)]


@kind
def nrrd():
    voxels = np.random.default_rng(0).integers(0, 256, 4 * 6 ** 3, dtype=np.uint8).tobytes()
    samples = []
    for encoding, body in (("raw", voxels), ("gzip", gzip.compress(voxels))):
        path = f"{encoding}.nrrd"
        header = ("NRRD0004\n# x\ntype: uint8\ndimension: 4\nsizes: 4 6 6 6\n"
                  f"space directions: none (0,0.1,0) (0,0,0.1) (0.1,0,0)\nencoding: {encoding}\n\n")
        write(path, header.encode() + body)
        samples.append(Sample(path, lambda path=path: data.pixels(data.VoxelView(path, 3), 16)))
    return samples


@kind
def pictures():
    """Every format that people have, among them 16 bits, transparency, rotation and several frames."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (18, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (9, 7)).astype(np.uint16))
    saved = {"rgb.png": (rgb, {}), "palette.png": (rgb.convert("P"), {"transparency": 3}),
             "alpha.png": (rgb.convert("RGBA"), {}), "deep.png": (deep, {}),
             "photo.jpg": (rgb, {"exif": exif}),
             "cmyk.jpg": (rgb.convert("CMYK"), {}), "progressive.jpg": (rgb, {"progressive": True}),
             "frames.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}), "a.bmp": (rgb, {}),
             "lzw.tif": (rgb, {"compression": "tiff_lzw"}), "deep.tif": (deep, {}), "a.webp": (rgb, {}),
             "a.ppm": (rgb, {}), "grey.png": (rgb.convert("L"), {}), "bits.png": (rgb.convert("1"), {})}
    samples = []
    for path, (image, options) in saved.items():
        image.save(path, **options)
        samples.append(Sample(path, lambda path=path: (data.pixels(path, 16), data.crop_source(path, 400))))
    return samples


@kind
def archives():
    """Text2Shape's zip files, which are unpacked."""
    samples = []
    names = {"voxels.zip": [f"{data.VOXEL_FOLDER}/{i}/{i}.nrrd" for i in "abc"],
             "splits.zip": [f"text2shape-data/shapenet/{name}" for name in data.SPLIT_FILES]}
    for path, members in names.items():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name in members:
                z.writestr(name, b"NRRD0004\n" * 20)
        samples.append(Sample(path, lambda path=path: data.unpack(path, "unpacked")))
    return samples


# ---------------------------------------------------------------- damage to bytes

NUMBERS = (0, 1, -1, 2, 255, 2 ** 15, 2 ** 16, 2 ** 24, 10 ** 8, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 33,
           2 ** 62, 2 ** 63 - 1, 2 ** 64 - 1, 10 ** 20, 10 ** 400)
NESTS = (b"[", b"{\"a\":", b"(", b"]", b"}", b"<text>", b"\"", b"'", b",", b"\n", b"]q\x00",
         b"K\x01\x85", b"2\x86")


def flip(content, other, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwrite(content, other, rng):
    at = rng.randrange(len(content))
    new = rng.choice((b"\0", b"\xff", b" ", b"\n", b"9", rng.randbytes(4))) * rng.choice((1, 4, 16))
    return content[:at] + new + content[at + len(new):]


def truncate(content, other, rng):
    return content[:rng.randrange(len(content))]


def span(content, rng, longest=64):
    begin = rng.randrange(len(content))
    return begin, begin + rng.randint(1, rng.choice((4, longest, len(content))))


def remove(content, other, rng):
    begin, end = span(content, rng)
    return content[:begin] + content[end:]


def repeat(content, other, rng):
    begin, end = span(content, rng)
    return content[:end] + content[begin:end] * rng.choice((1, 2, 30, 3000)) + content[end:]


def splice(content, other, rng):
    return content[:rng.randrange(len(content))] + other[rng.randrange(len(other)):]


def nest(content, other, rng):
    at = rng.randrange(len(content))
    return content[:at] + rng.choice(NESTS) * rng.choice((1, 20, 1000, 50_000)) + content[at:]


def odd_digits(content, other, rng):
    """Another number in the place of one that is written in digits."""
    found = list(itertools.islice(re.finditer(rb"-?\d+", content), 2000))
    if not found:
        return flip(content, other, rng)
    match = rng.choice(found)
    return content[:match.start()] + str(rng.choice(NUMBERS)).encode() + content[match.end():]


def odd_integer(content, other, rng):
    """Another number in the place of 1, 2, 4 or 8 bytes, more often near the beginning."""
    size = rng.choice((1, 2, 4, 4, 8))
    at = rng.randrange(min(len(content), rng.choice((64, 1024, len(content)))))
    number = rng.choice(NUMBERS) % 2 ** (8 * size)
    return content[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + content[at + size:]


DAMAGE = (flip, flip, overwrite, truncate, remove, repeat, splice, nest, odd_digits, odd_integer, odd_integer)


def damage(content, other, rng):
    """Bytes that were damaged once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if content and len(content) < LARGEST:
            content = rng.choice(DAMAGE)(content, other or content, rng)
    return content[:LARGEST]


# ---------------------------------------------------------------- damage to what the bytes mean

def odd_value(rng, shared):
    long = [rng.choice((0, 0.5, "x", None))] * rng.choice((0, 3, 20_000))
    deep = []
    kind = rng.choice((list, tuple))
    for _ in range(rng.choice((2, 60))):
        deep = kind([deep, deep] if shared else [deep])
    return rng.choice([None, True, "", "x" * 5000, "\x1b[2J\n", "\ud800", 0.5, -1.0, math.nan, math.inf, b"",
                       {}, {"a": {}}, long, tuple(long), deep, *NUMBERS[:-1]])


def odd_tensor(value, rng):
    """A tensor of another shape or type, among them such as claim more numbers than they hold."""
    return rng.choice([lambda: value[..., :1], lambda: value.new_zeros(0), lambda: value.double() * math.nan,
                       lambda: value.to(torch.int32), lambda: value.reshape(-1), lambda: value.to(torch.bool),
                       lambda: value.new_ones(1).expand(10 ** rng.randrange(1, 11), max(1, len(value.shape))),
                       lambda: value[:1].expand(10 ** rng.randrange(1, 9), *value.shape[1:]),
                       lambda: value.new_empty(value.shape, device="meta")])()


def containers(value):
    """All dicts and lists in a value, each once."""
    found = {}
    waiting = [value]
    while waiting and len(found) < 2000:
        part = waiting.pop()
        if isinstance(part, (dict, list)) and part and id(part) not in found:
            found[id(part)] = part
            waiting += part.values() if isinstance(part, dict) else part[:200]
    return list(found.values())


def change(value, rng, shared=False):
    """A copy in which a few parts of a nested value are replaced, removed, repeated or moved. shared: a
    format in which a value can stand in several places, and is written once."""
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        parts = containers(value)
        part = rng.choice(parts)
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        action = rng.randrange(6)
        if action == 0 and part is not value:
            del part[key]
        elif action == 1:
            part[key] = rng.choice(parts)  # it may hold itself
        elif action == 2 and isinstance(part, list):
            part *= rng.choice((2, 300)) if len(part) < 1000 else 1
        elif action == 3 and isinstance(part, dict):
            part[rng.choice(("", "x", "id", 0, "a" * 300, "\n"))] = part[key]
        elif isinstance(part[key], torch.Tensor) and rng.random() < 0.8:
            with contextlib.suppress(RuntimeError, IndexError):
                part[key] = odd_tensor(part[key], rng)
        else:
            part[key] = odd_value(rng, shared)
    return value[0]


def as_json(value, ascii=True):
    """The bytes of a value as JSON. They end where they get too long: a value can hold another many times."""
    parts = []
    size = 0
    for part in json.JSONEncoder(ensure_ascii=ascii, default=str).iterencode(value):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            break
    return "".join(parts).encode("utf-8", "surrogatepass")


def new_json(content, rng):
    lines = content.decode().splitlines() if b"}\n{" in content else [content.decode()]
    at = rng.randrange(len(lines))
    new = as_json(change(json.loads(lines[at]), rng), rng.random() < 0.8)
    return b"\n".join([*map(str.encode, lines[:at]), new, *map(str.encode, lines[at + 1:])]) + b"\n"


def new_safetensors(content, rng):
    length, = struct.unpack("<Q", content[:8])
    text = as_json(change(json.loads(content[8:8 + length]), rng))
    return struct.pack("<Q", len(text)) + text + content[8 + length:]


def new_checkpoint(content, rng):
    out = io.BytesIO()
    value = change(torch.load(io.BytesIO(content), weights_only=True), rng, shared=True)
    torch.save(value, out, _use_new_zipfile_serialization=rng.random() < 0.8)
    return out.getvalue()


def new_pickle(content, rng):
    """Other values; or opcodes that were removed, repeated, moved, or put in."""
    if rng.random() < 0.3:
        # torch's archives name classes and tensors that stand elsewhere
        with contextlib.suppress(pickle.UnpicklingError, ModuleNotFoundError):
            value = pickle.loads(content, encoding="latin1")
            return pickle.dumps(change(value, rng, shared=True), rng.choice((0, 2, 4, 5)))
    places = [at for _, _, at in pickletools.genops(content)] + [len(content)]
    opcodes = [content[a:b] for a, b in zip(places, places[1:])]
    for _ in range(rng.choice((1, 2, 6))):
        at = rng.randrange(len(opcodes))
        begin, end = sorted((at, rng.randrange(len(opcodes))))
        number = rng.choice(NUMBERS) % 2 ** 32
        new = rng.choice([b"2", b"0", b"(", b"t", b"l", b"d", b"]", b"}", b")", b"\x86", b"\x87", b"a", b"e",
                          b"s", b"u", b"R", b"b", b"\x81", b"\x94", b"\x8f", b"\x90", b"\x91", b"h\x01",
                          b"h\x05", b"K\x07", b"X" + struct.pack("<I", number),
                          b"B" + struct.pack("<I", number),
                          b"\x96" + struct.pack("<Q", number), b"r" + struct.pack("<I", number),
                          b"p%d\n" % number, b"\x8a\xff" + bytes(255), b"cbuiltins\nlist\n",
                          b"cbuiltins\nset\n", b"c_codecs\nencode\n"])
        if rng.random() < 0.5:
            opcodes[at:at] = [new] * rng.choice((1, 1, 3, 40))
        elif rng.random() < 0.5:
            opcodes[begin:begin] = opcodes[begin:end][:200] * rng.choice((1, 2, 20))
        else:
            del opcodes[begin:min(end, begin + 3)]
    return b"".join(opcodes)[:LARGEST]


def new_zip(content, other, rng):
    """A member that was damaged, put in its archive again; or renamed, doubled, or blown up."""
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        members = [(info.filename, z.read(info)) for info in z.infolist()]
    at = rng.randrange(len(members))
    name, body = members[at]
    action = rng.randrange(12)
    if action == 0:
        members[at] = "".join(rng.sample(name, len(name))), body
    elif action == 1:
        members.append((name, damage(body, body, rng)))
    elif action == 2:
        del members[at]
    elif action == 3:
        header = body.find(b"\n") + 1 if body[:1] == b"\x93" else 0
        members[at] = name, body[:header] + bytes(rng.choice((10 ** 5, 5 * 10 ** 7)))
    elif body:
        with_meaning = name.endswith(".pkl") and rng.random() < 0.7
        members[at] = name, new_pickle(body, rng) if with_meaning else damage(body, body, rng)
    packed = any(info.compress_type for info in zipfile.ZipFile(io.BytesIO(content)).infolist())
    if rng.random() < 0.1 or action == 3:
        packed = not packed or action == 3
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", 8 if packed else 0) as z:
        warnings.simplefilter("ignore")
        for name, body in members:
            z.writestr(name, body)
    return out.getvalue()


def new_gzip(content, rng):
    """An NRRD file with other voxels, packed again."""
    header, _, body = content.partition(b"\n\n")
    if body[:2] != b"\x1f\x8b":
        return damage(header, header, rng) + b"\n\n" + body
    body = gzip.decompress(body)
    body = bytes(10 ** rng.randrange(8)) if rng.random() < 0.3 else damage(body, body, rng)
    return header + b"\n\n" + gzip.compress(body, 1)


def new_png(content, rng):
    """A chunk that was damaged, with a right checksum; sizes more often than others."""
    chunks = []
    at = 8
    while at < len(content):
        length, = struct.unpack(">I", content[at:at + 4])
        chunks.append((content[at + 4:at + 8], content[at + 8:at + 8 + length]))
        at += 12 + length
    at = 0 if rng.random() < 0.5 else rng.randrange(len(chunks))
    name, body = chunks[at]
    if at == 0 and rng.random() < 0.5:
        sides = [rng.choice((0, 1, 24, 5000, 13_000, 20_000, 2 ** 31)) for _ in range(2)]
        body = struct.pack(">II", *sides) + body[8:]
        if math.prod(sides) < 2 * 10 ** 8 and rng.random() < 0.3:  # all of it is there, in few bytes
            body = body[:8] + b"\x08\0\0\0\0"
            packed = zlib.compress(bytes((sides[0] + 1) * sides[1]), 9)
            chunks = [chunks[0], (b"IDAT", packed), (b"IEND", b"")]
    elif name == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(bytes(5 * 10 ** rng.randrange(8)), 1)
    elif body:
        body = damage(body, body, rng)
    chunks[at] = name, body
    out = content[:8]
    for name, body in chunks:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def new_meaning(content, other, rng, kind):
    """Damage to what the bytes mean, where they are of a format that is known; else to the bytes."""
    if content[:4] == b"PK\x03\x04":
        if kind in ("checkpoint", "methods", "weights") and rng.random() < 0.6:
            return new_checkpoint(content, rng)
        return new_zip(content, other, rng)
    if kind == "weights":
        return new_checkpoint(content, rng)
    if kind == "safetensors":
        return new_safetensors(content, rng)
    if kind == "pickles":
        return new_pickle(content, rng)
    if kind in ("jsonl", "jsons", "config", "log"):
        return new_json(content, rng)
    if kind == "nrrd":
        return new_gzip(content, rng)
    if content[:4] == b"\x89PNG":
        return new_png(content, rng)
    return damage(content, other, rng)


def make_input(kind, samples, contents, seed, number):
    """-> (number of the sample, bytes) of an input, which is the same whenever it is made."""
    rng = random.Random(f"{seed} {kind} {number}")
    at = rng.randrange(len(samples))
    other = rng.choice(contents)
    if rng.random() < 0.5:
        with contextlib.suppress(RecursionError, OverflowError, ValueError, UnicodeError):
            return at, new_meaning(contents[at], other, rng, kind)
    return at, damage(contents[at], other, rng)


# ---------------------------------------------------------------- one input

def held():
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def allowed(error):
    """Whether an exception is an error of the project in one line."""
    message = str(error)
    return isinstance(error, (clip.CheckpointError, data.DataError)) and message.isprintable() \
        and 0 < len(message) < 2000


def forget():
    """Nothing that an earlier input or kind left in memory is taken for what a file holds."""
    data._h5_images.cache_clear()
    data._regions.cache_clear()
    data._voxels.cache_clear()
    data._noted.clear()


def attempt(sample, content):
    """Read a damaged file -> (outcome, seconds of processor time, bytes). outcome: loaded, refused, or what
    was wrong. The file is valid again afterwards."""
    with open(sample.file, "rb") as f:
        valid = f.read()
    with open(sample.file, "wb") as f:
        f.write(content)
    forget()
    before = held()
    start = time.process_time()
    outcome = "loaded"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample.read()
    except Exception as e:
        outcome = "refused"
        if not allowed(e):
            place = traceback.extract_tb(e.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}:{place.lineno}"
            outcome = f"{type(e).__name__}: {str(e)[:200]!r} ({where})"
        del e
    seconds = time.process_time() - start
    after = held()
    with open(sample.file, "wb") as f:
        f.write(valid)
    return outcome, seconds, after if after > before else 0


def judge(outcome, seconds, memory):
    """What is wrong, or None."""
    if outcome not in ("loaded", "refused"):
        return outcome
    if seconds > SECONDS:
        return f"{seconds:.1f} s ({outcome})"
    if memory > BYTES:
        return f"{memory / 2 ** 30:.1f} GiB ({outcome})"
    return None


# ---------------------------------------------------------------- batches in processes of their own

def prepare(kind, folder):
    """Write the valid files of a kind into a folder, which becomes the current one -> (samples, contents)."""
    os.makedirs(folder)
    os.chdir(folder)
    samples = KINDS[kind]()
    contents = []
    forget()
    for sample in samples:
        sample.read()
        with open(sample.file, "rb") as f:
            contents.append(f.read())
    return samples, contents


def work(kind, folder, samples, contents, seed, numbers, results):
    """In a forked process: try inputs in a copy of the folder. A line before and after each says how it
    went."""
    own = tempfile.mkdtemp(dir=os.path.dirname(folder))
    shutil.copytree(folder, own, dirs_exist_ok=True)
    os.chdir(own)
    start = held()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    with open(results, "a", buffering=1) as out:
        for number in numbers:
            at, content = make_input(kind, samples, contents, seed, number)
            print(json.dumps([number]), file=out)
            signal.setitimer(signal.ITIMER_PROF, STUCK)  # its signal ends this process
            signal.setitimer(signal.ITIMER_REAL, 10 * STUCK)
            outcome, seconds, memory = attempt(samples[at], content)
            memory = max(0, memory - start)
            print(json.dumps([number, outcome, seconds, memory]), file=out)
            if memory > BYTES // 4:
                break  # its peak would hide those of later ones
            if not number % 50:
                gc.collect()


class Kind:
    """A kind's inputs, its running processes and what they found."""

    def __init__(self, name, folder, seed, numbers):
        self.name, self.folder, self.seed = name, os.path.join(folder, name), seed
        self.waiting = [numbers[i:i + BATCH] for i in range(0, len(numbers), BATCH)]
        self.results = []  # (number, outcome, seconds, memory)
        self.samples = None

    def prepare(self):
        with quiet():
            self.samples, self.contents = prepare(self.name, self.folder)

    def start(self):
        """Fork a process for the next batch -> its id."""
        numbers = self.waiting.pop()
        path = f"{self.folder}-{numbers[0]}.results"
        pid = os.fork()
        if pid:
            return pid, (self, numbers, path)
        try:
            with quiet():
                work(self.name, self.folder, self.samples, self.contents, self.seed, numbers, path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def end(self, numbers, path, status):
        """Take the results of a process that has ended; what it did not reach waits again."""
        code = os.waitstatus_to_exitcode(status)
        with open(path) as f:
            lines = [json.loads(line) for line in f]
        os.unlink(path)
        done = [line for line in lines if len(line) > 1]
        self.results += done
        reached = len(done)
        if code:
            if code == 1 or len(lines) == 2 * reached:
                sys.exit("fuzz.py itself failed")
            ended = signal.Signals(-code).name
            stuck = code in (-signal.SIGPROF, -signal.SIGALRM)
            outcome = f"more than {STUCK} s" if stuck else f"ended by {ended}"
            self.results.append((numbers[reached], outcome, 0, 0))
            reached += 1
        if numbers[reached:]:
            self.waiting.append(numbers[reached:])


@contextlib.contextmanager
def quiet():
    """Nothing that the project says is shown. As on Python's stderr, any character may be said."""
    with open(os.devnull, "w", errors="backslashreplace") as nothing, contextlib.redirect_stderr(nothing), \
            contextlib.redirect_stdout(nothing):
        yield


def table(kinds):
    rows = [("kind", "inputs", "loaded", "refused", "wrong", "slowest", "most memory")]
    totals = [0] * 4
    for k in kinds:
        outcomes = [line[1] for line in k.results]
        wrong = sum(judge(*line[1:]) is not None for line in k.results)
        counts = (len(outcomes), outcomes.count("loaded"), outcomes.count("refused"), wrong)
        totals = [a + b for a, b in zip(totals, counts)]
        slowest = max((line[2] for line in k.results), default=0)
        most = max((line[3] for line in k.results), default=0)
        rows.append((k.name, *map("{:,}".format, counts), f"{slowest:.2f} s", f"{most / 2 ** 20:.0f} MiB"))
    rows.append(("all", *map("{:,}".format, totals), "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def report(k, keep, home):
    """Keep a kind's inputs that were wrong, and print each problem once."""
    problems = {}
    for number, *result in sorted(k.results, key=lambda line: line[0]):
        problem = judge(*result)
        if problem:
            at, content = make_input(k.name, k.samples, k.contents, k.seed, number)
            file = os.path.join(keep, f"{k.name}-{at}-{k.seed}-{number}.bin")
            write(file, content)
            place = problem.rsplit("(", 1)[-1] + problem.split(":")[0]
            problems.setdefault(place, []).append((problem, file, k.samples[at].file))
    for found in problems.values():
        problem, file, sample = min(found, key=lambda one: os.path.getsize(one[1]))
        print(f"{k.name}, {len(found)} inputs, the smallest damages {sample} (seed {k.seed}): {problem}\n"
              f"    python tests/fuzz.py --again {os.path.relpath(file, home)}")


def fuzz(names, inputs, seed, jobs, keep):
    """Try `inputs` inputs, as many of each kind -> the kinds, with their results."""
    home = os.getcwd()
    keep = os.path.abspath(keep)
    with tempfile.TemporaryDirectory() as folder:
        kinds = []
        running = {}
        for i, name in enumerate(names):
            numbers = list(range(inputs // len(names) + (i < inputs % len(names))))
            kinds.append(Kind(name, folder, seed, numbers))
        for k in kinds:
            k.prepare()
        if not all(k.samples for k in kinds):
            kinds = [k for k in kinds if k.samples]
        while running or any(k.waiting for k in kinds):
            while len(running) < jobs and any(k.waiting for k in kinds):
                pid, task = next(k for k in kinds if k.waiting).start()
                running[pid] = task
            pid, status = os.wait()
            if pid in running:
                k, numbers, path = running.pop(pid)
                k.end(numbers, path, status)
        for k in kinds:
            report(k, keep, home)
        os.chdir(home)
    return kinds


def again(file):
    """Read one kept input -> what is wrong, or None. An exception keeps its traceback."""
    name, at, *_ = os.path.basename(file).split("-")
    with open(file, "rb") as f:
        content = f.read()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            samples, _ = prepare(name, os.path.join(folder, name))
        before = held()
        outcome, seconds, memory = attempt(samples[int(at)], content)
        os.chdir(ROOT)
    memory = max(0, memory - before)
    print(f"{outcome}; {seconds:.2f} s, {memory / 2 ** 20:.0f} MiB")
    return judge(outcome, seconds, memory)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=100_000, help="of all kinds together")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    p.add_argument("--keep", default="fuzz-found", help="folder for the inputs that were wrong")
    p.add_argument("--again", metavar="FILE", help="read one input that was kept")
    args = p.parse_args(argv)
    if args.again:
        return 1 if again(args.again) else 0
    kinds = fuzz(args.kind, args.inputs, args.seed, args.jobs, args.keep)
    print(table(kinds))
    return 1 if any(judge(*line[1:]) for k in kinds for line in k.results) else 0


if __name__ == "__main__":
    sys.exit(main())
