"""Runs of the instruction-tuning pipeline on small checkpoints: what they learn, save, survive and leave behind."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, PretrainedConfig

from equipoise.coordination.components import ARCHITECTURES, architecture
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Turn
from equipoise.pipelines.instruction_tuning.model import adapt, load_model, load_processor, old_names
from equipoise.pipelines.instruction_tuning.talk import IGNORED
from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
from equipoise.pipelines.media.sounds import seconds as sound_seconds
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs.store import Store

NAME = "instruction_tuning/demo"
KINDS = ["blip-2", "instructblip", "llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "paligemma", "qwen2_audio"]
OFTEN = "coordinator.options={measure_every: 1, every: 2}"


def train(*overrides):
    settings = config.load(NAME, overrides)
    run = Store(settings.runs).create(settings)
    return run, execute(InstructionTuning, settings, run)


def weights(run) -> dict[str, torch.Tensor]:
    return {k: v for file in run.result.glob("*.safetensors") for k, v in load_file(file).items()}


def equal(left, right) -> bool:
    return bool(left) and left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def overrides(short, sounds):
    return lambda kind="llava": short(kind, sounds if kind == "qwen2_audio" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns_and_comes_back(kind, overrides, checkpoints):
    """Both sides move, κ is measured, and five lines load the result to the same numbers, merged too."""
    run, outcome = train(*overrides(kind), "learning_rate=1e-2", "schedule=constant", OFTEN, "samples.every=3")
    assert outcome.state == "done" and "On 1 held-out question, exact accuracy" in outcome.message
    result = json.loads((run.result / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    metrics = run.metrics()
    assert {"loss", "kappa", "h_language", "h_encoder", "rate_encoder", "rate_language"} <= metrics[0].keys()
    assert all(record["kappa"] > 0 and record["h_encoder"] > 0 for record in metrics)
    assert metrics[-1]["rate_encoder"] + metrics[-1]["rate_language"] == pytest.approx(2e-2)
    assert metrics[-1]["rate_encoder"] != pytest.approx(1e-2)
    assert (run.folder / "samples" / "step-00000003" / "answers.jsonl").is_file()

    tuned = adapt(load_model(InstructionTuningModel(path=str(checkpoints(kind))), "no"), run.config())
    assert set(tuned.components) == {"encoder", "language"}
    assert all("lora_" in name for name in tuned.components["language"])
    assert not any("lora_" in name for name in tuned.components["encoder"])
    moved = load_file(run.result / "encoder.safetensors")
    assert moved.keys() == tuned.encoder_weights.keys()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in tuned.encoder_weights.items())

    model = AutoModelForMultimodalLM.from_pretrained(checkpoints(kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.load_state_dict(load_file(run.result / "encoder.safetensors"), strict=False).unexpected_keys == []
    with old_names():
        model = PeftModel.from_pretrained(model, run.result)
    ids = torch.randint(0, 200, (1, 5))
    language = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("language_model", "text_model"))
    expected = language(input_ids=ids)[0]
    merged = model.merge_and_unload()
    after = merged.state_dict()
    language = next(m for n, m in merged.named_modules() if n.split(".")[-1] in ("language_model", "text_model"))
    torch.testing.assert_close(language(input_ids=ids)[0], expected, rtol=1e-4, atol=1e-5)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(tuned.parts.part(name) == "language" for name in changed)
    assert {tuned.parts.part(name) for name in changed} == {"language", "connector"}, "the tower stays frozen"


@torch.no_grad()
def test_the_norms_of_h_are_of_instructions_and_media(begun):
    """Eq. 5's I^T is the instruction: a longer answer changes nothing."""
    work = begun()
    found = []
    for answer in ("red", "red and nothing else"):
        example = replace(work.kept_examples[0], turns=(Turn("<image>\nWhat colour?", answer),))
        batch = work._batch([example])
        logits, _, sample = work._forward(batch)
        found.append(work._prediction(batch, logits, sample))
    ids = batch["input_ids"][batch["labels"] == IGNORED]
    ids = ids[ids != work.tuned.plain.config.image_token_id]
    by_hand = work.tuned.plain.get_input_embeddings()(ids).square().sum().sqrt().item()
    assert found[0].text_norm == pytest.approx(by_hand) == found[1].text_norm and by_hand > 0
    assert found[0].encoded_norm == pytest.approx(found[1].encoded_norm) and found[0].encoded_norm > 0


