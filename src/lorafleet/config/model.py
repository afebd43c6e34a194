"""The knobs that choose and load the base model."""

from typing import Literal

from lorafleet.config.knob import Section, knob


class ModelConfig(Section):
    """Which base model, where it runs, and in which precision."""

    model_name_or_path: str | None = knob(
        None,
        "Base model: a hub id, a local folder, a .gguf file, or smollm2-135m (the demo base, offline). "
        "Where an adapter is given, the base that the adapter names.",
        names=("model", "base_model"),
    )
    revision: str | None = knob(None, "Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "Precision of the base: auto is float32 on CPU, bfloat16 on a GPU that has it.", names=("torch_dtype",)
    )
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps …")
    trust_remote_code: bool = knob(False, "Run Python code that comes with the model. Off unless you trust its author.")
