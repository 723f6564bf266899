"""The parts of multimodal models by their parameters' names, and partitions that are complete or refused."""

import warnings

import pytest
import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from equipoise.coordination.components import ARCHITECTURES, architecture, by_structure, matches, partition
from equipoise.errors import InputError

# Names as the models of transformers 5 have them; the pipeline's tests build five of these for real.
LAYOUTS = {
    "blip-2": {
        "tower": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
        "connector": ["query_tokens", "qformer.encoder.layer.0.output.dense.weight", "language_projection.bias"],
        "language": ["language_model.model.decoder.layers.0.fc1.weight", "language_model.lm_head.weight"],
    },
    "llava": {
        "tower": ["model.vision_tower.vision_model.embeddings.class_embedding"],
        "connector": ["model.multi_modal_projector.linear_1.weight"],
        "language": ["model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
    },
    "qwen2_5_vl": {
        "tower": ["model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.weight"],
        "connector": ["model.visual.merger.mlp.0.weight"],
        "language": ["model.language_model.embed_tokens.weight", "lm_head.weight"],
    },
    "smolvlm": {
        "tower": ["model.vision_model.post_layernorm.weight"],
        "connector": ["model.connector.modality_projection.proj.weight"],
        "language": ["model.text_model.norm.weight", "lm_head.weight"],
    },
    "paligemma": {
        "tower": ["model.vision_tower.vision_model.head.probe"],
        "connector": ["model.multi_modal_projector.linear.weight"],
        "language": ["model.language_model.norm.weight", "lm_head.weight"],
    },
    "qwen2_audio": {
        "tower": ["model.audio_tower.conv1.weight"],
        "connector": ["model.multi_modal_projector.linear.bias"],
        "language": ["model.language_model.layers.0.self_attn.q_proj.bias", "lm_head.weight"],
    },
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("known", [True, False])
def test_every_parameter_is_in_its_part(kind, known):
    """Also under a model type that nobody has heard of, and inside peft's wrapper."""
    names = {name: part for part, some in LAYOUTS[kind].items() for name in some}
    found = architecture(kind if known else "unheard_of", names)
    assert {name: found.part(name) for name in names} == names
    wrapped = f"base_model.model.{LAYOUTS[kind]['language'][0].removesuffix('.weight')}.lora_A.default.weight"
    assert found.part(wrapped) == "language"
    assert kind in ARCHITECTURES


def test_what_has_another_shape_is_refused():
    with pytest.raises(
        InputError, match=r"gpt2 is no multimodal .*: it has no language and no tower among transformer.h"
    ):
        architecture("gpt2", ["transformer.h.0.attn.weight"])
    names = [name for some in LAYOUTS["llava"].values() for name in some]
    with pytest.raises(
        InputError, match=r"has parameters outside its tower, connector and language model: model.extra"
    ):
        architecture("llava", [*names, "model.extra.weight"])


def test_components_stand_in_for_names_that_nobody_knows():
    names = ["eyes.conv.weight", "bridge.weight", "mind.layers.0.weight", "spare.weight"]
    with pytest.raises(InputError, match=r"Name the parts by patterns in components"):
        architecture("unheard_of", names)
    found = architecture("unheard_of", names, {"seeing": ["eyes", "bridge"], "language": ["mind"]})
    assert [found.part(name) for name in names] == ["connector", "connector", "language", None]
    llava = [name for some in LAYOUTS["llava"].values() for name in some]
    own = {"encoder": ["multi_modal_projector"], "language": ["language_model"]}
    assert architecture("llava", llava, own) == ARCHITECTURES["llava"], "known names keep tower and connector apart"


def test_patterns_are_whole_segments():
    assert matches("visual.merger", "model.visual.merger.mlp.0.weight") and matches("visual", "model.visual.a")
    assert not matches("visual", "model.visuals.a") and not matches("erger", "model.visual.merger")
    assert matches("layers.1?", "a.layers.12.b") and not matches("layers.1?", "a.layers.1.b")
    assert matches("language_model.*.q_proj", "language_model.layers.0.q_proj.weight")


TRAINED = {name: torch.zeros(1) for name in ("a.tower.w", "a.merger.w", "a.language_model.lora_A", "a.extra.w")}


def test_a_partition_is_complete_or_refused_with_the_list():
    found = partition(TRAINED, {"tower": ["tower"], "mid": ["merger", "extra"], "language": ["language_model"]})
    assert {name: list(inside) for name, inside in found.items()} == {
        "tower": ["a.tower.w"],
        "mid": ["a.merger.w", "a.extra.w"],
        "language": ["a.language_model.lora_A"],
    }
    with pytest.raises(InputError) as error:
        partition(TRAINED, {"tower": ["tower", "t*"], "all": ["a.tower", "gone"], "none": ["nothing"]})
    text = str(error.value)
    assert "3 trained parameters are in none: a.merger.w, a.language_model.lora_A, a.extra.w." in text
    assert "1 trained parameters are in more than one: a.tower.w (tower and all)." in text
    assert "components.all: no trained parameter is in it; its patterns are a.tower, gone." in text
    assert "components.none: no trained parameter is in it; its patterns are nothing." in text


def test_a_pattern_that_matches_nothing_is_refused_though_all_else_is_well():
    patterns = {"encoder": ["tower", "merger", "extra", "typo"], "language": ["language_model"]}
    with pytest.raises(InputError, match=r"^components.encoder: typo: matches nothing trained.$"):
        partition(TRAINED, patterns)


def test_two_components_where_none_are_named():
    for kind, some in LAYOUTS.items():
        names = [name for names in some.values() for name in names]
        known = architecture(kind, names)
        assert known.components(names) == ["encoder", "language"]
        assert {known.component(name) for name in some["language"]} == {"language"}


def test_a_model_with_a_tower_of_pictures_and_one_of_sounds_has_a_component_of_each():
    layout = {
        "vision": ["model.visual.blocks.0.mlp.up_proj.weight", "model.visual.merger.mlp.0.weight"],
        "audio": ["model.audio_tower.layers.0.fc1.weight", "model.audio_tower.proj.weight"],
        "language": ["model.language_model.norm.weight", "lm_head.weight"],
    }
    names = {name: component for component, some in layout.items() for name in some}
    known = architecture("qwen2_5_omni_thinker", names)
    assert {name: known.component(name) for name in names} == names and known.components(names) == list(layout)
    assert [known.part(name) for name in names] == ["tower", "connector", "tower", "connector", "language", "language"]
    one = [name for name in names if "audio" not in name]
    assert architecture("qwen2_5_omni_thinker", one).components(one) == ["encoder", "language"]


def test_gemmas_embedders_are_connectors():
    names = ["vision_tower.encoder.x", "embed_vision.embedding_projection.weight", "audio_tower.layers.0.x"]
    names += ["embed_audio.embedding_projection.weight", "language_model.norm.weight"]
    known = architecture("gemma4", [f"model.{name}" for name in names])
    assert [known.part(name) for name in names] == ["tower", "connector", "tower", "connector", "language"]
    assert known.components(names) == ["vision", "audio", "language"]


ALIKE = [
    "llava",
    "llava_onevision",
    "paligemma",
    "gemma3",
    "internvl",
    "mistral3",
    "idefics3",
    "smolvlm",
    "qwen2_audio",
]


@pytest.mark.parametrize("kind", ALIKE)
def test_structure_gives_the_parts_that_names_do(kind):
    model = on_meta(kind)
    names = [name for name, _ in model.named_parameters()]
    by_name, found = architecture(kind, names), by_structure(model)
    assert found is not None and {n: found.part(n) for n in names} == {n: by_name.part(n) for n in names}


@pytest.mark.parametrize("kind", ["deepseek_vl_hybrid", "kosmos-2", "vibevoice_asr", "nemo_speechlm"])
def test_structure_tells_the_parts_of_models_whose_names_nobody_knows(kind):
    model = on_meta(kind)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=r"of a known shape|outside its tower"):
        architecture(kind, names)
    found = architecture(kind, names, model=model)
    assert {found.part(name) for name in names} == {"tower", "connector", "language"}
    assert found.components(names)[-1] == "language"
    layers = [name for name in names if (".layers." in name and "text" in name) or "language_model" in name]
    assert layers and {found.part(name) for name in layers} == {"language"}


@pytest.mark.parametrize("kind", ["git", "kyutai_speech_to_text", "qwen2_5_omni", "blip", "fuyu"])
def test_what_structure_does_not_tell_is_refused_still(kind):
    model = on_meta(kind)
    assert by_structure(model) is None
    with pytest.raises(InputError, match=r"Name the parts by patterns in components"):
        architecture(kind, [name for name, _ in model.named_parameters()], model=model)


def on_meta(kind: str) -> torch.nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForMultimodalLM.from_config(CONFIG_MAPPING[kind]())
