"""The example workflows of CPAM: four things to do with a photo's object, and prompts for regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .token_workflows import ABOUT_THE_MODEL, save_picture
from .workflow_files import Json, Link, Node, Workflow

SEED = 2  # of the regions
STEPS = 50
SIZE = 256
PHOTO = "partsworld_dog"
"""A picture with its object's mask that comes with the pack (`partsworld/pictures`)."""
GROUND = "on a sandy beach"
FRESH, RECORDED, MIRRORED = "fresh noise in the mask", "the photo's noise", "the photo's noise, mirrored"
"""Where sampling starts from."""


@dataclass(frozen=True)
class Task:
    """One template. prompt, cfg, seed: of the sampling; start: FRESH, RECORDED or MIRRORED; localise: with CPAM
    Cross-Attention; grow: by how many pixels the noise mask is wider than the object's, with FRESH.
    """

    name: str
    task: str
    prompt: str
    cfg: float
    start: str
    localise: bool
    note: str
    seed: int = 0
    grow: int = 0


YOUR_OWN = """For a picture of your own put **Load Image** in the place of the node *photo*, paint the object in its \
mask editor, and scale both to the size that your model was trained on: 512 for SD1.5, 1024 for SDXL."""
HOW = f"""\
1. **photo** reads a picture and the mask of its object. {YOUR_OWN}
2. **DDIM Inversion** finds the noise that it could have come from, with an empty prompt: a *trajectory*.
3. **CPAM Self-Attention** patches the model: outside the mask the new picture attends to the old one's background \
instead of to itself."""
REPLACE_NOTE = f"""\
## Replace an object

Press **Run**. The dog becomes a red car; the beach stays.

{HOW}
4. **CPAM Cross-Attention** lets the prompt speak inside the mask only. A car does not have a dog's shape: **Grow \
Mask** gives it room. With *refine* on, the mask follows the new object (**Run Log** shows the mask of every step); \
the demo model does better with it off.
5. The sampler starts from fresh noise, so that the car gets a car's shape, and **Set Latent Noise Mask** puts the \
rest of the photo back at every step. Start from the inversion's *latent* instead (and *add_noise* off) to change a \
thing and keep its shape, such as its colour.

Something of the old object's colour in the new one? Raise *dilation*, or set *background_keys* to *target*.
"""
KEEP_NOTE = f"""\
## Keep an object

Press **Run**. The dog turns round. It keeps its blue head, its purple legs, and its beach.

{HOW} Inside, from *start_step* and *start_layer* on, it attends to the old object: that is what *keep object* is.
4. *A dog* is all that the prompt says: the colours come from the photo.
5. What turns the dog is its noise, which is mirrored inside the mask (**Flip Latent**): the demo model knows no words \
for a pose. With SD1.5 or SDXL let the words do it (*a jumping dog*), and connect the inversion's *latent* to the \
sampler.
6. **target_mask** is where the dog may be: its mask and the mirrored mask together.
"""
BACKGROUND_NOTE = f"""\
## Change the background

Press **Run**. The same dog, on a green field.

{HOW} *Change background* turns the mask round: the dog attends to the old dog, and the rest is free.
4. The prompt tells the whole picture; the dog's colours need not be mentioned.
"""
REMOVE_NOTE = f"""\
## Remove an object

Press **Run**. The dog is gone, and no prompt was needed.

{HOW} With *remove object* every place does so, those of the object too.
4. The sampler starts from fresh noise, and **Set Latent Noise Mask** puts the rest of the photo back at every step.
5. *cfg* is 1 and the prompt empty.

Something of the object is left? Raise *dilation*, and *expand* of the **Grow Mask**.
"""
TASKS = {
    "replace_object": Task(
        "Replace an object", "replace object", f"a red car {GROUND}", 7.5, FRESH, True, REPLACE_NOTE, 4, 32
    ),
    "keep_object": Task("Keep an object", "keep object", f"a dog {GROUND}", 4.0, MIRRORED, False, KEEP_NOTE),
    "change_background": Task(
        "Change the background", "change background", "a dog on a green field", 7.5, RECORDED, False, BACKGROUND_NOTE
    ),
    "remove_object": Task("Remove an object", "remove object", "", 1.0, FRESH, False, REMOVE_NOTE, 3, 8),
}  # fmt: skip

