"""The options of benchmarks that invert triggers of one model."""

from __future__ import annotations

import argparse
from pathlib import Path


def of_one_model(
    description: str, *, pairs: str, restarts: int, steps: int
) -> argparse.ArgumentParser:
    """A parser for a checkpoint with its network and data, and for how it is searched."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path, help="weights: safetensors or a plain state_dict")
    parser.add_argument("model", help="their network")
    parser.add_argument("dataset", help="their data set")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--pairs", default=pairs)
    parser.add_argument("--restarts", type=int, default=restarts)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    return parser
