"""Template files in YAML: the text they describe, what is trained, signs and markers, roles, and the cache behind."""
from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import chat_rows, sentences, train_spm, write_rows
from jinja2.sandbox import ImmutableSandboxedEnvironment
from running import read_json, run_script
from test_chat import controls_of, marked

from common.chat import Chat, load_chat, load_saved_chat
from common.data import load_dataset
from common.faults import UserError
from common.prove import prove
from common.rows import Row, RowReader
from common.template_file import facts

TEMPLATE = """\
{{ chat_template_data.system_instruction + '\\n' }}
{% for turn in messages %}
{{ turn.role + ':' }}
{% if turn.role == chat_template_data.assistant_role %}
{{ chat_template_data.special_tokens.b_include_to_loss_token}}
{% else %}
{{ " " }}
{% endif %}
{{ turn.content + '\\n'}}
{% if turn.role == chat_template_data.assistant_role %}
{{ chat_template_data.special_tokens.e_assistant_token}}
{{ chat_template_data.special_tokens.e_include_to_loss_token}}
{% endif %}
{% endfor %}
"""
TOKENS = {"b_include_to_loss_token": "^", "e_include_to_loss_token": "$", "e_assistant_token": "°"}
EVERYBODY = ("{% for turn in messages %}{{ chat_template_data.special_tokens.b_include_to_loss_token + turn.content + "
             "chat_template_data.special_tokens.e_assistant_token + "
             "chat_template_data.special_tokens.e_include_to_loss_token }}{% endfor %}")
DATA = {"assistant_role": "Bot", "system_instruction": "be good", "special_tokens": TOKENS}
ROLES = {"human_1": "One", "human_2": "Two", "gpt": "Bot"}
KINDS = ("spm_unigram", "spm_bpe", "byte_level")

# By hand: the text in the tokenizer's pieces, / begins and ends what is trained. ° is a byte of the byte-level
# vocabulary, so another token stands for it there; the others take it as a new token.
GOLDEN = {
    "spm_unigram": "<s> ▁ b e ▁ g o o d <0x0A> O ne <0x3A> ▁the ▁cat <0x0A> B ot <0x3A> / t h e ▁dog <0x0A> ° /",
    "spm_bpe": "<s> ▁b e ▁g o o d <0x0A> O n e <0x3A> ▁the ▁ c at <0x0A> B ot <0x3A> / t he ▁dog <0x0A> ° /",
    "byte_level": "b e Ġ g o o d Ċ One : Ġthe Ġcat Ċ B ot : / t he Ġdog Ċ <|e_assistant_token|> /",
}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Write a template file; keywords replace its parts."""
    def write(name: str = "template.yaml", template: str = TEMPLATE, data: dict = DATA, roles: dict | None = ROLES,
              **more: object) -> str:
        parts = {"jinja2_chat_template": template, "chat_template_data": data,
                 "instruction_data_transformation": {"role_mapping": roles}, **more}
        (tmp_path / name).write_text(yaml.safe_dump({k: v for k, v in parts.items() if v is not None},
                                                    allow_unicode=True), encoding="utf-8")
        return str(tmp_path / name)
    return write


def as_described(messages: list[dict], template: str = TEMPLATE, data: dict = DATA, roles: dict = ROLES) -> str:
    """What Modalities makes of a conversation: roles replaced, line ends between tags removed, a sandboxed Jinja."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    turns = [{**m, "role": roles.get(m["role"], m["role"])} for m in messages]
    return environment.from_string(template.replace("}\n{", "}{")).render(messages=turns, chat_template_data=data)


def conversations(count: int, seed: int, words: Callable[[random.Random], str] | None = None) -> list[list[dict]]:
    draw = random.Random(seed)
    text = words or (lambda d: " ".join(d.choice(sentences(30, 3)) for _ in range(d.randint(1, 2))))
    return [[{"role": role, "content": text(draw)} for _ in range(draw.randint(1, 3))
             for role in (draw.choice(["human_1", "human_2"]), "gpt")] for _ in range(count)]


def read(chat: Chat, place: Path, talks: list[list[dict]]) -> list[Row]:
    write_rows(place, [{"messages": talk} for talk in talks])
    return list(RowReader(place, role_map=chat.role_map))


# ---- text, ids, masks

