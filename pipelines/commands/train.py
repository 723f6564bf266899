"""`equipoise train`: train a configuration: equipoise train CONFIG [key=value …].
`equipoise resume`: continue a run from its last checkpoint.

One run, in this process or in one of its own.
"""

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.commands import skip_bad
from equipoise.pipelines.config.keys import show
from equipoise.pipelines.files import disk_full, write_atomic
from equipoise.pipelines.jobs import background, checks
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.pipelines.media.reading import decoded_once
from equipoise.pipelines.pipeline import Pipeline, execute, follow
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.outcome import ending
from equipoise.pipelines.runs.run import Run, sentence
from equipoise.pipelines.runs.store import Store, find
from equipoise.pipelines.tables import size_words
from equipoise.pipelines.training import processes

_AFTERWARDS = (
    "  watch it:     equipoise logs {ref} --follow\n"
    "  how it goes:  equipoise runs{where}\n"
    "  stop it:      equipoise stop {ref}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if parser.get_default("command") == "resume":
        parser.add_argument("run", metavar="RUN", help="An id or its beginning, a folder, or latest.")
        parser.add_argument("--queued", action="store_true", help=argparse.SUPPRESS)  # given to detached processes
        parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)  # so is this
    else:
        parser.add_argument("config", metavar="CONFIG", help="A YAML file, or a shipped configuration by name.")
        parser.add_argument("--id", help="The run's id (default: made from time and name).")
        parser.add_argument(
            "--dry-run", action="store_true", help="Check the complete configuration, print it, and end."
        )
        parser.add_argument("--skip-bad", action=skip_bad.SkipBad)
        parser.add_argument("--keys", action="store_true", help="Show every key that can be set, and end.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Values of keys, such as steps=100.")
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")
    parser.add_argument(
        "--detach", action="store_true", help="Train in the background, also after this terminal is closed."
    )


def run(args: argparse.Namespace) -> int:
    command = _resume if args.command == "resume" else _train
    if not (getattr(args, "keys", False) or getattr(args, "dry_run", False)):
        processes.check()
    return command(args) if processes.count() == 1 else _together(command, args)


