"""A small Python client of Steersman's own routes; chat and completions go through the ``openai`` package as ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from steersman.clients.activations import Capture


class SteersmanError(Exception):
    """An error body of the server. ``code`` is stable, ``param`` the JSON path of the bad field."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


class Steersman:
    """``Steersman("http://localhost:8000")``; keys as the server was started with them."""

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = keys(api_key, admin_key)
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Steersman:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """Layers, sites and widths that the server can steer."""
        return self._json("GET", "/v1/steering/model")

    def served_model(self) -> str:
        """The name that requests give as ``model``."""
        return str(self._json("GET", "/v1/models")["data"][0]["id"])

    def assets(self, **filters: str) -> list[dict[str, Any]]:
        """Stored assets, filtered by ``kind``, ``model`` and ``text``."""
        found: list[dict[str, Any]] = self._json("GET", "/v1/steering/assets", params=filters)["data"]
        return found

    def asset(self, ref: str) -> dict[str, Any]:
        """An asset's metadata and provenance."""
        return self._json("GET", _path(ref))

    def download(self, ref: str, format: str = "safetensors") -> bytes:
        """The whole asset as ``safetensors``, ``gguf`` or ``json``."""
        return self._request("GET", _path(ref), params={"format": format}).content

    def upload(self, file: Path, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Adds a safetensors or GGUF file with its metadata, or a JSON file that holds a whole asset."""
        if file.suffix == ".json":
            if metadata is not None:
                raise ValueError("a JSON file holds its own metadata")
            headers = {"content-type": "application/json"}
            return self._json("POST", "/v1/steering/assets", content=file.read_bytes(), headers=headers)
        fields = {} if metadata is None else {"metadata": json.dumps(metadata)}
        return self._json("POST", "/v1/steering/assets", files={"file": file.read_bytes()}, data=fields)

    def add(self, asset: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a whole asset given as a JSON object, its tensors in base64."""
        return self._json("POST", "/v1/steering/assets", json=dict(asset))

    def delete(self, ref: str) -> list[str]:
        removed: list[str] = self._json("DELETE", _path(ref))["removed"]
        return removed

    def default(self) -> dict[str, Any] | None:
        """The server's default profile, None when it has none."""
        found: dict[str, Any] | None = self._json("GET", "/v1/steering/default")["steering"]
        return found

    def set_default(self, steering: Mapping[str, Any] | None) -> None:
        """Sets the server's default profile; None leaves it without one."""
        if steering is None:
            self._request("DELETE", "/v1/steering/default")
        else:
            self._request("PUT", "/v1/steering/default", json=dict(steering))

    def resolve(self, steering: Mapping[str, Any], **prompt: Any) -> dict[str, Any]:
        """A dry run, for ``messages=[...]`` or ``prompt=...``."""
        return self._json("POST", "/v1/steering/resolve", json={"steering": steering, **prompt})

    def norms(self) -> list[dict[str, Any]]:
        """What norms each worker has seen at each layer: ``worker``, ``count``, ``mean`` and ``square`` of ln‖x‖."""
        found: list[dict[str, Any]] = self._json("GET", "/v1/steering/norms")["data"]
        return found

    def submit(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Queues a job, ``{"kind": "extract" or "calibrate", ...}``; what it is then, with its ``id``."""
        return self._json("POST", "/v1/steering/jobs", json=dict(job))

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that the server remembers, the newest first."""
        found: list[dict[str, Any]] = self._json("GET", "/v1/steering/jobs")["data"]
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/steering/jobs/{quote(job_id, safe='')}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ends a job; what it is then."""
        return self._json("DELETE", f"/v1/steering/jobs/{quote(job_id, safe='')}")

    def capture(self, prompts: Sequence[Any], **asked: Any) -> Capture:
        """Activations of the served model for ``prompts``: texts, lists of token ids, or lists of chat messages.

        ``asked``: ``sites``, ``layers``, ``tokens``, ``reduce`` (none, mean or last) and ``steering``, as in
        ``POST /v1/steering/captures``.
        """
        body = {"prompts": list(prompts), **asked}
        return Capture.from_bytes(self._request("POST", "/v1/steering/captures", json=body).content)

    def keep_capture(self, prompts: Sequence[Any], **asked: Any) -> dict[str, Any]:
        """The same, kept on the server: its ``id`` and what it is of."""
        return self._json("POST", "/v1/steering/captures", json={"prompts": list(prompts), **asked, "keep": True})

    def kept_captures(self) -> list[dict[str, Any]]:
        """What the server keeps."""
        found: list[dict[str, Any]] = self._json("GET", "/v1/steering/captures")["data"]
        return found

    def kept_capture(self, capture_id: str) -> Capture:
        return Capture.from_bytes(self._request("GET", f"/v1/steering/captures/{quote(capture_id, safe='')}").content)

    def forget_capture(self, capture_id: str) -> None:
        self._request("DELETE", f"/v1/steering/captures/{quote(capture_id, safe='')}")

    def chat(self, messages: list[dict[str, Any]], steering: Mapping[str, Any] | None = None, **body: Any) -> Any:
        """One chat completion, as JSON."""
        asked = {"messages": messages, **body} | ({"steering": steering} if steering is not None else {})
        return self._json("POST", "/v1/chat/completions", json=asked)

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._request(method, path, **kwargs).json()
        return found

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            if method != "GET":
                raise
            # The server has closed a kept connection just as it was used again; to ask twice changes nothing.
            response = self._http.request(method, path, **kwargs)
        if response.status_code < 400:
            return response
        raise error_of(response)


def keys(api_key: str | None = None, admin_key: str | None = None) -> dict[str, str]:
    """The headers that carry them."""
    given = {"Authorization": f"Bearer {api_key}" if api_key else None, "X-Admin-Key": admin_key}
    return {name: value for name, value in given.items() if value}


def error_of(response: httpx.Response) -> SteersmanError:
    """What a failed answer says; not every answer is the server's own."""
    try:
        error = response.json()["error"]
        return SteersmanError(response.status_code, error["message"], error.get("code"), error.get("param"))
    except (ValueError, KeyError, TypeError):
        return SteersmanError(response.status_code, response.text[:500])


def _path(ref: str) -> str:
    return f"/v1/steering/assets/{quote(ref, safe='@')}"
