"""Families that were trained by flow matching: diffusers' own pipelines, scripts and converters are the judges."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import load_file, save_file

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import NoiseSection, TextToImageModel
from equipoise.pipelines.text_to_image.cuts import to_tensor, variants
from equipoise.pipelines.text_to_image.data import open_picture, read_examples
from equipoise.pipelines.text_to_image.families import family, known, shape_of
from equipoise.pipelines.text_to_image.families.noise import Flow
from equipoise.pipelines.text_to_image.formats.factors import Factors, join, split
from equipoise.pipelines.text_to_image.formats.lora_files import name_in, read_lora, write_lora
from equipoise.pipelines.text_to_image.formats.names import FORMATS
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
FAMILIES = known()
FLOWS = [name for name in FAMILIES if family(name).noise == "flow"]
PROMPT = "a sks object"
DRAW = """
import json, sys, torch, diffusers
from safetensors.torch import save_file
drawn = {}
for name, (checkpoint, folder, file, guidance) in json.loads(sys.argv[1]).items():
    kind = name.split("/")[0]
    pipeline = getattr(diffusers, kind).from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, weight_name=file)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    if kind == "FluxPipeline":
        noise = pipeline._pack_latents(noise, *noise.shape)
    picture = pipeline(
        "a sks object", latents=noise, height=32, width=32, num_inference_steps=2, guidance_scale=guidance
    ).images[0]
    drawn[name] = torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
