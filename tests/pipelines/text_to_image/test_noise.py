"""What changes the loss of a run, and what is kept of its weights, against computations by hand."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import NoiseSection
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.families.noise import Diffusion, scheduler_with
from equipoise.pipelines.text_to_image.formats.lora_files import factors_of
from equipoise.pipelines.text_to_image.formats.names import FORMATS
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
KIND = family("StableDiffusionPipeline")
LATENTS = torch.Size((6, 4, 3, 5))


def train(*overrides):
    settings = config.load(NAME, overrides)
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run)


def lora(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "result" / LORA_FILE)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Behind the losses before and after: eight instead of 64, for these are no measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.pipelines.text_to_image.fixed.DRAWS", 8)
        yield


def diffusion(own: str = "epsilon", **words) -> Diffusion:
    section = NoiseSection(**words)
    return Diffusion(scheduler_with(KIND, DDIMScheduler(prediction_type=own).config, section), section, KIND)


def drawn(noise: Diffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A clean latent, an answer, noise and times, always the same but for what the section changes."""
    source = torch.Generator().manual_seed(0)
    clean, answer = torch.randn(LATENTS, generator=source), torch.randn(LATENTS, generator=source)
    return clean, answer, *noise.draw(LATENTS, source)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_picture(prediction):
    """For every kind of answer: min(SNR, γ) times the error of the clean latents that the answer stands for."""
    noise = diffusion(prediction, snr_gamma=5.0)
    clean, answer, given, times = drawn(noise)
    times = torch.tensor([1, 50, 200, 400, 700, 999])
    kept = noise.scheduler.alphas_cumprod[times].double().reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * given
    picture = {
        "epsilon": (noisy - (1 - kept).sqrt() * answer) / kept.sqrt(),
        "v_prediction": kept.sqrt() * noisy - (1 - kept).sqrt() * answer,
        "sample": answer,
    }[prediction]
    weights = (kept / (1 - kept)).clamp(max=5.0).flatten()
    expected = weights * (picture - clean).square().flatten(1).mean(1)
    assert torch.allclose(noise.losses(answer, clean, given, times).double(), expected, rtol=1e-3)
    snr = compute_snr(noise.scheduler, times)
    scripts = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0) / {"epsilon": snr, "v_prediction": snr + 1}.get(
        prediction, torch.ones_like(snr)
    )  # as in train_text_to_image_lora.py
    weighed = noise.weights(times)
    assert weighed is not None and torch.allclose(weighed, scripts, rtol=1e-4)
    plain = diffusion(prediction).losses(answer, clean, given, times)
    assert not torch.allclose(plain, expected.float(), rtol=0.1)


def test_the_offset_moves_whole_channels():
    _, _, plain, times = drawn(diffusion())
    _, _, moved, same = drawn(diffusion(offset=0.25))
    difference = (moved - plain) / 0.25
    assert torch.equal(times, same), "nothing else is drawn otherwise"
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-5)
    assert difference[..., 0, 0].std() > 0.5 and difference[..., 0, 0].flatten().unique().numel() == 24


def test_the_schedule_ends_in_nothing_but_noise():
    plain, whole = diffusion("v_prediction"), diffusion("v_prediction", zero_terminal_snr=True)
    kept, before = whole.scheduler.alphas_cumprod, plain.scheduler.alphas_cumprod
    shifted = before.sqrt() - before[-1].sqrt()  # Lin et al., Algorithm 1
    by_hand = (shifted * before[0].sqrt() / (before[0].sqrt() - before[-1].sqrt())).square()
    assert torch.allclose(kept, by_hand, atol=1e-6) and kept[-1] < 1e-7 < 1e-3 < before[0]
    clean, _, given, _ = drawn(whole)
    last = torch.full((6,), 999)
    assert torch.allclose(whole.add(clean, given, last), given, atol=1e-3)
    assert torch.allclose(whole.target(clean, given, last), -clean, atol=1e-3), (
        "the velocity there is minus the picture"
    )
    whole.scheduler.set_timesteps(10)
    plain.scheduler.set_timesteps(10)
    assert whole.scheduler.timesteps[0] == 999 > plain.scheduler.timesteps[0]
    for own, asked in (("epsilon", None), ("v_prediction", "epsilon")):
        with pytest.raises(InputError, match=r"needs noise\.prediction=v_prediction"):
            diffusion(own, zero_terminal_snr=True, prediction=asked)
    assert diffusion("epsilon", zero_terminal_snr=True, prediction="v_prediction").prediction == "v_prediction"


