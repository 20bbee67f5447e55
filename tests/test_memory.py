"""Out of memory: what says so, how a budget is halved, and real processes with a limit on their address space."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood import memory
from sapwood.errors import BudgetError
from sapwood.memory import Budget, is_out_of_memory, retry
from tests.conftest import make_row


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (np._core._exceptions._ArrayMemoryError((3,), np.dtype(float)), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("ft2font.so: failed to map segment from shared object"), True),
        (ImportError("No module named 'vllm'"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_says_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_an_error_raised_from_one_of_memory_is_one_of_memory():
    error = ValueError("scoring failed")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def row(length, group=0, start=0):
    return make_row(np.arange(start, start + length), [length - 1], group=group)


def test_a_budget_is_halved_from_what_was_in_use_down_to_the_largest_row():
    budget = Budget(8192)
    # Rows of 300 and 200 tokens that share their first 200: 300 distinct ones; beside them 400 others: 700 in all.
    micros = [[row(300), row(200), row(400, group=1, start=1000)], [row(100, group=2)]]
    note = budget.halve(micros)
    assert budget.tokens == 400  # 700 / 2 = 350, and a row has 400
    assert "micro-batch of 700 tokens: the token budget is 400 in place of 8,192" in note
    assert "optim.token_budget=400" in note
    with pytest.raises(BudgetError, match=r"one row of 400 tokens, which can't be split; set model\.gradient_check"):
        budget.halve([[row(400, group=1, start=1000)], [row(300), row(200)]])
    assert (budget.tokens, budget.halvings) == (400, 1)


def test_a_pair_is_never_parted():
    budget = Budget(1000)
    pair = [row(100), make_row(np.r_[np.arange(60), np.arange(500, 540)], [99])]  # 100 + 40 distinct
    other = [row(80, group=1, start=700)]
    budget.halve([[*pair, *other]], atomic=True)
    assert budget.tokens == 140
    with pytest.raises(BudgetError, match="one pair of 140 tokens"):
        budget.halve([pair, other], atomic=True)


def test_a_resumed_run_keeps_its_budget_unless_the_recipe_asks_for_another():
    budget = Budget(1000)
    budget.halve([[row(100), row(90, group=1, start=500)]])
    state = json.loads(json.dumps(budget.state()))
    again, changed = Budget(1000), Budget(600)
    again.load_state(state)
    changed.load_state(state)
    assert (again.tokens, again.halvings, changed.tokens) == (100, 1, 600)


def test_retry_frees_what_failed_before_it_makes_room():
    class Thing:
        pass

    things: list[weakref.ref] = []

    def attempt():
        thing = Thing()
        thing.itself = thing
        things.append(weakref.ref(thing))
        if len(things) < 3:
            raise MemoryError
        return "done"

    alive: list[int] = []
    gc.disable()
    try:
        done = retry(attempt, lambda: alive.append(sum(ref() is not None for ref in things)))
    finally:
        gc.enable()
    assert (done, alive) == ("done", [0, 0])


def test_retry_lets_other_errors_and_the_end_of_all_room_through():
    def fail(error):
        raise error

    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 / 0, lambda: None)
    with pytest.raises(BudgetError, match="no more"):
        retry(lambda: fail(MemoryError()), lambda: fail(BudgetError("no more")))


def test_prepared_state_is_what_the_first_step_would_make():
    def made():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)

    (ours, prepared), (theirs, plain) = made(), made()
    memory.prepare(prepared)
    assert all(float(prepared.state[p]["step"]) == 0 for p in ours)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.full_like(p, 0.3)
        memory.probe(prepared)
        prepared.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert str(prepared.state_dict()) == str(plain.state_dict())
    memory.prepare(prepared)  # leaves what is there alone
    assert float(prepared.state[ours[0]]["step"]) == 3


@pytest.fixture(scope="module")
def limited():
    if not sys.platform.startswith("linux"):
        pytest.skip("address space is limited, and measured, on Linux")
    # Large blocks are mapped one by one, so that what is freed no longer counts: the heap would keep it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited"], capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_update_that_does_not_fit_is_halved_and_gives_the_same_gradient(limited, kind):
    found = limited[kind]
    assert found["halvings"] >= 1
    assert found["tokens"] <= 512
    assert found["note"].startswith("memory ran out in a micro-batch of 1,024 tokens")
    assert found["loss_error"] < 1e-5
    assert found["gradient_error"] < 1e-5


def test_a_row_that_does_not_fit_is_told_with_what_to_change(limited):
    assert "one row of 900 tokens, which can't be split; set model.gradient_checkpointing" in limited["too_small"]


def test_sampling_that_does_not_fit_goes_on_with_fewer_rows_and_the_same_replies(limited):
    assert limited["sampling"]["shrunk"][-1] is True
    assert limited["sampling"]["rows"] <= 16
    assert limited["sampling"]["same"]


def test_the_optimiser_runs_out_before_its_step_and_not_in_it(limited):
    # What torch does by itself, and why there is a probe: one parameter of four is stepped.
    caught, stepped = limited["optimizer"]["torch"]
    assert caught
    assert any(stepped)
    assert not all(stepped)
    message, stepped = limited["optimizer"]["probe"]
    assert "the weights are those of the step before" in message
    assert not any(stepped)
    message, stepped = limited["optimizer"]["prepare"]
    assert "two copies of what is trained" in message
    assert not any(stepped)
