"""Heating and cooling of a building: a Gymnasium simulator (`sapwood/Hvac-v0`) and the text world above it (`Hvac`).

`building` and `physics` are the RC model, `weather` the climates, `occupancy` the people, `simulator` the Gymnasium
environment and `energyplus` the same one with EnergyPlus as the building (`sapwood/HvacEnergyPlus-v0`), `text` the
world that a language model reads, `prompt` and `parsing` its two ends, `controllers` the baselines.
"""

import gymnasium

from sapwood.envs.hvac.building import BUILDINGS, Building, UValues, Zone, load_building
from sapwood.envs.hvac.energyplus import EnergyPlusEnv
from sapwood.envs.hvac.parsing import Parsed, parse_reply
from sapwood.envs.hvac.simulator import HvacEnv
from sapwood.envs.hvac.text import Hvac, HvacText
from sapwood.envs.hvac.weather import CLIMATES, Weather, load_weather, read_epw

ENV_ID = "sapwood/Hvac-v0"
if ENV_ID not in gymnasium.registry:
    gymnasium.register(id=ENV_ID, entry_point="sapwood.envs.hvac.simulator:HvacEnv")
ENERGYPLUS_ID = "sapwood/HvacEnergyPlus-v0"
if ENERGYPLUS_ID not in gymnasium.registry:
    gymnasium.register(id=ENERGYPLUS_ID, entry_point="sapwood.envs.hvac.energyplus:EnergyPlusEnv")

PLUGIN = Hvac

__all__ = [
    "BUILDINGS",
    "CLIMATES",
    "ENERGYPLUS_ID",
    "ENV_ID",
    "PLUGIN",
    "Building",
    "EnergyPlusEnv",
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