@pytest.mark.parametrize("name", KINDS)
def test_golden_ids(file, name, request):
    """Guards against any change of ids or masks, and a marker that is left over as a token."""
    chat = load_chat(request.getfixturevalue(name), file())
    one = Row(1, [{"role": "user", "speaker": "One", "content": "the cat"},
                  {"role": "assistant", "speaker": "Bot", "content": "the dog", "train": True}])
    assert marked(chat, one) == GOLDEN[name]
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == GOLDEN[name].split()[-2]
    prompt = chat.tokenizer.convert_ids_to_tokens(chat.prompt_ids(one.messages[:1]))
    assert " ".join(prompt) == GOLDEN[name].partition(" / ")[0]


@pytest.mark.parametrize("name", KINDS)
def test_rendered_text_and_spans(file, tmp_path, name, request):
    """Guards against text that differs from what the file describes, and against spans beside the assistant's text and
    the sign that ends its turn."""
    chat = load_chat(request.getfixturevalue(name), file())
    talks = conversations(30, 1)
    for talk, row in zip(talks, read(chat, tmp_path / "rows.jsonl", talks)):
        whole = as_described(talk)
        text, spans = chat.rendered(row)
        assert text == re.sub("[$^]", "", whole)
        trained = [talk[i]["content"] + "\n°" for i in range(1, len(talk), 2)]
        assert [text[a:b] for a, b in spans] == trained == re.findall(r"\^(.*?)\$", whole, re.S)
        encoded = chat.encode_rows([row])[0]
        learnt = chat.tokenizer.decode(encoded.input_ids[encoded.trained])
        assert learnt.replace("<|e_assistant_token|>", "°").split() == "".join(trained).replace("°", " ° ").split() \
            or learnt.replace("<|e_assistant_token|>", "°").replace(" ", "") == "".join(trained).replace(" ", "")


def test_markers_may_be_any_strings(file, tmp_path, spm_unigram):
    """Guards against markers that are looked for in the text: their strings and what users write do not matter."""
    talks = conversations(20, 2, lambda d: d.choice(["a $5 ^ 2 $", "^", "$$^^", "the cat", "is ^this$ it", "\n$\n"]))
    usual = load_chat(spm_unigram, file())
    expected = usual.encode_rows(read(usual, tmp_path / "rows.jsonl", talks))
    for begin, end in (("<<", ">>"), ("e", "t"), ("the cat", "{{"), ("°", "°")):
        tokens = TOKENS | {"b_include_to_loss_token": begin, "e_include_to_loss_token": end}
        chat = load_chat(spm_unigram, file(data=DATA | {"special_tokens": tokens}))
        for a, b in zip(chat.encode_rows(read(chat, tmp_path / "rows.jsonl", talks)), expected):
            assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.trained, b.trained)
    for talk, row in zip(talks, read(usual, tmp_path / "rows.jsonl", talks)):
        text, spans = usual.rendered(row)
        assert [text[a:b] for a, b in spans] == [talk[i]["content"] + "\n°" for i in range(1, len(talk), 2)]


