"""Pixels: PNG, strips of tiles, user pictures, seams. No network."""
