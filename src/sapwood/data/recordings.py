"""Recorded decisions: what a model itself said, with the tokens and log-probabilities of its sampling.

    {"format": 1, "kind": "decisions", "model": {...}, "world": {...}, "rank": "value", "gamma": 0.99,
     "prompts": {id: [{"role", "content"}, ...]},
     "decisions": [
    {"prompt": id, "state": str, "reply": str, "action": [...], "token_ids": [T], "sampled_logprobs": [T],
     "kept_logmass": [T], "temperature": float, "reward": float, "return": float, "score": float, "advantage": float,
     "value_target": float, "source": {"file", "task", "step", "reply"}},
    ...
    ]}

JSON in UTF-8 with one decision a line. A decision's prompt is the messages of its id and one more of the user, the
state. `open_recordings` gives them as records whose tokens are those that were sampled; `RecordingGrouper` makes
groups of these. Nothing else may be learnt from in place of them: a trajectory, or a text that no model sampled, is
refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sapwood.chat import Chat
from sapwood.data import LearnsFrom, Record
from sapwood.data.groups import Grouper
from sapwood.data.section import DataSection, SourceSection
from sapwood.data.store import SourceReport
from sapwood.errors import ConfigError, DataError, ModelError, printable
from sapwood.types import Group, Message, StopReason, Task, Trajectory, Turn

FORMAT = 1
KIND = "decisions"
#: Numbers beyond this are no reward, return or log-probability.
LARGEST = 1e9
#: Room for rounding: the log of a probability is at most 0.
_ABOVE_ZERO = 1e-4
#: What tells two models apart; `sapwood.models.identity` fills them in.
IDENTITY = ("name", "adapter", "weights")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One decision that was kept.

    prompt: the id of the messages before the state; state: the user's message; reply: the text; action: the powers.
    token_ids [T], sampled_logprobs [T], kept_logmass [T], temperature: of the sampling. reward: of this step; total:
    the discounted return from here on ("return" in the file); score: by what it was ranked; advantage: 0 or more, by
    how much the score is above the cut, 1 on average over the file; value_target: total less the file's mean, by its
    deviation. source: where it was recorded (file, task, step, reply).
    """

    prompt: str
    state: str
    reply: str
    action: tuple[float, ...]
    token_ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]
    kept_logmass: tuple[float, ...]
    temperature: float
    reward: float
    total: float
    score: float
    advantage: float
    value_target: float
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecisionFile:
    """Decisions of one model. prompts: messages by id; rank: what the score is; source: the file read, for messages."""

    model: Mapping[str, Any]
    world: Mapping[str, Any]
    rank: str
    gamma: float
    prompts: Mapping[str, tuple[Message, ...]]
    decisions: tuple[Recorded, ...]
    source: str = field(default="", compare=False)


# --- files -------------------------------------------------------------------------------------------------------


def chunks(file: DecisionFile) -> Iterator[bytes]:
    """The file's bytes, piece by piece. Raises ValueError for a number that isn't finite."""
    head = {
        "format": FORMAT,
        "kind": KIND,
        "model": dict(file.model),
        "world": dict(file.world),
        "rank": file.rank,
        "gamma": file.gamma,
        "prompts": {
            key: [{"role": m.role, "content": m.content} for m in messages] for key, messages in file.prompts.items()
        },
    }
    yield b"{\n"
    for name, content in head.items():
        yield _json(name) + b": " + _json(content) + b",\n"
    yield b'"decisions": ['
    for number, decision in enumerate(file.decisions):
        plain = {name: getattr(decision, name) for name in Recorded.__dataclass_fields__}
        plain["return"] = plain.pop("total")
        yield (b",\n" if number else b"\n") + _json(plain)
    yield b"\n]\n}\n"


