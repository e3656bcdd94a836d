"""tests/study.py: its commands, its tables, and what --write does to tests/results.md."""
import json
import os
import re

import pytest

import study

WAYS = ("text_to_image", "image_to_text")
BEFORE = "# Results\n\nwords before\n\n"
AFTER = "\n- a finding\n\n<!-- study: batch -->\nanother study\n<!-- end -->\n"


def fake_metrics(script, value):
    """A metrics.json of the script in which every number is `value`."""
    measures = dict.fromkeys(["R@1", "R@5", "R@10", "MRR", "NDCG@5", "mAP"], value)
    model = {way: measures for way in WAYS} | {"rSum": value, "mAP": value}
    if script == "train_cmaclip.py":
        mean = {"accuracy": value, "macro_f1": value, "recall_at_precision": value}
        scores = {"colour": mean | {"image_weight": value}, "mean": mean}
        noise = {fraction: scores for fraction in ("0.0", "0.5", "1.0")}
        return {"test": {"model": scores, "noise": {"image": noise, "text": noise}}}
    return {split: {"model": model} for split in ("test", "unseen")}


def finish(out, script, value):
    """Make a folder look like a finished run."""
    os.makedirs(out)
    files = {"metrics.json": fake_metrics(script, value)}
    if script == "train_adapter.py":
        names = ("trained_parameters", "share", "seconds_per_step", "peak_memory_gib")
        files["costs.json"] = dict.fromkeys(names, value)
        files["log.jsonl"] = {"epoch": 4, "train": {"rSum": value}, "val": {"rSum": value}}
    for name, content in files.items():
        with open(os.path.join(out, name), "w") as f:
            f.write(json.dumps(content))
    with open(os.path.join(out, "machine.txt"), "w") as f:
        f.write("torch 1.2.3, 2 cores of a test")


@pytest.fixture
def results(tmp_path, monkeypatch):
    path = tmp_path / "results.md"
    path.write_text(f"{BEFORE}<!-- study: views -->\nold\n<!-- end -->\n{AFTER}")
    monkeypatch.setattr(study, "RESULTS", str(path))
    return path


@pytest.fixture
def finished(tmp_path):
    """finished(study) -> arguments for main, with two finished runs of each row of the study.

    Their numbers are 10 in the first row, 1 more in each further row, and 2 more with the second seed.
    """
    def make(name):
        arguments = [name, "--seeds", "2", "--out", str(tmp_path / "runs")]
        clips, _, folders = study.planned(study.settings(arguments))
        for _, out in clips:
            finish(out, "train_mxm.py", 0)
        for number, outs in enumerate(folders[name].values()):
            for seed, out in enumerate(outs):
                finish(out, study.STUDIES[name][0], 10 + number + 2 * seed)
        return arguments
    return make


