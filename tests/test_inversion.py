"""The four inversions on SD1.5- and SDXL-shaped models: against diffusers, there and back, and what they cost."""

from __future__ import annotations

import comfy.sample
import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import (
    compute_noise_ddim,
    compute_noise_sde_dpm_pp_2nd,
)

from scalpel.core.inversion import (
    CONVENTIONS,
    DDPMStep,
    SDEDPMStep,
    ddim_inversion,
    leading_timesteps,
    noise_map_inversion,
)
from scalpel.core.unet import inverting
from scalpel.nodes.inversion import DDIMInversion, EditFriendlyInversion, LEDITSInversion, NullTextInversion
from scalpel.nodes.trajectories import RecordTrajectory, ReplayTrajectory
from scalpel.partsworld import tokens
from scalpel.partsworld.loader import load
from scalpel.tests import tiny

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def picture(batch=1, height=24, width=16):
    return {"samples": 0.8 * tiny.randn(batch, 4, height, width, seed=90) / 0.18215}


def invert(patcher, node, kind=KIND, **changes):
    """A node's outputs with few steps."""
    settings = {
        "model": patcher, "positive": tiny.prompt(kind, 1), "latent": picture(), "steps": 4,
        "scheduler": "ddim_uniform",
    }  # fmt: skip
    more = {
        DDIMInversion: {"refine_steps": 0},
        NullTextInversion: {"negative": tiny.prompt(kind, 3), "cfg": 4.0, "inner_steps": 3, "learning_rate": 0.01},
        EditFriendlyInversion: {"negative": tiny.prompt(kind, 3), "cfg": 4.0, "skip": 0.36, "eta": 1.0, "seed": 5},
        LEDITSInversion: {"skip": 0.15, "seed": 5},
    }[node]
    return node.execute(**{**settings, **more, **changes}).args


def replay(patcher, trajectory, kind=KIND, cfg=1.0, positive=None, latent=None):
    model, sampler, sigmas, start = ReplayTrajectory.execute(patcher, trajectory).args
    return SamplerCustom.execute(
        model, False, 123, cfg, positive or tiny.prompt(kind, 1), tiny.prompt(kind, 3), sampler, sigmas, latent or start
    ).args[0]["samples"]


# ---------------------------------------------------------------- against diffusers


def inside(patcher, body):
    """Run body(epsilon, denoise, clean latent) where ComfyUI samples; epsilon takes z and a timestep, as diffusers."""

    def run(r):
        sampling = patcher.get_model_object("model_sampling")

        def epsilon(z, t):
            sigma = float(sampling.sigma(torch.tensor(float(t))))
            x = z * (1 + sigma**2) ** 0.5
            return (x - r.denoise(x, sigma)) / sigma

        return body(epsilon, r.denoise, r.clean)

    image = picture()
    return inverting._run(patcher, tiny.prompt(KIND, 1), [], 1.0, image, torch.tensor([1.0, 0.0]), run)


def levels(patcher, timesteps):
    return patcher.get_model_object("model_sampling").sigma(torch.tensor(timesteps, dtype=torch.float32))


def to_z(x, sigmas):
    return x / (1 + sigmas.view(-1, *[1] * (x.ndim - 1)) ** 2) ** 0.5


