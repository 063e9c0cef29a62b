"""Plug-and-Play: against the authors' scheme written out, in ComfyUI's samplers, with MAG Guidance, on the server."""

from __future__ import annotations

import dataclasses
import io

import comfy.hooks
import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from PIL import Image

from scalpel.core.mag import Push
from scalpel.core.unet import mag
from scalpel.core.unet.layers import layer_table
from scalpel.core.unet.partly import SHOWING_THE_SOURCE
from scalpel.core.unet.plug_and_play import first_block
from scalpel.devtools.server import ComfyError
from scalpel.nodes.plug_and_play import PlugAndPlayPatch
from scalpel.nodes.trajectories import RecordTrajectory
from scalpel.partsworld import loader
from scalpel.tests import tiny

pytestmark = pytest.mark.usefixtures("inference")
KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
H, W, STEPS, CFG = 24, 16, 4, 4.0


def recorded(patcher, kind, batch=1, seed=1):
    output = RecordTrajectory.execute(
        patcher, 7, STEPS, 1.0, "euler", "normal", tiny.prompt(kind, seed), tiny.prompt(kind, 3),
        tiny.latent(H, W, batch), 1.0,
    )  # fmt: skip
    return output.args[:2]


def patch(patcher, trajectory, feature_until=0.8, attention_until=0.5):
    return PlugAndPlayPatch.execute(patcher, trajectory, feature_until, attention_until).args[0]


def sampled(patcher, kind, batch=1, **changes):
    settings = {"positive": tiny.prompt(kind, 2), "negative": tiny.prompt(kind, 3), "cfg": CFG, **changes}
    empty = torch.zeros(batch, 4, H, W)
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(empty, 7), STEPS, settings.pop("cfg"), "euler", "normal",
        settings.pop("positive"), settings.pop("negative"), empty, disable_pbar=True, seed=7, **settings,
    )  # fmt: skip


def hooks(patcher):
    return [m for m in patcher.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]


# ---------------------------------------------------------------- the authors' scheme


def authors_way(patcher, kind, trajectory, features, attention_steps):
    """Euler with three rows a step, [source, without prompt, with prompt]: the first overwrites what it gives."""
    unet, model = patcher.model.diffusion_model, patcher.model
    table, place = layer_table(patcher), ("output", 4 if kind is tiny.SD15 else 1)
    prompts = [tiny.prompt(kind, seed)[0] for seed in (1, 3, 2)]
    context = torch.cat([prompt[0] for prompt in prompts])
    y = None
    if kind.pooled:
        y = torch.cat([
            model.encode_adm(**options, noise=torch.zeros(1, 4, H, W), device="cpu") for _, options in prompts
        ])  # fmt: skip
    now = {"step": 0}

    def replaced(q, k, v, options):
        address = (*options["block"], options["block_index"])
        if now["step"] < attention_steps and address[0] == "output" and address[1] >= place[1]:
            q, k = q[:1].expand_as(q), k[:1].expand_as(k)
        q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def residual(_module, _arguments, output):
        return output[:1].expand_as(output) if now["step"] < features else None

    handle = unet.output_blocks[place[1]][0].out_layers.register_forward_hook(residual)
    try:
        x = trajectory.start.clone()
        for i, (sigma, following) in enumerate(zip(trajectory.sigmas, trajectory.sigmas[1:], strict=False)):
            now["step"] = i
            rows = torch.cat([trajectory.latents[i], x, x])
            options = {"patches_replace": {"attn1": dict.fromkeys(table.layers, replaced)}}
            out = model.apply_model(rows, sigma.expand(3), c_crossattn=context, y=y, transformer_options=options)
            guided = out[1:2] + CFG * (out[2:] - out[1:2])
            x = guided + following / sigma * (x - guided)
        return patcher.get_model_object("latent_format").process_out(x)
    finally:
        handle.remove()


@pytest.mark.parametrize(("features", "attention"), [(3, 2), (4, 0), (0, 4)])
@pytest.mark.parametrize("name", KINDS)
def test_three_rows_of_the_authors_are_one_row_and_two(name, features, attention):
    kind = KINDS[name]
    patcher = tiny.model(kind)
    _, trajectory = recorded(patcher, kind)
    wanted = authors_way(patcher, kind, trajectory, features, attention)
    made = sampled(patch(patcher, trajectory, features / STEPS, attention / STEPS), kind)
    assert tiny.relative(made, wanted) < 2e-5
    assert tiny.relative(sampled(patcher, kind), wanted) > 1e-2


