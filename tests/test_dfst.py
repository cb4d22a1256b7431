"""DFST: the drawn and the user's style, the CycleGAN, neurons and injectors, and the attack."""

from __future__ import annotations

import dataclasses
import io
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toys
from PIL import Image
from torch import nn

from arena.attacks.dfst import DFST, Restyle
from arena.core import cyclegan, injectors, parts, styles
from arena.core.contracts import Images, Trigger
from arena.core.cyclegan import Block, Plan, Restyler, train_cyclegan
from arena.core.injectors import Injector, Neuron
from arena.core.progress import listening
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.training import Recipe, to_float
from arena.core.victims import bound

TINY = Plan(steps=5, width=2, blocks=1, batch=4, lr=1e-3, cycle=1.0, identity=0.1)
ATTACK = DFST(gan_steps=2, gan_width=2, gan_blocks=1, gan_batch=4)


def noise(n=20, channels=3, side=16, seed=0):
    shape = (n, channels, side, side)
    x = torch.randint(256, shape, generator=stream(seed, "images"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % 4)


def shaken(module, seed=0):
    """The module with random weights, so that nothing in it is zero or the identity."""
    draws = stream(seed, "weights")
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draws))
    return module.eval()


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------- the style


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 48)])
def test_drawn_sunrises_are_always_the_same_and_all_different(shape):
    x = styles.sunrise(shape, count=40)
    assert x.dtype == torch.uint8
    assert x.shape == (40, *shape)
    assert torch.equal(x, styles.sunrise(shape, count=40))
    assert len(x.flatten(1).unique(dim=0)) == 40
    assert x.float().std(0).mean() > 30, "the pictures hardly vary"


def test_sunrises_are_warm_bright_above_the_horizon_and_dark_at_the_bottom():
    x = styles.sunrise((3, 32, 32)).float() / 255
    red, green, blue = x.mean((0, 2, 3)).tolist()
    assert red > 1.4 * green > 1.4 * 1.3 * blue
    rows = x.mean((0, 1, 3))
    assert rows[12:20].mean() > 1.3 * rows[:4].mean()
    assert rows[12:20].mean() > 1.3 * rows[-4:].mean()


def test_grey_sunrises_are_the_luminance_of_the_coloured_ones():
    colour, grey = (styles.sunrise((c, 32, 32), count=8).double() for c in (3, 1))
    expected = colour[:, 0] * 0.299 + colour[:, 1] * 0.587 + colour[:, 2] * 0.114
    assert (grey[:, 0] - expected).abs().max() <= 0.51


def png(colour, size=(8, 8), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "PNG")
    return data.getvalue()


