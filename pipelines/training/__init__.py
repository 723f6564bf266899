"""The steps of one run: `loop.train_loop`, the `state` that it steps and saves, schedules, processes, memory, layers.

For pipelines, to be imported by module. Builds on runs and config.
"""
