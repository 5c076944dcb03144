"""What `kvshare tune` chooses from where nobody names precisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvshare.errors import ConfigError

if TYPE_CHECKING:
    from kvshare.layout import CacheLayout

WITH_NEWEST = ("rot8+32", "rot4+128", "rot4+32", "rot3+128")
_WITHOUT = ("rot9", "rot8", "rot4", "rot3")


def candidates_for(layout: CacheLayout) -> tuple[str, ...]:
    """Precisions with newest rows in 16 bits; without, where an owner of `layout` cannot keep them."""
    try:
        layout.stored_in(WITH_NEWEST[0])
    except ConfigError:
        return _WITHOUT
    return WITH_NEWEST
