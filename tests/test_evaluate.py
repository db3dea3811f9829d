"""Generation gives the same answers in any batch; the numbers are right by hand; 06 finds model, tokenizer, rows."""
from __future__ import annotations

import importlib
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import chat_rows, make_llama, write_rows
from forks import fork_main

from common.chat import Encoded, load_chat
from common.evaluate import (
    Measured,
    Options,
    best_of,
    few,
    make_case,
    measure,
    response_bytes,
    results,
    score,
    trivial_answers,
    with_calls,
    with_system,
)
from common.faults import NotFinite, UserError, run_main, say
from common.generate import Generated, generate
from common.questions import EvalSet, built_in
from common.rows import Row
from common.scores import (
    METRICS,
    OF_LOSSES,
    answer_table,
    compare,
    loss_table,
    on_same_rows,
    repeated,
    rouge_l,
    same_text,
    summarise,
)

SCRIPT = importlib.import_module("06_eval_sft")
V = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A random model whose greedy answers vary and stop at different lengths."""
    from transformers import AutoModelForCausalLM

    place = make_llama(tmp_path_factory.mktemp("llama"), V, context=64, kv_heads=1, seed=3)
    return AutoModelForCausalLM.from_pretrained(place).eval()


def test_few_prompts_are_different_and_from_all_data_sets():
    """Guards against one prompt answered twice, prompts of the first data set alone, and a choice that moves."""
    def case(i, prompt, source):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"answer {i}", "train": True}]
        return make_case(Row(i, turns), source)

    cases = [case(i, f"prompt {i % 50}", "large") for i in range(500)] + [
        case(i, f"prompt {40 + i % 20}", "small") for i in range(60)] + [make_case(Row(1, None, "a b c"), "text")]
    chosen = few(cases, 9, 1)
    assert len({c.prompt for c in chosen}) == 9
    assert Counter(c.source for c in chosen) == {"large": 4, "small": 4, "text": 1}
    assert few(cases, 9, 1) == chosen != few(cases, 9, 2)
    assert few(cases, 3, 1) == chosen[:3] and len({c.source for c in chosen[:3]}) == 3
    assert len(few(cases, 1000, 1)) == 61  # 60 prompts and a text
    many = [case(i, f"prompt {i}", f"page {i}") for i in range(1000)]
    assert len({c.source for c in few(many, 5, 1)} & {f"page {i}" for i in range(50)}) < 5  # not the first ones


def prompts(count: int = 24, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, V, size=int(n)).tolist() for n in rng.integers(1, longest, size=count)]


SETTINGS = {"max_new_tokens": 20, "stop_ids": [3, 7, 11, 13], "pad_id": 0}


def library_answer(model: torch.nn.Module, prompt: list[int]) -> Generated:
    """The answer by transformers, one prompt alone."""
    room = min(20, 64 - len(prompt))
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         max_new_tokens=room, do_sample=False, eos_token_id=SETTINGS["stop_ids"], pad_token_id=0)
    ids = out[0, len(prompt):].tolist()
    stopped = ids[-1] in SETTINGS["stop_ids"]
    return Generated(ids[:-1] if stopped else ids, stopped, cut=room < 20 and not stopped)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sft_packed"])
def test_batched_answers_equal_those_of_the_library_one_by_one(llama: torch.nn.Module, attention: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against padding that is attended to, positions that count padding, rows mixed up when others leave the
    batch or when the cache grows, answers out of order, and training's attention path (which has no cache) being used
    to generate."""
    monkeypatch.setattr("common.generate.ROOM", 7)
    asked = prompts()
    expected = [library_answer(llama, p) for p in asked]
    assert 3 < sum(e.stopped for e in expected) < len(expected), "the test needs answers that stop and that do not"
    llama.set_attn_implementation(attention)
    try:
        for batch_size, budget in ((1, 10**6), (5, 10**6), (64, 10**6), (64, 150)):
            found = generate(llama, asked, **SETTINGS, batch_size=batch_size, max_batch_tokens=budget)
            assert found == expected, (batch_size, budget)
        assert llama.config._attn_implementation == attention
    finally:
        llama.set_attn_implementation("sdpa")


HYBRIDS = {"lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
           "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "num_experts": 0,
                          "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
                          "linear_value_head_dim": 16, "mlp_only_layers": [0, 1]}}


@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_leave_the_batch_of_a_model_with_states(name: str) -> None:
    """Guards against a traceback as soon as one answer ends before another: states have no selection of rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        name, vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=2,
        eos_token_id=3, **HYBRIDS[name])).eval()
    asked = [(p * 8)[:8] for p in prompts()]
    expected = [library_answer(model, p) for p in asked]
    assert 1 < sum(e.stopped for e in expected) < len(expected)
    assert generate(model, asked, **SETTINGS, batch_size=64) == expected


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_turn_by_the_longest_row_of_a_pass(kind: str, spm_unigram: str) -> None:
    """Guards against losses and answers of short rows that depend on a long one beside them (the long Phi models)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rope = {"rope_theta": 100.0, "rope_type": kind} | ({"factor": 4.0} if kind == "dynamic" else {
        "original_max_position_embeddings": 16, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "phi3" if kind == "longrope" else "llama", vocab_size=V, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0,
        max_position_embeddings=64 if kind == "longrope" else 16, original_max_position_embeddings=16,
        rope_parameters=rope)).eval()
    draw = np.random.default_rng(0)
    examples = [Encoded(draw.integers(4, V, n).astype(np.int32), np.ones(n, bool)) for n in (6, 14, 9, 30, 12, 25)]
    alone, _ = score(model, examples, pad_id=0, batch_size=1)
    together, _ = score(model, examples, pad_id=0, batch_size=8)
    for one, other in zip(alone, together):
        np.testing.assert_allclose(one, other, atol=1e-4)
    if kind == "longrope":
        asked = [e.input_ids.tolist() for e in examples]
        settings = {"max_new_tokens": 4, "stop_ids": [3], "pad_id": 0}
        assert generate(model, asked, **settings, batch_size=1) == generate(model, asked, **settings, batch_size=8)


