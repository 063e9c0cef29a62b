"""A private ComfyUI server with the pack in it, for the tests, the demo and ``dev.py serve``.

Standard library only: the tests import it as ``scalpel.devtools.server``, ``dev.py`` as ``devtools.server``::

    with ComfyServer(comfyui=Path("~/ComfyUI")) as server:
        entry = server.run(prompt)
        picture = server.fetch(entry["outputs"]["9"]["images"][0])
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .links import link_directory, unlink_directory

CHECKOUT = Path(__file__).resolve().parent.parent
BASE_FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
HOST = "127.0.0.1"
START_TIMEOUT = 240.0
REQUEST_TIMEOUT = 60.0
POLL_SECONDS = 0.05

Json = dict[str, Any]


class ComfyError(Exception):
    """The server did not do what was asked; ``details`` is what it said, as it said it."""

    def __init__(self, message: str, details: Json | None = None) -> None:
        super().__init__(message)
        self.details = details or {}


class ComfyServer:
    """One server process on a free port, with a base directory of its own; stopped by ``close`` or ``with``.

    ``packs`` are the custom nodes it loads (the checkout alone, by default), ``python`` the interpreter that runs it.
    A ``base`` that is given is kept; otherwise a temporary one is made and removed.
    """

    def __init__(
        self,
        comfyui: Path | str,
        *,
        python: Path | str = sys.executable,
        packs: Sequence[Path] = (CHECKOUT,),
        base: Path | None = None,
        cpu: bool | None = None,
        options: Sequence[str] = (),
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        self._temporary = base is None
        self.base = prepare_base(base or Path(tempfile.mkdtemp(prefix="scalpel-server-")), packs)
        self.port = free_port()
        self.address = f"{HOST}:{self.port}"
        self.log = self.base / "server.log"
        arguments = command(comfyui, python, self.base, self.port, cpu, ["--disable-api-nodes", *options])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=process_environment(),
                cwd=self.base,
            )
        try:
            self._wait_until_ready(start_timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ComfyServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what a client does

    def object_info(self) -> Json:
        """Every node that the server knows, by its id."""
        return self._get_json("/object_info")

    def system_stats(self) -> Json:
        """Versions and devices, as the server reports them."""
        return self._get_json("/system_stats")

    def submit(self, prompt: Json, client_id: str | None = None) -> str:
        """Queue an API workflow and return its id; `ComfyError` with the nodes' errors if it is not valid."""
        body: Json = {"prompt": prompt}
        if client_id:
            body["client_id"] = client_id
        try:
            answer = self._post_json("/prompt", body)
        except ComfyError as error:
            raise ComfyError(explain_rejection(error.details) if error.details else str(error), error.details) from None
        if answer.get("node_errors"):  # the valid outputs were queued without the others
            self._cancel(answer["prompt_id"])
            raise ComfyError(explain_rejection(answer), answer)
        return str(answer["prompt_id"])

    def run(self, prompt: Json, timeout: float = 300.0) -> Json:
        """Queue an API workflow and wait: its history entry, or `ComfyError` with the failed node's message."""
        return self.wait(self.submit(prompt), timeout)

    def wait(self, prompt_id: str, timeout: float = 300.0) -> Json:
        """Wait for a queued workflow to end, as ``run`` does."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.history(prompt_id)
            if entry is not None:
                return checked(entry)
            self._raise_if_dead()
            time.sleep(POLL_SECONDS)
        raise ComfyError(f"the workflow did not end within {timeout:.0f} s. The server's log ends:\n{self.log_tail()}")

    def history(self, prompt_id: str) -> Json | None:
        """The record of a workflow that has ended, None while it has not."""
        entry: Json | None = self._get_json(f"/history/{prompt_id}").get(prompt_id)
        return entry

    def interrupt(self) -> None:
        """Cancel what is running."""
        self._request("/interrupt", b"{}")

    def upload_image(self, path: Path) -> str:
        """Put a picture into the server's input folder; returns the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        answer = self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return str(json.loads(answer)["name"])

    def fetch(self, image: Json) -> bytes:
        """The file that an output names: ``{"filename": …, "subfolder": …, "type": …}``."""
        keys: dict[str, str] = {key: image[key] for key in ("filename", "subfolder", "type") if key in image}
        return self._request("/view?" + urllib.parse.urlencode(keys))

    def log_tail(self, lines: int = 40) -> str:
        """The last lines that the server wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """Stop the server and remove its temporary directory."""
        stop(self.process)
        if self._temporary:
            remove_base(self.base)

    # ---- how

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._raise_if_dead()
            try:
                self.object_info()
            except ComfyError:
                time.sleep(0.2)
            else:
                return self._raise_if_import_failed()
        raise ComfyError(f"ComfyUI did not answer within {timeout:.0f} s. Its log ends:\n{self.log_tail()}")

    def _cancel(self, prompt_id: str) -> None:
        self._request("/queue", json.dumps({"delete": [prompt_id]}).encode())
        self._request("/interrupt", json.dumps({"prompt_id": prompt_id}).encode())

    def _raise_if_dead(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise ComfyError(f"ComfyUI ended with exit code {code}. Its log ends:\n{self.log_tail()}")

    def _raise_if_import_failed(self) -> None:
        if "(IMPORT FAILED)" in self.log.read_text(encoding="utf-8", errors="replace"):
            raise ComfyError(f"ComfyUI could not import a pack. Its log ends:\n{self.log_tail(60)}")

    def _get_json(self, path: str) -> Json:
        answer: Json = json.loads(self._request(path))
        return answer

    def _post_json(self, path: str, body: Json) -> Json:
        answer: Json = json.loads(self._request(path, json.dumps(body).encode()))
        return answer

    def _request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(f"http://{self.address}{path}", body, {"Content-Type": kind})
        try:
            with _opener().open(request, timeout=REQUEST_TIMEOUT) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ComfyError(f"{path}: HTTP {error.code}: {text[:2000]}", _json_or_empty(text)) from None
        except OSError as error:
            raise ComfyError(f"{path}: {error}") from None


def prepare_base(base: Path, packs: Sequence[Path] = (CHECKOUT,)) -> Path:
    """A base directory as ComfyUI expects it, with ``packs`` linked into its custom nodes."""
    base = base.resolve()
    for name in BASE_FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    for pack in packs:
        link_directory(base / "custom_nodes" / _pack_name(pack), pack)
    return base


def remove_base(base: Path) -> None:
    """Remove a base directory, and never follow its links."""
    for link in (base / "custom_nodes").iterdir():
        if link.is_dir():
            unlink_directory(link)
    shutil.rmtree(base, ignore_errors=True)


def command(
    comfyui: Path | str,
    python: Path | str,
    base: Path,
    port: int,
    cpu: bool | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of a server on ``base``; on the CPU if told, or if PyTorch finds no GPU (``cpu=None``)."""
    database = (base / "user" / "comfyui.db").as_posix()
    arguments = [str(python), str(Path(comfyui) / "main.py"), "--base-directory", str(base), "--port", str(port)]
    arguments += ["--listen", HOST, "--disable-auto-launch", "--database-url", f"sqlite:///{database}"]
    if runs_on_cpu(str(python)) if cpu is None else cpu:
        arguments.append("--cpu")
    return [*arguments, *options]


