"""Every bad input gives one readable sentence: which input, what was found, what is accepted; the next run works."""

from __future__ import annotations

import folder_paths
import pytest
import torch

from scalpel.core.part_token import from_tensor, save
from scalpel.nodes.feature_blend import EditBatch, FeatureBlendSampler
from scalpel.nodes.masks import AdaptiveThreshold, AttentionMaskExtractor
from scalpel.nodes.part_tokens import PartTokenLoader
from scalpel.tests import tiny

KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
SMALL = tiny.latent(16, 8)
NAN_MASK = torch.ones(1, 128, 64)
NAN_MASK[0, 3, 4] = float("nan")


def _prompt(width=tiny.WIDTH, batch=1, **options):
    return [[torch.zeros(batch, 77, width), options]]


BAD = {
    "a token of another width": (
        {"part_token": from_tensor(torch.zeros(2, 2048), "head")},
        ["part_token", "2048 wide (SDXL)", "model's text context is 32 wide", "trained for this model"],
    ),
    "neither token nor mask": ({"part_token": None}, ["part_token", "neither", "give one of them"]),
    "an unknown layer": ({"layers": "decodr"}, ["layers", "'decodr'", "Accepted: all, decoder", "output.3"]),
    "no layer": ({"layers": " "}, ["layers", "empty", "Accepted"]),
    "a padding from the API": ({"padding": "left"}, ["padding", "'left'", "background, none, start, end, zero"]),
    "a mask mode from the API": ({"mask_mode": "add"}, ["mask_mode", "'add'", "replace", "multiply"]),
    "omega too small": ({"omega": 0.0}, ["omega", "0.0", "0.25 to 4.0"]),
    "omega too large": ({"omega": 5.0}, ["omega", "5.0", "0.25 to 4.0"]),
    "omega NaN": ({"omega": float("nan")}, ["omega", "nan", "0.25 to 4.0"]),
    "blend_until negative": ({"blend_until": -0.1}, ["blend_until", "-0.1", "0.0 to 1.0"]),
    "blend_until above one": ({"blend_until": 1.5}, ["blend_until", "1.5", "0.0 to 1.0"]),
    "cfg below one": ({"cfg": 0.5}, ["cfg", "0.5", "1.0 to 100.0"]),
    "a latent of 16 channels": (
        {"latent_image": {"samples": torch.ones(1, 16, 16, 8)}},
        ["latent_image", "[1, 16, 16, 8]", "[batch, 4, height, width]"],
    ),
    "a video's latent": (
        {"latent_image": {"samples": torch.ones(1, 4, 5, 16, 8)}},
        ["latent_image", "[1, 4, 5, 16, 8]", "[batch, 4, height, width]"],
    ),
    "an empty mask": ({"mask": torch.zeros(1, 128, 64)}, ["mask", "empty", "paint"]),
    "a mask with NaN": ({"mask": NAN_MASK}, ["mask", "NaN", "0 to 1"]),
    "a mask of another shape": ({"mask": torch.ones(1, 64, 64)}, ["mask", "64 × 64", "image is 64 × 128"]),
    "two masks for one image": ({"mask": torch.ones(2, 128, 64)}, ["mask", "2 masks for 1 images", "give 1 or 1"]),
    "an image as mask": ({"mask": torch.ones(1, 128, 64, 3)}, ["mask", "[1, 128, 64, 3]", "[height, width]"]),
    "source of another model": ({"source": _prompt(768)}, ["source", "768 wide (SD1.x)", "32 wide"]),
    "edit of another model": ({"edit": _prompt(2048)}, ["edit", "2048 wide (SDXL)", "32 wide"]),
    "negative of another model": ({"negative": _prompt(16)}, ["negative", "16 wide", "32 wide"]),
    "an empty source": ({"source": []}, ["source", "empty", "CLIP Text Encode"]),
    "an empty edit": ({"edit": []}, ["edit", "empty", "CLIP Text Encode"]),
    "an empty negative": ({"negative": []}, ["negative", "empty", "CLIP Text Encode"]),
    "batches that do not pair": (
        {"edit": _prompt(batch=3), "latent_image": tiny.latent(16, 8, 2)},
        ["3 edits", "2 latents", "one edit for any number of latents"],
    ),
    "two sources for one latent": ({"source": _prompt(batch=2)}, ["source", "a batch of 2 prompts", "1 rows"]),
    "different numbers of entries": (
        {"source": _prompt() * 2, "edit": _prompt() * 3},
        ["source", "2 entries", "another prompt has 3"],
    ),
    "areas that contradict": (
        {"source": _prompt(area=(8, 8, 0, 0)), "edit": _prompt(area=(4, 4, 0, 0))},
        ["edit, source", "'area'", "one batch"],
    ),
    "no sigmas": ({"sigmas": torch.tensor([])}, ["sigmas", "no step", "at least two sigmas"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_input_of_the_sampler_is_said_in_one_sentence(what, model):
    change, words = BAD[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        tiny.edit(model, KIND, **{"latent_image": SMALL, **change})
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_after_all_bad_inputs_a_good_run_gives_the_same_bits(model):
    before = tiny.edit(model, KIND, latent_image=SMALL, steps=2).edited
    for change, _ in BAD.values():
        with pytest.raises(ValueError):  # noqa: PT011 - see the test above
            tiny.edit(model, KIND, **{"latent_image": SMALL, **change})
    assert torch.equal(tiny.edit(model, KIND, latent_image=SMALL, steps=2).edited, before)


@pytest.mark.parametrize("name", ["source", "edit", "negative"])
def test_a_prompt_without_pooled_output_is_refused_for_sdxl_and_fine_for_sd15(name, model):
    bare = {name: [[tiny.randn(1, 77, tiny.WIDTH, seed=1), {}]]}
    with pytest.raises(ValueError, match=f"^{name}: it has no pooled output, which SDXL models need; encode"):
        tiny.edit(tiny.model(tiny.SDXL), tiny.SDXL, latent_image=SMALL, **bare)
    assert torch.isfinite(tiny.edit(model, KIND, latent_image=SMALL, steps=1, **bare).edited).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps: 0 is out of range; accepted are numbers from 1 to 10000"),
        ({"denoise": 1.5}, "denoise: 1.5 is out of range"),
        ({"denoise": 0.0}, "sigmas: there is no step to take; give at least two sigmas, or a denoise above 0"),
    ],
)
def test_the_simple_node_checks_its_own_inputs(change, words, model):
    settings = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    with pytest.raises(ValueError, match=words):
        FeatureBlendSampler.execute(
            model, tiny.prompt(KIND, 1), tiny.prompt(KIND, 2), tiny.prompt(KIND, 3), SMALL, **{**settings, **change},
            omega=1.0, blend_until=1.0, layers="all", padding="none", part_token=tiny.token(),
        )  # fmt: skip


def test_edits_of_different_encoders_are_refused_by_name():
    with pytest.raises(ValueError, match=r"different text encoders: their widths differ \(edit_a: 768, edit_b: 2048\)"):
        EditBatch.execute(_prompt(768), _prompt(2048))
    with pytest.raises(ValueError, match="edit_b: the conditioning is empty"):
        EditBatch.execute(_prompt(768), [])


# ---------------------------------------------------------------- token names


@pytest.fixture
def folder():
    path = folder_paths.models_dir
    save(from_tensor(torch.ones(2, 32), "head"), _file(path, "part_tokens", "good.safetensors"))
    save(from_tensor(torch.ones(2, 32), "head"), _file(path, "secret.safetensors"))
    yield
    for name in (("part_tokens", "good.safetensors"), ("secret.safetensors",)):
        _file(path, *name).unlink()


def _file(folder, *names):
    from pathlib import Path

    path = Path(folder).joinpath(*names)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "good.safetensors/../../secret.safetensors", "nothing.pt", ""]
)
def test_a_token_name_that_is_not_in_the_folder_is_refused_with_those_that_are(name, folder):
    answer = PartTokenLoader.validate_inputs(name)
    assert isinstance(answer, str)
    assert answer.startswith(f"token: {name!r} is not in models/part_tokens; accepted are the names of its files: ")
    assert "good.safetensors" in answer
    with pytest.raises(ValueError, match="is not in models/part_tokens"):
        PartTokenLoader.execute(name)


