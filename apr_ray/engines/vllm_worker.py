"""Methods that `VLLMEngine` adds to vLLM's worker, wherever vLLM runs it (its `worker_extension_cls`)."""

from __future__ import annotations

from typing import Any

import torch

from apr_ray.core.weights import WeightUpdate


class WorkerExtension:
    """Mixed into vLLM's worker class; `collective_rpc` calls these by name. No name may be one of the worker's own."""

    model_runner: Any

    def apr_ray_report_whole_vocabulary(self) -> None:
        """From now on logprobs are those before top-k and top-p, at the request's temperature.

        vLLM offers them before the temperature ("raw") or after top-k and top-p ("processed"); the policy that a
        learner differentiates is neither.
        """
        sampler = self.model_runner.sampler
        sampler.topk_topp_sampler = _WholeVocabulary(sampler.topk_topp_sampler)

    def apr_ray_load(self, update: WeightUpdate) -> int:
        """Copy every tensor of an update into the model's own parameters; returns how many it had.

        They are arrays, or tensors on this GPU (`weights.transport=cuda_ipc`).

        Not `reload_weights`: on a CPU with tied embeddings that one leaves the output layer as it was.
        """
        tensors = ((name, torch.as_tensor(part)) for name, part in update.state_dict().items())
        with torch.no_grad():
            return len(self.model_runner.get_model().load_weights(tensors))


class _WholeVocabulary(torch.nn.Module):
    """vLLM's last step of sampling, with the logprobs taken before it cuts the distribution."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, logits: torch.Tensor, generators: Any, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sampled ids, logprobs over the whole vocabulary at the temperature); `logits` are at it already."""
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        sampled, _ = self.inner(logits, generators, k, p)
        return sampled, logprobs