def test_one_thread_for_little_work_alone(llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against prompts and losses of a small model on one thread, single tokens on all, and a setting that is
    left behind."""
    size, seen = sum(p.numel() for p in llama.parameters()), []
    monkeypatch.setattr("common.generate.LITTLE_WORK", 10 * size)
    hook = llama.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        generate(llama, [[5] * 10], max_new_tokens=3, stop_ids=[], pad_id=0)
        example = Encoded(np.arange(1, 13, dtype=np.int32), np.ones(12, bool))
        score(llama, [example], pad_id=0, batch_size=1)
        assert seen[:3] == [2, 1, 1] and set(seen[3:]) == {2} and torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(1)


def test_sampled_answers_are_a_function_of_seed_and_row(llama: torch.nn.Module) -> None:
    """Guards against a shared generator, with which an answer depends on its neighbours and on the batch size."""
    asked = prompts(16)
    how = {**SETTINGS, "temperature": 1.5, "top_p": 0.9}
    one = generate(llama, asked, **how, seed=1, batch_size=1)
    assert generate(llama, asked, **how, seed=1, batch_size=16) == one
    assert generate(llama, asked, **how, seed=2, batch_size=16) != one
    same = generate(llama, [asked[0]] * 8, **how, seed=1)
    assert len({tuple(a.ids) for a in same}) > 1, "the same prompt in two rows is drawn twice"


def test_a_tiny_nucleus_is_greedy(llama: torch.nn.Module) -> None:
    """Guards against top_p that drops the likeliest token or keeps all of them."""
    asked = prompts(8)
    assert generate(llama, asked, **SETTINGS, temperature=3.0, top_p=1e-9) == generate(llama, asked, **SETTINGS)


def test_rows_without_a_token_are_never_produced(llama: torch.nn.Module) -> None:
    """Guards against spare rows of a padded embedding in an answer: they decode to nothing."""
    for temperature in (0.0, 5.0):
        found = generate(llama, prompts(), **SETTINGS, vocab_size=20, temperature=temperature)
        assert max(i for a in found for i in a.ids) < 20


def test_the_context_is_never_exceeded(llama: torch.nn.Module) -> None:
    """Guards against positions the model has never had, and against a cut answer that looks like a finished one."""
    asked = [[5] * 63, [5] * 64, [5] * 70, [5] * 10]
    found = generate(llama, asked, max_new_tokens=20, stop_ids=[], pad_id=0)
    assert [len(a.ids) for a in found] == [1, 0, 0, 20]
    assert [a.cut for a in found] == [True, True, True, False] and not any(a.stopped for a in found)


def test_progress_counts_every_prompt_once(llama: torch.nn.Module) -> None:
    """Guards against a bar that never fills."""
    told: list[int] = []
    generate(llama, [*prompts(), [5] * 64], **SETTINGS, batch_size=4, progress=told.append)
    assert sum(told) == 25


def test_a_broken_model_is_named_not_decoded(llama: torch.nn.Module) -> None:
    """Guards against NaN logits, whose largest is token 0."""
    from copy import deepcopy

    broken = deepcopy(llama)
    broken.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(NotFinite, match="not finite"):
        generate(broken, prompts(2), **SETTINGS)


def test_losses_do_not_depend_on_the_batch(llama: torch.nn.Module, tiny_model: str, spm_unigram: str) -> None:
    """Guards against padding or neighbours in the loss; equal to 1e-7 relative, and to the model's own full logits."""
    from common.model import load_model
    from common.probe import reference_losses

    chat = load_chat(spm_unigram, "instruct")
    model = load_model(tiny_model).eval()
    rows = [Row(i, [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"],
                                                               "train": True}]) for i, r in enumerate(chat_rows(20))]
    examples = chat.encode_rows(rows)
    means = []
    for size in (1, 7, 20):
        losses, hits = score(model, examples, chat.pad_id, size)
        assert [len(x) for x in losses] == [int(e.trained.sum()) for e in examples] == [len(x) for x in hits]
        means.append(sum(x.sum() for x in losses) / sum(map(len, losses)))
    assert max(means) - min(means) <= 1e-7 * means[0]
    model.set_attn_implementation("eager")
    for own, reference in zip(losses, reference_losses(model, examples)):
        assert np.abs(own - reference).max() < 1e-5


def test_numbers_by_hand() -> None:
    """Guards against a mean of row means: 3 tokens of 1 nat and 1 token of 5 nats are 2 nats a token, not 3."""
    ends = [np.array([0, 0, 1], bool), np.array([1], bool)]
    table = loss_table([np.ones(3), np.array([5.0])], [np.array([1, 1, 0], bool), np.array([1], bool)], [6, 2], ends)
    table |= answer_table([Generated([1, 2, 3, 4, 1, 2, 3, 4], True), Generated([1], False)], ["four apples", "Red "],
                          ["four", "Red"])
    found = summarise(table)
    assert found["loss"] == 2.0 and found["perplexity"] == math.exp(2.0) and found["token_accuracy"] == 0.75
    assert found["bits_per_byte"] == pytest.approx(8 / math.log(2) / 8)
    assert found["exact_match"] == 0.5 and found["starts_right"] == 1.0 and found["stopped"] == 0.5
    assert found["end_probability"] == (math.exp(-1) + math.exp(-5)) / 2
    assert found["mean_length"] == 4.5 and found["repetition"] == 0.2 and (found["rows"], found["tokens"]) == (2, 4)


