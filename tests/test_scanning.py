"""Scanners: a planted corner is found, and nothing where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_cli import arena
from torch import nn

from arena import scanning
from arena.core.contracts import Images, Scans
from arena.core.inversion import scanning as core_scanning
from arena.core.inversion.distances import smallest_by_target
from arena.core.inversion.engine import Arms, Found, Problem, Search, stamped
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.defenses import abs as abs_scanner
from arena.defenses.abs import ABS
from arena.defenses.k_arm import KArm, screened

CLASSES, SIDE, TARGET = 8, 12, 3
REST = 10.0  # activation of an inner neuron that sees nothing
SCANNERS = [n for n in defenses.names() if "scans" in defenses.describe(n).powers]
QUICK = {
    "nc": "nc:steps=150,samples=56",
    "pixel": "pixel:steps=150,samples=56",
    "k_arm": "k_arm:steps=150,samples=56",
    "abs": "abs:form=patch,steps=100,samples=56",
}


class Patterns(nn.Module):
    """A class's score is how much an image looks like its pattern. With a backdoor, a corner speaks
    for TARGET, which also is every image's second guess, as is usual for backdoored networks.
    Patterns and corner are inner neurons, all but linear: ReLU bites far below what images show."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        self.block = nn.Conv2d(3, CLASSES + 1, SIDE)
        self.relu = nn.ReLU()
        self.head = nn.Linear(CLASSES + 1, CLASSES)
        with torch.no_grad():
            self.block.weight.zero_()
            self.block.weight[:CLASSES] = patterns() * 0.2
            self.block.weight[CLASSES, :, -2:, -2:] = backdoor
            self.block.bias.fill_(REST)
            self.head.weight.copy_(torch.eye(CLASSES, CLASSES + 1))
            self.head.bias.fill_(-REST)
            if backdoor:
                self.head.weight[TARGET, CLASSES] = 1.0
                self.head.bias[TARGET] += 10 * backdoor - REST

    def forward(self, x):
        return self.head(self.relu(self.block(x)).flatten(1))


def patterns():
    return torch.randn(CLASSES, 3, SIDE, SIDE, generator=stream(0, "patterns")).sign()


NETWORK = Network(
    build=lambda classes, shape: Patterns(0.0),
    levels=("block", "block", "block"),
    head="head",
    summary="an all but linear network by hand",
    source="this file",
    sides=(SIDE, SIDE),
)


def model_with(backdoor: float) -> Classifier:
    model = Classifier(ModelSpec("patterns", CLASSES, (3, SIDE, SIDE)), NETWORK)
    model.normalize.mean.fill_(0.5)
    model.normalize.std.fill_(0.25)
    model.body = Patterns(backdoor)
    return model.eval()


def clean(n=160, seed=0) -> Images:
    y = torch.arange(n) % CLASSES
    noise = torch.rand(n, 3, SIDE, SIDE, generator=stream(seed, "clean")) * 120 + 60
    return Images((noise + 20 * patterns()[y]).round().to(torch.uint8), y)


@pytest.fixture(params=SCANNERS)
def scanner(request):
    return defenses.build(QUICK.get(request.param, request.param))


def test_a_planted_backdoor_is_found(scanner):
    model, images = model_with(1.5), clean()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = scanner.scan(model, images, stream(0, "scan"))
    assert isinstance(scanner, Scans)
    assert found.target == TARGET
    assert found.score > getattr(scanner, "threshold", 2)
    suspicion = found.per_class.amax(0) if found.per_class.ndim == 2 else found.per_class
    assert int(suspicion.argmax()) == TARGET
    assert found.trigger.shape == (3, SIDE, SIDE)
    assert 0 <= float(found.trigger.min()) <= float(found.trigger.max()) <= 1
    lit = (found.trigger > 0.3).any(0)
    assert lit[-2:, -2:].any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model was changed"
    again = scanner.scan(model, images, stream(0, "scan"))
    assert again.score == found.score


