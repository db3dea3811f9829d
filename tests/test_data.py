"""Files to examples: a cache that is never stale, windows that train each answer once, a split that stays."""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import chat_rows, write_rows

from common import data, forked, records
from common.chat import Chat, Encoded, load_chat
from common.data import Dataset, _works_of, fit, load_dataset
from common.faults import UserError
from common.rows import Row, RowReader
from common.sides import held_out_rows, prompt_hash, split


@pytest.fixture
def chat(byte_level: str) -> Chat:
    return load_chat(byte_level, "chatml")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", chat_rows(40))


def load(path: Path, chat: Chat, **options: object) -> Dataset:
    return load_dataset(path, chat, **{"max_seq_length": 64, "cache_dir": path.parent / "cache", **options})


def caches(path: Path) -> dict[str, int]:
    """Cache directory -> when its ids were written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (path.parent / "cache").glob("*/input_ids.bin")}


def conversation(*turns: str, system: str | None = None, trained: tuple[int, ...] | None = None) -> Row:
    """user, assistant, user, ... ; trained: which assistant turns (0 is the first)."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(turns):
        messages.append({"role": "assistant", "content": text, "train": trained is None or i // 2 in trained} if i % 2
                        else {"role": "user", "content": text})
    return Row(1, messages)


def fitted(row: Row, chat: Chat, size: int, how: str = "split") -> tuple[list[Encoded], Counter]:
    counts: Counter = Counter()
    return fit(row, chat.encode_rows([row])[0], chat, size, how, counts), +counts


def texts(chat: Chat, windows: list[Encoded]) -> list[tuple[str, str]]:
    """(whole text, trained text) of each window."""
    show = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=False)
    return [(show(w.input_ids), show(w.input_ids[w.trained])) for w in windows]


# -- the cache

def test_examples_are_the_encoded_rows(rows_file: Path, chat: Chat) -> None:
    """Offsets, masks or lines shifted by one row."""
    found = load(rows_file, chat)
    encoded = chat.encode_rows(list(RowReader(rows_file)))
    assert len(found) == 40 and found.lines.tolist() == list(range(1, 41))
    for i, one in enumerate(encoded):
        example = found.example(i)
        assert example.input_ids.tolist() == one.input_ids.tolist()
        assert example.trained.tolist() == one.trained.tolist()
    assert found.lengths.tolist() == [len(e.input_ids) for e in encoded]
    assert found.trained_counts.tolist() == [int(e.trained.sum()) for e in encoded]
    assert found.groups.tolist() == [prompt_hash(r["prompt"]) for r in chat_rows(40)]
    assert found.place(4) == f"{rows_file}:5" and found.name == "rows"
    assert found.meta["tokens"] == found.offsets[-1] == len(found.input_ids) == len(found.trained)


def test_the_cache_is_used_again(rows_file: Path, chat: Chat, byte_level: str) -> None:
    """Tokenising again at every start; a key that depends on the process or on a call of the tokenizer."""
    load(rows_file, chat)
    before = caches(rows_file)
    load(rows_file, chat)
    other = load_chat(byte_level, "chatml")
    other.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=1)
    load(rows_file, other)
    assert caches(rows_file) == before and len(before) == 1


def test_the_cache_is_rebuilt_when_anything_changes(rows_file: Path, chat: Chat, byte_level: str, spm_bpe: str) -> None:
    """A stale cache trains on yesterday's data, template or tokenizer, without a word."""
    seen = set()

    def is_new(**options: object) -> bool:
        used = options.pop("chat", chat)
        key = load(rows_file, used, **options).meta["sha256"]
        new, _ = key not in seen, seen.add(key)
        return new

    assert is_new() and not is_new()
    assert is_new(max_seq_length=63) and is_new(too_long="cut") and is_new(skip_bad_rows=True)
    assert is_new(role_map={"me": "user"})
    assert is_new(chat=load_chat(byte_level, "chat")) and is_new(chat=load_chat(spm_bpe, "chatml"))
    assert is_new(chat=load_chat(byte_level, "chatml", assistant_turns="last"))
    assert is_new(chat=load_chat(byte_level, "chatml", system_prompt="x"))
    assert is_new(chat=load_chat(byte_level, "chatml", train_on_prompt=True))
    rows_file.write_text(rows_file.read_text().replace("0 ", "1 ", 1))  # one byte
    assert is_new() and not is_new()
    assert len(caches(rows_file)) == len(seen)


