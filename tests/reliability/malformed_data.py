"""Data files that are cut short, garbled, mixed or something else, in every format and for every command."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.reliability.fuzz import Case, Way
from tests.reliability.malformed_recipes import cli, import_plugins
from tests.reliability.mutate import JSON_VALUES, MARK, damage, encodings, misspelt, no_file, places, put, remove

_folder = Path()

_HH = "\n\nHuman: what is {}?\n\nAssistant: it is {}"
#: Valid records by shape, eight of each.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "reply": [{"prompt": f"{i}+1", "response": str(i + 1), "level": i} for i in range(8)],
    "instruction": [{"instruction": f"add {i}", "input": "1", "output": f"sum {i}"} for i in range(8)],
    "messages": [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}], "system": "be"}
        for i in range(8)
    ],
    "shared": [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]} for i in range(8)
    ],
    "pair": [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": 0.5} for i in range(8)],
    "scored pair": [
        {
            "chosen": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "no"}],
            "score_chosen": 5,
            "score_rejected": i % 4,
        }
        for i in range(8)
    ],
    "transcripts": [{"chosen": _HH.format(i, "so"), "rejected": _HH.format(i, "not so")} for i in range(8)],
    "label": [{"prompt": f"p{i}", "completion": f"c{i}", "label": bool(i % 2)} for i in range(8)],
    "answer": [{"prompt": f"{i}+{i}=", "answer": 2 * i, "tags": ["a", {"b": None}]} for i in range(8)],
    "history": [{"prompt": f"p{i}", "response": "r", "history": [["q", "a"], ["q2", "a2"]]} for i in range(8)],
}
LEARNS = ("rollouts", "demonstrations", "pairs", "labels")


def prepare(folder: Path) -> None:
    """Import the readers; a tokenizer for those who measure tokens."""
    global _folder
    _folder = folder
    import pyarrow.parquet  # noqa: F401

    import sapwood.data.check
    import sapwood.data.dataset
    import sapwood.data.pairs
    import sapwood.data.prepare  # noqa: F401
    from tests.chats import tokenizer

    import_plugins()
    tokenizer()


# --- valid files -------------------------------------------------------------------------------------------------


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        [{k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in row.items()} for row in rows]
    )
    return out.getvalue().encode()


def _columns(rows: list[dict[str, Any]], ipc: bool = False, **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    if ipc:
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, out, **options)
    return out.getvalue()


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a column can't hold in one type."""
    return [{key: value for key, value in row.items() if key != "tags"} for row in rows]


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "data.jsonl": _lines,
    "data.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "several.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "data.jsonl.gz": lambda rows: gzip.compress(_lines(rows), mtime=0),
    "data.csv": lambda rows: _table(rows, ","),
    "data.tsv": lambda rows: _table(rows, "\t"),
    "data.parquet": lambda rows: _columns(_plain(rows)),
    "plain.parquet": lambda rows: _columns(_plain(rows), compression="none", use_dictionary=False),
    "data.arrow": lambda rows: _columns(_plain(rows), ipc=True),
}


@lru_cache(None)
def valid(shape: str, name: str) -> bytes:
    """The records of a shape in a format."""
    return FORMATS[name](RECORDS[shape])


def _read(rng: random.Random, name: str) -> Case:
    """One of the ways in which a data file is read."""
    if rng.random() < 0.5:
        more = ["--json"] if rng.random() < 0.3 else []
        return Case(cli("data", "check", name, *more), (name,), report=True)
    skip, learns = rng.choice(("error", "skip")), rng.choice(LEARNS)
    return Case(told(lambda: _learn(name, learns, skip)), (name, "data"))


def _learn(name: str, learns: str, skip: str) -> None:
    """All that training reads of a file."""
    from sapwood.data.dataset import open_data
    from sapwood.data.section import DataSection

    section = DataSection.model_validate({"path": name, "on_bad_record": skip, "eval_fraction": 0.3})
    train, held_out = open_data(section, learns, 0)  # pyright: ignore[reportArgumentType]
    for part in (train, held_out):
        for record in part:
            hash((record.prompt, record.replies))
    print("\n".join(train.report.lines()), json.dumps(train.report.to_json()))


