"""The mathematics of LoRA: layers, slots, routing. Plain torch.nn; knows no tokenizer, file or command line."""

from lorafleet.lora.bank import LoraBank
from lorafleet.lora.functional import lora_linear_reference, lora_linears
from lorafleet.lora.inject import inject_lora
from lorafleet.lora.layer import LoraLinear
from lorafleet.lora.routing import BASE_ONLY, Routing, Segment
from lorafleet.lora.segments import LinearTensors, LoraSegment
from lorafleet.lora.slots import SlotParameter, Slots
from lorafleet.lora.targets import find_targets, without_absent

__all__ = [
    "BASE_ONLY",
    "LinearTensors",
    "LoraBank",
    "LoraLinear",
    "LoraSegment",
    "Routing",
    "Segment",
    "SlotParameter",
    "Slots",
    "find_targets",
    "inject_lora",
    "lora_linear_reference",
    "lora_linears",
    "without_absent",
]
