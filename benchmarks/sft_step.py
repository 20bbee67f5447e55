"""One SFT step beside TRL's SFTTrainer with packing: trained tokens per second, same model, dtype, data, learning rate.

    .venv/bin/python benchmarks/sft_step.py [--bf16] [--quick]

Demonstrations of mixed lengths that share nothing, the loss on the answers, adapters on every linear layer. On a CPU
TRL keeps packed documents apart by an attention mask, whose cost grows with a pack's length, so packs of several
lengths are measured beside padded rows, and the fastest counts. Packs in which documents see each other ("wrapped")
train on something else and are left out.
"""

from __future__ import annotations

from typing import Any

from _harness import Options, model_folder, publish
from _records import DEMOS, TINY_DEMOS, demo_workload
from _versus import Contest, contest

#: TRL's variants: label -> packing, tokens of a pack, packs (or rows) forwarded at once.
VARIANTS: dict[str, tuple[str, int, int]] = {
    "packs of 512": ("bfd", 512, 1),
    "packs of 1024": ("bfd", 1024, 1),
    "padded rows, 4 at once": ("none", 1024, 4),
}


def measure(dtype: str, options: Options) -> Contest:
    """The contestants of one dtype."""
    shape = TINY_DEMOS if options.tiny else DEMOS
    model = model_folder()
    workload = demo_workload(model, shape)
    demos = workload["demos"]
    peers: dict[str, dict[str, Any]] = {
        label: {"workload": workload, "packing": packing, "max_length": length, "micro_batch": at_once}
        for label, (packing, length, at_once) in VARIANTS.items()
    }
    total = sum(len(demo["prompt_ids"]) + len(demo["answer_ids"]) for demo in demos)
    trained = sum(len(demo["answer_ids"]) for demo in demos)
    return Contest(
        name="sft_step",
        script="peers/trl_sft.py",
        peer_name="TRL 1.16 SFTTrainer",
        shape=f"{shape}: {total:,}, of which {trained:,} trained",
        spec={"model": model, "dtype": dtype, "threads": options.threads, "rank": 16, "learning_rate": 1e-5},
        ours={
            "records": [{"prompt": demo["prompt"], "response": demo["answer"]} for demo in demos],
            "rows": [{"prompt_ids": demo["prompt_ids"], "reply_ids": demo["answer_ids"]} for demo in demos],
            "tokens": trained,
            "recipe": {"algorithm": {"name": "sft"}},
        },
        peers=peers,
        note="on a CPU TRL's head scores every position",
        by_tokens=True,
    )


def run(options: Options) -> None:
    """Measure, print and write."""
    rounds = 1 if options.quick or options.tiny else 3
    for dtype in options.dtypes:
        publish("sft_step", contest(measure(dtype, options), options, rounds), options)


if __name__ == "__main__":
    run(Options.of(Options.parser(__doc__.splitlines()[0]).parse_args()))
