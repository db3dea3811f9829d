"""A training run in progress: processes, model, optimizer, state, and how they are written and read."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from common.adapters import add_lora, round_frozen, save_adapter, towers_of
from common.attention import causal_lm_of
from common.chat import Chat
from common.checkpoint import (
    MANIFEST,
    TrainState,
    check_space,
    checkpoints,
    put_in_place,
    read_state,
    save_checkpoint,
    seal,
    verify,
)
from common.config import level
from common.data import Part, Parts
from common.faults import UserError, say
from common.flops import Meter, make_meter
from common.hub import commit_used
from common.identity import rows_per_step
from common.loss import LossModel
from common.material import Material, gather, recommended_weights
from common.memory import shape_of
from common.model import (
    add_tokens,
    compile_layers,
    count_parameters,
    find_model,
    grows,
    load_model,
    model_config,
    read_full,
    rows_of_adapter,
    save_full,
    saved_dtype,
    set_special_ids,
)
from common.probe import choose_attention
from common.ranks import Watch, on_main, start_processes
from common.rundir import write_status
from common.settings import SftConfig
from common.sharded import (
    check_head,
    has_shards,
    is_sharded,
    prepare,
    read_shards,
    spread_optimizer,
    whole_on_main,
    write_shards,
)
from common.train import evaluation_rows, make_optimizer
from common.zero import is_zero


@dataclass
class Run:
    """What changes while training, and the processes it happens in."""

    config: SftConfig
    accelerator: Accelerator
    argv: list[str]
    watch: Watch
    state: TrainState = field(default_factory=TrainState)
    loss_model: LossModel | None = None  # the model itself; `wrapped` is what accelerate made of it
    wrapped: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    export_dtype: torch.dtype = torch.float32
    rounded: int = 0  # frozen weights that are held in bf16 while training
    meter: Meter | None = None

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.accelerator.is_main_process

    def say(self, *lines: str) -> None:
        """Print on the main process."""
        if self.main:
            say(*lines)


def start(config: SftConfig, argv: list[str]) -> Run:
    """Start the processes (or find them started)."""
    from accelerate.utils import set_seed

    accelerator = start_processes(config)
    set_seed(config.seed)
    return Run(config, accelerator, argv, Watch(accelerator, config.rank_timeout_minutes))


def gather_material(run: Run, chat: Chat, base_config: object) -> Material:
    """Tokenise, split and plan: one process fills the cache, the others open it."""
    from tqdm import tqdm

    config, weights = run.config, run.config.dataset_weights
    if weights == "recommended":
        weights = recommended_weights(config.dataset_paths, _parameters(base_config))
        run.say(f"weights recommended for a model of this size: {' '.join(f'{w:g}' for w in weights)}")

    def progress(parts: Parts) -> Iterator[Part]:
        what, n = f"tokenising {parts.path}", 0
        with tqdm(total=parts.size, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for part in run.watch.through(parts, what, every=1):
                n += part.rows.rows_in
                bar.update(parts.position - bar.n)
                bar.set_postfix_str(f"{n:,} rows, {n / max(bar.format_dict['elapsed'], .1):,.0f} rows/s")
                yield part

    found = []
    on_main(run.watch, lambda: found.append(gather(config, chat, rows_per_step(run), weights, progress)))
    return found[0] if found else gather(config, chat, rows_per_step(run), weights, progress)


def _parameters(base_config: object) -> int:
    """Parameters of a model, without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(base_config).num_parameters()


