"""tests/study.py: its commands, its choices, its tables, and what --write does to tests/results.md."""
import json
import multiprocessing
import os
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import study

WAYS = ("text_to_image", "image_to_text")
BEFORE = "# Results\n\nwords before\n\n"
AFTER = "\n- a finding\n\n<!-- study: cma-titles -->\nanother study\n<!-- end -->\n"


def fake_metrics(script, value):
    """A metrics.json of the script in which every number is `value`."""
    measures = dict.fromkeys(["R@1", "R@5", "R@10", "MRR", "NDCG@5", "mAP"], value)
    model = {way: measures for way in WAYS} | {"rSum": value, "mAP": value}
    if script == "train_cmaclip.py":
        mean = {"accuracy": value, "macro_f1": value, "recall_at_precision": value, "image_weight": value}
        scores = {"tasks": {"colour": mean}, "mean": mean}
        noise = {fraction: scores for fraction in ("0.0", "0.5", "1.0")}
        return {"test": {"model": scores, "noise": {"image": noise, "text": noise}}}
    return {split: {"model": model} for split in ("test", "unseen")}


def finish(out, script, value):
    """Make a folder look like a finished run, whose best score on validation is its value too."""
    os.makedirs(out, exist_ok=True)
    files = {"metrics.json": fake_metrics(script, value),
             "made.json": {"machine": "torch 1.2.3, 2 cores of a test", "cpu_seconds": value}}
    if script == "train_adapter.py":
        names = ("trained_parameters", "share", "seconds_per_step", "peak_memory_gib")
        files["costs.json"] = dict.fromkeys(names, value)
    for name, content in files.items():
        with open(os.path.join(out, name), "w") as f:
            f.write(json.dumps(content))
    clip.save_checkpoint(os.path.join(out, "best.pt"), {"state": {"best": float(value)}})


@pytest.fixture
def results(tmp_path, monkeypatch):
    path = tmp_path / "results.md"
    path.write_text(f"{BEFORE}<!-- study: adapter-share -->\nold\n<!-- end -->\n{AFTER}")
    monkeypatch.setattr(study, "RESULTS", str(path))
    return path


@pytest.fixture
def made(tmp_path):
    """made(study) -> arguments for main, with two finished runs of each row of the study.

    Of the choices of a row's options the second is best on validation. The numbers of the runs with it are 10
    in the first row, 1 more in each further row, and 2 more with the second seed.
    """
    def make(name):
        arguments = [name, "--seeds", "2", "--out", str(tmp_path / "runs")]
        args = study.settings(arguments)
        script, rows = study.STUDIES[name]
        for number, row in enumerate(rows.values()):
            choices = study.alternatives(row)
            best = choices[len(choices) > 1]
            for choice in choices:
                value = 10 + number if choice == best else 5
                finish(study.run_folder(script, choice, 0, args), script, value)
            finish(study.run_folder(script, best, 1, args), script, 12 + number)
        for _, out in study.of_clips(study.needed_clips(args), args):
            finish(out, "train_mxm.py", 0)
        return arguments
    return make