@pytest.mark.parametrize("damage", ["killed", "meta", "no meta", "ids", "trained", "offsets", "missing"])
def test_a_broken_cache_is_not_used(rows_file: Path, chat: Chat, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that was killed, or files emptied by a power cut, must be built again."""
    whole = load(rows_file, chat)
    expected = whole.input_ids.tobytes()
    place = next((rows_file.parent / "cache").iterdir())
    if damage == "killed":
        shutil.rmtree(place)
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                load(rows_file, chat)
        assert list((rows_file.parent / "cache").iterdir()) == []
        # what kill -9 leaves: no process has this number; of another machine nobody here knows
        # and a container that is started again gives our number to us once more
        for name in (f"{_works_of('rows')}.ab.999999999", f"{_works_of('rows')}.ab.{os.getpid()}",
                     ".rows.elsewhere.ab.999999999"):
            place.with_name(name).mkdir()
    elif damage == "missing":
        (place / "groups.npy").unlink()
    else:
        name = {"meta": "meta.json", "no meta": "meta.json", "ids": "input_ids.bin", "trained": "trained.bin",
                "offsets": "offsets.npy"}[damage]
        content = (place / name).read_bytes()
        (place / name).write_bytes(b"" if damage == "no meta" else content[:len(content) // 2])
    again = load(rows_file, chat)
    assert again.input_ids.tobytes() == expected and len(again) == 40
    others = {".rows.elsewhere.ab.999999999"} if damage == "killed" else set()
    assert {p.name for p in (rows_file.parent / "cache").iterdir()} == {place.name} | others


def test_same_bytes_under_another_kind_of_file(tmp_path: Path, chat: Chat) -> None:
    """A .csv and a .jsonl of the same bytes and stem are read by different rules."""
    load(write_rows(tmp_path / "a.jsonl", chat_rows(3)), chat)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "a.csv")
    with pytest.raises(UserError, match="a.csv:1: "):
        load(tmp_path / "a.csv", chat)


def test_bad_rows_leave_no_cache(tmp_path: Path, chat: Chat) -> None:
    """A refused file must be refused again at the next start."""
    path = write_rows(tmp_path / "rows.jsonl", [*chat_rows(3), {"prompt": 1, "response": "x"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows.jsonl:4: "):
            load(path, chat)
    assert list((tmp_path / "cache").iterdir()) == []
    assert load(path, chat, skip_bad_rows=True).meta["rows_bad"] == 1


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path: Path, spm_bpe: str) -> None:
    """An error without a place: one conversation in thousands that does not alternate, and nobody knows which."""
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must "
        "alternate') }}{% endif %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    strict = load_chat(spm_bpe, str(tmp_path / "strict.jinja"))
    rows = chat_rows(6)
    for i in (2, 4):
        rows[i]["system"] = "Be kind."
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load(path, strict)
    text = str(caught.value)
    assert "rows.jsonl:3: template" in text and "rows.jsonl:5: template" in text and "must alternate" in text
    assert "2 of 6 rows cannot be used" in text
    found = load(path, strict, skip_bad_rows=True)
    assert (found.meta["rows_bad"], found.meta["rows_kept"], list(found.lines)) == (2, 4, [1, 2, 4, 6])
    array = tmp_path / "rows.json"  # all in one line: their numbers are of rows
    array.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"rows.json: row 3: template"):
        load(array, strict)


@pytest.mark.parametrize("path, finding", [("none.jsonl", "No such file"), ("", "is a directory")])
def test_files_that_are_not_there(tmp_path: Path, chat: Chat, path: str, finding: str) -> None:
    """A traceback for a mistyped path."""
    with pytest.raises(UserError, match=finding):
        load_dataset(tmp_path / path, chat, max_seq_length=64, cache_dir=tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read(rows_file: Path, chat: Chat) -> None:
    """The cache would hold other rows than its key says."""
    def add_row(rows: object) -> object:
        with rows_file.open("a") as file:
            file.write(json.dumps({"prompt": "late", "response": "row"}) + "\n")
        return iter(rows)

    with pytest.raises(UserError, match="changed while it was read"):
        load(rows_file, chat, progress=add_row)


def test_a_faster_process_with_the_same_content(rows_file: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that tokenise the same file at the same time."""
    load(rows_file, chat)
    monkeypatch.setattr(data.shutil, "rmtree", lambda *_, **__: None)  # so the place is taken when it is to be replaced
    calls = iter([False])
    real = data._is_whole
    monkeypatch.setattr(data, "_is_whole", lambda *x: next(calls, None) is None and real(*x))
    assert len(load(rows_file, chat)) == 40


# -- large files

def many_rows(path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, count: int = 300) -> Path:
    """A file of several blocks, tokenised by so many processes; every kind of row that is counted is in it."""
    monkeypatch.setattr(records, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(forked, "cores", lambda: processes)
    rows = chat_rows(count)
    rows[100:100] = [{"prompt": "a", "response": ""}, {"prompt": "late " * 50, "response": "b"}, {"prompt": 1}, rows[7]]
    return write_rows(path, rows)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, chat: Chat,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that come back in another order, or counts of one process that get lost."""
    arrays, metas = set(), []
    for processes in (1, 2, 5):
        path = many_rows(tmp_path / "rows.jsonl", monkeypatch, processes)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        found = load(path, chat, skip_bad_rows=True)
        arrays.add(tuple(getattr(found, a).tobytes() for a in ("input_ids", "trained", *data.ARRAYS)))
        metas.append({k: v for k, v in found.meta.items() if k not in ("seconds", "rows_per_second")})
    assert len(arrays) == 1 and metas[0] == metas[1] == metas[2]
    assert metas[0]["rows_in"] == 304 and metas[0]["rows_kept"] == 301 and metas[0]["rows_distinct"] == 300
    assert metas[0]["rows_bad"] == 1 and metas[0]["dropped"] == {"empty answer": 1, "a single turn too long": 1}


def test_bad_rows_of_all_blocks_are_named_in_order(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Findings with line numbers that count from the block, or in the order of the fastest process."""
    path = many_rows(tmp_path / "rows.jsonl", monkeypatch, 3)
    rows = path.read_text().splitlines()
    for i in range(20, 300, 10):
        rows[i] = "{"
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as raised:
        load(path, chat)
    named = [line.split(":")[1] for line in str(raised.value).splitlines() if ": not JSON" in line]
    assert named == [str(i + 1) for i in range(20, 220, 10) if i != 102][:len(named)] and len(named) >= 19
    assert "29 of 304 rows cannot be used" in str(raised.value)


def test_memory_does_not_hold_the_rows(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows or parts kept in a list: tens of gigabytes would not fit."""
    path = many_rows(tmp_path / "rows.jsonl", monkeypatch, 1, 3000)
    alive = []

    def progress(parts: data.Parts) -> Iterator[data.Part]:
        for part in parts:
            alive.append(weakref.ref(part))
            yield part
            assert sum(ref() is not None for ref in alive) <= 3 and parts.position <= parts.size
        assert parts.position == parts.size == path.stat().st_size

    load(path, chat, skip_bad_rows=True, progress=progress)
    assert len(alive) > 50


def test_killed_half_way_and_started_again(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half file that is taken for a whole one, or processes that go on for ever without their parent."""
    path = many_rows(tmp_path / "rows.jsonl", monkeypatch, 3)

    def until_killed(parts: data.Parts) -> Iterator[data.Part]:
        for i, part in enumerate(parts):
            yield part
            if i == 3:
                children = [child.pid for child in multiprocessing.active_children()]
                (tmp_path / "children").write_text(" ".join(map(str, children)))
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        load(path, chat, skip_bad_rows=True, progress=until_killed)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    left = [int(child) for child in (tmp_path / "children").read_text().split()]
    assert len(left) == 3 and [p.suffix for p in (tmp_path / "cache").iterdir()] == [f".{pid}"]
    limit = time.monotonic() + 20
    while any(is_running(child) for child in left) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(is_running(child) for child in left)
    assert len(load(path, chat, skip_bad_rows=True)) == 301
    assert len(list((tmp_path / "cache").iterdir())) == 1


def is_running(pid: int) -> bool:
    """Whether it runs; a dead one may wait for a parent that never asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_is_killed_ends_the_work() -> None:
    """Waiting for ever for the answer of a process that the system killed when memory ran out."""
    with pytest.raises(ChildProcessError, match="was killed"):
        list(forked.forked_map(lambda i: os._exit(1) if i == 5 else i, range(20), processes=2))
    assert multiprocessing.active_children() == []


def test_work_in_other_processes_comes_back_in_order() -> None:
    """A fast item that overtakes; an exception out of its turn, or children left behind by one."""
    slow = lambda i: time.sleep(0.02 * (i % 3)) or (os.getpid(), i)
    found = list(forked.forked_map(slow, range(25), processes=3))
    assert [i for _, i in found] == list(range(25)) and len({pid for pid, _ in found} - {os.getpid()}) == 3
    seen = []
    with pytest.raises(UserError, match="seven"):
        for i in forked.forked_map(lambda i: fail("seven") if i == 7 else i, range(25), processes=3):
            seen.append(i)
    assert seen == list(range(7)) and multiprocessing.active_children() == []
    assert list(forked.forked_map(slow, [], processes=3)) == []
    assert list(forked.forked_map(slow, [4], processes=3)) == [(os.getpid(), 4)]


def fail(reason: str) -> None:
    raise UserError(reason)


# -- too long

def test_counts_add_up(tmp_path: Path, chat: Chat) -> None:
    """Rows that vanish: rows_in = kept + bad + dropped by reason."""
    long = " ".join(["word"] * 200)
    rows = [*chat_rows(5), {"prompt": "a", "response": ""}, {"prompt": long, "response": "b"},
            {"prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"},
                        {"role": "user", "content": long}], "response": "never fits"}, {"nothing": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for too_long in ("split", "cut", "drop"):
        meta = load(path, chat, too_long=too_long, skip_bad_rows=True).meta
        assert meta["rows_in"] == 9 == meta["rows_kept"] + meta["rows_bad"] + sum(meta["dropped"].values())
        assert meta["rows_bad"] == 1 and meta["dropped"]["empty answer"] == 1
        assert meta["examples"] == 5
    only = write_rows(tmp_path / "only.jsonl", [{"prompt": long, "response": "b"}])
    with pytest.raises(UserError, match="no row with anything to train on is left .1 a single turn too long"):
        load(only, chat)


def test_rows_without_trained_tokens_are_counted(chat: Chat) -> None:
    """An example without a target makes a loss of 0/0."""
    windows, counts = fitted(conversation("a", "b", trained=()), chat, 64)
    assert windows == [] and counts == {"dropped: no trained token": 1}
    windows, counts = fitted(conversation("a " * 90, "b"), chat, 64, "cut")
    assert windows == [] and counts == {"dropped: too long, the cut left no answer": 1}


def test_cut_leaves_no_end_token(chat: Chat) -> None:
    """A cut answer that ends in the end of turn teaches to stop in the middle of a sentence."""
    row = conversation("a", "one two three " * 20)
    (window,), counts = fitted(row, chat, 40, "cut")
    assert len(window.input_ids) == 40 and counts == {"rows cut": 1}
    assert chat.end_id not in window.input_ids[window.trained]
    assert fitted(row, chat, 40, "drop") == ([], {"dropped: too long": 1})
    whole = chat.encode_rows([row])[0]
    assert fitted(row, chat, len(whole.input_ids))[0][0].input_ids.tolist() == whole.input_ids.tolist()


@pytest.mark.parametrize("size", [8, 9, 16, 33])
@pytest.mark.parametrize("words", [1, 7, 8, 9, 15, 40])
def test_text_windows_predict_each_token_once(spm_bpe: str, size: int, words: int) -> None:
    """Lost or doubled tokens at the seams; a rest of one token that predicts nothing."""
    chat = load_chat(spm_bpe, "raw")
    row = Row(1, None, " ".join(f"the{i}" for i in range(words)))
    whole = chat.encode_rows([row])[0]
    windows, _ = fitted(row, chat, size)
    assert all(len(w.input_ids) <= size and w.trained.any() and not w.trained[0] for w in windows)
    predicted = [t for w in windows for t, learnt in zip(w.input_ids.tolist(), w.trained) if learnt]
    assert predicted == whole.input_ids[1:].tolist()
    joined = windows[0].input_ids.tolist() + [t for w in windows[1:] for t in w.input_ids[1:].tolist()]
    assert joined == whole.input_ids.tolist()


TURN = "<|im_start|>{}\n{}<|im_end|>\n"


def spelled(*turns: str, system: str | None = None) -> str:
    start = TURN.format("system", system) if system else ""
    return start + "".join(TURN.format("assistant" if i % 2 else "user", t) for i, t in enumerate(turns))


def test_conversations_are_cut_after_answers(chat: Chat) -> None:
    """Answers trained twice or never, windows without the system turn or beginning in the middle of a turn."""
    row = conversation("one", "two", "three", "four", "one", "tree", system="stone")
    size = len(chat.encode_rows([conversation("one", "two", "three", "four", system="stone")])[0].input_ids)
    windows, counts = fitted(row, chat, size)
    assert texts(chat, windows) == [
        (spelled("one", "two", "three", "four", system="stone"), "two<|im_end|>four<|im_end|>"),
        (spelled("one", "tree", system="stone"), "tree<|im_end|>")]
    assert counts == {"rows split": 1}
    assert all(len(w.input_ids) <= size for w in windows)


def test_each_answer_is_trained_once_over_all_windows(chat: Chat) -> None:
    """Random conversations and sizes: the trained text of all windows is that of the row."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        n = int(draw.integers(2, 8))
        turns = [" ".join(["word"] * int(draw.integers(1, 6))) + f" {i}" for i in range(2 * n)]
        trained = tuple(i for i in range(n) if draw.random() < 0.7)
        row = conversation(*turns, system="be good" if draw.random() < 0.5 else None, trained=trained)
        size = int(draw.integers(90, 160))
        windows, counts = fitted(row, chat, size)
        whole = chat.encode_rows([row])
        if trained and counts["answers dropped"] == 0:
            assert "".join(t for _, t in texts(chat, windows)) == texts(chat, whole)[0][1]
        for text, _ in texts(chat, windows):
            assert text.startswith(TURN.format("system", "be good") if row.messages[0]["role"] == "system" else
                                   "<|im_start|>user\n")
        assert all(len(w.input_ids) <= size and w.trained.any() for w in windows)


def test_context_alone_is_not_a_window(chat: Chat) -> None:
    """Rows of one trained reply (as OASST gives): one window with as much of the latest context as fits."""
    row = conversation("one", "two", "three", "four", "one", "tree", system="stone", trained=(2,))
    size = len(chat.encode_rows([conversation("three", "four", "one", "tree", system="stone")])[0].input_ids)
    windows, _ = fitted(row, chat, size)
    assert texts(chat, windows) == [(spelled("three", "four", "one", "tree", system="stone"), "tree<|im_end|>")]


def test_only_the_last_turn_of_a_long_conversation(byte_level: str) -> None:
    """assistant_turns last: each window must not train a last answer of its own."""
    chat = load_chat(byte_level, "chatml", assistant_turns="last")
    row = conversation("one", "two", "three", "four", "one", "tree")
    size = len(chat.encode_rows([conversation("three", "four", "one", "tree")])[0].input_ids)
    windows, _ = fitted(row, chat, size)
    assert texts(chat, windows) == [(spelled("three", "four", "one", "tree"), "tree<|im_end|>")]


def test_a_window_that_the_template_refuses(tmp_path: Path, spm_bpe: str) -> None:
    """A run that ends because a window began with tool output, which strict templates refuse: the answer is counted."""
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    strict = load_chat(spm_bpe, str(tmp_path / "strict.jinja"))
    talk = [{"role": role, "content": role + " the cat sees the dog" * 4} for role in
            ("user", "assistant", "tool", "assistant", "user", "assistant")]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk}])
    first = RowReader(write_rows(tmp_path / "first.jsonl", [{"messages": talk[:2]}]))
    size = len(strict.encode_rows(list(first))[0].input_ids) + 5
    found = load(path, strict, max_seq_length=size)
    assert (len(found), found.meta["answers_dropped"], found.meta["rows_split"]) == (2, 1, 1)


