"""Tests of train_adapter.py: adapters, prompts and the similarity against plain versions, what stays frozen, small files, then whole runs on videos.

    python -m pytest tests/test_adapter.py

What every script promises of a run is tested in test_runs.py.
"""
import copy
import json
import math
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import eval
import runs
import test_data_videos as layouts
import train_adapter
from runs import COLOURS, SMALL, assert_documented_commands_parse, in_process, kept_signals, log, make_squares, metrics, evaluated, remarks, refused  # noqa: F401
from train_adapter import Tuned, main, onto, settings, similarity, video_metrics

TUNES = ("adapter", "adapter-unshared", "full", "head", "bitfit", "prompt")
CAPTIONS = ["a red square on blue", "red", "the frame is green and the middle white, around brown"]


def small_clip(seed=0, resnet=False):
    """A very small CLIP, with a tokenizer of its own, whose encoders differ in width and depth: 3 blocks of 32, 2 blocks of 48."""
    texts = [f"the frame is {colour} and the middle a {colour} square on around" for colour in COLOURS] + list(layouts.WORDS)
    tokenizer = clip.Tokenizer.train(texts * 2, 600)
    torch.manual_seed(seed)
    model = clip.CLIP(clip.Config(24, 32, (1, 1, 1, 1), 4, None, 32, tokenizer.vocab_size, 48, 2, 2, 4) if resnet else
                      clip.Config(24, 16, 3, 32, 8, 32, tokenizer.vocab_size, 48, 3, 2, 2))
    model.tokenizer = tokenizer
    for name, p in model.named_parameters():  # no bias or norm is at its starting value
        if p.ndim == 1:
            p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


def written(path, model):
    clip.save_checkpoint(path, {"clip": clip.describe(model)})
    return path


def shaken(*tuning, seed=0, model=None):
    """A Tuned CLIP none of whose added parts is at its starting value; and a copy of the CLIP that nothing was put on."""
    model = model or small_clip()
    bare, tuned = copy.deepcopy(model), Tuned(model, *tuning)
    torch.manual_seed(seed)
    for p in tuned.extra.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return tuned.eval(), bare


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """The path of the .jsonl file; the CLIPs clip.pt, other.pt and resnet.pt lie beside it."""
    folder = tmp_path_factory.mktemp("squares")
    written(folder / "clip.pt", small_clip()), written(folder / "other.pt", small_clip(1)), written(folder / "resnet.pt", small_clip(resnet=True))
    return make_squares(folder)


def beside(squares, name="clip.pt"):
    return os.path.join(os.path.dirname(squares), name)


