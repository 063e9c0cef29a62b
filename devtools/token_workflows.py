"""The example workflows about part tokens: training one, editing with it, several parts, words as parts."""

from __future__ import annotations

from typing import Any

from .workflow_files import Json, Node, Workflow

SEED = 1
STEPS = 50
PICTURES = "partsworld_figure_head"
"""The training pictures that come with the pack (`partsworld/pictures`)."""
OWN_TOKEN = "my_part"
SOURCE, EDIT = "a red figure on a green field", "a blue figure on a green field"
ABOUT_THE_MODEL = """
*The model here is parts-world, a small demo model that comes with Scalpel and draws nothing but coloured figures, \
cars, chairs and dogs. For real pictures load an SD1.5 or SDXL checkpoint in its place.*
"""

TRAIN_NOTE = f"""\
## Train a part token

Press **Run**. Ten pictures with a painted *head* are loaded, and a part token is fitted to them: a minute or two. The \
model itself is not trained and not changed.

1. **Load Part Pictures** reads a folder: `name.png` beside `name_mask.png`, white where the part is. For your own \
part, put such a folder into ComfyUI's `input` and write its name here. Or connect **Load Image** and paint in its \
mask editor.
2. **Train Part Token** learns the part. Give it a *name*.
3. Look at the **heat maps**: bright where the token finds the part; the white line is your mask. The **loss curve** \
should fall and flatten.
4. **Save Part Token** writes `models/part_tokens/{OWN_TOKEN}_00001.safetensors`. Press **R**, and **Load Part Token** \
lists it. Nothing is ever overwritten.

Then open the template *Edit with your token*.
"""
OWN_NOTE = f"""\
## Edit with your token

Press **Run**. The part that the **part token** finds becomes blue, and nothing else does.

1. **Load Part Token**: a token for *hair* that comes with Scalpel. After the template *Train a part token*, press \
**R** and choose your own: `{OWN_TOKEN}_00001.safetensors`.
2. **Prompt to Prompt** holds both texts. `{SOURCE}` becomes `{EDIT}`: *blue* takes the place of *red*. The word that \
differs is free after 0.4 of the steps (*word_cross_replace*); all others keep the source's attention throughout. So \
the edit stays where the source was. This is what the authors of PartEdit do.
3. The sampler blends the edit in where the token points.

Try other colours: red, orange, yellow, green, blue, purple, white, black. Write the new one into *word_cross_replace* \
as well.
"""
TWO_NOTE = """\
## Two parts at once

Press **Run**. **Combine Part Tokens** makes one token of *torso* and *head*; both become blue, and the legs \
stay red.

1. Each **Load Part Token** names a part. For a third, add another **Combine Part Tokens** behind the first.
2. The sampler takes the combined token like any other.
3. **Find Part** gives one heat map per part, in the order in which they were combined.

Different edits for different parts need one sampler after the other.
"""
WORD_NOTE = """\
## Word or token

Press **Run**. Where does the model itself see a *head*, and where does a trained part token?

1. **Part Token from Text** takes the word as the text encoder gives it: no training. It works for what the model has \
often read of, and seldom for parts.
2. **Load Part Token** loads a token that was trained on painted pictures.
3. Both heat maps are of the same picture.

Try `figure` or `field` as the word: whole things have words that work.
"""


def train_a_token(info: Json) -> Workflow:
    """Pictures and masks from a folder, training, heat maps and loss curve, the token saved."""
    flow = Workflow("train a token", info)
    _note(flow, TRAIN_NOTE)
    flow.group("1. Model and pictures", at=(0, 0), size=(320, 440))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    pairs = flow.node("PartTokenDataset", at=(20, 220), size=(280, 170), directory=PICTURES)
    flow.group("2. Train", at=(360, 0), size=(370, 640))
    trained = flow.node(
        "PartTokenTrainer", at=(380, 75), size=(330, 390), model=model[0], vae=model[2], images=pairs[0],
        masks=pairs[1], name="head", seed=SEED,
    )  # fmt: skip
    flow.node("PartTokenSave", at=(380, 530), size=(330, 80), part_token=trained[0], filename_prefix=OWN_TOKEN)
    flow.group("3. Look", at=(770, 0), size=(860, 560))
    save_picture(flow, trained[2], "heat maps", (790, 75), 400)
    save_picture(flow, trained[1], "loss curve", (1210, 75), 400)
    return flow


def edit_with_your_token(info: Json) -> Workflow:
    """A token of one's own with Prompt-to-Prompt, as in the authors' demo."""
    flow = Workflow("edit with your token", info)
    _note(flow, OWN_NOTE)
    flow.group("1. Model and part", at=(0, 0), size=(320, 440))
    model, empty = _model_and_size(flow)
    token = flow.node("PartTokenLoader", at=(20, 320), size=(280, 58), token="partsworld_figure_hair.safetensors")
    flow.group("2. Words", at=(0, 460), size=(320, 520))
    words = flow.node(
        "PromptToPrompt", at=(20, 535), size=(280, 420), clip=model[1], source_text=SOURCE, edit_text=EDIT,
        cross_replace=1.0, self_replace=0.0, word_cross_replace="blue: 0.4",
    )  # fmt: skip
    negative = flow.node("CLIPTextEncode", at=(380, 700), size=(330, 88), title="negative", clip=model[1], text="")
    _edit_and_look(flow, model, empty, token, words[1], words[2], negative, prompt_control=words[0])
    return flow


