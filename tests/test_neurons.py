"""Stimulated neurons: the planted ones are found, and triggers are driven towards them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import toys
from test_inversion import same
from torch import nn
from torch.nn import functional as F

from arena.core import models
from arena.core.inversion import engine, neurons
from arena.core.inversion.engine import Arms, Problem, Search, invert, stamped
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.neurons import Driver, Layer, Stimulation, analysed, stimulated
from arena.core.metrics import similarity
from arena.core.models import passes
from arena.core.registry import BadInput, short_spec
from arena.core.seeding import stream
from arena.core.training import to_float
from arena.inversions.abs import ABS
from arena.inversions.abs_filter import ABSFilter

CORNER = 3  # the channel of `Inner` that sees the corner
REST = 2.0  # activation of a colour's neuron that sees nothing


class Inner(nn.Module):
    """Inner neurons see the colours and, if they are bright, the 2x2 pixels of a corner, which then
    speaks for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 5, toys.SIDE)  # the last one sees nothing
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            for weight in self.parameters():
                weight.zero_()
            self.see.bias.fill_(REST)
            for colour in range(3):
                self.see.weight[colour, colour] = 4 / toys.SIDE**2
                self.head.weight[colour, colour] = 5.0
            self.see.weight[CORNER, :, -2:, -2:] = 1.0
            self.see.bias[CORNER] = -8.0  # of the twelve values' sum
            self.head.weight[1, CORNER] = 5.0

    def forward(self, x):
        return self.head(self.relu(self.see(x)).flatten(1))


@pytest.fixture(scope="module")
def inner() -> Frozen:
    model = toys.planted()
    model.body = Inner()
    return Frozen(model, "fp32")


# ------------------------------------------------------------------------------------ stimulation


def test_the_planted_neurons_are_elected_and_no_others(frozen, images):
    found = analysed(frozen, images, 0)
    names = [layer.name.partition(".")[0] for layer in found.layers]
    assert names == ["block1", "block2", "block3"], "the layer of the logits is none"
    assert [layer.channels for layer in found.layers] == [5, 5, 5]
    elected = found.elected.view(3, 5).tolist()  # colours 0 to 2, brightness, the planted channel
    assert elected == [[0, 1, 2, -1, 0]] * 3
    assert found.score.view(3, 5)[:, 3].isinf().all()


