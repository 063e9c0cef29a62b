"""Training a part token: what the UNet does for it, what is kept of that, what comes out, and every bad input."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.supported_models
import comfy.utils
import pytest
import torch

from scalpel.core.charts import loss_curve, overlay
from scalpel.core.heatmap import normalise
from scalpel.core.part_token import from_tensor
from scalpel.core.token_training import LOSSES, RECIPES, optimisation_bytes, predicted_map
from scalpel.core.unet import queries
from scalpel.core.unet.layers import layer_table
from scalpel.core.unet.queries import collect_queries, query_numbers
from scalpel.core.unet.sampling import part_heatmaps
from scalpel.nodes import token_training
from scalpel.nodes.token_training import PartTokenTrainer
from scalpel.partsworld import loader, tokens
from scalpel.tests import tiny

KIND = tiny.SD15
LATENT = {"samples": tiny.randn(3, 4, 16, 8, seed=4)}
H, W = 128, 64


@pytest.fixture(scope="module")
def model():
    return tiny.model(KIND)


class _Remembering:
    """A VAE that encodes a picture once: that is most of the time of a training of a few steps."""

    def __init__(self, vae):
        self.vae, self.seen = vae, {}
        self.vae_encode_crop_pixels = vae.vae_encode_crop_pixels

    def encode(self, pixels):
        key = pixels.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.vae.encode(pixels)
        return self.seen[key]


@pytest.fixture(scope="module")
def demo():
    """MODEL and VAE of the demo model, three figures and the masks of their heads."""
    patcher, _, vae = loader.load()
    return patcher, _Remembering(vae), *tokens.pictures(tokens.scenes("figure", 3), "head")


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


def collect(model, latent=None, **changes):
    settings = {"layers": "decoder", "noise": (0.25, 0.0), "timesteps": 2, "seed": 5, **changes}
    return collect_queries(model, latent or LATENT, **settings)


def close(first, second, tolerance=1e-5):
    pairs = zip(first, second, strict=True)
    return all(tiny.relative(a.queries.float(), b.queries.float()) < tolerance for a, b in pairs)


# ---------------------------------------------------------------- the queries


@pytest.mark.parametrize("kind", [tiny.SD15, tiny.SDXL], ids=["SD1.5", "SDXL"])
def test_a_token_lights_up_in_the_kept_queries_where_it_does_in_the_model(kind):
    """Two ways to one heat map: from the queries that are kept, and from a running model."""
    patcher, token = tiny.model(kind), tiny.token()
    kept = predicted_map(token.embedding, collect(patcher, layers="first8", timesteps=3), (H, W))
    seen = part_heatmaps(patcher, token, LATENT, "first8", 0.25, 3, 5)
    assert torch.allclose(normalise(kept[:, None]), seen, atol=1e-3)


def test_heat_maps_that_hold_nan_get_a_sentence(model):
    patcher, token = _broken(model), tiny.token()
    with pytest.raises(ValueError, match=r"^model: its attention holds NaN.*--fp32-unet"):
        part_heatmaps(patcher, token, LATENT, "first8", 0.25, 3, 5)


def test_the_queries_of_a_layer_are_one_ordinary_tensor_without_a_copy(model):
    layers = collect(model)
    assert [(layer.h, layer.w) for layer in layers] == [(4, 2)] * 3 + [(8, 4)] * 3 + [(16, 8)] * 3
    for layer in layers:
        assert layer.queries.shape[:3] == (3, 2, layer.h * layer.w)
        assert layer.queries.is_contiguous()
        assert layer.queries.untyped_storage().nbytes() == layer.queries.nbytes
        assert not layer.queries.is_inference()
        assert not layer.to_k.is_inference()
        assert not layer.queries.requires_grad


def test_only_the_chosen_layers_are_kept(model):
    assert len(collect(model, layers="output.3-5")) == 3
    assert sum(layer.queries.numel() for layer in collect(model)) == query_numbers(
        layer_table(model), layer_table(model).select("decoder"), 3, 2, (16, 8)
    )


def test_the_noise_of_a_picture_does_not_depend_on_how_many_are_shown_at_once(model, monkeypatch):
    counted = tiny.CountedCalls()
    at_once = collect(counted.attach(model))
    assert counted.rows == [3, 3]
    monkeypatch.setattr(queries, "CALL_AREA", 16 * 8)
    counted = tiny.CountedCalls()
    one_by_one = collect(counted.attach(model))
    assert counted.rows == [1] * 6
    assert close(at_once, one_by_one)
    alone = collect(model, {"samples": LATENT["samples"][2:], "batch_index": [2]})
    assert all(torch.equal(a.queries[0], b.queries[2]) for a, b in zip(alone, one_by_one, strict=True))
    assert not close([alone[0]], collect(model, {"samples": LATENT["samples"][2:]}, layers="output.3"))


def test_a_model_in_half_precision_has_its_queries_kept_as_they_are():
    layers = collect(tiny.model(KIND, torch.bfloat16))
    assert {layer.queries.dtype for layer in layers} == {torch.bfloat16}
    assert {layer.to_k.dtype for layer in layers} == {torch.float32}


def test_many_queries_of_a_model_in_single_precision_are_kept_in_half(model, monkeypatch):
    full = collect(model)
    assert {layer.queries.dtype for layer in full} == {torch.float32}
    monkeypatch.setattr(queries, "SINGLE_PRECISION_BYTES", 1000)
    half = collect(model)
    assert {layer.queries.dtype for layer in half} == {torch.float16}
    assert close(full, half, 1e-3)


def test_twenty_pictures_of_sdxl_in_the_papers_layers_stay_under_8_gigabytes():
    """ComfyUI's own SDXL at its own size, without memory behind its weights."""
    config = comfy.supported_models.SDXL(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
            "context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential", "num_head_channels": 64,
            "use_spatial_transformer": True, "legacy": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float16, None)
    base = config.get_model({}, "", device=torch.device("meta"))
    sdxl = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    table = layer_table(sdxl)
    assert len(table) == 70
    size = {text: 2 * query_numbers(table, table.select(text), 20, 12, (128, 128)) for text in ("first8", "decoder")}
    assert size["first8"] == pytest.approx(5.0e9, rel=0.01)
    assert size["decoder"] == pytest.approx(26e9, rel=0.02)  # as the help page says


