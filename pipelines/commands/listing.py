"""`equipoise list` and `equipoise show`: what is installed, and what one of it is."""

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import Any

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import options, references, summary
from equipoise.pipelines.config.builtin import purpose, shipped
from equipoise.pipelines.tables import table
from equipoise.plugin_cache import load_errors

CONFIGS = "configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if parser.get_default("command") == "list":
        parser.add_argument(
            "kind", nargs="?", metavar="KIND", help=f"One of {', '.join(registry.KINDS)}, {CONFIGS}; default: all."
        )
        parser.add_argument("--check", action="store_true", help="Load each one, and exit with 1 if any is broken.")
    else:
        parser.usage = "equipoise show [--json] [KIND] NAME"
        parser.add_argument("name", nargs="+", metavar="[KIND] NAME", help="A name, such as scaled_adamw.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(args: argparse.Namespace) -> int:
    return _list(args) if args.command == "list" else _show(args)


def _list(args: argparse.Namespace) -> int:
    if args.kind == CONFIGS:
        return _list_configs(args)
    found = registry.entries(args.kind)
    errors = [registry.check(entry) for entry in found] if args.check else load_errors(found)
    if args.json:
        records = [asdict(entry) | {"error": error} for entry, error in zip(found, errors, strict=True)]
        print(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        rows = [(entry.name, entry.kind[:-1], entry.distribution, entry.version) for entry in found]
        lines = table(["NAME", "KIND", "DISTRIBUTION", "VERSION"], rows).splitlines()
        print(lines[0])
        for line, error in zip(lines[1:], errors, strict=True):
            print(line + (f"\n    error: {error}" if error else ""))
        if not args.kind:
            print(
                "\n`equipoise list configs` shows the configurations that `equipoise train` and `sweep` know by name."
            )
        if not args.check:
            print("\nWhat is not built in was loaded once; `equipoise list --check` loads each one anew.")
    return 1 if args.check and any(errors) else 0


def _list_configs(args: argparse.Namespace) -> int:
    if args.check:
        raise InputError(f"--check: goes with plugins. `equipoise train NAME --dry-run` checks one of the {CONFIGS}.")
    rows = [(name, purpose(file)) for name, file in shipped().items()]
    if args.json:
        print(json.dumps([dict(zip(("name", "summary"), row, strict=True)) for row in rows], indent=2))
    else:
        print(table(["NAME", "FOR"], rows))
    return 0


def _show(args: argparse.Namespace) -> int:
    if len(args.name) > 2:
        raise InputError(f"show takes NAME or KIND NAME, got {' '.join(args.name)!r}.")
    entry = registry.find(*args.name) if len(args.name) == 2 else registry.find(None, args.name[0])
    cls = registry.load(entry.kind, entry.name)
    rows, papers = option_rows(entry.kind, cls), references(cls)
    if args.json:
        record = asdict(entry) | {"summary": summary(cls), "options": rows, "references": papers}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    print(f"{entry} ({entry.target})\n{summary(cls) or 'It says nothing about itself.'}\n")
    lines = table(["OPTION", "TYPE", "DEFAULT", "BOUNDS"], [list(row.values())[:4] for row in rows]).splitlines()
    print(lines[0] if rows else "No options.")
    for line, row in zip(lines[1:], rows, strict=True):
        print(line)
        if row["help"]:
            print(textwrap.fill(row["help"], 100, initial_indent="    ", subsequent_indent="    "))
    if papers:
        print("\n".join(["\nReferences:", *(f"  {paper}" for paper in papers)]))
    return 0


def _yaml(default: Any) -> str:
    """A default as a configuration would give it: (0.9, 0.99) is [0.9, 0.99], False is false."""
    return default if isinstance(default, str) else json.dumps(default, default=str).replace("null", "none")


def option_rows(kind: str, cls: Any) -> list[dict[str, str]]:
    """The options as text; a pipeline's are the keys of its configuration."""
    if kind == "pipelines":
        from equipoise.pipelines.config import describe  # not needed for a listing, which is to be quick

        found = [(key.key, key) for key in describe(cls.Config)]
    else:
        found = [(option.name, option) for option in options(cls)]
    return [
        {
            "name": name,
            "type": option.type,
            "default": "required" if option.required else _yaml(option.default),
            "bounds": str(option.bounds or ""),
            "help": option.help,
        }
        for name, option in found
    ]
