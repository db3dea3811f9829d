"""Rows of every form are read as written; every kind of bad input is one sentence with file and line."""
import gzip
import hashlib
import json
import os

import pytest

from common import records
from common.faults import UserError
from common.records import LINE_LIMIT
from common.rows import Counts, Row, RowReader, row_to_json

GOOD = '{"prompt": "Hi", "response": "Hello"}\n'
ROW = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "train": True}]


def write(tmp_path, content, name="x.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options):
    reader = RowReader(path, **options)
    return list(reader), reader


def messages_of(tmp_path, record, name="x.jsonl", **options):
    rows, _ = read(write(tmp_path, json.dumps(record) + "\n", name), **options)
    return rows[0].messages


def one_message(role="user", content='"Hi"'):
    return (f'{{"messages": [{{"role": "{role}", "content": {content}}}, '
            '{"role": "assistant", "content": "Hello"}]}\n')


# (kind, bytes of the file after one good row, expected finding on line 2)
BAD_LINES = {
    1: ("not json\n", "not JSON at column 1 ('not json')."),
    2: ('{"prompt": "Hi", "resp', "the last line is cut off. Fetch or write the file again, or remove the line."),
    3: (GOOD.strip() + GOOD, "two objects on one line (the second at column 38). Give each its own line."),
    4: ("[1]\n", 'an array instead of an object. A row is an object: {"prompt": …, "response": …}. '
        "If the whole file is one array, give it a name in .json."),
    5: ('"Hi"\n', 'a text instead of an object. A row is an object: {"prompt": …, "response": …}.'),
    6: ("7\n", 'a number instead of an object. A row is an object: {"prompt": …, "response": …}.'),
    7: ('{"prompt": "a", "prompt": "b", "response": "c"}\n', 'the key "prompt" is there twice. Keep one of them.'),
    8: ('{"prompt": "a", "response": "b", "x": NaN}\n', "NaN is no JSON value. Write a number or null."),
    9: ('{"prompt": "a", "response": "b", "x": -Infinity}\n', "-Infinity is no JSON value. Write a number or null."),
    10: ('{"response": "b"}\n', '"prompt" is missing (keys: response). Rows need prompt and response, or messages.'),
    11: ('{"prompt": "a", "context": "b"}\n',
         '"response" is missing (keys: prompt, context). Rows need prompt and response, or messages.'),
    12: ('{"prompt": "a", "response": null}\n', '"response" is null. Rows need prompt and response, or messages.'),
    13: ('{"prompt": "a", "response": 3}\n', '"response" is a number. Rows need prompt and response, or messages.'),
    14: ('{"prompt": "a", "response": ["b"]}\n',
         'message 1 of "response" is a text. A message is {role, content}.'),
    15: ('{"prompt": "a", "response": {}}\n', '"response" is an object. Rows need prompt and response, or messages.'),
    22: ('{"prompt": "a", "response": "b\\ud800c"}\n',
         "\\ud800 is half of a surrogate pair (in 'b\\ud800c'). Write the whole character."),
    23: (b'{"prompt": "caf\xe9", "response": "b"}\n',
         "not UTF-8 (byte 0xe9 at byte 16). Save the file as UTF-8 (iconv -f LATIN1 -t UTF-8)."),
    25: (b'{"prompt": "a\0", "response": "b"}\n', "a NUL byte (at byte 14). Remove it; the file may be damaged."),
    28: (b'{"prompt": "' + b"a" * LINE_LIMIT + b'", "response": "b"}\n',
         "the line is over 16 MB. Cut the row into several."),
    29: ('{"text": "plain"}\n',
         "two forms in a file: this row is of the form text, the file began with prompt (row 1). "
         "Put the rows in two files."),
}
BAD_MESSAGES = {
    16: ('{"messages": []}\n', '"messages" is an empty list. Rows need at least one user and one assistant message.'),
    17: ('{"messages": [{"content": "Hi"}]}\n',
         'message 1 of "messages" has no "role" (keys: content). A message is {role, content}.'),
    18: (one_message("robot"),
         'message 1 of "messages" has the unknown role \'robot\' (known: system, user, assistant, tool, human, '
         "prompter, gpt, model, chatgpt, bing, bard, developer, function, observation, function_call). Rename "
         "it, or map it to one of them in role_map."),
    19: ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]}\n',
         '"content" of message 2 of "messages" is missing (keys: role). Give it a text, or tool_calls.'),
    20: (one_message(content="5"),
         '"content" of message 1 of "messages" is a number. It has to be a text or a list of text parts.'),
    21: ('{"messages": [{"role": "user", "content": "Hi"}]}\n',
         "no assistant message. There is nothing to learn from the row."),
}


