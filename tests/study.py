"""The studies behind tests/results.md: runs of the scripts, and tables of what came out over seeds.

    python tests/study.py --list                                 # the commands of all studies
    python tests/study.py mxm-shapes                             # run what is missing, then print the tables
    python tests/study.py mxm-shapes --write                     # put the tables into tests/results.md
    python tests/study.py user-queue --root products=FOLDER      # where a data set lies, as often as needed

Where an option of a row has several values (`--lr 1e-3|3e-3`), each is run with seed 0, the one with the
best score on validation is chosen, and only that is run with the other seeds. A rate that stands alone was
chosen so before, for the same row (tests/results.md says where).

Runs are made one after another and kept under runs/study; with OMP_NUM_THREADS=1, as many studies as there
are cores can run beside each other. A run that is finished (its metrics.json exists) is not repeated. One
that was interrupted is resumed. --write runs nothing: where a run is missing, it says so and changes nothing.
"""
import argparse
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "tests", "results.md")
sys.path.insert(0, ROOT)
import clip  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402

# CLIPs that studies start from. `{clip:name}` in the arguments is the best.pt of one.
CLIPS = {
    "products": "train_mxm --data products --clip tiny --loss hard --batch-size 128 --vocab-size 4096 "
                "--epochs 20 --eval-every 10",
    "primitives": "train_mxm",
    # as `eval.small_clip`, which two runs at a time would both train
    "source": "train_mxm --data primitives-source --loss clip --batch-size 128 --epochs 12 --eval-every 12",
}
STUDIES = {}  # study -> {row: a script or a variant, and its arguments}
BASES = {}  # study -> the script and the arguments that all of its rows have
CLAIMS = {}  # study -> [(row, the row it is compared with)]: what a paper says is ahead of what
GROUPS = {}  # name -> rows whose mean is compared, where a claim is about several


def study(name, base, rows, claims=()):
    """A study in which every row adds something to the same script (or variant of tests/variants.py) and
    arguments."""
    script, _, common = base.partition(" ")
    STUDIES[name] = {row: f"{base} {added}".strip() for row, added in rows.items()}
    BASES[name] = f"{started(script)} {common}".strip()
    CLAIMS[name] = list(claims)


def started(script):
    """What follows `python` to start a script, or a variant of one such as train_cmaclip:foreign."""
    return f"tests/variants.py {script}" if ":" in script else f"{script}.py"


# ---- the default commands

study("mxm-default", "train_mxm", {"the default": ""})
study("cmr-default", "train_clip4cmr --clip {clip:source}", {"the default": ""})
study("user-default", "train_user", {"the default": ""})
study("adapter-default", "train_adapter --clip {clip:source}", {"the default": ""})
study("cma-default", "train_cmaclip", {"the default": ""})


# ---- MXM-CLR: several observations of each instance, and the soft relation

# 3e-4 for several captions and 1e-4 for one were tried too, of the code before: both were behind in every row
SEVERAL = "--lr 1e-3|3e-3"
SINGLE = "--lr 3e-4|1e-3"


def sampled(instances, views, captions, epochs):
    """Arguments: so many instances in a step, with so many views and captions of each."""
    return (f"--batch-size {instances} --views {views} --captions {captions} --epochs {epochs} "
            f"--eval-every {max(1, epochs // 2)}")


# 64 images in each of 378 steps, whatever the row, but for the one that takes as long as `hard, 1 x 4`
ONE_BY_FOUR = sampled(64, 1, 4, 6)
TWO_BY_TWO = sampled(32, 2, 2, 3)
study("mxm-shapes", "train_mxm", {
    "clip, 1 x 1": f"{SINGLE} --loss clip {sampled(64, 1, 1, 6)}",
    "clip, 1 x 1, 8 epochs": f"{SINGLE} --loss clip {sampled(64, 1, 1, 8)}",
    "hard, 1 x 4": f"{SEVERAL} --loss hard {ONE_BY_FOUR}",
    "clip, 2 x 2": f"{SINGLE} --loss clip {TWO_BY_TWO}",
    "hard, 2 x 2": f"{SINGLE} --loss hard {TWO_BY_TWO}",
}, [("hard, 1 x 4", "clip, 1 x 1"), ("hard, 1 x 4", "clip, 1 x 1, 8 epochs"),
    ("hard, 1 x 4", "hard, 2 x 2"), ("hard, 2 x 2", "clip, 2 x 2")])

