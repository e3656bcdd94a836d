"""Speed, as ratios against a peer or a physical limit measured in the same run; medians of several.

    python tests/bench.py            # needs open_clip_torch and transformers for the peers' lines; about four minutes
    python tests/bench.py --quick    # fewer repetitions

"of bare products" divides by the time of the model's matrix products alone, on the same operands' shapes and with the same
library. Peers run as they come; this project's lines are given with `clip.fast_float32()`, which its scripts call, and without.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("CLIP_CACHE", os.path.join(ROOT, "..", "shared", "clip"))
import clip  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402
import losses  # noqa: E402
import train_adapter  # noqa: E402
import train_clip4cmr  # noqa: E402

CAPTIONS = os.path.join(ROOT, "..", "shared", "data", "flickr8k", "dataset_flickr8k.json")


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
def fast(on=True):
    """With clip.fast_float32() inside; as torch comes outside."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    if on and not clip.fast_float32():
        print("note: fast_float32 changes nothing on this CPU")
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
        torch.backends.cuda.enable_flash_sdp(True)


def within(function, on):
    def call():
        with fast(on):
            return function()
    return call


def peers(model):
    """{name: (encode_image, encode_text)} of the installed peers, with the same weights."""
    found = {}
    with contextlib.suppress(ImportError):
        import open_clip
        o = open_clip.create_model("ViT-B-32-quickgelu")
        o.load_state_dict(model.state_dict(), strict=False)
        o.eval()
        found["open_clip"] = (o.encode_image, o.encode_text, o)
    with contextlib.suppress(ImportError):
        import transformers
        h = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=512)).eval()
        hugging_face_state(h, model)
        pooled = lambda out: getattr(out, "pooler_output", out)
        found["transformers"] = (lambda x: pooled(h.get_image_features(pixel_values=x)), lambda t: pooled(h.get_text_features(input_ids=t.long())), h)
    return found


def hugging_face_state(h, model):
    """Copy our weights into a transformers CLIPModel."""
    ours, theirs = model.state_dict(), h.state_dict()
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key, value in theirs.items():
        side, rest = ("visual.", key[len("vision_model."):]) if key.startswith("vision_model.") else ("", key.removeprefix("text_model."))
        if rest.startswith("encoder.layers."):
            _, _, number, part = rest.split(".", 3)
            stem, kind = part.rsplit(".", 1)
            block = f"{side}transformer.resblocks.{number}."
            if stem in names:
                source = ours[f"{block}{names[stem]}.{kind}"]
            else:
                source = ours[f"{block}attn.in_proj_{kind}"].chunk(3)["qkv".index(stem[len("self_attn.")])]
        else:
            source = {"logit_scale": lambda: ours["logit_scale"], "visual_projection.weight": lambda: ours["visual.proj"].t(),
                      "text_projection.weight": lambda: ours["text_projection"].t(), "embeddings.token_embedding.weight": lambda: ours["token_embedding.weight"],
                      "embeddings.position_embedding.weight": lambda: ours[side + "positional_embedding"],
                      "embeddings.class_embedding": lambda: ours["visual.class_embedding"], "embeddings.patch_embedding.weight": lambda: ours["visual.conv1.weight"],
                      "final_layer_norm.weight": lambda: ours["ln_final.weight"], "final_layer_norm.bias": lambda: ours["ln_final.bias"],
                      "pre_layrnorm.weight": lambda: ours["visual.ln_pre.weight"], "pre_layrnorm.bias": lambda: ours["visual.ln_pre.bias"],
                      "post_layernorm.weight": lambda: ours["visual.ln_post.weight"], "post_layernorm.bias": lambda: ours["visual.ln_post.bias"]}[rest]()
        value.copy_(source)


def bare_products(model, rows, side):
    """The matrix products of one encoder pass over `rows` tokens, nothing else."""
    blocks = (model.visual.transformer if side == "image" else model.transformer).resblocks
    width = blocks[0].mlp.c_fc.in_features
    x, h = torch.randn(rows, width), torch.randn(rows, 4 * width)
    weights = [(b.attn.in_proj_weight, b.attn.out_proj.weight, b.mlp.c_fc.weight, b.mlp.c_proj.weight) for b in blocks]

    def products():
        for qkv, out, up, down in weights:
            F.linear(x, qkv), F.linear(x, out), F.linear(x, up), F.linear(h, down)
    return products


def line(what, value, against, unit="x"):
    print(f"{what:<58} {value:6.2f}{unit}  {against}", flush=True)