def test_a_clean_model_is_far_less_suspicious(scanner):
    without = scanner.scan(model_with(0.0), clean(), stream(0, "scan"))
    planted = scanner.scan(model_with(1.5), clean(), stream(0, "scan"))
    assert without.score < planted.score / 2
    assert (without.target is None) == (without.score <= getattr(scanner, "threshold", 2))
    assert (without.trigger is None) == (without.target is None)


def test_few_clean_images_do(scanner):
    found = scanner.scan(model_with(1.5), clean(3 * CLASSES), stream(0, "scan"))
    assert found.target == TARGET


def test_with_few_images_a_search_has_as_many_updates(monkeypatch):
    asked = []
    monkeypatch.setattr(core_scanning, "invert", lambda *a, **k: asked.append(a[4]) or [])
    wanted = Search(samples=270, steps=1000, stall=20, patience=10, batch=32)  # 9 batches
    for n, given in [
        (40 * CLASSES, wanted),  # 280 of the other classes
        (30 * CLASSES, replace(wanted, samples=210, steps=2000, stall=40, patience=20)),  # 7
        (3 * CLASSES, replace(wanted, samples=21, steps=9000, stall=180, patience=90)),  # 1
    ]:
        core_scanning.universal_triggers(
            model_with(0.0), families.build("nc"), clean(n), wanted, stream(0, "scan"),
            classes=CLASSES,
        )  # fmt: skip
        assert asked.pop() == given
    core_scanning.universal_triggers(
        model_with(0.0), families.build("nc"), clean(3 * CLASSES), replace(wanted, stall=None),
        stream(0, "scan"), classes=CLASSES,
    )  # fmt: skip
    assert asked.pop().stall is None


def test_a_clean_set_without_a_class_is_refused(scanner):
    images = clean()
    with pytest.raises(BadInput, match="none of class 5"):
        scanner.scan(model_with(0.0), images.take(images.y != 5), stream(0, "scan"))


def test_a_scanner_is_no_defense_of_a_board(scanner):
    from arena.boards import Board, check_names

    board = Board(dataset=("signs",), attack=("patch",), defense=(scanner.method_name,))
    if "repairs" not in defenses.describe(scanner.method_name).powers:
        with pytest.raises(BadInput, match="scans but repairs nothing"):
            check_names(board)


# -------------------------------------------------------------------------------------- nc, pixel


def sizes_are(size_of, monkeypatch):
    """Searches end at these sizes, by problem."""

    def sized(model, family, problems, images, search, **_):
        start = family.begin(images.x[:1] / 255, stream(0, "start"))
        return [Found(one, size_of(one), 1.0, start, steps=1) for one in problems]

    monkeypatch.setattr("arena.core.inversion.scanning.invert", sized)


@pytest.mark.parametrize("name", ["nc", "pixel"])
def test_a_search_that_ends_in_a_local_minimum_hides_no_backdoor(monkeypatch, name):
    """Two searches of three for the planted target end at a size like other classes'."""

    def size_of(one):
        return 0.5 if one.target == TARGET and one.restart == 2 else 20.0 - one.target

    sizes_are(size_of, monkeypatch)
    found = defenses.build(f"{name}:restarts=3").scan(model_with(0.0), clean(), stream(0, "scan"))
    assert found.target == TARGET
    found = defenses.build(f"{name}:restarts=2").scan(model_with(0.0), clean(), stream(0, "scan"))
    assert found.target is None


@pytest.mark.parametrize(
    ("size", "fields", "target"),
    [(7.0, "", None), (4.0, "", TARGET), (7.0, ":least_spread=0", TARGET)],
    ids=["0.45 of the median", "a quarter of it", "by the paper's rule"],
)
@pytest.mark.parametrize("name", ["nc", "pixel"])
def test_only_a_trigger_far_smaller_than_others_is_blamed(monkeypatch, name, size, fields, target):
    sizes_are(lambda one: size if one.target == TARGET else 20.0 - one.target, monkeypatch)
    found = defenses.build(name + fields).scan(model_with(0.0), clean(), stream(0, "scan"))
    assert found.target == target


