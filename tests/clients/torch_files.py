"""Files as `torch.save` writes them, with something in them changed."""

import io
import zipfile
from collections.abc import Callable

Change = Callable[[bytes], bytes]


def rewritten(data: bytes, pickle: Change = lambda raw: raw, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with another pickle, or packed in another way."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for member in old.infolist():
            raw = old.read(member)
            new.writestr(member.filename, pickle(raw) if member.filename.endswith(".pkl") else raw)
    return out.getvalue()
