"""The audit of one training batch: everything that was claimed of it, computed again the slow and obvious way.

Each call goes alone through the plain `transformers` model in float32. The loss is written out from the paper's section
3.3, tree by tree and call by call, and shares no code with `rl/` (an import rule checks it): with the norm of its
gradient, since on policy the loss itself is near 0 whatever the weights of its tokens are, and with its slope along the
logprobs, since a norm does not tell up from down.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from apr_ray.core.errors import AprError
from apr_ray.core.ledger import Call, ThreadTree
from apr_ray.evaluation.audit_ledger import (
    Finding,
    call_advantages,
    carries_loss,
    check_ledger,
    check_prices,
    check_verdicts,
    check_versions,
    chosen,
    counted,
    is_skipped,
    used_groups,
)
from apr_ray.evaluation.kept_batch import KeptBatch
from apr_ray.model.llama import load_policy

FARTHEST = 20.0
"""Nats by which two policies' logprobs of a token differ at most in the loss."""
NOISE = 1e-8
"""Where nothing is left to learn, loss and gradient are rounding alone."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All checks of one batch."""

    findings: tuple[Finding, ...]

    @property
    def agrees(self) -> bool:
        return all(finding.agrees for finding in self.findings)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table."""
        return [(f.check, f.found, f.claimed, "agrees" if f.agrees else "DIFFERS") for f in self.findings]


@dataclass(slots=True)
class _Sums:
    """Sums of a pass over the calls. `deltas`: |Δ logprob| of every token drawn under the batch's weights;
    `trained_deltas`: of every token that carries loss, `trained` tokens in all, `cut` of them with a cut weight.
    `sizes`: of loss and slope, what their terms come to without their signs."""

    loss: float = 0.0
    kl: float = 0.0
    slope: float = 0.0
    sizes: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "slope": 0.0})
    deltas: list[float] = field(default_factory=list)
    trained_deltas: list[float] = field(default_factory=list)
    trained: int = 0
    cut: int = 0
    recomputed: int = 0


def audit_batch(kept: KeptBatch, tolerance: float = 1e-3) -> AuditReport:
    """Check a kept batch.

    Args:
        tolerance: largest |Δ logprob| of a token in nats, and largest relative difference of the loss and its slope
            (of what their terms come to without their signs) and of the gradient's norm. The KL term may differ by what
            logprobs so far off make of it. The default fits float32 engines.

    Raises:
        AprError: the reference policy of the KL term is no longer there.
    """
    step = kept.step
    policy: Any = load_policy(kept.policy)
    findings = [*check_ledger(kept, policy.config.vocab_size), *check_prices(kept), *check_versions(kept)]
    if not findings[0].agrees:  # nothing can be computed from such calls
        return AuditReport(tuple(findings))
    findings += check_verdicts(kept)
    reference = _load_reference(step.reference) if step.kl_coefficient else None
    sums = recompute(kept, policy, reference)
    calls = sum(len(tree.calls) for tree in kept.trees)
    largest = max(sums.deltas, default=0.0)
    mean = statistics.fmean(sums.deltas) if sums.deltas else 0.0
    findings += [
        Finding("calls drawn under these weights", f"{sums.recomputed} of {calls}", "", True),
        Finding("max |Δ logprob|, engine", f"{largest:.2e}", f"at most {tolerance:.0e}", largest <= tolerance),
        Finding("mean |Δ logprob|, engine", f"{mean:.2e}", f"at most {tolerance:.0e}", mean <= tolerance),
    ]
    if step.reported is None:
        return AuditReport((*findings, Finding("step", "nothing to learn from", "no step was taken", sums.loss == 0.0)))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None))
    told = step.reported
    ours = sums.trained_deltas or [0.0]

    def near(name: str, found: float, claimed: float, limit: float) -> Finding:
        return Finding(name, f"{found:.6g}", f"{claimed:.6g}", abs(found - claimed) <= limit + NOISE)

    findings += [
        Finding("trained tokens", str(sums.trained), str(told.tokens), sums.trained == told.tokens),
        Finding("importance weights cut", str(sums.cut), str(told.cut), sums.cut == told.cut),
        near("loss", sums.loss, told.loss, tolerance * sums.sizes["loss"]),
        near("KL term", sums.kl, told.kl, tolerance * (math.sqrt(2 * max(0.0, sums.kl)) + tolerance)),
        *([] if told.slope is None else [near("slope", sums.slope, told.slope, tolerance * sums.sizes["slope"])]),
        near("gradient norm", norm, told.grad_norm, tolerance * max(norm, told.grad_norm)),
        near("mean |Δ logprob|, learner", statistics.fmean(ours), told.delta_mean, tolerance),
        near("max |Δ logprob|, learner", max(ours), told.delta_max, tolerance),
    ]
    return AuditReport(tuple(findings))


def _load_reference(checkpoint: str) -> Any:
    if not (Path(checkpoint) / "config.json").is_file():
        raise AprError(
            f"the reference policy {checkpoint!r} is not there", "Put it back: the KL term cannot be checked without it"
        )
    return load_policy(checkpoint)


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A call in the loss: at each of `positions` the loss is divided by `divisor`, its reward's part times a weight."""

    call: Call
    advantage: float = 0.0
    positions: Sequence[int] = ()
    divisor: float = 1.0
    importance: Sequence[float] = ()


