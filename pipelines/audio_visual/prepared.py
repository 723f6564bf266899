"""A configuration's clips and features, checked: what both the check before a run and the run itself go by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual.config import AudioVisualConfig, AudioVisualEncoder
from equipoise.pipelines.audio_visual.data import (
    NEEDED,
    Clip,
    Manifest,
    lacking,
    read_manifest,
    settle,
    with_validation,
)
from equipoise.pipelines.audio_visual.features import FeatureStore
from equipoise.pipelines.demo import digits


@dataclass
class Prepared:
    manifest: Manifest
    store: FeatureStore

    @property
    def problems(self) -> list[str]:
        return self.manifest.sentences()

    def splits(self, config: AudioVisualConfig) -> dict[str, list[Clip]]:
        return with_validation(self.manifest, config.data.validation, config.seed)


def prepare(config: AudioVisualConfig) -> Prepared:
    """Reads the manifest and every clip; the features go into the runs folder's cache, so that this is done once.

    With `data.skip_bad`, clips that cannot be used are left out and named by `manifest.bad`; without it they are
    problems.

    Raises:
        InputError: The text encoder's tokenizer cannot be used.
    """
    runs = Path(config.runs)
    path = digits.manifest(runs) if config.data.manifest == demo.NAME else Path(config.data.manifest)
    store = feature_store(config, runs / ".cache" / "features")
    manifest = read_manifest(config.data, path)
    extract_all(manifest, store)
    settle(manifest, config.data.skip_bad)
    prepared = Prepared(manifest, store)
    if config.data.missing == "mask" and store.given:
        manifest.problems += lacking(manifest, prepared.splits(config), store.given, config.data.modalities)
    return prepared


def feature_store(config: AudioVisualConfig, cache: Path | None) -> FeatureStore:
    """Of a configuration's features, with the text encoder's tokenizer, if there is one.

    Raises:
        InputError: The tokenizer cannot be used.
    """
    section = config.model.text
    tokenizer, identity = None, ""
    if "text" in config.data.modalities and section.path:
        tokenizer = _tokenizer(section)
        identity = f"{section.path}@{section.revision}"
    return FeatureStore(config.data, cache, tokenizer, identity)


def extract_all(manifest: Manifest, store: FeatureStore) -> None:
    """Makes every clip's features, and leaves out the clips that cannot be used; none where a column is missing."""
    if all(set(NEEDED[modality]) & manifest.columns for modality in store.data.modalities):
        manifest.leave_out(store.prepare(manifest.clips, manifest.spoilt))


def _tokenizer(section: AudioVisualEncoder) -> Any:
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(section.path, revision=section.revision, trust_remote_code=False)
    except Exception as error:  # of the tokenizers library, which raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.text.path: {section.path} has no tokenizer that can be loaded: {reason}") from error
    if made.pad_token_id is None:
        raise InputError(f"model.text.path: the tokenizer of {section.path} has no token to pad with.")
    return made
