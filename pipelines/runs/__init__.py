"""One run on disk (`run`: its folder, status, environment, checkpoints), and many (`store`: find, list, queue).

Pipelines are given a `run.Run`; commands and the page ask `store.Store`. Builds on config, and on the module files.
"""
