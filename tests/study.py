"""The studies behind tests/results.md: runs of the five scripts, and tables of what came out over seeds.

    python tests/study.py --list                                 # the commands of all studies
    python tests/study.py mxm-relation                           # run what is missing, then print the tables
    python tests/study.py mxm-relation --write                   # put the tables into tests/results.md
    python tests/study.py user-loss --root flickr8k=path/to/flickr8k --root products=... --root hm=...
    python tests/study.py cmr-wikipedia --root wikipedia=path/to/wikipedia --jobs 2 --threads 1
    python tests/study.py pretrain --root flickr8k=... --root products=... --root hm=...   # the CLIPs

Rates are tuned for each row. Where an option of a row has several values (`--lr 1e-3|3e-3`), each is run with
seed 0, the one with the best score on validation is chosen, and only that is run with the other seeds.

Runs are kept under runs/study. One that is finished (its metrics.json exists) is not repeated. One that was
interrupted is resumed. --write runs nothing: where a run is missing, it says so and changes nothing.
"""
import argparse
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing.connection
import os
import platform
import re
import resource
import shlex
import statistics
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "tests", "results.md")
sys.path.insert(0, ROOT)
import clip  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402

# Files that studies read in place of a data set: {name: (data sets, one of so many training instances,
# whether captions that name a product's class are changed)}. `{name}` in the arguments is such a file.
FILES = {
    "everything": (("flickr8k", "products", "hm"), 1, False),
    "no-products": (("flickr8k", "hm"), 1, False),
    "garments": (("hm",), 1, False),
    "descriptions": (("products",), 1, True),
    "no-photos": (("products", "hm"), 1, False),
    "products-1": (("products",), 1, False),
    "products-2": (("products",), 2, False),
    "products-4": (("products",), 4, False),
    "products-8": (("products",), 8, False),
    "products-16": (("products",), 16, False),
    "shapes-2": (("primitives-target",), 2, False),
    "shapes-4": (("primitives-target",), 4, False),
    "shapes-8": (("primitives-target",), 8, False),
    "shapes-16": (("primitives-target",), 16, False),
}
# CLIPs that studies start from. `{clip:name}` in the arguments is the best.pt of one.
PRETRAIN = "--loss hard --captions 2 --batch-size 128 --vocab-size 4096"
CLIPS = {
    "everything": f"train_mxm.py --data {{everything}} {PRETRAIN} --epochs 40 --eval-every 8",
    "no-products": f"train_mxm.py --data {{no-products}} {PRETRAIN} --epochs 60 --eval-every 12",
    "no-photos": f"train_mxm.py --data {{no-photos}} {PRETRAIN} --epochs 30 --eval-every 6",
    "small": f"train_mxm.py --data {{everything}} {PRETRAIN} --clip small --epochs 10 --eval-every 5",
    "primitives": "train_mxm.py",
    "source": "train_mxm.py --data primitives-source --loss clip --epochs 20",
    "small-source": "train_mxm.py --data primitives-source --clip small --loss clip --epochs 20",
}
# Folders of features that stand in for a detector's regions: {name: (data set, the CLIP whose patches they
# are, the CLIP whose embeddings of the pictures come with them)}. `{name}` in the arguments is such a folder.
REGIONS = {"regions": ("flickr8k", "no-photos", "everything")}
STUDIES = {}  # study -> (script, {row: arguments})
CLAIMS = {}  # study -> [(row, the row it is compared with)]: what a paper says is ahead of what
FROZEN = {}  # study -> (data set, task): the CLIP whose features it reads is also judged as it is
TRANSFER = {}  # study -> the data set that its models are also tested on, of which they learned nothing
GROUPS = {}  # name -> rows whose mean is compared, where a claim is about several


def study(name, script, base, rows, claims=()):
    """A study in which every row adds something to the same arguments."""
    STUDIES[name] = script, {row: f"{base} {changed}".strip() for row, changed in rows.items()}
    CLAIMS[name] = list(claims)


# ---- MXM-CLR: observations of each instance, losses, the soft relation

RATES = "--lr 3e-4|1e-3|3e-3"
MORE_RATES = "--lr 1e-4|3e-4|1e-3|3e-3"


def sampled(loss, instances, views, captions, epochs, more=""):
    """Arguments: so many instances in a step, with so many views and captions of each."""
    return (f"--loss {loss} --batch-size {instances} --views {views} --captions {captions} "
            f"--epochs {epochs} --eval-every {max(1, epochs // 2)} {more}").strip()


# 64 images in each of 378 steps, whatever the row
study("mxm-shapes", "train_mxm.py", MORE_RATES, {
    "clip, 1 x 1": sampled("clip", 64, 1, 1, 6),
    "hard, 1 x 4": sampled("hard", 64, 1, 4, 6),
    "clip, 2 x 2": sampled("clip", 32, 2, 2, 3),
    "hard, 2 x 2": sampled("hard", 32, 2, 2, 3),
    "hybrid, features, 2 x 2": sampled("hybrid", 32, 2, 2, 3, "--soft-relation features"),
    "hybrid, words, 2 x 2": sampled("hybrid", 32, 2, 2, 3, "--soft-relation words"),
    "hybrid, oracle, 2 x 2": sampled("hybrid", 32, 2, 2, 3, "--soft-relation oracle"),
}, [("hard, 1 x 4", "clip, 1 x 1"), ("hard, 1 x 4", "hard, 2 x 2"),
    ("hard, 2 x 2", "clip, 2 x 2"), ("hard, 2 x 2", "clip, 1 x 1"),
    ("hybrid, features, 2 x 2", "hard, 2 x 2"),
    ("hybrid, words, 2 x 2", "hard, 2 x 2"), ("hybrid, oracle, 2 x 2", "hard, 2 x 2")])

# 128 photos in each of 460 steps, from random weights
photos = "--data flickr8k --batch-size 128 --epochs 10 --eval-every 5"
study("mxm-photos", "train_mxm.py", f"{photos} {RATES}", {
    "clip, 1 x 1": "--loss clip",
    "hard, 1 x 5": "--loss hard --captions 5",
    "hybrid, words, 1 x 5": "--loss hybrid --captions 5 --soft-relation words",
}, [("hard, 1 x 5", "clip, 1 x 1"), ("hybrid, words, 1 x 5", "hard, 1 x 5")])

# the four captions of `hard, 1 x 4` above, with what each relation adds
# the teacher is the default run, whose training took 14 epochs
study("mxm-relation", "train_mxm.py", RATES, {
    "hard": sampled("hard", 64, 1, 4, 6),
    "hybrid, features": sampled("hybrid", 64, 1, 4, 6, "--soft-relation features"),
    "hybrid, words": sampled("hybrid", 64, 1, 4, 6, "--soft-relation words"),
    "hybrid, teacher": sampled("hybrid", 64, 1, 4, 6, "--soft-relation teacher --teacher {clip:primitives}"),
    "hybrid, oracle": sampled("hybrid", 64, 1, 4, 6, "--soft-relation oracle"),
}, [(f"hybrid, {relation}", "hard") for relation in ("features", "words", "teacher", "oracle")])
# what each adds in half of these steps, and in the default run's 14 epochs
of_lengths = {}
for length, epochs in (("3 epochs", "--epochs 3"), ("14 epochs", "")):
    of_lengths[f"hard, {length}"] = f"{epochs} --loss hard".strip()
    of_lengths[f"hybrid, words, {length}"] = epochs
    for relation, needs in (("features", ""), ("teacher", " --teacher {clip:primitives}"), ("oracle", "")):
        arguments = f"{epochs} --soft-relation {relation}{needs}"
        of_lengths[f"hybrid, {relation}, {length}"] = arguments.strip()
study("mxm-relation-length", "train_mxm.py", "", of_lengths,
      [(row, f"hard, {row.split(', ')[-1]}") for row in of_lengths if row.startswith("hybrid")])
DESIGN_CLAIMS = [("hard", "hard-uniform"), ("hard", "mil-nce"),
                 ("hybrid, words", "soft, words"), ("hybrid, words", "hard")]
# the design of the loss on the same batch; hard-uniform and mil-nce are others' ways with several positives
study("mxm-loss", "train_mxm.py", RATES, {
    "hard": sampled("hard", 64, 1, 4, 6),
    "hard-uniform": sampled("hard-uniform", 64, 1, 4, 6),
    "mil-nce": sampled("mil-nce", 64, 1, 4, 6),
    "soft, words": sampled("soft", 64, 1, 4, 6, "--soft-relation words"),
    "hybrid, words": sampled("hybrid", 64, 1, 4, 6, "--soft-relation words"),
}, DESIGN_CLAIMS)
# the same on photos, 128 of them with all five captions in each of 460 steps
study("mxm-photos-loss", "train_mxm.py",
      "--data flickr8k --batch-size 128 --lr 1e-4|3e-4|1e-3 --epochs 10 --eval-every 5", {
          "hard": "--loss hard --captions 5",
          "hard-uniform": "--loss hard-uniform --captions 5",
          "mil-nce": "--loss mil-nce --captions 5",
          "soft, words": "--loss soft --captions 5 --soft-relation words",
          "hybrid, words": "--loss hybrid --captions 5 --soft-relation words",
      }, DESIGN_CLAIMS)
