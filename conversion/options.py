"""The command line of `convert.py`: its settings are those of the nodes, from the same tables."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..formats import FORMATS
from ..quantize import mixed, prompts, words
from ..quantize.layers import DEFAULT_SKIP, LINEAR_ONLY, MODES
from ..quantize.mixed import Mixed
from ..quantize.prompts import BUILT_IN, Sampling
from ..quantize.recipe import (
    ACTIVATIONS,
    ALGORITHMS,
    CHOICES,
    CONVOLUTIONS,
    LIMITS,
    MAX,
    OPTIONS,
    WEIGHTS,
    Recipe,
    default_algorithm,
    may_calibrate,
    recipe_of,
)
from . import paths
from .claims import PATIENCE
from .paths import UsageError

KINDS = {"alpha": float, "percentile": float, "rank": int}
METAVARS = {int: "N", float: "X", str: "TEXT"}
# of --lora, as on Load LoRA
STRENGTHS = (-100.0, 100.0)
# settings that a recipe from a file does not leave open
OF_RECIPE = ("format", "algorithm", *KINDS, "convolutions", "weights", "activations", "layers")
OF_RECIPE += ("skip", "skip_also")
ABOUT = """\
Quantize the UNets of many checkpoints with NVIDIA ModelOpt, one file each, without a browser: what
Quantize UNet and Save Quantized UNet do, by the same code. Runs with the Python of any ComfyUI
installation."""
EXIT = """\
A file is skipped where its output is there, made from the same bytes by the same recipe, LoRAs and
calibration. What is there and was made otherwise is never overwritten: that file fails.
Several processes, on several GPUs or machines, can be given the same files and the same --out: each
file is made by one of them. What was interrupted is continued by the same command.

