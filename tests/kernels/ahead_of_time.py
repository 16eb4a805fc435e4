"""Compiles Triton kernels for GPUs that are not here, and says what ptxas made of them.

The tests' own process interprets kernels, so a subprocess compiles (this file run as a script):
`compile_all` sends it the requests and returns PTX, shared memory, registers and spills.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CAPABILITIES = (80, 86, 89, 90, 100, 120)
FP8_CAPABILITIES = (89, 90, 100, 120)


@dataclass(frozen=True)
class Request:
    """One compilation of `function` in `module` ("kernels.triton_quantize").

    arguments: name -> type ("*fp16", "*i8", "*fp8e4nv", "i32", "fp32") of those that are not
    constexprs; constexprs: name -> value, None for an optional pointer that is not given. Pointers
    and integers are multiples of 16 but for the names in `odd`, as Triton finds out at a launch.
    """

    module: str
    function: str
    arguments: dict[str, str]
    constexprs: dict[str, object]
    capability: int
    warps: int = 4
    stages: int = 3
    odd: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """shared: bytes of a program. registers, spills (bytes of stack and local memory): of a thread.

    loads, stores: bits of each access to global memory, in the order of the code.
    """

    ptx: str
    shared: int
    registers: int
    spills: int
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.loads.extend(_widths(self.ptx, "ld"))
        self.stores.extend(_widths(self.ptx, "st"))


def _widths(ptx: str, instruction: str) -> list[int]:
    pattern = rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b"
    return [int(vector or 1) * int(bits) for vector, bits in re.findall(pattern, ptx)]


def compile_all(requests: list[Request]) -> list[Compiled]:
    """Raises AssertionError with the compiler's words where one of them does not compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        input=json.dumps([asdict(r) for r in requests]),
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**answer) for answer in json.loads(done.stdout)]


def _compile(request: Request) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(request.module), request.function)
    names = function.arg_names
    unknown = (request.arguments.keys() | request.constexprs.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"{request.function} and its request differ in {sorted(unknown)}")
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in request.arguments.items()
        if name not in request.odd and kind[0] in "*i"
    }
    source = ASTSource(
        function,
        signature={name: request.arguments.get(name, "constexpr") for name in names},
        constexprs=request.constexprs,
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", request.capability, 32),
        options={"num_warps": request.warps, "num_stages": request.stages},
    )
    return {
        "ptx": compiled.asm["ptx"],
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack, as the cuobjdump that Triton brings reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def _main() -> None:
    sys.path[0] = str(ROOT)  # `kernels` as a package of its own: compiling needs no ComfyUI
    requests = [Request(**{**r, "odd": tuple(r["odd"])}) for r in json.load(sys.stdin)]
    answers = [_compile(request) for request in requests]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _main()
