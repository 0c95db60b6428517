"""Who may enter, where a token is set: the token once, then a cookie.

The cookie is a secret of its own, made at each start. Browsers send it to every port of a host, and wrong ones are not
counted: it must not tell the token, nor be as short as a token that a person made up.
"""

import secrets
import time
from collections import deque
from http.cookies import CookieError, SimpleCookie

_TRIES, _TRIES_SECONDS = 10, 60.0

# With no-referrer, as on all other pages, a browser would send the form with "Origin: null".
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="strict-origin"><title>cmacc</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 24rem; margin: 15vh auto 0; padding: 0 1rem }}
h1 {{ font-size: 1.25rem }}
input, button {{ font: inherit; padding: .4rem .6rem; box-sizing: border-box; width: 100%; margin-top: .5rem }}
</style></head><body><main><h1>This page needs a token</h1>
<p>{message}</p>
<form method="post" action="/token"><label>Token
<input type="password" name="token" autocomplete="off" required autofocus></label><button>Open</button></form>
</main></body></html>
"""


def entry_page(message: str) -> str:
    """The page that asks for the token. ``message`` is text of ours, never of a request."""
    return _PAGE.format(message=message)


class Entry:
    """Checks a token, and the cookie that was given for it."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self.cookie = secrets.token_urlsafe(32)
        self._wrong: deque[tuple[float, str]] = deque(maxlen=1000)

    def may_try(self, address: str) -> bool:
        """Whether an address has not been wrong ten times within a minute."""
        since = time.monotonic() - _TRIES_SECONDS
        return sum(when > since and who == address for when, who in self._wrong) < _TRIES

    def is_token(self, given: str, address: str) -> bool:
        """Whether this is the token; remembers that it is not."""
        right = secrets.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)
        if not right:
            self._wrong.append((time.monotonic(), address))
        return right

    def has_cookie(self, header: str, name: str) -> bool:
        """Whether a Cookie header holds our cookie."""
        try:
            cookie = SimpleCookie(header).get(name)
        except CookieError:
            return False
        return cookie is not None and secrets.compare_digest(cookie.value.encode(), self.cookie.encode())
