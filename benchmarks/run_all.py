"""All benchmarks one after another, then the tables of docs/benchmarks.md.

    .venv/bin/python benchmarks/run_all.py [--only NAME ...] [--quick] [--bf16] [--tiny]

Nothing else should run meanwhile: with as many threads as cores, a busy core stretches every parallel section.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import data_throughput
import dpo_step
import group_size
import grpo_step
import hvac_steps
import plan_error
import ppo_step
import reward_step
import sampling
import sft_step
import tree_peak
import update_docs
from _harness import BenchmarkError, Options, say

BENCHMARKS: dict[str, Callable[[Options], None]] = {
    "tree_peak": tree_peak.run,
    "sampling_vs_generate": lambda options: sampling.run(options, ("generate",)),
    "sampling_vs_vllm": lambda options: sampling.run(options, ("vllm",)),
    "group_size": group_size.run,
    "grpo_step": grpo_step.run,
    "sft_step": sft_step.run,
    "reward_step": reward_step.run,
    "dpo_step": dpo_step.run,
    "ppo_step": ppo_step.run,
    "hvac_steps": hvac_steps.run,
    "data_throughput": data_throughput.run,
    "plan_error": plan_error.run,
}


def main() -> int:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), help="some of the benchmarks")
    arguments = parser.parse_args()
    options = Options.of(arguments)
    failed = []
    for name in arguments.only or BENCHMARKS:
        start = time.perf_counter()
        say(f"{name} ...")
        try:
            BENCHMARKS[name](options)
        except BenchmarkError as error:
            failed.append(f"{name}: {error}")
            say(failed[-1])
        say(f"{name} took {time.perf_counter() - start:.0f} s")
    if not options.tiny:
        update_docs.update()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
