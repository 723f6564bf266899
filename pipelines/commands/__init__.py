"""The command line's commands: each module has `add_arguments(parser)` and `run(args) -> int`, the exit code."""
