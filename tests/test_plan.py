"""The plan: what is trained on, in which order, by whom. Expected values are worked out by hand; no torch."""
from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from common.arithmetic import describe
from common.faults import UserError
from common.order import Stream, exact, largest_remainder, pack, shuffled, stable_order
from common.plan import Plan, Source, Stage, make_plan


def source(name: str, lengths: list[int] | int, trained: list[int] | None = None) -> Source:
    """A source with these lengths (or so many examples of 4 tokens), half of each trained unless told."""
    lengths = np.full(lengths, 4, np.int32) if isinstance(lengths, int) else np.array(lengths, np.int32)
    return Source(name, lengths, (lengths + 1) // 2 if trained is None else np.array(trained, np.int32))


def plan_of(sources: list[Source], stages: list[Stage] | None = None, *, weights: tuple[float, ...] | None = None,
            epochs: float | None = 1.0, **sizes) -> Plan:
    """One stage over all sources unless told; one row per step, one example per row."""
    stages = stages or [Stage("train", tuple(range(len(sources))), weights, epochs=epochs)]
    return make_plan(sources, stages, **{"max_seq_length": 16, "packing": False, "rows_per_step": 1, "seed": 7} | sizes)


def draws(plan: Plan, steps: range | None = None) -> list[tuple[int, int]]:
    """(source, example) of every draw in the order of training."""
    steps = range(plan.n_steps) if steps is None else steps
    return [tuple(pair) for step in steps for row in plan.step_rows(step) for pair in row.tolist()]


def random_lengths(rng: np.random.Generator, n: int, longest: int) -> np.ndarray:
    return np.clip(rng.lognormal(3, 1, n), 1, longest).astype(np.int32)


def naive_pack(lengths: list[int], max_seq_length: int) -> list[list[int]]:
    """Best-fit decreasing one example at a time; of equally full rows the one that has been so for longest."""
    rows, since = [], []
    for clock, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        space = [max_seq_length - sum(lengths[j] for j in row) for row in rows]
        fitting = [r for r in range(len(rows)) if space[r] >= lengths[i]]
        if not fitting:
            rows.append([])
            since.append(clock)
            fitting, space = [len(rows) - 1], [*space, max_seq_length]
        best = min(fitting, key=lambda r: (space[r], since[r], r))
        rows[best].append(i)
        since[best] = clock
    return rows


# orders, quotas, packing

def test_quotas_of_the_documentation():
    """Rounding each quota by itself makes an epoch longer or shorter than the data."""
    assert largest_remainder([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)], 10) == [5, 3, 2]
    assert largest_remainder([exact(w) for w in (.4, .4, .2)], 102_000) == [40_800, 40_800, 20_400]
    assert largest_remainder([exact(w) for w in (.1, .1, .1)], 10) == [4, 3, 3]
    assert largest_remainder([exact(w) for w in (3, 0, 1)], 2) == [2, 0, 0]


def test_quotas_are_right_to_one():
    """A share that is off by more than one example, for any weights."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = [exact(w) for w in rng.random(rng.integers(1, 9)).round(3) + .001]
        total = int(rng.integers(0, 1000))
        quotas = largest_remainder(weights, total)
        assert sum(quotas) == total
        assert all(abs(q - total * w / sum(weights)) < 1 for q, w in zip(quotas, weights))


def test_orders():
    """An order that depends on the numpy version, is no permutation, or is stable in name only."""
    assert shuffled(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert shuffled(0, 1).tolist() == [] and shuffled(1, 1).tolist() == [0]
    assert sorted(shuffled(1000, 3).tolist()) == list(range(1000))
    first = Counter(int(shuffled(4, seed)[0]) for seed in range(4000))
    assert all(abs(n - 1000) < 120 for n in first.values())
    for top in (3, 1 << 16, 1 << 20):
        values = np.random.default_rng(1).integers(0, top, 500)
        assert stable_order(values).tolist() == np.argsort(values, kind="stable").tolist()


def test_packing_of_the_documentation():
    """First-fit instead of best-fit, or examples not longest first."""
    row_of, n_rows = pack(np.array([5, 3, 2, 2]), 7)
    assert (row_of.tolist(), n_rows) == ([0, 1, 0, 1], 2)
    assert pack(np.array([2, 2, 2, 2, 7]), 7)[0].tolist() == [1, 1, 1, 2, 0]
    assert pack(np.array([], np.int32), 7)[1] == 0


def test_packing_is_best_fit_decreasing():
    """The packing by length classes is the textbook one, row for row; no row over-full, each example once."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        size = int(rng.integers(1, 40))
        lengths = rng.integers(1, size + 1, rng.integers(1, 120))
        row_of, n_rows = pack(lengths, size)
        rows = [np.flatnonzero(row_of == r).tolist() for r in range(n_rows)]
        assert sorted(rows) == sorted(sorted(row) for row in naive_pack(lengths.tolist(), size))
        assert max(np.bincount(row_of, lengths)) <= size


