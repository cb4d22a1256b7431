"""Every defense keeps the contract (found through the registry), and each gives a known answer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import toys
from torch import Tensor, nn

from arena.core import features, models, pruning, rates, whole
from arena.core.contracts import Images, Repairs
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import BadInput, Registry, defenses, spec_of
from arena.core.seeding import stream
from arena.core.training import accuracy
from arena.defenses import fine_pruning
from arena.identity import method_identity

SMALL = {  # beside what the recipe `smoke` shortens: all do something to a small model
    "retrain": "retrain:epochs=2,min_steps=0,batch=32",
    "finetune": "finetune:epochs=2,crop=1,cutout=3",
    "fine_pruning": "fine_pruning:epochs=2,crop=1,cutout=3",
    "nad": "nad:crop=1,cutout=3",
    "anp": "anp:iterations=10,crop=1,threshold=0.99,max_drop=1",
    "mcr": "mcr:tune_epochs=1,crop=1,tune_cutout=3",
    "nc": "nc:steps=30,samples=30,asr=0.5,unflagged=smallest",
    "abs": "abs:form=filter,top=2,filter_steps=200,samples=36,batch=32",
    "moth": "moth:updates=8,batch=64,max_drop=1",
    "deck": "deck:updates=6,batch=32,max_drop=1",
    "pairwise": "pairwise:batch=64,max_drop=1",
    "universal": "universal:updates=4,batch=64,max_drop=1",
    "pixel": "pixel:updates=4,batch=64,max_drop=1",
    "uap": "uap:epochs=2",
    "adversarial": "adversarial:epochs=2",
}
UNSEEDED = {"none"}  # draws nothing
REPAIRS = [name for name in defenses.names() if "repairs" in defenses.describe(name).powers]


def small(name: str) -> Repairs:
    return defenses.build(SMALL.get(name, name), "smoke")


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: nn.Module) -> int:
    return sum(
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


# ----------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", defenses.names())
def test_the_catalogue_agrees_with_the_class(name):
    method, cls = defenses.describe(name), defenses.load(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert [f.name for f in method.fields] == list(fields)
    for listed in method.fields:
        assert listed.default == fields[listed.name].default
        assert listed.doc
        assert listed.doc == fields[listed.name].metadata["doc"]
    assert method.source, f"{name} names no Source:"
    assert method.summary
    assert method.powers
    assert cls() == cls()


@pytest.mark.parametrize("name", defenses.names())
def test_what_recipes_shorten_is_in_range_and_becomes_less(name):
    usual = defenses.build(name)
    for recipe, weaker in (("fast", usual), ("smoke", defenses.build(name, "fast"))):
        short = defenses.build(name, recipe)  # raises where a value is out of range
        for field in defenses.describe(name).fields:
            before, after = getattr(weaker, field.name), getattr(short, field.name)
            if isinstance(after, int) and before is not None and not isinstance(after, bool):
                assert after <= before, f"{field.name} grows under {recipe}"


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_is_pure_and_seeded(name, planted, clean):
    defense, before = small(name), copied(planted)
    modes = [module.training for module in planted.modules()]
    x, y = clean.x.clone(), clean.y.clone()
    outside = torch.random.get_rng_state()
    one = defense.repair(planted, clean, stream(0, "r"))
    assert same(before, copied(planted)), "repair changed the model that it was given"
    assert modes == [module.training for module in planted.modules()]
    assert torch.equal(x, clean.x)
    assert torch.equal(y, clean.y), "repair changed the clean images"
    assert torch.equal(outside, torch.random.get_rng_state()), "the global generator was used"
    assert one is not planted
    two = defense.repair(planted, clean, stream(0, "r"))
    assert same(copied(one), copied(two)), "same seed, different model"
    other = defense.repair(planted, clean, stream(1, "r"))
    assert same(copied(one), copied(other)) == (name in UNSEEDED)


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_returns_the_same_architecture_in_plain_weights(name, planted, clean, rng):
    repaired = small(name).repair(planted, clean, rng)
    assert isinstance(repaired, Classifier)
    assert repaired.spec == planted.spec
    after = copied(repaired)
    shapes = {name: value.shape for name, value in copied(planted).items()}
    assert {name: value.shape for name, value in after.items()} == shapes
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert hooks(repaired) == hooks(planted) == 0
    assert not repaired.training
    plain = toys.planted()
    plain.load_state_dict(after)
    close = torch.allclose(plain(clean.x / 255), repaired(clean.x / 255), atol=1e-4)
    assert close, "the repair is more than its weights"


@pytest.mark.parametrize("name", [*REPAIRS, "k_arm", "k_arm:optimiser=pixel"])
def test_the_families_that_a_method_asks_count_as_part_of_it(name, planted, clean, monkeypatch):
    defense, build, asked = small(name), Registry.build, []

    def watched(registry, spec, *args):
        made = build(registry, spec, *args)
        if registry.kind == families.kind:
            asked.append(spec_of(made))
        return made

    monkeypatch.setattr(Registry, "build", watched)
    if hasattr(defense, "repair"):
        defense.repair(planted, clean, stream(0, "r"))
    if hasattr(defense, "scan"):
        defense.scan(planted, clean, stream(0, "s"))
    known = {spec_of(family) for family in getattr(defense, "wraps", {}).values()}
    assert set(asked) <= known
    identity = method_identity(defense)
    assert {one["spec"] for one in identity.get("wrapped", {}).values()} == known


@pytest.mark.parametrize("name", [name for name in REPAIRS if name in SMALL])
def test_a_clean_set_that_cannot_be_used_is_named(name, planted, clean, rng):
    defense, none = small(name), torch.zeros(0, dtype=torch.int64)
    defense.check(planted, clean)
    for words, images in (
        (r"of \d+ images has none of class 2; give it at least one", clean.take(clean.y != 2)),
        ("has none of class 0", clean.take(none)),
        ("are 3x12x16, but the model takes 3x16x16", Images(clean.x[:, :, 4:], clean.y)),
        ("has class 7, the model only 4", Images(clean.x, clean.y + 4)),
    ):
        with pytest.raises(BadInput, match=words):
            defense.repair(planted, images, rng)
        with pytest.raises(BadInput, match=words):  # without computing anything
            defense.check(planted, images)


HOLD_OUT = ("fine_pruning:held_out=0.1", "anp:held_out=0.1", "mcr:held_out=0.1",
            "nc:mitigation=prune,held_out=0.1", "moth", "deck", "pairwise", "universal",
            "pixel")  # fmt: skip


@pytest.mark.parametrize("spec", HOLD_OUT)
def test_a_clean_set_too_small_to_hold_any_out_is_named(spec, planted, rng):
    defense, images = defenses.build(spec), toys.images(6, rng)
    defense.check(planted, Images(images.x, torch.arange(6) % 4))
    few = Images(images.x[:4], torch.arange(4))
    wanted = f"{defense.method_name}: of 4 clean images 0 would be held out and 4 trained on; give"
    with pytest.raises(BadInput, match=wanted):
        defense.check(planted, few)
    with pytest.raises(BadInput, match=wanted):
        defense.repair(planted, few, rng)


# -------------------------------------------------------------------------------------------- toys


def test_the_planted_backdoor_is_as_described(planted, clean):
    assert accuracy(planted, clean) == 1
    assert toys.success(planted, clean) == 1
    deep = features.features(planted, clean.x / 255, ["deep"])["deep"][:, :, 0, 0]
    assert (deep[:, toys.CHANNEL] == 0).all()
    assert (deep[:, :4].mean(0) > 0.01).all()
    stamped = toys.stamp(clean.x / 255)
    elsewhere = stamped.roll((-5, -3), dims=(2, 3))
    assert torch.equal(planted(elsewhere).argmax(1), clean.y), "only the corner counts"
    mask = torch.ones(5)
    mask[toys.CHANNEL] = 0
    with features.masked(planted, mask):
        assert accuracy(planted, clean) == 1
        assert torch.equal(planted(stamped).argmax(1), clean.y)


def test_the_planted_network_is_alike_in_both_modes(planted, clean):
    still = planted(clean.x / 255)
    assert torch.allclose(planted.train()(clean.x / 255), still, atol=0.3)


# ----------------------------------------------------------------------------------- known answers


def test_none_is_the_identity(planted, clean, rng):
    assert same(copied(defenses.build("none").repair(planted, clean, rng)), copied(planted))


@pytest.mark.parametrize(("share", "silent"), [(0, 0), (0.2, 1), (0.6, 3), (1, 5)])
def test_random_prune_silences_exactly_the_share(share, silent, planted, clean, rng):
    with torch.no_grad():
        planted.body.head.weight.fill_(1.0)
    repaired = defenses.build(f"random_prune:share={share}").repair(planted, clean, rng)
    columns = repaired.body.head.weight.T
    assert int((columns == 0).all(1).sum()) == silent
    assert int((columns == 1).all(1).sum()) == 5 - silent
    rest = copied(repaired)
    del rest["body.head.weight"]
    assert all(torch.equal(value, planted.state_dict()[name]) for name, value in rest.items())


def test_random_prune_draws_every_channel(planted, clean):
    chosen = set()
    for seed in range(30):
        repaired = defenses.build("random_prune:share=0.2").repair(planted, clean, stream(seed))
        gone = (repaired.body.head.weight != planted.body.head.weight).any(0)
        chosen |= set(gone.nonzero().flatten().tolist())
    assert chosen == {0, 1, 2, toys.CHANNEL}  # the head ignores channel 3: nothing to see there


def test_fine_pruning_finds_the_planted_channel(planted, clean, rng):
    repaired = defenses.build("fine_pruning:epochs=0").repair(planted, clean, rng)
    expected = copied(planted)
    expected["body.head.weight"][:, toys.CHANNEL] = 0
    assert same(copied(repaired), expected), "other channels than the planted one were silenced"
    assert accuracy(repaired, clean) == 1
    assert toys.success(repaired, clean) == 0


@pytest.mark.parametrize(("max_drop", "kept"), [(0.0, 1), (0.2, 1), (0.3, 2), (0.6, 3), (1.0, 4)])
def test_fine_pruning_undoes_the_step_that_costs_too_much(max_drop, kept, planted, clean, rng):
    """Each colour is a quarter of the accuracy; brightness, the most active, always stays."""
    defense = defenses.build(f"fine_pruning:epochs=0,max_drop={max_drop}")
    head = defense.repair(planted, clean, rng).body.head.weight
    with torch.no_grad():
        silent = (head == 0).all(0)
    assert int(silent[[0, 1, 2, 4]].sum()) == kept
    assert silent[toys.CHANNEL]


@pytest.mark.parametrize("whole", [False, True], ids=["from the head on", "whole passes"])
def test_fine_pruning_measures_the_pruned_model(whole, planted, clean, monkeypatch):
    """Both ways of counting agree with a model whose channels are masked."""
    if whole:  # pretend that something follows the head
        read = pruning.head_inputs
        monkeypatch.setattr(pruning, "head_inputs", lambda *a: (read(*a)[0], read(*a)[1].neg()))
    order = torch.tensor([4, 1, 0, 2])
    mask, expected = torch.ones(5), [accuracy(planted, clean)]
    for channel in order:
        mask[channel] = 0
        with features.masked(planted, mask):
            expected.append(accuracy(planted, clean))
    assert list(fine_pruning._accuracies(planted, clean, order)) == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert hooks(planted) == 0


def test_the_mask_survives_fine_tuning(planted, clean, rng, monkeypatch):
    """The channel is silent while the rest is tuned, and still when the hook has gone."""
    fit, during = rates.fit, []

    def spy(model: nn.Module, *args: object, **more: object) -> nn.Module:
        fitted = fit(model, *args, **more)
        during.append(fitted(toys.stamp(clean.x / 255)).detach().clone())
        return fitted

    monkeypatch.setattr(rates, "fit", spy)
    repaired = defenses.build("fine_pruning:epochs=4,lr=0.01,crop=1,cutout=0").repair(
        planted, clean, rng
    )
    assert not torch.equal(repaired.body.head.weight, planted.body.head.weight)
    assert (repaired.body.head.weight[:, toys.CHANNEL] == 0).all()
    assert torch.allclose(repaired(toys.stamp(clean.x / 255)), during[-1], atol=1e-5)
    assert accuracy(repaired, clean) > 0.95
    assert toys.success(repaired, clean) < 0.3


def test_what_is_pruned_is_not_learnt_again(planted, clean, rng):
    """Not even channels that clean images drive and the labels ask for."""
    defense = defenses.build("fine_pruning:epochs=4,max_drop=1,lr=0.05,crop=1,cutout=0")
    weight = defense.repair(planted, clean, rng).body.head.weight
    assert not torch.equal(weight, planted.body.head.weight)
    assert int((weight == 0).all(0).sum()) == 4


def test_fine_pruning_holds_images_out(planted, clean, rng, monkeypatch):
    """Some order the channels, the others decide how many go; at a given rate all of them tune."""
    seen: dict[str, Tensor] = {}
    activity = fine_pruning.mean_activation

    def tuned(model: nn.Module, data: Images, *args: object, **more: object) -> nn.Module:
        seen["tune"] = data.x
        return model

    def counted(model: nn.Module, held: Images, order: Tensor) -> object:
        seen["held"] = held.x
        return iter([1.0])

    def measured(model: nn.Module, images: Images) -> Tensor:
        seen["order"] = images.x
        return activity(model, images)

    monkeypatch.setattr(rates, "fit", tuned)
    monkeypatch.setattr(fine_pruning, "_accuracies", counted)
    monkeypatch.setattr(fine_pruning, "mean_activation", measured)
    defenses.build("fine_pruning:held_out=0.3,lr=0.01").repair(planted, clean, rng)
    assert (len(seen["held"]), len(seen["order"])) == (60, 140)
    both = torch.cat([seen["held"], seen["order"]]).flatten(1)
    assert torch.equal(both.unique(dim=0), clean.x.flatten(1).unique(dim=0))
    assert torch.equal(seen["tune"], clean.x)
    with pytest.raises(BadInput, match="0 would be held out and 8 trained on; give more images"):
        defenses.build("fine_pruning:held_out=0.01").repair(planted, toys.images(8, rng), rng)


def test_finetune_follows_the_paper(planted, clean, rng, monkeypatch):
    plans = []
    monkeypatch.setattr(rates, "fit", lambda model, data, plan, *_, **__: plans.append(plan))
    defenses.build("finetune:lr=0.1,epochs=10,decay_every=2").repair(planted, clean, rng)
    (plan,) = plans
    assert plan.drop_at == (0.2, 0.4, 0.6, 0.8)
    assert (plan.lr, plan.epochs, plan.batch, plan.momentum) == (0.1, 10, 64, 0.9)
    assert (plan.weight_decay, plan.crop, plan.cutout, plan.border) == (1e-4, 4, 9, "zero")
    assert (plan.flip, plan.schedule, plan.label_smoothing) == (True, "steps", 0)


def test_finetune_keeps_the_accuracy(planted, clean, rng):
    repaired = defenses.build("finetune:crop=1,cutout=0").repair(planted, clean, rng)
    assert accuracy(repaired, clean) > 0.95
    assert not same(copied(repaired), copied(planted))


def test_retrain_keeps_nothing_of_the_model(planted, clean, rng):
    """It learns the task, not the backdoor, and the weights that it was given do not matter."""
    defense = defenses.build("retrain:epochs=8,min_steps=0,batch=20")
    repaired = defense.repair(planted, clean, stream(0))
    assert accuracy(repaired, clean) > 0.9
    assert toys.success(repaired, clean) < 0.3
    other = copy.deepcopy(planted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert same(copied(repaired), copied(defense.repair(other, clean, stream(0))))


def test_retrain_scales_the_rate_of_the_network(planted, clean, rng, monkeypatch):
    plans = []
    monkeypatch.setattr(whole, "fit", lambda model, data, plan, *_, **__: plans.append(plan))
    speed = dataclasses.replace(toys.NETWORK, overrides={"fast": {"lr": 0.8, "bias_lr": 64.0}})
    monkeypatch.setitem(models._catalogue(), "planted", speed)
    defenses.build("retrain:batch=64").repair(planted, clean, rng)
    defenses.build("retrain:batch=64,lr=0.3").repair(planted, clean, rng)
    assert [plan.lr for plan in plans] == pytest.approx([0.1, 0.3])
    assert plans[0].bias_lr == 64
