"""Tests of train_cmaclip.py: its model against a plain version without batches, its noise, its runs."""
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import train_cmaclip
from runs import COLOURS, evaluated, in_process, kept_signals, metrics, spy  # noqa: F401
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
    The task `seen` is the colour of the picture alone, `told` a word of the caption alone."""
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


def test_how_a_model_starts():
    """By the seed alone, and with modalities that weigh the same."""
    clip_model = small_clip(CAPTIONS)
    before = torch.get_rng_state()
    a, b, c = (CMACLIP(clip_model, CLASSES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.text_position, c.text_position)
    _, weights = a.eval()(torch.randn(2, 3, 16, 16), clip_model.tokenizer(["wet", "red"], 16))
    assert weights.shape == (2, 3, 2) and (weights == 0.5).all()
    with pytest.raises(data.DataError, match="--heads 3: does not divide the width 16"):
        CMACLIP(clip_model, CLASSES, heads=3)


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
    """Whole rows, a larger share takes in a smaller one, images and texts apart from each other."""
    images = torch.arange(300)[:, None, None, None].expand(300, 3, 2, 2)
    tokens = torch.arange(300)[:, None].expand(300, 5)
    moved_before = torch.zeros(2, 300, dtype=torch.bool)
    for noise in ((0.0, 0.0), (0.0, 0.3), (0.4, 0.4), (1.0, 0.4), (1.0, 1.0)):
        torch.manual_seed(1)
        corrupted = corrupt(images, tokens, noise)
        rows = torch.stack([now.flatten(1)[:, 0] for now in corrupted])
        assert all((now.flatten(1) == row[:, None]).all() for now, row in zip(corrupted, rows))
        moved = rows != torch.arange(300)
        for share, part in zip(noise, moved):
            assert part.float().mean().item() == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
        assert not (moved_before & ~moved).any()
        moved_before = moved
    assert (rows[0] != rows[1]).float().mean() > 0.9 and len(rows[0].unique()) > 150  # not of one other alone
    alone = corrupt(images[:1], tokens[:1], (1.0, 1.0))
    assert torch.equal(alone[0], images[:1]) and torch.equal(alone[1], tokens[:1])  # there is no other


def test_noise_settings_reach_training_and_testing(things, tmp_path, monkeypatch):
    """Training takes its own shares. --robustness goes through the shares of the images and of the texts, on
    the test split in another order: in its own, neighbours are often alike."""
    calls = spy(monkeypatch, train_cmaclip, "corrupt", lambda _, images, tokens, noise: noise)
    evaluated_on = spy(monkeypatch, eval, "evaluation_loader",
                       lambda _, model, instances, *a, **k: [x.id for x in instances])
    main(arguments(things, "--out", tmp_path, "--train-noise-image", 0.1, "--train-noise-text", 0.2,
                   "--robustness", "--seed", 3))
    shares = (0.0, 0.25, 0.5, 1.0)
    study = [noise for share in shares for noise in ((share, 0.0), (0.0, share))]
    assert calls == [(0.1, 0.2)] * 3 + study
    _, plain, mixed = evaluated_on
    assert plain == [f"t{i}" for i in range(64, 96)] == sorted(mixed) != mixed


# ---------------------------------------------------------------- runs

def accuracy(path, checkpoint):
    """{task: percent right} of the test split, from the files, one by one."""
    model, best = eval.restore(checkpoint, "cpu")
    right = {task: [] for task in best["classes"]}
    for row in map(json.loads, open(path)):
        if row["split"] == "test":
            image = clip.transform(16)(Image.open(row["images"][0]))[None]
            with torch.no_grad():
                logits, _ = model(image, model.tokenizer(row["captions"], 16))
            for task in right:
                named = best["classes"][task][logits[task][0].argmax()]
                right[task].append(named == row["labels"][task])
    return {task: pytest.approx(100 * np.mean(values)) for task, values in right.items()}


def test_it_learns_where_to_look(things, whole):
    """Both tasks, one of the picture and one of the text, so that noise harms each where it looks."""
    rows = metrics(whole)["test"]
    found = {task: rows["model"][task]["accuracy"] for task in ("seen", "told")}
    assert min(found.values()) > 85 and found == accuracy(things, whole / "best.pt")
    assert rows["model"]["seen"]["image_weight"] > 55 > 45 > rows["model"]["told"]["image_weight"]
    for kind, task, other in (("image", "seen", "told"), ("text", "told", "seen")):
        study = rows["noise"][kind]
        assert study["0.0"][task] == pytest.approx(rows["model"][task])
        assert study["1.0"][task]["accuracy"] < 50 < 70 < study["1.0"][other]["accuracy"]


@pytest.mark.parametrize("fusion", ["sequence", "text"])
def test_other_fusions_run_and_eval_repeats_their_metrics(fusion, things, tmp_path):
    main(arguments(things, "--out", tmp_path, "--fusion", fusion))
    rows = metrics(tmp_path)["test"]
    assert rows["majority"] == {"seen": {"accuracy": 25.0}, "told": {"accuracy": 25.0}}
    evaluated(tmp_path / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == rows


def test_thresholds_are_those_of_the_same_model_on_val(things, tmp_path):
    main(arguments(things, "--out", tmp_path, "--epochs", 3, "--eval-every", 1, "--precision", 0.3))
    for name in ("best.pt", "last.pt"):
        model, checkpoint = eval.restore(tmp_path / name, "cpu")
        val = pairs(data.load(things, split="val")[0], checkpoint["classes"])
        probabilities, labels, _ = eval.predict(model, eval.evaluation_loader(model, val), "off")
        for task, classifier in zip(("seen", "told"), model.classifiers):
            expected = eval.precision_thresholds(probabilities[task], labels[task], 0.3)
            assert torch.equal(classifier.threshold, expected) and expected.isfinite().any()


def test_clip_is_trained_at_a_rate_of_its_own_and_only_matrices_decay(things, tmp_path, monkeypatch):
    def settings_of(_, optimizer):
        return [(g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups]
    steps = spy(monkeypatch, torch.optim.AdamW, "step", settings_of)
    models = spy(monkeypatch, train_cmaclip, "CMACLIP", lambda model, *a, **k: model)
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


@pytest.mark.parametrize("resnet", [False, True])
def test_a_frozen_clip_stays_as_it_is(resnet, things, tmp_path, monkeypatch):
    """Bit for bit, a ResNet's running statistics too; no gradient is computed for it; all else is trained."""
    models = spy(monkeypatch, train_cmaclip, "CMACLIP", lambda model, *a, **k: model)
    clip_model = small_clip([x.captions[0] for x in data.load(things)[0]], resnet=resnet)
    clip.save_checkpoint(tmp_path / "clip.pt", {"clip": clip.describe(clip_model)})
    main(arguments(things, "--out", tmp_path / "run", "--clip", tmp_path / "clip.pt", "--freeze"))
    assert clip.identity(models[0].clip) == clip.identity(clip_model)
    assert all(p.grad is None for p in models[0].clip.parameters())
    start = CMACLIP(clip_model, {"seen": TOUCH, "told": TOUCH}).state_dict()
    heads = clip.load_checkpoint(tmp_path / "run" / "best.pt")["heads"]
    for name in heads.keys() - {"classifiers.0.threshold", "classifiers.1.threshold"}:
        assert not torch.equal(heads[name], start[name]), name


