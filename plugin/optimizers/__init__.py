"""Optimizers: one method, one file."""
