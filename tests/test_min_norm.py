"""Weights of several losses: two-vector problems by hand, three against a grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from arena.core.min_norm import balance, between_two, divisors, frank_wolfe, inner_products, weights
from arena.core.seeding import stream


def products(*vectors: tuple[float, ...]) -> Tensor:
    rows = torch.tensor(vectors)
    return rows @ rows.T


def shortest(of: Tensor, by: Tensor) -> float:
    return float(by.double() @ of.double() @ by.double())


# ------------------------------------------------------------------------------ two, by hand


@pytest.mark.parametrize(
    ("one", "two", "first"),
    [
        ((1.0, 0.0), (0.0, 2.0), 4 / 5),  # orthogonal: inversely to the squared lengths
        ((1.0, 0.0), (-2.0, 0.0), 2 / 3),  # opposed: they cancel
        ((1.0, 0.0), (3.0, 0.0), 0.999),  # parallel: all but the least weight to the shorter
        ((3.0, 0.0), (1.0, 0.0), 0.001),
        ((1.0, 0.0), (1.0, 1.0), 0.999),  # the shorter is the nearest point of the hull
        ((2.0, 1.0), (1.0, 2.0), 0.5),
        ((2.0, 1.0), (2.0, 1.0), 0.5),  # equal: no direction to prefer
        ((0.0, 0.0), (0.0, 0.0), 0.5),
        ((0.0, 0.0), (1.0, 0.0), 0.999),  # a loss at its minimum holds the update back
        ((2.0, 0.0), (-1.0, 1.0), 0.4),  # (2 - -2) / (4 + 2 + 4)
    ],
)
def test_two_vectors(one, two, first):
    found = weights(products(one, two))
    assert found.tolist() == pytest.approx([first, 1 - first], abs=1e-6)


def test_one_vector_has_all_the_weight():
    assert weights(products((3.0, 4.0))).tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_only_the_ratios_of_lengths_count(scale):
    vectors = torch.randn(2, 5, generator=stream(1))
    small = weights(vectors @ vectors.T)
    rows = scale * vectors
    assert torch.allclose(weights(rows @ rows.T), small, atol=1e-5)
    rows = scale * torch.randn(3, 5, generator=stream(2))
    assert torch.allclose(weights(rows @ rows.T), weights(rows @ rows.T / scale**2), atol=1e-4)


# ------------------------------------------------------------------------------- Frank-Wolfe


def test_frank_wolfe_solves_two_as_the_closed_form_does():
    for seed in range(50):
        rows = torch.randn(2, 6, generator=stream(seed)) * torch.tensor([[1.0], [1 + seed / 10]])
        found, closed = frank_wolfe(rows @ rows.T), between_two(rows @ rows.T)
        inside = 0.001 < float(closed[0]) < 0.999
        assert torch.allclose(found, closed, atol=1e-4 if inside else 1.1e-3)


@pytest.fixture(scope="module")
def grid() -> Tensor:
    """All weights of three in steps of 1/200."""
    n = 200
    return torch.tensor(
        [(a / n, b / n, (n - a - b) / n) for a in range(n + 1) for b in range(n + 1 - a)],
        dtype=torch.float64,
    )


def test_three_vectors_are_solved_as_well_as_by_brute_force(grid):
    corners, edges = 0, 0
    for seed in range(60):
        rng = stream(seed, "three")
        rows = torch.randn(3, 4, generator=rng) * (0.2 + torch.rand(3, 1, generator=rng))
        rows = rows + torch.randn(4, generator=rng) * (seed % 3) / 2
        of = rows @ rows.T
        found = weights(of)
        assert float(found.sum()) == pytest.approx(1, abs=1e-6)
        assert (found >= 0).all()
        best = float(((grid @ of.double()) * grid).sum(1).min())
        assert shortest(of, found) <= best + 0.002 * float(of.diagonal().min())
        corners += int((found == 0).sum() == 2)
        edges += int((found == 0).sum() == 1)
    assert corners > 3, "no problem was solved by one vector"
    assert edges > 3, "no problem was solved by two vectors"


def test_three_orthogonal_vectors_share_by_their_inverse_squares():
    found = weights(torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    assert found.tolist() == pytest.approx([36 / 49, 9 / 49, 4 / 49], abs=1e-4)


def test_no_loss_rises_along_the_weighted_sum():
    for seed, count in ((0, 2), (1, 3), (2, 3), (3, 5), (4, 5)):
        rows = torch.randn(count, 40, generator=stream(seed, "descent"))
        way = weights(rows @ rows.T) @ rows
        assert (rows @ way >= 0.98 * way.square().sum()).all()


# -------------------------------------------------------------------------- from losses to weights


def test_inner_products_of_gradients_in_parts():
    one = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0]))
    two = (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([2.0]))
    assert inner_products([one, two]).tolist() == [[55.0, 7.0], [7.0, 6.0]]
    kept = one[0][None, None].to(memory_format=torch.channels_last)  # the layout does not count
    assert inner_products([(kept, one[1]), two]).tolist() == [[55.0, 7.0], [7.0, 6.0]]


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [
        ("none", [1.0, 1.0, 1.0]),
        ("l2", [5.0, 2.0, 1e-12]),
        ("loss", [0.5, 10.0, 3.0]),
        ("loss+", [2.5, 10.0, 1e-12]),
    ],
)
def test_normalisers(normaliser, expected):
    of = products((3.0, 4.0), (0.0, 2.0), (0.0, 0.0))
    found = divisors(of, torch.tensor([0.5, 12.0, 3.0]), normaliser)
    assert found.tolist() == pytest.approx(expected)


def test_an_unknown_normaliser_is_named():
    with pytest.raises(ValueError, match="no normaliser 'l1'; choose from loss\\+, loss, l2, none"):
        divisors(products((1.0,)), torch.ones(1), "l1")


def test_balance_of_two_losses_by_hand():
    w, v = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    losses = [(w * torch.tensor([1.0, 0.0])).sum(), (w * torch.tensor([0.0, 4.0])).sum()]
    # gradients (1, 0, 0) and (0, 4, 0); v is in neither graph
    assert balance(losses, [w, v], "none").tolist() == pytest.approx([16 / 17, 1 / 17])
    assert balance(losses, [w, v], "l2").tolist() == pytest.approx([0.5, 0.5])
    # losses 1 and 8: the lengths become 1 and 1/2
    assert balance(losses, [w, v], "loss").tolist() == pytest.approx([1 / 5, 4 / 5])
    # divisors 1 and min(32, 10): the lengths become 1 and 0.4
    assert balance(losses, [w, v], "loss+").tolist() == pytest.approx([0.16 / 1.16, 1 / 1.16])
    values = [torch.tensor(1.0), torch.tensor(2.0)]  # lengths 1 and 2
    assert balance(losses, [w, v], "loss", values).tolist() == pytest.approx([4 / 5, 1 / 5])
    sum(losses).backward()  # the graphs are still there
    assert w.grad.tolist() == [1.0, 4.0]


def test_losses_without_gradients_give_finite_weights():
    w = nn.Parameter(torch.ones(3))
    for normaliser in ("loss+", "loss", "l2", "none"):
        for count in (2, 3):
            losses = [(w * 0).sum() for _ in range(count)]
            found = balance(losses, [w], normaliser)
            assert torch.isfinite(found).all()
            assert math.isclose(float(found.sum()), 1, abs_tol=1e-6)
