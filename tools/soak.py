"""Kills processes of a training run at random moments, resumes it, and compares it with one that was never interrupted.

python tools/soak.py [--trials 8] [--seed 0] [--victims driver engine ...] [--streaming]
                     [--folder runs/soak] [key=value ...]

`term` is SIGTERM to the driver, which saves and leaves; all others are SIGKILL. Engines and ranks are Ray's workers;
`ray` is one of Ray's own processes. `shard` is a process of an engine with
`rollout.tensor_parallel` of 2 or more. Every trial ends with the same rows of metrics (except times), bit-identical
weights, no process left and no segment of shared memory left, or it has failed and the status is 1. Keys change the
runs (`sync.transport=gloo`).

With --streaming, unfinished responses go on with new weights (`rollout.schedule: streaming`, `rollout.partial`), so
what is sampled depends on when it is sampled, and no two runs are the same. Instead, every question must have been
learnt exactly once an epoch, over the border of an epoch, and no token may be older than `rollout.max_staleness`.

The model, its data and the undisturbed runs are made in the folder or taken from there (give a new one after a change
of the code or the keys). A trial takes about a minute on two idle cores.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_coreward.config.load import dump_config, parse_config
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.telemetry.jsonl import Row, read_rows
from megatron_coreward.telemetry.rollout_dump import read_rollouts, rollouts_path
from megatron_coreward.trainer.staleness import token_ages

MARK = "MEGATRON_COREWARD_SOAK"  # environment variable by which all processes of a run are found, adopted or not
TITLES = {
    "engine": "ray::RolloutWorker",
    "rank": "ray::ActorWorker",
    "ray": "/ray/",  # Ray's own processes, whichever: raylet, GCS, agents, monitors
    "raylet": "raylet",
    "shard": "VLLM::Worker",
}
DEFAULT_VICTIMS = ["driver", "engine", "rank", "ray", "term"]
METHODS = ("co_rewarding_i", "co_rewarding_ii")
QUESTIONS = 64  # of the task: an epoch is 8 steps
# So few sequences at once that sampling takes longer than an update, and is under way when weights change.
STREAMING = (
    *("rollout.schedule=streaming", "rollout.max_staleness=1", "rollout.partial=true", "loss.mismatch_correction=tis"),
    *("rollout.max_num_seqs=2", "steps=10"),
)
START_S = 30.0  # about what starting takes
LIMIT_S = 600.0  # of one attempt


@dataclasses.dataclass
class Attempt:
    """`megatron-coreward train` in a process group of its own."""

    process: subprocess.Popen[str]
    mark: str
    config: RunConfig

    @staticmethod
    def start(config: RunConfig, *, niceness: int = 0) -> "Attempt":
        config.run_dir.mkdir(parents=True, exist_ok=True)
        recipe = config.run_dir.with_suffix(".recipe.yaml")
        recipe.write_text(dump_config(config))
        mark = f"{config.run_dir.name}-{time.monotonic_ns()}"
        environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "megatron_coreward", "train", str(recipe)]
        process = subprocess.Popen(
            ["nice", "-n", str(niceness), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        return Attempt(process, mark, config)

    def processes(self, title: str | None = None) -> list[psutil.Process]:
        """All living processes of the attempt, or those whose command line starts with a title."""
        return [p for p in _alive() if _environment(p).get(MARK) == self.mark and _is_called(p, title)]

    def victims(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            return [p for p in self.processes() if p.pid == self.process.pid]
        return [p for p in self.processes() if TITLES[kind] in " ".join(_command(p)) and p.pid != self.process.pid]

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Ends a process of a kind, the driver with its whole group; False if there is none."""
        if kind == "driver":
            os.killpg(self.process.pid, signal.SIGKILL)
            return True
        if kind == "term":
            os.kill(self.process.pid, signal.SIGTERM)
            return True
        found = self.victims(kind)
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(found).kill()
        return bool(found)

    def wait(self, timeout_s: float = LIMIT_S) -> tuple[int, str]:
        """Exit status and output. The attempt is ended when it takes too long."""
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        return self.process.returncode, output

    def end(self) -> None:
        """Ends whatever is left of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def orphans(self, patience_s: float = 60.0) -> list[str]:
        """Processes that outlive the driver. Ray's own notice on a busy host only after a while that it is gone."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [" ".join(_command(p))[:60] for p in left]


def _alive() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _command(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _is_called(process: psutil.Process, title: str | None) -> bool:
    return title is None or title in " ".join(_command(process))


def leftover_segments() -> list[str]:
    """Segments of shared memory whose owner is gone: nobody holds their lock."""
    found = []
    for path in Path("/dev/shm").glob("megatron_coreward.*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path.name)
    return found


def abandoned_segments() -> set[str]:
    """Segments of shared memory under vLLM's names that no process has mapped."""
    found = {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "vllm_dist_"))}
    for process in _alive():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found = {name for name in found if name not in maps}
    return found


def digest(run_dir: Path) -> str:
    """Of the final model's weights."""
    return hashlib.sha256((run_dir / "hf" / "model.safetensors").read_bytes()).hexdigest()