# the same batch as `hard, 1 x 4`, at the rate that is best for it, and what each part of the loss gives
PARTS = {
    "hard": f"--loss hard {ONE_BY_FOUR}",
    "soft, words": f"--loss soft {ONE_BY_FOUR}",
    "hybrid, words": ONE_BY_FOUR,
    "hybrid, features": f"--soft-relation features {ONE_BY_FOUR}",
}
study("mxm-loss", "train_mxm --lr 1e-3", PARTS,
      [("hybrid, words", "soft, words"), ("hybrid, features", "hard")])
# smaller differences, which need more seeds; the teacher is a CLIP that learned from these shapes for longer
study("mxm-hybrid", "train_mxm --lr 1e-3", {
    "hard": PARTS["hard"],
    "hybrid, words": PARTS["hybrid, words"],
    "hybrid, teacher": f"--soft-relation teacher --teacher {{clip:primitives}} {ONE_BY_FOUR}",
}, [("hybrid, words", "hard"), ("hybrid, teacher", "hard")])


# ---- CLIP4CMR: losses, imbalance, dimension

PAIR_WISE = ("contrastive", "modality-invariant", "triplet", "lifted-structure", "n-pairs",
             "supervised-contrastive")
CLASS_WISE = ("label-regression", "cross-entropy", "proxy-nca", "proxy-anchor", "pcl")
CMR = {loss: f"--loss {loss}" for loss in PAIR_WISE + CLASS_WISE} | {
    "pcl + 0.1 modality-invariant": "--loss pcl+modality-invariant:0.1",
    "pcl + 0.1 triplet": "--loss pcl+triplet:0.1",
}
GROUPS["class-wise losses"] = CLASS_WISE
GROUPS["pair-wise losses but modality-invariant"] = [x for x in PAIR_WISE if x != "modality-invariant"]
CMR_CLAIMS = [("class-wise losses", "pair-wise losses but modality-invariant"),
              *[("pcl", loss) for loss in (PAIR_WISE + CLASS_WISE)[:-1]],
              ("pcl + 0.1 modality-invariant", "pcl"), ("pcl + 0.1 triplet", "pcl")]
SMALL = "--hidden 1024 --dim 256 --patience 100"  # a common size, and no early stop
WIKIPEDIA = ("train_clip4cmr --data wikipedia --features features_train.npz features_test.npz "
             f"{SMALL} --epochs 60 --eval-every 3 --lr 3e-5|1e-4|3e-4|1e-3")
study("cmr-wikipedia", WIKIPEDIA, CMR, CMR_CLAIMS)
REAL_CLIP_RATES = {
    "contrastive": "1e-3", "modality-invariant": "3e-3", "triplet": "3e-3", "lifted-structure": "3e-3",
    "n-pairs": "1e-2", "supervised-contrastive": "3e-3", "label-regression": "1e-3", "cross-entropy": "1e-4",
    "proxy-nca": "1e-3", "proxy-anchor": "3e-3", "pcl": "1e-4", "pcl + 0.1 modality-invariant": "3e-3",
    "pcl + 0.1 triplet": "1e-2",
}
study("cmr-real-articleType", "train_clip4cmr --data clip-features --features "
      f"products_articleType_train.npz products_articleType_test.npz {SMALL} --epochs 160 --eval-every 8",
      {loss: f"--lr {REAL_CLIP_RATES[loss]} {added}" for loss, added in CMR.items()}, CMR_CLAIMS)
study("cmr-imbalance-batch", WIKIPEDIA, {
    "pcl, balanced": "--loss pcl",
    "pcl, 0.1 of the images": "--loss pcl --image-fraction 0.1",
    "pcl, 0.1 of the texts": "--loss pcl --text-fraction 0.1",
    "triplet, balanced": "--loss triplet",
    "triplet, 0.1 of the images": "--loss triplet --image-fraction 0.1",
    "triplet, 0.1 of the texts": "--loss triplet --text-fraction 0.1",
}, [("pcl, 0.1 of the images", "pcl, balanced"), ("pcl, 0.1 of the texts", "pcl, balanced"),
    ("triplet, 0.1 of the images", "triplet, balanced"), ("triplet, 0.1 of the texts", "triplet, balanced")])