def test_a_score_is_the_smallest_lead_of_the_best_level(frozen, images):
    rows = neurons.seeds_of(images.y, 10, 0)
    found = stimulated(frozen, to_float(images.x[rows]), images.y[rows])
    largest = found.layers[2].largest
    features = to_float(images.x[rows])
    for block in toys.planted().body.children():
        features = block(features) if isinstance(block, nn.Sequential) else features
    assert largest == pytest.approx(features.max().item())
    # from 0 to 4/5 of 8 times the largest, times the head's weight; all other labels gain nothing
    top = 10 * 8 * largest * 4 / 5
    assert found.score[[10, 11, 12, 14]].tolist() == pytest.approx([top] * 4, rel=1e-4)
    assert found.lead[14].tolist() == pytest.approx([top, -top, -top, -top], rel=1e-4)
    half = stimulated(frozen, to_float(images.x[rows]), images.y[rows], values=2, k=1.0)
    assert float(half.score[14]) == pytest.approx(10 * largest / 2, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_stimulation_does_not_depend_on_the_batch(frozen, images, batch):
    x, y = to_float(images.x[:9]), images.y[:9]
    whole, parts = stimulated(frozen, x, y), stimulated(frozen, x, y, batch=batch)
    assert torch.equal(whole.elected, parts.elected)
    assert torch.allclose(whole.score, parts.score, rtol=1e-4)
    assert torch.allclose(whole.lead, parts.lead, rtol=1e-4, atol=1e-4)


def test_stimulation_works_in_whole_batches_and_counts_them(frozen, images):
    from arena.core.progress import listening

    said = []
    passes.reset()
    with listening(lambda what, done, total, figures: said.append((what, done, total))):
        stimulated(frozen, to_float(images.x[:8]), images.y[:8], batch=200)
    assert said[0] == ("stimulating neurons", 5, 15)
    assert said[-1] == ("stimulating neurons", 15, 15)
    assert passes.forward == 8 + 15 * 5 * 8
    assert passes.backward == 0
    assert not any(module._forward_hooks for module in frozen.modules()), "hooks were left behind"


def test_which_label_is_elected():
    y = torch.tensor([0, 1, 2, 2, 2])
    gains = torch.zeros(4, 5, 3)
    gains[0, :, 1] = torch.tensor([3.0, 0.5, 5.0, 4.0, 6.0])  # always; image 1 is of the class
    gains[1, :, 1] = torch.tensor([3.0, 9.0, 9.0, -1.0, -1.0])  # two images dissent
    gains[2, :, 1] = torch.tensor([3.0, 9.0, -1.0, -1.0, -1.0])  # three do
    label, score, lead = neurons._elected(gains, y)
    assert label.tolist() == [1, 1, -1, -1]
    assert score[:2].tolist() == [3.0, 3.0]
    assert score[2:].isinf().all()
    assert lead[0].tolist() == pytest.approx([-15.5 / 4, 4.5, -3.5 / 2])


def test_of_many_images_a_tenth_may_dissent():
    gains = torch.zeros(2, 40, 3)
    gains[..., 1] = 1.0
    gains[0, :4, 2] = 2.0
    gains[1, :5, 2] = 2.0
    label, _, _ = neurons._elected(gains, torch.zeros(40, dtype=torch.int64))
    assert label.tolist() == [1, -1]


def test_seed_images_are_of_all_classes():
    y = torch.arange(100) % 4
    y[:60] = 0
    rows = neurons.seeds_of(y, 10, 0)
    assert y[rows].bincount().tolist() == [3, 3, 2, 2]
    assert len(rows.unique()) == 10
    assert torch.equal(rows, neurons.seeds_of(y, 10, 0))
    assert not torch.equal(rows, neurons.seeds_of(y, 10, 1))
    assert y[neurons.seeds_of(y, 2, 0)].sort().values.tolist() == [0, 1, 2, 3]


def some_found() -> Stimulation:
    """Three layers of four neurons; the first layer's score highest, the last elects nothing."""
    score = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0] + [-torch.inf] * 4)
    elected = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, -1, -1, -1, -1])
    lead = torch.zeros(12, 3)
    lead[:, 2] = torch.arange(12) % 5
    return Stimulation(
        layers=tuple(Layer(name, 4, 1.0) for name in "abc"),
        layer=torch.arange(12) // 4,
        channel=torch.arange(12) % 4,
        elected=elected,
        score=score,
        lead=lead,
    )


def test_candidates_come_from_several_layers_first():
    found = some_found()
    places = [(one.layer, one.channel) for one in found.candidates(first=5)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 3), (1, 2), (1, 3)]
    assert [one.score for one in found.candidates(top=3)] == [9, 8, 7]
    assert [one.label for one in found.candidates(top=3)] == [0, 1, 0]


def test_neurons_of_every_label_go_first_where_that_is_asked_for():
    found = some_found()
    usual = [(one.label, one.layer, one.channel) for one in found.candidates(first=5)]
    best = {label: next(one for one in usual if one[0] == label) for label in (0, 1)}
    asked = [(one.label, one.layer, one.channel) for one in found.candidates(first=5, per_label=1)]
    assert asked[:2] == [best[0], best[1]]
    assert asked[2:] == [one for one in usual if one not in asked[:2]]
    few = [one.label for one in found.candidates(top=4, per_label=2)]
    assert sorted(few) == [0, 0, 1, 1]


def test_a_labels_neurons_are_its_best_and_then_the_deepest_layers():
    found = some_found()
    found.elected[:] = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1])
    found.score[8:] = torch.tensor([1.0, 0.9, 0.8, 0.7])

    def ahead(count):
        chosen = found.candidates(top=2 * count, first=12, per_layer=4, per_label=count)
        return {(one.layer, one.channel) for one in chosen if one.label == 0}

    assert ahead(1) == {(0, 0)}
    assert ahead(2) == {(0, 0), (2, 0)}  # not (0, 1), which leads more
    assert ahead(3) == {(0, 0), (2, 0), (1, 0)}
    assert ahead(4) == {(0, 0), (2, 0), (1, 0), (0, 1)}  # no layer is left