def arguments(squares, *more):
    """Three epochs of three steps of the squares with clip.pt; both images of a square are its frames."""
    return runs.arguments(squares, "--clip", beside(squares), "--frames", 2, "--lr", 0.01, *more)


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """A finished run with the defaults of --tune, --rank and --share; returns its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with kept_signals():
        main(arguments(squares, "--out", out, "--train-metrics"))
    return out


# ---------------------------------------------------------------- adapters

def size(c, r, d, shared=True):
    """Trained parameters, written out: in every layer, after attention and after the MLP."""
    depths = c.vision_layers, c.transformer_layers
    own = sum(layers * 2 * ((w * r + r) + (r * (w - d) + (w - d))) for w, layers in zip((c.vision_width, c.transformer_width), depths))
    return own + (max(depths) if shared else sum(depths)) * 2 * (r * d + d)


def test_trained_parameters_and_how_they_start():
    c = clip.MODELS["ViT-B/32"][0]
    assert size(c, 8, 16) == 519_168
    with torch.device("meta"):  # a model without its weights
        model = clip.CLIP(c)
    for tune, r, d in (("adapter", 8, 16), ("adapter", 8, 0), ("adapter", 16, 512), ("adapter", 2, 8), ("adapter-unshared", 8, 16), ("adapter-unshared", 1, 512)):
        tuned = Tuned(model, tune, r, d)
        assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == size(c, r, d, tune == "adapter"), (tune, r, d)
        tuned.detach()
    drawn = dict(Tuned(model).extra.named_parameters())
    weights, biases = (torch.cat([p.detach().flatten() for name, p in drawn.items() if name.endswith(kind)]) for kind in ("weight", "bias"))
    assert weights.std().item() == pytest.approx(0.01, rel=0.01) and weights.mean().abs() < 1e-4 and 0.04 < weights.abs().max() < 0.07 and (biases == 0).all()


def test_a_run_says_what_it_trains(squares, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    main(arguments(squares, "--out", tmp_path / "run", "--train-metrics", "--resume"))  # nothing left but the report
    model, said = small_clip(), capsys.readouterr()
    count, total = size(model.config, 8, 16), sum(p.numel() for p in model.parameters())
    assert f"--tune adapter: {count:,} trained parameters, {100 * count / total:.2f}% of CLIP's {total:,};" in said.err
    assert f"--tune adapter: {count:,} trained parameters ({100 * count / total:.2f}%)" in said.out and "not tuned" in said.out
    costs = json.loads((whole / "costs.json").read_text())
    assert costs["trained_parameters"] == count and costs["share"] == count / total and costs["seconds_per_step"] > 0
    assert [r.keys() for r in log(whole)] == [{"step", "epoch", "loss", "val", "train"}] * 3


def test_weights_depend_on_the_seed_alone():
    models, before = [small_clip() for _ in range(3)], torch.get_rng_state()
    (a, b, c), after = [Tuned(model, seed=seed).trained() for model, seed in zip(models, (0, 0, 1))], torch.get_rng_state()
    assert torch.equal(before, after) and all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if name.endswith("weight"))


def plain_adapted(extra, shared, side, i, place, h):
    """h + [z W_unique, z W_share] of one place of one layer."""
    down, key = extra.down[f"{side}_{i}_{place}"], f"{side}_{i}_{place}"
    z = h @ down.weight.t() + down.bias
    z = z * torch.sigmoid(1.702 * z)
    parts = []
    if key in extra.unique:
        parts.append(z @ extra.unique[key].weight.t() + extra.unique[key].bias)
    name = f"{i}_{place}" if shared else key
    if name in extra.share:
        parts.append(z @ extra.share[name].weight.t() + extra.share[name].bias)
    return h + torch.cat(parts, dim=-1)


def plain_encode(bare, image=None, ids=None, adapted=lambda side, i, place, h: h, prompts=None):
    """One picture (3, S, S), or one text without padding, through a CLIP by a loop over its blocks."""
    side, encoder = ("text", bare) if image is None else ("image", bare.visual)
    if image is None:
        x = bare.token_embedding.weight[ids.long()]
        if prompts is not None:
            x = torch.cat([x[:1], prompts.text, x[1:]])
        x = x + bare.positional_embedding[:len(x)]
    else:
        x = F.conv2d(image[None], encoder.conv1.weight, stride=encoder.patch_size)[0].flatten(1).t()
        x = encoder.ln_pre(torch.cat([encoder.class_embedding[None], x]) + encoder.positional_embedding)
        if prompts is not None:
            x = torch.cat([x, prompts.image])
    for i, block in enumerate(encoder.transformer.resblocks):
        x = x + adapted(side, i, "attn", block.attn(block.ln_1(x)[None])[0])
        x = x + adapted(side, i, "mlp", block.mlp(block.ln_2(x)))
    return bare.ln_final(x[-1]) @ bare.text_projection if image is None else encoder.ln_post(x[0]) @ encoder.proj


def assert_encodes(tuned, bare, **plain):
    """Images and packed texts of three lengths; with and without gradients (torch takes other paths)."""
    images, tokens = torch.randn(3, 3, 16, 16), tuned.tokenizer(CAPTIONS, 24)
    ends = tokens.argmax(1).tolist()
    assert len(set(ends)) == 3
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, texts = tuned.encode_image(images), tuned.encode_text(tokens)
        for b in range(3):
            assert torch.allclose(found[b], plain_encode(bare, image=images[b], **plain), atol=1e-5)
            assert torch.allclose(texts[b], plain_encode(bare, ids=tokens[b, :ends[b] + 1], **plain), atol=1e-5)


@pytest.mark.parametrize("share", [0, 5, 32])  # 32: the whole width of images
@pytest.mark.parametrize("tune", ["adapter", "adapter-unshared"])
def test_adapters_are_the_plain_version(tune, share):
    tuned, bare = shaken(tune, 4, share)
    assert_encodes(tuned, bare, adapted=lambda *a: plain_adapted(tuned.extra, tune == "adapter", *a))


def test_one_matrix_for_both_encoders():
    """Per layer and place, with gradients from both; the image encoder's third layer has its own. It gives the last channels."""
    tuned, _ = shaken("adapter", 4, 5)
    places = [f"{i}_{place}" for i in range(3) for place in ("attn", "mlp")]
    assert list(tuned.extra.share) == places and all(m.weight.shape == (5, 4) for m in tuned.extra.share.values())
    images, tokens, found = torch.randn(2, 3, 16, 16), tuned.tokenizer(CAPTIONS, 24), []
    for sides in ((True, False), (False, True), (True, True)):
        tuned.zero_grad()
        sum(encode(x).sum() for encode, x, on in zip((tuned.encode_image, tuned.encode_text), (images, tokens), sides) if on).backward()
        found.append([m.weight.grad for m in tuned.extra.share.values()])
    for i, (image, text, both) in enumerate(zip(*found)):
        assert image.abs().max() > 0 and (i >= 4) == (text is None)
        assert torch.allclose(both, image + (0 if text is None else text), atol=1e-4)
    h = torch.randn(7, 48)
    before = tuned.extra("text_1_mlp", h)
    tuned.extra.share["1_mlp"].bias.data += 1
    assert torch.allclose(tuned.extra("text_1_mlp", h) - before, F.pad(torch.ones(7, 5), (43, 0)), atol=1e-6)
    assert list(Tuned(small_clip(), "adapter-unshared").extra.share) == [f"image_{p}" for p in places] + [f"text_{p}" for p in places[:4]]


