"""Write the sample: a small text corpus, instruction rows with checkable answers, and two held-out sets.

    python data/sample/make_sample.py                 # -> corpus.txt rows.jsonl heldout.jsonl new_words.jsonl beside it

Everything is generated, so it needs no network and no licence (CC0), and the same seed gives the same bytes.

    corpus      Anna asks Ben: Say it again: lamp boat hat
                Ben says: lamp boat hat.
                Anna asks Ben: Which comes third? lamp boat hat
                Ben says: hat comes third.
    row         {"prompt": "Which comes third? lamp boat hat", "response": "hat", "source": "third", "id": "row-17"}
    heldout     other prompts of the same words: none occurs in rows.jsonl or corpus.txt
    new_words   prompts of nouns that the corpus uses as often as the others and no row ever mentions

The corpus shows the skills in prose. What the rows add is to answer when asked: the bare answer, then the end of the
turn. A base model that only goes on writing prose (sentences with a full stop, one question after the other) scores 0.
"""
from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

NOUNS = "lamp boat hat drum bell coat book rope pear cup fork knife key ring kite ball sail nest gate shoe".split()
NEW_NOUNS = "harp cake fan vase comb pot".split()  # in the corpus as often as the others, in no row
NUMBERS = {3: "three", 4: "four"}
PEOPLE = "Anna Ben Clara David Emma Felix Greta Hugo".split()


class Draw:
    """Seeded choices made of `random()` alone, whose sequence Python promises to keep between versions."""

    def __init__(self, seed: int, purpose: str):
        self.random = random.Random(f"{seed} {purpose}").random

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def one(self, items: list) -> object:
        return items[self.number(0, len(items) - 1)]

    def some(self, items: list, n: int) -> list:
        """n different items in random order."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(n)]


def story(draw: Draw) -> str:
    """One paragraph of the corpus: two people, three questions about the same things, answered in sentences.

    What stands between a question and its answer changes from story to story, so that a model learns to look for the
    list wherever it is, and not a fixed number of words back.
    """
    things = draw.some(NOUNS + NEW_NOUNS, draw.number(3, 4))
    a, b = draw.some(PEOPLE, 2)
    asks, answers = draw.one([("", ""), (f"{a}: ", f"{b}: "), (f"{a} asks {b}: ", f"{b} says: ")])
    listed, n = " ".join(things), NUMBERS[len(things)]
    again = f"Say it again: {listed}", f"{listed}."
    told = draw.some([again, again, (f"Which comes first? {listed}", f"{things[0]} comes first."),
                      (f"Which comes second? {listed}", f"{things[1]} comes second."),
                      (f"Which comes third? {listed}", f"{things[2]} comes third."),
                      (f"How many? {listed}", f"{n} in all.")], 3)
    return "".join(f"{asks}{question}\n{answers}{answer}\n" for question, answer in told)


def _list(question: str, answer: Callable[[list[str]], str]) -> Callable[[Draw, list[str]], tuple[str, str]]:
    def make(draw: Draw, nouns: list[str]) -> tuple[str, str]:
        things = draw.some(nouns, draw.number(3, 4))
        return f"{question} {' '.join(things)}", answer(things)
    return make


SKILLS: dict[str, Callable[[Draw, list[str]], tuple[str, str]]] = {
    "first": _list("Which comes first?", lambda things: things[0]),
    "second": _list("Which comes second?", lambda things: things[1]),
    "third": _list("Which comes third?", lambda things: things[2]),
    "count": _list("How many?", lambda things: NUMBERS[len(things)]),
    "again": _list("Say it again:", " ".join),
}


def questions(draw: Draw, nouns: list[str], n: int, name: str, taken: set[str], text: str) -> list[dict]:
    """n rows, the skills in turn, with prompts neither in `taken` nor anywhere in `text`; adds theirs to `taken`."""
    rows = []
    while len(rows) < n:
        skill = list(SKILLS)[len(rows) % len(SKILLS)]
        prompt, response = SKILLS[skill](draw, nouns)
        if prompt not in taken and prompt not in text:
            taken.add(prompt)
            rows.append({"prompt": prompt, "response": response, "source": skill, "id": f"{name}-{len(rows) + 1}"})
    return rows


def make_sample(seed: int = 0, stories: int = 30_000, rows: int = 6_000, heldout: int = 240) -> dict[str, str]:
    """Return file name -> content; `heldout` rows in each of the two held-out sets."""
    taken: set[str] = set()
    draw = Draw(seed, "corpus")
    corpus = "\n".join(story(draw) for _ in range(stories))
    found = {"rows": questions(Draw(seed, "rows"), NOUNS, rows, "row", taken, "")}
    text = "\n".join([corpus, *taken])
    found["heldout"] = questions(Draw(seed, "heldout"), NOUNS, heldout, "heldout", taken, text)
    found["new_words"] = questions(Draw(seed, "new_words"), NEW_NOUNS, heldout, "new-word", taken, text)
    return {"corpus.txt": corpus} | {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        for name, made in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="default: beside this script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=30_000, help="paragraphs of the corpus")
    parser.add_argument("--rows", type=int, default=6_000, help="instruction rows")
    parser.add_argument("--heldout", type=int, default=240, help="rows of each held-out set")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in make_sample(args.seed, args.stories, args.rows, args.heldout).items():
        part = args.output_dir / f".{name}.part"  # renamed when complete, so that a file is whole or absent
        part.write_text(content, encoding="utf-8", newline="\n")
        os.replace(part, args.output_dir / name)
        print(f"{args.output_dir / name}  {len(content) / 1e6:.2f} MB  {content.count(chr(10)):,} lines")


if __name__ == "__main__":
    main()
