"""Several processes: DDP and FSDP2 equal one process, checkpoints in shards, launchers and their files.

accelerate chooses FSDP on accelerators only. Here it is told to choose it for two gloo processes on the CPU: what it
then does to model and optimizer, and all of this project's code, is what runs on GPUs.
"""
from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import SCRIPTS, Bench, Child, hold_at, make_bench, script, warm
from torch.distributed.fsdp import CPUOffloadPolicy

from common.checkpoint import numbered, read_state, verify
from common.faults import UserError
from common.ranks import Watch, asked_for, check_launch, typed_launch
from common.rundir import read_status
from common.settings import SftConfig

ROOT = SCRIPTS.parent
RESUME = "--resume_from_checkpoint"
# Adam divides by the root of the squares: with its default epsilon the rounding of a zero gradient becomes a step
FULL = ("--no_lora", "--adam_epsilon", 1e-4)
LORA = ("--lora_dropout", 0, "--adam_epsilon", 1e-4)
TWO = ("--gradient_accumulation_steps", 2)  # and four in one process: the rows of a step are the same
ONE = ("--gradient_accumulation_steps", 4)


def fsdp() -> None:
    """A patch: accelerate shards."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    real = accelerate.Accelerator

    def accelerator(*args: object, **options: object) -> object:
        found = real(*args, **options)
        PartialState._shared_state["distributed_type"] = found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            reshard_after_forward=True)
        return found
    accelerate.Accelerator = accelerator


ENGINES = {"ddp": None, "fsdp": fsdp}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    warm()
    return make_bench(tmp_path_factory.mktemp("bench"))


def go(bench: Bench, out: Path, *flags: object, code: int = 0, **options: object) -> Child:
    """A run that ends as it should."""
    child = bench.run(out, *flags, **options)
    assert set(child.codes) == {code}, f"{child.codes}\n{child.output[-4000:]}"
    return child


@pytest.fixture(scope="module")
def whole(bench: Bench) -> callable:
    """An uninterrupted run with some flags, of one process or of two under an engine; each is made once."""
    made: dict[tuple, Path] = {}

    def run(*flags: object, engine: str = "") -> Path:
        if (flags, engine) not in made:
            out = made[flags, engine] = bench.place / f"run-{len(made)}"
            options = {"ranks": 2, "patch": ENGINES[engine]} if engine else {}
            go(bench, out, *flags, *(TWO if engine else ONE), **options)
        return made[flags, engine]
    return run


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def weights(directory: Path) -> dict:
    from safetensors.torch import load_file

    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(str(file)).items()}


def assert_equal_runs(run: Path, other: Path) -> None:
    """Losses within 1e-6, final weights within 1e-5, rows bit by bit."""
    assert losses(run) == pytest.approx(losses(other), abs=1e-6) and len(losses(run)) == 12
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys() and mine
    assert max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in mine) <= 1e-5
    assert read_state(numbered(run)[-1]).rows == read_state(numbered(other)[-1]).rows


# ---- the same as one process

# the checkpoint of step 2 stays the best one, and must be what is left and merged
EARLY = ("--early_stopping_threshold", 9, "--early_stopping_patience", 9)


@pytest.mark.parametrize("flags", [FULL, (*LORA, *EARLY, "--merge_adapters", "--gradient_checkpointing")],
                         ids=["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(whole, engine, flags):
    """Gradients scaled by the wrong number, an embedding that came apart from its head, new rows that do not learn, the
    last model left in place of the best."""
    run, one = whole(*flags, engine=engine), whole(*flags)
    assert_equal_runs(run, one)
    assert (numbered(run)[-1] / "shards").is_dir() == (engine == "fsdp")
    left = {path.name for path in run.iterdir()}
    assert left == {path.name for path in one.iterdir()}  # a plain Hugging Face directory
    assert read_state(numbered(run)[-1]).best_step == (2 if "--merge_adapters" in flags else 8)


def test_gradient_checkpointing_beside_new_tokens(bench, tmp_path):
    """The base that has grown is loaded anew: the one that was told to checkpoint is thrown away."""
    def patch() -> None:
        import common.run

        common.run.prepare = lambda _, model, *__: os._exit(0 if model.causal_lm.is_gradient_checkpointing else 9)

    go(bench, tmp_path / "run", *LORA, "--gradient_checkpointing", patch=patch)


def test_bf16(bench, whole, tmp_path):
    """accelerate's own policy rounds the loss to three digits and sums gradients in bf16."""
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    go(bench, tmp_path / "run", *FULL, *TWO, ranks=2, patch=fsdp, env=bf16)
    found, expected = losses(tmp_path / "run"), losses(whole(*FULL))
    assert found == pytest.approx(expected, abs=0.03) and found != expected
    assert all(round(loss, 3) != loss for loss in found)


