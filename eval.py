"""Evaluation: metrics, the evaluation command, galleries; and what every script shares around its training loop.

    python eval.py --checkpoint runs/mxm-primitives/best.pt                        # one table, and metrics.json beside the checkpoint
    python eval.py --checkpoint runs/mxm-primitives/best.pt --split unseen --gallery out.png
    python eval.py --checkpoint runs/mxm-primitives/best.pt --query "a tall red cone"

Knows nothing of how a model was trained: the checkpoint names its script, whose `restore` rebuilds the model.
"""
import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import textwrap
import time

import numpy as np
import torch
import torch.nn.functional as F

import clip
import data

METHODS = ("train_clip4cmr", "train_user", "train_mxm", "train_adapter", "train_cmaclip")
TIE = 1e-6  # scores closer than this are equal: rounding differs between rows of one matrix product
LARGE = 1 << 28  # bytes: features larger than this stay on disk
BLOCK = 1 << 22  # scores held at a time: larger is slower (memory is mapped anew for every block)


# ---------------------------------------------------------------- metrics

def positions(scores, relevant, k=None):
    """Where the relevant items of each query stand in its ranking, at worst.

    scores: float (Q, G). relevant: bool (Q, G), at least one per query. Returns float64 (Q, K): the 1-based position of each
    query's best, second best, ... relevant item, inf where it has fewer; K = min(k, the most that any query has); k None: all.
    A position counts every non-relevant item that scores higher *or equal*, so a constant score earns nothing. Raises
    ValueError for a NaN score (as CheckpointError: the model is at fault) or a query without a relevant item.
    """
    if torch.isnan(scores).any():
        raise clip.CheckpointError("NaN in the scores; a model that gives NaN cannot be ranked")
    count = relevant.sum(1)
    if len(count) and count.min() == 0:
        raise ValueError(f"query {int(count.argmin())} of the block has no relevant item in the gallery")
    most = int(count.max()) if len(count) else 0
    K = most if k is None else min(k, most)
    out = torch.full((len(scores), K), math.inf, dtype=torch.float64)
    if K <= 16:  # few: count what beats each of them
        best = scores.masked_fill(~relevant, -math.inf).topk(K, dim=1).values
        others = scores.masked_fill(relevant, -math.inf)
        for j in range(K):
            place = (j + 1 + (others >= best[:, j:j + 1] - TIE).sum(1)).double()
            out[:, j] = place.masked_fill(count <= j, math.inf).cpu()
        return out
    for row, (s, r) in enumerate(zip(scores.cpu().numpy(), relevant.cpu().numpy())):  # many: sort once, look each up
        best, others = np.sort(s[r])[::-1][:K], np.sort(s[~r])
        beaten_by = len(others) - np.searchsorted(others, best - np.float32(TIE), side="left")
        out[row, :len(best)] = torch.from_numpy(np.arange(1, len(best) + 1) + beaten_by)
    return out