@pytest.mark.parametrize("kind", [*BAD_LINES, *BAD_MESSAGES])
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, kind):
    """Guards against None, NaN or a late number passing as text, and against findings without a place."""
    content, finding = (BAD_LINES | BAD_MESSAGES)[kind]
    first = GOOD if kind in BAD_LINES else one_message()
    path = write(tmp_path, first.encode() + (content if isinstance(content, bytes) else content.encode()))
    with pytest.raises(UserError) as fault:
        read(path)
    assert str(fault.value) == (f"{path}:2: {finding}\n{path}: 1 of 2 rows cannot be used. Mend the file, "
                                "or go on without them with --skip_bad_rows.")
    rows, reader = read(path, skip_bad_rows=True)
    assert (len(rows), reader.rows_in, reader.rows_kept, reader.n_bad) == (1, 2, 1, 1)
    assert reader.bad == [f"{path}:2: {finding}"]


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_a_bad_file_is_refused_as_a_whole(tmp_path):
    """Kinds 24, 26, 27, 30, 31, 32: guards against decoding garbage, half a gzip file, and silence about nothing."""
    packed = gzip.compress(GOOD.encode() * 1000)
    cases = {
        write(tmp_path, GOOD.encode("utf-16"), "24.jsonl"):
            ":1: UTF-16 or UTF-32 text. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8).",
        write(tmp_path, GOOD.encode("utf-16-le"), "24le.jsonl"):
            ":1: UTF-16 or UTF-32 text. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8).",
        write(tmp_path, packed[:-20], "26.jsonl.gz"):
            ":1: damaged gzip data (Compressed file ended before the end-of-stream marker was reached). "
            "Fetch or pack the file again.",
        write(tmp_path, GOOD, "26b.jsonl.gz"):
            ":1: damaged gzip data (Not a gzipped file (b'{\"')). Fetch or pack the file again.",
        write(tmp_path, packed, "26c.jsonl"):
            ":1: gzip data under a plain name. Add .gz to the name, or unpack it.",
        write(tmp_path, "", "27.jsonl"): ":1: the file is empty. Put rows in, or leave it out.",
        write(tmp_path, "\n \n", "27b.jsonl"): ":2: the file holds no row. Put rows in, or leave it out.",
        write(tmp_path, "[]", "27c.json"): ":1: the file holds no row. Put rows in, or leave it out.",
        parquet(tmp_path / "30.parquet", {"prompt": ["a"], "label": [1]}):
            ':1: column "response" is missing (columns: prompt, label). Rows need prompt and response, or messages.',
        write(tmp_path, "PAR1 no", "30b.parquet"): ":1: not a readable parquet file (",
        write(tmp_path, "prompt,label\na,1\n", "31b.csv"):
            ':1: column "response" is missing (columns: prompt, label). Rows need prompt and response, or messages.',
        tmp_path / "none.jsonl":
            ": no such file. Check the path, or make it with scripts/prepare_sft_datasets.py.",
        write(tmp_path, GOOD, "x.txt"): ": not a kind of file that is read. It has to end in .jsonl, .json, .csv, "
            ".jsonl.gz, .json.gz, .csv.gz, .parquet.",
    }
    (tmp_path / "dir.jsonl").mkdir()
    cases[tmp_path / "dir.jsonl"] = ": a directory. Name a file in it."
    for path, finding in cases.items():
        for skip in (False, True):
            with pytest.raises(UserError) as fault:
                read(path, skip_bad_rows=skip)
            assert str(fault.value).startswith(str(path) + finding), fault.value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_a_sentence(tmp_path):
    """Kind 32: guards against a traceback."""
    path = write(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="no permission"):
        read(path)


def test_no_permission_as_the_system_reports_it(tmp_path, monkeypatch):
    """Kind 32 where the tests run as root: the system's refusal becomes the sentence."""
    path = write(tmp_path, GOOD)

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError) as fault:
        read(path)
    assert str(fault.value) == f"{path}: no permission to read it. Change it with chmod."


