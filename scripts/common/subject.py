"""What is evaluated: a run, a model, an adapter or a Hub id -> tokenizer, template and weights; and its baseline."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.attention import causal_lm_of
from common.chat import BUILT_IN, TEMPLATE_DIR, Chat, load_chat, load_tokenizer, own_template
from common.faults import UserError
from common.hub import at_commit, local_model
from common.model import add_tokens, check_vocabulary, find_model, load_model, model_config, saved_dtype, stop_ids_of
from common.rundir import DONE, RUN, STATUS, read_run, read_status
from common.spm import prove_equal

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model and the run it belongs to; run_dir is None and settings are empty for a model of another origin."""

    path: str
    run_dir: Path | None
    settings: dict
    commits: dict[str, str] = field(default_factory=dict)  # of what the run took from the Hub
    fingerprints: dict[str, str] = field(default_factory=dict)  # of what the run was made from


@dataclass(frozen=True)
class Baseline:
    """What a subject is compared with: a model, where its tokenizer is, and the template it is asked with."""

    path: str
    tokenizer_path: str
    template: str


def find_subject(path: str) -> Subject:
    """A model and its run, which is the directory itself or the one above (merged/, checkpoint-N/)."""
    find_model(path)  # raises UserError if there is none
    place = Path(path)
    inside = place.name == "merged" or place.name.startswith("checkpoint-")
    run_dir = next((p for p in (place, *([place.parent] if inside else [])) if (p / RUN).is_file()), None)
    said = read_run(run_dir) if run_dir else {"config": {}}
    return Subject(path, run_dir, said["config"], said.get("hub", {}), said.get("fingerprints", {}))


def newest_run(root: Path) -> Path:
    """The run in `root` (or one directory deeper) that finished last."""
    found = []
    for file in [*root.glob(f"*/{STATUS}"), *root.glob(f"*/*/{STATUS}")]:
        status = read_status(file.parent) or {}
        aside = re.search(r"^superseded-|\.old-", file.parent.name) or file.parent.parent.name.startswith("superseded-")
        if status.get("status") in DONE and not aside:
            found.append((file.stat().st_mtime, file.parent))
    if not found:
        raise UserError(f"{root}: no finished run. Train one with scripts/03_sft.py, or give --model_path.")
    return max(found)[1]


# ---- tokenizer and template

def open_chat(subject: Subject, tokenizer_path: str | None, template: str | None, texts: list[str], say: Say) -> Chat:
    """The tokenizer saved with the model and its template; one given beside it must agree with it on `texts`."""
    own = next((str(p) for p in (subject.path, subject.run_dir, find_model(subject.path).base)
                if p and has_tokenizer(str(p))), None)
    if own is None:
        path = tokenizer_path or subject.settings.get("tokenizer_path")
        if path is None:
            raise UserError(f"{subject.path}: no tokenizer beside the model. Name it with --tokenizer_path.")
        chat = load_chat(path, template or default_template(path))
        say(f"tokenizer {path}; template {chat.template_name}")
    else:
        name, remark = saved_template(own, template)
        chat = load_chat(own, name)
        say(f"tokenizer {own}; template {remark}")
        if tokenizer_path and Path(tokenizer_path).resolve() != Path(own).resolve():
            _check_agreement(tokenizer_path, chat, texts, own, say)
    chat.assistant_turns = subject.settings.get("assistant_turns", "all")
    return chat


def has_tokenizer(path: str) -> bool:
    """Whether a directory, or the model of a Hub id, holds a tokenizer."""
    place = Path(local_model(path, weights=False))
    return any((place / n).exists() for n in ("tokenizer.json", "vocab.json")) or \
        any(place.glob("*.model"))


def default_template(tokenizer_path: str) -> str:
    """`model` where the tokenizer brings a chat template, else chatml."""
    return "model" if own_template(load_tokenizer(tokenizer_path)[0]) else "chatml"


def saved_template(own: str, asked: str | None) -> tuple[str, str]:
    """(template for load_chat, what to say of it). The saved one stands for a built-in one from which it differs by BOS
    and system prompt alone."""
    saved = own_template(load_tokenizer(own)[0])
    if saved is None:
        return asked or "chatml", asked or "chatml (the model brings none)"
    if asked in (None, "model"):
        return "model", "saved with the model"
    source = TEMPLATE_DIR / f"{asked}.jinja" if asked in BUILT_IN else Path(asked)
    if asked.endswith((".yaml", ".yml")):
        same = saved.endswith(load_chat(own, asked).template)
    else:
        same = source.is_file() and saved.strip().endswith(source.read_text(encoding="utf-8-sig").strip())
    if same:
        return "model", f"{asked}, as saved with the model"
    return asked, f"{asked}, which is not the one saved with the model"


