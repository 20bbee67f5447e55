"""Run folders and checkpoints of which a file is cut, garbled, missing, swapped for something else, or made to harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reliability.fuzz import CANARY, Case, Way
from tests.reliability.malformed_data import told
from tests.reliability.malformed_recipes import cli, import_plugins
from tests.reliability.mutate import JSON_VALUES, MARK, YAML_VALUES, damage, encodings, no_file, places, put, remove

#: One with adapters, a critic and rollouts; one with whole weights on data.
RUNS = ("ppo-lora", "sft-full")
STEPS = 2
_folder = Path()


def prepare(folder: Path) -> None:
    """Train the runs that are then garbled, in children, so that no thread of theirs stays here."""
    global _folder
    _folder = folder
    import yaml

    import sapwood.compare
    import sapwood.plots
    import sapwood.report
    import sapwood.train  # noqa: F401
    from tests.learning import save_tiny_model
    from tests.reliability.runs import recipe, write_data

    import_plugins()
    model, data = save_tiny_model(folder / "tiny"), write_data(folder)
    for name in RUNS:
        made = recipe(name, model, data, folder / "base" / name, steps=STEPS)
        made |= {"trackers": [], "eval": {"every": 1, "tasks": 2} if "env" in made else {"every": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(made))
        pid = os.fork()
        if pid == 0:
            for number in (1, 2):
                os.dup2(os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT), number)
            os._exit(cli("train", str(folder / f"{name}.yaml"))())
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError((folder / f"{name}.log").read_text())


def _copy(rng: random.Random, folder: Path, name: str | None = None) -> Path:
    """A whole run, and something outside of it that nothing may touch."""
    chosen = name or rng.choice(RUNS)
    shutil.copytree(_folder / "base" / chosen, folder / "run", ignore=shutil.ignore_patterns("plots", "logs"))
    (folder / "outside").mkdir()
    (folder / "outside" / "precious.txt").write_text("precious\n")
    return folder / "run"


def reseal(folder: Path) -> None:
    """Write the manifest of a checkpoint anew, so that its files are as it says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and not str(path.resolve()).startswith("/dev")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def _resealed(run: Path, path: Path, rng: random.Random) -> None:
    if path.relative_to(run).parts[0] == "checkpoints" and path.name != "manifest.json" and rng.random() < 0.5:
        reseal(run / "checkpoints" / path.relative_to(run).parts[1])


def _command(rng: random.Random, *names: str) -> Case:
    """A command that reads a run folder and loads no model."""
    kept = ("outside",)
    match rng.randrange(5):
        case 0 | 1:
            more = rng.choice(
                ([], ["--fast"], ["--json"], ["--best", "eval/loss"], ["--best", "x"], ["--prune", "1"], ["--damaged"])
            )
            more = [*more, "--damaged"] if rng.random() < 0.2 else more
            read_only = not {"--prune", "--damaged"} & set(more)
            return Case(
                cli("checkpoints", "run", *more),
                (*names, "run", "step_", "--best"),
                (*kept, "run") if read_only else kept,
                report=True,
            )
        case 2:
            return Case(cli("report", "run", "--out", "page.html"), (*names, "run"), (*kept, "run"))
        case 3:
            where = rng.choice(("run", "run", "run/checkpoints/step_000002", "run/checkpoints/step_000001"))
            return Case(_without_training("train", "--resume", where, f"run.steps={STEPS + 1}"), (*names, "run"), kept)
        case _:
            return Case(cli("train", "--dry-run", "run/recipe.yaml"), (*names, "run"), (*kept, "run"))


def _without_training(*arguments: str) -> Callable[[], int]:
    """The command line up to where training would begin."""

    def run() -> int:
        import sapwood.train

        def stop(*_: object) -> None:
            raise SystemExit(0)

        sapwood.train.train = stop  # pyright: ignore[reportAttributeAccessIssue]
        return cli(*arguments)()

    return run


# --- ways --------------------------------------------------------------------------------------------------------


def _garble(path: Path, rng: random.Random) -> None:
    """One file: damaged, cut, emptied, in another encoding, something else, or gone."""
    content = path.read_bytes()
    match rng.randrange(7):
        case 0 | 1:
            path.write_bytes(damage(content, rng))
        case 2:
            path.write_bytes(content[: rng.randrange(max(len(content), 1))])
        case 3:
            path.unlink()
        case 4:
            found = encodings(content.decode("utf-8", "replace"))
            path.write_bytes(found[rng.choice(list(found))])
        case _:
            no_file(path, rng)


