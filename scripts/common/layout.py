"""A row before it is encoded: stretches that many rows share, and runs of text that differ.

    <|im_start|>  "user\\nHi"  <|im_end|> "\\n" <|im_start|>  "assistant\\n" + "Hello"  <|im_end|> "\\n"
    Fixed         a run        Fixed                          a run of two parts        Fixed

Where the pieces of a template are cut, and the ids of what is fixed, are worked out once for each structure of a
conversation, turns that are trained, and contents that are empty.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from common.render import Piece, Structure

MOST_PLANS = 64  # of a structure: rows that choose among many answers which are trained are rarely alike

Control = tuple[int, bool]  # (id, trained)
Run = list[tuple[str, bool, bool]]  # the texts between two controls: (text, trained, part of an answer), alternating


@dataclass(slots=True)
class Fixed:
    """Control tokens, and texts between them in which there is nothing of a message."""

    items: list[Control | Run]
    ids: bytes  # int32 each
    trained: bytes  # a byte each


@dataclass(slots=True)
class _Gap:
    """A run to be: its parts are (a text, or texts and indices of messages, trained, part of an answer)."""

    parts: list[tuple[str | list[str | int], bool, bool]]
    strips_left: bool = False  # the control token before it swallows white space
    strips_right: bool = False

    def fill(self, contents: list[str]) -> Run:
        run = [part if type(part[0]) is str else
               ("".join([contents[x] if type(x) is int else x for x in part[0]]), part[1], part[2])
               for part in self.parts]
        if self.strips_left:
            run = _without_space(run, 0, str.lstrip)
        return _without_space(run, -1, str.rstrip) if self.strips_right else run


Layout = list[Fixed | Run]
Plan = list[Fixed | _Gap]


class Layouts:
    """Pieces of a template and contents of messages -> layouts."""

    def __init__(self, encode: Callable[[list[str]], list[bytes]], eats_left: set[int], eats_right: set[int],
                 train_on_prompt: bool):
        """encode: texts -> int32 ids of each. eats_left, eats_right: control tokens that swallow white space there."""
        self._eats_left, self._eats_right, self._train_on_prompt = eats_left, eats_right, train_on_prompt
        self._ids = lru_cache(1000)(lambda text: encode([text])[0])
        self._controls = lru_cache(1000)(lambda *controls: self.fixed([*controls]))

    def of(self, structure: Structure, contents: list[str], trained: frozenset[int]) -> Layout:
        """Put the contents in. trained: the turns whose answers are."""
        key = trained if all(contents) else (trained, *map(bool, contents))
        plan = structure.plans.get(key)
        if plan is None:
            shared = structure.common and len(structure.plans) < MOST_PLANS
            plan = self._plan(structure.pieces, contents, trained, shared)
            if shared:
                structure.plans[key] = plan
        layout = [item if type(item) is Fixed else item.fill(contents) for item in plan]
        return [item for item in layout if item] if self._eats_left or self._eats_right else layout

    def fixed(self, items: list[Control | Run]) -> Fixed:
        """Runs among the items are of one part each."""
        ids = [np.int32(item[0]).tobytes() if type(item) is tuple else self._ids(item[0][0]) for item in items]
        learnt = [item[1] if type(item) is tuple else item[0][1] for item in items]
        trained = b"".join([(b"\1" if x else b"\0") * (len(own) // 4) for x, own in zip(learnt, ids)])
        return Fixed(items, b"".join(ids), trained)

    def _plan(self, pieces: list[Piece], contents: list[str], trained: frozenset[int], shared: bool) -> Plan:
        """shared: worth encoding what is fixed; otherwise its texts are encoded with those of the other rows."""
        items: list[Control | list] = []  # cut at answers, trained or not: what is trained must not change the ids
        run: list[tuple[list[str | int], bool, bool]] = []
        for piece in pieces:
            learnt = self._train_on_prompt or piece.turn in trained
            if piece.control is not None:
                items += [run, (piece.control, learnt)] if run else [(piece.control, learnt)]
                run = []
                continue
            text = piece.text if piece.message is None else piece.message if contents[piece.message] else ""
            answers = piece.turn is not None
            if run and run[-1][2] == answers:
                run[-1] = [*run[-1][0], text], learnt, answers
            elif text != "":
                run.append(([text], learnt, answers))
        return self._merged([*items, run] if run else items, shared)

    def _merged(self, items: list[Control | list], shared: bool) -> Plan:
        """Neighbours become one where nothing of a message is in them, nor the boundary of an answer."""
        plan: Plan = []
        same: list[Control | Run] = []
        for before, item, after in zip([None, *items], items, [*items[1:], None]):
            if type(item) is list:
                parts = [(_joined(texts), learnt, answers) for texts, learnt, answers in item]
                gap = _Gap(parts, type(before) is tuple and before[0] in self._eats_right,
                           type(after) is tuple and after[0] in self._eats_left)
                if not shared or len(parts) > 1 or type(parts[0][0]) is list:
                    if same:
                        plan.append(self.fixed(same) if shared else self._controls(*same))
                        same = []
                    plan.append(gap)
                    continue
                item = gap.fill([])
            if item:
                same.append(item)
        return [*plan, self.fixed(same)] if same else plan


def _joined(texts: list[str | int]) -> str | list[str | int]:
    """One text, if no message is among them."""
    return texts if any(type(x) is int for x in texts) else "".join(texts)


def boundary_texts(run: Run, space_joins: bool) -> list[str]:
    """The whole run, and what of it precedes each beginning or end of an answer.

    [("Assistant: ", False, False), ("Hi", True, True)] -> ["Assistant: Hi", "Assistant:"]   (the space joins "Hi")
    """
    if len(run) == 1:
        return [run[0][0]]
    texts, text = [], ""
    for i, (part, _, answers) in enumerate(run):
        if i:
            texts.append(text.rstrip(" ") if answers and space_joins else text)
        text += part
    return [text, *texts]


def cut_at(ids: bytes, before: list[bytes]) -> list[bytes] | None:
    """The ids of the parts of a run, or None if those of what precedes each of them do not begin those of the whole."""
    parts, start = [], 0
    for own in before:
        if not ids.startswith(own):
            return None
        parts.append(ids[start:len(own)])
        start = len(own)
    return [*parts, ids[start:]]


def _without_space(run: Run, end: int, strip: Callable[[str], str]) -> Run:
    """A run whose first (end 0) or last (end -1) white space is gone, also where that empties a part."""
    run = list(run)
    while run:
        text = strip(run[end][0])
        if text:
            run[end] = (text, *run[end][1:])
            break
        run.pop(end)
    return run
