"""The page as a file: what is in it, what can't be, and where it is written."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sapwood.cli import main
from sapwood.report import write_report
from sapwood.report.page import embedded, html, policy
from tests.report.synthetic import make_run, record, write_samples


class Elements(HTMLParser):
    """Scripts, styles and the policy of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.scripts: list[tuple[dict, str]] = []
        self.styles: list[str] = []
        self.policy = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag == "script":
            self.scripts.append((given, ""))
        if tag == "style":
            self.styles.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            self.lasttag = "script"
        elif self.lasttag == "style":
            self.styles[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "office", algorithm="grpo", steps=20, samples_every=10)


def test_the_page_holds_one_script_and_one_style_that_its_policy_names(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text("ascii")
    page = Elements(text)
    [script] = [content for given, content in page.scripts if "type" not in given]
    [style] = page.styles
    rules = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'{digest(script)}'"
    assert rules["style-src"] == f"'{digest(style)}'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert rules["base-uri"] == rules["form-action"] == rules["trusted-types"] == "'none'"
    assert "connect-src" not in rules
    assert "unsafe" not in page.policy
    # Nothing is asked of a network; the namespace of SVG is a name.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<script")


def test_scripts_make_no_markup_from_text() -> None:
    script = html({"runs": []}, live=False)[1]
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert name not in script


def test_embedded_data_is_ascii_without_what_html_reads_and_comes_back() -> None:
    nasty = {"</script><!--": ["-->", "<script>", "&lt;", "\u2028\u2029", "\ud800", "\x00", "]]>", 1.5, None]}
    text = embedded(nasty)
    assert text.isascii()
    assert not set("<>&\n\u2028") & set(text)
    assert json.loads(text) == nasty


def test_the_samples_in_the_file_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    written = write_report([run], tmp_path / "x.html")
    page = Elements((tmp_path / "x.html").read_text("ascii"))
    blocks = {
        given["id"]: content for given, content in page.scripts if given.get("type") == "application/octet-stream"
    }
    index = json.loads(gzip.decompress(base64.b64decode(blocks["index"])))
    # 2 steps of 4 tasks with 4 attempts, and 24 held-out tasks before and after training.
    assert written.taken == written.total == sum(len(part["rows"]) for _, part in index) == 2 * 16 + 2 * 24
    assert [(run, part["kind"], part["step"]) for run, part in index] == [
        (0, "eval", 0),
        (0, "eval", 20),
        (0, "step", 10),
        (0, "step", 20),
    ]
    texts = json.loads(gzip.decompress(base64.b64decode(blocks["c0-2-0-texts"])))
    assert len(texts["records"]) == 16
    assert len(blocks) == 1 + 2 * 4


def test_what_is_left_out_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "x.html"), "--max-samples", "40"]) == 0
    assert "40 trajectories of 80; --max-samples 80 has all" in capsys.readouterr().out
    page = Elements((tmp_path / "x.html").read_text("ascii"))
    [report] = [json.loads(content) for given, content in page.scripts if given.get("id") == "report"]
    assert report["runs"][0]["left_out"] == (
        "40 of 80 trajectories are left out of this page: whole steps, spread evenly, were kept. Write it with "
        "--max-samples 80 for all of them, or open the run with sapwood view."
    )


def test_runs_share_the_samples_and_one_without_any_takes_none(run: Path, tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", algorithm="sft", steps=5)
    written = write_report([run, empty, run], tmp_path / "x.html", max_samples=100)
    assert (written.taken, written.total) == (100, 160)


def test_the_usual_place_is_the_folder_of_a_single_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / name, algorithm="sft", steps=3)
    assert write_report(["a"]).path == Path("a/report.html")
    assert write_report(["a", "b"]).path == Path("report.html")
    assert write_report(["a"], tmp_path / "deep" / "er.html").path.is_file()
    (tmp_path / "folder").mkdir()
    assert write_report(["a"], tmp_path / "folder").path == tmp_path / "folder" / "report.html"
    write_report(["a"])  # an older report gives way
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_but_a_report_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", algorithm="sft", steps=3)
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl")]) == 1
    told = capsys.readouterr().err
    assert "is there and is no report, so it is left alone; name another file with --out." in told
    assert (run / "metrics.jsonl").read_bytes() == before


def test_places_that_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", algorithm="sft", steps=3)
    for out in (run / "metrics.jsonl" / "x.html", Path("/proc/x.html"), Path("/dev/null")):
        assert main(["report", str(run), "--out", str(out)]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"sapwood: {out}")
        assert "--out" in told
        assert "Traceback" not in told


def test_wrong_usage_and_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["report", "x", "--max-samples", "-1"]) == 2
    for port in ("many", "-1", "70000"):
        assert main(["view", "x", "--port", port]) == 2
    capsys.readouterr()
    for command in ("report", "view"):
        assert main([command, str(tmp_path / "none")]) == 1
        assert "there is no such run folder" in capsys.readouterr().err


def test_a_report_of_a_run_that_is_being_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", algorithm="grpo", steps=40, done=15, state="", samples_every=5)
    (run / "samples" / "step_000020.jsonl.gz.part").write_bytes(b"half")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "lo')
    write_report([run], tmp_path / "x.html")
    page = Elements((tmp_path / "x.html").read_text("ascii"))
    [report] = [json.loads(content) for given, content in page.scripts if given.get("id") == "report"]
    assert report["runs"][0]["status"]["state"] == "running"
    assert report["runs"][0]["done"] == 15


def test_files_of_trajectories_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        write_samples(tmp_path / f"{name}.jsonl.gz", [record("a", name, [name]), record("b", name, [name])])
    assert write_report([tmp_path / "base.jsonl.gz", tmp_path / "tuned.jsonl.gz"], tmp_path / "x.html").taken == 4


def test_torch_is_not_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", algorithm="grpo", steps=3)
    script = (
        "import sys; from sapwood.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_live_page_may_ask_its_own_server_and_nobody_else() -> None:
    assert "connect-src 'self'" in policy(live=True)
    assert "connect-src" not in policy(live=False)
