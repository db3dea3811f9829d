"""Text -> a SentencePiece tokenizer: PREFIX.model, and PREFIX.vocab to read.

    python scripts/01_train_tokenizer.py --input corpus.txt more.txt.gz --output_prefix data/tokenizer/spm32k

Special ids are pad 0, unk 1, bos 2, eos 3, as the other scripts expect. Nothing is normalised, and what has no piece is
spelled in bytes, so every text comes back from its ids as it was, newlines and runs of spaces included. The last
hundredth of the lines is not trained on but measured: characters per token. The same input gives the same bytes.
After an interruption: start it again; the model is written whole at the end.
"""
from __future__ import annotations

import gzip
import io
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import atomic_write
from common.config import parse, setting
from common.faults import UserError, run_main, say
from common.outputs import check_writable

PIECE_OF_LINE = 2048  # characters: SentencePiece leaves out longer sentences, so long lines are cut at spaces
HARD = ["a\n\n\tb", "  two  spaces  ", "\r\n", "naïve — “quotes”", "日本語", "e\u0301", "</s><s><pad><unk>", "<0x0A>",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467"]
# What control and byte pieces are spelled with. Where one of these characters is no piece, a converted unigram model
# reads "</s>" in a text as the end of the text.
SPELLED = "</>0123456789ABCDEFadknpsux"
THREADS = 2  # fixed, since the sums of unigram training depend on it and the same input has to give the same bytes


@dataclass
class TokenizerConfig:
    """Settings of 01_train_tokenizer.py."""

    input: list[str] = setting([], "Text files, UTF-8 (also .gz).", path=True, required=True)
    output_prefix: str = setting("data/tokenizer/spm32k", "Where the model goes, without .model.", path=True)
    vocab_size: int = setting(32768, "Pieces, with the 4 special ones and 256 bytes.", unit="pieces",
                              within="[300, 1000000]")
    model_type: str = setting("bpe", "Kind of SentencePiece model.", choices=("unigram", "bpe"))
    input_sentence_size: int = setting(
        200_000, "Train on at most this many lines, drawn from all by the seed. 0: all.", unit="lines",
        within="[0, inf)")
    seed: int = setting(42, "Decides which lines are drawn.", within="[0, 4294967295]")
    overwrite: bool = setting(False, "Replace a tokenizer that is there. Models trained with it will not fit.")


def read_lines(paths: list[str]) -> Iterator[str]:
    """Lines of text files without their ends, empty ones left out; raise UserError that names file and line."""
    for path in paths:
        number = 0
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if text := line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"):
                        yield text
        except UnicodeDecodeError as fault:
            raise UserError(f"{path}:{number}: not UTF-8 ({fault.reason} at byte {fault.start + 1}). "
                            "Convert it, e.g. with iconv -t UTF-8.") from None
        except (gzip.BadGzipFile, zlib.error, EOFError):
            raise UserError(f"{path}: damaged gzip data after line {number:,}. Fetch or pack the file again.") from None
        except OSError as fault:
            raise UserError(f"{path}: {fault.strerror}. --input takes text files.") from None


def cut(line: str) -> Iterator[str]:
    """Pieces of a line of at most PIECE_OF_LINE characters, cut at spaces where there are any."""
    while len(line) > PIECE_OF_LINE:
        at = line.rfind(" ", 1, PIECE_OF_LINE)
        at = at if at > 0 else PIECE_OF_LINE
        yield line[:at]
        line = line[at:]
    yield line


def draw_lines(lines: list[str], n: int, seed: int) -> list[str]:
    """n of the lines in their order, the same for the same seed; all of them if n is 0 or enough."""
    import numpy as np

    if not 0 < n < len(lines):
        return lines
    return [lines[i] for i in np.sort(np.random.default_rng([seed, 0]).choice(len(lines), n, replace=False))]


def train(lines: list[str], vocab_size: int, model_type: str) -> bytes:
    """Train on lines and return the bytes of the model; raise UserError if the vocabulary does not suit the text."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in cut(line)), model_writer=model,
            vocab_size=vocab_size, model_type=model_type, num_threads=THREADS, minloglevel=2,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,  # a word after a newline or a chat token is the word at the start of a text
            required_chars=SPELLED if model_type == "unigram" else "",
            character_coverage=0.99995, max_sentence_length=16 * PIECE_OF_LINE)
    except RuntimeError as fault:
        if "KeyboardInterrupt" in str(fault):
            raise KeyboardInterrupt from None
        raise UserError(_too_large_or_small(str(fault), vocab_size, model_type)) from None
    return model.getvalue()


def _too_large_or_small(fault: str, vocab_size: int, model_type: str) -> str:
    if largest := re.search(r"value <= (\d+)", fault):
        return (f"--vocab_size {vocab_size}: too large for this text. The largest possible {model_type} vocabulary is "
                f"{largest[1]}. Lower it, or give more text with --input.")
    if smallest := re.search(r"smaller than required_chars\D+\d+ vs (\d+)", fault):
        return (f"--vocab_size {vocab_size}: too small for this text: its characters alone need {smallest[1]}. "
                "Raise it.")
    return f"--input: SentencePiece cannot train on this text: {fault.splitlines()[-1]:.200}"


def main(argv: list[str]) -> int:
    config = parse(TokenizerConfig, argv, __doc__, config_flag=None)
    prefix = config.output_prefix.removesuffix(".model")
    if not prefix or prefix.endswith(os.sep) or Path(prefix).is_dir():
        raise UserError(f"--output_prefix {config.output_prefix}: a directory, not a name. Write "
                        f"{os.path.join(prefix, 'spm')} for spm.model and spm.vocab.")
    model_path = Path(prefix + ".model")
    check_writable(model_path.parent, "--output_prefix")
    from sentencepiece import SentencePieceProcessor

    start = time.perf_counter()
    lines = list(read_lines(config.input))
    held_out = lines[len(lines) - len(lines) // 100:]
    drawn = draw_lines(lines[:len(lines) - len(held_out)], config.input_sentence_size, config.seed)
    if not drawn:
        raise UserError(f"{config.input[0]}: no text in it. --input takes text files with at least one line.")
    say(f"read      {sum(len(line.encode()) + 1 for line in lines) / 1e6:,.1f} MB, {len(lines):,} lines; training on "
        f"{len(drawn):,}, {len(held_out):,} held out")
    data = train(drawn, config.vocab_size, config.model_type)
    tokenizer = SentencePieceProcessor(model_proto=data)
    lost = [text for text in HARD if tokenizer.decode(tokenizer.encode(text)) != text]
    assert not lost, f"texts that do not come back from their ids: {lost}"
    if model_path.exists() and model_path.read_bytes() != data and not config.overwrite:
        raise UserError(f"{model_path}: another tokenizer is there, and models trained with it need it. "
                        "Choose another --output_prefix, or replace it with --overwrite.")
    model_path.parent.mkdir(parents=True, exist_ok=True)
    pieces = [f"{tokenizer.id_to_piece(i)}\t{tokenizer.get_score(i):g}\n" for i in range(len(tokenizer))]
    atomic_write(model_path.with_suffix(".vocab"), "".join(pieces).encode())
    atomic_write(model_path, data)
    say(f"trained   {len(tokenizer):,} pieces ({config.model_type}) in {time.perf_counter() - start:.1f} s")
    if held_out:
        tokens = sum(map(len, tokenizer.encode(held_out, num_threads=THREADS)))
        say(f"held out  {sum(map(len, held_out)) / tokens:.2f} characters per token")
    say(f"proven    {len(HARD)} hard strings come back from their ids (newlines, tabs, runs of spaces, emoji)")
    say(f"wrote     {model_path}, {model_path.with_suffix('.vocab').name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