study("cmr-dimension", f"{WIKIPEDIA.replace('--dim 256 ', '')} --loss pcl",
      {f"D {dim}": f"--dim {dim}" for dim in (16, 64, 256, 1024)},
      [(f"D {dim}", "D 256") for dim in (16, 64, 1024)])


# ---- USER: from a CLIP trained on the same products

USER = "train_user --data products --clip {clip:products} --dim 256 --batch-weight 1 --lr-drop 0.8"
# patches as they are have a norm of 13, what is added to them one of 0.25: hence --unit-norm
FIVE_PASSES = f"{USER} --epochs 5 --eval-every 5 --momentum 0.99 --clip-lr 3e-4 --unit-norm"
UTO = "--lr 1e-3|3e-3|1e-2"
study("user-enhancement", FIVE_PASSES, {"none": f"{UTO} --enhance none", "both": UTO}, [("both", "none")])
study("user-loss", FIVE_PASSES, {
    "uto": UTO,
    "infonce": "--lr 3e-4|1e-3|3e-3|1e-2 --loss infonce",
    "triplet": "--lr 1e-3|3e-3|1e-2|3e-2 --loss triplet",
}, [("uto", "triplet"), ("uto", "infonce")])
# batches so small that they hold few negatives of their own
study("user-queue", f"{USER} --epochs 2 --eval-every 2 --batch-size 16 --clip-lr 1e-4", {
    "no queue": "--lr 1e-3 --queue 0",
    "queues of 2,048": "--lr 3e-3 --queue 2048",
}, [("queues of 2,048", "no queue")])


# ---- Cross-Modal Adapter: what is tuned, and sharing

TO_SHAPES = "train_adapter --data primitives-target --frames 4 --epochs 4 --batch-size 32"
study("adapter-shapes", f"{TO_SHAPES} --clip {{clip:source}}", {
    "adapter": "--tune adapter --lr 1e-2|3e-2|1e-1",
    "lora": "--tune lora --lr 3e-3|1e-2|3e-2",
    "full": "--tune full --lr 3e-4|1e-3|3e-3",
}, [("adapter", "lora"), ("adapter", "full")])
# a CLIP that knows nearly everything: single views of two thirds of these shapes
study("adapter-known", f"{TO_SHAPES} --clip {{clip:primitives}}", {
    "adapter": "--tune adapter --lr 3e-4|1e-3|3e-3|1e-2",
    "lora": "--tune lora --lr 3e-4|1e-3|3e-3|1e-2",
    "full": "--tune full --lr 1e-5|3e-5|1e-4",
}, [("adapter", "lora"), ("adapter", "full")])
study("adapter-share", f"{TO_SHAPES} --clip {{clip:source}} --tune adapter --lr 1e-2|3e-2",
      {"d_s 0": "--share 0", "d_s 16": ""}, [("d_s 16", "d_s 0")])


# ---- CMA-CLIP: texts that do not name the class, wrong inputs

PRODUCTS = "--clip {clip:products} --batch-size 128 --clip-lr 1e-4"
study("cma-descriptions", f"train_cmaclip --data {{descriptions}} {PRODUCTS} --epochs 4 --eval-every 4", {
    "cma": "--lr 3e-3 --fusion cma",
    "concat": "--lr 3e-3 --fusion concat",
    "image": "--lr 1e-2 --fusion image",
}, [("cma", "image"), ("cma", "concat")])
NOISY = "--train-noise-image 0.3 --train-noise-text 0.3"
study("cma-foreign", f"train_cmaclip:foreign --data products {PRODUCTS} --epochs 1 --robustness", {
    "modality": f"--lr 1e-2 --fusion modality {NOISY}",
    "concat": f"--lr 1e-2 --fusion concat {NOISY}",
}, [("modality", "concat")])


# ---- the numbers of one run

