"""Supervised fine-tuning of a causal language model on conversations: plan, then train.

    accelerate launch --mixed_precision bf16 scripts/03_sft.py --model_path checkpoints/pretrain/tiny/final \\
        --dataset_paths data/sft/dolly15k.jsonl data/sft/alpaca.jsonl --dataset_weights .6 .4 \\
        --output_dir checkpoints/sft/first --config_path config/sft_tiny.json

In: a base model, its tokenizer, files of rows. Out: a chat model or adapter in Hugging Face form in OUTPUT_DIR, with
the plan, the metrics, the held-out rows and checkpoints. Everything that decides what is learnt is computed and printed
before the first step; --dry_run stops there. After an interruption, give the same command again with
--resume_from_checkpoint: it goes on where it was, bit for bit (on a GPU as far as its kernels repeat themselves).
"""
from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import is_hub_name, parse
from common.faults import RankLost, Stopped, UserError, memory_fault, run_main
from common.hub import needed, resolve
from common.outputs import check_no_input, check_writable
from common.push import check_push
from common.rundir import holds_run
from common.settings import SftConfig
from common.signals import StopFlag, launched
from common.trackers import check_installed

if TYPE_CHECKING:
    from common.chat import Chat
    from common.material import Material
    from common.run import Run
    from common.rundir import Opened

LESS_MEMORY = ("Make a pass smaller (--per_device_train_batch_size with more --gradient_accumulation_steps, "
               "--per_device_eval_batch_size, --max_seq_length), or compute it again on the way back "
               "(--gradient_checkpointing, which a resumed run may add). Where the weights alone are too large: "
               "--load_in_4bit, or several GPUs with config/accelerate/fsdp2.yaml.")


def main(argv: list[str]) -> int:
    config = parse(SftConfig, argv, __doc__)
    check_files(config)
    check_installed(config.report_to)
    stop = StopFlag(config.max_minutes)
    if config.verify_resume:
        from common.verify import verify_resume

        return verify_resume(config, stop)

    from common.allocator import tune_allocator
    from common.model import quiet_libraries, use_cores
    from common.ranks import launchers_patience
    from common.run import start

    tune_allocator()
    quiet_libraries()
    run = start(config, argv)
    run.say(*config.notes, *use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1))), *launchers_patience())
    with run.watch:
        return fine_tune(run, stop)


def fine_tune(run: Run, stop: StopFlag) -> int:
    """From the settings to the model that is left behind."""
    from common import leave, show
    from common.chat import load_chat
    from common.explain import explain_step
    from common.identity import first_start
    from common.model import check_unquantized, check_vocabulary, grows, model_config
    from common.prove import prove_chat
    from common.push import check_alone
    from common.ranks import on_main
    from common.render import set_today
    from common.run import gather_material, load_run
    from common.rundir import decide

    config = run.config
    if not (config.explain_step or config.dry_run):  # refuse before time is spent
        decide(config.output_dir, config.resume_from_checkpoint, config.overwrite_output_dir)
    fetch_all(run, weights=False)
    source = config.at(config.source)
    set_today(on_main(run.watch, lambda: first_start(run)))
    chat = load_chat(config.at(config.tokenizer_path or config.source), config.prompt_template,
                     system_prompt=config.system_prompt, assistant_turns=config.assistant_turns,
                     train_on_prompt=config.train_on_prompt)
    base = model_config(source)
    check_vocabulary(base, chat, source)
    check_new_tokens(config, chat, source)
    check_length(config, base)
    check_unquantized(base, source)
    check_alone(config, grows=grows(base, chat))
    size, parameters = describe_size(config, base, chat, source)

    material = gather_material(run, chat, base)
    if config.explain_step:
        fetch_all(run, weights=True)
        run.say(*explain_step(run, chat, material))
        return 0
    if chat.replaces:
        run.say(f"template: {config.prompt_template}, in place of that which {config.tokenizer_path or config.source} "
                "brings (--prompt_template model keeps that)")
    run.say(*chat.notes, *show.describe_data(material), show.describe_plan(material),
            show.describe_memory(run, base, chat, material, parameters))
    run.say(*show.show_example(material, chat))
    run.say(*prove_chat(config, chat, material, base))
    if config.export_rendered:
        run.say(*on_main(run.watch, lambda: export(run, material, chat)))
    if config.dry_run:
        run.say(size)
        return 0
    if asked := stop.asked(run.accelerator):
        raise Stopped(f"{asked} before the first step; nothing was begun.")

    fetch_all(run, weights=True)
    with opened_directory(run, chat, material) as opened:
        if opened.kind == "finished":
            run.say(*not_done(config))
        else:
            load_run(run, chat, material, opened.checkpoint)
            train(run, chat, material, stop)
            leave.leave_model(run, chat, material)
    if config.push_to_hub and run.main:
        leave.push_model(run, again=resume_command(run))
    return 0