@pytest.mark.parametrize(("name", "offset"), [("ddim_leading", 1), ("ddim_own_loop", 0)])
def test_ddim_inversion_is_diffusers_inverse_scheduler(model, name, offset):
    steps = 10
    scheduler = DDIMInverseScheduler(**BETAS, set_alpha_to_one=False, steps_offset=offset, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    timesteps = leading_timesteps(steps, CONVENTIONS[name])
    assert timesteps[:-1][::-1] == scheduler.timesteps.tolist()
    sigmas = levels(model, timesteps)

    def body(epsilon, denoise, clean):
        z, theirs = clean, [clean]
        for t in scheduler.timesteps.tolist():
            z = scheduler.step(epsilon(z, t), t, z).prev_sample
            theirs.append(z)
        return ddim_inversion(denoise, clean, sigmas), torch.stack(theirs[::-1])

    ours, theirs = inside(model, body)
    assert tiny.relative(to_z(ours, sigmas), theirs) < 1e-4


def test_ddim_inversion_is_the_cpam_authors():
    """golden/cpam_a: their SD1.5 pipeline's inverted latents at every level."""
    case, golden = tiny.golden_case("cpam_a")
    patcher = tiny.golden_model("cpam_a", comfy.supported_models.SD15)
    image = {"samples": golden["clean_latent"] / 0.18215}
    trajectory, _, sigmas = DDIMInversion.execute(
        patcher, [[golden["context_null"], {}]], image, case["steps"], "ddim_leading", 0
    ).args
    torch.testing.assert_close(sigmas, golden["sigmas"], rtol=2e-5, atol=0)
    assert tiny.relative(trajectory.latents[:-1, 0], golden["ref_ve"]) < 1e-5


def test_sd2_s_convention_evaluates_at_the_level_that_a_step_comes_from(model):
    """CPAM's SD2.1 loop: ε(z_t, t) carries z_t to the next level."""
    convention = CONVENTIONS["sd2_inversion"]
    sigmas = levels(model, leading_timesteps(5, convention))

    def body(epsilon, denoise, clean):
        alphas = (1 / (1 + sigmas.double() ** 2)).tolist()
        timesteps, z, theirs = leading_timesteps(5, convention), clean.double(), [clean.double()]
        for low in range(5, 0, -1):
            e = epsilon(z.float(), timesteps[low]).double()
            x0 = (z - (1 - alphas[low]) ** 0.5 * e) / alphas[low] ** 0.5
            z = alphas[low - 1] ** 0.5 * x0 + (1 - alphas[low - 1]) ** 0.5 * e
            theirs.append(z)
        return ddim_inversion(denoise, clean, sigmas, evaluated_at="own"), torch.stack(theirs[::-1]).float()

    ours, theirs = inside(model, body)
    assert tiny.relative(to_z(ours, sigmas), theirs) < 1e-4


def test_edit_friendly_noise_maps_are_those_of_diffusers_ddim(model):
    steps, eta = 10, 0.7
    scheduler = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    sigmas, noise = levels(model, leading_timesteps(steps, CONVENTIONS["ddim_leading"])), tiny.randn(
        steps, 1, 4, 24, 16, seed=4
    )  # fmt: skip

    def body(epsilon, denoise, clean):
        at = [scheduler.add_noise(clean, n, t[None]) for n, t in zip(noise, scheduler.timesteps, strict=True)]
        at.append(clean)
        theirs = []
        for i, t in enumerate(scheduler.timesteps.tolist()):
            z, at[i + 1] = compute_noise_ddim(scheduler, at[i + 1], at[i], t, epsilon(at[i], t), eta)
            before = t - 1000 // steps
            theirs.append(eta * scheduler._get_variance(t, before) ** 0.5 * z)
        latents, maps = noise_map_inversion(denoise, clean, noise, sigmas, DDPMStep(eta))
        return latents, maps, torch.stack(at), torch.stack(theirs)

    latents, maps, their_latents, theirs = inside(model, body)
    assert tiny.relative(to_z(latents, sigmas), their_latents) < 1e-4
    assert tiny.relative(to_z(maps, sigmas[1:]), theirs) < 1e-4


def test_ledits_noise_maps_are_those_of_diffusers_second_order_solver(model):
    steps = 20
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++",
        solver_order=2, timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    sigmas, noise = scheduler.sigmas.float(), tiny.randn(steps, 1, 4, 24, 16, seed=4)

    def body(epsilon, denoise, clean):
        at = [clean * (1 + s**2) ** -0.5 + n * s * (1 + s**2) ** -0.5 for n, s in zip(noise, sigmas, strict=False)]
        at.append(clean)
        theirs, stds = [], []
        for i, t in enumerate(scheduler.timesteps):
            z, at[i + 1] = compute_noise_sde_dpm_pp_2nd(scheduler, at[i + 1], at[i], t, epsilon(at[i], t), 1.0)
            ratio = sigmas[i + 1] / sigmas[i] * ((1 + sigmas[i] ** 2) / (1 + sigmas[i + 1] ** 2)) ** 0
            stds.append(sigmas[i + 1] * (1 + sigmas[i + 1] ** 2) ** -0.5 * (1 - ratio**2) ** 0.5)
            theirs.append(z * stds[-1])
        latents, maps = noise_map_inversion(denoise, clean, noise, sigmas, SDEDPMStep())
        return latents, maps, torch.stack(at[:-1]), torch.stack(theirs[:-1])

    latents, maps, their_latents, theirs = inside(model, body)
    assert tiny.relative(to_z(latents[:-1], sigmas[:-1]), their_latents) < 1e-4
    assert tiny.relative(to_z(maps[:-1], sigmas[1:-1]), theirs) < 1e-4  # in the last step no noise is added


def test_leading_timesteps_and_their_bounds():
    assert leading_timesteps(4, CONVENTIONS["ddim_leading"]) == [751, 501, 251, 1, 0]
    assert leading_timesteps(4, CONVENTIONS["ddim_own_loop"]) == [750, 500, 250, 0, 0][:5]
    assert leading_timesteps(2, CONVENTIONS["comfyui"]) == [501, 1]
    with pytest.raises(ValueError, match="steps: 0 is out of range; accepted are numbers from 1 to 1000"):
        leading_timesteps(0, CONVENTIONS["ddim_leading"])


# ---------------------------------------------------------------- there and back


def sampled(denoise, start, sigmas):
    """Euler's way down."""
    x = start
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        denoised = denoise(x, sigma)
        x = denoised + following / sigma * (x - denoised)
    return x


@pytest.mark.parametrize("last", [0.0, 0.0292])
def test_a_refined_inversion_is_solved_to_float(last):
    """A model that denoises (random weights do not, and no iteration has to converge on them)."""

    def denoise(x, sigma):
        return x / (1 + sigma**2) + 0.3 * torch.tanh(2 * x.roll(1, -1) / (1 + sigma))

    clean = tiny.randn(1, 4, 24, 16, seed=6).double()
    sigmas = torch.cat([torch.logspace(1.1, -1.4, 30), torch.tensor([last])])
    errors = []
    for refine_steps in (0, 1, 3, 12):
        latents = ddim_inversion(denoise, clean, sigmas, refine_steps)
        errors.append(tiny.relative(sampled(denoise, latents[0], sigmas), latents[-1]))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[3] < 1e-7


def test_refining_brings_the_demo_model_closer():
    patcher, clip, vae = load()
    pixels, _ = tokens.pictures(tokens.scenes("figure", 1, 6_000_000), "head")
    prompt, image = clip.encode_from_tokens_scheduled(clip.tokenize("")), {"samples": vae.encode(pixels)}
    errors = []
    for refine_steps in (0, 1, 3):
        trajectory = DDIMInversion.execute(patcher, prompt, image, 20, "ddim_uniform", refine_steps).args[0]
        errors.append(tiny.relative(replay(patcher, trajectory, positive=prompt), image["samples"]))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("cfg", [1.0, 3.5, 7.5, 15.0])
@pytest.mark.parametrize("name", KINDS)
def test_edit_friendly_noise_maps_bring_the_source_back_at_any_cfg(name, cfg):
    kind = KINDS[name]
    patcher = tiny.model(kind)
    for skip in (0.0, 0.5):
        trajectory = invert(patcher, EditFriendlyInversion, kind, cfg=cfg, skip=skip)[0]
        made = replay(patcher, trajectory, kind, cfg)
        scale = patcher.get_model_object("latent_format").process_out(trajectory.latents[-1])
        assert torch.equal(made, scale)
        assert tiny.relative(made, picture()["samples"]) < 1e-6
        assert trajectory.steps == (4 if skip == 0 else 2)


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "karras", "ddim_leading"])
def test_ledits_brings_the_source_back_to_the_bit_on_any_schedule(model, scheduler):
    trajectory = invert(model, LEDITSInversion, scheduler=scheduler, steps=6)[0]
    made = replay(model, trajectory)
    assert torch.equal(made, model.get_model_object("latent_format").process_out(trajectory.clean))
    assert tiny.relative(made, picture()["samples"]) < 1e-6


