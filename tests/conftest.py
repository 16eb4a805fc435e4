"""Loads ComfyUI (CPU where there is no GPU) and this repository as the package `comfyui_modelopt`."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "comfyui_modelopt"
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".comfyui" / "ComfyUI")


def _load_comfyui() -> None:
    sys.path.insert(0, str(COMFYUI))
    import torch

    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # read when Triton is imported, which torch alone does not do
        os.environ["TRITON_INTERPRET"] = "1"
    from comfy.cli_args import args

    args.cpu = on_cpu


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


_load_comfyui()
_load_pack()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the tests among them (pytest-xdist) must give them the same ids."""
    if addressed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(
            f"a test's id must be the same in every process, {addressed[0]} holds an address: name "
            "its parameters with ids="
        )


@pytest.fixture(scope="session", autouse=True)
def casts_of_a_gpu():
    """Where kernels are interpreted, casts round as a GPU's do."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from .interpreter import correct_casts

        correct_casts()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder under test."""
    return COMFYUI


class Folders:
    """Temporary folders that `close` removes."""

    def __init__(self, factory: pytest.TempPathFactory):
        self._factory = factory
        self._made: list[Path] = []

    def mktemp(self, name: str) -> Path:
        self._made.append(self._factory.mktemp(name))
        return self._made[-1]

    def close(self) -> None:
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)  # Windows: a model still maps its file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For what is large: as `tmp_path_factory`, but gone after the module, not after the session."""
    made = Folders(tmp_path_factory)
    yield made
    made.close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with synthetic sd15.safetensors and lora.safetensors (Linear and conv)."""
    from comfyui_modelopt.devtools import synthetic

    folder = tmp_path_factory.mktemp("checkpoints")
    synthetic.sd15(folder / "sd15.safetensors")
    synthetic.lora(folder / "lora.safetensors", folder / "sd15.safetensors")
    return folder


@pytest.fixture(scope="session")
def sd15(checkpoints):
    """MODEL, CLIP and VAE of the synthetic SD1.5 checkpoint. Tests must not change them."""
    import comfy.sd

    path = str(checkpoints / "sd15.safetensors")
    return comfy.sd.load_checkpoint_guess_config(path)[:3]


@pytest.fixture(scope="session")
def conditionings(sd15):
    """Positive and negative conditioning."""
    clip = sd15[1]
    return [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a red fox", "blurry")]


@pytest.fixture(scope="session")
def calibration(sd15, conditionings):
    """Six real UNet calls of a 64 x 64 picture."""
    import torch
    from comfyui_modelopt.quantize.bridge import sampling

    positive, negative = conditionings
    _, made = sampling.record(
        sd15[0],
        seed=1,
        steps=6,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        positive=positive,
        negative=negative,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        denoise=1.0,
        max_records=8,
    )
    return made


@pytest.fixture(scope="session")
def quantized(sd15, calibration):
    """Recipe -> what the engine makes of the synthetic SD1.5 model, each made once. Read-only."""
    import functools

    from comfyui_modelopt.quantize import engine

    return functools.cache(lambda recipe: engine.quantize_model(sd15[0], recipe, calibration))
