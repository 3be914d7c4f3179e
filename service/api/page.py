"""`GET /`: a page to chat in and to watch the cache while it answers.

Owns its static files, read once, and the headers that let them load nothing from anywhere else. Knows no model: the
page asks the API, as any client does, and sends the key that a person enters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.api.errors import ApiError

FOLDER = Path(__file__).parent.parent / "page"
START = "index.html"
MEDIA_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
# What an answer says is text to the page, and even if it were not: no script but ours, no address but this one.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    headers: Mapping[str, str]


def page_router() -> APIRouter:
    """The routes of the page, its style sheet and its modules."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}

    @router.api_route("/", methods=["GET", "HEAD"])
    async def get_page(request: Request) -> Response:
        return _answer(files[START], request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def get_companion(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(HTTPStatus.NOT_FOUND, f"There is nothing at GET {request.url.path}.", code="not_found")
        return _answer(files[name], request)

    return router


def _read(path: Path) -> _File:
    body = path.read_bytes()
    headers = {
        "Content-Type": MEDIA_TYPES[path.suffix],
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return _File(body, headers)


def _answer(file: _File, request: Request) -> Response:
    if file.headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=dict(file.headers))
    return Response(file.body, headers=dict(file.headers))
