"""How answers are judged, and drawn scenes and made sounds whose answers are exact."""

import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.pipelines.demo import multimodal_folder, scenes, shapes, tones
from equipoise.pipelines.instruction_tuning.evaluate import judge, plain


@pytest.mark.parametrize(
    ("said", "wanted", "metric", "score"),
    [
        ("The Star.", ["star"], "exact", 1),
        ("two", ["2"], "exact", 1),
        ("stars", ["star"], "exact", 0),
        ("a", ["b", "a"], "exact", 1),
        ("red", ["red"] * 10, "vqa", 1),
        ("red", ["red"] * 1 + ["blue"] * 9, "vqa", 0.3),  # 9 of 10 leave it in: min(1, 1/3); 1 leaves it out
        ("red", ["red"] * 2 + ["blue"] * 8, "vqa", 0.6),
        ("green", ["red"] * 10, "vqa", 0),
        ("a red star", ["a red star"], "rouge_l", 1),
        ("red star", ["a red big star"], "rouge_l", 2 / 3),  # recall 2/4, precision 2/2
        ("", ["star"], "rouge_l", 0),
        ("", ["A"], "exact", 0),
        ("A", ["A"], "exact", 1),
        ("?", ["!"], "exact", 0),
        ("35", ["3.5"], "exact", 0),
        ("It is 3.5.", ["it is 3.5"], "exact", 1),
        ("1,000", ["1000"], "exact", 1),
        ("-5", ["5"], "exact", 0),
        ("\u22125", ["-5"], "exact", 1),
        ("C", ["C++"], "exact", 0),
        ("C#", ["C++"], "exact", 0),
        ("blue-green", ["bluegreen"], "exact", 1),
        ("“Étoile”", ["étoile"], "exact", 1),
        ("一只红色的猫", ["一只红色的猫。"], "rouge_l", 1),
        ("红猫", ["红色的猫"], "rouge_l", 2 / 3),  # characters: recall 2/4, precision 2/2
        ("Красная звезда", ["красная звезда"], "rouge_l", 1),
    ],
)
def test_an_answer_is_scored_by_its_metric(said, wanted, metric, score):
    assert judge(said, wanted, metric) == pytest.approx(score)


@pytest.mark.parametrize("said", ["A t-shirt, 3.5 m: it's red!", "", "...", "stars and the moon"])
def test_rouge_of_ascii_is_rouge_scores_own(said):
    from rouge_score.rouge_scorer import RougeScorer

    right = "the red t-shirt is 3.5 m of stars"
    assert judge(said, [right], "rouge_l") == RougeScorer(["rougeL"]).score(right, said)["rougeL"].fmeasure


def test_case_punctuation_articles_and_number_words_do_not_count():
    assert plain("  The answer: an Apple, TWO!  ") == "answer apple 2"


def test_every_answer_is_true_of_its_scene():
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(400):
        scene = scenes.random_scene(rng)
        for kind in scenes.KINDS:
            asked, answer = scenes.question(scene, kind, rng)
            by_shape = {item.shape: item.colour for item in scene.items}
            by_colour = {item.colour: item.shape for item in scene.items}
            word = asked.rstrip("?").split()[-1]
            expected = {
                "colour": lambda word=word, found=by_shape: found[word],
                "shape": lambda word=word, found=by_colour: found[word],
                "presence": lambda word=word, found=by_shape: "yes" if word in found else "no",
                "number": lambda found=by_shape: ["one", "two", "three"][len(found) - 1],
                "background": lambda scene=scene: scene.background,
            }[kind]()
            assert answer == expected
            seen.add(answer)
        assert all(str(item) in scenes.caption(scene) for item in scene.items)
        assert len(by_shape) == len(by_colour) == len(scene.items)
        for statement in scenes.statements(scene, rng):
            assert "?" not in statement
    assert seen == {*shapes.COLOURS, *shapes.SHAPES, "yes", "no", *scenes.NUMBERS, *scenes.BACKGROUNDS}


def test_a_scene_shows_what_it_says():
    rng = np.random.default_rng(0)
    scene = scenes.Scene((scenes.Item("red", "circle", 0), scenes.Item("blue", "square", 3)), "white")
    pixels = np.asarray(scenes.draw(scene, rng)).astype(int)
    assert pixels.shape == (48, 48, 3)
    for quarter, colour in ((0, "red"), (3, "blue"), (1, None), (2, None)):
        y, x = quarter // 2 * 24 + 12, quarter % 2 * 24 + 12
        red, _, blue = pixels[y, x]
        assert (red - blue > 100) == (colour == "red") and (blue - red > 100) == (colour == "blue")


def test_sounds_are_what_they_say():
    rng = np.random.default_rng(0)
    for number in tones.NUMBERS:
        wave = tones.play(tones.Sound(number, "middle", "hum"), rng)
        loud = np.abs(wave).reshape(-1, 160).max(axis=1) > 0.1
        starts = int(loud[0]) + int((~loud[:-1] & loud[1:]).sum())
        assert starts == tones.NUMBERS.index(number) + 1
        strongest = np.abs(np.fft.rfft(wave)).argmax()
        assert abs(strongest - tones.PITCHES["middle"]) < 80


def test_the_same_questions_everywhere(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        scenes.write_questions(tmp_path / name, 5, seed=1)
    first, second = ((tmp_path / name / "questions.jsonl").read_text() for name in ("a", "b"))
    assert first == second and len(first.splitlines()) == 5
    assert json.loads(first.splitlines()[0])["conversations"][0]["value"].startswith("<image>\n")


def test_the_embedded_model_is_small_and_whole():
    files = list(Path(multimodal_folder()).iterdir())
    assert {f.name for f in files} >= {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert sum(f.stat().st_size for f in files) < 15e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")]