@torch.no_grad()
def encoders(repeat):
    model = clip.build("ViT-B/32", seed=1).eval()
    images = torch.randn(32, 3, 224, 224)
    with open(CAPTIONS) as f:
        captions = [s["raw"] for image in json.load(f)["images"] for s in image["sentences"]][:128]
    texts = clip.tokenize(captions)
    rows = int((texts.argmax(1) + 1).sum())
    others = peers(model)
    for side, encode, data_, count in (("image", model.encode_image, images, 32 * 50), ("text", model.encode_text, texts, rows)):
        functions = {"fast": within(lambda: encode(data_), True), "plain": lambda: encode(data_),
                     "bare fast": within(bare_products(model, count, side), True), "bare plain": bare_products(model, count, side)}
        for name, pair in others.items():
            functions[name] = lambda f=pair[side == "text"]: f(data_)
            error = (F.normalize(functions[name](), dim=-1) - F.normalize(encode(data_), dim=-1)).abs().max()
            assert error < 1e-5, (name, side, error)
        t = median_times(functions, repeat)
        for mode in ("fast", "plain"):
            line(f"encode_{side}, ViT-B/32, {mode}: time", t[mode] / t[f"bare {mode}"], "of bare products")
            for name in others:
                line(f"encode_{side}, ViT-B/32, {mode}: speed", t[name] / t[mode], f"{name}'s, equal outputs")
    return model, others


