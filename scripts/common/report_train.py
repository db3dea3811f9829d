"""The report of a training run: what it learnt from, how its losses went, whether it overfitted, what it says."""
from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.checkpoint import atomic_write
from common.overfit import MARGIN, divergence
from common.page import BLUE, GREY, ORANGE, colour_of, curve, folded, html_table, page, side_by_side, svg, text

if TYPE_CHECKING:
    import numpy as np

    from common.chat import Chat
    from common.material import Material

ROWS_SHOWN = 6  # examples with their trained tokens marked
SAMPLES_SHOWN = 100
DATASETS_DRAWN = 8  # lines in a plot; the table has all


@dataclass(frozen=True)
class Example:
    """An example as it is trained. parts: (text, whether its tokens are trained), in order."""

    place: str
    tokens: int
    trained_tokens: int
    parts: list[tuple[str, bool]]


def first_examples(material: Material, chat: Chat) -> list[Example]:
    """ROWS_SHOWN examples from the first steps of each stage, the first ones of each data set before others."""
    from common.show import marked_parts

    bounds = material.plan.stage_bounds
    rows = [pair for first, end in zip(bounds, bounds[1:]) for step in range(first, min(first + 20, end))
            for row in material.plan.step_rows(step) for pair in row]
    firsts = {s: i for i, (s, _) in reversed(list(enumerate(rows)))}
    others = [i for i in range(len(rows)) if i not in firsts.values()]
    chosen = [rows[i:i + 1] for i in sorted((sorted(firsts.values()) + others)[:ROWS_SHOWN])]
    found = []
    for row in chosen:
        encoded = material.examples(row)[0]
        found.append(Example(material.places([row])[0], len(encoded.input_ids), int(encoded.trained.sum()),
                             marked_parts(encoded, chat)))
    return found


def training_report(run_dir: Path | str, lengths: dict[str, np.ndarray] | None = None,
                    examples: Sequence[Example] = ()) -> None:
    """Write report.html of a run from what lies in its directory: metrics, plan, settings, samples.

    lengths: data set -> tokens of each of its training examples. examples: shown with their trained tokens marked.
    """
    place = Path(run_dir)
    plan, run, status = (read_json(place / f"{name}.json") for name in ("plan", "run", "run_status"))
    metrics = read_lines(place / "metrics.jsonl")
    parts = [_run_sentence(plan, run, metrics, status), overfit_note(metrics), training_curves(metrics, plan),
             *_drawn(plan, metrics), _lengths(lengths or {}, plan), *_examples(examples),
             *_samples(read_lines(place / "samples.jsonl")), *_settings(run)]
    atomic_write(place / "report.html", page(f"Training of {place.absolute().name}", parts))


# ---- how it went

