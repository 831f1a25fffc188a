"""The token that clients must send, where the service asks for one."""

from __future__ import annotations

import hmac

from .protocol import Invalid


def check(authorization: str | None, token: bytes | None) -> None:
    """Raise Invalid with status 401 unless `authorization` is `Bearer TOKEN`, compared in constant time."""
    if token is None:
        return
    scheme, _, offered = (authorization or "").partition(" ")
    given = offered.strip().encode("utf-8", "replace")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given, token):
        raise Invalid("unauthorized", "a token is needed: send the header 'Authorization: Bearer TOKEN'", 401)
