"""Pictures from outside: PNG, JPEG or raw arrays, checked before they are unpacked."""

from __future__ import annotations

import base64
import binascii
import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from steersman.server.policies.policy import Picture
from steersman.steering.errors import InvalidRequest, PayloadTooLarge, SteeringError

FORMATS = ("PNG", "JPEG")
SCANS = 50  # of a JPEG; cameras' have 1, progressive ones about 10. Each is a pass over the whole picture


@dataclass(frozen=True)
class Limits:
    bytes: int  # of one picture as it was sent
    pixels: int  # of one picture


def picture(given: Any, limits: Limits, path: str) -> Picture:
    """``given``: a uint8 array [height, width, 3], the bytes of a PNG or JPEG file, or these in base64.

    Raises InvalidRequest or PayloadTooLarge, naming ``path``.
    """
    if isinstance(given, np.ndarray):
        return _array(given, limits, path)
    if isinstance(given, str):
        if len(given) > limits.bytes * 4 // 3 + 4:
            raise _too_large(limits, path)
        try:
            given = base64.b64decode(given, validate=True)
        except (ValueError, binascii.Error):
            raise InvalidRequest("must be a PNG or JPEG file in base64", path) from None
    if not isinstance(given, bytes):
        raise InvalidRequest("must be a PNG or JPEG file in base64, or a uint8 array [height, width, 3]", path)
    return _file(given, limits, path)


def _array(given: np.ndarray[Any, Any], limits: Limits, path: str) -> Picture:
    if given.dtype != np.uint8:
        raise InvalidRequest(f"must be an array of uint8 from 0 to 255, not of {given.dtype}", path)
    if given.ndim != 3 or given.shape[2] != 3 or not given.size:
        raise InvalidRequest(f"must be an array [height, width, 3], not {list(given.shape)}", path)
    _check_pixels(given.shape[1], given.shape[0], limits, path)
    return given


def _file(data: bytes, limits: Limits, path: str) -> Picture:
    if len(data) > limits.bytes:
        raise _too_large(limits, path)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, limits, path)
            if image.mode.startswith("I"):  # the conversion would cut these to 255
                raise InvalidRequest("has 16 bits for each pixel; send 8", path)
            if image.format != "PNG" and data.count(b"\xff\xda") > SCANS:
                raise InvalidRequest(f"has more than {SCANS} scans; no camera writes so many", path)
            image.load()
            with suppress(Exception):  # as vLLM does with the pictures of a chat
                ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image.convert("RGB"))
    except SteeringError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("too many", limits, path) from None
    except Exception as error:  # PIL has no error of its own for broken files: IndexError and AssertionError are known
        raise InvalidRequest(f"cannot be read as PNG or JPEG: {str(error)[:200]}", path) from None


def _check_pixels(width: int, height: int, limits: Limits, path: str) -> None:
    if width * height > limits.pixels:
        raise _too_many_pixels(f"{width}×{height}", limits, path)


def _too_large(limits: Limits, path: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"is larger than {limits.bytes >> 20} MiB (--steering-max-image-mb)", path)


def _too_many_pixels(size: str, limits: Limits, path: str) -> PayloadTooLarge:
    limit = limits.pixels / 1e6
    return PayloadTooLarge(f"has {size} pixels; at most {limit:g} million (--steering-max-image-megapixels)", path)
