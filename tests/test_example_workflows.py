"""The example workflows, for the page and for the API, and the help pages: what a user opens first must work."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import grey_dilation

from scalpel.devtools import make_workflows
from scalpel.devtools.server import CHECKOUT, ComfyError
from scalpel.partsworld.judge import Judge, nearest_colour

WORKFLOWS = CHECKOUT / "example_workflows"
API_FILE = {
    "Edit one part": "edit_one_part",
    "Find a part (heat map)": "find_a_part",
    "Train a part token": "train_a_token",
    "Edit with your token": "edit_with_your_token",
    "Two parts at once": "two_parts",
    "Word or token (heat maps)": "word_or_token",
    "Edit a photo's part": "edit_a_photo",
    "Compare four inversions": "compare_inversions",
    "One photo, four edits at once": "four_edits",
    "Replace an object": "replace_object",
    "Keep an object": "keep_object",
    "Change the background": "change_background",
    "Remove an object": "remove_object",
    "Several prompts, several regions": "region_prompts",
    "Recolour one of three": "recolour_one",
    "Push two words at once": "push_two_words",
    "Attenuate with negative words": "negative_words",
    "Change a texture (SDXL)": "change_a_texture_sdxl",
    "Edit without a mask": "edit_without_a_mask",
    "Edit one part (SDXL)": "edit_one_part_sdxl",
    "Find a part (SDXL)": "find_a_part_sdxl",
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TEXT_ONLY = {"MarkdownNote", "Note"}
FEWER_STEPS = 5  # ddim_uniform makes one step more of a number that does not divide 1000


def page_workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name):
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def with_fewer_steps(prompt):
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = FEWER_STEPS
    return prompt


def pictures(server, prompt, history):
    """The first picture of every SaveImage node, by the node's title, as [height, width, 3] from 0 to 1."""
    return {title: several[0] for title, several in all_pictures(server, prompt, history).items()}


def all_pictures(server, prompt, history):
    """All pictures of every SaveImage node, by the node's title, as [height, width, 3] from 0 to 1."""
    found = {}
    for node, output in history["outputs"].items():
        if not output.get("images"):
            continue
        files = [Image.open(io.BytesIO(server.fetch(image))).convert("RGB") for image in output["images"]]
        found[prompt[node]["_meta"]["title"]] = [np.asarray(file) / 255.0 for file in files]
    return found


# ---- the files


@pytest.fixture(scope="session")
def info(server):
    return server.object_info()


def test_every_template_has_an_api_file_and_a_picture():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == set(API_FILE)
    assert {path.stem for path in WORKFLOWS.glob("*.jpg")} == set(API_FILE)
    assert {path.stem for path in (WORKFLOWS / "api").glob("*.json")} == set(API_FILE.values())


def test_the_files_are_what_make_workflows_writes(info):
    for path, content in make_workflows.files(info).items():
        assert path.read_text(encoding="utf-8") == make_workflows.dumps(content), f"{path.name}: run make_workflows"


@pytest.mark.parametrize("name", API_FILE)
@pytest.mark.parametrize("which", ["server", "old_server"])
def test_the_page_sends_what_the_api_file_holds(name, which, request):
    info = request.getfixturevalue(which).object_info()
    assert as_the_page_sends_it(page_workflow(name), info) == {
        node: {"class_type": content["class_type"], "inputs": content["inputs"]}
        for node, content in api_workflow(API_FILE[name]).items()
    }


