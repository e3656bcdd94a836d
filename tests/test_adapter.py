"""Tests of train_adapter.py: adapters, LoRA and the similarity against plain versions, what stays frozen,
then whole runs on videos.

What every script promises of a run is tested in test_runs.py.
"""
import copy
import json
import math
import os
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
from runs import COLOURS, evaluated, in_process, make_squares, metrics, refused, spy  # noqa: F401
from train_adapter import Tuned, main, settings, similarity, video_metrics

CAPTIONS = ["a red square on blue", "red", "the frame is green and the middle white, around brown"]


def small_clip(seed=0, resnet=False):
    """A very small CLIP with its own tokenizer, whose encoders differ: 3 blocks of width 32, 2 of 48."""
    texts = [f"the frame is {colour} and the middle a {colour} square on around" for colour in COLOURS]
    tokenizer = clip.Tokenizer.train(2 * texts, 600)
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


@torch.no_grad()
def features_of(model):
    """What a CLIP, tuned or not, makes of two pictures and three texts: a pair of matrices."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.encode_image(images), model.encode_text(model.tokenizer(CAPTIONS, 24))


def beside(squares, name="clip.pt"):
    return os.path.join(os.path.dirname(squares), name)


def arguments(squares, *more):
    """Three epochs of three steps of the squares' 60 captions, with clip.pt; a square has two frames."""
    return runs.arguments(squares, "--clip", beside(squares), "--frames", 2, "--lr", 0.01,
                          "--batch-size", 20, *more)


# ---------------------------------------------------------------- adapters

def test_trained_parameters_and_how_they_start():
    """Also of LoRA: A and B of queries and of values. ActivityNet's adapters are the paper's 0.81 M."""
    config, _ = clip.MODELS["ViT-B/32"]
    chosen = settings(["--data", "activitynet"])
    lora = sum(2 * 12 * (8 * width + width * 8) for width in (768, 512))
    for tuning, count in ((("adapter", chosen.rank, chosen.share), 805_632), (("adapter", 8, 16), 519_168),
                          (("lora", 8), lora)):
        with torch.device("meta"):
            model = clip.CLIP(config)
        assert sum(p.numel() for p in trained(Tuned(model, *tuning)).values()) == count, tuning
    start = {"weight": [], "bias": []}
    for name, p in Tuned(small_clip()).extra.named_parameters():
        start[name.split(".")[-1]].append(p.detach().flatten())
    weights = torch.cat(start["weight"])
    assert weights.std().item() == pytest.approx(0.01, rel=0.05) and weights.mean().abs() < 1e-3
    assert 0.03 < weights.abs().max() < 0.07 and (torch.cat(start["bias"]) == 0).all()