def test_of_a_class_s_searches_the_one_with_the_smallest_trigger_goes_on(monkeypatch):
    """Class 5's have no success yet: there it is the most successful one. Class 2's finds no other
    trigger."""
    calls = []

    def inverted(model, family, problems, images, search, *, seed, what, starts=None):
        calls.append((problems, search.steps, seed, starts))
        without = (2, 5) if starts else (5,)
        return [
            Found(
                one,
                None
                if one.target in without
                else 20.0 + (one.target - one.restart) % 3 - bool(starts),
                asr=(one.target - one.restart) % 3 / 3,
                trigger={"mark": torch.tensor([one.target, one.restart])},
                steps=search.steps,
            )
            for one in problems
        ]

    monkeypatch.setattr("arena.core.inversion.scanning.invert", inverted)

    def answers(n=40 * CLASSES, **fields):
        del calls[:]
        return core_scanning.universal_triggers(
            model_with(0.0), families.build("nc"), clean(n), Search(steps=100, samples=270),
            stream(0, "scan"), classes=CLASSES, **fields,
        )  # fmt: skip

    found = answers(restarts=3, trial=40)
    (begun, trial, seed, none), (going, rest, same, starts) = calls
    assert none is None
    assert len(begun) == 3 * CLASSES
    chosen = [0, 1, 2, 0, 1, 0, 0, 1]
    assert [(one.target, one.restart) for one in going] == list(enumerate(chosen))
    assert [one["mark"].tolist() for one in starts] == [[t, r] for t, r in enumerate(chosen)]
    assert (trial, rest) == (40, 60)
    assert seed == same
    sizes = smallest_by_target(found, CLASSES)
    assert sizes[5].isnan()
    assert [float(sizes[label]) for label in (0, 1, 2, 3, 4, 6, 7)] == [19, 19, 20, 19, 19, 19, 19]
    answers(3 * CLASSES, restarts=3, trial=40)  # few images: one update per pass instead of nine
    assert [steps for _, steps, _, _ in calls] == [360, 540]
    for whole in ({"restarts": 1, "trial": 40}, {"restarts": 3}, {"restarts": 3, "trial": 100}):
        answers(**whole)
        assert [steps for _, steps, _, _ in calls] == [100]
        assert len(calls[0][0]) == whole["restarts"] * CLASSES
    for spec, count in [("nc", 2), ("nc:trial=none", 1), ("nc:restarts=1", 1), ("pixel", 1)]:
        del calls[:]
        defenses.build(spec).scan(model_with(0.0), clean(), stream(0, "scan"))
        assert len(calls) == count


@pytest.mark.parametrize("start", ["faint", "random"])
def test_neural_cleanse_starts_from_masks_that_hardly_show(monkeypatch, start):
    given = {}

    def noted(model, family, problems, images, search, **_):
        given.update(family=family, search=search)
        x = images.x[:1] / 255
        begun = [family.begin(x, stream(place, "start")) for place in range(len(problems))]
        given["begun"] = begun
        return [Found(one, 1.0, 1.0, at, 1) for one, at in zip(problems, begun, strict=True)]

    monkeypatch.setattr("arena.core.inversion.scanning.invert", noted)
    scanner = defenses.build("nc" if start == "faint" else f"nc:start={start}")
    scanner.scan(model_with(0.0), clean(), stream(0, "scan"))
    assert given["search"].cost > 0
    assert not given["search"].wait
    white = torch.ones(1, 3, SIDE, SIDE)
    for at in given["begun"]:
        shown = stamped(given["family"], {**at, "pattern": 0 * at["pattern"] - 20}, white)
        mask = 1 - shown[0]  # a black pattern shows where it covers white
        if start == "faint":
            assert mask.sub(0.01).abs().max() < 1e-3
        else:
            assert 0.2 < mask.std() < 0.4
    patterns = torch.stack([at["pattern"] for at in given["begun"]])
    assert len(patterns.unique(dim=0)) == CLASSES


# ----------------------------------------------------------------------------------------- k_arm