def test_an_answer_that_never_fits_is_counted(chat: Chat) -> None:
    """The rest of its conversation stays; the loss is named."""
    long = "word " * 60
    windows, counts = fitted(conversation("one", "two", "three", long, "one", "tree"), chat, 60)
    first, last = texts(chat, windows)
    assert first == (spelled("one", "two"), "two<|im_end|>") and last == (spelled("one", "tree"), "tree<|im_end|>")
    assert counts == {"rows split": 1, "answers dropped": 1}
    assert fitted(conversation("one", long), chat, 60) == ([], {"dropped: a single turn too long": 1})
    assert fitted(conversation(long, "one", long, "two"), chat, 60) == ([], {"dropped: a single turn too long": 1})
    unanswered = conversation("one", "two", long)
    assert texts(chat, fitted(unanswered, chat, 60)[0]) == [(spelled("one", "two"), "two<|im_end|>")]


# -- the split

def fake(name: str, prompts: list[str]) -> Dataset:
    n = len(prompts)
    groups = np.array([prompt_hash(p) for p in prompts], np.uint64)
    return Dataset(name, f"{name}.jsonl", np.zeros(n, np.int32), np.ones(n, bool), np.arange(n + 1),
                   np.arange(1, n + 1), groups, np.ones(n, np.int32), {})


