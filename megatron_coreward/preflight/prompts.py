"""The questions: files, pairs, ground truths, and prompts that fit, without tokenising what is short anyway.

A token covers at least one byte, so a prompt of fewer bytes than the limit has fewer tokens: only the others are
rendered and counted, next to one of each kind of conversation. The run itself counts all once more, with transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_coreward.config.methods import method_title, needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.dataset import ProblemSet, data_sets, load_problems
from megatron_coreward.data.parquet import Message
from megatron_coreward.data.question_stream import QuestionStream
from megatron_coreward.data.sampler import BatchOrder
from megatron_coreward.errors import InputError
from megatron_coreward.preflight.tokenizer import FileTokenizer, has_fast_tokenizer

SLACK = 64  # bytes that a template may add beyond twice what it added to the first conversation of a kind


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with training and validation questions."""
    data, needs, title = config.data, needs_of(config.method), method_title(config.method)
    try:
        tokenizer = FileTokenizer(config.model.hf_path) if has_fast_tokenizer(config.model.hf_path) else None
    except InputError:  # said already
        tokenizer = None
    rephrased = data.rephrased_files if "rephrased" in needs.all_views else ()
    train, found = _load(config, "data.train_files", data.train_files, rephrased, tokenizer)
    yield from found
    if train is not None:
        try:
            if needs.ground_truth:
                train = train.with_ground_truth(data.missing_gold, train.missing_in_training(title))
            BatchOrder(len(train), data.batch_size, config.seed, data.shuffle)
            if config.rollout.resample_flat:
                most = data.batch_size * (1 + config.rollout.resample_flat)
                QuestionStream(len(train), most, config.seed, data.shuffle)
        except InputError as error:
            yield str(error)
    held_out = []
    for file in data.val_files:
        questions, found = _load(config, "data.val_files", [file], (), tokenizer)
        yield from found
        if questions is not None:
            held_out.append((file, questions))
            try:
                questions.with_ground_truth(data.missing_gold, questions.missing_in_validation(file))
            except InputError as error:
                yield str(error)
    if len(held_out) == len(data.val_files):
        yield from _best_metric(config, list(data_sets(held_out)))


def _best_metric(config: RunConfig, names: list[str]) -> Iterator[str]:
    """Whether the data set of `checkpoint.best_metric` is one of those that are validated on."""
    best = config.checkpoint.best_metric
    if best is None or not best.startswith("val/") or best.count("/") < 2:
        return
    name, _, score = best.removeprefix("val/").rpartition("/")
    if len(names) < 2:
        yield f"checkpoint.best_metric: found {best!r}, but one validation set has no name; allowed: val/{score}"
    elif name not in names:
        yield (
            f"checkpoint.best_metric: found {best!r}, and no validation set is called {name}; allowed: "
            f"{', '.join(names)}"
        )


def _load(
    config: RunConfig, key: str, files: Sequence[Path], rephrased: Sequence[Path], tokenizer: FileTokenizer | None
) -> tuple[ProblemSet | None, list[str]]:
    if not all(file.is_file() for file in (*files, *rephrased)):
        return None, []  # said already
    data = config.data
    try:
        found = load_problems(
            files,
            rephrased,
            ShortPrompts(tokenizer, data.max_prompt_tokens),
            system_prompt=data.system_prompt,
            max_prompt_tokens=data.max_prompt_tokens,
            over_length=data.over_length,
            unpaired=data.unpaired,
            thinking=data.thinking,
            control_tokens=data.control_tokens,
        )
    except InputError as error:
        message = str(error)
        return None, [message if message.startswith("data.") else f"{key}: {message}"]
    return found, []


class ShortPrompts:
    """A tokenizer that finds the prompts over a limit and gives no tokens for those that cannot be; None: for all."""

    def __init__(self, tokenizer: FileTokenizer | None, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self.chat_template = None if tokenizer is None else tokenizer.chat_template

    def apply_chat_template(
        self, conversation: list[list[Message]], *, tokenize: bool, add_generation_prompt: bool, **variables: str | bool
    ) -> list[str]:
        """The text of conversations that may be over the limit, and nothing for the others."""
        assert self._tokenizer is not None
        options: dict[str, Any] = {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt, **variables}
        added: dict[tuple[str, ...], int] = {}
        texts = []
        for messages in conversation:
            own = sum(len(message["content"].encode()) for message in messages)
            kind = tuple(message["role"] for message in messages)
            if kind in added and own + 2 * added[kind] + SLACK <= self._limit:
                texts.append("")
                continue
            (text,) = self._tokenizer.apply_chat_template([messages], **options)
            added.setdefault(kind, max(0, len(text.encode()) - own))
            texts.append(text)
        return texts

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        return {} if self._tokenizer is None else self._tokenizer.added_tokens_decoder

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        tokens: list[list[int]] = [[] for _ in text]
        if self._tokenizer is not None and split_special_tokens:  # a part of a prompt: all of them count
            return self._tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)
        if self._tokenizer is not None:
            long = [place for place, one in enumerate(text) if len(one.encode()) + SLACK > self._limit]
            counted = self._tokenizer([text[place] for place in long], add_special_tokens=add_special_tokens)
            for place, ids in zip(long, counted["input_ids"], strict=True):
                tokens[place] = ids
        return {"input_ids": tokens}