exit status: 0 all converted, skipped or in another process's hands; 1 some failed (the summary says
which and why, the rest is done); 2 the command is wrong, nothing was done; 130 and 143 interrupted
"""


@dataclass(frozen=True)
class Lora:
    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class Order:
    """What to do. files: no two of one name. recordings: a calibration file; where None, `prompts` are
    sampled, and where that is empty nothing is recorded. suffix: of the outputs' names."""

    files: tuple[Path, ...]
    out: Path
    recipe: Recipe | Mixed
    loras: tuple[Lora, ...] = ()
    recordings: Path | None = None
    prompts: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    suffix: str = ""
    wait: bool = False
    patience: float = PATIENCE

    def output(self, file: Path) -> Path:
        return self.out / f"{file.stem}_{self.suffix}.safetensors"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="convert.py",
        description=ABOUT,
        allow_abbrev=False,
        epilog=EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("files", nargs="+", type=Path, metavar="CHECKPOINT", help="SDXL or SD1.5 "
                     "checkpoints; with --calibration also files of a diffusion model alone")  # fmt: skip
    top.add_argument("--out", type=Path, required=True, metavar="DIR",
                     help="folder for the files, made where it is missing")  # fmt: skip
    _add_recipe(top.add_argument_group("recipe, as on Quantize UNet"))
    _add_calibration(top.add_argument_group("calibration"))
    _add_run(top.add_argument_group("run"))
    return top


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=CHOICES, help=f"default: {CHOICES[0]}. "
                       + "; ".join(f"{name}: {FORMATS[name].TITLE}" for name in CHOICES))  # fmt: skip
    known = "; ".join(f"{name}: {', '.join(ALGORITHMS[name])}" for name in CHOICES)
    texts = " ".join(words.ALGORITHMS.values())
    group.add_argument("--algorithm", metavar="NAME", help=f"{known}; default: the format's first, {MAX} for int8 with --layers \"{LINEAR_ONLY}\". "
                       f"{texts}")  # fmt: skip
    for name, kind in KINDS.items():
        low, high = LIMITS[name]
        owner = next(algorithm for algorithm, own in OPTIONS.items() if name in own)
        group.add_argument(f"--{name}", type=kind, metavar=METAVARS[kind], help=f"{low:g} to {high:g}, default: "
                           f"{getattr(Recipe, name):g} ({owner}). {words.RECIPE[name]}")  # fmt: skip
    group.add_argument("--convolutions", choices=CONVOLUTIONS, help="default: "
                       f"{Recipe.convolutions} (smoothquant). {words.RECIPE['convolutions']}")  # fmt: skip
    group.add_argument("--weights", choices=WEIGHTS["fp8"], help=f"default: {WEIGHTS['fp8'][0]} "
                       f"(fp8). {words.RECIPE['weights']}")  # fmt: skip
    group.add_argument("--activations", choices=ACTIVATIONS["fp8"], help=f"default: {Recipe.activations} (fp8). "
                       f"{words.RECIPE['activations']}")  # fmt: skip
    group.add_argument("--layers", choices=MODES, help=f"default: {Recipe.layers}. "
                       f"{words.RECIPE['layers']}")  # fmt: skip
    group.add_argument("--skip", action="append", metavar="PATTERN", help="layers to leave in 16 bits "
                       f"instead of {', '.join(DEFAULT_SKIP)}; names with * and ?, can be repeated")  # fmt: skip
    group.add_argument("--skip-also", action="append", metavar="PATTERN",
                       help="layers to leave in 16 bits beside those")  # fmt: skip
    group.add_argument("--recipe", type=Path, metavar="FILE", help="the recipe that Auto Quantize UNet "
                       "gave, as JSON, in place of all of these")  # fmt: skip
    group.add_argument("--lora", action="append", metavar="FILE[:STRENGTH]", help="a LoRA to bake in, "
                       "as Load LoRA does (strength 1 unless given); can be repeated")  # fmt: skip
    group.add_argument("--suffix", metavar="TEXT", help="the outputs are CHECKPOINT_TEXT.safetensors "
                       "(default: the recipe in a word, such as fp8-mse-linear)")  # fmt: skip


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument("--calibration", type=Path, metavar="FILE", help="a recording of Save "
                        "Calibration, for all checkpoints: they must have its architecture")  # fmt: skip
    source.add_argument("--prompts", type=Path, metavar="FILE", help="text, one prompt a line, to "
                        f"sample with each checkpoint (default: the node's list of {len(BUILT_IN)}, "
                        "where the recipe needs recorded activations)")  # fmt: skip
    for name, default in _sampling_fields().items():
        shown = f" Default: {default}." if default != "" else ""
        kind = type(default)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=METAVARS[kind],
                           help=f"{words.SAMPLING[name]}{shown}")  # fmt: skip


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--comfyui", type=Path, metavar="DIR", help="folder of ComfyUI's main.py "
                       "(default: COMFYUI_PATH, else the ComfyUI in whose custom_nodes this lies)")  # fmt: skip
    group.add_argument("--device", metavar="N", help="which of the GPUs that are visible, from 0 on, or "
                       "cpu (default: the first; cpu where there is none)")  # fmt: skip
    group.add_argument("--wait", action="store_true", help="at the end, wait for files that other "
                       "processes are at, and make those that they leave")  # fmt: skip
    group.add_argument("--claim-timeout", type=float, default=PATIENCE, metavar="SECONDS",
                       help="after which a process of another machine that gives no sign of life is "
                       f"taken for dead (default: {PATIENCE:g}; of this machine: at once)")  # fmt: skip
    group.add_argument("--progress", type=Path, metavar="FILE", help="where to keep what is being done "
                       "now, as JSON, written anew about once a second")  # fmt: skip
    group.add_argument("--summary", type=Path, metavar="FILE", help="where to keep the outcome of each "
                       "file, as JSON, written anew after each")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print that summary at the end")
    group.add_argument("--quiet", action="store_true", help="say nothing but what failed")


def _sampling_fields() -> dict[str, Any]:
    return {one.name: one.default for one in fields(Sampling)}


def order(args: argparse.Namespace) -> Order:
    """Raises UsageError."""
    try:
        found = _order(args)
        paths.check_names(found)
        paths.check_kept(args, found)
        return found
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:  # a name that is too long, a disk that is gone
        raise UsageError(
            f"files must be where they can be looked at, got {error}: correct the path"
        ) from error


