"""Prompts from knobs and files to token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafleet.config.data import DataConfig
from lorafleet.config.use import PromptConfig
from lorafleet.data.encode import ChatEncoder
from lorafleet.errors import ConfigError, DataError, raise_all

_OTHER_FORMATS = (".json", ".csv", ".tsv", ".parquet", ".gz", ".yaml", ".yml")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: turns of ``role`` and ``content``, and where they came from."""

    turns: tuple[dict[str, str], ...]
    place: str

    @property
    def text(self) -> str:
        """The last turn's text."""
        return self.turns[-1]["content"]


def read_prompts(config: PromptConfig) -> list[Prompt]:
    """The prompts that the knobs name.

    Raises:
        ConfigError: Neither or both of ``prompt`` and ``prompts_file`` are given, or the file cannot be read.
        DataError: Rows of the file are no prompts; lists all of them.
    """
    if (config.prompt is None) == (config.prompts_file is None):
        raise ConfigError("give either prompt or prompts_file")
    if config.prompt is not None:
        texts = [config.prompt] if isinstance(config.prompt, str) else config.prompt
        return [Prompt(({"role": "user", "content": text},), f"prompt {i + 1}") for i, text in enumerate(texts)]
    assert config.prompts_file is not None
    path = Path(config.prompts_file).expanduser()
    if path.suffix in _OTHER_FORMATS:
        raise ConfigError(f"prompts_file {path}: prompts are read from text, one a line, or from rows in a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file {path} cannot be read as UTF-8 text: {error}") from error
    prompts, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            prompts.append(Prompt(_turns(line) if path.suffix == ".jsonl" else _user(line), place))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if not prompts and not faults:
        faults.append(f"{path} has no prompts")
    raise_all(DataError, faults, f"{path} has lines that are no prompts")
    return prompts


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: PromptConfig
) -> list[list[int]]:
    """Token ids of prompts: rendered by the chat template up to where the answer begins, or as they are.

    Raises:
        DataError: The template refuses prompts, or raw prompts have several turns; lists all of them.
    """
    faults: list[str] = []
    encoded: list[list[int]] = []
    encoder = (
        None if config.raw_prompt else ChatEncoder(tokenizer, DataConfig(data="", system_prompt=config.system_prompt))
    )
    for prompt in prompts:
        try:
            if encoder is not None:
                encoded.append(encoder.prompt_ids(prompt.turns))
            elif len(prompt.turns) > 1 or config.system_prompt is not None:
                faults.append(f"{prompt.place}: a raw prompt is one text, without turns or a system prompt")
            else:
                encoded.append(list(tokenizer(prompt.text).input_ids))
        except DataError as error:
            faults.append(f"{prompt.place}: {error}")
    raise_all(DataError, faults, "prompts cannot be used")
    return encoded


def _user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _turns(line: str) -> tuple[dict[str, str], ...]:
    """The turns of one JSON row; the reason as ``ValueError`` when it is no prompt."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no valid JSON: {error}") from error
    if not isinstance(row, dict) or not {"prompt", "messages"} & set(row):
        raise ValueError('expected {"prompt": text} or {"messages": [{"role": …, "content": …}]}')
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise ValueError("prompt must be text")
        return _user(row["prompt"])
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise ValueError(f"messages must be a list of turns with a role ({', '.join(_ROLES)}) and a text as content")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
    # The answer that a row of training data ends with is what the model is asked for.
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not asked:
        raise ValueError("messages has an answer only")
    return asked


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)
