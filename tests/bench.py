"""Speed: every part beside its peers and beside its bare matrix products, all measured in one run.

    python tests/bench.py                      # all tables, minutes on two idle cores
    python tests/bench.py --quick              # fewer repetitions, models and items
    python tests/bench.py --only encoding losses
    python tests/bench.py --gpu                # on the GPU, and what --compile gains there

It prints Markdown tables for tests/results.md. A time is the median of several calls, in turns with those it
is compared with. Peers (open_clip_torch, transformers) are used where they are installed, with the same
weights and inputs, and as they come. This project's lines are as its scripts run, with `clip.fast_float32()`,
unless they say "as torch comes". "Bare products" are the matrix products and convolutions that the line's own
call does, on the same operands, with nothing in between; attention's are left out. Nothing but the code is
needed: pictures are noise, and texts have the lengths of Flickr8k's captions.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import io
import itertools
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import clip  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402
import losses  # noqa: E402
import train_adapter  # noqa: E402
import train_clip4cmr  # noqa: E402
import train_cmaclip  # noqa: E402
import train_mxm  # noqa: E402
import train_user  # noqa: E402

# tokens of a caption of Flickr8k, start and end with them, in OpenAI's vocabulary: 32 quantiles of 4,000
LENGTHS = (7, 9, 9, 10, 10, 10, 11, 11, 12, 12, 12, 12, 13, 13, 13, 14,
           14, 14, 15, 15, 15, 16, 16, 16, 17, 17, 18, 18, 19, 20, 22, 25)


# ---------------------------------------------------------------- measuring

def median_times(functions, repeat):
    """Seconds per call of each function, in turns, so that a slow moment of the machine hits all alike.

    On a GPU a call ends when all that it asked for is done.
    """
    def call(f):
        begin = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = {name: [] for name in functions}
    for f in functions.values():
        call(f)
    for _ in range(repeat):
        for name, f in functions.items():
            times[name].append(call(f))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


@contextlib.contextmanager
def fast():
    """With clip.fast_float32() inside; as torch comes outside."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    clip.fast_float32()
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
        torch.backends.cuda.enable_flash_sdp(True)


PLAIN = "float32, as torch comes"


def precisions(device):
    return ["float32", PLAIN, "bfloat16"] if device == "cpu" else ["float32", "bfloat16"]


@contextlib.contextmanager
def precision(kind, device, ours=True):
    """Compute in one of `precisions`; this project's code with the switch of `fast`."""
    with contextlib.ExitStack() as stack:
        if device == "cpu" and ours and kind != PLAIN:
            stack.enter_context(fast())
        if kind == "bfloat16":
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        yield


def within(context, function):
    """The function, called in a context: a function that makes one, as of `precision`."""
    def call():
        with context():
            return function()
    return call


class Products(TorchDispatchMode):
    """Notes the operands of each matrix product and convolution, forward and backward, while it is active."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = function.overloadpacket
        if kind is torch.ops.aten.addmm:
            self.calls.append((torch.ops.aten.mm.default, args[1:3]))
        elif kind in (torch.ops.aten.mm, torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def bare_products(function):
    """A function that does the products of function() again, and nothing else."""
    with Products() as products:
        function()

    @torch.no_grad()
    def again():
        for product, operands in products.calls:
            product(*operands)
    return again


def in_new_process(function, *arguments):
    """The function's value, from a process of its own that may start others: its memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def megabytes(name):
    """VmRSS (memory held now) or VmHWM (the most so far) of this process; nan where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(row.split()[1]) for row in f if row.startswith(name)) * 1024 / 1e6
    return float("nan")


def heading(title, *columns):
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def row(*cells):
    """A row of the table; a number is a ratio, None is a dash."""
    texts = []
    for cell in cells:
        if isinstance(cell, float):
            cell = f"{cell:.2f}"
        texts.append("-" if cell is None else cell)
    print(f"| {' | '.join(texts)} |", flush=True)


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


# ---------------------------------------------------------------- peers and inputs

def open_clip_peer(model):
    """open_clip's model with the same weights, or None where it is not installed."""
    try:
        import open_clip
    except ImportError:
        return None
    c = model.config
    vision = {"layers": c.vision_layers, "width": c.vision_width, "image_size": c.image_resolution}
    if c.vision_patch_size:
        vision["patch_size"] = c.vision_patch_size
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.transformer_width,
            "heads": c.transformer_heads, "layers": c.transformer_layers}
    peer = open_clip.model.CLIP(c.embed_dim, vision, text, quick_gelu=c.quick_gelu)
    peer.load_state_dict(model.state_dict(), strict=False)
    return peer