def load_run(run: Run, chat: Chat, material: Material, checkpoint: Path | None = None) -> None:
    """Load the base model, add tokens and LoRA, make the optimizer, choose and prove the attention path; go on from
    `checkpoint` if there is one."""
    config, accelerator, sharded = run.config, run.accelerator, is_sharded(run.accelerator)
    base = model_config(config.at(config.source))
    run.export_dtype = saved_dtype(base, None)
    # tokens are added to whole weights; a base whose embeddings grow is loaded in 4 bits afterwards
    grow = grows(base, chat)
    if sharded:  # no device may hold it whole: it stays where it is until each process is given its part
        with run.watch.alive():  # a network disk may take any time
            model = whole_on_main(run, lambda empty: build_model(run, chat, grow, empty))
    else:
        with run.watch.alive():
            model = build_model(run, chat, grow)
        if config.use_lora and not is_zero():  # DeepSpeed gathers a module's weights when that is called
            from common.lora import fuse

            fuse(model)
        if holds_rounded(config, accelerator):
            run.rounded = round_frozen(model, torch.bfloat16)
        model = model if is_zero() else model.to(accelerator.device)
    run.loss_model = LossModel(model, "sdpa", config.neftune_noise_alpha)
    if config.compile:
        run.say(compile_layers(run.loss_model.causal_lm))
    total, trained = count_parameters(model)
    rounded = f"; {run.rounded / 1e6:,.2f} M frozen ones held in bf16" if run.rounded else ""
    run.say(f"model {config.source}: {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained "
            f"({'LoRA' if config.use_lora else 'full'}{rounded}), precision {accelerator.mixed_precision}, "
            f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} on {accelerator.device.type}")
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        run.say("note: in fp32 a GPU has neither flash-attn nor packed attention: --mixed_precision bf16 is faster")
    on_main(run.watch, lambda: check_space(run.directory, bytes_to_come(run)))
    if checkpoint and is_zero():
        read_whole(run, checkpoint)
    elif checkpoint and sharded and not has_shards(checkpoint):
        with run.watch.alive():
            on_main(run.watch, lambda: read_weights(run, checkpoint))
    optimizer = make_optimizer(run.loss_model, config, whole=not (sharded or is_zero()))
    run.wrapped, run.optimizer = prepare(accelerator, run.loss_model, optimizer, config)
    probe = sorted((e for row in material.plan.step_rows(0) for e in material.examples(row)),
                   key=lambda e: len(e.input_ids))[:2]
    with accelerator.autocast():
        run.say(*choose_attention(run.loss_model, probe, chat.pad_id, config.attn_implementation, config.packing))
        check_head(accelerator, run.loss_model, config)
        run.meter = make_meter(shape_of(base, len(chat.tokenizer)), config.use_lora,
                               accelerator.device, accelerator.num_processes)
    run.say(f"peak: {run.meter.peak / 1e9:,.0f} GFLOP/s in matrix products, measured; mfu is the share of it that goes "
            "into useful work")
    if checkpoint:
        with run.watch.alive():
            restore(run, checkpoint)


def holds_rounded(config: SftConfig, accelerator: Accelerator) -> bool:
    """Whether what lies frozen below adapters is held in bf16 (FSDP and ZeRO round what they gather themselves)."""
    whole = not (is_sharded(accelerator) or is_zero())
    return config.use_lora and not config.load_in_4bit and accelerator.mixed_precision == "bf16" and whole


def build_model(run: Run, chat: Chat, grow: bool, empty: bool = False) -> nn.Module:
    """The base with its new tokens and its adapter. empty: without weights, on the meta device."""
    config, source = run.config, run.config.at(run.config.source)
    adapter = find_model(source).adapter
    if adapter and config.use_lora:
        run.say(*continued_adapter(config, adapter))
    model = load_model(source, trainable_adapter=config.use_lora, in_4bit=config.load_in_4bit and not grow,
                       empty=empty)
    if adapter and config.use_lora:
        _keep_base(run, model, Path(find_model(source).base))
    elif adapter:
        model = model.merge_and_unload().requires_grad_(True)
    causal_lm = causal_lm_of(model)
    token_ids, grown = add_tokens(causal_lm, chat, config.seed)
    if token_ids:
        run.say(f"new tokens {' '.join(chat.added_tokens)}: ids {token_ids}, " + (
            f"embeddings grown to {len(chat.tokenizer):,} rows" if grown else "in spare rows of the embeddings")
            + ("; their rows are trained beside the adapters" if config.use_lora else ""))
    set_special_ids(causal_lm, chat)
    causal_lm.config.use_cache = True
    for name in [] if config.use_lora else towers_of(causal_lm):
        causal_lm.get_submodule(name).requires_grad_(False)
    if config.use_lora and model is causal_lm:
        model = _with_adapter(run, model, chat, token_ids, grown, empty)
        causal_lm = model.get_base_model()  # loaded anew where it has grown
    if config.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm.enable_input_require_grads()
    return model


