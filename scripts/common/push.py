"""A finished model -> a repository of the Hub, where it loads for others."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from common.config import HUB_NAME, is_hub_name
from common.faults import UserError
from common.hub import LOG_IN, Ref, ask_hub, refusal, unreachable
from common.settings import SftConfig


def check_alone(config: SftConfig, grows: bool) -> None:
    """What is to be pushed has to load elsewhere. grows: the embeddings grow: the adapter has a base of its own."""
    if not config.push_to_hub or not config.use_lora or config.merge_adapters or _merged(config):
        return
    file = Path(config.at(config.source), "adapter_config.json")
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else config.source
    if grows or not is_hub_name(base):
        reason = "the base gets new tokens" if grows else f"{base} is a directory here"
        raise UserError(f"--push_to_hub: nobody else could load the adapter alone, because {reason}. Add "
                        "--merge_adapters: the merged model is pushed.")


def _merged(config: SftConfig) -> bool:
    return Path(config.output_dir, "merged").is_dir()


def check_push(repo: str, directory: str) -> str:
    """The full name of the repository to push to; UserError, before any time is spent, if that cannot be done.

    repo: owner/name, a name of one's own, or auto: the name of the directory.
    """
    from huggingface_hub import HfApi, constants, get_token

    ref = Ref("model", repo)
    if reason := unreachable():
        raise UserError(f"--push_to_hub: {reason}. Connect, or leave it out now: once the run is finished, the same "
                        "command with it and --resume_from_checkpoint pushes and does nothing else.")
    if get_token() is None:
        raise UserError(f"--push_to_hub: no token is set. Make one that may write at {constants.ENDPOINT}"
                        f"/settings/tokens and {LOG_IN}.")
    who = ask_hub(ref, lambda: HfApi().whoami())
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub: the token of {who['name']} may only read. Make one that may write at "
                        f"{constants.ENDPOINT}/settings/tokens and {LOG_IN}.")
    name = Path(directory).absolute().name if repo == "auto" else repo
    full = name if "/" in name else f"{who['name']}/{name}"
    found = HUB_NAME.fullmatch(full)
    if not found or found["revision"] or found["part"]:
        raise UserError(f"--push_to_hub {full}: that cannot be the name of a repository. Write owner/name, with "
                        "letters, digits, -, _ and . alone.")
    return full


def push(directory: Path, repo: str, card: str, again: str, say: Callable[[str], None], tries: int = 3) -> None:
    """Push the model in `directory` with `card` as its README. A new repository is private.

    What broke off is taken up again, `tries` times in all: what has arrived is not sent twice. If it fails, the model
    stays where it is, and the fault (UserError, or OSError for the network) says that `again` pushes it.
    """
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    kept = f"The model is finished and whole in {directory}. Push it again with: {again}"
    with TemporaryDirectory() as stage:
        for file in directory.iterdir():
            if file.is_file() and any(file.match(pattern) for pattern in PUSHED):
                Path(stage, file.name).symlink_to(file.absolute())
        Path(stage, "README.md").write_text(card, encoding="utf-8")
        for left in reversed(range(tries)):
            try:
                url = HfApi().create_repo(repo, private=True, exist_ok=True)
                HfApi().upload_folder(repo_id=repo, folder_path=stage, commit_message="Fine-tuned model",
                                      delete_patterns=[*PUSHED])  # an adapter of before would go before a whole model
                break
            except Exception as found:
                fault = refusal(found, Ref("model", repo))
                if isinstance(fault, UserError):
                    raise UserError(f"--push_to_hub: {fault} {kept}") from found
                if not left:
                    raise OSError(None, f"{fault} {kept}") from found
                say(f"push: {fault} Trying again")
    say(f"pushed to {url} (a new repository is private: its settings there can open it)")


PUSHED = ("model*.safetensors", "adapter_model*.safetensors", "model.safetensors.index.json", "adapter_config.json",
          "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "vocab.*", "merges.txt", "chat_template.*")  # no rows, no samples, no paths of this machine
