"""A family of models: Stable Diffusion whose samples are drawn with perturbed-attention guidance."""

from equipoise.pipelines.text_to_image.families.stable_diffusion import StableDiffusion


class PerturbedAttention(StableDiffusion):
    """Stable Diffusion, drawn by diffusers' pipeline for perturbed-attention guidance."""

    pipeline = "StableDiffusionPAGPipeline"
    title = "Stable Diffusion with perturbed attention"
