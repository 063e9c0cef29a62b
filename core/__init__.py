"""The methods and their maths: pure torch, one idea a file. Only `core.unet` knows ComfyUI."""