def _json(value: Any) -> bytes:
    # Half of a surrogate pair, which UTF-8 lacks, is escaped as JSON does it.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def read(path: Path | str) -> DecisionFile:
    """Read and check a file. Raises DataError that names the file, the decision and the field."""
    path = Path(path)
    found = _load(path)
    if "controller" in found or "episodes" in found:
        raise DataError(
            f"{path}: holds whole trajectories (of {printable(str(found.get('controller')), 40)!r}), and only a "
            "language model's own decisions that passed the filter are learnt from: make them with `sapwood pipeline "
            "RECIPE --stage distill`."
        )
    try:
        return _file(found, str(path))
    except _Bad as error:
        raise DataError(f"{path}: {error}.") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file of recorded decisions; make one with `sapwood pipeline RECIPE --stage "
            "distill`."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: holds no recorded decisions: it is no UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: holds no recorded decisions, or is cut short: no JSON at line {error.lineno}, column "
            f"{error.colno} ({error.msg})."
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: holds no recorded decisions: its JSON is too deep, or a number too long.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no recorded decisions: it is no JSON object.")
    return found


class _Bad(Exception):
    """What is wrong, and in which field."""


def _bad(name: str, value: Any, wanted: str) -> NoReturn:
    shown = f"a list of {len(value)}" if isinstance(value, list) else repr(printable(str(value), 40))
    raise _Bad(f"{name} is {shown}, not {wanted}")


def _file(found: Mapping[str, Any], source: str) -> DecisionFile:
    if found.get("kind") != KIND or found.get("format") != FORMAT:
        raise _Bad(
            f'it has no "format": {FORMAT} and "kind": "{KIND}", so it holds no recorded decisions that this version '
            "reads; they are made by `sapwood pipeline RECIPE --stage distill`"
        )
    prompts = found.get("prompts")
    if not isinstance(prompts, dict):
        _bad("prompts", prompts, "an object")
    decisions = found.get("decisions")
    if not isinstance(decisions, list) or not decisions:
        _bad("decisions", decisions, "a list of at least one")
    known = {key: _messages(key, messages) for key, messages in prompts.items()}
    made = []
    for number, item in enumerate(decisions, 1):
        try:
            made.append(_decision(item, known))
        except _Bad as error:
            raise _Bad(f"decision {number}: {error}") from None
    return DecisionFile(
        model=_mapping(found, "model"),
        world=_mapping(found, "world"),
        rank=_text(found, "rank"),
        gamma=_number(found, "gamma"),
        prompts=known,
        decisions=tuple(made),
        source=source,
    )


def _messages(key: str, found: Any) -> tuple[Message, ...]:
    if not isinstance(found, list):
        _bad(f"prompts.{printable(key, 40)}", found, "a list of messages")
    for item in found:
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in ("role", "content")):
            _bad(f"prompts.{printable(key, 40)}", item, "a message with role and content")
    return tuple(Message(item["role"], item["content"]) for item in found)


def _decision(found: Any, prompts: Mapping[str, Any]) -> Recorded:
    if not isinstance(found, dict):
        _bad("it", found, "an object")
    names = {"return", *Recorded.__dataclass_fields__} - {"total"}
    unknown = sorted(found.keys() - names)
    if unknown:
        raise _Bad(f"{printable(unknown[0], 40)!r} is no field of it; known: {', '.join(sorted(names))}")
    if found.get("prompt") not in prompts:
        _bad("prompt", found.get("prompt"), "an id of prompts")
    ids = found.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        _bad("token_ids", ids, "a list of at least one token id")
    columns = {name: _logs(found, name, len(ids)) for name in ("sampled_logprobs", "kept_logmass")}
    temperature = _number(found, "temperature")
    if temperature <= 0:
        _bad("temperature", temperature, "above 0: a greedy reply has no probability to learn from")
    advantage = _number(found, "advantage")
    if advantage < 0:
        _bad("advantage", advantage, "0 or more")
    return Recorded(
        prompt=found["prompt"],
        state=_text(found, "state"),
        reply=_text(found, "reply"),
        action=_numbers(found, "action"),
        token_ids=tuple(ids),
        temperature=temperature,
        advantage=advantage,
        reward=_number(found, "reward"),
        total=_number(found, "return"),
        score=_number(found, "score"),
        value_target=_number(found, "value_target"),
        source=_mapping(found, "source"),
        **columns,
    )


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    return value if isinstance(value, dict) else _bad(name, value, "an object")


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else _bad(name, value, "a text")


