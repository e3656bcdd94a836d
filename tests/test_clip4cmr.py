"""Tests of train_clip4cmr.py: its model and its weighted sum of losses against plain versions, then whole runs on features, frozen and trained CLIPs.

    python -m pytest tests/test_clip4cmr.py
"""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import losses
import train_clip4cmr
from runs import (COLOURS, ROOT, assert_documented_commands_parse, command, in_process, kept_signals, log, make_squares, metrics, evaluated, remarks,  # noqa: F401
                  refused)  # in_process acts by being here
from train_clip4cmr import CLIP4CMR, FINETUNED, FROZEN, main, settings, standardise, terms, total_loss

CLASSES, N, DI, DT = 4, 60, 6, 5
LOSSES = [*train_clip4cmr.PAIR_WISE, *train_clip4cmr.CLASS_WISE]


def write_features(path, seed=0, n=N, classes=CLASSES, **changes):
    """Both modalities show the class through noise; labels are names. Returns what was written."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    centres = np.random.default_rng(9).normal(size=(classes, DI + DT))
    both = 3 + centres[label] + 0.7 * rng.normal(size=(n, DI + DT))
    both = both.astype(np.float32)
    found = dict(image=both[:, :DI], text=both[:, DI:], label=np.array(list("wxyz"))[label], ids=np.arange(n)) | changes
    np.savez(path, **found)
    return found


def on_features(folder, *more):
    """Two epochs of three steps on folder/train.npz, in this process."""
    return ["--data", "own", "--root", str(folder), "--features", "train.npz", "test.npz", "--epochs", "2", "--batch-size", "20", "--lr", "1e-2",
            "--dim", "16", "--hidden", "8", "--device", "cpu", *map(str, more)]


def on_squares(squares, *more):
    """Two epochs on the squares' 21 training rows of a known outer colour."""
    return ["--data", str(squares), "--task", "outer", "--epochs", "2", "--batch-size", "7", "--eval-every", "1", "--dim", "16", "--workers", "0",
            "--device", "cpu", "--amp", "off", *map(str, more)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_features(folder / "train.npz"), write_features(folder / "test.npz", 1, 20)
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("squares"))


def save_clip(path, squares, seed=0):
    """Write the weights of a very small CLIP, with a tokenizer of its own; returns the model."""
    tokenizer = clip.Tokenizer.train([c for x in data.load(squares)[0] for c in x.captions], 600)
    torch.manual_seed(seed)
    model = clip.CLIP(clip.Config(16, 16, 1, 32, 8, 24, tokenizer.vocab_size, 32, 2, 1, 2))
    model.tokenizer = tokenizer
    clip.save_checkpoint(path, {"clip": clip.describe(model)})
    return model


@pytest.fixture(scope="module")
def runs(folder, squares, tmp_path_factory):
    """{kind: folder} of a run on features, with a frozen CLIP and with one that is trained; clip.pt is what the last two start from."""
    made = tmp_path_factory.mktemp("runs")
    save_clip(made / "clip.pt", squares)
    with kept_signals():
        main(on_features(folder, "--out", made / "features"))
        main(on_squares(squares, "--out", made / "frozen", "--clip", made / "clip.pt", "--cache", made / "cache", "--lr", 1e-2))
        main(on_squares(squares, "--out", made / "finetuned", "--clip", made / "clip.pt", "--finetune", "--lr", 1e-2, "--clip-lr", 3e-3, "--epochs", 12))
    return {kind: made / kind for kind in ("features", "frozen", "finetuned")} | {"clip": made / "clip.pt"}


# ---------------------------------------------------------------- the model and its loss

def test_the_model_is_what_the_paper_says():
    torch.manual_seed(3)
    before, model = torch.get_rng_state(), CLIP4CMR(None, (DI, DT), CLASSES, 512, 9, 0.4, seed=5)
    assert torch.equal(before, torch.get_rng_state())  # its weights depend on the seed alone
    for a, b in zip(model.state_dict().values(), CLIP4CMR(None, (DI, DT), CLASSES, 512, 9, 0.4, seed=5).state_dict().values()):
        assert torch.equal(a, b)
    assert not torch.equal(model.prototypes, CLIP4CMR(None, (DI, DT), CLASSES, 512, 9, 0.4, seed=6).prototypes)
    for rows in (model.classifier, model.prototypes):
        assert rows.shape == (CLASSES, 512) and torch.allclose(rows.norm(dim=1), torch.ones(CLASSES))
    for kind, width in (("image", DI), ("text", DT)):
        getattr(model, f"{kind}_mean").copy_(torch.randn(width))
        getattr(model, f"{kind}_std").copy_(torch.rand(width) + 0.5)
        head, embed = getattr(model, f"{kind}_head"), getattr(model, f"embed_{kind}")
        x = torch.randn(7, width, dtype=torch.float64)
        model.eval()
        h = ((x - getattr(model, f"{kind}_mean")) / getattr(model, f"{kind}_std")) @ head[0].weight.double().t() + head[0].bias
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        h = h @ head[2].weight.double().t() + head[2].bias
        assert torch.allclose(embed(x.float()).double(), h / h.norm(dim=1, keepdim=True), atol=1e-5)
        model.train()
        dropped = embed(x.float())
        kept = dropped != 0  # of what is left, 1 / (1 - p) as much, which unit norm takes out again
        assert 0.3 < 1 - kept.float().mean() < 0.5
        assert torch.allclose(dropped.double(), F.normalize(h * kept, dim=1), atol=1e-5)


