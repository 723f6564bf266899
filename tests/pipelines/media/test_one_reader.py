"""The same file gives the same values in every pipeline, and a run decodes it once."""

import json
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from equipoise.pipelines.audio_visual import features
from equipoise.pipelines.audio_visual.config import AudioVisualData as ClipSection
from equipoise.pipelines.audio_visual.data import read_manifest
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import media
from equipoise.pipelines.media import reading
from equipoise.pipelines.text_to_image import cuts, latents
from equipoise.pipelines.text_to_image import data as folders
from equipoise.pipelines.text_to_image.config import TextToImageData

SIDE = 32
RED_AND_CLEAR = np.zeros((SIDE, SIDE, 4), np.uint8)
RED_AND_CLEAR[: SIDE // 2] = 200, 0, 0, 255


def odd_pictures(folder: Path) -> list[Path]:
    """Square ones, so that no pipeline has to cut or scale them."""
    ramp = np.tile(np.linspace(0, 65535, SIDE).astype(np.uint16), (SIDE, 1))
    Image.fromarray(ramp).save(folder / "deep.png")
    Image.fromarray(RED_AND_CLEAR).save(folder / "clear.png")
    Image.fromarray(RED_AND_CLEAR).convert("RGB").convert("CMYK").save(folder / "print.tiff", compression="tiff_lzw")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RED_AND_CLEAR[..., :3]).save(folder / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return sorted(folder.iterdir())


def test_an_odd_picture_is_the_same_in_all_three_pipelines(tmp_path):
    paths = odd_pictures(tmp_path)
    section = TextToImageData(folder=str(tmp_path), resolution=SIDE, instance_prompt="x")
    examples, problems = folders.read_examples(section)
    assert [example.path for example in examples] == paths and len(paths) == 5 and not problems
    for path in paths:
        ((trained, _),) = cuts.variants(folders.open_picture(path), section, torch.Generator())
        asked = np.asarray(media.open_picture(path))
        shown = features.read_frames(path, 1, SIDE)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(trained), asked) and np.array_equal(asked, shown), path.name
        assert asked.std() > 0 or path.name == "moving.gif"
    assert media.open_picture(tmp_path / "clear.png").getpixel((0, SIDE - 1)) == (255, 255, 255)
    assert media.open_picture(tmp_path / "deep.png").getpixel((SIDE // 2, 0)) == (132, 132, 132), "of 33825"


def test_an_odd_sound_is_the_same_in_the_pipelines_that_listen(tmp_path):
    rate = 16000
    time = np.arange(rate) / rate
    both = np.stack([0.4 * np.sin(2 * np.pi * 440 * time), np.zeros(rate)], axis=1).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", both * 32768, rate, subtype="FLOAT")
    with av.open(tmp_path / "stereo.mp4", "w") as out:
        stream = out.add_stream("aac", rate=rate, layout="stereo")
        for start in range(0, rate, 1024):
            part = np.ascontiguousarray(both.T[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for name in ("loud.wav", "stereo.mp4"):
        asked, (shown, found) = media.open_sound(tmp_path / name, rate), features.read_audio(tmp_path / name)
        assert found == rate and np.array_equal(asked, shown) and not media.media_problem(tmp_path / name, "audio")
        assert np.abs(asked).max() == pytest.approx(0.2, abs=0.02), name


def test_what_was_made_by_earlier_readers_is_not_used_again(tmp_path, monkeypatch):
    Image.fromarray(RED_AND_CLEAR).save(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("frames,label,split\na.png,x,train\n")
    section = TextToImageData(folder=str(tmp_path), instance_prompt="x")
    clips = ClipSection(manifest=str(tmp_path / "m.csv"), modalities=["visual"])

    def keys() -> tuple[str, str]:
        (clip,) = read_manifest(clips, tmp_path / "m.csv").clips
        return latents.cache_key(tmp_path / "a.png", section, "base"), features.FeatureStore(clips, None).key(clip)

    now = keys()
    assert now == keys()
    for module, name in ((latents, "VERSION"), (features, "READERS")):
        monkeypatch.setattr(module, name, reading.VERSION - 1)
    assert all(before != after for before, after in zip(now, keys(), strict=True))


@pytest.fixture
def opened():
    """How often each file was opened by Python while the list is there."""
    counted: Counter[str] = Counter()
    watching = [True]

    def hook(event: str, args: tuple) -> None:
        if watching and event == "open" and isinstance(args[0], str):
            counted[Path(args[0]).name] += 1

    sys.addaudithook(hook)  # which cannot be taken away
    yield counted
    watching.clear()


def test_a_run_decodes_each_picture_once_from_the_check_to_the_result(tmp_path, opened):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    paths = odd_pictures(pictures)
    talk = [
        {"image": path.name, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
        for path in paths
    ]
    (pictures / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    clips = [f"{path.name},{'ab'[i % 2]},{'train' if i < 3 else 'test'}\n" for i, path in enumerate(paths)]
    (pictures / "clips.csv").write_text("frames,label,split\n" + "".join(clips))
    plain = ["steps=3", "checkpoint_every=0", f"runs={tmp_path / 'runs'}"]
    runs = {
        "text_to_image/dreambooth": [
            "model=demo", f"data={pictures}", "data.instance_prompt=x", "data.resolution=64", "batch=2",
            "samples.prompts=[]", "samples.every=0",
        ],
        "instruction_tuning/demo": [f"data={pictures / 'talk.jsonl'}", "batch=2", "samples.count=1"],
        "audio_visual/demo": [f"data={pictures / 'clips.csv'}", "data.modalities=[visual]", "batch=2",
                              "objective=joint", "train.baselines=[]"],
    }  # fmt: skip
    for name, words in runs.items():
        opened.clear()
        assert main(["train", name, *words, *plain]) == 0
        once = 3 if name.startswith("text_to_image") else 1  # there its digest and its head, for the size, are read too
        assert {path.name: opened[path.name] for path in paths} == {path.name: once for path in paths}, name