# the teacher learned from the same photos, among others, in 40 epochs
study("mxm-photos-teacher", "train_mxm.py",
      "--data flickr8k --batch-size 128 --lr 1e-4|3e-4|1e-3 --epochs 10 --eval-every 5", {
          "hard": "--loss hard --captions 5",
          "hybrid, words": "--loss hybrid --captions 5 --soft-relation words",
          "hybrid, teacher":
              "--loss hybrid --captions 5 --soft-relation teacher --teacher {clip:everything}",
      }, [("hybrid, words", "hard"), ("hybrid, teacher", "hard")])

# what the hybrid loses to its soft part by: the share of the soft relation, or that it rises from 0?
AT_ONCE = "hybrid, share of 0.5 from the first step"
SHARES = {"hybrid": "", AT_ONCE: "--soft-warmup 0", "hybrid, share rises to 1": "--soft-weight 1"}
study("mxm-share", "train_mxm.py", "--lr 1e-3", {
    row: sampled("hybrid", 64, 1, 4, 6, f"--soft-relation words {more}") for row, more in SHARES.items()
} | {"soft": sampled("soft", 64, 1, 4, 6, "--soft-relation words")},
    [(row, other) for row in list(SHARES)[1:] for other in ("hybrid", "soft")])
# the default run is longer: does the rise still cost it, and what is left of its lead over the hard relation?
study("mxm-default", "train_mxm.py", "",
      {"hard": "--loss hard", "hybrid": "", AT_ONCE: "--soft-warmup 0"},
      [("hybrid", "hard"), (AT_ONCE, "hard"), (AT_ONCE, "hybrid")])

# as many images in each row, so fewer steps where batches are larger
BATCHES = (16, 64, 256)
of_batches = {}
for size in BATCHES:
    of_batches[f"clip, batches of {size}"] = f"--lr 1e-4|3e-4|1e-3 {sampled('clip', size, 1, 1, 6)}"
    of_batches[f"hybrid, batches of {size}"] = (
        f"{MORE_RATES} {sampled('hybrid', size, 1, 4, 6, '--soft-relation words')}")
study("mxm-batch", "train_mxm.py", "", of_batches,
      [(f"hybrid, batches of {size}", f"clip, batches of {size}") for size in BATCHES]
      + [(f"{loss}, batches of 64", f"{loss}, batches of {size}")
         for loss in ("clip", "hybrid") for size in (16, 256)])
# the same on photos, in ten passes
PHOTO_BATCHES = {32: "3e-5|1e-4|3e-4|1e-3", 128: "1e-4|3e-4|1e-3", 512: "1e-4|3e-4|1e-3"}  # and their rates
photo_batches = {}
for size, rates in PHOTO_BATCHES.items():
    for loss, needs in (("clip", ""), ("hard", " --captions 5")):
        photo_batches[f"{loss}, batches of {size}"] = (
            f"--batch-size {size} --lr {rates} --epochs 10 --eval-every 5 --loss {loss}{needs}")
# one caption in as much time as five
AT_EQUAL_TIME = "clip, batches of 32, 20 epochs"
photo_batches[AT_EQUAL_TIME] = "--batch-size 32 --lr 3e-5|1e-4|3e-4 --epochs 20 --eval-every 10 --loss clip"
study("mxm-photos-batch", "train_mxm.py", "--data flickr8k", photo_batches,
      [(f"hard, batches of {size}", f"clip, batches of {size}") for size in PHOTO_BATCHES]
      + [("hard, batches of 32", AT_EQUAL_TIME)]
      + [(f"{loss}, batches of 128", f"{loss}, batches of {size}")
         for loss in ("clip", "hard") for size in (32, 512)])


def of_captions(epochs):
    """Rows: one caption of each picture, four of them, and what the relation from their words adds."""
    return {
        "clip, 1 x 1": sampled("clip", 64, 1, 1, epochs),
        "hard, 1 x 4": sampled("hard", 64, 1, 4, epochs),
        "hybrid, words, 1 x 4": sampled("hybrid", 64, 1, 4, epochs, "--soft-relation words"),
    }


# the same on another encoder, a ResNet
study("mxm-resnet", "train_mxm.py", f"--clip tiny-rn {RATES}", of_captions(6),
      [("hard, 1 x 4", "clip, 1 x 1"), ("hybrid, words, 1 x 4", "clip, 1 x 1"),
       ("hybrid, words, 1 x 4", "hard, 1 x 4")])

# trained on four of the solids in ten colours, 360 steps, and tested on the other solids and colours
study("mxm-source", "train_mxm.py", f"--data primitives-source {RATES}", of_captions(8),
      [("hard, 1 x 4", "clip, 1 x 1"), ("hybrid, words, 1 x 4", "clip, 1 x 1"),
       ("hybrid, words, 1 x 4", "hard, 1 x 4")])
TRANSFER["mxm-source"] = "primitives-target"

# from a CLIP that knows other shapes, to 396 new ones in about 100 steps
study("mxm-start", "train_mxm.py",
      f"--data primitives-target --clip {{clip:source}} {RATES}", of_captions(16),
      [("hard, 1 x 4", "clip, 1 x 1"), ("hybrid, words, 1 x 4", "hard, 1 x 4")])

# 64 pictures of garments in each of about 540 steps, whatever the row
study("mxm-garments", "train_mxm.py", f"--data {{garments}} {MORE_RATES}", {
    "clip, 1 x 1": sampled("clip", 64, 1, 1, 20),
    "hard, 1 x 4": sampled("hard", 64, 1, 4, 20),
    "hard, 2 x 1": sampled("hard", 32, 2, 1, 10),
    "hard, 2 x 2": sampled("hard", 32, 2, 2, 10),
    "hard, 2 x 4": sampled("hard", 32, 2, 4, 10),
    "hard, 4 x 1": sampled("hard", 16, 4, 1, 5),
    "hard, 4 x 4": sampled("hard", 16, 4, 4, 5),
}, [("hard, 1 x 4", "clip, 1 x 1"), ("hard, 2 x 1", "clip, 1 x 1"), ("hard, 4 x 1", "clip, 1 x 1"),
    ("hard, 2 x 4", "clip, 1 x 1"), ("hard, 2 x 4", "hard, 1 x 4"), ("hard, 4 x 4", "hard, 1 x 4")])
TRANSFER["mxm-garments"] = "products"
# the other numbers of views and captions, at the rate that is best for all rows above
study("mxm-garments-grid", "train_mxm.py", "--data {garments} --lr 3e-4", {
    "clip, 1 x 1": sampled("clip", 64, 1, 1, 20),
    "hard, 1 x 2": sampled("hard", 64, 1, 2, 20),
    "hard, 1 x 4": sampled("hard", 64, 1, 4, 20),
    "hard, 1 x 5": sampled("hard", 64, 1, 5, 20),
    "hard, 2 x 5": sampled("hard", 32, 2, 5, 10),
    "hard, 4 x 2": sampled("hard", 16, 4, 2, 5),
    "hard, 4 x 5": sampled("hard", 16, 4, 5, 5),
}, [("hard, 1 x 2", "clip, 1 x 1"), ("hard, 1 x 5", "clip, 1 x 1"), ("hard, 1 x 4", "hard, 1 x 2"),
    ("hard, 1 x 5", "hard, 1 x 4"), ("hard, 2 x 5", "hard, 1 x 5"), ("hard, 4 x 2", "hard, 1 x 2"),
    ("hard, 4 x 5", "hard, 1 x 5")])
# one pair, four captions and the soft relation, for more seeds
study("mxm-garments-hybrid", "train_mxm.py", "--data {garments}", {
    "clip, 1 x 1": f"--lr 3e-4 {sampled('clip', 64, 1, 1, 20)}",
    "hard, 1 x 4": f"--lr 3e-4 {sampled('hard', 64, 1, 4, 20)}",
    "hybrid, words, 1 x 4":
        f"--lr 1e-4|3e-4|1e-3 {sampled('hybrid', 64, 1, 4, 20, '--soft-relation words')}",
}, [("hard, 1 x 4", "clip, 1 x 1"), ("hybrid, words, 1 x 4", "clip, 1 x 1"),
    ("hybrid, words, 1 x 4", "hard, 1 x 4")])