def test_what_is_kept_to_measure_does_not_grow_with_accumulation(begun):
    for count in (1, 4):
        work = begun(f"train.accumulate={count}", OFTEN)
        last = work._batch(work._chosen(count - 1))
        work._evaluate_all(0)
        batch, base, _, _ = work._probed
        assert all(torch.equal(batch[name], last[name]) for name in last) and base is not None
        assert "kappa" in work.after_step(0) and work._probed is None


def test_prompts_of_ones_own_are_asked_while_training_too(overrides):
    """The score stays that of the held-out questions."""
    run, outcome = train(*overrides(), "samples.every=3", "samples.prompts=['Is it warm?']")
    for step, count in ((3, 1), (6, 2)):
        lines = (run.folder / "samples" / f"step-{step:08d}" / "answers.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert found[0]["question"] == "Is it warm?" and found[0]["score"] is None and len(found) == count
    assert "On 1 held-out question" in outcome.message


def test_hub_code_is_never_run(monkeypatch, checkpoints):
    """Nor is it asked for on the terminal."""
    from equipoise.pipelines.instruction_tuning import model

    seen = []

    def spied(plain, *args, **kwargs):
        seen.append(kwargs.get("trust_remote_code"))
        return plain(*args, **kwargs)

    for cls in (model.AutoConfig, model.AutoProcessor, model.AutoModelForMultimodalLM):
        monkeypatch.setattr(cls, "from_pretrained", partial(spied, cls.from_pretrained))
    section = InstructionTuningModel(path=str(checkpoints("llava")))
    load_processor(section)
    load_model(section, "no")
    model.model_type(section)
    assert len(seen) >= 3 and all(value is False for value in seen)


def test_the_presets_have_a_place_for_every_parameter(kinds, checkpoints):
    """With everything trained; adapt refuses what is in no component."""
    assert kinds == KINDS
    for kind in kinds:
        model = load_model(InstructionTuningModel(path=str(checkpoints(kind))), "no")
        names = [name for name, _ in model.named_parameters()]
        known = architecture(kind, names)
        assert {known.part(name) for name in names} == {"tower", "connector", "language"}
        tuned = adapt(model, config.load(NAME, [f"model={checkpoints(kind)}", "encoder.parts=[tower, connector]"]))
        assert tuned.named.keys() == {name for name, p in tuned.model.named_parameters() if p.requires_grad}
        assert tuned.encoder_weights.keys() == {name for name in names if known.part(name) != "language"}
        assert all(tuned.components.values())


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(overrides):
    first, second, third = (train(*overrides(), f"seed={seed}")[0] for seed in (1, 1, 2))
    assert equal(weights(first), weights(second)) and not equal(weights(first), weights(third))


def test_measuring_changes_nothing_but_the_log(overrides):
    """Blip-2 has dropout: the base prediction is made anew, and the random numbers stay the step's own."""
    for kind in ("blip-2", "llava"):
        plain, _ = train(*overrides(kind), "coordinator=constant")
        seen, _ = train(*overrides(kind), "coordinator=constant", "coordinator.options={measure_every: 1}")
        assert equal(weights(plain), weights(seen))
        assert "kappa" in seen.metrics()[0] and "kappa" not in plain.metrics()[0]


@pytest.mark.parametrize("optimizer", ["alpha_adam", "ada_sam"])
def test_optimizers_by_name(overrides, optimizer):
    plain, learnt = (train(*overrides(), f"optimizer={name}") for name in ("adamw", optimizer))
    assert learnt[1].state == "done" and not equal(weights(plain[0]), weights(learnt[0]))
    losses = [
        json.loads((learnt[0].folder / "result" / "result.json").read_text())[f"loss_{w}"] for w in ("before", "after")
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("extra", [["train.accumulate=2"], ["optimizer=sam", "optimizer.options={rho: 0.5}"]])
def test_the_training_pass_stands_for_the_base_prediction(overrides, extra, monkeypatch):
    """Without dropout it is the same, also where the optimizer evaluates the batch a second time elsewhere."""
    known, _ = train(*overrides(), OFTEN, *extra)
    monkeypatch.setattr("equipoise.pipelines.instruction_tuning.train.has_dropout", lambda model: True)
    anew, _ = train(*overrides(), OFTEN, *extra)
    for left, right in zip(known.metrics(), anew.metrics(), strict=True):
        assert left["kappa"] == pytest.approx(right["kappa"], rel=1e-4), "twice the same float32 logits"
        assert left["h_encoder"] == pytest.approx(right["h_encoder"], rel=1e-4)


def test_coordination_does_something(overrides):
    names = {"constant": "{}", "commit_clr": "{measure_every: 1, every: 1}", "commit": "{measure_every: 1, every: 1}"}
    found = {
        name: weights(train(*overrides(), f"coordinator={name}", f"coordinator.options={options}")[0])
        for name, options in names.items()
    }
    assert not equal(found["constant"], found["commit_clr"]) and not equal(found["commit_clr"], found["commit"])
    still = weights(train(*overrides(), "coordinator=commit", "coordinator.options={regularizer: 0}")[0])
    clr = weights(train(*overrides(), "coordinator=commit_clr")[0])
    assert equal(still, clr), "without its regulariser it is CLR"


def test_the_regularizer_within_a_step_is_equation_7(begun):
    """With plain SGD: θ − β(∇L − ∇d²), where d² is that of θ − β∇L. Else the same gradient waits for the next step."""

    def stepped(*words):
        work = begun("optimizer=sgd", "learning_rate=0.1", "schedule=constant", "train.clip=0", *words)
        assert work.step(0).get("kappa", 1.0) > 0
        return work.weights(), work.state()["waiting"]

    plain, _ = stepped("coordinator=constant")
    late, waiting = stepped("coordinator=commit", "coordinator.options={regularizer: 50}")
    within, none = stepped("coordinator=commit", "coordinator.options={regularizer: 50, within: true}")
    assert equal(plain, late) and not none and waiting.keys() == plain.keys()
    for side in ("lora_", "multi_modal_projector"):
        names = [name for name in plain if side in name]
        moved = torch.cat([(within[name] - plain[name]).flatten() for name in names])
        due = torch.cat([-0.1 * waiting[name].flatten() for name in names])
        torch.testing.assert_close(moved, due, rtol=0, atol=0.02 * due.abs().max().item())
        assert due.any()


def test_a_step_on_trial_is_taken_back(begun):
    """With weight almost nothing, the optimizer's moments and the weights are those of plain steps."""
    words = "optimizer=adamw", "coordinator.options={window: 99, every: 99, regularizer: 1e-9, within: %s}"
    found = [begun(words[0], "coordinator=commit", words[1] % within) for within in ("true", "false")]
    for step in range(3):
        for work in found:
            work.step(step)
    left, right = (work.weights() for work in found)
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_coordinate_descent_leaves_the_other_side_alone(overrides, checkpoints):
    base = AutoModelForMultimodalLM.from_pretrained(checkpoints("llava")).state_dict()
    for name, still in (("feature_cd", "language"), ("language_cd", "encoder")):
        run, _ = train(*overrides(), f"coordinator={name}", "coordinator.options={latest: 1}", "train.steps=4")
        factors = load_file(run.result / "adapter_model.safetensors")
        moved = load_file(run.result / "encoder.safetensors")
        assert all(not tensor.any() for key, tensor in factors.items() if "lora_B" in key) == (still == "language")
        assert all(torch.equal(tensor, base[key]) for key, tensor in moved.items()) == (still == "encoder")


def test_the_resting_side_has_no_gradient(overrides):
    """It is not computed, and neither in the clipped norm nor in the optimizer's moments; half way the sides change."""
    run, _ = train(*overrides(), "coordinator=feature_cd", "train.steps=4", "checkpoint.every=2")
    norms = [(record["gradient_norm"], record["rate_language"] > 0) for record in run.metrics()]
    assert [learns for _, learns in norms] == [False, False, True, True]
    halves = {}
    for name in ("feature_cd", "constant"):
        run, _ = train(*overrides(), f"coordinator={name}", "coordinator.options={measure_every: 1}", "train.steps=1")
        halves[name] = run.metrics()[0]
    assert halves["feature_cd"]["gradient_language"] == 0 and halves["constant"]["gradient_language"] > 0
    assert halves["feature_cd"]["gradient_encoder"] == pytest.approx(halves["constant"]["gradient_encoder"])
    assert 0 < halves["feature_cd"]["gradient_norm"] < halves["constant"]["gradient_norm"]


@pytest.mark.parametrize(
    "words",
    [
        ["language.method=frozen", "coordinator=constant"],
        ["coordinator=feature_cd", "coordinator.options={latest: 1, measure_every: 1}"],
        ["coordinator=commit", "coordinator.options={measure_every: 1}"],
    ],
)
def test_a_batch_of_text_alone_leaves_what_reads_media_as_it_is(words, overrides, pictures):
    turns = [{"from": "human", "value": "Is it day?"}, {"from": "gpt", "value": "yes"}]
    mixed = pictures.with_name("mixed.jsonl")
    mixed.write_text(pictures.read_text() + f"{json.dumps({'conversations': turns})}\n" * 8)
    run, _ = train(*overrides(), f"data={mixed}", *words, "train.batch=1", "train.steps=8")
    norms = [record["gradient_norm"] for record in run.metrics()]
    assert len(norms) == 8 and max(norms) > 0
    assert "commit" in words[0] or min(norms) == 0, "no batch of text alone was among them"


def test_a_side_that_cannot_learn_is_reported(overrides, capsys):
    """LLaVA takes what the tower's layers give: no answer depends on the normalisation after them. Reported once, in
    the log and on the terminal, with what to set."""
    still = "frozen=['vision_tower.*embeddings', 'vision_tower.*pre_layrnorm', 'vision_tower.*layers']"
    words = [*overrides(), "coordinator=commit_clr", "steps=8", "encoder.parts=[tower]", still]
    run, outcome = train(*words)
    told = capsys.readouterr().err
    assert outcome.state == "done"
    assert told.count("coordinator: κ has had no finite value in 5 measurements") == 1
    assert "encoder gets no gradient" in told and "set the coordinator to constant" in told
    assert "κ has had no finite value in 5 measurements" in (run.folder / "log.txt").read_text()


EXTRA = [
    ["train.accumulate=2", "schedule=cosine", "lora.dropout=0.5", OFTEN],
    ["coordinator=commit", "coordinator.options={regularize_every: 2}", "optimizer=scaled_adamw"],
    ["coordinator=feature_cd", "coordinator.options={window: 1, latest: 0.7}", "train.gradient_checkpointing=true"],
]


@pytest.mark.parametrize("extra", EXTRA)
def test_a_stopped_run_resumes_exactly(overrides, extra, stopped_run):
    words = [*overrides("blip-2" if "lora.dropout=0.5" in extra else "llava"), *extra]
    whole, _ = train(*words)
    settings = config.load(NAME, words)
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    assert equal(weights(whole), weights(run))
    other = ("time", "seconds", "memory_host", "memory_device", "load_device")
    kept = [{k: v for k, v in record.items() if k not in other} for record in run.metrics()]
    assert kept == [{k: v for k, v in r.items() if k not in other} for r in whole.metrics()]


def test_two_processes_train_as_one(overrides, launched, tmp_path):
    """With the regularizer, whose gradient is both processes' too."""
    words = [NAME, *overrides("llava"), "coordinator=commit", OFTEN, "samples.count=4"]
    out = launched("train", *words, "batch=1", "--id", "two")
    assert out.count("two: done.") == 1
    assert main(["train", *words, "batch=2", "--id", "one"]) == 0
    two, one = (Store(tmp_path / "runs").get(name) for name in ("two", "one"))
    assert all(torch.allclose(weights(two)[key], value, atol=1e-4) for key, value in weights(one).items())
    for name in ("loss", "kappa", "rate_encoder"):
        assert [m[name] for m in two.metrics()] == pytest.approx([m[name] for m in one.metrics()], rel=1e-2)


@pytest.mark.soak
def test_a_killed_run_resumes_exactly(overrides, killed_run):
    """SIGKILL somewhere after the second checkpoint; what is trained again is trained the same way."""
    words = [*overrides(), "steps=60", "checkpoint_every=4", "coordinator=commit"]
    whole, _ = train(*words)
    assert equal(weights(whole), weights(killed_run(NAME, words, "step-00000008", "step-00000060")))


def test_components_of_ones_own_have_rates_of_their_own(overrides):
    parts = "components={tower: [vision_tower], projector: [multi_modal_projector], language: [language_model]}"
    words = ["encoder.parts=[tower, connector]", "optimizer.rates={tower: 1e-5, projector: 1e-4}", "schedule=constant"]
    run, _ = train(*overrides(), parts, *words, "optimizer.weight_decays={tower: 0}", "coordinator=constant")
    record = run.metrics()[-1]
    assert (record["rate_tower"], record["rate_projector"], record["rate_language"]) == (1e-5, 1e-4, 7e-4)


@pytest.mark.parametrize("coordinator", ["commit_clr", "commit"])
def test_each_component_of_the_encoder_side_follows_its_own_kappa(overrides, coordinator):
    parts = "components={tower: [vision_tower], projector: [multi_modal_projector], language: [language_model]}"
    options = "coordinator.options={each: true, every: 1, measure_every: 1}"
    words = ["encoder.parts=[tower, connector]", "schedule=constant", f"coordinator={coordinator}", options]
    run, _ = train(*overrides(), parts, *words, "train.gradient_checkpointing=true")
    for record in run.metrics():
        assert record["moved_tower"] > 0 and record["moved_projector"] > 0
        for name in ("tower", "projector"):
            assert record[f"kappa_{name}"] == pytest.approx(record["moved_language"] / record[f"moved_{name}"])
    last = run.metrics()[-1]
    assert last["rate_tower"] != last["rate_projector"]


def test_lora_on_the_encoder_too_and_frozen_parts(overrides, checkpoints):
    settings = config.load(NAME, [*overrides(), "encoder.method=lora", "encoder.parts=[tower]", "frozen=[layers.0]"])
    tuned = adapt(load_model(InstructionTuningModel(path=str(checkpoints("llava"))), "no"), settings)
    assert all("lora_" in name for name in tuned.named) and tuned.encoder_weights == {}
    assert {tuned.parts.part(name) for name in tuned.components["encoder"]} == {"tower"}
    assert tuned.named and not any(".layers.0." in name for name in tuned.named)
    ends = ["encoder.targets=[fc1]", "lora.targets=[q_proj]"]
    settings = config.load(NAME, [*overrides(), "encoder.method=lora", "encoder.parts=[tower]", *ends])
    tuned = adapt(load_model(InstructionTuningModel(path=str(checkpoints("llava"))), "no"), settings)
    assert all(".fc1.lora_" in name for name in tuned.components["encoder"]) and tuned.components["encoder"]
    assert all(".q_proj.lora_" in name for name in tuned.components["language"])


def test_mixed_precision_and_checkpointing(overrides):
    for extra in (["train.precision=bf16"], ["train.gradient_checkpointing=true"]):
        run, outcome = train(*overrides(), *extra, OFTEN, "coordinator=commit")
        assert outcome.state == "done" and {t.dtype for t in weights(run).values()} == {torch.float32}
        assert all(record["kappa"] > 0 for record in run.metrics())


def test_mixed_precision_with_sounds(overrides):
    """Features of sounds are made outside of it: Whisper's extractor takes no 16 bits."""
    run, outcome = train(*overrides("qwen2_audio"), "train.precision=bf16", "train.steps=2")
    assert outcome.state == "done" and all(torch.isfinite(value).all() for value in weights(run).values())


def test_checkpointing_changes_no_number(overrides):
    plain, checked = (
        train(*overrides(), OFTEN, "coordinator=commit", f"train.gradient_checkpointing={flag}")[0]
        for flag in ("false", "true")
    )
    left, right = weights(plain), weights(checked)
    assert all(torch.allclose(left[key], right[key], atol=1e-6) for key in left)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["components={encoder: [nothing], language: [language_model]}"], "trained parameters are in none: "),
        (["components={encoder: [model], language: [language_model]}"], "trained parameters are in more than one: "),
        (["components={encoder: [vision_tower]}"], "must name `language` and at least one more, got encoder."),
        (["lora.targets=[q_proj, nothing]"], "lora.targets: nothing: no layer of the language model has a name"),
        (
            ["encoder={method: lora, targets: [q_proj]}"],
            "encoder.targets: q_proj: no layer of the connector has a name",
        ),
        (["encoder.targets=[linear_1]"], "targets are for LoRA factors; add method: lora."),
        (["frozen=[nothing]"], "frozen: nothing: matches no parameter of the model."),
        (["frozen=[multi_modal_projector]"], "encoder.parts: nothing is trained of the connector"),
        (["optimizer.rates={tower: 1}"], "optimizer.rates: tower: no such component. There are encoder, language."),
        (["optimizer=sam", "coordinator=commit"], "cannot be combined. Use commit_clr, or another optimizer."),
        (
            ["optimizer=rprop", "optimizer.weight_decays={encoder: 0.1}"],
            "optimizer.weight_decays: rprop has no weight d",
        ),
        (["data.prompt=Hello"], "must have {question} in it, got 'Hello'."),
        (["coordinator.options={window: 0}"], "window: must be a whole number >= 1"),
        (["train.precision=fp16"], "train.precision: fp16 needs a CUDA device"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(overrides, words, message, tmp_path, capfd):
    assert main(["train", NAME, *overrides(), *words]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("2*"))


def test_all_is_said_before_a_weight_is_read(overrides, checkpoints, tmp_path, capfd):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints("llava"), folder)
    next(folder.glob("*.safetensors")).write_bytes(b"no weights")
    words = [
        "components={encoder: [multi_modal_projector], language: [language_model, nothing]}",
        "samples.metric=exact",
    ]
    lines = tmp_path / "talk.jsonl"
    lines.write_text('{"image": "missing.png", "conversations": []}\n')
    assert main(["train", NAME, *overrides(), f"model={folder}", f"data={lines}", *words]) == 2
    error = capfd.readouterr().err
    assert "components.language: nothing: matches nothing trained." in error and "talk.jsonl" in error


def harmed(folder: Path, to: Path, change) -> Path:
    """A copy of a checkpoint with its weights changed."""
    shutil.copytree(folder, to)
    file = next(to.glob("*.safetensors"))
    save_file(change(load_file(file)), file, {"format": "pt"})
    return to


def test_weights_that_are_not_there_are_not_made_up(overrides, checkpoints, tmp_path, capfd):
    def without_a_layer(weights):
        return {name: tensor for name, tensor in weights.items() if "layers.1." not in name or "vision" in name}

    folder = harmed(checkpoints("llava"), tmp_path / "short", without_a_layer)
    assert main(["train", NAME, *overrides(), f"model={folder}"]) == 2
    assert re.search(r"short lacks \d+ weights of a llava, such as .*layers.1.", capfd.readouterr().err)


@pytest.mark.parametrize("what", ["conversations", "weights"])
def test_a_run_does_not_go_on_with_other_data_or_another_base(
    what, overrides, checkpoints, tmp_path, stopped_run, pictures
):
    folder, file = shutil.copytree(checkpoints("llava"), tmp_path / "base"), pictures.with_name("other.jsonl")
    file.write_text(pictures.read_text())
    settings = config.load(NAME, [*overrides(), f"model={folder}", f"data={file}", "steps=6"])
    run = stopped_run(InstructionTuning, settings, at=3)
    if what == "weights":
        harmed(folder, tmp_path / "copy", lambda weights: {k: 1.5 * v for k, v in weights.items()})
        shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    else:
        file.write_text("\n".join(pictures.read_text().splitlines()[::-1]))
    with pytest.raises(InputError, match=f"(its|frozen) {what} are not those that this run was trained on so far"):
        execute(InstructionTuning, settings, run)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"pad_token_id": 10**6}, {"num_hidden_layers": "2"}],
)
def test_a_configuration_that_makes_no_model(settings, overrides, checkpoints, tmp_path, capfd):
    folder = shutil.copytree(checkpoints("llava"), tmp_path / "odd")
    described = json.loads((folder / "config.json").read_text())
    described["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(described))
    assert main(["train", NAME, *overrides(), f"model={folder}"]) == 2
    error = capfd.readouterr().err
    assert "model.path: the configuration of " in error and "fault" not in error


def test_a_chat_template_that_fails(overrides, checkpoints, tmp_path, capfd):
    folder = shutil.copytree(checkpoints("llava"), tmp_path / "odd")
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert main(["train", NAME, *overrides(), f"model={folder}"]) == 2
    assert "the chat template of llava fails: " in capfd.readouterr().err


def test_language_models_with_an_encoder_of_their_own_are_refused(overrides, tmp_path, capfd):
    from transformers import Blip2Config, T5Config

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    described = Blip2Config(vision_config=small, qformer_config=small, text_config=text.to_dict())
    described.save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").touch()
    assert main(["train", NAME, *overrides(), f"model={tmp_path / 't5'}"]) == 2
    assert "this blip-2 has a language model with an encoder of its own" in capfd.readouterr().err


# Those that no small checkpoint here stands for.
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - set(KINDS)))
def test_the_parts_of_architectures_in_their_real_sizes(kind):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(CONFIG_MAPPING[kind]()).requires_grad_(False)
        tuned = adapt(model, config.load(NAME))
    assert all("lora_" in name for name in tuned.components["language"])
    assert tuned.components.keys() == (
        {"vision", "audio", "language"} if tuned.parts.apart else {"encoder", "language"}
    )
    assert {tuned.parts.part(name) for name in tuned.encoder_weights} == {"connector"}


