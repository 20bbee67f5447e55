"""A data source of your own in one file: any function that yields records, named by its path in place of a file's.

A record is a dict in one of the shapes that files have: prompt and response, a pair, a conversation, a prompt with an
answer. Read a database, an API's dump or a format that nobody else has; or make the records up, as here. The function
must end, and give the same records whenever it is called.

    sapwood train examples/custom_data.yaml                  # the recipe beside this file
    sapwood data check examples/custom_data.py:sums          # what is in it: bad records, repeats, lengths
"""

from __future__ import annotations

import random
from collections.abc import Iterator

COUNT = 400


def sums() -> Iterator[dict[str, str]]:
    """Additions with the answer alone: demonstrations for SFT, or prompts with answers for exact_match."""
    drawn = random.Random(0)
    for _ in range(COUNT):
        a, b = drawn.randrange(10, 100), drawn.randrange(10, 100)
        yield {"prompt": f"{a} + {b} =", "response": str(a + b)}


def preferred_sums() -> Iterator[dict[str, str]]:
    """The same with a wrong reply beside the right one: pairs for DPO and reward models."""
    drawn = random.Random(1)
    for record in sums():
        wrong = int(record["response"]) + drawn.choice([-10, -1, 1, 10])
        yield {"prompt": record["prompt"], "chosen": record["response"], "rejected": str(wrong)}
