"""Reports are whole without a network, show hostile text as text, and are written from what a run left."""
from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows

from common import report_eval, report_train
from common.page import averaged

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
    """A page in which nothing runs and nothing is loaded, and nothing is wider than the screen."""
    parsed = Page(page)
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "form", "a"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, attrs)
            assert not (name in ("src", "href", "xlink:href") and not value.startswith("#")), (tag, attrs)
        if tag in ("svg", "table", "pre", "div", "figure"):
            assert not {"width", "height"} & set(attrs) and "width" not in attrs.get("style", ""), (tag, attrs)
    assert page.count("<table>") == page.count('<div class="scroll"><table>')  # they scroll by themselves
    assert "default-src 'none'" in page and "@import" not in page and "url(http" not in page
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "figures in one page share ids"
    return parsed


# ---- an evaluation

def test_hostile_text_is_text() -> None:
    """Guards against a prompt, an answer, a data set or a model that is markup, as content, title or attribute."""
    lines = [sample(**{key: HOSTILE for key in ("dataset", "source", "prompt", "reference", "prediction")},
                    baseline_prediction=HOSTILE, exact_match=False, line=3,
                    messages=[{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": HOSTILE}])]
    page = safe(report_eval.eval_report(found([HOSTILE, "second"]), lines))
    assert page.text.count(HOSTILE) >= 7
    assert f"Evaluation of run {HOSTILE}".rpartition("/")[2] in page.text  # the title, from the path's last part


def test_worst_answers_come_first() -> None:
    """Guards against failures hidden at the end: wrong before right, then endless, then by loss."""
    lines = [sample(prompt="fine"), sample(prompt="high loss", nll=9.0), sample(prompt="endless", stopped=False),
             sample(prompt="wrong", exact_match=False)]
    text = safe(report_eval.eval_report(found(["d"]), lines)).text
    places = [text.index(p) for p in ("wrong", "endless", "high loss", "fine")]
    assert places == sorted(places)


def test_base_and_tuned_stand_side_by_side() -> None:
    """Guards against an answer without what it is to be compared with, or numbers on the wrong side."""
    lines = [sample(prediction="new answer", baseline_prediction="old answer", baseline_nll=6.0, baseline_tokens=2,
                    chrf=0.25, reference="wanted", exact_match=None)]
    text = safe(report_eval.eval_report(found(["d"]), lines)).text
    for part in ("expectedwanted", "base · 3.000 nats a tokenold answer",
                 "tuned · 0.500 nats a token · chrF 0.25new answer"):
        assert part in text, part


def test_a_data_set_can_be_chosen_without_a_script() -> None:
    """Guards against a filter that shows rows of another data set, or needs a script (the page forbids them)."""
    lines = [sample(dataset=name, prompt=f"of {name}") for name in ("a", "b", "b")]
    page = report_eval.eval_report(found(["a", "b"]), lines)
    parsed = safe(page)
    chosen = {attrs["id"]: attrs for tag, attrs in parsed.tags if tag == "input"}
    assert list(chosen) == ["all", "set0", "set1"] and "checked" in chosen["all"]
    assert [attrs["for"] for tag, attrs in parsed.tags if tag == "label"] == list(chosen)
    for i in (0, 1):
        assert f"#set{i}:checked ~ .cards > :not(.in{i}) {{ display: none; }}" in page
    cards = [attrs["class"] for tag, attrs in parsed.tags if attrs.get("class", "").startswith("sample")]
    assert sorted(cards) == ["sample in0", "sample in1", "sample in1"]
    assert "<input" not in report_eval.eval_report(found(["a"]), lines[:1])


@pytest.mark.parametrize("letter", ["x", "é", "語", '"', "<"])
def test_a_thousand_answers_stay_small_and_quick(letter: str) -> None:
    """Guards against a page that no phone opens, also where each letter takes many bytes; what is left out is said."""
    lines = [sample(prompt=letter * 10_000, prediction=letter * 5000, dataset="ab"[i % 2]) for i in range(1000)]
    started = time.monotonic()
    page = report_eval.eval_report(found(["a", "b"]), lines)
    assert len(page.encode()) < 2_000_000 and time.monotonic() - started < 10
    assert " of 1,000; all are in samples.jsonl" in page and "8,000 more characters" in page
    assert page.count('class="sample in0"') == pytest.approx(page.count('class="sample in1"'), abs=1)


def test_a_thousand_short_answers_are_all_there() -> None:
    """Guards against a limit that hides what would fit."""
    page = report_eval.eval_report(found(["d"]), [sample(prompt=f"number {i}.") for i in range(1000)])
    assert all(f"number {i}." in page for i in range(1000)) and len(page.encode()) < 2_000_000


def test_any_number_that_was_measured_is_shown() -> None:
    """Guards against a report that knows fewer numbers than the evaluation."""
    results = found(["d"])
    results["datasets"]["d"] |= {"wit": 0.123, "intervals": {"wit": (0.1, 0.2)}}
    assert "wit–0.1230.1 … 0.2–" in safe(report_eval.eval_report(results, [])).text


def test_the_verdict_is_in_words() -> None:
    """Guards against a worse model whose report reads like a better one's, and an end that was never trained."""
    text = safe(report_eval.eval_report(found(["d"]), [])).text
    assert "Better than the base: exact match." in text and "does not know where to end" not in text
    results = found(["d"])
    results["total"] |= {"end_probability": 1e-4, "difference": {
        "loss": {"value": 0.5, "low": 0.1, "high": 1.0}, "stopped": {"value": -0.5, "low": -0.6, "high": -0.4}}}
    text = safe(report_eval.eval_report(results, [])).text
    assert "Worse: stopped by itself, loss." in text and "does not know where to end" in text and "0.0001" in text


def test_half_a_surrogate_pair_is_no_fault() -> None:
    """Guards against an evaluation that ends in an error because an answer is cut within a letter."""
    report_eval.eval_report(found(["d"]), [sample(prediction="\ud83d")]).encode()


# ---- a training run

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
    for part in ("Loss, nats a token", "Validation loss by data set", "Learning rate", "Gradient norm",
                 "Tokens a second", "What was drawn", "99.0% full", "empty answer", "did not stop", "8 of 8 steps",
                 "10 tokens a second, 5 trained ones",
                 "No sign of overfitting. Best validation loss 0.2500 nats a token at step 8"):
        assert part in page.text, part
    assert [tag for tag, _ in page.tags].count("svg") == 5


def test_trained_tokens_are_coloured(run: Path) -> None:
    """Guards against the mark on the prompt, and against rows that are markup."""
    shown = report_train.Example(f"{HOSTILE}:7", 12, 5, [(f"asked {HOSTILE}", False), (f"said {HOSTILE}", True)])
    report_train.training_report(run, examples=[shown])
    html = (run / "report.html").read_text(encoding="utf-8")
    page = safe(html)
    assert f"asked {HOSTILE}said {HOSTILE}" in page.text and "12 tokens, 5 trained" in page.text
    marked = html.split("<pre>asked ")[1].split("</pre>")[0]
    assert marked.count("<mark>") == 1 and marked.index("<mark>said") > 0


def test_stages_and_lengths_are_shown(run: Path) -> None:
    """Guards against curves in which two mixtures look like one, and a stage that was not reached but is drawn."""
    plan = json.loads((run / "plan.json").read_text())
    stage = {"epochs": 1.0, "rows": 8, "tokens": 256, "sources": plan["sources"]}
    plan["stages"] = [{"name": "first", "first_step": 0, "end_step": 4, "steps": 4, **stage},
                      {"name": HOSTILE, "first_step": 4, "end_step": 8, "steps": 4, **stage},
                      {"name": "never", "first_step": 8, "end_step": 8, "steps": 0, **stage, "rows": 0, "tokens": 0}]
    (run / "plan.json").write_text(json.dumps(plan))
    report_train.training_report(run, {HOSTILE: np.array([3, 9, 60]), "b": np.array([64])})
    page = safe((run / "report.html").read_text(encoding="utf-8"))
    for part in ("1 to 4", "5 to 8", "none", f"By stage: first 50.0%, {HOSTILE} 50.0%.", "Lengths of examples",
                 "max_seq_length, 64"):
        assert part in page.text, part
    assert page.text.count("first\n") >= 5  # in each curve, and never the stage without steps
    assert "never\n" not in page.text


@pytest.mark.parametrize("validation, words", [
    ([2.0, 1.5, 1.7, 2.0], "It overfits. Validation loss was lowest at step 20 (1.5000)"),
    ([2.0, 1.5, 1.4, 1.2], "No sign of overfitting. Best validation loss 1.2000 nats a token at step 40, the last"),
    ([2.0, 1.5, 1.4, 1.45], "too little to call it overfitting"), ([], "No validation loss was measured")])
def test_overfitting_is_told_in_words(validation: list[float], words: str) -> None:
    """Guards against a run that learns by heart under a curve nobody reads, and against crying wolf."""
    lines = [{"step": 10 * i, "loss": 2 / i, "stage": "train"} for i in (1, 2, 3, 4)]
    lines += [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(validation, 1)]
    assert words in Page(report_train.overfit_note(lines)).text


def test_a_long_run_has_a_small_page(run: Path) -> None:
    """Guards against plots of a hundred thousand points."""
    write_rows(run / "metrics.jsonl", [{"step": i, "loss": 1 + i % 7, "grad_norm": i % 5, "learning_rate": 1e-4,
                                        "tokens_per_second": 10.0 + i % 3} for i in range(1, 20_001)])
    report_train.training_report(run)
    assert (run / "report.html").stat().st_size < 500_000
    assert averaged([(1, 2.0), (2, 4.0), (3, 6.0)], most=2) == [(1.5, 3.0), (3.0, 6.0)]


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


def test_a_huge_answer_does_not_take_the_place_of_all() -> None:
    """Guards against a conversation of 200 long turns that leaves a report without answers."""
    turns = [{"role": "user", "content": "漢" * 1990}] * 400
    lines = [sample(prompt="huge", exact_match=False, messages=turns), sample(prompt="usual")]
    assert [line["prompt"] for line in report_eval.worst_first(lines)] == ["usual"]


def test_the_bases_loss_is_per_token_of_its_own() -> None:
    """Guards against nats of one tokenizer divided by the tokens of another, and 0.000 for what was not measured."""
    text = safe(report_eval.eval_report(found(["d"]), [sample(
        baseline_prediction="x", baseline_nll=6.0, baseline_tokens=4), sample(
        baseline_prediction="y", baseline_nll=None, baseline_tokens=0)])).text
    assert "base · 1.500 nats a token" in text and "basey" in text