# ---------------------------------------------------------------- prompts

def test_prompts_are_the_plain_version():
    tuned, bare = shaken("prompt", 8, 16, 3)
    assert_encodes(tuned, bare, prompts=tuned.extra)
    tokens = tuned.extra.extend(tuned.tokenizer(CAPTIONS, 24))
    assert tokens.shape == (3, 27) and (tokens[:, :4] == tokens[0, 0]).all()
    assert tuned.config.context_length == 29 and tuned.clip.context_length == 32  # what is left for words
    with torch.no_grad():  # a start symbol of the caption's own is no prompt
        strange = tuned.tokenizer(["red <|startoftext|> square", "blue"], 24)
        assert torch.allclose(tuned.encode_text(strange), torch.cat([tuned.encode_text(strange[i:i + 1]) for i in range(2)]), atol=1e-5)


def test_one_at_a_time():
    model = small_clip()
    for tune in ("adapter", "prompt", "full"):
        tuned = Tuned(model, tune)
        with pytest.raises(clip.CheckpointError, match="detach.. them first"):
            Tuned(model, "adapter")
        tuned.detach()
    with pytest.raises(clip.CheckpointError, match="was trained itself"):
        Tuned(model, "adapter")


@pytest.mark.parametrize("tune", ["adapter", "prompt"])
def test_what_was_put_in_is_taken_out_again(tune):
    model, images = small_clip(), torch.randn(2, 3, 16, 16)
    tokens = model.tokenizer(CAPTIONS, 24)
    with torch.no_grad():
        before = model.encode_image(images), model.encode_text(tokens)
        tuned, _ = shaken(tune, model=model)
        inside = tuned.encode_image(images), tuned.encode_text(tokens)
        tuned.detach()
        after = model.encode_image(images), model.encode_text(tokens)
    assert all(torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2) for a, b, c in zip(before, after, inside))


# ---------------------------------------------------------------- what is trained, and what is not

def trained_names(tune, model):
    """Of a CLIP, by --tune; adapters and prompts leave it as it is."""
    names = set(dict(model.named_parameters()))
    return {"full": names - {"logit_scale"}, "bitfit": {n for n in names if n.endswith("bias")},
            "head": {n for n in names if n in ("visual.proj", "text_projection") or ".c_proj." in n and "attnpool" in n}}.get(tune, set())


