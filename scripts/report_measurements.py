"""Print the figures of docs/report.md: size, memory and times of a report with 10,040 trajectories, and hostile texts.

python scripts/report_measurements.py [--repeat 3]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.report.browser import Page, browser  # noqa: E402
from tests.report.hostile import try_all  # noqa: E402
from tests.report.synthetic import Shape, make_run  # noqa: E402

from sapwood.report import write_report  # noqa: E402

#: 100 steps of 10 tasks with 8 attempts, and 6 evaluations of 340 tasks: 10,040 trajectories of about 100 tokens.
LARGE = Shape(steps=100, tasks=10, attempts=8, samples_every=1, eval_every=20, eval_tasks=340, tokens=100)
TITLE = "document.querySelector('.trajectory h3').textContent"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="pages opened; the best time counts (3)")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        run = make_run(Path(folder) / "run", LARGE)
        began = time.process_time()
        written = write_report([run], Path(folder) / "report.html", max_samples=20_000)
        spent = time.process_time() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tokens = LARGE.tokens
        print(f"{written.taken:,} trajectories of about {tokens} tokens: {written.size / 1e6:.1f} MB")
        print(f"written in {spent:.1f} s of one core; the process took {peak:.0f} MB at most")
        found = [measure(opened.page(1440, 900), written.path) for _ in range(repeat)]
        for name in found[0]:
            print(f"{name}: {min(one[name] for one in found):.3g}")
        page = opened.page()
        print(try_all(page, Path(folder)))


def measure(page: Page, report: Path) -> dict[str, float]:
    """What a reader waits for, in seconds, and the memory of the page's scripts in MB."""
    found = {"open the page, s": timed(lambda: page.open(report))}
    page.ask("HeapProfiler.enable")
    page.ask("HeapProfiler.collectGarbage")
    found["memory of its scripts, MB"] = page.ask("Runtime.getHeapUsage")["usedSize"] / 1e6
    found["elements"] = page.js("document.querySelectorAll('*').length")
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    found["scroll to the middle, s"] = timed(
        lambda: page.js(f"document.querySelector('.list').scrollTop = 330000; {frame}")
    )

    def choose() -> None:
        page.js("document.querySelectorAll('.row')[4].click()")
        page.until(f"document.querySelector('.row[aria-selected=true] .row-task').textContent === {TITLE}")

    found["open a trajectory, s"] = timed(choose)
    order = "(() => { document.querySelector('[data-order=worst]').click(); })()"
    found["sort by reward, s"] = timed(lambda: page.js(order))

    def search() -> None:
        page.js(
            "(() => { const node = document.querySelector('#samples [aria-label=Text]'); node.value = 'leave at five';"
            "node.dispatchEvent(new Event('input')); })()"
        )
        page.until("/contain/.test(document.querySelector('.searching').textContent)", 120)

    found["search all prompts and replies, s"] = timed(search)
    if page.errors or page.refused:
        raise SystemExit(f"the page did wrong: {page.errors + page.refused}")
    page.close()
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
