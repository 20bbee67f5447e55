"""Forward and backward over a token tree as a share of the matrix-product peak, measured in the same process.

    .venv/bin/python benchmarks/tree_peak.py [--bf16] [--quick]

Which FLOPs count is said in _flops.py. The peak is the most that torch.mm reaches, in the same dtype and with as many
threads, over square matrices and the shapes of this model's layers, measured around every pass.
"""

from __future__ import annotations

import json
from pathlib import Path

from _flops import tree_flops
from _harness import Options, Row, Side, machine, model_folder, publish, rate_ratio, take_turns
from _workload import STEP, TINY, workload


def measure(dtype: str, options: Options) -> list[Row]:
    """The row of one dtype; the best pass counts, as the best product does for the peak."""
    shape = TINY if options.tiny else STEP
    model = model_folder()
    spec = {"task": "peak", "model": model, "dtype": dtype, "threads": options.threads, "rank": 8}
    spec |= {"workload": workload(model, shape)}
    facts = machine(options.threads)
    side = Side("ours peak", "_ours.py", spec, {"ours": {"group": shape.group}}, peer=False, warm_up=True)
    outcome = take_turns([side], 2 if options.quick else 5, options.time_limit)
    common = {"name": "tree_peak_share", "unit": "GFLOP/s", "dtype": dtype, "machine": facts}
    common |= {"peer_name": "torch.mm peak"}
    if not outcome.results:
        return [Row(ours=None, peer=None, ratio=None, shape=str(shape), note="; ".join(outcome.reasons), **common)]
    depths, heads = outcome.facts["ours peak"]["depths"], outcome.facts["ours peak"]["head_nodes"]
    config = json.loads((Path(model) / "config.json").read_text())
    flops = tree_flops(config, depths, heads, rank=8)
    achieved = [flops["total"] / seconds / 1e9 for seconds in outcome.seconds("ours")]
    peak = max(result["peak_flops"] for result in outcome.results["ours"]) / 1e9
    shares = ", ".join(f"{part} {100 * n / flops['total']:.0f} %" for part, n in flops.items() if part != "total")
    tokens = f"{shape.shared} + {shape.prompts}x{shape.own} + {shape.rows}x{shape.new_tokens}"
    note = (
        f"{flops['total'] / 1e9:,.0f} GFLOP counted: {shares}; linear layers forward and gradient of the input only "
        f"(frozen weights), attention by exact (query, key) pairs, LM head on {heads} scored positions, "
        "no recomputation; best pass"
    )
    return [
        Row(
            ours=max(achieved),
            peer=peak,
            ratio=rate_ratio(max(achieved), peak),
            shape=f"{tokens} = {len(depths):,} tokens",
            note="; ".join([note, *outcome.reasons]),
            samples={"ours": achieved},
            **common,
        )
    ]


def run(options: Options) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        publish("tree_peak", measure(dtype, options), options)


def main() -> None:
    run(Options.of(Options.parser(__doc__.splitlines()[0]).parse_args()))


if __name__ == "__main__":
    main()
