"""Files -> plain objects, strictly: .jsonl .json .csv (each also .gz) and .parquet. Standard library but for parquet.

Every object comes with its number and its line. What is wrong with a line is a finding, not an exception, so that all
bad lines of a file can be counted; what is wrong with the whole file (missing, UTF-16, damaged gzip, no columns) is a
UserError. Accepted without a word: a byte order mark, CRLF, blank lines, no newline at the end.
"""
from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.faults import UserError

LINE_LIMIT = 16 << 20  # bytes; a longer "line" is a file of another kind more often than a row
SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
SHOWN = 20  # findings of a file that are shown; all are counted
BLOCK_BYTES, BLOCK_ROWS = 1 << 19, 1000  # of a block: enough for one call of a tokenizer, little enough for a cache


class Bad(Exception):
    """A finding about one row; the message is a sentence without its place."""


def bad_rows(path: Path, findings: list[str], n_bad: int, rows_in: int) -> UserError:
    """The error for a file with bad rows: the first findings, how many more, and the way out."""
    more = f"\n… and {n_bad - len(findings):,} more" if n_bad > len(findings) else ""
    way = "Mend the file." if n_bad == rows_in else "Mend the file, or go on without them with --skip_bad_rows."
    rows = f"{n_bad:,} of {rows_in:,} rows cannot be used" if rows_in > 1 else "its only row cannot be used"
    return UserError("\n".join(findings) + f"{more}\n{path}: {rows}. {way}")


def kind_of(value: object) -> str:
    """Name a JSON value's type as a person would."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), "a number")


_HALF = re.compile(rb"\\u[dD]")  # what may be half of a surrogate pair


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise Bad(f'the key "{twice}" is there twice. Keep one of them.')
    return record


def _no_constant(name: str) -> None:
    raise Bad(f"{name} is no JSON value. Write a number or null.")


# scan_once(text, start) -> (value, end); runs in C, with one Python call for each object
_scan = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant).scan_once


def parse(text: str) -> object:
    """Decode one JSON text strictly; raise Bad with the finding."""
    try:
        value, end = _scan(text, 0)
        if end == len(text):
            if "\\ud" in text or "\\uD" in text:
                check_surrogates(value)
            return value
    except Bad:
        raise
    except StopIteration as fault:
        raise Bad(f"not JSON at column {fault.value + 1} ({text[fault.value:fault.value + 20]!r}).") from None
    except RecursionError:
        raise Bad("nested too deeply.") from None
    except json.JSONDecodeError as fault:
        raise Bad(f"not JSON at column {fault.pos + 1} ({fault.msg}).") from None
    except ValueError as fault:  # a number of thousands of digits
        raise Bad(f"not JSON ({fault}).") from None
    rest = text[end:].lstrip()
    if rest[:1] in ("{", "["):
        raise Bad(f"two objects on one line (the second at column {len(text) - len(rest) + 1}). "
                  "Give each its own line.")
    raise Bad(f"not JSON at column {end + 1}: {rest[:20]!r} follows the object.")


def check_surrogates(value: object) -> None:
    """Raise Bad if a text anywhere in the value holds half of a surrogate pair, which UTF-8 cannot write."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise Bad(f"\\u{ord(value[fault.start]):04x} is half of a surrogate pair (in {value[:40]!r}). "
                      "Write the whole character.") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_surrogates(key)
            check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            check_surrogates(item)


class _Hashing(io.RawIOBase):
    """A reader's binary file; every byte it gives goes into a sha256 and is counted in the reader's position."""

    def __init__(self, reader: RecordReader):
        self.file, self.reader = reader.path.open("rb", buffering=0), reader
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        n = self.file.readinto(buffer)
        self.digest.update(buffer[:n])
        self.reader.position += n
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


Record = tuple[int, int, "dict | Bad"]  # number, line, object


@dataclass(slots=True)
class Lines:
    """Whole lines of a JSONL file, not yet decoded. before: lines before them in the file."""

    before: int
    content: bytes


