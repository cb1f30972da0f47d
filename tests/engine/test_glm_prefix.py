"""The prefix cache on latent attention with a sparse index: several cache groups of one real plan."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from engine_fakes import drain, request, tokens_of
from hayai.engine.engine import Engine
from hayai.models.registry import build_plans
from tiny_models import GLM, LIMITS, compile_reference, glm_tensors


def test_a_cached_prefix_gives_what_a_cold_one_gives() -> None:
    plans = build_plans(GLM, "hf")
    groups = {name: group for plan in plans.values() for name, group in plan.groups.items()}
    prompt = np.random.default_rng(3).integers(0, GLM.vocab_size, 70).tolist()
    answers = []
    for prefix_cache in (False, True):
        runner = compile_reference(plans, glm_tensors(GLM))
        with closing(Engine(runner, LIMITS, groups, seed=1, prefix_cache=prefix_cache)) as engine:
            for name in ("first", "second"):
                engine.add(request(name, prompt, max_tokens=12))
                answers.append(tokens_of(drain(engine), name))
            assert engine.stats().prefix_cached_tokens == (64 if prefix_cache else 0)
    assert answers[0] == answers[1] == answers[2] == answers[3]
