"""Files that nodes read, of those that ComfyUI lists, and write: numbered, whole, never over another."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import folder_paths


def listed_path(folder: str, name: str, what: str, shown: str) -> Path:
    """The file that a name from a workflow stands for. ValueError unless it is one that ComfyUI lists.

    folder: ComfyUI's name of the folder; what: the input's name; shown: what a user calls the folder.
    """
    listed = folder_paths.get_filename_list(folder)
    if name not in listed:
        raise ValueError(
            f"{what}: {name!r} is not in {shown}; accepted are the names of its files: "
            f"{', '.join(listed) or '(it is empty)'}"
        )
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def validated(path_of: Callable[[str], Path], name: str | None) -> bool | str:
    """What a loader's `validate_inputs` says of a name; one that is linked is not known before the run."""
    if name is None:
        return True
    try:
        path_of(name)
    except ValueError as error:
        return str(error)
    return True


def fingerprint(path_of: Callable[[str], Path], name: str | None) -> str:
    """Changes with the file's content: a loader's `fingerprint_inputs`."""
    return "" if name is None else hashlib.sha256(path_of(name).read_bytes()).hexdigest()


def save_numbered(save: Callable[[Path], None], folder: Path, prefix: str) -> Path:
    """Let `save` write a file under the prefix and the number after the largest one there; returns the file.

    The file appears whole, under a name that nobody else has taken meanwhile. ValueError if the prefix is not a name
    inside the folder.
    """
    target = folder / checked_prefix(prefix, folder.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"filename_prefix: {prefix!r} names a folder where a file is; give another name") from error
    written = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        save(written)
        while True:
            file = target.with_name(f"{target.name}_{_next_number(target):05}.safetensors")
            if _publish(written, file):
                return file
    finally:
        written.unlink(missing_ok=True)


def checked_prefix(prefix: str, folder: str) -> PurePosixPath:
    """A file name prefix from a workflow as a relative path. ValueError unless it is one that stays in its folder."""
    path = prefix.strip().replace("\\", "/")
    if not all(_usable(piece) for piece in path.split("/")):
        raise ValueError(
            f"filename_prefix: {prefix!r} cannot be used; accepted is a name such as 'head' or 'animals/head', inside "
            f"{folder}: not empty, no longer than 200 bytes, no dot at its beginning or end, none of "
            '< > : " | ? *'
        )
    return PurePosixPath(path)


_NOT_IN_NAMES = re.compile(r'[<>:"|?*\x00-\x1f\x7f]|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
"""What some file system does not allow in a name: characters, and Windows' names of devices."""


def _usable(name: str) -> bool:
    """Whether every file system takes the name, and takes it for a name in this folder."""
    bare = name == name.strip(". ") != ""
    return bare and len(name.encode("utf-8", "replace")) <= 200 and not _NOT_IN_NAMES.search(name)


def _next_number(target: Path) -> int:
    pattern = re.compile(re.escape(target.name) + r"_(\d+)\.safetensors", re.IGNORECASE)
    found = [pattern.fullmatch(file.name) for file in target.parent.iterdir()]
    return max((int(match[1]) for match in found if match), default=0) + 1


def _publish(written: Path, file: Path) -> bool:
    """Give a written file its name, if that is free: whoever comes second gets False."""
    try:
        os.link(written, file)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system (exFAT, some network drives)
        return _copy_to_new(written, file)
    return True


def _copy_to_new(written: Path, file: Path) -> bool:
    try:
        new = file.open("xb")
    except FileExistsError:
        return False
    try:
        with new:
            new.write(written.read_bytes())
    except BaseException:
        file.unlink()
        raise
    return True
