"""The page, live: a server for this machine alone that reads run folders and can change nothing.

It listens on the loopback address, answers GET and HEAD, and refuses every request whose Host header doesn't name this
machine, so that a web page elsewhere can't reach it through a name of its own (DNS rebinding). Runs and files are asked
for by number and by name from its own lists; no part of a request ever becomes a path.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sapwood.errors import StorageError
from sapwood.report.folder import RunFolder, check_together
from sapwood.report.page import envelope, html, policy
from sapwood.report.samples import Packed, SampleFile, pack_file, spread

HOST, PORT = "127.0.0.1", 6017
#: Ports that are tried after the usual one, where none was asked for.
TRIES = 20
#: Files whose chunks are kept in memory, and files of one answer.
KEPT, BATCH = 24, 40


class Library:
    """What the server answers with. One lock: the readers of a run's files are not made for several threads."""

    def __init__(self, folders: Sequence[RunFolder], max_samples: int) -> None:
        self._folders = list(folders)
        self._most = max_samples
        self._lock = threading.Lock()
        self._start = secrets.token_hex(4)  # a page that outlives this server must not take an old mark for a new one
        self._marks: dict[int, tuple[Any, int]] = {}
        self._packed: OrderedDict[tuple[int, str, int, int], Packed] = OrderedDict()

    def empty(self) -> dict[str, Any]:
        """The report of a page that has asked for nothing yet."""
        return envelope(self._folders, live=True)

    def state(self, known: Sequence[str]) -> dict[str, Any]:
        """The report; a run whose mark is `known` is given as null."""
        with self._lock:
            report = envelope(self._folders, live=True)
            for number, folder in enumerate(self._folders):
                state = folder.state()
                state["samples"] = self._listing(folder)
                mark = self._mark(number, state)
                report["runs"].append(None if mark in known else state | {"mark": mark})
            return report

    def _mark(self, run: int, state: dict[str, Any]) -> str:
        """A short name of a state, other than that of any state before it."""
        here = (self._folders[run].version, state["status"]["state"], state["samples"])
        before, number = self._marks.get(run, (None, 0))
        if here != before:
            number += 1
            self._marks[run] = (here, number)
        return f"{self._start}-{run}-{number}"

    def _listing(self, folder: RunFolder) -> dict[str, Any]:
        files = folder.samples()
        chosen = sorted(spread(len(files))[: self._most])  # a file has at least one trajectory
        listed = []
        for place in chosen:
            mark = _stamp(files[place])
            if mark is not None:
                listed.append([files[place].name, files[place].kind, files[place].step, f"{mark[0]}-{mark[1]}"])
        return {"files": listed, "hidden": len(files) - len(chosen)}

    def index(self, run: int, names: Sequence[str]) -> list[dict[str, Any]] | None:
        """The indices of a run's files, those that are there."""
        with self._lock:
            files = self._files(run)
            if files is None:
                return None
            found = []
            for name in names[:BATCH]:
                packed = self._pack(run, files[name]) if name in files else None
                if packed is not None:
                    found.append(packed.index())
            return found

    def chunk(self, run: int, name: str, number: int, part: str) -> bytes | None:
        """Gzip of a chunk's texts or tokens."""
        with self._lock:
            files = self._files(run)
            if files is None or name not in files or part not in ("texts", "tokens"):
                return None
            packed = self._pack(run, files[name])
            if packed is None or not 0 <= number < len(packed.chunks):
                return None
            return getattr(packed.chunks[number], part)

    def _files(self, run: int) -> dict[str, SampleFile] | None:
        if not 0 <= run < len(self._folders):
            return None
        return {file.name: file for file in self._folders[run].samples()}

    def _pack(self, run: int, file: SampleFile) -> Packed | None:
        stamp = _stamp(file)
        if stamp is None:
            return None
        key = (run, file.name, *stamp)
        if key not in self._packed:
            self._packed[key] = pack_file(file, self._most)
        self._packed.move_to_end(key)
        while len(self._packed) > KEPT:
            self._packed.popitem(last=False)
        return self._packed[key]


