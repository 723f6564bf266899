"""Many runs (`sweep`), where their cells are trained (`executors`), and what outlives its starter (`background`).

For commands and the page, to be imported by module. Builds on the module pipeline, comparing, runs and config.
"""
