"""Data sets as lists of `Instance`, the batch loader, the built-in data set `primitives` and the voxel
renderer.

Everything is multifold: an instance is one thing in the world, seen several times in each modality. A photo
with five captions has one image; a shape has twelve views and five captions; a video has frames. A data set
is read with

    instances, classes = data.load("primitives", split="train")  # or text2shape, mine.jsonl, mine.csv, ...
    loader = data.Loader(instances, tokenizer, model.config, batch_size=64, train=True)
    for batch in loader.batches(0, 100): ...

Each data set has a reader that yields `Row`s as its files state them; `finish` makes the instances of all.
Knows nothing of models or losses.
"""
import atexit
import contextlib
import csv
import gc
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import random
import re
import signal
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from dataclasses import InitVar, dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import clip


class DataError(clip.OneLineError):
    """Input that cannot be used; the message is one line: what is wrong, where (file, row), what to do."""


reading = partial(clip.reading, error=DataError)


def expect(condition, where, problem):
    """Raise DataError unless the condition holds. where: file and row; problem: what is wrong, what to do."""
    if not condition:
        raise DataError(f"{where}: {problem}")


@dataclass(slots=True)  # of a million instances, 50 MB less than with a dict each
class Instance:
    """One thing in the world."""
    id: str
    images: list  # at least one path, or callable (rendered view): image(size) -> PIL image of size x size
    captions: list  # at least one string; none in a folder of pictures
    labels: dict = field(default_factory=dict)  # task -> class index; absent or -1: unlabelled
    group: str = None  # what counts as the same thing in evaluation; the id unless a data set says otherwise
    query: bool = True  # False: in evaluation only a distractor, which is searched but not asked about

    def __post_init__(self):
        self.group = self.id if self.group is None else self.group


def note(message):
    """A remark about the data, once per run, on stderr, by the first process of a group only."""
    if message not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {DataError(message)}", file=sys.stderr, flush=True)
    _noted.add(message)


_noted = set()


def seed_everything(seed):
    """Seed every generator that a library might draw from. The project's own draws have their own."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed % 2 ** 64)


def seed_step(seed, step, rank=0):
    """Seed torch's global generator for one step, so that a resumed run repeats its dropout."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


# ---------------------------------------------------------------- loading by name

SPLITS = ("train", "val", "test")


def load(name_or_path, root=None, split="train", classes=None):
    """-> (instances of the split, {task: [class names]}).

    name_or_path: a name in DATA_SETS (at the end of this file), or the path of a .jsonl or .csv file of your
    own, or of a folder of pictures. root: the data set's folder (default data/<name>); of a file of your own
    the folder of its pictures (default: the file's). split: train, val, test or all (primitives: also unseen,
    not all). classes: those that a model knows, in place of train's. Raises DataError for anything missing or
    malformed.
    """
    return load_splits(name_or_path, root, [split], classes)[0]


def load_splits(name_or_path, root=None, splits=SPLITS, classes=None):
    """[what `load` returns of each split]. The files are read once."""
    name = os.fspath(name_or_path)
    if name.lower().endswith((".jsonl", ".csv")):
        return finish(read_own(name, root or os.path.dirname(name)), name, splits, classes, own=True)
    if name in DATA_SETS and name.startswith("primitives"):
        return [primitives(split, name, classes) for split in splits]
    if name in DATA_SETS:
        root = root or os.path.join("data", name)
        expect(name == "text2shape" or os.path.isdir(root), root, f"no such folder, and {name} cannot be "
               "fetched automatically; give --root its folder (README.md shows the layout)")
        return finish(DATA_SETS[name](root), root, splits, classes)
    expect(os.path.isdir(name), f"unknown data set {name!r}", f"known are {', '.join(DATA_SETS)}; or give "
           "the path of a .jsonl or .csv file, or of a folder of pictures to search")
    return [(read_gallery(name, split), {}) for split in splits]


# ---------------------------------------------------------------- from rows to instances

@dataclass(slots=True)
class Row:
    """An instance as a data set's files state it: before its split is known and its classes are numbered."""
    id: str
    split: str  # None where the files state none
    images: list  # files, which need not be there, or callables
    captions: list  # or (file, function of the file -> captions)
    labels: dict = field(default_factory=dict)  # task -> name of the class, or None where it has none
    group: str = None
    where: str = None  # file and line, for errors


TENTHS = ("train",) * 8 + ("val", "test")


def hash_tenth(id):
    """0..9 by a hash of the id: a split that depends on nothing else and stays when rows are added."""
    return int(hashlib.sha1(str(id).encode()).hexdigest()[:8], 16) % 10


def finish(rows, where, splits, classes=None, own=False):
    """-> [(instances, {task: [class names]}) of each split] of what a reader yields; "all" is every row.

    A row's split is the one it states. Where no row states any, it is 80/10/10 by a hash of the id; where
    none says val, val is the last tenth of train. Empty captions go; a row without a caption or a picture is
    left out, and a note counts them. own: in a file of one's own a picture that is not there is an error.
    classes: those of train, unless they are given.
    """
    gc.disable()  # looking for cycles among millions of new objects takes longer than reading them
    try:
        rows = list(rows)
        expect(rows, where, "no rows; it needs at least one for each of train, val and test")
        stated = {row.split for row in rows} - {None}
        for row in rows:
            expect(row.split or not stated, row.where, "no split, while other rows state one; "
                   "give every row a split, or none (then 80/10/10 by id)")
            if not stated:
                row.split = TENTHS[hash_tenth(row.id)]
            elif "val" not in stated and row.split == "train" and hash_tenth(row.id) == 9:
                row.split = "val"
        if own and not stated:
            note(f"{where}: no row states a split; it is 80/10/10 by a hash of the id")
        _note_repeats(rows, where)
        if classes is None:
            classes = _classes(rows, where, own)
        return [(_instances(rows, classes, where, split, own), classes) for split in splits]
    finally:
        gc.enable()


def _note_repeats(rows, where):
    """A note on ids and pictures that stand in two splits, and on ids that stand twice in one."""
    first = {}
    twice = {}
    for row in rows:
        for thing in {row.id, *row.images}:
            before = first.setdefault(thing, row)
            if before is not row:
                twice[thing] = f"{thing} ({before.split} and {row.split})"
    if twice:
        note(f"{where}: {len(twice)} ids or pictures stand in two splits, or twice in one, "
             f"such as {next(iter(twice.values()))}")


def _classes(rows, where, own):
    """{task: [names]} that the training rows state (where there are none, all rows)."""
    named = defaultdict(Counter)  # task -> how many rows name each class
    for row in [row for row in rows if row.split == "train"] or rows:
        for task, name in row.labels.items():
            named[task].update([] if name is None else [name])
    missing = sum(name is None for row in rows for name in row.labels.values())
    if missing:
        note(f"{where}: {missing} labels are missing (empty, NaN, None, NA or null)")
    classes = {}
    for task in sorted(named) if own else named:
        names = named[task]
        if own and is_remark(len(names), names.total()):
            note(f"{where}: {task!r} has {len(names)} distinct values in {names.total()} training instances: "
                 "taken as a remark, not as a task")
        elif names:
            classes[task] = sorted(names)
        alike = Counter(" ".join(name.casefold().split()) for name in names).most_common(1)
        if alike and alike[0][1] > 1:
            note(f"{where}: classes of {task} differ in capitals or blanks only, such as {alike[0][0]!r}")
    return classes


def _instances(rows, classes, where, split, own):
    """The instances of a split; what has no picture or no text is left out, and said."""
    chosen = [row for row in rows if split in (row.split, "all")]
    present = ", ".join(sorted({row.split for row in rows}))
    expect(chosen, where, f"no rows in split {split!r}; it has {present}; add some, or state every row's")
    instances = []
    left_out = 0
    empty = 0
    reason = ""
    for row in chosen:
        captions = row.captions
        lacks = next((x for x in row.images if isinstance(x, str) and not os.path.isfile(x)), None)
        if lacks and own:
            raise DataError(f"{row.where}: picture {absence(lacks)} (backslashes, capitals and Unicode's "
                            "normal form matter; what has an address, download it)")
        if isinstance(captions, tuple):
            file, read = captions
            lacks = lacks or (None if os.path.isfile(file) else file)
            captions = [] if lacks else read(file)
        texts = [text.strip() for text in captions if text.strip() not in MISSING]
        if lacks or not texts:
            reason = reason or (absence(lacks) if lacks else f"{row.where or row.id} has no caption")
            left_out += 1
            continue
        empty += len(captions) - len(texts)
        for image in row.images if split != "train" else ():
            expect_whole(image)
        labels = {task: name for task, name in row.labels.items() if name is not None}
        instances.append(Instance(row.id, row.images, texts, labels, row.group))
    if left_out or empty:
        problem = (f"of split {split}, {left_out} of {len(chosen)} rows without a picture or a text and "
                   f"{empty} empty captions were left out{reason and ': '}{reason}")
        expect(instances, where, f"{problem}; README.md shows the layout")
        note(f"{where}: {problem}")
    number_labels(instances, classes, where, split)
    return instances


