"""Tests of train_user.py: its model against a plain version that takes each sample alone, without padding;
its loss, momentum and queues against brute force; then whole runs.
"""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import eval
import runs
import train_user
from runs import SMALL, arguments, in_process, metrics, refused, spy  # noqa: F401
from test_losses import value_and_gradients
from train_user import LOSSES, SGE, USER, Queue, main, settings, total_loss

CAPTIONS = ["a red square on blue", "wet", "a blue thing that is soft to touch", "red"]


def small_clip():
    """With a tokenizer of its own, as `small` makes it."""
    return clip.build("tiny", clip.Tokenizer.train(CAPTIONS * 2, 600), image_size=16, context_length=16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(clip.MODELS, "tiny", SMALL)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Squares of which three in a row count as the same thing."""
    path = runs.make_squares(tmp_path_factory.mktemp("squares"))
    rows = [json.loads(line) | {"group": f"g{i // 3}"} for i, line in enumerate(open(path))]
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def shaken(module, seed=0):
    """In place: no part but CLIP is at its starting value, running statistics included."""
    torch.manual_seed(seed)
    for name, value in module.state_dict().items():
        if not name.startswith("clip.") and value.is_floating_point():
            value += 0.3 * (torch.rand(value.shape) if name.endswith("_var") else torch.randn(value.shape))
    return module


# ---------------------------------------------------------------- the model: each sample alone, in double

def plain_guided(x, g):
    a = (x @ g).softmax(0)
    return x + torch.outer(a / a.norm(), g)


def plain_branch(branch, rows):
    linear, norm, _, _ = branch
    return norm(linear(rows)).tanh()


def plain_sge(sge, x):
    places = plain_branch(sge.local_branch, x.flatten(0, 1)).view_as(x)
    means = plain_branch(sge.global_branch, x.mean(1))
    out = []
    for sample, place, mean in zip(x, places, means):
        weights = ((place * mean) @ sge.score.weight[0]).softmax(0)
        out.append(F.normalize(weights @ sample, dim=0))
    return out


def plain_cge(cge, clip_embedding):
    first_norm, first, norm, _, last = cge.projection
    fixed = clip_embedding.detach()  # as if it had been extracted in advance
    return F.normalize(last(norm(first(first_norm(fixed))).clamp(min=0)), dim=1)


def plain_gpo(gpo, x):
    """x (L, D) -> (D,)."""
    encoding = torch.zeros(len(x), 32, dtype=torch.float64)
    for rank in range(len(x)):
        for i in range(16):
            angle = rank / 10000 ** (2 * i / 32)
            encoding[rank, 2 * i] = math.sin(angle)
            encoding[rank, 2 * i + 1] = math.cos(angle)
    states, _ = gpo.gru(encoding)
    weights = ((states[:, :32] + states[:, 32:]) / 2 @ gpo.score.weight[0] / 0.1).softmax(0)
    return weights @ x.sort(0, descending=True).values


def plain_image(model, images):
    """Patches without the class token, or regions; fc and a residual MLP; -> (B, dim)."""
    clip_embedding = None
    if isinstance(images, data.Regions):
        x, clip_embedding = images.features, images.clip_input
    elif images.ndim == 3:
        x = images
    else:
        clip_embedding, tokens = model.clip.encode_image(images, tokens=True)
        x = tokens[:, 1:]
    if model.unit_norm:
        x = x / x.norm(dim=2, keepdim=True)
    if model.sge:
        x = torch.stack([plain_guided(sample, g) for sample, g in zip(x, plain_sge(model.sge, x))])
    if model.cge:
        x = torch.stack([plain_guided(*sample) for sample in zip(x, plain_cge(model.cge, clip_embedding))])
    first, norm, _, last = model.image_mlp
    rows = x.flatten(0, 1)
    rows = model.image_fc(rows) + last(norm(first(rows)).clamp(min=0))
    x = rows.view(*x.shape[:2], -1)
    return F.normalize(torch.stack([plain_gpo(model.image_gpo, sample) for sample in x]))


def plain_text(model, tokens):
    """Each caption alone and cut after its end; -> (B, dim)."""
    out = []
    for row in tokens:
        _, x, _ = model.clip.encode_text(row[None, :int(row.argmax()) + 1], tokens=True)
        out.append(plain_gpo(model.text_gpo, model.text_fc(x[0, 1:])))
    return F.normalize(torch.stack(out))


PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2))  # of regions
EMBEDDINGS = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))  # CLIP's
GIVEN = {"pictures": (PICTURES, PICTURES.double()), "features": (FEATURES, FEATURES.double()),
         "regions": (data.Regions(FEATURES, EMBEDDINGS),
                     data.Regions(FEATURES.double(), EMBEDDINGS.double()))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enhance, images, unit_norm", [
    ("none", "pictures", False), ("cge", "pictures", False), ("both", "pictures", True),
    ("both", "regions", False), ("sge", "features", False)])
def test_the_encoders_are_the_plain_version_of_each_sample(enhance, images, unit_norm, training, monkeypatch):
    """In value, in the gradient of every weight, CLIP's included, and in batch norm's statistics; captions of
    several lengths; pictures, regions with CLIP's embeddings of the same images, or without."""
    monkeypatch.setattr(train_user, "DROPOUT", 0.0)
    given, in_double = GIVEN[images]
    sees_pictures = images == "pictures"
    model = USER(small_clip(), enhance, unit_norm, dim=12, regions=None if sees_pictures else 6)
    model = shaken(model).train(training)
    plain = copy.deepcopy(model).double()
    tokens = model.tokenizer(CAPTIONS, 16)
    for found, expected in ((model.encode_image(given), plain_image(plain, in_double)),
                            (model.encode_text(tokens), plain_text(plain, tokens))):
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)
        direction = torch.randn(4, 12)
        (found * direction).sum().backward()
        (expected * direction.double()).sum().backward()
    for kept, real in zip(model.buffers(), plain.buffers()):
        assert torch.allclose(kept.double(), real.double(), atol=1e-5)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    enhancing = {"both": {"sge", "cge"}, "none": set()}.get(enhance, {enhance})
    assert {name.split(".")[0] for name in expected if "ge." in name} == enhancing
    for name, p in model.named_parameters():
        reached = name not in ("clip.logit_scale", "cge.projection.0.bias")
        reached = reached and (sees_pictures or not name.startswith("clip.visual."))
        assert (p.grad is not None) == reached == (expected[name] is not None), name
        if reached:
            atol = 2e-5 * max(1, expected[name].abs().max())
            assert torch.allclose(p.grad.double(), expected[name], atol=atol), name


