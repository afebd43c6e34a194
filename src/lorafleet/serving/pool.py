"""Adapters in slots on one base, switched and mixed while requests run.

    pool = AdapterPool("smollm2-135m", max_adapters=8)
    pool.generate(["Hello", "Hello"], adapters=["tone@prod", None])

Switching is a slot number: the base is never copied or changed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorafleet.config.load import load_sections
from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.serving import PoolConfig
from lorafleet.config.use import GenerationConfig
from lorafleet.errors import AdapterError, ConfigError, LorafleetError, raise_all
from lorafleet.generation.decode import prompt_faults
from lorafleet.generation.decoder import Decoder
from lorafleet.generation.request import Request
from lorafleet.generation.sampling import sampling_keys
from lorafleet.generation.streaming import TextPieces, answer_text
from lorafleet.lora import BASE_ONLY
from lorafleet.models.load import Base, load_base
from lorafleet.serving.residents import Resident, Residents
from lorafleet.serving.source import AdapterSource, Found

Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        adapter: The adapter that answered, ``name:3`` or a folder; none for the base.
        text: The answer.
        tokens: Its length in tokens, the one that ended it left out.
        complete: Whether the model ended it; false where ``max_new_tokens`` cut it.
    """

    adapter: str | None
    text: str
    tokens: int
    complete: bool


@dataclass(eq=False)
class Ticket:
    """A request on its way, and who answers it: settled when it was submitted, whatever its name leads to later."""

    found: Found | None
    request: Request

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.request.done


