"""The local engine: continuous batching in this process, every shared prefix computed once.

A step admits queued requests (their uncached prompt tokens are prefilled as one trie), then decodes one token for every
running row. Keys and values live in a radix trie of prompts, shared across requests, batches and turns, and in one
right-aligned buffer of private tails. `docs/engines.md` describes what is kept for how long.

    engine = LocalEngine(model, tokenizer, options=LocalOptions())
    completions = engine.generate([Request(0, prompt_ids, Sampling(max_new_tokens=64), seed=1, episode="a")])
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from sapwood.engines import Completion, Engine, Request
from sapwood.engines._cache import PrefixCache, Segment, Tails, common_prefix
from sapwood.engines._plan import Block, Plan, TailBlock, Write
from sapwood.engines._runtime import GenericRuntime, LeanRuntime, Runtime, lean_obstacle
from sapwood.engines._sampling import Draw, draw, uniforms
from sapwood.engines._stopping import Stopper
from sapwood.errors import BudgetError, EngineError
from sapwood.types import Ids

#: Columns of the tails reserved ahead; a longer reply gets more when it needs them.
_ROOM = 256
#: A prompt's last segment is copied into the tails of at most so many readers, if it is not longer than this.
_FEW_READERS = 3
_SHORT_SUFFIX = 256
#: Prompt tokens per forward below which less would save no memory to speak of.
_LEAST_CHUNK = 64


class LocalOptions(BaseModel):
    """Options of the recipe's `engine` section for the local engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_batch: int = Field(default=64, ge=1, description="rows that run at the same time")
    kv_budget_tokens: int = Field(default=65536, ge=1, description="tokens whose keys and values are kept")
    prefill_chunk: int = Field(default=1024, ge=1, description="prompt tokens per forward")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    runtime: Literal["auto", "lean", "generic"] = "auto"

    @property
    def sizes(self) -> dict[str, int]:
        """What `LocalEngine.shrink` makes smaller."""
        return {name: getattr(self, name) for name in ("max_batch", "kv_budget_tokens", "prefill_chunk")}


