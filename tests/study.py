"""The studies behind README.md's tables: runs what is missing under runs/study, then prints mean and spread over seeds.

    python tests/study.py losses                                  # every loss on the built-in shapes, three seeds
    python tests/study.py losses-photos --root flickr8k=path/to/flickr8k
    python tests/study.py cmr-wikipedia cmr-imbalance --root wikipedia=path/to/wikipedia
    python tests/study.py batch --jobs 2 --threads 1              # two runs at a time, one thread each
    python tests/study.py --list                                  # the commands, without running them

A finished run (its metrics.json exists) is not repeated; an interrupted one is resumed.
"""
import argparse
import concurrent.futures
import json
import os
import re
import shlex
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data  # noqa: E402


def samples(loss, batch, views, captions, epochs, pairs=False):
    """Arguments that show as many images and captions per step and in all: CLIP's loss takes one pair of an instance, so it
    gets as many more instances per step, and as many more epochs; or with `pairs` several pairs of the same instances."""
    if loss == "--loss clip" and not pairs:
        batch, epochs, views, captions = batch * views, epochs * views, 1, 1
    return f"{loss} --batch-size {batch} --views {views} --captions {captions} --epochs {epochs} --eval-every {epochs}"


MXM = {"clip": "--loss clip", "clip, half the samples": "--loss clip", "clip, 2 pairs of each": "--loss clip", **{loss: f"--loss {loss}" for loss in ("mil-nce", "hard-uniform", "hard", "soft", "hybrid")},
       "hybrid, sharpness 1": "--loss hybrid --soft-sharpness 1", "hybrid, known groups": "--loss hybrid --soft-relation group"}

CMR_LOSSES = ("contrastive", "modality-invariant", "triplet", "lifted-structure", "n-pairs", "supervised-contrastive",
              "label-regression", "cross-entropy", "proxy-nca", "proxy-anchor", "pcl")
CMR = {loss: f"--loss {loss}" for loss in CMR_LOSSES} | {"proxy-anchor, alpha 32": "--loss proxy-anchor --proxy-alpha 32", "pcl, learned prototypes": "--loss pcl --prototypes learned",
       "pcl + 0.1 modality-invariant": "--loss pcl+modality-invariant:0.1", "pcl + 0.01 modality-invariant": "--loss pcl+modality-invariant:0.01",
       "pcl + 0.1 triplet": "--loss pcl+triplet:0.1"}
WIKIPEDIA = "--data wikipedia --features features_train.npz features_test.npz"
FUSIONS = ("cma", "sequence", "modality", "concat", "image", "text")
NOISY, TEXT_NOISE = "--train-noise-image 0.3 --train-noise-text 0.3", "--train-noise-text 0.5"
CMA = {"primitives": "--epochs 3 --eval-every 3", "products": "--data products --clip {products} --epochs 15 --lr 1e-3 --clip-lr 2e-4"}

# USER from a CLIP trained on the same data: what is compared changes one thing of `both`. Few steps, so a momentum of 0.99.
USER = {"none": "--enhance none", "sge": "--enhance sge", "cge": "--enhance cge", "both": "",
        "both, no queue": "--queue 0", "both, queue 256": "--queue 256", "both, momentum 0.9": "--momentum 0.9", "both, momentum 0.999": "--momentum 0.999",
        "both, InfoNCE": "--loss infonce", "both, triplet": "--loss triplet", "none, no queue, triplet": "--enhance none --queue 0 --loss triplet"}
USER_LATER = {row: f"--infonce-first 0.5 {USER[row]}".strip() for row in ("none", "sge", "cge", "both", "both, no queue")}  # UTO in the second half
USER_ON = {"primitives": "--clip {primitives} --epochs 4 --eval-every 4 --batch-weight 1", "flickr8k": "--data flickr8k --clip {photos} --epochs 20 --eval-every 20 --batch-size 64"}
TUNE = {tune: f"--tune {tune} --lr {rate}" for tune, rate in {  # rates: of several a factor of 3 apart the best on the shapes' val, seed 0
    "adapter": 1e-2, "adapter-unshared": 1e-2, "full": 3e-4, "head": 3e-3, "bitfit": 3e-2, "prompt": 3e-2}.items()}
