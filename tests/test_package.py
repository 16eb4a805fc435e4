"""The archive that the ComfyUI registry gets: what is in it, and that it runs as installed.

Made as comfy-cli makes it (`comfy node pack`): the files that git tracks, less what `.comfyignore`
matches.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from comfyui_modelopt.devtools.common import PACK_NAME, venv_python
from comfyui_modelopt.devtools.server import ComfyServer
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.utils import packages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .e2e.test_start import NODES
from .e2e.workflows import Graph, quantize_inputs, recorded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOTAL_BYTES = 8 << 20
PICTURE_BYTES = 600 << 10


def git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments, "-z"], capture_output=True, text=True, check=True
    )
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("the archive is made of what git tracks, and this is not a git checkout")
    left_out = set(git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"))
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in git("ls-files"):
            if name not in left_out and (ROOT / name).exists():
                made.write(ROOT / name, name)
    return path


@pytest.fixture(scope="session")
def packed(archive) -> dict[str, int]:
    """Path in the archive -> bytes."""
    with zipfile.ZipFile(archive) as made:
        return {info.filename: info.file_size for info in made.infolist()}


# --- what is in it ---


def test_it_holds_what_users_need(packed):
    wanted = {"__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "dev.py", "convert.py"}
    wanted |= {"pyproject.toml", "requirements.txt", "kernels/choices/__init__.py"}
    tracked = git("ls-files")
    for folder in ("web", "locales", "example_workflows", "nodes", "loaders", "formats", "utils",
                   "conversion"):  # fmt: skip
        wanted |= {name for name in tracked if name.startswith(f"{folder}/")}
    wanted = {name for name in wanted if not name.endswith(".gitkeep")}
    assert wanted <= packed.keys(), wanted - packed.keys()


def test_it_holds_nothing_else(packed):
    for name, size in packed.items():
        path = PurePosixPath(name)
        assert not re.match(r"(\.|tests/|assets/)", name), name
        assert "__pycache__" not in path.parts and not any(p.startswith(".") for p in path.parts)
        assert path.suffix in {".py", ".js", ".json", ".md", ".toml", ".txt", ".webp", ".png",
                               ".jpg", ".css", ".svg", ""}, name  # fmt: skip
        if path.suffix in (".png", ".jpg", ".webp"):
            assert size <= PICTURE_BYTES, f"{name} has {size} bytes"
        if name.startswith("benchmarks/results/"):
            assert f"({name})" in README, f"{name} is in the archive, README.md does not link it"
    assert sum(packed.values()) <= TOTAL_BYTES, sorted(packed.items(), key=lambda i: -i[1])[:10]


def imports(name: str, source: str) -> set[str]:
    """Dotted modules of this pack that a file imports, anywhere in it."""
    package, found = PurePosixPath(name).parent.parts, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            dotted = ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom):
            dotted = node.module
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("devtools")}
            continue
        else:
            continue
        if not node.level:
            if not re.match(r"(comfyui_modelopt|devtools)\b", dotted):
                continue
            dotted = dotted.removeprefix("comfyui_modelopt").removeprefix(".")
        found.add(dotted)
        found |= {f"{dotted}.{alias.name}".removeprefix(".") for alias in node.names}
    return found


def test_every_python_file_is_used_and_none_is_missing(archive, packed):
    """From ComfyUI's entry point, dev.py and the scripts that README.md tells to run."""
    todo = ["__init__.py", "dev.py", "convert.py"]
    todo += sorted(set(re.findall(r"python (\S+/\S+\.py)", README)))
    missing = [name for name in todo if name not in packed]
    seen: set[str] = set()
    with zipfile.ZipFile(archive) as made:
        while todo:
            name = todo.pop()
            if name in seen or name not in packed:
                continue
            seen.add(name)
            parents = list(PurePosixPath(name).parents)[:-1]
            todo += [f"{parent}/__init__.py" for parent in parents]
            for dotted in imports(name, made.read(name).decode()):
                path = dotted.replace(".", "/")
                todo += [f"{path}.py", f"{path}/__init__.py"]
                for tracked in (f"{path}.py", f"{path}/__init__.py"):
                    if (ROOT / tracked).exists() and tracked not in packed:
                        missing.append(f"{name} imports {tracked}")
    assert not missing
    python = {name for name in packed if name.endswith(".py")}
    assert python == seen, f"no user reaches {sorted(python - seen)}: add them to .comfyignore"