def bytes_to_come(run: Run) -> int:
    """What checkpoints and the final model will take on the disk, beyond the checkpoints that are there.

    A checkpoint holds fp32 weights and optimizer state (AdamW two numbers a weight, SGD none, Adafactor hardly any);
    at most save_total_limit of them, the best one, and the one being written exist at a time.
    """
    config, (total, trained) = run.config, count_parameters(run.loss_model.model)
    states = 2 if config.optim == "adamw" else 0
    checkpoint = 4 * (trained if config.use_lora else total) + 4 * trained * states
    exported = 4 * trained if config.use_lora else total * run.export_dtype.itemsize
    merged = total * saved_dtype(None, config.merge_dtype or str(run.export_dtype)[6:]).itemsize \
        if config.merge_adapters else 0
    there = sum(f.stat().st_size for path in checkpoints(run.directory) for f in path.rglob("*") if f.is_file())
    return max(0, checkpoint * (config.save_total_limit + 2) - there) + exported + merged


def continued_adapter(config: SftConfig, adapter: str) -> list[str]:
    """A line about an adapter that training goes on with. Raises UserError for a flag that would change its form."""
    found = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    if found.get("peft_type") != "LORA":
        raise UserError(f"--init_from {adapter}: its adapter is of the kind {found.get('peft_type')}, and only LoRA is "
                        "trained here. Merge it with the library that made it, and start from the merged model.")
    if rows_of_adapter(adapter) > model_config(adapter).get_text_config().vocab_size:
        raise UserError(f"--init_from {adapter}: it brings embeddings with more rows than its base has, and would go "
                        "on without them. Merge it with scripts/04_merge_lora.py and start from the merged model.")
    theirs = {"lora_r": found["r"], "lora_alpha": found["lora_alpha"], "lora_dropout": found["lora_dropout"],
              "use_rslora": found.get("use_rslora", False), "use_dora": found.get("use_dora", False),
              "lora_target_modules": sorted(target if isinstance(target := found.get("target_modules") or [], list)
                                            else [target]),
              "modules_to_save": sorted(found.get("modules_to_save") or [])}
    given = lambda name: sorted(value) if isinstance(value := getattr(config, name), list) else value
    other = [f"--{name} {getattr(config, name)} (it has {value})" for name, value in theirs.items()
             if level(config, name) == 2 and given(name) not in (value, ["all-linear"])]
    if other:
        raise UserError(f"--init_from {adapter}: training goes on with its adapter, whose form cannot change: "
                        f"{', '.join(other)}. Leave them out, or merge it with scripts/04_merge_lora.py and start from "
                        "the merged model.")
    return [f"goes on with the adapter of {adapter}: r {found['r']}, alpha {found['lora_alpha']:g}, dropout "
            f"{found['lora_dropout']:g}"]


def _keep_base(run: Run, model: nn.Module, base: Path) -> None:
    """Where an adapter that training goes on with rests on the base of another run, which may go, this run gets it too
    (by hard links where it can)."""
    own = run.directory / "base"
    if not (base.parent / "run.json").exists() or base.name != "base" or base.resolve() == own.resolve():
        return
    if run.main and verify(own):
        with _new_base(run) as work:
            shutil.copytree(base, work, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST))
    model.peft_config["default"].base_model_name_or_path = os.path.abspath(own)


@contextmanager
def _new_base(run: Run) -> Iterator[Path]:
    """A directory to be filled, which then is the run's base: sealed, and whole or absent."""
    work = run.directory / f".base.{os.getpid()}"
    try:
        yield work
        seal(work, 0, {})
        put_in_place(work, run.directory / "base")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _with_adapter(run: Run, model: nn.Module, chat: Chat, token_ids: list[int], grown: bool,
                  empty: bool) -> nn.Module:
    """Put LoRA on the model; a base whose embeddings grew is written once, so that the adapter loads on it plainly."""
    base = run.directory / "base"
    if grown and run.main and (problems := verify(base)):
        if base.exists():  # every run makes the same one
            run.say(f"{base}: damaged ({'; '.join(problems[:3])}); it is made anew")
        with _new_base(run) as work:
            save_full(model, work, run.export_dtype)
            chat.save(work)
    if not is_sharded(run.accelerator):  # there the main process is done with it before the others begin
        run.watch.meet()
    if grown:  # train against what was written: its rows may have been rounded to the base's dtype
        model = load_model(str(base), in_4bit=run.config.load_in_4bit, empty=empty)
        set_special_ids(model, chat)
    model = add_lora(model, run.config, token_ids)
    path, named = os.path.abspath(base) if grown else run.config.source, model.peft_config["default"]
    named.base_model_name_or_path = os.path.abspath(path) if os.path.isdir(path) else path
    named.revision = commit_used(run.config, path)
    return model


