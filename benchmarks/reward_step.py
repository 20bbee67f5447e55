"""One reward-model step beside TRL's RewardTrainer: seconds and peak memory, same model, dtype, pairs, learning rate.

    .venv/bin/python benchmarks/reward_step.py [--bf16] [--quick] [--trl-micro-batch 4]

Adapters on every linear layer and a trained scalar head on both sides. TRL forwards --trl-micro-batch pairs at a time.
"""

from __future__ import annotations

from _harness import Options, model_folder, publish
from _records import PAIRS, TINY_PAIRS, pair_workload
from _versus import Contest, contest
from dpo_step import MICRO_BATCH, pair_rows


def measure(dtype: str, options: Options, micro_batch: int) -> Contest:
    """The contestants of one dtype."""
    shape = TINY_PAIRS if options.tiny else PAIRS
    model = model_folder()
    workload = pair_workload(model, shape)
    pairs = workload["pairs"]
    return Contest(
        name="reward_step",
        script="peers/trl_reward.py",
        peer_name="TRL 1.16 RewardTrainer",
        shape=str(shape),
        spec={"model": model, "dtype": dtype, "threads": options.threads, "rank": 16, "learning_rate": 1e-5},
        ours={
            "records": [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs],
            "rows": pair_rows(pairs),
            "tokens": 2 * shape.pairs * shape.answer,
            "recipe": {"algorithm": {"name": "reward"}},
        },
        peers={"trl": {"workload": workload, "micro_batch": micro_batch}},
        note=f"TRL forwards {min(micro_batch, shape.pairs)} pairs at once",
    )


def run(options: Options, micro_batch: int = MICRO_BATCH) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        made = measure(dtype, options, micro_batch)
        publish("reward_step", contest(made, options, 1 if options.quick or options.tiny else 3), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--trl-micro-batch", type=int, default=MICRO_BATCH, help="pairs that TRL forwards at once")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.trl_micro_batch)


if __name__ == "__main__":
    main()
