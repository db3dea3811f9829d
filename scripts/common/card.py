"""What a run says of itself to others: README.md as a model card for the Hub, and a Modelfile for Ollama.

Both are written from what lies in the run's directory: run.json, plan.json, metrics.jsonl, samples.jsonl.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import is_hub_name
from common.overfit import divergence
from common.report_train import near, read_json, read_lines, share

if TYPE_CHECKING:
    from common.chat import Chat
    from common.checkpoint import TrainState

# licences that the Hub knows by these names; another one is told in words
HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
                "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odc-by")
SAMPLES, LONGEST = 3, 1000  # answers in a card, and characters of each text
SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps",
            "max_seq_length", "packing", "optim", "weight_decay", "max_grad_norm", "neftune_noise_alpha", "seed")
LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora",
                 "load_in_4bit")
# Go templates of Ollama for the templates that come with the project: every turn, then the beginning of the answer
TURNS = ('{{- range .Messages }}{{ if eq .Role "assistant" }}%s{{ .Content }}EOS\n\n{{ else if eq .Role "user" }}%s'
         '{{ .Content }}\n\n{{ else if eq .Role "tool" }}%s{{ .Content }}\n\n{{ else }}{{ .Content }}\n\n'
         "{{ end }}{{ end }}%s")
OLLAMA = {
    "chatml": "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
              "<|im_start|>assistant\n",
    "instruct": TURNS % ("### Response:\n", "### Instruction:\n", "### Tool:\n", "### Response:\n"),
    "chat": TURNS % ("Assistant: ", "Human: ", "Tool: ", "Assistant:"),
    "raw": '{{- range .Messages }}{{ .Content }}{{ if eq .Role "assistant" }}EOS{{ end }}\n{{ end }}',
}


def model_card(place: Path, state: TrainState, chat: Chat, merged: dict | None = None) -> str:
    """README.md of the run in `place`: metadata that the Hub accepts, then what a user of the model has to know.

    merged: what merge_and_save found, if there is a merged model beside.
    """
    run, plan = read_json(place / "run.json"), read_json(place / "plan.json")
    metrics, samples = (read_lines(place / f"{name}.jsonl") for name in ("metrics", "samples"))
    config, base = run["config"], run["config"]["init_from"] or run["config"]["model_path"]
    data = {source["name"]: manifest(plan["data"][source["name"]]["file"]) for source in plan["sources"]}
    losses = next((m for m in metrics if "eval_loss" in m and m["step"] == state.best_step), {})
    name = place.absolute().name
    licence = base_licence(base, config.get("revision"))
    parts = [f"---\n{metadata(name, config, base, licence, data, losses)}---\n# {name}",
             _summary(config, base, chat, state), _data(plan, data, licence), _losses(losses, metrics),
             _settings(run, plan), _samples(samples), _loading(config, place, chat.loads_with, merged),
             _elsewhere(config, chat, name), _limits(config, plan, data, losses, place)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


# ---- licences and metadata

def manifest(file: str) -> dict:
    """What the manifest beside a prepared file says: licence, source, revision; empty where there is none."""
    path = Path(file)
    stem = re.sub(r"\.(jsonl|json|csv|parquet)(\.gz)?$", "", path.name)
    return read_json(path.with_name(f"{stem}.manifest.json"))


def base_licence(base: str, revision: str | None = None) -> str | None:
    """The licence that the base's own card names, on disk or in the Hub's cache; None where it cannot be known here."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card = None
    if Path(base).is_dir():
        card = Path(base, "README.md")
    elif is_hub_name(base):
        card = try_to_load_from_cache(base, "README.md", revision=revision)
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    try:
        return ModelCard.load(str(card), ignore_metadata_errors=True).data.license
    except (ValueError, OSError):  # no metadata: a card is free text
        return None


def hub_licence(licence: str | None) -> str | None:
    """'CC BY-SA 3.0' -> 'cc-by-sa-3.0'; None for what the Hub has no name for."""
    name = (licence or "").lower().replace(" ", "-")
    return name if name in HUB_LICENCES else None


def metadata(name: str, config: dict, base: str, licence: str | None, data: dict[str, dict], losses: dict) -> str:
    """The card's YAML. One licence is named where base and data agree on it; else "other", and the text tells."""
    from huggingface_hub import EvalResult, ModelCardData

    licences = {hub_licence(licence), *(hub_licence(entry.get("licence")) for entry in data.values())}
    one = licences.pop() if len(licences) == 1 else None
    told = {"license": one} if one else {"license": "other", "license_name": "of-the-base-and-the-data",
                                         "license_link": "README.md"}
    sources = [entry["source"] for entry in data.values() if is_hub_name(str(entry.get("source")))]
    results = [EvalResult(task_type="text-generation", dataset_type=key.partition("/")[2], metric_type="loss",
                          dataset_name=key.partition("/")[2], metric_value=round(value, 6),
                          metric_name="validation loss, nats a token")
               for key, value in losses.items() if key.startswith("eval_loss/")]
    known = {"base_model": base, "base_model_relation": "adapter" if config["use_lora"] else "finetune"} \
        if is_hub_name(base) else {}
    return ModelCardData(
        **told, **known, library_name="peft" if config["use_lora"] else "transformers",
        pipeline_tag="text-generation", tags=["sft", *(["lora"] if config["use_lora"] else [])],
        datasets=sources or None, model_name=name, eval_results=results or None).to_yaml() + "\n"


