"""Language models for the pipeline's tests: a tiny one with room for a building's prompts, and one that is scripted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from sapwood.engines import Request
from sapwood.engines.scripted import ScriptedEngine
from sapwood.models.load import ModelChoice, Policy, load_policy
from sapwood.progress import Progress
from tests.chats import tokenizer
from tests.learning import save_tiny_model


def silent() -> Progress:
    """Reports to nobody."""
    return Progress(stream=io.StringIO())


def save_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model with room for a building's prompts."""
    return save_tiny_model(folder, seed, num_hidden_layers=1, max_position_embeddings=4096)


def policy_of(folder: Path) -> Policy:
    return load_policy(ModelChoice(name=str(folder)))


class Player(ScriptedEngine):
    """Says what `reply(member, prompt)` gives; stops working after `limit` replies, as if killed."""

    def __init__(self, reply: Callable[[int, str], str], limit: int | None = None) -> None:
        super().__init__(tokenizer(), lambda prompt, request: reply(int(request.episode.rpartition("/")[2]), prompt))
        self.requests: list[Request] = []
        self.limit = limit

    def submit(self, request: Request) -> None:
        if self.limit is not None and len(self.requests) == self.limit:
            raise KeyboardInterrupt
        self.requests.append(request)
        super().submit(request)
