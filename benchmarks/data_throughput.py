"""Records per second and peak memory of data: prints a table and writes benchmarks/results/data_throughput.json.

    OMP_NUM_THREADS=1 python benchmarks/data_throughput.py [--records 10000000]

One JSONL file of demonstrations (a prompt of about 120 characters, a reply of about 160, an id). Each stage is a
process of its own, with one thread: the first open (every line parsed, checked, normalised and written to the cache),
opening again (the cache is mapped), and an epoch in shuffled order (records decoded, of a long one the first million).
The peer is `datasets`, which parses and maps the same file but checks and normalises nothing. Rates are per second of
processor time, so that other work on the machine counts little; the notes have the time on the clock.

Memory is the peak of what the process holds for itself (RssAnon, sampled every 20 ms); pages of the mapped file that
the system keeps because there is room are in the note.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, Options, Row, machine, publish, rate_ratio, say, time_ratio

RECORDS, TINY = 1_000_000, 20_000
EPOCH = 1_000_000  # records of an epoch that are measured
WORDS = ("the", "lamp", "is", "on", "a", "table", "in", "room", "with", "seven", "doors", "that", "open", "to", "trees")
STAGES = ("data_first_open", "data_reopen", "data_epoch")
PEER = "datasets, nothing checked"


def write_records(path: Path, records: int) -> None:
    """Distinct demonstrations, the same for the same number."""
    rng = random.Random(0)
    fillers = [" ".join(rng.choices(WORDS, k=26)) for _ in range(5000)]
    replies = [" ".join(rng.choices(WORDS, k=35)) for _ in range(5000)]
    with path.open("w") as file:
        for i in range(records):
            record = {"prompt": f"{i}: {fillers[i % 5000]}", "response": replies[(i * 7919) % 5000], "id": i}
            file.write(json.dumps(record) + "\n")


class Memory:
    """Samples this process's own memory until it is closed. peak: MiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, status("RssAnon"))

    def close(self) -> float:
        """Stop sampling; gives the peak."""
        self._done.set()
        self._thread.join()
        return max(self.peak, status("RssAnon"))


def status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise BenchmarkError(f"/proc/self/status has no {name}")


def ours(stage: str, path: Path) -> Callable[[], int]:
    """The work of a stage; it returns how many records it went through."""
    from sapwood.data.dataset import open_data
    from sapwood.data.section import DataSection

    def open_all() -> Any:
        return open_data(DataSection.model_validate(str(path)), "demonstrations", 0)

    if stage != "data_epoch":
        return lambda: sum(len(part) for part in open_all())
    train, _ = open_all()
    return lambda: sum(bool(train[int(i)].replies) for i in train.order(0)[:EPOCH])


def peer(stage: str, path: Path) -> Callable[[], int]:
    """The same with `datasets`."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()

    def open_all() -> Any:
        return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "hf"))

    if stage != "data_epoch":
        return lambda: len(open_all())
    rows = open_all()
    return lambda: sum(bool(rows[int(i)]["response"]) for i in np.random.default_rng(0).permutation(len(rows))[:EPOCH])


def measure(side: str, stage: str, path: Path) -> dict[str, float]:
    """Run a stage in this process."""
    work = (ours if side == "ours" else peer)(stage, path)
    memory = Memory()
    start, clock = time.process_time(), time.perf_counter()
    records = work()
    return {
        "records": records,
        "seconds": time.process_time() - start,
        "clock": time.perf_counter() - clock,
        "memory": memory.close(),
        "resident": status("VmHWM"),
    }


def in_process(side: str, stage: str, path: Path) -> dict[str, float]:
    """Run a stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--side", side, "--file", str(path)]
    environment = os.environ | {
        "SAPWOOD_CACHE": str(path.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise BenchmarkError(f"{side} {stage}: {done.stderr.strip().splitlines()[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(records: int, folder: Path, sides: Sequence[str]) -> list[Row]:
    """Write the file and measure every stage."""
    path = folder / "records.jsonl"
    if not path.is_file():
        say(f"writing {records:,} records ...")
        write_records(path, records)
    shape = f"{records:,} records, {path.stat().st_size / 2**20:,.0f} MiB of JSONL"
    suffix = f"{records // 1_000_000}m" if records >= 1_000_000 else str(records)
    rows = []
    for stage in STAGES:
        found = {side: in_process(side, stage, path) for side in sides}
        rates = {side: values["records"] / values["seconds"] for side, values in found.items()}
        memory = {side: values["memory"] for side, values in found.items()}
        common = {"shape": shape, "dtype": "-", "machine": machine(1), "peer_name": PEER if "peer" in sides else ""}
        clock = ", ".join(f"{side} {values['clock']:.1f} s" for side, values in found.items())
        pages = ", ".join(f"{side} {values['resident']:,.0f} MiB" for side, values in found.items())
        unit, note = "records/s", f"on the clock: {clock}"
        our, their, ratio = rates["ours"], rates.get("peer"), rate_ratio(rates["ours"], rates.get("peer"))
        if stage == "data_reopen":
            unit, our, their = "s", found["ours"]["seconds"], found.get("peer", {}).get("seconds")
        rows.append(Row(f"{stage}_{suffix}", our, their, ratio, unit, note=note, **common))
        our, their = memory["ours"], memory.get("peer")
        note = f"with mapped pages: {pages}"
        rows.append(Row(f"{stage}_memory_{suffix}", our, their, time_ratio(our, their), "MiB", note=note, **common))
        say(f"{stage}: {rates['ours']:,.0f} records/s, {memory['ours']:,.0f} MiB")
    return rows


def run(
    options: Options,
    records: int = RECORDS,
    sides: Sequence[str] = ("ours", "peer"),
    folder: Path | None = None,
) -> None:
    """Measure and publish. folder: holds the file, or keeps it; a temporary one unless given."""
    records = TINY if options.tiny else records
    with tempfile.TemporaryDirectory() as scratch:
        publish("data_throughput", rows_of(records, folder or Path(scratch), sides), options)


def main() -> None:
    parser = Options.parser(__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--folder", type=Path, help="keep the file here, or use the one that is here")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measure(arguments.side, arguments.stage, arguments.file)))
    else:
        sides = ("ours",) if arguments.no_peer else ("ours", "peer")
        run(Options.of(arguments), arguments.records, sides, arguments.folder)


if __name__ == "__main__":
    main()
