"""A frontend on a fake runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_fakes import FakeRunner, Reply, hashed, make_engine
from frontend_fakes import TEMPLATE, TOKENIZER, MakeFrontend
from hayai.config import EngineConfig, ModelConfig
from hayai.frontend import Frontend
from hayai.load import LoadedModel
from hayai.text.chat import ChatTemplate


@pytest.fixture
def make_frontend() -> Iterator[MakeFrontend]:
    """make_frontend(reply, vocabulary=True, template=True or a source, **engine options)."""
    made: list[Frontend] = []

    def make(
        reply: Reply = hashed, *, vocabulary: bool = True, template: bool | str = True, **options: int
    ) -> tuple[Frontend, FakeRunner]:
        source = template if isinstance(template, str) else TEMPLATE
        engine, runner = make_engine(reply=reply, **options)  # type: ignore[arg-type]
        loaded = LoadedModel(
            name="fake",
            path=Path("fake.gguf"),
            engine=engine,
            tokenizer=TOKENIZER if vocabulary else None,
            chat_template=ChatTemplate(source) if template and vocabulary else None,
            model_config=ModelConfig("fake", 500, 8, 1, 1, 1, 8, 8, 256, 1e-5),
            engine_config=EngineConfig(),
            plans={},
            formats={},
            load_seconds=0.0,
        )
        made.append(Frontend(loaded))
        return made[-1], runner

    yield make
    for frontend in made:
        frontend.close()
