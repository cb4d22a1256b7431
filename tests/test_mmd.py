"""MMD²: the printed double sums, what leaves it alone, and figures of a network made by hand."""

from __future__ import annotations

import math

import pytest
import torch
import toys
from torch import Tensor

from arena.core import poisoning
from arena.core.contracts import Images
from arena.core.features import features
from arena.core.mmd import KERNELS, _discrepancy, masked_mmd2, mmd2, mmd_report
from arena.core.seeding import stream


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "features"))


def by_loops(x: Tensor, y: Tensor, kernel: str, biased: bool) -> Tensor:
    """Equation 3 of SDRM, term by term; the unit of sigma as `arena.core.mmd` states it."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    z = torch.cat([x, y]).detach()
    middle = sum(z) / len(z)
    variance = sum(((one - middle) ** 2).sum() for one in z) / (len(z) - 1)

    def k(a: Tensor, b: Tensor) -> Tensor:
        if kernel == "lk":
            return (a * b).sum() / variance
        distance = ((a - b) ** 2).sum()
        return sum(torch.exp(-distance / (2 * s * s * variance)) for s in KERNELS[kernel])

    def within(a: Tensor) -> Tensor:
        n, total = len(a), torch.zeros((), dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                if biased or i != j:
                    total = total + k(a[i], a[j])
        return total / (n * n if biased else n * (n - 1))

    across = torch.zeros((), dtype=torch.float64)
    for one in x:
        for two in y:
            across = across + k(one, two)
    return within(x) + within(y) - 2 * across / (len(x) * len(y))


@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_double_sum_and_so_are_its_gradients(kernel, biased):
    x, y = normal(5, 2, 3, 2), normal(7, 2, 3, 2, seed=1) + 0.7
    x, y = x.requires_grad_(), y.requires_grad_()
    fast, slow = mmd2(x, y, kernel, biased=biased), by_loops(x, y, kernel, biased)
    assert fast.dtype == torch.float32
    assert fast.item() == pytest.approx(slow.item(), abs=2e-6)
    for one, two in zip(
        torch.autograd.grad(fast, (x, y)), torch.autograd.grad(slow, (x, y)), strict=True
    ):
        assert torch.allclose(one, two, atol=2e-6)


def test_a_value_by_hand():
    # the pooled points -1, 1, -1, 1 have variance 4/3; each of the three means is known
    x = torch.tensor([[-1.0], [1.0]])
    near = math.exp(-4 / (2 * 4 / 3))
    assert float(mmd2(x, x, "gk2")) == pytest.approx(near + near - (1 + near))
    assert float(mmd2(x, x, "gk2", biased=True)) == pytest.approx(0, abs=1e-7)
    # two and two equal points: v = 4/3 again, every pair within at 0, every pair across at 4
    y = torch.ones(2, 1)
    expected = 2 - 2 * math.exp(-4 / (2 * 0.25 * 4 / 3))
    assert float(mmd2(-y, y, "gk1")) == pytest.approx(expected)
    assert float(mmd2(-y, y, "lk")) == pytest.approx(4 / (4 / 3))


def test_two_samples_of_one_distribution_do_not_differ():
    pairs = [(normal(60, 20, seed=s), normal(50, 20, seed=100 + s)) for s in range(40)]
    unbiased = torch.stack([mmd2(x, y) for x, y in pairs])
    assert abs(float(unbiased.mean())) < 3 * float(unbiased.std()) / 40**0.5
    assert float(unbiased.abs().max()) < 0.05
    assert min(float(mmd2(x, y, biased=True)) for x, y in pairs) > 0
    moved = torch.stack([mmd2(x, y + 0.5) for x, y in pairs])
    assert float(moved.min()) > 0.1


@pytest.mark.parametrize("kernel", ["gmk2", "lk"])
def test_neither_scale_nor_shift_nor_repeated_features_matter(kernel):
    x, y = normal(20, 8), normal(30, 8, seed=1) + 0.5
    value = float(mmd2(x, y, kernel))
    for one, two in (
        (1000 * x, 1000 * y),
        (x + 50, y + 50),
        (x.repeat(1, 9), y.repeat(1, 9)),
        (x[:, None, :, None], y[:, None, :, None]),
    ):
        assert float(mmd2(one, two, kernel)) == pytest.approx(value, rel=1e-3)
    assert float(mmd2(y, x, kernel)) == pytest.approx(value, rel=1e-4)


def test_bf16_features_are_compared_in_full_precision():
    x, y = normal(40, 300).bfloat16(), (normal(40, 300, seed=1) + 0.1).bfloat16()
    exact = mmd2(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mmd2(x, y), exact)
        assert torch.equal(mmd2(x.float(), y.float()), exact)


def test_features_that_are_all_equal_do_not_differ():
    x = torch.ones(4, 6, requires_grad=True)
    value = mmd2(x, torch.ones(3, 6))
    value.backward()
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros(4, 6))


def test_too_few_features_and_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="2 features of each kind, got 1 and 5"):
        mmd2(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="no kernel 'gmk22'; did you mean 'gmk2'"):
        mmd2(normal(4, 3), normal(5, 3), "gmk22")


# --------------------------------------------------------------------------------------- in a batch


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """40 features; 7 of the first kind, 9 of the second, and others that are far from both."""
    kind = torch.tensor([0] * 24 + [1] * 7 + [2] * 9)[torch.randperm(40, generator=stream(3))]
    z = normal(40, 3, 4) + kind[:, None, None] * 0.5
    z[kind == 0] *= 1e3
    return z, kind == 1, kind == 2


@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("kernel", ["gmk6", "lk"])
def test_masks_choose_parts_of_a_batch(batch, kernel, biased):
    z, first, second = batch
    expected = mmd2(z[first], z[second], kernel, biased=biased)
    z.requires_grad_()
    for function in (masked_mmd2, lambda *a, biased: _discrepancy(*a, biased)):
        found = function(z, first, second, kernel, biased=biased)
        assert found.item() == pytest.approx(float(expected), abs=1e-5)
        (slope,) = torch.autograd.grad(found, z)
        assert torch.isfinite(slope).all()
        assert torch.equal(slope.flatten(1).any(1), first | second)


@pytest.mark.parametrize("sizes", [(0, 0), (1, 9), (7, 1), (0, 9), (1, 1)])
def test_a_part_of_fewer_than_two_adds_nothing(batch, sizes):
    z, first, second = batch
    first, second = (
        mask & (mask.cumsum(0) <= size) for mask, size in zip((first, second), sizes, strict=True)
    )
    z.requires_grad_()
    for function in (masked_mmd2, lambda *a: _discrepancy(*a, "gmk2", False)):
        found = function(z, first, second)
        assert found.item() == 0
        (slope,) = torch.autograd.grad(found, z)
        assert torch.equal(slope, torch.zeros_like(z))


def test_two_of_each_are_enough(batch):
    z, first, second = batch
    first, second = (mask & (mask.cumsum(0) <= 2) for mask in (first, second))
    expected = by_loops(z[first], z[second], "gmk2", biased=False)
    assert float(masked_mmd2(z, first, second)) == pytest.approx(float(expected), abs=1e-5)


def test_off_the_cpu_nothing_waits_for_the_device(batch, monkeypatch):
    def waits(*_: object) -> None:
        raise AssertionError("the host waits for the device")

    z, first, second = batch
    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, waits)
    _discrepancy(z.requires_grad_(), first, second, "gmk2", False).backward()
    with pytest.raises(AssertionError, match="waits"):
        masked_mmd2(z, first, second)  # on the CPU the masks are looked at


# ------------------------------------------------------------------------------- the referee's view


@pytest.fixture
def shown() -> tuple[Tensor, Images]:
    clean = toys.images(240, stream(0, "clean"))
    return poisoning.stamp(clean.x[clean.y != toys.TARGET], toys.stamp), clean


def report(planted, stamped, clean, seed=0, **more):
    return mmd_report(planted, stamped, clean, toys.TARGET, stream(seed, "report"), **more)


def test_a_planted_channel_shows_where_it_lies(planted, shown):
    found = report(planted, *shown)
    assert list(found) == ["shallow", "middle", "deep"]
    for row in found.values():
        assert abs(row["intra"]) < 0.1
        assert row["inter"] > 0.1
    assert found["deep"]["stamped"] > 2 * found["shallow"]["stamped"] > 0


def test_the_report_compares_what_it_says(planted, shown):
    stamped, clean = shown
    own, others = clean.x[clean.y == toys.TARGET], clean.x[clean.y != toys.TARGET]
    # with 60 copies of one image for the target class, any sample of it is known
    x = torch.cat([own[:1].expand(60, -1, -1, -1), others])
    labels = torch.zeros(240, dtype=torch.int64)  # the model's answers count, not these
    found = report(planted, stamped[:40], Images(x, labels), size=40, biased=True)
    with torch.no_grad():
        z = features(planted, torch.cat([x[:30], stamped[:40]]) / 255)
    for level, row in found.items():
        assert row["intra"] == pytest.approx(0, abs=1e-6)
        expected = float(mmd2(z[level][30:], z[level][:30], biased=True))
        assert row["stamped"] == pytest.approx(expected, abs=1e-4)
        assert row["stamped"] != pytest.approx(float(mmd2(z[level][30:], z[level][:30])), abs=1e-3)


def test_the_nearest_other_class_counts(planted, shown):
    stamped, clean = shown
    mixed = clean.x.clone()  # class 2 comes half way towards the target's colour
    near = clean.y == 2
    mixed[near, toys.TARGET] += 50

    def between(*classes: int) -> float:
        rows = torch.stack([clean.y == c for c in (toys.TARGET, *classes)]).any(0)
        return report(planted, stamped, Images(mixed, clean.y).take(rows))["shallow"]["inter"]

    every, alone = between(1, 2, 3), [between(c) for c in (1, 2, 3)]
    assert alone[1] < alone[0] - 0.1
    assert every == pytest.approx(min(alone), abs=0.05)


def test_the_seed_draws_the_sets_and_the_model_stays_as_it_is(planted, shown):
    planted.train()
    planted.body.block1.eval()
    before = {name: value.clone() for name, value in planted.state_dict().items()}
    modes = [module.training for module in planted.modules()]
    one, two, other = (report(planted, *shown, seed=s, size=20) for s in (0, 0, 1))
    assert one == two
    assert one["deep"]["stamped"] != other["deep"]["stamped"]
    assert [module.training for module in planted.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in planted.state_dict().items())


def test_figures_that_do_not_exist_are_none(planted, shown):
    stamped, clean = shown
    failed = report(planted, clean.x[clean.y == 1], clean)  # none is taken for the target class
    assert failed["deep"]["stamped"] is None
    assert failed["deep"]["intra"] is not None
    lonely = report(planted, stamped, clean.take(clean.y == toys.TARGET))
    assert lonely["deep"]["inter"] is None
    empty = {"stamped": None, "intra": None, "inter": None}
    for few in (clean.take(clean.y != toys.TARGET), clean.take(torch.arange(0))):
        assert report(planted, stamped, few) == dict.fromkeys(("shallow", "middle", "deep"), empty)