@dataclass
class EngineStats:
    """Running totals. prefilled_tokens: prompt tokens computed (cached ones cost nothing); seconds are wall-clock."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    evicted_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass
class _Row:
    """A running request. leaf: the shared segment below which it is private; private: segments of its own.

    own_from: depth from which on the row's tail holds its prompt: leaf.end, or less where it owns a copy of the
    last shared segments.
    """

    request: Request
    order: int
    leaf: Segment
    end: Segment
    private: list[Segment]
    u: NDArray[np.float64]
    own_from: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept_logmass: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Kept:
    """An idle episode. tokens [P]: all whose keys and values are held; kv: those below the shared leaf."""

    tokens: Ids
    leaf: Segment
    kv: Tensor


class LocalEngine(Engine):
    """Samples from a transformers causal language model, PEFT-wrapped or not, in this process.

    tokenizer: needed for stop strings only. The policy's weights are read at construction and by `load`; they are
    never written. Raises EngineError for models that no runtime can serve.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, options: LocalOptions | None = None) -> None:
        self.options = self._asked = options or LocalOptions()
        self.stats = EngineStats()
        self._tokenizer = tokenizer
        self._model: Any = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
        self._episodes: dict[str, _Kept] = {}
        self._passing: set[int] = set()
        self._submitted = 0
        # Rows that the admission under way is to run with; rows and kept tokens of the last failure.
        self._joining = 0
        self._in_use = (0, 0)
        self._cache = PrefixCache()
        self._blocks: list[Block] | None = None
        self._runtime: Runtime
        self._tails: Tails
        self.load(model)

    # ---------------------------------------------------------------- contract

    @torch.inference_mode()
    def load(self, policy: Any) -> None:
        """Take the policy's current weights; every cache is invalidated.

        policy: a transformers causal language model, a PEFT model around one, or an object that holds either as
        `.model`. Raises EngineError while requests are running: their past would be another policy's.
        """
        if self._rows:
            raise EngineError(f"load() while {len(self._rows)} requests are running; step until they finish.")
        start = time.perf_counter()
        model = _causal_lm(policy)
        if model is not self._model:
            self._runtime = self._make_runtime(model)
            self._tails = Tails(self._runtime.kv_shape)
            config = model.config.get_text_config()
            self._context = getattr(config, "max_position_embeddings", None) or 2**62
            self._vocab = model.get_input_embeddings().weight.shape[0]
            self._stopper = Stopper(self._tokenizer, _end_tokens(model), self._context)
            self._windowed = getattr(config, "sliding_window", None) is not None
            self._model = model
        self._runtime.load(model)
        self._cache = PrefixCache()
        self._episodes.clear()
        self._blocks = None
        self.stats.load_seconds += time.perf_counter() - start

    def _make_runtime(self, model: Any) -> Runtime:
        obstacle = lean_obstacle(model)
        if self.options.runtime == "lean" and obstacle:
            raise EngineError(f"runtime 'lean' can't serve this model: {obstacle}; use runtime 'auto'.")
        own = model.get_input_embeddings().weight.dtype
        dtype = own if self.options.dtype == "auto" else getattr(torch, self.options.dtype)
        if self.options.runtime != "generic" and not obstacle:
            return LeanRuntime(model, dtype)
        if dtype is not own:
            raise EngineError(
                f"the generic runtime samples in the policy's own dtype; set engine.dtype to auto, not {dtype}."
            )
        return GenericRuntime(model)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineError for options it can't honour and BudgetError for a prompt too long."""
        prompt = request.token_ids
        if not len(prompt):
            raise EngineError(
                f"request {request.id}: an empty prompt has nothing to continue; give it at least one token."
            )
        if len(prompt) >= self._context:
            raise BudgetError(
                f"request {request.id}: its prompt of {len(prompt)} tokens leaves no room in the model's context of "
                f"{self._context}; shorten the prompt."
            )
        if prompt.min() < 0 or prompt.max() >= self._vocab:
            raise EngineError(f"request {request.id}: token ids must lie in 0..{self._vocab - 1}.")
        if not 0 <= request.seed < 2**128:
            raise EngineError(f"request {request.id}: the seed must lie in 0..2^128-1, not {request.seed}.")
        if any(request.id == other.id for other in self._requests()):
            raise EngineError(f"request id {request.id} is taken by a request that hasn't finished.")
        self._stopper.check(request)
        self._waiting.append((self._submitted, request))
        self._submitted += 1

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit what fits, then one token for every running row; those that finished, in order of submission.

        An exception drops every request, episode and cache; the engine stays usable.
        """
        try:
            finished = self._admit()
            if self._rows:
                finished += self._decode()
        except BaseException:
            self._in_use = (self._joining or len(self._rows), self.kept_tokens)
            self._forget()
            raise
        return [completion for _, completion in sorted(finished, key=lambda pair: pair[0])]

    @torch.inference_mode()
    def close(self, episode: str) -> None:
        """Free what is kept for the episode; its queued and running requests are dropped. Unknown names are ignored."""
        kept = self._episodes.pop(episode, None)
        if kept is not None:
            self._cache.release(kept.leaf)
        self._waiting = deque(pair for pair in self._waiting if pair[1].episode != episode)
        for place in range(len(self._rows) - 1, -1, -1):
            if self._rows[place].request.episode == episode:
                self._remove(place)

    def shrink(self) -> bool:
        """Halve what was in use when memory ran out: rows, kept tokens, prompt tokens per forward. False at one row."""
        self._forget()
        options, (rows, tokens) = self.options, self._in_use
        self._in_use = (0, 0)
        if options.max_batch == 1 and options.prefill_chunk <= _LEAST_CHUNK:
            return False
        changes = {
            "max_batch": max(min(options.max_batch, rows or options.max_batch) // 2, 1),
            "kv_budget_tokens": max(min(options.kv_budget_tokens, tokens or options.kv_budget_tokens) // 2, 1),
            "prefill_chunk": max(options.prefill_chunk // 2, min(_LEAST_CHUNK, options.prefill_chunk)),
        }
        self.options = options.model_copy(update=changes)
        return True

    def state(self) -> dict[str, Any]:
        """The sizes asked for and those that `shrink` left, where it was called."""
        if self.options == self._asked:
            return {}
        return {"asked": self._asked.sizes, "taken": self.options.sizes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, unless other sizes are asked for by now."""
        if state and state["asked"] == self._asked.sizes:
            self.options = self.options.model_copy(update={name: int(size) for name, size in state["taken"].items()})

    def _forget(self) -> None:
        """Drop every request, episode and cache, and the memory that they take."""
        self._rows.clear()
        self._waiting.clear()
        self._episodes.clear()
        self._passing.clear()
        self._cache = PrefixCache()
        self._tails = Tails(self._runtime.kv_shape)
        self._blocks = None
        self._joining = 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample all requests; completions in the order of the requests. Their episodes are closed, also on errors."""
        self._passing.update(request.id for request in requests)
        try:
            return super().generate(requests)
        finally:
            self._passing.clear()
            for request in requests:
                self.close(request.episode)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values are held: cached prompts, idle episodes and running rows."""
        idle = sum(kept.kv.shape[3] for kept in self._episodes.values())
        return self._cache.tokens + idle + sum(self._tails.lengths)

    def _requests(self) -> Iterable[Request]:
        yield from (request for _, request in self._waiting)
        yield from (row.request for row in self._rows)

    # ---------------------------------------------------------------- admission and prefill

    def _admit(self) -> list[tuple[int, Completion]]:
        if not self._waiting or len(self._rows) >= self.options.max_batch:
            return []
        start = time.perf_counter()
        in_use = self._cache.held() + sum(self._tails.lengths) + sum(_to_come(row) for row in self._rows)
        joining: list[_Row] = []
        while self._waiting and len(self._rows) + len(joining) < self.options.max_batch:
            order, request = self._waiting[0]
            need = self._cache.missing(request.token_ids) + request.sampling.max_new_tokens
            if in_use + need > self.options.kv_budget_tokens and (self._rows or joining):
                break
            in_use += need
            self._waiting.popleft()
            joining.append(self._place(order, request))
        if not joining:
            return []
        self._joining = len(self._rows) + len(joining)
        self._make_room()
        self._prefill(joining)
        ends = list({id(row.end): row.end for row in joining}.values())
        logits = self._runtime.logits(torch.stack([_known(end.hidden) for end in ends]))
        if len(ends) < len(joining):
            number = {id(end): i for i, end in enumerate(ends)}
            logits = logits[torch.tensor([number[id(row.end)] for row in joining], device=logits.device)]
        room = min(_ROOM, max(_to_come(row) for row in [*self._rows, *joining]))
        owned = _own_short_suffixes(joining)
        histories = [[*own, *row.private] for own, row in zip(owned, joining, strict=True)]
        self._tails.add([[_known(segment.kv) for segment in history] for history in histories], room)
        first = len(self._rows)
        self._rows += joining
        self._joining = 0
        self._blocks = None
        finished = self._accept(first, logits)
        self.stats.prefill_seconds += time.perf_counter() - start
        return finished

    def _place(self, order: int, request: Request) -> _Row:
        """Find the longest known prefix: what the episode kept, or the shared trie."""
        prompt = np.asarray(request.token_ids, np.int64)
        u = uniforms(request.seed, request.sampling.max_new_tokens)
        kept = self._episodes.pop(request.episode, None)
        if kept is not None:
            depth = kept.leaf.end
            known = min(common_prefix(prompt, kept.tokens), len(prompt) - 1)
            if known > max(depth, len(prompt) - self._cache.missing(prompt)):
                history = Segment(prompt[depth:known], depth, kept.leaf)
                history.hold(kept.kv[:, :, :, : known - depth])
                history.ready = known - depth
                fresh = Segment(prompt[known:], known, history)
                return _Row(request, order, kept.leaf, fresh, [history, fresh], u)
            self._cache.release(kept.leaf)
        leaf = self._cache.insert(prompt)
        self._cache.retain(leaf)
        return _Row(request, order, leaf, leaf, [], u)

    def _make_room(self) -> None:
        """Evict down to the budget: unused prompts first, then idle episodes, the longest idle first."""
        surplus = self.kept_tokens - self.options.kv_budget_tokens
        while surplus > 0:
            freed = self._cache.evict(surplus)
            surplus -= freed
            self.stats.evicted_tokens += freed
            if surplus <= 0 or not self._episodes:
                return
            kept = self._episodes.pop(next(iter(self._episodes)))
            self._cache.release(kept.leaf)
            surplus -= kept.kv.shape[3]
            self.stats.evicted_tokens += kept.kv.shape[3]

    def _prefill(self, rows: Sequence[_Row]) -> None:
        """Compute every uncached token of the rows' prompts once, parents before children."""
        ends = {id(row.end) for row in rows}
        pieces: list[_Piece] = []
        limit, room = self.options.prefill_chunk, self.options.prefill_chunk
        for node in _in_depth_first_order(rows):
            begin, length = node.ready, len(node.tokens)
            if begin == length:
                if id(node) not in ends or node.hidden is not None:
                    continue
                # The prompt ends inside what was computed for a longer one: only its last hidden state is missing.
                begin = length - 1
            while begin < length:
                stop = min(length, begin + room)
                pieces.append(_Piece(node, begin, stop, node.ready == length))
                room -= stop - begin
                begin = stop
                if not room:
                    self._compute(pieces, ends)
                    pieces, room = [], limit
        if pieces:
            self._compute(pieces, ends)

    def _compute(self, pieces: list[_Piece], ends: set[int]) -> None:
        shape = self._runtime.kv_shape
        for piece in pieces:
            if piece.node.kv is None:
                piece.node.hold(shape.empty(shape.heads, len(piece.node.tokens)))
        plan, sampled = _prefill_plan(pieces, ends, shape.device)
        hidden = self._runtime.forward(plan)
        for node, state in zip(sampled, hidden, strict=True):
            node.hidden = state.clone()
        for piece in pieces:
            piece.node.ready = max(piece.node.ready, piece.stop)
        self.stats.prefilled_tokens += sum(piece.stop - piece.begin for piece in pieces)

    # ---------------------------------------------------------------- decoding

    def _decode(self) -> list[tuple[int, Completion]]:
        start = time.perf_counter()
        rows, device = self._rows, self._runtime.kv_shape.device
        positions = [len(row.request.token_ids) + len(row.tokens) - 1 for row in rows]
        if self._tails.full:
            self._tails.reserve(min(_ROOM, max(_to_come(row) for row in rows)))
        keys, values = self._tails.layers()
        column = self._tails.column
        if self._blocks is None or self._windowed:
            self._blocks = _shared_blocks(rows, positions, device)
        plan = Plan(
            tokens=torch.tensor([row.tokens[-1] for row in rows], device=device),
            positions=torch.tensor(positions, device=device),
            blocks=self._blocks,
            tail=TailBlock(keys, values, self._tails.base, column, self._tails.mask()),
        )
        logits = self._runtime.logits(self._runtime.forward(plan))
        self._tails.advance()
        finished = self._accept(0, logits)
        self.stats.decode_seconds += time.perf_counter() - start
        self.stats.decode_steps += 1
        return finished

    def _accept(self, first: int, logits: Tensor) -> list[tuple[int, Completion]]:
        """Draw a token for each row from `first` on, logits [rows, V]; retire the rows that end with it."""
        rows = self._rows[first:]
        u = np.array([row.u[len(row.tokens)] for row in rows])
        drawn: Draw = draw(logits, [row.request.sampling for row in rows], u)
        self.stats.decoded_tokens += len(rows)
        finished = []
        for place in range(len(rows) - 1, -1, -1):
            row = rows[place]
            row.tokens.append(int(drawn.token_ids[place]))
            row.logprobs.append(float(drawn.logprobs[place]))
            row.kept_logmass.append(float(drawn.kept_logmass[place]))
            reason = self._stopper.reason(row.request, row.tokens)
            if reason is None:
                continue
            finished.append(
                (
                    row.order,
                    Completion(
                        row.request.id,
                        np.array(row.tokens, np.int64),
                        np.array(row.logprobs, np.float32),
                        np.array(row.kept_logmass, np.float32),
                        reason,
                    ),
                )
            )
            self._retire(first + place)
        return finished

    def _retire(self, place: int) -> None:
        """Keep the row's keys and values for its episode, then remove it."""
        row = self._rows[place]
        name = row.request.episode
        if row.request.id not in self._passing:
            before = self._episodes.pop(name, None)
            if before is not None:
                self._cache.release(before.leaf)
            # The last sampled token was never fed to the model, so nothing is known of it.
            tokens = np.concatenate([row.request.token_ids, np.array(row.tokens[:-1], np.int64)])
            self._cache.retain(row.leaf)
            below_leaf = self._tails.take(place)[:, :, :, row.leaf.end - row.own_from :]
            self._episodes[name] = _Kept(tokens, row.leaf, below_leaf)
        self._remove(place)

    def _remove(self, place: int) -> None:
        self._cache.release(self._rows[place].leaf)
        self._tails.remove(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last
        self._blocks = None


@dataclass(frozen=True)
class _Piece:
    """Tokens begin:stop of a segment in one forward. again: they are computed already, only queries are wanted."""

    node: Segment
    begin: int
    stop: int
    again: bool


def _in_depth_first_order(rows: Sequence[_Row]) -> list[Segment]:
    """All segments on the rows' paths, each before its children, subtrees contiguous."""
    children: dict[int, list[Segment]] = {}
    tops: list[Segment] = []
    seen: set[int] = set()
    for row in rows:
        siblings = tops
        for node in row.end.path():
            if id(node) not in seen:
                seen.add(id(node))
                siblings.append(node)
            siblings = children.setdefault(id(node), [])
    order: list[Segment] = []
    stack = tops[::-1]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(children[id(node)][::-1])
    return order


def _prefill_plan(pieces: Sequence[_Piece], ends: set[int], device: torch.device) -> tuple[Plan, list[Segment]]:
    """The plan of one prefill forward, and the segments whose last hidden state it yields, in order."""
    readers = _Readers()
    last_readers = _Readers()
    own: list[Block] = []
    writes: list[Write] = []
    sampled: list[Segment] = []
    sample: list[int] = []
    tokens, positions = [], []
    a = 0
    for piece in pieces:
        node, b = piece.node, a + piece.stop - piece.begin
        low, high = node.start + piece.begin, node.start + piece.stop - 1
        path = node.path()
        for ancestor in path if piece.again else path[:-1]:
            readers.add(ancestor, a, b, low, high)
        if not piece.again:
            part = slice(piece.begin, piece.stop)
            keys, values = [k[:, part] for k in node.keys], [v[:, part] for v in node.values]
            writes.append(Write(a, b, keys, values))
            own.append(Block(slice(a, b), keys, values, low, low, high, causal=True))
            if piece.begin:
                past = [k[:, : piece.begin] for k in node.keys], [v[:, : piece.begin] for v in node.values]
                own.append(Block(slice(a, b), *past, node.start, low, high))
        if piece.stop == len(node.tokens) and id(node) in ends:
            for ancestor in path:
                last_readers.add(ancestor, len(sample), len(sample) + 1, high, high)
            sampled.append(node)
            sample.append(b - 1)
        tokens.append(node.tokens[piece.begin : piece.stop])
        positions.append(np.arange(low, high + 1))
        a = b
    token_ids = torch.from_numpy(np.concatenate(tokens)).to(device)
    where = torch.from_numpy(np.concatenate(positions)).to(device)
    index = torch.tensor(sample, dtype=torch.long, device=device)
    last = Plan(token_ids[index], where[index], last_readers.blocks(device)) if sample else None
    return Plan(token_ids, where, readers.blocks(device) + own, writes, sample=index, last=last), sampled


def _shared_blocks(rows: Sequence[_Row], positions: Sequence[int], device: torch.device) -> list[Block]:
    """One block for each shared segment that running rows read, shallow ones first."""
    readers = _Readers()
    for place, row in enumerate(rows):
        for node in row.leaf.path():
            if node.start < row.own_from:
                readers.add(node, place, place + 1, positions[place], positions[place])
    return readers.blocks(device)


def _own_short_suffixes(rows: Sequence[_Row]) -> list[list[Segment]]:
    """Let rows that join own the end of their prompt where few others read it; the segments to copy, row by row.

    A block costs one attention call a layer in every decode step; a copy in the row's tail costs only its bytes.
    """
    readers = Counter(id(node) for row in rows for node in row.leaf.path())
    owned: list[list[Segment]] = []
    for row in rows:
        own: list[Segment] = []
        for node in reversed(row.leaf.path()):
            if readers[id(node)] > _FEW_READERS or len(node.tokens) > _SHORT_SUFFIX:
                break
            own.insert(0, node)
        row.own_from = own[0].start if own else row.leaf.end
        owned.append(own)
    return owned


class _Readers:
    """Which queries read which whole segments."""

    def __init__(self) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._nodes: dict[int, Segment] = {}
        self._span: dict[int, tuple[int, int]] = {}

    def add(self, node: Segment, a: int, b: int, low: int, high: int) -> None:
        """Queries a:b, at positions low to high, read the segment. Calls come with a growing."""
        self._nodes[id(node)] = node
        ranges = self._ranges.setdefault(id(node), [])
        if ranges and ranges[-1][1] == a:
            ranges[-1] = (ranges[-1][0], b)
        else:
            ranges.append((a, b))
        before = self._span.get(id(node), (low, high))
        self._span[id(node)] = (min(low, before[0]), max(high, before[1]))

    def blocks(self, device: torch.device) -> list[Block]:
        """One block a segment, in order of depth."""
        made = []
        for key, node in sorted(self._nodes.items(), key=lambda item: item[1].start):
            ranges = self._ranges[key]
            if len(ranges) == 1:
                rows: slice | Tensor = slice(*ranges[0])
            else:
                rows = torch.cat([torch.arange(a, b, device=device) for a, b in ranges])
            made.append(Block(rows, node.keys, node.values, node.start, *self._span[key]))
        return made


def _to_come(row: _Row) -> int:
    return row.request.sampling.max_new_tokens - len(row.tokens)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _causal_lm(policy: Any) -> Any:
    """The transformers model behind a policy."""
    if isinstance(policy, PreTrainedModel):
        return policy
    if hasattr(policy, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in policy.peft_config.values()):
            raise EngineError("the local engine can't sample with prompt-learning adapters; use LoRA.")
        return policy.get_base_model()
    inner = getattr(policy, "model", None)
    if inner is None:
        raise EngineError(f"the local engine needs a transformers causal language model, not {type(policy).__name__}.")
    return _causal_lm(inner)


def _end_tokens(model: Any) -> frozenset[int]:
    """End tokens by the generation config, or else by the model config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


PLUGIN = LocalEngine
OPTIONS = LocalOptions
