"""Evaluation: metrics, tables, pictures, the evaluation command; and what every script has around its loop.

    python eval.py --checkpoint runs/mxm-primitives                         # one table, and metrics.json
    python eval.py --checkpoint runs/mxm-primitives --split unseen --gallery out.png
    python eval.py --checkpoint runs/mxm-primitives --query "a tall red cone" "a blue ball"
    python eval.py --checkpoint runs/mxm-a runs/user-b                      # the mean of their similarities
    python eval.py --checkpoint runs/mxm-primitives --embeddings out.npz
    python eval.py --clip ViT-B/32 --data mine.csv                          # any CLIP as it is, zero-shot
    python eval.py --clip ViT-B/32 --data pictures/ --query "a red cone"    # search a folder
    python eval.py --curves runs/mxm-a runs/mxm-b --out curves.png          # loss and score over steps

This file knows nothing of how a model was trained: a checkpoint names its script, whose `restore` rebuilds
the model. The first half (metrics, a model on a data set, pictures) is for reading results. The second half
(arguments, processes, `Run`) keeps the training loops of the scripts short.
"""
import argparse
import contextlib
import datetime
import hashlib
import importlib
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import clip
import data

TIE = 1e-6  # scores closer than this are equal: rounding differs between the rows of one matrix product
FEATURES = os.path.join("runs", "features")  # of galleries that --query has searched
BLOCK = 1 << 22  # scores held at a time: larger is slower, because memory is mapped anew for every block
SAVE_SECONDS = 300  # last.pt is written after every epoch, and at least this often
WAYS = ("text_to_image", "image_to_text")
ALL = slice(None)


# ---------------------------------------------------------------- retrieval metrics
# scores: a function (begin, end) -> the scores of these queries with the whole gallery, (end - begin, G), so
# that memory grows with the block and not with queries x gallery; or a tensor (Q, G). An item is relevant to
# a query of the same group. query_group (Q,), gallery_group (G,): any integers.

def relevant_items(query_group, gallery_group):
    """-> order (G,), begin (Q,), end (Q,): order[begin[q]:end[q]] are the relevant items of query q."""
    query_group = np.asarray(query_group)
    gallery_group = np.asarray(gallery_group)
    order = np.argsort(gallery_group, kind="stable")
    begin = np.searchsorted(gallery_group[order], query_group, side="left")
    end = np.searchsorted(gallery_group[order], query_group, side="right")
    if (begin == end).any():
        raise ValueError(f"query {(begin == end).argmax()} has no relevant item in the gallery")
    return order, begin, end


def at_least(values, bounds):
    """(K,): how many of the values (n,) are at or above each of the bounds (K,)."""
    if len(bounds) <= 16:  # counting is faster than sorting
        return np.array([np.count_nonzero(values >= bound) for bound in bounds])
    return len(values) - np.searchsorted(np.sort(values), bounds, side="left")


