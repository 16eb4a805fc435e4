"""The set-up behind dev.py, in temporary folders, and the server that the other tests drive."""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_modelopt.devtools import comfyui as comfy
from comfyui_modelopt.devtools import common, demo, setup, suite, workflows
from comfyui_modelopt.devtools.common import ROOT, UserError
from comfyui_modelopt.devtools.server import ComfyServer, PromptRejected, ServerDied
from safetensors.torch import save_file


def make_comfyui(folder: Path, version: str = comfy.VERSION) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def run_dev(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "dev.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


# --- linking the pack ---


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    (tmp_path / "pack").mkdir()
    return tmp_path / "pack"


def test_link_is_made_once(tmp_path: Path, pack: Path):
    nodes = tmp_path / "ComfyUI" / "custom_nodes"
    link = common.link_pack(nodes, pack)
    assert link == nodes / common.PACK_NAME
    assert link.resolve() == pack
    assert common.link_pack(nodes, pack) == link
    assert [entry.name for entry in nodes.iterdir()] == [common.PACK_NAME]


def test_link_under_another_name_is_enough(tmp_path: Path, pack: Path):
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    common.make_link(nodes / "my-own-name", pack)
    assert common.link_pack(nodes, pack) == nodes / "my-own-name"
    assert [entry.name for entry in nodes.iterdir()] == ["my-own-name"]


def test_pack_that_lies_in_custom_nodes_is_not_linked(tmp_path: Path, pack: Path):
    assert common.link_pack(tmp_path, pack) == pack
    assert [entry.name for entry in tmp_path.iterdir()] == ["pack"]


@pytest.mark.parametrize("target_exists", [True, False])
def test_stale_link_is_replaced_with_a_message(tmp_path: Path, pack: Path, capsys, target_exists):
    nodes, old = tmp_path / "custom_nodes", tmp_path / "old"
    nodes.mkdir()
    old.mkdir()
    common.make_link(nodes / common.PACK_NAME, old)
    if not target_exists:
        old.rmdir()
    assert common.link_pack(nodes, pack).resolve() == pack
    captured = capsys.readouterr()
    assert str(old) in captured.err and captured.out == ""
    assert old.exists() == target_exists


def test_real_folder_of_our_name_is_never_touched(tmp_path: Path, pack: Path):
    copy = tmp_path / "custom_nodes" / common.PACK_NAME
    copy.mkdir(parents=True)
    (copy / "work.txt").write_text("mine")
    with pytest.raises(UserError, match="another copy"):
        common.link_pack(copy.parent, pack)
    assert (copy / "work.txt").read_text() == "mine"
    assert not common.is_link(copy)


# --- which ComfyUI ---


def test_comfyui_path_unset_or_good(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert comfy.user_comfyui() is None
    folder = make_comfyui(tmp_path / "ComfyUI", "9.9.9")  # any version of the user's is welcome
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    assert comfy.user_comfyui() == folder


def test_comfyui_path_that_is_no_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="not a folder.*unset it"):
        comfy.user_comfyui()


def test_comfyui_path_that_is_not_comfyui(tmp_path: Path, monkeypatch):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"has no comfy, comfyui_version\.py"):
        comfy.user_comfyui()


def test_pinned_comfyui_must_be_whole_and_the_pinned_version(tmp_path: Path):
    assert comfy.pinned_comfyui(tmp_path) is None
    folder = make_comfyui(tmp_path / "ComfyUI")
    assert comfy.pinned_comfyui(tmp_path) == folder
    (folder / "comfyui_version.py").write_text('__version__ = "0.1.0"\n')
    assert comfy.pinned_comfyui(tmp_path) is None


# --- unpacking ComfyUI ---