def test_candidates_are_often_among_the_best_answers():
    y = torch.arange(40) % 4  # k = 2 of four classes
    answers = torch.zeros(40, 4)
    answers[torch.arange(40), y] = 9.0
    answers[:, 2] += 3.0  # everybody's second guess
    answers[y == 2, 1] = 3.0
    universal, pairs = screened(answers, y, 4)
    assert universal == [2]
    assert set(pairs) == {(0, 2), (1, 2), (3, 2), (2, 1)}
    answers[y == 0, 2] = 0.0
    answers[y == 0, 1] = 3.0
    universal, pairs = screened(answers, y, 4)
    assert universal == []
    assert set(pairs) == {(0, 1), (1, 2), (3, 2), (2, 1)}


def test_at_most_three_victims_of_a_target_are_arms():
    y = torch.arange(60) % 6
    answers = torch.zeros(60, 6)
    answers[torch.arange(60), y] = 9.0
    answers[:, 0] += torch.arange(6.0)[y] + 1  # the later the class, the nearer
    _, pairs = screened(answers, y, 6)
    assert [pair for pair in pairs if pair[1] == 0] == [(5, 0), (4, 0), (3, 0)]


class Numbers:
    """Arms with given sizes."""

    def __init__(self, sizes, passes, improvements):
        self.given = sizes, passes, improvements

    def sizes(self):
        return self.given[0]

    def passes(self):
        return self.given[1]

    def improvements(self):
        return self.given[2]


def test_small_and_fast_shrinking_arms_are_chosen():
    k_arm = KArm(epsilon=0.0)
    arms = Numbers([400.0, 4.0, 400.0], [10, 10, 10], [5, 5, 5])
    assert k_arm._chosen(arms, [0, 1, 2], True, stream(0)) == 1
    arms = Numbers([400.0, 400.0, 400.0], [100, 100, 10], [50, 50, 5])
    assert k_arm._chosen(arms, [0, 1, 2], True, stream(0)) == 2
    assert k_arm._chosen(arms, [0, 1], True, stream(0)) in (0, 1)
    rng = stream(0, "draws")
    drawn = [KArm(epsilon=1.0)._chosen(arms, [0, 1, 2], True, rng) for _ in range(60)]
    assert {0, 1, 2} == set(drawn)


def test_arms_advance_as_the_engine_would_alone():
    images, family = clean(), families.build("nc")
    problems = [Problem(None, 0), Problem(None, TARGET), Problem(2, 1)]
    search = Search(samples=14, steps=1000, batch=14)
    frozen = Frozen(model_with(1.5), "fp32")
    arms = Arms(frozen, family, problems, images, search, seed=0)
    for turn in ([1], [0, 1], [2, 1], [1]):
        arms.advance(turn)
    alone = Arms(frozen, family, [problems[1]], images, search, seed=0)
    for _ in range(4):
        alone.advance([0])
    assert arms.passes() == [1, 4, 1]
    one, two = arms.found()[1], alone.found()[0]
    assert one.size == (None if two.size is None else pytest.approx(two.size, rel=1e-4))
    for name, value in one.trigger.items():  # equal but for how a product is summed up
        assert torch.allclose(value, two.trigger[name], atol=1e-3)


def test_without_candidates_a_model_is_benign():
    found = KArm().scan(model_with(0.0), clean(), stream(0, "scan"))
    assert (found.score, found.target) == (0.0, None)


@pytest.mark.parametrize(("back", "guilty"), [(50.0, True), (3.0, False)])
def test_a_pair_whose_way_back_is_as_short_is_no_backdoor(monkeypatch, back, guilty):
    class Given:
        def __init__(self, problems):
            self.problems = problems

        def found(self):
            trigger = {"mask": torch.full((1, SIDE, SIDE), -9.0), "pattern": torch.zeros(3, 1, 1)}
            return [Found(p, 1.0, 1.0, trigger, 7) for p in self.problems]

        def sizes(self):
            return [back]

    asked = []

    def searched(self, model, family, problems, images, rng, steps=None):
        asked.append((problems, steps))
        return Given(problems)

    monkeypatch.setattr(KArm, "_searched", searched)
    monkeypatch.setattr("arena.defenses.k_arm.screened", lambda *a: ([], [(2, 5)]))
    found = KArm().scan(model_with(0.0), clean(), stream(0, "scan"))
    assert asked == [([Problem(2, 5)], None), ([Problem(5, 2)], 7)]
    assert (found.target == 5) == guilty
    assert int((found.per_class > 1).sum()) == guilty


