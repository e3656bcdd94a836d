"""Data sets as lists of `Instance`, the batch loader, the built-in data set `primitives` and the voxel
renderer.

Everything is multifold: an instance is one thing in the world, seen several times in each modality. A photo
with five captions has one image; a shape has twelve views and five captions; a video has frames. A data set
is read with

    instances, classes = data.load("primitives", split="train")  # or text2shape, mine.jsonl, mine.csv, ...
    loader = data.Loader(instances, tokenizer, context_length=32, image_size=32, batch_size=64, train=True)
    for batch in loader.batches(0, 100): ...

Knows nothing of models or losses.
"""
import atexit
import csv
import difflib
import gc
import hashlib
import html
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from dataclasses import InitVar, dataclass, field, replace
from functools import lru_cache, partial
from operator import itemgetter

import numpy as np
import torch
from PIL import Image, ImageOps

import clip


class DataError(clip.OneLineError):
    """Input that cannot be used; the message is one line: what is wrong, where (file, row), what to do."""


def expect(condition, where, problem):
    """Raise DataError unless the condition holds. where: file and row; problem: what is wrong, what to do."""
    if not condition:
        raise DataError(f"{where}: {problem}")


@dataclass(slots=True)  # of a million instances, 50 MB less than with a dict each
class Instance:
    """One thing in the world."""
    id: str
    images: list  # at least one path, or callable (rendered view): image(size) -> PIL image of size x size
    captions: list  # at least one string
    labels: dict = field(default_factory=dict)  # task -> class index; absent or -1: unlabelled
    group: str = None  # what counts as the same thing in evaluation; the id unless a data set says otherwise
    query: bool = True  # False: in evaluation only a distractor, which is searched but not asked about

    def __post_init__(self):
        self.group = self.id if self.group is None else self.group


def note(message):
    """A remark about the data, once per run, on stderr, by the first process of a group only."""
    if message not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)
    _noted.add(message)


_noted = set()


def seed_everything(seed):
    """Seed every generator that a library might draw from. The project's own draws have their own."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def seed_step(seed, step, rank=0):
    """Seed torch's global generator for one step, so that a resumed run repeats its dropout."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


# ---------------------------------------------------------------- loading by name

def load(name_or_path, root=None, split="train", download=False):
    """-> (instances of the split, {task: [class names]}).

    name_or_path: a name in DATA_SETS (at the end of this file), or the path of a .jsonl or .csv file of your
    own. root: the data set's folder (default data/<name>). split: train, val, test (primitives also has
    unseen). download: call `fetch_missing` first. Raises DataError for anything missing or malformed.
    """
    return load_splits(name_or_path, root, [split], download)[0]


def load_splits(name_or_path, root=None, splits=("train", "val", "test"), download=False):
    """[what `load` returns of each split]. One file of all splits is read once."""
    collects = gc.isenabled()
    gc.disable()  # looking for cycles among millions of new objects takes longer than reading them
    try:
        return _load_splits(os.fspath(name_or_path), root, splits, download)
    finally:
        if collects:
            gc.enable()


def _load_splits(name, root, splits, download):
    if name.endswith(".jsonl"):
        return read_jsonl(name, splits)
    if name.endswith(".csv"):
        return read_csv(name, splits)
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name.lower(), DATA_SETS, n=1, cutoff=0.3)
        question = f" did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data set {name!r};{question} Known: {', '.join(DATA_SETS)}; "
                        "or the path of a .jsonl or .csv file")
    root = root or os.path.join("data", name)
    if download:
        fetch_missing(name, root)
    if not name.startswith(("primitives", "text2shape")):
        expect(os.path.isdir(root), root, f"no such folder, and {name} cannot be fetched automatically; "
               "give --root its folder (README.md shows the layout)")
    if DATA_SETS[name] is karpathy:
        return karpathy(root, splits, name)
    return [DATA_SETS[name](root, split) for split in splits]


@dataclass(slots=True)
class Row:
    """An instance as a data set's files state it: before its split is known and its classes are numbered."""
    id: str
    split: str  # None where the files state none
    images: list
    captions: list  # or the file that holds them
    labels: dict = field(default_factory=dict)  # task -> name of the class
    group: str = None
    where: str = None  # file and line, for errors


TENTHS = ("train",) * 8 + ("val", "test")


def hash_tenth(id):
    """0..9 by a hash of the id: a split that depends on nothing else and stays when rows are added."""
    text = str(id).encode("utf-8", "surrogatepass")  # JSON may hold half of a surrogate pair
    return int(hashlib.sha1(text).hexdigest()[:8], 16) % 10


def assign_splits(rows):
    """Set the split of each row to the one it states. Where no row states any, it is 80/10/10 by a hash of
    the id; where none says val, val is the last tenth of train. Returns the splits that are stated."""
    stated = {row.split for row in rows} - {None}
    for row in rows:
        tenth = hash_tenth(row.id)
        if not stated:
            row.split = TENTHS[tenth]
        elif "val" not in stated and row.split == "train" and tenth == 9:
            row.split = "val"
    return stated


def is_remark(distinct, rows):
    """Whether so many distinct values in so many rows are ids or remarks, and no task to learn."""
    return distinct > 20 and (distinct >= 1000 or 2 * distinct > rows)


# ---------------------------------------------------------------- files of text, JSON, CSV and lists

def read_text(path):
    """The content of a UTF-8 text file."""
    return "".join(read_lines(path))


def read_lines(path):
    """Yield the lines of a UTF-8 text file. Only a line feed ends one: str.splitlines would split at U+2028
    too."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            yield from f
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"{path}: cannot be read ({reason}); expected a UTF-8 text file") from None


def fits(value, shape):
    """Whether what was read from a file is of a shape: a type; [shape], a list of such; {"key": shape}, a
    dict that has these keys; {str: shape}, a dict of such under any keys."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(fits(item, shape[str]) for item in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(key), part) for key, part in shape.items())
    return isinstance(value, shape)


def parse_json(text, where, shape, expected):
    """The value of a JSON text. It must be of the shape (see `fits`); `expected` says the same in words."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({str(e)[:100]}); expected {expected}") from None
    expect(fits(value, shape), where, f"expected {expected}")
    return value


def read_json(path, shape, expected):
    return parse_json(read_text(path), path, shape, f"{expected}; get the published file again")


def read_cells(path, strict=False):
    """Yield ("file line n", cells) of the rows of a CSV file. strict: misplaced quotes are an error."""
    reader = csv.reader(read_lines(path), strict=strict)
    try:
        for cells in reader:
            if cells:
                yield f"{path} line {reader.line_num}", cells
    except csv.Error as e:  # an end inside quotes, text after a closing quote, 131,072 characters in a field
        raise DataError(f"{path} line {reader.line_num}: not CSV ({e}); is a quote left open? "
                        "write a quote inside a cell twice") from None


def read_table(path, columns, strict=False):
    """-> (header, rows) of a CSV file whose first row must name these columns; rows is as of `read_cells`."""
    rows = read_cells(path, strict)
    header = [name.strip() for name in next(rows, ("", []))[1]]
    for name in columns:
        expect(name in header, f"{path} line 1", f"no column {name!r}; the first line must name "
               f"{', '.join(columns)} (it names: {', '.join(header)[:200] or 'nothing'})")
    return header, rows


UNPACKED = 1 << 30  # bytes that the content of any packed file may take


def check_unpacked(path, size):
    """Raise DataError for a file whose content is large, and would take over 100 times as much as itself."""
    expect(size <= max(UNPACKED, 100 * os.path.getsize(path)), path,
           f"its content takes {size >> 20} MiB, over 100 times as much as the file; get it again")


def read_list(path, fields, separator="\t"):
    """Yield the fields of each line of a list file that is not blank."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            parts = [part.strip() for part in line.rsplit(separator, fields - 1)]
            expect(len(parts) == fields, f"{path} line {number}",
                   f"{len(parts)} fields, expected {fields} with {separator!r} between them")
            yield parts


def list_folder(folder, endings=("",)):
    """Names of the files with these endings in a folder, sorted; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(endings))


# ---------------------------------------------------------------- your own data: .jsonl and .csv

JSON_KEYS = ("id", "images", "captions", "labels", "split", "group")


def read_jsonl(path, splits):
    """One instance a line: {"id", "images": [...], "captions": [...], "labels": {task: name}, "split",
    "group"}. Paths are relative to the file. All but images and captions is optional, and null is the same as
    absent. The default id is the line's number."""
    rows = {}
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            row = _json_row(line.rstrip("\n"), number, f"{path} line {number}")
            first = rows.setdefault(row.id, row)
            expect(first is row, row.where,
                   f"id {row.id!r} was already used at {first.where}; put all of an instance into one line")
            _check_row(path, row)
    return _own_instances(path, list(rows.values()), splits)


def _json_row(line, number, where):
    expected = 'an object with "images" and "captions", each a list'
    content = parse_json(line, where, {"images": list, "captions": list}, expected)
    for key in content:
        expect(key in JSON_KEYS, where, f"unknown key {key!r}; known are {', '.join(JSON_KEYS)}")
    row = {key: value for key, value in content.items() if value is not None}
    labels = row.pop("labels", {})
    expect(isinstance(labels, dict), where, '"labels" must be an object of task: class')
    labels = {task: name for task, name in labels.items() if name not in (None, "")}
    names = {key: row[key] for key in ("id", "split", "group") if key in row}
    for key, value in [*names.items(), *labels.items()]:
        expect(isinstance(value, (str, int, float)), where,
               f"{key} = {str(value)[:50]} must be a string or a number")
    id = str(row.get("id", number))
    group = str(row["group"]) if "group" in row else None
    labels = {task: str(name) for task, name in labels.items()}
    return Row(id, row.get("split"), row["images"], row["captions"], labels, group, where)


def read_csv(path, splits):
    """One image-caption pair a row. Columns: image, caption; optional id (rows of one id are one instance;
    default the image) and split; every further column is a task. An empty optional cell is none."""
    header, lines = read_table(path, ("image", "caption"), strict=True)
    expect(len(set(header)) == len(header) and "" not in header, f"{path} line 1",
           f"a column has no name or that of another ({', '.join(header)[:200]}); name each, or remove it")
    rows = {}
    for where, cells in lines:
        expect(len(cells) == len(header), where,
               f"{len(cells)} cells under {len(header)} columns; quote a cell that holds a comma")
        cell = dict(zip(header, cells))
        image = cell.pop("image")
        caption = cell.pop("caption")
        id = cell.pop("id", "") or image
        stated = cell.pop("split", "") or None
        labels = {task: name for task, name in cell.items() if name}
        row = Row(id, stated, [image], [caption], labels, where=where)
        _check_row(path, row)
        first = rows.setdefault(id, row)
        expect(first.labels == labels and first.split == stated, where,
               f"another label or split than at {first.where}, for the same id {id!r}")
        if image not in first.images:
            first.images.append(image)
        if caption not in first.captions:
            first.captions.append(caption)
    return _own_instances(path, list(rows.values()), splits)