def test_how_adapters_start():
    """By the seed alone. Shared and unshared ones start as the same function: all matrices that both have are
    equal, and the two encoders' W_shares are equal, but not one matrix."""
    clips = [small_clip() for _ in range(3)]
    before = torch.get_rng_state()
    shared, unshared = [Tuned(clips[k], tune, 4, 5) for k, tune in enumerate(("adapter", "adapter-unshared"))]
    other = trained(Tuned(clips[2], "adapter", 4, 5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    a, b = trained(shared), trained(unshared)
    assert {name.split(".")[1] for name in a.keys() & b.keys()} == {"down", "unique"}
    assert all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())
    assert not any(torch.equal(a[name], other[name]) for name in a if name.endswith("weight"))
    runs.assert_same(features_of(shared), features_of(unshared))
    of_image, of_text = (unshared.extra.share[f"{encoder}_0_mlp"].weight for encoder in ("image", "text"))
    assert of_image is not of_text and torch.equal(of_image, of_text)
    with pytest.raises(clip.CheckpointError, match="--share 33: more than .*; choose 32 or less"):
        Tuned(small_clip(), "adapter", 4, 33)


def test_dropout_acts_on_the_bottleneck_in_training_alone():
    tuned = Tuned(small_clip(), "adapter", 4, 5, dropout=1.0)
    biases = [tuned.extra.unique["image_0_attn"].bias, tuned.extra.share["0_attn"].bias]
    for i, bias in enumerate(biases):
        bias.data += 1 + i
    h = torch.randn(7, 32)
    tuned.train()
    assert torch.equal(tuned.extra("image_0_attn", h), h + torch.cat(biases)) and not tuned.clip.training
    tuned.eval()
    assert not torch.equal(tuned.extra("image_0_attn", h), h + torch.cat(biases))


def plain_adapted(extra, shared, encoder, i, place, h):
    """h + [z W_unique, z W_share] of one place of one layer."""
    key = f"{encoder}_{i}_{place}"
    z = h @ extra.down[key].weight.t() + extra.down[key].bias
    z = z * torch.sigmoid(1.702 * z)
    parts = []
    for layer in (extra.unique[key], extra.share[f"{i}_{place}" if shared else key]):
        parts.append(z @ layer.weight.t() + layer.bias)
    return h + torch.cat(parts, dim=-1)


def plain_encode(bare, adapted, image=None, ids=None):
    """One picture (3, S, S), or one text without padding, through a CLIP by a loop over its blocks."""
    if image is None:
        name, encoder = "text", bare
        x = bare.token_embedding.weight[ids.long()]
        x = x + bare.positional_embedding[:len(x)]
    else:
        name, encoder = "image", bare.visual
        x = F.conv2d(image[None], encoder.conv1.weight, stride=encoder.conv1.stride)[0].flatten(1).t()
        x = encoder.ln_pre(torch.cat([encoder.class_embedding[None], x]) + encoder.positional_embedding)
    for i, block in enumerate(encoder.transformer.resblocks):
        x = x + adapted(name, i, "attn", block.attn(block.ln_1(x)[:, None])[:, 0])
        x = x + adapted(name, i, "mlp", block.mlp(block.ln_2(x)))
    if image is None:
        return bare.ln_final(x[-1]) @ bare.text_projection
    return encoder.ln_post(x[0]) @ encoder.proj


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tune, shared_dim", [("adapter", 0), ("adapter", 5), ("adapter", 32),
                                              ("adapter-unshared", 5)])  # 32: the whole width of images
def test_adapters_are_the_plain_version(tune, shared_dim):
    """Of images and packed texts of three lengths; with and without gradients (torch takes other paths)."""
    tuned, bare = shaken(tune, 4, shared_dim)
    adapted = partial(plain_adapted, tuned.extra, tune == "adapter")
    images = torch.randn(3, 3, 16, 16)
    tokens = tuned.tokenizer(CAPTIONS, 24)
    ends = tokens.argmax(1).tolist()
    assert len(set(ends)) == 3
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            image_features = tuned.encode_image(images)
            text_features = tuned.encode_text(tokens)
        for b in range(3):
            expected = plain_encode(bare, adapted, image=images[b])
            assert torch.allclose(image_features[b], expected, atol=1e-5)
            expected = plain_encode(bare, adapted, ids=tokens[b, :ends[b] + 1])
            assert torch.allclose(text_features[b], expected, atol=1e-5)


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

def own_weights(model):
    """A CLIP's state dict without what LoRA has put into it."""
    names = {name: name.replace("parametrizations.in_proj_weight.original", "in_proj_weight")
             for name in model.state_dict() if "in_proj_weight.0" not in name}
    return {plain: model.state_dict()[name] for name, plain in names.items()}


@pytest.mark.parametrize("file, tune", [
    ("clip.pt", "adapter"), ("clip.pt", "lora"), ("clip.pt", "full"), ("resnet.pt", "full")])
def test_frozen_means_frozen(file, tune, squares, tmp_path, monkeypatch):
    """After a run everything that is not trained, batch norm's statistics included, has the bits of the file
    and never had a gradient; all that is trained has changed, and it alone is in the checkpoint."""
    made = spy(monkeypatch, Tuned, "__init__", lambda _, model, *a: model)
    main(arguments(squares, "--clip", beside(squares, file), "--image-size", 16 if file == "clip.pt" else 32,
                   "--tune", tune, "--epochs", 1, "--out", tmp_path))
    model = made[0]
    before = clip.load_checkpoint(beside(squares, file))["clip"]["state_dict"]
    after = own_weights(model.clip)
    names = {name for name, _ in model.clip.named_parameters()} - {"logit_scale"} if tune == "full" else set()
    without_effect = {"visual.attnpool.k_proj.bias"}  # a softmax takes it out again
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys() and changed - without_effect == names - without_effect
    added = {name: p for name, p in model.named_parameters() if name.startswith("extra.")}
    expected = {f"clip.{name}" for name in names} | added.keys()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    last = clip.load_checkpoint(tmp_path / "last.pt")
    if tune == "full":
        assert not added and last["clip"]["state_dict"].keys() == before.keys() and "heads" not in last
        return
    start = trained(Tuned(small_clip(), tune))
    assert start.keys() == added.keys() == last["heads"].keys() and "clip" not in last
    assert not any(torch.equal(added[name], start[name]) for name in added)
    assert last["frozen_clip"] == clip.identity(small_clip())


