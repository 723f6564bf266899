"""ms-swift's plugin is the file equipoise_swift.py; `python -m equipoise.hosts.swift` prints where it lies.

It has a folder of its own because ms-swift puts that on sys.path.
"""