HOSTILE = ["°", "<|e_assistant_token|>", "^", "$", "</s>", "<s>", "<|endoftext|>", "Bot:", "One: ", "{{ messages }}",
           "{% endset %}", "{% endfor %}", "\ue000+\ue001", "\ue000-\ue001", "\ue0000\ue001", "\ue002", "\ue003\ue003",
           "25 °C", "}\n{", "#}", "the cat"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_white_space_around_tags_and_markers(file, spm_unigram, end):
    """Random white space control, spaces before, after and inside markers, CRLF files, data that looks like Jinja:
    text and spans are those of the template rendered with marks that no text holds, found there by searching."""
    draw, special, tried = random.Random(len(end)), "chat_template_data.special_tokens.", 0

    def tag(body: str, kind: str = "{}") -> str:
        minus = [draw.choice(["", "", "-"]) for _ in range(2)]
        after = draw.choice(["", "\n", "\n", " ", "\n  ", " \n", "x"])
        return f"{{{kind[0]}{minus[0]} {body} {minus[1]}{kind[1]}}}{after}"

    for _ in range(25):
        space = draw.choice(["", "' ' + ", "'\\n' + "])
        template = "".join([
            tag("chat_template_data.system_instruction"), tag("for m in messages", "%%"), tag("m.role + ':'"),
            tag("if m.role == 'Bot'", "%%"), tag(f"{space}{special}b_include_to_loss_token"), tag("m.content"),
            tag(f"{special}e_assistant_token + {special}e_include_to_loss_token"),
            tag("else", "%%"), tag("' ' + m.content"), tag("endif", "%%"), tag("endfor", "%%")])
        begins, ends = draw.choice([("^", "$"), (" ^", "$ "), ("\n^", "^\n"), ("<b>", "</b>"), ("{{", "}}")])
        tokens = TOKENS | {"b_include_to_loss_token": begins, "e_include_to_loss_token": ends}
        data = DATA | {"special_tokens": tokens, "system_instruction": draw.choice(["{{ 1 }} #}", " a\n", "^ $ \"\\"])}
        path = Path(file(template=template, data=data))
        path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
        chat = load_chat(spm_unigram, str(path))
        talk = [{"role": "user", "content": f"a {begins} b", "speaker": "One"},
                {"role": "assistant", "content": f" {ends}° c ", "speaker": "Bot", "train": True}] * 2
        marks = {"b_include_to_loss_token": "\ue010", "e_include_to_loss_token": "\ue011"}
        want = as_described([{**m, "role": m["speaker"]} for m in talk], template,
                            data | {"special_tokens": tokens | marks})
        text, spans = chat.rendered(Row(1, talk))
        assert text == re.sub("[\ue010\ue011]", "", want)
        assert [text[a:b] for a, b in spans] == re.findall("\ue010([^\ue011]*)\ue011", want)
        tried += len(spans)
    assert tried == 50


@pytest.mark.parametrize("name", KINDS)
def test_hostile_text_stays_text(file, tmp_path, name, request):
    """Guards against text that ends a turn, opens a trained part, or breaks the template."""
    chat = load_chat(request.getfixturevalue(name), file())
    hostile = conversations(40, 3, lambda d: " ".join(d.choice(HOSTILE) for _ in range(d.randint(1, 3))))
    harmless = [[{**m, "content": "the cat"} for m in talk] for talk in hostile]
    pairs = [chat.encode_rows(read(chat, tmp_path / "rows.jsonl", talks)) for talks in (hostile, harmless)]
    for bad, good in zip(*pairs):
        assert controls_of(chat, bad) == controls_of(chat, good)
    for talk, row in zip(hostile, read(chat, tmp_path / "rows.jsonl", hostile)):
        text, spans = chat.rendered(row)
        assert [text[a:b] for a, b in spans] == [talk[i]["content"] + "\n°" for i in range(1, len(talk), 2)]


def test_an_ordinary_token_is_no_sign(file, tmp_path):
    """Guards against a model that ends its turn at "25 °C": where ° is a piece, a token of its own stands for it."""
    import io

    import sentencepiece as spm

    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{s} 25 ° C °" for s in sentences(300)]), model_writer=out, vocab_size=340,
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True, pad_id=0, unk_id=1,
        bos_id=2, eos_id=3, minloglevel=2, num_threads=1, hard_vocab_limit=False)
    (tmp_path / "degree.model").write_bytes(out.getvalue())
    chat = load_chat(str(tmp_path / "degree.model"), file())
    assert "°" in chat.tokenizer.get_vocab()
    assert chat.added_tokens == ["<|e_assistant_token|>"] and chat.notes[-1].endswith("'°' in a text stays text")
    one = Row(1, [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "25 °C", "train": True}])
    ids = chat.encode_rows([one])[0].input_ids.tolist()
    assert ids.count(chat.end_id) == 1 and ids[-1] == chat.end_id
    assert chat.decode(ids).endswith("25 °C\n")
    assert chat.rendered(one)[0].endswith("Bot:25 °C\n°")


# ---- where else the template is used

@pytest.mark.parametrize("name", KINDS)
def test_saved_template_gives_the_same_ids(file, tmp_path, name, request):
    """Guards against a model that is served with other prompts than it was trained on, by whatever role names."""
    from transformers import AutoTokenizer

    chat = load_chat(request.getfixturevalue(name), file(), system_prompt=None)
    talks = conversations(20, 4)
    rows = read(chat, tmp_path / "rows.jsonl", talks)
    assert prove(chat, rows)["template_differs"] == 0
    chat.save(tmp_path / "saved")
    again = load_saved_chat(str(tmp_path / "saved"))
    assert again.role_map == chat.role_map and again.stop_ids == chat.stop_ids and again.added_tokens == []
    plain = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    for talk, row, a, b in zip(talks, rows, chat.encode_rows(rows), again.encode_rows(rows)):
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.trained, b.trained)
        turns = [{"role": m["role"], "speaker": ROLES[t["role"]], "content": m["content"]}
                 for m, t in zip(row.messages, talk)]
        assert list(plain.apply_chat_template(turns)["input_ids"]) == a.input_ids.tolist()
        asked = plain.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        assert list(asked) == chat.prompt_ids(row.messages[:-1]) == again.prompt_ids(row.messages[:-1])
        assert a.input_ids.tolist()[:len(asked)] == list(asked)
    user = plain.apply_chat_template([{"role": "user", "content": "\ue002\ue003 the cat"}], tokenize=False,
                                     add_generation_prompt=True)
    assert user.endswith("One: \ue002\ue003 the cat\nBot:")  # "user" is the first of the file's users


