"""Commands that take a while, shown as numbered steps: ``[2/4] installing PyTorch ... done in 1 min 12 s``.

On a terminal the line is alive (time, last line of the command's output); elsewhere it is printed once at the
start and once at the end. A command that fails shows the end of its log and what a person can do about it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

LOG_TAIL_LINES = 20
REDRAW_SECONDS = 0.2


class StepFailed(Exception):
    """A step that did not succeed; the message is meant for the person at the terminal."""


class Steps:
    """Counts the steps of one job and writes everything they print to one log file."""

    def __init__(self, total: int, log: Path) -> None:
        self.total = total
        self.log = log
        self.number = 0
        if total:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("", encoding="utf-8")

    def run(self, title: str, command: Sequence[str | Path], advice: str) -> None:
        """Run one command as the next step; raise `StepFailed` with ``advice`` if it fails."""
        self.number += 1
        headline = f"[{self.number}/{self.total}] {title}"
        arguments = [str(part) for part in command]
        with self.log.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"\n# {headline}\n# {' '.join(arguments)}\n")
            code, seconds = _run_with_progress(headline, arguments, log)
        if code:
            raise StepFailed(
                f"{headline}: failed (exit code {code}). The end of its log:\n\n"
                f"{tail(self.log)}\n\nWhat to do: {advice}\nThe whole log: {self.log}"
            )
        _finish_line(f"{headline} ... done in {duration(seconds)}")


def tail(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a text file, indented; empty if there is no such file."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-lines:])


def duration(seconds: float) -> str:
    """``7 s`` or ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def say(text: str) -> None:
    """Print now, even into a pipe."""
    print(text, flush=True)


def _run_with_progress(headline: str, arguments: list[str], log: TextIO) -> tuple[int, float]:
    started = time.monotonic()
    if not sys.stdout.isatty():
        say(f"{headline} ...")
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    latest = [""]

    def read_output() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                log.write(line)
                latest[0] = line.strip() or latest[0]

    reader = threading.Thread(target=read_output, daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(REDRAW_SECONDS)
            _draw(f"{headline} ... {duration(time.monotonic() - started)}  {latest[0]}")
        return process.wait(), time.monotonic() - started
    except BaseException:
        process.terminate()
        process.wait()
        _finish_line(f"{headline} ... stopped")
        raise


def _draw(text: str) -> None:
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write("\r" + text[:width].ljust(width))
        sys.stdout.flush()


def _finish_line(text: str) -> None:
    _draw("")
    say(("\r" if sys.stdout.isatty() else "") + text)
