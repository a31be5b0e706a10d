"""Parts of Ray Tune without a saved state."""

from __future__ import annotations


class StatelessPickle:
    """Mixin for objects that Ray Tune pickles: nothing is saved, because the journal holds everything."""

    def __getstate__(self) -> dict[str, object]:
        return {}
