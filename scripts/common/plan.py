"""Everything that decides what is learnt, before the first step: mixture, stages, packing, steps, rows per rank.

The plan is a pure function of (lengths, weights, stages, seed, sizes). It knows nothing of processes, devices or text,
so the arithmetic can be printed and checked before an hour is spent, and a resume needs one integer: the step.

    sources    a 5 examples, b 10 examples; weights .8 and .2
    epoch      as many examples as both together: 15 -> 12 of a, 3 of b   (largest remainder)
    streams    a: its 5 in a seeded order, again in another, 2 of a third; the next epoch begins with the other 3
    mixture    the 15 draws in a seeded order
    rows       lengths 5 3 2 2, max_seq_length 7 -> rows [5 2] [3 2]      (best-fit decreasing), rows in a seeded order
    steps      rows_per_step rows each; the last step of a stage may have fewer

A draw is one use of an example. All draws of a run are one int32 array of numbers of examples (all sources counted
through) in the order of the rows; two arrays of bounds cut it into rows and the rows into steps.
"""
from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count

import numpy as np

from common.faults import UserError
from common.order import Stream, exact, largest_remainder, pack, shuffled, stable_order

PASS, SUBSET, MIX, ROWS = 1, 2, 3, 4  # purposes: the second number of every seed, so that no two orders share a stream
FORMAT = 1  # part of the fingerprint: raise it when the same input gives another order
CHUNK = 1 << 20  # draws looked at together in a summary
MOST_DRAWS = 2**30  # 4 to 8 bytes each
WEIGHT_UNITS = ("examples", "tokens", "trained_tokens")


@dataclass(frozen=True)
class Source:
    """The training examples of one data set. lengths, trained: (N,) tokens and trained tokens of each example.

    A token that cannot be predicted (the first of an example) must not be counted as trained.
    """

    name: str
    lengths: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Stage:
    """A mixture of some sources (by index), for a number of epochs or until an optimizer step of the run.

    weights: relative, one for each source (0: as if it were not there); None: every example once an epoch. n_samples:
    the stage keeps to this many distinct examples of the source; None: all. Exactly one of epochs and until_step is
    given. Half an epoch is half of each quota.
    """

    name: str
    sources: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    n_samples: tuple[int | None, ...] | None = None
    epochs: float | None = None
    until_step: int | None = None


@dataclass(frozen=True)
class Epoch:
    """Where an epoch lies in the plan. fraction: its size in epochs (1, or less at the end); n_rows: before any cut."""

    stage: int
    number: int
    fraction: float
    first_row: int
    n_rows: int


@dataclass(frozen=True)
class _Inputs:
    """What is the same for all stages. starts: (sources + 1,) first example of each; lengths, trained: (N,) tokens."""

    starts: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    max_seq_length: int
    packing: bool
    seed: int
    weight_unit: str


