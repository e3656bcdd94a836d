"""Speed, as ratios against a peer or a physical limit measured in the same run; medians of several.

    python tests/bench.py            # needs open_clip_torch and transformers for the peers' lines; minutes
    python tests/bench.py --quick    # fewer repetitions, smaller galleries
    python tests/bench.py --scale    # another thing: a model of what a step costs on many GPUs

"of bare products" divides by the time of the model's matrix products alone, on the same operands' shapes and
with the same library. Peers run as they come; this project's lines are given with `clip.fast_float32()`,
which its scripts call, and without.
"""
import argparse
import contextlib
import itertools
import json
import math
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
import train_user  # noqa: E402

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
    """{name: (encode_image, encode_text, module)} of the installed peers, with the same weights."""
    out = {}
    with contextlib.suppress(ImportError):
        import open_clip
        peer = open_clip.create_model("ViT-B-32-quickgelu")
        peer.load_state_dict(model.state_dict(), strict=False)
        peer.eval()
        out["open_clip"] = (peer.encode_image, peer.encode_text, peer)
    with contextlib.suppress(ImportError):
        import transformers
        peer = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=512)).eval()
        copy_to_hugging_face(peer, model)

        def encode_image(images):
            features = peer.get_image_features(pixel_values=images)
            return getattr(features, "pooler_output", features)

        def encode_text(tokens):
            features = peer.get_text_features(input_ids=tokens.long())
            return getattr(features, "pooler_output", features)
        out["transformers"] = (encode_image, encode_text, peer)
    return out


LAYERS = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
          "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OTHER_KEYS = {  # transformers' key without the encoder's name -> ours; {} is "visual." or nothing
    "logit_scale": "logit_scale", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "{}positional_embedding",
    "embeddings.class_embedding": "visual.class_embedding",
    "embeddings.patch_embedding.weight": "visual.conv1.weight",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    "pre_layrnorm.weight": "visual.ln_pre.weight", "pre_layrnorm.bias": "visual.ln_pre.bias",
    "post_layernorm.weight": "visual.ln_post.weight", "post_layernorm.bias": "visual.ln_post.bias"}


def copy_to_hugging_face(peer, model):
    """Copy our weights into a transformers CLIPModel."""
    ours = model.state_dict()
    for key, value in peer.state_dict().items():
        side = "visual." if key.startswith("vision_model.") else ""
        rest = key.removeprefix("vision_model.").removeprefix("text_model.")
        if not rest.startswith("encoder.layers."):
            source = ours[OTHER_KEYS[rest].format(side)]
            value.copy_(source.t() if "projection" in rest else source)
            continue
        _, _, number, part = rest.split(".", 3)
        stem, kind = part.rsplit(".", 1)
        block = f"{side}transformer.resblocks.{number}."
        if stem in LAYERS:
            value.copy_(ours[f"{block}{LAYERS[stem]}.{kind}"])
        else:
            q_k_or_v = "qkv".index(stem.removeprefix("self_attn.")[0])
            value.copy_(ours[f"{block}attn.in_proj_{kind}"].chunk(3)[q_k_or_v])


def bare_products(model, rows, side):
    """The matrix products of one encoder pass over `rows` tokens, nothing else."""
    blocks = (model.visual.transformer if side == "image" else model.transformer).resblocks
    width = blocks[0].mlp.c_fc.in_features
    x = torch.randn(rows, width)
    h = torch.randn(rows, 4 * width)

    def products():
        for block in blocks:
            F.linear(x, block.attn.in_proj_weight)
            F.linear(x, block.attn.out_proj.weight)
            F.linear(x, block.mlp.c_fc.weight)
            F.linear(h, block.mlp.c_proj.weight)
    return products


def line(what, value, against, unit="x"):
    print(f"{what:<58} {value:6.2f}{unit}  {against}", flush=True)