NUMBERS = {  # heading -> where its number stands in what metrics.json says of a split, where it does
    "rSum": "model rSum", "T2I R@1": "model text_to_image R@1", "I2T R@1": "model image_to_text R@1",
    "mAP": "model mAP", "I2T mAP": "model image_to_text mAP", "T2I mAP": "model text_to_image mAP",
    "accuracy": "model mean_of_tasks accuracy", "R@P90": "model mean_of_tasks recall_at_precision",
    "accuracy, images wrong": "noise image 1.0 mean_of_tasks accuracy",
    "accuracy, texts wrong": "noise text 1.0 mean_of_tasks accuracy",
    "image weight": "noise image 0.0 mean_of_tasks image_weight",
    "image weight, images wrong": "noise image 1.0 mean_of_tasks image_weight",
    "image weight, texts wrong": "noise text 1.0 mean_of_tasks image_weight",
}
JUDGED_BY = ("rSum", "mAP", "accuracy", "R@P90", "accuracy, images wrong", "accuracy, texts wrong")


def numbers_of(out):
    """{heading: number} of a finished run's folder."""
    read = {}
    for name in ("metrics", "costs", "made"):  # costs: of an adapter; made: what `execute` noted
        path = os.path.join(out, f"{name}.json")
        if os.path.exists(path):
            with open(path) as f:
                read[name] = json.load(f)
    numbers = {}
    for split, before in (("test", ""), ("unseen", "unseen ")):
        for heading, place in NUMBERS.items():
            found = read["metrics"].get(split)
            for key in place.split():
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, (int, float)):
                numbers[before + heading] = found
    if "costs" in read:
        numbers["weights trained, %"] = 100 * read["costs"]["share"]
    if "made" in read:
        numbers["CPU seconds"] = read["made"]["cpu_seconds"]
    return numbers


# ---- tables

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; further on the last one will do.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12,
             2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)


def compared(differences):
    """Cells of a comparison: the mean difference with its 95% interval, how many are positive, a verdict."""
    n = len(differences)
    mean = statistics.mean(differences)
    half = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    verdict = "not resolved" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
    return {"difference (95% interval)": f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})",
            "seeds ahead": f"{sum(d > 0 for d in differences)} of {n}", "verdict": verdict}