def test_another_prompt_with_the_noise_maps_is_another_picture(model):
    trajectory = invert(model, EditFriendlyInversion)[0]
    other = replay(model, trajectory, cfg=4.0, positive=tiny.prompt(KIND, 2))
    assert tiny.relative(other, picture()["samples"]) > 0.01


def test_eta_0_has_no_noise_and_eta_1_as_much_as_ddpm():
    assert DDPMStep(0.0)(torch.ones(1), torch.zeros(1), 4.0, 2.0)[1] == 0
    mean, std = DDPMStep(1.0)(torch.ones(1), torch.zeros(1), 4.0, 2.0)
    assert std == pytest.approx((2**2 * (4**2 - 2**2) / 4**2) ** 0.5)
    assert float(mean) == pytest.approx((2**2 - std**2) ** 0.5 / 4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "uni_pc", "ddim"])
def test_a_recorded_generation_is_ksampler_s_and_comes_back_to_the_bit(model, sampler):
    settings = (7, 4, 4.0, sampler, "normal", tiny.prompt(KIND, 1), tiny.prompt(KIND, 3))
    image = tiny.latent()
    made, trajectory, sigmas = RecordTrajectory.execute(model, *settings, image, 1.0).args
    noise = comfy.sample.prepare_noise(image["samples"], 7)
    plain = comfy.sample.sample(
        model, noise, 4, 4.0, sampler, "normal", *settings[5:], image["samples"], denoise=1.0, seed=7, disable_pbar=True
    )
    assert torch.equal(made["samples"], plain)
    assert torch.equal(sigmas, trajectory.sigmas)
    again = replay(model, trajectory, cfg=4.0)
    assert torch.equal(again, plain) or (sampler == "uni_pc" and tiny.relative(again, plain) < 1e-5)  # scales its x
    if sampler == "heun":
        assert len(trajectory.levels) == 2 * 4 - 1 + 1


