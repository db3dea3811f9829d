"""DeepSpeed ZeRO-3: every process holds its part of weights, gradients and optimizer state, in DeepSpeed's engine.

accelerate starts the processes and computes in mixed precision as it does for DDP; the engine is made and driven here,
because accelerate's own wrapper takes the optimizer step inside the last backward pass, before the gradient's norm is
known. Weights and states are gathered one parameter at a time for a checkpoint, which has the form that a single
process writes: any number of processes goes on from it, under DeepSpeed or without.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from common.faults import UserError
from common.loss import LossModel
from common.settings import SftConfig

BUCKET = 50_000_000  # gradients that are summed at a time; DeepSpeed's own number sets 2 GB aside


def is_zero() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_zero(config: SftConfig) -> None:
    """UserError where DeepSpeed is asked for but not installed, or for what it would do otherwise or not at all here.
    Reads the environment in which `accelerate launch` passes its file on."""
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed: the package deepspeed is not installed. Install it (pip install deepspeed), or "
                        "start with --config_file config/accelerate/fsdp2.yaml, which shards the same.")
    given = lambda name, default="none": os.environ.get(f"ACCELERATE_{name}", default).lower()
    stage, steps = given("DEEPSPEED_ZERO_STAGE", "2"), given("GRADIENT_ACCUMULATION_STEPS", "1")
    clipping, precision = given("GRADIENT_CLIPPING", "1.0"), given("MIXED_PRECISION", "no")
    offload = [d for d in (given("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"), given("DEEPSPEED_OFFLOAD_PARAM_DEVICE"))
               if d != "none"]
    for found, what, way in (
            (given("DEEPSPEED_CONFIG_FILE") != "none", "deepspeed_config_file", "Its optimizer, schedule and precision "
             "would contradict the script's: use config/accelerate/deepspeed_zero3.yaml."),
            (stage != "3", f"zero_stage {stage}", "Set zero_stage: 3."),
            (offload, f"offload to {'/'.join(offload)}", "Set both offload devices to none."),
            (given("DEEPSPEED_ZERO3_INIT", "false") == "true", "zero3_init_flag", "Set it to false: new tokens and "
             "adapters are made on whole weights."),
            (given("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false") == "true", "zero3_save_16bit_model", "Set it to false: "
             "the final model has the dtype of the base."),
            (steps not in ("1", "auto"), f"gradient_accumulation_steps {steps}", "Leave it out there and give "
             "--gradient_accumulation_steps."),
            (clipping not in ("1.0", "auto") and float(clipping) != (config.max_grad_norm or 0),
             f"gradient_clipping {clipping}", "Leave it out there and give --max_grad_norm."),
            (precision not in ("no", "bf16"), f"mixed_precision {precision}", "Use bf16."),
            (config.load_in_4bit, "--load_in_4bit", "Train 4-bit models with DDP (config/accelerate/ddp.yaml)."),
            (config.optim == "adafactor", "--optim adafactor", "Its row and column means do not know shards: use "
             "adamw."),
            (config.compile, "--compile", "Leave it out.")):
        if found:
            raise UserError(f"DeepSpeed with {what}: not supported. {way}")


def engine_config(accelerator: Accelerator, config: SftConfig) -> dict:
    """What DeepSpeed is told. Weights stay fp32 and are computed with in bf16 as under DDP; sums of gradients and all
    that is sent between processes are fp32."""
    found = {"train_micro_batch_size_per_gpu": config.per_device_train_batch_size, "gradient_accumulation_steps": 1,
             "gradient_clipping": config.max_grad_norm or 0.0, "steps_per_print": None,
             "zero_allow_untested_optimizer": True,
             "zero_optimization": {"stage": 3, "reduce_bucket_size": BUCKET}}
    if accelerator.mixed_precision == "bf16":
        found["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return found


def prepare_zero(accelerator: Accelerator, loss_model: LossModel, optimizer: torch.optim.Optimizer,
                 config: SftConfig) -> tuple[nn.Module, ZeroOptimizer]:
    """Cut model and optimizer into parts: (engine, optimizer). Weights must have been read: from here on no process
    holds them whole."""
    import deepspeed

    numbered = [list(group["params"]) for group in optimizer.param_groups]
    settings = engine_config(accelerator, config)
    deepspeed.zero.Init(module=loss_model, config_dict_or_path=settings, dtype=torch.float32)  # a weight at a time
    for buffer in loss_model.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    for p in loss_model.causal_lm.get_output_embeddings().parameters():  # used without a call of its module
        deepspeed.zero.register_external_parameter(loss_model, p)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")  # of what it calls there
    engine, *_ = deepspeed.initialize(model=loss_model, optimizer=optimizer, config=settings)
    for method in ("token_losses", "whole_logits"):  # the weights are gathered for these as for the forward pass
        setattr(loss_model, method, through_forward(loss_model, getattr(loss_model, method)))
    return engine, ZeroOptimizer(engine, numbered, accelerator.is_main_process)


def through_forward(model: nn.Module, method: Callable) -> Callable:
    """A method of a model as a call of the model, so that the hooks which gather weights run (without gradients)."""
    @torch.no_grad()
    def call(*args: object, **options: object) -> object:
        model.forward = partial(method, *args, **options)
        try:
            return model()
        finally:
            del model.forward
    return call


def backward(engine: nn.Module, loss: torch.Tensor, last: bool) -> None:
    """One pass of a step: gradients are averaged over the processes and added up in parts."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def gradient_norm(engine: nn.Module, accelerator: Accelerator) -> float:
    """The norm of the whole gradient, over all processes, before it is clipped; also NaN or infinite."""
    from deepspeed.utils import safe_get_local_grad

    squares = [safe_get_local_grad(p).norm().double() ** 2 for p in engine.parameters() if p.requires_grad]
    return float(accelerator.reduce(torch.stack(squares).sum()).sqrt())


