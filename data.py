"""Data sets as lists of `Instance`, the batch loader, the built-in data set `primitives` and the voxel renderer.

Everything is multifold: an instance is one thing in the world, seen several times in each modality. A photo with five
captions has one image; a shape has twelve views and five captions; a video has frames. A data set is read with

    instances, classes = data.load("primitives", split="train")     # or text2shape, flickr8k, ..., mine.jsonl, mine.csv
    loader = data.Loader(instances, tokenizer, context_length=32, image_size=32, batch_size=64, views=2, captions=2)
    for batch in loader.batches(0, 100): ...

Knows nothing of models or losses.
"""
import csv
import difflib
import hashlib
import html
import http.client
import io
import json
import math
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pixels


class DataError(ValueError):
    """Input that cannot be used; the message is one line: what is wrong, where (file, row), what to do."""

    def __init__(self, message):  # it may quote the input, so what would break the line or drive the terminal becomes "?"
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


@dataclass
class Instance:
    """One thing in the world."""
    id: str
    images: list  # paths, or callables: image(size) -> PIL image of size x size (rendered views); at least one
    captions: list  # strings; at least one
    labels: dict = field(default_factory=dict)  # task -> class index; absent or -1: unlabelled
    group: str = None  # what counts as the same thing in evaluation; the id unless a data set says otherwise
    query: bool = True  # False: in evaluation only a distractor, found among the others' results but not asked about itself

    def __post_init__(self):
        self.group = self.id if self.group is None else self.group


def note(message):
    """A remark about the data, once per run, on stderr, by the first process of a group only."""
    if message not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)
    _noted.add(message)


_noted = set()


def seed_everything(seed):
    """Seed every generator that a library might draw from. What this project draws itself has its own seeded generator."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def seed_step(seed, step, rank=0):
    """Seed torch's global generator for one step: dropout and what else is drawn in it depend on these alone, so a resumed run repeats it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------- loading by name

def load(name_or_path, root=None, split="train", download=False):
    """-> (instances of the split, {task: [class names]}).

    name_or_path: a data set's name, or the path of a .jsonl or .csv file of your own. root: the data set's folder (default
    data/<name>). split: train, val, test (primitives also has unseen). download: fetch what is missing, where that is possible.
    Raises DataError for anything missing or malformed.
    """
    name = os.fspath(name_or_path)
    if name.endswith((".jsonl", ".csv")):
        return (read_jsonl if name.endswith(".jsonl") else read_csv)(name, split)
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name.lower(), DATA_SETS, n=1, cutoff=0.3)
        raise DataError(f"unknown data set {name!r}{f'; did you mean {near[0]!r}?' if near else ';'} "
                        f"Known: {', '.join(DATA_SETS)}; or the path of a .jsonl or .csv file")
    if download and name != "text2shape":
        raise DataError(f"--download: {name} cannot be fetched automatically; README.md says where to get it and how to lay it out")
    if name.startswith("primitives"):
        return primitives(split) if name == "primitives" else primitives_part(name, split)
    root = root or os.path.join("data", name)
    if download:
        download_text2shape(root)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; give --root the folder of {name} (README.md shows its layout"
                        f"{'; --download fetches it' if name == 'text2shape' else ''})")
    return DATA_SETS[name](root, split)


def hash_tenth(id):
    """0..9 by a hash of the id: a split that depends on nothing else and stays when rows are added."""
    return int(hashlib.sha1(str(id).encode()).hexdigest()[:8], 16) % 10


def _split_of(id, given, known):
    """The split of a row: the one it states; where no row states any, 80/10/10; where no row says val, the last tenth of train."""
    tenth = hash_tenth(id)
    if not known:
        return "train" if tenth < 8 else "val" if tenth == 8 else "test"
    return "val" if "val" not in known and given == "train" and tenth == 9 else given


def is_remark(distinct, rows):
    """Whether a column with so many distinct values in so many rows holds ids or remarks, and is no task to learn."""
    return distinct > 20 and (distinct >= 1000 or 2 * distinct > rows)


def _read_text(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); expected a UTF-8 text file") from None


def _csv_rows(path, strict):
    """(line number, cells) of every row of a CSV file that is not blank."""
    reader = csv.reader(io.StringIO(_read_text(path)), strict=strict)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as e:  # a field of more than 131,072 characters, text after a closing quote, an end inside quotes
        raise DataError(f"{path} line {reader.line_num}: not CSV ({e}); is a quote left open? write a quote inside a cell twice") from None


# ---------------------------------------------------------------- your own data: .jsonl and .csv

JSON_KEYS = ("id", "images", "captions", "labels", "split", "group")


def read_jsonl(path, split):
    """One instance a line: {"id", "images": [...], "captions": [...], "labels": {task: name}, "split", "group"}; paths relative to
    the file; id (default: the line's number), labels, split and group optional, null the same as absent."""
    rows = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON ({e}); one object per line") from None
        if not isinstance(row, dict) or not isinstance(row.get("images"), list) or not isinstance(row.get("captions"), list):
            raise DataError(f'{where}: needs "images" and "captions", each a list')
        unknown = sorted(set(row) - set(JSON_KEYS))
        if unknown:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(JSON_KEYS)}")
        row = {k: v for k, v in row.items() if v is not None}
        labels = row.get("labels", {})
        if not isinstance(labels, dict):
            raise DataError(f'{where}: "labels" must be an object of task: class')
        labels = {task: name for task, name in labels.items() if name not in (None, "")}
        for key, value in [(k, row[k]) for k in ("id", "split", "group") if k in row] + list(labels.items()):
            if not isinstance(value, (str, int, float)):
                raise DataError(f"{where}: {key} = {str(value)[:50]} must be a string or a number")
        id = str(row.get("id", number))
        if id in rows:
            raise DataError(f"{where}: id {id!r} was already used at {rows[id]['where']}; put all of an instance into one line")
        rows[id] = dict(where=where, id=id, images=row["images"], captions=row["captions"], split=row.get("split"),
                        labels={task: str(name) for task, name in labels.items()}, group=str(row["group"]) if "group" in row else None)
        _check_row(path, **rows[id])
    return _own_instances(path, rows, split)


def read_csv(path, split):
    """One image-caption pair a row. Columns: image, caption; optional id (rows of one id are one instance; default the image),
    split; every further column is a task. An empty cell of an optional column is the same as no cell."""
    lines, rows = _csv_rows(path, strict=True), {}
    header = [c.strip() for c in next(lines, (1, []))[1]]
    for column in ("image", "caption"):
        if column not in header:
            raise DataError(f"{path} line 1: no column {column!r}; the first line must name them (it names: {', '.join(header)[:200] or 'nothing'})")
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{path} line 1: a column has no name or that of another ({', '.join(header)[:200]}); name each, or remove it")
    tasks = [c for c in header if c not in ("image", "caption", "id", "split")]
    for number, cells in lines:
        where = f"{path} line {number}"
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells under {len(header)} columns; quote a cell that holds a comma")
        cell = dict(zip(header, cells))
        id, labels, given = cell.get("id") or cell["image"], {t: cell[t] for t in tasks if cell[t]}, cell.get("split") or None
        _check_row(path, where, id, [cell["image"]], [cell["caption"]], given)
        row = rows.setdefault(id, dict(where=where, id=id, images=[], captions=[], labels=labels, split=given, group=None))
        if row["labels"] != labels or row["split"] != given:
            raise DataError(f"{where}: another label or split than at {row['where']}, for the same id {id!r}")
        for kind in ("image", "caption"):
            if cell[kind] not in row[kind + "s"]:
                row[kind + "s"].append(cell[kind])
    return _own_instances(path, rows, split)


def _check_row(path, where, id, images, captions, split, **rest):
    if not images or not all(isinstance(x, str) and x for x in images):
        raise DataError(f"{where}: no picture, or one that is no path; an instance has at least one")
    if not captions or not all(isinstance(x, str) and x.strip() for x in captions):
        raise DataError(f"{where}: an empty caption, or one that is no text; remove it or write one")
    if split not in (None, "train", "val", "test"):
        raise DataError(f"{where}: split {split!r}; it must be train, val or test")
    try:
        "".join([id, *images, *captions]).encode()
    except UnicodeEncodeError as e:  # half a surrogate pair, which JSON's escapes can spell
        raise DataError(f"{where}: not valid text ({e.reason}); correct its \\u escapes") from None
    for image in images:
        file = os.path.join(os.path.dirname(path), image)
        if not os.path.isfile(file):
            raise DataError(f"{where}: picture {file} {'is no file' if os.path.exists(file) else 'does not exist'} (paths are relative to the file)")


