"""Tests of what eval.py keeps around a training loop: the progress line, errors, the folder of a run, and
eval.Run; and of the command on several checkpoints. What a killed, stopped or resumed run of a script ends
with is tested in test_runs.py.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import eval
import train_adapter
import train_clip4cmr
import train_mxm
from runs import (ENV, ROOT, SMALL, arguments, evaluated, in_process, kept_signals, log,  # noqa: F401
                  make_features, metrics, refused, squares, timeless)


# ---------------------------------------------------------------- the folder of a run, what is said

def test_progress_plain(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    progress = eval.Progress(10, start=4)
    progress.step(5, 64, loss=1.23456)  # the first step at once: it says how long the run takes
    progress.step(6, 64, loss=2.0)  # too early
    progress.line("a remark")
    progress.step(10, 64, loss=3.0)  # the last is always said
    eval.Progress(10, quiet=True).step(10, 64, loss=4.0)
    lines = out.getvalue().split("\n")
    assert re.fullmatch(r"step 5/10  loss 1\.235  [\d,]+ samples/s  \d+:\d\d left", lines[0])
    assert lines[1] == "a remark" and lines[2].startswith("step 10/10  loss 3 ") and lines[3:] == [""]
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal(monkeypatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = eval.Progress(2)
        progress.step(1, 64, loss=1.5)
        progress.step(2, 64, loss=0.5)
        progress.line("done")
        with pytest.raises(SystemExit), eval.one_line_errors():
            raise data.DataError("bad")
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError):  # the end of a closed terminal
        while part := os.read(master, 4096):  # one read need not bring all
            shown += part
    os.close(master)
    first, second, rest = shown.decode().split("\r\x1b[K", 3)[1:]
    assert first.startswith("step 1/2  loss 1.5") and second.startswith("step 2/2  loss 0.5")
    assert "\n" not in first + second
    assert rest == "done\r\n\r\x1b[Kerror: bad\r\n"  # every text starts on a line of its own


def test_ctrl_c_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, eval.one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped\n"
    with pytest.raises(KeyError), eval.one_line_errors():
        {}["x"]


@pytest.mark.parametrize("error, code, last", [
    (data.DataError("no such data"), 2, "error: no such data"),
    (KeyboardInterrupt(), 130, "stopped"),
    (SystemExit(130), 130, ""),
    (SystemExit("error: the loss is nan"), 1, "error: the loss is nan"),
    (KeyError("x"), 1, "KeyError: 'x'"),
    (None, 0, "")])
def test_one_of_several_processes_ends_at_once(error, code, last, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with eval.one_line_errors():
        if error:
            raise error
    assert codes == [code]
    said = capsys.readouterr().err
    assert said.rstrip("\n").rpartition("\n")[2] == last
    assert said.startswith("Traceback") == isinstance(error, KeyError)


def folder_of(out, **settings):
    """The folder of a run of a script that has ended, with a checkpoint at step 6."""
    args = argparse.Namespace(**{"out": str(out), "method": "toy", "epochs": 3, "lr": 0.1, "resume": False,
                                 "workers": 0, "new": None} | settings)
    eval.open_folder(args, 0)
    checkpoint = {"method": "toy", "settings": vars(args), "step": 6}
    clip.save_checkpoint(os.path.join(args.out, "last.pt"), checkpoint)
    return args


def test_an_earlier_run_is_moved_aside_alone(tmp_path, capsys):
    """What the user put beside it stays, and a link stays a link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("disk")
    for lr in (1, 2, 3):
        folder_of(tmp_path / "link" / "", lr=lr)  # a slash changes nothing
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["config.json", "last.pt", "notes.txt"]
    configs = [tmp_path / f"disk{end}" / "config.json" for end in (".1", ".2", "")]
    assert [json.loads(config.read_text())["lr"] for config in configs] == [1, 2, 3]
    assert sorted(os.listdir(tmp_path / "disk.1")) == ["config.json", "last.pt"]
    assert "an earlier run was moved to" in capsys.readouterr().err
    (tmp_path / "lost").symlink_to("no such disk")
    with pytest.raises(clip.CheckpointError, match="a link to nowhere"):
        folder_of(tmp_path / "lost")


