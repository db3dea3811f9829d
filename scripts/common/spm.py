"""A bare SentencePiece `.model`: checked, converted to a fast tokenizer, and proven equal to it id for id.

SentencePiece itself is the law: training text is encoded by it (exact, several times faster, and it can never emit a
control id). The converted tokenizer is what a run leaves behind, for `transformers` to load; `prove_equal` compares
the two on the user's own text before anything is trained.
"""
from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.faults import UserError
from common.words import of_sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_IDS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}  # what a bare .model has to bring
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece piece types
UNIGRAM, BPE = 1, 2


class SentencePiece:
    """The native model: `encode` (texts -> ids) and the facts of its header that matter here."""

    def __init__(self, path: str | Path):
        """Raise UserError if the file is no SentencePiece model or breaks the id contract."""
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as spm_pb

        self.path = str(path)
        try:
            data = Path(path).read_bytes()
            self.proto = spm_pb.ModelProto()
            self.proto.ParseFromString(data)
            self.native = SentencePieceProcessor(model_proto=data)
        except OSError as fault:
            raise UserError(f"{path}: {fault.strerror}. --tokenizer_path takes a SentencePiece .model file "
                            "or a directory with a Hugging Face tokenizer.") from None
        except Exception as fault:  # protobuf and sentencepiece each raise their own kinds
            raise UserError(f"{path}: not a SentencePiece model ({type(fault).__name__}). "
                            "Make one with scripts/01_train_tokenizer.py.") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._check()
        # Precompiled character maps work on code points here and on grapheme clusters in `tokenizers`; on NFC text
        # with plain newlines the two agree (0 of 2,000 random strings of stacked marks differ; 366 before).
        self.normalises = bool(self.proto.normalizer_spec.precompiled_charsmap)
        self._words = of_sentencepiece(self.native, self.proto)

    def _check(self) -> None:
        trainer, spec = self.proto.trainer_spec, self.native
        found = {"pad": spec.pad_id(), "unk": spec.unk_id(), "bos": spec.bos_id(), "eos": spec.eos_id()}
        if found != SPECIAL_IDS:
            raise UserError(
                f"{self.path}: special ids are {found}, needed are {SPECIAL_IDS}. Train one with "
                "scripts/01_train_tokenizer.py, or bring the model's own Hugging Face tokenizer directory.")
        if trainer.model_type not in (UNIGRAM, BPE):
            raise UserError(f"{self.path}: model type {trainer.model_type} is not supported. Use unigram or bpe.")
        if trainer.treat_whitespace_as_suffix:
            raise UserError(f"{self.path}: whitespace as suffix is not supported. Train it without that option.")
        user = [p.piece for p in self.proto.pieces if p.type == USER_DEFINED]
        if user:
            raise UserError(
                f"{self.path}: user-defined symbols ({', '.join(map(repr, user[:4]))}) would come out of plain text. "
                "Train it without them, or with control_symbols; chat tokens are added by the scripts.")

    def prepare(self, text: str) -> str:
        """Return the text as both encoders have to see it."""
        return unicodedata.normalize("NFC", text).replace("\r\n", "\n") if self.normalises else text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode plain texts; control pieces cannot come out of text. Other cores have processes of their own."""
        return [np.frombuffer(ids, np.int32).tolist() for ids in self.encode_bytes(texts)]

    def encode_bytes(self, texts: list[str]) -> list[bytes]:
        """As encode, each text's ids as int32 side by side: no Python number is made for a token."""
        if self._words:
            return self._words.encode(texts)
        texts = [self.prepare(t) for t in texts] if self.normalises else texts
        return [ids.tobytes() for ids in self.native.encode(texts, num_threads=1, return_type="numpy")]