def _own_instances(path, rows, split):
    """-> (instances of the split, classes). rows: {id: dict(where, id, images, captions, labels, split, group)}, each checked."""
    rows = list(rows.values())
    if not rows:
        raise DataError(f"{path}: no rows; it needs at least one for each of train, val and test")
    known = {row["split"] for row in rows if row["split"]}
    unsplit = next((row for row in rows if known and not row["split"]), None)
    if unsplit:
        raise DataError(f"{unsplit['where']}: no split, while other rows state one; give every row a split, or none (then 80/10/10 by id)")
    names = defaultdict(list)
    for row in rows:
        row["split"] = _split_of(row["id"], row["split"], known)
        for task, name in row["labels"].items():
            if row["split"] == "train":
                names[task].append(name)
    classes = {}
    for task, found in sorted(names.items()):
        distinct = sorted(set(found))
        if is_remark(len(distinct), len(found)):
            note(f"{path}: {task!r} has {len(distinct)} distinct values in {len(found)} training instances: taken as a remark, not as a task")
        else:
            classes[task] = distinct
    instances = []
    for row in [row for row in rows if row["split"] == split]:
        labels = {task: name for task, name in row["labels"].items() if task in classes}
        for task, name in labels.items():
            if name not in classes[task]:
                raise DataError(f"{row['where']}: {task} = {name!r} never occurs in the train split; add a training example, correct the "
                                f"label{'' if known else ', or give every row a split'}")
            labels[task] = classes[task].index(name)
        instances.append(Instance(row["id"], [os.path.join(os.path.dirname(path), x) for x in row["images"]], row["captions"], labels, row["group"]))
    if not instances:
        raise DataError(f"{path}: no rows in split {split!r}; it has {', '.join(sorted({row['split'] for row in rows}))}; "
                        f"{'add some' if known else 'add rows, or give every row a split'}")
    return instances, classes


def choose_task(classes, task, where, instances):
    """The task to learn, checked. Raises DataError where there is none to learn from."""
    if not classes:
        raise DataError(f"{where}: no labels; this method learns from classes: give the data a task (a column of the .csv, \"labels\" of the .jsonl)")
    task = next(iter(classes)) if task is None else task
    if task not in classes:
        raise DataError(f"--task {task}: {where} has the tasks {', '.join(classes)} (a column of nearly as many values as rows is a remark, no task)")
    count = np.bincount([x.labels[task] for x in instances if x.labels.get(task, -1) >= 0], minlength=len(classes[task]))
    check_classes(count, f"{where}: task {task!r}")
    return task


def check_classes(count, what):
    """count (C,): training instances of each class."""
    if (count > 0).sum() < 2:
        raise DataError(f"{what} has one class only in train; there is nothing to tell apart: it needs two or more")
    if is_remark((count > 0).sum(), count.sum()):
        raise DataError(f"{what} has {(count > 0).sum():,} distinct values in {count.sum():,} training rows; these look like ids or remarks, "
                             "not classes: choose another column, or group the values")
    if (count == 1).any():
        note(f"{what}: {(count == 1).sum()} of {len(count)} classes have a single training instance")


def load_split(name, root, split, task, names=None):
    """-> (instances that have a label of the task, what counts as the same thing being their class; names of the classes).
    names: the classes that a model knows; what has another is left out."""
    return by_class(*load(name, root, split), task, name, split, names)


def by_class(instances, classes, task, name, split, names=None):
    """What `load_split` makes of the instances and classes of a split that is loaded already."""
    own = classes.get(task, [])
    kept = [replace(x, group=own[x.labels[task]]) for x in instances if x.labels.get(task, -1) >= 0]
    known = [x for x in kept if names is None or x.group in names]
    if len(known) < len(instances):
        note(f"{name} {split}: {len(instances) - len(known)} of {len(instances)} instances have no known {task}; they were left out")
    if not known:
        raise DataError(f"{name}: no instance of split {split!r} has a known {task}; label some, or choose another --task")
    return known, own


def class_layout(instances, names):
    """What evaluation by class needs to know of `load_split`'s instances: class numbers (N,), captions per instance (N,), query (N,)."""
    number = {name: c for c, name in enumerate(names)}
    return (np.array([number[x.group] for x in instances], np.int64), np.array([len(x.captions) for x in instances]), np.array([x.query for x in instances]))


# ---------------------------------------------------------------- published data sets

def karpathy(root, split, name, folder):
    """Karpathy's dataset_<name>.json (images[]: filename, split, sentences[].raw, coco also filepath); restval counts as train."""
    path, rows, empty = os.path.join(root, f"dataset_{name}.json"), [], 0
    try:
        for x in json.loads(_read_text(path))["images"]:
            captions = [s["raw"].strip() for s in x["sentences"]]
            file = os.path.join(x.get("filepath", folder), x["filename"])
            rows.append((file, {"restval": "train"}.get(x["split"], x["split"]), [c for c in captions if c]))
            empty += sum(not c for c in captions)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: image {len(rows)} is not in Karpathy's format ({type(e).__name__}: {e}); get the published file again") from None
    if empty:
        note(f"{path}: {empty} empty captions were left out")
    known = {where for _, where, _ in rows}
    instances = [Instance(file, [os.path.join(root, file)], captions) for file, where, captions in rows
                 if captions and _split_of(file, where, known) == split]
    if not instances:
        raise DataError(f"{path}: no captioned images in split {split!r}; it has {', '.join(sorted(map(str, known))) or 'none'}")
    missing = [x.images[0] for x in instances if not os.path.isfile(x.images[0])]
    if missing:
        raise DataError(f"{missing[0]}: no such picture ({len(missing)} of {len(instances)} in split {split}); put the photos under {root}")
    return instances, {}


def text2shape(root, split):
    """Chen et al. 2018, "Text2Shape", arXiv 1803.08495: chairs and tables of ShapeNet as coloured voxels, about five descriptions each.

    Reads captions.tablechair.csv, <folder>/<modelId>/<modelId>.nrrd, and where present processed_captions_{train,val,test}.p
    (the published split; else 80/10/10 by a hash of modelId) and views/<modelId>/*.png (used instead of rendering).
    Relevance: the same shape. Labels: category.
    """
    path, voxels = os.path.join(root, "captions.tablechair.csv"), os.path.join(root, VOXEL_FOLDER)
    lines = _csv_rows(path, strict=False)
    header = [c.strip() for c in next(lines, (1, []))[1]]
    lacking = [c for c in ("modelId", "description", "category") if c not in header]
    if lacking:
        raise DataError(f"{path} line 1: no column {lacking[0]!r}; expected id, modelId, description, category, topLevelSynsetId, subSynsetId")
    captions, category, empty = defaultdict(list), {}, 0
    for _, cells in lines:
        row = defaultdict(str, zip(header, cells))
        if row["description"].strip() and row["modelId"]:
            captions[row["modelId"]].append(row["description"].strip())
            category[row["modelId"]] = row["category"]
        else:
            empty += 1
    if empty:
        note(f"{path}: {empty} rows without a description or a model were left out")
    published = _published_split(root)
    classes, instances, missing = {"category": sorted(set(category.values()))}, [], 0
    for model in sorted(captions):
        if (published.get(model) if published else _split_of(model, None, ())) != split:
            continue
        folder, file = os.path.join(root, "views", model), os.path.join(voxels, model, model + ".nrrd")
        views = [os.path.join(folder, x) for x in sorted(os.listdir(folder)) if x.endswith(".png")] if os.path.isdir(folder) else []
        if not views and os.path.isfile(file):
            views = [VoxelView(file, k) for k in range(VIEWS)]
        if not views:
            missing += 1
            continue
        instances.append(Instance(model, views, captions[model], {"category": classes["category"].index(category[model])}))
    if missing:
        note(f"{root}: {missing} shapes of split {split} have captions but no voxels under {VOXEL_FOLDER}; they were left out")
    if not instances:
        raise DataError(f"{root}: no shapes in split {split!r} (of train, val, test; {missing} lack voxels); expected "
                        f"{VOXEL_FOLDER}/<modelId>/<modelId>.nrrd (--download fetches them)")
    return instances, classes


def _published_split(root):
    """{modelId: split} from processed_captions_*.p, or {} where there are none."""
    found = {}
    for split in ("train", "val", "test"):
        path = os.path.join(root, f"processed_captions_{split}.p")
        if os.path.isfile(path):
            try:
                for entry in read_pickle(path)["caption_tuples"]:  # (token ids, category, modelId)
                    found[entry[2]] = split
            except (KeyError, IndexError, TypeError):
                raise DataError(f"{path}: no 'caption_tuples' of (tokens, category, modelId); expected the published pickle of Text2Shape") from None
    if found and set(found.values()) != {"train", "val", "test"}:
        raise DataError(f"{root}: processed_captions_*.p only for {', '.join(sorted(set(found.values())))}; put all three there, or none")
    return found