def test_dropout_is_in_sge_in_training_only():
    sge = shaken(SGE(6))
    assert [m.p for m in sge.modules() if isinstance(m, torch.nn.Dropout)] == [0.4] * 2
    assert not torch.equal(sge(FEATURES), sge(FEATURES))
    sge.eval()
    assert torch.equal(sge(FEATURES), sge(FEATURES))


def test_starting_weights():
    """They depend on the seed alone. Those of the layers that the authors start so, and of CGE, are Xavier's:
    uniform, of variance 2 / (rows + columns)."""
    clip_model = small_clip()
    before = torch.get_rng_state()
    model, same, other = (USER(clip_model, dim=400, regions=300, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), same.parameters()))
    assert not torch.equal(model.text_fc.weight, other.text_fc.weight)
    for layer in [model.image_fc, *model.sge.modules(), *model.cge.modules()]:
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert layer.bias is None or not layer.bias.any()


# ---------------------------------------------------------------- momentum contrast, the loss, settings

def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rows_of(images, texts, group):
    """[(image, text, group)] as plain numbers."""
    return list(zip(images.tolist(), texts.tolist(), group.tolist()))


def in_order(queue):
    """The pairs of a queue, the oldest first."""
    rows = rows_of(queue.images, queue.texts, queue.groups)
    return rows[int(queue.next):] + rows[:int(queue.next)]


def test_a_queue_starts_with_random_unit_vectors_of_nothing():
    queue = Queue(7, 4)
    both = torch.cat([queue.images, queue.texts])
    assert torch.allclose(both.norm(dim=1), torch.ones(14)) and len(both.unique(dim=0)) == 14
    assert queue.groups.tolist() == [-1] * 7


IMAGES, TEXTS, IMAGE_KEYS, TEXT_KEYS = (unit(5, 4, seed=seed) for seed in (1, 2, 3, 4))
GROUP = torch.tensor([2, 3, 2, 7, 8])
SAME = GROUP[:, None] == GROUP


def plain_push(query, others, same, mu):
    """log(1 + sum over what shows another thing of e^(mu (S - 0.5))) / mu, without any trick."""
    e = [(mu * (query @ other - 0.5)).exp() for other, is_same in zip(others, same) if not is_same]
    return torch.log(sum(e, torch.ones((), dtype=torch.float64))) / mu