def recompute(kept: KeptBatch, policy: Any, reference: Any) -> _Sums:
    """The loss from first principles; its gradient is left in the policy's parameters.

    Paper section 3.3: the advantage is the z-score of a tree's reward in its group; a call's loss is the mean over its
    tokens of -min(ratio A, clipped ratio A) + beta k3, a tree's the mean over its calls, the batch's the mean over its
    trees. `step.loss_mean`, `step.ratio` and `step.correction` say where that was departed from.
    """
    sums = _Sums()
    groups = used_groups(kept)
    used = {id(tree) for trees in groups for tree in trees}
    trees = parts_of_trees(kept, groups)
    if kept.step.correction != "none":
        trees = with_importance(kept, policy, trees, sums)
    unused = [_Part(call) for tree in kept.trees if id(tree) not in used for call in tree.calls]
    for part in itertools.chain(*trees, unused):
        _one_call(kept, policy, reference, part, sums)
    return sums


def parts_of_trees(kept: KeptBatch, groups: Sequence[Sequence[ThreadTree]]) -> list[list[_Part]]:
    """Every call of the groups, by tree."""
    out = []
    counted_trees = [tree for trees in groups for tree in trees if counted(kept, tree)]
    count = len(counted_trees)
    tokens_in_all = sum(len(carries_loss(call)) for tree in counted_trees for call in tree.calls)
    for trees in groups:
        for tree, shares in zip(trees, call_advantages(kept, trees), strict=True):
            places = [carries_loss(call) for call in tree.calls]
            calls, tokens = sum(map(bool, places)), sum(map(len, places))
            parts = []
            for call, positions, advantage in zip(tree.calls, places, shares, strict=True):
                mean_over = {
                    "call": len(positions) * calls * count,
                    "tree": tokens * count,
                    "token": tokens_in_all,
                }
                used = [] if is_skipped(kept, tree, advantage) else positions
                ones = [1.0] * len(used)
                parts.append(_Part(call, advantage, used, mean_over[kept.step.loss_mean], ones))
            out.append(parts)
    return out


def with_importance(kept: KeptBatch, policy: Any, trees: list[list[_Part]], sums: _Sums) -> list[list[_Part]]:
    """With importance weights, the learner's probability over the engine's; or as they are, where the two differ less
    than `step.correction_from` says."""
    step, limit = kept.step, math.log(kept.step.correction_cap)
    deltas = [[_deltas(policy, part, step.temperature) for part in parts] for parts in trees]
    sizes = [abs(d) for tree in deltas for call in tree for d in call]
    if not sizes or statistics.fmean(sizes) <= step.correction_from:
        return trees

    def weight(exponent: float) -> float:
        if exponent <= limit and (step.correction == "truncate" or exponent >= -limit):
            return math.exp(exponent)
        sums.cut += 1
        return step.correction_cap if step.correction == "truncate" else 0.0

    return [
        [
            replace(part, importance=[weight(e) for e in exponents])
            for part, exponents in zip(parts, _exponents(of_tree, step.correction_level), strict=True)
        ]
        for parts, of_tree in zip(trees, deltas, strict=True)
    ]


