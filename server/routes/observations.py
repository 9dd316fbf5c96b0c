"""What robots send, read into observations: our own form, OpenVLA's, openpi's. Errors name the client's own field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from steersman.clients import arrays
from steersman.server.policies.pictures import Limits, picture
from steersman.server.policies.policy import Floats, Observation
from steersman.steering.errors import InvalidRequest, NonFinite, UnknownField

OURS = ("images", "instruction", "state", "unnorm_key", "seed", "steering")
OPENVLA = ("image", "instruction", "unnorm_key", "steering")
CAMERAS = (  # openpi's names, those that see the whole scene first
    *("observation/image", "observation/exterior_image_1_left", "base_rgb", "image"),
    *("observation/wrist_image", "observation/wrist_image_left", "wrist_rgb", "wrist_image"),
)
STATES = (  # openpi's names; those of one robot are joined
    ("observation/state",),
    ("state",),
    ("observation/joint_position", "observation/gripper_position"),
    ("joints", "gripper"),
)


@dataclass(frozen=True)
class Defaults:
    """What holds for observations that do not say it themselves."""

    steering: Any = None
    unnorm_key: str | None = None

    @classmethod
    def from_query(cls, query: Iterable[tuple[str, str]]) -> Defaults:
        """``?steering=<JSON>``, or ``?profile=<name>`` for short, and ``?unnorm_key=<name>``."""
        given: dict[str, str] = {}
        for name, value in query:
            if name not in ("steering", "profile", "unnorm_key"):
                raise UnknownField("the query may have steering, profile and unnorm_key", name)
            if name in given:
                raise InvalidRequest("is given twice", name)
            given[name] = value
        if "steering" in given and "profile" in given:
            raise InvalidRequest("give either steering or profile", "profile")
        steering: Any = {"profile": given["profile"]} if "profile" in given else None
        if "steering" in given:
            try:
                steering = json.loads(given["steering"])
            except (ValueError, RecursionError):
                raise InvalidRequest("must be the steering object as JSON", "steering") from None
        return cls(steering, given.get("unnorm_key"))

    def changed(self, given: Any) -> Defaults:
        """With what a client's ``session`` message says in place."""
        about = _object(given, "session", ("steering", "unnorm_key"))
        found = self
        if "steering" in about:
            found = replace(found, steering=_plain(about["steering"], "session.steering"))
        if "unnorm_key" in about:
            found = replace(found, unnorm_key=_text(about, "unnorm_key", "session.unnorm_key"))
        return found


@dataclass(frozen=True)
class Asked:
    observation: Observation
    steering: Any = None
    ignored: tuple[str, ...] = ()  # what nobody reads


def ours(body: bytes, kind: str, limits: Limits, cameras: int) -> Asked:
    """The body of ``/v1/actions``: JSON with pictures in base64, or msgpack with arrays or files."""
    if kind in ("application/msgpack", "application/x-msgpack"):
        data = unpacked(body, "body")
    elif kind in ("application/json", ""):
        data = _json(body, "body")
    else:
        raise InvalidRequest("must be application/json or application/msgpack", "content-type")
    data = _object(data, "", OURS)
    given = data.get("images", {})
    if isinstance(given, list):
        named = {f"images[{i}]": value for i, value in enumerate(given)}
    elif isinstance(given, dict):
        named = {f"images.{name}": value for name, value in given.items()}
    else:
        raise InvalidRequest("must be a list of pictures, or an object of them by name", "images")
    if len(named) != cameras:
        raise InvalidRequest(f"this policy takes {cameras} of them, not {len(named)}", "images")
    pictures = {path: picture(value, limits, path) for path, value in named.items()}
    state = _numbers(data["state"], "state") if data.get("state") is not None else None
    return Asked(
        Observation(pictures, _instruction(data, "instruction"), state, _text(data, "unnorm_key"), _seed(data)),
        _plain(data.get("steering"), "steering"),
    )