def test_lora_counts_in_keys_and_queries(model):
    name = "diffusion_model.output_blocks.4.1.transformer_blocks.0.attn2.{}.weight"
    weight = {part: model.model.get_parameter(name.format(part)).clone() for part in ("to_k", "to_q")}
    change = {part: 0.5 * tiny.randn(*w.shape, seed=9) for part, w in weight.items()}
    patched = model.clone()
    patched.add_patches({name.format(part): ("diff", (delta,)) for part, delta in change.items()}, 1.0)
    (with_lora,), (without,) = collect(patched, layers="output.4"), collect(model, layers="output.4")
    x = tiny.randn(7, tiny.WIDTH, seed=10)
    assert torch.allclose(x @ with_lora.to_k.T, x @ (weight["to_k"] + change["to_k"]).T, atol=1e-4)
    assert torch.allclose(x @ without.to_k.T, x @ weight["to_k"].T, atol=1e-4)
    assert not close([with_lora], [without], 0.1)


@pytest.mark.parametrize("kind", [tiny.SD15, tiny.SDXL], ids=["SD1.5", "SDXL"])
def test_a_batch_of_prompts_gives_each_picture_its_own(kind, monkeypatch):
    patcher, batch = tiny.model(kind), tiny.prompt(kind, 1, batch=3)
    together = collect(patcher, positive=batch, layers="output.3")
    monkeypatch.setattr(queries, "CALL_AREA", 16 * 8)
    assert close(together, collect(patcher, positive=batch, layers="output.3"), 1e-4)
    (context, options) = batch[0]
    own = {**options, **({"pooled_output": options["pooled_output"][1:2]} if kind.pooled else {})}
    middle = {"samples": LATENT["samples"][1:2], "batch_index": [1]}
    alone = collect(patcher, middle, positive=[[context[1:2], own]], layers="output.3")
    assert tiny.relative(alone[0].queries[0], together[0].queries[1]) < 1e-4
    for_all = collect(patcher, positive=[[context[1:2], own]], layers="output.3")
    assert tiny.relative(for_all[0].queries[1], together[0].queries[1]) < 1e-4
    assert tiny.relative(for_all[0].queries[0], together[0].queries[0]) > 1e-3