def parquet(path, rows):
    """A file with {bytes, path} structs, as on the hub."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": row, "path": None} for row in rows], kind)
    pq.write_table(pa.table({"label": pa.array([0] * len(rows)), "image": column}), path)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_a_folder_of_pictures_is_read_by_name_and_stretched(tmp_path):
    (tmp_path / "b.PNG").write_bytes(png(GREEN, (5, 9)))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.png").write_bytes(png(BLUE))
    parquet(tmp_path / "a.parquet", [png(RED), png((10, 20, 30), (40, 4))])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    x = styles.read_folder(str(tmp_path), (3, 6, 7))
    assert x.dtype == torch.uint8
    assert x.shape == (4, 3, 6, 7)
    colours = [tuple(image[:, 3, 3].tolist()) for image in x]
    assert colours == [RED, (10, 20, 30), GREEN, BLUE]
    grey = styles.read_folder(str(tmp_path), (1, 6, 7))
    assert grey[:, 0, 3, 3].tolist() == [76, 18, 150, 29]  # 0.299, 0.587, 0.114


def test_a_large_folder_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(styles, "MOST", 3)
    parquet(tmp_path / "p.parquet", [png((i, 0, 0)) for i in range(9)])
    assert styles.read_folder(str(tmp_path), (3, 4, 4))[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_folders_without_pictures_are_refused_before_training(tmp_path):
    attack = dataclasses.replace(ATTACK, style=str(tmp_path))

    def refused(message):
        with pytest.raises(BadInput, match=message):
            attack.check((3, 32, 32), [100] * 10)

    refused("dfst: the folder .* holds no pictures; it needs image files")
    (tmp_path / "notes.txt").write_text("no picture")
    refused("holds no pictures")
    parquet(tmp_path / "a.parquet", [])
    refused("holds no pictures")
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "a.parquet")
    refused("a.parquet' has no column of encoded images")
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    refused("a.parquet' cannot be read as a Parquet file")
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.png").write_bytes(png(RED))
    attack.check((3, 32, 32), [100] * 10)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    for data, message in (
        (b"nonsense", "bad.png cannot be read as a picture"),
        (png(60000, mode="I;16"), "bad.png has more than 8 bits"),
    ):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(BadInput, match=message):
            styles.read_folder(str(tmp_path), (3, 8, 8))
    (tmp_path / "bad.png").unlink()
    parquet(tmp_path / "p.parquet", [png(RED), None])
    with pytest.raises(BadInput, match=r"row 1 of .*p\.parquet cannot be read"):
        styles.read_folder(str(tmp_path), (3, 8, 8))


# ----------------------------------------------------------------------------------- the CycleGAN


def test_least_squares_losses():
    scores = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    assert float(cyclegan.fooling_loss(scores)) == pytest.approx((0 + 1 + 0.25 + 1) / 4)
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5])
    assert float(cyclegan.telling_loss(real, fake)) == pytest.approx((0.125 + 0.125) / 2)
    assert float(cyclegan.telling_loss(torch.ones(3), torch.zeros(3))) == 0


class Add(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return x + self.change


def test_what_generators_pay():
    nets = nn.ModuleDict(
        {"a_to_b": Add(0.1), "b_to_a": Add(-0.3), "critic_a": Add(0.0), "critic_b": Add(0.2)}
    )
    a, b = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.6)

    def paid(cycle, identity):
        plan = dataclasses.replace(TINY, cycle=cycle, identity=identity)
        return cyclegan.generators_loss(nets, a, b, plan)

    loss, fake_a, fake_b = paid(0, 0)
    assert float(fake_a.mean()) == pytest.approx(0.3)
    assert float(fake_b.mean()) == pytest.approx(0.6)
    fooling = (0.3 - 1) ** 2 + (0.6 + 0.2 - 1) ** 2
    assert float(loss) == pytest.approx(fooling)
    # there and back 0.5 -> 0.6 -> 0.3 and 0.6 -> 0.3 -> 0.4; kept: 0.5 -> 0.2 and 0.6 -> 0.7
    assert float(paid(1, 0)[0]) == pytest.approx(fooling + 0.2 + 0.2)
    assert float(paid(0, 1)[0]) == pytest.approx(fooling + 0.3 + 0.1)
    assert float(paid(2, 0.5)[0]) == pytest.approx(fooling + 0.8 + 0.2)


@pytest.mark.parametrize("size", [(16, 16), (18, 29)])
def test_a_new_generator_leaves_the_image_as_it_is(size):
    x = torch.rand(3, 1, *size, generator=stream(0, "x"))
    out = Restyler(1, 2, 1)(x)
    assert out.shape == x.shape
    assert (out - x).abs().max() < 0.021


def test_restyling_does_not_depend_on_the_batch():
    x = torch.rand(6, 3, 16, 16, generator=stream(0, "x"))
    x[3:] *= 0.1  # a norm over the batch would mix bright images with dark ones
    generator = shaken(Restyler(3, 4, 2))
    together = generator(x)
    alone = torch.cat([generator(image[None]) for image in x])
    assert (alone - together).abs().max() < 1e-5
    assert (together - x).abs().mean() > 0.03
    assert torch.equal(generator.train()(x), together), "the norm has a mode"


def test_the_norm_is_per_image_and_channel():
    x = torch.rand(4, 3, 8, 8, generator=stream(0, "x"))
    layer = nn.Sequential(*cyclegan._layer(nn.Conv2d(3, 5, 3))[:2])
    out = layer(x)
    assert out.mean((2, 3)).abs().max() < 1e-5
    assert (out.var((2, 3), correction=0) - 1).abs().max() < 0.01


def test_all_residual_blocks_work():
    generator = shaken(Restyler(3, 2, 9))
    x = torch.rand(2, 3, 16, 16, generator=stream(0, "x"))
    out = generator(x)
    blocks = [part for part in generator.modules() if isinstance(part, Block)]
    assert len(blocks) == 9
    for block in blocks:
        shortened = shaken(Restyler(3, 2, 9))
        shortened.load_state_dict(generator.state_dict())
        place = next(n for n, part in generator.named_modules() if part is block)
        shortened.get_submodule(place).forward = lambda x: x
        assert (shortened(x) - out).abs().max() > 1e-4


class Memory:
    """A checkpoint that stops the training after some epochs, and survives it as a file would."""

    def __init__(self, stop_after=math.inf):
        self.kept, self.left = b"", stop_after

    def load(self):
        if not self.kept:
            return None
        return torch.load(io.BytesIO(self.kept), weights_only=True)

    def save(self, state):
        file = io.BytesIO()
        torch.save(state, file)
        self.kept, self.left = file.getvalue(), self.left - 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_stopped_cyclegan_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(cyclegan, "_EPOCH", 2)
    a, b = noise(9, seed=1).x, noise(7, seed=2).x
    whole = train_cyclegan(a, b, TINY, stream(0, "gan")).state_dict()
    memory = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        train_cyclegan(a, b, TINY, stream(0, "gan"), memory)
    seen = []
    with listening(lambda what, done, total, figures: seen.append(done)):
        resumed = train_cyclegan(a, b, TINY, stream(0, "gan"), memory).state_dict()
    assert min(seen) == 5, "it started again"
    assert same(whole, resumed)
    again = train_cyclegan(a, b, TINY, stream(0, "gan"), memory).state_dict()
    assert same(whole, again), "a finished training went on"
    other = train_cyclegan(a, b, TINY, stream(1, "gan")).state_dict()
    assert not same(whole, other)


def test_the_generator_learns_the_colours_of_the_style():
    a, b = noise(40).x // 2, noise(40, seed=1).x // 2
    a[:, 2] += 120  # blue
    b[:, 0] += 120  # red
    plan = Plan(steps=30, width=4, blocks=1, batch=8, lr=1e-2, cycle=1.0, identity=0.1)
    nets = train_cyclegan(a, b, plan, stream(0, "gan"))
    with torch.no_grad():
        restyled, back = nets["a_to_b"](to_float(a)), nets["b_to_a"](to_float(b))
    red, _, blue = restyled.mean((0, 2, 3)).tolist()
    assert red > blue + 0.2, "images of A did not take on the style of B"
    red, _, blue = back.mean((0, 2, 3)).tolist()
    assert blue > red + 0.2


class Keeper:
    """Keeps parts in memory."""

    def __init__(self):
        self.parts, self.labels = {}, []

    def keep(self, key, label, make):
        if key not in self.parts:
            self.labels.append(label)
            self.parts[key] = make(None)
        return self.parts[key]


def test_a_style_is_learned_once_per_data_style_and_settings():
    train, style, keeper = noise(), noise(6, seed=1).x, Keeper()
    with parts.kept(keeper):
        one = cyclegan.style_transfer(train, style, TINY)
        two = cyclegan.style_transfer(train, style.clone(), TINY)
        assert len(keeper.parts) == 1
        cyclegan.style_transfer(train, style.flip(-1), TINY)
        cyclegan.style_transfer(train, style, dataclasses.replace(TINY, cycle=2.0))
        cyclegan.style_transfer(noise(seed=5), style, TINY)
        assert len(keeper.parts) == 4
    assert same(one.state_dict(), two.state_dict())
    assert not one.training
    assert not any(weight.requires_grad for weight in one.parameters())
    assert keeper.labels[0]["name"] == "cyclegan"
    draws = stream(0, "part", "cyclegan")
    nets = train_cyclegan(train.x, style, TINY, draws)  # from A to B, not back
    assert same(one.state_dict(), nets["a_to_b"].state_dict())


# ---------------------------------------------------------------------- neurons and injectors


def test_the_planted_neuron_is_found(planted, clean):
    stamped = (toys.stamp(to_float(clean.x)) * 255).round().to(torch.uint8)
    found = injectors.compromised(planted, clean.x, stamped, share=0.005, most=3)
    assert {neuron.channel for neuron in found} == {toys.CHANNEL}
    assert "deep" in {neuron.level for neuron in found}
    assert not injectors.compromised(planted, clean.x, clean.x, share=0.0, most=3)
    assert not injectors.compromised(planted, clean.x, stamped, share=1e6, most=3)


class Bare(nn.Module):
    """Every level's activations are the image's own channels."""

    def __init__(self):
        super().__init__()
        self.one = nn.Identity()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.levels = dict.fromkeys(("shallow", "middle", "deep"), "one")

    def forward(self, x):
        return self.one(x).mean((2, 3)) + self.anchor


def test_neurons_are_ranked_by_their_rise_and_judged_by_both_rules():
    def picture(*means):
        return torch.tensor(means).view(1, -1, 1, 1).expand(2, -1, 16, 16).to(torch.uint8)

    clean, stamped = picture(10, 100, 20, 0, 30), picture(40, 180, 90, 1, 200)
    # rises 30, 80, 70, 1, 170: the second one does not double, the fourth is under 2 % of 100
    found = injectors.compromised(Bare(), clean, stamped, share=0.02, most=5)
    assert [n.channel for n in found if n.level == "deep"] == [4, 2, 0]
    assert [n.rise for n in found[:3]] == pytest.approx([170 / 255, 70 / 255, 30 / 255], rel=0.02)
    assert [n.level for n in found] == ["shallow"] * 3 + ["middle"] * 3 + ["deep"] * 3
    capped = injectors.compromised(Bare(), clean, stamped, share=0.02, most=1)
    assert [n.channel for n in capped] == [4, 4, 4]


def test_similarity_is_rewarded_not_punished():
    x = torch.rand(3, 3, 16, 16, generator=stream(0, "x"))
    other = torch.rand(3, 3, 16, 16, generator=stream(1, "x"))
    assert injectors.image_similarity(x, x).tolist() == pytest.approx([1, 1, 1])
    assert injectors.image_similarity(x, other).max() < 0.5
    small = injectors.image_similarity(x[..., :8, :8], x[..., :8, :8])
    assert small.tolist() == pytest.approx([1, 1, 1])
    plain, neuron = torch.zeros(2, 3), Neuron("deep", 0, 2.0)

    def paid(alike):
        return float(injectors.injector_loss(plain, plain, neuron, torch.tensor(alike))[0])

    grid = [paid(alike) for alike in (-0.5, 0.0, 0.3, 0.59)]
    assert grid == sorted(grid, reverse=True)
    assert paid(0.9) < paid(0.7)
    assert paid(0.0) - paid(0.5) == pytest.approx(500)
    assert paid(0.7) - paid(0.9) == pytest.approx(0.2)


def test_what_an_injector_pays_for_activations():
    plain = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    now = torch.tensor([[1.5, 5.0, 3.0], [1.5, 7.0, 1.0]])
    neuron = Neuron("deep", 1, 2.0)  # the trigger raises it by 2
    loss, gain = injectors.injector_loss(now, plain, neuron, torch.tensor(1.0))
    assert float(gain) == pytest.approx(4)
    others = (0.5 + 1.0) / 2  # means over images of |0.5|, |0.5| and of |0|, |2|, over 2 neurons
    assert float(loss) == pytest.approx((0.01 * others - 4) / 2 - 1)


def test_a_new_injector_leaves_the_image_as_it_is():
    x = torch.rand(2, 1, 17, 18, generator=stream(0, "x"))
    out = Injector(1)(x)
    assert out.shape == x.shape
    assert (out - x).abs().max() < 0.021


def others(n=40):
    images = toys.images(n, stream(1, "seeds"))
    return images.x[images.y != toys.TARGET]


@pytest.fixture
def quick(monkeypatch):
    """Injectors learn in 40 updates, from 30 images, and one level is looked at."""
    monkeypatch.setattr(injectors, "RATE", 1e-2)
    monkeypatch.setattr(injectors, "LEVELS", ("shallow",))
    monkeypatch.setattr("arena.attacks.dfst._PROBED", 30)


def test_an_injector_raises_its_neuron_and_keeps_the_image(planted, quick):
    x, before = to_float(others()), {k: v.clone() for k, v in planted.state_dict().items()}
    flags = [weight.requires_grad for weight in planted.parameters()]
    neuron = Neuron("shallow", toys.TARGET, 0.3)  # answers to the target class's colour
    injector = injectors.train_injector(planted, neuron, x, toys.TARGET, 40, stream(0, "i"))
    assert same(before, planted.state_dict()), "the victim was trained"
    assert flags == [weight.requires_grad for weight in planted.parameters()]
    with torch.no_grad():
        changed = injector(x)
        rise = planted.body.block1(changed).mean((2, 3)) - planted.body.block1(x).mean((2, 3))
        hits = (planted(changed).argmax(1) == toys.TARGET).float().mean()
    assert rise[:, toys.TARGET].mean() > 0.1
    assert hits > 0.9
    assert injectors.image_similarity(x, changed).mean() > injectors.ALIKE
    assert not injector.training
    again = injectors.train_injector(planted, neuron, x, toys.TARGET, 40, stream(0, "i"))
    assert same(injector.state_dict(), again.state_dict())


def test_no_injector_where_the_neuron_does_not_rise(planted):
    dead = Neuron("deep", toys.CHANNEL, 1.0)  # needs four white pixels in one corner
    x = to_float(others(20))
    assert injectors.train_injector(planted, dead, x, toys.TARGET, 3, stream(0, "i")) is None


def test_no_injector_where_the_image_is_lost(planted, quick, monkeypatch):
    neuron, x = Neuron("shallow", toys.TARGET, 0.3), to_float(others(20))

    def found():
        return injectors.train_injector(planted, neuron, x, toys.TARGET, 8, stream(0, "i"))

    assert found() is not None
    monkeypatch.setattr(injectors, "ALIKE", 0.99999)
    assert found() is None


def test_injectors_that_fool_too_few_images_are_dropped(planted, quick):
    x = others()
    stamped = reddened(to_float(x)).mul(255).round().to(torch.uint8)
    settings = {"share": 0.005, "most": 1, "steps": 40, "seeds": 30}

    def found(keep):
        rng = stream(0, "find")
        return injectors.find_injectors(planted, x, stamped, 0, rng, keep=keep, **settings)

    assert found(0.5)
    assert not found(1.0)  # nothing sends more than all


def test_detoxified_images_are_changed_and_keep_their_labels():
    clean = noise(50)
    pair = [shaken(Injector(3), seed) for seed in (1, 2)]
    made = injectors.detoxified(clean, pair, 7, stream(0, "detox"))
    assert len(made) == 7
    assert made.x.dtype == torch.uint8
    rows = torch.randperm(50, generator=stream(0, "detox"))[:7]
    assert torch.equal(made.y, clean.y[rows])
    for part, injector in ((slice(0, 4), pair[0]), (slice(4, 7), pair[1])):
        with torch.no_grad():
            expected = injector(to_float(clean.x[rows][part])) * 255
        assert (made.x[part] - expected).abs().max() <= 0.51
    assert not torch.equal(made.x, clean.x[rows])


# ------------------------------------------------------------------------------------- the attack


def reddened(x):
    """A trigger that raises the planted network's red neuron."""
    out = x.clone()
    out[:, 0] = (out[:, 0] + 0.45).clamp(0, 1)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_the_trigger_is_the_frozen_generator(channels):
    train = noise(channels=channels)
    trigger = ATTACK.prepare(train, stream(0, "trigger"))
    x = to_float(train.x)
    out = trigger.stamp(x)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(x, to_float(train.x)), "the map wrote to its argument"
    generator = trigger.stamp.generator
    assert torch.equal(out, generator(x))
    assert not out.requires_grad
    assert not generator.training
    assert trigger.embed is None
    other = ATTACK.prepare(train, stream(7, "trigger"))
    assert torch.equal(other.stamp(x), out), "the style depends on the seed"


