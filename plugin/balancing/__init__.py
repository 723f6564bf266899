"""Objectives over joint and unimodal losses, one file each."""
