"""Memory that runs out: what is taken for it, whose it was, and what is said."""

from __future__ import annotations

import errno
import logging
import threading

import comfy.model_management as management
import comfy.sd
import comfy.utils
import pytest
import safetensors
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import foreign, reading, stock
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import calibration as calibration_file
from comfyui_modelopt.utils import out_of_memory
from comfyui_modelopt.utils.out_of_memory import OutOfCpuMemory, OutOfMemory
from comfyui_modelopt.utils.whole_file import NameTaken
from safetensors import SafetensorError

OF_CPU = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    SafetensorError("The paging file is too small for this operation (os error 1455)"),
    OSError("Die Auslagerungsdatei ist zu klein (os error 1455)"),
    RuntimeError("Couldn't open shared file mapping: <torch_9>, error code: <1455>"),
    RuntimeError("bad allocation"),
]
OF_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    RuntimeError("MPS backend out of memory"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OTHERS = [
    OSError(errno.EIO, "Input/output error", "out of memory.safetensors"),
    NameTaken("a file is never overwritten, out of memory.safetensors exists"),
    ValueError("Cannot allocate memory"),
    RuntimeError("size mismatch"),
]


def name(error: Exception) -> str:
    return repr(error)[:40]


def failing(error: Exception):
    @out_of_memory.explained("quantizing", out_of_memory.RECORD_SMALLER)
    def work(made, model=None):
        raise error

    return work


class Model:
    def model_size(self) -> int:
        return 2_000_000_000


@pytest.mark.parametrize("error", OF_CPU, ids=name)
def test_the_cpus_memory(error):
    """Not of the kind that ComfyUI answers by moving a GPU's models into it."""
    with pytest.raises(OutOfCpuMemory, match="the computer's memory has .* GB free") as caught:
        failing(error)(None)
    assert not management.is_oom(caught.value)
    assert "nothing was changed" in str(caught.value) and "--lowvram" not in str(caught.value)


@pytest.mark.parametrize("error", OF_GPU, ids=name)
def test_a_gpus_memory(error):
    with pytest.raises(OutOfMemory, match="record a smaller width.*--lowvram") as caught:
        failing(error)(None)
    assert management.is_oom(caught.value)


@pytest.mark.parametrize("error", OTHERS, ids=name)
def test_what_is_not_memory(error):
    with pytest.raises(type(error)) as caught:
        failing(error)(None)
    assert caught.value is error


def test_the_models_size_is_told_wherever_it_is_among_the_arguments():
    for arguments, named in (
        ((Model(),), {}),
        ((None, Model()), {}),
        ((None,), {"model": Model()}),
    ):
        with pytest.raises(OutOfMemory, match=r"the UNet \(2.0 GB\)"):
            failing(OF_GPU[0])(*arguments, **named)


def test_a_device_that_no_longer_answers(monkeypatch):
    def fails(*_args, **_kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(management, "get_free_memory", fails)
    with pytest.raises(OutOfMemory, match="more memory than there is, cpu ran out: "):
        failing(OF_GPU[0])(None)


def test_what_an_accelerator_reports_late_is_taken_off_it(monkeypatch):
    """ComfyUI does so for torch's error, and would not for ours."""
    calls = []
    monkeypatch.setattr(management, "discard_cuda_async_error", lambda: calls.append(1))
    with pytest.raises(OutOfMemory):
        failing(torch.AcceleratorError("CUDA error: out of memory"))(None)
    assert calls == [1]


def logged(text: str, file: str = "/comfy/weight_adapter/lora.py") -> None:
    root = logging.getLogger()
    if root.isEnabledFor(logging.ERROR):
        root.handle(root.makeRecord("root", logging.ERROR, file, 1, text, (), None))


def test_a_patch_that_failed():
    with (
        pytest.raises(ValueError, match=r"ComfyUI could not compute it \(ERROR lora x shapes"),
        out_of_memory.not_swallowed(),
    ):
        logged("ERROR lora x shapes")
    with pytest.raises(MemoryError), out_of_memory.not_swallowed():
        logged("ERROR lora x [Errno 12] Cannot allocate memory")
    with pytest.raises(torch.OutOfMemoryError), out_of_memory.not_swallowed():
        logged("ERROR lora x CUDA out of memory")


def test_a_patch_that_failed_where_the_log_shows_no_errors():
    """ComfyUI's --verbose CRITICAL."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.CRITICAL)
    try:
        with pytest.raises(torch.OutOfMemoryError), out_of_memory.not_swallowed():
            logged("ERROR lora x CUDA out of memory")
        assert root.level == logging.CRITICAL
    finally:
        root.setLevel(level)


def test_what_others_log_meanwhile():
    with out_of_memory.not_swallowed():
        logged("ERROR in another custom node, out of memory", "/custom_nodes/other/nodes.py")
        other = threading.Thread(target=logged, args=("ERROR lora y CUDA out of memory",))
        other.start()
        other.join()


READERS = {
    "header": (files.read_header, (safetensors, "safe_open"), SafetensorError),
    "tensors": (reading.tensors_of, (comfy.utils, "load_torch_file"), RuntimeError),
    "UNet": (loader.load_file, (comfy.utils, "load_torch_file"), OutOfCpuMemory),
    "stock form, header": (stock.is_stock, (safetensors, "safe_open"), OutOfCpuMemory),
    "stock form": (stock.load, (comfy.sd, "load_diffusion_model"), OutOfCpuMemory),
    "import": (foreign.read, (comfy.utils, "load_torch_file"), OutOfCpuMemory),
    "calibration": (calibration_file.load, (calibration_file, "safe_open"), OutOfCpuMemory),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_memory_does_not_suffice_for_is_not_called_damaged(
    calibration, tmp_path, monkeypatch, reader
):
    read, place, kind = READERS[reader]
    path = tmp_path / "x.safetensors"
    calibration_file.save(calibration, path)
    error = SafetensorError if place[1] == "safe_open" else RuntimeError

    def fails(*_args, **_kwargs):
        raise error("unable to mmap 9 bytes: Cannot allocate memory (os error 12)")

    monkeypatch.setattr(*place, fails)
    with pytest.raises(kind, match="memory"):
        read(str(path))
