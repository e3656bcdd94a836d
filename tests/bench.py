"""Speed: every part beside its peers and beside its bare matrix products, all measured in one run.

    python tests/bench.py                      # all tables, minutes on two idle cores
    python tests/bench.py --quick              # fewer repetitions, models and items
    python tests/bench.py --only encoding loader

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
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from unittest import mock

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
PLAIN = "float32, as torch comes"
PRECISIONS = ("float32", PLAIN, "bfloat16")


# ---------------------------------------------------------------- measuring

def median_times(functions, repeat):
    """Seconds per call of each function, in turns, so that a slow moment of the machine hits all alike."""
    times = {name: [] for name in functions}
    for f in functions.values():
        f()
    for _ in range(repeat):
        for name, f in functions.items():
            begin = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - begin)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


@contextlib.contextmanager
def precision(kind="float32", ours=True):
    """Compute in one of PRECISIONS; this project's code with its switch, unless as torch comes."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    if ours and kind != PLAIN:
        clip.fast_float32()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def precisions():
    """PRECISIONS, bfloat16 only where --amp auto takes it: a CPU without instructions takes many times as
    long."""
    with clip.autocast("auto", clip.build("small")):
        return PRECISIONS if torch.is_autocast_enabled("cpu") else PRECISIONS[:2]


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


def megabytes(name):
    """VmRSS (memory held now) or VmHWM (the most so far) of this process, on Linux."""
    with open("/proc/self/status") as f:
        return next(int(row.split()[1]) for row in f if row.startswith(name)) * 1024 / 1e6


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

    def pooled(features):
        return getattr(features, "pooler_output", features)
    peer.encode_image = lambda images: pooled(peer.get_image_features(pixel_values=images))
    peer.encode_text = lambda tokens: pooled(peer.get_text_features(input_ids=tokens.long()))
    return peer


PEERS = {"open_clip": open_clip_peer, "transformers": transformers_peer}


def models_of(name):
    """-> {"ours": model, and each peer that there is}, with the same weights, in evaluation mode."""
    ours = clip.build(name, seed=1)
    models = {"transformers": transformers_peer(ours)}
    if models["transformers"]:
        with tempfile.TemporaryDirectory() as folder:
            models["transformers"].save_pretrained(folder)
            ours, _ = clip.load(folder, "cpu")
    models |= {"ours": ours, "open_clip": open_clip_peer(ours)}
    return {peer: model.eval() for peer, model in models.items() if model}


def pictures(config, count):
    size = config.image_resolution
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def captions(config, count):
    """Token ids (count, context_length) as long as captions of Flickr8k."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(count, config.context_length, dtype=torch.int32)
    end = config.vocab_size - 1
    for text, length in zip(tokens, itertools.cycle(LENGTHS)):
        text[0] = end - 1
        text[1:length - 1] = torch.randint(end - 1, (length - 2,), generator=generator)
        text[length - 1] = end
    return tokens


# ---------------------------------------------------------------- encoders and training steps

@torch.no_grad()
def encoding(args):
    """Images and texts through the encoders. Peers give equal features."""
    heading("Encoding, cpu", "input", "precision", "time", "of its bare products",
            *[f"times as fast as {peer}" for peer in PEERS])
    inputs = {"tiny": (256, 256), "ViT-B/32": (32, 64)}  # name: images, texts
    for name, (images, texts) in inputs.items():
        models = models_of(name)
        config = models["ours"].config
        for side, batch in {"image": pictures(config, images), "text": captions(config, texts)}.items():
            calls = {peer: partial(getattr(model, f"encode_{side}"), batch) for peer, model in models.items()}
            ours = F.normalize(calls["ours"](), dim=-1)
            for peer, call in calls.items():
                error = (F.normalize(call(), dim=-1) - ours).abs().max().item()
                assert error < 1e-4, (name, side, peer, error)
            compare(f"{name}, {len(batch)} {side}s", calls, args.repeat)


def compare(title, calls, repeat):
    """Rows of the table for all precisions. calls: of "ours" and of peers."""
    functions = {}
    for kind in precisions():
        ours = precision(kind)(calls["ours"])  # the function, called in this precision
        functions |= {(kind, "ours"): ours, (kind, "bare"): precision(kind)(bare_products(ours))}
        if kind != PLAIN:  # to a peer it is the same as float32
            for peer in calls.keys() - {"ours"}:
                functions[kind, peer] = precision(kind, ours=False)(calls[peer])
    times = median_times(functions, repeat)
    for kind in precisions():
        seconds = times[kind, "ours"]
        peers_kind = "float32" if kind == PLAIN else kind
        ratios = [times[peers_kind, peer] / seconds if peer in calls else None for peer in PEERS]
        row(title, kind, duration(seconds), seconds / times[kind, "bare"], *ratios)


def clip_loss(model, images, texts):
    image_features = model.encode_image(images)
    text_features = model.encode_text(texts)
    with torch.autocast("cpu", enabled=False):
        return losses.clip_loss(F.normalize(image_features.float(), dim=-1),
                                F.normalize(text_features.float(), dim=-1), model.logit_scale.exp())


def step_of(model, loss_of, *batch):
    """A function that does one step of training, as the scripts do theirs. loss_of(model, *batch) -> loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step():
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=False):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return step