def test_settings_reach_the_model(things, tmp_path):
    main(arguments(things, "--out", tmp_path, "--width", 24, "--layers", 1, "--heads", 3, "--dropout", 0,
                   "--tasks", "told"))
    model, checkpoint = eval.restore(tmp_path / "best.pt", "cpu")
    layer, = model.layers
    assert layer.self_attn.num_heads == 3 and layer.dropout.p == 0 and model.importance.shape == (1, 2, 24)
    assert checkpoint["classes"] == {"told": list(TOUCH)}
    assert vars(settings([])).items() >= train_cmaclip.SCRATCH.items()
    assert vars(settings(["--clip", "ViT-B/32"])).items() >= train_cmaclip.PRETRAINED.items()


# ---------------------------------------------------------------- eval.py: pictures

@pytest.fixture
def drawn(monkeypatch):
    """The rows that eval.gallery_picture is called with, in place of drawing. A heat picture is what it is
    drawn from but the picture: (word, weights, largest)."""
    rows = []
    monkeypatch.setattr(eval, "gallery_picture", lambda path, given: rows.extend(given))
    monkeypatch.setattr(eval, "heat_picture", lambda picture, *given: given)
    return rows


def test_gallery_shows_predictions_by_the_names_of_classes(things, whole, drawn, tmp_path):
    """Which are right, which wrong and what they are; unlabelled ones are neither. The data has other classes
    than the model: no `dry`, and no `seen`; half of the things are called after another touch."""
    def label(i, row):
        told = TOUCH[(TOUCH.index(row["labels"]["told"]) + i % 2) % 4]
        return {} if told == "dry" else {"told": told}
    test = relabelled(things, tmp_path / "other.jsonl", label)[-32:]
    by_pixels = {data.pixels(row["images"][0], eval.CELL).tobytes(): row for row in test}
    evaluated(whole / "best.pt", "--data", tmp_path / "other.jsonl", "--out", tmp_path, "--gallery", "x.png")
    judged = []
    for query, ((caption, _), (of_seen, unknown), (of_told, right)) in drawn:
        row = by_pixels[query.tobytes()]
        label = row["labels"].get("told")
        assert caption == row["captions"][0] and of_seen.startswith("seen: ") and unknown is None
        assert of_told.startswith("told: ") and right == (label and of_told.split()[1] == label)
        assert (f"is {label}" in of_told) == (right is False)
        judged.append(right)
    assert len(drawn) == 10 and {True, False, None} == set(judged)


