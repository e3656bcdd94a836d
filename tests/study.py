"""The studies behind tests/results.md: runs of the five scripts, tables of their mean and spread over seeds.

    python tests/study.py losses                                 # run what is missing, then print the tables
    python tests/study.py losses --write                         # put the tables into tests/results.md
    python tests/study.py losses-photos --root flickr8k=path/to/flickr8k
    python tests/study.py cmr-wikipedia cmr-imbalance --root wikipedia=path/to/wikipedia
    python tests/study.py batch --jobs 2 --threads 1             # two runs at a time, one thread each
    python tests/study.py --list                                 # the commands, without running them

Runs are kept under runs/study. One that is finished (its metrics.json exists) is not repeated. One that was
interrupted is resumed. --write runs nothing: where a run is missing, it says so and changes nothing.
"""
import argparse
import concurrent.futures
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "tests", "results.md")
sys.path.insert(0, ROOT)
import data  # noqa: E402

# CLIPs that studies start from, trained on the same train split; {mixed}: Flickr8k and the products
CLIPS = {
    "primitives": "train_mxm.py",
    "products": "train_mxm.py --data products --loss clip --epochs 60",
    "source": "train_mxm.py --data primitives-source --loss clip --epochs 20",
    "photos": "train_mxm.py --data {mixed} --loss clip --epochs 60",
}
STUDIES = {}  # study -> (script, {row: arguments}); {NAME} in the arguments is the best.pt of one of CLIPS


# ---- MXM-CLR: losses, batch sizes, views
# Every step shows as many images and captions, and every run as many in all, unless the name of the row says
# otherwise. CLIP's loss takes one pair of an instance: it gets twice the instances and twice the epochs.

def sampled(loss, instances, views, epochs):
    """Arguments: so many instances in a step, with as many captions as views of each."""
    return (f"{loss} --batch-size {instances} --views {views} --captions {views} "
            f"--epochs {epochs} --eval-every {epochs}")


def one_script(script, base, rows):
    """A study of one script in which every row adds something to the same arguments."""
    return script, {row: f"{base} {changed}".strip() for row, changed in rows.items()}


MULTIFOLD = {loss: f"--loss {loss}" for loss in ("mil-nce", "hard-uniform", "hard", "soft", "hybrid")}
LOSSES = {
    "clip": sampled("--loss clip", 128, 1, 16),
    "clip, half the samples": sampled("--loss clip", 64, 1, 8),
    "clip, 2 pairs of each": sampled("--loss clip", 64, 2, 8),
}
for row, loss in MULTIFOLD.items():
    LOSSES[row] = sampled(loss, 64, 2, 8)
LOSSES["hybrid, sharpness 1"] = sampled("--loss hybrid --soft-temperature 0.05", 64, 2, 8)
LOSSES["hybrid, known groups"] = sampled("--loss hybrid --soft-relation oracle", 64, 2, 8)
STUDIES["losses"] = "train_mxm.py", LOSSES

# A photo is one image: 64 images and 128 captions a step, or 96 pairs, which are as many observations.
PHOTOS = {"clip": "--loss clip --batch-size 96 --epochs 60 --eval-every 6"}
for row, loss in MULTIFOLD.items():
    PHOTOS[row] = f"{loss} --batch-size 64 --views 1 --captions 2 --epochs 40 --eval-every 4"
STUDIES["losses-photos"] = one_script("train_mxm.py", "--data flickr8k", PHOTOS)

STUDIES["batch"] = "train_mxm.py", {
    "clip, 64 images a step": sampled("--loss clip", 64, 1, 16),
    "clip, 128 images a step": sampled("--loss clip", 128, 1, 16),
    "clip, 256 images a step": sampled("--loss clip", 256, 1, 16),
    "hybrid, 64 images a step": sampled("--loss hybrid", 32, 2, 8),
    "hybrid, 128 images a step": sampled("--loss hybrid", 64, 2, 8),
    "hybrid, 256 images a step": sampled("--loss hybrid", 128, 2, 8),
}
STUDIES["views"] = "train_mxm.py", {
    "clip, 1 x 1": sampled("--loss clip", 128, 1, 16),
    "hybrid, 2 x 2": sampled("--loss hybrid", 64, 2, 8),
    "hybrid, 4 x 4": sampled("--loss hybrid", 32, 4, 4),
}


