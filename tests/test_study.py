"""tests/study.py: its commands, its choices, its tables, and what --write does to tests/results.md."""
import importlib
import json
import os
import re
import statistics

import pytest
from PIL import Image

import clip
import data
import study
import variants
from runs import make_squares, refused

BEFORE = "# Results\n\nwords before\n\n"
AFTER = "\n- a finding\n\n<!-- study: cma-foreign -->\nanother one\n<!-- end -->\n"


def finish(out, value):
    """Make a folder look like a finished run, of any script, in which every number is `value`."""
    os.makedirs(out, exist_ok=True)
    way = dict.fromkeys(["R@1", "mAP"], value)
    mean = {"accuracy": value, "recall_at_precision": value, "image_weight": value}
    model = {"rSum": value, "mAP": value, "text_to_image": way, "image_to_text": way, "mean_of_tasks": mean}
    shares = {share: {"mean_of_tasks": mean} for share in ("0.0", "0.5", "1.0")}
    noise = {"image": shares, "text": shares}
    files = {"metrics": {"test": {"model": model, "noise": noise}, "unseen": {"model": model}},
             "made": {"cpu_seconds": value}, "costs": {"share": value / 100}}
    for name, content in files.items():
        with open(os.path.join(out, f"{name}.json"), "w") as f:
            json.dump(content, f)
    clip.save_checkpoint(os.path.join(out, "best.pt"), {"state": {"best": float(value)}})


@pytest.fixture
def results(tmp_path, monkeypatch):
    path = tmp_path / "results.md"
    path.write_text(f"{BEFORE}<!-- study: adapter-share -->\nold\n<!-- end -->\n{AFTER}")
    monkeypatch.setattr(study, "RESULTS", str(path))
    return path


@pytest.fixture
def made(tmp_path):
    """made(study) -> arguments for main, with two finished runs of each row of the study. Of a row's choices
    the second is best on val. Its numbers: 10, 1 more a row, 2 more with the second seed."""
    def make(name):
        arguments = [name, "--seeds", "2", "--out", str(tmp_path / "runs")]
        args = study.settings(arguments)
        for number, row in enumerate(study.STUDIES[name].values()):
            choices = study.alternatives(row)
            best = choices[len(choices) > 1]
            for choice in choices:
                finish(study.run_folder(choice, 0, args), 10 + number if choice == best else 5)
            finish(study.run_folder(best, 1, args), 12 + number)
        return arguments
    return make


def test_the_commands(capsys):
    """Of the file, CLIPs, roots and variants; two runs never share a folder; scripts take the arguments."""
    arguments = ["--list", "--root", "wikipedia=my lists", "--root", "products=goods", "--out", "runs"]
    study.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split(" --out ")[1] for line in lines}) == len(lines)
    assert not any("|" in line or "{" in line for line in lines)
    start = study.run_folder(study.CLIPS["products"], 0, study.settings(arguments))
    assert ("python train_mxm.py --data products --clip tiny --loss hard --batch-size 128 "
            f"--vocab-size 4096 --epochs 20 --eval-every 10 --root goods --seed 0 --out {start}") in lines
    assert any(f"--clip {start}/best.pt" in line and "--root goods" in line for line in lines)
    descriptions = os.path.abspath("runs/descriptions.jsonl")
    assert any(f"--data {descriptions} --clip {start}/best.pt" in line for line in lines)
    assert any("--data wikipedia" in line and "--root 'my lists'" in line for line in lines)
    assert any(line.startswith("python tests/variants.py train_cmaclip:foreign --data") for line in lines)
    for row in study.rows_of(study.settings([])):
        for choice in study.alternatives(row):
            script, *words = choice.split()
            assert ":" not in script or script in variants.VARIANTS
            assert importlib.import_module(script.split(":")[0]).settings(words).epochs


def test_the_choice_is_the_best_on_validation_and_has_all_seeds(made):
    args = study.settings(made("adapter-known"))
    runs, folders, options = study.planned("adapter-known", args)
    assert list(options.values()) == ["--lr 1e-3", "--lr 1e-3", "--lr 3e-5"] and len(runs) == 3 * 2
    for (command, out), rate in zip(runs, ["1e-3"] * 4 + ["3e-5"] * 2):
        assert f"--lr {rate} " in command and os.path.exists(out)
    assert len(study.first_runs(args)) == 1 + 4 + 4 + 3  # a CLIP, and the rates of the three rows


