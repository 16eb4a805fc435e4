"""A recipe: format, algorithm and layers, and the ModelOpt configuration they amount to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..formats import FORMATS, get
from .layers import DEFAULT_SKIP, LINEAR_AND_CONV

MAX = "max"
SMOOTHQUANT = "smoothquant"
# format -> its algorithms, the default first: for int8 the one whose `linear only` files stock
# ComfyUI opens, although smoothquant measures better
ALGORITHMS = {"fp8": (MAX,), "int8": (MAX, SMOOTHQUANT)}
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True)
class Recipe:
    """format: a name of FORMATS; algorithm: one of ALGORITHMS[format]; alpha: SmoothQuant's, 0 to 1;
    layers: a mode of quantize.layers; skip: patterns of layer names."""

    format: str
    algorithm: str = MAX
    alpha: float = DEFAULT_ALPHA
    layers: str = LINEAR_AND_CONV
    skip: tuple[str, ...] = DEFAULT_SKIP

    def __post_init__(self) -> None:
        get(self.format)
        if self.algorithm not in ALGORITHMS[self.format]:
            raise ValueError(
                f"algorithm of {self.format} must be one of "
                f"{', '.join(ALGORITHMS[self.format])}, got {self.algorithm!r}"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")

    def needs_calibration(self, kinds: set[str]) -> bool:
        """Whether layers of these kinds need recorded activations under this recipe."""
        return self.algorithm == SMOOTHQUANT or any(
            FORMATS[self.format].needs_input_scale(kind) for kind in kinds
        )

    def describe(self) -> dict:
        """JSON-able, for the file header; only what applies."""
        facts = asdict(self)
        facts["skip"] = list(self.skip)
        if self.algorithm != SMOOTHQUANT:
            del facts["alpha"]
        return facts

    def smooths(self, kind: str) -> bool:
        """Whether layers of this kind get a smoothing scale (SmoothQuant is for Linears)."""
        return self.algorithm == SMOOTHQUANT and kind == "linear"


WEIGHTS = {"int8": {"num_bits": 8, "axis": 0}, "fp8": {"num_bits": (4, 3), "axis": None}}
STATIC = {"int8": {"num_bits": 8, "axis": None}, "fp8": {"num_bits": (4, 3), "axis": None}}
# one scale a token, taken from the token itself while the model runs
PER_TOKEN = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
# the largest magnitude of each input channel, which SmoothQuant balances against the weight's
PER_CHANNEL = {"num_bits": 8, "axis": -1}


def input_config(recipe: Recipe, kind: str) -> dict:
    """ModelOpt's attributes of the input quantizer while a layer of this kind is calibrated."""
    if recipe.smooths(kind):
        return PER_CHANNEL
    if FORMATS[recipe.format].needs_input_scale(kind):
        return STATIC[recipe.format]
    return PER_TOKEN


def modelopt_config(recipe: Recipe, layers: dict[str, str], everything: list[str]) -> dict:
    """The `config` of `mtq.quantize` (list form of quant_cfg, ModelOpt 0.44 on).

    layers: name -> kind of those to quantize; everything: names of all modules ModelOpt converts.
    ModelOpt's presets are not used as they stand: they disable `*proj_out.*` (a language model's
    head), which in ComfyUI's names is the last layer of every SpatialTransformer.
    """
    entries: list[dict] = [{"quantizer_name": "*", "enable": False}]
    linear = input_config(recipe, "linear")
    entries += [
        {"quantizer_name": "*weight_quantizer", "cfg": WEIGHTS[recipe.format]},
        {"quantizer_name": "*input_quantizer", "cfg": linear},
    ]
    for name, kind in layers.items():
        config = input_config(recipe, kind)
        if config != linear:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": config})
    entries += [
        {"quantizer_name": f"{name}.*", "enable": False}
        for name in everything
        if name not in layers
    ]
    return {"quant_cfg": entries, "algorithm": "max"}
