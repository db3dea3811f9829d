"""Settings that contradict each other, or would change nothing: a sentence for each."""
from __future__ import annotations

from typing import TYPE_CHECKING

from common.config import HUB_NAME, is_hub_name, level, nearest, place
from common.settings import dataset_name

if TYPE_CHECKING:
    from common.settings import SftConfig


def contradictions(c: SftConfig) -> list[str]:
    """All of them, a sentence each."""
    return [*_model_problems(c), *_data_problems(c), *_stage_problems(c), *_validation_problems(c), *_lora_problems(c),
            *_training_problems(c), *_without_effect(c)]


def _data_problems(c: SftConfig) -> list[str]:
    """Data sets and their weights."""
    found, weights = [], c.dataset_weights
    if not c.dataset_paths and not c.stages:
        found.append("--dataset_paths: it is missing. Name the files to learn from, or stages in a config file.")
    if weights and c.stages:
        found.append(f"{place(c, 'dataset_weights')}: it has no effect: the stages say it. Set it in their list.")
    if c.dataset_paths and c.stages is not None:
        found.append(f"{place(c, 'dataset_paths')}: {place(c, 'stages')} names data sets as well. Keep one of them.")
    if isinstance(weights, list) and c.dataset_paths:
        where = place(c, "dataset_weights")
        if len(weights) != len(c.dataset_paths):
            found.append(f"{where}: {len(weights)} weights for {len(c.dataset_paths)} dataset_paths. Give one each.")
        elif not any(weights):
            found.append(f"{where}: all weights are zero. Give at least one data set a weight above zero.")
    for setting_name, paths in (("dataset_paths", c.dataset_paths), ("val_dataset_paths", c.val_dataset_paths),
                                ("stages", [] if c.dataset_paths else c.all_dataset_paths())):
        names: dict[str, str] = {}
        for path in paths:
            name = dataset_name(path)
            if name in names:
                finding = f"{path} stands twice. Name it once" if names[name] == path else \
                    f"{names[name]} and {path} would both be called {name}. Rename one of the files"
                found.append(f"{place(c, setting_name)}: {finding}.")
            names[name] = path
    roles = ("system", "user", "assistant", "tool")
    found += [f"{place(c, 'role_map')}: {entry!r} is not NAME=ROLE. Write e.g. human=user; roles: {', '.join(roles)}."
              for entry in c.role_map if entry.partition("=")[2] not in roles or entry.startswith("=")]
    return found


def _stage_problems(c: SftConfig) -> list[str]:
    """Each stage has one end, the ends follow each other, weights are given for all of its data sets or for none."""
    if c.stages is None:
        return []
    where, found, reached, names = place(c, "stages"), [], 0, set()
    if not c.stages:
        found.append(f"{where}: the list is empty. Give at least one stage, or use dataset_paths.")
    for i, stage in enumerate(c.stages):
        at = f"{where}[{i}]"
        if stage.name in names:
            found.append(f"{at}.name: {stage.name!r} is the name of an earlier stage. Give each its own.")
        names.add(stage.name)
        if (stage.epochs is None) == (stage.until_step is None):
            found.append(f"{at}: it needs epochs or until_step, one of them, to know where it ends.")
        if stage.until_step is not None and stage.until_step <= reached:
            found.append(f"{at}.until_step: {stage.until_step} is not after step {reached}, where an earlier stage "
                         "ends. Steps count from the start of the run.")
        reached = max(reached, stage.until_step or 0)
        weights = [data.weight for data in stage.datasets]
        if None in weights and any(weight is not None for weight in weights):
            found.append(f"{at}.datasets: some have a weight and some not. Give a weight to all of them or to none.")
        elif weights and None not in weights and not any(weights):
            found.append(f"{at}.datasets: all weights are zero. Give at least one a weight above zero.")
        paths = [data.path for data in stage.datasets]
        found += [f"{at}.datasets: {path} stands twice. Name it once." for path in dict.fromkeys(paths)
                  if paths.count(path) > 1]
    return found


def _validation_problems(c: SftConfig) -> list[str]:
    """Where validation rows come from, and what needs them."""
    found = []
    if c.val_split_ratio + c.test_split_ratio >= 1:
        found.append(f"{place(c, 'val_split_ratio')}: validation {c.val_split_ratio:g} and test_split_ratio "
                     f"{c.test_split_ratio:g} leave nothing to train on. Their sum has to be less than 1.")
    if c.val_dataset_paths and c.val_split_ratio > 0:
        found.append(f"{place(c, 'val_dataset_paths')}: it brings the validation rows, so that val_split_ratio has no "
                     "effect. Leave one of them out.")
    if c.val_dataset_paths and c.val_from:
        found.append(f"{place(c, 'val_from')}: val_dataset_paths brings the validation rows. Leave one of them out.")
    shared = sorted(set(c.val_dataset_paths) & set(c.all_dataset_paths()))
    found += [f"{place(c, 'val_dataset_paths')}: {path} is trained on as well. Leave it out here and let "
              "val_split_ratio hold rows out of it." for path in shared]
    known = [dataset_name(path) for path in c.all_dataset_paths()]
    for name in c.val_from if known else []:
        if name not in known:
            near = nearest(name, known)
            found.append(f"{place(c, 'val_from')}: no data set is called {name!r} (there are: {', '.join(known)})."
                         + (f" Did you mean {near}?" if near else " Names are file names without extension."))
    if not c.validates():
        found += [f"{place(c, name)}: there are no validation rows. Set val_split_ratio above 0, give "
                  f"val_dataset_paths, or leave {name} out."
                  for name in ("early_stopping_patience", "val_from", "max_eval_samples") if getattr(c, name)]
    return found


