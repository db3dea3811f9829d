"""Reports are whole without a network, show hostile text as text, and are written from what a run left."""
from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write_rows

from common import report_eval, report_train

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{1}$</pre><b>&amp;'
VOID = {"meta", "img", "br", "path", "use", "rect", "input", "link", "circle"}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that do not close."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.text += data


def entry(exact: float, name: str = "x") -> dict:
    means = {"exact_match": exact, "starts_right": exact, "stopped": 1.0, "loss": 0.5, "perplexity": 1.65,
             "bits_per_byte": None, "token_accuracy": 0.9, "mean_length": 3.0, "repetition": 0.0}
    ends = {k: (v - 0.01, v + 0.01) for k, v in means.items() if v is not None}
    asked = {"answers": "plain", "loss": "template"}
    return {**means, "rows": 10, "tokens": 30, "short_references": 10, "intervals": ends,
            "baseline": {**means, "exact_match": 0.1, "intervals": ends, "asked": asked},
            "difference": {"exact_match": {"value": exact - 0.1, "low": exact - 0.2, "high": exact}},
            "majority": {"exact_match": 0.2, "rule": f"most {name}"}, "left_out_too_long": 1}


def found(names: list[str]) -> dict:
    entries = {name: entry(0.9, name) for name in names}
    return {**entries[names[0]], "datasets": entries, "total": entry(0.9), "model": f"run {HOSTILE}",
            "baseline_model": HOSTILE}


def sample(**changes: object) -> dict:
    return {"dataset": "d", "source": "s", "prompt": "p", "reference": "r", "prediction": "q", "stopped": True,
            "exact_match": True, "nll": 1.0, "tokens": 2, **changes}


def safe(page: str) -> Page:
    """A page in which nothing runs and nothing is loaded."""
    parsed = Page(page)
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "form", "a"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, attrs)
            assert not (name in ("src", "href", "xlink:href") and not value.startswith("#")), (tag, attrs)
    assert "default-src 'none'" in page and "@import" not in page
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "figures in one page share ids"
    return parsed


def test_hostile_text_is_text() -> None:
    """Guards against a prompt, an answer, a data set or a model whose name is markup."""
    lines = [sample(**{key: HOSTILE for key in ("dataset", "source", "prompt", "reference", "prediction")},
                    baseline_prediction=HOSTILE, exact_match=False)]
    page = safe(report_eval.eval_report(found([HOSTILE, "second"]), lines))
    assert page.text.count(HOSTILE) >= 5


def test_worst_answers_come_first() -> None:
    """Guards against failures hidden at the end: wrong before right, then endless, then by loss."""
    lines = [sample(prompt="fine"), sample(prompt="high loss", nll=9.0), sample(prompt="endless", stopped=False),
             sample(prompt="wrong", exact_match=False)]
    text = safe(report_eval.eval_report(found(["d"]), lines)).text
    places = [text.index(p) for p in ("wrong", "endless", "high loss", "fine")]
    assert places == sorted(places)


def test_a_thousand_answers_stay_small_and_quick() -> None:
    """Guards against a page that no phone opens; what is left out is said."""
    started = time.monotonic()
    page = report_eval.eval_report(found(["d"]), [sample(prompt="p" * 10_000, prediction="é" * 5000)] * 1000)
    assert len(page.encode()) < 2_000_000 and time.monotonic() - started < 10
    assert " of 1,000; all are in samples.jsonl" in page and "8,000 more characters" in page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    metrics = [{"step": i, "loss": 3 / i, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 10.0,
                "trained_tokens_per_second": 5.0, "epoch": i / 10, "stage": "train"} for i in range(1, 9)]
    metrics += [{"step": i, "eval_loss": 2 / i, f"eval_loss/{HOSTILE}": 2 / i, "eval_loss/b": 1 / i} for i in (4, 8)]
    write_rows(tmp_path / "metrics.jsonl", metrics)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill while a line was written
    source = {"name": HOSTILE, "examples": 10, "draws": 20, "passes": 2.0, "share_asked": None, "share_examples": 1.0,
              "share_tokens": 1.0, "share_trained_tokens": 1.0}
    (tmp_path / "plan.json").write_text(json.dumps(
        {"steps": 8, "rows": 16, "max_seq_length": 64, "fill": 0.99, "tokens": 1000, "trained_tokens": 400,
         "sources": [source], "data": {HOSTILE: {"dropped": {"empty answer": 3}}}}))
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model_path": HOSTILE, "use_lora": True,
                                                              "prompt_template": "chatml"}}))
    write_rows(tmp_path / "samples.jsonl",
               [{"prompt": HOSTILE, "reference": None, "prediction": "x", "stopped": False}])
    return tmp_path


def test_a_training_report_shows_what_the_run_left(run: Path) -> None:
    """Guards against a torn metrics line, names that are markup or broken TeX, and plots that are not in the page."""
    report_train.training_report(run)
    page = safe((run / "report.html").read_text(encoding="utf-8"))
    for part in ("loss, nats a token", "learning rate", "What was drawn", "99.0% full", "empty answer", "did not stop",
                 "Best validation loss 0.2500 nats a token at step 8"):
        assert part in page.text, part
    assert [tag for tag, _ in page.tags].count("svg") == 4


@pytest.mark.parametrize("missing", ["metrics.jsonl", "plan.json", "run.json", "samples.jsonl"])
def test_a_report_needs_none_of_its_files(run: Path, missing: str) -> None:
    """Guards against a run that fails at its very end for want of a file the report would show."""
    (run / missing).unlink()
    report_train.training_report(run)
    safe((run / "report.html").read_text(encoding="utf-8"))


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    """Guards against dates and random ids in plots, which make every copy of a report differ."""
    report_train.training_report(run)
    first = (run / "report.html").read_bytes()
    report_train.training_report(run)
    assert (run / "report.html").read_bytes() == first