def as_the_page_sends_it(workflow, info):
    """A saved workflow as POST /prompt gets it: widgets by position, each seed followed by its control."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in TEXT_ONLY:
            continue
        values = iter(node["widgets_values"])
        inputs = {}
        for group in ("required", "optional"):
            for name, (kind, *settings) in info[node["type"]]["input"].get(group, {}).items():
                if isinstance(kind, list) or kind in WIDGETS:
                    inputs[name] = next(values)
                    if settings and settings[0].get("control_after_generate"):
                        assert next(values) in ("fixed", "randomize", "increment", "decrement")
        assert next(values, None) is None, f"{node['type']} has more values than widgets"
        inputs |= {socket["name"]: sources[socket["link"]] for socket in node["inputs"] if socket["link"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", API_FILE)
def test_the_links_of_a_saved_workflow_agree_with_its_sockets(name):
    workflow = page_workflow(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, socket, kind in workflow["links"]:
        assert nodes[target]["inputs"][socket]["link"] == number
        assert nodes[target]["inputs"][socket]["type"] == kind
        assert nodes[source]["outputs"][output]["type"] == kind
        assert number in nodes[source]["outputs"][output]["links"]


@pytest.mark.parametrize("name", API_FILE)
def test_no_node_covers_another(name):
    nodes = page_workflow(name)["nodes"]
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in nodes}
    for a, (x, y, w, h) in boxes.items():
        for b, (u, v, p, q) in boxes.items():
            title = 30
            apart = x + w <= u or u + p <= x or y + h <= v - title or v + q <= y - title
            assert a == b or apart, f"nodes {a} and {b}"


@pytest.mark.parametrize("name", API_FILE)
def test_every_template_says_what_to_do(name):
    notes = [node["widgets_values"][0] for node in page_workflow(name)["nodes"] if node["type"] in TEXT_ONLY]
    assert len(notes) == 1
    assert "Press **Run**" in notes[0]
    assert ("validated by a ComfyUI server, not run" in notes[0]) == ("SDXL" in name)


# ---- on real servers


def test_the_template_browser_lists_and_gets_them(server):
    listed = json.loads(server._request("/workflow_templates"))
    assert set(listed["scalpel"]) == set(API_FILE)
    for name in API_FILE:
        address = f"/api/workflow_templates/scalpel/{urllib.parse.quote(name)}"
        assert json.loads(server._request(f"{address}.json")) == page_workflow(name)
        assert Image.open(io.BytesIO(server._request(f"{address}.jpg"))).format == "JPEG"


@pytest.mark.parametrize(
    ("name", "more"),
    [("edit_one_part", set()), ("edit_with_your_token", set()), ("two_parts", {"heat maps"}), ("edit_a_photo", set())],
)
def test_an_edit_runs_untouched_and_changes_where_the_mask_is(server, name, more):
    prompt = api_workflow(name)
    found = pictures(server, prompt, server.run(prompt))
    assert set(found) == {"source", "edited", "mask"} | more
    assert {picture.shape for picture in found.values()} == {(256, 256, 3)}
    changed_inside(found["edited"], found["source"], found["mask"])


def changed_inside(edited, source, mask):
    """The change is concentrated where the mask is."""
    change = np.abs(edited - source).mean(2)
    inside, outside = mask.mean(2) >= 0.5, mask.mean(2) < 0.1
    assert 0.01 < inside.mean() < 0.5
    assert change[inside].mean() > 5 * change[outside].mean()


def test_the_edited_photo_is_the_file(server):
    prompt = api_workflow("edit_a_photo")
    found = pictures(server, prompt, server.run(with_fewer_steps(prompt)))
    assert decibels(found["source"], photo()) > 25  # the VAE's loss


def test_four_edits_of_a_photo_run_untouched_and_change_where_the_mask_is(server):
    prompt = api_workflow("four_edits")
    found = all_pictures(server, prompt, server.run(prompt))
    assert {title: len(several) for title, several in found.items()} == {"source": 1, "edited": 4, "mask": 1}
    (source,), (mask,) = found["source"], found["mask"]
    for edited in found["edited"]:
        changed_inside(edited, source, mask)
    colours = [np.median(edited[mask.mean(2) >= 0.9], axis=0) for edited in found["edited"]]
    for colour, (red, green, blue) in zip(("blue", "white", "purple", "black"), colours, strict=True):
        seen = {
            "blue": blue > red + 0.3,
            "white": min(red, green, blue) > 0.7,
            "purple": min(red, blue) > green + 0.1,
        }
        assert seen.get(colour, max(red, green, blue) < 0.3), (colour, red, green, blue)


def test_compare_inversions_runs_untouched_and_comes_back_to_the_photo(server):
    prompt = api_workflow("compare_inversions")
    (grid,) = pictures(server, prompt, server.run(prompt)).values()
    margin, width = (grid.shape[0] - 256) // 2, 256 + 8
    cells = [grid[margin : margin + 256, i * width : i * width + 256] for i in range(5)]
    found = dict(zip(("photo", *INVERSIONS), cells, strict=True))
    assert decibels(found["photo"], photo()) > 25  # the VAE's loss
    for method, bound in INVERSIONS.items():
        assert decibels(found[method], found["photo"]) > bound, method


INVERSIONS = {"DDIM": 26, "null-text": 23, "edit-friendly": 45, "LEDITS++": 45}
"""By how many decibels at least what each inversion of ten steps comes back to is the photo."""


def photo():
    """The picture that comes with the pack, as [height, width, 3] from 0 to 1."""
    path = CHECKOUT / "partsworld" / "pictures" / "partsworld_photo" / "figure_01.png"
    return np.asarray(Image.open(path).convert("RGB")) / 255.0


def decibels(a, b):
    """PSNR, without infinity."""
    return -10 * np.log10(max(((a - b) ** 2).mean(), 1e-10))


def dog():
    return np.asarray(Image.open(CHECKOUT / "partsworld/pictures/partsworld_dog/dog_01.png").convert("RGB")) / 255.0


CPAM = {
    "replace_object": ("car", "beach", {"body": "red", "hood": "red"}),
    "keep_object": ("dog", "beach", {"head": "blue", "torso": "yellow", "legs": "purple", "tail": "yellow"}),
    "change_background": ("dog", "field", {"head": "blue", "torso": "yellow", "legs": "purple", "tail": "yellow"}),
    "remove_object": (None, "beach", {}),
}


@pytest.mark.parametrize("name", CPAM)
def test_a_template_of_cpam_runs_untouched_and_does_what_it_says(server, name):
    prompt = api_workflow(name)
    found = pictures(server, prompt, server.run(prompt))
    kind, background, colours = CPAM[name]
    seen = Judge()(found["edited"])
    assert (seen.kind, seen.background) == (kind, background)
    assert {part: seen.colours[part] for part in colours} == colours
    if name == "keep_object":
        before = Judge()(dog())
        old, new = (verdict.masks["head"].nonzero()[1].mean() for verdict in (before, seen))
        assert old > 128 > new  # it has turned round
    if background == "beach":  # the upper corners are far from the dog
        assert decibels(found["edited"][:24], dog()[:24]) > 25


def test_region_prompts_run_untouched_and_the_colours_are_where_they_belong(server):
    prompt = api_workflow("region_prompts")
    found = pictures(server, prompt, server.run(prompt))
    red, blue = (lambda p: p[..., 0] - p[..., 2] > 0.4, lambda p: p[..., 2] - p[..., 0] > 0.4)
    left, right = found["regions"][:, :128], found["regions"][:, 128:]
    assert red(left).mean() > 10 * blue(left).mean()
    assert blue(right).mean() > 10 * red(right).mean()
    assert red(left).mean() > 0.05 < blue(right).mean()


MAG = {
    "recolour_one": {"partsworld_three": "green"},
    "push_two_words": {"partsworld_three_left": "blue", "partsworld_three": "green"},
    "negative_words": {"partsworld_three_purple": "yellow"},
}
"""The masks that are pushed in, and the colours that shall come there."""


@pytest.mark.parametrize("name", MAG)
def test_a_template_of_mag_edit_runs_untouched_and_recolours_what_is_masked(server, name):
    prompt = api_workflow(name)
    found = pictures(server, prompt, server.run(prompt))
    elsewhere = np.ones((256, 256), bool)
    for folder, colour in MAG[name].items():
        path = CHECKOUT / "partsworld" / "pictures" / folder
        photo = np.asarray(Image.open(path / "figure_01.png").convert("RGB")) / 255.0
        mask = np.asarray(Image.open(path / "figure_01_mask.png").convert("L")) > 230
        assert nearest_colour(found["edited"][mask]) == colour
        assert nearest_colour(photo[mask]) != colour
        elsewhere &= ~grey_dilation(mask, 17)
    assert decibels(found["edited"][elsewhere], photo[elsewhere]) > 28
    assert found["constraint"].shape == (400, 640, 3)


def test_edit_without_a_mask_runs_untouched_and_finds_the_ground(server):
    prompt = api_workflow("edit_without_a_mask")
    found = pictures(server, prompt, server.run(prompt))
    assert set(found) >= {"mask", "masks of all steps", "edited", "edited by inpaint conditioning"}
    mask = np.asarray(Image.open(CHECKOUT / "partsworld/pictures/partsworld_dog/dog_01_mask.png").convert("L")) < 128
    ground = found["mask"].mean(2) > 0.5
    assert (ground & mask).sum() / (ground | mask).sum() > 0.75
    for title in ("edited", "edited by inpaint conditioning"):
        seen = Judge()(found[title])
        assert (seen.kind, seen.background, seen.colours["torso"]) == ("dog", "field", "yellow")


def test_edit_without_a_mask_tells_an_inpainting_checkpoint_of_the_mask(server_with_tiny_models):
    """As its note says: only this sampler, its prompts and their node get the checkpoint."""
    server, found = server_with_tiny_models, []
    for size in (0.0, 0.1):
        prompt = api_workflow("edit_without_a_mask")
        prompt["checkpoint"] = {"class_type": "DemoForInpainting", "inputs": {"size": size}}
        (sampler,) = (node for node in prompt.values() if node.get("_meta", {}).get("title") == "inpaint conditioning")
        sampler["inputs"]["model"] = ["checkpoint", 0]
        found.append(pictures(server, prompt, server.run(prompt)))
    deaf, told = found
    title = "edited by inpaint conditioning"
    np.testing.assert_allclose(deaf[title], deaf["edited"], atol=1 / 255)
    change, inside = np.abs(told[title] - deaf[title]).mean(2), deaf["mask"].mean(2) > 0.5
    assert change[inside].mean() > 0.05
    assert change[~inside].mean() < change[inside].mean() / 5


def test_find_a_part_runs_untouched(server):
    prompt = api_workflow("find_a_part")
    found = pictures(server, prompt, server.run(prompt))
    assert set(found) == {"picture", "heat map", "mask", "found"}
    assert {picture.shape for picture in found.values()} == {(256, 256, 3)}
    assert 0.0 < (found["mask"].mean(2) > 0.99).mean() < 0.5
    untouched = found["mask"].mean(2) == 0
    assert np.array_equal(found["picture"][untouched], found["found"][untouched])


def test_train_a_token_runs_untouched_and_what_it_saves_can_be_chosen(server):
    prompt = api_workflow("train_a_token")
    found = pictures(server, prompt, server.run(prompt))
    assert set(found) == {"heat maps", "loss curve"}
    assert found["heat maps"].shape == (256, 256, 3)
    saved = server.object_info()["PartTokenLoader"]["input"]["required"]["token"][1]["options"]
    assert "my_part_00001.safetensors" in saved
    edit = with_fewer_steps(api_workflow("edit_with_your_token"))
    loader = next(node for node in edit.values() if node["class_type"] == "PartTokenLoader")
    loader["inputs"]["token"] = "my_part_00001.safetensors"
    found = pictures(server, edit, server.run(edit))
    assert not np.array_equal(found["source"], found["edited"])


def test_word_or_token_runs_untouched(server):
    prompt = api_workflow("word_or_token")
    found = pictures(server, prompt, server.run(prompt))
    assert set(found) == {"picture", "the word", "the token"}
    assert not np.array_equal(found["the word"], found["the token"])


@pytest.mark.parametrize("name", ["replace_object", "keep_object", "region_prompts", "push_two_words"])
def test_templates_of_cpam_and_mag_edit_run_on_the_oldest_comfyui(old_server, name):
    prompt = with_fewer_steps(api_workflow(name))
    assert {"edited", "regions"} & set(pictures(old_server, prompt, old_server.run(prompt)))


def test_edit_one_part_runs_on_the_oldest_comfyui(old_server):
    prompt = with_fewer_steps(api_workflow("edit_one_part"))
    found = pictures(old_server, prompt, old_server.run(prompt))
    assert not np.array_equal(found["source"], found["edited"])


@pytest.mark.parametrize("name", ["edit_one_part_sdxl", "find_a_part_sdxl", "change_a_texture_sdxl"])
@pytest.mark.parametrize("which", ["server", "old_server"])
def test_the_sdxl_workflows_are_valid_where_their_files_are(name, which, request):
    server = request.getfixturevalue(which)
    with pytest.raises(ComfyError, match=r"sd_xl_base_1\.0\.safetensors"):
        server.submit(api_workflow(name))
    placeholders = [
        server.base / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors",
        server.base / "models" / "part_tokens" / "partimage_human_head.pt",
    ]
    try:
        for path in placeholders:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        # Accepted, and then only the empty files stop it.
        with pytest.raises(ComfyError, match=r"^(CheckpointLoaderSimple|PartToken(Loader|Dataset)):"):
            server.wait(server.submit(api_workflow(name)))
    finally:
        for path in placeholders:
            path.unlink(missing_ok=True)


# ---- the client


@pytest.fixture(scope="session")
def client():
    spec = importlib.util.spec_from_file_location("scalpel_example_client", WORKFLOWS / "api" / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_client_saves_the_pictures_and_shows_progress(client, server, tmp_path, capsys):
    prompt = with_fewer_steps(api_workflow("edit_one_part"))
    saved = client.asyncio.run(client.run(server.address, prompt, tmp_path / "results"))
    assert {path.name for path in saved} == {"source_0.png", "edited_0.png", "mask_0.png"}
    assert {Image.open(io.BytesIO(path.read_bytes())).size for path in saved} == {(256, 256)}
    assert f"FeatureBlendSampler: {FEWER_STEPS}/{FEWER_STEPS}" in capsys.readouterr().out


def test_the_client_says_why_a_workflow_was_refused_or_failed(client, server, tmp_path):
    wrong = api_workflow("edit_one_part")
    wrong["3"]["inputs"]["token"] = "missing.safetensors"
    with pytest.raises(RuntimeError, match=r"missing\.safetensors"):
        client.asyncio.run(client.run(server.address, wrong, tmp_path))
    failing = api_workflow("edit_one_part")
    sampler = next(node for node in failing.values() if node["class_type"] == "FeatureBlendSampler")
    sampler["inputs"]["layers"] = "no such layer"
    with pytest.raises(RuntimeError, match=r"FeatureBlendSampler: .*no such layer"):
        client.asyncio.run(client.run(server.address, failing, tmp_path))


# ---- help


@pytest.fixture(scope="session")
def our_nodes(info):
    return {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.scalpel"}


def inputs_of(node):
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def test_every_node_of_the_pack_is_there_on_both_comfyuis(our_nodes, old_server):
    from scalpel.nodes import NODES

    ids = {node.define_schema().node_id for node in NODES}
    assert set(our_nodes) == ids
    assert set(old_server.object_info()) >= ids


def test_every_input_and_output_has_a_tooltip(our_nodes):
    for name, node in our_nodes.items():
        for input_name, spec in inputs_of(node).items():
            assert len(spec) > 1, f"{name}.{input_name}"
            assert spec[1].get("tooltip"), f"{name}.{input_name}"
        assert all(node["output_tooltips"]), name
        assert node["description"], name


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(our_nodes, server):
    for name, node in our_nodes.items():
        page = server._request(f"/extensions/scalpel/docs/{name}.md").decode()
        assert page.startswith(f"# {node['display_name']}\n"), name
        for word in (*inputs_of(node), *node["output_name"]):
            assert f"- **{word}**" in page, f"{name}.{word}"


def test_no_help_page_is_left_of_a_node_that_is_gone(our_nodes):
    assert {path.stem for path in (CHECKOUT / "web" / "docs").glob("*.md")} == set(our_nodes)


# ---- the README


def test_what_the_readme_names_exists():
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", text):
        path = urllib.parse.unquote(target[0] or target[1])
        assert (CHECKOUT / path).exists(), path


def test_the_readme_names_every_node(our_nodes):
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in our_nodes if f"`{name}`" not in text]
    assert Path(WORKFLOWS / "api" / "client.py").name in text
