"""The knobs of bottleneck adapters."""

from typing import Literal

from lorafleet.config.knob import Section, knob


class BottleneckConfig(Section):
    """A small network behind layers of every block: ``h + W_up·f(W_down·h + b_down) + b_up``, of width m."""

    style: Literal["houlsby", "pfeiffer"] = knob(
        "pfeiffer",
        "Where: houlsby behind attention's and the MLP's last layer (arXiv 1902.00751), pfeiffer behind the MLP's "
        "alone (arXiv 2005.00247).",
    )
    bottleneck_size: int = knob(64, "Width m of the bottleneck.", names=("bottleneck_dim", "adapter_size"), ge=1)
    activation: Literal["gelu", "relu", "silu"] = knob("gelu", "The nonlinearity f.", names=("non_linearity",))