def make_plan(sources: list[Source], stages: list[Stage], *, max_seq_length: int, packing: bool, rows_per_step: int,
              seed: int, max_steps: int = -1, weight_unit: str = "examples") -> Plan:
    """Plan a whole run: `stages` one after the other, each for its epochs or until its step.

    max_steps >= 0 cuts the run. Where there is one stage with epochs it overrides them, so that further epochs are
    drawn if they are too few; several stages, or one with until_step, are only ever cut.
    Each source is one stream through all stages: a later stage begins with what an earlier one left unused. What a cut
    epoch (until_step) has drawn and not trained on goes back to the front of the streams.
    UserError: settings that cannot be carried out, an example longer than max_seq_length, nothing to train on.
    """
    assert rows_per_step > 0 and seed >= 0 and weight_unit in WEIGHT_UNITS, (rows_per_step, seed, weight_unit)
    _check_stages(sources, stages)
    _check_examples(sources, stages, max_seq_length, weight_unit)
    _check_size(sources, stages, rows_per_step, max_steps)
    starts = np.cumsum([0, *(len(source.lengths) for source in sources)])
    lengths = np.concatenate([np.asarray(source.lengths, np.int32) for source in sources])
    trained = np.concatenate([np.asarray(source.trained, np.int32) for source in sources])
    inputs = _Inputs(starts, lengths, trained, max_seq_length, packing, seed, weight_unit)
    streams = [Stream(np.arange(a, b, dtype=_dtype_to(starts[-1])), seed, PASS, i)
               for i, (a, b) in enumerate(zip(starts[:-1], starts[1:]))]

    epochs: list[Epoch] = []
    draws, row_sizes, step_bounds, stage_bounds = [], [], [np.zeros(1, np.int64)], [0]
    n_rows = n_steps = 0
    for index, stage in enumerate(stages):
        until = _last_step(stage, n_steps, max_steps)
        endless = stage.epochs is None or (max_steps >= 0 and len(stages) == 1)
        first_row = n_rows
        for epoch in _stage_epochs(inputs, streams, stage, index, None if endless else exact(stage.epochs),
                                   None if until is None else (until - n_steps) * rows_per_step):
            number, fraction, n_rows_drawn, drawn, sizes = epoch
            epochs.append(Epoch(index, number, fraction, n_rows, n_rows_drawn))
            draws.append(drawn)
            row_sizes.append(sizes)
            n_rows += len(sizes)
        ends = np.minimum(np.arange(first_row, n_rows, rows_per_step, dtype=np.int64) + rows_per_step, n_rows)
        step_bounds.append(ends)
        n_steps += len(ends)
        stage_bounds.append(n_steps)
    if n_steps == 0 and max_steps != 0:
        raise UserError("Nothing remains to train on: the epochs asked for are less than one example.")
    plan = Plan(tuple(sources), tuple(stages), tuple(epochs), np.concatenate(draws or [np.empty(0, np.int32)]),
                _bounds(row_sizes), np.concatenate(step_bounds), tuple(stage_bounds), starts, lengths, trained,
                max_seq_length, packing, rows_per_step, weight_unit)
    plan.check_steps()
    return plan


def _check_size(sources: list[Source], stages: list[Stage], rows_per_step: int, max_steps: int) -> None:
    """UserError for a slipped digit, before memory is full of draws. A row has one example or more; a stage that ends
    at a step is counted from the first one."""
    drawn = 0.0
    for stage in stages:
        taken = stage.n_samples or [None] * len(stage.sources)
        each = sum(n or len(sources[i].lengths) for n, i in zip(taken, stage.sources))
        by_step = [steps * rows_per_step for steps in (stage.until_step, max_steps) if steps is not None and steps >= 0]
        by_epochs = [] if stage.epochs is None or (max_steps >= 0 and len(stages) == 1) else [stage.epochs * each]
        drawn += min([*by_step, *by_epochs], default=0)
    if drawn > MOST_DRAWS:
        raise UserError(f"The plan would draw {drawn:,.0f} examples or more, and {MOST_DRAWS:,} are the most that are "
                        "planned. Lower num_train_epochs, max_steps or the stages' steps.")


def _dtype_to(n: int) -> type:
    """The integer type for numbers up to n."""
    return np.int32 if n < 2**31 else np.int64


def _bounds(sizes: list[np.ndarray]) -> np.ndarray:
    """sizes 2 1 -> 0 2 3"""
    total = sum(int(part.sum(dtype=np.int64)) for part in sizes)
    bounds = np.zeros(sum(map(len, sizes)) + 1, _dtype_to(total))
    np.cumsum(np.concatenate(sizes or [[]]), out=bounds[1:], dtype=bounds.dtype)
    return bounds


def _last_step(stage: Stage, n_steps: int, max_steps: int) -> int | None:
    """The step at which the stage ends at the latest, counted from the start of the run; None: after its epochs."""
    if max_steps >= 0 and (stage.until_step is None or stage.until_step >= max_steps or n_steps >= max_steps):
        return max_steps
    if stage.until_step is not None and stage.until_step <= n_steps:
        raise UserError(f'stage "{stage.name}": until_step {stage.until_step} is not after the {n_steps} steps of the '
                        "stages before it. It counts from the start of the run.")
    return stage.until_step