def test_the_commands(capsys):
    arguments = ["--list", "--root", "flickr8k=my photos", "--root", "products=goods", "--out", "runs"]
    study.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    files = {name: os.path.abspath(f"runs/{name}.jsonl") for name in study.FILES}
    for line in (
        f"train_mxm.py --data {files['everything']} {study.PRETRAIN} --epochs 40 --eval-every 8 "
        "--out runs/clip-everything",
        "train_user.py --data products --clip runs/clip-everything/best.pt --dim 256 --epochs 5 "
        "--eval-every 5 --batch-weight 1 --momentum 0.99 --lr-drop 0.8 --clip-lr 3e-4 --lr 3e-3 --queue 0 "
        "--root goods --seed 0 --out "
        "runs/user-data-products-clip-clip-everything-dim-256-epochs-5-e-5-batch-weight-1-momentum-0.99-"
        "lr-drop-0.8-clip-lr-3e-4-lr-3e-3-queue-0-seed-0",
        "train_adapter.py --data primitives-target --clip runs/clip-source/best.pt --frames 4 --epochs 4 "
        "--batch-size 32 --lr 1e-2 --share 0 --seed 2 --out runs/adapter-data-primitives-target-clip-"
        "clip-source-frames-4-epochs-4-batch-size-32-lr-1e-2-share-0-seed-2",
    ):
        assert f"python {line}" in lines
    foreign = [line for line in lines if "--noise-data" in line]
    assert foreign and all("--root goods --noise-root 'my photos'" in line for line in foreign)
    regions = [line for line in lines if "--regions" in line]
    folder = os.path.abspath("runs/regions")
    assert regions and all(f"--root {folder} " in line and "my photos" not in line for line in regions)
    of_folder = {}
    for line in lines:
        command, out = line.split(" --out ")
        assert of_folder.setdefault(out, command) == command  # two runs never share a folder
    study.main(arguments)
    assert capsys.readouterr().out.splitlines() == lines


def test_the_choice_is_the_best_on_validation_and_has_all_seeds(made):
    args = study.settings(made("mxm-resnet"))
    runs, folders, options = study.planned("mxm-resnet", args)
    assert set(options.values()) == {"--lr 1e-3"} and len(runs) == 6
    for command, out in runs:
        assert "--lr 1e-3" in command and study.finished(out)
    assert len(study.tuning(args)) == 9  # three rates for each of three rows
    assert study.alternatives("--a 1|2 --b 3|4") == [
        "--a 1 --b 3", "--a 1 --b 4", "--a 2 --b 3", "--a 2 --b 4"]


def test_without_robustness_nothing_is_said_of_noise(made):
    _, folders, options = study.planned("cma-longer", study.settings(made("cma-longer")))
    for out in [out for of_row in folders.values() for out in of_row]:
        path = os.path.join(out, "metrics.json")
        with open(path) as f:
            metrics = json.load(f)
        del metrics["test"]["noise"]
        with open(path, "w") as f:
            json.dump(metrics, f)
    measured, *_, claims = study.tables("cma-longer", folders, options).values()
    assert measured.startswith("| | accuracy | R@P90 | macro F1 | CPU seconds |\n")
    assert [line.split("|")[1].strip() for line in claims.splitlines()[2:]] == [
        "cma against concat, accuracy", "cma against concat, R@P90"]


@pytest.mark.parametrize("name", ["mxm-shapes", "mxm-photos", "cmr-wikipedia", "cma-foreign", "user-loss",
                                  "adapter-shapes"])
def test_every_script_has_its_tables(name, made, capsys):
    study.main([*made(name), "--write", "--list"])  # the list needs no choice
    capsys.readouterr()
    args = study.settings(made(name))
    _, folders, options = study.planned(name, args)
    tables = study.tables(name, folders, options)
    *measured, claims = tables.values()
    assert len(measured) == (3 if name.startswith("cma-") else 1)
    rows = list(study.STUDIES[name][1])
    for table in measured:
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        assert [line[0].split(", `")[0] for line in lines[2:]] == rows
        assert {len(line) for line in lines} == {len(lines[0])}
    assert measured[0].splitlines()[2].split("|")[2].strip() == "11.0 ± 1.4"  # of 10 and 12: nothing was run
    per_claim = len(study.CLAIMED[study.STUDIES[name][0]])
    assert len(claims.splitlines()) == 2 + per_claim * len(study.CLAIMS[name])
    row, other = study.CLAIMS[name][0]
    place = {side: statistics.mean(rows.index(r) for r in study.GROUPS.get(side, (side,)))
             for side in (row, other)}
    difference = place[row] - place[other]
    assert f"{difference:+.1f} ({difference:+.1f} to {difference:+.1f})" in claims.splitlines()[2]


def test_claims_name_rows():
    for name, claims in study.CLAIMS.items():
        for pair in claims:
            for row in pair:
                assert set(study.GROUPS.get(row, (row,))) <= set(study.STUDIES[name][1]), name


