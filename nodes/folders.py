"""Where this pack's files lie under ComfyUI's models folder, and names for new ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from ..utils.text import brief_repr
from ..utils.whole_file import NameTaken, remove_left_below

log = logging.getLogger(__name__)
CALIBRATION = "modelopt_calibration"
CHECKPOINTS = "modelopt_checkpoints"
UNETS = "diffusion_models"
# folder -> its place in models/modelopt, and the files listed of it
OWN = {
    CALIBRATION: ("calibration", {".safetensors"}),
    CHECKPOINTS: ("checkpoints", {".pt", ".pth"}),
}
# a part of a folder that ModelOpt wrote, no checkpoint by itself
STATE = "modelopt_state.pth"
# numbers that other processes may take before saving gives up
TRIES = 10


def register() -> None:
    """Tell ComfyUI where the pack's own files lie. Makes no folder; a second call does nothing."""
    for folder, (place, extensions) in OWN.items():
        default = os.path.join(folder_paths.models_dir, "modelopt", place)
        folder_paths.add_model_folder_path(folder, default)
        folder_paths.folder_names_and_paths[folder][1].update(extensions)


def root_of(folder: str) -> str:
    """Where new files of this kind go: the folder of that name, or else the first one listed."""
    register()
    roots = folder_paths.get_folder_paths(folder)
    return next((root for root in roots if os.path.basename(root) == folder), roots[0])


def names(folder: str) -> list[str]:
    """Files to choose from in a combo."""
    register()
    return folder_paths.get_filename_list(folder)


def checkpoint_names() -> list[str]:
    """What can be imported: files of mto.save, and folders that hold a config.json."""
    found = {name for name in names(CHECKPOINTS) if os.path.basename(name) != STATE}
    for root in folder_paths.get_folder_paths(CHECKPOINTS):
        for config in Path(root).glob("**/config.json"):
            place, parent = config.parent.relative_to(root), config.parent.parent
            if (parent / "model_index.json").is_file():  # a pipeline: its UNet stands for it
                if place.name == "unet":
                    found.add(place.parent.as_posix())
            elif place.parts and any(config.parent.glob("*.safetensors")):
                found.add(place.as_posix())
    return sorted(found - {"."})


def find_checkpoint(name: str) -> str:
    """Full path of a file or folder to import. Raises ValueError where there is none."""
    register()
    known = isinstance(name, str) and name in checkpoint_names()
    for root in folder_paths.get_folder_paths(CHECKPOINTS) if known else ():
        path = os.path.join(root, name)
        if os.path.exists(path):
            return path
    raise ValueError(
        f"a checkpoint to import must lie in {root_of(CHECKPOINTS)}, got {brief_repr(name)}, which is not "
        "there, or is a folder without its config.json or .safetensors: put it there whole, or press R "
        "to refresh"
    )


def find(folder: str, name: str) -> str:
    """Full path of a file by its combo name. Raises ValueError where there is none."""
    register()
    # a workflow may hold anything
    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    if path is None:
        raise ValueError(
            f"the file must lie in ComfyUI's {folder} folder, got {brief_repr(name)}, which is not in "
            f"{root_of(folder)}: choose another, or press R to refresh"
        )
    return path


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file changes on the disk."""
    register()
    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    if path is None:
        return "missing"
    return _state(path)


def checkpoint_fingerprint(name: str) -> str:
    """Changes when the file, or a file of the folder, changes on the disk."""
    try:
        path = find_checkpoint(name)
    except ValueError:
        return "missing"
    inside = sorted(Path(path).glob("**/*")) if os.path.isdir(path) else [Path(path)]
    return "\n".join(_state(str(one)) for one in inside if one.exists())


def _state(path: str) -> str:
    state = os.stat(path)
    return f"{path}:{state.st_mtime_ns}:{state.st_size}"


def _without(extension: str, prefix: str) -> str:
    """A prefix without the extension, where that leaves a name."""
    return prefix if PureWindowsPath(prefix).name == extension else prefix.removesuffix(extension)


def why_not(folder: str, prefix: str, extension: str = ".safetensors") -> str | None:
    """The reason a filename prefix cannot be used, or None. Touches no file."""
    register()
    if not isinstance(prefix, str):
        return f"a filename prefix must be text, got {brief_repr(prefix)} in filename_prefix: use a plain name"
    prefix = _without(extension, prefix)
    root = root_of(folder)
    windows, posix = PureWindowsPath(prefix), PurePosixPath(prefix)  # either's `..` and roots
    leaves = windows.drive or windows.root or posix.root or ".." in windows.parts
    inside = folder_paths.is_within_directory(root, os.path.join(root, prefix))  # links, NUL
    if not leaves and inside and windows.name:
        return None
    return (
        "a filename prefix must name a file inside ComfyUI's models folder, got "
        f"{brief_repr(prefix)} in filename_prefix: use a plain name such as 'mine' or 'sdxl/mine'"
    )


def new_path(folder: str, prefix: str, extension: str = ".safetensors") -> Path:
    """A numbered path that does not exist yet in a models folder, made where it is missing.

    `prefix` may hold subfolders and ComfyUI's %year%, %month%, …; an extension at its end is not
    doubled. Raises ValueError where it is empty or leads out of the folder, or where no folder can
    be made.
    """
    reason = why_not(folder, prefix, extension)
    if reason:
        raise ValueError(reason)
    prefix = _without(extension, prefix)
    root = root_of(folder)
    try:
        os.makedirs(root, exist_ok=True)
        place, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise ValueError(
            f"saving needs a writable folder, got {error} in {root}: "
            "change its permissions or name another folder in extra_model_paths.yaml"
        ) from error
    return Path(place, f"{name}_{counter:05}_{extension}")


def write_new(
    folder: str, prefix: str, write: Callable[[Path], object], extension: str = ".safetensors"
) -> str:
    """Writes to `new_path`, and with the next number where another process took it meanwhile. What
    killed savings left anywhere in that models folder is removed first.

    write: is given the path. Returns where it was written. Errors as of `new_path` and `write`.
    """
    register()
    remove_left_below(root_of(folder))
    for _ in range(TRIES - 1):
        path = new_path(folder, prefix, extension)
        try:
            write(path)
        except NameTaken as error:
            log.info("ModelOpt: %s; the next number is tried", error)
        else:
            return str(path)
    path = new_path(folder, prefix, extension)
    write(path)
    return str(path)
