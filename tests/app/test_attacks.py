"""What strangers may try against a real server: each try is refused, logged, and the server goes on."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import AsyncMock
from urllib.parse import quote

import httpx
import pytest

from .serving import (
    MAX_UPLOAD_BYTES,
    SECRET,
    Served,
    ask,
    bare_app,
    file_data,
    serving,
    serving_small_page,
    small_page,
    upload,
)  # fmt: skip

TOKEN = "a-token-of-more-than-16"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_small_page(tmp_path_factory.mktemp("uploads")) as page:
        yield page


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_small_page(tmp_path_factory.mktemp("uploads"), TOKEN) as page:
        yield page


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    # Reading certificates, which http has no use for, takes 0.05 s each time.
    with httpx.Client(base_url=served.address, timeout=20, verify=False) as client:
        yield client
        assert client.get("/").status_code == 200  # whatever was tried


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines of the log about refusals since the last call."""

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "cmacc.app"]
        caplog.clear()
        assert all("\n" not in line and len(line) < 400 for line in found)
        return [line for line in found if line.startswith("refused 127.0.0.1 ")]

    return lines


def raw(host: str, request: bytes, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes, until it closes or is silent."""
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
                head, found, body = answer.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                if found and length and len(body) >= int(length[1]):
                    break
        except ConnectionResetError:
            pass
        return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py",
        "/assets/..%2f..%2froutes.py",
        "/static/%252e%252e/%252e%252e/routes.py", "/assets/%5c..%5c..%5croutes.py", "/assets//etc/passwd",
        "//etc/passwd",
        "/assets/%00", "/assets/index.js%00.css", "/gradio_api/file=/etc/passwd", "/gradio_api/file=%2fetc%2fpasswd",
        "/gradio_api/file=etc/passwd", "/gradio_api/file=UPLOADS/../../../etc/passwd", "/gradio_api/file=UPLOADS",
        "/gradio_api/file=UPLOADS/%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=UPLOADS/link", "/gradio_api/file/etc/passwd", "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/custom_component/x/client/component/index.js", "/gradio_api/openapi.json",
        "/gradio_api/deep_link", "/monitoring",
        "/gradio_api/runs", "/gradio_api/vibe-code/", "/gradio_api/profiling/summary", "/gradio_api/queue/status",
        "/svelte/x.js",
        "/docs", "/openapi.json", "/gradio_api/app_id", "/gradio_api/dev/reload", "/gradio_api/user", "/login",
        "/token", "/pwa_icon/9999",
        "/media/../etc/passwd", "/\x1b[31mred", "/%1b[31mred", "/%ff%fe", "/" + "a" * 5000,
    ],
)  # fmt: skip
def test_paths_that_the_page_does_not_need(
    path: str, served: Served, client: httpx.Client, refused: Callable[[], list[str]]
) -> None:
    link = served.uploads / "link"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    path = path.replace("UPLOADS", str(served.uploads))
    answer = raw(served.host, f"GET {path}?token=hidden HTTP/1.1\r\nHost: {served.host}\r\n\r\n".encode())
    assert status(answer) == (400 if "\x1b" in path else 404), answer
    assert b"root:" not in answer
    if "\x1b" not in path:  # not HTTP at all: it never reaches the guard
        [line] = refused()
        assert "hidden" not in line
        assert "\x1b" not in line


@pytest.mark.parametrize(
    "path",
    [
        "run/read", "api/read", "call/read", "call/v2/read", "component_server", "process_recording", "vibe-edit",
        "stream/x",
        "run-history/connect", "profiling/clear", "undo-vibe-edit", "vibe-starter-queries",
    ],
)  # fmt: skip
def test_other_ways_to_call_functions_are_closed(
    path: str, client: httpx.Client, refused: Callable[[], list[str]]
) -> None:
    assert client.post(f"/gradio_api/{path}", json={"data": [file_data("/etc/passwd")]}).status_code == 404
    assert len(refused()) == 1


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "BREW"])
def test_other_methods(method: str, served: Served, client: httpx.Client, refused: Callable[[], list[str]]) -> None:
    for path in ("/", "/gradio_api/queue/join"):
        answer = raw(served.host, f"{method} {path} HTTP/1.1\r\nHost: {served.host}\r\nX-Echo: me\r\n\r\n".encode())
        assert status(answer) == 405
        assert b"X-Echo" not in answer
    assert len(refused()) == 2


# ------------------------------------------------------------------------------------------- names of files in requests


def test_gradio_alone_would_read_and_fetch_what_a_request_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the guard. If this fails one day, gradio checks it itself."""
    import gradio as gr

    fetched = AsyncMock(side_effect=RuntimeError("no network in tests"))
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetched)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = small_page()
    [number] = [number for number, function in page.fns.items() if function.api_name == "read"]
    app = gr.mount_gradio_app(bare_app(), page, path="/", ssr_mode=False)
    with serving(app) as host, httpx.Client(base_url=f"http://{host}", timeout=20) as client:
        assert "root:" in str(ask(client, number, [file_data("/etc/passwd")])["output"]["data"])
        ask(client, number, [file_data("http://203.0.113.1/film.mp4")], "s2")
        assert fetched.await_args is not None
        assert fetched.await_args.args == ("http://203.0.113.1/film.mp4",)


