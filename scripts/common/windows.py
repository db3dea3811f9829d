"""A long conversation -> windows that fit, cut at turn boundaries; every answer is trained in exactly one of them.

    S u1 a1 u2 a2 t a3, five messages fit  ->  S u1 a1 u2 a2  ·  S a2' t a3     S leading system turn, t tool output
                                                                                a2' is context here and not trained

A window begins with the leading system turn. A later one then repeats what came just before, at most a quarter of the
window, and where it would begin with tool output, the call that it answers.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    if chat is None or _length(messages, tools, chat) <= size:
        result.windows.append((messages, sum(map(_trained, messages))))
        return result
    lead = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    system, body = messages[:lead], messages[lead:]
    exchanges = _exchanges(body)

    def length(start: int, end: int) -> int:
        return _length(system + body[start:end], tools, chat)

    alone = [length(*exchange) for exchange in exchanges]
    # what every window has besides its turns: the leading system turn, BOS
    common = alone[0] + alone[1] - length(0, exchanges[1][1]) if len(exchanges) > 1 else 0
    i = 0
    while i < len(exchanges):
        first, end = exchanges[i]
        start = _begin(body, first, end, size, length)
        i += 1
        if start is None:
            fits = lead and _length(body[max(first, end - 2):end], tools, chat) <= size
            reason = "the leading system turn leaves no room" if fits else "a single turn too long"
            result.dropped[reason] += _trained(body[end - 1])
            continue
        total, after = length(start, end), i
        while after < len(exchanges) and total + alone[after] - common <= size:
            total += alone[after] - common
            after += 1
        while after > i and length(start, exchanges[after - 1][1]) > size:  # the sum was an estimate
            after -= 1
        i = after
        _close(result, system, body, start, max(start, first), exchanges[i - 1][1])
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


def _begin(body: list[dict], first: int, end: int, size: int, length: Callable[[int, int], int]) -> int | None:
    """Where a window begins whose first new exchange is body[first:end]: with context before it where that fits, with
    less of the turns before the answer where they are too long; None if the answer and the turn before do not fit."""
    total = length(first, end)
    start = first
    while total > size and start < end - 2:
        start += 1
        total = length(start, end)
    if total > size:
        return None
    if start > first:
        return start
    alone = total
    while start > 0:
        more = length(start - 1, end)
        needed = body[start]["role"] in ("tool", "system")  # output without the call that it answers
        if more > size or (more - alone > size // CONTEXT and not needed):
            break
        start -= 1
    return start


def _exchanges(body: list[dict]) -> list[tuple[int, int]]:
    """user assistant tool assistant -> (0, 2), (2, 4): each ends with an assistant message."""
    ends = [i + 1 for i, m in enumerate(body) if m["role"] == "assistant"]
    return list(zip([0, *ends], ends))


def _trained(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _length(messages: list[dict], tools: list | None, chat: Chat) -> int:
    return len(chat.encode_rows([Row(0, messages, tools=tools)])[0].input_ids)
