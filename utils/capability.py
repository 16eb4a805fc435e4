"""Which formats a GPU computes natively, which run emulated, which not at all, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NATIVE, EMULATED, REFUSED = "native", "emulated", "refused"

# compute capability (NVIDIA, https://developer.nvidia.com/cuda-gpus) -> cards people own
CARDS = {
    (7, 5): "GeForce RTX 20, GTX 16, Quadro RTX, T4 (Turing)",
    (8, 0): "A100, A30 (Ampere, data centre)",
    (8, 6): "GeForce RTX 30, RTX A2000 to A6000, A10, A40 (Ampere)",
    (8, 7): "Jetson Orin (Ampere)",
    (8, 9): "GeForce RTX 40, RTX Ada, L4, L40 (Ada)",
    (9, 0): "H100, H200, GH200 (Hopper)",
    (10, 0): "B100, B200, GB200 (Blackwell, data centre)",
    (10, 3): "B300, GB300 (Blackwell Ultra, data centre)",
    (11, 0): "Jetson Thor (Blackwell)",
    (12, 0): "GeForce RTX 50, RTX PRO Blackwell (Blackwell)",
    (12, 1): "DGX Spark, GB10 (Blackwell)",
}
# format -> first compute capability with tensor cores for it; None: none is needed
NEEDS = {
    "int8": (7, 5),
    "fp8": (8, 9),
    "mxfp8": (10, 0),
    "nvfp4": (10, 0),
    "int4": None,
    "w4a8": (8, 9),
    "fp8_e5m2": None,
}
# (format, compute capability) -> why its units are not used, although the card has them. B300 of 8:
# INT8 2 to 3 POPS, FP16 36 PFLOPS (NVIDIA's table of HGX B300)
SLOWER = {("int8", (10, 3)): "int8 units are slower than those of 16 bits"}
FLOAT8 = ("fp8", "fp8_e5m2", "mxfp8", "nvfp4", "w4a8")
# our Triton kernels (Linear and convolution): format -> first compute capability
OURS = {"int8": (8, 0), "fp8": (8, 9), "w4a8": (8, 9)}
# format -> what is multiplied in them
PRODUCTS = {"int8": "int8", "fp8": "fp8", "w4a8": "fp8"}


@dataclass(frozen=True)
class GPU:
    """What decides. device: "cuda" also of AMD's GPUs. capability: None where it is not an NVIDIA GPU.

    cuda: of the torch build. backends: comfy-kitchen's that are enabled. torch: its version. no_triton: "int8" or "fp8" -> why
    our Triton kernels of that kind do not run here, where they do not.
    """

    device: str
    name: str
    capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    backends: frozenset[str] = frozenset()
    torch: tuple[int, int] = (2, 11)
    no_triton: Mapping[str, str] = field(default_factory=dict)

    def runs(self, name: str) -> bool:
        """Whether our Triton kernels compute layers of this format here."""
        if self.capability is None or name not in OURS or (name, self.capability) in SLOWER:
            return False
        return self.capability >= OURS[name] and PRODUCTS[name] not in self.no_triton


@dataclass(frozen=True)
class Support:
    """level: NATIVE, EMULATED or REFUSED. why: the reason, "" for a plain native."""

    level: str
    why: str = ""


def support(name: str, kind: str, gpu: GPU) -> Support:
    """How a layer of this format and kind ("linear" or "conv2d") runs on that GPU."""
    if gpu.device == "mps" and name in FLOAT8:
        return Support(REFUSED, f"{name} needs float8 numbers, Apple's GPUs have none in torch")
    if name == "mxfp8" and gpu.torch < (2, 7):
        return Support(REFUSED, f"mxfp8 needs torch 2.7, found {_dotted(gpu.torch)}")
    needed = NEEDS[name]
    if needed is None:
        return Support(NATIVE, f"{name} saves memory; it is computed in 16 bits on every device")
    if gpu.device == "cpu":
        return Support(EMULATED, f"no low-precision units on {gpu.name}")
    if gpu.capability is None:
        return Support(
            EMULATED, f"this pack's low-precision kernels need an NVIDIA GPU, this is {gpu.name}"
        )
    if gpu.capability < needed:
        return Support(EMULATED, _too_old(name, needed, gpu))
    if (name, gpu.capability) in SLOWER:
        return Support(EMULATED, f"{SLOWER[name, gpu.capability]} on {gpu.name}")
    if gpu.runs(name):
        return Support(NATIVE)
    if kind == "conv2d":
        return Support(EMULATED, _no_convolution(name, gpu))
    return _with_reason(_software(name, gpu), gpu.no_triton.get(PRODUCTS.get(name, "")))


def _with_reason(found: Support, reason: str | None) -> Support:
    """Why a library's kernels run in the place of ours."""
    if not reason or found.level != NATIVE:
        return found
    told = f"this pack's own kernels do not run: {reason}"
    return Support(NATIVE, f"{found.why}; {told}" if found.why else told)


