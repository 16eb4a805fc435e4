"""Every GEMM and convolution of one UNet call, counted on ComfyUI's own UNetModel without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...devtools import synthetic
from ...quantize.layers import DEFAULT_SKIP

TOKENS = 77


@dataclass(frozen=True)
class Linear:
    """x [m, k] times weight [n, k]."""

    m: int
    n: int
    k: int
    kind: str = field(default="linear", init=False)

    @property
    def key(self) -> str:
        """Names the shape in the choice table."""
        return f"linear {self.m}x{self.n}x{self.k}"

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.n, self.k

    @property
    def rows(self) -> int:
        """M of the matrix product."""
        return self.m

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Conv:
    """x [batch, c, h, w], weight [k, c, r, r]."""

    batch: int
    c: int
    h: int
    w: int
    k: int
    r: int
    stride: int
    padding: int
    kind: str = field(default="conv2d", init=False)

    @property
    def key(self) -> str:
        """Names the shape in the choice table."""
        size = f"{self.batch}x{self.c}x{self.h}x{self.w}->{self.k}"
        return f"conv2d {size} {self.r}x{self.r} s{self.stride} p{self.padding}"

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return tuple((x + 2 * self.padding - self.r) // self.stride + 1 for x in (self.h, self.w))

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.k, self.c, self.r, self.r

    @property
    def rows(self) -> int:
        """M of the matrix product: pixels of the output."""
        p, q = self.out
        return self.batch * p * q

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.k * self.c * self.r * self.r


Shape = Linear | Conv


def of_dict(facts: dict) -> Shape:
    """What `as_dict` gave -> the shape."""
    own = {name: value for name, value in facts.items() if name != "kind"}
    return Linear(**own) if facts["kind"] == "linear" else Conv(**own)


def as_dict(shape: Shape) -> dict:
    """JSON-able."""
    return asdict(shape)


@dataclass
class Count:
    """How often a UNet call runs a shape, and how many of those layers are quantized by default."""

    layers: int = 0
    quantized: int = 0


def count(family: str, size: str, width: int, height: int, batch: int) -> dict[Shape, Count]:
    """Shapes of a UNet call with `batch` latents of width x height pixels, the most work first."""
    meta = {"device": "meta", "dtype": torch.float16, "operations": comfy.ops.disable_weight_init}
    config = synthetic.unet_config(family, size)
    unet = UNetModel(**config, **meta).eval()
    found: dict[Shape, Count] = {}

    def heard(name: str):
        skipped = any(fnmatchcase(name, pattern) for pattern in DEFAULT_SKIP)

        def hook(module, args):
            shape = _shape(module, args[0])
            entry = found.setdefault(shape, Count())
            entry.layers += 1
            entry.quantized += not skipped

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(heard(name))
    half = {"device": "meta", "dtype": torch.float16}
    x = torch.empty(batch, config["in_channels"], height // 8, width // 8, **half)
    context = torch.empty(batch, TOKENS, config["context_dim"], **half)
    pooled = config.get("adm_in_channels")
    y = None if pooled is None else torch.empty(batch, pooled, **half)
    options = {"optimized_attention_override": lambda function, q, *_, **__: torch.empty_like(q)}
    with torch.no_grad():
        t = torch.empty(batch, device="meta")
        unet(x, t, context=context, y=y, transformer_options=options)
    order = sorted(found, key=lambda shape: -shape.flop * found[shape].layers)
    return {shape: found[shape] for shape in order}


def _shape(module: torch.nn.Module, x: torch.Tensor) -> Shape:
    if isinstance(module, torch.nn.Linear):
        return Linear(x.numel() // x.shape[-1], module.out_features, module.in_features)
    return Conv(
        *x.shape, module.out_channels, module.kernel_size[0], module.stride[0], module.padding[0]
    )


def gflop(counts: dict[Shape, Count]) -> dict[str, float]:
    """GFLOP of a UNet call in Linear layers and convolutions by the size of their kernel."""
    total: Counter = Counter()
    for shape, found in counts.items():
        kind = "Linear" if shape.kind == "linear" else f"conv {shape.r}x{shape.r}"
        total[kind] += shape.flop * found.layers / 1e9
    return dict(total)