MISSING = frozenset(("", "NaN", "nan", "None", "NA", "N/A", "n/a", "<NA>", "null", "NULL", "#N/A"))
WHOLE_NUMBER = re.compile(r"^(-?[0-9]+)\.0+$")


def plain(value):
    """The name that a cell or a JSON value states, without blanks around it and 1.0 as 1; None: missing."""
    name = str(value).strip()
    if name.endswith("0"):
        name = WHOLE_NUMBER.sub(r"\1", name)
    infinite = isinstance(value, float) and math.isinf(value)
    return None if name in MISSING or infinite else name


def absence(path):
    """What to say of a file that is not there: its path, and what stands there instead."""
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    wanted = name.casefold()
    there = {other: os.path.commonprefix([wanted, other.casefold()]) for other in list_folder(folder or ".")}
    found = ", ".join(sorted(there, key=lambda other: -len(there[other]))[:3]) or "nothing"
    state = "is no file" if os.path.exists(path) else "No such file"
    return f"{path}: {state}; {folder or '.'} holds {found}"


def expect_file(path):
    if not os.path.isfile(path):
        raise DataError(absence(path))


# ---------------------------------------------------------------- files of text, JSON, CSV and lists

def read_text(path):
    """The content of a UTF-8 text file."""
    return "".join(read_lines(path))


def read_lines(path):
    """Yield the lines of a UTF-8 text file. Only a line feed ends one: str.splitlines would split at U+2028
    and five other characters too."""
    expect_file(path)
    number = 0
    with reading(path, "expected a text file"), open(path, "rb") as f:
        for line in f:
            number += 1
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise DataError(f"{path} line {number}: cannot be read (byte 0x{line[e.start]:02x}); "
                                "expected UTF-8 text, save it as that") from None


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
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({str(e)[:100]}); expected {expected}") from None
    expect(fits(value, shape), where, f"expected {expected}")
    return value


def read_json(path, shape, expected):
    return parse_json(read_text(path), path, shape, f"{expected}; get the published file again")


def read_cells(path, separator=",", strict=False, by_line=False):
    """Yield ("file line n", cells) of the rows of a CSV file, n where the row starts.

    strict: misplaced quotes are an error. by_line: every line is a row; where its quotes are misplaced they
    are text, for they would swallow the rows that follow.
    """
    start = 1
    try:
        if by_line:
            for start, line in enumerate(read_lines(path), 1):
                try:
                    cells = next(csv.reader([line], delimiter=separator, strict=True))
                except csv.Error:
                    cells = next(csv.reader([line], delimiter=separator, quoting=csv.QUOTE_NONE))
                if line.strip():
                    yield f"{path} line {start}", cells
            return
        reader = csv.reader(read_lines(path), delimiter=separator, strict=strict, skipinitialspace=strict)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path} line {start}", cells
            start = reader.line_num + 1
    except csv.Error as e:  # an end inside quotes, text after a closing quote, 131,072 characters in a field
        raise DataError(f"{path} line {start}: not CSV ({e}); is a quote left open, or a line end a carriage "
                        "return alone? write a quote inside a cell twice") from None


def read_table(path, columns, strict=False, by_line=False):
    """Yield ("file line n", {column: cell}) of a CSV file whose first row must name these columns. The
    separator is what the first row has most of. Where not `strict`, what is past the last column belongs to
    it: titles of published tables have commas without quotes."""
    head = next(read_lines(path), "")
    separator = max(",;\t|", key=head.count)
    rows = read_cells(path, separator, strict, by_line)
    header = [name.strip() for name in next(rows, ("", []))[1]]
    for name in columns:
        expect(name in header, f"{path} line 1", f"no column {name!r}; the first line must name "
               f"{', '.join(columns)} (it names: {', '.join(header)[:200] or 'nothing'})")
    expect(len(set(header)) == len(header) and "" not in header, f"{path} line 1",
           f"a column has no name or that of another ({', '.join(header)[:200]}); name each, or remove it")
    last = len(header) - 1
    for where, cells in rows:
        expect(len(cells) == len(header) or len(cells) > len(header) and not strict, where,
               f"{len(cells)} cells under {len(header)} columns; quote a cell that holds a comma")
        yield where, dict(zip(header, [*cells[:last], separator.join(cells[last:])]))


def read_list(path, fields, separator="\t"):
    """Yield the fields of each line of a list file that is not blank."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            parts = [part.strip() for part in line.rsplit(separator, fields - 1)]
            expect(len(parts) == fields, f"{path} line {number}",
                   f"{len(parts)} fields, expected {fields} with {separator!r} between them")
            yield parts


PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def list_folder(folder, endings=("",)):
    """Names of the files with these endings in a folder, their numbers in order (2 before 10); none where
    there is no such folder. What Macs and Windows leave there is not listed."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(endings)
             and not name.startswith(".") and name.lower() not in ("thumbs.db", "desktop.ini")]
    return sorted(names, key=partial(re.sub, "[0-9]+", lambda digits: digits[0].zfill(20)))


# ---------------------------------------------------------------- your own data: .jsonl, .csv, a folder

JSON_KEYS = ("id", "images", "captions", "labels", "split", "group")


def read_own(path, folder):
    """The Rows of a file of your own. Paths of pictures are relative to the folder.

    .jsonl: one instance a line, {"id", "images": [...], "captions": [...], "labels": {task: name}, "split",
    "group"}; all but images and captions is optional, and the default id is "line <number>".
    .csv: one image-caption pair a row, with columns image, caption; optional id (default: the image) and
    split; every further column is a task. Rows of one id are one instance.
    """
    entries = _csv_entries(path) if path.lower().endswith(".csv") else _json_entries(path)
    rows = {}
    number = unnamed = 0
    for number, (where, entry) in enumerate(entries, 1):
        images = entry["images"]
        expect(images and all(isinstance(image, str) and image for image in images), where,
               "no picture, or one that is no path; an instance has at least one")
        captions = [text if isinstance(text, str) or plain(text) else "" for text in entry["captions"]]
        expect(all(isinstance(text, str) for text in captions), where, "a caption that is no text")
        labels = entry.get("labels") or {}
        expect(isinstance(labels, dict), where, '"labels" must be an object of task: class')
        names = {key: entry.get(key) for key in ("id", "split", "group")}
        for key, value in [*names.items(), *labels.items()]:
            if not isinstance(value, (str, int, float, type(None))):
                raise DataError(f"{where}: {key} = {str(value)[:50]} must be a string or a number")
        id, split, group = map(plain, names.values())
        expect(split in (None, *SPLITS), where, f"split {split!r}; it must be train, val or test")
        unnamed += id is None
        labels = {task: plain(name) for task, name in labels.items()}
        row = Row(id or entry["default"], split, [os.path.join(folder, x) for x in images], captions, labels,
                  group, where)
        first = rows.setdefault(row.id, row)
        if first is not row:
            expect((first.labels, first.split, first.group) == (labels, split, group), where,
                   f"another label or split than at {first.where}, for the same id {row.id!r}")
            first.images += [x for x in row.images if x not in first.images]
            first.captions += [x for x in captions if x not in first.captions]
    if 0 < unnamed < number:
        note(f"{path}: {unnamed} ids are missing (empty, NaN, None, NA or null), {number - unnamed} given")
    yield from rows.values()


def _json_entries(path):
    expected = 'an object with "images" and "captions", each a list'
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path} line {number}"
            entry = parse_json(line, where, {"images": list, "captions": list}, expected)
            for key in entry:
                expect(key in JSON_KEYS, where, f"unknown key {key!r}; known are {', '.join(JSON_KEYS)}")
            yield where, entry | {"default": f"line {number}"}


def _csv_entries(path):
    one_line = True
    for where, cells in read_table(path, ("image", "caption"), strict=True):
        labels = {name: cell.strip() for name, cell in cells.items()}
        if one_line and any("\n" in cell for cell in labels.values()):
            one_line = False
            note(f"{where}: a cell goes over several lines; if that is not meant, a quote is left open there")
        image = labels.pop("image")
        yield where, {"images": [image], "captions": [labels.pop("caption")], "default": image,
                      "id": labels.pop("id", None), "split": labels.pop("split", None), "labels": labels}


def read_gallery(folder, split):
    """The pictures of a folder and its subfolders, as instances without captions: for searching."""
    expect(split in ("test", "all"), folder, "a folder has no captions to learn from, and can only be "
           "searched (eval.py --query); to train, list its pictures with captions in a .csv or .jsonl file")
    instances = []
    for place, _, _ in sorted(os.walk(folder)):
        for name in list_folder(place, PICTURES):
            path = os.path.join(place, name)
            name = os.path.relpath(path, folder)
            hidden = any(part.startswith(".") for part in name.split(os.sep))
            if os.path.isfile(path) and not hidden:
                instances.append(Instance(name, [path], []))
    expect(instances, folder, f"no pictures in it ({', '.join(PICTURES)})")
    return instances


# ---------------------------------------------------------------- tasks and their classes

def is_remark(distinct, rows):
    """Whether so many distinct values in so many rows are ids or remarks, and no task to learn."""
    return distinct > 20 and distinct * (10 if distinct >= 1000 else 2) > rows


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


