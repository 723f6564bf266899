"""What people set when they tune multimodal models: which weights are trained, how, on pictures of which size."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from equipoise.errors import InputError
from equipoise.lora.names import role
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import _set_pixels, load_processor, no_videos, old_names
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

NAME = "instruction_tuning/demo"
ALONE = ["coordinator=constant", "learning_rate=1e-3", "schedule=constant"]


def train(*words: str) -> Run:
    settings = config.load(NAME, words)
    run = Store(settings.runs).create(settings)
    assert execute(InstructionTuning, settings, run).state == "done"
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v for file in run.result.glob("*.safetensors") for k, v in load_file(file).items()}


def equal(left: dict, right: dict) -> bool:
    return bool(left) and left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model.eval()(**inputs, use_cache=False).logits


def loaded(base: Path, folder: Path):
    """As docs/instruction_tuning.md says."""
    model = AutoModelForMultimodalLM.from_pretrained(base)
    for name in ("encoder", "language"):
        if Path(folder, f"{name}.safetensors").is_file():
            found = model.load_state_dict(load_file(f"{folder}/{name}.safetensors"), strict=False)
            assert found.unexpected_keys == []
    if Path(folder, "adapter_config.json").is_file():
        with old_names():
            model = PeftModel.from_pretrained(model, folder)
    return model


@pytest.fixture
def learnt(monkeypatch) -> list:
    """(a batch, the logits of the trained model on it), of each run as its result is saved."""
    caught, save = [], InstructionTuningWork.save_result

    def spied(work, facts):
        batch = work._batch(work.held[:2])
        caught.append((batch, logits(work.model, batch)))
        save(work, facts)

    monkeypatch.setattr(InstructionTuningWork, "save_result", spied)
    return caught


FILES = {  # what is set → what the result holds
    "language.method=frozen": {"encoder"},
    "frozen=[language_model]": {"encoder"},
    "language.method=full": {"encoder", "language"},
    "lora.dora=true": {"encoder", "adapter_model"},
    "lora.rslora=true": {"encoder", "adapter_model"},
    "lora.modules_to_save=[lm_head, embed_tokens]": {"encoder", "language", "adapter_model"},
    "lora={dora: true, rslora: true, modules_to_save: [layers.1]}": {"encoder", "language", "adapter_model"},
    "{method: lora}": {"language", "adapter_model"},
}


@pytest.mark.parametrize("words", FILES)
def test_what_is_trained_is_saved_and_loads_to_equal_logits(words, short, checkpoints, learnt):
    extra = ["encoder={method: lora}", "language.method=full"] if words == "{method: lora}" else [words]
    run = train(*short(), *ALONE, *extra)
    assert {file.stem for file in run.result.glob("*.safetensors")} == FILES[words]
    batch, wanted = learnt[0]
    base = AutoModelForMultimodalLM.from_pretrained(checkpoints("llava"))
    before, model = logits(base, batch), loaded(checkpoints("llava"), run.result)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3), "something was learnt"
    if isinstance(model, PeftModel):
        torch.testing.assert_close(logits(model.merge_and_unload(), batch), wanted, rtol=1e-4, atol=1e-4)


def test_the_parts_that_are_trained(begun):
    still = begun("language.method=frozen", "coordinator=constant").tuned
    assert set(still.components) == {"encoder"} and not still.has_factors and still.language_weights == {}
    free = begun("language.method=full").tuned
    names = {name for name, _ in free.plain.named_parameters() if free.parts.part(name) == "language"}
    assert free.language_weights.keys() == names and not free.has_factors
    some = begun("language.method=full", "frozen=[embed_tokens, layers.0]").tuned.language_weights
    assert some and not any(".layers.0." in name or "embed_tokens" in name for name in some)
    saved = begun("lora.modules_to_save=[layers.1, lm_head]").tuned
    assert all(".layers.1." in name or "lm_head" in name for name in saved.language_weights)
    assert not any(".layers.1." in name for name in saved.components["language"] if "lora_" in name)


@pytest.mark.parametrize(
    "words",
    [
        ["language.method=frozen", "coordinator=constant"],
        ["language.method=full", "coordinator=commit", "coordinator.options={regularize_every: 2}"],
        ["lora={dora: true, rslora: true, modules_to_save: [lm_head]}", "optimizer.loraplus_lr_ratio=4"],
        ["lora.dora=true", "optimizer=bounded_adamw", "learning_rate=", "optimizer.loraplus_lr_ratio=4"],
        ["train.workers=2", "train.accumulate=2", "lora.dropout=0.3"],
    ],
)
def test_a_stopped_run_resumes_exactly(words, short, stopped_run):
    words = [*short(), *words]
    whole = train(*words)
    settings = config.load(NAME, words)
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    assert equal(weights(whole), weights(run))


def test_full_tuning_in_bf16_and_with_checkpointing(short):
    plain = train(*short(), *ALONE, "language.method=full")
    for words in (["train.precision=bf16"], ["train.gradient_checkpointing=true"]):
        found = weights(train(*short(), *ALONE, "language.method=full", *words))
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        if "bf16" not in words[0]:
            assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in weights(plain).items())


def test_checkpointing_reaches_a_connector_in_front_of_a_frozen_language_model(short):
    words = [*short(), *ALONE, "language.method=frozen"]
    plain, checked = (weights(train(*words, f"train.gradient_checkpointing={flag}")) for flag in ("false", "true"))
    assert all(torch.allclose(checked[name], tensor, atol=1e-6) for name, tensor in plain.items()) and plain


def test_a_dry_run_says_how_much_memory_it_will_take(short, capfd):
    found = []
    for words in ("language.method=lora", "language.method=full"):
        rate = ["train.validate_every=1", "train.keep=best"]
        assert main(["train", NAME, *short(), *rate, words, "--dry-run"]) == 0
        line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("# Memory: about "))
        assert "for each process. An estimate from shapes: " in line
        found.append(float(line.split(" weights and data, ")[1].split()[0]))
    assert 0 < found[0] < found[1], "gradients and optimizer of all weights take more"


def test_loraplus_gives_the_factors_b_a_multiple_of_the_rate(begun, short):
    words = [*ALONE, "encoder.method=lora", "optimizer.rates={encoder: 1e-4}", "optimizer.loraplus_lr_ratio=16"]
    work = begun(*words)
    rates = {id(p): group["lr"] for group in work.optimizer.param_groups for p in group["params"]}
    for name, tensor in work.named.items():
        rate = 1e-4 if work.tuned.parts.part(name) != "language" else 1e-3
        assert rates[id(tensor)] == pytest.approx(rate * 16 if role(name)[0] == "B" else rate), name
    record = train(*short(), *words).metrics()[-1]
    assert (record["rate_encoder"], record["rate_language"], record["rate"]) == (1e-4, 1e-3, 1e-4)
    plain = train(*short(), *ALONE)
    assert not equal(weights(plain), weights(train(*short(), *ALONE, "optimizer.loraplus_lr_ratio=16")))


def test_rslora_scales_by_the_root_of_the_rank(begun):
    plain, rooted = (begun("rank=4", f"lora.rslora={flag}").tuned.plain for flag in ("false", "true"))
    for model, scale in ((plain, 1.0), (rooted, 2.0)):  # alpha is the rank
        found = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
        assert found == {scale}


def test_a_bounded_run_bounds_the_factors_and_trains_doras_sizes_at_the_rate_outside(begun):
    """Whatever LoRA+ makes of B's rate."""
    words = ["optimizer=bounded_adamw", "optimizer.options={reach: 0.02}", "learning_rate=", "coordinator=constant"]
    work = begun(*words, "lora.dora=true", "optimizer.loraplus_lr_ratio=8", "schedule=constant")
    rates = {id(p): group["lr"] for group in work.optimizer.param_groups for p in group["params"]}
    kinds = {name: rates[id(tensor)] for name, tensor in work.named.items()}
    assert {rate for name, rate in kinds.items() if "magnitude" in name} == {1e-3}
    assert {rate for name, rate in kinds.items() if "lora_A" in name} == {1.0}
    assert {rate for name, rate in kinds.items() if "lora_B" in name} == {8.0}
    for step in range(4):
        work.step(step)
    moved = work.optimizer.moved
    assert moved and all(0 < far <= 0.02 * 1.001 for far in moved.values())
    assert {pair.A.shape[0] for pair in work.optimizer.pairs} == {2}, "the sizes are no factors"


