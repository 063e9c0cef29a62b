"""The example workflow of InstDiffEdit: a photo edited by words alone, its mask found and handed to inpainting."""

from __future__ import annotations

from .token_workflows import ABOUT_THE_MODEL, save_picture
from .workflow_files import Json, Workflow

SEED = 1
STEPS = 20
PHOTO = "partsworld_dog"
"""A picture that comes with the pack (`partsworld/pictures`)."""
TEXT = "on a green field"

NOTE = f"""\
## Edit without a mask

Press **Run**. *{TEXT[0].upper()}{TEXT[1:]}*: nothing else is said, and nothing painted. The beach becomes a field, \
and the dog stays.

1. **photo** reads a picture. For one of your own put **Load Image** in its place, scaled to the size that your model \
was trained on: 512 for SD1.5, 1024 for SDXL.
2. **InstDiffEdit Sampler** gives it noise to *strength*, denoises it, and at every step looks where the words of \
*edit_text* draw attention. **mask** is that of the last step; **step_masks** shows how it came.
3. The mask goes to inpainting, which begins with nothing but noise inside it. The *prompt* has the same words.

There are two ways to inpaint, both wired here:

- **noise mask**: *Set Latent Noise Mask* works with every model. It puts the photo back around the mask at every \
step; the model itself does not know about the mask.
- **inpaint conditioning**: *Inpaint Model Conditioning* also tells an **inpainting checkpoint** \
(`sd-v1-5-inpainting`, say) what is around the mask, and what it fills in fits better. Load one with **Load \
Checkpoint**, and connect its MODEL, CLIP and VAE to this sampler, its prompts and this node; InstDiffEdit keeps the \
ordinary model. The demo model is none, so it makes the same picture twice.

Mask too small, or too large? Lower or raise *threshold*. Wrong place? Another word, another *seed*, more *rounds*; a \
word that fits what is there now helps.
"""


def edit_without_a_mask(info: Json) -> Workflow:
    """A photo, words, the mask that they find, and two ways of inpainting."""
    flow = Workflow("edit without a mask", info)
    flow.note(NOTE + ABOUT_THE_MODEL, at=(-480, 30), size=(440, 860), title="What to do")
    flow.group("1. Model and photo", at=(0, 0), size=(320, 490))
    model = flow.node("PartsWorldLoader", at=(20, 75), size=(280, 70))
    photo = flow.node("PartTokenDataset", at=(20, 190), size=(280, 170), title="photo", directory=PHOTO, limit=1)
    latent = flow.node("VAEEncode", at=(20, 410), size=(280, 50), pixels=photo[0], vae=model[2])
    flow.group("Words", at=(0, 510), size=(320, 320))
    prompt = flow.node("CLIPTextEncode", at=(20, 585), size=(280, 88), title="prompt", clip=model[1], text=TEXT)
    empty = flow.node("CLIPTextEncode", at=(20, 718), size=(280, 88), title="empty", clip=model[1], text="")

    flow.group("2. Find the mask", at=(360, 0), size=(370, 560))
    found = flow.node(
        "InstDiffEditSampler", at=(380, 75), size=(330, 460), model=model[0], clip=model[1], edit_text=TEXT,
        negative=empty[0], latent_image=latent[0], seed=SEED, steps=STEPS, threshold=0.3,
    )  # fmt: skip
    steps = flow.node("MaskToImage", at=(380, 640), size=(330, 30), mask=found[2])
    flow.group("Masks of all steps", at=(360, 580), size=(370, 440))
    flow.node("PreviewImage", at=(380, 720), size=(330, 280), title="masks of all steps", images=steps[0])

    sampling: Json = {"seed": SEED, "steps": STEPS, "cfg": 7.5, "sampler_name": "euler", "scheduler": "ddim_uniform"}
    flow.group("3. Inpaint: noise mask", at=(770, 0), size=(330, 510))
    masked = flow.node("SetLatentNoiseMask", at=(790, 75), size=(290, 50), samples=latent[0], mask=found[0])
    edited = flow.node(
        "KSampler", at=(790, 180), size=(290, 290), title="noise mask", model=model[0], positive=prompt[0],
        negative=empty[0], latent_image=masked[0], denoise=1.0, **sampling,
    )  # fmt: skip
    flow.group("3. Inpaint: inpaint conditioning", at=(770, 530), size=(330, 600))
    told = flow.node(
        "InpaintModelConditioning", at=(790, 605), size=(290, 140), positive=prompt[0], negative=empty[0],
        vae=model[2], pixels=photo[0], mask=found[0], noise_mask=True,
    )  # fmt: skip
    filled = flow.node(
        "KSampler", at=(790, 810), size=(290, 290), title="inpaint conditioning", model=model[0], positive=told[0],
        negative=told[1], latent_image=told[2], denoise=1.0, **sampling,
    )  # fmt: skip

    flow.group("4. Look", at=(1140, 0), size=(620, 970))
    save_picture(flow, photo, "photo", (1160, 180), 280)
    shown = flow.node("MaskToImage", at=(1460, 75), size=(280, 30), mask=found[0])
    save_picture(flow, shown, "mask", (1460, 180), 280)
    for latent_of, title, x in ((edited, "edited", 1160), (filled, "edited by inpaint conditioning", 1460)):
        decoded = flow.node("VAEDecode", at=(x, 600), size=(280, 50), samples=latent_of[0], vae=model[2])
        save_picture(flow, decoded, title, (x, 700), 280, 240)
    return flow