def test_it_embeds_as_its_clip_does(squares, tmp_path):
    inner = save_clip(tmp_path / "clip.pt", squares).eval()
    model = CLIP4CMR(inner, (16, 16), 3, 8).eval()
    images, tokens = torch.randn(2, 3, 16, 16), inner.tokenizer(["a red square", "blue"], 24)
    assert torch.equal(model.encode_image(images), model.embed_image(inner.encode_image(images)))
    assert torch.equal(model.encode_text(tokens), model.embed_text(inner.encode_text(tokens)))
    assert model.config == inner.config and model.tokenizer is inner.tokenizer


def test_standardisation_is_that_of_the_training_features():
    rng, model = np.random.default_rng(0), CLIP4CMR(None, (3, 2), 2, 4, 4)
    images, texts = (rng.normal(size=(9000, 3)) * (1, 50, 0.01) + (0, 7, 30)).astype(np.float32), rng.normal(size=(9000, 2)).astype(np.float32)
    texts[:, 1] = 0
    standardise(model, data.Features(images, texts, None, None, None, None))
    assert np.allclose(model.image_mean, images.astype(float).mean(0), rtol=1e-6) and np.allclose(model.image_std, images.astype(float).std(0), rtol=1e-5)
    assert np.allclose(model.text_mean, texts.astype(float).mean(0), rtol=1e-6)
    assert model.text_std.tolist() == pytest.approx([texts[:, 0].std(), 1], rel=1e-5)


@pytest.mark.parametrize("value", [0.1, 123.4, 50000.3])
def test_a_constant_column_is_not_blown_up(value):
    """Rounding in sums is no deviation: divided by it, a test feature that differs a little would drown all others."""
    model, features = CLIP4CMR(None, (2, 2), 2, 4, 4), np.random.default_rng(0).normal(size=(2173, 2)).astype(np.float32)
    features[:, 1] = value
    standardise(model, data.Features(features, features, None, None, None, None))
    assert model.image_std[1] == model.text_std[1] == 1 and model.image_std[0] == pytest.approx(features[:, 0].std(), rel=1e-5)


def test_a_hybrid_is_the_weighted_sum_of_its_losses():
    """Of both modalities for class-wise losses. Imbalance may leave a side of a batch empty: what is left counts, and gradients are finite."""
    torch.manual_seed(0)
    model = CLIP4CMR(None, (DI, DT), CLASSES, 3, 9, fixed=False)
    for rows in (model.classifier, model.prototypes):
        rows.data.mul_(3)  # both are used at unit norm
    images, texts = (F.normalize(torch.randn(n, 3), dim=1).requires_grad_() for n in (9, 6))
    own, other = torch.arange(9) % CLASSES, torch.arange(6) % 3  # class 3 has no text
    classifier, prototypes = F.normalize(model.classifier, dim=1), F.normalize(model.prototypes, dim=1)
    plain = {"label-regression": lambda x, y: losses.label_regression_loss(x @ classifier.t(), y),
             "cross-entropy": lambda x, y: F.cross_entropy(x @ classifier.t(), y),
             "pcl": lambda x, y: losses.prototype_contrastive_loss(x, prototypes, y), "proxy-nca": lambda x, y: losses.proxy_nca_loss(x, prototypes, y),
             "proxy-anchor": lambda x, y: losses.proxy_anchor_loss(x, prototypes, y, alpha=5.0)}
    both = {name: getattr(losses, name.replace("-", "_") + "_loss")(images, texts, own, other) for name in train_clip4cmr.PAIR_WISE}
    both |= {name: loss(images, own) + loss(texts, other) for name, loss in plain.items()}
    assert list(both) == LOSSES and len({round(v.item(), 5) for v in both.values()}) == 11
    for name, value in both.items():
        assert total_loss(model, {name: 1.0}, images, own, texts, other, 5.0).item() == pytest.approx(value.item(), rel=1e-6), name
    weights = {name: 0.5 + k for k, name in enumerate(LOSSES)}
    expected = sum(weights[name] * both[name].item() for name in LOSSES)
    assert total_loss(model, weights, images, own, texts, other, 5.0).item() == pytest.approx(expected, rel=1e-6)
    for a, b, left in ((9, 0, lambda loss: loss(images, own)), (0, 6, lambda loss: loss(texts, other)), (0, 0, lambda loss: torch.tensor(0.0))):
        found = total_loss(model, weights, images[:a], own[:a], texts[:b], other[:b], 5.0)
        assert found.item() == pytest.approx(sum(weights[name] * left(loss).item() for name, loss in plain.items()), rel=1e-6)
        found.backward()
        assert all(x.grad.isfinite().all() for x in (images, texts))


