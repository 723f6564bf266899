"""`equipoise list`: what is installed: optimizers, coordinators, objectives, pipelines, families, commands, configs.
`equipoise show`: one of them: what it is, its options, its paper.
"""

import argparse
import json
import textwrap
from dataclasses import asdict

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import references, summary
from equipoise.pipelines.config.builtin import purpose, shipped
from equipoise.pipelines.config.option_rows import option_rows
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
        rows = [(entry.name, registry.KINDS[entry.kind].one, entry.distribution, entry.version) for entry in found]
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
    none = f"`equipoise {entry.name} --help` shows its arguments." if entry.kind == "commands" else "No options."
    print(lines[0] if rows else none)
    for line, row in zip(lines[1:], rows, strict=True):
        print(line)
        if row["help"]:
            print(textwrap.fill(row["help"], 100, initial_indent="    ", subsequent_indent="    "))
    if papers:
        print("\n".join(["\nReferences:", *(f"  {paper}" for paper in papers)]))
    return 0