@pytest.mark.parametrize("a, b, same", [("e\u0301", "\u00e9", True), (" x\n", "x", True), ("Red", "red", False),
                                        ("a  b", "a b", False)])
def test_exact_match_is_nfc_stripped_case_kept(a: str, b: str, same: bool) -> None:
    """Guards against two spellings of the same letter, and against forgiving what was not asked for."""
    assert same_text(a, b) is same


def test_a_thought_is_not_compared_with_an_answer_that_has_none() -> None:
    """Guards against a right answer after a trained thought that counts as wrong."""
    said = "<think>\n6*7\n</think>\n\n42"
    answers = [Generated([1])] * 3
    found = answer_table(answers, [said, said, "42"], ["42", said, said])
    assert found["exact_match"][:, 0].tolist() == [1, 0, 0] and found["chrf"][0, 0] == found["chrf"][1, 0] == 1


def test_long_references_are_not_compared() -> None:
    """Guards against an exact match of 0 on essays: only one line of at most 64 characters has one right wording."""
    answers, references = [Generated([1], True)] * 4, ["x" * 64, "x" * 65, "a\nb", None]
    table = answer_table(answers, [r or "" for r in references], references)
    assert table["exact_match"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert summarise(table | loss_table([np.zeros(0)] * 4, [np.zeros(0, bool)] * 4, [0] * 4,
                                        [np.zeros(0, bool)] * 4))["loss"] is None


def test_repetition_counts_what_came_before() -> None:
    """Guards against an off-by-one in the 4-grams: a a a a a has two, one of them repeated."""
    assert repeated([1, 1, 1, 1, 1]) == (1, 2) and repeated([1, 2, 3]) == (0, 0)


def tables(rows: int, seed: int, chance: float) -> dict:
    rng = np.random.default_rng(seed)
    right = rng.random(rows) < chance
    table = answer_table([Generated([1], True)] * rows, ["a" if r else "b" for r in right], ["a"] * rows)
    ends = [np.array([0, 0, 1], bool)] * rows
    return table | loss_table([rng.random(3) for _ in range(rows)], [np.ones(3, bool)] * rows, [3] * rows, ends)


def test_intervals_are_seeded_and_as_wide_as_theory_says() -> None:
    """Guards against intervals of tokens or of the wrong rows: the half width of a share is 1.96 sqrt(pq/n)."""
    table = tables(400, 0, 0.7)
    own, _, _ = compare(table, seed=5)
    assert compare(table, seed=5)[0] == own != compare(table, seed=6)[0]
    low, high = own["exact_match"]
    share = summarise(table)["exact_match"]
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 400), rel=0.1)


def test_a_difference_is_paired() -> None:
    """Guards against resampling the two models apart: equal tables differ by exactly nothing."""
    table = tables(50, 0, 0.5)
    _, _, apart = compare(table, table)
    assert all((d["value"], d["low"], d["high"]) == (0, 0, 0) for d in apart.values())


def test_intervals_do_not_depend_on_the_order_of_rows() -> None:
    """Guards against a bootstrap that draws places in the file: the same rows in another order gave other intervals."""
    a, b, mixed = tables(50, 0, 0.5), tables(50, 1, 0.7), np.random.default_rng(2).permutation(50)
    moved = [{name: values[mixed] for name, values in table.items()} for table in (a, b)]
    for found, expected in zip(compare(*moved, seed=5), compare(a, b, seed=5)):
        assert found.keys() == expected.keys() == {m for m in METRICS if m != "repetition"}
        for name in found:
            assert np.allclose(*(list(x[name].values()) if isinstance(x[name], dict) else x[name]
                                 for x in (found, expected)), rtol=1e-12, atol=0)


def test_intervals_of_a_model_are_its_own() -> None:
    """Guards against draws that move when another model stands beside it or its answers are cut elsewhere."""
    a, b, prompts = tables(50, 0, 0.5), tables(50, 1, 0.7), np.random.default_rng(2).permutation(50)
    longer = a | {"mean_length": a["mean_length"] * [3, 1]}
    alone = compare(a, seed=5, prompts=prompts)[0]
    assert compare(a, b, seed=5, prompts=prompts)[0] == alone and compare(b, a, seed=5, prompts=prompts)[1] == alone
    found = compare(longer, seed=5, prompts=prompts)[0]
    assert found.pop("mean_length") != alone.pop("mean_length") and found == alone
    assert compare(a, b, seed=5)[0] == compare(a, seed=5)[0]


def test_a_difference_is_of_rows_that_both_could_read() -> None:
    """Guards against a model with a short context that looks better because the long rows are missing from its mean."""
    a, b = tables(20, 0, 0.5), tables(20, 0, 0.5)
    b["loss"][7:] = b["bits_per_byte"][7:] = b["token_accuracy"][7:] = b["end_probability"][7:] = 0
    assert summarise(a)["loss"] != summarise(b)["loss"]
    assert all(d["value"] == d["low"] == d["high"] == 0 for d in compare(a, b)[2].values())
    assert on_same_rows(a, b)[0]["exact_match"][:, 1].sum() == 20


