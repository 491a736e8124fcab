"""Who may ask: the token, the loopback rule, Host and Origin, and what every answer says to browsers."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from flask import Request, Response, request

from .problems import Problem

# Probes come by address, and learn one word.
OPEN_TO_ALL = ("service.healthz", "service.readyz")

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.\-_]+)(?::[0-9]{1,5})?")
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Gate:
    """Looks at each request before its route does.

    Args:
        token: what clients have to show; None lets in whoever is on this machine.
        admin_token: opens everything, `/shutdown` too.
        hosts: names that a request may call us by; without a port.
        insecure: without a token, let in others as well.
    """

    def __init__(self, token: str | None, admin_token: str, hosts: Collection[str], insecure: bool) -> None:
        self._token = token
        self._admin_token = admin_token
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts)
        self._insecure = insecure

    def check(self) -> None:
        """Raise the `Problem` of the request that is being handled, if it has one."""
        if request.endpoint in OPEN_TO_ALL:
            return
        self._check_host(request)
        self._check_origin(request)
        if self._token is None:
            self._check_address(request)
        elif not self._shows(request, self._token, self._admin_token):
            raise _unauthorized("This service wants its token: Authorization: Bearer …")

    def check_admin(self) -> None:
        """As `check`, for the routes of the administrator."""
        if not self._shows(request, self._admin_token):
            raise _unauthorized("This route wants the admin token: Authorization: Bearer …")

    def _check_host(self, request: Request) -> None:
        # A page of a stranger whose name was made to point here (DNS rebinding) says its own name.
        found = _HOST.fullmatch(request.headers.get("Host", ""))
        if found is None or ("*" not in self._hosts and found[1].lower().strip("[]") not in self._hosts):
            detail = "This service does not go by that name: add it to MICROBATCH_ALLOWED_HOSTS."
            raise Problem(403, "foreign-host", detail)

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("Origin")
        is_foreign = origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("Host", "").lower()
        # A link to here on another site's page is followed; its scripts, forms and images are not answered.
        fetch, mode = request.headers.get("Sec-Fetch-Site"), request.headers.get("Sec-Fetch-Mode")
        if is_foreign or (fetch == "cross-site" and mode != "navigate"):
            raise Problem(403, "foreign-origin", "Pages of other sites may not call this service.")

    def _check_address(self, request: Request) -> None:
        # A proxy on this machine is no reason to trust whom it speaks for.
        is_forwarded = any(name in request.headers for name in _FORWARDED)
        if not self._insecure and (is_forwarded or not is_loopback(request.remote_addr or "127.0.0.1")):
            detail = "Without a token this service answers its own machine only: set MICROBATCH_TOKEN."
            raise Problem(403, "not-local", detail)

    def _shows(self, request: Request, *tokens: str) -> bool:
        shown = _shown_token(request).encode()
        # All of them, always: the time tells nothing about which one is nearly right.
        matches = [hmac.compare_digest(shown, token.encode()) for token in tokens]
        return any(matches)


def harden(response: Response) -> Response:
    """What a browser should not do with *response*; a page with a policy of its own keeps it."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def is_loopback(address: str) -> bool:
    """Whether only this machine gets there."""
    if address.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _shown_token(request: Request) -> str:
    """Bearer, or the password of Basic, which browsers can ask for."""
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _unauthorized(detail: str) -> Problem:
    # Both: programs use the first, and a browser that shows the page asks its user for the second.
    headers = {"WWW-Authenticate": 'Bearer realm="microbatch", Basic realm="microbatch", charset="UTF-8"'}
    return Problem(401, "unauthorized", detail, headers=headers)
