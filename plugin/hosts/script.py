"""Runs an unmodified training script (diffusers' examples and their like) with an optimizer of Equipoise's.

    python -m equipoise.run SCRIPT.py [its arguments] --optimizer scaled_adamw [--optimizer-args damping=1e-2 …]
    accelerate launch -m equipoise.run SCRIPT.py …
    equipoise run SCRIPT.py …

`--optimizer` takes a method, `scaled` or `bounded`, for whatever optimizer the script makes; `scaled_adamw` or
`bounded_adamw`, the same where the script makes an AdamW (of torch or bitsandbytes); or any other optimizer that
`equipoise list optimizers` shows, which then takes the place of torch.optim.AdamW. `AdamW` and `prodigy`, spelt so, are
left to scripts that have an option `--optimizer` themselves. Without `--optimizer` nothing is touched.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError, UnknownNameError
from equipoise.options import read_options

_SCRIPTS_OWN = ("AdamW", "prodigy")  # what diffusers' scripts call the two that they offer
_USAGE = "Use python -m equipoise.run SCRIPT.py [its arguments] --optimizer NAME [--optimizer-args key=value …]."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script in this process, as `__main__`; returns the exit code."""
    try:
        script, arguments, name, options = parse(sys.argv[1:] if argv is None else argv)
        if name is not None:
            install(name, options)
    except EquipoiseError as error:
        print(error, file=sys.stderr)
        return 2
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except EquipoiseError as error:  # raised at the first step, before anything was trained
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> tuple[str, list[str], str | None, dict[str, str]]:
    """(script, its arguments, the optimizer's name or None, its options as text).

    Raises:
        InputError: No script, no such file, or options that are not `key=value`.
    """
    if not argv or argv[0].startswith("-"):
        raise InputError(f"no script was given. {_USAGE}")
    script, rest, name, given = argv[0], [], None, []
    if not Path(script).is_file():
        raise InputError(f"{script}: no such file. {_USAGE}")
    words = [part for word in argv[1:] for part in _split(word)]
    while words:
        word = words.pop(0)
        if word == "--optimizer" and words and words[0] not in _SCRIPTS_OWN:
            name = words.pop(0)
        elif word == "--optimizer-args":
            while words and "=" in words[0] and not words[0].startswith("-"):
                given.append(words.pop(0))
            if not given:
                raise InputError("--optimizer-args wants key=value, as in --optimizer-args damping=1e-2.")
        else:
            rest.append(word)
    if given and name is None:
        raise InputError("--optimizer-args was given without --optimizer. Say which optimizer they are for.")
    return script, rest, name, dict(pair.split("=", 1) for pair in given)


def _split(word: str) -> list[str]:
    """`--optimizer=x` as two words; everything else as it stands."""
    for flag in ("--optimizer", "--optimizer-args"):
        if word.startswith(f"{flag}="):
            return [flag, word.removeprefix(f"{flag}=")]
    return [word]


def install(name: str, given: dict[str, Any]) -> None:
    """Arrange that the optimizers made from now on in this process are treated.

    Raises:
        InputError: No such optimizer, an option that it does not have, or a way of training that it cannot serve.
    """
    from equipoise.hosts.takeover import replace_adamw, treat
    from equipoise.optimizers.bounded import BoundedAdamW
    from equipoise.optimizers.pair_optimizer import PairOptimizer
    from equipoise.optimizers.scaled import ScaledAdamW

    methods: dict[str, Any] = {"scaled": ScaledAdamW, "bounded": BoundedAdamW}  # any class: for the options

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise InputError(
            f"--optimizer {name}: DeepSpeed steps its own partitions (ZeRO), which hold no whole LoRA factors. Launch "
            "without DeepSpeed; plain data parallelism (DDP) works."
        )
    if name in methods:
        method, base = name, None
    else:
        try:
            registry.find("optimizers", name)
        except UnknownNameError as error:
            _refuse_other_kinds(name)
            raise InputError(f"--optimizer: {error} `scaled` and `bounded` treat any optimizer.") from error
        cls = registry.load("optimizers", name)
        method = next((method for method in methods if name.startswith(f"{method}_")), None)
        if method is None or not issubclass(cls, PairOptimizer):
            replace_adamw(name, cls, _checked(name, cls, given))
            return
        base = next(c for c in cls.__mro__[1:] if c.__module__.startswith("torch.optim"))
    ours = methods[method]._OPTIONS
    unknown = [key for key in given if key not in ours]
    if unknown:
        raise InputError(
            f"--optimizer-args: {name} has no option {unknown[0]!r} here. It has {', '.join(ours)}; everything else is "
            "the script's own optimizer's, and set by the script's flags."
        )
    treat(name, method, base, _checked(name, methods[method], given), ours)


def _checked(name: str, cls: type, given: dict[str, Any]) -> dict[str, Any]:
    options, problems = read_options(cls, given)
    if problems:
        raise InputError(f"--optimizer-args of {name}: {' '.join(problems)}")
    return options


def _refuse_other_kinds(name: str) -> None:
    for entry in registry.entries():
        if entry.name == name and entry.kind in ("objectives", "coordinators"):
            raise InputError(
                f"--optimizer {name}: this is {entry}, and works on the losses or rates of a training loop, which an "
                "unmodified script does not hand out. A pipeline of `equipoise list pipelines` has it."
            )