def transformers_peer(model):
    """transformers' model of the same size, or None: it is not installed, or has no such ResNet."""
    c = model.config
    if c.vision_patch_size is None:
        return None
    try:
        import transformers
    except ImportError:
        return None
    vision = {"hidden_size": c.vision_width, "intermediate_size": 4 * c.vision_width,
              "num_hidden_layers": c.vision_layers, "num_attention_heads": c.vision_heads,
              "image_size": c.image_resolution, "patch_size": c.vision_patch_size}
    text = {"hidden_size": c.transformer_width, "intermediate_size": 4 * c.transformer_width,
            "num_hidden_layers": c.transformer_layers, "num_attention_heads": c.transformer_heads,
            "max_position_embeddings": c.context_length, "vocab_size": c.vocab_size,
            "bos_token_id": c.vocab_size - 2, "eos_token_id": c.vocab_size - 1}
    peer = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision,
                                                          projection_dim=c.embed_dim))

    def encode_image(images):
        features = peer.get_image_features(pixel_values=images)
        return getattr(features, "pooler_output", features)

    def encode_text(tokens):
        features = peer.get_text_features(input_ids=tokens.long())
        return getattr(features, "pooler_output", features)
    peer.encode_image = encode_image
    peer.encode_text = encode_text
    return peer


PEERS = {"open_clip": open_clip_peer, "transformers": transformers_peer}


def models_of(name, device):
    """-> {"ours": model, and each peer that there is}, with the same weights, in evaluation mode."""
    ours = clip.build(name, seed=1)
    models = {"transformers": transformers_peer(ours)}
    if models["transformers"]:
        with tempfile.TemporaryDirectory() as folder:
            models["transformers"].save_pretrained(folder)
            ours, _ = clip.load(folder, "cpu")
    models |= {"ours": ours, "open_clip": open_clip_peer(ours)}
    return {peer: model.to(device).eval() for peer, model in models.items() if model}