def any_file(rng: random.Random, folder: Path) -> Case:
    """Any file of the folder."""
    run = _copy(rng, folder)
    path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    _garble(path, rng)
    if path.exists() or not path.is_symlink():
        _resealed(run, path, rng)
    return _command(rng, path.name)


def _splice(path: Path, data: Any, raw: str) -> None:
    path.write_bytes(json.dumps(data).replace(f'"{MARK}"', raw, 1).encode("utf-8", "surrogatepass"))


def wrong_json(rng: random.Random, folder: Path) -> Case:
    """A value of a JSON file that is of another type or size."""
    run = _copy(rng, folder)
    files = [path for path in sorted(run.rglob("*.json")) if path.name != "tokenizer.json"]
    path = rng.choice([*files, *(path for path in files if path.name == "manifest.json")])
    data = json.loads(path.read_text())
    place = rng.choice(list(places(data)))
    put(data, place, MARK)
    _splice(path, data, rng.choice(JSON_VALUES))
    _resealed(run, path, rng)
    return _command(rng, path.name)


_MANIFESTS: tuple[tuple[str, str], ...] = (
    *(
        ("files", f'{{"{name}": {{"sha256": "00", "bytes": 3}}}}')
        for name in (
            "../../../outside/precious.txt",
            "/etc/passwd",
            "../../../../../../../../etc/passwd",
            "..",
            ".",
            "",
            "/dev/zero",
            "policy",
            "a" * 300,
            "a\\u0000b",
            "\\ud800",
            "~/x",
            "policy/../../../../outside/precious.txt",
            "\\u001b[2J",
        )
    ),
    *(
        ("files", value)
        for value in (
            "[]",
            "null",
            "3",
            "{}",
            '{"x": 1}',
            '{"x": {"sha256": "00"}}',
            '{"x": {}}',
            '{"x": {"sha256": 1, "bytes": 1e400}}',
            '{"x": {"sha256": "00", "bytes": ' + "9" * 4000 + "}}",
            '{"x": {"sha256": "00", "bytes": -1}}',
            '{"x": {"sha256": "00", "bytes": "1"}}',
            '{"x": {"sha256": "00", "bytes": NaN}}',
        )
    ),
    *(
        ("metrics", value)
        for value in (
            "[]",
            "null",
            '{"x": "y"}',
            '{"x": null}',
            '{"x": 1e400}',
            '{"x": NaN}',
            '{"x": ' + "9" * 400 + "}",
            '{"\\u001b[2J": 1}',
            '{"\\ud800": 1}',
            '{"eval/loss": "nan"}',
            '{"": 1}',
        )
    ),
    *(("format", value) for value in ("99", "1e400", '"x"', "null", "NaN", "-1", "[1]")),
    *(("time", value) for value in ("null", "{}", '"\\u001b[2J"', '"\\ud800"', '"[bold]x[/"', "1e400")),
    *(("step", value) for value in ("null", "1e400", '"x"', "-1", "99")),
)


def manifests(rng: random.Random, folder: Path) -> Case:
    """Manifests of names outside the folder, absurd sizes and later formats."""
    run = _copy(rng, folder)
    path = _newest(run) / "manifest.json"
    data = json.loads(path.read_text())
    key, raw = rng.choice(_MANIFESTS)
    data[key] = MARK
    _splice(path, data, raw)
    if rng.random() < 0.1:
        path.write_text(rng.choice(("[]", "3", "null", "[" * 100_000, "{}", '"x"')))
    return _command(rng, "manifest.json")


def wrong_lines(rng: random.Random, folder: Path) -> Case:
    """Lines of metrics, events, warnings, timings or samples that are damaged, of other types, or torn."""
    run = _copy(rng, folder)
    path = rng.choice(sorted(run.glob("*.jsonl")))
    lines = path.read_bytes().splitlines(keepends=True) or [b'{"step": 1}\n']
    index = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines[index] = rng.choice(JSON_VALUES).encode("utf-8", "surrogatepass") + b"\n"
        case 1:
            record = json.loads(lines[index])
            place = rng.choice(list(places(record)) or [("step",)])
            record[place[0]] = MARK
            text = json.dumps(record).replace(f'"{MARK}"', rng.choice(JSON_VALUES))
            lines[index] = text.encode("utf-8", "surrogatepass") + b"\n"
        case 2:
            record = json.loads(lines[index])
            if record:
                del record[rng.choice(list(record))]
            lines[index] = json.dumps(record).encode() + b"\n"
        case _:
            lines = [damage(b"".join(lines), rng)]
    path.write_bytes(b"".join(lines))
    return _command(rng, path.name)