def test_the_recipe(squares, tmp_path, monkeypatch):
    """AdamW; only matrices decay; warm-up over a tenth of the steps, half a cosine to 0; norm 1 at most."""
    def noted(_, optimizer):
        matrices, others = optimizer.param_groups
        assert all(p.ndim == 2 for p in matrices["params"]) and all(p.ndim < 2 for p in others["params"])
        assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0)
        gradients = [p.grad.flatten() for group in (matrices, others) for p in group["params"]]
        return matrices["lr"], others["lr"], torch.cat(gradients).norm().item()
    steps = spy(monkeypatch, torch.optim.AdamW, "step", noted)
    main(arguments(squares, "--epochs", 10, "--lr", 1, "--eval-every", 10, "--weight-decay", 0.3,
                   "--out", tmp_path))
    expected = [(i + 1) / 3 for i in range(3)] + [(1 + math.cos(math.pi * i / 27)) / 2 for i in range(27)]
    rates, same_rates, norms = zip(*steps)
    assert rates == same_rates and rates == pytest.approx(expected)
    assert max(norms) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("argv, rank, share, frames, epochs, context, lr", [
    ("--data msrvtt", 8, 16, 12, 5, 32, 1e-3),
    ("--data msvd --tune lora", 16, 16, 12, 5, 32, 1e-3),
    ("--data didemo --tune full", 8, 8, 64, 5, 64, 1e-5),
    ("--data activitynet --rank 4 --epochs 2 --lr 1", 4, 512, 64, 2, 64, 1),
    ("--tune full", 8, 16, 12, 4, 32, 3e-4)])
def test_settings_of_data_sets(argv, rank, share, frames, epochs, context, lr):
    """The published ones; what the command line gives wins."""
    args = settings(argv.split())
    assert (args.rank, args.share, args.frames, args.epochs, args.lr) == (rank, share, frames, epochs, lr)
    assert args.context == context
    assert args.clip == ("ViT-B/32" if "--data" in argv else eval.SMALL_CLIP)


# ---------------------------------------------------------------- videos and texts

def plain_similarity(texts, videos, tau=5.0):
    """texts (C, D), [(frames, D)] -> (C, N), of the video that each text sees; tau None: the mean frame."""
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
    shown = torch.tensor([0, 1, 0, 3])  # a video that is there twice: each is the other's negative
    expected = plain_similarity(texts, videos)[:, shown]
    assert torch.allclose(similarity(texts, frames[shown], mask[shown]), expected, atol=1e-5)  # tau is 5
    pairs = [-(20 * x[i]).log_softmax(0)[i] for x in (expected, expected.t()) for i in range(4)]
    loss = train_adapter.total_loss(texts, frames[shown], mask[shown], 20.0)
    assert loss.item() == pytest.approx(sum(pairs).item() / 8, rel=1e-5)


def test_metrics_in_blocks_are_those_of_whole_matrices(monkeypatch):
    """Videos of one group, and some that are searched but not asked about; no block is too large."""
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
    expected = metrics_of(plain_similarity(texts, videos), instances)
    sizes = spy(monkeypatch, train_adapter, "similarity",
                lambda _, texts, frames, mask, tau: len(texts) * mask.numel())
    for block in (2 * 21 * 4, 1):  # 1: one text or video
        monkeypatch.setattr(eval, "BLOCK", block)
        sizes.clear()
        found = video_metrics(frames, mask, texts, layout)
        assert all(found[way] == pytest.approx(expected[way]) for way in eval.WAYS)
        assert max(sizes) <= max(block, 21 * 4) and len(sizes) > 8


