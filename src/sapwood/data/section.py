"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class DataSection(BaseModel):
    """Files and hub sets to learn from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[dict[str, Any], ...] = ()
    max_samples: int | None = None
