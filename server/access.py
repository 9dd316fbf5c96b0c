"""Who may change what the server keeps."""

from __future__ import annotations

import hmac

from fastapi import Request

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
