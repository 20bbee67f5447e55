"""EnergyPlus in a process of its own: runs one simulation after the other, a step a request.

This file is a program, run by path, that imports the standard library and `pyenergyplus` only. It reads JSON lines
from standard input and writes JSON lines to standard output:

    parent                                                     worker
    {"folder": DIR, "zones": [...]}                        ->  {"ready": true}
    {"run": {"epw": FILE, "until": k, "every": m}}         ->  {"state": {...}}
    {"heat": [[W a zone], [W of people a zone]]}           ->  {"state": {...}}

state: "temperatures" [n] (degC), "outdoor" (degC), "ghi" (W/m2 on the horizontal): the air when the step begins and
the weather that holds over it. DIR/in.idf is what is run; `energyplus_model` writes it. The model's thermostats hold
the zones through EnergyPlus' warm-up and the first `until` zone time steps; then they are off, and a `heat` is taken
every `every` zone time steps. Another `run` ends the simulation. A failure answers {"error": sentence}.

The process ends when standard input does, also in the middle of a simulation, and then removes DIR: a parent that was
killed leaves neither process nor files.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

#: Names of the equipment that `energyplus_model` adds to a zone, with the zone's name in front.
POWER, PEOPLE = "SAPWOOD POWER", "SAPWOOD PEOPLE"
#: Name of the schedule that is 1 while the thermostats hold the zones.
HOLDING = "SAPWOOD HOLDING"
TEMPERATURE = "Zone Air Temperature"
WEATHER = (
    "Site Outdoor Air Drybulb Temperature",
    "Site Diffuse Solar Radiation Rate per Area",
    "Site Direct Solar Radiation Rate per Area",
    "Site Solar Altitude Angle",
)


class Simulation:
    """One run of DIR/in.idf; its steps wait for the parent's requests."""

    def __init__(self, api: Any, folder: Path, zones: list[str], options: dict[str, Any], parent: Parent) -> None:
        self._api, self._x = api, api.exchange
        self._folder, self._zones, self._parent = folder, zones, parent
        self._epw, self._until, self._every = options["epw"], options["until"], options["every"]
        self._step = 0
        self._handles: dict[str, list[int]] = {}
        #: The request that ended this simulation, to be served next; None at the end of the run period.
        self.next_request: dict[str, Any] | None = None
        self._ended = False
        self._failure = ""

    def run(self) -> None:
        """Run until another request ends it. Raises RuntimeError with EnergyPlus' own words if it fails."""
        state = self._api.state_manager.new_state()
        try:
            self._api.runtime.set_console_output_status(state, False)
            for zone in self._zones:
                self._x.request_variable(state, TEMPERATURE, zone)
            for name in WEATHER:
                self._x.request_variable(state, name, "ENVIRONMENT")
            self._api.runtime.callback_begin_zone_timestep_before_init_heat_balance(state, self._begin_step)
            files = ["-d", str(self._folder), "-w", self._epw, str(self._folder / "in.idf")]
            code = self._api.runtime.run_energyplus(state, files)
        finally:
            self._api.state_manager.delete_state(state)
        if self._failure:
            raise RuntimeError(self._failure)
        if not self._ended:
            raise RuntimeError(_last_words(self._folder / "eplusout.err", code))

    def _begin_step(self, state: Any) -> None:
        """Before every zone time step: set the heat that flows during it."""
        if self._ended or not self._x.api_data_fully_ready(state):
            return
        if not self._handles and not self._find_handles(state):
            return
        temperatures = [self._x.get_variable_value(state, handle) for handle in self._handles["temperature"]]
        if self._x.warmup_flag(state) or self._step < self._until:
            self._step += not self._x.warmup_flag(state)
            return
        if (self._step - self._until) % self._every == 0:
            if self._step == self._until:
                self._set(state, "holding", [0.0])
            self._exchange(state, temperatures)
        self._step += 1

    def _exchange(self, state: Any, temperatures: list[float]) -> None:
        outdoor, diffuse, direct, altitude = (
            self._x.get_variable_value(state, handle) for handle in self._handles["weather"]
        )
        ghi = diffuse + direct * max(math.sin(math.radians(altitude)), 0.0)
        self._parent.answer({"state": {"temperatures": temperatures, "outdoor": outdoor, "ghi": ghi}})
        request = self._parent.request()
        if "heat" not in request:
            self.next_request, self._ended = request, True
            self._api.runtime.stop_simulation(state)
            return
        power, people = request["heat"]
        self._set(state, "power", power)
        self._set(state, "people", people)

    def _set(self, state: Any, which: str, watts: list[float]) -> None:
        for handle, value in zip(self._handles[which], watts, strict=True):
            self._x.set_actuator_value(state, handle, value)

    def _find_handles(self, state: Any) -> bool:
        def equipment(kind: str) -> list[int]:
            names = [f"{zone} {kind}" for zone in self._zones]
            return [self._x.get_actuator_handle(state, "OtherEquipment", "Power Level", name) for name in names]

        found = {
            "temperature": [self._x.get_variable_handle(state, TEMPERATURE, zone) for zone in self._zones],
            "weather": [self._x.get_variable_handle(state, name, "ENVIRONMENT") for name in WEATHER],
            "power": equipment(POWER),
            "people": equipment(PEOPLE),
            "holding": [self._x.get_actuator_handle(state, "Schedule:Constant", "Schedule Value", HOLDING)],
        }
        missing = [kind for kind, handles in found.items() if -1 in handles]
        if missing:
            self._failure = f"EnergyPlus knows no {missing[0]} of one of the zones {', '.join(self._zones)}"
            self._ended = True
            self._api.runtime.stop_simulation(state)
            return False
        self._handles = found
        return True


def _last_words(errors: Path, code: int) -> str:
    """What EnergyPlus' error file says of its end."""
    lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() if errors.exists() else []
    grave = [line.strip(" *") for line in lines if "** Severe" in line or "**  Fatal" in line]
    said = "; ".join(" ".join(line.split()) for line in grave[:2]) or "it gave no reason"
    return f"EnergyPlus stopped with code {code}: {said}"


class Parent:
    """Requests and answers. A thread of its own reads, so that the end of the parent is noticed at any time."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # EnergyPlus prints; what it says must not mix with the answers.
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        opening = sys.stdin.buffer.readline()
        if not opening:
            os._exit(0)
        self.opening: dict[str, Any] = json.loads(opening)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._requests.put(json.loads(line))
        os.chdir("/")
        shutil.rmtree(self.opening["folder"], ignore_errors=True)
        os._exit(0)

    def request(self) -> dict[str, Any]:
        """The next request."""
        return self._requests.get()

    def answer(self, message: dict[str, Any]) -> None:
        """Send an answer."""
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()


def main() -> None:
    """Serve until standard input ends."""
    parent = Parent()
    folder = Path(parent.opening["folder"])
    os.chdir(folder)
    from pyenergyplus.api import EnergyPlusAPI  # pyright: ignore[reportMissingImports]

    api = EnergyPlusAPI()
    parent.answer({"ready": True})
    request = parent.request()
    while True:
        simulation = Simulation(api, folder, parent.opening["zones"], request["run"], parent)
        try:
            simulation.run()
        except RuntimeError as error:
            parent.answer({"error": str(error)})
        request = simulation.next_request or parent.request()


if __name__ == "__main__":
    main()