def test_roles(file, tmp_path, spm_unigram):
    """Guards against speakers that become one, and against a role that nobody named."""
    chat = load_chat(spm_unigram, file())
    assert chat.role_map["human_2"] == ("user", "Two") and chat.role_map["gpt"] == ("assistant", "Bot")
    rows = read(chat, tmp_path / "rows.jsonl", [[{"role": "human_2", "content": "a"}, {"role": "gpt", "content": "b"}]])
    assert rows[0].messages == [{"role": "user", "content": "a", "speaker": "Two"},
                                {"role": "assistant", "content": "b", "speaker": "Bot", "train": True}]
    assert chat.rendered(rows[0])[0] == "be good\nTwo: a\nBot:b\n°"
    pair = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "response": "b"}])
    assert chat.rendered(next(iter(RowReader(pair, role_map=chat.role_map))))[0] == "be good\nOne: a\nBot:b\n°"
    with pytest.raises(UserError, match="unknown role 'human_3'"):
        read(chat, tmp_path / "rows.jsonl", [[{"role": "human_3", "content": "a"}, {"role": "gpt", "content": "b"}]])
    assert facts("{{ messages }}") == {"roles": {}, "signs": {}}


@pytest.mark.parametrize("change, finding", [
    ({"template": ""}, "jinja2_chat_template: it is missing"),
    ({"template": TEMPLATE.replace("b_include_to_loss_token", "other")}, "does not use b_include_to_loss_token"),
    ({"data": None}, "special_tokens: it is no mapping"),
    ({"data": {"assistant_role": "Bot", "special_tokens": {"b_include_to_loss_token": "^"}}},
     "special_tokens.e_include_to_loss_token: it is missing"),
    ({"data": {k: v for k, v in DATA.items() if k != "assistant_role"}, "roles": {"a": "b"}},
     "assistant_role: it is missing"),
    ({"data": DATA | {"when": date(2024, 1, 2)}}, "chat_template_data.when"),
    ({"roles": {"a": 1}}, "role_mapping: it is no mapping of names to names"),
    ({"jinja_chat_template": "x"}, "Did you mean jinja2_chat_template?"),
    ({"template": TEMPLATE + "{% for %}"}, "not a Jinja template"),
    ({"template": TEMPLATE + "{{ ''.__class__.__mro__ }}"}, "unsafe"),
    ({"template": TEMPLATE.replace("{{ chat_template_data.special_tokens.e_assistant_token}}\n", "")},
     "does not end in a control token"),
    ({"template": EVERYBODY}, "it marks a user's text as trained"),
    ({"roles": {"human": "One", "gpt": "Boot"}}, 'role_mapping calls gpt "Boot"'),
], ids=lambda value: value if isinstance(value, str) else "")
def test_refused_files(file, spm_unigram, change, finding):
    """Guards against a file that trains nothing, never ends, or runs what it should not."""
    with pytest.raises(UserError, match=re.escape(finding)):
        load_chat(spm_unigram, file(**change))


def test_all_findings_of_a_file_at_once(file, spm_unigram):
    """Guards against mending a file one error at a time."""
    with pytest.raises(UserError) as caught:
        load_chat(spm_unigram, file(template="", data={"special_tokens": {}}, roles={"a": 2}))
    assert len(str(caught.value).splitlines()) == 6


# ---- the whole way

@pytest.fixture
def start(tmp_path: Path, tiny_model: str, spm_unigram: str) -> Callable:
    shutil.copytree(tiny_model, tmp_path / "model")
    write_rows(tmp_path / "talks.jsonl", [{"id": i, "messages": talk} for i, talk in enumerate(conversations(30, 7))])

    def run(template: str, *words: object):
        return run_script("03_sft", "--model_path", tmp_path / "model", "--tokenizer_path", spm_unigram,
                          "--dataset_paths", tmp_path / "talks.jsonl", "--prompt_template", template, "--output_dir",
                          tmp_path / "run", "--cache_dir", tmp_path / "cache", "--max_seq_length", "128", "--report_to",
                          "none", "--val_split_ratio", "0.2", *words)
    return run


