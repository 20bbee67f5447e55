"""Counting of memory and work, on shapes alone and on real tensors."""

from __future__ import annotations

import torch

from sapwood.plan.meter import Meter, Work, held, meta


def numbers(count: int) -> torch.Tensor:
    return torch.ones(count, device="meta")  # 4 bytes each


def test_what_is_alive_at_once_is_counted_and_what_was_there_before_is_not():
    x = numbers(1000)
    with Meter() as meter:
        a = x * 2  # 4,000
        b = a + 1  # 8,000
        del a  # 4,000
        c = torch.cat([b, b])  # 12,000
        del b, c
    assert (meter.peak.total, meter.total) == (12_000, 0)
    # x * 2 moves 4,000 in and 4,000 out, so does a + 1; cat reads b twice and writes 8,000
    assert (meter.work.moved, meter.work.calls) == (8_000 + 8_000 + 16_000, 3)


def test_views_and_changes_in_place_take_no_memory():
    x = numbers(1000)
    with Meter() as meter:
        y = x.view(10, 100).t()[2:5]
        x.add_(1.0)
    assert y.shape == (3, 10)
    assert meter.peak.total == 0
    assert meter.work.moved == 8_000  # read and written once


def test_a_view_keeps_what_it_looks_at():
    x = numbers(1000)
    with Meter() as meter:
        part = (x + 1)[:1]
        assert meter.total == 4_000
        del part
        assert meter.total == 0


def test_products_are_counted_by_their_inner_width():
    a, b, c = torch.ones(2, 3, device="meta"), torch.ones(3, 5, device="meta"), torch.ones(2, 5, device="meta")
    with Meter() as meter:
        a @ b  # 2 x 5 results of 3 multiplications and additions
        torch.addmm(c, a, b)
        torch.nn.functional.linear(a, b.t())
        torch.ones(4, 2, 3, device="meta") @ torch.ones(4, 3, 5, device="meta")  # four of them
    assert meter.work.flops == (1 + 1 + 1 + 4) * 2 * 2 * 3 * 5
    assert meter.work.products == 4


def test_labels_tell_what_the_peak_is_made_of():
    x = numbers(1000)
    with Meter("first") as meter:
        a = x + 1
        with meter.labelled("second"):
            b = torch.cat([a, a])
        del b
        meter.relabel([a, x], "third")  # x was there before and stays uncounted
    assert dict(meter.peak.by_label) == {"first": 4_000, "second": 8_000}
    assert {k: v for k, v in meter.live.items() if v} == {"third": 4_000}


def test_gradients_count_when_backward_makes_them():
    weight = torch.ones(10, 10, device="meta", requires_grad=True)
    x = torch.ones(7, 10, device="meta")
    with Meter() as meter:
        (x @ weight).sum().backward()
    assert meter.total == 400  # the gradient of 10 x 10 numbers
    assert meter.work.flops == 2 * (2 * 7 * 10 * 10)  # forward, and the weight's gradient; x has none


def test_real_tensors_are_counted_as_those_without_values():
    def run(device: str) -> Meter:
        x = torch.ones(50, 40, device=device, requires_grad=True)
        with Meter() as meter:
            torch.softmax(x @ x.t(), -1).pow(2).mean().backward()
        return meter

    real, shapes = run("cpu"), run("meta")
    assert real.peak.total == shapes.peak.total > 3 * 50 * 50 * 4
    assert real.work.flops == shapes.work.flops


def test_values_that_meet_shapes_become_shapes():
    x = torch.ones(10, 3, device="meta")
    with Meter():
        x.index_add_(0, torch.tensor([1, 1]), torch.ones(2, 3, device="meta"))
        assert (x / torch.ones(10, 1)).is_meta


def test_only_blocks_that_an_allocator_keeps_are_churn():
    with Meter() as meter:
        torch.empty(100, device="meta")
        torch.empty(8 * 2**20 + 1, device="meta")  # more than 32 MiB
    assert meter.work.churn == 400


def test_work_adds_and_multiplies():
    assert Work(flops=1.0, calls=2) + Work(flops=3.0) == Work(flops=4.0, calls=2)
    assert Work(flops=1.0, moved=4.0).times(2.5) == Work(flops=2.5, moved=10.0)


def test_shared_memory_is_held_once():
    x = numbers(100)
    assert held([x, x[:50], numbers(10)]) == 440
    assert meta(torch.arange(3)).dtype == torch.int64
