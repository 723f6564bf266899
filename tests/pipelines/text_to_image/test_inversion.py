"""A new word: only its rows are learnt, diffusers reads them, and the base is left without them."""

import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.inversion import WORD_FILE, fresh_rows, with_token
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
WORDS = ["data.instance_prompt=a <vase> object", "token.name=<vase>", "token.vectors=2", "token.learning_rate=0.05"]
WORDS += ["samples.prompts=[a <vase> object]", "learning_rate=0.01", "steps=3"]


def train(*overrides):
    settings = config.load(NAME, overrides)
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    return run, settings, execute(TextToImage, settings, run)


def drawn(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 7.0}
    return np.asarray(pipeline("a <vase> object", latents=noise, **size).images[0], dtype=int)


def test_the_result_loads_in_diffusers_and_draws_the_very_same_picture(short, checkpoint):
    run, _, outcome = train(*short, *WORDS)
    assert outcome.state == "done"
    (rows,) = load_file(run.folder / "result" / WORD_FILE).values()
    assert rows.shape == (2, 16) and not torch.equal(rows[0], rows[1]), "equal at first, in other places"
    assert {"rate_word"} <= run.metrics()[0].keys()
    with Image.open(run.folder / "samples" / "step-00000003" / "00-0.png") as picture:
        ours = np.asarray(picture.convert("RGB"), dtype=int)
    pictures = []
    for word in (False, True):
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
        pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE)
        if word:
            pipeline.load_textual_inversion(run.folder / "result", weight_name=WORD_FILE)
        pictures.append(drawn(pipeline))
    assert np.abs(pictures[1] - ours).max() <= 1  # two ways of rounding to 8 bits
    assert np.abs(pictures[0] - ours).max() > 1, "the word means something"
    assert main(["compare", str(run.folder)]) == 0
    with Image.open(run.folder / "comparison" / "cells" / run.folder.name / "00-0.png") as picture:
        assert np.abs(np.asarray(picture.convert("RGB"), dtype=int) - ours).max() <= 1


def test_xl_learns_it_in_both_text_encoders(short, xl_checkpoint):
    run, _, _ = train(*short, *WORDS, f"model={xl_checkpoint}")
    found = load_file(run.folder / "result" / WORD_FILE)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"clip_l": (2, 16), "clip_g": (2, 32)}
    card = (run.folder / "result" / "README.md").read_text().split("```python\n")[1].split('\npipe("')[0]
    places = {
        "FOLDER OR REPOSITORY": run.folder / "result",
        "FOLDER": run.folder / "result",
        '"tiny"': repr(str(xl_checkpoint)),
    }
    exec(re.sub("|".join(places), lambda found: str(places[found[0]]), card), made := {})
    with Image.open(run.folder / "samples" / "step-00000003" / "00-0.png") as picture:
        ours = np.asarray(picture.convert("RGB"), dtype=int)
    assert np.abs(drawn(made["pipe"]) - ours).max() <= 1


def test_a_word_begins_as_what_it_is_told_and_the_base_forgets_it(short):
    settings = config.load(NAME, [*short, *WORDS, "token.start=red"])
    base = load_base(settings.model, "no")
    before, tokenizer = base.pipeline.text_encoder.get_input_embeddings(), base.pipeline.tokenizer
    weights = before.weight.clone()
    rows = fresh_rows(base, settings.token)
    red = tokenizer("red", add_special_tokens=False).input_ids
    assert torch.equal(rows["text_encoder"][0], weights[red].mean(0)) and len(rows["text_encoder"]) == 2

    def read(caption):
        return base.family.embed(base.pipeline, [caption])["encoder_hidden_states"]

    with with_token(base, "<vase>", fresh_rows(base, settings.token.model_copy(update={"vectors": 1}))):
        if len(red) == 1:
            assert torch.allclose(read("a <vase> circle"), read("a red circle"))
        assert torch.equal(read("a red circle"), read("a red circle"))
    with pytest.raises(InputError, match="the base knows circle already"):
        with with_token(base, "circle", rows):
            pass
    assert base.pipeline.tokenizer is tokenizer and base.pipeline.text_encoder.get_input_embeddings() is before
    assert torch.equal(before.weight, weights)


def test_a_stopped_run_resumes_exactly(short):
    words = [*short, *WORDS, "samples.prompts=[]", "train.ema=0.5"]
    whole, settings, _ = train(*words)
    run = Store(settings.runs).create(settings)
    told = type(run).metric

    def metric(step, **values):
        told(run, step, **values)
        if step == 2:
            run.request("stop")

    run.metric = metric
    assert execute(TextToImage, settings, run).state == "stopped"
    del run.metric
    assert execute(TextToImage, settings, run).state == "done"
    for name in (WORD_FILE, LORA_FILE):
        first, second = (load_file(one.folder / "result" / name) for one in (whole, run))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_wrong_is_said_before(short):
    settings = config.load(NAME, [*short, "token.name=<vase>"])
    assert TextToImage.check(settings) == [
        "token.name: no caption has the word <vase>. Write it where the subject is meant."
    ]
    with pytest.raises(InputError, match="must be one word, such as <vase>"):
        config.load(NAME, [*short, "token.name=two words"])
