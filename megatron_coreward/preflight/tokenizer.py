"""A tokenizer straight from its files, for counting tokens before a run: transformers' own takes seconds to import.

It renders the chat template as transformers does (the same sandboxed Jinja with the same settings) and tokenises with
the same library. The run's prompts come from transformers; a test holds that both agree.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_coreward.data.parquet import Message
from megatron_coreward.errors import InputError

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks the assistant's turns; changes no text


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def has_fast_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


class FileTokenizer:
    """What `data.prompts.build_prompts` needs of a tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if a file or the chat template is damaged."""
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            self._tokens = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{file}: not a tokenizer ({error})") from None
        config = read_json(folder / "tokenizer_config.json")
        special = {name: value for name, value in config.items() if name.endswith("_token")}
        self.special: dict[str, str] = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in special.items()
            if isinstance(value, str) or (isinstance(value, dict) and "content" in value)
        }
        self.chat_template = _template_text(folder, config)
        self._template = None if self.chat_template is None else _compile(folder, self.chat_template)

    @property
    def num_ids(self) -> int:
        """The largest token id plus one."""
        return max(self._tokens.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, text: str) -> int | None:
        found: int | None = self._tokens.token_to_id(text)
        return found

    def apply_chat_template(
        self, conversation: list[list[Message]], *, tokenize: bool, add_generation_prompt: bool, **variables: str | bool
    ) -> list[str]:
        """See `data.prompts.Tokenizer`."""
        if tokenize or self._template is None:
            raise ValueError("this tokenizer renders text, and only if there is a template")
        return [
            self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
                **variables,
            )
            for messages in conversation
        ]

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """See `data.prompts.Tokenizer`."""
        decoder: Mapping[int, Any] = self._tokens.get_added_tokens_decoder()
        return decoder

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        """See `data.prompts.Tokenizer`."""
        self._tokens.encode_special_tokens = split_special_tokens
        encoded = self._tokens.encode_batch(text, add_special_tokens=add_special_tokens)
        return {"input_ids": [list(entry.ids) for entry in encoded]}


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template has no entry named default")
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}; allowed: a string"
        )
    return template


def _compile(folder: Path, text: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "26 Jul 2024"
    try:
        return environment.from_string(_GENERATION.sub("", text))
    except TemplateError as error:
        raise InputError(f"{folder}: the tokenizer's chat template is damaged ({error})") from None