def count_whole(directory: Path) -> None:
    """A patch: each process notes the bytes of weights it holds before they are cut, and ends."""
    def prepare(_: object, model: object, *__: object) -> None:
        held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        (directory / os.environ["RANK"]).write_text(str(held))
        os._exit(0)

    import common.run

    fsdp()
    common.run.prepare = prepare


@pytest.mark.parametrize("flags", [FULL, (*LORA, "--modules_to_save", "lm_head")], ids=["full", "lora"])
def test_one_process_holds_the_whole_model(bench, tmp_path, flags):
    """Eight copies of 140 GB in the memory of one machine."""
    said = go(bench, tmp_path / "run", *flags, ranks=2, patch=lambda: count_whole(tmp_path)).output
    whole = sum(t.nbytes for t in weights(Path(bench.base)).values())
    held = [int((tmp_path / rank).read_text()) for rank in "01"]
    assert held[0] >= whole and held[1] < whole / 2 and "every process loads" not in said  # rank 1: its adapters


def test_what_cannot_be_built_without_weights_is_loaded_by_all(bench, whole, tmp_path):
    """The configuration ties two matrices that differ in the file: one process trains both, the other thinks of one."""
    from conftest import make_llama

    size = json.loads(Path(bench.base, "config.json").read_text())["vocab_size"]
    base = Path(make_llama(tmp_path / "base", size, tied=False))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    flags = (*FULL, "--model_path", base, "--prompt_template", "instruct")
    said = go(bench, tmp_path / "run", *flags, *TWO, ranks=2, patch=fsdp).output
    assert said.count("every process loads the whole model") == 1
    go(bench, tmp_path / "one", *flags, *ONE)
    assert_equal_runs(tmp_path / "run", tmp_path / "one")


