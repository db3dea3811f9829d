"""A model whose weights and optimizer are spread over the processes (FSDP2), and its checkpoints in shards.

    checkpoint-<step>/shards/__<rank>_0.distcp, .metadata     torch.distributed.checkpoint, under the common seal

Weights and optimizer state are stored by the name of the parameter, so any number of processes can read them: each
takes its part, a single one takes all. What a run leaves in the end is written by one process, from a checkpoint.

The main process alone loads the model. The others make its form on the meta device, and each is given its part.
"""
from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from common.checkpoint import file_facts, fsync_path, no_space
from common.faults import SaidElsewhere, UserError
from common.loss import LossModel
from common.model import find_model, load_model
from common.ranks import on_main
from common.settings import SftConfig
from common.zero import is_zero, prepare_zero

if TYPE_CHECKING:
    from common.run import Run

T = TypeVar("T")
SHARDS = "shards"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP holds the model of this job."""
    return accelerator.distributed_type == DistributedType.FSDP


def has_shards(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by several processes together."""
    return (checkpoint / SHARDS).is_dir()


def check_engine(accelerator: Accelerator, config: SftConfig) -> None:
    """UserError for an engine, or a setting under it, that this loop does not do or that was not tried."""
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind != DistributedType.FSDP:
        raise UserError(f"FSDP: asked for, but accelerate runs {kind.value} here: it shards on accelerators only. On "
                        "CPU use config/accelerate/cpu.yaml.")
    if kind not in (DistributedType.NO, DistributedType.FSDP) and not kind.value.startswith("MULTI_"):
        raise UserError(f"{kind.value}: this script trains in one process, with DDP, FSDP2 or ZeRO-3. Use one of the "
                        "files in config/accelerate.")
    other = accelerator.parallelism_config
    if other and (other.tp_enabled or other.cp_enabled or other.sp_enabled):
        raise UserError("parallelism_config: tensor, context and sequence parallelism are not supported. Leave "
                        "tp_size, cp_size and sp_size at 1.")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision {accelerator.mixed_precision}: not supported. Use bf16, or no.")
    if kind != DistributedType.FSDP:
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    for found, what, way in (
            (plugin.fsdp_version != 2, "fsdp_version 1", "Set fsdp_version: 2."),
            (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "Set it to false: tied embeddings "
             "would come apart."),
            (plugin.activation_checkpointing, "fsdp_activation_checkpointing", "Set it to false and give "
             "--gradient_checkpointing, which does it."),
            (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params", "Set it to false."),
            (config.load_in_4bit, "--load_in_4bit", "Train 4-bit models with DDP (config/accelerate/ddp.yaml)."),
            (config.optim == "adafactor", "--optim adafactor", "Its row and column means do not know shards: use "
             "adamw."),
            (config.compile, "--compile", "Leave it out.")):
        if found:
            raise UserError(f"FSDP with {what}: not supported. {way}")


def prepare(accelerator: Accelerator, loss_model: LossModel, optimizer: torch.optim.Optimizer,
            config: SftConfig) -> tuple:
    """What accelerate or DeepSpeed makes of model and optimizer: (wrapped model, optimizer)."""
    if is_zero():
        return prepare_zero(accelerator, loss_model, optimizer, config)
    if not is_sharded(accelerator):
        return accelerator.prepare(loss_model, optimizer)
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    plugin, causal_lm = accelerator.state.fsdp_plugin, loss_model.causal_lm
    loss_model._no_split_modules = causal_lm._no_split_modules  # its layers, which accelerate looks for there
    if not (causal_lm._no_split_modules or plugin.transformer_cls_names_to_wrap):
        raise UserError(f"FSDP: a {causal_lm.config.model_type} model does not name its layers. Name their class in "
                        "the file of --config_file: fsdp_transformer_layer_cls_to_wrap.")
    # accelerate's own policy would sum gradients in bf16 and round the loss, a float64, to it
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    names = {p: name for name, p in loss_model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]

    def point(model: nn.Module) -> None:  # accelerate finds a parameter again by its place in memory: here is none
        now = dict(model.named_parameters())
        for group, its_names in zip(optimizer.param_groups, groups):
            group["params"] = [now[name] for name in its_names]

    names, weights = None, take_weights(loss_model)
    point(loss_model)
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    give_weights(wrapped, weights, accelerator.device)
    point(wrapped)
    for method in ("token_losses", "whole_logits"):  # the weights are gathered for these as for the forward pass
        register_fsdp_forward_method(wrapped, method)
    return wrapped, optimizer


def check_head(accelerator: Accelerator, model: LossModel, config: SftConfig) -> None:
    """UserError where processes would call the model's layers a different number of times, and wait for each other."""
    found = [f"--{name} 1" for name in ("per_device_train_batch_size", "per_device_eval_batch_size")
             if getattr(config, name) > 1]
    if (is_sharded(accelerator) or is_zero()) and model.plain_head and found:
        raise UserError(f"{'DeepSpeed' if is_zero() else 'FSDP'} with a {model.causal_lm.config.model_type} model, "
                        "whose head does more than a product: rows are passed through it one by one, as many in every "
                        f"process. Set {' and '.join(found)}.")


# ---- one process loads, all get their part

def whole_on_main(run: Run, build: Callable[[bool], nn.Module]) -> nn.Module:
    """build(False) of the main process; in the others build(True), the same model with its weights on the meta device.

    Buffers (rotary tables) are real everywhere, those of the main process. What cannot be built like that (weights
    that are tied or not by what the file holds, say) is built whole everywhere, and a line says so.
    """
    built = []

    def first() -> tuple[list, dict[str, torch.Tensor]]:
        built.append(build(False))
        return form(built[0]), dict(built[0].named_buffers())

    expected, buffers = on_main(run.watch, first)
    other = None
    if not built:
        try:
            built.append(build(True))
            for name, buffer in buffers.items():
                module, _, leaf = name.rpartition(".")
                built[0].get_submodule(module)._buffers[leaf] = buffer
            other = None if form(built[0]) == expected else "its weights differ in form"
        except Exception as fault:  # the main process could: the meta device is what could not
            other = f"{type(fault).__name__}: {str(fault):.200}"
    if reason := next(filter(None, gather(other)), None):
        run.say(f"every process loads the whole model before it keeps its part: it cannot be built without weights "
                f"({reason})")
        if not run.main:
            built = [build(False)]
            if form(built[0]) != expected:
                raise RuntimeError("FSDP: the processes load different models")
    return built[0]


def form(model: nn.Module) -> list[tuple]:
    """All about weights and buffers but their values; a tied weight is the first of its name. Without a buffer, or
    another tensor, that has no values."""
    first: dict[nn.Parameter, str] = {}
    weights = [(name, first.setdefault(p, name), tuple(p.shape), p.dtype, p.requires_grad)
               for name, p in model.named_parameters(remove_duplicate=False)]
    values = [(f"{prefix}.{name}", tuple(t.shape), t.dtype) for prefix, module in model.named_modules()
              for name, t in [*module._buffers.items(), *vars(module).items()]
              if isinstance(t, torch.Tensor) and not t.is_meta]
    return weights + values


def take_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Put all weights on the meta device; what they were, by name, a tied one once."""
    taken = {name: p for name, p in model.named_parameters()}
    empty = {p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in taken.values()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = empty[p]
    return taken


@torch.no_grad()
def give_weights(model: nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Send every weight of rank 0, one at a time, to all processes, which keep their parts of it on `device`. weights:
    used up, so that rank 0 does not hold them for longer."""
    from torch.distributed.tensor import distribute_tensor

    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    model.to_empty(device=device)
    for place, values in buffers:
        place.update(values)
    for name, p in model.named_parameters():
        known = weights.pop(name)
        whole = torch.empty(p.shape, dtype=p.dtype, device=device) if known.is_meta else known.to(device).contiguous()
        torch.distributed.broadcast(whole, 0)
        p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local())


