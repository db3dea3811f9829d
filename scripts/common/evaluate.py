"""What a model learnt, in numbers: rows -> loss and answers -> means with intervals.

Every number is a sum over rows divided by another (`Table`: a numerator and a denominator for each row), so batch size
and order do not matter, rows can be resampled, and two models are compared on the same rows.

    loss            nats per trained token: the response and its end token     (perplexity is exp of it)
    bits_per_byte   the same nats in bits, per utf-8 byte of the response: comparable across tokenizers
    token_accuracy  share of trained tokens that are the likeliest one
    exact_match     share of short references (to 64 characters, one line) answered exactly; NFC, stripped, case kept
    starts_right    share of them with which the answer begins, whatever follows: what is known without keeping the form
    stopped         share of answers that ended by themselves
    mean_length     tokens of an answer
    repetition      share of an answer's 4-grams of tokens that occurred in it before
"""
from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.chat import Chat, Encoded
from common.faults import NotFinite
from common.generate import Generated, generate
from common.loss import LossModel, choose_attention, make_batch
from common.rows import Row

if TYPE_CHECKING:
    from torch import nn

METRICS = ("exact_match", "starts_right", "stopped", "loss", "perplexity", "bits_per_byte", "token_accuracy",
           "mean_length", "repetition")
SHORT = 64  # characters: a longer reference has too many right wordings to be compared letter by letter
RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then vary by a few hundredths of its width
NGRAM = 4

BUILT_IN_PROMPTS = ("Who are you?", "Name three colours.", "Explain in one sentence why the sky is blue.",
                    "Write a short poem about the sea.", "What is two plus two?")

Table = dict[str, np.ndarray]  # number -> float64 (rows, 2): numerator and denominator


def silent(what: str, total: int) -> Callable[[int], None]:
    """A progress bar that shows nothing."""
    return lambda done: None


@dataclass(frozen=True)
class Options:
    """How models are asked. batch_size: rows of a forward pass. bar(what, total) makes a function told of progress."""

    batch_size: int = 32
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    bar: Callable[[str, int], Callable[[int], None]] = silent


@dataclass(frozen=True)
class Case:
    """A row as a question: the messages up to the last trained assistant turn, and that turn as the reference.

    Plain text has no question: context is empty, and its loss is measured; --gen_only lets its opening be continued.
    """

    row: Row
    source: str
    context: list[dict]
    reference: str | None

    def asks(self, continued: bool) -> bool:
        """Whether a model can answer it; plain text counts where it is to be continued."""
        return bool(self.context) or (continued and self.row.messages is None)

    @property
    def prompt(self) -> str:
        """The last thing said before the answer; for plain text its beginning."""
        return self.context[-1]["content"] or "" if self.context else opening(self.row.text or "")


@dataclass
class Measured:
    """One model on the rows of one data set. N rows; `answers` and `texts` are None where a row asks nothing."""

    table: Table
    answers: list[Generated | None]
    texts: list[str | None]
    left_out: int = 0  # rows too long for the model's context: no loss