def test_an_absolute_path_is_refused_and_a_name_in_the_folder_loads(folder):
    absolute = str(_file(folder_paths.models_dir, "secret.safetensors"))
    assert "is not in models/part_tokens" in PartTokenLoader.validate_inputs(absolute)
    assert PartTokenLoader.validate_inputs("good.safetensors") is True
    (token,) = PartTokenLoader.execute("good.safetensors").args
    assert token.width == 32


def test_a_changed_token_file_is_loaded_again(folder):
    path = _file(folder_paths.models_dir, "part_tokens", "good.safetensors")
    before = PartTokenLoader.fingerprint_inputs("good.safetensors")
    assert PartTokenLoader.fingerprint_inputs("good.safetensors") == before
    path.unlink()
    save(from_tensor(torch.zeros(2, 32), "head"), path)
    assert PartTokenLoader.fingerprint_inputs("good.safetensors") != before


# ---------------------------------------------------------------- finding a part, thresholding


def _find(model, token, image, **changes):
    settings = {"layers": "official", "noise_level": 0.25, "timesteps": 2, "seed": 3, **changes}
    return AttentionMaskExtractor.execute(model, token, image, **settings).args[0]


def test_a_found_part_is_one_map_per_picture_and_part_in_pixels_each_from_0_to_1(model):
    image = {"samples": tiny.randn(3, 4, 16, 8, seed=4)}
    maps = _find(model, tiny.token(), image)
    assert maps.shape == (3, 128, 64)
    assert torch.equal(maps.amin((1, 2)), torch.zeros(3))
    assert torch.allclose(maps.amax((1, 2)), torch.ones(3), atol=1e-4)
    assert torch.equal(_find(model, tiny.token(), image), maps)
    assert not torch.equal(_find(model, tiny.token(), image, positive=tiny.prompt(KIND, 1)), maps)


