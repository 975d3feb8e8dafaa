"""Settings of the model, its data, the learners and both training phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from apr_ray.config.section import Beta, Count, Fraction, Positive, PositiveFloat, Rate, Section
from apr_ray.core.engine import LEAST_TEMPERATURE


class ModelConfig(Section):
    """A Llama-2 architecture (paper section 4.1), small by default."""

    hidden_size: Positive = 128
    """Width of the residual stream."""
    layers: Positive = 4
    """Transformer blocks."""
    heads: Positive = 4
    """Attention heads."""
    kv_heads: Positive | None = None
    """Key/value heads; as many as `heads` where not given."""
    ffn_size: Positive = 344
    """Width of the gated feed-forward layer."""
    context_tokens: Positive = 1024
    """Longest sequence, prompt and output together."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = True
    """Whether the output layer is the embedding table."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} over {self.heads} heads is not an even head size")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class DataConfig(Section):
    """Problems and demonstrations."""

    train_problems: Positive = 50_000
    """Demonstrated problems; a problem counts once per solver seed."""
    solver_seeds: Positive = 1
    """Solver runs per problem."""
    max_sequence_tokens: Positive = 1024
    """Longer demonstrations are dropped, whole trees at a time, and counted."""
    workers: Positive | None = None
    """Ray tasks that solve side by side; as many as there are cores by default."""


class LearnerConfig(Section):
    """The DeepSpeed learner group."""

    ranks: Positive = 1
    """Learner processes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ranks share instead of each holding it whole: 1 optimiser state, 2 gradients too, 3 parameters too."""
    zero3_whole_parameters: Count = 100_000
    """At stage 3 a parameter of at most so many numbers stays whole on every rank: gathering it costs more."""
    micro_batch_tokens: Positive = 4096
    """Padded tokens per forward pass, at most (a longer sequence goes alone)."""
    cpus_per_rank: Rate = 0.5
    """Ray CPUs reserved per rank. Learners and rollout workers take turns, so each may reserve half a core."""
    gpus_per_rank: Fraction = 0.0
    """GPUs reserved per rank, 1 or a share of one; with 0 it trains on the CPU."""


class OptimizerConfig(Section):
    """AdamW, or Muon beside it, and their schedule."""

    learning_rate: PositiveFloat
    """Peak."""
    muon_rate: PositiveFloat | None = None
    """Peak rate of the hidden matrices, if they take Muon's steps and not AdamW's: fewer tokens for the same loss when
    a policy is trained from scratch. It needs whole matrices, so `learner.zero_stage` 0."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up, over the progress of training."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end over its peak."""
    weight_decay: Rate = 0.01
    """Decoupled, of all parameters."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment. Where it is larger than that root, steps are in proportion to the
    gradient, as in SGD with momentum: less noise goes into parameters whose gradient is small."""
    parameters: Literal["all", "final_norm"] = "all"
    """`final_norm` trains the gains of the last normalisation alone. They scale all logits, so a policy can become
    surer of itself and learn nothing else: a control. It takes AdamW's steps: no `muon_rate`."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""

    @model_validator(mode="after")
    def _gains_are_no_matrices(self) -> OptimizerConfig:
        if self.parameters == "final_norm" and self.muon_rate is not None:
            raise ValueError(f"parameters final_norm are no matrices, muon_rate is {self.muon_rate:g}: set it to null")
        return self


class SftConfig(Section):
    """Supervised training on demonstrations (paper section 3.2)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, schedule="linear")
    batch_tokens: Positive = 4096
    """Padded tokens per optimiser step, about, over all ranks: a whole number of micro-batches for each rank."""
    tokens: Positive = 10_000_000
    """Tokens trained on in all."""
    max_minutes: PositiveFloat | None = None
    """A guard: ends training by the clock before `tokens`; the schedule then follows the clock."""
    child_first_fraction: Fraction = 0.2
    """First share of training over which the children's share of what is shown falls, linearly, from all of it to the
    usual one: a curriculum that begins with short texts."""
    child_share: Fraction = 1.0
    """How often a child's sequence is shown for each time that a parent's is: a tree has several, much alike."""
    mask: Literal["none", "given", "prompt"] = "none"
    """What carries no loss: nothing, as in the paper; what a thread was given at its start (a parent's later calls then
    train its earlier text and the joins again); or the whole prompt of every call."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 runs the matrix products of a step under autocast; weights, optimiser and loss stay in float32. auto times
    one micro-batch of each on every rank as training begins, and takes the faster."""
    eval_every: Positive = 5000
    """Steps between evaluations on held-out problems; the best policy is kept."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    log_every: Positive = 20
    """Steps between lines of metrics."""


