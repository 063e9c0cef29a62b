"""Part tokens: every layout that is in the world loads, nothing in a file runs, and padding is what it says."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from scalpel.core.heatmap import part_attention
from scalpel.core.part_token import PADDINGS, PartToken, combine, family, from_tensor, load, save
from scalpel.tests.tiny import randn

pytestmark = [  # PyTorch's remarks on damaged and on sparse files
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor"),
]
EMBEDDING = randn(2, 32, seed=1)
COMBINED = PartToken(
    randn(4, 32, seed=2),
    (1, 3),
    (74, 1, 1, 1),
    ("head", "hood"),
    {"model": "SDXL", "layers": "official", "loss": "0.1"},
)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("shape", [(2, 32), (1, 2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_the_authors_layouts_mean_row_0_background_76_times_and_row_1_part(shape, dtype, suffix, tmp_path):
    path = tmp_path / f"torso{suffix}"
    tensor = EMBEDDING.reshape(shape).to(dtype)
    if suffix == ".safetensors":
        save_file({"embedding": tensor}, path)
    else:
        torch.save(tensor, path)
    token = load(path)
    assert token.embedding.dtype == torch.float32
    assert torch.equal(token.embedding, tensor.float().reshape(2, 32))
    assert (token.part_rows, token.counts, token.names) == ((1,), (76, 1), ("torso",))
    assert token.width == 32


def test_a_pt_file_with_the_tensor_in_a_dictionary_or_as_a_parameter_loads(tmp_path):
    torch.save({"embedding": EMBEDDING}, tmp_path / "a.pt")
    torch.save(torch.nn.Parameter(EMBEDDING), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        token = load(tmp_path / name)
        assert torch.equal(token.embedding, EMBEDDING)
        assert not token.embedding.requires_grad


def test_a_tensor_saved_on_a_gpu_loads_where_there_is_none(tmp_path):
    torch.save(EMBEDDING, tmp_path / "cpu.pt")
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as saved,
        zipfile.ZipFile(tmp_path / "gpu.pt", "w", zipfile.ZIP_STORED) as changed,
    ):
        for entry in saved.infolist():
            content = saved.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            changed.writestr(entry, content)
    assert torch.equal(load(tmp_path / "gpu.pt").embedding, EMBEDDING)


# ---------------------------------------------------------------- several tokens in one file

THREE = randn(3, 2, 32, seed=11)
NOT_ONE = "where a file holds several part tokens, each is"


def _saved(content, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@pytest.mark.parametrize("shape", [(3, 2, 32), (6, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_authors_stack_of_several_tokens_is_one_token_of_several_parts(shape, dtype, suffix, tmp_path):
    tensor = THREE.to(dtype).reshape(shape)
    content = {"embedding": tensor} if suffix == ".safetensors" else tensor
    token = load(_saved(content, tmp_path / f"body{suffix}"))
    assert torch.equal(token.embedding, THREE.to(dtype).float().reshape(6, 32))
    assert token.counts == (76, 1) * 3
    assert token.parts == {"body 1": (1,), "body 2": (3,), "body 3": (5,)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_several_named_tokens_is_one_token_whose_parts_have_these_names(suffix, tmp_path):
    content = {"head": THREE[0].clone(), "torso": THREE[1:2].half()}
    token = load(_saved(content, tmp_path / f"body{suffix}"))
    assert torch.equal(token.embedding, torch.cat([THREE[0], THREE[1].half().float()]))
    assert token.counts == (76, 1, 76, 1)
    assert token.parts == {"head": (1,), "torso": (3,)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (torch.zeros(3, 32), rf"its tensor 'torso' has the shape \[3, 32\]; {NOT_ONE}"),
        (torch.zeros(4, 32), rf"its tensor 'torso' has the shape \[4, 32\]; {NOT_ONE}"),
        (torch.zeros(32), rf"its tensor 'torso' has the shape \[32\]; {NOT_ONE}"),
        (torch.zeros(2, 768), r"differ in width: 'head' is 32 \(unknown family\), 'torso' is 768 \(SD1.x\)"),
        (torch.zeros(2, 32).int(), "'torso' holds torch.int32; floating-point numbers are needed"),
        (torch.full((2, 32), float("inf")), "NaN or infinite"),
    ],
)
def test_among_several_tokens_the_odd_one_is_named(odd, words, suffix, tmp_path):
    path = _saved({"head": THREE[0].clone(), "torso": odd}, tmp_path / f"body{suffix}")
    with pytest.raises(ValueError, match=f"^part token file 'body{suffix}': .*{words}"):
        load(path)


def test_something_else_among_several_tokens_of_a_pt_file_is_named(tmp_path):
    path = _saved({"head": THREE[0], "torso": [1, 2]}, tmp_path / "body.pt")
    with pytest.raises(ValueError, match="'torso' is not a part token"):
        load(path)


def test_parts_of_a_file_that_names_none_stay_apart(tmp_path):
    metadata = {"part_rows": "[1, 3]", "count": "[74, 1, 1, 1]"}
    save_file({"embedding": COMBINED.embedding}, tmp_path / "body.safetensors", metadata)
    assert load(tmp_path / "body.safetensors").parts == {"body 1": (1,), "body 2": (3,)}


def test_a_combined_token_and_one_of_words_are_saved_and_loaded_as_they_are(tmp_path):
    words = PartToken(randn(77, 32, seed=12), (1, 2), (1,) * 77, ("car hood", "car hood"))
    for i, token in enumerate((words, combine(COMBINED, words))):
        path = tmp_path / f"{i}.safetensors"
        save(token, path)
        back = load(path)
        assert torch.equal(back.embedding, token.embedding)
        assert (back.counts, back.parts) == (token.counts, token.parts)


# ---------------------------------------------------------------- saving


def test_saving_and_loading_keeps_the_token_and_all_that_is_said_of_it(tmp_path):
    path = tmp_path / "two.safetensors"
    save(COMBINED, path)
    back = load(path)
    assert torch.equal(back.embedding, COMBINED.embedding)
    assert (back.part_rows, back.counts, back.names) == (COMBINED.part_rows, COMBINED.counts, COMBINED.names)
    assert back.info == COMBINED.info


def test_saving_never_overwrites(tmp_path):
    path = tmp_path / "token.safetensors"
    save(COMBINED, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="already exists; part tokens are never overwritten"):
        save(from_tensor(EMBEDDING, "head"), path)
    assert path.read_bytes() == before


def test_the_family_of_a_width_is_named():
    assert (family(768), family(2048), family(31)) == ("SD1.x", "SDXL", "unknown family")


# ---------------------------------------------------------------- bad files


def _whole(tmp_path, suffix):
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save(EMBEDDING, path)
    else:
        save(COMBINED, path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_off_anywhere_is_refused_with_its_name(suffix, tmp_path):
    content = _whole(tmp_path, suffix)
    path = tmp_path / f"head{suffix}"
    for length in {0, 1, 2, 7, 8, 9, *range(10, len(content) - 1, 37), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"^part token file 'head{suffix}': "):
            load(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_with_random_bytes_is_refused_or_read_but_never_anything_else(suffix, tmp_path):
    content = bytearray(_whole(tmp_path, suffix))
    path = tmp_path / f"head{suffix}"
    refused = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"part token file 'head{suffix}': ")  # noqa: PT017 - or it loads
    assert refused > 10


NOT_TOKENS = {"text": b"once upon a time", "an empty file": b"", "a pickled list": pickle.dumps([1, 2, 3])}


@pytest.mark.parametrize("name", NOT_TOKENS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_no_token_at_all_is_refused(name, suffix, tmp_path):
    path = tmp_path / f"head{suffix}"
    path.write_bytes(NOT_TOKENS[name])
    with pytest.raises(ValueError, match=rf"part token file 'head{suffix}': it "):
        load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3, 32), r"is a tensor \[2, width\], .* \[n, 2, width\] or \[2·n, width\]; found \[3, 32\]"),
        (torch.zeros(1, 32), r"found \[1, 32\]"),
        (torch.zeros(0, 32), r"found \[0, 32\]"),
        (torch.zeros(32), r"found \[32\]"),
        (torch.zeros(2, 3, 32), r"found \[2, 3, 32\]"),
        (torch.zeros(0, 2, 32), r"found \[0, 2, 32\]"),
        (torch.zeros(1, 2, 2, 32), r"found \[1, 2, 2, 32\]"),
        (torch.zeros(2, 0), r"this one has \[2, 0\]"),
        (EMBEDDING.to_sparse(), "torch.sparse_coo tensor on cpu; an ordinary tensor is needed"),
        (EMBEDDING.to("meta"), "on meta; an ordinary tensor is needed"),
        (torch.full((2, 32), float("nan")), "NaN or infinite"),
        (torch.zeros(2, 32, dtype=torch.int64), "floating-point"),
        ({"weights": EMBEDDING}, "not a part token"),
        ([EMBEDDING, EMBEDDING], "not a part token"),
        (3.5, "not a part token"),
    ],
)
def test_a_pt_file_with_something_else_says_what_was_found_or_expected(content, words, tmp_path):
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "head.pt")


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (
            {"lora.up": EMBEDDING.T.contiguous(), "lora.down": torch.zeros(3, 32)},
            None,
            "no tensor named 'embedding'; found: lora.down, lora.up",
        ),
        ({f"layer.{i}": torch.zeros(9) for i in range(9)}, None, "found: layer.0, .*, layer.4 and 4 more$"),
        ({}, None, "found: nothing"),
        ({"embedding": EMBEDDING.long()}, None, "torch.int64; floating-point numbers are needed"),
        ({"embedding": EMBEDDING}, {"part_rows": "one", "count": "[76, 1]"}, "not JSON lists"),
        ({"embedding": EMBEDDING}, {"part_rows": "1", "count": "[76, 1]"}, "not JSON lists"),
        ({"embedding": EMBEDDING}, {"part_rows": "[1]"}, "not JSON lists"),
        ({"embedding": EMBEDDING}, {"part_rows": "[1]", "count": "[Infinity, 1]"}, "not JSON lists"),
        ({"embedding": EMBEDDING}, {"part_rows": "[1]", "count": '["many", 1]'}, "not JSON lists"),
        ({"embedding": EMBEDDING}, {"part_rows": "[2]", "count": "[76, 1]"}, r"part rows \[2\] do not fit 2 rows"),
        ({"embedding": EMBEDDING}, {"part_rows": "[0, 1]", "count": "[1, 1]"}, "at least is background"),
        ({"embedding": EMBEDDING}, {"part_rows": "[]", "count": "[1, 1]"}, "do not fit"),
        ({"embedding": EMBEDDING}, {"part_rows": "[1]", "count": "[76]"}, "one count ≥ 1 per row"),
        ({"embedding": EMBEDDING}, {"part_rows": "[1]", "count": "[0, 1]"}, "one count ≥ 1 per row"),
        (
            {"embedding": EMBEDDING},
            {"part_rows": "[1]", "count": "[76, 1]", "names": '["a", "b"]'},
            "one name per part",
        ),
    ],
)
def test_a_safetensors_file_with_something_else_says_what_was_found_or_expected(tensors, metadata, words, tmp_path):
    save_file(tensors, tmp_path / "head.safetensors", metadata)
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path / "head.safetensors")
    assert str(error.value).startswith("part token file 'head.safetensors': ")


def test_a_missing_file_is_named(tmp_path):
    for name in ("gone.pt", "gone.safetensors"):
        with pytest.raises(ValueError, match=f"part token file '{name}': .*No such file"):
            load(tmp_path / name)


class _Hostile:
    """Unpickled with Python's own pickle, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["torch", "torch, legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_code_in_a_file_does_not_run(how, suffix, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / f"head{suffix}"
    content = {"embedding": EMBEDDING, "more": _Hostile(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match=f"part token file 'head{suffix}': it ") as error:
        load(path)
    assert not trace.exists()
    if suffix != ".safetensors":
        assert "could run code" in str(error.value)
    if how == "pickle":
        pickle.loads(path.read_bytes())["more"].close()
        assert trace.exists(), "the file of this test is not hostile"


# ---------------------------------------------------------------- paddings


def _written_out(token):
    """The token as a context of 77 single rows, and which of them are parts."""
    counts = torch.tensor(token.counts)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return token.embedding[owner], [int(place) for p in token.part_rows for place in (owner == p).nonzero()]


def _ours(queries, token):
    parts = list(token.parts.values())
    return part_attention(queries, token.embedding, torch.tensor(token.counts), parts, heads=1)


def _attention(queries, rows, parts):
    probabilities = (queries @ rows.T * rows.shape[1] ** -0.5).softmax(-1)
    return probabilities[..., parts].transpose(-1, -2)


CONTEXT = randn(77, 32, seed=3)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_padded_token_is_the_context_it_stands_for(padding):
    queries = randn(1, 20, 32, seed=4)
    token = from_tensor(EMBEDDING, "head").padded(padding, CONTEXT)
    background, part = EMBEDDING
    filling = {
        "background": background, "none": None, "start": CONTEXT[0], "end": CONTEXT[-1], "zero": torch.zeros(32),
    }[padding]  # fmt: skip
    rows = [background, part] if filling is None else [background, part, *[filling] * 75]
    expected = _attention(queries, torch.stack(rows), [1])
    ours = _ours(queries, token)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert sum(token.counts) == len(rows)
    assert token.names == ("head",)


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_combined_token_keeps_all_its_rows_whatever_the_padding(padding):
    token = COMBINED.padded(padding, CONTEXT)
    assert torch.equal(token.embedding[:4], COMBINED.embedding)
    assert token.part_rows == (1, 3)
    rows, parts = _written_out(token)
    assert len(rows) == (4 if padding == "none" else 77)
    queries = randn(1, 20, 32, seed=4)
    ours = _ours(queries, token)
    torch.testing.assert_close(ours, _attention(queries, rows, parts), atol=1e-6, rtol=1e-5)


def test_several_background_rows_each_keep_their_own_count():
    token = PartToken(randn(3, 32, seed=5), (2,), (40, 36, 1), ("head",))
    rows, parts = _written_out(token)
    queries = randn(1, 20, 32, seed=6)
    ours = _ours(queries, token)
    torch.testing.assert_close(ours, _attention(queries, rows, parts), atol=1e-6, rtol=1e-5)
    assert token.padded("zero", CONTEXT).counts == (1, 1, 1, 74)


def test_a_token_that_fills_its_context_has_no_place_for_padding():
    full = PartToken(randn(77, 32, seed=7), (76,), (1,) * 77, ("head",))
    assert full.padded("zero", CONTEXT).counts == (1,) * 77


def test_an_unknown_padding_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown padding 'left'; known: background, none, start, end, zero"):
        from_tensor(EMBEDDING, "head").padded("left", CONTEXT)


def test_the_metadata_of_a_saved_file_are_plain_json(tmp_path):
    from safetensors import safe_open

    save(COMBINED, tmp_path / "two.safetensors")
    with safe_open(str(tmp_path / "two.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["part_rows"]) == [1, 3]
    assert json.loads(metadata["count"]) == [74, 1, 1, 1]
    assert json.loads(metadata["names"]) == ["head", "hood"]
    assert metadata["layers"] == "official"
