"""Runs of the text-to-image pipeline on a small checkpoint: what they learn, save, survive and leave behind."""

import json
import shutil
import weakref

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image import base as bases
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageLora, TextToImageModel
from equipoise.pipelines.text_to_image.fixed import Measure
from equipoise.pipelines.text_to_image.result import LORA_FILE
from equipoise.pipelines.text_to_image.train import TextToImageWork

NAME = "text_to_image/dreambooth"


def train(*overrides):
    settings = config.load(NAME, overrides)
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run)


def lora(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "result" / LORA_FILE)


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_leaves_everything_it_promises(short, checkpoint):
    run, outcome = train(*short, "lora.text_encoder=true", "samples.every=3", "checkpoint_every=4", "lora.alpha=2")
    assert outcome.state == "done" and run.status().step == 6
    metrics = run.metrics()
    assert [record["step"] for record in metrics] == list(range(1, 7))
    assert {"loss", "gradient_norm", "rate", "rate_unet", "rate_text_encoder", "seconds"} <= metrics[0].keys()
    assert sorted(p.name for p in (run.folder / "samples").iterdir()) == ["step-00000003", "step-00000006"]
    with Image.open(run.folder / "samples" / "step-00000006" / "00-0.png") as picture:
        assert picture.size == (32, 32) and picture.info["prompt"] == "a photo of sks object"
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    with safe_open(run.folder / "result" / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["equipoise"])["optimizer"] == "scaled_adamw"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 2.0


@pytest.mark.parametrize("targets", ["[to_q, to_k, to_v, to_out.0]", "[to_q, to_out.0, ff.net.0.proj, proj_in, conv1]"])
def test_the_result_loads_in_diffusers_and_draws_the_very_same_picture(short, checkpoint, targets):
    words = ["lora.text_encoder=true", f"lora.targets={targets}", "lora.alpha=2", "samples.scale=0.7"]
    run, _ = train(*short, "learning_rate=0.05", *words)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))

    def draw():
        return pipeline(
            "a photo of sks object", latents=noise, height=32, width=32, num_inference_steps=2, guidance_scale=7.0
        ).images[0]

    before = draw()
    pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE, adapter_name="run")
    pipeline.set_adapters("run", 0.7)
    with Image.open(run.folder / "samples" / "step-00000006" / "00-0.png") as sample:
        difference = (
            torch.tensor(list(sample.convert("RGB").tobytes())).int() - torch.tensor(list(draw().tobytes())).int()
        )
    assert difference.abs().max() <= 1  # two ways of rounding to 8 bits
    assert before.tobytes() != draw().tobytes()


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(short):
    first, second, third = (train(*short, f"seed={seed}")[0] for seed in (1, 1, 2))
    assert equal(lora(first), lora(second))
    assert not equal(lora(first), lora(third))


def test_the_base_is_left_as_it_was(short, checkpoint):
    def fingerprint():
        base = load_base(TextToImageModel(path=str(checkpoint)), "no")
        return {
            f"{part}.{k}": v.clone()
            for part in ("unet", "text_encoder")
            for k, v in base.tunable[part].state_dict().items()
        }

    before = fingerprint()
    train(*short, "lora.text_encoder=true", "learning_rate=0.1")
    after = fingerprint()
    assert equal(before, after)
    base = load_base(TextToImageModel(path=str(checkpoint)), "no")
    assert not any(p.requires_grad for p in base.denoiser.parameters())


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["lora.text_encoder=true", "lora.dropout=0.5", "schedule=cosine", "train.accumulate=2"],
        ["optimizer=ada_sam", "optimizer.options={rho: 0.1, every: 2}", "lora.dropout=0.5", "train.accumulate=2"],
        ["optimizer=alpha_adam"],
    ],
)
def test_a_stopped_run_resumes_exactly(short, extra, stopped_run):
    whole, _ = train(*short, *extra)
    settings = config.load(NAME, [*short, *extra])
    run = stopped_run(TextToImage, settings, at=3)
    assert run.status().step == 3 and not (run.folder / "result" / LORA_FILE).exists()
    assert execute(TextToImage, settings, run).state == "done"
    assert equal(lora(whole), lora(run))
    assert [record["step"] for record in run.metrics()] == list(range(1, 7))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch, by torch
