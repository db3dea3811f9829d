"""Models and data sets by their names on the Hub, and the model to it, against a stand-in on loopback."""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT, chat_rows, make_llama, write_rows
from forks import Bench, fork_main, hold_at, make_bench, script, warm, what_is_left
from hub_server import Hub

from common import hub as ours
from common.card import hub_card
from common.faults import UserError
from common.hub import Ref, choose, commit_of, local_model, local_rows, read_ref, snapshot
from common.push import push

ROWS = "".join(json.dumps(row) + "\n" for row in chat_rows(30))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One with a tokenizer whose template adds no tokens, so that an adapter's base is the one named."""
    warm()
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, and this process (and those forked from it) set up to ask it, with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    server = Hub()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
                        "HF_HUB_CACHE": str(tmp_path / "cache"), "DOWNLOAD_CHUNK_SIZE": 1 << 16,
                        "HF_TOKEN_PATH": str(tmp_path / "token")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for module in (file_download, _http):  # the library's pauses before it tries again
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    forget()
    yield server
    forget()
    server.off()


def forget() -> None:
    """What a process knows of the Hub: a new one asks again."""
    for known in (commit_of, snapshot):
        known.cache_clear()
    ours._reachable.clear()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Of a script that is started in a process of its own."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **more}


def start(number: str, *argv: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts" / number, *map(str, argv)], env=env, capture_output=True,
                          text=True, timeout=120)


def filled(hub: Hub, bench: Bench) -> dict[str, str]:
    """Model, tokenizer and rows on the Hub; the id of each one's commit."""
    return {"base": hub.put("model", "ann/base", Path(bench.base)),
            "tok": hub.put("model", "ann/tok", {"spm.model": Path(bench.tokenizer).read_bytes()}),
            "rows": hub.put("dataset", "ann/rows", {"rows.jsonl": bench.rows.read_text(),
                                                    "README.md": "---\nlicense: mit\n---\n"})}


NAMED = ("--model_path", "ann/base", "--tokenizer_path", "ann/tok", "--dataset_paths", "ann/rows@main",
         "--prompt_template", "instruct")


def check_no_places(pushed: dict[str, bytes], *places: Path) -> None:
    for name, data in pushed.items():
        assert not any(str(place).encode() in data for place in places), name


