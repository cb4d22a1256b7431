"""What several attacks' triggers are made of."""

from __future__ import annotations

import torch

from arena.core.triggers import Add, rounded


def test_a_change_is_added_and_clipped():
    x = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(2, 1, 2, 4)
    before = x.clone()
    out = Add(torch.tensor([[[0.5, 0.5, -1.0, 0.25], [-0.5, -0.125, 0.0, 0.0]]]))(x)
    assert out[0, 0].tolist() == [[0.5, 0.75, 0.0, 1.0], [0.0, 0.125, 0.5, 1.0]]
    assert torch.equal(out[0], out[1])
    assert torch.equal(x, before)


def test_one_plane_of_change_goes_to_all_channels():
    out = Add(torch.full((1, 2, 2), 0.25))(torch.zeros(1, 3, 2, 2))
    assert (out == 0.25).all()


def test_rounded_values_are_levels_and_levels_stay_as_they_are():
    levels = torch.arange(256) / 255
    assert torch.equal(rounded(levels), levels)
    assert torch.equal(rounded(levels + 0.4 / 255)[:255], levels[:255])
    assert torch.equal(rounded(levels - 0.4 / 255)[1:], levels[1:])
    assert torch.equal(rounded(torch.tensor([0.6 / 255])), levels[1:2])


def test_the_gradient_is_that_of_what_is_rounded():
    x = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    (rounded(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
