"""Golden prompts pass and fail with the right exit status; a file that is wrong is refused line by line."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from conftest import write_rows
from test_evaluate import evaluate, run  # noqa: F401  (run: a fixture)

from common.evaluate import make_case
from common.faults import UserError
from common.generate import Generated
from common.golden import Golden, findings, read_golden
from common.rows import Row

SCRIPT = importlib.import_module("06_eval_sft")
STOPPED, ENDLESS = Generated([1, 2, 3], True), Generated([1, 2, 3, 4], False)
ASKED = make_case(Row(1, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "?"}]), "")


def golden(**checks: object) -> Golden:
    return Golden(ASKED, **{"must_contain": [], "must_not_contain": [], "regex": [], "must_stop": False,
                            "max_tokens": None, **checks})


@pytest.mark.parametrize("checks, text, answer, wrong", [
    ({"must_contain": ["red", "cat"]}, "a red cat", STOPPED, []),
    ({"must_contain": ["red", "Cat"]}, "a red cat", STOPPED, ["lacks 'Cat'"]),
    ({"must_contain": ["\u00e9"]}, "e\u0301", STOPPED, []),
    ({"must_not_contain": ["red", "dog"]}, "a red cat", STOPPED, ["contains 'red'"]),
    ({"regex": ["^a", "cat$"]}, "a red cat", STOPPED, []),
    ({"regex": ["^cat"]}, "a red cat", STOPPED, ["does not match '^cat'"]),
    ({"must_stop": True}, "a", STOPPED, []),
    ({"must_stop": True}, "a", ENDLESS, ["did not stop within 4 tokens"]),
    ({"must_stop": True}, "a", Generated([1], False, True), ["did not stop within 1 tokens, the context is full"]),
    ({"max_tokens": 3}, "a", STOPPED, []),
    ({"max_tokens": 3, "must_stop": True}, "a", ENDLESS, ["is longer than 3 tokens"])])
def test_what_is_wrong_with_an_answer(checks: dict, text: str, answer: Generated, wrong: list[str]) -> None:
    """Guards against a check that is read and not made."""
    assert findings(golden(**checks), text, answer) == wrong


def test_one_token_more_than_allowed_is_seen() -> None:
    """Guards against an answer cut off at max_tokens that looks as if it were short enough."""
    assert golden(max_tokens=3).longest(128) == 4 and golden().longest(128) == 128


BAD = [({"prompt": "a", "must_contains": "x"}, "Did you mean must_contain?"), ({"prompt": "a"}, "nothing to check"),
       ({"prompt": "a", "must_stop": False}, "nothing to check"), ({"must_stop": True}, "neither prompt nor messages"),
       ({"prompt": "a", "regex": "("}, "no regular expression"), ({"prompt": 3, "must_stop": True}, "is a number"),
       ({"prompt": "a", "max_tokens": 0}, '"max_tokens" is 0'), ({"prompt": "a", "max_tokens": True}, "max_tokens"),
       ({"prompt": "a", "must_contain": ""}, "an empty text"), ({"prompt": "a", "must_stop": 1}, "true or false"),
       ({"messages": [], "must_stop": True}, "empty list"), ({"prompt": "a", "must_contain": ["x", 3]}, "a number")]


def test_a_wrong_file_is_refused_line_by_line(tmp_path: Path) -> None:
    """Guards against a misspelt check that passes for ever, and against the first finding alone."""
    path = write_rows(tmp_path / "g.jsonl", [{"prompt": "fine", "must_stop": True}, *(row for row, _ in BAD)])
    with pytest.raises(UserError) as fault:
        read_golden(str(path), {})
    lines = str(fault.value).splitlines()
    for i, (_, finding) in enumerate(BAD):
        assert f"g.jsonl:{i + 2}: " in lines[i] and finding in lines[i], lines[i]
    assert "skip_bad_rows" not in str(fault.value)


def test_prompts_and_messages_may_meet(tmp_path: Path) -> None:
    """Guards against one form per file, and against an answer in the file that the model would see."""
    path = write_rows(tmp_path / "g.jsonl", [
        {"prompt": "a", "system": "s", "must_contain": "x"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": "q"}], "regex": ["r"]}])
    found = read_golden(str(path), {})
    assert [[m["content"] for m in g.case.context] for g in found] == [["s", "a"], ["q"], ["q"]]
    assert [(g.must_contain, g.max_tokens, g.regex) for g in found] == [
        (["x"], None, []), ([], 2, []), ([], None, ["r"])]


def test_exit_status(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """Guards against a build that stays green when an answer is wrong, and an output that does not say which."""
    asked = [{"prompt": "the red cat"}, {"prompt": "a small bird"}]
    argv = ["--model_path", str(run), "--max_new_tokens", "4"]
    assert evaluate(run, *argv, "--predict", str(write_rows(tmp_path / "q.jsonl", asked)), "--output_dir",
                    str(tmp_path)) == 0
    said = [json.loads(line)["messages"][-1]["content"] for line in (tmp_path / "predictions.jsonl").open()]
    assert all(said)
    good = write_rows(tmp_path / "good.jsonl", [{**q, "must_contain": a} for q, a in zip(asked, said)])
    bad = write_rows(tmp_path / "bad.jsonl", [{**asked[0], "must_contain": said[0]},
                                              {**asked[1], "must_not_contain": said[1]}])
    broken = write_rows(tmp_path / "broken.jsonl", [{**asked[0], "must_contian": "x"}])
    capsys.readouterr()
    assert evaluate(run, *argv, "--golden", str(good)) == 0
    assert "2 of 2 passed" in capsys.readouterr().out
    assert evaluate(run, *argv, "--golden", str(bad)) == 1
    seen = capsys.readouterr()
    assert f"FAILED {bad}:2: contains" in seen.out and f"> a small bird\n{said[1]}" in seen.out
    assert f"{bad}:1" not in seen.out and "1 of 2 golden prompts failed" in seen.err
    assert evaluate(run, *argv, "--golden", str(broken)) == 2
    assert "broken.jsonl:1: " in capsys.readouterr().err