def comparable(row: Row) -> dict[str, object]:
    """A row of metrics without the times and rates, which no two runs share."""
    return {k: v for k, v in row.items() if "time" not in k and not k.endswith(("_s", "/seconds"))}


def comparable_rows(run_dir: Path) -> list[dict[str, object]]:
    return [comparable(row) for row in read_rows(run_dir / "metrics.jsonl")]


def differences(run_dir: Path, reference: Path) -> Iterator[str]:
    """What a run has otherwise than one that was never interrupted."""
    if digest(run_dir) != digest(reference):
        yield "other weights"
    for expected, found in zip(comparable_rows(reference), comparable_rows(run_dir), strict=True):
        if expected != found:
            keys = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
            yield f"step {found['step']}: {', '.join(keys[:4])} differ"


def streaming_problems(config: RunConfig, num_questions: int) -> Iterator[str]:
    """What a streamed run, which repeats no other, must not have: steps or questions left out or learnt twice, groups
    that are not whole, tokens that are too old."""
    steps, size, most = range(1, config.steps + 1), config.data.batch_size, config.rollout.max_staleness
    rows = [row["step"] for row in read_rows(config.run_dir / "metrics.jsonl")]
    if [step for step in rows if step != 0] != [*steps]:
        yield f"metrics.jsonl: found the steps {rows}; expected each of 1 to {config.steps} once"
    learnt: list[str] = []
    for step in steps:
        path = rollouts_path(config.run_dir, step)
        groups = [item.group for item in read_rollouts(path) if item.rewards is not None] if path.is_file() else []
        asked, different = dict.fromkeys(group.uid for group in groups), {(group.uid, group.view) for group in groups}
        views = len(needs_of(config.method).views)
        if len(asked) != size or not len(different) == len(groups) == size * views:
            yield f"step {step}: {len(groups)} groups of {len(asked)} questions; expected {views} of each of {size}"
        learnt += asked
        completions = [completion for group in groups for completion in group.completions]
        if any(len(group.completions) != config.rollout.num_samples for group in groups):
            yield f"step {step}: a group has not all of its {config.rollout.num_samples} rollouts"
        if any(len(completion.logprobs) != len(completion.token_ids) for completion in completions):
            yield f"step {step}: a rollout has not a log-prob for every token"
        updates = config.loss.updates_per_batch
        ages = token_ages(groups, (step - 1) * updates, updates) if completions else np.zeros(1)
        if not 0 <= ages.min() <= ages.max() <= most:
            yield f"step {step}: tokens are {ages.min():g} to {ages.max():g} steps old; allowed: 0 to {most}"
    for begin in range(0, len(learnt), num_questions):
        epoch = learnt[begin : begin + num_questions]
        if twice := sorted({uid for uid in epoch if epoch.count(uid) > 1}):
            yield f"epoch {begin // num_questions + 1}: learnt more than once: {', '.join(twice[:4])}"


