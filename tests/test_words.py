"""BPE word by word: the ids are SentencePiece's own for the whole text, whatever was met before."""
from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, sentences, train_spm
from test_spm import HARD, hard_texts

from common import word_cache, words
from common.chat import load_chat
from common.spm import SentencePiece, to_fast

SPACES = [" ", "  ", "   ", "    ", "▁", "▁▁", "\n", "\n    ", "\t", "", "\0"]


def code(count: int, seed: int) -> list[str]:
    """Texts with runs of spaces, some of them at the beginning and the end."""
    draw = random.Random(seed)
    return ["".join(draw.choice([draw.choice(SPACES), draw.choice(WORDS), draw.choice(HARD)])
                    for _ in range(draw.randint(0, 20))) for _ in range(count)]


def same(found: Callable, expected: Callable, texts: list[str]) -> bool:
    """In batches, so that later ones meet words of earlier ones; the last again, when all its words are known."""
    batches = [texts[i:i + 100] for i in range(0, len(texts), 100)]
    for batch in [*batches, batches[-1]]:
        assert found(batch) == expected(batch)
    return True


def whole(model: SentencePiece) -> Callable:
    return lambda texts: [np.array(ids, np.int32).tobytes() for ids in model.native.encode(texts, num_threads=1)]


@pytest.fixture(params=["one by one", "at once", "at once, in 8 slots"])
def manner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How words are looked up."""
    monkeypatch.setattr(words, "FEW", 10**9 if request.param == "one by one" else 0)
    if "slots" in request.param:  # every word loses its slot to another
        monkeypatch.setattr(word_cache, "SLOT_BITS", 3)
        monkeypatch.setattr(word_cache, "MOST_IDS", 1000)
        monkeypatch.setattr(words, "PORTION", 300)
    if request.param == "at once":
        monkeypatch.setattr(word_cache, "MOST_LONG", 1.0)
    return request.param


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("indented", [True, False])
def test_ids_are_those_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_fallback: bool,
                                         indented: bool, manner: str) -> None:
    """Pieces of several spaces cut in two, a lost space at the end, ids of another word once words were forgotten."""
    lines = [f"{i % 5 * '  '}{line}".replace(" a ", "    a ") for i, line in enumerate(sentences(1500))]
    monkeypatch.setattr("conftest.sentences", lambda count: lines if indented else sentences(count))
    model = SentencePiece(train_spm(tmp_path / "m.model", "bpe", byte_fallback=byte_fallback,
                                    allow_whitespace_only_pieces=True))
    assert any("▁▁" in p.piece for p in model.proto.pieces) == indented
    assert model._words
    assert same(model.encode_bytes, whole(model), HARD + hard_texts(500, 1) + code(1500, 2))
    monkeypatch.setattr(words, "REMEMBERED", 500)
    assert same(model.encode_bytes, whole(model), HARD + hard_texts(500, 3))
    to_fast(model).save_pretrained(tmp_path)
    chat = load_chat(str(tmp_path), "chatml")
    assert chat.native is None and chat._words
    assert same(chat._encode_texts, chat._encode_whole, HARD + hard_texts(300, 5) + code(700, 6))


@pytest.mark.parametrize("options", [
    {"model_type": "unigram"}, {"split_by_whitespace": False, "vocab_size": 800}, {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}])
def test_other_models_are_given_the_whole_text(tmp_path: Path, options: dict) -> None:
    """A piece that reaches over a space, or a normaliser that looks at what is around it."""
    model = SentencePiece(train_spm(tmp_path / "m.model", **{"model_type": "bpe", **options}))
    assert model._words is None
    if not model.normalises:  # its texts are composed first
        assert same(model.encode_bytes, whole(model), HARD + code(300, 4))


def test_other_fast_tokenizers_are_given_the_whole_text(spm_unigram: str, spm_bpe: str, spm_lossy: str,
                                                        byte_level: str) -> None:
    """Words of a kind that was not proven: another model, a pre-tokenizer, a normaliser, tokens found in any text."""
    for path in (spm_unigram, spm_lossy):
        assert words.of_fast(to_fast(SentencePiece(path)), list) is None
    assert load_chat(byte_level)._words is None
    fast = to_fast(SentencePiece(spm_bpe))
    assert words.of_fast(fast, list) is not None
    fast.add_tokens(["e d"])
    assert words.of_fast(fast, list) is None


def test_a_failed_call_leaves_no_word_without_ids(spm_bpe: str) -> None:
    """Words whose encoding failed are met again as new ones, not as words of no ids."""
    model = SentencePiece(spm_bpe)
    model.encode_bytes(["the red cat"])
    with pytest.raises(TypeError):
        model.encode_bytes(["new words \ud800"])
    assert same(model.encode_bytes, whole(model), ["the red cat", "cat dog", "new words"])


def test_words_at_the_borders_of_a_slot(spm_bpe: str, manner: str) -> None:
    """Words of 5 to 26 bytes that differ in the last one, in a zero byte at the end, or in nothing but their length."""
    model = SentencePiece(spm_bpe)
    texts = [stem[:n] + end for stem in ("abcdefghijklmnopqrstuvwxyz", "\0" * 26, "ä" * 26) for n in range(5, 27)
             for end in ("", "x", "y", "\0", "\0\0", " ", "  ")]
    assert same(model.encode_bytes, whole(model), [*texts, *map(" ".join, zip(texts, reversed(texts)))])
    for nothing in [], [""], ["", "", ""]:
        assert model.encode_bytes(nothing) == [b""] * len(nothing)


def test_most_words_of_a_block_are_in_the_cache(spm_bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block whose words were met before next to none is asked for; two of one hash take turns."""
    model, texts = SentencePiece(spm_bpe), sentences(1500)
    assert sum(map(len, texts)) > words.FEW
    first, asked = model.encode_bytes(texts), []
    look_up = model._words._look_up
    monkeypatch.setattr(model._words._cache, "_ids_of", lambda words: asked.extend(words) or look_up(words))
    assert model.encode_bytes(texts) == first == whole(model)(texts)
    assert len(asked) < 5