def test_batches_that_are_made_ahead_change_nothing(short, begun):
    words = [*short(), "train.accumulate=2", "optimizer=sam"]
    assert equal(*(weights(train(*words, f"train.workers={count}")) for count in (0, 3)))
    work = begun("train.workers=2")
    for number in (3, 0, 1, 1, 5):
        made, wanted = work.batches.get(number), work.talk.training_batch(work._chosen(number))
        assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items()), number


def test_a_picture_that_goes_missing_is_said_from_the_background_too(begun):
    work = begun("train.workers=1")
    for example in work.kept_examples:
        example.media[0].unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"talk.jsonl:\d+: image .*\.png does not exist"):
        work.step(0)


def test_the_size_of_pictures_is_set_where_the_processor_counts_pixels(checkpoints, short, capfd):
    section = InstructionTuningModel(path=str(checkpoints("qwen2_vl")), min_pixels=64, max_pixels=128)
    mine = load_processor(section).image_processor
    assert (mine.size["shortest_edge"], mine.size["longest_edge"]) == (64, 128)
    with pytest.raises(InputError, match="would enlarge pictures to 64 pixels and reduce them to 32"):
        load_processor(InstructionTuningModel(path=section.path, max_pixels=32))
    tokens = []
    for words in ([], ["model.max_pixels=64"]):
        settings = config.load(NAME, [*short("qwen2_vl"), *words])
        talk = Talk(load_processor(settings.model), "qwen2_vl")
        kept, _, _ = load_examples(settings, talk)
        tokens.append(talk.full_length(kept[0]))
    assert tokens[1] < tokens[0], "a smaller picture takes fewer tokens"
    train(*short("qwen2_vl"), "model.max_pixels=64")
    for kind in ("llava", "idefics3", "blip-2"):
        assert main(["train", NAME, *short(kind), "model.max_pixels=64"]) == 2
        assert "does not size pictures by their number of pixels" in capfd.readouterr().err