def test_features_come_from_the_authors_block():
    assert first_block(layer_table(tiny.model(tiny.SD15))) == ("output", 4, 0)
    assert first_block(layer_table(tiny.model(tiny.SDXL))) == ("output", 1, 0)


# ---------------------------------------------------------------- in ComfyUI


def test_the_source_is_shown_once_a_step_while_it_is_needed():
    patcher = tiny.model(tiny.SD15)
    _, trajectory = recorded(patcher, tiny.SD15)
    counted = tiny.CountedCalls()
    sampled(patch(counted.attach(patcher), trajectory, 0.5, 0.25), tiny.SD15)
    assert counted.rows == [2, 1, 2, 1, 2, 2]  # counted before the source is shown


def test_without_any_step_or_node_the_bits_are_the_model_s_own():
    kind = tiny.SD15
    patcher = tiny.model(kind, inference=True)
    before = sampled(patcher, kind)
    _, trajectory = recorded(patcher, kind)
    assert torch.equal(sampled(patch(patcher, trajectory, 0.0, 0.0), kind), before)
    clone = patch(patcher, trajectory)
    made = sampled(clone, kind)
    assert not torch.equal(made, before)
    assert torch.equal(sampled(clone, kind), made)
    assert torch.equal(sampled(patcher, kind), before)
    assert hooks(patcher) == []


