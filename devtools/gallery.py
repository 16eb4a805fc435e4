"""The example workflows as the page opens them, with notes and thumbnails, made from the API's form.

`python dev.py workflows` opens each of example_workflows/api in a real page, lays it out, and writes
the page's own form beside a picture; and the API's form anew, with every input that the page sends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .browser import Page, studio
from .common import ROOT, UserError, say
from .server import ComfyServer
from .workflows import WORKFLOWS

FOLDER = ROOT / "example_workflows"
WINDOW = (2560, 1600)
THUMBNAIL = 800  # pixels across
# combos that name a file -> its folder in models
FILES = {
    "ckpt_name": "checkpoints",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    "unet_name": "diffusion_models",
    "checkpoint_name": "modelopt/checkpoints",
}
NOTE = (420, 17)  # width of a note, height of its lines, pixels
# what nodes grow by once they have run, pixels: the report, the bars of the blocks, Compare's chart, the
# page's own picture
REPORT, BARS, CHART, LINES, PICTURE = 320, 110, 600, 130, 250
ROOM = {
    "ModelOptAutoQuantize": REPORT + BARS,
    "ModelOptCalibrationPrompts": LINES,
    "ModelOptCompare": REPORT + CHART,
    "ModelOptImport": REPORT + BARS,
    "ModelOptLoadUNet": REPORT + BARS,
    "ModelOptModelInfo": REPORT + BARS,
    "ModelOptPlan": REPORT,
    "ModelOptQuantize": REPORT + BARS,
    "ModelOptRecordCalibration": LINES,
    "ModelOptSaveCalibration": LINES,
    "ModelOptSaveUNet": LINES,
    "PreviewImage": PICTURE,
    "SaveImage": PICTURE,
}
# pixels across of nodes with a report, and of others in one renderer or the other
WIDE = {node_id: 460 for node_id in ROOM if node_id.startswith("ModelOpt")}
NARROW = 260

NOTES = {
    "quantize_sd15": """# Quantize SD1.5

1. **Your checkpoint**: choose one of SD1.5, in 16 or 32 bits.
2. **Calibration from Prompts**: put in prompts as you use them, one a line, and the size that you
generate at. It samples them once and records what the UNet sees.
3. **Quantize UNet**: `format` decides size and speed; the coloured word on the node says how your
GPU runs it. `linear + conv` makes the smallest file, `linear only` with `fp8`, `int8` and `max`,
`mxfp8` or `nvfp4` one that opens without this pack (the report says so). Another format? Change
`filename_prefix` with it.
4. **Run**. The report on the node says what it cost. The file lies in `models/diffusion_models`.

Then open the workflow *generate*.""",
    "quantize_sdxl": """# Quantize SDXL

1. **Your checkpoint**: choose one of SDXL, in 16 or 32 bits.
2. **Calibration from Prompts**: your prompts, one a line, at 1024 x 1024. Sixteen varied ones are
there already.
3. **Quantize UNet**: `format` decides size and speed; the coloured word on the node says how your
GPU runs it.
4. **Run**. Sixteen pictures are sampled for the recording, then the UNet is quantized and saved.
The report on the node says what it cost. The file lies in `models/diffusion_models`.

Short of memory? Fewer `max_records`, or a smaller width and height for the recording.""",
    "quantize_sd15_lora": """# Quantize SD1.5 with a LoRA baked in

The LoRA goes *before* both the calibration and Quantize: it is added to the weights, and the sum is
calibrated and rounded once. That is better, and faster later, than a LoRA on top of the quantized file.

1. Choose checkpoint and LoRA, and the strength you use.
2. Use prompts with the LoRA's trigger words in the calibration.
3. **Run**. In the graphs that load the file, leave the LoRA out of MODEL. Its part for CLIP is not in
the file: use **Load LoRA** there with `strength_model` 0, or connect CLIP only.""",
    "generate": """# Generate with a quantized UNet

**Load Quantized UNet** stands for the MODEL output of Load Checkpoint; CLIP and VAE still come from
the checkpoint. All else is as usual.

1. Choose the file that *quantize* made. Not in the list? Press R.
2. Choose the checkpoint that it was made from.
3. **Run**. The node says how the file was made, its size and which kernels run.

512 x 512 is for SD1.5; take 1024 x 1024 for SDXL.""",
    "generate_lora_controlnet": """# LoRA and ControlNet on a quantized UNet