def test_such_a_schedule_is_refused_before_anything_is_written(short, checkpoint):
    said = TextToImage.check(config.load(NAME, [*short, "noise.zero_terminal_snr=true"]))
    assert len(said) == 1 and "needs noise.prediction=v_prediction (or sample)" in said[0]
    words = ["noise.zero_terminal_snr=true", "noise.prediction=v_prediction"]
    assert TextToImage.check(config.load(NAME, [*short, *words])) == []


def test_samples_are_drawn_by_the_schedule_that_was_trained(short, checkpoint):
    words = ["noise.prediction=v_prediction", "noise.zero_terminal_snr=true", "samples.guidance=1", "steps=2"]
    run, outcome = train(*short, *words)
    assert outcome.state == "done"
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo of sks object", latents=noise, height=32, width=32, num_inference_steps=2, guidance_scale=1.0
    ).images[0]
    with Image.open(run.folder / "samples" / "step-00000002" / "00-0.png") as sample:
        ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
    assert (ours - torch.tensor(list(theirs.tobytes())).int()).abs().max() <= 1  # two ways of rounding to 8 bits
    base = load_base(run.config().model, "no")
    assert base.pipeline.scheduler.config.prediction_type == "epsilon", "the next run finds it as it was"


def test_the_average_is_diffusers_own(short, monkeypatch):
    seen = {}

    def steps(_, work, *rest):
        theirs = EMAModel([p.detach().clone() for p in work.named.values()], decay=0.25)
        for step in range(6):
            work.step(step)
            theirs.step(work.named.values())
            assert all(map(torch.allclose, work.average.values(), theirs.shadow_params)), step
        last = [p.detach().clone() for p in work.named.values()]
        with work.averaged():
            assert all(map(torch.equal, work.named.values(), work.average.values()))
            seen["average"] = {name: p.detach().clone() for name, p in work.named.items()}
        assert all(map(torch.equal, work.named.values(), last)), "training goes on from its own"
        assert not any(map(torch.equal, last, work.average.values()))
        assert work.weights().keys() == {*work.named, *work.average}, "saved, and resumed"
        return Outcome("done", step=6)

    monkeypatch.setattr("equipoise.pipelines.text_to_image.train.train_loop", steps)
    run, _ = train(*short, "train.ema=0.25", "learning_rate=0.05")
    result = lora(run)
    assert len(result) == len(seen["average"])
    for name, tensor in seen["average"].items():
        assert torch.equal(result[name.replace(".default", "")], tensor)


def as_comfyui_has_it(tensors: dict[str, torch.Tensor], unet: torch.nn.Module) -> None:
    """ComfyUI multiplies each row of W + α/r BA by `dora_scale` and divides by the length of W's alone."""
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    tuned = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    up, down, alpha, scale = (
        tensors[f"{name}.{key}"] for key in ("lora_up.weight", "lora_down.weight", "alpha", "dora_scale")
    )
    assert scale.shape == (len(up), 1)
    weight = tuned.base_layer.weight
    whole = weight + alpha / len(down) * up @ down
    assert not torch.allclose(whole.norm(dim=1), weight.norm(dim=1), rtol=1e-3), "or the two could not be told apart"
    given = torch.randn(3, whole.shape[1])
    assert torch.allclose(tuned(given), given @ (whole * scale / weight.norm(dim=1, keepdim=True)).T, atol=1e-5)


def drawn_by(run, checkpoint) -> torch.Tensor:
    """The difference of the run's last sample and what diffusers draws with its result."""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.folder / "result", weight_name=LORA_FILE)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a photo of sks object", latents=noise, height=32, width=32, num_inference_steps=2, guidance_scale=7.0
    ).images[0]
    with Image.open(run.folder / "samples" / "step-00000006" / "00-0.png") as sample:
        ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
    return (ours - torch.tensor(list(theirs.tobytes())).int()).abs()


