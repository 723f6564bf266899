"""`equipoise wrap`: any command, with an optimizer of Equipoise's in every Python process that it starts.

    equipoise wrap --optimizer scaled_adamw --optimizer-args damping=1e-2 -- llamafactory-cli train lora.yaml

For programs with a closed list of optimizers that start their own workers. The command inherits two environment
variables: PYTHONPATH, which leads Python to the sitecustomize in `equipoise.hosts.startup`, and EQUIPOISE_WRAP, which
says what that is to do. When a process imports torch it gets the treatment of `equipoise.hosts.script`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType

from equipoise.errors import EquipoiseError, InputError
from equipoise.hosts.choice import choose, refuse_deepspeed, take_options
from equipoise.hosts.script import install

VARIABLE = "EQUIPOISE_WRAP"  # {"optimizer": NAME, "options": {key: text}} as JSON
USAGE = "equipoise wrap --optimizer NAME [--optimizer-args key=value …] -- COMMAND …"


def main(words: Sequence[str]) -> int:
    """Check what was asked for, then become the command; returns (its exit code) on Windows alone.

    Raises:
        InputError: The words cannot be understood or served, or the command cannot be started.
    """
    command, name, options = parse(words)
    env = dict(os.environ)  # before torch is imported, which may write into it
    if name is None:
        print("equipoise wrap: no --optimizer was given: the command runs as it is.", file=sys.stderr, flush=True)
    else:
        refuse_deepspeed(name, asks_for_deepspeed(command))  # workers look again, into their own settings
        choose(name, options)
        env = environment(name, options, env)
    try:
        if os.name == "nt":  # exec there starts another process and ends this one at once
            return subprocess.call(command, env=env)
        # Python ignores these, and what is ignored stays so across exec.
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
        try:
            os.execvpe(command[0], command, env)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except OSError as error:
        raise InputError(f"{command[0]}: {error.strerror or error}. Is it installed, and executable, here?") from error


def parse(words: Sequence[str]) -> tuple[list[str], str | None, dict[str, str]]:
    """(the command, the optimizer's name or None, its options as text).

    Raises:
        InputError: No `--`, no command, or something before the `--` that is not understood.
    """
    end = list(words).index("--") if "--" in words else len(words)
    if not words[end + 1 :]:
        raise InputError(f"equipoise wrap: no command was given. Use {USAGE}.")
    rest, name, options = take_options(words[:end])
    if rest:
        raise InputError(f"equipoise wrap: {rest[0]} is not understood before the --. Use {USAGE}.")
    return list(words[end + 1 :]), name, options


def asks_for_deepspeed(command: Sequence[str]) -> bool:
    """Whether the words start DeepSpeed: its launcher, or a flag for it that is not set to a word for no."""
    for before, word, after in zip(["", *command], command, [*command[1:], "true"], strict=False):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") in ("__use_deepspeed", "__deepspeed", "__zero_stage"):
            if (value if equals else after).lower() not in ("", "0", "false", "no", "off", "none", "null"):
                return True
        elif Path(word).name == "deepspeed" and not before.startswith("-") and not Path(word).is_dir():
            return True
    return False


def environment(name: str, options: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """`base`, with what makes every Python started in it treat the optimizers of its program."""
    folder = str(resources.files("equipoise.hosts.startup"))
    others = base["PYTHONPATH"].split(os.pathsep) if base.get("PYTHONPATH") else []
    given = json.dumps({"optimizer": name, "options": dict(options)})
    return {**base, "PYTHONPATH": os.pathsep.join(dict.fromkeys([folder, *others])), VARIABLE: given}


def treat_this_process() -> None:
    """Called by sitecustomize once torch is there; ends the process where that cannot be done."""
    try:
        try:
            given = json.loads(os.environ[VARIABLE])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"equipoise wrap: this process inherited PYTHONPATH but not {VARIABLE}, so what it trains would be "
                "left as it is. Let what starts it pass both on."
            ) from error
        install(given["optimizer"], given["options"])
    except EquipoiseError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    before = sys.excepthook

    def one_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, EquipoiseError):
            return before(kind, error, trace)
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2)

    sys.excepthook = one_sentence
