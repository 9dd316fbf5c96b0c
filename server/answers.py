"""JSON answers. They are ASCII: what a client sent is quoted in them, and need not be valid Unicode."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse, Response

from steersman.steering.errors import SteeringError


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def failure(error: SteeringError) -> Response:
    """OpenAI's error body, with the error's status."""
    return Json(error.body(), error.status)
