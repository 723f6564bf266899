"""What a user's `--optimizer NAME --optimizer-args key=value …` asks for, read and checked: for all hosts.

Torch is imported by `choose` alone.
"""

import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from equipoise import registry
from equipoise.errors import InputError, UnknownNameError
from equipoise.options import read_options

SMALL = 0.01  # of the learning rate that an optimizer has of its own


class Choice(NamedTuple):
    """What a user's `--optimizer NAME --optimizer-args key=value …` asks for, checked."""

    name: str
    method: str | None  # "scaled" or "bounded": the program's own optimizer is treated; None: `cls` replaces AdamW
    base: Any  # the optimizer class named together with the method; None: any
    cls: Any  # the class that has the options
    options: dict[str, Any]  # those given
    defaults: dict[str, Any]  # the method's own, all of them

    @property
    def words(self) -> str:
        """The options given, for people."""
        return ", ".join(f"{key} {value}" for key, value in self.options.items()) or "options at their defaults"

    def check_base(self, cls: type) -> None:
        """Raise an InputError if the user named another base than `cls`, as in scaled_adamw on SGD."""
        base = self.base
        if base is not None and not (issubclass(cls, base) or base.__name__.lower() in cls.__name__.lower()):
            raise InputError(
                f"{self.name}: the program's optimizer is {cls.__name__}, not {base.__name__}. Use {self.method}, "
                f"which treats any optimizer, or the program's own option for {base.__name__}."
            )

    def say_treated(self, optimizer: Any, kind: str, found: str) -> None:
        """Report the options in force on an optimizer of the class called `kind`, and what pairs were found."""
        options = {key: optimizer.param_groups[0][key] for key in self.defaults}
        shown = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
        report(f"{self.method} ({shown}) on {kind}. {found}")
        doubt_rate(optimizer)

    def take_place(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `cls` is made with where the program would have made a `kind` with `given`; reports what that loses."""
        known = inspect.signature(self.cls).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        kept = {key: value for key, value in given.items() if takes_all or key in known}
        rate = f", lr {float(given['lr']):g}" if "lr" in given else ""
        report(f"{self.name} takes {kind}'s place{rate} ({self.words}).")
        if lost := [f"{key}={value!r}" for key, value in given.items() if key not in kept]:
            report(f"warning: {self.name} does not have {', '.join(lost)}, which the program sets.")
        return {**kept, **self.options}


def report(text: str) -> None:
    tell(f"equipoise: {text}")


def doubt_rate(optimizer: Any) -> None:
    """Report a learning rate far below the one that an optimizer of pairs has of its own.

    A program passes one always, and its default cannot be told from what a user gave.
    """
    own, outside = (getattr(optimizer, name, None) for name in ("default_lr", "default_outside_lr"))
    if own is None:
        return
    factors = optimizer.pairs.factors
    inside = [group for group in optimizer.param_groups if any(id(param) in factors for param in group["params"])]
    rate = max((float(group.get("initial_lr", group["lr"])) for group in inside), default=0.0)  # a warm-up begins at 0
    if not 0 < rate < SMALL * own:
        return
    rest = sum(id(param) not in factors for group in optimizer.param_groups for param in group["params"])
    others = f" for factors, and {outside:g} for the {rest} other tensors" if rest and outside else ""
    report(
        f"the learning rate {rate:g} is the program's, and small for {type(optimizer).__name__}: {own:g} is "
        f"recommended{others}."
    )


def tell(text: str) -> None:
    """One line on stderr, above the progress bar if the program shows one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)
    sys.stderr.flush()


