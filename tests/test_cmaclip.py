"""Tests of train_cmaclip.py: its model against a plain version without batches, its noise, its runs.

    python -m pytest tests/test_cmaclip.py
"""
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import train_cmaclip
from runs import (COLOURS, ROOT, assert_documented_commands_parse, command, evaluated,  # noqa: F401
                  in_process, kept_signals, log, make_squares, metrics, refused, squares)
from data import choose_tasks, pairs
from train_cmaclip import CMACLIP, corrupt, main, multitask_loss, settings

FUSIONS = ("cma", "sequence", "modality", "concat", "image", "text")
TOUCH = ("dry", "hard", "soft", "wet")
CLASSES = {"seen": list("abc"), "told": list("de"), "both": list("fghij")}
CAPTIONS = ["a red square on blue", "wet", "a blue thing that is soft to touch", "red"]


def small_clip(captions, resnet=False):
    """A very small CLIP with a tokenizer of its own."""
    tokenizer = clip.Tokenizer.train(captions * 2, 600)
    torch.manual_seed(0)
    config = clip.Config(16, 16, 1, 32, 8, 16, tokenizer.vocab_size, 32, 2, 1, 2)
    if resnet:
        config = clip.Config(16, 64, (1, 1, 1, 1), 4, None, 16, tokenizer.vocab_size, 32, 2, 1, 4)
    model = clip.CLIP(config)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """The path of a .jsonl file of 48 / 16 / 32 things; clip.pt beside it is a small CLIP of random weights.

    Task `seen` is the colour of the picture, of which no caption speaks; `told` is a word of the caption, of
    which the picture shows nothing.
    """
    folder = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        colour = list(COLOURS)[i % 4]
        touch = TOUCH[i // 4 % 4]
        picture = COLOURS[colour] + rng.normal(0, 25, (16, 16, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        split = "train" if i < 48 else "val" if i < 64 else "test"
        rows.append({"id": f"t{i}", "images": [str(folder / f"{i}.png")], "split": split,
                     "captions": [f"this thing is {touch} to touch"],
                     "labels": {"seen": colour, "told": touch}})
    (folder / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = small_clip([row["captions"][0] for row in rows[:48]])
    clip.save_checkpoint(folder / "clip.pt", {"clip": clip.describe(model)})
    return str(folder / "things.jsonl")


def relabelled(things, path, label):
    """Write the things with the labels label(i, row) to a file of their own; returns its rows."""
    rows = [json.loads(line) for line in open(things)]
    rows = [row | {"labels": label(i, row)} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def arguments(path, *more):
    """One epoch of three steps (of the things) from the small CLIP beside them, in this process."""
    return ["--data", str(path), "--clip", os.path.join(os.path.dirname(path), "clip.pt"), "--epochs", "1",
            "--batch-size", "16", "--lr", "1e-2", "--clip-lr", "3e-3", "--workers", "0", "--device", "cpu",
            "--amp", "off", *map(str, more)]


@pytest.fixture(scope="module")
def whole(things, tmp_path_factory):
    """The folder of the run of cma that other tests look at: long enough to learn both tasks."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with kept_signals():
        main(arguments(things, "--out", out, "--epochs", 24, "--eval-every", 8, "--robustness"))
    return out


def predicted(model, chosen):
    return eval.predict(model, eval.evaluation_loader(model, chosen), "off")


# ---------------------------------------------------------------- the model

def shaken(fusion, **more):
    """A model none of whose parts is at its starting value; images; tokens of texts of several lengths."""
    model = CMACLIP(small_clip(CAPTIONS), CLASSES, fusion, **more).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += 0.2 * torch.randn(p.shape)
    return model, torch.randn(4, 3, 16, 16), model.tokenizer(CAPTIONS, 16)


def plain_layer(layer, x):
    """A pre-norm transformer layer on one sequence (L, W), no mask -> (its output, weights (heads, L, L))."""
    attention = layer.self_attn
    rows = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.view(len(x), attention.num_heads, -1).transpose(0, 1) for part in rows.chunk(3, dim=1))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(-1)
    x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x)))), weights


def plain_sequence(model, image, ids):
    """A sample's two sequences as they enter the layers: (1 + patches, W), (words, W); only real tokens."""
    image_tokens = model.clip.encode_image(image[None], tokens=True)[1][0]
    text_tokens = model.clip.encode_text(ids[None], tokens=True)[1][0]
    return (model.project[0](image_tokens) + model.modality[0] + model.image_position,
            model.project[1](text_tokens) + model.modality[1] + model.text_position[:len(ids)])


def plain(model, image, ids):
    """One sample: (3, S, S), ids without padding -> ({task: logits (C,)}, weights (tasks, 2) or None)."""
    if model.fusion in ("cma", "sequence"):
        x = torch.cat(plain_sequence(model, image, ids))
        for layer in model.layers:
            x, _ = plain_layer(layer, x)
        summaries = [x[0], x[-1]]
    else:
        summaries = [model.project[0](model.clip.encode_image(image[None])[0]),
                     model.project[1](model.clip.encode_text(ids[None])[0])]
    u = torch.stack([norm(x) for norm, x in zip(model.norm, summaries)])
    logits, weights = {}, []
    for k, task in enumerate(CLASSES):
        if model.fusion in ("cma", "modality"):
            e = [math.exp((u[m] @ model.importance[k, m]).item()) for m in (0, 1)]
            weights.append([e[0] / sum(e), e[1] / sum(e)])
            feature = weights[-1][0] * u[0] + weights[-1][1] * u[1]
        else:
            feature = {"image": u[0], "text": u[1]}.get(model.fusion, u.flatten())
        first, _, _, last = model.classifiers[k]
        logits[task] = last(F.gelu(first(feature)))
    return logits, weights or None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_forward_is_the_plain_version_of_each_sample(fusion):
    """In a batch with longer texts and alone, with and without gradients (torch takes other paths)."""
    model, images, tokens = shaken(fusion, heads=2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits, weights = model(images, tokens)
        assert list(logits) == list(CLASSES)
        assert (weights is None) == (fusion not in ("cma", "modality"))
        for b in range(4):
            ids = tokens[b, :int(tokens[b].argmax()) + 1]
            expected, expected_weights = plain(model, images[b], ids)
            alone, _ = model(images[b:b + 1], ids[None])
            for task in CLASSES:
                assert torch.allclose(logits[task][b], expected[task], atol=2e-5), (task, b)
                assert torch.allclose(alone[task][0], expected[task], atol=2e-5), (task, b)
            if weights is not None:
                assert torch.allclose(weights[b], torch.tensor(expected_weights), atol=1e-5)


def test_the_modalities_weigh_the_same_at_first_and_weights_depend_on_the_seed_alone():
    clip_model = small_clip(CAPTIONS)
    before = torch.get_rng_state()
    a, b, c = (CMACLIP(clip_model, CLASSES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.text_position, c.text_position)
    _, weights = a.eval()(torch.randn(2, 3, 16, 16), clip_model.tokenizer(["wet", "red"], 16))
    assert weights.shape == (2, 3, 2) and (weights == 0.5).all()


def test_attention_is_the_last_layers():
    """Softmax of the last layer, mean over heads; text rows, patch columns, each row renormalised."""
    model, images, tokens = shaken("cma", heads=2)
    maps = model.attention(images, tokens)
    lengths = tokens.argmax(1) + 1
    assert maps.shape == (4, lengths.max(), 4)
    for b in range(4):
        x = torch.cat(plain_sequence(model, images[b], tokens[b, :lengths[b]]))
        x, _ = plain_layer(model.layers[0], x)
        _, weights = plain_layer(model.layers[1], x)
        expected = weights.mean(0)[5:, 1:5]
        assert torch.allclose(maps[b, :lengths[b]], expected / expected.sum(1, keepdim=True), atol=1e-5)
    assert torch.allclose(maps.sum(2), torch.ones(maps.shape[:2]))


def test_multitask_loss_is_a_loop():
    """A task counts by the mean over its labelled rows; one without any adds nothing, also to gradients."""
    torch.manual_seed(0)
    logits = {task: torch.randn(6, len(names), requires_grad=True) for task, names in CLASSES.items()}
    labels = {"seen": torch.tensor([0, -1, 2, 1, -1, 0]), "told": torch.full((6,), -1),
              "both": torch.tensor([-1, -1, -1, 4, -1, -1])}
    expected = 0
    for task in ("seen", "both"):
        each = [row.exp().sum().log() - row[k] for row, k in zip(logits[task], labels[task]) if k >= 0]
        expected += sum(each) / len(each)
    loss = multitask_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (logits["told"].grad == 0).all() and (logits["seen"].grad[1] == 0).all()
    assert logits["seen"].grad[0].abs().sum() > 0


# ---------------------------------------------------------------- noise

def test_corrupt_replaces_a_share_by_other_rows_of_the_batch():
    images = torch.arange(300)[:, None, None, None].expand(300, 3, 2, 2)
    tokens = torch.arange(300)[:, None].expand(300, 5)

    def draw(seed, noise):
        torch.manual_seed(seed)
        return corrupt(images, tokens, noise)
    moved_before = torch.zeros(2, 300, dtype=torch.bool)
    for noise in ((0.0, 0.0), (0.0, 0.3), (0.4, 0.4), (1.0, 0.4), (1.0, 1.0)):
        corrupted = draw(1, noise)
        assert all(torch.equal(a, b) for a, b in zip(draw(1, noise), corrupted))
        rows = torch.stack([now.flatten(1)[:, 0] for now in corrupted])
        assert all((now.flatten(1) == row[:, None]).all() for now, row in zip(corrupted, rows))  # whole rows
        moved = rows != torch.arange(300)
        for share, part in zip(noise, moved):
            assert part.float().mean().item() == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
        assert not (moved_before & ~moved).any()  # a larger share takes in a smaller one
        moved_before = moved
    assert (rows[0] != rows[1]).float().mean() > 0.9 and len(rows[0].unique()) > 150  # not of one other alone
    assert not torch.equal(draw(2, noise)[0], corrupted[0])
    alone = corrupt(images[:1], tokens[:1], (1.0, 1.0))
    assert torch.equal(alone[0], images[:1]) and torch.equal(alone[1], tokens[:1])  # there is no other


def test_noise_settings_reach_training_and_testing(things, tmp_path, monkeypatch):
    """Training takes its own shares; --robustness goes through the shares of the images and of the texts, and
    eval.py finds the same."""
    calls = []

    def recording(images, tokens, noise):
        calls.append(noise)
        return corrupt(images, tokens, noise)
    monkeypatch.setattr(train_cmaclip, "corrupt", recording)
    main(arguments(things, "--out", tmp_path, "--train-noise-image", 0.1, "--train-noise-text", 0.2,
                   "--robustness", "--seed", 3))
    shares = (0.0, 0.25, 0.5, 1.0)
    study = [noise for share in shares for noise in ((share, 0.0), (0.0, share))]
    assert calls == [(0.1, 0.2)] * 3 + study
    rows = metrics(tmp_path)["test"]
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == rows


def test_noise_comes_from_all_of_the_split(things, whole, monkeypatch):
    """A split in order of class, 4 pairs to a batch: the batches that noise is drawn in are mixed."""
    load = data.load
    test, classes = load(things, None, "test")
    test.sort(key=lambda x: x.labels["seen"])
    monkeypatch.setattr(data, "load", lambda *a: (test, classes))
    loaders = eval.evaluation_loader

    def small_batches(*a, **more):
        loader = loaders(*a, **more)
        loader.batch_size = 4
        return loader
    monkeypatch.setattr(eval, "evaluation_loader", small_batches)
    model, checkpoint = eval.restore(whole / "best.pt", "cpu")
    args = eval.argparse.Namespace(data=things, root=None, split="test", amp="off", workers=0, gallery=None)
    rows, _ = train_cmaclip.evaluation(model, checkpoint, args)
    assert rows["model"]["tasks"]["seen"]["accuracy"] > 85
    assert rows["noise"]["image"]["1.0"]["tasks"]["seen"]["accuracy"] < 50


def test_robustness_rows(whole):
    """A task suffers by noise where it looks, by more of it more; without any the metrics are the model's."""
    rows = metrics(whole)["test"]
    for kind, task, other in (("image", "seen", "told"), ("text", "told", "seen")):
        study = rows["noise"][kind]
        assert list(study) == ["0.0", "0.25", "0.5", "1.0"]
        for name, values in rows["model"]["tasks"].items():
            assert study["0.0"]["tasks"][name] == pytest.approx(values)
        accuracy = [study[share]["tasks"][task]["accuracy"] for share in ("0.0", "0.5", "1.0")]
        assert accuracy[0] > accuracy[1] > accuracy[2] and accuracy[2] < 50
        assert study["1.0"]["tasks"][other]["accuracy"] > 70


# ---------------------------------------------------------------- runs

def accuracy(path, checkpoint):
    """{task: percent right} of the labelled pairs of the test split, from the files, one by one."""
    model, best = eval.restore(checkpoint, "cpu")
    tokenizer = model.tokenizer
    right = {task: [] for task in best["classes"]}
    for row in map(json.loads, open(path)):
        for k, caption in enumerate(row["captions"] if row["split"] == "test" else ()):
            picture = Image.open(os.path.join(os.path.dirname(path), row["images"][k % len(row["images"])]))
            tokens = tokenizer([caption], model.config.context_length, truncate=True)
            with torch.no_grad():
                logits, _ = model(clip.transform(16)(picture)[None], tokens)
            for task in right.keys() & row["labels"].keys():
                named = best["classes"][task][logits[task][0].argmax()]
                right[task].append(named == row["labels"][task])
    return {task: pytest.approx(100 * np.mean(values)) for task, values in right.items()}


def test_it_learns_what_needs_both_modalities(things, whole, tmp_path):
    """cma learns both tasks, and where to look for each; one modality is at chance (25) in the other's."""
    reached = {"cma": metrics(whole)["test"]["model"]["tasks"]}
    for fusion in ("image", "text"):
        main(arguments(things, "--out", tmp_path / fusion, "--fusion", fusion, "--epochs", 15,
                       "--eval-every", 5))
        reached[fusion] = metrics(tmp_path / fusion)["test"]["model"]["tasks"]
    cma, image, text = ({task: m[task]["accuracy"] for task in ("seen", "told")} for m in reached.values())
    assert min(cma.values()) > 85 and cma == accuracy(things, whole / "best.pt")
    assert image["seen"] > 85 and image["told"] < 50
    assert text["told"] > 85 and text["seen"] < 50
    assert reached["cma"]["seen"]["image_weight"] > 55 > 45 > reached["cma"]["told"]["image_weight"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_runs_and_eval_repeats_its_metrics(fusion, things, tmp_path, capsys):
    main(arguments(things, "--out", tmp_path, "--fusion", fusion))
    said = capsys.readouterr()
    rows = metrics(tmp_path)["test"]
    assert f"fusion {fusion};" in said.err and math.isfinite(log(tmp_path)[0]["loss"])
    tasks = rows["model"]["tasks"]
    assert rows["model"].keys() == {"tasks", "mean"} and tasks.keys() == {"seen", "told"}
    assert rows["majority"] == {"seen": {"accuracy": 25.0}, "told": {"accuracy": 25.0}}
    names = {"accuracy", "macro_f1", "recall_at_precision", "precision"}
    weighs = fusion in ("cma", "modality")
    expected = names | {"image_weight"} if weighs else names
    for name in expected:
        of_tasks = [tasks[task][name] for task in ("seen", "told")]
        assert rows["model"]["mean"][name] == pytest.approx(np.mean(of_tasks))
    assert rows["model"]["mean"].keys() == tasks["seen"].keys() == tasks["told"].keys() == expected
    assert ("image weight\n" in said.out) == weighs and ("in cma both" in said.out) == (fusion == "cma")
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == rows
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("told "))
    told = tasks["told"]
    assert line in said.out
    assert line.split()[1:5] == ["4", "25.0", f"{told['accuracy']:.1f}", f"{told['macro_f1']:.1f}"]


def test_thresholds_are_those_of_the_same_model_on_val(things, tmp_path, monkeypatch):
    """best.pt holds those of the best evaluation, last.pt those of the last one."""
    values = iter((30.0, 60.0, 50.0))

    def pretended(*a):
        metrics = task_metrics(*a)
        return metrics | {"mean": metrics["mean"] | {"accuracy": next(values)}}
    task_metrics = eval.task_metrics
    monkeypatch.setattr(eval, "task_metrics", pretended)
    monkeypatch.setattr(eval, "report", lambda *a: None)
    main(arguments(things, "--out", tmp_path, "--epochs", 3, "--eval-every", 1, "--precision", 0.3))
    of_step = {}
    for name in ("best.pt", "last.pt"):
        model, checkpoint = eval.restore(tmp_path / name, "cpu")
        val = pairs(*data.load(things, split="val"), checkpoint["classes"])
        probabilities, labels, _ = predicted(model, val)
        for task, classifier in zip(("seen", "told"), model.classifiers):
            expected = eval.precision_thresholds(probabilities[task], labels[task], 0.3)
            assert torch.equal(classifier.threshold, expected)
        assert not torch.equal(expected, eval.precision_thresholds(probabilities[task], labels[task], 0.9))
        of_step[checkpoint["step"]] = expected
    assert of_step.keys() == {6, 9} and not torch.equal(of_step[6], of_step[9])


def test_a_resumed_run_saves_the_thresholds_it_found(things, tmp_path, monkeypatch):
    """Stopped a step after an evaluation, and a step later again: there was no other evaluation between."""
    steps = []

    def stop(parameters):
        steps.append(parameters)
        if len(steps) > 3:
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(eval, "average_gradients", stop)
    saved = []
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            main(arguments(things, "--out", tmp_path, "--epochs", 2, "--eval-every", 1, *more))
        saved.append(clip.load_checkpoint(tmp_path / "last.pt"))
    assert [checkpoint["step"] for checkpoint in saved] == [4, 5]
    for k in range(2):
        before, after = (checkpoint["heads"][f"classifiers.{k}.threshold"] for checkpoint in saved)
        assert torch.equal(before, after) and before.isfinite().any()


def recorded(monkeypatch):
    """-> (steps, models) of the runs that follow; a step is [(rate, weight decay, parameters) of a group]."""
    steps, models = [], []

    class AdamW(torch.optim.AdamW):
        def step(self):
            steps.append([(g["lr"], g["weight_decay"], g["params"]) for g in self.param_groups])
            super().step()

    def build(*a):
        models.append(CMACLIP(*a))
        return models[-1]
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(train_cmaclip, "CMACLIP", build)
    return steps, models


def test_clip_is_trained_at_a_rate_of_its_own_and_only_matrices_decay(things, tmp_path, monkeypatch):
    steps, models = recorded(monkeypatch)
    monkeypatch.setattr(train_cmaclip, "WARMUP", 0.5)
    main(arguments(things, "--out", tmp_path, "--epochs", 2, "--weight-decay", 0.3, "--lr", 1e-2,
                   "--clip-lr", 1e-4))
    names = {p: name for name, p in models[0].named_parameters()}
    for rate, decay, group in steps[0]:
        for p in group:
            assert rate == pytest.approx(1e-4 / 3 if names[p].startswith("clip.") else 1e-2 / 3)
            assert decay == (0.3 if p.ndim >= 2 else 0)
    assert sum(len(group) for _, _, group in steps[0]) == len(names)
    shape = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]  # warm-up, half a cosine
    assert np.allclose([step[0][0] for step in steps], [1e-2 * x for x in shape], rtol=1e-9)
    before, _ = clip.read_weights(os.path.join(os.path.dirname(things), "clip.pt"))
    after, _ = clip.read_weights(tmp_path / "last.pt")
    for name in before.keys() - {"logit_scale"}:
        assert 0 < (after[name] - before[name]).abs().max() < 20e-4


@pytest.mark.parametrize("resnet", [False, True])
def test_a_frozen_clip_stays_as_it_is(resnet, things, tmp_path, monkeypatch):
    """Bit for bit, a ResNet's running statistics too; no gradient is computed for it; all else is trained."""
    steps, models = recorded(monkeypatch)
    clip_model = small_clip([x.captions[0] for x in data.load(things)[0]], resnet=resnet)
    clip.save_checkpoint(tmp_path / "clip.pt", {"clip": clip.describe(clip_model)})
    main(arguments(things, "--out", tmp_path / "run", "--clip", tmp_path / "clip.pt", "--freeze"))
    model = models[0]
    assert clip.identity(model.clip) == clip.identity(clip_model)
    assert all(p.grad is None for p in model.clip.parameters())
    start = CMACLIP(clip_model, {"seen": TOUCH, "told": TOUCH}).state_dict()
    best = clip.load_checkpoint(tmp_path / "run" / "best.pt")
    for name, value in clip_model.state_dict().items():
        assert torch.equal(value, best["clip"]["state_dict"][name])
    trained = best["heads"].keys() - {"classifiers.0.threshold", "classifiers.1.threshold"}
    assert all(not torch.equal(best["heads"][name], start[name]) for name in trained)
    heads = {id(p) for name, p in model.named_parameters() if not name.startswith("clip.")}
    assert {id(p) for _, _, group in steps[0] for p in group} == heads
    graphs = []
    model.clip.visual.register_forward_hook(lambda module, args, out: graphs.append(out[0].requires_grad))
    size = model.config.image_resolution
    model.train()(torch.randn(2, 3, size, size), clip_model.tokenizer(["wet", "dry"], 16))
    assert graphs == [False]


def test_a_resnet_clip(things, tmp_path):
    """tiny-rn from scratch: one patch of 32 pixels and the pooled token; eval.py reads it back."""
    main(arguments(things, "--out", tmp_path, "--clip", "tiny-rn", "--image-size", 32, "--vocab-size", 600))
    assert clip.load_checkpoint(tmp_path / "best.pt")["heads"]["image_position"].shape == (2, 128)
    picture = tmp_path / "attention.png"
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again", "--attention", picture)
    assert metrics(tmp_path / "again")["test"] == metrics(tmp_path)["test"]
    assert Image.open(picture).format == "PNG"


def test_settings_reach_the_model(things, tmp_path):
    main(arguments(things, "--out", tmp_path, "--width", 24, "--layers", 1, "--heads", 3, "--dropout", 0,
                   "--tasks", "told"))
    model, checkpoint = eval.restore(tmp_path / "best.pt", "cpu")
    layer, = model.layers
    assert layer.self_attn.num_heads == 3 and layer.dropout.p == 0 and model.importance.shape == (1, 2, 24)
    assert checkpoint["classes"] == {"told": list(TOUCH)}
    assert metrics(tmp_path)["test"]["model"]["tasks"].keys() == {"told"}
    scratch, pretrained = train_cmaclip.SCRATCH, train_cmaclip.PRETRAINED
    assert vars(settings([])).items() >= scratch.items()
    assert vars(settings(["--clip", "ViT-B/32"])).items() >= pretrained.items()
    assert vars(settings(["--lr", "0.5"])).items() >= (scratch | {"lr": 0.5}).items()


# ---------------------------------------------------------------- eval.py: pictures

def drawn(monkeypatch, name):
    """The rows that eval.gallery_picture or eval.attention_picture is called with; it still draws them."""
    rows = []
    draw = getattr(eval, name)

    def recording(path, given):
        rows.extend(given)
        draw(path, given)
    monkeypatch.setattr(eval, name, recording)
    return rows


def test_gallery_shows_predictions(things, whole, tmp_path, monkeypatch):
    """Which are right, which wrong and what they are; unlabelled ones are neither (frames: test_eval.py)."""
    rows = drawn(monkeypatch, "gallery_picture")

    def label(i, row):
        """In the test split half of the things are called after another touch, and `seen` has no label."""
        touch = TOUCH.index(row["labels"]["told"])
        return {"told": TOUCH[(touch + i % 2) % 4]} if row["split"] == "test" else row["labels"]
    test = relabelled(things, tmp_path / "other.jsonl", label)[-32:]
    by_pixels = {data.pixels(row["images"][0], eval.CELL).tobytes(): row for row in test}
    picture = tmp_path / "gallery.png"
    evaluated(whole / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path, "--gallery", picture)
    assert len(rows) == 10 and Image.open(picture).format == "PNG"
    judged = []
    for query, ((caption, _), (of_seen, unknown), (of_told, right)) in rows:
        row = by_pixels[query.tobytes()]
        label = row["labels"]["told"]
        assert caption == row["captions"][0] and of_seen.startswith("seen: ") and of_told.startswith("told: ")
        assert unknown is None and "is" not in of_seen
        assert right == (of_told.split()[1] == label) and (f"is {label}" in of_told) == (not right)
        judged.append(right)
    assert min(judged.count(True), judged.count(False)) > 1


def test_attention_picture(things, whole, tmp_path, monkeypatch):
    """Of each word but start and end the map of `attention`, of each task the weight of the image."""
    rows = drawn(monkeypatch, "attention_picture")
    path = tmp_path / "attention.png"
    evaluated(whole / "best.pt", "--out", tmp_path, "--attention", path, "--split", "val")
    assert len(rows) == 6 and Image.open(path).format == "PNG"
    model, _ = eval.restore(whole / "best.pt", "cpu")
    tokenizer = model.tokenizer
    val, _ = data.load(things, split="val")
    by_pixels = {data.pixels(x.images[0], eval.CELL).tobytes(): x for x in val}
    for picture, caption, words, bars in rows:
        x = by_pixels[picture.tobytes()]
        tokens = tokenizer([caption], 16)
        image = clip.transform(16)(Image.open(x.images[0]))[None]
        maps = model.attention(image, tokens)
        _, weights = model(image, tokens)
        assert caption == x.captions[0] and len(words) == int(tokens.argmax()) - 1
        assert "".join(word for word, _ in words).replace(" ", "") == caption.replace(" ", "")
        for (_, drawn_map), expected in zip(words, maps[0, 1:]):
            assert np.allclose(drawn_map, expected.view(2, 2), atol=1e-5)
        assert [task for task, _ in bars] == ["seen", "told"]
        assert [weight for _, weight in bars] == pytest.approx(weights[0, :, 0].tolist(), abs=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS[1:])
def test_attention_of_other_fusions(fusion, things, tmp_path, monkeypatch, capsys):
    """sequence has words and no weights, modality weights and no words; what has neither is refused."""
    rows = drawn(monkeypatch, "attention_picture")
    classes = {"seen": sorted(list(COLOURS)[:4]), "told": list(TOUCH)}
    model = CMACLIP(small_clip(CAPTIONS), classes, fusion)
    clip.save_checkpoint(tmp_path / "best.pt", {
        "method": "train_cmaclip", "clip": clip.describe(model.clip), "heads": clip.describe_heads(model),
        "classes": classes,
        "settings": vars(settings(["--data", things, "--fusion", fusion]))})
    argv = ["--checkpoint", tmp_path / "best.pt", "--device", "cpu", "--attention", tmp_path / "a.png"]
    if fusion in ("concat", "image", "text"):
        assert f"--fusion {fusion} has no attention" in refused(capsys, argv, eval.main)
        return
    eval.main([str(word) for word in argv])
    assert len(rows) == 6
    for _, _, words, bars in rows:
        assert bool(words) == (fusion == "sequence") and bool(bars) == (fusion == "modality")


def test_what_a_checkpoint_cannot_do_is_said(things, whole, tmp_path, capsys):
    argv = ["--checkpoint", whole / "best.pt", "--query", "a wet thing", "--device", "cpu"]
    line = refused(capsys, argv, eval.main)
    assert "--query" in line and "train_cmaclip" in line
    mxm = {"method": "train_mxm", "clip": clip.describe(small_clip(CAPTIONS))}
    clip.save_checkpoint(tmp_path / "mxm.pt", mxm | {"settings": {"data": things, "root": None}})
    argv = ["--checkpoint", tmp_path / "mxm.pt", "--attention", tmp_path / "a.png", "--device", "cpu"]
    line = refused(capsys, argv, eval.main)
    assert "train_mxm has no attention" in line and "train_cmaclip has" in line
    assert os.listdir(tmp_path) == ["mxm.pt"]


# ---------------------------------------------------------------- tasks and labels

def test_pairs_renumber_labels_by_name():
    known = {"colour": ["blue", "green", "red"], "size": ["big", "small"]}
    classes = {"colour": ["red", "blue"], "shape": ["round", "square"]}
    instances = [data.Instance("a", ["1", "2"], ["x", "y", "z"], {"colour": 2, "size": 0}),
                 data.Instance("b", ["3"], ["w"], {"colour": 1, "size": 1}),
                 data.Instance("c", ["4"], ["v"], {"colour": -1}),
                 data.Instance("d", ["5"], ["u"], {"colour": 0})]
    out = pairs(instances, known, classes)
    texts = ["".join([x.id, *x.images, *x.captions]) for x in out]
    assert texts == ["a1x", "a2y", "a1z", "b3w", "c4v", "d5u"]
    assert [x.labels["colour"] for x in out] == [0, 0, 0, -1, -1, 1]  # the model does not know green
    assert all(x.labels.keys() == {"colour", "shape"} and x.labels["shape"] == -1 for x in out)


def test_tasks_are_chosen(capsys):
    classes = {"a": ["x", "y"], "b": ["x"], "c": ["x", "y", "z"], "d": [f"id {i}" for i in range(1200)]}
    instances = []
    for i in range(1200):
        instances.append(data.Instance(str(i), ["p"], ["t"], {"a": i % 2, "b": 0, "c": i % 3, "d": i}))
    assert choose_tasks(classes, None, "mine", instances) == {"a": classes["a"], "c": classes["c"]}
    said = capsys.readouterr().err
    assert "'b' has one class only in train" in said and "'d' has 1,200 distinct values" in said
    assert said.count("left out") == 2 == said.count("\n")
    assert list(choose_tasks(classes, "c,a", "mine", instances)) == ["c", "a"]
    assert capsys.readouterr().err == ""
    # a stray comma brings in no task that nobody asked for
    for asked, says in (("a,e", "e: mine has the tasks a, b, c, d"), ("a,", ": mine has the tasks a, b"),
                        ("b", "one class only"), ("d", "look like ids")):
        with pytest.raises(data.DataError, match=says):
            choose_tasks(classes, asked, "mine", instances)
    with pytest.raises(data.DataError, match="no labels"):
        choose_tasks({}, None, "mine", instances)
    with pytest.raises(data.DataError, match="none of the tasks b, d"):
        choose_tasks({task: classes[task] for task in "bd"}, None, "mine", instances)


def test_other_data_is_evaluated_by_the_names_of_classes(things, whole, tmp_path):
    """The things without a task's first class and the other task: numbered anew, and just as right."""
    def label(i, row):
        told = row["labels"]["told"]
        return {} if told == "dry" else {"told": told, "more": "x"}
    relabelled(things, tmp_path / "other.jsonl", label)
    evaluated(whole / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path)
    rows = metrics(tmp_path)[f"{tmp_path / 'other.jsonl'} test"]
    assert rows["model"]["tasks"].keys() == {"told"} and rows["model"]["tasks"]["told"]["accuracy"] > 80
    assert rows["majority"] == {"told": {"accuracy": pytest.approx(100 / 3)}}


def test_unlabelled_rows_take_no_part(tmp_path, capsys):
    """A tenth of the squares has no outer colour: they count for the other task. Every caption is a pair."""
    squares = make_squares(tmp_path)
    captions = [caption for x in data.load(squares)[0] for caption in x.captions]
    clip.save_checkpoint(tmp_path / "clip.pt", {"clip": clip.describe(small_clip(captions))})
    main(arguments(squares, "--batch-size", 8, "--epochs", 6, "--eval-every", 6, "--out", tmp_path / "run"))
    assert log(tmp_path / "run")[0]["step"] == 3
    assert "24 instances, 2 tasks (inner, outer)" in capsys.readouterr().err
    rows = [row for row in map(json.loads, open(squares)) if row["split"] == "test"]
    reached = metrics(tmp_path / "run")["test"]
    expected = accuracy(squares, tmp_path / "run" / "best.pt")
    for task in ("inner", "outer"):
        labelled = [len(row["captions"]) for row in rows if task in row["labels"]]
        majority = 100 * max(labelled) / sum(labelled)
        assert reached["majority"][task]["accuracy"] == pytest.approx(majority)
        assert reached["model"]["tasks"][task]["accuracy"] == expected[task]
    assert reached["model"]["tasks"]["outer"]["accuracy"] > 0


def test_a_task_may_be_called_mean(things, tmp_path, capsys):
    relabelled(things, tmp_path / "mine.jsonl", lambda i, row: {"mean": row["labels"]["told"]})
    argv = arguments(things, "--out", tmp_path / "run")
    main(["--data", str(tmp_path / "mine.jsonl"), *argv[2:]])
    reached = metrics(tmp_path / "run")["test"]["model"]
    assert reached["tasks"] == {"mean": reached["mean"]}
    named = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mean ")]
    assert len(named) == 2 and named[0][3:] == named[1][1:]  # the first has the classes and the majority, too


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("words, says", [
    ("--tasks seen,feel", "feel: "), ("--fusion both", "sequence"),
    ("--heads 3", "--heads 3: does not divide the width 16"), ("--width 10", "does not divide the width 10"),
    ("--heads 0", "positive"), ("--layers 0", "positive"), ("--width -4", "positive"),
    ("--clip-lr 0", "positive"), ("--dropout 2", "from 0 to 1"),
    ("--precision 0", "up to 1"), ("--precision nan", "up to 1"),
    ("--train-noise-image 1.5", "from 0 to 1"), ("--train-noise-text -0.1", "from 0 to 1"),
    ("--train-noise-image nan", "from 0 to 1"), ("--train-noise-text all", "--train-noise-text"),
    ("--clip no.pt", "no.pt"),
    ("--batch-size 49", "larger than the data set: 48"), ("--data no.jsonl", "no.jsonl"),
    ("--clip tiny --freeze", "--freeze: tiny starts from random weights")])
def test_bad_settings(words, says, things, whole, tmp_path, capsys):
    """Each is said in a line; nothing is written, and an earlier run stays as it was."""
    assert says in refused(capsys, arguments(things, "--out", tmp_path / "new", *words.split()), main)
    shutil.copytree(whole, tmp_path / "earlier")
    refused(capsys, arguments(things, "--out", tmp_path / "earlier", *words.split()), main)
    assert os.listdir(tmp_path) == ["earlier"] and os.listdir(tmp_path / "earlier") == os.listdir(whole)
    for name in os.listdir(whole):
        assert (tmp_path / "earlier" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("label, says", [
    (lambda i, row: {}, "no labels; this method learns from classes"),
    (lambda i, row: {"seen": "red"}, "none of the tasks seen has two or more classes"),
    (lambda i, row: {"seen": f"remark {i}"}, "no labels"),
    (lambda i, row: row["labels"] if row["split"] != "val" else {},
     "no instance of split 'val' has a label of seen, told"),
    (lambda i, row: row["labels"] if row["split"] != "test" else {}, "'test'"),
    (lambda i, row: row["labels"] | ({"seen": "pink"} if row["split"] == "test" else {}), "'pink'")])
def test_labels_that_cannot_be_learned(label, says, things, tmp_path, capsys):
    """Each is said before training: nothing is written."""
    relabelled(things, tmp_path / "mine.jsonl", label)
    argv = arguments(things, "--out", tmp_path / "run")
    assert says in refused(capsys, ["--data", tmp_path / "mine.jsonl", *argv[2:]], main)
    assert not (tmp_path / "run").exists()


def test_documented_commands_parse():
    assert_documented_commands_parse(train_cmaclip)


def test_products(tmp_path):
    """Real products, through the real command: one epoch, seven tasks in the table."""
    root = os.path.join(ROOT, "..", "shared", "data", "fashion")
    if not os.path.isdir(root):
        pytest.skip("no ../shared/data/fashion here")
    done = command("train_cmaclip.py", "--data", "products", "--root", root, "--clip", "tiny",
                   "--epochs", 1, "--image-size", 16, "--workers", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    tasks = ["gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "usage"]
    table = [line.split() for line in done.stdout.splitlines()]
    reached = metrics(tmp_path)["test"]["model"]
    assert [line[0] for line in table[1:9]] == [*tasks, "mean"] and tasks == list(reached["tasks"])
    assert all(len(line) == 7 for line in table[1:8])
    assert reached["tasks"]["gender"]["accuracy"] > 60  # a title begins with it; the commonest is 49
