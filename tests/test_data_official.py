"""Tests of data.py on published sets: against real official annotation files, cut down, in
../shared/data/annotations, with pictures and frames of the names that the files give; else against a small
copy of the official layout.
"""
import csv
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

import data
from test_data import SHARED, fresh_notes, picture, refused, splits, write  # noqa: F401

REAL = os.path.join(SHARED, "annotations")


def copy(name, root):
    """A writable copy of a set's real files."""
    if not os.path.isdir(REAL):
        pytest.skip("needs ../shared/data/annotations")
    shutil.copytree(f"{REAL}/{name}", root, dirs_exist_ok=True, copy_function=shutil.copyfile)


def frames(root, *videos, count=1):
    for video in videos:
        for k in range(count):
            picture(root / "frames" / video / f"{k + 1}.jpg", size=(3, 2))


def read_json(path):
    with open(path, encoding="utf-8-sig") as f:
        return json.load(f)


def real_lines(path):
    with open(path, encoding="utf-8") as f:
        return f.read().split()


def sizes(parts):
    return [len(part) for part in parts.values()]


@pytest.mark.parametrize("ending", ["", ".with"])
def test_didemo(ending, tmp_path):
    """The sentences of exactly the listed name, though another name has its stem; a fork's have no ending."""
    copy("didemo", tmp_path)
    lists = {part: real_lines(f"{REAL}/didemo/{part}_list.txt") for part in ("train", "val", "test")}
    for name in sum(lists.values(), []):
        frames(tmp_path, name if ending else os.path.splitext(name)[0])
    found = splits("didemo", tmp_path)
    assert sizes(found) == [24, 19, 25]
    shared = 0
    for part, names in lists.items():
        moments = read_json(f"{REAL}/didemo/{part}_data.json")
        assert [x.id for x in found[part]] == names
        for x, name in zip(found[part], names):
            stem = os.path.splitext(name)[0]
            wanted = (name, stem) if part == "train" else (name,)
            own = [m["description"] for m in moments if m["video"] in wanted]
            shared += len({m["video"] for m in moments if os.path.splitext(m["video"])[0] == stem}) - 1
            assert x.captions == [" ".join(" ".join(own).split())] and own
    assert shared == 8


@pytest.mark.parametrize("prefix", ["", "v_"])
def test_activitynet(prefix, tmp_path, capsys):
    """Val hangs on the official id, not on the folder's name; two ids of each file have no captions."""
    copy("activitynet", tmp_path)
    ids = {part: read_json(f"{REAL}/activitynet/{part}_ids.json") for part in ("train", "val")}
    for part, names in ids.items():
        write(tmp_path / f"{part}_ids.json", [prefix + id.removeprefix("v_") for id in names])
    frames(tmp_path, *[prefix + id.removeprefix("v_") for id in ids["train"] + ids["val"]])
    found = splits("activitynet", tmp_path)
    content = read_json(f"{REAL}/activitynet/train.json")
    known = [id for id in ids["train"] if id in content]
    late = [id for id in known if data.hash_tenth(id) == 9]
    assert len(known) == 50 and 0 < len(late) and [x.id for x in found["val"]] == late
    assert sizes(found) == [50 - len(late), len(late), 23]
    first = found["train"][0]
    assert first.captions == [" ".join(" ".join(content[first.id]["sentences"]).split())]
    assert any("\u00f1" in x.captions[0] for x in found["train"] + found["val"])
    assert "test, 2 of 25 rows without a picture or a text" in capsys.readouterr().err


def test_msvd(tmp_path):
    copy("msvd", tmp_path)
    lists = {part: real_lines(f"{REAL}/msvd/{part}_list.txt") for part in ("train", "val", "test")}
    folders = [video + ".avi" for video in sum(lists.values(), [])]  # a file's ending
    frames(tmp_path, *folders, count=11)
    for folder in folders:
        write(tmp_path / "frames" / folder / "._1.jpg", "a Mac's")
    with open(f"{REAL}/msvd/raw-captions.pkl", "rb") as f:
        captions = pickle.load(f)
    found = splits("msvd", tmp_path)
    assert sizes(found) == [len(videos) for videos in lists.values()] == [12, 5, 8]
    for part, videos in lists.items():
        assert [x.id for x in found[part]] == videos
        assert [x.captions for x in found[part]] == [[" ".join(c) for c in captions[v]] for v in videos]
    names = [os.path.basename(path) for path in found["test"][0].images]
    assert names == [f"{k}.jpg" for k in range(1, 12)]  # in order of number


