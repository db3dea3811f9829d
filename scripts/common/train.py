"""One optimizer step of the plan, one evaluation, and what surrounds them: optimizer, schedule, the numbers of a log
line.

The loss of a step is the sum over all its trained tokens, of all rows and all ranks, divided by their number, which the
plan knows beforehand. So the size of a micro-batch, packing and the number of processes change nothing but speed.
"""
from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator

from common.checkpoint import TrainState, fail_point
from common.data import Dataset
from common.faults import NotFinite
from common.flops import Meter
from common.loss import Batch, LossModel, batch_inputs, make_batch
from common.material import Material
from common.order import pack
from common.plan import Plan
from common.sharded import is_sharded
from common.zero import backward, gradient_norm, is_zero

if TYPE_CHECKING:
    from common.settings import SftConfig


@dataclass
class StepResult:
    """What one optimizer step did, over all ranks. loss: nats per trained token."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    seconds: float
    stage: str


def make_optimizer(model: torch.nn.Module, config: SftConfig, whole: bool = True) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; matrices decay, vectors (norms, biases) do not. whole: they will
    not be cut into parts for several processes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if config.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                             eps=config.adam_epsilon, fused=whole and trained[0].device.type in ("cpu", "cuda"))


def warmup_length(config: SftConfig, n_steps: int) -> int:
    """Steps in which the learning rate rises."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * n_steps)


def learning_rate(config: SftConfig, step: int, n_steps: int) -> float:
    """The rate of optimizer step `step` (0-based): a function of the step alone, so there is nothing to restore.

    Linear rise over the warm-up (the first step is not 0), then constant, a line, or half a cosine down to
    min_lr_ratio of it at the end (SGDR, arXiv:1608.03983, without restarts).
    """
    warmup = warmup_length(config, n_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.lr_scheduler_type.startswith("constant"):
        return config.learning_rate
    done = (step - warmup) / max(1, n_steps - warmup)
    falling = 1 - done if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)


class Batches:
    """The batches of one process, step by step; a thread makes those of the next step while this one is computed."""

    def __init__(self, accelerator: Accelerator, flat: bool, material: Material, config: SftConfig):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.pinned, self.flat = accelerator.device.type == "cuda", flat
        self.material, self.config = material, config
        self.thread = ThreadPoolExecutor(1, "batches")
        self.ahead: dict[int, Future[list[Batch]]] = {}

    def of(self, step: int) -> list[Batch]:
        """A batch for each pass of step `step`, still on the host: every process has as many, an empty one where it has
        no rows, because the reductions of all of them must pair."""
        ready = self.ahead.pop(step, None) or self.thread.submit(self._make, step)
        if step + 1 < self.material.plan.n_steps:
            self.ahead = {step + 1: self.thread.submit(self._make, step + 1)}
        return ready.result()

    def _make(self, step: int) -> list[Batch]:
        plan, size = self.material.plan, self.config.per_device_train_batch_size
        rows = plan.rank_rows(step, self.rank, self.world)
        passes = max(1, math.ceil(math.ceil(plan.row_count(step) / self.world) / size))
        parts = [[self.material.examples(row) for row in rows[i * size:(i + 1) * size]] for i in range(passes)]
        made = [make_batch(part, self.material.pad_id, self.config.pad_to_multiple_of, self.flat) for part in parts]
        return [batch.pinned() for batch in made] if self.pinned else made


