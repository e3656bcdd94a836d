"""Tests of train_mxm.py: its losses on whole runs, views and captions, weights to start from; then eval.py on
a result.

    python -m pytest tests/test_mxm.py

What every script promises of a run is tested in test_runs.py.
"""
import json
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import losses
import train_mxm
from runs import (SMALL, arguments, evaluated, in_process, kept_signals, log,  # noqa: F401
                  make_squares, metrics, refused)  # (in_process acts by being here)
from test_losses import (IMAGE_OWNER, INSTANCES, TEXT_OWNER, assert_close, assert_finite, both_directions,
                         features, mean, pair_terms, value_and_gradients)


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

def test_a_run_has_the_defaults_and_reports_on_test(squares, whole):
    settings = json.loads((whole / "config.json").read_text())
    assert settings["loss"] == "hybrid" and settings["lr"] == train_mxm.SCRATCH["lr"]
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    rows = metrics(whole)["test"]
    assert eval.evaluate(model, data.load(squares, split="test")[0], tokenizer, "off") == rows["model"]
    assert rows["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 8)


def test_it_learns(squares, tmp_path):
    """Twenty epochs tell training squares apart: the loss falls by far, and far more than chance is found."""
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 20, "--eval-every", 20))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert ["val" in line for line in lines] == [False] * 19 + [True]
    model, tokenizer, _ = eval.restore(tmp_path / "last.pt", "cpu")
    result = eval.evaluate(model, data.load(squares, split="train")[0], tokenizer, "off")
    assert min(result[way]["R@1"] for way in eval.WAYS) > 40  # chance: 4


@pytest.mark.parametrize("loss", ["hard", "hard-uniform", "soft", "clip", "mil-nce"])
def test_every_loss_runs(loss, squares, whole, tmp_path, capsys):
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 1, "--loss", loss))
    said = capsys.readouterr()
    assert f"24 instances, 1 views x {1 if loss == 'clip' else 3} captions" in said.err
    assert "text-to-image" in said.out and "test model" in said.out and "test chance" in said.out
    assert math.isfinite(log(tmp_path)[0]["loss"]) and log(tmp_path)[0]["loss"] != log(whole)[0]["loss"]


@pytest.fixture
def seen(monkeypatch):
    """seen(name) -> a list that takes the arguments of every call of a loss."""
    def watch(name):
        plain, calls = getattr(losses, name), []

        def watched(*given):
            calls.append(given)
            return plain(*given)
        monkeypatch.setattr(losses, name, watched)
        return calls
    return watch


def test_clip_loss_of_several_pairs_of_an_instance(squares, tmp_path, seen):
    calls = seen("clip_loss")
    several = ("--loss", "clip", "--views", 2, "--captions", 2)
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 1, *several))
    assert [(len(images), len(texts)) for images, texts, _ in calls] == [(16, 16)] * 3


def test_soft_weight_ramps_up(squares, tmp_path, seen):
    calls = seen("mxm_loss")
    train_mxm.main(arguments(squares, "--out", tmp_path / "a", "--soft-weight", 0.8, "--soft-warmup", 0.5))
    assert [given[5] for given in calls] == pytest.approx([0.8 * min(1, step / 4.5) for step in range(9)])
    calls.clear()
    at_once = ("--epochs", 1, "--soft-weight", 0.8, "--soft-warmup", 0)
    train_mxm.main(arguments(squares, "--out", tmp_path / "b", *at_once))
    assert [given[5] for given in calls] == [0.8] * 3


# ---------------------------------------------------------------- the losses, by loops over observations

OWNERS = (IMAGE_OWNER, TEXT_OWNER)
SCALE = torch.tensor(7.0, dtype=torch.float64)
TEMPERATURE = 0.3


def instance_mean(x, owner, number):
    total = sum(x[i] for i in range(len(owner)) if owner[i] == number)
    return total / total.pow(2).sum().sqrt()