def told(function: Callable[[], Any]) -> Callable[[], int]:
    """A library's function as the command line would end it: its errors are sentences."""
    import sys

    def run() -> int:
        from sapwood.errors import SapwoodError

        try:
            function()
        except SapwoodError as error:
            print(f"sapwood: {error}", file=sys.stderr)
            return 1
        except Exception:
            traceback.print_exc()
            return 70
        return 0

    return run


def _some(rng: random.Random) -> tuple[str, str]:
    return rng.choice(list(RECORDS)), rng.choice(list(FORMATS))


# --- ways --------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, folder: Path) -> Case:
    """Bytes flipped, lost, repeated or put in, in any format."""
    shape, name = _some(rng)
    (folder / name).write_bytes(damage(valid(shape, name), rng))
    return _read(rng, name)


def cut(rng: random.Random, folder: Path) -> Case:
    """A file that ends early, begins late or holds another one's end."""
    shape, name = _some(rng)
    content = valid(shape, name)
    at = rng.randrange(len(content))
    other = valid(rng.choice(list(RECORDS)), rng.choice(list(FORMATS)))
    made = rng.choice((content[:at], content[at:], content[:at] + other[at:], content + other, content + content[:at]))
    (folder / name).write_bytes(made)
    return _read(rng, name)


def wrong_field(rng: random.Random, folder: Path) -> Case:
    """A value that no field means, in one record or in all."""
    shape = rng.choice(list(RECORDS))
    rows = json.loads(json.dumps(RECORDS[shape]))
    place = rng.choice(list(places(rows[2])))
    put(rows[2], place, MARK)
    value = rng.choice(JSON_VALUES)
    name = rng.choice(("data.jsonl", "data.json", "data.jsonl.gz", "several.json"))
    text = FORMATS[name](rows) if name != "data.jsonl.gz" else _lines(rows)
    made = text.decode().replace(f'"{MARK}"', value).encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(gzip.compress(made) if name.endswith(".gz") else made)
    return _read(rng, name)


def wrong_fields(rng: random.Random, folder: Path) -> Case:
    """Fields that are missing, misspelt, of other shapes, or records that are none."""
    rows = [json.loads(json.dumps(rng.choice(RECORDS[rng.choice(list(RECORDS))]))) for _ in range(rng.randint(1, 6))]
    for row in rows:
        place = rng.choice(list(places(row)))
        match rng.randrange(4):
            case 0:
                remove(row, place)
            case 1 if isinstance(place[-1], str):
                row[misspelt(str(place[0]), rng)] = row.pop(place[0])
            case 2:
                row[rng.choice(("image", "label", "history", "role", "", "\ud800", "\x1b[2J"))] = rng.choice(
                    ([1], {"bytes": "x"}, "x", None, [["q"]], [["q", 1, 2]], "yes", -1)
                )
            case _:
                pass
    lines = [json.dumps(row) for row in rows]
    for _ in range(rng.randint(0, 3)):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(JSON_VALUES).replace("\n", " "))
    name = rng.choice(("data.jsonl", "data.json"))
    made = "\n".join(lines) if name == "data.jsonl" else "[" + ",\n".join(lines) + "]"
    (folder / name).write_text(made + "\n")
    return _read(rng, name)


def encoded(rng: random.Random, folder: Path) -> Case:
    """In another encoding, or something else under the name."""
    shape, name = _some(rng)
    source = valid(shape, rng.choice(("data.jsonl", "data.json", "data.csv"))).decode()
    found = encodings(source)
    (folder / name).write_bytes(found[rng.choice(list(found))])
    return _read(rng, name)


def misnamed(rng: random.Random, folder: Path) -> Case:
    """One format under the name of another, or of none, or a packed file within a packed file."""
    content = valid(*_some(rng))
    if rng.random() < 0.3:
        content = gzip.compress(gzip.compress(content))
    name = rng.choice(
        (*FORMATS, "data", "data.txt", "data.gz", "data.json.bz2", "data.parquet.gz", ".jsonl", "a\nb.csv")
    )
    (folder / name).write_bytes(content)
    return _read(rng, name)


