"""Calls of tools in a message, in every form that data sets have them in."""
from __future__ import annotations

from collections.abc import Iterator

from common.records import Bad, kind_of, parse


def tool_calls(found: object, place: str) -> list[dict]:
    """A call or a list of them, each {"type": "function", "function": {"name": …, "arguments": …}} or what is in it, as
    such a list; raise Bad. Arguments that are the JSON text of an object, as OpenAI's API has them, become the object:
    templates write them as JSON. None, and calls of which every part is null (OpenAI's function_call where there is
    none) are no calls."""
    if isinstance(found, str):
        found = parse(found.strip()) if found.strip() else None
    found = [found] if isinstance(found, dict) else found or []
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise Bad(f"the tool calls of {place} are {kind_of(found)}. They have to be a list of objects.")
    return [_call(call, place) for call in found if any(_parts(call))]


def _parts(call: dict) -> Iterator[object]:
    """The values in a call and in its function."""
    for value in call.values():
        yield from value.values() if isinstance(value, dict) else (value,)


def _call(call: dict, place: str) -> dict:
    call = call if "function" in call else {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Bad(f'{place} has a tool call without a name. A call is {{"name": …, "arguments": …}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        try:
            arguments = parse(arguments.strip())
        except Bad:  # not JSON: what a model wrote
            return call
        return {**call, "function": {**function, "arguments": arguments}}
    return call