def _stamp(file: SampleFile) -> tuple[int, int] | None:
    try:
        found = file.path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Server:
    """Serve runs on the loopback address. Close it, or use `with`; `url` is where it answers.

    port: the one to take, 0 for any; the usual one or the next that is free where none is given. Raises StorageError.
    """

    def __init__(self, runs: Sequence[Path | str], port: int | None = None, max_samples: int = 50_000) -> None:
        folders = [RunFolder(path) for path in runs]
        check_together(folders)
        library = Library(folders, max_samples)
        self._http = _listen(port, library)
        self._serving = False

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """The page."""
        return f"http://{HOST}:{self.port}/"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self) -> None:
        """Answer until `close`, or Ctrl-C."""
        self._serving = True
        self._http.serve_forever(poll_interval=0.2)

    def start(self) -> threading.Thread:
        """Answer in a thread of its own."""
        self._serving = True
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Stop answering."""
        if self._serving:  # it waits for a loop that has begun
            self._http.shutdown()
        self._http.server_close()


class _HTTP(ThreadingHTTPServer):
    daemon_threads = True
    # On Linux this lets a port be taken again at once, on Windows it would let two servers share one.
    allow_reuse_address = os.name == "posix"
    library: Library

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""


def _listen(port: int | None, library: Library) -> _HTTP:
    tried = [port] if port is not None else range(PORT, PORT + TRIES)
    for number in tried:
        try:
            http = _HTTP((HOST, number), _Handler)
        except OverflowError:
            raise StorageError(f"--port {number}: a port is a number from 0 to 65535.") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            if error.errno == errno.EADDRINUSE:
                raise StorageError(f"--port {number}: another program listens there; choose another, or 0.") from error
            raise StorageError(
                f"--port {number}: can't be listened on: {error.strerror or error}; choose another."
            ) from error
        http.library = library
        return http
    raise StorageError(f"ports {PORT} to {PORT + TRIES - 1} are all in use; choose one with --port.")


class _Handler(BaseHTTPRequestHandler):
    server: _HTTP
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sapwood", ""
    timeout = 30

    def do_GET(self) -> None:
        """Answer with what the path names."""
        if not self._from_here():
            self._refuse(HTTPStatus.FORBIDDEN, "This server answers on 127.0.0.1 and localhost only.")
            return
        parts = urlsplit(self.path)
        answer = _ROUTES.get(parts.path)
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
            return
        try:
            query = parse_qs(parts.query, max_num_fields=8)
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "The question is too long.")
            return
        found = answer(self.server.library, {key: values[0] for key, values in query.items()})
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such run, file or chunk.")
            return
        kind, body = found
        self._send(HTTPStatus.OK, kind, body)

    do_HEAD = do_GET

    def _other(self) -> None:
        self.close_connection = True  # a body, if there is one, is not read
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "This server only reads.", ("Allow", "GET, HEAD"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_CONNECT = do_TRACE = _other

    def _from_here(self) -> bool:
        hosts = {f"{name}:{self.server.server_address[1]}" for name in (HOST, "localhost")}
        given = self.headers.get_all("Host") or []
        # A page elsewhere may link to the report, but not read its data.
        elsewhere = self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        navigates = self.headers.get("Sec-Fetch-Mode") == "navigate"
        return len(given) == 1 and given[0].lower() in hosts and (navigates or not elsewhere)

    def _refuse(self, status: HTTPStatus, sentence: str, *headers: tuple[str, str]) -> None:
        self._send(status, "text/plain; charset=utf-8", (sentence + "\n").encode(), *headers)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
            *headers,
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows where the page is, not every request."""


Answer = tuple[str, bytes]
_JSON = "application/json"


def _page(library: Library, query: dict[str, str]) -> Answer:
    head, tail = html(library.empty(), live=True)
    return "text/html; charset=utf-8", (head + tail).encode("ascii")


def _state(library: Library, query: dict[str, str]) -> Answer:
    known = query.get("known", "").split(",")
    return _JSON, json.dumps(library.state(known), allow_nan=False).encode("ascii")


def _index(library: Library, query: dict[str, str]) -> Answer | None:
    run = _number(query.get("run"))
    found = None if run is None else library.index(run, query.get("files", "").split(","))
    return None if found is None else (_JSON, json.dumps(found, allow_nan=False).encode("ascii"))


def _chunk(library: Library, query: dict[str, str]) -> Answer | None:
    run, number = _number(query.get("run")), _number(query.get("chunk"))
    if run is None or number is None:
        return None
    found = library.chunk(run, query.get("file", ""), number, query.get("part", ""))
    return None if found is None else ("application/octet-stream", found)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else None


_ROUTES: dict[str, Callable[[Library, dict[str, str]], Answer | None]] = {
    "/": _page,
    "/state": _state,
    "/index": _index,
    "/chunk": _chunk,
}
