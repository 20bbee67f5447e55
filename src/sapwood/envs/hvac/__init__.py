"""Heating and cooling of a building: a Gymnasium simulator (`sapwood/Hvac-v0`) and the text world above it (`Hvac`).

`building` is the physics, `weather` the climates, `simulator` the Gymnasium environment, `text` the world that a
language model reads, `prompt` and `parsing` its two ends, `controllers` the baselines.
"""

import gymnasium

from sapwood.envs.hvac.building import BUILDINGS, Building, UValues, Zone, load_building
from sapwood.envs.hvac.parsing import Parsed, parse_reply
from sapwood.envs.hvac.simulator import HvacEnv
from sapwood.envs.hvac.text import Hvac, HvacText
from sapwood.envs.hvac.weather import CLIMATES, Weather, load_weather, read_epw

ENV_ID = "sapwood/Hvac-v0"
if ENV_ID not in gymnasium.registry:
    gymnasium.register(id=ENV_ID, entry_point="sapwood.envs.hvac.simulator:HvacEnv")

PLUGIN = Hvac

__all__ = [
    "BUILDINGS",
    "CLIMATES",
    "ENV_ID",
    "PLUGIN",
    "Building",
    "Hvac",
    "HvacEnv",
    "HvacText",
    "Parsed",
    "UValues",
    "Weather",
    "Zone",
    "load_building",
    "load_weather",
    "parse_reply",
    "read_epw",
]