def test_rows_that_pass_one_by_one_are_as_many_in_every_process(bench, tmp_path):
    """An evaluation that has more rows in one process than in the other hangs for --rank_timeout_minutes."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    known = json.loads(Path(bench.base, "config.json").read_text())
    sizes = {name: known[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    flags = (*FULL, "--model_path", tmp_path / "gemma", "--max_steps", 2)
    said = go(bench, tmp_path / "many", *flags, ranks=2, patch=fsdp, code=2).output
    assert "Set --per_device_eval_batch_size 1." in said
    go(bench, tmp_path / "one", *flags, "--per_device_eval_batch_size", 1, ranks=2, patch=fsdp)


def test_weights_that_cannot_be_read_end_all_with_one_sentence(bench, tmp_path):
    """The others wait for weights that never come."""
    base = tmp_path / "base"
    shutil.copytree(bench.base, base)
    os.truncate(base / "model.safetensors", 20_000)
    said = go(bench, tmp_path / "run", *FULL, "--model_path", base, ranks=2, patch=fsdp, code=2).output
    assert said.count("the model cannot be loaded") == 1 and "Traceback" not in said


# ---- shards

@pytest.mark.parametrize("flags, sessions", [(FULL, (2, 1, 2)), (LORA, (2, 1))], ids=["full", "lora"])
def test_resume_with_other_numbers_of_processes(bench, whole, tmp_path, flags, sessions):
    """Optimizer state that is bound to the number of processes, or to the order of parameters."""
    run = tmp_path / "run"
    for session, ranks in enumerate(sessions):
        last = session + 1 == len(sessions)
        kill = {} if last else {"SFT_FAIL_AT": f"in_step:{2 * session + 3}"}
        go(bench, run, *flags, *TWO, RESUME, code=0 if last else -signal.SIGKILL, ranks=ranks, env=kill,
           patch=fsdp if ranks == 2 else None)
        assert (numbered(run)[-1] / "shards").is_dir() == (ranks == 2)
    assert_equal_runs(run, whole(*flags))


def test_a_killed_save_of_shards_leaves_the_last_whole_one(bench, whole, tmp_path):
    """Shards without their seal, or a seal over shards of two saves."""
    from common.sharded import all_tensors

    run, uninterrupted = tmp_path / "run", whole(*FULL, engine="fsdp")
    codes = bench.run(run, *FULL, *TWO, ranks=2, patch=fsdp, env={"SFT_FAIL_AT": "before_manifest:4"}).codes
    assert codes == [-signal.SIGKILL, 70]
    assert [path.name for path in numbered(run)] == ["checkpoint-2"] and verify(run / "checkpoint-2") == []
    shard = run / "checkpoint-2/shards/__1_0.distcp"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-9] + bytes(9))
    assert [problem.split(":")[0] for problem in verify(run / "checkpoint-2")] == ["shards/__1_0.distcp"]
    shard.write_bytes(content)
    go(bench, run, *FULL, *TWO, RESUME, ranks=2, patch=fsdp)
    mine, theirs = (all_tensors(of / "checkpoint-8/shards") for of in (run, uninterrupted))
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)  # bit by bit
    assert losses(run) == losses(uninterrupted)


def test_a_full_disk_under_one_process(bench, tmp_path):
    """The process that has room waits for the other for ever, or seals what is not there."""
    def fill() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def patch() -> None:
        fsdp()
        if os.environ["RANK"] == "1":
            hold_at(4, fill)()

    said = go(bench, tmp_path / "run", *FULL, *TWO, ranks=2, patch=patch, code=74).output
    assert "while saving checkpoint-4" in said and "Traceback" not in said
    assert [path.name for path in numbered(tmp_path / "run")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".partial*"))


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch bomb",)


def test_a_pickle_bomb_in_the_table_of_contents(tmp_path, monkeypatch):
    """The library unpickles it, whatever it says."""
    from common.sharded import Reader

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match="system"):
        Reader(tmp_path).read_metadata()
    assert not (tmp_path / "bomb").exists()


def test_an_enumeration_as_older_pythons_pickle_it():
    """Python 3.11.0 to 3.11.3 write getattr(class, name); getattr of anything else would open what Unpickler closes."""
    import torch
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEMORY

    from common.sharded import Unpickler

    def read(*arguments: object) -> object:
        called = type("Called", (), {"__reduce__": lambda self: (getattr, arguments)})
        return Unpickler(io.BytesIO(pickle.dumps(called()))).load()

    assert read(MEMORY, "TORCH_PRESERVE_FORMAT") is MEMORY.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError, match="does not belong"):
        read(torch.Size, "numel")


def test_evaluating_shards_is_refused_with_the_way_out(tmp_path):
    """`config.json is missing` sends people looking for it."""
    from common.model import find_model

    (tmp_path / "checkpoint-2/shards").mkdir(parents=True)
    with pytest.raises(UserError, match="in shards.*finished model is in"):
        find_model(str(tmp_path / "checkpoint-2"))


# ---- launchers

def accelerator_like(kind: str, precision: str = "bf16", **plugin: object) -> SimpleNamespace:
    from accelerate.utils import DistributedType

    given = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False,
             "cpu_offload": None} | plugin
    return SimpleNamespace(distributed_type=DistributedType(kind), parallelism_config=None, mixed_precision=precision,
                           state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**given)))


@pytest.mark.parametrize("found, config, finding", [
    (("FSDP", "bf16", {"fsdp_version": 1}), {}, "fsdp_version 1"),
    (("FSDP", "bf16", {"cpu_ram_efficient_loading": True}), {}, "fsdp_cpu_ram_efficient_loading"),
    (("FSDP", "bf16", {"activation_checkpointing": True}), {}, "--gradient_checkpointing"),
    (("FSDP", "fp16", {}), {}, "mixed_precision fp16"), (("FSDP", "no", {}), {"load_in_4bit": True}, "4-bit"),
    (("FSDP", "no", {}), {"optim": "adafactor"}, "adamw"), (("FSDP", "no", {}), {"compile": True}, "--compile"),
    (("MEGATRON_LM", "no", {}), {}, "MEGATRON_LM"), (("FSDP", "bf16", {}), {}, None),
    (("FSDP", "bf16", {"cpu_offload": CPUOffloadPolicy()}), {}, "fsdp_offload_params"),
    (("NO", "fp16", {}), {}, "mixed_precision fp16"), (("MULTI_GPU", "no", {}), {}, None)])
def test_what_an_engine_does_not_do_is_refused(found, config, finding):
    """An engine that carries on without a word: other rows, no check for NaN, embeddings that came apart."""
    from common.sharded import check_engine

    kind, precision, plugin = found
    settings = SftConfig(model_path="m", dataset_paths=["d"], output_dir="o", **config)
    if finding is None:
        return check_engine(accelerator_like(kind, precision, **plugin), settings)
    with pytest.raises(UserError, match=finding):
        check_engine(accelerator_like(kind, precision, **plugin), settings)


def test_what_runs_otherwise_than_asked_is_refused(monkeypatch):
    """accelerate drops FSDP on a CPU."""
    from common.sharded import check_engine

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="MULTI_CPU"):
        check_engine(accelerator_like("MULTI_CPU"), SftConfig(model_path="m", dataset_paths=["d"], output_dir="o"))


@pytest.mark.parametrize("words, number", [
    ("python accelerate launch --cpu --num_processes 2 s.py --x 3", 2), ("accelerate launch --num-processes=4 s.py", 4),
    ("accelerate launch --num_processes 2 --num_machines 2 s.py", 2), ("accelerate launch s.py --num_processes 2", 1),
    ("accelerate launch --config_file {file} s.py", 3), ("bash train.sh --num_processes 2", 1),
    ("accelerate launch --config_file {file} --num_processes 1 s.py", 1)])
def test_processes_that_were_asked_for(tmp_path, words, number):
    """One process on a CPU where two were asked for: half the batch, without a word."""
    file = tmp_path / "a.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 3\n")
    assert asked_for(words.format(file=file).split(), "s.py") == number


@pytest.mark.parametrize("words, typed", [
    ("/env/bin/python /env/bin/accelerate launch --config_file f.yaml s.py --x 3",
     "accelerate launch --config_file f.yaml"),
    ("python3 /env/bin/torchrun --nproc_per_node 2 s.py", "torchrun --nproc_per_node 2"),
    ("bash s.py", None), ("accelerate launch other.py", None), ("", None)])
def test_the_launch_as_it_was_typed(words, typed):
    """A command to go on that starts other processes, or none: a user's own file, torchrun on a CPU."""
    found = typed_launch(words.split(), "s.py")
    assert (found and " ".join(found)) == typed


