"""The seam to ComfyUI: the only part of the pack that knows its patch points, batches, samplers and devices."""
