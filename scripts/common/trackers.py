"""Trackers that --report_to names, by accelerate: they are told the settings and every line of metrics.jsonl."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from common.config import to_dict
from common.faults import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from common.run import Run

PROJECT = "sft"


def check_installed(names: list[str]) -> None:
    """Raises UserError for a tracker whose package is not there; imports none."""
    for name in names:
        if name != "none" and find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed. Install it (pip install {name}), or "
                            "leave it out; metrics.jsonl is always written.")


@contextmanager
def started_trackers(run: Run) -> Iterator[Callable[[dict | None], None]]:
    """Start the trackers on the main process, before the first step; give a function that passes a metrics line on, and
    close them at the end, however it comes.

    Raises UserError for one that does not start. One that fails later is left, with a line.
    """
    from common.ranks import on_main

    names, started = [name for name in run.config.report_to if name != "none"], {}

    def fails(name: str, fault: Exception) -> None:
        run.say(f"note: {name} failed ({type(fault).__name__}: {fault}) and is told nothing more; metrics.jsonl has it")
        del started[name]

    def track(line: dict | None) -> None:
        numbers = {k: v for k, v in (line or {}).items() if isinstance(v, (int, float)) and k != "step"}
        for name, tracker in list(started.items()) if line else ():
            try:
                tracker.log(numbers, step=line["step"])
            except Exception as fault:  # a server that is gone must not cost a run
                fails(name, fault)

    try:
        on_main(run.watch, lambda: [started.setdefault(name, start_tracker(name, run)) for name in names] and None)
        yield track
    finally:
        for name, tracker in list(started.items()):
            try:
                tracker.finish()
            except Exception as fault:
                fails(name, fault)


def start_tracker(name: str, run: Run) -> GeneralTracker:
    """Start one tracker under the run's name and give it the settings. Raises UserError."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, own, step = LOGGER_TYPE_TO_CLASS[name], run.directory.absolute().name, run.state.step
    settings = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                for key, value in to_dict(run.config).items()}
    try:
        if name == "tensorboard":  # what an earlier start wrote after this step is taken back
            tracker = kind(name, str(run.directory), purge_step=step + 1)
        else:
            places = {"wandb": {"name": own, "dir": str(run.directory)}, "trackio": {"name": own},
                      "mlflow": {"run_name": own}}
            tracker = kind(PROJECT, **places.get(name, {}))
        tracker.start()
        if name == "tensorboard":  # its own way makes a further directory at every start
            tracker.log({"settings": f"```json\n{json.dumps(settings, indent=1)}\n```"}, step=step + 1)
        else:
            tracker.store_init_configuration(settings)
    except Exception as fault:
        raise UserError(f"--report_to {name}: it cannot be started ({type(fault).__name__}: {fault}). Log in to it, or "
                        "leave it out.") from fault
    return tracker