def _order(args: argparse.Namespace) -> Order:
    recipe = _recipe(args)
    loras = tuple(map(_lora, args.lora or ()))
    given = {k: x for k in _sampling_fields() if (x := getattr(args, k)) is not None}
    recordings, lines = _calibration(args, recipe)
    if given and not lines:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"{flags} go with prompts that are sampled, which this command does not do: leave "
            "them out, or give --prompts"
        )
    sampling = Sampling(**given)
    if args.claim_timeout <= 0:
        raise UsageError(f"--claim-timeout must be above 0, got {args.claim_timeout:g}: correct it")
    suffix = args.suffix if args.suffix is not None else word(recipe)
    if not suffix or set(suffix) & set('/\\:*?"<>|\0\n'):
        raise UsageError(
            f"--suffix must be part of a file's name, got {suffix!r}: use letters, digits, - and _"
        )
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out must be a folder, {args.out} is a file: name another")
    return Order(
        paths.found(args.files), args.out, recipe, loras, recordings, lines, sampling, suffix,
        args.wait, args.claim_timeout,
    )  # fmt: skip


def _recipe(args: argparse.Namespace) -> Recipe | Mixed:
    if args.recipe is not None:
        if beside := [name for name in OF_RECIPE if getattr(args, name) is not None]:
            raise UsageError(
                f"--recipe says it all, got --{beside[0].replace('_', '-')} beside it: leave it out"
            )
        return mixed.read(paths.text(args.recipe, "--recipe"), str(args.recipe))
    name = args.format or CHOICES[0]
    layers = args.layers or Recipe.layers
    algorithm = args.algorithm or default_algorithm(name, layers)
    own = {"algorithm": algorithm}
    for option in ("alpha", "convolutions", "percentile", "rank"):
        value = getattr(args, option)
        if value is None:
            continue
        if option not in OPTIONS.get(algorithm, ()):
            owners = [x for x, options in OPTIONS.items() if option in options]
            raise UsageError(
                f"--{option} is an option of {' and '.join(owners)}, got it with the algorithm "
                f"{algorithm}: leave it out, or choose that algorithm"
            )
        own[option] = value
    chosen = {"format": name, "algorithm": own}
    for option, owners in (("weights", WEIGHTS), ("activations", {"fp8": ()})):
        value = getattr(args, option)
        if value is not None and name not in owners:
            raise UsageError(
                f"--{option} is an option of {', '.join(owners)}, got it with the format {name}: "
                "leave it out, or choose that format"
            )
        chosen[option] = value
    if args.weights == WEIGHTS["fp8"][1] and args.algorithm is None:
        own["algorithm"] = ""  # those weights have an algorithm of their own
    skip = [*(args.skip or DEFAULT_SKIP), *(args.skip_also or ())]
    return recipe_of(chosen, layers, "\n".join(skip))


def _calibration(
    args: argparse.Namespace, recipe: Recipe | Mixed
) -> tuple[Path | None, tuple[str, ...]]:
    if args.calibration is not None:
        return paths.existing(args.calibration, "--calibration"), ()
    if args.prompts is not None:
        text = paths.text(args.prompts, "--prompts")
        prompts.check(text, args.prompts)
        lines = tuple(prompts.split(text))
        if not lines:
            raise UsageError(
                f"a calibration needs at least 1 prompt, got 0 in {args.prompts}: write one a line"
            )
        return None, lines
    return None, BUILT_IN if any(map(may_calibrate, mixed.used(recipe))) else ()


def _lora(text: str) -> Lora:
    name, colon, strength = text.rpartition(":")
    if Path(text).is_file():
        colon = ""  # in the name
    try:
        found = Lora(Path(name), float(strength)) if colon else Lora(Path(text))
    except ValueError:  # a colon in the name
        found = Lora(Path(text))
    paths.existing(found.path, "--lora")
    low, high = STRENGTHS
    if not low <= found.strength <= high:  # nan too
        raise UsageError(
            f"the strength of a --lora must be from {low:g} to {high:g}, got {strength} for "
            f"{found.path}: correct it"
        )
    return found


def word(recipe: Recipe | Mixed) -> str:
    """A recipe as part of a file's name: format, algorithm, options that are not the default ones,
    `linear` without convolutions. Skip patterns are not in it."""
    if isinstance(recipe, Mixed):
        return "mixed"
    parts = [recipe.format, recipe.algorithm]
    for name in OPTIONS.get(recipe.algorithm, ()):
        value = getattr(recipe, name)
        if value != getattr(Recipe, name):
            parts.append(f"{name}{value:g}" if name in LIMITS else f"{name}_{value}")
    if recipe.activations != Recipe.activations:
        parts.append(recipe.activations.replace(" ", "_"))
    if recipe.layers == LINEAR_ONLY:
        parts.append("linear")
    return "-".join(parts)
