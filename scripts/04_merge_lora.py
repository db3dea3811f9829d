"""Merge a LoRA adapter into its 16- or 32-bit base: a stand-alone model that needs neither peft nor the base.

    python scripts/04_merge_lora.py --model_path checkpoints/sft/first
    python scripts/04_merge_lora.py --config_path checkpoints/sft/first/run.json --merge_dtype bfloat16

In: a run (or any PEFT adapter directory). Out: RUN/merged with model, tokenizer and chat template. The merged model is
compared with the adapter on real prompts, before rounding and after reloading it from disk; both differences are
printed.
An interrupted merge leaves nothing: run it again.
"""
from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from common.card import hub_card, with_merged
from common.checkpoint import atomic_write, checkpoints
from common.config import parse, setting
from common.faults import UserError, run_main, say
from common.outputs import check_replaceable, check_writable
from common.push import check_push, push
from common.settings import TEMPLATES

if TYPE_CHECKING:
    from common.chat import Chat


@dataclass
class MergeConfig:
    """Settings of the merge."""

    model_path: str | None = setting(None, "The run: a directory with adapter_config.json.", path=True)
    config_path: str | None = setting(None, "The run's run.json, instead of model_path.", path=True)
    output_dir: str | None = setting(None, "Where the merged model goes. Without it: MODEL_PATH/merged.", path=True)
    merge_dtype: str | None = setting(None, "Precision of the merged weights. Without it: the base's.",
                                      choices=("float32", "bfloat16", "float16"))
    prompt_template: str | None = setting(None, "Template of an adapter of another origin that brings none: a name or "
                                          "a file, as 03_sft.py takes it.", path=True, words=TEMPLATES)
    push_to_hub: str | None = setting(
        None, "Push the merged model to this repository of the Hub; a new one is private. Without a value: one of "
        "yours, called like the run.", words=("auto",), bare="auto")
    overwrite_output_dir: bool = setting(False, "Replace a merged model that is there.")

    def problems(self) -> list[str]:
        """One of the two names the run."""
        if bool(self.model_path) == bool(self.config_path):
            return ["--model_path: name the run with it, or its run.json with --config_path; one of the two."]
        return []


def main(argv: list[str]) -> int:
    config = parse(MergeConfig, argv, __doc__, config_flag=None)
    if config.config_path and not Path(config.config_path).is_file():
        raise UserError(f"{config.config_path}: no such file. --config_path takes the run.json of a run.")
    run = Path(config.model_path) if config.model_path else Path(config.config_path).parent
    if not run.is_dir():
        raise UserError(f"{run}: no such directory. --model_path takes the directory of an adapter.")
    if not (run / "adapter_config.json").is_file():
        there = [path for path in checkpoints(run) if (path / "adapter_config.json").is_file()]
        way = (f"The run is not finished, but {there[-1]} has one." if there else
               "Full fine-tuning leaves a whole model; there is nothing to merge.")
        raise UserError(f"{run}: no adapter here (adapter_config.json is missing). {way}")
    output = Path(config.output_dir) if config.output_dir else run / "merged"
    if output.exists() and not config.overwrite_output_dir:
        raise UserError(f"{output}: is there already. --overwrite_output_dir replaces it, --output_dir leaves it "
                        f"alone.")
    if output.exists():
        check_replaceable(output, run)

    check_writable(output.parent, "--output_dir")
    repo = check_push(config.push_to_hub, str(run)) if config.push_to_hub else None
    from common.model import check_unquantized, load_model, merge_and_save, model_config, quiet_libraries, saved_dtype

    quiet_libraries()
    check_unquantized(model_config(str(run)), str(run))
    chat = chat_of(run, config.prompt_template)
    model = load_model(str(run), dtype="auto")
    dtype = saved_dtype(model.config, config.merge_dtype)
    found = merge_and_save(model.float(), chat, output, dtype, prompts(run, chat))
    say(f"{output}: merged model ({found['dtype']}); largest logit difference to the adapter {found['fp32']:.1e} in "
        f"fp32, {found['saved']:.1e} as saved, of logits up to {found['largest']:.0f}")
    file = run / "README.md"
    if output == run / "merged" and file.is_file():
        atomic_write(file, with_merged(file.read_text(encoding="utf-8"), found["saved"]))
    if repo:
        again = shlex.join(["python", "scripts/04_merge_lora.py", *argv, *(
            [] if config.overwrite_output_dir else ["--overwrite_output_dir"])])
        card = hub_card(file.read_text(encoding="utf-8"), run.absolute().name, repo, True) if file.is_file() else ""
        push(output, repo, card, again, say)
    return 0


def chat_of(run: Path, template: str | None) -> Chat:
    """Tokenizer and template of a run, or of an adapter of another origin that brings no template."""
    from common.chat import load_chat, load_saved_chat
    from common.model import find_model
    from common.subject import has_tokenizer

    place = str(run) if has_tokenizer(str(run)) else find_model(str(run)).base
    if template is None:
        return load_saved_chat(place)
    chat = load_chat(place, template)
    if chat.added_tokens:
        raise UserError(f"--prompt_template {template}: the model does not know its tokens "
                        f"{' '.join(chat.added_tokens)}. Give the template that the adapter was trained with.")
    return chat


def prompts(run: Path, chat: object) -> list[list[int]]:
    """Token ids to compare logits on: held-out rows of the run, or a plain sentence."""
    from common.model import sample_prompts
    from common.rows import RowReader

    held_out = run / "val.jsonl"
    rows = list(islice(RowReader(held_out, mixed=True), 4)) if held_out.is_file() else []
    return sample_prompts(chat.encode_rows(rows)) or [chat.encode_texts(["The quick brown fox jumps over the lazy "
                                                                         "dog."])[0]]


if __name__ == "__main__":
    sys.exit(run_main(main))