def test_the_command_to_go_on_holds_what_torchrun_does_not_say(monkeypatch):
    """A run in bf16 whose command goes on in fp32, and is refused."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(sys, "argv", ["scripts/03_sft.py"])
    run = SimpleNamespace(argv=["--output_dir", "my run", "--overwrite_output_dir"])
    for launcher, typed in (("torchrun", "ACCELERATE_MIXED_PRECISION=bf16 torchrun"), ("accelerate", "accelerate")):
        words = ["python", f"/env/bin/{launcher}", "--some", "2", "scripts/03_sft.py"]
        monkeypatch.setattr("common.ranks.launcher_words", lambda words=words: words)
        assert script("03_sft").resume_command(run) == (
            f"{typed} --some 2 scripts/03_sft.py --output_dir 'my run' --resume_from_checkpoint")


def test_what_a_launcher_sets_beside_the_processes_has_no_say():
    """`auto`, which DeepSpeed's file passes on, ends in a traceback; 4 divides each loss once more; an Apple GPU has no
    float64."""
    code = ("import sys, torch; sys.path.insert(0, 'scripts')\n"
            "torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True\n"
            "from common.ranks import start_processes; from common.settings import SftConfig\n"
            "found = start_processes(SftConfig(model_path='m', dataset_paths=['d'], output_dir='o'))\n"
            "print(found.gradient_accumulation_steps, found.device)")
    for steps in ("auto", "4"):
        env = {**os.environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": steps, "ACCELERATE_USE_CPU": "false"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                              timeout=120)
        assert done.stdout.split() == ["1", "cpu"], done.stderr


def test_long_work_of_one_process_is_no_hang():
    """A download on the main process for longer than --rank_timeout_minutes ends a healthy job."""
    notes = []
    watch = Watch(SimpleNamespace(process_index=0, num_processes=1), 1 / 60)
    watch.world, watch.store = 2, SimpleNamespace(set=lambda key, value: notes.append(json.loads(value)["marks"]))
    end = time.monotonic() + 60
    with watch.alive():
        while len(notes) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    known = len(notes)
    time.sleep(0.6)
    assert 3 <= known == len(notes) and notes == [*range(1, known + 1)]


def test_a_launch_that_is_too_small_is_refused(monkeypatch):
    """See above; the message must name the way out."""
    monkeypatch.setattr("common.ranks.processes_asked_for", lambda: 2)
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        check_launch(1)
    check_launch(2)


FILES = sorted((ROOT / "config/accelerate").glob("*.yaml"))


def test_the_files_are_those_of_the_readme():
    """A glob that finds nothing tests nothing."""
    assert {f.stem for f in FILES} == {"cpu", "one_gpu", "ddp", "fsdp2", "several_nodes", "deepspeed_zero3"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file, monkeypatch):
    """A key that accelerate does not know, or that the launcher drops on the way to the script."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    load_config_from_file(str(file))
    flags = ["--main_process_ip", "127.0.0.1", "--machine_rank", "0"] if file.stem == "several_nodes" else []
    args = launch_command_parser().parse_args(["--config_file", str(file), *flags, "scripts/03_sft.py", "--dry_run"])
    args, _, _ = _validate_launch_command(args)
    how = {"cpu": (False, False), "one_gpu": (False, False), "ddp": (True, False), "deepspeed_zero3": (False, False)}
    assert (args.multi_gpu, args.use_fsdp) == how.get(file.stem, (False, True))
    assert args.use_deepspeed == (file.stem == "deepspeed_zero3")
    if args.use_fsdp:
        for name, value in prepare_multi_gpu_env(args).items():
            if name.startswith(("FSDP", "ACCELERATE")):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.reshard_after_forward is True and plugin.transformer_cls_names_to_wrap is None
        from common.sharded import check_engine

        check_engine(accelerator_like("FSDP", os.environ["ACCELERATE_MIXED_PRECISION"], **vars(plugin)),
                     SftConfig(model_path="m", dataset_paths=["d"], output_dir="o"))
    elif not (args.multi_gpu or args.use_deepspeed):
        assert prepare_simple_launcher_cmd_env(args)[1]["ACCELERATE_USE_CPU"] == str(file.stem == "cpu")