def test_a_recorded_img2img_with_a_noise_mask_is_ksampler_s(model):
    image = {**picture(), "noise_mask": (tiny.randn(1, 1, 24, 16, seed=3) > 0).float()}
    settings = (7, 6, 4.0, "euler", "normal", tiny.prompt(KIND, 1), tiny.prompt(KIND, 3))
    made, trajectory, _ = RecordTrajectory.execute(model, *settings, image, 0.5).args
    plain = comfy.sample.sample(
        model, comfy.sample.prepare_noise(image["samples"], 7), 6, 4.0, "euler", "normal", *settings[5:],
        image["samples"], denoise=0.5, noise_mask=image["noise_mask"], seed=7, disable_pbar=True,
    )  # fmt: skip
    assert torch.equal(made["samples"], plain)
    assert trajectory.steps == 6


NODES = [DDIMInversion, NullTextInversion, EditFriendlyInversion, LEDITSInversion]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", KINDS)
def test_two_pictures_that_are_not_square_are_inverted_as_each_alone(name, node):
    kind = KINDS[name]
    patcher = tiny.model(kind)
    both = picture(2, 16, 24)
    # one small update: Adam makes signs of the rounding of the smallest gradients, and further updates build on them
    few = {"inner_steps": 1, "learning_rate": 1e-3} if node is NullTextInversion else {}
    trajectory, latent, sigmas = invert(patcher, node, kind, latent=both, steps=3, **few)
    assert trajectory.images == 2
    assert trajectory.size == (16, 24)
    assert latent["samples"].shape == (2, 4, 16, 24)
    assert torch.equal(sigmas, trajectory.sigmas)
    second = {"samples": both["samples"][1:], "batch_index": [1]}
    alone = invert(patcher, node, kind, latent=second, steps=3, **few)[0]
    assert tiny.relative(trajectory.latents[:, 1:], alone.latents) < (2e-3 if node is NullTextInversion else 1e-4)


@pytest.mark.parametrize(
    ("node", "rows"),
    [(DDIMInversion, 1), (EditFriendlyInversion, 2), (LEDITSInversion, 1)],
)
def test_what_a_step_costs_in_unet_rows(model, node, rows):
    counted = tiny.CountedCalls()
    trajectory = invert(counted.attach(model), node)[0]
    assert sum(counted.rows) == rows * trajectory.steps


def test_refining_costs_a_row_more_each(model):
    counted = tiny.CountedCalls()
    invert(counted.attach(model), DDIMInversion, refine_steps=3)
    assert sum(counted.rows) == 4 * 4


@pytest.mark.parametrize("node", NODES)
def test_the_model_is_as_before(model, node):
    before = tiny.plain(model, KIND)
    invert(model, node, steps=2)
    assert torch.equal(tiny.plain(model, KIND), before)