def metrics_of(scores, instances):
    """Those of a ready matrix of all captions with all videos."""
    whole = (lambda rows: scores[rows]), (lambda rows: scores.t()[rows])
    return eval.score_metrics(whole, **eval.layout(instances))


def embedded_plainly(tuned, instances, frames, context):
    """-> each video's frames (., D) and all captions (C, D), one by one."""
    prepare = clip.transform(tuned.config.image_resolution)
    videos = []
    texts = []
    with torch.no_grad():
        for x in instances:
            last = len(x.images) - 1
            taken = range(last + 1)
            if last >= frames:
                taken = [int(i * last / (frames - 1)) for i in range(frames)]
            pictures = [prepare(Image.open(x.images[k])) for k in taken]
            videos.append(torch.cat([tuned.encode_image(picture[None]) for picture in pictures]))
            texts += [tuned.encode_text(tuned.tokenizer([c], context, truncate=True)) for c in x.captions]
    return videos, torch.cat(texts)


@pytest.fixture(scope="module")
def films(squares):
    """The path of a .jsonl file of the squares with 1 to 9 frames each, and captions that are cut."""
    rows = [json.loads(line) for line in open(squares)]
    for i, row in enumerate(rows):
        files = [file for other in rows[i:] + rows[:i] for file in other["images"]]
        row["images"] = files[:1 + 3 * i % 9]
        row["captions"] = [" and ".join([caption] * 3) for caption in row["captions"]]
    path = beside(squares, "films.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("words, frames, tau", [
    ("--tau 0.5 --tune lora", 4, 0.5), ("--pool mean --tune full", 100, None),
    ("--tune adapter-unshared --dropout 0.9 --rank 32 --lr 0.3", 2, 5.0)])
def test_a_run_is_evaluated_by_its_similarity(words, frames, tau, films, tmp_path, monkeypatch, capsys):
    """By loops over the pictures and captions themselves: its report on test, of the tuned model and of the
    CLIP alone. eval.py repeats it. Training compares by the same tau. 100: all frames."""
    temperatures = spy(monkeypatch, train_adapter, "similarity", lambda _, *a: a[3])
    out = tmp_path / "run"
    main(arguments(films, "--epochs", 1, "--frames", frames, "--context", 14, "--out", out, *words.split()))
    assert set(temperatures) == {tau or math.inf}
    instances, _ = data.load(films, split="test")
    found = metrics(out)
    for row, model in (("test", eval.restore(out / "best.pt", "cpu")[0]), ("test, not tuned", small_clip())):
        videos, texts = embedded_plainly(model, instances, frames, 14)
        expected = metrics_of(plain_similarity(texts, videos, tau), instances)
        for way in eval.WAYS:
            assert found[row]["model"][way] == pytest.approx(expected[way])
    evaluated(out / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == found["test"]
    costs = json.loads((out / "costs.json").read_text())
    assert (f"{costs['trained_parameters']:,} trained parameters, {100 * costs['share']:.2f}% of CLIP's"
            in capsys.readouterr().err)


def test_a_clip_that_lies_elsewhere(squares, tmp_path, capsys):
    main(arguments(squares, "--epochs", 1, "--out", tmp_path / "run"))
    checkpoint = clip.load_checkpoint(tmp_path / "run" / "best.pt")
    checkpoint["settings"]["clip"] = str(tmp_path / "gone.pt")
    clip.save_checkpoint(tmp_path / "run" / "best.pt", checkpoint)
    argv = ["--checkpoint", tmp_path / "run" / "best.pt", "--device", "cpu", "--amp", "off"]
    assert "gone.pt" in refused(capsys, argv, eval.main)
    line = refused(capsys, [*argv, "--clip", beside(squares, "other.pt")], eval.main)
    assert f"belongs to {checkpoint['frozen_clip'][:12]}" in line
    assert f"is the CLIP {clip.identity(small_clip(1))[:12]} now" in line
    before = metrics(tmp_path / "run")["test"]
    evaluated(tmp_path / "run" / "best.pt", "--clip", beside(squares), "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == before


def test_the_clip_of_the_default_run_is_made_first(tmp_path, monkeypatch):
    def make():
        clip.save_checkpoint(eval.SMALL_CLIP, {"clip": clip.describe(small_clip())})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval, "small_clip", make)
    assert clip.identity(eval.load_clip(settings([]), "cpu")) == clip.identity(small_clip())
