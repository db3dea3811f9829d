"""Reports: one HTML file that opens from disk, without a network, light or dark, on a phone or a wide screen.

Everything that comes from data is escaped by `text`; plots are SVG by matplotlib, placed in the page.
"""
from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from common.checkpoint import atomic_write
from common.overfit import divergence

SHOWN = 200  # samples in a page; all of them are in samples.jsonl
LONGEST = 2000  # characters of a text in a page
NAMES = {"exact_match": "exact match", "starts_right": "starts right", "stopped": "stopped by itself",
         "loss": "loss, nats a token", "perplexity": "perplexity", "bits_per_byte": "bits per byte",
         "token_accuracy": "token accuracy", "mean_length": "length, tokens", "repetition": "repeated 4-grams"}
HIGHER_IS_BETTER = {"exact_match": True, "starts_right": True, "stopped": True, "token_accuracy": True,
                    "loss": False, "perplexity": False, "bits_per_byte": False, "repetition": False}
BLUE, ORANGE, GREY = "#3b82c4", "#d9822b", "#888888"  # readable on white and on black
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a8f4f; --bad: #c8443c; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
small, .soft { opacity: .7; } td small { display: block; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { width: 100%; height: auto; max-width: 40rem; display: block; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.sample { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.sample pre, .said { white-space: pre-wrap; margin: .25rem 0; font: inherit; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .75rem; }
.sides > div { background: var(--soft); border-radius: .35rem; padding: .5rem; }
pre.settings { overflow-x: auto; font-size: .8rem; }
"""


def text(value: object) -> str:
    """Anything as harmless HTML text; long texts end in the number of characters left out."""
    shown = "" if value is None else str(value)
    more = f" … ({len(shown) - LONGEST:,} more characters)" if len(shown) > LONGEST else ""
    return html.escape(shown[:LONGEST] + more)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document; nothing in it may load anything."""
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n<h1>{text(title)}</h1>\n"
            + "\n".join(part for part in parts if part) + "\n</body></html>\n")


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return f'<div class="scroll"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


# ---- plots

def svg(draw: object, name: str, height: float = 2.8) -> str:
    """A figure as inline SVG; draw(axes) fills it. `name` keeps the ids of several figures in a page apart."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 10,
                "font.family": "sans-serif", "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
                "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True,
                       metadata={key: None for key in ("Date", "Creator", "Format", "Type")})
    drawn = out.getvalue()[out.getvalue().index("<svg"):]
    for side in ("width", "height"):  # the page decides
        drawn = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", drawn, count=1)
    safe = re.sub(r"\W", "", name)
    drawn = re.sub(r'\bid="', f'id="{safe}-', drawn)
    drawn = re.sub(r'(href="#|url\(#)', rf"\g<1>{safe}-", drawn)
    return f'<figure style="margin:0">{drawn}</figure>'


def curve(lines: list[dict], keys: dict[str, str], title: str, log: bool = False) -> str:
    """Values of metrics lines over steps; keys: name in the file -> label. Nothing if none of them is there."""
    series = {label: [(m["step"], m[key]) for m in lines if isinstance(m.get(key), (int, float))]
              for key, label in keys.items()}
    series = {label: points for label, points in series.items() if points}
    if not series:
        return ""

    def draw(axes: object) -> None:
        for i, (label, points) in enumerate(series.items()):
            axes.plot(*zip(*points), label=label, color=f"C{i}" if i > 1 else (BLUE, ORANGE)[i], linewidth=1.5,
                      marker="o" if len(points) < 40 else None, markersize=3)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10, loc="left")
        if log:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
    return svg(draw, title)


def training_curves(metrics: list[dict]) -> str:
    """Losses, learning rate, gradient norm and speed of a run."""
    held = sorted({key for m in metrics for key in m if key.startswith("eval_loss/")})
    losses = {"loss": "training", "eval_loss": "validation"}
    if len(held) > 1:
        losses |= {key: key.removeprefix("eval_loss/") for key in held[:8]}
    drawn = [curve(metrics, losses, "loss, nats a token"), curve(metrics, {"learning_rate": "rate"}, "learning rate"),
             curve(metrics, {"grad_norm": "norm"}, "gradient norm"),
             curve(metrics, {"tokens_per_second": "all", "trained_tokens_per_second": "trained"}, "tokens a second")]
    return '<div class="plots">' + "".join(drawn) + "</div>" if any(drawn) else ""


def bars(datasets: dict[str, dict], metric: str) -> str:
    """Base beside tuned for every data set, with their intervals."""
    rows = [(name, e) for name, e in datasets.items() if e.get(metric) is not None]
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
                      error_kw={"ecolor": ORANGE, "linewidth": 1.2})
        axes.set_yticks(range(len(rows)), [name[:30] for name, _ in rows])
        axes.invert_yaxis()
        axes.set_title(NAMES[metric], fontsize=10, loc="left")
        if len(sides) > 1:
            axes.legend(frameon=False, fontsize=8)
    return svg(draw, f"bars {metric}", height=1.0 + 0.5 * len(rows))


# ---- an evaluation

def eval_report(found: dict, samples: list[dict], run_dir: Path | None = None) -> str:
    """The page of an evaluation, from the content of eval_results.json and samples.jsonl."""
    compared = f" compared with {text(found['baseline_model'])}" if found["baseline_model"] else ""
    parts = [f"<p>{text(found['model'])}{compared}. Small type: 95 % intervals (bootstrap over rows).</p>"]
    for name, entry in found["datasets"].items():
        counts = (f"{entry['rows']:,} rows, {entry['tokens']:,} trained tokens, {entry['short_references']:,} short "
                  "references")
        parts += [f"<h2>{text(name)}</h2>", f'<p class="soft">{counts}</p>', _comparison(entry), _remarks(entry)]
    if len(found["datasets"]) > 1:
        parts += ["<h2>All rows together</h2>", _comparison(found["total"])]
    drawn = [bars(found["datasets"], metric) for metric in ("exact_match", "stopped", "bits_per_byte")]
    parts.append('<h2>By data set</h2><div class="plots">' + "".join(drawn) + "</div>" if any(drawn) else "")
    curves = training_curves(read_lines(run_dir / "metrics.jsonl")) if run_dir else ""
    parts.append("<h2>Training</h2>" + curves if curves else "")
    parts += sample_cards(sorted(samples, key=_badness, reverse=True), "worst first")
    return page(f"Evaluation of {Path(found['model']).name or found['model']}", parts)


def _comparison(entry: dict) -> str:
    base = entry.get("baseline")
    rows = []
    for metric, label in NAMES.items():
        if entry.get(metric) is None:
            continue
        row = [label] + ([_number(base.get(metric), base["intervals"].get(metric))] if base else [])
        row.append(_number(entry[metric], entry["intervals"].get(metric)))
        if base:
            row.append(_difference(metric, entry["difference"].get(metric)))
        rows.append(row)
    return html_table(["", *(["base"] if base else []), "tuned", *(["difference"] if base else [])], rows)


def _number(value: float | None, interval: tuple | None, sign: str = "") -> str:
    if value is None:
        return "–"
    ends = f"<small>{interval[0]:{sign}.4g} … {interval[1]:{sign}.4g}</small>" if interval else ""
    return f"{value:{sign}.4g}{ends}"


def _difference(metric: str, d: dict | None) -> str:
    """A difference; coloured where its interval leaves zero out, and one direction is better."""
    if d is None:
        return "–"
    shown = _number(d["value"], (d["low"], d["high"]), "+")
    if metric not in HIGHER_IS_BETTER or d["low"] <= 0 <= d["high"]:
        return shown
    return f'<span class="{"good" if (d["value"] > 0) == HIGHER_IS_BETTER[metric] else "bad"}">{shown}</span>'


def _remarks(entry: dict) -> str:
    said = []
    if entry.get("majority"):
        said.append(f"Without a model, the best simple rule ({text(entry['majority']['rule'])}) reaches an exact match "
                    f"of {entry['majority']['exact_match']:.3f}.")
    asked = (entry.get("baseline") or {}).get("asked")
    if asked:
        said.append(f"The base was asked in the way that suits it better: answers {text(asked['answers'])}, loss "
                    f"{text(asked['loss'])}.")
    if entry.get("left_out_too_long"):
        said.append(f"{entry['left_out_too_long']:,} rows are longer than the model's context and have no loss.")
    return f'<p class="soft">{" ".join(said)}</p>' if said else ""


def _badness(line: dict) -> tuple:
    mean = line["nll"] / line["tokens"] if line.get("nll") is not None and line.get("tokens") else -1.0
    return line.get("exact_match") is False, not line.get("stopped"), mean


def sample_cards(lines: list[dict], order: str = "") -> list[str]:
    """Prompts with what was expected and said."""
    if not lines:
        return []
    few = f", {SHOWN} of {len(lines):,}; all are in samples.jsonl" if len(lines) > SHOWN else ""
    parts = ["<h2>Answers" + (f", {order}" if order else "") + f"{few}</h2>"]
    for line in lines[:SHOWN]:
        marks = _marks(line)
        sides = [("expected", line.get("reference")), ("base", line.get("baseline_prediction")),
                 ("answer", line.get("prediction"))]
        cells = "".join(f"<div><small>{label}</small><pre>{text(value)}</pre></div>" for label, value in sides
                        if value is not None)
        parts.append(f'<div class="sample"><small>{" · ".join(m for m in marks if m)}</small>'
                     f'<pre><b>{text(line.get("prompt"))}</b></pre><div class="sides">{cells}</div></div>')
    return parts


def _marks(line: dict) -> list[str]:
    """What to say of an answer beside its texts."""
    marks = [text(line.get("dataset") or line.get("source") or "")]
    if line.get("exact_match") is not None:
        marks.append('<span class="good">exact</span>' if line["exact_match"] else
                     '<span class="bad">not the reference</span>')
    if line.get("prediction") is not None and not line.get("stopped"):
        marks.append('<span class="bad">did not stop</span>')
    if line.get("nll") is not None and line.get("tokens"):
        marks.append(f"{line['nll'] / line['tokens']:.3f} nats a token")
    return marks


# ---- a training run

def training_report(run_dir: Path | str) -> None:
    """Write report.html of a run from what lies in its directory: metrics, plan, settings, samples."""
    place = Path(run_dir)
    plan, run = read_json(place / "plan.json"), read_json(place / "run.json")
    metrics = read_lines(place / "metrics.jsonl")
    parts = [_run_sentence(plan, run, metrics), training_curves(metrics), *_plan_parts(plan, metrics),
             *sample_cards(read_lines(place / "samples.jsonl"))]
    if run.get("config"):
        parts.append("<h2>Settings</h2><details><summary>all settings of the run</summary><pre class=\"settings\">"
                     f"{html.escape(json.dumps(run['config'], indent=1, ensure_ascii=False))}</pre></details>")
    atomic_write(place / "report.html", page(f"Training of {place.absolute().name}", parts))


def _run_sentence(plan: dict, run: dict, metrics: list[dict]) -> str:
    config = run.get("config", {})
    held = [(m["eval_loss"], m["step"]) for m in metrics if isinstance(m.get("eval_loss"), (int, float))]
    base = config.get("init_from") or config.get("model_path")
    said = [f"Base {text(base)}, {'LoRA' if config.get('use_lora') else 'all weights'}, template "
            f"{text(config.get('prompt_template'))}." if config else ""]
    if plan:
        said.append(f"{plan['steps']:,} steps planned, {plan['rows']:,} rows of up to {plan['max_seq_length']:,} "
                    f"tokens, {plan['fill']:.1%} full; {plan['tokens']:,} tokens, "
                    f"{plan['trained_tokens']:,} of them trained.")
    if held:
        said.append(f"Best validation loss {min(held)[0]:.4f} nats a token at step {min(held)[1]:,}, last "
                    f"{held[-1][0]:.4f}.")
    if note := divergence(metrics):
        said.append(f"{text(note[0].upper() + note[1:])}.")
    return f"<p>{' '.join(s for s in said if s)}</p>"


def share(value: float | None) -> str:
    """A part of 1; a dash where none was asked for."""
    return "–" if value is None else f"{value:.4f}"


def _stage_rows(stage: dict, metrics: list[dict]) -> list[list[str]]:
    """A line for each data set of a stage; the first one says what is the stage's own."""
    losses = [m["loss"] for m in metrics if m.get("stage") == stage["name"] and "loss" in m]
    own = [text(stage["name"]), f"{stage['first_step'] + 1:,} to {stage['end_step']:,}", f"{stage['epochs']:.2f}"]
    fell = f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "–"
    return [[*(own if i == 0 else [""] * 3), text(s["name"]), f"{s['draws']:,}", f"{s['passes']:.2f}",
             share(s["share_asked"]), share(s["share_examples"]), share(s["share_tokens"]), fell if i == 0 else ""]
            for i, s in enumerate(stage["sources"])]


def _plan_parts(plan: dict, metrics: list[dict]) -> list[str]:
    """Data sets with shares asked and obtained, in all and by stage; what was dropped and why."""
    if not plan:
        return []
    rows = [[text(s["name"]), f"{s['examples']:,}", f"{s['draws']:,}", f"{s['passes']:.2f}", share(s["share_asked"]),
             share(s["share_examples"]), share(s["share_tokens"]), share(s["share_trained_tokens"])]
            for s in plan["sources"]]
    head = ["data set", "examples", "drawn", "passes", "share asked", "of examples", "of tokens", "of trained tokens"]
    parts = ["<h2>What was drawn</h2>", html_table(head, rows)]
    if len(plan.get("stages", ())) > 1:
        parts += ["<h2>Stages</h2>", html_table(
            ["stage", "steps", "epochs", "data set", "drawn", "passes", "share asked", "of examples", "of tokens",
             "training loss, first to last"], [row for stage in plan["stages"] for row in _stage_rows(stage, metrics)])]
    dropped = [[text(name), text(reason), f"{n:,}"] for name, meta in plan.get("data", {}).items()
               for reason, n in meta.get("dropped", {}).items() if n]
    if dropped:
        parts += ["<h2>What was dropped</h2>", html_table(["data set", "reason", "rows"], dropped)]
    return parts


def read_json(path: Path) -> dict:
    """A JSON object, empty if the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_lines(path: Path) -> list[dict]:
    """JSON lines; a torn last line (a kill while it was written) is left out, a missing file has none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]