def _stage_epochs(inputs: _Inputs, streams: list[Stream], stage: Stage, index: int, n_epochs: Fraction | None,
                  room: int | None) -> Iterator[tuple[int, float, int, np.ndarray, np.ndarray]]:
    """Yield (number, fraction, rows before the cut, draws in the order of the rows, draws in each row) of each epoch,
    until n_epochs are drawn or `room` rows are full (None: no limit)."""
    n_samples, weights = (given or (None,) * len(stage.sources) for given in (stage.n_samples, stage.weights))
    mine, parts, used = [], [], []  # parts: of sources, and whose they are
    for i, limit, weight in zip(stage.sources, n_samples, weights):
        if weight is None or weight > 0:
            stream = streams[i]
            if limit is not None and limit < len(stream.members):
                parts.append((stream.take_distinct(limit), stream))
                stream = Stream(np.sort(parts[-1][0]), inputs.seed, SUBSET, i, index)
            mine.append((stream, weight))
    for number in count():
        fraction = Fraction(1) if n_epochs is None else min(Fraction(1), n_epochs - number)
        if fraction <= 0 or room == 0:
            break
        draws, sizes = _epoch_rows(inputs, _epoch_draws(inputs, mine, fraction), index, number)
        n_rows = len(sizes)
        if room is not None:
            sizes = sizes[:room]
            room -= len(sizes)
        if len(sizes) < n_rows:
            n_used = int(sizes.sum(dtype=np.int64))
            for stream, _ in mine:
                stream.give_back(draws[n_used:])
            draws = draws[:n_used]
        if len(draws):
            used += [draws] if parts else []
            yield number, float(fraction), n_rows, draws, sizes
    for part, stream in parts:  # what the stage ended before comes in a later one
        stream.give_back(part[~np.isin(part, np.concatenate([part[:0], *used]))])


def _epoch_draws(inputs: _Inputs, mixture: list[tuple[Stream, float | None]], fraction: Fraction) -> list[np.ndarray]:
    """The examples of one epoch of a stage, of each source. mixture: streams and their weights."""
    streams = [stream for stream, _ in mixture]
    sizes = [len(stream.members) for stream in streams]
    n_draws = int(sum(sizes) * fraction + Fraction(1, 2))
    if mixture[0][1] is None:
        quotas = largest_remainder([Fraction(n) for n in sizes], n_draws)
        return [stream.take_distinct(n) for stream, n in zip(streams, quotas)]
    weights = [exact(weight) for _, weight in mixture]
    if inputs.weight_unit == "examples":
        quotas = largest_remainder(weights, n_draws)
        return [stream.take(n) for stream, n in zip(streams, quotas)]
    units = inputs.lengths if inputs.weight_unit == "tokens" else inputs.trained
    n_units = [int(units[stream.members].sum(dtype=np.int64)) for stream in streams]
    assert all(n_units), f"no {inputs.weight_unit} in a source with a weight"
    total = sum(n_units) * fraction
    return [stream.take_units(total * weight / sum(weights), units) for stream, weight in zip(streams, weights)]