def relation_of_features(images, texts):
    """P (N, C): how probable it is that a caption is about an instance, by the features within the
    modalities."""
    P = torch.zeros(len(INSTANCES), len(texts), dtype=torch.float64)
    for c, owner in enumerate(TEXT_OWNER):
        v = instance_mean(images, IMAGE_OWNER, owner)
        for i, number in enumerate(INSTANCES):
            of_images = (v * instance_mean(images, IMAGE_OWNER, number)).sum()
            of_texts = (texts[c] * instance_mean(texts, TEXT_OWNER, number)).sum()
            P[i, c] = ((of_images + of_texts) / 2 / TEMPERATURE).exp()
        P[:, c] /= P[:, c].sum()
    return P


def cross_entropy(scores, target):
    e = torch.stack(scores).exp()
    return -(target / target.sum() * torch.log(e / e.sum())).sum()


def soft_by_loops(images, texts, scale, P):
    means = [instance_mean(images, IMAGE_OWNER, number) for number in INSTANCES]
    to_image = []
    for c, text in enumerate(texts):
        to_image.append(cross_entropy([scale * (v * text).sum() for v in means], P[:, c]))
    to_text = []
    for image, owner in zip(images, IMAGE_OWNER):
        row = P[INSTANCES.index(owner)]
        to_text.append(cross_entropy([scale * (image * text).sum() for text in texts], row))
    return (mean(to_image) + mean(to_text)) / 2


def test_hard_loss():
    leaves = (features(10, 0), features(9, 1), SCALE)
    expected = value_and_gradients(partial(both_directions, pair_terms), leaves, *OWNERS)
    assert_close(value_and_gradients(train_mxm.hard_loss, leaves, *OWNERS), expected)


def test_soft_loss():
    """The columns of a relation need not add up to 1: a caption that is about many images outside the batch
    has less mass among the texts."""
    P = torch.rand(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = (features(10, 0), features(9, 1), SCALE)
    expected = value_and_gradients(soft_by_loops, leaves, P)
    assert_close(value_and_gradients(train_mxm.soft_loss, leaves, IMAGE_OWNER, P.log()), expected)


def test_the_relation_of_features():
    images, texts = features(10, 0), features(9, 1)
    relation = train_mxm.features_relation(images.clone().requires_grad_(), texts, *OWNERS, TEMPERATURE)
    assert not relation.requires_grad
    assert_close([relation.exp().double()], [relation_of_features(images, texts)])


def test_the_hybrid_is_a_weighted_mean():
    leaves = (features(10, 0), features(9, 1), SCALE)
    args = train_mxm.settings(["--soft-relation", "features", "--soft-temperature", str(TEMPERATURE)])
    P = relation_of_features(*leaves[:2])
    hard, soft = train_mxm.hard_loss(*leaves, *OWNERS), soft_by_loops(*leaves, P)
    for weight in (0.0, 0.3, 1.0):
        found = train_mxm.total_loss(args, *leaves, *OWNERS, None, None, weight)
        assert found.item() == pytest.approx(((1 - weight) * hard + weight * soft).item(), rel=1e-5)


def test_captions_of_one_instance_have_targets_of_their_own():
    """The first caption of instance 0 is about both images, the second about the first alone: the minimum of
    the soft loss is where the scores say so."""
    relation = torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]).clamp(min=1e-6).log()
    logits = torch.zeros(2, 3, requires_grad=True)
    images = torch.eye(2)
    for _ in range(300):
        loss = train_mxm.soft_loss(images, logits.t(), 1.0, torch.arange(2), relation)
        gradient = torch.autograd.grad(loss, logits)[0]
        logits = (logits - 2 * gradient).detach().requires_grad_()
    assert logits.softmax(0)[0].tolist() == pytest.approx([0.5, 1, 0], abs=0.02)
    assert logits.softmax(1).tolist()[0] == pytest.approx([1 / 3, 2 / 3, 0], abs=0.02)


