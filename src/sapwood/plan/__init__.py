"""`sapwood train RECIPE --plan`: parameters, memory by part and time of a run, told before any weight is loaded.

The run's own parts are built with models that have shapes and no weights, its first records or tasks become rows, and
the passes over its largest micro-batch are counted on torch's meta device. docs/planning.md says how good that is.

    from sapwood.plan import plan
    made = plan(load_recipe("recipes/hvac_demo.yaml"))
    print(made.memory.peak, made.fits, made.advice)
"""

from __future__ import annotations

from sapwood.plan.making import Plan, plan, warning

__all__ = ["Plan", "plan", "warning"]