# the same at one rate, tested on products as well, of which they learn nothing
study("mxm-garments-transfer", "train_mxm.py", "--data {garments} --lr 3e-4", {
    "clip, 1 x 1": sampled("clip", 64, 1, 1, 20),
    "hard, 1 x 4": sampled("hard", 64, 1, 4, 20),
    "hybrid, words, 1 x 4": sampled("hybrid", 64, 1, 4, 20, "--soft-relation words"),
}, [("hard, 1 x 4", "clip, 1 x 1"), ("hybrid, words, 1 x 4", "hard, 1 x 4")])
TRANSFER["mxm-garments-transfer"] = "products"
# one pair in as much time as several captions: more epochs, as many as the CPU seconds of both rows allow
EQUAL_TIME = {
    "shapes": "--lr 1e-4|3e-4|1e-3|3e-3",
    "photos": "--data flickr8k --batch-size 128 --lr 1e-4|3e-4|1e-3",
    "garments": "--data {garments} --lr 1e-4|3e-4|1e-3",
}
study("mxm-time", "train_mxm.py", "", {
    "shapes, clip, 1 x 1, 8 epochs": f"{EQUAL_TIME['shapes']} {sampled('clip', 64, 1, 1, 8)}",
    "shapes, hard, 1 x 4, 6 epochs": f"{EQUAL_TIME['shapes']} {sampled('hard', 64, 1, 4, 6)}",
    "photos, clip, 1 x 1, 20 epochs": f"{EQUAL_TIME['photos']} --epochs 20 --eval-every 10 --loss clip",
    "photos, hard, 1 x 5, 10 epochs":
        f"{EQUAL_TIME['photos']} --epochs 10 --eval-every 5 --loss hard --captions 5",
    "garments, clip, 1 x 1, 35 epochs": f"{EQUAL_TIME['garments']} {sampled('clip', 64, 1, 1, 35)}",
    "garments, hard, 1 x 4, 20 epochs": f"{EQUAL_TIME['garments']} {sampled('hard', 64, 1, 4, 20)}",
}, [("shapes, hard, 1 x 4, 6 epochs", "shapes, clip, 1 x 1, 8 epochs"),
    ("photos, hard, 1 x 5, 10 epochs", "photos, clip, 1 x 1, 20 epochs"),
    ("garments, hard, 1 x 4, 20 epochs", "garments, clip, 1 x 1, 35 epochs")])

# as many epochs as help each row, by validation: which is ahead once neither gains from more?
study("mxm-long", "train_mxm.py", "--data {garments} --lr 3e-4 --batch-size 64 --eval-every 5", {
    "clip, 1 x 1": "--loss clip --epochs 35|70|140",
    "hard, 1 x 4": "--loss hard --captions 4 --epochs 20|40|80|160",
}, [("hard, 1 x 4", "clip, 1 x 1")])


# ---- CLIP4CMR: losses, imbalance, dimension

CMR_LOSSES = ("contrastive", "modality-invariant", "triplet", "lifted-structure", "n-pairs",
              "supervised-contrastive", "label-regression", "cross-entropy", "proxy-nca", "proxy-anchor",
              "pcl")
CMR = {loss: f"--loss {loss}" for loss in CMR_LOSSES} | {
    "pcl + 0.1 modality-invariant": "--loss pcl+modality-invariant:0.1",
    "pcl + 0.1 triplet": "--loss pcl+triplet:0.1",
}
GROUPS["class-wise losses"] = CMR_LOSSES[6:]
GROUPS["pair-wise losses but modality-invariant"] = CMR_LOSSES[:1] + CMR_LOSSES[2:6]
CMR_CLAIMS = [("class-wise losses", "pair-wise losses but modality-invariant"),
              *[("pcl", loss) for loss in CMR_LOSSES[:-1]],
              ("pcl + 0.1 modality-invariant", "pcl"), ("pcl + 0.1 triplet", "pcl")]
SMALL = "--hidden 1024 --dim 256 --patience 100"  # a sixteenth of the authors' MLPs; no early stop
WIKIPEDIA = ("--data wikipedia --features features_train.npz features_test.npz "
             f"{SMALL} --epochs 60 --eval-every 3 --lr 3e-5|1e-4|3e-4|1e-3")
REAL = "--data clip-features --features products_{task}_train.npz products_{task}_test.npz"
study("cmr-wikipedia", "train_clip4cmr.py", WIKIPEDIA, CMR, CMR_CLAIMS)
FIVE_RATES = "--lr 1e-4|3e-4|1e-3|3e-3|1e-2"
HIGHER_RATES = "--lr 3e-4|1e-3|3e-3|1e-2|3e-2"
for task, rates in (("subCategory", HIGHER_RATES), ("articleType", FIVE_RATES)):
    base = f"{REAL.replace('{task}', task)} {SMALL} --epochs 160 --eval-every 8 {rates}"
    study(f"cmr-real-{task}", "train_clip4cmr.py", base, CMR, CMR_CLAIMS)
    FROZEN[f"cmr-real-{task}"] = "clip-features", task
# features of the CLIP that was trained here
OF_EVERYTHING = f"--data products --task {{task}} --clip {{clip:everything}} {SMALL} --epochs 15"
for task in ("subCategory", "articleType"):
    study(f"cmr-products-{task}", "train_clip4cmr.py",
          f"{OF_EVERYTHING.replace('{task}', task)} {HIGHER_RATES}", CMR, CMR_CLAIMS)
    FROZEN[f"cmr-products-{task}"] = "products", task

# what a lack of one modality costs, and what the dimension matters, on each kind of features
IMBALANCED = {  # ending of a study's name -> (arguments, the shares of a modality that are left)
    "": (WIKIPEDIA, (0.3, 0.1)),
    "-real": (f"{REAL.replace('{task}', 'articleType')} {SMALL} --epochs 160 --eval-every 8 "
              "--lr 3e-5|1e-4|3e-4|1e-3|3e-3", (0.1,)),
    "-products": (f"{OF_EVERYTHING.replace('{task}', 'articleType')} --lr 1e-3|3e-3|1e-2", (0.1,)),
}
for ending, (base, fractions) in IMBALANCED.items():
    for kind in ("batch", "subset"):
        imbalance = {}
        claims = []
        for loss in ("pcl", "triplet"):
            imbalance[f"{loss}, balanced"] = f"--loss {loss}"
            for modality in ("image", "text"):
                for fraction in fractions:
                    row = f"{loss}, {fraction} of the {modality}s"
                    imbalance[row] = f"--loss {loss} --{modality}-fraction {fraction} --imbalance {kind}"
                    claims.append((row, f"{loss}, balanced"))
        study(f"cmr-imbalance-{kind}{ending}", "train_clip4cmr.py", base, imbalance, claims)
    study(f"cmr-dimension{ending}", "train_clip4cmr.py", f"{base.replace('--dim 256 ', '')} --loss pcl",
          {f"D {dim}": f"--dim {dim}" for dim in (16, 64, 256, 1024)},
          [(f"D {dim}", "D 256") for dim in (16, 64, 1024)])


# ---- USER: from a CLIP trained on the same products, among others

# titles of 12,823 products; the rate of a loss is tuned with both enhancements and its queues
USER = ("--data products --clip {clip:everything} --dim 256 --epochs 5 --eval-every 5 --batch-weight 1 "
        "--momentum 0.99 --lr-drop 0.8 --clip-lr 3e-4")
USER_RATES = "--lr 3e-4|1e-3|3e-3|1e-2"
# with mu = 20 UTO weighs negatives as InfoNCE does at its temperature of 0.05
study("user-loss", "train_user.py", USER, {
    "UTO": USER_RATES,
    "UTO, mu 20": "--lr 1e-3|3e-3|1e-2 --mu 20",
    "InfoNCE": f"{USER_RATES} --loss infonce",
    "triplet": f"{USER_RATES}|3e-2 --loss triplet",
}, [("UTO", "InfoNCE"), ("UTO", "triplet"), ("UTO, mu 20", "UTO"), ("UTO, mu 20", "InfoNCE")])
study("user-parts", "train_user.py", f"{USER} --lr 1e-3|3e-3|1e-2", {
    "none": "--enhance none",
    "sge": "--enhance sge",
    "cge": "--enhance cge",
    "both": "",
}, [("sge", "none"), ("cge", "none"), ("both", "none")])
# the same with patches as long as what is added to them, which has unit norm; theirs is about 12
study("user-norm", "train_user.py", f"{USER} --lr 1e-3|3e-3|1e-2", {
    "none, as they are": "--enhance none",
    "none": "--enhance none --unit-norm",
    "sge": "--enhance sge --unit-norm",
    "cge": "--enhance cge --unit-norm",
    "both": "--unit-norm",
}, [("none", "none, as they are"), ("sge", "none"), ("cge", "none"), ("both", "none"),
    ("both", "none, as they are")])
