"""One PPO step beside the last TRL that had a PPOTrainer (1.12): seconds and peak memory, same model, dtype and shape.

    bash benchmarks/make_env_ppo.sh
    .venv/bin/python benchmarks/ppo_step.py [--bf16] [--quick] [--trl-micro-batch 4]

A step samples, scores by a reward model, a reference and a critic, and makes 4 passes over the batch, an update each.
Policy and critic are adapters on every linear layer, with a trained value head; the reference is the policy with its
adapters off; both sides score by the same reward model's folder. Ours keeps policy, reference and critic on one base;
TRL's value model is a model of its own. TRL samples and trains on --trl-micro-batch rows at a time: with 8,
its default, its step needs more than 19 GB here.
"""

from __future__ import annotations

import subprocess
import sys

from _harness import LOGS, BenchmarkError, Options, model_folder, publish
from _versus import Contest, contest
from _workload import TINY, Shape, workload

SHAPE = Shape(group=4)
EPOCHS = 4
MICRO_BATCH = 4

_CLASSIFIER = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, folder = sys.argv[1:]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model, pad_token="<|endoftext|>")
made = AutoModelForSequenceClassification.from_pretrained(
    model, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype="float32"
)
made.save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


def reward_model(model: str) -> str:
    """Folder of a classifier on the model's weights with a random head; made on the first call."""
    folder = LOGS / "reward_model"
    if not (folder / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _CLASSIFIER, model, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"no reward model: {done.stderr.strip().splitlines()[-1]}")
    return str(folder)


def measure(dtype: str, options: Options, micro_batch: int) -> Contest:
    """The contestants of one dtype."""
    shape = TINY if options.tiny else SHAPE
    model = model_folder()
    scorer = reward_model(model)
    work = workload(model, shape)
    return Contest(
        name="ppo_step",
        script="peers/trl_ppo.py",
        peer_name="TRL 1.12 PPOTrainer",
        shape=f"{shape}, {EPOCHS} epochs",
        spec={"model": model, "dtype": dtype, "threads": options.threads, "rank": 16, "learning_rate": 1e-5},
        ours={
            "records": [{"prompt": text} for text in work["texts"]],
            "rows": [{"prompt_ids": ids, "reply_ids": []} for ids in work["prompt_ids"]],
            "tokens": shape.rows * shape.new_tokens,
            "recipe": {
                "algorithm": {"name": "ppo", "group_size": shape.group, "epochs": EPOCHS, "kl_coef": 0.05},
                "rewards": [{"name": "reward_model", "path": scorer}],
                "engine": {"name": "local", "max_new_tokens": shape.new_tokens, "ignore_eos": True},
            },
        },
        peers={"trl": {"workload": work, "reward_model": scorer, "epochs": EPOCHS, "micro_batch": micro_batch}},
        note=f"TRL samples and trains on {min(micro_batch, shape.rows)} rows at a time",
        python="ppo",
    )


def run(options: Options, micro_batch: int = MICRO_BATCH) -> None:
    """Measure, print and write."""
    for dtype in options.dtypes:
        made = measure(dtype, options, micro_batch)
        publish("ppo_step", contest(made, options, 1 if options.quick or options.tiny else 2), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--trl-micro-batch", type=int, default=MICRO_BATCH, help="rows that TRL handles at once")
    arguments = parser.parse_args()
    run(Options.of(arguments), arguments.trl_micro_batch)


if __name__ == "__main__":
    main()
