#!/usr/bin/env python3
"""Everything a developer or a first-time user runs: `python dev.py --help`.

Needs only Python 3.10 to 3.13 and a package index; makes the rest itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from devtools import setup_browser, suite
from devtools.common import ROOT, UserError, has_gpu, say
from devtools.setup import Environment, set_up

PASSES_ON = ("test", "check", "serve")
FAST = "not slow and not e2e and not gpu"
# not `python -m pytest`: that puts this folder first on sys.path, where our `nodes` and `utils`
# would hide ComfyUI's
PYTEST = (
    # ended by SIGTERM, as by Ctrl-C: fixtures stop their servers
    "import signal, sys; signal.signal(signal.SIGTERM, signal.default_int_handler); "
    "del sys.path[0]; import pytest; sys.exit(pytest.main())"
)


def run(
    command: Sequence[str | Path],
    env: Environment,
    cwd: Path = ROOT,
    more: Mapping[str, str] | None = None,
) -> int:
    """Run to the end and return the exit status. Ctrl-C goes to the command, which ends by it.

    more: environment variables of the command."""
    child_env = {**os.environ, "COMFYUI_PATH": str(env.comfyui), **(more or {})}
    with subprocess.Popen([str(c) for c in command], cwd=cwd, env=child_env) as process:
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:
                continue
            except SystemExit:
                process.terminate()
                process.wait()
                raise


def pytest(
    env: Environment, arguments: Sequence[str], more: Mapping[str, str] | None = None
) -> int:
    return run([env.python, "-c", PYTEST, *arguments], env, more=more)


def cmd_test(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    browser = setup_browser.environment(env.python) if setup_browser.wanted(extra) else {}
    arguments, more = suite.shared_out(extra, suite.processors(), suite.memory(), has_gpu())
    own = {name: os.environ[name] for name in more if name in os.environ}
    return pytest(env, arguments, more | own | browser)


def cmd_check(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    ruff = [env.python, "-m", "ruff"]
    found = [run([*ruff, "check"], env), run([*ruff, "format", "--check"], env)]
    found.append(pytest(env, ["-m", FAST, *extra]))
    return next((status for status in found if status), 0)


def cmd_serve(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    cpu = [] if has_gpu() or "--cpu" in extra else ["--cpu"]
    return run([env.python, "main.py", *cpu, *extra], env, cwd=env.comfyui)


def cmd_paths(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    say(json.dumps({"python": str(env.python), "comfyui": str(env.comfyui)}))
    return 0


def cmd_precompile(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    say("ModelOpt's CUDA kernels: minutes the first time, needs an NVIDIA GPU and a CUDA compiler")
    # ModelOpt's own `precompile` says nothing of a failure
    code = (
        "from modelopt.torch.quantization import extensions as found\n"
        "for get in (found.get_cuda_ext_mx, found.get_cuda_ext_fp8, found.get_cuda_ext):\n"
        "    print(get(raise_if_failed=True))"
    )
    status = run([env.python, "-c", code], env)
    if status:
        say("dev.py precompile: ModelOpt's CUDA kernels could not be built, for the reason above; "
            "without them its PyTorch code runs", file=sys.stderr)  # fmt: skip
    return status


def make(env: Environment, module: str, more: Mapping[str, str] | None = None) -> int:
    """What a module of devtools makes of the tree, in the venv."""
    # last on sys.path: `nodes` and `utils` must stay ComfyUI's. Ended by SIGTERM, it stops its server
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"sys.path.append({str(ROOT)!r}); del sys.path[0]; "
        f"from devtools import {module}; sys.exit({module}.main())"
    )
    return run([env.python, "-c", code], env, more=more)


def cmd_workflows(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    return make(env, "gallery", setup_browser.environment(env.python))


def cmd_pictures(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    return make(env, "pictures", setup_browser.environment(env.python))


def cmd_locales(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    return make(env, "locales")


def cmd_demo(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    command: list[str | Path] = [env.python, "-u", ROOT / "dev.py", "demo", "--in-venv"]
    for name in ("checkpoint", "format", "layers", "out", "json"):
        if getattr(args, name) is not None:
            command += [f"--{name}", getattr(args, name)]
    return run(command, env, cwd=Path.cwd())


def cmd_import(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    command: list[str | Path] = [env.python, ROOT / "dev.py", "import", args.file, "--in-venv"]
    command += ["--out", args.out] if args.out else []
    return run(command, env, cwd=Path.cwd())


def cmd_bench(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    command: list[str | Path] = [env.python, "-u", ROOT / "dev.py", "bench", "--in-venv"]
    command += ["--quick"] if args.quick else []
    for name in ("family", "arms", "only", "out"):
        if getattr(args, name) is not None:
            command += [f"--{name}", getattr(args, name)]
    return run(command, env, cwd=Path.cwd())


def cmd_torture(env: Environment, args: argparse.Namespace, extra: list[str]) -> int:
    command: list[str | Path] = [env.python, "-u", ROOT / "dev.py", "torture", "--in-venv"]
    for name in ("only", "minutes", "share", "seed", "out"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    return run(command, env, cwd=Path.cwd())


def bench_in_venv(args: argparse.Namespace) -> int:
    from devtools import inprocess

    inprocess.load()
    from comfyui_modelopt.benchmarks.speed.main import main as bench

    try:
        return bench(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def torture_in_venv(args: argparse.Namespace) -> int:
    if not (ROOT / "devtools" / "torture").is_dir():  # the registry's archive is without it
        raise UserError("torture needs a clone of the repository, this is an installed pack")
    return importlib.import_module("devtools.torture.main").main(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dev.py",
        description="ModelOpt for ComfyUI: set up, try, test. Every command first makes what is "
        "missing: .venv, ComfyUI (COMFYUI_PATH, else a pinned one in .comfyui) and the link of "
        "this pack into it. The first time takes some minutes and 8 GB; later, no time.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, text: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text}. {more}".strip())
        sub.set_defaults(function=function)
        return sub

    demo = command(
        "demo",
        cmd_demo,
        "quantize a checkpoint from end to end in a real ComfyUI and say what it cost",
        "Runs example_workflows/api: calibrate on prompts, quantize, save; then, in a second "
        "server, load the file and make a picture.",
    )
    demo.add_argument("--checkpoint", type=Path, metavar="FILE", help="an SD1.5 or SDXL checkpoint "
                      "(default: a small synthetic SD1.5)")  # fmt: skip
    demo.add_argument("--format", default="int8", help="default: int8", choices=["int8", "fp8",
                      "mxfp8", "nvfp4", "int4", "w4a8"])  # fmt: skip
    demo.add_argument("--layers", default="linear + conv", choices=["linear + conv", "linear only"],
                      help="default: linear + conv")  # fmt: skip
    demo.add_argument("--out", type=Path, metavar="FILE", help="where to put the quantized UNet "
                      "(.safetensors; default: stays in .comfyui/demo)")  # fmt: skip
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    demo.add_argument("--in-venv", action="store_true", help=argparse.SUPPRESS)

    foreign = command(
        "import",
        cmd_import,
        "turn a checkpoint that ModelOpt wrote elsewhere into a file for the Load node",
        "Nothing in it is executed.",
    )
    foreign.add_argument("file", type=Path, metavar="FILE", help="a .pt of mto.save, or a folder of "
                         "save_pretrained or export_hf_checkpoint")  # fmt: skip
    foreign.add_argument("--out", type=Path, metavar="FILE", help="the .safetensors to write "
                         "(default: its name, here; never overwrites)")  # fmt: skip
    foreign.add_argument("--in-venv", action="store_true", help=argparse.SUPPRESS)

    bench = command(
        "bench",
        cmd_bench,
        "measure the speed of whole UNets and of every layer shape, against the other ways to run "
        "them",
        "Writes benchmarks/results/speed_….json and .md and, on a GPU and without --quick, the choice "
        "table that loading goes by. Uses the GPU where there is one; no network.",
    )
    bench.add_argument("--quick", action="store_true", help="small models: minutes, also on a CPU")
    bench.add_argument("--family", default="all", choices=["sdxl", "sd15", "all"])
    bench.add_argument("--arms", metavar="A,B", help="whole UNets only in these ways (and eager), as "
                       "named in benchmarks/speed/arms.py (default: all)")  # fmt: skip
    bench.add_argument("--only", choices=["layers", "unet"], help="one half of it")
    bench.add_argument("--out", type=Path, metavar="DIR", help="for the results and the choice "
                       "table (default: benchmarks/results and kernels/choices)")  # fmt: skip
    bench.add_argument("--in-venv", action="store_true", help=argparse.SUPPRESS)
    bench.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)

    torture = command(
        "torture",
        cmd_torture,
        "damaged files, kills, cancels, faults, soak: what the pack must survive",
        "Writes nothing outside its own temporary folders, but for --out. Status 1: it found "
        "something.",
    )
    torture.add_argument("--minutes", type=float, metavar="N", help="stop after about N minutes "
                         "(default: when all cases are done, hours)")  # fmt: skip
    torture.add_argument("--share", type=float, default=1.0, metavar="S", help="of each campaign's "
                         "cases, above 0 (default: 1)")  # fmt: skip
    torture.add_argument("--only", metavar="A,B", help="campaigns, as the modules in "
                         "devtools/torture are named")  # fmt: skip
    torture.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    torture.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON, "
                         "and as a page beside it")  # fmt: skip
    torture.add_argument("--in-venv", action="store_true", help=argparse.SUPPRESS)

    command(
        "test",
        cmd_test,
        "run the test suite",
        "Further arguments go to pytest; without any, several processes share it.",
    )
    command("check", cmd_check, "ruff, then the fast tests", "Further arguments go to pytest.")
    command(
        "serve",
        cmd_serve,
        "run ComfyUI with the pack, to click around in",
        "Further arguments go to ComfyUI. Models go into its models folder (see `paths`).",
    )
    command(
        "precompile",
        cmd_precompile,
        "build ModelOpt's CUDA kernels, so that the first AWQ or SVDQuant does not wait for them",
    )
    command(
        "workflows",
        cmd_workflows,
        "make example_workflows anew from example_workflows/api, in a real page",
        "Needs a browser.",
    )
    command(
        "pictures",
        cmd_pictures,
        "make the pictures of the README and the help pages anew, in a real page",
        "Needs a browser.",
    )
    command(
        "locales",
        cmd_locales,
        "write locales/en from the nodes' names and tooltips",
        "The Chinese ones are written by hand; a test compares both.",
    )
    command("paths", cmd_paths, "print JSON with the python and the comfyui in use")
    return top


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    extra: list[str] = []
    if argv and argv[0] in PASSES_ON and argv[1:2] not in (["-h"], ["--help"]):
        argv, extra = argv[:1], argv[1:]  # argparse would try to understand them
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.command == "bench" and (args.in_venv or args.worker):
            return bench_in_venv(args)
        if args.command == "demo":
            from devtools import demo

            options = demo.check_options(args)  # before the long set-up
            if args.in_venv:
                return demo.main(options)
        if args.command == "import":
            from devtools import importing

            importing.check(args.file, args.out)  # before the long set-up
            if args.in_venv:
                return importing.main(args.file, args.out)
        if args.command == "torture" and args.in_venv:
            return torture_in_venv(args)
        return args.function(set_up(), args, extra)
    except UserError as error:
        say(f"dev.py {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
