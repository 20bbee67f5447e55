"""One GRPO step beside TRL's GRPOTrainer: seconds and peak memory, same model, dtype, shape and learning rate.

    .venv/bin/python benchmarks/grpo_step.py [--bf16] [--quick] [--trl-micro-batch 8]

Steps alternate between the two processes. TRL runs with gradient_checkpointing off and beta 0; it samples all rows at
once and forwards --trl-micro-batch of them at a time, 8 as by default, which takes 14 GB in fp32.
Each side samples, scores, learns and updates in every step.
"""

from __future__ import annotations

from _harness import Options, Outcome, Row, Side, machine, median, model_folder, publish, take_turns, time_ratio
from _workload import STEP, TINY, Shape, workload

#: Rows that TRL forwards at once: its default for per_device_train_batch_size.
MICRO_BATCH = 8
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def measure(dtype: str, options: Options, micro_batch: int) -> list[Row]:
    """The time row and the memory row of one dtype."""
    shape = TINY if options.tiny else STEP
    model = model_folder()
    spec = {
        "task": "step",
        "model": model,
        "dtype": dtype,
        "threads": options.threads,
        "rank": 8,
        "learning_rate": 1e-5,
        "micro_batch": micro_batch,
        "workload": workload(model, shape),
    }
    facts = machine(options.threads)
    sides = [
        Side("ours step", "_ours.py", spec, {"ours": {}}, peer=False, warm_up=True),
        # TRL warms up on a small shape of its own: see peers/trl_grpo.py.
        Side("trl step", "peers/trl_grpo.py", spec, {"trl": {}}),
    ]
    rounds = 1 if options.quick or dtype == "bfloat16" else 2
    outcome = take_turns(sides, rounds, options.time_limit)
    return [_time_row(dtype, shape, facts, outcome, micro_batch), _memory_row(dtype, shape, facts, outcome)]


def _time_row(dtype: str, shape: Shape, facts: dict, outcome: Outcome, micro_batch: int) -> Row:
    ours, trl = median(outcome.seconds("ours")), median(outcome.seconds("trl"))
    notes = [f"TRL forwards {min(micro_batch, shape.rows)} rows at once", *outcome.reasons]
    if trl is None and "trl" in outcome.bounds:
        trl = outcome.bounds["trl"]
        notes.append("so peer and ratio are lower bounds")
    sampling = median([result["sampling_seconds"] for result in outcome.results.get("ours", ())])
    if sampling is not None:
        notes.insert(0, f"{sampling:.1f} s of ours is sampling")
    return Row(
        name=f"grpo_step_{_SHORT[dtype]}",
        ours=ours,
        peer=trl,
        ratio=time_ratio(ours, trl),
        unit="s/step",
        shape=str(shape),
        dtype=dtype,
        machine=facts,
        peer_name="TRL 1.16 GRPOTrainer",
        note="; ".join(notes),
        samples={"ours": outcome.seconds("ours"), "peer": outcome.seconds("trl")},
    )


def _memory_row(dtype: str, shape: Shape, facts: dict, outcome: Outcome) -> Row:
    ours, trl = outcome.peaks.get("ours step"), outcome.peaks.get("trl step")
    return Row(
        name=f"grpo_step_memory_{_SHORT[dtype]}",
        ours=ours,
        peer=trl,
        ratio=time_ratio(ours, trl),
        unit="MiB peak RSS",
        shape=str(shape),
        dtype=dtype,
        machine=facts,
        peer_name="TRL 1.16 GRPOTrainer",
        note="; ".join(outcome.reasons),
    )


def run(options: Options, micro_batch: int = MICRO_BATCH) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        publish("grpo_step", measure(dtype, options, micro_batch), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--trl-micro-batch", type=int, default=MICRO_BATCH, help="rows that TRL forwards at once")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.trl_micro_batch)


if __name__ == "__main__":
    main()
