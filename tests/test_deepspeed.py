"""DeepSpeed ZeRO-3: two processes equal one, with its checkpoints; what it does not do is refused.

The runs need the package deepspeed. They are two gloo processes on the CPU with every weight cut into parts, also the
small ones that DeepSpeed would leave whole.
"""
from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import make_llama
from forks import SCRIPTS, Bench, make_bench, warm
from test_distributed import EARLY, FULL, LORA, ONE, RESUME, TWO, assert_equal_runs, fsdp, go, losses

from common.checkpoint import numbered
from common.faults import UserError
from common.settings import SftConfig
from common.verify import tensors_of
from common.zero import check_zero, is_zero

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu"}


def cut_all() -> None:
    """A patch: no weight stays whole, and nothing is compiled for processes of one machine."""
    import deepspeed

    import common.zero as zero

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    real = zero.engine_config

    def engine_config(*args: object) -> dict:
        found = real(*args)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found
    zero.engine_config = engine_config


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    pytest.importorskip("deepspeed")
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    warm()
    return make_bench(tmp_path_factory.mktemp("bench"))


def several(bench: Bench, out: Path, *flags: object, ranks: int = 2, env: dict | None = None, patch: object = None,
            code: int = 0) -> str:
    """A run under DeepSpeed that ends as it should; what it said."""
    def patches() -> None:
        cut_all()
        if patch:
            patch()
    return go(bench, out, *flags, ranks=ranks, env=ZERO | (env or {}), patch=patches, code=code).output


@pytest.fixture(scope="module")
def whole(bench: Bench) -> callable:
    """An uninterrupted run of one plain process with some flags; each is made once."""
    made: dict[tuple, Path] = {}

    def run(*flags: object) -> Path:
        if flags not in made:
            made[flags] = bench.place / f"run-{len(made)}"
            go(bench, made[flags], *flags, *ONE)
        return made[flags]
    return run


def untied(bench: Bench, place: Path) -> str:
    """The base with a head of its own."""
    return make_llama(place, json.loads((Path(bench.base) / "config.json").read_text())["vocab_size"], tied=False)


def differences(run: Path, other: Path) -> dict[str, float]:
    """Entries of the last optimizer.pt of two runs -> the largest difference of tensors; all else must be equal."""
    mine, theirs = (dict(tensors_of(numbered(of)[-1] / "optimizer.pt")) for of in (run, other))
    assert mine.keys() == theirs.keys() and mine
    shapes = lambda of: {name: (v.shape, v.dtype) if hasattr(v, "shape") else v for name, v in of.items()
                         if not name.endswith(".fused")}  # which kernel did the step
    assert shapes(mine) == shapes(theirs)
    return {name: float((v - theirs[name]).abs().max()) for name, v in mine.items() if hasattr(v, "shape")}


@pytest.mark.parametrize("flags, tied", [
    (FULL, True), (FULL, False), ((*LORA, *EARLY, "--merge_adapters", "--gradient_checkpointing"), True)],
    ids=["full", "untied", "lora"])
def test_two_processes_equal_one(bench, whole, tmp_path, flags, tied):
    """Gradients divided twice, a head whose gradient is lost while its weight lies in parts, a norm of one part alone,
    new rows that do not learn, the last model left in place of the best."""
    base = bench.base if tied else untied(bench, tmp_path / "base")
    flags = (*flags, "--model_path", base)
    said = several(bench, tmp_path / "run", *flags, *TWO)
    one = whole(*flags)
    assert_equal_runs(tmp_path / "run", one)
    assert max(differences(tmp_path / "run", one).values()) <= 1e-6
    assert "an estimate" in said and "Warning" not in said  # of memory, as for every model in parts
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (tmp_path / "run", one)]
    assert names[0] == names[1]  # a plain Hugging Face directory, and the checkpoints of a single process