def test_food101(tmp_path):
    """Titles with entities, doubled quotes, remains of Python lists, and quotes that never close."""
    copy("food101", tmp_path)
    rows = {}
    for part in ("train", "test"):
        with open(f"{REAL}/food101/texts/{part}_titles.csv", newline="") as f:
            rows[part] = list(csv.reader(f))
        for file, _, name in rows[part]:
            picture(tmp_path / "images" / part / name / file, size=(3, 2))
    found = splits("food101", tmp_path)
    assert len(found["test"]) == len(rows["test"]) == 47
    assert len(found["train"]) + len(found["val"]) == len(rows["train"]) == 141
    assert [x.captions for x in found["test"]] == [[title.strip()] for _, title, _ in rows["test"]]
    path = tmp_path / "texts" / "test_titles.csv"
    lines = path.read_bytes().split(b"\r\n")
    lines[3] = lines[3].replace(b",", b',"', 1)  # opens and never closes
    path.write_bytes(b"\r\n".join(lines))
    test = splits("food101", tmp_path)["test"]
    assert len(test) == 47 and test[3].captions == ['"' + rows["test"][3][1].strip()]


def test_flickr30k(tmp_path):
    copy("flickr30k", tmp_path)
    images = read_json(f"{REAL}/flickr30k/dataset_flickr30k.json")["images"]
    for image in images:
        picture(tmp_path / "flickr30k-images" / image["filename"], size=(3, 2))
    found = splits("flickr30k", tmp_path)
    assert sizes(found) == [10, 10, 10] and all(len(x.captions) == 5 for x in found["test"])


def precomp(name, root, rows, regions=2):
    """Region features, of which row i holds i, with a real caption list of as many images."""
    copy(name, root)
    for part in rows:
        captions = len((root / "precomp" / f"{part}_caps.txt").read_text().split("\n")) // 5
        array = np.arange(captions, dtype=np.float32)[:, None, None].repeat(regions, 1).repeat(3, 2)
        np.save(root / "precomp" / f"{part}_ims.npy", array)


@pytest.mark.parametrize("split, file", [("train", "train"), ("val", "dev"), ("test", "test")])
def test_region_captions_of_flickr30k(split, file, tmp_path):
    precomp("precomp-flickr30k", tmp_path, ["train", "dev", "test"])
    found, _ = data.load_regions("flickr30k", str(tmp_path), split)
    with open(f"{REAL}/precomp-flickr30k/precomp/{file}_caps.txt", encoding="utf-8") as f:
        lines = f.read().strip("\n").split("\n")
    assert [caption for x in found for caption in x.captions] == [line.strip() for line in lines]
    assert all(len(x.captions) == 5 and x.images[0].features()[0, 0] == i for i, x in enumerate(found))


def test_region_features_of_coco_are_of_5000_images_where_they_are_there(tmp_path, capsys):
    precomp("precomp-coco", tmp_path, ["dev", "test"])
    few, _ = data.load_regions("coco", str(tmp_path), "test")
    assert "1,000 images" in capsys.readouterr().err
    precomp("precomp-coco", tmp_path, ["testall"])
    every, _ = data.load_regions("coco", str(tmp_path), "test")
    assert len(every) == 2 * len(few) == 20


