"""A function over many items on all cores: processes forked from this one, results in the order of the items.

Forked, because a tokenizer and a template are costly to load and cannot all be sent; the children do no work of torch.
A child ends when this process does, however it ends: its pipe is closed then.
"""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from common.allocator import tune_allocator

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 4  # results, for each process, that may wait for their turn
MOST = 32  # processes; the one that reads and writes keeps no more busy


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forked_map(work: Callable[[Item], Result], items: Iterable[Item], processes: int | None = None) -> Iterator[Result]:
    """work(item) for each item, in order. Children are forked when the first item is there; with one core, and where
    forking is not safe (other systems than Linux), the work is done here. An exception of `work` is raised in its turn.

    Raises ChildProcessError if a child was killed, as when memory runs out.
    """
    items, n = iter(items), min(processes or cores(), MOST)
    first = list(islice(items, 2))
    if n == 1 or len(first) < 2 or sys.platform != "linux":
        yield from map(work, first)
        yield from map(work, items)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else the library warns of the fork
    context, pipes, children = get_context("fork"), [], []
    try:
        for _ in range(n):
            here, there = context.Pipe()
            child = context.Process(target=_serve, args=(work, there, [*pipes, here]), daemon=True)
            child.start()
            there.close()
            pipes.append(here)
            children.append(child)
        yield from _in_order(_chained(first, items), pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.terminate()
            child.join()


def _chained(first: list[Item], rest: Iterator[Item]) -> Iterator[Item]:
    while first:
        yield first.pop(0)  # no item is kept
    yield from rest


def _in_order(items: Iterator[Item], pipes: list[Connection]) -> Iterator[Result]:
    """Give every free child the next item; yield the results in the order of the items."""
    free, busy, results = list(pipes), {}, {}
    given = due = 0
    more = True
    while more or due < given:
        while more and free and given - due < AHEAD * len(pipes):
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            pipe = free.pop()
            pipe.send(item)
            busy[pipe], given = given, given + 1
        for pipe in wait(list(busy)) if due not in results and busy else ():
            try:
                results[busy.pop(pipe)] = pipe.recv()
            except EOFError:
                raise ChildProcessError("a process that prepares rows was killed (was memory short?)") from None
            free.append(pipe)
        if due in results:
            result, fault = results.pop(due)
            due += 1
            if fault is not None:
                raise fault
            yield result


def _serve(work: Callable[[Item], Result], pipe: Connection, others: list[Connection]) -> None:
    """A child: answer items until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # else the pipe of a dead parent would stay open in its other children
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads did not come along
    tune_allocator()
    try:
        while True:
            item = pipe.recv()
            try:
                answer = work(item), None
            except Exception as fault:
                answer = None, fault
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
