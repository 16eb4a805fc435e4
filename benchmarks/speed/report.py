"""The result as a Markdown page: machine, whole UNets, where their time goes, layers, choices."""

from __future__ import annotations

from collections.abc import Iterable

from ...utils.report import megabytes
from . import arms, limits, producers
from .candidates import SIXTEEN

NAMES = {"sdxl": "SDXL", "sd15": "SD1.5"}
QUANTIZED = "8-bit x"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped, line ends become spaces."""

    def line(cells: Iterable[str]) -> str:
        clean = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(clean) + " |"

    head = list(head)
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def not_measured(row: dict) -> str | None:
    """Why a row has no figures, in words, or None."""
    if "error" in row:
        return f"failed: {row['error']}"
    if "why_not" in row:
        return f"not measured: {row['why_not']}"
    return None


def in_short(row: dict) -> str:
    """One line on an arm that has just been built."""
    reason = not_measured(row)
    return reason or f"{row['alone']['median_ms']:.2f} ms by itself"


def ms(row: dict) -> str:
    """Median and spread; what has not taken turns with others is marked."""
    if "median_ms" in row:
        return f"{row['median_ms']:.3f} ± {row['iqr_ms'] / 2:.3f}"
    alone = row["alone"]
    return f"{alone['median_ms']:.3f} ± {alone['iqr_ms'] / 2:.3f} (by itself)"


def best_compiled(rows: dict[str, dict]) -> float | None:
    """How much faster than eager the fastest compiled fp16 arm is, each in its own turns."""
    found = (rows.get(name, {}) for name in arms.COMPILED_16)
    return max((row["over_eager"] for row in found if "over_eager" in row), default=None)


def arms_table(family: dict, gpu: str | None) -> str:
    """Every arm that was asked for: time, ratios, limit, memory, warm-up, launches."""
    rows, compiled = family["arms"], best_compiled(family["arms"])
    head = ["arm", "ms a UNet call ± IQR/2", "over eager", "over best compiled fp16"]
    head += ["share of the limit", "SQNR to eager", "weights", "peak VRAM", "first call"]
    head += ["kernels", "launches"]
    lines = []
    for row in rows.values():
        reason = not_measured(row)
        if reason is not None:
            lines.append([row["title"], reason, *[""] * (len(head) - 2)])
            continue
        measured = row.get("median_ms")
        over = compiled and "over_eager" in row and row["over_eager"] / compiled
        share = measured and limits.share(gpu, family["setting"], row["limit"], measured)
        profile = row["profile"]
        lines.append(
            [
                row["title"],
                ms(row) + ("" if row["finite"] else " (NaN!)"),
                _ratio(row.get("over_eager")),
                _ratio(over),
                "" if not share else f"{100 * share:.0f}%",
                f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "",
                megabytes(row["weight_bytes"]),
                megabytes(row["peak_bytes"]) if "peak_bytes" in row else "not measured",
                f"{row['first_call_s']:.1f} s",
                str(profile.get("kernels", "not measured")),
                str(profile.get("launches", "not measured")),
            ]
        )
    return table(head, lines)


def _ratio(value: float | None) -> str:
    return "" if not value else f"{value:.2f}"


def split_table(rows: dict[str, dict]) -> str:
    """Milliseconds of one profiled call by kind of kernel (on a CPU: of operator)."""
    found = {row["title"]: row["profile"]["split_ms"] for row in rows.values() if "profile" in row}
    kinds = sorted({kind for split in found.values() for kind in split})
    lines = [
        [title, *(f"{split[kind]:.3f}" if kind in split else "" for kind in kinds)]
        for title, split in found.items()
    ]
    return table(["ms", *kinds], lines)


def ran_lines(rows: dict[str, dict]) -> list[str]:
    """What the arms say of the kernels that ran."""
    lines = []
    for row in rows.values():
        for said in row.get("kernels", []):
            lines.append(f"- {row['title']}: {said}")
        if row.get("graphs"):
            lines.append(
                f"- {row['title']}: {row['graphs']} graph(s), {row['graph_breaks']} graph break(s)"
            )
        if "ran" in row:
            lines.append(f"- {row['title']}: {row['ran']}")
    return lines


def layers_table(layers: list[dict]) -> str:
    """Every candidate of every shape, losses and failures included."""
    lines = []
    for layer in layers:
        where = [layer["key"], f"{layer['layers']} ({layer['quantized']})"]
        reason = not_measured(layer)
        if reason is not None:
            lines.append([*where, "", reason, "", "", "", ""])
        measured = (row for row in layer["rows"] if "median_ms" in row)
        best = min((row["median_ms"] for row in measured if row["format"] == SIXTEEN), default=None)
        for row in layer["rows"]:
            lines.append([*where, *_candidate_cells(row, best)])
    head = ["shape", "layers (quantized)", "candidate", "ms ± IQR/2", "TFLOP/s", "over 16 bits"]
    return table([*head, "max error", "RMS error"], lines)


def _candidate_cells(row: dict, best: float | None) -> list[str]:
    name = row["candidate"] + (f" ({row['ran']})" if "ran" in row else "")
    reason = not_measured(row)
    if reason is not None:
        return [name, reason, "", "", "", ""]
    if "accumulators_exact" in row:
        errors = ["int32 sums exact" if row["accumulators_exact"] else "int32 SUMS WRONG", ""]
    else:
        errors = [f"{row['max_error']:.1e}", f"{row['rms_error']:.1e}"]
    ratio = "" if best is None else f"{best / row['median_ms']:.2f}"
    return [name, ms(row), f"{row['tflops']:.3g}", ratio, *errors]


def producers_table(measured: list[dict]) -> str:
    """What quantizes on its way out, against PyTorch."""
    lines = []
    for producer in measured:
        where = [producer["kind"], " x ".join(map(str, producer["x"]))]
        if "error" in producer:
            lines.append([*where, "", not_measured(producer), *[""] * 5])
            continue
        for row in producer["rows"]:
            ms_, fused = row["ms"], row["ms"].get(producers.FUSED)
            unfused, plain = ms_[producers.UNFUSED], ms_.get(producers.SIXTEEN)
            lines.append(
                [
                    *where,
                    f"{row['quantized']}, {row['activations']}",
                    f"not measured: {row['why_not']}" if fused is None else f"{fused:.4f}",
                    "" if fused is None else f"{row['gb_s']:.4g}",
                    f"{unfused:.4f}",
                    "" if plain is None else f"{plain:.4f}",
                    _ratio(fused and unfused / fused),
                    "" if fused is None else f"{row['error']:.1e}",
                ]
            )
    head = ["producer", "x", "to", "fused, ms", "GB/s", "unfused, ms", "16 bits, ms"]
    return table([*head, "over unfused", "error"], lines)


def choices_table(choices: list[dict]) -> str:
    """The choice table, without 16 bits' own rows."""
    lines = [
        [
            choice["key"],
            f"{choice['format']}, {choice['activations']}"
            + (f", {QUANTIZED}" if choice["takes"] == "quantized" else ""),
            choice["fastest"],
            f"{choice['ms']:.3f}",
            _ratio(choice["ms_16_bits"] and choice["ms_16_bits"] / choice["ms"]),
            "low precision" if choice["faster_than_16_bits"] else SIXTEEN,
        ]
        for choice in choices
        if choice["format"] != SIXTEEN
    ]
    return table(["shape", "format, activations", "fastest", "ms", "over 16 bits", "faster"], lines)


