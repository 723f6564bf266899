"""`equipoise prepare conversations FILE`: what a model would be trained on, and what would be left out, and why."""

import argparse
import sys

from equipoise.errors import InputError
from equipoise.pipelines.tables import listed

NAME = "conversations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group(f"for {NAME}")
    options.add_argument(
        "--model", metavar="PATH", help="The model that is to read them: a folder or a hub id (default: the embedded)."
    )
    options.add_argument("--media", metavar="DIR", help="Where the paths in it start (default: beside it).")
    options.add_argument(
        "--question", metavar="TEXT", help="What is asked of media that have a caption and no question."
    )
    options.add_argument("--rows", type=int, metavar="N", help="How many conversations are shown (default: 3).")


def show(args: argparse.Namespace) -> int:
    """A file or folder of conversations in any format, of which the first are shown as a model reads them.

    Raises:
        InputError: the file cannot be read, or none of its conversations can be used.
    """
    from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
    from equipoise.pipelines.instruction_tuning.data import read_data_set
    from equipoise.pipelines.instruction_tuning.examples import summarized, unusable
    from equipoise.pipelines.instruction_tuning.model import load_processor, model_type
    from equipoise.pipelines.instruction_tuning.shown import MARKED, as_read
    from equipoise.pipelines.instruction_tuning.talk import Talk

    model = InstructionTuningModel(
        path=args.model or "demo", revision=None, quantize=None, shard=False, min_pixels=None, max_pixels=None
    )
    talk = Talk(load_processor(model), model_type(model))
    found = read_data_set(str(args.folder), args.media, key="prepare", judge=talk.problems, asked=args.question)
    if found.problems:
        raise InputError("\n".join(summarized([*found.problems, *found.wrong])))
    refused = unusable(found.examples, talk, lambda text: print(text, file=sys.stderr))
    examples = [example for example in found.examples if example not in refused]
    left_out = [*found.wrong, *dict.fromkeys(refused.values())]
    if not examples:
        raise InputError("\n".join(["prepare: no conversation can be used:", *summarized(left_out)]))
    for example in examples[: 3 if args.rows is None else max(0, args.rows)]:
        print(_printable(as_read(example, talk)), end="\n\n")
    kinds = {name: sum(len(e.media) for e in examples if e.kind == kind) for kind, name in _NAMES.items()}
    media = listed([f"{count:,} {name}" for name, count in kinds.items() if count]) or "no pictures or sounds"
    count = f"{len(examples):,} conversation{'' if len(examples) == 1 else 's'}"
    print(f"{count} with {media}; {MARKED.format('this')} is what is learnt, as {talk.model_type} reads it.")
    if left_out:
        count = f"{found.rows - len(examples):,} of {found.rows:,}"
        print(f"left out {count}, which cannot be used; training refuses them without --skip-bad:")
        print("\n".join(summarized(left_out)))
    return 0


def _printable(text: str) -> str:
    """Without what would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


_NAMES = {"image": "pictures", "audio": "sounds", "video": "videos"}
