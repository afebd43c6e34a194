"""A causal language model as its head and what comes before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def few_ids(model: PreTrainedModel) -> Tensor:
    """Ids ``(1, 5)`` on which a model can be tried."""
    return torch.arange(5, device=next(model.parameters()).device)[None]


def plain_decoder(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The part of the model before its head, if head(decoder(x)) equals the model's logits.

    Some models scale or cap them; then none, and the model's own logits are to be used.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    if decoder is model or head is None:
        return None
    ids = few_ids(model)
    mine = head(decoder(input_ids=ids, use_cache=False)[0])
    wanted = model(input_ids=ids, use_cache=False).logits
    same = mine.shape == wanted.shape
    # On the meta device there are no values to compare.
    return decoder if same and (mine.is_meta or torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4)) else None