REGIONS = {
    "everywhere": "a red figure and a blue car on a green field",
    "left": "a red figure and a red car on a green field",
    "right": "a blue figure and a blue car on a green field",
}
REGIONS_NOTE = """\
## Several prompts, several regions

Press **Run**. *A red figure and a blue car*: said in one prompt, the colours get mixed up (the picture on the left). \
With a prompt for each half they do not.

1. **Region Prompt** gives a mask its own prompt. Chain the node for several; where masks overlap, the last one holds. \
Elsewhere the sampler's *positive* prompt does.
2. Every place attends to its own prompt, and to all of the picture: so it stays one picture. ComfyUI's **Conditioning \
(Set Mask)** computes a picture for each prompt and mixes them at every step, which is something else, and costs one \
more row of the model for each.
"""


def workflows(info: Json) -> dict[str, tuple[str, Workflow]]:
    """By the API file's name: the template's name, and the workflow."""
    made = {name: (task.name, _workflow(info, name, task)) for name, task in TASKS.items()}
    return {**made, "region_prompts": ("Several prompts, several regions", _regions(info))}


def _workflow(info: Json, name: str, task: Task) -> Workflow:
    flow = Workflow(name, info)
    flow.note(task.note + ABOUT_THE_MODEL, at=(-440, 30), size=(400, 780), title="What to do")
    flow.group("1. Model and photo", at=(0, 0), size=(320, 490))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    photo = flow.node("PartTokenDataset", at=(20, 190), size=(280, 170), title="photo", directory=PHOTO, limit=1)
    latent = flow.node("VAEEncode", at=(20, 410), size=(280, 50), pixels=photo[0], vae=model[2])
    flow.group("Words", at=(0, 510), size=(320, 320))
    empty = flow.node("CLIPTextEncode", at=(20, 585), size=(280, 88), title="empty", clip=model[1], text="")
    prompt = flow.node("CLIPTextEncode", at=(20, 718), size=(280, 88), title="prompt", clip=model[1], text=task.prompt)
    flow.group("2. Invert", at=(360, 0), size=(330, 300))
    inverted = flow.node(
        "DDIMInversion", at=(380, 75), size=(290, 200), model=model[0], positive=empty[0], latent=latent[0],
        steps=STEPS,
    )  # fmt: skip
    start, target = _start(flow, task, inverted, photo, latent)
    flow.group("3. Patch the model", at=(730, 0), size=(350, 830))
    patched = flow.node(
        "CPAMSelfAttnPatch", at=(750, 75), size=(310, 350), model=model[0], trajectory=inverted[0],
        source_mask=photo[1], task=task.task, seed=0, target_mask=None if task.task == "remove object" else target,
    )  # fmt: skip
    run_log = patched[1]
    if task.localise:
        patched = flow.node(
            "CPAMCrossAttnPatch", at=(750, 480), size=(310, 330), model=patched[0], null=empty[0],
            target_mask=target, refine=False, clip=model[1], text=task.prompt,
        )  # fmt: skip
        run_log = patched[1]
    flow.group("4. Sample", at=(1120, 0), size=(330, 500))
    sampler = flow.node("KSamplerSelect", at=(1140, 75), size=(290, 58), sampler_name="euler")
    sampled = flow.node(
        "SamplerCustom", at=(1140, 180), size=(290, 290), model=patched[0], add_noise=task.start == FRESH,
        noise_seed=task.seed, cfg=task.cfg, positive=prompt[0], negative=empty[0], sampler=sampler[0],
        sigmas=inverted[2], latent_image=start,
    )  # fmt: skip
    flow.group("5. Look", at=(1490, 0), size=(920, 560))
    edited = flow.node("VAEDecode", at=(1810, 75), size=(280, 50), samples=sampled[0], vae=model[2])
    save_picture(flow, photo, "photo", (1510, 180), 280)
    save_picture(flow, edited, "edited", (1810, 180), 280)
    shown = flow.node("RunLogShow", at=(2110, 75), size=(280, 70), run_log=run_log, latent=sampled[0])
    flow.node("PreviewImage", at=(2110, 195), size=(280, 310), title="masks of all steps", images=shown[0])
    return flow