def test_terms_of_a_loss():
    assert terms("pcl") == {"pcl": 1.0} and terms("pcl+modality-invariant:0.1") == {"pcl": 1.0, "modality-invariant": 0.1}
    assert terms("triplet:2+proxy-nca:1e-3") == {"triplet": 2.0, "proxy-nca": 0.001}


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("loss", [*LOSSES, "pcl+modality-invariant:0.1"])
def test_every_loss_trains_and_only_what_it_has(loss, folder, runs, tmp_path):
    """Fixed prototypes stay where they are whatever the loss; the classifier moves for those that have it."""
    main(on_features(folder, "--out", tmp_path, "--loss", loss))
    lines, heads, start = log(tmp_path), clip.load_checkpoint(tmp_path / "last.pt")["heads"], CLIP4CMR(None, (DI, DT), CLASSES, 16, 8).state_dict()
    assert all(math.isfinite(r["loss"]) and r["val"]["mAP"] > 0 for r in lines) and lines[1]["loss"] < lines[0]["loss"]
    assert (lines == log(runs["features"])) == (loss == "pcl")  # the default
    moved = {name for name in start if not torch.equal(heads[name], start[name])}
    expected = {name for name in start if not name.startswith(("classifier", "prototypes"))} 
    assert moved == (expected | {"classifier"} if loss in ("label-regression", "cross-entropy") else expected)


def test_learned_prototypes_move(folder, tmp_path):
    main(on_features(folder, "--out", tmp_path, "--prototypes", "learned"))
    assert not torch.equal(clip.load_checkpoint(tmp_path / "last.pt")["heads"]["prototypes"], CLIP4CMR(None, (DI, DT), CLASSES, 16, 8).prototypes)


def test_settings_reach_the_model_and_the_loss(folder, tmp_path, monkeypatch):
    seen, plain, built = set(), losses.proxy_anchor_loss, []
    monkeypatch.setattr(losses, "proxy_anchor_loss", lambda *a, alpha: seen.add(alpha) or plain(*a, alpha=alpha))
    monkeypatch.setattr(train_clip4cmr, "CLIP4CMR", lambda *a: built.append(CLIP4CMR(*a)) or built[-1])
    main(on_features(folder, "--out", tmp_path, "--loss", "proxy-anchor", "--proxy-alpha", 3, "--dim", 24, "--hidden", 10, "--dropout", 0.3,
                     "--epochs", 1, "--seed", 4))
    heads = clip.load_checkpoint(tmp_path / "best.pt")["heads"]
    assert seen == {3.0} and heads["image_head.0.weight"].shape == (10, DI) and heads["text_head.2.weight"].shape == (24, 10)
    assert heads["prototypes"].shape == heads["classifier"].shape == (CLASSES, 24) and built[0].image_head[3].p == 0.3
    assert torch.equal(heads["prototypes"], CLIP4CMR(None, (DI, DT), CLASSES, 24, 10, seed=4).prototypes)


def test_the_papers_defaults():
    for argv, expected in ((["--clip", "RN50"], FROZEN), (["--features", "a", "b"], FROZEN), (["--clip", "RN50", "--finetune"], FINETUNED),
                           ([], train_clip4cmr.SCRATCH), (["--clip", "RN50", "--lr", "0.5"], FROZEN | {"lr": 0.5})):
        args = settings(argv)
        assert {name: getattr(args, name) for name in expected} == expected and args.finetune == (expected["clip_lr"] > 0)
        assert (args.dim, args.hidden, args.dropout, args.patience, args.weight_decay) == (1024, 256, 0.1, 10, 0.0)


