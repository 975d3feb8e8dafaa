"""The audit's first half: the ledger of a batch, token by token, and the reward of each tree. No code of `rl/`."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from apr_ray.core.engine import FinishReason
from apr_ray.core.ledger import Call, ThreadTree
from apr_ray.core.weights import WeightVersion
from apr_ray.evaluation.kept_batch import KeptBatch
from apr_ray.model.llama import read_task
from apr_ray.reward.score import score
from apr_ray.tasks.registry import load_task

SAME = 1e-12
"""Means of the same rewards differ by rounding."""
NOT_THE_POLICYS = ("engine_error", "bound_time", "cancelled")
CUT = {FinishReason.ABORTED: "aborted", FinishReason.ERROR: "error"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what the audit found, what was claimed or allowed, and whether they agree."""

    check: str
    found: str
    claimed: str
    agrees: bool


def carries_loss(call: Call) -> list[int]:
    """Positions among the sampled ids that are trained: all where the policy chose, and none of a call that was cut."""
    return [] if call.finish in CUT else list(chosen(call))


def chosen(call: Call) -> dict[int, tuple[int, float]]:
    """The policy's choice at each position, with its logprob: where a token was replaced, the one that was sampled."""
    pairs = enumerate(zip(call.sampled_ids, call.logprobs, strict=False))  # unequal lengths are a fault of their own
    kept = {i: pair for i, pair in pairs if i not in call.forced}
    taken_back = {r.position: (r.token_id, r.logprob) for r in call.replaced}
    return dict(sorted((kept | taken_back).items()))


def check_ledger(kept: KeptBatch, vocabulary: int) -> list[Finding]:
    """Token by token: what was sampled, what became of it, and that contexts are what joins made them."""
    counts: Counter[str] = Counter()
    sampled = faults = 0
    contexts = good = 0
    skipped = {
        id(call)
        for trees in used_groups(kept)
        for tree, shares in zip(trees, call_advantages(kept, trees), strict=True)
        for call, advantage in zip(tree.calls, shares, strict=True)
        if is_skipped(kept, tree, advantage)
    }
    fresh = {id(tree) for trees in fresh_groups(kept) for tree in trees}
    for tree in kept.trees:
        by_place = {(call.path, call.segment): call for call in tree.calls}
        for call in tree.calls:
            drawn = len(chosen(call))
            sampled += drawn
            if id(tree) not in fresh:
                counts["stale"] += drawn
            else:
                fate = "zero_advantage" if id(call) in skipped else "trained"
                if tree.outcome.value in NOT_THE_POLICYS:
                    fate = "error"
                counts[CUT.get(call.finish, fate)] += drawn
            faults += not _is_whole(call, vocabulary)
        for join in tree.joins:
            before, after = (by_place.get((join.path, join.segment + i)) for i in (0, 1))
            if before is not None and after is not None:
                contexts += 1
                expected = (*before.prompt_ids, *before.sampled_ids[: join.kept_tokens], *join.joined_ids)
                good += after.prompt_ids == expected
    claimed = Counter({name: n for name, n in kept.step.dispositions.items() if n})
    found = Counter({name: n for name, n in counts.items() if n})

    def text(counter: Counter[str]) -> str:
        return ", ".join(f"{name} {n}" for name, n in sorted(counter.items()))

    return [
        Finding("calls with faults in the ledger", str(faults), "0", faults == 0),
        Finding("contexts after joins", f"{good} of {contexts}", "all", good == contexts),
        Finding("dispositions", text(found), text(claimed), found == claimed),
        Finding("… add up to", str(sum(claimed.values())), f"{sampled} sampled", sum(claimed.values()) == sampled),
    ]


def _is_whole(call: Call, vocabulary: int) -> bool:
    """Whether a call's parts fit together: one logprob and one version per id, one replaced token per forced one."""
    ends = [0, *(span.end for span in call.versions)]
    return (
        ends[-1] == len(call.sampled_ids) == len(call.logprobs)
        and ends[:-1] == [span.start for span in call.versions]
        and {r.position for r in call.replaced} == set(call.forced) <= set(range(len(call.sampled_ids)))
        and len(call.prompt_ids) > 0
        and all(0 <= i < vocabulary for i in (*call.prompt_ids, *call.sampled_ids))
    )


def advantages(kept: KeptBatch, trees: Sequence[ThreadTree]) -> list[float]:
    """Of the trees of one group: z-scores of their rewards (paper section 3.3); each reward less the mean of the
    others'; or 1 for a solved tree."""
    if kept.step.advantage == "success":
        return [float(tree.solved) for tree in trees]
    rewards = [float(tree.reward) for tree in trees if tree.reward is not None]
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    if kept.step.advantage == "leave_one_out":
        total, others = math.fsum(rewards), len(rewards) - 1
        equal = len(set(rewards)) == 1
        return [0.0 if equal else reward - (total - reward) / others for reward in rewards]
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / deviation if deviation else 0.0 for reward in rewards]