def _check_row(path, row):
    expect(row.images and all(isinstance(image, str) and image for image in row.images), row.where,
           "no picture, or one that is no path; an instance has at least one")
    expect(row.captions and all(isinstance(text, str) and text.strip() for text in row.captions), row.where,
           "an empty caption, or one that is no text; remove it or write one")
    expect(row.split in (None, "train", "val", "test"), row.where,
           f"split {row.split!r}; it must be train, val or test")
    try:
        "".join([row.id, *row.images, *row.captions]).encode()
    except UnicodeEncodeError as e:  # half a surrogate pair, which JSON's escapes can spell
        raise DataError(f"{row.where}: not valid text ({e.reason}); correct its \\u escapes") from None
    for image in row.images:
        file = os.path.join(os.path.dirname(path), image)
        if not os.path.isfile(file):
            problem = "is no file" if os.path.exists(file) else "does not exist"
            raise DataError(f"{row.where}: picture {file} {problem} (paths are relative to the file)")


def _own_instances(path, rows, splits):
    """-> [(instances, classes) of each split] of checked rows."""
    expect(rows, path, "no rows; it needs at least one for each of train, val and test")
    stated = assign_splits(rows)
    for row in rows:
        expect(row.split, row.where, "no split, while other rows state one; "
                                     "give every row a split, or none (then 80/10/10 by id)")
    classes = {}
    for task, names in sorted(train_names(rows).items()):
        distinct = sorted(set(names))
        if is_remark(len(distinct), len(names)):
            note(f"{path}: {task!r} has {len(distinct)} distinct values in {len(names)} training instances: "
                 "taken as a remark, not as a task")
        else:
            classes[task] = distinct
    advice = "" if stated else ", or give every row a split"
    present = ", ".join(sorted({row.split for row in rows}))
    loaded = []
    for split in splits:
        chosen = [row for row in rows if row.split == split]
        expect(chosen, path, f"no rows in split {split!r}; it has {present}; add some{advice}")
        for task, names in classes.items():
            labelled = [row for row in chosen if task in row.labels]
            if labelled and not any(row.labels[task] in names for row in labelled):
                raise DataError(f"{labelled[0].where}: {task} = {labelled[0].labels[task]!r} never occurs in "
                                f"the train split, nor does any other {task} of split {split}; "
                                f"add training examples, correct the labels{advice}")
        instances = []
        for row in chosen:
            images = [os.path.join(os.path.dirname(path), image) for image in row.images]
            instances.append(Instance(row.id, images, row.captions, row.labels, row.group))
        number_labels(instances, classes, path, split)
        loaded.append((instances, classes))
    return loaded


# ---------------------------------------------------------------- tasks and their classes

def train_names(rows):
    """{task: [the class names that its training rows state]}."""
    names = defaultdict(list)
    for row in rows:
        if row.split == "train":
            for task, name in row.labels.items():
                names[task].append(name)
    return names


def number_labels(instances, classes, where, split):
    """Make class indices of the class names that the instances' labels hold. A class that train lacks becomes
    -1, unlabelled, and a note counts these; a task that is none of the classes is dropped."""
    number = {(task, name): c for task, names in classes.items() for c, name in enumerate(names)}
    unseen = 0
    for x in instances:
        x.labels = {task: number.get((task, name), -1) for task, name in x.labels.items() if task in classes}
        unseen += list(x.labels.values()).count(-1)
    if unseen:
        note(f"{where}: {unseen} labels of split {split} never occur in train; they count as unlabelled")


def choose_task(classes, task, where, instances):
    """The task to learn, checked. Raises DataError where there is none to learn from."""
    expect(classes, where, "no labels; this method learns from classes: give the data a task "
           '(a column of the .csv, "labels" of the .jsonl)')
    task = next(iter(classes)) if task is None else task
    expect(task in classes, f"--task {task}", f"{where} has the tasks {', '.join(classes)} "
           "(a column of nearly as many values as rows is a remark, no task)")
    labels = [x.labels[task] for x in instances if x.labels.get(task, -1) >= 0]
    check_classes(np.bincount(labels, minlength=len(classes[task])), where, f"task {task!r}")
    return task


def check_classes(count, where, task):
    """Raise DataError unless classes can be learned of which train has these numbers of instances (C,)."""
    distinct = (count > 0).sum()
    expect(distinct >= 2, where,
           f"{task} has one class only in train; there is nothing to tell apart: it needs two or more")
    expect(not is_remark(distinct, count.sum()), where,
           f"{task} has {distinct:,} distinct values in {count.sum():,} training rows; "
           "these look like ids or remarks, not classes: choose another column, or group the values")
    if (count == 1).any():
        note(f"{where}: {task}: {(count == 1).sum()} of {len(count)} classes have a single training instance")


def load_split(name, root, split, task, classes=None):
    """As `load`, for one task: -> (instances that have a label of it, names of its classes). What counts as
    the same thing, the group, becomes the class. classes: those that a model knows; others are left out."""
    instances, tasks = load(name, root, split)
    return by_class(instances, tasks, task, name, split, classes)


def by_class(instances, classes, task, name, split, known=None):
    """What `load_split` makes of the instances and the {task: [class names]} of a split that is loaded
    already. known: the names of the classes that a model knows."""
    names = classes.get(task, [])
    labelled = [replace(x, group=names[x.labels[task]]) for x in instances if x.labels.get(task, -1) >= 0]
    if known is not None:
        labelled = [x for x in labelled if x.group in known]
    left_out = len(instances) - len(labelled)
    if left_out:
        note(f"{name} {split}: {left_out} of {len(instances)} instances have no known {task}; "
             "they were left out")
    expect(labelled, name,
           f"no instance of split {split!r} has a known {task}; label some, or choose another --task")
    return labelled, names


def class_layout(instances, classes):
    """What evaluation by class needs to know of `load_split`'s instances: the number of each one's class in
    `classes` (N,), how many captions it has (N,), and whether it is a query (N,)."""
    number = {name: c for c, name in enumerate(classes)}
    labels = np.array([number[x.group] for x in instances], np.int64)
    captions = np.array([len(x.captions) for x in instances])
    query = np.array([x.query for x in instances])
    return labels, captions, query


# ---------------------------------------------------------------- published sets: pictures and captions

KARPATHY = {"flickr30k": "flickr30k-images", "flickr8k": "Images", "coco": ""}  # the folder of the pictures


def karpathy(root, splits, name):
    """Karpathy's dataset_<name>.json: images[] of filename, split, sentences[].raw and, for coco, filepath.
    The split restval counts as train. -> [(instances, {}) of each split]."""
    path = os.path.join(root, f"dataset_{name}.json")
    rows = []
    empty = 0
    for number, image in enumerate(read_json(path, {"images": list}, "Karpathy's {images: [...]}")["images"]):
        try:
            file = os.path.join(image.get("filepath", KARPATHY[name]), image["filename"])
            captions = [sentence["raw"].strip() for sentence in image["sentences"]]
            part = {"restval": "train"}.get(image["split"], image["split"])
        except (KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{path}: image {number} is not in Karpathy's format ({type(e).__name__}: {e}); "
                            "get the published file again") from None
        rows.append(Row(file, part, [os.path.join(root, file)], [caption for caption in captions if caption]))
        empty += captions.count("")
    if empty:
        note(f"{path}: {empty} empty captions were left out")
    stated = assign_splits(rows)
    present = ", ".join(sorted(map(str, stated))) or "none"
    loaded = []
    for split in splits:
        captioned = [row for row in rows if row.split == split and row.captions]
        instances = [Instance(row.id, row.images, row.captions) for row in captioned]
        expect(instances, path, f"no captioned images in split {split!r}; it has {present}")
        missing = [x.images[0] for x in instances if not os.path.isfile(x.images[0])]
        if missing:
            raise DataError(f"{missing[0]}: no such picture ({len(missing)} of {len(instances)} in split "
                            f"{split}); put the photos under {root}")
        loaded.append((instances, {}))
    return loaded


# ---------------------------------------------------------------- published sets: shapes

def text2shape(root, split):
    """Chen et al. 2018, "Text2Shape", arXiv 1803.08495: chairs and tables of ShapeNet as coloured voxels,
    about five descriptions each. Relevance: the same shape. Labels: category.

    Reads captions.tablechair.csv, <folder>/<modelId>/<modelId>.nrrd, and where present
    processed_captions_{train,val,test}.p (the published split; else 80/10/10 by a hash of modelId) and
    views/<modelId>/*.png (used instead of rendering).
    """
    path = os.path.join(root, CAPTION_FILE)
    expect(os.path.isfile(path), root, f"no {CAPTION_FILE} there; without --no-download (data.load: with "
           f"download=True) it is fetched; or {text2shape_by_hand(root)}")
    header, lines = read_table(path, ("modelId", "description", "category"))
    captions = defaultdict(list)
    category = {}
    empty = 0
    for _, cells in lines:
        cell = defaultdict(str, zip(header, cells))  # a short line lacks its last cells
        if cell["modelId"] and cell["description"].strip():
            captions[cell["modelId"]].append(cell["description"].strip())
            category[cell["modelId"]] = cell["category"]
        else:
            empty += 1
    if empty:
        note(f"{path}: {empty} rows without a description or a model were left out")

    published = _published_split(root)
    unstated = "none" if published else None
    rows = [Row(model, published.get(model, unstated), [], captions[model]) for model in sorted(captions)]
    assign_splits(rows)
    categories = sorted(set(category.values()))
    instances = []
    missing = 0
    for row in [row for row in rows if row.split == split]:
        folder = os.path.join(root, "views", row.id)
        voxels = os.path.join(root, VOXEL_FOLDER, row.id, row.id + ".nrrd")
        views = [os.path.join(folder, name) for name in list_folder(folder, (".png",))]
        if not views and os.path.isfile(voxels):
            views = [VoxelView(voxels, k) for k in range(VIEWS)]
        if views:
            labels = {"category": categories.index(category[row.id])}
            instances.append(Instance(row.id, views, row.captions, labels))
        else:
            missing += 1
    if missing:
        note(f"{root}: {missing} shapes of split {split} have captions but no voxels under {VOXEL_FOLDER}; "
             "they were left out")
    expect(instances, root, f"no shapes in split {split!r} (of train, val, test; {missing} lack voxels); "
           f"expected {VOXEL_FOLDER}/<modelId>/<modelId>.nrrd; {text2shape_by_hand(root)}")
    return instances, {"category": categories}


def _published_split(root):
    """{modelId: split} from processed_captions_*.p, or {} where there are none."""
    published = {}
    for split in ("train", "val", "test"):
        path = os.path.join(root, f"processed_captions_{split}.p")
        if os.path.isfile(path):
            try:
                for caption in read_pickle(path)["caption_tuples"]:  # (token ids, category, modelId)
                    if not isinstance(caption[2], str):
                        raise TypeError("a model's id is no string")
                    published[caption[2]] = split
            except (KeyError, IndexError, TypeError):
                raise DataError(f"{path}: no 'caption_tuples' of (tokens, category, modelId); "
                                "expected the published pickle of Text2Shape") from None
    present = sorted(set(published.values()))
    expect(len(present) in (0, 3), root,
           f"processed_captions_*.p only for {', '.join(present)}; put all three there, or none")
    return published


# ---------------------------------------------------------------- published sets: labelled