# ---- CLIP4CMR: losses, imbalance, dimension

CMR_LOSSES = ("contrastive", "modality-invariant", "triplet", "lifted-structure", "n-pairs",
              "supervised-contrastive", "label-regression", "cross-entropy", "proxy-nca",
              "proxy-anchor", "pcl")
CMR = {loss: f"--loss {loss}" for loss in CMR_LOSSES} | {
    "proxy-anchor, alpha 32": "--loss proxy-anchor --proxy-alpha 32",
    "contrastive, as published": "--loss contrastive-published",
    "supervised contrastive, as published": "--loss supervised-contrastive-published",
    "pcl, not standardised": "--loss pcl --no-standardise",
    "pcl, learned prototypes": "--loss pcl --prototypes learned",
    "pcl + 0.1 modality-invariant": "--loss pcl+modality-invariant:0.1",
    "pcl + 0.01 modality-invariant": "--loss pcl+modality-invariant:0.01",
    "pcl + 0.1 triplet": "--loss pcl+triplet:0.1",
}
WIKIPEDIA = "--data wikipedia --features features_train.npz features_test.npz"
CMR_PRIMITIVES = "--clip {primitives} --task shape --epochs 30"
CMR_PRODUCTS = "--data products --clip {products} --task subCategory"
STUDIES["cmr-wikipedia"] = one_script("train_clip4cmr.py", WIKIPEDIA, CMR)
STUDIES["cmr-primitives"] = one_script("train_clip4cmr.py", CMR_PRIMITIVES, CMR)
STUDIES["cmr-products"] = one_script("train_clip4cmr.py", CMR_PRODUCTS, CMR)

for study, kind in (("cmr-imbalance", "subset"), ("cmr-imbalance-batch", "batch")):
    imbalance = {}
    for loss in ("pcl", "triplet"):
        for modality in ("text", "image"):
            imbalance[f"{loss}, 1 of the {modality}s"] = f"--loss {loss}"
            for fraction in (0.7, 0.5, 0.3, 0.1):
                row = f"{loss}, {fraction} of the {modality}s"
                imbalance[row] = f"--loss {loss} --{modality}-fraction {fraction} --imbalance {kind}"
    STUDIES[study] = one_script("train_clip4cmr.py", WIKIPEDIA, imbalance)

# 1024 is the default: without the flag, the run is that of the studies above.
DIMENSION = {"D 16": "--dim 16", "D 64": "--dim 64", "D 256": "--dim 256", "D 1024": "",
             "D 2048": "--dim 2048"}
STUDIES["cmr-dimension"] = one_script("train_clip4cmr.py", f"{WIKIPEDIA} --loss pcl", DIMENSION)


# ---- CMA-CLIP: fusions, noise in training

FUSIONS = {name: f"--fusion {name} --robustness"
           for name in ("cma", "sequence", "modality", "concat", "image", "text")}
TWO_MODALITIES = {name: FUSIONS[name] for name in ("cma", "sequence", "modality", "concat")}
CMA_ON = {
    "cma-primitives": "--epochs 3 --eval-every 3",
    "cma-products": "--data products --clip {products} --epochs 15 --lr 1e-3 --clip-lr 2e-4",
}
for study, base in CMA_ON.items():
    both_noisy = f"{base} --train-noise-image 0.3 --train-noise-text 0.3"
    text_noisy = f"{base} --train-noise-text 0.5"
    STUDIES[study] = one_script("train_cmaclip.py", base, FUSIONS)
    STUDIES[f"{study}-noise"] = one_script("train_cmaclip.py", both_noisy, FUSIONS)
    STUDIES[f"{study}-text-noise"] = one_script("train_cmaclip.py", text_noisy, TWO_MODALITIES)
    foreign = f"{both_noisy} --noise-kind foreign"
    STUDIES[f"{study}-foreign"] = one_script("train_cmaclip.py", foreign, TWO_MODALITIES)


