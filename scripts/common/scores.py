"""Losses and answers -> numbers with intervals.

Every number is a sum over rows divided by another (`Table`: a numerator and a denominator for each row), so batch size
and order do not matter, rows can be resampled, and two models are compared on the same rows.

    exact_match      share of short references (to 64 characters, one line) answered exactly; NFC, stripped, case kept
    starts_right     share of them with which the answer begins, whatever follows: known, but not kept to the form
    rouge_l          ROUGE-L F1 of answer and reference, mean over rows (rouge-score). It knows the letters a-z and
                     digits alone: a reference that is mostly in another script has none
    chrf             chrF2 of answer and reference, mean over rows, 0 to 1 (sacrebleu); for every script
    stopped          share of answers that ended by themselves
    end_probability  probability of the end token where the reference ends, mean: near 0 if the end was never trained
    loss             nats per trained token: the response and its end token     (perplexity is exp of it)
    bits_per_byte    the same nats in bits, per utf-8 byte of the response: comparable across tokenizers
    token_accuracy   share of trained tokens that are the likeliest one
    mean_length      tokens of an answer
    repetition       share of an answer's 4-grams of tokens that occurred in it before

A thought before an answer (up to </think>) is not compared with a reference that has none.
"""
from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from common.generate import Generated

METRICS = ("exact_match", "starts_right", "rouge_l", "chrf", "stopped", "end_probability", "loss", "perplexity",
           "bits_per_byte", "token_accuracy", "mean_length", "repetition")
OF_LOSSES = ("loss", "token_accuracy", "bits_per_byte", "end_probability")  # given the reference; others: of answers
OF_TABLE = tuple(name for name in METRICS if name != "perplexity")
SHORT = 64  # characters: a longer reference has too many right wordings to be compared letter by letter
RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then vary by a few hundredths of its width
NGRAM = 4
THOUGHT_ENDS = "</think>"

Table = dict[str, np.ndarray]  # number -> float64 (rows, 2): numerator and denominator


def loss_table(losses: list[np.ndarray], hits: list[np.ndarray], n_bytes: list[int], ends: list[np.ndarray]) -> Table:
    """Rows of per-token losses (nats), hits, and whether a token ends an answer -> the numbers OF_LOSSES.

    Sums are float64.
    """
    nats = np.array([np.sum(x, dtype=np.float64) for x in losses])
    tokens = np.array([len(x) for x in losses], np.float64)
    right = np.array([np.sum(x) for x in hits], np.float64)
    sure = [(np.exp(-loss[end]).sum(), end.sum()) for loss, end in zip(losses, ends)]
    return {"loss": np.stack([nats, tokens], 1), "token_accuracy": np.stack([right, tokens], 1),
            "bits_per_byte": np.stack([nats / math.log(2), np.array(n_bytes, np.float64)], 1),
            "end_probability": np.array(sure, np.float64).reshape(-1, 2)}


def answer_table(answers: list[Generated | None], texts: list[str | None], references: list[str | None]) -> Table:
    """Answers and references -> the other numbers."""
    texts = [text if text is None or THOUGHT_ENDS in (reference or "") else after_thought(text)
             for text, reference in zip(texts, references)]
    there = np.array([a is not None for a in answers], np.float64)
    short = np.array([a is not None and is_short(r) for a, r in zip(answers, references)], np.float64)
    exact = np.array([bool(s) and same_text(t, r) for s, t, r in zip(short, texts, references)], np.float64)
    starts = np.array([bool(s) and begins_with(t, r) for s, t, r in zip(short, texts, references)], np.float64)
    stopped = np.array([a is not None and a.stopped for a in answers], np.float64)
    lengths = np.array([0 if a is None else len(a.ids) for a in answers], np.float64)
    alike = {name: [(0.0, 0.0) if a is None or not (r or "").strip() else _one(measure(t, r))
                    for a, t, r in zip(answers, texts, references)] for name, measure in ALIKE.items()}
    return {"exact_match": np.stack([exact, short], 1), "starts_right": np.stack([starts, short], 1),
            **{name: np.array(values, np.float64).reshape(-1, 2) for name, values in alike.items()},
            "stopped": np.stack([stopped, there], 1), "mean_length": np.stack([lengths, there], 1),
            "repetition": np.array([repeated(a.ids if a else []) for a in answers], np.float64).reshape(-1, 2)}


def after_thought(text: str) -> str:
    """What an answer says when it has thought."""
    return text.rpartition(THOUGHT_ENDS)[2].lstrip()


def _one(value: float | None) -> tuple[float, float]:
    return (0.0, 0.0) if value is None else (value, 1.0)


@cache
def _rouge() -> object:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


@cache
def _chrf() -> object:
    from sacrebleu.metrics import CHRF

    return CHRF()


def rouge_l(text: str, reference: str) -> float | None:
    """ROUGE-L F1; None where fewer than half of the reference's letters and digits are ASCII, all that it reads."""
    letters = [c for c in reference if c.isalnum()]
    if not letters or 2 * sum(map(str.isascii, letters)) < len(letters):
        return None
    return _rouge().score(reference, text)["rougeL"].fmeasure


def chrf(text: str, reference: str) -> float:
    """chrF2 of a text, 0 to 1."""
    return _chrf().sentence_score(text, [reference]).score / 100


ALIKE = {"rouge_l": rouge_l, "chrf": chrf}


def is_short(reference: str | None) -> bool:
    """Whether a reference is compared letter by letter: at most 64 characters, on one line, not empty."""
    text = (reference or "").strip()
    return 0 < len(text) <= SHORT and "\n" not in text