class RecordReader:
    """Iterate over (number, line, object or Bad). number: 1-based; the line for JSONL and CSV, else the row.

    line: 1-based line in the file where the object starts (parquet: the row number). Or iterate over blocks(), whose
    decoding (`decoded`) can be left to another process.
    After the last one: .sha256 of the file's bytes, .line_is_row (False for JSON arrays, whose number is not the line).
    columns: parquet only, the columns to read where the file has more.
    Raises UserError for what is wrong with the file as a whole.
    """

    def __init__(self, path: str | Path, *, columns: set[str] | None = None):
        self.path = Path(path)
        self.columns = columns
        self.column_names: list[str] | None = None  # CSV and parquet: known once iteration has begun
        self.sha256: str | None = None
        self.line_is_row = True
        self.line = 1  # where reading is, for faults of the whole file
        self.position = 0  # bytes of the file read so far; parquet: all, once they were hashed
        self.left: dict[str, int] = {}  # parquet: columns that are not read -> rows that hold something there
        self._undecoded = False

    def blocks(self) -> Iterator[Lines | list[Record]]:
        """All records in portions: of JSONL undecoded lines, of other files lists of records."""
        self._undecoded, portion = True, []
        for item in self:
            if isinstance(item, Lines):
                yield item
                continue
            portion.append(item)
            if len(portion) == BLOCK_ROWS:
                yield portion
                portion = []
        if portion:
            yield portion

    def decoded(self, block: Lines | list[Record]) -> Iterator[Record]:
        """The records of a block."""
        return self._jsonl(io.BytesIO(block.content), block.before) if isinstance(block, Lines) else iter(block)

    def __iter__(self) -> Iterator[Record]:
        name = self.path.name.lower()
        zipped = name.endswith(".gz")
        kind = Path(name[:-3] if zipped else name).suffix
        if kind not in (".jsonl", ".json", ".csv", ".parquet") or (zipped and kind == ".parquet"):
            raise UserError(f"{self.path}: not a kind of file that is read. It has to end in {', '.join(SUFFIXES)}.")
        self._check_there()
        if kind == ".parquet":
            yield from self._parquet()
            return
        with _Hashing(self) as raw, io.BufferedReader(raw, 1 << 20) as file:
            head = file.peek(4)[:4]
            if head[:2] == b"\x1f\x8b" and not zipped:
                raise self.fault("gzip data under a plain name. Add .gz to the name, or unpack it.")
            try:
                source = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20) if zipped else file
                yield from self._text_rows(source, kind)
                file.read()
                self.sha256 = raw.digest.hexdigest()
            except (gzip.BadGzipFile, zlib.error, EOFError) as fault:
                raise self.fault(f"damaged gzip data ({fault}). Fetch or pack the file again.") from None

    def fault(self, finding: str) -> UserError:
        return UserError(f"{self.path}:{self.line}: {finding}")

    def _check_there(self) -> None:
        try:
            if self.path.is_dir():
                raise UserError(f"{self.path}: a directory. Name a file in it.")
            with self.path.open("rb"):
                pass
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file. Check the path, or make it with "
                            "scripts/prepare_sft_datasets.py.") from None
        except PermissionError:
            raise UserError(f"{self.path}: no permission to read it. Change it with chmod.") from None
        except OSError as fault:
            raise UserError(f"{self.path}: {fault.strerror}.") from None

    def _text_rows(self, source: io.BufferedReader, kind: str) -> Iterator[Record | Lines]:
        head = source.peek(4)  # gives all that is buffered
        if not head:
            raise self.fault("the file is empty. Put rows in, or leave it out.")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) > 1 and (head[0] == 0) != (head[1] == 0)):
            raise self.fault("UTF-16 or UTF-32 text. Save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
        if kind == ".csv":
            rows = self._csv(source)
        elif kind == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            rows = self._array(source)
        else:  # .json that begins with an object is JSONL under another name, as often on the Hub
            rows = self._lines(source) if self._undecoded else self._jsonl(source)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise self.fault("the file holds no row. Put rows in, or leave it out.")

    def _lines(self, source: io.BufferedReader) -> Iterator[Lines]:
        """JSONL in blocks that end with a line. Of a line over LINE_LIMIT there is only what shows that it is one."""
        before = 0
        while content := source.read(BLOCK_BYTES if before else BLOCK_BYTES // 8):  # on the first only one core works
            self.line, cut = before + 1, False
            if content[-1:] != b"\n":
                content += (rest := source.readline(LINE_LIMIT + 1))
                cut = len(rest) > LINE_LIMIT and rest[-1:] != b"\n"
                while rest and rest[-1:] != b"\n":
                    rest = source.readline(LINE_LIMIT)
            if not content.isspace():
                yield Lines(before, content)
            before += content.count(b"\n") + cut

    def _jsonl(self, source: io.BufferedReader, n: int = 0) -> Iterator[Record]:
        readline, scan = source.readline, _scan
        while raw := readline(LINE_LIMIT + 1):
            n += 1
            self.line = n
            if len(raw) > LINE_LIMIT:
                while raw and raw[-1:] != b"\n":
                    raw = readline(LINE_LIMIT)
                yield n, n, Bad(f"the line is over {LINE_LIMIT >> 20} MB. Cut the row into several.")
                continue
            if n == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            line = raw.strip()
            if not line:
                continue
            try:
                text = line.decode()
                record, end = scan(text, 0)
                if type(record) is not dict or end != len(text):
                    raise ValueError
                if b"\\" in line and _HALF.search(line):
                    check_surrogates(record)
            except (Bad, ValueError, StopIteration, RecursionError):
                yield n, n, _finding(line, complete=raw[-1:] == b"\n")
                continue
            yield n, n, record

    def _array(self, source: io.BufferedReader) -> Iterator[Record]:
        """One JSON array of objects, read as a whole; a fault of its syntax ends it: what follows cannot be trusted."""
        self.line_is_row = False
        try:
            text = source.read().removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as fault:
            self.line = fault.object.count(b"\n", 0, fault.start) + 1
            raise self.fault(_not_utf8(fault)) from None
        skip = json.decoder.WHITESPACE.match
        at, n, seen = skip(text, text.index("[") + 1).end(), 0, 0
        while text[at:at + 1] != "]" or n:
            self.line += text.count("\n", seen, at)
            n, seen = n + 1, at
            try:
                record, end = _scan(text, at)
            except Bad as fault:
                raise self.fault(f"row {n}: {fault}") from None
            except (ValueError, StopIteration, RecursionError) as fault:
                if not text[at:].strip() or getattr(fault, "msg", "").startswith("Unterminated"):
                    raise self.fault(f"row {n}: the array is cut off. Fetch or write the file again.") from None
                column = (getattr(fault, "pos", at)) - text.rfind("\n", 0, getattr(fault, "pos", at))
                self.line += text.count("\n", seen, getattr(fault, "pos", at))
                reason = "NUL byte" if "\0" in text[at:at + 4096] else getattr(fault, "msg", "no value")
                raise self.fault(f"row {n}: not JSON at column {column} ({reason}). Mend the file.") from None
            yield n, self.line, _checked(record, text[at:end])
            at = skip(text, end).end()
            if text[at:at + 1] == "]":
                break
            if text[at:at + 1] != ",":
                self.line += text.count("\n", seen, at)
                finding = "cut off after" if at == len(text) else "no JSON: a comma is missing after"
                raise self.fault(f"row {n}: the array is {finding} this row. Fetch or write the file again.")
            at = skip(text, at + 1).end()
        if text[at + 1:].strip():
            self.line += text.count("\n", seen, at)
            raise self.fault(f"something follows the array: {text[at + 1:].strip()[:20]!r}. Remove it.")

    def _csv(self, source: io.BufferedReader) -> Iterator[Record]:
        findings: list[Bad] = []
        lines = _csv_lines(source, findings)
        csv.field_size_limit(LINE_LIMIT)
        header = source.peek().partition(b"\n")[0]
        separator = next((s for s in (",", ";", "\t") if s.encode() in header), ",")  # Excel's depends on the country
        reader = csv.reader(lines, strict=True, delimiter=separator)
        names: list[str] | None = None
        while True:
            self.line = start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as fault:
                cut = "unexpected end" in str(fault)
                fields = []
                findings.append(Bad("a quotation mark is opened and never closed (the file may be cut off)." if cut else
                                    f"not CSV ({fault})."))
            finding = findings[0] if findings else None
            findings.clear()
            if names is None:
                if finding:
                    raise self.fault(str(finding))
                names = self.column_names = fields
                if len(set(names)) != len(names):
                    raise self.fault(f"a column name is there twice ({', '.join(names)}). Rename one.")
                continue
            if finding is None and fields and len(fields) != len(names):
                finding = Bad(f"{len(fields)} fields, the header has {len(names)} ({', '.join(names)}). "
                              f"Put quotation marks around fields with {separator!r}.")
            if fields or finding:
                yield start, start, finding or dict(zip(names, fields))

    def _parquet(self) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self.path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.position = file.tell()
        try:
            file = pq.ParquetFile(self.path)
            self.column_names = file.schema_arrow.names
            if file.metadata.num_rows == 0:
                raise self.fault("the file holds no row. Put rows in, or leave it out.")
            wanted = [c for c in self.column_names if self.columns is None or c in self.columns]
            typed = [field.name for field in file.schema_arrow if not pa.types.is_null(field.type)]
            self.left = {name: rows for name in typed if name not in wanted
                         if (rows := _rows_with(file.metadata, name))}
            n = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted or self.column_names):
                for record in _batch_rows(batch):
                    n, self.line = n + 1, n + 1
                    yield n, n, record
        except (pa.ArrowException, OSError) as fault:
            raise self.fault(f"not a readable parquet file ({str(fault).splitlines()[0]}). Fetch it again.") from None


def _rows_with(metadata: object, name: str) -> int:
    """How many rows of a parquet file are not null in a column, as far as its statistics tell: else all."""
    rows = metadata.num_rows
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        column = next((c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == name), None)
        if column is not None and column.is_stats_set and column.statistics.has_null_count:
            rows -= column.statistics.null_count
    return rows


def _batch_rows(batch: object) -> list[dict | Bad]:
    """The rows of an Arrow record batch; one with text that is not UTF-8 is a finding of its own."""
    try:
        return [{name: _as_json(value) for name, value in row.items()} for row in batch.to_pylist()]
    except UnicodeDecodeError as fault:
        if len(batch) == 1:
            return [Bad(_not_utf8(fault))]
    return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]