def test_a_second_positive_is_nobodys_negative_in_the_hard_loss():
    """How the first caption is drawn to its image does not depend on the second."""
    # the images are at right angles: a caption moves along its image by its own positive pairs alone
    image, elsewhere = torch.eye(4)[:2]
    first, second, third, other = features(4, 3, dim=4).float().unbind()

    def pull(*captions):
        texts = torch.stack([*captions, other]).requires_grad_()
        owner = torch.tensor([1] * len(captions) + [2])
        images = torch.stack([image, elsewhere])
        value = train_mxm.hard_loss(images, texts, torch.tensor(5.0), torch.tensor([1, 2]), owner)
        of_first = torch.autograd.grad(value, texts)[0][0]
        return (of_first @ image).item() * (len(captions) + 1)  # undoes the mean over positive pairs
    assert pull(first, second) == pytest.approx(pull(first, third), rel=1e-5)
    assert pull(first, second) == pytest.approx(pull(first), rel=1e-5)


def soft_of_features(images, texts, scale, *owners):
    relation = train_mxm.features_relation(images, texts, *owners, TEMPERATURE)
    return train_mxm.soft_loss(images, texts, scale, owners[0], relation)


@pytest.mark.parametrize("loss", [train_mxm.hard_loss, soft_of_features])
def test_losses_at_extremes_stay_finite(loss):
    images, texts = features(10, 0), features(9, 1)
    images[0] = texts[1]  # the worst: a negative at cosine 1, positives at -1
    texts[0] = -images[2]
    texts[5] = -images[0]
    worst = value_and_gradients(loss, (images, texts, torch.tensor(100.0)), *OWNERS)
    assert_finite(worst)
    assert worst[0] > 10
    owner = torch.zeros(9, dtype=torch.int64)  # one instance has no negatives: an empty sum gives no NaN
    assert_finite(value_and_gradients(loss, (images[:9], texts, torch.tensor(7.0)), owner, owner))


# ---------------------------------------------------------------- the soft relation

def known(relation, instances, *more, name="primitives"):
    args = train_mxm.settings(["--data", name, "--soft-relation", relation, "--amp", "off", *map(str, more)])
    return train_mxm.known_relation(args, instances, torch.device("cpu"))


def test_the_relation_of_features_has_a_temperature_of_its_own(squares, tmp_path, seen):
    calls = seen("soft_loss")
    for temperature in (0.5, 0.05):
        argv = ("--epochs", 1, "--loss", "soft", "--soft-relation", "features",
                "--soft-temperature", temperature)
        train_mxm.main(arguments(squares, "--out", tmp_path / str(temperature), *argv))
    flat, sharp = calls[0][4].exp(), calls[3][4].exp()  # of the same weights
    assert len(flat) == 8 and torch.allclose(flat.sum(0), torch.ones(flat.shape[1]))
    assert flat.amax(0).mean() < sharp.amax(0).mean() < 1


def test_relation_of_the_oracle():
    instances = data.load("primitives-target")[0][::9]
    owner = eval.caption_owner(instances)
    captions = torch.tensor([3, 80, 4, 11])
    some = torch.cat([owner[captions], torch.tensor([30, 7, 8])])
    P = known("oracle", instances)(some, captions).exp()
    expected = data.primitives_oracle(instances)[captions][:, some].t()
    assert torch.allclose(P, expected, atol=1e-5)
    assert len(set(P[P > 0.001].tolist())) > 1  # vague and precise captions


def test_relation_of_words():
    captions = [["a red cone", "a cone"], ["a red box", "thing"], ["the thing"], ["a red cone , wide"]]
    instances = [data.Instance(str(i), [""], c) for i, c in enumerate(captions)]
    words = [set(" ".join(c).replace(",", "").split()) for c in captions]

    def share(caption, j):
        idf = {w: math.log(5 / sum(w in other for other in words)) for w in caption.replace(",", "").split()}
        return sum(idf[w] for w in idf if w in words[j]) / sum(idf.values())
    rows = []
    for caption in (c for of_instance in captions for c in of_instance):
        fit = [math.exp(20 * (share(caption, j) - 1)) for j in range(4)]
        rows.append([f / sum(fit) for f in fit])
    P = known("words", instances)(torch.arange(4), torch.arange(6)).exp().t()
    assert torch.allclose(P, torch.tensor(rows), atol=1e-5)
    assert P[0, 0] == pytest.approx(0.5, abs=1e-3)  # the red cone may be the wide one too
    assert P[3, 1] == P[3, 2] and P[5, 3] > 0.99


