"""A report's frame: one HTML file that opens from disk, without a network or a script, light or dark, on a phone or a
wide screen.

Everything that comes from data goes through `text`, as content and in attributes; plots are SVG by matplotlib, placed
in the page, in colours that follow it.
"""
from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable

LONGEST = 2000  # characters of a text in a page
POINTS = 400  # of a line in a plot: more are averaged, or a long run's page would be megabytes
# Colours as matplotlib writes them -> what the page's style makes of them, in light and in dark.
INK, BLUE, ORANGE, GREY = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
INKS = {INK: "--ink", BLUE: "--blue", ORANGE: "--orange", GREY: "--grey"}
MORE = ("#3a9a6a", "#a86ac8", "#c8605a", "#8c7a50", "#4aa0a8", "#b0883a")  # further lines, readable on both
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #24292f; --faint: #59636e; --line: #d5d9de; --soft: #f3f5f7;
  --blue: #2a6fb8; --orange: #c0650f; --grey: #8a929b; --good: #1f7a3d; --bad: #b3322b;
  --mark: #cdeed3; --warn: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e3e6ea; --faint: #9aa4af; --line: #39414a;
  --soft: #1f242a; --blue: #64a8ec; --orange: #eb9a48; --grey: #7c8690; --good: #5cc07a; --bad: #f0867f;
  --mark: #1f5130; --warn: #40350f; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere;
  color: var(--ink); background: var(--ground); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--ground) 30%, transparent) local left / 2.5rem 100% no-repeat,
  linear-gradient(to left, var(--ground) 30%, transparent) local right / 2.5rem 100% no-repeat,
  linear-gradient(to right, var(--line), transparent) left / .75rem 100% no-repeat,
  linear-gradient(to left, var(--line), transparent) right / .75rem 100% no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 6rem; overflow-wrap: anywhere; }
th { font-weight: 600; vertical-align: bottom; }
small, .soft { color: var(--faint); font-size: .85rem; } td small { display: block; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.note { background: var(--soft); border-left: .25rem solid var(--blue); padding: .5rem .75rem; border-radius: .25rem; }
.note.warn { background: var(--warn); border-color: var(--orange); }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; max-width: 32rem; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 1.5rem; }
.tables > div { min-width: 0; }
.sample { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: .75rem 0; }
.sample pre { white-space: pre-wrap; margin: .25rem 0; font: inherit; overflow-wrap: anywhere; max-height: 24rem;
  overflow-y: auto; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .5rem; }
.sides > div { background: var(--soft); border-radius: .35rem; padding: .4rem .6rem; }
mark { background: var(--mark); color: inherit; border-radius: .15rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre.settings { overflow-x: auto; font-size: .8rem; background: var(--soft); padding: .75rem; border-radius: .35rem; }
.choice { position: absolute; opacity: 0; width: 0; margin: 0; pointer-events: none; }
.choice + label { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: .15rem .75rem;
  margin: 0 .35rem .35rem 0; cursor: pointer; }
.choice:checked + label { background: var(--blue); border-color: var(--blue); color: var(--ground); }
.choice:focus-visible + label { outline: 2px solid var(--orange); }
@media (max-width: 40rem) { th, td { padding: .3rem .35rem; font-size: .9rem; }
  td small { font-size: .75rem; white-space: normal; }
  th:first-child, td:first-child { min-width: 4.5rem; } }
"""


def text(value: object, longest: int = LONGEST) -> str:
    """Anything as harmless HTML text; long texts end in the number of characters left out."""
    shown = "" if value is None else str(value)
    more = f" … ({len(shown) - longest:,} more characters)" if len(shown) > longest else ""
    return html.escape(shown[:longest] + more)


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole HTML document; nothing in it may load or run anything. parts: HTML; style: CSS of this page alone."""
    whole = ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
             "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
             f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body>\n<h1>{text(title)}</h1>\n"
             + "\n".join(part for part in parts if part) + "\n</body></html>\n")
    return whole.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer must not stop a run


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already; it scrolls by itself where the page is too narrow for it."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return f'<div class="scroll"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def side_by_side(plots: Iterable[str]) -> str:
    """Plots in as many columns as there is room for; nothing without any."""
    drawn = "".join(plots)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def folded(summary: str, content: str) -> str:
    """Content (HTML) that is opened by a click on its summary (text)."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def svg(draw: Callable[[object], None], title: str, height: float = 2.7) -> str:
    """A figure as inline SVG; draw(axes) fills it. The title also keeps the ids of a page's figures apart.

    It is as wide as a phone (4.8 inches of 72 points: a 9 point letter stays one there) and grows with the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9,
                "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
                "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
                "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY,
                "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.formatter.limits": (-4, 6)}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's own font lacks: the page's fonts draw them
        figure = Figure(figsize=(4.8, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True,
                       metadata={key: None for key in ("Date", "Creator", "Format", "Type")})
    drawn = out.getvalue()[out.getvalue().index("<svg"):]
    for side in ("width", "height"):  # the page decides
        drawn = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", drawn, count=1)
    safe = re.sub(r"\W", "", title)
    drawn = re.sub(r'\bid="', f'id="{safe}-', drawn)
    drawn = re.sub(r'(href="#|url\(#)', rf"\g<1>{safe}-", drawn)
    for colour, name in INKS.items():
        drawn = drawn.replace(colour, f"var({name})")
    return f'<figure role="img" aria-label="{text(title)}">{drawn}</figure>'


def colour_of(i: int) -> str:
    """The colour of the i-th line of a plot."""
    return (BLUE, ORANGE, *MORE)[i % (2 + len(MORE))]


def curve(lines: list[dict], keys: dict[str, str], title: str, bounds: dict[int, str] | None = None,
          best: int | None = None) -> str:
    """Values of metrics lines over steps; keys: name in the file -> label. Nothing if none of them is there.

    bounds: the step after which a stage ends -> its name; none for a run of one stage. best: a step to be marked. The
    scale is logarithmic where the largest value is more than ten times the smallest.
    """
    series = {label: [(m["step"], m[key]) for m in lines if isinstance(m.get(key), (int, float))]
              for key, label in keys.items()}
    series = {label: averaged(points) for label, points in series.items() if points}
    if not series:
        return ""
    values = [value for points in series.values() for _, value in points]

    def draw(axes: object) -> None:
        from matplotlib.ticker import LogLocator

        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.3, max(values) * (2 if bounds else 1.3))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0 if min(values) >= 0 else None, top=max(values) * (1.2 if bounds else 1.08) or 1)
        for i, (label, points) in enumerate(series.items()):
            axes.plot(*zip(*points), label=label[:30], color=colour_of(i), linewidth=1.5,
                      marker="o" if len(points) < 30 else None, markersize=3)
        _marks(axes, bounds or {}, best)
        axes.set_xlabel("step")
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
    return svg(draw, title)


def legend_above(axes: object) -> None:
    """The legend beside the title, where it hides nothing."""
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1,
                columnspacing=1, handlelength=1.2)


def _marks(axes: object, bounds: dict[int, str], best: int | None) -> None:
    """Where stages end, with their names at the top, and the best step."""
    before = 0
    for step, name in bounds.items():
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
        axes.text((before + step) / 2, 0.99, name[:20], transform=axes.get_xaxis_transform(), ha="center", va="top",
                  fontsize=8, color=GREY)
        before = step
    if best is not None:
        axes.axvline(best, color=ORANGE, linewidth=1, linestyle="--", label=f"lowest, step {best:,}")


def averaged(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of equal parts of a longer series. 1 2 3 4 at most 2 -> 1.5 3.5."""
    size = -(-len(points) // most)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
