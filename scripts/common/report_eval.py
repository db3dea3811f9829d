"""The report of an evaluation: the numbers beside the base's with their intervals, and the answers, worst first."""
from __future__ import annotations

import html
import json
from pathlib import Path

from common.page import BLUE, GREY, INK, ORANGE, folded, html_table, legend_above, page, side_by_side, svg, text
from common.report_train import overfit_note, read_json, read_lines, training_curves

BYTES = 1_200_000  # of answers in a page, so that a phone opens it; all of them are in samples.jsonl
NAMES = {"exact_match": "exact match", "starts_right": "starts right", "rouge_l": "ROUGE-L", "chrf": "chrF",
         "stopped": "stopped by itself", "end_probability": "P(end of turn)", "loss": "loss, nats a token",
         "perplexity": "perplexity", "bits_per_byte": "bits per byte", "token_accuracy": "token accuracy",
         "mean_length": "length, tokens", "repetition": "repeated 4-grams"}
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "repetition")
NEITHER = ("mean_length",)
HIGHER_IS_BETTER = tuple(name for name in NAMES if name not in LOWER_IS_BETTER + NEITHER)
DRAWN = ("exact_match", "starts_right", "rouge_l", "chrf", "stopped", "end_probability", "token_accuracy",
         "bits_per_byte")
UNTRAINED = 0.05  # P(end) below it: the end was not learnt; trained models are above 0.5


def eval_report(found: dict, samples: list[dict], run_dir: Path | None = None) -> str:
    """The page of an evaluation, from the content of eval_results.json and samples.jsonl."""
    compared = f" compared with {text(found['baseline_model'])}" if found["baseline_model"] else ""
    rows = f"{found['total']['rows']:,} rows, {found['total']['tokens']:,} trained tokens"
    parts = [f"<p>{text(found['model'])}{compared}: {rows}. Small type: 95 % intervals (bootstrap over rows).</p>",
             _verdict(found["total"])]
    tables = []
    for name, entry in found["datasets"].items():
        counts = (f"{entry['rows']:,} rows, {entry['tokens']:,} trained tokens, {entry['short_references']:,} short "
                  "references")
        tables.append(f'<div><h2>{text(name)}</h2><p class="soft">{counts}</p>{_comparison(entry)}{_remarks(entry)}'
                      f"{_kinds(entry)}</div>")
    if len(found["datasets"]) > 1:
        tables.append(f"<div><h2>All rows together</h2>{_comparison(found['total'])}</div>")
    parts.append(f'<div class="tables">{"".join(tables)}</div>')
    drawn = side_by_side([*(bars(found["datasets"], metric) for metric in DRAWN), losses_of_rows(samples)])
    parts.append(f"<h2>In pictures</h2>{drawn}" if drawn else "")
    parts.append(_training(run_dir))
    cards, style = answers(samples, list(found["datasets"]))
    parts += [*cards, _settings(found)]
    return page(f"Evaluation of {Path(found['model']).name or found['model']}", parts, style)


# ---- numbers

def metrics_of(entry: dict) -> list[str]:
    """What was measured, in the order of NAMES; what this table does not know yet comes last."""
    further = [name for name in entry["intervals"] if name not in NAMES]
    return [name for name in [*NAMES, *further] if entry.get(name) is not None]


def label_of(metric: str) -> str:
    return NAMES.get(metric, text(metric.replace("_", " ")))


def _direction(metric: str, apart: dict | None) -> int:
    """1 for better, -1 for worse; 0 where the interval has zero in it, or no direction is better."""
    if apart is None or apart["low"] <= 0 <= apart["high"]:
        return 0
    up = 1 if apart["value"] > 0 else -1
    return up if metric in HIGHER_IS_BETTER else -up if metric in LOWER_IS_BETTER else 0


def _verdict(total: dict) -> str:
    """In which numbers the model is better and worse than its base, in words; whether its answers end."""
    said, warn = [], False
    if total.get("baseline"):
        kinds: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for metric in metrics_of(total):
            if metric not in NEITHER and metric != "perplexity":
                kinds[_direction(metric, total["difference"].get(metric))].append(label_of(metric).split(",")[0])
        said += [f"<b>{what}</b> {', '.join(kinds[key])}." for key, what in (
            (1, "Better than the base:"), (-1, "Worse:"), (0, "No clear difference:")) if kinds[key]]
        warn = bool(kinds[-1])
    sure = total.get("end_probability")
    if sure is not None and sure < UNTRAINED:
        warn = True
        said.append(f"<b>It does not know where to end:</b> the mean probability of the end of turn is {sure:.2g} "
                    "where answers end. Was the end token trained?")
    return f'<p class="note{" warn" if warn else ""}">{" ".join(said)}</p>' if said else ""


def _comparison(entry: dict) -> str:
    base = entry.get("baseline")
    rows = []
    for metric in metrics_of(entry):
        row = [label_of(metric)] + ([_number(base.get(metric), base["intervals"].get(metric))] if base else [])
        row.append(_number(entry[metric], entry["intervals"].get(metric)))
        if base:
            row.append(_difference(metric, entry["difference"].get(metric)))
        rows.append(row)
    return html_table(["", *(["base"] if base else []), "tuned", *(["difference"] if base else [])], rows)