@torch.no_grad()
def _deltas(policy: Any, part: _Part, temperature: float) -> list[float]:
    """The learner's logprob less the engine's, of each token that carries loss."""
    if not part.positions:
        return []
    logprobs = _logprobs(policy, part.call, temperature).tolist()
    drawn = chosen(part.call)
    return [logprobs[i] - drawn[i][1] for i in part.positions]


def _exponents(deltas: Sequence[Sequence[float]], level: str) -> list[list[float]]:
    """Logs of a tree's importance weights: of a token alone, or of all that carry loss in its call or in the tree."""
    if level == "token":
        return [list(call) for call in deltas]
    if level == "call":
        return [[math.fsum(call)] * len(call) for call in deltas]
    whole = math.fsum(itertools.chain(*deltas))
    return [[whole] * len(call) for call in deltas]


def _one_call(kept: KeptBatch, policy: Any, reference: Any, part: _Part, sums: _Sums) -> None:
    """Add one call."""
    call, positions, step = part.call, part.positions, kept.step
    if not call.sampled_ids:
        return
    with torch.set_grad_enabled(bool(positions)):
        logprobs = _logprobs(policy, call, step.temperature)
    drawn = chosen(call)
    values = logprobs.tolist()
    off = {i: abs(values[i] - logprob) for i, (_, logprob) in drawn.items()}
    if {version for span in call.versions for version in (span.version, span.kv or span.version)} <= {kept.version}:
        sums.recomputed += 1
        sums.deltas += off.values()
    if not positions:
        return
    sums.trained += len(positions)
    sums.trained_deltas += [off[i] for i in positions]
    with torch.no_grad():
        towards = _logprobs(reference, call, step.temperature) if reference is not None else None
    call_loss: Any = 0.0
    call_kl = size = 0.0
    for i, importance in zip(positions, part.importance, strict=True):
        old = drawn[i][1] if step.ratio == "behaviour" else values[i]
        ratio = (logprobs[i] - old).clamp(-FARTHEST, FARTHEST).exp()
        clipped = ratio.clamp(1 - step.clip, 1 + step.clip)
        gain = importance * torch.minimum(ratio * part.advantage, clipped * part.advantage)
        call_loss = call_loss - gain
        size += abs(float(gain.detach()))
        if towards is not None:
            difference = (towards[i] - logprobs[i]).clamp(-FARTHEST, FARTHEST)
            k3 = difference.exp() - difference - 1
            call_loss = call_loss + step.kl_coefficient * k3
            call_kl += float(k3.detach())
            size += step.kl_coefficient * float(k3.detach())
    call_loss = call_loss / part.divisor
    logprobs.retain_grad()
    call_loss.backward()
    assert logprobs.grad is not None
    slopes = (logprobs.grad * logprobs).tolist()
    sums.slope += math.fsum(slopes)
    sums.sizes["slope"] += math.fsum(map(abs, slopes))
    sums.loss += float(call_loss.detach())
    sums.kl += call_kl / part.divisor
    sums.sizes["loss"] += size / part.divisor


def _logprobs(policy: Any, call: Call, temperature: float) -> torch.Tensor:
    """float32 [sampled]: of what was chosen at each position given the ids before it, the call alone in its batch."""
    ids = torch.tensor([[*call.prompt_ids, *call.sampled_ids]])
    targets = ids[0, len(call.prompt_ids) :].clone()
    for i, (token_id, _) in chosen(call).items():
        targets[i] = token_id
    logits = policy(input_ids=ids, use_cache=False).logits[0, len(call.prompt_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
