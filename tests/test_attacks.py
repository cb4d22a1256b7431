"""Contracts that every attack in the registry keeps, and the known answers of patch and blend."""

import dataclasses
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from arena.attacks.blend import Blend
from arena.attacks.patch import Patch, polygon_mask
from arena.core import parts, poisoning
from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.registry import BadInput, attacks, spec_of
from arena.core.seeding import stream
from arena.referee.keeping import StoreKeeper
from arena.store import Store


def images(n=120, classes=10, channels=3, height=32, width=32):
    shape = (n, channels, height, width)
    x = torch.randint(256, shape, generator=stream(0, "images"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % classes)


def black(n=1, channels=3, height=32, width=32):
    return Images(torch.zeros(n, channels, height, width, dtype=torch.uint8), torch.arange(n))


def stamped(attack, train, seed=0):
    """The training images as the attack's trigger leaves them, at 8 bits."""
    trigger = attack.prepare(train, stream(seed, "trigger"))
    return poisoning.stamp(train.x, trigger.stamp)


# -------------------------------------------------------------------------------- every attack


@pytest.fixture(params=attacks.names())
def name(request):
    return request.param


@pytest.fixture
def small(name):
    return attacks.build(name, "smoke")  # what is trained for minutes is trained for moments


def test_an_attack_is_a_frozen_dataclass_as_its_file_lists_it(name):
    listed, cls = attacks.describe(name), attacks.load(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().method_name = "other"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert [field.name for field in listed.fields] == list(fields)
    for field in listed.fields:
        assert field.doc, f"{field.name} says nothing"
        assert field.default == fields[field.name].default
        assert field.type == fields[field.name].type
        for key, value in fields[field.name].metadata.items():
            assert getattr(field, key) == value, (field.name, key)


def test_an_attack_says_what_it_is(name):
    listed, attack = attacks.describe(name), attacks.build(name)
    assert listed.summary
    assert listed.source
    assert listed.powers
    assert {"threat", "scopes", "labels", "trigger_kind"} <= set(listed.traits)
    for trait, value in listed.traits.items():
        assert getattr(attack, trait) == value
    if not getattr(attack, "null", False):
        assert poisoning.scope(attack) in attack.scopes


def test_a_full_spec_builds_the_same_attack(name):
    attack = attacks.build(name)
    assert attacks.build(spec_of(attack)) == attack


def first_batch(data, *args, on_batch, **more):
    on_batch(Images(data.x[:8] / 255, data.y[:8]), stream(0, "batch"))


def test_what_an_attack_trains_fits_into_a_store(small, tmp_path):
    train = images()
    for _ in range(2):  # the second time it is found
        with parts.kept(StoreKeeper(Store(tmp_path))):
            trigger = small.prepare(train, stream(0, "trigger"))
            data, rows = small.poison(train, trigger, stream(0, "poison"))
            if hasattr(small, "mask_updates"):  # it is trained when the first batch comes
                small.train(partial(first_batch, data), Poisoned(data, rows), trigger, stream(0))


def test_poisoning_changes_only_the_rows_it_names(small):
    attack, train = small, images()
    x, y = train.x.clone(), train.y.clone()
    trigger = attack.prepare(train, stream(0, "trigger"))
    data, rows = attack.poison(train, trigger, stream(0, "poison"))
    assert torch.equal(train.x, x), "the training set was written to"
    assert torch.equal(train.y, y), "the training set was written to"
    assert data.x.dtype == torch.uint8
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == len(rows)
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[rows] = False
    left = rest.nonzero().flatten()  # where rows were appended: the whole training set
    assert torch.equal(data.x[left], x[left])
    assert torch.equal(data.y[left], y[left])
    if attack.labels == "kept":
        assert torch.equal(data.y, y)
    elif len(data) == len(train):
        assert torch.equal(data.y[rows], poisoning.wanted(attack, y[rows], 10))
    else:
        assert (data.y[rows] == attack.target).all()
    if not hasattr(attack, "train"):  # others may poison batch by batch instead
        assert (len(rows) == 0) == getattr(attack, "null", False)


def test_the_same_seed_makes_the_same_poisoned_set(small):
    attack, train = small, images()

    def poisoned(seed):
        trigger = attack.prepare(train, stream(seed, "trigger"))
        return attack.poison(train, trigger, stream(seed, "poison"))

    one, two, other = poisoned(1), poisoned(1), poisoned(2)
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.data.x, two.data.x)
    assert torch.equal(one.data.y, two.data.y)
    if len(one.rows):
        same = zip(
            (one.data.x, one.data.y, one.rows),
            (other.data.x, other.data.y, other.rows),
            strict=True,
        )
        assert not all(torch.equal(a, b) for a, b in same)


def test_a_trigger_is_a_pure_map_of_single_images(small):
    attack, train = small, images()
    trigger = attack.prepare(train, stream(0, "trigger"))
    if trigger is None:
        return
    assert isinstance(trigger, Trigger)
    x = train.x[:8].float() / 255
    for image_map in (trigger.stamp, trigger.training_map):
        before = x.clone()
        out = image_map(x)
        assert torch.equal(x, before), "the map wrote to its argument"
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(out, image_map(x)), "the map draws random numbers"
        alone = torch.cat([image_map(image[None]) for image in x])
        assert (alone - out).abs().max() < 1e-5, "an image's trigger depends on its batch"
        assert not torch.equal(out, x), "the trigger changes nothing"


def test_a_trigger_travels_to_another_process(small):
    attack, train = small, images()
    trigger = attack.prepare(train, stream(0, "trigger"))
    if trigger is None:
        return
    x = train.x[:4].float() / 255
    assert torch.equal(pickle.loads(pickle.dumps(trigger)).stamp(x), trigger.stamp(x))


def test_classes_that_do_not_exist_are_refused_before_training(name):
    attack = attacks.build(name)
    attack.check((3, 32, 32), [100] * 10)
    with pytest.raises(BadInput, match="at least two classes"):
        attack.check((3, 32, 32), [100])
    if "target" in {field.name for field in dataclasses.fields(attack)}:
        with pytest.raises(BadInput, match="target 10 is not a class"):
            dataclasses.replace(attack, target=10).check((3, 32, 32), [100] * 10)


# -------------------------------------------------------------------------------------- patch


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", [0, 90, 255])
def test_the_default_is_the_published_grid(channels, background):
    train = black(channels=channels)
    train.x.fill_(background)
    out = stamped(Patch(), train)
    grid = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    assert torch.equal(out[0, :, 29:, 29:], grid.expand(channels, 3, 3))
    out[:, :, 29:, 29:] = background
    assert torch.equal(out, train.x)


def test_a_grid_grows_by_whole_cells():
    out = stamped(Patch(size=6), black())[0, 0, 26:, 26:] // 255
    assert out.tolist() == [
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]


def test_published_squares():
    nad = stamped(Patch(kind="square", margin=1), black())
    assert (nad[0, :, 28:31, 28:31] == 255).all()
    assert nad.sum() == 27 * 255
    spec = "patch:kind=square,size=4,colour=(1,1,0),place=top_left,margin=4"
    yellow = stamped(attacks.build(spec), black())
    assert (yellow[0, :2, 4:8, 4:8] == 255).all()
    assert yellow.sum() == 2 * 16 * 255


def test_a_chequer_alternates_its_colour_and_black():
    train = black()
    train.x.fill_(7)
    out = stamped(Patch(kind="checker", size=4, colour="1,0.6,0", place="top_left"), train)
    steps = torch.arange(4)
    lit = (steps[:, None] + steps) % 2 == 0
    for channel, level in enumerate((255, 153, 0)):
        assert torch.equal(out[0, channel, :4, :4], lit * torch.tensor(level, dtype=torch.uint8))
    out[:, :, :4, :4] = 7
    assert torch.equal(out, train.x)


def test_opacity_mixes_patch_and_image():
    train = black()
    train.x.fill_(100)
    out = stamped(Patch(kind="square", alpha=0.25), train)
    assert (out[0, :, 29:, 29:] == 139).all()  # 0.75 * 100 + 0.25 * 255 = 138.75
    assert (out[0, :, :29] == 100).all()


@pytest.mark.parametrize(
    ("place", "top", "left"),
    [
        ("bottom_right", 11, 18),
        ("bottom_left", 11, 2),
        ("top_right", 2, 18),
        ("top_left", 2, 2),
        ("center", 6, 10),
    ],
)
def test_fixed_places(place, top, left):
    train = black(channels=1, height=18, width=25)
    out = stamped(Patch(kind="square", size=5, place=place, margin=2), train)
    expected = torch.zeros_like(train.x)
    expected[:, :, top : top + 5, left : left + 5] = 255
    assert torch.equal(out, expected)


def corner(image):
    """The (top, left, bottom, right) of what is lit in (C, H, W)."""
    rows, columns = image.amax(0).nonzero().T
    return rows.min(), columns.min(), rows.max(), columns.max()


@given(
    height=st.integers(6, 16),
    width=st.integers(6, 16),
    size=st.integers(1, 4),
    margin=st.integers(0, 1),
    place=st.sampled_from(["random", "per_image"]),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=40)
def test_a_random_place_stays_inside_the_margins(height, width, size, margin, place, channels):
    train = images(12, 2, channels, height, width)
    train = Images(train.x // 2, train.y)  # no white pixel but the patch's
    attack = Patch(kind="square", size=size, margin=margin, place=place)
    attack.check((channels, height, width), [100] * 2)
    out = stamped(attack, train)
    for image, clean in zip(out, train.x, strict=True):
        lit = (image == 255).all(0)
        assert int(lit.sum()) == size * size
        top, left, bottom, right = corner(lit[None])
        assert (bottom - top + 1, right - left + 1) == (size, size)
        assert margin <= top <= bottom < height - margin
        assert margin <= left <= right < width - margin
        assert torch.equal(image[:, ~lit], clean[:, ~lit])


def test_one_random_place_per_victim():
    train = black(3)
    attack = Patch(kind="square", place="random")
    places = set()
    for seed in range(12):
        out = stamped(attack, train, seed)
        assert (out == out[:1]).all(), "the images of one victim differ"
        places.add(tuple(map(int, corner(out[0]))))
    tops, lefts = {place[0] for place in places}, {place[1] for place in places}
    assert min(len(tops), len(lefts)) > 6


def test_a_place_per_image_is_decided_by_its_pixels():
    train = images(400)
    trigger = Patch(place="per_image").prepare(train, stream(0, "trigger"))
    x = train.x.float() / 255
    top, left = trigger.stamp.places(x)
    order = torch.randperm(400, generator=stream(0, "order"))
    assert torch.equal(trigger.stamp.places(x[order])[0], top[order])
    assert torch.equal(trigger.stamp(x)[order], trigger.stamp(x[order]))
    assert set(top.tolist()) == set(left.tolist()) == set(range(30))
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) > 280  # 400 of 900: about 323
    near = x[:50].clone()
    near[:, 0, 0, 0] = (near[:, 0, 0, 0] + 1 / 255) % 1.001
    assert (trigger.stamp.places(near)[0] != top[:50]).float().mean() > 0.8
    other = Patch(place="per_image").prepare(train, stream(1, "trigger"))
    assert not torch.equal(other.stamp.places(x)[0], top)


@given(
    size=st.integers(3, 40),
    sides=st.integers(3, 12),
    seed=st.integers(0, 10**6),
    antialias=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_a_polygon_is_convex_and_not_empty(size, sides, seed, antialias):
    mask = polygon_mask(size, sides, antialias, stream(seed, "polygon"))
    assert mask.shape == (size, size)
    assert 0 <= mask.min() <= mask.max() <= 1
    if antialias:
        return
    assert mask.sum() > 0
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    inside = mask.nonzero().double()
    assert ((inside + 0.5 - size / 2).norm(dim=1) <= size / 2 + 1e-9).all()  # within its circle
    # convex: every row, column and chord between two lit pixels holds no dark pixel
    for line in (*mask, *mask.T):
        lit = line.nonzero().flatten()
        assert len(lit) == 0 or len(lit) == lit[-1] - lit[0] + 1
    pairs = torch.randint(len(inside), (2, 200), generator=stream(seed, "pairs"))
    ends = inside[pairs].long()
    middles = ends.sum(0)
    whole = (middles % 2 == 0).all(1)  # the midpoint is a pixel centre
    row, column = (middles[whole] // 2).T
    assert mask[row, column].bool().all()


@pytest.mark.parametrize("sides", [3, 5, 12])
def test_a_polygon_has_the_corners_asked_for_and_fills_its_circle(sides):
    mask = polygon_mask(400, sides, False, stream(3, "polygon"))
    lit = mask.nonzero() + 0.5 - 200
    tips = lit[lit.norm(dim=1) > 198]  # only its corners reach the circle
    angles = torch.atan2(tips[:, 0], tips[:, 1]).sort().values
    gaps = torch.cat([angles, angles[:1] + 2 * torch.pi]).diff()
    assert int((gaps > 0.1).sum()) == sides
    regular = sides / 2 * math.sin(2 * math.pi / sides) * 200**2
    assert 0.7 * regular < mask.sum() <= 1.01 * regular


def test_the_number_of_corners_is_drawn_from_3_to_12(monkeypatch):
    drawn = []

    def record(size, sides, antialias, rng):
        drawn.append(sides)
        return polygon_mask(size, sides, antialias, rng)

    monkeypatch.setattr("arena.attacks.patch.polygon_mask", record)
    for seed in range(60):
        Patch(kind="polygon").prepare(black(), stream(seed, "trigger"))
    assert set(drawn) == set(range(3, 13))


def test_a_polygon_patch_is_one_solid_colour_inside_the_image():
    train = black()
    train.x.fill_(128)
    colours, shapes = set(), set()
    for seed in range(6):
        out = stamped(Patch(kind="polygon", size=9), train, seed)
        changed = (out != 128).any(1)[0]
        assert not changed[:23].any()
        assert not changed[:, :23].any()
        assert len(out[0][:, changed].unique(dim=1).T) == 1
        colours.add(tuple(out[0][:, changed][:, 0].tolist()))
        shapes.add(bytes(changed.byte().flatten().tolist()))
    assert len(colours) == 6
    assert len(shapes) == 6


def save(path, pixels, mode):
    picture = Image.new(mode, (len(pixels[0]), len(pixels)))
    picture.putdata([pixel for row in pixels for pixel in row])
    picture.save(path)
    return str(path)


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (40, 80, 120)


def test_a_picture_with_a_mask(tmp_path):
    picture = save(tmp_path / "p.png", [[RED, GREEN, GREY], [BLUE, GREY, RED]], "RGB")
    mask = save(tmp_path / "m.png", [[255, 0, 255], [0, 102, 255]], "L")
    train = black()
    train.x.fill_(200)
    out = stamped(Patch(kind="image", image=picture, mask=mask), train)[0, :, 30:, 29:]
    assert out.permute(1, 2, 0).tolist() == [
        [[255, 0, 0], [200, 200, 200], [40, 80, 120]],
        [[200, 200, 200], [136, 152, 168], [255, 0, 0]],  # 0.6 * 200 + 0.4 * grey
    ]


def test_a_picture_brings_its_alpha_channel(tmp_path):
    pixels = [[(*RED, 255), (*GREEN, 0)], [(*BLUE, 0), (*GREY, 255)]]
    picture = save(tmp_path / "p.png", pixels, "RGBA")
    out = stamped(Patch(kind="image", image=picture, place="top_left"), black())[0, :, :2, :2]
    assert out.permute(1, 2, 0).tolist() == [[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [40, 80, 120]]]


def test_a_picture_is_resized_by_its_longer_side_and_made_grey(tmp_path):
    picture = save(tmp_path / "p.png", [[GREY] * 20] * 10, "RGB")
    out = stamped(Patch(kind="image", image=picture, size=6), black(channels=1))
    assert corner(out[0]) == (29, 26, 31, 31)
    assert out[0, 0, 31, 31] == round(0.299 * 40 + 0.587 * 80 + 0.114 * 120)


def test_pictures_that_do_not_do_are_refused(tmp_path):
    picture = save(tmp_path / "p.png", [[RED] * 40] * 2, "RGB")
    mask = save(tmp_path / "m.png", [[255] * 4] * 2, "L")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    deep = save(tmp_path / "deep.png", [[60000]], "I;16")
    for attack, message in (
        (Patch(kind="image", image=picture), "2x40 px does not fit into images of 32x32"),
        (Patch(kind="image", image=picture, mask=mask), "is 2x4 px, its picture .* 2x40 px"),
        (Patch(kind="image", image=str(text)), "text.png' cannot be read as a picture"),
        (Patch(kind="image", image=deep), "more than 8 bits"),
        (Blend(pattern="image", image=str(text)), "cannot be read"),
    ):
        with pytest.raises(BadInput, match=message):
            attack.check((3, 32, 32), [100] * 10)
    with pytest.raises(BadInput, match="1 or 3 channels"):
        Blend(pattern="image", image=picture).check((4, 32, 32), [100] * 10)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("patch:rate=0", "rate must be above 0"),
        ("patch:rate=1.5", "rate must be at most 1"),
        ("patch:size=0", "size must be at least 1"),
        ("patch:size=4", "multiple of 3"),
        ("patch:kind=polygon,size=2", "at least 3"),
        ("patch:kind=polygon,sides=13", "at most 12"),
        ("patch:sides=4", "only for kind=polygon, not kind=grid"),
        ("patch:kind=square,antialias=true", "only for kind=polygon"),
        ("patch:kind=image", "needs image=FILE"),
        ("patch:image=/no/such/file", "no file '/no/such/file'"),
        ("patch:kind=sqare", "did you mean 'square'"),
        ("patch:colour=mauve", "colour must be"),
        ("patch:colour=(1,1)", "colour must be"),
        ("patch:colour=2", "colour must be"),
        ("patch:mode=all_to_all,victim=1", "takes no victim"),
        ("blend:alpha=0", "above 0"),
        ("blend:pattern=image", "needs image=FILE"),
    ],
)
def test_fields_that_make_no_attack_are_refused_when_it_is_built(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("patch:size=33", (3, 32, 32), "33x33 px does not fit into images of 32x32"),
        ("patch:kind=square,size=29,margin=2", (3, 32, 64), "margin of 2 px does not fit"),
        ("patch:kind=square,size=29,margin=2", (3, 64, 32), "margin of 2 px does not fit"),
        ("patch:kind=square,colour=(1,1,0)", (1, 28, 28), "colour has 3 channels"),
        ("patch:victim=12", (3, 32, 32), "victim 12 is not a class"),
        ("blend:victim=0", (3, 32, 32), "both 0"),
    ],
)
def test_attacks_that_do_not_fit_the_data_are_refused_before_training(spec, shape, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check(shape, [100] * 10)


def test_the_largest_patch_fits():
    attack = Patch(kind="square", size=28, margin=2, place="per_image")
    attack.check((3, 32, 32), [100] * 10)
    assert (stamped(attack, black())[0, :, 2:30, 2:30] == 255).all()


def test_modes_of_the_patch_choose_images_and_labels():
    train = images(200)

    def poison(spec):
        attack = attacks.build(spec)
        trigger = attack.prepare(train, stream(0, "trigger"))
        return attack.scope, attack.poison(train, trigger, stream(0, "poison"))

    scope, (data, rows) = poison("patch:rate=0.1")
    assert (scope, len(rows)) == ("universal", 20)
    assert not (train.y[rows] == 0).any()
    scope, (data, rows) = poison("patch:victim=3,target=7,rate=0.4")
    assert (scope, len(rows)) == ("label-specific", 8)  # of the 20 images of class 3
    assert (train.y[rows] == 3).all()
    assert (data.y[rows] == 7).all()
    scope, (data, rows) = poison("patch:mode=all_to_all,rate=0.5")
    assert (scope, len(rows)) == ("all-to-all", 100)
    assert torch.equal(data.y[rows], (train.y[rows] + 1) % 10)
    _, (data, rows) = poison("patch:extend=true")
    assert len(data) == 220


# -------------------------------------------------------------------------------------- blend


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["uniform", "gaussian"])
def test_a_blend_is_exactly_the_weighted_sum(alpha, pattern):
    train = images(6)
    trigger = Blend(alpha=alpha, pattern=pattern).prepare(train, stream(0, "trigger"))
    x, drawn = train.x.float() / 255, trigger.stamp.pattern
    expected = (1 - alpha) * x.double() + alpha * drawn.double()
    assert (trigger.stamp(x).double() - expected).abs().max() < 1.2e-7  # one step of float32 at 1


