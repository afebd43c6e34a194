"""A pool from knobs."""

from pathlib import Path

from lorafleet.config.model import ModelConfig
from lorafleet.config.registry import RegistryConfig
from lorafleet.config.serving import PoolConfig
from lorafleet.config.use import AdapterConfig
from lorafleet.files.adapter import load_adapter
from lorafleet.generation.adapted import base_of
from lorafleet.registry.use import located
from lorafleet.serving.pool import AdapterPool


def open_pool(model: ModelConfig, adapter: AdapterConfig, registry: RegistryConfig, size: PoolConfig) -> AdapterPool:
    """A pool on the base that is named, else on the one that the adapter was trained on; the adapter is brought in.

    Raises:
        ConfigError: Neither names a base.
        AdapterError: The adapter cannot be used.
        ModelError: The base cannot be loaded, or cannot decode in flat batches.
    """
    folder = located(adapter, registry).adapter
    if folder is not None:
        model = base_of(model, load_adapter(folder), Path(folder))
    pool = AdapterPool(model, registry=registry, check_base=adapter.check_base, **size.model_dump())
    if adapter.adapter is not None:
        pool.activate(adapter.adapter)
        pool.disable()
    return pool
