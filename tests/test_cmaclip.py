"""Tests of train_cmaclip.py: its model against a plain version without batches and padding, its noise, then whole runs.

    python -m pytest tests/test_cmaclip.py
"""
import contextlib
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
import train_cmaclip
from runs import (COLOURS, ROOT, assert_documented_commands_parse, command, in_process, kept_signals, log, make_squares, metrics, evaluated,  # noqa: F401
                  refused)  # in_process acts by being here
from train_cmaclip import CMACLIP, choose_tasks, corrupt_batch, corrupted, main, multitask_loss, pairs, predict, settings

FUSIONS = ("cma", "sequence", "modality", "concat", "image", "text")
TOUCH = ("dry", "hard", "soft", "wet")
CLASSES = {"seen": list("abc"), "told": list("de"), "both": list("fghij")}
CAPTIONS = ["a red square on blue", "wet", "a blue thing that is soft to touch", "red"]


def small_clip(captions, seed=0, resnet=False):
    """A very small CLIP with a tokenizer of its own."""
    tokenizer = clip.Tokenizer.train(captions * 2, 600)
    torch.manual_seed(seed)
    model = clip.CLIP(clip.Config(16, 64, (1, 1, 1, 1), 4, None, 16, tokenizer.vocab_size, 32, 2, 1, 4) if resnet else
                      clip.Config(16, 16, 1, 32, 8, 16, tokenizer.vocab_size, 32, 2, 1, 2))
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return make_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """48 / 16 / 32 things. Task `seen` is the colour of the picture, of which no caption speaks; `told` is a word of the caption, of which the
    picture shows nothing. Returns the path of the .jsonl file; clip.pt beside it is a small CLIP with random weights."""
    folder, rng, rows = tmp_path_factory.mktemp("things"), np.random.default_rng(0), []
    for i in range(96):
        colour, touch = list(COLOURS)[i % 4], TOUCH[i // 4 % 4]
        picture = COLOURS[colour] + rng.normal(0, 25, (16, 16, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append({"id": f"t{i}", "images": [f"{i}.png"], "captions": [f"this thing is {touch} to touch"], "labels": {"seen": colour, "told": touch},
                     "split": "train" if i < 48 else "val" if i < 64 else "test"})
    (folder / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = small_clip([row["captions"][0] for row in rows[:48]])
    clip.save_checkpoint(folder / "clip.pt", {"clip": clip.describe(model)})
    return str(folder / "things.jsonl")


def arguments(path, *more):
    """One epoch of three steps (of the things) from the small CLIP beside them, in this process."""
    return ["--data", str(path), "--clip", os.path.join(os.path.dirname(path), "clip.pt"), "--epochs", "1", "--batch-size", "16",
            "--lr", "1e-2", "--clip-lr", "3e-3", "--workers", "0", "--device", "cpu", "--amp", "off", *map(str, more)]


@pytest.fixture(scope="module")
def whole(things, tmp_path_factory):
    """The run of cma that other tests look at: long enough to learn both tasks; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with kept_signals():
        main(arguments(things, "--out", out, "--epochs", 15, "--eval-every", 5, "--robustness"))
    return out


# ---------------------------------------------------------------- the model

def shaken(fusion, seed=0, **more):
    """A model none of whose parts is at its starting value, in eval mode, and a batch: images, tokens of texts of several lengths."""
    model = CMACLIP(small_clip(CAPTIONS), CLASSES, fusion, **more).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.2 * torch.randn(p.shape)
    return model, torch.randn(4, 3, 16, 16), model.tokenizer(CAPTIONS, 16)


def plain_layer(layer, x):
    """A pre-norm transformer layer on one sequence (L, W), no mask -> (its output, softmax weights (heads, L, L))."""
    a, heads = layer.self_attn, layer.self_attn.num_heads
    q, k, v = (F.linear(layer.norm1(x), a.in_proj_weight, a.in_proj_bias)).chunk(3, dim=1)
    split = lambda y: y.view(len(x), heads, -1).transpose(0, 1)
    weights = (split(q) @ split(k).transpose(1, 2) / math.sqrt(x.shape[1] // heads)).softmax(-1)
    x = x + a.out_proj((weights @ split(v)).transpose(0, 1).flatten(1))
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x)))), weights


def plain_sequence(model, image, ids):
    """Each sample's two token sequences as they enter the layers: (1 + patches, W), (words, W); only real tokens."""
    image = model.project[0](model.clip.encode_image(image[None], tokens=True)[1][0]) + model.modality[0] + model.image_position
    text = model.project[1](model.clip.encode_text(ids[None], tokens=True)[1][0]) + model.modality[1] + model.text_position[:len(ids)]
    return image, text


def plain(model, image, ids, present=(True, True)):
    """One sample: (3, S, S), ids without padding -> ({task: logits (C,)}, weights (tasks, 2) or None). What is missing is not there at all."""
    fusion, zero = model.fusion, torch.zeros(model.project[0].out_features)
    if fusion in ("cma", "sequence"):
        parts = plain_sequence(model, image, ids)
        x = torch.cat([part for part, there in zip(parts, present) if there])
        for layer in model.layers:
            x = plain_layer(layer, x)[0]
        u = [x[0], x[-1]]
    else:
        u = [model.project[0](model.clip.encode_image(image[None])[0]), model.project[1](model.clip.encode_text(ids[None])[0])]
    u = [norm(one) if there else zero for norm, one, there in zip(model.norm, u, present)]
    out, weights = {}, []
    for k, task in enumerate(CLASSES):
        if fusion in ("cma", "modality"):
            e = [math.exp((one @ model.importance[k]).item()) * there for one, there in zip(u, present)]
            weights.append([e[0] / sum(e), e[1] / sum(e)])
            feature = weights[-1][0] * u[0] + weights[-1][1] * u[1]
        else:
            feature = {"image": u[0], "text": u[1]}.get(fusion, torch.cat(u))
        first, _, _, last = model.classifiers[k]
        out[task] = last(F.gelu(first(feature)))
    return out, weights or None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_forward_is_the_plain_version_of_each_sample(fusion):
    """Alone and without padding; with both modalities and with one of them missing. With and without gradients (torch takes other paths)."""
    model, images, tokens = shaken(fusion, heads=2)
    present = torch.tensor([[True, True], [True, True], [False, True], [True, False]])
    if fusion in ("image", "text"):
        present[:, FUSIONS.index(fusion) - 4] = True  # of the modality that it has
    for there in (None, present):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                logits, weights = model(images, tokens, there)
            assert (weights is None) == (fusion not in ("cma", "modality")) and list(logits) == list(CLASSES)
            for b in range(4):
                ids = tokens[b, :int(tokens[b].argmax()) + 1]
                expected, of_modalities = plain(model, images[b], ids, (True, True) if there is None else there[b].tolist())
                for task in CLASSES:
                    assert torch.allclose(logits[task][b], expected[task], atol=2e-5), (task, b)
                if weights is not None:
                    assert torch.allclose(weights[b], torch.tensor(of_modalities), atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_missing_has_no_weight_and_no_say(fusion):
    """However it varies, its length included. A task's weights sum to one; those of a missing modality are exactly zero."""
    model, images, tokens = shaken(fusion)
    for side in ((0, 1) if fusion not in ("image", "text") else (1,) if fusion == "image" else (0,)):
        present = torch.ones(4, 2, dtype=torch.bool)
        present[:2, side] = False
        other_images, other_tokens = images.clone(), tokens.clone()
        if side == 0:
            other_images[:2] = 9 * torch.randn(2, 3, 16, 16)
        else:
            other_tokens[:2] = model.tokenizer(["a much longer text, of quite other words, that fills the context to its end", "x"], 16, truncate=True)
        with torch.no_grad():
            (a, weights), (b, _), (c, _) = model(images, tokens, present), model(other_images, other_tokens, present), model(other_images, other_tokens)
        for task in CLASSES:
            assert torch.allclose(a[task], b[task], atol=2e-5)
            assert fusion in ("image", "text") or (c[task][:2] - a[task][:2]).abs().max() > 1e-2  # present, it would have had one
        if weights is not None:
            assert (weights[:2, :, side] == 0).all() and (weights[2:] > 0).all() and torch.allclose(weights.sum(-1), torch.ones(4, 3))


def test_padding_and_the_rest_of_the_batch_change_nothing():
    model, images, tokens = shaken("cma")
    with torch.no_grad():
        whole = model(images, tokens)[0]
        for b in range(4):
            for columns in (int(tokens[b].argmax()) + 1, 16):
                alone = model(images[b:b + 1], tokens[b:b + 1, :columns])[0]
                assert all(torch.allclose(alone[task][0], whole[task][b], atol=1e-5) for task in CLASSES)


def test_the_modalities_weigh_the_same_at_first_and_weights_depend_on_the_seed_alone():
    before, inner = torch.get_rng_state(), small_clip(CAPTIONS)
    torch.set_rng_state(before)
    a, b, c = (CMACLIP(inner, CLASSES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state()) and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.text_position, c.text_position)
    weights = a.eval()(torch.randn(2, 3, 16, 16), inner.tokenizer(["wet", "red"], 16))[1]
    assert weights.shape == (2, 3, 2) and (weights == 0.5).all()


def test_attention_is_the_last_layers():
    """Softmax of the last layer, mean over heads; text rows, patch columns (without the class token), each row renormalised."""
    model, images, tokens = shaken("cma", heads=2)
    maps, keep = model.attention(images, tokens)
    assert maps.shape == (4, keep.shape[1], 4) and keep.sum(1).tolist() == (tokens.argmax(1) + 1).tolist()
    for b in range(4):
        image, text = plain_sequence(model, images[b], tokens[b, :keep[b].sum()])
        x = plain_layer(model.layers[0], torch.cat([image, text]))[0]
        expected = plain_layer(model.layers[1], x)[1].mean(0)[5:, 1:5]
        assert torch.allclose(maps[b][keep[b]], expected / expected.sum(1, keepdim=True), atol=1e-5)
    assert torch.allclose(maps.sum(2), torch.ones(maps.shape[:2]))


def test_multitask_loss_is_a_loop():
    """Each task counts by the mean over its labelled rows; one without any in the batch adds nothing, and its gradient is zero, not NaN."""
    torch.manual_seed(0)
    logits = {task: torch.randn(6, len(names), requires_grad=True) for task, names in CLASSES.items()}
    labels = {"seen": torch.tensor([0, -1, 2, 1, -1, 0]), "told": torch.full((6,), -1), "both": torch.tensor([-1, -1, -1, 4, -1, -1])}
    expected = 0
    for task in ("seen", "both"):
        each = [-scores[label] + scores.exp().sum().log() for scores, label in zip(logits[task], labels[task]) if label >= 0]
        expected += sum(each) / len(each)
    found = multitask_loss(logits, labels)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (logits["told"].grad == 0).all() and (logits["seen"].grad[1] == 0).all() and logits["seen"].grad[0].abs().sum() > 0


# ---------------------------------------------------------------- noise

def many(n=400, per=2):
    """Pairs, `per` of each instance."""
    return [data.Instance(str(i // per), [f"picture {i}"], [f"text {i}"], {"seen": i % 3}) for i in range(n)]


def changed(found, clean, what):
    return [i for i, (a, b) in enumerate(zip(found, clean)) if getattr(a, what) != getattr(b, what)]


def test_noise_replaces_a_share_with_what_other_instances_have():
    clean = many()
    for what, prefix, k in (("images", "picture", 0), ("captions", "text", 1)):
        before, other = [], ("captions", "images")[k]
        for share in (0.0, 0.25, 0.5, 1.0):
            found, present = corrupted(clean, (share, 0.0) if k == 0 else (0.0, share), seed=3)
            assert present.all() and present.shape == (400, 2) and present.dtype == torch.bool
            now = changed(found, clean, what)
            assert set(before) <= set(now) and abs(len(now) - 400 * share) < 40 * (0 < share < 1) + 1 and not changed(found, clean, other)
            for i in now:  # the replacement is another instance's own, and labels stay
                source = int(getattr(found[i], what)[0].split()[1])
                assert getattr(found[i], what) == [f"{prefix} {source}"] and clean[source].id != clean[i].id
            assert [(x.id, x.labels) for x in found] == [(x.id, x.labels) for x in clean]
            assert found == corrupted(clean, (share, 0.0) if k == 0 else (0.0, share), seed=3)[0]
            before = now
        assert len(now) == 400 and len({getattr(x, what)[0] for x in found}) > 200  # from many others
        assert found != corrupted(clean, (1.0, 0.0) if k == 0 else (0.0, 1.0), seed=4)[0]
    both = corrupted(clean, (1.0, 1.0), seed=3)[0]
    assert sum(x.images[0].split()[1] == x.captions[0].split()[1] for x in both) < 10  # image and text not of one and the same other
    last = [data.Instance("a", ["p"], ["t"])] * 5 + [data.Instance("b", ["q"], ["u"])]
    assert [x.images for x in corrupted(last, (1.0, 0.0))[0]] == [["q"]] * 5 + [["p"]]  # the only other one is found
    with pytest.raises(data.DataError, match="one instance only"):
        corrupted(last[:5], (0.5, 0.0))
    assert corrupted(last[:5])[0] == last[:5]  # without noise nothing of another is needed


def test_missing_leaves_out_a_share_and_never_both():
    clean = many()
    for missing, shares in (((0.0, 0.0), (0, 0)), ((0.3, 0.0), (0.3, 0)), ((0.0, 0.4), (0, 0.4)), ((0.5, 0.5), (0.5, 0.25)),
                            ((1.0, 1.0), (1, 0)), ((0.0, 1.0), (0, 1))):
        found, present = corrupted(clean, missing=missing, seed=1)
        gone = (~present).float().mean(0).tolist()
        assert found == clean and present.any(1).all() and gone == pytest.approx(shares, abs=0.1 if 0 < sum(missing) < 2 and max(missing) < 1 else 0)
        assert (present == corrupted(clean, missing=missing, seed=1)[1]).all()
    few, more = (corrupted(clean, missing=(share, 0.0), seed=1)[1][:, 0] for share in (0.3, 0.6))
    assert not (more & ~few).any()  # the larger share takes in the smaller


def test_noise_in_a_training_batch():
    B = 300
    images, tokens = torch.arange(B)[:, None, None, None].expand(B, 3, 2, 2), torch.arange(B)[:, None].expand(B, 5)
    draw = lambda seed, *a: (torch.manual_seed(seed), corrupt_batch(images, tokens, *a))[1]
    rows = lambda x: x.flatten(1)[:, 0]
    same, kept, present = draw(0, (0.0, 0.0), (0.0, 0.0))
    assert torch.equal(same, images) and torch.equal(kept, tokens) and present.all()
    for noise in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.4)):
        found, words, present = draw(1, noise, (0.0, 0.0))
        for share, now in zip(noise, (found, words)):
            moved = (rows(now) != torch.arange(B)).float().mean().item()
            assert present.all() and moved == pytest.approx(share, abs=0.1 if share == 0.4 else 0)
            assert (now.flatten(1) == rows(now)[:, None]).all()
    assert (rows(found) != rows(words)).float().mean() > 0.3  # not the same rows, nor the same others
    again, other = draw(1, noise, (0.0, 0.0)), draw(2, noise, (0.0, 0.0))
    assert torch.equal(again[0], found) and torch.equal(again[1], words) and not torch.equal(other[0], found)
    for missing, shares in (((0.5, 0.5), (0.5, 0.25)), ((1.0, 1.0), (1, 0)), ((0.0, 1.0), (0, 1))):
        present = draw(1, (0.0, 0.0), missing)[2]
        assert present.any(1).all() and (~present).float().mean(0).tolist() == pytest.approx(shares, abs=0.1 if missing[0] == 0.5 else 0)
    one = corrupt_batch(images[:1], tokens[:1], (1.0, 1.0), (0.0, 0.0))
    assert torch.equal(one[0], images[:1]) and torch.equal(one[1], tokens[:1])  # there is no other


def test_noise_settings_reach_training_and_testing(things, tmp_path, monkeypatch):
    """Test-time noise is in the metrics of the run and of eval.py; --robustness adds clean data and other shares of noise."""
    seen, plain = [], train_cmaclip.corrupt_batch
    monkeypatch.setattr(train_cmaclip, "corrupt_batch", lambda *a: seen.append(a[2:4]) or plain(*a))
    main(arguments(things, "--out", tmp_path, "--train-noise-image", 0.1, "--train-noise-text", 0.2, "--train-missing-image", 0.3,
                   "--train-missing-text", 0.4, "--noise-text", 0.5, "--missing-text", 0.25, "--robustness"))
    assert seen == [((0.1, 0.2), (0.3, 0.4))] * 3
    found = metrics(tmp_path)["test"]
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == found
    model, tokenizer, checkpoint = eval.restore(tmp_path / "best.pt", "cpu")
    clean = pairs(*data.load(things, split="test"), checkpoint["classes"])

    def score(*noise):
        noisy, present = corrupted(clean, *noise)
        return train_cmaclip.scores(predict(model, noisy, tokenizer, "off", present=present), checkpoint["thresholds"])
    assert found["model"] == score((0.0, 0.5), (0.0, 0.25))
    assert found["noise"]["text"]["0.5"] == score((0.0, 0.5)) and found["noise"]["image"]["1.0"] == score((1.0, 0.0))
    assert found["noise"]["image"]["0.0"] == found["noise"]["text"]["0.0"] == score() != found["model"]


def test_robustness_rows(whole):
    """Without test-time noise their first is the metrics themselves. The picture shows `seen`, the text tells `told`: each suffers by its own noise."""
    found = metrics(whole)["test"]
    assert all(list(runs) == ["0.0", "0.25", "0.5", "1.0"] and runs["0.0"] == found["model"] for runs in found["noise"].values())
    for kind, task, other in (("image", "seen", "told"), ("text", "told", "seen")):
        runs = found["noise"][kind]
        assert runs["0.0"][task]["accuracy"] > runs["0.5"][task]["accuracy"] > runs["1.0"][task]["accuracy"] and runs["1.0"][task]["accuracy"] < 50
        assert runs["1.0"][other]["accuracy"] > 70


# ---------------------------------------------------------------- runs

def test_it_learns_what_needs_both_modalities(things, whole, tmp_path):
    """cma learns both tasks, and where to look for each; one modality alone is at chance (25) in the other's task."""
    found = {"cma": metrics(whole)["test"]["model"]}
    for fusion in ("image", "text"):
        main(arguments(things, "--out", tmp_path / fusion, "--fusion", fusion, "--epochs", 15, "--eval-every", 5))
        found[fusion] = metrics(tmp_path / fusion)["test"]["model"]
    accuracy = {fusion: [m[task]["accuracy"] for task in ("seen", "told")] for fusion, m in found.items()}
    assert min(accuracy["cma"]) > 85 and accuracy["image"][0] > 85 and accuracy["text"][1] > 85, accuracy
    assert accuracy["image"][1] < 50 and accuracy["text"][0] < 50, accuracy
    assert found["cma"]["seen"]["image_weight"] > 55 > 45 > found["cma"]["told"]["image_weight"] and "image_weight" not in found["image"]["seen"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_runs_and_eval_repeats_its_metrics(fusion, things, tmp_path, capsys):
    main(arguments(things, "--out", tmp_path, "--fusion", fusion))
    said, before = capsys.readouterr(), metrics(tmp_path)["test"]
    assert f"fusion {fusion};" in said.err and math.isfinite(log(tmp_path)[0]["loss"])
    assert before["model"].keys() == {"seen", "told", "mean"} and before["majority"] == {"seen": {"accuracy": 25.0}, "told": {"accuracy": 25.0}}
    for m in before["model"].values():
        assert m.keys() == {"accuracy", "macro_f1", "recall_at_precision", "precision"} | ({"image_weight"} if fusion in ("cma", "modality") else set())
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == before
    row, told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("told ")), before["model"]["told"]
    assert row in said.out and row.split()[1:5] == ["4", "25.0", f"{told['accuracy']:.1f}", f"{told['macro_f1']:.1f}"]


def accuracy(path, checkpoint):
    """{task: percent right} on the test split, from the pictures and captions themselves, one pair at a time; unlabelled ones do not count."""
    model, tokenizer, found = eval.restore(checkpoint, "cpu")
    right = {task: [] for task in found["classes"]}
    for row in map(json.loads, open(path)):
        for k, caption in enumerate(row["captions"] if row["split"] == "test" else ()):
            picture = Image.open(os.path.join(os.path.dirname(path), row["images"][k % len(row["images"])]))
            with torch.no_grad():
                logits = model(clip.transform(16)(picture)[None], tokenizer([caption], model.context_length, truncate=True))[0]
            for task in right:
                if task in row["labels"]:
                    right[task].append(found["classes"][task][logits[task][0].argmax()] == row["labels"][task])
    return {task: pytest.approx(100 * np.mean(values)) for task, values in right.items()}


def test_accuracy_is_that_of_its_predictions(things, whole):
    found = metrics(whole)["test"]["model"]
    assert {task: found[task]["accuracy"] for task in ("seen", "told")} == accuracy(things, whole / "best.pt")


def test_thresholds_are_those_of_the_best_model_on_val(things, tmp_path, monkeypatch):
    values, plain = iter((30.0, 60.0, 50.0)), train_cmaclip.scores
    monkeypatch.setattr(train_cmaclip, "scores", lambda *a: (m := plain(*a)) | {"mean": m["mean"] | {"accuracy": next(values)}})
    monkeypatch.setattr(train_cmaclip, "report", lambda *a: None)
    main(arguments(things, "--out", tmp_path, "--epochs", 3, "--eval-every", 1, "--precision", 0.3))
    model, tokenizer, best = eval.restore(tmp_path / "best.pt", "cpu")
    probabilities, labels, _ = predict(model, pairs(*data.load(things, split="val"), best["classes"]), tokenizer, "off")
    expected, others = ({task: eval.precision_thresholds(probabilities[task], labels[task], share) for task in ("seen", "told")} for share in (0.3, 0.9))
    assert best["step"] == 6 and not torch.equal(expected["told"], others["told"])
    for checkpoint in (best, clip.load_checkpoint(tmp_path / "last.pt")):
        assert all(torch.equal(checkpoint["thresholds"][task], expected[task]) for task in expected)


def recorded(monkeypatch):
    """-> [(rates, weight decays, parameters) of each group] at every step of the runs that follow."""
    steps = []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append([(g["lr"], g["weight_decay"], g["params"]) for g in self.param_groups])
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return steps


def test_clip_is_trained_at_a_rate_of_its_own_and_only_matrices_decay(things, tmp_path, monkeypatch):
    steps, built = recorded(monkeypatch), []
    monkeypatch.setattr(train_cmaclip, "CMACLIP", lambda *a: built.append(CMACLIP(*a)) or built[-1])
    monkeypatch.setattr(train_cmaclip, "WARMUP", 0.5)
    main(arguments(things, "--out", tmp_path, "--epochs", 2, "--weight-decay", 0.3, "--lr", 1e-2, "--clip-lr", 1e-4))
    names = {p: name for name, p in built[0].named_parameters()}
    for (lr, decay, part), peak, matrices, own in zip(steps[0], (1e-4, 1e-4, 1e-2, 1e-2), (True, False) * 2, (True, True, False, False)):
        assert all((p.ndim >= 2) == matrices and names[p].startswith("clip.") == own for p in part) and decay == (0.3 if matrices else 0)
        assert lr == pytest.approx(peak / 3)
    assert sum(len(part) for _, _, part in steps[0]) == len(names)
    assert np.allclose([step[0][0] for step in steps], [1e-4 * r for r in (1 / 3, 2 / 3, 1, 1, 0.75, 0.25)], rtol=1e-9)  # warm-up, half a cosine
    before, after = (clip.read_weights(p)[0] for p in (os.path.join(os.path.dirname(things), "clip.pt"), tmp_path / "last.pt"))
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(0 < step < 20e-4 for name, step in moved.items() if name != "logit_scale")


@pytest.mark.parametrize("resnet", [False, True])
def test_a_frozen_clip_stays_as_it_is(resnet, things, tmp_path, monkeypatch):
    """Bit for bit, a ResNet's running statistics included; no gradient is computed for it; all else is trained."""
    steps, made = recorded(monkeypatch), []
    monkeypatch.setattr(train_cmaclip, "CMACLIP", lambda *a: made.append(CMACLIP(*a)) or made[-1])
    inner = small_clip([x.captions[0] for x in data.load(things)[0]], resnet=resnet)
    clip.save_checkpoint(tmp_path / "clip.pt", {"clip": clip.describe(inner)})
    main(arguments(things, "--out", tmp_path / "run", "--clip", tmp_path / "clip.pt", "--freeze"))
    model, start = made[0], CMACLIP(inner, {"seen": TOUCH, "told": TOUCH}).state_dict()
    assert clip.identity(model.clip) == clip.identity(inner) and all(p.grad is None for p in model.clip.parameters())
    after, own = clip.load_checkpoint(tmp_path / "run" / "best.pt"), dict(model.named_parameters())
    assert all(torch.equal(value, after["clip"]["state_dict"][name]) for name, value in inner.state_dict().items())
    assert {id(p) for _, _, part in steps[0] for p in part} == {id(p) for name, p in own.items() if not name.startswith("clip.")} and len(steps[0]) == 2
    assert all(not torch.equal(value, start[name]) for name, value in after["heads"].items())
    seen = []
    model.clip.visual.register_forward_hook(lambda module, args, out: seen.append(out[0].requires_grad))
    model.train()(torch.randn(2, 3, *[model.config.image_resolution] * 2), inner.tokenizer(["wet", "dry"], 16))
    assert seen == [False]


def test_a_resnet_clip(things, tmp_path, capsys):
    """tiny-rn from scratch: one patch of 32 pixels and the pooled token; eval.py reads it back."""
    main(arguments(things, "--out", tmp_path, "--clip", "tiny-rn", "--image-size", 32, "--vocab-size", 600))
    assert clip.load_checkpoint(tmp_path / "best.pt")["heads"]["image_position"].shape == (2, 128)
    before = metrics(tmp_path)["test"]
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again", "--attention", tmp_path / "attention.png")
    assert metrics(tmp_path / "again")["test"] == before and Image.open(tmp_path / "attention.png").format == "PNG"


def test_settings_reach_the_model(things, tmp_path):
    main(arguments(things, "--out", tmp_path, "--width", 24, "--layers", 1, "--heads", 3, "--dropout", 0, "--tasks", "told"))
    model, _, checkpoint = eval.restore(tmp_path / "best.pt", "cpu")
    assert len(model.layers) == 1 and model.layers[0].self_attn.num_heads == 3 and model.layers[0].dropout.p == 0 and model.importance.shape == (1, 24)
    assert checkpoint["classes"] == {"told": list(TOUCH)} and metrics(tmp_path)["test"]["model"].keys() == {"told", "mean"}
    scratch, pretrained = train_cmaclip.SCRATCH, train_cmaclip.PRETRAINED
    for argv, expected in (([], scratch), (["--clip", "ViT-B/32"], pretrained), (["--lr", "0.5"], scratch | {"lr": 0.5})):
        assert vars(settings(argv)).items() >= expected.items()


# ---------------------------------------------------------------- eval.py: pictures

def test_gallery_shows_predictions(things, whole, tmp_path, monkeypatch):
    """Right ones framed green, wrong ones red and with what they are, unlabelled ones grey."""
    rows, plain = [], eval.gallery_picture
    monkeypatch.setattr(eval, "gallery_picture", lambda path, found: (rows.extend(found), plain(path, found)))
    found = [row | {"images": [os.path.join(os.path.dirname(things), row["images"][0])]} for row in map(json.loads, open(things))]
    for row in found[-32:]:  # of the test split: half of the things are called after another touch, and `seen` has no label
        row["labels"] = {"told": TOUCH[(TOUCH.index(row["labels"]["told"]) + int(row["id"][1:]) % 2) % 4]}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    evaluated(whole / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path, "--gallery", tmp_path / "gallery.png")
    drawn, cell, names = np.asarray(Image.open(tmp_path / "gallery.png")), eval.CELL + 16, {(160, 160, 160): "grey", eval.GREEN: "green", eval.RED: "red"}
    by_pixels = {data.pixels(row["images"][0], eval.CELL).tobytes(): row for row in found[-32:]}
    frames = {"green": 0, "red": 0, "grey": 0}
    assert len(rows) == 10
    for i, (picture, results) in enumerate(rows):
        row, texts = by_pixels[picture.tobytes()], [text for text, _ in results]
        assert texts[0] == row["captions"][0] and texts[1].startswith("seen: ") and texts[2].startswith("told: ")
        says, label = texts[2].split()[1], row["labels"]["told"]
        for j, expected in enumerate(("grey", "grey", "green" if says == label else "red")):
            frame = names[tuple(drawn[8 + i * (cell + 8) + 4, (j + 1) * cell + 8 + 2].tolist())]
            frames[frame] += 1
            assert frame == expected and (f"is {label}" in texts[2]) == (says != label) and "is" not in texts[1]
    assert min(frames.values()) > 1


def test_attention_picture(things, whole, tmp_path, monkeypatch):
    """Of each word the map of `attention`, words without start and end; of each task the weight of the image."""
    rows, plain = [], eval.attention_picture
    monkeypatch.setattr(eval, "attention_picture", lambda path, found: (rows.extend(found), plain(path, found)))
    evaluated(whole / "best.pt", "--out", tmp_path, "--attention", tmp_path / "attention.png", "--split", "val")
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    by_pixels = {data.pixels(x.images[0], eval.CELL).tobytes(): x for x in data.load(things, split="val")[0]}
    assert len(rows) == 6 and Image.open(tmp_path / "attention.png").format == "PNG"
    for picture, caption, words, bars in rows:
        x = by_pixels[picture.tobytes()]
        tokens, image = tokenizer([caption], 16), clip.transform(16)(Image.open(x.images[0]))[None]
        (maps, keep), (_, weights) = model.attention(image, tokens), model(image, tokens)
        assert caption == x.captions[0] and " ".join(word for word, _ in words).replace(" ", "") == caption.replace(" ", "")
        assert len(words) == keep.sum() - 2 and all(np.allclose(w, m.view(2, 2), atol=1e-5) for (_, w), m in zip(words, maps[0, 1:]))
        assert [task for task, _ in bars] == ["seen", "told"] and [w for _, w in bars] == pytest.approx(weights[0, :, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("fusion, has", [("sequence", True), ("modality", True), ("concat", False), ("image", False), ("text", False)])
def test_attention_of_other_fusions(fusion, has, things, tmp_path, monkeypatch, capsys):
    """sequence has words and no weights, modality weights and no words; what has neither is refused."""
    rows = []
    monkeypatch.setattr(eval, "attention_picture", lambda path, found: rows.extend(found))
    classes = {"seen": sorted(list(COLOURS)[:4]), "told": list(TOUCH)}
    model = CMACLIP(small_clip(CAPTIONS), classes, fusion)
    clip.save_checkpoint(tmp_path / "best.pt", {"method": "train_cmaclip", "clip": clip.describe(model.clip), "heads": clip.describe_heads(model),
                         "thresholds": None, "classes": classes, "settings": vars(settings(["--data", things, "--fusion", fusion]))})
    argv = ["--checkpoint", tmp_path / "best.pt", "--device", "cpu", "--attention", tmp_path / "attention.png"]
    if has:
        eval.main([str(a) for a in argv])
        assert all(bool(words) == (fusion == "sequence") and bool(bars) == (fusion == "modality") for _, _, words, bars in rows) and len(rows) == 6
    else:
        assert f"--fusion {fusion} has no attention" in refused(capsys, argv, eval.main)


def test_what_a_checkpoint_cannot_do_is_said(things, whole, tmp_path, capsys):
    line = refused(capsys, ["--checkpoint", whole / "best.pt", "--query", "a wet thing", "--device", "cpu"], eval.main)
    assert "--query" in line and "train_cmaclip" in line
    inner = small_clip(CAPTIONS)
    clip.save_checkpoint(tmp_path / "mxm.pt", {"method": "train_mxm", "clip": clip.describe(inner), "settings": {"data": things, "root": None}})
    line = refused(capsys, ["--checkpoint", tmp_path / "mxm.pt", "--attention", tmp_path / "a.png", "--device", "cpu"], eval.main)
    assert "train_mxm has no attention" in line and "train_cmaclip has" in line and os.listdir(tmp_path) == ["mxm.pt"]


# ---------------------------------------------------------------- tasks and labels

def test_pairs_renumber_labels_by_name():
    own = {"colour": ["blue", "green", "red"], "size": ["big", "small"]}
    model = {"colour": ["red", "blue"], "shape": ["round", "square"]}
    found = pairs([data.Instance("a", ["1", "2"], ["x", "y", "z"], {"colour": 2, "size": 0}), data.Instance("b", ["3"], ["w"], {"colour": 1, "size": 1}),
                   data.Instance("c", ["4"], ["v"], {"colour": -1}), data.Instance("d", ["5"], ["u"], {"colour": 0})], own, model)
    assert ["".join([x.id, *x.images, *x.captions]) for x in found] == ["a1x", "a2y", "a1z", "b3w", "c4v", "d5u"]
    assert [x.labels["colour"] for x in found] == [0, 0, 0, -1, -1, 1]  # green is unknown to the model
    assert all(x.labels.keys() == {"colour", "shape"} and x.labels["shape"] == -1 for x in found)


def test_tasks_are_chosen(capsys):
    classes = {"a": ["x", "y"], "b": ["x"], "c": ["x", "y", "z"], "d": [f"id {i}" for i in range(1200)]}
    instances = [data.Instance(str(i), ["p"], ["t"], {"a": i % 2, "b": 0, "c": i % 3, "d": i}) for i in range(1200)]
    assert choose_tasks(classes, None, "mine", instances) == {"a": classes["a"], "c": classes["c"]}
    said = capsys.readouterr().err
    assert "'b' has one class only in train" in said and "'d' has 1,200 distinct values" in said and said.count("left out") == 2 == said.count("\n")
    assert list(choose_tasks(classes, "c,a", "mine", instances)) == ["c", "a"] and capsys.readouterr().err == ""
    for asked, says in (("a,e", "e: mine has the tasks a, b, c, d"), ("b", "one class only"), ("d", "look like ids")):
        with pytest.raises(data.DataError, match=says):
            choose_tasks(classes, asked, "mine", instances)
    with pytest.raises(data.DataError, match="no labels"):
        choose_tasks({}, None, "mine", instances)
    with pytest.raises(data.DataError, match="none of the tasks b, d"):
        choose_tasks({task: classes[task] for task in "bd"}, None, "mine", instances)


def test_a_stray_comma_chooses_no_task():
    """It is refused or left out; it must not bring in a task that nobody asked for."""
    instances = [data.Instance(str(i), ["p"], ["t"], {"a": i % 2, "b": i % 2}) for i in range(40)]
    with contextlib.suppress(data.DataError):
        assert list(choose_tasks({"a": ["x", "y"], "b": ["x", "y"]}, "b,", "mine", instances)) == ["b"]


def test_other_data_is_evaluated_by_the_names_of_classes(things, whole, tmp_path):
    """The same things, without the first class of a task and without the other task: what is left is numbered anew, and just as right."""
    rows = [row | {"images": [os.path.join(os.path.dirname(things), row["images"][0])]} for row in map(json.loads, open(things))]
    for row in rows:
        row["labels"] = {} if row["labels"]["told"] == "dry" else {"told": row["labels"]["told"], "more": "x"}
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated(whole / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path)
    found = metrics(tmp_path)[f"{tmp_path / 'other.jsonl'} test"]
    assert found["model"].keys() == {"told", "mean"} and found["model"]["told"]["accuracy"] > 80
    assert found["majority"] == {"told": {"accuracy": pytest.approx(100 / 3)}}


def test_unlabelled_rows_take_no_part(squares, tmp_path, capsys):
    """A tenth of the squares has no outer colour: they train and count for the other task; every caption is a pair of its own in evaluation."""
    clip.save_checkpoint(tmp_path / "clip.pt", {"clip": clip.describe(small_clip([c for x in data.load(squares)[0] for c in x.captions]))})
    main(arguments(squares, "--clip", tmp_path / "clip.pt", "--batch-size", 8, "--epochs", 6, "--eval-every", 6, "--out", tmp_path / "run"))
    assert log(tmp_path / "run")[0]["step"] == 3 and "24 instances, 2 tasks (inner, outer)" in capsys.readouterr().err
    rows = [row for row in map(json.loads, open(squares)) if row["split"] == "test"]
    found, expected = metrics(tmp_path / "run")["test"], accuracy(squares, tmp_path / "run" / "best.pt")
    for task in ("inner", "outer"):
        labelled = [len(row["captions"]) for row in rows if task in row["labels"]]
        assert found["majority"][task]["accuracy"] == pytest.approx(100 * max(labelled) / sum(labelled))
        assert found["model"][task]["accuracy"] == expected[task]
    assert found["model"]["outer"]["accuracy"] > 0


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("option, value, says", [
    ("--tasks", "seen,feel", "feel: "), ("--fusion", "both", "sequence"), ("--heads", 3, "--heads 3 does not divide the width 16"),
    ("--width", 10, "does not divide the width 10"), ("--heads", 0, "positive"), ("--layers", 0, "positive"), ("--width", -4, "positive"),
    ("--dropout", 2, "from 0 to 1"), ("--precision", 0, "up to 1"),
    ("--precision", "nan", "up to 1"), ("--noise-image", 1.5, "from 0 to 1"), ("--noise-text", -0.1, "from 0 to 1"),
    ("--missing-image", "nan", "from 0 to 1"), ("--train-noise-text", 2, "from 0 to 1"), ("--train-missing-text", "all", "--train-missing-text"),
    ("--clip-lr", 0, "positive"), ("--eval-every", 0, "positive"), ("--batch-size", 49, "larger than the data set: 48"),
    ("--data", "no.jsonl", "no.jsonl"), ("--clip", "no.pt", "no.pt")])
def test_bad_settings(option, value, says, things, tmp_path, capsys):
    line = refused(capsys, arguments(things, "--out", tmp_path / "run", option, value), main)
    assert says in line and not (tmp_path / "run").exists()


def test_a_clip_from_scratch_is_not_frozen(things, tmp_path, capsys):
    line = refused(capsys, arguments(things, "--out", tmp_path / "run", "--clip", "tiny", "--freeze"), main)
    assert "--freeze: tiny starts from random weights" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("label, says", [
    (lambda i, row: {}, "no labels; this method learns from classes"),
    (lambda i, row: {"seen": "red"}, "none of the tasks seen has two or more classes"),
    (lambda i, row: {"seen": f"remark {i}"}, "no labels"),
    (lambda i, row: row["labels"] if row["split"] != "val" else {}, "no instance of split 'val' has a label of seen, told"),
    (lambda i, row: row["labels"] if row["split"] != "test" else {}, "'test'"),
    (lambda i, row: row["labels"] | ({"seen": "pink"} if i == 90 else {}), "seen = 'pink' never occurs in the train split")])
def test_labels_that_cannot_be_learned(label, says, things, tmp_path, capsys):
    """Each is said before training: nothing is written."""
    rows = [row | {"images": [os.path.join(os.path.dirname(things), row["images"][0])]} for row in map(json.loads, open(things))]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row | {"labels": label(i, row)}) + "\n" for i, row in enumerate(rows)))
    argv = arguments(things, "--out", tmp_path / "run")
    assert says in refused(capsys, ["--data", tmp_path / "own.jsonl", *argv[2:]], main) and not (tmp_path / "run").exists()


def test_bad_input_leaves_an_earlier_run_in_place(things, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for more in (["--tasks", "feel"], ["--heads", 3], ["--data", tmp_path / "no.jsonl"], ["--batch-size", 49], ["--robustness", "--noise-text", 2]):
        refused(capsys, arguments(things, "--out", tmp_path / "run", *more), main)
    assert os.listdir(tmp_path) == ["run"] and all((tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes() for name in os.listdir(whole))


def test_documented_commands_parse():
    assert_documented_commands_parse(train_cmaclip)


def test_products(tmp_path):
    """Real products, through the real command: one epoch, seven tasks in the table."""
    root = os.path.join(ROOT, "..", "shared", "data", "fashion")
    if not os.path.isdir(root):
        pytest.skip("no ../shared/data/fashion here")
    done = command("train_cmaclip.py", "--data", "products", "--root", root, "--epochs", 1, "--image-size", 16, "--workers", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    tasks = ["gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "usage"]
    table, found = [line.split() for line in done.stdout.splitlines()], metrics(tmp_path)["test"]["model"]
    assert [line[0] for line in table[1:9]] == [*tasks, "mean"] == list(found) and all(len(line) == 7 for line in table[1:8])
    assert found["gender"]["accuracy"] > 60  # a title begins with it; the commonest is 49
