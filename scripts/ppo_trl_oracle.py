"""Numbers of the last TRL that had a PPOTrainer, for tests/oracles/test_ppo_trl.py to compare with.

    python3 -m venv .venv-trlppo && .venv-trlppo/bin/pip install -r benchmarks/requirements-ppo.txt
    .venv-trlppo/bin/python scripts/ppo_trl_oracle.py tests/oracles/data/ppo_trl.json

That file pins torch 2.13.0, trl 1.12.0 and transformers 5.19.0.

What runs is TRL's own `PPOTrainer.train`, unbound, on a stand-in `self`: the KL penalty, where the score is paid, both
whitenings, GAE, clipped losses, clip fractions and the backward pass are its code, and none of it is transcribed.
What is replaced are the models around it: sampling, forwards, values and scores answer with random numbers (its own
`selective_log_softmax` turns the logits into log-probabilities). Wrappers around its `masked_whiten` and
`selective_log_softmax` only note what passes through them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from torch import Tensor
from trl.experimental.ppo import ppo_trainer as theirs

ROWS, CONTEXT, WIDTH, VOCABULARY = 4, 2, 6, 7
PAD, EOS = 0, 6
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.3},
    "discounted": {"gamma": 0.9, "lam": 0.5},
    "whitened_rewards": {"whiten_rewards": True},
    "tight_clips": {"cliprange": 0.05, "cliprange_value": 0.05, "vf_coef": 0.5},
    # Replies of 3, 6, 1 and 5 tokens, the shorter ones ended by the stop token.
    "ragged": {"ragged": True},
}
LENGTHS = (3, 6, 1, 5)
DEFAULTS = {
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
}


class World:
    """Random logits, values and scores; what TRL made of them is noted in `seen`."""

    def __init__(self, seed: int, ragged: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.queries = torch.tensor([[1 + row, 3] for row in range(ROWS)])
        self.responses = torch.randint(1, EOS, (ROWS, WIDTH), generator=generator)
        if ragged:
            for row, length in enumerate(LENGTHS):
                if length < WIDTH:
                    self.responses[row, length - 1] = EOS
        self.old_logits, self.scores = draw(ROWS, WIDTH, VOCABULARY), draw(ROWS)
        total = CONTEXT + WIDTH
        self.reference_logits = draw(ROWS, total, VOCABULARY)
        self.values = draw(ROWS, total, 1)
        self.new_logits = draw(ROWS, total, VOCABULARY) * 0.3
        self.new_logits[:, CONTEXT - 1 : -1] += self.old_logits
        self.new_values = (self.values + 0.2 * draw(ROWS, total, 1)).requires_grad_()
        self.seen: dict[str, Any] = {"whitened": [], "logprobs": [], "order": None}

    def forward(self, model: Any, query_responses: Tensor, pad: int) -> Any:
        """In place of its `forward`: the reference's logits, or the trained policy's and critic's."""
        if model == "reference":
            return SimpleNamespace(logits=self.reference_logits.clone())
        order = query_responses[:, 0] - 1  # the trainer shuffles rows
        self.seen["order"] = order
        logits = self.new_logits[order].clone().requires_grad_()
        return SimpleNamespace(logits=logits * 1.0), self.new_values[order]

    def get_reward(self, model: Any, *_: Any) -> tuple[Tensor, Tensor, None]:
        """In place of its `get_reward`: values of the critic, and scores of the reward model."""
        return self.values, self.scores.clone(), None

    def softmax(self, logits: Tensor, index: Tensor) -> Tensor:
        """Its own, noted: first the old policy's, then the reference's, then the trained policy's."""
        logprobs = theirs_softmax(logits, index)
        if logprobs.requires_grad:
            logprobs.retain_grad()
        self.seen["logprobs"].append(logprobs)
        return logprobs

    def whiten(self, values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """Its own, noted."""
        whitened = theirs_whiten(values, mask, shift_mean)
        self.seen["whitened"].append((values, mask, whitened))
        return whitened


theirs_softmax, theirs_whiten = theirs.selective_log_softmax, theirs.masked_whiten


@contextlib.contextmanager
def unwrapped(*_: Any, **__: Any) -> Iterator[Any]:
    """In place of `unwrap_model_for_generation`."""
    yield SimpleNamespace(policy=None)


def trainer(options: dict[str, Any], ragged: bool, losses: list[Tensor], logged: dict[str, float]) -> Any:
    """A stand-in for the trainer's `self`."""
    args = SimpleNamespace(
        **options,
        response_length=WIDTH,
        temperature=1.0,
        num_ppo_epochs=1,
        num_mini_batches=1,
        gradient_accumulation_steps=1,
        num_total_batches=1,
        total_episodes=ROWS,
        logging_steps=None,
        eval_steps=None,
        save_steps=None,
        batch_size=ROWS,
        local_batch_size=ROWS,
        local_mini_batch_size=ROWS,
        per_device_train_batch_size=ROWS,
        local_rollout_forward_batch_size=ROWS,
        ds3_gather_for_generation=False,
        missing_eos_penalty=None,
        num_sample_generations=0,
    )

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()

    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        print=lambda *a: None,
        unwrap_model=lambda m: m,
        accumulate=lambda m: contextlib.nullcontext(),
        gather_for_metrics=lambda x: x,
        backward=backward,
    )
    return SimpleNamespace(
        args=args,
        accelerator=accelerator,
        optimizer=MagicMock(),
        model=SimpleNamespace(train=lambda: None, value_model="values", policy="policy"),
        ref_model="reference",
        reward_model="reward",
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        stop_token_id=EOS if ragged else None,
        state=SimpleNamespace(),
        train_dataset_len=ROWS,
        callback_handler=MagicMock(**{"on_step_end.return_value": SimpleNamespace(should_save=False)}),
        control=None,
        is_deepspeed_enabled=False,
        lr_scheduler=MagicMock(),
        log=logged.update,
        dataloader=None,
    )