def wrong_recipe(rng: random.Random, folder: Path) -> Case:
    """The run's own recipe with a value that no option means, or damaged."""
    import yaml

    run = _copy(rng, folder)
    path = rng.choice((run, _newest(run))) / "recipe.yaml"
    data = yaml.safe_load(path.read_text())
    place = rng.choice([*places(data), *(place for place in places(data) if place[0] == "checkpoint")])
    put(data, place, MARK)
    text = yaml.safe_dump(data, sort_keys=False, width=10**6).replace(f"'{MARK}'", rng.choice(YAML_VALUES), 1)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damage(content, rng) if rng.random() < 0.2 else content)
    return _command(rng, "recipe.yaml")


def strange_entries(rng: random.Random, folder: Path) -> Case:
    """Names in the folders of a run that are no step's, and links that lead out of it."""
    run = _copy(rng, folder)
    where = run / rng.choice(("checkpoints", "checkpoints", "samples", "evidence", "."))
    newest = _newest(run) if (run / "checkpoints").is_dir() else None
    where.mkdir(exist_ok=True)
    for name in rng.sample(
        (
            "step_",
            "step_abc",
            "step_-1",
            "step_\u00b2",
            "step_\u0661",
            "step_" + "9" * 200,
            "step_000003",
            ".step_000009.partial",
            "step_000002.old",
            "eval_x.jsonl.gz",
            "eval_",
            "step_9_9_9",
            "step_1.5",
            "step_ 4",
            "step_000009_1",
            "step_000001.jsonl.gz.part",
        ),
        rng.randint(1, 4),
    ):
        path = where / name
        if path.exists() or path.is_symlink():
            continue
        match rng.randrange(5):
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to(folder / "outside", target_is_directory=True)
            case 2:
                path.write_bytes(b"x")
            case 3:
                shutil.copytree(newest, path) if newest is not None else path.mkdir()
            case _:
                no_file(path, rng)
    return _command(rng)


def missing(rng: random.Random, folder: Path) -> Case:
    """Several files or folders gone, or a folder that is a file."""
    run = _copy(rng, folder)
    for _ in range(rng.randint(1, 4)):
        found = sorted(run.rglob("*"))
        if not found:
            break
        path = rng.choice(found)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if rng.random() < 0.2:
            path.write_bytes(b"")
    return _command(rng)


class _Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


_STATES: tuple[Any, ...] = (None, -1, 2**70, 1e400, float("nan"), "", "x", [], {}, [None], {"x": 1}, b"x", True, 10**30)


def _states(run: Path, rng: random.Random) -> str:
    """Damage the training state of the newest checkpoint, and seal it as whole."""
    import torch

    checkpoint = _newest(run)
    path = checkpoint / "training_state.pt"
    match rng.randrange(8):
        case 0:
            path.write_bytes(pickle.dumps(_Bomb()))
        case 1:
            torch.save({"format": 1, "step": 2, "pending": None, "bomb": _Bomb()}, path)
        case 2:
            _repack(path, lambda content: damage(content, rng))
        case 3:
            _repack(
                path, lambda content: rng.choice((b"", b"\x80\x02.", pickle.dumps(_Bomb(), 2), b"(" * 100_000 + b"."))
            )
        case _:
            state = torch.load(path, weights_only=True)
            place = rng.choice([*places(state), *((key,) for key in state)])
            if rng.random() < 0.3:
                remove(state, place)
            else:
                put(state, place, rng.choice((*_STATES, torch.zeros(3), torch.full((2, 2), float("nan")))))
            torch.save(state, path)
    reseal(checkpoint)
    return path.name