def _together(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """One run in several processes: the first does as if it were alone, the others follow it."""
    if args.detach:
        raise InputError("--detach: starts one process; accelerate launch and torchrun have started several. Leave it.")
    if getattr(args, "keys", False) or getattr(args, "dry_run", False):
        return command(args) if processes.leads() else 0
    processes.join()
    if processes.leads():
        try:
            return command(args)
        finally:
            with suppress(RuntimeError):  # a process that has ended receives nothing
                processes.begin("")  # only where nothing has begun
    if not (folder := processes.receive()):
        return 0
    found = Run(folder)
    where = environment.working_folder(found.folder / "environment.json")
    if where and where.is_dir():
        os.chdir(where)
    config = found.config()
    follow(_pipeline(config), config, found.folder)
    return 0


@decoded_once()
def _train(args: argparse.Namespace) -> int:
    skipping = skip_bad.overrides(args)
    if args.keys:
        print(_keys(configs.config_class(args.config)))
        return 0
    overrides = [*args.overrides, f"runs={args.runs}"] if args.runs else args.overrides
    config = configs.load(args.config, [*overrides, *skipping])
    pipeline = _pipeline(config)
    checks.check([config])
    config, counted = in_steps(config)
    for line in counted:
        print(line, file=sys.stderr)
    if args.dry_run:
        print(configs.dump(config), end="")
        for note in [*pipeline.notes(config), *_memory(pipeline, config)]:
            print("#", note.replace("\n", "\n# "))  # comments, so that all of it is a configuration
        sys.stdout.flush()
    for doubt in checks.doubts([config]):
        print(doubt, file=sys.stderr)
    if args.dry_run:
        return 0
    made = Store(config.runs).create(config, id=args.id)
    try:
        return _start(made, made.ref, args.detach, pipeline, config)
    except InputError as error:
        # What could not begin is no run. One of a full disk can be resumed, as its message says.
        if not made.metrics() and not disk_full(error.__cause__ or error):
            shutil.rmtree(made.folder)
        raise


def _memory(pipeline: type[Pipeline], config: configs.RunConfig) -> list[str]:
    """How much memory training will take, and what would fit where, as far as that can be told."""
    try:
        if (found := pipeline.estimate_memory(config)) is None:
            return []
        advice = found.advice()
    except Exception:  # a model that runs on shapes alone is more than a pipeline can promise
        return []
    return [f"Memory: about {size_words(found.total)} for each process. {found.in_parts}", *advice]


@decoded_once()
def _resume(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs)
    now = found.status()
    if args.in_turn:
        background.wait_for_turn(found)
        now = found.status()
    if args.queued and now.state != "queued":
        print(f"{found.id}: was cancelled before it began.")
        return now.exit_code or 0
    if now.kind == "sweep":
        from equipoise.pipelines.commands import sweep

        if args.overrides or args.detach:
            raise InputError(f"{found.id}: is a sweep, which is continued as it is, and in this terminal.")
        return sweep.resume(found)
    if now.state == "running" or (now.state == "queued" and now.pid and not args.queued):
        raise InputError(f"{found.id}: is being trained by process {now.pid}; `equipoise stop {found.ref}` stops it.")
    if now.state == "done":
        raise InputError(
            f"{found.id}: is done ({now.step} steps); there is nothing to resume. Start a new run instead."
        )
    ref = found.ref
    where = environment.working_folder(found.folder / "environment.json")
    if where and where.is_dir():
        os.chdir(where)  # relative paths in the configuration start there
    try:
        config = _with_overrides(found, args.overrides)
        pipeline = _pipeline(config)
        if config.total_steps is not None and config.total_steps < now.step:
            raise InputError(
                f"train.steps: {found.id} has taken {now.step} steps already; {config.total_steps} cannot be its total."
            )
        checks.check([config])
    except EquipoiseError as error:
        if args.queued:  # nobody is watching; the folder has to tell
            found.update(state="failed", message=sentence(error), exit_code=2, ended=time.time())
        raise
    if not args.queued:
        found.update(state="queued", pid=None, message="", exit_code=None)
        found.forget_requests()
        if args.overrides:
            write_atomic(found.folder / "config.yaml", configs.dump(config))
    return _start(found, ref, args.detach, pipeline, config)


def _start(made: Run, ref: str, detach: bool, pipeline: type[Pipeline], config: configs.RunConfig) -> int:
    if detach:
        pid = background.start(made)
        print(f"{made.id}: training in the background as process {pid}, in {made.folder}")
        print(_AFTERWARDS.format(ref=ref, where="" if ref == made.id else f" --runs {made.root}"))
        return 0
    processes.begin(str(made.folder))
    command = processes.command(processes.count())
    try:
        together = f", in {processes.count()} processes" if processes.count() > 1 else ""
        print(f"{made.id}: training in {made.folder}{together}", flush=True)
        outcome = execute(pipeline, config, made)
    except KeyboardInterrupt:
        if made.status().state == "queued":
            made.update(state="stopped", message="interrupted before it began.", ended=time.time(), exit_code=130)
        print(
            f"{made.id}: interrupted. `{command} resume {ref}` continues it from its last checkpoint.", file=sys.stderr
        )
        return made.status().exit_code or 130
    print(f"{made.id}: {ending(outcome.state, outcome.message)}")
    if outcome.state == "stopped":
        print(f"`{command} resume {ref}` continues it.")
    elif any(made.result.iterdir()):
        weights = list(made.result.glob("*.safetensors"))
        print(f"  result:  {weights[0] if len(weights) == 1 else made.result}")
        if (figures := made.result / "result.json").is_file():
            print(f"  figures: {figures}")
        if pipeline.loading:
            print(f"  load it: {pipeline.loading.format(folder=str(made.result))}")
        if pipeline.compare.__func__ is not Pipeline.compare.__func__:
            print(f"  next:    `equipoise compare {ref}` {pipeline.comparing}")
    return made.status().exit_code or 0


def _pipeline(config: configs.RunConfig) -> type[Pipeline]:
    return registry.load("pipelines", config.pipeline)


def _with_overrides(found: Run, overrides: list[str]) -> configs.RunConfig:
    file = found.folder / "config.yaml"
    config = configs.load(file, overrides)
    before, allowed = configs.flat(configs.load(file)), type(config).RESUMABLE
    changed = [key for key, value in configs.flat(config).items() if before.get(key) != value]
    if refused := [key for key in changed if not any(key == a or key.startswith(f"{a}.") for a in allowed)]:
        others = f", only {', '.join(allowed)}" if allowed else ""
        raise ConfigError([f"command line: {key}: cannot change when a run is resumed{others}." for key in refused])
    return config


def _keys(cls: type[configs.RunConfig]) -> str:
    lines = []
    for key in configs.describe(cls):
        name = f"{key.key} ({key.short} for short)" if key.short else key.key
        kind = f"{key.wanted} {key.bounds}".strip()
        lines.append(f"{name}: {kind}; {'required' if key.required else f'default {show(key.default)}'}")
        lines.extend(textwrap.wrap(key.help, 112, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)