def training(args):
    """A step of CLIP's training: forward, loss, backward, clipping and AdamW, the same for ours and peers."""
    heading("A training step, cpu", "model and batch", "precision", "time", "of its bare products",
            *[f"times as fast as {peer}" for peer in PEERS])
    batches = {"tiny": 128, "small": 64, "ViT-B/32": 16, "RN50": 8}
    for name, count in batches.items():
        if args.quick and name in ("small", "RN50"):
            continue
        models = models_of(name)
        images = pictures(models["ours"].config, count)
        texts = captions(models["ours"].config, count)
        calls = {}
        for peer, model in models.items():
            calls[peer] = step_of(model.train(), clip_loss, images, texts)
        compare(f"{name}, {count} pairs", calls, max(2, args.repeat // 2))


# ---------------------------------------------------------------- the five scripts

def time_script(script, argv, steps):
    """Run a script as it is for some steps -> medians of (seconds of a step, of waiting for a batch)."""
    table = []
    batches = eval.Run.batches

    def timed_batches(run, loader):
        asked = time.perf_counter()
        for step, batch in batches(run, loader):
            came = time.perf_counter()
            if step == steps:
                return
            yield step, batch
            done = time.perf_counter()
            table.append((done - came, came - asked))
            asked = time.perf_counter()

    with mock.patch.object(eval, "report"), mock.patch.object(eval.Run, "batches", timed_batches):
        script.main(argv)
    return [sorted(column)[len(column) // 2] for column in zip(*table[2:])]


def methods(args):
    """The five scripts themselves, with their defaults, on an eighth of the built-in shapes."""
    heading("The five scripts, cpu, tiny model", "command", "step", "waiting for a batch")
    steps = 8 if args.quick else 16
    load_splits = data.load_splits

    def some(*words, **options):
        return [(instances[::8], tasks) for instances, tasks in load_splits(*words, **options)]
    with (tempfile.TemporaryDirectory() as folder, precision(),
          mock.patch.object(data, "load_splits", some)):
        instances, _ = some("primitives")[0]
        tokenizer = clip.Tokenizer.train([caption for x in instances for caption in x.captions], 1024)
        frozen = os.path.join(folder, "clip.pt")
        clip.save_checkpoint(frozen, {"method": "train_mxm", "settings": {}, "step": 0,
                                      "clip": clip.describe(clip.build("tiny", tokenizer))})
        for script, words in ((train_mxm, ""), (train_clip4cmr, "--clip FILE"),
                              (train_user, "--clip-lr 0"), (train_user, ""),
                              (train_adapter, "--clip FILE"), (train_adapter, "--clip FILE --tune full"),
                              (train_cmaclip, "--clip FILE --freeze"), (train_cmaclip, "")):
            argv = ["--epochs", str(steps), "--eval-every", str(steps), "--device", "cpu",
                    "--out", os.path.join(folder, "run"), *words.replace("FILE", frozen).split()]
            if script is train_clip4cmr:
                argv += ["--cache", os.path.join(folder, "features")]
            step, waiting = time_script(script, argv, steps)
            row(f"`{script.__name__}.py {words}`".replace(" `", "`"), duration(step), duration(waiting))


# ---------------------------------------------------------------- metrics, and the loader

@torch.no_grad()
def metrics(args):
    """Metrics and search, and their memory above the features, in an order of growing need: a peak of memory
    does not go down."""
    heading("Metrics and search, cpu", "what", "time", "memory at most")
    n = 2_000 if args.quick else 10_000
    images = F.normalize(torch.randn(n, 512), dim=1)
    texts = F.normalize(torch.randn(5 * n, 512), dim=1)
    owner = torch.arange(n)
    scores = eval.cosine_scores(images, texts)

    def similar(begin, end):
        return images[begin:end] @ images.t()
    calls = {
        f"search, 1 query, {5 * n:,} x 512": partial(eval.search, images[:1], texts, 10),
        f"search, 1,000 queries, {5 * n:,} x 512": partial(eval.search, images[:1000], texts, 10),
        f"class mAP and curves, {n:,} x {n:,}":
            partial(eval.class_metrics, similar, owner % 10, owner % 10, list("abcdefghij")),
        f"recall, NDCG, MRR, both ways, {n:,} images x {5 * n:,} texts":
            partial(eval.score_metrics, scores, owner, owner.repeat_interleave(5))}
    for title, call in calls.items():
        before = megabytes("VmRSS")
        seconds = median_times({title: call}, args.repeat)[title]
        row(title, duration(seconds), f"{max(0.0, megabytes('VmHWM') - before):,.0f} MB")


def loader(args):
    """What the loader does to a batch, in this process alone. Peers prepare a picture for evaluation, as
    `clip.load` does: decoded, resized, cut out and normalised."""
    heading("The loader, cpu, one process", "what", "each")
    count = 32 if args.quick else 128
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        instances = []
        for i in range(count):  # coarse noise: about the bytes and the decoding time of a photo
            coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            path = os.path.join(folder, f"{i}.jpg")
            coarse.resize((500, 375), Image.BICUBIC).save(path, quality=90)
            instances.append(data.Instance(str(i), [path], ["a caption"], {}, str(i)))

        def through(transform):
            for x in instances:
                transform(Image.open(x.images[0]).convert("RGB"))
        of = partial(data.Loader, instances, clip.Tokenizer([]), data.OPENAI, count)
        calls = {"a JPEG of 500 x 375 to 224": partial(of(cache_bytes=0).make, 0),
                 "... a random crop": partial(of(train=True, crop=0.5, cache_bytes=0).make, 0),
                 "... kept in memory": partial(of(train=True, crop=0.5).make, 0),
                 "... decoding alone": partial(through, lambda image: image),
                 "... `clip.transform`": partial(through, clip.transform(224))}
        with contextlib.suppress(ImportError):
            import open_clip
            calls["... open_clip's"] = partial(through, open_clip.image_transform(224, is_train=False))
        for name, seconds in median_times(calls, args.repeat).items():
            row(name, duration(seconds / count))
    shapes, _ = data.load("primitives")
    config = replace(data.OPENAI, image_resolution=32)
    of = partial(data.Loader, shapes[:count], clip.Tokenizer([]), config, count, 12, 4, train=True)
    calls = {"a shape's view, rendered at 32": partial(of(cache_bytes=0).make, 0),
             "... kept in memory": partial(of().make, 0)}
    for name, seconds in median_times(calls, args.repeat).items():
        row(name, duration(seconds / 12 / count))


# ---------------------------------------------------------------- memory

def video_loss(model, images, mask, tokens):
    shown = train_adapter.as_videos(model.encode_image(images), mask)
    return train_adapter.total_loss(model.encode_text(tokens), shown, mask, model.clip.logit_scale.exp())


def peak_of_steps(who):
    """(MB at most, median seconds) of steps at ViT-B/32 in this process, of which the second has the moments.

    who: "ours" or a peer, which is None where it is not installed; or a --tune of train_adapter.py.
    """
    if who not in PEERS:
        clip.fast_float32()
    model = clip.build("ViT-B/32", seed=1)
    config = model.config
    if who in train_adapter.RATES:  # whole videos and a caption each
        batch = pictures(config, 24), torch.ones(2, 12, dtype=torch.bool), captions(config, 2)[:, :32]
        step = step_of(train_adapter.Tuned(model, who), video_loss, *batch)
    else:
        model = PEERS[who](model) if who in PEERS else model
        if model is None:
            return None
        step = step_of(model.train(), clip_loss, pictures(config, 16), captions(config, 16))
    seconds = median_times({"step": step}, 3)["step"]
    return megabytes("VmHWM"), seconds


def memory(args):
    """The most memory of training, each in a process of its own: peers, and adapters beside all weights."""
    heading("Peak memory of training steps, cpu, ViT-B/32, float32", "step", "memory at most", "time",
            "memory, of the row above", "time, of the row above")
    groups = {"16 pairs, ": ("transformers", "open_clip", "ours"),
              "2 videos of 12 frames, --tune ": ("full", "adapter")}
    for title, names in groups.items():
        above = None
        for who in names:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(peak_of_steps, who).result()
            if found:
                peak, seconds = found
                row(title + who, f"{peak:,.0f} MB", duration(seconds), above and peak / above[0],
                    above and seconds / above[1])
                above = found


# ---------------------------------------------------------------- all of them

TABLES = {"memory": memory, "metrics": metrics, "encoding": encoding, "training": training,
          "methods": methods, "loader": loader}


def main():
    p = eval.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer repetitions, models and items")
    p.add_argument("--only", nargs="+", metavar="NAME", choices=TABLES, default=list(TABLES),
                   help=f"these tables alone: {', '.join(TABLES)}")
    args = p.parse_args()
    args.repeat = 3 if args.quick else 5
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads", end="")
    for module in ("torch", "open_clip", "transformers"):
        with contextlib.suppress(ImportError):
            print(f"; {module} {__import__(module).__version__}", end="")
    print()
    begin = time.time()
    for name in args.only:
        TABLES[name](args)
    print(f"\nmeasured in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
