"""The configuration of a run: one typed model per component, every key with its description, default and limits.

A recipe names only what differs from these defaults. Unknown keys are errors. Defaults are the paper's settings
(arXiv 2508.00410, section 5 and appendix) if the paper has one. The docstring below a key is its description
everywhere that the key is explained (see `config.component`).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_coreward.config.component import Component, Fraction, NonNegative, Positive
from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.methods import MethodSetting

AnswerFormat = Literal["boxed", "hashes", "plain"]

Equivalence = Literal["hendrycks", "exact", "math"]

SYSTEM_PROMPT = "Let's think step by step and output the final answer within \\boxed{}."


class ModelSettings(Component):
    """The model that training starts from."""

    hf_path: Path
    """Directory of the model in Hugging Face format: config.json, *.safetensors and the tokenizer's files."""
    megatron_path: Path | None = None
    """Megatron checkpoint that the weights are read from instead; hf_path then needs no *.safetensors."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations in actors and engines."""


class DataSettings(Component):
    """Questions, and how they become prompts."""

    train_files: tuple[Path, ...] = Field(min_length=1)
    """Parquet files of training questions in the published format (columns prompt, reward_model, extra_info)."""
    rephrased_files: tuple[Path, ...] = ()
    """Parquet files of rephrased questions, paired with train_files row by row through extra_info.index. Only methods
    with two views read them: co_rewarding_i, co_rewarding_i+ii(_original) and self_harmony."""
    online_rephrasing: Literal["off", "policy", "teacher"] = "off"
    """Who rewrites the questions of every step before they are answered, for methods that read rephrased ones. If a
    rewriting does not pass the filter of docs/rephrasing.md, the rephrasing of rephrased_files is used or, without
    those, the question itself. Questions are rewritten while the actors learn from the step before, from weights that
    are one step older than those that answer; docs/methods.md lists the exceptions. Needs rollout.max_staleness and
    teacher.lookahead of 0."""
    val_files: tuple[Path, ...] = ()
    """Parquet files of held-out questions with ground truths; empty: no validation."""
    batch_size: Positive = 128
    """Questions per step. Each is answered rollout.n times, in both views if the method has two."""
    max_prompt_tokens: Positive = 512
    """Longest prompt in tokens, chat template included; over_length says what happens to a longer one."""
    over_length: Literal["error", "drop"] = "error"
    """What happens to questions whose prompt is too long: error refuses the run before training starts, drop leaves
    them out and says how many."""
    missing_gold: Literal["error", "drop", "keep"] = "error"
    """What happens to questions without a ground truth if one is read: those of train_files by the method
    ground_truth, those of val_files by every method. error refuses the run, drop leaves them out, keep counts every
    answer to them as wrong, in training and in validation."""
    unpaired: Literal["error", "drop"] = "error"
    """What happens to questions without a rephrasing and to rephrasings without a question, if the method reads both:
    error refuses the run, drop leaves them out."""
    system_prompt: str | None = SYSTEM_PROMPT
    """System prompt of every question, in place of the one in the files; null keeps the files' own."""
    thinking: bool | None = None
    """The chat template's enable_thinking, for models that have the switch (Qwen3); null: the template's default."""
    control_tokens: Literal["text", "special"] = "text"
    """How the text of one of the chat template's control tokens is read within a message: as text, so that no question
    can end its own message, or as the special token, for data that is rendered already."""
    shuffle: bool = True
    """Whether each epoch sees the questions in a new order; false keeps the order of the files."""


