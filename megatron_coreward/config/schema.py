"""The configuration of a run: one typed model per component, every key with its unit, its default and its limits.

A recipe names only what differs from these defaults. Unknown keys are errors. Defaults are the paper's settings
(arXiv 2508.00410, section 5 and appendix) where the paper has one.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_coreward.config.guard import GuardSettings

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

MethodName = Literal[
    "co_rewarding_i",
    "co_rewarding_ii",
    "co_rewarding_i+ii",
    "majority_voting",
    "ground_truth",
    "self_certainty",
    "entropy",
]

AnswerFormat = Literal["boxed", "hashes", "plain"]

# Which methods read rephrased questions and which keep a teacher; a test holds these against the methods' own needs.
REPHRASED_METHODS: frozenset[MethodName] = frozenset({"co_rewarding_i", "co_rewarding_i+ii"})
TEACHER_METHODS: frozenset[MethodName] = frozenset({"co_rewarding_ii", "co_rewarding_i+ii"})

SYSTEM_PROMPT = "Let's think step by step and output the final answer within \\boxed{}."


class Component(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Component):
    hf_path: Path  # directory with config.json, *.safetensors and tokenizer files
    megatron_path: Path | None = None  # Megatron checkpoint to start from; hf_path then needs no *.safetensors
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class DataSettings(Component):
    train_files: tuple[Path, ...] = Field(min_length=1)  # parquet in the published format
    rephrased_files: tuple[Path, ...] = ()  # pairs row by row with train_files, by extra_info.index
    val_files: tuple[Path, ...] = ()
    batch_size: Positive = 128  # questions a step
    max_prompt_tokens: Positive = 512  # a longer prompt is an error before training starts, unless over_length is drop
    over_length: Literal["error", "drop"] = "error"
    system_prompt: str | None = SYSTEM_PROMPT  # replaces the files' own; null keeps theirs
    thinking: bool | None = None  # the chat template's `enable_thinking` (Qwen3); null: as the template has it
    control_tokens: Literal["text", "special"] = "text"  # what `<|im_end|>` and the like are within a message
    shuffle: bool = True


class ActorSettings(Component):
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    virtual_pipeline: Positive = 1  # model chunks a pipeline rank
    expert_parallel: Positive = 1
    context_parallel: Positive = 1  # ranks that share the tokens of every sequence
    data_parallel: Positive = 1
    sequence_parallel: bool = False
    backend: Literal["auto", "te", "local"] = "auto"  # layer spec: Transformer Engine where it is installed
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = (
        None  # recipe of the matrix products; null: BF16
    )
    fp8_params: bool = False  # keep the layers' weights in FP8 too; needs fp8 of tensorwise or blockwise
    fp8_bf16_layers: NonNegative = 0  # so many first and last layers compute in BF16 under fp8
    recompute: Literal["none", "selective", "full"] = "none"  # selective: feed-forward parts; full: whole layers
    gradient_accumulation_fusion: Literal["auto"] | bool = "auto"  # auto: where apex has its kernel
    offload_optimizer: bool = False  # main parameters and moments wait in host memory between steps
    offload_teacher: bool = False  # the EMA's value and compensation wait in host memory between steps
    tokens_per_microbatch: Positive = 16384  # tokens of a micro-batch at most: whole sequences, laid end to end
    lr: Annotated[float, Field(gt=0)] = 3e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup: Fraction = 0.1  # share of all steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0 turns it off
    cpu_threads: Positive = 1  # a rank, without GPUs

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


class RolloutSettings(Component):
    placement: Literal["disaggregated", "colocated"] = (
        "disaggregated"  # colocated: actor and engines take turns on a GPU
    )
    num_engines: Positive = 1
    tensor_parallel: Positive = 1
    n: Annotated[int, Field(ge=2)] = 8  # G: completions a question
    max_staleness: Literal[0, 1] = (
        0  # 1: engines draw the next step's rollouts while actors learn, from weights one step old
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_response_tokens: Positive = 3072
    max_num_seqs: Positive = 256  # sequences an engine decodes at once
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0  # per engine rank, without GPUs
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of a GPU that an engine takes when awake
    quantization: Literal["fp8"] | None = None  # weights are quantised as they are loaded; needs a GPU
    cuda_graphs: bool = True  # with GPUs
    cpu_threads: Positive = 1  # an engine rank, without GPUs


class TeacherSettings(Component):
    lookahead: NonNegative = 0  # further steps that the teacher labels ahead of time, at one publication
    n: Positive = 8  # G~: completions a question that the teacher draws for its vote
    decay_start: Fraction = 0.99
    decay_end: Fraction = 0.9999


class RewardSettings(Component):
    equivalence: Literal["exact", "math"] = "exact"
    answer_formats: tuple[AnswerFormat, ...] = Field(
        ("boxed",), min_length=1
    )  # where final answers stand, tried in order
    min_margin: Fraction = 0.0  # a vote whose margin over the runner-up is smaller abstains: no label, no reward
    comparison_timeout_s: Annotated[float, Field(gt=0)] = 5.0  # for one comparison under `math`


class LossSettings(Component):
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # bound on ratio * advantage for negative advantages
    kl_coef: Annotated[float, Field(ge=0)] | None = None  # null: the paper's value for the method
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_reference: Literal["auto", "frozen", "teacher"] = "auto"  # auto: the teacher where the method has one
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"] = "token-mean"
    updates_per_batch: Positive = 1  # optimizer steps a rollout batch
    mismatch_correction: Literal["off", "tis", "icepop"] = "off"  # rollout engine against actor
    mismatch_cap: Annotated[float, Field(gt=0)] = 2.0  # tis truncates the ratio here; icepop masks beyond [1/cap, cap]


class SyncSettings(Component):
    transport: Literal["auto", "shared_memory", "gloo", "ipc", "nccl"] = "auto"  # auto: by placement, GPUs and hosts
    bucket_mib: Annotated[float, Field(gt=0)] = 256.0  # a rank and an engine worker hold two buckets at most
    checksums: bool = False  # compare checksums of every block where it is loaded
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # for a message between hosts
    max_logprob_gap: Annotated[float, Field(gt=0)] | None = None  # nats, mean over probe tokens; null: by dtype


class ValidationSettings(Component):
    every: NonNegative = 10  # steps; 0: only before and after training
    n: Positive = 8  # k of avg@k and maj@k
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_problems: Positive | None = None
    at_start: bool = True
    warn_below_start: Fraction = 0.1  # says so when avg@n is this far below the first one; nothing else follows from it


class CheckpointSettings(Component):
    every: NonNegative = 0  # steps; 0: only at the end
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest checkpoint of run_dir
    changed_inputs: Literal["refuse", "accept"] = (
        "refuse"  # data or model files that were replaced since the checkpoint that is resumed
    )
    keep: Positive = 3  # the newest so many stay
    best_metric: str | None = None  # such as val/avg@8: the checkpoint that is best by it stays too
    best_is: Literal["highest", "lowest"] = "highest"
    asynchronous: bool = True  # train on while the files are written; they get their name when all are complete
    verify: Literal["full", "sizes"] = "full"  # before resuming: full compares checksums of all files


class FaultSettings(Component):
    engine_restarts: NonNegative = 3  # engines that may die and be started anew in a run; the next one ends it
    max_restarts: NonNegative = 0  # times that all processes are started anew from the newest checkpoint
    nonfinite_gradients: Literal["stop", "skip"] = (
        "stop"  # NaN or infinite: weights and moments stay as they are either way
    )
    max_skipped_updates: Positive = 3  # of `skip`, in a row; one more ends the run
    stop_signals: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"], ...] = ("SIGTERM",)  # save and leave


class WatchdogSettings(Component):
    warn_after_s: Annotated[float, Field(gt=0)] = 300.0  # says what is awaited, of whom, and says it again
    limit_s: Annotated[float, Field(gt=0)] = 3600.0  # ends the run when a result takes longer
    start_limit_s: Annotated[float, Field(gt=0)] = 600.0  # the same for the start of a process


class TelemetrySettings(Component):
    console: Literal["auto", "live", "plain", "off"] = "auto"
    dump_rollouts: bool = True
    wandb_project: str | None = None


class RunConfig(Component):
    run_dir: Path
    seed: NonNegative = 1
    steps: Positive
    method: MethodName
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