def test_patterns_follow_their_distributions():
    train = black(height=64, width=64)
    uniform = Blend().prepare(train, stream(0, "trigger")).stamp.pattern
    assert uniform.shape == (3, 64, 64)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    gaussian = Blend(pattern="gaussian").prepare(train, stream(0, "trigger")).stamp.pattern
    assert float(gaussian.median()) == pytest.approx(0.5, abs=0.01)
    middle = gaussian.quantile(torch.tensor([0.1587, 0.8413]))
    assert middle.tolist() == pytest.approx([0.25, 0.75], abs=0.01)
    assert 0.02 < float((gaussian == 0).float().mean()) < 0.03  # beyond two deviations


def test_a_blended_picture_is_stretched_over_the_image(tmp_path):
    picture = save(tmp_path / "p.png", [[GREY] * 7] * 3, "RGB")
    train = black()
    train.x.fill_(100)
    out = stamped(Blend(pattern="image", image=picture, alpha=0.25), train)
    expected = torch.tensor([85, 95, 105], dtype=torch.uint8)  # 75 + a quarter of the grey
    assert torch.equal(out[0], expected[:, None, None].expand(3, 32, 32))


def test_the_rate_of_a_blend_counts_the_images_that_may_be_poisoned():
    train = images(200)
    for spec, count in (("blend", 18), ("blend:victim=4,rate=0.5", 10)):
        attack = attacks.build(spec)
        trigger = attack.prepare(train, stream(0, "trigger"))
        data, rows = attack.poison(train, trigger, stream(0, "poison"))
        assert len(rows) == count
        assert (data.y[rows] == 0).all()
        assert not (train.y[rows] == 0).any()
        assert torch.equal(data.x[rows], poisoning.stamp(train.x[rows], trigger.stamp))
