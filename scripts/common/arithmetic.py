"""The plan's arithmetic as text: what --dry_run prints of mixture, stages and steps."""
from __future__ import annotations


def describe(summary: dict) -> str:
    """The arithmetic of a plan in lines with units.

    dolly15k  8 examples  58 tokens (29 trained)  4 drawn  0.50 x  share of examples 0.4000 (asked 0.4000)
    rows 20,129 of 1,024 tokens, 99.9 % full; 16 rows per step = 16,384 tokens; 1,258 steps
    """
    unit = summary["weight_unit"]
    one_stage = len(summary["stages"]) == 1
    lines = [[s["name"], f"{s['examples']:,} examples",
              f"{_short(s['tokens'])} tokens ({_short(s['trained_tokens'])} trained)", *_drawn_text(s, unit, one_stage)]
             for s in summary["sources"]]
    text = _aligned(lines)
    for stage in () if one_stage else summary["stages"]:
        text.append(f"stage {stage['name']}: steps {stage['first_step'] + 1:,} to {stage['end_step']:,}, "
                    f"{stage['epochs']:.2f} epochs, {stage['rows']:,} rows, {_short(stage['tokens'])} tokens")
        text += ["  " + line for line in _aligned([[s["name"], *_drawn_text(s, unit, True)] for s in stage["sources"]])]
    text.append(f"drawn {summary['draws']:,} examples, {_short(summary['tokens'])} tokens "
                f"({_short(summary['trained_tokens'])} trained)")
    length, n = summary["max_seq_length"], summary["rows_per_step"]
    if summary["packing"]:
        text.append(f"rows {summary['rows']:,} of {length:,} tokens, {100 * summary['fill']:.1f} % full; "
                    f"{n:,} rows per step = {n * length:,} tokens; {summary['steps']:,} steps")
    else:
        text.append(f"rows {summary['rows']:,} of one example, at most {length:,} tokens; {n:,} rows per step, "
                    f"{summary['tokens_per_step']:,.0f} tokens on average; {summary['steps']:,} steps")
    return "\n".join(text)


def _drawn_text(source: dict, unit: str, with_share: bool) -> list[str]:
    cells = [f"{source['draws']:,} drawn", f"{source['passes']:.2f} x"]
    if with_share:
        asked = source["share_asked"]
        cells.append(f"share of {unit.replace('_', ' ')} {source['share_' + unit]:.4f}"
                     + ("" if asked is None else f" (asked {asked:.4f})"))
    return cells


def _aligned(lines: list[list[str]]) -> list[str]:
    """Cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]).rstrip()
            for line in lines]


def _short(n: int) -> str:
    """1234 -> 1,234; 2900000 -> 2.9 M"""
    return f"{n:,}" if n < 10**6 else f"{n / 1e6:,.1f} M" if n < 10**9 else f"{n / 1e9:,.2f} G"
