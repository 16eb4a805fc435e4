"""A small MODEL with a LoRA on it, the pack's work on it in this process, and what no fault may change.

Used by the campaigns that put the fault into the running code: cancels, errors, memory that runs out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from .. import inprocess, synthetic

# what stays in 16 bits, so that a job takes a second: everything but the blocks in the middle
SKIP = ("input_blocks.*", "output_blocks.*", "out.2", "time_embed.*", "*.emb_layers.*")
SAMPLER = {"steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}


def pack(name: str) -> Any:
    """A module of the pack by its name under the repository."""
    return importlib.import_module(f"{inprocess.PACKAGE}.{name}")


def checksum(value: Any) -> int:
    """Of the bytes of all tensors in a value, their dtypes, shapes and names."""
    import torch

    if isinstance(value, torch.Tensor):
        if hasattr(value, "_qdata"):  # a quantized one: what it is stored as
            inner = {**vars(value._params), "data": value._qdata}
            return checksum({key: inner[key] for key in sorted(inner)})
        plain = value.detach().cpu().contiguous().reshape(-1)
        head = zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode())
        return zlib.crc32(plain.view(torch.uint8).numpy(), head)
    if isinstance(value, dict):
        return zlib.crc32(repr([(key, checksum(one)) for key, one in value.items()]).encode())
    if isinstance(value, list | tuple):
        return zlib.crc32(repr([checksum(one) for one in value]).encode())
    return zlib.crc32(repr(value).encode())


class Subject:
    """`jobs`: name -> a function that does it and returns a checksum of the result.

    folder: for everything it writes. model, with a LoRA on it, clip, vae: of an SD1.5. The jobs run in ComfyUI's way: in inference mode.
    """

    def __init__(self, folder: Path, model: Any, clip: Any, vae: Any) -> None:
        import torch

        self.folder, self.out = folder, folder / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.model, self.vae = model, vae
        with torch.inference_mode():
            self.prompts = [
                clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a fox", "")
            ]
            self.recorded = self._recorded()[1]
            made = pack("quantize.engine").quantize_model(self.model, self.recipe(), self.recorded)
            self.checkpoint = made.checkpoint
            self.quantized = pack("loaders.unet").load(made.checkpoint)
        self.file = folder / "quantized.safetensors"
        pack("formats.files").write(self.checkpoint, self.file)
        self.recording = pack("quantize.calibration").save(self.recorded, folder / "c.safetensors")
        self.exported = folder / "exported.pt"
        with torch.inference_mode():
            pack("quantize.export").save(self.to_export(), self.exported)
        self.jobs: dict[str, Callable[[], int]] = {
            "record": self.record,
            "quantize": self.quantize,
            "plan": self.plan,
            "auto-quantize": self.auto,
            "compare": self.compare,
            "save": self.save,
            "save calibration": self.save_calibration,
            "load": self.load,
            "load calibration": self.load_calibration,
            "export": self.export,
            "import": self.import_,
            "benchmark": self.benchmark,
        }

    # --- the jobs ---

    def recipe(self) -> Any:
        return pack("quantize.recipe").Recipe("fp8", "max", skip=SKIP)

    def fresh(self) -> Any:
        """The recording as an object of its own: nothing is remembered of it."""
        return dataclasses.replace(self.recorded)

    def _recorded(self) -> tuple[dict, Any]:
        import torch

        positive, negative = self.prompts
        return pack("quantize.bridge.sampling").record(
            self.model, seed=1, positive=positive, negative=negative, denoise=1.0, max_records=2,
            latent_image={"samples": torch.zeros(1, 4, 8, 8)}, **SAMPLER,
        )  # fmt: skip

    def record(self) -> int:
        latent, made = self._recorded()
        return checksum([latent["samples"], [vars(record) for record in made]])

    def quantize(self, calibration: Any = None) -> int:
        engine = pack("quantize.engine")
        pack("utils.sha256")._known.clear()  # so that the source is read
        made = engine.quantize_model(self.model, self.recipe(), calibration or self.fresh())
        quantized = pack("loaders.unet").load(made.checkpoint)
        engine.measure(made, quantized)
        return checksum([made.checkpoint.tensors, made.checkpoint.header["quality"]])

    def plan(self) -> int:
        text, figures = pack("nodes.planning").plan(self.model, self.recipe(), self.fresh())
        return checksum([figures["file_bytes"], "quantize" in text])

    def auto(self, calibration: Any = None) -> int:
        auto = pack("quantize.auto")
        found = auto.auto_quantize(
            self.model, calibration or self.fresh(), ["mxfp8"], auto.Goal(auto.BITS, 10.0),
            "linear only", SKIP, pack("nodes.auto_and_load").low_precision, tell=lambda text: None,
        )  # fmt: skip
        return checksum([found.made.checkpoint.tensors, found.predicted, found.measured])

    def compare(self) -> int:
        import torch

        positive, negative = self.prompts
        settings = pack("quantize.pictures").Settings(
            positive, negative, {"samples": torch.zeros(1, 4, 8, 8)}, self.vae, **SAMPLER
        )
        layers = pack("loaders.info").quantized_layers(self.quantized)
        made = pack("quantize.compare").compare(
            self.model, self.quantized, self.fresh(), layers, settings
        )
        return checksum(json.dumps(made.figures()))

    def save(self) -> int:
        """As the Save node does, into the folder `out`."""
        path = self.out / "saved.safetensors"
        files, progress = pack("formats.files"), pack("utils.progress").progress
        files.write(pack("loaders.unet").to_checkpoint(self.quantized), path,
                    progress(self.checkpoint.nbytes()))  # fmt: skip
        return self._taken(path)

    def save_calibration(self) -> int:
        path = self.out / "recording.safetensors"
        progress = pack("utils.progress").progress
        pack("quantize.calibration").save(self.recorded, path, progress)
        return self._taken(path)

    def load(self) -> int:
        os.utime(self.file)  # so that it is checked again
        model = pack("loaders.unet").load_file(str(self.file))
        return checksum(model.model.diffusion_model.state_dict())

    def load_calibration(self) -> int:
        os.utime(self.recording)
        made = pack("quantize.calibration").load(self.recording)
        return checksum([vars(record) for record in made])

    def to_export(self) -> Any:
        """The diffusers UNet of the quantized MODEL, as the Export node makes it."""
        names = pack("loaders.foreign").of_model(self.quantized)
        config = self.quantized.model.model_config.unet_config
        checkpoint = pack("loaders.unet").to_checkpoint(self.quantized)
        steps = pack("utils.progress").progress(len(checkpoint.layers))
        return pack("quantize.export").quantized_unet(checkpoint, config, names, steps)[0]

    def export(self) -> int:
        path = self.out / "exported.pt"
        pack("quantize.export").save(self.to_export(), path)
        return self._taken(path)

    def import_(self) -> int:
        os.utime(self.exported)
        made = pack("loaders.foreign").read(self.exported, pack("utils.progress").progress)
        model = pack("loaders.unet").load(made, where=self.exported, takes=True)
        return checksum(model.model.diffusion_model.state_dict())

    def benchmark(self) -> int:
        module = pack("loaders.benchmark")
        with mock.patch.multiple(module, WARM_UP=0, ROUNDS=1):  # each UNet call passes 100 points
            text = module.run(self.quantized, 64, 64, 1, repeats=1)
        return checksum("16 bits, eager" in text)

    def _taken(self, path: Path) -> int:
        """By calls that no campaign makes fail."""
        handle = os.open(path, os.O_RDONLY)
        data = os.read(handle, 2**30)
        os.close(handle)
        os.remove(path)
        return zlib.crc32(data)

    def savings(self) -> dict[str, Callable[[Path], Any]]:
        """What writes one file each, given its path."""
        import torch

        with torch.inference_mode():
            unet = self.to_export()
        return {
            "quantized UNet": lambda path: pack("formats.files").write(self.checkpoint, path),
            "calibration": lambda path: pack("quantize.calibration").save(self.recorded, path),
            "export": lambda path: pack("quantize.export").save(unet, path),
        }

    def run(self, job: str) -> int:
        import torch

        with torch.inference_mode():
            return self.jobs[job]()

    # --- what must stay as it is ---

    def state(self, whole: bool = True) -> dict[str, Any]:
        """Everything that a job must leave as it was, by name. Not whole: without what takes long."""
        import torch
        from modelopt.torch.quantization import model_calib

        both = {"MODEL": self.model}
        if whole:
            gc.collect()
            both["quantized MODEL"] = self.quantized
        found = {f"{name}'s {key}": value for name, model in both.items()
                 for key, value in model_state(model).items()}  # fmt: skip
        if whole:
            found["UNets in memory"] = _unets()
        found |= {
            "open files": open_files(),
            "files": sorted(str(path) for path in self.folder.rglob("*")),
            "temporary files": sorted(os.listdir(tempfile.gettempdir())),
            # by name: a copy of the process has none but its first
            "threads": sorted(t.name for t in threading.enumerate() if not t.daemon),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "output": (id(sys.stdout), id(sys.stderr)),
            "ModelOpt's folding": model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS,
        }
        return found


def model_state(model: Any) -> dict[str, Any]:
    """Weights as they are without patches in place, patches, modules and what is attached to them."""
    weights = dict(model.model.diffusion_model.named_parameters())
    weights |= dict(model.model.diffusion_model.named_buffers())
    prefix = "diffusion_model."
    for key, kept in model.backup.items():
        if key.startswith(prefix):
            weights[key.removeprefix(prefix)] = kept.weight
    modules = dict(model.model.diffusion_model.named_modules())
    hooks = {
        name: sum(len(getattr(module, kind)) for kind in (
            "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
            "_state_dict_hooks", "_load_state_dict_pre_hooks",
        ))
        for name, module in modules.items()
    }  # fmt: skip
    patches = {
        key: [(one[0], id(one[1]), one[2:]) for one in those]
        for key, those in model.patches.items()
    }
    inside = [vars(one[1]).get("weights") for those in model.patches.values() for one in those
              if hasattr(one[1], "__dict__")]  # fmt: skip
    return {
        "weights": {name: checksum(weight) for name, weight in weights.items()},
        "patches": (str(model.patches_uuid), repr(patches), checksum(inside)),
        "modules": {name: type(module).__name__ for name, module in modules.items()},
        "own functions": [name for name, module in modules.items() if "forward" in vars(module)],
        "hooks": hooks,
        "wrappers": repr({k: list(v) for k, v in model.wrappers.items()}),
        "options": repr(sorted(model.model_options)) + repr(model.model_options),
        "object patches": sorted(model.object_patches),
        "attachments": sorted(model.attachments),
        "training": [name for name, module in modules.items() if module.training],
    }


def _unets() -> int:
    """UNets in memory: a copy that is left over is one more."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return sum(1 for one in gc.get_objects() if type(one) is UNetModel)


