"""The knobs of a fleet."""

from typing import Literal

from lorafleet.config.combine import Combination
from lorafleet.config.knob import Section, knob

Rival = Literal["base", "shared", "prod"]
Score = Literal["loss", "perplexity", "accuracy", "macro_f1"]
OF_LABELS = frozenset({"accuracy", "macro_f1"})
"""Scores that only rows with labels have."""


FLEET_DEFAULTS = {"save_strategy": "steps"}
"""Small members end an epoch every few steps, each at another one, and a checkpoint holds all of them."""


class FleetConfig(Section):
    """What a fleet does with its adapters."""

    alias: str = knob("prod", "The alias that adapters get which pass their gate.")
    keep: bool = knob(True, "Keep every adapter in the registry: those that pass, and those that do not.")
    shared: Literal["auto", "none", "plain", "keyed", "both"] = knob(
        "auto",
        "Train one adapter on everybody's rows too, to compare with: plain, with the user's key in the prompt (keyed), "
        "or both; on the mixture of tasks, plain. auto: both for users, none for tasks.",
    )
    mixture: Literal["proportional", "equal", "temperature"] = knob(
        "proportional", "How often each task comes in a shared adapter's epoch; proportional is by its rows."
    )
    mixture_temperature: float = knob(2.0, "Of mixture temperature: 1 is proportional, large is equal.", ge=1)
    combine: list[Combination] = knob(
        [], "Combine the tasks' adapters too, in equal shares, to compare with: cat, svd, linear, ties, dare_ties …"
    )
    warm_start: bool = knob(False, "Start each adapter from the shared one (plain) instead of from zero.")


class UsersConfig(Section):
    """One adapter for each user of a file."""

    data: str = knob(..., "Rows of all users: a file, or a folder with train and test.")
    key: str = knob("user", "The field that says whose a row is.")
    min_rows: int = knob(2, "Training rows that a user needs; those with fewer are left out, with the reason.", ge=1)
    held_out: float = knob(0.2, "Share of each user's rows that is held out, where there is no test file.", gt=0, lt=1)
    max_users: int | None = knob(None, "Use only the first N users, in the order of the file.", ge=1)


class GateConfig(Section):
    """What an adapter must reach on its held-out rows before its alias moves."""

    at_least: dict[Score, float] = knob({}, "Smallest values of its scores, such as {accuracy: 0.8}.")
    at_most: dict[Score, float] = knob({}, "Largest values of its scores, such as {loss: 1.5}.")
    better_than: list[Rival] = knob([], "Whom it must beat by more than chance: base, shared, prod.")
    not_worse_than: list[Rival] = knob(["base"], "Whom it must not fall behind by more than chance.")
    metric: Literal["auto", "loss", "accuracy"] = knob(
        "auto", "By what it is compared with them; auto: accuracy for rows with labels, else loss."
    )
    significance: float = knob(0.05, "How often chance alone may make such a difference.", ge=0.005, lt=1)
    max_forgetting: float | None = knob(
        None, "Largest rise of the loss on a general text (sample:general_chat), in nats a token.", ge=0
    )
    max_megabytes: float | None = knob(None, "Largest size of its weights, in MB.", gt=0)
    deployable: list[Literal["peft", "vllm", "llama.cpp"]] = knob([], "Runtimes that must be able to serve it.")