def test_packing_fills_rows():
    """A packing that leaves holes wastes the machine."""
    lengths = random_lengths(np.random.default_rng(0), 20_000, 256)
    assert lengths.sum() / (pack(lengths, 256)[1] * 256) > .999


# mixture

def test_without_weights_every_example_once_an_epoch():
    """An example lost or doubled, in either way of making rows; each epoch in another order."""
    rng = np.random.default_rng(0)
    sources = [Source(str(n), x := random_lengths(rng, n, 16), x // 2 + 1) for n in (30, 1, 17)]
    every = [(s, i) for s, n in enumerate((30, 1, 17)) for i in range(n)]
    for packing in (False, True):
        plan = plan_of(sources, epochs=2, packing=packing, rows_per_step=1)
        half = plan.n_steps // 2
        halves = [draws(plan, range(half)), draws(plan, range(half, plan.n_steps))]
        assert [sorted(drawn) for drawn in halves] == [every, every]
        assert halves[0] != halves[1] and halves[0] != every
        rows = [row for step in range(plan.n_steps) for row in plan.step_rows(step)]
        assert all(sum(sources[s].lengths[i] for s, i in row) <= 16 for row in rows)


def test_weighted_epoch_of_the_documentation():
    """15k/35k/52k at .4/.4/.2 must give 40.8k/40.8k/20.4k."""
    sources = [source("a", 15_000), source("b", 35_000), source("c", 52_000)]
    summary = plan_of(sources, weights=(.4, .4, .2), rows_per_step=512).summary()
    assert [row["draws"] for row in summary["sources"]] == [40_800, 40_800, 20_400]
    assert [row["share_examples"] for row in summary["sources"]] == [.4, .4, .2]
    assert summary["stages"][0]["examples_per_epoch"] == 102_000


def test_no_repeat_before_the_data_set_is_used_up():
    """Sampling with replacement: some rows many times, a third of them never."""
    plan = plan_of([source("a", 5), source("b", 10)], weights=(.8, .2), epochs=3)
    in_epochs = [Counter(draws(plan, range(15 * e, 15 * e + 15))) for e in range(3)]
    for counts in in_epochs:
        assert sum(counts[0, i] for i in range(5)) == 12 and sum(counts[1, i] for i in range(10)) == 3
    total = Counter()
    for counts in in_epochs:
        total += counts
        for s, n in ((0, 5), (1, 10)):
            times = [total[s, i] for i in range(n)]
            assert max(times) - min(times) <= 1


def test_the_next_epoch_moves_on_to_unused_rows():
    """A down-sampled data set of which every epoch sees the same part."""
    plan = plan_of([source("a", 5), source("b", 10)], weights=(2, 1), epochs=2)
    assert sorted(i for s, i in draws(plan) if s == 1) == list(range(10))


def test_weight_zero_is_as_if_the_source_were_not_there():
    """A source that is switched off and still makes the epoch longer."""
    plan = plan_of([source("a", 5), source("b", 10)], weights=(1, 0))
    assert sorted(draws(plan)) == [(0, i) for i in range(5)]
    assert plan.summary()["stages"][0]["examples_per_epoch"] == 5


@pytest.mark.parametrize("unit, column", [("tokens", 1), ("trained_tokens", 2)])
def test_shares_of_tokens_are_right_to_one_example(unit, column):
    """Weights in examples give a data set of long answers more than its share of the gradient."""
    rng = np.random.default_rng(0)
    sources = [Source(str(n), x := random_lengths(rng, n, 200), x // 3 + 1) for n in (50, 300, 700)]
    plan = plan_of(sources, weights=(.5, .3, .2), weight_unit=unit, max_seq_length=200, rows_per_step=8)
    of_data = sum(int((s.lengths if unit == "tokens" else s.trained).sum()) for s in sources)
    drawn = plan._drawn(0)[:, column]
    longest = 200 if unit == "tokens" else 67
    assert all(abs(n - of_data * w) <= longest / 2 for n, w in zip(drawn.tolist(), (.5, .3, .2)))


def test_token_quota_stops_at_the_nearest_example():
    """A quota that is always overshot.

    By hand: a 4 tokens, b 2 and 2, 8 in all. At .5 a once; at .7 (5.6) once; at .8 (6.4) twice, and b once for 1.6.
    """
    for weights, expected in (((.5, .5), {0: 1, 1: 2}), ((.7, .3), {0: 1, 1: 1}), ((.8, .2), {0: 2, 1: 1})):
        plan = plan_of([source("a", [4]), source("b", [2, 2])], weights=weights, weight_unit="tokens")
        assert Counter(s for s, _ in draws(plan)) == expected


def test_half_an_epoch_is_half_of_each_source():
    """Fractional epochs rounded to whole ones, or cut from an end of the mixture."""
    plan = plan_of([source("a", 4), source("b", 10)], epochs=1.5)
    assert plan.n_steps == 21
    assert Counter(s for s, _ in draws(plan, range(14, 21))) == {0: 2, 1: 5}
    assert (plan.epoch_of(6), plan.epoch_of(13), plan.epoch_of(20)) == (.5, 1.0, 1.5)
    weighted = plan_of([source("a", 4), source("b", 10)], epochs=.5, weights=(1, 1))
    assert Counter(s for s, _ in draws(weighted)) == {0: 4, 1: 3}


def test_a_tiny_source_can_be_repeated_often():
    """Growing one array pass by pass takes quadratic time."""
    start = time.perf_counter()
    plan_of([source("a", 3), source("b", 60_000)], weights=(1, 1), rows_per_step=512)
    assert time.perf_counter() - start < 20


# stages

def test_stages_are_strictly_in_order():
    """A row that mixes two stages, or a stage that starts early."""
    sources = [source("a", [3] * 10), source("b", [5] * 10), source("c", [2] * 10)]
    stages = [Stage("one", (0,), epochs=1), Stage("two", (1, 2), (1, 3), epochs=2)]
    plan = plan_of(sources, stages, packing=True, rows_per_step=2)
    assert plan.stage_bounds == (0, 1, 5)  # 10 times 3 tokens: 2 rows; 5 times 5 and 15 times 2: 4 rows, twice
    for step in range(plan.n_steps):
        assert {s for row in plan.step_rows(step) for s in row[:, 0].tolist()} <= ({0}, {1, 2})[plan.stage_of(step)]


def test_the_last_step_of_a_stage_may_be_smaller():
    """Rows dropped at the end of a stage, or a step that reaches into the next."""
    stages = [Stage("one", (0,), epochs=1), Stage("two", (1,), epochs=1)]
    plan = plan_of([source("a", 5), source("b", 3)], stages, rows_per_step=4)
    assert [len(plan.step_rows(step)) for step in range(plan.n_steps)] == [4, 1, 3]
    assert [plan.stage_of(step) for step in range(3)] == [0, 0, 1]
    assert [plan.epoch_of(step) for step in range(3)] == [.8, 1.0, 1.0]


def test_until_step_is_exact():
    """A stage that ends with its epoch instead of at its step; until_step counted from the stage's start."""
    stages = [Stage("one", (0,), until_step=3), Stage("two", (1,), until_step=8)]
    plan = plan_of([source("a", 5), source("b", 3)], stages, rows_per_step=4)
    assert plan.stage_bounds == (0, 3, 8)
    assert [len(plan.step_rows(step)) for step in range(8)] == [4] * 8
    assert plan.epoch_of(2) == 2.4


def test_a_later_stage_begins_with_what_is_unused():
    """What a cut epoch had drawn is lost for a whole pass, and other rows come twice."""
    sources = [source("a", 10), source("b", 4)]
    plan = plan_of(sources, [Stage("one", (0,), until_step=6), Stage("two", (1, 0), (1, 1), epochs=1)])
    first = [i for s, i in draws(plan, range(6))]
    second = [i for s, i in draws(plan, range(6, plan.n_steps)) if s == 0]
    assert len(set(first)) == 6 and len(second) == 7
    assert set(range(10)) - set(first) <= set(second)
    assert sorted(Counter(first + second).values()) == [1] * 7 + [2] * 3
    again = plan_of(sources, [Stage("one", (0,), until_step=6), Stage("two", (0,), epochs=1)])
    assert sorted(draws(again, range(6, 16))) == [(0, i) for i in range(10)]


def test_n_samples_keeps_to_a_part():
    """A limit that draws other examples each epoch, takes the head of the file, or changes the other sources."""
    stages = [Stage("one", (0, 1), None, (3, None), epochs=2), Stage("two", (0,), None, (3,), epochs=1)]
    plan = plan_of([source("a", 30), source("b", 5)], stages)
    assert plan.stage_bounds == (0, 16, 19)
    used = Counter(i for s, i in draws(plan, range(16)) if s == 0)
    assert len(used) == 3 and set(used.values()) == {2} and set(used) != {0, 1, 2}
    assert not set(used) & {i for _, i in draws(plan, range(16, 19))}, "the next stage takes unused ones"
    assert plan_of([source("a", 3)], [Stage("one", (0,), None, (9,), epochs=1)]).n_steps == 3


@pytest.mark.parametrize("end", [{"until_step": 4}, {"epochs": 4 / 30}])
def test_what_a_stage_did_not_reach_of_its_part_comes_later(end):
    """A part of which a short stage saw little: the rest would be passed over, and other rows come twice."""
    sources = [source("a", 100), source("b", 100)]
    plan = plan_of(sources, [Stage("one", (0,), None, (30,), **end), Stage("two", (0, 1), (1, 1), epochs=1)])
    uses = Counter(i for s, i in draws(plan, range(plan.n_steps)) if s == 0)
    assert plan.stage_bounds[1] == 4 and sum(uses.values()) == 104
    assert len(uses) == 100 and max(uses.values()) == 2


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_nothing_comes_again_before_all_has_come(unit):
    """An up-sampled data set whose passes are mixed: a run that ends early saw some rows three times, others never."""
    sources = [source("a", 10), source("b", 50)]
    plan = plan_of(sources, [Stage("one", (0, 1), (.6, .4), epochs=1.5)], weight_unit=unit)
    for number, size in enumerate((10, 50)):
        drawn = [i for s, i in draws(plan) if s == number]
        assert len(drawn) > (30 if number == 0 else 20)
        for start in range(0, len(drawn), size):
            assert len(set(drawn[start:start + size])) == len(drawn[start:start + size])


# steps and ranks

@pytest.mark.parametrize("packing", [False, True])
def test_all_ranks_together_do_exactly_the_rows_of_the_step(packing):
    """A row done twice, or by none, because of the number of processes; ranks with very different work."""
    rng = np.random.default_rng(0)
    lengths = random_lengths(rng, 103, 64)
    plan = plan_of([Source("a", lengths, lengths)], max_seq_length=64, packing=packing, rows_per_step=16)
    print_of = plan.fingerprint()
    for world in (1, 2, 3, 8, 40):
        for step in range(plan.n_steps):
            ranks = [plan.rank_rows(step, rank, world) for rank in range(world)]
            dealt = sorted(row.tolist() for rows in ranks for row in rows)
            assert dealt == sorted(row.tolist() for row in plan.step_rows(step))
            counts = [len(rows) for rows in ranks]
            assert max(counts) - min(counts) <= 1
            tokens = [sum(int(lengths[row[:, 1]].sum()) for row in rows) for rows in ranks]
            assert max(tokens) - min(tokens) <= 64
    assert plan.fingerprint() == print_of
    assert plan.n_steps == -(-sum(len(plan.step_rows(s)) for s in range(plan.n_steps)) // 16)


def test_rows_are_dealt_back_and_forth():
    """By hand: tokens 9 8 7 6 5 4 for 3 ranks -> 9+4, 8+5, 7+6."""
    lengths = np.array([5, 9, 7, 4, 6, 8], np.int32)
    plan = plan_of([Source("a", lengths, lengths)], rows_per_step=6)
    tokens = [[int(lengths[row[0, 1]]) for row in plan.rank_rows(0, rank, 3)] for rank in range(3)]
    assert tokens == [[9, 4], [8, 5], [7, 6]]


def test_trained_tokens_are_those_of_the_rows():
    """A loss divided by padded, by all, or by one rank's tokens."""
    rng = np.random.default_rng(0)
    sources = [Source(name, x := random_lengths(rng, 40, 16), x // 2 + 1) for name in "ab"]
    for packing in (False, True):
        plan = plan_of(sources, packing=packing, rows_per_step=3, weights=(1, 2), epochs=1.5)
        for step in range(plan.n_steps):
            pairs = [pair for row in plan.step_rows(step) for pair in row.tolist()]
            assert plan.trained_tokens(step) == sum(int(sources[s].trained[i]) for s, i in pairs)
            assert plan.tokens(step) == sum(int(sources[s].lengths[i]) for s, i in pairs)


def test_max_steps():
    """max_steps that only shortens, or that stops a step late."""
    two = [source("a", 5), source("b", 3)]
    assert plan_of(two, max_steps=3).n_steps == 3
    assert plan_of(two, max_steps=30).n_steps == 30, "one stage: max_steps overrides the epochs"
    assert draws(plan_of(two, max_steps=3)) == draws(plan_of(two))[:3]
    assert draws(plan_of(two, max_steps=30))[:8] == draws(plan_of(two))
    stages = [Stage("one", (0,), epochs=1), Stage("two", (1,), epochs=1)]
    assert plan_of(two, stages, max_steps=30).n_steps == 8, "several stages are only cut"
    assert plan_of(two, stages, max_steps=6).stage_bounds == (0, 5, 6)
    assert plan_of(two, stages, max_steps=2).stage_bounds == (0, 2, 2)
    assert plan_of(two, [Stage("one", (0,), until_step=4)], max_steps=30).n_steps == 4
    nothing = plan_of(two, max_steps=0)
    assert nothing.n_steps == 0 and "0 steps" in describe(nothing.summary())


def test_rows_of_a_packed_epoch_are_not_sorted():
    """Best-fit decreasing makes the rows of long examples first: the learning rate would follow the length."""
    lengths = random_lengths(np.random.default_rng(0), 4000, 64)
    plan = plan_of([Source("a", lengths, lengths)], packing=True, max_seq_length=64, rows_per_step=8)
    per_row = [len(row) for step in range(plan.n_steps) for row in plan.step_rows(step)]
    half = len(per_row) // 2
    assert abs(np.mean(per_row[:half]) - np.mean(per_row[half:])) < .3
    in_rows = [lengths[row[:, 1]] for step in range(plan.n_steps) for row in plan.step_rows(step)]
    sorted_rows = [np.all(np.diff(row) <= 0) for row in in_rows if len(row) > 2]
    assert np.mean(sorted_rows) < .3


# determinism

def golden() -> Plan:
    rng = np.random.default_rng(5)
    lengths = [rng.integers(2, 17, n).astype(np.int32) for n in (7, 20, 12)]
    stages = [Stage("one", (0, 1), (.7, .3), epochs=1.5), Stage("two", (2, 1, 0), None, (None, 5, None), until_step=20)]
    return plan_of([Source(name, x, x // 2) for name, x in zip("abc", lengths)], stages, packing=True, rows_per_step=2)


def test_the_plan_is_the_same_everywhere():
    """A library upgrade or an edit that reorders the data of runs already begun."""
    assert golden().fingerprint() == "6e014fa5da40cb80b72f42ebd2e13771f61aafcbfcbec667d9885aee04ae32c2"
    assert golden().step_rows(0)[0].tolist() == [[0, 3], [0, 2]] and golden().stage_bounds == (0, 14, 20)


def test_what_changes_the_fingerprint():
    """A resume with other data, seed or sizes that goes unnoticed."""
    base = dict(sources=[source("a", 20), source("b", 10)], weights=(1, 1), packing=True, rows_per_step=2)
    prints = [plan_of(**base | change).fingerprint() for change in
              ({}, {"seed": 8}, {"weights": (2, 1)}, {"rows_per_step": 3}, {"packing": False}, {"epochs": 2},
               {"max_seq_length": 15}, {"sources": [source("a", 21), source("b", 10)]}, {"max_steps": 3})]
    assert len(set(prints)) == len(prints)
    assert plan_of(**base).fingerprint() == prints[0]
    assert plan_of(**base | {"weights": (.5, .5)}).fingerprint() == prints[0], "weights are relative"


# summary

def test_summary_and_its_text():
    """Arithmetic that is printed and is not what is done; numpy numbers that JSON refuses."""
    sources = [source("dolly", [6] * 4 + [5, 7, 3, 3]), source("oasst1_en", [4] * 6)]
    summary = plan_of(sources, weights=(3, 1), packing=True, max_seq_length=8, rows_per_step=4).summary()
    assert json.loads(json.dumps(summary)) == summary
    first = summary["sources"][0]
    assert (first["examples"], first["tokens"], first["draws"], first["passes"]) == (8, 42, 11, 11 / 8)
    assert (first["share_asked"], first["share_examples"]) == (.75, 11 / 14)
    assert summary["draws"] == 14 and summary["tokens"] == first["drawn_tokens"] + 3 * 4
    assert summary["fill"] == summary["tokens"] / (8 * summary["rows"])
    lines = describe(summary).splitlines()
    assert lines[1] == ("oasst1_en  6 examples  24 tokens (12 trained)   3 drawn  0.50 x  "
                        "share of examples 0.2143 (asked 0.2500)")
    assert lines[-1].startswith("rows ") and "4 rows per step = 32 tokens; " in lines[-1]
    assert "of one example, at most 16 tokens" in describe(plan_of(sources).summary())


def test_summary_of_stages():
    """Shares of a run of several stages that are shown as if there were one mixture."""
    stages = [Stage("one", (0,), epochs=2), Stage("two", (0, 1), (1, 3), epochs=1)]
    text = describe(plan_of([source("a", 5), source("b", 3)], stages, rows_per_step=4).summary())
    assert text.splitlines()[2:5] == ["stage one: steps 1 to 3, 2.00 epochs, 10 rows, 40 tokens",
                                      "  a  10 drawn  2.00 x  share of examples 1.0000",
                                      "stage two: steps 4 to 5, 1.00 epochs, 8 rows, 32 tokens"]


# errors

@pytest.mark.parametrize("arguments, message", [
    ({"sources": [source("a", [])]}, 'stage "train": nothing remains to train on'),
    ({"sources": [source("a", [3], [0])]}, 'stage "train": nothing remains to train on'),
    ({"sources": [source("a", [3, 17])]}, "a: example 1 has 17 tokens, more than max_seq_length 16"),
    ({"sources": [source("a", 3), source("b", [])], "weights": (1, 1)}, "b has a weight, but no examples"),
    ({"sources": [source("a", 3), source("b", [4], [0])], "weights": (1, 1), "weight_unit": "trained_tokens"},
     'stage "train": b has a weight, but no trained tokens'),
    ({"sources": [source("a", 3)], "weights": (1, 1)}, "2 weights for 1 data sets"),
    ({"sources": [source("a", 3)], "weights": (0,)}, "not all 0"),
    ({"sources": [source("a", 3), source("b", 3)], "weights": (2, -1)}, "weights 2 -1"),
    ({"sources": [source("a", 3)], "weights": (float("nan"),)}, "weights nan"),
    ({"sources": [source("a", 3)], "epochs": 0}, "epochs is 0"),
    ({"sources": [source("a", 3)], "epochs": .1}, "less than one example"),
    ({"sources": [source("a", 3)], "epochs": None}, "either epochs or until_step"),
    ({"sources": [source("a", 3)], "stages": [Stage("s", (), epochs=1)]}, "no data sets"),
    ({"sources": [source("a", 3)], "stages": [Stage("s", (0,), None, (0,), epochs=1)]}, "n_samples of a is 0"),
    ({"sources": [source("a", 3)], "stages": [Stage("s", (0,), epochs=1), Stage("t", (0,), until_step=3)]},
     'stage "t": until_step 3 is not after the 3 steps'),
    ({"sources": [source("a", [3, 3, 3], [1, 0, 1])]}, "no trained token"),
])
def test_what_cannot_be_carried_out_is_refused(arguments, message):
    """An endless loop, a division by zero or a silent nothing instead of a sentence."""
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        plan_of(**arguments)


def test_an_empty_source_without_weights_does_no_harm():
    """One data set whose rows were all dropped stops the others."""
    plan = plan_of([source("a", []), source("b", 3), source("c", [])], packing=True, epochs=2)
    assert Counter(draws(plan)) == {(1, i): 2 for i in range(3)}
    assert plan.summary()["sources"][0]["passes"] == 0


def test_streams():
    """A stream that begins a new pass too early, or forgets what was given back."""
    stream = Stream(np.arange(10, 15), 0, 1)
    first = stream.take(3).tolist()
    assert sorted([*first, *stream.take(2).tolist()]) == [10, 11, 12, 13, 14]
    stream.give_back(np.array([3, 12, 99, 14]))
    assert stream.take(2).tolist() == [12, 14]
    stream.take(3)
    assert sorted(stream.take_distinct(5).tolist()) == [10, 11, 12, 13, 14]
    assert len(stream.rest) == 2, "the entries passed over"


def test_a_step_costs_no_more_for_a_larger_plan():
    """Work per step that grows with the data."""
    lengths = random_lengths(np.random.default_rng(0), 200_000, 64)
    plan = plan_of([Source("a", lengths, lengths)], max_seq_length=64, packing=True, rows_per_step=8)
    start = time.perf_counter()
    for step in range(200):
        plan.rank_rows(step, 0, 2)
        plan.trained_tokens(step)
    assert time.perf_counter() - start < 1
