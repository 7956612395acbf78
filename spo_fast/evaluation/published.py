"""Scores that papers report for the public models."""

from __future__ import annotations

# model -> row -> metric -> the mean its authors report: SPO's tables (arXiv 2406.04314), Pick-a-Pic's 500 prompts;
# geneval in percent on its own prompts
COLUMNS = ("pickscore", "hpsv2", "image_reward", "aesthetic")
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "sdxl": {
        "SDXL": dict(zip(COLUMNS, (21.95, 26.95, 0.538, 5.950), strict=True)) | {"geneval": 53.43},
        "Diffusion-DPO": dict(zip(COLUMNS, (22.64, 29.31, 0.944, 6.015), strict=True)) | {"geneval": 59.58},
        "MaPO": dict(zip(COLUMNS, (22.11, 28.22, 0.717, 6.096), strict=True)),
        "SPO": dict(zip(COLUMNS, (23.06, 31.80, 1.080, 6.364), strict=True)) | {"geneval": 55.20},
    },
    "sd15": {
        "SD-1.5": dict(zip(COLUMNS, (20.53, 23.79, -0.163, 5.365), strict=True)),
        "DDPO": dict(zip(COLUMNS, (21.06, 24.91, 0.082, 5.591), strict=True)),
        "Diffusion-DPO": dict(zip(COLUMNS, (20.98, 25.05, 0.112, 5.505), strict=True)),
        "SPO": dict(zip(COLUMNS, (21.43, 26.45, 0.171, 5.887), strict=True)),
    },
}


def published_cells(model: str, metrics: list[str]) -> list[tuple[str, list[str]]]:
    """(row, a cell a metric) of a model's published rows that have one of the metrics."""
    rows = {name: known for name, known in PUBLISHED.get(model, {}).items() if set(known) & set(metrics)}
    return [(name, [f"{known[m]:.4g}" if m in known else "" for m in metrics]) for name, known in rows.items()]
