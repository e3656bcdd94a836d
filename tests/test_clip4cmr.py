"""Tests of train_clip4cmr.py: its model and its losses against plain versions, then whole runs on features
from files. Of those on a frozen CLIP are test_runs.py and test_eval_run.py.
"""
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import eval
import losses
import train_clip4cmr
from runs import in_process, log, make_features, refused, spy  # noqa: F401
from train_clip4cmr import (CLIP4CMR, CONSTANTS, FROZEN, LOSSES, PAIR_WISE, SHAPES, main, settings,
                            standardise, total_loss)

CLASSES, DI, DT = 4, 12, 10  # of make_features


def on_features(folder, *more):
    """Two epochs of three steps on folder/train.npz, in this process."""
    return ["--data", "own", "--root", str(folder), "--features", "train.npz", "test.npz", "--epochs", "2",
            "--batch-size", "7", "--lr", "1e-2", "--dim", "16", "--hidden", "8", "--device", "cpu",
            *map(str, more)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_features(folder)
    return folder


def heads_of(path):
    return clip.load_checkpoint(path)["heads"]


# ---------------------------------------------------------------- the model and its loss

def test_the_model_is_what_the_paper_says():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model, again, other = (CLIP4CMR(None, (DI, DT), CLASSES, 512, 9, 0.4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())  # its weights depend on the seed alone
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(model.prototypes, other.prototypes)
    for rows in (model.classifier, model.prototypes):
        assert rows.shape == (CLASSES, 512) and torch.allclose(rows.norm(dim=1), torch.ones(CLASSES))
    for modality, width in (("image", DI), ("text", DT)):
        mean, std, head, embed = (getattr(model, name.format(modality))
                                  for name in ("{}_mean", "{}_std", "{}_head", "embed_{}"))
        mean.copy_(torch.randn(width))
        std.copy_(torch.rand(width) + 0.5)
        x = torch.randn(7, width, dtype=torch.float64)
        model.eval()
        h = ((x - mean) / std) @ head[0].weight.double().t() + head[0].bias
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        h = h @ head[2].weight.double().t() + head[2].bias
        assert torch.allclose(embed(x.float()).double(), h / h.norm(dim=1, keepdim=True), atol=1e-5)
        model.train()
        dropped = embed(x.float())
        kept = dropped != 0  # of what is left, 1 / (1 - p) as much, which unit norm takes out again
        assert 0.3 < 1 - kept.float().mean() < 0.5
        assert torch.allclose(dropped.double(), F.normalize(h * kept, dim=1), atol=1e-5)


def test_standardisation_is_that_of_the_training_features():
    """A constant column is not blown up: rounding in sums is no deviation, and divided by it a test feature
    that differs a little would drown all others."""
    rows = 9000
    rng = np.random.default_rng(0)
    images = (rng.normal(size=(rows, 3)) * (1, 50, 0.01) + (0, 7, 30)).astype(np.float32)
    texts = np.array([1, 0, 0.1, 123.4, 50000.3], np.float32).repeat(rows).reshape(5, rows).T.copy()
    texts[:, 0] = rng.normal(size=rows)
    texts[::2, 4] = np.nextafter(texts[1, 4], np.float32(np.inf))  # the same but for float32's rounding
    model = CLIP4CMR(None, (3, 5), 2, 4, 4)
    ones = np.ones(rows, np.int64)
    standardise(model, data.Features(images, texts, ones, ones, None, None))
    assert np.allclose(model.image_mean, images.astype(float).mean(0), rtol=1e-6)
    assert np.allclose(model.image_std, images.astype(float).std(0), rtol=1e-5)
    assert np.allclose(model.text_mean, texts.astype(float).mean(0), rtol=1e-6)
    assert model.text_std.tolist() == pytest.approx([texts[:, 0].std(), 1, 1, 1, 1], rel=1e-5)


def test_a_hybrid_is_the_weighted_sum_of_its_losses():
    """Class-wise losses are of both modalities, with prototypes and a classifier of unit norm."""
    torch.manual_seed(0)
    model = CLIP4CMR(None, (DI, DT), CLASSES, 3, 9, fixed=False)
    classifier, prototypes = model.classifier.detach().clone(), model.prototypes.detach().clone()
    for rows in (model.classifier, model.prototypes):
        rows.data.mul_(3)  # both are used at unit norm
    images, texts = (F.normalize(torch.randn(n, 3), dim=1) for n in (9, 6))
    image_labels, text_labels = torch.arange(9) % CLASSES, torch.arange(6) % 3  # class 3 has no text
    c = CONSTANTS | {"cross-entropy": {"temperature": 0.3}}
    plain = {"label-regression": lambda x, y: losses.label_regression_loss(x @ classifier.t(), y),
             "cross-entropy": lambda x, y: F.cross_entropy(x @ classifier.t() / 0.3, y),
             "pcl": lambda x, y: losses.prototype_contrastive_loss(x, prototypes, y, **c["pcl"]),
             "proxy-nca": lambda x, y: losses.proxy_nca_loss(x, prototypes, y, **c["proxy-nca"]),
             "proxy-anchor": lambda x, y: losses.proxy_anchor_loss(x, prototypes, y, **c["proxy-anchor"])}
    expected = {}
    for name in PAIR_WISE:
        loss = getattr(losses, name.replace("-", "_") + "_loss")
        expected[name] = loss(images, texts, image_labels, text_labels, **CONSTANTS.get(name, {})).item()
    for name, loss in plain.items():
        expected[name] = (loss(images, image_labels) + loss(texts, text_labels)).item()
    assert tuple(expected) == LOSSES and len({round(value, 5) for value in expected.values()}) == 11

    def found(weights):
        return total_loss(model, weights, images, image_labels, texts, text_labels, c).item()

    for name, value in expected.items():
        assert found({name: 1.0}) == pytest.approx(value, rel=1e-6), name
    weights = {name: 0.5 + k for k, name in enumerate(LOSSES)}
    assert found(weights) == pytest.approx(sum(weights[name] * expected[name] for name in LOSSES), rel=1e-6)


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("loss, prototypes, moving", [
    ("n-pairs", "learned", set()), ("cross-entropy", "fixed", {"classifier"}), ("pcl", "fixed", set()),
    ("pcl", "learned", {"prototypes"})])
def test_a_loss_trains_only_what_it_has(loss, prototypes, moving, folder, tmp_path):
    main(on_features(folder, "--out", tmp_path, "--loss", loss, "--prototypes", prototypes))
    lines = log(tmp_path)
    assert lines[1]["loss"] < lines[0]["loss"] and lines[1]["val"]["mAP"] > 0
    heads = heads_of(tmp_path / "last.pt")
    start = CLIP4CMR(None, (DI, DT), CLASSES, 16, 8).state_dict()
    still = {name for name in start if torch.equal(heads[name], start[name])}
    assert still == {"classifier", "prototypes"} - moving


def test_settings_reach_the_model_and_the_loss(folder, tmp_path, monkeypatch):
    seen = spy(monkeypatch, train_clip4cmr, "total_loss")
    main(on_features(folder, "--out", tmp_path, "--loss", "proxy-anchor+pcl+triplet:2",
                     "--margin", 0.5, "--temperature", 0.3, "--dim", 24, "--hidden", 10, "--dropout", 0.3,
                     "--epochs", 1, "--seed", 4, "--no-standardise"))
    model, weights, *_, constants = seen[0]
    assert model.image_head[3].p == model.text_head[3].p == 0.3
    assert weights == {"proxy-anchor": 1.0, "pcl": 1.0, "triplet": 2.0}
    assert constants == {"proxy-anchor": {"margin": 0.5, "alpha": 1.0}, "pcl": {"temperature": 0.3},
                         "triplet": {"margin": 0.5}}
    expected = CLIP4CMR(None, (DI, DT), CLASSES, 24, 10, seed=4)
    heads = heads_of(tmp_path / "best.pt")
    assert all(heads[name].shape == value.shape for name, value in expected.state_dict().items())
    assert torch.equal(heads["prototypes"], expected.prototypes)
    assert not heads["image_mean"].any() and (heads["text_std"] == 1).all()


@pytest.mark.parametrize("argv, expected, start, folder", [
    ([], SHAPES, eval.SMALL_CLIP, "primitives"), (["--data", "products"], FROZEN, "ViT-B/32", "products"),
    (["--features", "a", "b"], FROZEN, "ViT-B/32", "features"),
    (["--features", "a", "b", "--data", "wikipedia"], FROZEN, "ViT-B/32", "wikipedia")])
def test_defaults(argv, expected, start, folder):
    args = settings(argv)
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.dim, args.hidden, args.dropout) == (1024, 256, 0.1)
    assert (args.loss, args.prototypes) == ("pcl", "fixed")
    assert args.clip == start and args.out == os.path.join("runs", f"clip4cmr-{folder}")


@pytest.mark.parametrize("scarce, fraction", [("text", 0.3), ("image", 0.55)])
def test_imbalance_cuts_every_batch_of_one_modality(scarce, fraction, folder, tmp_path, monkeypatch):
    """round(fraction b) of a batch of b, one at least. They are others in every epoch, so that in the end all
    classes were among them. The other modality is untouched."""
    seen = spy(monkeypatch, train_clip4cmr, "total_loss")
    main(on_features(folder, f"--{scarce}-fraction", fraction, "--out", tmp_path, "--epochs", 12))
    for place, modality in ((2, "image"), (4, "text")):
        share = fraction if modality == scarce else 1
        found = [len(given[place]) for given in seen]
        assert found == [max(1, round(share * size)) for size in [7, 7, 5] * 12]
    labels = [given[3 if scarce == "image" else 5] for given in seen]
    assert {of_batch[0].item() for of_batch in labels} == set(range(CLASSES))


@pytest.mark.parametrize("more, evaluations", [((), 14), (("--eval-every", 5), 10), (("--patience", 2), 2)])
def test_patience_spans_enough_steps(more, evaluations, folder, tmp_path, monkeypatch, capsys):
    """Ten evaluations without a better one end a run, or as many as 40 steps take: 14 that are three steps
    apart, ten that are 15 apart. Where --patience is given it is as many as that says."""
    values = iter([20, 30, *[20] * 19])
    monkeypatch.setattr(eval, "class_retrieval", lambda *a: {
        "mAP": next(values), "image_to_text": {"mAP": 0}, "text_to_image": {"mAP": 0}})
    monkeypatch.setattr(eval, "report", lambda *a: None)
    monkeypatch.setattr(train_clip4cmr, "PATIENCE_STEPS", 40)
    main(on_features(folder, "--epochs", 80, "--out", tmp_path, *more))
    assert len([line for line in log(tmp_path) if "val" in line]) == 2 + evaluations
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"no better val mAP than 30.0 in {evaluations} evaluations; stopped")


def test_the_rate_is_constant_and_adam_the_authors(folder, tmp_path, monkeypatch):
    def settings_of(_, optimizer):
        return [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    seen = spy(monkeypatch, torch.optim.Adam, "step", settings_of)
    main(on_features(folder, "--out", tmp_path, "--weight-decay", 0.25))
    assert seen == [[(1e-2, 0.25, (0.5, 0.999))]] * 6


def test_what_features_cannot_do_is_said(folder, tmp_path, capsys):
    main(on_features(folder, "--out", tmp_path, "--epochs", 1))
    out = ["--out", tmp_path / "new"]
    for words, says in ((["--query", "red"], "no words"), ([*out, "--split", "unseen"], "'unseen'"),
                        ([*out, "--gallery", "a.png"], "no pictures"),
                        ([*out, "--attention", "a.png"], "cmaclip")):
        argv = ["--checkpoint", tmp_path / "best.pt", *words]
        assert says in refused(capsys, argv, eval.main) and not (tmp_path / "new").exists()
