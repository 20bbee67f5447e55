"""What the machine has: the smallest of its limits, and speeds that are finite."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood.plan import machine
from sapwood.plan.machine import GIB, Room
from sapwood.tree import TokenTree
from sapwood.types import Row

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_resident_memory_grows_with_what_is_touched():
    before = machine.resident()
    with mmap.mmap(-1, 100 * 2**20) as block:  # not the allocator's, which may have room from before
        block.write(b"1" * len(block))
        assert machine.resident() - before > 80 * 2**20


@linux
def test_the_machine_has_what_is_available_and_what_this_process_holds():
    found = machine.room(torch.device("cpu"))
    assert found is not None
    assert 0 < found.bytes <= Path("/proc/meminfo").stat().st_size + 2**50


def test_the_smallest_limit_counts(monkeypatch):
    monkeypatch.setattr(machine, "_machine", lambda own: Room(8 * GIB, "machine"))
    monkeypatch.setattr(machine, "_group", lambda own: Room(2 * GIB, "group"))
    monkeypatch.setattr(machine, "_address_space", lambda own: None)
    assert machine.room(torch.device("cpu")) == Room(2 * GIB, "group")
    for name in ("_machine", "_group"):
        monkeypatch.setattr(machine, name, lambda own: None)
    assert machine.room(torch.device("cpu")) is None


def test_a_control_groups_limit_less_what_others_use(monkeypatch, tmp_path):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "_GROUPS", ((str(limit), str(used)),))
    assert machine._group(0) is None
    used.write_text(f"{3 * GIB}\n")
    limit.write_text("max\n")
    assert machine._group(0) is None
    limit.write_text(f"{8 * GIB}\n")
    found = machine._group(GIB)  # 3 are used, 1 of them by this process
    assert found is not None
    assert found.bytes == 6 * GIB


def test_address_space_counts_what_is_not_mapped_yet(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10 * GIB, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "_status", lambda key: 4 * GIB if key == "VmSize" else None)
    found = machine._address_space(GIB)
    assert found is not None
    assert found.bytes == 7 * GIB  # 6 may still be mapped, and 1 is held already
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert machine._address_space(GIB) is None


def test_speeds_are_measured_with_the_shapes_of_a_model(monkeypatch):
    monkeypatch.setattr(machine, "_seconds", lambda run, budget: [run(0), 0.001][1])
    ids = np.arange(40)
    tree = TokenTree.of([Row(ids, ids > 30, np.zeros(9, np.int32))])
    found = machine.measure(32, 64, (4, 2, 8), tree, 3, torch.float32)
    assert found.flops == pytest.approx(2 * 40 * 32 * 64 / 0.001)
    assert found.skinny == found.packed == pytest.approx(0.001 / (32 * 64))
    assert found.moved == pytest.approx(2 * 40 * 64 * 4 / 0.001)
    # 40 tokens see 40 x 41 / 2 keys; forward and backward are 14 products' worth a pair, head and width
    assert found.attention == pytest.approx(14 * 4 * 8 * 820 / 0.001)


def test_the_median_of_several_calls_after_one_that_is_not_counted():
    seen = []
    assert machine._seconds(lambda i: seen.append(i) or torch.zeros(1), 0.0) > 0
    assert seen == [0, 1, 2, 3]