GOLDEN_TEXTS = [  # answer, reference
    ("The cat sat on the mat.", "the cat was sitting on the mat"), ("Blue!", "blue"), ("", "something"),
    ("a b c", "c b a"), ("two words", "two words"), ("line one\nline two", "line two\nline one"), ("кот", "кот"),
    ("żółw je", "żółw je liść"), ("猫が好き", "犬が好き"), ("x = 3", "x = 4"), ("!!!", "!!!"),
    ("The answer is 42", "42"), (" spaced  out ", "spaced out")]


def test_likeness_is_that_of_the_reference_libraries() -> None:
    """Guards against another tokenisation or averaging than the published one, and against a ROUGE of 0 for scripts
    that it cannot read."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    answers, texts, references = [Generated([1], True)] * len(GOLDEN_TEXTS), *map(list, zip(*GOLDEN_TEXTS))
    table = answer_table(answers, texts, references)
    readable = [(t, r) for t, r in GOLDEN_TEXTS if r not in ("кот", "犬が好き", "!!!")]
    theirs = [RougeScorer(["rougeL"], use_stemmer=False).score(r, t)["rougeL"].fmeasure for t, r in readable]
    over, under = table["rouge_l"].sum(0)
    assert (over / under, under) == (pytest.approx(np.mean(theirs), rel=1e-12), len(readable))
    theirs = [CHRF().sentence_score(t, [r]).score / 100 for t, r in GOLDEN_TEXTS]
    assert table["chrf"][:, 0].tolist() == pytest.approx(theirs, rel=1e-12)
    exact = [t.strip() == r.strip() for t, r in GOLDEN_TEXTS]
    short = [("\n" not in r) for _, r in GOLDEN_TEXTS]
    assert table["exact_match"].tolist() == [[e and s, s] for e, s in zip(exact, short)]
    assert rouge_l("42", "42") == 1 and rouge_l("x", "ответ 42") is None


def test_a_row_becomes_a_question() -> None:
    """Guards against asking for a turn that is context, and against bytes of turns that are not trained."""
    messages = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "first", "train": True},
                {"role": "user", "content": "q2"}, {"role": "assistant", "content": "żółw", "train": True},
                {"role": "user", "content": "q3"}, {"role": "assistant", "content": "no", "train": False}]
    case = make_case(Row(1, messages), "s")
    assert (case.prompt, case.reference, len(case.context)) == ("q2", "żółw", 3)
    assert response_bytes(case.row) == 5 + 7 and response_bytes(Row(1, None, "ab")) == 2
    thinks = Row(1, [{"role": "user", "content": "q"},
                     {"role": "assistant", "content": "ok", "reasoning_content": "hm hm", "train": True}])
    assert (response_bytes(thinks), response_bytes(thinks, shown="<think>hm hm</think>ok")) == (2, 7)
    assert make_case(Row(1, None, "ab"), "s").context == []


def cases(pairs: list[tuple[str, str]]) -> list:
    return [make_case(Row(i, [{"role": "user", "content": p}, {"role": "assistant", "content": r, "train": True}]), "s")
            for i, (p, r) in enumerate(pairs)]


def test_rules_without_a_model() -> None:
    """Guards against a baseline that is too weak: copying must be tried beside the most frequent answer."""
    found = trivial_answers(cases([("Last? a b c", "c"), ("Last? d e", "e"), ("Last? x", "no")]))
    assert found["exact_match"] == pytest.approx(2 / 3) and found["rule"] == "last 1 words of the prompt"
    assert trivial_answers(cases([("q", "yes"), ("w", "no")]), Counter({"no": 3}))["exact_match"] == 0.5
    assert trivial_answers(cases([("q", "x" * 65)])) is None


def test_the_better_way_of_asking_counts_for_the_base() -> None:
    """Guards against a base that loses for free because it has never seen the chat tokens."""
    plain, template = (Measured(tables(20, 1, chance), [], []) for chance in (0.9, 0.0))
    best, asked = best_of({"template": template, "plain": plain})
    assert asked["answers"] == "plain"
    assert summarise(best.table)["exact_match"] == summarise(plain.table)["exact_match"]
    own = Measured(tables(20, 2, 1.0), [], [])
    assert best_of({"template": template, "plain": plain, "its own template": own})[1]["answers"] == "its own template"


def test_the_base_is_told_what_the_tuned_model_is_told() -> None:
    """Guards against a base that is asked without the run's system prompt: the difference is partly the prompt's."""
    asked, told = cases([("q", "a"), ("w", "b")])
    told.row.messages.insert(0, {"role": "system", "content": "mine"})
    told = make_case(told.row, "s")
    sets = [EvalSet("one", "x", [asked, told, make_case(Row(3, None, text="plain"), "s")])]
    assert with_system(sets, None) == sets
    found = with_system(sets, "be brief")[0].cases
    assert [m["content"] for m in found[0].context] == ["be brief", "q"] == [
        m["content"] for m in found[0].row.messages[:2]]
    assert found[1:] == sets[0].cases[1:]


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Guards against intervals that shrink when every row is there four times (the replies of a conversation tree)."""
    table, prompts = tables(60, 0, 0.5), np.arange(60)
    four = {name: np.repeat(values, 4, 0) for name, values in table.items()}
    once, often = compare(table, seed=1, prompts=prompts)[0], compare(four, seed=1, prompts=np.repeat(prompts, 4))[0]
    assert all(np.allclose(once[name], often[name]) for name in once)
    low, high = compare(four, seed=1)[0]["exact_match"]
    assert high - low < 0.7 * (once["exact_match"][1] - once["exact_match"][0])
    assert compare(four, seed=1, prompts=np.zeros(240, int)) == compare(four, seed=1)  # one prompt alone: its rows


