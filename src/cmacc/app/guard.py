"""What stands in front of everything that answers: routes of our own, and gradio.

gradio serves whoever reaches it. It has routes that we do not want, and where it is mounted it reads any file that a
request names (``{"path": "/etc/passwd"}`` in the place of an upload) and fetches any URL. So this middleware lets
through only what the page needs:

* requests to this host, of pages of this host, with the token where one is set;
* the methods and routes of a list; every path in its plain form;
* bodies of a bounded size and time; JSON that names no file but an upload. What is passed on is serialized again
  from what was checked, so that no other parser can read it in another way;
* of the headers of requests and responses, those of a list: what is behind sees no cookie and no Origin, and gives
  no consent to other origins. The headers that keep a browser on this host are added.

What is refused is logged in one line, without the query, which may hold a token.
"""

import asyncio
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmacc.app import bodies
from cmacc.app.bodies import Bounded, Refusal, check_length, read_body
from cmacc.app.entry import Entry, entry_page
from cmacc.app.uploads import UPLOADS_AT_ONCE, Uploads

_log = logging.getLogger("cmacc.app")

_HEADER_BYTES = 16_000
_JSON_BYTES = 1_000_000
_JSON_DEPTH = 50
# Of the multipart form around a file.
_FORM_BYTES = 100_000

_UPLOAD, _FILE, _TOKEN = "/gradio_api/upload", "/gradio_api/file=", "/token"
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}

# What gradio's page asks for.
_FETCHED = re.compile(
    r"/|/theme\.css|/config|/favicon\.ico|/manifest\.json|/(assets|static)(/[\w.@-]+)+"
    r"|/gradio_api/(info|startup-events|upload_progress|queue/data|heartbeat/\w+)",
    re.ASCII,
)
_SENT = re.compile(r"/gradio_api/(upload|queue/join|run/predict|cancel|reset)", re.ASCII)

_REQUEST_HEADERS = {
    "host", "content-type", "content-length", "accept", "accept-encoding", "range", "if-range", "if-none-match",
    "if-modified-since", "user-agent",
}  # fmt: skip
_RESPONSE_HEADERS = {
    "content-type", "content-length", "content-encoding", "content-disposition", "content-range", "accept-ranges",
    "cache-control", "content-security-policy", "etag", "last-modified", "vary", "connection", "retry-after",
    "location", "set-cookie",
}  # fmt: skip