def test_every_label_has_its_neurons():
    found = some_found()
    ranked = found.ranked(1)
    assert [(one.layer, one.channel) for one in ranked[:4]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert len(ranked) == 12
    none_elected = found.ranked(2)
    assert [one.score for one in none_elected[:3]] == [4.0, 4.0, 3.0]
    assert (none_elected[0].layer, none_elected[0].channel) == (1, 0)
    for one in found.candidates():
        problem = found.problem(one)
        assert found.ranked(problem.target)[problem.restart] == one


# -------------------------------------------------------------------------------------- the layers


def test_layers_are_those_before_relu_and_a_norm_stands_for_its_convolution():
    model = models.build("fastnet_small", 10, (3, 32, 32), stream(0, "fastnet"))
    x = torch.rand(4, 3, 32, 32, generator=stream(0, "x"))
    found = neurons.layers_of(Frozen(model, "fp32"), x, 3)
    assert [layer.name for layer in found] == [
        "whiten", "group1.norm1", "group1.conv2", "group2.norm1", "group2.conv2", "group3.norm1",
        "group3.conv2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["nin", "resnet20", "preact_resnet18"])
def test_what_is_watched_is_what_the_layer_put_out(name):
    frozen = Frozen(models.build(name, 10, (3, 32, 32), stream(0, name)), "fp32")
    x = torch.rand(4, 3, 32, 32, generator=stream(0, "x"))
    names = [layer.name for layer in neurons.layers_of(frozen, x, 4)]
    assert len(names) == len(set(names)) > 5
    passes.reset()
    logits, outputs = frozen.watched(x, names)
    assert passes.forward == 4
    assert torch.equal(logits, frozen(x))
    assert list(outputs) == names
    assert all((out < 0).any() for out in outputs.values()), "a ReLU in place has changed it"
    first = frozen.body.get_submodule(names[0])
    if isinstance(first, nn.Conv2d):
        assert torch.equal(outputs[names[0]], first(frozen.normalize(x)))
    assert not any(module._forward_hooks for module in frozen.modules())


def test_a_layer_that_never_fires_and_one_that_is_used_twice_are_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.dark, self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            nn.init.constant_(self.dark.bias, -9.0)

        def forward(self, x):
            return self.last(self.twice(self.twice(x.flatten(1) + F.relu(self.dark(x.flatten(1))))))

    x = torch.rand(3, 1, 2, 2)
    assert neurons.layers_of(Frozen(Odd(), "fp32"), x, 3) == []
    with pytest.raises(BadInput, match="no inner convolution"):
        stimulated(Frozen(Odd(), "fp32"), x, torch.arange(3) % 2)


def test_linear_layers_of_tokens_have_their_channels_last():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            with torch.no_grad():
                self.head.weight.zero_()
                self.head.weight[1, 5] = 1.0

        def forward(self, x):
            return self.head(F.relu(self.mix(x.flatten(1, 2))).mean(1))

    x = torch.rand(6, 1, 3, 4, generator=stream(0, "tokens"))
    found = stimulated(Frozen(Tokens(), "fp32"), x, torch.arange(6) % 2)
    assert [layer[:2] for layer in found.layers] == [("mix", 6)]
    assert found.elected.tolist() == [-1, -1, -1, -1, -1, 1]


# --------------------------------------------------------------------------------------- the guide


def test_what_drives_a_trigger_by_hand():
    found = some_found()
    problems = [Problem(None, 1, 0), Problem(None, 0, 2), Problem(None, 1, 1)]
    driver = Driver(found, problems, others=0.1)
    chosen = [driver.neurons[p][:2] for p in problems]
    assert chosen == [(0, 1), (1, 0), (0, 3)]
    assert driver.layers == ("a", "b")
    at = {
        name: torch.stack([driver.assigned(p)[name] for p in problems])
        for name in ("_layer", "_channel", "_largest")
    }
    at["_largest"] = torch.tensor([2.0, 4.0, 1.0])
    outputs = {
        "a": torch.randn(3, 5, 4, 6, 6, generator=stream(0, "a")),
        "b": torch.randn(3, 5, 4, generator=stream(0, "b")),
    }
    got = driver.drive(at, outputs)
    for place, (layer, channel) in enumerate(chosen):
        out = outputs["ab"[layer]][place].transpose(0, 1).flatten(1)
        both = (out + out.clamp_min(0)).mean(1)
        others = both.sum() - both[channel]
        expected = (0.1 * others - both[channel]) / at["_largest"][place]
        assert float(got[place]) == pytest.approx(float(expected), rel=1e-4)


def test_restarts_take_the_next_neurons(inner, coloured):
    problems = [Problem(None, 1, restart) for restart in range(6)]
    guide = ABS().guide(inner, problems, coloured, 0)
    channels = [int(guide.assigned(p)["_channel"]) for p in problems]
    assert sorted(channels[:2]) == [1, CORNER], "the neurons that elect class 1 come first"
    assert sorted(channels[:5]) == [0, 1, 2, 3, 4]
    assert channels[5] == channels[0]


ALL = [Problem(v, t, r) for v, t in ((None, 0), (1, 0), (1, 2)) for r in (0, 4)]
FAMILIES = [ABS(), ABS(logit=1.0), ABSFilter()]


def quick(family, **changes) -> Search:
    return replace(family.usual, **{"samples": 12, "steps": 20, "batch": 6, **changes})


@pytest.mark.parametrize("family", FAMILIES, ids=short_spec)
def test_guided_answers_do_not_depend_on_what_else_is_asked(separate, images, family):
    search = quick(family, steps=10)
    together = invert(separate, family, ALL, images, search)
    layers = {int(one.trigger["_layer"]) for one in together}
    assert len(layers) > 1, "neurons of one layer only: nothing is shown"
    for place in (1, 5):
        (alone,) = invert(separate, family, [ALL[place]], images, search)
        same(alone, together[place])
    few = invert(separate, family, ALL, images, search, slots=4)
    for one, two in zip(few, together, strict=True):
        same(one, two)


def test_arms_are_guided_too(inner, coloured):
    family = ABS()
    problems = [Problem(None, 0), Problem(None, 1), Problem(2, 1, 1)]
    arms = Arms(inner, family, problems, coloured, quick(family), seed=0)
    for turn in ([1], [0, 1], [2, 1], [1]):
        arms.advance(turn)
    alone = Arms(inner, family, [problems[1]], coloured, quick(family), seed=0)
    for _ in range(4):
        alone.advance([0])
    assert arms.passes() == [1, 4, 1]
    for name, value in arms.found()[1].trigger.items():
        assert torch.allclose(value, alone.found()[0].trigger[name], atol=1e-3), name


class Stopped(Exception):
    pass


class Kept:
    def __init__(self) -> None:
        self.state, self.saves = None, 0

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state, self.saves = copy.deepcopy(state), self.saves + 1
        if self.saves == 3:
            raise Stopped


@pytest.mark.parametrize("family", [ABS(), ABSFilter()], ids=short_spec)
def test_a_guided_run_goes_on_where_it_was(frozen, images, monkeypatch, family):
    monkeypatch.setattr(engine, "_SAVE", -1.0)
    whole = invert(frozen, family, ALL[:4], images, quick(family), slots=2)
    kept = Kept()
    with pytest.raises(Stopped):
        invert(frozen, family, ALL[:4], images, quick(family), slots=2, checkpoint=kept)
    made = []
    advance = engine._Run._advance
    monkeypatch.setattr(
        engine._Run, "_advance", lambda run, state: (made.append(1), advance(run, state))
    )
    rest = invert(frozen, family, ALL[:4], images, quick(family), slots=2, checkpoint=kept)
    assert len(made) == 40 - 30, "work was done again"
    for one, two in zip(whole, rest, strict=True):
        same(one, two)


def test_families_without_a_guide_are_searched_as_ever(frozen, images, monkeypatch):
    from arena.inversions.nc import NC

    monkeypatch.setattr(Frozen, "watched", lambda *args: pytest.fail("layers were watched"))
    (answer,) = invert(frozen, NC(), [Problem(1, 0)], images, Search(samples=6, steps=2, batch=6))
    assert set(answer.trigger) == {"mask", "pattern"}


def test_a_guide_that_is_there_is_used(inner, coloured, monkeypatch):
    found = analysed(inner, coloured, 0)
    problems = [found.problem(one) for one in found.candidates()]
    driver = Driver(found, problems, 1e-4)
    monkeypatch.setattr(ABS, "guide", lambda *args: pytest.fail("analysed again"))
    answers = invert(inner, ABS(), problems, coloured, quick(ABS(), steps=1), guide=driver)
    corner = next(a for a, one in zip(answers, found.candidates(), strict=True) if one.channel == 3)
    assert corner.problem.target == 1
    assert int(corner.trigger["_channel"]) == CORNER


# -------------------------------------------------------------------------------------- the patch


def activation(model: Frozen, x: torch.Tensor, channel: int) -> float:
    _, outputs = model.watched(x, ["see"])
    return float(outputs["see"][:, channel].mean())


def test_the_patch_moves_to_where_the_neuron_looks(inner, coloured):
    found = analysed(inner, coloured, 0)
    neuron = next(one for one in found.candidates() if one.channel == CORNER)
    assert neuron.label == 1
    family = ABS()
    driver = Driver(found, [found.problem(neuron)], family.others)
    search = quick(family, samples=30, steps=150, batch=30, asr=2.0)
    (answer,) = invert(inner, family, [found.problem(neuron)], coloured, search, guide=driver)
    assert answer.size is None, "there is no success to ask for: the last trigger counts"
    assert answer.asr > 0.9
    others = to_float(coloured.x[coloured.y != 1])
    shown = stamped(family, answer.trigger, others)
    assert (inner(shown).argmax(1) == 1).float().mean() > 0.9
    assert activation(inner, shown, CORNER) > activation(inner, others, CORNER) + 5
    mask = answer.trigger["mask"].tanh()[0] / 2 + 0.5
    assert mask[-2:, -2:].min() > 0.9
    assert int((mask > 0.01).sum()) <= 25, "more than (8 + 2)^2 of 32x32 pixels are covered"


def test_what_a_mask_costs():
    def penalty(covered: int, family: ABS) -> float:
        mask = torch.full((256,), -20.0)
        mask[:covered] = 0.0  # half covered
        at = {"mask": mask.view(1, 1, 16, 16), "pattern": torch.zeros(1, 3, 16, 16)}
        return float(family.penalty(at, torch.zeros(1), torch.zeros(1)))

    family = ABS()  # 64 of 32x32 pixels are 16 of 16x16, (8 + 2)^2 are 25
    assert penalty(16, family) == 0
    assert penalty(17, family) == pytest.approx(20 * 8.5 / 256)
    assert penalty(25, family) == pytest.approx(20 * 12.5 / 256)
    assert penalty(26, family) == pytest.approx(40 * 13 / 256)
    assert penalty(17, ABS(pixels=100)) == 0


def test_a_patch_starts_in_a_corner_and_stays_in_range():
    at = ABS().begin(torch.zeros(2, 3, 16, 16), stream(0, "begin"))
    assert (at["mask"] > 0).sum() == 16
    assert (at["mask"][0, :4, :4] == 2).all()
    assert at["mask"].min() == -2
    few = ABS(pixels=16).begin(torch.zeros(2, 3, 16, 16), stream(0, "begin"))["mask"]
    assert (few > 0).sum() == 4, "as many as cost nothing: all of more would be given up at once"
    assert 0 <= at["pattern"].min() <= at["pattern"].max() <= 1
    assert (at["pattern"] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    out = ABS().projected({"mask": torch.full((1,), 9.0), "pattern": torch.tensor([-0.5, 0.5, 2])})
    assert out["pattern"].tolist() == [0, 0.5, 1]
    assert out["mask"].tolist() == [9]
    free = {"mask": torch.zeros(1, 1, 2, 2), "pattern": torch.ones(1, 3, 2, 2)}
    assert torch.allclose(ABS().stamp(free, torch.zeros(1, 1, 3, 2, 2)), torch.tensor(0.5))
    assert float(ABS().size(free, torch.zeros(1), torch.zeros(1))) == 2


def test_the_target_s_logit_may_weigh():
    logits = torch.tensor([[[2.0, 5.0], [4.0, 5.0]], [[1.0, 7.0], [1.0, 9.0]]])
    target = torch.tensor([0, 1])
    assert ABS().loss(logits, target).tolist() == [0, 0]
    assert ABS(logit=2.0).loss(logits, target).tolist() == [-6, -16]


# ------------------------------------------------------------------------------------- the filter


def test_what_lies_around_a_pixel():
    x = torch.rand(1, 2, 5, 6, generator=stream(0, "x"))
    got = ABSFilter(window=0.6)._around(x)  # windows of 3x4
    assert got.shape == (1, 8, 5, 6)
    assert torch.equal(got[:, :2], x)
    for row in range(5):
        for column in range(6):
            part = x[0, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 3].flatten(1)
            seen = got[0, 2:, row, column].view(3, 2)
            assert torch.equal(seen[0], part.amax(1))
            assert torch.equal(seen[1], part.amin(1))
            assert torch.allclose(seen[2], part.mean(1))


def test_a_filter_starts_as_the_image_and_mixes():
    x = torch.rand(2, 3, 3, 16, 16, generator=stream(0, "x"))
    start = ABSFilter().begin(x[0], stream(0))["mix"]
    at = {"mix": torch.stack([start, start])}
    assert torch.allclose(ABSFilter().stamp(at, x), x)
    assert ABSFilter().size(at, x, x).tolist() == pytest.approx([0, 0], abs=1e-5)
    at["mix"] = at["mix"].clone()
    at["mix"][1, 1, 0] = 0.5  # half of the green on top of the red
    out = ABSFilter().stamp(at, x)
    assert torch.allclose(out[0], x[0])
    assert torch.allclose(out[1, :, 0], (x[1, :, 0] + x[1, :, 1] / 2).clamp(0, 1), atol=1e-6)
    assert torch.allclose(out[1, :, 1:], x[1, :, 1:], atol=1e-6)
    mix = ABSFilter().projected({"mix": torch.tensor([-3.0, 0.5, 3.0])})["mix"]
    assert mix.tolist() == [-1, 0.5, 1]


def test_unlike_images_cost_much_more():
    x = torch.rand(2, 2, 3, 16, 16, generator=stream(0, "x"))
    shown = torch.stack([x[0], 1 - x[1]])
    shown[0] = (x[0] + 0.1).clamp(0, 1)
    lack = [1 - float(similarity(a, b).mean()) for a, b in zip(x, shown, strict=True)]
    assert lack[0] < 0.8 < lack[1]
    assert ABSFilter().size({}, x, shown).tolist() == pytest.approx(lack, abs=1e-5)
    expected = [0.4 * lack[0], 400 * lack[1]]
    assert ABSFilter().penalty({}, x, shown).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_filter_raises_the_neuron_of_a_colour(inner, coloured):
    found = analysed(inner, coloured, 0)
    neuron = next(one for one in found.candidates() if one.channel == 2)
    family = ABSFilter()
    driver = Driver(found, [found.problem(neuron)], family.others)
    search = quick(family, samples=12, steps=60, batch=12, asr=2.0, lr=0.01)
    (answer,) = invert(inner, family, [found.problem(neuron)], coloured, search, guide=driver)
    assert answer.asr > 0.9
    others = to_float(coloured.x[coloured.y != 2])
    shown = stamped(family, answer.trigger, others)
    assert activation(inner, shown, 2) > activation(inner, others, 2) + 0.5
    assert float(similarity(others, shown).mean()) > 0.2
