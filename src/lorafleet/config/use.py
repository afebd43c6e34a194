"""The knobs of using adapters: evaluation, generation, merging."""

from typing import Literal

from pydantic import field_validator

from lorafleet.config.knob import Section, knob


class AdapterConfig(Section):
    """Which adapter to use on the base."""

    adapter: str | None = knob(
        None,
        "Folder of an adapter, or its name in the registry (NAME, NAME:3, NAME@prod); the bare base when not given.",
        names=("adapter_name_or_path",),
    )
    check_base: bool = knob(
        True, "Refuse an adapter that was trained on other base weights or with another tokenizer or chat template."
    )


class PromptConfig(Section):
    """What to answer."""

    prompt: str | list[str] | None = knob(None, "The user's turn; a list gives several prompts.")
    prompts_file: str | None = knob(
        None,
        'A text file with one prompt a line, or a .jsonl file of {"prompt"} or {"messages"} rows.',
        names=("prompts",),
    )
    raw_prompt: bool = knob(False, "Continue the prompt as it is, without the chat template.")
    system_prompt: str | None = knob(None, "System turn before every prompt that has none.")
    chat_template: str | None = knob(
        None, "A Jinja file to use in place of the chat template of the adapter or the model."
    )
    base: bool = knob(False, "Answer with the bare base too, beside the adapter.", names=("with_base",))
    batch_size: int = knob(8, "Prompts answered at a time.", ge=1)

    @field_validator("prompt", mode="after")
    @classmethod
    def _some_prompt(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == []:
            raise ValueError("needs at least one prompt")
        return value


class GenerationConfig(Section):
    """How text is generated."""

    max_new_tokens: int = knob(128, "Longest answer, in tokens.", ge=1)
    temperature: float = knob(0.0, "0 takes the likeliest token; higher is more varied.", ge=0)
    top_p: float = knob(1.0, "Keep the likeliest tokens that reach this probability together.", gt=0, le=1)
    top_k: int = knob(0, "Keep this many of the likeliest tokens; 0 keeps all.", ge=0)
    repetition_penalty: float = knob(1.0, "Above 1 makes tokens that occurred before less likely.", gt=0)
    seed: int = knob(42, "Seed of sampling. A prompt's answer follows from it, whatever else is in the batch.", ge=0)


class EvaluationConfig(Section):
    """What is measured on which rows."""

    split: Literal["test", "valid", "train"] = knob(
        "test", "Which rows to evaluate; valid or train where test is absent."
    )
    batch_size: int = knob(16, "Rows in a batch.", ge=1)
    answers: bool | None = knob(
        None,
        "Generate answers and compare them with the references: exact match, BLEU, chrF, ROUGE-L; on when the rows "
        "carry an answer or references.",
        names=("exact_match",),
    )
    predictions: str | None = knob(None, "Write one JSON line per row with prompt, reference, loss and predictions.")
    base: bool = knob(True, "Measure the base beside the adapter.", names=("with_base",))


class MergeConfig(Section):
    """How merged weights are written."""

    output_dir: str = knob(..., "Folder for the merged model.", names=("output",))
    merge_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "Precision of the written weights; auto keeps that of the base's files."
    )
    overwrite: bool = knob(False, "Replace a model in output_dir.")


class ConvertConfig(Section):
    """How a pickled adapter is written."""

    output_dir: str = knob(..., "Folder for the adapter.", names=("output",))
    adapter_config: str | None = knob(None, "PEFT's adapter_config.json; the one beside the file when not given.")
    base: str | None = knob(None, "The base it was trained on, where the config does not name it.")
