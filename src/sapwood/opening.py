"""From what a user calls a model to a model that replies: runs, checkpoints, adapters, folders, hub ids.

A run is opened as its recipe says, with what it trained; an adapter on the base that it names; anything else is a
model by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from sapwood import configfile, plugins
from sapwood.chat import Chat
from sapwood.config import Recipe, load_recipe
from sapwood.configfile import Source
from sapwood.engines import Engine
from sapwood.errors import ConfigError, DataError, ModelError
from sapwood.paths import expanded
from sapwood.sections import ModelSection

if TYPE_CHECKING:
    from sapwood.models.load import Policy

Head = Literal["lm", "scalar"]


@dataclass(frozen=True)
class Origin:
    """What a name stands for. section: how to load it; head: what it ends in; run: its run folder, with its recipe."""

    name: str
    section: ModelSection
    head: Head = "lm"
    run: Path | None = None
    recipe: Recipe | None = None

    def load(self) -> Policy:
        """The weights and the tokenizer. Raises ModelError."""
        from sapwood.models.load import called

        with called(""):  # errors name what was asked for, which is no option of a recipe
            return load_policy(self.section, self.head)


def locate(name: str | Path, head: Head | None = None, **options: Any) -> Origin:
    """What `name` is: a run folder, a checkpoint or adapter in one or by itself, a model's folder, name or hub id.

    head: "scalar" for a reward model where the files don't say; options: keys of the recipe's `model` section that
    replace the run's (dtype, device, quantize ...). Raises ConfigError for an option, ModelError for a folder without
    a model.
    """
    path = expanded(name)
    if not path.is_dir():
        return Origin(str(name), _section({"name": str(name), "lora": None}, options), head or "lm")
    run = next((folder for folder in (path, *path.parents[:3]) if (folder / "recipe.yaml").is_file()), None)
    if run is not None:
        recipe = load_recipe(run)
        found = head or ("scalar" if recipe.build_algorithm().needs.scores else "lm")
        given = {**recipe.model.model_dump(mode="json"), "init_from": str(path), "lora": None, "quantize": "none"}
        section = _section(given, {"quantize": recipe.model.quantize, **options})
        return Origin(str(name), section, found, run, recipe)
    adapter = next((f for f in (path, path / "policy") if (f / "adapter_config.json").is_file()), None)
    if adapter is not None:
        config = _read_json(adapter / "adapter_config.json")
        given = {"name": _base_of(config, adapter), "init_from": str(adapter), "lora": None}
        kind: Head = "scalar" if config.get("task_type") == "SEQ_CLS" else "lm"
        return Origin(str(name), _section(given, options), head or kind)
    folder = path / "policy" if (path / "policy" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} is neither a run (recipe.yaml), an adapter (adapter_config.json) nor a model (config.json); "
            "check the path."
        )
    architectures = _read_json(folder / "config.json").get("architectures") or []
    kind = "scalar" if any(str(a).endswith("ForSequenceClassification") for a in architectures) else "lm"
    return Origin(str(name), _section({"name": str(folder), "lora": None}, options), head or kind)


def load_policy(section: ModelSection, head: Head = "lm", seed: int = 0) -> Policy:
    """As `sapwood.models.load.load_policy`; torch and transformers load only once they are needed."""
    from sapwood.models.load import load_policy

    return load_policy(section, seed, head=head)


def build_engine(recipe: Recipe, policy: Policy) -> Engine:
    """The recipe's engine on a loaded policy."""
    if recipe.engine is None:
        raise ConfigError("engine is missing: this recipe samples nothing, since it learns from data and has no env.")
    return make_engine(recipe.engine["name"], policy, recipe.engine_options())


def make_engine(name: str, policy: Policy, options: Mapping[str, Any]) -> Engine:
    """An engine is made of the policy, its tokenizer and, if its class or module has `OPTIONS`, those options."""
    cls = plugins.load("engine", name)
    model = getattr(cls, "OPTIONS", None) or getattr(sys.modules[cls.__module__], "OPTIONS", None)
    if model is None:
        return cls(policy, policy.tokenizer)
    return cls(policy, policy.tokenizer, options=model.model_validate(dict(options)))


def build_chat(policy: Policy, section: ModelSection) -> Chat:
    """The policy's chat, with the section's template file if it names one. Raises DataError if it can't be read."""
    return _chat(policy.tokenizer, section)


def open_chat(origin: Origin) -> Chat:
    """The chat of a model whose weights are not needed. Raises ModelError, DataError."""
    from sapwood.models.load import called, load_tokenizer

    section = origin.section
    with called(""):
        return _chat(load_tokenizer(section.name, section.trust_remote_code, section.cache_dir), section)


def _chat(tokenizer: Any, section: ModelSection) -> Chat:
    if section.chat_template is None:
        return Chat(tokenizer, title=f"the chat template of {section.name}")
    try:
        template = expanded(section.chat_template).read_text("utf-8")
    except OSError as error:
        raise DataError(
            f"model.chat_template: {section.chat_template} can't be read ({error.strerror}); give a Jinja file."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"model.chat_template: {section.chat_template} is no UTF-8 text; give a Jinja file.") from error
    return Chat(tokenizer, template, title=f"model.chat_template ({section.chat_template})")


def _section(given: Mapping[str, Any], options: Mapping[str, Any]) -> ModelSection:
    """A model section for use, not for training, so that what only training forbids is let through."""
    wanted = {**given, **options}
    try:
        checked = ModelSection.model_validate({**wanted, "quantize": "none", "dtype": "auto"})
        for name in ("quantize", "dtype"):
            ModelSection.model_validate({name: wanted.get(name, ModelSection.model_fields[name].default)})
    except ValidationError as error:
        source = Source({"model": dict(wanted)})
        raise ConfigError(configfile.explain(error, source, ("model",), ModelSection)) from error
    return checked.model_copy(update={name: wanted[name] for name in ("quantize", "dtype") if name in wanted})


def _base_of(config: Mapping[str, Any], adapter: Path) -> str:
    from sapwood.models.load import BUNDLED

    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter}/adapter_config.json names no base model; open it as init_from of its base.")
    return next((name for name, (_, _, public) in BUNDLED.items() if public == base), str(base))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read as JSON ({error}); copy the folder again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object; copy the folder again.")
    return content