def training(model, others, repeat):
    """Forward, CLIP's loss, backward and AdamW: the same step for ours and the peer."""
    def step_of(encode_image, encode_text, parameters, images, texts):
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

        def step():
            loss = losses.clip_loss(F.normalize(encode_image(images), dim=-1), F.normalize(encode_text(texts), dim=-1), 20.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return step

    images, texts = torch.randn(16, 3, 224, 224), clip.tokenize(["two dogs run over a green meadow after a red ball ."] * 16)
    ours = step_of(model.train().encode_image, model.encode_text, model.parameters(), images, texts)
    functions = {"fast": within(ours, True), "plain": ours}
    for name, (encode_image, encode_text, peer) in others.items():
        functions[name] = step_of(encode_image, encode_text, peer.train().parameters(), images, texts)
    t = median_times(functions, max(3, repeat // 3))
    for mode in ("fast", "plain"):
        for name in others:
            line(f"training step, ViT-B/32, batch 16, {mode}: speed", t[name] / t[mode], f"{name}'s")


def tiny(repeat):
    """The built-in job: a training step against its bare products (forward and twice that backward), and the loader."""
    instances, _ = data.load("primitives")
    tokenizer = clip.Tokenizer.train([c for x in instances for c in x.captions], 1024)
    model = clip.build("tiny", tokenizer).train()
    loader = data.Loader(instances, tokenizer, 32, 32, 64, 2, 2, train=True, workers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = [data.to_device(loader.make(i), "cpu") for i in range(4)]
    turn = iter(range(10 ** 9))

    def step():
        batch = batches[next(turn) % 4]
        images, texts = F.normalize(model.encode_image(batch["images"].flatten(0, 1)), dim=-1), F.normalize(model.encode_text(batch["tokens"].flatten(0, 1)), dim=-1)
        owner = batch["index"].repeat_interleave(2)
        loss = losses.hard_loss(images, texts, model.logit_scale.exp(), owner, owner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows = int((batches[0]["tokens"].flatten(0, 1).argmax(1) + 1).sum())
    products = [bare_products(model, 128 * 17, "image"), bare_products(model, rows, "text")]

    def bare():
        with torch.no_grad():
            for _ in range(3):
                for p in products:
                    p()
    t = median_times({"fast": within(step, True), "plain": step, "bare fast": within(bare, True), "bare plain": bare}, repeat)
    for mode in ("fast", "plain"):
        line(f"training step, tiny, 64 x 2 views x 2 captions, {mode}: time", t[mode] / t[f"bare {mode}"], "of bare products")

    stream = loader.batches(0, 200)  # one worker, nothing rendered yet: its slowest hour
    next(stream)
    begin = time.perf_counter()
    for _ in range(63):
        next(stream)
    cold = (time.perf_counter() - begin) / 63
    for _ in range(63):
        next(stream)
    begin = time.perf_counter()
    for _ in range(63):
        next(stream)
    warm = (time.perf_counter() - begin) / 63
    line("loader, one worker, first epoch (rendering): batches", t["fast"] / cold, "per tiny training step")
    line("loader, one worker, third epoch: batches", t["fast"] / warm, "per tiny training step")


def megabytes(name):
    """VmRSS (memory held now) or VmHWM (the most so far) of this process; nan where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024 / 1e6
    return float("nan")


def retrieval_by_class(repeat, n=10_000, part=20):
    """mAP over the whole ranking, with its curves, against a plain loop over queries and their sorted items. Runs first: a peak does not go down."""
    images, texts = (F.normalize(torch.randn(n, 64), dim=1) for _ in range(2))
    labels, names = torch.arange(n) % 10, [str(c) for c in range(10)]
    ours = lambda queries: lambda: eval.class_metrics(lambda b, e: images[b:min(e, queries)] @ texts.t(), labels[:queries], labels, names)["mAP"]
    scores, gallery = (images[:part] @ texts.t()).tolist(), labels.tolist()

    def plain():
        total = 0.0
        for row, label in zip(scores, gallery):
            found, precision = 0, 0.0
            for place, j in enumerate(sorted(range(n), key=row.__getitem__, reverse=True), 1):
                if gallery[j] == label:
                    found += 1
                    precision += found / place
            total += precision / found
        return 100 * total / part
    assert abs(ours(part)() - plain()) < 0.01  # of about 10: scores within eval.TIE of each other are ties for one, not for the other
    before = megabytes("VmRSS")
    t = median_times({"ours": ours(n), "plain": plain}, repeat)
    peak = megabytes("VmHWM") - before
    line(f"class mAP and curves, {n:,} x {n:,}: time", t["ours"], f"and {peak:.0f} MB at most above the features, of 64 dimensions", "s")
    line(f"class mAP, {n:,} x {n:,}: speed per query", t["plain"] / part / (t["ours"] / n), "a plain Python loop's over ready scores, equal mAP")


def class_losses(repeat, batch=300, dim=1024, classes=10):
    """CLIP4CMR's losses, forward and backward, against the one product of images and texts that the pair-wise ones cannot do without."""
    model = train_clip4cmr.CLIP4CMR(None, (8, 8), classes, dim, fixed=False)
    images, texts = (F.normalize(torch.randn(batch, dim), dim=1) for _ in range(2))
    image_labels, text_labels = torch.randint(classes, (2, batch))
    x, y, gradient = images.clone().requires_grad_(), texts.clone().requires_grad_(), torch.randn(batch, batch)

    def step(name):
        train_clip4cmr.total_loss(model, {name: 1.0}, x, image_labels, y, text_labels).backward()
        x.grad = y.grad = model.classifier.grad = model.prototypes.grad = None

    def bare():
        images @ texts.t(), gradient @ texts, gradient.t() @ images
    names = [*train_clip4cmr.PAIR_WISE, *train_clip4cmr.CLASS_WISE]
    times = lambda f, on: within(lambda: [f() for _ in range(10)], on)
    t = median_times({(name, on): times(f, on) for on in (True, False) for name, f in [("bare", bare), *((n, partial(step, n)) for n in names)]}, repeat)
    for name in names:
        fast_, plain = (t[name, on] / t["bare", on] for on in (True, False))
        line(f"{name} loss, {batch} x {dim:,}, fast: time", fast_, f"of a bare product, forward and backward; plain: {plain:.2f}x")


def video_step(tune, videos=2, frames=12):
    """A function that does one step of train_adapter.py: whole videos and a caption each, at ViT-B/32 with random weights."""
    model = train_adapter.Tuned(clip.build("ViT-B/32", seed=1), tune).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), fused=True)
    images, mask, tokens = torch.randn(videos * frames, 3, 224, 224), torch.ones(videos, frames, dtype=torch.bool), torch.zeros(videos, 32, dtype=torch.int32)
    tokens[:, 0], tokens[:, 1:12], tokens[:, 12] = 49406, torch.randint(1000, 40_000, (videos, 11)), 49407  # MSR-VTT's captions are as long

    def step():
        rows, texts = model.encode_image(images), model.encode_text(tokens)
        loss = train_adapter.total_loss(texts, train_adapter.as_videos(rows, mask), mask, model.clip.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train_adapter.CLIP_GRADIENT)
        optimizer.step()
    return step


def peak_of_steps(tune):
    """MB at most in a process of its own that does two steps: the second has the optimizer's moments."""
    clip.fast_float32()
    step = video_step(tune)
    step(), step()
    return megabytes("VmHWM")


def adapters(repeat):
    """Adapters against training everything, on videos."""
    t = median_times({tune: within(video_step(tune), True) for tune in ("adapter", "full")}, max(3, repeat // 3))
    line("training step, videos, --tune adapter, fast: time", t["adapter"] / t["full"], f"of --tune full's {t['full']:.2f} s (2 x 12 frames)")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = {tune: pool.apply(peak_of_steps, (tune,)) for tune in ("adapter", "full")}
    line("training step, videos, --tune adapter: peak memory", peak["adapter"] / peak["full"], f"of --tune full's {peak['full']:,.0f} MB")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true")
    repeat = 3 if p.parse_args().quick else 5
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    retrieval_by_class(repeat)
    class_losses(repeat)
    tiny(repeat)
    adapters(repeat)
    if os.path.exists(CAPTIONS):
        training(*encoders(repeat), repeat)
    else:
        print(f"skipped: the encoders' lines need real captions at {CAPTIONS}")