def choose_tasks(classes, asked, where, instances):
    """{task: names of its classes} to learn: what --tasks asked for, or all tasks of the training data.

    Raises DataError for an asked task that is not fit to learn, and where no task is. What was not asked for
    and is not fit is left out with a remark.
    """
    chosen = {}
    tasks = asked.split(",") if asked else list(classes)
    for task in tasks or [None]:  # None: data without labels, which choose_task refuses
        try:
            choose_task(classes, task, where, instances)
            chosen[task] = classes[task]
        except DataError as e:
            if asked or not classes:
                raise
            note(f"{e}; left out")
    expect(chosen, where, f"none of the tasks {', '.join(classes)} has two or more classes to learn")
    return chosen


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


def pairs(instances, tasks):
    """One instance for each caption, with one of the images and a label of each task: what is classified."""
    out = []
    for x in instances:
        labels = {task: x.labels.get(task, -1) for task in tasks}
        for k, caption in enumerate(x.captions):
            image = x.images[k % len(x.images)]
            out.append(replace(x, images=[image], captions=[caption], labels=labels))
    return out


def by_class(loaded, task, name, split):
    """Of what `load` returns -> (instances that have a label of a task, names of its classes). What counts as
    the same thing, the group, becomes the class."""
    instances, classes = loaded
    names = classes.get(task, [])
    labelled = [replace(x, group=names[x.labels[task]]) for x in instances if x.labels.get(task, -1) >= 0]
    if len(labelled) < len(instances):
        note(f"{name} {split}: {len(instances) - len(labelled)} of {len(instances)} instances have no known "
             f"{task}; they were left out")
    expect(labelled, name,
           f"no instance of split {split!r} has a known {task}; label some, or choose another --task")
    return labelled, names


def class_layout(instances, classes):
    """What evaluation by class needs to know of `by_class`'s instances: the number of each one's class in
    `classes` (N,), how many captions it has (N,), and whether it is a query (N,)."""
    number = {name: c for c, name in enumerate(classes)}
    labels = np.array([number[x.group] for x in instances], np.int64)
    captions = np.array([len(x.captions) for x in instances])
    query = np.array([x.query for x in instances])
    return labels, captions, query


# ---------------------------------------------------------------- published sets: each yields Rows

KARPATHY = {"flickr30k": "flickr30k-images", "flickr8k": "Images", "coco": ""}  # the folder of the pictures


def karpathy(root, name):
    """Karpathy's dataset_<name>.json: images[] of filename, split, sentences[].raw and, for coco, filepath.
    The split restval counts as train."""
    image_shape = {"filename": str, "split": str, "sentences": [{"raw": str}]}
    if name == "coco":
        image_shape["filepath"] = str
    path = os.path.join(root, f"dataset_{name}.json")
    content = read_json(path, {"images": [image_shape]}, f"Karpathy's {{images: [{', '.join(image_shape)}]}}")
    for image in content["images"]:
        file = os.path.join(image["filepath"] if name == "coco" else KARPATHY[name], image["filename"])
        part = "train" if image["split"] == "restval" else image["split"]
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield Row(file, part, [os.path.join(root, file)], captions)


def text2shape(root):
    """Chen et al. 2018, "Text2Shape", arXiv 1803.08495: chairs and tables of ShapeNet as coloured voxels,
    about five descriptions each. Relevance: the same shape. Labels: category. Views are rendered, unless
    views/<modelId>/*.png are there. The split is the published one or, without its files, by a hash."""
    path = os.path.join(root, CAPTION_FILE)
    expect(os.path.isfile(path), root, f"no {CAPTION_FILE} there; without --no-download (in Python, by "
           f"data.fetch_missing) it is fetched; or {text2shape_by_hand(root)}")
    captions = defaultdict(list)
    category = {}
    for _, cell in read_table(path, ("modelId", "description", "category")):
        captions[cell["modelId"]].append(cell["description"])
        category[cell["modelId"]] = cell["category"]
    published = _published_split(root)
    for model in sorted(captions):
        folder = os.path.join(root, "views", model)
        views = [os.path.join(folder, name) for name in list_folder(folder, (".png",))]
        voxels = os.path.join(root, VOXEL_FOLDER, model, model + ".nrrd")
        if not views:
            # view 7 is one from the front, which a gallery shows
            seen = [VoxelView(voxels, (k + 7) % VIEWS) for k in range(VIEWS)]
            views = seen if os.path.isfile(voxels) else [voxels]
        part = published.get(model, "none") if published else None
        yield Row(model, part, views, captions[model], {"category": plain(category[model])})


def _published_split(root):
    """{modelId: split} from processed_captions_*.p, or {} where there are none."""
    published = {}
    files = [file for file in SPLIT_FILES if os.path.isfile(os.path.join(root, file))]
    expect(len(files) in (0, 3), root, f"of the splits only {', '.join(files)}; put all three there, or none")
    for split, file in zip(SPLITS, files):
        path = os.path.join(root, file)
        content = read_pickle(path)
        with reading(path, "expected 'caption_tuples' of (tokens, category, modelId), as published"):
            for _, _, model in content["caption_tuples"]:
                published[model] = split
    return published


def products(root):
    """Kaggle's Fashion Product Images: styles.csv and images/<id>.jpg. A picture, a title and seven tasks;
    80/10/10 by a hash of the id."""
    path = os.path.join(root, "styles.csv")
    for _, cell in read_table(path, ("id", "productDisplayName"), by_line=True):
        id, title = cell.pop("id"), cell.pop("productDisplayName")
        labels = {task: plain(name) for task, name in cell.items() if task != "year"}
        yield Row(id, None, [os.path.join(root, "images", id + ".jpg")], [title], labels)


def wikipedia(root):
    """Rasiwasia et al. 2010: {train,test}set_txt_img_cat.list (text id, image id, category from 1),
    categories.list, images/<category>/<id>.jpg, texts/<id>.xml. 2,173 / 693, val out of train. Relevance: the
    category."""
    names = {}
    for (name,) in read_list(os.path.join(root, "categories.list"), 1):
        names[str(len(names) + 1)] = name
    for part in ("train", "test"):
        for text, image, category in read_list(os.path.join(root, f"{part}set_txt_img_cat.list"), 3):
            expect(category in names, root, f"category {category[:20]!r} of text {text[:40]!r}; "
                   f"categories.list names {len(names)}, counted from 1")
            name = names[category]
            picture = os.path.join(root, "images", name, image + ".jpg")
            captions = (os.path.join(root, "texts", text + ".xml"), _wikipedia_texts)
            yield Row(f"{image}-{text}", part, [picture], captions, {"category": name}, group=name)


