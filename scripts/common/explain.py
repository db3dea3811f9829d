"""--explain_step N: what an optimizer step learnt from, from the plan alone, also long after the run."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from common.attention import causal_lm_of
from common.chat import Chat
from common.checkpoint import checkpoints, step_of, verify
from common.config import differences, to_dict
from common.faults import UserError
from common.identity import fingerprints
from common.loss import LossModel, make_batch
from common.material import Material
from common.model import add_tokens, load_model
from common.probe import choose_attention
from common.run import Run
from common.rundir import fingerprint_differences, read_run, refuse_changes
from common.settings import SftConfig
from common.sharded import has_shards


def explain_step(run: Run, chat: Chat, material: Material) -> list[str]:
    """A line for every example of optimizer step N (from 1): row, data set, file:line, tokens, trained tokens, loss.

    The loss, in nats a trained token, is of the newest checkpoint before the step, else of the base. Writes nothing.
    Raises UserError if the plan has no such step, or is not the plan of the run that the directory holds.
    """
    step, plan, config = run.config.explain_step, material.plan, run.config
    if step > plan.n_steps:
        raise UserError(f"--explain_step {step:,}: the plan has {plan.n_steps:,} steps.")
    if old := read_run(run.directory):
        refuse_changes(run.directory, differences(old["config"], to_dict(config), SftConfig),
                       fingerprint_differences(old["fingerprints"], fingerprints(material, chat, config)))
    rows = plan.step_rows(step - 1)
    model, whose = model_before(run, chat, step)
    losses = example_losses(run, model, material, rows)
    lines = [f"step {step:,} of {plan.n_steps:,}, stage {plan.stages[plan.stage_of(step - 1)].name}: {len(rows):,} "
             f"rows, {plan.tokens(step - 1):,} tokens, {plan.trained_tokens(step - 1):,} trained; losses of {whose}"]
    table = [("row", "data set", "example", "tokens", "trained", "loss")]
    for number, row in enumerate(rows):
        for pair, encoded, loss in zip(row, material.examples(row), losses[number]):
            table.append((str(number + 1), material.datasets[pair[0]].name, material.places([pair[None]])[0],
                          f"{len(encoded.input_ids):,}", f"{np.count_nonzero(encoded.trained[1:]):,}", f"{loss:.4f}"))
    widths = [max(len(line[i]) for line in table) for i in range(6)]
    left = (False, True, True, False, False, False)
    return lines + ["  ".join(cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in
                              zip(line, widths, left)).rstrip() for line in table]


def model_before(run: Run, chat: Chat, step: int) -> tuple[LossModel, str]:
    """The model of the newest whole checkpoint of the run before the step, else the base; and what to call it. One in
    shards is not read here."""
    config = run.config
    before = [path for path in reversed(checkpoints(run.directory)) if step_of(path) < step]
    for path in before:
        if not has_shards(path) and not verify(path):
            return LossModel(load_model(str(path), in_4bit=config.load_in_4bit), "sdpa"), path.name
    source = config.source
    model = load_model(config.at(source))
    add_tokens(causal_lm_of(model), chat, config.seed)
    unread = " (checkpoints in shards are not read here)" if any(map(has_shards, before)) else ""
    return LossModel(model, "sdpa"), f"the base {Path(source)}{unread}"


def example_losses(run: Run, model: LossModel, material: Material, rows: list[np.ndarray]) -> list[list[float]]:
    """Mean loss over the trained tokens of each example of each row."""
    model.to(run.accelerator.device).eval()
    probe = sorted((e for row in rows for e in material.examples(row)), key=lambda e: len(e.input_ids))[:2]
    with run.accelerator.autocast():
        choose_attention(model, probe, material.pad_id, run.config.attn_implementation, run.config.packing)
    found = []
    for row in rows:
        batch = make_batch([material.examples(row)], material.pad_id).to(run.accelerator.device)
        with run.accelerator.autocast():
            losses = model.token_losses(batch)[0].double().cpu().numpy()
        sums = np.bincount(batch.owners, losses, minlength=len(row))
        found.append((sums / np.maximum(1, np.bincount(batch.owners, minlength=len(row)))).tolist())
    return found
