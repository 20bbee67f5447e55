"""When a reply ends."""

from __future__ import annotations

from typing import Any

from sapwood.engines import Request
from sapwood.errors import EngineError
from sapwood.types import StopReason


class Stopper:
    """Tells why a reply ends with its newest token.

    ends: the model's end tokens; context: tokens that prompt and reply may take together.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], context: int) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._context = context
        self._pieces: dict[int, str] = {}

    def check(self, request: Request) -> None:
        """Raises EngineError for stop strings that can't be honoured."""
        if request.sampling.stop and self._tokenizer is None:
            raise EngineError(f"request {request.id}: stop strings need a tokenizer; give one to the engine.")
        if "" in request.sampling.stop:
            raise EngineError(f"request {request.id}: an empty stop string would end every reply; remove it.")

    def reason(self, request: Request, tokens: list[int]) -> StopReason | None:
        """Why the reply ends here, None if it goes on. tokens: the reply so far, at least one."""
        options, newest = request.sampling, tokens[-1]
        if newest in self._ends and not options.ignore_eos:
            return StopReason.EOS
        if newest in options.stop_token_ids or (options.stop and self._has_stop(tokens, options.stop)):
            return StopReason.STOP
        if len(tokens) >= options.max_new_tokens:
            return StopReason.LENGTH
        if len(request.token_ids) + len(tokens) >= self._context:
            return StopReason.CONTEXT
        return None

    def _has_stop(self, tokens: list[int], stops: tuple[str, ...]) -> bool:
        # A stop string is completed by its last character, so most tokens are told from their own text. A piece of
        # a character decodes to U+FFFD and may complete anything.
        piece = self._piece(tokens[-1])
        ends = [stop for stop in stops if stop[-1] in piece or "\ufffd" in piece]
        if not ends:
            return False
        # A token spells at least one byte; the margin covers a first token whose leading space a decoder drops.
        window = max(len(stop.encode()) for stop in ends) + 4
        text = self._decode(tokens[-window:])
        return any(stop in text for stop in ends)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        return self._pieces[token]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
