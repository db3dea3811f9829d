"""Proof on real rows that tokenizer and template give the same ids in training and wherever the model is used."""
from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from common.chat import Chat
from common.faults import UserError
from common.render import as_of_today, as_written
from common.rows import Row, RowReader
from common.spm import prove_equal

if TYPE_CHECKING:
    from common.material import Material
    from common.settings import SftConfig


def prove_chat(config: SftConfig, chat: Chat, material: Material, base: object) -> list[str]:
    """Prove tokenizer and template on the first rows of each file; a line for what was found."""
    rows = []
    for dataset in material.datasets:
        reader = RowReader(dataset.path, skip_bad_rows=config.skip_bad_rows, role_map=config.roles() | chat.role_map)
        used = set(dataset.lines[:20_000].tolist())  # enough for 200 rows, also of many windows each
        rows += islice((row for row in reader if row.line in used), 200)
    found, lines = prove(chat, rows), _not_shown(chat, rows, config.prompt_template)
    texts = texts_of(rows)[:200]
    served, differ = differs_as_served(chat, base, texts)
    if differ:
        chat.loads_with = "PreTrainedTokenizerFast"
        lines.append(f"tokenizer: transformers' AutoTokenizer makes {served} of it, because the model is a "
                     f"{base.model_type}: other ids for {differ:,} of {len(texts):,} texts. Load the finished model's "
                     "with PreTrainedTokenizerFast.from_pretrained")
    if chat.native:
        if found["unsafe"]:
            lines.append(f"tokenizer: {found['unsafe']:,} texts cannot be encoded by the converted tokenizer without "
                         "control ids; training uses SentencePiece itself")
        ties = f" ({found['ties']} ties of equal score)" if found["ties"] else ""
        lines.append(f"tokenizer: the converted one agrees with SentencePiece on {found['texts']:,} texts of the first "
                     f"rows{ties}")
    if found["changed"]:
        lines.append(f"tokenizer: {found['changed'] / found['texts']:.1%} of {found['texts']:,} texts do not come "
                     "back from decoding as they were (its normaliser changes case, newlines or spaces)")
    if found["template_rows"]:
        same = found["template_rows"] - found["template_differs"]
        # known and counted: joints that were encoded apart, and what SentencePiece and its twin may differ in
        known = found["apart"] + found.get("ties", 0) + found.get("unsafe", 0)
        if found["template_differs"] > known:
            raise UserError(f"--prompt_template {config.prompt_template}: the saved chat template gives other ids than "
                            f"training for {found['template_differs']:,} of {found['template_rows']:,} rows, so the "
                            "model would be served with prompts it has not seen. Please report it with the template; "
                            "chatml, instruct and chat are proven.")
        differ = known and same < found["template_rows"]
        apart = "; the others differ where answers were encoded apart (see above)" if differ else ""
        lines.append(f"template: the saved chat template gives the training ids for {same:,} of "
                     f"{found['template_rows']:,} rows{apart}")
    return lines


def _not_shown(chat: Chat, rows: list[Row], template: str) -> list[str]:
    """What rows bring and the template leaves out."""
    lines = []
    unseen = sum(bool(row.tools) for row in rows) if "tools" not in chat.template else 0
    if unseen:
        lines.append(f"template: {unseen:,} of the first {len(rows):,} rows bring tools, which {template} does not "
                     "show: the model learns calls of what it is not told. Give a template that does")
    thoughts = [row for row in rows if any("reasoning_content" in m for m in row.messages or [])]
    if thoughts and not any(chat.rendered(row) != chat.rendered(_unthought(row)) for row in thoughts[:20]):
        lines.append(f"template: {len(thoughts):,} of the first {len(rows):,} rows bring reasoning_content, which "
                     f"{template} does not show: it is not learnt. Give a template that does")
    return lines


def _unthought(row: Row) -> Row:
    return replace(row, messages=[{k: v for k, v in m.items() if k != "reasoning_content"} for m in row.messages])


def prove(chat: Chat, rows: list[Row]) -> dict[str, int]:
    """Check on real rows that SentencePiece and the converted tokenizer agree, and that the saved template gives the
    ids used here. Rows with control strings in their text are left out of the second. Raises UserError.

    Returns counts: texts, changed (do not come back from decoding as they were), template_rows, template_differs, apart
    (answers of these rows that were encoded apart from their prompt); with SentencePiece also ties and unsafe, see
    prove_equal.
    """
    texts = texts_of(rows)
    if chat.native:
        found = prove_equal(chat.native, chat.tokenizer, texts)
    else:
        back = map(chat.tokenizer.decode, chat.encode_texts(texts))
        found = {"texts": len(texts), "changed": sum(a != b for a, b in zip(texts, back))}
    chat.tokenizer.chat_template = chat.template
    hostile = lambda row: chat.control_pattern.search(json.dumps([row.messages, row.tools], ensure_ascii=False))
    compared = [row for row in rows if row.messages is not None and not hostile(row)]
    differ, apart, saved = 0, chat.encoded_apart, as_of_today(chat.template)
    for row, encoded in zip(compared, chat.encode_rows(compared)):
        turns = as_written(row.messages)
        served = chat.tokenizer.apply_chat_template(turns, tools=row.tools, chat_template=saved,
                                                    tokenize=True)["input_ids"]
        differ += list(served) != encoded.input_ids.tolist()
    return found | {"template_rows": len(compared), "template_differs": differ, "apart": chat.encoded_apart - apart}


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
