"""The chat in the terminal, answers to files of rows, and several models side by side."""
from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import chat_rows, make_llama, write_rows
from test_evaluate import evaluate, run  # noqa: F401  (run: a fixture)

from common import converse as module
from common.chat import Chat, load_chat
from common.converse import converse
from common.evaluate import Options
from common.generate import generate
from common.model import load_model
from common.rows import RowReader


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, spm_unigram: str) -> tuple[torch.nn.Module, Chat]:
    """A random model with a context of 96 tokens, and its chat."""
    chat = load_chat(spm_unigram, "instruct")
    place = make_llama(tmp_path_factory.mktemp("spoken"), len(chat.tokenizer), context=96, seed=1)
    return load_model(place).eval(), chat


def talk(spoken: tuple, lines: list[str | BaseException], capsys: pytest.CaptureFixture, **options: object) -> str:
    """What is printed when these lines are typed; an exception is raised in place of a line."""
    typed = iter(lines)

    def ask(prompt: str) -> str:
        line = next(typed, EOFError())
        print(prompt, end="")
        if isinstance(line, BaseException):
            raise line
        return line

    capsys.readouterr()
    converse(*spoken, Options(**{"max_new_tokens": 5, **options}), ask)
    assert next(typed, None) is None or "/quit" in lines
    return capsys.readouterr().out


def expected(spoken: tuple, *contents: str) -> str:
    """The answer by generate to a conversation of user and assistant in turns."""
    model, chat = spoken
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    one = generate(model, [chat.prompt_ids(messages)], max_new_tokens=5, stop_ids=chat.stop_ids, pad_id=chat.pad_id,
                   vocab_size=len(chat.tokenizer))[0]
    return chat.decode(one.ids)


def test_a_turn_knows_the_turns_before_until_reset(spoken, capsys) -> None:
    """Guards against a chat that forgets, and against /reset that does not."""
    first = expected(spoken, "the red cat")
    second = expected(spoken, "the red cat", first, "a dog")
    alone = expected(spoken, "a dog")
    assert second != alone
    out = talk(spoken, ["the red cat", "", "a dog", "/reset", "a dog", "/quit", "never read"], capsys)
    places = [out.find(text, at) for text, at in ((first, 0), (second, out.find(first) + 1), ("(anew)", 0),
                                                  (alone, out.find("(anew)")))]
    assert places == sorted(places) and min(places) > 0 and "never read" not in out


def test_system_and_unknown_commands(spoken, capsys) -> None:
    """Guards against /system without effect, and against a mistyped command that is asked as a question."""
    out = talk(spoken, ["/system Be brief.", "/rest", "/system"], capsys)
    assert "(anew, system: Be brief.)" in out and "/rest is no command" in out and out.count("(anew)") == 1
    seen = []
    original = Chat.prompt_ids
    try:
        Chat.prompt_ids = lambda self, messages, tools=None: seen.append(messages) or original(self, messages, tools)
        talk(spoken, ["/system Be brief.", "a dog"], capsys)
    finally:
        Chat.prompt_ids = original
    assert [m["content"] for m in seen[0]] == ["Be brief.", "a dog"]


def test_a_full_context_is_said(spoken, capsys) -> None:
    """Guards against an answer that ends without a word, and against positions the model does not have."""
    out = talk(spoken, ["the red cat " * 60, "a dog"], capsys)
    assert "(the context is full: " in out and "of 96 tokens. /reset begins anew)" in out
    assert expected(spoken, "a dog") in out, "what did not fit is not part of the conversation"
    long = next(text for text in ("the red cat " * n for n in range(40, 1, -1))
                if 90 < len(spoken[1].prompt_ids([{"role": "user", "content": text.strip()}])) < 96)
    assert "(the context of 96 tokens is full: /reset begins anew)" in talk(spoken, [long], capsys, max_new_tokens=50)


def test_ctrl_c_ends_the_answer_then_the_chat(spoken, capsys, monkeypatch) -> None:
    """Guards against a traceback, and against an answer that cannot be stopped."""
    original = module.generate

    def interrupted(*args: object, heard: object, **options: object) -> list:
        def hear(i: int, token: int) -> None:
            heard(i, token)
            raise KeyboardInterrupt
        return original(*args, heard=hear, **options)

    monkeypatch.setattr(module, "generate", interrupted)
    out = talk(spoken, ["the red cat", KeyboardInterrupt()], capsys)
    assert out.count("(stopped by you)") == 1 and out.endswith("\n> \n")


def test_what_streams_is_what_is_decoded(spoken, capsys) -> None:
    """Guards against half characters on the screen, lost or doubled text: bytes come one token at a time."""
    model, chat = spoken
    text = "żółw 猫 🙂 ok"
    ids = chat.encode_texts([text])[0]
    told: list[int] = []
    original = module.generate
    try:
        def say(*args: object, heard: object, **options: object) -> list:
            for token in ids:
                heard(0, token)
                told.append(token)
            return [module.Generated(list(ids), True)]
        module.generate = say
        out = talk(spoken, ["x"], capsys)
    finally:
        module.generate = original
    assert told == ids and chat.decode(ids) in out and "\ufffd" not in out


