"""``/v1/steering/assets``: list, upload, fetch and delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from steersman.server.access import admin
from steersman.server.state import state_of
from steersman.steering import assets as kinds
from steersman.steering import spec
from steersman.steering.assets import Asset, ProfileMeta
from steersman.steering.errors import AssetInUse, InvalidRequest, UploadMalformed
from steersman.steering.formats import gguf, native
from steersman.steering.store import AssetInfo

router = APIRouter(prefix="/v1/steering/assets")
Filter = Annotated[str | None, Query()]


@router.get("")
async def list_assets(raw: Request, kind: Filter = None, model: Filter = None, text: Filter = None) -> Response:
    """Stored assets, newest versions first, filtered by kind, model and words of their descriptions."""
    if kind is not None and kind not in kinds.KINDS:
        raise InvalidRequest(f"unknown kind; wanted: {', '.join(kinds.KINDS)}", "kind")
    store = state_of(raw.app).frontend.store
    found = await asyncio.to_thread(store.list, kind, model, text)
    return JSONResponse({"object": "list", "data": [describe(info) for info in found]})


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
    if isinstance(asset.meta, ProfileMeta):
        spec.parse(asset.meta.steering, "steering")
    store = state_of(raw.app).frontend.store
    ref = await asyncio.to_thread(store.add, asset)
    return JSONResponse(describe(await asyncio.to_thread(store.info, ref)), 201)


@router.get("/{ref}")
async def fetch(ref: str, raw: Request, format: Filter = None) -> Response:
    """An asset's metadata and provenance; ``format=safetensors|gguf|json`` gives the whole asset."""
    store = state_of(raw.app).frontend.store
    if format is None:
        return JSONResponse(describe(await asyncio.to_thread(store.info, ref)))
    asset = await asyncio.to_thread(store.get, ref)
    if format == "json":
        return JSONResponse(native.to_json(asset))
    if format == "safetensors":
        return _file(native.to_safetensors(asset), f"{asset.name}.safetensors")
    if format == "gguf":
        return _file(gguf.to_gguf(asset), f"{asset.name}.gguf")
    raise InvalidRequest("wanted: json, safetensors or gguf", "format")


@router.delete("/{ref}", dependencies=[Depends(admin)])
async def delete(ref: str, raw: Request) -> Response:
    """Deletes a version, or with a plain name all of them. Requests already accepted are not affected."""
    frontend = state_of(raw.app).frontend
    default = frontend.server_default()
    if (
        default is not None
        and default.profile is not None
        and default.profile.partition("@")[0] == ref.partition("@")[0]
    ):
        raise AssetInUse(f"{ref} is the server's default profile", "ref")
    removed = await asyncio.to_thread(frontend.store.remove, ref)
    return JSONResponse({"removed": list(removed)})


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
    form = await raw.form(max_files=1, max_fields=1)
    file, metadata = form.get("file"), form.get("metadata")
    if file is None or isinstance(file, str):
        raise UploadMalformed("needs a file part named file", "file")
    data = await file.read()
    fields = native.loads(metadata, "metadata") if isinstance(metadata, str) else None
    if data[:4] == b"GGUF":
        if fields is not None and not isinstance(fields, dict):
            raise UploadMalformed("must be a JSON object", "metadata")
        return await asyncio.to_thread(lambda: gguf.from_gguf(data, **(fields or {})))
    return await asyncio.to_thread(native.from_safetensors, data, fields)


def _file(data: bytes, name: str) -> Response:
    return Response(
        data, headers={"content-disposition": f'attachment; filename="{name}"'}, media_type="application/octet-stream"
    )
