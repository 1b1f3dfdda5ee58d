"""The page at `/`: static files beside the style sheet of the reports, whose colours of depths it shares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mor.serve.service import Service
from mor.show.page import style_sheet

FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
COLORS = "/page/depths.css"


def page_routes(service: Service) -> list[Route]:
    """Routes of the page."""

    async def colors(request: Request) -> Response:
        """The style sheet of the model's depths; of one depth while they are not known."""
        facts = service.engine.facts
        text = style_sheet(facts.num_recursions if facts else 1)
        return Response(text, media_type="text/css", headers={"Cache-Control": "no-store"})

    return [*(Route(path, _static(name, kind)) for path, (name, kind) in FILES.items()), Route(COLORS, colors)]


def _static(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files(__name__) / name).read_bytes()

    async def static(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return static
