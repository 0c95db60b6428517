"""The guard's decisions, one by one."""

import asyncio
import os
import time
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from fastapi import APIRouter
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from cmacc.app.bodies import Refusal
from cmacc.app.entry import Entry
from cmacc.app.guard import Guard, plain_path
from cmacc.app.uploads import UPLOADS_AT_ONCE, Uploads

PIECES = st.sampled_from(
    ["/", "..", ".", "%2e", "%2F", "%2f", "%5c", "\\", "%00", "%25", "a", "assets", "media", "%c3%a9", "?"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@example("/gradio_api/file=/a%20b.mp4")
def test_a_path_is_in_its_plain_form_or_refused(raw: str) -> None:
    """Against the system's own idea of a path."""
    try:
        path = plain_path(raw.encode())
    except Refusal:
        return
    assert path == unquote(raw)
    assert path.startswith("/")
    assert os.path.normpath(path) == (path.rstrip("/") or "/")
    assert path.count("/") == raw.count("/")
    assert path.isprintable()


@given(st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="/\\"), max_size=30))
def test_every_printable_name_has_a_plain_path(name: str) -> None:
    if name not in ("", ".", ".."):
        assert plain_path(quote(f"/assets/{name}").encode()) == f"/assets/{name}"


async def answered(guard: Guard, method: str, path: str, body: list[bytes] | None = None, **headers: str) -> int:
    """Status of the answer, as an ASGI server would get it."""
    headers = {"host": "localhost"} | headers
    scope = {
        "type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.1", 1), "server": ("localhost", 80),
    }  # fmt: skip
    left, sent = list(body or [b""]), []

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    return int(sent[0]["status"])


async def inner(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers everything; tells its headers in the name of a header."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"access-control-allow-origin", b"*")]})
    await send({"type": "http.response.body", "body": b""})


def test_routes_of_ours_are_open_with_their_methods(tmp_path: Path) -> None:
    ours = APIRouter()
    ours.get("/media/{name}")(lambda name: name)
    ours.post("/again")(lambda: 1)
    guard = Guard(inner, own_routes=ours.routes, uploads=Uploads(tmp_path, 100))

    async def check() -> None:
        assert await answered(guard, "GET", "/media/a") == 200
        assert await answered(guard, "POST", "/media/a") == 405
        assert await answered(guard, "GET", "/media/a/b") == 404
        assert await answered(guard, "GET", "/media/..%2fa") == 404
        assert await answered(guard, "POST", "/again", [b"{}"], content_type="application/json") == 200
        assert await answered(guard, "POST", "/again", [b'{"path": "/x"}'], content_type="application/json") == 403

    asyncio.run(check())


def test_a_page_of_ours_keeps_its_own_policy_and_no_other_header_passes(tmp_path: Path) -> None:
    sent: list[Message] = []

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        assert {name for name, _ in scope["headers"]} == {b"host"}
        headers = [(b"content-security-policy", b"sandbox"), (b"access-control-allow-origin", b"*"), (b"x-debug", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    guard = Guard(page, own_routes=[], uploads=Uploads(tmp_path, 100))
    headers = [(b"host", b"localhost"), (b"cookie", b"a=b"), (b"x-forwarded-host", b"evil"), (b"authorization", b"x")]
    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": headers}
    asyncio.run(guard(scope, receive, send))
    found = sent[0]["headers"]
    assert [value for name, value in found if name == b"content-security-policy"] == [b"sandbox"]
    assert not {b"access-control-allow-origin", b"x-debug"} & {name for name, _ in found}
    assert dict(found)[b"cache-control"] == b"no-store"


def test_websockets_are_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(inner, own_routes=[], uploads=Uploads(tmp_path, 100))
    asyncio.run(guard({"type": "websocket", "path": "/\x1b[1m", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert "refused ? WEBSOCKET /\\x1b[1m: there are no websockets here" in caplog.text


def test_only_so_many_uploads_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = most = 0

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.05)
        at_once -= 1
        await inner(scope, receive, send)

    kind = "multipart/form-data; boundary=b"

    async def upload_many() -> list[int]:
        guard = Guard(slow, own_routes=[], uploads=Uploads(tmp_path, 1000))
        tries = (answered(guard, "POST", "/gradio_api/upload", content_type=kind) for _ in range(3 * UPLOADS_AT_ONCE))
        return await asyncio.gather(*tries)

    assert asyncio.run(upload_many()) == [200] * 3 * UPLOADS_AT_ONCE
    assert most == UPLOADS_AT_ONCE
    monkeypatch.setattr("cmacc.app.bodies.SILENT_SECONDS", 0.01)
    assert set(asyncio.run(upload_many())) == {200, 503}


def test_the_oldest_uploads_make_room(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, 100)
    now = time.time()
    for number in range(5):
        file = tmp_path / str(number) / "clip.mp4"
        file.parent.mkdir()
        file.write_bytes(bytes(80))
        os.utime(file, (now - 1000 + number, now - 1000 + number))
    assert uploads.make_room()
    assert sorted(file.parent.name for file in tmp_path.rglob("*.mp4")) == ["3", "4"]
    for file in tmp_path.rglob("*.mp4"):
        file.write_bytes(bytes(120))  # young: a search may be reading it
    assert not uploads.make_room()
    assert len(list(tmp_path.rglob("*.mp4"))) == 2


def test_only_files_of_the_folder_are_uploads(tmp_path: Path) -> None:
    folder, outside = tmp_path / "uploads", tmp_path / "outside.mp4"
    folder.mkdir()
    outside.write_bytes(b"x")
    (folder / "clip.mp4").write_bytes(b"x")
    (folder / "link.mp4").symlink_to(outside)
    (folder / "circle").symlink_to(folder / "circle")
    (tmp_path / "uploads-2").mkdir()
    (tmp_path / "uploads-2" / "clip.mp4").write_bytes(b"x")
    uploads = Uploads(folder, 100)
    assert uploads.holds(f"{folder}/clip.mp4")
    for path in (
        "clip.mp4", f"{folder}", f"{folder}/", f"{folder}/../outside.mp4", f"{folder}/link.mp4", f"{folder}/circle",
        f"{outside}",
        f"{tmp_path}/uploads-2/clip.mp4", f"{folder}/none.mp4", f"{folder}/{'a' * 300}", f"{folder}/clip.mp4\0", "",
        "/",
    ):  # fmt: skip
        assert not uploads.holds(path), path


def test_wrong_tokens_are_counted_by_address_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("cmacc.app.entry.time.monotonic", lambda: now)
    entry = Entry("a-token-of-16-or-more")
    for _ in range(10):
        assert entry.may_try("a")
        assert not entry.is_token("wrong", "a")
    assert not entry.may_try("a")
    assert entry.may_try("b")
    now += 61
    assert entry.may_try("a")
    assert entry.is_token("a-token-of-16-or-more", "a")
    assert not entry.has_cookie("cmacc=a-token-of-16-or-more", "cmacc")
    assert entry.has_cookie(f"x=y; cmacc={entry.cookie}", "cmacc")
