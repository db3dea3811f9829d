"""Checkpoints are complete and verified or absent, whatever kills the save."""
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from common.checkpoint import (
    MANIFEST,
    STATE,
    TrainState,
    atomic_json,
    atomic_write,
    check_space,
    checkpoints,
    newest_complete,
    read_manifest,
    read_state,
    save_checkpoint,
    state_from_dict,
    tidy,
    verify,
)
from common.faults import UserError, run_main


def content(step: int) -> bytes:
    return random.Random(step).randbytes(40_000)


def writer(step: int):
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(content(step))
        (directory / "optimizer").mkdir()
        (directory / "optimizer" / "state.pt").write_bytes(content(step)[:5000])
    return write


def save(run_dir: Path, step: int, best: int | None = None, keep: int = 3) -> Path:
    state = TrainState(step=step, best_step=best, best_loss=1 / 3, tokens=step * 7, seconds=0.1 * step)
    return save_checkpoint(run_dir, state, writer(step), keep=keep, extra={"seed": 1})


def right(path: Path) -> bool:
    step = read_state(path).step
    return (verify(path) == [] and path.name == f"checkpoint-{step}"
            and (path / "model.safetensors").read_bytes() == content(step))


def in_child(work, **environment: str) -> int:
    """Run `work()` in a forked child; its wait status as subprocess gives it (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(environment)
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_state_survives_json_bit_for_bit(tmp_path):
    """A rounded best loss would call an equal loss a gain, and early stopping would come later after a resume."""
    state = TrainState(7, 0.1 + 0.2, 3, 2, True, 2**60 + 1, 5, 1e-308, {"loss_sum": 1 / 3, "count": 17.0})
    save_checkpoint(tmp_path, state, lambda directory: None, keep=1)
    assert read_state(tmp_path / "checkpoint-7") == state


@pytest.mark.parametrize("change", [{"odd": 1}, {"step": None}])
def test_state_with_other_keys_is_refused(change):
    """A state of another version must not be filled up with defaults."""
    found = {**TrainState().__dict__, **change}
    if change.get("step", 0) is None:
        del found["step"]
    with pytest.raises(UserError, match="keys differ"):
        state_from_dict(found, "place")


def test_state_with_nan_is_not_saved(tmp_path):
    """NaN is no JSON: other readers of trainer_state.json would choke on it."""
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path, TrainState(step=1, best_loss=float("nan")), writer(1), keep=1)
    assert names(tmp_path) == []


def test_manifest_names_every_file(tmp_path):
    """A file without its hash could be damaged unnoticed."""
    path = save(tmp_path, 5)
    found = read_manifest(path)
    assert sorted(found["files"]) == ["model.safetensors", "optimizer/state.pt", STATE]
    assert found["files"]["model.safetensors"]["bytes"] == 40_000
    assert (found["step"], found["extra"]) == (5, {"seed": 1})
    assert names(tmp_path) == ["checkpoint-5"] and right(path)


POINTS = ["after_weights", "before_manifest", "before_rename", "before_rotation", "in_rotation"]


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_fail_point_leaves_a_whole_checkpoint(tmp_path, point):
    """Saves in place leave a broken newest checkpoint that every resume then crashes on."""
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    assert in_child(lambda: save(tmp_path, 3, keep=2), SFT_FAIL_AT=f"{point}:3") == -signal.SIGKILL
    expected = 3 if point in ("before_rotation", "in_rotation") else 2
    assert all(right(path) for path in checkpoints(tmp_path))
    tidy(tmp_path)
    newest = newest_complete(tmp_path)
    assert newest.name == f"checkpoint-{expected}" and right(newest)
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == [f"checkpoint-{expected}", "checkpoint-4"]


@pytest.mark.parametrize("point", [*POINTS[:3], "in_replace", "before_rotation"])
def test_kill_while_replacing_a_checkpoint_of_the_same_step(tmp_path, point):
    """Deleting the old one first would lose the only checkpoint of a run stopped right after a resume."""
    save(tmp_path, 3)
    work = lambda: save_checkpoint(tmp_path, TrainState(step=3, tokens=9), writer(3), keep=1)
    assert in_child(work, SFT_FAIL_AT=point) == -signal.SIGKILL
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"] and right(tmp_path / "checkpoint-3")
    assert read_state(tmp_path / "checkpoint-3").tokens == (9 if point == "before_rotation" else 21)
    work()
    assert names(tmp_path) == ["checkpoint-3"] and read_state(tmp_path / "checkpoint-3").tokens == 9


def test_random_kills_never_cost_the_last_checkpoint(tmp_path):
    """From the first save on there is always one verified checkpoint, equal to what was saved."""
    start = time.monotonic()
    save(tmp_path, 1)
    chance, newest, landed, one_save = random.Random(0), 1, 0, time.monotonic() - start  # a busy disk: seconds
    for _ in range(20):
        tidy(tmp_path)
        found = newest_complete(tmp_path)
        assert found and right(found) and int(found.name[11:]) >= newest
        newest = int(found.name[11:])
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(newest + 1, newest + 1000):
                    save(tmp_path, step, best=1)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.002, 4 * min(one_save, 0.5)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        landed += any(name.startswith(".") for name in names(tmp_path))
        assert right(tmp_path / "checkpoint-1") and not any("broken" in name for name in names(tmp_path))
    assert newest > 1 and landed > 0  # kills did hit saves


FILES = ["model.safetensors", "optimizer/state.pt", STATE, MANIFEST]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty", "grow"])
def test_a_damaged_file_is_found_and_the_previous_checkpoint_used(tmp_path, file, damage):
    """A highest number is not a whole checkpoint: sizes alone do not see a flipped bit."""
    save(tmp_path, 1), save(tmp_path, 2)
    hurt(tmp_path / "checkpoint-2" / file, damage)
    said = []
    assert newest_complete(tmp_path, say=said.append) == tmp_path / "checkpoint-1"
    assert names(tmp_path) == ["broken-checkpoint-2", "checkpoint-1"]
    assert len(said) == 1 and file in said[0] and "broken-checkpoint-2" in said[0]


def hurt(path: Path, damage: str, bit: int = 1234) -> None:
    data = bytearray(path.read_bytes())
    if damage == "flip":
        bit %= 8 * len(data)
        data[bit // 8] ^= 1 << bit % 8
    change = {"truncate": data[:-1], "flip": data, "empty": b"", "grow": data + b"\n", "remove": b""}[damage]
    path.write_bytes(change)
    if damage == "remove":
        path.unlink()


def test_every_bit_of_the_manifest_is_guarded(tmp_path):
    """A flipped bit in `extra` or in white space would else pass as a whole checkpoint."""
    path = save(tmp_path, 1)
    whole = (path / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        hurt(path / MANIFEST, "flip", bit)
        assert verify(path), f"bit {bit}"
        (path / MANIFEST).write_bytes(whole)
    assert verify(path) == []


def test_all_damaged_gives_none_and_keeps_the_names_apart(tmp_path):
    """A second broken checkpoint of the same step must not overwrite the first."""
    for _ in range(2):
        hurt(save(tmp_path, 1) / STATE, "remove")
        assert newest_complete(tmp_path, say=lambda line: None) is None
    assert names(tmp_path) == ["broken-checkpoint-1", "broken-checkpoint-1-2"]


def test_a_renamed_checkpoint_is_found(tmp_path):
    """checkpoint-1 copied to checkpoint-9 would rewind a run without a word."""
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoint-9")
    assert "step 1" in verify(tmp_path / "checkpoint-9")[0]


def test_readers_do_not_touch_the_directory(tmp_path):
    """An evaluation beside a running training must not rename its checkpoints."""
    hurt(save(tmp_path, 1) / STATE, "flip")
    assert newest_complete(tmp_path, set_aside=False, say=lambda line: None) is None
    assert names(tmp_path) == ["checkpoint-1"]


def test_full_disk_leaves_the_old_checkpoint_and_no_partial(tmp_path, capsys):
    """A partial checkpoint that is then preferred; a traceback instead of the remedy; a wrong exit status."""
    save(tmp_path, 1)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match="checkpoint-2: about 45.* are needed.*checkpoint-1 is whole") as found:
            save(tmp_path, 2)
        assert found.value.errno == errno.EFBIG
        assert run_main(lambda argv: save(tmp_path, 2), []) == 74
    assert in_child(work) == 0
    assert names(tmp_path) == ["checkpoint-1"] and right(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("fault", [
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),      # torch.save
    OSError(errno.ENOSPC, "No space left on device")])
def test_libraries_that_hide_a_full_disk_are_understood(tmp_path, fault):
    """torch and safetensors raise no OSError; exit status 1 with their traceback would follow."""
    def write(directory: Path) -> None:
        raise fault
    with pytest.raises(OSError, match="save_total_limit"):
        save_checkpoint(tmp_path, TrainState(step=1), write, keep=1)
    assert names(tmp_path) == []


def test_any_other_fault_of_the_writer_propagates_as_it_is(tmp_path):
    """An interrupted save must not leave its partial directory."""
    def write(directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, TrainState(step=1), write, keep=1)
    assert names(tmp_path) == []


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    """Stock rotation can delete the best model of an early-stopped run."""
    for step in range(1, 8):
        save(tmp_path, step, best=min(step, 2), keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-7"]


def test_rotation_keeps_the_best_of_every_kept_checkpoint(tmp_path):
    """Going back from a damaged newest checkpoint would find its best one gone."""
    save(tmp_path, 1, best=1, keep=2), save(tmp_path, 2, best=1, keep=2), save(tmp_path, 3, best=3, keep=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    save(tmp_path, 4, best=3, keep=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    """checkpoint-9 sorts after checkpoint-10 as text."""
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_space_is_predicted(tmp_path):
    """A run that cannot be saved should not train for an hour first."""
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match="save_total_limit"):
        check_space(tmp_path / "not" / "there", 10**18)


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path):
    """A status file cut off half-way is no status."""
    atomic_write(tmp_path / "a", "old é")
    with pytest.raises(ValueError):
        atomic_json(tmp_path / "a", {"loss": float("nan")})
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "a", 5)
    assert (tmp_path / "a").read_text() == "old é" and names(tmp_path) == ["a"]
    atomic_json(tmp_path / "a", {"loss": 0.1})
    assert json.loads((tmp_path / "a").read_text()) == {"loss": 0.1}