@torch.no_grad()
def encoders(repeat):
    """Images and real captions through ViT-B/32, beside the peers and beside the bare products."""
    model = clip.build("ViT-B/32", seed=1).eval()
    with open(CAPTIONS) as f:
        captions = [s["raw"] for image in json.load(f)["images"] for s in image["sentences"]][:128]
    texts = clip.tokenize(captions)
    text_rows = int((texts.argmax(1) + 1).sum())
    others = peers(model)
    inputs = {"image": (model.encode_image, torch.randn(32, 3, 224, 224), 32 * 50),
              "text": (model.encode_text, texts, text_rows)}
    for side, (encode, batch, rows) in inputs.items():
        bare = bare_products(model, rows, side)
        functions = {"fast": within(partial(encode, batch), True), "plain": partial(encode, batch),
                     "bare fast": within(bare, True), "bare plain": bare}
        for name, peer in others.items():
            functions[name] = partial(peer[side == "text"], batch)
            error = (F.normalize(functions[name](), dim=-1) - F.normalize(encode(batch), dim=-1)).abs().max()
            assert error < 1e-5, (name, side, error)
        t = median_times(functions, repeat)
        for mode in ("fast", "plain"):
            line(f"encode_{side}, ViT-B/32, {mode}: time", t[mode] / t[f"bare {mode}"], "of bare products")
            for name in others:
                line(f"encode_{side}, ViT-B/32, {mode}: speed", t[name] / t[mode], f"{name}'s, equal outputs")
    return model, others