def test_train_and_evaluate(file, start, tmp_path):
    """Guards against a way that ends before the model answers: names of roles are known in evaluation as well."""
    settings = {"src_path": "a", "messages_key": "messages", "split_config": {"splitting": {"train": 70}}}
    template = file(settings=settings)
    ran = start(template, "--max_steps", "3", "--do_gen_test", "--max_new_tokens", "3").ok()
    for key, reason in (("src_path", "--dataset_paths"), ("split_config", "--val_split_ratio"),
                        ("messages_key", "detected")):
        assert re.search(rf"settings\.{key} is not used: .*{reason}", ran.out)
    assert "new tokens °" in ran.out and "«" in ran.out
    Path(template).unlink()  # the run stands for itself
    ran = run_script("06_eval_sft", "--model_path", tmp_path / "run", "--dataset_paths", tmp_path / "talks.jsonl",
                     "--max_eval_samples", "4", "--max_new_tokens", "3", "--baseline_path", "none").ok()
    assert "talks" in ran.out
    ran = run_script("06_eval_sft", "--model_path", tmp_path / "run", "--gen_only", "--prompt_template", file(),
                     "--dataset_paths", tmp_path / "talks.jsonl", "--max_new_tokens", "3").ok()
    assert "template.yaml, as saved with the model" in ran.out
    held = [json.loads(line) for line in (tmp_path / "run" / "val.jsonl").read_text().splitlines()]
    assert {m["speaker"] for row in held for m in row["messages"]} == {"One", "Two", "Bot"}
    run_script("06_eval_sft", "--model_path", tmp_path / "run", "--gen_only", "--max_new_tokens", "3").ok()


def test_dry_run_fills_the_cache_and_exports(file, start, tmp_path):
    """Guards against weights that a dry run needs, and an export that says something else than the tokens."""
    (tmp_path / "model" / "model.safetensors").unlink()
    ran = start(file(), "--dry_run", "--export_rendered", tmp_path / "out" / "rendered.jsonl").ok()
    lines = [json.loads(line) for line in (tmp_path / "out" / "rendered.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and not (tmp_path / "run").exists()
    for i, (line, talk) in enumerate(zip(lines, conversations(30, 7)), 1):
        assert line["place"] == f"{tmp_path / 'talks.jsonl'}:{i}" and line["id"] == str(i - 1)
        assert line["chat"] == re.sub("[$^]", "", as_described(talk))
        assert [line["chat"][a:b] for a, b in line["trained"]] == [m["content"] + "\n°" for m in talk[1::2]]
    (cached,) = (tmp_path / "cache").iterdir()
    assert f"cached as {cached.name}" in ran.out
    assert cached.name == f"talks-{read_json(cached / 'meta.json')['sha256'][:7]}"


def test_cache_is_found_by_name_and_never_stale(file, tmp_path, spm_unigram):
    """Guards against a stale cache, and one that no person can tell what made it."""
    rows = write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in conversations(20, 8)])
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(spm_unigram).read_bytes())
    template = file()

    def cached(**more: object) -> set[str]:
        chat = load_chat(str(copy), template)
        load_dataset(rows, chat, max_seq_length=128, cache_dir=tmp_path / "cache", role_map=chat.role_map, **more)
        return {path.name for path in (tmp_path / "cache").iterdir()}

    first = cached()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert cached() == first and written == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    (only,) = (tmp_path / "cache").iterdir()
    assert (only / "chat_template.jinja").read_text() == load_chat(str(copy), template).template
    meta = read_json(only / "meta.json")
    assert meta["settings"]["prompt_template"] == template and meta["key"]["max_seq_length"] == 128
    assert not [path for path in only.iterdir() if path.suffix in (".pkl", ".pickle", ".pt")]
    rows.write_text(rows.read_text().replace("cat", "bat", 1))
    second = cached()
    Path(template).write_text(Path(template).read_text().replace("be good", "be bad"))
    third = cached()
    train_spm(copy, "bpe")
    fourth = cached()
    fifth = cached(too_long="drop")
    assert [len(names) for names in (first, second, third, fourth, fifth)] == [1, 2, 3, 4, 5]


def test_one_bos(file, spm_unigram):
    """Guards against two, where a template file places it itself."""
    one = Row(1, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True}])
    ids = [load_chat(spm_unigram, file(template=text)).encode_rows([one])[0].input_ids.tolist()
           for text in (TEMPLATE, "{{ bos_token }}\n" + TEMPLATE)]
    assert ids[0] == ids[1] and ids[0].count(2) == 1


def test_other_rows_have_no_speaker(tmp_path):
    """Guards against a speaker that becomes a key of other rows."""
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(3))
    assert all("speaker" not in m for row in RowReader(rows) for m in row.messages)
