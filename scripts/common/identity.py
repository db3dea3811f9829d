"""What a run is: the settings, fingerprints and time that a later start has to find unchanged."""
from __future__ import annotations

import hashlib
import platform
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from common.chat import Chat
from common.config import differences, to_dict
from common.material import Material
from common.model import find_model
from common.render import today
from common.rundir import Opened, earlier_run, fingerprint_differences, read_run, refuse_changes
from common.settings import SftConfig

if TYPE_CHECKING:
    from common.run import Run


def rows_per_step(run: Run) -> int:
    """Rows of the global batch. A resumed run keeps the one it was started with, whatever the number of processes."""
    config = run.config
    if earlier := earlier_run(config):
        return earlier["rows_per_step"]
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * run.accelerator.num_processes


def first_start(run: Run) -> datetime:
    """When the run was started first."""
    if earlier := earlier_run(run.config):
        return datetime.strptime(earlier["started"], "%Y-%m-%dT%H:%M:%S%z")
    return datetime.now()


def fingerprints(material: Material, chat: Chat, config: SftConfig) -> dict[str, str]:
    """What a resumed run must find unchanged, beside the settings."""
    found = {"plan": material.plan.fingerprint(), "tokenizer and template": chat.fingerprint()}
    found.update({f"data {d.name}": d.meta["key"]["file"] for d in material.datasets})
    for d in material.val_datasets:  # a file of the same name elsewhere is another file
        name, file = f"data {d.name}", d.meta["key"]["file"]
        found[name if found.get(name) in (None, file) else f"{name} (validation)"] = file
    places = {"model": config.at(config.model_path), "init_from": config.at(config.init_from or "")}
    found.update({name: weights_fingerprint(path) for name, path in places.items() if path and Path(path).is_dir()})
    return found


def weights_fingerprint(path: str, samples: int = 64, size: int = 1 << 16) -> str:
    """sha256 over a local model's configuration, sizes and `samples` blocks of each weights file, evenly spaced: other
    weights of the same shape differ everywhere, and a hundred GB are looked at in a second."""
    place, digest = find_model(path), hashlib.sha256()
    for directory in filter(None, (place.base, place.adapter)):
        for file in sorted(f for name in ("config.json", "adapter_config.json", "*.safetensors")
                           for f in Path(directory).glob(name)):
            length = file.stat().st_size
            digest.update(f"{file.name} {length}\n".encode())
            with open(file, "rb") as stream:
                for start in sorted({i * max(0, length - size) // (samples - 1) for i in range(samples)}):
                    stream.seek(start)
                    digest.update(stream.read(size))
    return digest.hexdigest()


def describe_run(run: Run, material: Material, chat: Chat) -> dict:
    """What run.json holds."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "peft", "accelerate", "sentencepiece", "numpy")
    return {"config": to_dict(run.config), "hub": run.config.commits,
            "rows_per_step": material.plan.rows_per_step,
            "processes": run.accelerator.num_processes, "mixed_precision": run.accelerator.mixed_precision,
            "fingerprints": fingerprints(material, chat, run.config),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
            "command": ["03_sft.py", *run.argv],
            "started": today().astimezone().strftime("%Y-%m-%dT%H:%M:%S%z")}  # what templates were told


def check_unchanged(run: Run, new: dict, opened: Opened) -> None:
    """Refuse to go on with a run whose settings, data, tokenizer, model or precision changed (UserError with a table),
    be it one that ended before its first checkpoint."""
    old = None if run.config.overwrite_output_dir else read_run(run.directory)
    if old is None:
        return
    launcher = [("mixed_precision", old["mixed_precision"], new["mixed_precision"])]
    refuse_changes(run.directory, differences(old["config"], new["config"], SftConfig),
                   [entry for entry in launcher if entry[1] != entry[2]],
                   fingerprint_differences(old["fingerprints"], new["fingerprints"]), begun=opened.kind != "fresh")
