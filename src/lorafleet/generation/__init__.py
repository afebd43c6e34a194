"""Cached decoding of mixed segments: one implementation for evaluation, comparison, chat and serving."""

from lorafleet.generation.decode import generate_ids
from lorafleet.generation.stops import stop_ids
from lorafleet.generation.streaming import answer_text

__all__ = ["answer_text", "generate_ids", "stop_ids"]
