"""Impossible combinations are refused with one clear message, before any process starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.cli import main
from megatron_coreward.config.load import dump_config, parse_config
from megatron_coreward.config.validate import validate, warnings
from megatron_coreward.errors import InputError

DENSE = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
EXPERTS = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def tree(tmp_path: Path, model: dict[str, Any] = DENSE) -> dict[str, Any]:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    (tmp_path / "model" / "model.safetensors").touch()  # its content is not looked at here
    for name in ("train", "rephrased"):
        (tmp_path / f"{name}.parquet").touch()
    return {
        "run_dir": str(tmp_path / "run"),
        "steps": 10,
        "method": "co_rewarding_i",
        "model": {"hf_path": str(tmp_path / "model")},
        "data": {
            "train_files": [str(tmp_path / "train.parquet")],
            "rephrased_files": [str(tmp_path / "rephrased.parquet")],
        },
    }


def test_a_config_that_fits_passes(tmp_path: Path) -> None:
    layout = [
        "actor.tensor_parallel=2",
        "actor.pipeline_parallel=2",
        "actor.virtual_pipeline=2",
        "actor.data_parallel=8",
    ]
    assert validate(parse_config(tree(tmp_path), layout)).num_layers == 4


@pytest.mark.parametrize(
    "changes",
    [
        ["rollout.max_staleness=1", "loss.mismatch_correction=tis"],
        [
            *("rollout.schedule=streaming", "rollout.max_staleness=3", "rollout.partial=true"),
            "loss.mismatch_correction=icepop",
        ],
        ["rollout.schedule=streaming", "rollout.placement=colocated"],
        ["method=co_rewarding_ii", "teacher.engines=1", "rollout.num_engines=2"],
    ],
    ids=" ".join,
)
def test_rollouts_from_older_weights_are_possible_with_a_correction(tmp_path: Path, changes: list[str]) -> None:
    validate(parse_config(tree(tmp_path), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["telemetry.mlflow_uri=https://me:hunter2@mlflow.example"],
            r"telemetry.mlflow_uri: holds a user name or password, (?!.*hunter2).*MLFLOW_TRACKING_PASSWORD",
        ),
        (
            ["actor.tensor_parallel=3"],
            r"actor.tensor_parallel: 3 does not divide the model's attention heads \(4\); allowed: 1, 2, 4",
        ),
        (
            ["actor.pipeline_parallel=3"],
            "actor.pipeline_parallel: 4 layers do not divide over 3 stages; actor.first_stage_layers 1 with "
            "actor.last_stage_layers [12] do",
        ),
        (["actor.pipeline_parallel=8"], "4 layers do not divide over 8 stages; at most 4 stages are possible"),
        (
            ["actor.pipeline_parallel=2", "actor.first_stage_layers=3", "actor.last_stage_layers=2"],
            "4 layers do not divide over 2 stages after 5 of the first or last stage; actor.first_stage_layers 2 with",
        ),
        (["actor.last_stage_layers=2"], "actor.last_stage_layers: 2 needs actor.pipeline_parallel of 2 or more"),
        (
            ["actor.pipeline_parallel=2", "actor.virtual_pipeline=4"],
            r"actor.virtual_pipeline: 4 does not divide the layers of every pipeline stage \(2\)",
        ),
        (["actor.expert_tensor_parallel=1"], "actor.expert_tensor_parallel: 1 for a model without experts"),
        (["actor.virtual_pipeline=2"], "actor.virtual_pipeline: 2 needs actor.pipeline_parallel"),
        (["actor.expert_parallel=2"], "actor.expert_parallel: 2 for a model without experts"),
        (["actor.sequence_parallel=true"], "actor.sequence_parallel: true needs actor.tensor_parallel"),
        (["rollout.tensor_parallel=3"], "rollout.tensor_parallel: 3 does not divide"),
        (["rollout.max_response_tokens=4000"], "4512 tokens, the model has positions for 4096"),
        (["loss.kl_clamp=10", "loss.kl_estimator=k2"], "loss.kl_clamp: bounds the estimator k3 alone, found .*: k2"),
        (
            ["loss.dual_clip=3", "loss.objective=gspo"],
            "loss.dual_clip: is a bound of ppo alone, found .*: gspo",
        ),
        (
            ["rollout.top_p=0.9", "rollout.top_k=20"],
            "loss.mismatch_correction: off, but rollout.top_p: 0.9 and rollout.top_k: 20 samples from",
        ),
        (
            ["rollout.max_staleness=2", "rollout.schedule=streaming", "rollout.partial=true"],
            "loss.mismatch_correction: off, but rollout.max_staleness: 2 and rollout.partial: true samples from a "
            "distribution that is not the one that learns; allowed: tis, icepop$",
        ),
        (
            ["rollout.quantization=fp8", "actor.backend=local"],
            "loss.mismatch_correction: off, but rollout.quantization: fp8 samples from",
        ),
        (
            ["rollout.max_staleness=1", "rollout.placement=colocated", "loss.mismatch_correction=tis"],
            "rollout.max_staleness: 1 needs engines that run while actors learn; found .*: colocated",
        ),
        (
            ["rollout.max_staleness=2", "loss.mismatch_correction=tis"],
            "rollout.max_staleness: 2 needs rollout.schedule: streaming; deterministic has 0 and 1",
        ),
        (
            ["rollout.partial=true", "rollout.schedule=streaming", "loss.mismatch_correction=tis"],
            "rollout.partial: true needs .* nothing is in flight when weights change; found streaming and 0",
        ),
        (
            ["rollout.partial=true", "rollout.max_staleness=1", "loss.mismatch_correction=tis"],
            "rollout.partial: true needs .*; found deterministic and 1",
        ),
        (["teacher.engines=1", "rollout.num_engines=2"], "teacher.engines: 1, but method co_rewarding_i keeps no"),
        (
            ["method=co_rewarding_ii", "teacher.engines=2", "rollout.num_engines=2"],
            "teacher.engines: 2 of rollout.num_engines: 2 leave none for the policy; allowed: 0 to 1",
        ),
        (
            ["method=co_rewarding_ii", "teacher.engines=1", "rollout.num_engines=2", "rollout.placement=colocated"],
            "teacher.engines: 1 are for engines with GPUs of their own; found rollout.placement: colocated",
        ),
        (["checkpoint.best_metric=val/avg@8", "validation.samples=greedy"], "best_metric: .*; allowed: val/pass@1$"),
        (["checkpoint.best_metric=val/set/avg@16"], "checkpoint.best_metric: found 'val/set/avg@16'"),
        (["checkpoint.best_metric=val/avg@16"], "checkpoint.best_metric: found 'val/avg@16'.* val/avg@8, "),
        (
            ["checkpoint.best_metric=val/avg@8"],
            "checkpoint.best_metric: val/avg@8 needs data.val_files, none are given",
        ),
        (
            ["loss.views=sum", "data.batch_size=3", "loss.updates_per_batch=2"],
            r"loss.updates_per_batch: 2 does not divide data.batch_size \(3\), so the two views",
        ),
        (["actor.tokens_per_microbatch=1000"], "actor.tokens_per_microbatch: 1000 does not hold one sequence"),
        (
            ["data.batch_size=1", "rollout.n=2", "actor.data_parallel=8"],
            "actor.data_parallel: 8 ranks for a batch of 4",
        ),
        (["loss.updates_per_batch=3"], r"loss.updates_per_batch: 3 does not divide the batch's groups \(256\)"),
        (["data.rephrased_files=[]"], "data.rephrased_files: method co_rewarding_i needs rephrased questions"),
        (["loss.kl_reference=teacher"], "loss.kl_reference: teacher, but method co_rewarding_i keeps none"),
        (["teacher.decay_start=0.99999"], "teacher.decay_start: 0.99999 is above teacher.decay_end"),
        (["actor.min_lr=1"], "actor.min_lr: 1.0 is above actor.lr"),
        (["actor.lr=.inf"], "actor.lr: inf is no finite number"),
        (["sync.max_logprob_gap=1e-4"], "sync.max_logprob_gap: 0.0001 is less than rounding makes of .* bfloat16"),
        (["loss.clip_high=0.1"], "loss.clip_high: 0.1 is below loss.clip_low"),
        (["rollout.votes=7"], r"rollout.votes: found 7; allowed: at least rollout.n \(8\)"),
        (
            ["method=ground_truth", "rollout.votes=16"],
            "rollout.votes: found 16 with method ground_truth; allowed: null, or the methods co_rewarding_i and",
        ),
        (
            ["method=self_certainty", "rollout.votes=16"],
            "allowed: null, or the methods co_rewarding_i and majority_voting alone",
        ),
        (["method=co_rewarding_ii", "rollout.votes=16"], "teacher.n is the number of the teacher's votes"),
        (
            ["actor.router_replay=rollout", "rollout.schedule=streaming"],
            "actor.router_replay: rollout reads .* streaming",
        ),
        (["teacher.early_stop=true"], "teacher.early_stop: true, but method co_rewarding_i keeps no teacher"),
        (["method=co_rewarding_ii", "teacher.early_stop=true"], "teacher.early_stop: true needs rollout.schedule"),
        (
            ["rollout.resample_flat=1", "rollout.max_staleness=1", "loss.mismatch_correction=tis"],
            "rollout.resample_flat: 1 .* found rollout.max_staleness: 1, allowed: 0",
        ),
        (
            ["method=co_rewarding_ii", "rollout.resample_flat=2", "teacher.lookahead=3"],
            "rollout.resample_flat: 2 .* found teacher.lookahead: 3, allowed: 0",
        ),
        (["data.train_files=[nowhere.parquet]"], "data.train_files: nowhere.parquet does not exist"),
        (["data.val_files=[nowhere.parquet]"], "data.val_files: nowhere.parquet does not exist"),
        (["model.hf_path=nowhere"], "model.hf_path: no config.json in nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(parse_config(tree(tmp_path), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["actor.expert_parallel=3", "actor.data_parallel=3"],
            r"actor.expert_parallel: 3 does not divide the model's experts \(4\)",
        ),
        (
            ["actor.expert_parallel=2"],
            r"actor.expert_parallel x actor.expert_tensor_parallel: 2 does not divide the ranks of a pipeline stage, "
            r"tensor x context x data parallel \(1\)",
        ),
        (
            ["actor.tensor_parallel=2", "actor.sequence_parallel=true", "actor.expert_parallel=2"],
            r"actor.expert_parallel x actor.expert_tensor_parallel: 4 does not divide the ranks",
        ),
        (["actor.expert_tensor_parallel=5"], "actor.expert_tensor_parallel: 5 does not divide an expert's feed"),
        (["actor.tensor_parallel=2"], "actor.sequence_parallel: Megatron needs true"),
    ],
)
def test_layouts_of_experts_are_checked(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(parse_config(tree(tmp_path, EXPERTS), changes))


def test_router_replay_needs_experts(tmp_path: Path) -> None:
    replay = ["actor.router_replay=rollout"]
    validate(parse_config(tree(tmp_path, EXPERTS), replay))
    with pytest.raises(InputError, match="actor.router_replay: rollout, but the model has no experts; allowed: off"):
        validate(parse_config(tree(tmp_path), replay))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: qwen2, qwen3, llama, mistral, qwen3_moe"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is true; sliding-window attention is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope scaling of type 'yarn' is not supported; supported: llama3",
        ),
    ],
)
def test_models_that_are_not_supported_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"config.json: {message}"):
        validate(parse_config(tree(tmp_path, DENSE | change)))


def test_experts_may_lie_whole_on_the_tensor_parallel_ranks(tmp_path: Path) -> None:
    layout = ["tensor_parallel=2", "sequence_parallel=true", "expert_parallel=4", "expert_tensor_parallel=1"]
    changes = [f"actor.{change}" for change in (*layout, "data_parallel=2")]
    assert validate(parse_config(tree(tmp_path, EXPERTS), changes)).experts is not None


def test_a_mixture_of_experts_without_a_correction_is_warned_about(tmp_path: Path) -> None:
    def warned(model: dict[str, Any], *changes: str) -> list[str]:
        config = parse_config(tree(tmp_path, model), changes)
        return list(warnings(config, validate(config)))

    (warning,) = warned(EXPERTS)
    assert warning.startswith("loss.mismatch_correction: off for a mixture of experts")
    assert warned(EXPERTS, "loss.mismatch_correction=tis") == warned(DENSE) == []


def test_gspo_with_the_bounds_or_the_aggregation_of_token_ratios_is_warned_about(tmp_path: Path) -> None:
    def warned(*changes: str) -> list[str]:
        config = parse_config(tree(tmp_path), ["loss.objective=gspo", *changes])
        return [warning.partition(":")[0] for warning in warnings(config, validate(config))]

    right = ["loss.clip_low=3e-4", "loss.clip_high=4e-4", "loss.aggregation=seq-mean-token-mean"]
    assert warned() == ["loss.clip_high", "loss.aggregation"]
    assert warned(*right) == []
    assert warned(*right, "loss.aggregation=token-mean") == ["loss.aggregation"]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        validate(parse_config(tree(tmp_path), ["actor.tensor_parallel=3", "rollout.max_response_tokens=4000"]))
    assert str(error.value).count("\n") >= 2


def test_the_command_line_answers_with_status_2_and_the_message_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(parse_config(tree(tmp_path))))
    assert main(["train", str(recipe), "actor.tensor_parallel=3"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: actor.tensor_parallel: 3 does not divide")
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
