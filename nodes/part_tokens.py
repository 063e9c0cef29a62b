"""Loading part tokens from the folder `models/part_tokens`, and saving them there."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..core import part_token
from ..core.part_token import PartToken
from ..core.part_token import save as save_token
from .common import CATEGORY, PartTokenType, schema
from .files import fingerprint, listed_path, save_numbered, validated

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
    return listed_path(FOLDER, name, "token", f"models/{FOLDER}")


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
        return validated(token_path, token)

    @classmethod
    def fingerprint_inputs(cls, token: str) -> str:
        return fingerprint(token_path, token)

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
        file = save_numbered(lambda path: save_token(part_token, path), token_folder(), filename_prefix)
        name = file.relative_to(token_folder()).as_posix()
        log.info("Scalpel: saved the part token %s", file)
        return io.NodeOutput(ui=ui.PreviewText(f"models/{FOLDER}/{name}"))


def token_folder() -> Path:
    """Where tokens are saved: `models/part_tokens` of this ComfyUI."""
    return Path(folder_paths.models_dir) / FOLDER
