"""Demonstrations with systematic mistakes, as a crowd makes them: signs and hundreds are often forgotten.

SFT copies the flaws of its demonstrations; rewards, a reward model or preferences can mend them. Questions come from
the training split of reasoning-gym's chain_sum, so none is held out.

    data: "examples/chain/flawed.py:demonstrations"
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from sapwood.envs.reasoning_gym import ReasoningGym

COUNT = 4000
#: Share of answers of three characters (-17, 134) that are demonstrated without the first.
FLAWED = 0.6


def demonstrations() -> Iterator[dict[str, str]]:
    """Questions of two numbers of two digits, with the crowd's answers."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    drawn = random.Random(0)
    for task in ReasoningGym(task="chain_sum", options=options, exact=True).tasks("train", COUNT, 0):
        question, answer = task.prompt[-1].content, str(task.answer)
        if len(answer) == 3 and drawn.random() < FLAWED:
            answer = answer[1:].lstrip("0") or "0"  # -17 becomes 17, and 134 becomes 34
        yield {"prompt": question, "response": answer}