def used_rows(folder, monkeypatch, argv, epochs):
    """Run, and return which training rows of each modality its head saw: {"image", "text": for each epoch a sorted list}."""
    train, seen = data.feature_splits(["train.npz", "test.npz"], str(folder))[0]["train"], {"image": [], "text": []}
    for kind, rows in (("image", train.images), ("text", train.texts)):
        def embed(model, x, kind=kind, rows=rows, plain=getattr(CLIP4CMR, f"embed_{kind}")):
            if model.training:
                seen[kind].append([int(np.abs(rows - row).sum(1).argmin()) for row in x.numpy()])
            return plain(model, x)
        monkeypatch.setattr(CLIP4CMR, f"embed_{kind}", embed)
    main(argv)
    monkeypatch.undo()
    k = len(seen["image"]) // epochs
    return {kind: [sorted(sum(steps[k * e:k * (e + 1)], [])) for e in range(epochs)] for kind, steps in seen.items()}, train


@pytest.mark.parametrize("kind, other, share", [("text", "image", 0.3), ("image", "text", 0.55)])
def test_imbalance_uses_a_fixed_share_of_one_modality(kind, other, share, folder, tmp_path, monkeypatch):
    """Exactly round(share N) of its training samples, the same in every epoch; the other modality is untouched."""
    argv = on_features(folder, "--out", tmp_path, f"--{kind}-fraction", share, "--batch-size", 10, "--epochs", 3)
    used, train = used_rows(folder, monkeypatch, argv, 3)
    n = len(train.labels)
    assert used[other] == [list(range(n))] * 3
    assert used[kind] == [used[kind][0]] * 3 and len(set(used[kind][0])) == len(used[kind][0]) == round(share * n)


def test_samples_that_imbalance_takes_away_change_nothing(folder, tmp_path, monkeypatch):
    """As if they did not exist: whatever these texts are, the model that is trained is the same."""
    argv = on_features(folder, "--text-fraction", 0.3)
    used, train = used_rows(folder, monkeypatch, [*argv, "--out", str(tmp_path / "a")], 1)
    found, early = dict(np.load(folder / "train.npz")), np.flatnonzero([data.hash_tenth(id) != 9 for id in range(N)])
    assert np.array_equal(found["text"][early], train.texts)
    found["text"][np.delete(early, used["text"][0])] *= -7
    np.savez(tmp_path / "train.npz", **found), np.savez(tmp_path / "test.npz", **np.load(folder / "test.npz"))
    main([*argv, "--root", str(tmp_path), "--out", str(tmp_path / "b")])
    a, b = (clip.load_checkpoint(tmp_path / run / "last.pt")["heads"] for run in "ab")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("kind", ["features", "finetuned"])
def test_best_is_the_best_average_map_on_val(kind, runs, tmp_path):
    """And what the log says of val is what eval.py finds there."""
    lines, best = log(runs[kind]), clip.load_checkpoint(runs[kind] / "best.pt")
    values = [r["val"]["mAP"] for r in lines]
    assert all(r["val"]["mAP"] == (r["val"]["image_to_text"] + r["val"]["text_to_image"]) / 2 for r in lines)
    assert best["state"]["best"] == max(values) > min(values) and best["step"] == lines[values.index(max(values))]["step"]
    evaluated(runs[kind] / "best.pt", "--split", "val", "--out", tmp_path)
    assert metrics(tmp_path)["val"]["model"]["mAP"] == max(values)


@pytest.mark.parametrize("kind", ["features", "frozen", "finetuned"])
def test_eval_repeats_the_runs_metrics(kind, folder, squares, runs, tmp_path, capsys):
    before = metrics(runs[kind])["test"]
    classes = list("wxyz") if kind == "features" else sorted(COLOURS)
    assert before.keys() == {"model", "chance"} and before["chance"]["mAP"] < before["model"]["mAP"] <= 100
    for way in ("image_to_text", "text_to_image"):
        m = before["model"][way]
        assert list(m["per_class"]) == [c for c in classes if c in m["per_class"]] and len(m["per_class"]) > 3
        assert m["precision_recall"]["recall"] == pytest.approx(range(0, 101, 10)) and len(m["precision_recall"]["precision"]) == 11
        assert m["precision_scope"]["scope"][:3] == [1, 5, 10][:len(m["precision_scope"]["scope"])] and m["precision_scope"]["precision"][0] == m["P@1"]
    evaluated(runs[kind] / "best.pt", "--out", tmp_path)
    assert metrics(tmp_path)["test"] == before
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test model")).split()[2:]
    assert row == [f"{v:.1f}" for v in (*(before["model"][way]["mAP"] for way in ("image_to_text", "text_to_image")), before["model"]["mAP"])]


