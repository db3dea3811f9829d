"""The numbers of an evaluation as text for a terminal."""
from __future__ import annotations

from common.scores import METRICS


def cell(value: float | None, interval: tuple[float, float] | None = None, sign: str = "") -> str:
    """A number with its interval: 0.5 [0.4 0.6]."""
    if value is None:
        return "-"
    return f"{value:{sign}.4g}" + (f" [{interval[0]:{sign}.4g} {interval[1]:{sign}.4g}]" if interval else "")


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ["  ".join(f"{one:{width}}" for one, width in zip(row, widths)).rstrip() for row in rows]


def difference(apart: dict | None) -> str:
    """A difference with its interval."""
    return "" if apart is None else cell(apart["value"], (apart["low"], apart["high"]), "+")


def head(name: str, numbers: dict) -> str:
    """The line above a table."""
    return (f"{name}: {numbers['rows']:,} rows, {numbers['tokens']:,} trained tokens; in brackets 95 % intervals")


def remarks(numbers: dict) -> list[str]:
    """What has to be said of a table."""
    out = numbers["without_rouge_l"]
    return [f"left out of rouge l, which reads Latin letters alone: {out:,} references; chrf has them"] if out else []


def evaluation_table(found: dict) -> str:
    """The numbers of every data set of eval_results.json, base beside tuned."""
    lines = []
    for name, entry in found["datasets"].items():
        base, apart = entry["baseline"], entry["difference"]
        rows = [["", *(["base"] if base else []), "tuned", *(["difference"] if base else [])]]
        for metric in METRICS:
            if entry[metric] is None:
                continue
            cells = [cell(base[metric], base["intervals"].get(metric))] if base else []
            cells.append(cell(entry[metric], entry["intervals"].get(metric)))
            rows.append([metric.replace("_", " "), *cells, *([difference(apart.get(metric))] if base else [])])
        lines += ["", head(name, entry), *columns(rows), *remarks(entry)]
        if entry["majority"]:
            lines.append(f"without a model, the best rule ({entry['majority']['rule']}) has exact match "
                         f"{entry['majority']['exact_match']:.3f}")
        if base:
            lines.append("the base was asked in the way that suits it best: answers "
                         f"{base['asked']['answers']}, loss {base['asked']['loss']}")
    return "\n".join([*lines, ""])


def comparison_table(found: dict) -> str:
    """The numbers of every data set of compare.json: a column for each model, then its difference to the first.

    Of more than two models the differences alone have their intervals, for the width of a terminal.
    """
    names, lines = found["models"], []
    parts = found["datasets"] | ({"all rows": found["total"]} if len(found["datasets"]) > 1 else {})
    for part, entry in parts.items():
        numbers, apart = entry["numbers"], entry["differences"]
        rows = [["", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
        for metric in METRICS:
            if all(numbers[name][metric] is None for name in names):
                continue
            rows.append([metric.replace("_", " "),
                         *(cell(numbers[n][metric], numbers[n]["intervals"].get(metric) if len(names) == 2 else None)
                           for n in names),
                         *(difference(apart[n].get(metric)) for n in names[1:])])
        lines += ["", head(part, numbers[names[0]]), *columns(rows), *remarks(numbers[names[0]])]
        if not entry["same_tokens"]:
            lines.append("the tokenizers or templates cut these rows into different tokens: compare bits per byte, not "
                         "loss, perplexity or token accuracy")
    return "\n".join([*lines, ""])
