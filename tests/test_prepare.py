"""Published files become rows that can be counted, repeated byte for byte, and trusted."""
import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
import types
from pathlib import Path

import prepare_sft_datasets as prepare
import pytest

from common import sources
from common.collect import Digests
from common.faults import UserError, run_main
from common.logs import LOG_FORMS
from common.oasst import TreeReader
from common.rows import RowReader

ROOT = Path(prepare.__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "config" / "sft_datasets").glob("*.json"))

DOLLY = [{"instruction": "Who?", "context": "Ann is here.", "response": "Ann.", "category": "closed_qa"},
         {"instruction": "Why?", "context": " ", "response": "Because.", "category": "open_qa"},
         {"instruction": "Why?", "context": "", "response": "Because.", "category": "brainstorming"},
         {"instruction": "When?", "context": "", "response": "", "category": "open_qa"}]
ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"},
          {"instruction": "Joke.", "input": "<noinput>", "output": "Ha."},
          {"instruction": "Draw.", "input": "", "output": "<nooutput> cannot"},
          {"instruction": "Sum.", "input": "", "output": ""},
          {"instruction": "Name it.", "input": "The word none.", "output": "None"}]


def message(name, parent, role, text, **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "lang": "en", "review_result": True,
            "deleted": False, "rank": None} | more


#   a Hi ── b rank 1 Hey
#        ├─ c rank 0 Hello ── d Thanks ── e Welcome
#        │                 └─ f (rejected) ── g lost
#        ├─ h rejected, i deleted, j German, k unreviewed, l empty
#        └─ m unranked ── n assistant after assistant
#   o (German) Hallo ── p English
MESSAGES = [
    message("a", None, "prompter", "Hi"),
    message("b", "a", "assistant", "Hey", rank=1), message("c", "a", "assistant", "Hello", rank=0),
    message("d", "c", "prompter", "Thanks"), message("e", "d", "assistant", "Welcome"),
    message("f", "c", "prompter", "spam", review_result=False), message("g", "f", "assistant", "lost"),
    message("h", "a", "assistant", "bad", review_result=False, rank=2),
    message("i", "a", "assistant", "gone", deleted=True), message("j", "a", "assistant", "Hallo", lang="de"),
    message("k", "a", "assistant", "new", review_result=None), message("l", "a", "assistant", " "),
    message("m", "a", "assistant", "Yo"), message("n", "m", "assistant", "again"),
    message("o", None, "prompter", "Hallo", lang="de"), message("p", "o", "assistant", "English"),
]
DROPPED = {"rejected in review": 1, "deleted": 1, "another language": 1, "not reviewed": 1, "empty answer": 1,
           "a rejected message before it": 1, "another language before it": 1, "not a reply to a prompt": 1}


def jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def trees():
    nodes = {m["message_id"]: {**m, "replies": []} for m in MESSAGES}
    for m in MESSAGES:
        if m["parent_id"]:
            nodes[m["parent_id"]]["replies"].append(nodes[m["message_id"]])
    for node in nodes.values():
        del node["parent_id"]  # exports leave it out of roots, and nesting says it anyway
    return [{"message_tree_id": n["message_id"], "tree_state": "ready_for_export", "prompt": n}
            for n in nodes.values() if n["message_id"] in ("a", "o")]


@pytest.fixture
def raw(tmp_path):
    """A directory with small files under the published names."""
    folder = tmp_path / "raw"
    folder.mkdir()
    jsonl(folder / "databricks-dolly-15k.jsonl", DOLLY)
    (folder / "alpaca_data.json").write_text(json.dumps(ALPACA, indent=1))
    jsonl(folder / "oasst1.messages.jsonl.gz", MESSAGES)
    return folder