def _number(value: float | None, interval: tuple | None, sign: str = "") -> str:
    if value is None:
        return "–"
    ends = f"<small>{_digits(interval[0], 3, sign)} … {_digits(interval[1], 3, sign)}</small>" if interval else ""
    return _digits(value, 4, sign) + ends


def _digits(value: float, digits: int, sign: str) -> str:
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < 1e7 else f"{value:{sign}.{digits}g}"


def _difference(metric: str, apart: dict | None) -> str:
    """A difference; coloured where it is clearly better or worse."""
    if apart is None:
        return "–"
    shown, better = _number(apart["value"], (apart["low"], apart["high"]), "+"), _direction(metric, apart)
    return f'<span class="{"good" if better > 0 else "bad"}">{shown}</span>' if better else shown


def _remarks(entry: dict) -> str:
    said = []
    if entry.get("majority"):
        said.append(f"Without a model, the best simple rule ({text(entry['majority']['rule'])}) reaches an exact match "
                    f"of {entry['majority']['exact_match']:.3f}.")
    asked = (entry.get("baseline") or {}).get("asked")
    if asked:
        said.append(f"The base was asked in the way that suits it best: answers {text(asked['answers'])}, loss "
                    f"{text(asked['loss'])}.")
    if entry.get("left_out_too_long"):
        said.append(f"{entry['left_out_too_long']:,} rows are longer than the model's context and have no loss.")
    if entry.get("without_rouge_l"):
        said.append(f"ROUGE-L reads Latin letters alone: {entry['without_rouge_l']:,} references have none, but chrF.")
    return f'<p class="soft">{" ".join(said)}</p>' if said else ""


def _kinds(entry: dict) -> str:
    """The tuned model's numbers for each kind of row."""
    kinds = entry.get("sources") or {}
    shown = [m for m in metrics_of(entry) if m not in ("perplexity", "loss")]
    rows = [[text(kind), f"{numbers['rows']:,}", *(_number(numbers.get(m), None) for m in shown)]
            for kind, numbers in kinds.items()]
    return folded(f"By kind of row ({len(rows)})",
                  html_table(["kind", "rows", *map(label_of, shown)], rows)) if rows else ""


