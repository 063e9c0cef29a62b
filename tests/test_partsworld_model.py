"""The demo model: its VAE is what was trained, its checkpoint loads whole, and ComfyUI's nodes take it as any other.

All of it is tried on a small checkpoint with random weights, exported as a trained one is; the last tests look at the
checkpoint that comes with the pack.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scalpel.partsworld import architecture, autoencoder, dataset, diffusion, train
from scalpel.partsworld.render import render
from scalpel.partsworld.scene import sample_scene

CAPTIONS = ["", "a red figure with a blue head on a green field", "an orange car", "a white dog in a brown room"]
PROMPT = CAPTIONS[1]


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs its nodes like this."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def denoiser():
    """A UNet and text encoder as the trainer makes them, with random weights that float16 holds exactly."""
    torch.manual_seed(0)
    tokens, vocabulary = diffusion.tokenize(CAPTIONS)
    model = diffusion.Denoiser(len(vocabulary)).requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
        parameter.copy_(parameter.half().float())
    return model, dict(zip(CAPTIONS, torch.from_numpy(tokens), strict=True)), vocabulary


@pytest.fixture(scope="module")
def narrow_decoder():
    torch.manual_seed(1)
    model = autoencoder.decoder().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def projection():
    return dataset.fit_projection(scenes=60)


@pytest.fixture(scope="module")
def checkpoint(denoiser, narrow_decoder, projection, tmp_path_factory):
    """The exported file."""
    work = tmp_path_factory.mktemp("partsworld")
    folders = train.Folders(work / "data", work / "vae", work / "unet")
    folders.data.mkdir()
    folders.vae.mkdir()
    np.savez(folders.data / "projection.npz", weight=projection[0], bias=projection[1])
    torch.save({"model": narrow_decoder.state_dict(), "step": 7}, folders.vae / "decoder.pt")
    model, _, vocabulary = denoiser
    optimiser = torch.optim.AdamW(model.parameters())
    diffusion._save(folders.unet / "state.pt", model, optimiser, list(model.parameters()), 5, vocabulary)
    train.export(folders, work / "partsworld.safetensors")
    return work / "partsworld.safetensors"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    from scalpel.partsworld import loader

    with torch.inference_mode():
        return loader.load(checkpoint)


@pytest.fixture(scope="module")
def nodes():
    """ComfyUI's own nodes."""
    import nodes

    return nodes


@pytest.fixture
def encode(loaded, nodes):
    return lambda text: nodes.CLIPTextEncode().encode(loaded[1], text)[0]


@pytest.fixture
def sample(loaded, nodes, encode):
    """A picture's latent by ComfyUI's KSampler, from what is given instead of the plain inputs."""

    def run(model=loaded[0], positive=None, negative=None, latent=None, steps=2, sampler="euler", denoise=1.0):
        latent = nodes.EmptyLatentImage().generate(256, 256)[0] if latent is None else latent
        positive, negative = positive or encode(PROMPT), negative or encode("")
        return nodes.KSampler().sample(
            model, 1, steps, 6.0, sampler, "normal", positive, negative, latent, denoise=denoise
        )[0]["samples"]

    return run


def picture_of(scene, size=256):
    return torch.from_numpy(render(scene, size).image)[None]


# ---- the VAE


def test_linear_encoder_in_taesds_layers_is_the_linear_encoder(projection):
    from comfy.taesd.taesd import Encoder

    encoder = Encoder()
    encoder.load_state_dict(autoencoder.linear_encoder(*map(torch.from_numpy, projection)))
    for seed in range(3):
        picture = picture_of(sample_scene(seed, mixed=True))
        expected = dataset.encode(picture[0].numpy(), *projection)
        assert encoder(picture.movedim(-1, 1))[0].numpy() == pytest.approx(expected, abs=2e-5)


def test_widened_decoder_is_the_narrow_decoder(narrow_decoder):
    from comfy.taesd.taesd import Decoder

    decoder = Decoder()
    decoder.load_state_dict(autoencoder._widen(narrow_decoder.state_dict()))
    latent = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decoder(latent), narrow_decoder(latent), atol=1e-5)