def sentence(stderr: str) -> str:
    """The one line of a refusal."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


# ---- a run

def test_a_run_by_names_equals_the_run_from_files_and_what_is_pushed_loads(tmp_path, hub, bench, monkeypatch):
    """03 in a process of its own, with model, tokenizer and rows by name, pushes an adapter. Guards against another
    revision, table or tokenizer than the one named, a public repository, an adapter whose base is a cache of this
    machine, and rows or paths among what is pushed."""
    at = filled(hub, bench)
    short = ("--max_steps", 2, "--save_steps", 2, "--eval_steps", 2)
    out = tmp_path / "tuned"
    done = start("03_sft.py", *bench.argv(out, *NAMED, *short, "--push_to_hub"),
                 env=environment(hub, tmp_path, HF_TOKEN="hf_writes"))
    assert done.returncode == 0, done.stderr
    assert f"dataset ann/rows@main: commit {at['rows']}" in done.stdout
    assert bench.run(tmp_path / "local", "--prompt_template", "instruct", *short).wait() == 0
    named, local = what_is_left(out), what_is_left(tmp_path / "local")
    assert named == local
    said = json.loads((out / "run.json").read_text())
    assert said["hub"] == {"model ann/base@main": at["base"], "model ann/tok@main": at["tok"],
                           "dataset ann/rows@main": at["rows"]}

    pushed = hub.repos["model", "ann/tuned"]
    assert pushed.private and set(pushed.files) >= {"adapter_model.safetensors", "adapter_config.json", "README.md",
                                                    "tokenizer.json", "chat_template.jinja"}
    assert not set(pushed.files) & {"val.jsonl", "run.json", "plan.json", "metrics.jsonl", "samples.jsonl"}
    check_no_places(pushed.files, tmp_path, bench.place, ROOT)
    assert 'place = "ann/tuned"' in pushed.files["README.md"].decode()
    config = json.loads(pushed.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/base", at["base"])

    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load

    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    hub.put("model", "ann/base", Path(make_llama(tmp_path / "other", 50)))  # the base's main has moved on
    model = AutoPeftModelForCausalLM.from_pretrained("ann/tuned")
    assert model.base_model.model.config.vocab_size > 50
    assert len(load(pushed.files["adapter_model.safetensors"]))


def test_a_resumed_run_goes_on_with_the_commits_of_its_start(tmp_path, hub, bench):
    """Model, tokenizer and rows all move on while the run is down. Guards against a second half that is trained on
    other data than the first, and against a resume that cannot be done any more."""
    filled(hub, bench)
    out, flags = tmp_path / "run", (*NAMED, "--max_steps", 4, "--cache_dir", tmp_path / "data")
    killed = bench.run(out, *flags, patch=hold_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert killed.codes == [-signal.SIGKILL] and (out / "checkpoint-2").is_dir()
    hub.put("model", "ann/base", Path(make_llama(tmp_path / "other", 60, seed=5)))
    hub.put("model", "ann/tok", {"spm.model": b"another"})
    hub.put("dataset", "ann/rows", {"rows.jsonl": ROWS, "more.jsonl": ROWS})
    assert bench.run(out, *flags, "--resume_from_checkpoint").wait() == 0
    assert bench.run(tmp_path / "whole", "--prompt_template", "instruct", "--max_steps", 4).wait() == 0
    assert what_is_left(out) == what_is_left(tmp_path / "whole")
    asked = len(hub.asked)
    hub.off()  # and a finished run needs nothing of the Hub
    again = bench.run(out, *flags, "--resume_from_checkpoint")
    assert again.wait() == 0 and len(hub.asked) == asked, again.output
    hub.on()


def test_two_processes_ask_once(tmp_path, hub, bench):
    """What cannot be fetched ends both, with one sentence; a killed run goes on; the Hub's branches move meanwhile.
    Guards against processes that train on different commits, wait for each other, or load the Hub by their number."""
    filled(hub, bench)
    flags = (*NAMED, "--max_steps", 4, "--cache_dir", tmp_path / "data")
    for broken, fault in (("GET /api/models/ann/base", 503), ("GET /large/", "reset")):
        hub.fail(broken, fault, times=1000)
        refused = bench.run(tmp_path / f"{fault}", *flags, ranks=2)
        assert refused.codes == [74, 74] and "Give the same command again" in sentence(refused.output)
        hub.faults.clear()
    out, before = tmp_path / "run", hub.count("/revision/main")
    killed = bench.run(out, *flags, ranks=2, patch=hold_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert killed.codes[0] == -signal.SIGKILL and killed.codes[1] in (-signal.SIGKILL, 70)  # it may see the other go
    assert (out / "checkpoint-2").is_dir()
    assert hub.count("/revision/main") - before == 3 and hub.count("GET /ann/base/resolve/.*/config.json") == 1
    hub.put("model", "ann/base", Path(make_llama(tmp_path / "other", 60, seed=5)))
    hub.put("dataset", "ann/rows", {"rows.jsonl": ROWS, "more.jsonl": ROWS})
    resumed = bench.run(out, *flags, "--resume_from_checkpoint", ranks=2)
    assert resumed.codes == [0, 0], resumed.output
    whole = bench.run(tmp_path / "whole", "--prompt_template", "instruct", "--max_steps", 4, ranks=2)
    assert whole.codes == [0, 0] and what_is_left(out) == what_is_left(tmp_path / "whole")


def test_a_finished_run_is_pushed_by_the_same_command_and_trains_nothing(tmp_path, hub, bench, monkeypatch):
    """Full weights from a directory here, to a name of one's own choice. Guards against a second training for the sake
    of a push, and against weights sent twice."""
    out, flags = tmp_path / "full", ("--no_lora", "--max_steps", 2)
    assert bench.run(out, *flags).wait() == 0
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and f.name != ".lock"}
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    for _ in range(2):
        done = bench.run(out, *flags, "--push_to_hub", "ann/mine", "--resume_from_checkpoint")
        assert done.wait() == 0 and f"pushed to {hub.url}/ann/mine" in done.output, done.output
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert hub.count("PUT /upload/") == 1
    check_no_places(hub.repos["model", "ann/mine"].files, tmp_path, bench.place, ROOT)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained("ann/mine").config.vocab_size == len(
        AutoTokenizer.from_pretrained("ann/mine"))


def test_a_push_that_keeps_breaking_ends_with_the_command_that_pushes(tmp_path, hub, bench, monkeypatch):
    """Exit status 74 and the model whole on the disk. Guards against hours of training that end in a traceback, and
    against a command in the message that trains anew."""
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    hub.fail("PUT /upload/", "reset", times=1000)
    out = tmp_path / "run"
    done = bench.run(out, "--no_lora", "--max_steps", 1, "--push_to_hub")
    assert done.wait() == 74 and "Traceback" not in done.output, done.output
    assert done.output.count("Trying again") == 2
    assert "The model is finished and whole in" in done.output and str(out) in done.output
    command = done.output.strip().splitlines()[-1].partition("Push it again with: ")[2].split()
    assert json.loads((out / "run_status.json").read_text())["status"] == "finished"
    hub.faults.clear()
    argv = command[command.index("scripts/03_sft.py") + 1:]
    assert fork_main(script("03_sft").main, argv, tmp_path / "again.log").wait() == 0
    assert "model.safetensors" in hub.repos["model", "ann/run"].files


@pytest.mark.parametrize("token, fault, status, words", [
    (None, None, 2, "no token is set"), ("hf_reads", None, 2, "the token of ann may only read"),
    ("hf_wrong", None, 2, "does not know the token"), ("hf_writes", ("GET /api/whoami", 503), 74, "answers 503"),
    ("hf_writes", "off", 2, "cannot be reached")])
def test_a_push_that_cannot_be_is_refused_before_any_time_is_spent(tmp_path, hub, bench, monkeypatch, token, fault,
                                                                  status, words):
    """Guards against a missing or read-only token that is found after the training."""
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if fault == "off":
        hub.off()
    elif fault:
        hub.fail(*fault)
    began = time.monotonic()
    done = bench.run(tmp_path / "run", "--push_to_hub")
    assert done.wait() == status and time.monotonic() - began < 5
    assert words in sentence(done.output)
    assert not (tmp_path / "run").exists()
    if fault == "off":
        hub.on()


def test_an_adapter_that_nobody_else_could_load_is_not_pushed_alone(tmp_path, hub, bench, monkeypatch):
    """Its base is a directory here. Guards against a repository that loads on this machine alone."""
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    done = bench.run(tmp_path / "run", "--push_to_hub")
    assert done.wait() == 2 and "--merge_adapters" in done.output and not hub.repos


def test_merge_pushes_the_merged_model_and_06_evaluates_it_by_its_name(tmp_path, hub, bench, monkeypatch):
    """04 --push_to_hub, then 06 --model_path NAME with rows by name. Guards against a card that loads the adapter, and
    against an evaluation that takes paths alone."""
    assert bench.run(tmp_path / "run", "--max_steps", 1, "--prompt_template", "instruct").wait() == 0
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    merged = fork_main(script("04_merge_lora").main, ["--model_path", str(tmp_path / "run"), "--push_to_hub",
                                                      "merged-one"], tmp_path / "04.log")
    assert merged.wait() == 0, merged.output
    pushed = hub.repos["model", "ann/merged-one"]
    assert pushed.private and "model.safetensors" in pushed.files and "adapter_config.json" not in pushed.files
    card = pushed.files["README.md"].decode()
    assert "Peft" not in card and 'place = "ann/merged-one"' in card and "relation: adapter" not in card
    check_no_places(pushed.files, tmp_path, bench.place, ROOT)

    hub.put("dataset", "ann/rows", {"data/test.jsonl": ROWS})
    monkeypatch.chdir(tmp_path)
    done = fork_main(script("06_eval_sft").main, [
        "--model_path", "ann/merged-one", "--dataset_paths", "ann/rows@main", "--max_eval_samples", "4",
        "--max_new_tokens", "4", "--output_dir", str(tmp_path / "eval")], tmp_path / "06.log")
    assert done.wait() == 0, done.output
    assert json.loads((tmp_path / "eval" / "eval_results.json").read_text())["main"] == "rows"


# ---- from the Hub

def fetch_model(name: str = "ann/big", **where: bool) -> Path:
    forget()
    return Path(local_model(name, **where))


BIG = {"config.json": "{}", "model.safetensors": os.urandom(1 << 20), "original/consolidated.safetensors": b"x" * 99,
       "pytorch_model.bin": b"y" * 99, "tokenizer.json": '{"version": "1.0"}'}


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_broken_transfer_is_taken_up_again_and_the_file_is_whole(hub, how):
    """Three times the connection ends half-way. Guards against half a file in the cache, and against a download that a
    single lost connection ends."""
    hub.put("model", "ann/big", BIG)
    hub.fail("GET /large/", how, times=2)
    place = fetch_model()
    digest = lambda data: hashlib.sha256(data).hexdigest()
    assert digest((place / "model.safetensors").read_bytes()) == digest(BIG["model.safetensors"])
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.startswith("/large/")]
    assert len(ranges) == 3
    if how == "cut":  # each goes on where the one before ended
        assert ranges == [None, "bytes=524288-", "bytes=786432-"]
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_transfer_that_stays_broken_is_one_sentence_and_the_next_start_fetches_what_is_missing(hub):
    """Guards against a message without a way out, a broken cache, and files fetched twice."""
    hub.put("model", "ann/big", BIG)
    hub.fail("GET /large/", "reset", times=100)
    with pytest.raises(OSError, match="ann/big: the transfer broke off .* Give the same command again"):
        fetch_model()
    hub.faults.clear()
    assert (fetch_model() / "model.safetensors").read_bytes() == BIG["model.safetensors"]
    assert hub.count("GET /ann/big/resolve/.*/config.json") == 1


def test_without_a_network_what_was_fetched_is_enough_and_anything_else_is_refused_at_once(tmp_path, hub, monkeypatch):
    """By the branch's name and by the commit's; guards against half a minute of retries, and against a model without
    its weights that passes for whole."""
    commit = hub.put("model", "ann/big", BIG)
    hub.put("model", "ann/part", BIG)
    hub.put("dataset", "ann/rows", {"rows.jsonl": ROWS})
    place, rows = fetch_model(), local_rows("ann/rows@main", tmp_path)
    fetch_model("ann/part", weights=False)
    hub.off()
    try:
        began = time.monotonic()
        assert fetch_model() == fetch_model(f"ann/big@{commit}") == place
        forget()
        assert local_rows("ann/rows@main", tmp_path) == rows and Path(rows).read_text() == ROWS
        assert Path(local_rows("ann/rows@main", tmp_path / "elsewhere")).read_text() == ROWS
        for name in ("ann/part", "ann/none", "ann/big@v2"):
            with pytest.raises(UserError, match=rf"{name.partition('@')[0]}: .*cannot be fetched .*HF_HOME") as found:
                fetch_model(name)
            assert "\n" not in str(found.value)
        assert time.monotonic() - began < 5
    finally:
        hub.on()


def test_a_script_without_a_network_ends_within_seconds(tmp_path, hub, bench):
    """Exit status 2, one sentence, nothing written; guards against a run that hangs in retries."""
    hub.off()
    began = time.monotonic()
    done = start("03_sft.py", *bench.argv(tmp_path / "out", *NAMED), env=environment(hub, tmp_path / "home"))
    seconds = time.monotonic() - began
    hub.on()
    assert done.returncode == 2 and seconds < 8, done.stderr
    assert sentence(done.stderr).startswith("error: ann/base: no path here") and not (tmp_path / "out").exists()


def test_a_repository_without_a_tokenizer_is_known_as_such(hub, bench):
    """Guards against an adapter that is pushed alone: its base's tokenizer was never looked for."""
    from common.subject import has_tokenizer

    hub.put("model", "ann/bare", {"adapter_config.json": "{}"})
    hub.put("model", "ann/tok", {"spm.model": Path(bench.tokenizer).read_bytes()})
    assert has_tokenizer("ann/tok") and not has_tokenizer("ann/bare")