def test_links_of_the_readme_lead_somewhere(packed):
    links = re.findall(r"(?<!!)\[[^\]\[]*\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    for link in links:
        assert link in packed or (link == "CONTRIBUTING.md" and (ROOT / link).exists()), link


# --- its metadata ---


def test_registry_fields():
    """The rules of the registry's specification and of comfy-cli's reading of this file."""
    name = PROJECT["name"]
    assert re.fullmatch(r"[a-z]([-_.]?[a-z0-9])*", name) and len(name) < 100
    assert name == PACK_NAME
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    assert PROJECT["description"] and COMFY["DisplayName"]
    assert (ROOT / PROJECT["license-files"][0]).read_text().lstrip().startswith("Apache License")
    assert set(PROJECT["classifiers"]) >= {"Operating System :: OS Independent",
                                           "Environment :: GPU :: NVIDIA CUDA"}  # fmt: skip
    assert not [folder for folder in COMFY["includes"] if not (ROOT / folder).exists()]


def test_addresses_are_of_one_owner_and_their_files_are_there():
    home = PROJECT["urls"]["Repository"]
    assert re.fullmatch(rf"https://github\.com/[\w-]+/{PROJECT['name']}", home)
    assert re.fullmatch(r"[\w-]+", COMFY["PublisherId"])
    assert all(url.startswith(home) for url in PROJECT["urls"].values())
    for field, ratio in (("Icon", 1.0), ("Banner", 21 / 9)):
        start, file = COMFY[field].split("/main/")
        assert start == home.replace("github.com", "raw.githubusercontent.com")
        from PIL import Image

        with Image.open(ROOT / file) as picture:
            assert picture.width / picture.height == pytest.approx(ratio, rel=0.002)
            assert field == "Banner" or picture.width <= 400


def test_changelog_has_this_version():
    versions = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(v for v in versions if v != "Unreleased") == PROJECT["version"]


def test_a_quantized_file_says_the_packs_version(monkeypatch, tmp_path):
    assert packages.own_version() == PROJECT["version"]
    assert engine.versions()[PROJECT["name"]] == PROJECT["version"]
    monkeypatch.setattr(packages, "PYPROJECT", tmp_path / "pyproject.toml")
    assert packages.own_version() == "unknown"


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_the_projects_dependencies():
    assert requirements() == PROJECT["dependencies"]


# --- what pip does with its requirements ---


def needed_by(names: list[str]) -> dict[str, set[Requirement]]:
    """Distribution -> the requirements on it, of these and all that they need here."""
    found: dict[str, set[Requirement]] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if one in found.setdefault(name, set()):
            continue
        found[name].add(one)
        for extra in ("", *one.extras):
            for line in importlib.metadata.requires(name) or []:
                inner = Requirement(line)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    todo.append(inner)
    return found


@pytest.mark.parametrize("version", ["2.8.0", importlib.metadata.version("torch").split("+")[0]])
def test_no_requirement_wants_another_torch(version):
    """What the README promises: 2.8 and newer stay."""
    wanted = needed_by(requirements())
    assert wanted["torch"]
    assert all(one.specifier.contains(version) for one in wanted["torch"])
    assert not wanted.keys() & {"torchvision", "torchaudio"} or all(
        not one.specifier for name in ("torchvision", "torchaudio") for one in wanted.get(name, ())
    )


def test_pip_adds_packages_and_replaces_none(comfyui, tmp_path):
    """`pip install -r requirements.txt`, as ComfyUI-Manager runs it, in a ComfyUI without the pack.

    pip goes by the metadata it finds: that of what ComfyUI needs is put where it looks.
    """
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    there = needed_by([line.partition("#")[0].strip() for line in lines if line[:1].isalpha()])
    assert "torch" in there and "nvidia-modelopt" not in there
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = venv_python(tmp_path / "venv")
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    for name in there:
        path = Path(importlib.metadata.distribution(name)._path)
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*map(str, command), "-r", str(ROOT / "requirements.txt")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    added = {
        canonicalize_name(one["metadata"]["name"]) for one in json.loads(done.stdout)["install"]
    }
    assert "nvidia-modelopt" in added
    assert not added & there.keys(), f"pip would replace {sorted(added & there.keys())}"


# --- it runs ---

# what ComfyUI says of any custom node
ORDINARY = re.compile(r"(Import times for custom nodes:|… seconds: …)?")


def said(log: str) -> set[str]:
    """Lines of a start-up log, without what differs from one start to the next."""
    found = set()
    for line in re.sub(r"\x1b\[[\d;]*m", "", log).splitlines():
        found.add(re.sub(r"/\S+|\d+(\.\d+)*", "…", line.removeprefix("[INFO]")).strip())
    return found


@pytest.fixture(scope="module")
def installed(comfyui, checkpoints, archive, tmp_path_factory):
    """A server with the unpacked archive in custom_nodes, and the start-up log of one without."""
    base = tmp_path_factory.mktemp("installed")
    made = ComfyServer(comfyui, base, pack=False)
    with made:
        made.without = made.log
    (made.models / "checkpoints" / "sd15.safetensors").symlink_to(checkpoints / "sd15.safetensors")
    folder = base / "custom_nodes" / PROJECT["name"]
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    with made:
        made.at_start = made.log
        yield made


@pytest.mark.e2e
def test_all_nodes_are_there(installed):
    assert {name for name in installed.object_info() if name.startswith("ModelOpt")} >= NODES


@pytest.mark.e2e
def test_the_log_is_clean(installed):
    """It says nothing that it does not say without the pack, but how long the import took."""
    assert re.search(rf"[\d.]+ seconds: .*{PROJECT['name']}", installed.at_start)
    new = said(installed.at_start) - said(installed.without)
    assert not [line for line in new if not ORDINARY.fullmatch(line)]


@pytest.mark.e2e
def test_the_page_gets_its_files(installed, packed):
    prefix = f"/extensions/{PROJECT['name']}"
    scripts = [name.removeprefix("web") for name in packed if re.match(r"web/.*\.js$", name)]
    assert scripts and {prefix + name for name in scripts} <= set(installed.get("/extensions"))
    for name in packed:
        if name.startswith("web/"):
            assert installed.request(prefix + name.removeprefix("web")) == (
                (ROOT / name).read_bytes()
            )
    shipped = {Path(n).stem for n in packed if re.fullmatch(r"example_workflows/[^/]+\.json", n)}
    assert set(installed.get("/workflow_templates").get(PROJECT["name"], [])) == shipped
    languages = {name.split("/")[1] for name in packed if name.startswith("locales/")}
    assert {k for k, v in installed.get("/i18n").items() if "ModelOpt" in json.dumps(v)} == (
        languages
    )


@pytest.mark.e2e
def test_quantize_save_load(installed):
    graph = Graph()
    quantize = graph.add(
        "ModelOptQuantize",
        **recorded(graph, 4),
        **quantize_inputs("int8", "linear + conv"),
    )
    graph.add("ModelOptSaveUNet", model=[quantize, 0], filename_prefix="packed")
    result = installed.run(graph.nodes, timeout=600)
    assert result.error is None, result.error
    (file,) = (installed.models / "diffusion_models").glob("packed_*.safetensors")
    load = Graph()
    unet = load.add("ModelOptLoadUNet", unet_name=file.name)
    load.add("PreviewAny", source=[unet, 1])
    again = installed.run(load.nodes, timeout=600)
    assert again.error is None, again.error
    (info,) = again.outputs["2"]["text"]
    assert "18 convolution layers in int8" in info and "40 Linear layers in int8" in info
    assert f"comfyui-modelopt {PROJECT['version']}, " in info
    assert "Traceback" not in installed.log


@pytest.mark.slow
def test_convert_in_custom_nodes(comfyui, checkpoints, archive, tmp_path):
    """The unpacked archive, no git checkout, finds the ComfyUI in whose custom_nodes it lies."""
    home = tmp_path / "ComfyUI"
    home.mkdir()
    for entry in comfyui.iterdir():
        if entry.name != "custom_nodes":
            (home / entry.name).symlink_to(entry)
    pack = home / "custom_nodes" / PROJECT["name"]
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(pack)
    flags = ["--format", "int8", "--layers", "linear only", "--device", "cpu", "--json", "--quiet"]
    done = subprocess.run(
        [
            sys.executable,
            pack / "convert.py",
            checkpoints / "sd15.safetensors",
            "--out",
            "made",
            *flags,
        ],
        cwd=tmp_path,
        env={name: x for name, x in os.environ.items() if name != "COMFYUI_PATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["files"]
    assert row["status"] == "converted"
    assert (tmp_path / "made" / "sd15_int8-max-linear.safetensors").stat().st_size > 10_000_000
    assert not list(pack.rglob("*.partial"))
