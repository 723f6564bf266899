"""The command line's commands: each module has `add_arguments(parser)` and `run(args) -> int`, the exit code.

They are named by entry points in the group `equipoise.commands`, as those of plugins are. One that several commands
share learns from `args.command` which it is. The line "`equipoise NAME`: …" of its docstring is what `equipoise --help`
says. Only the command line imports them; what others need lies below.
"""
