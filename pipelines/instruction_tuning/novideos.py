"""What stands in for the part of a processor that takes videos, where that cannot be loaded."""


class NoVideos:
    """Whatever a processor or a template asks of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