def test_prompt_hash_is_of_the_normalised_prompt() -> None:
    """Worked out by hand; the same question in other spelling is the same question."""
    assert prompt_hash("Hi  There") == int(hashlib.sha256(b"hi there").hexdigest()[:16], 16)
    assert len({prompt_hash(p) for p in ("What is this?", " what\tIS\nthis? ", "\uff37hat is this?")}) == 1
    assert prompt_hash("a") != prompt_hash("b")


def test_split_is_a_partition() -> None:
    """Rows lost by the split, or on two sides; a prompt on another side in another data set."""
    a, b = [f"p{i % 700}" for i in range(1000)], [f"P{i}  " for i in range(500, 1500)]
    sides = split([fake("a", a), fake("b", b)], 0.1, 0.05)
    for i, d in enumerate((a, b)):
        assert sorted([*sides.train[i], *sides.val[i], *sides.test[i]]) == list(range(len(d)))
    where = {}
    for name, side in (("train", sides.train), ("val", sides.val), ("test", sides.test)):
        for d, chosen in zip((a, b), side):
            for i in chosen:
                assert where.setdefault(d[i].strip().lower(), name) == name
    shares = Counter(where.values())
    assert 0.07 < shares["val"] / len(where) < 0.13 and 0.03 < shares["test"] / len(where) < 0.07
    assert sides.notes == []


