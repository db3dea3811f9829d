"""What is printed before time is spent: the arithmetic of data and plan, and one example with its trained part
marked."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from common.arithmetic import describe
from common.chat import Chat, Encoded
from common.material import Material
from common.memory import largest_load, needed, shape_of, spoken
from common.zero import is_zero

if TYPE_CHECKING:
    from common.run import Run


def describe_data(material: Material) -> list[str]:
    """A line for each data set: rows, examples, tokens, what was dropped and why, and how it was split."""
    lines = []
    for d, train, val, test in zip(material.datasets, material.split.train, material.split.val, material.split.test):
        meta = d.meta
        lines.append(f"{d.path}: {meta['rows_in']:,} rows -> {meta['examples']:,} examples, {meta['tokens']:,} tokens "
                     f"({meta['trained_tokens']:,} trained); train {len(train):,}, validation {len(val):,}"
                     + (f", test {len(test):,}" if len(test) else "")
                     + f"; cached as {d.name}-{meta['sha256'][:7]}, made at {meta['rows_per_second']:,} rows/s")
        if meta["rows_distinct"] < meta["rows_kept"]:
            lines.append("  " + duplicates(meta))
        lines += _what_became_of_rows(meta)
    lines += [f"note: {note}" for note in material.split.notes]
    for d in material.brought:
        lines.append(f"{d.path}: {d.meta['rows_in']:,} rows -> {d.meta['examples']:,} examples for validation")
        lines += _what_became_of_rows(d.meta)
    if material.brought:
        lines.append(f"validation: {material.val_count:,} examples of {', '.join(d.path for d in material.brought)}")
    return lines


def _what_became_of_rows(meta: dict) -> list[str]:
    """Lines about rows of a data set that are not learnt, or not as they stand in the file."""
    lines = []
    dropped = [f"{n:,} {reason}" for reason, n in meta["dropped"].items() if n]
    dropped += [f"{meta['rows_bad']:,} bad (--skip_bad_rows)"] if meta["rows_bad"] else []
    if dropped:
        lines.append(f"  dropped: {'; '.join(dropped)}")
    for key, what in (("rows_split", "rows too long, split into windows"), ("rows_cut", "rows too long, cut"),
                      ("answers_dropped", "answers of split rows dropped: too long by themselves"),
                      ("encoded_apart", "answers encoded apart from their prompt, because the tokenizer would join "
                       "the two in one token")):
        if meta[key]:
            lines.append(f"  {meta[key]:,} {what}")
    lines += [f"  {n:,} {what}" for what, n in meta["notes"].items()]
    if meta["unread"]:
        lines.append("  not read: " + ", ".join(f"{key} ({n:,})" for key, n in meta["unread"].items()))
    return lines


def duplicates(meta: dict) -> str:
    """What to know about rows that are there more than once: 500 rows hold 20 distinct texts: ..."""
    what = "texts" if meta["form"] == "text" else "conversations"
    times = meta["rows_kept"] / meta["rows_distinct"]
    often = (f": each is learnt {times:.0f} times an epoch, and the split has as few to choose from. Remove the "
             "duplicates, or train fewer epochs" if times >= 2 else " (the same ones are on one side of the split)")
    return f"{meta['rows_kept']:,} rows hold {meta['rows_distinct']:,} distinct {what}{often}"


def describe_plan(material: Material) -> str:
    """The plan's arithmetic: draws, shares asked and obtained, rows, fill, steps."""
    return describe(material.plan.summary())


def describe_memory(run: Run, base: object, chat: Chat, material: Material, parameters: int | None) -> str:
    """What a process will need beside what it holds before the model `base` (a configuration) is loaded. parameters:
    of the model, where they are known."""
    config, state = run.config, run.accelerator.state
    shape = shape_of(base, len(chat.tokenizer))
    more = (parameters or 0) - shape.parameters  # biases and norms are little; what is more are experts
    sharded = getattr(state, "fsdp_plugin", None) is not None or is_zero()
    on_cpu = run.accelerator.device.type == "cpu"
    load = largest_load(material.plan, config.per_device_train_batch_size, on_cpu)
    parts = needed(shape, load, lora_r=config.lora_r if config.use_lora else None,
                   bf16=run.accelerator.mixed_precision != "no", checkpointing=config.gradient_checkpointing,
                   in_4bit=config.load_in_4bit, dora=config.use_dora, optim=config.optim,
                   processes=run.accelerator.num_processes, sharded=sharded, on_cpu=on_cpu,
                   more=more if more > shape.parameters / 5 else 0)
    return spoken(parts, checked=on_cpu and not sharded)


def mark_trained(encoded: Encoded, chat: Chat, colour: bool | None = None) -> str:
    """The text of an example with its trained tokens between « and » (green on a terminal)."""
    colour = sys.stdout.isatty() if colour is None else colour
    before, after = ("\x1b[32m«", "»\x1b[0m") if colour else ("«", "»")
    return "".join(f"{before}{part}{after}" if trained else part for part, trained in marked_parts(encoded, chat))


def marked_parts(encoded: Encoded, chat: Chat) -> list[tuple[str, bool]]:
    """The text of an example in parts, and whether each is trained.

    Control tokens are shown as they are; white space at the seams may look different from the text, the ids do not.
    """
    text, parts = "", []
    ids, trained = encoded.input_ids.tolist(), encoded.trained.tolist()
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[start]:
            upto = chat.tokenizer.decode(ids[:i], skip_special_tokens=False)
            parts.append((upto[len(text):], trained[start]))
            text, start = upto, i
    return parts


def show_example(material: Material, chat: Chat, limit: int = 1500) -> list[str]:
    """The first example of the first step: where it is from, its counts, and its text with the trained part marked."""
    row = material.plan.step_rows(0)[0][:1]
    encoded = material.examples(row)[0]
    text = mark_trained(encoded, chat)
    if len(text) > limit:
        text = text[:limit] + f" … ({len(text) - limit:,} more characters)"
    return [f"example {material.places([row])[0]}: {len(encoded.input_ids):,} tokens, {int(encoded.trained.sum()):,} "
            "trained, marked «…»", text]
