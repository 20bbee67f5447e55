"""The page in a browser: what is seen, by mouse, by keyboard, in light and dark, narrow and wide, live."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from sapwood.report import Server, write_report
from tests.report.browser import SHIFT, Page
from tests.report.synthetic import make_run, record, write_samples

FOCUS = "document.activeElement"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """A report of one GRPO run."""
    run = make_run(folder / "office", algorithm="grpo", steps=60)
    return write_report([run], folder / "single.html").path


@pytest.fixture(scope="module")
def several(folder: Path) -> Path:
    """A report of runs of four algorithms, one of which died."""
    runs = [
        make_run(folder / name, algorithm=name, steps=40, seed=seed) for seed, name in enumerate(("grpo", "sft", "dpo"))
    ]
    runs.append(make_run(folder / "ppo", algorithm="ppo", steps=40, done=22, state="stop", turns=3, seed=3))
    return write_report(runs, folder / "several.html").path


def trajectories(run: Path) -> list[dict]:
    """All records of a run."""
    return [json.loads(line) for file in sorted((run / "samples").iterdir()) for line in gzip.open(file)]


def minus(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("\u2212", "-").replace("+", "").replace(",", ""))


def rows(page: Page) -> list[str]:
    """Rewards of the rows in sight, from the top."""
    return page.js(
        "[...document.querySelectorAll('.row')].sort((a, b) => a.dataset.index - b.dataset.index)"
        ".map((row) => row.querySelector('.worth').textContent)"
    )


def enter(page: Page, selector: str, value: str) -> None:
    """Set a control as its user would."""
    page.js(
        f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.value = {json.dumps(value)};"
        "node.dispatchEvent(new Event('input')); node.dispatchEvent(new Event('change')); })()"
    )


def choose(page: Page, label: str, value: str) -> None:
    """Set a field of the samples by its label."""
    enter(page, f'#samples [aria-label="{label}"]', value)


def box(page: Page, selector: str) -> list[float]:
    """[left, top, width, height] of an element in the window."""
    return page.js(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]; })()"
    )


# ---- what is seen -------------------------------------------------------------------------------------------------


def test_one_run_from_disk(page: Page, single: Path) -> None:
    page.open(single)
    assert page.requests == [single.as_uri()]
    assert page.js("document.title") == "office \u00b7 Sapwood"
    summary = page.text("#summary")
    for text in (
        "60 of 60 steps",
        "Finished",
        "grpo \u00b7 smollm2-135m (LoRA rank 16)",
        "+30.7",
        "better; 95 %: 19.2 to 42.2",
    ):
        assert text in summary
    assert page.texts("#curves-body h3") == ["Reward and return", "Loss", "Policy health", "Optimiser", "Data", "Speed"]
    table = page.texts("#evaluation-body table")[0]
    for text in (
        "random",
        "proportional",
        "base model",
        "trained model",
        "\u221229.8 to \u221213.8",
        "89.0 %",
        "11.0 %",
    ):
        assert text in table
    assert "better on" in page.text("#evaluation-body")
    warnings = page.texts(".entry.warning")
    assert len(warnings) == 2  # the three in a row are one
    assert "3 times, steps 18 to 20" in warnings[0]
    assert "lower optim.learning_rate" in warnings[0]
    assert "algorithm.clip_high" in page.text(".recipe-columns table")
    assert page.js("document.querySelectorAll('#runbar:not([hidden])').length") == 0


def test_runs_of_different_algorithms_side_by_side(page: Page, several: Path) -> None:
    page.open(several)
    table = page.texts("#summary table tbody tr")
    assert [row.split()[0] for row in table] == ["grpo", "sft", "dpo", "ppo"]
    assert "Stopped" in table[3]
    assert "22 / 40" in table[3]
    lines = "document.querySelectorAll('.chart:not([hidden]) .plot')[0].querySelectorAll('path.line:not(.raw)').length"
    page.js("document.getElementById('curves').scrollIntoView({behavior: 'instant'})")
    page.until(f"{lines} === 2")  # the reward of grpo and ppo
    page.click(".run", 0)
    assert page.js("document.querySelector('.run').getAttribute('aria-pressed')") == "false"
    page.until(f"{lines} === 1")
    assert "grpo" not in page.text("#evaluation-body")
    page.click(".run", 0)
    recipe = page.text("#recipe-body")
    assert "algorithm.name" in recipe
    assert "model.name" not in recipe  # the same in all
    page.click("#recipe-body .chip")
    assert "model.name" in page.text("#recipe-body")


def test_smoothing_scale_axis_zoom_and_search_of_curves(page: Page, single: Path) -> None:
    page.open(single)
    page.js("document.getElementById('curves').scrollIntoView({behavior: 'instant'})")
    line = "document.querySelector('#curves .plot path.line:not(.raw)').getAttribute('d')"
    page.until("document.querySelector('#curves .plot path.line')")
    before = page.js(line)
    enter(page, "input[type=range]", "0")
    assert page.js(line) != before
    assert page.js("document.querySelectorAll('#curves .plot path.raw').length") == 0
    ticks = "[...document.querySelectorAll('#curves .plot')[0].querySelectorAll('.tick')].map((t) => t.textContent)"
    assert "60" in page.js(ticks)
    page.click("#curves .segmented button", 1)
    assert any(text.endswith(("min", "s")) for text in page.js(ticks))
    page.click("#curves .segmented button", 0)
    page.click("#curves .chip", 0)  # a log scale has no place for what is not above 0
    page.until("document.querySelectorAll('#curves .plot')[0].textContent.length > 0")
    page.click("#curves .chip", 0)
    enter(page, '[aria-label="From step"]', "50")
    assert "50" in page.js(ticks)
    assert "20" not in page.js(ticks)
    page.js("[...document.querySelectorAll('#curves button')].find((b) => b.textContent === 'All steps').click()")
    assert "20" in page.js(ticks)
    enter(page, '[aria-label="Find a metric"]', "entropy")
    assert page.texts(".chart:not([hidden]) .name") == ["entropy \u00b7 nats a token"]


def test_hovering_shows_values_of_all_runs_and_a_warning_that_is_near(page: Page, single: Path) -> None:
    page.open(single)
    page.js("document.querySelector('#summary .plot').scrollIntoView({block: 'center', behavior: 'instant'})")
    x, y, width, height = box(page, "#summary .plot")
    left, right = x + 46, x + width - 12  # the frame of the chart
    page.move(left + (right - left) * 41 / 60, y + height / 2)
    page.until("!document.querySelector('#tip').hidden")
    tip = page.text("#tip")
    assert "Step 40" in tip
    assert "kl_runaway" in tip
    page.move(5, 5)
    page.until("document.querySelector('#tip').hidden")


# ---- samples ------------------------------------------------------------------------------------------------------


def test_filters_orders_and_search(page: Page, single: Path, folder: Path) -> None:
    everything = trajectories(folder / "office")
    page.open(single)
    assert page.text(".counted") == f"{len(everything)} of {len(everything)} trajectories"
    rewards = sorted(one["reward"] for one in everything)
    page.click("#samples .chip", 0)
    assert minus(rows(page)[0]) == pytest.approx(rewards[-1], rel=1e-2)
    page.click("#samples .chip", 1)
    assert minus(rows(page)[0]) == pytest.approx(rewards[0], rel=1e-2)
    page.click("#samples .chip", 1)
    failed = [one for one in everything if any(turn["info"].get("parsed") == "failed" for turn in one["turns"])]
    page.click("[data-flag='1']")
    assert page.text(".counted").startswith(f"{len(failed)} of")
    page.click("[data-flag='1']")
    choose(page, "Kind", "eval")
    choose(page, "From step", "20")
    choose(page, "To step", "40")
    page.until("document.querySelector('.counted').textContent.startsWith('48 of')")
    choose(page, "From step", "")
    choose(page, "To step", "")
    choose(page, "Kind", "all")
    word = everything[100]["turns"][0]["reply"].split()[8:12]
    text = " ".join(word)
    holding = [one for one in everything if text.lower() in one["turns"][0]["reply"].lower()]
    choose(page, "Text", text.upper())
    page.until("/contain/.test(document.querySelector('.searching').textContent)")
    assert page.text(".counted").startswith(f"{len(holding)} of")
    choose(page, "Text", "")
    choose(page, "Task", "eval-7")
    page.until("document.querySelector('.counted').textContent.startsWith('4 of')")  # four evaluations of one task


def test_a_trajectory_with_its_tokens(page: Page, folder: Path) -> None:
    run = make_run(folder / "tokens", algorithm="grpo", steps=20, samples_every=0, eval_every=100)
    given = record(
        "task",
        "yes no\n?",
        ["yes", " no", "\n", "?"],
        0.75,
        turn_advantages=[2.0, -1.0, 0.0, None],
        turn_ratios=[1.5, 0.5, 1.0, 1.0],
        turn_logprobs=[-0.1, -4.0, -0.5, -0.5],
        turn_token_ids=[11, 12, 13, 14],
        messages=[{"role": "user", "content": "a question"}],
        answer="42",
        reward_parts={"env": 1.0, "length": -0.25},
        step=5,
    )
    write_samples(run / "samples" / "step_000005.jsonl.gz", [given])
    page.open(write_report([run], folder / "tokens.html").path)
    choose(page, "Kind", "step")
    page.click(".row", 0)
    page.until("document.querySelector('.trajectory h3')?.textContent === 'task'")
    detail = page.text(".trajectory")
    for text in ("learnt from at step 5", "a question", "42", "+0.75", "\u22120.25", "ended by itself", "4 tokens"):
        assert text in detail
    assert page.js("document.querySelector('.tokens').textContent") == "yes no\n?"
    kinds = page.js(
        "[...document.querySelectorAll('.tokens .token')].map((t) => [t.classList[1], t.style.getPropertyValue('--a')])"
    )
    assert kinds == [["above", "0.780"], ["below", "0.390"], ["newline", "0.000"], ["unknown", ""]]
    assert page.js("[...document.querySelectorAll('.scale .token')].map((t) => t.textContent)") == [
        "\u22122",
        "\u22121",
        "0",
        "+1",
        "+2",
    ]
    page.js("document.querySelector('.tokens').focus()")
    page.press("ArrowRight", 2)
    assert page.text(".token-line").startswith("Token 2 of 4 \u201c no\u201d \u00b7 advantage \u22121 \u00b7 ratio 0.5")
    assert "id 12" in page.text(".token-line")
    assert page.text("#announcer") == page.text(".token-line")
    choose(page, "Colour of tokens", "ratios")
    page.until("document.querySelector('.scale').textContent.startsWith('Ratio')")
    # log(1.5) = 0.41 against log(0.5) = -0.69, which has the full colour: 0.78 * 0.41 / 0.69 = 0.456.
    kinds = page.js(
        "[...document.querySelectorAll('.tokens .token')].map((t) => [t.classList[1], t.style.getPropertyValue('--a')])"
    )
    assert kinds[:2] == [["above", "0.456"], ["below", "0.780"]]
    choose(page, "Colour of tokens", "logprobs")
    page.until("document.querySelector('.tokens .unlikely')")
    assert page.js("document.querySelectorAll('.tokens .token')[1].style.getPropertyValue('--a')") == "0.780"


def test_base_and_trained_on_the_same_task(page: Page, folder: Path, single: Path) -> None:
    everything = trajectories(folder / "office")
    base = {one["task"]: one["reward"] for one in everything if "-eval-" in one["task"] and one["step"] == 0}
    last = {one["task"]: one["reward"] for one in everything if "-eval-" in one["task"] and one["step"] == 60}
    changes = sorted((last[task] - base[task] for task in base), key=abs, reverse=True)
    page.open(single)
    page.click(".modes button", 1)
    assert page.text(".counted").startswith(f"{len(base)} tasks that both played")
    assert [minus(text) for text in rows(page)[:5]] == pytest.approx(changes[:5], rel=1e-2)
    page.click(".row", 0)
    page.until("document.querySelectorAll('.trajectory').length === 2")
    assert page.texts(".trajectory .side-name") == ["Left: held out, before training", "Right: held out, after step 60"]
    titles = page.texts(".trajectory h3")
    assert titles[0] == titles[1]
    choose(page, "Left", "0/eval_000040.jsonl.gz")
    page.until("document.querySelector('.side-name').textContent === 'Left: held out, after step 40'")
    assert page.texts(".trajectory h3") == titles


def test_a_pair_is_read_side_by_side(page: Page, several: Path) -> None:
    page.open(several)
    for run in (0, 1, 3):
        page.click(".run", run)
    page.click(".row", 0)
    page.until("document.querySelectorAll('.trajectory').length === 2")
    assert page.texts(".side-name") == ["Chosen, or first", "Rejected, or second"]


def test_damaged_samples_are_told_and_the_rest_is_there(page: Page, folder: Path) -> None:
    run = make_run(folder / "damaged", algorithm="grpo", steps=60)
    path = run / "samples" / "step_000030.jsonl.gz"
    path.write_bytes(path.read_bytes()[:900])
    (run / "samples" / "step_000040.jsonl.gz").write_bytes(b"\x00\x01")
    page.open(write_report([run], folder / "damaged.html").path)
    problems = page.text(".problems")
    assert "step_000030.jsonl.gz: the file is cut short" in problems
    assert "step_000040.jsonl.gz line 1: not a JSON record" in problems
    assert int(page.text(".counted").split()[0]) > 150


def test_a_page_that_was_cut_short_says_so(page: Page, single: Path, tmp_path: Path) -> None:
    whole = single.read_bytes()
    cut = tmp_path / "cut.html"
    start = whole.index(b'id="c0-1-0-texts"')
    end = whole.index(b"<script>", start)  # without the later blocks, but with the script
    cut.write_bytes(whole[:start] + b"></script>" + whole[end:])
    page.open(cut)
    choose(page, "From step", "20")
    page.until("document.querySelector('.row .row-place').textContent.includes('20')")
    page.click(".row", 0)
    page.until("document.querySelector('.detail .notice')")
    assert "This part of the page is missing" in page.text(".detail")


def test_huge_texts_open_at_once_and_in_parts(page: Page, folder: Path) -> None:
    run = make_run(folder / "huge", algorithm="grpo", steps=20, samples_every=0, eval_every=100)
    one = record("big", "\u202ex" * 1000 + "x" * 998_000, [], turn_prompt="p" * 1_000_000)
    two = record("many", "a " * 8_000, ["a "] * 8_000)
    write_samples(run / "samples" / "step_000005.jsonl.gz", [one, two])
    page.open(write_report([run], folder / "huge.html").path)
    choose(page, "Kind", "step")
    page.click(".row", 0)
    page.until("document.querySelector('.reply-text .more')")
    assert "980,000 of 1,000,000 characters are hidden" in page.text(".reply-text .more")
    assert "U+202E" in page.text(".reply-text")
    before = len(page.text(".reply-text"))
    page.click(".reply-text .more")
    assert len(page.text(".reply-text")) > before + 90_000
    page.click(".row", 1)
    page.until("document.querySelectorAll('.tokens .token').length === 3000")
    page.click(".tokens .more")
    assert page.js("document.querySelectorAll('.tokens .token').length") == 6000


def test_no_samples_and_no_steps(page: Page, folder: Path) -> None:
    run = folder / "fresh"
    run.mkdir()
    (run / "recipe.yaml").write_text("run: {steps: 5}\nalgorithm: {name: grpo}\n")
    page.open(write_report([run], folder / "fresh.html").path)
    assert "No finished step" in page.text("#summary") or "0 of 5 steps" in page.text("#summary")
    assert "No metric has been recorded yet." in page.text("#curves")
    assert "No trajectory has been kept yet" in page.text("#samples")


# ---- keyboard, colours, sizes -------------------------------------------------------------------------------------


def test_by_keyboard_alone(page: Page, folder: Path) -> None:
    run = make_run(folder / "keys", algorithm="sft", steps=20)
    page.open(write_report([run], folder / "keys.html").path)
    page.press("Tab")
    assert page.js(f"{FOCUS}.textContent") == "Skip to the content"
    page.press("Enter")
    assert page.js(f"{FOCUS}.id") == "content"
    # Every control can be reached and none is a trap: tabbing through ends at the body again.
    seen = page.js("[]")
    for _ in range(400):
        page.press("Tab")
        here = page.js(f"[{FOCUS}.tagName, {FOCUS}.className, {FOCUS}.id, {FOCUS}.getAttribute('aria-label')]")
        if here[0] == "BODY":
            break
        seen.append(tuple(here))
    else:
        pytest.fail("tabbing never came back")
    classes = [one[1] for one in seen]
    for needed in ("plot", "chip", "list", "tokens", "scroll", "icon"):
        assert needed in classes, needed
    assert ("INPUT", "", "", "Text") in seen
    assert [one for one in seen if one[2] in ("print", "theme")] == []  # they stand before the content


def test_the_list_and_the_chosen_trajectory_by_keyboard(page: Page, single: Path) -> None:
    page.open(single)
    page.js("document.querySelector('.list').focus()")
    for key, index in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("End", 191),
        ("ArrowDown", 191),
        ("Home", 0),
        ("ArrowUp", 0),
    ):
        page.press(key)
        assert page.js("Number(document.querySelector('.row[aria-selected=true]').dataset.index)") == index
        active = page.js("document.querySelector('.list').getAttribute('aria-activedescendant')")
        assert page.js(f"document.getElementById('{active}').getAttribute('aria-posinset')") == str(index + 1)
    page.press("PageDown")
    assert page.js("Number(document.querySelector('.row[aria-selected=true]').dataset.index)") > 3
    row, inside = box(page, ".row[aria-selected=true]"), box(page, ".list")
    assert inside[1] - 1 <= row[1] <= inside[1] + inside[3] - row[3] + 1
    page.press("Enter")
    assert page.js(f"{FOCUS}.className") == "detail"
    page.press("Escape")
    assert page.js(f"{FOCUS}.className") == "list"


def test_a_chart_by_keyboard(page: Page, single: Path) -> None:
    page.open(single)
    page.js("document.querySelector('#curves .plot').focus()")
    page.press("Home")
    assert page.text("#announcer").startswith("step 1: office ")
    page.press("ArrowRight")
    assert page.text("#announcer").startswith("step 2: office ")
    page.press("ArrowRight", modifiers=SHIFT)
    assert page.text("#announcer").startswith("step 12: office ")
    assert page.js("document.querySelector('#tip').hidden") is False
    page.press("Escape")
    assert page.js("document.querySelector('#tip').hidden") is True
    page.js("document.querySelector('.chart .icon').focus()")
    page.press("Enter")
    assert page.js("document.querySelector('dialog').open") is True
    assert page.js(f"{FOCUS}.className") == "plot"
    page.press("ArrowLeft")
    assert page.js("document.querySelector('#tip').closest('dialog') !== null")
    page.press("Escape")
    page.press("Escape")
    page.until("document.querySelector('dialog') === null")
    assert page.js("document.querySelector('#tip') !== null")
    assert page.js(f"{FOCUS}.className") == "icon"


def test_light_dark_and_the_switch(page: Page, single: Path) -> None:
    page.open(single)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.js(paper)
    page.media(dark=True)
    dark = page.js(paper)
    assert light != dark
    page.click("#theme")
    assert (page.text("#theme"), page.js(paper)) == ("Light", light)
    page.click("#theme")
    assert (page.text("#theme"), page.js(paper)) == ("Dark", dark)
    page.media(dark=False)
    assert page.js(paper) == dark


CONTRAST = """(() => {
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const scale = (text, i) => (text.startsWith("color(") && i < 3 ? 255 : 1);
  const rgb = (text) => text.match(/[\\d.]+/g).map((n, i) => Number(n) * scale(text, i));
  const over = (top, under) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => top[i] * a + under[i] * (1 - a)); };
  const ground = (node) => {
    const layers = [];
    for (; node; node = node.parentElement) layers.unshift(rgb(getComputedStyle(node).backgroundColor));
    return layers.reduce((under, top) => (top[3] === 0 ? under : over(top, under)), [255, 255, 255]);
  };
  const poor = [];
  for (const selector of %s) for (const node of [...document.querySelectorAll(selector)].slice(0, 40)) {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((p, q) => q - p);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${selector} ${ratio.toFixed(2)}`);
  }
  return poor;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(page: Page, single: Path, dark: bool) -> None:
    page.media(dark=dark)
    page.open(single)
    page.click("[data-flag='1']")
    page.click(".row", 0)
    page.until("document.querySelector('.tokens .token')")
    wanted = [
        "p",
        "small",
        "dt",
        "dd",
        "th",
        "td",
        "h2",
        "h3",
        "h5",
        ".pill",
        ".badge",
        ".chip:not(:disabled)",
        ".token:not(.control)",
    ]
    assert (
        page.js(
            CONTRAST
            % json.dumps([*wanted, ".scale .token", "nav a", "summary", ".row-place", ".row-text", "code:not(.name)"])
        )
        == []
    )


@pytest.mark.parametrize("width", [400, 900, 1280, 2560])
def test_nothing_is_cut_off_at_any_width(page: Page, several: Path, width: int) -> None:
    page.size(width, 900)
    page.open(several)
    page.click(".row", 0)
    assert page.js("document.documentElement.scrollWidth") <= width
    page.click(".modes button", 1)
    assert page.js("document.documentElement.scrollWidth") <= width


def test_on_paper(page: Page, single: Path, tmp_path: Path) -> None:
    page.open(single)
    page.media(kind="print")
    page.js("window.dispatchEvent(new Event('beforeprint'))")
    for hidden in (".bar", ".list", ".toolbar"):
        assert page.js(f"document.querySelector('{hidden}').offsetParent === null"), hidden
    assert page.js("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg'))")
    assert page.pdf(tmp_path / "x.pdf").stat().st_size > 20_000


# ---- live ---------------------------------------------------------------------------------------------------------


def test_live_a_run_grows_under_the_reader_who_stays_where_they_are(page: Page, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", algorithm="grpo", steps=60)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("metrics", "timing", "events"):
        text = (run / f"{name}.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in text if json.loads(line)["step"] <= 30 and json.loads(line).get("kind") != "finish"]
        (run / f"{name}.jsonl").write_text("".join(kept))
    (run / "evaluation.json").unlink()
    later = ("step_000040", "step_000050", "step_000060", "eval_000040", "eval_000060")
    for name in later:
        (run / "samples" / f"{name}.jsonl.gz").unlink()
    with Server([run], 0) as server:
        server.start()
        page.open(server.url)
        page.until("document.querySelectorAll('.row').length > 10")
        assert page.text("#live") == "Live"
        assert "30 of 60 steps" in page.text("#summary")
        page.js("document.querySelector('.list').focus()")
        page.press("ArrowDown", 20)
        page.until("document.querySelector('.detail').dataset.entry?.endsWith('/20')")
        place = (
            "[document.querySelector('.list').scrollTop,"
            "document.querySelector('.row[aria-selected=true]').textContent,"
            "document.querySelector('.trajectory').textContent]"
        )
        before = page.js(place)
        top = page.js("document.querySelector('.list').getBoundingClientRect().top")
        for name in (
            "metrics.jsonl",
            "timing.jsonl",
            "events.jsonl",
            "evaluation.json",
            *(f"samples/{n}.jsonl.gz" for n in later),
        ):
            shutil.copyfile(whole / name, run / name)
        page.until("document.querySelector('.steps').textContent.startsWith('60 of 60')")
        page.until("document.querySelector('.counted').textContent.startsWith('192 of 192')")
        assert page.js(place) == before
        assert page.js("document.querySelector('.list').getBoundingClientRect().top") == pytest.approx(top, abs=2)
        assert page.js(f"{FOCUS}.className") == "list"
        assert "trained model" in page.text("#evaluation")
        assert "Finished" in page.text("#summary")


def test_live_says_when_nobody_answers(page: Page, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", algorithm="sft", steps=5)
    with Server([run], 0) as server:
        server.start()
        page.open(server.url)
    page.js("window.fetch = () => Promise.reject(new Error('gone'))")
    page.until("document.querySelector('#live').textContent.startsWith('No answer')")
    assert "5 of 5 steps" in page.text("#summary")


@pytest.mark.parametrize("total", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_trajectories(page: Page, tmp_path: Path, total: int) -> None:
    run = make_run(tmp_path / "run", algorithm="sft", steps=10, samples_every=0)
    each = total // 10
    for step in range(1, 11):
        many = [
            record(f"task {step} {i}", f"reply {i}", ["reply", f" {i}"], (i % 100) / 100, group=i) for i in range(each)
        ]
        write_samples(run / "samples" / f"step_{step:06d}.jsonl.gz", many)
    written = write_report([run], tmp_path / "x.html")
    assert written.taken == total
    page.open(written.path)
    assert page.text(".counted") == f"{total:,} of {total:,} trajectories"
    assert page.js("document.querySelectorAll('.row').length") < 60
    page.js("document.querySelector('.list').focus()")
    page.press("End")
    page.until(f"document.querySelector('.trajectory h3')?.textContent === 'task 10 {each - 1}'")
    choose(page, "Text", "reply 177")
    page.until("/10 contain/.test(document.querySelector('.searching').textContent)")
    assert page.js("document.querySelectorAll('*').length") < 8000