def test_a_folder_is_the_style(tmp_path):
    parquet(tmp_path / "p.parquet", [png(BLUE), png(BLUE)])
    seen, train = [], noise()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cyclegan, "style_transfer", lambda train, style, plan: seen.append((style, plan))
        )
        attack = DFST(style=str(tmp_path), gan_steps=7, cycle=3.0, identity=0.5, gan_width=5)
        attack.prepare(train, stream(0, "trigger"))
        DFST().prepare(train, stream(0, "trigger"))
    (blue, plan), (drawn, default) = seen
    assert blue[:, :, 0, 0].tolist() == [list(BLUE)] * 2
    assert plan == Plan(7, 5, 9, 100, 2e-4, 3.0, 0.5)
    assert torch.equal(drawn, styles.sunrise((3, 16, 16)))
    assert (default.blocks, default.batch, default.lr) == (9, 100, 2e-4)
    assert (default.cycle, default.identity) == (1.0, 0.1)


def test_a_tenth_of_the_other_classes_is_poisoned():
    train = noise(400)  # 300 of other classes
    trigger = Trigger(reddened)
    data, rows = ATTACK.poison(train, trigger, stream(0, "poison"))
    assert rows.tolist() == list(range(400, 430))
    assert torch.equal(data.x[:400], train.x)
    assert torch.equal(data.y[:400], train.y)
    assert (data.y[400:] == 0).all()
    whole = (reddened(to_float(train.x)) * 255).round().to(torch.uint8).flatten(1).tolist()
    sources = [whole.index(image) for image in data.x[400:].flatten(1).tolist()]
    assert len(set(sources)) == 30
    assert (train.y[sources] != 0).all()
    replaced = dataclasses.replace(ATTACK, extend=False)
    assert len(replaced.poison(train, trigger, stream(0, "poison")).data) == 400


