"""Where a bench's numbers go: the terminal, a JSON file, and its section of BENCHMARKS.md."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def add_arguments(parser: argparse.ArgumentParser, section: str) -> None:
    """`--json`, `--markdown` and `--section`, as every bench has them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="write every single number here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the results into this file's section")
    parser.add_argument("--section", default=section, help="which section of it (default: %(default)s)")


def publish(arguments: argparse.Namespace, text: str, numbers: Any) -> None:
    """Print the results and write them where the command line says."""
    print(text, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        replace_section(arguments.markdown, arguments.section, text)


class Transcript:
    """Lines that are printed at once and published as they were printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def publish(self, arguments: argparse.Namespace) -> None:
        """Write the lines where the command line says."""
        if arguments.json:
            arguments.json.write_text(json.dumps(self.lines, indent=1) + "\n", encoding="utf-8")
        if arguments.markdown:
            replace_section(arguments.markdown, arguments.section, "\n".join(["```text", *self.lines, "```"]))


def replace_section(file: Path, section: str, text: str) -> None:
    """Replace what stands between `<!-- begin SECTION -->` and `<!-- end SECTION -->`.

    ValueError if the file does not have this section exactly once.
    """
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    old = file.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{file} has {count} sections between {begin} and {end}; one is needed")
    file.write_text(new, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column to the left, numbers to the right."""
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def where_it_ran() -> str:
    """One line: device, versions, threads."""
    comfyui = importlib.import_module("comfyui_version").__version__
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({_processor()})"
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device}{threads}; Python {platform.python_version()}, PyTorch {torch.__version__}, ComfyUI {comfyui}"


def _processor() -> str:
    try:
        return re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