def test_a_node_that_calls_the_model_again_at_a_noise_level_changes_nothing(model):
    def twice(apply, arguments):
        seen = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        apply(arguments["input"] * 0, arguments["timestep"], **arguments["c"])
        return seen

    again = model.clone()
    again.set_model_unet_function_wrapper(twice)
    assert close(collect(again), collect(model))


def _shrinking(model):
    """A model that sees pictures at another size at its second noise level."""
    calls = []

    def shrink(apply, arguments):
        calls.append(1)
        x = arguments["input"]
        small = torch.nn.functional.interpolate(x, scale_factor=0.5) if len(calls) % 2 == 0 else x
        seen = apply(small, arguments["timestep"], **arguments["c"])
        return torch.nn.functional.interpolate(seen, x.shape[-2:])

    patched = model.clone()
    patched.set_model_unet_function_wrapper(shrink)
    return patched


def _broken(model):
    patched = model.clone()
    patched.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"] / 0, a["timestep"], **a["c"]))
    return patched


@pytest.mark.parametrize(
    ("patch", "change", "words"),
    [
        (_shrinking, {}, "8 × 4 pixels .* saw 16 × 8|sees 2 × 1 pixels .* saw 4 × 2"),
        (_broken, {}, r"model: the queries of its layer output\.3\[0\] hold NaN.*--fp32-unet"),
        (None, {"positive": tiny.with_options(tiny.prompt(KIND, 1), end_percent=0.1)}, "at 0 of 2 noise levels: take"),
        (None, {"positive": tiny.prompt(KIND, 1) * 2}, "positive: it has 2 entries"),
        (None, {"positive": tiny.prompt(KIND, 1, batch=2)}, "positive: 2 prompts for 3 pictures; give 1 or 3"),
        (None, {"layers": "output.77"}, "layers: 'output.77' names no layer of this model"),
    ],
)
def test_what_would_spoil_the_queries_is_refused_and_the_model_is_as_before(patch, change, words, model):
    before = tiny.plain(model, KIND, steps=1)
    with pytest.raises(ValueError, match=words):
        collect(patch(model) if patch else model, **change)
    assert torch.equal(tiny.plain(model, KIND, steps=1), before)


def test_queries_that_do_not_fit_into_memory_are_refused_before_the_model_runs(model, monkeypatch):
    counted = tiny.CountedCalls()
    monkeypatch.setattr(queries, "query_numbers", lambda *_: 10**15)
    with pytest.raises(ValueError, match=r"images: the queries of 3 pictures .* 2000000\.0 GB .* fewer layers"):
        collect(counted.attach(model))
    assert counted.rows == []


@pytest.mark.parametrize("free", [10**12, 10**4], ids=["room", "no room"])
def test_queries_go_to_the_gpu_if_there_is_room_and_are_streamed_if_not(model, free, monkeypatch):
    """The "meta" device stands for a GPU."""
    layers, asked = collect(model), []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda needed, device: asked.append(needed))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free)
    needed = optimisation_bytes(layers, (128, 64), RECIPES["fast"])
    moved = queries.for_training(layers, needed, torch.device("meta"))
    assert {layer.to_k.device.type for layer in moved} == {"meta"}
    assert {layer.queries.device.type for layer in moved} == {"meta" if free == 10**12 else "cpu"}
    assert asked[0] == needed > sum(layer.queries.nbytes for layer in layers)
    assert queries.for_training(layers, needed, torch.device("cpu")) is layers