def make_archive(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link_member(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_only_the_folder_is_unpacked(tmp_path: Path):
    members = {"top/vendor/ComfyUI/a/b.txt": b"x", "top/vendor/ComfyUIx/c": b"", "top/d": b""}
    archive = make_archive(tmp_path / "a.tar.gz", members)
    comfy.extract(archive, "top/vendor/ComfyUI", tmp_path / "out")
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert files == [Path("a/b.txt")]
    assert (tmp_path / "out/a/b.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    "member",
    [
        "top/vendor/ComfyUI/../../../escaped",
        "top/vendor/ComfyUI/a/..\\..\\..\\escaped",
        "top/vendor/ComfyUI/C:/escaped",
        link_member("top/vendor/ComfyUI/link", "/"),
        link_member("top/vendor/ComfyUI/link", "../../.."),
    ],
    ids=["up", "backslashes", "drive", "link to the root", "link up"],
)
def test_unsafe_members_are_refused(tmp_path: Path, member):
    name = member if isinstance(member, str) else member.name
    content = b"" if isinstance(member, str) else member
    archive = make_archive(tmp_path / "a.tar.gz", {name: content})
    with pytest.raises(UserError, match="may not be unpacked"):
        comfy.extract(archive, "top/vendor/ComfyUI", tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("link"))


def test_archive_without_the_folder_is_refused(tmp_path: Path):
    archive = make_archive(tmp_path / "a.tar.gz", {"top/other": b""})
    with pytest.raises(UserError, match="has no folder"):
        comfy.extract(archive, "top/vendor/ComfyUI", tmp_path / "out")


def fetch_from(archive: Path, monkeypatch, sha256: str | None = None):
    """Let `fetch` find `archive` where pip would have put it."""

    def download(python: Path, temp: Path) -> Path:
        return Path(shutil.copy(archive, temp))

    monkeypatch.setattr(comfy, "_download", download)
    monkeypatch.setattr(comfy, "SHA256", sha256 or hashlib.sha256(archive.read_bytes()).hexdigest())


def whole_archive(path: Path) -> Path:
    version = f'__version__ = "{comfy.VERSION}"'.encode()
    files = {"main.py": b"", "comfy/x.py": b"", "requirements.txt": b""}
    files["comfyui_version.py"] = version
    return make_archive(path, {f"{comfy.FOLDER}/{name}": data for name, data in files.items()})


def test_fetch_unpacks_and_leaves_nothing_else(tmp_path: Path, monkeypatch):
    fetch_from(whole_archive(tmp_path / "a.tar.gz"), monkeypatch)
    cache = tmp_path / "cache"
    assert comfy.fetch(Path(sys.executable), cache) == comfy.pinned_comfyui(cache)
    assert [entry.name for entry in cache.iterdir()] == ["ComfyUI"]


def test_wrong_hash_unpacks_nothing(tmp_path: Path, monkeypatch):
    fetch_from(whole_archive(tmp_path / "a.tar.gz"), monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match="sha256"):
        comfy.fetch(Path(sys.executable), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_unpacking_is_not_taken_for_whole(tmp_path: Path, monkeypatch):
    fetch_from(whole_archive(tmp_path / "a.tar.gz"), monkeypatch)
    done = []

    def copy(source, out):
        if done:
            raise KeyboardInterrupt
        done.append(out.write(source.read()))

    monkeypatch.setattr(comfy.shutil, "copyfileobj", copy)
    with pytest.raises(KeyboardInterrupt):
        comfy.fetch(Path(sys.executable), tmp_path / "cache")
    assert comfy.pinned_comfyui(tmp_path / "cache") is None


def test_half_a_comfyui_is_moved_aside_not_deleted(tmp_path: Path, monkeypatch):
    fetch_from(whole_archive(tmp_path / "a.tar.gz"), monkeypatch)
    cache = tmp_path / "cache"
    (cache / "ComfyUI" / "models").mkdir(parents=True)
    (cache / "ComfyUI" / "models" / "mine.safetensors").touch()
    comfy.fetch(Path(sys.executable), cache)
    assert comfy.pinned_comfyui(cache)
    assert len(list(cache.glob("ComfyUI-aside-*/models/mine.safetensors"))) == 1


# --- the venv ---


@pytest.fixture(scope="session")
def bare_venv(tmp_path_factory) -> Path:
    """A venv with nothing but pip's place: quick to make, no network."""
    venv = tmp_path_factory.mktemp("venv") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    return venv


def test_venv_without_python_is_broken(tmp_path: Path):
    (tmp_path / ".venv").mkdir()
    assert "has no" in setup.broken(tmp_path / ".venv")


def test_venv_without_pip_is_broken(bare_venv: Path):
    assert setup.broken(bare_venv) == "it has no working pip"


@pytest.mark.skipif(os.name == "nt", reason="writes a shell script as python")
@pytest.mark.parametrize(
    "script, reason",
    [
        ("exit 1", "does not start"),
        ("echo 3 8 $0", r"3\.8, supported are"),
        ("echo 3 14 $0", r"3\.14, supported are"),
        ("echo 3 11 /elsewhere", "is that of /elsewhere"),
    ],
)
def test_venv_with_a_python_that_does_not_fit_is_broken(tmp_path: Path, script: str, reason: str):
    python = common.venv_python(tmp_path)
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    assert re.search(reason, setup.broken(tmp_path))


def test_broken_venv_is_made_anew(tmp_path: Path, monkeypatch, capsys):
    venv = tmp_path / ".venv"
    (venv / "lib").mkdir(parents=True)
    monkeypatch.setattr(setup, "NEEDED_BYTES", 0)
    setup.make_venv(venv)
    assert "broken (it has no" in capsys.readouterr().err
    assert setup.broken(venv) is None
    before = common.venv_python(venv).lstat().st_mtime_ns
    setup.make_venv(venv)  # and a good one is left alone
    assert common.venv_python(venv).lstat().st_mtime_ns == before


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(setup, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(UserError, match="GB free"):
        setup.make_venv(tmp_path / ".venv")
    assert list(tmp_path.iterdir()) == []


def test_probe_names_the_missing_package(bare_venv: Path):
    assert "torch" in setup.probe(bare_venv)


def test_stamp_covers_what_decides_the_installation(tmp_path: Path, monkeypatch):
    folder = make_comfyui(tmp_path / "ComfyUI")
    first = setup.wanted_stamp(folder)
    assert setup.wanted_stamp(folder) == first
    (folder / "requirements.txt").write_text("torch\neinops\n")
    second = setup.wanted_stamp(folder)
    monkeypatch.setattr(setup, "TOOLS", [*setup.TOOLS, "x==1"])
    assert len({first, second, setup.wanted_stamp(folder)}) == 3


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_damaged_stamp_counts_as_none(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / setup.STAMP).write_text(content)
    assert setup.read_stamp(tmp_path) is None


def test_failed_installation_leaves_no_stamp(tmp_path: Path, monkeypatch):
    (tmp_path / setup.STAMP).write_text(json.dumps({"installed": "old"}))

    def fail(*_):
        raise UserError("no network")

    monkeypatch.setattr(setup, "pip", fail)
    with pytest.raises(UserError):
        setup.install(tmp_path, make_comfyui(tmp_path / "ComfyUI"), "new")
    assert setup.read_stamp(tmp_path) is None


def test_lock_makes_the_second_one_wait(tmp_path: Path, capsys):
    order = []

    def second() -> None:
        with setup.lock(tmp_path / "lock"):
            order.append("second")

    with setup.lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert "Waiting" in capsys.readouterr().err


# --- the command line ---


def test_paths_prints_json_and_nothing_else():
    done = run_dev("paths")
    assert done.returncode == 0, done.stderr
    paths = json.loads(done.stdout)
    assert sorted(paths) == ["comfyui", "python"]
    assert all(Path(p).is_absolute() and Path(p).exists() for p in paths.values())


def test_user_errors_have_no_traceback():
    done = run_dev("paths", COMFYUI_PATH=str(ROOT / "nowhere"))
    assert done.returncode == 1
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert "COMFYUI_PATH" in done.stderr


def test_pytest_arguments_and_exit_status_go_through():
    done = run_dev("test", "-q", "--collect-only", "no-such-file.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no-such-file.py" in done.stderr + done.stdout


@pytest.mark.parametrize(
    "extra, processors, memory, gpu, workers, threads",
    [
        ([], 2, 24, False, 2, 1),
        ([], 64, 256, False, 4, 16),
        ([], 8, 16, False, 3, 2),
        ([], 8, 8, False, None, None),
        ([], 1, 24, False, None, None),
        ([], 64, 256, True, None, None),
        (["-q"], 64, 256, False, None, None),
    ],
    ids=["two", "many", "little memory", "least memory", "one", "gpu", "arguments"],
)
def test_processes_share_the_whole_suite_alone(extra, processors, memory, gpu, workers, threads):
    assert suite.processors() >= 1 and suite.memory() > 2**30
    arguments, variables = suite.shared_out(extra, processors, memory << 30, gpu)
    if workers is None:
        assert (arguments, variables) == (extra, {})
    else:
        assert arguments == ["-n", str(workers), *suite.SHARED_OUT]
        assert variables == {"OMP_NUM_THREADS": str(threads)}


def test_unknown_arguments_of_other_commands_are_refused():
    assert run_dev("paths", "--nonsense").returncode == 2


def test_dependencies_are_the_requirements():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert project["dependencies"] == [x for x in lines if x and not x.startswith("#")]
    assert not any(x.startswith("torch") for x in project["dependencies"])
    assert all(importlib.metadata.version(x.split(">")[0]) for x in project["dependencies"])


# --- the demo's options and workflows ---


def demo_args(**given) -> SimpleNamespace:
    names = {"checkpoint": None, "format": "int8", "layers": "linear only", "out": None}
    return SimpleNamespace(**names | {"json": None} | given)


@pytest.mark.parametrize("option", ["checkpoint", "out", "json"])
def test_demo_refuses_paths_that_cannot_work(tmp_path: Path, option: str):
    with pytest.raises(UserError, match=f"--{option}"):
        demo.check_options(demo_args(**{option: tmp_path / "nowhere" / "x.safetensors"}))


def test_demo_does_not_overwrite(tmp_path: Path):
    out = tmp_path / "x.safetensors"
    demo.check_options(demo_args(out=out))
    out.touch()
    with pytest.raises(UserError, match="exists already"):
        demo.check_options(demo_args(out=out))
    assert demo.free_name(out) == tmp_path / "x-2.safetensors"


def test_demo_tells_what_comfyui_could_not_read(tmp_path: Path):
    error = {"exception_type": "KeyError", "exception_message": "101\n"}
    path = tmp_path / "x.ckpt"
    told = demo.failure(error | {"node_type": "CheckpointLoaderSimple"}, path)
    assert told.startswith("--checkpoint must name a checkpoint that ComfyUI loads")
    assert str(path) in told and "(KeyError: 101)" in told
    assert demo.failure(error | {"node_type": "KSampler"}, path) == "KSampler: 101"


def test_demo_refuses_other_suffixes(tmp_path: Path):
    (tmp_path / "x.bin").touch()
    with pytest.raises(UserError, match="checkpoint"):
        demo.check_options(demo_args(checkpoint=tmp_path / "x.bin"))
    with pytest.raises(UserError, match="must end in"):
        demo.check_options(demo_args(out=tmp_path / "x.bin"))


def test_demo_samples_sdxl_at_its_own_size(checkpoints, tmp_path):
    names = ["conditioner.embedders.0.transformer.text_model", "conditioner.embedders.1.model"]
    sdxl = tmp_path / "sdxl.safetensors"
    save_file({f"{name}.final_layer_norm.bias": torch.zeros(2) for name in names}, sdxl)
    for checkpoint, side in ((checkpoints / "sd15.safetensors", 512), (sdxl, 1024)):
        for workflow in demo.workflows_for(checkpoint):
            for name in ("width", "height"):
                found = {x["inputs"][name] for x in workflow.values() if name in x["inputs"]}
                assert found == {side}


def test_demo_takes_a_pickle_for_sd15(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04 not a safetensors file")
    assert not demo.is_sdxl(path)


def test_defaults_of_a_nested_combo():
    inner = [{"key": "a", "inputs": {"required": {"alpha": ["FLOAT", {"default": 0.5}]}}}]
    outer = {"algorithm": ["COMFY_DYNAMICCOMBO_V3", {"options": inner}]}
    outer |= {"mode": ["COMBO", {"options": ["x", "y"], "default": "y"}], "old": [["p", "q"]]}
    options = [{"key": "fp8", "inputs": {}}, {"key": "int8", "inputs": {"required": outer}}]
    assert workflows.option_defaults(options, "fp8", "format") == {}
    assert workflows.option_defaults(options, "int8", "format") == {
        "format.algorithm": "a",
        "format.algorithm.alpha": 0.5,
        "format.mode": "y",
        "format.old": "p",
    }
    with pytest.raises(UserError, match="'int3' is not one of"):
        workflows.option_defaults(options, "int3", "format")


# --- a server ---


@pytest.mark.e2e
def test_server_starts_answers_refuses_and_stops(tmp_path: Path):
    comfyui = json.loads(run_dev("paths").stdout)["comfyui"]
    with ComfyServer(comfyui, tmp_path / "base", pack=False) as server:
        assert server.get("/system_stats")["system"]["comfyui_version"]
        assert server.object_info("KSampler")["output"] == ["LATENT"]
        assert server.object_info("ModelOptQuantize") == {}
        node = {"class_type": "VAELoader", "inputs": {"vae_name": "absent"}}
        with pytest.raises(PromptRejected):
            server.run({"1": node})
        process = server.process
        process.kill()
        process.wait()
        with pytest.raises((ServerDied, ConnectionError)):
            server.run({"1": node})
    assert process.poll() is not None
    assert not list((tmp_path / "base" / "custom_nodes").iterdir())


@pytest.mark.e2e
def test_server_that_cannot_start_says_why(tmp_path: Path):
    comfyui = json.loads(run_dev("paths").stdout)["comfyui"]
    server = ComfyServer(comfyui, tmp_path, pack=False, args=["--no-such-option"])
    with pytest.raises(ServerDied, match="unrecognized arguments: --no-such-option"):
        server.start()
    assert server.process is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU builds them")
def test_precompile_without_a_gpu_fails_and_says_why():
    """With this Python, whose ModelOpt names what is missing."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, types; sys.path.insert(0, sys.argv[1]); import dev; "
            "here = types.SimpleNamespace(python=sys.executable, comfyui=None); "
            "dev.run = lambda command, *_: dev.subprocess.run(command).returncode; "
            "sys.exit(dev.cmd_precompile(here, None, []))",
            str(ROOT),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "CUDA is not available" in done.stderr and "could not be built" in done.stderr


# --- what dev.py starts, ended by SIGTERM ---

STUB = """
import sys, time, types

def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)

sys.modules["devtools"] = types.SimpleNamespace(stub=types.SimpleNamespace(main=main))
"""
FIXTURE = """
import time

import pytest


@pytest.fixture
def server():
    yield
    print("tidied up", flush=True)


def test_long(server):
    print("begun", flush=True)
    time.sleep(60)
"""


def ended(command: list[str], cwd: Path) -> str:
    """What a process prints that gets a SIGTERM once it has begun."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if "begun" in line:
                break
        process.terminate()
        return printed + process.stdout.read()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("what", ["make", "test"])
def test_sigterm_lets_what_dev_py_started_tidy_up(what, tmp_path, monkeypatch):
    """A server of `dev.py pictures`, of `dev.py workflows` and of fixtures does not outlive them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dev; "
        "dev.run = lambda command, *_, **__: print(command[2]); "
        "env = dev.Environment(sys.executable, sys.argv[1]); "
        "dev.make(env, 'stub') if sys.argv[2] == 'make' else dev.pytest(env, [])"
    )
    asked = [sys.executable, "-c", code, str(ROOT), what]
    started = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    (tmp_path / "test_ended.py").write_text(FIXTURE)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    command = [sys.executable, "-c", (STUB if what == "make" else "") + started, "-s"]
    assert ended(command, tmp_path).rstrip().count("tidied up") == 1