def test_started_by_accelerate(bench, tmp_path):
    """The file for CPUs, and the same with a number of processes that accelerate does not start."""
    def launch(*more: str) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
        argv = bench.argv(tmp_path / f"run{len(more)}", "--max_steps", 2)
        return subprocess.Popen([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                                 str(ROOT / "config/accelerate/cpu.yaml"), *more, str(SCRIPTS / "03_sft.py"), *argv],
                                env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    one, two = launch(), launch("--num_processes", "2")
    assert one.wait(120) == 0, one.stdout.read()
    said = two.communicate(timeout=120)[0]
    assert two.returncode != 0 and "asked for 2 processes and started 1" in said
    assert read_status(tmp_path / "run0")["status"] == "finished" and not (tmp_path / "run2").exists()


# ---- SLURM

SBATCH = ROOT / "config/slurm/sft.sbatch"
STANDS_IN = {  # a job of one machine
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> scontrol.log; fi',
    "srun": 'SLURM_NODEID=0 SLURM_GPUS_ON_NODE=8 SLURM_NNODES=2 exec "$@"',
    "accelerate": """echo "$@" > accelerate.log
trap 'printf "{\\n \\"pid\\": %s,\\n \\"exit_status\\": 75\\n}\\n" $$ > out/run_status.json; exit 1' TERM
mkdir -p out; sleep .1; printf "{\\n \\"pid\\": %s,\\n \\"status\\": \\"running\\"\\n}\\n" $$ > out/run_status.json
[ -n "${SHORT:-}" ] && exit 1
while :; do sleep .05; done"""}


@pytest.mark.parametrize("short", [True, False])
def test_slurm_requeues_what_was_stopped(tmp_path, short):
    """A job that fails at once and is queued for ever; a request to stop that reaches the launcher alone."""
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    for name, body in STANDS_IN.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    if short:  # what an earlier session left
        (tmp_path / "out/run_status.json").write_text('{\n "pid": 1,\n "exit_status": 75\n}\n')
        os.utime(tmp_path / "out/run_status.json", (1, 1))
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
           "SLURM_JOB_NODELIST": "node[1-2]", "SHORT": "1" if short else ""}
    job = subprocess.Popen(["bash", str(SBATCH), "out", "--no_lora"], cwd=tmp_path, env=env)
    status, end = tmp_path / "out/run_status.json", time.monotonic() + 20
    if not short:
        while not (status.exists() and "running" in status.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    job.wait(20)
    assert (tmp_path / "scontrol.log").exists() == (not short)
    if not short:
        assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    words = (tmp_path / "accelerate.log").read_text()
    assert words.endswith("--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip node1 "
                          f"scripts/03_sft.py --no_lora --output_dir out {RESUME}\n")
