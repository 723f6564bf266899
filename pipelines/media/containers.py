"""Files that hold sound, video or both, as PyAV opens them: their packets, and whether any are missing at the end."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.pipelines.media.reading import MediaError

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

SLACK = 1.0  # seconds by which a file may be shorter than it says, or a tenth of them where that is more
_TIMED = ("mov", "matroska", "avi")  # formats whose header says how long the file is; of others FFmpeg guesses


def opened(path: Path) -> "InputContainer":
    import av

    return av.open(str(path), metadata_errors="replace")  # words in it that are no UTF-8 are no reason not to


def packets(container: "InputContainer", path: Path) -> Iterator["Packet"]:
    """All packets of all streams, and each stream's empty last one, which makes its decoder give what it still holds.

    Raises:
        MediaError: the file ends long before its header says.
    """
    import av

    end = Fraction(0)
    for packet in container.demux():
        if (at := stamp(packet)) is not None and packet.time_base:
            end = max(end, (at + (packet.duration or 0)) * packet.time_base)
        yield packet
    if container.format.name.startswith(_TIMED) and container.duration:
        stated = container.duration / av.time_base
        if end < stated - max(SLACK, 0.1 * stated):
            raise MediaError(path, f"is cut off: it states {stated:.1f} s and ends after {float(end):.1f} s.")


def stamp(packet: "Packet") -> int | None:
    """When it is shown, in its time base; when it is decoded where only that is known."""
    return packet.dts if packet.pts is None else packet.pts