def same_text(a: str, b: str) -> bool:
    """Equal after NFC and without white space at the ends; case counts."""
    return unicodedata.normalize("NFC", a).strip() == unicodedata.normalize("NFC", b).strip()


def begins_with(text: str, reference: str) -> bool:
    """Whether a text begins with the reference as whole words: "four apples" with "four", not with "fou"."""
    text, reference = (unicodedata.normalize("NFC", x).strip() for x in (text, reference))
    return text.startswith(reference) and not text[len(reference):][:1].isalnum()


def repeated(ids: list[int]) -> tuple[int, int]:
    """(4-grams that occurred before, all 4-grams): a b c d a b c d -> 1 of 5."""
    grams = list(zip(*(ids[k:] for k in range(NGRAM))))
    return len(grams) - len(set(grams)), len(grams)


def summarise(table: Table) -> dict[str, float | int | None]:
    """The means of METRICS, None where nothing was measured, with the numbers of rows and trained tokens."""
    found: dict[str, float | int | None] = {}
    for name in METRICS:
        over, under = table[_column(name)].sum(0)
        found[name] = None if under == 0 else _finish(name, over / under)
    return found | {"rows": len(table["loss"]), "tokens": int(table["loss"][:, 1].sum()),
                    "short_references": int(table["exact_match"][:, 1].sum()),
                    "without_rouge_l": int(table["chrf"][:, 1].sum() - table["rouge_l"][:, 1].sum())}


def _column(name: str) -> str:
    return "loss" if name == "perplexity" else name


def _finish(name: str, ratio: float | np.ndarray) -> float | np.ndarray:
    if name != "perplexity":
        return float(ratio) if np.ndim(ratio) == 0 else ratio
    with np.errstate(over="ignore"):
        value = np.minimum(np.exp(ratio), 1e300)  # JSON has no infinity
    return float(value) if np.ndim(value) == 0 else value


def compare(tuned: Table, baseline: Table | None = None, seed: int = 0,
            prompts: np.ndarray | None = None) -> tuple[dict, dict, dict]:
    """95 % intervals (low, high) of the tuned means, of the baseline's, and of the differences with their value.

    Percentile bootstrap over rows (Efron 1979), seeded; both models are resampled with the same rows, which is what
    makes the interval of a difference narrow. A row that is too long for one of the two is in no difference. prompts:
    a number for each row, its prompt's own whatever the order of the files; rows with the same one are drawn together,
    for they are no independent observations. Without prompts, or where all have the same one, each row is drawn.
    """
    if prompts is None or not prompts.any():
        prompts = _places(tuned)
    draw = lambda tables: _resampled([_by_prompt(table, prompts) for table in tables], seed)
    if baseline is None:
        return {name: _ends(values) for name, values in draw([tuned])[0].items()}, {}, {}
    own, other = draw([tuned, baseline])
    pair = on_same_rows(tuned, baseline)
    drawn, means = draw(pair), [summarise(table) for table in pair]
    apart = {}
    for name in drawn[0].keys() & drawn[1].keys():
        low, high = _ends(drawn[0][name] - drawn[1][name])
        apart[name] = {"value": means[0][name] - means[1][name], "low": low, "high": high}
    ends = lambda drawn: {name: _ends(values) for name, values in drawn.items()}
    return ends(own), ends(other), {name: apart[name] for name in METRICS if name in apart}


def on_same_rows(a: Table, b: Table) -> tuple[Table, Table]:
    """Both tables, with the losses of rows alone that both models could read."""
    both = ((a["loss"][:, 1] > 0) & (b["loss"][:, 1] > 0))[:, None]
    return tuple(table | {name: table[name] * both for name in OF_LOSSES} for table in (a, b))


def _places(table: Table) -> np.ndarray:
    """A number for each row that the order of the files does not change: its place among the rows sorted."""
    return np.lexsort(np.concatenate([table[name] for name in OF_TABLE], 1).T).argsort()


def _by_prompt(table: Table, prompts: np.ndarray) -> Table:
    """The sums of all rows with the same prompt, in the order of its numbers."""
    return {name: np.stack([np.bincount(prompts, column) for column in values.T], 1) for name, values in table.items()}


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(tables: Sequence[Table], seed: int) -> list[dict[str, np.ndarray]]:
    """The means of each table in RESAMPLES draws of its rows with replacement, for every number that was measured.

    The same draws for all tables.
    """
    columns = [np.concatenate([table[name] for name in OF_TABLE], 1) for table in tables]  # (rows, 2 * numbers)
    rows = len(columns[0])
    rng, sums = np.random.default_rng([seed, 6]), [np.empty((RESAMPLES, c.shape[1])) for c in columns]
    for i in range(RESAMPLES):
        times = np.bincount(rng.integers(0, rows, rows), minlength=rows).astype(np.float64)
        for total, c in zip(sums, columns):
            total[i] = times @ c
    found = []
    for table, total in zip(tables, sums):
        over, under = total[:, 0::2], total[:, 1::2]
        ratios = dict(zip(OF_TABLE, (over / np.where(under == 0, np.nan, under)).T))  # a draw may lack all that have it
        found.append({name: _finish(name, ratios[column]) for name in METRICS for column in [_column(name)]
                      if table[column][:, 1].sum() > 0})
    return found


def joined(tables: Iterable[Table]) -> Table:
    """Several tables as one: the rows of all data sets together."""
    tables = list(tables)
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def chosen_rows(table: Table, rows: list[int]) -> Table:
    """Some rows of a table."""
    return {name: values[rows] for name, values in table.items()}