def test_a_compiled_denoiser_trains_alike_and_is_compiled_once(short, stopped_run):
    from torch._dynamo.utils import counters

    plain, _ = train(*short)
    counters.clear()
    first, _ = train(*short, "train.compile=true")
    other, _ = train(*short, "train.compile=true", "learning_rate=1e-3", "seed=1")
    settings = config.load(NAME, [*short, "train.compile=true"])
    resumed = stopped_run(TextToImage, settings, 3)
    assert execute(TextToImage, settings, resumed).state == "done"
    assert counters["stats"]["unique_graphs"] == 1, "for runs of other rates and seeds, and one that is resumed"
    assert equal(lora(first), lora(resumed)) and not equal(lora(first), lora(other))
    losses = ([record["loss"] for record in run.metrics()] for run in (plain, first))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)


def test_without_a_compiler_nothing_is_compiled(short, monkeypatch, capfd):
    monkeypatch.setattr("equipoise.pipelines.text_to_image.check.shutil.which", lambda name: None)
    assert main(["train", NAME, *short, "train.compile=true"]) == 2
    assert "train.compile: needs a C++ compiler, such as g++. Install it" in capfd.readouterr().err


def test_a_run_does_not_go_on_with_another_base(short, checkpoint, tmp_path, stopped_run):
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    settings = config.load(NAME, [*short, f"model={folder}"])
    run = stopped_run(TextToImage, settings, at=3)
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    bases._loaded.clear()  # as in a new process
    with pytest.raises(InputError, match="model: its frozen weights are not those that this run was trained on so far"):
        execute(TextToImage, settings, run)


def test_a_killed_run_resumes_exactly(short, killed_run):
    """SIGKILL somewhere after the second checkpoint; what is trained again is trained the same way."""
    overrides = [*short, "steps=40", "checkpoint_every=4"]
    whole, _ = train(*overrides)
    assert equal(lora(whole), lora(killed_run(NAME, overrides, "step-00000008", "step-00000040")))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(short, capfd):
    run, outcome = train(*short, "optimizer=sgd", "learning_rate=1e30", "train.clip=0", "steps=30")
    assert outcome.state == "diverged"
    assert outcome.step is not None and f"at step {outcome.step + 1} of 30" in outcome.message
    assert run.status().state == "diverged" and run.status().exit_code == 1
    weights = lora(run)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert len(run.metrics()) == outcome.step


def test_resuming_a_diverged_run_ends_with_the_same_weights(short):
    """The checkpoint after the step that blew up holds its weights; what is kept are those before it."""
    rules = ["schedule=piecewise_constant", "schedule.rules=1:3,1e39", "checkpoint_every=1"]
    run, outcome = train(*short, "optimizer=sgd", "learning_rate=0.1", "train.clip=0", *rules)
    first = lora(run)
    assert outcome.state == "diverged" and any(weight.any() for name, weight in first.items() if "lora_B" in name)
    again = execute(TextToImage, run.config(), run)
    assert again == outcome
    assert equal(first, lora(run))


def test_a_last_step_that_blows_up_is_no_success(short):
    run, outcome = train(*short, "optimizer=sgd", "learning_rate=1e38", "train.clip=0", "steps=1")
    assert outcome.state == "diverged" and "after step 1 of 1" in outcome.message
    assert all(torch.isfinite(weight).all() for weight in lora(run).values())
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert result["loss_after"] == result["loss_before"], "after no good step, the weights are the first ones"