# ---- the text

def _summary(config: dict, base: str, chat: Chat, state: TrainState) -> str:
    how = "LoRA" if config["use_lora"] else "all weights"
    return (f"Supervised fine-tuning of `{near(base)}` ({how}), template `{chat.template_name}`. {state.step:,} steps, "
            f"{state.tokens:,} tokens ({state.trained_tokens:,} trained), {state.seconds / 60:.1f} minutes.")


def _data(plan: dict, data: dict[str, dict], licence: str | None) -> str:
    """Shares, sources and licences."""
    cell = lambda value: str(value or "not stated").replace("|", "\\|").replace("\n", " ")
    lines = [f"| {cell(s['name'])} | {cell(data[s['name']].get('source'))} | {cell(data[s['name']].get('licence'))} | "
             f"{s['examples']:,} | {s['draws']:,} | {share(s['share_asked'])} | {share(s['share_examples'])} | "
             f"{s['drawn_trained_tokens']:,} |" for s in plan["sources"]]
    notes = [f"{name}: {note}." for name, entry in data.items() if (note := (entry.get("config") or {}).get("note"))]
    return "\n".join([
        "## Data", "", "| data set | source | licence | examples | drawn | share asked | share of examples | trained "
        "tokens |", "|---|---|---|---:|---:|---:|---:|---:|", *lines, "",
        f"Licence of the base: {licence or 'not stated'}. What is made of base and data is bound by the "
        f"licences of both. {' '.join(notes)}"])


def _losses(losses: dict, metrics: list[dict]) -> str:
    """The validation loss of the weights that are kept, and whether the run overfitted."""
    if not losses:
        return "## Losses\n\nNo validation loss was measured."
    rows = [f"| {key.partition('/')[2]} | {value:.4f} |" for key, value in losses.items()
            if key.startswith("eval_loss/")]
    lines = ["## Losses", "", f"Best validation loss {losses['eval_loss']:.4f} nats a token, at step "
             f"{losses['step']:,}: these weights are kept."]
    if len(rows) > 1:
        lines += ["", "| data set | validation loss |", "|---|---:|", *rows]
    note = divergence(metrics)
    return "\n".join([*lines, *(["", f"Note: {note}."] if note else [])])


def _settings(run: dict, plan: dict) -> str:
    config, versions = run["config"], run.get("versions", {})
    names = [*SETTINGS, *(LORA_SETTINGS if config["use_lora"] else ())]
    if config.get("stages") or config.get("max_steps", -1) >= 0:  # they say how long it trained
        names.remove("num_train_epochs")
    shown = lambda value: ", ".join(map(str, value)) if isinstance(value, list) else value
    rows = [f"| {name} | {shown(config[name])} |" for name in names if config.get(name) not in (None, 0, False, -1)]
    rows += [f"| stage {stage['name']} | " + (f"{stage['epochs']:g} epochs" if stage.get("epochs") is not None else
                                              f"until step {stage['until_step']:,}") + " |"
             for stage in config.get("stages") or ()]
    return "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *rows,
                      f"| rows of a step | {plan['rows_per_step']:,} |",
                      f"| precision | {run.get('mixed_precision')} |", "",
                      "All settings, fingerprints and the command: `run.json`; what was drawn: `plan.json`; held-out "
                      "rows: `val.jsonl`; curves: `report.html`. "
                      + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."])


def merged_sentence(difference: float) -> str:
    """What the card says of merged/; difference: the largest one of a logit."""
    return f"`merged/` is the stand-alone model; its logits differ from the adapter's by at most {difference:.1e}."


def with_merged(card: str, difference: float) -> str:
    """The card of a run whose merged/ was made anew."""
    return re.sub(re.escape(merged_sentence(0.0)).replace(re.escape("0.0e+00"), r"\S+"), merged_sentence(difference),
                  card)


def fenced(text: str) -> str:
    """Text in a fence that it cannot close itself."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}text\n{text}\n{fence}"


def _samples(samples: list[dict]) -> str:
    if not samples:
        return ""
    pairs = [f"Asked:\n\n{fenced(line['prompt'] or '')}\n\nAnswered{'' if line.get('stopped') else ' (cut)'}:\n\n"
             f"{fenced(line['prediction'] or '')}" for line in samples[:SAMPLES]]
    return "## Answers\n\n" + "\n\n".join(pairs)


def _loading(config: dict, place: Path, tokenizer: str, merged: dict | None) -> str:
    """How to use it in Python and in the terminal."""
    library, cls, more, stops = "transformers", "AutoModelForCausalLM", "", ""
    if config["use_lora"]:  # PEFT takes the base's generation_config, which may not know where the template ends
        library, cls, more = "peft", "AutoPeftModelForCausalLM", ", GenerationConfig"
        stops = "\nmodel.generation_config = GenerationConfig.from_pretrained(place)"
    beside = [] if merged is None else [merged_sentence(merged["saved"])]
    if (place / "base" / "config.json").exists():
        beside.append("`base/` is the base with embeddings for the added tokens. `adapter_config.json` names its place "
                      "(`base_model_name_or_path`): mend it there when the directory moves, or merge.")
    return f"""## Use