def test_a_folder_is_held_while_its_run_lives(tmp_path):
    args = folder_of(tmp_path / "run")
    config = str(tmp_path / "run" / "config.json")
    code = f"import eval, time; held = eval.lock({config!r}); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True,
                             stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(clip.CheckpointError, match="another run is writing to this folder"):
                eval.open_folder(argparse.Namespace(**vars(args) | {"resume": resume}), 6)
        assert os.listdir(tmp_path) == ["run"]
    finally:
        other.kill()
        other.communicate()
    assert eval.open_folder(args, 0)  # the lock has ended with its process


def test_a_run_goes_on_with_its_settings(tmp_path):
    args = folder_of(tmp_path)

    def resumed(more_epochs=False, **changed):
        asked = argparse.Namespace(**vars(args) | {"resume": True} | changed)
        return eval.resumed(asked, more_epochs)["step"]
    assert resumed() == resumed(workers=2, out=str(tmp_path) + "/") == resumed(newer=None) == 6
    assert resumed(more_epochs=True, epochs=5) == 6
    for changed, says in (({"lr": 0.2}, "--lr was 0.1 and is 0.2 now"),
                          ({"new": 1}, "--new was None and is 1"),
                          ({"out": str(tmp_path / "none")}, "last.pt: is not there")):
        with pytest.raises(clip.CheckpointError, match=re.escape(says)):
            resumed(**changed)


def test_resume_alone_takes_the_settings_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "mine.csv", "--clip", "tiny", "--lr", "0.5", "--views", "3", "--crop", "0"]
    args = train_mxm.settings(words)
    eval.write_json(os.path.join(args.out, "config.json"), vars(args))
    for more in (["--data", "mine.csv"], ["--out", args.out]):
        again = train_mxm.settings(["--resume", *more])
        assert vars(again) == vars(args) | {"resume": True}
    changed = train_mxm.settings(["--resume", "--data", "mine.csv", "--lr", "0.1"])
    assert changed.lr == 0.1  # which `resumed` refuses


def test_seeds_of_any_size():
    seeds = [eval.seed(text) for text in ("0", "7", str(2 ** 63 - 1), str(2 ** 63), str(2 ** 64), "9" * 40)]
    assert seeds[:3] == [0, 7, 2 ** 63 - 1] and len(set(seeds)) == 6
    for value in seeds:
        data.seed_everything(value)
        data.seed_step(value, 3)


DATA_OF_A_RUN = ({"colour": ["blue", "red"]}, [("a", "red"), ("b", "blue"), ("c", "red")])


def own_splits(classes, rows):
    """[(instances, classes)] of train, val and test, which are alike, as data.load_splits returns them."""
    return [([data.Instance(id, ["x.png"], [f"a {name} thing"],
                            {"colour": classes["colour"].index(name) if name else -1}) for id, name in rows],
             classes) for _ in range(3)]


@pytest.mark.parametrize("classes, rows, says", [
    (*DATA_OF_A_RUN, ""),
    ({"colour": ["blue", "red"]}, DATA_OF_A_RUN[1][:2] + [("c", "")], "training data have changed"),
    ({"colour": ["red"]}, [("a", "red"), ("b", ""), ("c", "red")], "training data have changed"),
    ({"colour": ["blue", "red", "teal"]}, DATA_OF_A_RUN[1], "colour = teal is new, and the run has no")])
def test_a_run_goes_on_with_its_classes(classes, rows, says, monkeypatch, capsys):
    args = argparse.Namespace(download=False, data="mine.csv", root=None, crop=None, clip="tiny",
                              trained_on=None, task=None)
    monkeypatch.setattr(data, "load_splits", lambda *_: own_splits(*DATA_OF_A_RUN))
    eval.load_splits(args)
    assert args.crop == 0.5 and args.trained_on["classes"] == DATA_OF_A_RUN[0]
    given = classes
    monkeypatch.setattr(data, "load_splits", lambda *_, classes=given: own_splits(classes, rows))
    if "new" in says:
        with pytest.raises(data.DataError, match=says):
            eval.load_splits(args)
        del args.task  # a method that learns no classes goes on
        says = "training data have changed"
    for instances, known in eval.load_splits(args):
        assert known == DATA_OF_A_RUN[0]
        for x, (_, name) in zip(instances, rows):
            assert x.labels["colour"] == (known["colour"].index(name) if name else -1)
    assert says in capsys.readouterr().err


