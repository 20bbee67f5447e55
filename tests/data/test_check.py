"""`sapwood data check`: every bad record by file and line, repeats, lengths, languages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapwood import cli
from sapwood.chat import Chat
from sapwood.data.check import check, language
from sapwood.errors import DataError
from sapwood.models import load
from tests.chats import STRICT, tokenizer
from tests.data.conftest import Lines

ROWS = [{"prompt": f"question {i}", "response": "x" * (i + 1)} for i in range(100)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is the weather?", "Latin script"),
        ("Où est la gare, s'il vous plaît ?", "Latin script"),
        ("今天天气怎么样？", "Chinese"),
        ("今天用 Python 写一个函数", "Chinese"),
        ("今日の天気はどうですか。", "Japanese"),
        ("오늘 날씨 어때요?", "Korean"),
        ("Какая сегодня погода?", "Cyrillic script"),
        ("كيف الطقس اليوم؟", "Arabic script"),
        ("12 + 3 = ?", "no letters"),
        ("translate to Chinese: weather report 天气预报", "mixed"),
    ],
)
def test_languages(text: str, name: str) -> None:
    assert language(text) == name


def test_a_report(lines: Lines) -> None:
    rows = [*ROWS, ROWS[4], ROWS[4], {"prompt": "你好", "response": "你好吗"}, "{oops", {"prompt": "", "response": "x"}]
    path = lines(rows)
    report = check([str(path)])
    assert not report.good
    assert report.bad[0].startswith(f"{path} line 104: not JSON")
    assert report.bad[1] == f"{path} line 105: field 'prompt' is empty; fill it in or remove the record"
    assert report.records == 103
    assert report.repeats == [(f"{path} line 101", f"{path} line 5"), (f"{path} line 102", f"{path} line 5")]
    assert report.languages == {"Latin script": 102, "Chinese": 1}
    # Replies are 1 .. 100, twice 5 more, and 3 characters: the median of these 103 is the 52nd, 49.
    assert report.percentiles()["reply"] == {"0": 1, "50": 49, "90": 90, "95": 95, "99": 99, "100": 100}
    assert report.percentiles()["prompt"]["100"] == len("question 99")
    text = "\n".join(report.lines())
    assert "103 good records (103 prompt_response), 2 bad" in text
    assert "line 102 repeats" in text
    assert json.loads(json.dumps(report.to_json()))["lengths"]["reply"]["100"] == 100


def test_one_is_singular_and_nothing_is_bad(lines: Lines) -> None:
    text = "\n".join(check([str(lines([ROWS[0], ROWS[0]], "twice.jsonl"))]).lines())
    assert "\n1 duplicate:\n" in text
    assert "1 good record (1 prompt_response), 0 bad" in check([str(lines(ROWS[:1], "one.jsonl"))]).lines()
    empty = lines([], "empty.json")
    empty.write_text("[]")
    report = check([str(empty)])
    assert report.bad == [f"{empty}: holds no record."]


def test_lengths_in_tokens(lines: Lines) -> None:
    chat = Chat(tokenizer())
    report = check([str(lines(ROWS))], chat=chat)
    assert report.unit == "tokens"
    assert report.percentiles()["reply"]["100"] == chat.reply("x" * 100).size
    turns = [{"role": r, "content": "hi"} for r in ("user", "assistant", "user", "assistant")]
    report = check([str(lines([{"messages": turns}, {"messages": turns[:1]}], "talk.jsonl"))], chat=chat)
    assert report.percentiles()["example"]["100"] > 2 * report.percentiles()["prompt"]["100"] - 99
    assert report.lengths["reply"].size == 1  # a prompt alone has none


def test_a_template_that_refuses_a_record_is_reported_with_its_line(lines: Lines) -> None:
    path = lines([ROWS[0], {**ROWS[1], "system": "be kind"}])
    report = check([str(path)], chat=Chat(tokenizer(STRICT)))
    (problem,) = report.bad
    assert problem.startswith(f"{path} line 2: the chat template refuses")
    assert report.records == 1


def test_one_broken_file_does_not_hide_the_others(lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    report = check([str(tmp_path / "a.parquet"), str(lines(ROWS))])
    assert len(report.bad) == 1
    assert report.records == 100


def test_repeats_are_found_across_files(lines: Lines) -> None:
    train, test = lines(ROWS), lines([{"prompt": "fresh", "response": "x"}, ROWS[7]], "test.jsonl")
    assert check([str(train), str(test)]).repeats == [(f"{test} line 2", f"{train} line 8")]


def test_options_of_a_source(lines: Lines) -> None:
    path = lines([{"problem": "1+1", "why": "because"}])
    assert check([str(path)], {"output": "why"}).records == 1
    with pytest.raises(DataError, match=r"'inptu' is no key of a data source; did you mean 'input'\?"):
        check([str(path)], {"inptu": "problem"})
    with pytest.raises(DataError, match=r"max_samples='0': it should be greater than or equal to 1"):
        check([str(path)], {"max_samples": "0"})


def test_the_command(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = lines(ROWS), lines([ROWS[0], "{"], "bad.jsonl")
    assert cli.main(["data", "check", str(good)]) == 0
    assert "100 good records" in capsys.readouterr().out
    assert cli.main(["data", "check", str(good), str(bad), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], len(found["bad"])) == (101, 1)
    monkeypatch.setattr(load, "load_tokenizer", lambda *_: tokenizer())
    given = ["data", "check", str(good), "--field", "output=response"]
    assert cli.main([*given, "--model", "tiny"]) == 0
    assert "length in tokens" in capsys.readouterr().out
    template = tmp_path / "my.jinja"
    template.write_text("{{ nothing() }}")
    assert cli.main([*given, "--model", "tiny", "--chat-template", str(template)]) == 1
    assert f"model.chat_template ({template}) refuses" in capsys.readouterr().err
    assert cli.main([*given, "--chat-template", str(template)]) == 1
    assert "give --model too" in capsys.readouterr().err
    assert cli.main(["data", "check", str(tmp_path / "none.jsonl")]) == 1
    assert cli.main(["data"]) == 2
    assert "data prepare" in capsys.readouterr().err
    assert cli.main(["data", "--help"]) == 0