def test_variants_that_people_also_have(tmp_path):
    """A list with semicolons is read; that of 7,000 and a caption list with a header are not, and said."""
    copy("variants", tmp_path)
    semicolons = tmp_path / "MSRVTT_JSFUSION_test.semicolon.csv"
    videos = [line.split(";")[2] for line in real_lines(semicolons) if line.count(";") >= 3][1:]
    train = real_lines(tmp_path / "MSRVTT_train.7k.csv")[1:]
    sentences = [{"video_id": video, "caption": f"caption {k}"} for video in train for k in range(20)]
    write(tmp_path / "MSRVTT_data.json", {"sentences": sentences})
    frames(tmp_path, *[video + ".mp4" for video in videos + train])
    os.rename(semicolons, tmp_path / "MSRVTT_JSFUSION_test.csv")
    refused("MSRVTT_train.9k.csv: No such file; .* holds MSRVTT_train.7k.csv",
            data.load, "msrvtt", str(tmp_path))
    os.rename(tmp_path / "MSRVTT_train.7k.csv", tmp_path / "MSRVTT_train.9k.csv")
    found = splits("msrvtt", tmp_path)
    assert [x.id for x in found["test"]] == videos and "gymnastics" in found["test"][1].captions[0]
    assert len(found["train"]) + len(found["val"]) == len(train) and len(found["train"][0].captions) == 20
    shutil.rmtree(tmp_path / "frames")
    precomp("precomp-flickr30k", tmp_path, ["dev"])
    os.replace(tmp_path / "bcan_dev_caps.txt", tmp_path / "precomp" / "dev_caps.txt")
    refused("lines in .*dev_caps.txt .the first: .'image,caption'",
            data.load_regions, "flickr30k", str(tmp_path), "val")


@pytest.mark.parametrize("name, file, content, said", [
    ("msvd", "raw-captions.pkl", pickle.dumps({"a": ["a text"]}), "expected {video: captions"),
    ("didemo", "val_data.json", [{"video": "a"}], "expected DiDeMo's"),
    ("activitynet", "train.json", "{", "not JSON.*get the published file again"),
    ("activitynet", "train.json", {"v_1": ["no sentences"]}, "expected ActivityNet's"),
    ("food101", "texts/test_titles.csv", "sushi_1.jpg,sushi\n", "2 cells, expected file, title"),
    ("flickr30k", "dataset_flickr30k.json", {"images": [{"filename": "a"}]}, "expected Karpathy's")])
def test_a_broken_file_is_named(name, file, content, said, tmp_path):
    copy(name, tmp_path)
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        write(tmp_path / file, content)
    refused(f"{file}.*: {said}", data.load, name, str(tmp_path))


def test_no_frames_at_all(tmp_path):
    copy("msvd", tmp_path)
    refused(r"of split train, 12 of 12 rows .*frames/.*/\*.jpg: No such file",
            data.load, "msvd", str(tmp_path))


# ---------------------------------------------------------------- labelled sets

def by_id(name, root):
    """{id: (split, instance)} of all splits, and the classes."""
    parts = data.load_splits(name, str(root))
    found = {x.id: (split, x) for split, (part, _) in zip(data.SPLITS, parts) for x in part}
    return found, parts[0][1]


@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/fashion-full"), reason="needs ../shared/data/fashion-full")
def test_real_products(capsys):
    """Titles with commas, and with inches: a quote that never closes. Labels and titles that are missing."""
    found, classes = by_id("products", f"{SHARED}/fashion-full")
    assert len(found) == 15_997 and "2 of 12823 rows without a picture or a text" in capsys.readouterr().err
    assert list(classes) == ["gender", "masterCategory", "subCategory", "articleType", "baseColour", "season",
                             "usage"]
    x = found["44065"][1]
    assert x.captions == ["Boss Men Perfume, After Shave Balm and Shower Gel Set"] and x.group == "44065"
    assert classes["articleType"][x.labels["articleType"]] == "Perfume and Body Mist"
    assert found["7491"][1].captions == ["Nike Women's EM Tempo 3.5\" Pink Short"]
    assert sum(len(x.labels) < 7 for _, x in found.values()) > 100
    assert data.pixels(x.images[0], 32).shape == (32, 32, 3)


def test_wikipedia(tmp_path):
    write(tmp_path / "categories.list", "art\nbiology\n")
    lists = {"train": [(f"t{i}", f"i{i}", 1 + i % 2) for i in range(30)],
             "test": [("t90", "i90", 2), ("t91", "i91", 1)]}
    for part, rows in lists.items():
        write(tmp_path / f"{part}set_txt_img_cat.list", "".join(f"{t}\t{i}\t{c}\n" for t, i, c in rows))
        for text, image, category in rows:
            picture(tmp_path / "images" / ("art", "biology")[category - 1] / f"{image}.jpg")
            write(tmp_path / "texts" / f"{text}.xml",
                  f"<document><title>no</title><text>A text,\n<b>{text}</b> &amp; more</text></document>")
    found, classes = by_id("wikipedia", tmp_path)
    assert classes == {"category": ["art", "biology"]} and len(found) == 32
    split, x = found["i90-t90"]
    assert split == found["i91-t91"][0] == "test" and x.captions == ["A text, t90 & more"]
    assert x.labels == {"category": 1} and x.group == "biology"
    for text, said in (("t90\ti90\t3\n", "category '3' of text 't90'; categories.list names 2"),
                       ("t90 i90 2\n", r"testset_txt_img_cat.list line 1: 1 fields, expected 3")):
        write(tmp_path / "testset_txt_img_cat.list", text)
        refused(said, data.load, "wikipedia", str(tmp_path), "test")


