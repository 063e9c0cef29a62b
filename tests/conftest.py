"""What all tests share: the pack under its package name, ComfyUI in this process, and real servers.

The tests run by ``python dev.py test``, which sets the paths. ComfyUI's modules can simply be imported; here they are
told first to use the CPU (unless SCALPEL_DEVICE=gpu) and a temporary base directory, never the user's.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from scalpel.devtools.server import ComfyServer

HOW = "run the tests with: python dev.py test"


def pytest_configure(config: pytest.Config) -> None:
    if "SCALPEL_COMFYUI" not in os.environ or importlib.util.find_spec("comfy") is None:
        raise pytest.UsageError(f"the tests need ComfyUI and the package's own name: {HOW}")
    _forget_the_working_directory()
    _configure_comfyui()


def _forget_the_working_directory() -> None:
    """`python -m pytest` puts the checkout first on the search path, and our `nodes` before ComfyUI's."""
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != checkout]


def _configure_comfyui() -> None:
    """Settle ComfyUI's options before its modules read them; its own command line parser stays off."""
    from comfy.cli_args import args

    args.cpu = os.environ.get("SCALPEL_DEVICE") != "gpu"
    args.base_directory = tempfile.mkdtemp(prefix="scalpel-tests-")
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)


def _path_of(variable: str) -> Path:
    if variable not in os.environ:
        pytest.fail(f"{variable} is not set: {HOW}", pytrace=False)
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def model() -> Any:
    """A small SD1.5-shaped MODEL."""
    from scalpel.tests import tiny

    return tiny.model(tiny.SD15)


@pytest.fixture
def inference() -> Iterator[None]:
    """The mode in which ComfyUI's server runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., ComfyServer]]:
    """Start a server with any arguments of `ComfyServer`; all are stopped when the tests end."""
    from scalpel.devtools.server import ComfyServer

    servers: list[ComfyServer] = []

    def start(comfyui: Path | None = None, **options: object) -> ComfyServer:
        servers.append(ComfyServer(comfyui or _path_of("SCALPEL_COMFYUI"), **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A server of the default ComfyUI with the pack in it, started when the first test asks."""
    return start_server()


@pytest.fixture(scope="session")
def server_with_tiny_models(start_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A server that has the nodes of `tiny_pack` too."""
    from scalpel.devtools.server import CHECKOUT

    return start_server(packs=[CHECKOUT, CHECKOUT / "tests" / "tiny_pack"])


@pytest.fixture(scope="session")
def old_server(start_server: Callable[..., ComfyServer]) -> ComfyServer:
    """The same on the oldest ComfyUI that the pack supports."""
    return start_server(_path_of("SCALPEL_COMFYUI_OLD"))
