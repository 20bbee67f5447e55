"""A trained PPO policy as a controller with a critic, and the file that it is kept in.

`ppo_final.zip` is a Stable-Baselines3 file that `PPO.load` opens, with one more entry, sapwood.json: the world it was
trained in and the shape of its networks. `load_ppo` needs no more than that and the weights, which are read as plain
tensors, so a file is loaded without running anything that it holds. Stable-Baselines3's own loading unpickles; a file
without that entry is loaded so only where the caller trusts it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.envs.hvac.layout import misfit
from sapwood.envs.hvac.simulator import HvacEnv
from sapwood.envs.hvac.text import Hvac
from sapwood.errors import DataError, MissingExtra, printable

Array = NDArray[np.float32]

FORMAT = 1
#: The entry of the zip that says what the weights are.
ENTRY = "sapwood.json"
WEIGHTS = "policy.pth"
#: An entry that unpacks to more is no policy of ours.
MAX_ENTRY = 256 * 2**20
#: Standardised observations are cut here, so that a building far off does not drown the networks.
CLIP = 10.0
#: Reproducible archives: the same policy is the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Scaling:
    """How observations [n + 4] and rewards are brought to about 1 for the networks; fixed before training.

    Standardised observation: (observation - mean) / scale, cut at +-`CLIP`. Networks see rewards divided by `reward`.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    reward: float


@dataclass(frozen=True)
class PpoPolicy:
    """A trained policy. Called with a simulator it is a `Controller`: the policy's mean action for the state.

    act: actions [S, width], clipped to -1..1, of observations [S, n + 4]; value: its critic's values [S], in physical
    reward; about: what is known of it, for a trajectory file.
    """

    act: Callable[[Array], Array]
    value: Callable[[Array], NDArray[np.float64]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, env: HvacEnv) -> NDArray[np.float64]:
        """The action for the state that a simulator is in."""
        return self.act(env.observation[None])[0].astype(np.float64)


class Networks:
    """The policy's and the critic's tanh networks in numpy: actions and values of observations [S, n + 4].

    weights: arrays of Stable-Baselines3's `MlpPolicy` by name. Raises ValueError where they don't fit together.
    """

    def __init__(self, scaling: Scaling, weights: Mapping[str, Array]) -> None:
        self.mean = np.array(scaling.mean, np.float32)
        self.scale = np.array(scaling.scale, np.float32)
        self.reward = scaling.reward
        self.policy = list(_layers(weights, "mlp_extractor.policy_net", "action_net"))
        self.critic = list(_layers(weights, "mlp_extractor.value_net", "value_net"))
        for name, layers in (("policy", self.policy), ("critic", self.critic)):
            width = len(self.mean)
            for matrix, bias in layers:
                if matrix.ndim != 2 or matrix.shape != (len(bias), width):
                    raise ValueError(f"a layer of the {name} is {matrix.shape}, not ({len(bias)}, {width})")
                width = len(bias)
        if len(self.critic[-1][1]) != 1:
            raise ValueError("the critic has more than one value")

    @property
    def width(self) -> int:
        """Numbers of an action."""
        return len(self.policy[-1][1])

    def act(self, observations: Array) -> Array:
        """Mean actions [S, width], clipped to -1..1."""
        return np.clip(self._run(self.policy, observations), -1.0, 1.0)

    def value(self, observations: Array) -> NDArray[np.float64]:
        """Values [S] in physical reward."""
        return self._run(self.critic, observations)[:, 0].astype(np.float64) * self.reward

    def _run(self, layers: list[tuple[Array, Array]], observations: Array) -> Array:
        hidden = np.clip((np.asarray(observations, np.float32) - self.mean) / self.scale, -CLIP, CLIP)
        for number, (matrix, bias) in enumerate(layers):
            hidden = (hidden if number == 0 else np.tanh(hidden)) @ matrix.T + bias
        return hidden


def _layers(weights: Mapping[str, Array], body: str, head: str) -> Iterator[tuple[Array, Array]]:
    """(matrix [out, in], bias [out]) of the hidden layers and the last one. Between them stand tanh modules."""
    number = 0
    names = []
    while f"{body}.{number}.weight" in weights:
        names.append(f"{body}.{number}")
        number += 2
    for name in (*names, head):
        for part in ("weight", "bias"):
            array = weights.get(f"{name}.{part}")
            if array is None:
                raise ValueError(f"{name}.{part} is missing")
            if not np.isfinite(array).all():
                raise ValueError(f"{name}.{part} has a number that is not finite")
        yield weights[f"{name}.weight"], weights[f"{name}.bias"]


def arrays(state: Mapping[str, Any]) -> dict[str, Array]:
    """A torch state dict as arrays of the same names."""
    return {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in state.items()}


# --- the file ----------------------------------------------------------------------------------------------------


