"""Tests of train_adapter.py: adapters, LoRA and the similarity against plain versions, what stays frozen,
small files, then whole runs on videos.

    python -m pytest tests/test_adapter.py

What every script promises of a run is tested in test_runs.py.
"""
import copy
import json
import math
import os
import pickle
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import runs
import train_adapter
from runs import (COLOURS, evaluated, in_process, kept_signals, log, make_squares,  # noqa: F401
                  metrics, refused)
from test_data_videos import WORDS, write
from train_adapter import Tuned, main, settings, similarity, video_metrics

CAPTIONS = ["a red square on blue", "red", "the frame is green and the middle white, around brown"]


def small_clip(seed=0, resnet=False):
    """A very small CLIP with its own tokenizer, whose encoders differ: 3 blocks of width 32, 2 of 48."""
    texts = [f"the frame is {colour} and the middle a {colour} square on around" for colour in COLOURS]
    tokenizer = clip.Tokenizer.train(2 * (texts + list(WORDS)), 600)
    config = clip.Config(24, 16, 3, 32, 8, 32, tokenizer.vocab_size, 48, 3, 2, 2)
    if resnet:
        config = clip.Config(24, 32, (1, 1, 1, 1), 4, None, 32, tokenizer.vocab_size, 48, 2, 2, 4)
    torch.manual_seed(seed)
    model = clip.CLIP(config)
    model.tokenizer = tokenizer
    for p in model.parameters():  # no bias or norm is at its starting value
        if p.ndim == 1:
            p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


def shaken(*tuning):
    """A Tuned CLIP none of whose added parts is at its starting value; and a copy of the bare CLIP."""
    model = small_clip()
    bare = copy.deepcopy(model)
    tuned = Tuned(model, *tuning)
    torch.manual_seed(0)
    for p in tuned.extra.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return tuned.eval(), bare