def _labelled(root, split, rows, tasks, relevance=None):
    """-> (instances of the split, classes). rows: (id, split, images, captions or a function that reads them, {task: class name});
    relevance: the task whose class is what counts as the same thing. Rows without a picture or a text are left out and counted;
    a class that train does not have is no class: its rows elsewhere are unlabelled."""
    found, missing, unseen = [], 0, 0
    known = {row[1] for row in rows if row[1]}  # none: 80/10/10
    rows = [(id, _split_of(id, where, known), *rest) for id, where, *rest in rows]
    classes = {t: sorted({labels[t] for _, where, _, _, labels in rows if where == "train" and t in labels}) for t in tasks}
    number = {t: {name: i for i, name in enumerate(names)} for t, names in classes.items()}
    for id, where, images, captions, names in rows:
        if where != split:
            continue
        captions = [c.strip() for c in (captions() if callable(captions) else captions) if c.strip()]
        if not captions or not all(callable(x) or os.path.isfile(x) for x in images):
            missing += 1
            continue
        labels = {t: number[t].get(name, -1) for t, name in names.items()}
        unseen += sum(label == -1 for label in labels.values())
        found.append(Instance(str(id), images, captions, labels, names[relevance] if relevance else None))
    if missing:
        note(f"{root}: {missing} rows of split {split} have no picture or no text; they were left out")
    if unseen:
        note(f"{root}: {unseen} labels of split {split} never occur in train; they count as unlabelled")
    if not found:
        raise DataError(f"{root}: nothing in split {split!r} ({missing} rows lack a picture or a text); it has {', '.join(sorted(known)) or 'none'}. README.md shows the layout")
    return found, classes


def _lines(path, fields, separator):
    """The fields of each line of a list file that is not blank."""
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        parts = [p.strip() for p in line.rsplit(separator, fields - 1)]
        if line.strip() and len(parts) != fields:
            raise DataError(f"{path} line {number}: {len(parts)} fields, expected {fields} with {separator!r} between them")
        if line.strip():
            yield parts


def _cells(path, header, lines):
    """({column: cell}, all cells) of each row of `_csv_rows` below a header; a row may have more cells, not fewer."""
    for number, cells in lines:
        if len(cells) < len(header):
            raise DataError(f"{path} line {number}: {len(cells)} cells under {len(header)} columns")
        yield dict(zip(header, cells)), cells


def products(root, split):
    """Kaggle's Fashion Product Images: styles.csv and images/<id>.jpg. A picture, a title and seven tasks; 80/10/10 by a hash of the
    id. A title's own commas are not quoted in the published file, so what is past the last column belongs to the title."""
    path = os.path.join(root, "styles.csv")
    lines = _csv_rows(path, strict=False)
    header = next(lines, (1, []))[1]
    if header[:1] != ["id"] or header[-1:] != ["productDisplayName"]:
        raise DataError(f"{path} line 1: expected columns id, ..., productDisplayName; it has {', '.join(header)[:200] or 'nothing'}")
    tasks, rows = [c for c in header[1:-1] if c != "year"], []
    for cell, cells in _cells(path, header, lines):
        rows.append((cell["id"], None, [os.path.join(root, "images", cell["id"] + ".jpg")], [",".join(cells[len(header) - 1:])],
                     {t: cell[t] for t in tasks if cell[t] not in ("", "NA")}))
    return _labelled(root, split, rows, tasks)


def wikipedia(root, split):
    """Rasiwasia et al. 2010: {train,test}set_txt_img_cat.list (text id, image id, category from 1), categories.list,
    images/<category>/<id>.jpg, texts/<id>.xml; 2,173 / 693, val out of train. Relevance: the category."""
    names, rows = [line[0] for line in _lines(os.path.join(root, "categories.list"), 1, "\t")], []

    def article(file):
        xml = _read_text(file) if os.path.isfile(file) else ""
        return [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split()) for part in re.findall(r"(?s)<text[^>]*>(.*?)</text>", xml) or [xml]]

    for where in ("train", "test"):
        for text, image, category in _lines(os.path.join(root, f"{where}set_txt_img_cat.list"), 3, "\t"):
            if not re.fullmatch("[0-9]{1,3}", category) or not 1 <= int(category) <= len(names):
                raise DataError(f"{root}: category {category[:20]!r} of text {text[:40]!r}; categories.list names {len(names)}, counted from 1")
            name = names[int(category) - 1]
            rows.append((f"{image}-{text}", where, [os.path.join(root, "images", name, image + ".jpg")],
                         partial(article, os.path.join(root, "texts", text + ".xml")), {"category": name}))
    return _labelled(root, split, rows, ["category"], "category")


def pascal_sentence(root, split):
    """Rashtchian et al. 2010: dataset/<class>/<id>.jpg, sentence/<class>/<id>.txt (five lines). 20 classes of 50; by name, 40 / 5 / 5
    of each class. Relevance: the class."""
    rows, folder = [], os.path.join(root, "dataset")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if not os.path.isdir(os.path.join(folder, name)):
            continue
        files = sorted(os.listdir(os.path.join(folder, name)))
        for i, file in enumerate(files):
            sentences = os.path.join(root, "sentence", name, os.path.splitext(file)[0] + ".txt")
            where = "train" if i < 0.8 * len(files) else "val" if i < 0.9 * len(files) else "test"
            rows.append((f"{name}/{file}", where, [os.path.join(folder, name, file)],
                         lambda path=sentences: _read_text(path).splitlines() if os.path.isfile(path) else [], {"class": name}))
    return _labelled(root, split, rows, ["class"], "class")


def id_label_lists(root, split):
    """NUS-WIDE and XMediaNet as CLIP4CMR's authors lay them out: split/{train,valid,test}.txt (id:label a line), text/<id>.json (a
    string), images/<id>.jpg. Relevance: the label."""
    def text(file):
        try:
            content = json.loads(_read_text(file)) if os.path.isfile(file) else ""
        except (json.JSONDecodeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise DataError(f"{file}: not a JSON string; expected the text of one image")
        return [content]

    rows = [(id, where, [os.path.join(root, "images", id + ".jpg")], partial(text, os.path.join(root, "text", id + ".json")), {"label": label})
            for where in ("train", "val", "test")
            for id, label in _lines(os.path.join(root, "split", {"val": "valid"}.get(where, where) + ".txt"), 2, ":")]
    return _labelled(root, split, rows, ["label"], "label")


def food101(root, split):
    """UPMC-Food101 (Wang et al. 2015): images/{train,test}/<class>/<file>, texts/{train,test}_titles.csv (file, title, class; no
    header). 101 classes, val out of train. Relevance: the class."""
    rows = []
    for where in ("train", "test"):
        path = os.path.join(root, "texts", where + "_titles.csv")
        for number, cells in _csv_rows(path, strict=False):
            if len(cells) < 3:
                raise DataError(f"{path} line {number}: {len(cells)} cells, expected file, title, class")
            file, title, name = cells[0], ",".join(cells[1:-1]), cells[-1]
            rows.append((file, where, [os.path.join(root, "images", where, name, file)], [title], {"class": name}))
    return _labelled(root, split, rows, ["class"], "class")


def fashiongen(root, split):
    """Fashion-Gen (Rostamzadeh et al. 2018, arXiv 1806.08317): fashiongen_256_256_{train,validation}.h5, read with h5py. The views of
    one product are one instance, its name and description the caption; val out of train, test is the validation file. Relevance:
    the category."""
    try:
        import h5py
    except ImportError:
        raise DataError("fashiongen is read with h5py, which is not installed; pip install h5py") from None
    rows = []
    for where in ("train", "test") if split == "test" else ("train",):
        path, views = os.path.join(root, f"fashiongen_256_256_{'train' if where == 'train' else 'validation'}.h5"), defaultdict(list)
        try:
            with h5py.File(path, "r") as f:
                product = f["input_productID"][:].ravel().tolist()
                name, description, category = ([x.decode("latin1") for x in f[key][:].ravel()] for key in ("input_name", "input_description", "input_category"))
                if len(f["input_image"]) != len(product):
                    raise DataError(f"{path}: {len(f['input_image'])} pictures of {len(product)} products; get it again")
        except (OSError, KeyError, AttributeError) as e:
            raise DataError(f"{path}: cannot be read as Fashion-Gen ({str(e)[:100]}); put the published file there") from None
        for row, id in enumerate(product):
            views[id].append(row)
        rows += [(id, where, [H5View(path, k) for k in found], [f"{name[found[0]]}. {description[found[0]]}"], {"category": category[found[0]]})
                 for id, found in views.items()]
    return _labelled(root, split, rows, ["category"], "category")


def _videos(root, split, rows, paragraph=False):
    """-> (instances of the split, {}). rows: (video, split, captions). A video's images are frames/<video>/*.jpg (or .png) in name order;
    paragraph: its captions are joined into one. Videos without frames or captions are left out, counted and named."""
    found, missing, known = [], [], {where for _, where, _ in rows}
    for video, where, captions in rows:
        if _split_of(video, where, known) != split:
            continue
        folder = os.path.join(root, "frames", video)
        frames = sorted(f for f in os.listdir(folder) if f.lower().endswith((".jpg", ".jpeg", ".png"))) if os.path.isdir(folder) else []
        captions = [" ".join(c.split()) for c in captions if c.strip()]
        if not frames or not captions:
            missing.append(video)
            continue
        found.append(Instance(video, [os.path.join(folder, f) for f in frames], [" ".join(captions)] if paragraph else captions))
    if missing:
        note(f"{root}: {len(missing)} videos of split {split} have no frames under frames/<video>/ or no caption, and were left out: "
             f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}")
    if not found:
        raise DataError(f"{root}: no video of split {split!r} has frames ({len(missing)} lack them); make them with ffmpeg, as README.md shows")
    return found, {}


def _wanted(path, kind, ok):
    """The content of a JSON file, checked."""
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{path}: no valid JSON ({str(e)[:100]}); get it again") from None
    if not ok(content):
        raise DataError(f"{path}: not {kind}; get it again")
    return content


def msrvtt(root, split):
    """MSR-VTT (Xu et al. 2016), the 1k-A split: MSRVTT_data.json (sentences[]: video_id, caption), MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv
    (video_id, sentence). 9,000 training videos of 20 captions, val out of them; 1,000 test videos of one sentence each."""
    path = os.path.join(root, "MSRVTT_data.json")
    strings = lambda x, *keys: isinstance(x, dict) and all(isinstance(x.get(k), str) for k in keys)
    content = _wanted(path, "MSR-VTT's {sentences: [{video_id, caption}]}", lambda c: isinstance(c, dict) and isinstance(c.get("sentences"), list)
                      and all(strings(s, "video_id", "caption") for s in c["sentences"]))
    captions, rows = defaultdict(list), []
    for sentence in content["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"])
    for where, file, columns in (("train", "MSRVTT_train.9k.csv", ["video_id"]), ("test", "MSRVTT_JSFUSION_test.csv", ["video_id", "sentence"])):
        path = os.path.join(root, file)
        lines = _csv_rows(path, strict=False)
        header = next(lines, (1, []))[1]
        if not set(columns) <= set(header):
            raise DataError(f"{path} line 1: expected columns {', '.join(columns)}; it has {', '.join(header)[:200] or 'nothing'}")
        for cell, _ in _cells(path, header, lines):
            rows.append((cell["video_id"], where, [cell["sentence"]] if where == "test" else captions[cell["video_id"]]))
    return _videos(root, split, rows)


