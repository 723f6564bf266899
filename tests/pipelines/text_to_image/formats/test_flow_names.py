"""What other apps call the layers of families that their pipelines' own code trains."""

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
)
from safetensors.torch import load_file

from equipoise.pipelines.text_to_image.families import Family, family, shape_of
from equipoise.pipelines.text_to_image.families.flows import FLOWS
from equipoise.pipelines.text_to_image.formats.factors import Factors
from equipoise.pipelines.text_to_image.formats.lora_files import read_lora, write_lora
from equipoise.pipelines.text_to_image.formats.names import FORMATS

NAMES = list(FLOWS)
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # of diffusers, by it


def some_factors(kind: Family, model) -> dict[str, Factors]:
    source, found = torch.Generator().manual_seed(0), {}
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layer.endswith((*kind.targets, "proj_mlp")):
            down = torch.randn((2, module.in_features), generator=source)
            up = torch.randn((module.out_features, 2), generator=source)
            found[f"transformer.{layer}"] = Factors(down, up, 1.0)
    return found


@pytest.mark.parametrize(("name", "format"), [(n, f) for n in NAMES for f in FORMATS if f not in family(n).refused])
def test_every_bit_comes_back(name, format, base, tmp_path):
    made = base(name)
    factors = some_factors(made.family, made.denoiser)
    write_lora(tmp_path / "lora.safetensors", format, factors, made.shape, {"format": "pt"})
    found = read_lora(tmp_path / "lora.safetensors", factors, made.shape)
    assert found.keys() == factors.keys() and len(found) > 3
    assert all(torch.equal(found[layer].up, own.up) for layer, own in factors.items())
    if format == "comfyui":  # its loader knows diffusers' modules of these families by that prefix
        names = {name.rsplit(".lora_", 1)[0] for name in load_file(tmp_path / "lora.safetensors") if ".lora_" in name}
        assert names == factors.keys()


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("Flux2Pipeline", _convert_kohya_flux2_lora_to_diffusers),
        ("ChromaPipeline", _convert_kohya_flux_lora_to_diffusers),
        ("QwenImagePipeline", _convert_non_diffusers_qwen_lora_to_diffusers),
    ],
)
def test_diffusers_reads_kohyas_files_as_the_same_updates(name, convert, base, tmp_path):
    model = base(name).denoiser
    if name == "ChromaPipeline":  # that converter knows one width
        with torch.device("meta"):
            model = ChromaTransformer2DModel(num_layers=1, num_single_layers=1)
    factors, shape = some_factors(family(name), model), shape_of(name, model.config)
    write_lora(tmp_path / "kohya.safetensors", "kohya", factors, shape, {"format": "pt"})
    theirs = convert(load_file(tmp_path / "kohya.safetensors"))
    for layer, own in factors.items():
        update = theirs.pop(f"{layer}.lora_B.weight") @ theirs.pop(f"{layer}.lora_A.weight")
        assert torch.allclose(update, own.up @ own.down * (own.alpha / own.rank), atol=1e-4), layer
    assert not theirs