def _epoch_rows(inputs: _Inputs, parts: list[np.ndarray], stage: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(draws in the order of the rows, draws in each row): mixed, packed, and the rows in a seeded order, because
    packing makes the rows of long examples first. parts: of each source."""
    draws = np.concatenate(parts)
    order = shuffled(len(draws), inputs.seed, MIX, stage, epoch)
    if not inputs.packing:
        return _mixed(draws, list(map(len, parts)), order), np.ones(len(draws), np.int32)
    draws = draws[order]
    row_of, n_rows = pack(inputs.lengths[draws], inputs.max_seq_length)
    row_of = shuffled(n_rows, inputs.seed, ROWS, stage, epoch).astype(np.int32)[row_of]
    return draws[stable_order(row_of)], np.bincount(row_of, minlength=n_rows).astype(np.int32)


def _mixed(draws: np.ndarray, sizes: list[int], order: np.ndarray) -> np.ndarray:
    """The draws of sources of these sizes in each other's midst: where, `order` says, but those of a source stay in
    their order, so that at no step one of its examples comes again before all have come."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    for start, size in zip(np.cumsum([0, *sizes]), sizes):
        places[start:start + size].sort()
    mixed = np.empty_like(draws)
    mixed[places] = draws
    return mixed


def _check_stages(sources: list[Source], stages: list[Stage]) -> None:
    if not stages:
        raise UserError("stages: there is none. Name at least one data set to train on.")
    for stage in stages:
        place, n = f'stage "{stage.name}"', len(stage.sources)
        assert len(set(stage.sources)) == n, f"{place}: a source occurs twice"
        if n == 0:
            raise UserError(f"{place}: it has no data sets. Name at least one.")
        if (stage.epochs is None) == (stage.until_step is None):
            raise UserError(f"{place}: give either epochs or until_step.")
        if stage.epochs is not None and not 0 < stage.epochs < float("inf"):
            raise UserError(f"{place}: epochs is {stage.epochs}. It must be more than 0.")
        if stage.weights is not None:
            if len(stage.weights) != n:
                raise UserError(f"{place}: {len(stage.weights)} weights for {n} data sets. Give one weight for each.")
            if not all(0 <= weight < float("inf") for weight in stage.weights) or not any(stage.weights):
                raise UserError(f"{place}: weights {' '.join(map(str, stage.weights))}. They must be numbers of 0 or "
                                "more, and not all 0.")
        for i, limit in zip(stage.sources, stage.n_samples or ()):
            if limit is not None and limit < 1:
                raise UserError(f"{place}: n_samples of {sources[i].name} is {limit}. It must be at least 1; leave the "
                                "data set out if it is not to be used.")


def _check_examples(sources: list[Source], stages: list[Stage], max_seq_length: int, weight_unit: str) -> None:
    for source in sources:
        assert len(source.lengths) == len(source.trained), source.name
        if len(source.lengths) == 0:
            continue
        assert source.lengths.min() > 0 and source.trained.min() >= 0, source.name
        assert np.all(source.trained <= source.lengths), source.name
        longest = int(np.argmax(source.lengths))
        if source.lengths[longest] > max_seq_length:
            raise UserError(f"{source.name}: example {longest} has {source.lengths[longest]:,} tokens, more than "
                            f"max_seq_length {max_seq_length:,}. Split, cut or drop it (too_long).")
    for stage in stages:
        used = [sources[i] for k, i in enumerate(stage.sources) if stage.weights is None or stage.weights[k]]
        if not any(source.trained.any() for source in used):
            raise UserError(f'stage "{stage.name}": nothing remains to train on; its data sets hold no trained token.')
        for source in used if stage.weights is not None else ():
            if len(source.lengths) == 0 or (weight_unit == "trained_tokens" and not source.trained.any()):
                raise UserError(f'stage "{stage.name}": {source.name} has a weight, but no '
                                f"{'examples' if len(source.lengths) == 0 else 'trained tokens'}. Leave it out.")


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole run. Bounds are fence posts: row r is draws[row_bounds[r]:row_bounds[r + 1]], step s is the rows from
    step_bounds[s] to step_bounds[s + 1], stage i the steps from stage_bounds[i]. Steps and stages count from 0.

    draws: (D,) numbers of examples; those of source i begin at starts[i]. lengths, trained: (N,) tokens of each.
    """

    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    epochs: tuple[Epoch, ...]
    draws: np.ndarray
    row_bounds: np.ndarray
    step_bounds: np.ndarray
    stage_bounds: tuple[int, ...]
    starts: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    max_seq_length: int
    packing: bool
    rows_per_step: int
    weight_unit: str

    @property
    def n_steps(self) -> int:
        return len(self.step_bounds) - 1

    def row_count(self, step: int) -> int:
        """Rows of the step's global batch."""
        return int(self.step_bounds[step + 1] - self.step_bounds[step])

    def step_rows(self, step: int) -> list[np.ndarray]:
        """The rows of the global batch of one optimizer step; a row is int64 (k, 2): source and example, k times."""
        return [self._pairs(draws) for draws in self._step_draws(step)]

    def rank_rows(self, step: int, rank: int, world: int) -> list[np.ndarray]:
        """The rows of the step for one of `world` processes, longest first; together they are exactly the step's rows.

        The rows are sorted by tokens and dealt back and forth: 0 1 2 2 1 0 0 1 ..., so that the numbers of rows differ
        by at most 1 and the tokens by little. With fewer rows than ranks some get none.
        """
        assert 0 <= rank < world, (rank, world)
        rows = self._step_draws(step)
        tokens = np.array([self.lengths[row].sum() for row in rows])
        order = np.argsort(-tokens, kind="stable")
        turn = np.arange(len(rows)) % (2 * world)
        return [self._pairs(rows[i]) for i in order[np.minimum(turn, 2 * world - 1 - turn) == rank]]

    def tokens(self, step: int) -> int:
        """Tokens of the step, without padding."""
        return int(self.lengths[self._step_slice(step)].sum(dtype=np.int64))

    def trained_tokens(self, step: int) -> int:
        """Trained tokens of the step over all ranks: what its loss is divided by. Never 0."""
        return int(self.trained[self._step_slice(step)].sum(dtype=np.int64))

    def stage_of(self, step: int) -> int:
        """Index of the stage the step belongs to."""
        assert 0 <= step < self.n_steps, (step, self.n_steps)
        return bisect_right(self.stage_bounds, step) - 1

    def epoch_of(self, step: int) -> float:
        """Epochs of its stage that are done at the end of the step: 0.5 in the middle of the first, 1.0 at its end."""
        last_row = int(self.step_bounds[step + 1]) - 1
        epoch = self.epochs[bisect_right(self.epochs, last_row, key=lambda epoch: epoch.first_row) - 1]
        return epoch.number + epoch.fraction * (last_row + 1 - epoch.first_row) / epoch.n_rows

    def shares(self, step: int) -> dict[str, float]:
        """The share of each data set of the step's stage in what the stage has drawn until the end of the step, in
        weight_unit."""
        stage = self.stage_of(step)
        drawn = self._drawn_before[step + 1] - self._drawn_before[self.stage_bounds[stage]]
        return {self.sources[i].name: float(drawn[i] / drawn.sum()) for i in self.stages[stage].sources}

    @cached_property
    def _drawn_before(self) -> np.ndarray:
        """int64 (steps + 1, sources): what was drawn of each source before each step, in weight_unit."""
        bounds, n = self.row_bounds[self.step_bounds], len(self.sources)
        table = np.zeros((self.n_steps + 1, n), np.int64)
        for chunk in range(0, len(self.draws), CHUNK):
            draws = self.draws[chunk:chunk + CHUNK]
            step = np.searchsorted(bounds, np.arange(chunk, chunk + len(draws)), side="right")  # one more than its step
            source = np.searchsorted(self.starts, draws, side="right") - 1
            weights = {"examples": None, "tokens": self.lengths, "trained_tokens": self.trained}[self.weight_unit]
            table += np.bincount(step * n + source, None if weights is None else weights[draws],
                                 table.size).astype(np.int64).reshape(table.shape)
        return np.cumsum(table, axis=0)

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides what is trained on in which order."""
        digest = hashlib.sha256(f"plan {FORMAT} {self.n_steps} {self.stage_bounds}".encode())
        for array in (self.starts, self.step_bounds, self.row_bounds, self.draws):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        return digest.hexdigest()

    def check_steps(self) -> None:
        """UserError if a step has no trained token: its loss would be 0/0."""
        if self.n_steps:
            first_draws = self.row_bounds[self.step_bounds[:-1]]
            trained = np.add.reduceat(self.trained[self.draws], first_draws, dtype=np.int64)
            if not trained.all():
                step = int(np.argmin(trained))
                source, example = self.step_rows(step)[0][0]
                raise UserError(f"{self.sources[source].name}: example {example} and all others of step {step + 1} "
                                "have no trained token. Drop examples without one, or use more rows per step.")

    def _step_slice(self, step: int) -> np.ndarray:
        assert 0 <= step < self.n_steps, (step, self.n_steps)
        first, end = self.row_bounds[self.step_bounds[step:step + 2]]
        return self.draws[first:end]

    def _step_draws(self, step: int) -> list[np.ndarray]:
        draws = self._step_slice(step)
        bounds = self.row_bounds[self.step_bounds[step]:self.step_bounds[step + 1] + 1]
        return np.split(draws, bounds[1:-1] - bounds[0])

    def _pairs(self, draws: np.ndarray) -> np.ndarray:
        source = np.searchsorted(self.starts, draws, side="right") - 1
        return np.stack([source, draws - self.starts[source]], axis=1)

    def summary(self) -> dict:
        """The arithmetic of the run, for plan.json and `describe`. Tokens are without padding; fill is tokens / (rows *
        max_seq_length); passes are draws / examples; shares are parts of 1, share_asked is None without weights."""
        drawn = [self._drawn(i) for i in range(len(self.stages))]
        stages = [self._stage_summary(i, drawn[i]) for i in range(len(self.stages))]
        asked = [None] * len(self.sources)
        if len(stages) == 1:
            for i, row in zip(self.stages[0].sources, stages[0]["sources"]):
                asked[i] = row["share_asked"]
        table = _shares([source.name for source in self.sources], np.diff(self.starts).tolist(), asked, sum(drawn))
        for row, source in zip(table, self.sources):
            row["tokens"] = int(np.sum(source.lengths, dtype=np.int64))
            row["trained_tokens"] = int(np.sum(source.trained, dtype=np.int64))
        total, n_rows = _totals(sum(drawn)), len(self.row_bounds) - 1
        return {"weight_unit": self.weight_unit, "packing": self.packing, "max_seq_length": self.max_seq_length,
                "examples": len(self.lengths), **total, "rows": n_rows, "rows_per_step": self.rows_per_step,
                "fill": total["tokens"] / max(n_rows * self.max_seq_length, 1),
                "tokens_per_step": total["tokens"] / max(self.n_steps, 1), "steps": self.n_steps, "sources": table,
                "stages": stages, "fingerprint": self.fingerprint()}

    def _stage_summary(self, index: int, drawn: np.ndarray) -> dict:
        """examples: what the stage may use (n_samples). Steps count from 0, end_step is the first of the next stage."""
        stage, (first, end) = self.stages[index], self.stage_bounds[index:index + 2]
        used, limits = list(stage.sources), stage.n_samples or [None] * len(stage.sources)
        weights = stage.weights or [1] * len(used)
        examples = [0 if weight == 0 else min(len(self.sources[i].lengths), limit or 2**62)
                    for i, limit, weight in zip(used, limits, weights)]
        asked = [None if stage.weights is None else weight / sum(weights) for weight in weights]
        return {"name": stage.name, "first_step": first, "end_step": end, "steps": end - first,
                "epochs": self.epoch_of(end - 1) if end > first else 0.0, "examples_per_epoch": sum(examples),
                "rows": int(self.step_bounds[end] - self.step_bounds[first]), **_totals(drawn),
                "sources": _shares([self.sources[i].name for i in used], examples, asked, drawn[used])}

    def _drawn(self, stage: int) -> np.ndarray:
        """int64 (sources, 3): draws, tokens and trained tokens of each source in a stage."""
        first, end = self.row_bounds[self.step_bounds[list(self.stage_bounds[stage:stage + 2])]]
        table = np.zeros((len(self.sources), 3), np.int64)
        for chunk in range(first, end, CHUNK):
            draws = self.draws[chunk:min(chunk + CHUNK, end)]
            source = np.searchsorted(self.starts, draws, side="right") - 1
            for column, weights in enumerate((None, self.lengths[draws], self.trained[draws])):
                table[:, column] += np.bincount(source, weights, len(self.sources)).astype(np.int64)
        return table


def _totals(drawn: np.ndarray) -> dict:
    draws, tokens, trained = drawn.sum(axis=0).tolist()
    return {"draws": draws, "tokens": tokens, "trained_tokens": trained}


def _shares(names: list[str], examples: list[int], asked: list[float | None], drawn: np.ndarray) -> list[dict]:
    shares = (drawn / np.maximum(drawn.sum(axis=0), 1)).tolist()
    return [{"name": name, "examples": n, "draws": d[0], "drawn_tokens": d[1], "drawn_trained_tokens": d[2],
             "passes": d[0] / max(n, 1), "share_asked": share_asked, "share_examples": share[0],
             "share_tokens": share[1], "share_trained_tokens": share[2]}
            for name, n, share_asked, d, share in zip(names, examples, asked, drawn.tolist(), shares)]