def test_relation_of_a_teacher(squares, whole, tmp_path):
    """Over all training instances, by the similarities of captions and the mean of the views."""
    train = data.load(squares)[0]
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    images, texts = eval.embed(model, train, tokenizer, "off")
    P = known("teacher", train, "--teacher", whole / "best.pt", name=squares)
    captions = torch.tensor([5, 0, 40])
    expected = (model.logit_scale.exp() * texts @ images.t()).softmax(1)[captions]
    assert torch.allclose(P(torch.arange(24), captions).exp().t(), expected, rtol=1e-4)
    argv = ("--soft-relation", "teacher", "--teacher", whole / "best.pt", "--epochs", 1)
    train_mxm.main(arguments(squares, "--out", tmp_path, *argv))
    assert clip.load_checkpoint(tmp_path / "last.pt").keys() == clip.load_checkpoint(whole / "last.pt").keys()


def test_relation_of_words_over_two_processes(squares, forked, tmp_path, monkeypatch):
    """The numbers of the captions travel with their features. Instances have two captions, or three."""
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)
    argv = arguments(squares, "--soft-relation", "words", "--soft-warmup", 0, "--captions", 3, "--epochs", 1)
    ended = forked("train_mxm", [*argv, "--out", str(tmp_path / "2")], processes=2)
    assert [code for code, _, _ in ended] == [0, 0], ended
    train_mxm.main([*argv, "--out", str(tmp_path / "1")])
    assert log(tmp_path / "1")[0]["loss"] == pytest.approx(log(tmp_path / "2")[0]["loss"], rel=1e-5)
    one, two = (clip.load_checkpoint(tmp_path / n / "last.pt")["optimizer"]["state"] for n in "12")
    for i in one:
        x, y = one[i]["exp_avg"], two[i]["exp_avg"]
        assert (x - y).abs().max() <= 1e-5 * max(x.abs().max(), 1e-5)


# ---------------------------------------------------------------- weights to start from

def test_starts_from_a_checkpoint_with_its_tokenizer(squares, whole, tmp_path):
    train_mxm.main(arguments(squares, "--out", tmp_path, "--clip", whole / "best.pt", "--epochs", 1))
    model = eval.restore(whole / "best.pt", "cpu")[0]
    after = clip.load_checkpoint(tmp_path / "last.pt")
    assert after["settings"]["lr"] == train_mxm.PRETRAINED["lr"]
    for key, value in model.state_dict().items():  # three small steps later it is still near
        assert (after["clip"]["state_dict"][key] - value).abs().max() < 1e-4
    assert after["clip"]["merges"] == model.tokenizer.merges


def test_weights_without_a_tokenizer(squares, whole, tmp_path, capsys):
    """They need OpenAI's, which may not be at hand here."""
    model = eval.restore(whole / "best.pt", "cpu")[0]
    clip.save(model, tmp_path / "weights.pt")
    try:
        clip.default_tokenizer()
    except clip.CheckpointError as e:
        argv = arguments(squares, "--out", tmp_path / "run", "--clip", tmp_path / "weights.pt")
        assert str(e) in refused(capsys, argv, train_mxm.main)
    line = refused(capsys, ["--checkpoint", tmp_path / "weights.pt"], eval.main)
    assert "not a checkpoint of this project" in line


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("option, value, says", [
    ("--views", 0, "positive"), ("--captions", -1, "positive"), ("--soft-weight", 1.5, "share from 0 to 1"),
    ("--soft-warmup", -0.1, "share from 0 to 1"), ("--soft-temperature", 0, "positive"),
    ("--soft-relation", "true", "features"), ("--soft-relation", "oracle", "words needs nothing"),
    ("--soft-relation", "teacher", "--teacher belong together"),
    ("--teacher", "best.pt", "--teacher belong together"), ("--loss", "hrad", "hybrid")])
