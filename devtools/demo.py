"""Edit one part of an image through a real ComfyUI server, and measure what came out.

Runs in the environment that ``dev.py`` makes. It submits an API workflow, follows the websocket with a progress bar,
fetches the pictures whose SaveImage nodes are titled ``source``, ``edited`` and ``mask``, and leaves in the output
folder ``source.png``, ``edited.png``, ``mask.png``, ``side_by_side.png`` and ``report.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import platform
import re
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import maximum_filter
from skimage.metrics import structural_similarity

from .server import CHECKOUT, ComfyError, ComfyServer, Json

TITLES = ("source", "edited", "mask")
SSIM_WINDOW = 7
GAP = 8
CAPTION_HEIGHT = 18
BAR_WIDTH = 30


def main() -> int:
    """Run the demo as the command line says; 1 with a sentence if it did not work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--workflow", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        run_demo(arguments.comfyui, arguments.workflow, arguments.output)
    except ComfyError as error:
        print(f"\nThe demo did not work: {error}", flush=True)
        return 1
    return 0


def run_demo(comfyui: Path, workflow: Path, output: Path) -> None:
    """Start a server, run the workflow on it, write the pictures and the report."""
    prompt: Json = json.loads(workflow.read_text(encoding="utf-8"))
    nodes = {title: node_titled(prompt, title) for title in TITLES}
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(comfyui) as server:
        prompt_id, seconds = asyncio.run(follow(server, prompt))
        outputs = server.wait(prompt_id, timeout=30)["outputs"]
        pictures = {title: picture(server, outputs[node]) for title, node in nodes.items()}
        versions = versions_of(server)
    report = {
        "workflow": workflow.name,
        **measure(pictures["source"], pictures["edited"], pictures["mask"]),
        "seconds": round(seconds, 2),
        "versions": versions,
    }
    write_results(output, pictures, report)
    print(summary(report, output), flush=True)


# ---- the client


async def follow(server: ComfyServer, prompt: Json) -> tuple[str, float]:
    """Submit a workflow and draw its progress until it ends: its id, and the seconds it took."""
    client = uuid.uuid4().hex
    progress = Progress(prompt)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://{server.address}/ws?clientId={client}", max_msg_size=0) as socket,
    ):
        started = time.monotonic()
        prompt_id = await asyncio.to_thread(server.submit, prompt, client)
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            if event["data"].get("prompt_id") == prompt_id and progress.ended_by(event["type"], event["data"]):
                break
    return prompt_id, time.monotonic() - started


class Progress:
    """How far a workflow is, from the server's events: nodes done, and the running node's own steps."""

    def __init__(self, prompt: Json) -> None:
        self.names = {node_id: node["class_type"] for node_id, node in prompt.items()}
        self.done: set[str] = set()
        self.running = ""
        self.steps = (0, 1)
        self.bar = Bar()

    def ended_by(self, event: str, data: Json) -> bool:
        """Take in one event and draw; True when it was the last."""
        if event == "execution_cached":
            self.done.update(data["nodes"])
        elif event == "executing" and data.get("node"):
            self._start(str(data["node"]))
        elif event == "progress":
            self.steps = (data["value"], data["max"])
        elif event == "execution_success":
            self.bar.finish("done")
            return True
        elif event in ("execution_error", "execution_interrupted"):
            self.bar.finish(event.removeprefix("execution_"))
            return True
        self._draw()
        return False

    def _start(self, node_id: str) -> None:
        self.done.add(self.running)
        self.running = node_id
        self.steps = (0, 1)

    def _draw(self) -> None:
        if not self.running:
            return
        value, maximum = self.steps
        done = len(self.done & self.names.keys()) + min(1.0, value / max(1, maximum))
        counter = f" {value}/{maximum}" if maximum > 1 else ""
        name = self.names.get(self.running, self.running)
        self.bar.draw(min(1.0, done / len(self.names)), f"{name}{counter}", milestone=self.running)


class Bar:
    """A line that is redrawn on a terminal; elsewhere, a line now and then."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.printed: tuple[int, str] | None = None

    def draw(self, fraction: float, text: str, milestone: str = "") -> None:
        if self.live:
            filled = round(fraction * BAR_WIDTH)
            self._overwrite(f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {fraction:4.0%}  {text}")
        elif self.printed != (int(fraction * 10), milestone):
            self.printed = (int(fraction * 10), milestone)
            print(f"{fraction:4.0%}  {text}", flush=True)

    def finish(self, text: str) -> None:
        if self.live:
            self._overwrite("")
            sys.stdout.write("\r")
        print(text, flush=True)

    def _overwrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write("\r" + text[:width].ljust(width))
        sys.stdout.flush()


def node_titled(prompt: Json, title: str) -> str:
    """The id of the SaveImage node with this title."""
    found = [
        node_id
        for node_id, node in prompt.items()
        if node["class_type"] == "SaveImage" and node.get("_meta", {}).get("title", "").lower() == title
    ]
    if len(found) != 1:
        raise ComfyError(f"the workflow must have one SaveImage node titled {title!r}; it has {len(found)}.")
    return found[0]


def picture(server: ComfyServer, output: Json) -> Image.Image:
    """The first picture of a SaveImage node."""
    return Image.open(io.BytesIO(server.fetch(output["images"][0]))).convert("RGB")


def versions_of(server: ComfyServer) -> dict[str, str]:
    """What the report says it ran on."""
    stats = server.system_stats()
    system = stats["system"]
    return {
        "scalpel": pack_version(),
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "python": platform.python_version(),
        "device": stats["devices"][0]["name"],
        "platform": platform.platform(),
    }


def pack_version() -> str:
    """The version in pyproject.toml (Python 3.10 has no tomllib)."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