# gradio's page has scripts in it, compiles the scripts of its components, and loads media by blob: and data:.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'; "
    "object-src 'none'"
)
_ADDED_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=(), display-capture=()",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app
        What is guarded.
    own_routes
        Our routes, which are open beside those of gradio's page.
    uploads
        The folder of uploads.
    token
        If set, every request needs it; else the host must be a name of this machine.
    """

    def __init__(
        self, app: ASGIApp, *, own_routes: Sequence[BaseRoute], uploads: Uploads, token: str | None = None
    ) -> None:
        self._app = app
        self._own_routes = list(own_routes)
        self._uploads = uploads
        self._entry = None if token is None else Entry(token)
        self._uploading = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            _log_refusal(scope, "there are no websockets here")
            await send({"type": "websocket.close", "code": 1008})
            return
        replying = _Replying(send, scope["path"])
        try:
            await self._answer(scope, receive, replying)
        except Refusal as refusal:
            replying.refusal = refusal
        except Exception:
            if replying.refusal is None:
                _log.exception("an error while answering %s %s", scope["method"], _shown(scope["path"]))
                replying.refusal = Refusal(500, "this could not be answered")
        if (refused := replying.refusal) is not None:
            _log_refusal(scope, refused.message)
            if not replying.started:
                replying.refusal = None
                await _refused(refused, scope)(scope, receive, replying)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Replying") -> None:
        path = plain_path(scope.get("raw_path") or scope["path"].encode())
        headers = Headers(scope=scope)
        self._check_origin(scope["method"], path, headers)
        if self._entry is not None and await self._enters(self._entry, scope, path, receive, reply):
            return
        own = self._check_route(scope["method"], path, scope)
        passed = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") in _REQUEST_HEADERS]
        inner = {**scope, "path": path, "headers": passed}
        if path == "/":
            inner["query_string"] = b""  # gradio reads "deep_link" from it
        if scope["method"] in ("GET", "HEAD"):
            await self._app(inner, receive, reply)
        elif path == _UPLOAD and not own:
            await self._upload(inner, headers, receive, reply)
        else:
            body = await self._json_body(headers, receive)
            sizeless = [(name, value) for name, value in passed if name != b"content-length"]
            inner["headers"] = [*sizeless, (b"content-length", str(len(body)).encode())]
            await self._app(inner, _giving(body, receive), reply)

    # ------------------------------------------------------------------------------------------- who asks, and for what

    def _check_origin(self, method: str, path: str, headers: Headers) -> None:
        if sum(len(name) + len(value) for name, value in headers.raw) > _HEADER_BYTES:
            raise Refusal(431, "headers that are too long")
        host = headers.get("host", "").lower()
        if self._entry is None and re.sub(r":\d*$", "", host) not in _LOCAL_NAMES:
            raise Refusal(403, "another host: the page is at localhost, and elsewhere needs --host and a token")
        if headers.get("upgrade"):
            raise Refusal(400, "there are no websockets here")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Refusal(403, "sent by a page of another origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            # A link to the page may stand anywhere.
            linked = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            if not (linked and method == "GET" and path == "/"):
                raise Refusal(403, "sent by a page of another origin")

    def _check_route(self, method: str, path: str, scope: Scope) -> bool:
        """Whether it is one of ours; else it must be one of gradio's that the page needs."""
        found = [route.matches(scope)[0] for route in self._own_routes]
        if Match.FULL in found:
            return True
        if path.startswith(_FILE):
            if not self._uploads.holds(path.removeprefix(_FILE)):
                raise Refusal(404, "no file of the uploads")
            allowed = {"GET", "HEAD"}
        elif _FETCHED.fullmatch(path):
            allowed = {"GET", "HEAD"}
        elif _SENT.fullmatch(path):
            allowed = {"POST"}
        elif Match.PARTIAL in found:
            allowed = set()
        else:
            raise Refusal(404, "no route of the page")
        if method not in allowed:
            raise Refusal(405, "another method than the page uses")
        return False

    async def _enters(self, entry: Entry, scope: Scope, path: str, receive: Receive, reply: "_Replying") -> bool:
        """Whether this was about the token, and is answered. False if the request has the cookie."""
        headers, client = Headers(scope=scope), _client(scope)
        cookie = f"cmacc_app_{(scope.get('server') or ('', ''))[1]}"
        given = None
        if path == _TOKEN and scope["method"] == "POST":
            fields = parse_qs((await read_body(headers, receive, 10_000)).decode("utf-8", "replace"))
            given = fields.get("token", [""])[0]
        elif path == "/" and scope["method"] == "GET":
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [None])[0]
        if given is None:
            if entry.has_cookie(headers.get("cookie", ""), cookie):
                return False
            raise Refusal(401, "no token")
        if not entry.may_try(client):
            raise Refusal(429, "too many wrong tokens")
        if not entry.is_token(given, client):
            raise Refusal(403, "a wrong token")
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(cookie, entry.cookie, httponly=True, samesite="strict")
        await response(scope, receive, reply)
        return True

    # ----------------------------------------------------------------------------------------------------------- bodies

    async def _upload(self, scope: Scope, headers: Headers, receive: Receive, reply: "_Replying") -> None:
        if _KIND.match(headers.get("content-type", "")) is None:
            raise Refusal(415, "an upload must be multipart/form-data with a boundary")
        limit = self._uploads.max_upload_bytes + _FORM_BYTES
        check_length(headers, limit)
        try:
            async with asyncio.timeout(bodies.SILENT_SECONDS):
                await self._uploading.acquire()
        except TimeoutError:
            raise Refusal(503, "too many uploads at once") from None
        try:
            if not await asyncio.to_thread(self._uploads.make_room):
                raise Refusal(503, "the folder of uploads is full")
            reply.refused_by = bounded = Bounded(receive, limit)
            await self._app(scope, bounded, reply)
        finally:
            self._uploading.release()

    async def _json_body(self, headers: Headers, receive: Receive) -> bytes:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "what is sent must be JSON")
        try:
            sent = json.loads(
                (await read_body(headers, receive, _JSON_BYTES)).decode(),
                parse_constant=_no_constant,
                parse_float=_finite,
            )
        except (ValueError, RecursionError):
            raise Refusal(400, "what is sent must be JSON") from None
        self._check_files(sent, headers.get("host", ""))
        return json.dumps(sent).encode()

    def _check_files(self, sent: object, host: str) -> None:
        for found in _dicts(sent):
            path, url, name = (found.get(key) for key in ("path", "url", "orig_name"))
            if path is not None and not (isinstance(path, str) and self._uploads.holds(path)):
                raise Refusal(403, "names a file that is no upload")
            if url is not None and not (isinstance(url, str) and self._is_upload_url(url, host)):
                raise Refusal(403, "names an address that is no upload")
            if name is not None and not (isinstance(name, str) and not re.search(r"[/\\\0]", name)):
                raise Refusal(403, "names a file with a path")

    def _is_upload_url(self, url: str, host: str) -> bool:
        try:
            parts = urlsplit(url)
            path = plain_path(parts.path.encode("ascii"))
        except (ValueError, Refusal):
            return False
        here = (parts.scheme, parts.netloc) in (("", ""), ("http", host), ("https", host))
        return here and path.startswith(_FILE) and self._uploads.holds(path.removeprefix(_FILE))


