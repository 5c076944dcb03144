"""What kvshare raises. Every message holds what was wrong, the numbers, and the remedy; the command line prints it without a traceback."""

from __future__ import annotations


class KVShareError(Exception):
    """Base of everything that a user can cause and mend."""


class ConfigError(KVShareError, ValueError):
    """A model's config is unknown, incomplete or contradicts itself; `field` is the name of the field at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class CheckpointError(KVShareError, ValueError):
    """A file of weights is missing, truncated, lying about its contents, or in a format that does not load."""


class CapacityError(KVShareError, MemoryError):
    """A request or a model cannot fit the memory that it was given, now or ever."""


class RequestError(KVShareError, ValueError):
    """A request asks for something that does not exist, is out of bounds, or cannot be combined."""
