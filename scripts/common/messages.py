"""Messages of any published form -> checked messages: role, text, calls of tools, and whether they are trained."""
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from common.calls import tool_calls
from common.faults import UserError
from common.records import Bad, kind_of, parse

THOUGHT = ("reasoning_content", "thinking", "reasoning")  # one thing, in the order in which transformers asks for it
READ_OF_MESSAGE = {"role", "content", "from", "value", "train", "training", "loss", "weight", "tool_calls",
                   "function_call", "name", "tool_call_id", "speaker", *THOUGHT}
ROLES = ("system", "user", "assistant", "tool")
ROLE_MAP = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
            "bing": "assistant", "bard": "assistant", "developer": "system", "function": "tool", "observation": "tool",
            "function_call": "assistant"}
NOTHING = (None, "", [], {})  # values that say nothing


class MessageReader:
    """Reads messages {role, content} or {from, value}, with any of the keys in READ_OF_MESSAGE.

    role_map: further role names -> role, or (role, what the template calls the speaker). unread: is told the keys of a
    message that hold something and are not read.
    A message that was read is {"role": system|user|assistant|tool, "content": str}, assistant ones also "train": bool,
    and where given tool_calls, name, tool_call_id, speaker (the template's name for the role), and reasoning_content,
    by any of the names in THOUGHT.
    Raises UserError for a role map that names no role.
    """

    def __init__(self, role_map: dict[str, str | tuple] | None = None,
                 unread: Callable[[list[str]], object] = lambda _: None):
        given = {name: role if isinstance(role, str) else role[0] for name, role in (role_map or {}).items()}
        for name, role in given.items():
            if role not in ROLES:
                raise UserError(f'role map: "{name}" is mapped to "{role}", which is no role. '
                                f'Roles: {", ".join(ROLES)}.')
        self.roles = {r: r for r in ROLES} | ROLE_MAP | given
        self.speakers = {name: role[1] for name, role in (role_map or {}).items() if not isinstance(role, str)}
        self._unread = unread

    def read_all(self, values: list, name: str) -> list[dict]:
        """The messages of a list that findings call `name`. Raises Bad."""
        if not values:
            raise Bad(f'"{name}" is an empty list. Rows need at least one user and one assistant message.')
        return [self.read(value, _place(i, name)) for i, value in enumerate(values, 1)]

    def read(self, value: object, place: str) -> dict:
        """One message. Raises Bad."""
        if not isinstance(value, dict):
            raise Bad(f"{place} is {kind_of(value)}. A message is {{role, content}}.")
        role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
        role, content = value.get(role_key), value.get(content_key)
        if role is None:
            raise Bad(f'{place} has no "{role_key}" (keys: {", ".join(value)}). A message is {{role, content}}.')
        known = self.roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise Bad(f'{place} has the unknown role {role!r} (known: {", ".join(self.roles)}). Rename it, or map it '
                      "to one of them in role_map.")
        message = {"role": known, "content": self._content(content, content_key, value, place)}
        if known == "assistant":
            message["train"] = True
        if role == "function_call":
            message |= {"content": "", "tool_calls": tool_calls(message["content"], place)}
            if not message["tool_calls"]:
                raise Bad(f'{place} is no function call. It has to be {{"name": …, "arguments": …}} or a list of them.')
        if role in self.speakers:
            message["speaker"] = self.speakers[role]
        if len(value) > 2 or content is None:
            self._add_extras(message, value, place)
        return message

    def _content(self, content: object, key: str, message: dict, place: str) -> str:
        if isinstance(content, str):
            if "\0" in content:
                raise Bad(f"a NUL byte in {place}. Remove it; the file may be damaged.")
            return content
        if content is None:
            if message.get("tool_calls") or message.get("function_call"):
                return ""
            finding = "is null" if key in message else f"is missing (keys: {', '.join(message)})"
            raise Bad(f'"{key}" of {place} {finding}. Give it a text, or tool_calls.')
        if not isinstance(content, list):
            raise Bad(f'"{key}" of {place} is {kind_of(content)}. It has to be a text or a list of text parts.')
        for part in content:
            what = part.get("type") or "text" if isinstance(part, dict) else None
            if what != "text" or not isinstance(part.get("text"), str):
                raise Bad(f'"{key}" of {place} has a part that is no text ({what or kind_of(part)}). '
                          'Only parts {"type": "text", "text": …} can be used.')
        return self._content("".join(part["text"] for part in content), key, message, place)

    def _add_extras(self, message: dict, value: dict, place: str) -> None:
        train, assistant = value.get("train"), message["role"] == "assistant"
        if train is None and assistant:  # as Axolotl and ms-swift call it
            train = next((value[name] for name in ("training", "loss") if isinstance(value.get(name), bool)), None)
        if value.get("train_detail"):  # Axolotl's
            raise Bad(f'"train_detail" of {place} marks parts of an answer, which is not read. Mark whole answers with '
                      '"train".')
        if train is not None and not isinstance(train, bool):
            raise Bad(f'"train" of {place} is {kind_of(train)} ({train!r}). It has to be true or false.')
        if assistant and value.get("weight") is not None:  # OpenAI's name for it
            train = _of_weight(value["weight"], train, place)
        if assistant:
            message["train"] = train is not False
        elif train:
            raise Bad(f'"train" of {place} is true, but its role is {message["role"]}. Only assistant messages are '
                      "trained.")
        calls = tool_calls(value.get("tool_calls"), place) or tool_calls(value.get("function_call"), place)
        if calls:
            if not assistant:
                raise Bad(f'"tool_calls" in {place}, whose role is {message["role"]}. Only the assistant calls tools.')
            message["tool_calls"] = calls
        for key in ("name", "tool_call_id", "speaker"):
            if isinstance(value.get(key), str):
                message[key] = value[key]
        thoughts = {key: value[key] for key in THOUGHT if value.get(key) not in NOTHING}
        thought = next((found for found in thoughts.values() if isinstance(found, str)), None)
        if thought is not None:
            message["reasoning_content"] = thought
        left = [key for key, found in thoughts.items() if found != thought]
        if not value.keys() <= READ_OF_MESSAGE:
            left += [key for key in value if key not in READ_OF_MESSAGE and value[key] not in NOTHING]
        if left:
            self._unread([f"{key} of messages" for key in left])