def test_crops_count_the_pictures_border_and_not_their_own():
    last = 32 - autoencoder._CROP
    corner, middle, end = (autoencoder._counted(*at) for at in ((0, 0), (7, 9), (last, last)))
    assert corner[0, 0]
    assert end[-1, -1]
    assert not corner[-1].any()
    assert not end[0].any()
    assert not np.concatenate([middle[0], middle[-1], middle[:, 0], middle[:, -1]]).any()
    assert all(counted.mean() > 0.4 for counted in (corner, middle, end))


def test_latents_have_unit_variance_after_sd1s_scale(loaded):
    pictures = torch.cat([picture_of(sample_scene(seed, mixed=True)) for seed in range(6)])
    latents = loaded[0].model.process_latent_in(loaded[2].encode(pictures))
    assert latents.shape == (6, 4, 32, 32)
    assert latents[:, :3].std((0, 2, 3)).numpy() == pytest.approx([1, 1, 1], abs=0.25)


def test_vae_nodes_encode_and_decode_whole_and_in_tiles(loaded, nodes):
    vae = loaded[2]
    picture = picture_of(sample_scene(0), 256)
    latent = nodes.VAEEncode().encode(vae, picture)[0]
    tiled = nodes.VAEEncodeTiled().encode(vae, picture, 192, 64)[0]
    assert latent["samples"].shape == (1, 4, 32, 32)
    assert torch.allclose(latent["samples"], tiled["samples"], atol=0.02)
    decoded = nodes.VAEDecode().decode(vae, latent)[0]
    in_tiles = nodes.VAEDecodeTiled().decode(vae, latent, 192, 64)[0]
    assert decoded.shape == in_tiles.shape == (1, 256, 256, 3)
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_preview_shows_the_mean_colour_of_each_patch(loaded):
    import latent_preview

    latent_format = loaded[0].model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    for seed in range(3):
        picture = picture_of(sample_scene(seed, mixed=True))
        latent = loaded[0].model.process_latent_in(loaded[2].encode(picture))
        shown = np.asarray(previewer.decode_latent_to_preview(latent), np.float32) / 255
        patches = picture[0].reshape(32, 8, 32, 8, 3).mean((1, 3)).numpy()
        assert np.abs(shown - patches).mean() < 0.03


# ---- the checkpoint