def _number(found: Mapping[str, Any], name: str) -> float:
    value = found.get(name)
    # A comparison with NaN is false, so it is refused too.
    if (type(value) is not int and type(value) is not float) or not abs(value) <= LARGEST:
        _bad(name, value, f"a number within {LARGEST:g}")
    return float(value)


def _numbers(found: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = found.get(name)
    if not isinstance(values, list) or not all(type(v) in (int, float) and abs(v) <= LARGEST for v in values):
        _bad(name, values, f"a list of numbers within {LARGEST:g}")
    return tuple(map(float, values))


def _logs(found: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    values = _numbers(found, name)
    if len(values) != count:
        raise _Bad(f"{name} has {len(values)} numbers for {count} token_ids; give one each")
    if max(values, default=0.0) > _ABOVE_ZERO:
        _bad(name, max(values), "at most 0, as the log of a probability is")
    return values


# --- records -----------------------------------------------------------------------------------------------------


class RecordingStore:
    """The decisions of one file as records, in the manner of `sapwood.data.store.Store`.

    A record's metadata holds the arrays and numbers of `Recorded` by name.
    """

    def __init__(self, file: DecisionFile, path: str, limit: int | None = None) -> None:
        self.file = file
        self._decisions = file.decisions[:limit]
        self.report = SourceReport(
            path=path,
            read=len(self._decisions),
            kept=len(self._decisions),
            bad=0,
            left_out={},
            duplicates=0,
            shapes={"recording": len(self._decisions)},
            bad_file=Path(os.devnull),
        )

    def __len__(self) -> int:
        return len(self._decisions)

    def __getitem__(self, index: int) -> Record:
        decision = self._decisions[index]
        return Record(
            prompt=(*self.file.prompts[decision.prompt], Message("user", decision.state)),
            replies=((Message("assistant", decision.reply),),),
            rewards=(decision.reward,),
            metadata={"recorded": decision},
            source=self.where(index),
        )

    def where(self, index: int) -> str:
        """File and place of a record."""
        return f"{self.file.source}, decision {index + 1}"

    def prompts(self) -> Iterator[NDArray[np.uint64]]:
        """[N] hashes of prompt and state, so that equal states are never both learnt from and held out."""
        keys = [f"{d.prompt}\n{d.state}".encode("utf-8", "backslashreplace") for d in self._decisions]
        yield np.array([int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys], np.uint64)

    def contents(self) -> NDArray[np.uint64]:
        """[N] hashes of state and reply."""
        keys = [repr((d.prompt, d.state, d.token_ids)).encode() for d in self._decisions]
        return np.array([int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys], np.uint64)


def open_recordings(sources: Sequence[SourceSection], limits: Sequence[int | None]) -> list[RecordingStore]:
    """A store a source. Raises DataError for a file that can't be read, or files of several models."""
    stores = []
    for source, limit in zip(sources, limits, strict=True):
        path = Path(source.path).expanduser()
        stores.append(RecordingStore(read(path), source.path, limit))
    for store in stores[1:]:
        difference = model_difference(stores[0].file.model, store.file.model)
        if difference:
            raise DataError(
                f"data: {stores[0].report.path} and {store.report.path} were recorded of different models "
                f"({difference}), and a model learns from its own decisions only; keep the files of one."
            )
    return stores


def check_section(section: DataSection) -> None:
    """Refuse options of a `data` section that mean nothing for recorded decisions (ConfigError)."""
    nothing = "has no effect on recorded decisions, whose prompts and replies are as they were sampled: remove it"
    for name in ("system", "train_on", "on_bad_record"):
        if getattr(section, name) != DataSection.model_fields[name].default:
            raise ConfigError(f"data.{name} {nothing}.")
    for name in ("long_prompt", "long_reply"):
        if getattr(section, name) not in ("drop", "error"):
            raise ConfigError(
                f"data.{name}: {getattr(section, name)} would cut a decision, whose log-probabilities would be another "
                "text's; use drop or error."
            )
    for number, source in enumerate((*section.sources, *section.eval_sources)):
        for name in SourceSection.model_fields:
            allowed = ("path", "weight", "max_samples")
            if name not in allowed and getattr(source, name) != SourceSection.model_fields[name].default:
                raise ConfigError(f"data.sources[{number}].{name} {nothing}.")


def model_difference(recorded: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two model identities differ, in words; "" where they are the same."""
    for name in IDENTITY:
        if recorded.get(name) != other.get(name):
            return f"{name} {_shown(recorded.get(name))} against {_shown(other.get(name))}"
    return ""


def check_model(stores: Sequence[RecordingStore], identity: Mapping[str, Any]) -> None:
    """Refuse decisions of another model than the one that is about to learn from them (ModelError)."""
    for store in stores:
        difference = model_difference(store.file.model, identity)
        if difference:
            raise ModelError(
                f"{store.report.path}: recorded of another model than the one that would learn from it ({difference}); "
                "train the model that made the recording (model.name and model.init_from, at the same dtype and "
                "quantisation), or record this one with `sapwood pipeline RECIPE --stage rollout`."
            )


def _shown(value: Any) -> str:
    return "none" if value is None else printable(str(value), 60)


@dataclass
class RecordingGrouper:
    """Makes a group of one trajectory of a recorded decision, of the very tokens that were sampled.

    The trajectory's info has `advantage`, `value_target` and `score`. counts: decisions left out as too long.
    """

    chat: Chat
    section: DataSection

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: dict[int, str] = {}

    def group(self, record: Record, index: int) -> Group | None:
        """The decision's group, or None where the length policy drops it. Raises DataError, naming its place."""
        decision: Recorded = record.metadata["recorded"]
        try:
            prompt = self.chat.start(record.prompt)
        except DataError as error:
            raise DataError(f"{record.source}: {error}") from error
        if self._too_long(prompt.size, len(decision.token_ids), record.source):
            return None
        ids = np.array(decision.token_ids, np.int64)
        turn = Turn(
            prompt_ids=prompt,
            token_ids=ids,
            sampled_logprobs=np.array(decision.sampled_logprobs, np.float32),
            kept_logmass=np.array(decision.kept_logmass, np.float32),
            stop_reason=StopReason.EOS if self.chat.ended(ids) else StopReason.STOP,
            text=decision.reply,
            reward=decision.reward,
        )
        task = Task(f"decision-{index}", record.prompt, metadata={"index": index, "source": record.source})
        told = {name: getattr(decision, name) for name in ("advantage", "value_target", "score")}
        trajectory = Trajectory(
            task, [turn], terminated=True, reward=decision.reward, temperature=decision.temperature, info=told
        )
        return Group(task, [trajectory])

    def _too_long(self, prompt: int, reply: int, where: str) -> bool:
        section = self.section
        checks = (
            ("prompt", prompt, section.max_prompt_length or math.inf, section.long_prompt, "data.max_prompt_length"),
            ("decision", prompt + reply, section.max_length or math.inf, section.long_reply, "data.max_length"),
        )
        for what, size, limit, policy, option in checks:
            if size > limit:
                if policy == "error":
                    raise DataError(f"{where}: the {what} has {size} tokens, more than {option} ({limit}); raise it.")
                self.counts[f"dropped for a long {what}"] += 1
                return True
        return False


def grouper_for(learns_from: LearnsFrom, chat: Chat, section: DataSection) -> Grouper | RecordingGrouper:
    """What makes groups of the records that an algorithm of this kind learns from."""
    return RecordingGrouper(chat, section) if learns_from == "recordings" else Grouper(chat, section)
