"""Preference pairs and demonstrations that all sides get: random words of exactly given lengths in tokens.

Every word is one token with the space before it (see _workload.py), so text and ids are the same thing; a reply ends
with the model's end token, which TRL appends itself.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PairShape:
    """pairs of two replies of `answer` tokens each to prompts of `prompt` tokens."""

    pairs: int = 4
    prompt: int = 400
    answer: int = 60

    @property
    def distinct(self) -> int:
        """Distinct tokens: each prompt once."""
        return self.pairs * (self.prompt + 2 * self.answer)

    def __str__(self) -> str:
        return f"{self.pairs} pairs, {self.prompt}-token prompts, {self.answer}-token answers"


@dataclass(frozen=True)
class DemoShape:
    """demos demonstrations with prompts and replies of lengths drawn evenly from the given ranges (both ends in)."""

    demos: int = 16
    prompt: tuple[int, int] = (20, 120)
    answer: tuple[int, int] = (40, 380)

    def __str__(self) -> str:
        prompt, answer = (f"{low} to {high}" for low, high in (self.prompt, self.answer))
        return f"{self.demos} demonstrations, {prompt} + {answer} tokens"


PAIRS, TINY_PAIRS = PairShape(), PairShape(pairs=2, prompt=24, answer=6)
DEMOS, TINY_DEMOS = DemoShape(), DemoShape(demos=4, prompt=(4, 12), answer=(4, 20))


class Words:
    """Random words of a model's vocabulary, one token each."""

    def __init__(self, model: str, seed: int) -> None:
        from tokenizers import Tokenizer

        folder = Path(model)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._words = sorted(w for w in self._tokenizer.get_vocab() if re.fullmatch("\u0120[a-z]{3,8}", w))
        eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
        self._eos = eos if isinstance(eos, str) else eos["content"]
        self._rng = random.Random(seed)

    def length(self, low: int, high: int) -> int:
        """A number from low to high."""
        return self._rng.randint(low, high)

    def firsts(self, count: int) -> list[str]:
        """Distinct words, so that no two texts begin alike."""
        return self._rng.sample(self._words, count)

    def text(self, first: str, tokens: int) -> tuple[str, list[int]]:
        """A text of so many tokens that begins with a word, and its ids."""
        return self._read([first, *self._rng.choices(self._words, k=tokens - 1)])

    def reply(self, first: str, tokens: int) -> tuple[str, list[int]]:
        """The same, whose last token is the end token, which the text leaves out."""
        text, ids = self.text(first, tokens - 1)
        return text, [*ids, self._tokenizer.token_to_id(self._eos)]

    def _read(self, words: list[str]) -> tuple[str, list[int]]:
        text, ids = "".join(words).replace("\u0120", " "), [self._tokenizer.token_to_id(word) for word in words]
        if self._tokenizer.encode(text).ids != ids:
            raise ValueError("the tokenizer does not read the text's words as one token each")
        return text, ids


def pair_workload(model: str, shape: PairShape, seed: int = 0) -> dict[str, Any]:
    """{"shape", "pairs": [{"prompt", "chosen", "rejected", and the same with _ids}]}; no two texts begin alike."""
    words = Words(model, seed)
    pairs = []
    for first in words.firsts(shape.pairs):
        pair: dict[str, Any] = {}
        pair["prompt"], pair["prompt_ids"] = words.text(first, shape.prompt)
        for name, start in zip(("chosen", "rejected"), words.firsts(2), strict=True):
            pair[name], pair[f"{name}_ids"] = words.reply(start, shape.answer)
        pairs.append(pair)
    return {"shape": asdict(shape), "pairs": pairs}


def demo_workload(model: str, shape: DemoShape, seed: int = 0) -> dict[str, Any]:
    """{"shape", "demos": [{"prompt", "answer", and the same with _ids}]}; no two prompts begin alike."""
    words = Words(model, seed)
    demos = []
    for first in words.firsts(shape.demos):
        prompt, prompt_ids = words.text(first, words.length(*shape.prompt))
        answer, answer_ids = words.reply(words.firsts(1)[0], words.length(*shape.answer))
        demos.append({"prompt": prompt, "prompt_ids": prompt_ids, "answer": answer, "answer_ids": answer_ids})
    return {"shape": asdict(shape), "demos": demos}
