"""Tests of the labelled data sets in data.py: each in a small copy of its official layout."""
import os
import sys

import numpy as np
import pytest

import data
from test_data import SHARED, fresh_notes, picture, refused, splits, write  # noqa: F401

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
    with h5py.File(tmp_path / "fashiongen_256_256_train.h5", "a") as f:
        names = f["input_name"][:-1]
        del f["input_name"]
        f["input_name"] = names
    refused("train.h5: refused.*argument 2 is shorter", data.load, "fashiongen", str(tmp_path), "train")
    (tmp_path / "fashiongen_256_256_train.h5").write_bytes(b"no such thing")
    refused("train.h5: .*; expected the published file", data.load, "fashiongen", str(tmp_path), "train")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused("pip install h5py", data.load, "fashiongen", str(tmp_path), "train")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    for name in ("products", "wikipedia", "pascal-sentence", "nus-wide", "xmedianet", "food101"):
        refused(str(tmp_path), data.load, name, str(tmp_path), "train")


