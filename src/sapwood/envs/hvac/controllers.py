"""Controllers without a language model: what a reply is compared with, and where few-shot answers come from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, minimize

from sapwood.envs.hvac.simulator import ENERGY_SCALE, HvacEnv

Action = NDArray[np.float64]
Controller = Callable[[HvacEnv], Action]

#: Actions of uniform control that `one_step_optimal` chooses from: what two decimals can say.
GRID = np.arange(-100, 101) / 100.0


def zero(env: HvacEnv) -> Action:
    """Everything off."""
    return np.zeros(env.action_space.shape or ())


def random_controller(seed: int) -> Controller:
    """Uniform powers in -1..1, a function of the seed."""
    rng = np.random.default_rng(seed)
    return lambda env: rng.uniform(-1.0, 1.0, env.action_space.shape)


def proportional(env: HvacEnv) -> Action:
    """Heat in proportion to how far the zones are below target, with the gain that doesn't overshoot.

    Over one step the deviation x of the powered zones becomes A_d x + G a. With a = -x / G it becomes (A_d - 1) x,
    and as 0 < A_d < 1 that shrinks at every time step, whereas a fixed gain oscillates at an hour. Uniform control
    takes the mean deviation and the mean gain, per-zone control the matrix. The controller knows no weather.

    Air that has a mass beside it follows its power in minutes: over an hour A_d is near 0, and -x would swing on. There
    a = -(1 + A_d) x / 2G, which leaves (A_d - 1) / 2 of a deviation, and is the same for short steps.
    """
    on = env.physics.powered.astype(bool)
    _, gain = env.response()
    below = env.target - env.temperatures[on]
    if len(env.physics.a_d) > env.zones:
        below = 0.5 * (below + env.physics.a_d[: env.zones, : env.zones][np.ix_(on, on)] @ below)
    if env.control == "uniform":
        return np.clip([below.mean() / gain[on].mean()], -1.0, 1.0)
    action = np.zeros(env.zones)
    action[on] = np.linalg.lstsq(gain[np.ix_(on, on)], below, rcond=None)[0]
    return np.clip(action, -1.0, 1.0)


def one_step_optimal(env: HvacEnv) -> Action:
    """The action with the best reward of the next step, which the simulator knows exactly.

    Uniform control: the best of the two-decimal actions. Per zone: bounded least squares on the comfort term (the
    energy term, 0.024 a unit of power against 0.999 a kelvin, is left out; exact for pnorm 2 and beta 1), and from
    there a descent on the whole loss where energy has a price.
    """
    on = env.physics.powered.astype(bool)
    free, gain = env.response()
    below = env.target - free[on]
    if env.control == "uniform":
        comfort = np.linalg.norm(below[:, None] - gain[on] * GRID, ord=env.pnorm, axis=0)
        energy = np.abs(GRID) * np.linalg.norm(env.physics.powered, ord=env.pnorm)
        cost = (1.0 - env.beta) * ENERGY_SCALE * energy + env.beta * comfort
        cost += env.unit_cost * np.abs(GRID) * env.physics.powered.sum()
        return GRID[[int(cost.argmin())]]
    action = np.zeros(env.zones)
    action[on] = lsq_linear(gain[np.ix_(on, on)], below, bounds=(-1.0, 1.0)).x
    if env.unit_cost:
        action[on] = _descend(env, gain[np.ix_(on, on)], below, action[on])
    return action


def _descend(env: HvacEnv, gain: Action, below: Action, start: Action) -> Action:
    """Powers in -1..1 with the least loss, from `start`: heating and cooling parts apart, so that |a| is smooth."""
    n = len(start)

    def loss(parts: Action) -> float:
        power = parts[:n] - parts[n:]
        energy, comfort = (np.linalg.norm(x, ord=env.pnorm) for x in (power, below - gain @ power))
        paid = env.unit_cost * parts.sum()
        return float((1.0 - env.beta) * ENERGY_SCALE * energy + env.beta * comfort + paid)

    # The norm has a kink where it is 0, at `start`: a descent from off to the side of it finds its way too.
    first = np.concatenate([np.maximum(start, 0.0), np.maximum(-start, 0.0)])
    tries = [first]
    for parts in (first, 0.5 * first):
        tries.append(minimize(loss, parts, method="L-BFGS-B", bounds=[(0.0, 1.0)] * (2 * n)).x)
    best = min(tries, key=loss)
    return best[:n] - best[n:]


def episode_return(env: HvacEnv, controller: Controller) -> float:
    """Undiscounted return of an episode that was reset already."""
    total, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(controller(env).astype(np.float32))
        total += reward
        done = terminated or truncated
    return total
