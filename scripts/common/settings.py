"""The one table of 03_sft.py's settings: name, default, unit, meaning, and what may change when a run is resumed.

Flags, config files, checks, --help and the README's table are made from it (config.py). `settle` fills in what depends
on others; what excludes what is in contradictions.py.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from common.config import HUB_NAME, is_hub_name, level, place, setting

TEMPLATES = ("chatml", "instruct", "chat", "raw", "model")
LORA_RATE, FULL_RATE = 2e-4, 2e-5  # adapters start at zero and stand ten times the rate


@dataclass
class StageData:
    """One data set of a stage."""

    path: str = setting("", "A file of rows.", path="hub", required=True)
    weight: float | None = setting(None, "Share of the stage's draws, relative to the others.", within="[0, inf)")
    n_samples: int | None = setting(None, "Take this many examples of it, drawn by the seed.", within="[1, inf)")


@dataclass
class StageSettings:
    """One stage: a mixture of data sets, trained for some epochs or until an optimizer step."""

    name: str = setting("", "Every stage needs a name.", required=True)
    epochs: float | None = setting(None, "Passes over the stage's mixture.", within="(0, inf)")
    until_step: int | None = setting(None, "Optimizer step of the run at which the stage ends.", within="[1, inf)")
    datasets: list[StageData] = setting([], "Every stage needs data sets.", required=True)


@dataclass
class SftConfig:
    """Settings of supervised fine-tuning; `parse(SftConfig, argv, description)` makes one."""

    # names other tools use -> ours, for the hint beside an unknown name alone
    commits: ClassVar[dict[str, str]] = {}  # of what is named on the Hub; an instance's own after hub.resolve
    places: ClassVar[dict[tuple[str, str], str]] = {}  # where it was fetched to, (kind, name) -> path; hub.fetch
    other_names: ClassVar[dict[str, str]] = {
        "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "lora_rank": "lora_r",
        "r": "lora_r", "model_name_or_path": "model_path", "base_model": "model_path", "max_length": "max_seq_length",
        "model": "model_path", "sequence_len": "max_seq_length", "cutoff_len": "max_seq_length",
        "micro_batch_size": "per_device_train_batch_size", "batch_size": "per_device_train_batch_size",
        "chat_template": "prompt_template", "template": "prompt_template", "lora_target": "lora_target_modules",
        "dataset": "dataset_paths", "datasets": "dataset_paths", "dataset_name": "dataset_paths",
        "val_size": "val_split_ratio", "val_set_size": "val_split_ratio", "sample_packing": "packing",
        "optimizer": "optim", "lr_scheduler": "lr_scheduler_type", "flash_attn": "attn_implementation",
        "additional_target_modules": "modules_to_save", "mask_prompt": "train_on_prompt", "sampling": "dataset_weights",
        "completion_only_loss": "train_on_prompt", "assistant_only_loss": "train_on_prompt",
        "mask_history": "assistant_turns", "roles_to_train": "assistant_turns", "use_peft": "use_lora",
        "finetuning_type": "use_lora", "adapter": "use_lora", "quantization_bit": "load_in_4bit",
        "additional_target": "modules_to_save", "lora_modules_to_save": "modules_to_save",
        "lora_target_linear": "lora_target_modules", "flash_attention": "attn_implementation",
        "sdp_attention": "attn_implementation", "chat_template_path": "prompt_template", "neat_packing": "packing",
        "fraction": "dataset_weights", "train_on_eos": "assistant_turns",
        "train_on_inputs": "train_on_prompt", "no_use_lora": "no_lora", "interleave_probs": "dataset_weights",
        "padding_free": "packing",
        "load_best_model_at_end": "early_stopping_patience", "gradient_clipping": "max_grad_norm",
        "run_name": "report_to"}
    elsewhere: ClassVar[dict[str, str]] = {  # names that belong to another program -> what to say instead
        name: f"The launcher sets it: accelerate launch {words} scripts/03_sft.py …" for name, words in (
            ("bf16", "--mixed_precision bf16"), ("fp16", "--mixed_precision fp16"), ("deepspeed", "--use_deepspeed"),
            ("mixed_precision", "--mixed_precision bf16"), ("torch_dtype", "--mixed_precision bf16"),
            ("dtype", "--mixed_precision bf16"), ("fsdp", "--use_fsdp"))} | {
        name: "The loss is computed in chunks anyway; leave it out." for name in (
            "use_liger_kernel", "use_liger", "enable_liger_kernel", "cut_cross_entropy")}

    config_path: str | None = setting(
        None, "JSON or YAML file with any of these settings, or a run.json; paths in it are relative to it.",
        path=True, action=True, group="Model")
    model_path: str = setting("", "Base model: a directory in Hugging Face form, or a Hub id.", path="hub",
                              required=True)
    tokenizer_path: str | None = setting(
        None, "SentencePiece .model, tokenizer directory or Hub id. Without it: the model's own.", path="hub")
    revision: str | None = setting(None, "Branch, tag or commit of a model from the Hub. The commit it means is kept: "
                                   "a resumed run goes on with it.")
    init_from: str | None = setting(
        None, "Start from another run's adapter or weights, with a fresh optimizer and schedule. It brings its base: "
        "model_path is not needed then.", path="hub")
    attn_implementation: str = setting(
        "auto", "Attention. auto takes the fastest that keeps packed examples apart, and says which.",
        choices=("auto", "packed", "sdpa", "eager", "flash_attention_2"))
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, about a third more time.", resume="free")
    compile: bool = setting(False, "Compile the layers with torch.compile; needs a C++ compiler.")

    dataset_paths: list[str] = setting(
        [], "Files of rows: .jsonl or .json (also .gz), .csv, .parquet. Or data sets of the Hub: owner/name, "
        "owner/name@revision, with :split or :file behind it if there are several.", path="hub", group="Data")
    dataset_weights: list[float] | str | None = setting(
        None, "Share of each data set in the examples drawn, relative. recommended: the data set files' weights for a "
        "model of this size. Without it: every row once an epoch.", words=("recommended",), within="[0, inf)")
    weight_unit: str = setting("examples", "What the weights are shares of.",
                               choices=("examples", "tokens", "trained_tokens"))
    stages: list[StageSettings] | None = setting(
        None, "Mixtures trained one after the other: a list of {name, epochs or until_step, "
        "datasets: [{path, weight, n_samples}]}. Instead of dataset_paths.", file_only=True)
    role_map: list[str] = setting([], "Names of roles in conversations that are not understood by themselves, "
                                  "as NAME=ROLE with ROLE one of system, user, assistant, tool.")
    skip_bad_rows: bool = setting(False, "Go on without bad rows and say how many, instead of stopping.")
    cache_dir: str = setting("data/cache", "Tokenised data, reused while file, tokenizer and template are the same.",
                             path=True, resume="free")
    seed: int = setting(42, "Decides split, order, dropout and new rows of the embeddings.", within="[0, 4294967295]")

    prompt_template: str = setting(
        "chatml", "How rows become text. model: the tokenizer's own chat template; FILE.jinja with {% generation %} "
        "blocks; FILE.yaml with role_mapping and jinja2_chat_template.", words=TEMPLATES,
        suffixes=(".jinja", ".yaml", ".yml"), path="hub", group="Examples")
    system_prompt: str | None = setting(None, "System turn for rows that have none.")
    train_on_prompt: bool = setting(False, "Train every token of an example, not the assistant's alone.")
    assistant_turns: str = setting("all", "Which assistant turns of a conversation are trained.",
                                   choices=("all", "last"))
    max_seq_length: int = setting(1024, "Length of a row; also the longest example.", unit="tokens", within="[8, inf)")
    too_long: str = setting(
        "split", "Examples over max_seq_length: split (messages at turns, text into windows; a turn that cannot be "
        "split is dropped and counted), cut (no end token then) or drop.", choices=("split", "cut", "drop"))
    packing: bool = setting(True, "Put several examples into a row; they never see each other.")
    pad_to_multiple_of: int | None = setting(None, "Without packing: pad rows to a multiple of this.", unit="tokens",
                                             within="[1, inf)")

    val_split_ratio: float = setting(
        0.02, "Share of the conversations held out for validation, by hash of the first prompt. 0: no validation.",
        within="[0, 1)", group="Validation")
    test_split_ratio: float = setting(0.0, "Share held out and left alone; saved as test.jsonl.", within="[0, 1)")
    val_from: list[str] = setting([], "Draw the validation rows from these data sets only (file names without "
                                  "extension).")
    val_dataset_paths: list[str] = setting([], "Files of validation rows; nothing is split off for it then.",
                                           path="hub")
    max_eval_samples: int | None = setting(None, "Evaluate at most this many validation examples while training; "
                                           "val.jsonl has all.", unit="examples", within="[1, inf)")
    per_device_eval_batch_size: int = setting(8, "Rows of a forward pass in evaluation.", unit="rows",
                                              within="[1, inf)", resume="free")
    eval_steps: int = setting(100, "Evaluate every so many steps, and at the end. After a better loss a checkpoint is "
                              "saved.", unit="steps", within="[1, inf)")
    early_stopping_patience: int | None = setting(
        None, "Stop after this many evaluations without a better loss. Against overfitting: training ends where "
        "validation does.", unit="evaluations", within="[1, inf)")
    early_stopping_threshold: float = setting(0.0, "A loss is better if it is lower by more than this.", unit="nats",
                                              within="[0, inf)")

    use_lora: bool = setting(True, "Train low-rank adapters; without: all weights.", flag_off="no_lora", group="LoRA")
    lora_r: int = setting(16, "Rank of the adapters.", within="[1, inf)")
    lora_alpha: float = setting(32.0, "Scale of the adapters: alpha / r (alpha / sqrt(r) with use_rslora).",
                                within="(0, inf)")
    lora_dropout: float = setting(0.05, "Share of the adapters' inputs set to zero in training.", within="[0, 1)")
    lora_target_modules: list[str] = setting(["all-linear"], "Modules that get an adapter: all-linear, or names.")
    modules_to_save: list[str] = setting([], "Modules trained whole beside the adapters, e.g. lm_head.")
    use_rslora: bool = setting(False, "Scale by the square root of the rank; for large ranks.")
    use_dora: bool = setting(False, "Train the weights' magnitudes apart from their directions (DoRA).")
    load_in_4bit: bool = setting(False, "QLoRA: hold the base in 4 bits; needs bitsandbytes.")
    merge_adapters: bool = setting(False, "Leave a stand-alone model in OUTPUT_DIR/merged at the end.", resume="free")
    merge_dtype: str | None = setting(None, "Precision of the merged model. Without it: the base's.",
                                      choices=("float32", "bfloat16", "float16"), resume="free")

    num_train_epochs: float = setting(
        3.0, "Passes over the data; an epoch has as many examples as the data sets together. Against overfitting: "
        "fewer.", unit="epochs", within="(0, inf)", group="Training")
    max_steps: int = setting(-1, "Optimizer steps of the whole run, instead of num_train_epochs. -1: not set.",
                             unit="steps", within="[-1, inf)")
    per_device_train_batch_size: int = setting(
        4, "Rows of a forward pass. Times gradient_accumulation_steps times processes: rows of a step. Against "
        "overfitting: more rows a step are steadier.", unit="rows", within="[1, inf)")
    gradient_accumulation_steps: int = setting(4, "Forward passes of an optimizer step. Against overfitting: more are "
                                               "steadier, as per_device_train_batch_size.", within="[1, inf)")
    learning_rate: float | None = setting(
        None, f"Highest learning rate. Without it: {LORA_RATE:g} with LoRA, {FULL_RATE:g} for all weights. Against "
        "overfitting: lower is slower and steadier.", within="(0, inf)")
    lr_scheduler_type: str = setting(
        "cosine", "Course of the learning rate. Against overfitting: cosine and linear end softly, constant ones do "
        "not.", choices=("cosine", "linear", "constant", "constant_with_warmup"))
    min_lr_ratio: float = setting(0.0, "Where cosine and linear end, as a share of learning_rate.", within="[0, 1]")
    warmup_ratio: float = setting(0.03, "Share of the steps in which the learning rate rises from 0.", within="[0, 1)")
    warmup_steps: int = setting(0, "Steps in which it rises, instead of warmup_ratio. Against overfitting: more make "
                                "the start gentler.", unit="steps", within="[0, inf)")
    weight_decay: float = setting(0.0, "Pull of the weights towards zero. Against overfitting: 0.1 to 0.5.",
                                  within="[0, inf)")
    max_grad_norm: float = setting(1.0, "Longer gradients are scaled down to this norm. 0: never.", within="[0, inf)")
    optim: str = setting("adamw", "Optimizer.", choices=("adamw", "adafactor", "sgd"))
    adam_beta1: float = setting(0.9, "AdamW: memory of the gradient's mean.", within="[0, 1)")
    adam_beta2: float = setting(0.999, "AdamW: memory of its square.", within="[0, 1)")
    adam_epsilon: float = setting(1e-8, "AdamW: added to the denominator.", within="(0, inf)")
    neftune_noise_alpha: float = setting(0.0, "Noise on the embeddings in training (NEFTune; 5 is usual). 0: none.",
                                         within="[0, inf)")
    reset_optimizer_per_stage: bool = setting(False, "Start each stage with a fresh optimizer state.")

    output_dir: str = setting("checkpoints/sft/run", "Where the run is kept; one run a directory.", path=True,
                              resume="free", group="Run")
    push_to_hub: str | None = setting(
        None, "Push the finished model (the merged one with merge_adapters) to this repository; a new one is private. "
        "Without a value: one of yours, called like output_dir. A finished run is pushed by the same command with "
        "resume_from_checkpoint.",
        words=("auto",), bare="auto", resume="free")
    overwrite_output_dir: bool = setting(False, "Move a run that is there aside and start anew.", action=True)
    resume_from_checkpoint: str | None = setting(
        None, "Without a value: go on from the newest complete checkpoint, or start if there is none. With one: from "
        "that checkpoint; newer ones are moved aside.", path=True, words=("auto",), bare="auto", action=True)
    save_steps: int = setting(100, "Save a checkpoint every so many steps, and at the end.", unit="steps",
                              within="[1, inf)", resume="free")
    save_total_limit: int = setting(3, "Checkpoints kept beside the best one.", unit="checkpoints", within="[1, inf)",
                                    resume="free")
    max_minutes: float | None = setting(None, "Stop after this time with a checkpoint (exit status 75).",
                                        unit="minutes", within="(0, inf)", resume="free")
    rank_timeout_minutes: float = setting(30.0, "With several processes: end the job (exit status 70) when none has "
                                          "come further for this time.", unit="minutes", within="(0, inf)",
                                          resume="free")
    logging_steps: int = setting(10, "Write a line of metrics every so many steps.", unit="steps", within="[1, inf)",
                                 resume="free")
    report_to: list[str] = setting(["tensorboard"], "Where metrics go beside metrics.jsonl.",
                                   choices=("tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "none"),
                                   resume="free")
    do_gen_test: bool = setting(False, "Answer some validation prompts at the end; samples.jsonl.", resume="free")
    num_gen_samples: int = setting(5, "Prompts of do_gen_test.", within="[1, inf)", resume="free")
    max_new_tokens: int = setting(128, "Longest answer of do_gen_test.", unit="tokens", within="[1, inf)",
                                  resume="free")
    dry_run: bool = setting(False, "Print the arithmetic and one example with its trained tokens marked, then stop.",
                            action=True)
    export_rendered: str | None = setting(None, "Write every row as it is rendered, with the places of its trained "
                                          "parts, to this .jsonl file.", path=True, action=True)
    explain_step: int | None = setting(None, "Print file and line of every row of this optimizer step, then stop.",
                                       unit="step", within="[1, inf)", action=True)
    verify_resume: bool = setting(False, "Prove on this machine and data that a resumed run equals an uninterrupted "
                                  "one (exit status 1 if not).", action=True)

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = LORA_RATE if self.use_lora else FULL_RATE
        name = "init_from" if self.init_from else "model_path"
        if is_hub_name(getattr(self, name)) and not self.revision:
            found = HUB_NAME.fullmatch(getattr(self, name))
            if not found["part"]:  # which is refused later
                setattr(self, name, found["repo"])
                self.revision = found["revision"]
        self.model_path = self.model_path or self.init_from or ""

    def settle(self) -> list[str]:
        """A weaker value that excludes a stronger one gives way; a line for each value of a file that did."""
        notes: list[str] = []

        def give_way(name: str, to: str, value: object) -> None:
            if getattr(self, name) != value and level(self, name) < level(self, to):
                if level(self, name):
                    notes.append(f"{place(self, name)} gives way to {place(self, to)}")
                setattr(self, name, value)

        give_way("init_from", "model_path", None)
        if self.init_from and self.model_path != self.init_from:
            notes.append(f"{place(self, 'model_path')} is not used: {place(self, 'init_from')} brings its model")
        give_way("max_steps", "num_train_epochs", -1)
        give_way("overwrite_output_dir", "resume_from_checkpoint", False)
        give_way("resume_from_checkpoint", "overwrite_output_dir", None)
        if level(self, "warmup_steps") != level(self, "warmup_ratio"):
            give_way("warmup_ratio", "warmup_steps", 0.0)
            give_way("warmup_steps", "warmup_ratio", 0)
        if self.lr_scheduler_type == "constant":
            give_way("warmup_ratio", "lr_scheduler_type", 0.0)
            give_way("warmup_steps", "lr_scheduler_type", 0)
        if not self.use_lora:
            for name, value in (("merge_adapters", False), ("merge_dtype", None), ("load_in_4bit", False)):
                give_way(name, "use_lora", value)
        if self.val_dataset_paths:
            give_way("val_split_ratio", "val_dataset_paths", 0.0)
        if not self.validates():
            give_way("early_stopping_patience", "val_split_ratio", None)
        return notes

    def validates(self) -> bool:
        """Whether the run has validation rows."""
        return self.val_split_ratio > 0 or bool(self.val_dataset_paths)

    def at(self, name: str, kind: str = "model") -> str:
        """Where a model, tokenizer or data set is: a path itself, or where a name of the Hub was fetched to."""
        return self.places.get((kind, name), name)

    @property
    def source(self) -> str:
        """The model that training starts from, as it is named."""
        return self.init_from or self.model_path

    def all_dataset_paths(self) -> list[str]:
        """Training files in order of first use, those of stages included, each once."""
        staged = [data.path for stage in self.stages or [] for data in stage.datasets]
        return list(dict.fromkeys([*self.dataset_paths, *staged]))

    def roles(self) -> dict[str, str]:
        """`role_map` as a dict, name in the file -> role."""
        return dict(entry.split("=", 1) for entry in self.role_map)

    def problems(self) -> list[str]:
        """Contradictions between settings, a sentence each."""
        from common.contradictions import contradictions

        return contradictions(self)


def dataset_name(path: str) -> str:
    """The name of a data set: its file name without extension; 'data/sft/alpaca.jsonl.gz' -> 'alpaca',
    'owner/name@v1:data/test.jsonl' -> 'name-test'."""
    if re.search("[:@]", path) and (found := HUB_NAME.fullmatch(path)):
        return "-".join([os.path.basename(found["repo"]), *([dataset_name(found["part"])] if found["part"] else [])])
    return re.sub(r"\.(jsonl|json|csv|parquet)(\.gz)?$", "", os.path.basename(path.rstrip("/")))
