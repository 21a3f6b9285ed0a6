"""Conversations become prompts through the chat template, or without one through the plain format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jinja2
import numpy as np
import pytest

from megatron_coreward.data.parquet import Message
from megatron_coreward.data.prompts import build_prompts, with_system_prompt
from megatron_coreward.errors import InputError

SYSTEM, USER = Message(role="system", content="Think."), Message(role="user", content="1+1?")


@dataclass
class CharacterTokenizer:
    """One token a character; 0 where it adds its own begin-of-text. Renders with the template as transformers does."""

    chat_template: str | None = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    variables: dict[str, str | bool] = field(default_factory=dict)

    def apply_chat_template(
        self, conversation: list[list[Message]], *, tokenize: bool, add_generation_prompt: bool, **variables: str | bool
    ) -> list[str]:
        assert not tokenize
        assert add_generation_prompt
        self.variables = variables
        assert self.chat_template is not None
        template = jinja2.Environment().from_string(self.chat_template)
        return [template.render(messages=messages, raise_exception=refuse, **variables) for messages in conversation]

    added_tokens_decoder: ClassVar[Mapping[int, Any]] = {}

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        return {"input_ids": [[0] * add_special_tokens + [ord(letter) for letter in one] for one in text]}


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def test_the_template_writes_the_prompt_and_no_special_tokens_are_added() -> None:
    prompts = build_prompts(CharacterTokenizer(), [[SYSTEM, USER], [USER]])
    assert [prompt.text for prompt in prompts] == ["[system]Think.[user]1+1?[assistant]", "[user]1+1?[assistant]"]
    for prompt in prompts:
        assert prompt.token_ids.dtype == np.int32
        assert "".join(map(chr, prompt.token_ids)) == prompt.text


def test_without_a_template_contents_and_blank_lines_follow_the_tokenizers_own_start() -> None:
    (prompt,) = build_prompts(CharacterTokenizer(chat_template=None), [[SYSTEM, USER]])
    assert prompt.text == "Think.\n\n1+1?\n\n"
    assert prompt.token_ids.tolist() == [0, *map(ord, prompt.text)]


def test_a_template_that_writes_the_date_gets_a_fixed_one() -> None:
    tokenizer = CharacterTokenizer("{{ date_string }}:{{ messages[0].content }}")
    assert build_prompts(tokenizer, [[USER]])[0].text == "26 Jul 2024:1+1?"


QWEN3_ENDING = (  # as its template ends
    "{{ messages[0]['content'] }}>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


@pytest.mark.parametrize(("thinking", "ending"), [(None, ""), (True, ""), (False, "<think></think>")])
def test_a_model_that_can_think_is_asked_to_or_not(thinking: bool | None, ending: str) -> None:
    (prompt,) = build_prompts(CharacterTokenizer(QWEN3_ENDING), [[USER]], thinking)
    assert prompt.text == f"{USER['content']}>{ending}"


def test_a_template_that_refuses_system_messages_is_bad_input_that_names_the_way_out() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[assistant]"
    with pytest.raises(InputError, match=r"no system role.*data\.system_prompt"):
        build_prompts(CharacterTokenizer(template), [[SYSTEM, USER]])
    assert build_prompts(CharacterTokenizer(template), [[USER]])[0].text == "[assistant]"


def test_other_errors_of_a_tokenizer_are_left_as_they_are() -> None:
    class Broken(CharacterTokenizer):
        def apply_chat_template(self, *_: object, **__: object) -> list[str]:
            raise MemoryError("theirs")

    with pytest.raises(MemoryError, match="theirs"):
        build_prompts(Broken(), [[USER]])


@pytest.mark.parametrize(
    ("system_prompt", "expected"),
    [(None, ("Think.", "1+1?")), ("", ("1+1?",)), ("Box it.", ("Box it.", "1+1?"))],
)
def test_the_system_prompt_replaces_keeps_or_removes(system_prompt: str | None, expected: tuple[str, ...]) -> None:
    assert tuple(message["content"] for message in with_system_prompt([SYSTEM, USER], system_prompt)) == expected


def test_a_system_prompt_is_added_where_the_file_has_none() -> None:
    assert with_system_prompt([USER], "Box it.") == (Message(role="system", content="Box it."), USER)
    assert with_system_prompt([USER], None) == (USER,)
