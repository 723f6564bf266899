"""Families that their pipelines' own code trains: what a run of one costs, keeps and refuses."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import begin_training, load_base, place
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.families.flows import FLOWS
from equipoise.pipelines.text_to_image.formats import layout
from equipoise.pipelines.text_to_image.prior import class_examples
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAMES = list(FLOWS)
PROMPT = "a sks object"
CLASS = ("prior.prompt=a vase", "prior.count=1", "samples.steps=1")
pytestmark = [
    pytest.mark.usefixtures("few_draws"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # of diffusers, by it
]


def test_a_sweep_of_rates_is_drawn_beside_the_untouched_base(built, tmp_path, words):
    more = ["steps=2", f"samples.prompts=[{PROMPT}]", "--axis", "learning_rate=0.01,0.02"]
    assert main(["sweep", *words(built("QwenImagePipeline"), tmp_path / "runs", *more)]) == 0
    cells = Store(tmp_path / "runs").list(kinds=("cell",))
    assert [cell.state for cell in cells] == ["done"] * 2
    assert len({picture.read_bytes() for picture in (tmp_path / "runs").rglob("cells/*/00-0.png")}) == 3


def test_class_pictures_of_a_distilled_base_are_not_those_of_the_other_one(built, base, tmp_path, words):
    made = base("Krea2Pipeline")
    name, *more = words(built("Krea2Pipeline"), tmp_path, *CLASS)
    settings = config.load(name, more)
    before, folders = made.pipeline.config.get("is_distilled"), []
    try:
        for distilled in (False, True, False):
            made.pipeline.register_to_config(is_distilled=distilled)
            folders += [example.path.parent for example in class_examples(made, settings, tmp_path)]
    finally:
        made.pipeline.register_to_config(is_distilled=before)
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_counts_every_weight(name, built, tmp_path, words, float_bytes):
    folder = built(name)
    estimate, more = (
        TextToImage.estimate_memory(config.load(words(folder, tmp_path)[0], [*words(folder, tmp_path)[1:], batch]))
        for batch in ("batch=2", "batch=4")
    )
    weights = float_bytes(folder)
    made = load_base(TextToImageModel(path=str(folder)), "no")
    with made.adapted(config.load("text_to_image/dreambooth", []).lora, 0) as parts:
        factors = sum(p.numel() * 4 for part in parts.values() for p in part.parameters() if p.requires_grad)
    assert estimate and more and estimate.model == pytest.approx(weights + factors, rel=1e-2)
    assert more.activations == pytest.approx(2 * estimate.activations, rel=0.1)


def test_the_estimate_counts_what_is_kept_of_captions(built, tmp_path, words):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, caption in enumerate(["a vase", "a cup", "a vase"]):
        Image.new("RGB", (32, 32), (80 * index, 0, 0)).save(photos / f"{index}.png")
        (photos / f"{index}.txt").write_text(caption)
    folder = built("HiDreamImagePipeline")
    found = []
    for more in (["data=demo"], [f"data={photos}"], [f"data={photos}", "data.caption_dropout=0.1"]):
        given = words(folder, tmp_path, "data.instance_prompt=null", *more)
        found.append(TextToImage.estimate_memory(config.load(given[0], given[1:])).model)
    one = (128 * 16 + 32 * 128 * 16 + 16) * 4 + 8  # float32 of three tensors, and a length
    assert [other - found[0] for other in found[1:]] == [2 * one, 3 * one]


def test_a_text_encoder_that_is_published_elsewhere_is_given_beside_the_base(built, tmp_path, capsys, words):
    whole, base, other = built("HiDreamImagePipeline"), tmp_path / "hidream", tmp_path / "llama"
    shutil.copytree(whole, base)
    for part in ("text_encoder_4", "tokenizer_4"):
        shutil.copytree(base / part, other, dirs_exist_ok=True)
        shutil.rmtree(base / part)
    index = json.loads((base / "model_index.json").read_text())
    described = {key: value for key, value in index.items() if not key.endswith("_4")}
    (base / "model_index.json").write_text(json.dumps(described))
    runs, more = tmp_path / "runs", ["steps=1", "samples.prompts=[]", "--id"]
    assert main(["train", *words(base, runs), *more, "refused"]) == 2
    assert (
        f"model.path: {base} has no text_encoder_4. Give model.text_encoder_4: Llama 3.1 8B" in capsys.readouterr().err
    )
    assert main(["train", *words(base, runs, f"model.text_encoder_4={tmp_path}"), *more, "refused"]) == 2
    assert f"model.text_encoder_4: {tmp_path} is no folder with a model's config.json" in capsys.readouterr().err
    assert main(["train", *words(built("SanaPipeline"), runs, f"model.text_encoder_4={other}"), *more, "refused"]) == 2
    assert "model.text_encoder_4: has no effect on Sana" in capsys.readouterr().err
    beside = words(base, runs, f"model.text_encoder_4={other}")
    estimates = [TextToImage.estimate_memory(config.load(some[0], some[1:])) for some in (beside, words(whole, runs))]
    assert estimates[0] == estimates[1]
    assert main(["train", *beside, *more, "beside"]) == main(["train", *words(whole, runs), *more, "whole"]) == 0
    files = [load_file(runs / run / "result" / LORA_FILE) for run in ("beside", "whole")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    card = (runs / "beside" / "result" / "README.md").read_text()
    assert 'text_encoder_4 = LlamaForCausalLM.from_pretrained("llama"' in card and "tokenizer_4=tokenizer_4" in card


def test_a_base_without_a_part_is_refused_before_anything_else_is_fetched():
    described = {"_class_name": "HiDreamImagePipeline", "text_encoder_4": [None, None], "vae": [None, None]}
    found = layout._index_problems(described, Path("model_index.json"), "owner/name")
    assert "model.path: owner/name has no vae, which HiDream-I1 needs. Give one that has it." in found
    assert any("has no text_encoder_4. Give model.text_encoder_4" in problem for problem in found)
    assert len(layout._index_problems(described, Path("model_index.json"), "owner/name", ["text_encoder_4"])) == 1


def test_hidream_takes_no_pictures_that_are_no_squares_beyond_its_most_tokens(built, tmp_path, capsys, words):
    """This one has 8 × 8 cells of 8 pixels at most."""
    folder = built("HiDreamImagePipeline")
    given = words(folder, tmp_path, "data.buckets=true", "data.bucket_step=16")
    assert main(["train", *given, "data.resolution=96", "--id", "refused"]) == 2
    assert "data.buckets: HiDream-I1 takes pictures that are no squares up to 4096 pixels" in capsys.readouterr().err
    problems = TextToImage.check
    assert problems(config.load(given[0], [*given[1:], "data.resolution=64"])) == []
    assert problems(config.load(given[0], [*given[1:], "data.resolution=96", "data.buckets=false"])) == []
    found = [
        TextToImage.estimate_memory(config.load(given[0], [*given[1:], *more])).activations
        for more in (["data.resolution=32"], ["data.resolution=64"], ["data.resolution=64", "data.buckets=false"])
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to:UserWarning")  # in diffusers
def test_chroma_is_compiled_once_where_it_is_checkpointed(base, some_latents):
    made, counter = base("ChromaPipeline"), CompileCounter()
    compiled = torch.compile(made.denoiser, backend=counter, dynamic=False)
    noisy, read = some_latents(made, 1), made.family.embed(made.pipeline, [PROMPT])
    found = []
    with made.adapted(config.load("text_to_image/dreambooth", []).lora, 0) as parts:
        begin_training(parts["transformer"])
        for _ in range(2):
            made.denoiser.enable_gradient_checkpointing()  # a second run of this process
            for time in (300.0, 800.0):
                made.family.predict(compiled, noisy, torch.tensor([time]), read, torch.zeros(1, 6)).sum().backward()
                found.append(counter.frame_count)
    made.denoiser.disable_gradient_checkpointing()
    assert found[0] > 0 and len(set(found)) == 1


def test_captions_are_kept_in_the_computers_memory_and_those_of_runs_before_are_dropped(base):
    """The denoiser stands on a device without memory: nothing that is kept may be there, and all that it reads is."""
    made = base("SanaPipeline")
    made.read(["a vase", "a cup"])
    made.read(["a cup", "a jug"])
    assert made.embeddings.keys() == {"a cup", "a jug"}
    away = copy.copy(made.pipeline)
    with torch.device("meta"):
        vars(away)["transformer"] = type(made.denoiser).from_config(made.denoiser.config)
    there = replace(made, pipeline=away)
    assert {tensor.device.type for tensor in there.known(["a cup", "a jug"]).values()} == {"meta"}
    assert {tensor.device.type for kept in there.embeddings.values() for tensor in kept.values()} == {"cpu"}


def test_text_encoders_come_to_the_device_only_to_read(built):
    """A device without memory: what is moved there is seen to be."""
    made = load_base(TextToImageModel(path=str(built("HiDreamImagePipeline"))), "no")
    away = copy.copy(made.pipeline)
    for name in (made.family.denoiser, *made.encoders):
        vars(away)[name] = copy.deepcopy(getattr(away, name))
    place(away, made.family, made.encoders, torch.device("meta"), TextToImageModel())
    there = replace(made, pipeline=away)

    def where() -> set[str]:
        return {getattr(away, name).device.type for name in there.encoders}

    assert there.denoiser.device.type == "meta" and where() == {"cpu"}
    with pytest.raises(NotImplementedError, match="Cannot copy out"), there.encoders_on_device():
        assert where() == {"meta"}
