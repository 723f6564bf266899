"""What is installed: optimizers, objectives, pipelines, commands and so on, found by their distributions' entry points.

Listing imports nothing, neither plugins nor torch; loading a name imports that one. Built-ins are found in the same way
as third parties, and `torch.optim`'s optimizers are known by their classes' names in lower case, so that a baseline is
a name like any other, and always torch's own.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions, version
from operator import attrgetter
from typing import Any, NamedTuple

from equipoise.errors import BrokenPluginError, DuplicateNameError, EquipoiseError, InputError, UnknownNameError
from equipoise.quick import no_garbage_collection


class Kind(NamedTuple):
    """What entries of one kind must be."""

    one: str  # what one of them is called
    base: str = ""  # `module:Class` that their targets derive from
    has: tuple[str, ...] = ()  # or what targets have, where this package does not depend on that of the base
    needs: str = ""  # the same for people


KINDS = {  # each is the entry-point group `equipoise.KIND`
    "optimizers": Kind("optimizer", "torch.optim:Optimizer"),
    "coordinators": Kind("coordinator", "equipoise.coordination.coordinator:Coordinator"),
    "objectives": Kind("objective", "equipoise.balancing.objective:Objective"),
    "pipelines": Kind(
        "pipeline", has=("Config.model_fields", "run"), needs="a `Config` (a pydantic model) and a `run`"
    ),
    "families": Kind(
        "family",
        has=("pipeline", "title", "denoiser", "text_encoders", "targets", "noise", "embed", "predict"),
        needs="what equipoise.pipelines.text_to_image.families.Family leaves open",
    ),
    "commands": Kind("command", has=("add_arguments", "run"), needs="`add_arguments(parser)` and `run(args)`"),
}


_held: ContextVar[list["Entry"] | None] = ContextVar("held", default=None)

# The base class, and what needs more than gradients of dense parameters: a closure (LBFGS), sparse gradients.
_NOT_FOR_TRAINING = ("Optimizer", "LBFGS", "SparseAdam")


@dataclass(frozen=True, order=True)
class Entry:
    """One name that a distribution offers."""

    kind: str  # a key of KINDS
    name: str
    distribution: str
    version: str
    target: str  # `module:Class`; a command's is a module
    error: str = ""  # why it cannot be used, as far as the entry points alone tell

    def __str__(self) -> str:
        return f"{KINDS[self.kind].one} {self.name!r} of {self.distribution} {self.version}"


def entries(kind: str | None = None) -> list[Entry]:
    """Everything that is offered, or everything of one kind, sorted. Imports nothing.

    Raises:
        InputError: There is no such kind.
    """
    kinds = list(KINDS) if kind is None else [_kind(kind)]
    held = _held.get()
    found = [entry for entry in (_installed(kinds) if held is None else held) if entry.kind in kinds]
    found.sort(key=lambda entry: (list(KINDS).index(entry.kind), entry.distribution == "torch", entry))
    return [_with_rivals(entry, found) for entry in found]


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Within it, what is installed is read from disk once, for those who ask a hundred times in a row.

    What runs within another such block takes what that one has read.
    """
    held = _held.get()
    token = _held.set(_installed(KINDS) if held is None else held)
    try:
        yield
    finally:
        _held.reset(token)


def find(kind: str | None, name: str) -> Entry:
    """The one entry of that kind and name; kind None: of whichever kind. Imports nothing.

    Raises:
        UnknownNameError: No distribution offers it; the message has the closest names.
        DuplicateNameError: More than one does; the message names them.
        InputError: The name is known in several kinds and none was given, or there is no such kind.
    """
    known = entries(kind)
    found = [entry for entry in known if entry.name == name]
    what, listed = (KINDS[_kind(kind)].one, f" {_kind(kind)}") if kind else ("plugin", "")
    if not found:
        raise UnknownNameError(f"no {what} {name!r}. {_closest(name, known)}`equipoise list{listed}` shows all.")
    if len({entry.kind for entry in found}) > 1:
        kinds = " and ".join(dict.fromkeys(entry.kind for entry in found))
        raise InputError(f"{name!r} is found among {kinds}. Say which, as in `{found[0].kind} {name}`.")
    if len(found) > 1:
        raise DuplicateNameError(found[0].error)
    return found[0]


def load(kind: str, name: str) -> Any:
    """The class of that kind and name (of a command: its module), imported.

    Raises:
        UnknownNameError: No distribution offers it.
        DuplicateNameError: More than one does.
        BrokenPluginError: It cannot be imported, has no such attribute, or is of another kind.
    """
    return load_entry(find(kind, name))


def load_entry(entry: Entry) -> Any:
    """As `load`, for an entry that is found already."""
    if entry.error:
        raise BrokenPluginError(entry.error)
    try:
        with no_garbage_collection():
            loaded = EntryPoint(entry.name, entry.target, f"equipoise.{entry.kind}").load()
        problem = _wrong_kind(entry.kind, loaded)
    except (Exception, SystemExit) as error:  # whatever third-party code raises while it is imported
        raise BrokenPluginError(broken(entry, f"{type(error).__name__}: {error}")) from error
    if problem:
        raise BrokenPluginError(broken(entry, problem))
    return loaded


def check(entry: Entry) -> str:
    """Why an entry cannot be used, found by loading it; empty when it can."""
    try:
        load(entry.kind, entry.name)
    except EquipoiseError as error:
        return str(error)
    return ""