@functools.cache
def runs_on_cpu(python: str) -> bool:
    """What ``SCALPEL_DEVICE`` says (``cpu`` or ``gpu``), or else whether ``python``'s PyTorch finds no CUDA device."""
    wish = os.environ.get("SCALPEL_DEVICE", "").lower()
    if wish in ("cpu", "gpu"):
        return wish == "cpu"
    if shutil.which("nvidia-smi") is None:
        return True
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([python, "-c", question], capture_output=True, check=False).returncode != 0


def process_environment() -> dict[str, str]:
    """The environment of a server: ours, but without a search path that belongs to another ComfyUI."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**environment, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether nothing answers on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) != 0


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process, kindly first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def checked(entry: Json) -> Json:
    """A history entry that ended well; `ComfyError` with the node's own message for any other."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return entry
    for event, data in status.get("messages", []):
        if event == "execution_error":
            raise ComfyError(f"{data['node_type']}: {data['exception_message'].strip()}", data)
        if event == "execution_interrupted":
            raise ComfyError("the run was interrupted", data)
    raise ComfyError(f"the run ended as {status.get('status_str', 'unknown')!r}", status)


def explain_rejection(answer: Json) -> str:
    """In words, why the server would not queue a workflow."""
    error = answer.get("error") or {}
    lines = [f"{error.get('message', 'the server refused the workflow')} {error.get('details', '')}".strip()]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for problem in node.get("errors", []):
            lines.append(f"{node.get('class_type')} (node {node_id}): {problem['message']}: {problem['details']}")
    return "\n".join(lines)


def _pack_name(pack: Path) -> str:
    return "scalpel" if pack.resolve() == CHECKOUT else pack.name


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Requests to our own machine go there directly, whatever proxy the user has."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _json_or_empty(text: str) -> Json:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