def opening(text: str, longest: int = 200) -> str:
    """The first words of a text, for a model to go on with: a quarter of it, at most `longest` characters."""
    most = min(longest, max(20, len(text) // 4))
    return text[:most].rsplit(None, 1)[0] if len(text) > most and len(text[:most].split()) > 1 else text[:most]


def make_case(row: Row, source: str) -> Case:
    """Turn a row into a question and its reference."""
    if row.messages is None:
        return Case(row, source, [], None)
    turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    last = max([i for i in turns if row.messages[i].get("train", True)] or turns)
    return Case(row, source, row.messages[:last], row.messages[last]["content"])


def response_bytes(row: Row, assistant_turns: str = "all") -> int:
    """Utf-8 bytes of what is trained of a row: its assistant turns, or all of a plain text."""
    if row.messages is None:
        return len(row.text.encode())
    turns = [m for m in row.messages if m["role"] == "assistant"]
    turns = turns[-1:] if assistant_turns == "last" else turns
    return sum(len((m["content"] or "").encode()) for m in turns if m.get("train", True))


# ---- from a model

def measure(model: nn.Module, chat: Chat, cases: list[Case], options: Options, *, plain: bool = False,
            context: int | None = None) -> Measured:
    """Loss and answers of all cases. plain: ask in plain text, and the first line said is the answer (a base model).

    context: rows of more tokens than this have no loss; they are counted in left_out.
    """
    encoded = chat.encode_rows([case.row for case in cases])
    fits = [i for i, e in enumerate(encoded) if e.trained.any() and (context is None or len(e.input_ids) <= context)]
    losses, hits = [np.zeros(0)] * len(cases), [np.zeros(0, bool)] * len(cases)
    found = score(model, [encoded[i] for i in fits], chat.pad_id, options.batch_size, options.bar("loss", len(fits)))
    for i, loss, hit in zip(fits, *found):
        losses[i], hits[i] = loss, hit
    n_bytes = [response_bytes(case.row, chat.assistant_turns) if len(loss) else 0 for case, loss in zip(cases, losses)]
    answers, texts = answer(model, chat, cases, options, plain=plain)
    table = loss_table(losses, hits, n_bytes) | answer_table(answers, texts, [case.reference for case in cases])
    return Measured(table, answers, texts, len(cases) - len(fits))


def score(model: nn.Module, examples: list[Encoded], pad_id: int, batch_size: int,
          progress: Callable[[int], None] = lambda n: None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Loss (nats, float64) and whether it was the likeliest (bool) of each example's trained tokens."""
    losses, hits = [np.zeros(0)] * len(examples), [np.zeros(0, bool)] * len(examples)
    if not examples:
        return losses, hits
    device = next(model.parameters()).device
    loss_model = LossModel(model, model.config._attn_implementation).eval()
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    choose_attention(loss_model, [examples[i] for i in order[-2:]], pad_id, "auto", packing=False)
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = make_batch([[examples[i]] for i in chosen], pad_id).to(device)
        loss, hit = (x.cpu().numpy() for x in loss_model.token_losses(batch))
        if not np.isfinite(loss).all():
            raise NotFinite("the model's loss is not finite. Its weights are broken, or overflow in this precision: "
                            "try --dtype float32.")
        for k, i in enumerate(chosen):
            losses[i], hits[i] = loss[batch.owners == k].astype(np.float64), hit[batch.owners == k]
        progress(len(chosen))
    return losses, hits


def answer(model: nn.Module, chat: Chat, cases: list[Case], options: Options, *, plain: bool = False,
           continued: bool = False) -> tuple[list[Generated | None], list[str | None]]:
    """The model's answer to every case that asks something, as ids and as text. continued: to plain text as well,
    whose opening is the prompt."""
    if plain:
        prompts = [chat.text_prompt_ids("\n".join(m["content"] or "" for m in case.context)) for case in cases]
    else:
        prompts = [chat.prompt_ids(case.context, case.row.tools) if case.context else [] for case in cases]
    if continued:
        prompts = [chat.text_prompt_ids(c.prompt) if c.row.messages is None else p for p, c in zip(prompts, cases)]
    asked = [i for i, prompt in enumerate(prompts) if prompt and cases[i].asks(continued)]
    written = generate(model, [prompts[i] for i in asked], max_new_tokens=options.max_new_tokens,
                       stop_ids=chat.stop_ids, pad_id=chat.pad_id, vocab_size=len(chat.tokenizer),
                       temperature=options.temperature, top_p=options.top_p, seed=options.seed,
                       batch_size=options.batch_size, progress=options.bar("answers", len(asked)))
    answers: list[Generated | None] = [None] * len(cases)
    texts: list[str | None] = [None] * len(cases)
    for i, one in zip(asked, written):
        answers[i], texts[i] = one, chat.decode(one.ids)
        if plain:
            texts[i] = next((line.strip() for line in texts[i].splitlines() if line.strip()), "")
    return answers, texts


# ---- the numbers

def loss_table(losses: list[np.ndarray], hits: list[np.ndarray], n_bytes: list[int]) -> Table:
    """Rows of per-token losses (nats) and hits -> loss, bits_per_byte, token_accuracy. Sums are float64."""
    nats = np.array([np.sum(x, dtype=np.float64) for x in losses])
    tokens = np.array([len(x) for x in losses], np.float64)
    right = np.array([np.sum(x) for x in hits], np.float64)
    return {"loss": np.stack([nats, tokens], 1), "token_accuracy": np.stack([right, tokens], 1),
            "bits_per_byte": np.stack([nats / math.log(2), np.array(n_bytes, np.float64)], 1)}


def answer_table(answers: list[Generated | None], texts: list[str | None], references: list[str | None]) -> Table:
    """Answers and references -> exact_match, starts_right, stopped, mean_length, repetition."""
    there = np.array([a is not None for a in answers], np.float64)
    short = np.array([a is not None and is_short(r) for a, r in zip(answers, references)], np.float64)
    exact = np.array([bool(s) and same_text(t, r) for s, t, r in zip(short, texts, references)], np.float64)
    starts = np.array([bool(s) and begins_with(t, r) for s, t, r in zip(short, texts, references)], np.float64)
    stopped = np.array([a is not None and a.stopped for a in answers], np.float64)
    lengths = np.array([0 if a is None else len(a.ids) for a in answers], np.float64)
    return {"exact_match": np.stack([exact, short], 1), "starts_right": np.stack([starts, short], 1),
            "stopped": np.stack([stopped, there], 1), "mean_length": np.stack([lengths, there], 1),
            "repetition": np.array([repeated(a.ids if a else []) for a in answers], np.float64).reshape(-1, 2)}


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
        over, under = table["loss" if name == "perplexity" else name].sum(0)
        found[name] = None if under == 0 else _finish(name, over / under)
    return found | {"rows": len(table["loss"]), "tokens": int(table["loss"][:, 1].sum()),
                    "short_references": int(table["exact_match"][:, 1].sum())}


def _finish(name: str, ratio: float | np.ndarray) -> float | np.ndarray:
    if name != "perplexity":
        return float(ratio) if np.ndim(ratio) == 0 else ratio
    with np.errstate(over="ignore"):
        value = np.minimum(np.exp(ratio), 1e300)  # JSON has no infinity
    return float(value) if np.ndim(value) == 0 else value


def compare(tuned: Table, baseline: Table | None = None, seed: int = 0) -> tuple[dict, dict, dict]:
    """95 % intervals (low, high) of the tuned means, of the baseline's, and of the differences with their value.

    Percentile bootstrap over rows (Efron 1979), seeded; both models are resampled with the same rows, which is what
    makes the interval of a difference narrow.
    """
    rows = len(tuned["loss"])
    own, other, apart = {}, {}, {}
    drawn = _resampled(tuned, rows, seed)
    drawn_base = _resampled(baseline, rows, seed) if baseline else {}
    for name, values in drawn.items():
        own[name] = _ends(values)
        if name in drawn_base:
            other[name] = _ends(drawn_base[name])
            low, high = _ends(values - drawn_base[name])
            value = summarise(tuned)[name] - summarise(baseline)[name]
            apart[name] = {"value": value, "low": low, "high": high}
    return own, other, apart


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(table: Table, rows: int, seed: int) -> dict[str, np.ndarray]:
    """The means in RESAMPLES draws of `rows` rows with replacement, for every number that was measured."""
    names = [n for n in METRICS if table["loss" if n == "perplexity" else n][:, 1].sum() > 0]
    rng, found = np.random.default_rng([seed, 6]), {n: np.empty(RESAMPLES) for n in names}
    step = max(1, 2_000_000 // max(rows, 1))  # draws at a time, for 16 MB of indices
    for start in range(0, RESAMPLES, step):
        index = rng.integers(0, rows, (min(step, RESAMPLES - start), rows))
        for name in names:
            values = table["loss" if name == "perplexity" else name]
            over, under = values[:, 0][index].sum(1), values[:, 1][index].sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                found[name][start:start + len(index)] = _finish(name, over / under)
    return found


def joined(tables: Iterable[Table]) -> Table:
    """Several tables as one: the rows of all data sets together."""
    tables = list(tables)
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def chosen_rows(table: Table, rows: list[int]) -> Table:
    """Some rows of a table."""
    return {name: values[rows] for name, values in table.items()}


def better_of(template: Measured, plain: Measured) -> tuple[Measured, dict[str, str]]:
    """The baseline: for its answers and for its loss the way of asking that suits it better, and which that was."""
    a, b = summarise(template.table), summarise(plain.table)
    plain_loss = b["bits_per_byte"] is not None and (
        a["bits_per_byte"] is None or b["bits_per_byte"] < a["bits_per_byte"])
    key = lambda means: (means["exact_match"] or 0.0, means["starts_right"] or 0.0)
    plain_answers = key(b) > key(a) or (key(b) == key(a) and plain_loss)
    said, lost = (plain if plain_answers else template), (plain if plain_loss else template)
    table = {name: (lost if name in ("loss", "token_accuracy", "bits_per_byte") else said).table[name]
             for name in template.table}
    names = {True: "plain", False: "template"}
    return (Measured(table, said.answers, said.texts, lost.left_out),
            {"answers": names[plain_answers], "loss": names[plain_loss]})


def trivial_answers(cases: list[Case], train_answers: Counter[str] | None = None) -> dict | None:
    """Exact match of the best answer that needs no model: always the most frequent one, or a part of the prompt.

    The most frequent answer is that of the training rows where they are known, else of these references. The best rule
    is picked on these very rows, so it is flattered. None if no reference is short.
    """
    pairs = [(c.prompt, c.reference) for c in cases if c.context and is_short(c.reference)]
    if not pairs:
        return None
    frequent = (train_answers or Counter(r.strip() for _, r in pairs)).most_common(1)[0][0]
    rules: dict[str, Callable[[str], str]] = {
        "most frequent answer": lambda p: frequent, "the prompt": lambda p: p,
        "last line of the prompt": lambda p: p.strip().splitlines()[-1] if p.strip() else "",
        "prompt after its last colon": lambda p: p.rpartition(":")[2]}
    for k in (1, 2, 3, 4):
        rules[f"last {k} words of the prompt"] = lambda p, k=k: " ".join(p.split()[-k:])
    scores = {name: sum(same_text(rule(p), r) for p, r in pairs) / len(pairs) for name, rule in rules.items()}
    best = max(scores, key=scores.get)
    return {"exact_match": scores[best], "rule": best, "most_frequent_answer": frequent,
            "most_frequent_of": "training rows" if train_answers else "these references", "rules": scores}


# ---- the results file

def results(sets: list[tuple[str, list[Case]]], tuned: list[Measured], baseline: list[tuple[Measured, dict]] | None,
            train_answers: Counter[str] | None = None, seed: int = 0) -> dict:
    """What eval_results.json holds of the numbers; the order is that of `sets`, (name, cases).

    The numbers at the top are those of the first set ("main"); those of a further set NAME follow as exact_match_NAME,
    likewise inside "baseline" and "majority". "datasets" has every set in full, "total" all rows together.
    """
    entries = {}
    for i, (name, cases) in enumerate(sets):
        base, forms = baseline[i] if baseline else (None, {})
        entries[name] = _entry(tuned[i].table, base.table if base else None, forms, seed)
        entries[name] |= {"left_out_too_long": tuned[i].left_out,
                          "answers_cut_by_context": sum(bool(a and a.cut) for a in tuned[i].answers),
                          "majority": trivial_answers(cases, train_answers)}
        kinds = Counter(case.source for case in cases)
        if len(kinds) > 1:
            entries[name]["sources"] = {kind: summarise(chosen_rows(tuned[i].table, [
                k for k, case in enumerate(cases) if case.source == kind])) for kind, _ in kinds.most_common(20)}
    total = _entry(joined(m.table for m in tuned), joined(m.table for m, _ in baseline) if baseline else None, {}, seed)
    main = next(iter(entries))
    found = {"main": main, "main_rule": "numbers at the top are those of this data set, NAME_X those of data set X",
             **{k: (dict(v) if isinstance(v, dict) else v) for k, v in entries[main].items()}}
    for name in list(entries)[1:]:
        found |= {f"{metric}_{name}": entries[name][metric] for metric in METRICS}
        for part in ("baseline", "majority"):
            if found[part] and entries[name][part]:
                names = METRICS if part == "baseline" else ("exact_match",)
                found[part] |= {f"{metric}_{name}": entries[name][part][metric] for metric in names}
    return found | {"datasets": entries, "total": total}


def _entry(tuned: Table, base: Table | None, forms: dict[str, str], seed: int) -> dict:
    """Means, intervals and comparison of one set of rows."""
    own, other, apart = compare(tuned, base, seed)
    entry = summarise(tuned) | {"intervals": own, "baseline": None, "difference": apart}
    if base:
        entry["baseline"] = summarise(base) | {"intervals": other} | ({"asked": forms} if forms else {})
    return entry


def samples(sets: list[tuple[str, list[Case]]], tuned: list[Measured],
            baseline: list[tuple[Measured, dict]] | None) -> list[dict]:
    """A line of samples.jsonl for each row: prompt, reference, answer, how it ended, its loss (nll: sum of nats)."""
    lines = []
    for i, (name, cases) in enumerate(sets):
        for k, case in enumerate(cases):
            answer, (nll, tokens) = tuned[i].answers[k], tuned[i].table["loss"][k]
            exact, short = tuned[i].table["exact_match"][k]
            line = {"dataset": name, "line": case.row.line, "source": case.source, "prompt": case.prompt,
                    "reference": case.reference, "prediction": tuned[i].texts[k],
                    "stopped": bool(answer and answer.stopped), "exact_match": bool(exact) if short else None,
                    "nll": float(nll) if tokens else None, "tokens": int(tokens)}
            if len(case.context) > 1:
                line["messages"] = case.context
            if baseline:
                line["baseline_prediction"] = baseline[i][0].texts[k]
                line["baseline_nll"] = float(baseline[i][0].table["loss"][k][0]) if tokens else None
            lines.append(line)
    return lines
