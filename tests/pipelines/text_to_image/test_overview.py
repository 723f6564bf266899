"""What a run says it will be trained on, before it begins: shapes, captions, and what of these may not be meant."""

import pytest
from PIL import Image

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.overview import unread_words

NAME = "text_to_image/dreambooth"
LONG = "a red circle on a white background, " * 30


@pytest.fixture
def shapes(tmp_path):
    """Twenty square pictures and a tall one."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (64, 64), (10 * index, 30, 30)).save(folder / f"{index:02d}.png")
    Image.new("RGB", (40, 80), "blue").save(folder / "tall.png")
    return folder


def loaded(folder, *words):
    return config.load(NAME, ["model=demo", f"data={folder}", "data.resolution=64", *words])


def test_a_shape_of_too_few_pictures_for_a_batch_is_reported(shapes):
    words = ["data.instance_prompt=x", "data.buckets=true"]
    (doubt,) = TextToImage.doubts(loaded(shapes, *words, "batch=8"))
    assert "fewer pictures than a batch of 8 holds (1 of 48 × 80); such a batch is filled up" in doubt
    assert "count up to 8 times as much" in doubt
    assert TextToImage.doubts(loaded(shapes, *words, "batch=1")) == []
    assert TextToImage.notes(loaded(shapes, *words))[1] == (
        "pictures in an epoch by shape: 20 of 64 × 64, 1 of 48 × 80."
    )


def test_a_picture_turned_by_its_exif_has_the_shape_that_is_trained_on(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "turned.jpg", exif=exif)
    notes = TextToImage.notes(loaded(tmp_path, "data.instance_prompt=x", "data.buckets=true"))
    assert notes[1] == "pictures in an epoch by shape: 1 of 48 × 80."


@pytest.mark.parametrize(("kind", "whole"), [("StableDiffusionXLPipeline", False), ("FluxPipeline", True)])
def test_captions_that_are_cut_are_reported_with_what_is_lost(build_checkpoint, kind, whole):
    """FLUX's T5 reads 512 tokens, so that what its CLIP leaves out is read all the same."""
    caption = "a red circle on a white background, " * 5 + "a photo of sks"
    lost = unread_words(str(build_checkpoint(kind)), caption)
    assert (lost == "") is whole
    if not whole:
        assert caption.endswith(lost) and len(lost) < len(caption)


def test_a_caption_that_is_cut_loses_what_its_encoder_does_not_read(tmp_path):
    from transformers import AutoTokenizer

    from equipoise.pipelines.demo import base_folder

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(LONG)
    (doubt,) = TextToImage.doubts(loaded(tmp_path, "data.instance_prompt=null"))
    assert doubt.startswith("data.folder: 1 caption (a.png) is longer than the text encoders read")
    tokenizer = AutoTokenizer.from_pretrained(base_folder() / "tokenizer")
    lost = unread_words("demo", LONG.strip())
    read = LONG.strip().removesuffix(lost).strip()
    assert lost and len(tokenizer(read).input_ids) == tokenizer.model_max_length
    doubts = TextToImage.doubts(loaded(tmp_path, f"data.instance_prompt={LONG}"))
    assert any(line.startswith("data.instance_prompt: is longer than the text encoders read") for line in doubts)


def test_a_dry_run_shows_the_folder_as_comments_of_the_configuration(shapes, capsys, tmp_path):
    words = ["model=demo", f"data={shapes}", "data.resolution=64", "data.instance_prompt=x", f"runs={tmp_path}"]
    assert main(["train", NAME, *words, "--dry-run"]) == 0
    shown, said = capsys.readouterr()
    assert f"# {shapes}: 21 pictures; captions: 21 from data.instance_prompt.\n" in shown and said == ""
    (tmp_path / "again.yaml").write_text(shown)
    assert config.load(str(tmp_path / "again.yaml")) == config.load(NAME, words)
