"""What a model learnt: rows -> questions -> losses and answers -> the numbers of scores.py, base beside tuned."""
from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from common.attention import causal_lm_of
from common.chat import Chat, Encoded
from common.data import fit
from common.faults import NotFinite
from common.generate import Generated, context_limit, fitting_threads, generate
from common.loss import LossModel, make_batch
from common.model import rope_limit, stop_ids_of
from common.probe import choose_attention
from common.rows import Row
from common.scores import (
    METRICS,
    OF_LOSSES,
    Table,
    answer_table,
    chosen_rows,
    compare,
    is_short,
    joined,
    loss_table,
    same_text,
    summarise,
)
from common.sides import prompt_hash
from common.team import ALONE, Team

if TYPE_CHECKING:
    from torch import nn

    from common.questions import EvalSet

BUILT_IN_PROMPTS = ("Who are you?", "Name three colours.", "Explain in one sentence why the sky is blue.",
                    "Write a short poem about the sea.", "What is two plus two?")


def silent(what: str, total: int) -> Callable[[int], None]:
    """A progress bar that shows nothing."""
    return lambda done: None


@dataclass(frozen=True)
class Options:
    """How models are asked. batch_size: rows of a forward pass. bar(what, total) makes a function told of progress.
    team: the processes that share the rows."""

    batch_size: int = 32
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    bar: Callable[[str, int], Callable[[int], None]] = silent
    team: Team = ALONE


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


def few(cases: Iterable[Case], count: int, seed: int) -> list[Case]:
    """At most `count` cases that ask different things, by a hash of seed and prompt, in turn from each source."""
    sources: dict[str, dict[bytes, Case]] = {}
    seen: set[bytes] = set()
    for case in cases:
        asked = [[m["role"], m["content"]] for m in case.context] or case.prompt
        key = hashlib.sha256(json.dumps([seed, asked]).encode()).digest()
        if key not in seen:
            seen.add(key)
            sources.setdefault(case.source, {})[key] = case
    turns = {key: turn for own in sources.values() for turn, key in enumerate(sorted(own))}
    found = {key: case for own in sources.values() for key, case in own.items()}
    return [found[key] for key in sorted(found, key=lambda key: (turns[key], key))[:count]]


def response_bytes(row: Row, assistant_turns: str = "all", shown: str = "") -> int:
    """Utf-8 bytes of what is trained of a row: its assistant turns with names and arguments of their tool calls (as
    JSON; not the ids, which no template writes) and the thoughts that are in `shown`, or all of a plain text."""
    if row.messages is None:
        return len(row.text.encode())
    turns = [m for m in row.messages if m["role"] == "assistant"]
    turns = turns[-1:] if assistant_turns == "last" else turns
    calls = lambda m: "".join(json.dumps(call.get("function", call), ensure_ascii=False)
                                for call in m.get("tool_calls") or [])
    thought = lambda m: of if (of := m.get("reasoning_content") or "").strip() in shown else ""
    said = lambda m: (m["content"] or "") + calls(m) + thought(m)
    return sum(len(said(m).encode()) for m in turns if m.get("train", True))


def _thinks(row: Row) -> bool:
    """Whether an answer of a row brings its thought in a key of its own."""
    return any(m.get("reasoning_content") for m in row.messages or ())


# ---- from a model

def measure(model: nn.Module, chat: Chat, cases: list[Case], options: Options, *, plain: bool = False,
            context: int | None = None) -> Measured:
    """Loss and answers of all cases. plain: ask in plain text, and the first line said is the answer where a short one
    is expected (a base model goes on and on).

    context: rows of more tokens than this are cut as in training; those of which an answer is lost by that have no
    loss, and are counted in left_out.
    """
    encoded = chat.encode_rows([case.row for case in cases])
    parts = [_windows(case.row, e, chat, context) for case, e in zip(cases, encoded)]
    found = score(model, [part for each in parts for part in each], chat.pad_id, options.batch_size, options.bar,
                  options.team)
    own = [iter(each) for each in found]  # of each part
    losses, hits = ([np.concatenate([*islice(of, len(each)), empty]) for each in parts]
                    for of, empty in zip(own, (np.zeros(0), np.zeros(0, bool))))
    shown = [chat.decode(e.input_ids[e.trained]) if _thinks(case.row) else "" for case, e in zip(cases, encoded)]
    n_bytes = [response_bytes(case.row, chat.assistant_turns, text) if len(loss) else 0
               for case, text, loss in zip(cases, shown, losses)]
    # control ids come from the template alone, so these are the true ends
    targets = [[part.input_ids[1:][part.trained[1:]] for part in each] for each in parts]  # nothing predicts the first
    ends = [np.isin(np.concatenate([np.zeros(0, np.int32), *each]), chat.stop_ids) for each in targets]
    answers, texts = answer(model, chat, cases, options, plain=plain)
    table = loss_table(losses, hits, n_bytes, ends) | answer_table(answers, texts, [case.reference for case in cases])
    return Measured(table, answers, texts, sum(not each for each in parts))