_KIND = re.compile(r"multipart/form-data\s*;.*boundary=", re.IGNORECASE)


def plain_path(raw_path: bytes) -> str:
    """The path of a request, decoded once.

    Raises
    ------
    Refusal
        It is not in its plain form: parts that are empty or go up, an encoded slash, control characters, or a
        backslash.
    """
    try:
        path = unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        raise Refusal(404, "a path that is no text") from None
    encoded_slash = b"%2f" in raw_path.lower()
    if encoded_slash or not path.startswith("/") or re.search(r"[\\\x00-\x1f\x7f-\x9f]|//|/\.\.?(/|$)", path):
        raise Refusal(404, "a path that is not in its plain form")
    return path


def _dicts(sent: object) -> Iterator[dict[str, Any]]:
    """All objects within JSON."""
    level: list[Any] = [sent]
    for _ in range(_JSON_DEPTH):
        if not level:
            return
        yield from (one for one in level if isinstance(one, dict))
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for some in inside for one in some]
    raise Refusal(400, "JSON that is nested too deeply")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(digits)  # 1e400
    return number


def _no_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are no JSON


# ---------------------------------------------------------------------------------------------------------- in and out


def _giving(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return messages.pop() if messages else await receive()

    return give


class _Replying:
    """Sends a response with our headers, or nothing of it once the request is refused."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self.started = False
        self.refusal: Refusal | None = None
        self.refused_by: Bounded | None = None

    async def __call__(self, message: Message) -> None:
        if self.refused_by is not None and self.refused_by.refusal is not None:
            # gradio answers by itself what its reader of forms raises; the answer is ours.
            self.refusal, self.refused_by = self.refused_by.refusal, None
        if message["type"] == "http.response.start" and message["status"] == 500 and self._path == _UPLOAD:
            self.refusal = Refusal(400, "an upload that is no form of files")  # its reader checks little
        if self.refusal is not None:
            return
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": self._headers(message.get("headers", []))}
        await self._send(message)

    def _headers(self, given: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        kept = [(name.lower(), value) for name, value in given if name.lower().decode("latin-1") in _RESPONSE_HEADERS]
        added = dict(_ADDED_HEADERS)
        if not any(name == b"content-security-policy" for name, _ in kept):  # a page of ours may have a narrower one
            # An upload that is opened by itself must not act as a page of ours.
            added["content-security-policy"] = "sandbox" if self._path.startswith(_FILE) else _POLICY
        is_stored = any(name == b"cache-control" for name, _ in kept) and self._path not in ("/", "/config")
        if not is_stored and not self._path.startswith(("/assets/", "/static/")):
            kept = [(name, value) for name, value in kept if name != b"cache-control"]
            added["cache-control"] = "no-store"
        return [*kept, *((name.encode(), value.encode()) for name, value in added.items())]


def _refused(refusal: Refusal, scope: Scope) -> Response:
    asks = {401: "Open the address that cmacc app printed, or give the token here.", 403: "That is not the token."}
    is_page = scope["path"] in ("/", _TOKEN)
    if is_page and refusal.message in ("no token", "a wrong token", "too many wrong tokens"):
        message = asks.get(refusal.status, "Too many wrong tokens. Try again in a minute.")
        response: Response = HTMLResponse(entry_page(message), refusal.status)
    else:
        response = PlainTextResponse(f"refused: {refusal.message}\n", refusal.status)
    if refusal.status in (408, 413):
        response.headers["connection"] = "close"  # or the server would read all that is still sent
    if refusal.status in (429, 503):
        response.headers["retry-after"] = "60"
    return response


def _log_refusal(scope: Scope, reason: str) -> None:
    _log.warning(
        "refused %s %s %s: %s", _client(scope), scope.get("method", "WEBSOCKET"), _shown(scope["path"]), reason
    )


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else "?"


def _shown(text: str) -> str:
    """A part of a request for the log: no control characters, and not long."""
    return text.encode("unicode_escape").decode()[:200]
