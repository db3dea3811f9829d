"""Long conversations are cut at turn boundaries, and every answer is trained in exactly one window."""
import random

import pytest

from common.chat import load_chat
from common.rows import Row
from common.windows import cut

ALTERNATE = (  # as in the templates of Llama 2 and Mistral
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}")
USER_FIRST = (
    "{{ bos_token }}{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% if turns[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")


@pytest.fixture(scope="module")
def chat(spm_unigram):
    return load_chat(spm_unigram, "chatml")


def talk(seed):
    """A conversation with a system turn, tool output as system turns, and every answer different."""
    draw = random.Random(seed)
    messages = [{"role": "system", "content": "Be kind."}] if seed % 3 else []
    for i in range(draw.randint(2, 14)):
        role = draw.choice(["user", "system", "assistant", "assistant", "tool"]) if i else "user"
        message = {"role": role, "content": f"{i} " + "word " * draw.choice([2, 5, 12, 40])}
        messages.append(message | ({"train": draw.random() < 0.9} if role == "assistant" else {}))
    return messages


@pytest.mark.parametrize("size", [64, 160, 400])
def test_every_answer_is_trained_in_exactly_one_window(chat, size):
    """Windows fit, begin with the leading system turn, are slices of the conversation in order, and lose nothing."""
    cuts = 0
    for seed in range(40):
        messages = talk(seed)
        lead = next(i for i, m in enumerate(messages) if m["role"] != "system")
        contents = [(m["role"], m["content"]) for m in messages]
        result = cut(messages, None, chat, size)
        trained = []
        for window, answers in result.windows:
            assert len(chat.encode_rows([Row(0, window)])[0].input_ids) <= size
            assert window[:lead] == messages[:lead] and window[-1].get("train")
            body = [(m["role"], m["content"]) for m in window[lead:]]
            start = contents.index(body[0])
            assert contents[start : start + len(body)] == body
            mine = [m["content"] for m in window if m.get("train")]
            assert len(mine) == answers > 0
            trained += mine
        wanted = [m["content"] for m in messages if m.get("train")]
        assert len(set(trained)) == len(trained) and [w for w in wanted if w in trained] == trained
        assert len(wanted) - len(trained) == sum(result.dropped.values())
        if size == 400:
            assert trained == wanted
        cuts += len(result.windows) > 1
    assert cuts > 4


def test_a_window_that_begins_in_the_middle(chat):
    """Tool output comes with the call it answers, and the call is context there; the worked example of the module."""
    messages = [
        {"role": role, "content": text * 4} | ({"train": True} if role == "assistant" else {})
        for role, text in [
            ("system", "S"),
            ("user", "one "),
            ("assistant", "two "),
            ("user", "three "),
            ("assistant", "four "),
            ("tool", "and "),
            ("assistant", "you "),
        ]
    ]
    size = len(chat.encode_rows([Row(0, messages[:5])])[0].input_ids)
    (first, _), (second, answers) = cut(messages, None, chat, size).windows
    assert first == messages[:5] and answers == 1
    assert second == [messages[0], {**messages[4], "train": False}, *messages[5:]]


def test_a_turn_too_long_is_dropped_and_the_rest_kept(chat):
    """Guards against a window over the limit, and against a conversation lost for one long answer."""
    long = {"role": "assistant", "content": "river " * 300, "train": True}
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "train": True}]
    result = cut([*short, {"role": "user", "content": "More"}, long, *short], None, chat, 60)
    assert [answers for _, answers in result.windows] == [1, 1] and result.dropped == {"a single turn too long": 1}
    lead = {"role": "system", "content": "river " * 300}
    assert cut([lead, *short], None, chat, 60).dropped == {"the leading system turn leaves no room": 1}
    outputs = [{"role": "system", "content": f"{i} " + "stone " * 15} for i in range(9)]
    ((window, _),) = cut([*outputs[:0], short[0], *outputs, short[1]], None, chat, 80).windows
    assert window[-2:] == [outputs[-1], short[1]] and short[0] not in window  # the output nearest to the answer stays


@pytest.mark.parametrize("template, roles", [(ALTERNATE, ("user", "assistant")), (ALTERNATE, ("assistant", "user")),
                                             (USER_FIRST, ("user", "assistant", "tool", "assistant"))])
def test_a_template_that_refuses_turns(tmp_path, spm_unigram, template, roles):
    """Guards against windows that begin with an answer or tool output where the template demands a user turn, and
    against the whole data set lost for one; what no window can hold is counted."""
    (tmp_path / "strict.jinja").write_text(template)
    strict = load_chat(spm_unigram, str(tmp_path / "strict.jinja"))
    refused = 0
    for seed in range(12):
        draw = random.Random(seed)
        messages = [{"role": role, "content": f"{i} " + "word " * draw.choice([2, 5, 12])} |
                    ({"train": True} if role == "assistant" else {}) for i, role in enumerate(roles * 6)]
        if seed % 3 == 0:
            messages.insert(draw.randrange(4, 8), {"role": "user", "content": "And?"})
        result = cut(messages, None, strict, 120)
        for window, _ in result.windows:
            assert len(strict.encode_rows([Row(0, window)])[0].input_ids) <= 120 and window[0]["role"] == "user"
        trained = [m["content"] for window, _ in result.windows for m in window if m.get("train")]
        wanted = [m["content"] for m in messages if m.get("train")]
        assert [w for w in wanted if w in trained] == trained and len(set(trained)) == len(trained)
        assert len(wanted) - len(trained) == sum(result.dropped.values())
        if template == ALTERNATE:
            assert len(trained) >= len(wanted) - 1 and len(result.windows) > 1
        refused += result.dropped["refused by the template or the tokenizer"]
    assert bool(refused) == (roles != ("user", "assistant"))
