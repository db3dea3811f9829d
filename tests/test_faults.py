"""Whatever happens to a run, it ends with the same model, or says why it cannot. Every fault has its test:

| # | fault | test, here unless a file is named |
|---|---|---|
| 1 | stop and resume | test_resumed_equals_uninterrupted; test_training: test_resume_is_exact |
| 2 | kill -9 at random times | test_random_kills; in numbers: soak_kills.py |
| 3 | kill at every point of a save | test_kill_in_a_save; test_checkpoint: test_kill_at_a_fail_point... |
| 4 | damaged checkpoint | test_one_flipped_bit_in_each_file, test_a_lost_best...; test_checkpoint, test_rundir |
| 5 | full disk in a save | test_full_disk, test_full_disk_at_the_end |
| 6 | disk too small | test_disk_need_is_predicted |
| 7 | signals, time limit, death of the launcher | test_a_signal..., test_accelerate_launch...; test_signals |
| 8 | signal to one of two ranks | test_a_signal_to_one_rank_stops_both |
| 9 | loss or gradient not finite | test_not_finite |
| 10 | nothing to train on, too long | test_data: test_rows_without_trained_tokens..., test_cut_leaves_no_end_token |
| 11 | ids beyond the vocabulary | test_a_tokenizer_larger_than_the_model; test_model: test_a_tokenizer_of_another... |
| 12 | bad files | test_a_bad_row_writes_nothing; test_rows: the 32 kinds |
| 13 | a prompt on two sides | test_data: test_split_is_a_partition, test_split_stays_when_rows_are_added |
| 14 | control strings in text | test_chat: test_control_strings_in_text_stay_text, test_hostile_text_comes_back... |
| 15 | hostile files | test_a_pickle_bomb_does_not_run; test_model: test_pickled_weights...; test_chat: templates |
| 16 | two runs, changed runs | test_two_runs..., test_a_changed_run_is_refused, test_what_may_change; test_rundir |
| 17 | any number of processes | test_processes_do_the_same_rows; test_plan: test_all_ranks_together... |
| 18 | a dead or hung rank | test_a_dead_rank_is_named, test_a_hung_rank_is_named, test_a_failed_rank_is_quoted |
| 19 | prepare interrupted, twice | test_two_preparations_at_once; test_prepare: test_killed_while_writing... |
| 20 | finished runs, rewinding | test_a_finished_run...; test_training: test_rewind..., test_early_stopping... |
| 21 | evaluation | test_evaluation_does_not_depend_on_the_batch |
| 22 | upgrades | test_golden_losses; test_plan: test_the_plan_is_the_same_everywhere; test_chat: test_golden_ids... |

Runs are forked from this process, which has imported torch: one costs about half a second.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import chat_rows, make_llama, write_rows
from forks import SCRIPTS, Bench, Child, fork_main, hold_at, make_bench, script, warm, what_is_left

from common.checkpoint import checkpoints, numbered, seal, verify
from common.faults import CheckFailed
from common.rundir import read_status

RESUME = "--resume_from_checkpoint"
LORA = ("--lora_dropout", 0.1)
FULL = ("--no_lora", "--no_packing")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    warm()
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def reference(bench: Bench) -> callable:
    """What the uninterrupted run with some flags leaves; each is made once."""
    made: dict[tuple, dict] = {}

    def run(*flags: object, ranks: int = 1) -> dict:
        if (flags, ranks) not in made:
            out = bench.place / f"reference-{len(made)}"
            ended(bench.run(out, *flags, ranks=ranks), 0)
            made[flags, ranks] = what_is_left(out)
        return made[flags, ranks]
    return run


def ended(child: Child, code: int) -> str:
    """The child's output, if all of its processes ended with this status."""
    assert set(child.codes) == {code}, f"{child.codes}\n{child.output[-3000:]}"
    return child.output


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def stages(bench: Bench) -> tuple:
    place = bench.place / "stages.json"
    place.write_text(json.dumps({"stages": [
        {"name": "short", "until_step": 3, "datasets": [{"path": str(bench.rows)}]},
        {"name": "mixed", "until_step": 8, "datasets": [{"path": str(bench.rows), "weight": 1.0, "n_samples": 30},
                                                        {"path": str(bench.more), "weight": 2.0}]}]}))
    return ("--config_path", place)


CASES = {
    "lora, packed, dropout": LORA,
    "lora, padded, neftune": ("--no_packing", "--neftune_noise_alpha", 5),
    "full, padded, mid-epoch": FULL,
    "full, packed, epochs": ("--no_lora", "--max_steps", -1, "--num_train_epochs", 2.5, "--max_seq_length", 256,
                             "--per_device_train_batch_size", 2),
    "two data sets": ("--no_lora", "--weight_unit", "tokens", "--dataset_weights", 0.7, 0.3),
    "stages, fresh optimizer in each": ("stages", "--reset_optimizer_per_stage"),
    "early stopping, sgd": ("--no_lora", "--optim", "sgd", "--early_stopping_patience", 2,
                            "--early_stopping_threshold", 5),
    "bf16": ("--no_lora", "--warmup_steps", 2, "--weight_decay", 0.1),
    "adafactor": ("--no_lora", "--optim", "adafactor", "--logging_steps", 3),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(bench, reference, tmp_path, monkeypatch, case):
    """Resume that restarts the data order, the optimizer, the dropout masks or the early-stopping counter."""
    flags = CASES[case]
    if case == "bf16":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    if case == "two data sets":
        flags = ("--dataset_paths", bench.rows, bench.more, *flags)
    if flags[0] == "stages":
        flags = (*stages(bench), *flags[1:])
    ended(bench.run(tmp_path / "run", *flags, RESUME, env={"SFT_FAIL_AT": "in_step:4"}), -signal.SIGKILL)
    ended(bench.run(tmp_path / "run", *flags, RESUME), 0)
    assert what_is_left(tmp_path / "run") == reference(*flags)
    assert read_status(tmp_path / "run")["resumed_from"] == "checkpoint-2"


def test_a_damaged_base_is_made_anew(bench, reference, tmp_path):
    """A bit that flips in the base with its new rows: training goes on against another model, without a word."""
    ended(bench.run(tmp_path / "run", *LORA, env={"SFT_FAIL_AT": "in_step:4"}), -signal.SIGKILL)
    path = tmp_path / "run" / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3000] ^= 0x40
    path.write_bytes(content)
    said = ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    assert "model.safetensors: sha256 differs); it is made anew" in said
    assert what_is_left(tmp_path / "run") == reference(*LORA)


