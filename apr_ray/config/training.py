"""What is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from apr_ray.config.section import Beta, Count, Fraction, Positive, PositiveFloat, Rate, Section


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
    workers: Positive = 2
    """Ray tasks that solve side by side."""


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
    final_norm_scale: PositiveFloat | None = None
    """Learning rate of the last normalisation's gains over `learning_rate`, with an `eps` of 1e-8. They scale all
    logits, so this is how fast a policy may become surer of itself as a whole. The same rate where not given."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""


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


class GrpoConfig(Section):
    """GRPO over whole trees (paper section 3.3)."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    steps: Positive = 150
    """Rollout phases in all."""
    max_minutes: PositiveFloat | None = None
    """Ends training by the clock, at the end of a step."""
    problems_per_step: Positive = 64
    """Groups per step."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trees per problem, over which advantages are normalised."""
    inner_steps: Positive = 2
    """Optimiser steps on each batch of rollouts."""
    advantage: Literal["group", "success"] = "group"
    """`group`: z-scores of a group's rewards. `success`: the reward itself, which with one inner step is supervised
    training on the solved trees (rejection sampling): a control."""
    reward: Literal["task", "random"] = "task"
    """`random` draws every tree's reward by a fair coin: a control, from which nothing can be learned."""
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
    temperature: PositiveFloat = 1.0
    """At which trees are sampled, and logprobs taken."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of a step's matrix products, as in `sft.precision`. Its ratios compare logprobs with the engine's, which in bf16
    differ by chance: use it where the engine is below float32 too."""
    max_staleness: Count = 0
    """A tree drawn under weights older than this many versions is not used."""
    overlap: bool = False
    """Sample the next step's trees while the learners train on this one's: one version off, so `max_staleness` must be
    at least 1. Worth it where learners and workers have machines of their own. See `weights.mode` for what becomes of
    the trees that run when new weights come."""
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
    def _overlap_is_stale(self) -> GrpoConfig:
        if self.overlap and self.max_staleness < 1:
            raise ValueError("overlap samples one version off: max_staleness must be at least 1")
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