def fetch_all(run: Run, weights: bool) -> None:
    """Bring what the settings name from the Hub to this machine: one process asks and downloads, the others find it
    there."""
    from common.hub import fetch
    from common.ranks import on_main

    config = run.config
    if not needed(config):
        return

    def first() -> tuple:
        with run.watch.alive():
            lines = fetch(config, config.commits or resolve(config), weights)
        return lines, config.commits, config.places

    lines, commits, places = on_main(run.watch, first)
    if run.accelerator.process_index == run.accelerator.local_process_index:
        config.commits, config.places = commits, places
    else:  # on another machine, whose cache may be another
        with run.watch.alive():
            fetch(config, commits, weights)
    run.watch.meet()
    run.say(*lines)


def export(run: Run, material: Material, chat: Chat) -> list[str]:
    """Write what --export_rendered asks for; a line about it."""
    from common.leave import export_rendered

    with run.watch.alive():
        return [export_rendered(run.config.export_rendered, material, chat)]


@contextmanager
def opened_directory(run: Run, chat: Chat, material: Material) -> Iterator[Opened]:
    """Lock the output directory, decide between fresh and resumed, leave run.json and plan.json; note how it ended."""
    from common.checkpoint import disk_fault
    from common.identity import check_unchanged, describe_run
    from common.leave import forget_plan, leave_plan
    from common.ranks import exit_status, on_main
    from common.rundir import RunLock, open_run_dir, write_status

    config = run.config
    with ExitStack() as held:
        def open_it() -> tuple[Opened, bool]:
            held.enter_context(RunLock(run.directory, run.say))
            described = describe_run(run, material, chat)
            with run.watch.alive():  # checkpoints are read whole
                opened = open_run_dir(run.directory, config.resume_from_checkpoint, config.overwrite_output_dir,
                                      check=lambda found: check_unchanged(run, described, found), say=run.say)
            new = not (run.directory / "run.json").exists()
            try:
                if opened.kind != "finished":
                    leave_plan(run, described, material)
            except OSError as fault:  # half a plan would pass for a run
                if new:
                    forget_plan(run)
                raise disk_fault(fault, run.directory) from None
            return opened, new

        opened, new = on_main(run.watch, open_it)
        note = lambda **entries: write_status(
            run.directory, step=run.state.step, total_steps=material.plan.n_steps, **entries) if run.main else None
        if opened.kind == "finished":
            yield opened
            return
        note(status="running", resumed_from=opened.checkpoint.name if opened.checkpoint else None,
             resume_command=resume_command(run))
        run.watch.directory = run.directory
        try:
            yield opened
        except BaseException as found:
            fault = memory_fault(disk_fault(run.watch.named(found), run.directory), LESS_MEMORY)
            if new and run.state.step == 0 and isinstance(fault, UserError):  # exit status 2 leaves nothing behind
                if run.main:
                    forget_plan(run)
            elif isinstance(fault, RankLost):
                run.watch.leave_reason(str(fault))
            else:
                note(status="stopped" if isinstance(fault, (Stopped, KeyboardInterrupt)) else "failed",
                     exit_status=exit_status(fault), reason=str(fault) or type(fault).__name__)
                if isinstance(fault, Stopped):  # as all do: when the first one ends, a launcher ends the others
                    run.watch.meet()
                    run.accelerator.wait_for_everyone()
            raise fault from None
        note(status="early_stopped" if run.state.stopped_early else "finished", exit_status=0, reason="",
             state=asdict(run.state))