def test_csv_findings(tmp_path):
    """Kind 31: guards against shifted columns, and against one open quotation mark taking the rows before it along."""
    path = write(tmp_path, 'prompt,response\n"a\nb",c\nd,e,f\ng,"caf\u00e9"\nh,"open\n'.encode("latin-1"), "x.csv")
    rows, reader = read(path, skip_bad_rows=True)
    assert [(r.line, r.messages[0]["content"]) for r in rows] == [(2, "a\nb")]
    assert [b.removeprefix(f"{path}:") for b in reader.bad] == [
        "4: 3 fields, the header has 2 (prompt, response). Put quotation marks around fields with ','.",
        "5: not UTF-8 (byte 0xe9 at byte 7). Save the file as UTF-8 (iconv -f LATIN1 -t UTF-8).",
        "6: a quotation mark is opened and never closed (the file may be cut off)."]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_separators(tmp_path, separator):
    """Guards against the tables of spreadsheets in countries that write 1,5 being refused: the header decides."""
    lines = [["prompt", "response"], ["Hi", '"Well, hello; you\tthere"'], ["A", "B"]]
    path = write(tmp_path, "\ufeff" + "".join(separator.join(line) + "\r\n" for line in lines), "x.csv")
    rows, _ = read(path)
    assert [[m["content"] for m in row.messages] for row in rows] == [["Hi", "Well, hello; you\tthere"], ["A", "B"]]


def test_weights_of_openai(tmp_path):
    """Guards against training an answer that its file says is not to be trained; only 0 and 1 have a meaning."""
    def record(*weights):
        turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"} | w] for w in weights]
        return {"messages": [m for turn in turns for m in turn]}

    weights = [{"weight": 0}, {"weight": 1}, {"weight": None}, {"weight": 0, "train": False}]
    messages = messages_of(tmp_path, record(*weights))
    assert [m["train"] for m in messages if m["role"] == "assistant"] == [False, True, True, False]
    for wrong, finding in (({"weight": 0.5}, '"weight" of message 2 of "messages" is 0.5. It has to be 0 or 1.'),
                           ({"weight": "0"}, "is '0'. It has to be 0 or 1."),
                           ({"weight": 1, "train": False}, 'is 1. It has to be as "train" says, or away.')):
        with pytest.raises(UserError) as fault:
            messages_of(tmp_path, record(wrong))
        assert finding in str(fault.value)


def test_older_forms_of_calls(tmp_path):
    """Guards against a call that is lost: OpenAI's function_call, and ShareGPT's turn of that name."""
    call = {"name": "get", "arguments": '{"at": 1}'}
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"at": 1}}}]
    wanted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "train": True,
                                                   "tool_calls": calls},
              {"role": "tool", "content": "21"}, {"role": "assistant", "content": "Hello", "train": True}]
    for content in (None, ""):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content, "function_call": call},
                 {"role": "function", "content": "21"}, {"role": "assistant", "content": "Hello"}]
        assert messages_of(tmp_path, {"messages": turns}) == wanted
    for value in (json.dumps(call), json.dumps([call]) + "\n"):
        turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value},
                 {"from": "observation", "value": "21"}, {"from": "gpt", "value": "Hello"}]
        assert messages_of(tmp_path, {"conversations": turns}) == wanted
    turns[1]["value"] = "[1]"
    with pytest.raises(UserError, match='the tool calls of message 2 of "conversations" are a list'):
        messages_of(tmp_path, {"conversations": turns})
    for nothing in ("", " ", "[]", "null", "{}"):
        turns[1]["value"] = nothing
        with pytest.raises(UserError, match='message 2 of "conversations" is no function call'):
            messages_of(tmp_path, {"conversations": turns})


def answer_of(tmp_path, **more):
    return messages_of(tmp_path, {"messages": [ROW[0], {"role": "assistant", **more}]})[1]


def test_calls_in_every_form_become_one(tmp_path):
    """Guards against arguments that are JSON twice over, a call of nulls that is learnt, and one that is lost."""
    function = {"name": "get", "arguments": {"at": 1}}
    wanted = {"role": "assistant", "content": "", "train": True,
              "tool_calls": [{"type": "function", "function": function}]}
    as_text = {**function, "arguments": ' {"at": 1}\n'}
    for more in ({"tool_calls": [{"type": "function", "function": as_text}]}, {"tool_calls": [function]},
                 {"function_call": as_text}, {"function_call": json.dumps(function)},
                 {"content": "", "tool_calls": json.dumps([function]), "function_call": None},
                 {"tool_calls": None, "function_call": function}):
        assert answer_of(tmp_path, **more) == wanted, more
    for odd in ("1+1", "{broken", '["a list"]'):  # what is no object stays what the model wrote
        call = {"name": "run", "arguments": odd}
        assert answer_of(tmp_path, tool_calls=[call])["tool_calls"][0]["function"] == call
    for nothing in ({}, {"name": None, "arguments": None}, "", " "):
        assert answer_of(tmp_path, content="Hello", function_call=nothing) == ROW[1]
    assert answer_of(tmp_path, content="Hello", tool_calls=[{"id": None, "function": None}]) == ROW[1]
    for wrong in ([{"id": "1"}], [{"function": {"arguments": "{}"}}], "[1]", 5, ["f"]):
        with pytest.raises(UserError, match="tool call"):
            answer_of(tmp_path, content="Hello", tool_calls=wrong)