def test_chat_on_a_pipe(run: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """Guards against a chat that needs a terminal, or ends with an error where the input ends."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the red cat\n/system Hi\na dog"))
    assert evaluate(run, "--chat", "--max_new_tokens", "4") == 0
    out = capsys.readouterr().out
    assert "stops at <|im_end|>" in out and "(anew, system: Hi)" in out and out.count("4 reached)\n> ") == 2


# ---- answers to files

def test_answers_take_the_place_of_the_old_ones(run: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards against rows that are lost (without an answer, with an empty one), out of order, or asked with their own
    answer in view, and against a file that cannot be read as rows again."""
    user = lambda text: {"role": "user", "content": text}
    rows = [{"prompt": "a dog"}, {"prompt": "a dog", "response": ""}, {"prompt": "a dog", "response": "old", "id": "7"},
            {"messages": [{"role": "system", "content": "s"}, user("x"), {"role": "assistant", "content": "y",
                                                                          "train": False}, user("a cat")]},
            {"messages": [user("a dog"), {"role": "assistant", "content": "old"}], "source": "here"},
            {"conversations": [{"from": "human", "value": "a dog"}]}, {"instruction": "a", "input": "dog"}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert evaluate(run, "--predict", str(path), "--max_new_tokens", "4", "--output_dir", str(tmp_path)) == 0
    out = tmp_path / "predictions.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [[m["content"] for m in line["messages"][:-1]] for line in lines]
    assert asked == [["a dog"]] * 3 + [["s", "x", "y", "a cat"]] + [["a dog"]] * 2 + [["a\n\ndog"]]
    said = [line["messages"][-1]["content"] for line in lines]
    assert len({said[i] for i in (0, 1, 2, 4, 5)}) == 1 and "old" not in said and "?" not in said
    assert lines[2]["id"] == "7" and lines[4]["source"] == "here" and not any(line["stopped"] for line in lines)
    assert lines[3]["messages"][2]["train"] is False
    assert len(list(RowReader(out))) == len(rows)


@pytest.mark.parametrize("row, finding", [
    ({"text": "abc"}, "plain text asks nothing"), ({"response": "x"}, '"prompt" is missing'),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "asks nothing before the answer"),
    ({"messages": [{"role": "user"}]}, '"content"'), ({"a": 1}, "no known form")])
def test_rows_that_ask_nothing_are_refused(run: Path, tmp_path: Path, capsys, row, finding) -> None:  # noqa: F811
    """Guards against answers to nothing, and against an output that was written all the same."""
    path = write_rows(tmp_path / "q.jsonl", [row])
    assert evaluate(run, "--predict", str(path), "--output_dir", str(tmp_path / "out")) == 2
    assert f"{path}:1: " in (err := capsys.readouterr().err) and finding in err and not (tmp_path / "out").exists()


def test_a_csv_of_prompts(run: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards against a table that is refused because its column of answers is missing."""
    (tmp_path / "q.csv").write_text("prompt\na dog\nthe cat\n")
    assert evaluate(run, "--predict", str(tmp_path / "q.csv"), "--max_new_tokens", "2", "--output_dir",
                    str(tmp_path)) == 0
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


# ---- several models

def test_two_runs_on_the_same_rows(run: Path, tmp_path: Path, tiny_model: str, capsys) -> None:  # noqa: F811
    """Guards against a comparison that needs the base, of other rows, or with differences of something else."""
    other = shutil.copytree(run, tmp_path / "other")
    (other / "adapter_model.safetensors").unlink()
    (other / "adapter_config.json").unlink()
    for file in (run / "base").iterdir():
        shutil.copy(file, other)
    argv = ["--max_new_tokens", "3", "--output_dir", str(tmp_path / "out")]
    rows = ["--dataset_paths", str(write_rows(tmp_path / "rows.jsonl", chat_rows(9)))]
    assert evaluate(run, "--compare", str(run), str(other), *argv, *rows) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["models"] == ["first", "other"] and "other - first" in out and "baseline" not in out
    entry = found["datasets"]["rows"]
    for name, apart in entry["differences"]["other"].items():
        numbers = [entry["numbers"][model][name] for model in ("other", "first")]
        assert apart["value"] == pytest.approx(numbers[0] - numbers[1]) and apart["low"] <= apart["high"]
        assert apart["value"] == 0, "a fresh adapter changes nothing"
    lines = [json.loads(line) for line in (tmp_path / "out" / "compare_samples.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(set(line["predictions"]) == {"first", "other"} for line in lines)
    assert evaluate(run, "--compare", str(run), str(other), *argv) == 0, "both held out the same rows"
    write_rows(other / "val.jsonl", chat_rows(3))
    assert evaluate(run, "--compare", str(run), str(other), *argv) == 2
    assert "did not all hold out the same rows" in capsys.readouterr().err
