"""An output directory is never run over, never shared, and a rewound run loses nothing."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.checkpoint import TrainState, save_checkpoint
from common.faults import UserError
from common.rundir import (
    Opened,
    RunLock,
    append_metrics,
    cut_metrics,
    decide,
    fingerprint_differences,
    open_run_dir,
    read_status,
    refuse_changes,
    write_status,
)


def save(run_dir: Path, step: int) -> Path:
    def write(directory: Path) -> None:
        (directory / "w").write_bytes(b"w" * step)

    return save_checkpoint(run_dir, TrainState(step=step), write, keep=9)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run interrupted at step 35 with checkpoints at 10, 20 and 30."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text("{}")
    (run_dir / "val.jsonl").write_text("{}\n")
    write_status(run_dir, status="running", step=0)
    for step in range(5, 36, 5):
        append_metrics(run_dir / "metrics.jsonl", {"step": step, "loss": 1 / step})
        if step in (10, 20, 30):
            save(run_dir, step)
    return run_dir


def finish(run_dir: Path, status: str = "finished") -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"):
        (run_dir / name).write_text("final")
    (run_dir / "merged").mkdir()
    (run_dir / "merged" / "model.safetensors").write_text("merged")
    write_status(run_dir, status=status, step=30, exit_status=0)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def quiet(line: str) -> None:
    pass


# ---- fresh, resume, finished

@pytest.mark.parametrize("resume", [None, "auto"])
def test_an_empty_or_absent_directory_starts_fresh(tmp_path, resume):
    """The same command with --resume_from_checkpoint must work the first time too."""
    assert open_run_dir(tmp_path / "absent", resume) == Opened("fresh")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "notes.txt").write_text("mine")
    write_status(tmp_path, status="failed", reason="killed before anything was done")
    assert open_run_dir(tmp_path, resume) == Opened("fresh")


def test_a_fresh_start_does_not_run_over_a_run(run):
    """Two runs in one directory mix: the second resumes from the first one's checkpoints."""
    before = names(run)
    with pytest.raises(UserError, match="--resume_from_checkpoint.*--overwrite_output_dir"):
        open_run_dir(run)
    assert names(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "val.jsonl", "metrics.jsonl", "merged"])