def _windows(row: Row, encoded: Encoded, chat: Chat, context: int | None) -> list[Encoded]:
    """The row, or what it is cut into to fit; none if nothing is trained in it, or an answer does not fit."""
    if context is None:
        return [encoded] if encoded.trained.any() else []
    counts: Counter[str] = Counter()
    windows = fit(row, encoded, chat, context, "split", counts)
    return [] if counts["answers dropped"] else windows


def measure_all(model: nn.Module, chat: Chat, sets: list[EvalSet], options: Options, who: str,
                say: Callable[[str], None], plain: bool = False) -> list[Measured]:
    """Measure a model on every set; `who` it is goes into the log."""
    context = context_limit(causal_lm_of(model))
    found = []
    for s in sets:
        started = time.time()
        found.append(measure(model, chat, s.cases, options, plain=plain, context=context))
        longer = f"; {found[-1].left_out:,} rows with answers that do not fit its {context:,} tokens have no loss" \
            if found[-1].left_out else ""
        say(f"{who}, {s.name}: {len(s.cases):,} rows in {time.time() - started:.0f} s{longer}")
    return found


def score(model: nn.Module, examples: list[Encoded], pad_id: int, batch_size: int,
          bar: Callable[[str, int], Callable[[int], None]] = silent,
          team: Team = ALONE) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Loss (nats, float64) and whether it was the likeliest (bool) of each example's trained tokens."""
    if not examples:
        return [], []
    loss_model = LossModel(model, model.config._attn_implementation).eval()
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    own, found = team.part(order), {}
    progress = bar("loss", len(own))
    with fitting_threads(model):
        choose_attention(loss_model, [examples[i] for i in order[-2:]], pad_id, "auto", packing=False)
        for chosen in passes(own, [len(e.input_ids) for e in examples], batch_size, rope_limit(model.config)):
            batch = make_batch([[examples[i]] for i in chosen], pad_id).to(next(model.parameters()).device)
            loss, hit = (x.cpu().numpy() for x in loss_model.token_losses(batch))
            if not np.isfinite(loss).all():
                raise NotFinite("the model's loss is not finite. Its weights are broken, or overflow in this "
                                "precision: try --dtype float32.")
            found |= {i: (loss[batch.owners == k].astype(np.float64), hit[batch.owners == k])
                      for k, i in enumerate(chosen)}
            progress(len(chosen))
    found = team.together(found)
    return [found[i][0] for i in range(len(examples))], [found[i][1] for i in range(len(examples))]


def passes(order: list[int], lengths: list[int], batch_size: int, longest: int | None) -> Iterator[list[int]]:
    """Indices in portions of `batch_size`; what is of more tokens than `longest` by itself."""
    alone = [i for i in order if longest is not None and lengths[i] > longest]
    rest = [i for i in order if longest is None or lengths[i] <= longest]
    yield from ([i] for i in alone)
    yield from (rest[start:start + batch_size] for start in range(0, len(rest), batch_size))


def answer(model: nn.Module, chat: Chat, cases: list[Case], options: Options, *, plain: bool = False,
           continued: bool = False, longest: list[int] | None = None) -> tuple[list[Generated | None],
                                                                               list[str | None]]:
    """The model's answer to every case that asks something, as ids and as text. continued: to plain text as well,
    whose opening is the prompt. longest: tokens of each answer, in place of max_new_tokens."""
    if plain:
        prompts = [chat.text_prompt_ids("\n".join(m["content"] or "" for m in case.context)) for case in cases]
    else:
        prompts = [chat.prompt_ids(case.context, case.row.tools) if case.context else [] for case in cases]
    if continued:
        prompts = [chat.text_prompt_ids(c.prompt) if c.row.messages is None else p for p, c in zip(prompts, cases)]
    asked = [i for i, prompt in enumerate(prompts) if prompt and cases[i].asks(continued)]
    places = {i: k for k, i in enumerate(asked)}  # the place among all decides what is drawn
    own = options.team.part(sorted(asked, key=lambda i: -len(prompts[i])))
    written = generate(model, [prompts[i] for i in own],
                       max_new_tokens=[longest[i] for i in own] if longest else options.max_new_tokens,
                       stop_ids=stop_ids_of(model, chat), pad_id=chat.pad_id, vocab_size=len(chat.tokenizer),
                       temperature=options.temperature, top_p=options.top_p, seed=options.seed,
                       places=[places[i] for i in own], batch_size=options.batch_size,
                       progress=options.bar("answers", len(own)))
    found = options.team.together(dict(zip(own, written)))
    answers = [found.get(i) for i in range(len(cases))]
    texts = [None if one is None else chat.said(one.ids) for one in answers]
    if plain:
        texts = [first_line(t) if t is not None and is_short(c.reference) else t for t, c in zip(texts, cases)]
    return answers, texts


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# ---- beside others

