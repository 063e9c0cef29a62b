"""Loading part tokens from the folder `models/part_tokens`, and saving them there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_api.latest import io, ui

from ..core import part_token
from ..core.part_token import PartToken
from .common import CATEGORY, PartTokenType, schema

log = logging.getLogger(__name__)

FOLDER = "part_tokens"
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin"}
DEMO_TOKENS = Path(__file__).resolve().parent.parent / "partsworld" / "weights" / FOLDER


def register_folder() -> None:
    """Tell ComfyUI of `models/part_tokens` and of the demo tokens that come with the pack."""
    for folder in (Path(folder_paths.models_dir) / FOLDER, DEMO_TOKENS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a read-only volume: tokens can still be loaded from the other folder
            log.warning("Scalpel: %s cannot be made (%s)", folder, error)
            continue
        folder_paths.add_model_folder_path(FOLDER, str(folder))
    folder_paths.folder_names_and_paths[FOLDER][1].update(SUFFIXES)


register_folder()


def token_path(name: str) -> Path:
    """The file that a token name from a workflow stands for. ValueError unless it is one of the listed files."""
    listed = folder_paths.get_filename_list(FOLDER)
    if name not in listed:
        raise ValueError(
            f"token: {name!r} is not in models/{FOLDER}; accepted are the names of its files: "
            f"{', '.join(listed) or '(it is empty)'}"
        )
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


class PartTokenLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenLoader",
            display_name="Load Part Token",
            category=f"{CATEGORY}/part token",
            description="A learned part ('head', 'car hood') from models/part_tokens: .safetensors, or the PartEdit "
            "authors' .pt files. Nothing in a file is ever run.",
            search_aliases=["partedit", "part embedding"],
            inputs=[
                io.Combo.Input(
                    "token",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/part_tokens. Those whose names begin with 'partsworld' belong to the "
                    "demo model. Press R after adding a file.",
                )
            ],
            outputs=[PartTokenType.Output(display_name="part_token", tooltip="The part token, for any Scalpel node.")],
        )

    @classmethod
    def validate_inputs(cls, token: str) -> bool | str:
        if token is None:  # linked: not known before the run
            return True
        try:
            token_path(token)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, token: str) -> str:
        if token is None:
            return ""
        return hashlib.sha256(token_path(token).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, token: str) -> io.NodeOutput:
        return io.NodeOutput(part_token.load(token_path(token)))


class PartTokenSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenSave",
            display_name="Save Part Token",
            category=f"{CATEGORY}/part token",
            description="Writes a part token to models/part_tokens as <filename_prefix>_00001.safetensors, with how it "
            "was trained in its metadata. A file that exists is never overwritten.",
            search_aliases=["partedit", "save part embedding"],
            inputs=[
                PartTokenType.Input("part_token", tooltip="The part token to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="part",
                    tooltip="The file's name without its number; 'animals/head' puts it into a subfolder of "
                    "models/part_tokens.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, part_token: PartToken, filename_prefix: str) -> io.NodeOutput:
        file = save_numbered(part_token, filename_prefix)
        name = file.relative_to(token_folder()).as_posix()
        log.info("Scalpel: saved the part token %s", file)
        return io.NodeOutput(ui=ui.PreviewText(f"models/{FOLDER}/{name}"))


def token_folder() -> Path:
    """Where tokens are saved: `models/part_tokens` of this ComfyUI."""
    return Path(folder_paths.models_dir) / FOLDER


def save_numbered(token: PartToken, prefix: str) -> Path:
    """Save a token under the prefix and the number after the largest one there; returns its file.

    The file appears whole, under a name that nobody else has taken meanwhile. ValueError if the prefix is not a name
    inside the token folder.
    """
    target = token_folder() / checked_prefix(prefix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"filename_prefix: {prefix!r} names a folder where a file is; give another name") from error
    written = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        part_token.save(token, written)
        while True:
            file = target.with_name(f"{target.name}_{_next_number(target):05}.safetensors")
            if _publish(written, file):
                return file
    finally:
        written.unlink(missing_ok=True)


def checked_prefix(prefix: str) -> PurePosixPath:
    """A file name prefix from a workflow as a relative path. ValueError unless it is one that stays in its folder."""
    path = prefix.strip().replace("\\", "/")
    if not all(_usable(piece) for piece in path.split("/")):
        raise ValueError(
            f"filename_prefix: {prefix!r} cannot be used; accepted is a name such as 'head' or 'animals/head', inside "
            f"models/{FOLDER}: not empty, no longer than 200 bytes, no dot at its beginning or end, none of "
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
