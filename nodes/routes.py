"""What the page asks the server while nodes are edited: how a format or a file would run here."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ..formats import FORMATS
from ..loaders import badge
from ..quantize.candidates import CANDIDATES
from ..quantize.layers import LINEAR_ONLY
from ..utils import badge as words
from ..utils import packages
from . import folders

PATH = "/modelopt/badge"


def formats_of(names: list[str], layers: str) -> list[dict[str, str]]:
    """Chips of formats as Quantize and Auto Quantize name them. Unknown names get none. Without
    ModelOpt there is one chip, which says so."""
    if missing := packages.why_missing(packages.MODELOPT):
        return [words.chip("ModelOpt is not installed", words.BAD, missing)]
    kinds = ["linear"] if layers == LINEAR_ONLY else ["linear", "conv2d"]
    chips: list[dict[str, str]] = []
    for name in names:
        options = CANDIDATES[name].recipes[0] if name in CANDIDATES else {}
        if options.get("format", name) != name:  # a format of Auto Quantize's own
            chips.append(badge.memory_only(name))
        elif name in FORMATS:
            chips += badge.of_formats([(name, kind) for kind in kinds])
    return chips


def file_of(name: str) -> dict[str, object]:
    """Chips of a file of models/diffusion_models, and how it was made. Raises ValueError in house
    form."""
    chips, made_by = badge.of_file(folders.find(folders.UNETS, name))
    return {"chips": chips, "made_by": made_by}


async def answer(request: web.Request) -> web.Response:
    """?unet=NAME, or ?format=NAME&format=…&layers=…: {"chips": […]} (and "made_by" for
    a file), or {"error": text}."""
    query = request.query
    try:
        if "unet" in query:
            found = await asyncio.to_thread(file_of, query["unet"])
        else:
            names = query.getall("format", [])
            chips = await asyncio.to_thread(formats_of, names, query.get("layers", ""))
            found = {"chips": chips}
    except (ValueError, MemoryError) as error:
        return web.json_response({"error": str(error)})
    return web.json_response(found)


def register() -> None:
    """Adds the route to the running server. Does nothing where there is none, or a second time."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == PATH for route in server.routes):
        return
    server.routes.get(PATH)(answer)