def test_bad_settings(option, value, says, squares, tmp_path, capsys):
    line = refused(capsys, arguments(squares, "--out", tmp_path / "run", option, value), train_mxm.main)
    assert says in line and not (tmp_path / "run").exists()


def test_pairs_need_as_many_views_as_captions(squares, tmp_path, capsys):
    argv = arguments(squares, "--out", tmp_path / "run", "--loss", "clip")
    assert "the same number" in refused(capsys, [*argv, "--captions", 2], train_mxm.main)
    line = refused(capsys, [*argv, "--views", 3, "--captions", 3], train_mxm.main)
    assert "fewer views or captions" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option, value, says", [
    ("--checkpoint", "{tmp}/file", "file: "), ("--checkpoint", "{tmp}/none.pt", "no such file"),
    ("--checkpoint", "{run}/metrics.json", "metrics.json: "), ("--split", "tset", "tset"),
    ("--top", "0", "positive"), ("--device", "gpu", "no device")])
def test_bad_arguments_of_the_evaluation(option, value, says, whole, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder, no weights")
    argv = ["--checkpoint", whole / "best.pt", option, value.format(tmp=tmp_path, run=whole)]
    assert says in refused(capsys, argv, eval.main)


# ---------------------------------------------------------------- eval.py on the result

def test_eval_command(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    best, before = tmp_path / "run" / "best.pt", metrics(whole)
    evaluated(best, "--split", "val", "--gallery", tmp_path / "gallery.png")
    said = capsys.readouterr().out
    after = metrics(tmp_path / "run")
    assert after["test"] == before["test"]  # what was there stays
    assert after["val"].keys() == after["test"].keys() == {"model", "chance"}
    best_score = max(line["val"]["rSum"] for line in log(whole))
    assert after["val"]["model"]["rSum"] == clip.load_checkpoint(best)["state"]["best"] == best_score
    assert f"{after['val']['model']['text_to_image']['R@1']:7.1f}" in said and "chance" in said
    assert Image.open(tmp_path / "gallery.png").format == "PNG"


def test_eval_search_with_words(squares, whole, tmp_path, capsys):
    before = (whole / "metrics.json").read_text()
    argv = (whole / "best.pt", "--split", "train", "--query")
    evaluated(*argv, "a red square on blue", "--top", "4", "--gallery", tmp_path / "results.png")
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    instances = {x.id: x for x in data.load(squares, split="train")[0]}
    scores = [float(score) for score, _, _ in lines]
    assert len(lines) == 4 and scores == sorted(scores, reverse=True)
    assert all(instances[id].captions[0] == caption for _, id, caption in lines)
    assert Image.open(tmp_path / "results.png").size[0] > 4 * eval.CELL
    assert (whole / "metrics.json").read_text() == before
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    images, texts = eval.embed(model, list(instances.values()), tokenizer, "off")
    captions = [c for x in instances.values() for c in x.captions]
    evaluated(*argv, captions[5], "--top", "99")  # a caption of the data finds what its own features find
    ids = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert ids == [list(instances)[i] for i in eval.search(texts[5:6], images, 99)[1][0].tolist()]


def test_eval_embeds_views_as_their_renormalised_mean(squares, whole):
    model, tokenizer, _ = eval.restore(whole / "best.pt", "cpu")
    instances = data.load(squares, split="test")[0]
    images, texts = eval.embed(model, instances, tokenizer, "off")
    preprocess = clip.transform(model.visual.input_resolution)
    with torch.no_grad():
        for x, image in zip(instances, images):
            pictures = torch.stack([preprocess(Image.open(path)) for path in x.images])
            views = F.normalize(model.encode_image(pictures))
            assert F.cosine_similarity(views.mean(0), image, dim=0) > 1 - 1e-4
            assert image.norm() == pytest.approx(1)
        captions = F.normalize(model.encode_text(tokenizer([c for x in instances for c in x.captions], 32)))
    assert torch.allclose(captions, texts, atol=1e-5)
