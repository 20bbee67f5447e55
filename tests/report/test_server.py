"""The live page's server: this machine only, these files only, reading only."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapwood.errors import StorageError
from sapwood.report import Server
from tests.report.synthetic import make_run, record, write_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "secret.txt").write_text("secret")
    return make_run(folder / "office", algorithm="grpo", steps=20, samples_every=10, done=15, state="")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with Server([run], 0) as made:
        made.start()
        yield made


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    given = {"Host": f"127.0.0.1:{server.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def told(server: Server, path: str) -> Any:
    status, _, body = ask(server, path)
    assert status == 200
    return json.loads(body)


def test_it_listens_on_the_loopback_address_alone(server: Server) -> None:
    assert server._http.server_address[0] == "127.0.0.1"
    others: set[str] = set()
    with contextlib.suppress(OSError):  # a machine without a name of its own
        others = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in others:
        with socket.socket() as other:
            other.settimeout(1)
            assert address.startswith("127.") or other.connect_ex((address, server.port)) != 0


def test_the_page_and_its_headers(server: Server) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'sha256-" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert b"office" not in body  # the page asks for what it shows
    assert "Access-Control-Allow-Origin" not in headers


def test_the_state_and_only_what_changed(server: Server, run: Path) -> None:
    first = told(server, "/state")
    assert first["runs"][0]["done"] == 15
    assert [item[0] for item in first["runs"][0]["samples"]["files"]] == [
        "eval_000000.jsonl.gz",
        "step_000010.jsonl.gz",
    ]
    mark = first["runs"][0]["mark"]
    assert told(server, f"/state?known={mark}")["runs"] == [None]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "loss": 0.5}\n')
    changed = told(server, f"/state?known={mark}")["runs"][0]
    assert changed["done"] == 16
    assert changed["mark"] != mark
    write_samples(run / "samples" / "step_000016.jsonl.gz", [record("new", "x", ["x"])])
    assert told(server, f"/state?known={changed['mark']}")["runs"][0]["samples"]["files"][-1][2] == 16


def test_indices_and_chunks(server: Server) -> None:
    [index] = told(server, "/index?run=0&files=step_000010.jsonl.gz,nothing.jsonl.gz")
    assert (index["kind"], index["step"], len(index["rows"])) == ("step", 10, 16)
    status, _, body = ask(server, "/chunk?run=0&file=step_000010.jsonl.gz&chunk=0&part=texts")
    assert status == 200
    assert len(json.loads(gzip.decompress(body))["records"]) == 16


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2f..%2fsecret.txt",
        "/recipe.yaml",
        "/samples/step_000010.jsonl.gz",
        "//etc/passwd",
        "/state/../../secret.txt",
        "/index?run=1&files=step_000010.jsonl.gz",
        "/index?run=-1&files=x",
        "/index?run=0x0&files=x",
        "/index?run=&files=x",
        "/index?run=" + "9" * 400,
        "/index?run=%D9%A1&files=x",
        "/chunk?run=0&file=../recipe.yaml&chunk=0&part=texts",
        "/chunk?run=0&file=../../secret.txt&chunk=0&part=texts",
        "/chunk?run=0&file=%2Fetc%2Fpasswd&chunk=0&part=texts",
        "/chunk?run=0&file=step_000010.jsonl.gz&chunk=99&part=texts",
        "/chunk?run=0&file=step_000010.jsonl.gz&chunk=0&part=first",
        "/chunk?run=0&file=step_000010.jsonl.gz&chunk=0&part=__class__",
        "/chunk",
        "/favicon.ico",
        "/%00",
    ],
)
def test_nothing_else_is_given(server: Server, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404
    assert b"secret" not in body
    assert b"Traceback" not in body


def test_too_many_questions_at_once_are_refused(server: Server) -> None:
    assert ask(server, "/state?" + "&".join(f"a{i}=1" for i in range(50)))[0] == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil:{port}"]
)
def test_another_name_is_refused_as_dns_rebinding_needs_one(server: Server, host: str) -> None:
    status, _, body = ask(server, "/state", Host=host.format(port=server.port))
    assert status == 403
    assert b"curves" not in body


def test_two_host_headers_are_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(f"GET /state HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 403")


def test_localhost_is_this_machine(server: Server) -> None:
    assert ask(server, "/state", Host=f"localhost:{server.port}")[0] == 200
    assert ask(server, "/state", Host=f"LOCALHOST:{server.port}")[0] == 200


def test_a_page_elsewhere_may_link_here_but_not_read(server: Server) -> None:
    assert ask(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert ask(server, "/state", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert ask(server, "/state", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(server: Server, run: Path, method: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, headers, _ = ask(server, "/state", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_head_gives_no_body(server: Server) -> None:
    status, headers, body = ask(server, "/", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 10_000


def test_nonsense_does_not_stop_it(server: Server) -> None:
    for raw in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 70_000 + b"\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(raw)
    assert ask(server, "/state")[0] == 200


def test_a_port_in_use(server: Server, run: Path) -> None:
    with pytest.raises(
        StorageError, match=f"--port {server.port}: another program listens there; choose another, or 0"
    ):
        Server([run], server.port)
    with pytest.raises(StorageError, match="a port is a number from 0 to 65535"):
        Server([run], 70_000)


def test_without_a_port_the_next_free_one_is_taken(run: Path) -> None:
    with Server([run]) as first, Server([run]) as second:
        assert second.port > first.port


def test_a_run_whose_files_vanish_or_break_while_it_is_watched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="grpo", steps=20, samples_every=10, done=15, state="")
    with Server([run], 0) as server:
        server.start()
        told(server, "/state")
        (run / "metrics.jsonl").write_bytes(b"\x00" * 100)
        (run / "samples" / "step_000010.jsonl.gz").write_bytes(b"\x1f\x8b")
        assert told(server, "/index?run=0&files=step_000010.jsonl.gz")[0]["problems"]
        (run / "samples" / "step_000010.jsonl.gz").unlink()
        assert told(server, "/state")["runs"][0]["done"] is None
        assert told(server, "/index?run=0&files=step_000010.jsonl.gz") == []


def test_more_files_than_can_be_listed_are_spread_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", algorithm="sft", steps=12, samples_every=1)
    with Server([run], 0, max_samples=5) as server:
        server.start()
        samples = told(server, "/state")["runs"][0]["samples"]
    assert [item[2] for item in samples["files"]] == [1, 3, 6, 9, 12]
    assert samples["hidden"] == 7


def test_the_command_says_where_it_answers_and_ends_at_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-m", "sapwood.cli", "view", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        line = viewer.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        assert "this machine only" in line
        time.sleep(1.0)  # the line comes just before it serves
        viewer.send_signal(2)
        assert viewer.wait(10) == 0
        assert viewer.stderr is not None
        assert viewer.stderr.read() == ""