def _wikipedia_texts(file):
    xml = read_text(file)
    texts = re.findall("<text[^>]*>(.*?)</text>", xml, re.DOTALL) or [xml]
    return [" ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split()) for text in texts]


def pascal_sentence(root):
    """Rashtchian et al. 2010: dataset/<class>/<id>.jpg, sentence/<class>/<id>.txt (five lines), or <id>txt as
    its published script writes. 20 classes of 50, by name 40 / 5 / 5 of each. Relevance: the class. Each line
    is a caption; CLIP4CMR's authors take 50 words of all five as one, for which --features with their files
    is the faithful path."""
    folder = os.path.join(root, "dataset")
    names = [name for name in list_folder(folder) if os.path.isdir(os.path.join(folder, name))]
    for name in names or ["<class>"]:
        files = list_folder(os.path.join(folder, name), PICTURES) or ["<id>.jpg"]
        for i, file in enumerate(files):
            part = TENTHS[10 * i // len(files)]
            stem = os.path.join(root, "sentence", name, os.path.splitext(file)[0])
            text = stem + "txt" if os.path.isfile(stem + "txt") else stem + ".txt"
            picture = os.path.join(folder, name, file)
            captions = (text, lambda file: list(read_lines(file)))
            yield Row(f"{name}/{file}", part, [picture], captions, {"class": name}, group=name)


def id_label_lists(root):
    """NUS-WIDE and XMediaNet as CLIP4CMR's authors lay them out: split/{train,valid,test}.txt (id:label),
    images/<id>.jpg, text/<id>.json (a string). Relevance: the label."""
    def read_string(file):
        return [parse_json(read_text(file), file, str, "a JSON string: the text of one image")]

    for part, file in (("train", "train.txt"), ("val", "valid.txt"), ("test", "test.txt")):
        for id, label in read_list(os.path.join(root, "split", file), 2, ":"):
            picture = os.path.join(root, "images", id + ".jpg")
            captions = (os.path.join(root, "text", id + ".json"), read_string)
            yield Row(id, part, [picture], captions, {"label": label}, group=label)


def food101(root):
    """UPMC-Food101 (Wang et al. 2015): images/{train,test}/<class>/<file>, texts/{train,test}_titles.csv
    (file, title, class; no header). 101 classes, val out of train. Relevance: the class."""
    for part in ("train", "test"):
        path = os.path.join(root, "texts", part + "_titles.csv")
        for where, cells in read_cells(path, by_line=True):
            expect(len(cells) >= 3, where, f"{len(cells)} cells, expected file, title, class")
            file, *title, name = cells  # a title's own commas may be unquoted
            picture = os.path.join(root, "images", part, name, file)
            yield Row(file, part, [picture], [",".join(title)], {"class": name}, group=name)


def fashiongen(root):
    """Fashion-Gen (Rostamzadeh et al. 2018, arXiv 1806.08317): fashiongen_256_256_{train,validation}.h5, read
    with h5py. The views of one product are one instance, its name and description the caption; val out of
    train, test is the validation file. Relevance: the category."""
    try:
        import h5py
    except ImportError:
        raise DataError("fashiongen is read with h5py, which is not installed; pip install h5py") from None
    for part, name in (("train", "train"), ("test", "validation")):
        path = os.path.join(root, f"fashiongen_256_256_{name}.h5")
        expect_file(path)
        products = {}
        with reading(path, "expected the published file of Fashion-Gen"), h5py.File(path, "r") as f:
            keys = ("productID", "name", "description", "category")
            columns = [f["input_" + key][:].ravel() for key in keys]
            for id, *texts, k in zip(*columns, range(len(f["input_image"])), strict=True):
                title, description, category = [text.decode("latin1") for text in texts]
                row = Row(str(id), part, [], [f"{title}. {description}"], {"category": category}, category)
                products.setdefault(id, row).images.append(H5View(path, k))
        yield from products.values()


@dataclass(frozen=True)
class H5View:
    """Row `row` of the pictures in a Fashion-Gen file."""
    file: str
    row: int

    def __call__(self, size):
        import h5py
        with reading(self.file, f"picture {self.row}; what is damaged may only show here"):
            with h5py.File(self.file) as f:  # opened here, since an open file does not survive a fork
                image = f["input_image"][self.row]
        return Image.fromarray(square(Image.fromarray(image), size))


def _video_rows(root, videos, paragraph=False):
    """Yield the Row of each of `videos`: (id, split, names that the video may have, captions). Its images are
    frames/<name>/*.jpg (or .png), of a folder with or without a file's ending; paragraph: its captions become
    one."""
    frames = os.path.join(root, "frames")
    folders = list_folder(frames)
    folder_of = {os.path.splitext(name)[0]: name for name in folders} | {name: name for name in folders}
    for id, part, names, captions in videos:
        name = next((folder_of[name] for name in names if name in folder_of), names[0])
        folder = os.path.join(frames, name)
        files = list_folder(folder, (".jpg", ".jpeg", ".png")) or ["*.jpg"]
        captions = [" ".join(caption.split()) for caption in captions]
        if paragraph:
            captions = [" ".join(" ".join(captions).split())]
        yield Row(id, part, [os.path.join(folder, file) for file in files], captions)


def msrvtt(root):
    """MSR-VTT (Xu et al. 2016), the 1k-A split: MSRVTT_data.json (sentences[]: video_id, caption),
    MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv (video_id, sentence). 9,000 training videos of 20 captions,
    val out of them; 1,000 test videos of one sentence each."""
    path = os.path.join(root, "MSRVTT_data.json")
    shape = {"sentences": [{"video_id": str, "caption": str}]}
    captions = defaultdict(list)
    for sentence in read_json(path, shape, "MSR-VTT's {sentences: [{video_id, caption}]}")["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"])
    videos = []
    for part, file, columns in (("train", "MSRVTT_train.9k.csv", ["video_id"]),
                                ("test", "MSRVTT_JSFUSION_test.csv", ["video_id", "sentence"])):
        for _, cell in read_table(os.path.join(root, file), columns, by_line=True):
            video = cell["video_id"].strip()
            texts = [cell["sentence"]] if part == "test" else captions[video]
            videos.append((video, part, [video], texts))
    return _video_rows(root, videos)


def msvd(root):
    """MSVD (Chen and Dolan 2011): {train,val,test}_list.txt, raw-captions.pkl ({video: [[word, ...], ...]}),
    about 40 captions to a video."""
    path = os.path.join(root, "raw-captions.pkl")
    captions = read_pickle(path)
    expect(fits(captions, {str: [list]}), path, "expected {video: captions, each a list of words}")
    videos = []
    for part in SPLITS:
        for (video,) in read_list(os.path.join(root, part + "_list.txt"), 1):
            texts = [" ".join(map(str, words)) for words in captions.get(video, ())]
            videos.append((video, part, [video], texts))
    return _video_rows(root, videos)


def didemo(root):
    """DiDeMo (Hendricks et al. 2017): {train,val,test}_data.json ([{video, description}]), {..}_list.txt. The
    descriptions of exactly the listed name are one paragraph: some videos have a second name with the same
    stem. The stem is taken where the name itself is absent."""
    videos = []
    for part in SPLITS:
        path = os.path.join(root, part + "_data.json")
        by_name = defaultdict(list)
        by_stem = defaultdict(list)
        shape = [{"video": str, "description": str}]
        for moment in read_json(path, shape, "DiDeMo's [{video, description}]"):
            by_name[moment["video"]].append(moment["description"])
            by_stem[os.path.splitext(moment["video"])[0]].append(moment["description"])
        for (name,) in read_list(os.path.join(root, part + "_list.txt"), 1):
            stem = name if name in by_stem else os.path.splitext(name)[0]
            captions = by_name.get(name) or by_stem.get(stem, [])
            videos.append((name, part, [name, stem], captions))
    return _video_rows(root, videos, paragraph=True)


def activitynet(root):
    """ActivityNet Captions (Krishna et al. 2017): train.json, val_1.json ({id: {sentences, timestamps}}),
    train_ids.json, val_ids.json. Test is val_1, val is out of train. A video's sentences are one paragraph.
    Ids carry the prefix v_, with or without which captions and frames are looked for."""
    videos = []
    files = (("train", "train.json", "train_ids.json"), ("test", "val_1.json", "val_ids.json"))
    for part, file, ids in files:
        path = os.path.join(root, file)
        content = read_json(path, {str: {"sentences": [str]}}, "ActivityNet's {id: {sentences: [...]}}")
        for id in read_json(os.path.join(root, ids), [str], "a list of ids"):
            bare = id.removeprefix("v_")
            names = ["v_" + bare, bare]  # the first is the official id, whose hash makes val
            captions = next((content[name]["sentences"] for name in names if name in content), [])
            videos.append((names[0], part, names, captions))
    return _video_rows(root, videos, paragraph=True)


# ---------------------------------------------------------------- pickles

def _bytes(content):
    return content.encode("latin1") if isinstance(content, str) else content  # Python 2's strings


class _Array(np.ndarray):
    """An array while it is read. numpy's own would trust the pickle's type, whose flags can pass bytes off as
    pointers to objects, and read past the end of a list that is too short."""

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        objects = kind.dtype.hasobject
        if objects != isinstance(content, list) or objects and len(content) != math.prod(shape):
            raise ValueError("an array whose content is not of its type or size")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), _bytes(content)))


class _Type:
    """A type while it is read: its code and byte order are taken from the pickle, its flags are not."""

    def __init__(self, code, *flags):
        if not re.fullmatch(r"[?biufcSU]\d{0,6}|O8?", code) or not np.dtype(code).itemsize:
            raise ValueError(f"an array of type {code[:20]!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def read_pickle(path):
    """A pickle of numpy arrays and plain containers (Python 2's too). Anything else is refused, not run."""
    def frombuffer(content, kind, shape, order):
        return np.frombuffer(content, kind.dtype).reshape(shape, order=order)

    admitted = {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): lambda *code: _Type(*code),
        ("numpy", "_reconstruct"): lambda *empty: _Array(0, np.int8),  # what it is follows as its state
        ("numpy", "_frombuffer"): frombuffer,
        ("numpy", "scalar"): lambda kind, content: np.frombuffer(_bytes(content), kind.dtype)[0],
        ("_codecs", "encode"): lambda text, encoding: _bytes(text),
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
    }
    for kind in (bytes, set, list, dict, int, float):  # of Python 3 and of Python 2
        admitted["builtins", kind.__name__] = admitted["__builtin__", kind.__name__] = kind
    advice = "expected a pickle of arrays and plain containers; nothing of it was run"
    with reading(path, advice), open(path, "rb") as f:
        return clip.RestrictedUnpickler(f, admitted, encoding="latin1").load()


# ---------------------------------------------------------------- downloads

TEXT2SHAPE_URL = "http://text2shape.stanford.edu/dataset"
CAPTION_FILE = "captions.tablechair.csv"
VOXEL_FOLDER = "nrrd_256_filter_div_32_solid"
SPLIT_FILES = [f"processed_captions_{split}.p" for split in SPLITS]
TEXT2SHAPE_FILES = {  # path below the URL: what it leaves in the folder
    f"shapenet/{VOXEL_FOLDER}.zip": VOXEL_FOLDER,
    "text2shape-data.zip": SPLIT_FILES[-1],
    CAPTION_FILE: CAPTION_FILE,  # the last: where it is, nothing before it is missing
}


def text2shape_by_hand(root):
    """What to do where Text2Shape cannot be fetched."""
    files = ", ".join(f"{TEXT2SHAPE_URL}/{path}" for path in TEXT2SHAPE_FILES)
    return f"put {files} into {root} by hand and run without --no-download, which unpacks them"


