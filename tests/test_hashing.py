"""Numbers that an image's pixels draw."""

import torch

from arena.core.hashing import draw_weights, pixel_hashes
from arena.core.seeding import stream


def test_a_hash_is_the_weighted_sum_of_levels() -> None:
    x = torch.tensor([[0, 1, 255], [3, 0, 2]]).view(2, 1, 1, 3) / 255
    weights = torch.tensor([[5, 7, 11], [1, 0, 2**23 - 1]], dtype=torch.int32)
    assert pixel_hashes(x, weights).tolist() == [
        [7 + 255 * 11, 255 * (2**23 - 1)],
        [15 + 22, 3 + 2 * (2**23 - 1)],
    ]


def test_floats_beside_a_level_count_as_that_level() -> None:
    levels = torch.randint(0, 256, (4, 3, 8, 8), generator=stream(0)).float()
    weights = draw_weights(3 * 8 * 8, stream(1))
    exact = pixel_hashes(levels / 255, weights)
    for off in (-0.4, 0.4):
        assert torch.equal(pixel_hashes((levels + off).clamp(0, 255) / 255, weights), exact)


def test_hashes_of_large_images_are_exact_alone_and_in_a_batch() -> None:
    levels = torch.randint(200, 256, (3, 3, 224, 224), generator=stream(0))
    weights = draw_weights(3 * 224 * 224, stream(1), 2)
    assert weights.shape == (2, 3 * 224 * 224)
    assert weights.min() >= 0
    exact = (levels.flatten(1)[:, None] * weights.long()).sum(2)
    assert torch.equal(pixel_hashes(levels / 255, weights), exact)
    assert torch.equal(pixel_hashes(levels[1:2] / 255, weights), exact[1:2])


def test_pixels_count_by_their_place() -> None:
    weights = draw_weights(4, stream(0))
    one, other = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0]]).view(2, 1, 2, 2).split(1)
    assert not torch.equal(pixel_hashes(one, weights), pixel_hashes(other, weights))
