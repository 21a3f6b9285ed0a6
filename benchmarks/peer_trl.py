"""The work of bench_step.py in TRL's GRPOTrainer, for comparison. Needs the package trl (and accelerate, datasets).

    OMP_NUM_THREADS=2 python benchmarks/peer_trl.py [--steps 6] [--long-tailed] [--micro-batch 32]

By default responses are cut off at 64 tokens, which nearly all of them reach. With `--long-tailed` lengths are those of
the model of long_tailed.py, of 12 tokens and of 20 times as many in the mean, cut off at 384.

`--micro-batch` is what the trainer computes at once, of the 256 samples of a step; by default all of them.

Prints one JSON object: the median seconds of a step, samples a second. Run both scripts in one go on one machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_tailed import write_long_tailed_model
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 8, 32, 64
LONG_RESPONSE_TOKENS, MEAN_TOKENS = 384, 12  # with --long-tailed


class StepTimes(TrainerCallback):
    """Wall time of every optimizer step with the rollouts before it."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter() - self._begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--long-tailed", action="store_true")
    parser.add_argument("--micro-batch", type=int, default=PROMPTS * SAMPLES)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    prompts = ["".join(chr(65 + i) for i in rng.integers(0, 26, PROMPT_TOKENS)) for _ in range(PROMPTS * 64)]
    with tempfile.TemporaryDirectory() as folder:
        if options.long_tailed:
            write_long_tailed_model(Path(folder) / "model", MEAN_TOKENS)
        else:
            write_model(Path(folder) / "model", byte_level_tokenizer())

        def reward(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
            lengths.extend(map(len, completion_ids))
            return rng.random(len(completions)).tolist()

        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
        config = GRPOConfig(
            output_dir=str(Path(folder) / "run"),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=PROMPTS * SAMPLES // options.micro_batch,
            num_generations=SAMPLES,
            max_completion_length=LONG_RESPONSE_TOKENS if options.long_tailed else RESPONSE_TOKENS,
            max_steps=options.steps + 1,
            beta=0.0,
            learning_rate=3e-6,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        clock = StepTimes()
        trainer = GRPOTrainer(
            model=model,
            args=config,
            processing_class=AutoTokenizer.from_pretrained(Path(folder) / "model"),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[clock],
        )
        trainer.train()
    step = statistics.median(clock.times[1:])
    found = {
        "step_s": step,
        "samples_per_s": PROMPTS * SAMPLES / step,
        "response_tokens_mean": statistics.fmean(lengths),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