def tables(rng: random.Random, folder: Path) -> Case:
    """CSV with quotes, columns and lines that don't fit."""
    text = valid(rng.choice(("reply", "pair", "label")), "data.csv").decode()
    lines = text.splitlines(keepends=True)
    chosen = rng.choice(
        (
            text.replace(",", ',"', 3),
            text + '"open,quote\nnever closed\n',
            text + "a,b,c,d,e,f,g\n",
            text + "one\n",
            lines[0].split(",")[0] + "," + text,
            "\n\n" + text,
            ",,\n" + text,
            lines[0],
            '""\n',
            '"a"b,c\n1,2\n',
            text + "x" * 500_000 + ",1,2\n",
            text.replace("\r\n", "\r"),
            text.replace("1", "\0", 1),
            text.replace("1", "\x1b[2J", 1),
            text.replace("2", '"' + "a\n" * 3000 + '"', 1),
            text.replace(",", "\x1f"),
            "\ufeff" + text + "\ufeff" + text,
            ",".join(f"c{i}" for i in range(20_000)) + "\n" + ",".join("1" * 20_000) + "\n",
            "prompt,response\n" + ",\n" * 50,
            "prompt,response\nnan,NaN\n",
        )
    )
    name = rng.choice(("data.csv", "data.tsv"))
    (folder / name).write_bytes(damage(chosen.encode(), rng) if rng.random() < 0.3 else chosen.encode())
    return _read(rng, name)


