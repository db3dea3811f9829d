"""A chat in the terminal: what the model says appears as it is written. Works on a pipe, too."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.attention import causal_lm_of
from common.faults import UserError
from common.generate import Generated, context_limit, generate
from common.model import stop_ids_of

if TYPE_CHECKING:
    from torch import nn

    from common.chat import Chat
    from common.evaluate import Options

COMMANDS = "/reset begins anew · /system TEXT sets the system turn and begins anew · /quit leaves"


def converse(model: nn.Module, chat: Chat, options: Options, ask: Callable[[str], str] = input) -> None:
    """Read lines by ask(prompt), answer them and print the answers, until /quit, Ctrl-C or the end of the input.

    Ctrl-C while the model writes ends the answer alone.
    """
    system: list[dict] = []
    turns: list[dict] = []
    print(COMMANDS)
    for n in range(1 << 62):  # the seed of a turn
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            if command == "/system":
                system = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            turns = []
            print("(anew" + (f", system: {system[0]['content']}" if system else "") + ")", flush=True)
        elif line.startswith("/"):
            print(f"{command} is no command. {COMMANDS}", flush=True)
        elif line:
            asked = [*turns, {"role": "user", "content": line}]
            said = reply(model, chat, [*system, *asked], options, n)
            if said is not None:
                turns = [*asked, {"role": "assistant", "content": said}]


def reply(model: nn.Module, chat: Chat, messages: list[dict], options: Options, n: int) -> str | None:
    """Print the answer to a conversation as it is written, and return it; None if there is none, which is said."""
    try:
        prompt = chat.prompt_ids(messages)
    except UserError as fault:
        print(f"error: {fault}", flush=True)
        return None
    limit = context_limit(causal_lm_of(model))
    if limit is not None and len(prompt) >= limit:
        print(f"(the context is full: {len(prompt):,} of {limit:,} tokens. /reset begins anew)", flush=True)
        return None
    heard: list[int] = []
    shown = ""

    def hear(_: int, token: int) -> None:
        nonlocal shown
        heard.append(token)
        text = chat.decode(heard)
        if not text.endswith("\ufffd") and text.startswith(shown):  # half of a character waits for its other half
            print(text[len(shown):], end="", flush=True)
            shown = text

    try:
        one = generate(model, [prompt], max_new_tokens=options.max_new_tokens, stop_ids=stop_ids_of(model, chat),
                       pad_id=chat.pad_id, vocab_size=len(chat.tokenizer), temperature=options.temperature,
                       top_p=options.top_p, seed=options.seed, places=[n], heard=hear)[0]
    except KeyboardInterrupt:
        one = Generated(heard)
        print(" … (stopped by you)", end="")
    else:
        text = chat.decode(heard)
        print(text[len(shown):] if text.startswith(shown) else f"\n{text}", end="")
        if one.cut:
            print(f" … (the context of {limit:,} tokens is full: /reset begins anew)", end="")
        elif not one.stopped:
            print(f" … (--max_new_tokens {options.max_new_tokens} reached)", end="")
    print(flush=True)
    return chat.said(one.ids)
