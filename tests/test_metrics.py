"""Metrics against values worked out by hand, and SSIM against the formula as a loop."""

import math

import pytest
import torch

from arena.core import measures, metric_list, metrics
from arena.core.seeding import stream
from arena.report import rows, statistics


def test_shares_by_hand():
    pred, y = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 1, 2, 3, 4])
    wanted, mask = torch.full((5,), 2), torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)
    assert metrics.accuracy(pred, y) == 0.6
    assert metrics.asr(pred, wanted, mask) == 0.25  # row 2 is of the target class: not counted
    assert metrics.ra(pred, y, mask) == 0.5


def test_a_share_of_nothing_is_refused():
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="no images"):
        metrics.accuracy(nothing, nothing)
    with pytest.raises(ValueError, match="do not match"):
        metrics.accuracy(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("before_after", "expected"),
    [
        ((0.9, 0.9, 1.0, 0.0), 1.0),  # a cure at no cost
        ((0.9, 0.9, 1.0, 1.0), 0.5),  # nothing happened
        ((0.9, 0.1, 1.0, 0.0), 0.6),  # cured, and wrecked
        ((0.9, 0.8, 0.5, 0.9), 0.45),  # a risen ASR counts as none gained
        ((0.8, 0.9, 0.9, 0.4), 0.75),  # a risen accuracy counts as none lost
    ],
)
def test_der_by_hand(before_after, expected):
    assert metrics.der(*before_after) == pytest.approx(expected)


def test_wilson_by_a_published_value_and_as_in_the_report():
    low, high = metrics.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)
    assert metrics.wilson(0, 10)[0] == 0.0
    assert metrics.wilson(10, 10)[1] == 1.0
    assert metrics.wilson(7, 9) == statistics.wilson(7, 9)
    with pytest.raises(ValueError, match="successes"):
        metrics.wilson(3, 2)


def test_distances_by_hand():
    clean = torch.zeros(2, 3, 4, 4)
    triggered = clean.clone()
    triggered[0, 0, 0, :2] = torch.tensor([0.3, 0.4])
    assert metrics.l2(clean, triggered) == pytest.approx(0.5 / 2)
    assert metrics.linf(clean, triggered) == pytest.approx(0.4 / 2)


def test_psnr_by_hand_over_the_changed_images():
    clean = torch.zeros(3, 1, 2, 2)
    triggered = clean.clone()
    triggered[0] += 0.1  # mean squared error 0.01: 20 dB
    triggered[1] += 0.01  # 40 dB
    assert metrics.psnr(clean, triggered) == pytest.approx(30, abs=1e-4)
    assert metrics.psnr(clean, clean) == math.inf


def test_bytes_and_floats_measure_alike():
    rng = stream(0, "metrics")
    one, two = (torch.randint(256, (4, 3, 16, 16), generator=rng).byte() for _ in range(2))
    for measure in (metrics.psnr, metrics.ssim, metrics.l2, metrics.linf):
        assert measure(one, two) == pytest.approx(measure(one / 255, two / 255), rel=1e-6)


def ssim_by_loop(a, b):
    """Wang et al. 2004, equation 13, for one channel: window by window, pixel by pixel."""
    taps = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, taps))
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            cells = [
                (taps[i][j] / total, float(a[top + i, left + j]), float(b[top + i, left + j]))
                for i in range(11)
                for j in range(11)
            ]
            ma, mb = sum(w * p for w, p, _ in cells), sum(w * q for w, _, q in cells)
            va = sum(w * (p - ma) ** 2 for w, p, _ in cells)
            vb = sum(w * (q - mb) ** 2 for w, _, q in cells)
            cov = sum(w * (p - ma) * (q - mb) for w, p, q in cells)
            c1, c2 = 1e-4, 9e-4
            above = (2 * ma * mb + c1) * (2 * cov + c2)
            values.append(above / ((ma * ma + mb * mb + c1) * (va + vb + c2)))
    return sum(values) / len(values)


def test_ssim_equals_the_formula_as_a_loop():
    rng = stream(0, "ssim")
    one = torch.rand(2, 2, 13, 15, generator=rng, dtype=torch.float64)
    two = (one + 0.3 * torch.rand(2, 2, 13, 15, generator=rng, dtype=torch.float64)).clamp(0, 1)
    looped = [ssim_by_loop(one[n, c], two[n, c]) for n in range(2) for c in range(2)]
    assert metrics.ssim(one, two) == pytest.approx(sum(looped) / 4, abs=1e-12)


def test_ssim_of_flat_images_and_of_the_same_image():
    dark, light = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # no structure: light alone
    assert metrics.ssim(dark, light) == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(light, light) == pytest.approx(1)
    with pytest.raises(ValueError, match="does not fit"):
        metrics.ssim(torch.zeros(1, 1, 10, 30), torch.zeros(1, 1, 10, 30))


def test_the_mean_does_not_depend_on_the_batches(monkeypatch):
    rng = stream(0, "batches")
    one, two = (torch.rand(7, 1, 12, 12, generator=rng) for _ in range(2))
    measures = (metrics.psnr, metrics.ssim, metrics.l2, metrics.linf)
    whole = [measure(one, two) for measure in measures]
    monkeypatch.setattr(metrics, "_BATCH_VALUES", 2 * 144)
    assert [measure(one, two) for measure in measures] == pytest.approx(whole, rel=1e-9)


def test_unlike_or_no_images_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        metrics.l2(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="no images"):
        metrics.psnr(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4))


def test_every_measured_column_is_defined_once():
    names = [metric.name for metric in metric_list.METRICS]
    columns = [name.removesuffix("_before") for name in (*rows.METRICS, *rows.BUDGET)]
    assert len(names) == len(set(names))
    assert set(names) == set(columns)
    asked = [metric.name for metric in measures.COLUMNS]
    assert len(asked) == len(set(asked))
    assert set(asked) == {n.removesuffix("_before") for n in (*rows.MEASURED, *rows.UNITS.values())}
    assert not set(asked) & set(names)
    for metric in (*metric_list.METRICS, *measures.COLUMNS):
        assert all((metric.definition, metric.unit, metric.source)), metric.name