def test_bf16(bench, whole, tmp_path):
    """Weights that are rounded, or that stay whole in fp32 products."""
    several(bench, tmp_path / "run", *FULL, *TWO, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    found, expected = losses(tmp_path / "run"), losses(whole(*FULL, "--model_path", bench.base))
    assert found == pytest.approx(expected, abs=0.03) and found != expected
    assert all(round(loss, 3) != loss for loss in found)


def test_a_head_that_is_computed_row_by_row(bench, tmp_path):
    """A process with fewer rows than the others, for which they wait for ever."""
    def patch() -> None:
        import common.run as run

        real = run.choose_attention

        def choose_attention(loss_model: object, *rest: object) -> list[str]:
            found = real(loss_model, *rest)
            loss_model.plain_head = True
            return found
        run.choose_attention = choose_attention

    flags = (*FULL, *TWO, "--max_steps", 1)
    said = several(bench, tmp_path / "run", *flags, patch=patch, code=2)
    assert "as many in every process. Set --per_device_eval_batch_size 1" in said.replace("\n", " ")
    several(bench, tmp_path / "run", *flags, "--per_device_eval_batch_size", 1, patch=patch)


@pytest.mark.parametrize("flags, sessions", [(FULL, (2, 1, 3)), (LORA, (1, 2))], ids=["full", "lora"])
def test_resume_with_other_numbers_of_processes(bench, whole, tmp_path, flags, sessions):
    """Checkpoints bound to the number of processes or to DeepSpeed, optimizer state that ends up at another weight.
    Three processes cut some weights into parts that are not equal, and one of them has no rows at times."""
    run = tmp_path / "run"
    given = (*flags, *(TWO if sessions[0] == 2 else ONE), RESUME)  # a run keeps the batch it began with
    for session, ranks in enumerate(sessions):
        last = session + 1 == len(sessions)
        end = {"env": {} if last else {"SFT_FAIL_AT": f"in_step:{2 * session + 3}"},
               "code": 0 if last else -signal.SIGKILL}
        several(bench, run, *given, ranks=ranks, **end) if ranks > 1 else go(bench, run, *given, **end)
    one = whole(*flags)
    assert_equal_runs(run, one)
    assert max(differences(run, one).values()) <= 1e-6


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(bench, tmp_path, what):
    """DeepSpeed leaves out such a step by itself at best, and goes on."""
    def patch() -> None:
        import torch

        import common.train as train

        real, broken = train.train_step, {"loss": float("nan"), "gradient": float("inf")}[what]

        def train_step(accelerator: object, engine: object, *rest: object) -> object:
            if rest[3] == 2 and what == "gradient" and accelerator.process_index == 1:
                next(p for p in engine.parameters() if p.requires_grad).register_hook(lambda g: g * broken)
            if rest[3] == 2 and what == "loss":
                engine.module.register_forward_hook(lambda module, _, output: output * torch.tensor(broken))
            return real(accelerator, engine, *rest)
        train.train_step = train_step

    said = several(bench, tmp_path / "run", *FULL, *TWO, patch=patch, code=3)
    assert "step 3: loss" in said and [path.name for path in numbered(tmp_path / "run")] == ["checkpoint-2"]


def test_shards_of_fsdp_are_refused(bench, tmp_path):
    """Weights of the base in place of those that were trained."""
    run, killed = tmp_path / "run", {"SFT_FAIL_AT": "in_step:3"}
    go(bench, run, *FULL, *TWO, ranks=2, patch=fsdp, env=killed, code=-signal.SIGKILL)
    assert "in shards by FSDP" in several(bench, run, *FULL, *TWO, RESUME, code=2)


# ---- without the package

def settings(**given: object) -> SftConfig:
    return SftConfig(model_path="m", dataset_paths=["d"], output_dir="o", **given)


def test_a_missing_package_is_named(monkeypatch):
    """A traceback, or a run that shards nothing."""
    monkeypatch.setattr("common.zero.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package deepspeed is not installed"):
        check_zero(settings())


@pytest.mark.parametrize("env, config, finding", [
    ({"DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "deepspeed_config_file"),
    ({"DEEPSPEED_ZERO_STAGE": "2"}, {}, "zero_stage 2"),
    ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "offload to cpu"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, "offload to nvme"),
    ({"DEEPSPEED_ZERO3_INIT": "true"}, {}, "zero3_init_flag"),
    ({"DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}, {}, "zero3_save_16bit_model"),
    ({"GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation_steps 4"),
    ({"GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping 0.5"), ({"MIXED_PRECISION": "fp16"}, {}, "fp16"),
    ({}, {"load_in_4bit": True}, "4-bit"), ({}, {"optim": "adafactor"}, "adamw"), ({}, {"compile": True}, "--compile"),
    ({"GRADIENT_CLIPPING": "0.5"}, {"max_grad_norm": 0.5}, None), ({"MIXED_PRECISION": "bf16"}, {}, None)])
def test_what_it_does_not_do_is_refused(monkeypatch, env, config, finding):
    """A setting of the launcher's file that changes nothing, or that changes the loss."""
    monkeypatch.setattr("common.zero.find_spec", lambda name: object())
    for name, value in {"DEEPSPEED_ZERO_STAGE": "3", **env}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    if finding is None:
        return check_zero(settings(**config))
    with pytest.raises(UserError, match=f"DeepSpeed with .*{finding}"):
        check_zero(settings(**config))


def test_its_file_is_one_that_trains(monkeypatch):
    """A file that is shipped and refused."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    monkeypatch.setattr("common.zero.find_spec", lambda name: object())
    file = SCRIPTS.parent / "config/accelerate/deepspeed_zero3.yaml"
    words = ["--config_file", str(file), "--main_process_port", "0", "scripts/03_sft.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""
    for name, value in prepare_deepspeed_cmd_env(args)[1].items():
        if name.startswith("ACCELERATE"):
            monkeypatch.setenv(name, value)
    assert is_zero()
    check_zero(settings())
    check_zero(settings(max_grad_norm=0.5))  # 1.0 is also what the launcher says when nothing is given
