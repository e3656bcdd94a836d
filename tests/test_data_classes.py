"""Tests of the labelled data sets in data.py: each in a small copy of its official layout, and on the real data where it is."""
import json
import os

import numpy as np
import pytest
from PIL import Image

import data

SHARED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "..", "shared", "data")


def picture(path, colour=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def by_id(name, root):
    """{id: (split, instance)} of all splits, and the classes."""
    found, classes = {}, None
    for split in ("train", "val", "test"):
        instances, classes = data.load(name, str(root), split)
        found |= {x.id: (split, x) for x in instances}
    return found, classes


def named(instance, classes):
    return {t: classes[t][k] for t, k in instance.labels.items() if k >= 0}


def test_products(tmp_path, capsys):
    columns = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    rows = [f"{i},Men,Apparel,Topwear,{'Shirts' if i % 2 else 'Jeans'},Navy Blue,Fall,2011.0,Casual,Shirt {i}" for i in range(60)]
    rows[7] = "7,Women,Apparel,Topwear,Shirts,Red,NA,2012.0,Casual,Red, white, and blue top"
    write(tmp_path / "styles.csv", "\n".join([columns, *rows]) + "\n")
    for i in range(60):
        if i != 11:
            picture(tmp_path / "images" / f"{i}.jpg")
    found, classes = by_id("products", tmp_path)
    assert list(classes) == ["gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "usage"]
    assert sorted(map(int, found)) == [i for i in range(60) if i != 11] and "1 rows of split" in capsys.readouterr().err
    assert found["7"][1].captions == ["Red, white, and blue top"] and found["7"][1].group == "7"
    assert "season" not in named(found["7"][1], classes) and named(found["8"][1], classes)["articleType"] == "Jeans"
    assert {split for split, _ in found.values()} == {"train", "val", "test"}
    rows[3] = "3,Men,Apparel"
    write(tmp_path / "styles.csv", "\n".join([columns, *rows]) + "\n")
    with pytest.raises(data.DataError, match=r"styles.csv line 5: 3 cells under 10 columns"):
        data.load("products", str(tmp_path), "train")


def test_a_class_that_train_lacks_is_unlabelled(tmp_path, capsys):
    columns = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    rows = [f"{i},{'Men' if data._split_of(i, None, ()) == 'train' else 'Unisex'},a,b,c,d,e,2011,f,title {i}" for i in range(40)]
    write(tmp_path / "styles.csv", "\n".join([columns, *rows]))
    for i in range(40):
        picture(tmp_path / "images" / f"{i}.jpg")
    found, classes = by_id("products", tmp_path)
    assert classes["gender"] == ["Men"]
    assert {x.labels["gender"] for split, x in found.values() if split == "train"} == {0}
    assert {x.labels["gender"] for split, x in found.values() if split != "train"} == {-1}
    assert "never occur in train" in capsys.readouterr().err


def test_wikipedia(tmp_path):
    write(tmp_path / "categories.list", "art\nbiology\n")
    lists = {"train": [(f"t{i}", f"i{i}", 1 + i % 2) for i in range(30)], "test": [("t90", "i90", 2), ("t91", "i91", 1)]}
    for where, rows in lists.items():
        write(tmp_path / f"{where}set_txt_img_cat.list", "".join(f"{t}\t{i}\t{c}\n" for t, i, c in rows))
        for t, i, c in rows:
            picture(tmp_path / "images" / ("art", "biology")[c - 1] / f"{i}.jpg")
            write(tmp_path / "texts" / f"{t}.xml", f"<document><title>no</title><text>A text,\n<b>{t}</b> &amp; more</text></document>")
    found, classes = by_id("wikipedia", tmp_path)
    assert classes == {"category": ["art", "biology"]} and len(found) == 32
    assert found["i90-t90"][0] == found["i91-t91"][0] == "test" and found["i90-t90"][1].captions == ["A text, t90 & more"]
    assert found["i90-t90"][1].labels == {"category": 1} and found["i90-t90"][1].group == "biology"
    assert {id for id, (split, _) in found.items() if split == "val"} == {f"i{i}-t{i}" for i in range(30) if data.hash_tenth(f"i{i}-t{i}") == 9} != set()
    write(tmp_path / "testset_txt_img_cat.list", "t90\ti90\t3\n")
    with pytest.raises(data.DataError, match="category '3' of text 't90'; categories.list names 2"):
        data.load("wikipedia", str(tmp_path), "test")
    write(tmp_path / "testset_txt_img_cat.list", "t90 i90 2\n")
    with pytest.raises(data.DataError, match=r"testset_txt_img_cat.list line 1: 1 fields, expected 3"):
        data.load("wikipedia", str(tmp_path), "test")


def test_pascal_sentence(tmp_path):
    for name in ("cat", "dog"):
        for i in range(50):
            picture(tmp_path / "dataset" / name / f"2008_{i:04d}.jpg")
            write(tmp_path / "sentence" / name / f"2008_{i:04d}.txt", "".join(f"{name} {i} sentence {k}.\n" for k in range(5)))
    found, classes = by_id("pascal-sentence", tmp_path)
    assert classes == {"class": ["cat", "dog"]}
    for name in ("cat", "dog"):
        splits = [found[f"{name}/2008_{i:04d}.jpg"][0] for i in range(50)]
        assert splits == ["train"] * 40 + ["val"] * 5 + ["test"] * 5
    x = found["dog/2008_0049.jpg"][1]
    assert x.captions == [f"dog 49 sentence {k}." for k in range(5)] and x.group == "dog" and x.labels == {"class": 1}


@pytest.mark.parametrize("name", ["nus-wide", "xmedianet"])
def test_lists_of_ids_and_labels(name, tmp_path):
    for where, ids in (("train", range(6)), ("valid", range(6, 8)), ("test", range(8, 10))):
        write(tmp_path / "split" / f"{where}.txt", "".join(f"n0_{i}:{i % 2}\n" for i in ids))
        for i in ids:
            picture(tmp_path / "images" / f"n0_{i}.jpg")
            write(tmp_path / "text" / f"n0_{i}.json", json.dumps(f"text, with \"quotes\" {i}"))
    found, classes = by_id(name, tmp_path)
    assert [found[f"n0_{i}"][0] for i in range(10)] == ["train"] * 6 + ["val"] * 2 + ["test"] * 2 and classes == {"label": ["0", "1"]}
    assert found["n0_7"][1].captions == ['text, with "quotes" 7'] and found["n0_7"][1].group == "1"
    write(tmp_path / "text" / "n0_9.json", "[1]")
    with pytest.raises(data.DataError, match="n0_9.json: not a JSON string"):
        data.load(name, str(tmp_path), "test")
    os.unlink(tmp_path / "split" / "valid.txt")
    with pytest.raises(data.DataError, match="valid.txt: cannot be read"):
        data.load(name, str(tmp_path), "test")


def test_food101(tmp_path):
    for where, n in (("train", 30), ("test", 4)):
        rows = []
        for i in range(n):
            name = ("apple_pie", "sushi")[i % 2]
            picture(tmp_path / "images" / where / name / f"{name}_{i}.jpg")
            rows.append(f'{name}_{i}.jpg,"How to, {i}",{name}')
        write(tmp_path / "texts" / f"{where}_titles.csv", "\n".join(rows))
    instances, classes = data.load("food101", str(tmp_path), "test")
    assert classes == {"class": ["apple_pie", "sushi"]} and [x.captions for x in instances] == [[f"How to, {i}"] for i in range(4)]
    assert [x.group for x in instances] == ["apple_pie", "sushi"] * 2
    parts = [{x.id for x in data.load("food101", str(tmp_path), split)[0]} for split in ("train", "val")]
    assert len(parts[0] | parts[1]) == 30 and not parts[0] & parts[1] and parts[1]


def test_fashiongen(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    for where, products in (("train", np.repeat(np.arange(20), 2)), ("validation", np.array([77, 77, 77, 78]))):
        with h5py.File(tmp_path / f"fashiongen_256_256_{where}.h5", "w") as f:
            f["input_image"] = np.stack([np.full((256, 256, 3), 10 + k, np.uint8) for k in range(len(products))])
            f["input_productID"] = products[:, None]
            for key, text in (("input_name", "Coat {}"), ("input_description", "Of wool, size {}"), ("input_category", "CATEGORY")):
                f[key] = np.array([[text.format(p).encode("latin1")] for p in products])
    instances, classes = data.load("fashiongen", str(tmp_path), "test")
    assert [len(x.images) for x in instances] == [3, 1] and instances[0].captions == ["Coat 77. Of wool, size 77"] and classes == {"category": ["CATEGORY"]}
    assert (data.pixels(instances[0].images[2], 32) == 12).all() and data.pixels(instances[1].images[0], 32).shape == (32, 32, 3)
    assert len(data.load("fashiongen", str(tmp_path), "train")[0]) + len(data.load("fashiongen", str(tmp_path), "val")[0]) == 20
    (tmp_path / "fashiongen_256_256_train.h5").write_bytes(b"no such thing")
    with pytest.raises(data.DataError, match="cannot be read as Fashion-Gen"):
        data.load("fashiongen", str(tmp_path), "train")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(data.DataError, match="pip install h5py"):
        data.load("fashiongen", str(tmp_path), "train")


def test_an_empty_folder_says_what_is_missing(tmp_path):
    for name in ("products", "wikipedia", "pascal-sentence", "nus-wide", "xmedianet", "food101"):
        with pytest.raises(data.DataError, match=str(tmp_path)):
            data.load(name, str(tmp_path), "train")


def test_real_products():
    root = os.path.join(SHARED, "fashion")
    if not os.path.isdir(root):
        pytest.skip("needs the real products in ../shared/data/fashion")
    found, classes = by_id("products", root)
    pictures = {x[:-4] for x in os.listdir(os.path.join(root, "images"))}
    assert set(found) <= pictures and len(found) >= 1590 and len(classes["articleType"]) > 50
    assert data.pixels(found["1613"][1].images[0], 32).shape == (32, 32, 3)
