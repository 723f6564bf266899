"""`equipoise sweep`: train over optimizers × learning rates × seeds, or any other keys.

What came out is compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields, replace

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.commands import skip_bad
from equipoise.pipelines.config.sections import OptimizerSection
from equipoise.pipelines.jobs import background, checks
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.axes import expand, parse_axes
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.pipelines.jobs.executors import NAMES, Executor, Where, remembered
from equipoise.pipelines.runs.store import Run, find
from equipoise.pipelines.training import processes

SCRIPT = (
    "Another program's training command as each cell's training, such as 'python train.py --lr {learning_rate} --out "
    "{output}': its LoRA files are compared. Text to image alone."
)
EPILOG = """Examples:
  equipoise sweep text_to_image/demo
  equipoise sweep my.yaml --axis optimizer=adamw,scaled_adamw --axis learning_rate=1e-5,1e-4,1e-3 --axis seed=0,1
  equipoise sweep latest        continues a sweep where it stopped
  equipoise sweep text_to_image/dreambooth model=BASE data=PHOTOS --axis learning_rate=1e-5,1e-4,1e-3 \\
      --script 'accelerate launch train.py --base {model} --images {data} --lr {learning_rate} --out {output}'
  equipoise sweep my.yaml --executor ray --address HEAD:6379 --gpus 1      on a cluster; see docs/distributed.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "config", metavar="CONFIG|SWEEP", help="A YAML file or a shipped configuration; or a sweep to continue."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Values of keys for every cell, such as steps=100."
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="A key and its values, in place of the file's axes.",
    )
    parser.add_argument("--script", metavar="COMMAND", help=SCRIPT)
    parser.add_argument(
        "--executor", choices=NAMES, help="What trains the cells: processes on this machine (local), or Ray's."
    )
    parser.add_argument(
        "--address", help="The address of a Ray cluster, HOST:PORT or ray://HOST:PORT (default: one on this machine)."
    )
    parser.add_argument(
        "--max-parallel",
        type=int,
        metavar="N",
        help="The number of cells that train at once (default: as many as there are devices).",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="Another name for --max-parallel.")
    parser.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="How often a cell whose process is lost is started again, from its last checkpoint (default: 2).",
    )
    parser.add_argument("--cpus", type=float, metavar="N", help="The CPUs of each cell (default on Ray: 1).")
    parser.add_argument(
        "--gpus",
        type=float,
        metavar="N",
        help="The GPUs of each cell; 0.5 puts two cells on one (default: 1 where there are any).",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="For Ray: the storage that cells travel through where nodes share no disk, such as s3://….",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Check every cell, print the complete configuration, and end."
    )
    parser.add_argument("--skip-bad", action=skip_bad.SkipBad)
    parser.add_argument("--id", help="The sweep's id (default: made from time and name).")
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")
    parser.add_argument("--no-compare", action="store_true", help="Train, and make no comparison at the end.")
    parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)  # given to detached processes


def run(args: argparse.Namespace) -> int:
    check_workers(args.workers)
    processes.alone("A sweep")
    found = _continued(args)
    if args.dry_run:
        return _dry_run(args, found)
    where = _where(args, remembered(found) if found else Where())
    if found and args.in_turn and not background.wait_for_turn(found):
        print(f"{found.id}: was cancelled before it began.")
        return found.status().exit_code or 0
    with sweeps.opened(where) as executor:  # before a new sweep is made
        sweep = found or sweeps.create(_asked(args), args.id)
        if not found:
            where.remember(sweep)
        code = _train(sweep, executor, where)
    return _compared(sweep, code, where.compare)


def _dry_run(args: argparse.Namespace, found: Run | None) -> int:
    """Shows and checks what would be started; nothing is made."""
    if found:
        raise InputError(f"--dry-run: {found.id} is there already, and was checked when it was made. Leave it out.")
    config = _asked(args)
    checks.check(expand(config).values())
    config, counted = in_steps(config)
    cells = expand(config).values()
    print(configs.dump(config, as_given=True), end="", flush=True)
    for line in [*counted, *_rates_left_empty(cells), *checks.doubts(cells), f"{config.name}: {len(cells)} cells."]:
        print(line, file=sys.stderr)
    return 0