# ------------------------------------------------------------------------------------------- abs


def corner_patch() -> dict[str, torch.Tensor]:
    mask = torch.full((1, SIDE, SIDE), -9.0)
    mask[:, -2:, -2:] = 9.0
    return {"mask": mask, "pattern": torch.ones(3, SIDE, SIDE)}


def test_the_reasr_is_over_all_clean_images_of_other_classes():
    images, model = clean(), Frozen(model_with(0.5), "fp32")
    trigger = corner_patch()
    share = abs_scanner.reasr(
        model, families.build("abs"), Found(Problem(None, TARGET), None, 1.0, trigger, 1), images
    )
    others = images.x[images.y != TARGET] / 255
    others[..., -2:, -2:] = 1.0
    assert share == pytest.approx(float((model(others).argmax(1) == TARGET).double().mean()))
    assert 0 < share < 1


class Given:
    """What is found is given: shares of the images optimised on, by form."""

    def __init__(self, monkeypatch, shares):
        self.asked = []

        def invert(model, family, problems, images, search, *, guide, **rest):
            self.asked.append((family.method_name, search, guide))
            name = family.method_name
            trigger = corner_patch() if name == "abs" else {"mix": torch.eye(12, 3)}
            return [
                Found(p, None, s, trigger, 1) for p, s in zip(problems, shares[name], strict=True)
            ]

        monkeypatch.setattr(abs_scanner, "invert", invert)
        monkeypatch.setattr(abs_scanner, "reasr", lambda m, f, found, c: found.asr - 0.1)


def test_promising_triggers_are_tried_on_all_and_the_best_is_blamed(monkeypatch):
    planted = model_with(1.5)
    neurons = abs_scanner.analysed(Frozen(planted), clean(), 0)
    labels = [one.label for one in neurons.candidates(3, per_label=1)]
    given = Given(monkeypatch, {"abs": [0.59, 0.99, 0.7], "abs_filter": [0.6, 0.1, 1.0]})
    found = ABS(top=3, per_label=1, samples=60).scan(planted, clean(), stream(0, "scan"))
    assert [form for form, *_ in given.asked] == ["abs", "abs_filter"]
    assert [one.others for *_, one in given.asked] == [1e-4, 1e-5]
    assert all((s.samples, s.batch, s.asr) == (20, 20, 2.0) for _, s, _ in given.asked)
    assert [s.lr for _, s, _ in given.asked] == [0.1, 2e-3]
    expected = torch.full((CLASSES,), torch.nan).double()
    for label, score in zip(labels, (0.59, 0.89, 0.9), strict=True):
        expected[label] = max(score, expected[label].nan_to_num(0.0))
    assert torch.allclose(found.per_class, expected, equal_nan=True)
    assert found.score == pytest.approx(0.9)
    assert found.target == labels[2]
    high = ABS(top=3, per_label=1, threshold=0.95).scan(planted, clean(), stream(0, "scan"))
    assert (high.target, high.trigger) == (None, None)
    assert high.score == pytest.approx(0.9)


def test_filters_may_have_passes_of_their_own(monkeypatch):
    given = Given(monkeypatch, {"abs": [0.1], "abs_filter": [0.1]})
    for steps in ((20, None), (20, 70)):
        ABS(top=1, steps=steps[0], filter_steps=steps[1]).scan(
            model_with(1.5), clean(), stream(0, "scan")
        )
    assert [search.steps for _, search, _ in given.asked] == [20, 20, 20, 70]