# ---- USER: each row changes one thing of `both`
# Every run starts from a CLIP trained on the same data. Steps are few, so the momentum is 0.99. At the
# paper's 0.999 the keys would hardly leave their start.

USER = {
    "none": "--momentum 0.99 --enhance none",
    "sge": "--momentum 0.99 --enhance sge",
    "cge": "--momentum 0.99 --enhance cge",
    "both": "--momentum 0.99",
    "both, no queue": "--momentum 0.99 --queue 0",
    "both, queue 256": "--momentum 0.99 --queue 256",
    "both, texts too": "--momentum 0.99 --enhance-texts",
    "both, frozen CLIP": "--momentum 0.99 --clip-lr 0",
    "both, momentum 0.9": "--momentum 0.9",
    "both, momentum 0.999": "--momentum 0.999",
    "both, InfoNCE": "--momentum 0.99 --loss infonce",
    "both, triplet": "--momentum 0.99 --loss triplet",
    "none, no queue, triplet": "--momentum 0.99 --enhance none --queue 0 --loss triplet",
}
USER_ON = {
    "user-primitives": "--clip {primitives} --epochs 1 --batch-weight 1",
    "user-flickr8k": "--data flickr8k --clip {photos} --epochs 4 --eval-every 4 --batch-size 64",
}
for study, base in USER_ON.items():
    base += " --lr 1e-3 --clip-lr 1e-4 --dim 256"
    STUDIES[study] = one_script("train_user.py", base, USER)


# ---- Cross-Modal Adapter: what is tuned, rank, sharing

TUNE = {  # each with the best rate of several a factor of 3 apart, on the shapes' val with seed 0
    "adapter": "--tune adapter --lr 0.01",
    "adapter-unshared": "--tune adapter-unshared --lr 0.01",
    "full": "--tune full --lr 0.0003",
    "head": "--tune head --lr 0.003",
    "bitfit": "--tune bitfit --lr 0.03",
    "prompt": "--tune prompt --lr 0.03",
    "lora": "--tune lora --lr 0.01",
    "adapter, r 2": "--tune adapter --lr 0.01 --rank 2",
}
CURVES = {row: f"{TUNE[row]} --train-metrics" for row in ("adapter", "full")}
RANK = {"r 2": "--rank 2", "r 4": "--rank 4", "r 8": "",  # the default
        "r 16": "--rank 16", "r 32": "--rank 32"}
SHARE = {"d_s 0": "--share 0", "d_s 8": "--share 8", "d_s 16": "",  # the default
         "d_s 64": "--share 64", "d_s 128": "--share 128"}
POOL = {"query, tau 5": "", "query, tau 1": "--tau 1", "mean": "--pool mean"}
TO_SHAPES = "--data primitives-target --clip {source} --frames 4 --epochs 4 --batch-size 32"  # of 5 captions
TO_PRODUCTS = "--data products --clip {photos} --epochs 20 --eval-every 4 --batch-size 64"
STUDIES["adapter-shapes"] = one_script("train_adapter.py", TO_SHAPES, TUNE)
STUDIES["adapter-products"] = one_script("train_adapter.py", TO_PRODUCTS, TUNE)
STUDIES["adapter-curves"] = one_script("train_adapter.py", TO_PRODUCTS, CURVES)
STUDIES["adapter-rank"] = one_script("train_adapter.py", f"{TO_SHAPES} {TUNE['adapter']}", RANK)
STUDIES["adapter-share"] = one_script("train_adapter.py", f"{TO_SHAPES} {TUNE['adapter']}", SHARE)
STUDIES["adapter-pool"] = one_script("train_adapter.py", f"{TO_SHAPES} {TUNE['adapter']}", POOL)


# ---- the numbers of one run: {heading: number}

TEXT_FIRST = (("T2I", "text_to_image"), ("I2T", "image_to_text"))
IMAGE_FIRST = TEXT_FIRST[::-1]


def both_ways(before, model, measures, order):
    """These measures of a model's retrieval; `before` stands before each heading."""
    return {f"{before}{way} {measure}": model[key][measure] for way, key in order for measure in measures}


