"""Torch only; knows no method by name. Empty on purpose: importing it costs nothing."""