def choose(name: str, given: dict[str, Any], called: tuple[str, str] = ("--optimizer", "--optimizer-args")) -> Choice:
    """What the user's words mean; nothing is changed.

    Args:
        called: Where the user wrote the name, and the options: errors say so.

    Raises:
        InputError: No such optimizer, an option that it does not have, or a way of training that it cannot serve.
    """
    from torch.optim import Optimizer

    from equipoise.optimizers.bounded import BoundedAdamW
    from equipoise.optimizers.parts.fused_adamw import FusedAdamW
    from equipoise.optimizers.parts.pair_optimizer import PairOptimizer
    from equipoise.optimizers.scaled import ScaledAdamW

    if "lr" in given:
        raise InputError(
            f"{called[1]}: lr is not set here, for the learning rate and its schedule are the program's. Use its own "
            "option for the rate."
        )
    methods: dict[str, Any] = {"scaled": ScaledAdamW, "bounded": BoundedAdamW}  # any class: for the options
    if name in methods:
        method, base = name, None
    else:
        try:
            registry.find("optimizers", name)
        except UnknownNameError as error:
            _refuse_other_kinds(name, called[0])
            raise InputError(f"{called[0]}: {error} `scaled` and `bounded` treat any optimizer.") from error
        cls = registry.load("optimizers", name)
        if hasattr(cls, "perturb"):
            raise InputError(
                f"{called[0]} {name}: it evaluates each batch twice, which an unmodified script does not. `scaled` and "
                f"`bounded` ask nothing of the script, and `equipoise train text_to_image/… optimizer={name}` does it."
            )
        method = next((method for method in methods if name.startswith(f"{method}_")), None)
        if method is None or not issubclass(cls, PairOptimizer):
            return Choice(name, None, None, cls, _checked(name, cls, given, called[1]), {})
        own = (PairOptimizer, FusedAdamW)  # the latter is AdamW, and a script's is torch's
        base = next(c for c in cls.__mro__[1:] if issubclass(c, Optimizer) and not issubclass(c, own))
    ours = methods[method]._OPTIONS
    unknown = [key for key in given if key not in ours]
    if unknown:
        raise InputError(
            f"{called[1]}: {name} has no option {unknown[0]!r} here. It has {', '.join(ours)}; everything else is "
            "the script's own optimizer's, and set by the script's flags."
        )
    return Choice(name, method, base, methods[method], _checked(name, methods[method], given, called[1]), ours)


def refuse_deepspeed(name: str, asked: bool = False) -> None:
    """Raise an InputError if `asked`, or where accelerate or transformers have turned DeepSpeed on in this process."""
    if asked or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise InputError(
            f"--optimizer {name}: DeepSpeed steps its own partitions (ZeRO), which hold no whole LoRA factors. Launch "
            "without DeepSpeed; plain data parallelism (DDP) works."
        )


def _checked(name: str, cls: type, given: dict[str, Any], called: str) -> dict[str, Any]:
    options, problems = read_options(cls, given)
    if problems:
        raise InputError(f"{called} of {name}: {' '.join(problems)}")
    return options


def _refuse_other_kinds(name: str, called: str) -> None:
    for entry in registry.entries():
        if entry.name == name and entry.kind in ("objectives", "coordinators"):
            raise InputError(
                f"{called} {name}: this is {entry}, and works on the losses or rates of a training loop, which an "
                "unmodified script does not hand out. A pipeline of `equipoise list pipelines` has it."
            )


def take_options(argv: Sequence[str], not_ours: Sequence[str] = ()) -> tuple[list[str], str | None, dict[str, str]]:
    """(the words without `--optimizer` and `--optimizer-args`, the optimizer's name or None, its options as text).

    Args:
        not_ours: Values of `--optimizer` that are left where they are.

    Raises:
        InputError: Options that are not `key=value`, that are for no optimizer, or something that is said twice.
    """
    rest, name, given = [], None, []
    words = [part for word in argv for part in _split(word)]
    while words:
        word = words.pop(0)
        if word == "--optimizer" and words and words[0] not in not_ours:
            if name is not None:
                raise InputError(f"--optimizer was given twice, as {name} and as {words[0]}. Keep one of them.")
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
    return rest, name, read_pairs(given, "--optimizer-args")


def read_pairs(words: Iterable[str], called: str) -> dict[str, str]:
    """`key=value` words as a dict; InputError for a key that is there twice."""
    found: dict[str, str] = {}
    for key, value in (word.split("=", 1) for word in words):
        if key in found:
            raise InputError(f"{called} gives {key} twice, as {found[key]} and as {value}. Keep one of them.")
        found[key] = value
    return found


def _split(word: str) -> list[str]:
    """`--optimizer=x` as two words; everything else as it stands."""
    for flag in ("--optimizer", "--optimizer-args"):
        if word.startswith(f"{flag}="):
            return [flag, word.removeprefix(f"{flag}=")]
    return [word]
