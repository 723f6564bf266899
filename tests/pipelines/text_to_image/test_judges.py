"""CLIP and DINO as judges, on small checkpoints in the real layouts, against transformers' own models by hand."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.demo.train_base import tokenizer
from equipoise.pipelines.text_to_image import TextToImage, judges
from equipoise.pipelines.text_to_image.generate import Sample
from equipoise.pipelines.text_to_image.judges import Judges, by_hand, preparation

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SAMPLES = [
    Sample("a red star on a gray background", 0, shapes.draw(shapes.shape("red", "star"), "gray"), True),
    Sample("a sks object", 1, shapes.draw(shapes.OBJECT, "white").resize((40, 60)), True),
    Sample("a sks object", 2, Image.new("RGB", (50, 30), "black"), False),
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    wide = {**SMALL, "intermediate_size": 16}
    text = {**wide, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    vision = {**wide, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=7)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture
def training(pictures):
    return sorted(pictures.glob("*.png"))


def test_clip_is_what_transformers_makes_of_it(clip, training):
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    images = [sample.image for sample in SAMPLES] + [Image.open(path).convert("RGB") for path in training]
    inputs = processor(text=[s.prompt for s in SAMPLES], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    pictures, texts = out.image_embeds.double(), out.text_embeds.double()
    for index, found in enumerate(Judges(clip=str(clip))(SAMPLES, training)):
        assert found.keys() == {"clip", "clip_image"}
        assert found["clip"] == pytest.approx(100 * max(0, float(pictures[index] @ texts[index])), abs=1e-4)
        mean = float(np.mean([pictures[index] @ other for other in pictures[len(SAMPLES) :]]))
        assert found["clip_image"] == pytest.approx(mean, abs=1e-6)


def test_dino_is_what_transformers_makes_of_it(dino, training):
    model, processor = Dinov2Model.from_pretrained(dino).eval(), BitImageProcessorPil.from_pretrained(dino)

    def seen(image):
        with torch.no_grad():
            token = model(**processor(images=image, return_tensors="pt")).pooler_output[0].double()
        return token / token.norm()

    references = [seen(Image.open(path).convert("RGB")) for path in training]
    for sample, found in zip(SAMPLES, Judges(dino=str(dino))(SAMPLES, training), strict=True):
        mean = float(np.mean([seen(sample.image) @ other for other in references]))
        assert found == {"dino": pytest.approx(mean, abs=1e-6)}


def test_a_picture_is_most_like_itself(clip, dino, training):
    whole = Sample("x", 0, Image.open(training[0]).convert("RGB"), True)
    for found in Judges(str(clip), str(dino))([whole], training[:1]):
        assert found["clip_image"] == pytest.approx(1) and found["dino"] == pytest.approx(1)
    assert Judges(str(clip), str(dino))([whole])[0].keys() == {"clip"}, "nothing to be like"


def test_training_pictures_are_read_once_and_not_all_of_many(dino, training, monkeypatch):
    opened = []
    monkeypatch.setattr(judges, "open_picture", lambda path: opened.append(path) or Image.open(path).convert("RGB"))
    monkeypatch.setattr(judges, "MOST", 2)
    score = Judges(dino=str(dino))
    assert score(SAMPLES, training) == score(SAMPLES, training)
    assert opened == [training[0], training[-1]]


@pytest.mark.parametrize("judge", ["clip", "dino"])
def test_pictures_are_prepared_by_hand_as_transformers_does(request, judge):
    """For the processors that want torchvision: the same configuration read by PIL alone."""
    folder = request.getfixturevalue(judge)
    settings = json.loads(
        (folder / ("preprocessor_config.json" if judge == "dino" else "processor_config.json")).read_text()
    )
    images = [sample.image for sample in SAMPLES]
    theirs, ours = preparation(str(folder))(images), by_hand(settings.get("image_processor", settings))(images)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_processor_that_wants_torchvision_is_no_obstacle(tmp_path):
    """facebook/dinov3-vits16-pretrain-lvd1689m has these keys, at 224 pixels."""
    settings = {
        "crop_size": None, "do_center_crop": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225], "resample": 2, "rescale_factor": 0.00392156862745098,
        "size": {"height": 16, "width": 16},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (white,) = preparation(str(tmp_path))([Image.new("RGB", (40, 30), "white")])
    assert white.shape == (3, 16, 16)
    assert white[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_what_is_no_judge_is_refused(clip, tmp_path, short):
    with pytest.raises(InputError, match=r"judges\.clip: .* cannot be loaded as CLIP"):
        Judges(clip=str(tmp_path))
    with pytest.raises(InputError, match=r"judges\.dino: .* is a clip\. Give a vision transformer"):
        Judges(dino=str(clip))
    settings = config.load("text_to_image/dreambooth", [*short, f"judges.dino={tmp_path}"])
    assert any("judges.dino:" in problem for problem in TextToImage.check(settings)), "before hours of training"
    settings = config.load("text_to_image/dreambooth", [*short, f"judges.clip={clip}"])
    assert TextToImage.check(settings) == []


def test_a_comparison_tells_scores_per_cell_and_per_prompt(clip, dino, short, pictures, tmp_path, capfd):
    words = ["samples.prompts=[one thing, another]", "samples.count=2", "steps=1", f"judges.dino={dino}"]
    assert main(["train", "text_to_image/dreambooth", *short, *words, "--id", "one"]) == 0
    assert main(["compare", str(tmp_path / "runs/one"), "--clip", str(clip), "--out", str(tmp_path / "out")]) == 0
    assert "Dino: cosine of picture and training pictures" in capfd.readouterr().out
    document = json.loads((tmp_path / "out/table.json").read_text())
    for cell in document["cells"]:
        scores = [picture["scores"] for picture in cell["pictures"]]
        for name in ("clip", "clip_image", "dino", "broken", "black", "flat", "not_finite", "noise"):
            assert cell["metrics"][name] == pytest.approx(np.mean([one[name] for one in scores]))
    rows = list(csv.DictReader((tmp_path / "out/prompts.csv").read_text().splitlines()))
    assert [(row["run"], row["prompt"]) for row in rows] == [
        (run, prompt) for prompt in ("one thing", "another") for run in ("", "one")
    ]
    first = [p["scores"]["dino"] for p in document["cells"][0]["pictures"] if p["prompt"] == 0]
    assert float(rows[0]["dino"]) == pytest.approx(np.mean(first), rel=1e-5)
    page = (tmp_path / "out/report.html").read_text()
    assert "Prompt by prompt" in page and r" \u00b7 dino " in page and "clip_image: cosine of" in page

    (pictures / "metadata.jsonl").unlink()
    assert main(["compare", str(tmp_path / "runs/one"), "--clip", str(clip), "--out", str(tmp_path / "gone")]) == 0
    assert "one: no likeness to the training pictures is scored." in capfd.readouterr().err
    metrics = json.loads((tmp_path / "gone/table.json").read_text())["cells"][1]["metrics"]
    assert "clip" in metrics and "dino" not in metrics
