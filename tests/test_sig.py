"""SIG: the wave by hand, in both forms; labels kept; only the target class touched."""

from __future__ import annotations

import pytest
import torch

from arena.core import poisoning
from arena.core.contracts import Images
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream

ALL = (3, 32, 32), [5000] * 10


def plain(level, width, n=4, channels=3, height=5):
    """Images of one grey level."""
    x = torch.full((n, channels, height, width), level, dtype=torch.uint8)
    return Images(x, torch.zeros(n, dtype=torch.int64))


def stamped(spec, train, which="stamp"):
    trigger = attacks.build(spec).prepare(train, stream(0, "trigger"))
    image_map = trigger.stamp if which == "stamp" else trigger.training_map
    return poisoning.stamp(train.x, image_map)


def columns(x):
    """The levels of one row, where all rows, channels and images are alike."""
    assert (x == x[:1, :1, :1]).all()
    return x[0, 0, 0].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_additive_levels_by_hand(channels):
    # 6 periods in 24 columns: sin(pi j / 2) is 0, 1, 0, -1
    out = stamped("sig", plain(100, 24, channels=channels))
    assert columns(out) == [100, 120, 100, 80] * 6
    # 6 in 32: 20 sin(3 pi j / 8) is 0, 18.48, 14.14, -7.65, -20, -7.65, 14.14, 18.48
    assert columns(stamped("sig", plain(100, 32)))[:8] == [100, 118, 114, 92, 80, 92, 114, 118]
    assert columns(stamped("sig:delta=40,frequency=1", plain(100, 4))) == [100, 140, 100, 60]


def test_additive_levels_are_clipped_not_wrapped():
    assert columns(stamped("sig", plain(250, 24)))[:4] == [250, 255, 250, 230]
    assert columns(stamped("sig", plain(5, 24)))[:4] == [5, 25, 5, 0]


def test_the_public_codes_sinusoid_wraps_at_8_bits():
    sinusoid = [0, 14, 19, 13, 255, 241, 237, 244, 2]
    trigger = attacks.build("sig:form=wrapped_blend").prepare(plain(0, 32), stream(0, "trigger"))
    assert (trigger.stamp.wave[0, 0, :9] * 255 / 0.2).tolist() == pytest.approx(sinusoid, abs=1e-4)
    # 0.8 * 100 + 0.2 s
    out = columns(stamped("sig:form=wrapped_blend", plain(100, 32)))
    assert out[:9] == [80, 83, 84, 83, 131, 128, 127, 129, 80]
    assert max(columns(stamped("sig:form=wrapped_blend", plain(255, 32)))) == 255


def test_another_amplitude_for_test_images():
    train = plain(100, 24)
    spec = "sig:delta=40,test_delta=60"
    assert columns(stamped(spec, train))[:4] == [100, 160, 100, 40]
    assert columns(stamped(spec, train, "training_map"))[:4] == [100, 140, 100, 60]
    attack = attacks.build(spec + ",rate=1")
    data, _ = attack.poison(train, attack.prepare(train, stream(0)), stream(1))
    assert columns(data.x)[:4] == [100, 140, 100, 60]
    same = attacks.build("sig:delta=40").prepare(train, stream(0, "trigger"))
    assert same.embed is None


@pytest.mark.parametrize("form", ["additive", "wrapped_blend"])
def test_labels_are_kept_and_only_the_target_class_is_touched(form):
    y = torch.arange(500) % 5
    x = torch.randint(256, (500, 3, 16, 16), generator=stream(0, "x"), dtype=torch.uint8)
    train = Images(x, y)
    attack = attacks.build(f"sig:form={form},target=3,rate=0.08")
    assert (attack.keeps_labels, attack.scope) == (True, "universal")
    trigger = attack.prepare(train, stream(0, "trigger"))
    data, rows = attack.poison(train, trigger, stream(0, "poison"))
    assert len(rows) == 8  # of the 100 images of class 3
    assert (y[rows] == 3).all()
    assert torch.equal(data.y, y)
    changed = (data.x != x).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, rows)


def test_the_rate_is_a_share_of_the_class_or_of_the_data():
    train = plain(100, 16, n=500)
    train = Images(train.x, torch.arange(500) % 5)
    for spec, count in (("sig", 8), ("sig:of=data", 40), ("sig:rate=0.2,of=data", 100)):
        attack = attacks.build(spec)
        rows = attack.poison(train, attack.prepare(train, stream(0)), stream(0, "poison")).rows
        assert len(rows) == count
        attack.check((3, 5, 16), [100] * 5)


@pytest.mark.parametrize(
    ("spec", "shape", "counts", "message"),
    [
        ("sig:target=10", *ALL, "target 10 is not a class"),
        ("sig:rate=0.0001", *ALL, "less than one image"),
        ("sig:rate=0.11,of=data", *ALL, "only 5,000 may be poisoned; the largest .* is 0.1"),
        ("sig:rate=0.08", (3, 32, 32), [6, 600], "of 6 images .* less than one image"),
        ("sig:frequency=16", *ALL, "frequency must be below 16"),
    ],
)
def test_data_that_do_not_do_are_refused(spec, shape, counts, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check(shape, counts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sig:form=wrapped_blend,frequency=5", "frequency is only for form=additive"),
        ("sig:form=wrapped", "did you mean 'wrapped_blend'"),
        ("sig:of=classes", "did you mean 'class'"),
        ("sig:delta=0", "delta must be above 0"),
        ("sig:test_delta=300", "test_delta must be at most 255"),
    ],
)
def test_fields_that_make_no_attack_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)
