"""Pixel triggers beside NC's, by size and by what they do to test images.

PixelBackdoor's claim (Tao et al. 2022, CVPR, figure 6 and table 6): on a clean model its triggers
change fewer pixels than NC's, and fool more test images than NC's largest changes on as many. Both
forms are searched on the same images; what counts is their ASR on test images of the victim class,
none of which a search has seen. Answers are kept in the store: stopped, the same command goes on.

    python benchmarks/pixels.py CHECKPOINT MODEL DATASET [--data-dir DIR] [--pairs sample:10]
        [--restarts 3] [--steps 1000] [--store runs/pixels] [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from machine import describe
from options import of_one_model

from arena.core.inversion.distances import parse_pairs
from arena.inverting import Inverted, Question, inverted
from arena.store import Store
from arena.subjects import of_checkpoint

FORMS = ("tanh", "clip")


def main(options: argparse.Namespace) -> None:
    subject = of_checkpoint(options.checkpoint, options.model, options.dataset, options.data_dir)
    store = Store(options.store)

    def asked(method: str, pair: tuple[int, int], prune_to: tuple[int, ...] = ()) -> Inverted:
        question = Question(
            method, restarts=options.restarts, samples=options.samples, steps=options.steps
        )
        return inverted(subject, question, *pair, store, prune_to=prune_to, device=options.device)

    pairs = parse_pairs(options.pairs, subject.data.num_classes)
    print(describe())
    print(
        f"{len(pairs)} pairs, {options.restarts} restarts of {options.steps} passes over "
        f"{options.samples} images\n\npixels and ASR on test images, in %; NC to as many pixels"
    )
    print(f"{'pair':<10}{'NC':>12}" + "".join(f"{form:>12}{'NC there':>10}" for form in FORMS))
    rows: list[list[tuple[int, float, float]]] = []
    for pair in pairs:
        ours = [asked(f"pixel:form={form}", pair).facts for form in FORMS]
        nc = asked("nc", pair, tuple(facts["pixels"] for facts in ours if facts["pixels"])).facts
        if not all(facts["reached"] for facts in (nc, *ours)):
            print(f"{pair[0]} to {pair[1]:<5} not all found a trigger in {options.steps} passes")
            continue
        row = [(nc["pixels"], nc["test_asr"], nc["test_asr"])]
        row += [(f["pixels"], f["test_asr"], nc["pruned"][f"{f['pixels']}"]) for f in ours]
        rows.append(row)
        print(f"{pair[0]} to {pair[1]:<5}" + _shown(row), flush=True)
    if rows:
        means = [
            tuple(fmean(value) for value in zip(*column, strict=True))
            for column in zip(*rows, strict=True)
        ]
        print(f"{'mean':<10}" + _shown(means))
        for place, form in enumerate(FORMS, 1):
            smaller = sum(row[place][0] < row[0][0] for row in rows)
            stronger = sum(row[place][1] > row[place][2] for row in rows)
            print(f"{form}: smaller than NC's in {smaller}, stronger in {stronger} of {len(rows)}")


def _shown(row: Sequence[tuple[float, ...]]) -> str:
    cells = [f"{pixels:.0f} {asr:.1%}" for pixels, asr, _ in row]
    others = ["", *(f"{other:.1%}" for _, _, other in row[1:])]
    widths = (0, 10, 10)
    return "".join(
        f"{cell:>12}{other:>{width}}"
        for cell, other, width in zip(cells, others, widths, strict=True)
    )


if __name__ == "__main__":
    parser = of_one_model("Pixel triggers beside NC's.", pairs="sample:10", restarts=3, steps=1000)
    parser.add_argument("--store", type=Path, default=Path("runs/pixels"))
    main(parser.parse_args())
