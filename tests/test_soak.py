"""tests/soak.py: what it calls growth, and what it reads of a run."""
import os

import pytest

import soak


@pytest.mark.parametrize("memory, files, code, expected", [
    ([100.0] * 12, [20] * 12, 130, "no growth"),
    ([100.0] * 4 + [99.5, 101.0, 100.0, 100.0] + [101.0] * 4, [20] * 12, 130, "no growth"),
    ([50.0] * 4 + [100.0] * 4 + [103.0] * 4, [20] * 12, 130, "grew"),
    ([100.0] * 5 + [200.0] * 3 + [200.0] * 3 + [101.0], [20] * 12, 130, "no growth"),
    ([100.0] * 12, [20] * 8 + [23] * 4, 130, "grew"),
    ([100.0] * 12, [20] * 8 + [27, 27, 27, 20], 130, "no growth"),
    ([100.0] * 12, [20] * 12, 1, "exit code 1: the last line"),
    ([100.0] * 5, [20] * 5, 130, "exit code 130: the last line"),
])
def test_growth_from_the_second_to_the_last_third(memory, files, code, expected):
    text, well = soak.row("train_mxm", list(zip(memory, files)), 7, "the last line", code)
    assert text.endswith(f" {expected} |") and well == (expected == "no growth")


def test_what_is_read_of_a_run(tmp_path):
    assert soak.epochs(tmp_path) == 0
    (tmp_path / "log.jsonl").write_text('{"step": 3, "epoch": 1}\n{"step": 6, "epoch": 2}\n{"step": 9, "ep')
    assert soak.epochs(tmp_path) == 2
    memory, files = soak.sample(os.getpid())
    with open(tmp_path / "log.jsonl"):
        assert soak.sample(os.getpid())[1] == files + 1
    assert memory > 10
