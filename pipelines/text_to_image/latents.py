"""What training reads in place of the pictures: the autoencoder's means and deviations, made once, when they are first
needed, and kept.

Each picture's are kept in a file of their own, named by all that they depend on: the picture's content, how it is cut,
the version of the reader, and the autoencoder. So a picture that is added costs its own encoding, one that is renamed
costs none, and what was made before a stop or a damaged picture is there the next time.
"""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from equipoise.pipelines.media.pictures import decode, size_of
from equipoise.pipelines.media.reading import VERSION, MediaError, content, forget
from equipoise.pipelines.progress import progress
from equipoise.pipelines.text_to_image.base import Base
from equipoise.pipelines.text_to_image.buckets import Size, nearest, sizes
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.cuts import to_tensor, variants, variants_of_each
from equipoise.pipelines.text_to_image.data import Example, open_picture
from equipoise.pipelines.text_to_image.families.autoencoders import encode, shape
from equipoise.pipelines.training.loop import StoppedError
from equipoise.pipelines.training.state import mix

KEPT = 16 << 30  # bytes of latents on disk, from which on those that were not used for longest are deleted

Made = tuple[Tensor, Tensor]  # of a picture: moments (variants, 2, channels, height, width) and crops (variants, 6)


class Latents:
    """What training reads in place of pictures, of every variant (cut, mirror image) of each: made when it is first
    asked for, unless an earlier run has, and kept in memory from then on.

    Raises:
        InputError: A file is no picture, as its beginning shows; what is wrong further on is found when it is made.
    """

    def __init__(
        self, base: Base, examples: Sequence[Example], keys: Sequence[str], data: TextToImageData, cache: Path
    ):
        self._base, self._data, self._folder = base, data, cache / "latents"
        self._paths, self._keys = [example.path for example in examples], keys
        self._among = sizes(data, base.stride)
        self._made: dict[str, Made] = {}
        self._warned = False  # that they cannot be kept on disk
        # to square pictures, all are alike; whether these are pictures is to be known in any case
        cuts = [nearest(size_of(path, upright=data.buckets), self._among) for path in self._paths]
        self.shapes = [shape(base.vae, height, width) for width, height in cuts]  # of each picture's latents
        self.variants = variants_of_each(data)

    def of(self, picture: int) -> Made:
        """
        Raises:
            MediaError: The picture cannot be read, or is another one by now.
        """
        key, path = self._keys[picture], self._paths[picture]
        if key not in self._made:
            file = _file(self._folder, key)
            if (made := _kept(file)) is None:
                self._check(picture)
                made = _encode(self._base, path, self._data, self._among, key)
                self._check(picture)  # it may have been written meanwhile
                self._keep(file, made)
            self._made[key] = made
            forget(path)  # the picture itself
        return self._made[key]

    def _keep(self, file: Path, made: Made) -> None:
        """For other runs, as far as that goes: this one has it in memory."""
        try:
            _keep(file, made)
        except OSError as error:
            if not self._warned:
                print(
                    f"{file.parent}: latents cannot be written ({error.strerror or error}): the run goes on with those "
                    "in memory, and a later one makes them again.",
                    file=sys.stderr,
                )
            self._warned = True

    def move(self, paths: Sequence[Path]) -> None:
        """Reads what is not made yet from other files of the same content."""
        self._paths = list(paths)

    def _check(self, picture: int) -> None:
        """
        Raises:
            MediaError: A file is not the one that its key was made of, under which others would find its latents.
        """
        path = self._paths[picture]
        if cache_key(path, self._data, self._base.identity) != self._keys[picture]:
            raise MediaError(path, "changed since the run began. Put it back.")

    def fault(self, picture: int) -> str:
        """Why a picture whose latents are not made yet cannot be read; empty where it can."""
        if self._keys[picture] not in self._made and not _file(self._folder, self._keys[picture]).exists():
            try:
                decode(self._paths[picture])
            except MediaError as error:
                return str(error)
        return ""

    def take(self, chosen: Sequence[int], variant: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Means, deviations (n, channels, height, width) and crops (n, 6) of pictures of one shape."""
        made = list(zip(map(self.of, chosen), variant, strict=True))
        found = torch.stack([moments[which] for (moments, _), which in made])
        return found[:, 0], found[:, 1], torch.stack([crops[which] for (_, crops), which in made])

    def make_all(self, stopped: Callable[[], bool]) -> None:
        """Of every picture, with a bar.

        Raises:
            StoppedError: `stopped`, which is asked before each picture, said so; what was made is kept on disk.
            MediaError: A picture cannot be read.
        """
        for picture in progress("latents", "picture", list(range(len(self._keys))), leave=False):
            if self._keys[picture] not in self._made and stopped():
                of_all = f"{len(self._made)} of {len(set(self._keys))}"
                raise StoppedError(f"stopped on request after {of_all} pictures were encoded")
            self.of(picture)


def taken(sources: Sequence[Latents], chosen: Sequence[int], variant: Sequence[int]) -> Tensor | None:
    """The means (batch, sources, channels, height, width) of the pictures that some start from; None without any."""
    return torch.stack([one.take(chosen, variant)[0] for one in sources], 1) if sources else None


def latents_of(base: Base, examples: Sequence[Example], data: TextToImageData, cache: Path) -> Latents:
    """Of pictures as they will be needed; those that this process has had already, if it has.

    Args:
        cache: The folder of what runs keep for each other.

    Raises:
        InputError: A file is no picture.
    """
    keys = [cache_key(example.path, data, base.identity) for example in examples]
    whole = hashlib.sha256("".join(keys).encode()).hexdigest()
    if whole in base.latents:
        base.latents[whole] = base.latents.pop(whole)  # the last used
        base.latents[whole].move([example.path for example in examples])
    else:
        for old in list(base.latents)[:-2]:  # the last ones stay: a run may have held-out and class pictures beside
            del base.latents[old]
        base.latents[whole] = Latents(base, examples, keys, data, cache)
        _clean(cache, {_file(cache / "latents", key) for key in keys})
    return base.latents[whole]


def prepare_latents(
    base: Base,
    examples: Sequence[Example],
    data: TextToImageData,
    cache: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> Latents:
    """`latents_of`, all of them made now.

    Raises:
        StoppedError: `stopped`, which is asked before each picture, said so; what was made is kept on disk.
        InputError: A picture cannot be read.
    """
    found = latents_of(base, examples, data, cache)
    found.make_all(stopped)
    return found


def cache_key(path: Path, data: TextToImageData, base: str) -> str:
    """Names the latents of a file's content, cut this way, under this autoencoder."""
    facts = [VERSION, base, data.resolution, data.crop, data.flip, content(path)]
    if data.buckets:
        facts.append((data.bucket_step, data.bucket_limit))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


@torch.no_grad()
def _encode(base: Base, path: Path, data: TextToImageData, among: Sequence[Size], key: str) -> Made:
    whole = open_picture(path)
    where = torch.Generator().manual_seed(mix("cuts", key))
    cut = variants(whole, data, where, nearest(whole.size, among))
    pictures = [to_tensor(picture) for picture, _ in cut]
    crops = torch.tensor([[whole.height, whole.width, *corner, *pictures[0].shape[1:]] for _, corner in cut])
    encoded = [encode(base.vae, picture[None].to(base.vae.device)) for picture in pictures]
    return torch.stack([torch.cat(both).cpu() for both in encoded]), crops.float()


def _kept(file: Path) -> Made | None:
    """What an earlier run has made; a file that was damaged since is no more."""
    try:
        found = load_file(file)
        made = found["moments"], found["crops"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError):
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # of a folder that can only be read
        os.utime(file)  # when it was last used
    return made


def _keep(file: Path, made: Made) -> None:
    """Not flushed to disk, which would take longer than the encoding: what a crash damages is made anew."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(save({"moments": made[0].contiguous(), "crops": made[1]}))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _clean(cache: Path, used: set[Path]) -> None:
    """Deletes the latents that were not used for longest, until the rest takes KEPT bytes at most; never this run's."""
    files = [*(cache / "latents").rglob("*.safetensors"), *cache.glob("moments-*.safetensors")]  # 0.1.0 had the latter
    known = []
    for file in files:
        with suppress(OSError):  # another run may be cleaning up too
            about = file.stat()
            known.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in known)
    for _, size, file in sorted(known):
        if total <= KEPT:
            return
        if file not in used:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            total -= size
