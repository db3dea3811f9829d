"""Files of rows -> questions to a model: with their answers to measure it by, or without to hear what it says."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.chat import Chat
from common.evaluate import BUILT_IN_PROMPTS, Case, few, is_short, make_case
from common.faults import UserError
from common.order import some_of
from common.records import SHOWN, Bad, parse
from common.rows import FORMS, Row, RowReader
from common.settings import dataset_name
from common.subject import Subject
from common.template_file import facts, read_template_file, role_map

STAND_IN = "?"  # in place of an answer that is missing or not wanted; nobody reads it
Roles = dict[str, str | tuple]


@dataclass
class EvalSet:
    """The questions of one file."""

    name: str
    path: str
    cases: list[Case]
    counts: dict = field(default_factory=dict)


class QuestionReader(RowReader):
    """Rows of any form, mixed too, whose answer may be missing: a stand-in takes its place.

    answers: whether one that is there is read; else it gets the stand-in too, and plain text asks nothing.
    unanswered: after reading, `line` of the rows with a stand-in.
    """

    def __init__(self, path: str, roles: Roles, *, skip_bad_rows: bool = False, answers: bool = False,
                 look: Callable[[dict], None] = lambda record: None):
        """look: sees each object before; may change it, or raise Bad."""
        def edit(record: dict) -> None:
            look(record)
            self._stood_in = self._ask(record)

        super().__init__(path, skip_bad_rows=skip_bad_rows, role_map=roles, edit=edit, mixed=True)
        self.answers, self.unanswered = answers, set()

    def _check_columns(self, records: object) -> None:
        with suppress(UserError):  # the column of answers may be missing; a row that asks nothing is found below
            super()._check_columns(records)

    def _row(self, number: int, record: dict) -> Row | None:
        row = super()._row(number, record)
        if row is not None and self._stood_in:
            self.unanswered.add(row.line)
        return row

    def _ask(self, record: dict) -> bool:
        """Put the stand-in where it belongs; whether there is one."""
        form = next((f for f, keys in FORMS.items() if any(record.get(key) is not None for key in keys)), None)
        if form == "text" and not self.answers:
            raise Bad("plain text asks nothing. Give prompt, or messages.")
        if form in ("messages", "conversations"):
            return self._ask_messages(record, form)
        keys = {"prompt": ("response", "completion"), "instruction": ("output",)}.get(form, ())
        if not keys or self.answers and any(record.get(key) for key in keys):
            return False
        for key in keys[1:]:
            record.pop(key, None)
        record[keys[0]] = STAND_IN
        return True

    def _ask_messages(self, record: dict, form: str) -> bool:
        turns = record[form]
        if self._tabular and isinstance(turns, str):
            turns = parse(turns)
        if not (isinstance(turns, list) and turns):
            return False
        last = turns[-1] if isinstance(turns[-1], dict) else {}
        names = ("from", "value") if "from" in last and "role" not in last else ("role", "content")
        if self.message_reader.roles.get(str(last.get(names[0]))) == "assistant":
            if self.answers:
                return False
            turns = turns[:-1]
        if not turns:
            raise Bad(f'"{form}" asks nothing before the answer. Give what the user says.')
        record[form] = [*turns, {names[0]: "assistant" if names[0] == "role" else "gpt", names[1]: STAND_IN}]
        return True


def question(row: Row, name: str) -> Case:
    """A row of a QuestionReader as a question without a reference."""
    return Case(row, row.source or name, row.messages[:-1], None)


def read_sets(subject: Subject, paths: list[str], roles: Roles, most: int | None, seed: int, skip_bad_rows: bool,
              say: Callable[[str], None], *, to_ask: bool = False) -> list[EvalSet]:
    """The rows of the files, else the run's validation rows; empty where it has none. to_ask: a row without an answer
    is a question."""
    if not paths and subject.run_dir and (subject.run_dir / "val.jsonl").exists():
        paths = [str(subject.run_dir / "val.jsonl")]
        say(f"rows: {paths[0]}, held out from training")
    sets: list[EvalSet] = []
    for path in paths:
        stem = dataset_name(path)
        name = stem if stem not in [s.name for s in sets] else f"{stem}-{len(sets) + 1}"
        if to_ask:
            reader = QuestionReader(path, roles, skip_bad_rows=skip_bad_rows, answers=True)
        else:
            reader = RowReader(path, skip_bad_rows=skip_bad_rows, role_map=roles, mixed=stem in ("val", "test"))
        sets.append(read_set(reader, name, _cases_of(reader), most, seed, say))
    return sets


def _cases_of(reader: RowReader) -> Callable[[Row, str], Case]:
    unanswered = reader.unanswered if isinstance(reader, QuestionReader) else ()
    return lambda row, name: question(row, name) if row.line in unanswered else make_case(row, name)


def read_set(reader: RowReader, name: str, to_case: Callable[[Row, str], Case], most: int | None, seed: int,
             say: Callable[[str], None]) -> EvalSet:
    """Read a file of rows, or a seeded choice of `most` of them in their order. Raises UserError for bad rows."""
    from tqdm import tqdm

    path = str(reader.path)
    rows = list(tqdm(reader, desc=f"reading {path}", unit=" rows", disable=None, leave=False))
    counts = {"rows_in": reader.rows_in, "bad": reader.n_bad, "dropped": dict(reader.dropped), "kept": reader.rows_kept}
    if most and len(rows) > most:
        rows = [rows[i] for i in some_of(len(rows), most, seed)]
    if not rows:
        raise UserError(f"{path}: no row is left to evaluate on.")
    gone = [f"{n:,} {reason}" for reason, n in reader.dropped.items()]
    gone += [f"{reader.n_bad:,} bad"] if reader.n_bad else []
    say(f"{path}: {reader.rows_in:,} rows, {len(rows):,} taken" + (f" (dropped: {'; '.join(gone)})" if gone else ""))
    return EvalSet(name, path, [to_case(row, row.source or name) for row in rows], counts | {"taken": len(rows)})


def keep_renderable(sets: list[EvalSet], chat: Chat, skip_bad_rows: bool | None, say: Callable[[str], None]) -> None:
    """Leave out the rows that the template refuses (a system turn, two turns of one role), or raise UserError.

    skip_bad_rows: None where there is no choice.
    """
    for s in sets:
        try:
            _render(s.cases, chat)
            continue
        except UserError:
            faults = {i: fault for i, case in enumerate(s.cases) if (fault := _fault_of(case, chat))}
        findings = [f"{s.path}:{s.cases[i].row.line}: {fault}" for i, fault in faults.items()][:SHOWN]
        finding = f"{s.path}: the template refuses {len(faults):,} of {len(s.cases):,} rows"
        if not skip_bad_rows or len(faults) == len(s.cases):
            more = f"\n… and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
            way = "Mend the file, or go on without them with --skip_bad_rows." if skip_bad_rows is False else \
                "Mend the file, or take another --prompt_template."
            raise UserError("\n".join(findings) + f"{more}\n{finding}. {way}")
        say("\n".join([*findings, f"{finding}; they are left out"]))
        s.cases = [case for i, case in enumerate(s.cases) if i not in faults]
        s.counts |= {"bad": s.counts.get("bad", 0) + len(faults), "taken": len(s.cases)}


def _render(cases: list[Case], chat: Chat) -> None:
    chat.encode_rows([case.row for case in cases])
    for case in cases:
        if case.context:
            chat.prompt_ids(case.context, case.row.tools)


def _fault_of(case: Case, chat: Chat) -> UserError | None:
    try:
        return _render([case], chat)
    except UserError as fault:
        return fault


def built_in() -> EvalSet:
    """A few prompts for a model without rows."""
    asked = [[{"role": "user", "content": p}] for p in BUILT_IN_PROMPTS]
    return EvalSet("built-in", "", [Case(Row(i, m), "built-in", m, None) for i, m in enumerate(asked, 1)])


def few_prompts(sets: list[EvalSet], count: int, seed: int) -> list[EvalSet]:
    """A seeded choice of `count` different prompts of all sets together."""
    chosen = {id(case) for case in few((c for s in sets for c in s.cases if c.asks(continued=True)), count, seed)}
    if not chosen:
        raise UserError(f"{', '.join(s.path for s in sets)}: no row asks anything. Give rows with a prompt before the "
                        "answer, or plain text.")
    for s in sets:
        s.cases = [case for case in s.cases if id(case) in chosen]
    return [s for s in sets if s.cases]


def roles_of(subject: Subject, asked: str | None = None) -> Roles:
    """The run's names of roles, and those of the template file that is asked for or that it was trained with."""
    template = Path(subject.path) / "chat_template.jinja"
    if asked and asked.endswith((".yaml", ".yml")):
        found = role_map(read_template_file(asked))
    else:
        found = facts(template.read_text(encoding="utf-8"))["roles"] if template.is_file() else {}
    return dict(entry.split("=", 1) for entry in subject.settings.get("role_map", [])) | found