def plain_pull(x, y):
    return torch.log(1 + (x @ y).clamp(min=0))


def plain_uto(images, texts, same, mu):
    total = 0
    for j in range(len(texts)):
        total = total + plain_push(texts[j], images, same[j], mu) + plain_push(images[j], texts, same[j], mu)
        total = total - plain_pull(images[j], texts[j])
    return total / len(texts)


def plain_uto_queue(queries, keys, queue, same, mu):
    terms = [plain_push(query, queue, row, mu) - plain_pull(query, key)
             for query, key, row in zip(queries, keys, same)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("mu", [90.0, 20.0, 400.0])
def test_uto_is_a_loop(mu):
    """Of a batch and of a queue, where what shows the same thing is no negative; 90 is the default.
    With 400, e^(mu / 2) would overflow."""
    more = {} if mu == 90 else {"mu": mu}
    queue = unit(7, 4, seed=5)
    queued = torch.zeros(5, 7, dtype=torch.bool)
    queued[0, 3] = queued[2, 0] = queued[2, 6] = True
    queued[4] = True  # no negatives at all

    def check(found, expected, *leaves):
        expected = value_and_gradients(expected, [x.double() for x in leaves])
        for x, y in zip(value_and_gradients(found, leaves), expected, strict=True):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
    check(lambda x, y: train_user.uto_loss(x, y, SAME, **more),
          lambda x, y: plain_uto(x, y, SAME, mu), IMAGES, TEXTS)
    check(lambda x: train_user.uto_queue_loss(x, TEXT_KEYS, queue, queued, **more),
          lambda x: plain_uto_queue(x, TEXT_KEYS.double(), queue.double(), queued, mu), IMAGES)


@pytest.mark.parametrize("kind, mu", [*((kind, None) for kind in LOSSES), ("uto", 20.0)])
def test_total_loss_is_its_sum(kind, mu):
    """Images against queued texts with the texts' keys, and the other way round."""
    queue = Queue(6, 4, seed=5)
    queue.enqueue(unit(4, 4, seed=6), unit(4, 4, seed=7), torch.tensor([2, 9, 3, 2]))
    queued = torch.tensor([[a == b for b in queue.groups.tolist()] for a in GROUP.tolist()])
    batch_loss, queue_loss = LOSSES[kind]
    more = {"mu": mu} if mu else {}
    batch = 20 * batch_loss(IMAGES, TEXTS, SAME, **more).item()
    to_texts = queue_loss(IMAGES, TEXT_KEYS, queue.texts, queued, **more).item()
    to_images = queue_loss(TEXTS, IMAGE_KEYS, queue.images, queued, **more).item()
    args = SimpleNamespace(loss=kind, mu=mu, batch_weight=20.0)
    alone = total_loss(args, IMAGES, TEXTS, GROUP, None, None)
    assert alone.item() == pytest.approx(batch, rel=1e-5)
    loss = total_loss(args, IMAGES, TEXTS, GROUP, (IMAGE_KEYS, TEXT_KEYS), queue)
    assert loss.item() == pytest.approx(batch + to_texts + to_images, rel=1e-5)


@pytest.mark.parametrize("words, expected", [
    ("--data flickr30k", dict(epochs=20, batch_size=128, lr=5e-4, clip_lr=5e-5, dim=1024, queue=2048,
                              batch_weight=20.0, lr_drop=0.5, momentum=0.999, weight_decay=1e-4, eval_every=1,
                              enhance="both", unit_norm=False, loss="uto", mu=None)),
    ("--data coco", dict(epochs=25, queue=4096, batch_weight=1.0, lr_drop=0.6)),
    ("", dict(lr=3e-4, clip_lr=3e-4, dim=256)),
    ("--clip ViT-B/32 --lr 0.3", dict(clip_lr=0.3 / 10))])
def test_settings_are_the_papers(words, expected):
    """Flickr30K, COCO, and those for random weights; CLIP's rate is a tenth where it is pretrained."""
    assert vars(settings(words.split())).items() >= expected.items()


# ---------------------------------------------------------------- a run, looked at from inside

def seen_by_loss(result, args, images, texts, group, keys, queue):
    return SimpleNamespace(embeddings=(images.detach(), texts.detach()), group=group, keys=keys,
                           queue=in_order(queue))


@pytest.fixture(scope="module")
def spied(squares, tmp_path_factory):
    """Four epochs of three steps of 20 pairs, a queue of 52; what is seen at every step."""
    run = SimpleNamespace(out=tmp_path_factory.mktemp("runs") / "spied", steps=[])

    class AdamW(torch.optim.AdamW):
        def step(self):
            names = {p: name for name, p in run.models[0].named_parameters()}
            step = SimpleNamespace(groups=[], weights={name: p.detach().clone() for p, name in names.items()})
            for part in self.param_groups:
                step.groups.append((part["lr"], part["weight_decay"], [names[p] for p in part["params"]]))
            step.norm = math.sqrt(sum(p.grad.square().sum().item() for p in names if p.grad is not None))
            run.steps.append(step)
            super().step()

    with runs.kept_signals(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.MODELS, "tiny", SMALL)
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(train_user, "DROPOUT", 0.0)
        patch.setattr(data, "CHANGED", 0.5)
        run.read = spy(patch, USER, "encode_text", lambda _, model, tokens: (model, model.training, tokens))
        run.models = spy(patch, train_user, "USER", lambda model, *a: model)
        run.losses = spy(patch, train_user, "total_loss", seen_by_loss)
        run.captions = spy(patch, data, "changed_words", lambda changed, tokens, _: (tokens, changed))
        main(arguments(squares, "--out", run.out, "--epochs", 4, "--lr", 2e-3, "--clip-lr", 4e-4,
                       "--weight-decay", 0.3, "--dim", 12, "--batch-size", 20, "--queue", 52,
                       "--momentum", 0.75, "--lr-drop", 0.5, "--batch-weight", 3, "--mu", 35))
    assert len(run.steps) == 12
    return run


def test_learning_rates(spied):
    """CLIP has a rate of its own. Constant, a tenth after the drop; gradients are clipped."""
    rates = 6 * [1.0] + 6 * [0.1]
    for step, rate in zip(spied.steps, rates):
        (clip_lr, clip_decay, of_clip), (lr, decay, heads) = step.groups
        assert clip_lr == pytest.approx(4e-4 * rate) and lr == pytest.approx(2e-3 * rate)
        assert clip_decay == decay == 0.3
        assert of_clip == [name for name in step.weights if name.startswith("clip.")]
        assert sorted(of_clip + heads) == sorted(step.weights)
    assert max(step.norm for step in spied.steps) == pytest.approx(2, abs=1e-3)


def test_keys_enter_the_queues_after_the_loss(spied):
    """At every step the queues hold the pairs of the steps before, with the group that each shows."""
    pairs = in_order(Queue(52, 12))
    for x in spied.losses:
        assert x.queue == pairs[-52:] and not any(k.requires_grad for k in x.keys)
        pairs += rows_of(*x.keys, x.group)
    assert len({group for *_, group in pairs[52:]}) == 8  # of 24 squares, three in each
    queue = Queue(52, 12, seed=1)
    queue.load_state_dict(clip.load_checkpoint(spied.out / "last.pt")["queue"])
    assert in_order(queue) == pairs[-52:]
    first = spied.losses[0]  # the momentum encoders start as copies
    for key, embedding in zip(first.keys, first.embeddings):
        assert torch.allclose(key, embedding, atol=1e-5)
    assert max((x.keys[0] - x.embeddings[0]).abs().max() for x in spied.losses[1:]) > 1e-3


def test_momentum_encoders_follow(spied):
    """Through every step, by the weights before it; buffers are copied."""
    expected = {name: value.double() for name, value in spied.steps[0].weights.items()}
    for step in spied.steps:
        expected = {name: 0.75 * value + 0.25 * step.weights[name] for name, value in expected.items()}
    found = clip.load_checkpoint(spied.out / "last.pt")["momentum"]
    assert all(torch.allclose(found[name].double(), value, atol=1e-5) for name, value in expected.items())
    assert found["sge.local_branch.1.num_batches_tracked"] == 13  # the model's, and its own last one
    assert (expected["text_fc.weight"] - spied.steps[-1].weights["text_fc.weight"]).abs().max() > 1e-4


def test_both_encoders_read_the_same_changed_captions(spied):
    reads = [(model is spied.models[0], tokens) for model, training, tokens in spied.read if training]
    assert len(spied.captions) == 12 and [first for first, _ in reads] == [True, False] * 12
    for step, (tokens, changed) in enumerate(spied.captions):
        assert not torch.equal(tokens, changed)
        assert all(torch.equal(read, changed) for _, read in reads[2 * step:2 * step + 2])


# ---------------------------------------------------------------- other runs

def assert_eval_repeats(out):
    runs.evaluated(out / "best.pt", "--out", out / "again")
    assert metrics(out / "again")["test"] == metrics(out)["test"]


@pytest.mark.parametrize("enhance, more", [("none", ["--queue", 0, "--loss", "triplet"]),
                                           ("cge", ["--unit-norm"])])
def test_baselines_run_and_eval_repeats_their_metrics(enhance, more, squares, tmp_path):
    main(arguments(squares, "--out", tmp_path, "--epochs", 1, "--dim", 10, "--queue", 8,
                   "--enhance", enhance, *more))
    last = clip.load_checkpoint(tmp_path / "last.pt")
    assert ("queue" in last) == ("momentum" in last) == (enhance != "none")
    assert_eval_repeats(tmp_path)


def test_a_frozen_clip_keeps_its_weights(squares, tmp_path):
    """Bit for bit, batch norm's statistics included; the rest learns. So do the momentum encoders'."""
    argv = arguments(squares, "--image-size", 32, "--epochs", 1, "--dim", 12, "--queue", 16)
    main([*argv, "--clip", "tiny-rn", "--out", str(tmp_path / "before")])
    clip_file = str(tmp_path / "before" / "best.pt")
    main([*argv, "--clip", clip_file, "--out", str(tmp_path / "run"), "--clip-lr", "0"])
    last = clip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["clip"]["merges"] == clip.load_checkpoint(clip_file)["clip"]["merges"]
    for name, value in clip.load(clip_file, "cpu")[0].state_dict().items():
        assert torch.equal(last["clip"]["state_dict"][name], value), name
        assert torch.equal(last["momentum"][f"clip.{name}"], value), name
    assert not torch.equal(last["momentum"]["text_fc.weight"], last["heads"]["text_fc.weight"])


# ---------------------------------------------------------------- regions

ROWS = {"train": 16, "dev": 8, "test": 8}


@pytest.fixture
def precomp(tmp_path):
    """The arguments of a run on pictures as four regions of six numbers, with CLIP's embeddings."""
    (tmp_path / "precomp").mkdir()
    for file, rows in ROWS.items():
        features = np.random.default_rng(rows + len(file)).random((rows, 4, 6), np.float32)
        np.save(tmp_path / "precomp" / f"{file}_ims.npy", features)
        embeddings = features.reshape(rows, 24).repeat(2, axis=1)[:, :32]
        np.save(tmp_path / "precomp" / f"{file}_clip.npy", embeddings)
        captions = [f"a {CAPTIONS[i % 4]} thing, {CAPTIONS[i // 5 % 4]}\n" for i in range(5 * rows)]
        (tmp_path / "precomp" / f"{file}_caps.txt").write_text("".join(captions))
    return arguments("flickr30k", "--root", tmp_path, "--regions", "--epochs", 1, "--dim", 12, "--queue", 16,
                     "--out", tmp_path / "run")


@pytest.mark.parametrize("enhance", ["both", "sge"])
def test_regions(enhance, precomp, tmp_path, capsys):
    """Trained and evaluated without a picture, and without CLIP's embeddings where there is no CGE."""
    if enhance == "sge":
        for file in ROWS:
            (tmp_path / "precomp" / f"{file}_clip.npy").unlink()
    main([*precomp, "--enhance", enhance])
    out = tmp_path / "run"
    assert_eval_repeats(out)
    argv = ["--checkpoint", out / "best.pt", "--device", "cpu", "--gallery", tmp_path / "gallery.png"]
    assert "have no picture to show" in refused(capsys, argv, eval.main)


@pytest.mark.parametrize("end, shape, says", [
    ("_ims.npy", (8, 4, 7), "features of another width than the training split's, which is 6"),
    ("_clip.npy", (8, 31), "CGE needs CLIP's embeddings there, float32 (images, 32)")])
def test_region_files_that_do_not_fit_are_refused(end, shape, says, precomp, tmp_path, capsys):
    """In one line and before anything is trained."""
    np.save(tmp_path / "precomp" / f"dev{end}", np.zeros(shape, np.float32))
    line = refused(capsys, precomp, main)
    assert f"dev{end}: {says}" in line and not (tmp_path / "run").exists()