class ActorSettings(Component):
    """The Megatron actors: layout, memory and optimizer."""

    tensor_parallel: Positive = 1
    """Ranks that share every layer's matrices. Divides the model's attention heads and its feed-forward size."""
    pipeline_parallel: Positive = 1
    """Pipeline stages that the layers are divided into."""
    virtual_pipeline: Positive = 1
    """Model chunks per pipeline rank (interleaved schedule); 2 or more needs pipeline_parallel of 2 or more."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage if it has another number than the stages between; needs pipeline_parallel of 2
    or more. null: as many as those between."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage, in the same way. It computes the output layer too, so fewer layers balance
    it."""
    expert_parallel: Positive = 1
    """Ranks that the experts of a mixture of experts are spread over. Times expert_tensor_parallel it divides
    tensor_parallel x context_parallel x data_parallel, and it divides the model's experts."""
    expert_tensor_parallel: Positive | None = None
    """Ranks that share the matrices of every expert; null: as tensor_parallel. 1 keeps experts whole, which is faster
    if expert_parallel can be as much larger, for the same memory."""
    context_parallel: Positive = 1
    """Ranks that share the tokens of every sequence."""
    data_parallel: Positive = 1
    """Replicas of the model, each of which trains on a part of the batch."""
    sequence_parallel: bool = False
    """Whether activations between the parallel matrices are sharded over the tensor-parallel ranks as well; needs
    tensor_parallel of 2 or more, and a mixture of experts under tensor parallelism needs it."""
    backend: Literal["auto", "te", "local"] = "auto"
    """Kernels of the layers: te is Transformer Engine, local is Megatron-Core's own, auto is te if it is installed."""
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """FP8 recipe of the matrix products; needs Transformer Engine and a GPU that has the recipe. null: BF16."""
    fp8_params: bool = False
    """Whether the layers' weights are kept in FP8 too; needs fp8 of tensorwise or blockwise."""
    fp8_bf16_layers: NonNegative = 0
    """Layers at each end of the model that compute in BF16 under fp8."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: selective means those of the
    feed-forward parts, full those of whole layers."""
    router_replay: Literal["off", "rollout"] = "off"
    """Which experts the tokens of a mixture of experts train: off means those that the actor's router chooses; rollout
    means those that the rollout engine chose when it sampled, and needs GPUs."""
    gradient_accumulation_fusion: Literal["auto"] | bool = "auto"
    """Whether weight gradients are added up inside the matrix product; true needs the layers of Transformer Engine, and
    auto is true if they are used."""
    offload_optimizer: bool = False
    """Whether main parameters and moments are offloaded to host memory between steps."""
    offload_teacher: bool = False
    """Whether the value and compensation of the EMA teacher are offloaded to host memory between steps."""
    tokens_per_microbatch: Positive = 16384
    """Most tokens in a micro-batch, which holds whole sequences, packed one after the other. It bounds the memory of
    activations and changes no gradient; it must hold data.max_prompt_tokens + rollout.max_response_tokens."""
    lr: Annotated[float, Field(gt=0)] = 3e-6
    """Peak learning rate of AdamW."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule; at most lr."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from lr to min_lr after the warm-up; constant stays at lr."""
    lr_warmup: Fraction = 0.1
    """Share of all steps in which the learning rate rises from 0 to lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term that keeps AdamW's denominator from zero."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    cpu_threads: Positive = 1
    """Threads per rank on a machine without GPUs."""

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


class RolloutSettings(Component):
    """The vLLM engines, and how they sample."""

    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: actors and engines have GPUs of their own; colocated: they share the same GPUs, and the side that
    does not compute is offloaded."""
    num_engines: Positive = 1
    """Rollout engines, each with a whole copy of the model."""
    tensor_parallel: Positive = 1
    """GPUs per engine; divides the model's attention heads."""
    n: Annotated[int, Field(ge=2)] = 8
    """Completions per question that the policy samples (the group size G of the paper)."""
    votes: Positive | None = None
    """Completions per question that the policy samples for its vote if it votes on more than it trains on (64 and 32 in
    TTRL); at least n. A seeded choice of n of them is trained on. For majority_voting and co_rewarding_i, whose labels
    are votes of the policy. null: n."""
    schedule: Literal["deterministic", "streaming"] = "deterministic"
    """deterministic: every engine has a fixed share of a batch, and a run repeats bit by bit; streaming: groups go to
    engines as these have room and come back one by one, which is faster if lengths differ."""
    resample_flat: NonNegative = 0
    """Further questions that a step may draw in place of those whose rewards are all equal, from which nothing is
    learned, as a multiple of data.batch_size (dynamic sampling of DAPO). The step still trains on data.batch_size. 0:
    none."""
    max_staleness: NonNegative = 0
    """Most steps by which the weights that draw a token may be older than those that learn from it. 1 or more: engines
    sample rollouts of later steps while the actors learn; it needs loss.mismatch_correction and placement
    disaggregated, and 2 or more schedule streaming."""
    partial: bool = False
    """Whether unfinished responses continue with new weights when these arrive, instead of being finished first; every
    token keeps the version of the weights that drew it. Needs schedule streaming and max_staleness of 1 or more."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of policy and teacher; the actors compute log-probs at the same temperature."""
    max_response_tokens: Positive = 3072
    """Longest response in tokens; a longer one is cut off there."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings at which an engine ends a response; the tokens of the string are part of it. If there are any, engines
    decode text token by token, which is slower."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of probability that the policy's training rollouts are drawn from, the most likely tokens first; below 1 it
    needs loss.mismatch_correction, as actors train the whole distribution. Teacher and validation are not affected."""
    top_k: NonNegative = 0
    """Number of the most likely tokens that the policy's training rollouts are drawn from; 0: all. What top_p needs and
    affects holds for this key, too."""
    max_num_seqs: Positive = 256
    """Most sequences that an engine decodes at once."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Key-value cache in GiB per engine rank on a machine without GPUs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a GPU's memory that an engine takes while it is awake: weights, key-value cache and activations."""
    quantization: Literal["fp8"] | None = None
    """fp8: the engines' weights are quantised as they are loaded, which needs a GPU; null: model.dtype."""
    cuda_graphs: bool = True
    """Whether engines decode with captured CUDA graphs; without GPUs it changes nothing."""
    cpu_threads: Positive = 1
    """Threads per engine rank on a machine without GPUs."""

    @property
    def num_samples(self) -> int:
        """Completions per question that the policy samples."""
        return self.n if self.votes is None else self.votes