def open_files() -> list[str] | None:
    """What this process has open, None where the system does not say."""
    try:
        names = os.listdir("/proc/self/fd")
    except FileNotFoundError:
        return None
    found = []
    for name in names:
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(one for one in found if not one.startswith(("/proc/", "pipe:")))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what changed, with what it is now where that is short."""
    found = []
    for name, value in before.items():
        if after[name] == value:
            continue
        if isinstance(value, dict):
            keys = [key for key in value.keys() | after[name].keys()
                    if value.get(key) != after[name].get(key)]  # fmt: skip
            found.append(f"{name} changed: {', '.join(sorted(keys)[:3])}")
        elif isinstance(value, list):
            new = [one for one in after[name] if one not in value]
            # other work's files and threads may end meanwhile, and a copy has not all of them
            if new or name not in ("open files", "threads"):
                found.append(f"{name} changed: {new[:3] or 'fewer'}")
        else:
            found.append(f"{name} changed: {str(value)[:80]} -> {str(after[name])[:80]}")
    return found


@contextlib.contextmanager
def temporary_files(folder: Path) -> Iterator[None]:
    """Temporary files are made in a folder of their own, where they can be counted."""
    before, place = tempfile.tempdir, folder / "tmp"
    place.mkdir()
    tempfile.tempdir = str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def subject() -> Iterator[Subject]:
    """One in a temporary folder, with ComfyUI loaded."""
    inprocess.load()
    import comfy.sd
    import comfy.utils
    import torch

    with tempfile.TemporaryDirectory(prefix="modelopt_torture_") as name:
        folder = Path(name)
        checkpoint = synthetic.sd15(folder / "sd15.safetensors")
        lora = synthetic.lora(folder / "lora.safetensors", checkpoint)
        with torch.inference_mode():
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
            patches = comfy.utils.load_torch_file(str(lora))
            model, _ = comfy.sd.load_lora_for_models(model, clip, patches, 0.8, 0.8)
        with temporary_files(folder):
            yield Subject(folder / "subject", model, clip, vae)
