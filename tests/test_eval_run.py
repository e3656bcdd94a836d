"""Tests of what eval.py keeps around a training loop: the progress line, errors, the folder of a run, and
eval.Run with a linear layer. What a killed, stopped or resumed run of a script ends with is tested in
test_runs.py.

    python -m pytest tests/test_eval_run.py
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import sys

import pytest
import torch

import clip
import data
import eval
from runs import in_process, log  # noqa: F401 (in_process acts by being here)

EPOCHS, STEPS_PER_EPOCH = 3, 2


# ---------------------------------------------------------------- the folder of a run, what is said

def test_progress_plain(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    progress = eval.Progress(10, start=4, every=0)
    progress.step(5, 64, loss=1.23456)
    progress.line("a remark")
    eval.Progress(10, every=1e9).step(5, 64, loss=2.0)  # too early
    eval.Progress(10, every=1e9).step(10, 64, loss=3.0)  # the last is always said
    eval.Progress(10, every=0, quiet=True).step(10, 64, loss=4.0)
    lines = out.getvalue().split("\n")
    assert re.fullmatch(r"step 5/10  loss 1\.235  [\d,]+ samples/s  \d+:\d\d left", lines[0])
    assert lines[1] == "a remark" and lines[2].startswith("step 10/10  loss 3 ") and lines[3:] == [""]
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal(monkeypatch):
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = eval.Progress(2)
        progress.last = 0
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


@pytest.mark.parametrize("error, code, line", [
    (data.DataError("no such data"), 2, "error: no such data\n"),
    (clip.CheckpointError("no such file"), 2, "error: no such file\n"),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_one_line_errors(error, code, line, capsys):
    with pytest.raises(SystemExit) as stopped, eval.one_line_errors():
        raise error
    assert stopped.value.code == code and capsys.readouterr().err == line


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), eval.one_line_errors():
        {}["x"]
    with eval.one_line_errors():
        pass


def test_open_run_moves_an_old_run_aside(tmp_path, capsys):
    out = tmp_path / "run"
    for number in range(3):
        with_slash = f"{out}{os.sep}"  # which changes nothing
        assert eval.open_run(with_slash, {"lr": number}, False) is None
        (out / "last.pt").write_text(str(number))
    assert [(tmp_path / f"run{end}" / "last.pt").read_text() for end in (".1", ".2", "")] == ["0", "1", "2"]
    assert json.loads((out / "config.json").read_text()) == {"lr": 2}
    assert json.loads((tmp_path / "run.1" / "config.json").read_text()) == {"lr": 0}
    assert f"moved to {out}.2" in capsys.readouterr().err


def test_open_run_resumes(tmp_path):
    out, settings = tmp_path, {"lr": 0.1, "out": "x", "workers": 0, "resume": False, "new": None}
    with pytest.raises(clip.CheckpointError, match="there is no .*last.pt"):
        eval.open_run(out / "nothing", settings, True)
    assert not (out / "nothing").exists()
    clip.save_checkpoint(out / "last.pt", {"settings": {"lr": 0.1, "out": "y", "workers": 3}, "step": 6})
    lines = ['{"step": 3, "loss": 2}\n', '{"step": 6, "loss": 1}\n',
             '{"step": 9, "loss": 0.5}\n', '{"step": 6, "lo']
    (out / "log.jsonl").write_text("".join(lines))
    (out / ".writing-abc").write_text("left by a kill")
    # a process that is not the first only reads
    assert eval.open_run(out, settings, True, first=False)["step"] == 6
    assert (out / "log.jsonl").read_text() == "".join(lines) and not (out / "config.json").exists()
    assert eval.open_run(out, settings | {"workers": 2}, True)["step"] == 6
    assert (out / "log.jsonl").read_text() == "".join(lines[:2])
    assert sorted(os.listdir(out)) == ["config.json", "last.pt", "log.jsonl"]
    with pytest.raises(clip.CheckpointError, match="--lr was 0.1 .* 0.2 now"):
        eval.open_run(out, settings | {"lr": 0.2}, True)
    with pytest.raises(clip.CheckpointError, match="log.jsonl: cannot be written"):
        eval.log_line(out / "config.json", step=1)


def test_restore_imports_nothing_but_the_methods(tmp_path, monkeypatch):
    (tmp_path / "evil_method.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for method in ("evil_method", "os", None, ["train_mxm"], "train_mxm.losses"):
        clip.save_checkpoint(tmp_path / "x.pt", {"method": method})
        with pytest.raises(clip.CheckpointError, match="which is none of train_"):
            eval.restore(tmp_path / "x.pt")


# ---------------------------------------------------------------- a run

class Numbers:
    """A loader whose batches are the numbers of the steps."""

    def batches(self, start, stop):
        return iter(range(start, stop))


class Toy:
    """Two weights, and a module that only going on needs; three epochs of two steps."""

    def __init__(self, out, resume=False, eval_every=1):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(1, 1)
        self.module = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        args = argparse.Namespace(out=str(out), resume=resume, epochs=EPOCHS, eval_every=eval_every)
        self.run = eval.Run(args, "toy", optimizer, EPOCHS * STEPS_PER_EPOCH, STEPS_PER_EPOCH,
                            self.pack, self.unpack, {"module": self.module})

    def pack(self):
        return {"model": clip.weights(self.model)}

    def unpack(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])

    def steps(self):
        """Train; yields (number of the epoch, whether to evaluate, the step's loss) after each step."""
        for step, number in self.run.batches(Numbers()):
            assert number == step
            loss = self.model(torch.full((1, 1), number + 1.0)).square().sum()
            self.run.optimizer.zero_grad()
            loss.backward()
            self.run.optimizer.step()
            with torch.no_grad():
                self.module.weight += 1
            yield step // STEPS_PER_EPOCH + 1, self.run.log(loss, 1, scale=float(step)), loss.item()


def test_what_a_run_logs_and_writes_in_which_order(tmp_path, monkeypatch):
    events = []
    save, write = clip.save_checkpoint, eval.log_line

    def note_save(path, checkpoint):
        events.append((os.path.basename(path), checkpoint["step"]))
        save(path, checkpoint)

    def note_line(out, **values):
        events.append(("log", values["step"]))
        write(out, **values)
    monkeypatch.setattr(clip, "save_checkpoint", note_save)
    monkeypatch.setattr(eval, "log_line", note_line)
    toy = Toy(tmp_path, eval_every=2)
    asked, losses = [], []
    for epoch, evaluate, loss in toy.steps():
        asked.append(evaluate)
        losses.append(loss)
        if evaluate:
            toy.run.keep_best(10.0 * epoch, "a message", val={"score": 10.0 * epoch})
    assert asked == [False, False, False, True, False, True]  # the second epoch, and the last
    assert events == [("last.pt", 0), ("log", 2), ("last.pt", 2), ("best.pt", 4), ("log", 4), ("last.pt", 4),
                      ("best.pt", 6), ("log", 6), ("last.pt", 6)]
    means = [pytest.approx((losses[i] + losses[i + 1]) / 2) for i in (0, 2, 4)]
    assert log(tmp_path) == [{"step": 2, "epoch": 1, "loss": means[0], "scale": 1.0},
                             {"step": 4, "epoch": 2, "loss": means[1], "scale": 3.0, "val": {"score": 20.0}},
                             {"step": 6, "epoch": 3, "loss": means[2], "scale": 5.0, "val": {"score": 30.0}}]
    assert len(toy.run.seconds) == 6 and toy.run.seconds_per_step() in toy.run.seconds
    best = clip.load_checkpoint(tmp_path / "best.pt")
    last = clip.load_checkpoint(tmp_path / "last.pt")
    assert best.keys() == {"format", "method", "settings", "state", "step", "model"}
    assert last.keys() == best.keys() | {"optimizer", "module"}
    assert best["method"] == "toy" and best["settings"]["epochs"] == EPOCHS


def test_the_highest_score_is_kept(tmp_path, capsys):
    toy = Toy(tmp_path)
    waited, kept = [], []
    scores = iter([50.0, 50.0, 40.0])
    for epoch, evaluate, _ in toy.steps():
        if evaluate:
            toy.run.keep_best(next(scores), f"evaluation {epoch}")
            waited.append(toy.run.state["waited"])
            kept.append(clip.load_checkpoint(tmp_path / "best.pt")["step"])
    assert waited == [0, 1, 2] and kept == [2, 2, 2]  # an equal one is no better
    assert toy.run.state["best"] == 50
    assert re.search(r"^epoch 3: loss \d+\.\d{3}, evaluation 3$", capsys.readouterr().err, re.MULTILINE)


def test_finish_ends_a_run_for_good(tmp_path, capsys):
    toy = Toy(tmp_path)
    assert toy.run.seconds_per_step() is None
    for epoch, evaluate, _ in toy.steps():
        if evaluate and epoch == 2:
            toy.run.finish("enough")
    assert toy.run.state["step"] == 4 and "epoch 2: enough" in capsys.readouterr().err
    written = (tmp_path / "last.pt").read_bytes()
    resumed = Toy(tmp_path, resume=True)
    assert list(resumed.steps()) == [] and (tmp_path / "last.pt").read_bytes() == written
    assert len(log(tmp_path)) == 2 and resumed.run.state == toy.run.state
    for part in ("model", "module"):  # the module, too, is as it was
        assert torch.equal(getattr(resumed, part).weight, getattr(toy, part).weight)
    moment = resumed.run.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(moment, toy.run.optimizer.state_dict()["state"][0]["momentum_buffer"])


def test_check_refuses_what_is_not_finite(tmp_path):
    run = Toy(tmp_path).run
    run.check(torch.tensor(1.0), torch.tensor(0.0))
    nan, inf = math.nan, math.inf
    for loss, norm in ((nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (-inf, inf)):
        with pytest.raises(SystemExit, match="^error: the loss is .* at step 0; try a lower --lr"):
            run.check(torch.tensor(loss), torch.tensor(norm))


@pytest.mark.parametrize("steps, warmup, warm", [(40, 0.25, 10), (7, 0.05, 1), (6, 0.0, 1)])
def test_warmup_cosine(steps, warmup, warm):
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
        expected = 3.0 * ((step + 1) / warm if step < warm else cosine)
        assert eval.warmup_cosine(step, steps, warmup, 3.0) == pytest.approx(expected, abs=1e-12)
    assert eval.warmup_cosine(steps, steps, warmup) == pytest.approx(0, abs=1e-12)


def test_a_run_of_before_resumes(tmp_path):
    """The state of an earlier version's last.pt has fewer entries."""
    Toy(tmp_path)
    checkpoint = clip.load_checkpoint(tmp_path / "last.pt")
    checkpoint["state"] = {"step": 3, "best": 40.0, "loss_sum": 1.0}
    clip.save_checkpoint(tmp_path / "last.pt", checkpoint)
    state = Toy(tmp_path, resume=True).run.state
    assert state == {"step": 3, "best": 40.0, "loss_sum": 1.0, "waited": 0, "finished": False}


@pytest.mark.parametrize("asked, index", [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_joined_by_its_number(asked, index, monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(data, "seed_everything", lambda seed: None)
    device = torch.device("cuda", index)
    assert eval.join(argparse.Namespace(device=asked, seed=0)) == (0, 1, device) and joined == [device]