@pytest.mark.parametrize("overwrite,resume", [(False, None), (True, None), (False, "auto")])
def test_what_somebody_else_left_is_never_moved_or_written_over(tmp_path, overwrite, resume, name):
    """--output_dir set to the base model's directory by mistake, or to one's project, must not cost a file there."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        open_run_dir(tmp_path, resume, overwrite)
    assert names(tmp_path) == [name]


def test_overwrite_moves_the_old_run_aside(run, capsys):
    """--overwrite_output_dir elsewhere deletes, or trains into the old files."""
    before = names(run)
    with RunLock(run):
        opened = open_run_dir(run, overwrite=True)
        assert opened.kind == "fresh" and opened.moved_to.name.startswith("run.old-")
        assert names(opened.moved_to) == before and names(run) == [".lock"]
        with pytest.raises(UserError, match="another run"), RunLock(run):
            pass
    assert "run.old-" in capsys.readouterr().out


def test_bare_resume_takes_the_newest_and_cuts_the_log(run):
    """Lines written after the last checkpoint would stand twice in metrics.jsonl."""
    with open(run / "metrics.jsonl", "a") as out:
        out.write('{"step": 36, "lo')  # killed while writing
    (run / ".partial-checkpoint-40.77").mkdir()
    opened = open_run_dir(run, "auto")
    assert opened == Opened("resume", run / "checkpoint-30", 30)
    assert steps(run / "metrics.jsonl") == [5, 10, 15, 20, 25, 30]
    assert ".partial-checkpoint-40.77" not in names(run)


def test_bare_resume_steps_over_a_damaged_checkpoint(run, capsys):
    """Stock resumes from the highest number without looking inside."""
    (run / "checkpoint-30" / "w").write_bytes(b"v" * 30)
    assert open_run_dir(run, "auto") == Opened("resume", run / "checkpoint-20", 20)
    assert steps(run / "metrics.jsonl") == [5, 10, 15, 20]
    assert "w: sha256 differs" in capsys.readouterr().out and "broken-checkpoint-30" in names(run)


def test_bare_resume_without_a_whole_checkpoint_starts_again_and_says_so(run, capsys):
    """No person is needed: from step 0 the result is the same."""
    for step in (10, 20, 30):
        (run / f"checkpoint-{step}" / "w").unlink()
    assert open_run_dir(run, "auto") == Opened("fresh")
    assert steps(run / "metrics.jsonl") == []
    assert "starting from step 0" in capsys.readouterr().out


@pytest.mark.parametrize("status", ["finished", "early_stopped"])
def test_bare_resume_of_a_finished_run_does_nothing(run, status, capsys):
    """A run that had stopped early trains on when stock resumes it."""
    finish(run, status)
    before, log = names(run), (run / "metrics.jsonl").read_bytes()
    assert open_run_dir(run, "auto").kind == "finished"
    assert names(run) == before and (run / "metrics.jsonl").read_bytes() == log
    assert status.replace("_", " ") in capsys.readouterr().out


def test_a_finished_run_whose_model_is_gone_is_resumed(run):
    """'finished' without a model would leave nothing to use."""
    write_status(run, status="finished")
    assert open_run_dir(run, "auto").kind == "resume"


def test_killed_in_the_export_resumes(run):
    """Half of a final model must not pass as a finished run."""
    (run / "adapter_model.safetensors").write_text("half")
    assert open_run_dir(run, "auto") == Opened("resume", run / "checkpoint-30", 30)


# ---- named checkpoints

def test_an_older_checkpoint_rewinds_and_nothing_is_lost(run):
    """Later checkpoints left in place would be taken by the next bare resume."""
    finish(run)
    opened = open_run_dir(run, run / "checkpoint-10", say=quiet)
    assert (opened.kind, opened.checkpoint, opened.step) == ("resume", run / "checkpoint-10", 10)
    aside = opened.moved_to
    assert aside.parent == run and aside.name.startswith("superseded-")
    assert names(run) == ["checkpoint-10", "metrics.jsonl", "run.json", aside.name, "val.jsonl"]
    assert names(aside) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-20",
                            "checkpoint-30", "merged", "metrics.jsonl", "run_status.json", "tokenizer.json"]
    assert steps(run / "metrics.jsonl") == [5, 10] and steps(aside / "metrics.jsonl") == [15, 20, 25, 30, 35]


def test_the_newest_checkpoint_named_supersedes_nothing(run):
    """Naming what bare resume would take must do the same."""
    assert open_run_dir(run, run / "checkpoint-30") == Opened("resume", run / "checkpoint-30", 30)
    assert not any("superseded" in name for name in names(run)) and steps(run / "metrics.jsonl")[-1] == 30


def test_the_path_may_be_relative_to_here_or_to_the_run(run, monkeypatch):
    """run/checkpoint-20 from the directory above, or its bare name."""
    monkeypatch.chdir(run.parent)
    for name in ("run/checkpoint-20", "checkpoint-20", "run/checkpoint-20/"):
        assert decide(Path("run"), name, False) == Opened("resume", Path("run/checkpoint-20"), 20)
    assert decide(run, "run", False).step == 30  # the run itself: as the bare flag


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    """It would continue with another run's data order."""
    other = save(tmp_path / "other", 10)
    with pytest.raises(UserError, match="not a checkpoint of .*checkpoint-10, checkpoint-20.*--init_from"):
        open_run_dir(run, other)
    with pytest.raises(UserError, match="no such checkpoint"):
        open_run_dir(run, run / "checkpoint-15")


def test_a_damaged_named_checkpoint_is_an_error_that_names_the_whole_ones(run):
    """The user asked for this one: another must not be taken silently, nor anything moved."""
    (run / "checkpoint-20" / "w").unlink()
    before = names(run)
    with pytest.raises(UserError, match="w: missing.*checkpoint-30, checkpoint-10"):
        open_run_dir(run, run / "checkpoint-20")
    assert names(run) == before


def test_a_refusal_comes_before_anything_is_moved(run):
    """A changed setting found after the rewind would leave the run rewound."""
    finish(run)
    before, log = names(run), (run / "metrics.jsonl").read_bytes()

    def check(opened: Opened) -> None:
        assert opened.step == 10
        refuse_changes(run, [("learning_rate", 1e-4, 2e-4)])
    with pytest.raises(UserError):
        open_run_dir(run, run / "checkpoint-10", check=check)
    assert names(run) == before and (run / "metrics.jsonl").read_bytes() == log