def test_split_stays_when_rows_are_added() -> None:
    """A row that moves from validation to training when the file grows spoils every later comparison."""
    prompts = [f"question {i}" for i in range(800)]
    small = split([fake("a", prompts[:400])], 0.1, 0.1)
    large = split([fake("a", list(reversed(prompts)))], 0.1, 0.1)
    for before, after in ((small.train, large.train), (small.val, large.val), (small.test, large.test)):
        assert {prompts[i] for i in before[0]} == {prompts[799 - i] for i in after[0]} & set(prompts[:400])


def test_an_empty_side_takes_the_lowest_hash() -> None:
    """A small file without validation rows: early stopping has nothing to look at."""
    prompts = [f"q{i}" for i in range(10)]
    lowest, second = sorted(prompts, key=prompt_hash)[:2]
    sides = split([fake("a", [*prompts, lowest])], 0.0001, 0.0)
    assert {prompts[i] if i < 10 else lowest for i in sides.val[0]} == {lowest} and len(sides.val[0]) == 2
    assert len(sides.notes) == 1 and "lowest hash" in sides.notes[0]
    both = split([fake("a", prompts)], 0.0001, 0.0001)
    assert [prompts[i] for i in (*both.val[0], *both.test[0])] == [lowest, second] and len(both.notes) == 2
    assert split([fake("a", prompts)], 0.0, 0.0).train[0].tolist() == list(range(10))
    with pytest.raises(UserError, match="nothing is left to train on"):
        split([fake("a", ["one", "one"])], 0.02, 0.0)


