"""Cached decoding of many requests together, each with its own adapter; one may join or leave at any step.

A step is one flat batch: the last token of every row that is being answered, and the prompts that have just come in.
Keys and values lie in memory that is there from the start. What a finished request has left in its row serves the next
one that begins alike, such as the next turn of a chat.
"""

from collections import deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from math import isnan
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafleet.errors import AdapterError, ModelError
from lorafleet.generation.request import Request
from lorafleet.lora import Routing, Slots
from lorafleet.lora.packed import PackedWeight, pack
from lorafleet.lora.routing import remember
from lorafleet.models.attention import FLAT, flat_inputs, use_cached_attention
from lorafleet.models.cached_attention import CachedLayout, KeyValueCache
from lorafleet.models.head import few_ids, plain_decoder
from lorafleet.models.lean import lean
from lorafleet.models.load import Base

STEP_TOKENS = 1024
"""Most tokens of prompts that one step reads, so that those who wait for their next token do not wait long."""
_FIRST_CAPACITY = 256


class _Row:
    """A row of the cache: what it holds, and whom it serves."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ids: list[int] = []
        self.owner: Hashable = None
        self.request: Request | None = None

    def common(self, request: Request) -> int:
        """How many tokens of the prompt need not be read again; the last one always is, for its logits."""
        if self.owner != request.owner:
            return 0
        pairs = zip(self.ids, request.prompt[:-1], strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(request.prompt) - 1))


class _Look(NamedTuple):
    """What was found out about a model: whether it decodes in flat batches, and what stands before its head."""

    flat: bool
    body: Callable[..., Any] | None


_KNOWN: WeakKeyDictionary[PreTrainedModel, _Look] = WeakKeyDictionary()


def _looked_at(model: PreTrainedModel, bank: Slots | None) -> _Look:
    """Some runs of the model on a few tokens, once."""
    known = _KNOWN.get(model)
    if known is None or (known.flat and model.config._attn_implementation != FLAT):
        with torch.no_grad(), _without_adapters(bank):
            flat = use_cached_attention(model)
            body = plain_decoder(model) if flat else None
            known = _KNOWN[model] = _Look(flat, body and lean(body))
    return known


def _without_adapters(bank: Slots | None) -> AbstractContextManager[None]:
    try:
        return nullcontext() if bank is None else bank.disabled()
    except AdapterError:
        return nullcontext()  # one is merged, and there is no bare base


class Decoder:
    """Answers requests on one base and its slots.

    Args:
        base: The base.
        bank: Its slots; none for the bare base.
        rows: Requests answered at a time.

    Raises:
        ModelError: The model cannot go on from kept keys and values in flat batches (see :meth:`fits`).
    """

    def __init__(self, base: Base, bank: Slots | None, rows: int) -> None:
        self.base, self.bank, self.model = base, bank, base.model
        if not self.fits(base, bank):
            raise ModelError(f"{type(base.model).__name__} cannot be decoded in flat batches")
        self._body = _looked_at(base.model, bank).body
        self._packed_head: PackedWeight | None = None
        self.rows = [_Row(number) for number in range(rows)]
        self.cache = KeyValueCache(rows, _FIRST_CAPACITY)
        self.waiting: deque[Request] = deque()
        self._routings: dict[object, Routing] = {}

    @staticmethod
    def fits(base: Base, bank: Slots | None) -> bool:
        """Whether base and bank can be decoded so: transformers' attention interface, and no virtual tokens."""
        if bank is not None and bank.padded_model is not None:
            return False
        return _looked_at(base.model, bank).flat

    def speed_up(self) -> None:
        """Prepare for many steps: weights are packed (see ``LoraBank.speed_up``), the output head's too."""
        if self.bank is not None:
            self.bank.speed_up(lambda: self.model(input_ids=few_ids(self.model), use_cache=False), training=False)
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            self._packed_head = pack(head.weight, training=False)

    @property
    def free(self) -> int:
        """Rows that serve nobody."""
        return sum(row.request is None for row in self.rows)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting) or self.free < len(self.rows)

    def submit(self, request: Request) -> None:
        """Put a request behind those that wait; it joins the first step with a free row."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Give a request up, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        for row in self.rows:
            if row.request is request:
                row.request, row.ids = None, []
                self.cache.clear(row.number)  # nobody has looked yet whether what it has read is numbers

    def forget(self, owner: Hashable) -> None:
        """Let nobody go on from what has been read for this owner, who has changed."""
        for row in self.rows:
            if row.owner == owner:
                row.owner = object()

    def step(self) -> list[Request]:
        """Read prompts that have come in, and give every other row its next token.

        Returns:
            The requests that are done.
        """
        failed = self._admit()
        turns = self._turns()
        if not turns:
            return failed
        logits = self._logits(turns)
        ready: list[tuple[int, _Row]] = []  # those whose prompt has been read to its end
        for number, (row, ids) in enumerate(turns):
            row.ids += ids
            if row.request is not None and len(row.ids) == len(row.request.prompt) + len(row.request.answer):
                ready.append((number, row))
        self._choose(logits, ready)
        return failed + [request for _, row in ready if (request := self._leave(row)) is not None]

    def _choose(self, logits: Tensor, ready: list[tuple[int, _Row]]) -> None:
        best, tokens = (found.tolist() for found in logits.max(dim=1))  # not a number if any of them is none
        for number, row in ready:
            request = row.request
            if request is None:  # the callback of one before it has given it up
                continue
            try:
                greedy = request.greedy and not isnan(best[number])
                request.take(tokens[number] if greedy else request.choose(logits[number]))
            except Exception as error:  # of its logits or its caller's callback: told to its caller, the others go on
                request.fail(error)

    def _leave(self, row: _Row) -> Request | None:
        """The row's request if it is done; what the row has read stays for another that begins alike."""
        request = row.request
        if request is None or not request.done:
            return None
        if request.error is not None:
            self.cache.clear(row.number)
            row.ids = []
        row.request = None
        return request

    def _admit(self) -> list[Request]:
        """Give waiting requests the free rows: one that has read the beginning already, else the first.

        Returns:
            Those for whose keys and values there is no memory.
        """
        failed = []
        while self.waiting and (free := [row for row in self.rows if row.request is None]):
            request = self.waiting.popleft()
            try:
                if request.longest > self.cache.capacity:
                    self.cache.grow(max(request.longest, 2 * self.cache.capacity))
            except (MemoryError, RuntimeError) as error:  # torch's for a CPU is a bare RuntimeError
                request.fail(error)
                failed.append(request)
                continue
            row = max(free, key=lambda row: (row.common(request), -row.number))
            row.ids = row.ids[: row.common(request)]
            row.owner, row.request = request.owner, request
        return failed

    def _turns(self) -> list[tuple[_Row, list[int]]]:
        """Each row and the tokens it reads in this step: single ones first, those of one slot side by side."""
        turns, room = [], STEP_TOKENS
        for row in self.rows:
            if row.request is not None:
                new = (row.request.prompt + row.request.answer)[len(row.ids) :]
                if len(new) > 1:
                    new = new[:room]
                    room -= len(new)
                if new:
                    turns.append((row, new, row.request.slot))
        turns.sort(key=lambda turn: (len(turn[1]) > 1, turn[2], turn[0].number))
        return [(row, new) for row, new, _ in turns]

    @torch.no_grad()
    def _logits(self, turns: list[tuple[_Row, list[int]]]) -> Tensor:
        """The logits behind the last token of each turn, ``(turns, vocabulary)``."""
        lengths = [len(ids) for _, ids in turns]
        layout = CachedLayout(self.cache, [row.number for row, _ in turns], [len(row.ids) for row, _ in turns], lengths)
        device = self.base.device
        ids = torch.tensor([[token for _, ids in turns for token in ids]], device=device)
        inputs = flat_inputs(ids, torch.tensor([layout.positions], device=device), layout.to(device))
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        slots = tuple(row.request.slot for row, _ in turns if row.request is not None)
        with self._route(slots, tuple(lengths)):
            if self._body is None:
                return cast(Tensor, self.model(**inputs).logits)[0, ends]
            hidden = self._body(**inputs)[0][0, ends]
        head = self.model.get_output_embeddings()
        if self._packed_head is not None and isinstance(head, nn.Linear):
            return self._packed_head.linear(hidden, head.bias)
        with self._route(slots, (1,) * len(slots)):
            return cast(Tensor, head(hidden))

    def _route(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> AbstractContextManager[None]:
        if self.bank is None:
            return nullcontext()
        key = (slots, lengths)
        routing = self._routings.get(key)  # the same one again lets layers keep their plans
        if routing is None:
            runs = [(s, sum(n for _, n in run)) for s, run in groupby(zip(slots, lengths, strict=True), lambda x: x[0])]
            routing = Routing(tuple(s for s, _ in runs), tuple(n for _, n in runs))
            remember(self._routings, key, routing)
        return self.bank.route(routing)
