"""Prints the path for `swift sft --external_plugins $(python -m equipoise.hosts.swift)`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path[0] = sys.executable  # for the current folder: see equipoise.pipelines.cli

from importlib import resources

print(resources.files("equipoise.hosts.swift") / "equipoise_swift.py")
