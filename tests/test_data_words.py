"""Tests of what data.py does with the words of captions: terms that they share, by a loop; words that are
changed for training, at their rates.

    python -m pytest tests/test_data_words.py
"""
import itertools
import math

import pytest
import torch

import clip
import data


def test_shared_terms_are_counted_by_a_loop():
    """In any order and choice of captions and instances."""
    of_instances = [["a", "box", "cone", "red"], ["a", "red"], ["box"], ["a", "thing"]]
    of_captions = [["a", "cone", "red"], ["box"], ["a", "red"], ["a"], ["box"], ["thing"], ["a"]]
    shared = data.SharedTerms(of_captions, of_instances, "cpu")
    captions, instances = torch.tensor([6, 0, 2, 5, 0]), torch.tensor([3, 0, 1])
    found = shared(captions, instances)
    assert found.shape == (5, 3)
    for row, c in zip(found, captions):
        idf = {w: math.log(5 / sum(w in terms for terms in of_instances)) for w in of_captions[c]}
        for score, j in zip(row, instances):
            expected = sum(idf[w] for w in idf if w in of_instances[j]) / sum(idf.values())
            assert score.item() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- changed words

BYTES = clip.Tokenizer([])  # a token for every letter


def between(row):
    """The tokens between start and end; the row is well formed."""
    end = int(row.argmax())
    assert row[0] == BYTES.start and row[end] == BYTES.end and (row[end + 1:] == 0).all()
    assert row.dtype == torch.int32
    return row[1:end].tolist()


def test_words_are_changed_at_their_rates():
    """10,000 words of two letters, each kept, masked, replaced by two other tokens or dropped; in order."""
    words = ["".join(letters) for letters in itertools.product("abcde", "vwxyz")]
    tokens = BYTES([" ".join(words)] * 400, 60)
    pairs = [tuple(BYTES.encode(word)) for word in words]
    mask = (BYTES.start, BYTES.start)
    before = tokens.clone()
    torch.manual_seed(0)
    out = data.changed_words(tokens, BYTES)
    assert torch.equal(tokens, before) and out.shape == tokens.shape
    kept = masked = 0
    new = []
    for row in out:
        ids = between(row)
        found = list(zip(ids[::2], ids[1::2]))
        places = [pairs.index(pair) for pair in found if pair in pairs]
        assert len(ids) % 2 == 0 and places == sorted(set(places))
        kept += len(places)
        masked += found.count(mask)
        new += [pair for pair in found if pair not in pairs and pair != mask]
    dropped = 10_000 - kept - masked - len(new)
    for count, rate in ((masked, 0.1), (len(new), 0.02), (dropped, 0.08)):
        assert abs(count - 10_000 * rate) < 4 * math.sqrt(10_000 * rate * (1 - rate)), (count, rate)
    ids = sum(new, ())
    assert len(set(ids)) > 0.5 * len(ids) and max(ids) < BYTES.start < BYTES.end  # of the whole vocabulary
    torch.manual_seed(0)
    assert torch.equal(data.changed_words(tokens, BYTES), out)
    assert not torch.equal(data.changed_words(tokens, BYTES), out)


def test_words_are_kept_whole(monkeypatch):
    """Without replacement, what comes out of a caption are all ways to keep, mask or drop each of its words,
    and no other; the last word was cut where the row is full. One word at least remains."""
    monkeypatch.setattr(data, "CHANGED", 0.6)
    monkeypatch.setattr(data, "REPLACED", 0.0)
    torch.manual_seed(0)
    tokens = BYTES(["a bc defg hijklmnopq"], 17, truncate=True)
    words = [BYTES.encode(word)[:8] for word in ("a", "bc", "defg", "hijklmnopq")]
    ways = set()  # no two ways are the same tokens
    for kinds in itertools.product(("keep", "mask", "drop"), repeat=4):
        ids = []
        for word, kind in zip(words, kinds):
            ids += {"keep": word, "mask": [BYTES.start] * len(word), "drop": []}[kind]
        ways.add(tuple(ids or words[0]))
    out = data.changed_words(tokens.expand(3000, -1), BYTES)
    assert len(ways) == 80 and {tuple(between(row)) for row in out} == ways
    assert between(data.changed_words(BYTES(["", "ab"], 8), BYTES)[0]) == []
    monkeypatch.setattr(data, "CHANGED", 0.0)
    assert torch.equal(data.changed_words(tokens, BYTES), tokens)