# with and without queues, both at the rate that is best with them
study("user-queue-128", "train_user.py", f"{USER} --lr 3e-3",
      {"queues of 2,048": "", "no queue": "--queue 0"}, [("queues of 2,048", "no queue")])
# other lengths at the same batch and rate
study("user-queue-128-sizes", "train_user.py", f"{USER} --lr 3e-3",
      {"queues of 0": "--queue 0", "queues of 512": "--queue 512", "queues of 2,048": "",
       "queues of 8,192": "--queue 8192"},
      [(f"queues of {size}", "queues of 0") for size in ("512", "2,048", "8,192")])
# twice the steps, so that `none` can reach the CLIP that it starts from
study("user-longer", "train_user.py", f"{USER.replace('--epochs 5', '--epochs 10')} --lr 3e-3",
      {"none": "--enhance none", "both": ""}, [("both", "none")])
# batches so small that they hold few negatives of their own
SLOW_CLIP = "--lr-drop 0.8 --clip-lr 1e-4"
SMALL_BATCHES = ("--data products --clip {clip:everything} --dim 256 --epochs 2 --eval-every 2 "
                 f"--batch-size 16 --batch-weight 1 {SLOW_CLIP}")
study("user-queue", "train_user.py", SMALL_BATCHES, {
    "no queue": f"{RATES} --queue 0",
    "queues of 512": f"{RATES} --queue 512 --momentum 0.999",
    "queues of 2,048": f"{RATES} --queue 2048 --momentum 0.999",
    "queues of 8,192": f"{RATES} --queue 8192 --momentum 0.999",
}, [("queues of 512", "no queue"), ("queues of 2,048", "no queue"), ("queues of 8,192", "no queue"),
    ("queues of 8,192", "queues of 512")])
# 6,000 photos with five captions each, in 700 steps of 128; the CLIP knows them, but not those of the test
USER_PHOTOS = ("--data flickr8k --clip {clip:everything} --dim 256 --epochs 3 --batch-weight 1 "
               f"--momentum 0.99 {SLOW_CLIP}")
study("user-photos", "train_user.py", f"{USER_PHOTOS} --lr 1e-3|3e-3|1e-2",
      {"none": "--enhance none", "both": ""}, [("both", "none")])
study("user-photos-norm", "train_user.py", USER_PHOTOS, {
    "none": "--lr 3e-4|1e-3|3e-3|1e-2 --unit-norm --enhance none",
    "both": "--lr 1e-3|3e-3|1e-2 --unit-norm",
}, [("both", "none")])
# as in the paper, local features that lack what CLIP knows: patches of a CLIP that has seen no photo
WITH_REGIONS = ("--data flickr8k --root {regions} --regions --clip {clip:no-photos} --dim 256 --epochs 3 "
                f"--batch-weight 1 --momentum 0.99 {SLOW_CLIP}")
REGIONS_CLAIMS = [("sge", "none"), ("cge", "none"), ("both", "none"), ("both", "cge")]
study("user-regions", "train_user.py", f"{WITH_REGIONS} --lr 1e-3|3e-3|1e-2",
      {"none": "--enhance none", "sge": "--enhance sge", "cge": "--enhance cge", "both": ""}, REGIONS_CLAIMS)
study("user-regions-norm", "train_user.py", WITH_REGIONS, {
    "none": "--lr 1e-3|3e-3|1e-2 --unit-norm --enhance none",
    "sge": "--lr 1e-3|3e-3|1e-2 --unit-norm --enhance sge",
    "cge": "--lr 3e-4|1e-3|3e-3|1e-2 --unit-norm --enhance cge",
    "both": "--lr 1e-3|3e-3|1e-2 --unit-norm",
}, REGIONS_CLAIMS)
# how slowly the momentum encoders follow, in small batches again; 0: the keys are the model's own
study("user-momentum", "train_user.py", SMALL_BATCHES, {
    "no queue": f"{RATES} --queue 0",
    "m 0": "--lr 3e-4|1e-3|3e-3|1e-2 --queue 2048 --momentum 0",
    "m 0.99": f"{RATES} --queue 2048 --momentum 0.99",
    "m 0.999": f"{RATES} --queue 2048 --momentum 0.999",
}, [("m 0", "no queue"), ("m 0.99", "m 0"), ("m 0.999", "m 0.99")])


# ---- Cross-Modal Adapter: what is tuned, on how much data, sharing

TUNE = {  # each with rates around its default for a CLIP that was trained here
    "adapter": "--tune adapter --lr 3e-3|1e-2|3e-2",
    "adapter-unshared": "--tune adapter-unshared --lr 3e-3|1e-2|3e-2",
    "lora": "--tune lora --lr 3e-3|1e-2|3e-2",
    "prompt": "--tune prompt --lr 1e-2|3e-2|1e-1",
    "bitfit": "--tune bitfit --lr 1e-2|3e-2|1e-1",
    "head": "--tune head --lr 3e-3|1e-2|3e-2",
    "full": "--tune full --lr 3e-5|1e-4|3e-4|1e-3",
}
TO_SHAPES = "--data primitives-target --clip {clip:source} --frames 4 --epochs 4 --batch-size 32"
study("adapter-shapes", "train_adapter.py", TO_SHAPES, TUNE,
      [("adapter", other) for other in TUNE if other != "adapter"])


def study_of_parts(name, base, parts, rates=TUNE):
    """A study of adapters beside LoRA and full fine-tuning, on each part of the data {part: arguments}."""
    rows = {f"{tune}, {part}": f"{arguments} {rates[tune]}"
            for part, arguments in parts.items() for tune in ("adapter", "lora", "full")}
    study(name, "train_adapter.py", base, rows,
          [(f"adapter, {part}", f"{tune}, {part}") for part in parts for tune in ("lora", "full")])


# from a CLIP that knows no products to titles and descriptions of all of them and of parts, each in about 390
# steps
TO_PRODUCTS = "--clip {clip:no-products} --batch-size 128"
HALF = f"--data {{products-2}} {TO_PRODUCTS} --epochs 4 --eval-every 2"
PRODUCT_RATES = {
    "adapter": "--tune adapter --lr 3e-3|1e-2|3e-2|1e-1",
    "lora": "--tune lora --lr 3e-3|1e-2|3e-2|1e-1",
    "full": "--tune full --lr 3e-4|1e-3|3e-3|1e-2",
}
study_of_parts("adapter-products", "", {
    "all products": f"--data {{products-1}} {TO_PRODUCTS} --epochs 2",
    "1/2 of them": HALF,
    "1/4 of them": f"--data {{products-4}} {TO_PRODUCTS} --epochs 8 --eval-every 4",
    "1/8 of them": f"--data {{products-8}} {TO_PRODUCTS} --epochs 16 --eval-every 4",
    "1/16 of them": f"--data {{products-16}} {TO_PRODUCTS} --epochs 32 --eval-every 8",
}, PRODUCT_RATES)
# every way of tuning, on a half
study("adapter-products-ways", "train_adapter.py", HALF, TUNE | PRODUCT_RATES | {
    "prompt": "--tune prompt --lr 1e-2|3e-2|1e-1|3e-1",
    "bitfit": "--tune bitfit --lr 1e-2|3e-2|1e-1|3e-1",
}, [("adapter", other) for other in TUNE if other != "adapter"])
# from a CLIP that knows other shapes to parts of the new ones, in 240 to 250 steps; without
# the crops and mirroring that pictures in files have by default, and rendered ones not
SIXTEENTH = "--data {shapes-16} --epochs 50 --eval-every 10 --batch-size 24"
study_of_parts("adapter-parts", "--clip {clip:source} --frames 4 --crop 0", {
    "1/2 of the shapes": "--data {shapes-2} --epochs 8 --eval-every 2 --batch-size 32",
    "1/4 of the shapes": "--data {shapes-4} --epochs 16 --eval-every 4 --batch-size 32",
    "1/8 of the shapes": "--data {shapes-8} --epochs 25 --eval-every 5 --batch-size 25",
    "1/16 of the shapes": SIXTEENTH,
}, TUNE | {
    "adapter": "--tune adapter --lr 1e-3|3e-3|1e-2|3e-2",
    "lora": "--tune lora --lr 1e-3|3e-3|1e-2",
})
# from a CLIP that knows nearly everything: single views of two thirds of these shapes; they need lower rates
LOWER_RATES = {
    "adapter": "--tune adapter --lr 3e-4|1e-3|3e-3|1e-2",
    "lora": "--tune lora --lr 3e-4|1e-3|3e-3|1e-2",
    "full": "--tune full --lr 1e-5|3e-5|1e-4|3e-4",
}
study_of_parts("adapter-known", "--clip {clip:primitives} --frames 4", {
    "all shapes": "--data primitives-target --epochs 4 --batch-size 32",
    "1/16 of the shapes": SIXTEENTH,
}, LOWER_RATES)
# the sixteenth without crops and mirroring, with rates that are lower still
study_of_parts("adapter-known-few", "--clip {clip:primitives} --frames 4 --crop 0",
               {"1/16 of the shapes": SIXTEENTH},
               {tune: arguments.replace("--lr ", "--lr 3e-6|" if tune == "full" else "--lr 1e-4|")
                for tune, arguments in LOWER_RATES.items()})