class RewardConfig(Section):
    """The price of each ending of a tree. The verifier gives it in training alone, never while a policy answers.

    With a false claim below no answer, the reward is largest where a policy claims an answer if and only if
    P(right) > `claim_threshold`: with prices 1, 0 and -c that is c / (1 + c).
    """

    solved: float = 1.0
    """The answer is right."""
    no_answer: float = 0.0
    """The tree says that it found none."""
    false_claim: float = 0.0
    """The tree claims an answer that is not right."""
    cut_off: float = 0.0
    """A bound or a full context ended it."""
    invalid_spawn: float = 0.0
    """It ended in a spawn that cannot be followed."""
    failed_engine: float = 0.0
    """Its engine failed, or was too slow for `bounds.max_seconds`. It counts in `rollout/reward` alone: such a tree is
    left out of its group."""
    coin: bool = False
    """Draw 1 or 0 for every tree by a fair coin instead: a control, from which nothing can be learned."""

    @property
    def claim_threshold(self) -> float:
        """P(right) above which a claim pays more than no answer."""
        return (self.no_answer - self.false_claim) / (self.solved - self.false_claim)

    @model_validator(mode="after")
    def _no_ending_escapes(self) -> RewardConfig:
        wrong = {"false_claim": self.false_claim, "cut_off": self.cut_off, "invalid_spawn": self.invalid_spawn}
        for name, price in (wrong | {"no_answer": self.no_answer}).items():
            if price >= self.solved:
                raise ValueError(f"{name} {price:g} is not below solved {self.solved:g}")
        if self.false_claim < self.no_answer:
            for name, price in wrong.items():
                if price >= self.no_answer:
                    raise ValueError(
                        f"false_claim {self.false_claim:g} has a price and {name} {price:g} is not below no_answer"
                        f" {self.no_answer:g}: a policy would escape into it; price it too"
                    )
        return self