def test_random_kills(bench, reference, tmp_path):
    """A checkpoint in place but not whole; a start that needs a person."""
    whole, chance, kills, start = reference(*LORA), random.Random(1), 0, time.monotonic()
    while kills < 10:
        child = bench.start(tmp_path / "run", *LORA, RESUME)
        time.sleep(chance.uniform(0.1, 0.8))
        child.kill()
        kills += child.wait() == -signal.SIGKILL
        if child.codes == [0] and kills < 10:
            assert what_is_left(tmp_path / "run") == whole
            shutil.rmtree(tmp_path / "run")
        assert not any("broken" in name for name in names(tmp_path / "run")) and time.monotonic() < start + 120
        if numbered(tmp_path / "run"):
            assert verify(checkpoints(tmp_path / "run")[-1]) == []
    ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    assert what_is_left(tmp_path / "run") == whole


@pytest.mark.parametrize("point", ["after_weights:4", "before_manifest:4", "before_rename:4", "before_rotation:8",
                                   "in_rotation:8"])
def test_kill_in_a_save(bench, reference, tmp_path, point):
    """Saves in place leave a newest checkpoint that every resume crashes on."""
    keep = (*FULL, "--save_total_limit", 1)
    ended(bench.run(tmp_path / "run", *keep, RESUME, env={"SFT_FAIL_AT": point}), -signal.SIGKILL)
    ended(bench.run(tmp_path / "run", *keep, RESUME), 0)
    left, whole = what_is_left(tmp_path / "run"), reference(*FULL)
    assert left == whole and not any(name.startswith((".partial", ".removed")) for name in names(tmp_path / "run"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.fixture(scope="module")
def stopped(bench: Bench) -> Path:
    """A run killed in step 7, with checkpoints 2, 4 and 6."""
    ended(bench.run(bench.place / "stopped", *LORA, env={"SFT_FAIL_AT": "in_step:7"}), -signal.SIGKILL)
    assert [path.name for path in checkpoints(bench.place / "stopped")] == [f"checkpoint-{n}" for n in (2, 4, 6)]
    return bench.place / "stopped"


def test_one_flipped_bit_in_each_file(bench, reference, stopped, tmp_path):
    """Stock resume loads flipped weights and optimizer states without a word."""
    files = sorted(path.name for path in (stopped / "checkpoint-6").iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "MANIFEST.json"} < {*files}
    chance, children = random.Random(2), []
    for i, name in enumerate(files):
        run = shutil.copytree(stopped, tmp_path / f"run{i}")
        flip(run / "checkpoint-6" / name, chance.randrange(8 * 10**9))
        children.append((name, run, bench.start(run, *LORA, RESUME)))
        if i % 2 or i == len(files) - 1:  # two at a time
            for name, run, child in children[-1 - i % 2:]:
                child.wait()
                said = ended(child, 0)
                assert f"checkpoint-6: damaged ({name}: " in said and "resumed from" in said, said
                assert "broken-checkpoint-6" in names(run), name
                assert read_status(run)["resumed_from"] == "checkpoint-4", name
                assert what_is_left(run) == reference(*LORA), name


def test_a_lost_best_checkpoint_is_made_again(bench, reference, tmp_path):
    """The newest checkpoint is whole, the best one is not: its damaged weights would be left as the model."""
    run, flags = tmp_path / "run", (*FULL, "--early_stopping_threshold", 9, "--early_stopping_patience", 9)
    ended(bench.run(run, *flags, env={"SFT_FAIL_AT": "in_step:7"}), -signal.SIGKILL)
    assert json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["best_step"] == 2
    flip(run / "checkpoint-2" / "model.safetensors", 12345)
    said = ended(bench.run(run, *flags, RESUME), 0)
    assert "broken-checkpoint-2" in names(run) and "starting from step 0" in said
    assert any(name.startswith("superseded-") for name in names(run))
    assert what_is_left(run) == reference(*flags)


def test_a_best_checkpoint_lost_while_training_is_not_exported(bench, reference, tmp_path):
    """Read at the end without looking, it would become the final model."""
    run, flags = tmp_path / "run", (*FULL, "--early_stopping_threshold", 9, "--early_stopping_patience", 9)
    damage = hold_at(7, lambda: flip(run / "checkpoint-2/model.safetensors", 9999))
    said = ended(bench.run(run, *flags, patch=damage), 74)
    assert "checkpoint-2: damaged" in said and not (run / "model.safetensors").exists()
    ended(bench.run(run, *flags, RESUME), 0)
    assert what_is_left(run) == reference(*flags)


def test_full_disk(bench, reference, tmp_path):
    """Stock leaves a partial checkpoint and prefers it afterwards."""
    def fill() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    said = ended(bench.run(tmp_path / "run", *LORA, patch=hold_at(4, fill)), 74)
    assert "while saving checkpoint-4" in said and "Traceback" not in said
    status = read_status(tmp_path / "run")
    assert (status["status"], status["exit_status"]) == ("failed", 74) and "save_total_limit" in status["reason"]
    assert [name for name in names(tmp_path / "run") if "checkpoint" in name] == ["checkpoint-2"]
    ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    assert what_is_left(tmp_path / "run") == reference(*LORA)


def test_full_disk_at_the_end(bench, reference, tmp_path):
    """The libraries raise no OSError for it: a traceback and status 1 after hours of training."""
    def patch() -> None:
        import resource

        import common.leave as leave

        real = leave.write_model

        def write_model(*args: object) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            real(*args)
        leave.write_model = write_model

    said = ended(bench.run(tmp_path / "run", *LORA, patch=patch), 74)
    assert "Make room and start again" in said and "Traceback" not in said
    assert read_status(tmp_path / "run")["exit_status"] == 74
    ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    assert what_is_left(tmp_path / "run") == reference(*LORA)


@pytest.mark.parametrize("flags", [LORA, FULL])
def test_disk_need_is_predicted(bench, tmp_path, flags):
    """A run that cannot be saved trains for an hour first. Predicted is what is really taken, to 30 %."""
    def small(free: int) -> callable:
        def patch() -> None:
            import common.checkpoint

            common.checkpoint.free_bytes = lambda place: free
        return patch

    said = ended(bench.run(tmp_path / "run", *flags, patch=small(1000)), 2)
    assert "--save_total_limit" in said and names(tmp_path / "run") in ([], [".lock"])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    number, unit = said.split("need about ")[1].split()[:2]
    needed = float(number) * {"kB": 1e3, "MB": 1e6}[unit.rstrip(",")]
    ended(bench.run(tmp_path / "run", *flags, "--save_total_limit", 3, patch=small(int(1.1 * needed))), 0)
    kinds = ("*.safetensors", "optimizer.pt")
    one = sum(f.stat().st_size for kind in kinds for f in (tmp_path / "run" / "checkpoint-8").glob(kind))
    final = sum(f.stat().st_size for f in (tmp_path / "run").glob("*.safetensors"))
    assert 0.7 < (5 * one + final) / needed < 1.3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step(bench, reference, tmp_path, number):
    """Stock saves a torn state and ends with 0."""
    said = ended(bench.run(tmp_path / "run", *LORA, patch=hold_at(3, lambda: kill_self(number))), 75)
    assert f"{number.name} at step 3 of 8; checkpoint-3 is saved" in said and RESUME in said
    assert verify(tmp_path / "run" / "checkpoint-3") == [] and not list((tmp_path / "run").glob("adapter_model*"))
    status = read_status(tmp_path / "run")
    assert (status["status"], status["exit_status"], status["step"]) == ("stopped", 75, 3)
    ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    left = what_is_left(tmp_path / "run")
    assert left == reference(*LORA)


def test_the_resume_command_goes_on(bench, tmp_path):
    """A run that was taken back to a checkpoint, then stopped, must not be taken back again."""
    ended(bench.run(tmp_path / "run", *LORA), 0)
    flags = (*LORA, RESUME, tmp_path / "run" / "checkpoint-4")
    ended(bench.run(tmp_path / "run", *flags, patch=hold_at(7, lambda: kill_self(signal.SIGTERM))), 75)
    command = shlex.split(read_status(tmp_path / "run")["resume_command"])
    assert command[:2] == ["python", "scripts/03_sft.py"] and command[-1] == RESUME
    child = fork_main(script("03_sft").main, command[2:], tmp_path / "again.log")
    child.wait()
    assert f"resumed from {tmp_path / 'run' / 'checkpoint-7'}" in ended(child, 0)


def test_a_signal_in_a_save(bench, reference, tmp_path):
    """A save that is torn apart by the signal that asks for one."""
    def patch() -> None:
        import common.run as run

        real = run.write_model

        def write_model(*args: object) -> None:
            real(*args)
            kill_self(signal.SIGTERM)
        run.write_model = write_model

    said = ended(bench.run(tmp_path / "run", *LORA, patch=patch), 75)
    assert "checkpoint-2 is saved" in said or "checkpoint-3 is saved" in said
    ended(bench.run(tmp_path / "run", *LORA, RESUME), 0)
    assert what_is_left(tmp_path / "run") == reference(*LORA)


def test_a_signal_while_starting(bench, tmp_path):
    """A run that is to stop must not load a model and train a step first."""
    def patch() -> None:
        import common.run as run

        real = run.gather

        def gather(*args: object) -> object:
            kill_self(signal.SIGTERM)
            return real(*args)
        run.gather = gather

    said = ended(bench.run(tmp_path / "run", *LORA, patch=patch), 75)
    assert "nothing was begun" in said and names(tmp_path) == ["run.log"]


def test_the_second_signal_ends_at_once(bench, tmp_path):
    """A hung step must not need kill -9."""
    def twice() -> None:
        kill_self(signal.SIGTERM)
        time.sleep(0.2)
        kill_self(signal.SIGTERM)

    def patch() -> None:
        from common import signals

        signals.SAME_REQUEST_SECONDS = 0.05
        hold_at(3, twice)()

    ended(bench.run(tmp_path / "run", *LORA, patch=patch), 128 + signal.SIGTERM)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_the_time_limit(bench, reference, tmp_path):
    """A job that the scheduler kills at its limit loses the steps since the last save."""
    flags = (*LORA, RESUME, "--max_minutes")
    said = ended(bench.run(tmp_path / "run", *flags, 0.5, patch=hold_at(5, lambda: shift_clock(40))), 75)
    assert "--max_minutes 0.5 at step 5 of 8; checkpoint-5 is saved" in said
    ended(bench.run(tmp_path / "run", *flags, 5), 0)
    assert what_is_left(tmp_path / "run") == reference(*LORA)


def shift_clock(seconds: float) -> None:
    from common import signals

    real = time.monotonic
    signals.time = type("Clock", (), {"monotonic": staticmethod(lambda: real() + seconds)})


def test_a_signal_to_one_rank_stops_both(bench, reference, tmp_path):
    """A rank that stops alone leaves the other waiting for ever."""
    def patch() -> None:
        if os.environ["RANK"] == "1":
            hold_at(3, lambda: kill_self(signal.SIGTERM))()

    flags = (*FULL, "--gradient_accumulation_steps", 1)
    said = ended(bench.run(tmp_path / "run", *flags, ranks=2, patch=patch), 75)
    assert "at step 3 of 8" in said and verify(tmp_path / "run" / "checkpoint-3") == []
    ended(bench.run(tmp_path / "run", *flags, RESUME, ranks=2), 0)
    assert what_is_left(tmp_path / "run") == reference(*flags, ranks=2)


def test_no_process_ends_before_the_stop_is_noted(bench, tmp_path):
    """A launcher ends all others when the first process is gone: the main one, whose tracker takes its time, never
    wrote that the run was stopped, so that a job was not queued again."""
    def patch() -> None:
        import common.rundir as rundir

        real = rundir.write_status

        def write_status(run_dir: Path, **entries: object) -> None:
            if entries.get("status") == "stopped":
                time.sleep(1.5)
            real(run_dir, **entries)

        rundir.write_status = write_status
        hold_at(3, lambda: kill_self(signal.SIGTERM))()

    run = tmp_path / "run"
    child = bench.start(run, *FULL, "--gradient_accumulation_steps", 1, ranks=2, patch=patch)
    _, status = os.waitpid(child.pids.pop(1), 0)
    assert os.waitstatus_to_exitcode(status) == 75 and read_status(run)["status"] == "stopped"
    assert child.wait() == 75 and read_status(run)["exit_status"] == 75


@pytest.mark.parametrize("step", [1, 3])
def test_too_little_memory_is_one_sentence(bench, tmp_path, step):
    """The commonest fault on a GPU: a traceback, and the mended command is refused because a run is there."""
    def give_up() -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    run = tmp_path / "run"
    said = ended(bench.run(run, *FULL, "--report_to", "tensorboard", patch=hold_at(step, give_up)), 2)
    assert "error: the memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert "--gradient_checkpointing" in said and "Traceback" not in said
    if step == 1:
        assert names(run) == []
        ended(bench.run(run, *FULL, "--max_seq_length", 64), 0)  # what is mended need not overwrite anything
    else:
        assert read_status(run)["exit_status"] == 2
        ended(bench.run(run, *FULL, "--gradient_checkpointing", RESUME), 0)


def test_full_disk_before_the_first_step(bench, tmp_path):
    """A plan half written is taken for a run, and the same command is refused when there is room again."""
    def patch() -> None:
        import errno

        import common.leave as leave

        def write_jsonl(path: Path, rows: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        leave.write_jsonl = write_jsonl

    run = tmp_path / "run"
    said = ended(bench.run(run, *FULL, patch=patch), 74)
    assert "Make room" in said and "Traceback" not in said and names(run) == []
    ended(bench.run(run, *FULL), 0)


ENDLESS = ("--max_steps", 20000, "--save_steps", 20000, "--eval_steps", 20000)


def launch(bench: Bench, out: Path) -> subprocess.Popen:
    """A real `accelerate launch` in a process group of its own, training for minutes if nobody stops it."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    argv = bench.argv(out, *ENDLESS)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--mixed_precision", "no",
               str(SCRIPTS / "03_sft.py"), *argv]
    return subprocess.Popen(command, env=env, stdout=open(f"{out}.log", "w"), stderr=subprocess.STDOUT,
                            start_new_session=True)


def wait_until(found: callable, seconds: float = 90) -> object:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return value


def stop_launcher(out: Path, launcher: subprocess.Popen, number: int) -> None:
    """Wait until the run trains, send the launcher a signal, and wait for the end of what it had started."""
    wait_until(lambda: launcher.poll() is not None or (out / "metrics.jsonl").exists())
    assert launcher.poll() is None, Path(f"{out}.log").read_text()
    child = read_status(out)["pid"]
    assert child != launcher.pid
    launcher.send_signal(number)
    assert launcher.wait(30) == -number
    wait_until(lambda: not Path(f"/proc/{child}").exists(), 30)


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's death is told by Linux")
def test_accelerate_launch_leaves_no_orphan(bench, tmp_path):
    """The launcher forwards nothing: its child would train on for hours, holding directory and GPU."""
    runs = {number: (tmp_path / number.name, launch(bench, tmp_path / number.name))
            for number in (signal.SIGTERM, signal.SIGKILL)}  # both at once: each takes seconds to start
    try:
        for number, (out, launcher) in runs.items():
            stop_launcher(out, launcher, number)
    finally:
        for _, launcher in runs.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    for out, _ in runs.values():
        status = read_status(out)
        assert (status["status"], status["exit_status"]) == ("stopped", 75) and status["step"] > 0
        assert verify(out / f"checkpoint-{status['step']}") == []
        assert status["resume_command"].startswith("accelerate launch --mixed_precision no")
        assert RESUME in status["resume_command"]
        patch = hold_at(status["step"] + 2, lambda: kill_self(signal.SIGTERM))
        said = ended(bench.run(out, *ENDLESS, RESUME, patch=patch), 75)
        assert f"resumed from {out / 'checkpoint-'}{status['step']}" in said


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(bench, tmp_path, what):
    """Stock logs a model full of NaN as loss 0.0 and saves it."""
    def patch() -> None:
        import torch

        import common.train as train

        real, now = train.train_step, [0]

        def train_step(accelerator: object, model: object, *rest: object) -> object:
            now[0] = rest[3] + 1
            if now[0] == 3 and what == "gradient":
                next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
            if now[0] == 3 and what == "loss":
                model.register_forward_hook(lambda module, inputs, output: output * torch.tensor(float("nan")))
            return real(accelerator, model, *rest)
        train.train_step = train_step

    run = tmp_path / "run"
    said = ended(bench.run(run, *FULL, patch=patch), 3)
    rows = explained(bench, tmp_path, 3, *FULL)
    assert "step 3: loss" in said and all(place in said for place in rows) and len(rows) == 2
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"] and not (run / "model.safetensors").exists()
    status = read_status(run)
    assert status["exit_status"] == 3 and rows[0] in status["reason"]


def explained(bench: Bench, tmp_path: Path, step: int, *flags: object) -> list[str]:
    """file:line of every example in a step, as --explain_step prints them."""
    said = ended(bench.run(tmp_path / "run", *flags, "--explain_step", step), 0)
    return [line.split()[2] for line in said.splitlines() if line.lstrip()[:1].isdigit() and ".jsonl:" in line]


def test_a_tokenizer_larger_than_the_model(bench, tmp_path):
    """An index beyond the embeddings is an assertion on the GPU, or memory of something else."""
    small = make_llama(tmp_path / "small", 200)
    said = ended(bench.run(tmp_path / "run", "--model_path", small), 2)
    assert "200 token ids" in said and not (tmp_path / "run").exists()


def test_a_bad_row_writes_nothing(bench, tmp_path):
    """Half a directory from a start that was refused."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}])
    said = ended(bench.run(tmp_path / "run", "--dataset_paths", rows, ranks=2), 2)
    assert f"{rows}:2" in said and said.count("is missing") == 1 and not (tmp_path / "run").exists()


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {os.environ['BOMB']}",)


def test_a_pickle_bomb_does_not_run(bench, stopped, tmp_path, monkeypatch):
    """An optimizer state with a right manifest that runs code when it is loaded."""
    import torch

    run = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.setenv("BOMB", str(tmp_path / "bang"))
    torch.save({"state": Bomb()}, run / "checkpoint-6" / "optimizer.pt")
    (run / "checkpoint-6" / "MANIFEST.json").unlink()
    seal(run / "checkpoint-6", 6, {})
    child = bench.run(run, *LORA, RESUME)
    assert child.codes[0] not in (0, 75) and not (tmp_path / "bang").exists()


def test_other_settings_where_no_checkpoint_was_written(bench, tmp_path):
    """Guards against a run.json that tells of a run that never was: killed in the first step, started again with other
    settings, on the base that the first start had left."""
    flags = ("--learning_rate", 0.004, RESUME)
    ended(bench.run(tmp_path / "run", *flags, env={"SFT_FAIL_AT": "in_step:1"}), -signal.SIGKILL)
    other = ("--learning_rate", 0.001, *flags[2:])
    said = ended(bench.run(tmp_path / "run", *other), 2)
    assert "learning_rate" in said and "--overwrite_output_dir to start anew: it has no checkpoint" in said
    ended(bench.run(tmp_path / "run", *flags, "--max_steps", 8, "--save_steps", 3), 0)
    run = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (run["learning_rate"], run["save_steps"]) == (0.004, 3)  # free settings as they were last used
    (tmp_path / "c.json").write_text('{"overwrite_output_dir": true}')
    again = (*flags, "--save_steps", 3, "--dataset_paths", bench.rows, "--max_steps", 8)
    assert "nothing to do" in ended(bench.run(tmp_path / "run", *again, "--config_path", tmp_path / "c.json"), 0)
    bench.run(tmp_path / "run", *other[:2], "--overwrite_output_dir", env={"SFT_FAIL_AT": "in_step:1"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["learning_rate"] == 0.001


def test_a_reader_that_leaves(bench, tmp_path):
    """`03_sft.py … | head` ended the training with status 0 and without a model."""
    def patch() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    assert "error" not in ended(bench.run(tmp_path / "run", *LORA, patch=patch), 0).lower()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_two_runs_in_one_directory(bench, tmp_path):
    """Two runs mix or kill each other."""
    patch = hold_at(3, lambda: time.sleep(60))
    first = bench.start(tmp_path / "run", *LORA, patch=patch)
    wait_until(lambda: checkpoints(tmp_path / "run"))
    before = names(tmp_path / "run")
    try:
        assert f"process {first.pids[0]}" in ended(bench.run(tmp_path / "run", *LORA, RESUME), 2)
        assert names(tmp_path / "run") == before and read_status(tmp_path / "run")["pid"] == first.pids[0]
    finally:
        first.kill()
        first.wait()


CHANGES = {
    "learning_rate": ("--learning_rate", 0.004),
    "seed": ("--seed", 43),
    "dataset_weights": ("--dataset_weights", 0.6, 0.4),
    "prompt_template": ("--prompt_template", "instruct"),
    "per_device_train_batch_size": ("--per_device_train_batch_size", 2),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps", 1),
    "max_steps": ("--max_steps", 9),
    "lora_r": ("--lora_r", 8),
    "data rows": (),
    "tokenizer and template": (),
    "model": (),
}


@pytest.fixture(scope="module")
def mixed(bench: Bench, spm_bpe: str) -> tuple[Path, tuple]:
    """A run with two data sets and weights, stopped; and its flags, with places that may be changed."""
    place = bench.place / "mixed"
    place.mkdir()
    shutil.copytree(bench.base, place / "base"), shutil.copy(bench.tokenizer, place / "spm.model")
    shutil.copy(bench.rows, place / "rows.jsonl"), shutil.copy(bench.more, place / "more.jsonl")
    flags = ("--dataset_paths", place / "rows.jsonl", place / "more.jsonl", "--dataset_weights", 0.7, 0.3,
             "--model_path", place / "base", "--tokenizer_path", place / "spm.model", RESUME)
    ended(bench.run(place / "run", *flags, env={"SFT_FAIL_AT": "in_step:4"}), -signal.SIGKILL)
    return place, flags


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_is_refused(bench, mixed, name, request):
    """Stock ignores a changed learning rate and does not notice changed data."""
    place, flags = mixed
    change = {"data rows": place / "rows.jsonl", "model": place / "base" / "model.safetensors",
              "tokenizer and template": place / "spm.model"}.get(name)
    held = change.read_bytes() if change else b""
    if name == "data rows":
        change.write_bytes(held.replace(b"cat", b"cot", 1))
    elif name == "model":
        change.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    elif change:
        other = Path(request.getfixturevalue("spm_unigram")).read_bytes()
        assert len(held) == len(other) and held == other  # the same tokenizer: one score is changed
        import struct

        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(held)
        proto.pieces[300].score -= struct.unpack("f", struct.pack("f", 0.5))[0]
        change.write_bytes(proto.SerializeToString())
    before = names(place / "run")
    given = list(map(str, flags))
    if CHANGES[name]:
        flag, *values = CHANGES[name]
        if flag in given:
            given[given.index(flag) + 1:given.index(flag) + 1 + len(values)] = values
        else:
            given += [flag, *values]
    try:
        said = ended(bench.run(place / "run", *given), 2)
        table = said[said.index("error: "):]
        assert f"  {name} " in table and "the run" in table and "--init_from" in table, table
        assert names(place / "run") == before
    finally:
        Path(f"{place / 'run'}.log").unlink()
        if change:
            change.write_bytes(held)


def test_what_may_change(bench, reference, tmp_path):
    """Wanting more log lines or fewer checkpoints must not cost the run."""
    ended(bench.run(tmp_path / "run", *LORA, env={"SFT_FAIL_AT": "in_step:4"}), -signal.SIGKILL)
    flags = (*LORA, RESUME, "--logging_steps", 2, "--save_steps", 3, "--report_to", "tensorboard",
             "--per_device_eval_batch_size", 2)
    ended(bench.run(tmp_path / "run", *flags), 0)
    left, whole = what_is_left(tmp_path / "run"), reference(*LORA)
    assert left["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
    assert [line["step"] for line in left["metrics"] if "loss" in line] == [1, 2, 4, 6, 8]


def seen_rows(out: Path) -> callable:
    """A patch: every process notes the token ids of each example that it trains, by step and pass."""
    def patch() -> None:
        import common.train as train

        real_step, real_inputs, now = train.train_step, train.batch_inputs, [None]

        def train_step(*args: object, **options: object) -> object:
            now[0] = args[5] + 1
            result = real_step(*args, **options)
            now[0] = None
            return result

        def batch_inputs(batch: object) -> dict:
            if now[0]:
                ids, bounds = batch.input_ids.flatten().tolist(), batch.bounds.tolist()
                with open(f"{out}.seen.{os.environ.get('RANK', 0)}", "a") as log:
                    segments = [ids[a:b] for a, b in zip(bounds, bounds[1:])]
                    log.write(json.dumps([now[0], [ids for ids in segments if any(ids)]]) + "\n")  # but padding, id 0
            return real_inputs(batch)
        train.train_step, train.batch_inputs = train_step, batch_inputs
    return patch


def by_step(out: Path) -> dict[int, list]:
    found: dict[int, list] = {}
    for file in sorted(out.parent.glob(f"{out.name}.seen.*")):
        for line in file.read_text().splitlines():
            step, row = json.loads(line)
            found.setdefault(step, []).append(row)
    return {step: sorted(rows) for step, rows in sorted(found.items())}


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def test_processes_do_the_same_rows(bench, tmp_path):
    """Data order, loss scale or gradients that depend on the number of processes; also when it changes at a resume."""
    flags = ("--lora_dropout", 0, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps")
    for ranks in (1, 2, 4):
        out = tmp_path / f"run{ranks}"
        ended(bench.run(out, *flags, 4 // ranks, ranks=ranks, patch=seen_rows(out)), 0)
    out = tmp_path / "changed"
    stop = {"SFT_FAIL_AT": "in_step:5"}
    assert -signal.SIGKILL in bench.run(out, *flags, 2, ranks=2, env=stop, patch=seen_rows(out)).codes
    for file in tmp_path.glob("changed.seen.*"):  # what was done after the last checkpoint is done again
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if json.loads(line)[0] <= 4))
    ended(bench.run(out, *flags, 2, RESUME, ranks=1, patch=seen_rows(out)), 0)
    rows, expected = by_step(tmp_path / "run1"), losses(tmp_path / "run1")
    assert list(rows) == list(range(1, 9)) and all(len(step) == 4 for step in rows.values())
    for other in ("run2", "run4", "changed"):
        assert by_step(tmp_path / other) == rows, other
        assert losses(tmp_path / other) == pytest.approx(expected, abs=1e-6), other


TWO = (*FULL, "--gradient_accumulation_steps", 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_is_named(bench, reference, tmp_path, rank):
    """The others wait for it until somebody looks, and the log says "connection closed by peer"."""
    def patch() -> None:
        if os.environ["RANK"] == str(rank):
            hold_at(5, kill_self)()

    start = time.monotonic()
    child = bench.run(tmp_path / "run", *TWO, ranks=2, patch=patch)
    assert child.codes[rank] == -signal.SIGKILL and child.codes[1 - rank] == 70 and time.monotonic() < start + 30
    status = read_status(tmp_path / "run")
    assert (status["status"], status["exit_status"]) == ("failed", 70)
    assert f"rank {rank} (process {child.pids[rank]}) died at " in status["reason"], status
    ended(bench.run(tmp_path / "run", *TWO, RESUME, ranks=2), 0)
    assert what_is_left(tmp_path / "run") == reference(*TWO, ranks=2)


def test_a_hung_rank_is_named(bench, reference, tmp_path):
    """The backend's time limit is half an hour and names nobody."""
    def patch() -> None:
        if os.environ["RANK"] == "1":
            hold_at(5, lambda: kill_self(signal.SIGSTOP))()

    child = bench.start(tmp_path / "run", *TWO, "--rank_timeout_minutes", 0.08, ranks=2, patch=patch)
    try:
        wait_until(lambda: (read_status(tmp_path / "run") or {}).get("status") == "failed", 30)
    finally:
        child.kill(ranks=[1])
        child.wait()
    assert child.codes == [70, -signal.SIGKILL]
    status = read_status(tmp_path / "run")
    assert status["exit_status"] == 70 and f"rank 1 (process {child.pids[1]}" in status["reason"]
    assert "did not come further than step 5" in status["reason"]
    ended(bench.run(tmp_path / "run", *TWO, RESUME, ranks=2), 0)
    assert what_is_left(tmp_path / "run") == reference(*TWO, ranks=2)


def test_a_save_may_take_longer_than_the_limit_for_a_hang(bench, reference, tmp_path):
    """A slow network disk ends the job at its first save, and again after every resume."""
    def patch() -> None:
        import common.checkpoint as checkpoint

        real = checkpoint.seal

        def seal(*args: object) -> dict:
            time.sleep(4 if args[1] == 2 else 0)
            return real(*args)
        checkpoint.seal = seal

    ended(bench.run(tmp_path / "run", *TWO, "--rank_timeout_minutes", 0.04, ranks=2, patch=patch), 0)
    assert what_is_left(tmp_path / "run") == reference(*TWO, ranks=2)


def test_a_failed_rank_is_quoted(bench, tmp_path):
    """One process runs out of memory; the main one only sees a closed connection."""
    def fail() -> None:
        raise MemoryError("no room for the batch")

    def patch() -> None:
        if os.environ["RANK"] == "1":
            hold_at(3, fail)()

    child = bench.run(tmp_path / "run", *TWO, ranks=2, patch=patch)
    assert child.codes == [70, 1]
    reason = read_status(tmp_path / "run")["reason"]
    assert "rank 1 failed at step 3, pass 1: MemoryError: no room for the batch" in reason


def test_a_finished_run_is_left_alone_and_rewound(bench, reference, tmp_path):
    """Stock trains on when a finished or early-stopped run is resumed."""
    run = tmp_path / "run"
    ended(bench.run(run, *LORA), 0)
    whole = what_is_left(run)
    said = ended(bench.run(run, *LORA, RESUME), 0)
    assert "nothing to do" in said and what_is_left(run) == whole == reference(*LORA)
    ended(bench.run(run, *LORA, RESUME, run / "checkpoint-4"), 0)
    assert what_is_left(run) == whole
    assert {"checkpoint-6", "checkpoint-8", "adapter_model.safetensors"} <= {*names(next(run.glob("superseded-*")))}


def test_two_preparations_at_once(bench, tmp_path):
    """Two that write the same file: half of each."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "alpaca_data.json").write_text(json.dumps([
        {"instruction": row["prompt"], "input": "", "output": row["response"]} for row in chat_rows(3000)]))
    argv = lambda out: ["--dataset", "alpaca", "--raw_dir", str(raw), "--output_dir", str(out)]
    both = [fork_main(script("prepare_sft_datasets").main, argv(tmp_path / out), tmp_path / f"{i}.log")
            for i, out in enumerate(("shared", "shared", "alone"))]
    for child in both:
        child.wait()
        ended(child, 0)
    written = [(tmp_path / out / "alpaca.jsonl").read_bytes() for out in ("shared", "alone")]
    assert written[0] == written[1] and written[0].count(b"\n") == 3000
    assert names(tmp_path / "shared") == names(tmp_path / "alone")


def test_evaluation_does_not_depend_on_the_batch(bench, reference, tmp_path):
    """A mean of batch means: the best model and early stopping then depend on the batch size."""
    found = []
    for i, (size, ranks) in enumerate([(1, 1), (5, 1), (3, 2)]):
        flags = ("--lora_dropout", 0, "--max_steps", 2, "--gradient_accumulation_steps", 2 // ranks,
                 "--val_split_ratio", 0.3, "--per_device_eval_batch_size", size)
        ended(bench.run(tmp_path / f"run{i}", *flags, ranks=ranks), 0)
        found.append(losses(tmp_path / f"run{i}")[-1])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-7)


def test_golden_losses(bench, tmp_path):
    """An upgrade of a library that changes what is learnt."""
    ended(bench.run(tmp_path / "run", "--no_lora", "--max_steps", 3), 0)
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["fingerprints"]["plan"]
    assert (plan[:12], losses(tmp_path / "run")[:2]) == (GOLDEN_PLAN, pytest.approx(GOLDEN_LOSSES, abs=2e-4))


GOLDEN_PLAN, GOLDEN_LOSSES = "f4ef6b2a3eda", [6.51337, 6.15925]


# ---- what users can ask for

@pytest.mark.parametrize("flags", [LORA, FULL, "stages"])
def test_verify_resume_passes(bench, tmp_path, capsys, flags):
    """The promise, on the user's own material; nothing is left behind."""
    flags = stages(bench) if flags == "stages" else flags
    assert verified(bench, tmp_path, flags) == 0
    assert "PASS" in capsys.readouterr().out and names(tmp_path) == []


def verified(bench: Bench, tmp_path: Path, flags: tuple, patch: callable = None) -> int:

    from common.config import parse
    from common.settings import SftConfig
    from common.verify import verify_resume

    def changes() -> None:
        import common.leave

        common.leave.report = lambda *_: None
        if patch:
            patch()

    start = lambda argv, env, log: fork_main(script("03_sft").main, argv, log, env=env, patch=changes).wait()
    return verify_resume(parse(SftConfig, bench.argv(tmp_path / "run", *flags), ""), None, start)


def nudge_weights() -> None:
    """One bit of one weight is other in the file than in memory."""
    import common.run as run

    real = run.write_model

    def write_model(*args: object) -> None:
        real(*args)
        if "checkpoint-2" in str(args[2]):
            file = next(args[2].glob("*model*.safetensors"))
            flip(file, 8 * (file.stat().st_size - 4))
    run.write_model = write_model


def drop_optimizer() -> None:
    """The optimizer's moments are not in the checkpoint."""
    import torch

    real = torch.optim.AdamW.state_dict
    torch.optim.AdamW.state_dict = lambda self: {**real(self), "state": {}}


def forget_step() -> None:
    """The state says one step less than was done."""
    import common.checkpoint as checkpoint

    real = checkpoint.asdict
    checkpoint.asdict = lambda state: {**real(state), "step": state.step - (state.step == 2)}


def forget_tokens() -> None:
    import common.checkpoint as checkpoint

    real = checkpoint.asdict
    checkpoint.asdict = lambda state: {**real(state), "tokens": 0}


@pytest.mark.parametrize("fault,finding", [
    (nudge_weights, "entries differ"), (drop_optimizer, "entries differ"), (forget_step, "step"),
    (forget_tokens, "state at the end: tokens")])
def test_verify_resume_sees_planted_faults(bench, tmp_path, fault, finding):
    """A proof that cannot fail proves nothing."""
    with pytest.raises(CheckFailed, match=finding) as found:
        verified(bench, tmp_path, FULL, fault)
    assert found.value.status == 1 and names(tmp_path) == []
    assert "two uninterrupted runs are equal" in str(found.value)


def test_verify_resume_knows_a_machine_that_does_not_repeat_itself(bench, tmp_path):
    """Kernels that are not deterministic would be taken for a broken resume."""
    def noise() -> None:
        import common.train as train

        real = train.train_step

        def train_step(accelerator: object, model: object, *rest: object, **options: object) -> object:
            result = real(accelerator, model, *rest, **options)
            next(p for p in model.parameters() if p.requires_grad).data.mul_(1 + time.time_ns() % 997 * 1e-6)
            return result
        train.train_step = train_step

    with pytest.raises(CheckFailed, match="says nothing about resuming"):
        verified(bench, tmp_path, FULL, noise)


def test_verify_resume_as_a_command(bench, tmp_path):
    """The processes it starts are the user's own command."""
    argv = [sys.executable, str(SCRIPTS / "03_sft.py"), *bench.argv(tmp_path / "run", *LORA), "--verify_resume"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize("flags", [LORA, ("--no_lora", "--weight_unit", "tokens", "--dataset_weights", 0.5, 0.5)])
def test_explain_step_names_what_the_loader_saw(bench, tmp_path, flags):
    """A list of rows that is made by other code than the training reads."""
    run = tmp_path / "run"
    if flags is not LORA:
        flags = ("--dataset_paths", bench.rows, bench.more, *flags)
    before_begin = ended(bench.run(run, *flags, "--explain_step", 5), 0)
    assert not run.exists() and "losses of the base" in before_begin
    ended(bench.run(run, *flags, patch=seen_rows(run)), 0)
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    Path(f"{run}.log").unlink()
    said = ended(bench.run(run, *flags, "--explain_step", 5), 0)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == kept
    lines = [line.split() for line in said.splitlines() if ".jsonl:" in line and line.lstrip()[:1].isdigit()]
    rows: dict[str, list] = {}
    for row, name, place, tokens, trained, loss in lines:
        rows.setdefault(row, []).append((name, place, int(tokens), int(trained), float(loss)))
    seen = sorted(by_step(run)[5])
    assert sorted([example[2] for example in row] for row in rows.values()) == sorted(
        [len(ids) for ids in row] for row in seen)
    assert sorted(text_of(place) for row in rows.values() for _, place, *_ in row) == sorted(
        decoded(bench, ids) for row in seen for ids in row)
    assert "losses of checkpoint-4" in said
    trained = sum(example[3] for row in rows.values() for example in row)
    mean = sum(example[3] * example[4] for row in rows.values() for example in row) / trained
    logged = next(line for line in what_is_left(run)["metrics"] if line["step"] == 5 and "loss" in line)
    assert mean == pytest.approx(logged["loss"], abs=0.2 if flags is LORA else 1e-3)  # dropout is off in the table
    for path in checkpoints(run):
        (path / "shards").mkdir()
    again = ended(bench.run(run, *flags, "--explain_step", 5), 0)
    assert "losses of the base" in again and "checkpoints in shards are not read here" in again


def text_of(place: str) -> str:
    """Prompt and response of file:line, without spaces."""
    file, line = place.rsplit(":", 1)
    row = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
    return "".join(f"user{row['prompt']}assistant{row['response']}".split())


def decoded(bench: Bench, ids: list[int]) -> str:
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=bench.tokenizer)
    return "".join(spm.decode([i for i in ids if 3 < i < spm.get_piece_size()]).split())


def test_explain_step_of_another_plan_is_refused(bench, stopped):
    """Rows of a plan that the run never had."""
    assert "learning_rate" in ended(bench.run(stopped, *LORA, "--explain_step", 2, "--learning_rate", 0.1), 2)
    assert "has 8 steps" in ended(bench.run(stopped, *LORA, "--explain_step", 9), 2)


def test_a_template_that_serves_other_ids_is_refused(bench, tmp_path):
    """A saved template that gives prompts the model has never seen."""
    def patch() -> None:
        from common import prove

        real = prove.prove
        prove.prove = lambda chat, rows: {**real(chat, rows), "template_differs": 1}

    said = ended(bench.run(tmp_path / "run", patch=patch), 2)
    assert "other ids than training for 1 of" in said and not (tmp_path / "run").exists()


def test_proofs_are_said(bench, reference, tmp_path):
    """A proof nobody can see was done might as well not be."""
    said = ended(bench.run(tmp_path / "run", "--max_steps", 1), 0)
    assert said.count("packed and apart differ by at most") == 1
    assert said.count("agrees with SentencePiece on") == said.count("gives the training ids for") == 1
    assert len(chat_rows(3)) == 3
