"""Fixtures: a small SentencePiece tokenizer, byte-level and template-carrying tokenizers, and a 2-layer Llama."""
from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the red green blue cat dog bird sees likes takes a small large old new house tree river stone and then but "
         "not very quickly slowly today tomorrow what is who are you hello there answer question one two three "
         "four").split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Plain seeded sentences of a few words."""
    import random

    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9))).capitalize() + "." for _ in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of prompt and response; no prompt occurs twice."""
    lines = sentences(2 * count, seed)
    return [{"prompt": f"{i} {lines[2 * i]}", "response": lines[2 * i + 1]} for i in range(count)]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors are hundreds of times slower on many threads of a busy machine."""
    import torch

    torch.set_num_threads(1)


def train_spm(place: Path, model_type: str = "unigram", vocab_size: int = 400, **options: object) -> Path:
    """A SentencePiece model with the pipeline's id contract."""
    import io

    import sentencepiece as spm

    out = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
                "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "minloglevel": 2, "num_threads": 1,
                "hard_vocab_limit": False, **options}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences(1500)), model_writer=out, vocab_size=vocab_size,
                                   model_type=model_type, **settings)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(out.getvalue())
    return place


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for what is built once per session."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def spm_unigram(shared: Path) -> str:
    return str(train_spm(shared / "unigram.model"))


@pytest.fixture(scope="session")
def spm_bpe(shared: Path) -> str:
    return str(train_spm(shared / "bpe.model", "bpe"))


@pytest.fixture(scope="session")
def spm_lossy(shared: Path) -> str:
    """The library's default normaliser: newlines and runs of spaces become one space."""
    return str(train_spm(shared / "lossy.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True))


@pytest.fixture(scope="session")
def byte_level(shared: Path) -> str:
    """A byte-level BPE tokenizer as GPT-2 and Llama 3 have it: no BOS, no chat template, eos <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([s + "\n\n" for s in sentences(1500)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(str(shared / "byte_level"))
    return str(shared / "byte_level")


@pytest.fixture(scope="session")
def with_template(shared: Path, byte_level: str) -> str:
    """A tokenizer that brings a chat template of its own, without generation blocks (like Llama 3's, trimming)."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(byte_level)
    fast.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|end|>"]})
    fast.chat_template = ("{% for message in messages %}{{ '<|turn|>' + message['role'] + '\\n' + "
                          "message['content'] | trim + '<|end|>\\n' }}{% endfor %}"
                          "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}")
    fast.save_pretrained(str(shared / "with_template"))
    return str(shared / "with_template")


def make_llama(place: Path, vocab_size: int, *, tied: bool = True, seed: int = 0, layers: int = 2, heads: int = 2,
               kv_heads: int | None = None, hidden: int = 32, context: int = 256, dtype: str = "float32") -> str:
    """A random Llama in Hugging Face form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=context,
        tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    model.to(getattr(torch, dtype)).save_pretrained(str(place))
    return str(place)


@pytest.fixture(scope="session")
def tiny_model(shared: Path, spm_unigram: str) -> str:
    """A random 2-layer Llama for the unigram tokenizer, without a tokenizer beside it."""
    import sentencepiece as spm

    return make_llama(shared / "tiny", spm.SentencePieceProcessor(model_file=spm_unigram).get_piece_size())
