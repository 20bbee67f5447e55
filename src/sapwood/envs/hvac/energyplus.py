"""The building in EnergyPlus: the same environment as `HvacEnv`, with a whole-building simulation behind it."""

from __future__ import annotations

import copy
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.envs._process import Worker
from sapwood.envs.hvac.energyplus_model import (
    data_folder,
    envelope,
    episode_model,
    weather_file,
    zone_step,
)
from sapwood.envs.hvac.simulator import DAYS, HvacEnv
from sapwood.errors import ConfigError, EnvError

WORKER = Path(__file__).with_name("energyplus_worker.py")
#: Zone temperatures beyond which EnergyPlus itself gives up [degC].
TEMPERATURE_RANGE = (-100.0, 200.0)


class EnergyPlusEnv(HvacEnv):
    """`HvacEnv` with EnergyPlus as the building: the same options, observation, action and reward.

    What is simulated is described in `energyplus_model`; the powers of the action and the people go to the zones as
    heat. A `reset` holds all zones at the initial temperature through EnergyPlus' warm-up days and from midnight to
    the hour of the start, so that walls and furniture have settled to it. The observation's outdoor temperature and
    irradiance are EnergyPlus' own of the coming zone time step (5 minutes at most); the ground's are its input.

    `response`, and with it the proportional controller, is that of the RC model with the same options, from the
    temperatures that EnergyPlus has; shgc, shgc_weight, ground_weight, thermal_mass ("fitted" by default) and
    mass_coupling act on it alone.

    EnergyPlus runs in a process of its own, from the first `reset` until `close` (or until the environment is
    collected, or Python ends). The process is killed if a reset takes longer than `reset_timeout` or a step longer
    than `step_timeout` seconds; then, or if it crashes, the call raises EnvError, and the next `reset` begins with a
    new process. Episodes are a function of their options, day, hour, initial temperature and actions.
    """

    def __init__(self, *args: Any, step_timeout: float = 60.0, reset_timeout: float = 120.0, **options: Any) -> None:
        data_folder()
        super().__init__(*args, **{"thermal_mass": "fitted", **options})
        self._session: _Session | None = None
        self._seconds = zone_step(self.physics.time_res)
        for name, limit in (("step_timeout", step_timeout), ("reset_timeout", reset_timeout)):
            if not limit > 0:
                raise ConfigError(f"hvac: {name} {limit:g}; give a positive number of seconds.")
        if self.episode_len * self.physics.time_res > DAYS * 86400:
            raise ConfigError(f"hvac: episode_len {self.episode_len} is longer than a year; give fewer steps.")
        self.step_timeout, self.reset_timeout = step_timeout, reset_timeout
        envelope(self.physics.building)
        climate, epw = (args[1] if len(args) > 1 else options.get("climate", "Hot_Dry")), options.get("epw")
        self._weather_file = weather_file(climate, epw)
        self._hour = 0.0
        self._initial = np.zeros(self.zones)
        self._heat: list[list[list[float]]] = []  # of every step so far: [W a zone, W of people a zone]

    def _observation_space(self) -> Any:
        space: Any = super()._observation_space()
        low, high = space.low.copy(), space.high.copy()
        low[: self.zones], high[: self.zones] = TEMPERATURE_RANGE
        return type(space)(low, high, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start at the given or a random day. Raises ConfigError for options out of range, EnvError for a crash."""
        self._hour = float((options or {}).get("hour", 0.0))
        return super().reset(seed=seed, options=options)

    def _begin(self) -> None:
        self._initial = self.temperatures
        self._heat = []
        self._run()

    def _run(self) -> None:
        """Start the simulation of an episode from its initial state."""
        p = self.physics
        days = int(np.ceil((self._hour * 3600.0 + self.episode_len * p.time_res) / 86400.0)) + 1
        if self._session is None:
            self._session = _Session([zone.name for zone in p.building.zones])
        model = episode_model(p.building, p.weather, self.day, days, self._seconds, self._initial.tolist())
        until = self._start % p.steps_per_day * int(p.time_res) // self._seconds
        run = {"epw": str(self._weather_file), "until": until, "every": int(p.time_res) // self._seconds}
        self._session.write(model)
        self._take(self._ask({"run": run}, self.reset_timeout))

    def _ask(self, request: Mapping[str, Any], timeout: float) -> Mapping[str, Any]:
        if self._session is None:
            raise EnvError("EnergyPlus is not running: reset the environment before it is stepped")
        try:
            return self._session.ask(request, timeout)
        except EnvError:
            self.close()
            raise

    def _take(self, state: Mapping[str, Any]) -> None:
        """Take over what EnergyPlus says of the building and the weather."""
        n, sun_scale = self.zones, max(float(self.physics.weather.ghi.max()), 1.0)
        self._drive[:n] = state["temperatures"]
        self._outside = (state["outdoor"], state["ghi"] / sun_scale)

    def _observe(self) -> NDArray[np.float32]:
        n = self.zones
        observation = super()._observe()
        space: Any = self.observation_space
        outdoor = min(max(self._outside[0], float(space.low[n])), float(space.high[n]))
        observation[n] = self._drive[n + 2] = outdoor
        observation[n + 2] = self._drive[2 * n + 3] = min(self._outside[1], 1.0)
        return observation

    def _advance(self) -> NDArray[np.float64]:
        super()._advance()  # the model's masses go along with the air that EnergyPlus has
        n = self.zones
        power = (self._drive[n + 3 : 2 * n + 3] * self.max_power).tolist()
        heat = [power, self.people_heat.tolist()]
        state = self._ask({"heat": heat}, self.step_timeout)
        self._heat.append(heat)
        self._take(state)
        return self.temperatures

    def fork(self) -> EnergyPlusEnv:
        """An environment of its own in the same state, with a process of its own.

        EnergyPlus can't be copied, so the episode so far is simulated again: the cost of a reset and of its steps.
        """
        twin = copy.copy(self)
        twin._drive, twin._heat = self._drive.copy(), list(self._heat)
        twin._session = None
        if self._np_random is not None:
            twin._np_random = copy.deepcopy(self._np_random)
        if self._session is not None:
            try:
                twin._run()
                for heat in self._heat:
                    twin._take(twin._ask({"heat": heat}, self.step_timeout))
            except BaseException:
                twin.close()
                raise
            twin._observe()
        return twin

    def close(self) -> None:
        """End the process and remove its files. A later `reset` starts another."""
        session, self._session = self._session, None
        if session is not None:
            session.end()


class _Session:
    """A process that runs EnergyPlus in a temporary folder, which goes with it."""

    def __init__(self, zones: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sapwood-energyplus-")
        opening = {"folder": self._folder.name, "zones": zones}
        self._worker = Worker(("-P", str(WORKER)), opening)
        # Also at the end of Python: an environment that nobody closed leaves no process behind.
        self.end = weakref.finalize(self, _end, self._worker, self._folder)

    def write(self, model: str) -> None:
        """Write the model that the next run reads."""
        (Path(self._folder.name) / "in.idf").write_text(model, encoding="utf-8")

    def ask(self, request: Mapping[str, Any], timeout: float) -> Mapping[str, Any]:
        """The state that a request leads to. Raises EnvError for a failure, a crash or a late answer."""
        self._worker.wait_ready()
        self._worker.send(request)
        answer = self._worker.receive(time.monotonic() + timeout, f"EnergyPlus took longer than {timeout:g} s")
        if "error" in answer:
            raise EnvError(answer["error"])
        return answer["state"]


def _end(worker: Worker, folder: tempfile.TemporaryDirectory[str]) -> None:
    worker.kill()
    folder.cleanup()
