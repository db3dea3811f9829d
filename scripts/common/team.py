"""Several processes share the rows of an evaluation; every process then knows all results, and the main one speaks.

What is exchanged are numbers and answers as Python objects, through gloo, whatever device the model is on.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # a process that died is noticed at once; this ends a job in which one hangs


@dataclass(frozen=True)
class Team:
    """This process among `world`; alone it does everything itself."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def part(self, order: Sequence[int]) -> list[int]:
        """This process's share of the rows; in falling length, all processes have as much to do."""
        return list(order[self.rank::self.world])

    def together(self, found: dict[int, T]) -> dict[int, T]:
        """What all processes found. Raises RankLost if one of them is gone."""
        if self.world == 1:
            return found
        import torch.distributed as dist

        from common.faults import RankLost

        parts: list = [None] * self.world
        try:
            dist.all_gather_object(parts, found)
        except RuntimeError as fault:  # gloo's own words for a closed connection
            raise RankLost("another process of the evaluation ended before its rows were done "
                           f"({str(fault).splitlines()[0]:.120}). Its own message says why; start it again.") from None
        return {i: value for part in parts for i, value in part.items()}


ALONE = Team()


@contextmanager
def joined_team() -> Iterator[Team]:
    """The processes that a launcher started, or this one alone. A fault that all meet (a UserError, a check) is told by
    the main one alone."""
    import torch

    from common.faults import CheckFailed, SaidElsewhere, UserError

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    team = Team(torch.distributed.get_rank(), world)
    try:
        yield team
    except Exception as fault:
        if not team.main and isinstance(fault, (UserError, CheckFailed)):
            raise SaidElsewhere(fault.status) from None
        raise
    finally:
        torch.distributed.destroy_process_group()