def _run_sentence(plan: dict, run: dict, metrics: list[dict], status: dict) -> str:
    config = run.get("config", {})
    base = config.get("init_from") or config.get("model_path")
    said = [f"Base {text(near(base))}, {'LoRA' if config.get('use_lora') else 'all weights'}, template "
            f"{text(config.get('prompt_template'))}." if config else ""]
    done = max((m["step"] for m in metrics), default=0)
    if plan:
        said.append(f"{done:,} of {plan['steps']:,} steps"
                    + (" (stopped early)." if 0 < done < plan["steps"] else "."))
        said.append(f"Planned: {plan['tokens']:,} tokens, {plan['trained_tokens']:,} of them trained.")
    speeds = [(m["tokens_per_second"], m["trained_tokens_per_second"]) for m in metrics if "tokens_per_second" in m
              and "trained_tokens_per_second" in m]
    if speeds:
        middle = [sorted(column)[len(column) // 2] for column in zip(*speeds)]
        said.append(f"{middle[0]:,.0f} tokens a second, {middle[1]:,.0f} trained ones (medians).")
    if status.get("resumed_from"):
        said.append(f"Last resumed from {text(status['resumed_from'])}.")
    return f"<p>{' '.join(s for s in said if s)}</p>"


def overfit_note(metrics: list[dict]) -> str:
    """Whether the run overfits, in plain words with the step."""
    held = [(m["eval_loss"], m["step"]) for m in metrics if isinstance(m.get("eval_loss"), (int, float))]
    if note := divergence(metrics):
        return f'<p class="note warn"><b>It overfits.</b> {text(note[0].upper() + note[1:])}.</p>'
    if not held:
        return '<p class="note">No validation loss was measured, so nothing here says whether the run overfits.</p>'
    (lowest, step), (last, end) = min(held), held[-1]
    best = f"Best validation loss {lowest:.4f} nats a token at step {step:,}" + (
        ", the last evaluation" if step == end else f", last {last:.4f}")
    if last <= lowest * (1 + MARGIN):
        return f'<p class="note"><b>No sign of overfitting.</b> {best}.</p>'
    return (f'<p class="note">{best} at step {end:,}. It rose, but not in two evaluations in a row while the training '
            "loss fell: too little to call it overfitting.</p>")


def training_curves(metrics: list[dict], plan: dict | None = None) -> str:
    """Losses, losses by data set, learning rate, gradient norm, speed and shares of a run; stages are marked."""
    order = [source["name"] for source in (plan or {}).get("sources", ())]  # a data set has one colour in all plots
    place = lambda key: (order.index(key.partition("/")[2]) if key.partition("/")[2] in order else len(order), key)
    held = sorted({key for m in metrics for key in m if key.startswith("eval_loss/")}, key=place)
    drawn = sorted({key for m in metrics for key in m if key.startswith("share/")}, key=place)[:DATASETS_DRAWN]
    stages = [stage for stage in (plan or {}).get("stages", ()) if stage["steps"]]
    bounds = {stage["end_step"]: stage["name"] for stage in stages} if len(stages) > 1 else {}
    found = [(m["eval_loss"], m["step"]) for m in metrics if isinstance(m.get("eval_loss"), (int, float))]
    best = min(found)[1] if len(found) > 1 else None
    by_name = {key: key.removeprefix("eval_loss/") for key in held[:DATASETS_DRAWN]} if len(held) > 1 else {}
    few = f", {DATASETS_DRAWN} of {len(held)}" if len(held) > DATASETS_DRAWN else ""
    return side_by_side([
        curve(metrics, {"loss": "training", "eval_loss": "validation"}, "Loss, nats a token", bounds, best),
        curve(metrics, by_name, f"Validation loss by data set{few}", bounds),
        curve(metrics, {"learning_rate": "rate"}, "Learning rate", bounds),
        curve(metrics, {"grad_norm": "norm"}, "Gradient norm", bounds),
        curve(metrics, {"tokens_per_second": "all", "trained_tokens_per_second": "trained"}, "Tokens a second",
              bounds),
        curve(metrics, {key: key.removeprefix("share/") for key in drawn}, "Share of what the stage has drawn",
              bounds)])


# ---- what it learnt from

def share(value: float | None) -> str:
    """A part of 1; a dash where none was asked for."""
    return "–" if value is None else f"{value:.4f}"


def _drawn(plan: dict, metrics: list[dict]) -> list[str]:
    """Data sets with shares asked and obtained, in all and by stage; what was dropped and why."""
    if not plan:
        return []
    last = next((m for m in reversed(metrics) if "eval_loss" in m), {})
    rows = [[text(s["name"]), f"{s['examples']:,}", f"{s['draws']:,}", f"{s['passes']:.2f}", share(s["share_asked"]),
             share(s["share_examples"]), share(s["share_tokens"]), share(s["share_trained_tokens"]),
             share(last.get(f"eval_loss/{s['name']}"))]
            for s in plan["sources"]]
    head = ["data set", "examples", "drawn", "passes", "share asked", "of examples", "of tokens", "of trained tokens",
            "last validation loss"]
    parts = ["<h2>What was drawn</h2>", html_table(head, rows), side_by_side([_share_bars(plan)])]
    stages = plan.get("stages", ())
    if len(stages) > 1:
        parts += ["<h2>Stages</h2>", html_table(
            ["stage", "steps", "epochs", "data set", "drawn", "passes", "share asked", "of examples", "of tokens",
             "training loss"], [row for stage in stages for row in _stage_rows(stage, metrics)])]
    dropped = [[text(name), text(reason), f"{n:,}"] for name, meta in plan.get("data", {}).items()
               for reason, n in meta.get("dropped", {}).items() if n]
    if dropped:
        parts += ["<h2>What was dropped</h2>", html_table(["data set", "reason", "rows"], dropped)]
    return parts


def _stage_rows(stage: dict, metrics: list[dict]) -> list[list[str]]:
    """A line for each data set of a stage; the first one says what is the stage's own."""
    losses = [m["loss"] for m in metrics if m.get("stage") == stage["name"] and "loss" in m]
    steps = f"{stage['first_step'] + 1:,} to {stage['end_step']:,}" if stage["steps"] else "none"
    own = [text(stage["name"]), steps, f"{stage['epochs']:.2f}"]
    fell = f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "–"
    return [[*(own if i == 0 else [""] * 3), text(s["name"]), f"{s['draws']:,}", f"{s['passes']:.2f}",
             share(s["share_asked"]), share(s["share_examples"]), share(s["share_tokens"]), fell if i == 0 else ""]
            for i, s in enumerate(stage["sources"])]


def _share_bars(plan: dict) -> str:
    """Shares obtained as bars, those asked for as strokes across them."""
    unit, sources = plan.get("weight_unit", "examples"), plan["sources"][:20]
    if len(sources) < 2:
        return ""

    def draw(axes: object) -> None:
        axes.barh(range(len(sources)), [s[f"share_{unit}"] for s in sources], 0.6, color=BLUE, label="obtained")
        asked = [(i, s["share_asked"]) for i, s in enumerate(sources) if s["share_asked"] is not None]
        for k, (i, value) in enumerate(asked):
            axes.plot([value, value], [i - 0.4, i + 0.4], color=ORANGE, linewidth=2.5,
                      label="" if k else "asked")
        axes.set_yticks(range(len(sources)), [s["name"][:24] for s in sources])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        if asked:
            axes.legend(frameon=False, fontsize=8)
    return svg(draw, f"Shares of {unit.replace('_', ' ')}", height=1.0 + 0.35 * len(sources))


def _lengths(lengths: dict[str, np.ndarray], plan: dict) -> str:
    """How long the examples are, and how full the rows."""
    if not plan:
        return ""
    longest = plan["max_seq_length"]
    full = [f"{plan['rows']:,} rows of {'' if plan.get('packing', True) else 'one example and '}up to {longest:,} "
            f"tokens, {plan['fill']:.1%} full."]
    stages = [s for s in plan.get("stages", ()) if s["rows"]]
    if len(stages) > 1:
        full.append("By stage: " + ", ".join(f"{text(s['name'])} {s['tokens'] / (s['rows'] * longest):.1%}"
                                             for s in stages) + ".")

    def draw(axes: object) -> None:
        shown = list(lengths.items())[:DATASETS_DRAWN]
        axes.hist([values for _, values in shown], bins=30, range=(0, longest), stacked=True,
                  color=[colour_of(i) for i in range(len(shown))], label=[name[:30] for name, _ in shown])
        axes.axvline(longest, color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel(f"tokens; the dashed line is max_seq_length, {longest:,}")
        axes.set_ylabel("examples")
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=8)
    few = f", {DATASETS_DRAWN} of {len(lengths)} data sets" if len(lengths) > DATASETS_DRAWN else ""
    return (f"<h2>Lengths and rows</h2><p>{' '.join(full)}</p>"
            + (side_by_side([svg(draw, f"Lengths of examples{few}")]) if lengths else ""))


def _examples(examples: Sequence[Example]) -> list[str]:
    """Examples with what is trained coloured."""
    if not examples:
        return []
    parts = ["<h2>Rows as they are trained</h2><p>The model learns to write what is <mark>marked</mark>; everything "
             "else it only reads.</p>"]
    for example in examples:
        shown = "".join(f"<mark>{text(part)}</mark>" if trained else text(part) for part, trained in example.parts[:40])
        more = f" … ({len(example.parts) - 40:,} more parts)" if len(example.parts) > 40 else ""
        parts.append(f'<div class="sample"><small>{text(example.place)} · {example.tokens:,} tokens, '
                     f"{example.trained_tokens:,} trained</small><pre>{shown}{more}</pre></div>")
    return parts


# ---- what it says, and how it was made

def _samples(lines: list[dict]) -> list[str]:
    """Generated answers beside what was expected."""
    if not lines:
        return []
    few = f", {SAMPLES_SHOWN} of {len(lines):,}; all are in samples.jsonl" if len(lines) > SAMPLES_SHOWN else ""
    parts = [f"<h2>Answers{few}</h2>"]
    for line in lines[:SAMPLES_SHOWN]:
        ended = "" if line.get("stopped") else ' · <span class="bad">did not stop</span>'
        sides = "".join(f"<div><small>{label}</small><pre>{text(line[key])}</pre></div>" for label, key in
                        (("expected", "reference"), ("answer", "prediction")) if line.get(key) is not None)
        parts.append(f'<div class="sample"><small>{text(line.get("source"))}{ended}</small>'
                     f'<pre><b>{text(line.get("prompt"))}</b></pre><div class="sides">{sides}</div></div>')
    return parts


def _settings(run: dict) -> list[str]:
    """All settings, the versions and the command."""
    if not run.get("config"):
        return []
    whole = lambda value: f'<pre class="settings">{html.escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre>'
    about = {key: run[key] for key in ("command", "started", "processes", "mixed_precision", "rows_per_step")
             if key in run}
    return ["<h2>Settings</h2>", folded("Settings of the run", whole(run["config"])),
            folded("Versions, command and fingerprints", whole(
                {**about, "versions": run.get("versions", {}), "fingerprints": run.get("fingerprints", {})}))]


def near(path: object) -> str:
    """A path below the working directory as it is seen from there; another one, or a name, as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if str(path).startswith(f"{here}/") else str(path)


def read_json(path: Path) -> dict:
    """A JSON object, empty if the file is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_lines(path: Path) -> list[dict]:
    """JSON lines; a torn last line (a kill while it was written) is left out, a missing file has none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]