def test_a_cancelled_run_leaves_no_hook(monkeypatch):
    kind = tiny.SD15
    patcher = tiny.model(kind)
    _, trajectory = recorded(patcher, kind)

    def interrupted(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sampled(patch(patcher, trajectory), kind, callback=interrupted)
    assert hooks(patcher) == []


def test_the_lora_of_a_prompt_is_on_the_model_when_it_is_called():
    """Showing the source takes hooks off, as the source has none."""
    patcher, kind = tiny.model(tiny.SD15), tiny.SD15
    _, trajectory = recorded(patcher, kind)
    name = "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
    weight = patcher.model.state_dict()[name]
    lora = {
        f"{name.removesuffix('.weight')}.lora_up.weight": tiny.randn(weight.shape[0], 2, seed=1),
        f"{name.removesuffix('.weight')}.lora_down.weight": tiny.randn(2, weight.shape[1], seed=2),
    }
    plain, seen = weight.clone(), []

    def look(executor, *args, **kwargs):
        options = args[5]
        if not options.get(SHOWING_THE_SOURCE):
            seen.append((options["cond_or_uncond"], torch.equal(patcher.model.state_dict()[name], plain)))
        return executor(*args, **kwargs)

    patched = patch(patcher, trajectory)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    with_lora = comfy.hooks.set_hooks_for_conditioning(
        tiny.prompt(kind, 2), comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    )
    sampled(patched, kind, positive=with_lora)
    assert sorted(seen) == sorted([([0], False), ([1], True)] * STEPS)


@pytest.mark.parametrize(
    "options", [{"area": (H, 8, 0, 0)}, {"start_percent": 0.5}, {"mask": torch.ones(1, H, W), "mask_strength": 1.0}]
)
def test_a_source_whose_prompt_is_for_a_part_is_refused(options, model):
    kind = tiny.SD15
    _, trajectory = recorded(model, kind)
    trajectory = dataclasses.replace(trajectory, positive=tiny.with_options(trajectory.positive, **options))
    with pytest.raises(ValueError, match=r"^trajectory: its prompt is for an area of the picture or some of the steps"):
        sampled(patch(model, trajectory), kind)


def test_rows_and_calls_may_be_divided_as_comfyui_likes():
    kind = tiny.SD15
    patcher = tiny.model(kind)
    _, trajectory = recorded(patcher, kind, batch=2)
    together = sampled(patch(patcher, trajectory), kind, batch=2)
    apart = sampled(patch(tiny.short_of_memory(patcher), trajectory), kind, batch=2)
    assert tiny.relative(apart, together) < 1e-5
    _, first = recorded(patcher, kind)
    assert tiny.relative(sampled(patch(patcher, first), kind), together[:1]) < 1e-5
    both = torch.cat([tiny.prompt(kind, 2)[0][0], tiny.prompt(kind, 5)[0][0]])
    edits = sampled(patch(patcher, first), kind, batch=2, positive=[[both, {}]])  # two edits of one source
    assert torch.isfinite(edits).all()


def test_mag_guidance_moves_the_latent_of_a_model_that_takes_features():
    """Both in one run: inner iterations see the injected features, and the constraint falls."""
    kind = tiny.SD15
    patcher = tiny.model(kind, inference=True)
    _, trajectory = recorded(patcher, kind)
    region = torch.zeros(1, 8 * H, 8 * W)
    region[:, 64:128, 32:96] = 1
    words = mag.Region((Push((5,)),), region, "token ratio", 3, 0.5, 5.0, 3.0)
    counted = tiny.CountedCalls()
    model = patch(counted.attach(patcher), trajectory)
    made = sampled(mag.guide(model, mag.GuidanceSpec((words,))), kind)
    assert counted.rows[:6] == [1, 1, 1, 1, 2, 1]  # an iteration shows the source; two more; the step
    assert tiny.relative(made, sampled(model, kind)) > 1e-3
    for line in words.log.lines[:-1]:
        values = [float(value) for value in line.split(": ")[1].split(" → ")]
        assert values == sorted(values, reverse=True)
    assert hooks(patcher) == []


# ---------------------------------------------------------------- the node


def test_bad_inputs_are_named():
    patcher = tiny.model(tiny.SD15)
    _, trajectory = recorded(patcher, tiny.SD15)
    with pytest.raises(ValueError, match=r"feature_until: 1\.5 is out of range; accepted are numbers from 0"):
        patch(patcher, trajectory, 1.5)
    with pytest.raises(ValueError, match="trajectory: it was made with a model of another model family"):
        patch(tiny.model(tiny.SDXL), trajectory)
    with pytest.raises(ValueError, match="model: it has a Plug-and-Play already"):
        patch(patch(patcher, trajectory), trajectory)
    with pytest.raises(ValueError, match="latent_image: it is a picture of 64 × 64, and the trajectory's is 128 × 192"):
        comfy.sample.sample(
            patch(patcher, trajectory), torch.zeros(1, 4, 8, 8), 2, 4.0, "euler", "normal", tiny.prompt(tiny.SD15, 2),
            tiny.prompt(tiny.SD15, 3), torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=7,
        )  # fmt: skip


# ---------------------------------------------------------------- through the server


def graph(attention_until=0.5):
    texts = {"source": "a red car on a grey street", "edit": "a yellow car on a sandy beach", "nothing": ""}
    nodes = {"model": ("PartsWorldLoader", {})}
    for name, text in texts.items():
        nodes[name] = ("CLIPTextEncode", {"clip": ["model", 1], "text": text})
    common = {
        "seed": 3, "steps": 10, "sampler_name": "euler", "scheduler": "ddim_uniform", "negative": ["nothing", 0],
        "latent_image": ["empty", 0], "denoise": 1.0,
    }  # fmt: skip
    nodes |= {
        "empty": ("EmptyLatentImage", {"width": 256, "height": 256, "batch_size": 1}),
        "before": ("RecordTrajectory", {"model": ["model", 0], "cfg": 6.0, "positive": ["source", 0], **common}),
        "patched": ("PlugAndPlayPatch", {
            "model": ["model", 0], "trajectory": ["before", 1], "feature_until": 0.8,
            "attention_until": attention_until,
        }),
        "after": ("KSampler", {"model": ["patched", 0], "cfg": 6.0, "positive": ["edit", 0], **common | {"seed": 11}}),
        "other": ("KSampler", {"model": ["model", 0], "cfg": 6.0, "positive": ["edit", 0], **common | {"seed": 11}}),
    }  # fmt: skip
    for name in ("before", "after", "other"):
        nodes[f"{name} picture"] = ("VAEDecode", {"samples": [name, 0], "vae": ["model", 2]})
        nodes[f"{name} saved"] = ("PreviewImage", {"images": [f"{name} picture", 0]})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_a_server_keeps_the_layout_of_the_source(server):
    """From other noise than the source's, the edges of the edit lie where the source's are."""
    outputs = server.run(graph())["outputs"]
    pictures = {}
    for name in ("before", "after", "other"):
        data = server.fetch(outputs[f"{name} saved"]["images"][0])
        pictures[name] = np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float64)

    def edges(picture):
        down, across = np.gradient(picture)
        return np.hypot(down, across).ravel()

    kept, unkept = (np.corrcoef(edges(pictures["before"]), edges(pictures[n]))[0, 1] for n in ("after", "other"))
    assert kept > unkept + 0.1
    with pytest.raises(ComfyError, match=r"attention_until|Value 7"):
        server.run(graph(attention_until=7.0))


def test_the_demo_model_has_the_block():
    assert first_block(layer_table(loader.load()[0]))[0] == "output"
