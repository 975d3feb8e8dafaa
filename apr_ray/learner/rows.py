"""Some sequences of a batch as the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from apr_ray.core.batch import TrainBatch
from apr_ray.rl.losses import log_ratio
from apr_ray.rl.mismatch import ImportanceWeights


class Rows:
    """Some sequences of a batch, right-padded, and what is known of them: every tensor is [b, t], `trees` [b].

    No attention mask is needed: attention is causal, and no token comes after its sequence's padding. A rank with
    nothing left holds one row of padding: it still takes part in every reduction.

    Attributes:
        reference, proximal, importance: None until known, or where the step does without.
    """

    def __init__(self, batch: TrainBatch, indices: Sequence[int], device: torch.device) -> None:
        self.spans = [(int(batch.offsets[i]), int(batch.offsets[i + 1])) for i in indices] or [(0, 0)]
        width = max(2, *(end - start for start, end in self.spans))

        def stack(column: np.ndarray[Any, Any]) -> torch.Tensor:
            out = np.zeros((len(self.spans), width), dtype=column.dtype)
            for row, (start, end) in enumerate(self.spans):
                out[row, : end - start] = column[start:end]
            return torch.from_numpy(out).to(device)

        self.trees = batch.trees[list(indices) or [0]]
        self.tokens = stack(batch.tokens)
        self.targets = stack(batch.targets)
        self.weights = stack(batch.loss_weights)
        self.advantages = stack(batch.advantages)
        self.behaviour_logprobs = stack(batch.behaviour_logprobs)
        self.reference: torch.Tensor | None = None
        self.proximal: torch.Tensor | None = None
        self.importance: ImportanceWeights | None = None

    def delta(self) -> torch.Tensor:
        """Proximal less behaviour logprob where a token carries loss, else 0."""
        assert self.proximal is not None, "no forward pass yet"
        return log_ratio(self.proximal, self.behaviour_logprobs, self.weights != 0)