def test_pascal_sentence(tmp_path):
    for name in ("cat", "dog"):
        for i in range(50):
            picture(tmp_path / "dataset" / name / f"2008_{i:04d}.jpg")
            sentences = "".join(f"{name} {i} sentence {k}.\n" for k in range(5))
            ending = ".txt" if name == "dog" else "txt"  # as the published script writes it
            write(tmp_path / "sentence" / name / f"2008_{i:04d}{ending}", sentences)
    found, classes = by_id("pascal-sentence", tmp_path)
    assert classes == {"class": ["cat", "dog"]}
    for name in ("cat", "dog"):
        parts = [found[f"{name}/2008_{i:04d}.jpg"][0] for i in range(50)]
        assert parts == ["train"] * 40 + ["val"] * 5 + ["test"] * 5
        assert found[f"{name}/2008_0049.jpg"][1].captions == [f"{name} 49 sentence {k}." for k in range(5)]
    assert found["dog/2008_0049.jpg"][1].group == "dog"


def test_lists_of_ids_and_labels(tmp_path):
    for part, ids in (("train", range(6)), ("valid", range(6, 8)), ("test", range(8, 10))):
        write(tmp_path / "split" / f"{part}.txt", "".join(f"n0_{i}:{i % 2}\n" for i in ids))
        for i in ids:
            picture(tmp_path / "images" / f"n0_{i}.jpg")
            write(tmp_path / "text" / f"n0_{i}.json", f'"text, with \\"quotes\\" {i}"')
    found, classes = by_id("nus-wide", tmp_path)
    assert [found[f"n0_{i}"][0] for i in range(10)] == ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    assert found["n0_7"][1].captions == ['text, with "quotes" 7'] and found["n0_7"][1].group == "1"
    assert classes == {"label": ["0", "1"]}
    write(tmp_path / "text" / "n0_9.json", "[1]")
    refused("n0_9.json: expected a JSON string", data.load, "nus-wide", str(tmp_path), "test")
    os.unlink(tmp_path / "split" / "valid.txt")
    refused("valid.txt: No such file; .* holds", data.load, "xmedianet", str(tmp_path), "test")


def test_fashiongen(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    for part, products in (("train", np.arange(40) // 2), ("validation", np.array([77, 77, 77, 78]))):
        with h5py.File(tmp_path / f"fashiongen_256_256_{part}.h5", "w") as f:
            pictures = [np.full((256, 256, 3), 10 + k, np.uint8) for k in range(len(products))]
            f["input_image"] = np.stack(pictures)
            f["input_productID"] = products[:, None]
            texts = {"name": "Coat {}", "description": "Of wool, size {}", "category": "CATEGORY"}
            for key, text in texts.items():
                f[f"input_{key}"] = np.array([[text.format(p).encode("latin1")] for p in products])
    train, val, test = splits("fashiongen", tmp_path).values()
    assert [len(x.images) for x in test] == [3, 1] and test[0].captions == ["Coat 77. Of wool, size 77"]
    assert data.load("fashiongen", str(tmp_path), "test")[1] == {"category": ["CATEGORY"]}
    assert (data.pixels(test[0].images[2], 32) == 12).all() and len(train) + len(val) == 20
    (tmp_path / "fashiongen_256_256_train.h5").write_bytes(b"no such thing")
    refused("train.h5: .*; expected the published file", data.load, "fashiongen", str(tmp_path), "train")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused("pip install h5py", data.load, "fashiongen", str(tmp_path), "train")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    for name in ("products", "wikipedia", "pascal-sentence", "nus-wide", "xmedianet", "food101"):
        refused(str(tmp_path), data.load, name, str(tmp_path), "train")