def test_rows_of_tool_calls_have_bytes_and_intervals_are_finite() -> None:
    """Guards against a loss that is divided by no bytes: infinite bits, which JSON does not take, after hours. And
    against bytes that no model has to predict: ids in the file."""
    call = {"role": "assistant", "content": None, "train": True,
            "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "look", "arguments": {"a": "ü"}}}]}
    assert response_bytes(Row(1, [{"role": "user", "content": "q"}, call])) == len(json.dumps(
        call["tool_calls"][0]["function"], ensure_ascii=False).encode())
    table = tables(3, 0, 1.0)
    table["bits_per_byte"][1:, 1] = 0.0  # rows without bytes all the same: a draw of them alone is left out
    json.dumps(compare(table, table), allow_nan=False)


def test_the_reference_of_a_call_is_what_the_template_writes(spm_unigram: str) -> None:
    """Guards against a right call that scores nothing, and an answer without its call that scores everything."""
    answer = {"role": "assistant", "content": "Wait.", "train": True,
              "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}]}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "train": True},
             {"role": "user", "content": "r"}]
    rows = Row(1, [*turns, answer]), Row(2, turns[:2]), Row(3, None, "t")
    cases = [make_case(row, "") for row in rows]
    chat = load_chat(spm_unigram, "chatml")
    found = with_calls([EvalSet("s", "s.jsonl", cases)], chat)[0].cases
    assert [case.reference for case in found] == [
        'Wait.\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>', "b", None]
    assert with_calls([built_in()], chat) == [built_in()]  # these have no answer


def test_a_reader_that_leaves_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `… | head`, which ended the evaluation with status 0 before its files were written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        say("nobody reads this", "nor this")
        say("nor this")


def test_what_other_processes_alone_meet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rank whose loss is not finite and that ends without a word."""
    import torch.distributed as dist

    from common.faults import SaidElsewhere
    from common.team import joined_team

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"init_process_group": None, "get_rank": 1, "destroy_process_group": None}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value, **__: value)
    for fault, seen in ((NotFinite("x"), NotFinite), (UserError("x"), SaidElsewhere)):
        with pytest.raises(seen), joined_team():
            raise fault


def test_numbers_at_the_top_are_those_of_the_first_data_set() -> None:
    """Guards against a mean over data sets where the held-out prompts are asked for."""
    sets = [(name, cases([("q", "a")] * 10)) for name in ("heldout", "new_words")]
    tuned = [Measured(tables(10, i, chance), [None] * 10, [None] * 10) for i, chance in enumerate((1.0, 0.0))]
    base = [(Measured(tables(10, 9, 0.0), [None] * 10, [None] * 10), {"answers": "plain", "loss": "plain"})] * 2
    found = results(sets, tuned, base)
    assert (found["main"], found["exact_match"], found["exact_match_new_words"]) == ("heldout", 1.0, 0.0)
    assert found["baseline"]["exact_match"] == found["baseline"]["exact_match_new_words"] == 0.0
    assert found["majority"]["exact_match"] == 1.0 and found["total"]["exact_match"] == 0.5
    assert found["datasets"]["heldout"]["difference"]["exact_match"]["value"] == 1.0
    json.dumps(found, allow_nan=False)


# ---- the script

@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, spm_unigram: str, tiny_model: str) -> Path:
    """What a finished LoRA run leaves (chatml, so with two tokens more than the .model), untrained."""
    from common.adapters import add_lora, save_adapter
    from common.model import add_tokens, load_model, save_full, set_special_ids
    from common.settings import SftConfig

    root = tmp_path_factory.mktemp("work")
    place = root / "checkpoints" / "sft" / "first"
    chat = load_chat(spm_unigram, "chatml")
    model = load_model(tiny_model)
    token_ids, _ = add_tokens(model, chat, 0)
    set_special_ids(model, chat)
    (place / "base").mkdir(parents=True)
    save_full(model, place / "base", torch.float32)
    model.name_or_path = model.config._name_or_path = str(place / "base")
    save_adapter(add_lora(model, SftConfig(model_path=tiny_model), token_ids), place)
    chat.save(place)
    rows = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "red cat"}],
             "source": "ab"[i % 2]} for i, r in enumerate(chat_rows(12))]
    write_rows(place / "val.jsonl", rows)
    config = {"model_path": tiny_model, "tokenizer_path": spm_unigram, "prompt_template": "chatml",
              "dataset_paths": [str(place / "val.jsonl")], "assistant_turns": "all", "use_lora": True}
    (place / "run.json").write_text(json.dumps({"config": config}))
    (place / "run_status.json").write_text(json.dumps({"status": "finished"}))
    return place


def evaluate(run: Path, *argv: str) -> int:
    before = os.getcwd()
    os.chdir(run.parents[2])
    try:
        return run_main(SCRIPT.main, list(argv))
    finally:
        os.chdir(before)


def test_alone_gen_only_takes_the_newest_finished_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Guards against a default that needs a path, takes an unfinished run, or overwrites other samples."""
    unfinished = run.parent / "second"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "run_status.json").write_text(json.dumps({"status": "running"}))
    assert evaluate(run, "--gen_only", "--max_new_tokens", "4") == 0
    out = capsys.readouterr().out
    assert f"model {Path('checkpoints/sft/first')}, the newest finished run" in out and out.count("\n> ") == 5
    assert len((run / "eval" / "gen_samples.jsonl").read_text().splitlines()) == 5
    assert not (run / "eval" / "eval_results.json").exists()