@pytest.mark.parametrize("kind", ["frozen", "finetuned"])
def test_metrics_are_those_of_its_embeddings(kind, squares, runs):
    """By loops, from the pictures and captions themselves, so that labels, captions and directions cannot be mixed up on the way."""
    model, tokenizer, _ = eval.restore(runs[kind] / "best.pt", "cpu")
    rows = [row for row in map(json.loads, open(squares)) if row["split"] == "test" and "outer" in row["labels"]]
    transform = clip.transform(16)
    with torch.no_grad():
        encode = lambda file: model.encode_image(transform(Image.open(os.path.join(os.path.dirname(squares), file)))[None])[0]
        images = [(sum(encode(file) for file in row["images"]), row["labels"]["outer"]) for row in rows]
        texts = [(t, row["labels"]["outer"]) for row in rows for t in model.encode_text(tokenizer(row["captions"], 24))]
    found = metrics(runs[kind])["test"]["model"]
    for way, queries, gallery in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        precisions = []
        for query, label in queries:
            ranking = [other == label for _, other in sorted(gallery, key=lambda item: -F.cosine_similarity(query, item[0], dim=0).item())]
            precisions.append(np.mean([sum(ranking[:p + 1]) / (p + 1) for p, right in enumerate(ranking) if right]))
        assert found[way]["mAP"] == pytest.approx(100 * np.mean(precisions), abs=1e-6)


def test_it_learns_colours_from_scratch(squares, tmp_path, capsys):
    main(on_squares(squares, "--out", tmp_path, "--epochs", 20, "--batch-size", 21, "--eval-every", 20, "--vocab-size", 600, "--image-size", 16))
    said, found = capsys.readouterr(), metrics(tmp_path)["test"]
    assert "3 of 24 instances have no known outer; they were left out" in said.err and "21 instances of 8 classes, trained features" in said.err
    assert found["model"]["mAP"] > 75 and found["chance"]["mAP"] < 40


# ---------------------------------------------------------------- CLIP: frozen, trained

def test_a_frozen_clip_stays_as_it_is_and_out_of_the_checkpoint(squares, runs, tmp_path, monkeypatch, capsys):
    loaded, plain = [], clip.load
    monkeypatch.setattr(clip, "load", lambda *a, **k: loaded.append(plain(*a, **k)) or loaded[-1])
    argv = on_squares(squares, "--out", tmp_path / "run", "--clip", tmp_path / "clip.pt", "--cache", tmp_path / "cache", "--lr", 1e-2)
    own = clip.identity(save_clip(tmp_path / "clip.pt", squares))
    main(argv)
    assert len(loaded) == 2 and all(clip.identity(model) == own for model, _ in loaded)  # as it was after training, as it is restored
    for name in ("last.pt", "best.pt"):
        checkpoint = clip.load_checkpoint(tmp_path / "run" / name)
        assert checkpoint["clip_identity"] == own and "clip" not in checkpoint and not any(name.startswith("clip") for name in checkpoint["heads"])
        assert len(checkpoint["optimizer"]["state"]) == 8 and (tmp_path / "run" / name).stat().st_size < (tmp_path / "clip.pt").stat().st_size
    with torch.no_grad():  # the features are CLIP's, of every view and caption of the labelled training rows
        train = data.load_split(squares, None, "train", "outer")[0]
        files = torch.stack([clip.transform(16)(Image.open(file)) for x in train for file in x.images])
        images, texts = loaded[0][0].encode_image(files), loaded[0][0].encode_text(loaded[0][0].tokenizer([c for x in train for c in x.captions], 24))
    for kind, features in (("image", images), ("text", texts)):
        assert torch.allclose(checkpoint["heads"][f"{kind}_mean"], features.mean(0), atol=1e-5)
        assert torch.allclose(checkpoint["heads"][f"{kind}_std"], features.std(0, unbiased=False), rtol=1e-3)
    other = clip.identity(save_clip(tmp_path / "clip.pt", squares, 1))
    line = refused(capsys, ["--checkpoint", tmp_path / "run" / "best.pt"], eval.main)
    assert own[:12] in line and other[:12] in line and str(tmp_path / "clip.pt") in line
    os.unlink(tmp_path / "clip.pt")
    assert "clip.pt" in refused(capsys, ["--checkpoint", tmp_path / "run" / "best.pt"], eval.main)