def two_parts(info: Json) -> Workflow:
    """Head and torso recoloured in one run, and the heat map of each."""
    flow = Workflow("two parts at once", info)
    _note(flow, TWO_NOTE)
    flow.group("1. Model and parts", at=(0, 0), size=(320, 640))
    model, empty = _model_and_size(flow)
    tokens = [
        flow.node(
            "PartTokenLoader", at=(20, y), size=(280, 58), title=part, token=f"partsworld_figure_{part}.safetensors"
        )
        for part, y in (("torso", 320), ("head", 430))
    ]
    both = flow.node(
        "PartTokenCombine", at=(20, 540), size=(280, 50), part_token_a=tokens[0][0], part_token_b=tokens[1][0]
    )
    flow.group("2. Words", at=(0, 660), size=(320, 450))
    source, edit, negative = (
        flow.node("CLIPTextEncode", at=(20, y), size=(280, 88), title=title, clip=model[1], text=text)
        for title, text, y in (("source", SOURCE, 735), ("edit", EDIT, 868), ("negative", "", 1001))
    )
    blend = _edit_and_look(flow, model, empty, both, source[0], edit[0], negative)
    flow.group("5. Where the parts are", at=(770, 620), size=(920, 480))
    heat = flow.node(
        "AttentionMaskExtractor", at=(790, 695), size=(280, 230), model=model[0], part_token=both[0], latent=blend[1],
    )  # fmt: skip
    picture = flow.node("MaskToImage", at=(1090, 695), size=(280, 30), mask=heat[0])
    save_picture(flow, picture, "heat maps", (1390, 695), 280)
    return flow


def word_or_token(info: Json) -> Workflow:
    """The heat map of a word beside that of a trained token (PartEdit, figure 2)."""
    flow = Workflow("word or token", info)
    _note(flow, WORD_NOTE)
    flow.group("1. Model and part", at=(0, 0), size=(320, 580))
    model, empty = _model_and_size(flow)
    word = flow.node("PartTokenFromText", at=(20, 320), size=(280, 88), clip=model[1], text="head")
    token = flow.node("PartTokenLoader", at=(20, 470), size=(280, 58), token="partsworld_figure_head.safetensors")
    flow.group("2. Draw a picture", at=(360, 0), size=(370, 620))
    positive, negative = (
        flow.node("CLIPTextEncode", at=(380, y), size=(330, 88), title=title, clip=model[1], text=text)
        for title, text, y in (("positive", SOURCE, 75), ("negative", "", 208))
    )
    latent = flow.node(
        "KSampler", at=(380, 341), size=(330, 262), model=model[0], positive=positive[0], negative=negative[0],
        latent_image=empty[0], seed=SEED, steps=STEPS, cfg=7.5, sampler_name="euler", scheduler="ddim_uniform",
    )  # fmt: skip
    side, left = 280, [790, 1090, 1390]
    flow.group("3. Look", at=(770, 0), size=(3 * side + 80, 780))
    picture = flow.node("VAEDecode", at=(left[0], 75), size=(side, 50), samples=latent[0], vae=model[2])
    save_picture(flow, picture, "picture", (left[0], 400), side)
    for part, title, x in ((word, "the word", left[1]), (token, "the token", left[2])):
        heat = flow.node(
            "AttentionMaskExtractor", at=(x, 75), size=(side, 210), model=model[0], part_token=part[0],
            latent=latent[0],
        )  # fmt: skip
        image = flow.node("MaskToImage", at=(x, 330), size=(side, 30), mask=heat[0])
        save_picture(flow, image, title, (x, 400), side)
    return flow


def _note(flow: Workflow, text: str) -> None:
    flow.note(text + ABOUT_THE_MODEL, at=(-420, 30), size=(380, 720), title="What to do")


def _model_and_size(flow: Workflow) -> tuple[Node, Node]:
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    return model, flow.node("EmptyLatentImage", at=(20, 180), size=(280, 106), width=256, height=256)


def _edit_and_look(
    flow: Workflow, model: Node, empty: Node, token: Node, source: Any, edit: Any, negative: Node, **more: Any
) -> Node:
    flow.group("3. Edit", at=(360, 0), size=(370, 620))
    blend = flow.node(
        "FeatureBlendSampler", at=(380, 75), size=(330, 520), model=model[0], source=source, edit=edit,
        negative=negative[0], latent_image=empty[0], seed=SEED, steps=STEPS, part_token=token[0], **more,
    )  # fmt: skip
    look_at_edit(flow, model, blend)
    return blend


def look_at_edit(flow: Workflow, model: Node, blend: Node, title: str = "4. Look") -> None:
    """Source, mask and edit of a Feature Blend Sampler, decoded and saved side by side."""
    side, left = 280, [790, 1090, 1390]
    flow.group(title, at=(770, 0), size=(3 * side + 80, 600))
    before = flow.node("VAEDecode", at=(left[0], 75), size=(side, 50), samples=blend[1], vae=model[2])
    found = flow.node("MaskToImage", at=(left[1], 75), size=(side, 30), mask=blend[2])
    after = flow.node("VAEDecode", at=(left[2], 75), size=(side, 50), samples=blend[0], vae=model[2])
    for node, title, x in ((before, "source", left[0]), (found, "mask", left[1]), (after, "edited", left[2])):
        save_picture(flow, node, title, (x, 180), side)


def save_picture(flow: Workflow, image: Any, title: str, at: tuple[int, int], width: int, height: int = 0) -> None:
    """A SaveImage node, square unless a height is given."""
    prefix = f"scalpel/{title.replace(' ', '_')}"
    link = image[0] if isinstance(image, Node) else image
    flow.node("SaveImage", at=at, size=(width, height or width + 80), title=title, images=link, filename_prefix=prefix)
