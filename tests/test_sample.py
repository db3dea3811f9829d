"""The sample: the same bytes every time, answers that are right, held-out sets that are held out."""
from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _load_make_sample():
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "data" / "sample" / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load_make_sample()


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return make.make_sample(seed=0, stories=2_000, rows=900, heldout=120)


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_same_seed_same_bytes(sample):
    """Guards against choices that depend on hash order: figures could not be repeated."""
    assert make.make_sample(seed=0, stories=2_000, rows=900, heldout=120) == sample
    assert make.make_sample(seed=1, stories=2_000, rows=900, heldout=120) != sample


def test_golden_beginning(sample):
    """Guards against a Python version that draws other numbers."""
    assert rows_of(sample["rows.jsonl"])[:2] == [
        {"prompt": "Which comes first? fork book ball sail", "response": "fork", "source": "first", "id": "row-1"},
        {"prompt": "Which comes second? boat book pear key", "response": "book", "source": "second", "id": "row-2"}]


def test_heldout_prompts_occur_nowhere_else(sample):
    """Guards against a held-out prompt inside a longer row or sentence: exact match would measure memory."""
    for name in ("heldout.jsonl", "new_words.jsonl"):
        for row in rows_of(sample[name]):
            assert row["prompt"] not in sample["corpus.txt"]
            assert all(row["prompt"] not in other["prompt"] for other in rows_of(sample["rows.jsonl"]))
    everything = [row["prompt"] for name in sample if name.endswith("l") for row in rows_of(sample[name])]
    assert len(set(everything)) == len(everything) == 900 + 120 + 120


def test_new_words_are_in_the_corpus_and_in_no_row(sample):
    """Guards against new words that the base has never seen, or that fine-tuning has."""
    words = Counter(sample["corpus.txt"].replace(".", " ").split())
    rows = set(sample["rows.jsonl"].replace('"', " ").replace("?", " ").split())
    usual = sum(words[noun] for noun in make.NOUNS) / len(make.NOUNS)
    for noun in make.NEW_NOUNS:
        assert noun not in rows
        assert words[noun] > usual / 2
    for row in rows_of(sample["new_words.jsonl"]):
        assert not set(row["prompt"].replace("?", "").split()) & set(make.NOUNS)


def answer(prompt: str) -> str:
    """The right answer, worked out from the prompt alone."""
    question, things = (part.strip() for part in prompt.replace("?", ":").split(":"))
    listed = things.split()
    return {"Which comes first": listed[0], "Which comes third": listed[2], "Say it again": " ".join(listed),
            "How many": {3: "three", 4: "four"}[len(listed)],
            "Which comes second": listed[1]}[question]


def test_answers_are_right_and_skills_equal(sample):
    """Guards against wrong keys, which would cap exact match, and against one skill carrying the figure."""
    for name in ("rows.jsonl", "heldout.jsonl", "new_words.jsonl"):
        rows = rows_of(sample[name])
        assert [row["response"] for row in rows] == [answer(row["prompt"]) for row in rows]
        assert set(Counter(row["source"] for row in rows).values()) == {len(rows) // 5}


def test_script_writes_whole_files(tmp_path, monkeypatch, capsys):
    """Guards against a half-written sample that the quickstart would take for complete."""
    arguments = ["make_sample.py", "--output_dir", str(tmp_path / "new"), "--stories", "20", "--rows", "10",
                 "--heldout", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    make.main()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "corpus.txt", "heldout.jsonl", "new_words.jsonl", "rows.jsonl"]
    assert (tmp_path / "new" / "rows.jsonl").read_bytes().count(b"\n") == 10