def _rates_left_empty(cells: Iterable[configs.RunConfig]) -> list[str]:
    """The learning rates of cells whose optimizer says them: the sweep's configuration holds none."""
    sections = [section for cell in cells if isinstance(section := getattr(cell, "optimizer", None), OptimizerSection)]
    rates = {section.name: section.learning_rate for section in sections if "learning_rate" in section.left_empty}
    words = ", ".join(f"{rate:g} for {name}" for name, rate in rates.items())
    return [f"optimizer.learning_rate: is left empty, which means {words}."] if words else []


def check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise InputError(f"--workers: must be at least 1, got {workers}.")


def resume(sweep: Run, workers: int | None = None) -> int:
    """Trains what is left of a sweep, which is all of a new one, and compares; returns the exit code."""
    processes.alone("A sweep")
    where = remembered(sweep)
    if workers:
        where = replace(where, max_parallel=workers)
    with sweeps.opened(where) as executor:
        code = _train(sweep, executor, where)
    return _compared(sweep, code, where.compare)


def _train(sweep: Run, executor: Executor, where: Where) -> int | None:
    """The exit code where it did not come to its end."""
    mine = sweeps.cells(sweep)
    print(f"{sweep.id}: {len(mine)} cells in {sweep.folder}", flush=True)
    try:
        outcome = sweeps.train(sweep, executor, where)
    except KeyboardInterrupt:
        print(f"{sweep.id}: interrupted. `equipoise resume {sweep.ref}` continues it.", file=sys.stderr)
        return sweep.status().exit_code or 130
    print(f"{sweep.id}: {outcome.state}. {outcome.message}", flush=True)
    if outcome.state == "stopped":
        print(f"`equipoise resume {sweep.ref}` continues it.")
        return sweep.status().exit_code or 0
    for line in [*sweeps.troubles(mine), *([] if where.compare else sweeps.doubts(mine))]:  # a comparison has them too
        print(line, file=sys.stderr, flush=True)
    return None


def _compared(sweep: Run, code: int | None, wanted: bool) -> int:
    if code is not None:
        return code
    if wanted:
        from equipoise.pipelines.commands.compare import compare_and_report

        compare_and_report([sweep])
    return sweep.status().exit_code or 0


def _where(args: argparse.Namespace, before: Where) -> Where:
    """What is asked for now, and else what was before.

    Raises:
        InputError: A number is out of its bounds, or an option has no use.
    """
    asked = {it.name: getattr(args, it.name, None) for it in fields(Where)}
    if args.no_compare:
        asked["compare"] = False
    if args.workers is not None:
        if args.max_parallel is not None:
            raise InputError("--workers and --max-parallel are the same. Give one.")
        asked["max_parallel"] = args.workers
    if asked["executor"] not in (None, before.executor):
        before = Where()
    where = replace(before, **{name: value for name, value in asked.items() if value is not None})
    if problem := where.problem():
        raise InputError(problem)
    if where.storage and re.search(r"://[^/@]*:[^/@]*@", where.storage):
        raise InputError("--storage: has a password in it, which would be written down. Give it as fsspec's settings.")
    if where.executor != "ray" and (useless := [f"--{name}" for name in ("address", "storage") if asked[name]]):
        raise InputError(f"{', '.join(useless)}: only --executor ray has a use for it.")
    return where


def _continued(args: argparse.Namespace) -> Run | None:
    """The sweep that is asked for, if it is one and not a configuration."""
    name = args.config
    if name in configs.shipped() or name.endswith((".yaml", ".yml")):
        return None
    try:
        sweep = find(name, args.runs, kinds=("sweep",))
    except InputError:
        if name == "latest":
            raise
        return None  # the configuration loader has the better words for what is wrong
    if sweep.status().kind != "sweep":
        raise InputError(f"{sweep.id}: is a single run; `equipoise resume {sweep.ref}` continues it.")
    if args.overrides or args.axis or args.id or args.skip_bad or args.script:
        raise InputError(f"{sweep.id}: a sweep is continued as it is; start a new one to change keys or axes.")
    return sweep


def _asked(args: argparse.Namespace) -> configs.RunConfig:
    """The configuration of a new sweep, as the command line has it."""
    overrides = [*args.overrides, *([f"runs={args.runs}"] if args.runs else [])]
    overrides += [f"script={json.dumps(args.script)}"] if args.script else []
    config = configs.load(args.config, [*overrides, *skip_bad.overrides(args)])
    if axes := parse_axes(args.axis):
        config = configs.set_keys(config, {"sweep": axes}, source="--axis")
    return config
