"""The demo's tokenizers give text back as it was, save and load without a network, and spend no token on a space."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_coreward.data.dataset import load_problems
from megatron_coreward.demo.task import make_splits, write_parquet
from megatron_coreward.demo.tokenizer import END, PAD, START, UNKNOWN, byte_level_tokenizer, word_level_tokenizer

WORDS = word_level_tokenizer()
BYTES = byte_level_tokenizer()
SPLITS = make_splits(5, 1000, 100, 1000)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_every_text_of_the_task_comes_back_without_an_unknown_token() -> None:
    texts = [text for question in SPLITS.train for text in (*question.texts.values(), question.sum.response)]
    texts += [text for pair in SPLITS.sft for text in pair]
    for text in texts:
        tokens = ids(WORDS, text)
        assert WORDS.unk_token_id not in tokens, text
        assert WORDS.decode(tokens) == text


@given(number=st.integers(0, 10**6))
def test_a_boxed_number_is_decoded_without_spaces_between_its_digits(number: int) -> None:
    tokens = ids(WORDS, f"68-12=56. \\boxed{{{number}}}{END}")
    text = WORDS.decode(tokens, skip_special_tokens=True)
    assert text == f"68-12=56. \\boxed{{{number}}}"
    assert re.findall(r"\\boxed\{(.*?)\}", text)[-1] == str(number)


def test_a_response_is_decoded_piece_by_piece_as_engines_stream_it() -> None:
    response = SPLITS.train[0].sum.response
    assert "".join(WORDS.decode([token]) for token in ids(WORDS, response)) == response


def test_a_digit_is_one_token_wherever_it_stands() -> None:
    text = "Tom has 23 apples. 23+45=68, \\boxed{23}"
    tokens = WORDS.convert_ids_to_tokens(ids(WORDS, text))
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == list("23234568" + "23")
    assert " " not in tokens


@pytest.mark.long
def test_the_vocabulary_is_small_and_always_the_same() -> None:
    assert len(WORDS) <= 256
    assert len(BYTES) == 256 + 3
    program = "from megatron_coreward.demo.tokenizer import *; print(word_level_tokenizer().backend_tokenizer.to_str())"
    root = Path(__file__).parents[2]
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert run.stdout.strip() == WORDS.backend_tokenizer.to_str()


def test_unknown_text_becomes_the_unknown_token_and_never_fails() -> None:
    tokens = ids(WORDS, "Zebra 7 ∑")
    assert tokens.count(WORDS.unk_token_id) == 2
    assert WORDS.decode(tokens) == f"{UNKNOWN}7 {UNKNOWN}"


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES])
def test_the_chat_template_is_chatml_up_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    colocation = [{"role": "system", "content": "Add."}, {"role": "user", "content": "How many now?"}]
    text = tokenizer.apply_chat_template(colocation[1:], tokenize=False, add_generation_prompt=True)
    assert text == f"{START}user\nHow many now?{END}\n{START}assistant\n"
    whole = tokenizer.apply_chat_template(colocation, tokenize=False)
    assert whole == f"{START}system\nAdd.{END}\n{START}user\nHow many now?{END}\n"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, PAD, None)
    assert tokenizer.convert_tokens_to_ids([PAD, START, END]) == [0, 1, 2]


def test_the_frame_around_a_question_costs_six_tokens() -> None:
    text = SPLITS.train[0].texts["original"]
    framed = WORDS.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    assert len(ids(WORDS, framed)) == len(ids(WORDS, text)) + 6


def test_prompts_and_responses_are_short(tmp_path: Path) -> None:
    files = write_parquet(tmp_path, SPLITS)
    problems = load_problems(
        [files.train], [files.train_rephrased], WORDS, system_prompt=None, max_prompt_tokens=32, over_length="error"
    )
    prompts = [len(prompt.token_ids) for problem in problems for prompt in problem.prompts.values()]
    responses = [len(ids(WORDS, question.sum.response + END)) for question in SPLITS.train]
    for name, sizes in (("prompt", prompts), ("response", responses)):
        print(f"{name} tokens: {min(sizes)} to {max(sizes)}, mean {sum(sizes) / len(sizes):.1f}")
    print(f"vocabulary: {len(WORDS)}")
    assert sum(prompts) / len(prompts) < 30
    assert max(responses) <= 28


@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_bytes_give_any_text_back(text: str) -> None:
    assert BYTES.decode(ids(BYTES, text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES])
def test_a_saved_tokenizer_loads_through_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    colocation = [{"role": "user", "content": SPLITS.train[0].texts["rephrased"]}]
    text = loaded.apply_chat_template(colocation, tokenize=False, add_generation_prompt=True) + "12. \\boxed{37}" + END
    assert ids(loaded, text) == ids(tokenizer, text)
    assert loaded.decode(ids(loaded, text)) == text
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (len(tokenizer), 2, 0)
    assert loaded.chat_template == tokenizer.chat_template