def leaves(loss):
    """Identities of the tensors that a backward pass would give a gradient."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(id(node.variable))
    return found


@pytest.mark.parametrize("file, tune", [*(("clip.pt", tune) for tune in TUNES), *(("resnet.pt", tune) for tune in ("full", "head", "bitfit"))])
def test_frozen_means_frozen(file, tune, squares, tmp_path, monkeypatch):
    """After a run everything that is not trained, batch norm's statistics included, has the bits of the file and never had a gradient; the
    loss depends on exactly what is trained, and all of it has changed."""
    made, graphs, backward = [], [], torch.Tensor.backward
    monkeypatch.setattr(train_adapter, "Tuned", lambda *a: made.append(Tuned(*a)) or made[-1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (graphs.append(leaves(loss)), backward(loss))[1])
    main(arguments(squares, "--clip", beside(squares, file), "--image-size", 16 if file == "clip.pt" else 32, "--tune", tune, "--epochs", 1, "--out", tmp_path))
    model, before = made[0], clip.load_checkpoint(beside(squares, file))["clip"]["state_dict"]
    names, after = trained_names(tune, model.clip), model.clip.state_dict()
    assert after.keys() == before.keys() and {n for n in after if not torch.equal(after[n], before[n])} - {"visual.attnpool.k_proj.bias"} == \
        names - {"visual.attnpool.k_proj.bias"}  # which a softmax takes out again
    own = {n: p for n, p in model.named_parameters() if n.startswith("extra.")}
    assert bool(own) == (not names) and {n for n, p in model.named_parameters() if p.grad is not None} == {f"clip.{n}" for n in names} | own.keys()
    assert graphs == [{id(p) for p in model.parameters() if p.grad is not None}] * 3
    if own:
        start = Tuned(small_clip(), tune).trained()
        assert start.keys() == own.keys() and not any(torch.equal(own[n], start[n]) for n in own)
    assert clip.load_checkpoint(tmp_path / "last.pt")["trained"].keys() == {f"clip.{n}" for n in names} | own.keys()


def test_the_recipe(squares, tmp_path, monkeypatch):
    """AdamW; only matrices are decayed; linear warm-up over a tenth of the steps, half a cosine down to zero; gradients of norm 1 at most."""
    made, rates, norms, step = [], [], [], torch.optim.AdamW.step

    def noted(optimizer):
        made.append(optimizer)
        rates.append({group["lr"] for group in optimizer.param_groups})
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for group in optimizer.param_groups for p in group["params"])))
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    main(arguments(squares, "--epochs", 10, "--lr", 1, "--eval-every", 10, "--weight-decay", 0.3, "--out", tmp_path))
    expected = [(i + 1) / 3 if i < 3 else (1 + math.cos(math.pi * (i - 3) / 27)) / 2 for i in range(30)]
    assert all(len(rate) == 1 for rate in rates) and [rate.pop() for rate in rates] == pytest.approx(expected)
    for decay, matrices, group in zip((0.3, 0), (True, False), made[0].param_groups, strict=True):
        assert group["weight_decay"] == decay and group["params"] and all((p.ndim == 2) == matrices for p in group["params"])
    assert max(norms) == pytest.approx(1, abs=1e-4)
    for argv, more in (([], train_adapter.SCRATCH), (["--data", "x.jsonl", "--clip", "ViT-B/32"], train_adapter.PRETRAINED), (["--lr", "0.5"], {"lr": 0.5})):
        assert vars(settings(argv)).items() >= more.items()


def test_it_learns(squares, tmp_path):
    """From a CLIP with random weights, by its adapters alone: training squares are told apart far better than by chance."""
    main(arguments(squares, "--epochs", 25, "--lr", 0.03, "--eval-every", 25, "--train-metrics", "--out", tmp_path))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"] and min(lines[-1]["train"][way]["R@1"] for way in ("text_to_image", "image_to_text")) > 40  # chance: 12.5


# ---------------------------------------------------------------- videos and texts

def plain_similarity(texts, videos, tau=5.0):
    """texts (C, D); videos: list of (frames, D) -> (C, N), by making the video that each text sees."""
    rows = []
    for t in texts:
        seen = [((frames @ t / tau).softmax(0)[:, None] * frames).sum(0) for frames in videos]
        rows.append(torch.stack([F.cosine_similarity(t, v, dim=0) for v in seen]))
    return torch.stack(rows)


def padded(videos, fill):
    """-> (N, V, D), mask."""
    most = max(map(len, videos))
    frames = torch.stack([torch.cat([v, fill * torch.randn(most - len(v), v.shape[1])]) for v in videos])
    return frames, torch.arange(most) < torch.tensor([len(v) for v in videos])[:, None]


def test_similarity_is_the_plain_version_with_its_gradient():
    """Whatever stands in frames that are padding; and the loss over it."""
    torch.manual_seed(0)
    texts, videos = 3 * torch.randn(4, 6), [2 * torch.randn(n, 6) for n in (3, 1, 5, 2)]
    weight = torch.randn(4, 4)
    for tau in (5.0, 0.7):
        t, v = texts.clone().requires_grad_(), [x.clone().requires_grad_() for x in videos]
        expected = plain_similarity(t, v, tau)
        (expected * weight).sum().backward()
        frames, mask = padded(videos, 30)
        own, frames = texts.clone().requires_grad_(), frames.requires_grad_()
        found = similarity(own, frames, mask, tau)
        (found * weight).sum().backward()
        assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(own.grad, t.grad, atol=1e-5)
        assert all(torch.allclose(frames.grad[n, :len(x)], x.grad, atol=1e-5) for n, x in enumerate(v)) and (frames.grad[~mask] == 0).all()
    assert torch.allclose(similarity(texts, frames, mask), plain_similarity(texts, videos), atol=1e-5)  # tau is 5
    one = torch.stack([x[0] for x in videos])
    cosines = F.normalize(texts, dim=1) @ F.normalize(one, dim=1).t()
    assert torch.allclose(similarity(texts, one[:, None], torch.ones(4, 1, dtype=torch.bool)), cosines, atol=1e-6)
    s = plain_similarity(texts, videos)
    pairs = [-(20 * x[i]).log_softmax(0)[i] for x in (s, s.t()) for i in range(4)]
    assert train_adapter.total_loss(texts, frames, mask, 20.0).item() == pytest.approx(sum(pairs).item() / 8, rel=1e-5)


def test_metrics_in_blocks_are_those_of_whole_matrices(monkeypatch):
    """Videos of one group, and some that are searched but not asked about; no block is larger than it may be."""
    torch.manual_seed(0)
    instances = [data.Instance(str(i), ["p"] * (1 + i % 4), ["t"] * (1 + i % 3), group=str(i // 2), query=i % 5 > 0) for i in range(11)]
    at, texts = eval.layout(instances), torch.randn(21, 8)
    videos = [torch.randn(len(x.images), 8) for x in instances]
    frames, mask = padded(videos, 9)
    whole = plain_similarity(texts, videos)
    expected = {"text_to_image": eval.ranking_metrics(whole[at["text_query"]], at["text_group"][at["text_query"]], at["image_group"]),
                "image_to_text": eval.ranking_metrics(whole.t()[at["image_query"]], at["image_group"][at["image_query"]], at["text_group"])}
    sizes, plain = [], train_adapter.similarity
    monkeypatch.setattr(train_adapter, "similarity", lambda t, f, m: sizes.append(len(t) * m.numel()) or plain(t, f, m))
    for block, most in ((1 << 22, 1 << 22), (2 * 21 * 4, 2 * 21 * 4), (1, 21 * 4)):  # at least one text, or one video
        monkeypatch.setattr(eval, "BLOCK", block)
        found = video_metrics(frames, mask, texts, at)
        assert found.pop("rSum") == pytest.approx(sum(expected[way][f"R@{k}"] for way in expected for k in (1, 5, 10)))
        assert found.keys() == expected.keys() and all(found[way] == pytest.approx(expected[way]) for way in found) and max(sizes) <= most
        assert block == 1 << 22 or len(sizes) > 8
        sizes.clear()


def test_memory_of_metrics():
    """MSR-VTT's size and ten times its captions, at ViT-B/32's width: whole, texts x videos x frames would be 0.5 GB, videos as seen by texts 20 GB."""
    done = runs.command("-c", """if 1:
        import torch, eval, train_adapter
        torch.set_num_threads(1)
        held = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2 ** 20
        frames, texts, mask = torch.randn(1000, 12, 512), torch.randn(10_000, 512), torch.ones(1000, 12, dtype=torch.bool)
        video, all_ = torch.arange(1000), slice(None)
        at = dict(image_group=video, text_group=video.repeat_interleave(10), image_query=video >= 0, text_query=torch.ones(10_000, dtype=torch.bool))
        before = held("VmRSS")
        found = train_adapter.video_metrics(frames, mask, texts, at)
        print(held("VmHWM") - before, found["rSum"])""")
    assert done.returncode == 0, done.stderr
    above, total = map(float, done.stdout.split())
    assert above < 1 and 1 < total < 6  # GiB; chance


def rows_of(tuned, instances, frames, context):
    """-> each video's frames (., D) and all captions (C, D), one by one, evenly taken by hand."""
    prepare = clip.transform(tuned.config.image_resolution)
    taken = [[x.images[round(k)] for k in ([i * (len(x.images) - 1) / (frames - 1) for i in range(frames)] if len(x.images) > frames else range(len(x.images)))]
             for x in instances]
    with torch.no_grad():
        videos = [torch.cat([tuned.encode_image(prepare(Image.open(path))[None]) for path in paths]) for paths in taken]
        texts = torch.cat([tuned.encode_text(tuned.tokenizer([c], context, truncate=True)) for x in instances for c in x.captions])
    return videos, texts