def mxm_columns(study, metrics):
    if study == "losses-photos":
        return both_ways("test ", metrics["test"]["model"], ("R@1", "R@10", "MRR"), TEXT_FIRST)
    columns = {}
    for split in ("test", "unseen"):
        columns |= both_ways(f"{split} ", metrics[split]["model"], ("R@1", "NDCG@5"), TEXT_FIRST)
    return columns


def clip4cmr_columns(study, metrics):
    columns = {}
    for split, rows in metrics.items():
        columns |= both_ways(f"{split} ", rows["model"], ("mAP",), IMAGE_FIRST)
        columns[f"{split} average"] = rows["model"]["mAP"]
    return columns


def user_columns(study, metrics):
    columns = {}
    for split, rows in metrics.items():
        columns[f"{split} rSum"] = rows["model"]["rSum"]
        columns |= both_ways(f"{split} ", rows["model"], ("R@1", "R@5", "R@10"), IMAGE_FIRST)
    return columns


def adapter_columns(study, metrics):
    if study == "adapter-curves":
        evaluated = [record for record in metrics["log"] if "val" in record]
        return {f"epoch {record['epoch']}, {split}": record[split]["rSum"]
                for record in evaluated for split in ("train", "val")}
    model = metrics["test"]["model"]
    costs = metrics["costs"]
    return both_ways("", model, ("R@1", "R@5"), TEXT_FIRST) | {
        "rSum": model["rSum"],
        "trained, thousands": costs["trained_parameters"] / 1000,
        "share, %": 100 * costs["share"],
        "ms per step": 1000 * costs["seconds_per_step"],
        "GiB": costs["peak_memory_gib"],
    }


def cmaclip_columns(study, metrics):
    mean = metrics["test"]["model"]["mean"]
    noise = metrics["test"]["noise"]
    columns = {
        "accuracy": mean["accuracy"],
        "macro F1": mean["macro_f1"],
        "R@P90": mean["recall_at_precision"],
    }
    for modality, fractions in noise.items():
        for fraction, noisy in fractions.items():
            if fraction != "0.0":
                columns[f"{100 * float(fraction):.0f}% {modality} noise"] = noisy["mean"]["accuracy"]
    for heading, scores in (("clean", noise["image"]["0.0"]), ("all images noisy", noise["image"]["1.0"]),
                            ("all texts noisy", noise["text"]["1.0"])):
        for task, values in scores.items():
            if "image_weight" in values:
                columns[f"image weight, {task}, {heading}"] = values["image_weight"]
    return columns


def task_columns(measure):
    """The function that takes one measure of every task by itself, and its mean."""
    def columns(study, metrics):
        return {task: values[measure] for task, values in metrics["test"]["model"].items()}
    return columns


TABLES = {  # script -> {caption: the function that takes a table's numbers from a run}
    "train_mxm.py": {"": mxm_columns},
    "train_clip4cmr.py": {"": clip4cmr_columns},
    "train_user.py": {"": user_columns},
    "train_adapter.py": {"": adapter_columns},
    "train_cmaclip.py": {
        "Mean of all tasks, clean and with noise": cmaclip_columns,
        "Accuracy of each task": task_columns("accuracy"),
        "Macro F1 of each task": task_columns("macro_f1"),
        "R@P90 of each task": task_columns("recall_at_precision"),
    },
}


# ---- tables and tests/results.md

def read_run(out):
    """metrics.json of a run's folder; of an adapter also its costs and its log."""
    with open(os.path.join(out, "metrics.json")) as f:
        metrics = json.load(f)
    costs = os.path.join(out, "costs.json")
    if os.path.exists(costs):
        with open(costs) as f, open(os.path.join(out, "log.jsonl")) as lines:
            metrics |= {"costs": json.load(f), "log": [json.loads(line) for line in lines]}
    return metrics


