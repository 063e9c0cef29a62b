"""The example workflows of MAG-Edit: one of three like objects in another colour, two at once, a texture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .token_workflows import ABOUT_THE_MODEL, save_picture
from .workflow_files import Json, Node, Workflow

STEPS, CFG = 20, 4.0
"""Guidance 4: a plain DDIM inversion drifts away at 7.5."""
THREE, THREE_LEFT, THREE_PURPLE = "partsworld_three", "partsworld_three_left", "partsworld_three_purple"
"""Pictures of three figures, with the mask of the middle one, or the left, that come with the pack."""
SDXL = "sd_xl_base_1.0.safetensors"
SDXL_URL = f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{SDXL}"


@dataclass(frozen=True)
class Push:
    """A MAG Guidance: its words, the folder whose mask it has (the photo's own if none), its other inputs."""

    words: str
    folder: str = ""
    more: tuple[tuple[str, Any], ...] = ()


YOUR_OWN = """For a picture of your own put **Load Image** in the place of the node *photo*, paint one object in its \
mask editor, and scale both to the size that your model was trained on: 512 for SD1.5, 1024 for SDXL."""
HOW = f"""\
1. **photo** reads a picture and the mask of one object. {YOUR_OWN}
2. **Prompt to Prompt** holds two texts: the *source* says what the picture shows, the *edit* the same with the words \
that shall come.
3. **DDIM Inversion** finds the noise that the photo could have come from, with the *source* prompt: a *trajectory*.
4. **MAG Guidance** patches the model: before each of the first steps it moves the latent until, inside the mask, the \
model attends to the *words*. Outside the mask nothing is moved, and in the last steps the photo comes back there."""
ONE_NOTE = f"""\
## Recolour one of three

Press **Run**. Three orange figures; the one in the middle becomes green. A prompt alone cannot say which.

{HOW}

**Run Log** shows how far the words got, move by move; it should fall. Nothing changes? More *iterations*, a larger \
*until* or *scale*, or *spatial ratio* as *constraint*. The shape breaks? Less of them. *paper* as *preset* is what \
the authors do: it takes five times as many moves.
"""
TWO_NOTE = f"""\
## Push two words at once

Press **Run**. The left figure becomes blue and the middle one green, in one run.

{HOW}
5. A second **MAG Guidance** on the same model has its own words and its own mask. Only one of them needs the \
*trajectory* and *prompt_control*. Chain as many as you like: they share each gradient, so that two cost little more \
than one.

Two words for *one* mask go into one node, with weights: *yellow: 1, furry: 0.5*.
"""
NEGATIVE_NOTE = f"""\
## Attenuate with negative words

Press **Run**. *Yellow* is pushed in both pictures, in few moves. In *without* one leg stays purple. In *edited* \
*purple* is a *negative word*: its attention inside the mask is pushed down, and the leg becomes yellow too.

{HOW}

*negative_words* are words of the edit prompt too: it still says what the others look like. *negative_scale* is how \
much they count.
"""
TEXTURE_NOTE = f"""\
## Change a texture (SDXL)

Press **Run**. One of the cushions becomes furry; it keeps its place and its shape.

{HOW}

**photo** wants a folder *my_photo* in ComfyUI's `input` with `photo.png`, 1024 × 1024, and `photo_mask.png` \
(white where the cushion is); or connect **Load Image**. A texture needs more steps than a colour: *until* 0.5. For \
another shape try *spatial ratio*.

---
**Needs a file that Scalpel does not ship:** `models/checkpoints/{SDXL}`: SDXL base 1.0 (stabilityai). On a card with \
little memory switch *checkpointing* on.

*This workflow was validated by a ComfyUI server, not run: no SDXL weights were at hand where Scalpel was made.*
"""

ORANGE = "an orange figure and an orange figure and an orange figure on white snow"
PURPLE = "a purple figure and a purple figure and a purple figure on white snow"
GREEN_ONE = ORANGE.replace("an orange figure and an orange", "an orange figure and a green", 1)
BLUE_AND_GREEN = ORANGE.replace("an orange figure and an orange", "a blue figure and a green", 1)
YELLOW_ONE = PURPLE.replace("a purple figure and a purple", "a purple figure and a yellow", 1)
FEW = (("iterations", 10),)


def workflows(info: Json) -> dict[str, tuple[str, Workflow]]:
    """By the API file's name: the template's name, and the workflow."""
    one, two = Push("green"), Push("blue", THREE_LEFT)
    without, against = (
        Push("yellow", more=FEW),
        Push("yellow", more=(*FEW, ("negative_words", "purple"), ("negative_scale", 1.0))),
    )
    made: dict[str, tuple[Any, ...]] = {
        "recolour_one": ("Recolour one of three", ONE_NOTE, THREE, ORANGE, GREEN_ONE, {"edited": (one,)}),
        "push_two_words": ("Push two words at once", TWO_NOTE, THREE, ORANGE, BLUE_AND_GREEN, {"edited": (one, two)}),
        "negative_words": (
            "Attenuate with negative words", NEGATIVE_NOTE, THREE_PURPLE, PURPLE, YELLOW_ONE,
            {"without": (without,), "edited": (against,)},
        ),
    }  # fmt: skip
    flows = {name: (title, _workflow(info, name, *rest)) for name, (title, *rest) in made.items()}
    return {**flows, "change_a_texture_sdxl": ("Change a texture (SDXL)", _texture(info))}


def _workflow(
    info: Json, name: str, note: str, photo: str, source: str, edit: str, pictures: dict[str, tuple[Push, ...]]
) -> Workflow:
    """One photo, and for each picture a model with these pushes."""
    flow = Workflow(name, info)
    flow.note(note + ABOUT_THE_MODEL, at=(-480, 30), size=(440, 760), title="What to do")
    flow.group("1. Model and photo", at=(0, 0), size=(320, 490))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    _edit(flow, model, _photo(flow, photo, 190), source, edit, pictures)
    return flow


def _texture(info: Json) -> Workflow:
    flow = Workflow("change a texture sdxl", info)
    flow.note(TEXTURE_NOTE, at=(-480, 30), size=(440, 820), title="What to do")
    flow.group("1. Model and photo", at=(0, 0), size=(320, 490))
    known = [{"name": SDXL, "url": SDXL_URL, "directory": "checkpoints"}]
    model = flow.node(
        "CheckpointLoaderSimple", at=(20, 75), size=(280, 98), properties={"models": known}, ckpt_name=SDXL
    )
    photo = _photo(flow, "my_photo", 215)
    push = Push("furry", more=(("preset", "paper"),))
    source, edit = (f"a photo of a sofa with {cushions}" for cushions in ("cushions", "furry cushions"))
    _edit(flow, model, photo, source, edit, {"edited": (push,)}, steps=50, cfg=7.5)
    return flow


def _photo(flow: Workflow, folder: str, top: int, title: str = "photo", left: int = 20) -> Node:
    return flow.node("PartTokenDataset", at=(left, top), size=(280, 150), title=title, directory=folder, limit=1)


def _edit(
    flow: Workflow, model: Node, photo: Node, source: str, edit: str, pictures: dict[str, tuple[Push, ...]],
    steps: int = STEPS, cfg: float = CFG,
) -> None:  # fmt: skip
    """From the photo to the pictures."""
    latent = flow.node("VAEEncode", at=(20, 410), size=(280, 50), pixels=photo[0], vae=model[2])
    flow.group("2. Words", at=(0, 510), size=(320, 640))
    words = flow.node(
        "PromptToPrompt", at=(20, 585), size=(280, 400), clip=model[1], source_text=source, edit_text=edit,
        mode="refine", cross_replace=0.8, self_replace=0.5,
    )  # fmt: skip
    empty = flow.node("CLIPTextEncode", at=(20, 1035), size=(280, 88), title="negative", clip=model[1], text="")
    flow.group("3. Invert", at=(360, 0), size=(330, 300))
    inverted = flow.node(
        "DDIMInversion", at=(380, 75), size=(290, 200), model=model[0], positive=words[1], latent=latent[0],
        steps=steps,
    )  # fmt: skip
    flow.group("Sampler", at=(360, 320), size=(330, 160))
    sampler = flow.node("KSamplerSelect", at=(380, 395), size=(290, 58), sampler_name="euler")
    save_picture(flow, photo, "photo", (380, 560), 290)
    left = 730
    for title, pushes in pictures.items():
        patched, logs = model[0], []
        flow.group(f"4. Guide: {title}", at=(left, 0), size=(350 * len(pushes), 800))
        for number, push in enumerate(pushes):
            mask = photo[1]
            if push.folder:
                mask = _photo(flow, push.folder, 620, "its mask", left + 20 + 350 * number)[1]
            first: Json = {"prompt_control": words[0], "trajectory": inverted[0]} if number == 0 else {}
            guided = flow.node(
                "MAGGuidance", at=(left + 20 + 350 * number, 75), size=(310, 500), model=patched, clip=model[1],
                edit_text=edit, words=push.words, mask=mask, **{"preset": "fast", **dict(push.more)}, **first,
            )  # fmt: skip
            patched = guided[0]
            logs.append(guided[1])
        left += 350 * len(pushes) + 40
        flow.group(f"5. Sample: {title}", at=(left, 0), size=(330, 1260))
        sampled = flow.node(
            "SamplerCustom", at=(left + 20, 75), size=(290, 290), model=patched, add_noise=False, noise_seed=0, cfg=cfg,
            positive=words[2], negative=empty[0], sampler=sampler[0], sigmas=inverted[2], latent_image=inverted[1],
        )  # fmt: skip
        decoded = flow.node("VAEDecode", at=(left + 20, 410), size=(290, 50), samples=sampled[0], vae=model[2])
        save_picture(flow, decoded, title, (left + 20, 500), 290)
        shown = flow.node("RunLogShow", at=(left + 20, 930), size=(290, 70), run_log=logs[0], latent=sampled[0])
        flow.node("PreviewImage", at=(left + 20, 1040), size=(290, 200), title="constraint", images=shown[0])
        left += 370
