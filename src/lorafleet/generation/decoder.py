"""Cached decoding of many requests together, each with its own adapter; one may join or leave at any step.

A step is two flat batches: pieces of the prompts that have just come in, and the last token of every row that is being
answered. Keys and values lie in memory that is there from the start. What a finished request has left in its row serves
the next one that begins alike, such as the next turn of a chat.

What layers with slots give a request depends on the others in nothing, after ``speed_up`` not even in rounding where a
CPU's kernels add in one order for any number of rows: single tokens and pieces are different products, and a piece is
by itself in attention and adapters.
"""

from collections import deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, groupby
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
PIECE_TOKENS = 64
"""Tokens of a piece, but for a prompt's last: so much is read alike wherever it is read, and can be kept."""
_FIRST_CAPACITY = 256


class _Row:
    """A row of the cache: what it holds, and whom it serves."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ids: list[int] = []
        self.owner: Hashable = None
        self.request: Request | None = None

    def common(self, request: Request) -> int:
        """How many tokens of the prompt need not be read again, in whole pieces; its end always is, for its logits."""
        if self.owner != request.owner:
            return 0
        pairs = zip(self.ids, request.prompt[:-1], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(request.prompt) - 1))
        return same // PIECE_TOKENS * PIECE_TOKENS


class _Turn(NamedTuple):
    """Tokens that a row reads at once, and the place of the first."""

    row: _Row
    request: Request
    start: int
    ids: list[int]

    @property
    def ends(self) -> bool:
        """Whether the request's next token is known after it."""
        return self.start + len(self.ids) == len(self.request.prompt) + len(self.request.answer)


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
        """Read prompts that have come in, and give every row that has read its own the next token.

        Returns:
            The requests that are done.
        """
        failed = self._admit()
        turns = self._turns()
        logits = [found for some in self._batches(turns) if (found := self._logits(some)) is not None]
        for turn in turns:
            if not turn.ends:
                turn.row.ids += turn.ids
        if logits:
            self._choose(logits[0] if len(logits) == 1 else torch.cat(logits), [turn for turn in turns if turn.ends])
        return failed + self._leave()

    def _choose(self, logits: Tensor, ready: list[_Turn]) -> None:
        best, tokens = (found.tolist() for found in logits.max(dim=1))  # not a number if any of them is none
        for number, turn in enumerate(ready):
            request = turn.request
            if turn.row.request is not request:  # the callback of one before it has given it up
                continue
            try:
                greedy = request.greedy and not isnan(best[number])
                token = tokens[number] if greedy else request.choose(logits[number])
                turn.row.ids += turn.ids  # with its token: whom an interrupt keeps from it reads this again
                request.take(token)
            except Exception as error:  # of its logits or its caller's callback: told to its caller, the others go on
                request.fail(error)

    def _leave(self) -> list[Request]:
        """The requests that are done; the pieces that their rows have read stay for others that begin alike."""
        done = []
        for row in self.rows:
            if (request := row.request) is not None and request.done:
                row.ids = row.ids[: len(request.prompt) // PIECE_TOKENS * PIECE_TOKENS]
                if request.error is not None:
                    self.cache.clear(row.number)
                    row.ids = []
                row.request = None
                done.append(request)
        return done

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

    def _turns(self) -> list[_Turn]:
        """What is read in this step: pieces first, as a prompt's last may be a single token; slots side by side."""
        turns, room = [], STEP_TOKENS
        for row in self.rows:
            if (request := row.request) is None or request.done:  # an interrupt has kept it from leaving
                continue
            ids, begin = request.prompt + request.answer, len(row.ids)
            end = begin
            while (size := min(PIECE_TOKENS, len(ids) - end)) > 0 and (size == 1 or size <= room):
                end += size
                room -= size if size > 1 else 0
            # On a GPU bits depend on the number of rows, and each call costs more than its arithmetic.
            step = PIECE_TOKENS if self.base.device.type == "cpu" else max(1, end - begin)
            turns += [_Turn(row, request, i, ids[i : min(i + step, end)]) for i in range(begin, end, step)]
        return sorted(turns, key=lambda turn: (len(turn.ids) == 1, turn.request.slot, turn.row.number, turn.start))

    @staticmethod
    def _batches(turns: list[_Turn]) -> list[list[_Turn]]:
        return [list(some) for _, some in groupby(turns, key=lambda turn: len(turn.ids) == 1)]

    @torch.no_grad()
    def _logits(self, turns: list[_Turn]) -> Tensor | None:
        """The logits behind those turns that end, ``(those, vocabulary)``; none where none does."""
        lengths = [len(turn.ids) for turn in turns]
        rows, starts = [turn.row.number for turn in turns], [turn.start for turn in turns]
        layout = CachedLayout(self.cache, rows, starts, lengths)
        device = self.base.device
        ids = torch.tensor([[token for turn in turns for token in turn.ids]], device=device)
        inputs = flat_inputs(ids, torch.tensor([layout.positions], device=device), layout.to(device))
        ends = [last - 1 for last, turn in zip(accumulate(lengths), turns, strict=True) if turn.ends]
        slots = tuple(turn.request.slot for turn in turns)
        with self._route(slots, tuple(lengths)):
            found = self.model(**inputs).logits if self._body is None else self._body(**inputs)[0]
        if not ends:
            return None
        found = found[0, torch.tensor(ends, device=device)]
        if self._body is None:
            return cast(Tensor, found)
        head = self.model.get_output_embeddings()
        if self._packed_head is not None and isinstance(head, nn.Linear) and not head._forward_hooks:
            return self._packed_head.linear(found, head.bias, single=True)
        ending = tuple(turn.request.slot for turn in turns if turn.ends)
        with self._route(ending, (1,) * len(ending)):
            return cast(Tensor, head(found))

    def _route(self, slots: tuple[int, ...], lengths: tuple[int, ...]) -> AbstractContextManager[None]:
        if self.bank is None:
            return nullcontext()
        key = (slots, lengths)
        routing = self._routings.get(key)  # the same one again lets layers keep their plans
        if routing is None:
            if lengths[0] > 1:
                routing = Routing(slots, lengths)
            else:
                runs = [(slot, len(list(run))) for slot, run in groupby(slots)]
                routing = Routing(tuple(s for s, _ in runs), tuple(n for _, n in runs), unit="rows")
            remember(self._routings, key, routing)
        return self.bank.route(routing)
