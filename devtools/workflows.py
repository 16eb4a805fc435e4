"""Reading, adapting and watching API-format workflows. Nodes are found by class, not by id."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from .common import ROOT, UserError, say

if TYPE_CHECKING:
    from .server import ComfyServer, Result

WORKFLOWS = ROOT / "example_workflows" / "api"


def load_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))


def node_id(workflow: dict[str, Any], class_type: str) -> str:
    found = [key for key, node in workflow.items() if node["class_type"] == class_type]
    if len(found) != 1:
        raise UserError(f"the example workflow has {len(found)} nodes {class_type}, not one")
    return found[0]


def one(workflow: dict[str, Any], class_type: str) -> dict[str, Any]:
    """The inputs of the only node of a class."""
    return workflow[node_id(workflow, class_type)]["inputs"]


def output(result: Result, workflow: dict[str, Any], class_type: str, name: str) -> list[Any]:
    """What the only node of a class showed under `name`."""
    shown = result.outputs.get(node_id(workflow, class_type), {}).get(name)
    if not shown:
        raise UserError(f"{class_type} ended without its {name!r} output")
    return shown


def set_format(workflow: dict[str, Any], server: ComfyServer, key: str) -> None:
    """Choose a format. Its options are the workflow's, or the node's defaults for another one."""
    inputs = one(workflow, "ModelOptQuantize")
    if inputs.get("format") == key:
        return
    schema = server.object_info("ModelOptQuantize")["input"]["required"]["format"]
    for name in [name for name in inputs if name.startswith("format.")]:
        del inputs[name]
    inputs["format"] = key
    inputs.update(option_defaults(schema[1]["options"], key, "format"))


def option_defaults(options: list[dict[str, Any]], key: str, prefix: str) -> dict[str, Any]:
    """The default of every input below one option of a DynamicCombo, by dotted name."""
    chosen = next((option for option in options if option["key"] == key), None)
    if chosen is None:
        raise UserError(f"{prefix} {key!r} is not one of {[option['key'] for option in options]}")
    defaults: dict[str, Any] = {}
    for name, (kind, *more) in chosen["inputs"].get("required", {}).items():
        extra = more[0] if more else {}
        dotted = f"{prefix}.{name}"
        if kind == "COMFY_DYNAMICCOMBO_V3":
            first = extra["options"][0]["key"]
            defaults[dotted] = first
            defaults.update(option_defaults(extra["options"], first, dotted))
        elif isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else extra["options"]
            defaults[dotted] = extra.get("default", choices[0])
        else:
            defaults[dotted] = extra["default"]
    return defaults


class Progress:
    """Plain lines: one a node, and its steps now and then. On a terminal the steps share a line."""

    def __init__(self, workflow: dict[str, Any], server: ComfyServer) -> None:
        self.workflow = workflow
        self.server = server
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else 10.0
        self.last = time.monotonic()
        self.open_line = False

    def __call__(self, message: dict[str, Any]) -> None:
        data = message["data"]
        if message["type"] == "executing" and data.get("node") in self.workflow:
            kind = self.workflow[data["node"]]["class_type"]
            name = self.server.object_info(kind).get("display_name") or kind
            self._line(f"  {name}")
        elif message["type"] == "progress":
            done = data["value"] >= data["max"]
            if done or time.monotonic() - self.last >= self.every:
                self.last = time.monotonic()
                self._step(f"    step {data['value']}/{data['max']}")

    def _line(self, text: str) -> None:
        if self.open_line:
            say()
        self.open_line = False
        self.last = time.monotonic()
        say(text)

    def _step(self, text: str) -> None:
        if not self.terminal:
            say(text)
            return
        sys.stdout.write(f"\r{text}   ")
        sys.stdout.flush()
        self.open_line = True
