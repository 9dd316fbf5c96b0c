"""``/v1/steering/assets``: list, upload, fetch and delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from steersman.server import inventory
from steersman.server.access import admin
from steersman.server.answers import Json, dumps
from steersman.server.engine.frontend import DEFAULT_NAME, Frontend
from steersman.server.features import active_on as active_features
from steersman.server.state import state_of
from steersman.steering import assets as kinds
from steersman.steering import spec
from steersman.steering.assets import Asset, DictionaryMeta, ProfileMeta
from steersman.steering.errors import (
    AssetInUse,
    AssetKindMismatch,
    InvalidRequest,
    PayloadTooLarge,
    UploadMalformed,
    located,
)
from steersman.steering.formats import gguf, native, uploads
from steersman.steering.labels import Labelled, Labels
from steersman.steering.rows import RowFile
from steersman.steering.store import AssetInfo, Store, parse_ref

MAX_WHOLE = 64 << 20  # bytes of a file on disk that is turned into another format, in memory
_MAX_METADATA = 16 << 20  # bytes: it may hold the labels of a large dictionary
router = APIRouter(prefix="/v1/steering/assets")
Filter = Annotated[str | None, Query()]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]


@router.get("")
async def list_assets(raw: Request, kind: Filter = None, model: Filter = None, text: Filter = None) -> Response:
    """Stored assets, newest versions first, filtered by kind, model and words of their descriptions."""
    if kind is not None and kind not in kinds.KINDS:
        raise InvalidRequest(f"unknown kind; wanted: {', '.join(kinds.KINDS)}", "kind")
    store = state_of(raw.app).frontend.store
    found = await asyncio.to_thread(store.list, kind, model, text)
    return Json({"object": "list", "data": [describe(info) for info in found]})


@router.post("", dependencies=[Depends(admin)])
async def upload(raw: Request) -> Response:
    """Adds an asset: JSON, or a multipart file (safetensors, GGUF) with the metadata as the part ``metadata``."""
    content = raw.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content == "application/json":
        body = await raw.body()
        asset = await asyncio.to_thread(native.from_json, body)
    elif content == "multipart/form-data":
        asset = await _multipart(raw)
    else:
        raise UploadMalformed("send application/json or multipart/form-data", "content-type")
    if asset.name.startswith(DEFAULT_NAME):
        raise InvalidRequest(f"names with {DEFAULT_NAME} are the server's own; see /v1/steering/default", "name")
    if isinstance(asset.meta, ProfileMeta) and spec.parse(asset.meta.steering, "steering").profile is not None:
        raise InvalidRequest("profiles do not nest", "steering.profile")
    state = state_of(raw.app)
    ref = await asyncio.to_thread(state.frontend.store.add, asset)
    await inventory.count(state)
    return Json(describe(await asyncio.to_thread(state.frontend.store.info, ref)), 201)


@router.get("/{ref}")
async def fetch(ref: str, raw: Request, format: Filter = None) -> Response:
    """An asset's metadata and provenance; ``format=safetensors|gguf|json`` gives the whole asset."""
    if format not in (None, "safetensors", *_WRITERS):
        raise InvalidRequest(f"wanted: {', '.join(('safetensors', *_WRITERS))}", "format")
    store = state_of(raw.app).frontend.store
    with located("ref"):
        if format is None:
            return Json(describe(await asyncio.to_thread(store.info, ref)))
        asset = await asyncio.to_thread(store.get, ref)
    name = f'attachment; filename="{asset.name}.{format}"'
    if format == "safetensors":
        return StreamingResponse(
            native.to_parts(asset), headers={"content-disposition": name}, media_type="application/octet-stream"
        )
    if isinstance(asset.tensors, RowFile) and asset.tensors.nbytes > MAX_WHOLE:
        message = f"{asset.ref} has more than {MAX_WHOLE >> 20} MiB; only format=safetensors is sent in parts"
        raise PayloadTooLarge(message, "format")
    data = await asyncio.to_thread(_WRITERS[format], asset)
    if format == "json":
        return Response(data, media_type="application/json")
    return Response(data, headers={"content-disposition": name}, media_type="application/octet-stream")


@router.get("/{ref}/features")
async def features(
    ref: str, raw: Request, query: Filter = None, active_on: Filter = None, limit: Limit = 20, offset: Offset = 0
) -> Response:
    """A dictionary's labelled features: those whose label has words that begin with all of ``query``'s, best first.

    With ``active_on`` those that are most active on this text, of each of its tokens and of all of it.
    """
    if active_on is not None:
        if query is not None or offset:
            raise InvalidRequest("goes with limit alone, not with query or offset", "active_on")
        return Json(await active_features(state_of(raw.app), ref, active_on, limit))
    store = state_of(raw.app).frontend.store
    asset, found, total = await asyncio.to_thread(_features, store, ref, query, limit, offset)
    data = [{"index": feature, "label": label} for feature, label in found]
    return Json({"object": "list", "dictionary": asset.ref, "total": total, "data": data})


@router.delete("/{ref}", dependencies=[Depends(admin)])
async def delete(ref: str, raw: Request) -> Response:
    """Deletes a version, or with a plain name all of them. Requests already accepted are not affected."""
    state = state_of(raw.app)
    removed = await asyncio.to_thread(_delete, state.frontend, ref)
    await inventory.count(state)
    return Json({"removed": list(removed)})


def _delete(frontend: Frontend, ref: str) -> tuple[str, ...]:
    with located("ref"):
        name, version = parse_ref(ref)
        doomed = None if version is None else frontend.store.info(ref).ref
        used = {u for u in frontend.used_by_default() if u == doomed or (doomed is None and u.startswith(f"{name}@"))}
        if used:
            raise AssetInUse(f"the server's default profile needs {', '.join(sorted(used))}")
        return frontend.store.remove(ref)


def _features(store: Store, ref: str, query: str | None, limit: int, offset: int) -> tuple[Asset, list[Labelled], int]:
    with located("ref"):
        asset = store.get(ref)
        if not isinstance(asset.meta, DictionaryMeta):
            raise AssetKindMismatch(f"{asset.ref} is of kind {asset.meta.kind}; wanted: dictionary")
    found, total = Labels(asset).search(query, limit, offset)
    return asset, found, total


def attach(app: FastAPI) -> None:
    app.include_router(router)


def describe(info: AssetInfo) -> dict[str, Any]:
    return {
        "object": "steering.asset",
        "ref": info.ref,
        "version": info.version,
        "sha256": info.sha256,
        "created": info.created,
        **kinds.dump_metadata(info.meta),
    }


async def _multipart(raw: Request) -> Asset:
    try:
        form = await raw.form(max_files=1, max_fields=1, max_part_size=_MAX_METADATA)
    except HTTPException as error:
        raise UploadMalformed(f"not a readable form: {error.detail}", "body") from None
    file, metadata = form.get("file"), form.get("metadata")
    if file is None or isinstance(file, str):
        raise UploadMalformed("needs a file part named file", "file")
    if metadata is not None and not isinstance(metadata, str):
        raise UploadMalformed("must be a field with a JSON object, not a file", "metadata")
    data = await file.read()
    return await asyncio.to_thread(uploads.read, data, metadata)


def _to_json(asset: Asset) -> bytes:
    return dumps(native.to_json(asset))


_WRITERS: dict[str, Callable[[Asset], bytes]] = {
    "json": _to_json,
    "gguf": gguf.to_gguf,
}