# every way of tuning, from a CLIP that knows no photos to 6,000 of them, in 936 steps
study("adapter-photos", "train_adapter.py",
      "--data flickr8k --clip {clip:no-photos} --batch-size 128 --epochs 4 --eval-every 2", TUNE | {
          "adapter": "--tune adapter --lr 1e-2|3e-2|1e-1",
          "prompt": "--tune prompt --lr 3e-2|1e-1|3e-1",
          "bitfit": "--tune bitfit --lr 3e-2|1e-1|3e-1",
          "full": "--tune full --lr 3e-4|1e-3|3e-3",
      }, [("adapter", other) for other in TUNE if other != "adapter"])
study("adapter-size", "train_adapter.py", f"{TO_SHAPES} {TUNE['adapter']}", {
    "r 2, d_s 16": "--rank 2",
    "r 8, d_s 16": "",
    "r 32, d_s 16": "--rank 32",
    "r 8, d_s 64": "--share 64",
}, [("r 32, d_s 16", "r 8, d_s 16"), ("r 8, d_s 16", "r 2, d_s 16"), ("r 8, d_s 64", "r 8, d_s 16")])
# do adapters catch up in three times the steps, each row at its best rate above?
study("adapter-longer", "train_adapter.py", TO_SHAPES.replace("--epochs 4", "--epochs 12 --eval-every 4"), {
    "adapter": "--tune adapter --lr 1e-2",
    "full": "--tune full --lr 3e-4",
}, [("adapter", "full")])
study("adapter-share", "train_adapter.py", f"{TO_SHAPES} --lr 1e-2",
      {"d_s 0": "--share 0", "d_s 16": ""}, [("d_s 16", "d_s 0")])
POOLS = {"query, tau 5": "", "query, tau 1": "--tau 1", "mean": "--pool mean"}
POOL_CLAIMS = [("query, tau 5", "mean"), ("query, tau 1", "mean")]
study("adapter-pool", "train_adapter.py", f"{TO_SHAPES} --lr 1e-2", POOLS, POOL_CLAIMS)
# four pictures of a garment, which differ more than four views of a shape; the CLIP knows single ones
study("adapter-pool-garments", "train_adapter.py",
      "--data {garments} --clip {clip:everything} --frames 4 --epochs 1 --batch-size 32 "
      "--lr 3e-3|1e-2|3e-2", POOLS, POOL_CLAIMS)


# ---- CMA-CLIP: fusions, noise, texts that do not name the class

FUSIONS = {name: f"--fusion {name}" for name in ("cma", "modality", "concat", "image", "text")}
CMA_CLAIMS = [("cma", other) for other in FUSIONS if other != "cma"]
ONE_PASS = "--clip {clip:everything} --epochs 1 --batch-size 128"
SEVEN_TASKS = f"{ONE_PASS} --lr 1e-3|3e-3|1e-2|3e-2"
study("cma-titles", "train_cmaclip.py", f"--data products {SEVEN_TASKS} --clip-lr 1e-4", FUSIONS, CMA_CLAIMS)
# is one pass too short for attention that starts from random weights?
study("cma-longer", "train_cmaclip.py",
      "--data products --clip {clip:everything} --epochs 4 --eval-every 4 --batch-size 128 --clip-lr 1e-4 "
      "--lr 1e-3|3e-3|1e-2", {name: FUSIONS[name] for name in ("cma", "concat")}, [("cma", "concat")])
study("cma-descriptions", "train_cmaclip.py", f"--data {{descriptions}} {SEVEN_TASKS} --clip-lr 1e-4",
      {name: FUSIONS[name] for name in ("cma", "concat", "image", "text")},
      [claim for claim in CMA_CLAIMS if claim[1] != "modality"])
# every fusion, in four passes
study("cma-descriptions-longer", "train_cmaclip.py",
      "--data {descriptions} --clip {clip:everything} --epochs 4 --eval-every 4 --batch-size 128 "
      "--clip-lr 1e-4 --lr 1e-3|3e-3|1e-2", FUSIONS | {"sequence": "--fusion sequence"},
      [*CMA_CLAIMS, ("cma", "sequence")])
# inputs of which three in ten lack the picture, and three in ten the text, in training as at test
missing = "--train-missing-image 0.3 --train-missing-text 0.3 --missing-image 0.3 --missing-text 0.3"
study("cma-missing", "train_cmaclip.py", f"--data {{descriptions}} {SEVEN_TASKS} --clip-lr 1e-4 {missing}",
      {name: FUSIONS[name] for name in ("cma", "modality", "concat")},
      [("cma", "concat"), ("modality", "concat")])
# wrong pictures and texts: of another kind, or of other products
in_training = "--train-noise-image 0.3 --train-noise-text 0.3"
for kind, noise in (("foreign", "--noise-kind foreign --noise-data flickr8k"), ("swap", "--noise-kind swap")):
    study(f"cma-{kind}", "train_cmaclip.py",
          f"--data products {ONE_PASS} --lr 1e-3|3e-3|1e-2 --clip-lr 1e-4 --robustness {noise}", {
              "modality": "--fusion modality",
              "cma, noise in training": f"--fusion cma {in_training}",
              "modality, noise in training": f"--fusion modality {in_training}",
              "concat, noise in training": f"--fusion concat {in_training}",
          }, [("modality, noise in training", "concat, noise in training"),
              ("cma, noise in training", "concat, noise in training")])


# ---- a larger model: default commands as they are and with `--clip small`, 64 pixels in 64 patches

LARGER = {"tiny": "", "small": "--clip small"}
for method in ("mxm", "user", "cmaclip"):
    study(f"small-{method}", f"train_{method}.py", "", LARGER)
# CLIP4CMR hardly learns with it at its default rate of 1e-3
study("small-clip4cmr", "train_clip4cmr.py", "", LARGER | {"small, 3e-4": "--clip small --clip-lr 3e-4"})

# adapters start from a CLIP that knows other shapes; each row at its best rate
study("small-adapter", "train_adapter.py",
      "--data primitives-target --frames 4 --epochs 4 --batch-size 32", {
          f"{name}, {tune}": f"--clip {{clip:{start}}} {TUNE[tune]}"
          for name, start in (("tiny", "source"), ("small", "small-source")) for tune in ("adapter", "full")
      }, [(f"{name}, adapter", f"{name}, full") for name in LARGER])


# ---- the numbers of one run: {heading: number}

TEXT_FIRST = (("T2I", "text_to_image"), ("I2T", "image_to_text"))
IMAGE_FIRST = TEXT_FIRST[::-1]


def both_ways(before, model, measures, order):
    """These measures of a model's retrieval; `before` stands before each heading."""
    return {f"{before}{way} {measure}": model[key][measure] for way, key in order for measure in measures}


def mxm_columns(metrics):
    columns = {}
    for split in ("test", "unseen"):
        if split in metrics:
            model = metrics[split]["model"]
            columns |= both_ways(f"{split} ", model, ("R@1",), TEXT_FIRST)
            columns[f"{split} rSum"] = model["rSum"]
    return columns


def clip4cmr_columns(metrics):
    columns = {}
    for split in ("test", "unseen"):
        if split in metrics:
            model = metrics[split]["model"]
            columns[f"{split} mAP"] = model["mAP"]
            columns |= both_ways(f"{split} ", model, ("mAP",), IMAGE_FIRST)
    return columns


def user_columns(metrics):
    model = metrics["test"]["model"]
    return {"rSum": model["rSum"]} | both_ways("", model, ("R@1", "R@5", "R@10"), IMAGE_FIRST)


def adapter_columns(metrics):
    model = metrics["test"]["model"]
    costs = metrics["costs"]
    return {"rSum": model["rSum"]} | both_ways("", model, ("R@1", "R@5"), TEXT_FIRST) | {
        "trained, thousands": costs["trained_parameters"] / 1000,
        "share, %": 100 * costs["share"],
        "GiB": costs["peak_memory_gib"],
    }