```python
from {library} import {cls}
from transformers import {tokenizer}{more}

place = "{place.name}"  # this directory
model = {cls}.from_pretrained(place){stops}
tokenizer = {tokenizer}.from_pretrained(place)
turns = [{{"role": "user", "content": "Hello"}}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
```

In the terminal, in the project it was trained with: `python scripts/06_eval_sft.py --chat --model_path {near(place)}`.
{' '.join(beside)}"""


def _elsewhere(config: dict, chat: Chat, name: str) -> str:
    """Servers, llama.cpp and Ollama."""
    run = near(config["output_dir"])
    whole = f"{run}/merged" if config["use_lora"] else run
    merge = f"python scripts/04_merge_lora.py --model_path {run} --output_dir {whole}\n" if config["use_lora"] else ""
    how = "" if chat.template_name in OLLAMA else (
        " It has no `TEMPLATE`, because Ollama cannot read this chat template: write one in its language.")
    return f"""## Elsewhere

```bash
{merge}transformers serve {whole}   # speaks OpenAI's language; needs pip install "transformers[serving]"
python llama.cpp/convert_hf_to_gguf.py {whole} --outfile {run}/model.gguf --outtype bf16
ollama create {re.sub('[^a-z0-9_.-]+', '-', name.lower())} -f {run}/Modelfile
```

The `Modelfile` stops where the template ends an answer.{how}"""


def _limits(config: dict, plan: dict, data: dict[str, dict], losses: dict, place: Path) -> str:
    said = [f"- It was trained on rows of at most {plan['max_seq_length']:,} tokens; nobody has seen how it answers "
            "longer prompts.",
            "- It repeats what its base and its rows say, errors and prejudices included. Nothing was done to make it "
            "safe, and no fact was checked."]
    if not losses:
        said.append("- No row was held out, so nothing is known of how it answers what it was not trained on.")
    if unstated := [name for name, entry in data.items() if not entry.get("licence")]:
        said.append(f"- The licence of {', '.join(unstated)} is not stated: find out before you share the model.")
    if any("NC" in (entry.get("licence") or "") for entry in data.values()):
        said.append("- Not for commercial use, as the licence of its data says.")
    if config["system_prompt"]:
        said.append("- It was trained with a system prompt (`run.json`): give it the same one.")
    return "## Limits\n\n" + "\n".join(said)


# ---- Ollama

def modelfile(chat: Chat, system_prompt: str | None = None) -> str:
    """An Ollama Modelfile for model.gguf beside it: the template of the training, and where an answer stops."""
    stops = [chat.tokenizer.convert_ids_to_tokens(i) for i in chat.stop_ids]
    lines = ["FROM ./model.gguf"]
    if chat.template_name in OLLAMA:
        template = OLLAMA[chat.template_name].replace("EOS", chat.tokenizer.eos_token)
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    if system_prompt and '"""' not in system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    return "\n".join(lines) + "\n"


# ---- as it is pushed

def hub_card(card: str, directory: str, repo: str, merged: bool) -> str:
    """A run's README.md as it has to read in the repository: its name instead of places on this machine, and without
    what is not pushed (held-out rows among the answers, files of the run). merged: the merged model is pushed."""
    card = re.sub(r"^## Answers\n.*(?=^## Use\n)", "", card, flags=re.M | re.S)  # greedy: rows may hold headings
    card = re.sub(r"^## Elsewhere\n.*(?=^## Limits\n)", "", card, flags=re.M | re.S)
    card = re.sub(r"^All settings, .*?`report\.html`\. ", "", card, flags=re.M)
    card = re.sub(r"^In the terminal, .*?(?=^## |\Z)", "In the terminal: `python scripts/06_eval_sft.py --chat "
                  f"--model_path {repo}`.\n\n", card, flags=re.M | re.S)
    card = re.sub(r"(?<=^Supervised fine-tuning of )`([^`]+)`",
                  lambda base: base[0] if is_hub_name(base[1]) else "a model of its author's own", card, flags=re.M)
    card = card.replace(f'place = "{directory}"  # this directory', f'place = "{repo}"')
    if merged:
        for old, new in (("library_name: peft", "library_name: transformers"), ("from peft import", "from transformers "
                         "import"), ("base_model_relation: adapter", "base_model_relation: finetune"),
                         ("AutoPeftModelForCausalLM", "AutoModelForCausalLM")):
            card = card.replace(old, new)
    return card