def run(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One case: what went in, and what TRL made of it. Arrays [ROWS][WIDTH]."""
    options = DEFAULTS | options
    ragged = options.pop("ragged", False)
    world, losses, logged = World(sorted(CASES).index(name), ragged), [], {}
    stand_in = trainer(options, ragged, losses, logged)
    stand_in.dataloader = [{"input_ids": world.queries}]
    stand_in.callback_handler.on_train_end.return_value = SimpleNamespace(should_save=False)
    sampled = torch.cat([world.queries, world.responses], dim=1)
    replaced = {
        "unwrap_model_for_generation": unwrapped,
        "batch_generation": lambda *a: (sampled, world.old_logits),
        "forward": world.forward,
        "get_reward": world.get_reward,
        "selective_log_softmax": world.softmax,
        "masked_whiten": world.whiten,
    }
    with contextlib.ExitStack() as stack:
        for attribute, value in replaced.items():
            stack.enter_context(patch.object(theirs, attribute, value))
        theirs.PPOTrainer.train(stand_in)
    old, reference, new = world.seen["logprobs"]
    advantages, mask, whitened = world.seen["whitened"][-1]
    back = torch.argsort(world.seen["order"])
    inside = slice(CONTEXT - 1, -1)
    assert new.grad is not None
    assert world.new_values.grad is not None
    arrays = {
        "old_logprobs": old,
        "reference_logprobs": reference,
        "values": world.values[:, inside, 0],
        "logprobs": new.detach()[back],
        "new_values": world.new_values.detach()[:, inside, 0],
        "advantages": advantages,
        "whitened": whitened,
        "logprob_gradients": new.grad[back],
        "value_gradients": world.new_values.grad[:, inside, 0],
    }
    if options["whiten_rewards"]:
        arrays["rewards"], _, arrays["whitened_rewards"] = world.seen["whitened"][0]
    return {
        "options": options,
        "lengths": mask.sum(1).tolist(),
        "scores": world.scores.tolist(),
        "loss": losses[0].item(),
        "logged": {key: float(value) for key, value in logged.items() if key not in ("eps", "lr", "val/ratio_var")},
        **{key: value.tolist() for key, value in arrays.items()},
    }


def main() -> None:
    """Write every case to the file named on the command line."""
    made = {"trl": trl.__version__, "torch": torch.__version__, "cases": {n: run(n, dict(o)) for n, o in CASES.items()}}
    Path(sys.argv[1]).write_text(json.dumps(made, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