def ranks(scores, query_group, gallery_group, k=None):
    """Yield (place, count) of blocks of queries: where the relevant items stand in their rankings, at worst.

    place: float64 (b, K), the 1-based positions of a query's best, second best, ... relevant item; inf where
    it has fewer. K is the most that a query of the block has, or k where that is less. count (b,): how many.

    A position counts every irrelevant item that scores higher *or equal*, so a constant score earns nothing.
    Raises CheckpointError (a ValueError: the model is at fault) for a NaN score.
    """
    order, begin, end = relevant_items(query_group, gallery_group)
    step = max(1, BLOCK // max(1, len(order)))
    for first in range(0, len(begin), step):
        block = slice(first, first + step)
        rows = scores[block] if isinstance(scores, torch.Tensor) else scores(first, first + step)
        rows = (rows if rows.dtype == torch.float32 else rows.double()).cpu().numpy()
        if np.isnan(rows.max()):  # the greatest of numbers among which one is NaN is NaN
            raise clip.CheckpointError("NaN in the scores; a model that gives NaN cannot be ranked")
        count = end[block] - begin[block]
        K = count.max() if k is None else min(k, count.max())
        place = np.full((len(rows), K), math.inf)
        for row, i, j, out in zip(rows, begin[block], end[block], place):
            relevant = np.sort(row[order[i:j]])[::-1]
            best = relevant[:K]
            bound = best - row.dtype.type(TIE)
            irrelevant_above = at_least(row, bound) - at_least(relevant, bound)
            out[:len(best)] = np.arange(1, len(best) + 1) + irrelevant_above
        yield torch.from_numpy(place), torch.from_numpy(count)


def ranking_metrics(scores, query_group, gallery_group, ks=(1, 5, 10), average_precision=False):
    """Retrieval metrics, averaged over queries -> a dict, with percentages in 0..100:

      R@k     queries with a relevant item among the first k (Text2Shape's RR@k)
      P@k     relevant items among the first k, divided by k
      NDCG@k  sum over relevant positions p <= k of 1 / log2(p + 1), divided by the most that it could be
      MRR     mean of 1 / position of the first relevant item
      MedR    median position of the first relevant item (a position, no percentage)
      MeanR   its mean position
      mAP     if asked for: mean over relevant items of (relevant items up to it) / position, over queries

    Raises ValueError for NaN scores and for a query without a relevant item.
    """
    discount = 1 / torch.log2(torch.arange(2, max(ks) + 2, dtype=torch.float64))
    sums = Counter()
    first = []
    for place, count in ranks(scores, query_group, gallery_group, None if average_precision else max(ks)):
        first.append(place[:, 0])
        for k in ks:
            inside = place <= k
            ideal = discount[:k].cumsum(0)[count.clamp(max=k) - 1]
            gain = torch.where(inside, 1 / torch.log2(place + 1), 0.0).sum(1)
            sums[f"R@{k}"] += inside[:, 0].sum().item()
            sums[f"P@{k}"] += inside.sum().item() / k
            sums[f"NDCG@{k}"] += (gain / ideal).sum().item()
        sums["MRR"] += (1 / place[:, 0]).sum().item()
        if average_precision:
            precision = torch.arange(1, place.shape[1] + 1) / place
            sums["mAP"] += (precision.sum(1) / count).sum().item()
    first = torch.cat(first)
    out = {name: 100 * value / len(first) for name, value in sums.items()}
    return out | {"MedR": float(np.median(first.numpy())), "MeanR": first.mean().item()}


def mean_of(several):
    """The mean of several dicts of metrics, metric by metric."""
    return {name: float(np.mean([metrics[name] for metrics in several])) for name in several[0]}


def cosine_scores(images, texts):
    """-> (text_scores, image_scores) of features of unit norm, images (N, D) and texts (C, D). These are
    functions of the indices of some texts (b,) -> their cosines with all images (b, N), and of the indices of
    some images (b,) -> their cosines with all texts (b, C). They compute on the CPU."""
    images, texts = images.float().cpu(), texts.float().cpu()
    return (lambda indices: texts[indices] @ images.t()), (lambda indices: images[indices] @ texts.t())


def both_ways(metrics, scores, image_group, text_group, image_query=ALL, text_query=ALL):
    """{way: metrics(scores, query_group, gallery_group)} of both directions. scores: two functions, as of
    `cosine_scores`. image_group (N,), text_group (C,): integers. image_query (N,), text_query (C,): bool,
    which rows are asked about (default: all); all are searched."""
    out = {}
    ways = (scores[0], text_query, text_group, image_group), (scores[1], image_query, image_group, text_group)
    for way, (scores_of, query, group, gallery_group) in zip(WAYS, ways):
        asked = torch.arange(len(group))[query]

        def of_block(begin, end):
            return scores_of(asked[begin:end])
        out[way] = metrics(of_block, group[asked], gallery_group)
    return out


def with_rsum(row):
    """{way: metrics} and rSum, the sum of R@1, 5 and 10 of both ways (0..600)."""
    return row | {"rSum": sum(row[way][f"R@{k}"] for way in WAYS for k in (1, 5, 10))}


def score_metrics(scores, *groups, **more_groups):
    """`ranking_metrics` of both directions and rSum. Arguments as of `both_ways`."""
    return with_rsum(both_ways(ranking_metrics, scores, *groups, **more_groups))


def retrieval_metrics(images, texts, *groups, **more_groups):
    """`score_metrics` by the cosine of features of unit norm: images (N, D), texts (C, D)."""
    return score_metrics(cosine_scores(images, texts), *groups, **more_groups)


def chance(query_group, gallery_group, ks=(1, 5, 10), average_precision=False):
    """The expected `ranking_metrics` of a random order, in closed form. MedR is the first position that half
    of the queries have reached. mAP: of R relevant items among G, a place holds one with probability R / G;
    then (R - 1) / (G - 1) of the places before it do."""
    _, begin, end = relevant_items(query_group, gallery_group)
    count = torch.from_numpy(end - begin)
    G = len(gallery_group)
    place = torch.arange(1, G + 1, dtype=torch.float64)
    discount = 1 / torch.log2(place + 1)
    first = torch.zeros(G, dtype=torch.float64)  # how probably the first relevant item is at each place
    ndcg = dict.fromkeys(ks, 0.0)
    for relevant, queries in zip(*(x.tolist() for x in count.unique(return_counts=True))):
        part = queries / len(count)
        here = (relevant / (G + 1 - place)).clamp(max=1)  # it is here, given that it was nowhere before
        first += part * here * torch.cat([torch.ones(1), (1 - here).cumprod(0)[:-1]])
        for k in ks:
            ndcg[k] += part * relevant / G * (discount[:k].sum() / discount[:min(k, relevant)].sum()).item()
    out = {f"R@{k}": first[:k].sum().item() for k in ks}
    out |= {f"P@{k}": count.double().mean().item() / G * min(k, G) / k for k in ks}
    out |= {f"NDCG@{k}": ndcg[k] for k in ks}
    out["MRR"] = (first / place).sum().item()
    if average_precision:
        inverse = (1 / place).mean()
        out["mAP"] = (inverse + (1 - inverse) * (count.double() - 1) / max(1, G - 1)).mean().item()
    out = {name: 100 * value for name, value in out.items()}
    return out | {"MedR": 1.0 + (first.cumsum(0) < 0.5).sum().item(), "MeanR": (first * place).sum().item()}


def search(queries, gallery, k):
    """The k best gallery rows of each query (Q, D) by dot product -> (scores (Q, k), index (Q, k)).

    gallery: (G, D), or a list of its parts. Best first; of equal scores the smaller index comes first. Raises
    CheckpointError for NaN.
    """
    if not isinstance(gallery, torch.Tensor):
        gallery = torch.cat(list(gallery))
    gallery = gallery.float()
    best = []
    index = []
    for some in queries.float().split(max(1, BLOCK // max(1, len(gallery)))):
        scores, order = (some @ gallery.t()).sort(dim=1, descending=True, stable=True)
        if scores[:, :1].isnan().any():  # NaN sorts as the greatest
            raise clip.CheckpointError("NaN in the scores; a model that gives NaN cannot be searched")
        best.append(scores[:, :k].clone())  # a view would keep the whole block
        index.append(order[:, :k].clone())
    return torch.cat(best), torch.cat(index)


# ---------------------------------------------------------------- metrics by class

SCOPES = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


def class_metrics(scores, query_label, gallery_label, classes):
    """Supervised retrieval: an item is relevant to queries of its class, and the whole ranking counts.

    scores as above; labels: int64 (Q,), (G,), 0 or more; classes: their names. Returns percentages in 0..100:

      mAP, P@k          as in `ranking_metrics`, for the k of SCOPES up to the size of the gallery
      per_class         {class: mAP of its queries}; a class without queries is left out
      precision_recall  {"recall": 0, 10, ..., 100, "precision": the best at that recall or a higher one}
      precision_scope   {"scope": k, "precision": P@k}

    Raises ValueError for NaN scores and for a query whose class the gallery lacks.
    """
    query_label = torch.as_tensor(query_label)
    scopes = [k for k in SCOPES if k <= len(gallery_label)]
    levels = torch.arange(11, dtype=torch.float64) / 10
    at_scope = torch.zeros(len(scopes), dtype=torch.float64)
    at_recall = torch.zeros(11, dtype=torch.float64)
    average_precision = []
    for place, count in ranks(scores, query_label, gallery_label):
        precision = torch.arange(1, place.shape[1] + 1) / place  # (b, K); 0 past a query's last item
        average_precision.append(precision.sum(1) / count)
        at_scope += torch.stack([(place <= k).sum().double() / k for k in scopes])
        best = precision.flip(1).cummax(1).values.flip(1)
        needed = (levels[None, :] * count[:, None] - 1e-9).ceil().long().clamp(min=1)  # items of each recall
        at_recall += best.gather(1, needed - 1).sum(0)
    average_precision = torch.cat(average_precision)
    at_scope = (100 * at_scope / len(query_label)).tolist()
    at_recall = (100 * at_recall / len(query_label)).tolist()
    per_class = {}
    for c, name in enumerate(classes):
        if (query_label == c).any():
            per_class[name] = 100 * average_precision[query_label == c].mean().item()
    return {"mAP": 100 * average_precision.mean().item(),
            **{f"P@{k}": p for k, p in zip(scopes, at_scope)},
            "per_class": per_class,
            "precision_recall": {"recall": (100 * levels).tolist(), "precision": at_recall},
            "precision_scope": {"scope": scopes, "precision": at_scope}}


def class_chance(scores, query_label, gallery_label):
    """The mAP of a random order, in the place of `class_metrics`."""
    return {"mAP": chance(query_label, gallery_label, average_precision=True)["mAP"]}


def class_retrieval(metrics, scores, labels, captions, query):
    """`class_metrics` of some classes, or `class_chance`, both ways, and the average mAP. scores: two
    functions, as of `cosine_scores`; labels (N,); captions (N,): how many texts each instance has; query bool
    (N,)."""
    labels = torch.as_tensor(labels)
    query = torch.as_tensor(query)
    owner = torch.arange(len(labels)).repeat_interleave(torch.as_tensor(captions))
    row = both_ways(metrics, scores, labels, labels[owner], query, query[owner])
    return row | {"mAP": (row["image_to_text"]["mAP"] + row["text_to_image"]["mAP"]) / 2}


def classification_metrics(probabilities, labels, thresholds=None):
    """Classification metrics of one task, in percent (0..100); None where no row is labelled.

    probabilities (N, C), labels int64 (N,) in -1..C-1; rows of -1 are left out.

      accuracy   the most probable class is right; of equally probable ones the worst counts, so that a
                 constant earns nothing
      macro_f1   mean over the classes among labels or predictions of F1 = 2 TP / (2 TP + FP + FN)
      recall_at_precision   with thresholds (C,) from `precision_thresholds`: the share of a class's rows
                 that are at or above its threshold, mean over the classes among the labels
      precision  what these thresholds reached here

    Raises CheckpointError for NaN.
    """
    if torch.isnan(probabilities).any():
        raise clip.CheckpointError("NaN in the predictions; a model that gives NaN cannot be evaluated")
    probabilities, labels = probabilities[labels >= 0], labels[labels >= 0]
    if not len(labels):
        return None
    C = probabilities.shape[1]
    true = F.one_hot(labels, C).bool()
    best_wrong = probabilities.masked_fill(true, -math.inf).max(1)
    right = probabilities.gather(1, labels[:, None])[:, 0] > best_wrong.values
    predicted = F.one_hot(torch.where(right, labels, best_wrong.indices), C).bool()
    hits = (predicted & true).sum(0)  # TP
    total = predicted.sum(0) + true.sum(0)  # 2 TP + FP + FN
    f1 = (2 * hits.double() / total.clamp(min=1))[total > 0]
    out = {"accuracy": 100 * right.double().mean().item(), "macro_f1": 100 * f1.mean().item()}
    if thresholds is not None:
        above = probabilities >= thresholds
        recall = (above & true).sum(0).double() / true.sum(0).clamp(min=1)
        out["recall_at_precision"] = 100 * recall[true.any(0)].mean().item()
        out["precision"] = 100 * (above & true).sum().item() / max(1, above.sum().item())
    return out


def precision_thresholds(probabilities, labels, precision):
    """(C,): the lowest probability of each class at which its predictions are right often enough. At or above
    a class's threshold, a share of at least `precision` (0..1) of the rows is of the class; inf where no
    threshold reaches that. Chosen on validation data and used on test data. Arguments as in
    `classification_metrics`."""
    probabilities, labels = probabilities[labels >= 0], labels[labels >= 0]
    out = torch.full((probabilities.shape[1],), math.inf, dtype=probabilities.dtype)
    for c in range(len(out)):
        value, order = probabilities[:, c].sort(descending=True)
        wanted = precision * torch.arange(1, len(order) + 1, dtype=torch.float64) - 1e-9
        reached = (labels[order] == c).cumsum(0) >= wanted
        last = torch.ones(len(value), dtype=torch.bool)  # of equal probabilities: all are taken, or none
        last[:-1] = value[1:] < value[:-1]
        if (reached & last).any():
            out[c] = value[reached & last][-1]
    return out


def task_metrics(probabilities, labels, weights=None, thresholds=None):
    """Metrics of a model of several tasks -> {task: metrics}, and as "mean_of_tasks" the mean of each metric.

    probabilities: {task: (N, C)}; labels: {task: int64 (N,)}; thresholds: a list of (C,), one for each task.
    The metrics are those of `classification_metrics`. A task that no row has a label of is left out.
    weights (N, tasks, 2): of image and text, in 0..1; `image_weight` is the mean of the image's, in percent.

    Raises DataError where no task has a label.
    """
    tasks = {}
    for k, task in enumerate(probabilities):
        metrics = classification_metrics(probabilities[task], labels[task], thresholds and thresholds[k])
        if metrics is None:
            continue
        if weights is not None:
            metrics["image_weight"] = 100 * weights[:, k, 0].mean().item()
        tasks[task] = metrics
    data.expect(tasks, "nothing to evaluate", "no instance has a label that the model knows, of "
                f"{' or '.join(probabilities)}")
    return tasks | {"mean_of_tasks": mean_of(list(tasks.values()))}


def predict(model, loader, amp="auto", corrupt=None, seed=0):
    """What a classifier of image and text says of the N pairs of an evaluation loader.

    model: images (B, 3, S, S), tokens (B, columns) -> ({task: logits (B, C)}, weights (B, tasks, 2) or None).
    corrupt: a function (images, tokens) -> both, that draws from torch's global generator, which is seeded by
        `seed` and the batch.

    -> (probabilities, labels, weights), on the CPU, as `task_metrics` takes them.
    """
    results = []
    with evaluating(model):
        for batch in loader.batches():
            batch = data.to_device(batch, next(model.parameters()).device)
            images = batch["images"][:, 0]
            tokens = batch["tokens"][:, 0]
            if corrupt:
                data.seed_step(seed, int(batch["index"][0]))
                images, tokens = corrupt(images, tokens)
            with clip.autocast(amp, model.clip):
                results.append((*model(images, tokens), batch["labels"]))
    logits, weights, labels = zip(*results)  # of each batch
    probabilities = {}
    for task in logits[0]:
        probabilities[task] = torch.cat([x[task].float() for x in logits]).softmax(-1).cpu()
    labels = {task: torch.cat([x[task] for x in labels]).cpu() for task in probabilities}
    weights = None if weights[0] is None else torch.cat(weights).float().cpu()
    return probabilities, labels, weights


def majority(labels):
    """{task: {"accuracy"}} of always naming the commonest class; labels as in `task_metrics`."""
    out = {}
    for task, numbers in labels.items():
        known = numbers[numbers >= 0]
        if len(known):
            out[task] = {"accuracy": 100 * (known == known.mode().values).sum().item() / len(known)}
    return out


def task_table(split, rows, classes, precision):
    """The text of a table of tasks: a line for each task, for their mean, and for each kind of noise.

    rows: {"model": of `task_metrics`, "majority": of `majority`}, and with a study of noise
        "noise": {kind: {share: of `task_metrics`}}.
    classes: {task: names of its classes}; precision: of the thresholds.
    """
    mean = rows["model"]["mean_of_tasks"]
    titles = {"accuracy": "accuracy", "macro_f1": "macro F1",
              "recall_at_precision": f"R@P{100 * precision:.0f}".rjust(8), "image_weight": "image weight"}
    titles = {name: title for name, title in titles.items() if name in mean}
    width = max(map(len, rows["model"]))
    lines = ["  ".join([split.ljust(width), "classes", "majority", *titles.values()])]
    for task, metrics in rows["model"].items():
        start = f"{'mean':{width}}  {'':7}  {'':8}"
        if metrics is not mean:
            start = f"{task:{width}}  {len(classes[task]):7}  {rows['majority'][task]['accuracy']:8.1f}"
        cells = [f"{metrics[name]:{len(title)}.1f}" for name, title in titles.items()]
        lines.append("  ".join([start, *cells]))
    for kind, study in rows.get("noise", {}).items():
        cells = [f"{100 * float(share):.0f}%: {metrics['mean_of_tasks']['accuracy']:.1f}"
                 for share, metrics in study.items()]
        lines.append(f"noise in {kind:5}: " + "   ".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------- a model on a data set

@contextlib.contextmanager
def evaluating(model):
    """The model in evaluation mode and without gradients; then it goes back to the mode that it was in."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


@torch.no_grad()
def encode_images(model, loader, amp):
    """Yield (features, image_mask) of each batch of a loader. features (A, D): of all views of the batch, as
    the model gives them; image_mask (B, V): where they belong."""
    device = next(model.parameters()).device
    for batch in loader.batches():
        batch = data.to_device(batch, device)
        with clip.autocast(amp, model):
            features = model.encode_image(batch["images"][batch["image_mask"]])
        yield features.float(), batch["image_mask"]


@torch.no_grad()
def encode_texts(model, loader, amp):
    """Yield the features of a loader's captions, (256, D) at a time, as the model gives them."""
    for tokens in loader.tokens.split(256):
        with clip.autocast(amp, model):
            features = model.encode_text(tokens)
        yield features.float()


def embed(model, instances, amp="auto", workers=0, loader=None):
    """Features of unit norm, float32, on the model's device. Returns images (N, D), the renormalised mean
    over an instance's views, and texts (C, D), all captions in order. loader: an `evaluation_loader` that was
    kept from an earlier call."""
    loader = loader or evaluation_loader(model, instances, workers)
    with evaluating(model):
        images = embed_images(model, loader, amp)
        texts = [F.normalize(features, dim=-1) for features in encode_texts(model, loader, amp)]
    return images, torch.cat(texts) if texts else images[:0]


def embed_images(model, loader, amp):
    """(N, D): of each instance of a loader the renormalised mean of its views' features of unit norm."""
    images = []
    for views, mask in encode_images(model, loader, amp):
        owner = torch.arange(len(mask), device=mask.device).repeat_interleave(mask.sum(1))
        sums = views.new_zeros(len(mask), views.shape[1]).index_add(0, owner, F.normalize(views, dim=-1))
        images.append(F.normalize(sums, dim=-1))
    return torch.cat(images)


def evaluation_loader(model, instances, workers=0, **options):
    """All views and captions in order; a batch holds about 256 pictures."""
    most = min(max(len(x.images) for x in instances), options.get("frames") or math.inf)
    return data.Loader(instances, tokenizer_of(model), model.config, max(1, 256 // most), workers=workers,
                       **options)


def evaluate(model, instances, amp="auto", workers=0, loader=None):
    """Retrieval metrics of a model on instances, both ways."""
    images, texts = embed(model, instances, amp, workers, loader)
    return retrieval_metrics(images, texts, **layout(instances))


def recalls(metrics):
    """One line of text about `retrieval_metrics` on val: R@1 text-to-image / image-to-text, and rSum."""
    to_image, to_text = (metrics[way]["R@1"] for way in WAYS)
    return f"val R@1 {to_image:.1f} / {to_text:.1f}, rSum {metrics['rSum']:.1f}"


def layout(instances):
    """What `both_ways` needs beside scores: a dict of its arguments."""
    numbers = {}
    group = torch.tensor([numbers.setdefault(x.group, len(numbers)) for x in instances])
    query = torch.tensor([x.query for x in instances])
    owner = caption_owner(instances)
    return dict(image_group=group, text_group=group[owner], image_query=query, text_query=query[owner])


def caption_owner(instances):
    """(C,): the number of the instance that each caption belongs to."""
    return torch.arange(len(instances)).repeat_interleave(torch.tensor([len(x.captions) for x in instances]))


@dataclass
class Embedded:
    """A split as a model sees it, or several models together: N instances with C captions, in order."""
    instances: list
    images: torch.Tensor  # (N, D), unit norm
    texts: torch.Tensor  # (C, D), unit norm
    tasks: dict  # {task: names of its classes}, whose numbers the instances' labels are
    classes: list = None  # names of the groups, where these are classes and metrics are those by class
    scores: tuple = None  # functions as of `cosine_scores`, which are these where the similarity is no other

    def __post_init__(self):
        self.scores = self.scores or cosine_scores(self.images, self.texts)


def averaged(parts):
    """The `Embedded` of a split by several models, whose scores are the means of the models' scores. Features
    are put side by side and divided by the root of the number of models: they have unit norm again, and their
    product is the mean of the models' cosines. Raises CheckpointError where the models do not rank the same
    things."""
    first = parts[0]
    for part in parts:
        same = part.classes == first.classes and len(part.instances) == len(first.instances)
        for x, y in zip(part.instances, first.instances):
            same = same and (x.id, x.group, x.captions) == (y.id, y.group, y.captions)
        clip.expect(same, "--checkpoint", "these models do not rank the same instances, captions and "
                    "classes; give models of one data set and one task")
    images = torch.cat([part.images for part in parts], dim=1) / math.sqrt(len(parts))
    texts = torch.cat([part.texts for part in parts], dim=1) / math.sqrt(len(parts))

    def text_scores(indices):
        return sum(part.scores[0](indices).cpu() for part in parts) / len(parts)

    def image_scores(indices):
        return sum(part.scores[1](indices).cpu() for part in parts) / len(parts)
    return Embedded(first.instances, images, texts, first.tasks, first.classes, (text_scores, image_scores))


def write_embeddings(path, embedded):
    """Write what --embeddings promises of an `Embedded` to an .npz file."""
    instances = embedded.instances
    arrays = {"images": embedded.images.cpu().numpy(), "texts": embedded.texts.cpu().numpy(),
              "ids": np.array([x.id for x in instances]), "groups": np.array([x.group for x in instances]),
              "owners": caption_owner(instances).numpy(),
              "captions": np.array([caption for x in instances for caption in x.captions], str)}
    for task, names in embedded.tasks.items():
        known = [*names, ""]  # -1, the number of an unlabelled instance, is the last place
        arrays[f"label_{task}"] = np.array([known[x.labels.get(task, -1)] for x in instances])
    clip.write_file(path, lambda f: np.savez(f, **arrays))


def fingerprint(model, instances, amp):
    """16 hex digits that change with a model's weights and with the pictures and captions it is shown."""
    known = [clip.identity(model), model.config, amp, tokenizer_of(model).merges]
    digest = hashlib.sha256(repr(known).encode())
    for x in instances:
        for image in x.images:  # a path, or a view that may have a file
            file = image if isinstance(image, str) else getattr(image, "file", None)
            stamp = (os.path.getsize(file), os.path.getmtime(file)) if file else ()
            digest.update(repr((image, *stamp)).encode())
        digest.update(repr((x.id, x.captions)).encode())
    return digest.hexdigest()[:16]


def kept(path, what, compute, device):
    """The tensor of a .npy file, on the CPU. Where it is not there, compute() makes it, and it is kept there.
    All processes must ask, since they compute it together; the first of each machine writes."""
    if not any_process(not os.path.exists(path), device):
        with clip.reading(path, "remove it, and it is computed again"):
            return torch.from_numpy(np.load(path))
    data.note(f"{what} are computed once and kept in {path}")
    check_writable(path)
    found = compute().cpu()
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        clip.write_file(path, lambda f: np.save(f, found.numpy()))
    return found


def frozen_features(model, instances, classes, cache, amp="auto", workers=0):
    """data.Features of a frozen CLIP, of every view and every caption by itself.

    They are computed once and kept in the folder `cache`. instances, classes: of data.by_class.
    """
    model.eval()
    device = next(model.parameters()).device
    loader = evaluation_loader(model, instances, workers, cache_bytes=0)  # each is read once
    name = os.path.join(cache, fingerprint(model, instances, amp))
    views = np.array([len(x.images) for x in instances])
    images = kept(f"{name}-image.npy", f"features of {views.sum():,} images",
                  lambda: torch.cat([part.cpu() for part, _ in encode_images(model, loader, amp)]), device)
    texts = kept(f"{name}-text.npy", f"features of {len(loader.tokens):,} texts",
                 lambda: torch.cat([part.cpu() for part in encode_texts(model, loader, amp)]), device)
    labels, captions, query = data.class_layout(instances, classes)
    return data.Features(images.numpy(), texts.numpy(), views, captions, labels, query)


# ---------------------------------------------------------------- tables

def retrieval_rows(name, embedded, fold=1000):
    """The rows of a retrieval table, {row: metrics}: "model", and those of `bounds`. For coco also "model, 1K
    folds": the mean over folds of 1,000 images in order, each with its own captions (its 5,000 test images
    are published whole, 5K, and as the mean of five folds, 1K). For msvd also "model, by video": a video is
    compared with other videos by the best of their captions, as in published figures."""
    instances = embedded.instances
    text_scores, image_scores = embedded.scores
    at = layout(instances)
    rows = {"model": score_metrics(embedded.scores, **at)}
    owner = caption_owner(instances)
    if name == "coco" and len(instances) > fold:
        folds = []
        for begin in range(0, len(instances) - fold + 1, fold):
            images = torch.arange(begin, begin + fold)
            texts = torch.isin(owner, images).nonzero()[:, 0]
            of_fold = (lambda indices: text_scores(texts[indices])[:, images],
                       lambda indices: image_scores(images[indices])[:, texts])
            folds.append(score_metrics(of_fold, **layout(instances[begin:begin + fold])))
        rows["model, 1K folds"] = with_rsum({way: mean_of([row[way] for row in folds]) for way in WAYS})
    if name == "msvd":
        def video_scores(begin, end):
            of_captions = image_scores(asked[begin:end]).cpu()  # (b, C)
            best = torch.full((len(of_captions), len(instances)), -math.inf)  # (b, N)
            return best.scatter_reduce(1, owner.expand_as(of_captions), of_captions, "amax")
        group = at["image_group"]
        asked = at["image_query"].nonzero()[:, 0]
        to_video = ranking_metrics(video_scores, group[asked], group)
        rows["model, by video"] = with_rsum(rows["model"] | {"image_to_text": to_video})
    return rows | bounds(name, instances)


def bounds(name, instances, draws=5, seed=0):
    """{"chance": metrics of a random ranking}, and for primitives also "ceiling". The ceiling is an oracle
    that reads every attribute a caption states and guesses among the instances that fit. It is the mean over
    `draws` random orders of what the oracle finds equally probable."""
    groups = layout(instances)
    rows = {"chance": both_ways(lambda scores, *groups: chance(*groups), (None, None), **groups)}
    if name == "primitives":
        # so large that unequal probabilities differ by more than the noise, and the noise by more than TIE
        probability = 1e9 * data.primitives_oracle(instances).double()  # (C, N)
        generator = torch.Generator().manual_seed(seed)
        results = []
        for _ in range(draws):
            noisy = probability + 1e3 * torch.rand(probability.shape, generator=generator)
            scores = (lambda indices: noisy[indices]), (lambda indices: noisy[:, indices].t())
            results.append(score_metrics(scores, **groups))
        rows["ceiling"] = {way: mean_of([row[way] for row in results]) for way in WAYS}
    return rows


def table(rows, shapes=False):
    """The text of a retrieval table. rows: {name: {"text_to_image": metrics, "image_to_text": metrics}}.
    shapes: with the columns and the words of Text2Shape."""
    item = "shape" if shapes else "image"
    heads = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MRR": "MRR", "MedR": "MedR", "MeanR": "MnR"}
    if shapes:
        heads = {"R@1": "RR@1", "R@5": "RR@5", "NDCG@5": "NDCG@5", "MRR": "MRR", "MedR": "MedR"}
    width = max(map(len, rows))
    span = 7 * len(heads)
    head = "".join(f"{name:>7}" for name in heads.values())
    lines = [f"{'':{width}}   {f'text-to-{item}':^{span}}   {f'{item}-to-text':^{span}}",
             f"{'':{width}}   {head}   {head}"]
    for name, row in rows.items():
        to_image, to_text = ["".join(f"{row[way][metric]:7.1f}" for metric in heads) for way in WAYS]
        lines.append(f"{name:{width}}   {to_image}   {to_text}")
    return "\n".join(lines)


def class_table(rows):
    """The text of a table of retrieval by class. rows: {name: as of `class_retrieval`}."""
    width = max(16, *map(len, rows))
    lines = [f"{'':{width}}    image-to-text    text-to-image   average   (mAP over the whole ranking)"]
    for name, row in rows.items():
        to_text = row["image_to_text"]["mAP"]
        to_image = row["text_to_image"]["mAP"]
        lines.append(f"{name:{width}} {to_text:16.1f} {to_image:16.1f} {row['mAP']:9.1f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures

GREEN, RED, GREY = (30, 150, 60), (200, 40, 40), (160, 160, 160)
CELL, PAD = 128, 8  # pixels: the side of a picture in a picture, and the space around it


def gallery_picture(path, rows):
    """Write a picture of queries and their results. rows: list of (query, [(result, right), ...]). A query or
    a result is a string or an RGB array (CELL, CELL, 3); right is a bool, or None where nothing is known.
    Right results are framed green, wrong ones red."""
    font = ImageFont.load_default(13)
    cell = CELL + 2 * PAD
    columns = 1 + max(len(results) for _, results in rows)
    canvas = Image.new("RGB", (cell * columns + PAD, (cell + PAD) * len(rows) + PAD), "white")
    draw = ImageDraw.Draw(canvas)

    def put(item, x, y):
        if not isinstance(item, str):
            canvas.paste(Image.fromarray(item), (x, y))
            return
        for width in range(24, 0, -1):  # characters a line: the most that fit
            lines = textwrap.wrap(item[:500], width)
            if all(font.getlength(line) <= CELL - 4 for line in lines):
                break
        if len(lines) > 7:
            lines = lines[:6] + ["..."]
        draw.multiline_text((x + 2, y + 2), "\n".join(lines), fill="black", font=font, spacing=3)

    for i, (query, results) in enumerate(rows):
        y = PAD + i * (cell + PAD)
        put(query, PAD, y + PAD)
        for j, (result, right) in enumerate(results):
            x = (j + 1) * cell + PAD
            colour = {True: GREEN, False: RED, None: GREY}[right]
            draw.rectangle((x, y + 2, x + cell - 5, y + cell - 2), outline=colour, width=4)
            put(result, x + PAD - 2, y + PAD)
    clip.write_file(path, lambda f: canvas.save(f, format="PNG"))


def draw_gallery(path, instances, scores, seed=0, rows=6, top=5):
    """A gallery of random queries of a split: `rows` text-to-image, then `rows` image-to-text.

    scores: two functions as of `cosine_scores`.
    """
    text_scores, image_scores = scores
    rng = np.random.default_rng(seed)
    at = layout(instances)
    captions = [caption for x in instances for caption in x.captions]

    def picture(i):
        return data.pixels(instances[i].images[0], CELL)

    def draw(asked):
        return rng.permutation(asked.nonzero().flatten().numpy())[:rows].tolist()

    def best(scores_of, index):
        scores = scores_of(torch.tensor([index]))[0]
        return scores.argsort(descending=True, stable=True)[:top].tolist()

    out = []
    for c in draw(at["text_query"]):
        right = at["image_group"] == at["text_group"][c]
        out.append((captions[c], [(picture(i), bool(right[i])) for i in best(text_scores, c)]))
    for i in draw(at["image_query"]):
        right = at["text_group"] == at["image_group"][i]
        out.append((picture(i), [(captions[c], bool(right[c])) for c in best(image_scores, i)]))
    gallery_picture(path, out)


def draw_predictions(path, pairs, probabilities, labels, classes, rows=10):
    """Draw a few random pairs with what a model takes them for, framed green where right, red where wrong.
    pairs: as of `data.pairs`. probabilities and labels of all of them: as in `task_metrics`. classes: {task:
    names of its classes}."""
    out = []
    for i in np.random.default_rng(0).permutation(len(pairs))[:rows]:
        results = [(pairs[i].captions[0], None)]
        for task in classes:
            best = int(probabilities[task][i].argmax())
            label = int(labels[task][i])
            text = f"{task}: {classes[task][best]} ({100 * probabilities[task][i, best]:.0f}%)"
            if label not in (-1, best):
                text += f", is {classes[task][label]}"
            results.append((text, None if label == -1 else best == label))
        out.append((data.pixels(pairs[i].images[0], CELL), results))
    gallery_picture(path, out)


def heat_picture(picture, word, weights, largest):
    """RGB array (CELL, CELL, 3): `picture` in pale grey, red where `weights` (h, w) exceed an even share. The
    word and its largest weight are written into it. largest: the weight that is drawn in full red."""
    even = 1 / weights.size
    heat = Image.fromarray(np.float32(weights - even) / max(largest - even, 1e-9))
    heat = np.asarray(heat.resize((CELL, CELL), Image.Resampling.BILINEAR))[..., None].clip(0, 1)
    pale = 0.35 * picture.mean(2, keepdims=True) + 0.65 * 255
    out = Image.fromarray((pale * (1 - 0.85 * heat) + np.array(RED) * 0.85 * heat).astype(np.uint8))
    text = f"{word[:12]}  {100 * weights.max():.0f}%"
    ImageDraw.Draw(out).text((3, 0), text, fill="black", font=ImageFont.load_default(13))
    return np.asarray(out)


@torch.no_grad()
def draw_attention(path, model, pairs, rows=6, columns=8):
    """Draw where each word of a few random pairs looks in the picture, and how a task weighs image and text.
    pairs: as of `data.pairs`; model: as in `predict`. Where it is `sequence_wise`, its attention(images,
    tokens) is (B, L, patches), how much each token looks at each patch."""
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:rows]]
    batch = data.to_device(evaluation_loader(model, pairs).make(0), next(model.parameters()).device)
    images = batch["images"][:, 0]
    tokens = batch["tokens"][:, 0]
    _, weights = model(images, tokens)
    maps = model.attention(images, tokens).cpu() if model.sequence_wise else None
    out = []
    for i, x in enumerate(pairs):
        picture = data.pixels(x.images[0], CELL)
        cells = [x.captions[0]]
        if maps is not None:
            side = math.isqrt(maps.shape[2])
            words = slice(1, int(tokens[i].argmax()))  # without start and end, whose id is the largest
            largest = maps[i, words].max().item()
            for id, heat in zip(tokens[i, words].tolist(), maps[i, words].numpy()):
                word = tokenizer_of(model).decode([id]).strip()
                cells.append(heat_picture(picture, word, heat.reshape(side, side), largest))
        if weights is not None:
            for task, (image, text) in zip(model.tasks, (100 * weights[i]).tolist()):
                cells.append(f"{task}: image {image:.0f}%, text {text:.0f}%")
        results = [(cell, None) for cell in cells]
        for begin in range(0, len(results), columns):
            out.append((picture if begin == 0 else "", results[begin:begin + columns]))
    gallery_picture(path, out)


def read_log(path):
    """-> [(line, what it holds)] of the complete lines of a log.jsonl: a kill can cut the last one."""
    lines = data.read_text(path).split("\n")[:-1]
    expected = "a line of log.jsonl, with a step; remove the line"
    rows = [data.parse_json(line, f"{path} line {number}", {"step": int}, expected)
            for number, line in enumerate(lines, 1)]
    return list(zip(lines, rows))


def draw_curves(path, runs):
    """Write a picture of the loss, and of the score on val that chooses best.pt, over the steps of runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise clip.CheckpointError("--curves: matplotlib draws them; pip install matplotlib") from None
    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    left.set(title="loss", xlabel="step")
    right.set(title="score on val", xlabel="step")
    logs = [os.path.join(run, "log.jsonl") for run in runs]
    for log, name in zip(logs, run_names(logs)):
        with clip.reading(log, "give the folder of a run that has been evaluated"):
            rows = [row for _, row in read_log(log)]
            evaluated = [row for row in rows if "val" in row]
            left.plot([row["step"] for row in rows], [row["loss"] for row in rows])
            scores = [row["score"] for row in evaluated]
            right.plot([row["step"] for row in evaluated], scores, marker=".", label=name)
    right.legend()
    clip.write_file(path, lambda f: figure.savefig(f, format="png"))


# ---------------------------------------------------------------- arguments

def number(kind, accept, name):
    """An argparse type: kind(text) where accept(value) is true, else an error that says it is not `name`."""
    def parse(text):
        value = kind(text)
        if not accept(value):
            raise argparse.ArgumentTypeError(f"{text} is not {name}")
        return value
    parse.__name__ = kind.__name__
    return parse


MOST = 2 ** 31 - 1  # of what is counted
positive_int = number(int, lambda v: 1 <= v <= MOST, f"a positive whole number, up to {MOST:,}")
non_negative_int = number(int, lambda v: 0 <= v <= MOST, f"a whole number of 0 or more, up to {MOST:,}")
positive = number(float, lambda v: 0 < v < math.inf, "a positive number")
non_negative = number(float, lambda v: 0 <= v < math.inf, "a number of 0 or more")
fraction = number(float, lambda v: 0 <= v <= 1, "a share from 0 to 1")
positive_fraction = number(float, lambda v: 0 < v <= 1, "a share over 0, up to 1")
vocabulary = number(int, lambda v: 514 <= v <= MOST,
                    "514 or more (every byte, inside and at the end of a word, start and end)")
any_size = number(int, lambda v: v >= 0, "a whole number of 0 or more")


def seed(text):
    """An argparse type: a whole number of any size, which becomes one that all generators take."""
    value = any_size(text)
    if value < 2 ** 63:
        return value
    return int(np.random.SeedSequence(value).generate_state(1, np.uint64)[0]) >> 1


def usable_device(text):
    """An argparse type: the name of a device that this machine has."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError):  # no such name, or a kind that this machine does not have
        choices = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; try {choices}") from None
    return text


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, without the usage text (--help has it)."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def arguments(description, file, kinds, data="primitives"):
    """A parser with the arguments that every script has, in the same words; the script adds its own.

    file: the script's, whose name is that of the method: a copy of a script is a method of its own.
    kinds: {kind of run: its settings}, such as {"from scratch": {"lr": 1e-3}, "pretrained": {"lr": 1e-5}}; a
        kind that has the name of a data set is for pretrained weights on it. `parse` fills these in.
    data: the data set that is used where none is named.
    """
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.kinds = kinds
    p.method = os.path.splitext(os.path.basename(file))[0]
    p._optionals.title = "of this method"
    common = p.add_argument_group("common to all scripts").add_argument
    common("--data", default=data, help="a data set's name, or a .jsonl or .csv file of your own")
    common("--root", help="folder of the data set (default: data/<name>)")
    common("--download", action=argparse.BooleanOptionalAction, default=True,
           help="fetch the data set where it is not there and that is possible (text2shape)")
    common("--crop", type=fraction, metavar="AREA",
           help="train on random crops of at least this share of a picture, half of them mirrored where no "
                "caption says left or right; 0: whole pictures (default: for photos and your own data 0.5 "
                "from scratch, 0.9 with pretrained weights; off for shapes and videos)")
    common("--clip", help="the CLIP to start from. Pretrained: a published name, a file or a folder; from "
                          "scratch: tiny or small (default: ViT-B/32; for the built-in shapes a tiny one)")
    common("--image-size", type=positive_int, help="pixels of a picture's side (default: what the CLIP has)")
    common("--context", type=positive_int,
           help="tokens of a text that are read, start and end among them (default: what the CLIP has "
                "positions for: 32 of tiny, 48 of small, 77 of published ones)")
    common("--vocab-size", type=vocabulary, default=1024,
           help="symbols of the vocabulary learned for a model from scratch")
    common("--epochs", type=positive_int,
           help="passes over the training instances; of train_user.py and train_adapter.py over the "
                "image-caption pairs, as the papers count")
    common("--batch-size", type=positive_int, help="instances (or pairs) per step, over all processes")
    common("--lr", type=positive, help="peak learning rate")
    common("--weight-decay", type=non_negative, help="weight decay of AdamW")
    common("--eval-every", type=positive_int,
           help="epochs between evaluations on val (default: so many that a run has five at most)")
    common("--seed", type=seed, default=0,
           help="seed of everything that is drawn at random: a whole number of any size")
    machine_arguments(common)
    common("--compile", action="store_true", help="torch.compile the encoders' blocks")
    common("--resume", action="store_true", help="go on from <out>/last.pt, with the settings that it has")
    common("--out", help="folder of the run (default: runs/<method>-<data>)")
    return p


def machine_arguments(add, workers=None):
    """Where and how a model runs. workers: how many by default; None: as the device needs."""
    shown = "1; 0 where a CPU computes on all of its cores" if workers is None else workers
    add("--device", type=usable_device, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--workers", type=non_negative_int, default=workers,
        help=f"processes that prepare batches (default: {shown})")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="bfloat16 autocast in the encoders")


def show_defaults(parser):
    """Let --help say the default of every option, of each kind of run where they differ."""
    for action in parser._actions:
        of_kinds = {k: values[action.dest] for k, values in parser.kinds.items() if action.dest in values}
        if len(set(of_kinds.values())) > 1:
            default = ", ".join(f"{kind} {value}" for kind, value in of_kinds.items())
        else:
            default = next(iter(of_kinds.values()), action.default)
        if not (default is None or default is False or default == argparse.SUPPRESS):
            plain, _, _ = (action.help or "").partition(" (default: ")  # a general one, as of --context
            action.help = f"{plain} (default: {default})"


def parse(parser, argv=None):
    """The arguments of a script's command line, with the defaults of its kind of run. Real data start from a
    real CLIP, the built-in shapes from a small one: tiny with random weights, or for a script that trains
    none from scratch SMALL_CLIP. With --resume, what is not named is as it was in the run."""
    show_defaults(parser)
    args = parser.parse_args(argv)
    data_name, _ = os.path.splitext(os.path.basename(args.data))
    out = args.out or os.path.join("runs", f"{parser.method.removeprefix('train_')}-{data_name}")
    config = os.path.join(out, "config.json")
    before = {}
    if args.resume and os.path.exists(config):
        before = data.read_json(config, {"data": str}, "settings")
        parser.set_defaults(**{name: value for name, value in before.items() if hasattr(args, name)})
        args = parser.parse_args(argv)
    built_in = args.data.startswith("primitives")
    if args.clip is None and built_in:
        args.clip = "tiny" if "from scratch" in parser.kinds else SMALL_CLIP
    args.clip = args.clip or "ViT-B/32"
    kinds = ("from scratch" if args.clip in clip.SCRATCH else "", args.data,
             "built-in shapes" if built_in else "", "pretrained")
    kind = next(kind for kind in kinds if kind in parser.kinds)
    for name, value in parser.kinds[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers is None:
        on_cpu = args.device == "cpu" or not torch.cuda.is_available()
        args.workers = 0 if on_cpu and torch.get_num_threads() >= os.cpu_count() else 1
    args.eval_every = args.eval_every or math.ceil(args.epochs / 5)
    args.method = parser.method
    args.out = out
    args.trained_on = before.get("trained_on")  # of `note_training_data`
    return args


@contextlib.contextmanager
def one_line_errors():
    """Turn bad input into one line on stderr and exit code 2, Ctrl-C outside the loop into 130. A bug keeps
    its traceback. What a console cannot show is written with backslashes. One of several processes ends here,
    without what Python does at its end while gloo's threads go on: it could be aborted ("terminate called
    without an active exception"), and in torch 2.6 wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # a progress line may stand there
    code = 0
    try:
        yield
    except (clip.CheckpointError, data.DataError) as e:
        print(f"{clear}error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{clear}stopped", file=sys.stderr)
        code = 130
    except BaseException as e:
        if not dist.is_initialized():
            raise
        code = exit_code(e)
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    elif code:
        sys.exit(code)


def exit_code(error):
    """Print what Python prints where `error` ends it. Returns the exit code that Python ends with."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


# ---------------------------------------------------------------- processes, data and CLIP of a run

def join(args):
    """Join the processes that torchrun started (gloo on CPU, nccl on GPU) and seed every generator. Returns
    the device that this process computes on."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)  # which asks for a number
    else:
        clip.fast_float32()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        forever = datetime.timedelta(days=1)  # the others wait while the first downloads or pretrains
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=forever)
    data.seed_everything(args.seed)
    return device


def processes():
    """-> (the number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_process(flag, device):
    """True where the flag is set on any process, so that all of them do the same. All must ask."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first():
    """The first process runs the block while the others wait; then they run it and find what it has made."""
    first = processes()[0] == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def note_training_data(args, content, classes):
    """Keep a hash of the training data, an iterable of bytes or arrays, and {task: classes} in the settings.
    Returns what they were when the run began, where that was something else, which a note says; or None."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    before = args.trained_on
    args.trained_on = {"hash": digest.hexdigest()[:16], "classes": classes}
    if before in (None, args.trained_on):
        return None
    data.note(f"{args.data}: the training data have changed since this run began; it goes on with its own "
              "vocabulary and classes")
    return before


def load_splits(args, load=None):
    """-> [(instances, classes) of train, of val, of test], fetched first unless --no-download refuses. load:
    a function (name, root, split) in place of data.load. What is missing in test is said before training. A
    --crop that was not given is chosen by the kind of data and CLIP (`data.default_crop`). A run that goes on
    with other data keeps its classes; one that it does not know is refused."""
    if args.download:
        with rank_zero_first():
            data.fetch_missing(args.data, args.root)
    if load:
        splits = [load(args.data, args.root, split) for split in data.SPLITS]
    else:
        splits = data.load_splits(args.data, args.root)
    train, classes = splits[0]
    if args.crop is None:
        args.crop = data.default_crop(args.data, train, args.clip not in clip.SCRATCH) or 0.0
    content = (repr((x.id, x.captions, x.labels)).encode() for x in train)
    before = note_training_data(args, content, classes)
    if before:
        known = args.trained_on["classes"] = before["classes"]
        learns = {"task", "tasks"} & set(vars(args))  # labels; other methods do without them
        for task, names in classes.items() if learns else ():
            new = sorted(set(names) - set(known.get(task, names)))
            data.expect(not new, f"--resume: {args.data}", f"{task} = {', '.join(new)[:100]} is new, and the "
                        "run has no place for it; start a new run in another --out")
        if classes != known:
            splits = data.load_splits(args.data, args.root, classes=known)
    return splits


SMALL_CLIP = os.path.join("runs", "mxm-primitives-source", "best.pt")  # what it is: see `small_clip`


def small_clip():
    """Train the CLIP that built-in shapes are adapted from: tiny, by CLIP's own loss on primitives-source. It
    is trained once, by train_mxm.py in a process of its own, and kept in `runs/`."""
    if os.path.exists(SMALL_CLIP):
        return
    data.note(f"a small CLIP is trained first, once, and kept as {SMALL_CLIP}")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_mxm.py")
    command = [sys.executable, script, "--data", "primitives-source", "--loss", "clip", "--batch-size", "128",
               "--epochs", "12", "--eval-every", "12", "--out", os.path.dirname(SMALL_CLIP)]
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # of the processes that wait for it
    alone = {name: value for name, value in os.environ.items() if name not in group}
    done = subprocess.run(command, env=alone, stdout=subprocess.DEVNULL)
    clip.expect(done.returncode == 0, SMALL_CLIP, f"could not be trained; `{' '.join(command)}` says why")


def how_to_train_one(args):
    """What to do where no pretrained CLIP is at hand, for every script and data set."""
    name, _ = os.path.splitext(os.path.basename(args.data))
    return (f"train a small one first, with python train_mxm.py --data {args.data} --clip tiny, and then "
            f"give --clip runs/mxm-{name}/best.pt")


def load_clip(args, device):
    """The pretrained CLIP that --clip names, with the run's --image-size and --context."""
    with rank_zero_first():
        if args.clip == SMALL_CLIP:
            small_clip()
        try:
            model, _ = clip.load(args.clip, device, image_size=args.image_size, context_length=args.context)
        except clip.DownloadError as e:
            raise clip.CheckpointError(f"{e}; or {how_to_train_one(args)}") from None
    return model


def frozen_clip(checkpoint):
    """The CLIP that a checkpoint was trained on without holding it, loaded from where its --clip says. Raises
    CheckpointError where its weights are no longer those whose hash stands in the checkpoint."""
    args = argparse.Namespace(**checkpoint["settings"])
    model = load_clip(args, "cpu")
    identity = clip.identity(model)
    trained = str(checkpoint["frozen_clip"])
    clip.expect(identity == trained, args.clip, f"is the CLIP {identity[:12]} now, and what was trained "
                f"belongs to {trained[:12]}; give its weights with --clip")
    return model


def build_or_load(args, train, device):
    """The CLIP that a run starts from, in training mode. --clip tiny or small: random weights, and a
    vocabulary that is learned from the training captions. Otherwise pretrained weights, with the tokenizer
    that they were trained with."""
    if args.clip not in clip.SCRATCH:
        model = load_clip(args, device)
    else:
        if args.resume:
            tokenizer = clip.Tokenizer(resumed(args)["clip"]["merges"])
        else:
            captions = [caption for x in train for caption in x.captions]
            tokenizer = clip.Tokenizer.train(captions, args.vocab_size)
        model = clip.build(args.clip, tokenizer, args.seed, args.image_size, args.context).to(device)
    if args.compile:
        clip.compile_blocks(model)
    return model.train()


def training_loader(args, instances, model, **options):
    """A data.Loader of the training batches that a run asks for, of each this process's part."""
    rank, world = processes()
    return data.Loader(instances, tokenizer_of(model), model.config, args.batch_size, train=True,
                       seed=args.seed, workers=args.workers, rank=rank, world=world, crop=args.crop,
                       **options)


def tokenizer_of(model):
    """The model's own tokenizer, or OpenAI's."""
    return model.tokenizer or clip.default_tokenizer()


def about(args, model, loader):
    """What a run's first line says: which CLIP, its weights and pixels, and on a CPU how long an epoch takes.
    That is three times what encoding takes: the backward pass takes twice as long as the forward pass."""
    weights = sum(p.numel() for p in model.parameters())
    size = model.config.image_resolution
    text = f"CLIP {args.clip}, {weights / 1e6:.1f} M weights, {size} pixels"
    if next(model.parameters()).device.type != "cpu" or not isinstance(loader, data.Loader):
        return text
    seconds = 0.0  # of a sample
    images = (model.encode_image, torch.zeros(4, 3, size, size), loader.views or loader.frames)
    texts = (model.encode_text, loader.tokens[:4], loader.captions)
    for encode, few, count in (images, texts):
        times = []
        with torch.no_grad(), clip.autocast(args.amp, model):
            for _ in range(4):  # the first also prepares, and another program may delay any
                began = time.perf_counter()
                encode(few)
                times.append(time.perf_counter() - began)
        seconds += (count or 1) * min(times) / len(few)
    _, world = processes()
    minutes = 3 * seconds * loader.batch_size * len(loader) / world / 60
    return f"{text}; an epoch takes about {max(1, round(minutes))} min on this CPU"


def warmup_cosine(step, steps, warmup, peak=1.0):
    """The learning rate of a step: a linear rise over the share `warmup` of the steps, then half a cosine
    down to 0."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def decayed_groups(parameters, decay):
    """Groups for AdamW: matrices, which decay, and vectors (gains, biases, logit_scale), which do not."""
    parameters = [p for p in parameters if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


# ---------------------------------------------------------------- a run

class Run:
    """What is around a training loop: the folder, the log, the checkpoints, the progress line, stopping.

        run = eval.Run(args, optimizer, steps, len(loader), {"clip": model})
        for step, batch in run.batches(loader):   # from where an interrupted run stopped
            ...                                   # learning rate, forward, loss, backward: the script's own
            run.check(loss, norm)                 # a NaN stops the run before it reaches the weights
            optimizer.step()
            if run.log(loss, samples):            # true after an epoch that is to be evaluated
                run.keep_best(score, message, val=metrics)

    It calls neither the model nor the loss nor the optimizer. Everything that changes is in the weights, the
    optimizer and `state`, so a resumed run ends with the same bits.

    saved: what a checkpoint holds beside the settings, {name: value}. A CLIP is held as its description,
        another module as its weights without those of its `clip`. Other values say what the run belongs to
        (names of classes, the hash of a frozen CLIP): it goes on only where they are the same.
    only_last: {name: module} that going on needs and evaluation does not; last.pt holds them.
    more_epochs: whether it may go on with another number of epochs, since its learning rate is the same then.

    All processes evaluate and stop at the same steps; only the first one writes.
    """

    def __init__(self, args, optimizer, steps, steps_per_epoch, saved, only_last=None, more_epochs=False):
        self.args = args
        self.optimizer = optimizer
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.saved = saved
        self.only_last = only_last or {}
        self.first = processes()[0] == 0
        self.device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self.state = {"step": 0, "loss_sum": 0.0, "best": -1.0, "waited": 0, "finished": False}
        self.record = None  # what the log says of the epoch that has just ended
        self.seconds = []  # of each step, with an evaluation after it, without the loading of its batch
        self.norm = 0.0  # of the latest gradient
        if args.resume:
            self.load(resumed(args, more_epochs))
        if self.first:
            self.lock = open_folder(args, self.state["step"])
            if not args.resume:
                self.save("last.pt")  # so that there is always one; and a full disk is found before any work
        barrier()  # the others wait for it
        self.progress = Progress(steps, self.state["step"], quiet=not self.first)
        self.say = self.progress.line
        self.saved_at = time.time()
        self.stop_asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        """Of Ctrl-C and SIGTERM: the loop finishes its step and saves. A second one stops at once."""
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True

    def save(self, name):
        """Write last.pt, from which a run goes on, or best.pt, which holds what evaluation needs."""
        checkpoint = {"method": self.args.method, "settings": vars(self.args), "state": self.state,
                      "step": self.state["step"]}
        for key, value in self.saved.items():
            if isinstance(value, clip.CLIP):
                value = clip.describe(value)
            elif isinstance(value, torch.nn.Module):
                value = clip.describe_heads(value)
            checkpoint[key] = value
        if name == "last.pt":
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint |= {key: clip.weights(module) for key, module in self.only_last.items()}
        clip.save_checkpoint(os.path.join(self.args.out, name), checkpoint)

    def load(self, checkpoint):
        """The inverse of `save`, of last.pt, in place."""
        for key, value in self.saved.items():
            if isinstance(value, clip.CLIP):
                value.load_state_dict(checkpoint[key]["state_dict"])
            elif isinstance(value, torch.nn.Module):
                clip.load_heads(value, checkpoint[key])
            else:
                clip.expect(value == checkpoint[key], f"--resume: {self.args.out}/last.pt", "was made with "
                            f"another {key.replace('_', ' ')}; start a new run in another --out")
        for key, module in self.only_last.items():
            module.load_state_dict(checkpoint[key])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.state |= checkpoint["state"]
        done = self.state["step"]
        clip.expect(done <= self.steps, f"--resume: {self.args.out}", f"has made {done} steps, and these "
                    f"data and settings make {self.steps}; start a new run in another --out")

    def batches(self, loader):
        """Yield (step, batch) up to the end. After each step: log, save, stop if asked to."""
        if self.state["finished"]:
            return
        for batch in loader.batches(self.state["step"], self.steps):
            began = time.perf_counter()
            yield self.state["step"], batch
            self.seconds.append(time.perf_counter() - began)
            if self.record:  # an epoch has ended, on all processes
                if self.first:
                    log_line(self.args.out, **self.record)
                self.state["finished"] = any_process(self.state["finished"], self.device)
            stopping = any_process(self.stop_asked, self.device)  # asked once: a later signal waits
            if self.first and (self.record or stopping or time.time() - self.saved_at > SAVE_SECONDS):
                self.save("last.pt")
                self.saved_at = time.time()
            self.record = None
            if self.state["finished"]:
                return
            if stopping:
                self.say(f"stopped at step {self.state['step']}; the same command with --resume goes on")
                barrier()  # torchrun ends the others as soon as one ends: the first has to have saved
                raise SystemExit(130)

    def check(self, loss, norm):
        """Stop where the loss or its gradient's norm is not finite, before the weights take it up."""
        self.norm = norm.item()
        if not math.isfinite(loss.item() + self.norm):
            raise SystemExit(f"error: the loss is {loss.item()}, its gradient's norm {self.norm} at step "
                             f"{self.state['step']}; try a lower --lr or --amp off. "
                             f"{self.args.out}/last.pt holds an earlier step")

    def log(self, loss, samples, **values):
        """Count a step of so many samples. Returns True where an epoch has ended that is to be evaluated.
        values: further numbers for the progress line and the log."""
        state = self.state
        state["step"] += 1
        state["loss_sum"] += loss.item()
        self.progress.step(state["step"], samples, loss=loss.item(), **values)
        epoch, inside = divmod(state["step"], self.steps_per_epoch)
        if inside:
            return False
        mean_loss = state["loss_sum"] / self.steps_per_epoch
        state["loss_sum"] = 0.0
        self.record = {"step": state["step"], "epoch": epoch, "loss": mean_loss, **values, "norm": self.norm,
                       "lr": max(group["lr"] for group in self.optimizer.param_groups),
                       "seconds": round(sum(self.seconds[-self.steps_per_epoch:]), 3)}
        return epoch % self.args.eval_every == 0 or epoch == self.args.epochs

    def keep_best(self, score, message, **evaluations):
        """Log `evaluations`, say `message` if there is one, and write best.pt where `score`, one on val, is
        the highest so far."""
        self.record |= {"score": score, **evaluations}
        if message:
            self.say(f"epoch {self.record['epoch']}: loss {self.record['loss']:.3f}, {message}")
        self.state["waited"] += 1  # evaluations since the best one
        if score > self.state["best"]:
            self.state["best"] = score
            self.state["waited"] = 0
            if self.first:
                self.save("best.pt")

    def finish(self, message):
        """End the run after this step, before its last one."""
        self.state["finished"] = True
        self.say(f"epoch {self.record['epoch']}: {message}")


class Progress:
    """A live line on a terminal; elsewhere a plain line of the first step, and then every 20 seconds."""

    def __init__(self, total, start=0, quiet=False):
        self.total = total
        self.start = start
        self.quiet = quiet
        self.live = sys.stderr.isatty()
        self.began = time.time()
        self.last = 0.0
        self.samples = 0

    def step(self, step, samples, **values):
        """Say where the run stands, if it is time to."""
        now = time.time()
        self.samples += samples
        if now - self.last < (0.2 if self.live else 20) and step < self.total:
            return
        self.last = now
        spent = now - self.began
        left = int(spent / max(1, step - self.start) * (self.total - step))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        speed = f"{self.samples / max(spent, 1e-9):,.0f} samples/s"
        text = f"step {step}/{self.total}  {shown}  {speed}  {left // 60}:{left % 60:02d} left"
        self.line(text, end="" if self.live else "\n")

    def line(self, text, end="\n"):
        """Say a line, in place of the live one; with another end the next line takes its place."""
        if not self.quiet:
            print(("\r\033[K" if self.live else "") + text, end=end, file=sys.stderr, flush=True)


# settings that may differ when a run goes on
FREE = ("resume", "out", "workers", "device", "download", "root", "epochs", "trained_on")
RESULTS = ("log.jsonl", "last.pt", "best.pt", "metrics.json", "costs.json")  # of a run, beside config.json


def resumed(args, more_epochs=True):
    """The checkpoint <out>/last.pt, which a run goes on from with these settings. Raises CheckpointError."""
    last = os.path.join(args.out, "last.pt")
    clip.expect(os.path.exists(last), f"--resume: {last}", "is not there; give --out the run's folder, "
                "or start without --resume")
    checkpoint = clip.load_checkpoint(last)
    before = checkpoint["settings"]
    method = checkpoint["method"]
    clip.expect(method == args.method, f"--resume: {last}", f"is a run of {method}.py, and this is "
                f"{args.method}.py; give --out a run of this script")
    for name, now in vars(args).items():
        same = (before.get(name) or None) == (now or None)  # an option that is off may be newer than the run
        clip.expect(same or name in FREE, f"--resume: {last}",
                    f"--{name.replace('_', '-')} was {before.get(name)} and is {now} now; "
                    "repeat the old value, or start a new run in another --out")
    clip.expect(more_epochs or before["epochs"] == args.epochs, f"--resume: {last}",
                f"its learning rate falls over {before['epochs']} epochs, so that --epochs {args.epochs} "
                "is another run; start it in another --out")
    return checkpoint


def open_folder(args, step):
    """Prepare the folder of a run at this step, and write config.json. Returns a lock to keep while it lives.
    Without --resume the files of an earlier run in the folder are moved aside, to <out>.1, <out>.2, ...; what
    else lies there stays. Raises CheckpointError."""
    clip.expect(os.path.exists(args.out) or not os.path.islink(args.out), args.out, "a link to nowhere; "
                "is a disk missing?")
    out = pathlib.Path(os.path.realpath(args.out))
    config = out / "config.json"
    log = out / "log.jsonl"
    lock(config)
    if not args.resume and any(os.path.exists(out / name) for name in RESULTS):
        aside = next(f"{out}.{n}" for n in itertools.count(1) if not os.path.lexists(f"{out}.{n}"))
        try:
            os.mkdir(aside)
            for name in {"config.json", *RESULTS} & set(os.listdir(out)):
                os.rename(out / name, os.path.join(aside, name))
        except OSError as e:
            raise clip.CheckpointError(f"{out}: holds an earlier run that cannot be moved aside "
                                       f"({e.strerror}); choose another --out") from None
        data.note(f"an earlier run was moved to {aside} (--resume would have continued it)")
    write_json(config, vars(args))
    for half_written in out.glob(".writing-*"):  # when an earlier process was killed
        half_written.unlink()
    if log.exists():  # what was logged after the checkpoint will be logged again
        write_text(log, "".join(line + "\n" for line, row in read_log(log) if row["step"] <= step))
    return lock(config)


def lock(path):
    """-> the open file, which no other process can lock until it is closed; CheckpointError where one has.
    The lock ends with the process, and its loader's workers do not inherit it."""
    try:
        import fcntl  # not on Windows
        file = open(path, "r+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise clip.CheckpointError(f"{os.path.dirname(path)}: another run is writing to this folder; "
                                   "choose another --out, or wait for its end") from None
    except (ImportError, OSError):  # no such file yet, or a disk without locks
        return None


def log_line(out, **values):
    """Append one object to <out>/log.jsonl."""
    path = os.path.join(out, "log.jsonl")
    try:
        with open(path, "a") as f:
            f.write(json.dumps(values) + "\n")
    except OSError as e:
        raise clip.CheckpointError(f"{path}: cannot be written ({e.strerror}); "
                                   "free space, then --resume") from None


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path, text):
    clip.write_file(path, lambda f: f.write(text.encode()))


def check_writable(path):
    """Raise CheckpointError where a file could not be written later, before there is anything to lose."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):  # it will be made
        folder = os.path.dirname(folder)
    writable = not os.path.isdir(path) and os.path.isdir(folder) and os.access(folder, os.W_OK)
    clip.expect(writable, path, "cannot be written; choose a file in a folder that can be")


def report(args, device, untuned=None):
    """Evaluate best.pt on the test split; the first process writes metrics.json and prints its tables. The
    built-in shapes have a second test split, `unseen`: configurations that training never shows. untuned: the
    CLIP before it was tuned, to be evaluated in the same way."""
    model, checkpoint = restore(os.path.join(args.out, "best.pt"), device)
    path = os.path.join(args.out, "metrics.json")
    results = {}
    texts = []
    for split in ("test", "unseen") if args.data == "primitives" else ("test",):
        asked = argparse.Namespace(**vars(args), split=split, gallery=None, embeddings=None, prompt=None)
        try:
            results[split], text = evaluation([(model, checkpoint)], asked)
            texts.append(text)
            if untuned:
                results[f"{split}, not tuned"], text = evaluation([(untuned, checkpoint)], asked)
                texts.append(f"before it was tuned:\n{text}")
        except data.DataError as e:
            raise data.DataError(f"{e}. Training is done: correct this, then "
                                 f"python eval.py --checkpoint {args.out}/best.pt") from None
    if processes()[0] == 0:
        write_json(path, results)
        print(*texts, f"written to {path}", sep="\n")
    barrier()  # torchrun ends the others as soon as one ends: they stay until the first is done


# ---------------------------------------------------------------- checkpoints: restore, evaluate, search

def script(checkpoint):
    """The module of the script that made a checkpoint: any train_*.py beside this file, a copy of one too."""
    name = checkpoint["method"]
    if name == "clip":  # as it is, of --clip: no script has trained it
        return None
    folder = os.path.dirname(os.path.abspath(__file__))
    plain = isinstance(name, str) and re.fullmatch(r"train_\w+", name)
    clip.expect(plain and os.path.isfile(os.path.join(folder, f"{name}.py")), "a checkpoint",
                f"of {name!r}, and there is no such train_*.py beside eval.py")
    return importlib.import_module(name)


def restore(path, device=None, clip_path=None):
    """-> (model, checkpoint) of a checkpoint file. The script that it names rebuilds the model. clip_path:
    for a checkpoint that holds no CLIP: where its CLIP lies now."""
    checkpoint = clip.load_checkpoint(path)
    with clip.reading(path, "it may be of another version"):
        if clip_path:
            checkpoint["settings"]["clip"] = clip_path
        model = script(checkpoint).restore(checkpoint)
        clip.expect({"data", "root"} <= checkpoint["settings"].keys(), path, "its settings name no data")
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model, checkpoint


def run_names(files):
    """What to call the runs of some files: the files' folders, or the files where folders have one name."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(file))) for file in files]
    return folders if len(set(folders)) == len(folders) else list(files)


def load_asked(checkpoint, args):
    """-> (instances, {task: names of its classes}) of the data and the split that are asked for."""
    load = data.load_regions if checkpoint.get("regions") else data.load  # region features, of train_user.py
    return load(args.data, args.root, args.split)


def embed_split(model, checkpoint, args):
    """-> `Embedded` of the asked split: all its instances, compared by the cosine of their features. args:
    data, root, split, amp, workers. A script with another similarity, or with classes, has an `embed_split`
    of its own."""
    instances, tasks = load_asked(checkpoint, args)
    return Embedded(instances, *embed(model, instances, args.amp, args.workers), tasks)


def embed_with_all(models, args):
    """-> `averaged` of the asked split by all models, each by its script's `embed_split`."""
    parts = []
    for model, checkpoint in models:
        of_script = getattr(script(checkpoint), "embed_split", embed_split)
        parts.append(of_script(model, checkpoint, args))
    return averaged(parts)


def evaluation(models, args, title="model"):
    """What the models of some checkpoints reach together on a split -> ({row: metrics}, the text of a table).
    models: [(model, checkpoint)], as of `restore`. args: data, root, split, amp, workers; gallery and
    embeddings, paths, or None; prompt, of `zero_shot`, or None. A script that classifies has its own."""
    model, checkpoint = models[0]
    if any(hasattr(script(checkpoint), "evaluation") for _, checkpoint in models):
        clip.expect(len(models) == 1 and not args.embeddings, "--checkpoint", "classifies images and texts "
                    "together: it has no similarities to average and no --embeddings of each")
        return script(checkpoint).evaluation(model, checkpoint, args)
    embedded = embed_with_all(models, args)
    if args.embeddings:
        write_embeddings(args.embeddings, embedded)
    if not len(embedded.texts):
        clip.expect(args.embeddings and not args.gallery, args.data, "pictures without captions; "
                    "search them with --query, or write their --embeddings")
        return {}, f"{len(embedded.instances):,} pictures without captions"
    rows, text = retrieval_evaluation(embedded, args, title)
    if args.prompt:
        of_tasks = zero_shot(model, embedded, args.prompt)
        rows |= {"zero-shot": of_tasks} if of_tasks else {}
        for task, metrics in of_tasks.items():
            text += (f"\n{args.split}: {task}, zero-shot: accuracy {metrics['accuracy']:.1f}, "
                     f"macro F1 {metrics['macro_f1']:.1f} ({len(embedded.tasks[task])} classes)")
    return rows, text


@torch.no_grad()
def zero_shot(model, embedded, prompts):
    """{task: `classification_metrics`} of a CLIP as it is: an image is of the class whose text is closest.
    prompts: texts with {} for the name of a class, whose feature is their renormalised mean (Radford et al.
    2021, section 3.1.4)."""
    out = {}
    for task, names in embedded.tasks.items():
        labels = torch.tensor([x.labels.get(task, -1) for x in embedded.instances])
        if (labels >= 0).any():
            texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
            tokens = tokenizer_of(model)(texts, model.config.context_length, truncate=True)
            features = torch.cat([model.encode_text(part).float() for part in tokens.split(256)])
            classes = F.normalize(features, dim=-1).view(len(names), len(prompts), -1).mean(1)
            scores = embedded.images @ F.normalize(classes, dim=-1).t()  # (N, classes)
            out[task] = classification_metrics(scores.cpu(), labels)
    return out


def retrieval_evaluation(embedded, args, title="model"):
    """As `evaluation`, of an `Embedded`. title: what the row is called."""
    instances = embedded.instances
    clip.expect(not args.gallery or instances[0].images, "--gallery",
                "this model was trained on features from files; there are no pictures to show")
    if embedded.classes:
        layout_of_classes = data.class_layout(instances, embedded.classes)
        by_model = partial(class_metrics, classes=embedded.classes)
        rows = {"model": class_retrieval(by_model, embedded.scores, *layout_of_classes),
                "chance": class_retrieval(class_chance, embedded.scores, *layout_of_classes)}
    else:
        rows = retrieval_rows(args.data, embedded)
    rows = {row.replace("model", title): metrics for row, metrics in rows.items()}
    named = {f"{args.split} {row}": metrics for row, metrics in rows.items()}
    ranked = f"\n{args.split}: {len(instances):,} instances, {len(embedded.texts):,} captions"
    if embedded.classes:
        text = class_table(named) + ranked
    else:
        text = table(named, shapes=args.data in ("primitives", "text2shape"))
        text += f"{ranked}, rSum {rows[title]['rSum']:.1f}"
    if "ceiling" in rows:
        reached, ceiling = (rows[row]["text_to_image"]["R@1"] for row in (title, "ceiling"))
        text += f", {100 * reached / ceiling:.0f}% of the ceiling's text-to-shape RR@1"
    if args.gallery:
        draw_gallery(args.gallery, instances, embedded.scores)
    return rows, text


@torch.no_grad()
def answer(models, args):
    """Print what the words of each --query find among a split's images; --gallery draws it. models: [(model,
    checkpoint)], as of `restore`. Features of the images are kept in FEATURES."""
    images = []
    queries = []
    for model, checkpoint in models:
        reads = getattr(model, "config", None) and hasattr(model, "encode_text")
        clip.expect(reads, "--query", f"this model of {checkpoint['method']} reads no words to search with")
        instances, tasks = load_asked(checkpoint, args)
        path = os.path.join(FEATURES, f"{fingerprint(model, instances, args.amp)}-search.npy")
        device = next(model.parameters()).device
        loader = evaluation_loader(model, instances, args.workers)
        images.append(kept(path, f"features of {len(instances):,} instances",
                           lambda: embed_images(model, loader, args.amp), device))
        words = tokenizer_of(model)(args.query, model.config.context_length, truncate=True)
        queries.append(F.normalize(model.encode_text(words).float(), dim=-1).cpu())
    query = torch.cat(queries, dim=1) / len(queries)  # the mean of the models' cosines, as `averaged`
    scores, index = search(query, torch.cat(images, dim=1), args.top or 5)
    rows = []
    for text, row, numbers in zip(args.query, scores.tolist(), index.tolist()):
        if len(args.query) > 1:
            print(f"{text}:")
        found = [instances[i] for i in numbers]
        for score, x in zip(row, found):
            file = x.images[0] if isinstance(x.images[0], str) else getattr(x.images[0], "file", None)
            classes = ", ".join(f"{task} {tasks[task][c]}" for task, c in x.labels.items() if c >= 0)
            print(*filter(None, (f"{score:6.3f}", x.id, file, classes)), sep="  ")
        if args.gallery:
            rows.append((text, [(data.pixels(x.images[0], CELL), None) for x in found]))
    if args.gallery:
        gallery_picture(args.gallery, rows)


def settings(argv=None):
    """The arguments of the evaluation command."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint", nargs="+", metavar="FILE",
        help="best.pt or last.pt of a run, or its folder; of several, the mean of their similarities counts")
    add("--curves", nargs="+", metavar="RUN",
        help="draw the loss and the score on val of these folders of runs into --out (default curves.png)")
    add("--clip", help="a CLIP to evaluate as it is: a published name, a file or a folder; with --checkpoint "
                       "the CLIP that it belongs to, where that lies elsewhere now")
    add("--prompt", nargs="+", metavar="TEXT",
        help="what makes a text of a class's name, for --clip on data with labels; several are averaged "
             '(default: "a photo of a {}.")')
    add("--data", help="a data set, a .jsonl or .csv file, or a folder of pictures (default: the data that "
                       "the model was trained on)")
    add("--root", help="folder of the data set")
    add("--split", default="test", help="train, val, test, all, or another one of the data")
    add("--gallery", metavar="PNG", help="draw queries and their top results, or what is predicted")
    add("--attention", metavar="PNG", help="draw what a model with attention between the modalities looks at")
    add("--embeddings", metavar="NPZ",
        help="write the split's features of unit norm: images (N, D), the means of their views or frames, "
             "texts (C, D), captions (C,), owners (C,), the number of each text's image, ids (N,), groups "
             "(N,), what counts as the same thing, and label_<task> (N,), names")
    add("--query", nargs="+", metavar="TEXT",
        help="search the split's images with your own words (videos: the mean of their frames)")
    add("--top", type=positive_int, help="results of --query (default: 5)")
    machine_arguments(add, workers=0)
    add("--out", help="folder of metrics.json (default: the checkpoint's, or runs/clip-<data>)")
    args = p.parse_args(argv)
    alone = args.clip and not args.checkpoint  # a CLIP as it is
    model = args.checkpoint or args.clip
    others = args.data or args.query or args.gallery or args.attention or args.embeddings
    for wrong, problem in ((bool(args.curves) == bool(model), "give one of --checkpoint, --clip, --curves"),
                           (args.curves and others, "--curves goes with --out alone"),
                           (alone and not args.data, "--clip needs --data, or --checkpoint"),
                           (args.prompt and not alone, "--prompt is for --clip without --checkpoint"),
                           (args.top and not args.query, "--top is for --query"),
                           (args.query and args.prompt, "--prompt is for classes, not for --query"),
                           (args.attention and args.query, "--attention and --query: give one of them"),
                           (any("{}" not in text for text in args.prompt or ()), "--prompt: {} is missing")):
        if wrong:
            p.error(problem)
    return args


def load_models(args):
    """-> [(model, checkpoint)] of --checkpoint, or of --clip alone; args.data and args.root, where they are
    not given, become those of the first."""
    if not args.checkpoint:
        args.prompt = args.prompt or ["a photo of a {}."]
        checkpoint = {"method": "clip", "settings": {"data": args.data, "root": args.root}}
        return [(clip.load(args.clip, args.device)[0], checkpoint)]
    models = [restore(file, args.device, args.clip) for file in args.checkpoint]
    trained = models[0][1]["settings"]
    names = {checkpoint["settings"]["data"] for _, checkpoint in models}
    clip.expect(args.data or len(names) == 1, "--checkpoint", f"models of {' and '.join(sorted(names))}; "
                "say with --data on which they are to be evaluated")
    args.data = args.data or trained["data"]
    if args.data == trained["data"]:
        args.root = args.root or trained["root"]
    return models


def main(argv=None):
    args = settings(argv)
    if args.curves:
        path = args.out or "curves.png"
        draw_curves(path, args.curves)
        print(f"written to {path}")
        return
    if args.checkpoint:
        for i, folder in enumerate(args.checkpoint):
            if os.path.isdir(folder):
                args.checkpoint[i] = os.path.join(folder, "best.pt")
                data.note(f"{folder}: its best.pt is evaluated")
        folder = args.out or os.path.dirname(args.checkpoint[0])
    else:
        name, _ = os.path.splitext(os.path.basename(os.path.normpath(args.data)))
        folder = args.out or os.path.join("runs", f"clip-{name}")
    path = os.path.join(folder, "metrics.json")
    pictures = [file for file in (args.gallery, args.embeddings, args.attention) if file]
    for file in pictures if args.query else [path, *pictures]:
        check_writable(file)
    models = load_models(args)
    model, checkpoint = models[0]
    clip.expect(not args.attention or hasattr(script(checkpoint), "attention_picture"), "--attention",
                f"{checkpoint['method']} has no attention between the modalities; train_cmaclip has")
    if next(model.parameters()).device.type == "cpu":
        clip.fast_float32()
    if args.query:
        answer(models, args)
        if args.embeddings:
            write_embeddings(args.embeddings, embed_with_all(models, args))
    else:
        title = "model" if len(models) == 1 else "mean of " + " + ".join(run_names(args.checkpoint))
        rows, text = evaluation(models, args, title)
        if rows:
            own = args.data == checkpoint["settings"]["data"]
            add_metrics(path, args.split if own else f"{args.data} {args.split}", rows)
            text += f"\nwritten to {path}"
        print(text)
    if args.attention:
        script(checkpoint).attention_picture(model, checkpoint, args, args.attention)
    for file in pictures:
        print(f"written to {file}")


def add_metrics(path, key, rows):
    """Add rows to those that a metrics.json holds under a key; what is damaged is written anew."""
    results = {}
    if os.path.exists(path):
        with contextlib.suppress(data.DataError):
            results = data.read_json(path, {str: dict}, "rows of metrics")
    results[key] = results.get(key, {}) | rows  # the mean of several models stands beside each one's row
    write_json(path, results)


if __name__ == "__main__":
    with one_line_errors():
        main()
