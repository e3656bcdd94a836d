"""The studies behind README.md's tables: runs what is missing under runs/study, then prints mean and spread over seeds.

    python tests/study.py losses                                  # every loss on the built-in shapes, three seeds
    python tests/study.py losses-photos --root path/to/flickr8k
    python tests/study.py batch --jobs 2 --threads 1              # two runs at a time, one thread each
    python tests/study.py --list                                  # the commands, without running them

A finished run (its metrics.json exists) is not repeated; an interrupted one is resumed.
"""
import argparse
import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def samples(loss, batch, views, captions, epochs, pairs=False):
    """Arguments that show as many images and captions per step and in all: CLIP's loss takes one pair of an instance, so it
    gets as many more instances per step, and as many more epochs; or with `pairs` several pairs of the same instances."""
    if loss == "--loss clip" and not pairs:
        batch, epochs, views, captions = batch * views, epochs * views, 1, 1
    return f"{loss} --batch-size {batch} --views {views} --captions {captions} --epochs {epochs} --eval-every {epochs}"


MXM = {"clip": "--loss clip", "clip, half the samples": "--loss clip", "clip, 2 pairs of each": "--loss clip", **{loss: f"--loss {loss}" for loss in ("mil-nce", "hard-uniform", "hard", "soft", "hybrid")},
       "hybrid, sharpness 1": "--loss hybrid --soft-sharpness 1", "hybrid, known groups": "--loss hybrid --soft-relation group"}

# study -> {row: arguments of train_mxm.py}
STUDIES = {
    "losses": {row: samples(loss, 64, 2, 2, 8, "pairs" in row) for row, loss in MXM.items()} | {
        "clip, half the samples": samples("--loss clip", 64, 1, 1, 8)},  # as many steps of as many instances, one pair of each
    # photos: one image each. 64 images and 128 captions a step, or for CLIP's loss 96 pairs: as many observations
    "losses-photos": {row: "--data flickr8k " + (
        f"{loss} --batch-size 96 --epochs 60 --eval-every 6" if row == "clip" else
        f"{loss} --batch-size 64 --views 1 --captions 2 --epochs 40 --eval-every 4") for row, loss in list(MXM.items())[:8] if "," not in row},
    "batch": {f"{row}, {2 * batch} images a step": samples(MXM[row], batch, 2, 2, 8) for row in ("clip", "hybrid") for batch in (32, 64, 128)},
    "views": {"clip, 1 x 1": samples(MXM["clip"], 64, 2, 2, 8)} | {
        f"hybrid, {m} x {m}": samples(MXM["hybrid"], 128 // m, m, m, 16 // m) for m in (2, 4)},
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="*", choices=[*STUDIES, []], help=", ".join(STUDIES))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--root", help="folder of the data set, for the photos")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--threads", type=int, help="threads of each run")
    p.add_argument("--out", default=os.path.join("runs", "study"))
    p.add_argument("--list", action="store_true", help="print the commands only")
    args = p.parse_args()

    commands = {}
    for study in args.study or STUDIES:
        for row, arguments in STUDIES[study].items():
            for seed in range(args.seeds):
                command = f"train_mxm.py {arguments} --seed {seed}" + (f" --root {shlex.quote(args.root)}" if args.root and "--data" in arguments else "")
                out = os.path.join(args.out, arguments.replace("--", "").replace(" ", "-").replace("eval-every", "e") + f"-seed-{seed}")
                commands[study, row, seed] = (f"{command} --out {out}", out)
    if args.list:
        print("\n".join(f"python {command}" for command, _ in commands.values()))
        return

    def run(command, out):
        if os.path.exists(os.path.join(out, "metrics.json")):
            return
        environment = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, "output.txt"), "a") as f:
            resume = ["--resume"] if os.path.exists(os.path.join(out, "last.pt")) else []
            subprocess.run([sys.executable, *shlex.split(command), *resume], cwd=ROOT, env=environment, stdout=f, stderr=f, check=True)

    seen = dict.fromkeys(commands.values())  # studies share rows: each command once
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for done, _ in enumerate(pool.map(lambda c: run(*c), seen), 1):
            print(f"\r{done} of {len(seen)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    for study in args.study or STUDIES:
        photos = "photos" in study
        columns = [(split, d, m) for split in (("test",) if photos else ("test", "unseen")) for d in ("text_to_image", "image_to_text")
                   for m in (("R@1", "R@10", "MRR") if photos else ("R@1", "NDCG@5"))]
        heads = [f"{s} {'T2I' if d[0] == 't' else 'I2T'} {m}" for s, d, m in columns] + ["T2I R@1 against hard, paired"] * ("hard" in STUDIES[study])
        print(f"\n{study}\n| | " + " | ".join(heads) + " |\n|" + " --- |" * (1 + len(heads)))
        values = {}  # row -> column -> a number per seed
        for row in STUDIES[study]:
            runs = []
            for seed in range(args.seeds):
                with open(os.path.join(commands[study, row, seed][1], "metrics.json")) as f:
                    runs.append(json.load(f))
            values[row] = [[run[split]["model"][direction][metric] for run in runs] for split, direction, metric in columns]
        for row, found in values.items():
            cells = [spread(x) for x in found]
            if "hard" in values:  # seeds share initial weights and the order of the data, so differences vary less than values
                cells.append("" if row == "hard" else spread([a - b for a, b in zip(found[0], values["hard"][0])], "+"))
            print(f"| {row} | " + " | ".join(cells) + " |")


def spread(values, sign=""):
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