def test_models_that_are_no_multimodal_ones(tmp_path, overrides, capfd):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    for name in ("empty", "list"):
        (tmp_path / name).mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for name, message in (
        ("gpt2", "is a gpt2, which is no multimodal language model."),
        ("empty", "has no config.json"),
        ("list", "cannot be read (must be an object, is a list)."),
        ("nowhere", "does not exist"),
    ):
        assert main(["train", NAME, *overrides(), f"model={tmp_path / name}"]) == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_sweep_and_compare(overrides, tmp_path, capfd):
    """Cards with answers, right and wrong, an accuracy for every place, and questions of one's own."""
    words = [*overrides(), "--axis", "coordinator=constant,commit_clr", "--axis", "learning_rate=1e-3,1e-2"]
    assert main(["sweep", NAME, *words, "--id", "swept"]) == 0
    out = capfd.readouterr().out
    assert "adamw coordinator=commit_clr" in out and "1 held-out question" in out
    folder = tmp_path / "runs" / "swept" / "comparison"
    assert (folder / "grid.png").is_file() and (folder / "report.html").is_file()
    table = json.loads((folder / "table.json").read_text())
    assert len(table["cells"]) == 5 and all("score" in cell["metrics"] for cell in table["cells"])
    cards = list(folder.glob("cells/*/*.png"))
    assert len(cards) == 5 and len(list(folder.glob("cells/*/answers.jsonl"))) == 5
    assert main(["compare", str(folder.parent), "--prompt", "Is it warm?", "--out", str(tmp_path / "own")]) == 0
    answers = (tmp_path / "own" / "cells" / "base" / "answers.jsonl").read_text().splitlines()
    assert json.loads(answers[0])["question"] == "Is it warm?", "without the marks of pictures"