def bars(datasets: dict[str, dict], metric: str) -> str:
    """Base beside tuned for every data set, with their intervals."""
    rows = [(name, e) for name, e in datasets.items() if e.get(metric) is not None][:20]
    if not rows:
        return ""

    def draw(axes: object) -> None:
        compared = any(e.get("baseline") for _, e in rows)
        sides = [("base", GREY, lambda e: e.get("baseline"))] if compared else []
        sides.append(("tuned", BLUE, lambda e: e))
        high = 0.8 / len(sides)
        for k, (label, colour, side) in enumerate(sides):
            kept = [(i + (k - (len(sides) - 1) / 2) * high, side(e)) for i, (_, e) in enumerate(rows)
                    if side(e) and side(e).get(metric) is not None]
            values = [e[metric] for _, e in kept]
            ends = [e["intervals"].get(metric, (v, v)) for (_, e), v in zip(kept, values)]
            error = [[max(0.0, v - low) for v, (low, _) in zip(values, ends)],
                     [max(0.0, top - v) for v, (_, top) in zip(values, ends)]]
            axes.barh([at for at, _ in kept], values, high * 0.9, color=colour, label=label, xerr=error,
                      error_kw={"ecolor": INK, "linewidth": 1, "capsize": 2})
        axes.set_yticks(range(len(rows)), [name[:24] for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0, right=1.02 if metric not in LOWER_IS_BETTER + NEITHER else None)
        if len(sides) > 1:
            legend_above(axes)
    title = NAMES[metric].capitalize() if NAMES[metric].islower() else NAMES[metric]
    return svg(draw, title, height=1.3 + 0.4 * len(rows))


def losses_of_rows(samples: list[dict]) -> str:
    """How the rows' losses are spread, of both models."""
    sides = {label: [mean for line in samples if (mean := _per_token(line, key)) is not None]
             for label, key in (("base", "baseline_nll"), ("tuned", "nll"))}
    sides = {label: values for label, values in sides.items() if values}
    if not sides.get("tuned"):
        return ""

    def draw(axes: object) -> None:
        top = max(max(values) for values in sides.values())
        for label, values in sides.items():
            colour = BLUE if label == "tuned" else GREY
            axes.hist(values, bins=40, range=(0, top or 1), histtype="stepfilled", alpha=0.5, color=colour, label=label)
        mean = sum(sides["tuned"]) / len(sides["tuned"])
        axes.axvline(mean, color=ORANGE, linestyle="--", linewidth=1, label=f"tuned, mean {mean:.3g}")
        axes.set_xlabel("nats a token")
        axes.set_ylabel("rows")
        axes.legend(frameon=False, fontsize=8)
    return svg(draw, "Loss of each row")


# ---- answers

def answers(samples: list[dict], names: list[str]) -> tuple[list[str], str]:
    """Cards of prompts with what was expected and said, worst first, with a choice of the data set: parts, and the CSS
    that makes the choice (no script). As many as BYTES allow, the same number of each data set while it has more."""
    chosen = worst_first(samples)
    if not chosen:
        return [], ""
    few = f", {len(chosen):,} of {len(samples):,}; all are in samples.jsonl" if len(chosen) < len(samples) else ""
    head = f"<h2>Answers, worst first{few}</h2>"
    places = {name: i for i, name in enumerate(names)}
    cards = "".join(card(line, f"in{places.get(line.get('dataset'), 'none')}") for line in chosen)
    if len(names) < 2:
        return [head, f'<div class="cards">{cards}</div>'], ""
    choices, style = ['<input class="choice" type="radio" name="set" id="all" checked><label for="all">all</label>'], ""
    for name, i in places.items():
        choices.append(f'<input class="choice" type="radio" name="set" id="set{i}">'
                       f'<label for="set{i}">{text(name, 60)}</label>')
        style += f"#set{i}:checked ~ .cards > :not(.in{i}) {{ display: none; }}\n"
    return [head, f'<section>{"".join(choices)}<div class="cards">{cards}</div></section>'], style


def worst_first(samples: list[dict]) -> list[dict]:
    """The worst samples of each data set in turn until their texts fill BYTES; then the worst of all first."""
    by_name: dict[object, list[dict]] = {}
    for line in sorted(samples, key=badness, reverse=True):
        by_name.setdefault(line.get("dataset"), []).append(line)
    chosen, room = [], BYTES
    for turn in range(max(map(len, by_name.values()), default=0)):
        for lines in by_name.values():
            if turn < len(lines):
                size = len(card(lines[turn], "").encode("utf-8", "replace"))
                if size <= room:
                    chosen.append(lines[turn])
                    room -= size
                elif size < BYTES // 8:  # a card of usual size no longer fits; one that is huge is left out
                    return sorted(chosen, key=badness, reverse=True)
    return sorted(chosen, key=badness, reverse=True)


def badness(line: dict) -> tuple:
    """Wrong before right, then endless, then by loss."""
    return line.get("exact_match") is False, not line.get("stopped"), _per_token(line, "nll") or -1.0


def _per_token(line: dict, key: str) -> float | None:
    tokens = line.get("baseline_tokens" if key.startswith("baseline") else "tokens")  # of each model's own tokenizer
    return line[key] / tokens if line.get(key) is not None and tokens else None


def card(line: dict, name: str) -> str:
    """One row: what was asked, expected, said by the base and by the tuned model, with their numbers."""
    turns = line.get("messages") or []
    alike = ("chrf", "rouge_l") if line.get("exact_match") is None else ()  # a short answer is right or wrong
    before = "".join(f"<small>{text(m.get('role'))}</small><pre>{text(m.get('content'))}</pre>" for m in turns[:-1])
    sides = [("expected", "reference", []), ("base", "baseline_prediction", _numbers(line, "baseline_nll", ())),
             ("tuned", "prediction", _numbers(line, "nll", (*alike, "end_probability")))]
    cells = "".join(f"<div><small>{' · '.join([label, *said])}</small><pre>{text(line[key])}</pre></div>"
                    for label, key, said in sides if line.get(key) is not None)
    return (f'<div class="sample {name}"><small>{" · ".join(m for m in _marks(line) if m)}</small>'
            + (folded(f"{len(turns) - 1} turns before", before) if before else "")
            + f'<pre><b>{text(line.get("prompt"))}</b></pre><div class="sides">{cells}</div></div>')


def _numbers(line: dict, nll: str, further: tuple[str, ...]) -> list[str]:
    mean = _per_token(line, nll)
    return ([f"{mean:.3f} nats a token"] if mean is not None else []) + [
        f"{label_of(name)} {line[name]:.2f}" for name in further if line.get(name) is not None]


def _marks(line: dict) -> list[str]:
    """What to say of an answer beside its texts."""
    place = f"{line['dataset']}:{line['line']}" if line.get("line") is not None else line.get("dataset")
    source = line.get("source")
    marks = [text(place), text(source if source != line.get("dataset") else "")]
    if line.get("exact_match") is not None:
        marks.append('<span class="good">exact</span>' if line["exact_match"] else
                     '<span class="bad">not the reference</span>')
    if line.get("prediction") is not None and not line.get("stopped"):
        marks.append('<span class="bad">did not stop</span>')
    return marks


# ---- how it came about

def _training(run_dir: Path | None) -> str:
    """The curves of the run, where the model is one of ours."""
    metrics = read_lines(run_dir / "metrics.jsonl") if run_dir else []
    curves = training_curves(metrics, read_json(run_dir / "plan.json")) if metrics else ""
    return f"<h2>How it was trained</h2>{overfit_note(metrics)}{curves}" if curves else ""


def _settings(found: dict) -> str:
    kept = {key: found[key] for key in ("settings", "stops", "rows_read", "seconds") if key in found}
    whole = html.escape(json.dumps(kept, indent=1, ensure_ascii=False, default=str))
    return folded("Settings of the evaluation", f'<pre class="settings">{whole}</pre>') if kept else ""
