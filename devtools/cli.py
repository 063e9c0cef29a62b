"""The commands of ``dev.py``: what is typed, and which process it starts."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import server
from .environment import CHECKOUT, DEFAULT_COMFYUI, OLD_COMFYUI, PACKAGE, Environment, cache_dir, prepare
from .steps import StepFailed, say

BENCH = CHECKOUT / "bench"
DEMO_WORKFLOW = CHECKOUT / "example_workflows" / "api" / "edit_one_part.json"
INTERRUPTED = 130
PATIENCE = 10.0  # seconds for a program to stop in its own way


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return the exit code."""
    arguments, passed_on = build_parser().parse_known_args(argv)
    passed_on = [*passed_on, *getattr(arguments, "rest", [])]
    if passed_on and not hasattr(arguments, "rest"):
        build_parser().error(f"unknown: {' '.join(passed_on)}")
    _exit_when_terminated()
    try:
        return int(arguments.run(arguments, passed_on))
    except StepFailed as failure:
        say(f"\n{failure}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on from the last finished step.")
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """``dev.py COMMAND [options] [arguments for what it runs]``."""
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Scalpel's developer tool. It makes what it needs (several GB, once) in a cache folder: "
        f"{cache_dir()} (set SCALPEL_CACHE for another).",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = _common_options()

    demo = commands.add_parser("demo", parents=[common], help="edit one part through a real server, into demo/")
    demo.add_argument("--workflow", type=Path, default=DEMO_WORKFLOW, help="another API workflow")
    demo.add_argument("--output", type=Path, default=CHECKOUT / "demo", help="another folder for the results")
    demo.set_defaults(run=run_demo)

    test = _passing_on(commands, common, "test", "lint, then pytest; further arguments go to pytest")
    test.set_defaults(run=run_test)
    lint = commands.add_parser("lint", parents=[common], help="ruff and mypy")
    lint.add_argument("--fix", action="store_true", help="let ruff correct and reformat what it can")
    lint.set_defaults(run=run_lint)

    serve = commands.add_parser("serve", parents=[common], help="the real page, with the pack and its demo model")
    serve.add_argument("--port", type=int, default=8188)
    serve.add_argument("--listen", nargs="?", const="0.0.0.0", metavar="IP", help="let other machines in")
    serve.set_defaults(run=run_serve)

    bench = _passing_on(commands, common, "bench", "run bench/NAME.py, or list the names")
    bench.set_defaults(run=run_bench)
    python = _passing_on(commands, common, "python", "run Python with ComfyUI and the pack importable")
    python.set_defaults(run=run_python)
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--comfyui",
        metavar="PATH",
        default=os.environ.get("COMFYUI_PATH"),
        help="an existing ComfyUI folder (default: COMFYUI_PATH, or one is downloaded)",
    )
    common.add_argument(
        "--comfyui-version",
        metavar="X.Y.Z",
        default=DEFAULT_COMFYUI,
        help="the ComfyUI to download (default: %(default)s)",
    )
    common.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        help="default: SCALPEL_DEVICE, or the GPU if PyTorch finds a CUDA device",
    )
    return common


def _passing_on(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    name: str,
    text: str,
) -> argparse.ArgumentParser:
    """A command whose unknown arguments, and all after the first of them that is no option, go to what it runs."""
    command = commands.add_parser(name, parents=[common], help=text, allow_abbrev=False)
    command.add_argument("rest", nargs=argparse.REMAINDER, metavar="ARGS")
    return command


# ---- the commands


def run_demo(arguments: argparse.Namespace, _passed_on: list[str]) -> int:
    environment = _environment(arguments)
    if not arguments.workflow.is_file():
        raise StepFailed(f"there is no workflow {arguments.workflow}.")
    command = [environment.python, "-m", "devtools.demo", "--comfyui", environment.comfyui]
    command += ["--workflow", arguments.workflow.resolve(), "--output", arguments.output.resolve()]
    return _call(command, server.process_environment(), cwd=CHECKOUT)


def run_test(arguments: argparse.Namespace, pytest_arguments: list[str]) -> int:
    environment = _environment(arguments, also=[OLD_COMFYUI])
    lint = _lint(environment)
    if lint:
        say("\nruff or mypy found something (above): this run fails whatever pytest says.")
    say("\npytest")
    code = _call([environment.python, "-m", "pytest", *pytest_arguments], _variables(environment), cwd=CHECKOUT)
    return code or lint


