"""Trigger families by name: `families.build("pixel:form=tanh")`."""

from arena.core.registry import Registry

families = Registry("trigger family", "arena.inversions", "arena.inversions")