def test_features_that_have_changed_are_noted(tmp_path, capsys):
    make_features(tmp_path)
    argv = ["--data", "own", "--root", str(tmp_path), "--features", "train.npz", "test.npz", "--epochs", "1",
            "--dim", "16", "--hidden", "8", "--device", "cpu", "--out", str(tmp_path / "run")]
    train_clip4cmr.main(argv)
    train_clip4cmr.main([*argv, "--resume"])
    assert "have changed" not in capsys.readouterr().err
    with np.load(tmp_path / "train.npz") as content:
        changed = dict(content)
    changed["text"][3, 0] += 1
    np.savez(tmp_path / "train.npz", **changed)
    train_clip4cmr.main([*argv, "--resume"])
    assert "own: the training data have changed since this run began" in capsys.readouterr().err


def test_restore_imports_nothing_but_the_methods(tmp_path, monkeypatch):
    (tmp_path / "evil_method.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for method in ("evil_method", "os", None, ["train_mxm"], "train_mxm.losses"):
        clip.save_checkpoint(tmp_path / "x.pt", {"method": method})
        with pytest.raises(clip.CheckpointError, match="there is no such train_"):
            eval.restore(tmp_path / "x.pt")


# ---------------------------------------------------------------- a run

def test_what_a_run_logs_and_keeps(tmp_path, capsys):
    """Of three epochs of two steps; every second epoch and the last are evaluated. In which order it writes
    is held by the kills in test_runs.py."""
    model, module = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    args = argparse.Namespace(method="toy", out=str(tmp_path), resume=False, epochs=3, eval_every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = eval.Run(args, optimizer, 6, 2, {"model": model}, {"module": module})
    loader = argparse.Namespace(batches=lambda start, stop: iter(range(start, stop)))
    for step, number in run.batches(loader):
        assert step == number
        if run.log(torch.tensor(float(step)), 1, scale=2.0 * step):
            epoch = step // 2 + 1
            run.keep_best(10.0 * epoch, "a message", val={"of": epoch})
    common = {"norm": 0.0, "lr": 0.1}
    assert timeless(log(tmp_path)) == [
        {"step": 2, "epoch": 1, "loss": 0.5, "scale": 2.0} | common,
        {"step": 4, "epoch": 2, "loss": 2.5, "scale": 6.0, "score": 20.0, "val": {"of": 2}} | common,
        {"step": 6, "epoch": 3, "loss": 4.5, "scale": 10.0, "score": 30.0, "val": {"of": 3}} | common]
    assert "epoch 3: loss 4.500, a message\n" in capsys.readouterr().err
    best, last = (clip.load_checkpoint(tmp_path / file) for file in ("best.pt", "last.pt"))
    assert best.keys() == {"format", "method", "settings", "state", "step", "model"}
    assert last.keys() == best.keys() | {"optimizer", "module"}
    assert best["method"] == "toy" and best["settings"]["epochs"] == 3


@pytest.mark.parametrize("asked, index", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_joined_by_its_number(asked, index, monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(data, "seed_everything", lambda seed: None)
    device = torch.device("cuda", index)
    assert eval.join(argparse.Namespace(device=asked, seed=0)) == device and joined == [device]


# ---------------------------------------------------------------- several checkpoints, embeddings, curves

FROZEN = ["--clip", "{folder}/mxm/best.pt", "--cache", "{folder}/cache"]
RUNS = {"mxm": ["train_mxm"], "clip": ["train_mxm", "--loss", "clip", "--seed", "1"],
        "user": ["train_user", "--queue", "0", "--dim", "16"],
        "adapter": ["train_adapter", "--clip", "{folder}/mxm/best.pt", "--frames", "2", "--lr", "0.01"],
        "class": ["train_clip4cmr", *FROZEN, "--dim", "32"],
        "class-outer": ["train_clip4cmr", *FROZEN, "--dim", "32", "--task", "outer"],
        "class-outer-1": ["train_clip4cmr", *FROZEN, "--dim", "32", "--task", "outer", "--seed", "1"],
        "cmaclip": ["train_cmaclip", "--layers", "1"]}


@pytest.fixture(scope="module")
def run(squares, tmp_path_factory):
    """run(name) -> the folder of that short run, which is trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def trained(name):
        script, *words = [word.format(folder=folder) for word in RUNS[name]]
        if "{folder}" in " ".join(RUNS[name]):
            trained("mxm")
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as patch, kept_signals():
                patch.setitem(clip.MODELS, "tiny", SMALL)
                importlib.import_module(script).main(arguments(squares, *words, "--out", folder / name))
        return folder / name
    return trained


def score_matrix(path, instances):
    """The scores of all captions with all images (C, N) by one checkpoint's model."""
    model, checkpoint = eval.restore(path, "cpu")
    if checkpoint["method"] == "train_adapter":
        loader = eval.evaluation_loader(model, instances, frames=checkpoint["settings"]["frames"])
        frames, mask, texts = train_adapter.embed(model, loader, "off")
        return train_adapter.similarity(texts, frames, mask)
    images, texts = eval.embed(model, instances, "off")
    return texts @ images.t()


@pytest.mark.parametrize("names", [("mxm", "user", "clip"), ("adapter", "user"),
                                   ("class-outer", "class-outer-1")])
def test_the_mean_of_several_models(names, run, squares, tmp_path, capsys):
    """And of the first alone: of CLIP4CMR's, by the labels of the instances that have one."""
    files = [run(name) / "best.pt" for name in names]
    instances, tasks = data.load(squares, split="test")
    if names[0] == "class-outer":
        instances = [x for x in instances if "outer" in x.labels]
    capsys.readouterr()
    evaluated(files[0], "--out", tmp_path)  # the single model's numbers stay
    evaluated(files, "--out", tmp_path, "--gallery", tmp_path / "gallery.png")
    rows = metrics(tmp_path)["test"]
    title = "mean of " + " + ".join(names)
    assert rows.keys() == {"model", title, "chance"}
    assert rows["model"] == metrics(files[0].parent)["test"]["model"]
    assert f"test {title} " in capsys.readouterr().out
    for row, averaged in (("model", files[:1]), (title, files)):
        scores = sum(score_matrix(file, instances) for file in averaged) / len(averaged)
        if names[0] == "class-outer":
            labels = np.array([x.labels["outer"] for x in instances])
            text_labels = labels[eval.caption_owner(instances)]
            expected = {"text_to_image": eval.class_metrics(scores, text_labels, labels, tasks["outer"]),
                        "image_to_text": eval.class_metrics(scores.t(), labels, text_labels, tasks["outer"])}
        else:
            functions = (lambda rows: scores[rows]), (lambda rows: scores.t()[rows])
            expected = eval.score_metrics(functions, **eval.layout(instances))
        for way in eval.WAYS:
            found = {name: value for name, value in rows[row][way].items() if isinstance(value, float)}
            assert found and found == pytest.approx({name: expected[way][name] for name in found})
    assert all(rows[title][way] != rows["model"][way] for way in eval.WAYS)
    assert Image.open(tmp_path / "gallery.png").format == "PNG"


def test_search_by_several_models(run, squares, capsys):
    files = [run("mxm") / "best.pt", run("user") / "best.pt"]
    instances, _ = data.load(squares, split="test")
    words = instances[3].captions[0]
    row = eval.caption_owner(instances).tolist().index(3)
    scores = sum(score_matrix(file, instances)[row] for file in files) / 2
    capsys.readouterr()
    evaluated(files, "--query", words)
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    best, order = scores.sort(descending=True)
    assert [id for _, id in lines] == [instances[i].id for i in order[:5].tolist()]
    assert [float(score) for score, _ in lines] == pytest.approx(best[:5].tolist(), abs=6e-4)


@pytest.mark.parametrize("names", [("mxm",), ("mxm", "user"), ("adapter",), ("class-outer",)])
def test_embeddings(names, run, squares, tmp_path):
    files = [run(name) / "best.pt" for name in names]
    path = tmp_path / "new" / "out.npz"
    evaluated(files, "--embeddings", path, "--out", tmp_path)
    assert os.listdir(path.parent) == ["out.npz"] and "test" in metrics(tmp_path)
    instances, tasks = data.load(squares, split="test")
    if names[0] == "class-outer":  # instances with this label, whose groups are its classes
        instances, _ = data.by_class((instances, tasks), "outer", "", "")
    with np.load(path) as found:
        assert found["ids"].tolist() == [x.id for x in instances]
        assert found["groups"].tolist() == [x.group for x in instances]
        assert found["owners"].tolist() == eval.caption_owner(instances).tolist()
        assert found["captions"].tolist() == [caption for x in instances for caption in x.captions]
        if names[0] != "class-outer":
            colours = [tasks["outer"][x.labels["outer"]] if "outer" in x.labels else "" for x in instances]
            assert found["label_outer"].tolist() == colours and "" in colours
        for key in ("images", "texts"):
            assert np.linalg.norm(found[key], axis=1) == pytest.approx(np.ones(len(found[key])), abs=1e-5)
        if names != ("adapter",):
            scores = sum(score_matrix(file, instances) for file in files) / len(files)
            assert torch.allclose(torch.from_numpy(found["texts"] @ found["images"].T), scores, atol=1e-5)


@pytest.mark.parametrize("names, says", [
    (("mxm", "cmaclip"), "no similarities to average"), (("class", "class-outer"), "do not rank the same"),
    (("mxm", "class"), "do not rank the same"), (("cmaclip",), "no --embeddings of each")])
def test_models_that_make_no_mean(names, says, run, tmp_path, capsys):
    argv = ["--checkpoint", *(run(name) / "best.pt" for name in names), "--out", tmp_path]
    assert says in refused(capsys, [*argv, "--embeddings", tmp_path / "out.npz"], eval.main)
    assert os.listdir(tmp_path) == []


def test_models_of_other_data_need_to_be_told_on_which(run, squares, tmp_path, capsys):
    other = clip.load_checkpoint(run("clip") / "best.pt")
    other["settings"]["data"] = "other.jsonl"
    clip.save_checkpoint(tmp_path / "other.pt", other)
    files = [run("mxm") / "best.pt", tmp_path / "other.pt"]
    assert "say with --data" in refused(capsys, ["--checkpoint", *files], eval.main)
    evaluated(files, "--data", squares, "--out", tmp_path)
    assert [title.split()[:2] for title in metrics(tmp_path)["test"]] == [["mean", "of"], ["chance"]]


@pytest.mark.parametrize("option", ["--gallery", "--embeddings", "--attention", "--out"])
def test_a_path_that_cannot_be_written_is_found_before_any_work(option, tmp_path, capsys):
    """Under a file, a folder: the checkpoint, which does not exist, is not even looked for."""
    (tmp_path / "file").write_text("")
    argv = ["--checkpoint", tmp_path / "none" / "best.pt", option]
    (tmp_path / "folder" / "metrics.json").mkdir(parents=True)
    for path in (tmp_path / "file" / "new" / "x", tmp_path / "folder"):
        said = refused(capsys, [*argv, path], eval.main)
        assert said.startswith(f"error: {path}") and "cannot be written; choose a file in a folder" in said
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_damaged_metrics_are_written_anew(tmp_path):
    path = tmp_path / "metrics.json"
    for damaged in ('{"test": {"a": {}', "[1]", '{"test": 1}', "[" * 100_000):
        path.write_text(damaged)
        eval.add_metrics(path, "test", {"model": {"rSum": 1.0}})
        assert json.loads(path.read_text()) == {"test": {"model": {"rSum": 1.0}}}
    eval.add_metrics(path, "val", {})
    eval.add_metrics(path, "test", {"mean": {}})
    assert json.loads(path.read_text()) == {"test": {"model": {"rSum": 1.0}, "mean": {}}, "val": {}}


@pytest.mark.parametrize("argv, says", [
    ([], "give one of --checkpoint"), (["--curves", "x", "--checkpoint", "y"], "give one of --checkpoint"),
    (["--curves", "x", "--gallery", "g.png"], "--curves goes with --out alone"),
    (["--clip", "tiny"], "--clip needs --data"),
    (["--checkpoint", "x", "--top", "3"], "--top is for --query"),
    (["--checkpoint", "x", "--prompt", "a {}"], "--prompt is for --clip"),
    (["--clip", "x", "--data", "y", "--prompt", "a photo"], "{} is missing"),
    (["--checkpoint", "x", "--query", "red", "--attention", "a.png"], "--attention and --query")])
def test_flags_that_do_not_work_together(argv, says, capsys):
    assert says in refused(capsys, argv, eval.main)


# ---------------------------------------------------------------- a CLIP as it is, folders, queries

def test_a_clip_as_it_is(run, squares, tmp_path, capsys):
    """Retrieval as of the run's own checkpoint, and classes by the mean of their prompts."""
    path = run("mxm") / "best.pt"
    prompts = ["a {} square", "the frame is {}"]
    eval.main(["--clip", str(path), "--data", str(squares), "--device", "cpu", "--amp", "off", "--out",
               str(tmp_path), "--prompt", *prompts])
    rows = metrics(tmp_path)["test"]
    assert rows["model"] == metrics(run("mxm"))["test"]["model"] and rows.keys() >= {"chance", "zero-shot"}
    instances, tasks = data.load(squares, split="test")
    model, _ = clip.load(path, "cpu")
    images, _ = eval.embed(model, instances, "off")
    for task, names in tasks.items():
        right = []
        for x, image in zip(instances, images):
            scores = []
            for name in names:
                tokens = model.tokenizer([prompt.format(name) for prompt in prompts], model.context_length)
                with torch.no_grad():
                    text = torch.nn.functional.normalize(model.encode_text(tokens), dim=1).mean(0)
                scores.append((image @ text / text.norm()).item())
            if task in x.labels:
                right.append(names[x.labels[task]] == names[int(np.argmax(scores))])
        assert rows["zero-shot"][task]["accuracy"] == pytest.approx(100 * np.mean(right))
    assert "inner, zero-shot: accuracy" in capsys.readouterr().out


def test_a_folder_of_pictures_is_searched(run, squares, tmp_path, monkeypatch, capsys):
    """Several queries, whose results name files; features are kept, so that no picture is encoded again."""
    folder = tmp_path / "pictures" / "more"
    folder.mkdir(parents=True)
    for i in range(5):
        os.link(os.path.join(os.path.dirname(squares), f"{i}-0.png"), folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    asked = [run("mxm"), "--data", "pictures", "--query", "a red square", "blue", "--top", 3]
    capsys.readouterr()
    evaluated(*asked, "--gallery", "q.png", "--embeddings", "e.npz")
    said = capsys.readouterr().out
    assert said.startswith("a red square:") and "\nblue:" in said and said.count("pictures/more/") == 6
    with np.load("e.npz") as found:
        assert found["ids"].tolist() == [f"more/{i}.png" for i in range(5)] and len(found["texts"]) == 0
        images = found["images"]
    kept = np.load(os.path.join("runs", "features", os.listdir("runs/features")[0]))
    assert np.allclose(kept, images) and sorted(os.listdir()) == ["e.npz", "pictures", "q.png", "runs"]
    monkeypatch.setattr(eval, "embed_images", None)
    evaluated(*asked)
    assert capsys.readouterr().out == said.partition("written")[0]


@pytest.mark.parametrize("name", ["cmaclip", "class"])
def test_labelled_test_rows_alone_are_scored_by_the_models_classes(name, run, squares, tmp_path, capsys):
    """Not by the file's own, of which there are so many here that they would be taken for remarks."""
    rows = [json.loads(line) for line in open(squares)]
    rows = [row for row in rows if row["split"] == "test"]
    unknown = [row | {"id": f"{row['id']}-{k}", "labels": {"inner": f"{row['id']} {k}"}}
               for row in rows for k in range(3)]
    for file, content in (("known", rows), ("alone", rows + unknown)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        capsys.readouterr()
        evaluated(run(name), "--data", tmp_path / f"{file}.jsonl", "--root", os.path.dirname(squares),
                  "--out", tmp_path / file)
    said = capsys.readouterr().out
    assert ("32 instances, 80 pairs" if name == "cmaclip" else "8 instances, 20 captions") in said
    found = metrics(tmp_path / "alone")[f"{tmp_path}/alone.jsonl test"]
    expected = metrics(run(name))["test"]
    for row in ("model", "majority") if name == "cmaclip" else ("model",):
        task = "inner" if name == "cmaclip" else "text_to_image"
        assert found[row][task] == expected[row][task]


def test_all_splits_at_once(run, squares, tmp_path):
    evaluated(run("mxm"), "--split", "all", "--embeddings", tmp_path / "e.npz", "--out", tmp_path)
    with np.load(tmp_path / "e.npz") as found:
        assert found["ids"].tolist() == [f"s{i}" for i in range(40)]
