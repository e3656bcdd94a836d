"""Kill runs of all five scripts at random moments, resume them, and compare what they end with.

    python tests/kill.py                       # 100 kills, some minutes
    python tests/kill.py --kills 25 --seed 1

The runs are those of RUNS in test_runs.py, of about a second, each in a process of its own, half of them with
a worker, half with a checkpoint after every step. A run is killed up to five times and resumed until it
reaches its end: by SIGKILL at a random moment, by SIGKILL while it writes a file, or by SIGTERM, which it
answers by saving.
After every kill last.pt and best.pt must be loadable, and what a finished run leaves must be, to the bit,
what a run without a kill leaves: weights, optimizer, log and metrics.

All moments are drawn from --seed; where in a run they fall depends on the machine.
"""
import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import clip  # noqa: E402
import eval  # noqa: E402
import runs  # noqa: E402
import test_runs  # noqa: E402

KINDS = {"SIGKILL": 0.5, "SIGKILL in a write": 0.3, "SIGTERM": 0.2}  # how often each
ENDS = {  # the exit codes that are right where a signal was sent; 0 where it came at the very end
    "SIGKILL": (0, -signal.SIGKILL),
    "SIGKILL in a write": (0, -signal.SIGKILL),
    "SIGTERM": (0, 130, -signal.SIGTERM),  # the last before the training begins
}


def start(script, argv, said):
    """Fork a process that is the command `python <script>.py <argv>`. said: the file of what it says."""
    pid = os.fork()
    if not pid:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        runs.become(script, argv, None, still=False)
    return pid


def half_written(out):
    """The files of a folder that are being written, or that were when a process was killed."""
    return {file for file in os.listdir(out) if file.startswith(".writing-")} if out.exists() else set()


def end(pid, out, kind, moment, count):
    """Wait for the end of a process -> (whether it was sent a signal, how it ended).

    kind: of KINDS, or None for no signal. The signal is sent after `moment` seconds, or while the `count`-th
    file is written.
    """
    moment += time.monotonic()
    left = half_written(out)  # by an earlier kill
    seen = set()
    while kind:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return False, os.waitstatus_to_exitcode(status)
        seen |= half_written(out) - left
        if len(seen) >= count if kind == "SIGKILL in a write" else time.monotonic() >= moment:
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            break
        time.sleep(0.0002)
    _, status = os.waitpid(pid, 0)
    return kind is not None, os.waitstatus_to_exitcode(status)


def kill_and_resume(name, folder, seconds, rng, kills, count):
    """Do a run, with `kills` kills at most; count[kind] counts them. seconds: that the run takes without.

    Returns the run's folder. Raises AssertionError where a process ends as it should not, and CheckpointError
    where what it leaves cannot be loaded.
    """
    out = folder / f"{name}-killed"
    for old in (out, folder / "cache"):
        shutil.rmtree(old, ignore_errors=True)
    argv = test_runs.words(name, folder, "--epochs", 4, "--out", out, "--workers", rng.integers(2))
    eval.SAVE_SECONDS = int(rng.choice([0, 300]))
    code = None
    while code != 0:
        before = half_written(out)
        resume = ["--resume"] if (out / "last.pt").exists() else []  # killed before there was one: again
        pid = start(test_runs.RUNS[name][0], argv + resume, folder / "said")
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values()))) if kills else None
        sent, code = end(pid, out, kind, rng.uniform(0, seconds), rng.integers(1, 12))
        runs.kill_group(pid)  # the worker that a killed process leaves
        if sent:
            kills -= 1
            count[kind] += 1
            count["left half a file"] += bool(half_written(out) - before)
        right = ENDS[kind] if sent else (0,)
        assert code in right, f"exit code {code}: {(folder / 'said').read_text()[-500:]}"
        for file in ("last.pt", "best.pt"):
            if (out / file).exists():
                clip.load_checkpoint(out / file)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=eval.positive_int, default=100)
    p.add_argument("--seed", type=eval.non_negative_int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    clip.MODELS["tiny"] = runs.SMALL
    rng = np.random.default_rng(args.seed)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill-"))
    test_runs.make_data(folder)
    seconds = {}  # that a run takes
    for name in test_runs.RUNS:
        began = time.monotonic()
        argv = test_runs.words(name, folder, "--epochs", 4, "--out", folder / name)
        _, code = end(start(test_runs.RUNS[name][0], argv, folder / "said"), folder, None, 0, 0)
        assert code == 0, (folder / "said").read_text()
        seconds[name] = time.monotonic() - began
    columns = [*KINDS, "left half a file", "finished", "failed"]
    counts = {name: dict.fromkeys(columns, 0) for name in test_runs.RUNS}
    failures = []
    while len(failures) < 10:
        kills = {name: sum(count[kind] for kind in KINDS) for name, count in counts.items()}
        left = args.kills - sum(kills.values())
        if not left:
            break
        name = min(kills, key=kills.get)
        try:
            out = kill_and_resume(name, folder, seconds[name], rng, min(left, 5), counts[name])
            runs.assert_same_run(folder / name, out)
            counts[name]["finished"] += 1
        except (AssertionError, clip.CheckpointError) as problem:
            counts[name]["failed"] += 1
            failures.append(f"{name}: {str(problem) or 'not the bits of a run that was never killed'}")
            shutil.copytree(folder / f"{name}-killed", folder / f"{name}-failed-{len(failures)}")
    counts["all"] = {column: sum(count[column] for count in counts.values()) for column in columns}
    print("".join(f"{column:>20}" for column in ("", *columns)))
    for name, count in counts.items():
        print(f"{name:>20}" + "".join(f"{count[column]:20}" for column in columns))
    if failures:
        sys.exit("\n".join([*failures, f"what they left is kept in {folder}"]))
    shutil.rmtree(folder)
    print(f"all {counts['all']['finished']} runs ended with the bits of a run that was never killed")


if __name__ == "__main__":
    main()
