"""tests/variants.py: what each variant computes, and that running one changes the script's function."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_mxm
import variants
from runs import arguments, evaluated, in_process, log, refused, squares  # noqa: F401
from test_losses import both_directions


def test_mil_nce():
    """Beside a loop over observations and their positives."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(5, 8), dim=1)
    texts = F.normalize(torch.randn(7, 8), dim=1)
    image_owner = torch.tensor([4, 9, 9, 2, 4])
    text_owner = torch.tensor([2, 4, 4, 9, 2, 4, 9])
    batch = (images, texts, 6.0, image_owner, text_owner)

    def of_any(positives, negatives):
        return [-torch.log(sum(positives) / sum(positives + negatives))]
    assert variants.mil_nce(*batch).item() == pytest.approx(both_directions(of_any, *batch).item(), abs=1e-5)


def test_foreign_noise():
    tokens = torch.tensor([[98, 5, 6, 7, 99, 0], [98, 8, 99, 0, 0, 0]]).repeat(500, 1)
    images = torch.zeros(1000, 3, 2, 2)
    torch.manual_seed(0)
    noisy, words = variants.foreign(images, tokens, (0.3, 0.0))
    share = (noisy != 0).all(3).all(2).all(1).float().mean()
    assert torch.equal(words, tokens) and abs(share - 0.3) < 0.05 and noisy.std() > 0.4
    noisy, words = variants.foreign(images, tokens, (0.0, 1.0))
    assert torch.equal(noisy, images)
    kept = (tokens == 0) | (tokens >= 98)
    assert torch.equal(words[kept], tokens[kept]) and (words[~kept] < 98).all() and (words[~kept] > 0).all()
    assert (words != tokens)[~kept].float().mean() > 0.95


def test_a_run_of_a_variant(squares, tmp_path, monkeypatch):  # noqa: F811
    """It has a folder of its own and another loss, goes on with --resume, and eval.py evaluates it."""
    monkeypatch.chdir(tmp_path)
    argv = arguments(squares, "--clip", "tiny", "--loss", "hard", "--epochs", 1)
    train_mxm.main(argv)
    variants.main(["train_mxm:mil_nce", *argv])
    plain, of_variant = Path("runs/mxm-squares"), Path("runs/mxm-mil_nce-squares")
    assert log(plain)[0]["loss"] != log(of_variant)[0]["loss"]
    assert json.loads((of_variant / "config.json").read_text())["variant"] == "train_mxm:mil_nce"
    variants.main(["train_mxm:mil_nce", *argv, "--resume"])
    evaluated(of_variant / "best.pt")
    assert train_mxm.hard_loss is not variants.mil_nce  # what was replaced is back


def test_an_unknown_variant_is_refused(capsys):
    line = refused(capsys, ["train_mxm:mil-nce"], variants.main)
    assert line.startswith("error: train_mxm:mil-nce: no variant") and "train_mxm:mil_nce" in line


def test_every_variant_replaces_a_function_of_its_script():
    for variant, (name, function) in variants.VARIANTS.items():
        with variants.replaced(variant) as script:
            assert getattr(script, name) is function
        assert callable(getattr(script, name)) and getattr(script, name) is not function