def test_only_uploads_can_be_named(served: Served, client: httpx.Client, refused: Callable[[], list[str]]) -> None:
    path = upload(client, b"some content")
    url = f"{served.address}/gradio_api/file={path}"
    answer = ask(client, served.functions["read"], [file_data(path, url=url, orig_name="clip.mp4", size=12)])
    assert answer["output"]["data"] == [repr(b"some content")]
    assert client.get(f"/gradio_api/file={path}").content == b"some content"
    assert client.get(f"/gradio_api/file={path}").headers["content-security-policy"] == "sandbox"
    assert refused() == []
    (served.uploads / "to-passwd").symlink_to("/etc/passwd")
    wrong: list[object] = [
        file_data("/etc/passwd"), file_data(f"{served.uploads}/../../../etc/passwd"), file_data(""), file_data(3),
        file_data("https://example.com/film.mp4"), file_data("file:///etc/passwd"), file_data("clip.mp4"),
        file_data([path]),
        file_data(f"{served.uploads}/to-passwd"), file_data(str(served.uploads)), file_data(f"{path}\0"),
        {"path": "/etc/passwd"},
        file_data(path, url="http://example.com/film.mp4"), file_data(path, url="/gradio_api/file=/etc/passwd"),
        file_data(path, url=f"http://evil.example/gradio_api/file={path}"), file_data(path, url=f"{url}/../x"),
        file_data(path, url={"a": 1}), file_data(path, orig_name="../../x"), file_data(path, orig_name="a\0b"),
        [{"deep": [{"er": file_data("/etc/passwd")}]}], {"video": file_data("/etc/passwd")},
        file_data("/" + "a" * 5000),
    ]  # fmt: skip
    for given in wrong:
        body = {"data": [given], "fn_index": served.functions["read"], "session_hash": "s3"}
        answer_ = client.post("/gradio_api/queue/join", json=body)
        assert answer_.status_code == 403, given
        assert SECRET not in answer_.text
        assert len(refused()) == 1, given


def test_what_is_passed_on_is_what_was_checked(
    served: Served, client: httpx.Client, refused: Callable[[], list[str]]
) -> None:
    """Of two values of a key, parsers may choose either."""
    path = upload(client, b"right")
    twice = json.dumps(file_data("/etc/passwd"))[:-1] + ', "path": ' + json.dumps(path) + "}"
    body = f'{{"data": [{twice}], "fn_index": {served.functions["read"]}, "session_hash": "s4"}}'
    headers = {"content-type": "application/json"}
    assert client.post("/gradio_api/queue/join", content=body, headers=headers).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "s4"}) as stream:
        assert "b'right'" in stream.read().decode()


@pytest.mark.parametrize(
    ("content", "kind", "wanted"),
    [
        (b"{", "application/json", 400), (b"", "application/json", 400), (b"\xff\xfe", "application/json", 400),
        (b'{"a": NaN}', "application/json", 400), (b'{"a": ' + b"9" * 10_000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400), (b"[" * 200 + b"]" * 200, "application/json", 400),
        (b'{"a": 1}', "text/plain", 415), (b"a=1", "application/x-www-form-urlencoded", 415),
        (b"[]", "application/json", 422),
        (b'{"a": "' + b"b" * 1_000_001 + b'"}', "application/json", 413),
        ('{"a": 1}'.encode("utf-16"), "application/json", 400),
    ],
)  # fmt: skip
def test_malformed_json(content: bytes, kind: str, wanted: int, client: httpx.Client) -> None:
    answer = client.post("/gradio_api/queue/join", content=content, headers={"content-type": kind})
    assert answer.status_code == wanted
    assert "Traceback" not in answer.text