def gather(mine: T) -> list[T]:
    """What every process has, by rank."""
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


# ---- save

def save_shards(directory: Path) -> dict:
    """The files that this process wrote into `directory`: name -> size and sha256, on disk to the last bit."""
    rank = torch.distributed.get_rank()
    own = sorted(directory.glob(f"__{rank}_*.distcp")) + ([directory / ".metadata"] if rank == 0 else [])
    for path in own:
        fsync_path(path)
    return {f"{SHARDS}/{path.name}": file_facts(path) for path in own}


def write_shards(model: LossModel, optimizer: torch.optim.Optimizer, directory: Path | None) -> dict:
    """Every process writes its part of weights and optimizer below rank 0's `directory`; all must call it.

    Returns name -> size and sha256 of all files, already flushed. A fault of any process is raised on rank 0; the
    others end quietly.
    """
    place = Path(gather(str(directory))[0]) / SHARDS

    def write() -> dict:
        weights = trained(model)
        state = {"weights": {name: p.detach() for name, p in weights.items()},
                 "optimizer": {name: optimizer.state[p] for name, p in weights.items() if p in optimizer.state}}
        dcp.save(state, storage_writer=filesystem.FileSystemWriter(place, sync_files=False))
        return save_shards(place)

    found, fault = {}, None
    try:
        found = write()
    except (Exception, dcp.api.CheckpointException) as raised:
        cause = next((each for each, _ in raised.failures.values()), raised) if hasattr(raised, "failures") else raised
        number = no_space(cause) or (cause.errno if isinstance(cause, OSError) else None)
        fault = OSError(number, str(cause), str(place)) if number else RuntimeError(repr(cause))
    everyone = gather((found, fault))
    fault = next((fault for _, fault in everyone if fault), None)
    if fault and torch.distributed.get_rank():
        raise SaidElsewhere(74 if isinstance(fault, OSError) else 1)
    if fault:
        raise fault
    return {name: facts for files, _ in everyone for name, facts in files.items()}