ADAPTER_ON = {"shapes": "--data primitives-target --clip {source} --frames 4 --epochs 20 --eval-every 4 --batch-size 32",
              "products": "--data products --clip {photos} --epochs 20 --eval-every 4 --batch-size 64"}

# study -> (script, {row: arguments}); {NAME} is the folder of one of the CLIPs below
STUDIES = {
    "losses": ("train_mxm.py", {row: samples(loss, 64, 2, 2, 8, "pairs" in row) for row, loss in MXM.items()} | {
        "clip, half the samples": samples("--loss clip", 64, 1, 1, 8)}),  # as many steps of as many instances, one pair of each
    # photos: one image each. 64 images and 128 captions a step, or for CLIP's loss 96 pairs: as many observations
    "losses-photos": ("train_mxm.py", {row: "--data flickr8k " + (
        f"{loss} --batch-size 96 --epochs 60 --eval-every 6" if row == "clip" else
        f"{loss} --batch-size 64 --views 1 --captions 2 --epochs 40 --eval-every 4") for row, loss in list(MXM.items())[:8] if "," not in row}),
    "batch": ("train_mxm.py", {f"{row}, {2 * batch} images a step": samples(MXM[row], batch, 2, 2, 8) for row in ("clip", "hybrid") for batch in (32, 64, 128)}),
    "views": ("train_mxm.py", {"clip, 1 x 1": samples(MXM["clip"], 64, 2, 2, 8)} | {
        f"hybrid, {m} x {m}": samples(MXM["hybrid"], 128 // m, m, m, 16 // m) for m in (2, 4)}),
    "cmr-wikipedia": ("train_clip4cmr.py", {row: f"{WIKIPEDIA} {loss}" for row, loss in CMR.items()}),
    "cmr-primitives": ("train_clip4cmr.py", {row: f"--clip {{primitives}} --task shape --epochs 30 {loss}" for row, loss in CMR.items()}),
    "cmr-products": ("train_clip4cmr.py", {row: f"--data products --clip {{products}} --task subCategory {loss}" for row, loss in CMR.items()}),
    "cmr-imbalance": ("train_clip4cmr.py", {f"{loss}, {part} of the {side}s": f"{WIKIPEDIA} --loss {loss}" + (f" --{side}-fraction {part}" if part < 1 else "")
                                            for loss in ("pcl", "triplet") for side in ("text", "image") for part in (1, 0.7, 0.5, 0.3, 0.1)}),
    "cmr-dimension": ("train_clip4cmr.py", {f"D {dim}": f"{WIKIPEDIA} --loss pcl" + (f" --dim {dim}" if dim != 1024 else "") for dim in (16, 64, 256, 1024, 2048)}),
    **{f"cma-{data}{name}": ("train_cmaclip.py", {fusion: " ".join(f"{arguments} {noise} --fusion {fusion} --robustness".split())
                                               for fusion in FUSIONS[:4 if noise == TEXT_NOISE else 6]})
       for data, arguments in CMA.items() for name, noise in (("", ""), ("-noise", NOISY), ("-text-noise", TEXT_NOISE))},
    **{f"user-{data}{later}": ("train_user.py", {row: f"{base} --lr 1e-3 --clip-lr 1e-4 --dim 256 {'' if '--momentum' in more else '--momentum 0.99 '}{more}".strip()
                                          for row, more in rows.items()}) for data, base in USER_ON.items() for later, rows in (("", USER), ("-later", USER_LATER))},
    **{f"adapter-{data}": ("train_adapter.py", {tune: f"{base} {more}" for tune, more in TUNE.items()} | {"adapter, r 2": f"{base} {TUNE['adapter']} --rank 2"})
       for data, base in ADAPTER_ON.items()},
    "adapter-curves": ("train_adapter.py", {tune: f"{ADAPTER_ON['products']} {TUNE[tune]} --train-metrics" for tune in ("adapter", "full")}),
    "adapter-rank": ("train_adapter.py", {f"r {r}": f"{ADAPTER_ON['shapes']} {TUNE['adapter']}{f' --rank {r}' if r != 8 else ''}" for r in (2, 4, 8, 16, 32)}),
    "adapter-share": ("train_adapter.py", {f"d_s {d}": f"{ADAPTER_ON['shapes']} {TUNE['adapter']}{f' --share {d}' if d != 16 else ''}" for d in (0, 8, 16, 64, 128)}),
}

# CLIPs that a study starts from, trained on the train split of the same data
CLIPS = {"primitives": "train_mxm.py", "products": "train_mxm.py --data products --loss clip --epochs 60",
         "source": "train_mxm.py --data primitives-source --loss clip --epochs 20", "photos": "train_mxm.py --data {mixed} --loss clip --epochs 60"}

WAYS = (("I2T", "image_to_text"), ("T2I", "text_to_image"))


def columns(study, script, run):
    """{heading: number} of one run's metrics.json."""
    if script == "train_mxm.py":
        photos = "photos" in study
        return {f"{split} {way} {metric}": run[split]["model"][key][metric] for split in (("test",) if photos else ("test", "unseen"))
                for way, key in WAYS[::-1] for metric in (("R@1", "R@10", "MRR") if photos else ("R@1", "NDCG@5"))}
    if script == "train_clip4cmr.py":
        return {f"{split} {name}": value for split, rows in run.items()
                for name, value in [*((f"{way} mAP", rows["model"][key]["mAP"]) for way, key in WAYS), ("average", rows["model"]["mAP"])]}
    if script == "train_user.py":
        return {f"{split} {name}": value for split, rows in run.items()
                for name, value in [("rSum", rows["model"]["rSum"]), *((f"{way} R@{k}", rows["model"][key][f"R@{k}"]) for way, key in WAYS for k in (1, 5, 10))]}
    if study == "adapter-curves":
        return {f"epoch {record['epoch']}, {split}": record[split]["rSum"] for record in run["log"] if "val" in record for split in ("train", "val")}
    if script == "train_adapter.py":
        return {f"{way} R@{k}": run["test"]["model"][key][f"R@{k}"] for way, key in WAYS[::-1] for k in (1, 5)} | {
            "rSum": run["test"]["model"]["rSum"], "trained, thousands": run["costs"]["trained_parameters"] / 1000, "share, %": 100 * run["costs"]["share"],
            "ms per step": 1000 * run["costs"]["seconds_per_step"], "GiB": run["costs"]["peak_memory_gib"]}
    if "-tasks" in study:  # every task by itself
        return {f"{task} {short}": found[metric] for task, found in run["test"]["model"].items() for short, metric in
                (("acc.", "accuracy"), ("F1", "macro_f1"), ("R@P90", "recall_at_precision"))}
    mean, noise = run["test"]["model"]["mean"], run["test"]["noise"]
    out = {"accuracy": mean["accuracy"], "macro F1": mean["macro_f1"], "R@P90": mean["recall_at_precision"]}
    for kind, runs in noise.items():
        for share, found in runs.items():
            if share != "0.0":
                out[f"{100 * float(share):.0f}% {kind} noise"] = found["mean"]["accuracy"]
    if "image_weight" in mean:
        for name, found in (("clean", noise["image"]["0.0"]), ("image noise", noise["image"]["1.0"]), ("text noise", noise["text"]["1.0"])):
            out[f"image weight, {name}"] = found["mean"]["image_weight"]
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="*", choices=[*STUDIES, []], help=", ".join(STUDIES))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--root", action="append", default=[], metavar="NAME=FOLDER", help="where the data set NAME lies; may be repeated")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--threads", type=int, help="threads of each run")
    p.add_argument("--out", default=os.path.join("runs", "study"))
    p.add_argument("--list", action="store_true", help="print the commands only")
    args = p.parse_args()

    mixed = os.path.abspath(os.path.join(args.out, "mixed.jsonl"))
    roots, folder = dict(part.split("=", 1) for part in args.root), lambda name: os.path.join(args.out, f"clip-{name}")

    def complete(command, out):  # with the data set's folder and the run's own
        words = shlex.split(command)
        name = words[words.index("--data") + 1] if "--data" in words else None
        return command + (f" --root {shlex.quote(roots[name])}" if name in roots else "") + f" --out {out}"

    commands, needed = {}, {}
    for study in args.study or STUDIES:
        script, rows = STUDIES[study]
        for row, arguments in rows.items():
            needed |= {name: complete(CLIPS[name].format(mixed=mixed), folder(name)) for name in CLIPS if f"{{{name}}}" in arguments}
            for seed in range(args.seeds):
                prefix = {"train_mxm.py": ""}.get(script, script[6:-3] + "-")
                out = os.path.join(args.out, prefix + re.sub(r"[^\w.+:=-]+", "-", arguments.replace("--", "")).replace("eval-every", "e") + f"-seed-{seed}")
                arguments_now = arguments.format(**{name: os.path.join(folder(name), "best.pt") for name in CLIPS})
                commands[study, row, seed] = (complete(f"{script} {arguments_now} --seed {seed}", out), out)
    if args.list:
        print("\n".join(f"python {command}" for command in [*needed.values(), *(command for command, _ in commands.values())]))
        return

    def run(command, out):
        if os.path.exists(os.path.join(out, "metrics.json")):
            return
        environment = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "output.txt"), "a") as f:
            resume = ["--resume"] if os.path.exists(os.path.join(out, "last.pt")) else []
            subprocess.run([sys.executable, *shlex.split(command), *resume], cwd=ROOT, env=environment, stdout=f, stderr=f, check=True)

    if "photos" in needed and not os.path.exists(mixed):
        os.makedirs(args.out, exist_ok=True)
        write_mixed(mixed, roots)
    seen = dict.fromkeys(commands.values())  # studies share rows: each command once
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: run(needed[name], folder(name)), needed))
        for done, _ in enumerate(pool.map(lambda c: run(*c), seen), 1):
            print(f"\r{done} of {len(seen)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    for study in args.study or STUDIES:
        script, rows = STUDIES[study]
        for name in (study, study + "-tasks") if script == "train_cmaclip.py" else (study,):
            values = {}  # row -> heading -> a number per seed
            for row in rows:
                runs = []
                for seed in range(args.seeds):
                    runs.append(columns(name, script, found_by(commands[study, row, seed][1])))
                values[row] = {heading: [run[heading] for run in runs] for heading in runs[0]}
            heads = list(dict.fromkeys(heading for found in values.values() for heading in found))
            reference = next((row for row in ("hard", "both") if row in values), None)
            paired = [f"{heads[0]} against {reference}, paired"] * bool(reference)
            print(f"\n{name}\n| | " + " | ".join(heads + paired) + " |\n|" + " --- |" * (1 + len(heads + paired)))
            for row, found in values.items():
                cells = [spread(found[heading]) if heading in found else "" for heading in heads]
                if reference:  # seeds share initial weights and the order of the data, so differences vary less than values
                    cells.append("" if row == reference else spread([a - b for a, b in zip(found[heads[0]], values[reference][heads[0]])], "+"))
                print(f"| {row} | " + " | ".join(cells) + " |")


def found_by(out):
    """metrics.json of a run's folder, of an adapter also its costs and its log."""
    with open(os.path.join(out, "metrics.json")) as f:
        found = json.load(f)
    if os.path.exists(os.path.join(out, "costs.json")):
        with open(os.path.join(out, "costs.json")) as f, open(os.path.join(out, "log.jsonl")) as lines:
            found |= {"costs": json.load(f), "log": [json.loads(line) for line in lines]}
    return found


def write_mixed(path, roots):
    """Photos and products as one data set of one's own: what a CLIP sees before it is carried over to products alone."""
    with open(path, "w") as f:
        for name in ("flickr8k", "products"):
            for split in ("train", "val", "test"):
                for x in data.load(name, roots.get(name), split)[0]:
                    f.write(json.dumps({"id": f"{name}-{x.id}", "images": [os.path.abspath(i) for i in x.images], "captions": x.captions, "split": split}) + "\n")


def spread(values, sign=""):
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
