"""What a script may write: only where it can, and never over what it reads or what somebody else keeps there."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.faults import UserError


def check_writable(place: Path, setting: str) -> None:
    """UserError where `place`, a directory that may not be there yet, cannot be written: before the work, not after."""
    if place.is_symlink() and not place.exists():
        raise UserError(f"{setting} {place}: a link to {os.readlink(place)}, which does not exist. Mend or remove it.")
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{setting} {place}: {there} is a file, not a directory. Choose another.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as fault:
        raise UserError(f"{setting} {place}: {there} cannot be written to ({fault.strerror}). Choose another."
                        ) from None


def check_no_input(place: Path, setting: str, inputs: Iterable[str | Path]) -> None:
    """UserError where the file `place`, which is to be written, is one of those that are read."""
    if any(Path(path).exists() and place.exists() and os.path.samefile(place, path) for path in inputs):
        raise UserError(f"{setting}: {place} would be written over, and it is read here. Choose another place.")


def check_replaceable(place: Path, reads: Path | None = None) -> None:
    """UserError where --overwrite_output_dir would remove more than a model in Hugging Face form, or what is read."""
    there = list(place.iterdir()) if place.is_dir() else [place]
    names = {path.name for path in there}
    model = "config.json" in names and not any(path.is_dir() for path in there)
    holds_it = reads is not None and place.resolve() in (reads.resolve(), *reads.resolve().parents)
    if holds_it or names & {"run.json", "adapter_config.json"} or (there and not model):
        raise UserError(f"{place}: it holds something else than a model, and --overwrite_output_dir would remove that. "
                        "Name another --output_dir.")