def msvd(root, split):
    """MSVD (Chen and Dolan 2011): {train,val,test}_list.txt, raw-captions.pkl ({video: [[word, ...], ...]}); about 40 captions to a video."""
    path = os.path.join(root, "raw-captions.pkl")
    content = read_pickle(path)
    text = lambda c: " ".join(map(str, c)) if isinstance(c, (list, tuple)) else str(c)
    if not isinstance(content, dict) or not all(isinstance(c, (list, tuple)) for c in content.values()):
        raise DataError(f"{path}: not a dict of lists of captions; get it again")
    return _videos(root, split, [(line[0], where, list(map(text, content.get(line[0], ())))) for where in ("train", "val", "test")
                                 for line in _lines(os.path.join(root, where + "_list.txt"), 1, "\t")])


def didemo(root, split):
    """DiDeMo (Hendricks et al. 2017): {train,val,test}_data.json ([{video, description}]), {..}_list.txt. A video's descriptions are one
    paragraph."""
    rows = []
    for where in ("train", "val", "test"):
        content, captions = _wanted(os.path.join(root, where + "_data.json"), "DiDeMo's [{video, description}]", lambda c: isinstance(c, list) and all(
            isinstance(s, dict) and isinstance(s.get("video"), str) and isinstance(s.get("description"), str) for s in c)), defaultdict(list)
        for sentence in content:
            captions[os.path.splitext(sentence["video"])[0]].append(sentence["description"])
        rows += [(name, where, captions[name]) for name in (os.path.splitext(line[0])[0] for line in _lines(os.path.join(root, where + "_list.txt"), 1, "\t"))]
    return _videos(root, split, rows, paragraph=True)


def activitynet(root, split):
    """ActivityNet Captions (Krishna et al. 2017): train.json, val_1.json ({id: {sentences, timestamps}}), train_ids.json, val_ids.json. Test
    is val_1, val is out of train. A video's sentences are one paragraph; ids carry the prefix v_, with or without which frames are found."""
    rows = []
    for where, file, ids in (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json")):
        content = _wanted(os.path.join(root, file), "ActivityNet's {id: {sentences: [...]}}", lambda c: isinstance(c, dict) and all(
            isinstance(v, dict) and isinstance(v.get("sentences"), list) and all(isinstance(s, str) for s in v["sentences"]) for v in c.values()))
        for id in _wanted(os.path.join(root, ids), "a list of ids", lambda c: isinstance(c, list) and all(isinstance(i, str) for i in c)):
            bare = id[2:] if id.startswith("v_") else id
            sentences = content.get(id) or content.get("v_" + bare) or content.get(bare) or {"sentences": []}
            name = next((n for n in (id, "v_" + bare, bare) if os.path.isdir(os.path.join(root, "frames", n))), id)
            rows.append((name, where, sentences["sentences"]))
    return _videos(root, split, rows, paragraph=True)


@lru_cache(maxsize=4)
def _h5_images(file, process):
    import h5py
    return h5py.File(file, "r")["input_image"]  # one handle per process: HDF5's do not survive a fork


@dataclass(frozen=True)
class H5View:
    """Row `row` of the pictures in a Fashion-Gen file."""
    file: str
    row: int

    def __call__(self, size):
        return Image.fromarray(square(Image.fromarray(_h5_images(self.file, os.getpid())[self.row]), size))


def _bytes(content):
    return content.encode("latin1") if isinstance(content, str) else content  # Python 2's strings


class _Array(np.ndarray):
    """An array while it is read: numpy's own would trust the pickle's type, whose flags can pass bytes off as objects."""

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        content = content if isinstance(content, list) else _bytes(content)
        if isinstance(content, list) != (kind.code[0] == "O") or isinstance(content, list) and len(content) != math.prod(shape):
            raise ValueError("an array whose content is not of its type or size")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), content))  # numpy compares the length of bytes


class _Type:
    """A number's or string's type while it is read: its code and byte order are taken from the pickle, its flags are not."""

    def __init__(self, code):
        if not re.fullmatch(r"[?biufcSU]\d{0,6}|O8?", code):
            raise ValueError(f"an array of type {code[:20]!r}")
        self.code, self.dtype = code, np.dtype(code)

    def __setstate__(self, state):
        self.dtype = np.dtype(self.code).newbyteorder(state[1])