class AdapterPool:
    """A base and the adapters that serve on it.

    Args:
        model: The base: its name, its knobs, or one that is loaded. A loaded one is changed in place.
        registry: Where names of adapters lead; a folder, or the registry's knobs.
        check_base: Refuse adapters that were trained on another base or tokenizer.
        knobs: Those of :class:`~lorafleet.config.serving.PoolConfig`.

    Attributes:
        default: The adapter of requests that name none; none for the base.

    Raises:
        ConfigError: Knobs are unknown or out of range.
        ModelError: The base cannot be loaded, or cannot decode in flat batches.
    """

    def __init__(
        self,
        model: str | ModelConfig | Base,
        *,
        registry: str | RegistryConfig | None = None,
        check_base: bool = True,
        **knobs: Any,
    ) -> None:
        (self.config,) = load_sections((PoolConfig,), None, knobs)
        if not isinstance(model, Base):
            model = load_base(model if isinstance(model, ModelConfig) else ModelConfig(model_name_or_path=model))
        self.base = model
        where = registry if isinstance(registry, RegistryConfig) else RegistryConfig(registry=registry)
        self.source = AdapterSource(model, where)
        self._residents = Residents(model, self.config.max_adapters, check_base=check_base)
        self._decoder = Decoder(model, self._residents.bank, self.config.max_requests)
        self._decoder.speed_up()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Request, Ticket] = {}
        self.default: str | None = None

    # -- adapters ---------------------------------------------------------------------------------------------------

    @property
    def residents(self) -> list[Resident]:
        """Adapters in memory, the one unused for longest first."""
        return self._residents.list()

    def activate(self, name: str) -> Resident:
        """Bring an adapter in and let it answer requests that name none.

        Raises:
            AdapterError: There is none, it does not fit, or all slots are answering requests.
        """
        resident = self._residents.bring_in(self.source.find(name))
        if resident is None:
            raise AdapterError(f"all {self.config.max_adapters} slots answer requests; raise max_adapters or wait")
        self.default = name
        return resident

    def evict(self, name: str) -> None:
        """Take an adapter out of memory.

        Raises:
            AdapterError: There is none, or it is answering requests.
        """
        self._residents.evict(self.source.find(name))

    def disable(self) -> None:
        """Let the base answer requests that name no adapter."""
        self.default = None

    def scale(self, name: str, factor: float) -> None:
        """Multiply what an adapter adds to the base by ``factor`` from the next step on; 1 is as trained.

        Raises:
            AdapterError: There is no such adapter.
        """
        key = self.source.find(name).key
        if self._residents.scale(key, factor):
            self._decoder.forget(key)

    # -- requests ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | Turns],
        adapters: Sequence[str | None] | str | None = None,
        *,
        system_prompt: str | None = None,
        on_text: Callable[[str], None] | None = None,
        **knobs: Any,
    ) -> list[Reply]:
        """Answer prompts, each with its own adapter, all in the same batches.

        Args:
            prompts: Texts, or conversations of ``{"role": …, "content": …}``.
            adapters: For each prompt a name, alias or folder, none for :attr:`default`, ``"base"`` for the base; or one
                for all.
            system_prompt: For prompts without one; an adapter's own when not given.
            on_text: Called with each piece of text; for a single prompt. What it raises ends that answer.
            knobs: Those of :class:`~lorafleet.config.use.GenerationConfig`.

        Raises:
            ConfigError: Knobs are wrong, or prompts empty or too long; lists all of them.
            AdapterError: Adapters are not there or do not fit; lists all of them.
            ModelError: The logits are not numbers.
        """
        (settings,) = load_sections((GenerationConfig,), None, knobs)
        names = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        if len(names) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts need as many adapters, or one for all; got {len(names)}")
        if on_text is not None and len(prompts) != 1:
            raise ConfigError(f"streaming takes one prompt; got {len(prompts)}")
        tickets = self._tickets(prompts, names, settings, system_prompt, on_text)
        self._waiting += tickets
        with self._cancelling(tickets):
            while not all(ticket.done for ticket in tickets):
                self.step()
        for ticket in tickets:
            if ticket.request.error is not None:
                raise ticket.request.error
        return [self.reply(ticket) for ticket in tickets]

    def submit(
        self,
        prompt: str | Turns,
        adapter: str | None = None,
        *,
        system_prompt: str | None = None,
        on_text: Callable[[str], None] | None = None,
        **knobs: Any,
    ) -> Ticket:
        """Queue one request; :meth:`step` answers it beside all others. See :meth:`generate`."""
        (settings,) = load_sections((GenerationConfig,), None, knobs)
        (ticket,) = self._tickets([prompt], [adapter], settings, system_prompt, on_text)
        self._waiting.append(ticket)
        return ticket

    def step(self) -> list[Ticket]:
        """Give every request in work its next token, and let waiting ones in.

        Returns:
            The tickets that are done; one whose ``request.error`` is set has no whole answer.
        """
        failed = self._admit()
        done = [
            self._running.pop(one) for one in self._decoder.step() if one in self._running
        ]  # not given up meanwhile
        for ticket in done:
            self._release(ticket)
        return [*failed, *done]

    def cancel(self, ticket: Ticket) -> None:
        """Give a request up: it is done, with what has been answered so far."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        elif self._running.pop(ticket.request, None) is not None:
            self._decoder.cancel(ticket.request)
            self._release(ticket)
        ticket.request.done = True

    def reply(self, ticket: Ticket) -> Reply:
        """What has been answered so far."""
        request = ticket.request
        text = answer_text(self.base.tokenizer, request.answer)
        return Reply(ticket.found.label if ticket.found else None, text, len(request.answer), request.complete)

    @contextmanager
    def _cancelling(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """Give up what is left of requests whose caller was interrupted."""
        try:
            yield
        finally:
            for ticket in tickets:
                self.cancel(ticket)

    def _tickets(
        self,
        prompts: Sequence[str | Turns],
        names: Sequence[str | None],
        settings: GenerationConfig,
        system_prompt: str | None,
        on_text: Callable[[str], None] | None,
    ) -> list[Ticket]:
        found, faults = dict[str, Found](), list[str]()
        wanted = [self.default if name is None else name for name in names]
        for name in dict.fromkeys(name for name in wanted if name not in (None, "base")):
            assert name is not None
            try:
                found[name] = self.source.find(name)
            except LorafleetError as error:
                faults.append(str(error))
        raise_all(AdapterError, faults, "adapters are missing")
        who = [found.get(name) if name else None for name in wanted]
        profiles = [self.source.profile(one, system_prompt) for one in who]
        ids = [
            p.encoder.prompt_ids([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
            for p, prompt in zip(profiles, prompts, strict=True)
        ]
        raise_all(ConfigError, prompt_faults(self.base.model, ids, settings), "the prompts cannot be answered")
        owners = [one.key if one else None for one in who]
        pieces = TextPieces(self.base.tokenizer, on_text) if on_text is not None else None
        return [
            Ticket(one, Request(prompt, BASE_ONLY, settings, key, profile.stops, pieces, owner=owner))
            for one, prompt, key, profile, owner in zip(
                who, ids, sampling_keys(settings.seed, ids, owners), profiles, owners, strict=True
            )
        ]

    def _admit(self) -> list[Ticket]:
        """Let waiting requests in, in their order, as long as there are rows and slots for their adapters.

        One whose adapter finds all slots busy waits for the adapter unused for longest, which takes no more requests;
        those behind it may go on with adapters that are there.
        """
        for resident in self.residents:
            resident.leaving = False
        room, kept, failed, blocked = self._decoder.free, deque[Ticket](), [], False
        try:
            while self._waiting and room:
                ticket = self._waiting.popleft()
                kept.append(ticket)
                there = ticket.found is None or ticket.found in self._residents
                try:
                    entered = (there or not blocked) and self._enter(ticket)
                except Exception as error:  # of its files, or of memory: told to its caller, the others go on
                    ticket.request.fail(error)
                    failed.append(kept.pop())
                    continue
                if entered:
                    kept.pop()
                    room -= 1
                else:
                    blocked = blocked or not there
        finally:  # an interrupted load loses nobody
            self._waiting.extendleft(reversed(kept))
        return failed

    def _enter(self, ticket: Ticket) -> bool:
        if ticket.found is not None:
            resident = self._residents.bring_in(ticket.found)
            if resident is None:
                return False
            resident.users += 1
            ticket.request.slot = resident.slot
        self._running[ticket.request] = ticket
        self._decoder.submit(ticket.request)
        return True

    def _release(self, ticket: Ticket) -> None:
        if ticket.found is not None:
            self._residents.release(ticket.found)