def test_export_fits_what_loads_it_to_the_last_tensor(checkpoint):
    names = load_file(checkpoint)
    assert names["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].shape == (49408, 128)
    assert {tensor.dtype for name, tensor in names.items() if "vae_s" not in name} == {torch.float16}
    assert checkpoint.stat().st_size < 40e6


def test_only_words_that_were_trained_have_a_token_embedding(checkpoint, denoiser):
    table = load_file(checkpoint)["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert set(table.any(1).nonzero().flatten().tolist()) == set(denoiser[2].tolist())


def test_export_is_the_same_file_every_time(checkpoint, tmp_path):
    folders = train.Folders(*(checkpoint.parent / name for name in ("data", "vae", "unet")))
    train.export(folders, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda weights: weights.pop("model.diffusion_model.out.2.bias"), "the UNet does not fit: 1 tensors missing"),
        (lambda weights: weights.pop("cond_stage_model.logit_scale"), "the text encoder does not fit: 1 tensors"),
        (lambda weights: weights.pop("first_stage_model.taesd_decoder.3.conv.0.bias"), "the VAE does not fit: 1"),
        (lambda weights: weights.pop("first_stage_model.taesd_decoder.1.weight"), "the VAE's weights are incomplete"),
        (lambda weights: weights.update({"other.weight": torch.zeros(1)}), "1 unexpected .*other.weight"),
        (lambda weights: weights.update({"model.diffusion_model.a": torch.zeros(1)}), "the UNet .* 1 unexpected"),
        (
            lambda weights: weights.update({"model.diffusion_model.out.2.bias": torch.zeros(9)}),
            "not a parts-world checkpoint .*size mismatch",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, damage, complaint):
    from scalpel.partsworld import loader

    weights = load_file(checkpoint)
    damage(weights)
    save_file(weights, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        loader.load(tmp_path / "damaged.safetensors")


def test_a_missing_checkpoint_is_said(tmp_path):
    from scalpel.partsworld import loader

    with pytest.raises(FileNotFoundError, match="weights are not at"):
        loader.load(tmp_path / "none.safetensors")


# ---- MODEL and CLIP are what was trained


def test_text_encoder_gives_through_comfyui_what_the_trainer_saw(denoiser, encode):
    model, tokens, _ = denoiser
    for caption in CAPTIONS:
        embedding, extra = encode(caption)[0]
        assert torch.allclose(embedding.float().cpu(), model.encode(tokens[caption][None]), atol=1e-5)
        assert extra["pooled_output"].shape == (1, 128)


def test_unet_gives_through_comfyui_what_the_trainer_saw(denoiser, loaded, encode):
    import comfy.model_management

    comfy.model_management.load_models_gpu([loaded[0]])
    model, tokens, _ = denoiser
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([500])
    sampling = loaded[0].model.model_sampling
    sigma = sampling.sigma(timestep)
    denoised = loaded[0].model.apply_model(x, sigma, c_crossattn=encode(PROMPT)[0][0])
    epsilon = model(sampling.calculate_input(sigma, x), timestep, tokens[PROMPT][None])
    assert torch.allclose(denoised, x - sigma * epsilon, atol=1e-3)
    assert epsilon.std() > 0.01


def test_training_schedule_is_comfyuis(loaded):
    alphas = diffusion.noise_schedule()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert torch.allclose(loaded[0].model.model_sampling.sigmas.cpu(), sigmas, rtol=1e-4)


def test_model_tells_its_native_size(loaded):
    assert loaded[0].model.model_config.native_latent_size == 32


# ---- in ComfyUI's nodes


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde"])
def test_ksampler_gives_finite_pictures(loaded, nodes, sample, sampler):
    picture = nodes.VAEDecode().decode(loaded[2], {"samples": sample(sampler=sampler)})[0]
    assert picture.shape == (1, 256, 256, 3)
    assert picture.isfinite().all()
    assert picture.std() > 0.01


def test_sampling_twice_gives_the_same_bits_and_another_prompt_another_picture(sample, encode):
    assert torch.equal(sample(), sample())
    assert not torch.allclose(sample(), sample(positive=encode(CAPTIONS[3])), atol=1e-3)


def test_pictures_need_not_be_square_nor_alone(nodes, sample):
    latent = nodes.EmptyLatentImage().generate(384, 192, 2)[0]
    assert sample(latent=latent).shape == (2, 4, 24, 48)


def test_image_to_image_and_a_noise_mask_work(loaded, nodes, sample):
    latent = nodes.VAEEncode().encode(loaded[2], picture_of(sample_scene(0)))[0]
    mask = torch.zeros(1, 256, 256)
    mask[:, :128] = 1
    edited = sample(latent=nodes.SetLatentNoiseMask().set_mask(latent, mask)[0], steps=4, denoise=0.5)
    assert torch.allclose(edited[..., 18:, :], latent["samples"][..., 18:, :], atol=1e-3)
    assert not torch.allclose(edited[..., :14, :], latent["samples"][..., :14, :], atol=1e-1)


def test_clip_set_last_layer_chooses_the_layer(loaded, nodes, encode):
    def with_last(layer):
        clip = nodes.CLIPSetLastLayer().set_last_layer(loaded[1], layer)[0]
        return nodes.CLIPTextEncode().encode(clip, PROMPT)[0][0][0]

    usual = encode(PROMPT)[0][0]
    assert torch.allclose(with_last(-1), usual, atol=1e-6)
    assert not torch.allclose(with_last(-2), usual, atol=1e-2)
    assert torch.allclose(encode(PROMPT)[0][0], usual, atol=0)


def test_prompt_weights_and_long_prompts_work(encode):
    assert not torch.allclose(encode("a (red:1.5) figure")[0][0], encode("a red figure")[0][0], atol=1e-3)
    assert encode("a red figure and " * 30)[0][0].shape == (1, 154, 128)


def test_area_and_mask_conditioning_change_their_side_only_at_one_step(nodes, sample, encode):
    right = encode(CAPTIONS[3])
    area = nodes.ConditioningSetArea().append(right, 128, 256, 128, 0, 1.0)[0]
    mask = torch.zeros(1, 32, 32)
    mask[..., 16:] = 1
    masked = nodes.ConditioningSetMask().append(right, mask, "default", 1.0)[0]
    plain = sample(steps=1)
    for extra in (area, masked):
        combined = sample(positive=[*encode(PROMPT), *extra], steps=1)
        assert combined.isfinite().all()
        assert torch.allclose(combined[..., :12], plain[..., :12], atol=1e-5)
        assert not torch.allclose(combined[..., 20:], plain[..., 20:], atol=1e-3)


LORA_LAYERS = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (96, 128),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (192, 192),
    "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_ff_net_2": (96, 384),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (512, 128),
}
"""Layers as trainers of SD1.x LoRAs name them: outputs, inputs."""


@pytest.fixture
def lora(tmp_path):
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, (outputs, inputs) in LORA_LAYERS.items():
        weights[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        weights[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        weights[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(weights, tmp_path / "tiny.safetensors")
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield "tiny.safetensors"
    folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))


def test_a_lora_changes_the_model_it_is_loaded_on_and_no_other(loaded, nodes, sample, encode, lora, caplog):
    model, clip, _ = loaded
    before, words = sample(), encode(PROMPT)[0][0]
    patched, patched_clip = nodes.LoraLoader().load_lora(model, clip, lora, 0.7, 0.7)
    assert "not loaded" not in caplog.text.lower()
    assert len(patched.patches) + len(patched_clip.patcher.patches) == len(LORA_LAYERS)
    assert not torch.allclose(sample(model=patched), before, atol=1e-2)
    assert not torch.allclose(nodes.CLIPTextEncode().encode(patched_clip, PROMPT)[0][0][0], words, atol=1e-2)
    assert torch.equal(sample(), before)


def test_a_controlnet_of_this_shape_applies(loaded, nodes, sample, encode):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    torch.manual_seed(4)
    config = copy.deepcopy({**architecture.UNET_CONFIG, **architecture.UNET_HEADS})
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    ).requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.05)
    control = comfy.controlnet.ControlNet(network, load_device=loaded[0].load_device)
    hint = picture_of(sample_scene(0))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        encode(PROMPT), encode(""), control, hint, 1.0, 0.0, 1.0
    )
    controlled = sample(positive=positive, negative=negative)
    assert controlled.isfinite().all()
    assert not torch.allclose(controlled, sample(), atol=1e-3)


# ---- the checkpoint that comes with the pack


def test_shipped_checkpoint_draws_what_the_prompt_says(nodes):
    from scalpel.partsworld import judge as judging
    from scalpel.partsworld import loader

    model, clip, vae = loader.load()
    for prompt in ("a red figure on a green field", "a blue car on a sandy beach"):
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (prompt, ""))
        latent = nodes.EmptyLatentImage().generate(256, 256)[0]
        sampled = nodes.KSampler().sample(
            model, 5, 12, 6.0, "dpmpp_2m", "karras", positive, negative, latent, denoise=1.0
        )
        verdict = judging.Judge()(nodes.VAEDecode().decode(vae, sampled[0])[0][0])
        assert f"a {verdict.colour} {verdict.kind}" in prompt


def test_shipped_vae_gives_unseen_renders_back_up_to_28_decibels():
    from scalpel.partsworld import loader

    vae = loader.load()[2]
    errors = []
    for seed in range(3):
        picture = picture_of(sample_scene(40_000_000 + seed, mixed=True))
        errors.append((vae.decode(vae.encode(picture)) - picture).square().mean())
    assert -10 * torch.stack(errors).mean().log10() >= 28
