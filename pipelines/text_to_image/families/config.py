"""The configuration's section `noise`, which says how all families add it."""

# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any, Literal

from pydantic import Field

from equipoise.pipelines.config.records import Section
from equipoise.pipelines.config.sections import Rate


class NoiseSection(Section):
    offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How much of the noise is the same all over a channel; pictures can then be darker or brighter.",
    )
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="For diffusion: what the denoiser is trained to predict; empty: what it predicted before."
    )
    zero_terminal_snr: bool = Field(
        False, description="For diffusion: the last step is pure noise, and samples start there; not with epsilon."
    )
    snr_gamma: Rate | None = Field(
        None,
        description="For diffusion: the γ of min-SNR loss weights, 5 in the paper; empty: all times weigh the same.",
    )
    times: Literal["uniform", "logit_normal", "mode"] | None = Field(
        None, description="For flow matching: the distribution of the times; empty: as is usual for the family."
    )
    mean: float = Field(
        0.0, ge=-10, le=10, description="The mean of the logit-normal distribution; below 0 there is more noise."
    )
    std: Rate = Field(1.0, description="The standard deviation of the logit-normal distribution.")
    mode_scale: float = Field(
        1.29,
        ge=-1,
        le=1.75,
        description="The scale of the mode distribution; above 0, more times in the middle; below 0, at the ends.",
    )
    shift: Rate | None = Field(
        None,
        description="For flow matching: above 1, there is more noise; empty: as the base's scheduler has it.",
    )
    guidance: float = Field(
        3.5, ge=0, description="The guidance that a guidance-distilled base (FLUX.1-dev) is given in training."
    )

    @property
    def scheduler(self) -> dict[str, Any]:
        """The settings of diffusers' scheduler that follow, for training and for whoever samples with the result."""
        settings: dict[str, Any] = {"prediction_type": self.prediction} if self.prediction else {}
        if self.zero_terminal_snr:
            # Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891, 2023, §3.1–3.3
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings
