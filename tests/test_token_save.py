"""Saving a part token: where, under which name, never over another file, and what a prefix from a workflow may be."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors import safe_open

from scalpel.core.part_token import PartToken, from_tensor
from scalpel.core.part_token import save as save_token
from scalpel.nodes import part_tokens
from scalpel.nodes.files import save_numbered
from scalpel.nodes.part_tokens import PartTokenLoader, PartTokenSave

INFO = {"model_family": "SD1.x", "layers": "decoder", "noise_range": "[0.25, 0.0]", "images": "5", "loss": "0.1"}
TOKEN = PartToken(torch.arange(12.0).view(3, 4), (1, 2), (75, 1, 1), ("head", "hair"), INFO)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty models folder; returns its models/part_tokens."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "part_tokens", ([str(tmp_path / "part_tokens")], part_tokens.SUFFIXES)
    )
    folder_paths.filename_list_cache.pop("part_tokens", None)
    yield tmp_path / "part_tokens"
    folder_paths.filename_list_cache.pop("part_tokens", None)


def save(prefix, token=TOKEN):
    """Save by the node; returns what it tells the user."""
    output = PartTokenSave.execute(token, prefix)
    assert output.result is None
    return output.ui.as_dict()["text"][0]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_saved_token_is_listed_and_loads_as_it_was(folder):
    assert save("head") == "models/part_tokens/head_00001.safetensors"
    assert folder_paths.get_filename_list("part_tokens") == ["head_00001.safetensors"]
    (loaded,) = PartTokenLoader.execute("head_00001.safetensors").args
    assert torch.equal(loaded.embedding, TOKEN.embedding)
    assert (loaded.part_rows, loaded.counts, loaded.names) == (TOKEN.part_rows, TOKEN.counts, TOKEN.names)
    assert loaded.info == INFO


def test_the_file_says_what_the_design_names(folder):
    save("head")
    with safe_open(folder / "head_00001.safetensors", "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("embedding").dtype == torch.float32
    assert json.loads(metadata["part_rows"]) == [1, 2]
    assert json.loads(metadata["count"]) == [75, 1, 1]
    assert json.loads(metadata["names"]) == ["head", "hair"]
    assert set(metadata) >= {"model_family", "layers", "noise_range", "images", "loss"}


def test_numbers_go_on_after_the_largest_and_nothing_is_overwritten(folder):
    save("head")
    (folder / "head_00007.safetensors").write_bytes(b"mine")
    (folder / "Head_00008.SAFETENSORS").write_bytes(b"mine")
    (folder / "head_99999.pt").write_bytes(b"not of our kind")
    (folder / "headless_00050.safetensors").write_bytes(b"another prefix")
    assert save("head") == "models/part_tokens/head_00009.safetensors"
    assert (folder / "head_00007.safetensors").read_bytes() == b"mine"
    (folder / "head_99999.safetensors").write_bytes(b"mine")
    assert save("head").endswith("head_100000.safetensors")


@pytest.mark.parametrize("prefix", ["animals/head", "animals\\head", "  animals/head "])
def test_a_subfolder_is_made(folder, prefix):
    assert save(prefix) == "models/part_tokens/animals/head_00001.safetensors"
    assert files(folder) == ["animals/head_00001.safetensors"]
    listed = folder_paths.get_filename_list("part_tokens")
    assert [name.replace(os.sep, "/") for name in listed] == files(folder)


def test_names_in_any_script_with_dots_and_spaces_inside_are_fine(folder):
    assert save("голова v1.2 (best)").endswith("/голова v1.2 (best)_00001.safetensors")


@pytest.mark.parametrize(
    "prefix",
    ["", "  ", "/etc/head", "../head", "a/../../head", "..\\head", "a//b", "a/", "C:\\head", "C:head", "\\\\server\\x",
     ".hidden", "a/.", "head.", "a./b", "con", "NUL.x", "a/com1", "he\0ad", "he\nad", "a*b", "a|b", "x" * 201,
     "頭" * 80],
)  # fmt: skip
def test_a_prefix_that_leaves_the_folder_or_is_no_name_is_refused(folder, tmp_path, prefix):
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"^filename_prefix: .* cannot be used; accepted is a name such as") as error:
        save(prefix)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_a_file_in_the_place_of_a_subfolder_is_said(folder):
    save("head")
    with pytest.raises(ValueError, match=r"^filename_prefix: .* names a folder where a file is"):
        save("head_00001.safetensors/x")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_many_threads_save_at_once_and_each_gets_a_file_of_its_own(folder, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    tokens = [from_tensor(torch.full((2, 4), float(i)), f"part {i}") for i in range(16)]
    start = threading.Barrier(len(tokens))
    saved: dict[int, Path] = {}

    def run(i):
        start.wait()
        saved[i] = save_numbered(lambda path: save_token(tokens[i], path), folder, "head")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(folder) == [f"head_{i + 1:05}.safetensors" for i in range(16)]
    for i, file in saved.items():
        (loaded,) = PartTokenLoader.execute(file.name).args
        assert torch.equal(loaded.embedding, tokens[i].embedding)


def _no_links(*_):
    raise PermissionError("this file system has no links")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_save_that_fails_leaves_nothing(folder, links, monkeypatch):
    save("head")

    def fail(*_):
        raise KeyboardInterrupt

    if links:
        monkeypatch.setattr(os, "link", fail)
    else:
        monkeypatch.setattr(os, "link", _no_links)
        monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        save("head")
    assert files(folder) == ["head_00001.safetensors"]