def machine_lines(where: dict) -> list[str]:
    """Machine and versions."""
    gpu = where["gpu"] or "no GPU"
    if where["capability"]:
        gpu += f" (compute capability {'.'.join(map(str, where['capability']))})"
    names = ("torch", "triton", "comfy-kitchen", "comfyui", "modelopt", "torchao", "sdnq")
    versions = ", ".join(f"{name} {where[name] or 'not installed'}" for name in names)
    backends = ", ".join(f"{n} {s}" for n, s in sorted(where["comfy-kitchen backends"].items()))
    return [
        f"Machine: {gpu}; {where['cpu']}, torch on {where['threads']} thread(s); {where['system']}; "
        f"{where['date']}.",
        f"Versions: {versions}; CUDA {where['cuda'] or 'none'}, Python {where['python']}.",
        f"comfy-kitchen's backends: {backends}.",
    ]


def markdown(result: dict) -> str:
    """The whole page."""
    lines = ["# Speed", "", *machine_lines(result["machine"]), ""]
    lines += ["Made by `python dev.py bench`. Weights and inputs are random, scaled as real ones."]
    if result["quick"]:
        lines += ["**Quick run: small models and few calls. These are no speed claims.**"]
    if result.get("interrupted"):
        lines += ["**The run was interrupted: what is here was measured before.**"]
    for name, family in result["families"].items():
        lines += ["", *_family(NAMES[name], family, result["machine"])]
    return "\n".join(lines) + "\n"


def _family(name: str, family: dict, where: dict) -> list[str]:
    s = family["setting"]
    plan, pixels = s["plan"], s["pixels"]
    work = ", ".join(f"{kind} {value:.4g}" for kind, value in family["gflop"].items())
    lines = [
        f"## {name} ({s['size']}), {pixels} x {pixels} pixels, batch {s['batch']}",
        "",
        f"GFLOP a UNet call: {work}. {plan['warm_up']} warm-up calls, then {plan['rounds']} rounds of "
        f"{plan['repeats']}, arms taking turns in shuffled order, each in a process of its own. Where not all fit into memory "
        "at once, eager fp16 is measured again with each group: ratios to it are of the same turns.",
        "",
        "### Whole UNet",
        "",
    ]
    measured = [row for row in family["arms"].values() if "profile" in row]
    if family["arms"]:
        lines += [arms_table(family, where["gpu"])]
    if measured:
        dtypes = sorted({row["dtype"] for row in measured})
        lines += ["", f"Computed in {', '.join(dtypes)}. Where the time of one call goes:", ""]
        lines += [split_table(family["arms"])]
        lines += ["", *ran_lines(family["arms"])]
    if "arms_why_not" in family:
        lines += [f"Not measured: {family['arms_why_not']}."]
    lines += ["", "### Layers", ""]
    if family["layers"]:
        lines += [layers_table(family["layers"]), "", "### Fastest by shape", ""]
        lines += [choices_table(family["choices"])]
        lines += ["", "### What quantizes on its way out", ""]
        lines += [producers_table(family["producers"])]
    else:
        reason = family.get("layers_why_not", "the run ended before them")
        lines += [f"Not measured: {reason}."]
    return lines