class TeacherSettings(Component):
    """The EMA teacher of co_rewarding_ii and co_rewarding_i+ii(_original); other methods read none of these keys."""

    lookahead: NonNegative = 0
    """Further steps whose questions the teacher labels ahead of time, with one set of weights. 0: the teacher labels
    each step with the weights of that step, as in the paper."""
    engines: NonNegative = 0
    """How many of rollout.num_engines sample for the teacher alone, so that policy and teacher sample at once; fewer
    than all. 0: policy and teacher share all engines, one after the other."""
    n: Positive = 8
    """Completions per question that the teacher samples for its vote (G~ of the paper)."""
    early_stop: bool = False
    """Whether a group of the teacher ends as soon as no unfinished answer can change its label or abstention; the rest
    is aborted. Labels are the same. Needs rollout.schedule streaming."""
    decay_start: Fraction = 0.99
    """Share of itself that the teacher keeps at the first update; it rises to decay_end along a cosine."""
    decay_end: Fraction = 0.9999
    """Share of itself that the teacher keeps at the last update; at least decay_start."""


class RewardSettings(Component):
    """From responses to answers, votes and rewards."""

    equivalence: Equivalence = "exact"
    """When two answers count as the same: exact compares their text as published; hendrycks compares them after the
    normalisation of the MATH benchmark; math also compares their values, numerically and symbolically."""
    answer_formats: tuple[AnswerFormat, ...] = Field(("boxed",), min_length=1)
    """Where a response states its final answer, tried in this order: boxed is the last \\boxed{}, hashes is what
    follows ####, plain is what follows "the answer is"."""
    min_margin: Fraction = 0.0
    """Least margin of a vote over the runner-up, as a share of the rollouts. A vote with a smaller margin abstains: its
    question has no label and no reward."""
    stop_at: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that begin an unwanted follow-up, such as "Question:". What a response says after the first of them that
    comes after an answer is ignored."""
    comparison_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds of processor time that one comparison of two answers may take if equivalence is math; after that they
    count as different."""
    comparison_workers: Positive | None = None
    """Processes that compare answers if equivalence is math; null: one per core of each machine of the run."""