def columns(rng: random.Random, folder: Path) -> Case:
    """Parquet of types that no record has, and Parquet with its footer garbled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = "data.parquet"
    rows = _plain(RECORDS[rng.choice(list(RECORDS))])
    content = valid(rng.choice(list(RECORDS)), name)
    if rng.random() < 0.5:
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        made = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            made[rng.randrange(footer, len(made) - 4)] = rng.choice((0, 255, 128, rng.randrange(256)))
        if rng.random() < 0.2:
            made[-8:-4] = rng.choice((0, 2**31 - 1, 2**32 - 1, len(made))).to_bytes(4, "little")
        (folder / name).write_bytes(bytes(made))
        return _read(rng, name)
    count = len(rows)
    odd = rng.choice(
        (
            pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"]).buffers()[1:]]).take([0] * count),
            pa.array([2**62] * count, pa.timestamp("us")),
            pa.array([-(2**62)] * count, pa.timestamp("ns", "Europe/Berlin")),
            pa.array([2**62] * count, pa.timestamp("ns", "No/Where")),
            pa.array([10**6] * count, pa.int32()).cast(pa.date32()),
            pa.array([b"x"] * count, pa.binary(1)),
            pa.array([None] * count, pa.null()),
            pa.array([float("nan")] * count, pa.float32()),
            pa.array([[("k", 1), ("k", 2)]] * count, pa.map_(pa.string(), pa.int64())),
            pa.array([2**40] * count, pa.duration("ms")),
            pa.array(["a"] * count).dictionary_encode(),
            pa.array([{"role": "user", "content": "x"}] * count),
            pa.array([[{"role": "user", "content": None}]] * count),
        )
    )
    named = rng.choice((*rows[0], "prompt", "messages", "answer", "label", "extra"))
    table = pa.Table.from_pylist(rows)
    if named in table.column_names:
        table = table.drop_columns([named])
    pq.write_table(table.append_column(named, odd), folder / name)
    return _read(rng, name)


def packed(rng: random.Random, folder: Path) -> Case:
    """Archives that are cut short, damaged, or that unpack to far more than they are."""
    content = valid(rng.choice(list(RECORDS)), "data.jsonl")
    whole = gzip.compress(content)
    bomb = (
        gzip.compress(bytes(600 << 20) if rng.random() < 0.5 else b" " * (600 << 20), 1) if rng.random() < 0.1 else None
    )
    chosen = bomb or rng.choice(
        (
            whole[: rng.randrange(len(whole))],
            damage(whole, rng),
            whole[:-8] + bytes(8),
            whole + b"garbage",
            whole + whole[:20],
            whole + bytes(100),
            whole[:2] + bytes(30),
            b"\x1f\x8b",
            b"\x1f\x8b\x08\xff" + whole[4:],
            gzip.compress(b""),
            gzip.compress(b"\n" * 3_000_000),
            gzip.compress(b"[" * 3_000_000),
            gzip.compress(b'{"prompt": "' + b"x" * 30_000_000),
            gzip.compress(b'{"prompt": "a", "response": "' + b"x" * 20_000_000 + b'"}'),
        )
    )
    name = rng.choice(("data.jsonl.gz", "data.json.gz", "data.csv.gz"))
    (folder / name).write_bytes(chosen)
    return _read(rng, name)


def not_files(rng: random.Random, folder: Path) -> Case:
    """Paths that lead nowhere, to special files, to folders without data, and patterns that match nothing."""
    name = "data.jsonl"
    (folder / name).write_bytes(valid("reply", name))
    match rng.randrange(5):
        case 0:
            no_file(folder / name, rng)
        case 1:
            (folder / "set").mkdir()
            (folder / "set" / "train.jsonl").write_bytes(valid("reply", name))
            (folder / "set" / "test.jsonl").write_bytes(valid("reply", name))
            no_file(folder / "set" / "train.jsonl", rng)
            name = "set"
        case 2:
            (folder / "loop").mkdir()
            (folder / "loop" / "loop").symlink_to("../loop")
            (folder / "loop" / "a.jsonl").symlink_to("a.jsonl")
            name = rng.choice(("loop", "loop/*", "loop/**/*.jsonl"))
        case _:
            name = rng.choice(
                (
                    "*.nothing",
                    "[",
                    "[z-a]*.jsonl",
                    "**",
                    "~nobodyhere/x.jsonl",
                    "x" * 300 + ".jsonl",
                    "",
                    " ",
                    "/dev/zero",
                    "/dev/null",
                    "data.jsonl/x",
                    "os:system",
                    "os.path:exists",
                    "no.py:f",
                    "a:b:c",
                    "{}",
                    "data.jsonl\n",
                    ".",
                )
            )
    return _read(rng, name)


_MAPPINGS = (
    "input=",
    "=prompt",
    "input=nothing",
    "chosen=a",
    "weight=-1",
    "weight=nan",
    "weight=1e999",
    "path=x",
    "max_samples=0",
    "max_samples=" + "9" * 5000,
    "format=hub",
    "format=yaml",
    "format=parquet",
    "shape=pairs",
    "shape=preference",
    "split=train",
    "subset=../..",
    "revision=main",
    "sources=x",
    "inptu=x",
    "x" * 300,
    "input=prompt",
    "output=prompt",
    "label=level",
    "messages=prompt",
    "system=level",
    "answer=response",
)


def mapped(rng: random.Random, folder: Path) -> Case:
    """Options of a source that don't fit its file."""
    shape, name = _some(rng)
    (folder / name).write_bytes(valid(shape, name))
    given = [word for item in rng.sample(_MAPPINGS, rng.randint(1, 3)) for word in ("--field", item)]
    keys = tuple(word.partition("=")[0] or "=" for word in given[1::2])
    return Case(cli("data", "check", name, *given), (name, *keys), report=True)


def cached(rng: random.Random, folder: Path) -> Case:
    """The cache of a file that was read before, with any of its files garbled."""
    import os

    (folder / "data.jsonl").write_bytes(valid("reply", "data.jsonl"))
    cache = folder / "cache"
    seed = rng.random()

    def run() -> int:
        os.environ["SAPWOOD_CACHE"] = str(cache)
        learn = told(lambda: _learn("data.jsonl", "demonstrations", "error"))
        if learn():
            return 70
        files = sorted(path for path in cache.rglob("*") if path.is_file())
        drawn = random.Random(seed)
        for path in drawn.sample(files, drawn.randint(1, 2)):
            match drawn.randrange(4):
                case 0:
                    path.write_bytes(damage(path.read_bytes(), drawn))
                case 1:
                    path.write_bytes(path.read_bytes()[: drawn.randrange(max(path.stat().st_size, 1))])
                case 2:
                    no_file(path, drawn)
                case _:
                    path.write_bytes(drawn.choice((b"", b"{}", b"[]", b"null", b"\xff")))
        return learn()

    return Case(run, ("cache", "data.jsonl"))


