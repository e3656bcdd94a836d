"""Tests of whole runs of every script on a small data set: the same bits again, killed and resumed, on two
processes, with bad input (those of one script: -k cmaclip).

What is particular to a method is tested in the file of its name. A fork joins with one row in RUNS, as
README.md shows; eval.Run is tested in all its cases with train_mxm.py, since every script goes through it.
"""
import ast
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch

import clip
import data
import eval
from runs import (CASES, COLOURS, FILES, KILLED, LOST, ROOT, SMALL, STOPPED, TINY, arguments,  # noqa: F401
                  assert_same_run, command, evaluated, forked, in_process, kept_signals, log,
                  make_features, make_squares, metrics, refused, timeless)

HEADS = ["--dim", "32", "--hidden", "16", "--lr", "0.01"]
FEATURES = ["--features", "train.npz", "test.npz", *HEADS]
FROZEN = ["--clip", "{folder}/frozen.pt", "--cache", "{folder}/cache", *HEADS]
QUEUES = ["--dim", "16", "--momentum", "0.9", "--lr", "0.01", "--clip-lr", "0.001"]
# an epoch of train_user.py and of train_adapter.py is one of 60 pairs, of the others one of 24 instances
ADAPTER = ["--clip", "{folder}/frozen.pt", "--frames", "2", "--lr", "0.01", "--batch-size", "20",
           "--dropout", "0.1"]
