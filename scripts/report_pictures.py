"""Make the pictures of docs/report.md again, from made-up runs, in this machine's Chromium: docs/images/report_*.png.

python scripts/report_pictures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.report.browser import Page, browser  # noqa: E402
from tests.report.synthetic import Shape, make_run  # noqa: E402

from sapwood.report import write_report  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1360, 850
#: name -> (report, dark, what to do before the picture is taken)
PICTURES: dict[str, tuple[str, bool, str]] = {
    "report_summary": ("one", False, "scrollTo(0, 0)"),
    "report_curves": ("several", True, "document.getElementById('curves').scrollIntoView({behavior: 'instant'})"),
    "report_samples": (
        "critic",
        False,
        "document.querySelector('[data-order=best]').click(); document.querySelectorAll('.row')[2].click();"
        "document.querySelector('.panes').scrollIntoView({behavior: 'instant', block: 'end'})",
    ),
    "report_compare": (
        "one",
        True,
        "[...document.querySelectorAll('.modes button')][1].click(); document.querySelector('.row').click();"
        "document.querySelector('.panes').scrollIntoView({behavior: 'instant', block: 'end'})",
    ),
}


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        reports = make_reports(Path(folder))
        for name, (report, dark, before) in PICTURES.items():
            take(opened.page(WIDTH, HEIGHT, dark=dark), reports[report], before, IMAGES / f"{name}.png")


def make_reports(folder: Path) -> dict[str, Path]:
    """Reports: of one run, of one with a critic, and of three."""
    long = {"steps": 120, "eval_every": 20, "tokens": 60}
    office = make_run(folder / "office", Shape(algorithm="grpo", **long))
    slower = make_run(folder / "office-slower", Shape(algorithm="grpo", seed=1, **long))
    ppo = make_run(folder / "office-ppo", Shape(algorithm="ppo", done=90, seed=2, state="stop", turns=2, **long))
    return {
        "critic": write_report([ppo], folder / "critic.html").path,
        "one": write_report([office], folder / "one.html").path,
        "several": write_report([office, slower, ppo], folder / "several.html").path,
    }


def take(page: Page, report: Path, before: str, out: Path) -> None:
    """One picture; the page must be free of errors."""
    page.open(report)
    page.js(before)
    page.browser.wait(0.6)
    page.picture(out)
    if page.errors or page.refused:
        raise SystemExit(f"{out.name}: {page.errors + page.refused}")
    page.close()
    size = out.stat().st_size
    print(f"{out.relative_to(ROOT)}: {size / 1000:.0f} kB")
    if size > 300_000:
        raise SystemExit(f"{out.name}: more than 300 kB")


if __name__ == "__main__":
    main()