def _too_old(what: str, needed: tuple[int, int], gpu: GPU) -> str:
    return (
        f"{what} needs compute capability {_dotted(needed)}, {gpu.name} has "
        f"{_dotted(gpu.capability)}"
    )


def _no_convolution(name: str, gpu: GPU) -> str:
    if name not in OURS:
        return f"there is no {name} convolution kernel"
    if gpu.capability < OURS[name]:
        return _too_old(f"an {name} convolution kernel", OURS[name], gpu)
    return f"the {name} convolution kernel needs Triton: {gpu.no_triton[PRODUCTS[name]]}"


def _software(name: str, gpu: GPU) -> Support:
    """The same for a GPU that has the units: whether torch and comfy-kitchen reach them."""
    if name == "mxfp8" and gpu.torch < (2, 10):
        return Support(EMULATED, f"mxfp8 kernels need torch 2.10, found {_dotted(gpu.torch)}")
    if name in ("mxfp8", "nvfp4") and (gpu.cuda is None or gpu.cuda < (12, 8)):
        return Support(
            EMULATED, f"{name} kernels need CUDA 12.8 in torch, found {_dotted(gpu.cuda)}"
        )
    if "cuda" not in gpu.backends:
        if gpu.cuda is None or gpu.cuda < (13, 0):
            return Support(
                NATIVE,
                "slow, activations are quantized in plain PyTorch because comfy-kitchen's CUDA kernels are off: ComfyUI enables them with a CUDA 13 build "
                f"of torch only, this one is built for CUDA {_dotted(gpu.cuda)}",
            )
        return Support(
            NATIVE,
            "slow, activations are quantized in plain PyTorch because comfy-kitchen's CUDA kernels are missing or do not load: "
            "reinstall the package comfy-kitchen with the Python that starts ComfyUI",
        )
    return Support(NATIVE)


def recommend(gpu: GPU) -> dict[str, tuple[str, str]]:
    """Goal ("smallest file", "fastest picture", "best picture") -> format and why, in words."""

    def native(name: str) -> bool:
        return support(name, "linear", gpu).level == NATIVE

    def allowed(name: str) -> bool:
        return support(name, "linear", gpu).level != REFUSED

    if native("nvfp4"):
        fastest = ("nvfp4", "4-bit tensor cores")
    elif native("fp8"):
        fastest = ("fp8", "8-bit floating-point tensor cores")
    elif native("int8"):
        fastest = ("int8", "8-bit integer tensor cores")
    else:
        fastest = ("int8", "nothing gets faster here, memory gets smaller")
    smallest = ("int4", "4.1 bits a weight, computed in 16 bits")
    nearest = "smoothquant with linear only measured nearest to 16 bits"
    best = ("int8", f"{nearest} of what computes in fewer" if native("int8") else nearest)
    picks = {"smallest file": smallest, "fastest picture": fastest, "best picture": best}
    return {goal: pick for goal, pick in picks.items() if allowed(pick[0])}


def table(gpu: GPU) -> list[tuple[str, str, Support]]:
    """(format, kind, support) for every format and kind."""
    return [
        (name, kind, support(name, kind, gpu)) for name in NEEDS for kind in ("linear", "conv2d")
    ]


def natively(card: tuple[int, int]) -> list[str]:
    """Formats that Linear layers run in natively on a compute capability, given its software."""
    return [
        name
        for name, needed in NEEDS.items()
        if needed is not None and card >= needed and (name, card) not in SLOWER
    ]


def cards(capability: tuple[int, int] | None) -> str:
    """Cards of a compute capability; the nearest lower one where it is not listed."""
    if capability is None:
        return ""
    known = [c for c in CARDS if c <= capability]
    return CARDS[max(known)] if known else "older than RTX 20"


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(str(part) for part in version) if version else "none"