# --- other files -------------------------------------------------------------------------------------------------


def _rollouts() -> list[dict[str, Any]]:
    return [
        {
            "task": f"t{i // 2}",
            "group": i // 2,
            "member": i % 2,
            "messages": [{"role": "user", "content": f"p{i // 2}"}],
            "answer": "a",
            "reward": float(i % 2),
            "reward_parts": {"env": float(i % 2)},
            "terminated": True,
            "truncated": False,
            "error": None,
            "turns": [{"prompt": "p", "reply": f"r{i}", "reward": 0.0, "info": {}}],
        }
        for i in range(8)
    ]


def _garbled_lines(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    """Lines with bytes damaged, a value replaced, a field lost, or in another encoding."""
    rows = json.loads(json.dumps(rows))
    row = rng.choice(rows)
    place = rng.choice(list(places(row)))
    match rng.randrange(5):
        case 0:
            return damage(_lines(rows), rng)
        case 1:
            remove(row, place)
            return _lines(rows)
        case 2:
            found = encodings(_lines(rows).decode())
            return found[rng.choice(list(found))]
        case _:
            put(row, place, MARK)
            return _lines(rows).decode().replace(f'"{MARK}"', rng.choice(JSON_VALUES)).encode("utf-8", "surrogatepass")


def rollouts(rng: random.Random, folder: Path) -> Case:
    """Garbled rollouts to make pairs of, over a file of pairs that is there."""
    name = "rollouts.jsonl"
    (folder / name).write_bytes(_garbled_lines(_rollouts(), rng))
    if rng.random() < 0.1:
        no_file(folder / name, rng, pipe=False)
    (folder / "pairs.jsonl").write_text("precious\n")
    more = rng.choice(
        ([], ["--answers"], ["--shuffle"], ["--per-task", "3"], ["--min-gap", "nan"], ["--min-gap", "-1"])
    )
    kept = (name,)
    run = cli("data", "pairs", name, "--out", "pairs.jsonl", *more)
    return Case(_or_unchanged(run, "pairs.jsonl", "precious\n"), (name, "gap"), kept, tidy=True)


def _or_unchanged(run: Callable[[], int], name: str, content: str) -> Callable[[], int]:
    """A refusal must leave the file as it was."""

    def checked() -> int:
        code = run()
        if code and Path(name).read_text() != content:
            raise AssertionError(f"{name} was changed by what was refused")
        return code

    return checked


def opponents(rng: random.Random, folder: Path) -> Case:
    """Garbled replies for a win rate."""
    rows = [{"prompt": f"p{i}", "reply": f"r{i}", "index": i} for i in range(6)] if rng.random() < 0.5 else _rollouts()
    (folder / "replies.jsonl").write_bytes(_garbled_lines(rows, rng))

    def run() -> None:
        from sapwood.metrics.win_rate import _read as read

        read(Path("replies.jsonl"))

    return Case(told(run), ("replies.jsonl",))


def prompts(rng: random.Random, folder: Path) -> Case:
    """Garbled prompts for a world of prompts, written as tasks over a file that is there."""
    rows = RECORDS[rng.choice(("reply", "answer", "messages"))]
    field = "messages" if "messages" in rows[0] else "prompt"
    answer = next((name for name in ("answer", "response") if name in rows[0]), "system")
    (folder / "prompts.jsonl").write_bytes(_garbled_lines(rows, rng))
    if rng.random() < 0.1:
        no_file(folder / "prompts.jsonl", rng)
    world = f"{{name: prompts, path: prompts.jsonl, prompt_field: {field}, answer_field: {answer}, eval_fraction: 0.4}}"
    (folder / "recipe.yaml").write_text(f"run: {{dir: run, steps: 1}}\nenv: {world}\nalgorithm: grpo\n")
    (folder / "tasks.jsonl").write_text("precious\n")
    split = rng.choice(("train", "eval"))
    run = cli("data", "tasks", "recipe.yaml", "--count", "3", "--split", split, "--out", "tasks.jsonl")
    return Case(
        _or_unchanged(run, "tasks.jsonl", "precious\n"), ("prompts.jsonl", "env"), ("prompts.jsonl",), tidy=True
    )


def prepared(rng: random.Random, folder: Path) -> Case:
    """Local copies of public sets that aren't, and notes of earlier preparations that are garbled."""
    name = rng.choice(("belle", "alpaca-chinese", "hh-rlhf"))
    shape = "transcripts" if name == "hh-rlhf" else "instruction"
    copy = folder / "copy"
    file = copy / "helpful-base" / "train.jsonl.gz" if name == "hh-rlhf" else folder / "copy.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    format_ = "data.jsonl.gz" if name == "hh-rlhf" else "data.json"
    content = valid(rng.choice((shape, shape, "reply")), format_)
    file.write_bytes(damage(content, rng) if rng.random() < 0.5 else content)
    source = str(copy.relative_to(folder)) if name == "hh-rlhf" else "copy.json"
    out = folder / "out"
    out.mkdir()
    made = {
        "hh-rlhf": "hh_rlhf_helpful-base_train",
        "belle": "belle_sft_train",
        "alpaca-chinese": "alpaca_chinese_sft_train",
    }
    target = f"{made[name]}.json"
    match rng.randrange(6):
        case 0:
            (out / ".prepared.json").write_text(rng.choice(JSON_VALUES))
        case 1:
            (out / f".{target}.part").write_bytes(b"[\n")
            (out / f".{target}.state").write_text(rng.choice((*JSON_VALUES, '{"key": 1}', '{"keys": 1}')))
        case 2:
            note = rng.choice(("[]", "{}", '{"key": "x"}', "3", '{"key": null, "entries": "x"}'))
            (out / ".prepared.json").write_text(f'{{"{target}": {note}}}')
            (out / target).write_text("[]")
        case 3:
            no_file(out / ".prepared.json", rng)
        case 4:
            no_file(file, rng)
        case _:
            pass
    arguments = ["data", "prepare", name, "--input", source, "--output", "out"]
    return Case(cli(*arguments), ("copy", "out", name))


_SCHEMAS = (
    '{"type": 1}',
    '{"type": "no"}',
    '{"$ref": "http://x.y/z"}',
    '{"$ref": "#/nowhere"}',
    '{"$ref": "#"}',
    '{"pattern": "("}',
    '{"$schema": "http://nowhere"}',
    '{"required": "x"}',
    '{"minimum": "x"}',
    "3",
    "[]",
)


def other_files(rng: random.Random, folder: Path) -> Case:
    """JSON schemas, weather files and chat templates that a recipe names."""
    recipe = "run: {dir: run, steps: 1}\nalgorithm: grpo\n"
    match rng.randrange(3):
        case 0:
            text = rng.choice((*_SCHEMAS, *JSON_VALUES))
            content = text.encode("utf-8", "surrogatepass")
            (folder / "schema.json").write_bytes(content if rng.random() < 0.7 else damage(b'{"type": "object"}', rng))
            recipe += "env: {name: prompts, items: [{prompt: a}]}\nrewards: [{name: json_schema, path: schema.json}]\n"
            name = "schema.json"
        case 1:
            hour = "2001,1,{d},{h},0,x,20.0,10,50,101325,0,0,300,100.0,0,0\n"
            rows = "".join(hour.format(d=d % 28 + 1, h=h) for d in range(365) for h in range(24))
            content = ("LOCATION,a,b,c\n" + "X\n" * 7 + rows).encode()
            choice = rng.randrange(5)
            if choice == 0:
                content = content.replace(b"20.0", rng.choice((b"nan", b"inf", b"", b"1e999", b"9" * 5000, b'"')), 1)
            elif choice == 1:
                content = content[: rng.randrange(len(content))]
            elif choice == 2:
                content = content.replace(b",x,", b',"' + b"x" * 200_000 + b'",', 1)
            elif choice == 3:
                found = encodings(content.decode())
                content = found[rng.choice(list(found))]
            else:
                content = damage(content, rng)
            (folder / "year.epw").write_bytes(content)
            recipe += "env: {name: hvac, epw: year.epw}\n"
            name = "year.epw"
        case _:
            return _template(rng, folder)
    if rng.random() < 0.1:
        no_file(folder / name, rng)
    (folder / "recipe.yaml").write_text(recipe)
    return Case(cli("train", "--dry-run", "recipe.yaml"), (name, "schema", "recipe.yaml"))


_TEMPLATES = (
    "{% for m in messages %}",
    "{{ messages[99].content }}",
    "{{ 1/0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ messages }}",
    "",
    "{{ raise_exception('no') }}",
    "{% set x = namespace() %}{{ x.y.z }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ 'x' * 100000000 }}",
    "{% for i in range(100000000) %}x{% endfor %}",
    "{{ x | nothing }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{#",
    "{{",
    "%}",
    "{{ '%s' % messages }}",
    "{{ messages | tojson(indent=1e9) }}",
)


def _template(rng: random.Random, folder: Path) -> Case:
    from tests.chats import CHATML, tokenizer

    content = rng.choice(_TEMPLATES).encode() if rng.random() < 0.5 else damage(CHATML.encode(), rng)
    (folder / "chat.jinja").write_bytes(content)

    def run() -> None:
        from types import SimpleNamespace
        from typing import cast

        from sapwood.opening import build_chat
        from sapwood.sections import ModelSection
        from sapwood.types import Message

        policy = cast("Any", SimpleNamespace(tokenizer=tokenizer()))
        chat = build_chat(policy, ModelSection(chat_template=Path("chat.jinja")))
        chat.start([Message("system", "be"), Message("user", "go")])
        chat.extend(chat.reply("yes"), True, [Message("user", "on")])

    return Case(told(run), ("chat.jinja",))


def model_inputs(rng: random.Random, folder: Path) -> Case:
    """Prompts to generate for, and data to learn from, with a model."""
    from tests.reliability.malformed_recipes import tiny

    model, _ = tiny()
    rows = RECORDS[rng.choice(("reply", "answer", "messages"))]
    name = rng.choice(("in.jsonl", "in.jsonl", "in.json"))
    (folder / name).write_bytes(_garbled_lines(rows[:4], rng))
    if rng.random() < 0.5:
        (folder / "out.jsonl").write_text("precious\n")
        arguments = ["generate", str(model), "--input", name, "--out", "out.jsonl", "--max-new-tokens", "2"]
        run = _or_unchanged(cli(*arguments), "out.jsonl", "precious\n")
        return Case(run, (name, "out.jsonl"), (name,))
    algorithm = rng.choice(("sft", "kto"))
    lines = [
        "run: {dir: run, steps: 1}",
        f"model: {{name: {model}, lora: {{rank: 2}}}}",
        f"data: {{path: {name}, eval_fraction: 0.3}}",
        f"algorithm: {algorithm}",
        "trackers: []",
    ]
    (folder / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return Case(cli("train", "recipe.yaml"), (name, "data"), (name,))


WAYS: dict[str, Way] = {
    "damaged": damaged,
    "wrong field": wrong_field,
    "cut": cut,
    "wrong fields": wrong_fields,
    "encoded": encoded,
    "tables": tables,
    "columns": columns,
    "packed": packed,
    "rollouts": rollouts,
    "misnamed": misnamed,
    "not files": not_files,
    "mapped": mapped,
    "cached": cached,
    "prompts": prompts,
    "opponents": opponents,
    "prepared": prepared,
    "other files": other_files,
    "model inputs": model_inputs,
}
