"""The parts of a multimodal model, and the components that its trained parameters are split into, each with its rate.

Multimodal models of transformers are a tower (of pictures or sounds), a connector and a language model, under names
that differ. `architecture` knows them for the architectures below and recognises others of that shape, by names or by
the modules' structure; `partition` puts every trained parameter into exactly one component, or refuses with a list.

Names come first, for structure does not tell all: a connector may lie inside of its tower (Qwen's merger, the proj of
its Omni's audio tower, Llama 4's adapter), be a model of its own as a tower is (a Q-Former, Idefics2's resampler), or
the language model may be what all the rest lies in (Phi-4).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from equipoise.errors import InputError

Part = Literal["tower", "connector", "language"]
_LISTED = 8  # names in an error


@dataclass(frozen=True)
class Architecture:
    """Where a model's parts are: names of modules or parameters, full segments of the dotted path."""

    tower: tuple[str, ...]
    connector: tuple[str, ...]
    language: tuple[str, ...]
    apart: bool = False  # whether there is a tower of pictures and one of sounds, each with a component of its own

    def part(self, name: str) -> Part | None:
        """The part that a parameter or module belongs to; what lies deeper in the path decides, as in visual.merger."""
        parts: tuple[Part, ...] = get_args(Part)
        ends = {part: _end(getattr(self, part), name) for part in parts}
        part = max(parts, key=lambda part: ends[part])
        return part if ends[part] >= 0 else None

    def component(self, name: str) -> str:
        """The component that a parameter belongs to where none are given: `encoder`, everything before the language
        model, or `language`; in place of the first `vision` and `audio` where there is a tower of each."""
        if self.part(name) == "language":
            return "language"
        return _medium(name) if self.apart else "encoder"

    def components(self, names: Iterable[str]) -> list[str]:
        """The components of some parameters, `language` last."""
        found = dict.fromkeys(self.component(name) for name in names)
        return sorted(found, key=lambda name: name == "language")


_PROJECTED = Architecture(
    ("vision_tower", "audio_tower"), ("multi_modal_projector", "image_newline"), ("language_model", "lm_head")
)
_QFORMER = Architecture(
    ("vision_model",), ("query_tokens", "qformer", "language_projection"), ("language_model", "lm_head")
)
_CONNECTED = Architecture(("vision_model",), ("connector",), ("text_model", "lm_head"))
_MERGED = Architecture(("visual",), ("visual.merger", "visual.deepstack_merger_list"), ("language_model", "lm_head"))
_EXTENDED = Architecture(  # a language model at the top, which the rest extends
    ("img_processor", "audio_embed.encoder"),
    ("image_embed", "audio_embed"),
    ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
)

ARCHITECTURES: dict[str, Architecture] = {  # by config.model_type
    "blip-2": _QFORMER,
    "instructblip": _QFORMER,
    "llava": _PROJECTED,
    "llava_next": _PROJECTED,
    "llava_onevision": _PROJECTED,
    "vipllava": _PROJECTED,
    "paligemma": _PROJECTED,
    "gemma3": _PROJECTED,
    "internvl": _PROJECTED,
    "mistral3": _PROJECTED,
    "qwen2_vl": _MERGED,
    "qwen2_5_vl": _MERGED,
    "qwen3_vl": _MERGED,
    "idefics2": _CONNECTED,
    "idefics3": _CONNECTED,
    "smolvlm": _CONNECTED,
    "qwen2_audio": _PROJECTED,
    "voxtral": _PROJECTED,
    "phi4_multimodal": _EXTENDED,
}
# What other models of that shape call them (DeepSeek-VL, MiniCPM-V, Kimi-VL, PaddleOCR-VL, Granite Speech, …).
_OTHERS = Architecture(
    ("vision_encoder", "image_tower", "video_tower", "model.encoder"),
    (
        *("aligner", "projector", "mm_projector", "vision_projection", "vision_adapter", "resampler_model", "merger"),
        *("visual.merger_list", "audio_tower.proj", "audio_tower.proj1", "audio_tower.proj2"),  # Qwen's Omni
        *("embed_vision", "embed_audio", "visual_embeddings_table"),  # Gemma 3n's and 4's, Ovis 2's
    ),
    (),
)
_ALL = [*(a for a in dict.fromkeys(ARCHITECTURES.values()) if a is not _EXTENDED), _OTHERS]


def _names(part: Part) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for known in _ALL for name in getattr(known, part)))


_SHAPE = Architecture(_names("tower"), _names("connector"), _names("language"))


