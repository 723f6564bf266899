"""Prints the path for `swift sft --external_plugins $(python -m equipoise.hosts.swift)`."""

from importlib import resources

print(resources.files("equipoise.hosts.swift") / "equipoise_swift.py")