def checked_text(value: object, name: str, way_out: str) -> str:
    """A text; raise Bad."""
    if not isinstance(value, str):
        raise Bad(f'"{name}" is {kind_of(value)}. {way_out}')
    if "\0" in value:
        raise Bad(f'a NUL byte in "{name}". Remove it; the file may be damaged.')
    return value


def add_system(messages: list[dict], record: dict, name: str = "system") -> None:
    """Put the system text that stands beside the messages before them; `name` is its key in findings. Raises Bad."""
    if record.get("system") in NOTHING:
        return
    system = checked_text(record["system"], name, "It has to be a text.")
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif messages[0]["content"] != system:
        raise Bad(f'"{name}" and the system message differ. Keep one of them.')


def tools_of(record: dict) -> list | None:
    """The descriptions of tools that stand beside the messages; raise Bad."""
    tools, older = record.get("tools"), record.get("functions")
    if not tools and isinstance(older, list):  # OpenAI's older form
        tools = [{"type": "function", "function": function} for function in older]
    if isinstance(tools, str) and tools:  # parquet and CSV cannot hold free objects: the list comes as JSON text
        tools = parse(tools)
    if not tools and (tools is None or isinstance(tools, (str, list))):
        return None
    if not isinstance(tools, list):
        raise Bad(f'"tools" is {kind_of(tools)}. It has to be a list of tool descriptions.')
    tools = [parse(tool.strip()) if isinstance(tool, str) and tool.strip()[:1] == "{" else tool for tool in tools]
    if others := [tool for tool in tools if not isinstance(tool, dict)]:
        raise Bad(f'"tools" has an entry that is {kind_of(others[0])}. Each has to be an object that describes a tool.')
    return tools


@lru_cache(1000)
def _place(number: int, name: str) -> str:
    return f'message {number} of "{name}"'


def _of_weight(weight: object, train: bool | None, place: str) -> bool:
    """Whether an answer of this weight is trained; raise Bad."""
    if weight not in (0, 1) or train not in (None, weight == 1):
        finding = "0 or 1" if weight not in (0, 1) else 'as "train" says, or away'
        raise Bad(f'"weight" of {place} is {weight!r}. It has to be {finding}.')
    return weight == 1
