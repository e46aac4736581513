"""Pixels: PNG, bands, user pictures, seams. No network."""