def ranked(scores, query_group, gallery_group, k=None):
    """Yield (begin, place, count) for blocks of queries: `positions` of the queries from `begin` on, (b, K), and how many relevant items
    each has, (b,). Arguments as in `ranking_metrics`; memory grows with the block, not with queries x gallery."""
    if isinstance(scores, torch.Tensor):
        scores, matrix = (lambda begin, end: matrix[begin:end]), scores
    step = max(1, BLOCK // max(1, len(gallery_group)))
    total = torch.bincount(gallery_group, minlength=int(query_group.max()) + 1)[query_group]
    for begin in range(0, len(query_group), step):
        block = scores(begin, begin + step)
        relevant = (query_group[begin:begin + step, None] == gallery_group[None, :]).to(block.device)
        yield begin, positions(block, relevant, k), total[begin:begin + step]


def ranking_metrics(scores, query_group, gallery_group, ks=(1, 5, 10), average_precision=False):
    """Retrieval metrics, averaged over queries. An item is relevant to a query of the same group.

    scores: function (begin, end) -> float (end - begin, G), the scores of these queries; or a tensor (Q, G).
    query_group (Q,), gallery_group (G,): integer tensors. Scores are asked for in blocks, so memory grows with the block.
    Returns a dict, with percentages in 0..100:
      R@k     queries with a relevant item among the first k (Text2Shape's RR@k)
      P@k     relevant items among the first k, divided by k
      NDCG@k  sum over relevant positions p <= k of 1 / log2(p + 1), divided by its value were min(k, relevant) items ranked first
      MRR     mean of 1 / position of the first relevant item
      MedR, MeanR  median and mean position of the first relevant item (positions, not percentages)
      mAP     mean over queries of the mean over relevant items of (how many relevant up to it) / (its position), if asked for
    Raises ValueError for NaN scores and for a query without a relevant item.
    """
    query_group, gallery_group, found = torch.as_tensor(query_group), torch.as_tensor(gallery_group), []
    discount = 1 / torch.log2(torch.arange(2, max(ks) + 2, dtype=torch.float64))
    sums = {name: 0.0 for name in [f"{m}@{k}" for m in ("R", "P", "NDCG") for k in ks] + ["MRR"] + ["mAP"] * average_precision}
    for _, place, count in ranked(scores, query_group, gallery_group, None if average_precision else max(ks)):
        found.append(place[:, 0])
        for k in ks:
            inside = place <= k
            ideal = discount[:k].cumsum(0)[count.clamp(max=k) - 1]
            gain = torch.where(inside, 1 / torch.log2(place + 1), 0.0).sum(1)
            sums[f"R@{k}"] += inside[:, 0].sum().item()
            sums[f"P@{k}"] += inside.sum().item() / k
            sums[f"NDCG@{k}"] += (gain / ideal).sum().item()
        sums["MRR"] += (1 / place[:, 0]).sum().item()
        if average_precision:
            sums["mAP"] += average_precisions(place, count).sum().item()
    first = torch.cat(found)
    out = {name: 100 * value / len(query_group) for name, value in sums.items()}
    return out | {"MedR": float(np.median(first.numpy())), "MeanR": first.mean().item()}


def average_precisions(place, count):
    """(b,) in 0..1, from `positions` (b, K) and counts of relevant items (b,): mean over these of (how many up to it) / (its position)."""
    return (torch.arange(1, place.shape[1] + 1) / place).sum(1) / count


SCOPES = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


def class_metrics(scores, query_label, gallery_label, classes):
    """Retrieval by class (supervised cross-modal retrieval): an item is relevant to a query of its class, and the whole ranking counts.

    scores as in `ranking_metrics`; labels: int64 (Q,), (G,), 0 or more; classes: their names. Returns percentages in 0..100:
      mAP, P@k             as in `ranking_metrics`, for k of SCOPES up to the size of the gallery
      per_class            {class: mAP of its queries}; a class without queries is left out
      precision_recall     {"recall": 0, 10, ..., 100, "precision": mean over queries of the best precision at that recall or a higher one}
      precision_scope      {"scope": k, "precision": P@k}
    Raises ValueError for NaN scores and for a query whose class the gallery lacks.
    """
    query_label, gallery_label = torch.as_tensor(query_label), torch.as_tensor(gallery_label)
    scopes, levels = [k for k in SCOPES if k <= len(gallery_label)], torch.arange(11, dtype=torch.float64) / 10
    found, at_scope, at_recall = [], torch.zeros(len(scopes), dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
    for _, place, count in ranked(scores, query_label, gallery_label):
        found.append(average_precisions(place, count))
        at_scope += torch.stack([(place <= k).sum().double() / k for k in scopes])
        precision = torch.arange(1, place.shape[1] + 1) / place  # (b, K), after the k-th relevant item; 0 past the last
        best = precision.flip(1).cummax(1).values.flip(1)
        needed = (levels[None, :] * count[:, None] - 1e-9).ceil().long().clamp(min=1)  # relevant items that a recall asks for
        at_recall += best.gather(1, needed - 1).sum(0)
    found, Q = torch.cat(found), len(query_label)
    per_class = {name: 100 * found[query_label == c].mean().item() for c, name in enumerate(classes) if (query_label == c).any()}
    at_scope, at_recall = (100 * at_scope / Q).tolist(), (100 * at_recall / Q).tolist()
    return {"mAP": 100 * found.mean().item(), **{f"P@{k}": p for k, p in zip(scopes, at_scope)}, "per_class": per_class,
            "precision_recall": {"recall": (100 * levels).tolist(), "precision": at_recall}, "precision_scope": {"scope": scopes, "precision": at_scope}}


def class_chance(query_label, gallery_label):
    """{"mAP"}: the expected mAP of a random order, in closed form; labels as in `class_metrics`.

    Of R relevant items among G, place p holds one with probability R / G, and then (R - 1) / (G - 1) of the places before it do."""
    count, G = torch.bincount(gallery_label, minlength=int(query_label.max()) + 1)[query_label].double(), len(gallery_label)
    place = torch.arange(1, G + 1, dtype=torch.float64)
    inverse = (1 / place).mean()  # mean over places of 1 / p; of (p - 1) / p it is 1 - inverse
    return {"mAP": 100 * (inverse + (1 - inverse) * (count - 1) / max(1, G - 1)).mean().item()}


def class_retrieval(images, texts, labels, captions, query, classes):
    """mAP and the rest of class_metrics; both ways. images (N, D), texts (C, D); labels (N,); captions (N,): texts per instance."""
    labels, query = torch.as_tensor(labels), torch.as_tensor(query)
    images, texts, owner = images.cpu(), texts.cpu(), torch.arange(len(labels)).repeat_interleave(torch.as_tensor(captions))
    text_labels, asked = labels[owner], query[owner]
    out, chance = {}, {}
    for way, queries, query_labels, gallery, gallery_labels in (("image_to_text", images[query], labels[query], texts, text_labels),
                                                                ("text_to_image", texts[asked], text_labels[asked], images, labels)):
        out[way] = class_metrics(lambda b, e: queries[b:e] @ gallery.t(), query_labels, gallery_labels, classes)
        chance[way] = class_chance(query_labels, gallery_labels)
    for result in (out, chance):
        result["mAP"] = (result["image_to_text"]["mAP"] + result["text_to_image"]["mAP"]) / 2
    return {"model": out, "chance": chance}


def classification_metrics(probabilities, labels, thresholds=None):
    """Of one task. probabilities (N, C), labels int64 (N,) in -1..C-1; rows of -1 are left out. Returns percentages in 0..100:
      accuracy     the most probable class is right; of several equally probable classes the worst counts, so that a constant earns nothing
      macro_f1     mean of F1 over the classes that occur among labels or predictions; F1 = 2 TP / (2 TP + FP + FN)
      recall_at_precision  with thresholds (C,) from `precision_thresholds`: mean over the classes that occur among the labels of
                   the share of their rows at or above the class's threshold; `precision` is what these thresholds reached here
    None where no row is labelled. Raises CheckpointError for NaN.
    """
    if torch.isnan(probabilities).any():
        raise clip.CheckpointError("NaN in the predictions; a model that gives NaN cannot be evaluated")
    probabilities, labels = probabilities[labels >= 0], labels[labels >= 0]
    if not len(labels):
        return None
    C, own = probabilities.shape[1], F.one_hot(labels, probabilities.shape[1]).bool()
    wrong = probabilities.masked_fill(own, -math.inf).max(1)
    right = probabilities.gather(1, labels[:, None])[:, 0] > wrong.values if C > 1 else torch.ones(len(labels), dtype=torch.bool)
    predicted = F.one_hot(torch.where(right, labels, wrong.indices), C).bool()
    hits, asked = (predicted & own).sum(0), predicted.sum(0) + own.sum(0)  # TP; 2 TP + FP + FN
    out = {"accuracy": 100 * right.double().mean().item(), "macro_f1": 100 * (2 * hits.double() / asked.clamp(min=1))[asked > 0].mean().item()}
    if thresholds is not None:
        kept, occurs = probabilities >= thresholds, own.any(0)
        out["recall_at_precision"] = 100 * ((kept & own).sum(0).double() / own.sum(0).clamp(min=1))[occurs].mean().item()
        out["precision"] = 100 * (kept & own).sum().item() / max(1, kept.sum().item())
    return out


def precision_thresholds(probabilities, labels, precision):
    """(C,): for each class the lowest probability at which, of the rows at or above it, at least this share (0..1) is of the class;
    inf where no probability reaches it. To be chosen on validation data and used on test data. Arguments as in
    `classification_metrics`."""
    probabilities, labels = probabilities[labels >= 0], labels[labels >= 0]
    out = torch.full((probabilities.shape[1],), math.inf, dtype=probabilities.dtype)
    for c in range(len(out)):
        value, order = probabilities[:, c].sort(descending=True)
        reached = (labels[order] == c).cumsum(0) >= precision * torch.arange(1, len(order) + 1, dtype=torch.float64) - 1e-9
        last = torch.cat([value[1:] < value[:-1], torch.ones(min(1, len(value)), dtype=torch.bool)])  # of equal probabilities: all or none
        if (reached & last).any():
            out[c] = value[reached & last][-1]
    return out


def retrieval_metrics(images, texts, image_group, text_group, image_query=slice(None), text_query=slice(None)):
    """Both directions from unit-norm features. images (N, D), texts (C, D); groups: integer tensors (N,), (C,); queries: which rows
    are asked about (bool (N,), (C,); default all), while all rows are searched.

    Returns {"text_to_image": {...}, "image_to_text": {...}, "rSum": sum of R@1, 5, 10 both ways (0..600)}. Image-to-text: the
    rank of the best relevant caption.
    """
    asked_images, asked_texts = images[image_query].float(), texts[text_query].float()
    text_to_image = ranking_metrics(lambda b, e: asked_texts[b:e] @ images.float().t(), text_group[text_query], image_group)
    image_to_text = ranking_metrics(lambda b, e: asked_images[b:e] @ texts.float().t(), image_group[image_query], text_group)
    return {"text_to_image": text_to_image, "image_to_text": image_to_text,
            "rSum": sum(d[f"R@{k}"] for d in (text_to_image, image_to_text) for k in (1, 5, 10))}


def search(queries, gallery, k):
    """The k best gallery rows for each query by dot product, streamed. queries (Q, D); gallery (G, D), or an iterable of (n, D)
    parts. Returns (scores (Q, k), index (Q, k)), best first; equal scores go to the smaller index. Raises ValueError for NaN."""
    step = max(k, BLOCK // max(1, len(queries)))
    parts = gallery.split(step) if isinstance(gallery, torch.Tensor) else gallery
    best = torch.empty(len(queries), 0, device=queries.device)
    index, offset = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device), 0
    for part in parts:
        scores = queries.float() @ part.to(queries.device).float().t()
        n = min(k, scores.shape[1])
        s, i = scores.topk(min(n + 1, scores.shape[1]), dim=1)
        if torch.isnan(s[:, :1]).any():  # topk takes NaN for the greatest
            raise clip.CheckpointError("NaN in the scores; a model that gives NaN cannot be searched")
        last, i = s[:, n - 1:n], i[:, :n]
        if (s[:, n:] == last).any():  # more than n are as good as the n-th, and topk took any of them: take the first
            above, tied = scores > last, scores == last
            room = n - above.sum(1, keepdim=True)
            i = (above | tied & (tied.cumsum(1, dtype=torch.int32) <= room)).nonzero()[:, 1].view(-1, n)
        i = i.sort(1).values  # topk does not order ties by index either
        best, index, offset = torch.cat([best, scores.gather(1, i)], 1), torch.cat([index, i + offset], 1), offset + len(part)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :k]  # stable: earlier parts first
        best, index = best.gather(1, order), index.gather(1, order)
    return best, index


# ---------------------------------------------------------------- a model on a data set

@torch.no_grad()
def encode_images(model, loader, amp):
    """Yield (features of all views of a batch (A, D), as the model gives them; image_mask (B, V)) for a loader's batches."""
    for batch in loader.batches():
        batch = data.to_device(batch, next(model.parameters()).device)
        with clip.autocast(amp, model):
            features = model.encode_image(batch["images"][batch["image_mask"]])
        yield features.float(), batch["image_mask"]


@torch.no_grad()
def encode_texts(model, loader, amp):
    """Yield the features of a loader's captions, (256, D) at a time."""
    for tokens in loader.tokens.split(256):
        with clip.autocast(amp, model):
            features = model.encode_text(tokens.to(next(model.parameters()).device))
        yield features.float()


@torch.no_grad()
def embed(model, instances, tokenizer, amp="auto", workers=0, loader=None):
    """Unit-norm features, float32, on the model's device: images (N, D), the renormalised mean over an instance's views, and
    texts (C, D), all captions in order. loader: an `evaluation_loader` kept from an earlier call."""
    was_training = model.training
    model.eval()
    loader = loader or evaluation_loader(model, instances, tokenizer, workers)
    images = []
    for views, mask in encode_images(model, loader, amp):
        owner = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.sum(1))
        views = F.normalize(views, dim=-1)
        images.append(F.normalize(views.new_zeros(len(mask), views.shape[1]).index_add(0, owner, views), dim=-1))
    texts = [F.normalize(features, dim=-1) for features in encode_texts(model, loader, amp)]
    model.train(was_training)
    return torch.cat(images), torch.cat(texts)