def cmaclip_columns(metrics):
    mean = metrics["test"]["model"]["mean"]
    noise = metrics["test"].get("noise", {})  # with --robustness
    columns = {
        "accuracy": mean["accuracy"],
        "R@P90": mean["recall_at_precision"],
        "macro F1": mean["macro_f1"],
    }
    for modality, fractions in noise.items():
        for fraction, noisy in fractions.items():
            if fraction != "0.0":
                columns[f"{100 * float(fraction):.0f}% {modality} noise"] = noisy["mean"]["accuracy"]
    if not noise:
        return columns
    for heading, scores in (("clean", noise["image"]["0.0"]), ("all images noisy", noise["image"]["1.0"]),
                            ("all texts noisy", noise["text"]["1.0"])):
        if "image_weight" in scores["mean"]:
            columns[f"mean image weight, {heading}"] = scores["mean"]["image_weight"]
    return columns


def task_columns(measure):
    """The function that takes one measure of every task by itself, and its mean."""
    def columns(metrics):
        model = metrics["test"]["model"]
        return {task: values[measure] for task, values in [*model["tasks"].items(), ("mean", model["mean"])]}
    return columns


TABLES = {  # script -> {caption: the function that takes a table's numbers from a run}
    "train_mxm.py": {"": mxm_columns},
    "train_clip4cmr.py": {"": clip4cmr_columns},
    "train_user.py": {"": user_columns},
    "train_adapter.py": {"": adapter_columns},
    "train_cmaclip.py": {
        "Mean of all tasks": cmaclip_columns,
        "Accuracy of each task": task_columns("accuracy"),
        "R@P90 of each task": task_columns("recall_at_precision"),
    },
}
CLAIMED = {  # script -> the headings of the first table that claims are judged by, where the table has them
    "train_mxm.py": ("test T2I R@1", "test I2T R@1", "test rSum"),
    "train_clip4cmr.py": ("test mAP",),
    "train_user.py": ("rSum",),
    "train_adapter.py": ("rSum",),
    "train_cmaclip.py": ("accuracy", "R@P90", "100% image noise", "100% text noise"),
}


# ---- tables

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; further on the last one will do.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12,
             2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)


def half_interval(deviation, seeds):
    """Half the 95% confidence interval of a mean over so many seeds."""
    t = STUDENT_T[min(seeds - 1, len(STUDENT_T)) - 1]
    return t * deviation / math.sqrt(seeds)


def seeds_to_resolve(mean, deviation, most=1000):
    """How many seeds would show a difference of this size and deviation; `most` where that is not enough."""
    for seeds in range(2, most):
        if half_interval(deviation, seeds) < abs(mean):
            return seeds
    return most


def compared(differences):
    """Cells of a comparison: the mean of the differences with its 95% interval, how many are positive, what
    follows."""
    n = len(differences)
    mean = statistics.mean(differences)
    ahead = f"{sum(d > 0 for d in differences)} of {n}"
    if n < 2:
        return f"{mean:+.1f}", ahead, "one seed"
    deviation = statistics.stdev(differences)
    half = half_interval(deviation, n)
    if abs(mean) > half:
        verdict = "ahead" if mean > 0 else "behind"
    else:
        needed = seeds_to_resolve(mean, deviation)
        verdict = f"not resolved; {'1,000 or more' if needed == 1000 else needed} seeds would be needed"
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})", ahead, verdict


def spread(values):
    """Mean and standard deviation over seeds; the value alone where there is one."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def markdown(headings, rows):
    """A Markdown table of {row: [cells]}."""
    lines = ["| | " + " | ".join(headings) + " |", "|" + " --- |" * (1 + len(headings))]
    lines += [f"| {row} | " + " | ".join(cells) + " |" for row, cells in rows.items()]
    return "\n".join(lines)


def table(rows):
    """A Markdown table of {row: {heading: [a number for each seed]}}."""
    headings = list(dict.fromkeys(heading for values in rows.values() for heading in values))
    cells = {}
    for row, values in rows.items():
        cells[row] = [spread(values[heading]) if heading in values else "" for heading in headings]
    return markdown(headings, cells)


def claims_table(rows, claims, headings):
    """What is ahead of what: {row: {heading: numbers}} as of `table`, the pairs of rows, seed by seed."""
    def of_seeds(name, heading):
        several = [rows[row][heading] for row in GROUPS.get(name, (name,))]
        return [statistics.mean(values) for values in zip(*several)]

    cells = {}
    for row, other in claims:
        for heading in headings:
            differences = [a - b for a, b in zip(of_seeds(row, heading), of_seeds(other, heading))]
            cells[f"{row} against {other}, {heading}"] = list(compared(differences))
    return markdown(["difference (95% interval)", "seeds ahead", "verdict"], cells)


def read_run(out):
    """metrics.json of a run's folder, of an adapter also its costs, and what `execute` noted."""
    with open(os.path.join(out, "metrics.json")) as f:
        metrics = json.load(f)
    for name in ("costs", "made"):
        path = os.path.join(out, f"{name}.json")
        if os.path.exists(path):
            with open(path) as f:
                metrics[name] = json.load(f)
    return metrics


def by_heading(numbers):
    """[{heading: number} of each seed] -> {heading: [a number for each seed]}."""
    return {heading: [of_seed[heading] for of_seed in numbers] for heading in numbers[0]}


def tables(name, folders, options):
    """{caption: table} of a study.

    folders: {row: [the folder of each seed's finished run]}; options: {row: the options that were chosen}.
    """
    script = STUDIES[name][0]
    runs = {row: [read_run(out) for out in seeds] for row, seeds in folders.items()}
    made = {}
    for caption, columns in TABLES[script].items():
        rows = {}
        for row, seeds in runs.items():
            rows[row] = by_heading([columns(metrics) for metrics in seeds])
        if not made:  # the first table also has costs, and claims are judged by it
            for row, seeds in runs.items():
                if all("made" in run for run in seeds):
                    rows[row]["CPU seconds"] = [run["made"]["cpu_seconds"] for run in seeds]
            first = rows
        labelled = {}
        for row, values in rows.items():
            labelled[f"{row}, `{options[row]}`" if options[row] else row] = values
        made[caption] = table(labelled)
    if CLAIMS[name]:
        everywhere = set.intersection(*map(set, first.values()))
        headings = [heading for heading in CLAIMED[script] if heading in everywhere]
        made["Differences, seed by seed"] = claims_table(first, CLAIMS[name], headings)
    return made


# ---- zero-shot: what CLIPs can do without further training

@torch.no_grad()
def frozen_clip(source, task, args):
    """The table of CLIP's own embeddings in retrieval by class: CLIP4CMR without its small networks."""
    root = folder_of(source, args.roots)
    if source == "clip-features":
        files = [f"products_{task}_{part}.npz" for part in ("train", "test")]
        splits, names = data.feature_splits(files, root)
        features = splits["test"]
        images, texts = (torch.nn.functional.normalize(torch.from_numpy(x), dim=-1)
                         for x in (features.images, features.texts))
        layout = features.layout
    else:
        model, _ = clip.load(clip_weights("everything", args))
        instances, names = data.load_split(source, root, "test", task)
        images, texts = eval.embed(model, instances, model.tokenizer)
        layout = data.class_layout(instances, names)
    columns = clip4cmr_columns({"test": eval.class_retrieval(images, texts, *layout, names)})
    return markdown(list(columns), {"frozen CLIP": [f"{value:.1f}" for value in columns.values()]})


def transferred(source, name, folders, args):
    """{caption: table}: the models of a study of train_mxm.py on the test split of another data set.

    folders: {row: [the folder of each seed's finished run]}.
    """
    instances, _ = data.load(*located(source, args.roots), "test")
    rows = {}
    for row, outs in folders.items():
        numbers = []
        for out in outs:
            path = os.path.join(out, f"on-{source}.json")
            if not os.path.exists(path):  # once, then kept beside the run
                model, _ = clip.load(os.path.join(out, "best.pt"))
                eval.write_json(path, eval.evaluate(model, instances, model.tokenizer))
            with open(path) as f:
                numbers.append(mxm_columns({"test": {"model": json.load(f)}}))
        rows[row] = by_heading(numbers)
    return {
        f"On {source}, of which they learned nothing": table(rows),
        f"On {source}, differences, seed by seed": claims_table(rows, CLAIMS[name], ["test rSum"]),
    }


TEMPLATES = ("a photo of {}", "{}", "men {}", "women {}")


@torch.no_grad()
def prompt_scores(model, instances, classes):
    """Cosines (instances, classes) of pictures and the mean embeddings of each class's prompts."""
    tokenizer = model.tokenizer
    names = [[template.format(name.lower()) for template in TEMPLATES] for name in classes]
    prompts = [prompt for several in names for prompt in several]
    tokens = tokenizer(prompts, model.context_length, truncate=True)
    texts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    texts = torch.nn.functional.normalize(texts.view(len(classes), len(TEMPLATES), -1).mean(1), dim=-1)
    images, _ = eval.embed(model, instances, tokenizer)
    return images @ texts.t()


