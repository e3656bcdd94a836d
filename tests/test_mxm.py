"""Tests of train_mxm.py: whole runs on a small data set, killed and resumed, on two processes, with bad input; then eval.py on a result.

    python -m pytest tests/test_mxm.py
"""
import ast
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import eval
import train_mxm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50), "white": (245, 245, 245),
           "black": (10, 10, 10), "pink": (250, 150, 190), "brown": (120, 70, 30)}


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """main() notes Ctrl-C instead of stopping; what tests in this process leave behind is undone. Waiting for the disk is left out
    here: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """24 / 8 / 8 two-coloured squares, two views and two or three captions each; returns the path of the .jsonl file."""
    folder, names, rows = tmp_path_factory.mktemp("squares"), list(COLOURS), []
    for i in range(40):
        outer, inner = names[i % 8], names[(i % 8 + 1 + i // 8) % 8]
        for view in range(2):
            picture = np.full((24, 24, 3), COLOURS[outer], np.uint8)
            picture[6 + view:16 + view, 8:18] = COLOURS[inner]
            Image.fromarray(picture).save(folder / f"{i}-{view}.png")
        captions = [f"a {inner} square on {outer}", f"{outer} around {inner}", f"the frame is {outer} and the middle {inner}"]
        rows.append({"id": f"s{i}", "images": [f"{i}-0.png", f"{i}-1.png"], "captions": captions[:2 + i % 2],
                     "split": "train" if i < 24 else "val" if i < 32 else "test"})
    (folder / "squares.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "squares.jsonl")


def arguments(squares, *more):
    """Three epochs of three steps, in this process alone."""
    return ["--data", str(squares), "--batch-size", "8", "--epochs", "3", "--eval-every", "1", "--vocab-size", "600", "--image-size", "16",
            "--workers", "0", "--device", "cpu", "--amp", "off", *map(str, more)]


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """The run that others are compared with, never interrupted; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_mxm.main(arguments(squares, "--out", out))
    signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])
    return out


def command(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300, **more)


def refused(capsys, argv, main=train_mxm.main):
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
    assert sorted(os.listdir(b)) == ["best.pt", "config.json", "last.pt", "log.jsonl", "metrics.json"]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a run