def test_finetuning_trains_clip_at_a_rate_of_its_own(squares, runs, tmp_path, monkeypatch):
    rates, groups = [], []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            groups[:] = [group["params"] for group in self.param_groups]
            assert self.defaults["betas"] == (0.5, 0.999)
            super().step()
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(train_clip4cmr, "WARMUP", 0.5)
    main(on_squares(squares, "--out", tmp_path, "--clip", runs["clip"], "--finetune", "--lr", 1e-2, "--clip-lr", 1e-4))
    shape = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]  # six steps: linear warm-up over three, then half a cosine
    assert np.allclose(rates, [[1e-2 * r, 1e-4 * r] for r in shape], rtol=1e-9)
    before, checkpoint = clip.read_weights(runs["clip"])[0], clip.load_checkpoint(tmp_path / "last.pt")
    after = checkpoint["clip"]["state_dict"]
    steps = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert steps.pop("logit_scale") == 0 and all(0 < step < 20e-4 for step in steps.values())  # Adam's steps are of the size of the rate
    assert len(groups[1]) == len(before) - 1 and len(groups[0]) == 9 and not any(name.startswith("clip") for name in checkpoint["heads"])
    heads, start = checkpoint["heads"], CLIP4CMR(None, (16, 16), 8, 16).state_dict()
    assert (heads["image_head.0.weight"] - start["image_head.0.weight"]).abs().max() > 1e-2
    assert heads["image_mean"].count_nonzero() == 0 and (heads["image_std"] == 1).all()  # features that change are not standardised
    model = eval.restore(tmp_path / "last.pt", "cpu")[0]
    assert all(torch.equal(value, after[name]) for name, value in model.clip.state_dict().items())


def test_frozen_features_are_trained_at_a_constant_rate(folder, tmp_path, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            super().step()
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    main(on_features(folder, "--out", tmp_path, "--weight-decay", 0.25))
    assert rates == [[(1e-2, 0.25)]] * 6


# ---------------------------------------------------------------- eval.py

def test_gallery_frames_by_class(squares, runs, tmp_path, monkeypatch):
    """A picture of another instance is right where its outer colour is that of the query; a view's corner shows that colour."""
    rows, plain = [], eval.gallery_picture
    monkeypatch.setattr(eval, "gallery_picture", lambda path, found: (rows.extend(found), plain(path, found)))
    evaluated(runs["finetuned"] / "best.pt", "--split", "train", "--gallery", tmp_path / "gallery.png", "--out", tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "gallery.png"))
    assert len(rows) == 12
    name = lambda item: (next(c for c in COLOURS if f"on {c}" in item or f"{c} around" in item or f"frame is {c}" in item) if isinstance(item, str) else
                         min(COLOURS, key=lambda c: np.abs(item[4, 4].astype(int) - COLOURS[c]).sum()))
    colours = {eval.GREEN: True, eval.RED: False}
    cell, right = eval.CELL + 16, []
    for i, (query, results) in enumerate(rows):
        for j, (item, _) in enumerate(results):
            frame = colours[tuple(drawn[8 + i * (cell + 8) + 4, (j + 1) * cell + 8 + 2].tolist())]
            assert frame == (name(item) == name(query)), (i, j)
            right.append(frame)
    assert len(right) == 60 and 12 < sum(right) < 60  # more than one right result a row: they cannot all be the same instance


def test_query_searches_with_words(squares, runs, capsys):
    for kind in ("frozen", "finetuned"):
        model, tokenizer, _ = eval.restore(runs[kind] / "best.pt", "cpu")
        instances = data.load(squares, split="test")[0]
        images, texts = eval.embed(model, instances, tokenizer, "off")
        evaluated(runs[kind] / "best.pt", "--query", instances[1].captions[0], "--top", 3)
        found = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        query = texts[len(instances[0].captions)]
        assert found == [instances[i].id for i in (images @ query).argsort(descending=True)[:3].tolist()]


def test_what_features_cannot_do_is_said(runs, tmp_path, capsys):
    checkpoint = ["--checkpoint", runs["features"] / "best.pt", "--out", tmp_path]
    assert "no words" in refused(capsys, [*checkpoint, "--query", "a red square"], eval.main)
    assert "no pictures" in refused(capsys, [*checkpoint, "--gallery", tmp_path / "gallery.png"], eval.main)
    assert "train_cmaclip" in refused(capsys, [*checkpoint, "--attention", tmp_path / "attention.png"], eval.main)
    assert "'unseen'" in refused(capsys, [*checkpoint, "--split", "unseen"], eval.main)