def find_source(module: str) -> tuple[str, str]:
    """(file, source) of a module, without importing it or, as `importlib.util.find_spec` does, its parents.

    Empty where there is no such module, or none in Python.
    """
    path, spec, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        specs = (finder.find_spec(name, path, None) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec), None)
        if spec is None:
            return "", ""
        path = spec.submodule_search_locations
    get_source = getattr(spec.loader, "get_source", None) if spec else None
    return (spec and spec.origin) or "", (get_source(module) if get_source else None) or ""


def broken(entry: Entry, problem: str) -> str:
    """The sentence for an entry that cannot be used."""
    return f"{entry} cannot be used: {entry.target}: {problem.rstrip('.')}. Repair or uninstall {entry.distribution}."


def _kind(kind: str) -> str:
    """The kind in the plural; `optimizer` will do for `optimizers`."""
    for name, known in KINDS.items():
        if kind in (name, known.one):
            return name
    raise InputError(f"no kind {kind!r}. The kinds are {', '.join(KINDS)}.")


def _installed(kinds: Collection[str]) -> list[Entry]:
    """What there is of these kinds, and perhaps of others."""
    return [*_offered(), *(_torch_optimizers() if "optimizers" in kinds else ())]


def _offered() -> Iterator[Entry]:
    """The entries of every distribution; of two copies of one distribution, the first on the path counts."""
    keys = set()
    for distribution in distributions():
        key = _key(distribution)
        if not key or key in keys:
            continue
        keys.add(key)
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except (OSError, ValueError):  # not text: nothing that anybody could load
            continue
        if "[equipoise." not in text:  # before anything is parsed: most have nothing for us, and any may be malformed
            continue
        metadata = distribution.metadata  # read once: it is parsed anew each time
        name = metadata["Name"] or "a distribution without a name"
        try:
            points = [(point.group, point.name, point.value) for point in distribution.entry_points]
            error = ""
        except Exception as cause:  # depends on the Python version; one bad file must not hide the other distributions
            points = [(group, "?", "?") for group in re.findall(r"^\[(equipoise\.\w+)", text, re.M)]
            error = f"its entry_points.txt cannot be read: {cause}"
        for group, point, target in sorted(set(points)):
            kind = group.removeprefix("equipoise.")
            if group.startswith("equipoise.") and kind in KINDS:
                entry = Entry(kind, point, name, metadata["Version"] or "", target)
                problem = error or _malformed(kind, target)
                yield replace(entry, error=broken(entry, problem)) if problem else entry


def _malformed(kind: str, target: str) -> str:
    if kind == "commands":
        return "" if re.fullmatch(r"[\w.]+", target) else "this is no module's name"
    return "" if re.fullmatch(r"[\w.]+ *: *[\w.]+", target) else "this is not `module:Class`"


def _key(distribution: Distribution) -> str:
    """A name that a distribution's copies share; empty for a leftover such as `~orch-2.6.0.dist-info`.

    So pip renames what it is about to remove, and where that is interrupted it passes over what is left.
    """
    folder = getattr(getattr(distribution, "_path", None), "name", "a finder's own")
    if not folder[:1].isalnum():
        return ""
    try:  # what importlib.metadata tells copies by: the folder's name, as metadata are slow to parse
        return distribution._normalized_name  # pyright: ignore[reportAttributeAccessIssue]
    except Exception:  # of metadata that nobody could read
        return folder


def _torch_optimizers() -> Iterator[Entry]:
    """What `torch.optim` exports for ordinary training, read from its source: importing torch takes seconds."""
    _, source = find_source("torch.optim")
    release = version("torch")
    for name in _imported_classes(source):
        if name not in _NOT_FOR_TRAINING:
            yield Entry("optimizers", name.lower(), "torch", release, f"torch.optim:{name}")


@lru_cache(maxsize=1)  # parsing takes milliseconds, and a configuration asks several times
def _imported_classes(source: str) -> list[str]:
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.name[0].isupper()]


def _with_rivals(entry: Entry, found: list[Entry]) -> Entry:
    rivals = [other for other in found if (other.kind, other.name) == (entry.kind, entry.name) and other.name != "?"]
    if len(rivals) < 2:
        return entry
    claims = " and ".join(f"{other.distribution} {other.version} ({other.target})" for other in rivals)
    others = [other.distribution for other in rivals if other.distribution != "torch"]
    what = "all but one" if len(others) == len(rivals) else " and ".join(others)
    return replace(entry, error=f"{KINDS[entry.kind].one} {entry.name!r} is claimed by {claims}. Uninstall {what}.")


def _closest(name: str, known: list[Entry]) -> str:
    likeness = {e.name: SequenceMatcher(None, name.lower(), e.name).ratio() for e in known}
    best = max(likeness.values(), default=0)
    close = sorted((n for n, ratio in likeness.items() if ratio >= max(0.6, best - 0.1)), key=lambda n: -likeness[n])
    return f"Did you mean {' or '.join(map(repr, close[:3]))}? " if close else ""


def _wrong_kind(kind: str, loaded: Any) -> str:
    known = KINDS[kind]
    module, _, base = known.base.partition(":")
    if base:
        fits = isinstance(loaded, type) and issubclass(loaded, getattr(import_module(module), base))
        return "" if fits else f"{loaded!r} is not a subclass of {module}.{base}"
    lacking = [name for name in known.has if not _has(loaded, name)]
    lacking += sorted(getattr(loaded, "__abstractmethods__", ()))
    return f"{loaded!r} is not a {known.one}: it needs {known.needs}; {lacking[0]} is not there" if lacking else ""


def _has(loaded: Any, name: str) -> bool:
    """Whether there is such an attribute; `a.b` is b of its a."""
    try:
        attrgetter(name)(loaded)
    except AttributeError:
        return False
    return True
