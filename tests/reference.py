"""The scheme computed token by token: the slow reference for the vectorised code."""

from __future__ import annotations

from parallelmind.config import RopeConfig
from parallelmind.layout import IGNORE


def reference_sample(
    main: list[int], branches: list[list[int]], offsets: list[int], config: RopeConfig
) -> dict[str, list]:
    """Columns of one sample in physical order, and its visibility as nested lists of bool."""
    longest = max(len(branch) for branch in branches)
    rows = []
    for sequence, text in enumerate([main, *branches]):
        for k, token in enumerate(text):
            if sequence == 0:
                time = k
            elif config.align_to == "left":
                time = len(main) + k
            else:
                time = len(main) + longest - len(text) + k
            index = sequence if main else sequence - 1
            label = IGNORE
            if sequence > 0 and k + 1 < len(text) and k + 1 >= offsets[sequence - 1]:
                label = text[k + 1]
            rows.append(
                {
                    "id": token,
                    "sequence": sequence,
                    "branch": index * config.branch_stride,
                    "time": time,
                    "label": label,
                }
            )
    if not (config.visibility == "isolated" and config.positions == "time"):
        rows = sorted(rows, key=lambda row: (row["time"], row["sequence"]))
    for flat, row in enumerate(rows):
        row["position"] = row["time"] if config.positions == "time" else flat
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["visible"] = [[_sees(i, j, rows, config) for j in range(len(rows))] for i in range(len(rows))]
    return columns


def _sees(i: int, j: int, rows: list[dict[str, int]], config: RopeConfig) -> bool:
    if i == j:
        return True
    if rows[j]["time"] >= rows[i]["time"]:
        return False
    if config.visibility == "columnar":
        return True
    return rows[j]["sequence"] == 0 or rows[j]["sequence"] == rows[i]["sequence"]