def fetch_missing(name, root=None):
    """Fetch text2shape, and nothing else, into its folder (default data/<name>) where it is not there. A
    folder with captions and with voxels or views is taken as it is, also without the published split."""
    if name != "text2shape":
        return
    root = root or os.path.join("data", name)
    there = set(list_folder(root))
    archives = {os.path.basename(path) for path in TEXT2SHAPE_FILES if path.endswith(".zip")}
    if CAPTION_FILE in there and there & {VOXEL_FOLDER, "views"} and not there & archives:
        return
    note(f"{root}: Text2Shape is not there, or not all of it; fetching it from {TEXT2SHAPE_URL} (at most "
         "2 GB when unpacked; --no-download refuses)")
    for path, result in TEXT2SHAPE_FILES.items():
        file = os.path.join(root, os.path.basename(path))
        if not os.path.exists(file) and not os.path.exists(os.path.join(root, result)):
            try:
                clip.fetch(f"{TEXT2SHAPE_URL}/{path}", file)
            except clip.DownloadError as e:
                raise DataError(f"{e}; {text2shape_by_hand(root)}") from None
        if file.endswith(".zip") and os.path.exists(file):
            unpack(file, root)
            os.unlink(file)  # when all is unpacked, so one that is there still has to be


def unpack(archive, root):
    """Unpack the voxels and splits of a zip into `root`; other names than theirs are not looked at."""
    wanted = re.compile(rf"(?:.*/)?({VOXEL_FOLDER}/(\w+)/\2\.nrrd)|(?:(?!primitives/)[\w-]+/)*"
                        f"({'|'.join(map(re.escape, SPLIT_FILES))})")
    with reading(archive, f"delete it and run the command again; or {text2shape_by_hand(root)}"):
        with zipfile.ZipFile(archive) as z:
            expect(z.testzip() is None, archive, "damaged; delete it and run the command again")
            for name in z.namelist():
                if found := wanted.fullmatch(name):
                    target = os.path.join(root, found[1] or found[3])
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as f:
                        f.write(z.read(name))


# ---------------------------------------------------------------- voxels and their views

def read_nrrd(path):
    """A Text2Shape voxel file: uint8 (n, n, n, 4), axes x, y (up), z, RGBA. Raises DataError.

    NRRD: header, blank line, data."""
    with reading(path, "expected a voxel file of Text2Shape; get it again"), open(path, "rb") as f:
        header, *body = re.split(rb"\r?\n\r?\n", f.read(), maxsplit=1)
        expect(header.startswith(b"NRRD000") and body, path, "not an NRRD file; get it again")
        n, encoding, axes = _nrrd_header(path, header.decode("latin1"))
        body = body[0] if encoding == "raw" else gzip.decompress(body[0])
    expect(len(body) == 4 * n ** 3, path, f"holds {len(body)} bytes of voxels, its sizes need {4 * n ** 3}; "
           "the file is truncated or wrong")
    voxels = np.frombuffer(body, np.uint8).reshape(n, n, n, 4)  # the file's first axis varies fastest
    voxels = voxels.transpose(*2 - abs(axes).argmax(0), 3)
    return np.ascontiguousarray(voxels[tuple(slice(None, None, sign) for sign in axes.sum(0))])


def _nrrd_header(path, header):
    """-> (n, encoding, axes) of the header of a file of n x n x n voxels. axes: 1 or -1 where an axis of the
    file (row) runs along or against x, y, z (column), else 0."""
    fields = {}
    for line in header.split("\n"):
        name, _, value = line.partition(": ")  # a comment or a key:=value has no such name
        fields[name.strip().lower()] = value.strip()
    for name, pattern, expected in (("type", "uint8|unsigned char|uchar|uint8_t", "uint8 RGBA voxels"),
                                    ("sizes", r"4\s+([1-9]\d{0,2})\s+\1\s+\1", "4 n n n, channel and axes"),
                                    ("encoding", "gzip|gz|raw", "gzip or raw, in the same file")):
        value = fields.get(name, "?")
        expect(re.fullmatch(pattern, value), path, f"{name} {value[:100]}; expected {expected}")
    stated = fields.get("space directions", "none (0,1,0) (0,0,1) (1,0,0)")  # as Text2Shape's: y, z, x
    vectors = re.findall(r"\(([^,()]+),([^,()]+),([^,()]+)\)", stated)
    with reading(path, "expected space directions of none and three vectors, along x, y and z in any order"):
        along = np.array(vectors, float)  # (3, 3)
        length = abs(along)
        axes = np.where(length > 1e-3 * length.max(1, keepdims=True), np.sign(along), 0).astype(int)
        one_each = [abs(axes).sum(axis).tolist() == [1, 1, 1] for axis in (0, 1)]
        if not all(one_each) or not stated.startswith("none"):
            raise ValueError(stated[:100])
    return int(fields["sizes"].split()[1]), fields["encoding"], axes


VIEWS = 12  # a turntable: one view every 30 degrees,
ELEVATION = 30.0  # seen from 30 degrees above
LIGHT = np.array([-0.45, 0.6, 0.66])  # unit vector to the light: the camera's right, up, towards the viewer
MARGIN = 4  # empty voxels around a grid: what is blurred ends here


@lru_cache(maxsize=48)  # 3 views, 8 boxes' parities; one size for the model, one for pictures
def _rays(grid, size, view, odd, bulky):
    """-> (pixel, voxel, light). Where the pixels' rays run through a grid and its margin, pixel by pixel and
    front to back, int32 (points,) each: the pixel, and the flat index of the voxel; a ray's first point is in
    the margin. light: float32 (3, 1), along the grid's axes. odd: of each axis, whether (1 or 0) the middle
    of the shape lies half a voxel before that of the grid.

    An orthographic view is no more than this table. Its window is sqrt(2) of the grid's side wide, so that
    what turns fits; for a bulky shape as much as a full grid needs, whose corners would lie above and below.
    """
    azimuth = math.radians(view * 360 / VIEWS)
    elevation = math.radians(ELEVATION)
    level = math.cos(elevation)
    right = np.array([math.cos(azimuth), 0, -math.sin(azimuth)])
    back = -np.array([math.sin(azimuth) * level, math.sin(elevation), math.cos(azimuth) * level])
    up = np.cross(right, back)
    window = (level + math.sqrt(2) * math.sin(elevation) if bulky else math.sqrt(2)) * grid
    side = grid + 2 * MARGIN
    steps = math.ceil(math.sqrt(3) * side)
    pixel = ((np.arange(size) + 0.5) / size - 0.5) * window
    depth = np.arange(steps) - (steps - 1) / 2
    across = pixel[None, :, None, None] * right
    down = pixel[:, None, None, None] * up
    points = across - down + depth[:, None] * back + (side - np.array(odd)) / 2  # (row, column, step, xyz)
    voxel = np.floor(points).astype(np.int32)
    inside = ((voxel >= MARGIN - 1) & (voxel <= side - MARGIN)).all(-1)
    flat = (voxel[..., 0] * side + voxel[..., 1]) * side + voxel[..., 2]
    pixel = inside.reshape(size * size, steps).nonzero()[0].astype(np.int32)
    light = LIGHT @ [right, up, -back]
    return pixel, flat[inside], light[:, None].astype(np.float32)


