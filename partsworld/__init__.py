"""parts-world: a procedural world with exact part masks, and the small diffusion model trained on it.

Independent of the pack's `core` and `nodes`; only `loader.py` knows ComfyUI.
"""