def test_finding_a_part_on_sdxl_needs_no_prompt_and_any_size():
    maps = _find(tiny.model(tiny.SDXL), tiny.token(), {"samples": tiny.randn(1, 4, 8, 16, seed=4)}, timesteps=1)
    assert maps.shape == (1, 64, 128)
    assert torch.isfinite(maps).all()


def test_finding_a_part_leaves_the_model_as_it_was(model):
    before = tiny.plain(model, KIND, latent_image=SMALL, steps=1)
    _find(model, tiny.token(), SMALL)
    assert torch.equal(tiny.plain(model, KIND, latent_image=SMALL, steps=1), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": from_tensor(torch.zeros(2, 2048), "head")}, "part_token: it is 2048 wide"),
        ({"layers": "nowhere"}, "layers: 'nowhere' names no layer"),
        ({"noise_level": 0.0}, "noise_level: 0.0 is out of range; accepted are numbers from 0.01 to 1.0"),
        ({"timesteps": 0}, "timesteps: 0 is out of range"),
        ({"image": {"samples": torch.ones(1, 16, 16, 8)}}, r"latent: its shape is \[1, 16, 16, 8\]; this model takes"),
        ({"positive": _prompt(768)}, "positive: it is 768 wide"),
    ],
)
def test_a_bad_input_of_the_finder_is_said_in_one_sentence(change, words, model):
    with pytest.raises(ValueError, match=words):
        _find(model, **{"token": tiny.token(), "image": SMALL, **change})


@pytest.mark.parametrize("mode", ["partedit", "otsu", "fixed"])
def test_thresholding_keeps_number_and_size_and_says_the_thresholds(mode):
    maps = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1))
    mask, first, text = AdaptiveThreshold.execute(maps, mode, 1.5, 0.5).args
    assert mask.shape == maps.shape
    assert mask.min() == 0
    assert mask.max() == 1
    thresholds = [float(number) for number in text.split(", ")]
    assert len(thresholds) == 3
    assert first == pytest.approx(thresholds[0], rel=1e-5)
    assert AdaptiveThreshold.execute(maps[0], mode, 1.5, 0.5).args[0].shape == (1, 20, 30)


@pytest.mark.parametrize(
    ("mask", "settings", "words"),
    [
        (NAN_MASK, ("partedit", 1.5, 0.5), "mask: the map holds NaN"),
        (NAN_MASK, ("fixed", 1.5, 0.5), "mask: .*NaN"),
        (torch.ones(1, 3, 8, 8), ("otsu", 1.5, 0.5), r"mask: its shape is \[1, 3, 8, 8\]; accepted are"),
        (torch.ones(0, 8, 8), ("otsu", 1.5, 0.5), r"mask: its shape is \[0, 8, 8\]; accepted are"),
        (torch.ones(8, 8), ("partedit", 9.0, 0.5), "omega: 9.0 is out of range"),
        (torch.ones(8, 8), ("fixed", 1.5, -1.0), "lower: -1.0 is out of range"),
        (torch.ones(8, 8), ("best", 1.5, 0.5), "unknown threshold mode 'best'; known: partedit, otsu, fixed"),
    ],
)
def test_a_bad_input_of_the_threshold_is_said_in_one_sentence(mask, settings, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveThreshold.execute(mask, *settings)