def spread(values):
    """Mean and standard deviation over seeds; the value alone where there is one."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def markdown(rows):
    """A Markdown table of {row: {heading: cell}}."""
    headings = list(dict.fromkeys(heading for cells in rows.values() for heading in cells))
    lines = ["| | " + " | ".join(headings) + " |", "|" + " --- |" * (1 + len(headings))]
    for row, cells in rows.items():
        lines.append(" | ".join([f"| {row}", *(cells.get(heading, "") for heading in headings)]) + " |")
    return "\n".join(lines)


def of_claims(rows, claims):
    """What is ahead of what, as rows of a table: of {row: {heading: [a number for each seed]}} the pairs of
    rows in claims, seed by seed."""
    def of_seeds(name, heading):
        several = [rows[row][heading] for row in GROUPS.get(name, (name,))]
        return [statistics.mean(values) for values in zip(*several)]

    everywhere = set.intersection(*map(set, rows.values()))
    cells = {}
    for row, other in claims:
        for heading in JUDGED_BY:
            if heading in everywhere:
                differences = [a - b for a, b in zip(of_seeds(row, heading), of_seeds(other, heading))]
                cells[f"{row} against {other}, {heading}"] = compared(differences)
    return cells


def tables(name, folders, options):
    """{caption: table} of a study.

    folders: {row: [the folder of each seed's finished run]}; options: {row: the options that were chosen}.
    """
    rows = {}
    for row, outs in folders.items():
        runs = [numbers_of(out) for out in outs]
        common = [heading for heading in runs[0] if all(heading in run for run in runs)]
        rows[row] = {heading: [run[heading] for run in runs] for heading in common}
    cells = {}
    for row, values in rows.items():
        label = f"{row}, `{options[row]}`" if options[row] else row
        cells[label] = {heading: spread(numbers) for heading, numbers in values.items()}
    made = {"": markdown(cells)}
    if CLAIMS[name] and len(outs) > 1:
        made["Differences, seed by seed"] = markdown(of_claims(rows, CLAIMS[name]))
    return made


# ---- tests/results.md

def section(name, made, seeds):
    """What stands between a study's markers: how its tables were made, and the tables."""
    of_seeds = f"{seeds} runs in each row, from seed 0 on: mean ± standard deviation"
    of_seeds = "One run in each row, seed 0" if seeds == 1 else of_seeds
    lines = [f"<!-- study: {name} -->",
             f"`python tests/study.py {name} --seeds {seeds}`, which runs, with what each row adds,\\",
             f"`{BASES[name]}`.\\", f"{of_seeds}. torch {torch.__version__}, {os.cpu_count()} cores."]
    for caption, text in made.items():
        lines += ["", f"{caption}:", ""] if caption else [""]
        lines += [text]
    return "\n".join([*lines, "<!-- end -->"])


def write_results(sections):
    """Replace the sections {study: text} of results.md."""
    text = data.read_text(RESULTS)
    for name, made in sections.items():
        begin = f"<!-- study: {name} -->"
        before, _, after = text.partition(f"{begin}\n")
        old, end, rest = after.partition("<!-- end -->\n")
        data.expect(end and "<!-- study:" not in old, RESULTS,
                    f"there are no lines {begin} and <!-- end -->; add both where its tables belong")
        text = f"{before}{made}\n{rest}"
    with open(RESULTS, "w") as f:
        f.write(text)


# ---- descriptions of products without the names of their classes

def write_descriptions(path, roots):
    """Write the file that `{descriptions}` names: the products, each with what its shop says of it alone,
    without the words that name its classes. Splits stay what they are."""
    root = roots.get("products", os.path.join(ROOT, "data", "products"))
    own = os.path.join(root, "products.jsonl")  # the form that has descriptions beside titles
    splits = data.load_splits(own) if os.path.exists(own) else data.load_splits("products", root)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "w") as f:
        for split, (instances, classes) in zip(data.SPLITS, splits):
            for x in instances:
                labels = {task: classes[task][n] for task, n in x.labels.items() if n >= 0}
                row = {"id": x.id, "images": list(map(os.path.abspath, x.images)), "labels": labels,
                       "captions": [description(x, labels)], "split": split, "group": x.group}
                f.write(json.dumps(row) + "\n")
    os.replace(f"{path}.part", path)


def description(x, labels):
    """An instance's last caption without the words of its own classes, in singular or plural."""
    words = {word.rstrip("s") for name in labels.values() for word in re.findall(r"[a-z]+", name.lower())}
    left = [word for word in x.captions[-1].split()
            if not words & {part.rstrip("s") for part in re.findall(r"[a-z]+", word.lower())}]
    return " ".join(left) or "a product"


# ---- runs

def settings(argv=None):
    p = eval.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="*", choices=[*STUDIES, []], metavar="study",
                   help=", ".join(STUDIES) + " (default: all)")
    p.add_argument("--seeds", type=eval.positive_int, default=3)
    p.add_argument("--root", action="append", default=[], metavar="NAME=FOLDER",
                   help="where the data set NAME lies; may be repeated")
    p.add_argument("--out", default=os.path.join("runs", "study"))
    p.add_argument("--list", action="store_true", help="print the commands only")
    p.add_argument("--write", action="store_true", help="put the tables into tests/results.md; runs nothing")
    args = p.parse_args(argv)
    args.study = args.study or list(STUDIES)
    args.roots = dict(root.split("=", 1) for root in args.root)
    return args


def run_folder(arguments, seed, args):
    name = re.sub(r"[^\w.+=-]+", "-", arguments.removeprefix("train_").replace("--", ""))
    return os.path.join(args.out, f"{name.replace('eval-every', 'e')}-seed-{seed}")


def alternatives(arguments):
    """The arguments with each choice of their values: `--lr 1|3` -> [`--lr 1`, `--lr 3`]."""
    return [" ".join(words) for words in itertools.product(*(word.split("|") for word in arguments.split()))]


def value_of(option, words):
    """What follows an option among a command's words; None where it is not there."""
    return words[words.index(option) + 1] if option in words else None


def descriptions_path(args):
    return os.path.abspath(os.path.join(args.out, "descriptions.jsonl"))


def command_of(arguments, args):
    """What follows `python`, without --out, with the file, the CLIPs and the data sets' folders put in."""
    made = {f"{{clip:{name}}}": os.path.join(run_folder(CLIPS[name], 0, args), "best.pt") for name in CLIPS}
    made["{descriptions}"] = descriptions_path(args)
    script, *words = [made.get(word, word) for word in shlex.split(arguments)]
    name = value_of("--data", words)
    if name in args.roots and "--root" not in words:
        words += ["--root", args.roots[name]]
    return f"{started(script)} {shlex.join(words)}".strip()


