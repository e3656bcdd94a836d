"""Let the scripts train for a long time, and say whether their memory or their open files grow.

    python tests/soak.py --minutes 30 --data products --root path/to/fashion-full
    python tests/soak.py --minutes 5 --data flickr8k --root path/to/flickr8k --script train_mxm train_user

Each script trains a tiny CLIP with one worker, evaluates after every epoch, and is stopped by SIGTERM. Memory
(PSS: pages that several processes share count once) and open files of all its processes are sampled every few
seconds. Nothing is said of the first epoch, in which pictures are decoded and kept. The samples after it are
cut into three parts: "grew" means that the least memory in the last part is more than 2% above that in the
second, or the least number of open files by more than 2. The least, because an evaluation has a worker of its
own, and every batch that a worker is ahead holds 7 files: how many samples fall there is chance, but what
leaks is held in all of them. oneDNN, which computes on a CPU, and ideep, through which torch calls it, keep
the products of the last 1,024 shapes ready, each for itself, and packed captions have a new shape in almost
every step: that takes many epochs to fill, up to some hundred MiB, and is no leak. Here each keeps 64, unless
--onednn-cache says otherwise.
"""
import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import clip  # noqa: E402
import data  # noqa: E402
import eval  # noqa: E402

SECONDS = 2  # between samples
MORE_MEMORY = 0.02  # share of the memory
MORE_FILES = 2
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # what oneDNN and ideep ask for


def family(pid):
    """A process and all that it has started, and so on."""
    out = [pid]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as f:
            for child in f.read().split():
                out += family(int(child))
    return out


def sample(pid):
    """-> (MiB of memory, open files) of a process and of all that it has started."""
    kilobytes = files = 0
    for member in family(pid):
        with open(f"/proc/{member}/smaps_rollup") as f:
            kilobytes += next(int(line.split()[1]) for line in f if line.startswith("Pss:"))
        files += len(os.listdir(f"/proc/{member}/fd"))
    return kilobytes / 1024, files


def epochs(out):
    """How many epochs the log of a run tells of."""
    path = os.path.join(out, "log.jsonl")
    lines = eval.read_log(path) if os.path.exists(path) else []
    return lines[-1][1]["epoch"] if lines else 0


def soak(script, args, folder):
    """Train for args.minutes -> (samples after the first epoch, epochs, the last line that was said, exit
    code)."""
    out = os.path.join(folder, script)
    command = [sys.executable, f"{script}.py", "--data", args.data, "--epochs", "10000", "--eval-every", "1",
               "--workers", "1", "--out", out]
    if args.root:
        command += ["--root", args.root]
    if script == "train_adapter":
        command += ["--clip", os.path.join(folder, "clip.pt")]
    samples = []
    with open(os.path.join(folder, f"{script}.txt"), "w+") as said:
        kept = dict.fromkeys(CACHES, str(args.onednn_cache))
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | kept)
        end = time.monotonic() + 60 * args.minutes
        try:
            while process.poll() is None and time.monotonic() < end:
                if epochs(out):
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a worker just ended
                        samples.append(sample(process.pid))
                time.sleep(SECONDS)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
        said.seek(0)
        return samples, epochs(out), said.read().splitlines()[-1], code


def least(samples):
    """-> the least memory and the least number of open files."""
    memory, files = zip(*samples)
    return min(memory), min(files)


def row(script, samples, epochs, last_words, code):
    """-> (a row of the table, whether all is well)."""
    if code != 130 or len(samples) < 9:
        return f"| {script} | {epochs} | {len(samples)} | exit code {code}: {last_words[:150]} |", False
    third = len(samples) // 3
    memory_before, files_before = least(samples[third:2 * third])
    memory, files = least(samples[2 * third:])
    most, _ = max(samples)
    grew = memory > (1 + MORE_MEMORY) * memory_before or files > files_before + MORE_FILES
    return (f"| {script} | {epochs} | {len(samples)} | {memory_before:,.1f} | {memory:,.1f} | {most:,.1f} | "
            f"{files_before:g} | {files:g} | {'grew' if grew else 'no growth'} |"), not grew


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=eval.positive, default=30.0, help="for each script")
    p.add_argument("--data", default="primitives")
    p.add_argument("--root")
    p.add_argument("--onednn-cache", type=eval.positive_int, default=64,
                   help="how many shapes oneDNN and ideep keep ready")
    p.add_argument("--script", nargs="+", choices=eval.METHODS, default=eval.METHODS)
    args = p.parse_args()
    print("| script | epochs | samples | MiB at least, second third | last third | at most | "
          "files at least, second third | last third | |\n| --- " + "| ---: " * 7 + "| --- |")
    well = []
    with tempfile.TemporaryDirectory() as folder:
        instances, _ = data.load(args.data, args.root, "train")
        tokenizer = clip.Tokenizer.train([caption for x in instances for caption in x.captions], 1024)
        model = clip.build("tiny", tokenizer)
        clip.save_checkpoint(os.path.join(folder, "clip.pt"), {"clip": clip.describe(model)})  # to adapt
        del instances
        for script in args.script:
            text, good = row(script, *soak(script, args, folder))
            print(text, flush=True)
            well.append(good)
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