def call_advantages(kept: KeptBatch, trees: Sequence[ThreadTree]) -> list[list[float]]:
    """By tree and call: its tree's advantage; or by `credit: causal`, its own.

    Then a call stands beside the calls of other trees that could do as well as it what it did: children with the same
    prompt, parents that go on in the same round with as good news. It is worth what those that brought the same are
    worth, more than all of them on average; n / (n - 1) times that, for it is one of them.
    """
    of_trees = advantages(kept, trees)
    if kept.step.credit == "tree":
        return [[advantage] * len(tree.calls) for tree, advantage in zip(trees, of_trees, strict=True)]

    stands = [[_stand(tree, call) for call in tree.calls] for tree in trees]
    out = []
    for tree, own, places in zip(trees, of_trees, stands, strict=True):
        shares = []
        for call, (beside, brought) in zip(tree.calls, places, strict=True):
            peers = [tree.reward or 0.0]
            alike = [tree.reward or 0.0]
            for other, others in zip(trees, stands, strict=True):
                for peer, (of_peer, peer_brought) in zip(other.calls, others, strict=True):
                    if other is not tree and of_peer == beside and (not peer.path or peer.segment == 0):
                        peers.append(other.reward or 0.0)
                        alike += [other.reward or 0.0] if call.path and peer_brought == brought else []
            count = len(peers)
            share = own
            if count > 1:
                share = (statistics.fmean(alike) - statistics.fmean(peers)) * count / (count - 1)
            shares.append(0.0 if abs(share) < SAME else share)
        out.append(shares)
    return out


def _stand(tree: ThreadTree, call: Call) -> tuple[object, object]:
    """Beside which other calls a call is put, and what its thread brought to the join."""
    if not call.path:
        before = [join for join in tree.joins if join.path == () and join.segment == call.segment - 1]
        return ("root", call.segment, [any(o.value == "solved" for o in join.outcomes) for join in before]), None
    first = next(c for c in tree.calls if c.path == call.path)
    twins = [c.path for c in tree.calls if c.path and c.segment == 0 and c.prompt_ids == first.prompt_ids]
    brought = None
    for spawn in tree.spawns:
        for join in tree.joins:
            if call.path in spawn.children and (join.path, join.segment) == (spawn.path, spawn.segment):
                number = spawn.children.index(call.path)
                brought = join.outcomes[number], join.messages[number]
    return (first.prompt_ids, twins.index(call.path)), brought


def counted(kept: KeptBatch, tree: ThreadTree) -> bool:
    """Whether a tree of a used group is in the denominators. Supervised training on solved trees knows no others."""
    return kept.step.advantage != "success" or tree.solved


def is_skipped(kept: KeptBatch, tree: ThreadTree, advantage: float) -> bool:
    """Without a KL term a tree without advantage has no gradient and is left out."""
    return not counted(kept, tree) or (not kept.step.kl_coefficient and advantage == 0.0)


def check_prices(kept: KeptBatch) -> list[Finding]:
    """Rewards are the prices of the trees' endings; not where a coin drew them."""
    prices = kept.step.prices
    if not prices:
        return []
    right = sum(tree.reward == prices[tree.ending.value] for tree in kept.trees)
    return [
        Finding(
            "rewards that are their ending's price", f"{right} of {len(kept.trees)}", "all", right == len(kept.trees)
        )
    ]


def check_verdicts(kept: KeptBatch) -> list[Finding]:
    """Every answer verified again, from the problem and the tokens: the text that was judged is theirs."""
    if not kept.step.problems:
        return [Finding("verdicts", "not checked", "the batch's format holds no problems", True)]
    task = load_task(read_task(kept.policy))
    tokenizer = task.load_tokenizer(str(kept.policy))
    texts = verdicts = 0
    for number, tree in enumerate(kept.trees):
        problem = task.problem_from_json(kept.step.problems[number // kept.step.group_size])
        root = [call for call in tree.calls if call.path == ()]
        written = tokenizer.decode([*root[-1].prompt_ids, *root[-1].sampled_ids]) if root else ""
        ended = tree.outcome.value in ("answered", "no_answer")  # else the judged text may be an earlier call's
        texts += problem.key == tree.problem_key and (tree.final_text == written or not ended)
        verdicts += score(task, problem, tree.outcome, tree.final_text).reason == tree.verdict
    count = len(kept.trees)
    return [
        Finding("judged texts that are the tokens'", f"{texts} of {count}", "all", texts == count),
        Finding("verdicts", f"{verdicts} of {count}", "all", verdicts == count),
    ]


def fresh_groups(kept: KeptBatch) -> list[tuple[ThreadTree, ...]]:
    """The groups none of whose tokens is older than allowed (contract 9)."""
    size = kept.step.group_size
    groups = [kept.trees[i : i + size] for i in range(0, len(kept.trees), size)]
    return [g for g in groups if all(_is_fresh(kept, span.version) for t in g for c in t.calls for span in c.versions)]


def used_groups(kept: KeptBatch) -> list[list[ThreadTree]]:
    """The fresh groups without the trees that the machine ended: of those nothing is known."""
    groups = fresh_groups(kept)
    return [[tree for tree in trees if tree.outcome.value not in NOT_THE_POLICYS] for trees in groups]


def _is_fresh(kept: KeptBatch, version: WeightVersion) -> bool:
    now = kept.version
    return version.incarnation == now.incarnation and now.counter - version.counter <= kept.step.max_staleness


def check_versions(kept: KeptBatch) -> list[Finding]:
    """How many tokens each version drew. Stale ones are no fault (they are left out); ones from the future are."""
    tokens: Counter[WeightVersion] = Counter()
    for tree in kept.trees:
        for call in tree.calls:
            for span in call.versions:
                tokens[span.version] += span.end - span.start
    text = ", ".join(f"{version}: {n}" for version, n in sorted(tokens.items()))
    past = all(version <= kept.version for version in tokens)
    return [Finding("tokens by weight version", text, f"the learner held {kept.step.version}", past)]
