"""Loading part tokens from the folder `models/part_tokens`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core import part_token
from .common import CATEGORY, PartTokenType, schema

FOLDER = "part_tokens"
SUFFIXES = {".safetensors", ".pt", ".pth", ".bin"}
DEMO_TOKENS = Path(__file__).resolve().parent.parent / "partsworld" / "weights" / FOLDER


def register_folder() -> None:
    """Tell ComfyUI of `models/part_tokens` and of the demo tokens that come with the pack."""
    for folder in (Path(folder_paths.models_dir) / FOLDER, DEMO_TOKENS):
        folder.mkdir(parents=True, exist_ok=True)
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
        try:
            token_path(token)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, token: str) -> str:
        return hashlib.sha256(token_path(token).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, token: str) -> io.NodeOutput:
        return io.NodeOutput(part_token.load(token_path(token)))