def pictures(config, count, device):
    size = config.image_resolution
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def captions(config, count):
    """Token ids (count, context_length) as long as captions of Flickr8k: they stay on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(count, config.context_length, dtype=torch.int32)
    end = config.vocab_size - 1
    for text, length in zip(tokens, itertools.cycle(LENGTHS)):
        text[0] = end - 1
        text[1:length - 1] = torch.randint(end - 1, (length - 2,), generator=generator)
        text[length - 1] = end
    return tokens


def compiled(model):
    """A copy whose blocks are compiled, as with --compile."""
    model = copy.deepcopy(model)
    clip.compile_blocks(model)
    return model


# ---------------------------------------------------------------- encoders and training steps

@torch.no_grad()
def encoding(args, device):
    """Images and texts through the encoders. Peers in float32 give equal features."""
    heading(f"Encoding, {device}", "input", "precision", "time", "of its bare products",
            *[f"times as fast as {peer}" for peer in PEERS])
    inputs = {"tiny": (256, 256), "ViT-B/32": (32, 64)}  # name: images, texts
    if not args.quick:
        inputs = {"tiny": (256, 256), "small": (64, 128), "ViT-B/32": (32, 64), "RN50": (16, 0)}
    for name, (images, texts) in inputs.items():
        models = models_of(name, device)
        config = models["ours"].config
        batches = {"images": pictures(config, images, device), "texts": captions(config, texts)}
        for side, batch in batches.items():
            if not len(batch):  # RN50's text encoder is that of ViT-B/32
                continue
            calls = {}
            for model_name, model in models.items():
                encode = model.encode_image if side == "images" else model.encode_text
                # ours takes tokens from the CPU, as the loader gives them
                calls[model_name] = partial(encode, batch if model_name == "ours" else batch.to(device))
            ours = F.normalize(calls["ours"](), dim=-1)
            for model_name, call in calls.items():
                error = (F.normalize(call(), dim=-1) - ours).abs().max().item()
                assert error < (1e-4 if device == "cpu" else 1e-2), (name, side, model_name, error)
            if device != "cpu" and not args.quick:
                encoder = compiled(models["ours"])
                encode = encoder.encode_image if side == "images" else encoder.encode_text
                calls["ours, compiled"] = partial(encode, batch)
            compare(f"{name}, {len(batch)} {side}", calls, args.repeat, device)
        del models


def compare(title, calls, repeat, device):
    """Rows of the table for all precisions. calls: "ours", peers, and on a GPU "ours, compiled"."""
    functions = {}
    for kind in precisions(device):
        for name, call in calls.items():
            ours = name.startswith("ours")
            if ours or kind != PLAIN:  # to a peer it is the same as float32
                functions[kind, name] = within(partial(precision, kind, device, ours), call)
        context = partial(precision, kind, device)
        functions[kind, "bare"] = within(context, bare_products(functions[kind, "ours"]))
    times = median_times(functions, repeat)
    for kind in precisions(device):
        for name in calls:
            if name.startswith("ours"):
                seconds = times[kind, name]
                peers_kind = "float32" if kind == PLAIN else kind
                ratios = [times[peers_kind, peer] / seconds if peer in calls else None for peer in PEERS]
                row(title + name.removeprefix("ours"), kind, duration(seconds),
                    seconds / times[kind, "bare"], *ratios)


def clip_step(model, images, texts, device):
    """A function that does one step of CLIP's training, as the scripts do theirs: the loss in float32."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6, fused=True)

    def step():
        image_features = model.encode_image(images)
        text_features = model.encode_text(texts)
        with torch.autocast(device, enabled=False):
            loss = losses.clip_loss(F.normalize(image_features.float(), dim=-1),
                                    F.normalize(text_features.float(), dim=-1), model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def training(args, device):
    """A step of CLIP's training: forward, loss, backward, clipping and AdamW, the same for ours and peers.

    `--amp auto` chooses bfloat16 where it is much faster here: for small, ViT-B/32 and RN50, on a CPU with
    instructions for it. tiny stays in float32, so that it learns the same on every CPU.
    """
    heading(f"A training step, {device}", "model and batch", "precision", "time", "of its bare products",
            *[f"times as fast as {peer}" for peer in PEERS])
    batches = {"tiny": 128, "ViT-B/32": 16}
    if not args.quick:
        batches = {"tiny": 128, "small": 64, "ViT-B/32": 16, "RN50": 8}
    for name, count in batches.items():
        models = models_of(name, device)
        config = models["ours"].config
        images = pictures(config, count, device)
        texts = captions(config, count)
        calls = {"ours": clip_step(models["ours"], images, texts, device)}
        for peer in models.keys() - {"ours"}:
            calls[peer] = clip_step(models[peer], images, texts.to(device), device)
        if device != "cpu":
            calls["ours, compiled"] = clip_step(compiled(models["ours"]), images, texts, device)
        compare(f"{name}, {count} pairs", calls, max(2, args.repeat // 2), device)
        del models, calls


# ---------------------------------------------------------------- the five scripts

OUTSIDE = [(data, "to_device"), (data, "changed_words"), (eval, "average_gradients"),
           (torch.nn.utils, "clip_grad_norm_"), (torch.nn.utils, "get_total_norm"),
           (torch.optim.AdamW, "step"), (torch.optim.AdamW, "zero_grad"),
           (torch.optim.Adam, "step"), (torch.optim.Adam, "zero_grad"),
           (train_user, "momentum_update"), (train_user.Queue, "enqueue"), (train_cmaclip, "corrupt"),
           (eval.Run, "check"), (eval.Run, "log")]


class StopRun(Exception):
    """Ends a script after the steps that are to be timed."""


def time_script(script, argv, steps):
    """Run a script as it is for some steps -> medians of (seconds of a step, of what is outside of model and
    loss, of waiting for a batch).

    Outside are the functions OUTSIDE; on a GPU what they only queue is not counted.
    """
    spent = []  # of a step: by the functions outside
    table = []

    def timed(function):
        def call(*args, **options):
            begin = time.perf_counter()
            out = function(*args, **options)
            spent.append(time.perf_counter() - begin)
            return out
        return call

    batches = eval.Run.batches

    def noted_batches(run, loader):
        asked = time.perf_counter()
        for step, batch in batches(run, loader):
            came = time.perf_counter()
            if step == steps:
                raise StopRun
            spent.clear()
            yield step, batch
            done = time.perf_counter()
            table.append((done - came, sum(spent), came - asked))
            asked = time.perf_counter()

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(StopRun))
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))  # a run notes Ctrl-C
        for module, name in [*OUTSIDE, (eval.Run, "batches")]:
            before = getattr(module, name)
            stack.callback(setattr, module, name, before)
            setattr(module, name, noted_batches if name == "batches" else timed(before))
        try:
            script.main(argv)
        except SystemExit:
            sys.exit(f"{script.__name__}.py {' '.join(argv)}: {said.getvalue()}")
    return [sorted(column)[len(column) // 2] for column in zip(*table[2:])]


def methods(args, device):
    """The five scripts themselves, with their defaults, on an eighth of the built-in shapes.

    A step's time is in its model, loss and gradient, but for the share outside.
    """
    heading(f"The five scripts, {device}, tiny model", "command", "step", "outside model and loss",
            "waiting for a batch")
    steps = 8 if args.quick else 16
    load_splits = data.load_splits

    def some(*words, **options):
        return [(instances[::8], tasks) for instances, tasks in load_splits(*words, **options)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data.load_splits = some
        stack.callback(setattr, data, "load_splits", load_splits)
        stack.enter_context(fast())
        instances, _ = some("primitives")[0]
        tokenizer = clip.Tokenizer.train([caption for x in instances for caption in x.captions], 1024)
        frozen = os.path.join(folder, "clip.pt")
        clip.save_checkpoint(frozen, {"method": "train_mxm", "settings": {}, "step": 0,
                                      "clip": clip.describe(clip.build("tiny", tokenizer))})
        features = os.path.join(folder, "features")
        commands = [(train_mxm, ""),
                    (train_clip4cmr, f"--clip {frozen} --cache {features}"),
                    (train_user, "--clip-lr 0"), (train_user, ""),
                    (train_adapter, f"--clip {frozen}"), (train_adapter, f"--clip {frozen} --tune full"),
                    (train_cmaclip, f"--clip {frozen} --freeze"), (train_cmaclip, "")]
        for script, words in commands:
            argv = [*words.split(), "--epochs", str(steps), "--eval-every", str(steps), "--device", device,
                    "--out", os.path.join(folder, "run")]
            step, outside, waiting = time_script(script, argv, steps)
            shown = words.replace(frozen, "FILE").replace(f" --cache {features}", "")
            command = f"{script.__name__}.py {shown}".strip()
            row(f"`{command}`", duration(step), f"{100 * outside / step:.1f}%", duration(waiting))


# ---------------------------------------------------------------- losses and metrics

def all_losses(args, device):
    """Forward and backward of every loss at the sizes of its paper, against the product of all images with
    all texts (and with queues), which most of them need, and its two of the backward pass."""
    heading(f"Losses, forward and backward, {device}", "loss", "features", "time", "of its bare products")
    generator = torch.Generator().manual_seed(0)

    def features(count, dim):
        return F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(device)

    def numbers(count, classes):
        return torch.randint(classes, (count,), generator=generator).to(device)

    def measure(name, shown, inputs, loss, others=()):
        """inputs: images, texts. others: pairs of further operands of products."""
        leaves = [x.clone().requires_grad_() for x in inputs]

        def ten_times():
            for _ in range(10):
                loss(*leaves).backward()
                for leaf in leaves:
                    leaf.grad = None

        def bare():
            for a, b in (inputs, *others):
                gradient = torch.ones(len(a), len(b), device=device)
                for _ in range(10):
                    a @ b.t()
                    gradient @ b
                    gradient.t() @ a
        functions = {"loss": ten_times, "bare": bare}
        if device == "cpu":
            functions = {name: within(fast, function) for name, function in functions.items()}
        t = median_times(functions, args.repeat)
        row(name, shown, duration(t["loss"] / 10), t["loss"] / t["bare"])

    images, texts, owner = features(64, 512), features(256, 512), torch.arange(64, device=device)
    text_owner = owner.repeat_interleave(4)

    hybrid = train_mxm.settings(["--soft-relation", "features"])

    def mxm(images, texts):
        return train_mxm.total_loss(hybrid, images, texts, 20.0, owner, text_owner, None, None, 0.5)
    measure("CLIP's", "64 images, 64 texts, 512", (images, texts[::4]),
            lambda a, b: losses.clip_loss(a, b, 20.0))
    for name, loss in (("hard", lambda a, b: train_mxm.hard_loss(a, b, 20.0, owner, text_owner)),
                       ("hybrid, relation of features", mxm)):
        measure(f"MXM-CLR: {name}", "64 x 1 images, 64 x 4 texts, 512", (images, texts), loss)

    images, texts, labels = features(300, 1024), features(300, 1024), numbers(300, 10)
    model = train_clip4cmr.CLIP4CMR(None, (8, 8), 10, dim=1024, fixed=False).to(device)
    for name in (*train_clip4cmr.PAIR_WISE, *train_clip4cmr.CLASS_WISE):
        def loss(a, b, name=name):
            return train_clip4cmr.total_loss(model, {name: 1.0}, a, labels, b, labels)
        measure(f"CLIP4CMR: {name}", "300 x 1,024", (images, texts), loss)

    images, texts, group = features(128, 1024), features(128, 1024), torch.arange(128, device=device)
    queue = train_user.Queue(2048, 1024).to(device)
    for kind in train_user.LOSSES:
        of_kind = train_user.settings(["--loss", kind, "--batch-weight", "20"])

        def loss(a, b, of_kind=of_kind):
            return train_user.total_loss(of_kind, a, b, group, (images, texts), queue)
        measure(f"USER: {kind}", "128 x 1,024, queues of 2,048", (images, texts), loss,
                [(images, queue.texts), (texts, queue.images)])

    texts, frames = features(128, 512), features(128 * 12, 512)
    mask = torch.ones(128, 12, dtype=torch.bool, device=device)
    measure("Cross-Modal Adapter", "128 texts, 128 x 12 frames, 512", (texts, frames),
            lambda a, b: train_adapter.total_loss(a, b.view(128, 12, -1), mask, 20.0))


def plain_map(scores, labels, query_labels):
    """The mean average precision of ready scores (Q, N): a plain loop over each sorted ranking."""
    total = 0.0
    for scores_of_query, label in zip(scores.tolist(), query_labels.tolist()):
        hits = 0
        precision_sum = 0.0
        ranking = sorted(range(len(labels)), key=scores_of_query.__getitem__, reverse=True)
        for place, j in enumerate(ranking, 1):
            if labels[j] == label:
                hits += 1
                precision_sum += hits / place
        total += precision_sum / hits
    return 100 * total / len(query_labels)


@torch.no_grad()
def metrics(args, device):
    """Metrics and search, beside the bare product of queries and gallery; memory above the features.

    A peak of memory does not go down, so the tables are given in an order of growing need.
    """
    heading("Metrics and search, cpu", "what", "time", "of its bare product", "memory at most", "beside it")
    n = 2_000 if args.quick else 10_000
    images = F.normalize(torch.randn(n, 512), dim=1)
    texts = F.normalize(torch.randn(5 * n, 512), dim=1)
    group = torch.arange(n)

    def measure(title, function, product, beside=None, repeat=args.repeat):
        before = megabytes("VmRSS")
        t = median_times({"ours": function, "bare": product}, repeat)
        peak = max(0.0, megabytes("VmHWM") - before)
        row(title, duration(t["ours"]), t["ours"] / t["bare"], f"{peak:,.0f} MB",
            beside and beside(t["ours"]))

    def blocks():  # the product, of a block of queries after the other, as the metrics take it
        for part in images.split(500):
            part @ texts.t()
    measure(f"search, 1 query, {5 * n:,} x 512", partial(eval.search, images[:1], texts, 10),
            lambda: images[:1] @ texts.t())
    measure(f"search, 1,000 queries, {5 * n:,} x 512", partial(eval.search, images[:1000], texts, 10),
            lambda: images[:1000] @ texts.t())

    labels = torch.arange(n) % 10
    names = [str(c) for c in range(10)]
    part = 20

    def class_map(queries):
        def scores_of(begin, end):
            return images[begin:min(end, queries)] @ images.t()
        return eval.class_metrics(scores_of, labels[:queries], labels, names)["mAP"]
    scores = images[:part] @ images.t()
    begin = time.perf_counter()
    expected = plain_map(scores, labels.tolist(), labels[:part])
    plain = (time.perf_counter() - begin) / part
    assert abs(class_map(part) - expected) < 0.01  # of about 10: scores within eval.TIE are ties for one only
    measure(f"class mAP and curves, {n:,} x {n:,}", partial(class_map, n), lambda: images @ images.t(),
            lambda seconds: f"{plain / (seconds / n):.0f} times as fast as a plain loop, equal mAP", 2)
    ranking = partial(eval.retrieval_metrics, eval.cosine_scores(images, texts), group,
                      group.repeat_interleave(5))
    measure(f"recall, NDCG, MRR, both ways, {n:,} images x {5 * n:,} texts", ranking, blocks, repeat=1)


# ---------------------------------------------------------------- the loader, and memory

def loader(args, device):
    """What the loader does to a batch, in this process alone. Peers prepare a picture for evaluation, as
    `clip.load` does: decoded, resized, cut out and normalised."""
    heading("The loader, cpu, one process", "what", "each", "a second", "beside it")
    count = 32 if args.quick else 128
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        instances = []
        for i in range(count):  # coarse noise: about the bytes and the decoding time of a photo
            coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            path = os.path.join(folder, f"{i}.jpg")
            coarse.resize((500, 375), Image.BICUBIC).save(path, quality=90)
            instances.append(data.Instance(str(i), [path], ["a caption"], {}, str(i)))

        def decode():
            for x in instances:
                Image.open(x.images[0]).convert("RGB")

        def through(transform):
            for x in instances:
                transform(Image.open(x.images[0]).convert("RGB"))
        of = partial(data.Loader, instances, clip.Tokenizer([]), 77, 224, count)
        evaluated = of(cache_bytes=0)
        cropped = of(train=True, views=1, captions=1, crop=0.5, cache_bytes=0)
        kept = of(train=True, views=1, captions=1, crop=0.5)
        functions = {"a JPEG of 500 x 375 to 224": partial(evaluated.make, 0),
                     "the same, a random crop": partial(cropped.make, 0),
                     "the same, kept in memory": partial(kept.make, 0)}
        peers = {"decoding alone": decode, "`clip.transform`": partial(through, clip.transform(224))}
        with contextlib.suppress(ImportError):
            import open_clip
            peers["open_clip's"] = partial(through, open_clip.image_transform(224, is_train=False))
        t = median_times(functions | peers, args.repeat)
        beside = ", ".join(f"{name} {duration(t[name] / count)}" for name in peers)
        for name in functions:
            row(name, duration(t[name] / count), f"{count / t[name]:,.0f}", beside)
            beside = None
    shapes, _ = data.load("primitives")
    of = partial(data.Loader, shapes[:count], clip.Tokenizer([]), 77, 32, count, 12, 4, train=True)
    rendered = of(cache_bytes=0)
    kept = of()
    functions = {"a shape's view, rendered at 32": partial(rendered.make, 0),
                 "the same, kept in memory": partial(kept.make, 0)}
    t = median_times(functions, args.repeat)
    for name in functions:
        row(name, duration(t[name] / count / 12), f"{12 * count / t[name]:,.0f}", None)


def video_step(tune, device, videos=2, frames=12):
    """A function that does one step of train_adapter.py: whole videos and a caption each, at ViT-B/32."""
    model = train_adapter.Tuned(clip.build("ViT-B/32", seed=1), tune).to(device).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), fused=True)
    images = pictures(model.config, videos * frames, device)
    mask = torch.ones(videos, frames, dtype=torch.bool, device=device)
    tokens = captions(model.config, videos)[:, :32]

    def step():
        rows = model.encode_image(images)
        texts = model.encode_text(tokens)
        videos_ = train_adapter.as_videos(rows, mask)
        loss = train_adapter.total_loss(texts, videos_, mask, model.clip.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train_adapter.MAX_NORM)
        optimizer.step()
    return step


def a_step(who, device):
    """Steps at ViT-B/32: of CLIP's training by "ours" or a peer, or with a --tune of train_adapter.py."""
    if who in train_adapter.RATES:
        return video_step(who, device)
    model = clip.build("ViT-B/32", seed=1)
    if who != "ours":
        model = PEERS[who](model)
    if model is None:
        return None
    model.to(device)
    texts = captions(clip.MODELS["ViT-B/32"][0], 16)
    texts = texts if who == "ours" else texts.to(device)
    return clip_step(model, pictures(clip.MODELS["ViT-B/32"][0], 16, device), texts, device)


def peak_of_steps(who, device):
    """(MB at most, median seconds) of steps in this process; None where a peer is not installed.

    The second step has the optimizer's moments.
    """
    if device == "cpu" and who not in PEERS:
        clip.fast_float32()
    step = a_step(who, device)
    if step is None:
        return None
    seconds = median_times({"step": step}, 3)["step"]
    peak = torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else megabytes("VmHWM")
    return peak, seconds


def memory(args, device):
    """The most memory of training, each in a process of its own: peers, and adapters beside all weights."""
    heading(f"Peak memory of training steps, {device}, ViT-B/32, float32", "step", "memory at most", "time",
            "memory, of the row above", "time, of the row above")
    groups = {"16 pairs": ("transformers", "open_clip", "ours"), "2 videos of 12 frames": ("full", "adapter")}
    for title, names in groups.items():
        above = None
        for who in names:
            found = in_new_process(peak_of_steps, who, device)
            if found is None:
                continue
            peak, seconds = found
            name = f"--tune {who}" if who in train_adapter.RATES else who
            row(f"{title}, {name}", f"{peak:,.0f} MB", duration(seconds), above and peak / above[0],
                above and seconds / above[1])
            above = found


# ---------------------------------------------------------------- all of them

TABLES = {"memory": memory, "metrics": metrics, "encoding": encoding, "training": training,
          "methods": methods, "losses": all_losses, "loader": loader}
CPU_ONLY = ("metrics", "loader")


def machine(device):
    """One line that says what was measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    parts = [f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if device != "cpu":
        parts.append(torch.cuda.get_device_name())
    for module in ("torch", "open_clip", "transformers"):
        with contextlib.suppress(ImportError):
            parts.append(f"{module} {__import__(module).__version__}")
    return "; ".join(parts)


def main():
    p = eval.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer repetitions, models and items")
    p.add_argument("--gpu", action="store_true", help="measure on the GPU what can run there")
    p.add_argument("--only", nargs="+", metavar="NAME", choices=TABLES, default=list(TABLES),
                   help=f"these tables alone: {', '.join(TABLES)}")
    args = p.parse_args()
    if args.gpu and not torch.cuda.is_available():
        p.error("--gpu: there is none that torch can use")
    args.repeat = 3 if args.quick else 5
    device = "cuda" if args.gpu else "cpu"
    print(machine(device))
    begin = time.time()
    for name in args.only:
        if not (args.gpu and name in CPU_ONLY):
            TABLES[name](args, device)
    print(f"\nmeasured in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