@pytest.mark.parametrize(
    "words",
    [
        ["lora.dora=true"],
        ["lora.dora=true", "lora.text_encoder=true"],
        ["lora.rslora=true", "lora.alpha=3", "rank=8"],
        ["lora.ranks={up_blocks: 7, to_q: 2}", "lora.text_encoder=true"],
        ["lora.ranks={up_blocks: 7}", "lora.alpha=2"],
    ],
    ids=["dora", "dora with words", "rslora", "ranks", "ranks with alpha"],
)
def test_other_kinds_of_factors_load_in_diffusers_and_as_a_start(short, checkpoint, words, tmp_path):
    run, outcome = train(*short, *words, "learning_rate=0.05")
    assert outcome.state == "done" and drawn_by(run, checkpoint).max() <= 1  # two ways of rounding to 8 bits
    own = lora(run)
    chosen = config.load(NAME, [*short, *words])
    for format in FORMATS:
        file = tmp_path / f"{format}.safetensors"
        assert main(["export", str(run.folder), "--format", format, "--output", str(file)]) == 0
        base = load_base(chosen.model, "no")
        started = chosen.lora.model_copy(update={"start": str(file)})
        with base.adapted(started, seed=5) as parts:
            found = {name: f for part, model in parts.items() for name, f in factors_of(part, model).items()}
            assert found and all(torch.equal(f.up, own[f"{name}.lora_B.weight"]) for name, f in found.items())
            if "dora" in words[0]:
                for name, factors in found.items():
                    end = ".weight" if name.startswith("text_encoder") else ""
                    size = own[f"{name}.lora_magnitude_vector{end}"]
                    # what ComfyUI's are divided by again has been rounded
                    torch.testing.assert_close(factors.magnitude, size, rtol=1e-6 * (format == "comfyui"), atol=0)
                if format == "comfyui":
                    as_comfyui_has_it(load_file(file), parts["unet"])
        if format != "diffusers":
            alpha = chosen.lora.alpha
            with safe_open(file, "pt") as opened:
                described = float(opened.metadata()["ss_network_alpha"])
                said = {opened.get_tensor(name).item() for name in opened.keys() if name.endswith(".alpha")}
            if "rslora" in words[0]:
                assert [*said] == [pytest.approx(3 * 8**0.5)], "others divide by the rank, not by its root"
                assert described == pytest.approx(3 * 8**0.5)
            else:
                assert said == ({2.0} if alpha else {4.0} if "dora" in words[0] else {4.0, 7.0, 2.0})


def test_layers_own_ranks(short):
    run, _ = train(*short, "lora.ranks={up_blocks: 7, to_q: 2}", "steps=1", "samples.prompts=[]")
    ranks = {name: len(tensor) for name, tensor in lora(run).items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "up_blocks" in name} == {7}, "the first pattern that fits"
    assert {rank for name, rank in ranks.items() if "up_blocks" not in name and "to_q" in name} == {2}
    assert {rank for name, rank in ranks.items() if "up_blocks" not in name and "to_q" not in name} == {4}
    with pytest.raises(InputError, match=r"lora.ranks: nowhere: found in no name"):
        train(*short, "lora.ranks={nowhere: 7}")


def test_layers_own_rates(short, work):
    made = work("optimizer.rates={up_blocks: 1e-5, to_q: 1e-6}", "learning_rate=1e-3", "optimizer=adamw")
    rates = {
        name: group["lr"]
        for group in made.optimizer.param_groups
        for name, own in made.named.items()
        if any(own is parameter for parameter in group["params"])
    }
    assert len(rates) == len(made.named)
    for name, rate in rates.items():
        assert rate == (1e-5 if "up_blocks" in name else 1e-6 if "to_q" in name else 1e-3), name
    with pytest.raises(InputError, match=r"optimizer.rates: nowhere: found in no name"):
        work("optimizer.rates={nowhere: 1}")


def test_the_scale_of_rslora(short, checkpoint):
    base = load_base(config.load(NAME, short).model, "no")
    for words, scale in ((["rslora=true"], 3 / 4**0.5), ([], 3 / 4)):
        section = config.load(NAME, [*short, "lora.alpha=3", *(f"lora.{word}" for word in words)]).lora
        with base.adapted(section, 0) as parts:
            scales = {
                scale
                for module in parts["unet"].modules()
                if hasattr(module, "lora_A")
                for scale in module.scaling.values()
            }
            assert scales == {scale}


def test_what_other_apps_are_told(short, tmp_path):
    words = ["noise.prediction=v_prediction", "noise.zero_terminal_snr=true", "noise.snr_gamma=5", "noise.offset=0.05"]
    run, _ = train(*short, *words, "steps=1", "samples.prompts=[]")
    assert main(["export", str(run.folder), "--format", "kohya", "--output", str(tmp_path / "k.safetensors")]) == 0
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["ss_noise_offset"], said["ss_min_snr_gamma"], said["ss_zero_terminal_snr"]) == ("0.05", "5.0", "True")
    assert said["modelspec.prediction_type"] == "v" and said["ss_network_module"] == "networks.lora"


def test_what_a_result_says_of_itself(short):
    run, _ = train(*short, "lora.dora=true", "lora.rslora=true", "steps=1", "samples.prompts=[]")
    with safe_open(run.folder / "result" / LORA_FILE, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["unet.use_dora"] is True and said["unet.use_rslora"] is True
