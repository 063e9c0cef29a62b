"""Write the example workflows, for the page and for the API.

Run it after changing one here, or after adding an input to a node::

    python dev.py python -m scalpel.devtools.make_workflows
    python dev.py python -m scalpel.devtools.make_pictures
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import cpam_workflows, instdiffedit_workflows, mag_workflows, photo_workflows, token_workflows
from .server import CHECKOUT, ComfyServer
from .workflow_files import Json, Node, Workflow

FOLDER = CHECKOUT / "example_workflows"
SEED = 1


@dataclass(frozen=True)
class Setting:
    """What a workflow is shown on: the model, the words, and what follows from the model."""

    checkpoint: str | None
    token: str
    size: int
    steps: int
    source: str
    edit: str
    negative: str | None
    part: str
    example: str
    try_also: str
    about_the_model: str


SDXL_URL = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"

EDIT_NOTE = """\
## Edit one part

Press **Run**. The sampler draws the *source* prompt and the *edit* prompt from the same noise. At every step the \
**part token** finds the part in the source, and only there the edit comes through.

1. **Load Part Token** says *what* is found: {part}.
2. The **edit** prompt says what it becomes. It differs from the source in as little as possible. {example}
3. **omega** is how much: smaller lets more of the edit through. **blend_until** below 1 leaves the last steps free.

Try {try_also}.

Select a Scalpel node and click the **i** above it for its help page.
"""
DEMO_NOTE = """
*The model here is parts-world, a small demo model that comes with Scalpel and draws nothing but coloured figures, \
cars, chairs and dogs. For real pictures open the SDXL version of this template.*
"""
FIND_NOTE = """\
## Find a part (heat map)

Press **Run**. A picture is drawn as usual; then **Find Part** shows its latent to the model again, with a little \
noise, and reads the **part token**'s attention: where in the picture is this part?

- The **heat map** is the raw attention, black to white.
- **Adaptive Threshold** makes a mask of it. `partedit` keeps a soft rim, `otsu` is black and white.
- The mask is an ordinary MASK: use it with any node. Here it is painted over the picture in yellow.

For a picture of your own, put **Load Image** and **VAE Encode** in the place of KSampler.
"""
SDXL_NOTE = """
---
**Needs two files that Scalpel does not ship:**

- `models/checkpoints/sd_xl_base_1.0.safetensors`: SDXL base 1.0 (stabilityai).
- `models/part_tokens/partimage_human_head.pt`: a part token by the authors of PartEdit, in `pt/` of their Hugging \
Face dataset `Aleksandar/PartEdit-extra` (in ComfyUI, press **R** afterwards). The others there: `torso_custom.pt`, \
`chair_custom.pt`, `carhood_custom.pt`, `partimage_biped_head.pt`, `partimage_quadruped_head.pt`, \
`partimage_carbody.pt`, `partimage_human_hair.pt`, `partimage_human_torso.pt`. The authors' demo program loads the \
quadruped file for its choice "biped_head" and the other way round: trust what you see.

*This workflow was validated by a ComfyUI server, not run: no SDXL weights were at hand where Scalpel was made.*
"""


DEMO = Setting(
    checkpoint=None,
    token="partsworld_figure_head.safetensors",
    size=256,
    steps=50,
    source="a red figure on a green field",
    edit="a blue figure on a green field",
    negative="",
    part="the head of a figure",
    example="The whole figure becomes blue in the words; only its head does in the picture.",
    try_also="another seed, `a purple figure on a green field`, or a car: the token `partsworld_car_hood`, "
    "`a red car on a grey street` and `a yellow car on a grey street`",
    about_the_model=DEMO_NOTE,
)
SDXL = Setting(
    checkpoint="sd_xl_base_1.0.safetensors",
    token="partimage_human_head.pt",
    size=1024,
    steps=50,
    source="a closeup of a man",
    edit="a closeup of a robot",
    negative=None,  # the authors' negative is zeros, not the encoding of ""
    part="a human head",
    example="The man becomes a robot in the words; only his head does in the picture.",
    try_also="another seed, `a closeup of a statue`, or **Edit Batch** for both at once",
    about_the_model=SDXL_NOTE,
)


def main() -> int:
    """Write all workflows with the node definitions of a server of the ComfyUI that ``dev.py`` uses."""
    with ComfyServer(os.environ["SCALPEL_COMFYUI"]) as server:
        info = server.object_info()
    for path, content in files(info).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(content), encoding="utf-8", newline="\n")
        print(path.relative_to(CHECKOUT))
    return 0


def files(info: Json) -> dict[Path, Json]:
    """Every workflow file and its content."""
    result: dict[Path, Json] = {}
    for name, api_name, flow in (
        ("Edit one part", "edit_one_part", edit_one_part(DEMO, info)),
        ("Find a part (heat map)", "find_a_part", find_a_part(DEMO, info)),
        ("Train a part token", "train_a_token", token_workflows.train_a_token(info)),
        ("Edit with your token", "edit_with_your_token", token_workflows.edit_with_your_token(info)),
        ("Two parts at once", "two_parts", token_workflows.two_parts(info)),
        ("Word or token (heat maps)", "word_or_token", token_workflows.word_or_token(info)),
        ("Edit a photo's part", "edit_a_photo", photo_workflows.edit_a_photo(info)),
        ("Compare four inversions", "compare_inversions", photo_workflows.compare_inversions(info)),
        ("One photo, four edits at once", "four_edits", photo_workflows.four_edits(info)),
        *((name, api_name, flow) for api_name, (name, flow) in cpam_workflows.workflows(info).items()),
        *((name, api_name, flow) for api_name, (name, flow) in mag_workflows.workflows(info).items()),
        ("Edit without a mask", "edit_without_a_mask", instdiffedit_workflows.edit_without_a_mask(info)),
        ("Edit one part (SDXL)", "edit_one_part_sdxl", edit_one_part(SDXL, info)),
        ("Find a part (SDXL)", "find_a_part_sdxl", find_a_part(SDXL, info)),
    ):
        result[FOLDER / f"{name}.json"] = flow.page()
        result[FOLDER / "api" / f"{api_name}.json"] = flow.api()
    return result


def dumps(content: Json) -> str:
    """JSON as it is committed."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def edit_one_part(setting: Setting, info: Json) -> Workflow:
    """Source and edit by the Feature Blend Sampler, and the mask between them."""
    flow = Workflow("edit one part" + ("" if setting is DEMO else " sdxl"), info)
    _note(flow, EDIT_NOTE, setting)
    model, token, empty = _model_part_and_size(flow, setting)
    flow.group("2. Words", at=(0, 460), size=(320, 450))
    source = _text(flow, model, "source", setting.source, 535)
    edit = _text(flow, model, "edit", setting.edit, 668)
    negative = _negative(flow, setting, model, source, 801)

    flow.group("3. Edit", at=(360, 0), size=(370, 600))
    blend = flow.node(
        "FeatureBlendSampler", at=(380, 75), size=(330, 500), model=model[0], source=source[0], edit=edit[0],
        negative=negative[0], latent_image=empty[0], seed=SEED, steps=setting.steps, part_token=token[0],
    )  # fmt: skip

    token_workflows.look_at_edit(flow, model, blend)
    return flow


