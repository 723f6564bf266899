"""Runs an unmodified training script (diffusers' examples and their like) with an optimizer of Equipoise's.

    python -m equipoise.run SCRIPT.py [its arguments] --optimizer scaled_adamw [--optimizer-args damping=1e-2 …]
    accelerate launch -m equipoise.run SCRIPT.py …
    equipoise run SCRIPT.py …

`--optimizer` takes a method, `scaled` or `bounded`, for whatever optimizer the script makes; `scaled_adamw` or
`bounded_adamw`, the same where the script makes an AdamW (of torch or bitsandbytes); or any other optimizer that
`equipoise list optimizers` shows, which then takes the place of torch.optim.AdamW. `AdamW` and `prodigy`, spelt so, are
left to scripts that have an option `--optimizer` themselves. Without `--optimizer` nothing is touched.
"""

import builtins
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from pkgutil import get_importer
from typing import Any

from equipoise.errors import EquipoiseError, InputError
from equipoise.hosts.choice import Choice, choose, refuse_deepspeed, take_options, tell

_SCRIPTS_OWN = ("AdamW", "prodigy")  # what diffusers' scripts call the two that they offer
_USAGE = "Use python -m equipoise.run SCRIPT.py [its arguments] --optimizer NAME [--optimizer-args key=value …]."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script in this process, as `__main__`; returns the exit code."""
    try:
        script, arguments, name, options = parse(sys.argv[1:] if argv is None else argv)
        if not sys.flags.safe_path:
            sys.path[0] = str(Path(script).resolve().parent)
        if name is not None:
            install(name, options)
    except EquipoiseError as error:
        print(error, file=sys.stderr)
        return 2
    sys.argv = [script, *arguments]
    try:
        execute(script)
    except EquipoiseError as error:  # raised at the first step, before anything was trained
        tell(str(error))
        return 2
    return 0


def execute(script: str) -> None:
    """Run a file as Python does: `runpy.run_path` leaves its path relative, or makes `sys.argv[0]` absolute as well."""
    file = os.path.join(os.getcwd(), script)
    if get_importer(file) or file.endswith(".pyc"):
        runpy.run_path(file, run_name="__main__")
        return
    loader = SourceFileLoader("__main__", file)
    spec = ModuleSpec("__main__", loader, origin=file)
    spec.has_location = True
    module = module_from_spec(spec)
    vars(module).update(__builtins__=builtins, __cached__=None, __package__=None, __spec__=None)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        exec(loader.source_to_code(loader.get_data(file), file), vars(module))
    finally:
        sys.modules["__main__"] = before


def parse(argv: Sequence[str]) -> tuple[str, list[str], str | None, dict[str, str]]:
    """(script, its arguments, the optimizer's name or None, its options as text).

    Raises:
        InputError: No script, no such file, or options that are not `key=value`.
    """
    if not argv or argv[0].startswith("-"):
        raise InputError(f"no script was given. {_USAGE}")
    if not Path(argv[0]).is_file():
        raise InputError(f"{argv[0]}: no such file. {_USAGE}")
    return argv[0], *take_options(argv[1:], _SCRIPTS_OWN)


def install(name: str, given: dict[str, Any]) -> None:
    """Arrange that the optimizers made from now on in this process are treated; once is enough.

    Raises:
        InputError: As `choose`; or this process is treated in another way already.
    """
    from equipoise.hosts.takeover import replace_adamw, treat  # here, for it imports torch

    choice: Any = choose(name, given)  # to pyright, which reads this file under two names, it has two types
    refuse_deepspeed(name)
    if _installed:
        if _installed != [choice]:
            raise InputError(
                f"--optimizer {name}: `equipoise wrap` treats this process already, with --optimizer "
                f"{_installed[0].name} and options of its own. Give --optimizer to one of the two."
            )
    elif choice.method is None:
        replace_adamw(choice)
    else:
        treat(choice)
    _installed[:] = [choice]


_installed: list[Choice] = []  # at most one