def test_the_command_trains_reports_and_is_deterministic(squares, whole, tmp_path):
    """The real command, with a worker process: the same bits as the run in this process, and a table at the end."""
    done = command("train_mxm.py", *arguments(squares, "--out", tmp_path / "run", "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "run")
    assert "text-to-image" in done.stdout and "test model" in done.stdout and "test chance" in done.stdout and f"written to {tmp_path}" in done.stdout
    assert "24 instances, 2 views x 2 captions" in done.stderr and "step 9/9" in done.stderr and "\x1b" not in done.stderr
    lines, config = log(whole), json.loads((whole / "config.json").read_text())
    assert [(r["step"], r["epoch"]) for r in lines] == [(3, 1), (6, 2), (9, 3)] and lines[2]["loss"] < lines[0]["loss"]
    assert config["epochs"] == 3 and config["loss"] == "hybrid" and config["lr"] == train_mxm.SCRATCH["lr"]
    best, metrics = clip.load_checkpoint(whole / "best.pt"), json.loads((whole / "metrics.json").read_text())
    assert best["state"]["best"] == max(r["val"]["rSum"] for r in lines) and best["method"] == "train_mxm"
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    assert eval.evaluate(model, data.load(squares, split="test")[0], tokenizer, "off") == metrics["test"]["model"]
    assert metrics["test"]["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 8)


def test_it_learns(squares, tmp_path):
    """Twenty epochs are enough to tell training squares apart: the loss falls by far, and far more than chance is found."""
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 20, "--eval-every", 20))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and len(lines) == 20 and sum("val" in r for r in lines) == 1
    model, tokenizer, _ = eval.restore(tmp_path / "last.pt", "cpu")
    found = eval.evaluate(model, data.load(squares, split="train")[0], tokenizer, "off")
    assert min(found[way]["R@1"] for way in ("text_to_image", "image_to_text")) > 40  # chance: 4


def test_another_seed_is_another_run(squares, whole, tmp_path):
    train_mxm.main(arguments(squares, "--out", tmp_path, "--seed", 1))
    a, b = (clip.load_checkpoint(out / "last.pt")["clip"]["state_dict"] for out in (whole, tmp_path))
    assert not torch.equal(a["visual.conv1.weight"], b["visual.conv1.weight"])


def test_best_is_the_best_on_val_and_is_what_the_report_is_about(squares, tmp_path, monkeypatch):
    sums, plain = iter((90.0, 300.0, 200.0)), eval.evaluate
    monkeypatch.setattr(eval, "evaluate", lambda *a: plain(*a) | {"rSum": next(sums)})
    monkeypatch.setattr(train_mxm, "report", lambda *a: None)
    train_mxm.main(arguments(squares, "--out", tmp_path))
    best, last = clip.load_checkpoint(tmp_path / "best.pt"), clip.load_checkpoint(tmp_path / "last.pt")
    assert best["step"] == 6 and last["step"] == 9 and last["state"]["best"] == best["state"]["best"] == 300
    monkeypatch.undo()
    train_mxm.main(arguments(squares, "--out", tmp_path, "--resume"))  # nothing left but the report
    model, tokenizer, _ = eval.restore(tmp_path / "best.pt", "cpu")
    expected = eval.evaluate(model, data.load(squares, split="test")[0], tokenizer, "off")
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["model"] == expected


@pytest.mark.parametrize("loss", ["hard", "hard-uniform", "soft", "clip", "mil-nce"])
def test_every_loss_runs(loss, squares, whole, tmp_path, capsys):
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 1, "--loss", loss))
    assert ("1 views x 1 captions" if loss == "clip" else "2 views x 2 captions") in capsys.readouterr().err
    assert math.isfinite(log(tmp_path)[0]["loss"]) and log(tmp_path)[0]["loss"] != log(whole)[0]["loss"]


def test_clip_loss_of_several_pairs_of_an_instance(squares, tmp_path, monkeypatch):
    seen, plain = [], train_mxm.losses.clip_loss
    monkeypatch.setattr(train_mxm.losses, "clip_loss", lambda images, texts, scale: seen.append((images, texts)) or plain(images, texts, scale))
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 1, "--loss", "clip", "--views", 2, "--captions", 2))
    assert [(len(i), len(t)) for i, t in seen] == [(16, 16)] * 3


def test_soft_weight_ramps_up(squares, tmp_path, monkeypatch):
    weights, plain = [], train_mxm.losses.mxm_loss
    monkeypatch.setattr(train_mxm.losses, "mxm_loss", lambda *a: weights.append(a[5]) or plain(*a))
    train_mxm.main(arguments(squares, "--out", tmp_path / "a", "--soft-weight", 0.8, "--soft-warmup", 0.5))
    assert weights == pytest.approx([0.8 * min(1, step / 4.5) for step in range(9)])
    weights.clear()
    train_mxm.main(arguments(squares, "--out", tmp_path / "b", "--epochs", 1, "--soft-weight", 0.8, "--soft-warmup", 0))
    assert weights == [0.8] * 3


def test_soft_relation_of_features_or_of_groups(squares, tmp_path, monkeypatch):
    seen, plain = [], train_mxm.losses.soft_loss
    monkeypatch.setattr(train_mxm.losses, "soft_loss", lambda *a: seen.append(a[5]) or plain(*a))
    short = ("--epochs", 1, "--loss", "soft")
    train_mxm.main(arguments(squares, "--out", tmp_path / "a", *short, "--soft-sharpness", 1))
    train_mxm.main(arguments(squares, "--out", tmp_path / "b", *short, "--soft-sharpness", 4))
    train_mxm.main(arguments(squares, "--out", tmp_path / "c", *short, "--soft-relation", "group"))
    assert seen[0].shape == (8, 8) and seen[0].diagonal().mean() < seen[3].diagonal().mean() < 1  # the same weights, sharpened
    assert all(torch.equal(relation, torch.eye(8)) for relation in seen[6:])  # each instance is a group of its own here


