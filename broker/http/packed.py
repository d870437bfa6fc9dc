"""Serves files of the package: compressed if the client accepts gzip, and only once if it keeps them."""

from __future__ import annotations

import gzip
import hashlib
from typing import Any, NamedTuple

from litestar import Request, Response

from broker.http.edge.auth import header


class File(NamedTuple):
    """One file, compressed."""

    packed: bytes
    media_type: str
    tag: str


def file(packed: bytes, media_type: str) -> File:
    return File(packed, media_type, f'"{hashlib.sha256(packed).hexdigest()[:20]}"')


def compressed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def answer(request: Request[Any, Any, Any], file: File, headers: dict[str, str]) -> Response[bytes]:
    """The file, or 304 if the client has it."""
    headers = headers | {
        "Cache-Control": "no-cache",  # cached, but checked each time, so that a new release is seen at once
        "ETag": file.tag,
        "Vary": "Accept-Encoding",
    }
    if header(request, b"if-none-match").decode("latin-1") == file.tag:
        return Response(b"", status_code=304, headers=headers)
    if b"gzip" in header(request, b"accept-encoding"):
        headers["Content-Encoding"] = "gzip"
        return Response(file.packed, media_type=file.media_type, headers=headers)
    return Response(gzip.decompress(file.packed), media_type=file.media_type, headers=headers)