def _labelled(root, split, rows, tasks, read=None):
    """-> (instances of the split, classes). read: reads captions from the file that stands in their place.
    Rows without a picture or a text are left out and counted; a class that train lacks is unlabelled."""
    stated = assign_splits(rows)
    names = train_names(rows)
    classes = {task: sorted(set(names[task])) for task in tasks}
    instances = []
    missing = 0
    for row in [row for row in rows if row.split == split]:
        captions = row.captions
        if read:
            captions = read(row.captions) if os.path.isfile(row.captions) else []
        captions = [caption.strip() for caption in captions if caption.strip()]
        if not captions or not all(callable(image) or os.path.isfile(image) for image in row.images):
            missing += 1
            continue
        instances.append(Instance(row.id, row.images, captions, row.labels, row.group))
    if missing:
        note(f"{root}: {missing} rows of split {split} have no picture or no text; they were left out")
    number_labels(instances, classes, root, split)
    present = ", ".join(sorted(stated)) or "none"
    expect(instances, root, f"nothing in split {split!r} ({missing} rows lack a picture or a text); "
           f"it has {present}. README.md shows the layout")
    return instances, classes


def products(root, split):
    """Kaggle's Fashion Product Images: styles.csv and images/<id>.jpg. A picture, a title and seven tasks;
    80/10/10 by a hash of the id. Commas in a title are not quoted: what is past the last column is title."""
    path = os.path.join(root, "styles.csv")
    header, lines = read_table(path, ("id", "productDisplayName"))
    expect(header[0] == "id" and header[-1] == "productDisplayName", f"{path} line 1",
           f"expected columns id, ..., productDisplayName, in this order; it has {', '.join(header)[:200]}")
    tasks = [column for column in header[1:-1] if column != "year"]
    rows = []
    for where, cells in lines:
        expect(len(cells) >= len(header), where, f"{len(cells)} cells under {len(header)} columns")
        cell = dict(zip(header, cells))
        title = ",".join(cells[len(header) - 1:])
        labels = {task: cell[task] for task in tasks if cell[task] not in ("", "NA")}
        picture = os.path.join(root, "images", cell["id"] + ".jpg")
        rows.append(Row(cell["id"], None, [picture], [title], labels))
    return _labelled(root, split, rows, tasks)


def wikipedia(root, split):
    """Rasiwasia et al. 2010: {train,test}set_txt_img_cat.list (text id, image id, category from 1),
    categories.list, images/<category>/<id>.jpg, texts/<id>.xml. 2,173 / 693, val out of train. Relevance: the
    category."""
    names = [name for (name,) in read_list(os.path.join(root, "categories.list"), 1)]
    rows = []
    for part in ("train", "test"):
        for text, image, category in read_list(os.path.join(root, f"{part}set_txt_img_cat.list"), 3):
            valid = re.fullmatch("[0-9]{1,3}", category) and 1 <= int(category) <= len(names)
            expect(valid, root, f"category {category[:20]!r} of text {text[:40]!r}; "
                   f"categories.list names {len(names)}, counted from 1")
            name = names[int(category) - 1]
            picture = os.path.join(root, "images", name, image + ".jpg")
            captions = os.path.join(root, "texts", text + ".xml")
            rows.append(Row(f"{image}-{text}", part, [picture], captions, {"category": name}, group=name))

    def read(file):
        xml = read_text(file)
        texts = []
        for part in xml.split("</text>")[:-1]:
            start = part.find("<text")
            end = part.find(">", start)
            if 0 <= start < end:
                texts.append(part[end + 1:])
        return [" ".join(html.unescape(_without_tags(text)).split()) for text in texts or [xml]]

    return _labelled(root, split, rows, ["category"], read)


def _without_tags(text):
    end = text.rfind(">") + 1  # past it, every "<" would be followed to the end of the text in vain
    return re.sub(r"<[^>]*>", " ", text[:end]) + text[end:]


def pascal_sentence(root, split):
    """Rashtchian et al. 2010: dataset/<class>/<id>.jpg, sentence/<class>/<id>.txt (five lines). 20 classes of
    50, by name 40 / 5 / 5 of each. Relevance: the class."""
    rows = []
    for name in list_folder(os.path.join(root, "dataset")):
        files = list_folder(os.path.join(root, "dataset", name))
        for i, file in enumerate(files):
            part = TENTHS[10 * i // len(files)]
            picture = os.path.join(root, "dataset", name, file)
            captions = os.path.join(root, "sentence", name, os.path.splitext(file)[0] + ".txt")
            rows.append(Row(f"{name}/{file}", part, [picture], captions, {"class": name}, group=name))
    return _labelled(root, split, rows, ["class"], lambda file: read_text(file).splitlines())


def id_label_lists(root, split):
    """NUS-WIDE and XMediaNet as CLIP4CMR's authors lay them out: split/{train,valid,test}.txt (id:label),
    images/<id>.jpg, text/<id>.json (a string). Relevance: the label."""
    rows = []
    for part, file in (("train", "train.txt"), ("val", "valid.txt"), ("test", "test.txt")):
        for id, label in read_list(os.path.join(root, "split", file), 2, ":"):
            picture = os.path.join(root, "images", id + ".jpg")
            captions = os.path.join(root, "text", id + ".json")
            rows.append(Row(id, part, [picture], captions, {"label": label}, group=label))

    def read(file):
        return [parse_json(read_text(file), file, str, "a JSON string: the text of one image")]

    return _labelled(root, split, rows, ["label"], read)


def food101(root, split):
    """UPMC-Food101 (Wang et al. 2015): images/{train,test}/<class>/<file>, texts/{train,test}_titles.csv
    (file, title, class; no header). 101 classes, val out of train. Relevance: the class."""
    rows = []
    for part in ("train", "test"):
        for where, cells in read_cells(os.path.join(root, "texts", part + "_titles.csv")):
            expect(len(cells) >= 3, where, f"{len(cells)} cells, expected file, title, class")
            file, *title, name = cells  # a title's own commas may be unquoted
            picture = os.path.join(root, "images", part, name, file)
            rows.append(Row(file, part, [picture], [",".join(title)], {"class": name}, group=name))
    return _labelled(root, split, rows, ["class"])


def fashiongen(root, split):
    """Fashion-Gen (Rostamzadeh et al. 2018, arXiv 1806.08317): fashiongen_256_256_{train,validation}.h5, read
    with h5py. The views of one product are one instance, its name and description the caption; val out of
    train, test is the validation file. Relevance: the category."""
    try:
        import h5py
    except ImportError:
        raise DataError("fashiongen is read with h5py, which is not installed; pip install h5py") from None
    files = {"train": "fashiongen_256_256_train.h5"}
    if split == "test":
        files["test"] = "fashiongen_256_256_validation.h5"
    rows = []
    for part, file in files.items():
        path = os.path.join(root, file)
        try:
            with h5py.File(path, "r") as f:
                columns = ("productID", "name", "description", "category")
                check_unpacked(path, sum(f[f"input_{key}"].nbytes for key in columns))
                ids = f["input_productID"][:].ravel().tolist()
                texts = {}
                for key in columns[1:]:
                    texts[key] = [text.decode("latin1") for text in f[f"input_{key}"][:].ravel()]
                pictures, *shape = f["input_image"].shape
                kind = f["input_image"].dtype
        except DataError:
            raise
        except Exception as e:  # a damaged file raises nearly any kind
            raise DataError(f"{path}: cannot be read as Fashion-Gen ({str(e)[:100]}); "
                            "put the published file there") from None
        for key, several in texts.items():
            expect(len(several) == len(ids), path,
                   f"{len(several)} entries of input_{key} for {len(ids)} products; get it again")
        expect(pictures == len(ids), path, f"{pictures} pictures of {len(ids)} products; get it again")
        expect(len(shape) == 3 and shape[2] == 3 and max(shape) <= 4096 and kind == np.uint8, path,
               f"pictures of {kind} of shape {shape}; expected uint8 of (height, width, 3)")
        products = {}
        for k, id in enumerate(ids):
            category = texts["category"][k]
            caption = f"{texts['name'][k]}. {texts['description'][k]}"
            row = Row(str(id), part, [], [caption], {"category": category}, group=category)
            products.setdefault(id, row).images.append(H5View(path, k))
        rows += products.values()
    return _labelled(root, split, rows, ["category"])


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
        try:
            image = _h5_images(self.file, os.getpid())[self.row]
        except Exception as e:  # what is damaged may only show here
            raise DataError(f"{self.file}: picture {self.row} cannot be read ({str(e)[:100]})") from None
        return Image.fromarray(square(Image.fromarray(image), size))


# ---------------------------------------------------------------- published sets: videos

def _videos(root, split, rows, paragraph=False):
    """-> (instances of the split, {}). A video's images are frames/<video>/*.jpg (or .png) in name order;
    paragraph: its captions become one. Videos without frames or captions are left out, counted and named."""
    assign_splits(rows)
    instances = []
    missing = []
    for row in [row for row in rows if row.split == split]:
        folder = os.path.join(root, "frames", row.id)
        frames = [os.path.join(folder, name) for name in list_folder(folder, (".jpg", ".jpeg", ".png"))]
        captions = [" ".join(caption.split()) for caption in row.captions if caption.strip()]
        if not frames or not captions:
            missing.append(row.id)
            continue
        instances.append(Instance(row.id, frames, [" ".join(captions)] if paragraph else captions))
    if missing:
        more = ", ..." if len(missing) > 10 else ""
        note(f"{root}: {len(missing)} videos of split {split} have no frames under frames/<video>/ or no "
             f"caption, and were left out: {', '.join(missing[:10])}{more}")
    expect(instances, root, f"no video of split {split!r} has frames ({len(missing)} lack them); "
           "make them with ffmpeg, as README.md shows")
    return instances, {}


def msrvtt(root, split):
    """MSR-VTT (Xu et al. 2016), the 1k-A split: MSRVTT_data.json (sentences[]: video_id, caption),
    MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv (video_id, sentence). 9,000 training videos of 20 captions,
    val out of them; 1,000 test videos of one sentence each."""
    path = os.path.join(root, "MSRVTT_data.json")
    shape = {"sentences": [{"video_id": str, "caption": str}]}
    content = read_json(path, shape, "MSR-VTT's {sentences: [{video_id, caption}]}")
    captions = defaultdict(list)
    for sentence in content["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"])
    rows = []
    for part, file, columns in (("train", "MSRVTT_train.9k.csv", ["video_id"]),
                                ("test", "MSRVTT_JSFUSION_test.csv", ["video_id", "sentence"])):
        header, lines = read_table(os.path.join(root, file), columns)
        for where, cells in lines:
            expect(len(cells) >= len(header), where, f"{len(cells)} cells under {len(header)} columns")
            cell = dict(zip(header, cells))
            video = cell["video_id"]
            rows.append(Row(video, part, [], [cell["sentence"]] if part == "test" else captions[video]))
    return _videos(root, split, rows)


