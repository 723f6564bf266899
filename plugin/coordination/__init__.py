"""Coordinators of per-component learning rates, one file each."""
