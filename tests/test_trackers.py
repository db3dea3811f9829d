"""Trackers are told the settings and every line, closed at the end, and cost no run."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import tracking

from common import trackers
from common.faults import UserError
from common.settings import SftConfig
from common.trackers import check_installed, started_trackers

said: list[str] = []
LINE = {"step": 2, "loss": 1.5, "stage": "train"}


class Kept:
    """A tracker that keeps what it is told."""

    told: list = []

    def __init__(self, project: str, **options: object):
        self.told.append(("made", project, options))

    def start(self) -> None:
        self.told.append(("started",))

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(("settings", values))

    def log(self, values: dict, step: int) -> None:
        if values.get("loss") == 13:
            raise ConnectionError("the server is gone")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append(("finished",))


def a_run(place: Path, *names: str, step: int = 0) -> SimpleNamespace:
    config = SftConfig(model_path="m", dataset_paths=["a.jsonl", "b.jsonl"], report_to=list(names))
    return SimpleNamespace(config=config, directory=place / "first", state=SimpleNamespace(step=step),
                           watch=SimpleNamespace(world=1), say=said.append)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stand-ins for trackio and wandb."""
    Kept.told, said[:] = [], []
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Kept)
    return Kept.told


def test_a_tracker_is_told_everything_and_closed(kept: list, tmp_path: Path) -> None:
    """Guards against settings that never reach a tracker, words among the numbers, and a run that stays open."""
    with started_trackers(a_run(tmp_path, "trackio")) as track:
        track(LINE)
        track(None)
    (_, project, options), started, (_, settings), logged, finished = kept
    assert (project, options, started, finished) == ("sft", {"name": "first"}, ("started",), ("finished",))
    assert settings["lora_r"] == 16 and settings["dataset_paths"].endswith('/b.jsonl"]')
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())
    assert logged == (2, {"loss": 1.5})


def test_a_tracker_is_closed_after_a_fault(kept: list, tmp_path: Path) -> None:
    """Guards against the last lines of a stopped run lost in a buffer."""
    with pytest.raises(KeyboardInterrupt), started_trackers(a_run(tmp_path, "trackio", "wandb")):
        raise KeyboardInterrupt
    assert kept[-2:] == [("finished",)] * 2


def test_a_server_that_is_gone_costs_no_run(kept: list, tmp_path: Path) -> None:
    """Guards against hours of training lost to a web server, and against silence about it."""
    with started_trackers(a_run(tmp_path, "trackio")) as track:
        track(LINE | {"loss": 13})
        track(LINE)
    assert len(said) == 1 and "trackio failed (ConnectionError: the server is gone)" in said[0]
    assert kept[-1][0] == "settings"


def test_a_tracker_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, hours of data preparation before it, or a run without it."""
    monkeypatch.setattr(trackers, "find_spec", {"tensorboard": object()}.get)
    with pytest.raises(UserError, match=r"--report_to comet_ml: the package is not installed. Install it"):
        check_installed(["tensorboard", "comet_ml"])
    check_installed(["none"])


def test_a_tracker_that_does_not_start_is_one_sentence(kept: list, tmp_path: Path, monkeypatch) -> None:
    """Guards against a traceback where somebody has to log in; what was started before it is closed."""
    monkeypatch.setattr(Kept, "start", lambda self: 1 / 0 if len(kept) > 2 else None)
    with pytest.raises(UserError, match="--report_to wandb: it cannot be started .ZeroDivisionError"):
        with started_trackers(a_run(tmp_path, "trackio", "wandb")):
            raise AssertionError
    assert kept[-1] == ("finished",)


def test_a_resumed_curve_is_not_drawn_twice(tmp_path: Path) -> None:
    """Guards against the steps between checkpoint and interruption standing twice in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 5, 1.0), (2, 4, 2.0)):
        with started_trackers(a_run(tmp_path, "tensorboard", step=first)) as track:
            for step in range(first + 1, last + 1):
                track({"step": step, "loss": loss})
    events = EventAccumulator(str(tmp_path / "first" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert not [path for path in (tmp_path / "first" / "tensorboard").iterdir() if path.is_dir()]