def test_starts_from_a_file_of_weights(squares, whole, tmp_path, capsys):
    model = eval.restore(whole / "best.pt", "cpu")[0]
    for merges, name in ((None, "weights.pt"), (model.tokenizer.merges, "own.pt")):
        clip.save(model, tmp_path / name)
    line = None
    try:  # weights alone bring no tokenizer: OpenAI's is needed, which may not be at hand here
        clip.default_tokenizer()
    except clip.CheckpointError as e:
        line = str(e)
    if line:
        assert line in refused(capsys, arguments(squares, "--out", tmp_path / "run", "--clip", tmp_path / "weights.pt"))
    train_mxm.main(arguments(squares, "--out", tmp_path / "run", "--clip", whole / "best.pt", "--epochs", 1))  # a checkpoint brings its own
    config, after = json.loads((tmp_path / "run" / "config.json").read_text()), clip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert config["lr"] == train_mxm.PRETRAINED["lr"]
    for key, value in model.state_dict().items():  # it started there: three small steps later it is still near
        assert (after["clip"]["state_dict"][key] - value).abs().max() < 1e-4
    assert after["clip"]["merges"] == model.tokenizer.merges


# ---------------------------------------------------------------- killed, stopped, full

# Imports once, then forks a process for every case: each really ends by the signal, at the worst moments.
CASES = '''
import io, json, os, resource, signal, sys
import torch
import clip, eval, losses, train_mxm

def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def at_call(module, name, count, act):
    """At call `count` of module.name do act(the function, its arguments) instead."""
    plain, calls = getattr(module, name), [0]
    def function(*a, **k):
        calls[0] += 1
        return act(plain, a, k) if calls[0] == count else plain(*a, **k)
    setattr(module, name, function)

def half_a_file(plain, a, k):
    whole = io.BytesIO()
    plain(a[0], whole)
    file = a[1] if hasattr(a[1], "write") else open(a[1], "wb")
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    die()

def half_a_line(plain, a, k):
    with open(os.path.join(a[0], "log.jsonl"), "a") as f:
        f.write('{"step": 6, "lo')
        f.flush()
        die()

def prepare(case):
    if case != "at the first step":
        train_mxm.SAVE_SECONDS = 0  # save at every step
    step = lambda count, act: at_call(losses, "average_gradients", count, act)
    kill = lambda plain, a, k: die()
    if case in ("at the first step", "in the middle of an epoch without a save"):
        train_mxm.SAVE_SECONDS = 300
        step(1 if case == "at the first step" else 5, kill)
    elif case == "in the middle of an epoch":
        step(5, kill)
    elif case == "while writing last.pt":
        at_call(torch, "save", 6, half_a_file)
    elif case == "while writing best.pt":
        at_call(torch, "save", 4, half_a_file)
    elif case == "between best.pt and the log":
        at_call(eval, "log_line", 1, kill)
    elif case == "while writing the log":
        at_call(eval, "log_line", 2, half_a_line)
    elif case == "between the log and last.pt":
        at_call(eval, "log_line", 2, lambda plain, a, k: (plain(*a, **k), die()))
    elif case == "before the report":
        at_call(train_mxm, "report", 1, kill)
    elif case in ("Ctrl-C", "SIGTERM"):
        train_mxm.SAVE_SECONDS = 300
        step(5, lambda plain, a, k: (die(signal.SIGINT if case == "Ctrl-C" else signal.SIGTERM), plain(*a, **k)))
    elif case == "Ctrl-C while logging":
        train_mxm.SAVE_SECONDS = 300
        at_call(eval, "log_line", 1, lambda plain, a, k: (plain(*a, **k), die(signal.SIGINT)))
    elif case == "a disk that fills up":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        step(5, lambda plain, a, k: (resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY)), plain(*a, **k)))
    elif case == "a disk full for the log":
        at_call(eval, "log_line", 2, lambda plain, a, k: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(os.path.join(a[0], "log.jsonl")) + 9, resource.RLIM_INFINITY)), plain(*a, **k)))

def fork(case, argv, errors):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        torch.set_num_threads(1)
        prepare(case)
        with eval.one_line_errors():
            train_mxm.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

os.fsync = lambda file: None  # a kill needs no waiting for the disk
folder, argv = sys.argv[1], sys.argv[2:]
results = {}
for case in json.load(open(folder + "/cases.json")):
    out = os.path.join(folder, case)
    ended = fork(case, [*argv, "--out", out], os.path.join(folder, "stderr"))
    said, step, files = open(os.path.join(folder, "stderr")).read(), clip.load_checkpoint(out + "/last.pt")["step"], sorted(os.listdir(out))
    resumed = fork("", [*argv, "--out", out, "--resume"], os.path.join(folder, "stderr"))
    results[case] = dict(ended=ended, said=said, step=step, files=files, resumed=resumed, then=open(os.path.join(folder, "stderr")).read())
json.dump(results, open(folder + "/results.json", "w"))
'''
KILLED = {"at the first step": 0, "in the middle of an epoch without a save": 3, "in the middle of an epoch": 4, "while writing last.pt": 3,
          "while writing best.pt": 2, "between best.pt and the log": 2, "while writing the log": 5, "between the log and last.pt": 5, "before the report": 9}
