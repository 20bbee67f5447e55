"""A browser for the tests of the page; one for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, Page, find_chromium

HOW = (
    "no Chromium on this machine; scripts/install_chromium.sh installs it (make test does), or apt-get install chromium"
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The machine's browser; a failure where it must be there (SAPWOOD_BROWSER=required), a skip elsewhere."""
    path = find_chromium()
    if path is None:
        if os.environ.get("SAPWOOD_BROWSER") == "required":
            pytest.fail(HOW)
        pytest.skip(HOW)
    with Browser(path) as made:
        yield made


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page that must do nothing wrong: no exception, nothing the policy refuses, no dialog, no foreign request."""
    made = chromium.page()
    yield made
    chromium.wait(0.02)
    foreign = [url for url in made.requests if not url.startswith(("file:", "data:", "http://127.0.0.1:", "about:"))]
    found = {"errors": made.errors, "refused": made.refused, "dialogs": made.dialogs, "foreign": foreign}
    made.close()
    assert found == {"errors": [], "refused": [], "dialogs": [], "foreign": []}