def test_a_comparison_asks_every_run_by_its_own_prompt(overrides, tmp_path):
    prompts = ["Question: {question} Answer:", "red red red {question} red red red"]
    words = [*overrides("blip-2"), "coordinator=constant", "language.method=full", "optimizer=adamw", "steps=20"]
    words += ["learning_rate=1e-2", "samples.max_new_tokens=6", "samples.count=2"]
    runs = [train(*words, f"data.prompt={json.dumps(prompt)}")[0] for prompt in prompts]
    assert main(["compare", *(str(run.folder) for run in runs), "--out", str(tmp_path / "out")]) == 0
    found = []
    for run in runs:
        (own,) = run.folder.glob("samples/*/answers.jsonl")
        (cell,) = (tmp_path / "out" / "cells").glob(f"{run.folder.name}/answers.jsonl")
        given, wanted = ([json.loads(line)["answer"] for line in f.read_text().splitlines()] for f in (cell, own))
        assert given == wanted, "as the run itself answered"
        found.append(given)
    assert found[0] != found[1], "else this shows nothing"


def test_the_batches_are_of_similar_length_and_cover_all(overrides, monkeypatch):
    caught = []
    monkeypatch.setattr(
        "equipoise.pipelines.instruction_tuning.train.train_loop",
        lambda _, work, *rest: caught.append(work) or Outcome("stopped"),
    )
    train(*overrides(), "batch=3")
    (work,) = caught
    each = len(work.kept_examples) // 3
    seen = [[work.talk.length(e) for e in work._chosen(number)] for number in range(each)]
    chosen = [e.where for number in range(each) for e in work._chosen(number)]
    assert len(set(chosen)) == 3 * each and max(max(batch) - min(batch) for batch in seen) < max(work.lengths.tolist())
    again = [e.where for number in range(each, 2 * each) for e in work._chosen(number)]
    assert again != chosen and [e.where for number in range(each) for e in work._chosen(number)] == chosen


