"""A real browser on a ComfyUI server's page, by Playwright: for the tests of the page and for pictures.

Runs inside the venv. All calls are synchronous, in one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .common import PACK_NAME, UserError
from .server import ComfyServer

# of a browser that is there already; the one that set-up found or installed is in VARIABLE
VARIABLE = "MODELOPT_BROWSER"
WHY_NOT = "MODELOPT_NO_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
CLASSIC, NODES_2 = "classic", "nodes 2.0"
READY = "window.app?.graph && window.app.extensionManager && window.app.vueAppReady"
SECONDS = 120


def find() -> str | None:
    """Path of a Chromium or its kin, or None."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A headless Chromium. Use as a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        # a sandbox needs rights that root in a container does not have
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        flags = [*FLAGS, "--no-sandbox"] if root else FLAGS
        try:
            self._chromium = self._playwright.chromium.launch(executable_path=self.path, args=flags)
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chromium.close()
        self._playwright.stop()

    def open(self, server: ComfyServer, **options: Any) -> Page:
        """A new page, see Page."""
        return Page(self._chromium, server, **options)


class Page:
    """ComfyUI's page in a profile of its own, with a stock server's settings but for those named.

    `problems` holds the console's errors since the page was ready. size: of the window, pixels.
    """

    def __init__(
        self,
        chromium: Any,
        server: ComfyServer,
        renderer: str = CLASSIC,
        theme: str = "dark",
        locale: str = "en",
        size: tuple[int, int] = (1600, 1000),
    ) -> None:
        self.server = server
        self.problems: list[str] = []
        for name, value in {
            "Comfy.VueNodes.Enabled": renderer == NODES_2,
            "Comfy.ColorPalette": theme,
            "Comfy.Locale": locale,
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "Comfy.Window.UnloadConfirmation": False,
        }.items():
            server.request(f"/settings/{name}", value)
        self._context = chromium.new_context(viewport={"width": size[0], "height": size[1]})
        self.page = self._context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.goto(server.url)
        self.wait_ready()
        self.clear()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._context.close()

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url', '')})")

    def wait_ready(self) -> None:
        """Until the page has started. What it logged by then is the page's own."""
        self.page.wait_for_function(READY, timeout=SECONDS * 1000)
        self.page.wait_for_timeout(1500)
        self.problems.clear()

    def run(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression or function in the page."""
        return self.page.evaluate(script, argument)

    def wait_for(self, script: str, argument: Any = None, seconds: float = SECONDS) -> None:
        """Until the JavaScript function says true."""
        self.page.wait_for_function(script, arg=argument, timeout=seconds * 1000)

    def settle(self, milliseconds: int = 600) -> None:
        """Time for the page to draw."""
        self.page.wait_for_timeout(milliseconds)

    # --- the graph ---

    def clear(self) -> None:
        """A new empty workflow."""
        self.run("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.wait_for("() => app.graph.nodes.length === 0")
        self.run("() => app.canvas.ds.reset()")
        self.settle(300)

    def load(self, workflow: dict[str, Any]) -> None:
        """A workflow in the page's own form, or in the API's."""
        call = "loadGraphData" if "nodes" in workflow else "loadApiJson"
        self.run(f"async (made) => {{ await app.{call}(made, 'workflow'); }}", workflow)
        self.settle()

    def prompt(self) -> dict[str, Any]:
        """What the page would send to the server: the API form."""
        made = "async () => JSON.stringify((await app.graphToPrompt()).output)"
        return json.loads(self.run(made))

    def workflow(self) -> dict[str, Any]:
        """What the page would save."""
        return json.loads(self.run("() => JSON.stringify(app.graph.serialize())"))

    def add_by_search(self, display_name: str, at: tuple[int, int] = (500, 300)) -> int:
        """Adds a node as a user does: double click, type, Enter, put it down. -> its id."""
        before = set(self.run("() => app.graph.nodes.map((n) => n.id)"))
        asked = self.page.get_by_role("dialog").locator("input").first
        for _ in range(5):  # a busy page misses a click
            self.page.mouse.dblclick(*at)
            self.settle(600)
            if asked.is_visible():
                break
        asked.fill(display_name)
        self.page.get_by_role("dialog").get_by_text(display_name, exact=True).first.wait_for()
        self.settle(500)  # results are ranked anew while one types
        asked.press("Enter")
        self.page.get_by_role("dialog").first.wait_for(state="hidden")
        self.settle(300)
        self.page.mouse.click(at[0] + 40, at[1] + 40)
        self.wait_for("(count) => app.graph.nodes.length > count", len(before))
        self.settle(300)
        (made,) = set(self.run("() => app.graph.nodes.map((n) => n.id)")) - before
        return made

    def set_widget(self, node: int | str, name: str, value: Any) -> None:
        """As the page's own widgets do it: the value, then everybody who listens."""
        self.run(
            """([id, name, value]) => {
              const node = app.graph.getNodeById(id);
              const widget = node.widgets.find((w) => w.name === name);
              widget.value = value;
              widget.callback?.(value, app.canvas, node);
            }""",
            [node, name, value],
        )
        self.settle(400)

    def widgets(self, node: int | str) -> dict[str, Any]:
        """Name -> value of what a node shows."""
        return self.run(
            "(id) => Object.fromEntries((app.graph.getNodeById(id).widgets ?? [])"
            ".map((w) => [w.name, w.value ?? null]))",
            node,
        )

    def shown(self, node: int | str, name: str) -> str:
        """The text of what the pack put on a node: chips, report or chart; "" where it is not there."""
        return self.run(
            """([id, name]) => {
              const widget = app.graph.getNodeById(id).widgets?.find((w) => w.name === name);
              const root = widget?.element;
              return root ? (root.value ?? root.innerText) : "";
            }""",
            [node, name],
        )

    # --- pictures ---

    def frame(self, nodes: Sequence[int | str], margin: int = 20) -> dict[str, float]:
        """Moves the canvas so that these nodes are in sight at their own size. -> their rectangle on
        the page."""
        return self.run(
            """([ids, margin]) => {
              const nodes = app.graph.nodes.filter((n) => ids.includes(n.id));
              const left = Math.min(...nodes.map((n) => n.pos[0]));
              const top = Math.min(...nodes.map((n) => n.pos[1])) - 60;
              const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
              const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
              const ds = app.canvas.ds;
              ds.scale = 1;
              ds.offset[0] = 80 - left;
              ds.offset[1] = 100 - top;
              app.canvas.deselectAll?.();
              app.canvas.setDirty(true, true);
              return { x: 80 - margin, y: 100 - margin, width: right - left + 2 * margin,
                       height: bottom - top + 2 * margin };
            }""",
            [list(nodes), margin],
        )

    def picture(self, path: Path, clip: dict[str, float] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, clip=clip)


def template(server: ComfyServer, name: str) -> dict[str, Any]:
    """A shipped workflow, as the page gets it."""
    return json.loads(server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.json"))


@contextlib.contextmanager
def studio(fill: Callable[[ComfyServer], None]) -> Iterator[tuple[ComfyServer, Browser]]:
    """A server with what `fill` puts into its folders before it starts, and a browser, for pictures.

    Raises UserError where there is no browser. ComfyUI is where COMFYUI_PATH says.
    """
    path = find()
    if path is None:
        raise UserError(f"this needs a browser: install Chromium, or name one in {VARIABLE}")
    with tempfile.TemporaryDirectory() as base:
        server = ComfyServer(os.environ["COMFYUI_PATH"], base)
        fill(server)
        with server, Browser(path) as browser:
            yield server, browser