def make_videos(kind, root):
    """Train / val / test of 8 / 4 / 6 videos of 1 to 10 frames, each of its own shade, in a data set's layout."""
    names = {"train": [f"train{i}" for i in range(8)], "val": [f"val{i}" for i in range(4)], "test": [f"test{i}" for i in range(6)]}
    if kind == "msrvtt":  # val is the last tenth of train, by a hash
        every = [f"video{i}" for i in range(100)]
        names["train"], names["val"] = ([v for v in every if (data.hash_tenth(v) == 9) == last][:n] for last, n in ((False, 8), (True, 4)))
    for j, video in enumerate(v for part in names.values() for v in part):
        layouts.frames(root, video, 1 + 3 * j % 10)
        for k in range(1 + 3 * j % 10):
            Image.new("RGB", (16, 16), (20 * k, 13 * j, 0)).save(root / "frames" / video / f"{k:04d}.jpg")
    captions = {v: [f"{w} as number {j}" for w in layouts.WORDS] for j, v in enumerate(v for part in names.values() for v in part)}
    if kind == "msrvtt":
        layouts.write(root / "MSRVTT_data.json", {"videos": [], "sentences": [{"video_id": v, "caption": c} for v, cs in captions.items() for c in cs]})
        layouts.write(root / "MSRVTT_train.9k.csv", "video_id\n" + "\n".join(names["train"] + names["val"]) + "\n")
        layouts.write(root / "MSRVTT_JSFUSION_test.csv", "key,video_id,sentence\n" + "".join(f"ret,{v},{captions[v][1]}\n" for v in names["test"]))
    for split, part in names.items() if kind != "msrvtt" else ():
        layouts.write(root / f"{split}_list.txt", "".join(f"{v}{'.mp4' if kind == 'didemo' else ''}\n" for v in part))
        if kind == "didemo":
            layouts.write(root / f"{split}_data.json", [{"video": f"{v}.mp4", "description": c} for v in part for c in captions[v]])
    if kind == "msvd":
        (root / "raw-captions.pkl").write_bytes(pickle.dumps({v: [c.split() for c in cs] for v, cs in captions.items()}))
    return names


