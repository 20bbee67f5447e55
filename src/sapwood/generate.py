"""Replies to many prompts: batched, written as they come, and continued where a killed run left off.

Every reply has a seed of its own, a function of (seed, prompt's index, sample's index), and prompts are sampled in
fixed chunks, so that what is written doesn't depend on where an earlier run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sapwood.chat import Chat
from sapwood.data.section import DataSection
from sapwood.engines import Completion, Engine, Request, Sampling
from sapwood.envs.prompts import Prompts
from sapwood.errors import BudgetError, ConfigError, DataError, StorageError
from sapwood.opening import Origin, build_chat, locate, make_engine
from sapwood.rollout import turn_seed, until_turn_end
from sapwood.run import writing
from sapwood.types import Message

#: progress(what is under way, done, total)
Progress = Callable[[str, int, int], None]
#: A question: a user's words, or a conversation that ends with the user.
Prompt = str | Sequence[Message | Mapping[str, Any]]

#: Replies that are sampled, and then written, together.
BATCH = 32
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Reply:
    """One reply. text: without special tokens; tokens: how many were sampled, the end token included."""

    text: str
    stop_reason: str
    tokens: int


class JsonLines:
    """A JSONL file that is written aside (`FILE.part`) and appears when whole; without a path, nothing is written.

    job: with it, what an earlier writer with an equal job left aside is kept and `kept` counts its lines; `step` lines
    belong together, and an incomplete step is cut. Raises StorageError where what is aside belongs to another job.
    """

    def __init__(self, path: Path | None, job: Mapping[str, Any] | None = None, step: int = 1) -> None:
        self._path = path
        self._job = None if job is None else json.loads(json.dumps(job, default=str))
        self._step = step
        self._file: IO[bytes] | None = None
        self.kept: list[dict[str, Any]] = []

    def __enter__(self) -> JsonLines:
        if self._path is not None:
            if self._path.is_dir():
                raise StorageError(f"{self._path} is a folder; give the name of a file in it.")
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                size = self._resume() if self._job is not None else 0
                self._file = self._aside.open("r+b" if size else "wb")
                self._file.truncate(size)
                self._file.seek(size)
                if self._job is not None:
                    self._note.write_text(json.dumps(self._job, indent=1, sort_keys=True), encoding="utf-8")
        return self

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append these, in one piece."""
        if self._file is not None and self._path is not None:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            with writing(self._path):
                self._file.write(lines.encode())
                self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self._path is None:
            return
        with writing(self._path):
            self._file.close()
            if kind is None:
                os.replace(self._aside, self._path)
                self._note.unlink(missing_ok=True)
            # After a failure what was played stays readable in the file aside.

    def _resume(self) -> int:
        """Bytes of the file aside that hold whole steps of this job; fills `kept`."""
        if not (self._aside.is_file() and self._note.is_file()):
            return 0
        try:
            before = json.loads(self._note.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if before != self._job:
            assert self._job is not None
            names = [name for name in self._job if before.get(name) != self._job[name]] or ["file"]
            raise StorageError(
                f"{self._aside} was begun with another {', '.join(names)}: repeat the command that began it, delete "
                "the file, or choose another --out."
            )
        lines = self._aside.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn
        lines = lines[: len(lines) // self._step * self._step]
        with contextlib.suppress(ValueError):
            self.kept = [json.loads(line) for line in lines]
            return sum(len(line) + 1 for line in lines)
        raise StorageError(f"{self._aside} holds a line that isn't JSON: delete the file, or choose another --out.")

    @property
    def _aside(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".part")

    @property
    def _note(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".part.json")


def as_messages(prompt: Prompt, where: str, system: str | None = None) -> tuple[Message, ...]:
    """The messages of a prompt, after a system message if given. Raises DataError naming `where`."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty; give it at least one word.")
        messages = [Message("user", prompt)]
    else:
        messages = [_message(item, f"{where}, message {i}") for i, item in enumerate(prompt)]
        if not messages or messages[-1].role == "assistant":
            raise DataError(f"{where}: a conversation must end with the user's message; the reply comes after it.")
    if system is not None:
        if messages[0].role == "system":
            raise DataError(f"{where}: it has a system message of its own, and another was given; remove one.")
        messages = [Message("system", system), *messages]
    return tuple(messages)


def _message(item: Any, where: str) -> Message:
    if isinstance(item, Message):
        item = {"role": item.role, "content": item.content}
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), str):
        raise DataError(f"{where}: must be an object with role and content, both text.")
    if item.get("role") not in ROLES:
        raise DataError(f"{where}: role is {item.get('role')!r}, not one of {', '.join(ROLES)}.")
    return Message(item["role"], item["content"])


def read_prompts(path: Path, prompt_field: str | None = None) -> list[tuple[Message, ...]]:
    """The prompts of a file, in its order: JSONL with a "prompt" a line, or any data that training reads.

    prompt_field: the field that holds the prompt. Raises DataError naming file and line.
    """
    if not path.is_file():
        raise DataError(f"--input: there is no file {str(path)!r}.")
    try:
        if path.suffix == ".jsonl" and _first_has(path, prompt_field or "prompt"):
            family = Prompts(path=path, prompt_field=prompt_field or "prompt")
            return [task.prompt for task in family.ordered()]
        from sapwood.data.dataset import open_data

        source = {"path": str(path), **({"input": prompt_field} if prompt_field else {})}
        options = {"eval_fraction": 0, "shuffle": False, "on_bad_record": "skip"}
        records, _ = open_data(DataSection.model_validate({"sources": [source], **options}), "rollouts", 0, None)
        for problem in records.report.bad_records():
            raise DataError(f"{problem.rstrip('.')}. `sapwood data check` lists every bad record.")
    except DataError as error:  # a recipe's options, which are one here
        said = str(error).replace("set env.prompt_field", "name it by --field").replace("data.input", "--field")
        raise DataError(said) from error
    return [records[i].prompt for i in range(len(records))]


def _first_has(path: Path, name: str) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "{}")
        found = json.loads(first)
    except (OSError, ValueError):
        return True  # the reader of prompts says what is wrong, with its line
    return isinstance(found, dict) and name in found and not {"chosen", "rejected"} & set(found)


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed that is none."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it should be 0 or more.")


def sample(
    engine: Engine,
    chat: Chat,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    seed: int,
    *,
    n: int = 1,
    first: int = 0,
    max_context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Reply]]:
    """`n` replies to every prompt, by prompt. first: the index of prompts[0] in a longer list, for the seeds.

    progress(done) is called as replies finish. Raises BudgetError for a prompt that leaves no room for a reply.
    """
    requests = []
    sampling = until_turn_end(sampling, chat)
    for index, messages in enumerate(prompts, first):
        ids = chat.start(messages)
        _check_room(ids.size, index, sampling, max_context)
        for member in range(n):
            at = (index - first) * n + member
            requests.append(Request(at, ids, sampling, turn_seed(seed, index, member, 0), f"prompt-{index}/{member}"))
    for request in requests:
        engine.submit(request)
    done: dict[int, Completion] = {}
    try:
        while len(done) < len(requests):
            done |= {completion.request_id: completion for completion in engine.step()}
            if progress is not None:
                progress(len(done))
    finally:
        for request in requests:
            engine.close(request.episode)
    replies = [_reply(chat, done[request.id]) for request in requests]
    return [replies[i * n : (i + 1) * n] for i in range(len(prompts))]


def _check_room(size: int, index: int, sampling: Sampling, max_context: int | None) -> None:
    if max_context is not None and size + sampling.max_new_tokens > max_context:
        raise BudgetError(
            f"prompt {index + 1} has {size} tokens, which with {sampling.max_new_tokens} new tokens exceeds the "
            f"model's context of {max_context}: shorten it, or lower --max-new-tokens."
        )


def _reply(chat: Chat, completion: Completion) -> Reply:
    return Reply(chat.decode(completion.token_ids), str(completion.stop_reason), completion.token_ids.size)


def run_generate(
    model: str | Path | Origin,
    prompts: Sequence[Prompt] = (),
    input_path: Path | None = None,
    out_path: Path | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    prompt_field: str | None = None,
    system: str | None = None,
    n: int = 1,
    batch: int = BATCH,
) -> list[dict[str, Any]]:
    """Reply to prompts, or to those of a file, `n` times each and in order.

    Returns records of prompt, reply, stop_reason and tokens (and `sample`, from 0, where n > 1). out_path: a JSONL
    file for them; what an interrupted run of the same job left in FILE.part is kept. batch: replies sampled together.
    Raises ConfigError unless there is exactly one source of prompts.
    """
    if bool(prompts) == (input_path is not None):
        raise ConfigError("give either prompts or an input file with prompts.")
    if n < 1 or batch < 1:
        raise ConfigError(f"n and batch must be at least 1, not {n} and {batch}.")
    check_seed(seed)
    given = read_prompts(input_path, prompt_field) if input_path is not None else list(prompts)
    asked = [as_messages(prompt, f"prompt {i}", system) for i, prompt in enumerate(given, 1)]
    origin = model if isinstance(model, Origin) else locate(model)
    sampling = sampling or Sampling()  # pyright: ignore[reportCallIssue]  (pydantic's positional defaults)
    per_chunk = max(1, batch // n)
    job = {
        "model": _identity(origin),
        "sampling": sampling.model_dump(mode="json"),
        "prompts": _digest([[[m.role, m.content] for m in messages] for messages in asked]),
        "seed": seed,
        "n": n,
        "batch": batch,
    }
    with JsonLines(out_path, job, step=n * per_chunk) as lines:
        told, total = list(lines.kept), len(asked) * n
        told = told[:total]
        if len(told) < total:
            for records in _records(origin, asked, sampling, seed, n, per_chunk, len(told) // n, progress):
                lines.write(*records)
                told += records
    return told


def _records(
    origin: Origin,
    asked: Sequence[tuple[Message, ...]],
    sampling: Sampling,
    seed: int,
    n: int,
    per_chunk: int,
    first: int,
    progress: Progress | None,
) -> Iterator[list[dict[str, Any]]]:
    """The records of every chunk from prompt `first` on."""
    if origin.head != "lm":
        raise ConfigError(f"{origin.name} is a reward model: it scores replies and writes none; name a language model.")
    policy = origin.load()
    chat = build_chat(policy, origin.section)
    for index in range(first, len(asked)):  # a prompt that is too long is told at once, not after hours
        _check_room(chat.start(asked[index]).size, index, sampling, policy.max_context)
    engine = make_engine("local", policy, {})
    for start in range(first, len(asked), per_chunk):
        chunk = asked[start : start + per_chunk]
        replies = sample(
            engine,
            chat,
            chunk,
            sampling,
            seed,
            n=n,
            first=start,
            max_context=policy.max_context,
            progress=progress and _from(progress, start * n, len(asked) * n),
        )
        yield [
            _record(messages, reply, member if n > 1 else None)
            for messages, members in zip(chunk, replies, strict=True)
            for member, reply in enumerate(members)
        ]


def _record(messages: Sequence[Message], reply: Reply, member: int | None) -> dict[str, Any]:
    """prompt: the words where there is nothing else, otherwise the messages."""
    alone = len(messages) == 1
    prompt = messages[0].content if alone else [{"role": m.role, "content": m.content} for m in messages]
    told = {"prompt": prompt, "reply": reply.text, "stop_reason": reply.stop_reason, "tokens": reply.tokens}
    return told if member is None else {**told, "sample": member}


def _from(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress("replies", before + done, total)


def _identity(origin: Origin) -> dict[str, Any]:
    """What tells two models apart: how they are loaded, and the weights' file where it is a local one."""
    from sapwood.models.load import called, find_adapter

    told: dict[str, Any] = {"section": origin.section.model_dump(mode="json")}
    start = origin.section.init_from or Path(origin.section.name)
    if start.is_dir():
        with called(""):
            folder = find_adapter(start)
        files = sorted(folder.glob("*.safetensors"))
        told["weights"] = [
            str(folder.resolve()),
            *(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files),
        ]
    template = origin.section.chat_template
    if template is not None and template.is_file():
        told["template"] = _digest(template.read_text(encoding="utf-8", errors="replace"))
    return told


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