def run(*flags):
    return run_main(prepare.main, [str(flag) for flag in flags])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_three_data_sets(raw, tmp_path, capsys):
    """Rows, joins, filters and counts by reason; rows in are rows kept and dropped."""
    out = tmp_path / "sft"
    assert run("--dataset", "all", "--raw_dir", raw, "--output_dir", out) == 0
    assert lines(out / "dolly15k.jsonl") == [
        {"prompt": "Who?\n\nAnn is here.", "response": "Ann.", "source": "dolly15k"},
        {"prompt": "Why?", "response": "Because.", "source": "dolly15k"}]
    assert lines(out / "alpaca.jsonl") == [
        {"prompt": "Add.\n\n1 2", "response": "3", "source": "alpaca"},
        {"prompt": "Joke.", "response": "Ha.", "source": "alpaca"},
        {"prompt": "Name it.\n\nThe word none.", "response": "None", "source": "alpaca"}]
    manifests = {name: json.loads((out / f"{name}.manifest.json").read_text())
                 for name in ("dolly15k", "alpaca", "oasst1_en")}
    for name, m in manifests.items():
        assert m["rows_in"] == m["rows_kept"] + sum(m["rows_dropped"].values())
        assert m["sha256_out"] == hashlib.sha256((out / f"{name}.jsonl").read_bytes()).hexdigest()
        assert m["sha256_in"] == hashlib.sha256((raw / m["files_in"][0]).read_bytes()).hexdigest()
        assert {"unit", "licence", "source", "revision", "config", "when", "command"} <= set(m)
        assert len(list(RowReader(out / f"{name}.jsonl"))) == m["rows_kept"]
    assert manifests["dolly15k"]["rows_dropped"] == {"empty answer": 1, "exact duplicate": 1}
    assert manifests["alpaca"]["rows_dropped"] == {"empty answer": 1, "placeholder instead of an answer": 1}
    assert manifests["alpaca"]["rows_changed"] == {"placeholder instead of an input": 1}
    assert manifests["oasst1_en"]["rows_dropped"] == DROPPED
    assert manifests["oasst1_en"]["unit"] == "candidate replies"
    shown = capsys.readouterr().out
    assert f"took {raw / 'alpaca_data.json'}" in shown and "non-commercial" in shown


def test_context_rows_carry_the_conversation_and_train_each_reply_once(tmp_path):
    """Guards against lost context, against a reply trained twice, and against worse siblings before better ones."""
    reader = TreeReader(jsonl(tmp_path / "x.jsonl", MESSAGES))
    rows = list(reader)
    turns = [[(m["content"], m.get("train")) for m in row.messages] for row in rows]
    assert turns == [[("Hi", None), ("Hello", True)],
                     [("Hi", None), ("Hello", False), ("Thanks", None), ("Welcome", True)],
                     [("Hi", None), ("Hey", True)], [("Hi", None), ("Yo", True)]]
    assert [row.id for row in rows] == ["c", "e", "b", "m"]
    assert reader.dropped == DROPPED and reader.rows_in == 12 == reader.rows_kept + sum(reader.dropped.values())


def test_pairs_and_top_k(tmp_path):
    """Pairs lose the context by intent; top_k counts good siblings only, so a rejected one takes no place."""
    path = jsonl(tmp_path / "x.jsonl", MESSAGES)
    pairs = [[m["content"] for m in row.messages] for row in TreeReader(path, form="pairs")]
    assert pairs == [["Hi", "Hello"], ["Thanks", "Welcome"], ["Hi", "Hey"], ["Hi", "Yo"]]
    reader = TreeReader(path, top_k=2)
    assert [row.id for row in reader] == ["c", "e", "b"]
    assert reader.dropped["not among the best 2"] == 1
    assert [row.id for row in TreeReader(path, reviewed=False, top_k=1)] == ["c", "e", "g"]
    assert [row.id for row in TreeReader(path, lang="de")] == []