def _repack(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle within a file of torch's, the archive around it being whole."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for item in old.infolist():
            content = old.read(item)
            new.writestr(item.filename, change(content) if item.filename.endswith("data.pkl") else content)
    path.write_bytes(out.getvalue())


def states(rng: random.Random, folder: Path) -> Case:
    """Training states that hold code, other types or nothing, in a checkpoint that is whole by its manifest."""
    name = _states(_copy(rng, folder), rng)
    where = rng.choice(("run", "run/checkpoints/step_000002"))
    return Case(_without_training("train", "--resume", where, f"run.steps={STEPS + 1}"), (name, "run"), ("outside",))


def _tensors(path: Path, rng: random.Random) -> None:
    """Headers of safetensors that promise what the file doesn't hold."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    chosen = rng.choice(names)
    raw: str | None = None
    match rng.randrange(8):
        case 0:
            path.write_bytes(
                struct.pack("<Q", rng.choice((0, 2**63 - 1, 2**64 - 1, 2**40, len(content) + 1))) + content[8:]
            )
            return
        case 1:
            header[chosen]["shape"] = rng.choice(([], [-1], [2**62, 4], [10**12], ["x"], "x", [1.5], [0]))
        case 2:
            header[chosen]["dtype"] = rng.choice(("F33", "", None, "I64", "BOOL", "F8_E4M3", 3))
        case 3:
            header[chosen]["data_offsets"] = rng.choice(([0, 2**62], [5, 1], [-1, 4], [0], [0, 0], "x", [2**70, 2**71]))
        case 4:
            header[f"{chosen}.x"] = header.pop(chosen)
        case 5:
            header["__metadata__"] = rng.choice((3, {"a": 1}, [], {"format": "\ud800"}, {"format": "tf"}))
        case 6:
            raw = rng.choice(("[" * 100_000, "{", "[]", "null", '{"a":' * 50_000, "\xff"))
        case _:
            for name in names:
                header[name]["data_offsets"] = header[chosen]["data_offsets"]
    made = (json.dumps(header) if raw is None else raw).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(made)) + made + rest)


def adapters(rng: random.Random, folder: Path) -> Case:
    """An adapter whose weights or configuration are garbled, as whatever opens it reads it."""
    run = _copy(rng, folder, "ppo-lora")
    policy = _newest(run) / rng.choice(("policy", "policy", "critic"))
    if rng.random() < 0.5:
        _tensors(policy / "adapter_model.safetensors", rng)
    else:
        path = policy / "adapter_config.json"
        data = json.loads(path.read_text())
        put(data, rng.choice(list(places(data))), MARK)
        _splice(path, data, rng.choice(JSON_VALUES))

    def read() -> None:
        from sapwood.models.adapters import AdapterFile
        from sapwood.opening import locate

        locate(policy)
        file = AdapterFile.read(policy)
        assert isinstance(file.base, str)
        assert isinstance(file.shareable, bool)

    return Case(told(read), ("policy", "critic", "adapter"), ("outside", "run"))


# --- with a model ------------------------------------------------------------------------------------------------


def model_resume(rng: random.Random, folder: Path) -> Case:
    """A damaged run that is gone on with."""
    run = _copy(rng, folder)
    name = "run"
    if rng.random() < 0.5:
        name = _states(run, rng)
    else:
        files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".gz"]
        path = rng.choice(sorted(files))
        _garble(path, rng)
        name = path.name
        if path.is_file():
            _resealed(run, path, rng)
    return Case(cli("train", "--resume", "run", f"run.steps={STEPS + 1}"), (name, "run"), ("outside",))


def model_eval(rng: random.Random, folder: Path) -> Case:
    """A damaged run that is measured, sampled from or exported."""
    run = _copy(rng, folder)
    roles = [_newest(run) / "policy"] * 3 + [_newest(run) / "critic"]
    role = rng.choice([path for path in roles if path.is_dir()])
    path = rng.choice(sorted(path for path in role.iterdir() if path.is_file()))
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        _tensors(path, rng)
    elif path.suffix == ".json" and rng.random() < 0.6:
        data = json.loads(path.read_text())
        put(data, rng.choice(list(places(data))[:200]), MARK)
        _splice(path, data, rng.choice(JSON_VALUES))
    else:
        _garble(path, rng)
    if path.is_file():
        _resealed(run, path, rng)
    names = ("run", path.name, "policy")
    match rng.randrange(4):
        case 0 | 1:
            (folder / "table.json").write_text("precious\n")
            kept = ("outside", "run")
            return Case(cli("eval", "run", "--tasks", "1", "--json"), names, kept)
        case 2:
            return Case(cli("generate", "run", "--prompt", "go", "--max-new-tokens", "2"), names, ("outside", "run"))
        case _:
            role_name = "critic" if role.name == "critic" else "policy"
            return Case(cli("export", "run", "out", "--role", role_name), names, ("outside", "run"))


WAYS: dict[str, Way] = {
    "any file": any_file,
    "wrong json": wrong_json,
    "manifests": manifests,
    "wrong lines": wrong_lines,
    "states": states,
    "wrong recipe": wrong_recipe,
    "adapters": adapters,
    "strange entries": strange_entries,
    "missing": missing,
    "model resume": model_resume,
    "model eval": model_eval,
}
