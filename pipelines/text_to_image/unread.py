"""What is set in a configuration and has no effect on the base that it names."""

from equipoise.pipelines.config.keys import is_set
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.families import Family
from equipoise.pipelines.text_to_image.pairs import each_prompts

READ = {  # by the way of adding noise, which of the section `noise` it reads
    "diffusion": ("offset", "prediction", "zero_terminal_snr", "snr_gamma"),
    "flow": ("offset", "times", "mean", "std", "mode_scale", "shift"),
}


def unread(config: TextToImageConfig, kind: Family) -> list[str]:
    """A sentence for everything that is set and that a base of this family would not read."""
    found = []
    known = (*READ[kind.noise], *(["guidance"] if kind.distilled else []))
    for key in type(config.noise).model_fields:
        if key not in known and is_set(config.noise, key):
            others = ", ".join(f"noise.{name}" for name in known)
            found.append(f"noise.{key}: has no effect on {kind.title}, which reads {others}.")
    times = config.noise.times or kind.times
    for key, only in {"mean": "logit_normal", "std": "logit_normal", "mode_scale": "mode"}.items():
        if key in known and times != only and is_set(config.noise, key):
            found.append(f"noise.{key}: has no effect on times that are drawn {times}. Set noise.times={only}.")
    for part in config.model.apart:
        if part not in kind.apart:
            found.append(f"model.{part}: has no effect on {kind.title}. Leave it out.")
    if config.lora.text_encoder and not kind.tuned_encoders:
        found.append(
            f"lora.text_encoder: diffusers loads no factors for the text encoder of {kind.title}. Set it false."
        )
    if config.token.name and not kind.loads_textual_inversion:
        found.append(f"token.name: diffusers loads no new words for {kind.title}. Leave it out.")
    for key, given in {"data.sources": config.data.sources, "samples.sources": config.samples.sources}.items():
        if given and not kind.edits:
            found.append(f"{key}: {kind.title} does not start from pictures. Leave it out.")
    trained, drawn = len(config.data.sources), [len(several) for several in each_prompts(config.samples)]
    most = max([trained, *drawn])
    if kind.edits and not kind.several and most > 1:
        found.append(f"data.sources, samples.sources: {kind.title} starts from one picture, not from {most}. Give one.")
    if kind.several and trained and drawn and drawn[0] != trained:
        found.append(f"samples.sources: {drawn[0]} for a prompt, where {trained} are trained on. Give as many.")
    if kind.must_edit and not config.data.sources:
        found.append(f"data.sources: {kind.title} edits pictures. Give the folder of those that it is to start from.")
    if config.samples.negative and not kind.negative:
        found.append(f"samples.negative: {kind.title} reads no negative prompts. Leave it out.")
    return found
