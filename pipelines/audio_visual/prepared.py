"""A configuration's clips and features, checked: what both the check before a run and the run itself go by."""

from dataclasses import dataclass
from pathlib import Path

from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.data import Clip, Manifest, read_manifest, settle, with_validation
from equipoise.pipelines.audio_visual.features import Store
from equipoise.pipelines.demo import digits


@dataclass
class Prepared:
    manifest: Manifest
    store: Store

    @property
    def problems(self) -> list[str]:
        return self.manifest.sentences()

    def splits(self, config: AudioVisualConfig) -> dict[str, list[Clip]]:
        return with_validation(self.manifest, config.data.validation, config.seed)


def prepare(config: AudioVisualConfig, keep: bool) -> Prepared:
    """Reads the manifest and every clip; `keep` writes the features to disk.

    With `data.skip_bad`, clips that cannot be used are left out and named by `manifest.bad`; without it they are
    problems.
    """
    runs = Path(config.runs)
    path = digits.manifest(runs) if config.data.manifest == demo.NAME else Path(config.data.manifest)
    section = config.model.text
    tokenizer = identity = None
    if "text" in config.data.modalities and section.path:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(section.path, revision=section.revision)
        identity = f"{section.path}@{section.revision}"
    store = Store(config.data, runs / ".cache" / "features", tokenizer, identity or "", write=keep)
    manifest = read_manifest(config.data, path)
    if not manifest.problems:
        manifest.leave_out(store.prepare(manifest.clips))
        settle(manifest)
    return Prepared(manifest, store)