# name -> (script, its arguments, those where several processes must do what one does: nothing is drawn in a
# step, since each process would draw its own)
RUNS = {
    "mxm": ("train_mxm", ["--crop", "0.5", "--captions", "2"],
            ["--crop", "0.5", "--batch-size", "12", "--captions", "3", "--soft-warmup", "0"]),
    # a batch of 18 of 19 rows: of the last batch one process gets none
    "clip4cmr-features": ("train_clip4cmr", FEATURES, [*FEATURES, "--batch-size", "18", "--dropout", "0"]),
    "clip4cmr": ("train_clip4cmr", FROZEN,
                 [*FROZEN, "--cache", "{folder}/another", "--batch-size", "12", "--dropout", "0",
                  "--text-fraction", "0.6", "--prototypes", "learned", "--loss",
                  "pcl+triplet:0.1+cross-entropy"]),
    "cmaclip": ("train_cmaclip", ["--train-noise-image", "0.3", "--dropout", "0.1", "--layers", "1"],
                ["--batch-size", "12", "--dropout", "0"]),
    # queues that a batch does not divide, and that are full after two steps
    "user": ("train_user", [*QUEUES, "--batch-size", "20", "--queue", "32"],
             [*QUEUES, "--batch-size", "30", "--queue", "50"]),
    "adapter": ("train_adapter", ADAPTER, [*ADAPTER, "--batch-size", "30", "--dropout", "0"]),
}
PICTURES = ["mxm", "clip4cmr", "cmaclip", "user", "adapter"]  # these read pictures
AT_EVERY_STEP = [name for name in PICTURES if name != "clip4cmr"]  # CLIP4CMR's CLIP sees each picture once
# the keys of the metric on val that best.pt is chosen by; elsewhere rSum
CHOSEN = {"clip4cmr": ["mAP"], "clip4cmr-features": ["mAP"], "cmaclip": ["mean_of_tasks", "accuracy"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def make_data(folder):
    """Pictures, features, and CLIPs with their tokenizer."""
    make_squares(folder)
    make_features(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.MODELS, "tiny", SMALL)
        texts = [f"the frame is {colour} and the middle a {colour} square on around" for colour in COLOURS]
        for file, name in (("frozen.pt", "tiny"), ("resnet.pt", "tiny-rn")):
            model = clip.build(name, clip.Tokenizer.train(texts, 600))
            clip.save_checkpoint(folder / file, {"clip": clip.describe(model)})


@pytest.fixture(scope="module", params=RUNS)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A smaller tiny CLIP: most of a short run's time goes into writing it."""
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)


def words(name, folder, *more, still=False):
    """The arguments of a run."""
    particular = [word.format(folder=folder) for word in RUNS[name][2 if still else 1]]
    return arguments(folder / "squares.jsonl", "--root", folder, *particular, *more)


def script(name):
    return importlib.import_module(RUNS[name][0])


def chosen(name, val):
    """The metric, of an evaluation on val, that best.pt is chosen by."""
    for key in CHOSEN.get(name, ["rSum"]):
        val = val[key]
    return val


def pretend(patch, *scores):
    """The score on val has these values, in order."""
    scores = iter(scores)
    keep_best = eval.Run.keep_best

    def changed(run, score, *message, **evaluations):
        keep_best(run, next(scores), *message, **evaluations)
    patch.setattr(eval.Run, "keep_best", changed)


def metrics_on_test(out, folder):
    """What eval.py finds on the test split with best.pt."""
    shutil.rmtree(folder / "evaluated", ignore_errors=True)
    evaluated(out / "best.pt", "--root", folder, "--out", folder / "evaluated")
    return metrics(folder / "evaluated")["test"]


def weights(checkpoint):
    """All that a run changes: of the CLIP, of heads, of adapters, of the momentum encoders and queues."""
    out = dict(checkpoint.get("clip", {"state_dict": {}})["state_dict"])
    out |= checkpoint.get("heads", {}) | checkpoint.get("trained", {})
    for part in ("momentum", "queue"):
        out |= {f"{part}.{key}": value for key, value in checkpoint.get(part, {}).items()}
    return out


@pytest.fixture(scope="module")
def whole(name, folder, tmp_path_factory):
    """The run that others are compared with, never interrupted; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / name
    with pytest.MonkeyPatch.context() as patch, kept_signals():
        patch.setitem(clip.MODELS, "tiny", SMALL)
        script(name).main(words(name, folder, "--out", out))
    return out


# ---------------------------------------------------------------- a run

def test_the_command_trains_reports_and_is_deterministic(name, folder, tmp_path, monkeypatch, capsys):
    """In a process of its own, with a worker: the same bits as in this one, and a table. MXM-CLR's is the
    command as a user types it, which takes seconds to start; others are forked."""
    out = tmp_path / "run"
    argv = words(name, folder, "--out", out, "--workers", 1)
    if name == "mxm":
        monkeypatch.setitem(clip.MODELS, "tiny", TINY)
        done = command(RUNS[name][0] + ".py", *argv)
        ended, table, said = done.returncode, done.stdout, done.stderr
    else:
        [(ended, table, said)] = forked(RUNS[name][0], argv)
    assert ended == 0, said
    script(name).main(words(name, folder, "--out", tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", out)

    def without_times(text):
        return [line for line in text.splitlines() if " s per step" not in line]
    expected = capsys.readouterr().out.replace(f"{tmp_path}/whole", str(out))
    assert without_times(table) == without_times(expected)
    assert "test" in table and table.splitlines()[-1] == f"written to {out}/metrics.json"
    assert "step 9/9  loss " in said and "\x1b" not in said
    expected = ("CLIP ", "note: ", f"{folder}", "features", "epoch ", "step ", "--tune ")
    assert all(line.startswith(expected) for line in said.splitlines()), said  # no warning, of any library
    lines = log(out)
    assert [(r["step"], r["epoch"]) for r in lines] == [(3, 1), (6, 2), (9, 3)]
    assert lines[2]["loss"] < lines[0]["loss"]
    config = json.loads((out / "config.json").read_text())
    assert config["epochs"] == 3 and config["workers"] == 1 and config["out"] == str(out)
    assert config["lr"] == (0.01 if "--lr" in RUNS[name][1] else script(name).SCRATCH["lr"])
    assert all({"lr", "norm", "seconds"} <= row.keys() for row in lines)
    best = clip.load_checkpoint(out / "best.pt")
    assert best["method"] == RUNS[name][0] and "optimizer" not in best
    assert best["state"]["best"] == max(chosen(name, r["val"]) for r in lines)
    assert metrics(out)["test"] == metrics_on_test(out, folder)


def test_another_seed_is_another_run(name, folder, whole, tmp_path):
    script(name).main(words(name, folder, "--out", tmp_path, "--seed", 1))
    a, b = (weights(clip.load_checkpoint(out / "last.pt")) for out in (whole, tmp_path))
    drawn = ("visual.conv1.weight", "image_head.0.weight", "project.0.weight", "image_fc.weight",
             "queue.images", "extra.down.text_0_mlp.weight")
    differ = [key for key in drawn if key in a and not torch.equal(a[key], b[key])]
    assert len(differ) == {"cmaclip": 2, "user": 3}.get(name, 1)


def test_best_is_the_best_on_val_and_is_what_the_report_is_about(name, folder, tmp_path, monkeypatch):
    argv = words(name, folder, "--out", tmp_path)
    with monkeypatch.context() as patch:
        pretend(patch, 90.0, 300.0, 200.0)
        patch.setattr(eval, "report", lambda *a, **k: None)
        script(name).main(argv)
    best = clip.load_checkpoint(tmp_path / "best.pt")
    last = clip.load_checkpoint(tmp_path / "last.pt")
    assert best["step"] == 6 and last["step"] == 9 and last["state"]["best"] == best["state"]["best"] == 300
    script(name).main([*argv, "--resume"])  # nothing left but the report
    assert metrics(tmp_path)["test"] == metrics_on_test(tmp_path, folder)

# ---------------------------------------------------------------- where a run starts from

@pytest.fixture
def published(folder, tmp_path, monkeypatch):
    """A small CLIP stands in for the published ViT-B/32, its file and its checksum. Returns the cache."""
    cache = tmp_path / "clip-cache"
    cache.mkdir()
    shutil.copy(folder / "frozen.pt", cache / "ViT-B-32.pt")
    config, _ = clip.MODELS["ViT-B/32"]
    checksum = clip.file_sha256(cache / "ViT-B-32.pt")
    monkeypatch.setitem(clip.MODELS, "ViT-B/32", (config, checksum))
    monkeypatch.setattr(clip, "MODEL_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr(clip, "MERGES_URL", "http://127.0.0.1:9/bpe_simple_vocab_16e6.txt.gz")
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    return cache


RATES = {"mxm": 1e-5, "user": 5e-4, "clip4cmr": 1e-4, "cmaclip": 1e-4, "adapter": 1e-3}


@pytest.mark.parametrize("name", PICTURES)
def test_your_own_data_start_from_a_published_clip(name, folder, published, tmp_path, capsys):
    """A .csv without --clip: the published CLIP, which the first line names, at the rate for pretrained
    weights; where it cannot be had, one line says where to put it, and how to start from scratch."""
    rows = [json.loads(line) for line in open(folder / "squares.jsonl")]
    lines = [f"{folder}/{image},{caption},{row['id']},{row['split']},{row['labels']['inner']}\n"
             for row in rows for image, caption in zip(row["images"], row["captions"])]
    (tmp_path / "mine.csv").write_text("image,caption,id,split,inner\n" + "".join(lines))
    argv = ["--data", str(tmp_path / "mine.csv"), "--batch-size", "8", "--epochs", "1", "--device", "cpu",
            "--out", str(tmp_path / "run")]
    if name == "clip4cmr":
        argv += ["--cache", str(tmp_path / "cache")]
    if name == "adapter":  # 16 channels of its widths of 32 are shared, as of a real CLIP's
        argv += ["--frames", "2"]
    script(name).main(argv)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["clip"] == "ViT-B/32" and config["lr"] == RATES[name]
    said = capsys.readouterr().err
    assert next(line for line in said.splitlines() if not line.startswith("note: ")).startswith(
        "CLIP ViT-B/32, 0."), said
    os.unlink(published / "ViT-B-32.pt")
    line = refused(capsys, argv, script(name).main)
    assert f"put the file at {published}/ViT-B-32.pt by hand" in line
    assert "its tokenizer's beside it, of http://127.0.0.1:9/bpe_simple_vocab_16e6.txt.gz" in line
    assert f"--data {tmp_path}/mine.csv --clip tiny, and then give --clip runs/mxm-mine/best.pt" in line


# ---------------------------------------------------------------- killed, stopped, full

@pytest.mark.parametrize("name, case", [
    *(("mxm", case) for case in CASES if not case.endswith("process")),
    *((name, case) for name in RUNS if name != "mxm" for case in ("in the middle of an epoch", "SIGTERM"))],
    indirect=["name"])
def test_interrupted_then_resumed_equals_never_interrupted(name, case, folder, whole, tmp_path):
    out = tmp_path / "run"
    argv = words(name, folder, "--out", out)
    if "workers" in case:
        argv += ["--workers", "1"]
    [(ended, _, said)] = forked(RUNS[name][0], argv, case)
    step = clip.load_checkpoint(out / "last.pt")["step"]  # it can be loaded, and is as new as was promised
    assert step == CASES[case][0]
    if case in KILLED:
        assert ended == -signal.SIGKILL
    elif case in STOPPED:
        assert ended == 130
        assert said.splitlines()[-1] == f"stopped at step {step}; the same command with --resume goes on"
    else:
        last = said.splitlines()[-1]
        assert ended == 2 and last.startswith("error: ") and "cannot be written" in last
        assert "Traceback" not in said
        assert not [file for file in os.listdir(out) if file.startswith(".writing")]
    [(ended, _, said)] = forked(RUNS[name][0], [*argv, "--resume"])
    assert ended == 0, said
    assert_same_run(whole, out)


def test_resume_refuses_what_is_no_continuation(name, folder, whole, tmp_path, capsys):
    """Which settings are compared, and where, is tested in test_eval_run.py."""
    shutil.copytree(whole, tmp_path / "run")
    resume = words(name, folder, "--out", tmp_path / "run", "--resume")
    line = refused(capsys, [*resume, "--lr", 0.5], script(name).main)
    assert "--lr was" in line and "is 0.5 now" in line
    if not name.startswith("clip4cmr"):  # whose rate is constant
        line = refused(capsys, [*resume, "--epochs", 4], script(name).main)
        assert "its learning rate falls over 3 epochs, so that --epochs 4 is another run" in line
    another = script("cmaclip" if name == "mxm" else "mxm")
    argv = arguments(folder / "squares.jsonl", "--out", tmp_path / "run", "--resume")
    assert f"is a run of {RUNS[name][0]}.py" in refused(capsys, argv, another.main)
    for file in FILES:  # all as it was
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("name", ["clip4cmr", "adapter"], indirect=True)
def test_another_frozen_clip_is_refused(name, folder, tmp_path, capsys):
    """Its weights are not in the checkpoint, and a file of the same name may have been trained anew."""
    argv = words(name, folder, "--epochs", 1, "--out", tmp_path / "run", "--clip", tmp_path / "clip.pt")
    shutil.copy(folder / "frozen.pt", tmp_path / "clip.pt")
    script(name).main(argv)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    saved = clip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert "clip" not in saved and not any(key.startswith("clip.") for key in saved["heads"])
    checkpoint = clip.load_checkpoint(tmp_path / "clip.pt")
    checkpoint["clip"]["state_dict"]["visual.proj"] *= 1.5
    clip.save_checkpoint(tmp_path / "clip.pt", checkpoint)
    line = refused(capsys, [*argv, "--resume"], script(name).main)
    assert "last.pt: was made with another frozen clip" in line
    line = refused(capsys, ["--checkpoint", tmp_path / "run" / "best.pt"], eval.main)
    assert f"{tmp_path}/clip.pt: is the CLIP " in line
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_finished_run_is_moved_aside_and_resumes_to_its_report(name, folder, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    os.unlink(tmp_path / "run" / "metrics.json")
    script(name).main(words(name, folder, "--out", tmp_path / "run", "--resume"))
    assert_same_run(whole, tmp_path / "run")
    script(name).main(words(name, folder, "--out", tmp_path / "run", "--epochs", 1))
    assert_same_run(whole, tmp_path / "run.1")
    assert "moved to" in capsys.readouterr().err and len(log(tmp_path / "run")) == 1


class InfiniteGradient(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: grad * math.inf)


@pytest.mark.parametrize("spoil", [lambda x: x * math.nan, InfiniteGradient.apply], ids=["loss", "gradient"])
def test_a_loss_that_is_nan_stops_before_the_weights_take_it_up(name, spoil, folder, tmp_path, monkeypatch):
    function = "multitask_loss" if name == "cmaclip" else "total_loss"
    plain = getattr(script(name), function)
    calls = []

    def spoiled(*a):
        calls.append(0)
        return spoil(plain(*a)) if len(calls) == 6 else plain(*a)
    monkeypatch.setattr(script(name), function, spoiled)
    with pytest.raises(SystemExit, match="at step 5; try a lower --lr"):
        script(name).main(words(name, folder, "--out", tmp_path))
    checkpoint = clip.load_checkpoint(tmp_path / "last.pt")
    # a threshold of train_cmaclip.py may be infinite
    assert checkpoint["step"] == 3 and not any(v.isnan().any() for v in weights(checkpoint).values())


# ---------------------------------------------------------------- an early stop (CLIP4CMR)

STOPS_EARLY = pytest.mark.parametrize("name", ["clip4cmr", "clip4cmr-features"], indirect=True)


@STOPS_EARLY
def test_patience_stops_early(name, folder, tmp_path, monkeypatch, capsys):
    """After as many evaluations without a better one; an equal one is none. A resumed run counts on."""
    argv = words(name, folder, "--epochs", 20, "--patience", 3)
    a, b = tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(eval, "report", lambda *a, **k: None)
    with monkeypatch.context() as patch:
        pretend(patch, 50.0, 60.0, 60.0, 70.0, 70.0, 40.0, 60.0, 90.0)
        script(name).main([*argv, "--out", str(a)])
    assert [r["score"] for r in log(a)] == [50, 60, 60, 70, 70, 40, 60]
    assert clip.load_checkpoint(a / "best.pt")["step"] == 12
    assert clip.load_checkpoint(a / "last.pt")["state"]["waited"] == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "epoch 7: no better val mAP than 70.0 in 3 evaluations; stopped"
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        pretend(patch, 50.0, 60.0, 60.0, 70.0, 70.0)  # ends in the sixth epoch, after one evaluation in vain
        script(name).main([*argv, "--out", str(b)])
    with monkeypatch.context() as patch:
        pretend(patch, 40.0, 60.0, 90.0)
        script(name).main([*argv, "--out", str(b), "--resume"])
    assert timeless(log(b)) == timeless(log(a))
    script(name).main([*argv, "--out", str(b), "--resume"])  # it has ended for good
    assert timeless(log(b)) == timeless(log(a))


@STOPS_EARLY
def test_two_processes_stop_early_together(name, folder, tmp_path):
    argv = words(name, folder, "--epochs", 100, "--patience", 1, "--out", tmp_path)
    ended = forked(RUNS[name][0], argv, processes=2)
    assert [code for code, _, _ in ended] == [0, 0], ended
    scores = [r["val"]["mAP"] for r in log(tmp_path)]
    assert len(scores) == scores.index(max(scores)) + 2 < 100 and ended[0][2].count("stopped") == 1


# ---------------------------------------------------------------- several processes

def assert_equal_runs(a, b, steps=2):
    """Gradients (Adam's first moment holds a share of each step's) are the same to 1e-5. So are weights, to
    2e-5, a fiftieth of what a step can move: where a gradient is near 0, Adam makes its rounding large."""
    one, two = clip.load_checkpoint(a / "last.pt"), clip.load_checkpoint(b / "last.pt")
    assert set(os.listdir(b)) - {"costs.json"} == set(FILES) and one["step"] == two["step"] == steps
    for x, y in zip(log(a), log(b)):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
    for i, x in one["optimizer"]["state"].items():
        x, y = x["exp_avg"], two["optimizer"]["state"][i]["exp_avg"]
        assert (x - y).abs().max() <= 1e-5 * max(x.abs().max(), 1e-5)
    one, two = weights(one), weights(two)
    for key, x in one.items():
        difference = (x - two[key]).abs().masked_fill(x == two[key], 0)  # thresholds may be infinite
        if key.endswith("in_proj_bias"):  # a key's bias has rounding's gradient, which Adam makes large
            difference = difference.view(3, -1)[[0, 2]]
        assert difference.max() <= 2e-5 * max(1, x.abs().max()), key


def test_two_processes_equal_one(name, folder, tmp_path, monkeypatch):
    """With half the batch each; CMA-CLIP's by the command as a user types it. MXM-CLR's instances have two
    and three captions, some of CLIP4CMR's no text. One finds with the checkpoint of two what they found."""
    argv = words(name, folder, "--epochs", 1, still=True)
    out = [*argv, "--out", str(tmp_path / "2")]
    if name == "cmaclip":
        monkeypatch.setitem(clip.MODELS, "tiny", TINY)
        done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                       "train_cmaclip.py", *out)
        assert done.returncode == 0 and done.stderr.count("M trained parameters") == 1, done.stderr
        table = done.stdout
    else:
        ended = forked(RUNS[name][0], out, processes=2, still=True)  # first: they make the frozen features
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert ended[1][1:] == ("", "")  # the second says nothing
        table = ended[0][1]
    assert table.count("written to") == 1
    together = (tmp_path / "2" / "metrics.json").read_text()
    os.unlink(tmp_path / "2" / "metrics.json")
    script(name).main([*out, "--resume"])
    assert (tmp_path / "2" / "metrics.json").read_text() == together
    with monkeypatch.context() as patch:
        patch.setattr(data, "CHANGED", 0.0)
        patch.setattr(script(name), "DROPOUT", 0.0, raising=False)
        script(name).main([*argv, "--out", str(tmp_path / "1")])
    assert_equal_runs(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("lost", LOST)
def test_one_of_two_processes_killed_then_one_resumes(lost, folder, tmp_path):
    """The other one fails. Another number of processes changes the order of sums only."""
    argv = words("mxm", folder, still=True)
    ended = forked("train_mxm", [*argv, "--out", str(tmp_path / "2")], lost, processes=2)
    (killed, _, _), (stopped, out, _) = ended if lost == "the first process" else ended[::-1]
    assert (killed, stopped, out) == (-signal.SIGKILL, 1, "")
    assert clip.load_checkpoint(tmp_path / "2" / "last.pt")["step"] == CASES[lost][0]
    script("mxm").main([*argv, "--out", str(tmp_path / "2"), "--resume"])
    script("mxm").main([*argv, "--out", str(tmp_path / "1")])
    assert_equal_runs(tmp_path / "1", tmp_path / "2", steps=6)


@pytest.mark.parametrize("name", AT_EVERY_STEP, indirect=True)
def test_two_processes_stopped_then_resumed_equal_two_never_stopped(name, folder, tmp_path):
    """SIGTERM reaches one of them only. With what each process draws in its steps."""
    def run(out, *more, case=None):
        return forked(RUNS[name][0], words(name, folder, "--out", tmp_path / out, *more), case, processes=2)
    assert [code for code, _, _ in run("whole")] == [0, 0]
    ended = run("run", case="SIGTERM to the second process")
    assert [code for code, _, _ in ended] == [130, 130], ended
    assert ended[0][2].splitlines()[-1].startswith("stopped at step 5;") and ended[1][2] == ""
    ended = run("run", "--resume")
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ---------------------------------------------------------------- bad input

BAD = {  # name -> words, what is said of them; of mxm also those that every script has
    "mxm": [("--epochs 0", "not a positive whole number"), ("--lr 0", "not a positive number"),
            ("--lr nan", "not a positive number"), ("--lr fast", "--lr"), ("--seed -1", "0 or more"),
            ("--weight-decay -0.1", "0 or more"), ("--vocab-size 100", "514 or more"),
            ("--device gpu", "no device"), ("--batch-size 61", "larger than the data set"),
            ("--image-size 33", "multiple of 8"), ("--clip ViT-B-32", "did you mean 'ViT-B/32'"),
            ("--bacth 3", "--bacth"),
            ("--data flikr8k", "unknown data set 'flikr8k': known are"), ("--data no.jsonl", "no.jsonl"),
            ("--views 0", "positive"), ("--soft-weight 1.5", "share from 0 to 1"), ("--loss hrad", "hybrid"),
            ("--soft-relation teacher", "--teacher belong together"),
            ("--teacher best.pt", "--teacher belong together"),
            ("--loss clip --captions 2", "the same number"),
            ("--loss clip --views 3 --captions 3", "an instance has 2 views or captions")],
    "clip4cmr": [("--loss pcl+hinge:2", "unknown loss 'hinge'"), ("--loss pcl+", "unknown loss ''"),
                 ("--loss pcl:0", "not a positive number"), ("--text-fraction 0", "up to 1"),
                 ("--loss pcl+triplet+pcl:0.5", "pcl is named twice"), ("--margin 0.1", "pcl has none"),
                 ("--task colour", "has the tasks inner, outer"), ("--clip tiny", "random weights")],
    "cmaclip": [("--tasks inner,feel", "feel: "), ("--heads 3", "--heads 3: does not divide the width 32"),
                ("--clip-lr 0", "positive"), ("--precision 0", "up to 1"),
                ("--train-noise-image nan", "from 0 to 1"),
                ("--clip tiny --freeze", "--freeze: tiny starts from random weights")],
    "user": [("--queue 7", "--queue 7 cannot hold a batch of keys; give 20 or more"),
             ("--dim 1", "2 or more"), ("--mu 20 --loss infonce", "only uto"), ("--momentum 1.5", "a share"),
             ("--data primitives --regions", "train_ims.npy: No such file")],
    "adapter": [("--share 33", "--share 33: more than the narrower encoder's width; choose 32 or less"),
                ("--rank 0", "not a positive whole number"), ("--dropout 1.5", "not a share from 0 to 1"),
                ("--clip tiny", "--clip tiny has random weights, nothing to adapt: give a pretrained CLIP"),
                ("--context 33", "--context 33: this CLIP has 32 positions for the tokens of a text; choose"),
                ("--clip {folder}/resnet.pt --image-size 32", "--tune: adapters and lora go into")]}


@pytest.mark.parametrize("name, more, says", [(name, *case) for name in BAD for case in BAD[name]])
def test_bad_settings(name, more, says, folder, tmp_path, capsys):
    argv = words(name, folder, "--out", tmp_path / "run", *more.format(folder=folder).split())
    assert says in refused(capsys, argv, script(name).main) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("name", ["clip4cmr", "cmaclip"])
def test_a_split_without_labels_is_refused_before_training(name, split, folder, tmp_path, capsys):
    rows = [json.loads(line) for line in open(folder / "squares.jsonl")]
    for row in rows:
        row["labels"] = {} if split in ("train", row["split"]) else row["labels"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = words(name, folder, "--out", tmp_path / "run", "--data", tmp_path / "own.jsonl")
    says = "no labels; this method learns from" if split == "train" else f"split '{split}' has a "
    assert says in refused(capsys, argv, script(name).main) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PICTURES, indirect=True)
def test_bad_input_of_other_kinds(name, folder, tmp_path, capsys):
    def line(*more):
        return refused(capsys, words(name, folder, "--out", tmp_path / "run", *more), script(name).main)
    assert "flickr8k" in line("--data", "flickr8k", "--root", tmp_path / "nowhere")
    assert "cannot be written" in line("--out", tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("no folder, no weights")
    said = line("--out", tmp_path / "file" / "run")
    assert "file/run" in said and "cannot be written" in said
    assert "file: " in line("--clip", tmp_path / "file")
    untested = [row for row in open(folder / "squares.jsonl") if '"test"' not in row]
    (tmp_path / "untested.jsonl").write_text("".join(untested))
    assert "no rows in split 'test'" in line("--data", tmp_path / "untested.jsonl")  # said before training
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", [*(RUNS[name][0] for name in PICTURES), "eval"])
def test_the_commands_say_it_in_one_line(file, tmp_path):
    """One line, nothing else, exit code 2; other tests call main in this process."""
    option = "--checkpoint" if file == "eval" else "--data"
    [(ended, out, said)] = forked(file, [option, str(tmp_path / "none.jsonl")])
    assert ended == 2 and out == "" and said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("name", PICTURES)
def test_documented_commands_parse(name):
    """Those of the docstring and of README.md; test_study.py has those of the studies."""
    with open(os.path.join(ROOT, "README.md")) as f:
        text = script(name).__doc__ + f.read()
    lines = re.findall(rf"^ *(?:python|torchrun\b.*) {RUNS[name][0]}\.py\b([^#\n]*)", text, re.MULTILINE)
    assert len(lines) >= 7
    assert all(script(name).settings(shlex.split(line)).epochs for line in lines if "--help" not in line)


class OneStep(Exception):
    """Ends a run after the gradient of its first step."""


@pytest.mark.parametrize("name", AT_EVERY_STEP)
def test_bfloat16(name, folder, tmp_path, monkeypatch):
    """The encoders compute in bfloat16 and the loss in float32, near that of float32: the loss within 1%, the
    gradient's norm within 2%. `auto` leaves a narrow model in float32, to the bit."""
    measured = []
    loss_name = "multitask_loss" if name == "cmaclip" else "total_loss"
    total_loss = getattr(script(name), loss_name)

    def checked_loss(*args):
        values = [value for x in args for value in (x.values() if isinstance(x, dict) else [x])]
        kinds = {x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()}
        assert kinds == {torch.float32} and not torch.is_autocast_enabled("cpu")
        return total_loss(*args)

    def note_and_stop(run, loss, norm):
        measured.append((loss.item(), norm.item()))
        raise OneStep

    monkeypatch.setattr(script(name), loss_name, checked_loss)
    monkeypatch.setattr(eval.Run, "check", note_and_stop)
    for amp in ("off", "auto", "bf16"):
        with pytest.raises(OneStep):
            script(name).main(words(name, folder, "--amp", amp, "--out", tmp_path / amp))
    in_float32, by_choice, in_bfloat16 = measured
    assert by_choice == in_float32 != in_bfloat16
    assert in_bfloat16[0] == pytest.approx(in_float32[0], rel=0.01)
    assert in_bfloat16[1] == pytest.approx(in_float32[1], rel=0.02)


def test_workers_by_default(monkeypatch):
    """One where a core is left for it, none where the CPU computes on all cores."""
    for threads, workers in ((3, 1), (4, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert script("mxm").settings([]).workers == workers
        assert script("mxm").settings(["--workers", "2"]).workers == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script("mxm").settings([]).workers == 1
    assert script("mxm").settings(["--device", "cpu"]).workers == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", AT_EVERY_STEP, indirect=True)
def test_a_damaged_picture_in_the_middle_of_training(name, workers, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    order = np.random.default_rng([0, 0]).permutation(24)  # of the first epoch: met at its last step
    damaged = [tmp_path / "data" / f"{order[-1]}-{view}.png" for view in range(2)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:60])
    argv = words(name, tmp_path / "data", "--out", tmp_path / "run", "--workers", workers)
    line = refused(capsys, argv, script(name).main)
    assert any(str(path) in line for path in damaged) and "damaged" in line
    assert clip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 0
    for path in damaged:
        shutil.copy(folder / path.name, path)  # repaired: it goes on
    script(name).main([*argv, "--resume"])
    assert len(log(tmp_path / "run")) == 3


# ---------------------------------------------------------------- the project as a whole

def test_files_import_nothing_but_what_the_design_says():
    """losses and clip know none, data knows clip, eval knows both, no method knows another."""
    known = {"clip": set(), "losses": set(), "data": {"clip"}, "eval": {"clip", "data"}}
    scripts = [file[:-3] for file in os.listdir(ROOT) if file.startswith("train_") and file.endswith(".py")]
    assert len(scripts) >= 5
    known |= {name: {"clip", "losses", "data", "eval"} for name in scripts}
    for name, allowed in known.items():
        tree = ast.parse(open(os.path.join(ROOT, name + ".py")).read())
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {module for module in imported if os.path.exists(os.path.join(ROOT, f"{module}.py"))}
        assert ours == allowed, name


def test_a_fork_joins_with_one_row(tmp_path):
    """As README.md says: a copy of a script, here with another loss, and a row in RUNS pass these tests."""
    fork = tmp_path / "fork"
    ignored = shutil.ignore_patterns(".git", "runs", "data", "__pycache__", "*venv", ".pytest_cache")
    shutil.copytree(ROOT, fork, ignore=ignored)
    shutil.copy(fork / "train_mxm.py", fork / "train_fork.py")
    row = '    "fork": ("train_fork", [], ["--batch-size", "12"]),'
    changes = {
        "train_fork.py": [("    return losses.clip_loss(", "    return 2 * losses.clip_loss("),
                          ('default="hybrid"', 'default="clip"')],
        "tests/test_runs.py": [("RUNS = {", "RUNS = {\n" + row)],
    }
    for file, replacements in changes.items():
        text = (fork / file).read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1 if "RUNS" in old else -1)
        (fork / file).write_text(text)
    tests = "fork and (deterministic or best or interrupted or moved or nan or two_processes_equal)"
    done = command("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", fork,
                   fork / "tests" / "test_runs.py", "-k", tests)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout
