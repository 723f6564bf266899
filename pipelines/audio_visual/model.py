"""Late fusion: an encoder per modality, a joint head on all their features, and a linear head on each one's."""

# transformers annotates too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from equipoise.errors import InputError
from equipoise.pipelines.audio_visual.config import AudioVisualConfig, AudioVisualEncoder
from equipoise.pipelines.audio_visual.features import PRESENT
from equipoise.pipelines.training.layers import named_by, unmatched

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures, which pretrained encoders expect


class LateFusion(nn.Module):
    """Encoders, the fusion with its joint head, and unimodal heads.

    Args:
        config: The model section and the modalities.
        classes: How many.
        bins: Of the spectrogram, and windows.
        pretrained: Load the encoders' pretrained weights, where the configuration names some; or, modality → the
            settings of its pretrained encoder, from `described`, to which weights will be given.
    """

    def __init__(
        self,
        config: AudioVisualConfig,
        classes: int,
        bins: tuple[int, int] = (0, 0),
        pretrained: bool | Mapping[str, dict[str, Any]] = True,
    ):
        super().__init__()
        self.config = config
        self.modalities = list(config.data.modalities)
        sections = {name: getattr(config.model, name) for name in self.modalities}
        encoders = {name: _encoder(name, section, config, bins, pretrained) for name, section in sections.items()}
        self.encoders = nn.ModuleDict(encoders)
        self.come = {name: bool(section.path) for name, section in sections.items()}
        widths: dict[str, int] = {name: encoder.features for name, encoder in encoders.items()}
        self.fusion = FUSIONS[config.model.fusion](widths, classes)
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})
        self.register_buffer("sound", torch.tensor([0.0, 1.0]))  # mean and deviation of the training spectrograms
        self.sound: Tensor
        self.classes: list[str] = []  # in the order of the logits, of a model that `load` gives

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # modality → (batch, width)
        """Those of a modality that a clip lacks are zero: see `present`."""
        made = {}
        for name in self.modalities:
            given, there = batch[name], present(batch, self.modalities, name)
            if there is None or bool(there.all()):
                made[name] = self._encoded(name, given)
                continue
            count, width = int(there.sum()), self.encoders[name].features
            found = torch.zeros(len(there), width, device=given.device)
            if count:
                with _norms_kept(self.encoders[name]) if count == 1 else nullcontext():
                    own = self._encoded(name, given[there])
                found = found.to(own.dtype).index_put((there.nonzero()[:, 0],), own)
            made[name] = found
        return made

    def _encoded(self, name: str, given: Tensor) -> Tensor:  # (clips, width)
        if name == "audio":
            given = (given - self.sound[0]) / self.sound[1]
        elif name == "visual":
            mean, std = (given.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (_MEAN, _STD))
            given = (given.float() / 255 - mean) / std
        return self.encoders[name](given)

    def predict(self, files: Sequence[str | Path]) -> list[dict[str, Any]]:
        """What the model says of clips: for each `clip`, its `label` and `probability`, and each modality's own.

        Args:
            files: One manifest, or videos, sounds, pictures and folders of them. Of a model that `load` gives.

        Raises:
            InputError: All that is wrong with them, a line each.
        """
        from equipoise.pipelines.audio_visual.predict import Result

        return Result((self, self.classes)).predict(files).rows

    def described(self) -> dict[str, dict[str, Any]]:
        """The settings of encoders that come pretrained, by modality; a result then needs no folder they came from."""
        return {name: self.encoders[name].net.config.to_dict() for name in self.modalities if self.come[name]}

    def responses(self, features: dict[str, Tensor], unimodal: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each modality alone gives: its part of the joint logits where they are a sum of parts, its logits where
        all have one head.

        Gated and modulated features cannot be taken apart: with the other modality's zero, the joint head's logits say
        which of the two is the gate and not which is ahead. There each modality's own head stands in.
        """
        if isinstance(self.fusion, Sum | Concat | Shared):
            return {name: self.fusion.alone(name, features) for name in features}
        return {name: logits.detach() for name, logits in unimodal.items()}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint logits, (batch, classes), and every modality's own."""
        features = self.features(batch)
        return self.fusion(features), {name: self.heads[name](made) for name, made in features.items()}


def present(batch: Mapping[str, Tensor], modalities: Sequence[str], name: str) -> Tensor | None:
    """(batch,) which clips have the modality; none where all have to."""
    return batch[PRESENT][:, modalities.index(name)] if PRESENT in batch else None


@contextmanager
def _norms_kept(net: nn.Module) -> Iterator[None]:
    """Batch norms go by their running statistics, and leave them as they are: those of a single clip say nothing."""
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class Sum(nn.Module):
    """The sum of a linear head per modality."""

    def __init__(self, widths: dict[str, int], classes: int):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(width, classes) for name, width in widths.items()})

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.parts[name](made) for name, made in features.items()]).sum(0)

    def alone(self, name: str, features: dict[str, Tensor]) -> Tensor:
        """The joint head's logits from one modality: its own summand."""
        return self.parts[name](features[name])


