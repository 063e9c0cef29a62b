"""The pack as ComfyUI loads it: what it imports, and how long that takes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_pack_loads_in_under_a_third_of_a_second(server, start_server):
    """ComfyUI prints the time each pack took to import; torch and ComfyUI's own modules are loaded by then."""
    if (
        _seconds_to_load(server) > 0.3
    ):  # something else may have had the processor: what it takes shows in the best of 3
        assert min(_seconds_to_load(start_server()) for _ in range(2)) <= 0.3


def _seconds_to_load(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"([\d.]+) seconds: \S*scalpel", log)
    assert found, log
    return float(found[1])


@pytest.mark.parametrize("folder", ["core", "core/unet"])
def test_imports_only_point_down(folder):
    """core knows no ComfyUI and no nodes; core/unet knows no nodes."""
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for file in files:
        for module in _imports(file):
            forbidden = ("nodes", "server") if folder == "core/unet" else ("nodes", "server", "comfy", "unet")
            assert module.split(".")[0] not in forbidden, f"{file.name} imports {module}"


def test_no_file_imports_the_pack_or_comfyui_nodes_absolutely():
    """ComfyUI's own top-level modules are `nodes`, `server`, `execution`; the pack's folder may have any name."""
    for file in [*ROOT.glob("core/**/*.py"), *ROOT.glob("nodes/*.py"), ROOT / "__init__.py"]:
        for module in _imports(file, relative=False):
            assert module.split(".")[0] not in ("scalpel", "nodes", "execution", "core"), f"{file.name}: {module}"


def _imports(file: Path, relative: bool = True) -> list[str]:
    """Modules that a file imports; relative ones (`from ..nodes import x`) without their dots."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (relative or not node.level):
            modules += [node.module] if node.module else [alias.name for alias in node.names]
    return modules