@pytest.mark.parametrize("name", ["cmr-wikipedia", "cma-foreign", "adapter-known"])
def test_tables(name, made):
    args = study.settings(made(name))
    _, folders, options = study.planned(name, args)
    measured, claims = study.tables(name, folders, options).values()
    rows = list(study.STUDIES[name])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.splitlines()]
    assert [line[0].split(", `")[0] for line in lines[2:]] == rows
    assert {len(line) for line in lines} == {len(lines[0])} and lines[2][1] == "11.0 ± 1.4"  # of 10 and 12
    assert lines[0][1:4] == ["rSum", "T2I R@1", "I2T R@1"] and "unseen rSum" in lines[0]
    assert len(claims.splitlines()) == 2 + len(study.JUDGED_BY) * len(study.CLAIMS[name])
    row, other = (statistics.mean(rows.index(r) for r in study.GROUPS.get(side, (side,)))
                  for side in study.CLAIMS[name][0])
    difference = row - other
    assert f"{difference:+.1f} ({difference:+.1f} to {difference:+.1f})" in claims.splitlines()[2]


def test_differences_have_an_interval_and_a_verdict():
    cells = [list(study.compared(differences).values()) for differences in (
        [1.0, 2.0, 3.0], [2.0, 2.1, 2.2], [-2.0, -2.1, -2.2])]
    assert cells == [["+2.0 (-0.5 to +4.5)", "3 of 3", "not resolved"],
                     ["+2.1 (+1.9 to +2.3)", "3 of 3", "ahead"],
                     ["-2.1 (-2.3 to -1.9)", "0 of 3", "behind"]]
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(study.STUDENT_T, 1):
        assert abs(quantile - scipy_stats.t.ppf(0.975, degrees)) < 0.0055


def test_write_replaces_what_stands_between_the_markers_and_nothing_else(results, made):
    arguments = made("adapter-share")
    study.main([*arguments, "--write"])
    written = results.read_text()
    assert written.startswith(f"{BEFORE}<!-- study: adapter-share -->\n"
                              "`python tests/study.py adapter-share --seeds 2`, which runs")
    assert written.endswith(f"<!-- end -->\n{AFTER}") and "old" not in written
    assert "| d_s 16, `--lr 3e-2` | 12.0 ± 1.4 | 12.0 ± 1.4 |" in written


def test_what_cannot_be_written_is_refused_and_nothing_changes(results, made, capsys):
    arguments = [*made("adapter-share"), "--write"]
    old = results.read_text()
    assert "2 runs are missing" in refused(capsys, ["mxm-default", *arguments], study.main)
    assert results.read_text() == old
    results.write_text(old.replace("old\n<!-- end -->", "old"))
    assert "there are no lines <!-- study: adapter-share" in refused(capsys, arguments, study.main)
    assert results.read_text() == old.replace("old\n<!-- end -->", "old")


def test_descriptions_without_the_names_of_classes(tmp_path):
    """Every product stays in its split with its labels; its last caption loses the words of its classes."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    rows = [{"id": str(i), "images": ["a.jpg"], "captions": ["Shirt", f"Blue shirts for me, number {i}"],
             "labels": {"kind": "Shirts", "colour": "blue"}} for i in range(60)]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "made" / "some.jsonl")
    study.write_descriptions(path, {"products": str(tmp_path)})
    whole = data.load_splits(str(tmp_path / "products.jsonl"))
    for (some, classes), (part, part_classes) in zip(whole, data.load_splits(path)):
        assert [x.id for x in part] == [x.id for x in some] and part_classes == classes
        assert part[0].labels == some[0].labels and part[0].group == some[0].group
        assert part[0].captions == [f"for me, number {some[0].id}"]


def test_a_study_runs_its_scripts(tmp_path, monkeypatch, capsys):
    """Each rate is run with seed 0, the best one with every seed, and what is there is not run again."""
    squares = make_squares(tmp_path)
    monkeypatch.setattr(study, "STUDIES", {})
    base = f"train_mxm:mil_nce --data {squares} --clip tiny --batch-size 8 --image-size 16 --epochs 1"
    study.study("small", base, {"mil-nce": "--loss hard --lr 1e-3|1e-1"})
    command = ["small", "--seeds", "2", "--out", str(tmp_path / "runs")]
    study.main(command)
    printed = capsys.readouterr()
    assert "| mil-nce, `--lr 1e-" in printed.out and printed.err.count("python tests/variants.py ") == 3
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 3
    study.main(command)  # nothing is left to run
    assert capsys.readouterr().out == printed.out
    os.unlink(squares)
    command[2] = "3"
    with pytest.raises(data.DataError, match="output.txt: says why this ended: python "):
        study.main(command)


def test_results_md_has_the_rows_of_its_studies():
    with open(study.RESULTS) as f:
        text = f.read()
    names = re.findall(r"<!-- study: (.*) -->\n", text)
    assert sorted(names) == sorted(study.STUDIES) and text.count("<!-- end -->") == len(names)
    for name in names:
        section = text.split(f"<!-- study: {name} -->\n")[1].split("<!-- end -->\n")[0]
        assert f"`python tests/study.py {name} --seeds" in section and f"`{study.BASES[name]}`" in section
        first = re.findall(r"\| ---.*\|\n((?:\|.*\n)+)", section)[0]
        rows = [row.split(", `")[0] for row in re.findall(r"^\| (.*?) \|", first, re.MULTILINE)]
        assert rows == list(study.STUDIES[name])