# ---------------------------------------------------------------- the node


def train(demo, **changes):
    model, vae, images, masks = demo
    settings = {
        "model": model, "vae": vae, "images": images, "masks": masks, "name": "head", "recipe": "fast", "steps": 40,
        "learning_rate": 0.0, "loss": "recipe", "layers": "output.1-3", "noise_start": 0.6, "noise_end": 0.05,
        "timesteps": 2, "seed": 0,
    }  # fmt: skip
    return PartTokenTrainer.execute(**{**settings, **changes}).args


def test_a_token_is_learned_and_its_heat_map_lies_on_the_part(demo):
    token, curve, heatmaps = train(demo, steps=150)
    _, _, images, masks = demo
    assert token.embedding.shape == (4, 128)  # two rows of each
    assert (token.parts, token.counts) == ({"head": (2, 3)}, (38, 37, 1, 1))
    assert curve.shape == (1, 400, 640, 3)
    assert heatmaps.shape == images.shape
    latent = {"samples": torch.cat([demo[1].encode(image[None]) for image in images])}
    maps = part_heatmaps(demo[0], token, latent, "output.1-3", 0.6, 2, 1)[:, 0]
    inside, outside = (maps * masks).sum() / masks.sum(), (maps * (1 - masks)).sum() / (1 - masks).sum()
    assert inside > 3 * outside


def test_a_name_of_several_lines_becomes_one(demo):
    assert train(demo, steps=1, name=" left\n  ear ")[0].parts.keys() == {"left ear"}


def test_the_token_says_how_it_was_trained(demo):
    info = train(demo, recipe="paper", steps=2, learning_rate=0.5, loss="bce")[0].info
    assert json.loads(info.pop("noise_range")) == [0.6, 0.05]
    assert float(info.pop("loss")) > 0
    assert info == {
        "model_family": "parts-world (the demo model)", "layers": "output.1-3", "images": "3", "recipe": "paper",
        "steps": "2", "learning_rate": "0.5", "loss_function": "bce",
    }  # fmt: skip
    own = train(demo, steps=1, layers="recipe")[0].info
    assert (own["layers"], own["loss_function"]) == (RECIPES["fast"].layers, RECIPES["fast"].loss)


@pytest.mark.parametrize("steps", [1, 9])
def test_the_unet_sees_each_picture_once_per_timestep_however_many_steps(demo, steps):
    counted = tiny.CountedCalls()
    train((counted.attach(demo[0]), *demo[1:]), steps=steps, timesteps=3)
    assert sum(counted.rows) == 3 * 3
    assert set(counted.rows_per_sigma().values()) == {3}


def test_nothing_flows_back_through_the_unet(demo, monkeypatch):
    seen = []
    optimise = token_training.optimise_token

    def watched(layers, *arguments):
        seen.extend(layers)
        return optimise(layers, *arguments)

    monkeypatch.setattr(token_training, "optimise_token", watched)
    train(demo, steps=2)
    assert seen
    assert not any(layer.queries.requires_grad or layer.to_k.requires_grad for layer in seen)
    assert all(weight.grad is None for weight in demo[0].model.parameters())