def test_the_commands_are_those_the_runs_of_results_md_were_made_with(capsys):
    study.main(["--list", "--root", "flickr8k=my photos"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "python train_mxm.py --out runs/study/clip-primitives"
    sampled = "batch-size-64-views-2-captions-2-epochs-8-e-8-seed-2"
    clip = "--clip runs/study/clip-primitives/best.pt"
    for line in (
        "train_mxm.py --loss hard --batch-size 64 --views 2 --captions 2 --epochs 8 --eval-every 8 --seed 2 "
        f"--out runs/study/loss-hard-{sampled}",
        "train_mxm.py --data flickr8k --loss clip --batch-size 96 --epochs 60 --eval-every 6 --seed 0 "
        "--root 'my photos' --out runs/study/data-flickr8k-loss-clip-batch-size-96-epochs-60-e-6-seed-0",
        f"train_clip4cmr.py {clip} --task shape --epochs 30 --loss pcl --seed 1 "
        "--out runs/study/clip4cmr-clip-primitives-task-shape-epochs-30-loss-pcl-seed-1",
        "train_cmaclip.py --epochs 3 --eval-every 3 --fusion cma --robustness --seed 0 "
        "--out runs/study/cmaclip-epochs-3-e-3-fusion-cma-robustness-seed-0",
    ):
        assert f"python {line}" in lines
    of_folder = {}
    for line in lines:
        command, out = line.split(" --out ")
        assert of_folder.setdefault(out, command) == command  # two runs never share a folder
    study.main(["--list", "--root", "flickr8k=my photos"])
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("name", ["losses", "losses-photos", "cmr-wikipedia", "cma-primitives",
                                  "user-flickr8k", "adapter-shapes", "adapter-curves"])
def test_every_script_has_its_tables(name, finished, capsys):
    study.main(finished(name))
    printed = capsys.readouterr().out
    rows = list(study.STUDIES[name][1])
    tables = re.findall(rf"{name}.*\n((?:\|.*\n)+)", printed)
    assert len(tables) == (4 if name.startswith("cma-") else 1)
    for table in tables:
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        assert [line[0] for line in lines[2:]] == rows
        assert {len(line) for line in lines} == {len(lines[0])}
    first = [line for line in printed.splitlines() if line.startswith(f"| {rows[0]} |")][0]
    assert "| 11.0 ± 1.4 |" in first  # of 10 and 12: nothing was run


def test_pairs_are_compared_seed_by_seed():
    rows = {"soft": {"R@1": [1.0, 5.0]}, "hard": {"R@1": [2.0, 3.0], "R@5": [9.0, 9.0]}}
    assert study.table(rows).splitlines() == [
        "| | R@1 | R@5 | R@1 against hard, paired |",
        "| --- | --- | --- | --- |",
        "| soft | 3.0 ± 2.8 |  | +0.5 ± 2.1 |",
        "| hard | 2.5 ± 0.7 | 9.0 ± 0.0 |  |",
    ]


def test_write_replaces_what_stands_between_the_markers_and_nothing_else(results, finished):
    arguments = finished("views")
    study.main([*arguments, "--write"])
    written = results.read_text()
    assert written.startswith(f"{BEFORE}<!-- study: views -->\n`python tests/study.py views --seeds 2`")
    assert written.endswith(f"<!-- end -->\n{AFTER}")
    made = written[len(BEFORE):-len(AFTER)]
    assert "old" not in made and "2 runs in each row, seeds 0, 1:" in made
    assert "Machine: torch 1.2.3, 2 cores of a test." in made
    assert "| hybrid, 2 x 2 | 12.0 ± 1.4 | 12.0 ± 1.4 |" in made
    study.main([*arguments, "--write"])
    assert results.read_text() == written


def test_write_adds_a_section_where_there_is_none(results, finished):
    old = results.read_text()
    arguments = finished("cma-products")
    study.main([*arguments, "--write"])
    written = results.read_text()
    assert written.startswith(f"{old}\n## cma-products\n\n<!-- study: cma-products -->\n")
    assert "cma-products --seeds 2 --root products=path/to/products`" in written
    assert "\n\nAccuracy of each task:\n\n| | colour | mean |\n" in written
    study.main([*arguments, "--write"])
    assert results.read_text() == written


def test_write_says_where_a_machine_was_not_noted(results, finished, tmp_path):
    arguments = finished("views")
    os.unlink(next(tmp_path.glob("runs/*/machine.txt")))
    study.main([*arguments, "--write"])
    assert "Machine: not recorded (tables written with torch " in results.read_text()


@pytest.mark.parametrize("case", ["a run is missing", "a marker has no end", "the last marker has no end"])
def test_what_cannot_be_written_is_refused_and_nothing_changes(case, results, finished, tmp_path, capsys):
    arguments = ["views", *finished("adapter-rank")]
    if case == "a run is missing":
        expected = "6 runs are missing"  # of views; those of adapter-rank are there
    else:
        finished("views")
        after = AFTER if case == "a marker has no end" else "- a finding\n"
        results.write_text(f"{BEFORE}<!-- study: views -->\nold\n{after}")
        expected = "<!-- study: views --> has no line <!-- end -->"
    old = results.read_text()
    with pytest.raises(SystemExit) as stopped:
        study.main([*arguments, "--write"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert expected in message and results.read_text() == old


def test_results_md_has_the_rows_of_its_studies():
    """A section that --write made has the rows of its study; earlier ones, of earlier code, stay whole."""
    with open(study.RESULTS) as f:
        text = f.read()
    sections = re.findall(r"<!-- (study|earlier): (.*) -->\n", text)
    assert len(sections) == len(set(sections)) == text.count("<!-- end -->") >= 23
    for kind, name in sections:
        made = text.split(f"<!-- {kind}: {name} -->\n")[1].split("<!-- end -->\n")[0]
        tables = re.findall(r"\| ---.*\|\n((?:\|.*\n)+)", made)
        assert tables and f"python tests/study.py {name} " in made
        for table in tables:
            rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
            assert len(rows) >= 2 and (kind == "earlier" or rows == list(study.STUDIES[name][1]))
