"""A bare SentencePiece model: its contract, and a converted tokenizer that gives the same ids for hard text."""
from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS, train_spm

from common.chat import load_tokenizer
from common.faults import UserError
from common.spm import SentencePiece, prove_equal, to_fast

HARD = ["", " ", "  ", "   a", "a   ", "a  b", "\n", "\n\n", "a\nb", "a\n\n\n b", "\t", "\ta\tb",
        "a\r\nb", "a\rb", " \n \t ", "🙂", "👨‍👩‍👧 family", "日本語 テキスト", "한국어",
        "e\u0301 a\u0308\u0323", "\u1112\u1161\u11ab", "ﬁ ﬂ ① ½ ™", "\uff46ull", "x\u200by\u200dz",
        "\ufeffa", "a\u00a0b", "a\u2028b", "a\0b", "<s>", "</s> <unk> <pad>", "a</s>b", "§</s>",
        "</s></s>", "<0x0A>", "<0x41>", "▁", "▁▁a", "a▁b", "\u202e rtl \u202c", "ﷺ", "ẞ ß ſ",
        "İ i̇", "a" * 300, "http://wwwww.", "\x07\x1b[0m", "\U0001f1e9\U0001f1ea", "é", "the cat"]


def hard_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    pool = HARD + WORDS
    return ["".join(draw.choice(pool) + draw.choice(["", " ", "\n"]) for _ in range(draw.randint(1, 6)))
            for _ in range(count)]


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("normaliser", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_converted_ids_are_sentencepieces(tmp_path: Path, model_type: str, byte_fallback: bool, normaliser: str,
                                          squeeze: bool) -> None:
    """The library's own converters differ on most texts with runs of spaces, newlines or control strings."""
    sp = SentencePiece(train_spm(tmp_path / "m.model", model_type, byte_fallback=byte_fallback,
                                 normalization_rule_name=normaliser, remove_extra_whitespaces=squeeze))
    texts = HARD + hard_texts(400, 1)
    found = prove_equal(sp, to_fast(sp), texts)
    assert found["texts"] == len(texts)
    assert found["ties"] <= (len(texts) // 10 if model_type == "unigram" else 0)  # "wwwww", "aaaa": equal scores
    assert found["unsafe"] == 0
    assert (found["changed"] > len(texts) // 5) == (normaliser != "identity" or squeeze or not byte_fallback)
    control = {0, 2, 3}
    assert all(control.isdisjoint(ids) for ids in sp.encode(texts))


def test_reloaded_tokenizer_is_the_same(spm_bpe: str, tmp_path: Path) -> None:
    """A saved tokenizer whose class rebuilds its own normaliser on loading."""
    from transformers import AutoTokenizer

    fast, native = load_tokenizer(spm_bpe)
    fast.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert prove_equal(native, again, HARD)["ties"] == 0
    assert again("the cat")["input_ids"][0] == 2  # BOS by itself, as Llama's tokenizers have it
    assert [again.pad_token_id, again.unk_token_id, again.bos_token_id, again.eos_token_id] == [0, 1, 2, 3]
    back = [again.decode(ids) for ids in native.encode(HARD)]
    assert back == native.native.decode(native.encode(HARD))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_planted_difference_is_found(tmp_path: Path, model_type: str) -> None:
    """A proof that cannot fail proves nothing."""
    sp = SentencePiece(train_spm(tmp_path / "a.model", model_type))
    other = SentencePiece(train_spm(tmp_path / "b.model", model_type, vocab_size=340))
    with pytest.raises(UserError, match="other ids than SentencePiece for .*token [0-9]+"):
        prove_equal(sp, to_fast(other), ["a", "the yellow cat today"])
    fast = to_fast(sp)
    fast.backend_tokenizer.normalizer = None
    with pytest.raises(UserError, match="other ids"):
        prove_equal(sp, fast, ["a b"])


@pytest.mark.parametrize("ids", [
    {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}, {"pad_id": 3, "unk_id": 0, "bos_id": 1, "eos_id": 2},
    {"pad_id": 0, "unk_id": 1, "bos_id": 3, "eos_id": 2}, {"bos_id": -1}])
def test_other_special_ids_are_refused_with_the_remedy(tmp_path: Path, ids: dict) -> None:
    """With ids swapped the model would train on BOS where it should stop."""
    path = train_spm(tmp_path / "m.model", **ids)
    with pytest.raises(UserError, match=r"special ids are .*needed are .*01_train_tokenizer"):
        load_tokenizer(str(path))


def test_symbols_of_the_user(tmp_path: Path) -> None:
    """User-defined symbols come out of plain text and are refused; control symbols do not and become special tokens."""
    with pytest.raises(UserError, match=r"user-defined symbols \('<chat>'\)"):
        load_tokenizer(str(train_spm(tmp_path / "u.model", user_defined_symbols=["<chat>"])))
    fast, native = load_tokenizer(str(train_spm(tmp_path / "c.model", control_symbols=["<|im_start|>", "<|im_end|>"])))
    assert fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [4, 5]
    assert {"<|im_start|>", "<|im_end|>"} <= set(fast.all_special_tokens)
    assert prove_equal(native, fast, ["a <|im_end|> b", *HARD])["unsafe"] == 0
    assert fast("a<|im_end|>")["input_ids"][-1] == 5


@pytest.mark.parametrize("options, finding", [({"model_type": "char"}, "model type"),
                                              ({"model_type": "word"}, "model type"),
                                              ({"treat_whitespace_as_suffix": True}, "suffix")])
def test_kinds_that_cannot_be_converted(tmp_path: Path, options: dict, finding: str) -> None:
    """Char, word and suffix models would be converted to something else without a word."""
    if "model_type" in options:
        options = {**options, "byte_fallback": False}
    with pytest.raises(UserError, match=finding):
        load_tokenizer(str(train_spm(tmp_path / "m.model", **{"model_type": "unigram", **options})))


def test_files_that_are_no_model(tmp_path: Path) -> None:
    """A missing, empty or cut file, a directory: one sentence."""
    whole = train_spm(tmp_path / "m.model").read_bytes()
    for name, data in {"empty": b"", "text": b"hello world\n" * 50, "cut": whole[:len(whole) // 3]}.items():
        (tmp_path / f"{name}.model").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.model: "):
            SentencePiece(tmp_path / f"{name}.model")
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match="--tokenizer_path takes"):
            SentencePiece(path)


def test_texts_keep_their_place(spm_bpe: str) -> None:
    """Encoding on several cores must not mix up texts, nor lose empty ones."""
    sp = SentencePiece(spm_bpe)
    texts = hard_texts(500, 2)
    assert sp.encode(texts) == [sp.native.encode(text) for text in texts]
    assert sp.encode([]) == [] and sp.encode([""]) == [[]]
    assert sp.encode_bytes(texts) == [np.array(ids, np.int32).tobytes() for ids in sp.encode(texts)]