def render(voxels, view, size):
    """One view of a voxel grid, with its solid part in the middle. voxels: uint8 (n, n, n, 4), x right, y up,
    z to the viewer at view 0; view: 0..11 -> uint8 (size, size, 3).

    Each pixel takes the first voxel of its ray with alpha over 127, white where none is. It is shaded by the
    slope of the blurred solid just before: within a thin plate, that has no slope.
    """
    grid = voxels.shape[0]
    image = np.full((size * size, 3), 255, np.uint8)
    solid = voxels[..., 3] > 127
    if solid.any():
        front = solid.any(0)
        spans = [line.nonzero()[0] for line in (solid.any((1, 2)), front.any(1), front.any(0))]
        box = tuple(slice(span[0], span[-1] + 1) for span in spans)
        turns, view = divmod(view, VIEWS // 4)  # by quarters, so that only the first one's rays are needed
        voxels = np.rot90(voxels[box], turns, (0, 2))
        sides = np.array(voxels.shape[:3])
        side = grid + 2 * MARGIN
        start, odd = np.divmod(side - sides, 2)
        centred = np.zeros((side, side, side), bool)
        centred[tuple(map(slice, start, start + sides))] = np.rot90(solid[box], turns, (0, 2))
        wide, high, deep = sides
        tilt = math.radians(ELEVATION)
        bulky = math.cos(tilt) * high + math.sin(tilt) * math.hypot(wide, deep) > math.sqrt(2) * grid
        pixel, voxel, light = _rays(grid, size, view, tuple(odd.tolist()), bulky)
        points = centred.take(voxel).nonzero()[0]  # those in solid voxels
        first = points[np.diff(pixel[points], prepend=np.int32(-1)) > 0]  # of each pixel that has one
        strides = np.array([[side * side], [side], [1]])
        soft = centred.astype(np.int16).ravel()
        for stride in strides.ravel().tolist() * 4:  # a binomial filter over 5 voxels in each direction
            soft = soft[:-stride] + soft[stride:]
        before = voxel[first - 1] - 2 * strides.sum()
        normal = (soft[before - strides] - soft[before + strides]).astype(np.float32)  # (xyz, pixels)
        length = np.sqrt((normal ** 2).sum(0))
        cosine = (normal * light).sum(0) / np.maximum(length, 1)  # no slope, as in a narrow gap: no light
        shade = 0.55 + 0.45 * np.maximum(cosine, 0)
        x, y, z = np.unravel_index(voxel[first], centred.shape) - start[:, None]
        image[pixel[first]] = voxels[x, y, z, :3] * shade[:, None]
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
CONFIGURATIONS = list(itertools.product(range(6), range(14), range(3), range(3)))  # 756, of indices of TASKS
CAPTIONS = 5
PRIMITIVES_SEED = 2018


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
    shape, colour, height, width = CONFIGURATIONS[number]
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
    for i, (task, value) in enumerate(zip(TASKS, CONFIGURATIONS[number])):
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


def primitives(split, name="primitives", classes=None):
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
    for number, (shape, colour, _, _) in enumerate(CONFIGURATIONS):
        held_out = shape % 3 == colour % 3  # two of the six shapes of every colour: 252 configurations
        part = "primitives-source" if shape < 4 and colour < 10 else "primitives-target"
        if name != part and (name != "primitives" or held_out and split != "unseen"):
            continue
        for sample in samples[split]:
            views = [PrimitiveView(number, sample, view) for view in range(VIEWS)]
            captions = [primitive_caption(number, sample, k)[0] for k in range(CAPTIONS)]
            labels = {task: list(TASKS[task])[value] for task, value in zip(TASKS, CONFIGURATIONS[number])}
            instances.append(Instance(f"{number:03d}-{sample}", views, captions, labels, f"{number:03d}",
                                      query=held_out or split != "unseen"))
    if classes is None:
        classes = {task: list(values) for task, values in TASKS.items()}
    number_labels(instances, classes, name, split)
    return instances, classes


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
    scores = []
    for x, value in zip(instances, values):
        for stated in map(list, primitives_stated(x)):
            fit = (values[:, stated] == value[stated]).all(1)
            scores.append(fit / fit.sum())
    return torch.from_numpy(np.array(scores, np.float32))


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


class SharedTerms:
    """scores(captions (C,), instances (N,)) -> (C, N) in 0..1: the share of a caption's terms that each
    instance has, where rare terms count more:

        score of caption c and instance j = sum of idf(w) over the terms of c that j has / sum over all of c's
        idf(w) = log((instances + 1) / instances that have w)

    of_captions, of_instances: lists of lists of terms, as of `word_terms`.
    """

    def __init__(self, of_captions, of_instances, device):
        count = Counter(term for terms in of_instances for term in terms)
        number = {term: k for k, term in enumerate(count)}

        def padded(rows):
            rows = [torch.tensor([number[term] for term in terms], dtype=torch.int32) for terms in rows]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(number)).to(device)
        self.captions = padded(of_captions)
        self.instances = padded(of_instances)
        idf = [math.log((len(of_instances) + 1) / count[term]) for term in number]
        self.idf = torch.tensor([*idf, 0.0], device=device)  # the last one pads

    def __call__(self, captions, instances):
        terms = self.captions[captions].long()  # (C, most terms)
        weight = self.idf[terms]
        weight = weight / weight.sum(1, keepdim=True)
        has = torch.zeros(len(self.idf), len(instances), device=terms.device)  # (terms, N)
        has[self.instances[instances].long().t(), torch.arange(len(instances), device=terms.device)] = 1
        return F.embedding_bag(terms, has, per_sample_weights=weight, mode="sum")


# ---------------------------------------------------------------- captions, as they are changed for training

CHANGED = 0.2  # share of a caption's words that are changed: of these
MASKED = 0.5  # this share is masked,
REPLACED = 0.1  # this share is replaced, and the rest is dropped


def changed_words(tokens, tokenizer):
    """Training captions with a share of their words masked, replaced or dropped (USER, section 4.1).

    tokens int32 (B, columns) -> the same, in which a caption keeps at least one word. A word is all of its
    tokens. The start symbol, which stands nowhere else, is the mask. Draws from torch's generator.
    """
    out = torch.zeros_like(tokens)
    for row, caption in zip(out.numpy(), tokens.numpy()):
        ids = caption[1:caption.argmax()]  # (L,): between start and end (the largest id)
        ends = np.array([tokenizer.symbols[id].endswith("</w>") for id in ids], bool)
        word = ends.cumsum() - ends  # (L,): the number of the word that each token belongs to
        words = int(word[-1]) + 1 if len(ids) else 0
        chance, kind = torch.rand(2, words).numpy()
        changed = chance < CHANGED
        masked = changed & (kind < MASKED)
        replaced = changed & ~masked & (kind < MASKED + REPLACED)
        dropped = changed & ~masked & ~replaced
        dropped[:1] &= not dropped.all()
        random_ids = torch.randint(0, tokenizer.start, ids.shape, dtype=tokens.dtype).numpy()
        ids = np.where(masked[word], tokenizer.start, ids)
        ids = np.where(replaced[word], random_ids, ids)
        ids = ids[~dropped[word]]
        row[:len(ids) + 2] = [tokenizer.start, *ids, tokenizer.end]
    return out


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
        """As `class_layout` of instances."""
        return self.labels, self.captions, self.query


def read_features(path):
    """Features in place of pictures and texts: a .npz, or a pickle as CLIP4CMR's, of a dict with image (N,
    Di), text (N, Dt), label (N,) and optional ids (N,; default: row numbers). -> the same dict, features
    float32. Raises DataError where they do not fit together."""
    expect_file(path)
    advice = "expected a .npz or .pkl with image (N, Di), text (N, Dt), label (N,) and ids (N,)"
    with reading(path, advice), open(path, "rb") as f:
        pickled = path.endswith((".pkl", ".p", ".pickle"))
        content = read_pickle(path) if pickled else np.load(f, allow_pickle=False)
        arrays = {key: np.asarray(content[key]) for key in ("image", "text", "label")}
        arrays["ids"] = np.asarray(content["ids"] if "ids" in content else np.arange(arrays["label"].size))
    for key in ("image", "text"):
        array = arrays[key]
        expect(array.ndim == 2 and array.dtype.kind in "fiu" and array.size, path,
               f"{key} is {array.dtype} of shape {array.shape}; expected numbers (N, width)")
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            arrays[key] = array.astype(np.float32, copy=False)
        bad = ~np.isfinite(arrays[key]).all(1)
        expect(not bad.any(), path, f"{key} row {bad.argmax()} holds a NaN or an infinite number "
               f"({bad.sum()} such rows); remove them")
    for key in ("label", "ids"):  # integers or strings; a column (N, 1) and whole floats are read too
        array = arrays[key]
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        with np.errstate(invalid="ignore"):
            if array.dtype.kind in "fb" and (array == array.astype(np.int64)).all():
                array = array.astype(np.int64)
        expect(array.ndim == 1 and array.dtype.kind in "iuUSO" and array.size, path,
               f"{key} is {array.dtype} of shape {array.shape}; expected one class or id a row (N,)")
        if array.dtype.kind in "SO":  # Python 2's strings are bytes
            texts = (x.decode("utf-8", "replace") if isinstance(x, bytes) else x for x in array.tolist())
            array = np.array(list(map(str, texts)))
        arrays[key] = array
    for key, array in arrays.items():
        expect(len(array) == len(arrays["label"]), path,
               f"{len(array)} rows of {key}, but {len(arrays['label'])} labels; a row needs all of them")
    return arrays


def feature_splits(paths, root):
    """-> ({"train", "val", "test": Features}, class names) of two files of features; val is the last tenth of
    train by a hash of the id. Rows whose label is not among train's are left out, with a note."""
    train, test = (read_features(os.path.join(root or "", path)) for path in paths)
    for key in ("image", "text"):
        width, test_width = train[key].shape[1], test[key].shape[1]
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
        splits[split] = Features(arrays["image"][known], arrays["text"][known], ones, ones, labels, ones > 0)
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


# ---------------------------------------------------------------- region features

@dataclass(frozen=True)
class RegionView:
    """Row `row` of a file of region features: float32 (regions, width), such as 36 x 2,048 of a detector."""
    path: str
    row: int
    embedding: tuple = None  # (file, row) of CLIP's embedding of the same image, where there is one

    def features(self):
        return np.array(_rows_of(self.path, "regions, width")[self.row], dtype=np.float32)

    def clip_input(self):
        """CLIP's embedding of the image, float32 (D,), where there is one."""
        path, row = self.embedding
        return np.array(_rows_of(path, "D")[row], dtype=np.float32)

    def __call__(self, size):
        raise DataError(f"{self.path}: region features have no picture to show")


@dataclass
class Regions:
    """Region features with CLIP's embedding of the same images, to index both at once."""
    features: torch.Tensor  # (..., regions, width)
    clip_input: torch.Tensor  # (..., D)

    def __getitem__(self, index):
        return Regions(self.features[index], self.clip_input[index])