def to_fast(sp: SentencePiece) -> PreTrainedTokenizerFast:
    """Convert to a Hugging Face fast tokenizer with the same ids (unigram and BPE, byte fallback or not).

    Both of the library's own converters differ from SentencePiece (control and byte pieces win over text, newlines and
    runs of spaces are changed), so vocabulary, merges, normaliser and decoder are written out here.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(_unigram(sp.proto) if sp.proto.trainer_spec.model_type == UNIGRAM else _bpe(sp.proto))
    tokenizer.normalizer = _normalizer(sp)
    splitter = _unknown_apart(sp.proto)
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = _decoder(sp.proto)
    names = {name: sp.native.id_to_piece(i) for name, i in SPECIAL_IDS.items()}
    bos = f"{names['bos']}:0 "  # as Llama's tokenizers do; apply_chat_template leaves it to the template
    tokenizer.post_processor = processors.TemplateProcessing(
        single=bos + "$A:0", pair=bos + "$A:0 $B:1", special_tokens=[(names["bos"], SPECIAL_IDS["bos"])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   **{f"{name}_token": piece for name, piece in names.items()})
    control = [p.piece for p in sp.proto.pieces if p.type == CONTROL and p.piece not in names.values()]
    if control:
        fast.add_special_tokens({"extra_special_tokens": control})
    return fast


def _unigram(proto: object) -> object:
    from tokenizers.models import Unigram

    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    # Control, byte and unknown pieces have score 0 and would win against any text: put them far below.
    low = min(score for _, score, kind in pieces if kind == NORMAL) - 1000.0
    return Unigram([(piece, score if kind == NORMAL else low) for piece, score, kind in pieces],
                   unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _unknown_apart(proto: object) -> object | None:
    """Unigram: a pre-tokenizer that sets runs of characters no piece has apart from the rest; None where not needed.

    In `tokenizers` an unknown character costs more than any piece, so without a piece for "<" the text </s> would
    become the control token, and <0x0A> the byte. With "<" apart they cannot be matched; nothing else changes.
    """
    from tokenizers import Regex, pre_tokenizers

    known = {c for p in proto.pieces if p.type == NORMAL for c in p.piece}
    spelled = {c for p in proto.pieces if p.type != NORMAL for c in p.piece}
    if proto.trainer_spec.model_type != UNIGRAM or spelled <= known:
        return None
    members = "".join(f"\\x{{{ord(c):x}}}" for c in sorted(known))
    return pre_tokenizers.Split(Regex(f"[^{members}]+"), "isolated")


def _bpe(proto: object) -> object:
    from tokenizers.models import BPE as BPEModel

    vocabulary = {p.piece: i for i, p in enumerate(proto.pieces)}
    usable = {p.piece for p in proto.pieces if p.type in (NORMAL, UNUSED)}
    merges = []  # SentencePiece stores no merges: every split of a piece into two pieces is one, ranked by its score
    for p in proto.pieces:
        if p.type == NORMAL and len(p.piece) > 1:
            splits = [(p.piece[:i], p.piece[i:]) for i in range(1, len(p.piece))
                      if p.piece[:i] in usable and p.piece[i:] in usable]
            merges += [(p.score, a, b) for a, b in sorted(splits, key=lambda s: (vocabulary[s[0]], vocabulary[s[1]]))]
    merges.sort(key=lambda m: -m[0])
    return BPEModel(vocab=vocabulary, merges=[(a, b) for _, a, b in merges], unk_token=proto.trainer_spec.unk_piece,
                    fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizer(sp: SentencePiece) -> object:
    from tokenizers import Regex, normalizers

    spec, steps = sp.proto.normalizer_spec, []
    if sp.normalises:  # as in SentencePiece.prepare
        steps += [normalizers.NFC(), normalizers.Replace("\r\n", "\n"),
                  normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:  # \A and \z: in this engine ^ and $ match at every line
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(r" {2,}"), " "),
                  normalizers.Replace(Regex(r"[ ▁]+\z"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(proto: object) -> object:
    from tokenizers import decoders

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def prove_equal(sp: SentencePiece, fast: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, int]:
    """Compare both encoders on texts; raise UserError at the first difference that is not a tie of equal scores.

    Returns counts: texts, ties (unigram only: two segmentations of the same score), changed (texts that do not come
    back from decoding as they were: case, newlines, runs of spaces) and unsafe (texts in which the converted tokenizer
    reads a control string as the control token, as unigram models without a piece for "<" do; SentencePiece does not).
    """
    native = sp.encode(texts)
    converted = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    unigram = sp.proto.trainer_spec.model_type == UNIGRAM
    control = {i for i, p in enumerate(sp.proto.pieces) if p.type == CONTROL}
    ties = unsafe = 0
    for text, law, ids in zip(texts, native, converted):
        if law == ids:
            continue
        if unigram and not control.isdisjoint(ids):
            unsafe += 1
            continue
        known = max(ids, default=0) < len(sp.proto.pieces)  # not of a tokenizer with more
        score = [sum(sp.native.get_score(i) for i in x) for x in (law, ids if known else [])]
        if not unigram or not known or abs(score[0] - score[1]) > 1e-3:
            at = next((i for i, (a, b) in enumerate(zip(law, ids)) if a != b), min(len(law), len(ids)))
            raise UserError(
                f"{sp.path}: the converted tokenizer gives other ids than SentencePiece for {text[:60]!r} (token {at}: "
                f"{law[at:at + 3]} against {ids[at:at + 3]}). Please report it; a Hugging Face tokenizer directory "
                "of the same model can be used instead.")
        ties += 1
    changed = sum(back != text for text, back in zip(texts, sp.native.decode(native) if native else []))
    return {"texts": len(texts), "ties": ties, "changed": changed, "unsafe": unsafe}