def trained(model: LossModel) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a tied one once."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():  # after an evaluation the outermost weights still lie there gathered, as copies
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- load

def _member(of: object, name: str) -> Enum:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as getattr(class, name)."""
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise pickle.UnpicklingError(f"getattr of {of!r} does not belong into a checkpoint")
    return of[name]


class Unpickler(pickle.Unpickler):
    """Of the table of contents of a checkpoint, which is a pickle: nothing but its own plain classes is made."""

    def find_class(self, module: str, name: str) -> object:
        """The class of that name, if it is one of those."""
        if module == "torch.distributed.checkpoint.metadata" and isinstance(found := getattr(metadata, name, 0), type):
            return found
        known = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
                 ("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
                 ("pathlib", "PosixPath"): Path, ("pathlib", "Path"): Path, ("builtins", "getattr"): _member}
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")
        return known[module, name]


class Reader(filesystem.FileSystemReader):
    """The library's reader (tensors with weights_only), but for the pickle."""

    def read_metadata(self, *_: object, **__: object) -> metadata.Metadata:
        """The table of contents."""
        with open(Path(self.path) / ".metadata", "rb") as stream:
            found = Unpickler(stream).load()
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        return found


def read_shards(model: LossModel, optimizer: torch.optim.Optimizer | None, checkpoint: Path) -> None:
    """Load weights (and optimizer state) from shards into a model that is sharded or whole; every weight must be there.

    In a job of several processes all must call it; one alone (`optimizer` None) may do it for itself.
    """
    from torch.distributed.tensor import DTensor

    reader = Reader(checkpoint / SHARDS)
    there = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    weights = trained(model)
    expected = {f"weights.{name}": tuple(p.shape) for name, p in weights.items()}
    if wrong := expected.items() ^ {(name, shape) for name, shape in there.items() if name.startswith("weights.")}:
        raise UserError(f"{checkpoint}: the checkpoint does not fit the model ({len({n for n, _ in wrong})} weights "
                        f"differ, for example {sorted(wrong)[0][0]}). Resume with the settings the run was started "
                        "with.")
    states: dict[str, dict] = {}
    for name, p in weights.items() if optimizer else ():
        prefix = f"optimizer.{name}."
        for key in (entry.removeprefix(prefix) for entry in there if entry.startswith(prefix)):
            shape = there[prefix + key]
            # a step's number lies where the whole weight is: the fused optimizer asks for it there
            place = "cpu" if isinstance(p, DTensor) else p.device
            states.setdefault(name, {})[key] = (torch.zeros_like(p) if shape == tuple(p.shape) else
                                                torch.zeros(shape, device=place))
    tensors = {name: p.detach() for name, p in weights.items()}
    load({"weights": tensors, "optimizer": states}, reader, alone=optimizer is None)
    for name, state in states.items():
        optimizer.state[weights[name]] = state


def all_tensors(shards: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a directory of shards, whole, by name."""
    reader = Reader(shards)
    there = reader.read_metadata().state_dict_metadata
    found = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in there.items()}
    load(found, reader, alone=True)
    return found


def load(tensors: dict, reader: Reader, alone: bool) -> None:
    """Fill the tensors; all processes together, or one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(tensors, storage_reader=reader, no_dist=alone)


def spread_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load the optimizer state of one process, in which parameters are numbered, into that of a sharded model."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            optimizer.state[p] = {
                key: distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if value.shape == p.shape
                else value for key, value in saved["state"][number].items()}


def whole_model(run: Run) -> LossModel:
    """The run's model once more, whole and in this process alone, on the CPU; its trained weights are still to be read
    (`read_shards`)."""
    model, causal_lm = run.loss_model.model, run.loss_model.causal_lm
    if model is causal_lm:
        config, head = deepcopy(causal_lm.config), causal_lm.get_output_embeddings()
        if head is not None and head.weight is not causal_lm.get_input_embeddings().weight:
            config.tie_word_embeddings = False  # a file that holds both goes before what its configuration says
        whole = bare = type(causal_lm)._from_config(config, dtype=torch.float32)
        whole._weight_conversions = getattr(causal_lm, "_weight_conversions", None)  # names of weights in files
    else:
        from peft import get_peft_model

        config, source = model.peft_config["default"], find_model(run.config.at(run.config.source))
        path = config.base_model_name_or_path
        bare = load_model(source.base if source.adapter else run.config.at(path))
        whole = get_peft_model(bare, deepcopy(config))
        whole.peft_config["default"].base_model_name_or_path = path
    bare.generation_config = causal_lm.generation_config
    return LossModel(whole, "sdpa")
