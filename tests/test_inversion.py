"""The inversion engine: every problem as if it were alone, however many there are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import toys
from torch import nn

from arena.core import models
from arena.core.inversion import engine
from arena.core.inversion.engine import Problem, Search, invert, rows_of, stamped
from arena.core.inversion.frozen import Frozen, saved_bytes
from arena.core.registry import BadInput, short_spec
from arena.core.seeding import stream
from arena.inversions.cw import CW
from arena.inversions.filter import Filter
from arena.inversions.nc import NC
from arena.inversions.pixel import Pixel
from arena.inversions.uap import UAP

SHAPE = (3, toys.SIDE, toys.SIDE)
QUICK = Search(samples=12, steps=30, batch=6)
ALL = [Problem(v, t) for v in (None, 1, 2) for t in (0, 3)]


class Corner(nn.Module):
    """The colour that is raised decides, and on top the corner's 2x2 pixels speak for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, toys.SIDE, toys.SIDE))
        with torch.no_grad():
            for colour in range(3):
                self.weight[colour, colour] = 40 / toys.SIDE**2
            self.weight[0, :, -2:, -2:] += 3.0

    def forward(self, x):
        return x.flatten(1) @ self.weight.flatten(1).T


@pytest.fixture(scope="module")
def cornered() -> Frozen:
    model = toys.planted()
    model.body = Corner()
    return Frozen(model, "fp32")


def same(one, two) -> None:
    assert (one.problem, one.size, one.asr, one.steps) == (
        two.problem,
        two.size,
        two.asr,
        two.steps,
    )
    assert one.trigger.keys() == two.trigger.keys()
    for name, value in one.trigger.items():
        assert torch.equal(value, two.trigger[name]), name


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "vgg11", "fastnet", "nin"])
def test_a_frozen_network_answers_as_the_model_does(name):
    model = models.build(name, 10, (3, 32, 32), stream(0, name))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=stream(0, "mean"))
            module.running_var.uniform_(0.5, 2, generator=stream(0, "var"))
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(4, 3, 32, 32, generator=stream(0, "x"))
    frozen = Frozen(model.train(), "fp32")
    assert torch.allclose(frozen(x), model.eval()(x), atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters()) or name == "fastnet"
    assert not any(weight.requires_grad for weight in frozen.parameters())
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (frozen, model)]
    assert norms[0] < norms[1] or name == "nin"
    low = Frozen(model, "bf16")(x)
    assert low.dtype == torch.float32
    assert (low - model(x)).abs().max() < 0.1 * model(x).abs().max() + 0.05