def find_a_part(setting: Setting, info: Json) -> Workflow:
    """A picture, the part's heat map in it, the mask, and the mask over the picture."""
    flow = Workflow("find a part" + ("" if setting is DEMO else " sdxl"), info)
    _note(flow, FIND_NOTE, setting)
    model, token, empty = _model_part_and_size(flow, setting)
    flow.group("2. Words", at=(0, 460), size=(320, 320))
    positive = _text(flow, model, "positive", setting.source, 535)
    negative = _negative(flow, setting, model, positive, 668)

    flow.group("3. Draw a picture", at=(360, 0), size=(370, 375))
    latent = flow.node(
        "KSampler", at=(380, 75), size=(330, 275), model=model[0], positive=positive[0], negative=negative[0],
        latent_image=empty[0], seed=SEED, steps=setting.steps, cfg=7.5, sampler_name="euler", scheduler="ddim_uniform",
    )  # fmt: skip
    flow.group("4. Find the part", at=(360, 395), size=(370, 530))
    heat = flow.node(
        "AttentionMaskExtractor", at=(380, 470), size=(330, 230), model=model[0], part_token=token[0], latent=latent[0],
    )  # fmt: skip
    mask = flow.node("AdaptiveThreshold", at=(380, 750), size=(330, 150), mask=heat[0])

    side, left = 250, [790, 1060, 1330, 1600]
    flow.group("5. Look", at=(770, 0), size=(4 * side + 100, 760))
    picture = flow.node("VAEDecode", at=(left[0], 75), size=(side, 50), samples=latent[0], vae=model[2])
    heat_image = flow.node("MaskToImage", at=(left[1], 75), size=(side, 30), mask=heat[0])
    mask_image = flow.node("MaskToImage", at=(left[2], 75), size=(side, 30), mask=mask[0])
    paint = flow.node(
        "EmptyImage", at=(left[2], 580), size=(side, 130), title="yellow", width=setting.size, height=setting.size,
        color=0xFFE600,
    )  # fmt: skip
    overlay = flow.node(
        "ImageCompositeMasked", at=(left[3], 580), size=(side, 150), title="paint the part", destination=picture[0],
        source=paint[0], mask=mask[0],
    )  # fmt: skip
    for node, title, x in (
        (picture, "picture", left[0]),
        (heat_image, "heat map", left[1]),
        (mask_image, "mask", left[2]),
        (overlay, "found", left[3]),
    ):
        token_workflows.save_picture(flow, node, title, (x, 180), side)
    return flow


def _note(flow: Workflow, text: str, setting: Setting) -> None:
    words = text.format(**vars(setting)) + setting.about_the_model
    flow.note(words, at=(-420, 30), size=(380, 600 if setting is DEMO else 880), title="What to do")


def _model_part_and_size(flow: Workflow, setting: Setting) -> tuple[Node, Node, Node]:
    flow.group("1. Model and part", at=(0, 0), size=(320, 440))
    if setting.checkpoint is None:
        model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    else:
        known = [{"name": setting.checkpoint, "url": SDXL_URL, "directory": "checkpoints"}]
        model = flow.node(
            "CheckpointLoaderSimple", at=(20, 75), size=(280, 98), properties={"models": known},
            ckpt_name=setting.checkpoint,
        )  # fmt: skip
    token = flow.node("PartTokenLoader", at=(20, 220), size=(280, 58), token=setting.token)
    empty = flow.node("EmptyLatentImage", at=(20, 320), size=(280, 106), width=setting.size, height=setting.size)
    return model, token, empty


def _text(flow: Workflow, model: Node, title: str, words: str, y: int) -> Node:
    return flow.node("CLIPTextEncode", at=(20, y), size=(280, 88), title=title, clip=model[1], text=words)


def _negative(flow: Workflow, setting: Setting, model: Node, positive: Node, y: int) -> Node:
    if setting.negative is None:
        return flow.node(
            "ConditioningZeroOut", at=(20, y), size=(280, 30), title="negative (zeros)", conditioning=positive[0]
        )
    return _text(flow, model, "negative", setting.negative, y)


if __name__ == "__main__":
    sys.exit(main())
