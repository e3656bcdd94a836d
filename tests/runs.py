"""What tests of whole runs share: a small data set, commands, comparisons bit for bit, and a program that interrupts runs at bad moments."""
import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import eval

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50), "white": (245, 245, 245),
           "black": (10, 10, 10), "pink": (250, 150, 190), "brown": (120, 70, 30)}
FILES = ["best.pt", "config.json", "last.pt", "log.jsonl", "metrics.json"]  # of a finished run


@contextlib.contextmanager
def kept_signals():
    """main() notes Ctrl-C and SIGTERM instead of stopping; what it leaves behind in this process is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """For every test of a module that imports this: main() may be called. Waiting for the disk is left out: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    with kept_signals():
        yield


def make_squares(folder):
    """24 / 8 / 8 two-coloured squares, two views and two or three captions each, with the tasks `inner` and `outer`: every class three times
    in train, but every tenth row without `outer`. Returns the path of the .jsonl file."""
    names, rows = list(COLOURS), []
    for i in range(40):
        outer, inner = names[i % 8], names[(i % 8 + 1 + i // 8) % 8]
        for view in range(2):
            picture = np.full((24, 24, 3), COLOURS[outer], np.uint8)
            picture[6 + view:16 + view, 8:18] = COLOURS[inner]
            Image.fromarray(picture).save(os.path.join(folder, f"{i}-{view}.png"))
        captions = [f"a {inner} square on {outer}", f"{outer} around {inner}", f"the frame is {outer} and the middle {inner}"]
        rows.append({"id": f"s{i}", "images": [f"{i}-0.png", f"{i}-1.png"], "captions": captions[:2 + i % 2],
                     "labels": {"inner": inner} | ({"outer": outer} if i % 10 != 3 else {}),
                     "split": "train" if i < 24 else "val" if i < 32 else "test"})
    path = os.path.join(folder, "squares.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def command(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300, **more)


def refused(capsys, argv, main):
    """Run main as the script does; it must end with exit code 2 and one line, which is returned."""
    argv = [str(a) for a in argv]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, eval.one_line_errors():
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and lines[-1].startswith("error: ") and len(lines[-1]) < 600
    assert all(line.startswith(("note: ", argv[1] if len(argv) > 1 else "-", "epoch ", "step ")) for line in lines[:-1]), lines
    return lines[-1]


def assert_same(a, b):
    """Two values of a checkpoint, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("out", "resume", "workers"):
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    """Weights, optimizer, state and settings of last.pt and best.pt, and the log and the metrics of two folders, bit for bit."""
    for name in ("last.pt", "best.pt"):
        assert_same(clip.load_checkpoint(a / name), clip.load_checkpoint(b / name))
    for name in ("log.jsonl", "metrics.json"):
        assert (a / name).read_text() == (b / name).read_text()
    assert sorted(os.listdir(b)) == FILES


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for(process, condition):
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None, process.communicate()
