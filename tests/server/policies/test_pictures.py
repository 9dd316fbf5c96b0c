"""Pictures from outside: what is taken, and that the rest is refused before it is unpacked."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steersman.server.policies.pictures import Limits, picture
from steersman.steering.errors import InvalidRequest, PayloadTooLarge
from tests.server.robots import SCENE, file_of, text_of

LIMITS = Limits(bytes=1 << 20, pixels=16_000_000)


def png(header: tuple[int, ...], *chunks: tuple[bytes, bytes]) -> bytes:
    """``header``: width, height, bits, kind of colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of 60 bytes whose header claims any size."""
    return png((width, height, 8, 2), (b"IDAT", zlib.compress(b"")))


PIXEL = (b"IDAT", zlib.compress(bytes(2)))


@pytest.mark.parametrize("given", [SCENE, file_of(SCENE), text_of(SCENE)])
def test_an_array_a_file_and_base64_are_the_same_picture(given: Any) -> None:
    np.testing.assert_array_equal(picture(given, LIMITS, "x"), SCENE)


def test_a_jpeg_is_the_picture_nearly() -> None:
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    assert np.abs(picture(text_of(flat, "JPEG"), LIMITS, "x").astype(int) - flat).max() <= 4


def test_grey_and_transparent_files_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(picture(file_of(grey), LIMITS, "x"), np.repeat(grey[..., None], 3, 2))
    clear = np.dstack([SCENE, np.zeros(SCENE.shape[:2], np.uint8)])
    np.testing.assert_array_equal(picture(file_of(clear), LIMITS, "x"), SCENE)


def test_a_camera_that_says_how_it_was_held() -> None:
    about = Image.Exif()
    about[274] = 6  # turned by a quarter
    for kind in ("PNG", "JPEG"):
        out = io.BytesIO()
        Image.fromarray(np.full((16, 8, 3), (200, 30, 90), np.uint8)).save(out, kind, exif=about)
        assert picture(out.getvalue(), LIMITS, "x").shape == (8, 16, 3)


def test_a_jpeg_of_a_few_bytes_must_not_take_hours() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32), 90, np.uint8)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert picture(whole[:-2] + last * 9 + whole[-2:], LIMITS, "x").shape == (32, 32, 3)
    with pytest.raises(InvalidRequest, match="more than 50 scans"):
        picture(whole[:-2] + last * 50 + whole[-2:], LIMITS, "x")


def test_one_pixel_is_a_picture() -> None:
    one = np.array([[[1, 2, 3]]], np.uint8)
    for given in (one, text_of(one)):
        np.testing.assert_array_equal(picture(given, LIMITS, "x"), one)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (SCENE.astype(np.float32), "uint8 from 0 to 255, not of float32"),
        (SCENE.astype(np.int64), "not of int64"),
        (SCENE[0], r"\[height, width, 3\], not \[6, 3\]"),
        (SCENE.transpose(2, 0, 1), r"not \[3, 4, 6\]"),
        (SCENE[None], r"not \[1, 4, 6, 3\]"),
        (SCENE[:0], r"not \[0, 6, 3\]"),
        ("not base64!", "in base64"),
        ("AAAA", "cannot be read as PNG or JPEG"),
        (base64.b64encode(file_of(SCENE, "GIF")).decode(), "cannot be read as PNG or JPEG"),
        (file_of(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:-600], "cannot be read"),
        (b"", "cannot be read"),
        (png_that_says(0, 5), "cannot be read"),
        (png((1, 1, 8, 0), PIXEL, (b"iCCP", b"x")), "cannot be read"),  # PIL: IndexError
        (png((1, 1, 8, 3), (b"tRNS", b"\0"), PIXEL), "cannot be read"),  # no table of colours: AssertionError
        (file_of(SCENE[:, :, 0].astype(np.uint16) * 900), "has 16 bits"),
        (None, "in base64, or a uint8 array"),
        (7, "in base64, or a uint8 array"),
        ({"url": "http://x"}, "in base64, or a uint8 array"),
    ],
)
def test_what_is_no_picture(given: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as error:
        picture(given, LIMITS, "images.front")
    assert (error.value.status, error.value.param) == (400, "images.front")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (np.zeros((4320, 7680, 3), np.uint8), "7680×4320 pixels; at most 16 million"),
        (png_that_says(7680, 4320), "7680×4320 pixels"),
        (png_that_says(2**31 - 1, 2**31 - 1), "pixels; at most 16 million"),
        (b"\x89PNG" + bytes(1 << 20), "larger than 1 MiB"),
        ("A" * (2 << 20), "larger than 1 MiB"),
    ],
)
def test_what_is_too_large(given: Any, complaint: str) -> None:
    with pytest.raises(PayloadTooLarge, match=complaint) as error:
        picture(given, LIMITS, "image")
    assert (error.value.status, error.value.param) == (413, "image")
