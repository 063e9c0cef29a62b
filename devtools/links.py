"""Make one directory appear under another name: a symbolic link, or a junction where Windows allows none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def link_directory(link: Path, target: Path) -> Path:
    """Let ``link`` lead to the directory ``target``, replacing a link that leads elsewhere. Returns ``link``."""
    target = target.resolve()
    if _leads_to(link, target):
        return link
    link.parent.mkdir(parents=True, exist_ok=True)
    unlink_directory(link)
    try:
        _make(link, target)
    except OSError:  # another process was quicker
        if not _leads_to(link, target):
            raise
    return link


def unlink_directory(link: Path) -> None:
    """Remove the link, never what it leads to."""
    if link.is_symlink():
        link.unlink()
    elif os.path.lexists(link):
        link.rmdir()  # a junction goes; a real directory with content is left alone, by an OSError


def _leads_to(link: Path, target: Path) -> bool:
    return link.is_dir() and link.resolve() == target


def _make(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        command = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"could not link {link} to {target}: {done.stderr.strip()}") from None