def training(model, others, repeat):
    """Forward, CLIP's loss, backward and AdamW: the same step for ours and the peers."""
    images = torch.randn(16, 3, 224, 224)
    texts = clip.tokenize(["two dogs run over a green meadow after a red ball ."] * 16)

    def step_of(encode_image, encode_text, module):
        optimizer = torch.optim.AdamW(module.train().parameters(), lr=1e-6, fused=True)

        def step():
            image_features = F.normalize(encode_image(images), dim=-1)
            text_features = F.normalize(encode_text(texts), dim=-1)
            loss = losses.clip_loss(image_features, text_features, 20.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return step

    ours = step_of(model.encode_image, model.encode_text, model)
    functions = {"fast": within(ours, True), "plain": ours}
    functions |= {name: step_of(*peer) for name, peer in others.items()}
    t = median_times(functions, max(3, repeat // 3))
    for mode in ("fast", "plain"):
        for name in others:
            line(f"training step, ViT-B/32, batch 16, {mode}: speed", t[name] / t[mode], f"{name}'s")


def tiny(repeat):
    """The built-in job: a training step against its bare products (forward and twice that backward), and the
    loader."""
    instances, _ = data.load("primitives")
    tokenizer = clip.Tokenizer.train([c for x in instances for c in x.captions], 1024)
    model = clip.build("tiny", tokenizer).train()
    loader = data.Loader(instances, tokenizer, 32, 32, 64, 2, 2, train=True, workers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = [data.to_device(loader.make(i), "cpu") for i in range(4)]
    turn = itertools.cycle(batches)

    def step():
        batch = next(turn)
        images = F.normalize(model.encode_image(batch["images"].flatten(0, 1)), dim=-1)
        texts = F.normalize(model.encode_text(batch["tokens"].flatten(0, 1)), dim=-1)
        owner = batch["index"].repeat_interleave(2)
        loss = losses.hard_loss(images, texts, model.logit_scale.exp(), owner, owner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rows = int((batches[0]["tokens"].flatten(0, 1).argmax(1) + 1).sum())
    products = [bare_products(model, 128 * 17, "image"), bare_products(model, rows, "text")]

    @torch.no_grad()
    def bare():
        for products_of_side in products * 3:
            products_of_side()
    functions = {"fast": within(step, True), "plain": step,
                 "bare fast": within(bare, True), "bare plain": bare}
    t = median_times(functions, repeat)
    for mode in ("fast", "plain"):
        line(f"training step, tiny, 64 x 2 views x 2 captions, {mode}: time", t[mode] / t[f"bare {mode}"],
             "of bare products")

    def seconds_per_batch():
        begin = time.perf_counter()
        for _ in range(63):
            next(stream)
        return (time.perf_counter() - begin) / 63
    stream = loader.batches(0, 200)
    next(stream)  # the worker has started; nothing is rendered yet: its slowest hour
    first, _, third = (seconds_per_batch() for _ in range(3))
    line("loader, one worker, first epoch (rendering): batches", t["fast"] / first, "per tiny training step")
    line("loader, one worker, third epoch: batches", t["fast"] / third, "per tiny training step")


def megabytes(name):
    """VmRSS (memory held now) or VmHWM (the most so far) of this process; nan where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(row.split()[1]) for row in f if row.startswith(name)) * 1024 / 1e6
    return float("nan")


def retrieval_by_class(repeat, n=10_000, part=20):
    """mAP over the whole ranking, with its curves, against a plain loop over queries and their sorted items.

    Runs first: a peak of memory does not go down.
    """
    images, texts = (F.normalize(torch.randn(n, 64), dim=1) for _ in range(2))
    labels = torch.arange(n) % 10
    names = [str(c) for c in range(10)]
    scores, gallery = (images[:part] @ texts.t()).tolist(), labels.tolist()

    def ours(queries):
        def scores_of(begin, end):
            return images[begin:min(end, queries)] @ texts.t()
        return eval.class_metrics(scores_of, labels[:queries], labels, names)["mAP"]

    def plain():
        total = 0.0
        for row, label in zip(scores, gallery):
            hits, precision = 0, 0.0
            for place, j in enumerate(sorted(range(n), key=row.__getitem__, reverse=True), 1):
                if gallery[j] == label:
                    hits += 1
                    precision += hits / place
            total += precision / hits
        return 100 * total / part
    assert abs(ours(part) - plain()) < 0.01  # of about 10: scores within eval.TIE are ties for one only
    before = megabytes("VmRSS")
    t = median_times({"ours": partial(ours, n), "plain": plain}, repeat)
    peak = megabytes("VmHWM") - before
    line(f"class mAP and curves, {n:,} x {n:,}: time", t["ours"],
         f"and {peak:.0f} MB at most above the features, of 64 dimensions", "s")
    line(f"class mAP, {n:,} x {n:,}: speed per query", t["plain"] / part / (t["ours"] / n),
         "a plain Python loop's over ready scores, equal mAP")


def class_losses(repeat, batch=300, dim=1024, classes=10):
    """CLIP4CMR's losses, forward and backward, against the product of images and texts that pair-wise ones
    need."""
    model = train_clip4cmr.CLIP4CMR(None, (8, 8), classes, dim, fixed=False)
    images, texts = (F.normalize(torch.randn(batch, dim), dim=1) for _ in range(2))
    image_labels, text_labels = torch.randint(classes, (2, batch))
    x, y = images.clone().requires_grad_(), texts.clone().requires_grad_()
    gradient = torch.randn(batch, batch)

    def ten_steps(name):
        for _ in range(10):
            train_clip4cmr.total_loss(model, {name: 1.0}, x, image_labels, y, text_labels).backward()
            x.grad = y.grad = model.classifier.grad = model.prototypes.grad = None

    def bare():
        for _ in range(10):
            images @ texts.t()
            gradient @ texts
            gradient.t() @ images
    names = [*train_clip4cmr.PAIR_WISE, *train_clip4cmr.CLASS_WISE]
    functions = {"bare": bare} | {name: partial(ten_steps, name) for name in names}
    both_modes = {(name, on): within(f, on) for on in (True, False) for name, f in functions.items()}
    t = median_times(both_modes, repeat)
    for name in names:
        fast_ratio, plain_ratio = (t[name, on] / t["bare", on] for on in (True, False))
        line(f"{name} loss, {batch} x {dim:,}, fast: time", fast_ratio,
             f"of a bare product, forward and backward; plain: {plain_ratio:.2f}x")


def cross_attention(words, regions, sharpness=9.0):
    """SCAN's text-to-image attention (Lee et al. 2018, arXiv 1803.08024, section 3.1).

    words (L, D) of a query, regions (N, R, D) of images, unit norm -> scores (N,): every word attends to an
    image's regions, and the score is the mean over words of the cosine of a word and what it attends to.
    """
    cosines = (regions @ words.t()).transpose(1, 2)  # (N, L, R)
    weights = (sharpness * F.normalize(cosines.relu(), dim=1)).softmax(2)  # over the regions
    return F.cosine_similarity(weights @ regions, words, dim=2).mean(1)


@torch.no_grad()
def inference(repeat, galleries, count=36, width=2048, dim=1024, length=12, block=50):
    """USER, which makes one vector of an image before any query, beside cross-attention, which compares all
    regions with all words for each query: encoding a gallery's region features, and searching it.

    What encodes a query's words is the same for both and left out.
    """
    model = train_user.USER(clip.build("tiny"), enhance="sge", dim=dim, regions=width).eval()
    project = torch.nn.Linear(width, dim)
    features = torch.randn(block, count, width)
    functions = {"USER": partial(model.encode_image, features),
                 "attention": lambda: F.normalize(project(features), dim=2)}
    encode = median_times(functions, repeat)
    words = F.normalize(torch.randn(length, dim), dim=1)
    for n in galleries:
        regions = F.normalize(torch.randn(n, count, dim), dim=2)
        vectors = F.normalize(torch.randn(n, dim), dim=1)

        def search_by_attention():
            return torch.cat([cross_attention(words, part) for part in regions.split(block)]).topk(10)
        functions = {"USER": partial(eval.search, words[:1], vectors, 10), "attention": search_by_attention}
        t = median_times(functions, repeat)
        ratio = t["attention"] / t["USER"]
        line(f"a query, {n:,} images, USER: time", 1000 * t["USER"],
             f"cross-attention {1000 * t['attention']:.0f} ms, {ratio:,.0f} times as long", " ms")
        seconds = {name: t * n / block for name, t in encode.items()}
        line(f"encoding {n:,} x {count} regions, USER: time", seconds["USER"],
             f"cross-attention's projection {seconds['attention']:.1f} s", " s")


def video_step(tune, videos=2, frames=12):
    """A function that does one step of train_adapter.py: whole videos and a caption each, at ViT-B/32."""
    model = train_adapter.Tuned(clip.build("ViT-B/32", seed=1), tune).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), fused=True)
    images = torch.randn(videos * frames, 3, 224, 224)
    mask = torch.ones(videos, frames, dtype=torch.bool)
    tokens = torch.zeros(videos, 32, dtype=torch.int32)
    tokens[:, 0] = 49406
    tokens[:, 1:12] = torch.randint(1000, 40_000, (videos, 11))  # MSR-VTT's captions are as long
    tokens[:, 12] = 49407

    def step():
        rows, texts = model.encode_image(images), model.encode_text(tokens)
        videos_ = train_adapter.as_videos(rows, mask)
        loss = train_adapter.total_loss(texts, videos_, mask, model.clip.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train_adapter.MAX_NORM)
        optimizer.step()
    return step


def peak_of_steps(tune):
    """MB at most in a process of its own that does two steps: the second has the optimizer's moments."""
    clip.fast_float32()
    step = video_step(tune)
    step()
    step()
    return megabytes("VmHWM")


def adapters(repeat):
    """Adapters against training everything, on videos."""
    steps = {tune: within(video_step(tune), True) for tune in ("adapter", "full")}
    t = median_times(steps, max(3, repeat // 3))
    line("training step, videos, --tune adapter, fast: time", t["adapter"] / t["full"],
         f"of --tune full's {t['full']:.2f} s (2 x 12 frames)")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = {tune: pool.apply(peak_of_steps, (tune,)) for tune in ("adapter", "full")}
    line("training step, videos, --tune adapter: peak memory", peak["adapter"] / peak["full"],
         f"of --tune full's {peak['full']:,.0f} MB")


# ---------------------------------------------------------------- many GPUs: a model, no measurement

# assumed: an H100, about a third of its peak in bfloat16, half in float32; a network of 400 Gb/s for each GPU
FLOPS = 300e12  # of the encoders, per second
LOSS_FLOPS = 30e12  # of the similarities, in float32 as all losses are
BANDWIDTH = 50e9  # bytes per second, sent by each GPU
LATENCY = 10e-6  # seconds of a message between two GPUs
MESSAGES = 12  # of all GPUs in a step: features, owners, their gradients, the weights' gradients, stop?
WORDS = 20  # tokens of a caption


def pair_flops(config):
    """FLOPs of an image and a caption, forward and backward (twice the forward)."""
    def transformer(width, layers, tokens):
        return layers * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)  # weights, attention
    patches = (config.image_resolution // config.vision_patch_size) ** 2
    embedding = 2 * patches * 3 * config.vision_patch_size ** 2 * config.vision_width
    return 3 * (embedding + transformer(config.vision_width, config.vision_layers, patches + 1)
                + transformer(config.transformer_width, config.transformer_layers, WORDS))


def loss_memory(batch):
    """Bytes that CLIP's loss holds at most, measured on this machine. Run in a process of its own."""
    images, texts = torch.randn(2, batch, 64).requires_grad_()
    before = megabytes("VmRSS")
    losses.clip_loss(images, texts, torch.tensor(10.0)).backward()
    return 1e6 * (megabytes("VmHWM") - before)


def scale(batch=4096):
    """A table of what a step of `train_mxm.py --loss clip --clip ViT-B/32` takes on N GPUs.

    With B pairs in all every GPU computes the loss of all of them: a similarity matrix B x B.

        encoders     (B / N) pair_flops / FLOPS
        loss         6 B^2 D / LOSS_FLOPS: one product forward, two backward
        features     each GPU gets 2 B D numbers, and sends twice as many for their gradient
        gradients    twice the weights
    """
    config = clip.MODELS["ViT-B/32"][0]
    weights = sum(p.numel() for p in clip.build("ViT-B/32").parameters())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        copies = pool.apply(loss_memory, (batch,)) / (4 * batch ** 2)
    D = config.embed_dim
    print(f"A model, no measurement. Assumed: {FLOPS / 1e12:.0f} TFLOP/s in the encoders, "
          f"{LOSS_FLOPS / 1e12:.0f} in the loss, {BANDWIDTH / 1e9:.0f} GB/s and {1e6 * LATENCY:.0f} us "
          f"between GPUs, captions of {WORDS} tokens, and that nothing overlaps. Computed: "
          f"{pair_flops(config) / 1e9:.1f} GFLOP a pair, {weights / 1e6:.0f} M weights. Measured here: the "
          f"loss holds {copies:.1f} matrices of B x B float32 at most.\n\n"
          "| GPUs | pairs on each | batch | encoders, ms | loss, ms | features, ms (MB) | "
          "gradients, ms (MB) | step, ms | pairs/s | memory of the loss, GB |\n|" + " ---: |" * 10)
    for N, b in ((1, 512), (8, 512), (64, 512), (1024, 32), (1024, 128)):
        B = N * b
        encoders = b * pair_flops(config) / FLOPS
        loss = 6 * B ** 2 * D / LOSS_FLOPS
        features = 3 * 2 * B * D * 4 * (N - 1) / N
        gradients = 2 * weights * 4 * (N - 1) / N
        waiting = MESSAGES * 2 * math.log2(N) * LATENCY
        step = encoders + loss + (features + gradients) / BANDWIDTH + waiting
        times = [f"{1000 * seconds:,.0f}" for seconds in (encoders, loss)]
        sent = [f"{1000 * size / BANDWIDTH:,.0f} ({size / 1e6:,.0f})" for size in (features, gradients)]
        print(f"| {N:,} | {b} | {B:,} | {' | '.join(times + sent)} | {1000 * step:,.0f} | {B / step:,.0f} | "
              f"{copies * 4 * B ** 2 / 1e9:,.1f} |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true",
                   help="three repetitions instead of five, galleries of 200 and 1,000 images")
    p.add_argument("--scale", action="store_true", help="only the model of a step on 1 to 1,024 GPUs")
    args = p.parse_args()
    if args.scale:
        scale()
        sys.exit()
    quick = args.quick
    repeat = 3 if quick else 5
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    retrieval_by_class(repeat)
    class_losses(repeat)
    with fast():
        inference(repeat, (200, 1000) if quick else (1000, 5000))
    tiny(repeat)
    adapters(repeat)
    if os.path.exists(CAPTIONS):
        training(*encoders(repeat), repeat)
    else:
        print(f"skipped: the encoders' lines need real captions at {CAPTIONS}")
