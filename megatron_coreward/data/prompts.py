"""From conversations to prompts: the tokenizer's chat template, then its tokens.

A prompt is a pure function of the conversation and the tokenizer files, so a resumed run sees the same tokens on any
day; the token ids, not the text, are what the policy and the rollout engines both get.

Control tokens (`<|im_end|>`, `<|eot_id|>`, ...) are the template's alone. A message that holds the text of one, by
which a question could end its own message and write the assistant's, gets the tokens of that text and not the control
token (`control_tokens`; `special` is for data that is rendered already).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from megatron_coreward.data import control_tokens as control
from megatron_coreward.data.parquet import Message
from megatron_coreward.errors import InputError
from megatron_coreward.types import Prompt

# Llama 3.2's template writes the current date into the prompt unless it is given one. This is the date that the
# template itself falls back to.
TEMPLATE_VARIABLES: Mapping[str, str] = {"date_string": "26 Jul 2024"}


class Tokenizer(Protocol):
    """What prompts need of a tokenizer; transformers' fast tokenizers have it."""

    @property
    def chat_template(self) -> Any: ...  # None: the tokenizer has none

    def apply_chat_template(
        self, conversation: list[list[Message]], *, tokenize: bool, add_generation_prompt: bool, **variables: str | bool
    ) -> list[str]:
        """The text of each conversation (with `tokenize=False`)."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Id to added token, which has its text as `content`, and `special` if it is one for control."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        """The tokens of each text under the key `input_ids`; with `split_special_tokens` none is a control token."""


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """The conversation with its system message replaced; None keeps what is there, an empty string removes it."""
    if system_prompt is None:
        return tuple(messages)
    others = tuple(message for message in messages if message["role"] != "system")
    return (Message(role="system", content=system_prompt), *others) if system_prompt else others


def build_prompts(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    thinking: bool | None = None,
    control_tokens: Literal["text", "special"] = "text",
) -> list[Prompt]:
    """Renders and tokenises conversations in one batch, each up to where the assistant's answer starts.

    A template writes all its special tokens into the text, so none are added to that. A tokenizer without a template
    (a base model) gets the messages' contents, each followed by a blank line, and the special tokens that it itself
    puts around a text (such as Llama's begin-of-text).

    `thinking` is what a template of a model with a thinking mode calls `enable_thinking` (Qwen3's); None leaves it to
    the template. Others do not read it. `control_tokens` says what the text of a control token within a message is.

    Raises InputError if the template refuses a conversation, as some do with system messages.
    """
    ids = control.control_ids(tokenizer.added_tokens_decoder) if control_tokens == "text" else {}
    messages = [list(conversation) for conversation in conversations]
    masks = control.Masks(ids, [message["content"] for conversation in messages for message in conversation])
    masked = [[Message(role=m["role"], content=masks.hide(m["content"])) for m in one] for one in messages]
    if tokenizer.chat_template is None:
        texts = ["".join(f"{message['content']}\n\n" for message in conversation) for conversation in masked]
    else:
        texts = _render(tokenizer, masked, thinking)
    add = tokenizer.chat_template is None
    tokens = [*tokenizer([masks.show(text) for text in texts], add_special_tokens=add)["input_ids"]]
    for place, text in enumerate(texts):
        if masks.used_in(text):
            tokens[place] = _with_control_tokens_as_text(tokenizer, masks.split(text), add)
    return [
        Prompt(masks.show(text), np.array(token_ids, dtype=np.int32))
        for text, token_ids in zip(texts, tokens, strict=True)
    ]


def _with_control_tokens_as_text(
    tokenizer: Tokenizer, parts: Sequence[str | int], add_special_tokens: bool
) -> list[int]:
    """The tokens of a text that is cut at the template's control tokens, as a tokenizer itself cuts it."""
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        elif part:
            (own,) = tokenizer([part], add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
            tokens += own
    return tokens


def _render(tokenizer: Tokenizer, conversations: list[list[Message]], thinking: bool | None) -> list[str]:
    variables: dict[str, str | bool] = {**TEMPLATE_VARIABLES}
    if thinking is not None:
        variables["enable_thinking"] = thinking
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True, **variables)
    except Exception as error:
        # jinja2 comes with transformers, which this layer does without: its errors are known by their module.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise InputError(
            f"the tokenizer's chat template refused a conversation ({error}); allowed: messages that it knows. "
            "An empty data.system_prompt renders without a system message"
        ) from error