def run_lint(arguments: argparse.Namespace, _passed_on: list[str]) -> int:
    return _lint(_environment(arguments), arguments.fix)


def run_serve(arguments: argparse.Namespace, _passed_on: list[str]) -> int:
    if not server.port_is_free(arguments.port):
        raise StepFailed(f"port {arguments.port} is in use: choose another with --port.")
    environment = _environment(arguments)
    base = server.prepare_base(environment.checkout_cache / "base")
    options = ["--disable-api-nodes"]
    if arguments.listen:
        options += ["--listen", arguments.listen]
    if arguments.comfyui:
        options += ["--extra-model-paths-config", _models_of(environment.comfyui, base)]
    command = server.command(environment.comfyui, environment.python, base, arguments.port, options=options)
    say(f"ComfyUI with Scalpel: http://127.0.0.1:{arguments.port} (Ctrl-C stops it). Workflow > Browse Templates.")
    say(f"Its models, input and output folders are in {base}.")
    return _call(command, server.process_environment(), cwd=base)


def run_bench(arguments: argparse.Namespace, passed_on: list[str]) -> int:
    names = sorted(path.stem for path in BENCH.glob("*.py") if not path.stem.startswith("_"))
    if not passed_on:
        say("Benchmarks: " + (", ".join(names) or "none yet") + ". Run one with: python dev.py bench NAME [arguments]")
        return 0
    name, *rest = passed_on
    if name not in names:
        raise StepFailed(f"there is no benchmark {name!r}; there are: {', '.join(names) or 'none'}.")
    environment = _environment(arguments)
    return _call([environment.python, "-m", f"{PACKAGE}.bench.{name}", *rest], _variables(environment))


def run_python(arguments: argparse.Namespace, passed_on: list[str]) -> int:
    environment = _environment(arguments)
    return _call([environment.python, *passed_on], _variables(environment))


# ---- how


def _environment(arguments: argparse.Namespace, also: Sequence[str] = ()) -> Environment:
    if arguments.device:
        os.environ["SCALPEL_DEVICE"] = arguments.device
    return prepare(arguments.comfyui, arguments.comfyui_version, also)


def _variables(environment: Environment) -> dict[str, str]:
    return environment.variables("cpu" if server.runs_on_cpu(str(environment.python)) else "gpu")


def _lint(environment: Environment, fix: bool = False) -> int:
    """ruff, then mypy; both run, and the result is non-zero if either complains."""
    cache = environment.checkout_cache / "ruff"
    results = []
    for check in (["check", "--fix"], ["format"]) if fix else (["check"], ["format", "--check"]):
        say(f"ruff {check[0]}")
        command = [environment.python, "-m", "ruff", *check, "--cache-dir", cache, "."]
        results.append(_call(command, dict(os.environ), cwd=CHECKOUT))
    say("mypy")
    results.append(_mypy(environment))
    return int(any(results))


def _mypy(environment: Environment) -> int:
    """Check the checkout as the package it is, from beside the link that gives it its name."""
    command = [environment.python, "-m", "mypy", "--config-file", CHECKOUT / "pyproject.toml"]
    command += ["--cache-dir", environment.checkout_cache / "mypy"]
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        env=variables,
        cwd=environment.import_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    say(re.sub(rf"^{PACKAGE}[/\\]", "", done.stdout, flags=re.MULTILINE).rstrip())
    return done.returncode


def _models_of(comfyui: Path, base: Path) -> str:
    """A file that lets the private server see the models of an existing ComfyUI."""
    folders = sorted(folder.name for folder in (comfyui / "models").glob("*/"))
    lines = ["existing:", f"  base_path: '{comfyui / 'models'}'", *(f"  {name}: {name}" for name in folders)]
    config = base / "extra_model_paths.yaml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(config)


def _call(command: Sequence[object], variables: dict[str, str], cwd: Path | None = None) -> int:
    """Run a command in the foreground; if we are to stop, let it stop in its own way first."""
    sys.stdout.flush()
    process = subprocess.Popen([str(part) for part in command], env=variables, cwd=cwd)
    try:
        return process.wait()
    except KeyboardInterrupt:  # Ctrl-C has reached it, too
        process.wait()
        return INTERRUPTED
    except SystemExit:
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # started in the background, it was told to ignore Ctrl-C
            server.stop(process)
        raise


def _exit_when_terminated() -> None:
    """Make a polite kill end this process as an exit does, so that what it started is ended as well."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