def openvla(body: bytes, limits: Limits, cameras: int, defaults: Defaults) -> tuple[Asked, bool]:
    """The body of ``/act``, and whether it was JSON within JSON."""
    data = _json(body, "body")
    twice = isinstance(data, dict) and "encoded" in data
    if twice:
        if len(data) != 1 or not isinstance(data["encoded"], str):
            raise InvalidRequest("must be the whole payload as a JSON string, alone", "encoded")
        data = _json(data["encoded"], "encoded")
    data = _object(data, "", OPENVLA)
    if cameras != 1:
        raise InvalidRequest(f"this route takes one picture, this policy {cameras}: use /v1/actions", "image")
    if "image" not in data:
        raise InvalidRequest("is missing", "image")
    pictures = {"image": picture(data["image"], limits, "image")}
    key = _key(data, defaults)
    steering = _plain(data["steering"], "steering") if "steering" in data else defaults.steering
    return Asked(Observation(pictures, _instruction(data, "instruction"), None, key), steering), twice


def openpi(data: Any, limits: Limits, cameras: int, defaults: Defaults) -> Asked:
    """One unpacked observation of openpi's clients. What a policy does not read is told back, not refused."""
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise InvalidRequest("an observation is a dictionary with names as keys")
    chosen = [name for name in CAMERAS if name in data][:cameras]
    if len(chosen) < cameras:
        raise InvalidRequest(f"this policy takes {cameras} pictures, named {', '.join(CAMERAS)}", "observation/image")
    pictures = {name: picture(data[name], limits, name) for name in chosen}
    names = next((names for names in STATES if all(name in data for name in names)), ())
    state = np.concatenate([_numbers(_row(data[name]), name) for name in names]) if names else None
    key = _key(data, defaults)
    steering = _plain(data["steering"], "steering") if "steering" in data else defaults.steering
    read = {*chosen, *names, "prompt", "unnorm_key", "seed", "steering"}
    ignored = tuple(name[:100] for name in data if name not in read)
    return Asked(Observation(pictures, _instruction(data, "prompt"), state, key, _seed(data)), steering, ignored)


def _row(given: Any) -> Any:
    """A gripper's position may be a number of its own, as openpi's DROID policy takes it."""
    return [given] if isinstance(given, int | float | np.generic) or getattr(given, "ndim", 1) == 0 else given


def unpacked(body: bytes, path: str) -> Any:
    try:
        return arrays.unpack(body)
    except ValueError as error:
        raise InvalidRequest(str(error)[:300], path) from None


def _json(text: str | bytes, path: str) -> Any:
    try:
        return arrays.from_json(text)
    except ValueError as error:
        raise InvalidRequest(f"is not JSON of the form wanted: {str(error)[:300]}", path) from None


def _object(data: Any, path: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidRequest(f"must be an object with {', '.join(known)}", path or "body")
    for name in data:
        if name not in known:
            field = f"{path}.{name}" if path else str(name)
            raise UnknownField(f"nobody reads this; known are {', '.join(known)}", field[:200])
    return data


def _instruction(data: Mapping[str, Any], name: str) -> str:
    found = _text(data, name)
    if not found or not found.strip():
        raise InvalidRequest("must be text that says what to do", name)
    return found


def _key(data: Mapping[str, Any], defaults: Defaults) -> str | None:
    found = _text(data, "unnorm_key")
    return defaults.unnorm_key if found is None else found


def _seed(data: Mapping[str, Any]) -> int | None:
    found = data.get("seed")
    if found is not None and (type(found) is not int or not 0 <= found < 2**63):
        raise InvalidRequest("must be an integer from 0 to 2^63 - 1", "seed")
    return found


def _text(data: Mapping[str, Any], name: str, path: str | None = None) -> str | None:
    found = data.get(name)
    if found is not None and not isinstance(found, str):
        raise InvalidRequest("must be text", path or name)
    try:
        (found or "").encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can spell and no tokenizer takes
        raise InvalidRequest("must be Unicode text", path or name) from None
    return found


def _numbers(given: Any, path: str) -> Floats:
    """``given``: an array of one dimension, or a list of numbers."""
    try:
        found = np.array(given)
    except ValueError:
        found = np.empty((0, 0))
    if found.dtype.kind not in "iuf" or found.ndim != 1 or not 0 < found.size <= 1024:
        raise InvalidRequest("must be a list of numbers, at most 1024", path)
    out: Floats = found.astype(np.float64)
    if not np.isfinite(out).all():
        raise NonFinite("must be finite numbers", path)
    return out


def _plain(given: Any, path: str) -> Any:
    """What msgpack may hold and JSON does not is refused here: the steering object's own errors speak of JSON."""
    try:
        return json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest("must be the steering object, of plain values", path) from None