def zero_shot(args):
    """The table of the CLIPs that were trained on real data: retrieval on each test part, products by
    prompts."""
    cells = {}
    for name in needed_clips(args):
        model, _ = clip.load(clip_weights(name, args))
        model.eval()
        cells[name] = []
        for source in ("flickr8k", "products", "hm"):
            instances, classes = data.load(*located(source, args.roots), "test")
            metrics = eval.evaluate(model, instances, model.tokenizer)
            cells[name] += [f"{metrics['rSum']:.1f}", f"{metrics['text_to_image']['R@1']:.1f}",
                            f"{metrics['image_to_text']['R@1']:.1f}"]
            if source == "products":
                for task in ("subCategory", "articleType"):
                    labelled = [x for x in instances if x.labels[task] >= 0]
                    scores = prompt_scores(model, labelled, classes[task])
                    label = torch.tensor([x.labels[task] for x in labelled])
                    cells[name].append(f"{100 * (scores.argmax(1) == label).float().mean():.1f}")
    headings = []
    for source in ("photos", "products", "garments"):
        headings += [f"{source}: rSum", "T2I R@1", "I2T R@1"]
        if source == "products":
            headings += ["subCategory by prompts, accuracy", "articleType by prompts"]
    return markdown(headings, cells)


# ---- tests/results.md

def machine():
    """torch's version and the processor, in one line."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = re.findall(r"model name\s*: (.*)", f.read())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"torch {torch.__version__}, {os.cpu_count()} cores of {(names or [platform.processor()])[0]}{gpu}"


def machine_of(out):
    """What `execute` noted beside a run."""
    made = read_run(out).get("made")
    return made["machine"] if made else f"not recorded (tables written with {machine()})"


def named(name):
    """The arguments of a study's rows, and the CLIPs that its regions come from."""
    rows = " ".join(STUDIES[name][1].values()) if name in STUDIES else ""
    for folder, (_, *clips) in REGIONS.items():
        if f"{{{folder}}}" in rows:
            rows += "".join(f" {{clip:{clip_name}}}" for clip_name in clips)
    return rows


def sources(name):
    """The data sets that a study reads, also through the CLIPs that it starts from."""
    rows = named(name) if name in STUDIES else " ".join(CLIPS.values())
    commands = rows + "".join(f" {command}" for clip_name, command in CLIPS.items()
                              if f"{{clip:{clip_name}}}" in rows)
    found = set(re.findall(r"data ([a-z]\S+)", commands))
    if name in TRANSFER:
        found.add(TRANSFER[name])
    for file, (names, _, _) in FILES.items():
        if f"{{{file}}}" in commands:
            found |= set(names)
    return sorted(source for source in found if "primitives" not in source)


def section(name, made, machines, seeds):
    """What stands between a study's markers: how its tables were made, and the tables."""
    roots = "".join(f" --root {source}=path/to/{source}" for source in sources(name))
    lines = [f"<!-- study: {name} -->"]
    if name in STUDIES:
        used = ", ".join(map(str, range(seeds)))
        runs = f"{seeds} runs in each row, seeds {used}: mean ± standard deviation."
        if seeds == 1:
            runs = "One run in each row, seed 0."
        lines += [f"`python tests/study.py {name} --seeds {seeds}{roots}`, which runs, in each row with the "
                  "arguments of its name,\\", f"`{common_command(name)}`.\\", f"{runs}\\"]
    else:
        lines += [f"`python tests/study.py {name}{roots}`\\"]
    lines += [f"Machine: {' and '.join(sorted(machines))}."]
    for caption, text in made.items():
        lines += ["", f"{caption}:", ""] if caption else [""]
        lines += [text]
    return "\n".join([*lines, "<!-- end -->"])


def common_command(name):
    """A study's script and the arguments with which all of its rows begin."""
    script, arguments = STUDIES[name]
    rows = [[script, *row.split()] for row in arguments.values()]
    words = os.path.commonprefix(rows)
    following = {row[len(words)] for row in rows if len(row) > len(words)}
    if words[-1].startswith("--") and not all(word.startswith("--") for word in following):
        words.pop()  # an option of which each row has its own value
    return " ".join(words)


def with_section(text, name, made):
    """results.md with a study's section replaced, or added at the end where there is none."""
    begin = f"<!-- study: {name} -->"
    before, found, after = text.partition(f"{begin}\n")
    if not found:
        return f"{text.rstrip()}\n\n## {name}\n\n{made}\n"
    old, end, rest = after.partition("<!-- end -->\n")
    if not end or "<!-- study:" in old:
        refuse(f"{RESULTS}: {begin} has no line <!-- end --> after it; add one below its tables")
    return f"{before}{made}\n{rest}"


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write_results(sections):
    """Put the sections {study: text} into results.md."""
    with open(RESULTS) as f:
        text = f.read()
    for name, made in sections.items():
        text = with_section(text, name, made)
    with open(RESULTS, "w") as f:
        f.write(text)


# ---- files that are made of data sets

def folder_of(source, roots):
    """Where a data set lies: as --root says, or else beneath data/."""
    return roots.get(source, os.path.join(ROOT, "data", source))


def located(source, roots):
    """(name or path, root) of a data set, as data.load takes them."""
    root = folder_of(source, roots)
    own = {"hm": "hm.jsonl", "products": "products.jsonl"}.get(source)
    if own and os.path.exists(os.path.join(root, own)):
        return os.path.join(root, own), None
    return source, root


def write_file(name, path, roots):
    """Write one of FILES: the parts of the data sets stay what they are."""
    names, every, without_classes = FILES[name]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "w") as f:
        for source in names:
            for split in ("train", "val", "test"):
                instances, classes = data.load(*located(source, roots), split)
                for x in instances[::every if split == "train" else 1]:
                    labels = {task: classes[task][n] for task, n in x.labels.items() if n >= 0}
                    captions = [description(x, labels)] if without_classes else x.captions
                    images = [picture_file(image, path, f"{x.id}-{k}") for k, image in enumerate(x.images)]
                    row = {"id": f"{source}-{x.id}", "images": images,
                           "captions": captions, "split": split, "group": x.group}
                    if len(names) == 1:  # data sets have no tasks in common
                        row["labels"] = labels
                    f.write(json.dumps(row) + "\n")
    os.replace(f"{path}.part", path)


@torch.no_grad()
def write_regions(name, args):
    """Write one of REGIONS as `data.load_regions` reads it, where it is not there."""
    source, of_patches, of_images = REGIONS[name]
    precomp = os.path.join(args.out, name, "precomp")
    if os.path.exists(os.path.join(precomp, "test_clip.npy")):
        return
    os.makedirs(precomp, exist_ok=True)
    local, _ = clip.load(clip_weights(of_patches, args), "cpu")
    guide, _ = clip.load(clip_weights(of_images, args), "cpu")
    local.eval()
    guide.eval()
    for split, file in (("train", "train"), ("val", "dev"), ("test", "test")):
        instances, _ = data.load(*located(source, args.roots), split)
        patches = []
        embeddings = []
        for batch in eval.evaluation_loader(local, instances, local.tokenizer).batches():
            pictures = data.to_device(batch, torch.device("cpu"))["images"][:, 0]
            _, tokens = local.encode_image(pictures, tokens=True)
            patches.append(tokens[:, 1:])  # the first is the class token
            embeddings.append(guide.encode_image(pictures))
        base = os.path.join(precomp, file)
        with open(f"{base}_caps.txt", "w") as f:
            f.writelines(" ".join(caption.split()) + "\n" for x in instances for caption in x.captions)
        np.save(f"{base}_ims.npy", torch.cat(patches).numpy())
        np.save(f"{base}_clip.npy", torch.cat(embeddings).numpy())


def picture_file(image, path, name):
    """The path of an image. One that is rendered is drawn, at the size of `tiny`, beside path."""
    if not callable(image):
        return os.path.abspath(image)
    folder = os.path.abspath(path.replace(".jsonl", "-pictures"))
    os.makedirs(folder, exist_ok=True)
    drawn = os.path.join(folder, f"{name}.png")
    image(32).save(drawn)
    return drawn


def description(x, labels):
    """An instance's last caption without the words of its own classes, in singular or plural."""
    words = {word.rstrip("s") for name in labels.values() for word in re.findall(r"[a-z]+", name.lower())}
    left = [word for word in x.captions[-1].split()
            if not words & {part.rstrip("s") for part in re.findall(r"[a-z]+", word.lower())}]
    return " ".join(left) or "a product"


# ---- runs