class GrpoConfig(Section):
    """GRPO over whole trees (paper section 3.3)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    steps: Positive = 150
    """Rollout phases in all."""
    tokens: Positive | None = None
    """Ends training once so many tokens were sampled, at the end of a step: two arms with as many are comparable."""
    max_minutes: PositiveFloat | None = None
    """Ends training by the clock, at the end of a step."""
    problems_per_step: Positive = 64
    """Groups per step."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trees per problem, over which advantages are normalised."""
    refill_rounds: Count = 0
    """Where groups without variance leave a step short of `problems_per_step` others, sample as many further problems,
    at most so often (DAPO's dynamic sampling)."""
    inner_steps: Positive = 2
    """Optimiser steps on each batch of rollouts."""
    advantage: Literal["group", "leave_one_out", "success"] = "group"
    """`group`: z-scores of a group's rewards, as in the paper. `leave_one_out`: a reward less the mean of the others in
    its group, in the rewards' own unit: z-scores blow up the small prices of a group that nobody solved. `success`: 1
    for solved trees, and no others, which with one inner step is supervised training on them (rejection sampling)."""
    credit: Literal["tree", "causal"] = "tree"
    """`tree`: every call has its tree's advantage, as in the paper. `causal`: a thread is compared with the group's
    threads that were given the same prompt, by the message that each joined with: all that the rest of the tree learns
    of it. The same expectation from fewer trained tokens (`rl/credit.py`); it needs `advantage: leave_one_out`."""
    reward: RewardConfig = RewardConfig()
    """What the endings of a tree are worth. By default 1 for a right answer and 0 for all else, as in the paper."""
    clip: PositiveFloat = 0.2
    """PPO's clip range on the ratio."""
    loss_mean: Literal["call", "tree", "token"] = "call"
    """What the loss is a mean of. `call`, as in the paper: of a call's tokens, then of a tree's calls, then of trees;
    `tree`: of a tree's tokens, then of trees; `token`: of all tokens of the batch."""
    ratio: Literal["behaviour", "proximal"] = "behaviour"
    """Whose probability the clipped ratio divides by: the engine's that drew the token, or the learner's at the start
    of the batch. The latter clips the learner's own steps alone; `correction` then accounts for the engine."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """With `ratio: proximal`, what is done with the importance weight proximal / behaviour: left out, cut off at
    `correction_cap`, or set to 0 outside [1 / cap, cap]. It multiplies the loss without its KL term."""
    correction_level: Literal["token", "call", "tree"] = "token"
    """Over what the weight is taken: a token, or the product over the trained tokens of its call or tree."""
    correction_cap: Annotated[float, Field(gt=1)] = 2.0
    """Largest importance weight."""
    correction_from: Rate = 0.0
    """Weights are 1 in a batch whose mean |Δ logprob| between engine and learner is not above this."""
    kl_coefficient: Rate = 0.001
    """Weight of the k3 penalty against the initial policy; 0 leaves it out."""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE)] = 1.0
    """At which trees are sampled, and logprobs taken."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of a step's matrix products, as in `sft.precision`. Its ratios compare logprobs with the engine's, which in bf16
    differ by chance: use it where the engine is below float32 too."""
    max_staleness: Count = 0
    """A tree drawn under weights older than this many versions is not used."""
    ahead: Count = 0
    """Steps whose trees are sampled while the learners train on earlier ones': 0 is synchronous, 1 is one step off
    policy, more is asynchronous. `max_staleness` must be at least as much. Worth it where learners and workers have
    machines of their own. See `weights.mode` for what becomes of the trees that run when new weights come."""
    eval_every: Positive = 10
    """Steps between evaluations on held-out problems; the best policy is kept."""
    initial_evaluation: bool = True
    """Evaluate, on all held-out problems, the policy that training begins with."""
    save_every: Positive = 10
    """Steps between checkpoints."""
    keep_batches: Literal["off", "last", "every"] = "last"
    """Batches kept for `apr-ray audit`, with the policy that drew them: of the steps that begin from a checkpoint, as
    that policy lies on disk anyway; the last of them, or every one."""

    @model_validator(mode="after")
    def _ahead_is_stale(self) -> GrpoConfig:
        if self.max_staleness < self.ahead:
            raise ValueError(f"ahead {self.ahead} samples as many versions off: max_staleness is {self.max_staleness}")
        if self.ahead and self.refill_rounds:
            raise ValueError("refill_rounds waits for a step's rewards, and ahead samples the next steps meanwhile")
        return self

    @model_validator(mode="after")
    def _credit_has_rewards_to_share(self) -> GrpoConfig:
        if self.credit == "causal" and self.advantage != "leave_one_out":
            raise ValueError(f"credit causal shares out rewards, advantage is {self.advantage}: use leave_one_out")
        return self

    @model_validator(mode="after")
    def _correction_has_something_to_correct(self) -> GrpoConfig:
        if self.correction != "none" and self.ratio == "behaviour":
            raise ValueError(
                f"correction {self.correction} needs ratio proximal; ratio {self.ratio} divides by the engine's"
                " probability already"
            )
        return self


class BoundsConfig(Section):
    """Bounds of one tree; hitting one is a recorded outcome."""

    max_depth: Count = 1
    """Levels of children; 0 forbids spawning."""
    max_children: Positive = 16
    """Children per spawn."""
    max_rounds: Count = 8
    """Spawn rounds per thread; 0 forbids spawning."""
    max_call_tokens: Positive = 1024
    """Sampled tokens of one call."""
    max_tree_tokens: Positive = 16_384
    """Sampled tokens of all threads of a tree."""
    max_seconds: PositiveFloat = 300.0
    """Wall time of a tree."""
    cancel_on_success: bool = False
    """Abort the siblings of a child that solved; they join as "Cancelled"."""
