"""Colors that the plots share."""

from __future__ import annotations

from matplotlib import colormaps

VIRIDIS = colormaps["viridis"]  # dark is low, and low is good
GREY = "#8a8a8a"  # trials without a comparable objective
BLUE = "#31688e"
RED = "#d1495b"
