"""The example workflows about real pictures: editing one, comparing the inversions, several edits of one picture."""

from __future__ import annotations

from typing import Any, NamedTuple

from .token_workflows import ABOUT_THE_MODEL, look_at_edit, save_picture
from .workflow_files import Json, Link, Node, Workflow

SEED = 1
STEPS, FEW_STEPS = 50, 10
PHOTO = "partsworld_photo"
"""The "photo" that comes with the pack (`partsworld/pictures`)."""
TOKEN = "partsworld_figure_head.safetensors"
SOURCE = "a red figure on a green field"
CAPTION = "a red figure with yellow hair and orange legs on a green field"
EDITS = {colour: f"a {colour} figure on a green field" for colour in ("blue", "white", "purple", "black")}
CFG = 7.5


class Inversion(NamedTuple):
    """An inversion node, its title on the page, what is set in it, and the cfg that plays its trajectory back."""

    kind: str
    title: str
    settings: Json
    cfg: float = 1.0


PHOTO_INVERSION = Inversion("LEDITSInversion", "LEDITS++ Inversion", {"skip": 0.1})
"""The one that the templates which edit a photo use: the best of `bench/inversion.py`, but for its `skip`: at its 0.15
white seldom comes.
"""
WHY_THESE_SETTINGS = """*skip* 0.1: a colour is settled in the noisiest steps, so few may be left out. Too little \
changes: a smaller *skip*. Too much: a larger one."""
"""What their notes say about its settings."""
COMPARED = (
    Inversion("DDIMInversion", "DDIM", {}),
    Inversion("NullTextInversion", "null-text", {}, CFG),
    Inversion("EditFriendlyInversion", "edit-friendly", {}, CFG),
    Inversion("LEDITSInversion", "LEDITS++", {}),
)

YOUR_OWN = """For a picture of your own put **Load Image** in the place of the node *photo*."""
EDIT_NOTE = f"""\
## Edit a photo's part

Press **Run**. The picture on the left was not generated: it is a file. Its head becomes blue, and nothing else does.

1. **photo** reads a picture that comes with Scalpel. {YOUR_OWN} Scale it to the size that your model was trained on: \
512 for SD1.5, 1024 for SDXL.
2. **{PHOTO_INVERSION.title}** finds out how this picture could have come from noise: a *trajectory*. Its prompt is \
empty: no caption is needed here.
3. **Prompt to Prompt** holds both texts: the *source* says what the picture shows, the *edit* the same with the part \
changed. A caption from any captioning node does for the source. Nothing has to be said of what stays: hair and legs \
are not mentioned. The word that differs (*blue*, in *word_cross_replace* too) is free after 0.4 of the steps.
4. The sampler takes the *trajectory* as its source. *steps* and *scheduler* are those of the inversion.

{WHY_THESE_SETTINGS}

**Save Trajectory** keeps a trajectory for another day.
"""
COMPARE_NOTE = f"""\
## Compare four inversions

Press **Run**; it takes up to a minute. The same picture is inverted in four ways, and each trajectory is played back: \
**Replay Trajectory** gives **SamplerCustom** all it needs. What comes out should be the *photo* (as the VAE shows \
it); **Compare Pictures** tells how near it comes, in decibels: above 40 no eye sees a difference.

1. **DDIM**: one model call a step. It comes back well without guidance (*cfg* 1).
2. **null-text**: the same, and then an embedding of the negative prompt is fitted to every step, so that it comes \
back with guidance too. Slow.
3. **edit-friendly**: noise maps; comes back exactly, with this prompt and this *cfg*.
4. **LEDITS++**: noise maps of a better solver; comes back exactly, at *cfg* 1.

The *source* prompt is a full caption: the first two come back the better for it. Try *cfg* 7.5 in the SamplerCustom \
of DDIM: the picture drifts away. This is what null-text mends. Try *refine_steps* 2 in DDIM: hardly a difference is \
left.

Here are {FEW_STEPS} steps, to be quick; use {STEPS} for your pictures. {YOUR_OWN}
"""
FOUR_NOTE = f"""\
## One photo, four edits at once

Press **Run**. One inversion, one run of the sampler, four heads: blue, white, purple, black.

1. **photo**, **{PHOTO_INVERSION.title}**: as in the template *Edit a photo's part*. {YOUR_OWN}
2. **Edit Batch** puts two edit prompts together. Three of them, one behind the other, make four.
3. The sampler edits all four from the one source, which costs nothing here but its row in the batch.

The four pictures come out of one *edited* output, in the order of the prompts.
"""


def edit_a_photo(info: Json) -> Workflow:
    """A file inverted and one part of it edited."""
    flow = Workflow("edit a photo", info)
    _note(flow, EDIT_NOTE)
    model, token, latent = _model_part_and_photo(flow)
    (negative,) = _words(flow, model, {"negative": ""})
    flow.group("Words that change", at=(0, 820), size=(320, 520))
    words = flow.node(
        "PromptToPrompt", at=(20, 895), size=(280, 420), clip=model[1], source_text=SOURCE, edit_text=EDITS["blue"],
        cross_replace=1.0, self_replace=0.0, word_cross_replace="blue: 0.4",
    )  # fmt: skip
    inverted = _invert(flow, model, latent, negative)
    _edit(flow, model, token, inverted, words[1], words[2], negative, prompt_control=words[0])
    return flow


