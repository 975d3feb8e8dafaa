"""The check after a sync: an engine that does not run what was published is noticed in the same step."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_ray.config import WeightsConfig
from apr_ray.core.engine import GenerateRequest, SamplingParams
from apr_ray.core.errors import MismatchError
from apr_ray.core.weights import WeightUpdate, WeightVersion
from apr_ray.engines.torch_engine import TorchEngine
from apr_ray.model.llama import load_policy
from apr_ray.model.state import checksum, pack_weights, trainable_parameters
from apr_ray.rollout.pool import CheckSample
from apr_ray.rollout.worker import CHECK_PRIORITY
from apr_ray.weights.check import check_engines

PROMPTS = [tuple(range(5, 12)), (9, 8, 7), (20, 21), (30, 5, 6)]
PAPERS_RATE = 1e-5
FIRST, SECOND = WeightVersion(0, 1), WeightVersion(0, 2)


class Learner:
    """A policy in this process, trained by plain AdamW at the paper's rate."""

    def __init__(self, checkpoint: Path) -> None:
        self.policy: Any = load_policy(checkpoint)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=PAPERS_RATE, betas=(0.9, 0.95))

    def step(self) -> None:
        ids = torch.tensor([list(range(5, 45))])
        loss = self.policy(input_ids=ids, labels=ids).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def update(self, version: WeightVersion) -> WeightUpdate:
        return pack_weights(copy.deepcopy(trainable_parameters(self.policy)), version)

    def logprobs(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[np.ndarray[Any, Any]]:
        out = []
        for ids in sequences:
            with torch.no_grad():
                logits = self.policy(torch.tensor([list(ids)])).logits[0, :-1] / temperature
            drawn = torch.log_softmax(logits, -1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]
            out.append(np.concatenate([[0.0], drawn.numpy()]))
        return out


class Pool:
    """One worker's engine, asked as `RolloutPool.sample_for_check` asks it."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine

    def sample_for_check(self, prompts: Any, tokens: int, temperature: float, timeout_s: float) -> list[CheckSample]:
        async def one(number: int, prompt: tuple[int, ...]) -> CheckSample:
            sampling = SamplingParams(temperature, max_new_tokens=tokens, seed=number)
            asked = GenerateRequest(f"c{number}", prompt, sampling, CHECK_PRIORITY)
            chunks = [chunk async for chunk in self.engine.generate(asked)]
            ids = tuple(i for c in chunks for i in c.token_ids)
            logprobs = tuple(lp for c in chunks for lp in c.logprobs)
            return CheckSample("worker-00", prompt, ids, logprobs, tuple({c.version for c in chunks if c.token_ids}))

        async def all_of_them() -> list[CheckSample]:
            return [await one(number, prompt) for number, prompt in enumerate(prompts)]

        return asyncio.run(all_of_them())


def whole(old: WeightUpdate, new: WeightUpdate) -> WeightUpdate:
    return new


def half(old: WeightUpdate, new: WeightUpdate) -> WeightUpdate:
    """The first half of the parameters is new."""
    flat = np.concatenate([new.flat[: len(new.flat) // 2], old.flat[len(new.flat) // 2 :]])
    return WeightUpdate(new.version, new.specs, flat, checksum(flat))


def last_but_one(old: WeightUpdate, new: WeightUpdate) -> WeightUpdate:
    """The older weights, under the newer name."""
    return WeightUpdate(new.version, new.specs, old.flat, old.checksum)


Taken = Callable[[WeightUpdate, WeightUpdate], WeightUpdate | None]


def after_two_steps(checkpoint: Path, taken: Taken) -> float:
    """Two steps at the paper's rate; the first update is applied, of the second what `taken` makes of it."""
    learner, engine = Learner(checkpoint), TorchEngine.from_checkpoint(checkpoint)
    updates = []
    for version in (FIRST, SECOND):
        learner.step()
        updates.append(learner.update(version))
    asyncio.run(engine.update_weights(updates[0]))
    if (applied := taken(*updates)) is not None:
        asyncio.run(engine.update_weights(applied))
    return check_engines(learner, Pool(engine), PROMPTS, 1.0, WeightsConfig(), SECOND, exact=True)  # type: ignore[arg-type]


def test_an_engine_that_took_the_update_passes_by_far(checkpoint: Path) -> None:
    assert after_two_steps(checkpoint, whole) < 0.2 * WeightsConfig().tolerance(exact=True)


@pytest.mark.parametrize("taken", [half, last_but_one])
def test_an_engine_that_claims_weights_it_does_not_hold_is_noticed(checkpoint: Path, taken: Taken) -> None:
    """One step at a rate of 1e-5 is what tells the two apart."""
    with pytest.raises(MismatchError, match=r"after sync 0\.2 engines and learners differ by .* on worker-00"):
        after_two_steps(checkpoint, taken)


def test_an_engine_that_ignores_the_update_is_noticed_by_what_it_says(checkpoint: Path) -> None:
    with pytest.raises(MismatchError, match=r"after sync 0\.2 worker-00 decodes with weights 0\.1"):
        after_two_steps(checkpoint, lambda old, new: None)


def test_an_engine_that_samples_nothing_is_noticed(checkpoint: Path) -> None:
    class Silent:
        def sample_for_check(self, *asked: Any) -> list[CheckSample]:
            return [CheckSample("worker-00", (5,), (), (), ())]

    with pytest.raises(MismatchError, match="worker-00 decodes with weights none: it sampled no token"):
        check_engines(Learner(checkpoint), Silent(), PROMPTS, 1.0, WeightsConfig(), FIRST, exact=True)  # type: ignore[arg-type]


def test_the_tolerance_follows_the_precision() -> None:
    assert WeightsConfig().tolerance(exact=True) < 1e-4 < WeightsConfig().tolerance(exact=False)
    assert WeightsConfig(mismatch_tolerance=0.3).tolerance(exact=True) == 0.3


def test_the_check_does_not_queue_behind_waiting_children(checkpoint: Path) -> None:
    """Its 24 tokens took 489 steps behind a full engine's queue."""
    engine = TorchEngine.from_checkpoint(checkpoint, max_sequences=2, cache_slots=0, stream_interval=1)

    async def main() -> int:
        async def child(number: int) -> None:
            asked = GenerateRequest(f"t{number}", (5, 6, 7), SamplingParams(1.0, max_new_tokens=20, seed=number), 3)
            async for _ in engine.generate(asked):
                pass

        children = [asyncio.create_task(child(i)) for i in range(40)]
        while len(engine.waiting) < 38:  # noqa: ASYNC110  the engine's own state
            await asyncio.sleep(0)
        before = engine.stats().steps or 0
        sampling = SamplingParams(1.0, max_new_tokens=24, seed=1)
        async for _ in engine.generate(GenerateRequest("check", (9, 8), sampling, CHECK_PRIORITY)):
            pass
        taken = (engine.stats().steps or 0) - before
        for task in children:
            task.cancel()
        await asyncio.gather(*children, return_exceptions=True)
        await engine.close()
        return taken

    assert asyncio.run(main()) <= 20 + 24 + 2, "a row had to be free, and nothing more"
