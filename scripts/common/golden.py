"""Golden prompts: what a model has to say, and not to say, as a check that a build server can run.

    {"prompt": "How many? cup key", "must_contain": "two", "must_not_contain": ["three", "four"], "must_stop": true}
    {"messages": [{"role": "user", "content": "Who are you?"}], "regex": "^I am", "max_tokens": 40}

Texts are compared after NFC, case kept; `regex` is searched (Python's re). `must_stop`: the answer ends by itself.
`max_tokens`: it does so after at most so many tokens.
"""
from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from common.config import nearest
from common.evaluate import Case
from common.faults import UserError
from common.generate import Generated
from common.questions import QuestionReader, Roles, question
from common.records import Bad, kind_of

CHECKS = ("must_contain", "must_not_contain", "regex", "must_stop", "max_tokens")
KEYS = ("prompt", "messages", "system", "tools", "id", "source", *CHECKS)


@dataclass(frozen=True)
class Golden:
    """A question and what its answer must be like."""

    case: Case
    must_contain: list[str]
    must_not_contain: list[str]
    regex: list[str]
    must_stop: bool
    max_tokens: int | None

    def longest(self, usual: int) -> int:
        """Tokens to generate: one more than allowed, so that an answer that is too long is seen."""
        return usual if self.max_tokens is None else self.max_tokens + 1


def read_golden(path: str, roles: Roles) -> list[Golden]:
    """Read a file of golden prompts. Raises UserError with file and line of every row that is wrong."""
    checks: list[dict] = []
    reader = QuestionReader(path, roles, look=lambda record: checks.append(_checks(record)))
    try:
        return [Golden(question(row, "golden"), **checks[-1]) for row in reader]
    except UserError as fault:  # a check that is not made must not pass
        raise UserError(str(fault).replace(", or go on without them with --skip_bad_rows", "")) from None


def _checks(record: dict) -> dict:
    """The checks of a row; raises Bad."""
    for key in record:
        if key not in KEYS:
            near = nearest(key, KEYS)
            raise Bad(f'"{key}" is unknown. ' + (f"Did you mean {near}?" if near else f"Keys: {', '.join(KEYS)}."))
    if record.get("prompt") is None and record.get("messages") is None:
        raise Bad("neither prompt nor messages. Give what the model is asked.")
    texts = {key: _texts(key, record.get(key)) for key in CHECKS[:3]}
    for pattern in texts["regex"]:
        try:
            re.compile(pattern)
        except re.error as fault:
            raise Bad(f'"regex" {pattern!r} is no regular expression: {fault}. Mend it.') from None
    stop, most = record.get("must_stop"), record.get("max_tokens")
    if stop is not None and type(stop) is not bool:
        raise Bad(f'"must_stop" is {kind_of(stop)}. It has to be true or false.')
    if most is not None and (type(most) is not int or most < 1):
        raise Bad(f'"max_tokens" is {most if type(most) is int else kind_of(most)}. It has to be a number from 1.')
    if not any(texts.values()) and not stop and most is None:
        raise Bad(f"nothing to check. Give one of {', '.join(CHECKS)}.")
    return {**texts, "must_stop": bool(stop), "max_tokens": most}


def _texts(key: str, value: object) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str) or not one:
            raise Bad(f'"{key}" holds {"an empty text" if one == "" else kind_of(one)}. It has to be a text or a list '
                      "of texts.")
    return values


def findings(golden: Golden, text: str, answer: Generated) -> list[str]:
    """What is wrong with an answer; empty if nothing is."""
    said, found = unicodedata.normalize("NFC", text), []
    holds = lambda part: unicodedata.normalize("NFC", part) in said
    found += [f"lacks {part!r}" for part in golden.must_contain if not holds(part)]
    found += [f"contains {part!r}" for part in golden.must_not_contain if holds(part)]
    found += [f"does not match {pattern!r}" for pattern in golden.regex if not re.search(pattern, said)]
    too_long = golden.max_tokens is not None and not answer.stopped
    if too_long:
        found.append(f"is longer than {golden.max_tokens:,} tokens")
    if golden.must_stop and not answer.stopped and not too_long:
        found.append(f"did not stop within {len(answer.ids):,} tokens" + (", the context is full" * answer.cut))
    return found