def train(run: Run, chat: Chat, material: Material, stop: StopFlag) -> None:
    """Do the steps of the plan from where the run is; evaluate, save and log when due."""
    from common.overfit import divergence
    from common.progress import log_progress
    from common.report_train import read_lines
    from common.run import held_out, save_state
    from common.trackers import started_trackers
    from common.train import Batches, count_step, evaluate_loss, judge, train_step

    config, state, plan = run.config, run.state, material.plan
    rows, overfit = held_out(run, material), None
    batches = Batches(run.accelerator, run.loss_model.flat, material, config)
    with log_progress(run, plan.n_steps) as progress, started_trackers(run) as trackers:
        while state.step < plan.n_steps and not state.stopped_early:
            begins = state.step in plan.stage_bounds[1:]
            if begins and config.reset_optimizer_per_stage:
                run.optimizer.state.clear()
            result = train_step(run.accelerator, run.wrapped, run.optimizer, material, config, state.step,
                                batches, run.watch.at)
            line = count_step(state, result, plan, last=state.step + 1 == plan.n_steps, every=config.logging_steps,
                              meter=run.meter)
            progress(state, result, line)
            trackers(line)
            last, better = state.step == plan.n_steps, False
            if rows and (last or state.step % config.eval_steps == 0):
                found = evaluate_loss(run.accelerator, run.loss_model, material.val_datasets, rows, material.pad_id,
                                      config.per_device_eval_batch_size, run.watch.at)
                better = judge(state, found["eval_loss"], config)
                progress(state, None, {"step": state.step, **found})
                trackers({"step": state.step, **found})
                if run.main and not overfit and (overfit := divergence(read_lines(run.directory / "metrics.jsonl"))):
                    run.say(f"note: {overfit}")
            asked = stop.asked(run.accelerator)
            if last or better or asked or state.stopped_early or state.step % config.save_steps == 0:
                save_state(run, chat)
            if asked and not (last or state.stopped_early):
                raise Stopped(f"{asked} at step {state.step:,} of {plan.n_steps:,}; checkpoint-{state.step} is saved. "
                              f"Go on with: {resume_command(run)}")


def not_done(config: SftConfig) -> list[str]:
    """What is asked of a finished run that another script does."""
    place, lines = Path(config.output_dir), []
    if config.merge_adapters and not (place / "merged").is_dir():
        lines.append(f"--merge_adapters: python scripts/04_merge_lora.py --model_path {place} merges it")
    if config.do_gen_test and not (place / "samples.jsonl").is_file():
        lines.append(f"--do_gen_test: python scripts/06_eval_sft.py --model_path {place} --gen_only answers")
    return lines


def resume_command(run: Run) -> str:
    """The command that continues this run."""
    from common.ranks import launcher_words, typed_launch
    from common.sharded import is_sharded
    from common.zero import is_zero

    # the newest checkpoint, also if this start went back to a named one
    words = [word for before, word in zip(["", *run.argv], run.argv)
             if not word.startswith(("--overwrite_output_dir", "--resume_from_checkpoint"))
             and (word.startswith("--") or before != "--resume_from_checkpoint")] + ["--resume_from_checkpoint"]
    if typed := typed_launch(launcher_words(), sys.argv[0]):
        # accelerate's launcher sets these itself
        given = [f"{name}={value}" for name, value in sorted(os.environ.items())
                 if typed[0] == "torchrun" and name.startswith(("ACCELERATE_", "FSDP_"))]
        return shlex.join([*given, *typed, sys.argv[0], *words])
    precision = run.accelerator.mixed_precision
    n = run.accelerator.num_processes
    file = "deepspeed_zero3" if is_zero() else "fsdp2" if is_sharded(run.accelerator) else None
    how = ["--config_file", f"config/accelerate/{file}.yaml"] if file else ["--multi_gpu"]
    several = [*how, "--num_processes", str(n)] if n > 1 else []
    launcher = ["accelerate", "launch", *several, "--mixed_precision", precision] if launched() else ["python"]
    return shlex.join([*launcher, sys.argv[0], *words])