def test_the_frames_of_videos_get_the_sizes_too_or_videos_are_refused(checkpoints, tmp_path):
    section = InstructionTuningModel(path=str(checkpoints("qwen2_vl")), min_pixels=64, max_pixels=128)
    video = Conversation("video", (tmp_path / "a.mp4",), (Turn("<video>\nWhat is it?", "A star."),))
    for cls, refused in (("Qwen2VLVideoProcessor", []), ("Qwen3VLVideoProcessor", ["Leave model.min_pixels out."])):
        processor = load_processor(section)
        # torchvision, which the real one needs, is mostly not there
        sized = type(cls, (), {"size": {"shortest_edge": 16, "longest_edge": 4096}})()
        processor.video_processor = sized
        _set_pixels(processor, section)
        assert sized.size == {"shortest_edge": 16, "longest_edge": 4096} | (
            {} if refused else {"shortest_edge": 64, "longest_edge": 128}
        )
        problems = Talk(processor, "qwen2_vl", no_videos=no_videos(processor, section)).problems(video)
        assert [problem[-len(refused[0]) :] for problem in problems] == refused
    assert no_videos(processor, InstructionTuningModel(path=section.path)) == ""


@pytest.mark.skipif(not find_spec("torchvision"), reason="processors take videos with torchvision")
@pytest.mark.parametrize(("kind", "count"), [("qwen2_vl", 128), ("qwen2_5_vl", 128), ("qwen3_vl", 4096)])
def test_real_processors_size_frames_as_they_count_them(kind, count, checkpoints):
    section = InstructionTuningModel(path=str(checkpoints(kind)), max_pixels=128)
    processor = load_processor(section)
    assert processor.video_processor.size["longest_edge"] == count
    assert bool(no_videos(processor, section)) == (kind == "qwen3_vl")


def test_a_processor_is_saved_with_the_size_that_was_set(checkpoints, tmp_path):
    section = InstructionTuningModel(path=str(checkpoints("qwen2_vl")), max_pixels=128)
    load_processor(section).image_processor.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert described["size"]["longest_edge"] == 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["language.method=full", "lora.targets=[q_proj]"], "lora.targets is for language.method=lora, and it is full"),
        (["language.method=frozen", "lora.modules_to_save=[lm_head]"], "lora.modules_to_save is for language.method="),
        (["lora.modules_to_save=[nothing]"], "lora.modules_to_save: nothing: no layer of the language model has"),
        (["language.method=frozen"], "and nothing of the language model is trained. Use constant"),
        (["language.method=frozen", "coordinator=constant", "optimizer.rates={language: 1}"], "language: no such comp"),
        (["language.method=full", "optimizer.loraplus_lr_ratio=4"], "loraplus_lr_ratio is for LoRA factors"),
        (["language.method=full", "optimizer=bounded_adamw"], "optimizer.outside_learning_rate: bounded_adamw treats"),
        (["lora.modules_to_save=[lm_head]", "optimizer=scaled_adamw"], "optimizer.outside_learning_rate: scaled_adamw"),
        (["frozen=[language_model]", "lora.targets=[q_proj]"], "no layer is left to get factors"),
        (["model.min_pixels=9", "model.max_pixels=8"], "min_pixels must not be above max_pixels, got 9 and 8."),
        (["train.keep=best"], "keep: best chooses by validations, and there are none. Give validate_every"),
        (["train.patience=2"], "patience counts validations, and there are none."),
    ],
)
def test_what_does_not_go_together_is_one_sentence(words, message, short, capfd):
    assert main(["train", NAME, *short(), *words]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error


def test_full_tuning_with_a_bounded_optimizer_goes_at_the_rate_that_is_given(begun, short):
    words = ["optimizer=bounded_adamw", "learning_rate=", "language.method=full"]
    for own in ("optimizer.outside_learning_rate=1e-5", "optimizer.rates={language: 1e-5}"):
        assert main(["train", NAME, "--dry-run", *short(), *words, own]) == 0
        rates = {group["component"]: group["lr"] for group in begun(*words, own).optimizer.param_groups}
        assert rates["language"] == 1e-5