def test_what_other_tools_call_it(tmp_path):
    """ms-swift's "loss", Axolotl's "training" and "train_detail", OpenAI's older "functions", ChatGLM's "history",
    DeepSeek's thoughts."""
    for name in ("loss", "training"):
        assert answer_of(tmp_path, content="a", **{name: True})["train"] and not messages_of(tmp_path, {"messages": [
            {**ROW[0], name: True}, {"role": "assistant", "content": "a", name: False}, *ROW]})[1]["train"]
    with pytest.raises(UserError, match='"train_detail" of message 2 of "messages" marks parts'):
        answer_of(tmp_path, content="a", train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}])
    function = {"name": "f", "parameters": {}}
    rows, _ = read(write(tmp_path, json.dumps({"messages": ROW, "functions": [function]}) + "\n"))
    assert rows[0].tools == [{"type": "function", "function": function}]
    assert messages_of(tmp_path, {"prompt": "And?", "response": "c", "history": [["a", "b"]]}) == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "c", "train": True}]
    assert answer_of(tmp_path, content="4", reasoning_content="2 + 2")["reasoning_content"] == "2 + 2"


def test_keys_that_hold_something_and_are_not_read_are_named(tmp_path):
    """Guards against a context or a system text under another name that is lost unseen."""
    rows = [{"prompt": "a", "response": "b", "context": "c", "id": 1, "empty": "", "none": None},
            {"prompt": "a", "response": "b", "context": "d"}]
    reader = read(write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)))[1]
    assert reader.unread == {"context": 2}
    row = {"messages": [{**ROW[0], "date": "now"}, ROW[1]], "lang": "en"}
    reader = read(write(tmp_path, json.dumps(row) + "\n"))[1]
    assert reader.unread == {"date of messages": 1, "lang": 1}
    path = parquet(tmp_path / "a.parquet", {"prompt": ["a", "b"], "response": ["c", "d"], "context": ["e", None],
                                            "nothing": [None, None]})
    assert read(path)[1].unread == {"context": 1}


