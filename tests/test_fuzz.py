"""Tests of what damaged files do: a few of the inputs of fuzz.py, and pickles that are made to take much time
or memory.

    python -m pytest tests/test_fuzz.py
"""
import os
import pickle

import numpy as np
import pytest

import clip
import data
import fuzz
from test_data import refused

KINDS = [kind for kind in fuzz.KINDS if kind != "methods"]  # which trains, and that takes seconds


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_load_or_are_refused_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and back
    monkeypatch.setattr(os, "fsync", lambda file: None)
    with fuzz.quiet():
        samples, contents = fuzz.prepare(kind, str(tmp_path / kind))
        if not samples:
            pytest.skip("needs h5py")
        outcomes = []
        for number in range(25):
            at, content = fuzz.make_input(kind, samples, contents, 7, number)
            outcome, _, _ = fuzz.attempt(samples[at], content)
            outcomes.append((number, outcome))
    assert [found for found in outcomes if found[1] not in ("loaded", "refused")] == []
    assert {outcome for _, outcome in outcomes} == {"loaded", "refused"}


def test_what_is_wrong_is_kept_and_found_again(tmp_path, monkeypatch, capsys):
    """Another exception, and an error of two lines."""
    def kind():
        fuzz.write("file.bin", bytes(range(100)))

        def read():
            with open("file.bin", "rb") as f:
                content = f.read()
            if content != bytes(range(100)):
                clip.expect(len(content) > 90, "file.bin", "too short")
                raise KeyError("oops")
        return [fuzz.Sample("file.bin", read)]
    monkeypatch.setitem(fuzz.KINDS, "odd", kind)
    monkeypatch.chdir(tmp_path)
    asked = ["--kind", "odd", "--jobs", "1"]
    assert fuzz.main([*asked, "--inputs", "40"]) == 1
    out = capsys.readouterr().out
    assert "KeyError: \"'oops'\"" in out and "fuzz-found/odd-0-0-" in out
    kept = os.listdir("fuzz-found")
    row = dict(zip(("kind", "inputs", "loaded", "refused", "wrong"), out.splitlines()[-2].split()))
    assert row["inputs"] == "40" and 0 < int(row["wrong"]) == len(kept) and int(row["refused"]) > 0
    assert fuzz.main([*asked, "--again", os.path.join("fuzz-found", kept[0])]) == 1
    error = data.DataError("two\nlines")
    assert fuzz.allowed(error) and not fuzz.allowed(KeyError("x"))
    error.args = ("two\nlines",)
    assert not fuzz.allowed(error)
    assert fuzz.judge("loaded", 2.1, 0) == "2.1 s (loaded)"
    assert fuzz.judge("refused", 0, 3 << 30) == "3.0 GiB (refused)" and fuzz.judge("refused", 1, 1) is None


# ---------------------------------------------------------------- pickles that ask for much

def nested(value, levels=60):
    for _ in range(levels):
        value = [value, value]
    return value


def objects(*values):
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array


@pytest.mark.parametrize("change, said", [
    ({"image": [[0.0] * 1000] * 100_000}, "more values than bytes"),
    ({"image": [[nested(0.0)]]}, "lists in lists of lists"),
    ({"label": [nested("a")]}, "lists in lists of lists"),
    ({"label": ["a" * 100_000] * 100_000}, "label holds a name of 100000 characters"),
    ({"label": objects(nested("a"), None)}, "label holds lists, not names"),
    ({"image": np.zeros((3, 1)), "label": np.zeros(3, "S1")}, "label is")])
def test_features_that_repeat_themselves(change, said, tmp_path):
    path = str(tmp_path / "a.pkl")
    content = pickle.dumps({"image": np.zeros((2, 1)), "text": np.zeros((2, 1)), "label": [0, 1]} | change)
    if said == "label is":  # no bytes to an item: as many as it likes
        content = content.replace(b"S1", b"S0").replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85", 1)
        said = "an array of type 'S0'"
    with open(path, "wb") as f:
        f.write(content)
    refused(f"a.pkl: .*{said}", data.read_features, path)


def test_archives_of_features_that_unpack_to_much_more(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez_compressed(path, image=np.zeros((1, 3 << 20)))
    size = os.path.getsize(path)
    assert size < 1 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "UNPACKED", 1 << 20)
        refused("a.npz: its content takes 24 MiB, over 100 times", data.read_features, path)
    refused("a.npz: no text, label in it", data.read_features, path)


def test_captions_that_repeat_themselves(tmp_path):
    """MSVD's pickle, and an XML file with texts that open and never end."""
    path = tmp_path / "raw-captions.pkl"
    for captions, said in (({"v": [["a"] * 50_000] * 50_000}, "repeats its captions"),
                           (dict.fromkeys(map(str, range(900)), ["a"] * 20_000), "repeats its captions"),
                           ({"v": [[nested("a")]]}, "no list of words")):
        path.write_bytes(pickle.dumps(captions))
        for part in ("train", "val", "test"):
            (tmp_path / f"{part}_list.txt").write_text("v\n0\n")
        refused(f"raw-captions.pkl: .*({said})", data.load, "msvd", str(tmp_path))
    assert data._without_tags("<" * 200_000 + "a> b < c") == "  b < c"
