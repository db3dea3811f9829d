"""A long conversation -> windows that fit, cut at turn boundaries; every answer is trained in exactly one of them.

    S u1 a1 u2 a2 t a3, five messages fit  ->  S u1 a1 u2 a2  ·  S a2' t a3     S leading system turn, t tool output
                                                                                a2' is context here and not trained

A window begins with the leading system turn. A later one then repeats what came just before: the call where it would
begin with tool output, and exchanges from a user turn on, at most a quarter of the window. What the template refuses (a
window that does not begin with a user turn, say) counts as what does not fit: an earlier user turn may help.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from common.faults import UserError
from common.rows import Row

if TYPE_CHECKING:
    from common.chat import Chat

CONTEXT = 4  # a new window repeats at most 1/4 of its tokens; the rest is for turns that were not trained yet


@dataclass
class Cut:
    """Windows of one conversation: messages, and how many answers each trains. dropped: answers without a place."""

    windows: list[tuple[list[dict], int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def cut(messages: list[dict], tools: list | None, chat: Chat | None, size: int | None) -> Cut:
    """Cut messages (as in Row) into windows of at most `size` tokens as `chat` renders them; without chat, into one.

    What follows the last trained answer is left out. An answer that does not fit with the turn before it is dropped.
    """
    last = max((i for i, m in enumerate(messages) if _trained(m)), default=-1)
    messages = messages[:last + 1]
    result = Cut()
    if not messages:
        return result
    if chat is None or (_length(messages, tools, chat) or size + 1) <= size:
        result.windows.append((messages, sum(map(_trained, messages))))
        return result
    lead = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, body = messages[:lead], messages[lead:]
    ends = [i + 1 for i, m in enumerate(body) if m["role"] == "assistant"]  # of exchanges: what leads to an answer

    @cache
    def length(start: int, end: int) -> int | None:
        return _length(system + body[start:end], tools, chat)

    i = first = 0
    while i < len(ends):
        start = _begin(body, first, ends[i], size, length)
        if start is None:
            turn = max(first, ends[i] - 2), ends[i]
            fits = lead and (_length(body[slice(*turn)], tools, chat) or size + 1) <= size
            reason = ("refused by the template or the tokenizer" if length(*turn) is None else
                      "the leading system turn leaves no room" if fits else "a single turn too long")
            result.dropped[reason] += _trained(body[ends[i] - 1])
        else:
            step = 1
            while step:  # as many exchanges as fit, found in ever larger and then ever smaller steps
                more = length(start, ends[i + step]) if i + step < len(ends) else None
                i, step = (i + step, 2 * step) if more is not None and more <= size else (i, step // 2)
            _close(result, system, body, start, max(start, first), ends[i])
        first, i = ends[i], i + 1
    return result


def _close(result: Cut, system: list[dict], body: list[dict], start: int, new: int, end: int) -> None:
    """Add the window body[start:end], in which what lies before `new` is context; without what follows its last
    answer, and not at all if it has none."""
    while end > new and not _trained(body[end - 1]):
        end -= 1
    answers = sum(map(_trained, body[new:end]))
    if answers:
        repeated = [{**m, "train": False} if m["role"] == "assistant" else m for m in body[start:new]]
        result.windows.append((system + repeated + body[new:end], answers))


def _begin(body: list[dict], first: int, end: int, size: int, length: Callable[[int, int], int | None]) -> int | None:
    """Where a window begins whose first new exchange is body[first:end]: with context before it where that fits, with
    less of the turns before the answer where they are too long; None if the answer and the turn before do not fit."""
    def fits(start: int) -> bool:
        return (length(start, end) or size + 1) <= size

    # a turn has at least one token
    users = [i for i in range(first - 1, max(end - size, 0) - 1, -1) if body[i]["role"] == "user"]
    if not fits(first):
        earlier = users if length(first, end) is None else []
        return next((i for i in (*earlier, *range(first + 1, end - 1)) if fits(i)), None)
    # output without the call that it answers says little
    start = first - 1 if first and body[first]["role"] in ("tool", "system") and fits(first - 1) else first
    for i in users:
        if not fits(i) or length(i, end) - length(first, end) > size // CONTEXT:
            break
        start = i
    return start


def _trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _length(messages: list[dict], tools: list | None, chat: Chat) -> int | None:
    """Tokens of a window, or None if the template or the tokenizer refuses it."""
    try:
        return len(chat.encode_rows([Row(0, messages, tools=tools)])[0].input_ids)
    except UserError:
        return None