class LossSettings(Component):
    """The clipped policy gradient loss with its KL term."""

    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    """What is clipped: with ppo the probability ratio of each token, with gspo one ratio for a whole sequence (its
    bounds are about a thousandth of those of ppo, and its paper aggregates by seq-mean-token-mean), cispo the weight of
    a token's gradient, which never vanishes. With one update per batch all ratios are 1, and all three are the same."""
    advantage_std: bool = True
    """Whether advantages are divided by the standard deviation of their group's rewards; false as in Dr. GRPO. Methods
    that compute advantages of their own (restrain) are not affected."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a bonus on the entropy of every token's distribution, in nats, which keeps the policy exploring."""
    mask_truncated: bool = False
    """Whether responses that were cut off at rollout.max_response_tokens are left out of the loss (overlong filtering,
    DAPO). They still vote, and count in the advantages of their group."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far below 1 the probability ratio is clipped."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """How far above 1 the probability ratio is clipped; at least clip_low (clip-higher if it is above)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio that counts for negative advantages (dual-clip PPO); null: no such bound."""
    kl_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL term. null: the paper's value for the method, 0.001 with a teacher and 0.005 without."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from the sampled token's log-probs: k1 is their difference, k2 half its square,
    k3 is unbiased and never negative."""
    kl_clamp: Annotated[float, Field(gt=0)] | None = None
    """Bound on the k3 estimate of a token, in nats, beyond which the token has no gradient from the KL term; the
    published implementation has 10. null: no such bound."""
    kl_reference: Literal["auto", "frozen", "teacher"] = "auto"
    """Model that the KL term holds the policy to: frozen is the model that training started from, teacher the EMA
    teacher, auto the teacher if the method has one and else frozen."""
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"] = "token-mean"
    """How token losses add up: token-mean is the mean over all tokens of the batch; seq-mean-token-sum and
    seq-mean-token-mean are the mean over sequences of their sums or means; constant divides sums by
    rollout.max_response_tokens."""
    views: Literal["mean", "sum"] = "mean"
    """How the losses of two views add up, for methods that train on both: mean is one aggregation over the sequences
    of both; sum aggregates each view and adds the two, as the published implementation does. A sum is about twice as
    large, which Adam cancels and clip_grad does not."""
    updates_per_batch: Positive = 1
    """Optimizer steps per rollout batch; divides the number of the batch's groups, and data.batch_size if views is sum
    and the method trains on both."""
    mismatch_correction: Literal["off", "tis", "icepop"] = "off"
    """Token weights that correct for the difference between the engine that sampled and the actor that learns: tis
    truncates the ratio of their probabilities at mismatch_cap, icepop leaves out tokens whose ratio is beyond [1/cap,
    cap]."""
    mismatch_cap: Annotated[float, Field(gt=0)] = 2.0
    """The cap of mismatch_correction; icepop needs 1 or more."""


class SyncSettings(Component):
    """How weights travel from the actors to the engines."""

    transport: Literal["auto", "shared_memory", "gloo", "ipc", "nccl"] = "auto"
    """What carries the weights. auto chooses by placement, GPUs and hosts: without GPUs shared_memory on one host and
    gloo between hosts; with GPUs ipc if colocated and nccl otherwise."""
    bucket_mib: Annotated[float, Field(gt=0)] = 256.0
    """Size of a bucket in MiB, whatever the largest tensor. An actor rank and an engine worker hold two buckets at
    most."""
    checksums: bool = False
    """Whether every message is compared by checksum with what was sent when it arrives."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a bucket of weights may take, and that ranks and engines may take to connect. This time does not run
    while any of them is still busy with earlier work, such as rollouts."""
    max_logprob_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean gap in nats between the log-probs of engines and actors on the canary tokens after a weight sync;
    the run ends above it. null: 0.001 for float32, 0.1 for bfloat16 and wider for FP8. With rounded weights it is the
    limit of the first sync, which sets that of later ones to five times its own gap, if that is less."""


class ValidationSettings(Component):
    """Accuracy on data.val_files. Ground truths are read here and never reach training."""

    every: NonNegative = 10
    """Steps between validations; 0: only before and after training."""
    samples: Literal["both", "greedy", "random"] = "both"
    """What is sampled for a question: greedy is one greedy answer (pass@1), random is n answers at temperature
    (avg@n, pass@n, maj@n), both is both."""
    n: Positive = 8
    """Random samples per question: the n of avg@n, pass@n and maj@n."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the random samples."""
    equivalence: Equivalence | None = None
    """When an answer is right, and when two answers vote alike; null: as rewards.equivalence."""
    max_problems: Positive | None = None
    """Questions of each data set that are validated on, the first ones of its file; null: all."""
    at_start: bool = True
    """Whether the model is validated before the first step."""
    warn_below_start: Fraction = 0.1
    """Drop of avg@n (pass@1 if samples is greedy) below the first validation, as an absolute difference, from which the
    run warns; it has no other effect."""


