"""What a run leaves in its output directory: plan and held-out rows before the first step, the model and its card after
the last. All of it loads with plain `transformers` and `peft`."""
from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from common.attention import set_ordinary_attention
from common.card import hub_card, model_card, modelfile
from common.chat import Chat
from common.checkpoint import atomic_json, atomic_write, flush, verify
from common.faults import UserError
from common.loss import LossModel
from common.material import Material
from common.model import find_model, load_model, merge_and_save, sample_prompts, saved_dtype, use_cores
from common.push import push
from common.rows import RowReader
from common.run import Run, read_weights, write_model
from common.rundir import read_run
from common.sharded import is_sharded, whole_model
from common.sides import held_out_rows
from common.zero import is_zero


def leave_plan(run: Run, described: dict, material: Material) -> None:
    """run.json, plan.json, val.jsonl and test.jsonl, before the first step. Main process only."""
    begun = read_run(run.directory) or {}
    # free settings may have changed
    atomic_json(run.directory / "run.json", {**described, **begun, "config": described["config"]})
    atomic_json(run.directory / "plan.json", {**material.plan.summary(), "notes": material.split.notes,
                                              "data": {d.name: d.meta for d in material.datasets},
                                              "validation_data": {d.name: d.meta for d in material.brought}})
    options = {"skip_bad_rows": run.config.skip_bad_rows, "role_map": material.datasets[0].meta["key"]["role_map"]}
    for name, datasets, sides in (("val", material.val_datasets, material.held_out),
                                  ("test", material.datasets, material.split.test)):
        if any(map(len, sides)):
            write_jsonl(run.directory / f"{name}.jsonl", held_out_rows(datasets, sides, **options))


