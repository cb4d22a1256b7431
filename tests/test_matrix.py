"""All attacks against all defenses, on embedded signs, as small as the recipe `smoke` makes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_cli import arena

from arena.boards import NULL_DEFENSES, read_board
from arena.core.registry import attacks, defenses

BOARD = """
name = "matrix"
dataset = ["signs:size=300,classes=6"]
model = ["fastnet_tiny"]
attack = {attacks}
defense = {defenses}
seed = [0]
recipe = "smoke:min_steps=20"  # whether an attack takes hold is not asked here
clean_share = 1.0  # what the defenses that train from scratch need
timeout = 300
"""


@pytest.mark.matrix
def test_no_cell_of_all_attacks_and_defenses_fails(tmp_path: Path) -> None:
    against = [name for name in attacks.names() if name != "none"]
    repairs = [each.name for each in defenses.describe_all() if "repairs" in each.powers]
    own = [name for name in repairs if name not in NULL_DEFENSES]
    file, store = tmp_path / "board.toml", tmp_path / "store"
    file.write_text(BOARD.format(attacks=json.dumps(against), defenses=json.dumps(own)))
    workers = min(4, os.cpu_count() or 1)
    done = arena("run", file, "--store", store, "--device", "cpu", "--workers", workers)
    assert done.code in (0, 1), done.err
    rows = json.loads(arena("results", "--store", store, "--format", "json").out)
    bad = [
        f"{row['attack']} / {row['defense']}: {row['status']}: {row.get('reason', '')}"
        for row in rows
        if row["status"] not in ("ok", "not_established", "collapsed")
    ]
    assert not bad
    assert done.code == 0
    board = read_board(file)
    assert len(rows) == len(board.attacks()) * len(board.defenses())
