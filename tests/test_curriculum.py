"""Stages: strictly in order, one optimizer and one schedule through them all, and a resume inside a later one exact."""
from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, chat_rows, make_llama, write_rows
from running import Ran, metrics, read_json, run_script
from test_sample import make

from common.config import parse
from common.material import Material
from common.plan import Plan, Source, Stage, make_plan
from common.settings import SftConfig
from common.signals import StopFlag
from common.train import learning_rate

STEPS = 24  # of both stages
SHORT = {"max_seq_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
         "eval_steps": 100, "save_steps": 100, "val_split_ratio": 0.1, "learning_rate": 1e-2, "report_to": ["none"],
         "use_lora": False}


@pytest.fixture(scope="module")
def curriculum(shared: Path, tiny_model: str, spm_unigram: str) -> Callable[..., Ran]:
    """Run 03 over two data sets of conversations with system turns, "first" and "second", by a config file."""
    place = shared / "curriculum"
    for seed, name in enumerate(("first", "second"), 11):
        write_rows(place / f"{name}.jsonl", [{"messages": [
            *([{"role": "system", "content": "Answer today."}] if i % 6 else []),
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
            for i, row in enumerate(chat_rows(24, seed))])
    stages = [{"name": "one", "epochs": 1.5, "datasets": [{"path": str(place / "first.jsonl")}]},
              {"name": "two", "until_step": STEPS, "datasets": [
                  {"path": str(place / "second.jsonl"), "weight": 0.75},
                  {"path": str(place / "first.jsonl"), "weight": 0.25, "n_samples": 6}]}]

    def run(output_dir: Path, *words: str, stages: list[dict] = stages, **settings: object) -> Ran:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        file = output_dir.parent / f"{output_dir.name}.yaml"
        file.write_text(yaml.safe_dump({
            "model_path": tiny_model, "tokenizer_path": spm_unigram, "cache_dir": str(place / "cache"),
            "output_dir": str(output_dir), "stages": stages, **SHORT, **settings}))
        return run_script("03_sft", "--config_path", file, *words)
    return run


@pytest.fixture(scope="module")
def whole(curriculum, shared) -> Path:
    """An uninterrupted run of both stages."""
    curriculum(shared / "curriculum" / "whole").ok()
    return shared / "curriculum" / "whole"


def boundary(run: Path) -> int:
    """Steps of the first stage."""
    return read_json(run / "plan.json")["stages"][0]["steps"]


# ---- the shipped file

def test_shipped_curriculum(tmp_path, shared, spm_unigram):
    """Guards against a config/sft_curriculum.yaml that does not run on the project's sample."""
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "sft_curriculum.yaml", tmp_path / "config")
    sample = make.make_sample(seed=0, stories=20, rows=180, heldout=12)
    (tmp_path / "data" / "sample").mkdir(parents=True)
    (tmp_path / "data" / "sample" / "rows.jsonl").write_text(sample["rows.jsonl"])
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "config" / "sft_datasets").symlink_to(ROOT / "config" / "sft_datasets")
    run_script("prepare_sft_datasets", "--dataset", "sample_short", "sample_lists", "--raw_dir", "data/sample",
               cwd=tmp_path).ok()
    model = tmp_path / "checkpoints" / "pretrain" / "sample" / "final"
    make_llama(model, 390)
    shutil.copy(spm_unigram, model / "tokenizer.model")
    command = ["--config_path", "config/sft_curriculum.yaml"]
    dry = run_script("03_sft", *command, "--dry_run", cwd=tmp_path).ok()
    assert "stage short answers: steps 1 to" in dry.out and "2.00 epochs" in dry.out
    assert "stage lists: steps" in dry.out and "to 900" in dry.out and "(asked 0.8000)" in dry.out
    first = int(dry.out.split("stage short answers: steps 1 to ")[1].split(",")[0])
    run_script("03_sft", *command, "--max_steps", str(first + 3), "--report_to", "none", cwd=tmp_path).ok()
    run = tmp_path / "checkpoints" / "sft" / "sample-curriculum"
    assert [stage["steps"] for stage in read_json(run / "plan.json")["stages"]] == [first, 3]
    assert {line["stage"] for line in metrics(run) if "loss" in line} == {"short answers", "lists"}
    assert (run / "model.safetensors").is_file()


# ---- order