def test_a_rewind_killed_half_way_can_be_done_again(run, monkeypatch):
    """Checkpoints go from the newest down: what is left is always a run up to some step."""
    finish(run)
    real, done = os.rename, []

    def rename(old, new):
        if Path(old).name == "checkpoint-20":
            raise KeyboardInterrupt
        real(old, new), done.append(old)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        open_run_dir(run, run / "checkpoint-10", say=quiet)
    monkeypatch.undo()
    assert decide(run, "auto", False) == Opened("resume", run / "checkpoint-20", 20)
    assert open_run_dir(run, run / "checkpoint-10", say=quiet).moved_to.name.startswith("superseded-")


def test_overwrite_and_resume_contradict(run):
    """One of them would be without effect."""
    with pytest.raises(UserError, match="Leave one of them out"):
        decide(run, "auto", True)


# ---- lock

def test_the_second_run_is_refused_and_told_who_is_there(tmp_path):
    """Two runs in one directory mix or kill each other."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path / "run"):
            os.write(write, b"x")
            time.sleep(20)
        os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(UserError, match=f"process {pid} on .* since 20"), RunLock(tmp_path / "run"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with RunLock(tmp_path / "run"):  # freed by the kernel
        pass


@pytest.mark.parametrize("child", ["fork", "exec"])
def test_children_do_not_hold_the_lock(tmp_path, child):
    """A data loader's worker that outlives a killed run would block the next start."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with RunLock(tmp_path):
            if child == "fork":
                worker = os.fork()
                if worker == 0:
                    time.sleep(20)
                    os._exit(0)
            else:
                worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"], close_fds=False).pid
            os.write(write, str(worker).encode())
            time.sleep(20)
        os._exit(0)
    worker = int(os.read(read, 99))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        for _ in range(100):  # the forked worker closes its copy as the first thing it does
            try:
                with RunLock(tmp_path):
                    break
            except UserError:
                time.sleep(0.02)
        else:
            pytest.fail("the worker holds the lock")
        os.kill(worker, 0)  # and it is alive
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_refused_start_leaves_no_directory(tmp_path):
    """Exit status 2 promises that nothing was written."""
    with pytest.raises(UserError), RunLock(tmp_path / "run"):
        raise UserError("refused")
    assert names(tmp_path) == []
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "run.json").touch()
    assert names(tmp_path / "run") == [".lock", "run.json"]


# ---- status, metrics, changes

def test_status_is_merged_within_a_process_and_replaced_by_the_next(tmp_path):
    """A reason of the run before must not stand beside the new run's status."""
    write_status(tmp_path, status="running", step=1, resume_command="again")
    first = read_status(tmp_path)
    write_status(tmp_path, status="stopped", step=2, exit_status=75, reason="SIGTERM")
    found = read_status(tmp_path)
    assert (found["status"], found["step"], found["resume_command"]) == ("stopped", 2, "again")
    assert (found["started"], found["pid"]) == (first["started"], os.getpid())
    pid = os.fork()
    if pid == 0:
        try:
            write_status(tmp_path, status="running", step=2)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert "reason" not in read_status(tmp_path) and read_status(tmp_path)["pid"] == pid
    (tmp_path / "run_status.json").write_text('{"status": "run')
    assert read_status(tmp_path) is None


def test_metrics_are_cut_byte_for_byte(tmp_path):
    """Log lines must equal the uninterrupted run's."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 2, 3):
        append_metrics(path, {"step": step, "loss": 0.1 + 0.2})
    lines = path.read_bytes().splitlines(keepends=True)
    assert cut_metrics(path, 3) == 0
    assert cut_metrics(path, 2, tmp_path / "cut") == 1
    assert path.read_bytes() == b"".join(lines[:3]) and (tmp_path / "cut").read_bytes() == lines[3]
    assert cut_metrics(tmp_path / "absent", 2) == 0 and not (tmp_path / "absent").exists()
    with pytest.raises(ValueError):
        append_metrics(path, {"step": 3, "loss": float("nan")})


def test_changes_are_refused_with_a_table(tmp_path):
    """A changed learning rate is ignored by stock; changed data go unnoticed."""
    refuse_changes(tmp_path, [], fingerprint_differences({"data": "a"}, {"data": "a"}))
    with pytest.raises(UserError) as found:
        refuse_changes(tmp_path, [("learning_rate", 1e-4, 2e-4)],
                       fingerprint_differences({"data": "a", "plan": "p"}, {"data": "b", "plan": "p", "model": "m"}))
    rows = [line.split() for line in str(found.value).splitlines()[1:-1]]
    assert rows == [["the", "run", "now"], ["learning_rate", "0.0001", "0.0002"], ["data", '"a"', '"b"'],
                    ["model", "null", '"m"']]
    assert "--init_from" in str(found.value)
