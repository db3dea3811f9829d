"""A request to stop sets a flag; impatience and a launcher's death are told apart."""
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import signals
from common.signals import StopFlag, launched

SCRIPTS = str(Path(signals.__file__).parents[1])


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in list(os.environ):
        if name == "LOCAL_RANK" or name.startswith(("ACCELERATE_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def child(work) -> int:
    """Fork; the child calls work(ready), where ready() tells the parent to go on. Returns its process id then."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work(lambda: os.write(write, b"x")) or 0)
        except BaseException:
            os._exit(99)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(stop: StopFlag, seconds: float = 5) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.005)
    return stop.asked()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_sets_the_flag(number):
    """A signal acted on at once tears a step or a save apart."""
    def work(ready) -> int:
        stop = StopFlag()
        assert stop.asked() is None
        ready()
        return 75 if wait_for(stop) == number.name else 1
    pid = child(work)
    os.kill(pid, number)
    assert status(pid) == 75


def test_a_later_second_signal_ends_at_once(monkeypatch):
    """A hung step must not need kill -9."""
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.05)

    def work(ready) -> int:
        stop = StopFlag()
        ready()
        wait_for(stop)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return 1
    pid = child(work)
    os.kill(pid, signal.SIGTERM)
    assert status(pid) == 128 + signal.SIGINT


def test_the_same_request_arriving_twice_is_one():
    """Ctrl-C reaches launcher and child, and the launcher passes it on: the second is no impatience."""
    def work(ready) -> int:
        stop = StopFlag()
        ready()
        reason = wait_for(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return 75 if reason == stop.asked() == "SIGINT" else 1
    pid = child(work)
    os.kill(pid, signal.SIGINT)
    assert status(pid) == 75


def test_the_time_limit():
    """--max_minutes must stop a run before the scheduler does."""
    def work(ready) -> int:
        stop = StopFlag(max_minutes=0.05 / 60)
        ready()
        before = stop.asked()
        time.sleep(0.06)
        return 75 if before is None and stop.asked() == "--max_minutes 0.000833333" else 1
    assert status(child(work)) == 75


def test_a_forked_worker_dies_of_the_signal():
    """A worker that only sets its own flag would run on for ever; also one that was forked this very moment."""
    def work(ready) -> int:
        stop = StopFlag()
        worker = os.fork()
        if worker == 0:
            time.sleep(20)
            os._exit(0)
        ready()
        os.kill(worker, signal.SIGTERM)
        return 75 if status(worker) == -signal.SIGTERM and stop.asked() is None else 1
    assert status(child(work)) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_launchers_death_stops_its_child(number):
    """`accelerate launch` forwards nothing: its child would train on, holding the directory."""
    child_code = f"""if True:
        import sys, time
        sys.path.insert(0, {SCRIPTS!r})
        from common.signals import StopFlag
        stop = StopFlag()
        print("ready", flush=True)
        while stop.reason is None:  # only the signal's handler can set it
            time.sleep(0.01)
        print(stop.asked(), flush=True)"""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    launcher = subprocess.Popen([sys.executable, "-c", code, child_code], stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "LOCAL_RANK": "0"})
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(number)
    assert launcher.wait(5) == -number
    assert launcher.stdout.readline() in ("the launcher ended\n", "SIGTERM\n")  # which one depends on its threads


def test_a_launcher_that_died_before_we_asked_is_noticed(monkeypatch):
    """prctl sends nothing for a parent that is already dead."""
    def work(ready) -> int:
        parents = iter([4711])
        monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
        monkeypatch.setenv("LOCAL_RANK", "0")
        stop = StopFlag()
        ready()
        return 75 if stop.reason == "the launcher ended" else 1
    assert status(child(work)) == 75


@pytest.mark.parametrize(("group", "reason"), [(4711, "the launcher ended"), ("own", None), (1, None)])
def test_what_process_1_started_has_lost_no_launcher(group: int | str, reason: str | None, monkeypatch) -> None:
    """Bug: in a container whose first process is the script's shell, every run stops before its first step."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "getpgid", lambda _: 1)
    def work(ready) -> int:
        monkeypatch.setattr(os, "getpgrp", lambda: os.getpid() if group == "own" else group)
        stop = StopFlag()
        ready()
        return 75 if stop.reason == reason else 1
    assert status(child(work)) == 75


def test_no_launcher_no_watch(monkeypatch):
    """nohup python …: the shell's end is no reason to stop."""
    assert not launched()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not launched()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched()


def test_one_of_two_processes_stops_both(tmp_path):
    """A rank that stops alone leaves the other waiting in the next all-reduce."""
    import torch.distributed as dist

    class Two:
        num_processes, device = 2, "cpu"

    def rank(number: int, ready) -> int:
        ready()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=number, world_size=2,
                                timeout=timedelta(seconds=20))
        stop = StopFlag()
        first = stop.asked(Two)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 75 if first is None and stop.asked(Two) == "SIGTERM" else 1

    pids = [child(lambda ready, number=number: rank(number, ready)) for number in (0, 1)]
    assert [status(pid) for pid in pids] == [75, 75]


def test_a_signal_while_processes_agree_counts_at_the_next_step(monkeypatch):
    """It comes to one of them after it has said that it knows of none: that one would stop alone."""
    import torch.distributed as dist

    stop = StopFlag()
    late = iter([lambda: stop.request("SIGTERM"), lambda: None])
    monkeypatch.setattr(dist, "all_reduce", lambda *_: next(late)())
    two = SimpleNamespace(num_processes=2, device="cpu")
    assert stop.asked(two) is None and stop.asked(two) == "SIGTERM"