def msvd(root, split):
    """MSVD (Chen and Dolan 2011): {train,val,test}_list.txt, raw-captions.pkl ({video: [[word, ...], ...]}),
    about 40 captions to a video."""
    path = os.path.join(root, "raw-captions.pkl")
    captions = read_pickle(path)
    expect(fits(captions, {str: (list, tuple)}), path, "not a dict of lists of captions; get it again")
    size = os.path.getsize(path)  # a pickle can hold a list of words many times over, for a byte or two each
    fitting = sum(map(len, captions.values())) <= size
    if fitting:
        every = [x for video in captions.values() for x in video]
        fitting = sum(len(x) for x in every if isinstance(x, (list, tuple))) <= size
    expect(fitting, path, "it repeats its captions too often; get it again")

    def sentence(caption):
        words = caption if isinstance(caption, (list, tuple)) else [caption]
        expect(all(isinstance(word, (str, int, float)) for word in words), path,
               "a caption that is no list of words; get it again")
        return " ".join(map(str, words))

    rows = []
    for part in ("train", "val", "test"):
        for (video,) in read_list(os.path.join(root, part + "_list.txt"), 1):
            rows.append(Row(video, part, [], [sentence(caption) for caption in captions.get(video, ())]))
    return _videos(root, split, rows)


def didemo(root, split):
    """DiDeMo (Hendricks et al. 2017): {train,val,test}_data.json ([{video, description}]), {..}_list.txt. A
    video's descriptions are one paragraph."""
    rows = []
    for part in ("train", "val", "test"):
        path = os.path.join(root, part + "_data.json")
        content = read_json(path, [{"video": str, "description": str}], "DiDeMo's [{video, description}]")
        captions = defaultdict(list)
        for moment in content:
            captions[os.path.splitext(moment["video"])[0]].append(moment["description"])
        for (file,) in read_list(os.path.join(root, part + "_list.txt"), 1):
            video = os.path.splitext(file)[0]
            rows.append(Row(video, part, [], captions[video]))
    return _videos(root, split, rows, paragraph=True)


def activitynet(root, split):
    """ActivityNet Captions (Krishna et al. 2017): train.json, val_1.json ({id: {sentences, timestamps}}),
    train_ids.json, val_ids.json. Test is val_1, val is out of train. A video's sentences are one paragraph.
    Ids carry the prefix v_, with or without which captions and frames are looked for."""
    rows = []
    files = (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json"))
    for part, file, ids in files:
        path = os.path.join(root, file)
        content = read_json(path, {str: {"sentences": [str]}}, "ActivityNet's {id: {sentences: [...]}}")
        for id in read_json(os.path.join(root, ids), [str], "a list of ids"):
            names = (id, "v_" + id.removeprefix("v_"), id.removeprefix("v_"))
            captions = next((content[name]["sentences"] for name in names if name in content), [])
            video = next((name for name in names if os.path.isdir(os.path.join(root, "frames", name))), id)
            rows.append(Row(video, part, [], captions))
    return _videos(root, split, rows, paragraph=True)


# ---------------------------------------------------------------- pickles

def _bytes(content):
    return content.encode("latin1") if isinstance(content, str) else content  # Python 2's strings


class _Array(np.ndarray):
    """An array while it is read. numpy's own would trust the pickle's type, whose flags can pass bytes off as
    pointers to objects."""

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        if kind.code[0] == "O":
            right = isinstance(content, list) and len(content) == math.prod(shape)
        else:
            right = not isinstance(content, list)  # numpy compares the length of bytes
        if not right:
            raise ValueError("an array whose content is not of its type or size")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), _bytes(content)))


class _Type:
    """A type while it is read: its code and byte order are taken from the pickle, its flags are not."""

    def __init__(self, code):
        if not re.fullmatch(r"[?biufcSU]\d{0,6}|O8?", code) or not np.dtype(code).itemsize:
            raise ValueError(f"an array of type {code[:20]!r}")
        self.code = code
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = np.dtype(self.code).newbyteorder(state[1])


def _admitted():
    """What stands for the names in pickles of numpy arrays and plain containers; it can only build a value."""
    def frombuffer(content, kind, shape, order):
        return np.frombuffer(content, kind.dtype).reshape(shape, order=order)

    plain = {
        "bytes": lambda: b"",  # protocol 2 has no bytes
        "set": lambda items=(): set(items),
        "list": lambda: [],  # what a defaultdict holds where it has nothing
        "dict": lambda: {},
        "int": lambda: 0,
        "float": lambda: 0.0}
    admitted = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): lambda code, *flags: _Type(code),
        ("numpy", "_reconstruct"): lambda *empty: _Array(0, np.int8),  # what it is follows as its state
        ("numpy", "_frombuffer"): frombuffer,
        ("numpy", "scalar"): lambda kind, content: np.frombuffer(_bytes(content), kind.dtype)[0],
        ("_codecs", "encode"): lambda text, encoding: _bytes(text),
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): lambda factory=None: defaultdict(factory)}
    for module in ("builtins", "__builtin__"):  # Python 3's name and Python 2's
        admitted |= {(module, name): value for name, value in plain.items()}
    return admitted


def read_pickle(path):
    """A pickle of numpy arrays and plain containers (Python 2's too). Anything else is refused, not run."""
    advice = "give a pickle of arrays and plain containers; nothing of it was run"
    with clip.reading(path, advice, DataError), open(path, "rb") as f:
        return clip.RestrictedUnpickler(f, _admitted(), encoding="latin1").load()


# ---------------------------------------------------------------- downloads

TEXT2SHAPE_URL = "http://text2shape.stanford.edu/dataset"
CAPTION_FILE = "captions.tablechair.csv"
VOXEL_FOLDER = "nrrd_256_filter_div_32_solid"
SPLIT_FILES = [f"processed_captions_{split}.p" for split in ("train", "val", "test")]
TEXT2SHAPE_FILES = [  # (path below the URL, what it leaves in the folder, what its beginning holds)
    (f"shapenet/{VOXEL_FOLDER}.zip", VOXEL_FOLDER, b"PK"),
    ("text2shape-data.zip", SPLIT_FILES[-1], b"PK"),
    (CAPTION_FILE, CAPTION_FILE, b"modelId"),  # the last: where it is, nothing before it is missing
]


def text2shape_by_hand(root):
    """What to do where Text2Shape cannot be fetched."""
    voxels, splits, captions = [os.path.basename(path) for path, _, _ in TEXT2SHAPE_FILES]
    return (f"put {voxels} (of {TEXT2SHAPE_URL}/shapenet), {splits} and {captions} (of {TEXT2SHAPE_URL}) "
            f"into {root} by hand and run without --no-download, which unpacks them")


def fetch_missing(name, root=None):
    """Fetch a data set into its folder (default data/<name>) where it is not there and that is possible: of
    the known ones only text2shape. A folder with captions and with voxels or views is taken as it is, also
    without the published split. Raises DataError where it cannot be fetched."""
    if name != "text2shape":
        return
    root = root or os.path.join("data", name)
    names = {*list_folder(root)}
    archives = [os.path.basename(path) for path, _, _ in TEXT2SHAPE_FILES if path.endswith(".zip")]
    if CAPTION_FILE in names and names & {VOXEL_FOLDER, "views"} and not names.intersection(archives):
        return
    note(f"{root}: Text2Shape is not there, or not all of it; fetching it from {TEXT2SHAPE_URL}: the voxels "
         "of 15,000 chairs and tables (at most 2 GB when unpacked), 75,000 descriptions and the published "
         "split (--no-download refuses)")
    for path, result, mark in TEXT2SHAPE_FILES:
        file = os.path.join(root, os.path.basename(path))
        if not os.path.exists(file) and os.path.exists(os.path.join(root, result)):
            continue
        if not os.path.exists(file):
            try:
                clip.fetch(f"{TEXT2SHAPE_URL}/{path}", file)
            except clip.DownloadError as e:
                raise DataError(f"{e}; {text2shape_by_hand(root)}") from None
            with open(file, "rb") as f:
                start = f.read(4096)
            if mark not in start:  # some error page
                os.unlink(file)
                raise DataError(f"{TEXT2SHAPE_URL}/{path}: the server sent something else; "
                                f"{text2shape_by_hand(root)}")
        if file.endswith(".zip"):  # removed when all is unpacked, so one that is there still has to be
            unpack(file, root)
            os.unlink(file)


