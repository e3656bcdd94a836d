"""Kill runs of all five scripts at random moments, resume them, and compare what they end with.

    python tests/kill.py                       # 100 kills, some minutes
    python tests/kill.py --kills 25 --seed 1

The runs are those of RUNS in test_runs.py, of about a second, each in a process of its own, half of them with
a worker, half with a checkpoint after every step. A run is killed up to five times and resumed until it
reaches its end: by SIGKILL at a random moment, by SIGKILL while it writes a file, or by SIGTERM, which it
answers by saving. After every kill last.pt and best.pt must be loadable, and a finished run must leave the
bits of one that was never killed: weights, optimizer, log and metrics. All moments are drawn from --seed;
where in a run they fall depends on the machine.
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

KINDS = {  # kind: how often, and the exit codes that are right; 0 where the signal came at the very end
    "SIGKILL": (0.5, (0, -signal.SIGKILL)),
    "SIGKILL in a write": (0.3, (0, -signal.SIGKILL)),
    "SIGTERM": (0.2, (0, 130, -signal.SIGTERM)),  # the last before the training begins
}


def start(name, argv, said):
    """Fork a process that is the command of a run. said: the file of what it says."""
    pid = os.fork()
    if not pid:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        runs.become(test_runs.RUNS[name][0], argv, None, still=False)
    return pid


def half_written(out):
    """The files of a folder that are being written, or that were when a process was killed."""
    return {file for file in os.listdir(out) if file.startswith(".writing-")} if out.exists() else set()


def end(pid, out, kind, moment, count):
    """Wait for the end of a process, to which a signal of this kind (or None) is sent after `moment` seconds,
    or while it writes the `count`-th file -> (whether one was sent, the exit code)."""
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


def kill_and_resume(name, folder, seconds, rng, kills):
    """Do a run in folder/killed, with `kills` kills at most -> how many there were. seconds: that it takes
    without. Raises AssertionError or CheckpointError where something is not as it should be."""
    out = folder / "killed"
    for old in (out, folder / "cache"):
        shutil.rmtree(old, ignore_errors=True)
    argv = test_runs.words(name, folder, "--epochs", 4, "--out", out, "--workers", rng.integers(2))
    eval.SAVE_SECONDS = int(rng.choice([0, 300]))
    done = 0
    code = None
    while code != 0:
        resume = ["--resume"] if (out / "last.pt").exists() else []  # killed before there was one: again
        pid = start(name, argv + resume, folder / "said")
        kind = None
        if done < kills:
            kind = str(rng.choice(list(KINDS), p=[often for often, _ in KINDS.values()]))
        sent, code = end(pid, out, kind, rng.uniform(0, seconds), rng.integers(1, 12))
        runs.kill_group(pid)  # the worker that a killed process leaves
        done += sent
        right = KINDS[kind][1] if sent else (0,)
        assert code in right, f"exit code {code}: {(folder / 'said').read_text()[-500:]}"
        for file in ("last.pt", "best.pt"):
            if (out / file).exists():
                clip.load_checkpoint(out / file)
    runs.assert_same_run(folder / name, out)
    return done


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
        _, code = end(start(name, argv, folder / "said"), folder, None, 0, 0)
        assert code == 0, (folder / "said").read_text()
        seconds[name] = time.monotonic() - began
    kills = dict.fromkeys(test_runs.RUNS, 0)
    while left := args.kills - sum(kills.values()):
        name = min(kills, key=kills.get)
        try:
            kills[name] += kill_and_resume(name, folder, seconds[name], rng, min(left, 5))
        except (AssertionError, clip.CheckpointError) as problem:
            sys.exit(f"{name}: {problem or 'not the bits of a run never killed'}; see {folder}/killed")
    shutil.rmtree(folder)
    print(f"{kills}: all ended with the bits of runs that were never killed")


if __name__ == "__main__":
    main()