@lru_cache(maxsize=8)
def _rows_of(path, axes):
    """A memory-mapped .npy file of floats (images, axes)."""
    expect_file(path)
    with reading(path, f"expected a .npy file of floats (images, {axes})"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        expect(array.ndim == axes.count(",") + 2 and array.dtype.kind == "f" and array.size, path,
               f"{array.dtype} of shape {array.shape}; expected floats (images, {axes})")
        return array


def load_regions(name, root, split):
    """As `load`, of region features in place of pictures: <root>/precomp/{train,dev,test}_ims.npy (images,
    36, 2048), memory-mapped, and _caps.txt, five captions to an image, in order (SCAN's files; where each row
    of features stands five times, each fifth is read). COCO's test is `testall` where that is there. CLIP's
    embeddings of the images are read from _clip.npy (images, D), where it is."""
    files = {"train": "train", "val": "dev", "test": "test"}
    expect(split in files, "--regions", f"no split {split!r}; it has {', '.join(files)}")
    base = os.path.join(root or os.path.join("data", name), "precomp", files[split])
    if os.path.exists(base + "all_ims.npy"):
        base += "all"
    elif (name, split) == ("coco", "test"):
        note(f"{base}all_ims.npy is not there: the 1,000 images of {base}_ims.npy are tested, not 5,000")
    _rows_of.cache_clear()
    features = _rows_of(base + "_ims.npy", "regions, width")
    captions = [line.strip() for line in read_lines(base + "_caps.txt")]
    images = len(captions) // 5
    step = len(features) // max(1, images)
    expect(step in (1, 5) and step * images == len(features) and 5 * images == len(captions),
           base + "_ims.npy", f"{len(features)} rows, but {len(captions)} lines in {base}_caps.txt (the "
           f"first: {captions[:1]}); expected five captions to a row")
    for i in np.linspace(0, images - 1, 10).astype(int) * step:
        expect((features[i:i + step] == features[i]).all(), base + "_ims.npy", "as many rows as captions, "
               f"but rows {i} to {i + 4} differ: one caption to an image is not supported, only five are")
    embeddings = base + "_clip.npy" if os.path.exists(base + "_clip.npy") else None
    expect(not embeddings or len(_rows_of(embeddings, "D")) == images, embeddings,
           f"expected a row for each of the {images} images of {base}_caps.txt")
    instances = []
    for i in range(images):
        texts = [caption for caption in captions[5 * i:5 * i + 5] if caption]
        expect(texts, f"{base}_caps.txt line {5 * i + 1}", "five empty captions; an image needs one")
        view = RegionView(base + "_ims.npy", i * step, embeddings and (embeddings, i))
        instances.append(Instance(f"{files[split]}-{i}", [view], texts))
    return instances, {}


# ---------------------------------------------------------------- pictures

OPENAI = clip.MODELS["ViT-B/32"][0]  # its Config says how pictures become pixels where no other is given


def open_image(path):
    """A picture as RGB: EXIF rotation applied, more than 8 bits of grey scaled by their range, transparency
    on white, one frame. Metadata that are broken are ignored."""
    expect_file(path)
    with reading(path, "replace it or remove its row"), open(path, "rb") as f:
        try:
            return _rgb(Image.open(f))
        except Exception as error:
            f.seek(0)
            try:
                return _rgb(Image.open(io.BytesIO(_without_metadata(f.read()))))
            except Exception:
                raise error from None


def expect_whole(image):
    """Raise DataError for a picture of val or test that is cut off, before hours of training and not after: a
    file that does not end as JPEG and PNG do is opened."""
    if isinstance(image, str):
        with open(image, "rb") as f:
            end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(f.read(2))
            f.seek(max(0, os.path.getsize(image) - 64))
            whole = end and end in f.read()
        if not whole:
            open_image(image)


def _rgb(image):
    tiff = image.format == "TIFF"
    image.load()
    with contextlib.suppress(Exception):  # metadata that are broken say nothing of the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # convert("RGB") alone would clip them to white
        levels = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0)
        top = next(top for top in (1, 255, 4095, 65535, levels.max()) if top >= levels.max())
        if tiff and image.mode[:2] == "I;":  # shown as it is stored; others hold what a camera gave
            top = 65535
        image = Image.fromarray((levels * (255 / top)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _without_metadata(content):
    """The bytes of a PNG or a JPEG with those parts alone that make its pixels."""
    png = content.startswith(b"\x89PNG")
    at = 8 if png else 2
    kept = [content[:at]]
    while at < len(content) and (png or content[at + 1] != 0xDA):  # after this mark a JPEG's pixels follow
        size = int.from_bytes(content[at:at + 4] if png else content[at + 2:at + 4], "big")
        end = at + size + (12 if png else 2)
        needed = content[at + 4:at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
        if needed if png else content[at + 1] in (0xEE, *range(0xC0, 0xE0)):  # 0xEE tells the kind of colour
            kept.append(content[at:end])
        at = end
    return b"".join(kept) + content[at:]


def square(image, size, config=OPENAI):
    """RGB picture -> uint8 (size, size, 3): the shorter side is resized, the middle is kept (or, where a
    CLIP's configuration says so, the picture is squashed); the same pixels as torchvision's Resize and
    CenterCrop. Of a very long picture only what is kept is resized (1 x 5,000 would otherwise grow to
    gigabytes); Pillow may then take rows and columns in the other order, and its rounding between the two
    shows."""
    how = Image.Resampling[config.interpolation.upper()]
    if config.squash:
        return np.asarray(image.resize((size, size), how))
    w, h = image.size
    short = min(w, h)
    resize = config.image_resize or size  # of the shorter side
    wide, high = (resize if side == short else int(resize * side / short) for side in (w, h))
    left = round((wide - size) / 2)
    top = round((high - size) / 2)
    if max(w, h) <= 64 * short:
        resized = image.resize((wide, high), how)
        return np.asarray(resized.crop((left, top, left + size, top + size)))
    box = (left * w / wide, top * h / high, (left + size) * w / wide, (top + size) * h / high)
    return np.asarray(image.resize((size, size), how, box=box))


def pixels(image, size, config=OPENAI):
    """A path, or a callable view -> uint8 (size, size, 3)."""
    if callable(image):
        return np.asarray(image(size).convert("RGB"))
    return square(open_image(image), size, config)


RATIOS = (3 / 4, 4 / 3)  # width to height of random crops


def crop_source(path, area):
    """-> uint8 (h, w, 3) to take crops from: the whole picture, made smaller where it has more than `area`
    pixels."""
    image = open_image(path)
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


def random_crop(picture, size, smallest, rng, mirror, config=OPENAI):
    """uint8 (h, w, 3) -> (size, size, 3): a random part of a picture (see `crop_box`), made square, and where
    `mirror` allows it flipped left to right half of the time."""
    left, top, width, height = crop_box(picture.shape[1], picture.shape[0], smallest, rng)
    part = Image.fromarray(picture[top:top + height, left:left + width])
    part = np.asarray(part.resize((size, size), Image.Resampling[config.interpolation.upper()]))
    return part[:, ::-1] if mirror and rng.random() < 0.5 else part


def default_crop(name, instances, pretrained):
    """The smallest share of a picture's area that training crops keep where none is asked for: of photos half
    from scratch and nine tenths with pretrained weights; None, no crops, for shapes, videos and features.
    Photos are images in files, your own data among them."""
    if name in SHAPES_AND_VIDEOS or not all(isinstance(x.images[0], str) for x in instances):
        return None
    return 0.9 if pretrained else 0.5


# ---------------------------------------------------------------- batches

def shared_memory(kind, *shape):
    """An array of zeros that forked workers fill for each other; pages that are not written cost nothing."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(kind).itemsize), kind, size).reshape(shape)


@dataclass(eq=False, repr=False)
class Loader:
    """Batches of instances.

    With `crop`, training shows another random part of a picture in each epoch (see `crop_box`), and half of
    them mirrored, except of instances with a caption that says left or right. It is drawn from the seed, the
    epoch, the instance (or pair) and the view. What the cache keeps is then the whole picture, at a size that
    the smallest crop still fills the model's input: about 3 times its pixels for 0.5, 1.6 times for 0.9.

    A batch is a dict of tensors. An instance with fewer views or captions than asked for has its rest masked.

      images        uint8 (B, V, 3, S, S); of `load_regions` float32 (B, V, regions, width)
      mean_std      float32 (2, 3, 1, 1): the mean and std of the pixels in 0..1 that the CLIP was trained on
      image_mask    bool (B, V)
      tokens        int32 (B, L, context_length)
      caption_mask  bool (B, L)
      caption       int64 (B, L): the number of each among all captions of `instances`
      labels        {task: int64 (B,)}
      index         int64 (B,): the number of each instance
      clip_input    of `load_regions` alone, where it is known: float32 (B, 1, D)
    """
    instances: list  # of Instance
    tokenizer: InitVar[clip.Tokenizer]
    config: clip.Config  # of the CLIP: how texts are cut, how pictures are resized, their mean and std
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
        images = [len(x.images) for x in self.instances]
        captions = [len(x.captions) for x in self.instances]
        self.first_image = np.cumsum([0] + images)
        self.first_caption = np.cumsum([0] + captions)
        self.caption_owner = np.repeat(np.arange(n), captions)
        self.samples = len(self.caption_owner) if self.pairs else n  # that an epoch shows
        expect(self.batch_size % self.world == 0, f"--batch-size {self.batch_size}",
               f"no multiple of the {self.world} processes; choose one that is")
        expect(not self.train or self.batch_size <= self.samples, f"--batch-size {self.batch_size}",
               f"larger than the data set, of {self.samples} training "
               f"{'pairs' if self.pairs else 'instances'}; choose {self.samples} or less")
        texts = [caption for x in self.instances for caption in x.captions]
        context = self.config.context_length
        self.tokens, cut = tokenizer.rows(texts, context)
        if cut:
            note(f"{cut} of {len(texts)} captions are longer than {context} tokens and were cut "
                 "(--context says how many tokens of a text are read)")
        self.labels = {}  # task -> int64 (N,)
        for task in sorted({task for x in self.instances for task in x.labels}):
            self.labels[task] = torch.tensor([x.labels.get(task, -1) for x in self.instances])
        self.regions = n > 0 and isinstance(self.instances[0].images[0], RegionView)  # floats, not pixels
        self.crop = self.crop if self.train and self.crop and self.crop < 1 else None
        expect(not self.crop or isinstance(self.instances[0].images[0], str), "--crop",
               "only pictures in files can be cropped; leave it out")
        self.image_size = self.config.image_resolution  # S
        self.area = self.image_size ** 2  # pixels that are kept of a picture
        if self.crop:
            # the shorter side of the smallest crop is sqrt(area * crop * 3/4); 2 more pixels for rounding
            self.area = math.ceil((self.image_size + 2) ** 2 / (self.crop * RATIOS[0]))
            sided = re.compile(r"\b(left|right)\b", re.IGNORECASE)
            self.mirror = [not any(map(sided.search, x.captions)) for x in self.instances]
        self.cache = None
        total = int(self.first_image[-1])
        if not self.regions and 0 < total * self.area * 3 <= self.cache_bytes:
            self.cache = shared_memory(np.uint8, total, self.area * 3)
            self.sides = shared_memory(np.int32, total, 2)  # height and width; 0 where none is kept yet

    def __getstate__(self):  # workers that are spawned, not forked, do not share it
        return self.__dict__ | {"cache": None, "sides": None}

    def __len__(self):
        """Batches per epoch."""
        return self.samples // self.batch_size if self.train else -(-self.samples // self.batch_size)

    def _decoded(self, i, k):
        """Image k of instance i: uint8 (size, size, 3), or where crops are taken from it (h, w, 3)."""
        at = self.first_image[i] + k
        if self.cache is not None and self.sides[at].all():
            h, w = self.sides[at]
            return self.cache[at, :h * w * 3].reshape(h, w, 3)
        image = self.instances[i].images[k]
        picture = (crop_source(image, self.area) if self.crop
                   else pixels(image, self.image_size, self.config))
        if self.cache is not None:
            self.cache[at, :picture.size] = picture.ravel()
            self.sides[at] = picture.shape[:2]  # after the pixels, so that no worker sees half a picture
        return picture

    def _shown(self, epoch, sample, i, k):
        """What an epoch shows of image k of instance i: uint8 (size, size, 3), or region features."""
        if self.regions:
            return self.instances[i].images[k].features()
        picture = self._decoded(i, k)
        if self.crop:
            # k + 1, because numpy takes numbers that end in 0 for the same as without it: those of `_draw`
            rng = np.random.default_rng([self.seed, epoch, sample, k + 1])
            picture = random_crop(picture, self.image_size, self.crop, rng, self.mirror[i], self.config)
        return picture

    def _draw(self, epoch, sample):
        """-> (instance, numbers of its images, numbers of its captions) that an epoch shows of a sample."""
        rng = np.random.default_rng([self.seed, epoch, sample])
        i = self.caption_owner[sample] if self.pairs else sample
        images = np.arange(self.first_image[i + 1] - self.first_image[i])
        captions = np.arange(self.first_caption[i + 1] - self.first_caption[i])
        if self.frames:
            images = np.linspace(0, len(images) - 1, min(self.frames, len(images))).astype(int)
        elif self.views:
            images = rng.permutation(len(images))[:self.views]
        if self.pairs:
            captions = np.array([sample - self.first_caption[i]])
        elif self.captions:
            captions = rng.permutation(len(captions))[:self.captions]
        return i, images, captions

    def make(self, step):
        """The batch of global step `step` (epoch = step // len(self)), this process's part. It is made from
        (seed, step) alone, so that workers, resumed runs and several processes agree."""
        epoch, at = divmod(step, len(self))
        order = _shuffled(self.samples, self.seed, epoch) if self.train else np.arange(self.samples)
        part = self.batch_size // self.world
        begin = at * self.batch_size + self.rank * part
        samples = order[begin:begin + part]
        drawn = [self._draw(epoch, sample) for sample in samples]
        index = np.array([i for i, _, _ in drawn], np.int64)
        B = len(index)
        V = self.views or max((len(views) for _, views, _ in drawn), default=1)
        L = self.captions or max((len(captions) for _, _, captions in drawn), default=1)
        first = self.instances[0].images[0]
        shape = first.features().shape if self.regions else (self.image_size, self.image_size, 3)
        images = np.zeros((B, V, *shape), np.float32 if self.regions else np.uint8)
        image_mask = np.zeros((B, V), bool)
        caption = np.full((B, L), -1, np.int64)
        for b, (i, views, captions) in enumerate(drawn):
            for v, k in enumerate(views):
                images[b, v] = self._shown(epoch, samples[b], i, k)
            image_mask[b, :len(views)] = True
            caption[b, :len(captions)] = self.first_caption[i] + captions
        caption = torch.from_numpy(caption)
        tokens = torch.zeros(B, L, self.tokens.shape[1], dtype=torch.int32)
        tokens[caption >= 0] = self.tokens[caption[caption >= 0]]
        images = torch.from_numpy(images)
        batch = {
            "images": images if self.regions else images.permute(0, 1, 4, 2, 3),
            "mean_std": torch.tensor([self.config.image_mean, self.config.image_std])[:, :, None, None],
            "image_mask": torch.from_numpy(image_mask),
            "tokens": tokens,
            "caption_mask": caption >= 0,
            "caption": caption,
            "labels": {task: classes[index] for task, classes in self.labels.items()},
            "index": torch.from_numpy(index),
        }
        if self.regions and first.embedding:  # regions are one view of an image
            rows = [self.instances[i].images[0].clip_input() for i in index]
            batch["clip_input"] = torch.from_numpy(np.stack(rows)[:, None])
        return batch

    def _make_or_error(self, step):
        try:
            return self.make(step)
        except DataError as e:  # a worker's exception would arrive wrapped in its traceback
            return e

    def batches(self, start=0, stop=None):
        """Yield the batches of steps start..stop-1, through epochs; stop None: the end of the first."""
        steps = range(start, len(self) if stop is None else stop)
        forked = self.workers and steps and sys.platform == "linux"  # forked workers share the cache
        batches = iter(torch.utils.data.DataLoader(
            steps,
            batch_size=None,
            collate_fn=self._make_or_error,
            num_workers=min(self.workers, len(steps)),
            multiprocessing_context="fork" if forked else None,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator()))  # leaves torch's global generator alone
        try:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            del batches  # ends the workers now, though a traceback may hold this frame


def _ignore_signals(worker):
    """Ctrl-C and SIGTERM reach every process of a run; the main one acts on them and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # looking for cycles would write to every object that a forked worker shares, and so copy it


@atexit.register  # a traceback can hold a loop over batches until then
def _end_workers():
    """Python would send them SIGTERM at exit, which they ignore, and wait for ever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an accident
    for process in workers:
        process.kill()


def to_device(batch, device):
    """The batch on a device, pixels as normalised float32: bytes travel, a quarter of the size.

    Tokens and their mask stay on the CPU, where `encode_text` finds out what to compute. Regions with
    CLIP's embeddings become one `Regions`, as "images".
    """
    moved = dict(batch)
    for key in batch.keys() - {"tokens", "caption_mask", "labels"}:
        moved[key] = batch[key].to(device, non_blocking=True)
    moved["labels"] = {task: labels.to(device, non_blocking=True) for task, labels in batch["labels"].items()}
    if moved["images"].dtype == torch.uint8:
        mean, std = moved["mean_std"] * 255
        moved["images"] = (moved["images"].float() - mean) / std
    if "clip_input" in moved:
        moved["images"] = Regions(moved["images"], moved.pop("clip_input"))
    return moved


# ---------------------------------------------------------------- the names that `load` knows

SHAPES_AND_VIDEOS = ("text2shape", "msrvtt", "msvd", "didemo", "activitynet")  # whose files are no photos

DATA_SETS = {  # each a function of the root that yields Rows; the built-in shapes are made by `primitives`
    "primitives": primitives,
    "primitives-source": primitives,
    "primitives-target": primitives,
    "text2shape": text2shape,
    **{name: partial(karpathy, name=name) for name in KARPATHY},
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
