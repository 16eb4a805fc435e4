"""What a loaded quantized MODEL is made of, for the report and the chart."""

from __future__ import annotations

from comfy_kitchen.tensor import QuantizedTensor

from ..formats.checkpoint import Layer
from ..utils import provenance
from ..utils.report import kernel_lines, megabytes, model_report
from . import layouts, unet

SCALES = ("input_scale", "pre_quant_scale")


def weight_bytes(model) -> int:
    """Bytes of the UNet's weights as they are held, scales included."""
    return sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())


def describe(model) -> str:
    """The info text of a MODEL of ours. Raises ValueError for any other MODEL."""
    found = unet.loaded(model)
    return model_report(
        found.header, found.layers, unet.kernels(model).values(), weight_bytes(model)
    )


def in_full(model) -> tuple[str, str]:
    """What the node shows and the whole text: how a MODEL of ours was made, and how it runs here.
    Raises ValueError for any other MODEL."""
    found = unet.loaded(model)
    now = [f"Size {megabytes(weight_bytes(model))}", *kernel_lines(unet.kernels(model).values())]
    patches = sum(1 for key in model.patches if key.startswith(unet.UNET))
    if patches:
        now.append(f"{patches} weights carry patches (LoRA) put on top, which the file has not")
    short, whole = (
        "\n".join([*now, *provenance.provenance(found.header, found.layers, full)])
        for full in (False, True)
    )
    return short, whole


def quantized_layers(model) -> dict[str, Layer | str]:
    """Name -> what the file says of each quantized layer of a MODEL of ours; of any other MODEL, the
    format by ComfyUI's name, or the dtype, of each layer held in fewer than 16 bits."""
    found = model.get_attachment(unet.ATTACHMENT)
    if found is not None:
        return dict(found.layers)
    layers: dict[str, Layer | str] = {}
    for name, module in model.model.diffusion_model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, QuantizedTensor):
            layers[name] = getattr(module, "quant_format", None) or weight._layout_cls
        elif weight is not None and weight.dtype.itemsize < 2:
            layers[name] = str(weight.dtype).removeprefix("torch.")
    return layers


def _bits(parameter) -> float:
    """Bits a weight, scales and branches included; what is not quantized has 16 in the file."""
    if not isinstance(parameter, QuantizedTensor):
        return 16
    return 8 * layouts.nbytes(parameter) / parameter.numel()


def blocks(model) -> dict[str, tuple[float, float]]:
    """Block of the UNet -> (average bits per weight, size in MB), in the UNet's order.

    Unquantized weights count as the 16 bits they have in the file.
    """
    totals: dict[str, list[float]] = {}
    for name, parameter in model.model.diffusion_model.named_parameters():
        parts = name.split(".")
        block = ".".join(parts[:2]) if parts[0].endswith("blocks") else parts[0]
        entry = totals.setdefault(block, [0.0, 0.0])
        if parts[-1] in SCALES:  # stock ComfyUI holds them beside the weight
            entry[0] += 8 * parameter.nbytes
            continue
        bits = _bits(parameter)
        entry[0] += parameter.numel() * bits
        entry[1] += parameter.numel()
    return {name: (bits / count, bits / 8e6) for name, (bits, count) in totals.items() if count}