def _lora_problems(c: SftConfig) -> list[str]:
    """What needs adapters."""
    if c.use_lora:
        return []
    return [f"{place(c, name)}: there are no adapters, as {place(c, 'use_lora')} says. Leave out one of the two."
            for name in ("merge_adapters", "merge_dtype", "load_in_4bit") if getattr(c, name)]


def _model_problems(c: SftConfig) -> list[str]:
    """Where the model comes from."""
    source = c.init_from or c.model_path
    found = HUB_NAME.fullmatch(source) if is_hub_name(source) else None
    if found and (found["part"] or found["revision"]):
        return [f"{place(c, 'init_from' if c.init_from else 'model_path')}: {source} names "
                + ("a part of it; a model is taken whole. Write owner/name." if found["part"] else
                   f"a revision, and {place(c, 'revision')} another. Keep one of them.")]
    return []


def _training_problems(c: SftConfig) -> list[str]:
    """Length, schedule and what is trained."""
    found = []
    if c.max_steps == 0:
        found.append(f"{place(c, 'max_steps')}: 0 steps train nothing. Use --dry_run to see the arithmetic alone.")
    if c.warmup_ratio > 0 and c.warmup_steps > 0:
        found.append(f"{place(c, 'warmup_steps')}: {place(c, 'warmup_ratio')} is set as well. Keep one of them.")
    if c.lr_scheduler_type == "constant" and (c.warmup_ratio > 0 or c.warmup_steps > 0):
        found.append(f"{place(c, 'lr_scheduler_type')}: constant has no warm-up. Write constant_with_warmup, or set "
                     "the warm-up to 0.")
    if "none" in c.report_to and len(c.report_to) > 1:
        found.append(f"{place(c, 'report_to')}: none stands beside others. Keep one.")
    if len(c.lora_target_modules) > 1 and "all-linear" in c.lora_target_modules:
        found.append(f"{place(c, 'lora_target_modules')}: all-linear stands beside names. Keep one.")
    if c.train_on_prompt and c.assistant_turns == "last":
        found.append(f"{place(c, 'train_on_prompt')}: it trains every token, so that assistant_turns has no effect. "
                     "Leave one of them out.")
    alone = [name for name in ("dry_run", "explain_step", "verify_resume") if getattr(c, name)]
    if len(alone) > 1:
        found.append(f"--{' --'.join(alone)}: each of them is a task of its own. Give one.")
    if c.export_rendered and not c.dry_run and alone:
        found.append(f"--export_rendered: it has no effect with --{alone[0]}. Leave one of them out.")
    if c.overwrite_output_dir and c.resume_from_checkpoint:
        found.append(f"{place(c, 'overwrite_output_dir')}: resume_from_checkpoint continues the run that this would "
                     "move aside. Leave one of them out.")
    return found


def _without_effect(c: SftConfig) -> list[str]:
    """Flags on the command line that nothing would read; a config file may carry settings for both modes."""
    adapters = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "modules_to_save", "use_rslora",
                "use_dora")
    falling = c.lr_scheduler_type in ("cosine", "linear")
    groups = (
        (adapters, c.use_lora, "there are no adapters to set. Leave out --no_lora or this"),
        (("revision",), is_hub_name(c.init_from or c.model_path), "the model is a directory here"),
        (("merge_dtype",), c.merge_adapters, "nothing is merged. Add --merge_adapters"),
        (("adam_beta1", "adam_beta2", "adam_epsilon"), c.optim == "adamw", f"optim is {c.optim}. Use --optim adamw"),
        (("min_lr_ratio",), falling, f"{c.lr_scheduler_type} does not fall. Use cosine or linear"),
        (("pad_to_multiple_of",), not c.packing, "packed rows are not padded. Add --no_packing"),
        (("weight_unit",), bool(c.dataset_weights or c.stages), "there are no weights. Add --dataset_weights"),
        (("num_train_epochs",), not c.stages, "the stages say it. Set it in their list"),
        (("num_train_epochs",), bool(c.stages) or c.max_steps < 0, "max_steps says how long. Leave one of them out"),
        (("reset_optimizer_per_stage",), bool(c.stages), "there are no stages. Put them into a config file"),
        (("num_gen_samples", "max_new_tokens"), c.do_gen_test, "nothing is generated. Add --do_gen_test"),
        (("early_stopping_threshold",), bool(c.early_stopping_patience),
         "early stopping is off. Add --early_stopping_patience"),
        (("eval_steps", "per_device_eval_batch_size"), c.validates(),
         "there are no validation rows. Set --val_split_ratio above 0"),
    )
    return [f"{place(c, name)}: it has no effect: {reason}."
            for names, used, reason in groups if not used for name in names if level(c, name) == 2]