def four_edits(info: Json) -> Workflow:
    """One inversion and four edits in one run."""
    flow = Workflow("one photo, four edits", info)
    _note(flow, FOUR_NOTE)
    model, token, latent = _model_part_and_photo(flow)
    source, negative, *edits = _words(flow, model, {"source": SOURCE, "negative": "", **EDITS})
    batch = edits[0]
    for number, edit in enumerate(edits[1:]):
        batch = flow.node(
            "EditBatch", at=(20, 1515 + 100 * number), size=(280, 50), edit_a=batch[0], edit_b=edit[0]
        )  # fmt: skip
    flow.group("Four in one", at=(0, 1440), size=(320, 360))
    inverted = _invert(flow, model, latent, negative)
    _edit(flow, model, token, inverted, source[0], batch[0], negative)
    return flow


def compare_inversions(info: Json) -> Workflow:
    """A file inverted in four ways, and each trajectory played back."""
    flow = Workflow("compare inversions", info)
    _note(flow, COMPARE_NOTE)
    flow.group("1. Model and photo", at=(0, 0), size=(320, 470))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    latent = _photo(flow, model, 190)
    source, negative = _words(flow, model, {"source": CAPTION, "negative": ""}, top=490, title="2. Words")
    flow.group("Photo", at=(0, 830), size=(320, 160))
    seen = flow.node("VAEDecode", at=(20, 905), size=(280, 50), samples=latent[0], vae=model[2])
    pictures = []
    for number, method in enumerate(COMPARED):
        left = 360 + 350 * number
        flow.group(f"{number + 3}. {method.title}", at=(left, 0), size=(330, 990))
        x, width = left + 20, 290
        inverted = _inversion_node(
            flow, method, (x, 75), width, FEW_STEPS, model=model[0], positive=source[0], negative=negative[0],
            latent=latent[0],
        )  # fmt: skip
        replay = flow.node(
            "ReplayTrajectory", at=(x, 435), size=(width, 90), model=model[0], trajectory=inverted[0]
        )  # fmt: skip
        sampled = flow.node(
            "SamplerCustom", at=(x, 575), size=(width, 280), model=replay[0], add_noise=False, cfg=method.cfg,
            positive=source[0], negative=negative[0], sampler=replay[1], sigmas=replay[2], latent_image=replay[3],
        )  # fmt: skip
        pictures.append(
            flow.node("VAEDecode", at=(x, 905), size=(width, 50), samples=sampled[0], vae=model[2])[0]
        )  # fmt: skip
    flow.group("Compare", at=(360, 1010), size=(1380, 500))
    grid = flow.node(
        "PictureComparison", at=(380, 1085), size=(290, 190), reference=seen[0],
        labels=", ".join(["photo", *(method.title for method in COMPARED)]),
        image_a=pictures[0], image_b=pictures[1], image_c=pictures[2], image_d=pictures[3],
    )  # fmt: skip
    save_picture(flow, grid, "comparison", (700, 1085), 1010, 400)
    return flow


def _note(flow: Workflow, text: str) -> None:
    flow.note(text + ABOUT_THE_MODEL, at=(-420, 30), size=(380, 860), title="What to do")


def _photo(flow: Workflow, model: Node, top: int) -> Node:
    """The picture that comes with the pack, as a latent."""
    photo = flow.node("PartTokenDataset", at=(20, top), size=(280, 170), title="photo", directory=PHOTO, limit=1)
    return flow.node("VAEEncode", at=(20, top + 215), size=(280, 50), pixels=photo[0], vae=model[2])


def _model_part_and_photo(flow: Workflow) -> tuple[Node, Node, Node]:
    flow.group("1. Model, part and photo", at=(0, 0), size=(320, 590))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    token = flow.node("PartTokenLoader", at=(20, 190), size=(280, 58), token=TOKEN)
    return model, token, _photo(flow, model, 300)


def _words(flow: Workflow, model: Node, texts: dict[str, str], top: int = 610, title: str = "3. Words") -> list[Node]:
    """One prompt below the other, by their titles."""
    flow.group(title, at=(0, top), size=(320, 133 * len(texts) + 55))
    return [
        flow.node(
            "CLIPTextEncode", at=(20, top + 75 + 133 * i), size=(280, 88), title=title, clip=model[1], text=text
        )
        for i, (title, text) in enumerate(texts.items())
    ]  # fmt: skip


def _invert(flow: Workflow, model: Node, latent: Node, negative: Node) -> Node:
    flow.group("2. Invert", at=(360, 0), size=(370, 510))
    nothing = flow.node("CLIPTextEncode", at=(380, 75), size=(330, 88), title="empty", clip=model[1], text="")
    return _inversion_node(
        flow, PHOTO_INVERSION, (380, 208), 330, STEPS, model=model[0], positive=nothing[0], negative=negative[0],
        latent=latent[0],
    )  # fmt: skip


def _inversion_node(
    flow: Workflow, method: Inversion, at: tuple[int, int], width: int, steps: int, **inputs: Link
) -> Node:
    """The inversion, with those of these inputs that it has."""
    required = flow.info[method.kind]["input"]["required"]
    values: dict[str, Any] = {**inputs, "seed": SEED, "steps": steps, **method.settings}
    has = {name: value for name, value in values.items() if name in required}
    return flow.node(method.kind, at=at, size=(width, 290), title=method.title, **has)


def _edit(
    flow: Workflow, model: Node, token: Node, inverted: Node, source: Link, edit: Link, negative: Node, **more: Any
) -> None:  # fmt: skip
    flow.group("4. Edit", at=(360, 530), size=(370, 640))
    blend = flow.node(
        "FeatureBlendSampler", at=(380, 605), size=(330, 540), model=model[0], source=source, edit=edit,
        negative=negative[0], latent_image=inverted[1], seed=SEED, steps=STEPS, cfg=CFG, part_token=token[0],
        trajectory=inverted[0], **more,
    )  # fmt: skip
    look_at_edit(flow, model, blend, "5. Look")