class Fork(nn.Module):
    """What no tracer follows."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) if float(x.sum()) > -1e9 else x


def test_a_network_that_cannot_be_traced_is_used_as_it_is():
    model = toys.planted()
    x = torch.rand(4, *SHAPE, generator=stream(0, "x"))
    expected = model(x)
    model.body = Fork(model.body)
    assert torch.allclose(Frozen(model, "fp32")(x), expected, atol=1e-5)


def test_memory_is_what_the_backward_pass_needs():
    frozen = Frozen(toys.planted(), "fp32")
    x = torch.rand(2, *SHAPE, requires_grad=True)
    need = saved_bytes(lambda: frozen(x), frozen)
    maps = 2 * 4 * toys.SIDE**2  # bytes of a float32 map of each image
    # normalised images; three convolutions' inputs and ReLU's outputs of five channels
    assert 10 * maps < need < 60 * maps
    assert need == saved_bytes(lambda: frozen(x), frozen)


# --------------------------------------------------------------------------------- the images


def test_a_problem_s_images_are_of_the_victim_class_or_evenly_of_the_others():
    y = torch.arange(200) % 5
    own = rows_of(Problem(2, 0), y, 30, seed=0)
    assert (y[own] == 2).all()
    assert len(own.unique()) == 30
    others = rows_of(Problem(None, 4), y, 30, seed=0)
    assert y[others].bincount(minlength=5).tolist() == [7, 8, 7, 8, 0]
    assert torch.equal(own, rows_of(Problem(2, 1, restart=3), y, 30, seed=0))
    assert not torch.equal(own, rows_of(Problem(2, 0), y, 30, seed=1))


@pytest.mark.parametrize(
    ("problem", "samples", "message"),
    [
        (Problem(1, 1), 3, "Victim and target are both class 1"),
        (Problem(1, 0), 41, "Class 1 has 40 images, but 41 are asked for"),
        (Problem(7, 0), 3, "no images of class 7"),
        (Problem(-1, 0), 3, "There is no class -1"),
    ],
)
def test_problems_without_images_are_refused(problem, samples, message):
    with pytest.raises(BadInput, match=message):
        rows_of(problem, torch.arange(200) % 5, samples, seed=0)


# ------------------------------------------------------------------------------------- the search


def test_the_planted_trigger_is_found_and_no_other(cornered, coloured):
    problems = [Problem(None, target) for target in range(3)]
    search = Search(samples=30, steps=300, batch=15)
    found = invert(cornered, NC(), problems, coloured, search)
    sizes = [answer.size for answer in found]
    assert None not in sizes
    assert sizes[0] < 5  # the corner's four pixels
    assert min(sizes[1:]) > 5 * sizes[0]
    mask = found[0].trigger["mask"].tanh()[0] / 2 + 0.5
    assert mask[-2:, -2:].sum() > 0.9 * mask.sum(), "elsewhere than in the corner"
    x = coloured.x[coloured.y != 0] / 255
    assert (cornered(stamped(NC(), found[0].trigger, x)).argmax(1) == 0).float().mean() > 0.8
    assert all(answer.asr >= 0.9 for answer in found)


def test_answers_do_not_depend_on_what_else_is_asked(separate, images):
    together = invert(separate, NC(), ALL, images, QUICK)
    for place in (0, 3, 5):
        (alone,) = invert(separate, NC(), [ALL[place]], images, QUICK)
        same(alone, together[place])
    for slots in (1, 4):
        few = invert(separate, NC(), ALL, images, QUICK, slots=slots)
        for one, two in zip(few, together, strict=True):
            same(one, two)


def test_restarts_and_seeds_draw_anew(frozen, images):
    problems = [Problem(1, 0, 0), Problem(1, 0, 1)]
    one, two = invert(frozen, NC(), problems, images, QUICK)
    assert not torch.equal(one.trigger["mask"], two.trigger["mask"])
    other, _ = invert(frozen, NC(), problems, images, QUICK, seed=1)
    assert not torch.equal(one.trigger["mask"], other.trigger["mask"])


class Stopped(Exception):
    pass


class Kept:
    """A checkpoint that stops the run when it has been written to `stop_at` times."""

    def __init__(self, stop_at: int) -> None:
        self.state, self.saves, self.stop_at = None, 0, stop_at

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state, self.saves = copy.deepcopy(state), self.saves + 1
        if self.saves == self.stop_at:
            raise Stopped


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_goes_on_where_it_was(frozen, images, monkeypatch, stop_at):
    monkeypatch.setattr(engine, "_SAVE", -1.0)
    whole = invert(frozen, NC(), ALL, images, QUICK, slots=2)
    kept = Kept(stop_at)
    with pytest.raises(Stopped):
        invert(frozen, NC(), ALL, images, QUICK, slots=2, checkpoint=kept)
    passes = []
    advance = engine._Run._advance
    monkeypatch.setattr(
        engine._Run, "_advance", lambda run, state: (passes.append(1), advance(run, state))
    )
    rest = invert(frozen, NC(), ALL, images, QUICK, slots=2, checkpoint=kept)
    assert len(passes) == 90 - 10 * stop_at, "work was done again"
    for one, two in zip(whole, rest, strict=True):
        same(one, two)


def test_what_cannot_be_reached_has_no_size(frozen, images):
    search = replace(QUICK, steps=10, lr=1e-6)
    (answer,) = invert(frozen, NC(), [Problem(1, 2)], images, search)
    assert answer.size is None
    assert answer.asr < 0.9
    assert answer.steps == 10


def test_the_number_of_passes_is_kept_even_between_two_looks(frozen, images):
    for steps in (3, 10, 14):
        (answer,) = invert(frozen, NC(), [Problem(1, 0)], images, replace(QUICK, steps=steps))
        assert answer.steps == steps


def test_a_search_that_stalls_ends(frozen, images):
    search = Search(samples=12, steps=2000, batch=6, stall=40)
    (answer,) = invert(frozen, NC(), [Problem(None, 0)], images, search)
    assert answer.size is not None
    assert answer.steps < 1000


def test_a_weight_that_follows_every_pass_saves_passes_and_costs_no_size(frozen, images):
    """As published code searches, but for the end: after fifty passes, too."""
    problems = [Problem(None, target) for target in range(4)]
    passes, sizes = {}, {}
    for weight in ("steady", "steps"):
        search = replace(NC(weight=weight).usual, samples=12, steps=600, batch=6, stall=50)
        found = invert(frozen, NC(weight=weight), problems, images, search)
        assert all(one.size and one.asr >= search.asr for one in found)
        passes[weight] = sum(one.steps for one in found)
        sizes[weight] = sum(one.size for one in found)
    assert passes["steady"] < 0.9 * passes["steps"]
    assert sizes["steady"] < 1.02 * sizes["steps"]


def run_of(frozen, images, search, problems=None):
    problems = problems or [Problem(1, 0)]
    run = engine._Run(frozen, NC(), tuple(problems), images, search, 0, None, "test")
    run.slots = len(problems)
    return run, run._begun(range(len(problems)))


@pytest.mark.parametrize(("asr", "factor"), [(0.0, 1.5), (2.0, 1 / 1.5**1.5)])
def test_the_weight_follows_the_success(frozen, images, asr, factor):
    run, state = run_of(frozen, images, replace(QUICK, asr=asr, cost=0.01, patience=4))
    seen = []
    for _ in range(9):
        run._advance(state)
        seen.append(float(state["cost"]))
    expected = [0.01] * 3 + [0.01 * factor] * 4 + [0.01 * factor**2] * 2
    assert seen == pytest.approx(expected)
    if asr > 1:
        assert int(state["turns"]) == 0, "nudged though nothing succeeded"
        assert state["record"].isinf().all()


def test_the_size_may_wait_for_the_first_successes(frozen, images):
    search = replace(QUICK, asr=0.0, cost=0.01, patience=3, wait=True)
    run, state = run_of(frozen, images, search)
    seen = []
    for _ in range(7):
        run._advance(state)
        seen.append(round(float(state["cost"]), 4))
    assert seen == [0, 0, 0.01, 0.01, 0.01, 0.015, 0.015]


class Dull(NC):
    """Its size is how bright the images are, in 1/255: no trigger is smaller than another."""

    sized_by_images = True

    def size(self, at, x, stamped):
        return (255 * x).round().flatten(1).sum(1)


def test_a_size_that_differs_between_images_is_that_of_all_of_them(frozen, images):
    run, state = run_of(frozen, images, replace(QUICK, asr=0.0))
    run.family = Dull()
    for _ in range(5):
        run._advance(state)
    assert int(state["turns"]) == 1, "a trigger won by the images of its last update"
    x = (images.x[run.rows[0]].double()).sum()
    assert float(state["record"]) == pytest.approx(float(x) / run.parts)


def test_updates_are_those_of_adam(frozen, images):
    run, state = run_of(frozen, images, replace(QUICK, lr=0.03), [Problem(1, 0), Problem(2, 0)])
    weight = nn.Parameter(state["free.mask"][1].clone())
    adam = torch.optim.Adam([weight], lr=0.03, betas=(0.5, 0.9))
    for step in range(5):
        slope = torch.randn(2, *weight.shape, generator=stream(0, step))
        free = {name: state[f"free.{name}"] for name in ("mask", "pattern")}
        slopes = {"mask": slope, "pattern": torch.zeros_like(free["pattern"])}
        run._update(state, free, slopes)
        weight.grad = slope[1].clone()
        adam.step()
        assert torch.allclose(state["free.mask"][1], weight, atol=1e-6)


def test_memory_says_how_many_go_at_once(frozen, images):
    run, state = run_of(frozen, images, QUICK)
    one = {name: value[:1] for name, value in state.items()}
    leaves = {"mask": one["free.mask"].requires_grad_(), "pattern": one["free.pattern"]}
    leaves["pattern"].requires_grad_()
    x = images.x[one["rows"][:, :6]] / 255
    part = engine._WORKING * saved_bytes(lambda: run._losses(one, leaves, x), frozen)
    part += 2 * sum(v.numel() * v.element_size() for v in one.values())
    assert run._room(5.5 * part) == 5
    with pytest.raises(BadInput, match=r"One problem needs about \d MiB"):
        run._room(0.5 * part)


@pytest.mark.parametrize("fewer", [1, 2])
def test_a_run_that_goes_on_in_less_memory_keeps_to_it(separate, images, monkeypatch, fewer):
    """More problems are under way than now fit; the answers are the same."""
    many = [replace(problem, restart=turn) for turn in (0, 1) for problem in ALL]
    whole = invert(separate, NC(), many, images, QUICK, slots=4)
    monkeypatch.setattr(engine, "_SAVE", -1.0)
    kept = Kept(1)
    with pytest.raises(Stopped):
        invert(separate, NC(), many, images, QUICK, slots=4, checkpoint=kept)
    assert len(kept.state["index"]) == 4
    advance, at_once, under_way = engine._Run._advance, [], []
    monkeypatch.setattr(
        engine._Run,
        "_advance",
        lambda run, state: (at_once.append(len(state["passes"])), advance(run, state)),
    )
    monkeypatch.setattr(
        engine._Run, "_tell", lambda run, state: under_way.append(len(state.get("passes", ())))
    )
    resumed = invert(separate, NC(), many, images, QUICK, slots=fewer, checkpoint=kept)
    assert max(at_once) == fewer
    assert max(under_way) <= 4, "no other enters before there is room"
    for one, two in zip(whole, resumed, strict=True):
        same(one, two)


def test_arms_advance_in_parts_that_fit(frozen, images, monkeypatch):
    def sizes(at_once: int) -> list[float]:
        monkeypatch.setattr(engine._Run, "_room", lambda run, memory: at_once)
        arms = engine.Arms(frozen, NC(), ALL[:5], images, QUICK, seed=0)
        advance, most = engine._Run._advance, []
        with monkeypatch.context() as patch:
            patch.setattr(
                engine._Run,
                "_advance",
                lambda run, state: (most.append(len(state["passes"])), advance(run, state)),
            )
            for _ in range(12):
                arms.advance([0, 2, 3, 4])
        assert max(most) == min(at_once, 4)
        assert arms.passes() == [12, 0, 12, 12, 12]
        return arms.sizes()

    assert sizes(3) == pytest.approx(sizes(9))


# ------------------------------------------------------------------------------------ the families


ANY = torch.zeros(1)  # images that a size does not depend on
FAMILIES = [NC(), Pixel(), Pixel(form="clip"), Filter(), UAP(), CW()]


@pytest.mark.parametrize("family", FAMILIES, ids=short_spec)
def test_every_family_s_answers_are_its_own(separate, images, family):
    search = replace(family.usual, samples=12, steps=20, batch=6)
    together = invert(separate, family, ALL[:4], images, search, slots=3)
    for place in (1, 3):
        (alone,) = invert(separate, family, [ALL[place]], images, search)
        same(alone, together[place])
        x = images.x[:20] / 255
        shown = stamped(family, alone.trigger, x)
        assert shown.shape == x.shape
        assert 0 <= float(shown.min()) <= float(shown.max()) <= 1


@pytest.mark.parametrize("family", FAMILIES, ids=short_spec)
def test_families_keep_problems_apart_and_images_in_range(family):
    few = torch.rand(4, *SHAPE, generator=stream(0, "few"))
    free = [family.begin(few, stream(0, restart)) for restart in range(3)]
    stacked = {name: torch.stack([one[name] for one in free]) for name in free[0]}
    x = torch.rand(3, 5, *SHAPE, generator=stream(0, "x"))
    out = family.stamp(stacked, x)
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1
    sizes = family.size(stacked, ANY, ANY)
    for place, one in enumerate(free):
        alone = {name: value[None] for name, value in one.items()}
        assert torch.equal(family.stamp(alone, x[place : place + 1])[0], out[place])
        assert torch.allclose(family.size(alone, ANY, ANY)[0], sizes[place])
        shown = family.stamp(alone, x[:1])
        assert family.penalty(alone, x[:1], shown).shape == (1,)


def test_a_mask_and_a_pattern_by_hand():
    mask, pattern = torch.zeros(1, 1, 2, 2), torch.full((1, 3, 2, 2), 20.0)
    mask[0, 0, 0, 0], mask[0, 0, 1, 1] = 20.0, -20.0
    free = {"mask": mask, "pattern": pattern}
    out = NC().stamp(free, torch.zeros(1, 1, 3, 2, 2))[0, 0, 0]
    assert torch.allclose(out, torch.tensor([[1.0, 0.5], [0.5, 0.0]]), atol=1e-5)
    assert NC().size(free, ANY, ANY).item() == pytest.approx(2.0, abs=1e-4)
    assert NC().penalty(free, out, out).item() == pytest.approx(2.0, abs=1e-4)


def test_a_mask_goes_on_from_near_the_best():
    free = {"mask": torch.tensor([-1.0, 0.0, 1.0, 9.0])}
    shown = free["mask"].tanh() / 2 + 0.5
    for sign in (-1.0, 1.0):
        moved = NC(nudge=0.02).nudged(free, {"mask": torch.full((4,), sign)})["mask"]
        expected = (shown + sign * 0.02).clamp(0, 1)
        assert torch.allclose(moved.tanh() / 2 + 0.5, expected, atol=1e-5)
        assert torch.isfinite(moved).all()


def test_pixels_are_counted_where_any_channel_changes():
    plus, minus = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), -1.0)
    plus[0, 0, 0, 0] = plus[0, 2, 0, 0] = 0.5  # one pixel
    minus[0, 1, 0, 1] = 2 / 255  # another
    plus[0, 1, 3, 3] = 0.5 / 255  # too faint for 8 bits
    free, family = {"plus": plus, "minus": minus}, Pixel(form="clip")
    assert family.size(free, ANY, ANY).item() == 2
    kept = family.kept(free)
    assert kept["plus"][0, 1, 3, 3] == 0
    out = family.stamp(free, torch.full((1, 1, 3, 4, 4), 0.25))[0, 0]
    assert out[0, 0, 0] == 0.75
    assert float(out[1, 0, 1]) == pytest.approx(0.25 - 2 / 255)
    soft = 15 * (torch.tensor(-0.1).tanh() / 2 + 0.5) + (torch.tensor(0.05).tanh() / 2 + 0.5)
    free = {"plus": plus.where(plus != 0.5 / 255, -1.0), "minus": torch.full_like(plus, -1e9)}
    assert float(family.penalty(free, out, out)) == pytest.approx(float(soft), rel=1e-5)


def test_the_tanh_form_goes_on_from_the_trigger_that_was_best():
    free = {"plus": torch.tensor([[[[-1.0, 0.3, -9.0]]]]), "minus": torch.full((1, 1, 1, 3), -9.0)}
    kept = Pixel().kept(free)
    x = torch.full((1, 1, 1, 1, 3), 0.1)
    family = Pixel()
    assert torch.allclose(family.stamp(kept, x), family.stamp(free, x), atol=1 / 255)
    assert family.size(kept, ANY, ANY).item() == family.size(free, ANY, ANY).item() == 2


@pytest.mark.parametrize("family", [Pixel(), Pixel(form="clip")])
def test_pixels_of_the_planted_trigger(cornered, coloured, family):
    search = Search(samples=30, steps=400, batch=15)
    to_corner, other = invert(
        cornered, family, [Problem(None, 0), Problem(None, 1)], coloured, search
    )
    assert to_corner.size is not None
    assert to_corner.size <= 6
    assert other.size > 5 * to_corner.size
    assert to_corner.asr >= 0.9


def test_a_filter_sets_mean_and_deviation_of_every_channel():
    x = torch.rand(1, 5, 3, 8, 8, generator=stream(0, "x")) * 0.5 + 0.25
    at = Filter().begin(x[0], stream(0, "begin"))
    at = {name: value[None] for name, value in at.items()}
    at["mean"], at["deviation"] = torch.tensor([[0.4, 0.5, 0.6]]), torch.tensor([[0.1, 0.05, 0.02]])
    out = Filter().stamp(at, x)
    assert torch.allclose(out.mean((3, 4)), at["mean"][:, None].expand(1, 5, 3), atol=1e-5)
    found = out.std((3, 4), correction=0)
    assert torch.allclose(found, at["deviation"][:, None].expand(1, 5, 3), atol=1e-5)
    off = (at["mean"] - x.mean((0, 1, 3, 4))).abs().sum()
    off = off + (at["deviation"] - x.std((3, 4), correction=0).mean((0, 1))).abs().sum()
    assert float(Filter().size(at, ANY, ANY)) == pytest.approx(255 * float(off), rel=1e-4)


def test_a_filter_leaves_images_of_one_colour_finite():
    x = torch.full((1, 2, 3, 4, 4), 0.5, requires_grad=True)
    at = {k: v[None] for k, v in Filter().begin(x[0].detach(), stream(0, "begin")).items()}
    out = Filter().stamp(at, x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()


def test_a_filter_is_found_where_a_colour_decides(cornered, coloured):
    search = replace(Filter().usual, samples=30, steps=200)
    (answer,) = invert(cornered, Filter(), [Problem(1, 2)], coloured, search)
    assert answer.size is not None
    raised = answer.trigger["mean"] - answer.trigger["_mean"]
    assert raised[2] - raised[1] > 0.3  # 115 of 255 lie between the two classes' colours


def test_a_universal_perturbation_stays_in_its_ball_and_keeps_the_best(frozen, coloured):
    family = UAP(eps=40.0)
    search = replace(family.usual, samples=30, steps=120)
    (answer,) = invert(frozen, family, [Problem(1, 2)], coloured, search)
    assert answer.size == pytest.approx(40, abs=0.01)
    change = answer.trigger["change"] * 255
    assert change[2].mean() > 35  # the planted network looks at the mean of a colour
    assert change[1].mean() < -35


def test_cross_entropy_counts_up_to_beta():
    logits = torch.tensor([[[0.0, 30.0], [0.0, 0.0]]])
    loss = UAP(beta=5.0).loss(logits, torch.tensor([0]))
    assert float(loss) == pytest.approx((5 + 0.6931) / 2, abs=1e-3)


def test_what_cw_paints_and_what_it_gives_up():
    left = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    at = {"paint": torch.full((1, 1, 2, 2), 9.0), "left": left, "_mean": torch.zeros(1, 1, 2, 2)}
    x = torch.full((1, 1, 1, 2, 2), 0.25)
    assert torch.allclose(CW().stamp(at, x)[0, 0, 0], torch.tensor([[1.0, 1.0], [1.0, 0.25]]))
    assert float(CW().size(at, ANY, ANY)) == 3
    slopes = {"paint": torch.tensor([[[[3.0, -1.0], [2.0, 0.1]]]]), "left": torch.zeros_like(left)}
    kept = CW(share=0.3).thinned(at, slopes, torch.tensor([True]))["left"]
    assert kept.tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]]  # the least important of those left
    kept = CW(share=0.3).thinned(at, slopes, torch.tensor([False]))["left"]
    assert torch.equal(kept, left)


def test_the_margin_of_cw():
    logits = torch.tensor([[[2.0, 5.0, 1.0], [9.0, 5.0, 1.0]]])
    assert float(CW(kappa=1.0).loss(logits, torch.tensor([0]))) == pytest.approx((3 - 1) / 2)
    assert float(CW().loss(logits, torch.tensor([0]))) == pytest.approx((3 - 4) / 2)


def test_cw_gives_up_most_but_the_planted_corner(cornered, coloured):
    search = replace(CW().usual, samples=30, steps=400)
    (answer,) = invert(cornered, CW(), [Problem(None, 0)], coloured, search)
    assert answer.size is not None
    assert answer.size < 40
    assert answer.trigger["left"][0, -2:, -2:].sum() >= 2