def test_the_longest_conversations_are_trained_on_as_often_as_any(begun, pictures):
    """What is too little for a batch is left out in turns, whatever its length."""
    folder, lines = pictures.parent, []
    for index in range(15):
        said = [{"from": "human", "value": "Is it " + "very " * index + "?"}, {"from": "gpt", "value": "Yes"}]
        lines.append(json.dumps({"image": "0.png", "conversations": said}))
    (folder / "long.jsonl").write_text("\n".join(lines))
    (folder / "held.jsonl").write_text(lines[0])
    words = [f"data={folder / 'long.jsonl'}", f"data.validation={folder / 'held.jsonl'}"]
    work = begun(*words, "batch=8")
    epochs = [Counter(e.where for e in work._chosen(number)) for number in range(30)]
    seen = sum(epochs, Counter())
    assert len(seen) == 15 and set(seen.values()) == {16}, "30 epochs of 8 are 16 times 15"
    assert all(len(left | right) == 15 for left, right in pairwise(map(set, epochs))), (
        "nothing is left out twice in a row"
    )
    work = begun(*words, "batch=5")
    assert Counter(e.where for number in range(3) for e in work._chosen(number)) == Counter(seen.keys())


def test_questions_of_ones_own_are_asked_of_held_out_text_too(overrides, pictures, capfd):
    """Of media, where there are any."""
    said = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]
    text, seen = {"conversations": said}, {"conversations": said, "image": "0.png"}
    file = pictures.with_name("mixed.jsonl")
    for lines, media in (([seen] * 9 + [text], []), ([text] * 9 + [text, *[seen] * 9, seen], ["0.png"])):
        file.write_text("\n".join(map(json.dumps, lines)))
        run, _ = train(*overrides(), f"data={file}", "samples.prompts=['What colour?']")
        (answers,) = (run.folder / "samples").glob("*/answers.jsonl")
        first = json.loads(answers.read_text().splitlines()[0])
        assert first["question"] == "What colour?" and [Path(path).name for path in first["media"]] == media


