"""The chat page: static files under a Content-Security-Policy that lets nothing in from elsewhere."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mateconv_jax.generation_config import PRESETS

FOLDER = Path(__file__).parent / "page"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # Scripts may only put HTML into the page that DOMPurify has seen.
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asks for each file's ETag: an updated server shows its own page
}
# The options that differ between presets.
SAMPLING = ("temperature", "top_k", "top_p")


def routes(context: int, needs_key: bool) -> list[Route | Mount]:
    """`/`, and `/page/` with the page's files and settings.json. Anyone may see them: they hold nothing.

    A mount at `/` would answer a wrong method on an API path with 404 instead of 405.

    Args:
      context: tokens of a prompt and its answer.
      needs_key: requests to the API need a key.
    """
    presets = {name: {option: getattr(preset, option) for option in SAMPLING} for name, preset in PRESETS.items()}
    settings = {"context": context, "needs_key": needs_key, "presets": presets}

    async def index(request: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    async def get_settings(request: Request) -> Response:
        return JSONResponse(settings, headers=HEADERS)

    return [Route("/", index), Route("/page/settings.json", get_settings), Mount("/page", PageFiles(directory=FOLDER))]


class PageFiles(StaticFiles):
    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response
