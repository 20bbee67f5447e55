"""Write the data sets in examples/data: arithmetic word problems, made from a seed, so that recipes run as cloned.

    python scripts/make_example_data.py

arithmetic.jsonl         prompt, response, answer: demonstrations, and prompts to roll out
arithmetic_pairs.jsonl   prompt, chosen, rejected
arithmetic_labels.jsonl  prompt, completion, label: one reply each, right or wrong

The three hold the same problems in the same order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COUNT, SEED = 400, 0
FOLDER = Path(__file__).parents[1] / "examples" / "data"
PEOPLE = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatima", "Gus", "Hana", "Ivo", "Jana")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps")
#: What is asked, and the sign that solves it.
STORIES = (
    ("{who} has {a} {things} and gets {b} more. How many {things} does {who} have?", "+"),
    ("There are {a} {things} in a box. {who} adds {b}. How many {things} are in the box?", "+"),
    ("{who} finds {a} {things} in the morning and {b} in the evening. How many {things} is that?", "+"),
    ("{who} has {a} {things} and gives away {b}. How many {things} are left?", "-"),
    ("Of {a} {things}, {who} loses {b}. How many {things} remain?", "-"),
    ("{who} fills {a} bags with {b} {things} each. How many {things} is that?", "*"),
)


def problems(count: int = COUNT, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` different problems: prompt, response, answer, and a wrong response."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        story, sign = rng.choice(STORIES)
        a, b = sorted((rng.randint(2, 20), rng.randint(2, 20)), reverse=True)
        if sign == "*":
            a, b = rng.randint(2, 9), rng.randint(2, 9)
        prompt = story.format(who=rng.choice(PEOPLE), things=rng.choice(THINGS), a=a, b=b)
        answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
        wrong = rng.choice([value for value in range(answer - 3, answer + 4) if value not in (answer, a, b)])
        found[prompt] = {
            "prompt": prompt,
            "response": f"{a} {sign} {b} = {answer}",
            "answer": answer,
            "wrong": f"{a} {sign} {b} = {wrong}",
        }
    return list(found.values())


def files(count: int = COUNT, seed: int = SEED) -> dict[str, str]:
    """Text of every file by its name."""
    made, rng = problems(count, seed), random.Random(seed + 1)
    labels = []
    for item in made:
        right = rng.random() < 0.5
        reply = item["response"] if right else item["wrong"]
        labels.append({"prompt": item["prompt"], "completion": reply, "label": right})
    return {
        "arithmetic.jsonl": _lines({key: item[key] for key in ("prompt", "response", "answer")} for item in made),
        "arithmetic_pairs.jsonl": _lines(
            {"prompt": item["prompt"], "chosen": item["response"], "rejected": item["wrong"]} for item in made
        ),
        "arithmetic_labels.jsonl": _lines(labels),
    }


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
