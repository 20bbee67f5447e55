"""What to try for each warning, most useful first.

An option in braces is shown with its value in the recipe: {optim.learning_rate}, or {algorithm.mask_truncated=true} for
a value to give it. A remedy is left out where the recipe lacks an option of it, or has the value already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sapwood.sections import WarningName

_OPTION = re.compile(r"\{([\w.]+)(=([\w.]+))?\}")

REMEDIES: dict[WarningName, tuple[str, ...]] = {
    "not_finite": (
        "`sapwood replay` on the folder under evidence/ says what isn't finite, and where",
        "lower {optim.learning_rate}, by half to begin with",
        "use float32 or bfloat16 in place of float16: {model.dtype}, {model.autocast}",
        "clip harder with {optim.max_grad_norm=0.5}",
    ),
    "sampler_gap": (
        "sample and train in one type: {engine.dtype}, {model.dtype}, {model.autocast}",
        "weight the samples by what the trainer makes of them: {algorithm.gap_correction=token}",
        "leave truncation off, at 0 and 1: {engine.top_k}, {engine.top_p}",
    ),
    "entropy_collapse": (
        "raise {algorithm.entropy_coef}, to 0.05 for example",
        "lower the clip range, {algorithm.clip_low} and {algorithm.clip_high}, to 0.15; or raise clip_high alone, to "
        "0.28, which lets improbable tokens rise",
        "replace groups that can't teach: {algorithm.dynamic_sampling=true}",
        "lower {optim.learning_rate}",
        "hold on to the reference: raise {algorithm.kl_coef}",
    ),
    "entropy_explosion": (
        "lower {algorithm.entropy_coef}, or let it fall over the run: {algorithm.entropy_schedule=linear}",
        "lower {optim.learning_rate}",
        "hold on to the reference: raise {algorithm.kl_coef}",
        "lower {engine.temperature}",
    ),
    "kl_runaway": (
        "raise {algorithm.kl_coef}",
        "let it follow the measured KL: {algorithm.kl_control} proportional or multiplicative",
        "lower {optim.learning_rate}",
        "make fewer updates of a batch: {algorithm.epochs}, {algorithm.updates}",
    ),
    "policy_lag": (
        "make fewer updates of a batch: {algorithm.epochs}, {algorithm.updates}",
        "end a batch's updates in time: {algorithm.target_kl}",
        "lower {optim.learning_rate}",
    ),
    "clip_fraction": (
        "lower {optim.learning_rate}",
        "make fewer updates of a batch: {algorithm.epochs}, {algorithm.updates}",
        "widen the clip range, {algorithm.clip_low} and {algorithm.clip_high}, to 0.3",
    ),
    "target_kl_stops": (
        "lower {optim.learning_rate}",
        "plan fewer updates: {algorithm.epochs}, {algorithm.updates}",
        "raise {algorithm.target_kl}",
    ),
    "reward_hacking": (
        "read the samples with the highest rewards: do they deserve them?",
        "stop at the best held-out return: early_stopping, checkpoint.best: eval/return",
        "hold on to the reference: raise {algorithm.kl_coef}",
        "add a reward for what is missing (length, format, diversity), or train the reward model on these replies",
    ),
    "reward_collapse": (
        "go on from the best checkpoint (`sapwood checkpoints`) with a lower {optim.learning_rate}",
        "clip harder with {optim.max_grad_norm=0.5}",
        "hold on to the reference: raise {algorithm.kl_coef}",
        "check the rewards: what is paid at random teaches a policy to fall apart",
    ),
    "reward_stalled": (
        "explore more: raise {algorithm.entropy_coef} to 0.02, or {engine.temperature}",
        "lower the KL penalty: {algorithm.kl_coef=0.005}",
        "widen the clip range, {algorithm.clip_low} and {algorithm.clip_high}, to 0.3",
        "start with easier tasks, or fine-tune on demonstrations first (sft)",
        "raise {optim.learning_rate}, where entropy and KL hardly move",
    ),
    "no_signal": (
        "replace groups that can't teach: {algorithm.dynamic_sampling=true}",
        "make more attempts at each task: {algorithm.group_size}",
        "choose tasks that are solved now and then: easier ones at a low reward, harder ones at a high one",
        "pay for parts of the way, so that rewards differ",
        "raise {engine.temperature} or {algorithm.entropy_coef}, where the attempts are alike",
    ),
    "env_failures": (
        'read the errors in samples/ (field "error") and mend the environment: `sapwood doctor` checks it',
        "raise {env.step_timeout}, where steps are cut by their time limit",
    ),
    "parse_failures": (
        "show the form of a reply in the prompt (few-shot examples), or fine-tune on demonstrations first (sft)",
        "read the samples: replies cut by {engine.max_new_tokens} can't be parsed either",
        "pay for the form (reward `format` or `json_schema`), and less for the rest until it holds",
    ),
    "length_limit": (
        "raise {engine.max_new_tokens}",
        "leave replies that were cut out of the update: {algorithm.mask_truncated=true}",
        "pay for brevity (reward `length`)",
        "check that replies end: the chat template's end token, {engine.stop}",
    ),
    "value_divergence": (
        "lower {optim.critic_learning_rate}, or {optim.learning_rate}",
        "raise {algorithm.value_coef}, to 1.0, where critic and policy share weights (critic.kind: head)",
        "bring rewards to unit size: {algorithm.whiten_rewards=running}, {algorithm.reward_clip}",
        "clip harder with {optim.max_grad_norm=0.5}",
        "start the critic from a reward model: critic.init_from",
    ),
    "gradient_spike": (
        "nothing, where it stays alone: the norm is clipped to {optim.max_grad_norm}",
        "clip harder with {optim.max_grad_norm=0.5}",
        "lower {optim.learning_rate}, or warm up: {optim.warmup_steps}",
        "look for records that are unlike the others: `sapwood data check`",
    ),
    "loss_divergence": (
        "lower {optim.learning_rate}, or warm up: {optim.warmup_steps}",
        "clip harder with {optim.max_grad_norm=0.5}",
        "make batches larger: {optim.batch_size}, {optim.gradient_accumulation}",
    ),
    "overfitting": (
        "stop at the best held-out loss: early_stopping, checkpoint.best: eval/loss",
        "train for fewer epochs: {run.epochs}",
        "more data, {model.lora.dropout} or {optim.weight_decay}",
        "lower {model.lora.rank} or {optim.learning_rate}",
    ),
    "chosen_falls": (
        "hold the chosen replies up: {algorithm.sft_coef} 0.1 to 1",
        "raise {algorithm.beta}, or lower {optim.learning_rate}",
        "leave out pairs whose two replies are nearly the same",
    ),
    "too_easy": (
        "compare lengths and form of chosen and rejected replies: `sapwood data check`",
        "look for a mark that only one side has: an end token, a signature, a refusal",
        "measure on held-out pairs of another source: data.eval_sources",
    ),
}


def remedies_of(name: WarningName, options: Mapping[str, Any]) -> tuple[str, ...]:
    """What to try in a recipe with these options, by dotted name."""
    filled = (_filled(remedy, options) for remedy in REMEDIES[name])
    return tuple(remedy for remedy in filled if remedy is not None)


def _filled(remedy: str, options: Mapping[str, Any]) -> str | None:
    placed = [(found[1], found[3]) for found in _OPTION.finditer(remedy)]
    if any(name not in options or (wanted and _plain(options[name]) == wanted) for name, wanted in placed):
        return None
    return _OPTION.sub(lambda found: _shown(found[1], options[found[1]], found[3]), remedy)


def _shown(name: str, value: Any, wanted: str | None) -> str:
    return f"{name}={wanted} ({_plain(value)} here)" if wanted else f"{name} ({_plain(value)} here)"


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)