def video_arguments(kind, root, squares, *more):
    return ["--data", kind, "--root", root, "--clip", beside(squares), "--epochs", 1, "--batch-size", 4, "--lr", 0.01, "--frames", 4, "--workers", 0,
            "--device", "cpu", "--amp", "off", "--out", root / "run", *more]


@pytest.mark.parametrize("kind, captions, context, taken", [("msrvtt", 6, 16, 4), ("msvd", 18, 16, 100), ("didemo", 6, 14, 4)])  # 100: all, evaluated by twos
def test_videos_end_to_end(kind, captions, context, taken, squares, tmp_path, monkeypatch):
    """One epoch, its report and eval.py; frames are taken evenly, a paragraph is cut, and every caption of a video is a query."""
    names, seen, plain = make_videos(kind, tmp_path), [], Tuned.encode_image

    def noted(tuned, images):  # which frames, by their red
        red = ((images[:, 0, 8, 8] * clip.IMAGE_STD[0] + clip.IMAGE_MEAN[0]) * 255 / 20).round().int().tolist()
        seen.append(red)
        return plain(tuned, images)
    with monkeypatch.context() as patch:
        patch.setattr(Tuned, "encode_image", noted)
        main([str(x) for x in video_arguments(kind, tmp_path, squares, "--context", context, "--frames", taken)])
    counts = [len(os.listdir(tmp_path / "frames" / v)) for v in names["train"]]
    even = {n: list(range(n)) if n <= taken else [round(i * (n - 1) / 3) for i in range(4)] for n in counts}
    shown = []
    for k in seen[0] + seen[1]:  # two steps; a video begins with its first frame
        shown += [[]] if k == 0 else []
        shown[-1].append(k)
    assert sorted(shown) == sorted(even[n] for n in counts) and max(counts) == 10  # every training video once
    tuned, _, checkpoint = eval.restore(tmp_path / "run" / "best.pt", "cpu")
    instances, _ = data.load(kind, str(tmp_path), "test")
    videos, texts = rows_of(tuned, instances, taken, context)
    assert [x.id for x in instances] == names["test"] and len(texts) == captions
    scores = plain_similarity(texts, videos)
    own = torch.arange(6).repeat_interleave(captions // 6)
    rank = 1 + torch.stack([(scores[c] >= scores[c, own[c]] - eval.TIE).sum() - 1 for c in range(captions)])
    found = metrics(tmp_path / "run")["test"]["model"]
    for k in (1, 5):
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(100 * (rank <= k).float().mean().item())
    best = torch.stack([scores[own == n, n].max() for n in range(6)])
    beaten = torch.stack([1 + (scores[own != n, n] >= best[n] - eval.TIE).sum() for n in range(6)])
    assert found["image_to_text"]["MeanR"] == pytest.approx(beaten.float().mean().item())
    evaluated(tmp_path / "run" / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == metrics(tmp_path / "run")["test"]


def test_videos_without_frames(squares, tmp_path, capsys):
    names = make_videos("msvd", tmp_path)
    for path in (tmp_path / "frames" / names["test"][2]).iterdir():
        path.unlink()
    argv = [str(x) for x in video_arguments("msvd", tmp_path, squares)]
    main(argv)
    assert f"1 videos of split test have no frames under frames/<video>/ or no caption, and were left out: {names['test'][2]}\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "frames")
    assert "no video of split 'train' has frames" in refused(capsys, [*argv[:-1], tmp_path / "another"], main)


# ---------------------------------------------------------------- small files, and eval.py

def test_a_checkpoint_holds_what_was_trained_alone(whole, squares):
    best, count = clip.load_checkpoint(whole / "best.pt"), size(small_clip().config, 8, 16)
    assert best.keys() == {"format", "method", "settings", "trained", "clip_identity", "state", "step"}
    assert best["clip_identity"] == clip.identity(clip.load(beside(squares), "cpu")[0])
    assert sum(v.numel() for v in best["trained"].values()) == count and all(name.startswith("extra.") for name in best["trained"])
    assert os.path.getsize(whole / "best.pt") < 4 * count + 400 * len(best["trained"]) + 6000  # names, settings
    last = clip.load_checkpoint(whole / "last.pt")
    assert last.keys() == best.keys() | {"optimizer"} and len(last["optimizer"]["state"]) == len(best["trained"])


def test_several_on_one_clip_in_memory(whole, squares, tmp_path):
    """Each gives what it gives alone; another CLIP, another shape and another --tune are refused."""
    main(arguments(squares, "--tune", "prompt", "--prompts", 2, "--epochs", 1, "--out", tmp_path))
    files, images, outputs = [whole / "best.pt", tmp_path / "best.pt"], torch.randn(2, 3, 16, 16), {}
    model, _ = clip.load(beside(squares), "cpu")
    tokens = model.tokenizer(CAPTIONS, 24)
    with torch.no_grad():
        untouched = model.encode_image(images), model.encode_text(tokens)
        for path in [*files, files[0]]:
            tuned = onto(model, clip.load_checkpoint(path))
            found = tuned.encode_image(images), tuned.encode_text(tokens)
            alone, _, _ = eval.restore(path, "cpu")
            assert all(torch.equal(a, b) for a, b in zip(found, (alone.encode_image(images), alone.encode_text(tokens))))
            assert not any(torch.equal(a, b) for a, b in zip(found, untouched))
            outputs[path] = found[0]
            tuned.detach()
        assert torch.equal(untouched[0], model.encode_image(images)) and torch.equal(untouched[1], model.encode_text(tokens))
    assert not torch.allclose(outputs[files[0]], outputs[files[1]], atol=1e-3)
    checkpoint, other = clip.load_checkpoint(files[0]), clip.load(beside(squares, "other.pt"), "cpu")[0]
    with pytest.raises(clip.CheckpointError, match=f"{checkpoint['clip_identity'][:12]}.* is {clip.identity(other)[:12]}"):
        onto(other, checkpoint)
    for name, value in (("rank", 4), ("share", 8), ("tune", "adapter-unshared"), ("tune", "head")):
        with pytest.raises(clip.CheckpointError, match="were --tune, --rank or --share others"):
            onto(model, checkpoint | {"settings": checkpoint["settings"] | {name: value}})


@pytest.mark.parametrize("tune", ["adapter", "full", "prompt"])
def test_eval_finds_what_the_run_found(tune, whole, squares, tmp_path):
    """The small file and the CLIP give the run's metrics; the CLIP alone those of `not tuned`."""
    out = whole if tune == "adapter" else tmp_path / "run"
    if tune != "adapter":
        main(arguments(squares, "--tune", tune, "--epochs", 1, "--out", out))
    evaluated(out / "best.pt", "--out", tmp_path / "again")
    found = metrics(out)
    assert metrics(tmp_path / "again")["test"] == found["test"] and found["test"]["chance"]["text_to_image"]["R@1"] == 12.5
    model, _ = clip.load(beside(squares), "cpu")
    instances, _ = data.load(squares, split="test")
    videos, texts = rows_of(model, instances, 2, 32)
    at, scores = eval.layout(instances), plain_similarity(texts, videos)
    rank = 1 + (scores >= scores.gather(1, at["text_group"][:, None]) - eval.TIE).sum(1) - 1
    assert found["test, not tuned"]["model"]["text_to_image"]["MeanR"] == pytest.approx(rank.float().mean().item())


def test_a_clip_that_lies_elsewhere(whole, squares, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    checkpoint = clip.load_checkpoint(whole / "best.pt")
    checkpoint["settings"]["clip"] = str(tmp_path / "gone.pt")
    clip.save_checkpoint(tmp_path / "run" / "best.pt", checkpoint)
    argv = ["--checkpoint", tmp_path / "run" / "best.pt", "--device", "cpu", "--amp", "off"]
    assert "gone.pt" in refused(capsys, argv, eval.main)
    line = refused(capsys, [*argv, "--clip", beside(squares, "other.pt")], eval.main)
    assert checkpoint["clip_identity"][:12] in line and clip.identity(small_clip(1))[:12] in line
    os.unlink(tmp_path / "run" / "metrics.json")
    evaluated(tmp_path / "run" / "best.pt", "--clip", beside(squares))
    assert metrics(tmp_path / "run")["test"] == metrics(whole)["test"]


def test_query_and_gallery(whole, squares, tmp_path, capsys, monkeypatch):
    tuned, _, _ = eval.restore(whole / "best.pt", "cpu")
    instances, _ = data.load(squares, split="test")
    evaluated(whole / "best.pt", "--query", "a red square on blue", "--top", 3)
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    images, _ = eval.embed(tuned, instances, tuned.tokenizer, "off")
    with torch.no_grad():
        query = tuned.encode_text(tuned.tokenizer(["a red square on blue"], 32))[0]
    assert found == [instances[i].id for i in (images @ query).argsort(descending=True)[:3]]
    rows, plain = [], eval.gallery_picture
    monkeypatch.setattr(eval, "gallery_picture", lambda path, found: (rows.extend(found), plain(path, found)))
    evaluated(whole / "best.pt", "--gallery", tmp_path / "gallery.png", "--out", tmp_path)
    assert Image.open(tmp_path / "gallery.png").format == "PNG" and len(rows) == 12
    videos, texts = rows_of(tuned, instances, 2, 32)
    scores, owner, captions = plain_similarity(texts, videos), eval.caption_owner(instances), [c for x in instances for c in x.captions]
    for query, results in rows[:6]:
        c = captions.index(query)
        assert [right for _, right in results] == [bool(i == owner[c]) for i in scores[c].argsort(descending=True)[:5]]
    pictures = {data.pixels(x.images[0], eval.CELL).tobytes(): n for n, x in enumerate(instances)}
    for query, results in rows[6:]:
        n = pictures[query.tobytes()]
        assert [text for text, _ in results] == [captions[c] for c in scores[:, n].argsort(descending=True)[:5]]


# ---------------------------------------------------------------- a CLIP that is pretrained here

def test_a_clip_pretrained_here(tmp_path, monkeypatch, capsys):
    """Once, on the source part; eval.py and a second run find it; the adapters belong to it."""
    plain, trained = data.load, []
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)
    monkeypatch.setattr(data, "load", lambda name, *a, **k: (plain(name, *a, **k)[0][::{"primitives-source": 22, "primitives-target": 36}[name]], {}))
    pretrain = train_adapter.pretrain
    monkeypatch.setattr(train_adapter, "pretrain", lambda args, path, *a: (trained.append(path), pretrain(args, path, *a))[1])
    argv = ["--clip", "tiny", "--pretrain-epochs", "2", "--epochs", "1", "--batch-size", "4", "--frames", "2", "--image-size", "16", "--vocab-size", "600",
            "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    main(argv)
    path = train_adapter.clip_of(vars(settings(argv)), str(tmp_path / "run"))
    model, said = clip.load(path, "cpu")[0], capsys.readouterr()
    assert trained == [path] and "tiny starts from scratch" in said.err and "2 steps" in said.err and "11 instances" in said.err
    assert (model.config.vision_width, model.config.image_resolution) == (32, 16) and model.tokenizer.vocab_size <= 600
    assert clip.load_checkpoint(tmp_path / "run" / "best.pt")["clip_identity"] == clip.identity(model)
    evaluated(tmp_path / "run" / "best.pt", "--out", tmp_path / "again")
    assert metrics(tmp_path / "again")["test"] == metrics(tmp_path / "run")["test"]
    main([*argv[:-1], str(tmp_path / "second"), "--tune", "head"])
    assert trained == [path] and clip.load_checkpoint(tmp_path / "second" / "best.pt")["clip_identity"] == clip.identity(model)


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, says", [
    (("--share", 33), "--share 33 is more than an encoder's width (images 32, texts 48); choose 32 or less"), (("--share", -1), "0 or more"),
    (("--rank", 0), "not a positive whole number"), (("--context", 33), "--context 33: this CLIP has 32 positions for a text; choose 32 or less"),
    (("--tune", "prompt", "--prompts", 30), "--prompts 30: this CLIP has 32 positions for a text; choose 29 or less"),
    (("--tune", "prompt", "--prompts", 8, "--context", 25), "this CLIP has 24 positions for a text beside 8 prompts; choose 24 or less"),
    (("--frames", 0), "positive"), (("--tune", "lora"), "--tune"), (("--clip", "tiny"), "--clip tiny has nothing to adapt"),
    *((("--clip", "resnet.pt", "--image-size", 32, "--tune", tune), f"--tune {tune} goes into transformer blocks")
      for tune in ("adapter", "adapter-unshared", "prompt"))])
def test_bad_settings(more, says, squares, tmp_path, capsys):
    more = [beside(squares, x) if x == "resnet.pt" else x for x in more]
    assert says in refused(capsys, arguments(squares, "--out", tmp_path / "run", *more), main) and not (tmp_path / "run").exists()


def test_documented_commands_parse():
    assert_documented_commands_parse(train_adapter)
