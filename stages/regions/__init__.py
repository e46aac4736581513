"""Regions: what a person asks for where, read and scaled. No torch."""