def two_stages(rows_per_step: int, packing: bool = True, epochs: float = 1.5) -> Plan:
    rng = np.random.default_rng(3)
    sources = [Source(name, n, n - 3) for name, n in (
        ("first", rng.integers(5, 40, 53).astype(np.int32)), ("second", rng.integers(5, 40, 47).astype(np.int32)))]
    return make_plan(sources, [Stage("one", (0,), epochs=epochs), Stage("two", (1,), epochs=1)], max_seq_length=64,
                     packing=packing, rows_per_step=rows_per_step, seed=1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("packing", [True, False], ids=["packing", "no_packing"])
def test_no_row_of_the_second_set_before_the_first_stage_ends(world, packing):
    """Guards against a later mixture that seeps in, by shuffling, by packing, or on one of several processes."""
    plan = two_stages(4 * world, packing)
    seen = [{int(s) for rank in range(world) for row in plan.rank_rows(step, rank, world) for s in row[:, 0]}
            for step in range(plan.n_steps)]
    first = plan.stage_bounds[1]
    assert seen == [{0}] * first + [{1}] * (plan.n_steps - first)
    used = [tuple(map(int, pair)) for step in range(plan.n_steps) for row in plan.step_rows(step) for pair in row]
    assert sum(s == 0 for s, _ in used) == 80  # 53 x 1.5, rounded up
    assert sorted(e for s, e in used if s == 1) == list(range(47))


def test_half_an_epoch_is_half_of_the_rows():
    """Guards against .5 epochs that are rounded to none or one, and that take a row twice."""
    plan = two_stages(4, epochs=0.5)
    used = [int(e) for step in range(plan.stage_bounds[1]) for row in plan.step_rows(step) for _, e in row]
    assert len(used) == len(set(used)) == 27  # half of 53
    assert plan.epoch_of(plan.stage_bounds[1] - 1) == 0.5


def test_the_loop_keeps_the_order(curriculum, tmp_path, monkeypatch):
    """Guards against a loop that asks for other rows than the plan's of the step."""
    import common.train

    seen: dict[int, set[str]] = {}
    now = []
    step_of, examples = common.train.train_step, Material.examples

    def train_step(accelerator, model, optimizer, material, config, step, *more):
        now[:] = [step]
        return step_of(accelerator, model, optimizer, material, config, step, *more)

    def recorded(self, row):
        if now:
            seen.setdefault(now[0], set()).update(self.datasets[s].name for s, _ in row)
        return examples(self, row)

    monkeypatch.setattr(common.train, "train_step", train_step)
    monkeypatch.setattr(common.train.Batches, "of", common.train.Batches._make)  # none is made ahead of its step
    monkeypatch.setattr(Material, "examples", recorded)
    curriculum(tmp_path / "run").ok()
    first = boundary(tmp_path / "run")
    assert 0 < first < STEPS - 4 and sorted(seen) == list(range(STEPS))
    assert all(seen[step] == {"first"} for step in range(first))
    assert any("second" in seen[step] for step in range(first, STEPS))
    assert set.union(*(seen[step] for step in range(first, STEPS))) == {"first", "second"}


# ---- optimizer and schedule

def adam_steps(run: Path, step: int) -> set[float]:
    state = torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
    return {float(entry["step"]) for entry in state.values()}


def test_schedule_and_optimizer_go_on(whole):
    """Guards against a second warm-up, and against Adam that starts anew at a boundary."""
    lines = [line for line in metrics(whole) if "loss" in line]
    config = parse(SftConfig, ["--config_path", str(whole / "run.json")], "")
    assert [line["learning_rate"] for line in lines] == [learning_rate(config, step, STEPS) for step in range(STEPS)]
    assert lines[0]["learning_rate"] < lines[1]["learning_rate"]
    falling = [line["learning_rate"] for line in lines[1:]]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 18
    assert adam_steps(whole, STEPS) == {float(STEPS)}


def test_reset_optimizer_per_stage(curriculum, whole, tmp_path):
    """Guards against an option that nothing reads; the schedule goes on even so."""
    curriculum(tmp_path / "run", reset_optimizer_per_stage=True).ok()
    first = boundary(tmp_path / "run")
    assert adam_steps(tmp_path / "run", STEPS) == {float(STEPS - first)}
    with_reset, without = (metrics(run) for run in (tmp_path / "run", whole))
    assert with_reset[:first + 1] == without[:first + 1]  # the gradient of the boundary's step is still the same
    assert with_reset[first + 1]["loss"] != without[first + 1]["loss"]
    assert with_reset[first + 1]["learning_rate"] == without[first + 1]["learning_rate"]


@pytest.mark.parametrize("reset", [False, True], ids=["on", "reset"])
def test_resume_inside_the_second_stage(curriculum, tmp_path, monkeypatch, reset):
    """Guards against a resume that starts a stage again, or forgets what the stage has drawn: stopped right at the
    boundary and once more inside the second stage, the run is the uninterrupted one bit for bit."""
    asked = {"reset_optimizer_per_stage": reset, "logging_steps": 3}
    curriculum(tmp_path / "a", **asked).ok()
    first = boundary(tmp_path / "a")
    stops, steps = iter([first, 2, 0]), [0]

    def signal(self: StopFlag, accelerator: object = None) -> str | None:
        steps[0] += 1
        return "SIGTERM" if steps[0] == limit else None

    monkeypatch.setattr(StopFlag, "asked", signal)
    for limit in stops:
        steps[0] = 0
        ran = curriculum(tmp_path / "b", "--resume_from_checkpoint", **asked)
        assert ran.status == (75 if limit else 0), ran.err
    a, b = tmp_path / "a", tmp_path / "b"
    assert metrics(a) == metrics(b)
    digests = [[hashlib.sha256((run / name).read_bytes()).hexdigest() for name in (
        "model.safetensors", "checkpoint-24/model.safetensors")] for run in (a, b)]
    assert digests[0] == digests[1]
    one, two = (torch.load(run / "checkpoint-24" / "optimizer.pt", weights_only=True) for run in (a, b))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# ---- what is written

def test_losses_and_shares_of_each_stage(curriculum, whole, tmp_path):
    """Guards against a line that mixes the losses of two stages, and shares of the whole run in place of a stage's."""
    curriculum(tmp_path / "run", logging_steps=100).ok()
    first = boundary(tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [(line["step"], line["stage"]) for line in lines] == [(first, "one"), (STEPS, "two")]
    plan = read_json(tmp_path / "run" / "plan.json")
    assert lines[0]["share/first"] == 1.0 and "share/second" not in lines[0]
    drawn = {source["name"]: source["share_examples"] for source in plan["stages"][1]["sources"]}
    assert {name: lines[1][f"share/{name}"] for name in drawn} == pytest.approx(drawn, abs=1e-6)
    assert abs(drawn["second"] - 0.75) < 0.1
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Stages</h2>" in report and f">1 to {first}<" in report and f">{first + 1} to {STEPS}<" in report
    each = [line for line in metrics(whole) if "loss" in line]
    assert sum(line["stage"] == "one" for line in each) == first


@pytest.mark.parametrize("unit", ["examples", "tokens", "trained_tokens"])
def test_shares_until_a_step(unit):
    """Guards against shares that are counted in another unit than the weights, or over a step too many."""
    rng = np.random.default_rng(5)
    sources = [Source(name, n, n // 2) for name, n in (("a", rng.integers(4, 30, 40)), ("b", rng.integers(4, 30, 30)))]
    plan = make_plan(sources, [Stage("one", (1,), epochs=0.5), Stage("two", (0, 1), (0.6, 0.4), epochs=2)],
                     max_seq_length=32, packing=True, rows_per_step=3, seed=2, weight_unit=unit)
    count = {"examples": lambda s, e: 1, "tokens": lambda s, e: int(sources[s].lengths[e]),
             "trained_tokens": lambda s, e: int(sources[s].trained[e])}[unit]
    for step in range(plan.n_steps):
        first = plan.stage_bounds[plan.stage_of(step)]
        drawn = [0, 0]
        for done in range(first, step + 1):
            for row in plan.step_rows(done):
                for s, e in row:
                    drawn[s] += count(s, e)
        expected = {"b": 1.0} if first == 0 else {"a": drawn[0] / sum(drawn), "b": drawn[1] / sum(drawn)}
        assert plan.shares(step) == pytest.approx(expected)


def test_progress_names_the_stage(curriculum, whole, monkeypatch, tmp_path):
    """Guards against a bar that does not say which stage is trained."""
    import tqdm

    said = []
    monkeypatch.setattr(tqdm.tqdm, "set_description_str", lambda self, text, refresh=True: said.append(text))
    curriculum(tmp_path / "run").ok()
    first = boundary(whole)
    assert said == ["one"] * first + ["two"] * (STEPS - first)