def test_gen_only_takes_questions_without_answers(run: Path, tmp_path: Path) -> None:
    """Guards against a file of one's own questions refused, and an answer that is there lost."""
    asked = [{"prompt": "who sees the cat", "response": "the dog"}, {"prompt": "who sees the bird"},
             {"messages": [{"role": "user", "content": "what is a stone"}]}, {"prompt": "is it ?", "response": "?"},
             {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello you"}]},
             {"instruction": "one two", "output": None}, {"text": "the old house sees the river and the tree"}]
    rows = write_rows(tmp_path / "asked.jsonl", asked)
    argv = ["--dataset_paths", str(rows), "--gen_only", "--num_gen_samples", "9", "--max_new_tokens", "3"]
    assert evaluate(run, *argv, "--output_dir", str(tmp_path / "out")) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "gen_samples.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines[:6]] == ["the dog", None, None, "?", "hello you", None]
    assert len(lines) == 7 and all(line["prediction"] is not None for line in lines)

    (tmp_path / "asked.csv").write_text("prompt\nwho sees the cat\nwhat is a tree\n")
    argv[1] = str(tmp_path / "asked.csv")
    assert evaluate(run, *argv, "--output_dir", str(tmp_path / "out")) == 0
    assert len((tmp_path / "out" / "gen_samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_is_measured_beside_the_raw_tokenizer(run: Path, spm_unigram: str, tmp_path: Path, merged: bool,
                                                    capsys: pytest.CaptureFixture) -> None:
    """Guards against the raw .model replacing the run's tokenizer (its chat tokens would be lost), against files that
    are missing or not JSON, and against --no_lora without effect."""
    more = ["--no_lora"] if merged else []
    assert evaluate(run, "--model_path", "checkpoints/sft/first", "--tokenizer_path", spm_unigram, "--dataset_paths",
                    str(run / "val.jsonl"), "--prompt_template", "chatml", "--max_eval_samples", "8",
                    "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out"), *more) == 0
    out = capsys.readouterr().out
    assert "it agrees with" in out and "has 2 tokens more" in out and "chatml, as saved with the model" in out
    assert ("merged into its base in memory" in out) is merged
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert found["rows"] == 8 and found["baseline"]["rows"] == 8 and found["majority"]["exact_match"] == 1.0
    assert found["loss"] == pytest.approx(math.log(found["perplexity"])) and set(found["sources"]) == {"a", "b"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {"prompt", "reference", "prediction", "stopped", "source", "nll"} <= set(lines[0])
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_the_chat_of_a_run_gives_the_ids_of_training(run: Path, spm_unigram: str) -> None:
    """Guards against evaluation that renders prompts differently from training (BOS lost with the saved tokenizer)."""
    from common.subject import find_subject, open_chat

    turns = [{"role": "user", "content": "the red cat"}]
    training = load_chat(spm_unigram, "chatml")
    for template in (None, "chatml", "model"):
        assert open_chat(find_subject(str(run)), None, template, [], lambda line: None).prompt_ids(turns) == \
            training.prompt_ids(turns)


@pytest.mark.parametrize("argv, finding", [
    (["--top_p", ".5"], "changes nothing at temperature 0"),
    (["--gen_only", "--baseline_path", "x/y"], "--baseline_path: it changes nothing with --gen_only"),
    (["--chat", "--predict", "x"], "--chat --predict: each of them is a task of its own"),
    (["--golden", "x", "--dataset_paths", "y"], "--dataset_paths: it changes nothing with --golden"),
    (["--compare", "a/b", "--model_path", "c/d"], "--model_path: it changes nothing with --compare"),
    (["--compare", "a/b"], "two or more different runs"), (["--golden", "nowhere.jsonl"], "Check --golden"),
    (["--dataset_paths", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--model_path", "./nowhere"], "./nowhere: no such directory"),
    (["--tokenizer_path", "OTHER"], "gives other ids")])
def test_a_mistake_is_one_sentence(run: Path, spm_bpe: str, capsys: pytest.CaptureFixture, argv: list[str],
                                   finding: str) -> None:
    """Guards against flags without effect, tracebacks for a wrong path, and numbers from another model's tokenizer."""
    before = sorted(p.name for p in run.iterdir())
    assert evaluate(run, *[spm_bpe if a == "OTHER" else a for a in argv]) == 2
    error = capsys.readouterr().err
    assert finding in error and "Traceback" not in error
    assert sorted(p.name for p in run.iterdir()) == before


REFUSES = ("{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
           "{{ m.content + eos_token }}{%- endfor -%}")


def test_rows_that_the_template_refuses_are_named_and_skipped(run: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture) -> None:
    """Guards against an evaluation that ends without a place (Gemma knows no system turn), also with
    --skip_bad_rows."""
    (tmp_path / "own.jinja").write_text(REFUSES)
    answer = {"role": "assistant", "content": "red cat"}
    rows = [{"messages": [{"role": "user", "content": f"{i} who"}, answer]} for i in range(3)]
    rows[1]["messages"].insert(0, {"role": "system", "content": "be good"})
    argv = ["--prompt_template", str(tmp_path / "own.jinja"), "--max_new_tokens", "3", "--baseline_path", "none",
            "--dataset_paths", str(write_rows(tmp_path / "rows.jsonl", rows)), "--output_dir", str(tmp_path / "out")]
    assert evaluate(run, *argv) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:2: template" in error and "the template refuses 1 of 3 rows" in error
    assert evaluate(run, *argv, "--skip_bad_rows") == 0
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert found["rows"] == 2 and found["rows_read"]["rows"]["bad"] == 1
    asked = write_rows(tmp_path / "asked.jsonl", [{"messages": row["messages"][:-1]} for row in rows])
    argv = [*argv[:4], "--predict", str(asked), "--output_dir", str(tmp_path / "out")]
    assert evaluate(run, *argv, "--skip_bad_rows") == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2


def test_a_base_that_cannot_be_asked_in_one_way_is_asked_in_the_others(
        run: Path, tiny_model: str, spm_unigram: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Guards against a measurement that is thrown away at the end: a chat model of elsewhere, whose template's tokens
    the named base does not know."""
    from common.model import load_model

    chat, model = load_chat(str(run), "model"), load_model(str(run)).merge_and_unload()
    model.save_pretrained(tmp_path / "chat")
    chat.save(tmp_path / "chat")
    load_model(tiny_model).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(Path(spm_unigram).read_bytes())
    assert evaluate(run, "--model_path", str(tmp_path / "chat"), "--baseline_path", str(tmp_path / "base"),
                    "--dataset_paths", str(run / "val.jsonl"), "--max_new_tokens", "3", "--max_eval_samples", "4") == 0
    assert "baseline: it is not asked through the template" in capsys.readouterr().out
    found = json.loads((tmp_path / "chat" / "eval" / "eval_results.json").read_text())
    assert found["baseline"]["asked"] == {"answers": "plain", "loss": "plain"}


def test_a_base_that_cannot_be_had_ends_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture) -> None:
    """Guards against an evaluation that needs a network for a base that nobody named."""
    from common.subject import Subject, find_baseline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    lines: list[str] = []
    subject = Subject(str(run), run, {"model_path": "ann/gone"})
    assert find_baseline(subject, "auto", None, None, lines.append) is None
    assert lines[0].startswith("baseline: none, because it cannot be had. ")
    with pytest.raises(UserError):
        find_baseline(subject, "ann/gone", None, None, lines.append)


def test_an_unfinished_run_names_its_checkpoint(tmp_path: Path) -> None:
    """Guards against advice to give another directory."""
    from common.model import find_model

    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoint-8" / "shards").mkdir(parents=True)  # which only training reads
    (tmp_path / "checkpoint-8" / "MANIFEST.json").touch()
    with pytest.raises(UserError, match="not finished; go on with it: --resume_from_checkpoint"):
        find_model(str(tmp_path))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "MANIFEST.json").touch()
    with pytest.raises(UserError, match="not finished, but .*checkpoint-4 can be used"):
        find_model(str(tmp_path))


def test_a_base_model_with_plain_text(tiny_model: str, spm_unigram: str, tmp_path: Path) -> None:
    """Guards against rows without a question, which have a loss and no answer."""
    write_rows(tmp_path / "t.jsonl", [{"text": f"the red cat sees {i}"} for i in range(5)])
    assert run_main(SCRIPT.main, [
        "--model_path", tiny_model, "--tokenizer_path", spm_unigram, "--prompt_template", "raw",
        "--dataset_paths", str(tmp_path / "t.jsonl"), "--output_dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert found["loss"] > 0 and found["exact_match"] is None and found["baseline"] is None


@pytest.mark.parametrize("with_end", [True, False])
def test_an_end_that_was_never_trained_shows(tiny_model: str, spm_unigram: str, with_end: bool) -> None:
    """Guards against a model that never stops and still looks good: its loss on the words is low either way."""
    from common.chat import Encoded
    from common.loss import LossModel, batch_inputs, make_batch
    from common.model import load_model

    chat, model = load_chat(spm_unigram, "instruct"), load_model(tiny_model)
    asked = cases([("Who are you?", "a small cat"), ("What is red?", "the stone"), ("Hello there", "hello")])
    taught = [Encoded(e.input_ids, e.trained & (with_end | (e.input_ids != chat.end_id)))
              for e in chat.encode_rows([case.row for case in asked])]
    batch, loss_model = make_batch([[e] for e in taught], chat.pad_id), LossModel(model, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        loss_model(**batch_inputs(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = measure(model.eval(), chat, asked, Options(max_new_tokens=12))
    found = summarise(measured.table)
    assert all(text.strip().startswith(case.reference) for text, case in zip(measured.texts, asked))
    if with_end:
        assert found["end_probability"] > 0.9 and found["stopped"] == found["exact_match"] == 1
    else:
        assert found["end_probability"] < 0.02 and found["stopped"] == found["exact_match"] == 0


def test_rows_longer_than_the_context_are_counted(tiny_model: str, spm_unigram: str) -> None:
    """Guards against rows that vanish from a mean without a word."""
    from common.model import load_model

    chat, model = load_chat(spm_unigram, "instruct"), load_model(tiny_model)
    found = measure(model, chat, cases([("a", "b"), ("the cat " * 200, "b")]), Options(max_new_tokens=2), context=256)
    assert found.left_out == 1 and found.table["loss"][:, 1].tolist()[1] == 0 and found.answers[1].cut


def test_rows_that_were_cut_in_training_have_a_loss(tiny_model: str, spm_unigram: str) -> None:
    """Guards against a validation file of long rows of which nothing is measured."""
    from common.model import load_model

    chat, model = load_chat(spm_unigram, "instruct"), load_model(tiny_model)
    turns = [{"role": role, "content": text} | ({"train": True} if role == "assistant" else {}) for i in range(6)
             for role, text in (("user", f"the cat {i} " * 10), ("assistant", "the red dog " * 5))]
    rows = [make_case(Row(1, turns), "s"), make_case(Row(2, None, "the cat " * 200), "s")]
    whole, cut = (measure(model, chat, rows, Options(max_new_tokens=2), context=n) for n in (None, 200))
    assert cut.left_out == 0
    for name in ("loss", "bits_per_byte"):
        assert (cut.table[name][:, 1] == whole.table[name][:, 1]).all() and (whole.table[name][:, 1] > 0).all()


def figures(place: Path) -> dict[str, float]:
    """Every number of eval_results.json with its intervals and differences, by its place in the file."""
    found: dict[str, float] = {}

    def walk(name: str, value: object) -> None:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, (dict, list)):
                walk(f"{name}/{key}", part)
            elif isinstance(part, float):
                found[f"{name}/{key}"] = part

    results = json.loads((place / "eval_results.json").read_text())
    walk("", {key: results[key] for key in ("datasets", "total")})
    return found


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-7), ("bfloat16", 1e-5)])
def test_figures_depend_on_the_rows_alone(run: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Guards against figures that change with the batch size, the order of the rows or the number of processes: means
    of batch means, padding, a share of the rows that is lost or counted twice, a bootstrap over places in the file.

    In bfloat16 the likeliest two tokens are often equal, and how they are rounded decides an answer: losses alone."""
    def quick() -> None:
        import common.report_eval
        import common.scores

        common.report_eval.eval_report = lambda *parts: ""
        common.scores.RESAMPLES = 200

    rows = [{"prompt": r["prompt"] * (1 + i % 4), "response": r["response"]} for i, r in enumerate(chat_rows(21, 3))]
    files = {name: write_rows(tmp_path / name / "rows.jsonl", part)
             for name, part in (("a", rows), ("b", [rows[i] for i in np.random.default_rng(0).permutation(21)]))}
    found = {}
    for how, name, size, ranks in (("usual", "a", 32, 1), ("one by one", "a", 1, 1), ("order", "b", 5, 1),
                                   ("processes", "a", 4, 2)):
        out = tmp_path / how
        argv = ["--model_path", run, "--dataset_paths", files[name], "--max_new_tokens", 6, "--dtype", dtype,
                "--per_device_eval_batch_size", size, "--output_dir", out]
        child = fork_main(SCRIPT.main, [str(word) for word in argv], tmp_path / f"{how}.log", ranks=ranks,
                          patch=quick)
        assert child.wait() == 0, child.output[-2000:]
        assert child.output.count("report: ") == 1, "the main process alone speaks"
        found[how] = figures(out)
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [line["reference"] for line in lines] == [
            json.loads(line)["response"] for line in files[name].read_text().splitlines()]
    assert len(found["usual"]) > 100
    for how, numbers in found.items():
        assert numbers.keys() == found["usual"].keys()
        if dtype == "bfloat16":
            numbers = {k: v for k, v in numbers.items() if any(f"/{name}" in k for name in OF_LOSSES)}
        apart = {k: abs(v - found["usual"][k]) / max(abs(found["usual"][k]), 1e-12) for k, v in numbers.items()}
        worst = max(apart, key=apart.get)
        assert apart[worst] <= tolerance, (how, worst, numbers[worst], found["usual"][worst])


def test_sampled_answers_do_not_depend_on_the_number_of_processes(run: Path, tmp_path: Path) -> None:
    """Guards against draws by the place in a process's share."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": r["prompt"]} for r in chat_rows(9, 3)])
    said = {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        argv = ["--model_path", run, "--predict", tmp_path / "rows.jsonl", "--max_new_tokens", 6, "--temperature", 1,
                "--per_device_eval_batch_size", 2, "--output_dir", out]
        child = fork_main(SCRIPT.main, [str(word) for word in argv], tmp_path / "log", ranks=ranks)
        assert child.wait() == 0, child.output[-2000:]
        said[ranks] = (out / "predictions.jsonl").read_text()
    assert said[1] == said[2]


def test_a_fault_of_all_processes_is_told_once(run: Path, tmp_path: Path) -> None:
    """Guards against the same sentence from every process, and against a status that is lost."""
    argv = ["--model_path", str(run), "--dataset_paths", str(write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}]))]
    child = fork_main(SCRIPT.main, argv, tmp_path / "log", ranks=2)
    assert child.wait() == 2 and child.codes == [2, 2]
    assert child.output.count("bad.jsonl:1") == 1 and "Traceback" not in child.output


def test_a_lost_process_ends_the_others(run: Path, tmp_path: Path) -> None:
    """Guards against a process that waits for hours for one that is gone, and against figures of half of the rows."""
    def die() -> None:
        import common.evaluate

        if os.environ["RANK"] == "1":
            common.evaluate.generate = lambda *args, **options: os._exit(9)

    argv = ["--model_path", str(run), "--gen_only", "--max_new_tokens", "3", "--output_dir", str(tmp_path / "out")]
    child = fork_main(SCRIPT.main, argv, tmp_path / "log", ranks=2, patch=die)
    child.wait(60)
    assert child.codes == [70, 9] and "another process of the evaluation ended" in child.output
    assert not (tmp_path / "out").exists()


def test_unknown_template_file_is_refused(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Guards against a misspelt template taken as the default."""
    assert evaluate(run, "--prompt_template", "nowhere.jinja", "--gen_only") == 2
    assert "nowhere.jinja" in capsys.readouterr().err
    with pytest.raises(UserError):
        load_chat("nowhere/at/all")