save_file(drawn, sys.argv[2])
"""


def train(*overrides):
    settings = config.load(NAME, overrides)
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run)


def layers_of(model) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Behind the losses before and after: eight instead of 64, for these are no measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.pipelines.text_to_image.fixed.DRAWS", 8)
        yield


@pytest.fixture(scope="module")
def tuned(build_checkpoint, tmp_path_factory):
    """A run of each family whose factors are anything but zero."""
    runs = tmp_path_factory.mktemp("runs")
    words = [
        "data=demo",
        "data.resolution=32",
        "steps=4",
        "batch=2",
        "learning_rate=0.02",
        "lora.alpha=2",
        f"runs={runs}",
    ]
    words += [f"samples.prompts=[{PROMPT}]", "samples.steps=2", "samples.guidance=null", "train.clip=0"]
    return {
        name: train(*words, f"model={build_checkpoint(name)}", f"lora.text_encoder={bool(family(name).tuned_encoders)}")
        for name in FLOWS
    }


def test_every_family_learns_and_diffusers_draws_the_very_same_picture_in_another_process(
    tuned, build_checkpoint, tmp_path
):
    wanted = {}
    for name, (run, outcome) in tuned.items():
        assert outcome.state == "done"
        result = json.loads((run.folder / "result" / "result.json").read_text())
        assert result["loss_after"] < result["loss_before"]
        kind = family(name)
        parts = {key.split(".")[0] for key in load_file(run.folder / "result" / LORA_FILE)}
        assert parts == {kind.denoiser, *kind.tuned_encoders}
        layers = {key.rsplit(".lora_", 1)[0] for key in load_file(run.folder / "result" / LORA_FILE)}
        known = [layer for layer in layers if layer.startswith("transformer.")]
        assert all(any(layer.endswith(f".{target}") for layer in known) for target in kind.targets)
        assert all(layer.endswith(kind.targets) for layer in known), "the family's own, unless told"
        guidance, checkpoint = kind.guidance, str(build_checkpoint(name))
        wanted[name] = (checkpoint, str(run.folder / "result"), LORA_FILE, guidance)
        if name == "ZImagePipeline":  # diffusers reads other apps' files of it at any size
            for format in ("kohya", "comfyui"):
                file = tmp_path / f"{name}-{format}.safetensors"
                assert main(["export", str(run.folder), "--format", format, "--output", str(file)]) == 0
                wanted[f"{name}/{format}"] = (checkpoint, str(tmp_path), file.name, guidance)
    done = subprocess.run(
        [sys.executable, "-c", DRAW, json.dumps(wanted), str(tmp_path / "drawn.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert len(drawn) == len(FLOWS) + 2
    for name, theirs in drawn.items():
        run, _ = tuned[name.split("/")[0]]
        with Image.open(run.folder / "samples" / "step-00000004" / "00-0.png") as sample:
            ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
        assert (ours - theirs.int()).abs().max() <= 1, name  # two ways of rounding to 8 bits
        assert ours.unique().numel() > 10


def by_hand(name: str, pipeline, noisy, times, sigmas, clean, noise, captions):
    """The losses of diffusers' LoRA scripts: train_dreambooth_lora_sd3, …_flux and …_z_image."""
    model = pipeline.transformer
    if name == "StableDiffusion3Pipeline":
        words, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
        answer = model(noisy, timestep=times, encoder_hidden_states=words, pooled_projections=pooled)[0]
        return ((answer * -sigmas + noisy - clean) ** 2).mean()
    if name == "FluxPipeline":
        words, pooled, places = pipeline.encode_prompt(captions, captions)
        answer = model(
            FluxPipeline._pack_latents(noisy, *noisy.shape),
            timestep=times / 1000,
            guidance=torch.full((len(captions),), 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=places,
            img_ids=FluxPipeline._prepare_latent_image_ids(len(captions), 2, 2, noisy.device, noisy.dtype),
        )[0]
        answer = FluxPipeline._unpack_latents(answer, 32, 32, 8)
    else:
        words, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        answer = -torch.stack(model(list(noisy.unsqueeze(2)), (1000 - times) / 1000, words)[0]).squeeze(2)
    return ((answer - (noise - clean)) ** 2).mean()


@pytest.mark.parametrize("name", FLOWS)
def test_the_loss_is_that_of_diffusers_script(name, work, build_checkpoint):
    folder = build_checkpoint(name)
    made = work(f"model={folder}", "batch=4")
    seen, loss = [], made._loss
    made._loss = lambda *given: seen.append(given) or loss(*given)
    with torch.no_grad():
        ours = made.evaluate(0, 0).joint
        ((clean, noise, times, captions, *_),) = seen
        pipeline = DiffusionPipeline.from_pretrained(folder)
        places = [(pipeline.scheduler.timesteps == time).nonzero().item() for time in times]
        sigmas = pipeline.scheduler.sigmas[places].reshape(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * clean + sigmas * noise
        assert len(set(captions)) > 1
        theirs = by_hand(name, pipeline, noisy, times, sigmas, clean, noise, captions)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    means, _, _ = made.own.latents.take(range(4), [0] * 4)
    assert any(torch.equal(clean[0], mean) for mean in means) == (name == "ZImagePipeline"), (
        "its script takes the means"
    )


def test_latents_are_shifted_and_scaled(work, build_checkpoint):
    folder = build_checkpoint("FluxPipeline")
    made = work(f"model={folder}", "data.crop=center")
    vae = DiffusionPipeline.from_pretrained(folder).vae
    example = read_examples(made.config.data)[0][0]
    picture = to_tensor(variants(open_picture(example.path), made.config.data, None, (32, 32))[0][0])
    with torch.no_grad():
        given = vae.encode(picture[None]).latent_dist
    mean, deviation, _ = made.own.latents.take([0], [0])
    assert torch.allclose(mean, (given.mean - 0.1159) * 0.3611, atol=1e-6)
    assert torch.allclose(deviation, given.std * 0.3611, atol=1e-6)


def flow(scheduler: FlowMatchEulerDiscreteScheduler, name: str = "FluxPipeline", **words) -> Flow:
    return Flow(scheduler, NoiseSection(**words), family(name))


@pytest.mark.parametrize(
    "words",
    [{"times": "uniform"}, {"times": "logit_normal", "mean": 0.5, "std": 2.0}, {"times": "mode", "mode_scale": 0.81}],
    ids=lambda words: words["times"],
)
def test_times_are_drawn_as_diffusers_draws_them(words):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = flow(scheduler, **words).times(1000, torch.Generator().manual_seed(0))
    places = compute_density_for_timestep_sampling(
        words["times"],
        1000,
        words.get("mean"),
        words.get("std"),
        words.get("mode_scale"),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(ours, scheduler.timesteps[(places * 1000).long().clamp(max=999)])
    assert not torch.equal(ours, flow(scheduler).times(1000, torch.Generator().manual_seed(0))) or words == {
        "times": "uniform"
    }


def test_the_usual_draws_of_a_family_and_shifts():
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)

    def draws(made: Flow) -> torch.Tensor:
        return made.times(1000, torch.Generator().manual_seed(0))

    logit = draws(flow(plain, times="logit_normal"))
    assert torch.equal(draws(flow(plain, "StableDiffusion3Pipeline")), logit)
    assert torch.equal(draws(flow(plain)), draws(flow(plain, times="uniform")))
    sigma = draws(flow(plain)) / 1000
    assert torch.allclose(draws(flow(plain, shift=3.0)) / 1000, 3 * sigma / (1 + 2 * sigma), atol=1e-6)
    assert torch.equal(draws(flow(plain, shift=3.0)), draws(flow(shifted)))
    moving = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(draws(flow(moving)), draws(flow(plain))), "such a shift is for sampling alone"
    assert torch.equal(draws(flow(moving, shift=3.0)), draws(flow(shifted)))
    before = flow(shifted)
    shifted.set_timesteps(4)  # as sampling does
    assert torch.equal(draws(before), draws(flow(plain, shift=3.0)))


def test_a_stopped_run_resumes_exactly(short, build_checkpoint, stopped_run):
    words = [*short, f"model={build_checkpoint('StableDiffusion3Pipeline')}", "train.ema=0.9", "samples.prompts=[]"]
    words += ["lora.text_encoder=true", "noise.times=mode", "noise.offset=0.1", "checkpoint_every=2"]
    whole, _ = train(*words)
    settings = config.load(NAME, words)
    run = stopped_run(TextToImage, settings, 3)
    assert execute(TextToImage, settings, run).state == "done"
    first, second = (load_file(one.folder / "result" / LORA_FILE) for one in (whole, run))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", FLOWS)
def test_checkpointed_gradients_are_the_same(name, short, build_checkpoint):
    results = []
    for kept in ("false", "true"):
        words = [
            f"model={build_checkpoint(name)}",
            f"train.gradient_checkpointing={kept}",
            "optimizer=adamw",
            "steps=2",
        ]
        run, _ = train(*short, *words, "samples.prompts=[]", "learning_rate=0.01")
        results.append(load_file(run.folder / "result" / LORA_FILE))
    assert all(torch.allclose(results[0][key], results[1][key], atol=1e-6) for key in results[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_counts_every_weight(name, short, build_checkpoint, float_bytes):
    folder = build_checkpoint(name)
    estimate = TextToImage.estimate_memory(config.load(NAME, [*short, f"model={folder}", "rank=1"]))
    more = TextToImage.estimate_memory(config.load(NAME, [*short, f"model={folder}", "rank=1", "batch=4"]))
    weights = float_bytes(folder)
    base = load_base(TextToImageModel(path=str(folder)), "no")
    base.read({example.caption for example in read_examples(config.load(NAME, short).data)[0]})
    captions = sum(tensor.numel() * 4 for read in base.embeddings.values() for tensor in read.values())
    with base.adapted(config.load(NAME, ["rank=1"]).lora, 0) as parts:
        factors = sum(p.numel() * 4 for part in parts.values() for p in part.parameters() if p.requires_grad)
    assert estimate and more and estimate.model == pytest.approx(weights + factors + captions, rel=5e-3)
    assert more.activations == pytest.approx(2 * estimate.activations, rel=0.1)


def test_the_shipped_configuration(short, build_checkpoint, pictures):
    words = [*short, "data.instance_prompt=a photo", f"model={build_checkpoint('FluxPipeline')}", "steps=1"]
    settings = config.load("text_to_image/flux", [*words, "samples.prompts=[]"])
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    assert execute(TextToImage, settings, run).state == "done"
    assert {tensor.dtype for tensor in load_file(run.folder / "result" / LORA_FILE).values()} == {torch.float32}


def test_captions_are_read_once_in_a_process(work, build_checkpoint, monkeypatch):
    folder = build_checkpoint("FluxPipeline")
    first = work(f"model={folder}").evaluate(0, 0).joint.item()
    monkeypatch.setattr(type(family("FluxPipeline")), "embed", None)  # must not be needed again
    assert work(f"model={folder}", "rank=2").evaluate(0, 0).joint.item() == first


def test_stable_diffusion_3_without_t5(short, build_checkpoint):
    """diffusers has zeros in its place, for training as for sampling."""
    folder = build_checkpoint("StableDiffusion3Pipeline", t5=False)
    assert TextToImage.estimate_memory(config.load(NAME, [*short, f"model={folder}"]))
    run, outcome = train(*short, f"model={folder}", "samples.count=1")
    assert outcome.state == "done" and (run.folder / "samples" / "step-00000006" / "00-0.png").is_file()
    base = load_base(TextToImageModel(path=str(folder)), "no")
    assert base.encoders == ("text_encoder", "text_encoder_2")
    words = base.family.embed(base.pipeline, ["a"])["encoder_hidden_states"]
    assert words.shape == (1, 32 + 256, 32) and not words[:, 32:].any() and words[:, :32].any()


def test_schnell_is_told_no_guidance_and_dev_is(work, build_checkpoint):
    losses = {}
    for told in (True, False):
        folder = build_checkpoint("FluxPipeline", guidance_embeds=told)
        losses[told] = [
            work(f"model={folder}", f"noise.guidance={value}").evaluate(0, 0).joint.item() for value in (1, 3.5)
        ]
    assert losses[True][0] != losses[True][1] and losses[False][0] == losses[False][1]


def test_what_a_family_would_not_read_is_refused(short, build_checkpoint):
    def said(name, *words):
        return TextToImage.check(config.load(NAME, [*short, f"model={build_checkpoint(name)}", *words]))

    assert said("ZImagePipeline", "lora.text_encoder=true") == [
        "lora.text_encoder: diffusers loads no factors for the text encoder of Z-Image. Set it false."
    ]
    assert said("FluxPipeline", "samples.negative=ugly") == [
        "samples.negative: FLUX.1 reads no negative prompts. Leave it out."
    ]
    (problem,) = said("StableDiffusion3Pipeline", "noise.snr_gamma=5")
    assert problem.startswith("noise.snr_gamma: has no effect on Stable Diffusion 3, which reads noise.offset, ")
    (problem,) = said("StableDiffusionPipeline", "noise.times=mode")
    assert problem.startswith("noise.times: has no effect on Stable Diffusion, which reads")
    assert said("FluxPipeline", "data.resolution=40") == [
        "data.resolution: must be a multiple of 16 for FLUX.1, got 40."
    ]
    (problem,) = said("FluxPipeline", "lora.targets=[attn1]")
    assert problem.startswith("lora.targets: attn1: no layer has a name that ends so.")


# Names in other apps


def meta(kind, **options):
    with torch.device("meta"):
        return kind(**options)


MODELS = {
    "StableDiffusion3Pipeline": lambda: meta(
        SD3Transformer2DModel, num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm"
    ),
    "FluxPipeline": lambda: meta(FluxTransformer2DModel, num_layers=2, num_single_layers=2, guidance_embeds=True),
    "ZImagePipeline": lambda: meta(ZImageTransformer2DModel, n_layers=2, n_refiner_layers=1),
}
CONVERTERS = {
    "StableDiffusion3Pipeline": convert_sd3_transformer_checkpoint_to_diffusers,
    "FluxPipeline": convert_flux_transformer_checkpoint_to_diffusers,
    "ZImagePipeline": convert_z_image_transformer_checkpoint_to_diffusers,
}


def original_checkpoint(name: str, model) -> dict[str, torch.Tensor]:
    """As the original code saves it, each layer filled with its number, and half more in its second half."""
    kind, shape = family(name), shape_of(name, model.config)
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for number, layer in enumerate(layers_of(model)):
        place, heights = kind.fused(kind.denoiser, layer, shape) or (0, (6,))
        own = torch.full((heights[place], 1), float(number))
        own[len(own) // 2 :] += 0.5
        swapped = kind.swapped(kind.denoiser, layer, shape)
        rows.setdefault(kind.original(layer), {})[place] = torch.cat(own.chunk(2)[::-1]) if swapped else own
    found = {}
    for key, parts in rows.items():
        whole = torch.cat([parts[place] for place in sorted(parts)])
        found |= {f"{key}.weight": whole, f"{key}.bias": whole}
    return found


@pytest.mark.parametrize("name", FLOWS)
def test_original_names_are_those_that_diffusers_converts(name):
    """diffusers turns checkpoints of the original code into its own: what comes back must be what went in."""
    model = MODELS[name]()
    given = original_checkpoint(name, model)
    one = torch.ones(1, 1)
    if name == "StableDiffusion3Pipeline":
        given["pos_embed"] = one
    if name == "FluxPipeline":
        for block in range(2):
            norms = [f"double_blocks.{block}.{side}_attn.norm" for side in ("img", "txt")] + [
                f"single_blocks.{block}.norm"
            ]
            given |= {f"{norm}.{kind}_norm.scale": one for norm in norms for kind in ("query", "key")}
    converted = CONVERTERS[name](given)
    for number, layer in enumerate(layers_of(model)):
        first, second = converted[f"{layer}.weight"].chunk(2)
        assert (first == number).all() and (second == number + 0.5).all(), layer


def some_factors(name: str, model, seed: int = 0) -> dict[str, Factors]:
    """Random ones on the layers that the family tunes unless told, and on what else shares one of kohya's layers."""
    source, kind = torch.Generator().manual_seed(seed), family(name)
    found = {}
    for layer in layers_of(model):
        if any(layer.endswith(f".{target}") for target in (*kind.targets, "proj_mlp")):
            weight = model.get_submodule(layer).weight
            down = torch.randn((2, weight.shape[1]), generator=source)
            found[f"transformer.{layer}"] = Factors(down, torch.randn((weight.shape[0], 2), generator=source), 1.0)
    return found


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_bit_comes_back(name, format, tmp_path):
    model = MODELS[name]()
    factors, shape = some_factors(name, model), shape_of(name, model.config)
    write_lora(tmp_path / "lora.safetensors", format, factors, shape, {"format": "pt"})
    found = read_lora(tmp_path / "lora.safetensors", factors, shape)
    assert found.keys() == factors.keys() and len(found) > 8
    for layer, own in factors.items():
        assert torch.equal(found[layer].down, own.down) and torch.equal(found[layer].up, own.up), layer
        assert format == "diffusers" or found[layer].alpha == own.alpha


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("FluxPipeline", _convert_kohya_flux_lora_to_diffusers),
        ("ZImagePipeline", _convert_non_diffusers_z_image_lora_to_diffusers),
    ],
)
@pytest.mark.parametrize("left_out", [(), ("to_k", "proj_mlp")])
def test_diffusers_reads_kohyas_files_as_the_same_updates(name, convert, left_out, tmp_path):
    model = MODELS[name]()
    shape = shape_of(name, model.config)
    factors = {layer: own for layer, own in some_factors(name, model).items() if not layer.endswith(left_out)}
    write_lora(tmp_path / "kohya.safetensors", "kohya", factors, shape, {"format": "pt"})
    theirs = convert(load_file(tmp_path / "kohya.safetensors"))
    for layer, own in factors.items():
        seen = torch.randn((own.down.shape[1], 2), generator=torch.Generator().manual_seed(1))
        answer = theirs.pop(f"{layer}.lora_B.weight") @ (theirs.pop(f"{layer}.lora_A.weight") @ seen)
        assert torch.allclose(answer, own.up @ (own.down @ seen) * (own.alpha / own.rank), rtol=1e-4, atol=1e-3), layer
    assert all(not tensor.any() for key, tensor in theirs.items() if "lora_B" in key), "others stay as they were"
    comfyui = {name_in("comfyui", layer, shape) for layer in factors}
    prefix = "diffusion_model" if name == "ZImagePipeline" else "transformer"
    assert comfyui == {f"{prefix}.{layer.partition('.')[2]}" for layer in factors}, "ComfyUI knows diffusers' modules"


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_doras_sizes_in_comfyui(name, build_checkpoint, tmp_path):
    """ComfyUI exchanges the halves of the last layer's rows, of W and of BA, and takes sizes as they stand."""
    words = ["lora.dora=true", "lora.rank=2", "lora.targets=[norm_out.linear, to_q]", "samples.prompts=[]", "steps=3"]
    words += [
        "data=demo",
        "data.instance_prompt=sks",
        "data.resolution=32",
        "learning_rate=0.05",
        "optimizer.name=adamw",
    ]
    run, _ = train(*words, f"model={build_checkpoint(name)}", f"runs={tmp_path}")
    file = tmp_path / "comfyui.safetensors"
    assert main(["export", str(run.folder), "--format", "comfyui", "--output", str(file)]) == 0
    base, tensors = load_base(run.config().model, "no"), load_file(file)
    started = run.config().lora.model_copy(update={"start": str(file)})
    with base.adapted(started, 5) as parts:
        layer = parts["transformer"].get_submodule("norm_out.linear")
        seen = torch.randn(3, layer.in_features)
        wanted = layer(seen) - layer.base_layer.bias
        up, down, size = (
            tensors[f"transformer.norm_out.linear.{end}"]
            for end in ("lora_up.weight", "lora_down.weight", "dora_scale")
        )
        theirs, update = (torch.cat(rows.chunk(2)[::-1]) for rows in (layer.base_layer.weight, up @ down))
        merged = (theirs + update) * size / theirs.norm(dim=1, keepdim=True)
        assert torch.allclose(seen @ torch.cat(merged.chunk(2)[::-1]).T, wanted, atol=1e-5)
        assert not torch.allclose(layer.base_layer(seen) - layer.base_layer.bias, wanted, atol=1e-2)


def test_z_images_files_of_other_apps_are_read(tmp_path):
    """musubi-tuner's names are the modules of diffusers; others have one layer for three."""
    model = MODELS["ZImagePipeline"]()
    factors, shape = some_factors("ZImagePipeline", model), shape_of("ZImagePipeline", model.config)
    layer = "transformer.layers.0.attention.to_q"
    assert name_in("kohya", layer, shape) == "lora_unet_layers_0_attention_to_q"
    joint = join([factors[f"transformer.layers.0.attention.to_{x}"] for x in "qkv"], (shape["dim"],) * 3)
    tensors = {"lora_down.weight": joint.down, "lora_up.weight": joint.up, "alpha": torch.tensor(joint.alpha)}
    save_file({f"lora_unet_layers_0_attention_qkv.{k}": t for k, t in tensors.items()}, tmp_path / "one.safetensors")
    found = read_lora(tmp_path / "one.safetensors", factors, shape)
    assert len(found) == 3 and torch.equal(found[layer].up, factors[layer].up)


def test_names_of_stable_diffusion_3():
    shape = {"family": "StableDiffusion3Pipeline", "num_attention_heads": 24, "attention_head_dim": 64}
    for layer, expected in {
        "transformer.transformer_blocks.3.attn.to_k": "lora_unet_joint_blocks_3_x_block_attn_qkv",
        "transformer.transformer_blocks.3.attn2.to_out.0": "lora_unet_joint_blocks_3_x_block_attn2_proj",
        "transformer.transformer_blocks.0.ff_context.net.2": "lora_unet_joint_blocks_0_context_block_mlp_fc2",
    }.items():
        assert name_in("kohya", layer, shape) == expected
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    assert name_in("kohya", layer, shape) == "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    assert (
        name_in("comfyui", layer, shape)
        == "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    )


def test_joined_layers_update_as_they_did_alone():
    source = torch.Generator().manual_seed(0)
    rows = (3, 5, 3)
    layers = [
        Factors(torch.randn((rank, 7), generator=source), torch.randn((row, rank), generator=source), alpha)
        for row, rank, alpha in zip(rows, (2, 4, 1), (2.0, 1.0, 8.0), strict=True)
    ]
    whole = join(layers, rows)
    update = whole.up @ whole.down * (whole.alpha / whole.rank)
    alone = torch.cat([layer.up @ layer.down * (layer.alpha / layer.rank) for layer in layers])
    assert torch.allclose(update, alone, atol=1e-5)
    shared = Factors(torch.randn((2, 7), generator=source), torch.randn((11, 2), generator=source), 1.0)
    parts = split(shared, rows)
    assert torch.equal(torch.cat([part.up for part in parts]), shared.up)
    assert all(part.down is shared.down and part.alpha == 1.0 for part in parts)


def test_a_layer_of_kohyas_that_changes_more_than_is_tuned(tmp_path):
    name, model = "FluxPipeline", MODELS["FluxPipeline"]()
    factors, shape = some_factors(name, model), shape_of(name, model.config)
    write_lora(tmp_path / "lora.safetensors", "kohya", factors, shape, {"format": "pt"})
    fewer = [layer for layer in factors if not layer.endswith("to_v")]
    with pytest.raises(InputError, match="changes a layer that is not tuned here"):
        read_lora(tmp_path / "lora.safetensors", fewer, shape)