def spread(values, sign=""):
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def table(rows):
    """A Markdown table of {row: {heading: [a number for each seed]}}.

    Where a row is called `hard` or `both`, a last column has the first column's differences from that row.
    Runs of one seed start alike and see the data in one order, so these vary less than the values themselves.
    """
    headings = list(dict.fromkeys(heading for values in rows.values() for heading in values))
    first = headings[0]
    reference = next((row for row in ("hard", "both") if row in rows), None)
    titles = headings + [f"{first} against {reference}, paired"] * bool(reference)
    lines = ["| | " + " | ".join(titles) + " |", "|" + " --- |" * (1 + len(titles))]
    for row, values in rows.items():
        cells = [spread(values[heading]) if heading in values else "" for heading in headings]
        if row == reference:
            cells.append("")
        elif reference:
            cells.append(spread([a - b for a, b in zip(values[first], rows[reference][first])], "+"))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(study, folders):
    """{caption: table} of a study; folders: {row: [the folder of each seed's finished run]}."""
    runs = {row: [read_run(out) for out in seeds] for row, seeds in folders.items()}
    made = {}
    for caption, columns in TABLES[STUDIES[study][0]].items():
        rows = {}
        for row, seeds in runs.items():
            numbers = [columns(study, metrics) for metrics in seeds]
            rows[row] = {heading: [run[heading] for run in numbers] for heading in numbers[0]}
        made[caption] = table(rows)
    return made


def machine():
    """torch's version and the processor, in one line."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = re.findall(r"model name\s*: (.*)", f.read())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"torch {torch.__version__}, {os.cpu_count()} cores of {(names or [platform.processor()])[0]}{gpu}"


def machine_of(out):
    """What execute() noted beside a run."""
    path = os.path.join(out, "machine.txt")
    if not os.path.exists(path):
        return f"not recorded (tables written with {machine()})"
    with open(path) as f:
        return f.read()


def data_folders(study):
    """The --root options of the data sets that a study reads."""
    rows = " ".join(STUDIES[study][1].values())
    commands = rows + "".join(f" {command}" for name, command in CLIPS.items() if f"{{{name}}}" in rows)
    names = set(re.findall(r"--data ([a-z]\S+)", commands))
    if "{mixed}" in commands:
        names |= {"flickr8k", "products"}
    return "".join(f" --root {name}=path/to/{name}" for name in sorted(names) if "primitives" not in name)


def section(study, folders, seeds):
    """What stands between a study's markers: how its tables were made, and the tables."""
    machines = " and ".join(sorted({machine_of(out) for row in folders.values() for out in row}))
    used = ", ".join(map(str, range(seeds)))
    lines = [
        f"<!-- study: {study} -->",
        f"`python tests/study.py {study} --seeds {seeds}{data_folders(study)}`\\",
        f"{seeds} runs in each row, seeds {used}: mean ± standard deviation.\\",
        f"Machine: {machines}.",
    ]
    for caption, made in tables(study, folders).items():
        lines += ["", f"{caption}:", ""] if caption else [""]
        lines += [made]
    return "\n".join([*lines, "<!-- end -->"])


def with_section(text, study, made):
    """results.md with a study's section replaced, or added at the end where there is none."""
    begin = f"<!-- study: {study} -->"
    before, found, after = text.partition(f"{begin}\n")
    if not found:
        return f"{text.rstrip()}\n\n## {study}\n\n{made}\n"
    old, end, rest = after.partition("<!-- end -->\n")
    if not end or "<!-- study:" in old:
        refuse(f"{RESULTS}: {begin} has no line <!-- end --> after it; add one below its tables")
    return f"{before}{made}\n{rest}"


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write_results(folders, seeds):
    """Put the tables of finished runs into results.md, all of them or none."""
    needed = [out for rows in folders.values() for row in rows.values() for out in row]
    missing = [out for out in needed if not finished(out)]
    if missing:
        refuse(f"{len(missing)} runs are missing, first {missing[0]}; run the same command without --write")
    with open(RESULTS) as f:
        text = f.read()
    for study, rows in folders.items():
        text = with_section(text, study, section(study, rows, seeds))
    with open(RESULTS, "w") as f:
        f.write(text)


# ---- runs

def settings(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="*", choices=[*STUDIES, []], help=", ".join(STUDIES))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--root", action="append", default=[], metavar="NAME=FOLDER",
                   help="where the data set NAME lies; may be repeated")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--threads", type=int, help="threads of each run")
    p.add_argument("--out", default=os.path.join("runs", "study"))
    p.add_argument("--list", action="store_true", help="print the commands only")
    p.add_argument("--write", action="store_true", help="put the tables into tests/results.md; runs nothing")
    args = p.parse_args(argv)
    args.study = args.study or list(STUDIES)
    args.roots = dict(root.split("=", 1) for root in args.root)
    args.mixed = os.path.abspath(os.path.join(args.out, "mixed.jsonl"))
    return args


