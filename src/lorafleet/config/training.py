"""The knobs of training, under Hugging Face's names."""

from typing import Literal

from pydantic import model_validator

from lorafleet.config.knob import Section, knob


class TrainingConfig(Section):
    """How one adapter trains. Every adapter of a population has its own."""

    learning_rate: float = knob(
        2e-4, "Peak learning rate. About ten times that of full fine-tuning suits LoRA.", names=("lr",), gt=0
    )
    loraplus_lr_ratio: float = knob(
        1.0,
        "B's learning rate over A's in linear layers (LoRA+, arXiv 2402.12354); above 1, halve the rate.",
        ge=1,
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = knob("linear", "Course of the rate after warm-up.")
    warmup_ratio: float = knob(0.03, "Share of all steps in which the rate rises from 0.", ge=0, lt=1)
    warmup_steps: int | None = knob(None, "Steps of warm-up; replaces warmup_ratio.", ge=0)
    per_device_train_batch_size: int = knob(8, "Rows in a micro-batch.", names=("micro_batch_size", "batch_size"), ge=1)
    gradient_accumulation_steps: int = knob(1, "Micro-batches in one optimizer step.", ge=1)
    num_train_epochs: float = knob(3.0, "Passes over the rows.", names=("num_epochs", "epochs"), gt=0)
    max_steps: int | None = knob(None, "Optimizer steps; replaces num_train_epochs.", ge=1)
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay.", ge=0)
    adam_beta1: float = knob(0.9, "AdamW's decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = knob(0.999, "AdamW's decay of the second moment.", ge=0, lt=1)
    adam_epsilon: float = knob(1e-8, "AdamW's guard against division by zero.", gt=0)
    max_grad_norm: float = knob(1.0, "Gradients with a larger norm are scaled down to it; 0 turns that off.", ge=0)
    seed: int = knob(42, "Seed of initialisation, shuffle and dropout.", ge=0)


class RunConfig(Section):
    """What one run does around its training: measure, save, log. Shared by a population."""

    output_dir: str = knob(..., "Folder for the adapter, checkpoints, logs and plots.", names=("output",))
    resume_from_checkpoint: str | bool = knob(
        False, "true resumes from the newest checkpoint in output_dir; a path names one.", names=("resume",)
    )
    overwrite: bool = knob(False, "Replace another run in output_dir.", names=("overwrite_output_dir",))
    per_device_eval_batch_size: int = knob(16, "Rows in a batch of evaluation.", names=("eval_batch_size",), ge=1)
    max_eval_rows: int = knob(200, "Held-out rows used for evaluation during and around training.", ge=1)
    save_strategy: Literal["no", "steps", "epoch"] = knob("epoch", "When a checkpoint is saved.")
    save_steps: int = knob(100, "Optimizer steps between checkpoints with save_strategy steps.", ge=1)
    save_total_limit: int = knob(2, "Checkpoints kept; older ones are deleted.", ge=1)
    logging_steps: int = knob(10, "Optimizer steps between progress lines.", ge=1)
    report_to: list[Literal["tensorboard"]] = knob([], "Trackers beside metrics.jsonl.")
    gradient_checkpointing: bool = knob(False, "Recompute activations in the backward pass: less memory, slower.")
    num_threads: int | None = knob(None, "CPU threads; PyTorch's choice when not given.", ge=1)


class PopulationConfig(Section):
    """How many adapters train together."""

    population_size: int | None = knob(
        None,
        "Adapters that train together. By memory and, on a CPU, speed when not given.",
        names=("population",),
        ge=1,
    )
    max_memory: float = knob(0.7, "Part of the free memory that the population may take.", gt=0, le=1)


class ValidationConfig(Section):
    """When an adapter is evaluated while it trains, and what follows from it."""

    eval_strategy: Literal["no", "steps", "epoch"] = knob(
        "epoch", "When the held-out rows are evaluated during training.", names=("evaluation_strategy",)
    )
    eval_steps: int = knob(100, "Optimizer steps between evaluations with eval_strategy steps.", ge=1)
    load_best_model_at_end: bool = knob(
        True, "End with the adapter of the lowest evaluation loss.", names=("keep_best",)
    )
    early_stopping_patience: int | None = knob(None, "Stop after this many evaluations without a lower loss.", ge=1)

    @model_validator(mode="after")
    def _early_stopping_evaluates(self) -> "ValidationConfig":
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs evaluations; set eval_strategy to steps or epoch")
        return self
