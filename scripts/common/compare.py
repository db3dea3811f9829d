"""Several models on the same rows: their numbers side by side, and the differences to the first with intervals."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from common.evaluate import Measured, prompts_of
from common.faults import UserError
from common.questions import EvalSet
from common.scores import Table, compare, joined, on_same_rows, summarise
from common.subject import Subject


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path where these differ, else as much of the end as tells them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def check_same_rows(subjects: list[Subject], paths: list[str]) -> None:
    """Without files of one's own, models are compared on validation rows that all of them held out."""
    if paths:
        return
    held = [s.run_dir / "val.jsonl" if s.run_dir else None for s in subjects]
    contents = {file.read_bytes() if file and file.exists() else None for file in held}
    if len(contents) > 1 or None in contents:
        raise UserError("--compare: the runs did not all hold out the same rows, so one may have been trained on what "
                        "another is tested with. Name files that none of them was trained on with --dataset_paths.")


def comparison(names: list[str], sets: list[EvalSet], measured: list[list[Measured]], seed: int) -> dict:
    """What compare.json holds of the numbers. measured[k][i]: model k on data set i.

    Each entry: "numbers" (model -> means and intervals), "differences" (model -> number -> value, low, high, to the
    first model, on the rows that both could read).
    """
    entries = {s.name: _entry(names, [m[i].table for m in measured], seed, prompts_of(s.cases))
               for i, s in enumerate(sets)}
    total = _entry(names, [joined(one.table for one in m) for m in measured], seed,
                   prompts_of(case for s in sets for case in s.cases))
    return {"models": names, "differences_to": names[0], "datasets": entries, "total": total}


def _entry(names: list[str], tables: list[Table], seed: int, prompts: np.ndarray) -> dict:
    numbers, differences = {}, {}
    for name, table in zip(names, tables):
        own, _, apart = compare(table, tables[0] if table is not tables[0] else None, seed, prompts)
        numbers[name] = summarise(table) | {"intervals": own}
        differences[name] = apart
    pairs = [on_same_rows(table, tables[0]) for table in tables[1:]]
    return {"numbers": numbers, "differences": {k: v for k, v in differences.items() if k != names[0]},
            "same_tokens": all((a["loss"][:, 1] == b["loss"][:, 1]).all() for a, b in pairs)}


def side_by_side(names: list[str], sets: list[EvalSet], measured: list[list[Measured]]) -> list[dict]:
    """A line for each row: prompt, reference, and what every model answered, with its loss in nats a token."""
    lines = []
    for i, s in enumerate(sets):
        for k, case in enumerate(s.cases):
            losses = [m[i].table["loss"][k] for m in measured]
            lines.append({"dataset": s.name, "line": case.row.line, "prompt": case.prompt, "reference": case.reference,
                          "predictions": {name: m[i].texts[k] for name, m in zip(names, measured)},
                          "loss": {name: float(nats / n) if n else None for name, (nats, n) in zip(names, losses)}})
    return lines