def test_what_the_latent_says_of_its_rows_is_passed_on(model):
    image = {**picture(2), "batch_index": [3, 5]}
    assert invert(model, DDIMInversion, latent=image)[1]["batch_index"] == [3, 5]


@pytest.mark.parametrize("node", NODES)
def test_v_prediction_models_are_inverted(node):
    patcher = tiny.model(tiny.V_PREDICTION)
    trajectory = invert(patcher, node, steps=4)[0]
    made = replay(patcher, trajectory, cfg=trajectory.cfg)
    bound = {DDIMInversion: 0.3, NullTextInversion: 0.5}.get(node, 1e-5)
    assert tiny.relative(made, picture()["samples"]) < bound


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("node", "change", "words"),
    [
        (DDIMInversion, {"steps": 0}, "steps: 0 is out of range"),
        (DDIMInversion, {"refine_steps": -1}, "refine_steps: -1 is out of range"),
        (DDIMInversion, {"scheduler": "fast"}, "scheduler: 'fast' is unknown; accepted are .*ddim_leading"),
        (DDIMInversion, {"positive": []}, "positive: the conditioning is empty"),
        (DDIMInversion, {"positive": [[torch.zeros(1, 77, 768), {}]]}, r"positive: it is 768 wide \(SD1.x\)"),
        (DDIMInversion, {"latent": {"samples": torch.ones(1, 16, 8, 8)}}, r"latent: its shape is \[1, 16, 8, 8\]"),
        (DDIMInversion, {"latent": {"samples": torch.full((1, 4, 8, 8), torch.nan)}}, "latent: it holds NaN"),
        (EditFriendlyInversion, {"skip": 1.0}, "skip: 1.0 is out of range; accepted are numbers from 0 to below 1"),
        (EditFriendlyInversion, {"skip": 0.95}, "skip: 0.95 leaves none of 4 steps"),
        (EditFriendlyInversion, {"eta": 1.5}, "eta: 1.5 is out of range"),
        (EditFriendlyInversion, {"cfg": 0.5}, "cfg: 0.5 is out of range"),
        (LEDITSInversion, {"skip": -0.1}, "skip: -0.1 is out of range"),
        (NullTextInversion, {"negative": tiny.prompt(KIND, 3, batch=2)}, "negative: 2 prompts for 1 pictures"),
        (NullTextInversion, {"inner_steps": 0}, "inner_steps: 0 is out of range"),
        (NullTextInversion, {"learning_rate": 0.0}, "learning_rate: 0.0 is out of range"),
    ],
)
def test_bad_input_is_named_and_the_model_left_as_it_was(model, node, change, words):
    before = tiny.plain(model, KIND, steps=1)
    with pytest.raises(ValueError, match=words):
        invert(model, node, **change)
    assert torch.equal(tiny.plain(model, KIND, steps=1), before)


def test_another_family_another_size_and_other_sigmas_are_refused_in_a_sentence(model):
    trajectory = invert(model, EditFriendlyInversion)[0]
    with pytest.raises(ValueError, match=r"another model family \(SD15, text width 32\) than this one \(SDXL, text"):
        ReplayTrajectory.execute(tiny.model(tiny.SDXL), trajectory)
    with pytest.raises(ValueError, match="latent_image: it is a picture of 64 × 64, and the trajectory's is 128 × 192"):
        replay(model, trajectory, latent=tiny.latent(8, 8))
    patched, sampler, _, start = ReplayTrajectory.execute(model, trajectory).args
    with pytest.raises(ValueError, match=r"sigmas: they have 2 steps .* noise maps hold for its own 3"):
        SamplerCustom.execute(
            patched, False, 0, 4.0, tiny.prompt(KIND, 1), tiny.prompt(KIND, 3), sampler, trajectory.sigmas[1:], start
        )


def test_another_checkpoint_of_the_family_is_warned_of(model, caplog):
    trajectory = invert(model, DDIMInversion)[0]
    other = tiny.model(KIND, weights=tiny.random_weights(tiny.model(KIND).model.diffusion_model, seed=1))
    ReplayTrajectory.execute(other, trajectory)
    assert "another checkpoint" in caplog.text
