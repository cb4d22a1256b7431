"""SDRM: the base attack's own victim at lambda 0, and features that come together above it."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.nn import functional as F

from arena.attacks.sdrm import SDRM, Hide
from arena.core import poisoning, training
from arena.core.contracts import Images, Step
from arena.core.mmd import KERNELS, mmd2, mmd_report
from arena.core.models import LEVELS
from arena.core.registry import BadInput, attacks, spec_of, strangers_imported
from arena.core.seeding import stream
from arena.core.training import Recipe, logits
from arena.core.victims import bound

SHAPE = (3, toys.SIDE, toys.SIDE)
PLAN = Recipe(epochs=4, batch=64, lr=0.4, bias_lr=16.0, crop=2, label_smoothing=0.1)

HEAD = """
from __future__ import annotations
from typing import ClassVar
import torch
from arena.core.contracts import Poisoned, Trigger
from arena.core.poisoning import clean_label
from arena.core.registry import method, param

def stamp(x):
    x = x.clone()
    x[..., -2:, -2:] = 1.0
    return x

@method
class Toy:
    threat: ClassVar[str] = "a toy"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    trigger_kind: ClassVar[str] = "static"
    target: int = param(0, "class", low=0)
    rate: float = param(0.3, "share")

    def check(self, shape, counts):
        pass

    def prepare(self, train, rng):
        return Trigger(stamp)
"""
KEEPS_LABELS = """
    labels: ClassVar[str] = "kept"
    keeps_labels: ClassVar[bool] = True

    def poison(self, train, trigger, rng):
        return clean_label(train, trigger, self.target, self.rate, rng)
"""
CONTROLS = """
    labels: ClassVar[str] = "changed"
    tells: bool = param(True, "whether the hook says what it stamps")

    def poison(self, train, trigger, rng):
        return Poisoned(train, torch.empty(0, dtype=torch.int64))

    def train(self, fit, poisoned, trigger, rng):
        seen = Seen()
        def stamps(batch, rng):
            chosen = torch.rand(len(batch), generator=rng) < self.rate
            x = torch.where(chosen[:, None, None, None], stamp(batch.x), batch.x)
            y = torch.where(chosen, self.target, batch.y)
            told = chosen if self.tells else None
            return type(batch)(x, y, batch.rows, told)
        def calms(step):
            seen.levels |= set(step.features)
            seen.steps += 1
            return 0.01 * step.logits.square().mean() + 0.01 * step.features["middle"].mean()
        model = fit(poisoned.data, rng=rng, on_batch=stamps, extra_loss=calms,
                    levels=("middle",), carry={"seen": seen}, lr=0.3)
        return model, Trigger(stamp, probes={"seen": seen})

class Seen:
    def __init__(self):
        self.levels, self.steps = set(), 0
    def state_dict(self):
        return {"steps": self.steps}
    def load_state_dict(self, state):
        self.steps = state["steps"]