@pytest.mark.parametrize("name, token, words", [
    ("ann/none", None, "no path here, and the Hub shows no model of this name (no token is set)"),
    ("ann/none", "hf_reads", "no path here, and the Hub shows no model of this name (the token that is set"),
    ("ann/secret", None, "no path here, and the Hub shows no model of this name (no token is set)"),
    ("ann/big@v7", None, "no branch, tag or commit is called v7"),
    ("ann/big@" + "f" * 40, None, "no branch, tag or commit is called ffff"),
    ("ann/gated", None, "its owner lets in those who ask, and no token is set"),
    ("ann/gated", "hf_reads", "its owner lets in those who ask, and the token that is set does not open it"),
    ("ann/big", "hf_wrong", "the Hub does not know the token"), ("ann/--no", None, "this cannot be a name on the Hub")])
def test_what_the_hub_refuses_is_one_sentence(hub, monkeypatch, name, token, words):
    """Guards against pages of a library's advice, and against "not found" for what a token would open."""
    hub.put("model", "ann/big", BIG)
    hub.put("model", "ann/gated", BIG, gated=True)
    hub.put("model", "ann/secret", BIG, private=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as found:
        fetch_model(name)
    said = str(found.value)
    assert said.startswith(f"{name.partition('@')[0]}: {words}") and "\n" not in said, said


def test_a_token_opens_what_is_private(hub, monkeypatch):
    """Guards against a token that is not sent, or sent along to the store of large files where it does not belong."""
    hub.put("model", "ann/secret", BIG, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert (fetch_model("ann/secret") / "model.safetensors").is_file()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_ill_is_one_sentence(hub, status):
    """Guards against a fault of the server that is told as one of the user."""
    hub.put("model", "ann/big", BIG)
    hub.fail("GET /api/models", status, times=100)
    with pytest.raises(OSError, match=f"ann/big: the Hub answers {status}. Give the same command again"):
        fetch_model()


# ---- tables

@pytest.mark.parametrize("names, part, chosen", [
    (["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None,
     ["data/train-00000-of-00001.parquet"]),
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "test",
     ["data/test-00000-of-00001.parquet"]),
    (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], None,
     ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
    (["de/train.jsonl", "en/train.jsonl"], "de", ["de/train.jsonl"]),
    (["de/train.jsonl", "de/test.jsonl", "en/train.jsonl"], "de", ["de/train.jsonl"]),
    (["rows.jsonl", "dataset_infos.json", ".hidden.json"], None, ["rows.jsonl"]),
    (["a.jsonl", "b.jsonl"], "b.jsonl", ["b.jsonl"]), (["test.jsonl", "latest.jsonl"], "test", ["test.jsonl"]),
    (["chunk_000.jsonl.gz", "chunk_001.jsonl.gz"], None, ["chunk_000.jsonl.gz", "chunk_001.jsonl.gz"])])
def test_the_table_that_is_meant(names, part, chosen):
    """A split, a configuration, a file, or all parts of the only one; guards against training on the test split."""
    assert choose(names, part, Ref("dataset", "ann/rows")) == chosen


@pytest.mark.parametrize("names, part, words", [
    (["a.jsonl", "b.jsonl"], None, "2 tables there (the repository has: a.jsonl, b.jsonl)"),
    (["a.jsonl"], "test", "ann/rows:test: no file of rows there (the repository has: a.jsonl)"),
    (["README.md"], None, "no file of rows there (the repository has: none at all)"),
    (["de/train.jsonl", "en/train.jsonl"], None, "2 tables there"),
    (["train-00000-of-00002.parquet"], None, "some of its parts are missing")])
def test_several_tables_are_not_guessed_among(names, part, words):
    """Guards against rows of two tables in one, and against a part that is taken for the whole."""
    with pytest.raises(UserError) as found:
        choose(names, part, Ref("dataset", "ann/rows"))
    assert words in str(found.value)


def test_parts_become_one_file_with_a_manifest(tmp_path, hub):
    """JSONL whose parts lack a last newline, the same zipped, and parquet. Guards against two rows that run into each
    other at a joint, parts out of order, and a card without source and licence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, half = [line for line in ROWS.splitlines() if line], 15
    parts = ["\n".join(lines[:half]), "\n".join(lines[half:])]
    tables = []
    for i, rows in enumerate((chat_rows(30)[:half], chat_rows(30)[half:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{i}.parquet")
        tables.append((tmp_path / f"{i}.parquet").read_bytes())
    name = "data/{}-0000{}-of-00002.{}".format
    commit = hub.put("dataset", "ann/rows", {
        "README.md": "---\nlicense: mit\n---\n",
        **{name("plain", i, "jsonl"): parts[i] for i in (1, 0)},
        **{name("zipped", i, "jsonl.gz"): gzip.compress(parts[i].encode()) for i in (0, 1)},
        **{name("columns", i, "parquet"): tables[i] for i in (0, 1)}})
    from common.rows import RowReader

    expected = [row["prompt"] for row in chat_rows(30)]
    for part in ("plain", "zipped", "columns"):
        place = Path(local_rows(f"ann/rows:{part}", tmp_path / "data"))
        assert [row.messages[0]["content"] for row in RowReader(place)] == expected, part
        said = json.loads(place.with_name(f"rows-{part}.manifest.json").read_text())
        assert (said["source"], said["revision"], said["licence"], len(said["files"])) == ("ann/rows", commit, "mit", 2)
    hub.put("dataset", "ann/two", {f"{folder}/test.jsonl": json.dumps({"prompt": folder, "response": "x"}) + "\n"
                                   for folder in ("a", "b")})
    for folder in ("a", "b"):  # parts of one name in two folders are two files
        rows = RowReader(local_rows(f"ann/two:{folder}/test.jsonl", tmp_path / "data"))
        assert [row.messages[0]["content"] for row in rows] == [folder]
    asked = len(hub.asked)
    assert local_rows("ann/rows:plain", tmp_path / "data").endswith("rows-plain.jsonl") and len(hub.asked) == asked


# ---- what a name means

def test_a_path_goes_before_a_name_and_pieces_of_a_name(tmp_path, monkeypatch):
    """Guards against a local directory that is looked up on the Hub, and against a revision lost in a name."""
    from common.config import is_hub_name
    from common.settings import dataset_name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann").mkdir()
    write_rows(tmp_path / "ann" / "here", [])
    assert not any(map(is_hub_name, ("ann/here", "data/rows.jsonl", "./ann/x", "/ann/x", "a/b/c", "alone", "../x")))
    assert all(map(is_hub_name, ("ann/x", "ann/x@v1", "ann/x:data/rows.jsonl", "ann/x@refs/pr/1:test", "ann/x.json@v")))
    assert read_ref("dataset", "ann/x@v1:data/t.jsonl") == Ref("dataset", "ann/x", "v1", "data/t.jsonl")
    assert dataset_name("ann/x@v1:data/t.jsonl.gz") == "x-t" and dataset_name("ann/x") == "x"


def test_the_card_of_a_pushed_model_names_its_repository(tmp_path):
    """Every sentence with a place of this machine or a row is left out. Guards against an example that loads a
    directory of another machine, and against private rows that are published as answers."""
    card = ('library_name: peft\n---\n# tuned\n\nSupervised fine-tuning of `/home/ann/base` (LoRA).\n\n## Settings\n\n'
            "All settings, the command: `run.json`; curves: `report.html`. torch 2\n\n"
            "## Answers\n\nAsked:\n## Use\n\n## Limits\n\nmy secret\n\n## Use\n\n"
            'place = "tuned"  # this directory\nfrom peft import AutoPeftModelForCausalLM\n\n'
            "In the terminal, in it: `06 --model_path /home/ann/tuned`.\n`merged/` is there.\n\n"
            "## Elsewhere\n\n/home/ann/tuned\n\n## Limits\n\n- Short.\n")
    expected = ("library_name: peft\n---\n# tuned\n\nSupervised fine-tuning of a model of its author's own (LoRA).\n\n"
                '## Settings\n\ntorch 2\n\n## Use\n\nplace = "ann/x"\nfrom peft import AutoPeftModelForCausalLM\n\n'
                "In the terminal: `python scripts/06_eval_sft.py --chat --model_path ann/x`.\n\n"
                "## Limits\n\n- Short.\n")
    assert hub_card(card, "tuned", "ann/x", merged=False) == expected
    assert "eft" not in hub_card(card, "tuned", "ann/x", merged=True)


def test_a_push_is_taken_up_again(tmp_path, hub, monkeypatch):
    """The weights arrive, the commit is refused once. Guards against a second transfer of the weights, and against
    files of the directory that are not the model's."""
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    (tmp_path / "m").mkdir()
    for name in ("model.safetensors", "config.json", "val.jsonl", "run.json", "README.md"):
        (tmp_path / "m" / name).write_text(name)
    said: list[str] = []
    hub.fail("POST /api/models/ann/m/commit", 503)
    push(tmp_path / "m", "ann/m", "the card", "again", said.append)
    assert sorted(hub.repos["model", "ann/m"].files) == ["README.md", "config.json", "model.safetensors"]
    assert hub.repos["model", "ann/m"].files["README.md"] == b"the card"
    assert hub.count("PUT /upload/") == 1 and "Trying again" in said[0] and said[-1].startswith("pushed to ")
    with pytest.raises(UserError, match="the token may not do this.*Push it again with: again"):
        push(tmp_path / "m", "bob/m", "the card", "again", said.append)