def clip_folder(name, args):
    return os.path.join(args.out, f"clip-{name}")


def run_folder(script, arguments, seed, args):
    prefix = "" if script == "train_mxm.py" else script[len("train_"):-len(".py")] + "-"
    name = re.sub(r"[^\w.+:=-]+", "-", arguments.replace("--", "")).replace("eval-every", "e")
    return os.path.join(args.out, f"{prefix}{name}-seed-{seed}")


def complete(command, out, args):
    """The command with the folder of its data set and its own."""
    words = shlex.split(command)
    name = words[words.index("--data") + 1] if "--data" in words else None
    root = f" --root {shlex.quote(args.roots[name])}" if name in args.roots else ""
    return f"{command}{root} --out {out}"


def planned(args):
    """What the studies need: the CLIPs and the runs as [(command, folder)], and {study: {row: [folder]}}."""
    weights = {name: os.path.join(clip_folder(name, args), "best.pt") for name in CLIPS}
    clips, runs, folders = {}, [], {}
    for study in args.study:
        script, rows = STUDIES[study]
        folders[study] = {row: [] for row in rows}
        for row, arguments in rows.items():
            for name, command in CLIPS.items():
                if f"{{{name}}}" in arguments:
                    out = clip_folder(name, args)
                    clips[name] = complete(command.format(mixed=args.mixed), out, args), out
            for seed in range(args.seeds):
                out = run_folder(script, arguments, seed, args)
                command = f"{script} {arguments.format(**weights)} --seed {seed}"
                runs.append((complete(command, out, args), out))
                folders[study][row].append(out)
    return list(clips.values()), runs, folders


def finished(out):
    return os.path.exists(os.path.join(out, "metrics.json"))


def execute(command, out, threads):
    """Run a command, or go on with it; nothing where it is finished."""
    if finished(out):
        return
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    resume = ["--resume"] if os.path.exists(os.path.join(out, "last.pt")) else []
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "machine.txt"), "w") as f:
        f.write(machine())
    with open(os.path.join(out, "output.txt"), "a") as f:
        subprocess.run([sys.executable, *shlex.split(command), *resume],
                       cwd=ROOT, env=environment, stdout=f, stderr=f, check=True)


def execute_all(clips, runs, args):
    """First the CLIPs, then the runs that start from them, --jobs at a time."""
    missing = [command for command, out in clips if not finished(out)]
    if any(args.mixed in command for command in missing) and not os.path.exists(args.mixed):
        os.makedirs(args.out, exist_ok=True)
        write_mixed(args.mixed, args.roots)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for commands in (clips, list(dict.fromkeys(runs))):  # studies share rows: each command once
            futures = [pool.submit(execute, command, out, args.threads) for command, out in commands]
            for done, future in enumerate(futures, 1):
                future.result()
                print(f"\r{done} of {len(futures)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def write_mixed(path, roots):
    """Photos and products as one file: what a CLIP sees before it is carried over to products alone."""
    with open(path, "w") as f:
        for name in ("flickr8k", "products"):
            for split in ("train", "val", "test"):
                for x in data.load(name, roots.get(name), split)[0]:
                    images = [os.path.abspath(image) for image in x.images]
                    row = {"id": f"{name}-{x.id}", "images": images, "captions": x.captions, "split": split}
                    f.write(json.dumps(row) + "\n")


def main(argv=None):
    args = settings(argv)
    clips, runs, folders = planned(args)
    if args.list:
        print("\n".join(f"python {command}" for command, _ in [*clips, *runs]))
    elif args.write:
        write_results(folders, args.seeds)
    else:
        execute_all(clips, runs, args)
        for study, rows in folders.items():
            for caption, made in tables(study, rows).items():
                print(f"\n{study}{': ' if caption else ''}{caption}\n{made}")


if __name__ == "__main__":
    main()
