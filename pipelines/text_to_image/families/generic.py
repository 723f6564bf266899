"""Any family that was trained by flow matching, by the code of its own pipeline in diffusers.

A pipeline reads captions (`encode_prompt`), and one step of its `__call__` makes of latents, times and what was read
the denoiser's input, and of the answer what its scheduler wants: noise less picture. So a family is a few facts: see
`flows`. Times are each picture's own.
"""

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.families.transformer import TransformerFamily

if TYPE_CHECKING:
    from torch import Tensor


class GenericFlow(TransformerFamily):
    """A transformer trained by flow matching, called by its pipeline."""

    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    refused: ClassVar[tuple[str, ...]] = ("kohya", "comfyui")

    # Of each argument of the pipeline's call that a caption becomes: its index in what `encode_prompt` returns, and its
    # shape for one caption: numbers, or keys of the denoiser's config.
    captions: ClassVar[dict[str, tuple[int, tuple[int | str, ...]]]]
    # How much later in it the like of a negative caption is, where that is read in another way; so is an empty one.
    negatives: ClassVar[int] = 0
    packed: ClassVar[bool] = False  # the call takes latents as tokens
    strength: ClassVar[str] = "guidance_scale"  # the call's argument for classifier-free guidance
    unguided: ClassVar[float] = 1.0  # its value without
    options: ClassVar[dict[str, Any]] = {}  # more arguments of the call
    casts: ClassVar[bool] = True  # it brings latents to the denoiser's dtype

    _pipeline: Any = None

    def bind(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def usual_guidance(self, pipeline: Any) -> float:
        return self.unguided if pipeline.config.get("is_distilled") else self.guidance

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        return self.stack([self.read(pipeline, caption) for caption in captions])

    def read(self, pipeline: Any, caption: str) -> "dict[str, Tensor]":
        """One caption, alone: pipelines pad it as far as the longest beside it, and not all give a mask."""
        import torch

        usual = signature(type(pipeline).__call__).parameters
        words = {
            name: usual[name].default
            for name in signature(pipeline.encode_prompt).parameters
            if name in usual and usual[name].default is not Parameter.empty
        }
        later = self.negatives if not caption else 0
        if "do_classifier_free_guidance" in signature(pipeline.encode_prompt).parameters:
            words["do_classifier_free_guidance"] = bool(later)
        device = getattr(pipeline, next(iter(self.text_encoders))).device
        made = pipeline.encode_prompt(**words | {"prompt": [caption], "device": device})
        found = {name: made[index + later] for name, (index, _) in self.captions.items()}
        length = next(iter(found.values())).shape[1]
        for name, tensor in found.items():
            if tensor is None:  # a mask of ones
                found[name] = torch.ones(1, length, dtype=torch.long, device=device)
        return found | {"lengths": torch.tensor([length])}

    def stack(self, rows: "Sequence[Mapping[str, Tensor]]") -> "dict[str, Tensor]":
        """What was read of single captions, filled up to the longest."""
        from torch import cat
        from torch.nn.functional import pad

        longest = max(int(row["lengths"]) for row in rows)

        def filled(name: str, row: "Mapping[str, Tensor]") -> "Tensor":
            tensor, missing = row[name], longest - int(row["lengths"])
            if not missing or name not in self._sequences:
                return tensor
            return pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing))

        return {name: cat([filled(name, row) for row in rows]) for name in rows[0]}

    @property
    def _sequences(self) -> list[str]:
        """What there is of each word."""
        return [name for name, (_, shape) in self.captions.items() if isinstance(shape[0], int)]

    def embed_empty(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        import torch

        denoiser = getattr(pipeline, self.denoiser)
        made = {}
        for name, (_, shape) in self.captions.items():
            sizes = [size if isinstance(size, int) else _number(denoiser.config, size) for size in shape]
            if name.endswith("mask"):  # looked at for how many words there are
                made[name] = torch.ones(len(captions), *sizes, dtype=torch.long, device="cpu")
            else:
                made[name] = torch.zeros(len(captions), *sizes, dtype=denoiser.dtype)
        length = next(iter(made.values())).shape[1]
        return made | {"lengths": torch.full((len(captions),), length, device="cpu")}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 3.5,
    ) -> "Tensor":
        import torch

        lengths = embedded["lengths"].tolist()
        if len(set(lengths)) == 1 or any(name.endswith("mask") for name in self.captions):
            return self._answer(denoiser, noisy, times, embedded, guidance)
        order, made = [], []
        for length in sorted(set(lengths)):  # without a mask, what is filled up would be read
            some = [index for index, own in enumerate(lengths) if own == length]
            words = {name: tensor[some] for name, tensor in embedded.items()}
            words |= {name: words[name][:, :length] for name in self._sequences}
            made.append(self._answer(denoiser, noisy[some], times[some], words, guidance))
            order += some
        return torch.cat(made)[torch.tensor(order).argsort()]

    def _answer(
        self, denoiser: Any, noisy: "Tensor", times: "Tensor", embedded: "Mapping[str, Tensor]", guidance: float
    ) -> "Tensor":
        from equipoise.pipelines.text_to_image.families import one_step

        height, width = self._pixels(noisy)
        pipeline, image = self.starting(self._pipeline, embedded.get("source"))
        words = {
            **self.options,
            **self.arguments({name: embedded[name] for name in self.captions}),
            self.strength: guidance if self.distilled else self.unguided,
            "latents": one_step.pack(noisy, self.patch) if self.packed else noisy,
            "height": height,
            "width": width,
            **self.of_size(height, width),
            **image,
        }
        made = one_step.answer(self.sized(pipeline, height, width), self.denoiser, denoiser, times, words)
        return one_step.unpack(made, noisy.shape, self.patch)

    def _pixels(self, latents: "Tensor") -> tuple[int, int]:
        from equipoise.pipelines.text_to_image.families.autoencoders import cell

        pixels = cell(self._pipeline.vae)
        return latents.shape[-2] * pixels, latents.shape[-1] * pixels

    def of_size(self, height: int, width: int) -> dict[str, Any]:
        """More arguments of the call, which depend on the picture's size."""
        return {}

    def arguments(self, embedded: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The arguments of the pipeline's call, which may have captions in another dimension than the first."""
        return embedded

    def starting(self, pipeline: Any, sources: "Tensor | None") -> tuple[Any, dict[str, Any]]:
        """The pipeline, and more arguments of its call, for latents (batch, sources, channels, height, width) of the
        pictures to start from."""
        return pipeline, {} if sources is None else {"image": sources.squeeze(1)}

    def sized(self, pipeline: Any, height: int, width: int) -> Any:
        """The pipeline, for pictures of that size where it would take others."""
        return pipeline

    def draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative: str,
        noise: "Tensor",
        size: tuple[int, int],
        steps: int,
        guidance: float,
        source: "Tensor | None" = None,  # (prompts, sources, channels, height, width): of the pictures to start from
    ) -> "Tensor":
        import torch

        from equipoise.pipelines.text_to_image.families import one_step

        pipeline, image = self.starting(pipeline, source)
        latents = noise if self.casts else noise.to(getattr(pipeline, self.denoiser).dtype)
        seen: dict[str, Any] = {}

        def keep(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.update(tensors)
            return {}

        with torch.random.fork_rng([noise.device] if noise.is_cuda else []):
            torch.manual_seed(0)  # of schedulers that add noise as they go
            self.sized(pipeline, *size)(
                prompt=list(prompts),
                latents=one_step.pack(latents, self.patch) if self.packed else latents,
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                output_type="latent",
                callback_on_step_end=keep,  # some pipelines decode a part of what they return
                **{self.strength: guidance},
                **({"negative_prompt": [negative] * len(prompts)} if self.negative else {}),
                **image,
                **self.of_size(*size),
                **self.options,
            )
        return one_step.unpack(seen["latents"], noise.shape, self.patch)

    def original(self, module: str) -> str:
        return module

    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if "kohya" in self.refused:
            raise self._unnamed("kohya's scripts call")
        return super().kohya(part, module, shape)

    def comfyui(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if "comfyui" in self.refused:
            raise self._unnamed("ComfyUI calls")
        return super().comfyui(part, module, shape)

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        name = self.title.lower().replace(" ", "-")
        return name, name

    def _unnamed(self, who: str) -> InputError:
        return InputError(
            f"--format: what {who} the layers of {self.title} is not known here. Give --format diffusers."
        )


def _number(config: Mapping[str, Any], key: str) -> int:
    """A number in a config, or one of a list of them, by its index: `key.1`."""
    name, _, index = key.partition(".")
    return config[name][int(index)] if index else config[name]