def check_files(config: SftConfig) -> None:
    """Every file that is named exists, here or on the Hub; all that are missing here are named at once."""
    from common.sources import check_prepared

    named = [*config.all_dataset_paths(), *config.val_dataset_paths]
    check_prepared(named)
    if folders := [path for path in named if Path(path).is_dir()]:
        raise UserError(f"{folders[0]}: is a directory. Name the files in it.")
    missing = [path for path in named if not Path(path).is_file() and not is_hub_name(path)]
    if missing:
        there = "does not exist" if len(missing) == 1 else "do not exist"
        raise UserError(f"{', '.join(missing)}: {there}. Make data sets with scripts/prepare_sft_datasets.py, or check "
                        "the path.")
    check_outputs(config, [path for path in (*named, config.source, config.tokenizer_path) if path])
    if needed(config) and int(os.environ.get("WORLD_SIZE", "1")) == 1:  # several ask once they have met (fetch_all)
        config.commits = resolve(config)
    if config.push_to_hub and not config.dry_run and not config.verify_resume:
        config.push_to_hub = check_push(config.push_to_hub, config.output_dir)


def check_outputs(config: SftConfig, inputs: list[str]) -> None:
    """What is to be written can be, and is nothing that is read."""
    place = Path(config.output_dir)
    if config.export_rendered:
        check_no_input(Path(config.export_rendered), "--export_rendered", inputs)
    if config.dry_run or config.explain_step:
        return
    check_writable(place, "--output_dir")
    for name in ("val.jsonl", "test.jsonl", "samples.jsonl", "metrics.jsonl"):
        check_no_input(place / name, "--output_dir", inputs)
    if not (config.overwrite_output_dir and holds_run(place)):
        return
    if Path(config.source).is_dir():
        from common.model import find_model

        inputs = [*inputs, find_model(config.source).base]  # of an adapter
    held = [path for path in inputs if Path(path).exists() and place.resolve() in (Path(path).resolve(),
                                                                                  *Path(path).resolve().parents)]
    if held:
        raise UserError(f"--overwrite_output_dir: it would move {held[0]}, which this run reads, aside. Choose another "
                        "--output_dir.")


def check_new_tokens(config: SftConfig, chat: Chat, source: str) -> None:
    """Training that goes on with an adapter trains its rows of tokens and no others."""
    from common.model import find_model

    if config.use_lora and chat.added_tokens and find_model(source).adapter:
        raise UserError(f"--init_from {source}: training goes on with its adapter, beside which rows of the new tokens "
                        f"{' '.join(chat.added_tokens)} would not be trained. Give the --prompt_template it was "
                        "trained with, or merge it with scripts/04_merge_lora.py and start from the merged model.")


def describe_size(config: SftConfig, base: object, chat: Chat, source: str) -> tuple[str, int | None]:
    """A line about the parameters that are trained, and those of the base, where they can be known before the weights
    are there. Raises UserError for an adapter that does not fit the model."""
    from common.adapters import planned_parameters
    from common.model import find_model
    from common.run import continued_adapter
    from common.zero import is_zero

    adapter = find_model(source).adapter
    if adapter and config.use_lora:
        return continued_adapter(config, adapter)[0], None
    if is_zero():  # there transformers cuts every model that is made
        return f"model {config.source}: DeepSpeed makes it, so its parameters are counted when it is there", None
    try:
        total, trained = planned_parameters(config, base, chat)
    except UserError:
        raise
    except Exception as fault:  # not every model can be made without weights
        return (f"model {config.source}: its parameters are not known before its weights are there "
                f"({type(fault).__name__})"), None
    return (f"model {config.source}: {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained "
            f"({'LoRA' if config.use_lora else 'full'})"), total - trained * config.use_lora


def check_length(config: SftConfig, base: object) -> None:
    """The model must be able to see a whole row."""
    from common.model import rope_limit

    context = getattr(base.get_text_config(), "max_position_embeddings", None)
    if context and config.max_seq_length > context:
        raise UserError(f"max_seq_length {config.max_seq_length:,}: the model sees {context:,} tokens. "
                        f"Set --max_seq_length {context} or less.")
    limit = rope_limit(base)
    if limit and config.max_seq_length > limit:
        raise UserError(f"max_seq_length {config.max_seq_length:,}: beyond {limit:,} tokens this model turns positions "
                        "at other speeds, for all examples of a pass, so that short ones beside long ones would be "
                        f"learnt otherwise than they are met. Set --max_seq_length {limit} or less.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(run_main(main))
