"""One DPO step beside TRL's DPOTrainer: seconds and peak memory, same model, dtype, pairs and learning rate.

    .venv/bin/python benchmarks/dpo_step.py [--bf16] [--quick] [--trl-micro-batch 4]

Adapters on every linear layer, the reference is the model with its adapters off, on both sides. A step reads the pairs,
scores them by the reference, learns and updates. TRL forwards --trl-micro-batch pairs at a time.
"""

from __future__ import annotations

from typing import Any

from _harness import Options, model_folder, publish
from _records import PAIRS, TINY_PAIRS, pair_workload
from _versus import Contest, contest

MICRO_BATCH = 4


def pair_rows(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the pairs: prompt and reply ids."""
    names = ("chosen_ids", "rejected_ids")
    return [{"prompt_ids": pair["prompt_ids"], "reply_ids": pair[name]} for pair in pairs for name in names]


def measure(dtype: str, options: Options, micro_batch: int) -> Contest:
    """The contestants of one dtype."""
    shape = TINY_PAIRS if options.tiny else PAIRS
    model = model_folder()
    workload = pair_workload(model, shape)
    pairs = workload["pairs"]
    return Contest(
        name="dpo_step",
        script="peers/trl_dpo.py",
        peer_name="TRL 1.16 DPOTrainer",
        shape=str(shape),
        spec={"model": model, "dtype": dtype, "threads": options.threads, "rank": 16, "learning_rate": 1e-5},
        ours={
            "records": [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs],
            "rows": pair_rows(pairs),
            "tokens": 2 * shape.pairs * shape.answer,
            "recipe": {"algorithm": {"name": "dpo", "beta": 0.1}},
        },
        peers={"trl": {"workload": workload, "micro_batch": micro_batch}},
        note=f"TRL forwards {min(micro_batch, shape.pairs)} pairs at once, and on a CPU its head scores every position",
    )


def run(options: Options, micro_batch: int = MICRO_BATCH) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        made = measure(dtype, options, micro_batch)
        publish("dpo_step", contest(made, options, 1 if options.quick or options.tiny else 3), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--trl-micro-batch", type=int, default=MICRO_BATCH, help="pairs that TRL forwards at once")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.trl_micro_batch)


if __name__ == "__main__":
    main()