Both go on a quantized MODEL as on any other. The LoRA is kept beside the 8-bit weights in 16 bits,
not rounded into them.

1. Choose the quantized file, the checkpoint (for CLIP and VAE), LoRA, ControlNet, and a picture whose
edges are to be followed.
2. **Run**.

A LoRA that you always use is better baked in: workflow *quantize_sd15_lora*.""",
    "compare_file": """# Is it still my model?

Compares a saved file with the checkpoint that it was made from.

1. Choose both.
2. **Record Calibration** samples the prompt with the original and records its UNet calls: a prompt
that the file was *not* calibrated on is the honest test.
3. **Run**. The chart shows SQNR (signal over quantization noise; higher is better) by timestep and by
layer, the text names the worst layers and what to do about them, and the two pictures have the same
seed: drag the slider (which needs Nodes 2.0: ComfyUI's menu), or look at them side by side.""",
    "compare_formats": """# Which format should I pick?

The same checkpoint in three formats, on the same recording, with pictures of the same seed.

1. Choose your checkpoint; put in your own prompts.
2. **Run**. Each Compare node tells the SQNR and names the worst layers. It replays what the formats were
calibrated on, which flatters all three alike (*compare_file* records another prompt); the pictures are of a
prompt that they were not calibrated on. Drag the sliders to see them (they need Nodes 2.0: ComfyUI's
menu), or look at them side by side.
3. The coloured words on the Quantize nodes say what your GPU computes natively: a format that is only
emulated here saves memory, not time.

Take the smallest format whose picture you like, and save it (workflow *quantize_sd15*).""",
    "auto_mixed_precision": """# A format for each layer

**Auto Quantize UNet** quantizes with every allowed format, measures what each costs in every layer, and
takes the best mix for a target: `size` of the file, `bits` a weight, or `quality` (SQNR to keep).

1. Choose your checkpoint, put in your prompts.
2. Set the target, and switch off formats that your GPU does not run (coloured words on the node).
`int4` and `int8_weights` save memory, not time.
3. **Run**. It takes several quantizations; a second target with the same recording takes one or two. The Compare
node replays the recording that was searched on, which flatters the mix (*compare_file* records another
prompt).
4. Keep the *recipe* (JSON): pasted into the target `recipe` it gives the same mix again, without a
search, also on another machine.""",
    "import_checkpoint": """# A checkpoint that ModelOpt wrote elsewhere

For those who calibrate with ModelOpt in Python.

1. Put the `.pt` of `mto.save`, or the folder of `save_pretrained` or `export_hf_checkpoint`, into
`models/modelopt/checkpoints`, and press R.
2. Choose it in **Import ModelOpt Checkpoint**, and a checkpoint of the same family for CLIP and VAE.
3. **Run**. The info names what came over, and what did not. **Save Quantized UNet** makes one
`.safetensors` of it, which loads faster.""",
}


def names() -> list[str]:
    return sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def depths(workflow: dict[str, Any]) -> dict[str, int]:
    """Column of each node: one right of its last input; what feeds only others, one left of them."""
    sources = {
        key: [v[0] for v in node["inputs"].values() if isinstance(v, list) and len(v) == 2]
        for key, node in workflow.items()
    }
    found: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in found:
            found[key] = 1 + max((depth(one) for one in sources[key]), default=-1)
        return found[key]

    for key in workflow:
        depth(key)
    for key in workflow:
        users = [found[one] for one in workflow if key in sources[one]]
        if not sources[key] and users:
            found[key] = min(users) - 1
    return found