def settings(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="*", choices=["pretrain", *STUDIES, []], metavar="study",
                   help=", ".join(["pretrain", *STUDIES]) + " (default: all)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--root", action="append", default=[], metavar="NAME=FOLDER",
                   help="where the data set NAME lies; may be repeated")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--threads", type=int, help="threads of each run")
    p.add_argument("--out", default=os.path.join("runs", "study"))
    p.add_argument("--list", action="store_true", help="print the commands only")
    p.add_argument("--write", action="store_true", help="put the tables into tests/results.md; runs nothing")
    args = p.parse_args(argv)
    args.study = args.study or ["pretrain", *STUDIES]
    args.roots = dict(root.split("=", 1) for root in args.root)
    return args


def clip_folder(name, args):
    return os.path.join(args.out, f"clip-{name}")


def clip_weights(name, args):
    return os.path.join(clip_folder(name, args), "best.pt")


def run_folder(script, arguments, seed, args):
    prefix = script[len("train_"):-len(".py")]
    name = re.sub(r"[^\w.+=-]+", "-", arguments.replace("--", "")).replace("eval-every", "e")
    return os.path.join(args.out, f"{prefix}-{name}-seed-{seed}")


def alternatives(arguments):
    """The arguments with each choice of their values: `--lr 1|3` -> [`--lr 1`, `--lr 3`]."""
    return [" ".join(words) for words in itertools.product(*(word.split("|") for word in arguments.split()))]


def tuned_options(arguments):
    """The options of the arguments that have several values."""
    words = arguments.split()
    return [option for option, value in zip(words, words[1:]) if "|" in value]


def command_of(script, arguments, args):
    """A command without --out, with the files, the CLIPs and the data sets' folders put in."""
    files = {name: os.path.abspath(os.path.join(args.out, f"{name}.jsonl")) for name in FILES}
    folders = {name: os.path.abspath(os.path.join(args.out, name)) for name in REGIONS}
    weights = {f"clip:{name}": clip_weights(name, args) for name in CLIPS}
    made = files | folders | weights
    words = shlex.split(f"{script} {arguments}")
    words = [made.get(word[1:-1], word) if word[0] == "{" else word for word in words]
    for option, root in (("--data", "--root"), ("--noise-data", "--noise-root")):
        name = words[words.index(option) + 1] if option in words else None
        if name in args.roots and root not in words:
            words += [root, args.roots[name]]
    return shlex.join(words)


def of_clips(names, args):
    """The runs [(command, folder)] that make these CLIPs."""
    runs = []
    for name in names:
        out = clip_folder(name, args)
        script, _, arguments = CLIPS[name].partition(" ")
        runs.append((f"{command_of(script, arguments, args)} --out {shlex.quote(out)}", out))
    return runs


def seeded(script, arguments, seed, args):
    """The run (command, folder) of these arguments."""
    out = run_folder(script, arguments, seed, args)
    return f"{command_of(script, arguments, args)} --seed {seed} --out {shlex.quote(out)}", out


def needed_clips(args):
    """The CLIPs that the studies start from, by name."""
    names = []
    for name in args.study:
        rows = named(name)
        for clip_name in CLIPS:
            trained_on_files = "{" in CLIPS[clip_name]
            if f"{{clip:{clip_name}}}" in rows or (name == "pretrain" and trained_on_files):
                names.append(clip_name)
    return list(dict.fromkeys(names))


def tuning(args):
    """The runs that choose the values of the rows' options: each choice with seed 0."""
    runs = []
    for name in args.study:
        for arguments in STUDIES[name][1].values() if name in STUDIES else ():
            choices = alternatives(arguments)
            if len(choices) > 1:
                runs += [seeded(STUDIES[name][0], choice, 0, args) for choice in choices]
    return list(dict.fromkeys(runs))


def chosen(script, arguments, args):
    """Of the choices that the arguments leave, the one that was best on validation with seed 0."""
    choices = alternatives(arguments)
    if len(choices) == 1:
        return choices[0]
    folders = [run_folder(script, choice, 0, args) for choice in choices]
    missing = [out for out in folders if not finished(out)]
    if missing:
        refuse(f"{len(missing)} runs are missing, first {missing[0]}; run the same command without --write")
    scores = [clip.load_checkpoint(os.path.join(out, "best.pt"))["state"]["best"] for out in folders]
    return choices[scores.index(max(scores))]


def planned(name, args):
    """A study's runs over all seeds: [(command, folder)], {row: [folder]} and {row: chosen options}."""
    script, rows = STUDIES[name]
    runs = []
    folders = {}
    options = {}
    for row, arguments in rows.items():
        choice = chosen(script, arguments, args)
        words = choice.split()
        options[row] = " ".join(f"{o} {words[words.index(o) + 1]}" for o in tuned_options(arguments))
        of_row = [seeded(script, choice, seed, args) for seed in range(args.seeds)]
        folders[row] = [out for _, out in of_row]
        runs += of_row
    return list(dict.fromkeys(runs)), folders, options


def finished(out):
    return os.path.exists(os.path.join(out, "metrics.json"))


def run_script(words, output, made, threads):
    """In a process of its own: a script with its arguments, what it prints to a file, and what it took."""
    if threads:
        torch.set_num_threads(threads)
    with open(output, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        script = importlib.import_module(words[0].removesuffix(".py"))
        with eval.one_line_errors():
            script.main(words[1:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    eval.write_json(made, {"machine": machine(), "cpu_seconds": seconds})


def start(run, context, args):
    """A process that makes a run (command, folder), or goes on with it."""
    command, out = run
    words = shlex.split(command)
    if os.path.exists(os.path.join(out, "last.pt")):
        words.append("--resume")
    os.makedirs(out, exist_ok=True)
    files = (os.path.join(out, "output.txt"), os.path.join(out, "made.json"))
    process = context.Process(target=run_script, args=(words, *files, args.threads))
    process.start()
    return process


def execute_all(runs, context, args):
    """Make what is missing of some runs, --jobs at a time."""
    waiting = [run for run in runs if not finished(run[1])]
    done = len(runs) - len(waiting)
    active = {}
    while waiting or active:
        while waiting and len(active) < args.jobs:
            run = waiting.pop(0)
            process = start(run, context, args)
            active[process.sentinel] = process, run
        for sentinel in multiprocessing.connection.wait(active):
            process, (command, out) = active.pop(sentinel)
            process.join()
            if process.exitcode:
                refuse(f"exit code {process.exitcode}, see {out}/output.txt: python {command}")
            done += 1
            print(f"\r{done} of {len(runs)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def processes():
    """Where runs start: from a server that has imported everything once, where the system can fork."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([*eval.METHODS, "torchvision"])
    return context


def needed_files(args):
    """The names of FILES that the studies read, also through their CLIPs."""
    commands = " ".join(CLIPS[name] for name in needed_clips(args))
    for name in args.study:
        commands += named(name)
    return [name for name in FILES if f"{{{name}}}" in commands]


def run_all(args):
    """Everything that the studies need and that is missing: files, CLIPs, choices of options, runs."""
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when the server imports torch
    context = processes()
    for name in needed_files(args):
        path = os.path.join(args.out, f"{name}.jsonl")
        if not os.path.exists(path):
            write_file(name, path, args.roots)
    execute_all(of_clips(needed_clips(args), args), context, args)
    rows = "".join(named(name) for name in args.study)
    for name in REGIONS:
        if f"{{{name}}}" in rows:
            write_regions(name, args)
    execute_all(tuning(args), context, args)
    for name in args.study:
        if name in STUDIES:
            execute_all(planned(name, args)[0], context, args)


def main(argv=None):
    args = settings(argv)
    if args.list:
        runs = of_clips(needed_clips(args), args) + tuning(args)
        for name in args.study:
            script, rows = STUDIES.get(name, (None, {}))
            fixed = [arguments for arguments in rows.values() if len(alternatives(arguments)) == 1]
            runs += [seeded(script, arguments, seed, args) for arguments in fixed
                     for seed in range(args.seeds)]
        print("\n".join(f"python {command}" for command, _ in dict.fromkeys(runs)))
        return
    if not args.write:
        run_all(args)
    sections = {}
    for name in args.study:
        if name == "pretrain":
            outs = [out for _, out in of_clips(needed_clips(args), args)]
        else:
            _, folders, options = planned(name, args)
            outs = [out for row in folders.values() for out in row]
        missing = [out for out in outs if not finished(out)]
        if missing:
            refuse(f"{len(missing)} runs are missing, first {missing[0]}; "
                   "run the same command without --write")
        made = {"": zero_shot(args)} if name == "pretrain" else tables(name, folders, options)
        if name in FROZEN:
            made["CLIP itself, without networks on top"] = frozen_clip(*FROZEN[name], args)
        if name in TRANSFER:
            made |= transferred(TRANSFER[name], name, folders, args)
        machines = {machine_of(out) for out in outs}
        sections[name] = section(name, made, machines, args.seeds)
    if args.write:
        write_results(sections)
    else:
        print("\n\n".join(sections.values()))


if __name__ == "__main__":
    main()
