"""01: the id contract, texts that come back, the same bytes every time, faults as one sentence."""
from __future__ import annotations

import gzip
import importlib
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from test_sample import make

from common.faults import UserError
from common.spm import SentencePiece, prove_equal, to_fast

script = importlib.import_module("01_train_tokenizer")
TEXTS = ["lamp boat", "  two  spaces", "tab\tnewline\n\n\tindented\n", "\n lamp", "naïve – 日本語",
         "\U0001f469\u200d\U0001f467", "</s> <pad> <0x0A> ▁", "12 345", ""]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    lines = make.make_sample(stories=600, rows=6, heldout=6)["corpus.txt"].splitlines()
    code = [line if i % 7 else f"    if {line}:\n        return 10{i}" for i, line in enumerate(lines)]
    path.write_text("\n".join(code), encoding="utf-8")
    return path


def train(corpus: Path, prefix: Path, *more: str, vocab_size: int = 420) -> Path:
    """Run the script and return the model's path."""
    script.main(["--input", str(corpus), "--output_prefix", str(prefix), "--vocab_size", str(vocab_size), *more])
    return Path(f"{prefix}.model")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_contract(corpus, tmp_path, kind):
    """Guards against other special ids, lost newlines and spaces, pieces across lines, and a wrong conversion."""
    size = 420 if kind == "bpe" else 350
    path = train(corpus, tmp_path / "t", "--model_type", kind, vocab_size=size)
    sp = SentencePiece(path)
    assert [sp.native.id_to_piece(i) for i in range(4)] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert [sp.native.id_to_piece(4 + byte) for byte in (0, 10, 255)] == ["<0x00>", "<0x0A>", "<0xFF>"]
    assert len(sp.native) == size
    assert not any("\n" in piece.piece for piece in sp.proto.pieces)
    fast = to_fast(sp)
    found = prove_equal(sp, fast, TEXTS)  # raises at the first difference
    assert {name: n for name, n in found.items() if n} == {"texts": len(TEXTS), "changed": 1}  # ▁ itself is the space
    kept = [text for text in TEXTS if "▁" not in text]
    assert [fast.decode(ids) for ids in sp.encode(kept)] == kept
    assert (tmp_path / "t.vocab").read_text(encoding="utf-8").count("\n") >= size


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_input_same_bytes(corpus, tmp_path, kind):
    """Guards against sampling or threads that make every run another tokenizer."""
    flags = ("--model_type", kind, "--input_sentence_size", "500")
    first, second = (train(corpus, tmp_path / name, *flags, vocab_size=350).read_bytes() for name in ("a", "b"))
    assert first == second


def test_gzip_equals_text(corpus, tmp_path):
    """Guards against reading compressed bytes as text."""
    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    assert train(packed, tmp_path / "a").read_bytes() == train(corpus, tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabulary_too_large_names_the_largest(corpus, tmp_path, kind):
    """Guards against SentencePiece's internal error, and against a remedy that does not work."""
    with pytest.raises(UserError, match="--vocab_size 90000: too large") as fault:
        train(corpus, tmp_path / "t", "--model_type", kind, vocab_size=90_000)
    assert not list(tmp_path.iterdir())
    largest = int(re.search(r"vocabulary is (\d+)", str(fault.value))[1])
    assert len(SentencePieceProcessor(str(train(corpus, tmp_path / "t", "--model_type", kind, vocab_size=largest)))) \
        == largest


def test_vocabulary_too_small_names_the_smallest(tmp_path):
    """Guards against the same fault at the other end."""
    text = tmp_path / "many.txt"
    text.write_text("".join(chr(0x4e00 + i) for i in range(400)) * 3 + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="--vocab_size 300: too small.* need [0-9]+"):
        train(text, tmp_path / "t", vocab_size=300)


@pytest.mark.parametrize(("content", "name", "finding"), [
    (b"good\n\xff\n", "a.txt", r"a\.txt:2: not UTF-8"),
    (gzip.compress(b"lamp\n" * 500)[:-12], "a.gz", r"a\.gz: damaged gzip"),
    (b"no gzip", "a.gz", r"a\.gz: damaged gzip"),
    (b"\n\n", "a.txt", r"a\.txt: no text"),
    (None, "a.txt", r"a\.txt: No such file"),
])
def test_bad_input_is_one_sentence(tmp_path, content, name, finding):
    """Guards against tracebacks and against files left behind."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=finding):
        train(tmp_path / name, tmp_path / "out" / "t")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_not_replaced(corpus, tmp_path):
    """Guards against models left without their tokenizer."""
    path = train(corpus, tmp_path / "t")
    before = path.read_bytes()
    train(corpus, tmp_path / "t")  # the same again: nothing lost
    with pytest.raises(UserError, match="--overwrite"):
        train(corpus, tmp_path / "t", vocab_size=400)
    assert path.read_bytes() == before
    assert len(SentencePieceProcessor(str(train(corpus, tmp_path / "t", "--overwrite", vocab_size=400)))) == 400


def test_long_lines_are_cut_not_left_out():
    """Guards against SentencePiece's silent limit on the length of a sentence."""
    line = "lamp boat " * 1000
    parts = list(script.cut(line))
    assert "".join(parts) == line
    assert max(map(len, parts)) <= script.PIECE_OF_LINE
    assert all(part.startswith(" boat") or part.startswith(" lamp") for part in parts[1:])
    assert "".join(script.cut("x" * 5000)) == "x" * 5000


def test_drawn_lines_keep_their_order_and_depend_on_the_seed():
    """Guards against training on the head of a file alone."""
    lines = [str(i) for i in range(100)]
    drawn = script.draw_lines(lines, 10, 1)
    assert len(set(drawn)) == 10 and sorted(drawn, key=int) == drawn and drawn != script.draw_lines(lines, 10, 2)
    assert script.draw_lines(lines, 0, 1) == script.draw_lines(lines, 100, 1) == lines
