"""Who may change what the server keeps, and which robots may ask for actions."""

from __future__ import annotations

import hmac
import os

from fastapi import Request
from starlette.requests import HTTPConnection

from steersman.server.state import state_of
from steersman.steering.errors import Unauthorized


async def admin(request: Request) -> None:
    """Passes without an admin key set, or with it as ``Authorization: Bearer`` or ``X-Admin-Key``."""
    key = state_of(request.app).settings.admin_key
    if key is None:
        return
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = request.headers.get("x-admin-key") or (bearer if scheme.lower() == "bearer" else "")
    if not hmac.compare_digest(given.encode("latin-1"), key.encode()):  # a header is bytes, shown as Latin-1
        raise Unauthorized("this changes the server and needs the admin key (--steering-admin-key)", "x-admin-key")


def robot(connection: HTTPConnection) -> None:
    """Passes without an API key set, or with one as ``Authorization: Api-Key`` (openpi's way) or ``Bearer``.

    vLLM checks its keys (``--api-key``, ``VLLM_API_KEY``) under ``/v1`` only.
    """
    given = getattr(getattr(connection.app.state, "args", None), "api_key", None)
    keys = [key for key in given or [os.environ.get("VLLM_API_KEY")] if key]
    if not keys:
        return
    scheme, _, told = connection.headers.get("authorization", "").partition(" ")
    known = scheme.lower() in ("api-key", "bearer")
    if not known or not any(hmac.compare_digest(told.encode("latin-1"), key.encode()) for key in keys):
        raise Unauthorized("give the server's key as Authorization: Api-Key KEY", "authorization")
