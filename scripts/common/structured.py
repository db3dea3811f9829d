"""Strict reading of JSON and YAML files: duplicate keys, other encodings and broken syntax are one sentence each."""
from __future__ import annotations

import json
from typing import Any

from common.faults import UserError


def read_structured(path: str) -> Any:
    """A JSON or YAML file (by extension) as python has it; duplicate keys are refused. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as fault:
        raise UserError(f"{path}: it cannot be read ({fault.strerror}). Name a JSON or YAML file.") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: byte {fault.start} is not UTF-8. Save the file as UTF-8.") from None
    try:
        if path.endswith((".yaml", ".yml")):
            return _read_yaml(path, text)
        if path.endswith(".json"):
            return _read_json(path, text)
    except RecursionError:
        raise UserError(f"{path}: it is nested too deeply. Make it flatter.") from None
    raise UserError(f"{path}: the extension says neither JSON nor YAML. Name it .json, .yaml or .yml.")


def _read_json(path: str, text: str) -> Any:
    twice = []

    def pairs(items: list[tuple[str, Any]]) -> dict:
        keys = [key for key, _ in items]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(items)

    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}:{fault.lineno}: this is not JSON ({fault.msg}, column {fault.colno}). JSON has no "
                        "comments and no comma before a closing bracket.") from None
    except ValueError:  # more digits than int() reads
        raise UserError(f"{path}: a number has thousands of digits. Shorten it.") from None
    if twice:
        raise UserError("\n".join(f"{path}: {key}: the key stands twice. Keep one." for key in twice))
    return data


def _read_yaml(path: str, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that refuses a repeated key."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise UserError(f"{path}:{key.start_mark.line + 1}: {key.value}: the key stands twice. Keep one.")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 (a subclass of SafeLoader: no python objects)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: this is not YAML ({getattr(fault, 'problem', None) or fault}).") from None
    except ValueError as fault:  # a date that does not exist, a number of thousands of digits
        raise UserError(f"{path}: a value cannot be read ({fault}). Put it in quotes.") from None