STOPPED = {"Ctrl-C": 5, "SIGTERM": 5, "Ctrl-C while logging": 3}
FULL = {"a disk that fills up": 4, "a disk full for the log": 5}


@pytest.fixture(scope="module")
def cases(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cases.py").write_text(CASES)
    (folder / "cases.json").write_text(json.dumps([*KILLED, *STOPPED, *FULL]))
    done = command(folder / "cases.py", folder, *arguments(squares))
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", [*KILLED, *STOPPED, *FULL])
def test_interrupted_then_resumed_equals_never_interrupted(case, cases, whole):
    folder, results = cases
    r = results[case]
    assert r["step"] == (KILLED | STOPPED | FULL)[case]  # last.pt could be loaded, and is as new as was promised
    if case in KILLED:
        assert r["ended"] == -signal.SIGKILL
    elif case in STOPPED:
        assert r["ended"] == 130 and f"stopped at step {r['step']}; the same command with --resume goes on" in r["said"].splitlines()[-1]
    else:
        last = r["said"].splitlines()[-1]
        assert r["ended"] == 2 and last.startswith("error: ") and "cannot be written" in last and "Traceback" not in r["said"]
        assert not [name for name in r["files"] if name.startswith(".writing")]
    assert r["resumed"] == 0, r["then"]
    assert_same_run(whole, folder / case)


def wait_for(process, condition):
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None, process.communicate()


def test_the_command_killed_from_outside_then_resumed_then_ended_by_a_scheduler(squares, tmp_path):
    words = [sys.executable, "train_mxm.py", *arguments(squares, "--out", tmp_path, "--epochs", 2000, "--eval-every", 2000)]
    start = lambda *more: subprocess.Popen([*words, *more], cwd=ROOT, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                            start_new_session=True)
    lines = lambda: len((tmp_path / "log.jsonl").read_text().splitlines()) if (tmp_path / "log.jsonl").exists() else 0
    process = start()
    wait_for(process, lambda: lines() >= 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = clip.load_checkpoint(tmp_path / "last.pt")["step"]
    assert 3 <= step < 6000
    process = start("--resume", "--workers", "1")
    wait_for(process, lambda: lines() >= step // 3 + 2)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler, or a terminal's Ctrl-C: the worker gets it too
    _, said = process.communicate()
    assert process.returncode == 130 and "--resume goes on" in said.splitlines()[-1] and "Traceback" not in said
    after = clip.load_checkpoint(tmp_path / "last.pt")["step"]
    assert after >= step + 6 and f"stopped at step {after};" in said
    assert [r["step"] for r in log(tmp_path)] == list(range(3, after + 1, 3))  # nothing twice, nothing missing


def test_resume_refuses_what_is_no_continuation(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    resume = arguments(squares, "--out", tmp_path / "run", "--resume")
    for name, value in (("lr", 0.5), ("epochs", 4), ("seed", 3), ("loss", "hard"), ("captions", 1), ("soft-weight", 0.1)):
        line = refused(capsys, [*resume, f"--{name}", value])
        assert f"--{name} was" in line and f"is {value} now" in line
    assert "there is no" in refused(capsys, arguments(squares, "--out", tmp_path / "nothing", "--resume"))
    (tmp_path / "run" / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:5000])
    assert "last.pt: is damaged" in refused(capsys, resume)
    for name in ("log.jsonl", "best.pt", "metrics.json"):  # what was refused has touched nothing
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_is_moved_aside_and_resumes_to_its_report(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    os.unlink(tmp_path / "run" / "metrics.json")
    train_mxm.main(arguments(squares, "--out", tmp_path / "run", "--resume"))
    assert_same_run(whole, tmp_path / "run")
    train_mxm.main(arguments(squares, "--out", tmp_path / "run", "--epochs", 1))
    assert_same_run(whole, tmp_path / "run.1")
    assert "moved to" in capsys.readouterr().err and len(log(tmp_path / "run")) == 1


def test_a_loss_that_is_nan_stops_before_the_weights_take_it_up(squares, tmp_path, monkeypatch):
    plain, calls = train_mxm.losses.mxm_loss, []

    class InfiniteGradient(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * math.inf)
    for name, spoil in (("loss", lambda x: x * math.nan), ("gradient", InfiniteGradient.apply)):
        calls.clear()
        monkeypatch.setattr(train_mxm.losses, "mxm_loss",
                            lambda *a: (calls.append(0), spoil(plain(*a)) if len(calls) == 6 else plain(*a))[1])
        with pytest.raises(SystemExit, match="at step 5; try a lower --lr"):
            train_mxm.main(arguments(squares, "--out", tmp_path / name))
        checkpoint = clip.load_checkpoint(tmp_path / name / "last.pt")
        assert checkpoint["step"] == 3 and all(v.isfinite().all() for v in checkpoint["clip"]["state_dict"].values())


# ---------------------------------------------------------------- several processes

def test_two_processes_equal_one(squares, tmp_path):
    """torchrun on two processes with half the batch each: gradients (a tenth of each step's is in Adam's first moment) and weights are
    one process's to 1e-5; instances have two and three captions; one set of files; one table."""
    argv = arguments(squares, "--captions", 3, "--soft-warmup", 0, "--batch-size", 12, "--epochs", 1)
    train_mxm.main([*argv, "--out", str(tmp_path / "1")])
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_mxm.py", *argv, "--out", tmp_path / "2")
    assert done.returncode == 0, done.stderr
    one, two = (clip.load_checkpoint(tmp_path / world / "last.pt") for world in "12")
    assert sorted(os.listdir(tmp_path / "2")) == ["best.pt", "config.json", "last.pt", "log.jsonl", "metrics.json"]
    assert done.stdout.count("text-to-image") == 1 and done.stderr.count("M parameters") == 1
    assert one["step"] == two["step"] == 2
    for a, b in zip(log(tmp_path / "1"), log(tmp_path / "2")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for i, a in one["optimizer"]["state"].items():
        a, b = a["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
        assert (a - b).abs().max() <= 1e-5 * max(a.abs().max(), 1e-5)
    for key, a in one["clip"]["state_dict"].items():
        assert (a - two["clip"]["state_dict"][key]).abs().max() <= 1e-5 * max(1, a.abs().max()), key


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("option, value, says", [
    ("--epochs", 0, "not a positive whole number"), ("--batch-size", -8, "not a positive whole number"), ("--lr", 0, "not a positive number"),
    ("--lr", "nan", "not a positive number"), ("--lr", "fast", "--lr"), ("--weight-decay", -0.1, "0 or more"), ("--seed", -1, "0 or more"), ("--workers", -1, "0 or more"),
    ("--image-size", 0, "positive"), ("--views", 0, "positive"), ("--captions", -1, "positive"), ("--soft-weight", 1.5, "share from 0 to 1"),
    ("--vocab-size", 100, "514 or more"), ("--eval-every", 0, "positive"), ("--device", "gpu", "no device"), ("--loss", "hrad", "hybrid"),
    ("--batch-size", 25, "larger than the data set: 24"), ("--image-size", 33, "multiple of 8"), ("--clip", "ViT-B-32", "did you mean 'ViT-B/32'"),
    ("--clip", "tyni", "did you mean 'tiny'"), ("--data", "flikr8k", "did you mean 'flickr8k'"), ("--data", "no.jsonl", "no.jsonl"), ("--bacth", 3, "--bacth")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    line = refused(capsys, arguments(squares, "--out", tmp_path / "run", option, value))
    assert says in line and not (tmp_path / "run").exists()


def test_bad_input_of_other_kinds(squares, whole, tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "flickr8k" in refused(capsys, ["--data", "flickr8k", "--root", tmp_path / "nowhere", *out])
    assert "the same number" in refused(capsys, arguments(squares, *out, "--loss", "clip", "--captions", 2))
    assert "fewer views or captions" in refused(capsys, arguments(squares, *out, "--loss", "clip", "--views", 3, "--captions", 3))
    (tmp_path / "file").write_text("no folder, no weights")
    line = refused(capsys, arguments(squares, "--out", tmp_path / "file" / "run"))
    assert "file/run" in line and "cannot be written" in line
    assert "file: " in refused(capsys, arguments(squares, *out, "--clip", tmp_path / "file"))
    rows = [json.loads(line) for line in open(squares)]
    for row in rows:
        row["images"] = [os.path.join(os.path.dirname(squares), x) for x in row["images"]]
    (tmp_path / "untested.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["split"] != "test"))
    assert "no rows in split 'test'" in refused(capsys, arguments(tmp_path / "untested.jsonl", *out))  # said before training
    for option, value, says in (("--checkpoint", tmp_path / "file", "file: "), ("--checkpoint", tmp_path / "none.pt", "no such file"),
                                ("--checkpoint", whole / "metrics.json", "metrics.json: "), ("--split", "tset", "tset"), ("--top", 0, "positive"), ("--device", "gpu", "no device")):
        argv = {"--checkpoint": whole / "best.pt"} | {option: value}
        assert says in refused(capsys, [x for pair in argv.items() for x in pair], eval.main)
    weights = tmp_path / "weights.pt"
    clip.save(eval.restore(whole / "best.pt", "cpu")[0], weights)
    assert "not a checkpoint of this project" in refused(capsys, ["--checkpoint", weights], eval.main)
    assert not (tmp_path / "run").exists()


def test_the_commands_say_it_in_one_line(squares, tmp_path):
    """As a user sees it, from the shell: one line, nothing else, exit code 2 (other tests call main in this process)."""
    for words in (("train_mxm.py", "--data", squares, "--batch-size", "99", "--out", tmp_path), ("eval.py", "--checkpoint", squares)):
        done = command(*words)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_in_the_middle_of_training(workers, squares, tmp_path, capsys):
    shutil.copytree(os.path.dirname(squares), tmp_path / "data")
    order = np.random.default_rng([0, 0]).permutation(24)  # of the first epoch: this one is met at its last step
    damaged = tmp_path / "data" / f"{order[-1]}-0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    argv = arguments(tmp_path / "data" / "squares.jsonl", "--out", tmp_path / "run", "--workers", workers)
    line = refused(capsys, argv)
    assert str(damaged) in line and "damaged" in line and clip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 0
    shutil.copy(os.path.join(os.path.dirname(squares), damaged.name), damaged)  # repaired: it goes on
    train_mxm.main([*argv, "--resume"])
    assert len(log(tmp_path / "run")) == 3


# ---------------------------------------------------------------- eval.py on the result

def test_eval_command(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    best, before = tmp_path / "run" / "best.pt", json.loads((whole / "metrics.json").read_text())
    eval.main(["--checkpoint", str(best), "--split", "val", "--gallery", str(tmp_path / "gallery.png"), "--device", "cpu", "--amp", "off"])
    said = capsys.readouterr().out
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert after["test"] == before["test"] and after["val"].keys() == after["test"].keys() == {"model", "chance"}  # what was there stays
    assert after["val"]["model"]["rSum"] == clip.load_checkpoint(best)["state"]["best"] == max(r["val"]["rSum"] for r in log(whole))
    assert f"{after['val']['model']['text_to_image']['R@1']:7.1f}" in said and "chance" in said
    assert Image.open(tmp_path / "gallery.png").format == "PNG"


def test_eval_search_with_words(squares, whole, tmp_path, capsys):
    argv = ["--checkpoint", str(whole / "best.pt"), "--query", "a red square on blue", "--device", "cpu", "--split", "train"]
    before = (whole / "metrics.json").read_text()
    eval.main([*argv, "--top", "4", "--gallery", str(tmp_path / "found.png")])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    ids = {x.id: x for x in data.load(squares, split="train")[0]}
    scores = [float(score) for score, _, _ in lines]
    assert len(lines) == 4 and scores == sorted(scores, reverse=True) and all(ids[id].captions[0] == caption for _, id, caption in lines)
    assert Image.open(tmp_path / "found.png").size[0] > 4 * eval.CELL and (whole / "metrics.json").read_text() == before
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    images, texts = eval.embed(model, list(ids.values()), tokenizer, "off")
    own = [c for x in ids.values() for c in x.captions]
    eval.main([*argv, "--query", own[5], "--top", "99"])  # a caption of the data finds what its own features find
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert found == [list(ids)[i] for i in eval.search(texts[5:6], images, 99)[1][0].tolist()]


def test_eval_embeds_views_as_their_renormalised_mean(squares, whole):
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    instances = data.load(squares, split="test")[0]
    images, texts = eval.embed(model, instances, tokenizer, "off")
    preprocess = clip.transform(model.visual.input_resolution)
    with torch.no_grad():
        for x, found in zip(instances, images):
            views = torch.cat([torch.nn.functional.normalize(model.encode_image(preprocess(Image.open(p))[None])) for p in x.images])
            assert torch.nn.functional.cosine_similarity(views.mean(0), found, dim=0) > 1 - 1e-4 and found.norm() == pytest.approx(1)
        captions = torch.nn.functional.normalize(model.encode_text(tokenizer([c for x in instances for c in x.captions], 32)))
    assert torch.allclose(captions, texts, atol=1e-5)


def test_scripts_import_nothing_of_each_other():
    """Import arrows: losses knows nothing of the project, eval nothing of losses, no method another."""
    allowed = {"losses": set(), "eval": {"clip", "data"}, "train_mxm": {"clip", "losses", "data", "eval"}}
    for name, known in allowed.items():
        tree = ast.parse(open(os.path.join(ROOT, name + ".py")).read())
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {m for m in imported if os.path.exists(os.path.join(ROOT, f"{m}.py"))} == known