def test_one_seed_gives_one_token_and_another_seed_another(demo):
    first, again, other = (train(demo, steps=3, seed=seed)[0].embedding for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_the_user_sets_goes_before_the_recipe(demo):
    plain = train(demo, steps=3)[0].embedding
    other = next(loss for loss in LOSSES if loss != RECIPES["fast"].loss)
    for change in ({"loss": other}, {"learning_rate": 0.7}, {"recipe": "paper"}, {"noise_start": 0.3}):
        assert not torch.equal(train(demo, steps=3, **change)[0].embedding, plain), change
    same = {"loss": RECIPES["fast"].loss, "learning_rate": RECIPES["fast"].learning_rate, "layers": " output.1-3 "}
    assert torch.equal(train(demo, steps=3, **same)[0].embedding, plain)


def test_training_on_sdxl_needs_no_prompt_and_takes_one(demo):
    sdxl = tiny.model(tiny.SDXL)
    images, masks = demo[2][:, 64:192, 64:192], demo[3][:, 64:192, 64:192]
    settings = {"images": images, "masks": masks, "layers": "first8", "steps": 1, "timesteps": 1}
    bare = train((sdxl, *demo[1:]), **settings)[0]
    assert bare.width == tiny.WIDTH
    prompted = train((sdxl, *demo[1:]), **settings, positive=tiny.prompt(tiny.SDXL, 1))[0]
    assert not torch.equal(bare.embedding, prompted.embedding)
    with pytest.raises(ValueError, match="positive: it has no pooled output"):
        train((sdxl, *demo[1:]), **settings, positive=[[torch.zeros(1, 77, tiny.WIDTH), {}]])


def test_the_model_gives_the_same_bits_before_and_after(demo):
    images = demo[2][:, :128, 64:128]
    tiny_model, masks = tiny.model(KIND), torch.zeros(3, 128, 64)
    masks[:, 20:60, 20:40] = 1
    before = tiny.plain(tiny_model, KIND)
    train((tiny_model, demo[1], images, masks), steps=2)
    assert torch.equal(tiny.plain(tiny_model, KIND), before)


def test_progress_runs_once_from_the_first_call_to_the_last_step(demo):
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        train(demo, steps=4)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert {total for _, total in seen} == {3 * 2 + 4}
    values = [value for value, _ in seen]
    assert values == sorted(values)
    assert values[-1] == 3 * 2 + 4


@pytest.mark.parametrize("point", [1, 2, 3, 5], ids=["first call", "last call", "first step", "third step"])
def test_a_cancelled_training_leaves_nothing_and_the_next_one_works(demo, point, monkeypatch):
    expected = train(demo, steps=4)[0].embedding
    advance, calls = token_training._Progress.advance, []

    def cancel(self, count=1):
        calls.append(count)
        if len(calls) == point:
            comfy.model_management.interrupt_current_processing()
        advance(self, count)

    monkeypatch.setattr(token_training._Progress, "advance", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(demo, steps=4)
    assert len(calls) == point
    assert torch.is_inference_mode_enabled()
    assert not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    monkeypatch.undo()
    assert torch.equal(train(demo, steps=4)[0].embedding, expected)


def test_pictures_far_from_the_models_own_size_are_warned_of(demo, caplog):
    for height, width, warned in ((256, 256, False), (256, 128, False), (128, 120, True), (512, 320, True)):
        caplog.clear()
        token_training._warn_of_size(torch.zeros(1, height, width, 3), 256)
        assert (f"{width} × {height}" in caplog.text) is warned


# ---------------------------------------------------------------- pictures and masks


def marked(height, width):
    """A picture that is its own mask: what happens to one must happen to the other."""
    mask = torch.zeros(1, height, width)
    mask[:, 9 : height - 22, 5 : width // 2] = 1
    return mask[..., None].repeat(1, 1, 1, 3), mask


@pytest.mark.parametrize("size", [(128, 64), (67, 70), (100, 79), (71, 128)])
def test_masks_lose_the_same_edges_as_the_pictures(demo, size):
    images, masks = marked(*size)
    pictures, cropped = token_training._checked_pictures(demo[1], images, masks)
    assert pictures.shape[1:3] == tuple(8 * (side // 8) for side in size)
    assert torch.equal(pictures[..., 0], cropped)
    assert demo[1].encode(images).shape[-2:] == tuple(side // 8 for side in size)
    assert torch.allclose(demo[1].encode(pictures), demo[1].encode(images), atol=1e-5)


def test_masks_of_another_resolution_are_scaled_before_the_crop(demo):
    images, masks = marked(132, 68)
    twice = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    _, same = token_training._checked_pictures(demo[1], images, masks)
    _, scaled = token_training._checked_pictures(demo[1], images, twice)
    assert ((same - scaled).abs() > 0.3).float().mean() < 0.01


@pytest.mark.parametrize("form", ["[H, W]", "[1, 1, H, W]", "with alpha"])
def test_masks_and_pictures_come_in_several_forms(demo, form):
    images, masks = marked(128, 64)
    expected = token_training._checked_pictures(demo[1], images, masks)
    if form == "with alpha":
        images = torch.cat([images, torch.ones(1, 128, 64, 1)], -1)
    else:
        masks = masks[0] if form == "[H, W]" else masks[None]
    found = token_training._checked_pictures(demo[1], images, masks)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class _OtherVAE:
    """A VAE whose latents are not the model's."""

    def __init__(self, channels=4, value=0.0):
        self.channels, self.value = channels, value

    def vae_encode_crop_pixels(self, pixels):
        return pixels

    def encode(self, pixels):
        return torch.full((len(pixels), self.channels, pixels.shape[1] // 8, pixels.shape[2] // 8), self.value)


NAN = float("nan")
BOX = torch.zeros(3, 256, 256)
BOX[:, 50:100, 50:100] = 1
EMPTY = BOX * torch.tensor([1.0, 0, 1])[:, None, None]
FULL = BOX.clone()
FULL[2] = 1
SPOILT = BOX.clone()
SPOILT[0, 3, 4] = NAN

BAD = {
    "no name": ({"name": "  "}, ["name", "empty", "'head'"]),
    "an unknown recipe": ({"recipe": "best"}, ["recipe", "'best'", "paper and fast"]),
    "an unknown loss": ({"loss": "hinge"}, ["loss", "'hinge'", "recipe, bce, l2"]),
    "unknown layers": ({"layers": "decodr"}, ["layers", "'decodr'", "Accepted: all, decoder"]),
    "no layers": ({"layers": ""}, ["layers", "empty"]),
    "negative steps": ({"steps": -1}, ["steps", "-1", "0 to 100000"]),
    "a negative learning rate": ({"learning_rate": -0.1}, ["learning_rate", "-0.1"]),
    "a learning rate that is no number": ({"learning_rate": NAN}, ["learning_rate", "nan"]),
    "no noise": ({"noise_start": 0.0}, ["noise_start", "0.0", "0.01 to 1.0"]),
    "noise that is no number": ({"noise_end": NAN}, ["noise_end", "nan"]),
    "noise the wrong way": ({"noise_start": 0.2, "noise_end": 0.2}, ["noise_start: 0.2", "noise_end (0.2)", "above"]),
    "no timesteps": ({"timesteps": 0}, ["timesteps", "0", "1 to 100"]),
    "a prompt of another model": ({"positive": [[torch.zeros(1, 77, 768), {}]]}, ["positive", "768 wide (SD1.x)"]),
    "an empty prompt": ({"positive": []}, ["positive", "empty"]),
    "two prompts for three": ({"positive": [[torch.zeros(2, 77, 128), {}]]}, ["positive", "2 prompts for 3 pictures"]),
    "a mask for an image": ({"images": torch.ones(3, 256, 256)}, ["images", "[3, 256, 256]", "height, width, 3"]),
    "no image": ({"images": torch.ones(0, 256, 256, 3)}, ["images", "[0, 256, 256, 3]"]),
    "small images": ({"images": torch.ones(3, 256, 40, 3)}, ["images", "40 × 256", "64 pixels or more"]),
    "images with NaN": ({"images": torch.full((3, 256, 256, 3), NAN)}, ["images", "NaN", "0 to 1"]),
    "too few masks": ({"masks": BOX[:2]}, ["masks", "2 masks for 3 images", "one mask per image"]),
    "one mask for all": ({"masks": BOX[:1]}, ["masks", "1 masks for 3 images"]),
    "an image as mask": ({"masks": torch.ones(3, 256, 256, 3)}, ["masks", "[3, 256, 256, 3]", "[height, width]"]),
    "an empty mask": ({"masks": EMPTY}, ["masks", "image 2 is empty", "paint the part in white"]),
    "Load Image without a mask": ({"masks": torch.zeros(3, 64, 64)}, ["masks", "image 1 is empty", "Load Image"]),
    "a full mask": ({"masks": FULL}, ["masks", "image 3 covers the whole picture"]),
    "a mask with NaN": ({"masks": SPOILT}, ["masks", "NaN", "0 to 1"]),
    "a mask of another shape": ({"masks": BOX[:, :128]}, ["masks", "256 × 128", "image is 256 × 256"]),
    "no VAE": ({"vae": None}, ["vae", "without a VAE", "Load VAE"]),
    "the VAE of another model": ({"vae": _OtherVAE(16)}, ["vae", "[3, 16, 32, 32]", "[batch, 4, height, width]"]),
    "a VAE that overflows": ({"vae": _OtherVAE(value=NAN)}, ["vae", "image 1, 2, 3", "NaN", "--fp32-vae"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_input_is_said_in_one_sentence(what, demo):
    change, words = BAD[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        train(demo, **change)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_loss_that_is_no_number_blames_the_learning_rate(demo, monkeypatch):
    monkeypatch.setattr(token_training, "optimise_token", lambda *arguments: arguments[4](6, NAN))
    with pytest.raises(ValueError, match=r"^learning_rate: the loss became nan at step 7 with a learning rate of 50;"):
        train(demo, learning_rate=50.0)


# ---------------------------------------------------------------- the pictures it draws


@pytest.mark.parametrize(
    "losses",
    [[0.3], [0.5, 0.5], [0.0, 0.0], [0.0, 1e-9], [1e-8, 1.0], [3e4, 1.0, 2.0], [0.9 * 0.99**i for i in range(2000)]],
)
def test_any_list_of_losses_is_a_chart(losses):
    chart = loss_curve(losses, "head: bce loss 0.1 after 9 steps")
    assert chart.shape == (1, 400, 640, 3)
    assert 0 <= chart.min() < chart.max() <= 1


def test_a_falling_loss_falls_in_the_chart():
    chart = loss_curve([1.0, 0.8, 0.5, 0.3, 0.1], "loss")[0]
    blue = chart[..., 2] - chart[..., 0] > 0.3
    left, right = (blue[:, columns].nonzero()[:, 0].float().mean() for columns in (slice(75, 120), slice(560, 610)))
    assert left < right - 100


def test_heat_is_laid_over_the_picture_and_the_mask_is_outlined():
    image, mask, heat = torch.full((1, 64, 96, 3), 0.5), torch.zeros(1, 64, 96), torch.zeros(1, 8, 12)
    mask[0, 20:40, 20:40] = 1
    heat[0, 6, 10] = 1
    result = overlay(image, heat, mask)
    assert result.shape == (1, 64, 96, 3)
    assert torch.equal(result[0, 19, 25], torch.ones(3))
    assert torch.allclose(result[0, 30, 30], torch.full((3,), 0.3))
    assert result[0, 52, 84, 0] > result[0, 52, 84, 2] + 0.2
    assert 0 <= result.min() <= result.max() <= 1


def test_a_token_of_the_trainer_is_a_token_like_any_other(demo):
    token = train(demo, steps=1)[0]
    assert torch.equal(from_tensor(token.embedding, "head").embedding, token.embedding)