class _Unpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers: nothing outside this table is imported or called, and what is in it can only
    build a value. The functions are made anew each time, so that a pickle that sets attributes on one changes nothing."""

    def find_class(self, module, name):
        module = {"__builtin__": "builtins"}.get(module, "numpy" if module.startswith("numpy.") else module)  # Python 2's; numpy moved its own
        known = {("numpy", "ndarray"): None, ("numpy", "dtype"): lambda code, *flags: _Type(code),
                 ("numpy", "_reconstruct"): lambda *empty: _Array(0, np.int8),  # what it is follows as its state
                 ("numpy", "scalar"): lambda kind, content: np.frombuffer(_bytes(content), kind.dtype)[0],
                 ("numpy", "_frombuffer"): lambda content, kind, shape, order: np.frombuffer(content, kind.dtype).reshape(shape, order=order),
                 ("_codecs", "encode"): lambda text, encoding: _bytes(text), ("builtins", "bytes"): lambda: b"",  # protocol 2 has no bytes
                 ("collections", "OrderedDict"): OrderedDict, ("collections", "defaultdict"): defaultdict,
                 **{("builtins", t.__name__): t for t in (list, dict, set, int, float)}}
        if (module, name) not in known:
            raise DataError(f"asks for {module}.{name}")
        return known[module, name]


def read_pickle(path):
    """A pickle of numpy arrays and plain containers (Python 2's too). Raises DataError for anything else; nothing is executed."""
    try:
        with open(path, "rb") as f:
            return _Unpickler(f, encoding="latin1").load()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    except Exception as e:  # a damaged pickle raises nearly any kind
        raise DataError(f"{path}: refused, not a pickle of arrays and plain containers ({str(e)[:100]}); nothing of it was run") from None


TEXT2SHAPE_URL = "http://text2shape.stanford.edu/dataset"
VOXEL_FOLDER = "nrrd_256_filter_div_32_solid"
SPLIT_FILES = [f"processed_captions_{split}.p" for split in ("train", "val", "test")]


def download_text2shape(root):
    """Fetch captions, voxels and the published split into `root`; goes on where it stopped, unpacks through checked paths."""
    for name, wanted, holds in (("captions.tablechair.csv", "captions.tablechair.csv", b"modelId"), (f"shapenet/{VOXEL_FOLDER}.zip", VOXEL_FOLDER, b"PK"),
                                ("text2shape-data.zip", SPLIT_FILES[-1], b"PK")):
        url, file = f"{TEXT2SHAPE_URL}/{name}", os.path.join(root, name.rsplit("/", 1)[-1])
        if not os.path.exists(file):
            if os.path.exists(os.path.join(root, wanted)):
                continue
            part = fetch(url, file + ".part")
            with open(part, "rb") as f:
                right = holds in f.read(4096)
            if not right:  # some error page
                os.unlink(part)
                raise DataError(f"{url}: the server sent something else; fetch it by hand to {file}")
            os.replace(part, file)
        if file.endswith(".zip"):  # it is removed when all of it is unpacked, so one that is there was interrupted, or put there by hand
            unpack(file, root)
            os.unlink(file)


def fetch(url, part):
    """Download to `part`, continuing a partial file by an HTTP range; the length is verified. Returns `part`. Raises DataError."""
    by_hand, show = "fetch it by hand and see README.md for the layout", sys.stderr.isatty()
    try:
        os.makedirs(os.path.dirname(part) or ".", exist_ok=True)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as source:
            answer = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", source.headers.get("Content-Range") or "") if source.status == 206 else None
            resumed = answer is not None and int(answer[1]) == have
            if source.status == 206 and not resumed:
                raise DataError(f"{url}: the server sent another part than asked for; delete {part} and run the command again")
            total = int(answer[2] if resumed else source.headers.get("Content-Length") or -1)
            have = have if resumed else 0  # a server that knows no ranges sends all of it
            with open(part, "ab" if resumed else "wb") as f:
                for chunk in iter(lambda: source.read(1 << 20), b""):
                    f.write(chunk)
                    have += len(chunk)
                    if show:
                        print(f"\r{url.rsplit('/', 1)[-1]}: {have >> 20} of {max(total, have) >> 20} MiB", end="", file=sys.stderr)
        if show:
            print(file=sys.stderr)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing follows what we have, yet it was never found complete
            os.unlink(part)
            raise DataError(f"{url}: the partial download does not fit it and was removed; run the command again") from None
        raise DataError(f"{url}: the server answers {e.code} {e.reason}; {by_hand}") from None
    except (OSError, http.client.HTTPException) as e:
        raise DataError(f"{url}: could not be fetched ({getattr(e, 'reason', None) or e}); run the command again to go on "
                        f"where it stopped, or {by_hand}") from None
    if total not in (-1, have):
        raise DataError(f"{url}: the connection broke after {have} of {total} bytes; run the command again to go on")
    return part


def unpack(archive, root):
    """Unpack voxels and split files of a zip into `root`. Only names of the published layout are written, never outside `root`."""
    targets = {}
    try:
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                parts = info.filename.split("/")
                if len(parts) >= 3 and parts[-3] == VOXEL_FOLDER and parts[-1] == parts[-2] + ".nrrd":
                    targets[info] = os.path.join(root, *parts[-3:])
                elif parts[-1] in SPLIT_FILES and parts[-2:-1] != ["primitives"]:
                    targets[info] = os.path.join(root, parts[-1])
                if info in targets and (".." in parts or "\\" in info.filename or info.file_size > 1 << 28):
                    raise DataError(f"{archive}: {info.filename!r} is no name or size of the published archive; nothing was unpacked, delete it")
            if not targets or z.testzip():  # all is verified before anything is written, so what is there is right
                raise zipfile.BadZipFile(f"bad checksum of {z.testzip()}" if targets else "it holds no voxels and no splits")
            for info, target in targets.items():
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with z.open(info) as source, open(target + ".part", "wb") as f:
                    shutil.copyfileobj(source, f)
                os.replace(target + ".part", target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:  # RuntimeError: encrypted, or packed in an unknown way
        os.unlink(archive)
        raise DataError(f"{archive}: damaged ({e}); it was removed, run the command again") from None
    except OSError as e:
        raise DataError(f"{archive}: could not be unpacked ({e.strerror or e})") from None


# ---------------------------------------------------------------- voxels

def read_nrrd(path):
    """A Text2Shape voxel file: uint8 (n, n, n, 4), axes x, y, z, then RGBA. NRRD: header text, blank line, gzip or raw bytes."""
    try:
        with open(path, "rb") as f:
            start = f.read(1 << 16)
            blank = re.search(rb"\r?\n\r?\n", start)
            if not start.startswith(b"NRRD000") or not blank:
                raise DataError(f"{path}: not an NRRD file; get it again")
            lines = [line.partition(": ") for line in start[:blank.start()].decode("latin1").split("\n")]
            fields = {name.strip().lower(): value.strip()[:100] for name, _, value in lines}  # a comment or a key:=value has no such name
            if "data file" in fields or "datafile" in fields:
                raise DataError(f"{path}: its voxels are in another file (the header names a data file); expected both in one")
            kind, encoding, sizes = fields.get("type", "?"), fields.get("encoding", "?").lower(), fields.get("sizes", "?").split()
            if kind.lower() not in ("uint8", "unsigned char", "uchar", "uint8_t"):
                raise DataError(f"{path}: type {kind}; expected uint8 RGBA voxels")
            n = int(sizes[1]) if len(sizes) == 4 and re.fullmatch("[0-9]{1,3}", sizes[1]) else 0
            if sizes != ["4", str(n), str(n), str(n)] or not 1 <= n <= 512:
                raise DataError(f"{path}: sizes {' '.join(sizes)}; expected 4 n n n (channel, x, y, z), n up to 512")
            need = 4 * n ** 3
            f.seek(blank.end())
            body = f.read(need + (need >> 10) + (1 << 16))  # even what does not compress grows by less
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    try:
        if encoding in ("gzip", "gz"):
            unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            body = unzip.decompress(body, need + 1)  # never more than the sizes promise
            if len(body) == need and not unzip.eof:  # the checksum lies behind the last byte
                raise DataError(f"{path}: the gzip data ends before its checksum; the file is truncated, get it again")
        elif encoding != "raw":
            raise DataError(f"{path}: encoding {encoding}; expected gzip or raw")
    except zlib.error as e:
        raise DataError(f"{path}: damaged gzip data ({e}); get the file again") from None
    if len(body) != need:
        raise DataError(f"{path}: holds {len(body)} bytes of voxels, its sizes need {need}; the file is truncated or wrong")
    return np.ascontiguousarray(np.frombuffer(body, np.uint8).reshape(n, n, n, 4).transpose(2, 1, 0, 3))  # the first axis varies fastest


VIEWS, ELEVATION = 12, 30.0  # a turntable: 12 views, every 30 degrees, seen from 30 degrees above
LIGHT = np.array([-0.45, 0.6, 0.66])  # unit vector towards the light, in the camera's right, up, towards-the-viewer


@lru_cache(maxsize=2 * VIEWS)  # one size for the model, one for pictures
def _ray_table(grid, size, view):
    """int32 (size^2, steps): the flat voxel index at each depth step of each pixel's ray, front to back; grid^3 = outside.

    An orthographic view is no more than this table. The window is sqrt(2) of the grid's side wide, so that a turning grid fits
    from left to right; of a full grid the uppermost and lowest corners, up to a fifteenth of the side, lie outside.
    """
    azimuth, elevation = math.radians(view * 360 / VIEWS), math.radians(ELEVATION)
    right = np.array([math.cos(azimuth), 0, -math.sin(azimuth)])
    back = -np.array([math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)])
    up = np.cross(right, back)
    window, steps = math.sqrt(2) * grid, math.ceil(math.sqrt(3) * grid)
    pixel = ((np.arange(size) + 0.5) / size - 0.5) * window
    depth = np.arange(steps) - (steps - 1) / 2
    points = (pixel[None, :, None, None] * right - pixel[:, None, None, None] * up + depth[:, None] * back) + grid / 2  # (row, column, step, xyz)
    voxel = np.floor(points).astype(np.int64)
    inside = ((voxel >= 0) & (voxel < grid)).all(-1)
    flat = (voxel[..., 0] * grid + voxel[..., 1]) * grid + voxel[..., 2]
    return np.where(inside, flat, grid ** 3).astype(np.int32).reshape(size * size, steps)


def render(voxels, view, size):
    """One view of a voxel grid. voxels: uint8 (n, n, n, 4), x right, y up, z to the viewer at view 0 -> uint8 (size, size, 3).

    Each pixel takes the first voxel of its ray with alpha over 127, shaded by the normal of the depth map; white where none is.
    """
    grid = voxels.shape[0]
    if voxels.shape != (grid, grid, grid, 4):
        raise DataError(f"a voxel grid of shape {voxels.shape}; expected (n, n, n, 4)")
    table = _ray_table(grid, size, view)
    solid = np.append(voxels[..., 3].ravel() > 127, False)  # the last one is "outside"
    along = solid.take(table)  # (pixels, steps)
    first = along.argmax(1)
    pixels = np.arange(size * size)
    hit = along[pixels, first]
    image = np.full((size * size, 3), 255, np.uint8)
    if hit.any():
        scale = size / (math.sqrt(2) * grid)  # pixels per voxel, so that the slope is that of the surface at any image size
        depth = np.where(hit, first, first[hit].max() + 1).astype(np.float32).reshape(size, size)
        down, across = np.gradient(depth * scale) if size > 1 else np.zeros((2, 1, 1))
        normal = np.stack([across, -down, np.ones_like(depth)], -1).reshape(-1, 3)[hit]
        shade = 0.55 + 0.45 * np.clip(normal @ LIGHT.astype(np.float32) / np.linalg.norm(normal, axis=1), 0, 1)
        colour = voxels[..., :3].reshape(-1, 3)[table[pixels, first][hit]]
        image[hit] = (colour * shade[:, None]).astype(np.uint8)
    return image.reshape(size, size, 3)


_voxels = lru_cache(maxsize=16)(read_nrrd)  # the views of a shape are asked for one after another


@dataclass(frozen=True)
class VoxelView:
    """View number `view` of a voxel file."""
    file: str
    view: int

    def __call__(self, size):
        return Image.fromarray(render(_voxels(self.file), self.view, size))


# ---------------------------------------------------------------- primitives, the built-in data set

SHAPES = {"cuboid": ("cuboid", "box", "block"), "ellipsoid": ("ellipsoid", "ball", "egg"), "cylinder": ("cylinder", "drum", "tube"),
          "cone": ("cone", "funnel"), "pyramid": ("pyramid", "spire"), "torus": ("torus", "ring", "donut")}
COLOURS = {"red": (214, 36, 36), "orange": (244, 132, 24), "yellow": (240, 218, 48), "green": (44, 150, 52), "teal": (16, 128, 132),
           "cyan": (72, 208, 232), "blue": (40, 84, 220), "navy": (20, 28, 104), "purple": (124, 40, 168), "pink": (244, 128, 188),
           "brown": (120, 72, 32), "white": (232, 232, 232), "gray": (132, 132, 132), "black": (26, 26, 26)}
HEIGHTS = {"short": ("short", "low"), "medium": ("of medium height",), "tall": ("tall", "high")}
WIDTHS = {"narrow": ("narrow", "slim"), "medium": ("of medium width",), "wide": ("wide", "broad")}
FRACTIONS, JITTER, COLOUR_JITTER = (0.30, 0.57, 0.86), 0.05, 14  # of the grid's side, +- of it; +- levels of 256
GRID, SAMPLES, CAPTIONS, PRIMITIVES_SEED = 32, 10, 5, 2018
TASKS = {"shape": SHAPES, "color": COLOURS, "height": HEIGHTS, "width": WIDTHS}


def _configuration(number):
    """0..755 -> indices of (shape, colour, height, width)."""
    number, width = divmod(number, 3)
    number, height = divmod(number, 3)
    return (*divmod(number, 14), height, width)


def _held_out(number):
    """Two of the six shapes of every colour are never seen in training: 28 of 84 pairs, 252 of 756 configurations."""
    shape, colour, _, _ = _configuration(number)
    return shape % 3 == colour % 3


@lru_cache(maxsize=16)
def primitive_voxels(number, sample):
    """The voxels, uint8 (32, 32, 32, 4), of one sample of a configuration: its size and colour are perturbed."""
    shape, colour, height, width = _configuration(number)
    rng = np.random.default_rng([PRIMITIVES_SEED, number, sample])
    h, w = (GRID / 2 * (FRACTIONS[i] + rng.uniform(-JITTER, JITTER)) for i in (height, width))  # half height, half width
    axis = np.arange(GRID) - (GRID - 1) / 2
    x, y, z = np.abs(axis)[:, None, None], axis[None, :, None], np.abs(axis)[None, None, :]
    r, taper = np.sqrt(x ** 2 + z ** 2), w * np.clip((h - y) / (2 * h), 0, 1)  # taper: half width at height y of what comes to a point
    solid = [lambda: (x <= w) & (z <= w) & (abs(y) <= h), lambda: (r / w) ** 2 + (y / h) ** 2 <= 1, lambda: (r <= w) & (abs(y) <= h),
             lambda: (r <= taper) & (abs(y) <= h), lambda: (x <= taper) & (z <= taper) & (abs(y) <= h),
             lambda: ((r - 0.68 * w) / (0.32 * w)) ** 2 + (y / h) ** 2 <= 1][shape]()
    rgb = np.array(list(COLOURS.values())[colour]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    rgba = np.array([*np.clip(rgb, 0, 255), 255]).astype(np.uint8)
    return np.where(solid, rgba.view(np.uint32), np.uint32(0)).view(np.uint8).reshape(GRID, GRID, GRID, 4)  # four bytes at once


def primitive_caption(number, sample, k):
    """-> (caption k of a sample, its stated attributes: indices of TASKS). Three in ten state all four attributes, four in ten
    leave one out, three in ten two: sizes are left out more often than shape or colour, as in people's captions."""
    rng = np.random.default_rng([PRIMITIVES_SEED + 1, number, sample, k])
    left_out = rng.choice(4, rng.choice(3, p=(0.3, 0.4, 0.3)), replace=False, p=(0.15, 0.15, 0.35, 0.35))
    values = dict(zip(TASKS, _configuration(number)))
    word = {}
    for i, task in enumerate(TASKS):
        words = list(TASKS[task].values())[values[task]] if task != "color" else (list(COLOURS)[values[task]],)
        word[task] = "" if i in left_out else words[rng.integers(len(words))]
    noun = word["shape"] or ("object", "thing", "shape")[rng.integers(3)]
    before = [word[t] for t in ("height", "width") if word[t] and "medium" not in word[t]]
    after = [word[t] for t in ("height", "width") if "medium" in word[t]]
    rng.shuffle(before)
    template = rng.integers(4)
    if template == 0:
        text = " ".join(["a", *before, word["color"], noun, " and ".join(after)])
    elif template == 1:
        text = " ".join(["the", noun, "is", " and ".join([w for w in (*before, word["color"], *after) if w])])
    elif template == 2:
        text = " ".join([noun, "," if after or before or word["color"] else "", " , ".join([w for w in (word["color"], *after, *before) if w])])
    else:
        text = " ".join(["there is a", word["color"], noun, "that is" if before or after else "", " and ".join([*after, *before])])
    words = text.split()
    words = ["an" if a == "a" and b[0] in "aeio" else a for a, b in zip(words, [*words[1:], "."])]
    return " ".join(words), frozenset(set(range(4)) - set(left_out.tolist()))


@dataclass(frozen=True)
class PrimitiveView:
    """View number `view` of one sample of a configuration."""
    number: int
    sample: int
    view: int

    def __call__(self, size):
        return Image.fromarray(render(primitive_voxels(self.number, self.sample), self.view, size))


def primitives(split):
    """Text2Shape's primitives, made again from the published recipe: 6 solids x 14 colours x 9 sizes, 10 samples of each.

    train (4,032), val (504), test (504): samples 0-7, 8, 9 of 504 configurations. unseen: sample 9 of the 252 configurations of 28
    shape-colour pairs that training never shows, searched for among all 756 configurations, so that a model which has learned
    pairs rather than attributes finds what it knows instead. 12 views, 5 captions. Relevance: the same configuration.
    """
    samples = {"train": range(8), "val": (8,), "test": (9,), "unseen": (9,)}
    if split not in samples:
        raise DataError(f"primitives has no split {split!r}; it has {', '.join(samples)}")
    instances = []
    for number in range(756):
        if split == "unseen" or not _held_out(number):
            instances += [_primitive(number, s, split != "unseen" or _held_out(number)) for s in samples[split]]
    return instances, {task: list(values) for task, values in TASKS.items()}


def primitives_part(part, split):
    """The built-in shapes cut in two, to carry a model from one part to the other. primitives-source: 4 solids in 10 colours, 360
    configurations, samples 0-7 / 8 / 9 as train / val / test. primitives-target: the 396 configurations of the other two solids or the
    other four colours, with sample 0 alone to learn from."""
    samples = {"train": range(8) if part == "primitives-source" else (0,), "val": (8,), "test": (9,)}
    if split not in samples:
        raise DataError(f"{part} has no split {split!r}; it has {', '.join(samples)}")
    instances = []
    for number in range(756):
        shape, colour = _configuration(number)[:2]
        if (shape < 4 and colour < 10) == (part == "primitives-source"):
            instances += [_primitive(number, s) for s in samples[split]]
    return instances, {task: list(values) for task, values in TASKS.items()}


def _primitive(number, sample, query=True):
    return Instance(f"{number:03d}-{sample}", [PrimitiveView(number, sample, k) for k in range(VIEWS)],
                    [primitive_caption(number, sample, k)[0] for k in range(CAPTIONS)], dict(zip(TASKS, _configuration(number))), f"{number:03d}", query)


def primitives_oracle(instances):
    """float32 (captions, instances): how probable each instance is, to an oracle that reads every attribute a caption states.

    A caption that leaves attributes out fits several configurations alike, so even the oracle's first answer is often wrong:
    its score is the ceiling of every model.
    """
    values = np.array([list(x.labels.values()) for x in instances])  # (N, 4)
    scores = np.zeros((sum(len(x.captions) for x in instances), len(instances)), np.float32)
    row = 0
    for x, own in zip(instances, values):
        number, sample = (int(part) for part in x.id.split("-"))
        for k in range(len(x.captions)):
            stated = list(primitive_caption(number, sample, k)[1])
            fits = (values[:, stated] == own[stated]).all(1)
            scores[row] = fits / fits.sum()
            row += 1
    return torch.from_numpy(scores)


# ---------------------------------------------------------------- features in place of pictures and texts

@dataclass
class Features:
    """What frozen encoders make of a split."""
    images: np.ndarray  # float32 (A, Di): all views of all instances, in order
    texts: np.ndarray  # float32 (C, Dt): all captions of all instances
    views: np.ndarray  # (N,): how many rows of images each instance has
    captions: np.ndarray  # (N,)
    labels: np.ndarray  # int64 (N,)
    query: np.ndarray  # bool (N,): False: only searched

    @property
    def layout(self):
        return self.labels, self.captions, self.query


def read_features(path):
    """Features in place of pictures and texts: a .npz, or a pickle as CLIP4CMR's, of a dict with image (N, Di), text (N, Dt), label (N,)
    and optional ids (N,; default: row numbers). -> the same dict, features float32. Raises DataError where they do not fit together."""
    try:
        if path.endswith((".pkl", ".p", ".pickle")):
            found = read_pickle(path)
            found = {key: found[key] for key in ("image", "text", "label", "ids") if key in found}
        else:
            with np.load(path, allow_pickle=False) as archive:
                found = {key: archive[key] for key in ("image", "text", "label", "ids") if key in archive.files}
        found = {key: np.asarray(value) for key, value in found.items()}
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e}); --features names files under --root") from None
    except (ValueError, TypeError, AttributeError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: no features ({str(e)[:100]}); expected a .npz or .pkl with image, text, label and ids") from None
    absent = [key for key in ("image", "text", "label") if key not in found]
    if absent:
        raise DataError(f"{path}: no {', '.join(absent)} in it; features need image (N, Di), text (N, Dt), label (N,) and optionally ids (N,)")
    found.setdefault("ids", np.arange(len(found["label"])) if found["label"].ndim else None)
    for key, dimensions, kinds in (("label", 1, "iuUSO"), ("image", 2, "fiu"), ("text", 2, "fiu"), ("ids", 1, "iuUSO")):
        array = found[key]
        if array.ndim != dimensions or array.dtype.kind not in kinds or not array.size:
            raise DataError(f"{path}: {key} is {array.dtype} of shape {array.shape}; expected {'numbers (N, width)' if dimensions == 2 else 'one class or id a row (N,)'}")
        if len(array) != len(found["label"]):
            raise DataError(f"{path}: {len(array)} rows of {key}, but {len(found['label'])} labels; every row needs all of them")
        if dimensions == 2:
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                found[key] = array.astype(np.float32)
            bad = ~np.isfinite(found[key]).all(1)
            if bad.any():
                raise DataError(f"{path}: {key} row {int(bad.argmax())} holds a NaN or an infinite number ({bad.sum()} such rows); remove them")
        elif array.dtype.kind in "SO":  # Python 2's strings are bytes
            found[key] = np.array([x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in array.tolist()])
    return found


def feature_splits(paths, root):
    """-> ({"train", "val", "test": Features}, class names) of two files of features; val is the last tenth of train by a hash of the id."""
    train, test = (read_features(os.path.join(root or "", path)) for path in paths)
    for key in ("image", "text"):
        if train[key].shape[1] != test[key].shape[1]:
            raise DataError(f"{paths[1]}: {key} has {test[key].shape[1]} columns, in {paths[0]} it has {train[key].shape[1]}; both files need the same features")
    late = np.array([hash_tenth(id) == 9 for id in train["ids"]])
    names, count = np.unique([x for x in train["label"][~late] if x != -1], return_counts=True)  # -1: unlabelled
    check_classes(count, f"{paths[0]}: label")
    out = {}
    for split, source, rows in (("train", train, ~late), ("val", train, late), ("test", test, np.ones(len(test["label"]), bool))):
        known = rows & np.isin(source["label"], names)
        if known.sum() < rows.sum():
            note(f"{split}: {rows.sum() - known.sum()} of {rows.sum()} rows have a label that train does not; they were left out")
        if not known.any():
            raise DataError(f"{paths[split == 'test']}: no row of split {split!r} has a label that train has")
        ones = np.ones(known.sum(), dtype=np.int64)
        out[split] = Features(source["image"][known], source["text"][known], ones, ones, np.searchsorted(names, source["label"][known]), ones > 0)
    return out, [str(name) for name in names]


def feature_batches(features, batch_size, seed, start, stop, rank, world):
    """Batches as Loader's, of features: one view and one caption of each instance, drawn from (seed, step). Yields this process's
    part of each: images (b, Di), texts (b, Dt), index (b,). The last batch of an epoch is smaller."""
    n, per_epoch = len(features.labels), -(-len(features.labels) // batch_size)
    first_view, first_caption = features.views.cumsum() - features.views, features.captions.cumsum() - features.captions
    for step in range(start, stop):
        epoch, at = divmod(step, per_epoch)
        index = np.random.default_rng([seed, epoch]).permutation(n)[at * batch_size:(at + 1) * batch_size]
        view, caption = np.random.default_rng([seed, epoch, at]).random((2, len(index)))
        mine = np.array_split(np.arange(len(index)), world)[rank]
        rows = (first_view[index] + (view * features.views[index]).astype(np.int64))[mine]
        columns = (first_caption[index] + (caption * features.captions[index]).astype(np.int64))[mine]
        yield {"images": torch.from_numpy(features.images[rows]), "texts": torch.from_numpy(features.texts[columns]), "index": torch.from_numpy(index[mine])}


@dataclass(frozen=True)
class RegionView:
    """Row `row` of a file of region features: float32 (regions, width), such as 36 x 2,048 of a detector."""
    path: str
    row: int

    def features(self):
        return np.array(_regions(self.path)[self.row], dtype=np.float32)

    def __call__(self, size):
        raise DataError(f"{self.path}: region features have no picture to show")


@lru_cache(maxsize=8)
def _regions(path):
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: no region features ({str(e)[:100]}); expected a .npy file (images, regions, width)") from None
    if found.ndim != 3 or found.dtype.kind != "f" or not found.size:
        raise DataError(f"{path}: {found.dtype} of shape {found.shape}; region features are floats (images, regions, width)")
    return found


def load_regions(name, root, split):
    """As `load`, of region features in place of pictures: <root>/precomp/{train,dev,test}_ims.npy (images, 36, 2048), memory-mapped, and
    _caps.txt, five captions to an image, in order (SCAN's files; with one row of features per caption each fifth is read)."""
    files = {"train": "train", "val": "dev", "test": "test"}
    if split not in files:
        raise DataError(f"--regions has no split {split!r}; it has {', '.join(files)}")
    base = os.path.join(root or os.path.join("data", name), "precomp", files[split])
    captions = [line.strip() for line in _read_text(base + "_caps.txt").splitlines() if line.strip()]
    rows = len(_regions(base + "_ims.npy"))
    if len(captions) not in (rows, 5 * rows) or len(captions) % 5:
        raise DataError(f"{base}_ims.npy has {rows} rows and {base}_caps.txt {len(captions)} captions; expected five captions to a row, or one")
    every = 5 * rows // len(captions)
    return [Instance(f"{files[split]}-{i}", [RegionView(base + "_ims.npy", i * every)], captions[5 * i:5 * i + 5]) for i in range(len(captions) // 5)], {}


# ---------------------------------------------------------------- pictures

def open_image(path):
    """A picture file as RGB: EXIF rotation applied, 16-bit scaled to 8, transparency over white, an animation's first frame."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 or 32 bits of grey: convert("RGB") alone would clip them to white
                levels = np.asarray(image).astype(np.float32)
                top = 65535 if image.mode[:2] == "I;" or levels.max() > 255 else 255
                image = Image.fromarray((levels * (255 / top)).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except Exception as e:  # Pillow raises many kinds on damaged files, and DecompressionBombError on huge ones
        what = "is empty" if os.path.isfile(path) and os.path.getsize(path) == 0 else f"is damaged or no picture ({type(e).__name__}: {str(e)[:100]})"
        raise DataError(f"{path}: {what}; replace it or remove its row") from None


def square(image, size):
    """RGB picture -> uint8 (size, size, 3): bicubic resize of the shorter side, centre crop; the same pixels as torchvision's
    Resize and CenterCrop. Of a very long picture only what is kept is resized (1 x 5,000 would otherwise grow to gigabytes);
    Pillow may then take rows and columns in the other order, and its rounding between the two shows."""
    if image.size == (size, size):
        return np.asarray(image)
    w, h = image.size
    short = min(w, h)
    wide, high = (size if side == short else int(size * side / short) for side in (w, h))
    left, top = round((wide - size) / 2), round((high - size) / 2)
    if max(w, h) <= 64 * short:
        return np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))
    box = (left * w / wide, top * h / high, (left + size) * w / wide, (top + size) * h / high)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def pixels(image, size):
    """A path, or a callable view -> uint8 (size, size, 3)."""
    return square(image(size).convert("RGB") if callable(image) else open_image(image), size)


# ---------------------------------------------------------------- batches

def _ignore_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the main one acts on them, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Batches(torch.utils.data.Dataset):
    """Makes batch number `step` from (seed, step) alone, so that workers, resumed runs and several processes agree."""

    def __init__(self, loader):
        self.l = loader

    def __getitem__(self, step):
        try:
            return self.l.make(step)
        except DataError as e:  # a worker's exception would arrive wrapped in its traceback
            return e


class Loader:
    """Batches of instances.

    instances: list of Instance. tokenizer, context_length: captions become int32 rows (longer ones are cut, counted and said
    once). image_size: pictures become (3, image_size, image_size). batch_size: instances per batch over all processes.
    views, captions: how many of each are drawn per instance, without replacement; None: all of them, in order (evaluation).
    frames: instead of views, at most this many images, taken evenly and in order (video).
    train: shuffled and without the last incomplete batch. rank, world: this process takes its contiguous part of every batch.
    cache_bytes: decoded pictures are kept, shared by all workers, where they all fit.

    A batch: images uint8 (B, V, 3, S, S), of `load_regions` float32 (B, V, regions, width), image_mask bool (B, V), tokens int32 (B, L, context_length), caption_mask bool (B, L),
    labels {task: int64 (B,)}, index int64 (B,). An instance with fewer views or captions than asked for has its rest masked.
    """

    def __init__(self, instances, tokenizer, context_length, image_size, batch_size, views=None, captions=None, train=False,
                 seed=0, workers=0, rank=0, world=1, cache_bytes=2 << 30, frames=None):
        n = len(instances)
        if batch_size % world:
            raise DataError(f"--batch-size {batch_size} is no multiple of the {world} processes; choose one that is")
        if train and batch_size > n:
            raise DataError(f"--batch-size {batch_size} is larger than the data set: {n} training instances; choose {n} or less")
        self.instances, self.size, self.batch_size, self.views, self.captions = instances, image_size, batch_size, views, captions
        self.train, self.seed, self.workers, self.rank, self.world, self.frames = train, seed, workers, rank, world, frames
        self.tokens, cut = tokenizer.rows([c for x in instances for c in x.captions], context_length)
        if cut:
            note(f"{cut} of {len(self.tokens)} captions are longer than {context_length} tokens and were cut")
        for what, asked, have in (("views", views, [len(x.images) for x in instances]), ("captions", captions, [len(x.captions) for x in instances])):
            few = sum(h < (asked or 0) for h in have)
            if few and train:
                note(f"{few} of {n} instances have fewer than {asked} {what}; all they have is used")
        self.first_image = np.cumsum([0] + [len(x.images) for x in instances])
        self.first_caption = np.cumsum([0] + [len(x.captions) for x in instances])
        self.tasks = sorted({t for x in instances for t in x.labels})
        self.regions = isinstance(instances[0].images[0], RegionView) if n else False  # float features in place of pixels
        self.cached = not self.regions and self.first_image[-1] * image_size ** 2 * 3 <= cache_bytes
        self.cache = None
        self._plan = (-1, None)
        if self.cached:
            self._make_cache()

    def _make_cache(self):
        """Anonymous shared memory: forked workers fill it for each other, and its pages cost nothing until written."""
        total, S = int(self.first_image[-1]), self.size
        self.cache = np.frombuffer(mmap.mmap(-1, max(1, total * S * S * 3)), np.uint8)[:total * S * S * 3].reshape(total, S, S, 3)
        self.filled = np.frombuffer(mmap.mmap(-1, max(1, total)), np.uint8)

    def __getstate__(self):  # where workers are spawned, not forked, each has a cache of its own
        return {k: v for k, v in self.__dict__.items() if k not in ("cache", "filled")} | {"cache": None}

    def __len__(self):
        """Batches per epoch."""
        n = len(self.instances)
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def _pixels(self, instance, k):
        at = self.first_image[instance] + k
        if self.cached and self.cache is None:
            self._make_cache()
        if self.cached and self.filled[at]:
            return self.cache[at]
        image = pixels(self.instances[instance].images[k], self.size)
        if self.cached:
            self.cache[at] = image
            self.filled[at] = 1  # after the pixels, so that no other worker sees half a picture
        return image

    def make(self, step):
        """The batch of global step `step` (epoch = step // len(self)), this process's part."""
        epoch, at = divmod(step, len(self))
        if self._plan[0] != epoch:
            n = len(self.instances)
            self._plan = (epoch, np.random.default_rng([self.seed, epoch]).permutation(n) if self.train else np.arange(n))
        share = self.batch_size // self.world
        begin = at * self.batch_size + self.rank * share
        chosen = self._plan[1][begin:min(begin + share, (at + 1) * self.batch_size)]
        views, captions = [], []
        for i in chosen:
            rng, x = np.random.default_rng([self.seed, epoch, i]), self.instances[i]
            if self.frames:
                views.append(np.linspace(0, len(x.images) - 1, min(self.frames, len(x.images))).round().astype(int))
            else:
                views.append(rng.permutation(len(x.images))[:self.views] if self.views else np.arange(len(x.images)))
            captions.append(rng.permutation(len(x.captions))[:self.captions] if self.captions else np.arange(len(x.captions)))
        V = self.views or max(map(len, views), default=1)
        L = self.captions or max(map(len, captions), default=1)
        shape = self.instances[0].images[0].features().shape if self.regions else (self.size, self.size, 3)
        images = np.zeros((len(chosen), V, *shape), np.float32 if self.regions else np.uint8)
        tokens = torch.zeros(len(chosen), L, self.tokens.shape[1], dtype=torch.int32)
        image_mask, caption_mask = torch.zeros(len(chosen), V, dtype=torch.bool), torch.zeros(len(chosen), L, dtype=torch.bool)
        for b, i in enumerate(chosen):
            for v, k in enumerate(views[b]):
                images[b, v] = self.instances[i].images[k].features() if self.regions else self._pixels(i, k)
            tokens[b, :len(captions[b])] = self.tokens[self.first_caption[i] + captions[b]]
            image_mask[b, :len(views[b])], caption_mask[b, :len(captions[b])] = True, True
        images = torch.from_numpy(images)
        return {"images": images if self.regions else images.permute(0, 1, 4, 2, 3), "image_mask": image_mask, "tokens": tokens, "caption_mask": caption_mask,
                "labels": {t: torch.tensor([self.instances[i].labels.get(t, -1) for i in chosen], dtype=torch.int64) for t in self.tasks},
                "index": torch.from_numpy(np.asarray(chosen, dtype=np.int64))}

    def batches(self, start=0, stop=None):
        """Yield the batches of steps start..stop-1, running on through epochs; stop None: the end of the first epoch."""
        steps = range(start, len(self) if stop is None else stop)
        context = "fork" if self.workers and sys.platform == "linux" else None  # shares the cache
        for batch in torch.utils.data.DataLoader(
                _Batches(self), sampler=steps, batch_size=None, num_workers=min(self.workers, len(steps)), pin_memory=torch.cuda.is_available(),
                multiprocessing_context=context if steps else None, worker_init_fn=_ignore_signals,
                generator=torch.Generator()):  # leaves torch's global generator alone
            if isinstance(batch, DataError):
                raise batch
            yield batch


def to_device(batch, device):
    """The batch on a device, pixels as normalised float32: bytes travel (a quarter of the size), arithmetic is done there."""
    moved = {k: v if k == "labels" else v.to(device, non_blocking=True) for k, v in batch.items()}
    moved["labels"] = {t: v.to(device, non_blocking=True) for t, v in batch["labels"].items()}
    if moved["images"].dtype == torch.uint8:
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1) * 255 for x in (IMAGE_MEAN, IMAGE_STD))
        moved["images"] = (moved["images"].float() - mean) / std
    return moved


DATA_SETS = {
    "primitives": None,
    "primitives-source": None,
    "primitives-target": None,
    "text2shape": text2shape,
    "flickr30k": lambda root, split: karpathy(root, split, "flickr30k", "flickr30k-images"),
    "flickr8k": lambda root, split: karpathy(root, split, "flickr8k", "Images"),
    "coco": lambda root, split: karpathy(root, split, "coco", ""),
    "products": products,
    "wikipedia": wikipedia,
    "pascal-sentence": pascal_sentence,
    "nus-wide": id_label_lists,
    "xmedianet": id_label_lists,
    "food101": food101,
    "fashiongen": fashiongen,
    "msrvtt": msrvtt,
    "msvd": msvd,
    "didemo": didemo,
    "activitynet": activitynet,
}
