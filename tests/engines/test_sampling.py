"""The drawn distribution against expected counts, and what truncation keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sapwood.engines import Sampling
from sapwood.engines._sampling import draw, uniforms
from sapwood.errors import EngineError

#: Probabilities 0.4, 0.3, 0.15, 0.1, 0.05, not in order of size, and a token that can't occur.
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.0, 0.3, 0.15])
DRAWS = 4000


def logits(probabilities: np.ndarray, rows: int) -> torch.Tensor:
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(probabilities), dtype=torch.float32).expand(rows, -1)


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    powered = probabilities ** (1.0 / temperature)
    return powered / powered.sum()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 4, 5]),
        ({"temperature": 2.0}, [0, 1, 2, 4, 5]),
        ({"top_k": 3}, [1, 4, 5]),
        # 0.4 + 0.3 = 0.7 is short of 0.75, with 0.15 it is enough.
        ({"top_p": 0.75}, [1, 4, 5]),
        # Below 0.3 x 0.4 = 0.12 are 0.1 and 0.05.
        ({"min_p": 0.3}, [1, 4, 5]),
        # Of the top 4, renormalised by 0.95: 0.421 + 0.316 = 0.737 reach 0.72; by the plain ones 0.7 would not.
        ({"top_k": 4, "top_p": 0.72}, [1, 4]),
        # top_p keeps 1, 4 and 5; min_p drops what is below 0.5 x 0.4 = 0.2.
        ({"top_p": 0.75, "min_p": 0.5}, [1, 4]),
    ],
)
def test_the_sampled_distribution(options: dict[str, float], kept: list[int]) -> None:
    full = tempered(PROBABILITIES, options.get("temperature", 1.0))
    expected = np.zeros(6)
    expected[kept] = full[kept] / full[kept].sum()
    u = np.array([uniforms(seed, 1)[0] for seed in range(DRAWS)])
    drawn = draw(logits(PROBABILITIES, DRAWS), [Sampling.model_validate(options)] * DRAWS, u)
    counts = np.bincount(drawn.token_ids, minlength=6)
    assert counts[expected == 0].sum() == 0
    # One draw a request, seeds 0, 1, 2 ...: a fixed sample whose p-value is far from the bound.
    assert stats.chisquare(counts[kept], DRAWS * expected[kept]).pvalue > 1e-3
    np.testing.assert_allclose(drawn.logprobs, np.log(expected[drawn.token_ids]), atol=1e-5)
    np.testing.assert_allclose(drawn.kept_logmass, np.log(full[kept].sum()), atol=1e-5)


def test_a_wide_vocabulary_matches_its_cumulative_distribution() -> None:
    values = torch.randn(1, 1003, generator=torch.Generator().manual_seed(0)) * 3
    u = np.linspace(0.0, 1.0, 999, endpoint=False)
    drawn = draw(values.expand(999, -1), [Sampling.model_validate({})] * 999, u)
    cumulative = values[0].double().softmax(0).cumsum(0).numpy()
    expected = np.searchsorted(cumulative, u, side="right")
    assert (drawn.token_ids == expected).mean() > 0.99
    # Where a target falls next to a boundary, rounding may pick the neighbour.
    assert np.abs(cumulative[drawn.token_ids] - u).max() <= cumulative[0] + np.diff(cumulative).max() + 1e-6


def test_a_wide_nucleus_looks_past_the_first_candidates() -> None:
    # Of 1,000 equal tokens (up to a tiny slope, so that their order is known), 90 % are 900: more than 256.
    values = (-torch.arange(1000.0) * 1e-6)[None].expand(500, -1)
    options = Sampling.model_validate({"top_p": 0.9})
    drawn = draw(values, [options] * 500, np.linspace(0.0, 1.0, 500, endpoint=False))
    assert 890 <= drawn.token_ids.max() <= 901
    np.testing.assert_allclose(drawn.kept_logmass, np.log(0.9), atol=2e-3)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 700}, {"top_p": 0.999}, {"min_p": 1e-6}])
def test_extreme_numbers_never_give_an_impossible_token(u: float, options: dict[str, float]) -> None:
    values = torch.full((1, 700), -torch.inf)
    values[0, [300, 511]] = torch.tensor([1.0, 2.0])
    drawn = draw(values, [Sampling.model_validate(options)], np.array([u]))
    assert drawn.token_ids[0] in (300, 511)
    assert np.isfinite(drawn.logprobs[0])


def test_greedy_takes_the_top_and_tells_its_logprob_at_temperature_one() -> None:
    greedy = Sampling.model_validate({"temperature": 0.0, "top_k": 2})
    drawn = draw(logits(PROBABILITIES, 2), [greedy, Sampling.model_validate({"top_k": 1})], np.array([0.9, 0.9]))
    assert drawn.token_ids.tolist() == [1, 1]
    np.testing.assert_allclose(drawn.logprobs, [np.log(0.4), 0.0], atol=1e-6)
    np.testing.assert_allclose(drawn.kept_logmass, [0.0, np.log(0.4)], atol=1e-6)


def test_uniforms_depend_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(uniforms(5, 10)[:3], uniforms(5, 3))
    assert uniforms(5, 1) != uniforms(6, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_logits_that_are_not_finite_are_told_as_what_they_are(options, bad) -> None:
    broken = logits(PROBABILITIES, 2).clone()
    broken[1, 2] = bad
    with pytest.raises(EngineError, match="logits are not finite"):
        draw(broken, [Sampling(**options)] * 2, np.array([0.3, 0.6]))
