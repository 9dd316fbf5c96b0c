"""No file can make the converter run anything, unpack without end, or fail otherwise than in words."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.clients import pickles
from steersman.steering.errors import PayloadTooLarge, UploadMalformed
from tests.clients.torch_files import rewritten
from tests.steering.foreign import DATA

WHOLE = (DATA / "vllm_hook.pt").read_bytes()
ROOT = Path(__file__).parents[2]


class Trap:
    """What a pickle may be: a call of anything. Opened, this one makes a folder."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def refused(file: Path, data: bytes, match: str | None = None) -> None:
    file.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(UploadMalformed, match=match):
        pickles.read(file)
    assert time.monotonic() - start < 5


def test_plain_files_are_read(file: Path) -> None:
    torch.save({"a": torch.arange(4.0), "b": 1, "c": None}, file)
    read = pickles.read(file)
    assert torch.equal(read.pop("a"), torch.arange(4.0))
    assert read == {"b": 1, "c": None}


@pytest.mark.parametrize("call", ["os.mkdir", "builtins.eval", "torch.load", "builtins.bytearray", "numpy.load"])
def test_nothing_outside_the_list_is_called(file: Path, tmp_path: Path, call: str) -> None:
    made = tmp_path / "made"
    module, name = call.rsplit(".", 1)
    function = getattr(__import__(module), name)
    torch.save({"dir": torch.ones(4), "x": Trap(function, str(made))}, file)
    refused(file, file.read_bytes(), match="which no file of a direction needs")
    assert not made.exists()
    # The trap works: whatever is refused here would have run.
    if call == "os.mkdir":
        torch.load(file, weights_only=False)
        assert made.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_unpacks_without_end_is_not_unpacked(file: Path, compression: int) -> None:
    """A block of these is unpacked whole, whatever size the archive states for it."""
    refused(file, rewritten(WHOLE, compression=compression), match="packed in a way")


def test_a_pickle_under_another_case_is_read_as_one(file: Path) -> None:
    """torch finds `DATA.PKL` where it looks for `data.pkl`."""
    out = io.BytesIO()
    trap = pickle.dumps(Trap(os.mkdir, "x"), protocol=2)
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            pickled = member.filename.endswith(".pkl")
            new.writestr(member.filename.replace("data.pkl", "DATA.PKL"), trap if pickled else old.read(member))
    refused(file, out.getvalue(), match="which no file of a direction needs")


def test_a_name_by_another_instruction_is_not_called(file: Path, tmp_path: Path) -> None:
    """STACK_GLOBAL, which pickles of protocol 4 have, is not among the names that were looked at."""
    made = tmp_path / "made"
    trap = pickle.dumps(Trap(os.mkdir, str(made)), protocol=4)
    torch.save(torch.ones(4), file)
    refused(file, rewritten(file.read_bytes(), lambda _: trap))
    assert not made.exists()


def test_plain_pickles_and_old_torch_files_are_no_zip_archives(file: Path) -> None:
    refused(file, pickle.dumps(torch.ones(4)))
    buffer = io.BytesIO()
    torch.save(torch.ones(4), buffer, _use_new_zipfile_serialization=False)
    refused(file, buffer.getvalue())


def test_members_that_unpack_to_more_than_the_file_are_refused(file: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(2**22), buffer)  # 16 MiB that pack into 16 KiB
    packed = rewritten(buffer.getvalue(), compression=zipfile.ZIP_DEFLATED)
    assert len(packed) < 2**17
    refused(file, packed, match="claim more than it holds")


def test_members_that_overlap_are_refused(file: Path) -> None:
    """Many entries of the directory for the same bytes: each is small, together they are not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(None))
        archive.writestr("x/data/0", bytes(2**16))
        info = archive.infolist()[-1]
        for i in range(1, 1000):
            copy = zipfile.ZipInfo(f"x/data/{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, field, getattr(info, field))
            archive.filelist.append(copy)
    refused(file, buffer.getvalue(), match="claim more than it holds")


def test_paths_in_an_archive_are_only_names(file: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../data.pkl", pickle.dumps(None, protocol=2))
        archive.writestr("../../out", b"x")
    refused(file, buffer.getvalue())
    assert list(tmp_path.iterdir()) == [file]


def test_what_claims_to_be_larger_than_its_data_is_refused(file: Path) -> None:
    torch.save(torch.ones(1).expand(2**40), file)  # a view with stride 0: 4 TiB of one number
    refused(file, file.read_bytes(), match="larger than its data")


def test_what_refers_to_itself_a_million_times_over_is_refused(file: Path) -> None:
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"dir": bomb}, file)
    refused(file, file.read_bytes(), match="holds a list")
    loop: dict[str, Any] = {}
    loop["dir"] = loop
    torch.save(loop, file)
    refused(file, file.read_bytes(), match="holds a dict")


def test_long_pickles_and_large_files_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"dir": "x" * (pickles.MAX_PICKLE + 1)}, file)
    refused(file, file.read_bytes(), match="at most 1 MiB")
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    with pytest.raises(PayloadTooLarge):
        pickles.read(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00O8"),  # an array of objects
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00f8"),  # twice the bytes that are there
        (b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"),
        (b"K\x10\x85", b"K\x11\x85"),  # 17 of 16 numbers
    ],
)
def test_an_array_is_what_it_says(file: Path, old: bytes, new: bytes) -> None:
    changed = rewritten(WHOLE, lambda raw: raw.replace(old, new))
    assert changed != rewritten(WHOLE)
    refused(file, changed)


@settings(max_examples=80, deadline=None)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_truncated_files_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    refused(tmp_path_factory.mktemp("cut") / "x.pt", WHOLE[:length])


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 2**20), bits=st.integers(1, 255), inside=st.booleans())
def test_a_changed_byte_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, at: int, bits: int, inside: bool
) -> None:
    """`inside`: of the pickle, behind a checksum that fits."""

    def flip(raw: bytes) -> bytes:
        where = at % len(raw)
        return raw[:where] + bytes([raw[where] ^ bits]) + raw[where + 1 :]

    path = tmp_path_factory.mktemp("flip") / "x.pt"
    path.write_bytes(rewritten(WHOLE, flip) if inside else flip(WHOLE))
    with contextlib.suppress(UploadMalformed):
        pickles.read(path)


def test_no_part_of_the_server_can_open_a_pickle() -> None:
    """Neither by its code nor by what it imports."""
    words = ("torch.load(", "pickle.load", "allow_pickle=True", "weights_only=False", "import pickle", "joblib")
    sources = [p for folder in ("server", "steering", "kernels") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        text = path.read_text().replace("safetensors.torch.load(", "")
        assert not [word for word in words if word in text], path
    modules = "steersman.server.cli, steersman.server.routes.assets, steersman.steering.formats.uploads"
    code = f"import sys, {modules}; sys.exit('steersman.clients.pickles' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