def forget_plan(run: Run) -> None:
    """Remove what was written before the first step, so that the mended command starts anew. run.json goes last: what
    is left by a kill half-way is known as a run."""
    for name in ("base", "tensorboard"):
        shutil.rmtree(run.directory / name, ignore_errors=True)
    for name in ("plan.json", "val.jsonl", "test.jsonl", "run_status.json", "run.json"):
        (run.directory / name).unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows so that the file is whole or absent; a file of any size, row by row."""
    work = path.with_name(f".{path.name}.{os.getpid()}-0.tmp")  # as atomic_write's, for `tidy`
    try:
        with open(work, "w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def export_rendered(path: str, material: Material, chat: Chat) -> str:
    """Write every row, before it is split or cut, as {"place", "id", "chat", "trained"}; return a line about it.

    trained: pairs of character offsets in chat; what lies between them is learnt.
    """
    counts = 0

    def lines() -> Iterator[dict]:
        nonlocal counts
        for d in [*material.datasets, *material.brought]:
            kept, key = np.unique(d.lines), d.meta["key"]
            for row in RowReader(d.path, skip_bad_rows=key["skip_bad_rows"], role_map=key["role_map"]):
                place = np.searchsorted(kept, row.line)
                if place < len(kept) and kept[place] == row.line:
                    text, spans = chat.rendered(row)
                    label = {} if row.id is None else {"id": row.id}
                    counts += 1
                    yield {"place": f"{d.path}:{row.line}", **label, "chat": text, "trained": spans}

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(Path(path), lines())
    return f"{path}: {counts:,} rendered rows with their trained parts"


def leave_model(run: Run, chat: Chat, material: Material) -> None:
    """The best model (by validation loss; without validation the last) at the top, and what was asked for beside it."""
    state, config = run.state, run.config
    run.watch.close()  # from here on the main process works alone, for as long as it takes
    best = run.directory / f"checkpoint-{state.best_step or state.step}"
    sharded = is_sharded(run.accelerator) or is_zero()
    earlier = state.best_step not in (None, state.step)
    if earlier and (problems := verify(best)):
        raise OSError(errno.EIO, f"damaged ({'; '.join(problems[:3])}). Start again with --resume_from_checkpoint: "
                      "it goes back to the newest checkpoint from which this one can be made again", str(best))
    run.accelerator.wait_for_everyone()
    if not run.main:
        return
    use_cores(1, beside_gpu=True)  # the others are done, and what follows is done on the CPU
    if sharded:
        run.loss_model, run.wrapped, run.optimizer = whole_model(run), None, None
    if sharded or earlier:
        read_weights(run, best)
    if earlier:
        run.say(f"best validation loss {state.best_loss:.4f} at step {state.best_step:,}: these weights are kept")
    write_model(run, chat, run.directory, run.export_dtype)
    what = "adapter" if config.use_lora else f"model ({str(run.export_dtype)[6:]})"
    run.say(f"{what}, tokenizer and chat template: {run.directory}")
    if config.use_lora and not base_stops(run.directory, chat):
        run.say("note: plain peft takes the base's generation_config, which does not know where this template ends an "
                f"answer. The code in {run.directory / 'README.md'} sets it; a merged model has it")
    if run.rounded and (config.do_gen_test or config.merge_adapters):  # they take the base as it is on the disk
        _forget_model(run)
    if config.do_gen_test:
        if run.rounded:
            # a GPU that could train it in 16 bits may not hold it in 32
            dtype = torch.float32 if run.accelerator.device.type == "cpu" else "auto"
            model = load_model(str(run.directory), dtype=dtype).to(run.accelerator.device)
            run.loss_model = LossModel(model, "sdpa")
        show_answers(run, chat)
    merged = None
    if config.merge_adapters:
        samples = sample_prompts([e for row in material.plan.step_rows(0) for e in material.examples(row)])
        # what was trained in 4 or 16 bits is merged into the base's own weights, not into what is left of them
        if config.load_in_4bit or run.rounded:
            _forget_model(run)
            model = load_model(str(run.directory))
        else:
            model = run.loss_model.model
        dtype = saved_dtype(model.config, config.merge_dtype) if config.merge_dtype else run.export_dtype
        merged = merge_and_save(model, chat, run.directory / "merged", dtype, samples)
        run.say(f"merged model: {run.directory / 'merged'}; largest logit difference to the adapter "
                f"{merged['fp32']:.1e} in fp32, {merged['saved']:.1e} as saved ({merged['dtype']}), of logits up to "
                f"{merged['largest']:.0f}")
    atomic_write(run.directory / "README.md", model_card(run.directory, state, chat, merged))
    atomic_write(run.directory / "Modelfile", modelfile(chat, config.system_prompt))
    report(run, chat, material)
    flush(run.directory, [path for path in run.directory.iterdir() if path.is_file()])  # before it is called finished


def base_stops(directory: Path, chat: Chat) -> bool:
    """Whether the base of the adapter in a directory stops, by its own files, where the template ends an answer."""
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(find_model(str(directory)).base).eos_token_id
    except OSError:  # it has none
        named = None
    return chat.end_id in ([named] if isinstance(named, int) else named or [])


def _forget_model(run: Run) -> None:
    """Free the memory that training needed."""
    run.loss_model, run.wrapped, run.optimizer = None, None, None
    run.accelerator.free_memory()
    gc.collect()  # accelerate collects before it lets go of the model, whose wrapped forward refers to it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def push_model(run: Run, again: str) -> None:
    """Push what the finished run left: the merged model if there is one, else what lies at the top."""
    run.watch.close()  # an upload may take any time, and the others are done
    merged = run.directory / "merged"
    card = (run.directory / "README.md").read_text(encoding="utf-8")
    if run.config.merge_adapters and not merged.is_dir():
        raise UserError(f"--push_to_hub: {merged} does not exist, and a finished run merges nothing. Merge and push "
                        f"with scripts/04_merge_lora.py --model_path {run.directory} --push_to_hub "
                        f"{run.config.push_to_hub}.")
    card = hub_card(card, run.directory.absolute().name, run.config.push_to_hub, merged.is_dir())
    push(merged if merged.is_dir() else run.directory, run.config.push_to_hub, card, again, run.say)


def report(run: Run, chat: Chat, material: Material) -> None:
    """Write report.html from what the run left."""
    from common.report_train import first_examples, training_report

    lengths = {source.name: source.lengths for source in material.plan.sources}
    training_report(run.directory, lengths, first_examples(material, chat))
    run.say(f"report: {run.directory / 'report.html'}")


def show_answers(run: Run, chat: Chat) -> None:
    """Answer some validation prompts (or built-in ones), go on with plain texts, print it and write samples.jsonl."""
    from common.evaluate import Options, answer, few, make_case, with_calls
    from common.questions import EvalSet, built_in

    config, path = run.config, run.directory / "val.jsonl"
    rows = (make_case(row, row.source) for row in (RowReader(path, mixed=True) if path.exists() else ()))
    cases = few((case for case in rows if case.asks(continued=True)), config.num_gen_samples, config.seed)
    cases = with_calls([EvalSet("validation", str(path), cases)], chat)[0].cases
    cases = cases or built_in().cases[:config.num_gen_samples]
    model = run.loss_model.causal_lm.eval()
    if model.device.type != run.accelerator.device.type:
        run.say("answers: on the CPU, where the model is whole")
    set_ordinary_attention(model)
    answers, texts = answer(model, chat, cases, Options(max_new_tokens=config.max_new_tokens), continued=True)
    lines = []
    for case, one, text in zip(cases, answers, texts):
        lines.append({"prompt": case.prompt, "reference": case.reference, "prediction": text, "stopped": one.stopped,
                      "source": case.source})
        run.say(f"> {case.prompt}", f"{text}{'' if one.stopped else ' … (cut)'}", "")
    write_jsonl(run.directory / "samples.jsonl", lines)