class CheckpointSettings(Component):
    """When the state of a run is saved, and which checkpoints are kept."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: only at the end."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a run resumes from the newest checkpoint of run_dir; never: a run_dir with checkpoints is refused."""
    changed_inputs: Literal["refuse", "accept"] = "refuse"
    """What happens if data or model files were replaced since the checkpoint that is resumed: refuse ends the run and
    names them, accept resumes and names them in events.log. Files are compared by content; validation files are only
    noted."""
    keep: Positive = 3
    """Newest checkpoints that are kept; older ones are removed."""
    best_metric: str | None = None
    """Metric, such as val/avg@8, whose best checkpoint is kept as well; null: none."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of best_metric is the best one."""
    asynchronous: bool = True
    """Whether training continues while the files are written; a checkpoint gets its name when all of them are there."""
    verify: Literal["full", "sizes"] = "full"
    """What is compared with the manifest before resuming: with full the checksums of all files, with sizes only their
    sizes."""


class FaultSettings(Component):
    """What a run does about crashed processes, non-finite gradients and signals."""

    engine_restarts: NonNegative = 3
    """Engine deaths in a run that it answers by starting a new engine; the next one ends the attempt."""
    max_restarts: NonNegative = 0
    """Times that all processes are started again, from the newest checkpoint, after one of them died."""
    nonfinite_gradients: Literal["stop", "skip"] = "stop"
    """What happens at a NaN or infinite gradient: stop ends the run, skip leaves that update out. Weights and moments
    stay as they are either way."""
    max_skipped_updates: Positive = 3
    """Updates in a row that skip may leave out; one more ends the run."""
    stop_signals: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"], ...] = ("SIGTERM",)
    """Signals at which the run saves a checkpoint and ends with status 0, to be resumed."""


class WatchdogSettings(Component):
    """Limits on how long a result may take before the run says so and ends."""

    warn_after_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of waiting after which the run says what it waits for and from which process; it says so again after the
    same time."""
    limit_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds of waiting for one result after which the run ends."""
    start_limit_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds of waiting for the start of a process after which the run ends."""


class TelemetrySettings(Component):
    """What a run shows and records beside metrics.jsonl."""

    console: Literal["auto", "live", "plain", "off"] = "auto"
    """What the terminal shows: live is one panel that stays in place, plain is a line per step, off is nothing, auto is
    live on a terminal and plain elsewhere."""
    dump_rollouts: bool = True
    """Whether the rollouts of every step are kept in run_dir/rollouts/."""
    wandb_project: str | None = None
    """Project of Weights & Biases that metrics are logged to as well; null: none."""
    mlflow_experiment: str | None = None
    """Experiment of MLflow that metrics are logged to as well; it is made if it does not exist; null: none."""
    mlflow_uri: str | None = None
    """Tracking server of MLflow, http://HOST:PORT for example; null: what the environment variable MLFLOW_TRACKING_URI
    says. Put a user name, password or token into MLflow's environment variables: this key is shown and stored."""


class RunConfig(Component):
    """A run: what it trains, on what, how, and where it writes."""

    run_dir: Path
    """Directory that the run writes into. Started again with the same one, it resumes."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1
    """Seed of sampling and of the order of questions. The engines' library takes 32 bits."""
    steps: Positive
    """Steps of the whole run: one batch of rollouts each. Schedules of learning rate and teacher span them."""
    method: MethodSetting
    """How rollouts are rewarded. co_rewarding_i labels them by the votes on rephrased questions, co_rewarding_ii by the
    votes of an EMA teacher, co_rewarding_i+ii by the teacher's votes across views, co_rewarding_i+ii_original by those
    on rephrased questions for the original ones alone; docs/methods.md has all methods. A text such as
    my_package.my_module:MyMethod is a method of your own, by its import path, which loading the recipe imports. Keys
    and values are several methods with their weights: their rewards are added."""
    gpu: Literal["a100", "h100", "h200"] | None = None
    """GPU that the layout was made for, and which plan assumes unless --gpu names another; null: no particular one. It
    changes nothing in a run."""
    model: ModelSettings
    data: DataSettings
    actor: ActorSettings = ActorSettings()
    rollout: RolloutSettings = RolloutSettings()
    teacher: TeacherSettings = TeacherSettings()
    rewards: RewardSettings = RewardSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    faults: FaultSettings = FaultSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    guard: GuardSettings = GuardSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
