"""`equipoise list`: what is installed: optimizers, coordinators, objectives, pipelines, families, commands, configs.
`equipoise show`: one of them: what it is, its options, its paper.
"""

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import Any

from equipoise import registry
from equipoise.errors import InputError
from equipoise.options import description, references, summary
from equipoise.pipelines.config.builtin import purpose, shipped
from equipoise.pipelines.config.option_rows import option_rows
from equipoise.pipelines.tables import table
from equipoise.plugin_cache import load_errors

CONFIGS = "configs"
_ONE_LINE = 10_000  # characters: what is long stands below an option's line
_LONG = 40  # characters of a type


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
    if args.kind and not any(args.kind in (name, kind.one) for name, kind in registry.KINDS.items()):
        raise InputError(f"no kind {args.kind!r}. The kinds are {', '.join(registry.KINDS)}, {CONFIGS}.")
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
    rows, papers, rates = option_rows(entry.kind, cls), references(cls), _own_rates(entry, cls)
    more = description(cls) if entry.kind != "commands" else []  # of those it is a module's, for who reads code
    if args.json:
        record = asdict(entry) | {"summary": summary(cls), "description": more, "options": rows}
        record |= {"references": papers, "rates": rates}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    print(f"{entry} ({entry.target})\n{summary(cls) or 'It says nothing about itself.'}\n")
    for words in more:
        print(f"{textwrap.fill(words, 100)}\n")
    none = f"`equipoise {entry.name} --help` shows its arguments." if entry.kind == "commands" else "No options."
    print(_options(rows) if rows else none)
    if rates:
        words = ", ".join(f"{key.replace('_', ' ')} {rate:g}" for key, rate in rates.items())
        print(f"\nIn a pipeline, where none is given: {words}.")
    if papers:
        print("\n".join(["\nReferences:", *(f"  {paper}" for paper in papers)]))
    return 0


def _own_rates(entry: registry.Entry, cls: Any) -> dict[str, float]:
    if entry.kind != "optimizers":
        return {}
    from equipoise.pipelines.config.sections import own_rates  # pydantic is slow to import

    try:
        return own_rates(entry.name, cls)
    except ValueError as error:
        raise InputError(str(error)) from error


def _options(rows: list[dict[str, str]]) -> str:
    """A line on each option, and its help below it; choices that would widen the table stand there, too."""
    columns = ["name", *(["short"] if "short" in rows[0] else []), "type", "default", "bounds"]
    headers = ["OPTION", *(column.upper() for column in columns[1:])]
    long = [row["type"] if len(row["type"]) > _LONG else "" for row in rows]
    shown = [row | {"type": "one of those below"} if words else row for row, words in zip(rows, long, strict=True)]
    lines = table(headers, [[row[column] for column in columns] for row in shown], width=_ONE_LINE).splitlines()
    parts = lines[:1]
    for line, words, row in zip(lines[1:], long, rows, strict=True):
        text = f"{words[:1].upper()}{words[1:]}. {row['help']}" if words else row["help"]
        parts += [line, *textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(parts)