ASPECT = 2.4  # of the widest thumbnail
# where the graph is in the window
BOX = """() => {
  const { scale, offset } = app.canvas.ds, MARGIN = 30, TITLE = 50;
  const nodes = app.graph.nodes;
  const left = Math.min(...nodes.map((n) => n.pos[0])), top = Math.min(...nodes.map((n) => n.pos[1]));
  const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]));
  return {
    x: (left + offset[0]) * scale - MARGIN, y: (top - TITLE + offset[1]) * scale - MARGIN,
    width: (right - left) * scale + 2 * MARGIN, height: (bottom - top + TITLE) * scale + 2 * MARGIN,
  };
}"""
# columns from left to right; a column that gets too high goes on in another one
LAY_OUT = """([depths, note, width, line, room, wider, narrow]) => {
  const GAP = 130, ACROSS = 80, MOST = 1500, columns = [];
  for (const node of app.graph.nodes) {
    const at = depths[node.id];
    (columns[at] ??= []).push(node);
  }
  let x = width + 2 * ACROSS;
  for (const column of columns.filter(Boolean)) {
    let y = 0, wide = 0;
    for (const node of column) {
      if (y && y + node.size[1] > MOST) { x += wide + ACROSS; y = wide = 0; }
      node.pos = [x, y];
      y += node.size[1] + (room[node.comfyClass] ?? 0) + GAP;
      wide = Math.max(wide, node.size[0], wider[node.comfyClass] ?? narrow);
    }
    x += wide + ACROSS;
  }
  const made = LiteGraph.createNode("MarkdownNote");
  made.title = "How to use this workflow";
  app.graph.add(made);
  made.widgets[0].value = note;
  const lines = note.split("\\n").reduce((sum, one) => sum + Math.ceil((one.length + 8) / 62), 2);
  made.size = [width, Math.max(160, 70 + line * lines)];
  made.pos = [0, 0];
  app.graph.setDirtyCanvas(true, true);
}"""


def make(page: Page, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> the workflow in the page's form and in the API's."""
    given = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    page.clear()
    page.load(given)
    width, line = NOTE
    note = "\n".join(_joined(NOTES[name]))
    page.run(LAY_OUT, [depths(given), note, width, line, ROOM, WIDE, NARROW])
    page.settle(900)
    prompt = page.prompt()
    asked, shown = sorted(given), sorted(prompt)
    if asked != shown:
        raise UserError(
            f"{name}: the page must hold the nodes {', '.join(asked)}, it holds "
            f"{', '.join(shown) or 'none'}: run this again when the machine has less to do"
        )
    for key, node in prompt.items():
        node.pop("is_changed", None)
        title = given[key].get("_meta")
        node.pop("_meta", None)
        if title:
            node["_meta"] = title
    saved = page.workflow()
    saved.pop("id", None)  # of this run of the page, as is where it looks
    saved["extra"].pop("ds", None)
    return saved, dict(sorted(prompt.items(), key=lambda item: int(item[0])))


def _joined(text: str) -> list[str]:
    """Paragraphs and list items in one line each: Markdown of notes breaks lines where the text does."""
    lines: list[str] = []
    for line in text.split("\n"):
        begins = not line or line[0] == "#" or line[:2].rstrip(".").isdigit()
        if lines and lines[-1] and not begins:
            lines[-1] += " " + line
        else:
            lines.append(line)
    return lines


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_files(server: ComfyServer) -> None:
    """Empty files of the names in the examples, so that the page finds nothing missing."""
    for name in names():
        given = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        for node in given.values():
            for key in node["inputs"].keys() & FILES.keys():
                path = server.models / FILES[key] / node["inputs"][key]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            if isinstance(node["inputs"].get("image"), str):
                path = server.base / "input" / node["inputs"]["image"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def thumbnail(page: Page, path: Path) -> None:
    """The whole graph, as large as fits."""
    from PIL import Image

    page.run("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.settle(1500)
    # this machine's GPU and files are nobody else's
    page.run("() => document.querySelectorAll('.modelopt-chip').forEach((chip) => chip.remove())")
    box = page.run(BOX)
    more = (box["width"] / ASPECT - box["height"]) / 2  # above and below a wide graph
    if more > 0:
        box["y"], box["height"] = max(box["y"] - more, 75), box["height"] + 2 * more
    whole = path.with_suffix(".png")
    page.picture(whole, box)
    with Image.open(whole) as picture:
        size = (THUMBNAIL, round(THUMBNAIL * picture.height / picture.width))
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(path, quality=85)
    whole.unlink()


def main() -> int:
    """Writes every example workflow and its thumbnail."""
    with studio(make_files) as (server, browser):
        server.request("/settings/LiteGraph.Canvas.MinFontSizeForLOD", 0)  # words at any zoom
        with browser.open(server, size=WINDOW) as page:
            for name in names():
                saved, prompt = make(page, name)
                write(FOLDER / f"{name}.json", saved)
                write(WORKFLOWS / f"{name}.json", prompt)
                thumbnail(page, FOLDER / f"{name}.jpg")
                say(name)
    return 0