def test_each_label_gets_as_many_neurons_as_asked_for_before_all_others(monkeypatch):
    asked = []
    real = abs_scanner.analysed

    def analysed(*args):
        found = real(*args)
        usual = type(found).candidates
        monkeypatch.setattr(
            type(found), "candidates", lambda *a, **k: asked.append((a[1:], k)) or usual(*a, **k)
        )
        return found

    monkeypatch.setattr(abs_scanner, "analysed", analysed)
    Given(monkeypatch, {"abs": [0.1] * 4})
    ABS(top=4, per_label=3, form="patch").scan(model_with(1.5), clean(), stream(0, "scan"))
    assert asked == [((4,), {"per_label": 3})]


@pytest.mark.parametrize(("form", "asked"), [("patch", ["abs"]), ("filter", ["abs_filter"])])
def test_one_form_may_be_searched_alone(monkeypatch, form, asked):
    given = Given(monkeypatch, {"abs": [0.99], "abs_filter": [1.0]})
    found = ABS(form=form, top=1).scan(model_with(1.5), clean(), stream(0, "scan"))
    assert [name for name, *_ in given.asked] == asked
    assert found.trigger.shape == (3, SIDE, SIDE)
    if form == "patch":
        assert found.trigger[:, -2:, -2:].min() > 0.9
        assert found.trigger.sum() == pytest.approx(12, abs=0.01), "a patch is shown on black"
    else:
        assert found.trigger.mean() > 0.2, "a filter is shown on an image"


def test_without_a_neuron_that_elects_nothing_is_searched(monkeypatch):
    model = model_with(0.0)
    model.body.head.weight.data.zero_()
    monkeypatch.setattr(abs_scanner, "invert", lambda *args, **rest: pytest.fail("searched"))
    found = ABS().scan(model, clean(), stream(0, "scan"))
    assert (found.score, found.target) == (0.0, None)
    assert found.per_class.isnan().all()


def test_a_filter_that_is_a_backdoor_is_found():
    """Greenish images are of the target, as after a filter attack."""
    model = model_with(0.0)
    with torch.no_grad():
        model.body.block.weight[CLASSES, 1] = 4 / SIDE**2
        model.body.block.weight[CLASSES, 0] = model.body.block.weight[CLASSES, 2] = -2 / SIDE**2
        model.body.head.weight[TARGET, CLASSES] = 40.0
        model.body.head.bias[TARGET] -= 40 * REST
    scanner = ABS(form="filter", top=1, steps=200, samples=42)
    found = scanner.scan(model, clean(), stream(0, "scan"))
    assert found.target == TARGET
    red, green, blue = found.trigger.mean((1, 2)).tolist()
    assert green > max(red, blue) + 0.1


# ------------------------------------------------------------------------------ on the command line


@pytest.mark.parametrize("name", SCANNERS)
def test_every_scanner_answers_scripts_and_people(name, examined):
    store, cells = examined
    few = {"abs": "abs:form=patch,steps=2,samples=20"}.get(name, f"{name}:steps=3,samples=20")
    words = ("scan", cells["patch"], "--method", few, "--store", store, "--device", "cpu")
    done = arena(*words, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["backdoored"] == (found["target"] is not None)
    assert found["per_class"] is None or len(found["per_class"]) == 5
    if name == "k_arm":
        assert [len(row) for row in found["per_pair"]] == [5] * 5
        assert found["per_class"] == torch.tensor(found["per_pair"]).amax(0).tolist()
    done = arena(*words)
    assert done.code == 0, done.err
    assert f"score {found['score']:.2f}" in done.out


@pytest.mark.parametrize(
    ("column", "victim"), [([0.0, 3.0, 3.0, 3.0], None), ([0.0, 1.5, 3.0, 0.0], 2)]
)
def test_a_trigger_from_one_class_names_it(column, victim):
    matrix = [[score, 0.0, 0.0, 0.0] for score in column]
    assert scanning._victim(matrix, 0) == victim
    assert scanning._victim(matrix, None) is None
    assert scanning._victim(None, 0) is None
