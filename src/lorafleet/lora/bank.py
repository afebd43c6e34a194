"""All slots of one model: adapters enter, train or serve side by side, and leave."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafleet.config.lora import LoraConfig
from lorafleet.errors import AdapterError, RoutingError
from lorafleet.lora.init import STARTS, Fresh, generator_for, lookup, path_key
from lorafleet.lora.layer import LoraLinear
from lorafleet.lora.packed import mapped_files, page_out
from lorafleet.lora.routing import Router, Routing
from lorafleet.lora.saved import SlotBias, SlotModule
from lorafleet.lora.shared_input import share_inputs
from lorafleet.lora.slot_tensors import file_tensors, fill, trained_parameters
from lorafleet.lora.slots import SlotParameter
from lorafleet.lora.targets import find_saved, find_targets, pattern_value


class LoraBank:
    """The slots of one model, and the routing that its layers follow.

    Made by :func:`inject_lora`. The bank replaces layers of ``model`` in place; the base's weights stay as they are
    and stop requiring gradients.
    """

    padded_model = None
    mixes_slots = True

    def __init__(self, model: nn.Module, num_slots: int) -> None:
        self.model = model
        self.router = Router()
        self.configs: list[LoraConfig | None] = [None] * num_slots
        self.layers: dict[str, LoraLinear] = {}
        self.saved: dict[str, SlotModule] = {}
        self.biases: dict[str, SlotBias] = {}
        self._targets: list[tuple[str, ...]] = [()] * num_slots
        self._found: dict[str, dict[str, nn.Module]] = {}
        self._parents: dict[str, tuple[nn.Module, str]] = {}
        model.requires_grad_(False)

    @property
    def num_slots(self) -> int:
        """Number of slots, filled or not."""
        return len(self.configs)

    def targets(self, slot: int) -> tuple[str, ...]:
        """Paths of the layers that the adapter in ``slot`` adapts."""
        self._filled(slot)
        return self._targets[slot]

    # -- adapters enter and leave ---------------------------------------------------------------------------------

    def reserve(self, configs: Iterable[LoraConfig], num_slots: int = 0) -> None:
        """Make room for adapters like these in this many slots, so that one may enter while others train.

        A layer that has to grow gets new parameters, and whoever trains the old ones would train nothing.

        Raises:
            ConfigError: Targets do not fit the model.
        """
        self._reserve(num_slots)
        for config in configs:
            plain = config.as_plain()
            for path in self.find_targets(config):
                rank = int(pattern_value(plain.rank_pattern, path, plain.r))
                self._layer(path, rank).grow(self.num_slots, rank)

    def find_targets(self, config: LoraConfig) -> dict[str, nn.Module]:
        """The base's layers that an adapter like this would adapt, by path.

        Raises:
            ConfigError: Targets do not fit the model.
        """
        # Adapters of one fleet have the same targets, of hundreds of paths.
        key = config.model_dump_json(exclude=set() if config.takes_off_start else {"r", "lora_alpha", "lora_dropout"})
        if key not in self._found:
            with self._base_view():
                self._found = {key: find_targets(self.model, config)}
        return self._found[key]

    def add(self, config: LoraConfig, *, seed: int = 0, slot: int | None = None) -> int:
        """Put a fresh adapter into a slot; its output equals the base's until it is trained.

        Args:
            config: The adapter's knobs.
            seed: A follows from this and the layer's path alone.
            slot: Which slot; the first free one when not given, a new one when none is free.

        Returns:
            The slot.

        Raises:
            AdapterError: The slot is taken, or the model is merged.
            ConfigError: The targets do not fit the model.
        """
        return self._enter(config, slot, seed)

    def _enter(self, config: LoraConfig, slot: int | None, seed: int | None) -> int:
        """Put an adapter into a slot: one that starts from a seed, or one whose tensors are to be filled in."""
        if self.router.merged_slot is not None:
            raise AdapterError("the model is merged; unmerge before adding an adapter")
        if slot is None:
            slot = self.configs.index(None) if None in self.configs else self.num_slots
        if slot < self.num_slots and self.configs[slot] is not None:
            raise AdapterError(f"slot {slot} holds an adapter; remove it first")
        targets = self.find_targets(config)
        saved: Iterable[str] = ()
        if config.modules_to_save:
            with self._base_view():
                saved = find_saved(self.model, config)
        self._reserve(slot + 1)
        try:
            for path in targets:
                self._fill_layer(path, slot, config, seed)
            for path in saved:
                self._fill_saved(path, slot)
            if config.bias != "none":
                self._fill_biases(slot, config)
        except BaseException:
            self._clear(slot)  # the slot's next adapter would find what this one has left
            raise
        self.configs[slot], self._targets[slot] = config, tuple(targets)
        return slot

    def remove(self, slot: int) -> None:
        """Empty a slot; nothing of its adapter stays behind."""
        self._filled(slot)
        if self.router.merged_slot == slot:
            raise AdapterError(f"slot {slot} is merged; unmerge before removing it")
        self._clear(slot)
        self.configs[slot], self._targets[slot] = None, ()

    def _clear(self, slot: int) -> None:
        for owner in self._owners():
            owner.clear(slot)

    def _filled(self, slot: int) -> LoraConfig:
        config = self.configs[slot] if 0 <= slot < self.num_slots else None
        if config is None:
            taken = [i for i, c in enumerate(self.configs) if c is not None]
            raise AdapterError(f"slot {slot} holds no adapter; filled slots are {taken}")
        return config

    def _reserve(self, num_slots: int) -> None:
        missing = num_slots - self.num_slots
        if missing <= 0:
            return
        self.configs += [None] * missing
        self._targets += [()] * missing
        for layer in self.layers.values():
            layer.grow(num_slots, 0)
        for bias in self.biases.values():
            bias.grow(num_slots)

    @contextmanager
    def _base_view(self) -> Iterator[None]:
        """Show the model as it was before injection, so that targets are found by the base's own paths."""
        wrapped: list[tuple[str, nn.Module]] = [*self.layers.items(), *self.saved.items()]
        for path, module in wrapped:
            self._place(
                path, module.base_layer if isinstance(module, LoraLinear) else cast(SlotModule, module).original
            )
        try:
            yield
        finally:
            for path, module in wrapped:
                self._place(path, module)

    def _place(self, path: str, module: nn.Module) -> None:
        if path not in self._parents:
            parent, _, name = path.rpartition(".")
            self._parents[path] = self.model.get_submodule(parent), name
        setattr(*self._parents[path], module)

    def _fill_layer(self, path: str, slot: int, config: LoraConfig, seed: int | None) -> None:
        rank = int(pattern_value(config.rank_pattern, path, config.r))
        width = 2 * rank if config.takes_off_start else rank
        layer = self._layer(path, width)
        layer.grow(self.num_slots, width)
        scaling = config.scaling(rank, pattern_value(config.alpha_pattern, path, config.lora_alpha))
        layer.fill(slot, rank, scaling, config.lora_dropout)
        if seed is not None or config.takes_off_start:
            fresh = Fresh(*layer.factors(slot), layer.oriented_weight, scaling, generator_for(seed or 0, path))
            start_layer = lookup if layer.embeds and not config.takes_off_start else STARTS[config.init_lora_weights]
            start_layer(fresh)
        if config.takes_off_start:
            layer.take_off_start(slot)
        if config.use_dora:
            layer.learn_magnitude(slot, start=seed is not None)

    def _layer(self, path: str, rank: int) -> LoraLinear:
        """The LoRA layer at a path, made now where there is none."""
        if path not in self.layers:
            base = self.model.get_submodule(path)
            if isinstance(base, SlotModule):
                if base.copies:
                    raise AdapterError(f"{path} is in modules_to_save of another slot; an adapter cannot target it too")
                base = self.saved.pop(path).original  # the last adapter with a copy has left
                self._place(path, base)
            layer = LoraLinear(base, self.num_slots, rank, self.router, path_key(path))
            layer.train(base.training)
            self.layers[path] = layer
            self._place(path, layer)
        return self.layers[path]

    def _fill_saved(self, path: str, slot: int) -> None:
        if path not in self.saved:
            for inner in [one for one in self.layers if f"{one}.".startswith(f"{path}.")]:
                if any(self.layers[inner].ranks) or self.layers[inner].shared_input is not None:
                    raise AdapterError(
                        f"{path} holds layers that another slot adapts; modules_to_save cannot have it too"
                    )
                self._place(inner, self.layers.pop(inner).base_layer)  # the last adapter that adapted it has left
            module = self.model.get_submodule(path)
            self.saved[path] = SlotModule(module, self.router)
            self._place(path, self.saved[path])
        self.saved[path].add(slot)

    def _fill_biases(self, slot: int, config: LoraConfig) -> None:
        for layer in self.layers.values():
            if layer.ranks[slot] or config.bias == "all":
                layer.train_bias(slot)
        if config.bias == "lora_only":
            return
        inside = {id(m) for s in self.saved.values() for m in s.modules()}
        with self._base_view():
            owners = {p: m for p, m in self.model.named_modules() if isinstance(getattr(m, "bias", None), nn.Parameter)}
        for path, owner in owners.items():
            if path in self.layers or id(owner) in inside:
                continue
            if path not in self.biases:
                self.biases[path] = SlotBias(owner, self.num_slots, self.router)
            self.biases[path].slots.add(slot)

    # -- tensors --------------------------------------------------------------------------------------------------

    def slot_parameters(self, slot: int) -> dict[str, SlotParameter]:
        """What training may change for this slot, by a stable name; ``value`` and ``grad`` are views (of Bᵀ for B)."""
        self._filled(slot)
        return trained_parameters(self.layers, self.biases, self.saved, slot)

    def state_dict(self, slot: int) -> dict[str, Tensor]:
        """Copies of the slot's tensors under PEFT's names: A ``(r, in)``, B ``(out, r)``, whole modules, biases."""
        self._filled(slot)
        found = file_tensors(self.layers, self.biases, self.saved, slot)
        return {
            name: (view if base is None else base.to(view.dtype) + view).clone(memory_format=torch.contiguous_format)
            for name, (view, base) in found.items()
        }

    def load_state_dict(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill the slot with an adapter's tensors, named as PEFT names them.

        Raises:
            AdapterError: Tensors are missing, surplus or of the wrong shape; the message lists all of them.
        """
        self._filled(slot)
        fill(file_tensors(self.layers, self.biases, self.saved, slot), tensors, self.layers)

    def load(self, slot: int, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter that was read from a file into a free slot.

        Raises:
            AdapterError: The slot is taken, or the tensors do not fit; the slot stays free then.
            ConfigError: The targets do not fit the model.
        """
        self._enter(config, slot, None)
        try:
            self.load_state_dict(slot, tensors)
        except BaseException:
            self.remove(slot)
            raise

    def rescale(self, slot: int, factor: float) -> None:
        """Multiply what the slot's A and B add by ``factor``; 1 is as trained."""
        config = self._filled(slot)
        for path in self._targets[slot]:
            layer = self.layers[path]
            alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
            layer.rescale(slot, factor * config.scaling(layer.trained_ranks[slot], alpha))

    def virtual_cache(self, rows: int) -> None:
        """None: nothing stands before rows."""

    def clear_gradients(self) -> None:
        """Forget the gradients of all slots."""
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> Iterator[nn.Parameter]:
        for owner in self._owners():
            yield from (p for p in owner.parameters() if p.requires_grad)

    def _owners(self) -> list[LoraLinear | SlotModule | SlotBias]:
        return [*self.layers.values(), *self.saved.values(), *self.biases.values()]

    # -- use ------------------------------------------------------------------------------------------------------

    def route(self, routing: Routing) -> AbstractContextManager[None]:
        """Put a routing in force within a ``with`` block; keep the backward pass inside it.

        Raises:
            RoutingError: A slot holds no adapter, or the model is merged into another slot.
        """
        merged = self.router.merged_slot
        for slot in set(routing.slots) - {-1}:
            if not 0 <= slot < self.num_slots or self.configs[slot] is None:
                raise RoutingError(f"the routing names slot {slot}, which holds no adapter")
        if merged is not None and set(routing.slots) != {merged}:
            raise RoutingError(f"slot {merged} is merged into the base; only it can be used until unmerge")
        return self.router.using(routing)

    def disabled(self) -> AbstractContextManager[None]:
        """Within a ``with`` block the model answers as the bare base.

        Raises:
            AdapterError: An adapter is merged, so there is no bare base.
        """
        if self.router.merged_slot is not None:
            raise AdapterError(f"slot {self.router.merged_slot} is merged into the base; unmerge to use the base alone")
        return self.router.using(self.router.routing, enabled=False)

    def train(self, mode: bool = True) -> None:
        """Turn the dropout of the adapters on or off; the base stays in ``eval()``, its own dropout off."""
        self.model.eval()
        for layer in self.layers.values():
            layer.training = mode

    def drops(self, slot: int) -> bool:
        """Whether the slot's adapter drops inputs now; the base, slot -1, never does."""
        return slot >= 0 and any(layer.training and layer.dropouts[slot] for layer in self.layers.values())

    def eval(self) -> None:
        """Turn the dropout of the adapters off."""
        self.train(False)

    def speed_up(self, run: Callable[[], object], *, training: bool = True) -> None:
        """Prepare for many steps: layers that read the same tensor compute together, frozen weights are packed.

        Packing is for CPUs and costs two more copies of the weights, without training one where few rows have no
        layout of their own; originals that are mapped from a file leave memory until they are read again. Results
        change by rounding, so the bitwise promises hold before this call only.

        Args:
            run: Runs the model once on a few tokens, to see which layers read the same tensor.
            training: Whether gradients will be asked for.
        """
        with torch.no_grad(), self.disabled():
            groups = share_inputs([layer for layer in self.layers.values() if not layer.embeds], run)
        for group in [] if training else groups:
            group.pack()
        joint = {id(layer) for group in groups if group.joint is not None for layer in group.layers}
        files = mapped_files()
        for layer in self.layers.values():
            if id(layer) not in joint:
                layer.pack(training=training)
            if layer.packed is not None or id(layer) in joint:
                page_out(layer.weight, files)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts for ``torch.utils.checkpoint(context_fn=…)``: recomputation re-uses the routing of the forward."""
        router = self.router
        return router.using(router.routing, enabled=router.enabled), router.using(
            router.routing, enabled=router.enabled
        )

    def merge(self, slot: int) -> None:
        """Fold one adapter into the base: ``W = W0 + scaling·B·A``. The original weights are kept for unmerge.

        Raises:
            AdapterError: The slot is empty, or an adapter is merged already.
        """
        self._filled(slot)
        if self.router.merged_slot is not None:
            raise AdapterError(f"slot {self.router.merged_slot} is merged already; unmerge first")
        for layer in self.layers.values():
            if layer.active(slot):
                layer.merge(slot)
        self.router.merged_slot = slot

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            AdapterError: Nothing is merged.
        """
        if self.router.merged_slot is None:
            raise AdapterError("nothing is merged")
        for layer in self.layers.values():
            layer.unmerge()
        self.router.merged_slot = None