# -------------------------------------------------------------------------------------------------------------- uploads


def test_uploads_that_are_too_large_end_early_and_leave_nothing(
    served: Served, client: httpx.Client, refused: Callable[[], list[str]]
) -> None:
    before = set(served.uploads.rglob("*"))
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    kind = "Content-Type: multipart/form-data; boundary=b"
    start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {served.host}\r\n{kind}\r\n".encode()
    assert status(raw(served.host, start + b"Content-Length: 99999999999\r\n\r\n" + head)) == 413
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield head
        while sent < 50 * MAX_UPLOAD_BYTES:
            sent += 100_000
            yield bytes(100_000)

    try:  # no Content-Length: in chunks
        answer = client.post("/gradio_api/upload", content=endless(), headers={"content-type": kind.partition(": ")[2]})
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError):  # the server hung up while we sent
        pass
    assert sent < 10 * MAX_UPLOAD_BYTES
    # A length that is shorter than what comes: the rest is no request. One that is longer: the client leaves.
    short = raw(served.host, start + b"Content-Length: 10\r\n\r\n" + head + b"GET / HTTP/1.1\r\n\r\n")
    assert status(short) == 400 or b"[]" in short
    name, port = served.host.split(":")
    with socket.create_connection((name, int(port))) as connection:
        connection.sendall(start + b"Content-Length: 1000\r\n\r\n" + head + b"abc")
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    lines: list[str] = []
    while not any("left before" in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
        lines += refused()
    assert sum("too large" in line for line in lines) == 2
    assert {path for path in set(served.uploads.rglob("*")) - before if path.is_file()} == set()


@pytest.mark.parametrize(
    ("kind", "content", "wanted"),
    [
        ("multipart/form-data", b"x", 415), ("text/plain", b"x", 415), ("", b"x", 415),
        ("multipart/form-data; boundary=b", b"no form at all", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--', 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n',
            400,
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"A: " + b"b" * 20_000 + b"\r\n\r\nx\r\n--b--\r\n", 413),
        ("multipart/form-data; boundary=" + "b" * 300, b"x", 400),
    ],
)  # fmt: skip
def test_uploads_that_are_no_forms(kind: str, content: bytes, wanted: int, client: httpx.Client) -> None:
    answer = client.post("/gradio_api/upload?upload_id=u1", content=content, headers={"content-type": kind})
    assert answer.status_code == wanted
    assert "Traceback" not in answer.text
    assert len(answer.text) < 200


@pytest.mark.parametrize(
    "name",
    ["../../../tmp/x.mp4", "/etc/x.mp4", "..\\..\\x.mp4", "a\0b.mp4", ".", "..", "", "é %2e%2e #?.mp4", "a" * 400],
)
def test_uploads_stay_in_their_folder_whatever_their_name(name: str, served: Served, client: httpx.Client) -> None:
    answer = client.post("/gradio_api/upload", files={"files": (name, b"text, not a video")})
    assert answer.status_code in (200, 400)
    for path in answer.json() if answer.status_code == 200 else []:
        assert Path(path).resolve().is_relative_to(served.uploads)
        assert client.get(f"/gradio_api/file={quote(path)}").status_code == 200
    empty = client.post("/gradio_api/upload", files={"files": ("empty.mp4", b"")})
    assert empty.status_code == 200


def test_errors_tell_visitors_only_what_is_meant_for_them(
    served: Served, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    failed = json.dumps(ask(client, served.functions["fail"], []))
    assert SECRET not in failed
    assert "Traceback" not in failed
    assert "The server's log says why" in failed
    assert SECRET in caplog.text
    assert "the file is no video" in json.dumps(ask(client, served.functions["refuse"], []))


# ------------------------------------------------------------------------------------------------------- who is asking


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"Host": "evil.example"}, 403), ({"Host": "localhost.evil.example:7860"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "localhost"}, 200), ({"Host": "[::1]:9000"}, 200), ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "127.0.0.2"}, 403),
        ({"Host": "localhost:80@evil.example"}, 403), ({"Host": "0.0.0.0"}, 403), ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403), ({"Origin": "http://[half"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "x"}, 400),
    ],
)  # fmt: skip
def test_other_hosts_and_origins(
    headers: dict[str, str], wanted: int, client: httpx.Client, refused: Callable[[], list[str]]
) -> None:
    answer = client.get("/", headers=headers)
    assert answer.status_code == wanted
    assert len(refused()) == (wanted != 200)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    if wanted != 200:
        assert client.post("/gradio_api/reset", headers=headers, json={"event_id": "x"}).status_code == wanted