def test_v_prediction_and_bf16(short, build_checkpoint, tmp_path):
    other = build_checkpoint(prediction_type="v_prediction")
    run, outcome = train(*short, f"model={other}", "train.precision=bf16")
    assert outcome.state == "done"
    assert {tensor.dtype for tensor in lora(run).values()} == {torch.float32}


def test_latents_are_kept_on_disk(short, tmp_path, monkeypatch):
    base = load_base(config.load(NAME, short).model, "no")
    base.latents.clear()  # of the same pictures in another test
    train(*short)
    cached = list((tmp_path / "runs" / ".cache" / "latents").rglob("*.safetensors"))
    contents = [file.stat().st_ino for file in cached]
    base.latents.clear()
    monkeypatch.setattr(type(base.vae), "encode", None)  # must not be needed again
    train(*short)
    assert len(cached) == 4 and [file.stat().st_ino for file in cached] == contents, "a file written anew is another"


def test_the_text_encoders_rate_is_its_own(short):
    run, _ = train(*short, "lora.text_encoder=true", "learning_rate=1e-3", "optimizer.text_encoder_learning_rate=1e-5")
    record = run.metrics()[-1]
    assert record["rate_unet"] == 1e-3 and record["rate_text_encoder"] == 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=0", "lora.rank"),
        ("learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer=adamwx", "Did you mean 'adamw'"),
        ("data=nowhere", "nowhere does not exist"),
        ("model=nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("stepz=3", "stepz"),
        ("optimizer.options={damping: -1}", "damping"),
        ("optimizer=lbfgs", "optimizer.name"),
        ("lora.targets=[to_q, nothing]", "lora.targets: nothing: no layer has a name that ends so"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(short, override, message, tmp_path, capfd):
    assert main(["train", NAME, *short, override]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_target_that_a_loaded_base_lacks(checkpoint):
    """A hub checkpoint's layers are known only when it is there."""
    base = load_base(TextToImageModel(path=str(checkpoint)), "no")
    with (
        pytest.raises(InputError, match=r"lora.targets: nothing: no layer"),
        base.adapted(TextToImageLora(targets=["to_q", "nothing"]), 0),
    ):
        pass


def test_a_tokenizer_of_another_text_encoder(checkpoint, tmp_path):
    """transformers makes an empty one where the vocabulary is missing, and says nothing."""
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    words = copied / "tokenizer" / "tokenizer_config.json"
    words.write_text(words.read_text().replace("32", "77"))
    with pytest.raises(InputError, match=r"gives up to 77 tokens, but the text encoder reads \d+ words and 32 tokens"):
        load_base(TextToImageModel(path=str(copied)), "no")
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    words.write_text(words.read_text().replace("77", "32"))
    with pytest.raises(InputError, match="Put the tokenizer that belongs to this text encoder"):
        load_base(TextToImageModel(path=str(copied)), "no")


def test_an_optimizer_that_takes_no_such_factors(short):
    """Muon takes matrices alone, and the factors of a convolution have four dimensions."""
    with pytest.raises(InputError, match=r"optimizer.name: muon does not take these LoRA factors"):
        train(*short, "optimizer=muon", "lora.targets=[conv1]")


def test_a_second_evaluation_is_of_the_same_micro_batches_noise_and_dropout(short, monkeypatch):
    seen, values, after = [], {}, []

    def one_step(_, work, *rest):
        evaluate = work._loss

        def weights():
            return torch.cat([parameter.detach().flatten() for parameter in work.named.values()])

        def watched(*given):
            state = torch.get_rng_state()
            loss = evaluate(*given)
            seen.append((given, state, loss.item(), weights()))
            return loss

        work._loss = watched
        values.update(work.step(0))
        del work._loss
        after.append(weights())
        return Outcome("stopped")

    monkeypatch.setattr("equipoise.pipelines.text_to_image.train.train_loop", one_step)
    words = ["train.accumulate=2", "train.clip=1e-3", "lora.dropout=0.5", "learning_rate=100"]
    train(*short, *words, "optimizer=sam", "optimizer.options={rho: 0.5}")
    first, second = seen[:2], seen[2:]
    assert len(second) == 2
    for (batch, state, _, weights), (again, state_again, _, moved) in zip(first, second, strict=True):
        assert all(map(torch.equal, batch[:3], again[:3])) and batch[3] == again[3] and torch.equal(state, state_again)
        assert (moved - weights).norm().item() == pytest.approx(0.5, rel=1e-4), "the distance over all factors"
    assert not torch.equal(first[0][0][0], first[1][0][0])
    assert values["loss"] == pytest.approx(sum(loss for _, _, loss, _ in first) / 2)
    assert values["loss"] != pytest.approx(sum(loss for _, _, loss, _ in second) / 2, rel=1e-6)
    length = (after[0] - first[0][3]).norm().item() / 100
    assert length == pytest.approx(1e-3, rel=1e-2) and values["gradient_norm"] > 1e-3, "the second gradient is clipped"


def test_a_second_evaluation_at_the_same_point_changes_nothing(short):
    words = ["learning_rate=0.1", "lora.dropout=0.5", "train.accumulate=2"]
    plain, _ = train(*short, *words, "optimizer=sgd")
    still, _ = train(*short, *words, "optimizer=sam", "optimizer.options={rho: 1e-30}")  # rounds to no distance at all
    moved, outcome = train(*short, *words, "optimizer=sam", "optimizer.options={rho: 0.5}")
    assert equal(lora(plain), lora(still)) and outcome.state == "done"
    assert not equal(lora(plain), lora(moved))


@pytest.mark.parametrize(("words", "times"), [([], 2), (["train.ema=0.9"], 3)])
def test_the_evaluation_is_before_and_after(short, monkeypatch, words, times):
    """Of the weights that are the result: their average, where one is kept, is another than what was trained."""
    found, evaluation_loss = [], TextToImageWork.evaluation_loss
    monkeypatch.setattr(
        TextToImageWork, "evaluation_loss", lambda work: found.append(evaluation_loss(work)) or found[-1]
    )
    run, _ = train(*short, *words)
    result = json.loads((run.folder / "result" / "result.json").read_text())
    before, after = found[-2:] if "train.ema=0.9" in words else found[::-1]  # what is known already is not asked again
    assert len(found) == times and [result["loss_before"], result["loss_after"]] == [before, after]


def test_the_evaluation_is_the_same_in_batches_of_any_size(work, monkeypatch):
    sizes, losses, measured = [], [], Measure.losses
    monkeypatch.setattr(
        Measure,
        "losses",
        lambda self, clean, *rest, **more: sizes.append(len(clean)) or measured(self, clean, *rest, **more),
    )
    for words in (["batch=1"], ["batch=3"], ["batch=40"], ["batch=3", "train.gradient_checkpointing=true"]):
        losses.append(work(*words).evaluation_loss())
    assert sizes == [4] * 16 + [12] * 5 + [4] + [16] * 4 + [3] * 21 + [1]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5), "comparable between runs, whatever their batch"


class Peak(TorchDispatchMode):
    """Within it, the most bytes at once in tensors that were made there."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, sum(self.live.values()))
        return made


@pytest.mark.parametrize("words", [["batch=1"], ["batch=2"], ["batch=2", "train.gradient_checkpointing=true"]])
def test_the_evaluation_needs_no_more_memory_than_a_step(short, monkeypatch, words):
    def measured(_, work, *rest):
        work.evaluation_loss()  # what is made once is made by now
        work.step(0)
        with Peak() as step:
            work.step(1)
        with Peak() as evaluation:
            work.evaluation_loss()
        peaks.extend((evaluation.most, step.most))
        return Outcome("stopped")

    peaks = []
    monkeypatch.setattr("equipoise.pipelines.text_to_image.train.train_loop", measured)
    train(*short, *words)
    assert 0 < peaks[0] <= peaks[1]


def test_the_target_is_what_the_u_net_predicts(work, build_checkpoint, tmp_path):
    """The loss of a model whose prediction is known to be 0 is the target's mean square."""
    clean, noise = torch.full((1, 4, 4, 4), 2.0), torch.full((1, 4, 4, 4), 3.0)
    for kind, expected in (("epsilon", 9.0), ("sample", 4.0), ("v_prediction", None)):
        made = work(f"model={build_checkpoint(prediction_type=kind)}")
        torch.nn.init.zeros_(made.base.denoiser.conv_out.weight)
        torch.nn.init.zeros_(made.base.denoiser.conv_out.bias)
        times = torch.tensor([500])
        if expected is None:
            expected = made.noise.scheduler.get_velocity(clean, noise, times).square().mean().item()
        loss = made._loss(clean, noise, times, made.captions[:1], made.latents.of(0)[1][:1])
        assert loss.item() == pytest.approx(expected)


def test_an_objectives_state_is_saved(work):
    made = work()
    made.objective.state_dict = lambda: {"weight": torch.tensor(0.5)}
    restored = []
    made.objective.load_state_dict = restored.append
    made.restore(made.weights(), made.state())
    assert restored == [{"weight": torch.tensor(0.5)}]


BOUNDED = ["optimizer=bounded_adamw", "lora.text_encoder=true", "lora.dora=true", "token.name=<vase>"]
BOUNDED += ["data.instance_prompt=a <vase> object", "samples.prompts=[]"]


def test_without_a_rate_only_what_is_bounded_gets_a_large_one(short, work):
    """And what has a rate of its own keeps it: a new word, the text encoder, layers that a pattern names."""

    def groups(*words: str) -> list[tuple[str, bool, float]]:
        made = work(*BOUNDED, *words).optimizer.param_groups
        return [
            (
                group["component"],
                all("lora_A" in name or "lora_B" in name for name in group["param_names"]),
                group["lr"],
            )
            for group in made
        ]

    assert groups() == [
        ("unet", True, 1.0),
        ("unet", False, 1e-3),  # DoRA's magnitudes
        ("text_encoder", True, 1.0),
        ("text_encoder", False, 1e-3),
        ("word", False, 5e-4),
    ]
    given = groups("optimizer.text_encoder_learning_rate=0.5", "optimizer.rates={mid_block: 0.25}")
    assert given[:2] == [("unet", True, 1.0), ("unet", False, 1e-3)]
    assert [(part, rate) for part, _, rate in given[2:]] == [("text_encoder", 0.5), ("unet", 0.25), ("word", 5e-4)]
    assert {rate for part, _, rate in groups("learning_rate=1") if part != "word"} == {1.0}


def test_a_rate_for_factors_that_is_given_for_all_is_doubted(short):
    """A sweep's rates are for what is bounded; DoRA's magnitudes would have them too."""
    said = train(*short, *BOUNDED, "learning_rate=1")[0].status().doubt
    assert "in no LoRA pair" in said and "optimizer.outside_learning_rate=0.001" in said
    for words in ([], ["learning_rate=0.05"], ["learning_rate=1", "optimizer.outside_learning_rate=0.001"]):
        assert not train(*short, *BOUNDED, *words)[0].status().doubt


def test_without_a_rate_a_bounded_run_learns_and_resumes_exactly(short, stopped_run):
    run, outcome = train(*short, *BOUNDED)
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert outcome.state == "done" and result["loss_after"] < result["loss_before"]
    assert result["learning_rate"] == run.status().learning_rate == run.config().optimizer.learning_rate == 1.0
    assert (run.metrics()[0]["rate"], run.metrics()[0]["rate_unet"]) == (1.0, 1.0)
    again = stopped_run(TextToImage, config.load(NAME, [*short, *BOUNDED]), at=3)
    assert execute(TextToImage, again.config(), again).state == "done"
    assert equal(lora(run), lora(again))