def test_parquet_gives_what_json_would(tmp_path):
    """Arrow's structs have the fields of all rows: null arguments of another row's call must not be learnt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def record(name, **arguments):
        return {"messages": [ROW[0], {"role": "assistant", "content": None, "tool_calls": [
                    {"type": "function", "function": {"name": name, "arguments": arguments}}]}],
                "tools": [{"type": "function", "function": {"name": name, "parameters": {
                    "properties": {key: {"type": "string"} for key in arguments}}}}]}

    records = [record("weather", city="Paris"), record("add", a=1, b=2)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == read(write(tmp_path, "".join(json.dumps(r) + "\n" for r in records)))[0]
    arguments = pa.array([[("city", "Paris")]], pa.map_(pa.string(), pa.string()))
    call = pa.StructArray.from_arrays([pa.array(["weather"]), arguments], ["name", "arguments"])
    message = pa.StructArray.from_arrays([pa.array(["assistant"]), pa.ListArray.from_arrays([0, 1], call)],
                                         ["role", "tool_calls"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 1], message)}), tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet")[0][0].messages[0]["tool_calls"]
    assert found == [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]


def test_history_of_an_instruction(tmp_path):
    """Guards against an answer learnt without the turns that it rests on; those are learnt too, as where the form
    comes from."""
    row = {"instruction": "And?", "input": "", "output": "b", "system": "S"}
    assert messages_of(tmp_path, row | {"history": [["Hi", "a"]]}) == [
        {"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a", "train": True}, {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "b", "train": True}]
    for empty in ([], None, ""):
        assert len(messages_of(tmp_path, row | {"history": empty})) == 3
    for wrong in ("Hi", [["Hi"]], ["Hi", "a"], [["Hi", "a", "b"]], {"Hi": "a"}, 3):
        with pytest.raises(UserError, match='"history" is no list of pairs'):
            messages_of(tmp_path, row | {"history": wrong})


@pytest.mark.parametrize("record, way", [
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "rename chosen to response"),
    ({"title": "t", "mapping": {}}, "--dataset chatgpt"), ({"role": "user", "content": "Hi"}, "--dataset gptme")])
def test_rows_that_need_another_step_first(tmp_path, record, way):
    """Guards against a user who brings an export and is told of keys alone."""
    with pytest.raises(UserError, match=way):
        messages_of(tmp_path, record)


def test_findings_in_a_json_array_name_row_and_line(tmp_path):
    """Guards against 'row 0' and against lines counted from the wrong end."""
    path = write(tmp_path, '[\n {"prompt": "a",\n  "response": "b"},\n {"prompt": "c"}\n]\n', "x.json")
    rows, reader = read(path, skip_bad_rows=True)
    assert [row.line for row in rows] == [1]
    assert reader.bad == [f'{path}:4: row 2: "response" is missing (keys: prompt). '
                          "Rows need prompt and response, or messages."]
    for content, finding in (('[\n{"prompt": "a", "response": "b"},\n{"prom', ":3: row 2: the array is cut off."),
                             ('[{"prompt": "a"}\n{"prompt": "b"}]', ":2: row 1: the array is no JSON: a comma"),
                             ('[{"prompt": "a", "response": "b"}] x', ":1: something follows the array: 'x'"),
                             ('[{"prompt": "a", "response": "b"}', ":1: row 1: the array is cut off after this row.")):
        with pytest.raises(UserError) as fault:
            read(write(tmp_path, content, "y.json"))
        assert finding in str(fault.value)


def test_all_bad_rows_are_counted_and_twenty_shown(tmp_path):
    """Guards against stopping at the first one, and against a screen of thousands."""
    path = write(tmp_path, GOOD + "x\n" * 25)
    with pytest.raises(UserError) as fault:
        read(path)
    lines = str(fault.value).splitlines()
    assert len(lines) == 22 and lines[20] == "… and 5 more"
    assert lines[21].startswith(f"{path}: 25 of 26 rows cannot be used.")


def test_a_file_of_nothing_but_bad_rows_is_refused_even_when_skipping(tmp_path):
    """Guards against training on nothing."""
    with pytest.raises(UserError, match="its only row cannot be used. Mend the file"):
        read(write(tmp_path, "x\n"), skip_bad_rows=True)


@pytest.mark.parametrize("content", [
    "\ufeff" + GOOD, GOOD.replace("\n", "\r\n") * 2, "\n\n" + GOOD + "\n", GOOD.strip(),
    '{"prompt": "Hi", "response": "Hello", "extra": {"a": [1, null]}, "source": null, "id": null, "system": null}\n'])
def test_what_is_accepted(tmp_path, content):
    """BOM, CRLF, blank lines, no final newline, extra keys and nulls in optional ones: nothing to complain about."""
    path = write(tmp_path, content)
    rows, reader = read(path)
    assert all(row.messages == ROW for row in rows) and rows
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_line_separators_inside_text_end_no_line(tmp_path):
    """Guards against str.splitlines, which cuts at U+2028, U+0085 and form feeds."""
    text = "a\u2028b\u0085c\x0bd"
    rows, _ = read(write(tmp_path, json.dumps({"prompt": text, "response": "x"}, ensure_ascii=False) + "\n" + GOOD))
    assert [row.line for row in rows] == [1, 2]
    assert rows[0].messages[0]["content"] == text


def test_every_form_gives_the_same_conversation(tmp_path):
    """One conversation written in each form, in each file format, is one and the same row."""
    forms = [
        {"prompt": "Hi", "response": "Hello"}, {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        {"messages": ROW}, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "input": "", "output": "Hello"}, {"instruction": "Hi", "output": "Hello", "input": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": "Hello"}]},
        {"messages": ROW, "prompt": "Hi", "text": "x"},  # extra keys of later forms
    ]
    for record in forms:
        line = json.dumps(record)
        assert messages_of(tmp_path, record) == ROW, record
        for name, content in (("x.json", f"[{line}]"), ("x.json.gz", gzip.compress(f"[{line}]".encode())),
                              ("x.jsonl.gz", gzip.compress(line.encode())), ("y.json", line + "\n" + line)):
            rows, reader = read(write(tmp_path, content, name))
            assert rows[0].messages == ROW
            assert reader.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        columns = {k: v for k, v in record.items() if v is not None}
        if '"text": "H"' not in line:  # parquet has no column of texts and lists mixed
            rows, _ = read(parquet(tmp_path / "x.parquet", {k: [v, v] for k, v in columns.items()}))
            assert [(row.line, row.messages) for row in rows] == [(1, ROW), (2, ROW)]
        if not isinstance(record.get("prompt"), list):
            cells = [(v if isinstance(v, str) else json.dumps(v)).replace('"', '""') for v in columns.values()]
            text = ",".join(columns) + "\n" + ",".join(f'"{cell}"' for cell in cells) + "\n"
            assert read(write(tmp_path, text, "x.csv"))[0][0].messages == ROW


def test_details_of_the_forms(tmp_path):
    """System texts, inputs, tools, labels and training marks arrive where they belong."""
    rows, reader = read(write(tmp_path, json.dumps(
        {"prompt": "Hi", "response": "Hello", "system": "Be brief.", "source": "s", "id": 7}) + "\n"))
    assert rows[0] == Row(1, [{"role": "system", "content": "Be brief."}, *ROW], None, None, "s", "7")
    assert (reader.form, reader.rows_in, reader.rows_kept) == ("prompt", 1, 1)
    assert messages_of(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"})[0]["content"] == "Add\n\n1 2"
    assert messages_of(tmp_path, {"q": "Hi", "a": "Hello"}, columns={"prompt": "q", "response": "a"}) == ROW
    assert messages_of(tmp_path, {"messages": [{"role": "A", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]},
                       role_map={"A": "user"}) == ROW
    marked = messages_of(tmp_path, {"messages": [
        {"role": "assistant", "content": "Old", "train": False}, {"role": "user", "content": "Hi", "train": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"}, {"role": "assistant", "content": "One"}]})
    assert [m.get("train") for m in marked] == [False, None, True, None, True]
    assert marked[2]["content"] == "" and marked[2]["tool_calls"] and marked[3]["tool_call_id"] == "c1"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}  # as OpenAI's API allows it
    assert messages_of(tmp_path, {"messages": [ROW[0], call]})[1] == {**call, "content": "", "train": True}
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    context = messages_of(tmp_path, {"prompt": prompt, "response": "c"})
    assert [m.get("train") for m in context] == [None, False, True]
    rows, _ = read(write(tmp_path, '{"text": "Once"}\n'))
    assert rows[0].text == "Once" and rows[0].messages is None and rows[0].first_prompt() == "Once"
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        assert read(write(tmp_path, json.dumps({"messages": ROW, "tools": given}) + "\n"))[0][0].tools == tools


@pytest.mark.parametrize("record, finding", [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": "false"}]},
     '"train" of message 2 of "messages" is a text (\'false\'). It has to be true or false.'),
    ({"messages": [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]},
     '"train" of message 1 of "messages" is true, but its role is user. Only assistant messages are trained.'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "b"}]},
     '"content" of message 1 of "messages" has a part that is no text (image_url). '
     'Only parts {"type": "text", "text": …} can be used.'),
    ({"messages": [{"role": "system", "content": "x"}, *ROW], "system": "y"},
     '"system" and the system message differ. Keep one of them.'),
    ({"prompt": "a", "response": "b", "system": 3},
     '"system" is a number. It has to be a text.'),
    ({"prompt": "a", "response": "b", "source": []}, '"source" is a list. It has to be a text, a number or null.'),
    ({"messages": ROW, "tools": "f"}, "not JSON at column 1 ('f')."),
    ({"messages": ROW, "tools": {}}, '"tools" is an object. It has to be a list of tool descriptions.'),
    ({"conversations": "Hi"}, '"conversations" is a text. Rows need conversations, a list of {from, value}.'),
    ({"conversations": [{"value": "Hi", "from": None}]},
     'message 1 of "conversations" has no "from" (keys: value, from). A message is {role, content}.'),
    ({"prompt": "a\0", "response": "b"}, 'a NUL byte in "prompt". Remove it; the file may be damaged.'),
    ({"question": "a"}, "no known form (keys: question). Rows need prompt and response, or messages."),
    ({"prompt": [{"role": "user", "content": "a"}], "response": [{"role": "user", "content": "b"}]},
     'no assistant message in "response". There is nothing to learn from the row.'),
])
def test_further_findings(tmp_path, record, finding):
    """Values of the wrong type are named, never converted."""
    path = write(tmp_path, json.dumps(record) + "\n")
    with pytest.raises(UserError) as fault:
        read(path)
    assert str(fault.value).splitlines()[0] == f"{path}:1: {finding}"


@pytest.mark.parametrize("content, finding", [
    (b'{"a": ' + b"[" * 100_000 + b"\n", "nested too deeply."),
    (b'{"a": ' + b"9" * 5000 + b"}\n", "not JSON (Exceeds the limit"),
    (b"{\n", "not JSON: only '{'. A row has to be on one line"),
    (b'{"prompt": "a", "response": "b"} x\n', "not JSON at column 33: 'x' follows the object."),
    ('{"prompt": "é'.encode()[:-1], "the last line is cut off."),
])
def test_hostile_and_odd_lines(tmp_path, content, finding):
    """No line, however odd, ends in a traceback."""
    path = write(tmp_path, content)
    with pytest.raises(UserError) as fault:
        read(path)
    assert str(fault.value).startswith(f"{path}:1: {finding}")


def test_empty_answers_are_dropped_and_counted(tmp_path):
    """Guards against teaching the model to end at once, and against rows that vanish without a count."""
    rows = [{"messages": [ROW[0], {"role": "assistant", "content": answer, "train": train}]}
            for answer, train in (("", True), (" \n", True), ("x", False), ("fine", True))]
    rows.append({"messages": [ROW[0], {"role": "assistant", "content": " "}, *ROW]})
    kept, reader = read(write(tmp_path, "".join(json.dumps(r) + "\n" for r in rows)))
    assert [row.line for row in kept] == [4, 5]
    assert reader.dropped == {"empty answer": 2, "no answer to train": 1}
    assert reader.notes == {"empty assistant turns not trained": 1}
    assert [m.get("train") for m in kept[1].messages] == [None, False, None, True]
    assert reader.rows_in == reader.rows_kept + reader.n_bad + sum(reader.dropped.values()) == 5


def test_written_rows_read_back_equal(tmp_path):
    """Guards against a validation file that loses training marks, tools or labels."""
    records = [{"messages": [{"role": "system", "content": "s"}, *ROW, {"role": "user", "content": "u"},
                             {"role": "assistant", "content": "", "train": False,
                              "tool_calls": [{"id": "1", "function": {"name": "f"}}]}, *ROW],
                "tools": [{"name": "f"}], "source": "s", "id": "1"}, {"messages": ROW}]
    rows, _ = read(write(tmp_path, "".join(json.dumps(r) + "\n" for r in records)))
    again, _ = read(write(tmp_path, "".join(json.dumps(row_to_json(r)) + "\n" for r in rows), "again.jsonl"))
    assert again == rows
    text = [Row(1, None, "plain", source="s")]
    assert read(write(tmp_path, json.dumps(row_to_json(text[0])) + "\n"))[0] == text


def test_first_prompt_decides_the_split():
    """The first user message, whatever stands before it; guards against splitting by the system prompt."""
    row = Row(1, [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a", "train": False}, *ROW])
    assert row.first_prompt() == "Hi"
    assert Row(1, [ROW[1]]).first_prompt() == "Hello"


def test_a_reader_can_be_used_twice(tmp_path):
    """Guards against counts that add up over passes."""
    reader = RowReader(write(tmp_path, GOOD * 3))
    assert len(list(reader)) == len(list(reader)) == reader.rows_in == 3


LONG = '{"prompt": "' + "a" * 900  # over the limit of a line, which is 600 bytes here


@pytest.mark.parametrize("content", [
    GOOD * 40, "\ufeff" + GOOD * 40, GOOD * 3 + "\n \r\n" * 200 + GOOD, GOOD.replace("\n", "\r\n") * 9,
    GOOD * 9 + GOOD[:-5], (GOOD + "{\n[1]\n" + GOOD[:-1] + " x\n") * 9,
    GOOD + LONG + '", "response": "b"}\n' + GOOD * 2, GOOD + LONG, (GOOD + LONG + "\n") * 3 + GOOD * 20, GOOD[:-1],
    '[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}]', "prompt,response\na,b\nc\nd,e\n"])
@pytest.mark.parametrize("zipped", [False, True])
def test_blocks_hold_the_rows_of_the_file(tmp_path, monkeypatch, content, zipped):
    """Guards against rows lost, doubled or miscounted at the seams of blocks, and lines numbered from their block."""
    monkeypatch.setattr(records, "BLOCK_BYTES", 64)
    monkeypatch.setattr(records, "BLOCK_ROWS", 2)
    monkeypatch.setattr(records, "LINE_LIMIT", 600)
    name = "x.json" if content[0] == "[" else "x.csv" if content.startswith("prompt,") else "x.jsonl"
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    whole, parts = RowReader(path, skip_bad_rows=True), RowReader(path, skip_bad_rows=True)
    expected, found, counts = list(whole), [], Counts()
    for block in parts.blocks():
        found += parts.rows_of(block)
        counts.add(parts.take())
    assert found == expected and parts.sha256 == whole.sha256
    parts.add(counts)
    parts.finish()
    for name in ("rows_in", "rows_kept", "n_bad", "bad", "dropped", "notes", "form"):
        assert getattr(parts, name) == getattr(whole, name), name


@pytest.mark.parametrize("content, finding", [("", "is empty"), ("\n \n", "holds no row")])
def test_blocks_of_a_file_without_rows(tmp_path, content, finding):
    """Guards against an empty file that is prepared in silence."""
    with pytest.raises(UserError, match=finding):
        list(RowReader(write(tmp_path, content)).blocks())


def test_reading_imports_no_torch():
    """Guards against seconds of start-up for a mistyped path."""
    import subprocess
    import sys

    code = "import sys; sys.path.insert(0, 'scripts'); import common.rows, common.oasst, common.sources; " \
           "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(__file__))).returncode == 0


def test_parquet_text_that_is_not_utf8_is_a_finding_of_its_row(tmp_path):
    """Guards against one bad byte costing the whole file, or a traceback."""
    import pyarrow as pa

    texts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.binary()).cast(pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    path = parquet(tmp_path / "x.parquet", {"prompt": bad, "response": ["x", "y", "z"]})
    rows, reader = read(path, skip_bad_rows=True)
    assert [row.line for row in rows] == [1, 3]
    assert reader.bad[0].startswith(f"{path}:2: not UTF-8 (byte 0xe9")


def test_descriptions_of_tools_are_objects(tmp_path):
    """Guards against names of tools that end in a traceback, and JSON texts that templates write in quotes twice."""
    row = {"prompt": "Hi", "response": "Hello"}
    tool = {"type": "function", "function": {"name": "look"}}
    rows, _ = read(write(tmp_path, json.dumps({**row, "tools": [f" {json.dumps(tool, indent=1)}\n"]}) + "\n"))
    assert rows[0].tools == [tool]
    for tools, kind in ((["search"], "a text"), ([None], "null")):
        with pytest.raises(UserError, match=f"entry that is {kind}"):
            read(write(tmp_path, json.dumps({**row, "tools": tools}) + "\n"))


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_by_any_name(tmp_path, name):
    """Guards against gpt-oss' data, whose thoughts are not learnt though transformers serves them."""
    found = messages_of(tmp_path, {"messages": [{"role": "user", "content": "Hi", name: None},
                                                {"role": "assistant", "content": "Hello", name: "why"}]})
    assert found == [ROW[0], {**ROW[1], "reasoning_content": "why"}]
    turns = [ROW[0], {"role": "assistant", "content": "Hello", "reasoning_content": "", "thinking": ["a"],
                      "reasoning": "why"}]
    rows, reader = read(write(tmp_path, json.dumps({"messages": turns}) + "\n"))
    assert rows[0].messages == found and reader.unread == {"thinking of messages": 1}