def test_validation_from_some_data_sets_only() -> None:
    """val_from that is parsed and not read; validation prompts trained through another data set."""
    prompts = [f"q{i}" for i in range(300)]
    a, b = fake("a", prompts[:200]), fake("b", prompts[100:])
    sides = split([a, b], 0.2, 0.0, val_from=["b"])
    assert len(sides.val[0]) == 0 and len(sides.val[1]) > 0
    held = {prompts[100 + i] for i in sides.val[1]}
    assert held.isdisjoint(prompts[i] for i in sides.train[0])
    assert held.isdisjoint(prompts[100 + i] for i in sides.train[1])
    left_out = 200 - len(sides.train[0])
    assert left_out == len(held & set(prompts[:200])) and f"a: {left_out:,} examples left out" in sides.notes[0]


def test_prompts_of_validation_files_are_not_trained() -> None:
    """--val_dataset_paths with prompts that occur in the training files: a leak."""
    prompts = [f"q{i}" for i in range(100)]
    own = np.array([prompt_hash(p) for p in prompts[:7]], np.uint64)
    sides = split([fake("a", prompts)], 0.0, 0.0, val_groups=own)
    assert sides.train[0].tolist() == list(range(7, 100)) and sides.val[0].size == 0
    assert "7 examples left out" in sides.notes[0]