def test_own_origin_gets_no_consent_for_others(served: Served, client: httpx.Client) -> None:
    answer = client.post("/gradio_api/reset", headers={"Origin": served.address}, json={"event_id": "x"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_malformed_http(served: Served, client: httpx.Client) -> None:
    host = f"Host: {served.host}\r\n"
    for request in (
        "\x16\x03\x01\x02\x00\x01", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", f"GET / HTTP/1.1\r\n{host}{host}\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        f"GET / HTTP/1.1\r\n{host}A: {'b' * 100_000}\r\n\r\n",
        f"GET / HTTP/1.1\r\n{host}" + "A: b\r\n" * 20_000 + "\r\n",
        f"POST /gradio_api/reset HTTP/1.1\r\n{host}Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        f"POST /gradio_api/reset HTTP/1.1\r\n{host}Content-Length: -5\r\n\r\n",
        f"GET / HTTP/1.1\r\n{host} folded: x\r\n\r\n",
    ):  # fmt: skip
        answer = raw(served.host, request.encode())
        assert answer == b"" or status(answer) in (400, 403, 431), request
    absolute = raw(served.host, f"GET http://evil.example/ HTTP/1.1\r\n{host}\r\n".encode())
    assert status(absolute) == 404


def test_slow_clients_are_left(
    served: Served, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, refused: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr("cmacc.app.server._SECONDS_TO_ASK", 0.3)
    monkeypatch.setattr("cmacc.app.bodies.SILENT_SECONDS", 0.3)
    assert raw(served.host, b"") == b""
    begun = time.monotonic()
    assert raw(served.host, b"GET / HTTP/1.1\r\nHost: lo") == b""
    kind = "Content-Type: application/json\r\nContent-Length: 10\r\n"
    slow = f"POST /gradio_api/reset HTTP/1.1\r\nHost: {served.host}\r\n{kind}\r\n{{".encode()
    assert status(raw(served.host, slow)) == 408
    assert time.monotonic() - begun < 5
    assert "sent too slowly" in refused()[0]


# ---------------------------------------------------------------------------------------------------------------- token


def test_without_the_token_nothing_is_told(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    with httpx.Client(base_url=locked.address, timeout=20) as client:
        for path in (
            "/",
            "/config",
            "/theme.css",
            "/assets/x.js",
            "/gradio_api/info",
            "/media/a",
            "/favicon.ico",
            "/no",
        ):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert ("<form" in answer.text) == (path == "/")
        assert client.post("/gradio_api/upload", files={"files": ("a", b"b")}).status_code == 401
        for near in (TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "x", "é"):
            assert client.get("/", params={"token": near}).status_code == 403
            assert client.post("/token", data={"token": near}).status_code in (403, 429)
        assert client.get("/", params={"token": TOKEN}).status_code == 429  # after ten wrong ones
        assert client.get("/", headers={"Cookie": f"cmacc_app_{locked.host.split(':')[1]}={TOKEN}"}).status_code == 401
        assert client.get("/", headers={"Cookie": 'a="\\'}).status_code == 401
    assert TOKEN not in caplog.text
    assert TOKEN[:-1] not in caplog.text


def test_with_the_token_a_cookie_opens_the_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving_small_page(tmp_path, TOKEN) as page, httpx.Client(base_url=page.address, timeout=20) as client:
        answer = client.get("/", params={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        opened = client.get("/")
        assert opened.status_code == 200
        assert TOKEN not in opened.text
        assert opened.headers["referrer-policy"] == "no-referrer"
        assert upload(client, b"x")
        client.cookies.clear()
        assert (
            client.post("/token", data={"token": TOKEN}, headers={"Origin": "http://evil.example"}).status_code == 403
        )
        assert client.post("/token", data={"token": TOKEN}, headers={"Origin": page.address}).status_code == 303
        assert client.get("/config").status_code == 200
        # Where a token is set, the page may have any name.
        assert client.get("/config", headers={"Host": "name.example"}).status_code == 200
    assert TOKEN not in caplog.text