# ---- the measurements


def measure(source: Image.Image, edited: Image.Image, mask: Image.Image) -> dict[str, Any]:
    """What changed and what did not: similarity outside the mask, mean colours inside, how much is inside.

    Outside is where the mask is below one half; SSIM is the mean over windows that lie wholly outside. The mask's edge
    cannot be sharper than a latent cell, 8 pixels: the PSNR farther away than that is told, too. A figure that has no
    value (nothing outside, nothing inside, a PSNR without any difference) is None.
    """
    before, after = pixels(source), pixels(edited)
    if before.shape != after.shape:
        raise ComfyError(f"source is {source.size} and edited {edited.size}: they cannot be compared.")
    inside = pixels(mask.resize(source.size, Image.Resampling.NEAREST)).mean(axis=2) >= 0.5
    return {
        "psnr_outside_db": psnr(before, after, ~inside),
        "psnr_farther_than_8_pixels_db": psnr(before, after, ~maximum_filter(inside, 17)),
        "ssim_outside": ssim(before, after, ~inside),
        "largest_difference_outside": largest_difference(before, after, ~inside),
        "mean_colour_inside": {"source": mean_colour(before, inside), "edited": mean_colour(after, inside)},
        "part_of_the_image": round(float(inside.mean()), 4),
    }


def pixels(image: Image.Image) -> np.ndarray:
    """``[height, width, 3]`` from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255.0


def psnr(before: np.ndarray, after: np.ndarray, where: np.ndarray) -> float | None:
    """Peak signal to noise ratio in dB over the chosen pixels; None where they are all equal, or there are none."""
    error = float(np.square(before - after)[where].mean()) if where.any() else 0.0
    return round(-10.0 * math.log10(error), 2) if error else None


def ssim(before: np.ndarray, after: np.ndarray, where: np.ndarray) -> float | None:
    """Mean structural similarity of the windows that touch no other than the chosen pixels."""
    untouched = ~maximum_filter(~where, SSIM_WINDOW)
    if not untouched.any():
        return None
    _, each = structural_similarity(before, after, win_size=SSIM_WINDOW, channel_axis=2, data_range=1.0, full=True)
    return round(float(each[untouched].mean()), 4)


def largest_difference(before: np.ndarray, after: np.ndarray, where: np.ndarray) -> int:
    """The largest difference of one channel of one chosen pixel, of 255."""
    return round(float(np.abs(before - after)[where].max(initial=0.0)) * 255)


def mean_colour(image: np.ndarray, where: np.ndarray) -> list[int] | None:
    """Red, green, blue from 0 to 255."""
    if not where.any():
        return None
    return [round(float(channel) * 255) for channel in image[where].mean(axis=0)]


# ---- the results


def write_results(output: Path, pictures: dict[str, Image.Image], report: dict[str, Any]) -> None:
    """The pictures, one beside the other as well, and the report."""
    output.mkdir(parents=True, exist_ok=True)
    for title, image in pictures.items():
        image.save(output / f"{title}.png")
    side_by_side(pictures).save(output / "side_by_side.png")
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """All pictures in one row, each under its title."""
    width = sum(image.width for image in pictures.values()) + GAP * (len(pictures) + 1)
    height = max(image.height for image in pictures.values()) + CAPTION_HEIGHT + 2 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for title, image in pictures.items():
        draw.text((left, GAP), title, fill="black")
        sheet.paste(image, (left, GAP + CAPTION_HEIGHT))
        left += image.width + GAP
    return sheet


def summary(report: dict[str, Any], output: Path) -> str:
    """The report in four lines."""
    colour = report["mean_colour_inside"]
    return (
        f"\noutside the part: PSNR {_decibels(report['psnr_outside_db'])}, farther than 8 pixels from it "
        f"{_decibels(report['psnr_farther_than_8_pixels_db'])}, SSIM {report['ssim_outside']}\n"
        f"inside ({report['part_of_the_image']:.1%} of the picture): mean colour "
        f"{colour['source']} -> {colour['edited']}\n"
        f"{report['seconds']} s on {report['versions']['device']}, ComfyUI {report['versions']['comfyui']}\n"
        f"pictures and report: {output}"
    )


def _decibels(value: float | None) -> str:
    return "unlimited (not one bit differs)" if value is None else f"{value} dB"


if __name__ == "__main__":
    sys.exit(main())
