"""The prompts that all sides get: a shared block and an own part of exactly given lengths in tokens.

Prompts are words that are one token each with the space before them, so that the text (TRL takes text) and the ids
(engines take ids) are the same prompt, whatever the tokenizer merges. Speed does not depend on what the words mean.
"""

from __future__ import annotations

import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """prompts x group samples of new_tokens each, on prompts of shared + own tokens."""

    prompts: int = 4
    group: int = 8
    shared: int = 453
    own: int = 40
    new_tokens: int = 32

    @property
    def rows(self) -> int:
        """Sampled sequences."""
        return self.prompts * self.group

    @property
    def distinct(self) -> int:
        """Distinct tokens when no two samples begin alike."""
        return self.shared + self.prompts * self.own + self.rows * self.new_tokens

    def __str__(self) -> str:
        prompt = f"{self.shared} shared + {self.own} own"
        return f"{self.prompts} prompts x {self.group}, {prompt} tokens, {self.new_tokens} new"


STEP = Shape()
TINY = Shape(prompts=2, group=2, shared=24, own=8, new_tokens=4)


def workload(model: str, shape: Shape, seed: int = 0) -> dict[str, Any]:
    """{"shape", "texts", "prompt_ids", "reply_ids"}: replies are random words, no two of a prompt beginning alike."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    words = sorted(token for token in tokenizer.get_vocab() if re.fullmatch("\u0120[a-z]{3,8}", token))
    ids = {word: tokenizer.token_to_id(word) for word in words}
    rng = random.Random(seed)
    shared = rng.choices(words, k=shape.shared)
    prompts = [[*shared, first, *rng.choices(words, k=shape.own - 1)] for first in rng.sample(words, shape.prompts)]
    texts = ["".join(prompt).replace("\u0120", " ") for prompt in prompts]
    prompt_ids = [[ids[word] for word in prompt] for prompt in prompts]
    for text, expected in zip(texts, prompt_ids, strict=True):
        if tokenizer.encode(text).ids != expected:
            raise ValueError("the tokenizer does not read the prompt's words as one token each")
    replies = []
    for _ in range(shape.prompts):
        for first in rng.sample(words, shape.group):
            replies.append([ids[word] for word in (first, *rng.choices(words, k=shape.new_tokens - 1))])
    return {"shape": asdict(shape), "texts": texts, "prompt_ids": prompt_ids, "reply_ids": replies}