def test_differences_have_an_interval_and_a_verdict():
    assert study.compared([1.0, 2.0, 3.0]) == ("+2.0 (-0.5 to +4.5)", "3 of 3",
                                               "not resolved; 4 seeds would be needed")
    assert study.compared([2.0, 2.1, 2.2]) == ("+2.1 (+1.9 to +2.3)", "3 of 3", "ahead")
    assert study.compared([-2.0, -2.1, -2.2])[1:] == ("0 of 3", "behind")
    assert study.compared([-1.0, 1.0])[2] == "not resolved; 1,000 or more seeds would be needed"
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(study.STUDENT_T, 1):
        assert abs(quantile - scipy_stats.t.ppf(0.975, degrees)) < 0.0055


def test_write_replaces_what_stands_between_the_markers_and_nothing_else(results, made):
    arguments = made("adapter-share")
    study.main([*arguments, "--write"])
    written = results.read_text()
    assert written.startswith(f"{BEFORE}<!-- study: adapter-share -->\n"
                              "`python tests/study.py adapter-share --seeds 2`, which runs")
    assert written.endswith(f"<!-- end -->\n{AFTER}")
    section = written[len(BEFORE):-len(AFTER)]
    assert "old" not in section and "2 runs in each row, seeds 0, 1:" in section
    assert "Machine: torch 1.2.3, 2 cores of a test." in section
    assert "| d_s 16 | 12.0 ± 1.4 | 12.0 ± 1.4 |" in section
    assert "`train_adapter.py --data primitives-target --clip {clip:source} --frames 4" in section
    study.main([*arguments, "--write"])
    assert results.read_text() == written


def test_write_adds_a_section_where_there_is_none(results, made):
    old = results.read_text()
    arguments = made("cma-descriptions")
    study.main([*arguments, "--write"])
    written = results.read_text()
    assert written.startswith(f"{old}\n## cma-descriptions\n\n<!-- study: cma-descriptions -->\n")
    assert ("cma-descriptions --seeds 2 --root flickr8k=path/to/flickr8k --root hm=path/to/hm "
            "--root products=path/to/products`") in written
    assert "\n\nAccuracy of each task:\n\n| | colour | mean |\n" in written


def test_write_says_where_a_machine_was_not_noted(results, made, tmp_path):
    arguments = made("adapter-share")
    os.unlink(next(tmp_path.glob("runs/*share-0*seed-1/made.json")))
    study.main([*arguments, "--write"])
    assert "Machine: not recorded (tables written with torch " in results.read_text()


