"""Everything a run is made of before a model is loaded: data sets, their split, and the plan over them."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from common.chat import Chat, Encoded
from common.data import Dataset, load_dataset
from common.faults import UserError
from common.order import some_of
from common.plan import Plan, Source, Stage, make_plan
from common.settings import SftConfig, dataset_name
from common.sides import Split, split


@dataclass(frozen=True)
class Material:
    """Data sets, split and plan of a run. Example e of the plan's source s is datasets[s].example(train[s][e])."""

    datasets: list[Dataset]
    split: Split
    plan: Plan
    val_datasets: list[Dataset]  # `datasets` themselves, or the files of --val_dataset_paths
    val: list[np.ndarray]  # indices of validation examples in each of val_datasets, those that are evaluated
    held_out: list[np.ndarray]  # and of all of them
    pad_id: int

    def examples(self, row: np.ndarray) -> list[Encoded]:
        """The examples of a row of the plan: int64 (k, 2) of (source, example)."""
        return [self.datasets[s].example(int(self.split.train[s][e])) for s, e in row]

    def places(self, rows: list[np.ndarray]) -> list[str]:
        """file:line of every example in rows of the plan."""
        return [self.datasets[s].place(int(self.split.train[s][e])) for row in rows for s, e in row]

    @property
    def brought(self) -> list[Dataset]:
        """The data sets of --val_dataset_paths."""
        return [] if self.val_datasets is self.datasets else self.val_datasets

    @property
    def val_count(self) -> int:
        return sum(map(len, self.val))


def gather(config: SftConfig, chat: Chat, rows_per_step: int, weights: list[float] | None,
           progress: Callable[[Iterable], Iterable] = iter) -> Material:
    """Tokenise (or open from the cache), split, and plan. Raises UserError for bad rows and impossible settings."""
    options = {"max_seq_length": config.max_seq_length, "too_long": config.too_long, "cache_dir": config.cache_dir,
               "skip_bad_rows": config.skip_bad_rows, "role_map": config.roles() | chat.role_map, "progress": progress}
    datasets = [load_dataset(config.at(path, "dataset"), chat, **options) for path in config.all_dataset_paths()]
    brought = [load_dataset(config.at(path, "dataset"), chat, **options) for path in config.val_dataset_paths]
    val_groups = np.unique(np.concatenate([d.groups for d in brought])) if brought else None
    sides = split(datasets, config.val_split_ratio, config.test_split_ratio, config.val_from, val_groups)
    sources = [Source(d.name, d.lengths[side], d.trained_counts[side]) for d, side in zip(datasets, sides.train)]
    plan = make_plan(sources, _stages(config, weights), max_seq_length=config.max_seq_length, packing=config.packing,
                     rows_per_step=rows_per_step, seed=config.seed, max_steps=config.max_steps,
                     weight_unit=config.weight_unit)
    val_datasets, val = (brought, [np.arange(len(d)) for d in brought]) if brought else (datasets, sides.val)
    evaluated = _subset(val, config.max_eval_samples, config.seed)
    return Material(datasets, sides, plan, val_datasets, evaluated, val, chat.pad_id)


def _stages(config: SftConfig, weights: list[float] | None) -> list[Stage]:
    """The plan's stages; without any in the settings there is one, of num_train_epochs."""
    if not config.stages:
        return [Stage("train", tuple(range(len(config.dataset_paths))), tuple(weights) if weights else None,
                      epochs=config.num_train_epochs)]
    index = {path: i for i, path in enumerate(config.all_dataset_paths())}
    return [Stage(stage.name, tuple(index[d.path] for d in stage.datasets),
                  tuple(d.weight for d in stage.datasets) if stage.datasets[0].weight is not None else None,
                  tuple(d.n_samples for d in stage.datasets), stage.epochs, stage.until_step)
            for stage in config.stages]


def _subset(sides: list[np.ndarray], limit: int | None, seed: int) -> list[np.ndarray]:
    """A seeded subset of at most `limit` examples of all sides together, in their order."""
    total = sum(map(len, sides))
    if limit is None or total <= limit:
        return sides
    chosen = np.zeros(total, bool)
    chosen[some_of(total, limit, seed)] = True
    bounds = np.cumsum([0, *map(len, sides)])
    return [side[chosen[a:b]] for side, a, b in zip(sides, bounds, bounds[1:])]


def recommended_weights(paths: list[str], parameters: int) -> list[float]:
    """The weights that the data set files recommend for a model of this many parameters.

    Raises UserError for a file that no data set file in config/sft_datasets describes.
    """
    from common.sources import recommended_weight

    size = "tiny" if parameters < 1e9 else "small" if parameters < 7e9 else "base"
    weights = [recommended_weight(dataset_name(path), size) for path in paths]
    unknown = [path for path, weight in zip(paths, weights) if weight is None]
    if unknown:
        raise UserError(f"--dataset_weights recommended: no data set file in config/sft_datasets has a weight for "
                        f"{', '.join(unknown)}. Give one number for each data set.")
    return weights