class Concat(nn.Module):
    """One linear head on all features beside one another."""

    def __init__(self, widths: dict[str, int], classes: int):
        super().__init__()
        self.widths = widths
        self.out = nn.Linear(sum(widths.values()), classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.out(torch.cat(list(features.values()), 1))

    def alone(self, name: str, features: dict[str, Tensor]) -> Tensor:
        """One modality's columns of the head, and an equal share of its bias."""
        columns = dict(zip(self.widths, self.out.weight.split(list(self.widths.values()), 1), strict=True))
        return features[name] @ columns[name].T + self.out.bias / len(self.widths)


class Gated(nn.Module):
    """The second modality's projection, gated by a sigmoid of the first's."""

    def __init__(self, widths: dict[str, int], classes: int):
        super().__init__()
        common = max(widths.values())
        self.first, self.second = (nn.Linear(width, common) for width in widths.values())
        self.out = nn.Linear(common, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        one, other = features.values()
        return self.out(torch.sigmoid(self.first(one)) * self.second(other))


class Film(nn.Module):
    """The second modality's features, scaled and shifted by linear functions of the first's (FiLM)."""

    def __init__(self, widths: dict[str, int], classes: int):
        super().__init__()
        one, other = widths.values()
        self.film = nn.Linear(one, 2 * other)
        self.out = nn.Linear(other, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        one, other = features.values()
        scale, shift = self.film(one).chunk(2, 1)
        return self.out((1 + scale) * other + shift)


class Shared(nn.Module):
    """One linear head that every modality's features go through; the joint logits are the mean of what it says of each,
    weighed by exp(−entropy) of its prediction. Narrower features are filled up with zeros. Features that are zero, of a
    modality that the clip lacks or that was dropped, have no say; where all are, it is what the head says of nothing.
    """

    def __init__(self, widths: dict[str, int], classes: int):
        super().__init__()
        self.out = nn.Linear(max(widths.values()), classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        logits = torch.stack([self.alone(name, features) for name in features])  # (modalities, batch, classes)
        logs = logits.float().log_softmax(2)
        sure = (logs.exp() * logs).sum(2, keepdim=True)  # −entropy
        given = torch.stack([(made != 0).any(1, keepdim=True) for made in features.values()])
        sure = sure.masked_fill(~given & given.any(0), -torch.inf)
        return (sure.softmax(0).to(logits.dtype) * logits).sum(0)

    def alone(self, name: str, features: dict[str, Tensor]) -> Tensor:
        """What the head says of one modality."""
        made = features[name]
        return self.out(nn.functional.pad(made, (0, self.out.in_features - made.shape[1])))


FUSIONS: dict[str, Any] = {"sum": Sum, "concat": Concat, "gated": Gated, "film": Film, "shared": Shared}


def _encoder(name: str, section: AudioVisualEncoder, config: AudioVisualConfig, bins, pretrained) -> Any:
    kinds = {"resnet": ResNet, "ast": SpectrogramTransformer, "transformer": Text}
    made = kinds[section.kind](section, name, config, bins, pretrained)
    if section.rank:
        _add_factors(made.net, section, f"model.{name}.targets")
    return made


def _add_factors(net: nn.Module, section: AudioVisualEncoder, key: str) -> None:
    """Puts LoRA factors beside a net's layers, in place, and freezes the rest."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("pooler.")  # which nothing asks
    ]
    if wrong := unmatched(section.targets, layers, key):
        raise InputError("\n".join(wrong))
    chosen = [name for name in layers if not section.targets or named_by(section.targets, name)]
    alpha = section.rank if section.alpha is None else section.alpha
    inject_adapter_in_model(LoraConfig(r=section.rank, lora_alpha=alpha, target_modules=chosen), net)


def _backbone(section: AudioVisualEncoder, settings: Any, pretrained: bool | Mapping[str, Any], name: str) -> Any:
    """transformers' model of these settings, or the pretrained one that the section names."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    if not section.path:
        return AutoModel.from_config(settings)
    where: dict[str, Any] = {"revision": section.revision, "trust_remote_code": False}
    logging.disable_progress_bar()  # a second bar, gone in an instant, would break up ours
    try:
        if isinstance(pretrained, Mapping) and name in pretrained:
            return AutoModel.from_config(AutoConfig.for_model(**pretrained[name]), trust_remote_code=False)
        if pretrained is not True:  # its weights come from elsewhere
            return AutoModel.from_config(AutoConfig.from_pretrained(section.path, **where), trust_remote_code=False)
        net, report = AutoModel.from_pretrained(section.path, use_safetensors=True, output_loading_info=True, **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.{name}.path: {section.path} cannot be loaded: {reason}") from error
    # a masked language model comes without the pooler, which is not asked here
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise InputError(
            f"model.{name}.path: {section.path} lacks {len(missing)} weights of a {net.config.model_type}, such as "
            f"{missing[0]}; they would be random. Give a folder that holds them all."
        )
    return net


class ResNet(nn.Module):
    """A residual net on each frame, or on the spectrogram; frames' features are averaged."""

    def __init__(self, section: AudioVisualEncoder, name: str, config, bins, pretrained):
        from transformers import ResNetConfig

        super().__init__()
        settings = ResNetConfig(
            num_channels=1 if name == "audio" else 3,
            embedding_size=section.widths[0],
            hidden_sizes=section.widths,
            depths=section.depths,
            layer_type="basic",
        )
        self.net = _backbone(section, settings, pretrained, name)
        if self.net.config.model_type != "resnet":
            raise InputError(f"model.{name}.path: {section.path} is a {self.net.config.model_type}, not a resnet.")
        self.features = self.net.config.hidden_sizes[-1]

    def forward(self, given: Tensor) -> Tensor:  # (batch, 1, bins, windows) or (batch, frames, 3, size, size)
        frames = given.flatten(0, 1) if given.ndim == 5 else given
        frames = frames.expand(-1, self.net.config.num_channels, -1, -1)  # a net made for pictures, on sound
        pooled = self.net(frames).pooler_output.flatten(1)
        return pooled.unflatten(0, given.shape[:2]).mean(1) if given.ndim == 5 else pooled


class SpectrogramTransformer(nn.Module):
    """AST on the spectrogram; pretrained ones were made for a deviation of 0.5."""

    def __init__(self, section: AudioVisualEncoder, name: str, config, bins: tuple[int, int], pretrained):
        from transformers import ASTConfig

        super().__init__()
        settings = ASTConfig(
            hidden_size=section.width,
            intermediate_size=4 * section.width,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            num_mel_bins=bins[0],
            max_length=bins[1],
        )
        self.net = _backbone(section, settings, pretrained, name)
        if not section.path:
            # zeros, as transformers leaves them, come out of the first layer norm with gradients of 1e6
            embeddings = self.net.embeddings
            for tokens in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
                nn.init.trunc_normal_(tokens, std=self.net.config.initializer_range)
        made_for = (self.net.config.num_mel_bins, self.net.config.max_length)
        if made_for != tuple(bins):
            raise InputError(
                f"model.{name}.path: {section.path} takes {made_for[0]} mel bands × {made_for[1]} windows, and "
                f"data.audio gives {bins[0]} × {bins[1]}. Set data.audio.mels, seconds and hop."
            )
        self.features = self.net.config.hidden_size
        self.deviation = 0.5 if section.path else 1.0

    def forward(self, given: Tensor) -> Tensor:  # (batch, 1, bins, windows)
        return self.net(self.deviation * given[:, 0].transpose(1, 2)).pooler_output


class Text(nn.Module):
    """A transformer on the text's tokens, averaged."""

    def __init__(self, section: AudioVisualEncoder, name: str, config: AudioVisualConfig, bins, pretrained):
        from transformers import BertConfig

        super().__init__()
        settings = BertConfig(
            vocab_size=257,  # bytes, and nothing
            hidden_size=section.width,
            intermediate_size=4 * section.width,
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            max_position_embeddings=config.data.text.length,
        )
        self.net = _backbone(section, settings, pretrained, name)
        most = getattr(self.net.config, "max_position_embeddings", None)
        if most and most < config.data.text.length:
            raise InputError(
                f"model.{name}.path: {section.path} takes {most} tokens, and data.text.length is "
                f"{config.data.text.length}. Set data.text.length={most}."
            )
        self.features = self.net.config.hidden_size

    def forward(self, given: Tensor) -> Tensor:  # (batch, length) tokens
        ended = self.net.config.pad_token_id or 0
        mask = (given != ended).long()
        mask[:, 0] = 1  # no text at all
        made = self.net(input_ids=given, attention_mask=mask).last_hidden_state
        return (made * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def load(folder: str | Path) -> tuple[LateFusion, list[str]]:
    """A run's result: the model in evaluation mode, and its classes in the order of the logits.

    Args:
        folder: A run's result/, what `equipoise export` makes of it, or the file with its weights.

    Raises:
        InputError: The folder holds no result of this pipeline.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name in (WEIGHTS, DESCRIPTION) else folder
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        config = AudioVisualConfig.model_validate(described["config"])
        model = LateFusion(
            config, len(described["classes"]), tuple(described["bins"]), described.get("pretrained", False)
        )
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{folder}: holds no model of this pipeline ({' '.join(str(error).split())[:200]})."
        ) from error
    model.classes = described["classes"]
    return model.eval(), model.classes
