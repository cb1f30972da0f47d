"""Which family builds the plans of which architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hayai.config import ModelConfig
from hayai.errors import ModelError
from hayai.models import glm_moe_dsa, llama
from hayai.plan.plan import Plan


@dataclass(frozen=True)
class Family:
    """A model file's builder, and the containers whose tensor names it knows."""

    build: Callable[[ModelConfig], dict[str, Plan]]
    containers: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.build, ("gguf", "hf")),
    "glm_moe_dsa": Family(glm_moe_dsa.build, ("hf",)),
    "glm4_moe_lite": Family(glm_moe_dsa.build, ("hf",)),
}

SUPPORTED: tuple[str, ...] = tuple(sorted(FAMILIES))


def build_plans(config: ModelConfig, container: str = "gguf") -> dict[str, Plan]:
    """The named plans of a model ('main', and 'draft' where it has one).

    ModelError where the architecture, or its tensor names in this container, are not known.
    """
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise ModelError(
            f"architecture {config.architecture!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    if container not in family.containers:
        raise ModelError(
            f"architecture {config.architecture!r} can't be read from a {container} file; "
            f"supported containers: {', '.join(family.containers)}"
        )
    return family.build(config)
