"""Trained parts and what a trigger is made of: made once, found again, handed to the store."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from arena.core import parts
from arena.core.contracts import Images, Probe, Trigger
from arena.core.training import Checkpoint
from arena.core.triggers import tensors_of
from arena.referee.keeping import FileCheckpoint, StoreKeeper
from arena.store import Store


@pytest.fixture
def data() -> Images:
    x = torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    return Images(x.to(torch.uint8), torch.arange(6) % 2)


class Maker:
    """Draws one tensor, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rng: Generator, checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        self.calls += 1
        figure = {"figure.bit_accuracy": torch.tensor(0.75)}
        return {"weight": torch.rand(3, generator=rng), **figure}


def test_a_part_is_made_once_and_found_again(tmp_path: Path, data: Images) -> None:
    make, keeper = Maker(), StoreKeeper(Store(tmp_path))
    with parts.kept(keeper):
        one = parts.trained("gan", {"steps": 5}, data, make)
        two = parts.trained("gan", {"steps": 5}, data, make)
    assert make.calls == 1
    assert torch.equal(one["weight"], two["weight"])
    assert list(keeper.used.values()) == [{"name": "gan", "figures": {"bit_accuracy": 0.75}}]
    later = StoreKeeper(Store(tmp_path))  # of another process
    with parts.kept(later):
        assert torch.equal(parts.trained("gan", {"steps": 5}, data, make)["weight"], one["weight"])
    assert later.used == keeper.used
    assert make.calls == 1


@pytest.mark.parametrize("change", ["name", "settings", "pixels", "labels", "seed"])
def test_whatever_decides_a_part_makes_a_new_one(tmp_path: Path, data: Images, change: str) -> None:
    make = Maker()
    other = Images(data.x.clone(), data.y.clone())
    if change == "pixels":
        other.x[0, 0, 0, 0] ^= 1
    if change == "labels":
        other.y[0] = 1
    with parts.kept(StoreKeeper(Store(tmp_path))):
        parts.trained("gan", {"steps": 5}, data, make)
        parts.trained(
            "critic" if change == "name" else "gan",
            {"steps": 6 if change == "settings" else 5},
            other,
            make,
            seed=int(change == "seed"),
        )
    assert make.calls == 2


def test_without_a_keeper_a_part_is_made_each_time(data: Images) -> None:
    make = Maker()
    one, two = (parts.trained("gan", {}, data, make) for _ in range(2))
    assert make.calls == 2
    assert torch.equal(one["weight"], two["weight"]), "its draws are the part's own"


def test_the_keeper_is_put_back_after_an_error(tmp_path: Path, data: Images) -> None:
    make = Maker()
    with pytest.raises(RuntimeError), parts.kept(StoreKeeper(Store(tmp_path))):
        raise RuntimeError
    parts.trained("gan", {}, data, make)
    parts.trained("gan", {}, data, make)
    assert make.calls == 2


def test_a_part_with_values_that_are_not_numbers_is_refused(tmp_path: Path, data: Images) -> None:
    def broken(rng: Generator, checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        return {"weight": torch.tensor([1.0, float("nan")])}

    store = Store(tmp_path)
    keeping = parts.kept(StoreKeeper(store))
    with keeping, pytest.raises(FloatingPointError, match="the gan has non-finite values"):
        parts.trained("gan", {}, data, broken)
    assert not list((store.root / "artifacts").glob("*/*"))


def test_a_stopped_part_goes_on_from_its_checkpoint(
    tmp_path: Path, data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arena.referee.keeping.SAVE_EVERY", 0.0)
    starts = []

    def slow(rng: Generator, checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        assert checkpoint is not None
        state = checkpoint.load()
        first = 0 if state is None else int(state["epoch"])
        starts.append(first)
        checkpoint.save({"epoch": first + 3})
        if first == 0:
            raise KeyboardInterrupt
        return {"weight": torch.full((1,), float(first))}

    store = Store(tmp_path)
    for _ in range(2):
        try:
            with parts.kept(StoreKeeper(store)):
                made = parts.trained("gan", {}, data, slow)
        except KeyboardInterrupt:
            pass
    assert starts == [0, 3]
    assert float(made["weight"]) == 3
    assert not list((store.root / "scratch").iterdir()), "finished work leaves no checkpoint"


def test_two_processes_do_not_make_the_same_part(tmp_path: Path, data: Images) -> None:
    make, inside, go_on = Maker(), threading.Event(), threading.Event()

    def slow(checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        inside.set()
        assert go_on.wait(10)
        return make(torch.Generator(), checkpoint)

    found: list[Tensor] = []

    def work() -> None:
        keeper = StoreKeeper(Store(tmp_path))
        found.append(keeper.keep("ab" * 32, {"name": "gan"}, slow)["weight"])

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert make.calls == 1
    assert torch.equal(*found)


def test_a_damaged_checkpoint_means_a_new_start(tmp_path: Path) -> None:
    (tmp_path / "part.pt").write_bytes(b"not a checkpoint")
    assert FileCheckpoint(tmp_path / "part.pt").load() is None


# ------------------------------------------------------------------------------------ the triggers


@dataclass(frozen=True, eq=False)
class Shift:
    grid: Tensor
    nets: tuple[nn.Module, ...]
    strength: float = 0.5

    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_every_tensor_of_a_trigger_is_listed_once() -> None:
    grid, net = torch.rand(2, 2), nn.BatchNorm1d(3)
    stamp = Shift(grid, (net,))
    trigger = Trigger(stamp, probes={"noise": Probe(Shift(grid, ()))})
    found = tensors_of(trigger)
    assert set(found) == {
        "stamp.grid",
        *(f"stamp.nets.0.{name}" for name in net.state_dict()),
    }
    assert torch.equal(found["stamp.grid"], grid)


def test_a_plain_function_has_no_tensors() -> None:
    assert tensors_of(Trigger(lambda x: x)) == {}
