"""The README: its table of settings, its file tree, its weights and its first screen are those of the project.

    python tests/test_readme.py      # writes the table of settings into README.md
"""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))

from common.config import parse, settings_of  # noqa: E402
from common.faults import UserError  # noqa: E402
from common.helptext import settings_table  # noqa: E402
from common.settings import SftConfig  # noqa: E402

README = ROOT / "README.md"


def text() -> str:
    return README.read_text(encoding="utf-8")


def between(name: str) -> str:
    """What stands between <!-- name: begin --> and <!-- name: end -->."""
    return text().split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]


def update() -> None:
    """Write the table of settings into the README."""
    README.write_text(text().replace(f"<!-- settings: begin -->\n{between('settings')}",
                                     f"<!-- settings: begin -->\n{settings_table(SftConfig)}"), encoding="utf-8")


def test_settings_table():
    """Guards against a table that lags behind the code. Mend it with: python tests/test_readme.py"""
    assert between("settings") == settings_table(SftConfig)


def test_first_screen():
    """Guards against a README whose reader has to look for how to start."""
    lines = text().splitlines()
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert any(line.startswith(command) for line in lines[:24]), command
        assert (ROOT / command.split()[1]).is_file()


def tracked() -> list[str]:
    """Files of the project, by git where it is a clone."""
    if shutil.which("git") and (ROOT / ".git").exists():
        return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [str(path.relative_to(ROOT)) for pattern in ("scripts/*", "scripts/common/*.py", "config/*")
            for path in ROOT.glob(pattern) if path.is_file()]


def test_file_tree():
    """Guards against scripts that are gone, and against new ones that nobody explained."""
    listed = [line.split()[0] for line in between("files").splitlines() if line and not line.startswith("```")]
    assert len(listed) == len(set(listed)) > 40
    assert all(len(line.split(maxsplit=1)) == 2 for line in between("files").splitlines()[1:-1])
    assert [name for name in listed if not (ROOT / name).exists()] == []
    folders = tuple(name for name in listed if name.endswith("/"))
    assert [name for name in tracked() if name.startswith(("scripts/", "config/"))
            and name not in listed and not name.startswith(folders)] == []


def test_named_paths_exist():
    """Guards against a config or script in the text that is gone."""
    names = set(re.findall(r"(?:scripts|config|tests)/[\w./]*\w\.(?:py|sh|jsonl?|yaml|jinja)", text()))
    assert len(names) > 40
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_recommended_weights():
    """Guards against a table of weights that --dataset_weights recommended does not use."""
    rows = re.findall(r"^\| (Tiny|Small|Base) \(\S+\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text(), re.M)
    assert len(rows) == 3
    specs = [json.loads((ROOT / "config" / "sft_datasets" / f"{name}.json").read_text())["recommended_weights"]
             for name in ("dolly15k", "oasst1", "alpaca")]
    for size, *weights in rows:
        assert [float(weight) for weight in weights] == [spec[size.lower()] for spec in specs]


def test_names_elsewhere_are_ours_on_the_left():
    """Guards against a table for people from other tools that leads to settings we do not have."""
    block = text().split("## Names elsewhere")[1].split("## ")[0]
    ours = [name for row in block.splitlines() if row.startswith("| `")
            for name in re.findall(r"`(?:--)?(\w+)(?: \w+)?`", row.split("|")[1])]
    assert len(ours) > 15
    assert [name for name in ours if name not in settings_of(SftConfig) and name != "no_lora"] == []


@pytest.mark.parametrize("theirs, hint", [("model_name_or_path", "model_path"), ("cutoff_len", "max_seq_length"),
                                          ("micro_batch_size", "per_device_train_batch_size"),
                                          ("lora_rank", "lora_r"), ("sample_packing", "packing")])
def test_their_names_are_refused_with_ours(theirs, hint):
    """Guards against a flag of another tool that is refused without help."""
    with pytest.raises(UserError, match=f"--{hint}"):
        parse(SftConfig, ["--model_path", "m", "--dataset_paths", "a.jsonl", f"--{theirs}", "1"], "")


if __name__ == "__main__":
    update()
