"""Scalpel: edit one part of an image inside ComfyUI and leave the rest alone."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    """ComfyUI's way in: the extension with all nodes."""
    from .nodes import Scalpel

    return Scalpel()
