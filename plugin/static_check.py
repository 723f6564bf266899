"""What can be told about an entry point's target by reading its source, without importing anything.

Importing a plugin usually imports torch, which takes seconds, and runs third-party code; a listing wants neither. What
is found here is certain; a target without a finding may still fail to load.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec


def find_source(module: str) -> tuple[str, str | None]:
    """(problem, source) of a module: one is empty; both are for a module that has no Python source.

    Unlike `importlib.util.find_spec`, the parent packages are not imported.
    """
    path, spec, name = None, None, ""
    for part in module.split("."):
        if spec and path is None:
            return f"ModuleNotFoundError: No module named {module!r}; {name!r} is not a package", None
        name = f"{name}.{part}".lstrip(".")
        spec = _find_spec(name, path)
        if spec is None:
            return f"ModuleNotFoundError: No module named {name!r}", None
        path = spec.submodule_search_locations
    get_source = getattr(spec.loader, "get_source", None) if spec else None
    return "", get_source(module) if get_source else None


def static_check(target: str, base: str) -> str:
    """Why `module:Class` cannot be loaded as a subclass of `base`, as its source tells; empty when nothing is seen.

    Args:
        target: The entry point's value.
        base: `module:Class` of what the target must derive from; empty when nothing is required.
    """
    module, _, attribute = (part.strip() for part in target.partition(":"))
    try:
        problem, source = find_source(module)
        tree = ast.parse(source or "")
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        return f"{type(error).__name__}: {error}"
    if problem or source is None:
        return problem
    for node in tree.body:  # what happens on import whatever the conditions
        if isinstance(node, ast.Raise):
            return f"line {node.lineno}: `{ast.unparse(node)}` is raised on import"
        for name in _imports(node):
            if _find_spec(name, None) is None:
                return f"line {node.lineno}: ModuleNotFoundError: No module named {name!r}"
    first = attribute.partition(".")[0]
    defined = _defined(tree)
    if not defined & {first, "*", "__getattr__"}:
        return f"AttributeError: module {module!r} has no attribute {first!r}"
    no_class = f"{attribute} is not a subclass of {base.replace(':', '.')}"
    for node in tree.body if base else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute:
            return no_class
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return "" if node.bases or node.keywords or node.decorator_list else no_class
    return ""


def _find_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    specs = (finder.find_spec(name, path, None) for finder in sys.meta_path)
    return next((spec for spec in specs if spec), None)


def _imports(node: ast.stmt) -> list[str]:
    """The top-level packages that an import statement needs."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [node.module.partition(".")[0]]
    return []


def _defined(tree: ast.Module) -> set[str]:
    """Every name bound anywhere, "*" for a star import: more than the top level's, so that there is no false alarm."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names