@pytest.mark.parametrize("case", ["a run is missing", "a choice is missing", "a marker has no end"])
def test_what_cannot_be_written_is_refused_and_nothing_changes(case, results, made, tmp_path, capsys):
    arguments = made("adapter-share")
    if case == "a run is missing":
        arguments = ["adapter-pool", *arguments]  # whose first row is one of adapter-share
        expected = "4 runs are missing"
    elif case == "a choice is missing":
        arguments = ["mxm-resnet", *arguments]
        expected = "3 runs are missing"
    else:
        results.write_text(f"{BEFORE}<!-- study: adapter-share -->\nold\n{AFTER}")
        expected = "<!-- study: adapter-share --> has no line <!-- end -->"
    old = results.read_text()
    with pytest.raises(SystemExit) as stopped:
        study.main([*arguments, "--write"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert expected in message and results.read_text() == old


def test_files_of_data_sets(tmp_path, monkeypatch):
    """A part of the training split, all of the others, and captions without the words of their classes."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    rows = [{"id": str(i), "images": ["a.jpg"], "captions": ["Shirt", f"Blue shirts for me, number {i}"],
             "labels": {"kind": "Shirts", "colour": "blue"}} for i in range(60)]
    (tmp_path / "products.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    roots = {"products": str(tmp_path)}
    path = str(tmp_path / "made" / "some.jsonl")
    monkeypatch.setitem(study.FILES, "some", (("products",), 4, False))
    study.write_file("some", path, roots)
    for split in ("train", "val", "test"):
        whole, classes = data.load(str(tmp_path / "products.jsonl"), None, split)
        part, part_classes = data.load(path, None, split)
        expected = whole[::4] if split == "train" else whole
        assert [x.id for x in part] == [f"products-{x.id}" for x in expected] and part_classes == classes
        assert part[0].captions == whole[0].captions and part[0].labels == whole[0].labels
    study.write_file("descriptions", path, roots)
    part, _ = data.load(path, None, "test")
    assert re.fullmatch(r"for me, number \d+", part[0].captions[0]) and len(part[0].captions) == 1


def test_views_that_are_rendered_are_drawn(tmp_path, monkeypatch):
    load = data.load

    def two(*words):
        instances, classes = load(*words)
        return instances[:2], classes
    monkeypatch.setattr(study.data, "load", two)
    path = str(tmp_path / "shapes.jsonl")
    study.write_file("shapes-16", path, {})
    monkeypatch.undo()
    part, _ = data.load(path, None, "test")
    whole, _ = data.load("primitives-target", None, "test")
    assert len(part) == 2 and len(part[1].images) == 12 and part[1].group == whole[1].group
    for file, view in zip(part[1].images, whole[1].images):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(view(32)))


def test_regions_are_patches_of_one_clip_and_come_with_embeddings_of_another(tmp_path, monkeypatch):
    instances, _ = data.load("primitives", None, "test")
    instances = [replace(x, captions=[f"{x.captions[0]} {n}" for n in range(5)]) for x in instances[:3]]
    args = study.settings(["user-regions", "--out", str(tmp_path)])
    assert study.needed_clips(args) == ["everything", "no-photos"] and study.sources("user-regions") == [
        "flickr8k", "hm", "products"]
    tokenizer = clip.Tokenizer.train(instances[0].captions, 600)
    models = {}
    for seed, name in enumerate(("no-photos", "everything")):
        models[name] = clip.build("tiny", tokenizer, seed=seed).eval()
        os.makedirs(study.clip_folder(name, args))
        clip.save_checkpoint(study.clip_weights(name, args), {"clip": clip.describe(models[name])})
    monkeypatch.setattr(study.data, "load", lambda name, root, split: (instances, {}))
    study.write_regions("regions", args)
    pictures = torch.stack([clip.transform(32)(x.images[0](32)) for x in instances])
    with torch.no_grad():
        _, tokens = models["no-photos"].encode_image(pictures, tokens=True)
        embeddings = models["everything"].encode_image(pictures)
    monkeypatch.undo()
    read, _ = data.load_regions("flickr8k", str(tmp_path / "regions"), "val")
    assert [x.captions for x in read] == [x.captions for x in instances]
    for x, patches, embedding in zip(read, tokens[:, 1:], embeddings):
        torch.testing.assert_close(torch.from_numpy(x.images[0].features()), patches)
        torch.testing.assert_close(torch.from_numpy(x.images[0].clip_input(None)), embedding)


def test_a_frozen_clip_is_judged_as_it_is(tmp_path):
    """Texts that point the way of their images' class find all of it, and texts at random do not."""
    label = np.arange(40) % 4
    images = np.eye(8)[label]
    for part in ("train", "test"):
        np.savez(tmp_path / f"products_kind_{part}.npz", image=images, text=3 * images, label=label)
    args = study.settings(["mxm-shapes", "--root", f"clip-features={tmp_path}"])
    assert "| frozen CLIP | 100.0 | 100.0 | 100.0 |" in study.frozen_clip("clip-features", "kind", args)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "products_kind_test.npz", image=images, text=rng.normal(size=(40, 8)), label=label)
    assert "100.0" not in study.frozen_clip("clip-features", "kind", args)


def test_models_are_tested_on_another_data_set(tmp_path, monkeypatch):
    """best.pt of every seed is evaluated on the test split of the other set, and rows are compared on it."""
    instances, classes = data.load("primitives", None, "test")
    monkeypatch.setattr(study.data, "load", lambda name, root, split: (instances[:12], classes))
    tokenizer = clip.Tokenizer.train([caption for x in instances for caption in x.captions], 600)
    folders = {"one": [], "other": []}
    scores = {"one": [], "other": []}
    for seed, row in enumerate(["one", "other", "one", "other"]):
        out = tmp_path / str(seed)
        out.mkdir()
        model = clip.build("tiny", tokenizer, seed=seed).eval()
        clip.save_checkpoint(str(out / "best.pt"), {"clip": clip.describe(model)})
        folders[row].append(str(out))
        scores[row].append(study.eval.evaluate(model, instances[:12], tokenizer)["rSum"])
    monkeypatch.setitem(study.CLAIMS, "mxm-garments", [("one", "other")])
    args = study.settings(["mxm-garments"])
    models, differences = study.transferred("products", "mxm-garments", folders, args).values()
    for row in folders:
        assert f"| {study.spread(scores[row])} |" in models.split(f"| {row} ")[1].split("\n")[0]
    cells = study.compared([a - b for a, b in zip(*scores.values())])
    assert " | ".join(["| one against other, test rSum", *cells]) in differences
    monkeypatch.delattr(study.eval, "evaluate")  # what was measured is kept
    again = study.transferred("products", "mxm-garments", folders, args)
    assert list(again.values()) == [models, differences]


def test_a_study_runs_its_scripts(tmp_path, monkeypatch, capsys):
    """Each rate is run with seed 0, the best one with every seed, and what is there is not run again."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        label = np.arange(40) % 2
        features = rng.normal(size=(2, 40, 4)) + label[:, None]
        np.savez(tmp_path / f"{part}.npz", image=features[0], text=features[1], label=label)
    arguments = ("--data wikipedia --features train.npz test.npz --hidden 8 --dim 4 --epochs 2 "
                 "--lr 1e-3|1e-1 --workers 0")
    monkeypatch.setattr(study, "STUDIES", {"small": ("train_clip4cmr.py", {"pcl": arguments})})
    monkeypatch.setattr(study, "CLAIMS", {"small": []})
    monkeypatch.setattr(study, "processes", lambda: multiprocessing.get_context("fork"))  # no second import
    out = tmp_path / "runs"
    command = ["small", "--seeds", "2", "--threads", "1", "--out", str(out),
               "--root", f"wikipedia={tmp_path}"]
    study.main(command)
    printed = capsys.readouterr()
    assert "| pcl, `--lr 1e-" in printed.out and "2 of 2 runs" in printed.err
    runs = sorted(out.glob("*/metrics.json"))
    assert len(runs) == 3
    times = [run.stat().st_mtime_ns for run in runs]
    study.main(command)
    assert capsys.readouterr().out == printed.out
    assert [run.stat().st_mtime_ns for run in runs] == times
    (tmp_path / "train.npz").unlink()
    command[2] = "3"
    with pytest.raises(SystemExit) as stopped:
        study.main(command)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "output.txt" in message
    assert message.startswith("error: exit code 2, see ")
    assert "train.npz" in next(out.glob("*seed-2/output.txt")).read_text()


def test_results_md_has_the_rows_of_its_studies():
    with open(study.RESULTS) as f:
        text = f.read()
    names = re.findall(r"<!-- study: (.*) -->\n", text)
    assert len(names) == len(set(names)) == text.count("<!-- end -->") >= 15
    for name in names:
        section = text.split(f"<!-- study: {name} -->\n")[1].split("<!-- end -->\n")[0]
        assert f"python tests/study.py {name} " in section
        if name not in study.STUDIES:
            continue
        assert f"`{study.common_command(name)}`.\\\n" in section  # the rates that were tried, too
        first = re.findall(r"\| ---.*\|\n((?:\|.*\n)+)", section)[0]
        rows = [row.split(", `")[0] for row in re.findall(r"^\| (.*?) \|", first, re.MULTILINE)]
        assert rows == list(study.STUDIES[name][1])