def texts_of(sets: Iterable[EvalSet], most: int = 200) -> list[str]:
    """What the first rows of each set say."""
    texts = [m["content"] for s in sets for case in s.cases[:most] for m in case.row.messages or [] if m["content"]]
    texts += [case.row.text for s in sets for case in s.cases[:most] if case.row.messages is None]
    return texts or [*BUILT_IN_PROMPTS, "1,024 Zeilen\n\tund 3 % mehr: Äpfel, año, Привет, 你好 🙂"]


def train_answers(subject: Subject, say: Callable[[str], None]) -> Counter[str] | None:
    """The short answers in the run's training files, counted; None if there is no run or one of its files is not there,
    or no longer what it was."""
    staged = [d["path"] for stage in subject.settings.get("stages") or [] for d in stage["datasets"]]
    paths = dict.fromkeys([*subject.settings.get("dataset_paths", []), *staged])
    if not all(Path(path).is_file() for path in paths):
        return None
    found: Counter[str] = Counter()
    try:
        for path in paths:
            reader = RowReader(path, skip_bad_rows=True, role_map=roles_of(subject))
            for row in reader:
                case = make_case(row, "")
                if case.context and is_short(case.reference):
                    found[case.reference.strip()] += 1
            if reader.sha256 != subject.fingerprints.get(f"data {dataset_name(path)}"):
                raise UserError(f"{path} is not what was trained on.")
    except (UserError, OSError) as fault:  # what was measured is worth more than this number
        say(f"most frequent answer: of the references, for the training rows cannot be read. {fault}")
        return None
    return found or None