@pytest.mark.parametrize("form", ["prompt", "messages", "text"])
def test_held_out_rows_read_back_as_they_were(tmp_path: Path, chat: Chat, form: str) -> None:
    """val.jsonl of a run must give the examples that the run was validated with."""
    rows = [*chat_rows(60)]
    if form == "messages":
        call = {"function": {"name": "f", "arguments": {"a": 1}}}
        rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": r["prompt"]},
                              {"role": "assistant", "content": "", "tool_calls": [call], "train": False},
                              {"role": "tool", "content": "t", "name": "f"},
                              {"role": "assistant", "content": r["response"]}], "tools": [{"name": "f"}], "id": str(i)}
                for i, r in enumerate(rows)]
    if form == "text":
        rows = [{"text": r["prompt"] + " " + r["response"] * 9} for r in rows]  # several windows
    found = load(write_rows(tmp_path / "rows.jsonl", rows), chat, max_seq_length=80)
    sides = split([found], 0.2, 0.0)
    kept = list(held_out_rows([found], sides.val))
    back = list(RowReader(write_rows(tmp_path / "val.jsonl", kept)))
    originals = {row.line: row for row in RowReader(tmp_path / "rows.jsonl")}
    wanted = sorted({int(found.lines[i]) for i in sides.val[0]})
    assert [row["line"] for row in kept] == wanted and 0 < len(wanted) < 60
    for row, line in zip(back, wanted):
        original = originals[line]
        assert (row.messages, row.text, row.tools, row.id) == (original.messages, original.text, original.tools,
                                                               original.id)
        assert row.source == "rows"
    again = load(tmp_path / "val.jsonl", chat, max_seq_length=80)
    assert [again.example(i).input_ids.tolist() for i in range(len(again))] == \
        [found.example(i).input_ids.tolist() for i in sides.val[0]]
