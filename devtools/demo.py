"""`dev.py demo`: quantize a checkpoint from end to end in a real ComfyUI and say what it cost.

Queues the shipped workflows over HTTP: one server calibrates, quantizes and saves; a second one
loads the file and makes a picture. `check_options` runs before the set-up, on the standard library
alone; the rest runs inside the venv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import ROOT, UserError, say
from .workflows import Progress, load_workflow, one, output, set_format

if TYPE_CHECKING:
    from .server import ComfyServer, Result

BASE = ROOT / ".comfyui" / "demo"
DAY = 24 * 3600
SDXL_SIDE = 1024
# keys of the two text encoders of SDXL's checkpoints, as Stability AI published them
SDXL_ENCODERS = ("conditioner.embedders.0.", "conditioner.embedders.1.")


@dataclass(frozen=True)
class Options:
    """The command line, checked; paths are absolute."""

    checkpoint: Path | None
    format: str
    layers: str
    out: Path | None
    json: Path | None


def check_options(args: argparse.Namespace) -> Options:
    """Refuse what cannot work before any work is done."""
    checkpoint = args.checkpoint and args.checkpoint.expanduser().resolve()
    if checkpoint and not checkpoint.is_file():
        raise UserError(f"--checkpoint {args.checkpoint}: there is no such file.")
    if checkpoint and checkpoint.suffix.lower() not in (".safetensors", ".ckpt", ".pt", ".sft"):
        raise UserError(
            f"--checkpoint {args.checkpoint}: ComfyUI lists .safetensors and .ckpt files only."
        )
    out = args.out and args.out.expanduser().resolve()
    if out and out.suffix.lower() != ".safetensors":
        raise UserError(f"--out {args.out}: the name must end in .safetensors.")
    if out and out.exists():
        raise UserError(f"--out {args.out} exists already: move it away or name another file.")
    report = args.json and args.json.expanduser().resolve()
    if report and report.is_dir():
        raise UserError(f"--json {args.json} is a folder: name a file.")
    for option, path in (("--out", out), ("--json", report)):
        if path:
            _check_folder(option, path.parent)
    return Options(checkpoint, args.format, args.layers, out, report)


def _check_folder(option: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{option}: there is no folder {folder}: make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write in {folder}: {error.strerror}.") from None


def main(options: Options) -> int:
    """Run the demo inside the venv; ComfyUI is where COMFYUI_PATH says."""
    from .server import PromptRejected, ServerDied

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through the servers' exits
    try:
        figures = Demo(options, Path(os.environ["COMFYUI_PATH"])).run()
    except PromptRejected as error:
        raise UserError(f"ComfyUI refused the workflow: {error}") from None
    except (ServerDied, ConnectionError) as error:
        raise UserError(str(error)) from None
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


class Demo:
    """One run of the demo."""

    def __init__(self, options: Options, comfyui: Path) -> None:
        from .server import cuda_works

        self.options = options
        self.comfyui = comfyui
        self.synthetic = options.checkpoint is None
        self.gpu = cuda_works()
        self.checkpoint = options.checkpoint or BASE / "synthetic" / "synthetic_sd15.safetensors"

    def run(self) -> dict[str, Any]:
        if self.synthetic:
            self._make_checkpoint()
        arguments = ["--extra-model-paths-config", str(self._model_paths())]
        quantize, generate = workflows_for(self.checkpoint)
        self._fit(quantize)
        self._fit(generate)

        say(f"\nQuantizing {self.checkpoint} to {self.options.format}, {self.options.layers}")
        with self._server(arguments) as server:
            set_format(quantize, server, self.options.format)
            one(quantize, "ModelOptQuantize")["layers"] = self.options.layers
            one(quantize, "ModelOptSaveUNet")["filename_prefix"] = self._prefix()
            result = self._go(server, quantize)
            figures = output(result, quantize, "ModelOptQuantize", "modelopt")[0]
            file = Path(output(result, quantize, "ModelOptSaveUNet", "text")[0])
            machine = describe(server)
            folder = server.models / "diffusion_models"

        say("\nLoading the file in a second server and sampling from it")
        one(generate, "ModelOptLoadUNet")["unet_name"] = str(file.relative_to(folder))
        with self._server(arguments) as server:
            result = self._go(server, generate)
            image = server.view(output(result, generate, "SaveImage", "images")[0])

        if self.options.out:
            if self.options.out.exists():
                raise UserError(f"{self.options.out} came to be meanwhile; the UNet is {file}")
            file = Path(shutil.move(file, self.options.out))
        picture = free_name(
            self.options.out.with_suffix(".png") if self.options.out else Path("modelopt-demo.png")
        )
        picture.write_bytes(image)
        report = {
            "checkpoint": str(self.checkpoint),
            "synthetic": self.synthetic,
            "format": self.options.format,
            "layers": self.options.layers,
            "file": str(file),
            "bytes_before": figures["bytes_before"],
            "bytes_after": figures["bytes_after"],
            "ratio": figures["bytes_after"] / figures["bytes_before"],
            "sqnr_db": figures.get("sqnr_db"),
            "seconds": figures.get("seconds"),
            "picture": str(picture.resolve()),
            "machine": machine,
        }
        self._tell(report, generate)
        return report

    # --- before ---

    def _make_checkpoint(self) -> None:
        sys.path.insert(0, str(self.comfyui))  # before this folder: ComfyUI owns `nodes`, `utils`
        from comfy.cli_args import args

        args.cpu = True  # shapes are all that is asked of it
        from . import synthetic

        say("No --checkpoint: making a small synthetic SD1.5 (random weights, full text encoder)")
        synthetic.sd15(self.checkpoint)

    def _model_paths(self) -> Path:
        """ComfyUI's own way to see a folder of models: nothing is copied or linked."""
        BASE.mkdir(parents=True, exist_ok=True)
        config = BASE / "model_paths.yaml"
        folder = json.dumps(self.checkpoint.parent.as_posix(), ensure_ascii=False)
        config.write_text(f"demo:\n  checkpoints: {folder}\n", encoding="utf-8")
        return config

    def _fit(self, workflow: dict[str, Any]) -> None:
        """Put the checkpoint in, and on a CPU sizes that take minutes, not hours."""
        one(workflow, "CheckpointLoaderSimple")["ckpt_name"] = self.checkpoint.name
        if self.gpu:
            return
        side = 64 if self.synthetic else 256
        for node in workflow.values():
            prompts = node["inputs"].get("prompts")
            if isinstance(prompts, str):
                node["inputs"]["prompts"] = "\n".join(prompts.splitlines()[:4])
            for name, value in (("width", side), ("height", side), ("steps", 4)):
                if isinstance(node["inputs"].get(name), int):
                    node["inputs"][name] = min(value, node["inputs"][name])

    def _prefix(self) -> str:
        linear = "_linear" if self.options.layers == "linear only" else ""
        return f"{self.checkpoint.stem}_{self.options.format}{linear}"

    # --- the servers ---

    def _server(self, arguments: list[str]) -> ComfyServer:
        from .server import ComfyServer

        where = "" if self.gpu else " on the CPU (there is no usable NVIDIA GPU)"
        say(f"Starting ComfyUI{where}")
        return ComfyServer(self.comfyui, BASE, args=arguments)

    def _go(self, server: ComfyServer, workflow: dict[str, Any]) -> Result:
        result = server.run(workflow, timeout=DAY, on_message=Progress(workflow, server))
        if result.error:
            told = failure(result.error, self.checkpoint)
            raise UserError(f"{told}\nThe server's log is {server.log_file}")
        if result.interrupted:
            raise UserError("the run was cancelled in ComfyUI.")
        return result

    # --- after ---

    def _tell(self, report: dict[str, Any], generate: dict[str, Any]) -> None:
        sampler = one(generate, "KSampler")
        mb = 1e6
        sqnr, seconds = report["sqnr_db"], report["seconds"]
        say("\nDone.")
        say(f"  file        {report['file']}")
        say(
            f"  UNet        {report['bytes_before'] / mb:.1f} MB -> "
            f"{report['bytes_after'] / mb:.1f} MB ({report['ratio']:.2f} of it)"
        )
        if sqnr is not None:
            say(f"  SQNR        {sqnr:.1f} dB against the original, on the recorded inputs")
        if seconds is not None:
            say(f"  quantizing  {seconds:.1f} s, {report['machine']}")
        say(f"  picture     {report['picture']}")
        say(
            f"              {sampler['sampler_name']} / {sampler['scheduler']}, "
            f"{sampler['steps']} steps, cfg {sampler['cfg']}, seed {sampler['seed']}"
        )
        if self.synthetic:
            say("  The checkpoint is synthetic (random weights): the picture is noise, and the")
            say("  figures show that it works, not what a real model gives. Use --checkpoint FILE.")
        say("  In the browser: python dev.py serve")


