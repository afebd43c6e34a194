"""Search spaces that ship with lorafleet, in the same words as a user's own."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The grid that guides show: rank against alpha, 16 settings.
    "classic": {"r": [4, 8, 16, 32], "lora_alpha": [16, 32, 64, 128]},
    # The same with all that guides name besides: 160 settings.
    "wide": {
        "r": [4, 8, 16, 32, 64],
        "lora_alpha": [16, 32, 64, 128],
        "lora_dropout": [0.0, 0.05, 0.1, 0.3],
        "target_modules": ["attention", "all-linear"],
    },
    # What research found to matter, in its order ("LoRA Without Regret", 2025): the learning rate first, over all
    # linear layers; then the rank, at a fixed alpha/r, which leaves the best rate where it is.
    "recommended": {
        "learning_rate": {"log": [5e-5, 5e-3]},
        "linked": [[{"r": r, "lora_alpha": 2.0 * r} for r in (4, 8, 16, 32)]],
    },
}
