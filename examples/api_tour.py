"""What scripts do with Sapwood, from data to scores: train by a mapping, open the run, reply, compare, track.

python examples/api_tour.py                              # SmolLM2-135M, a few minutes on 2 cores
python examples/api_tour.py --steps 2 --runs /tmp/tour
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sapwood

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """SFT on sums, DPO from it, and what both changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=Path, default=Path("runs/tour"))
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args(arguments)

    recipe = {
        "run": {"dir": str(given.runs / "sft"), "steps": given.steps},
        "model": {"name": given.model},
        "data": f"{HERE / 'custom_data.py'}:sums",
        "algorithm": "sft",
        "optim": {"learning_rate": 3e-4, "batch_size": 16},
    }
    sft = sapwood.train(recipe)
    recipe |= {
        "run": {"dir": str(given.runs / "dpo"), "steps": given.steps},
        "model": {"name": given.model, "init_from": str(sft.run_dir)},
        "data": f"{HERE / 'custom_data.py'}:preferred_sums",
        "algorithm": {"name": "dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-4, "batch_size": 16},
    }
    dpo = sapwood.train(recipe)

    model, before = sapwood.load(dpo.run_dir), sapwood.load(sft.run_dir)
    prompts = ["12 + 34 =", "50 + 49 =", "81 + 18 ="]
    tracker = sapwood.MetricsTracker()
    for prompt, reply in zip(prompts, model.generate(prompts, temperature=0.0, max_new_tokens=6), strict=True):
        tracker.update({"length": len(reply), "right": reply.strip() == str(sum_of(prompt))})
        print(f"{prompt} {reply}")
    print("perplexity of the answers:", round(model.perplexity([{"prompt": "12 + 34 =", "response": "46"}]), 3))
    found = model.preference_metrics(prompts, ["46", "99", "99"], ["56", "98", "109"], reference=before)
    print("preference accuracy:", found["preference_accuracy"], " margin:", round(found["reward_margin"], 4))
    curve = [record["loss"] for record in sapwood.read_metrics(dpo.run_dir / "metrics.jsonl") if "loss" in record]
    print("DPO loss:", " ".join(f"{loss:.3f}" for loss in curve))
    return {**tracker.averages(), "accuracy": found["preference_accuracy"], "first_loss": curve[0]}


def sum_of(prompt: str) -> int:
    """The sum that a prompt asks for."""
    return sum(int(number) for number in prompt.removesuffix("=").split("+"))


if __name__ == "__main__":
    main()