def test_the_three_published_forms_give_the_same_bytes(tmp_path):
    """Messages, trees and parquet of one export; guards against an order that depends on the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outputs = set()
    for form in ("oasst1.messages.jsonl.gz", "oasst1.trees.jsonl.gz", "oasst1.parquet"):
        raw, out = tmp_path / form / "raw", tmp_path / form / "sft"
        raw.mkdir(parents=True)
        if form.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(MESSAGES), raw / form)
        else:
            jsonl(raw / form, trees() if "trees" in form else MESSAGES)
        assert run("--dataset", "oasst1", "--raw_dir", raw, "--output_dir", out) == 0
        outputs.add((out / "oasst1_en.jsonl").read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("record, finding", [
    (message("a", None, "prompter", "again"), "the message_id a is there twice. Keep one of the messages."),
    (message("z", None, "user", "x"), "unknown role 'user'. Roles of messages in trees are prompter and assistant."),
    (message("z", None, "prompter", None), '"text" is null. A message needs message_id, text, role, lang.'),
    (message("z", None, "prompter", "x", rank="0"), '"rank" is a text. It has to be a whole number or null.'),
    ({"message_tree_id": "z", "prompt": 3},
     "a message of the tree is a number instead of an object. Fetch the file again."),
])
def test_bad_messages_name_file_and_line(tmp_path, record, finding):
    """Guards against trees that silently lose a branch."""
    path = jsonl(tmp_path / "x.jsonl", [*MESSAGES, record])
    with pytest.raises(UserError) as fault:
        list(TreeReader(path))
    assert str(fault.value).splitlines()[0] == f"{path}:17: {finding}"
    assert len(list(TreeReader(path, skip_bad_rows=True))) == 4


def test_messages_without_a_root_are_counted(tmp_path):
    """Orphans and circles; guards against an endless walk and against rows that vanish."""
    rows = [*MESSAGES, message("x", "nowhere", "assistant", "orphan"), message("y", "z", "assistant", "circle"),
            message("z", "y", "prompter", "circle")]
    reader = TreeReader(jsonl(tmp_path / "x.jsonl", rows))
    assert len(list(reader)) == 4
    assert reader.dropped["the conversation before it is missing"] == 2


def test_a_second_run_gives_the_same_bytes(raw, tmp_path):
    """Also with processes side by side; only `when` and `command` of a manifest may differ."""
    first, second = tmp_path / "1", tmp_path / "2"
    assert run("--dataset", "all", "--raw_dir", raw, "--output_dir", first, "--csv") == 0
    assert run("--dataset", "all", "--raw_dir", raw, "--output_dir", second, "--csv", "--num_proc", 2) == 0
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir()) and len(names) == 9
    for name in names:
        if name.endswith(".manifest.json"):
            a, b = (json.loads((folder / name).read_text()) for folder in (first, second))
            assert {**a, "when": 0, "command": 0} == {**b, "when": 0, "command": 0}
        else:
            assert (first / name).read_bytes() == (second / name).read_bytes()


def test_csv_holds_the_same_rows(raw, tmp_path):
    """Guards against quoting that changes a text."""
    jsonl(raw / "databricks-dolly-15k.jsonl", [{"instruction": 'a,"b"\r\nc', "context": "\u2028d", "response": "e\n"}])
    assert run("--dataset", "all", "--raw_dir", raw, "--output_dir", tmp_path, "--csv") == 0
    for stem in ("dolly15k", "alpaca", "oasst1_en"):
        as_csv, as_jsonl = (list(RowReader(tmp_path / f"{stem}.{kind}")) for kind in ("csv", "jsonl"))
        assert [(r.messages, r.source, r.id) for r in as_csv] == [(r.messages, r.source, r.id) for r in as_jsonl]


def test_max_samples_is_a_seeded_subset_in_order(raw, tmp_path):
    """Guards against taking the head, and against a choice that changes between runs."""
    jsonl(raw / "databricks-dolly-15k.jsonl", [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(200)])

    def chosen(seed, n=40):
        assert run("--dataset", "dolly15k", "--raw_dir", raw, "--output_dir", tmp_path, "--max_samples", n,
                   "--seed", seed) == 0
        return [int(row["prompt"][1:]) for row in lines(tmp_path / "dolly15k.jsonl")]

    one = chosen(1)
    assert len(one) == 40 and one == sorted(one) and one == chosen(1) and one != chosen(2) and max(one) > 150
    assert set(chosen(1, 20)) < set(one)
    manifest = json.loads((tmp_path / "dolly15k.manifest.json").read_text())
    assert manifest["rows_dropped"] == {"not chosen by --max_samples": 180}


def test_memory_does_not_grow_with_the_texts(raw, tmp_path):
    """Guards against rows kept in memory: those of a file of 5 GB would take more than 10 GB."""
    def peak(length):
        text = "x" * length
        rows = [{"instruction": f"q{i} {text}", "response": "a"} for i in range(500)]
        jsonl(raw / "databricks-dolly-15k.jsonl", rows)
        tracemalloc.start()
        assert run("--dataset", "dolly15k", "--raw_dir", raw, "--output_dir", tmp_path, "--csv", "--max_samples", 400
                   ) == 0
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # imports
    assert peak(20_000) - peak(10) < 2 << 20  # the texts: 10 MB; a block that is read: 1 MB


def test_digests_are_a_set():
    """Guards against a hash taken for another: all of 100,000 are new once, and none a second time."""
    seen = Digests()
    assert all(seen.add(b"%d" % i) for i in range(100_000))
    assert not any(seen.add(b"%d" % i) for i in range(100_000))


def test_a_failed_data_set_leaves_nothing_and_the_good_ones_stay(raw, tmp_path, capsys):
    """Guards against half a file, and against one bad file costing the others."""
    out = tmp_path / "sft"
    with (raw / "databricks-dolly-15k.jsonl").open("a") as file:
        file.write('{"instruction": "x"}\n')
    (raw / "oasst1.messages.jsonl.gz").unlink()
    assert run("--dataset", "all", "--raw_dir", raw, "--output_dir", out) == 2
    assert sorted(path.name for path in out.iterdir()) == ["alpaca.jsonl", "alpaca.manifest.json"]
    errors = capsys.readouterr().err
    assert f'{raw}/databricks-dolly-15k.jsonl:5: "response" is missing (keys: instruction)' in errors
    assert "oasst1: no file like *oasst*.messages.jsonl" in errors and "Download https://huggingface.co/" in errors
    assert run("--dataset", "dolly15k", "--raw_dir", raw, "--output_dir", out, "--skip_bad_rows") == 0
    manifest = json.loads((out / "dolly15k.manifest.json").read_text())
    assert manifest["rows_dropped"]["bad row"] == 1 == manifest["rows_bad"]


@pytest.mark.parametrize("flags, sentence", [
    (["--dataset", "doly15k"], "the nearest is dolly15k"),
    (["--dataset", "../../etc/passwd"], "is not known"),
    ([], "--dataset: it is missing"),
    (["--dataset", "dolly15k", "--lang", "../x"], "is no language code"),
    (["--dataset", "dolly15k", "--lang", "de", "--raw_dir", "."], "its rows are in en, --lang asks for de"),
    (["--dataset", "dolly15k", "--raw_dir", "/nowhere"], "/nowhere is no directory"),
    (["--dataset", "oasst1", "--lang", "fr"], "no row is left of 12"),
])
def test_mistakes_are_one_sentence(raw, tmp_path, capsys, flags, sentence):
    """Guards against tracebacks, and against data set names that reach the file system."""
    given = [] if "--raw_dir" in flags else ["--raw_dir", raw]
    assert run(*flags, *given, "--output_dir", tmp_path / "sft") == 2
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors
    assert not (tmp_path / "sft").exists()


def test_killed_while_writing_leaves_no_output(raw, tmp_path):
    """Killed after the first fsync; the next run clears what was left aside."""
    out = tmp_path / "sft"
    child = os.fork()
    if child == 0:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        os._exit(run("--dataset", "dolly15k", "--raw_dir", raw, "--output_dir", out) + 100)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path.name[0] for path in out.iterdir()} == {"."}
    assert run("--dataset", "dolly15k", "--raw_dir", raw, "--output_dir", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["dolly15k.jsonl", "dolly15k.manifest.json"]


def test_raw_files_are_taken_in_the_order_of_the_patterns(raw, tmp_path):
    """Messages before trees before parquet; all parts of a data set in parts, and none if one is missing."""
    spec = sources.read_spec(ROOT / "config" / "sft_datasets" / "oasst1.json")
    for name in ("oasst1.trees.jsonl", "oasst1.parquet", "zz_oasst.messages.jsonl.gz"):
        (raw / name).touch()
    files, line = sources.local_files(spec, raw)
    assert [path.name for path in files] == ["oasst1.messages.jsonl.gz"] and "1 more fit" in line
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in (0, 1):
        (parts / f"oasst-0000{i}-of-00003.parquet").touch()
    with pytest.raises(UserError, match="has 2 of the 3 parts"):
        sources.local_files(spec, parts)
    (parts / "oasst-00002-of-00003.parquet").touch()
    assert len(sources.local_files(spec, parts)[0]) == 3


def test_a_new_data_set_is_a_new_json_file(raw, tmp_path, monkeypatch):
    """No code: columns, roles, filters, parts and names come from the description."""
    monkeypatch.setattr(prepare, "SPEC_DIR", tmp_path)
    monkeypatch.setattr(prepare, "spec_names", lambda: ["mine"])
    (tmp_path / "mine.json").write_text(json.dumps({
        "raw_dir": str(raw), "raw_patterns": ["mine-*.jsonl"], "form": "conversations", "output": "own.jsonl",
        "licence": "own", "columns": {"conversations": "talk"}, "role_map": {"A": "user", "B": "assistant"},
        "filters": [{"column": "kind", "matches": "bad", "action": "drop", "reason": "bad kind"}]}))
    talk = [{"from": "A", "value": "Hi"}, {"from": "B", "value": "Hello"}]
    jsonl(raw / "mine-00000-of-00002.jsonl", [{"talk": talk, "kind": "good"}, {"talk": talk, "kind": "bad"}])
    jsonl(raw / "mine-00001-of-00002.jsonl", [{"talk": talk, "kind": "good"}, {"talk": [*talk, *talk], "kind": "good"}])
    assert run("--dataset", "mine", "--output_dir", tmp_path / "sft") == 0
    assert [len(row["messages"]) for row in lines(tmp_path / "sft" / "own.jsonl")] == [2, 4]
    manifest = json.loads((tmp_path / "sft" / "own.manifest.json").read_text())
    assert manifest["rows_dropped"] == {"bad kind": 1, "exact duplicate": 1} and len(manifest["sha256_in"]) == 2


def test_two_descriptions_of_one_file_are_refused(raw, tmp_path, monkeypatch, capsys):
    """Guards against a copied description whose output was forgotten: the second overwrites the first, both are
    reported as kept."""
    monkeypatch.setattr(prepare, "SPEC_DIR", tmp_path)
    monkeypatch.setattr(prepare, "spec_names", lambda: ["mine", "yours"])
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "raw_dir": str(raw), "raw_patterns": ["x.jsonl"], "form": "prompt", "output": "own.jsonl",
            "licence": "own"}))
    jsonl(raw / "x.jsonl", [{"prompt": "Hi", "response": "Hello"}])
    assert run("--dataset", "mine", "yours", "--output_dir", tmp_path / "sft") == 2
    assert "--dataset yours mine: both write own.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "sft").exists()
    (tmp_path / "yours.json").write_text('{"outptu": "own.jsonl"}')  # ends its own data set alone
    assert run("--dataset", "mine", "yours", "--output_dir", tmp_path / "sft") == 2
    assert "outptu" in capsys.readouterr().err and (tmp_path / "sft" / "own.jsonl").exists()


def test_a_row_of_more_than_two_texts_keeps_all_of_it(raw, tmp_path, monkeypatch):
    """Guards against calls and tools that are lost on the way to prompt and response, and a filter that finds nothing
    because its column is not read from parquet, or is named as in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(prepare, "SPEC_DIR", tmp_path)
    monkeypatch.setattr(prepare, "spec_names", lambda: ["mine"])
    (tmp_path / "mine.json").write_text(json.dumps({
        "raw_dir": str(raw), "raw_patterns": ["mine.parquet"], "form": "prompt", "output": "own.jsonl",
        "licence": "own", "columns": {"response": "answer"}, "filters": [
            {"column": "kind", "matches": "bad", "action": "drop", "reason": "bad kind"},
            {"column": "answer", "matches": "spam", "action": "drop", "reason": "spam"}]}))
    asked = [{"role": "user", "content": "Hi"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    answers = [[{"role": "assistant", "content": "Hello"}],
               [{"role": "assistant", "content": "Wait", "tool_calls": [call]}, {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "One"}]]
    pq.write_table(pa.Table.from_pylist([{"prompt": asked, "answer": answer, "kind": kind, "tools": told}
                                         for answer, kind, told in ((answers[0], "good", None),
                                                                    (answers[1], "good", tools),
                                                                    (answers[0], "bad", None))]), raw / "mine.parquet")
    assert run("--dataset", "mine", "--output_dir", tmp_path / "sft") == 0
    plain, called = lines(tmp_path / "sft" / "own.jsonl")
    assert plain == {"prompt": "Hi", "response": "Hello", "source": "mine"}
    rows = list(RowReader(tmp_path / "sft" / "own.jsonl"))
    assert rows[1].messages == [*asked, {**answers[1][0], "train": True}, answers[1][1],
                                {**answers[1][2], "train": True}] and rows[1].tools == tools
    (raw / "mine.parquet").unlink()
    jsonl(raw / "mine.parquet.jsonl", [{"prompt": "Hi", "answer": "spam"}, {"prompt": "Hi", "answer": "Hello"}])
    spec = json.loads((tmp_path / "mine.json").read_text()) | {"raw_patterns": ["mine.parquet.jsonl"]}
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    assert run("--dataset", "mine", "--output_dir", tmp_path / "sft") == 0
    assert lines(tmp_path / "sft" / "own.jsonl") == [{"prompt": "Hi", "response": "Hello", "source": "mine"}]


@pytest.mark.parametrize("change, finding", [
    ({"colums": {}}, 'unknown key "colums" (nearest: "columns")'),
    ({"form": "dialog"}, '"form" is "dialog", it has to be one of messages,'),
    ({"output": "../x.jsonl"}, '"output" has to be a plain file name'),
    ({"top_k": "2"}, '"top_k" is a text, it has to be a whole number'),
    ({"source": ""}, '"source" (a Hub id) or "raw_dir" is missing'),
    ({"form": "context", "columns": {"prompt": "x"}}, '"columns" has no effect on the form context'),
    ({"reviewed": False}, '"reviewed" has no effect on the form prompt'),
    ({"filters": [{"column": "x"}]}, "a filter is"),
    ({"filters": [{"column": "x", "matches": "(", "action": "drop", "reason": "r"}]}, "no regular expression"),
])
def test_a_wrong_description_is_named(tmp_path, change, finding):
    """Guards against a misspelt key that is ignored."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"source": "a/b", "form": "prompt", "output": "x.jsonl", "licence": "MIT"} | change))
    with pytest.raises(UserError, match=re.escape(finding)):
        sources.read_spec(path)


def test_shipped_descriptions(capsys):
    """Every shipped file is valid, pinned and listed; weights are those of the published table."""
    assert {"dolly15k", "oasst1", "alpaca"} <= {path.stem for path in SHIPPED}
    assert run("--list") == 0
    shown = capsys.readouterr().out
    for path in SHIPPED:
        spec = sources.read_spec(path)
        own = spec.raw_dir or spec.form in LOG_FORMS
        assert spec.name in shown and (own or re.fullmatch("[0-9a-f]{40}", spec.revision))
    for size, weights in {"tiny": (0.5, 0.3, 0.2), "small": (0.4, 0.4, 0.2), "base": (0.3, 0.4, 0.3)}.items():
        assert tuple(sources.recommended_weight(s, size) for s in ("dolly15k", "oasst1_en", "alpaca")) == weights
    assert sources.recommended_weight("other", "tiny") is None


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_HEAD(self, body=False):
        data = self.files.get(self.path, b"" if self.path == "/" else None)
        Hub.asked.append(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", self.path.split("/")[5] if self.path.count("/") > 4 else "0")
        self.end_headers()
        if body:
            self.wfile.write(data or b"")

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


def script(tmp_path, *flags, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_sft_datasets.py", "--output_dir", tmp_path / "sft", *flags],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1",
             "HF_HUB_DISABLE_XET": "1", **environment}, capture_output=True, text=True, timeout=60)


def test_download_of_the_pinned_file_and_again_from_the_cache(tmp_path):
    """Against a stand-in on loopback; guards against an unpinned revision and against a download each time."""
    spec = sources.read_spec(ROOT / "config" / "sft_datasets" / "dolly15k.json")
    place = f"/datasets/{spec.source}/resolve/{spec.revision}/{spec.files['train'][0]}"
    Hub.files, Hub.asked = {place: "".join(json.dumps(r) + "\n" for r in DOLLY).encode()}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        done = script(tmp_path, "--dataset", "dolly15k", "alpaca", HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2, done.stderr
    assert "dolly15k: fetched databricks/databricks-dolly-15k@bdd27f4" in done.stdout
    assert "alpaca: tatsu-lab/alpaca: the Hub refuses" in done.stderr and "Traceback" not in done.stderr
    assert place in Hub.asked
    first = (tmp_path / "sft" / "dolly15k.jsonl").read_bytes()
    assert len(first.splitlines()) == 2
    again = script(tmp_path, "--dataset", "dolly15k", HF_ENDPOINT=endpoint)  # the server is gone
    assert again.returncode == 0 and "from the Hub cache" in again.stdout, again.stderr
    assert (tmp_path / "sft" / "dolly15k.jsonl").read_bytes() == first


def test_a_data_set_without_named_files_is_loaded_by_its_split(tmp_path, monkeypatch):
    """A Hub id, a revision and a split are enough; guards against settings of a description that nobody reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    asked = []

    class Rows:
        def to_parquet(self, path):
            pq.write_table(pa.table({"q": ["Hi"], "a": ["Hello"], "label": [1]}), path)

    def load_dataset(source, **options):
        asked.append((source, options))
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "unreachable", lambda: "")
    spec = sources.Spec("x", "prompt", "x.jsonl", "MIT", source="a/b", revision="c" * 40, split="test")
    files, line = sources.hub_files(spec, tmp_path)
    assert asked == [("a/b", {"split": "test", "revision": "c" * 40})] and "fetched a/b@ccccccc" in line
    rows = list(RowReader(files[0], columns={"prompt": "q", "response": "a"}, form="prompt"))
    assert [m["content"] for m in rows[0].messages] == ["Hi", "Hello"]


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_is_one_sentence_a_data_set_within_seconds(tmp_path, environment):
    """Guards against half a minute of retries for each data set, and against an error without a way out."""
    done = script(tmp_path, "--dataset", "all", **environment)
    assert done.returncode == 2
    sentences = done.stderr.strip().splitlines()
    assert len(sentences) == 3
    for line, name in zip(sentences, ("dolly15k", "oasst1", "alpaca")):
        assert line.startswith(f"error: {name}: ") and "to DIR/" in line and "--raw_dir DIR" in line
    assert not (tmp_path / "sft").exists()


def test_described_repositories_are_prepared_first():
    """Guards against oasst1's messages, deleted and rejected ones too, that are learnt as plain text."""
    sources.check_prepared(["ann/rows", "data/sft/dolly15k.jsonl"])
    with pytest.raises(UserError, match="--dataset oasst1. Do that first, and name data/sft/oasst1_en.jsonl"):
        sources.check_prepared(["OpenAssistant/oasst1@main"])