def seeded(arguments, seed, args):
    """The run (command, folder) of these arguments."""
    out = run_folder(arguments, seed, args)
    return f"{command_of(arguments, args)} --seed {seed} --out {shlex.quote(out)}", out


def rows_of(args):
    """The arguments of all rows of the studies that were asked for."""
    return [row for name in args.study for row in STUDIES[name].values()]


def needed(name, args):
    """Whether a study that was asked for has `{name}` in its arguments."""
    return any(f"{{{name}}}" in row for row in rows_of(args))


def first_runs(args):
    """The runs that make the CLIPs, then those that choose the values of options: each choice with seed 0."""
    clips = [CLIPS[name] for name in CLIPS if needed(f"clip:{name}", args)]
    choices = [choice for row in rows_of(args) if "|" in row for choice in alternatives(row)]
    return [seeded(arguments, 0, args) for arguments in [*clips, *choices]]


def chosen(arguments, args):
    """Of the choices that the arguments leave, the one that was best on validation with seed 0."""
    choices = alternatives(arguments)
    if len(choices) == 1:
        return choices[0]
    folders = [run_folder(choice, 0, args) for choice in choices]
    all_there(folders)
    scores = [clip.load_checkpoint(os.path.join(out, "best.pt"))["state"]["best"] for out in folders]
    return choices[scores.index(max(scores))]


def planned(name, args):
    """A study's runs over all seeds: [(command, folder)], {row: [folder]} and {row: its learning rate}."""
    runs = []
    folders = {}
    options = {}
    for row, arguments in STUDIES[name].items():
        choice = chosen(arguments, args)
        rate = value_of("--lr", choice.split())
        options[row] = f"--lr {rate}" if rate else ""
        of_row = [seeded(choice, seed, args) for seed in range(args.seeds)]
        folders[row] = [out for _, out in of_row]
        runs += of_row
    return runs, folders, options


def all_there(folders):
    """Refuse to go on where one of these runs is not finished."""
    missing = [out for out in folders if not os.path.exists(os.path.join(out, "metrics.json"))]
    data.expect(not missing, f"{len(missing)} runs are missing", "run the same command without --write")


def execute(runs):
    """Make what is missing of some runs (command, folder), or go on with it; output.txt there has what they
    print."""
    for command, out in dict.fromkeys(runs):
        if os.path.exists(os.path.join(out, "metrics.json")):
            continue
        print(f"python {command}", file=sys.stderr)
        script, *words = shlex.split(command)
        if os.path.exists(os.path.join(out, "last.pt")):
            words.append("--resume")
        os.makedirs(out, exist_ok=True)
        before = os.times()
        with open(os.path.join(out, "output.txt"), "a") as f:
            done = subprocess.run([sys.executable, os.path.join(ROOT, script), *words], stdout=f, stderr=f)
        data.expect(done.returncode == 0, f"{out}/output.txt", f"says why this ended: python {command}")
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        eval.write_json(os.path.join(out, "made.json"), {"cpu_seconds": seconds})


def run_all(args):
    """Everything that the studies need and that is missing: a file, CLIPs, choices of options, runs."""
    if needed("descriptions", args) and not os.path.exists(descriptions_path(args)):
        write_descriptions(descriptions_path(args), args.roots)
    execute(first_runs(args))
    for name in args.study:
        execute(planned(name, args)[0])


def main(argv=None):
    args = settings(argv)
    if args.list:  # of rows whose options are still to be chosen, what chooses them
        fixed = [seeded(row, n, args) for row in rows_of(args) if "|" not in row for n in range(args.seeds)]
        for command, _ in dict.fromkeys([*first_runs(args), *fixed]):
            print(f"python {command}")
        return
    if not args.write:
        run_all(args)
    sections = {}
    for name in args.study:
        _, folders, options = planned(name, args)
        all_there([out for row in folders.values() for out in row])
        sections[name] = section(name, tables(name, folders, options), args.seeds)
    if args.write:
        write_results(sections)
    else:
        print("\n\n".join(sections.values()))


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
