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
        description="how much of the noise is the same all over a channel; lets pictures be darker, brighter",
    )
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="diffusion: what the denoiser is taught to answer; empty: what it was taught before"
    )
    zero_terminal_snr: bool = Field(
        False, description="diffusion: the last step is nothing but noise, and samples start there; not with epsilon"
    )
    snr_gamma: Rate | None = Field(
        None, description="diffusion: min-SNR weights of the loss, 5 in the paper; empty: all times count the same"
    )
    times: Literal["uniform", "logit_normal", "mode"] | None = Field(
        None, description="flow matching: how times are drawn; empty: as is usual for the family"
    )
    mean: float = Field(0.0, ge=-10, le=10, description="of logit_normal; below 0, more noise")
    std: Rate = Field(1.0, description="of logit_normal")
    mode_scale: float = Field(
        1.29, ge=-1, le=1.75, description="of mode; above 0, times in the middle, below, the ends"
    )
    shift: Rate | None = Field(
        None, description="flow matching: above 1, more noise in training; empty: as the base's scheduler has it"
    )
    guidance: float = Field(3.5, ge=0, description="what a guidance-distilled base (FLUX.1-dev) is told in training")

    @property
    def scheduler(self) -> dict[str, Any]:
        """What diffusers' scheduler is told of it, for training and for whoever samples with the result."""
        told: dict[str, Any] = {"prediction_type": self.prediction} if self.prediction else {}
        if self.zero_terminal_snr:
            # Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891, 2023, §3.1–3.3
            told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return told
