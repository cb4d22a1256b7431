"""Board -> cells -> records: plans, skips what is done, runs the rest, goes on after failures.

A cell's life: the clean twin and the victim are trained (each once per data set, model, recipe,
attack and seed), the referee measures them; a defense repairs the victim in a process of its own;
the referee measures again; one record is written. Every arrow is an artifact under a content key,
so whatever was finished before a stop is never done twice, and several runners may share a store.
What a board asks for beside answers (its measures) is entered into the record once that is written.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from arena import data as datasets
from arena.boards import Board
from arena.core import checks, models, poisoning, training
from arena.core.metric_list import der, wilson
from arena.core.registry import (
    BadInput,
    attacks,
    code_hash,
    defenses,
    files_of,
    spec_of,
    split_spec,
)
from arena.core.seeding import stream
from arena.core.whole import share_refusal
from arena.identity import (
    describe_attack,
    describe_defense,
    is_foreign,
    method_files,
    method_identity,
)
from arena.measuring import Asked, entry, failure, key_of, lacking
from arena.planning import Cell, Estimate, Plan, Victim, estimate, measuring_seconds, past_seconds
from arena.provenance import provenance
from arena.referee import isolate, returned, sandbox
from arena.referee.answers import check_answer
from arena.referee.isolate import Done, Failed, Refused, Stop
from arena.referee.keeping import Desk
from arena.referee.sandbox import Limits
from arena.store import Artifact, DiskFull, Store, digest, load_tensors, save_tensors

log = logging.getLogger("arena")

FINAL = ("ok", "not_established", "collapsed", "not_applicable")  # others are tried again
RECORD_BYTES = 20_000  # of a record and a reading: enough
MOST_TRIGGER = 2**32  # bytes that a trigger's networks may have
MOST_EPOCHS = 10_000  # whose losses are kept


# ---------------------------------------------------------------------------------------- running

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Summary:
    """How a run ended."""

    done: int = 0  # cells computed now
    cached: int = 0  # cells that were there before
    failed: list[dict[str, Any]] = field(default_factory=list)  # their records
    unmeasured: list[dict[str, Any]] = field(default_factory=list)  # of cells with a failed measure


@dataclass
class Runner:
    """Runs a plan against a store. See the module's docstring."""

    plan: Plan
    store: Store
    device: str = "cpu"
    workers: int = 1
    listener: Listener | None = None
    command: str = ""
    stop: Stop = field(default_factory=lambda: Stop(threading.Event()))
    limits: Limits = field(default_factory=Limits)  # of every method
    require_sandbox: bool = False  # refuse to run methods without namespaces
    use_sandbox: bool = True  # False: limits alone, to look into a method that fails

    def __post_init__(self) -> None:
        self.isolation, self._lacking = sandbox.LIMITS, sandbox.SWITCHED_OFF
        if self.use_sandbox:
            self.isolation = sandbox.level(self.device)  # the level in force
            self._lacking = sandbox.why_not(self.device)
        if self.require_sandbox and self.isolation != sandbox.NAMESPACES:
            raise BadInput(
                "--require-sandbox: methods cannot be held in namespaces here "
                f"({self._lacking}); see `arena doctor`."
            )
        self._estimates: dict[str, Estimate] = {}
        self._devices = self._device_list()
        self._threads = max(1, torch.get_num_threads() // self.workers)
        self.limits = self.limits.shared(self.workers)

    def _device_list(self) -> list[str]:
        if self.device == "cuda" and torch.cuda.device_count() > 1:
            return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [self.device]

    def _say(self, type: str, **content: Any) -> None:
        if self.listener is not None:
            self.listener({"type": type, **content})

    # ----------------------------------------------------------------------------- what is to do

    def cached(self, cell: Cell) -> bool:
        """Whether the cell's record is final and holds the figures of the board's measures."""
        record = self.store.record(cell.key)
        return _is_final(record) and not lacking(record or {}, self.plan.measures)

    def _to_repair(self, cell: Cell) -> bool:
        """Whether a cell that is not cached must be repaired, and not only measured: it has no
        final record, or the model that this tells of is gone."""
        return not _is_final(self.store.record(cell.key)) or not self.store.has(cell.key)

    def todo(self) -> tuple[list[Victim], list[Cell]]:
        """The victims and cells that are still to be computed, or to be measured."""
        cells = [cell for cell in self.plan.cells if not self.cached(cell)]
        needed = {cell.victim.key for cell in cells}
        needed |= {c.victim.twin.key for c in cells if c.victim.twin and self._to_repair(c)}
        victims = [v for v in self.plan.victims if v.key in needed and not self.store.has(v.key)]
        return victims, cells

    def estimate(self) -> dict[str, Estimate]:
        """Estimates by key for all that is to do."""
        victims, cells = self.todo()
        past, board, device = past_seconds(self.store), self.plan.board, self._devices[0]
        found = {victim.key: estimate(victim, board, device, past) for victim in victims}
        for cell in cells:
            known = Estimate(0.0, RECORD_BYTES)
            if self._to_repair(cell):
                known = estimate(cell, board, device, past)
            seconds = known.seconds + self._measuring(cell, device, past)
            found[cell.key] = dataclasses.replace(known, seconds=seconds)
        return found

    def _measuring(self, cell: Cell, device: str, past: Mapping[str, float]) -> float:
        """Seconds that the measures of a cell will take. The victim is measured once, with the
        null defense, whose model it is."""
        record = self.store.record(cell.key) or {}
        after = record.get("weights", {}).get("after")
        seconds = 0.0
        for asked in lacking(record, self.plan.measures) if after else self.plan.measures:
            if after and self.store.has(self._reading_key(asked, cell.victim, after, device)):
                continue
            seconds += measuring_seconds(asked, cell.victim.setting, device, past)
        return seconds

    # ---------------------------------------------------------------------------------- the loop

    def run(self) -> Summary:
        """Do all that is to do. A failing cell is recorded and the rest goes on."""
        self._estimates = self.estimate()
        need = 1.2 * sum(e.disk_bytes for e in self._estimates.values())
        if need > (free := self.store.free_bytes()):
            raise BadInput(
                f"The store {str(self.store.root)!r} needs about {need / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free; make room or name another disk with --store."
            )
        self.store.create()
        self._write_board()
        summary = Summary()
        victims, cells = self.todo()
        summary.cached = len(self.plan.cells) - len(cells)
        whole = sum(e.seconds for e in self._estimates.values())
        self._say("plan", seconds=whole, cells=len(cells), cached=summary.cached)
        waiting: list[Victim | Cell] = [*victims, *cells]
        ready_keys = {v.key for v in self.plan.victims} - {v.key for v in victims}
        ready_keys |= {c.key for c in self.plan.cells} - {c.key for c in cells}
        broken: dict[str, Failed] = {}
        running: dict[Future[Any], tuple[Victim | Cell, Any]] = {}
        free_devices = [self._devices[i % len(self._devices)] for i in range(self.workers)]
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="arena")
        try:
            while waiting or running:
                for task in list(waiting):
                    if not free_devices:
                        break
                    if not all(k in ready_keys or k in broken for k in _needs(task)):
                        continue
                    lock = self.store.lock(task.key)
                    try:
                        lock.acquire(timeout=0)
                    except TimeoutError:
                        continue  # another runner is at it
                    waiting.remove(task)
                    device = free_devices.pop()
                    future = pool.submit(self._do, task, device, broken)
                    running[future] = (task, (lock, device))
                if not running:
                    time.sleep(0.5)
                    continue
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    task, (lock, device) = running.pop(future)
                    free_devices.append(device)
                    try:
                        outcome = future.result()
                    except Failed as error:
                        broken[task.key] = error
                        outcome = None
                    finally:
                        lock.release()
                    ready_keys.add(task.key)
                    if isinstance(task, Cell):
                        _count(summary, outcome, self.plan.measures)
                    self._say(
                        "finished",
                        name=task.name,
                        seconds=self._guess(task),
                        record=outcome if isinstance(task, Cell) else None,
                        error=broken[task.key].reason if task.key in broken else "",
                    )
        except BaseException:
            self.stop.event.set()
            wait(running)
            for _, (lock, _) in running.values():
                lock.release()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return summary

    def _guess(self, task: Victim | Cell) -> float:
        """The seconds that the task was expected to take when the run began."""
        known = self._estimates.get(task.key)
        return known.seconds if known else 0.0

    def _do(self, task: Victim | Cell, device: str, broken: Mapping[str, Failed]) -> Any:
        self._say("started", name=task.name, key=task.key, seconds=self._guess(task))
        if isinstance(task, Victim):
            if (found := self.store.artifact(task.key)) is not None:  # another runner was faster
                return found
            if task.twin is not None and task.twin.key in broken:
                error = broken[task.twin.key]
                raise Failed(error.kind, f"its clean twin: {error.reason}", error.details)
            with _explained():
                return self._train(task, device)
        record = self.store.record(task.key)
        if record is not None and self.cached(task):
            return {**record, "elsewhere": True}
        if record is None or self._to_repair(task):
            record = self._defend(task, device, broken)
        return self._measured(task, record, device, broken)

    # ----------------------------------------------------------------------------------- victims

    def _job(self, kind: str, victim: Victim, device: str, folder: Path) -> dict[str, Any]:
        setting = victim.setting
        return {
            "job": kind,
            "folder": str(folder),
            "device": device,
            "threads": self._threads,
            "seed": victim.seed,
            "model": setting.model,
            "classes": setting.dataset.num_classes,
            "shape": list(setting.dataset.shape),
        }

    def _run(
        self,
        job: dict[str, Any],
        name: str,
        losses: dict[int, float] | None = None,
        **options: Any,
    ) -> Done:
        """The job's result; `losses` is filled with each epoch's, where the job trains."""

        def told(event: dict[str, Any]) -> None:
            if losses is not None:
                _note_loss(losses, event["figures"])
            self._say("progress", **{**event, "name": name})

        found = isolate.run(
            job,
            logfile=Path(job["folder"]).parent / f"{job['job']}.log",
            stop=self.stop,
            limits=None if job["job"] == "measure" else self.limits,  # the referee's own work
            level=self.isolation,
            hidden=(self.store.root,),
            on_event=told,
            **options,
        )
        check_answer(job["job"], found)
        return found

    def _train(self, victim: Victim, device: str) -> Artifact:
        """Train a victim, measure it, keep it as an artifact."""
        if victim.refusal:
            raise Failed("not_applicable", victim.refusal)
        scratch = self.store.scratch(victim.key)
        folder, kept = _fresh_folder(scratch / "job"), _fresh_folder(scratch / "kept")
        (scratch / "checkpoints").mkdir(exist_ok=True)
        setting = victim.setting
        spec = spec_of(victim.attack)
        job = {
            **self._job("attack", victim, device, folder),
            "spec": spec,
            "recipe": setting.recipe,
            "train": dict(setting.dataset.files["train"]),
            "scratch": str(scratch / "checkpoints"),
            "method_files": method_files(victim.attack),
            "registered": files_of(victim.attack),
        }
        started = _now()
        test_files = dict(setting.dataset.files["test"])
        origin = digest(method_identity(victim.attack)) if is_foreign(victim.attack) else ""
        desk = Desk(self.store, folder, origin)
        trained: dict[str, float] = {}

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            if question["what"] != "the images to stamp":
                return desk.answer(question)
            if not trained:  # what it writes from here on, with test images at hand, is too late
                trained["seconds"] = question["seconds"]
                self._keep_victim(victim, folder, kept)
            names = {name: f"test.{name}.npy" for name in test_files}
            for name, file in names.items():
                _copy(test_files[name], folder / file)
            return names

        losses: dict[int, float] = {}  # of the last network that was trained: the victim
        try:
            result = self._guarded(
                job,
                victim.name,
                timeout=self.plan.board.timeout,
                answer=answer,
                losses=losses,
            )
        finally:
            desk.close()
        if not trained:
            self._keep_victim(victim, folder, kept)
        stamped = result["stamped"] = bool(trained)
        result["budget"] |= result.measured(device) | trained
        result["parts"] = desk.used
        if stamped:
            save_tensors(
                kept / "triggered.safetensors", returned.triggered(folder, setting.dataset)
            )
            for part in ("trigger", "probes"):
                most = MOST_TRIGGER + 16 * setting.dataset.test.x.numel()
                save_tensors(kept / f"{part}.safetensors", returned.tensors(folder, part, most))
        shutil.rmtree(folder)
        measured = self._guarded(
            {
                **self._job("measure", victim, device, _fresh_folder(folder)),
                "weights": str(kept / "weights.safetensors"),
                "test": test_files,
                **self._triggered(
                    victim, kept / "triggered.safetensors" if stamped else None, scratch
                ),
                "probes": str(kept / "probes.safetensors") if stamped else None,
                "twin": self._twin_weights(victim) if stamped else None,
            },
            victim.name,
        )
        made = dict.fromkeys(("weights", "poisoned"), kept) | {"predictions": folder}
        if stamped:
            made |= dict.fromkeys(("triggered", "trigger", "probes"), kept)
            made |= {"gallery": folder}
        artifact = self.store.save(
            victim.key,
            {part: load_tensors(at / f"{part}.safetensors") for part, at in made.items()},
            {
                "kind": "victim",
                "attack": spec,
                "model": setting.model,
                "recipe": setting.recipe,
                "plan": dataclasses.asdict(setting.plan),
                "dataset": setting.dataset.name,
                "fingerprint": setting.dataset.fingerprint,
                "seed": victim.seed,
                "result": result,
                "measured": measured,
                "losses": [[epoch, _finite(loss)] for epoch, loss in sorted(losses.items())],
                "started": started,
                "finished": _now(),
                "isolation": result.isolation,
                **provenance(device, self._threads),
            },
        )
        self.store.clear_scratch(victim.key)
        return artifact

    def _keep_victim(self, victim: Victim, folder: Path, kept: Path) -> None:
        """Put what the attack has trained where it can no longer change it."""
        setting = victim.setting
        trained = returned.weights(folder, setting.shapes)
        save_tensors(kept / "weights.safetensors", trained)
        save_tensors(kept / "poisoned.safetensors", returned.poisoned(folder, setting.dataset))

    def _triggered(self, victim: Victim, triggered: Path | None, place: Path) -> dict[str, Any]:
        """Entries of a job that measures: the triggered images, and what the attacker wants of
        them (a file in the folder `place`), so that the process that measures need not run the
        attack's code."""
        if triggered is None:
            return {"triggered": None}
        attack, data = victim.attack, victim.setting.dataset
        y, classes = data.test.y, data.num_classes
        labels = place / "labels.safetensors"
        save_tensors(
            labels,
            {
                "wanted": poisoning.wanted(attack, y, classes),
                "counted": poisoning.applies(attack, y, classes),
            },
        )
        one = poisoning.scope(attack) != "all-to-all"
        return {
            "triggered": str(triggered),
            "labels": str(labels),
            "target": int(attack.target) if one else None,
        }

    def _twin_weights(self, victim: Victim) -> str | None:
        if victim.twin is None:
            return None
        artifact = self._sound(victim.twin)
        return str(artifact.path("weights"))

    def _sound(self, victim: Victim) -> Artifact:
        """The victim's artifact; one that turns out to be damaged is trained again."""
        artifact = self.store.artifact(victim.key)
        if artifact is None:
            with self.store.lock(victim.key):  # somebody else may have noticed as well
                artifact = self.store.artifact(victim.key)
                if artifact is None:
                    log.warning("%s is trained again.", victim.name)
                    artifact = self._train(victim, self._devices[0])
        return artifact

    def _guarded(self, job: dict[str, Any], name: str, **options: Any) -> Done:
        """`_run`, with everything but a stop turned into Failed."""
        try:
            return self._run(job, name, **options)
        except Refused as error:
            raise Failed("not_applicable", str(error)) from error
        except DiskFull:
            raise
        except OSError as error:
            raise Failed("failed", isolate.explain(error)) from error

    # ------------------------------------------------------------------------------------- cells

    def _defend(self, cell: Cell, device: str, broken: Mapping[str, Failed]) -> dict[str, Any]:
        """Repair and measure; a failure of the method becomes the record's reason.

        Where it is done again for a model that was lost, a failure leaves the record as it was.
        """
        known = self.store.record(cell.key)
        started, record = _now(), self._blank(cell, device)
        try:
            if refusal := share_refusal(cell.defense, self.plan.board.clean_share):
                raise Failed("not_applicable", refusal)
            for needed in (cell.victim, cell.victim.twin):
                if needed is not None and needed.key in broken:
                    error = broken[needed.key]
                    raise Failed(error.kind, f"{needed.label}: {error.reason}", error.details)
            with _explained():
                record |= self._repaired(cell, device)
        except Failed as error:
            record |= {"status": error.kind, "reason": error.reason, "details": error.details}
        record |= {"started": started, "finished": _now()}
        self.store.clear_scratch(cell.key)
        if known is not None and _is_final(known) and not _is_final(record):
            log.warning("%s could not be repaired again: %s.", cell.name, record["reason"])
            return known
        if known is not None and "measures" in known and known["weights"] == record.get("weights"):
            record["measures"] = known["measures"]
        self.store.write_record(record)
        return record

    def _repaired(self, cell: Cell, device: str) -> dict[str, Any]:
        victim, setting = cell.victim, cell.victim.setting
        artifact = self._sound(victim)
        folder = _fresh_folder(self.store.scratch(cell.key) / "job")
        train = setting.dataset.train
        try:
            rows = artifact.tensors("poisoned")["rows"]
            rng = stream(victim.seed, "clean")
            chosen = datasets.draw_clean(
                train.y, self.plan.board.clean_share, rng, exclude=rows[rows < len(train)]
            )
        except ValueError as error:
            raise Failed("failed", str(error)) from error
        clean = train.take(chosen)
        save_tensors(folder / "clean.safetensors", {"x": clean.x, "y": clean.y})
        # a copy: beside the original lie the poisoned and the triggered images
        shutil.copyfile(artifact.path("weights"), folder / "victim.safetensors")
        result = self._guarded(
            {
                **self._job("repair", victim, device, folder),
                "spec": spec_of(cell.defense),
                "weights": str(folder / "victim.safetensors"),
                "clean": str(folder / "clean.safetensors"),
                "method_files": method_files(cell.defense),
                "registered": files_of(cell.defense),
            },
            cell.name,
            timeout=self.plan.board.timeout,
        )
        result["budget"] |= result.measured(device)
        weights = returned.weights(folder, setting.shapes)
        _fresh_folder(folder)  # of all that the method left there
        repaired = folder.parent / "repaired.safetensors"
        save_tensors(repaired, weights)
        measured = self._scored(cell, artifact, repaired, folder, device)
        kept = self.store.save(
            cell.key,
            {"weights": weights, "predictions": load_tensors(folder / "predictions.safetensors")},
            {"kind": "repaired", "victim": victim.key, "defense": spec_of(cell.defense)},
        )
        return {
            **self._judged(cell, artifact, measured),
            "budget": result["budget"],
            "victim_budget": artifact.meta["result"]["budget"],
            "weights": {"before": artifact.sha256("weights"), "after": kept.sha256("weights")},
            "clean_rows": digest(chosen.tolist()),
            "poisoned_rows": artifact.meta["result"]["poisoned_rows"],
            "parts": artifact.meta["result"]["parts"],
            "victim_made": {
                name: artifact.meta.get(name)
                for name in ("hardware", "versions", "commit", "isolation")
            },
        }

    def _scored(
        self, cell: Cell, artifact: Artifact, weights: Path, folder: Path, device: str
    ) -> dict[str, Any]:
        """What the referee measures of a repaired model. folder: the job's; the weights lie beside
        it, in the folder above."""
        victim = cell.victim
        triggered = artifact.path("triggered") if artifact.meta["result"]["stamped"] else None
        return self._guarded(
            {
                **self._job("measure", victim, device, folder),
                "weights": str(weights),
                "test": dict(victim.setting.dataset.files["test"]),
                **self._triggered(victim, triggered, folder.parent),
            },
            cell.name,
        )

    def scored_again(self, cell: Cell, device: str) -> dict[str, Any] | None:
        """The metrics of a cell, measured once more from the weights that the store keeps, and the
        hashes of these weights; None where it keeps none. Raises Failed."""
        artifact, kept = self.store.artifact(cell.victim.key), self.store.artifact(cell.key)
        if artifact is None or kept is None:
            return None
        key = digest(["scored again", cell.key])
        folder = _fresh_folder(self.store.scratch(key) / "job")
        try:
            measured = self._scored(cell, artifact, kept.path("weights"), folder, device)
        finally:
            self.store.clear_scratch(key)
        hashes = {"before": artifact.sha256("weights"), "after": kept.sha256("weights")}
        before = artifact.meta["measured"]["metrics"]
        figures = {name: measured["metrics"].get(name) for name in ("acc", "asr", "ra")}
        figures |= {f"{name}_before": before.get(name) for name in ("acc", "asr", "ra")}
        return {"metrics": figures, "weights": hashes}

    def _judged(
        self, cell: Cell, artifact: Artifact, measured: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Metrics, status, flags and intervals of a cell, from what the referee measured."""
        victim, before = cell.victim, artifact.meta["measured"]
        twin = None if victim.twin is None else self._sound(victim.twin).meta["measured"]["metrics"]
        metrics: dict[str, float | None] = {
            name: measured["metrics"].get(name) for name in ("acc", "asr", "ra")
        }
        metrics |= {f"{name}_before": before["metrics"].get(name) for name in ("acc", "asr", "ra")}
        metrics["acc_drop"] = _minus(metrics["acc_before"], metrics["acc"])
        if metrics["asr"] is not None:
            metrics["der"] = der(
                *(metrics[n] or 0.0 for n in ("acc_before", "acc", "asr_before", "asr"))
            )
        metrics["clean_twin_acc"] = twin["acc"] if twin else metrics["acc_before"]
        metrics |= before.get("twin", {})
        metrics |= before.get("stealth", {})
        if cell.twin_cell is not None:
            harmed = self.store.record(cell.twin_cell.key)
            if harmed is None:  # else a figure would be missing for good
                raise Failed("failed", f"the record of {cell.twin_cell.name} is gone; run again")
            metrics["twin_acc_drop"] = harmed["metrics"].get("acc_drop")
        metrics = {name: _finite(value) for name, value in metrics.items()}
        classes = victim.setting.dataset.num_classes
        status = checks.status(metrics, measured["top_class_share"], classes)
        raised = checks.flags(
            metrics,
            status,
            null_defense=cell.defense.method_name == "none",
            probabilities=measured["probabilities"],
            repeatable=measured["repeatable"],
        )
        counts = measured["counts"]
        sizes = {"acc": counts["test"], "asr": counts.get("triggered")}
        meanings = [flag.meaning for flag in raised if flag.name == status]
        return {
            "status": status,
            "reason": meanings[0] if meanings else "",
            "metrics": metrics,
            "counts": counts,
            "intervals": {
                name: list(wilson(round(value * n), n))
                for name, n in sizes.items()
                if n and (value := metrics[name]) is not None
            },
            "flags": [dataclasses.asdict(flag) for flag in raised],
            "probes": before.get("probes", {}),
            "mmd": before.get("mmd", {}),
        }

    # ---------------------------------------------------------------------------------- measures

    def _measured(
        self, cell: Cell, record: dict[str, Any], device: str, broken: Mapping[str, Failed]
    ) -> dict[str, Any]:
        """The record with the figures that it lacks, written after each measure. A failure becomes
        the reason of that measure; the cell's outcome stays."""
        for asked in lacking(record, self.plan.measures):
            try:
                if cell.victim.key in broken:
                    raise Failed("failed", f"of the victim: {broken[cell.victim.key].reason}")
                with _explained():
                    found = self._compared(asked, cell, record, device)
            except Failed as error:
                found = failure(asked, error.kind, error.reason, error.details)
            record = {**record, "measures": {**record.get("measures", {}), asked.spec: found}}
            self.store.write_record(record)
        return record

    def _compared(
        self, asked: Asked, cell: Cell, record: Mapping[str, Any], device: str
    ) -> dict[str, Any]:
        """The repaired model first: by then another defense may have had the victim measured."""
        readings = {}
        for when, what in (("after", "repaired model"), ("before", "victim")):
            kept = self.store.artifact(cell.key) if when == "after" else self._sound(cell.victim)
            if kept is None or kept.sha256("weights") != record["weights"][when]:
                raise Failed("failed", f"the {what} of this record is no longer in the store")
            try:
                readings[when] = self._reading(asked, cell, kept, device)
            except Failed as error:
                raise Failed(error.kind, f"of the {what}: {error.reason}", error.details) from error
        return entry(asked, **readings)

    def _reading(self, asked: Asked, cell: Cell, weights: Artifact, device: str) -> Artifact:
        """What the measure found out about these weights: taken once for all who ask."""
        victim, setting = cell.victim, cell.victim.setting
        key = self._reading_key(asked, victim, weights.sha256("weights"), device)
        with self._waited(key, cell.name, asked.name):
            if (found := self.store.artifact(key)) is not None:
                return found
            scratch, started = self.store.scratch(key), _now()
            folder = _fresh_folder(scratch / "job")
            job = {
                **self._job("examine", victim, device, folder),
                "spec": asked.spec,
                "weights": str(weights.path("weights")),
                "val": dict(setting.dataset.files["val"]),
                "test": dict(setting.dataset.files["test"]),
                "scratch": str(scratch / "checkpoints"),
                "method_files": method_files(asked.method),
            }
            (scratch / "checkpoints").mkdir(exist_ok=True)
            try:
                result = self._guarded(job, cell.name)
            except Failed:
                self.store.clear_scratch(key)  # what is kept there may be why it failed
                raise
            meta = {
                "kind": "reading",
                "measure": asked.identity,
                "weights": weights.sha256("weights"),
                "dataset": setting.dataset.name,
                "fingerprint": setting.dataset.fingerprint,
                "model": setting.model,
                "seed": victim.seed,
                **result,
                "seconds": result.seconds,
                "started": started,
                "finished": _now(),
                **provenance(device, self._threads),
            }
            made = self.store.save(key, {}, meta)
            self.store.clear_scratch(key)
            return made

    def _reading_key(self, asked: Asked, victim: Victim, weights: str, device: str) -> str:
        setting = victim.setting
        return key_of(
            asked,
            weights,
            data=setting.dataset.fingerprint,
            network=(setting.model, code_hash(models.info(setting.model).build.__module__)),
            seed=victim.seed,
            bf16=training.has_bf16(torch.device(device)),
        )

    @contextmanager
    def _waited(self, key: str, name: str, what: str) -> Iterator[None]:
        """Inside, the lock of `key` is ours; waiting for it ends when the run is stopped."""
        lock = self.store.lock(key)
        while True:
            try:
                lock.acquire(timeout=0.5)
                break
            except TimeoutError:
                if self.stop:
                    raise isolate.Interrupted from None
                told = f"waiting for the {what} of the same weights"
                self._say("progress", what=told, done=0.0, total=1.0, figures={}, name=name)
        try:
            yield
        finally:
            lock.release()

    # ----------------------------------------------------------------------------------- records

    def _blank(self, cell: Cell, device: str) -> dict[str, Any]:
        """A record with everything but the outcome."""
        victim, setting, board = cell.victim, cell.victim.setting, self.plan.board
        return {
            "key": cell.key,
            "board": {"name": board.name, "version": board.version},
            "dataset": {
                "name": setting.dataset.name,
                "fingerprint": setting.dataset.fingerprint,
                "source": setting.dataset.source,
                "train": len(setting.dataset.train),
                "test": len(setting.dataset.test),
                "classes": list(setting.dataset.classes),
                "shape": list(setting.dataset.shape),
            },
            "model": setting.model,
            "recipe": setting.recipe,
            "plan": dataclasses.asdict(setting.plan),
            "attack": describe_attack(victim.attack),
            "defense": describe_defense(cell.defense),
            "clean_share": board.clean_share,
            "seed": victim.seed,
            "metrics": {},
            "flags": [],
            "command": self.command,
            "isolation": self.isolation,
            **({"isolation_note": self._lacking} if self._lacking else {}),
            "parents": {
                "victim": victim.key,
                "twin": victim.twin.key if victim.twin else None,
                "twin_cell": cell.twin_cell.key if cell.twin_cell else None,
            },
            **provenance(device, self._threads),
        }

    def _write_board(self) -> None:
        board = self.plan.board
        cells = [cell.key for cell in self.plan.cells]
        with self.store.lock(f"board-{board.name}"):
            asked = {asked.name: asked.spec for asked in self.plan.measures}
            if board.name == "adhoc":  # grows from run to run
                for known in self.store.boards():
                    if (known["name"], known["version"]) == (board.name, board.version):
                        cells = [k for k in known["cells"] if k not in set(cells)] + cells
                        specs = known["definition"].get("measure", ())
                        asked = {split_spec(spec)[0]: spec for spec in specs} | asked
            self.store.write_board(
                board.name,
                board.version,
                {
                    "name": board.name,
                    "version": board.version,
                    "definition": {
                        **board.definition(),
                        "published": _published(board),
                        **({"measure": list(asked.values())} if asked else {}),
                    },
                    "command": self.command,
                    "cells": cells,
                },
            )


def _published(board: Board) -> list[dict[str, Any]]:
    """The board's published figures under the full specs that records have."""
    found = []
    for figure in board.published:
        told = dataclasses.asdict(figure)
        told["attack"] = spec_of(attacks.build(figure.attack, board.recipe))
        if figure.defense:
            told["defense"] = spec_of(defenses.build(figure.defense, board.recipe))
        found.append(told)
    return found


@contextmanager
def _explained() -> Iterator[None]:
    """Turns an error of ours into a failed task with a reason, so that the rest goes on."""
    try:
        yield
    except (Failed, DiskFull, BadInput):
        raise
    except Exception as error:
        raise Failed("failed", isolate.explain(error), traceback.format_exc()[-4000:]) from error


def _needs(task: Victim | Cell) -> Iterable[str]:
    """Keys of what must be finished, or have failed, before `task`."""
    if isinstance(task, Victim):
        return [task.twin.key] if task.twin else []
    needed = [task.victim.key]
    needed += [task.victim.twin.key] if task.victim.twin else []
    return needed + ([task.twin_cell.key] if task.twin_cell else [])


def _is_final(record: Mapping[str, Any] | None) -> bool:
    return record is not None and record["status"] in FINAL


def _count(
    summary: Summary, record: Mapping[str, Any] | None, measures: Sequence[Asked] = ()
) -> None:
    """Enter a finished cell; one that another runner did counts as there before."""
    if record is not None and record.get("elsewhere"):
        summary.cached += 1
        return
    summary.done += 1
    if record is not None and not _is_final(record):
        summary.failed.append(dict(record))
    elif record is not None and lacking(record, measures):
        summary.unmeasured.append(dict(record))


def _note_loss(losses: dict[int, float], figures: Mapping[str, Any]) -> None:
    """Enter an epoch's loss, as a worker tells it; with the first epoch another network begins."""
    epoch, loss = figures.get("epoch"), figures.get("loss")
    if epoch is None or loss is None or not 1 <= epoch <= MOST_EPOCHS:
        return
    if epoch == 1:
        losses.clear()
    losses[int(epoch)] = float(loss)


def _fresh_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _copy(source: str | Path, target: Path) -> None:
    """A copy under a name that may be taken: by a link, say, that leads elsewhere."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    with Path(source).open("rb") as stream, target.open("xb") as copy:
        shutil.copyfileobj(stream, copy, 2**20)


def _minus(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