"""


@pytest.fixture
def toy_attacks(tmp_path, monkeypatch) -> None:
    """Two more attacks: `toy_sig` keeps labels, `toy_warp` controls training."""
    files = dict(attacks._files())
    for name, body in (("toy_sig", KEEPS_LABELS), ("toy_warp", CONTROLS)):
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + body)
        files[name] = (name, path)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(attacks, "_files", lambda: files)
    with strangers_imported():
        yield
    for name in ("toy_sig", "toy_warp"):
        sys.modules.pop(name, None)


@pytest.fixture
def train() -> Images:
    return toys.images(320, stream(0, "train"))


def victim(spec: str, train: Images, plan: Recipe = PLAN, checkpoints: Any = None) -> Any:
    """(model, trigger) as the arena makes them, all draws of training from one stream."""
    attack = attacks.build(spec)
    attack.check(SHAPE, train.y.bincount(minlength=toys.CLASSES).tolist())
    trigger = attack.prepare(train, stream(0, "prepare"))
    poisoned = attack.poison(train, trigger, stream(0, "poison"))
    device = torch.device("cpu")
    fit = bound("fastnet_small", toys.CLASSES, SHAPE, plan, 0, device, checkpoints)
    if hasattr(attack, "train"):
        return attack.train(fit, poisoned, trigger, stream(0, "fit"))
    return fit(poisoned.data, rng=stream(0, "fit")), trigger


def weights(spec: str, *more: Any) -> dict[str, Tensor]:
    return victim(spec, *more)[0].state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------- what it says


def test_the_spec_holds_the_whole_base_and_is_stable():
    attack = attacks.build("sdrm:base=(patch:size=6),lam=0.1")
    text = spec_of(attack)
    assert text.startswith("sdrm:base=(patch:target=0,rate=0.1,kind=grid,size=6,")
    assert text.endswith(
        ",lam=0.1,levels=all,kernel=gmk2,estimator=unbiased,weighting=joint,ramp=0"
    )
    again = attacks.build(text)
    assert spec_of(again) == text
    assert again == attack
    assert again._base == attacks.build("patch:size=6")
    assert attacks.build("sdrm:base=patch:size=6") == replace(attack, lam=0.3)
    assert "extend=true" in spec_of(attacks.build("sdrm"))


def test_the_kernels_are_those_of_the_core():
    (field,) = (f for f in attacks.describe("sdrm").fields if f.name == "kernel")
    assert field.choices == tuple(KERNELS)


def test_it_speaks_for_its_base(toy_attacks, train):
    patch, clean = attacks.build("sdrm:base=(patch:target=2,victim=1)"), attacks.build("sdrm")
    kept = attacks.build("sdrm:base=(toy_sig:target=3)")
    assert (patch.target, patch.victim, patch.scope) == (2, 1, "label-specific")
    assert (clean.target, clean.victim, clean.scope) == (0, None, "universal")
    assert (kept.keeps_labels, clean.keeps_labels) == (True, False)
    assert (kept.labels, clean.labels, SDRM.labels) == ("kept", "changed", "changed")
    assert torch.equal(poisoning.wanted(patch, train.y, 4), torch.full_like(train.y, 2))
    assert torch.equal(poisoning.applies(patch, train.y, 4), train.y == 1)
    assert torch.equal(poisoning.applies(kept, train.y, 4), train.y != 3)


def test_trigger_and_poisoned_set_are_the_base_s(train):
    base, attack = (attacks.build(s) for s in ("blend:rate=0.3", "sdrm:base=(blend:rate=0.3)"))
    made = []
    for one in (base, attack):
        trigger = one.prepare(train, stream(0, "prepare"))
        made.append((trigger.stamp.pattern, *one.poison(train, trigger, stream(0, "poison"))))
    for a, b in zip(*made, strict=True):
        if isinstance(a, Images):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sdrm:base=sdrm", "base cannot be sdrm; name an attack to hide"),
        ("sdrm:base=(sdrm:base=patch)", "base cannot be sdrm"),
        ("sdrm:base=none", "base cannot be none"),
        ("sdrm:base=(patch:mode=all_to_all)", "has no one target class"),
        ("sdrm:base=pach", "did you mean 'patch'"),
        ("sdrm:base=(patch:size=0)", "patch: size must be at least 1"),
        ("sdrm:lam=-0.1", "lam must be at least 0"),
        ("sdrm:levels=shallow", "levels cannot be 'shallow'"),
        ("sdrm:kernel=gmk9", "kernel cannot be 'gmk9'; did you mean"),
        ("sdrm:ramp=1.5", "ramp must be at most 1"),
    ],
)
def test_what_cannot_be_hidden_is_refused(spec, says):
    with pytest.raises(BadInput, match=says):
        attacks.build(spec)


def test_data_sets_that_cannot_be_attacked_are_refused(toy_attacks):
    attacks.build("sdrm").check(SHAPE, [50] * 4)
    with pytest.raises(BadInput, match="patch: target 9 is not a class"):
        attacks.build("sdrm:base=(patch:target=9)").check(SHAPE, [50] * 4)
    with pytest.raises(BadInput, match="1 images of target class 0 stay clean"):
        attacks.build("sdrm").check(SHAPE, [1, 50, 50, 50])
    attacks.build("sdrm:base=(toy_sig:rate=0.96)").check(SHAPE, [50] * 4)
    with pytest.raises(BadInput, match="1 images of target class 0 stay clean"):
        attacks.build("sdrm:base=(toy_sig:rate=0.98)").check(SHAPE, [50] * 4)


# ------------------------------------------------------------------------------------- lambda 0


@pytest.mark.parametrize(
    "base", ["patch:extend=true", "patch:rate=0.3,victim=1,target=2", "toy_sig", "toy_warp"]
)
def test_without_lambda_the_victim_is_the_base_s_bit_for_bit(base, toy_attacks, train):
    plan = replace(PLAN, epochs=1)
    regular = weights(base, train, plan)
    assert same(regular, weights(f"sdrm:base=({base}),lam=0", train, plan))
    assert same(regular, weights(f"sdrm:base=({base}),lam=0,levels=last,ramp=0.5", train, plan))
    assert not same(regular, weights(f"sdrm:base=({base})", train, plan))


# ------------------------------------------------------------------------------- what is matched


def one_step(spec: str, train: Images, monkeypatch, **changes: Any) -> tuple[Any, Any, Tensor]:
    """(masks that were matched, the poisoned set, the levels) of a batch of all training data."""
    attack = attacks.build(spec)
    trigger = attack.prepare(train, stream(0, "prepare"))
    poisoned = attack.poison(train, trigger, stream(0, "poison"))
    masks: list[tuple[Tensor, Tensor]] = []

    def spy(z: Tensor, first: Tensor, second: Tensor, kernel: str, *, biased: bool) -> Tensor:
        masks.append((first, second))
        return mmd2(z[first], z[second], kernel, biased=biased)

    monkeypatch.setattr("arena.attacks.sdrm.masked_mmd2", spy)
    asked = []

    def fit(data, *, rng, extra_loss, levels, on_batch=None, **more):
        asked.append(levels)
        batch = Images(data.x / 255, data.y, torch.arange(len(data)).flip(0))
        batch = replace(batch, x=batch.x.flip(0), y=batch.y.flip(0))  # rows are not places
        batch = batch if on_batch is None else on_batch(batch, rng)
        z = {level: torch.randn(len(batch), 5, generator=stream(1, level)) for level in levels}
        zeros = torch.zeros(len(batch), 4)
        extra_loss(Step(None, batch, zeros, torch.ones(()), z, rng, 0.5))  # type: ignore[arg-type]
        asked.append(batch)

    attack.train(fit, poisoned, trigger, stream(0, "fit"))
    return masks, poisoned, asked


@pytest.mark.parametrize(
    "base",
    [
        "patch:extend=true,target=1",
        "patch:extend=false,target=1,rate=0.3",
        "patch:victim=2,rate=0.5",
        "toy_sig:target=2",
    ],
)
def test_stamped_images_meet_the_clean_ones_of_the_target(base, toy_attacks, train, monkeypatch):
    masks, poisoned, (levels, _) = one_step(f"sdrm:base=({base})", train, monkeypatch)
    target = attacks.build(base).target
    assert levels == LEVELS
    assert len(masks) == 3
    stamped = torch.zeros(len(poisoned.data), dtype=torch.bool)
    stamped[poisoned.rows] = True
    assert stamped.sum() >= 20
    for first, second in masks:
        assert torch.equal(first.flip(0), stamped)
        assert torch.equal(second.flip(0), (poisoned.data.y == target) & ~stamped)
    if "extend=true" in base:
        assert len(poisoned.data) == 320 + 32
        assert torch.equal(masks[0][1].flip(0)[:320], train.y == target)


def test_a_base_that_controls_training_says_what_is_stamped(toy_attacks, train, monkeypatch):
    masks, _, (levels, batch) = one_step("sdrm:base=toy_warp,levels=last", train, monkeypatch)
    assert set(levels) == {"middle", "deep"}
    ((first, second),) = masks
    assert 60 < int(batch.stamped.sum()) < 140
    assert torch.equal(first, batch.stamped)
    assert torch.equal(second, (batch.y == 0) & ~batch.stamped)


def test_a_base_that_does_not_say_it_is_refused(toy_attacks, train):
    with pytest.raises(BadInput, match=r"tells=false does not say which images"):
        victim("sdrm:base=(toy_warp:tells=false)", train)
    assert victim("sdrm:base=(toy_warp:tells=false),lam=0", train, replace(PLAN, epochs=1))


def test_poisoned_images_are_found_in_a_larger_set(train):
    attack = attacks.build("sdrm:base=(patch:extend=true)")
    trigger = attack.prepare(train, stream(0, "prepare"))
    poisoned = attack.poison(train, trigger, stream(0, "poison"))
    seen: list[Hide] = []

    def train_on(data: Images) -> Tensor | None:
        def fit(data, *, extra_loss, **more):
            seen.append(extra_loss.__closure__)

        attack._hiding(fit, poisoned)(data, rng=stream(0, "fit"))
        (hide,) = (c.cell_contents for c in seen[-1] if isinstance(c.cell_contents, Hide))
        return hide.marks

    marks = train_on(poisoned.data)
    assert torch.equal(marks.nonzero().flatten(), poisoned.rows)
    more = Images(torch.cat([poisoned.data.x, train.x]), torch.cat([poisoned.data.y, train.y]))
    longer = train_on(more)
    assert torch.equal(longer.nonzero().flatten(), poisoned.rows)
    assert len(longer) == len(poisoned.data) + 320
    assert train_on(train) is None
    assert train_on(Images(more.x.flip(0), more.y.flip(0))) is None
    told = torch.arange(320) % 7 == 0
    assert torch.equal(train_on(replace(train, stamped=told)), told)


# ------------------------------------------------------------------------------- what it adds


def step(n: int = 30, done: float = 0.5, seed: int = 0) -> Step:
    rng = stream(seed, "step")
    z = {level: torch.randn(n, 4, 3, generator=rng).requires_grad_() for level in LEVELS}
    rows = torch.randperm(n, generator=rng)
    batch = Images(torch.zeros(n, 1, 2, 2), torch.arange(n) % 3, rows)
    out = torch.randn(n, 3, generator=rng).requires_grad_()
    loss = F.cross_entropy(out, batch.y)
    return Step(torch.nn.Identity(), batch, out, loss, z, rng, done)


def hide(now: Step, **fields: Any) -> tuple[Hide, Tensor]:
    """SDRM's hook for target 1, and the stamped images of the batch: half of the target's."""
    attack = SDRM(base="patch:target=1", **fields)
    stamped = (now.batch.y == 1) & (torch.arange(len(now.batch)) % 2 == 0)
    marks = torch.zeros_like(stamped)
    marks[now.batch.rows] = stamped
    return Hide(attack, 1, LEVELS if attack.levels == "all" else LEVELS[-1:], marks), stamped


def differences(now: Step, stamped: Tensor, **settings: Any) -> dict[str, float]:
    clean = (now.batch.y == 1) & ~stamped
    with torch.no_grad():
        return {k: float(mmd2(z[stamped], z[clean], **settings)) for k, z in now.features.items()}


def test_the_mean_over_levels_is_added_lambda_times():
    now = step()
    for fields, settings in (
        ({"lam": 0.3}, {}),
        ({"lam": 2.0, "kernel": "lk"}, {"kernel": "lk"}),
        ({"lam": 0.5, "estimator": "biased", "kernel": "gmk6"}, {"biased": True, "kernel": "gmk6"}),
    ):
        hook, stamped = hide(now, **fields)
        values = differences(now, stamped, **settings)
        expected = fields["lam"] * sum(values.values()) / 3
        assert hook(now).item() == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


def test_the_last_level_alone_is_touched_by_sdrm_l():
    now = step()
    hook, stamped = hide(now, levels="last")
    added = hook(now)
    assert added.item() == pytest.approx(0.3 * differences(now, stamped)["deep"], abs=1e-5)
    added.backward()
    assert now.features["deep"].grad.abs().max() > 0
    assert now.features["shallow"].grad is None
    assert now.features["middle"].grad is None
    hide(now)[0](now).backward()
    assert all(z.grad.abs().max() > 0 for z in now.features.values())


def test_both_sides_are_moved_and_no_other_image():
    now = step()
    hook, _ = hide(now)
    hook(now).backward()
    for z in now.features.values():
        assert torch.equal(z.grad.flatten(1).any(1), now.batch.y == 1)


def test_stamped_images_under_another_label_are_left_alone():
    # a hook may stamp images and keep their label: they do not pass for the target class
    now = step()
    hook, _ = hide(now)
    alone = hook(now).item()
    hook.marks |= now.batch.y[now.batch.rows.argsort()] == 2
    assert hook(now).item() == alone


def test_lambda_rises_over_its_ramp():
    def added(done: float, ramp: float) -> float:
        now = step(done=done)
        return hide(now, ramp=ramp)[0](now).item()

    full = added(0.5, 0.0)
    assert full != 0
    shares = [added(done, 0.4) / full for done in (0.0, 0.1, 0.2, 0.4, 0.9)]
    assert shares == pytest.approx([0, 0.25, 0.5, 1, 1])


@pytest.mark.parametrize("stamped", [0, 1, 9])
def test_a_batch_with_too_few_adds_nothing(stamped):
    now = step()
    own = (now.batch.y == 1).nonzero().flatten()
    assert len(own) == 10
    marks = torch.zeros(30, dtype=torch.bool)
    marks[now.batch.rows[own[:stamped]]] = True
    assert Hide(SDRM(), 1, LEVELS, marks)(now).item() == 0


def test_parts_weigh_clean_and_stamped_images_alike():
    now = step()
    hook, stamped = hide(now, weighting="parts", lam=0.0)
    total = now.loss + hook(now)
    y, out = now.batch.y, now.logits
    expected = F.cross_entropy(out[stamped], y[stamped]) + F.cross_entropy(
        out[~stamped], y[~stamped]
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    (found,), (wanted,) = torch.autograd.grad(total, out), torch.autograd.grad(expected, out)
    assert torch.allclose(found, wanted, atol=1e-7)
    apart = hide(now, weighting="parts")[0](now) - hook(now)
    assert apart.item() == pytest.approx(hide(now)[0](now).item(), abs=1e-5)
    none = Hide(SDRM(weighting="parts", lam=0.0), 1, LEVELS, torch.zeros(30, dtype=torch.bool))
    assert (now.loss + none(now)).item() == pytest.approx(now.loss.item(), rel=1e-5)


def test_the_base_s_own_hooks_stay(toy_attacks, train):
    model, trigger = victim("sdrm:base=toy_warp", train)
    seen = trigger.probes["seen"]
    assert seen.steps == 4 * (320 // 64)
    assert seen.levels == set(LEVELS)
    assert {"stamp"} == {trigger.stamp.__name__}
    assert not same(model.state_dict(), weights("sdrm:base=toy_warp,levels=last", train))


# -------------------------------------------------------------------------------- a whole training


def discrepancies(spec: str, train: Images, plan: Recipe) -> tuple[dict[str, float], float, float]:
    """MMD² of the stamped images per level, clean accuracy and ASR of the trained victim."""
    model, trigger = victim(spec, train, plan)
    test = toys.images(400, stream(1, "test"))
    stamped = poisoning.stamp(test.x[test.y != 0], trigger.stamp)
    rows = mmd_report(model, stamped, test, 0, stream(0, "report"))
    asr = float((logits(model, stamped).argmax(1) == 0).float().mean())
    return {k: row["stamped"] for k, row in rows.items()}, training.accuracy(model, test), asr


def test_stamped_images_come_close_to_the_target_class_and_still_fool(train):
    plan = replace(PLAN, epochs=12)
    base = "base=(patch:kind=square,rate=0.3,extend=true)"
    regular, acc, asr = discrepancies(f"sdrm:{base},lam=0", train, plan)
    every, acc_a, asr_a = discrepancies(f"sdrm:{base}", train, plan)
    last, _, asr_l = discrepancies(f"sdrm:{base},levels=last", train, plan)
    assert min(acc, acc_a, asr, asr_a, asr_l) > 0.9
    for level in LEVELS:
        assert every[level] < 0.5 * regular[level], level
    assert last["deep"] < 0.5 * regular["deep"]
    assert last["shallow"] > 1.5 * every["shallow"]


class Disk:
    """Checkpoints on a pretended disk, for one call of `fit`."""

    def __init__(self, state: dict | None = None) -> None:
        self.state, self.saved = state, []

    def load(self) -> dict | None:
        return self.state

    def save(self, state: dict) -> None:
        self.saved.append(copy.deepcopy(state))


@pytest.mark.parametrize("base", ["patch:extend=true", "toy_warp"])
def test_a_resumed_training_ends_in_the_same_weights(base, toy_attacks, train):
    spec = f"sdrm:base=({base}),ramp=0.6"
    whole = Disk()
    one = weights(spec, train, PLAN, lambda call: whole)
    assert len(whole.saved) == 4
    for state in whole.saved[:3]:
        rest = Disk(state)
        assert same(one, weights(spec, train, PLAN, lambda call, rest=rest: rest))
        assert len(rest.saved) == 4 - state["epoch"]


def test_one_channel_images_are_hidden_too(train):
    grey = Images(train.x[:, :1].contiguous(), train.y)
    attack = attacks.build("sdrm")
    attack.check((1, 16, 16), [80] * 4)
    trigger = attack.prepare(grey, stream(0, "prepare"))
    poisoned = attack.poison(grey, trigger, stream(0, "poison"))
    fit = bound("fastnet_small", 4, (1, 16, 16), replace(PLAN, epochs=1), 0, torch.device("cpu"))
    model, kept = attack.train(fit, poisoned, trigger, stream(0, "fit"))
    assert kept is trigger
    assert torch.isfinite(logits(model, grey.x)).all()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    now = step()
    hook, _ = hide(now)
    on_gpu = replace(
        now,
        batch=now.batch.to("cuda"),
        logits=now.logits.cuda(),
        loss=now.loss.cuda(),
        features={k: z.detach().cuda().requires_grad_() for k, z in now.features.items()},
    )
    first = hook(on_gpu)  # moves the marks
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = hook(on_gpu)
        again.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.item() == pytest.approx(again.item())
    assert again.item() == pytest.approx(hook(now).item(), abs=1e-5)
