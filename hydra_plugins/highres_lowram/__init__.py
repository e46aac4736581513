"""Hydra launchers that ask for the memory which a run's plan says. Hydra finds its plugins in this package by name."""
