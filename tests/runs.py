"""What tests of whole runs share: small data, commands, comparisons bit for bit, interrupted processes."""
import contextlib
import importlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import clip
import data
import eval

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50),
           "white": (245, 245, 245), "black": (10, 10, 10), "pink": (250, 150, 190), "brown": (120, 70, 30)}
FILES = ["best.pt", "config.json", "last.pt", "log.jsonl", "metrics.json"]  # of a finished run
TINY = clip.MODELS["tiny"]
SMALL = (replace(TINY[0], embed_dim=32, vision_width=32, vision_layers=1, vision_heads=1,
                 transformer_width=32, transformer_layers=1, transformer_heads=1), None)


# ---------------------------------------------------------------- fixtures

@contextlib.contextmanager
def kept_signals():
    """main() notes Ctrl-C and SIGTERM instead of stopping; what it leaves in this process is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """For every test of a module that imports this: main() may be called. No test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(data, "_noted", set())
    with kept_signals():
        yield


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("squares"))


def make_squares(folder):
    """24 / 8 / 8 two-coloured squares, two views and two or three captions each, with the tasks `inner` and
    `outer`; every tenth row has no `outer`. Returns the path of the .jsonl file."""
    names = list(COLOURS)
    rows = []
    for i in range(40):
        outer = names[i % 8]
        inner = names[(i % 8 + 1 + i // 8) % 8]
        for view in range(2):
            picture = np.full((24, 24, 3), COLOURS[outer], np.uint8)
            picture[6 + view:16 + view, 8:18] = COLOURS[inner]
            Image.fromarray(picture).save(os.path.join(folder, f"{i}-{view}.png"))
        captions = [f"a {inner} square on {outer}", f"{outer} around {inner}",
                    f"the frame is {outer} and the middle {inner}"]
        labels = {"inner": inner}
        if i % 10 != 3:
            labels["outer"] = outer
        rows.append({"id": f"s{i}", "images": [f"{i}-0.png", f"{i}-1.png"], "captions": captions[:2 + i % 2],
                     "labels": labels, "split": "train" if i < 24 else "val" if i < 32 else "test"})
    path = os.path.join(folder, "squares.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def make_features(folder):
    """train.npz and test.npz: 19 / 5 / 12 noisy features of four classes (5: the hash of their ids)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 22))
    for name, rows in (("train", 24), ("test", 12)):
        label = np.arange(rows) % 4
        noisy = centres[label] + 0.5 * rng.normal(size=(rows, 22))
        np.savez(os.path.join(folder, f"{name}.npz"), image=noisy[:, :12], text=noisy[:, 12:], label=label,
                 ids=[f"row{i}" for i in range(rows)])


# ---------------------------------------------------------------- commands and what they leave

def arguments(squares, *more):
    """Three epochs of three steps, in this process alone."""
    return ["--data", str(squares), "--clip", "tiny", "--batch-size", "8", "--epochs", "3",
            "--eval-every", "1", "--vocab-size", "600", "--image-size", "16", "--crop", "0", "--workers", "0",
            "--device", "cpu", "--amp", "off", *map(str, more)]


def command(*words):
    """Run `python *words` as a user does. Nothing it started is left behind, whatever happens here."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        kill_group(process.pid)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def kill_group(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def refused(capsys, argv, main):
    """Run main as the script does; it must end with exit code 2 and one line, which is returned."""
    argv = [str(a) for a in argv]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, eval.one_line_errors():
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and lines[-1].startswith("error: ") and len(lines[-1]) < 900
    expected = ("CLIP ", "note: ", argv[1] if len(argv) > 1 else "-", "epoch ", "step ")
    assert all(line.startswith(expected) for line in lines[:-1]), lines
    return lines[-1]


def spy(patch, owner, name, record=lambda result, *a, **k: a):
    """A list that gets record(result, *arguments) of every call of a function from here on."""
    plain = getattr(owner, name)
    calls = []

    def function(*a, **k):
        result = plain(*a, **k)
        calls.append(record(result, *a, **k))
        return result
    patch.setattr(owner, name, function)
    return calls


def evaluated(checkpoints, *more):
    """Run the evaluation command on a checkpoint or on several."""
    files = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    eval.main(["--checkpoint", *map(str, files), "--device", "cpu", "--amp", "off", *map(str, more)])


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Two values of a checkpoint, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"out", "resume", "workers"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    """Weights, optimizer, state and settings of both checkpoints, the log and the metrics."""
    for name in ("last.pt", "best.pt"):
        assert_same(clip.load_checkpoint(a / name), clip.load_checkpoint(b / name))
    assert timeless(log(a)) == timeless(log(b)), (timeless(log(a)), timeless(log(b)))
    assert (a / "metrics.json").read_text() == (b / "metrics.json").read_text()
    assert set(os.listdir(b)) - {"costs.json"} == set(FILES)  # costs: seconds and memory, of train_adapter.py


def timeless(rows):
    """The rows of a log without what the machine's speed decides."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---------------------------------------------------------------- processes that are interrupted

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def half_a_file(save, a, k):
    complete = io.BytesIO()
    save(a[0], complete)
    a[1].write(complete.getvalue()[:len(complete.getvalue()) // 2])
    a[1].flush()
    die()


def full_at(size):
    """From here on no file can grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def log_full(a):
    full_at(os.path.getsize(os.path.join(a[0], "log.jsonl")) + 9)


def from_outside(number):
    """A signal to this process and its workers, which another sends, as a scheduler or a terminal."""
    group, pid = os.getpid(), os.fork()
    if not pid:
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(pid, 0)


def of_process(rank, number):
    if os.environ["RANK"] == str(rank):
        die(number)


def instead(act):
    return lambda function, a, k: act()


def before(act):
    return lambda function, a, k: (act(a), function(*a, **k))[1]


def after(act):
    return lambda function, a, k: (function(*a, **k), act(a))[0]


# case -> (the step that last.pt must be at after it, with three epochs of three steps,
#          at which call of which function, what happens instead of, before or after it)
STEP, SAVE, LOG, REPORT = "average_gradients", "save", "log_line", "report"
KILLED = {
    "at the first step": (0, STEP, 1, instead(die)),
    "in the middle of an epoch without a save": (3, STEP, 5, instead(die)),
    "in the middle of an epoch": (4, STEP, 5, instead(die)),
    "while writing last.pt": (3, SAVE, 6, half_a_file),
    "while writing best.pt": (2, SAVE, 4, half_a_file),
    "between best.pt and the log": (2, LOG, 1, instead(die)),
    "between the log and last.pt": (5, LOG, 2, after(lambda a: die())),
    "before the report": (9, REPORT, 1, instead(die)),
}
STOPPED = {
    "Ctrl-C": (5, STEP, 5, before(lambda a: die(signal.SIGINT))),
    "SIGTERM": (5, STEP, 5, before(lambda a: die(signal.SIGTERM))),
    "Ctrl-C while logging": (3, LOG, 1, after(lambda a: die(signal.SIGINT))),
    "SIGTERM to its workers too": (5, STEP, 5, before(lambda a: from_outside(signal.SIGTERM))),
    "SIGTERM to the second process": (5, STEP, 5, before(lambda a: of_process(1, signal.SIGTERM))),
}
LOST = {  # one of two processes is killed, and the other one stops
    "the first process": (4, STEP, 5, before(lambda a: of_process(0, signal.SIGKILL))),
    "the second process": (4, STEP, 5, before(lambda a: of_process(1, signal.SIGKILL))),
}
FULL = {
    "a disk that fills up": (4, STEP, 5, before(lambda a: full_at(1 << 13))),
    "a disk full for the log": (5, LOG, 2, before(log_full)),
}
CASES = KILLED | STOPPED | FULL | LOST
# in these cases last.pt is written as seldom as in a real run, in all others after every step
SELDOM = ("at the first step", "in the middle of an epoch without a save", *STOPPED)


def interrupt(case):
    """Let this process meet its case."""
    _, name, count, act = CASES[case]
    module = torch if name == SAVE else eval
    function = getattr(module, name)
    calls = []

    def changed(*a, **k):
        calls.append(name)
        return act(function, a, k) if len(calls) == count else function(*a, **k)
    setattr(module, name, changed)
    eval.SAVE_SECONDS = 300 if case in SELDOM else 0


def become(script, argv, case, still):
    """Be the command `python <script>.py <argv>`, with its `case` where there is one."""
    code = 1
    try:
        os.setpgid(0, 0)  # a process group with its workers
        torch.cuda.is_available = lambda: False  # which would not outlive the fork
        signal.alarm(300)  # a run that waits for ever is killed
        sys.argv = [f"{script}.py", *argv]
        if os.environ.get("RANK", "0") != "0":
            clip.write_file = eval.log_line = None  # only the first process writes
        if case or still:  # in a module that can be reached, with the script's last lines
            module = importlib.import_module(script)
            if case:
                interrupt(case)
            if still:  # nothing is drawn in a step, since each of several processes would draw its own
                data.CHANGED = 0.0
                module.DROPOUT = 0.0
            with eval.one_line_errors():
                module.main()
        else:
            runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
        assert not dist.is_initialized()  # one of several processes has ended by itself
        code = 0
    except BaseException as e:
        code = eval.exit_code(e)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forked(script, argv, case=None, processes=1, still=False):
    """Fork the processes of a run, since importing takes seconds and a short run does not. Each really ends
    by its signal. -> for each how it ended, its stdout, its stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = {}  # pid -> (its stdout, its stderr)
    for rank in range(processes):
        pipes = os.pipe(), os.pipe()  # no files: these may be full
        pid = os.fork()
        if not pid:
            os.dup2(pipes[0][1], 1)
            os.dup2(pipes[1][1], 2)
            sys.stdout, sys.stderr = (os.fdopen(file, "w", closefd=False) for file in (1, 2))
            if processes > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
                               "MASTER_PORT": port}
            become(script, argv, case, still)
        for _, write in pipes:
            os.close(write)
        children[pid] = [open(read) for read, _ in pipes]
    answer = []
    for pid, (out, err) in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        kill_group(pid)  # workers that a killed process has left
        with out, err:
            answer.append((code, out.read(), err.read()))
    return answer