def test_eval_of_other_data_goes_by_the_names_of_classes(squares, runs, tmp_path, capsys):
    """Classes are numbered anew in every data set. Of this one, red is unknown to train and pink to the model; what is left out is said."""
    rows = [json.loads(line) for line in open(squares)]
    rows = [r | {"images": [os.path.join(os.path.dirname(squares), x) for x in r["images"]]} for r in rows if r["labels"].get("outer") != "black"]
    for row in rows:
        row["labels"] = {"outer": {"pink": "rose"}.get(row["labels"].get("outer"), row["labels"].get("outer"))}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluated(runs["finetuned"] / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path)
    assert "2 of 7 instances have no known outer" in capsys.readouterr().err
    found = metrics(tmp_path)[f"{tmp_path / 'other.jsonl'} test"]["model"]["image_to_text"]["per_class"]
    assert list(found) == [c for c in sorted(COLOURS) if c not in ("black", "pink", "green")]  # the green test row has no label


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("option, value, says", [
    ("--loss", "pcl+hinge:2", "unknown loss 'hinge'"), ("--loss", "", "unknown loss"), ("--loss", "pcl+", "unknown loss ''"),
    ("--loss", "pcl:-1", "not a positive number"), ("--loss", "pcl:0", "not a positive number"), ("--loss", "pcl+triplet:nan", "not a positive number"),
    ("--loss", "pcl:inf", "not a positive number"), ("--loss", "pcl:much", "not a positive number"), ("--loss", "pcl+triplet+pcl:0.5", "pcl"),
    ("--text-fraction", 0, "up to 1"), ("--text-fraction", 1.5, "up to 1"), ("--image-fraction", -0.1, "up to 1"), ("--image-fraction", "nan", "up to 1"),
    ("--dropout", 1.5, "from 0 to 1"), ("--dim", 0, "positive"), ("--hidden", -3, "positive"), ("--proxy-alpha", 0, "positive"),
    ("--patience", 0, "positive"), ("--clip-lr", -1, "positive"), ("--prototypes", "none", "fixed"), ("--task", "colour", "has the tasks inner, outer"),
    ("--eval-every", 0, "positive"),
    ("--batch-size", 22, "larger than the data set: 21"), ("--clip", "RN5", "did you mean 'RN50'")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    line = refused(capsys, on_squares(squares, "--out", tmp_path / "run", option, value), main)
    assert says in line and not (tmp_path / "run").exists()


def relabelled(squares, path, label):
    """The squares' rows with the labels that `label(row number, row)` gives them."""
    rows = [json.loads(line) for line in open(squares)]
    for i, row in enumerate(rows):
        row["images"] = [os.path.join(os.path.dirname(squares), x) for x in row["images"]]
        row["labels"] = label(i, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("label, says", [
    (lambda i, row: {}, "no labels; this method learns from classes"),
    (lambda i, row: {"outer": "red"}, "one class only in train"),
    (lambda i, row: {"outer": "red" if i % 2 else "blue"} if row["split"] != "val" else {}, "no instance of split 'val' has a known outer"),
    (lambda i, row: {"outer": "red" if i % 2 else "blue"} if row["split"] != "test" else {}, "no instance of split 'test' has a known outer"),
    (lambda i, row: {"outer": "green" if i == 39 else "red" if i % 2 else "blue"}, "outer = 'green' never occurs in the train split"),
    (lambda i, row: {"outer": f"remark {i}", "inner": "red" if i % 2 else "blue"}, "is a remark, no task")])
def test_labels_that_cannot_be_learned(label, says, squares, tmp_path, capsys):
    """Each is said before training: nothing is written."""
    path = relabelled(squares, tmp_path / "own.jsonl", label)
    assert says in refused(capsys, on_squares(path, "--out", tmp_path / "run", "--vocab-size", 600, "--image-size", 16), main)
    assert not (tmp_path / "run").exists()


def test_a_thousand_classes_are_no_classes(tmp_path, capsys):
    """A published layout says what its columns are; one that holds ids is refused where it is asked for, with a hint."""
    columns = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
    rows = [f"{i},Men,Apparel,{'AB'[i % 2]},Shirts,colour {i},Fall,2011.0,Casual,Shirt {i}" for i in range(1300)]
    (tmp_path / "styles.csv").write_text("\n".join([columns, *rows]) + "\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.jpg")
    for i in range(1, 1300):
        os.link(tmp_path / "images" / "0.jpg", tmp_path / "images" / f"{i}.jpg")
    line = refused(capsys, ["--data", "products", "--root", tmp_path, "--task", "baseColour", "--out", tmp_path / "run"], main)
    assert "'baseColour' has 1,0" in line and "look like ids or remarks" in line and not (tmp_path / "run").exists()


def test_a_class_of_a_single_sample_runs_with_a_note(squares, tmp_path, capsys):
    path = relabelled(squares, tmp_path / "own.jsonl", lambda i, row: {"outer": "green" if i == 5 else "red" if i % 2 else "blue"})
    main(on_squares(path, "--out", tmp_path / "run", "--vocab-size", 600, "--image-size", 16, "--epochs", 1, "--loss", "pcl+triplet"))
    assert "1 of 3 classes have a single training instance" in capsys.readouterr().err
    assert set(metrics(tmp_path / "run")["test"]["model"]["image_to_text"]["per_class"]) == {"blue", "red"}


def test_a_class_of_test_features_that_train_lacks_is_left_out(folder, tmp_path, capsys):
    write_features(tmp_path / "train.npz")
    found = write_features(tmp_path / "test.npz", 1, 20)
    write_features(tmp_path / "test.npz", 1, 20, label=np.where(np.arange(20) == 7, "v", found["label"]))
    main(on_features(tmp_path, "--out", tmp_path / "run"))
    assert "test: 1 of 20 rows have a label that train does not" in capsys.readouterr().err
    assert list(metrics(tmp_path / "run")["test"]["model"]["image_to_text"]["per_class"]) == list("wxyz")


NAN = np.where(np.arange(N * DT).reshape(N, DT) == 7, np.nan, 1).astype(np.float32)


@pytest.mark.parametrize("changes, says", [
    ({"text": NAN}, "text row 1 holds a NaN"), ({"image": np.ones((N - 1, DI))}, "59 rows of image, but 60 labels"),
    ({"text": np.ones((N, DT + 1))}, "text has 5 columns"), ({"label": np.zeros(N, int)}, "one class only in train"),
    ({"label": np.arange(N)}, "look like ids or remarks"), ({"label": np.ones(N)}, "label is float64")])
def test_features_that_cannot_be_used(changes, says, folder, tmp_path, capsys):
    write_features(tmp_path / "train.npz", **changes), write_features(tmp_path / "test.npz", 1, 20)
    assert says in refused(capsys, on_features(tmp_path, "--out", tmp_path / "run"), main) and not (tmp_path / "run").exists()


def test_what_is_missing_or_broken_is_named(folder, squares, runs, tmp_path, capsys):
    assert "none.npz" in refused(capsys, on_features(folder, "--features", "train.npz", "none.npz", "--out", tmp_path / "run"), main)
    (tmp_path / "train.npz").write_bytes((folder / "train.npz").read_bytes()[:200])
    assert "train.npz: no features" in refused(capsys, on_features(tmp_path, "--out", tmp_path / "run"), main)
    assert "no.jsonl" in refused(capsys, on_squares(tmp_path / "no.jsonl", "--out", tmp_path / "run"), main)
    assert "no.pt" in refused(capsys, on_squares(squares, "--clip", tmp_path / "no.pt", "--out", tmp_path / "run"), main)
    assert "is no CLIP" in refused(capsys, on_squares(squares, "--clip", runs["features"] / "best.pt", "--out", tmp_path / "run"), main)
    assert not (tmp_path / "run").exists()
    shutil.copytree(runs["features"], tmp_path / "kept")  # an earlier run is not touched by any of these
    for more in (["--loss", "hinge"], ["--features", "train.npz", "none.npz"], ["--text-fraction", 2]):
        refused(capsys, on_features(folder, "--out", tmp_path / "kept", *more), main)
    assert sorted(os.listdir(tmp_path)) == ["kept", "train.npz"]
    assert all((tmp_path / "kept" / name).read_bytes() == (runs["features"] / name).read_bytes() for name in os.listdir(runs["features"]))


def test_documented_commands_parse():
    assert_documented_commands_parse(train_clip4cmr)


def test_wikipedia(tmp_path):
    """The published features, through the real command: three epochs are clearly over chance, 11.8."""
    root = os.path.join(ROOT, "..", "shared", "data", "wikipedia")
    if not os.path.isdir(root):
        pytest.skip("no ../shared/data/wikipedia here")
    features = ["--features", "features_train.npz", "features_test.npz"]
    done = command("train_clip4cmr.py", "--data", "wikipedia", "--root", root, *features, "--epochs", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path)["test"]
    assert found["model"]["mAP"] > 15 > 12 > found["chance"]["mAP"] and "test model" in done.stdout
    assert len(found["model"]["image_to_text"]["per_class"]) == 10