def _as_json(value: object) -> object:
    """What JSON would have held: a struct of Arrow has the fields of every row, null where this one has none, and a map
    comes as a list of pairs."""
    if type(value) is dict:
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    if type(value) is not list:
        return value
    return _as_json(dict(value)) if value and type(value[0]) is tuple else [_as_json(item) for item in value]


def _checked(record: object, text: str) -> dict | Bad:
    if not isinstance(record, dict):
        return _not_object(record)
    try:
        if "\\ud" in text or "\\uD" in text:
            check_surrogates(record)
    except Bad as fault:
        return fault
    return record


def _not_object(value: object) -> Bad:
    hint = " If the whole file is one array, give it a name in .json." if isinstance(value, list) else ""
    kind = "an array" if isinstance(value, list) else kind_of(value)
    return Bad(f"{kind} instead of an object. A row is an object: {{\"prompt\": …, \"response\": …}}.{hint}")


def _not_utf8(fault: UnicodeDecodeError) -> str:
    return (f"not UTF-8 (byte 0x{fault.object[fault.start]:02x} at byte {fault.start + 1}). "
            "Save the file as UTF-8 (iconv -f LATIN1 -t UTF-8).")


def _finding(line: bytes, complete: bool) -> Bad:
    """What is wrong with a JSONL line that could not be read. complete: it ends in a newline."""
    try:
        record = parse(line.decode())
        if not isinstance(record, dict):
            return _not_object(record)
    except UnicodeDecodeError as fault:
        finding, at_end = Bad(_not_utf8(fault)), fault.reason == "unexpected end of data"
    except Bad as fault:
        column = str(fault).partition("at column ")[2].partition(" ")[0]
        at_end = "Unterminated" in str(fault) or column == str(len(line.decode()) + 1)
        finding = fault
        if b"\0" in line:
            return Bad(f"a NUL byte (at byte {line.index(0) + 1}). Remove it; the file may be damaged.")
        if line in (b"{", b"["):
            return Bad(f"not JSON: only {line.decode()!r}. A row has to be on one line; for one array over many lines "
                       "give the file a name in .json.")
    if not complete and at_end:
        return Bad("the last line is cut off. Fetch or write the file again, or remove the line.")
    return finding


def _csv_lines(source: io.BufferedReader, findings: list[Bad]) -> Iterator[str]:
    """Lines as text for the csv module; findings inside one are left in `findings`, so that quoting stays in step."""
    first = True
    while raw := source.readline(LINE_LIMIT + 1):
        raw, first = raw.removeprefix(b"\xef\xbb\xbf") if first else raw, False
        if len(raw) > LINE_LIMIT:
            findings.append(Bad(f"the line is over {LINE_LIMIT >> 20} MB. Cut the row into several."))
            while raw and raw[-1:] != b"\n":
                raw = source.readline(LINE_LIMIT)
            raw = b"-\n"
        if b"\0" in raw:
            findings.append(Bad(f"a NUL byte (at byte {raw.index(0) + 1}). Remove it; the file may be damaged."))
        try:
            yield raw.decode()
        except UnicodeDecodeError as fault:
            findings.append(Bad(_not_utf8(fault)))
            yield raw.decode(errors="replace")
