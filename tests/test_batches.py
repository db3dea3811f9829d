"""The batches of a process: those of the step asked for, whatever was made ahead."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.chat import Encoded
from common.plan import Source, Stage, make_plan
from common.settings import SftConfig
from common.train import Batches

ROWS = [Encoded(np.full(3 + i % 5, i, np.int32), np.arange(3 + i % 5) > 0) for i in range(23)]


def batches(rank: int = 0, world: int = 1, steps: int = 6) -> Batches:
    lengths = np.array([len(row.input_ids) for row in ROWS])
    plan = make_plan([Source("rows", lengths, lengths - 1)], [Stage("train", (0,), None, epochs=1.0)],
                     max_seq_length=16, packing=False, rows_per_step=4, seed=0, max_steps=steps)
    material = SimpleNamespace(plan=plan, pad_id=99, examples=lambda row: [ROWS[e] for _, e in row])
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    return Batches(accelerator, True, material, SftConfig(per_device_train_batch_size=1))


@pytest.mark.parametrize("order", [range(6), [0, 1, 4, 5], [3, 2, 2, 5]], ids=["in turn", "resumed", "any"])
def test_of_a_step_whatever_was_made_ahead(order):
    """Guards against the rows of a neighbouring step after a resume, and at the end of the plan."""
    ahead = batches()
    for step in order:
        rows = [[ROWS[e].input_ids.tolist() for _, e in row] for row in ahead.material.plan.rank_rows(step, 0, 1)]
        real = [[e for e in batch.input_ids[0].tolist() if e != 99] for batch in ahead.of(step)]
        assert real == [sum(row, []) for row in rows], step


def test_every_process_has_as_many_passes():
    """Guards against a process that waits for a reduction to which another never comes."""
    last = [len(batches(rank, 3).of(5)) for rank in range(3)]  # 3 of 23 rows are left, or none
    first = [len(batches(rank, 3).of(0)) for rank in range(3)]
    assert len(set(last)) == 1 and first == [2, 2, 2]


def test_a_fault_of_the_thread_arrives():
    """Guards against a run that waits for ever for a batch that could not be read."""
    ahead = batches()
    ahead.of(0)

    def broken(row: np.ndarray) -> None:
        raise OSError("the disk is gone")

    ahead.material.examples = broken
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.of(2)
