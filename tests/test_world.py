"""parts-world: what is drawn, what the masks say, and what an edit changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from scalpel.partsworld import dataset, scene
from scalpel.partsworld.render import render
from scalpel.partsworld.scene import BACKGROUNDS, COLOURS, PARTS, like_objects, sample_scene

KINDS = list(PARTS)
PARTS_OF_KINDS = [(kind, part) for kind in KINDS for part in PARTS[kind]]
SEEDS = range(4)
DARKEST_RIM = 0.58  # of a part's colour


def mixed_scenes(kind=None, things=1):
    return [sample_scene(seed, kind, things=things, mixed=True) for seed in SEEDS]


def another_colour(name):
    return next(colour for colour in COLOURS if colour != name)


# ---- pictures and masks


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_seen(kind):
    for drawn in map(render, mixed_scenes(kind)):
        assert all(mask.max() == 1 and mask.mean() > 0.002 for mask in drawn.masks[0].values())
        assert set(drawn.masks[0]) == set(PARTS[kind])


@pytest.mark.parametrize("things", [1, 2, 3])
def test_masks_are_shares_of_a_pixel(things):
    for drawn in map(render, mixed_scenes(things=things)):
        masks = np.stack([mask for one in drawn.masks for mask in one.values()])
        assert masks.min() >= 0
        assert masks.sum(0).max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_mask_is_full_the_picture_has_the_parts_colour_up_to_its_rims_shade(kind):
    for wanted in mixed_scenes(kind):
        drawn = render(wanted)
        for part, name in wanted.things[0].colours:
            colour = np.array(COLOURS[name])
            inside = drawn.image[drawn.masks[0][part] == 1]
            assert (inside <= colour + 1e-5).all()
            assert (inside >= DARKEST_RIM * colour - 1e-5).all()
            assert np.isclose(inside, colour, atol=1e-5).all(1).mean() > 0.2


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_outside_all_objects_the_picture_is_the_background(background):
    full = sample_scene(1, "chair", background=background)
    drawn, empty = render(full), render(full.without())
    outside = drawn.object_mask() == 0
    assert 0.2 < outside.mean() < 0.9
    assert np.array_equal(drawn.image[outside], empty.image[outside])
    assert not empty.masks


def test_backgrounds_look_different():
    pictures = [render(sample_scene(1, background=name).without()).image.mean((0, 1)) for name in BACKGROUNDS]
    distances = [np.abs(a - b).max() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 0.03


@pytest.mark.parametrize("size", [64, 256, 512, 768])
def test_any_multiple_of_eight_shows_the_same_scene(size):
    wanted = sample_scene(3, "figure", mixed=True)
    drawn = render(wanted, size)
    assert drawn.image.shape == (size, size, 3)
    assert drawn.image.dtype == np.float32
    assert drawn.image.min() >= 0
    assert drawn.image.max() <= 1
    for part, mask in drawn.masks[0].items():
        assert mask.mean() == pytest.approx(render(wanted, 256).masks[0][part].mean(), rel=0.05)


def test_a_scene_is_drawn_the_same_every_time():
    for seed in SEEDS:
        one, other = sample_scene(seed, things=2, mixed=True), sample_scene(seed, things=2, mixed=True)
        assert one == other
        assert np.array_equal(render(one).image, render(other).image)


def test_seeds_differ_in_kind_colour_place_size_and_pose():
    scenes = [sample_scene(seed) for seed in range(200)]
    things = [one.things[0] for one in scenes]
    assert {thing.kind for thing in things} == set(PARTS)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {one.background for one in scenes} == set(BACKGROUNDS)
    assert np.std([thing.x for thing in things]) > 0.03
    assert np.std([thing.size for thing in things]) > 0.03
    assert np.std([thing.pose for thing in things], axis=0).min() > 0.4
    assert {thing.flip for thing in things} == {True, False}


@pytest.mark.parametrize("things", [2, 3])
def test_objects_beside_each_other_are_all_seen(things):
    for drawn in map(render, mixed_scenes(things=things)):
        assert all(drawn.object_mask(index).mean() > 0.01 for index in range(things))


# ---- edits


@pytest.mark.parametrize(("kind", "part"), PARTS_OF_KINDS)
def test_recolouring_changes_all_of_the_parts_mask_and_nothing_else(kind, part):
    for wanted in mixed_scenes(kind):
        new = another_colour(dict(wanted.things[0].colours)[part])
        before, after = render(wanted), render(wanted.recolour(part, new))
        changed = (before.image != after.image).any(2)
        mask = before.masks[0][part]
        assert not changed[mask == 0].any()
        assert changed[mask > 0.5].all()
        assert all(np.array_equal(before.masks[0][name], after.masks[0][name]) for name in PARTS[kind])


def test_recolouring_the_second_object_leaves_the_first_alone():
    wanted = sample_scene(5, "dog", things=2)
    before, after = render(wanted), render(wanted.recolour(PARTS[wanted.things[1].kind][0], "purple", index=1))
    assert np.array_equal(before.image[before.masks[0]["torso"] == 1], after.image[after.masks[0]["torso"] == 1])
    assert not np.array_equal(before.image, after.image)


@pytest.mark.parametrize(("kind", "part"), PARTS_OF_KINDS)
def test_a_recoloured_part_recoloured_back_is_as_it_was(kind, part):
    wanted = sample_scene(2, kind, mixed=True)
    old = dict(wanted.things[0].colours)[part]
    assert wanted.recolour(part, another_colour(old)).recolour(part, old) == wanted


def centre(mask):
    rows, columns = np.indices(mask.shape) + 0.5
    return np.array([(mask * columns).sum(), (mask * rows).sum()]) / mask.sum() / len(mask)


def test_moving_an_object_moves_all_its_parts_by_as_much():
    wanted = sample_scene(1, "figure")
    before, after = render(wanted), render(wanted.move(0.03, -0.02))
    for part in PARTS["figure"]:
        shift = centre(after.masks[0][part]) - centre(before.masks[0][part])
        assert shift == pytest.approx([0.03, -0.02], abs=2e-3)


def test_moving_a_part_leaves_the_others_where_they_are():
    wanted = sample_scene(1, "dog")
    before, after = render(wanted), render(wanted.move(-0.06, 0, "tail" if wanted.things[0].flip else "head"))
    moved = "tail" if wanted.things[0].flip else "head"
    assert centre(after.masks[0][moved])[0] < centre(before.masks[0][moved])[0] - 0.03
    for part in set(PARTS["dog"]) - {moved}:
        shown = (before.masks[0][part] == 1) & (after.masks[0][part] == 1)
        assert shown.any()
        assert np.array_equal(before.image[shown], after.image[shown])
    assert wanted.move(0.01, 0, moved).move(0.02, 0, moved).things[0].shifts == ((moved, (0.03, 0.0)),)


def test_removing_one_of_two_objects_shows_what_was_behind_it():
    wanted = sample_scene(4, things=2)
    before, after = render(wanted), render(wanted.without(1))
    alone, nothing = render(wanted.without(0)), render(wanted.without().without())
    footprint = (alone.image != nothing.image).any(2)
    assert wanted.without(1).things == wanted.things[:1]
    assert np.array_equal(before.image[~footprint], after.image[~footprint])
    assert (before.image != after.image).any(2)[before.object_mask(1) == 1].all()


# ---- captions


def test_caption_says_colour_kind_and_background():
    assert sample_scene(0, "figure", background="field", colour="red").caption() == "a red figure on a green field"
    assert sample_scene(0, "car", background="room", colour="orange").caption() == "an orange car in a brown room"
    assert sample_scene(0, "dog", colour="blue").caption(background=False) == "a blue dog"
    assert sample_scene(0, "chair", background="snow").caption(colour=False) == "a chair on white snow"


def test_caption_names_parts_of_other_colours_only_as_many_as_asked():
    plain = sample_scene(0, "figure", background="beach", colour="red")
    assert plain.caption(parts=3) == "a red figure on a sandy beach"
    dressed = plain.recolour("head", "blue").recolour("legs", "orange")
    assert dressed.caption(parts=1) == "a red figure with a blue head on a sandy beach"
    assert dressed.caption(parts=3) == "a red figure with a blue head and orange legs on a sandy beach"
    assert dressed.caption() == plain.caption()


def test_caption_is_silent_about_black_wheels():
    car = sample_scene(0, "car", background="street", colour="red")
    assert car.caption(parts=3) == "a red car on a grey street"
    assert car.recolour("wheels", "white").caption(parts=3) == "a red car with white wheels on a grey street"


def test_caption_joins_several_objects_and_says_when_there_is_none():
    two = sample_scene(3, "dog", things=2, background="field", colour="white")
    assert two.caption().startswith("a white dog and a")
    assert two.without().without().caption() == "nothing on a green field"


def test_training_captions_fit_their_scene():
    for seed in range(50):
        drawn, captions = dataset.training_scene(seed)
        assert len(captions) == dataset.CAPTIONS_PER_SCENE
        assert all(thing.kind in caption for thing in drawn.things for caption in captions)
        assert any(thing.colour in caption for thing in drawn.things for caption in captions)


# ---- several objects of one kind


def test_the_scenes_of_a_seed_are_those_that_everything_was_trained_and_measured_on():
    scenes = [sample_scene(seed, things=1 + seed % 3, mixed=seed % 2 == 1) for seed in range(30)]
    digest = hashlib.sha256(repr(scenes).encode()).hexdigest()
    assert digest == "0c63814344d0f4c519d20f936f70183f9f4a00c81b552f40cfe9f0115f0bcc14"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_like_objects_share_kind_and_colour_and_nothing_else(count):
    for seed in SEEDS:
        alike = like_objects(seed, count)
        assert alike == like_objects(seed, count)
        assert len(alike.things) == len({(thing.x, thing.pose) for thing in alike.things}) == count
        assert len({(thing.kind, thing.colours) for thing in alike.things}) == 1
        assert [thing.x for thing in alike.things] == sorted(thing.x for thing in alike.things)
    assert like_objects(0, count) != like_objects(1, count)


def test_like_objects_are_what_was_asked_for():
    alike = like_objects(5, 3, "dog", "green", "snow")
    assert alike.caption() == "a green dog and a green dog and a green dog on white snow"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", ["red", "black"])
def test_a_repainted_object_differs_where_its_coloured_parts_are_seen_and_nowhere_else(kind, colour):
    alike = like_objects(2, 2, kind, colour)
    before, after = render(alike), render(alike.repaint("blue", 1))
    changed = np.abs(before.image - after.image).max(-1) > 0
    own = [before.masks[1][part] for part in alike.things[1].coloured_parts]
    assert np.array_equal(changed, np.sum(own, axis=0) > 0)
    assert alike.repaint("blue", 1).things[1].colour == "blue"


def test_a_car_keeps_its_wheels_when_it_is_repainted():
    for colour in ("red", "black"):
        assert dict(like_objects(0, 2, "car", colour).repaint("blue").things[0].colours)["wheels"] == "black"
    white = sample_scene(0, "car", colour="white").recolour("wheels", "white")
    assert dict(white.repaint("blue").things[0].colours)["wheels"] == "blue"


# ---- bad input


@pytest.mark.parametrize("size", [0, -256, 250, 257])
def test_a_size_that_is_no_multiple_of_eight_is_refused(size):
    with pytest.raises(ValueError, match="multiple of 8"):
        render(sample_scene(0), size)


def test_an_unknown_part_or_colour_is_refused_with_the_known_ones():
    figure = sample_scene(0, "figure")
    with pytest.raises(ValueError, match="unknown part of a figure: 'hood'; known: head, hair, torso, legs"):
        figure.recolour("hood", "blue")
    with pytest.raises(ValueError, match="unknown colour: 'pink'; known: red, orange"):
        figure.recolour("head", "pink")
    with pytest.raises(ValueError, match="unknown part of a figure"):
        figure.move(0.1, 0, "tail")


def test_an_unknown_kind_background_or_number_of_objects_is_refused():
    with pytest.raises(ValueError, match="unknown kind of object: 'cat'; known: figure, car, chair, dog"):
        sample_scene(0, "cat")
    with pytest.raises(ValueError, match="unknown background: 'moon'"):
        sample_scene(0, background="moon")
    with pytest.raises(ValueError, match="unknown colour: 'pink'"):
        sample_scene(0, colour="pink")
    with pytest.raises(ValueError, match="things"):
        sample_scene(0, things=4)


def test_a_scene_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        sample_scene(0).things[0].x = 0.1
    assert isinstance(scene.sample_scene(0).things, tuple)