def trained(tuned):
    """{name: parameter} of all that is trained."""
    return {name: p for name, p in tuned.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The path of the .jsonl file; the CLIPs clip.pt, other.pt and resnet.pt lie beside it."""
    folder = tmp_path_factory.mktemp("squares")
    clips = {"clip.pt": small_clip(), "other.pt": small_clip(1), "resnet.pt": small_clip(resnet=True)}
    for name, model in clips.items():
        clip.save_checkpoint(folder / name, {"clip": clip.describe(model)})
    return make_squares(folder)


def spied(patch, owner, name):
    """The calls of a function from here on, as a list of (arguments, result)."""
    calls = []
    function = getattr(owner, name)

    def spy(*a):
        result = function(*a)
        calls.append((a, result))
        return result
    patch.setattr(owner, name, spy)
    return calls


@torch.no_grad()
def features_of(model):
    """What a CLIP, tuned or not, makes of two pictures and three texts: a pair of matrices."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.encode_image(images), model.encode_text(model.tokenizer(CAPTIONS, 24))


def text_ranks(scores, owner):
    """(C,): the rank of each text's own video among all, of scores (C, N)."""
    return (scores >= scores.gather(1, owner[:, None]) - eval.TIE).sum(1).float()


def beside(squares, name="clip.pt"):
    return os.path.join(os.path.dirname(squares), name)


def arguments(squares, *more):
    """Three epochs of three steps of the squares' 60 captions with clip.pt; both images of a square are its
    frames."""
    return runs.arguments(squares, "--clip", beside(squares), "--frames", 2, "--lr", 0.01,
                          "--batch-size", 20, *more)


@pytest.fixture(scope="module")
def finished(squares, tmp_path_factory):
    """The folder of a finished run with the defaults of --tune, --rank and --share."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with kept_signals():
        main(arguments(squares, "--out", out))
    return out


# ---------------------------------------------------------------- adapters

def size(config, r, d, shared=True):
    """Trained parameters, written out: in every layer, after attention and after the MLP."""
    widths = (config.vision_width, config.transformer_width)
    depths = (config.vision_layers, config.transformer_layers)
    count = (max(depths) if shared else sum(depths)) * 2 * (r * d + d)
    for width, layers in zip(widths, depths):
        count += layers * 2 * ((width * r + r) + (r * (width - d) + (width - d)))
    return count


def trained_count(tuned):
    return sum(p.numel() for p in trained(tuned).values())


def vit_b_32():
    """A model without its weights."""
    config, _ = clip.MODELS["ViT-B/32"]
    with torch.device("meta"):
        return clip.CLIP(config)


def test_trained_parameters_and_how_they_start():
    """Also of LoRA: A and B of queries and of values. ActivityNet's adapters are the paper's 0.81 M."""
    config, _ = clip.MODELS["ViT-B/32"]
    assert size(config, 8, 16) == 519_168 and size(config, 16, 512) == 805_632
    chosen = settings(["--data", "activitynet"])
    assert trained_count(Tuned(vit_b_32(), chosen.tune, chosen.rank, chosen.share)) == 805_632
    for r in (2, 8):
        count = sum(2 * 12 * (r * width + width * r) for width in (768, 512))
        assert trained_count(Tuned(vit_b_32(), "lora", r)) == count
    for tune, r, d in (("adapter", 8, 16), ("adapter", 8, 0), ("adapter", 16, 512), ("adapter", 2, 8),
                       ("adapter-unshared", 8, 16), ("adapter-unshared", 1, 512)):
        count = size(config, r, d, tune == "adapter")
        assert trained_count(Tuned(vit_b_32(), tune, r, d)) == count, (tune, r, d)
    start = {"weight": [], "bias": []}
    for name, p in Tuned(vit_b_32()).extra.named_parameters():
        start[name.split(".")[-1]].append(p.detach().flatten())
    weights = torch.cat(start["weight"])
    assert weights.std().item() == pytest.approx(0.01, rel=0.01) and weights.mean().abs() < 1e-4
    assert 0.04 < weights.abs().max() < 0.07 and (torch.cat(start["bias"]) == 0).all()


def test_a_run_says_what_it_trains(squares, tmp_path, capsys):
    main(arguments(squares, "--out", tmp_path / "run"))
    said = capsys.readouterr()
    model = small_clip()
    count = size(model.config, 8, 16)
    total = sum(p.numel() for p in model.parameters())
    percent = f"{100 * count / total:.2f}%"
    assert f"--tune adapter: {count:,} trained parameters, {percent} of CLIP's {total:,};" in said.err
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    assert costs == {"trained_parameters": count, "share": count / total,
                     "seconds_per_step": costs["seconds_per_step"]}
    assert f"--tune adapter: {costs['seconds_per_step']:.3f} s per step" in said.err
    found = metrics(tmp_path / "run")
    assert found.keys() == {"test", "test, not tuned"}
    _, before = said.out.split("before it was tuned:")
    assert said.out.startswith(" ") and said.out.count("test model") == 2
    for name, text in (("test", said.out), ("test, not tuned", before)):
        line = next(line for line in text.splitlines() if line.startswith("test model"))
        assert [line.split()[k] for k in (7, 13)] == [f"{found[name]['model'][way]['MeanR']:.1f}"
                                                      for way in eval.WAYS]


@pytest.mark.parametrize("tune", ["adapter", "lora"])
def test_weights_depend_on_the_seed_alone(tune):
    a, b, c = [trained(Tuned(small_clip(), tune, seed=seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(a[name], b[name]) for name in a)
    matrices = [name for name in a if name.endswith(("weight", "A"))]  # biases and LoRA's B are zero
    assert not any(torch.equal(a[name], c[name]) for name in matrices)
    model = small_clip()
    before = torch.get_rng_state()
    Tuned(model, tune)
    assert torch.equal(before, torch.get_rng_state())


def test_shared_and_unshared_start_alike():
    """All matrices that both have are equal, and so is what they compute; but each W_share is its own."""
    shared, unshared = [Tuned(small_clip(), tune, 4, 5) for tune in ("adapter", "adapter-unshared")]
    a, b = trained(shared), trained(unshared)
    both = a.keys() & b.keys()
    assert {name.split(".")[1] for name in both} == {"down", "unique"}
    assert all(torch.equal(a[name], b[name]) for name in both)
    different = {tuple(a[name].flatten()[:8].tolist()) for name in a if name.endswith("weight")}
    assert len(different) == sum(name.endswith("weight") for name in a)
    runs.assert_same(features_of(shared), features_of(unshared))
    share = unshared.extra.share
    assert share["image_0_mlp"].weight is not share["text_0_mlp"].weight


def test_dropout_acts_on_the_bottleneck_in_training_alone():
    tuned = Tuned(small_clip(), "adapter", 4, 5, dropout=1.0)
    plain = Tuned(small_clip(), "adapter", 4, 5)
    key = "image_0_attn"
    biases = [tuned.extra.unique[key].bias, tuned.extra.share["0_attn"].bias]
    for i, bias in enumerate(biases):
        bias.data += 1 + i
    h = torch.randn(7, 32)
    tuned.train()
    assert torch.equal(tuned.extra(key, h), h + torch.cat(biases)) and not tuned.clip.training
    tuned.eval()
    for bias in biases:
        bias.data.zero_()
    runs.assert_same(features_of(tuned), features_of(plain))


def plain_adapted(extra, shared, encoder, i, place, h):
    """h + [z W_unique, z W_share] of one place of one layer."""
    key = f"{encoder}_{i}_{place}"
    z = h @ extra.down[key].weight.t() + extra.down[key].bias
    z = z * torch.sigmoid(1.702 * z)
    parts = []
    for layer in (extra.unique[key], extra.share[f"{i}_{place}" if shared else key]):
        parts.append(z @ layer.weight.t() + layer.bias)
    return h + torch.cat(parts, dim=-1)


def not_adapted(encoder, i, place, h):
    return h


def plain_encode(bare, image=None, ids=None, adapted=not_adapted):
    """One picture (3, S, S), or one text without padding, through a CLIP by a loop over its blocks."""
    if image is None:
        name, encoder = "text", bare
        x = bare.token_embedding.weight[ids.long()]
        x = x + bare.positional_embedding[:len(x)]
    else:
        name, encoder = "image", bare.visual
        x = F.conv2d(image[None], encoder.conv1.weight, stride=encoder.patch_size)[0].flatten(1).t()
        x = encoder.ln_pre(torch.cat([encoder.class_embedding[None], x]) + encoder.positional_embedding)
    for i, block in enumerate(encoder.transformer.resblocks):
        x = x + adapted(name, i, "attn", block.attn(block.ln_1(x)[None])[0])
        x = x + adapted(name, i, "mlp", block.mlp(block.ln_2(x)))
    if image is None:
        return bare.ln_final(x[-1]) @ bare.text_projection
    return encoder.ln_post(x[0]) @ encoder.proj


def assert_encodes(tuned, bare, **plain):
    """Images and packed texts of three lengths; with and without gradients (torch takes other paths)."""
    images = torch.randn(3, 3, 16, 16)
    tokens = tuned.tokenizer(CAPTIONS, 24)
    ends = tokens.argmax(1).tolist()
    assert len(set(ends)) == 3
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            image_features = tuned.encode_image(images)
            text_features = tuned.encode_text(tokens)
        for b in range(3):
            expected = plain_encode(bare, image=images[b], **plain)
            assert torch.allclose(image_features[b], expected, atol=1e-5)
            expected = plain_encode(bare, ids=tokens[b, :ends[b] + 1], **plain)
            assert torch.allclose(text_features[b], expected, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shared_dim", [0, 5, 32])  # 32: the whole width of images
@pytest.mark.parametrize("tune", ["adapter", "adapter-unshared"])
def test_adapters_are_the_plain_version(tune, shared_dim):
    tuned, bare = shaken(tune, 4, shared_dim)
    assert_encodes(tuned, bare, adapted=partial(plain_adapted, tuned.extra, tune == "adapter"))


def test_one_matrix_for_both_encoders():
    """Per layer and place, with gradients from both; the image encoder's third layer has its own. It gives
    the last channels."""
    tuned, _ = shaken("adapter", 4, 5)
    places = [f"{i}_{place}" for i in range(3) for place in ("attn", "mlp")]
    share = tuned.extra.share
    assert list(share) == places and all(linear.weight.shape == (5, 4) for linear in share.values())
    images = torch.randn(2, 3, 16, 16)
    tokens = tuned.tokenizer(CAPTIONS, 24)
    gradients = []
    for parts in ([tuned.encode_image(images)], [tuned.encode_text(tokens)],
                  [tuned.encode_image(images), tuned.encode_text(tokens)]):
        tuned.zero_grad()
        sum(part.sum() for part in parts).backward()
        gradients.append([linear.weight.grad for linear in share.values()])
    for i, (image, text, both) in enumerate(zip(*gradients)):
        assert image.abs().max() > 0 and (i >= 4) == (text is None)
        assert torch.allclose(both, image if text is None else image + text, atol=1e-4)
    h = torch.randn(7, 48)
    before = tuned.extra("text_1_mlp", h)
    share["1_mlp"].bias.data += 1
    last_channels = F.pad(torch.ones(7, 5), (43, 0))
    assert torch.allclose(tuned.extra("text_1_mlp", h) - before, last_channels, atol=1e-6)
    unshared = Tuned(small_clip(), "adapter-unshared").extra.share
    assert list(unshared) == [f"image_{p}" for p in places] + [f"text_{p}" for p in places[:4]]


def test_lora_is_the_merged_matrix():
    """Nothing at the start; then a CLIP whose matrices of queries and values are W + (16 / r) B A."""
    start = Tuned(small_clip(), "lora", 4)
    runs.assert_same(features_of(start), features_of(small_clip()))
    tuned, merged = shaken("lora", 4)
    assert list(tuned.extra.updates) == [*(f"image_{i}_attn" for i in range(3)), "text_0_attn", "text_1_attn"]
    blocks = [*merged.visual.transformer.resblocks, *merged.transformer.resblocks]
    for block, update in zip(blocks, tuned.extra.updates.values(), strict=True):
        width = block.attn.in_proj_weight.shape[1]
        for part, begin in ((0, 0), (1, 2 * width)):
            block.attn.in_proj_weight.data[begin:begin + width] += 4 * update.B[part] @ update.A[part]
    for a, b, c in zip(features_of(tuned), features_of(merged), features_of(start)):
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-2)


# ---------------------------------------------------------------- what is trained, and what is not

def leaves(loss):
    """Identities of the tensors that a backward pass would give a gradient."""
    found = set()
    seen = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(id(node.variable))
    return found


def own_weights(model):
    """A CLIP's state dict without what LoRA has put into it."""
    names = {name: name.replace("parametrizations.in_proj_weight.original", "in_proj_weight")
             for name in model.state_dict() if "in_proj_weight.0" not in name}
    return {plain: model.state_dict()[name] for name, plain in names.items()}


@pytest.mark.parametrize("file, tune", [
    ("clip.pt", "adapter"), ("clip.pt", "adapter-unshared"), ("clip.pt", "lora"), ("clip.pt", "full"),
    ("resnet.pt", "full")])
def test_frozen_means_frozen(file, tune, squares, tmp_path, monkeypatch):
    """After a run everything that is not trained, batch norm's statistics included, has the bits of the file
    and never had a gradient; the loss depends on exactly what is trained, and all of it has changed."""
    made = []
    plain = Tuned.__init__

    def noted(self, *a):
        made.append(self)
        plain(self, *a)
    monkeypatch.setattr(Tuned, "__init__", noted)
    backward = spied(monkeypatch, torch.Tensor, "backward")
    main(arguments(squares, "--clip", beside(squares, file), "--image-size", 16 if file == "clip.pt" else 32,
                   "--tune", tune, "--epochs", 1, "--out", tmp_path))
    model = made[0]
    before = clip.load_checkpoint(beside(squares, file))["clip"]["state_dict"]
    after = own_weights(model.clip)
    names = {name for name, _ in model.clip.named_parameters()} - {"logit_scale"} if tune == "full" else set()
    without_effect = {"visual.attnpool.k_proj.bias"}  # a softmax takes it out again
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed - without_effect == names - without_effect
    added = {name: p for name, p in model.named_parameters() if name.startswith("extra.")}
    expected = {f"clip.{name}" for name in names} | added.keys()
    assert bool(added) == (tune != "full")
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert [leaves(loss) for (loss,), _ in backward] == [with_gradient] * 3
    last = clip.load_checkpoint(tmp_path / "last.pt")
    if added:
        start = trained(Tuned(small_clip(), tune))
        assert start.keys() == added.keys()
        assert not any(torch.equal(added[name], start[name]) for name in added)
        assert last["heads"].keys() == expected and "clip" not in last
    else:
        assert last["clip"]["state_dict"].keys() == before.keys() and "heads" not in last


def test_the_recipe(squares, tmp_path, monkeypatch):
    """AdamW; only matrices are decayed; linear warm-up over a tenth of the steps, half a cosine down to zero;
    gradients of norm 1 at most."""
    groups = []
    rates = []
    norms = []
    step = torch.optim.AdamW.step

    def noted(optimizer):
        groups[:] = optimizer.param_groups
        rates.append([group["lr"] for group in groups])
        squares_of_gradients = [p.grad.square().sum().item() for group in groups for p in group["params"]]
        norms.append(math.sqrt(sum(squares_of_gradients)))
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    main(arguments(squares, "--epochs", 10, "--lr", 1, "--eval-every", 10, "--weight-decay", 0.3,
                   "--out", tmp_path))
    expected = [(i + 1) / 3 for i in range(3)] + [(1 + math.cos(math.pi * i / 27)) / 2 for i in range(27)]
    assert all(a == b for a, b in rates) and [a for a, _ in rates] == pytest.approx(expected)
    for decay, matrices, group in zip((0.3, 0), (True, False), groups, strict=True):
        assert group["weight_decay"] == decay and group["params"]
        assert all((p.ndim == 2) == matrices for p in group["params"])
    assert max(norms) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("argv, rank, share, frames, epochs, context, lr", [
    ("--data x.jsonl", 8, 16, 12, 5, 32, 1e-3),
    ("--data msrvtt", 8, 16, 12, 5, 32, 1e-3),
    ("--data msvd --tune lora", 16, 16, 12, 5, 32, 1e-3),
    ("--data didemo --tune full", 8, 8, 64, 5, 64, 1e-5),
    ("--data activitynet", 16, 512, 64, 20, 64, 1e-3),
    ("--data activitynet --rank 4 --share 0 --frames 6 --epochs 2 --context 16 --lr 1", 4, 0, 6, 2, 16, 1),
    ("", 8, 16, 12, 4, 32, 1e-2),
    ("--tune adapter-unshared --clip ViT-B/16", 8, 16, 12, 4, 32, 1e-2),
    ("--tune full", 8, 16, 12, 4, 32, 3e-4),
    ("--tune full --lr 1", 8, 16, 12, 4, 32, 1)])
def test_settings_of_data_sets(argv, rank, share, frames, epochs, context, lr):
    """The published ones; what the command line gives wins."""
    args = settings(argv.split())
    assert (args.rank, args.share, args.frames, args.epochs, args.lr) == (rank, share, frames, epochs, lr)
    assert args.context == context
    if "--clip" not in argv:
        assert args.clip == ("ViT-B/32" if "--data" in argv else eval.SMALL_CLIP)


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit):
        settings(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for rate in {rate for rates in train_adapter.RATES.values() for rate in rates}:
        assert re.search(rf"The default of --lr .*\b{rate:.0e}".replace("e-0", "e-"), said)
    assert "(default: 12 built-in shapes, 12 pretrained, 12 msvd, 64 didemo" in said  # --frames
    assert "512 activitynet)" in said  # --share
    assert said.count("32 msvd, 64 didemo, 64 activitynet)") == 1 and "positions for" not in said  # --context


def test_it_learns(squares, tmp_path):
    """From a CLIP with random weights, by its adapters alone: training squares are told apart far better than
    by chance."""
    main(arguments(squares, "--epochs", 25, "--lr", 0.03, "--eval-every", 25, "--out", tmp_path))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    evaluated(tmp_path / "last.pt", "--split", "train", "--out", tmp_path / "train")
    found = metrics(tmp_path / "train")["train"]["model"]
    assert min(found[way]["R@1"] for way in eval.WAYS) > 20  # chance: 4


# ---------------------------------------------------------------- videos and texts

def plain_similarity(texts, videos, tau=5.0):
    """texts (C, D); videos: list of (frames, D) -> (C, N), by making the video that each text sees.

    tau None: the mean of the frames."""
    rows = []
    for t in texts:
        seen = [frames.mean(0) for frames in videos]
        if tau:
            seen = [((frames @ t / tau).softmax(0)[:, None] * frames).sum(0) for frames in videos]
        rows.append(torch.stack([F.cosine_similarity(t, v, dim=0) for v in seen]))
    return torch.stack(rows)


def padded(videos, fill):
    """-> (N, V, D) with noise of this size in place of missing frames, mask."""
    most = max(map(len, videos))
    filled = [torch.cat([v, fill * torch.randn(most - len(v), v.shape[1])]) for v in videos]
    return torch.stack(filled), torch.arange(most) < torch.tensor([len(v) for v in videos])[:, None]


def test_similarity_is_the_plain_version_with_its_gradient():
    """Whatever stands in frames that are padding; and the loss over it."""
    torch.manual_seed(0)
    texts = 3 * torch.randn(4, 6)
    videos = [2 * torch.randn(n, 6) for n in (3, 1, 5, 2)]
    weight = torch.randn(4, 4)
    for tau in (5.0, 0.7, None):
        plain_texts = texts.clone().requires_grad_()
        plain_videos = [x.clone().requires_grad_() for x in videos]
        expected = plain_similarity(plain_texts, plain_videos, tau)
        (expected * weight).sum().backward()
        frames, mask = padded(videos, 30)
        frames.requires_grad_()
        asked = texts.clone().requires_grad_()
        scores = similarity(asked, frames, mask, tau or math.inf)
        (scores * weight).sum().backward()
        assert torch.allclose(scores, expected, atol=1e-5)
        assert torch.allclose(asked.grad, plain_texts.grad, atol=1e-5)
        assert (frames.grad[~mask] == 0).all()
        for n, x in enumerate(plain_videos):
            assert torch.allclose(frames.grad[n, :len(x)], x.grad, atol=1e-5)
    expected = plain_similarity(texts, videos)
    assert torch.allclose(similarity(texts, frames, mask), expected, atol=1e-5)  # tau is 5
    first = torch.stack([x[0] for x in videos])
    cosines = F.normalize(texts, dim=1) @ F.normalize(first, dim=1).t()
    one_frame = similarity(texts, first[:, None], torch.ones(4, 1, dtype=torch.bool))
    assert torch.allclose(one_frame, cosines, atol=1e-6)
    pairs = [-(20 * x[i]).log_softmax(0)[i] for x in (expected, expected.t()) for i in range(4)]
    loss = train_adapter.total_loss(texts, frames, mask, 20.0)
    assert loss.item() == pytest.approx(sum(pairs).item() / 8, rel=1e-5)
    twice = torch.tensor([0, 1, 0])  # a video that is there twice: each is the other's negative
    loss = train_adapter.total_loss(texts[:3], frames[twice], mask[twice], 20.0)
    scores = expected[:3][:, twice]
    pairs = [-(20 * x[i]).log_softmax(0)[i] for x in (scores, scores.t()) for i in range(3)]
    assert loss.item() == pytest.approx(sum(pairs).item() / 6, rel=1e-5)


def test_metrics_in_blocks_are_those_of_whole_matrices(monkeypatch):
    """Videos of one group, and some that are searched but not asked about; no block is larger than it may
    be."""
    torch.manual_seed(0)
    instances = []
    for i in range(11):
        images = ["p"] * (1 + i % 4)
        captions = ["t"] * (1 + i % 3)
        instances.append(data.Instance(str(i), images, captions, group=str(i // 2), query=i % 5 > 0))
    layout = eval.layout(instances)
    texts = torch.randn(21, 8)
    videos = [torch.randn(len(x.images), 8) for x in instances]
    frames, mask = padded(videos, 9)
    scores = plain_similarity(texts, videos)
    functions = (lambda indices: scores[indices]), (lambda indices: scores.t()[indices])
    expected = eval.retrieval_metrics(None, None, **layout, scores=functions)
    calls = spied(monkeypatch, train_adapter, "similarity")
    for block, most in ((1 << 22, 1 << 22), (2 * 21 * 4, 2 * 21 * 4), (1, 21 * 4)):  # 1: one text or video
        monkeypatch.setattr(eval, "BLOCK", block)
        calls.clear()
        found = video_metrics(frames, mask, texts, layout)
        assert found.keys() == expected.keys() and found["rSum"] == pytest.approx(expected["rSum"])
        assert all(found[way] == pytest.approx(expected[way]) for way in eval.WAYS)
        assert max(len(asked) * shown.numel() for (asked, _, shown, _), _ in calls) <= most
        assert block == 1 << 22 or len(calls) > 8


def test_memory_of_metrics():
    """MSR-VTT's size, three captions of each, at ViT-B/32's width: whole, videos as seen by texts would be 6
    GB."""
    done = runs.command("-c", """if 1:
        import torch, train_adapter
        torch.set_num_threads(1)
        def held(name):
            for line in open("/proc/self/status"):
                if line.startswith(name):
                    return int(line.split()[1]) / 2 ** 20
        frames = torch.randn(1000, 12, 512)
        texts = torch.randn(3000, 512)
        mask = torch.ones(1000, 12, dtype=torch.bool)
        video = torch.arange(1000)
        asked = torch.ones(3000, dtype=torch.bool)
        layout = dict(image_group=video, text_group=video.repeat_interleave(3), image_query=asked[:1000],
                      text_query=asked)
        before = held("VmRSS")
        metrics = train_adapter.video_metrics(frames, mask, texts, layout)
        print(held("VmHWM") - before, metrics["rSum"])""")
    assert done.returncode == 0, done.stderr
    above, total = map(float, done.stdout.split())
    assert above < 1 and 1 < total < 6  # GiB; chance


def even(count, most):
    """The numbers of the frames that are taken of `count`, by hand."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def embedded_plainly(tuned, instances, frames, context):
    """-> each video's frames (., D) and all captions (C, D), one by one."""
    prepare = clip.transform(tuned.config.image_resolution)
    videos = []
    texts = []
    with torch.no_grad():
        for x in instances:
            pictures = [prepare(Image.open(x.images[k])) for k in even(len(x.images), frames)]
            videos.append(torch.cat([tuned.encode_image(picture[None]) for picture in pictures]))
            texts += [tuned.encode_text(tuned.tokenizer([c], context, truncate=True)) for c in x.captions]
    return videos, torch.cat(texts)


def make_videos(kind, root):
    """Train / val / test of 8 / 4 / 6 videos of 1 to 10 frames, each of its own shade, as a data set has
    them."""
    names = {split: [f"{split}{i}" for i in range(n)] for split, n in (("train", 8), ("val", 4), ("test", 6))}
    if kind == "msrvtt":  # val is the last tenth of train, by a hash
        candidates = [f"video{i}" for i in range(100)]
        names["train"] = [v for v in candidates if data.hash_tenth(v) != 9][:8]
        names["val"] = [v for v in candidates if data.hash_tenth(v) == 9][:4]
    videos = names["train"] + names["val"] + names["test"]
    captions = {}
    for j, video in enumerate(videos):
        captions[video] = [f"{w} as number {j}" for w in WORDS]
        (root / "frames" / video).mkdir(parents=True)
        for k in range(1 + 3 * j % 10):
            Image.new("RGB", (16, 16), (20 * k, 13 * j, 0)).save(root / "frames" / video / f"{k:04d}.jpg")
    if kind == "msrvtt":
        sentences = [{"video_id": v, "caption": c} for v in videos for c in captions[v]]
        write(root / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
        write(root / "MSRVTT_train.9k.csv", "\n".join(["video_id", *names["train"], *names["val"], ""]))
        asked = [f"ret,{v},{captions[v][1]}" for v in names["test"]]
        write(root / "MSRVTT_JSFUSION_test.csv", "\n".join(["key,video_id,sentence", *asked, ""]))
    for split, part in names.items():
        if kind == "msvd":
            write(root / f"{split}_list.txt", "".join(f"{v}\n" for v in part))
        if kind == "didemo":
            write(root / f"{split}_list.txt", "".join(f"{v}.mp4\n" for v in part))
            described = [{"video": f"{v}.mp4", "description": c} for v in part for c in captions[v]]
            write(root / f"{split}_data.json", described)
    if kind == "msvd":
        words = {v: [c.split() for c in cs] for v, cs in captions.items()}
        (root / "raw-captions.pkl").write_bytes(pickle.dumps(words))
    return names


def video_arguments(kind, root, squares, *more):
    argv = ["--data", kind, "--root", root, "--clip", beside(squares), "--epochs", 1, "--batch-size", 4,
            "--lr", 0.01, "--frames", 4, "--workers", 0, "--device", "cpu", "--amp", "off", *more]
    return [str(x) for x in argv]


@pytest.mark.parametrize("kind, captions, context, taken, pool, tau", [
    ("msrvtt", 6, 16, 4, "--pool query", 5.0), ("msvd", 18, 16, 100, "--pool mean", None),
    ("didemo", 6, 14, 4, "--tau 0.5", 0.5)])  # 100: all, evaluated by twos
def test_videos_end_to_end(kind, captions, context, taken, pool, tau, squares, tmp_path, monkeypatch):
    """One epoch, its report and eval.py; frames are taken evenly, a paragraph is cut, and every caption of a
    video is shown once with the video's frames, and is a query."""
    names = make_videos(kind, tmp_path)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        calls = spied(patch, Tuned, "encode_image")
        compared = spied(patch, train_adapter, "similarity")
        main(video_arguments(kind, tmp_path, squares, "--context", context, "--frames", taken, "--out", out,
                             *pool.split()))
    assert {asked[3] for asked, _ in compared} == {tau or math.inf}  # in training and evaluation
    times = 1 if kind == "didemo" else len(WORDS)
    shown = []
    pictures = torch.cat([images for (_, images), _ in calls[:2 * times]])  # of all steps
    red = (pictures[:, 0, 8, 8] * clip.IMAGE_STD[0] + clip.IMAGE_MEAN[0]) * 255 / 20  # tells which frame
    for k in red.round().int().tolist():  # a video begins with its first frame
        if k == 0:
            shown.append([])
        shown[-1].append(k)
    counts = [len(os.listdir(tmp_path / "frames" / v)) for v in names["train"]]
    assert max(counts) == 10 and sorted(shown) == sorted(times * [even(n, taken) for n in counts])
    tuned, _ = eval.restore(out / "best.pt", "cpu")
    instances, _ = data.load(kind, str(tmp_path), "test")
    videos, texts = embedded_plainly(tuned, instances, taken, context)
    assert [x.id for x in instances] == names["test"] and len(texts) == captions
    scores = plain_similarity(texts, videos, tau)
    owner = torch.arange(6).repeat_interleave(captions // 6)
    ranks = text_ranks(scores, owner)
    model = metrics(out)["test"]["model"]
    for k in (1, 5):
        assert model["text_to_image"][f"R@{k}"] == pytest.approx(100 * (ranks <= k).float().mean().item())
    best_ranks = []
    for n in range(6):
        best = scores[owner == n, n].max()
        best_ranks.append(1 + (scores[owner != n, n] >= best - eval.TIE).sum().item())
    assert model["image_to_text"]["MeanR"] == pytest.approx(sum(best_ranks) / 6)
    evaluated(out / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == metrics(out)["test"]


def test_videos_without_frames(squares, tmp_path, capsys):
    names = make_videos("msvd", tmp_path)
    video = names["test"][2]
    for path in (tmp_path / "frames" / video).iterdir():
        path.unlink()
    main(video_arguments("msvd", tmp_path, squares, "--out", tmp_path / "run"))
    assert ("1 videos of split test have no frames under frames/<video>/ or no caption, and were left out: "
            f"{video}\n") in capsys.readouterr().err
    shutil.rmtree(tmp_path / "frames")
    argv = video_arguments("msvd", tmp_path, squares, "--out", tmp_path / "another")
    assert "no video of split 'train' has frames" in refused(capsys, argv, main)


# ---------------------------------------------------------------- small files, and eval.py

def test_a_checkpoint_holds_what_was_trained_alone(finished, squares):
    best = clip.load_checkpoint(finished / "best.pt")
    last = clip.load_checkpoint(finished / "last.pt")
    count = size(small_clip().config, 8, 16)
    assert best.keys() == {"format", "method", "settings", "heads", "frozen_clip", "state", "step"}
    assert best["frozen_clip"] == clip.identity(clip.load(beside(squares), "cpu")[0])
    assert sum(v.numel() for v in best["heads"].values()) == count
    names_and_settings = 400 * len(best["heads"]) + 6000
    assert os.path.getsize(finished / "best.pt") < 4 * count + names_and_settings
    assert last.keys() == best.keys() | {"optimizer"}
    assert len(last["optimizer"]["state"]) == len(best["heads"])


@pytest.mark.parametrize("name, value", [("rank", 4), ("share", 8), ("tune", "adapter-unshared"),
                                         ("tune", "lora")])
def test_weights_of_another_shape_are_refused(name, value, finished, squares):
    checkpoint = clip.load_checkpoint(finished / "best.pt")
    checkpoint["settings"][name] = value
    with pytest.raises(clip.CheckpointError, match="the checkpoint's weights are not this model's"):
        train_adapter.restore(checkpoint)


@pytest.mark.parametrize("tune", ["", "adapter --dropout 0.9 --rank 32 --lr 0.3", "full", "lora"])
def test_eval_finds_what_the_run_found(tune, finished, squares, tmp_path):
    """The small file and the CLIP give the run's metrics; the CLIP alone those of `not tuned`. Nothing drops
    out while a run evaluates."""
    out = finished
    if tune:
        out = tmp_path / "run"
        main(arguments(squares, "--tune", *tune.split(), "--epochs", 1, "--out", out))
    evaluated(out / "best.pt", "--out", tmp_path / "again")
    evaluated(out / "best.pt", "--out", tmp_path / "again", "--split", "val")
    found = metrics(out)
    assert metrics(tmp_path / "again")["test"] == found["test"]
    best = max((record["val"] for record in log(out) if "val" in record), key=lambda val: val["rSum"])
    assert metrics(tmp_path / "again")["val"]["model"] == best
    assert found["test"]["chance"]["text_to_image"]["R@1"] == 12.5
    model, _ = clip.load(beside(squares), "cpu")
    instances, _ = data.load(squares, split="test")
    videos, texts = embedded_plainly(model, instances, 2, 32)
    scores = plain_similarity(texts, videos)
    mean_rank = text_ranks(scores, eval.caption_owner(instances)).mean().item()
    before = found["test, not tuned"]["model"]
    assert before["text_to_image"]["MeanR"] == pytest.approx(mean_rank)


def test_a_clip_that_lies_elsewhere(finished, squares, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = clip.load_checkpoint(finished / "best.pt")
    checkpoint["settings"]["clip"] = str(tmp_path / "gone.pt")
    clip.save_checkpoint(tmp_path / "run" / "best.pt", checkpoint)
    argv = ["--checkpoint", tmp_path / "run" / "best.pt", "--device", "cpu", "--amp", "off"]
    assert "gone.pt" in refused(capsys, argv, eval.main)
    line = refused(capsys, [*argv, "--clip", beside(squares, "other.pt")], eval.main)
    assert f"belongs to {checkpoint['frozen_clip'][:12]}" in line
    assert f"is the CLIP {clip.identity(small_clip(1))[:12]} now" in line
    os.unlink(tmp_path / "run" / "metrics.json")
    evaluated(tmp_path / "run" / "best.pt", "--clip", beside(squares))
    assert metrics(tmp_path / "run")["test"] == metrics(finished)["test"]


def test_query_and_gallery(finished, squares, tmp_path, capsys, monkeypatch):
    tuned, _ = eval.restore(finished / "best.pt", "cpu")
    instances, _ = data.load(squares, split="test")
    captions = [c for x in instances for c in x.captions]
    evaluated(finished / "best.pt", "--query", "a red square on blue", "--top", 3)
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    images, _ = eval.embed(tuned, instances, "off")
    with torch.no_grad():
        query = tuned.encode_text(tuned.tokenizer(["a red square on blue"], 32))[0]
    assert found == [instances[i].id for i in (images @ query).argsort(descending=True)[:3]]

    drawn = spied(monkeypatch, eval, "gallery_picture")
    evaluated(finished / "best.pt", "--gallery", tmp_path / "gallery.png", "--out", tmp_path)
    (_, rows), _ = drawn[0]
    assert Image.open(tmp_path / "gallery.png").format == "PNG" and len(rows) == 12
    videos, texts = embedded_plainly(tuned, instances, 2, 32)
    scores = plain_similarity(texts, videos)
    owner = eval.caption_owner(instances)
    for query, results in rows[:6]:
        c = captions.index(query)
        best = scores[c].argsort(descending=True)[:5]
        assert [right for _, right in results] == [bool(i == owner[c]) for i in best]
    pictures = {data.pixels(x.images[0], eval.CELL).tobytes(): n for n, x in enumerate(instances)}
    for query, results in rows[6:]:
        best = scores[:, pictures[query.tobytes()]].argsort(descending=True)[:5]
        assert [text for text, _ in results] == [captions[c] for c in best]


# ---------------------------------------------------------------- the small CLIP of the built-in shapes

def test_the_default_run_adapts_the_small_clip(tmp_path, monkeypatch):
    """Two runs; the second finds the CLIP that the first has made, and so does eval.py."""
    def few(*a):
        return [(instances[::36], classes) for instances, classes in load_splits(*a)]

    def make():
        if not os.path.exists(eval.SMALL_CLIP):
            made.append(eval.SMALL_CLIP)
            clip.save_checkpoint(eval.SMALL_CLIP, {"clip": clip.describe(small_clip())})
    made = []
    load_splits = data.load_splits
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_splits", few)
    monkeypatch.setattr(eval, "small_clip", make)
    for tune in ("adapter", "full"):
        main(["--epochs", "1", "--batch-size", "4", "--frames", "2", "--workers", "0", "--device", "cpu",
              "--tune", tune, "--out", str(tmp_path / tune)])
        evaluated(tmp_path / tune / "best.pt", "--out", tmp_path / "again")
        assert metrics(tmp_path / "again")["test"] == metrics(tmp_path / tune)["test"]
    assert made == [eval.SMALL_CLIP]
    best = clip.load_checkpoint(tmp_path / "adapter" / "best.pt")
    assert best["frozen_clip"] == clip.identity(small_clip())


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, says", [
    ("--share 33", "--share 33: more than the narrower encoder's width; choose 32 or less"),
    ("--share -1", "0 or more"),
    ("--rank 0", "not a positive whole number"),
    ("--frames 0", "positive"),
    ("--tune everything", "--tune"),
    ("--dropout 1.5", "not a share from 0 to 1"),
    ("--tau 0", "not a positive number"),
    ("--clip tiny", "--clip tiny has random weights, nothing to adapt: give a pretrained CLIP"),
    ("--context 33", "--context 33: this CLIP has 32 positions for the tokens of a text; choose that or"),
    ("--clip {resnet} --tune adapter", "--tune: adapters and lora go into transformer blocks"),
    ("--clip {resnet} --tune adapter-unshared", "--tune: adapters and lora go into transformer blocks"),
    ("--clip {resnet} --tune lora", "--tune: adapters and lora go into transformer blocks")])
def test_bad_settings(more, says, squares, tmp_path, capsys):
    more = more.format(resnet=f"{beside(squares, 'resnet.pt')} --image-size 32").split()
    assert says in refused(capsys, arguments(squares, "--out", tmp_path / "run", *more), main)
    assert not (tmp_path / "run").exists()


def test_documented_commands_parse():
    runs.assert_documented_commands_parse(train_adapter)