def with_system(sets: list[EvalSet], system_prompt: str | None) -> list[EvalSet]:
    """The same questions, with the system turn that the tuned model's template puts before those that have none."""
    if system_prompt is None:
        return sets

    def told(case: Case) -> Case:
        if not case.row.messages or case.row.messages[0]["role"] == "system":
            return case
        turn = {"role": "system", "content": system_prompt}
        return replace(case, row=replace(case.row, messages=[turn, *case.row.messages]), context=[turn, *case.context])
    return [replace(s, cases=[told(case) for case in s.cases]) for s in sets]


def with_calls(sets: list[EvalSet], chat: Chat) -> list[EvalSet]:
    """The same questions, with answers that call tools as the template writes them: content alone is half of such a
    reference, or nothing."""

    def told(case: Case) -> Case:
        if case.reference is None:
            return case
        answer = case.row.messages[len(case.context)]
        if not answer.get("tool_calls"):
            return case
        turns = [*({**m, "train": False} for m in case.context), {**answer, "train": True}]
        encoded = chat.encode_rows([replace(case.row, messages=turns)])[0]
        return replace(case, reference=chat.said(encoded.input_ids[encoded.trained]))
    return [replace(s, cases=[told(case) for case in s.cases]) for s in sets]


def best_of(ways: dict[str, Measured]) -> tuple[Measured, dict[str, str]]:
    """The baseline: for its answers and for its loss the way of asking that suits it best, and which these were."""
    means = {way: summarise(measured.table) for way, measured in ways.items()}
    bits = {way: found["bits_per_byte"] for way, found in means.items() if found["bits_per_byte"] is not None}
    loss = min(bits, key=bits.get) if bits else next(iter(ways))
    answers = max(ways, key=lambda way: (*(means[way][name] or 0.0 for name in ("exact_match", "starts_right", "chrf")),
                                         way == loss))
    said, lost = ways[answers], ways[loss]
    table = {name: (lost if name in OF_LOSSES else said).table[name] for name in said.table}
    return Measured(table, said.answers, said.texts, lost.left_out), {"answers": answers, "loss": loss}


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
        entries[name] = _entry(tuned[i].table, base.table if base else None, forms, seed, prompts_of(cases))
        entries[name] |= {"left_out_too_long": tuned[i].left_out,
                          "answers_cut_by_context": sum(bool(a and a.cut) for a in tuned[i].answers),
                          "majority": trivial_answers(cases, train_answers)}
        kinds = Counter(case.source for case in cases)
        if len(kinds) > 1:
            entries[name]["sources"] = {kind: summarise(chosen_rows(tuned[i].table, [
                k for k, case in enumerate(cases) if case.source == kind])) for kind, _ in kinds.most_common(20)}
    total = _entry(joined(m.table for m in tuned), joined(m.table for m, _ in baseline) if baseline else None, {}, seed,
                   prompts_of(case for _, cases in sets for case in cases))
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


def prompts_of(cases: Iterable[Case]) -> np.ndarray:
    """A number for each case, the same for those that begin with the same prompt (replies of one conversation tree)."""
    return np.unique([prompt_hash(case.row.first_prompt()) for case in cases], return_inverse=True)[1]


def _entry(tuned: Table, base: Table | None, forms: dict[str, str], seed: int, prompts: np.ndarray) -> dict:
    """Means, intervals and comparison of one set of rows."""
    own, other, apart = compare(tuned, base, seed, prompts)
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
            per_row = {m: over / under if under else None for m in ("rouge_l", "chrf", "end_probability")
                       for over, under in [tuned[i].table[m][k].tolist()]}
            line = {"dataset": name, "line": case.row.line, "source": case.source, "prompt": case.prompt,
                    "reference": case.reference, "prediction": tuned[i].texts[k],
                    "stopped": bool(answer and answer.stopped), "exact_match": bool(exact) if short else None,
                    **per_row, "nll": float(nll) if tokens else None, "tokens": int(tokens)}
            if len(case.context) > 1:
                line["messages"] = case.context
            if baseline:
                line["baseline_prediction"] = baseline[i][0].texts[k]
                nll, tokens = baseline[i][0].table["loss"][k]
                line |= {"baseline_nll": float(nll) if tokens else None, "baseline_tokens": int(tokens)}
            lines.append(line)
    return lines
