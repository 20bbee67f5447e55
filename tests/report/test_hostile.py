"""Hostile texts in every place of the page: none does anything, and all are shown as what they are."""

from __future__ import annotations

from pathlib import Path

from sapwood.report import Server, write_report
from tests.report.browser import Browser, Page
from tests.report.hostile import CHECK, HOSTILE, PLACES, try_all
from tests.report.synthetic import Shape, make_run


def test_no_hostile_text_does_anything(page: Page, tmp_path: Path) -> None:
    outcome = try_all(page, tmp_path)
    print(outcome)
    assert outcome.wrong == []
    assert outcome.shown == outcome.texts == len(HOSTILE) >= 60
    assert outcome.places == len(PLACES)


def test_the_trap_would_have_caught_one(chromium: Browser) -> None:
    """Without the page's care the same texts run: the canary, the dialogs and the check are able to notice."""
    made = chromium.page()
    made.open("about:blank", ready=False)
    made.js("document.body.innerHTML = '<img src=x onerror=\"window.canary=1;alert(1)\">'")
    made.until("window.canary === 1")
    made.until("true")
    assert made.dialogs == ["1"]
    found = made.js(CHECK)
    assert "the canary was set" in found
    assert "element IMG" in found
    assert "handler onerror" in found
    made.close()


def test_the_policy_stops_what_would_get_in_all_the_same(chromium: Browser, tmp_path: Path) -> None:
    """A script or a picture that some fault let into the document is refused by the browser."""
    run = make_run(tmp_path / "r", Shape(algorithm="sft", steps=3))
    made = chromium.page().open(write_report([run], tmp_path / "x.html").path)
    for attempt in (
        "const s = document.createElement('script'); s.append('window.canary = 1'); document.body.append(s);",
        "const i = document.createElement('img'); i.src = 'http://hostile.invalid/'; document.body.append(i);",
        "const b = document.createElement('button'); b.setAttribute('onclick', 'window.canary = 2'); b.click();",
        "const f = document.createElement('iframe'); f.src = 'javascript:parent.canary = 3'; document.body.append(f);",
        "const l = document.createElement('link'); l.rel = 'stylesheet'; l.href = 'http://hostile.invalid/';"
        "document.head.append(l);",
        "setTimeout('window.canary = 4');",
        "const p = document.createElement('p'); p.setAttribute('style', 'color: red'); document.body.append(p);",
    ):
        made.js(f"(() => {{ try {{ {attempt} }} catch (error) {{ return error.name; }} }})()")
    refused = made.js(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.message; } })()"
    )
    assert "TrustedHTML" in refused
    assert made.js("fetch('http://hostile.invalid/').then(() => 'sent', () => 'refused')") == "refused"
    assert made.js("typeof window.canary") == "undefined"
    chromium.wait(0.1)
    assert made.js("typeof window.canary") == "undefined"
    assert len(made.refused) >= 6
    assert not [url for url in made.requests if not url.startswith(("file:", "data:"))]
    made.close()


def test_hostile_runs_live(page: Page, tmp_path: Path) -> None:
    text = "</script><img src=x onerror=window.canary=1>\u202e\ud800"
    runs = [
        make_run(tmp_path / name, Shape(algorithm=name, steps=3, samples_every=3, eval_every=3, text=text))
        for name in ("grpo", "dpo")
    ]
    with Server(runs, 0) as server:
        server.start()
        page.open(server.url)
        page.until("document.querySelectorAll('.row').length > 0")
        page.click(".row", 0)
        page.until("document.querySelector('.trajectory')")
        page.click(".modes button", 1)
        page.until("document.querySelectorAll('.row').length > 0")
        page.click(".row", 0)
        page.until("document.querySelectorAll('.trajectory').length === 2")
        assert page.js(CHECK) == []
        assert "U+202E" in page.text(".trajectory .passage")