def test_a_result_is_saved_before_anything_is_asked_of_it(overrides, monkeypatch):
    def broken(work, what, chosen=None):
        if "tuned" in what.split():
            raise KeyError("text")
        return []

    monkeypatch.setattr(InstructionTuningWork, "answers", broken)
    settings = config.load(NAME, overrides())
    run = Store(settings.runs).create(settings)
    with pytest.raises(EquipoiseError):
        execute(InstructionTuning, settings, run)
    assert json.loads((run.result / "result.json").read_text())["step"] == 6 and weights(run)


def test_what_is_not_multimodal_in_its_parts():
    settings = InstructionTuningConfig(name="x", pipeline="instruction_tuning")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.config = type("C", (PretrainedConfig,), {"model_type": "strange"})()
    with pytest.raises(
        InputError, match="strange is no multimodal language model of a known shape: it has no language"
    ):
        adapt(model, settings)


def test_real_recordings_of_digits_are_learnt(short, tmp_path):
    """Real recordings, where they are at hand."""
    folder = Path(__file__).parents[4] / "shared" / "data" / "fsdd" / "recordings"
    if not folder.is_dir():
        pytest.skip("the recordings are not at ../shared/data")
    files = [f for f in sorted(folder.glob("*_[01].wav")) if sound_seconds(f) <= 1][::5]  # the small model's window
    rows = [f"{file},Which digit?,{file.name[0]}" for file in files]
    (tmp_path / "digits.csv").write_text("\n".join(["audio,question,answer", *rows]) + "\n")
    run, outcome = train(*short("qwen2_audio", tmp_path / "digits.csv"), "learning_rate=1e-2", OFTEN)
    result = json.loads((run.result / "result.json").read_text())
    assert outcome.state == "done" and result["loss_after"] < result["loss_before"] and len(files) >= 20


def test_without_a_rate_a_bounded_run_learns_at_a_large_one_for_factors_and_a_moderate_one_for_the_encoder(
    begun, overrides
):
    words = ["optimizer=bounded_adamw", "learning_rate=", "schedule=constant", "coordinator=constant"]
    rates = {group["component"]: group["lr"] for group in begun(*words).optimizer.param_groups}
    assert rates == {"language": 1.0, "encoder": 1e-3}
    given = begun(*words, "optimizer.rates={encoder: 1}").optimizer.param_groups
    assert {group["component"]: group["lr"] for group in given} == {"language": 1.0, "encoder": 1.0}
    run, outcome = train(*overrides(), *words)
    result = json.loads((run.result / "result.json").read_text())
    assert outcome.state == "done" and result["loss_after"] < result["loss_before"]
    assert result["learning_rate"] == run.config().optimizer.learning_rate == 1.0
    assert (run.metrics()[-1]["rate_language"], run.metrics()[-1]["rate_encoder"]) == (1.0, 1e-3)