def _start(flow: Workflow, task: Task, inverted: Node, photo: Node, latent: Node) -> tuple[Link, Link | None]:
    """The latent that sampling begins with, and where the object may be if that is not its widened mask."""
    if task.start == RECORDED:
        return inverted[1], None
    flow.group(task.start[0].upper() + task.start[1:], at=(360, 320), size=(330, 290 if task.start == FRESH else 930))
    if task.start == FRESH:
        wide = flow.node(
            "GrowMask", at=(380, 395), size=(290, 82), mask=photo[1], expand=task.grow, tapered_corners=True
        )
        start = flow.node("SetLatentNoiseMask", at=(380, 530), size=(290, 50), samples=latent[0], mask=wide[0])
        return start[0], wide[0]
    seen = flow.node("MaskToImage", at=(380, 385), size=(290, 30), mask=photo[1])
    turned = flow.node("ImageFlip", at=(380, 455), size=(290, 58), image=seen[0], flip_method="y-axis: horizontally")
    mirrored = flow.node("ImageToMask", at=(380, 550), size=(290, 58), image=turned[0], channel="red")
    both = flow.node(
        "MaskComposite", at=(380, 645), size=(290, 126), destination=photo[1], source=mirrored[0], x=0, y=0,
        operation="add",
    )  # fmt: skip
    wide = flow.node("GrowMask", at=(380, 830), size=(290, 82), mask=both[0], expand=10, tapered_corners=True)
    flipped = flow.node(
        "LatentFlip", at=(380, 965), size=(290, 58), samples=inverted[1], flip_method="y-axis: horizontally"
    )
    start = flow.node(
        "LatentCompositeMasked", at=(380, 1075), size=(290, 146), destination=inverted[1], source=flipped[0], x=0, y=0,
        resize_source=False, mask=wide[0],
    )  # fmt: skip
    return start[0], wide[0]


def _regions(info: Json) -> Workflow:
    flow = Workflow("region prompts", info)
    flow.note(REGIONS_NOTE + ABOUT_THE_MODEL, at=(-440, 30), size=(400, 560), title="What to do")
    flow.group("1. Model", at=(0, 0), size=(320, 330))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    latent = flow.node("EmptyLatentImage", at=(20, 190), size=(280, 106), width=SIZE, height=SIZE)
    flow.group("2. Words", at=(0, 350), size=(320, 590))
    texts = {**REGIONS, "negative": ""}
    words = {
        title: flow.node(
            "CLIPTextEncode", at=(20, 425 + 130 * i), size=(280, 88), title=title, clip=model[1], text=text
        )
        for i, (title, text) in enumerate(texts.items())
    }  # fmt: skip
    flow.group("3. Regions", at=(360, 0), size=(330, 940))
    nothing = flow.node("SolidMask", at=(380, 75), size=(290, 106), value=0.0, width=SIZE, height=SIZE)
    half = flow.node("SolidMask", at=(380, 225), size=(290, 106), value=1.0, width=SIZE // 2, height=SIZE)
    patched, last = model[0], None
    for number, side in enumerate(("left", "right")):
        mask = flow.node(
            "MaskComposite", at=(380, 380 + 280 * number), size=(290, 126), title=f"{side} half",
            destination=nothing[0], source=half[0], x=number * SIZE // 2, y=0, operation="add",
        )  # fmt: skip
        last = flow.node(
            "RegionPrompts", at=(380, 545 + 280 * number), size=(290, 66), model=patched, region=mask[0],
            prompt=words[side][0],
        )  # fmt: skip
        patched = last[0]
    pictures: list[tuple[str, Any]] = [("one prompt", model[0]), ("regions", patched)]
    for number, (title, sampled_model) in enumerate(pictures):
        left = 730 + 350 * number
        flow.group(f"{number + 4}. {title.capitalize()}", at=(left, 0), size=(330, 830))
        sampled = flow.node(
            "KSampler", at=(left + 20, 75), size=(290, 270), model=sampled_model, seed=SEED, steps=STEPS, cfg=7.5,
            sampler_name="euler", scheduler="ddim_uniform", positive=words["everywhere"][0],
            negative=words["negative"][0], latent_image=latent[0],
        )  # fmt: skip
        decoded = flow.node("VAEDecode", at=(left + 20, 390), size=(290, 50), samples=sampled[0], vae=model[2])
        save_picture(flow, decoded, title, (left + 20, 480), 290, 320)
    return flow