def evaluation_loader(model, instances, tokenizer, workers=0, **more):
    """All views and captions in order; a batch holds about 256 pictures."""
    most = max(len(x.images) for x in instances)
    return data.Loader(instances, tokenizer, model.config.context_length, model.config.image_resolution, max(1, 256 // most), workers=workers, **more)


def frozen_features(model, instances, names, tokenizer, cache, amp="auto", workers=0):
    """data.Features of a frozen CLIP, computed once: every view and caption by itself, kept under the folder `cache` by a hash of the
    weights and of what is embedded. They are streamed to disk and memory-mapped where large: memory does not grow with the data.
    instances, names: of data.load_split."""
    def seen(image):  # a path, or a view that may have a file
        file = image if isinstance(image, str) else getattr(image, "file", None)
        return (image, os.path.getsize(file), os.path.getmtime(file)) if file else image

    what = [clip.identity(model), model.config, amp, tokenizer.merges, [(x.id, [seen(i) for i in x.images], x.captions) for x in instances]]
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    labels, captions, query = data.class_layout(instances, names)
    views, arrays = np.array([len(x.images) for x in instances]), []
    model.eval()

    def write(f, kind, rows):
        loader = evaluation_loader(model, instances, tokenizer, workers, cache_bytes=0)  # every picture is read once
        header = {"descr": "<f4", "fortran_order": False, "shape": (int(rows), model.config.embed_dim)}
        np.lib.format.write_array_header_1_0(f, header)
        for part in (features for features, _ in encode_images(model, loader, amp)) if kind == "image" else encode_texts(model, loader, amp):
            f.write(part.cpu().numpy().tobytes())

    for kind, rows in (("image", views.sum()), ("text", captions.sum())):
        path = os.path.join(cache, f"{key}-{kind}.npy")
        if not os.path.exists(path):
            data.note(f"features of {rows:,} {kind}s are computed once and kept in {path}")
            clip.write_file(path, lambda f: write(f, kind, rows))
        try:
            arrays.append(np.load(path, mmap_mode="r" if os.path.getsize(path) > LARGE else None))
        except (OSError, ValueError, EOFError) as problem:
            raise data.DataError(f"{path}: damaged ({str(problem)[:100]}); remove it, and it is computed again") from None
    return data.Features(*arrays, views, captions, labels, query)


def layout(instances):
    """What evaluation needs to know beside features: dict(image_group (N,), text_group (C,), image_query (N,), text_query (C,))."""
    numbers = {}
    group = torch.tensor([numbers.setdefault(x.group, len(numbers)) for x in instances])
    query = torch.tensor([x.query for x in instances])
    owner = caption_owner(instances)
    return dict(image_group=group, text_group=group[owner], image_query=query, text_query=query[owner])


def caption_owner(instances):
    """(C,): the instance of each caption."""
    return torch.arange(len(instances)).repeat_interleave(torch.tensor([len(x.captions) for x in instances]))


def evaluate(model, instances, tokenizer, amp="auto", workers=0, loader=None):
    """Retrieval metrics of a model on instances, both ways."""
    images, texts = embed(model, instances, tokenizer, amp, workers, loader)
    return retrieval_metrics(images.cpu(), texts.cpu(), **layout(instances))


def retrieval_rows(name, images, texts, instances, fold=1000):
    """Rows of a table, {row: metrics}: "model"; for coco also "model, 1K folds", the mean over folds of 1,000 images in order, each with its
    own captions (the 5,000 of its test split: 5K and 1K as published); and `bounds`. images (N, D), texts (C, D): unit-norm."""
    at, rows = layout(instances), {}
    rows["model"] = retrieval_metrics(images.cpu(), texts.cpu(), **at)
    if name == "coco" and len(instances) > fold:
        owner, found = caption_owner(instances), []
        for begin in range(0, len(instances) - fold + 1, fold):
            inside = (owner >= begin) & (owner < begin + fold)
            part = {key: value[begin:begin + fold] if key.startswith("image") else value[inside] for key, value in at.items()}
            found.append(retrieval_metrics(images[begin:begin + fold].cpu(), texts.cpu()[inside], **part))
        rows["model, 1K folds"] = {"rSum": float(np.mean([f["rSum"] for f in found])), **{
            way: {m: float(np.mean([f[way][m] for f in found])) for m in found[0][way]} for way in ("text_to_image", "image_to_text")}}
    return rows | bounds(name, instances)


def bounds(name, instances, draws=5, seed=0):
    """{"chance": metrics} of a random ranking, and for primitives also "ceiling": an oracle that reads every attribute a caption
    states and guesses among the instances that fit, as the mean over `draws` random orders of what it finds equally probable."""
    at, generator = layout(instances), torch.Generator().manual_seed(seed)
    asked_images, asked_texts = at["image_group"][at["image_query"]], at["text_group"][at["text_query"]]
    out = {"chance": {"text_to_image": chance(asked_texts, at["image_group"]), "image_to_text": chance(asked_images, at["text_group"])}}
    if name == "primitives":
        matrix, runs = 1e9 * data.primitives_oracle(instances).double(), []  # different probabilities now differ by more than 1,000
        for _ in range(draws):
            noisy = matrix + 1e3 * torch.rand(matrix.shape, generator=generator)  # so large that TIE is nothing against it
            runs.append({"text_to_image": ranking_metrics(noisy[at["text_query"]], asked_texts, at["image_group"]),
                         "image_to_text": ranking_metrics(noisy.t()[at["image_query"]], asked_images, at["text_group"])})
        out["ceiling"] = {d: {m: float(np.mean([r[d][m] for r in runs])) for m in runs[0][d]} for d in runs[0]}
    return out


def chance(query_group, gallery_group, ks=(1, 5, 10)):
    """Expected `ranking_metrics` of a random order, in closed form (MedR: the first position reached by half of the queries)."""
    count, G = torch.bincount(gallery_group, minlength=int(query_group.max()) + 1)[query_group], len(gallery_group)
    place = torch.arange(1, G + 1, dtype=torch.float64)
    discount, first, ndcg = 1 / torch.log2(place + 1), torch.zeros(G, dtype=torch.float64), dict.fromkeys(ks, 0.0)
    for relevant, queries in zip(*(x.tolist() for x in count.unique(return_counts=True))):
        part = queries / len(count)
        here = (relevant / (G + 1 - place)).clamp(max=1)  # the first relevant item is at this place, given that none came before
        first += part * here * torch.cat([torch.ones(1), (1 - here).cumprod(0)[:-1]])  # first[p]: it is at place p + 1
        for k in ks:
            ndcg[k] += part * relevant / G * (discount[:k].sum() / discount[:min(k, relevant)].sum()).item()
    out = {f"R@{k}": first[:k].sum().item() for k in ks} | {f"P@{k}": count.double().mean().item() / G * min(k, G) / k for k in ks}
    out |= {f"NDCG@{k}": ndcg[k] for k in ks} | {"MRR": (first / place).sum().item()}
    return {name: 100 * value for name, value in out.items()} | {"MedR": 1.0 + (first.cumsum(0) < 0.5).sum().item(), "MeanR": (first * place).sum().item()}


def table(results, shapes=False):
    """Text of a table. results: {row name: {"text_to_image": metrics, "image_to_text": metrics}}; shapes: Text2Shape's columns."""
    columns = ("R@1", "R@5", "NDCG@5", "MRR", "MedR") if shapes else ("R@1", "R@5", "R@10", "MRR", "MedR")
    thing = "shape" if shapes else "image"
    heads = [("R" if shapes and c[:2] == "R@" else "") + c for c in columns]
    width = max(map(len, results))
    lines = [f"{'':{width}}   {f'text-to-{thing}':^{7 * len(columns)}}   {f'{thing}-to-text':^{7 * len(columns)}}",
             " " * width + "   " + "   ".join(["".join(f"{h:>7}" for h in heads)] * 2)]
    for name, row in results.items():
        cells = ["".join(f"{row[d][c]:7.1f}" for c in columns) for d in ("text_to_image", "image_to_text")]
        lines.append(f"{name:{width}}   " + "   ".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures

GREEN, RED, BLUE, ORANGE, CELL = (30, 150, 60), (200, 40, 40), (60, 100, 190), (230, 150, 40), 128


def gallery_picture(path, rows):
    """Write a picture of queries and their results. rows: list of (query, [(result, right), ...]); a query or a result is a string
    or an RGB array (CELL, CELL, 3); right: bool, or None where nothing is known. Right results are framed green, wrong ones red."""
    from PIL import Image, ImageDraw, ImageFont
    font, pad = ImageFont.load_default(13), 8
    cell = CELL + 2 * pad
    canvas = Image.new("RGB", (cell * (1 + max(len(r) for _, r in rows)) + pad, (cell + pad) * len(rows) + pad), "white")
    draw = ImageDraw.Draw(canvas)

    def put(item, x, y):
        if not isinstance(item, str):
            return canvas.paste(Image.fromarray(item), (x, y))
        wrapped = (textwrap.wrap(item[:500], width) for width in range(24, 0, -1))
        lines = next(lines for lines in wrapped if all(font.getlength(line) <= CELL - 4 for line in lines))
        draw.multiline_text((x + 2, y + 2), "\n".join(lines if len(lines) <= 7 else lines[:6] + ["..."]), fill="black", font=font, spacing=3)

    for i, (query, results) in enumerate(rows):
        y = pad + i * (cell + pad)
        put(query, pad, y + pad)
        for j, (result, right) in enumerate(results):
            x = (j + 1) * cell + pad
            colour = (160, 160, 160) if right is None else GREEN if right else RED
            draw.rectangle((x, y + 2, x + cell - 5, y + cell - 2), outline=colour, width=4)
            put(result, x + pad - 2, y + pad)
    clip.write_file(path, lambda f: canvas.save(f, format="PNG"))


def draw_gallery(path, instances, of_text, of_image, seed=0, rows=6, top=5):
    """A gallery of random queries of a split: `rows` text-to-image, then `rows` image-to-text. of_text: function of a caption's number -> the
    scores of all instances (N,); of_image: of an instance's number -> the scores of all captions (C,)."""
    rng, at = np.random.default_rng(seed), layout(instances)
    captions, out = [c for x in instances for c in x.captions], []
    picture = lambda i: data.pixels(instances[i].images[0], CELL)
    draw = lambda asked: rng.permutation(asked.nonzero().flatten().numpy())[:rows].tolist()
    best = lambda scores: scores.argsort(descending=True, stable=True)[:top].tolist()
    for c in draw(at["text_query"]):
        out.append((captions[c], [(picture(i), bool(at["image_group"][i] == at["text_group"][c])) for i in best(of_text(c))]))
    for i in draw(at["image_query"]):
        out.append((picture(i), [(captions[c], bool(at["text_group"][c] == at["image_group"][i])) for c in best(of_image(i))]))
    gallery_picture(path, out)


def attention_picture(path, rows):
    """Write a picture of attention. rows: list of (RGB array (CELL, CELL, 3), caption, words, bars). words: [(word, weights (h, w), 0 or more)]:
    where it looks; what exceeds an even share is drawn red over the picture, on one scale for all words of a row, and the largest weight
    stands beside the word. bars: [(task, weight of the image in 0..1)], drawn as a chart of image against text."""
    from PIL import Image, ImageDraw, ImageFont
    font, pad, columns = ImageFont.load_default(13), 8, 8
    line, cell = 22, CELL + 22
    heights = [24 + (cell + pad) * max(1, -(-len(words) // (columns - 1))) + line * (len(bars) + bool(bars)) + 2 * pad for _, _, words, bars in rows]
    canvas = Image.new("RGB", ((CELL + pad) * columns + pad, sum(heights) + pad), "white")
    draw, y = ImageDraw.Draw(canvas), pad
    for (picture, caption, words, bars), height in zip(rows, heights):
        draw.text((pad, y), caption[:140], fill="black", font=font)
        canvas.paste(Image.fromarray(picture), (pad, y + 24))
        for k, (word, weights) in enumerate(words):
            x, top = pad + (CELL + pad) * (1 + k % (columns - 1)), y + 24 + (cell + pad) * (k // (columns - 1))
            even = 1 / weights.size
            heat = Image.fromarray(np.float32(weights - even) / max(max(float(w.max()) for _, w in words) - even, 1e-9)).resize((CELL, CELL), Image.Resampling.BILINEAR)
            heat = np.asarray(heat)[..., None].clip(0, 1)
            grey = 0.35 * picture.mean(2, keepdims=True) + 0.65 * 255  # pale, so that the heat stands out
            canvas.paste(Image.fromarray((grey * (1 - 0.85 * heat) + np.array(RED) * 0.85 * heat).astype(np.uint8)), (x, top))
            draw.text((x, top + CELL + 2), f"{word[:12]}  {100 * float(weights.max()):.0f}%", fill="black", font=font)
        below = y + 24 + (cell + pad) * max(1, -(-len(words) // (columns - 1)))
        for k, (task, weight) in enumerate(bars):
            if k == 0:
                draw.text((pad + CELL + pad, below), "weight of the image", fill=BLUE, font=font)
                draw.text((pad + CELL + pad + 300, below), "weight of the text", fill=ORANGE, font=font)
            top, left, wide = below + line * (k + 1), pad + CELL + pad, 420
            split = left + round(wide * weight)
            draw.text((pad, top), task[:18], fill="black", font=font)
            draw.rectangle((left, top + 2, split, top + line - 5), fill=BLUE)
            draw.rectangle((split, top + 2, left + wide, top + line - 5), fill=ORANGE)
            draw.text((left + wide + pad, top), f"{100 * weight:.0f}% / {100 * (1 - weight):.0f}%", fill="black", font=font)
        y += height
    clip.write_file(path, lambda f: canvas.save(f, format="PNG"))


# ---------------------------------------------------------------- around a training loop

def number(kind, accept, name):
    """An argparse type: kind(text) where accept(value), else an error that says it is not `name`."""
    def parse(text):
        value = kind(text)
        if not accept(value):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return value
    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, lambda v: v >= 1, "a positive whole number")
whole = number(int, lambda v: v >= 0, "a whole number of 0 or more")
positive = number(float, lambda v: 0 < v < math.inf, "a positive number")
not_negative = number(float, lambda v: 0 <= v < math.inf, "a number of 0 or more")
fraction = number(float, lambda v: 0 < v <= 1, "a share over 0, up to 1")
share = number(float, lambda v: 0 <= v <= 1, "a share from 0 to 1")
vocabulary = number(int, lambda v: v >= 514, "514 or more (every byte, inside and at the end of a word, start and end)")


def usable_device(text):
    try:
        d = torch.device(text)
        usable = (d.index or 0) < torch.cuda.device_count() if d.type == "cuda" else torch.zeros(1, device=d).item() == 0
    except (RuntimeError, AssertionError):  # no such name; a kind that this machine or this torch does not have
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; try cpu" + " or cuda" * torch.cuda.is_available())
    return text


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, without the usage text (--help has it)."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def common_arguments(description, **defaults):
    """A parser with the arguments that every script has, with the same names and meanings; a script adds its own."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="primitives", help="a data set's name, or a .jsonl or .csv file of your own")
    p.add_argument("--root", help="folder of the data set (default data/<name>)")
    p.add_argument("--download", action="store_true", help="fetch the data set where that is possible (text2shape)")
    p.add_argument("--clip", default="tiny", help="tiny, small: from scratch; a published name, a file or a folder: pretrained weights")
    p.add_argument("--image-size", type=positive_int, help="another input size than the model's own")
    p.add_argument("--vocab-size", type=vocabulary, default=1024, help="symbols of the vocabulary learned for a model from scratch")
    p.add_argument("--epochs", type=positive_int, help="passes over the training instances")
    p.add_argument("--batch-size", type=positive_int, help="instances per step, over all processes")
    p.add_argument("--lr", type=positive, help="peak learning rate")
    p.add_argument("--weight-decay", type=not_negative)
    p.add_argument("--seed", type=whole, default=0)
    p.add_argument("--device", type=usable_device, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    p.add_argument("--workers", type=whole, default=1, help="processes that prepare batches")
    p.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16 autocast in the encoders")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoders' blocks")
    p.add_argument("--resume", action="store_true", help="go on from <out>/last.pt")
    p.add_argument("--out", help="folder of the run (default runs/<method>-<data>)")
    p.set_defaults(**defaults)
    return p


@contextlib.contextmanager
def one_line_errors():
    """Turn bad input into one line on stderr and exit code 2, Ctrl-C outside the loop into 130; a bug keeps its traceback."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # a progress line may stand there
    try:
        yield
    except (clip.CheckpointError, data.DataError) as e:
        print(f"{clear}error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{clear}stopped", file=sys.stderr)
        code = 130
    else:
        return
    sys.stdout.flush()
    sys.exit(code)


class Progress:
    """A live line on a terminal; elsewhere a plain line every `every` seconds."""

    def __init__(self, total, start=0, every=20.0, quiet=False):
        self.total, self.start, self.every, self.quiet = total, start, every, quiet
        self.began = self.last = time.time()
        self.live, self.samples = sys.stderr.isatty(), 0

    def step(self, step, samples, **values):
        now, self.samples = time.time(), self.samples + samples
        if self.quiet or (now - self.last < (0.2 if self.live else self.every) and step < self.total):
            return
        self.last, spent = now, now - self.began
        left = spent / max(1, step - self.start) * (self.total - step)
        text = (f"step {step}/{self.total}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
                + f"  {self.samples / max(spent, 1e-9):,.0f} samples/s  {int(left) // 60}:{int(left) % 60:02d} left")
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def line(self, text):
        """A line that stays."""
        if not self.quiet:
            print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the loop can finish its step and save; a second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def open_run(out, settings, resume, first=True):
    """Prepare the folder of a run and write config.json. Returns the checkpoint to resume from, or None. first: False for the
    processes of a group that only read.

    resume: read <out>/last.pt and refuse other settings than it was made with. Otherwise an earlier run in the folder is moved
    aside (<out>.1, .2, ...), so that nothing saved is lost. Raises CheckpointError.
    """
    out = os.path.normpath(out)
    last, free = os.path.join(out, "last.pt"), ("resume", "out", "workers", "device", "download", "root")
    checkpoint = None
    if resume:
        if not os.path.exists(last):
            raise clip.CheckpointError(f"--resume: there is no {last}; give --out the run's folder, or start without --resume")
        checkpoint = clip.load_checkpoint(last)
        for name, now in settings.items():
            before = checkpoint["settings"].get(name)
            if name not in free and before != now:
                raise clip.CheckpointError(f"--resume: --{name.replace('_', '-')} was {before} in {last} and is {now} now; "
                                           f"repeat the old value, or start a new run in another --out")
        if not first:
            return checkpoint
    elif os.path.exists(last):
        number = next(n for n in range(1, 1 << 30) if not os.path.exists(f"{out}.{n}"))
        try:
            os.rename(out, f"{out}.{number}")
        except OSError as e:
            raise clip.CheckpointError(f"{out}: holds an earlier run that cannot be moved aside ({e.strerror}); choose another --out") from None
        data.note(f"an earlier run was moved to {out}.{number} (--resume would have continued it)")
    clip.write_file(os.path.join(out, "config.json"), lambda f: f.write(json.dumps(settings, indent=1).encode()))
    for name in os.listdir(out):
        if name.startswith(".writing-"):  # a file that was being written when an earlier process was killed
            os.unlink(os.path.join(out, name))
    log = os.path.join(out, "log.jsonl")
    if resume and os.path.exists(log):  # forget what was logged after the checkpoint: it will be logged again
        with open(log) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= checkpoint["step"]]  # a kill can cut the last
        clip.write_file(log, lambda f: f.write("".join(kept).encode()))
    return checkpoint


def log_line(out, **values):
    """Append one object to <out>/log.jsonl."""
    path = os.path.join(out, "log.jsonl")
    try:
        with open(path, "a") as f:
            f.write(json.dumps(values) + "\n")
    except OSError as e:
        raise clip.CheckpointError(f"{path}: cannot be written ({e.strerror}); free space, then --resume") from None


def write_json(path, value):
    clip.write_file(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))


# ---------------------------------------------------------------- the command

def restore(path, device=None, clip_path=None):
    """-> (model, tokenizer, checkpoint) of a checkpoint file. The script it names rebuilds the model; no other module is imported.
    clip_path: where the CLIP lies now that a checkpoint without one (an adapter's) belongs to."""
    checkpoint = clip.load_checkpoint(path)
    if checkpoint.get("method") not in METHODS:
        raise clip.CheckpointError(f"{path}: made by {checkpoint.get('method')!r}, which is none of {', '.join(METHODS)}")
    if clip_path:
        checkpoint["settings"]["clip"] = clip_path
    model = importlib.import_module(checkpoint["method"]).restore(checkpoint, path)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model, model.tokenizer or (model.config and clip.default_tokenizer()), checkpoint  # no config: it reads features, not words


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
    p.add_argument("--clip", help="the CLIP that an adapter belongs to, where it lies elsewhere now")
    p.add_argument("--data", help="default: the data the model was trained on")
    p.add_argument("--root", help="folder of the data set")
    p.add_argument("--split", default="test")
    p.add_argument("--gallery", metavar="PNG", help="write a picture of queries and their top results, or of what is predicted")
    p.add_argument("--attention", metavar="PNG", help="write a picture of what a model with attention between the modalities looks at")
    p.add_argument("--query", help="search the split's images with your own words (videos: the mean of their frames)")
    p.add_argument("--top", type=positive_int, default=5, help="results of --query")
    p.add_argument("--device", type=usable_device)
    p.add_argument("--workers", type=whole, default=0)
    p.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto")
    p.add_argument("--out", help="folder for metrics.json (default: the checkpoint's)")
    args = p.parse_args(argv)

    model, tokenizer, checkpoint = restore(args.checkpoint, args.device, args.clip)
    method = importlib.import_module(checkpoint["method"])
    if next(model.parameters()).device.type == "cpu":
        clip.fast_float32()
    settings = checkpoint["settings"]
    name = args.data or settings["data"]
    root = args.root or (settings["root"] if name == settings["data"] else None)
    if args.attention and not hasattr(method, "attention_picture"):
        raise clip.CheckpointError(f"--attention: {checkpoint['method']} has no attention between the modalities; train_cmaclip has")
    if args.query is not None and not (hasattr(model, "encode_text") and tokenizer):
        raise clip.CheckpointError(f"--query: this model of {checkpoint['method']} reads no words to search with")
    if hasattr(method, "evaluation") and args.query is None:  # a method with metrics of its own
        found, text = method.evaluation(model, checkpoint, name, root, args.split, args.amp, args.workers)
    else:
        instances, _ = (data.load_regions if checkpoint.get("regions") else data.load)(name, root, args.split)
        images, texts = embed(model, instances, tokenizer, args.amp, args.workers)
        if args.query is not None:
            return answer(model, tokenizer, instances, images, args)
        found = retrieval_rows(name, images, texts, instances)
        text = table({row.replace("model", f"{name} {args.split}"): metrics for row, metrics in found.items()}, shapes=name in ("primitives", "text2shape"))
    print(text)
    path = os.path.join(args.out or os.path.dirname(args.checkpoint) or ".", "metrics.json")
    kept = {}
    if os.path.exists(path):
        with contextlib.suppress(ValueError), open(path) as f:
            kept = json.load(f)
    write_json(path, kept | {args.split if name == settings["data"] else f"{name} {args.split}": found})
    print(f"written to {path}")
    if args.gallery:
        if hasattr(method, "gallery"):
            method.gallery(model, checkpoint, name, root, args.split, args.gallery)
        else:
            draw_gallery(args.gallery, instances, lambda c: images @ texts[c], lambda i: texts @ images[i])
        print(f"written to {args.gallery}")
    if args.attention:
        method.attention_picture(model, checkpoint, name, root, args.split, args.attention)
        print(f"written to {args.attention}")


def answer(model, tokenizer, instances, images, args):
    """Print what --query finds among the images, and draw it where --gallery asks for it."""
    words = tokenizer([args.query], model.config.context_length, truncate=True).to(images.device)
    with torch.no_grad():
        query = F.normalize(model.encode_text(words).float(), dim=-1)
    found_scores, found = search(query, images, min(args.top, len(instances)))
    for s, i in zip(found_scores[0].tolist(), found[0].tolist()):
        print(f"{s:6.3f}  {instances[i].id}  {instances[i].captions[0]}")
    if args.gallery:
        gallery_picture(args.gallery, [(args.query, [(data.pixels(instances[i].images[0], CELL), None) for i in found[0].tolist()])])


if __name__ == "__main__":
    with one_line_errors():
        main()