def train_step(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, material: Material,
               config: SftConfig, step: int, batches: Batches,
               at: Callable[[str], None] = lambda place: None) -> StepResult:
    """Do optimizer step `step` of the plan; at(place) is told where this process is. Raises NotFinite before the
    weights are touched."""
    started = time.perf_counter()
    at(f"step {step + 1}")
    plan, world, rank = material.plan, accelerator.num_processes, accelerator.process_index
    total = plan.trained_tokens(step)
    # Randomness is a function of the step: a resumed run draws the same dropout masks.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1, np.uint32)[0]))
    rate = learning_rate(config, step, plan.n_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    model.train()
    passes, zero = batches.of(step), is_zero()
    for i, batch in enumerate(passes):
        batch, last = batch.to(accelerator.device), i == len(passes) - 1
        at(f"step {step + 1}, pass {i + 1}")  # from here on processes wait for each other
        # whole gradients of a model in shards would not fit: those of an adapter wait, others are summed in every pass
        wait = not (last or zero) and (config.use_lora or not is_sharded(accelerator))
        with accelerator.no_sync(model) if wait else nullcontext():
            loss = model(**batch_inputs(batch))
            if last:
                at(f"step {step + 1}, the sum of the gradients")
            scaled = loss * (world / total)  # the ranks' gradients are averaged, hence `world`
            backward(model, scaled, last) if zero else accelerator.backward(scaled)
        loss_sum += loss.detach()
    loss_sum = accelerator.reduce(loss_sum) if world > 1 else loss_sum
    norm = gradient_norm(model, accelerator) if zero else accelerator.clip_grad_norm_(
        model.parameters(), config.max_grad_norm or math.inf)
    loss, norm = float(loss_sum) / total, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(_not_finite(step, loss, norm, material.places(plan.step_rows(step))))
    fail_point("in_step", step + 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, rate, plan.tokens(step), total, time.perf_counter() - started,
                      plan.stages[plan.stage_of(step)].name)


def _not_finite(step: int, loss: float, norm: float, places: list[str]) -> str:
    shown = ", ".join(places[:20]) + (f" and {len(places) - 20} more" if len(places) > 20 else "")
    return (f"step {step + 1}: loss {loss}, gradient norm {norm}. Stopped before the optimizer step; the newest "
            f"checkpoint is whole. Rows: {shown}. Look at these rows, or lower learning_rate.")


def evaluation_rows(datasets: list[Dataset], sides: list[np.ndarray], max_seq_length: int,
                    packing: bool) -> list[list[tuple[int, int]]]:
    """Put held-out examples into rows, long rows first: lists of (data set, example)."""
    members = np.array([(s, e) for s, side in enumerate(sides) for e in side], np.int64).reshape(-1, 2)
    lengths = np.array([datasets[s].lengths[e] for s, e in members], np.int64)
    if not packing:
        return [[tuple(members[i])] for i in np.argsort(-lengths, kind="stable")]
    row_of, n_rows = pack(lengths, max_seq_length)
    rows: list[list[tuple[int, int]]] = [[] for _ in range(n_rows)]
    for member, row in zip(members, row_of):
        rows[row].append(tuple(member))
    return rows


def evaluate_loss(accelerator: Accelerator, loss_model: LossModel, datasets: list[Dataset],
                  rows: list[list[tuple[int, int]]], pad_id: int, batch_size: int,
                  at: Callable[[str], None] = lambda place: None) -> dict[str, float]:
    """Token-weighted loss over held-out rows, in all ("eval_loss") and by data set ("eval_loss/<name>").

    at(place) is told where this process is. Sums are float64 over single tokens, so batch size, order and number of
    processes do not matter.
    """
    sums = np.zeros((len(datasets), 2))  # nats, tokens
    loss_model.eval()
    batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    # the same number on every rank, an empty one where there is none left: a model in shards is gathered by all
    batches += [[]] * (-len(batches) % accelerator.num_processes)
    for chosen in batches[accelerator.process_index::accelerator.num_processes]:
        examples = [[datasets[s].example(int(e)) for s, e in row] for row in chosen]
        batch = make_batch(examples, pad_id, flat=loss_model.flat)
        at("the evaluation")
        with accelerator.autocast():
            losses, _ = loss_model.token_losses(batch.to(accelerator.device))
        source = np.array([s for row in chosen for s, _ in row], np.int64)[batch.owners]
        losses = losses.double().cpu().numpy()
        for s in np.unique(source):
            own = losses[source == s]
            sums[s] += own.sum(), own.size
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(torch.from_numpy(sums).to(accelerator.device)).cpu().numpy()
    found = {"eval_loss": float(sums[:, 0].sum() / max(1.0, sums[:, 1].sum()))}
    found.update({f"eval_loss/{d.name}": float(n / t) for d, (n, t) in zip(datasets, sums) if t})
    return found


def count_step(state: TrainState, result: StepResult, plan: Plan, last: bool, every: int,
               meter: Meter) -> dict | None:
    """Book a step that was done; return a line for metrics.jsonl when one is due. Its loss is the token mean since the
    line before, its shares are of what the stage has drawn so far; the sums are part of the state, so that a resumed
    run writes the same lines."""
    epoch = plan.epoch_of(state.step)
    order = b"|".join(row.tobytes() for row in plan.step_rows(state.step))
    state.rows = hashlib.sha256(state.rows.encode() + order).hexdigest()
    state.step += 1
    state.tokens += result.tokens
    state.trained_tokens += result.trained_tokens
    state.seconds += result.seconds
    sums = state.since_log
    for name, value in (("nats", result.loss * result.trained_tokens), ("tokens", result.tokens),
                        ("trained_tokens", result.trained_tokens), ("seconds", result.seconds)):
        sums[name] = sums.get(name, 0) + value
    ends_stage = state.step in plan.stage_bounds  # a line is of one stage, so that their losses can be told apart
    if not (last or ends_stage) and state.step % every:
        return None
    line = {"step": state.step, "loss": sums["nats"] / sums["trained_tokens"], "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm, "tokens_per_second": round(sums["tokens"] / sums["seconds"], 1),
            "trained_tokens_per_second": round(sums["trained_tokens"] / sums["seconds"], 1),
            "mfu": round(meter.share(sums["tokens"], sums["trained_tokens"], sums["seconds"]), 4),
            "epoch": round(epoch, 6), "stage": result.stage}
    if len(plan.sources) > 1:
        line |= {f"share/{name}": round(share, 6) for name, share in plan.shares(state.step - 1).items()}
    sums.clear()
    return line


def judge(state: TrainState, loss: float, config: SftConfig) -> bool:
    """Book an evaluation: is it the best so far, and is it time to stop early? Returns whether it is better. Raises
    NotFinite."""
    if not math.isfinite(loss):
        raise NotFinite(f"step {state.step}: the validation loss is {loss}. What was saved before is whole. Lower "
                        "learning_rate.")
    better = state.best_loss is None or loss < state.best_loss - config.early_stopping_threshold
    if better:
        state.best_loss, state.best_step, state.evals_without_gain = loss, state.step, 0
    else:
        state.evals_without_gain += 1
        state.stopped_early = state.evals_without_gain >= (config.early_stopping_patience or math.inf)
    return better
