"""Proof on real rows that tokenizer and template give the same ids in training and wherever the model is used."""
from __future__ import annotations

import json
from tempfile import TemporaryDirectory

from common.chat import Chat
from common.render import as_written
from common.rows import Row
from common.spm import prove_equal


def prove(chat: Chat, rows: list[Row]) -> dict[str, int]:
    """Check on real rows that SentencePiece and the converted tokenizer agree, and that the saved template gives the
    ids used here. Rows with control strings in their text are left out of the second. Raises UserError.

    Returns counts: texts, changed (do not come back from decoding as they were), template_rows, template_differs;
    with SentencePiece also ties and unsafe, see prove_equal.
    """
    texts = texts_of(rows)
    if chat.native:
        found = prove_equal(chat.native, chat.tokenizer, texts)
    else:
        back = map(chat.tokenizer.decode, chat.encode_texts(texts))
        found = {"texts": len(texts), "changed": sum(a != b for a, b in zip(texts, back))}
    found["template_rows"] = found["template_differs"] = 0
    chat.tokenizer.chat_template = chat.template
    for row, encoded in zip(rows, chat.encode_rows(rows)):
        hostile = chat.control_pattern.search(json.dumps([row.messages, row.tools], ensure_ascii=False))
        if row.messages is None or hostile:
            continue
        turns = as_written(row.messages)
        served = chat.tokenizer.apply_chat_template(turns, tools=row.tools, tokenize=True)["input_ids"]
        found["template_rows"] += 1
        found["template_differs"] += list(served) != encoded.input_ids.tolist()
    return found


def differs_as_served(chat: Chat, config: object, texts: list[str]) -> tuple[str, int]:
    """The class that transformers' AutoTokenizer makes of the saved tokenizer beside a model with this configuration,
    and how many of the texts it gives other ids: for a qwen2 it builds a pre-tokenizer of its own, whatever is saved.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as place:
        chat.save(place)
        config.save_pretrained(place)
        try:
            served = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except Exception as fault:  # each class has its own ways to refuse a tokenizer that is not its own
            return f"nothing ({type(fault).__name__})", len(texts)
    given, used = (tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
                   for tokenizer in (served, chat.tokenizer))
    return type(served).__name__, sum(a != b for a, b in zip(given, used))


def texts_of(rows: list[Row]) -> list[str]:
    """The texts of the rows: contents of messages, and plain texts."""
    return [m["content"] for row in rows for m in row.messages or [] if m["content"]] + [
        row.text for row in rows if row.messages is None]
