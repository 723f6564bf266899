"""Many runs (`sweep`), where their cells are trained (`executors`), what outlives its starter (`background`), and the
making of comparisons (`making`).

For commands and the page, to be imported by module. Builds on the module pipeline, comparing, runs and config.
"""
