"""vLLM loads a demo directory and gives back the text that the demo's tokenizer reads in the tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import word_level_tokenizer

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    directory, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=directory, dtype="float32", max_model_len=64, max_num_seqs=8, enforce_eager=True)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=16, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    print("ANSWERS", json.dumps([[list(o.outputs[0].token_ids), o.outputs[0].text] for o in outputs]))
"""


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(560)
def test_vllm_generates_what_the_tokenizer_decodes(tmp_path: Path) -> None:
    tokenizer = word_level_tokenizer()
    directory = write_model(tmp_path / "model", tokenizer, pad_vocab_to=1)
    texts = ["Tom has 23 apples. Tom finds 45, then loses 12. How many now?", "Bill of 23. \\boxed{"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    program = tmp_path / "generate.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, str(program), str(directory), json.dumps(prompts)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    answers = json.loads(line.removeprefix("ANSWERS "))
    assert len(answers) == len(prompts)
    for tokens, text in answers:
        assert len(tokens) == 16
        assert len(set(tokens)) > 4
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