def _check_agreement(given: str, chat: Chat, texts: list[str], own: str, say: Say) -> None:
    other, native = load_tokenizer(given)
    try:
        if native:
            prove_equal(native, chat.tokenizer, texts)
            chat.native = native  # the law for ids, as in training
        elif chat.encode_texts(texts) != other(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            raise UserError("ids differ")
    except UserError:
        raise UserError(f"--tokenizer_path {given}: it gives other ids for these rows than {own}. Leave it out: "
                        "the model brings its own tokenizer.") from None
    more = len(chat.tokenizer) - len(other)
    say(f"tokenizer: the model's own is used; it agrees with {given} on {len(texts):,} texts"
        + (f" and has {more} tokens more" if more > 0 else ""))


# ---- weights

def open_model(subject: Subject, chat: Chat, *, merged: bool, dtype: str, seed: int, say: Say) -> nn.Module:
    """Load what is evaluated. merged: merged/ where it exists, a full model as it is, else the adapter merged here."""
    adapter, beside = find_model(subject.path).adapter, Path(subject.path) / "merged"
    if not merged:
        return load_for(subject.path, chat, dtype=dtype, seed=seed, say=say)
    if adapter is None:
        say(f"--no_lora: {subject.path} is a full model, evaluated as it is")
    elif (beside / "config.json").exists():
        say(f"--no_lora: the merged model in {beside} is evaluated")
        return load_for(str(beside), chat, dtype=dtype, seed=seed, say=say)
    model = load_for(subject.path, chat, dtype=dtype, seed=seed, say=say)
    if adapter is None:
        return model
    say(f"--no_lora: {beside} does not exist; the adapter is merged into its base in memory")
    return model.merge_and_unload()


def load_for(path: str, chat: Chat, *, dtype: str, seed: int, say: Say) -> nn.Module:
    """Load a model for a chat tokenizer, on the GPU if there is one; tokens it has never seen get fresh rows.

    dtype auto: float32 on CPU, the model's own precision on a GPU.
    """
    settings, cuda = model_config(path), torch.cuda.is_available()
    check_vocabulary(settings, chat, path)
    automatic = saved_dtype(settings, None) if cuda else torch.float32
    model = load_model(path, dtype=automatic if dtype == "auto" else getattr(torch, dtype))
    causal_lm = causal_lm_of(model)
    if add_tokens(causal_lm, chat, seed)[0]:
        say(f"{path}: it does not know {' '.join(chat.added_tokens)}; they get fresh rows, as at the start of training")
    return model.to("cuda" if cuda else "cpu").eval()


def stop_audit(model: nn.Module, chat: Chat, path: str) -> tuple[str, dict]:
    """Whether answers can end: the ids that stop generation here, the one the template ends an answer with, and those
    that plain `transformers` stops at. path: of the model. A line to print, and the same as numbers."""
    causal_lm = causal_lm_of(model)
    named = causal_lm.generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    token = lambda i: f"{chat.tokenizer.convert_ids_to_tokens(i)} ({i})"
    stops = stop_ids_of(model, chat)
    line = f"stops at {', '.join(map(token, stops))}; the template ends an answer with {token(chat.end_id)}; "
    if chat.end_id in named:
        line += f"generation_config has it ({', '.join(map(str, named))})"
    else:
        beside = Path(path) / "generation_config.json"
        way = f"Add {chat.end_id} to its eos_token_id"
        if find_model(path).adapter and beside.is_file():  # which PEFT does not read: it takes the base's
            way = (f"Set model.generation_config = GenerationConfig.from_pretrained({path!r}) there, or merge the "
                   "adapter with scripts/04_merge_lora.py")
        line += (f"generation_config does NOT have it ({', '.join(map(str, named)) or 'it names none'}): elsewhere the "
                 f"model would not stop there. {way}")
    return line, {"stop_ids": stops, "template_ends_with": chat.end_id, "generation_config": named}


# ---- the baseline

def find_baseline(subject: Subject, asked: str | None, tokenizer_path: str | None, template: str | None,
                  say: Say) -> Baseline | None:
    """The model to compare with. auto: what the run started from, or the adapter's base, or none, which is said."""
    adapter = find_model(subject.path).adapter
    path = asked
    if asked == "auto":
        named = subject.settings.get("init_from") or subject.settings.get("model_path")
        named = at_commit(named, subject.settings, subject.commits) if named else None
        path = named or (find_model(subject.path).base if adapter else None)
        if path is None:
            say("baseline: none, because the model names no base; --baseline_path takes one")
            return None
        if Path(path).is_absolute() and not Path(path).exists():
            say(f"baseline: none, because {path} is gone; --baseline_path takes another")
            return None
    if path == subject.path and asked != "auto":
        raise UserError(f"--baseline_path {path}: is the model that is evaluated. Name another, or leave it out.")
    if path is None or path == subject.path:
        return None
    try:
        find_model(path)  # before the other model is measured
    except UserError as fault:
        if asked != "auto":
            raise
        say(f"baseline: none, because it cannot be had. {fault}")
        return None
    own = path if has_tokenizer(path) else None
    tokenizer = own or subject.settings.get("tokenizer_path") or tokenizer_path or subject.path
    name = subject.settings.get("prompt_template") or template or "model"
    if name == "model" and default_template(tokenizer) != "model":
        saved = (subject.run_dir or Path(subject.path)) / "chat_template.jinja"
        name = str(saved) if saved.exists() else "chatml"
    return Baseline(path, tokenizer, name)