def last_step(run_dir: Path) -> int:
    """The last step with a row; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return int(rows[-1]["step"] or 0) if rows else -1


def make_task(folder: Path) -> None:
    """A tiny model that answers some questions, and the questions."""
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.demo.model import write_model
    from megatron_coreward.demo.task import make_splits, write_parquet
    from megatron_coreward.demo.tokenizer import word_level_tokenizer
    from megatron_coreward.demo.warm_start import warm_start

    folder.mkdir(parents=True, exist_ok=True)
    splits = make_splits(1, num_train=QUESTIONS, num_heldout=16, num_sft=16)
    write_parquet(folder, splits)
    tokenizer = word_level_tokenizer()
    write_model(folder / "random", tokenizer, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=128)
    examples = [*splits.sft] * 8  # sixteen answers, half learnt: rollouts vary, and yet votes and labels meet often
    try:
        warm_start(
            folder / "random",
            folder / "start",
            tokenizer,
            examples,
            max_steps=120,
            seed=1,
            on_step=lambda step, loss: None,
        )
    finally:
        stop_ray()


def task_config(task: Path, run_dir: Path, method: str, *overrides: str) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 6,
        "method": method,
        "model": {"hf_path": str(task / "start"), "dtype": "float32"},
        "data": {
            "train_files": [str(task / "train.parquet")],
            "rephrased_files": [str(task / "train_rephrased.parquet")],
            "val_files": [str(task / "heldout.parquet")],
            "batch_size": 8,
            "max_prompt_tokens": 64,
            "system_prompt": None,
        },
        "actor": {"tensor_parallel": 2, "tokens_per_microbatch": 2048, "lr": 1e-3, "lr_schedule": "constant"},
        "rollout": {"num_engines": 2, "n": 4, "max_response_tokens": 32, "kv_cache_gib": 0.25},
        "teacher": {"n": 4, "decay_start": 0.5},
        "validation": {"every": 3, "max_problems": 8},
        "checkpoint": {"every": 2},
        "faults": {"engine_restarts": 3},
        "watchdog": {"limit_s": 120},
        "telemetry": {"console": "plain"},
    }
    return parse_config(tree, overrides)


@dataclasses.dataclass
class Trial:
    method: str
    victim: str
    after_row: int  # the kill comes once this row is written (0: the validation before training; -1: from the start)
    delay_s: float  # and this much time has passed since
    at_step: int = -1
    statuses: list[int] = dataclasses.field(default_factory=list)
    message: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def run_trial(trial: Trial, config: RunConfig, reference: Path, chance: random.Random, niceness: int) -> None:
    """One kill, and as many attempts as it takes; then what must hold (`differences` or `streaming_problems`)."""
    begin, before = time.monotonic(), abandoned_segments()
    attempt = Attempt.start(config, niceness=niceness)
    while attempt.process.poll() is None and last_step(config.run_dir) < trial.after_row:
        time.sleep(0.05)
    time.sleep(trial.delay_s)
    while attempt.process.poll() is None and not attempt.kill(trial.victim, chance):
        time.sleep(0.2)
    trial.at_step = last_step(config.run_dir)
    for number in range(3):
        try:
            status, output = attempt.wait()
        except subprocess.TimeoutExpired:
            trial.problems.append(f"attempt {number + 1} was not done after {LIMIT_S:.0f} s")
            break
        trial.statuses.append(status)
        before_anything = status == -signal.SIGTERM and last_step(config.run_dir) < 0  # while modules are imported
        if status != -signal.SIGKILL and not before_anything and not (config.run_dir / "hf").is_dir():
            lines = [line for line in output.splitlines() if "the run failed" in line or "stopped by" in line]
            trial.message = lines[-1] if lines else ""
            by_ray = trial.victim in ("ray", "raylet")  # which ends the driver itself, with words of its own
            if not by_ray and (not lines or "the same command" not in lines[-1]):
                trial.problems.append(f"no clear message: ...{output[-300:]!r}")
        if orphans := attempt.orphans():
            trial.problems.append(f"left after attempt {number + 1}: {orphans}")
            attempt.end()
        if (config.run_dir / "hf").is_dir():
            break
        attempt = Attempt.start(config, niceness=niceness)
    trial.seconds = time.monotonic() - begin
    if trial.statuses[-1:] != [0] or not (config.run_dir / "hf").is_dir():
        trial.problems.append(f"did not end well: {trial.statuses}")
        return
    streamed = config.rollout.schedule == "streaming"
    trial.problems += streaming_problems(config, QUESTIONS) if streamed else differences(config.run_dir, reference)
    if left := [*leftover_segments(), *(abandoned_segments() - before)]:
        trial.problems.append(f"shared memory left: {left}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", nargs="+", default=DEFAULT_VICTIMS, choices=["driver", "term", *TITLES])
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--niceness", type=int, default=0)
    parser.add_argument("--streaming", action="store_true", help="check a streamed run, one step ahead, instead")
    options = parser.parse_intermixed_args()
    overrides = [*(STREAMING if options.streaming else ()), *options.overrides]
    kind = "streaming-" if options.streaming else ""
    chance = random.Random(options.seed)
    task = (options.folder / "task").resolve()
    if not (task / "start" / "config.json").is_file():
        make_task(task)

    step_s: dict[str, float] = {}
    references: dict[str, Path] = {}
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for method in METHODS:
        references[method] = (options.folder / f"reference-{kind}{method}").resolve()
        begin = time.monotonic()
        if not (references[method] / "hf").is_dir():
            attempt = Attempt.start(
                task_config(task, references[method], method, *overrides), niceness=options.niceness
            )
            status, output = attempt.wait()
            if status != 0:
                print(output)
                return 1
            print(f"{method} without interruption: {time.monotonic() - begin:.0f} s", flush=True)
        times = [float(row["step_time_s"] or 0) for row in read_rows(references[method] / "metrics.jsonl")]
        step_s[method] = max(times[1:])

    trials = []
    held = "every question once, none too old" if options.streaming else "same metrics, same weights"
    print(
        f"{'trial':>5} {'method':<16} {'victim':<7} {'row':>3} {'+s':>5} {'step':>4} {'statuses':<12} {'s':>4} outcome",
        flush=True,
    )
    for number in range(1, options.trials + 1):
        victim, method = options.victims[(number - 1) % len(options.victims)], METHODS[(number - 1) // 2 % 2]
        run_dir = (options.folder / stamp / f"trial-{number:03d}").resolve()
        config = task_config(task, run_dir, method, *overrides)
        row = chance.randrange(-1, config.steps)
        trial = Trial(method, victim, row, chance.uniform(0, START_S if row < 0 else step_s[method]))
        run_trial(trial, config, references[method], chance, options.niceness)
        trials.append(trial)
        outcome = "; ".join(trial.problems) or held
        if trial.message:
            outcome += f"  [{trial.message}]"
        print(
            f"{number:>5} {method:<16} {victim:<7} {trial.after_row:>3} "
            f"{trial.delay_s:>5.1f} {trial.at_step:>4} {trial.statuses!s:<12} {trial.seconds:>4.0f} {outcome}",
            flush=True,
        )
    failed = sum(bool(trial.problems) for trial in trials)
    print(f"{len(trials) - failed} of {len(trials)} trials: {held}, nothing left behind")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