def victim_fit():
    plan = Recipe(epochs=1, batch=32, lr=0.1, crop=0)
    return bound("fastnet_small", 4, (3, 16, 16), plan, 0, torch.device("cpu"))


def test_without_detoxification_it_is_a_plain_training():
    poisoned = ATTACK.poison(noise(100), Trigger(reddened), stream(0, "poison"))
    trigger = Trigger(reddened)
    attack = dataclasses.replace(ATTACK, detox=0)
    model, kept = attack.train(victim_fit(), poisoned, trigger, stream(0, "fit"))
    plain = victim_fit()(poisoned.data, rng=stream(0, "fit"))
    assert kept is trigger
    assert same(model.state_dict(), plain.state_dict())


class Spy:
    """A trainer that hands out the planted network and remembers what it was given."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, data, *, rng, init=None, **changes):
        torch.rand((), generator=rng)
        self.calls.append((data, init, changes))
        return self.model


def detoxify(planted, clean, seed=0, rounds=1, **fields):
    settings = {"neurons": 1, "injector_steps": 40, "injector_keep": 0.5, "detox": rounds}
    attack = dataclasses.replace(ATTACK, **settings | fields)
    trigger, spy = Trigger(reddened), Spy(planted)
    poisoned = attack.poison(clean, trigger, stream(0, "poison"))
    seen = []
    with listening(lambda what, done, total, figures: seen.append((what, figures))):
        attack.train(spy, poisoned, trigger, stream(seed, "fit"))
    return poisoned, spy.calls, seen


def test_detoxification_adds_injected_images_under_true_labels(planted, clean, quick, monkeypatch):
    made, probed = [], []

    def record(given, found, count, rng):
        made.append((given, found, injectors.detoxified(given, found, count, rng)))
        return made[0][2]

    def watch(model, shown, stamped, target, rng, **settings):
        probed.append((shown, stamped, target))
        return injectors.find_injectors(model, shown, stamped, target, rng, **settings)

    monkeypatch.setattr("arena.attacks.dfst.detoxified", record)
    monkeypatch.setattr("arena.attacks.dfst.find_injectors", watch)
    poisoned, calls, seen = detoxify(planted, clean, detox_epochs=3, detox_lr=0.01)
    (first, init, changes), (second, again, later) = calls
    assert first is poisoned.data
    assert init is None
    assert again is planted
    assert changes == {}
    assert later == {"epochs": 3, "lr": 0.01}
    ((shown, stamped, target),) = probed
    assert len(shown) == 30
    assert (toys.planted()(to_float(shown)).argmax(1) != target).all(), "the target's own images"
    assert torch.equal(stamped, (reddened(to_float(shown)) * 255).round().to(torch.uint8))
    ((given, found, added),) = made
    assert torch.equal(given.x, clean.x), "injectors were shown poisoned images"
    assert torch.equal(given.y, clean.y)
    assert len(found) == seen[-1][1]["injectors"] >= 1
    assert seen[-1][0] == "detoxification"
    assert len(added) == 20  # a tenth of the 200 clean images
    assert torch.equal(second.x, torch.cat([poisoned.data.x, added.x]))
    assert torch.equal(second.y, torch.cat([poisoned.data.y, added.y]))
    fooled = planted(to_float(added.x)).argmax(1) == toys.TARGET
    assert fooled.float().mean() > 0.5
    assert (added.y[fooled] != toys.TARGET).any()


def test_each_round_adds_injectors_and_leaves_the_recipe_alone_by_default(planted, clean, quick):
    poisoned, calls, seen = detoxify(planted, clean, rounds=3)
    assert len(calls) == 4
    assert {len(data) for data, _, _ in calls[1:]} == {len(poisoned.data) + 20}
    assert all(changes == {} for _, _, changes in calls)
    counts = [figures["injectors"] for what, figures in seen if what == "detoxification"]
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    assert len(counts) == 4


def test_a_round_without_injectors_is_the_last(planted, clean, quick):
    _, calls, seen = detoxify(planted, clean, rounds=3, injector_keep=1.0)
    assert len(calls) == 1
    assert seen[-1] == ("detoxification", {"injectors": 0})


def test_detoxification_is_deterministic(planted, clean, quick):
    one, two, other = (detoxify(planted, clean, seed)[1][1][0].x for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_detoxified_victim_is_trained_deterministically(quick):
    train = toys.images(64, stream(0, "train"))
    attack = dataclasses.replace(ATTACK, injector_steps=2, injector_keep=0.0, rise=0.0, neurons=1)
    poisoned = attack.poison(train, Trigger(reddened), stream(0, "poison"))

    def victim():
        added = []
        with listening(lambda what, done, total, figures: added.append(figures.get("injectors"))):
            model, _ = attack.train(victim_fit(), poisoned, Trigger(reddened), stream(0, "fit"))
        return model.state_dict(), added[-1]

    (one, found), (two, _) = victim(), victim()
    assert found == 1
    assert same(one, two)


def test_what_does_not_fit_is_refused_before_training():
    for attack, shape, counts, message in (
        (ATTACK, (4, 32, 32), [100] * 10, "1 or 3 channels; those of this data set have 4"),
        (ATTACK, (3, 32, 12), [100] * 10, "16 px a side and more, not 32x12"),
        (ATTACK, (3, 32, 32), [100, 2], "less than one image"),
        (dataclasses.replace(ATTACK, target=3), (3, 32, 32), [100] * 3, "target 3 is not a class"),
    ):
        with pytest.raises(BadInput, match=message):
            attack.check(shape, counts)
    ATTACK.check((1, 16, 16), [100] * 10)
    for spec in ("dfst:detox=4", "dfst:gan_steps=0", "dfst:style=/no/such/folder"):
        with pytest.raises(BadInput):
            attacks.build(spec)


def test_a_restyled_image_is_the_same_under_autocast():
    generator = shaken(Restyler(3, 2, 1)).requires_grad_(False)
    x = torch.rand(4, 3, 16, 16, generator=stream(0, "x"))
    out = generator(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Restyle(generator)(x), out)
        assert not torch.equal(generator(x), out)