def unpack(archive, root):
    """Unpack voxels and splits of a zip: only names of the published layout, never outside `root`."""
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
                    raise DataError(f"{archive}: {info.filename!r} is no name or size of the published "
                                    "archive; nothing was unpacked, delete it")
            if not targets:
                raise zipfile.BadZipFile("it holds no voxels and no splits")
            damaged = z.testzip()  # all is verified before anything is written, so what is there is right
            if damaged:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            for info, target in targets.items():
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with z.open(info) as source, open(target + ".part", "wb") as f:
                    shutil.copyfileobj(source, f)
                os.replace(target + ".part", target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:  # RuntimeError: encrypted
        os.unlink(archive)
        raise DataError(f"{archive}: damaged ({e}); it was removed, run the command again") from None
    except OSError as e:
        raise DataError(f"{archive}: could not be unpacked ({e.strerror or e})") from None


# ---------------------------------------------------------------- voxels and their views

def read_nrrd(path):
    """A Text2Shape voxel file: uint8 (n, n, n, 4), axes x, y, z, RGBA. NRRD: header, blank line, data."""
    try:
        with open(path, "rb") as f:
            start = f.read(1 << 16)
            blank = re.search(rb"\r?\n\r?\n", start)
            expect(start.startswith(b"NRRD000") and blank, path, "not an NRRD file; get it again")
            n, encoding = _nrrd_header(path, start[:blank.start()].decode("latin1"))
            need = 4 * n ** 3
            f.seek(blank.end())
            body = f.read(need + (need >> 10) + (1 << 16))  # even what does not compress grows by less
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    if encoding != "raw":
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            body = unzip.decompress(body, need + 1)  # never more than the sizes promise
        except zlib.error as e:
            raise DataError(f"{path}: damaged gzip data ({e}); get the file again") from None
        expect(unzip.eof or len(body) != need, path,  # the checksum lies behind the last byte
               "the gzip data ends before its checksum; the file is truncated, get it again")
    expect(len(body) == need, path,
           f"holds {len(body)} bytes of voxels, its sizes need {need}; the file is truncated or wrong")
    voxels = np.frombuffer(body, np.uint8).reshape(n, n, n, 4)  # z, y, x: the first axis varies fastest
    return np.ascontiguousarray(voxels.transpose(2, 1, 0, 3))


def _nrrd_header(path, header):
    """-> (n, encoding) of the header of a file of n x n x n voxels."""
    fields = {}
    for line in header.split("\n"):
        name, _, value = line.partition(": ")  # a comment or a key:=value has no such name
        fields[name.strip().lower()] = value.strip()[:100]
    expect("data file" not in fields and "datafile" not in fields, path,
           "its voxels are in another file (the header names a data file); expected both in one")
    kind = fields.get("type", "?")
    expect(kind.lower() in ("uint8", "unsigned char", "uchar", "uint8_t"), path,
           f"type {kind}; expected uint8 RGBA voxels")
    sizes = fields.get("sizes", "?").split()
    n = int(sizes[1]) if len(sizes) == 4 and re.fullmatch("[0-9]{1,3}", sizes[1]) else 0
    expect(1 <= n <= 512 and sizes == ["4", str(n), str(n), str(n)], path,
           f"sizes {' '.join(sizes)}; expected 4 n n n (channel, x, y, z), n up to 512")
    encoding = fields.get("encoding", "?").lower()
    expect(encoding in ("gzip", "gz", "raw"), path, f"encoding {encoding}; expected gzip or raw")
    return n, encoding


VIEWS = 12  # a turntable: one view every 30 degrees,
ELEVATION = 30.0  # seen from 30 degrees above
LIGHT = np.array([-0.45, 0.6, 0.66])  # unit vector to the light: the camera's right, up, towards the viewer


@lru_cache(maxsize=2 * VIEWS)  # one size for the model, one for pictures
def _rays(grid, size, view):
    """Where the pixels' rays run through the grid, pixel by pixel and front to back, int32 (points,) each:
    the pixel, the depth step, and the flat index of the voxel.

    An orthographic view is no more than this table. The window is sqrt(2) of the grid's side wide, so that a
    turning grid fits from left to right; of a full grid the uppermost and lowest corners, up to a fifteenth
    of the side, lie outside.
    """
    azimuth = math.radians(view * 360 / VIEWS)
    elevation = math.radians(ELEVATION)
    level = math.cos(elevation)
    right = np.array([math.cos(azimuth), 0, -math.sin(azimuth)])
    back = -np.array([math.sin(azimuth) * level, math.sin(elevation), math.cos(azimuth) * level])
    up = np.cross(right, back)
    window = math.sqrt(2) * grid
    steps = math.ceil(math.sqrt(3) * grid)
    pixel = ((np.arange(size) + 0.5) / size - 0.5) * window
    depth = np.arange(steps) - (steps - 1) / 2
    across = pixel[None, :, None, None] * right
    down = pixel[:, None, None, None] * up
    points = (across - down + depth[:, None] * back) + grid / 2  # (row, column, step, xyz)
    voxel = np.floor(points).astype(np.int64)
    inside = ((voxel >= 0) & (voxel < grid)).all(-1)
    flat = (voxel[..., 0] * grid + voxel[..., 1]) * grid + voxel[..., 2]
    pixel, step = inside.reshape(size * size, steps).nonzero()
    return pixel.astype(np.int32), step.astype(np.int32), flat[inside].astype(np.int32)


def render(voxels, view, size):
    """One view of a voxel grid. voxels: uint8 (n, n, n, 4), x right, y up, z to the viewer at view 0 -> uint8
    (size, size, 3).

    Each pixel takes the first voxel of its ray with alpha over 127, shaded by the normal of the depth map;
    white where none is.
    """
    grid = voxels.shape[0]
    expect(voxels.shape == (grid, grid, grid, 4), f"voxels of shape {voxels.shape}", "expected (n, n, n, 4)")
    pixel, step, voxel = _rays(grid, size, view)
    solid = (voxels[..., 3].ravel() > 127).take(voxel).nonzero()[0]  # the points in solid voxels
    image = np.full((size * size, 3), 255, np.uint8)
    if len(solid):
        first = solid[np.diff(pixel[solid], prepend=-1) > 0]  # the nearest in each pixel that has one
        hit = pixel[first]
        depth = np.full(size * size, step[first].max() + 1, np.float32)
        depth[hit] = step[first]
        depth = depth.reshape(size, size)
        scale = size / (math.sqrt(2) * grid)  # pixels per voxel: the slope is the surface's at any image size
        down, across = np.gradient(depth * scale) if size > 1 else np.zeros((2, 1, 1))
        normal = np.stack([across, -down, np.ones_like(depth)], -1).reshape(-1, 3)[hit]
        cosine = normal @ LIGHT.astype(np.float32) / np.linalg.norm(normal, axis=1)
        shade = 0.55 + 0.45 * np.clip(cosine, 0, 1)
        colour = voxels.reshape(-1, 4)[voxel[first], :3]
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

SHAPES = {
    "cuboid": ("cuboid", "box", "block"),
    "ellipsoid": ("ellipsoid", "ball", "egg"),
    "cylinder": ("cylinder", "drum", "tube"),
    "cone": ("cone", "funnel"),
    "pyramid": ("pyramid", "spire"),
    "torus": ("torus", "ring", "donut"),
}
COLOURS = {
    "red": (214, 36, 36), "orange": (244, 132, 24), "yellow": (240, 218, 48), "green": (44, 150, 52),
    "teal": (16, 128, 132), "cyan": (72, 208, 232), "blue": (40, 84, 220), "navy": (20, 28, 104),
    "purple": (124, 40, 168), "pink": (244, 128, 188), "brown": (120, 72, 32), "white": (232, 232, 232),
    "gray": (132, 132, 132), "black": (26, 26, 26),
}
HEIGHTS = {"short": ("short", "low"), "medium": ("of medium height",), "tall": ("tall", "high")}
WIDTHS = {"narrow": ("narrow", "slim"), "medium": ("of medium width",), "wide": ("wide", "broad")}
TASKS = {"shape": SHAPES, "color": COLOURS, "height": HEIGHTS, "width": WIDTHS}
FRACTIONS = (0.30, 0.57, 0.86)  # of the grid's side, for the three heights and the three widths
JITTER = 0.05  # +- of the grid's side
COLOUR_JITTER = 14  # +- levels of 256
GRID = 32
CONFIGURATIONS = 6 * 14 * 3 * 3
CAPTIONS = 5
PRIMITIVES_SEED = 2018


def _configuration(number):
    """0..755 -> indices of (shape, colour, height, width)."""
    number, width = divmod(number, 3)
    number, height = divmod(number, 3)
    shape, colour = divmod(number, 14)
    return shape, colour, height, width


def _solid(shape, h, w):
    """bool (32, 32, 32): the voxels of a shape of half height h and half width w."""
    axis = np.arange(GRID) - (GRID - 1) / 2
    x = np.abs(axis)[:, None, None]
    y = axis[None, :, None]
    z = np.abs(axis)[None, None, :]
    r = np.sqrt(x ** 2 + z ** 2)
    between = abs(y) <= h
    taper = w * np.clip((h - y) / (2 * h), 0, 1)  # half width at height y of what comes to a point
    if shape == "cuboid":
        return (x <= w) & (z <= w) & between
    if shape == "ellipsoid":
        return (r / w) ** 2 + (y / h) ** 2 <= 1
    if shape == "cylinder":
        return (r <= w) & between
    if shape == "cone":
        return (r <= taper) & between
    if shape == "pyramid":
        return (x <= taper) & (z <= taper) & between
    return ((r - 0.68 * w) / (0.32 * w)) ** 2 + (y / h) ** 2 <= 1  # torus


@lru_cache(maxsize=16)
def primitive_voxels(number, sample):
    """uint8 (32, 32, 32, 4): the voxels of one sample of a configuration, its size and colour perturbed."""
    shape, colour, height, width = _configuration(number)
    rng = np.random.default_rng([PRIMITIVES_SEED, number, sample])
    h = GRID / 2 * (FRACTIONS[height] + rng.uniform(-JITTER, JITTER))
    w = GRID / 2 * (FRACTIONS[width] + rng.uniform(-JITTER, JITTER))
    rgb = np.array(list(COLOURS.values())[colour]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    rgba = np.array([*np.clip(rgb, 0, 255), 255]).astype(np.uint8)
    four_bytes = _solid(list(SHAPES)[shape], h, w) * rgba.view(np.uint32)
    return four_bytes.view(np.uint8).reshape(GRID, GRID, GRID, 4)


def primitive_caption(number, sample, k):
    """-> (caption k of a sample, its stated attributes: indices of TASKS). Three in ten state all four
    attributes, four in ten leave one out, three in ten two: sizes are left out more often than shape or
    colour, as in people's captions."""
    rng = np.random.default_rng([PRIMITIVES_SEED + 1, number, sample, k])
    left_out = rng.choice(4, rng.choice(3, p=(0.3, 0.4, 0.3)), replace=False, p=(0.15, 0.15, 0.35, 0.35))
    word = {}
    for i, (task, value) in enumerate(zip(TASKS, _configuration(number))):
        words = [list(COLOURS)[value]] if task == "color" else list(TASKS[task].values())[value]
        word[task] = "" if i in left_out else words[rng.integers(len(words))]
    noun = word["shape"] or ("object", "thing", "shape")[rng.integers(3)]
    sizes = [word[task] for task in ("height", "width") if word[task]]
    before = [size for size in sizes if "medium" not in size]
    after = [size for size in sizes if "medium" in size]
    rng.shuffle(before)
    colour = [word["color"]] if word["color"] else []
    template = rng.integers(4)
    if template == 0:
        words = ["a", *before, *colour, noun, " and ".join(after)]
    elif template == 1:
        words = ["the", noun, "is", " and ".join([*before, *colour, *after])]
    elif template == 2:
        stated = [*colour, *after, *before]
        words = [noun, "," if stated else "", " , ".join(stated)]
    else:
        words = ["there is a", *colour, noun, "that is" if sizes else "", " and ".join([*after, *before])]
    words = " ".join(words).split()
    for i, word_after in enumerate(words[1:]):
        if words[i] == "a" and word_after[0] in "aeio":
            words[i] = "an"
    return " ".join(words), frozenset(range(4)) - set(left_out.tolist())


@dataclass(frozen=True)
class PrimitiveView:
    """View number `view` of one sample of a configuration."""
    number: int
    sample: int
    view: int

    def __call__(self, size):
        return Image.fromarray(render(primitive_voxels(self.number, self.sample), self.view, size))


def _primitive(number, sample, query):
    views = [PrimitiveView(number, sample, view) for view in range(VIEWS)]
    captions = [primitive_caption(number, sample, k)[0] for k in range(CAPTIONS)]
    labels = dict(zip(TASKS, _configuration(number)))
    return Instance(f"{number:03d}-{sample}", views, captions, labels, f"{number:03d}", query)


def primitives(split, name="primitives"):
    """Text2Shape's primitives, made again from the published recipe: 6 solids x 14 colours x 9 sizes, 10
    samples of each. 12 views, 5 captions. Relevance: the same configuration.

    primitives: train (4,032), val (504), test (504) are samples 0-7, 8, 9 of 504 configurations. unseen is
    sample 9 of the 252 configurations of 28 shape-colour pairs that training never shows, searched for among
    all 756, so that a model which has learned pairs rather than attributes finds what it knows instead.

    The same shapes cut in two, to carry a model from one part to the other. primitives-source: 4 solids in 10
    colours, 360 configurations, samples as above. primitives-target: the 396 configurations of the other two
    solids or the other four colours, with sample 0 alone to learn from.
    """
    samples = {"train": (0,) if name == "primitives-target" else range(8), "val": (8,), "test": (9,)}
    if name == "primitives":
        samples["unseen"] = (9,)
    expect(split in samples, name, f"no split {split!r}; it has {', '.join(samples)}")
    instances = []
    for number in range(CONFIGURATIONS):
        shape, colour, _, _ = _configuration(number)
        held_out = shape % 3 == colour % 3  # two of the six shapes of every colour: 252 configurations
        part = "primitives-source" if shape < 4 and colour < 10 else "primitives-target"
        if name == part or name == "primitives" and (split == "unseen" or not held_out):
            query = held_out or split != "unseen"
            instances += [_primitive(number, sample, query) for sample in samples[split]]
    return instances, {task: list(values) for task, values in TASKS.items()}


def primitives_stated(instance):
    """What each caption of a built-in shape states: a list of sets of attributes, as indices of TASKS."""
    number, sample = (int(part) for part in instance.id.split("-"))
    return [primitive_caption(number, sample, k)[1] for k in range(len(instance.captions))]


def primitives_oracle(instances):
    """float32 (captions, instances): how probable each instance is, to an oracle that reads every attribute a
    caption states.

    A caption that leaves attributes out fits several configurations alike, so even the oracle's first answer
    is often wrong: its score is the ceiling of every model.
    """
    values = np.array([list(x.labels.values()) for x in instances])  # (N, 4)
    scores = np.zeros((sum(len(x.captions) for x in instances), len(instances)), np.float32)
    row = 0
    for x, value in zip(instances, values):
        for attributes in primitives_stated(x):
            stated = list(attributes)
            fit = (values[:, stated] == value[stated]).all(1)
            scores[row] = fit / fit.sum()
            row += 1
    return torch.from_numpy(scores)


def attribute_terms(instances):
    """-> (the attributes that each caption states, the attributes of each instance) of the built-in shapes.

    Both are lists of sorted lists of terms (task, class); a caption fits the instances that have all its
    terms.
    """
    of_captions = []
    of_instances = []
    for x in instances:
        terms = list(x.labels.items())
        of_captions += [sorted(terms[i] for i in stated) for stated in primitives_stated(x)]
        of_instances.append(sorted(terms))
    return of_captions, of_instances


def word_terms(instances):
    """-> (the words of each caption, the words that the captions of each instance contain), each once.

    Both are lists of sorted lists, in lower case and without punctuation. A caption without a word is a term
    of its own.
    """
    of_captions = []
    of_instances = []
    for x in instances:
        words = []
        for caption in x.captions:
            of_caption = re.findall(r"\w+", caption.lower())
            words.append(set(map(sys.intern, of_caption)) or {caption})  # one string for all captions' "the"
        of_captions += [sorted(of_caption) for of_caption in words]
        of_instances.append(sorted(set.union(*words)))
    return of_captions, of_instances


# ---------------------------------------------------------------- features in place of pictures and texts

FEATURE_KEYS = ("label", "image", "text", "ids")  # the label first: the others must have as many rows


@dataclass
class Features:
    """What frozen encoders make of a split."""
    images: np.ndarray  # float32 (A, Di): all views of all instances, in order; or MappedRows
    texts: np.ndarray  # float32 (C, Dt): all captions of all instances; or MappedRows
    views: np.ndarray  # (N,): how many rows of images each instance has
    captions: np.ndarray  # (N,)
    labels: np.ndarray  # int64 (N,)
    query: np.ndarray  # bool (N,): False: only searched

    @property
    def layout(self):
        """As `class_layout` of instances."""
        return self.labels, self.captions, self.query


class MappedRows:
    """Some rows of a memory-mapped array (N, D): those of the numbers `rows`. They are read from disk when
    they are asked for."""

    def __init__(self, array, rows):
        self.array = array
        self.rows = rows
        self.shape = (len(rows), array.shape[1])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.array[self.rows[index]]


def read_features(path):
    """Features in place of pictures and texts: a .npz, or a pickle as CLIP4CMR's, of a dict with image (N,
    Di), text (N, Dt), label (N,) and optional ids (N,; default: row numbers); or a folder of image.npy,
    text.npy, ..., which are memory-mapped. -> the same dict, features float32. Raises DataError where they do
    not fit together."""
    try:
        if path.endswith((".pkl", ".p", ".pickle")):
            content = read_pickle(path)
            size = os.path.getsize(path)
            arrays = {key: _array(content[key], size) for key in FEATURE_KEYS if key in content}
        elif os.path.isdir(path) and not path.endswith(".npz"):
            files = {key: os.path.join(path, key + ".npy") for key in FEATURE_KEYS}
            files = {key: file for key, file in files.items() if os.path.exists(file)}
            arrays = {key: np.load(file, mmap_mode="r", allow_pickle=False) for key, file in files.items()}
        else:
            with np.load(path, allow_pickle=False) as content:
                check_unpacked(path, sum(info.file_size for info in content.zip.infolist()))
                arrays = {key: np.asarray(content[key]) for key in FEATURE_KEYS if key in content.files}
    except DataError:
        raise
    except OSError as e:
        reason = e.strerror or e
        raise DataError(f"{path}: cannot be read ({reason}); --features names files under --root") from None
    except Exception as e:  # a damaged file raises nearly any kind
        raise DataError(f"{path}: no features ({str(e)[:100]}); "
                        "expected a .npz or .pkl with image, text, label and ids") from None
    absent = ", ".join(key for key in ("image", "text", "label") if key not in arrays)
    expect(not absent, path, f"no {absent} in it; "
           "features need image (N, Di), text (N, Dt), label (N,) and optionally ids (N,)")
    arrays.setdefault("ids", np.arange(arrays["label"].size))
    for key in FEATURE_KEYS:
        convert = _numbers if key in ("image", "text") else _names
        arrays[key] = convert(path, key, arrays[key])
        rows = len(arrays[key])
        labels = len(arrays["label"])
        expect(rows == labels, path, f"{rows} rows of {key}, but {labels} labels; a row needs all of them")
    return arrays


CONTAINERS = (list, tuple, dict, set, frozenset, np.ndarray)


def _array(value, size):
    """np.asarray of what stands in a pickle of `size` bytes: an array, a list, or a list of rows.

    A list can hold the same row, or the same text, many times over, for a byte or two each. Raises ValueError
    for more values than bytes, and for more than rows of values.
    """
    if not isinstance(value, (list, tuple)):
        return np.asarray(value)
    rows = [row if isinstance(row, CONTAINERS) else [row] for row in value]
    if sum(row.size if isinstance(row, np.ndarray) else len(row) for row in rows) > size:
        raise ValueError("more values than bytes")
    values = [x for row in rows if not isinstance(row, np.ndarray) for x in row]
    if any(isinstance(x, CONTAINERS) for x in values):
        raise ValueError("lists in lists of lists")
    texts = any(isinstance(x, (str, bytes)) for x in values)
    return np.array(value, object) if texts else np.asarray(value)


def _numbers(path, key, array):
    expect(array.ndim == 2 and array.dtype.kind in "fiu" and array.size, path,
           f"{key} is {array.dtype} of shape {array.shape}; expected numbers (N, width)")
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        array = array.astype(np.float32, copy=False)
    blocks = np.array_split(array, range(1 << 16, len(array), 1 << 16))  # few rows of a large file at a time
    bad = np.concatenate([~np.isfinite(block).all(1) for block in blocks])
    expect(not bad.any(), path,
           f"{key} row {bad.argmax()} holds a NaN or an infinite number ({bad.sum()} such rows); remove them")
    return array


def _names(path, key, array):
    expect(array.ndim == 1 and array.dtype.kind in "iuUSO" and array.nbytes, path,
           f"{key} is {array.dtype} of shape {array.shape}; expected one class or id a row (N,)")
    if array.dtype.kind in "SO":  # Python 2's strings are bytes
        values = array.tolist()
        expect(not any(isinstance(x, CONTAINERS) for x in values), path, f"{key} holds lists, not names")
        names = [str(x, "utf-8", "replace") if isinstance(x, bytes) else str(x) for x in values]
        longest = max(map(len, names))  # all take as much room as the longest
        expect(longest <= 1000, path, f"{key} holds a name of {longest} characters; expected up to 1,000")
        array = np.array(names)
    return array


def feature_splits(paths, root):
    """-> ({"train", "val", "test": Features}, class names) of two files of features; val is the last tenth of
    train by a hash of the id. Rows whose label is not among train's are left out, with a note."""
    train, test = (read_features(os.path.join(root or "", path)) for path in paths)
    for key in ("image", "text"):
        width = train[key].shape[1]
        test_width = test[key].shape[1]
        expect(width == test_width, paths[1],
               f"{key} has {test_width} columns, in {paths[0]} it has {width}; both files need the same")
    late = np.array([hash_tenth(id) == 9 for id in train["ids"]])
    labels = [label for label in train["label"][~late] if label != -1]  # -1: unlabelled
    names, count = np.unique(labels, return_counts=True)
    check_classes(count, paths[0], "label")
    everything = np.ones(len(test["label"]), bool)
    splits = {}
    for split, path, arrays, rows in (("train", paths[0], train, ~late),
                                      ("val", paths[0], train, late),
                                      ("test", paths[1], test, everything)):
        known = rows & np.isin(arrays["label"], names)
        unknown = rows.sum() - known.sum()
        if unknown:
            note(f"{split}: {unknown} of {rows.sum()} rows have a label that train does not; "
                 "they were left out")
        expect(known.any(), path, f"no row of split {split!r} has a label that train has")
        ones = np.ones(known.sum(), dtype=np.int64)
        labels = np.searchsorted(names, arrays["label"][known])
        features = []
        for array in (arrays["image"], arrays["text"]):
            mapped = isinstance(array, np.memmap)
            features.append(MappedRows(array, known.nonzero()[0]) if mapped else array[known])
        splits[split] = Features(*features, ones, ones, labels, ones > 0)
    return splits, [str(name) for name in names]


@lru_cache(maxsize=4)
def _shuffled(n, seed, epoch):
    """The order of n instances in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass(eq=False, repr=False)
class FeatureLoader:
    """Batches of `Features`: one view and one caption of each instance, drawn from (seed, step). The last
    batch of an epoch is smaller.

    A batch: images float32 (b, Di), texts float32 (b, Dt), index int64 (b,).
    """
    features: Features
    batch_size: int  # over all processes
    seed: int = 0
    rank: int = 0  # this process takes its contiguous part of every batch
    world: int = 1

    def __post_init__(self):
        self.first_view = self.features.views.cumsum() - self.features.views
        self.first_caption = self.features.captions.cumsum() - self.features.captions

    def __len__(self):
        """Batches per epoch."""
        return -(-len(self.features.labels) // self.batch_size)

    def make(self, step):
        """The batch of global step `step` (epoch = step // len(self)), this process's part."""
        epoch, at = divmod(step, len(self))
        order = _shuffled(len(self.features.labels), self.seed, epoch)
        index = order[at * self.batch_size:(at + 1) * self.batch_size]
        view, caption = np.random.default_rng([self.seed, epoch, at]).random((2, len(index)))
        images = self.first_view[index] + (view * self.features.views[index]).astype(np.int64)
        texts = self.first_caption[index] + (caption * self.features.captions[index]).astype(np.int64)
        part = np.array_split(np.arange(len(index)), self.world)[self.rank]
        return {"images": torch.from_numpy(self.features.images[images[part]]),
                "texts": torch.from_numpy(self.features.texts[texts[part]]),
                "index": torch.from_numpy(index[part])}

    def batches(self, start=0, stop=None):
        """Yield the batches of steps start..stop-1, through epochs; stop None: the end of the first."""
        for step in range(start, len(self) if stop is None else stop):
            yield self.make(step)


@dataclass(frozen=True)
class RegionView:
    """Row `row` of a file of region features: float32 (regions, width), such as 36 x 2,048 of a detector.

    The same image as CLIP sees it is its picture, or a row of a file of CLIP's embeddings, or unknown.
    """
    path: str
    row: int
    picture: str = None
    embedding: tuple = None  # (file, row)

    def features(self):
        return np.array(_regions(self.path)[self.row], dtype=np.float32)

    def clip_input(self, size):
        """Pixels uint8 (3, size, size), or CLIP's embedding float32 (D,)."""
        if self.picture:
            return pixels(self.picture, size).transpose(2, 0, 1)
        path, row = self.embedding
        return np.array(_regions(path, "CLIP's embeddings", ("images", "D"))[row], dtype=np.float32)

    def has_clip_input(self):
        return bool(self.picture or self.embedding)

    def __call__(self, size):
        expect(self.picture, self.path, "region features have no picture to show")
        return Image.fromarray(pixels(self.picture, size))


class Regions:
    """Region features (..., regions, width) with what CLIP's embedding of the same images comes from:
    pictures (..., 3, S, S), or the embedding itself (..., D)."""

    def __init__(self, features, clip_input):
        self.features = features
        self.clip_input = clip_input

    def __getitem__(self, index):
        return Regions(self.features[index], self.clip_input[index])


@lru_cache(maxsize=8)
def _regions(path, content="region features", axes=("images", "regions", "width")):
    shape = ", ".join(axes)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # a damaged header raises nearly any kind
        raise DataError(f"{path}: no {content} ({str(e)[:100]}); expected a .npy file ({shape})") from None
    expect(array.ndim == len(axes) and array.dtype.kind == "f" and array.size, path,
           f"{array.dtype} of shape {array.shape}; {content} are floats ({shape})")
    return array


def _letters(caption):
    return "".join(c for c in caption.lower() if c.isalnum())


def _pictures(name, root, split, captions):
    """The picture of each image that a list of captions describes, or None unless all of them are there.

    Files of region features do not name their images. Their captions are the data set's own, with other
    spaces, capitals and punctuation, so an image is the one that has most of them, at least three of five.
    """
    try:
        published, _ = load(name, root, split)
    except DataError:
        return None
    owners = defaultdict(set)
    for instance in published:
        for caption in instance.captions:
            owners[_letters(caption)].add(instance.images[0])
    pictures = []
    for five in captions:
        votes = Counter()
        for caption in five:
            votes.update(owners[_letters(caption)])
        picture, count = max(sorted(votes.items()), key=itemgetter(1), default=(None, 0))
        if count < 3:
            return None
        pictures.append(picture)
    return pictures


def load_regions(name, root, split, clip_input=True):
    """As `load`, of region features in place of pictures: <root>/precomp/{train,dev,test}_ims.npy (images,
    36, 2048), memory-mapped, and _caps.txt, five captions to an image, in order (SCAN's files; with one row
    of features per caption each fifth is read). The views also know the images' pictures, where those are in
    the data set's own layout under root, or else their rows in _clip.npy (images, D), where there is one;
    clip_input False: neither."""
    files = {"train": "train", "val": "dev", "test": "test"}
    expect(split in files, "--regions", f"no split {split!r}; it has {', '.join(files)}")
    base = os.path.join(root or os.path.join("data", name), "precomp", files[split])
    captions = [caption for (caption,) in read_list(base + "_caps.txt", 1)]
    rows = len(_regions(base + "_ims.npy"))
    expect(len(captions) in (rows, 5 * rows) and len(captions) % 5 == 0, base + "_ims.npy",
           f"{rows} rows, but {base}_caps.txt has {len(captions)}; expected five captions to a row, or one")
    rows_per_image = 5 * rows // len(captions)
    captions = [captions[i:i + 5] for i in range(0, len(captions), 5)]
    pictures = _pictures(name, root, split, captions) if clip_input else None
    embeddings = None
    if clip_input and not pictures and os.path.exists(base + "_clip.npy"):
        embeddings = base + "_clip.npy"
        count = len(_regions(embeddings, "CLIP's embeddings", ("images", "D")))
        expect(count == len(captions), embeddings, f"{count} rows; expected one for each of the "
               f"{len(captions)} images of {base}_caps.txt")
    instances = []
    for i, five in enumerate(captions):
        view = RegionView(base + "_ims.npy", i * rows_per_image, pictures and pictures[i],
                          embeddings and (embeddings, i))
        instances.append(Instance(f"{files[split]}-{i}", [view], five))
    return instances, {}


# ---------------------------------------------------------------- pictures

LARGE_PICTURE = 1 << 25  # pixels


def open_image(path):
    """A picture as RGB: EXIF rotation applied, 16-bit scaled to 8, transparency on white, one frame."""
    try:
        with Image.open(path) as image:
            pixels_per_byte = image.width * image.height / max(1, os.path.getsize(path))
            expect(image.width * image.height <= LARGE_PICTURE or pixels_per_byte <= 200, path,
                   f"{image.width} x {image.height} pixels in a file too small to show anything; replace it")
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
    except DataError:
        raise
    except Exception as e:  # Pillow raises many kinds on damaged files, DecompressionBombError on huge ones
        problem = f"is damaged or no picture ({type(e).__name__}: {str(e)[:100]})"
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            problem = "is empty"
        raise DataError(f"{path}: {problem}; replace it or remove its row") from None


def square(image, size):
    """RGB picture -> uint8 (size, size, 3): bicubic resize of the shorter side, centre crop; the same pixels
    as torchvision's Resize and CenterCrop. Of a very long picture only what is kept is resized (1 x 5,000
    would otherwise grow to gigabytes); Pillow may then take rows and columns in the other order, and its
    rounding between the two shows."""
    if image.size == (size, size):
        return np.asarray(image)
    w, h = image.size
    short = min(w, h)
    wide, high = (size if side == short else int(size * side / short) for side in (w, h))
    left = round((wide - size) / 2)
    top = round((high - size) / 2)
    if max(w, h) <= 64 * short:
        resized = image.resize((wide, high), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + size, top + size)))
    box = (left * w / wide, top * h / high, (left + size) * w / wide, (top + size) * h / high)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def pixels(image, size):
    """A path, or a callable view -> uint8 (size, size, 3)."""
    return square(image(size).convert("RGB") if callable(image) else open_image(image), size)


RATIOS = (3 / 4, 4 / 3)  # width to height of random crops


def crop_source(image, area):
    """A path, or a callable view -> uint8 (h, w, 3) to take crops from: the whole picture, made smaller where
    it has more than `area` pixels."""
    image = image(round(area ** 0.5)).convert("RGB") if callable(image) else open_image(image)
    w, h = image.size
    if w * h > area:
        scale = (area / (w * h)) ** 0.5
        sides = [min(area, max(1, int(side * scale))) for side in (w, h)]  # of 1 x 5,000 one cannot shrink
        image = image.resize(sides, Image.Resampling.BICUBIC)
    return np.asarray(image)


def crop_box(w, h, smallest, rng):
    """-> (left, top, width, height) of a random part of a picture of w x h.

    It is drawn as torchvision's RandomResizedCrop does: an area, evenly from `smallest` to 1 of the
    picture's; a ratio of width to height, evenly on a log scale, from RATIOS; then a place. Where ten draws
    do not fit into the picture, it is the largest part in the middle that has such a ratio (with 0.9 that is
    so for most photos of 3:2).
    """
    for _ in range(10):
        area = rng.uniform(smallest, 1) * w * h
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        width = round((area * ratio) ** 0.5)
        height = round((area / ratio) ** 0.5)
        if 0 < width <= w and 0 < height <= h:
            top = int(rng.integers(h - height + 1))
            left = int(rng.integers(w - width + 1))
            return left, top, width, height
    width = min(w, round(h * RATIOS[1]))
    height = min(h, round(w / RATIOS[0]))
    return (w - width) // 2, (h - height) // 2, width, height


def random_crop(picture, size, smallest, rng, mirror):
    """uint8 (h, w, 3) -> (size, size, 3): a random part of a picture (see `crop_box`), made square, and where
    `mirror` allows it flipped left to right half of the time."""
    left, top, width, height = crop_box(picture.shape[1], picture.shape[0], smallest, rng)
    part = Image.fromarray(picture[top:top + height, left:left + width])
    part = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    return part[:, ::-1] if mirror and rng.random() < 0.5 else part


def default_crop(name, instances, pretrained):
    """The smallest share of a picture's area that training crops keep where none is asked for: of photos half
    from scratch and nine tenths with pretrained weights; None, no crops, for shapes, videos and features.
    Photos are images in files, your own data among them."""
    photos = name not in SHAPES_AND_VIDEOS and all(isinstance(x.images[0], str) for x in instances)
    if not photos:
        return None
    return 0.9 if pretrained else 0.5


# ---------------------------------------------------------------- batches

@dataclass(eq=False, repr=False)
class Loader:
    """Batches of instances.

    With `crop`, training shows another random part of a picture in each epoch (see `crop_box`), and half of
    them mirrored, except of instances with a caption that says left or right. It is drawn from the seed, the
    epoch, the instance (or pair) and the view. What the cache keeps is then the whole picture, at a size that
    the smallest crop still fills the model's input: about 3 times its pixels for 0.5, 1.6 times for 0.9.

    A batch is a dict of tensors. An instance with fewer views or captions than asked for has its rest masked.

      images        uint8 (B, V, 3, S, S); of `load_regions` float32 (B, V, regions, width)
      image_mask    bool (B, V)
      tokens        int32 (B, L, context_length)
      caption_mask  bool (B, L)
      caption       int64 (B, L): the number of each among all captions of `instances`
      labels        {task: int64 (B,)}
      index         int64 (B,): the number of each instance
      clip_input    of `load_regions` alone, where it is known: see RegionView
    """
    instances: list  # of Instance
    tokenizer: InitVar[clip.Tokenizer]
    context_length: int  # longer captions are cut, counted and said once
    image_size: int  # S
    batch_size: int  # instances per batch over all processes
    views: int = None  # drawn per instance, without replacement; None: all of them, in order (evaluation)
    captions: int = None  # the same
    train: bool = False  # shuffled, and without the last incomplete batch
    seed: int = 0
    workers: int = 0
    rank: int = 0  # this process takes its contiguous part of every batch
    world: int = 1
    cache_bytes: int = 2 << 30  # decoded pictures are kept, shared by all workers, where they all fit
    frames: int = None  # instead of views, at most this many images, taken evenly and in order (video)
    pairs: bool = False  # an epoch shows every caption once, with its instance, not every instance once
    crop: float = None  # in training: the smallest share of the area in random crops; None, 0 or 1: no crops

    def __post_init__(self, tokenizer):
        n = len(self.instances)
        self.caption_owner = np.repeat(np.arange(n), [len(x.captions) for x in self.instances])
        samples = len(self.caption_owner) if self.pairs else n  # that an epoch shows
        if self.batch_size % self.world:
            raise DataError(f"--batch-size {self.batch_size} is no multiple of the {self.world} processes; "
                            "choose one that is")
        if self.train and self.batch_size > samples:
            kind = "pairs" if self.pairs else "instances"
            raise DataError(f"--batch-size {self.batch_size} is larger than the data set: {samples} training "
                            f"{kind}; choose {samples} or less")
        texts = [caption for x in self.instances for caption in x.captions]
        self.tokens, cut = tokenizer.rows(texts, self.context_length)
        if cut:
            note(f"{cut} of {len(texts)} captions are longer than {self.context_length} tokens and were cut "
                 "(--context says how many tokens of a text are read)")
        images = [len(x.images) for x in self.instances]
        captions = [len(x.captions) for x in self.instances]
        for kind, asked, counts in (("views", self.views, images), ("captions", self.captions, captions)):
            few = sum(count < asked for count in counts) if self.train and asked else 0
            if few:
                note(f"{few} of {n} instances have fewer than {asked} {kind}; all they have is used")
        self.first_image = np.cumsum([0] + images)
        self.first_caption = np.cumsum([0] + captions)
        self.labels = {}  # task -> int64 (N,)
        for task in sorted({task for x in self.instances for task in x.labels}):
            self.labels[task] = torch.tensor([x.labels.get(task, -1) for x in self.instances])
        self.regions = n > 0 and isinstance(self.instances[0].images[0], RegionView)  # floats, not pixels
        self.paths = None  # of all images, end to end: of Python's strings every worker would make copies
        if all(isinstance(image, str) for x in self.instances for image in x.images):
            paths = [os.fsencode(image) for x in self.instances for image in x.images]
            self.first_letter = np.cumsum([0] + [len(path) for path in paths])
            self.paths = b"".join(paths)
        self.crop = self.crop if self.train and self.crop and self.crop < 1 else None
        expect(not self.regions or not self.crop, "--crop", "region features have no pictures to crop")
        self.area = self.image_size ** 2  # pixels that are kept of a picture
        if self.crop:
            # the shorter side of the smallest crop is sqrt(area * crop * 3/4); 2 more pixels for rounding
            self.area = math.ceil((self.image_size + 2) ** 2 / (self.crop * RATIOS[0]))
            sided = re.compile(r"\b(left|right)\b", re.IGNORECASE)
            self.mirror = [not any(map(sided.search, x.captions)) for x in self.instances]
        self.cached = not self.regions and self.first_image[-1] * self.area * 3 <= self.cache_bytes
        self.cache = None
        if self.cached:
            self._make_cache()

    def _make_cache(self):
        """Anonymous shared memory: forked workers fill it for each other; unwritten pages cost nothing."""
        def shared(kind, *shape):
            size = math.prod(shape) * np.dtype(kind).itemsize
            return np.frombuffer(mmap.mmap(-1, max(1, size)), kind, math.prod(shape)).reshape(shape)

        total = int(self.first_image[-1])
        self.cache = shared(np.uint8, total, self.area * 3)
        self.sides = shared(np.int32, total, 2)  # height and width
        self.filled = shared(np.uint8, total)

    def __getstate__(self):  # where workers are spawned, not forked, each has a cache of its own
        return self.__dict__ | {"cache": None, "sides": None, "filled": None}

    def __len__(self):
        """Batches per epoch."""
        n = len(self.caption_owner) if self.pairs else len(self.instances)
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def _decoded(self, i, k):
        """Image k of instance i: uint8 (size, size, 3), or where crops are taken from it (h, w, 3)."""
        if self.cached and self.cache is None:
            self._make_cache()
        at = self.first_image[i] + k
        if self.cached and self.filled[at]:
            h, w = self.sides[at]
            return self.cache[at, :h * w * 3].reshape(h, w, 3)
        if self.paths is None:
            image = self.instances[i].images[k]
        else:
            image = os.fsdecode(self.paths[self.first_letter[at]:self.first_letter[at + 1]])
        picture = crop_source(image, self.area) if self.crop else pixels(image, self.image_size)
        if self.cached:
            self.cache[at, :picture.size] = picture.ravel()
            self.sides[at] = picture.shape[:2]
            self.filled[at] = 1  # after the pixels, so that no other worker sees half a picture
        return picture

    def _shown(self, epoch, sample, i, k):
        """What an epoch shows of image k of instance i: uint8 (size, size, 3), or region features."""
        if self.regions:
            return self.instances[i].images[k].features()
        picture = self._decoded(i, k)
        if self.crop:
            # k + 1, because numpy takes numbers that end in 0 for the same as without it: those of `_draw`
            rng = np.random.default_rng([self.seed, epoch, sample, k + 1])
            picture = random_crop(picture, self.image_size, self.crop, rng, self.mirror[i])
        return picture

    def _samples(self, epoch, at):
        """The instances in batch `at` of an epoch (with `pairs`: the captions), this process's part."""
        n = len(self.caption_owner) if self.pairs else len(self.instances)
        order = _shuffled(n, self.seed, epoch) if self.train else np.arange(n)
        part = self.batch_size // self.world
        begin = at * self.batch_size + self.rank * part
        return order[begin:min(begin + part, (at + 1) * self.batch_size)]

    def _draw(self, epoch, sample):
        """-> (instance, numbers of its images, numbers of its captions) that an epoch shows of a sample."""
        rng = np.random.default_rng([self.seed, epoch, sample])
        i = self.caption_owner[sample] if self.pairs else sample
        images = np.arange(self.first_image[i + 1] - self.first_image[i])
        captions = np.arange(self.first_caption[i + 1] - self.first_caption[i])
        if self.frames:
            images = np.linspace(0, len(images) - 1, min(self.frames, len(images))).round().astype(int)
        elif self.views:
            images = rng.permutation(len(images))[:self.views]
        if self.pairs:
            captions = np.array([sample - self.first_caption[i]])
        elif self.captions:
            captions = rng.permutation(len(captions))[:self.captions]
        return i, images, captions

    def make(self, step):
        """The batch of global step `step` (epoch = step // len(self)), this process's part."""
        epoch, at = divmod(step, len(self))
        samples = self._samples(epoch, at)
        drawn = [self._draw(epoch, sample) for sample in samples]
        index = [i for i, _, _ in drawn]
        B = len(index)
        V = self.views or max((len(views) for _, views, _ in drawn), default=1)
        L = self.captions or max((len(captions) for _, _, captions in drawn), default=1)
        if self.regions:
            images = np.zeros((B, V, *self.instances[0].images[0].features().shape), np.float32)
        else:
            images = np.zeros((B, V, self.image_size, self.image_size, 3), np.uint8)
        image_mask = np.zeros((B, V), bool)
        caption = np.full((B, L), -1, np.int64)
        for b, (i, views, captions) in enumerate(drawn):
            for v, k in enumerate(views):
                images[b, v] = self._shown(epoch, samples[b], i, k)
            image_mask[b, :len(views)] = True
            caption[b, :len(captions)] = self.first_caption[i] + captions
        caption = torch.from_numpy(caption)
        caption_mask = caption >= 0
        tokens = torch.zeros(B, L, self.tokens.shape[1], dtype=torch.int32)
        tokens[caption_mask] = self.tokens[caption[caption_mask]]
        images = torch.from_numpy(images)
        if not self.regions:
            images = images.permute(0, 1, 4, 2, 3)
        index = torch.from_numpy(np.asarray(index, dtype=np.int64))
        labels = {task: classes[index] for task, classes in self.labels.items()}
        batch = {"images": images, "image_mask": torch.from_numpy(image_mask), "tokens": tokens,
                 "caption_mask": caption_mask, "caption": caption, "labels": labels, "index": index}
        if self.regions and self.instances[0].images[0].has_clip_input():  # regions are one view of an image
            rows = [self.instances[i].images[0].clip_input(self.image_size) for i in index]
            batch["clip_input"] = torch.from_numpy(np.stack(rows)[:, None])
        return batch

    def batches(self, start=0, stop=None, every=1):
        """Yield the batches of steps start..stop-1, through epochs; stop None: the end of the first.

        every: only each so many-th of them.
        """
        steps = range(start, len(self) if stop is None else stop, every)
        forked = self.workers and steps and sys.platform == "linux"  # forked workers share the cache
        others = multiprocessing.active_children()
        batches = iter(torch.utils.data.DataLoader(
            _Batches(self), sampler=steps, batch_size=None, num_workers=min(self.workers, len(steps)),
            multiprocessing_context="fork" if forked else None, worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator()))  # leaves torch's global generator alone
        workers = [process for process in multiprocessing.active_children() if process not in others]
        kill = partial(_kill, workers)
        atexit.register(kill)  # a traceback can hold this loop until then
        try:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            del batches  # ends the workers now, though a traceback may hold this frame
            atexit.unregister(kill)


class _Batches(torch.utils.data.Dataset):
    """A Loader as torch's workers want it: batch number `step` is made from (seed, step) alone, so that
    workers, resumed runs and several processes agree."""

    def __init__(self, loader):
        self.loader = loader

    def __getitem__(self, step):
        try:
            return self.loader.make(step)
        except DataError as e:  # a worker's exception would arrive wrapped in its traceback
            return e


def _ignore_signals(worker):
    """Ctrl-C and SIGTERM reach every process of a run; the main one acts on them and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # looking for cycles would write to every object that a forked worker shares, and so copy it


def _kill(workers):
    """End workers at exit. Python would send them SIGTERM, which they ignore, and wait for ever."""
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an accident
    for process in workers:
        process.kill()


def to_device(batch, device):
    """The batch on a device, pixels as normalised float32: bytes travel, a quarter of the size.

    Tokens and their mask stay on the CPU, where `encode_text` finds out what to compute. Regions with
    pictures or with CLIP's embeddings become one `Regions`, as "images".
    """
    moved = dict(batch)
    for key in batch.keys() - {"tokens", "caption_mask", "labels"}:
        moved[key] = batch[key].to(device, non_blocking=True)
    moved["labels"] = {task: labels.to(device, non_blocking=True) for task, labels in batch["labels"].items()}
    for key in ("images", "clip_input"):
        if key in moved and moved[key].dtype == torch.uint8:
            mean = torch.tensor(clip.IMAGE_MEAN, device=device).view(3, 1, 1) * 255
            std = torch.tensor(clip.IMAGE_STD, device=device).view(3, 1, 1) * 255
            moved[key] = (moved[key].float() - mean) / std
    if "clip_input" in moved:
        moved["images"] = Regions(moved["images"], moved.pop("clip_input"))
    return moved


# ---------------------------------------------------------------- the names that `load` knows

SHAPES_AND_VIDEOS = ("text2shape", "msrvtt", "msvd", "didemo", "activitynet")  # whose files are no photos

DATA_SETS = {  # each a function of (root, split); karpathy of (root, splits, name): one file holds all splits
    "primitives": lambda root, split: primitives(split),
    "primitives-source": lambda root, split: primitives(split, "primitives-source"),
    "primitives-target": lambda root, split: primitives(split, "primitives-target"),
    "text2shape": text2shape,
    "flickr30k": karpathy,
    "flickr8k": karpathy,
    "coco": karpathy,
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