def test_half_a_character_in_json_inside_of_json(tmp_path):
    """Guards against a traceback of the encoder for what a model wrote into a call."""
    call = {"function": {"name": "f", "arguments": '{"e": "\\ud83d"}'}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    found = messages_of(tmp_path, {"messages": turns})
    assert found[1]["tool_calls"][0]["function"]["arguments"] == '{"e": "\\ud83d"}'  # as it was written: a text
    json.dumps(found, ensure_ascii=False).encode()
    with pytest.raises(UserError, match="half of a surrogate pair"):
        read(write(tmp_path, 'messages\n"[{""role"": ""user"", ""content"": ""\\ud83d""}]"\n', "x.csv"))


def test_lists_of_messages_in_csv(tmp_path):
    """Guards against JSON that is learnt as an answer: --csv writes such cells."""
    cells = [json.dumps([{"role": "user", "content": "Hi"}]), json.dumps([{"role": "assistant", "content": "Hello"}])]
    quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    texts = ["[1]", '[{""from"": ""Paris"", ""to"": ""Rome""}]', '[{""role"": ""CEO"", ""name"": ""Ann""}]']
    more = "".join(f'Hi,"{text}"\n' for text in texts)
    rows, _ = read(write(tmp_path, f"prompt,response\n{quoted}\n{more}", "x.csv"))
    assert rows[0].messages == ROW
    assert [row.messages[1]["content"] for row in rows[1:]] == [text.replace('""', '"') for text in texts]
