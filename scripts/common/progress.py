"""How far a run is: a bar or lines for a person, metrics.jsonl for everything else."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.checkpoint import TrainState
from common.faults import say
from common.rundir import append_metrics
from common.train import StepResult

if TYPE_CHECKING:
    from common.run import Run


@contextmanager
def log_progress(run: Run, n_steps: int) -> Iterator[Callable]:
    """Give a function (state, result, metrics line) that shows a progress bar, or lines where there is no terminal,
    and appends to metrics.jsonl. A line is on disk before the checkpoint of its step."""
    from tqdm import tqdm

    bar = tqdm(total=n_steps, initial=run.state.step, desc="training", unit=" step", disable=None if run.main else True,
               dynamic_ncols=True)

    def progress(state: TrainState, result: StepResult | None, line: dict | None) -> None:
        if not run.main:
            return
        if result:
            bar.update(1)
            bar.set_description_str(result.stage, refresh=False)
            bar.set_postfix_str(f"loss {result.loss:.4f} {result.tokens / result.seconds:,.0f} tok/s")
        if line:
            append_metrics(run.directory / "metrics.jsonl", line)
            if bar.disable:
                say(_spoken(line, n_steps, state))
            elif "eval_loss" in line:
                with bar.external_write_mode():
                    say(_spoken(line, n_steps, state))

    try:
        yield progress
    finally:
        bar.close()


def _spoken(line: dict, n_steps: int, state: TrainState) -> str:
    head = f"step {line['step']:,}/{n_steps:,}"
    if "eval_loss" in line:
        by_name = [f"{k.removeprefix('eval_loss/')} {v:.4f}" for k, v in line.items() if k.startswith("eval_loss/")]
        best = "best so far" if state.best_step == line["step"] else (
            f"best {state.best_loss:.4f} at step {state.best_step:,}")
        each = f"({', '.join(by_name)}) " if len(by_name) > 1 else ""
        return f"{head} eval loss {line['eval_loss']:.4f} {each}{best}"
    return (f"{head} loss {line['loss']:.4f} lr {line['learning_rate']:.2e} grad {line['grad_norm']:.2f} "
            f"{line['tokens_per_second']:,.0f} tok/s ({line['trained_tokens_per_second']:,.0f} trained) "
            f"mfu {line['mfu']:.0%}")