def architecture(
    model_type: str,
    names: Iterable[str],
    components: Mapping[str, Sequence[str]] | None = None,
    model: nn.Module | None = None,
) -> Architecture:
    """The parts of a model.

    Args:
        model_type: As its configuration has it, such as `llava`.
        names: Its parameters' names, as `named_parameters` gives them.
        components: Component → patterns, one of them `language`: they stand in for the names where those are not known;
            what the other components name is then the connector.
        model: What the parameters are of; where its names are not known, its structure may tell the parts.

    Raises:
        InputError: The model has no tower or no language model under any known name, or parameters outside all parts.
    """
    names = list(names)
    known = ARCHITECTURES.get(model_type, _SHAPE)
    parts = {name: known.part(name) for name in names}
    if components and not ({"tower", "language"} <= set(parts.values()) and all(parts.values())):
        before = [pattern for name, some in components.items() for pattern in some if name != "language"]
        return Architecture((), tuple(before), tuple(components["language"]))
    if not ({"tower", "language"} <= set(parts.values()) and all(parts.values())):
        if model is not None and (found := by_structure(model)) is not None:
            media = {_medium(name) for name in names if found.part(name) == "tower"}
            return replace(found, apart={"vision", "audio"} <= media)
    if not {"tower", "language"} <= set(parts.values()):
        missing = " and no ".join(sorted({"tower", "language"} - {part for part in parts.values() if part}))
        raise InputError(
            f"model.path: {model_type} is no multimodal language model of a known shape: it has no {missing} among "
            f"{_listed(_tops(names))}. Name the parts by patterns in components."
        )
    if outside := [name for name, part in parts.items() if part is None]:
        raise InputError(
            f"model.path: {model_type} has parameters outside its tower, connector and language model: "
            f"{_listed(_tops(outside))}. Name the parts by patterns in components."
        )
    media = {_medium(name) for name, part in parts.items() if part == "tower"}
    return replace(known, apart={"vision", "audio"} <= media)


def by_structure(model: nn.Module) -> Architecture | None:
    """The parts of a model as its modules show them: what has the text's configuration, and the head, is the language
    model; other models inside that have a configuration of their own are towers; all else is the connector. None where
    one of the three is missing."""
    top: Any = getattr(model, "config", None)
    if not hasattr(top, "get_text_config"):
        return None
    text: Any = top.get_text_config()
    inside = {name: m.config for name, m in model.named_modules() if name and hasattr(m, "config") and _is_model(m)}
    own = {name: config for name, config in inside.items() if config is not top and type(config) is not type(top)}
    language = [name for name, config in own.items() if config is text or type(config) is type(text)]
    towers = [name for name in own if name not in language and not any(at.startswith(f"{name}.") for at in language)]
    head = model.get_output_embeddings() if _is_model(model) else None  # type: ignore[operator]
    if not language or head is None:  # else what answers would be taken for the connector
        return None
    language += [name for name, module in model.named_modules() if module is head]
    known = Architecture(tuple(towers), (), tuple(language))
    between = [name for name, _ in model.named_parameters() if known.part(name) is None]
    if not (towers and between):
        return None
    above = {name: name.rpartition(".")[0] for name in between}
    held = {at.rsplit(".", depth)[0] for at in (*towers, *language) for depth in range(at.count(".") + 1)}
    connector = [name if not parent or parent in held else parent for name, parent in above.items()]
    return replace(known, connector=tuple(dict.fromkeys(connector)))


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which a package without transformers knows by what it can do."""
    return hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings")


def partition(
    named: Mapping[str, Tensor],  # what is trained
    patterns: Mapping[str, Sequence[str]],  # component → patterns
) -> dict[str, dict[str, Tensor]]:
    """Trained parameters by component. A pattern is one or more full segments of a dotted name; * and ? stand for any
    characters: `qformer`, `visual.merger`, `language_model.*.layers.1?`.

    Raises:
        InputError: Parameters in no component or in several, or patterns that match none: all of them are listed.
    """
    found: dict[str, dict[str, Tensor]] = {component: {} for component in patterns}
    nowhere, several, used = [], [], set()
    for name, tensor in named.items():
        mine = []
        for component, some in patterns.items():
            hits = [pattern for pattern in some if matches(pattern, name)]
            used.update((component, pattern) for pattern in hits)
            mine += [component] * bool(hits)
        for component in mine[:1]:
            found[component][name] = tensor
        if not mine:
            nowhere.append(name)
        elif len(mine) > 1:
            several.append(f"{name} ({' and '.join(mine)})")
    problems = []
    if nowhere:
        problems.append(f"components: {len(nowhere)} trained parameters are in none: {_listed(nowhere)}.")
    if several:
        problems.append(f"components: {len(several)} trained parameters are in more than one: {_listed(several)}.")
    problems += [
        f"components.{name}: no trained parameter is in it; its patterns are {', '.join(patterns[name]) or 'none'}."
        for name, inside in found.items()
        if not inside
    ]
    idle = [(c, p) for c, some in patterns.items() for p in some if (c, p) not in used and found[c]]
    problems += [f"components.{component}: {pattern}: matches nothing trained." for component, pattern in idle]
    if problems:
        raise InputError("\n".join(problems))
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of full segments, with * and ?, is found in a dotted name."""
    return _end((pattern,), name) >= 0


def _end(patterns: Iterable[str], name: str) -> int:
    """Where the rightmost match of any pattern ends in a name; −1 without one."""
    ends = [-1]
    for pattern in patterns:
        text = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
        ends += [match.end(1) for match in re.finditer(rf"(?=(?:^|\.)({text})(?:\.|$))", name)]
    return max(ends)


def _medium(name: str) -> str:
    """What a tower or connector is for, as its name says; `encoder` where that does not."""
    if re.search("audio|speech|sound", name):
        return "audio"
    return "vision" if re.search("vision|visual|image|video", name) else "encoder"


def _tops(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