class ZeroOptimizer:
    """The engine's optimizer with the face of a plain one; its state is that of a single process."""

    def __init__(self, engine: nn.Module, numbered: list[list[nn.Parameter]], main: bool) -> None:
        self.engine, self.numbered, self.main = engine, numbered, main

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.engine.optimizer.state

    def step(self) -> None:
        """Clip and step; the gradients are known to be finite."""
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed left out an optimizer step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The step has done it."""

    def state_dict(self) -> dict:
        """The state of all parameters, whole and on the CPU; every process must call it, only the main one gets it."""
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        parts = next(iter(self.state.values()), {})  # all parts have taken the same steps
        states, groups, n = {}, [], 0
        for group, parameters in zip(self.param_groups, self.numbered, strict=True):
            groups.append({**group, "params": list(range(n, n + len(parameters)))})
            for p in parameters:
                states[n] = {key: self._kept(whole(p, key) if value.dim() else value) for key, value in parts.items()}
                n += 1
        return {"state": states if parts else {}, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        """Each process takes its part of what `state_dict` gave, or of a single process' optimizer."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_optimizer_state

        rank = torch.distributed.get_rank()
        first = next(iter(saved["state"].values()), {})
        for flat in self.engine.optimizer.fp32_partitioned_groups_flat if first else ():
            self.state[flat] = {key: torch.zeros_like(flat.detach()) if value.dim() else value.clone()
                                for key, value in first.items()}
        for n, p in enumerate(p for parameters in self.numbered for p in parameters):
            size = safe_get_local_fp32_param(p).numel()
            for key, value in saved["state"].get(n, {}).items():
                if value.dim():
                    own = value.flatten()[rank * size:(rank + 1) * size]
                    safe_set_local_optimizer_state(p, F.pad(own, (0, size - own.numel())), key)

    def whole_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The trained weights and the buffers of a model by name, as `state_dict` gives the optimizer's."""
        from deepspeed.utils import safe_get_full_fp32_param

        found, gathered = {}, {}
        for name, value in model.state_dict(keep_vars=True).items():
            if value.requires_grad:  # a tied one has two names
                if id(value) not in gathered:
                    gathered[id(value)] = self._kept(safe_get_full_fp32_param(value))
                found[name] = gathered[id(value)]
            elif not isinstance(value, nn.Parameter):
                found[name] = value
        return found

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor.detach().to("cpu", copy=True) if self.main else None