def failure(error: dict[str, Any], checkpoint: Path) -> str:
    """A node's error in words. Of a file that it cannot read, ComfyUI says what its reader met."""
    node, met = error.get("node_type"), str(error.get("exception_message")).strip()
    if node != "CheckpointLoaderSimple":
        return f"{node}: {met}"
    return (
        f"--checkpoint must name a checkpoint that ComfyUI loads, {checkpoint} is none "
        f"({error.get('exception_type')}: {met}): it is damaged or holds something else, name another"
    )


def describe(server: ComfyServer) -> str:
    """The machine, in words: device, torch, ComfyUI."""
    stats = server.get("/system_stats")
    system, devices = stats["system"], stats["devices"]
    device = devices[0]["name"] if devices else "unknown device"
    if device == "cpu":
        device = f"CPU, {os.cpu_count()} threads"
    torch, comfyui = system["pytorch_version"], system["comfyui_version"]
    return f"{device}, torch {torch}, ComfyUI {comfyui}"


def is_sdxl(checkpoint: Path) -> bool:
    """Whether a checkpoint is SDXL's, from its keys: False for a .ckpt, whose keys are in a pickle."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="pt") as file:
            keys = file.keys()
    except SafetensorError:
        return False
    return all(any(key.startswith(part) for key in keys) for part in SDXL_ENCODERS)


def workflows_for(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workflows that quantize a checkpoint and load the file, at the size of its family."""
    sdxl = is_sdxl(checkpoint)
    generate = load_workflow("generate.json")
    if sdxl:
        one(generate, "EmptyLatentImage").update(width=SDXL_SIDE, height=SDXL_SIDE)
    return load_workflow("quantize_sdxl.json" if sdxl else "quantize_sd15.json"), generate


def free_name(path: Path) -> Path:
    """`path`, or with a number if it is taken."""
    number = 1
    chosen = path
    while chosen.exists():
        number += 1
        chosen = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return chosen
