"""Layers are read off the loaded model, in the order in which they run, and named by a small language."""

from __future__ import annotations

import pytest
import torch
from comfy.model_patcher import ModelPatcher

from scalpel.core.unet.layers import address_of, context_width, is_sdxl, layer_table
from scalpel.tests import tiny


@pytest.fixture(scope="module")
def sd15():
    return tiny.model(tiny.SD15)


@pytest.fixture(scope="module")
def sdxl():
    return tiny.model(tiny.SDXL)


def _addresses(block, numbers, count=1):
    return [(block, number, index) for number in numbers for index in range(count)]


SD15_ORDER = [
    *_addresses("input", [1, 2, 4, 5, 7, 8]),
    *_addresses("middle", [0]),
    *_addresses("output", range(3, 12)),
]
SDXL_ORDER = [
    *_addresses("input", [4, 5], 2),
    *_addresses("input", [7, 8], 10),
    *_addresses("middle", [0], 10),
    *_addresses("output", [0, 1, 2], 10),
    *_addresses("output", [3, 4, 5], 2),
]


def test_sd15_has_its_16_blocks_and_sdxl_its_70_in_execution_order(sd15, sdxl):
    assert list(layer_table(sd15).layers) == SD15_ORDER
    assert list(layer_table(sdxl).layers) == SDXL_ORDER
    assert (len(SD15_ORDER), len(SDXL_ORDER)) == (16, 70)


@pytest.mark.parametrize(("name", "kind"), [("sd15", tiny.SD15), ("sdxl", tiny.SDXL)])
def test_the_table_is_what_the_running_model_says_of_itself(name, kind, request):
    patcher = request.getfixturevalue(name).clone()
    seen = []

    def look(n, context, value, options):
        seen.append((address_of(options), options["activations_shape"][-2:], options["n_heads"]))
        return n, context, value

    patcher.set_model_attn2_patch(look)
    with torch.inference_mode():
        tiny.plain(patcher, kind, steps=1, cfg=1.0, latent_image=tiny.latent(32, 16))
    table = layer_table(patcher)
    assert [address for address, _, _ in seen] == list(table.layers)
    for address, size, heads in seen:
        assert size == [32 // table[address].downsample, 16 // table[address].downsample]
        assert heads == table[address].heads


def test_the_width_of_the_context_and_the_family_are_read_off_the_model(sd15, sdxl):
    assert context_width(sd15) == context_width(sdxl) == tiny.WIDTH
    assert is_sdxl(sdxl)
    assert not is_sdxl(sd15)


def test_official_is_what_the_authors_inference_averages_on_sdxl_and_the_decoder_elsewhere(sd15, sdxl):
    official = layer_table(sdxl).select("official")
    assert official == {SDXL_ORDER[i] for i in [*range(24, 60), *range(4)]}
    assert len(official) == 40
    assert layer_table(sd15).select("official") == set(SD15_ORDER[7:])


DECODER = SDXL_ORDER[34:]
NAMED = {
    "all": SDXL_ORDER,
    "decoder": DECODER,
    "first8": _addresses("output", [0], 10)[:8],
    "input": SDXL_ORDER[:24],
    "middle": SDXL_ORDER[24:34],
    "output": DECODER,
    "input.4": _addresses("input", [4], 2),
    "input.7-8": _addresses("input", [7, 8], 10),
    "output.0[3]": [("output", 0, 3)],
    "output.0[0-7]": _addresses("output", [0], 10)[:8],
    "output.0-5[0-1]": [(b, n, i) for b, n, i in DECODER if i < 2],
    "middle[0-9]": SDXL_ORDER[24:34],
    "input.7-8,output.3-5": [*_addresses("input", [7, 8], 10), *_addresses("output", [3, 4, 5], 2)],
    " first8 , input.4 ": [*_addresses("output", [0], 10)[:8], *_addresses("input", [4], 2)],
    "decoder,decoder,output.3": DECODER,
    "level:32": [*SDXL_ORDER[4:64]],
    "level:64": [*SDXL_ORDER[:4], *SDXL_ORDER[64:]],
    "level:1": [*SDXL_ORDER[4:64]],
}


@pytest.mark.parametrize("text", NAMED)
def test_every_form_of_a_name_means_its_layers(text, sdxl):
    assert layer_table(sdxl).select(text) == set(NAMED[text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("level:64", _addresses("input", [1, 2]) + _addresses("output", [9, 10, 11])),
        ("level:32", _addresses("input", [4, 5]) + _addresses("output", [6, 7, 8])),
        ("level:16", _addresses("input", [7, 8]) + _addresses("output", [3, 4, 5])),
        ("level:8", _addresses("middle", [0])),
        ("first8", _addresses("output", range(3, 11))),
    ],
)
def test_levels_of_sd15_are_those_of_a_512_pixel_picture(text, expected, sd15):
    assert layer_table(sd15).select(text) == set(expected)


@pytest.mark.parametrize(
    "text",
    [
        "decoderr", "output.99", "input.0", "output.5-3", "output.0[10]", "level:0", "level:x", "outputs.3", "1",
        "input 4", "output.0[0-", "decoder,nonsense",
    ],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_what_exists(text, sdxl):
    wrong = text.split(",")[-1]
    with pytest.raises(ValueError, match="layers") as error:
        layer_table(sdxl).select(text)
    message = str(error.value)
    assert message.startswith(f"layers: {wrong!r} names no layer of this model. Accepted: all, decoder, first8")
    assert message.endswith(
        "This model has: input.4[0-1], input.5[0-1], input.7[0-9], input.8[0-9], middle.0[0-9], "
        "output.0[0-9], output.1[0-9], output.2[0-9], output.3[0-1], output.4[0-1], output.5[0-1]"
    )


@pytest.mark.parametrize("text", ["", "  ", ",", " , "])
def test_no_name_at_all_is_refused(text, sd15):
    with pytest.raises(ValueError, match="layers: the input is empty"):
        layer_table(sd15).select(text)


class _Model(torch.nn.Module):
    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model


class _DiffusionTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.joint_blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])


class _UNetWithoutText(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))])
        self.middle_block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))
        self.output_blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))])


@pytest.mark.parametrize("network", [_DiffusionTransformer, _UNetWithoutText])
def test_a_model_without_cross_attention_is_refused_with_the_families_that_work(network):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"^model: _Model has no U-Net .* SD1.x, SD2.x and SDXL families$"):
        layer_table(ModelPatcher(_Model(network()), cpu, cpu))
