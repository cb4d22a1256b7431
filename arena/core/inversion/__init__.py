"""Trigger inversion: the engine, frozen networks to run it on, and what is made of its answers."""
