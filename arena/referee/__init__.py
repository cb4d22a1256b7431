"""Runs each method in a process of its own, with only what its signature names; measures."""