def packed(saved: bytes, about: Mapping[str, Any]) -> bytes:
    """A file of Stable-Baselines3 with our entry added; the same policy gives the same bytes."""
    # Compressed, so that the end of a zip within it can't be taken for the end of a file that was cut short.
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as source, zipfile.ZipFile(made, "w") as target:
        for name in sorted(source.namelist()):
            target.writestr(zipfile.ZipInfo(name, _DATE), source.read(name), zipfile.ZIP_DEFLATED)
        content = json.dumps({"format": FORMAT, **about}, indent=1, allow_nan=False)
        target.writestr(zipfile.ZipInfo(ENTRY, _DATE), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def load_ppo(path: Path | str, family: Hvac, *, trust: bool = False) -> PpoPolicy:
    """The policy in a file of `sapwood pipeline`, or with `trust` in any PPO file of Stable-Baselines3.

    trust: a file that Sapwood did not write may run code of its maker when it is loaded; without it such a file is
    refused. Raises DataError for a file that can't be read, or that is of another world than the family's.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such policy; make it with `sapwood pipeline RECIPE --stage ppo`."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}.") from error
    entries = _entries(path, content)
    if ENTRY not in entries and trust:
        return _trusted(path, content, family)
    if ENTRY not in entries:
        what = "a file of Stable-Baselines3" if "data" in entries else "a zip"
        raise DataError(
            f"{path}: {what} that Sapwood did not write; loading it can run code of whoever made it, so it is "
            "refused. If you trust its maker, set ppo.trust=true."
        )
    networks, about = _ours(path, entries)
    why = misfit(about["world"], family)
    if why:
        raise DataError(f"{path}: trained in another world: {why}; train one with `sapwood pipeline --stage ppo`.")
    _fits(path, family, len(networks.mean), networks.width)
    known = {"sha256": hashlib.sha256(content).hexdigest(), "steps": about.get("steps")}
    return PpoPolicy(networks.act, networks.value, known)


def _entries(path: Path, content: bytes) -> dict[str, bytes]:
    """The entries of a zip that are read here; of others only the names, with no content."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {}
            for info in archive.infolist()[:1000]:
                wanted = info.filename in (ENTRY, WEIGHTS)
                if wanted and info.file_size > MAX_ENTRY:
                    raise DataError(f"{path}: its entry {info.filename} unpacks to {info.file_size:,} bytes; refused.")
                found[info.filename] = archive.read(info) if wanted else b""
            return found
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: not a policy file, or a damaged one ({printable(str(error))}).") from None


def _ours(path: Path, entries: Mapping[str, bytes]) -> tuple[Networks, dict[str, Any]]:
    import pickle

    import torch

    try:
        about = json.loads(entries[ENTRY].decode("utf-8"))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"{ENTRY} is not of format {FORMAT}")
        scaling = _scaling(about.get("scaling"))
        if not isinstance(about.get("world"), dict):
            raise ValueError(f"{ENTRY} has no world")
        state = torch.load(io.BytesIO(entries.get(WEIGHTS, b"")), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(f"{WEIGHTS} holds no tensors")
        return Networks(scaling, arrays(state)), about
    except pickle.UnpicklingError:
        raise DataError(f"{path}: not loaded: {WEIGHTS} holds more than weights.") from None
    except (ValueError, RuntimeError, EOFError, RecursionError) as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise DataError(f"{path}: not a policy of Sapwood's, or a damaged one: {reason}.") from None


def _scaling(found: Any) -> Scaling:
    if not isinstance(found, dict):
        raise ValueError(f"{ENTRY} has no scaling")
    mean, scale = (np.array(found.get(name), np.float64) for name in ("mean", "scale"))
    reward = found.get("reward")
    if mean.ndim != 1 or mean.shape != scale.shape or not np.isfinite(mean).all() or not np.all(scale > 0):
        raise ValueError("its scaling of observations is not two rows of numbers")
    if not isinstance(reward, int | float) or not 0 < reward < 1e9:
        raise ValueError("its scaling of rewards is no positive number")
    return Scaling(tuple(mean.tolist()), tuple(scale.tolist()), float(reward))


def _fits(path: Path, family: Hvac, seen: int, width: int) -> None:
    env = family.simulator()
    wanted = (env.observation_space.shape or (0,))[0], (env.action_space.shape or (0,))[0]
    if (seen, width) != wanted:
        raise DataError(
            f"{path}: a policy of {seen} observations and {width} powers, and this world has {wanted[0]} and "
            f"{wanted[1]}; use one that was trained in it."
        )


def _trusted(path: Path, content: bytes, family: Hvac) -> PpoPolicy:
    """Any PPO model, by Stable-Baselines3's own loading, which unpickles."""
    import pickle

    try:
        from stable_baselines3 import PPO
    except ImportError:
        raise MissingExtra("stable-baselines3", "pipeline", "a Stable-Baselines3 policy") from None
    try:
        model = PPO.load(io.BytesIO(content), device="cpu")
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: Stable-Baselines3 can't load it as PPO: {printable(str(error))}.") from None
    spaces = model.observation_space.shape or (0,), model.action_space.shape or (0,)
    _fits(path, family, spaces[0][0], spaces[1][0])

    def act(observations: Array) -> Array:
        return np.clip(model.predict(observations, deterministic=True)[0], -1.0, 1.0).astype(np.float32)

    def value(observations: Array) -> NDArray[np.float64]:
        values = model.policy.predict_values(model.policy.obs_to_tensor(observations)[0])
        return values.detach().numpy()[:, 0].astype(np.float64)

    return PpoPolicy(act, value, {"sha256": hashlib.sha256(content).hexdigest(), "foreign": True})
