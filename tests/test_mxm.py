"""Tests of train_mxm.py: its losses and relations by loops over observations; whole runs, and eval.py on one.

What every script promises of a run is tested in test_runs.py.
"""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import train_mxm
from runs import arguments, in_process, kept_signals, spy, squares  # noqa: F401
from test_losses import assert_finite, both_directions, features, mean, pair_terms, value_and_gradients


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """A finished run; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with kept_signals():
        train_mxm.main(arguments(squares, "--out", out))
    return out


# ---------------------------------------------------------------- the losses, by their definitions

# owners are any numbers, in any order; instances have 1 to 4 images and 1 to 3 captions
IMAGE_OWNER = torch.tensor([2 ** 40, 3, 41, 3, 2 ** 40, 17, 3, 41, 3, 5])
TEXT_OWNER = torch.tensor([41, 17, 3, 5, 17, 2 ** 40, 41, 3, 41])
OWNERS = (IMAGE_OWNER, TEXT_OWNER)
INSTANCES = (3, 5, 17, 41, 2 ** 40)
SCALE = torch.tensor(7.0, dtype=torch.float64)
TEMPERATURE = 0.3


IMAGES, TEXTS = features(10, 0), features(9, 1)
plain_hard = partial(both_directions, pair_terms)


def instance_mean(x, owner, number):
    total = sum(row for row, of_row in zip(x, owner) if of_row == number)
    return total / total.square().sum().sqrt()


def plain_relation(images, texts):
    """P (N, C): how probable it is that a caption is about an instance, by the features within modalities."""
    P = torch.zeros(len(INSTANCES), len(texts), dtype=torch.float64)
    for c, owner in enumerate(TEXT_OWNER):
        v = instance_mean(images, IMAGE_OWNER, owner)
        for i, number in enumerate(INSTANCES):
            of_images = v @ instance_mean(images, IMAGE_OWNER, number)
            of_texts = texts[c] @ instance_mean(texts, TEXT_OWNER, number)
            P[i, c] = ((of_images + of_texts) / 2 / TEMPERATURE).exp()
        P[:, c] /= P[:, c].sum()
    return P


def cross_entropy(scores, target):
    e = torch.stack(scores).exp()
    return -(target / target.sum() * torch.log(e / e.sum())).sum()


def plain_soft(images, texts, scale, P):
    means = [instance_mean(images, IMAGE_OWNER, number) for number in INSTANCES]
    to_image = [cross_entropy([scale * v @ text for v in means], P[:, c]) for c, text in enumerate(texts)]
    to_text = []
    for image, owner in zip(images, IMAGE_OWNER):
        row = P[INSTANCES.index(owner)]
        to_text.append(cross_entropy([scale * image @ text for text in texts], row))
    return (mean(to_image) + mean(to_text)) / 2


def assert_equal_in_gradient(loss, definition, *leaves, **tolerance):
    expected = value_and_gradients(definition, leaves)
    assert min(x.abs().max() for x in expected) > 1e-3
    torch.testing.assert_close(value_and_gradients(loss, leaves), expected, **tolerance)


def of_script(loss, soft_weight=0.3, known=None, owners=OWNERS):
    """The loss of --loss as a function of images, texts and scale."""
    args = train_mxm.settings(["--loss", loss, "--soft-relation", "features",
                               "--soft-temperature", str(TEMPERATURE)])
    captions = torch.arange(9)
    return lambda *leaves: train_mxm.total_loss(args, *leaves, *owners, captions, known, soft_weight)


@pytest.mark.parametrize("loss, soft_weight, share", [
    ("hard", 0.3, 0), ("soft", 0.3, 1), ("hybrid", 0.3, 0.3), ("hybrid", 0, 0), ("hybrid", 1, 1)])
@pytest.mark.parametrize("given", [False, True])
def test_losses_are_loops(loss, soft_weight, share, given):
    """By the features, or of a relation that is given: its columns need not add up to 1, since a caption that
    is about many images outside the batch has less mass among the texts."""
    P = plain_relation(IMAGES, TEXTS)  # no gradient flows through it
    if given:
        P = torch.rand(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def known(instances, captions):
        assert instances.tolist() == list(INSTANCES) and captions.tolist() == list(range(9))
        return P.log()

    def definition(*leaves):
        return (1 - share) * plain_hard(*leaves, *OWNERS) + share * plain_soft(*leaves, P)
    found = of_script(loss, soft_weight, known if given else None)
    assert_equal_in_gradient(found, definition, IMAGES, TEXTS, SCALE)


def test_of_one_image_and_one_caption_the_hard_loss_is_clips():
    owner = torch.tensor(INSTANCES)
    definition = partial(plain_hard, image_owner=owner, text_owner=owner)
    float32 = {"rtol": 1.3e-6, "atol": 1e-5}  # in which it computes
    assert_equal_in_gradient(of_script("clip"), definition, IMAGES[:5], TEXTS[:5], SCALE, **float32)


@pytest.mark.parametrize("loss", ["hard", "soft", "hybrid"])
def test_losses_stay_finite(loss):
    """At the largest scale, with a negative at cosine 1 and positives at -1; without any negative."""
    images, texts = IMAGES.float(), TEXTS.float()
    images[0] = texts[1]
    texts[0] = -images[2]
    texts[5] = -images[0]
    leaves = (images, texts, torch.tensor(100.0))
    worst = value_and_gradients(of_script(loss), leaves)
    assert_finite(worst)
    assert worst[0] > 10
    one = (torch.zeros(10, dtype=torch.int64), torch.zeros(9, dtype=torch.int64))
    assert_finite(value_and_gradients(of_script(loss, owners=one), leaves))


# ---------------------------------------------------------------- relations that are known before training

def known(relation, instances, *more, name="primitives"):
    args = train_mxm.settings(["--data", name, "--clip", "tiny", "--soft-relation", relation, "--amp", "off",
                               *map(str, more)])
    return train_mxm.known_relation(args, instances, torch.device("cpu"))


def test_a_known_relation_is_a_softmax_over_all_instances():
    """Of more captions and instances than are added up at a time."""
    table = torch.rand(4100, 1030, generator=torch.Generator().manual_seed(0))

    def scores(captions, instances):
        return table[captions][:, instances]
    P = train_mxm.KnownRelation(scores, 7.0, *table.shape, "cpu")
    captions, instances = torch.tensor([4099, 0, 5, 4096]), torch.tensor([1029, 3])
    expected = (7 * table).log_softmax(1)[captions][:, instances].t()
    assert torch.allclose(P(instances, captions), expected, atol=1e-5)


def test_relation_of_words():
    captions = [["a red cone", "a cone"], ["a red box", "thing"], ["the thing"], ["a red cone , wide"]]
    instances = [data.Instance(str(i), [""], c) for i, c in enumerate(captions)]
    rows = torch.arange(6), torch.arange(4)
    shared = data.SharedTerms(*data.word_terms(instances), "cpu")(*rows)
    P = known("words", instances)(rows[1], rows[0]).exp().t()
    assert torch.allclose(P, (20 * shared).softmax(1), atol=1e-6)
    assert P[0, 0] == pytest.approx(0.5, abs=1e-3)  # the red cone may be the wide one too
    assert P[3, 1] == P[3, 2] and P[5, 3] > 0.99


def test_relation_of_a_teacher(squares, whole, tmp_path):
    """Over all training instances, by the similarities of captions and the mean of the views."""
    train = data.load(squares)[0]
    model, _ = eval.restore(whole / "best.pt", "cpu")
    images, texts = eval.embed(model, train, "off")
    P = known("teacher", train, "--teacher", whole / "best.pt", name=squares)
    captions = torch.tensor([5, 0, 40])
    expected = (model.logit_scale.exp() * texts @ images.t()).softmax(1)[captions]
    assert torch.allclose(P(torch.arange(24), captions).exp().t(), expected, rtol=1e-4)
    argv = ("--soft-relation", "teacher", "--teacher", whole / "best.pt", "--epochs", 1)
    train_mxm.main(arguments(squares, "--out", tmp_path, *argv))
    assert clip.load_checkpoint(tmp_path / "last.pt").keys() == clip.load_checkpoint(whole / "last.pt").keys()


# ---------------------------------------------------------------- a run

def test_clip_loss_takes_as_many_captions_as_views(squares, tmp_path, monkeypatch):
    """Other losses take four captions, or all where there are fewer."""
    seen = spy(monkeypatch, train_mxm, "total_loss")
    train_mxm.main(arguments(squares, "--out", tmp_path, "--epochs", 1, "--loss", "clip", "--views", 2))
    assert [(len(images), len(texts)) for _, images, texts, *_ in seen] == [(16, 16)] * 3
    assert train_mxm.captions_per_step(train_mxm.settings([]), data.load(squares)[0]) == 3


def test_soft_weight_ramps_up(squares, tmp_path, monkeypatch):
    seen = spy(monkeypatch, train_mxm, "total_loss")
    train_mxm.main(arguments(squares, "--out", tmp_path, "--soft-weight", 0.8, "--soft-warmup", 0.5))
    assert [given[-1] for given in seen] == pytest.approx([0.8 * min(1, step / 4.5) for step in range(9)])


def test_eval_embeds_views_as_their_renormalised_mean(squares, whole):
    model, _ = eval.restore(whole / "best.pt", "cpu")
    instances = data.load(squares, split="test")[0]
    images, texts = eval.embed(model, instances, "off")
    preprocess = clip.transform(model.visual.input_resolution)
    with torch.no_grad():
        for x, image in zip(instances, images):
            pictures = torch.stack([preprocess(Image.open(path)) for path in x.images])
            views = F.normalize(model.encode_image(pictures))
            assert F.cosine_similarity(views.mean(0), image, dim=0) > 1 - 1e-4
            assert image.norm() == pytest.approx(1)
        captions = model.tokenizer([c for x in instances for c in x.captions], 32)
        captions = F.normalize(model.encode_text(captions))
    assert torch.allclose(captions, texts, atol=1e-5)
