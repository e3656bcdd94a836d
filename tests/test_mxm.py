"""Tests of train_mxm.py: its losses on whole runs, views and captions, weights to start from; then eval.py on a result.

    python -m pytest tests/test_mxm.py

What every script promises of a run is tested in test_runs.py.
"""
import json
import math
import shutil

import pytest
import torch
from PIL import Image

import clip
import data
import eval
import train_mxm
from runs import arguments, in_process, kept_signals, log, make_squares, refused  # noqa: F401 (in_process acts by being here)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """A finished run; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with kept_signals():
        train_mxm.main(arguments(squares, "--out", out))
    return out


# ---------------------------------------------------------------- a run

def test_what_a_run_says_and_reports(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    train_mxm.main(arguments(squares, "--out", tmp_path / "run", "--resume"))  # nothing left but the report
    said = capsys.readouterr()
    assert "24 instances, 2 views x 2 captions" in said.err
    assert "text-to-image" in said.out and "test model" in said.out and "test chance" in said.out
    config, metrics = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["loss"] == "hybrid" and config["lr"] == train_mxm.SCRATCH["lr"]
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
        assert line in refused(capsys, arguments(squares, "--out", tmp_path / "run", "--clip", tmp_path / "weights.pt"), train_mxm.main)
    train_mxm.main(arguments(squares, "--out", tmp_path / "run", "--clip", whole / "best.pt", "--epochs", 1))  # a checkpoint brings its own
    config, after = json.loads((tmp_path / "run" / "config.json").read_text()), clip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert config["lr"] == train_mxm.PRETRAINED["lr"]
    for key, value in model.state_dict().items():  # it started there: three small steps later it is still near
        assert (after["clip"]["state_dict"][key] - value).abs().max() < 1e-4
    assert after["clip"]["merges"] == model.tokenizer.merges


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("option, value, says", [
    ("--views", 0, "positive"), ("--captions", -1, "positive"), ("--soft-weight", 1.5, "share from 0 to 1"), ("--soft-warmup", -0.1, "share from 0 to 1"),
    ("--soft-sharpness", 0, "positive"), ("--soft-relation", "true", "features"), ("--loss", "hrad", "hybrid")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    line = refused(capsys, arguments(squares, "--out", tmp_path / "run", option, value), train_mxm.main)
    assert says in line and not (tmp_path / "run").exists()


def test_pairs_need_as_many_views_as_captions(squares, tmp_path, capsys):
    argv = arguments(squares, "--out", tmp_path / "run", "--loss", "clip")
    assert "the same number" in refused(capsys, [*argv, "--captions", 2], train_mxm.main)
    assert "fewer views or captions" in refused(capsys, [*argv, "--views", 3, "--captions", 3], train_mxm.main)
    assert not (tmp_path / "run").exists()


def test_bad_arguments_of_the_evaluation(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder, no weights")
    for option, value, says in (("--checkpoint", tmp_path / "file", "file: "), ("--checkpoint", tmp_path / "none.pt", "no such file"),
                                ("--checkpoint", whole / "metrics.json", "metrics.json: "), ("--split", "tset", "tset"), ("--top", 0, "positive"),
                                ("--device", "gpu", "no device")):
        argv = {"--checkpoint": whole / "best.pt"} | {option: value}
        assert says in refused(capsys, [x for pair in argv.items() for x in pair], eval.main)
    weights = tmp_path / "weights.pt"
    clip.save(eval.restore(whole / "best.pt", "cpu")[0], weights)
    assert "not a checkpoint of this project" in refused(capsys, ["--checkpoint", weights], eval.main)


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
