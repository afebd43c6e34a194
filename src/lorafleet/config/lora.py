"""The knobs of one LoRA adapter, under PEFT's names."""

import re
from typing import Literal

from pydantic import field_validator, model_validator

from lorafleet.config.knob import Section, knob


class LoraConfig(Section):
    """What one adapter looks like: ``ΔW = scaling · B · A`` (Hu et al. 2021, arXiv 2106.09685).

    ``scaling`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (arXiv 2312.03732).
    """

    r: int = knob(
        8, "Rank of the update. 8 suffices for most tasks.", names=("lora_r", "lora_rank", "rank"), ge=1, le=4096
    )
    lora_alpha: float = knob(
        16.0, "Scale numerator: ΔW = (lora_alpha / r)·B·A. 2·r is a common start.", names=("alpha",), gt=0
    )
    lora_dropout: float = knob(
        0.0, "Probability of dropping an input feature of A, in training only.", names=("dropout",), ge=0, lt=1
    )
    target_modules: str | list[str] = knob(
        "all-linear",
        "Layers to adapt: names, suffixes, one regex, or all-linear, attention, mlp; the tokens' embedding by name. "
        "All linear layers beat attention alone at equal parameters.",
        names=("lora_target_modules", "lora_target"),
    )
    exclude_modules: list[str] = knob([], "Names, suffixes or regexes of layers not to adapt.")
    layers_to_transform: list[int] | None = knob(None, "Indices of the layers to adapt; all when not given.")
    rank_pattern: dict[str, int] = knob({}, "Rank for modules whose name matches a key, for example {q_proj: 16}.")
    alpha_pattern: dict[str, float] = knob({}, "lora_alpha for modules whose name matches a key.")
    use_rslora: bool = knob(False, "Scale by lora_alpha / sqrt(r), which keeps high ranks stable.")
    use_dora: bool = knob(
        False, "Learn the length of each row of W beside its direction (DoRA, arXiv 2402.09353): slower, not for vLLM."
    )
    bias: Literal["none", "all", "lora_only"] = knob("none", "Which biases to train beside A and B.")
    modules_to_save: list[str] = knob(
        [], "Modules to train whole and save with the adapter, for example lm_head.", names=("additional_target",)
    )
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = knob(
        "default",
        "Start: default (A Kaiming uniform, B zero), gaussian (A with std 1/r, B zero), pissa (W0's largest singular "
        "values, arXiv 2404.02948) or olora (W0's QR, arXiv 2406.01775); these two are saved as plain LoRA of rank 2r.",
    )

    @field_validator("target_modules", mode="after")
    @classmethod
    def _one_spelling(cls, value: str | list[str]) -> str | list[str]:
        if value in ("all", ["all"], ["all-linear"]):
            return "all-linear"
        if value in (["attention"], ["mlp"]):
            return value[0]
        return value

    @model_validator(mode="after")
    def _positive_patterns(self) -> "LoraConfig":
        bad = [k for k, v in [*self.rank_pattern.items(), *self.alpha_pattern.items()] if v <= 0]
        if bad:
            raise ValueError(f"rank_pattern and alpha_pattern need values above 0; see {', '.join(bad)}")
        return self

    @model_validator(mode="after")
    def _regexes_compile(self) -> "LoraConfig":
        targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        lists = {"target_modules": targets, "exclude_modules": self.exclude_modules}
        lists |= {"rank_pattern": list(self.rank_pattern), "alpha_pattern": list(self.alpha_pattern)}
        faults = [fault for knob_name, names in lists.items() for name in names if (fault := _fault(knob_name, name))]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def takes_off_start(self) -> bool:
        """Whether A and B start away from zero, so that ``ΔW = s·(B·A - B₀·A₀)`` with a frozen copy of the start."""
        return self.init_lora_weights in ("pissa", "olora")

    def as_plain(self) -> "LoraConfig":
        """The same adapter as plain LoRA: ``B·A - B₀·A₀ = [B, -B₀]·[A; A₀]`` has twice the rank and the same scale."""
        if not self.takes_off_start:
            return self
        factor = 2**0.5 if self.use_rslora else 2
        return self.model_copy(
            update={
                "r": 2 * self.r,
                "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
                "lora_alpha": factor * self.lora_alpha,
                "alpha_pattern": {name: factor * alpha for name, alpha in self.alpha_pattern.items()},
                "init_lora_weights": "default",
            }
        )

    def scaling(self, r: int, alpha: float) -> float:
        """The effective scale of a module with this rank and alpha."""
        return alpha / r**0.5 if self.use_rslora else alpha / r


def _fault(knob_name: str, pattern: str) -> str | None:
    """Why a pattern is no regex; none where it is one."""
    try:
        re.compile(rf"(.*\.)?({pattern})$" if knob_name.endswith("_pattern") else pattern)
    except (re.error, OverflowError, RecursionError) as error:
        hint = f"; a wildcard is written .* ({pattern.replace('*', '.*')})" if pattern.startswith("*") else ""
        return f"{knob_name}: {pattern!r} is no valid regex: {error}{hint}"
    return None
