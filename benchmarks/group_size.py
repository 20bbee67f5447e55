"""How the cost of forward and backward grows with the group: the token tree beside the padded way.

    .venv/bin/python benchmarks/group_size.py [--quick] [--padded-up-to 4]

One 1,500-token prompt, 32-token replies, group sizes 1 to 64. Padded is one row per sample with the prompt repeated,
logits only for the reply, four rows at a time; it is measured up to --padded-up-to samples and null beyond.
"""

from __future__ import annotations

from _harness import Options, Outcome, Row, Side, machine, median, model_folder, publish, take_turns, time_ratio
from _workload import Shape, workload

LONG = Shape(prompts=1, group=64, shared=1_459, own=41, new_tokens=32)
SHORT = Shape(prompts=1, group=4, shared=40, own=8, new_tokens=4)


def sizes(largest: int) -> list[int]:
    """1, 2, 4, ... up to the largest."""
    return [2**k for k in range(largest.bit_length())]


def _labels(prefix: str, largest: int) -> dict[str, dict[str, int]]:
    return {f"{prefix} {size}": {"group": size, "micro_batch": min(size, 4)} for size in sizes(largest)}


def measure(dtype: str, options: Options, padded_up_to: int) -> list[Row]:
    """A row per group size."""
    shape = SHORT if options.tiny else LONG
    model = model_folder()
    spec = {"task": "tree", "model": model, "dtype": dtype, "threads": options.threads, "rank": 8}
    spec |= {"workload": workload(model, shape)}
    facts = machine(options.threads)
    tree = Side("ours tree", "_ours.py", spec, _labels("ours", shape.group), peer=False, warm_up=True)
    padded = Side("padded", "peers/padded.py", spec, _labels("padded", min(padded_up_to, shape.group)))
    outcome = take_turns([tree, padded], 1, options.time_limit)
    return [_row(size, shape, dtype, facts, outcome) for size in sizes(shape.group)]


def _row(size: int, shape: Shape, dtype: str, facts: dict, outcome: Outcome) -> Row:
    ours, padded = median(outcome.seconds(f"ours {size}")), median(outcome.seconds(f"padded {size}"))
    prompt = shape.shared + shape.own
    nodes = [result["nodes"] for result in outcome.results.get(f"ours {size}", ())]
    distinct = nodes[0] if nodes else prompt + size * shape.new_tokens
    note = f"{distinct:,} distinct tokens, {size * (prompt + shape.new_tokens):,} padded"
    return Row(
        name=f"group_size_cost_{size}",
        ours=ours,
        peer=padded,
        ratio=time_ratio(ours, padded),
        unit="s",
        shape=f"prompt {prompt}, {size} x {shape.new_tokens} tokens",
        dtype=dtype,
        machine=facts,
        peer_name="padded rows, transformers + PEFT",
        note=note if padded is not None else f"{note}; padded not measured",
    )


def run(options: Options, padded_up_to: int | None = None) -> None:
    """Measure, print and write. Only fp32: the growth is the point, not the dtype."""
    largest = padded_up_to or (2 if options.quick else 4)
    publish("group_size", measure("float32", options, largest), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--padded-up-to", type=int, help="largest group size of the padded way (4; quick: 2)")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.padded_up_to)


if __name__ == "__main__":
    main()