def test_attention_picture(things, whole, drawn, tmp_path):
    """Of each word but start and end the map of `attention`, of each task the weight of the image."""
    evaluated(whole / "best.pt", "--out", tmp_path, "--attention", "x.png", "--split", "val")
    model, _ = eval.restore(whole / "best.pt", "cpu")
    val, _ = data.load(things, split="val")
    by_pixels = {data.pixels(x.images[0], eval.CELL).tobytes(): x for x in val}
    cells = []  # of each picture, whose rows are as long as fits
    for picture, results in drawn:
        assert len(results) <= 8
        if not isinstance(picture, str):
            cells.append((by_pixels[picture.tobytes()], []))
        cells[-1][1].extend(cell for cell, right in results if right is None)
    assert len(cells) == 6 < len(drawn)
    for x, (caption, *words, seen, told) in cells:
        tokens = model.tokenizer([caption], 16)
        image = clip.transform(16)(Image.open(x.images[0]))[None]
        maps = model.attention(image, tokens)[0, 1:int(tokens.argmax())]
        _, weights = model(image, tokens)
        assert caption == x.captions[0] and len(words) == len(maps)
        assert "".join(word for word, _, _ in words).replace(" ", "") == caption.replace(" ", "")
        for (_, drawn_map, largest), expected in zip(words, maps):
            assert np.allclose(drawn_map, expected.view(2, 2), atol=1e-5)
            assert largest == pytest.approx(maps.max().item(), abs=1e-5)
        for text, task, weight in zip((seen, told), ("seen", "told"), weights[0, :, 0].tolist()):
            assert text == f"{task}: image {100 * weight:.0f}%, text {100 - 100 * weight:.0f}%"


@pytest.mark.parametrize("fusion", ["sequence", "modality", "concat"])
def test_attention_of_other_fusions(fusion, things, drawn):
    """sequence has words and no weights, modality weights and no words; what has neither is refused."""
    classes = {"seen": sorted(list(COLOURS)[:4]), "told": list(TOUCH)}
    args = SimpleNamespace(data=things, root=None, split="test")
    model = CMACLIP(small_clip(CAPTIONS), classes, fusion)
    if fusion == "concat":
        with pytest.raises(clip.CheckpointError, match="--fusion concat has no attention"):
            train_cmaclip.attention_picture(model, {"classes": classes}, args, "x.png")
        return
    train_cmaclip.attention_picture(model, {"classes": classes}, args, "x.png")
    cells = [cell for _, results in drawn for cell, _ in results]
    texts = [cell for cell in cells if isinstance(cell, str)]
    assert (len(texts), len(cells) > 18) == {"sequence": (6, True), "modality": (18, False)}[fusion]


# ---------------------------------------------------------------- tasks and labels

def test_pairs():
    instances = [data.Instance("a", ["1", "2"], ["x", "y", "z"], {"colour": 2, "size": 0}),
                 data.Instance("b", ["3"], ["w"], {"colour": -1})]
    out = pairs(instances, ["colour", "shape"])
    assert ["".join([x.id, *x.images, *x.captions]) for x in out] == ["a1x", "a2y", "a1z", "b3w"]
    assert [x.labels for x in out] == [{"colour": 2, "shape": -1}] * 3 + [{"colour": -1, "shape": -1}]


def test_tasks_are_chosen(capsys):
    classes = {"a": ["x", "y"], "b": ["x"], "c": ["x", "y", "z"], "d": [f"id {i}" for i in range(1200)]}
    instances = []
    for i in range(1200):
        instances.append(data.Instance(str(i), ["p"], ["t"], {"a": i % 2, "b": 0, "c": i % 3, "d": i}))
    assert choose_tasks(classes, None, "mine", instances) == {"a": classes["a"], "c": classes["c"]}
    said = capsys.readouterr().err
    assert "'b' has one class only in train" in said and "'d' has 1,200 distinct values" in said
    assert list(choose_tasks(classes, "c,a", "mine", instances)) == ["c", "a"]
    # a stray comma brings in no task that nobody asked for
    for asked, says in (("a,e", "e: mine has the tasks a, b, c, d"), ("a,", ": mine has the tasks a, b"),
                        ("b", "one class only")):
        with pytest.raises(data.DataError, match=says):
            choose_tasks(classes, asked, "mine", instances)
    with pytest.raises(data.DataError, match="none of the tasks b, d"):
        choose_tasks({task: classes[task] for task in "bd"}, None, "mine", instances)