def save_state(run: Run, chat: Chat) -> None:
    """Write checkpoint-<step>: model or adapter as trained (fp32), optimizer, state, tokenizer."""
    sharded = is_sharded(run.accelerator)
    run.watch.at(f"checkpoint-{run.state.step}")
    weights, states = None, None
    if is_zero():  # every process gives its part
        weights, states = run.optimizer.whole_weights(run.loss_model.model), run.optimizer.state_dict()

    def write(directory: Path) -> dict | None:
        if sharded:
            chat.save(directory)
            return write_shards(run.loss_model, run.optimizer, directory)
        write_model(run, chat, directory, torch.float32, weights)
        torch.save(states or run.optimizer.state_dict(), directory / "optimizer.pt")

    with run.watch.alive():  # a network disk may take any time
        if run.main:
            save_checkpoint(run.directory, run.state, write, keep=run.config.save_total_limit)
            write_status(run.directory, status="running", step=run.state.step)
        elif sharded:
            write_shards(run.loss_model, run.optimizer, None)
    run.watch.meet()
    run.accelerator.wait_for_everyone()  # the main process, which holds the store, may end next


def write_model(run: Run, chat: Chat, directory: Path, dtype: torch.dtype, weights: dict | None = None) -> None:
    """Write the adapter, or the full model in `dtype`, with tokenizer and template; weights: those to write, where the
    model does not hold them whole."""
    model = run.loss_model.model
    if run.config.use_lora:
        save_adapter(model, directory, weights)
        run.loss_model.causal_lm.generation_config.save_pretrained(str(directory))
    else:
        save_full(model, directory, dtype, weights)
    chat.save(directory)


def read_weights(run: Run, directory: Path) -> None:
    """Load the trained weights of a checkpoint into the model; every one of them must be there."""
    model = run.loss_model.model
    if has_shards(directory):
        return read_shards(run.loss_model, None, directory)
    if run.config.use_lora:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(str(directory / "adapter_model.safetensors"))
        wrong = set(get_peft_model_state_dict(model, save_embedding_layers=False)) ^ set(state)
        set_peft_model_state_dict(model, state)
    else:
        wrong = read_full(model, directory)
    if wrong:
        raise UserError(f"{directory}: the checkpoint does not fit the model ({len(wrong)} weights differ, for example "
                        f"{sorted(wrong)[0]}). Resume with the settings the run was started with.")


def read_whole(run: Run, directory: Path) -> None:
    """read_weights before DeepSpeed cuts the model; UserError for a checkpoint in shards."""
    if has_shards(directory):
        raise UserError(f"{directory}: written in shards by FSDP, which DeepSpeed does not read. Go on with "
                        "--config_file config/accelerate/fsdp2.yaml, or with one process.")
    read_weights(run, directory)


def restore(run: Run, directory: Path) -> None:
    """Go on from a checkpoint: weights, optimizer and state. One in shards is read by any number of processes, and one
    of a single process by those that hold a model in shards (their weights are read before it is cut)."""
    if has_shards(directory):
        read_shards(run.loss_model, run.optimizer, directory)
    else:
        if not (is_sharded(run.accelerator) or is_zero()):
            read_weights(run, directory)
        # through the CPU: "cpu:0", the device of several processes without GPU, is no place that torch.load knows
        saved = torch.load(directory / "optimizer.pt", map_location="cpu", weights_only=True,
                           mmap=is_sharded(run.accelerator) or is_zero())  # a process takes its part of it
        if is_sharded(run.accelerator):
            spread_optimizer(run.optimizer, saved)
        else:
            run.optimizer.load_state_dict(saved)
    run.state = read_state(directory)
    run.say(f"resumed from {directory}: step {run.state.step:,}")


def held_out(run: Run, material: Material) -> list[list[tuple[int, int]]]:
    """The validation rows in the order of evaluation."""
    return evaluation_rows(material.val_datasets, material.val, run.config.max_seq_length, run.config.packing)
