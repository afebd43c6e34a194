"""The registry's files in a store that speaks S3 over HTTP, and to which others write as well."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from lorafleet.errors import RegistryError
from lorafleet.files.adapter import load_adapter
from lorafleet.registry.registry import Registry
from lorafleet.registry.upkeep import gc, verify
from tests.registry.adapters import adapter_folder
from tests.registry.postgres import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    address = f"http://127.0.0.1:{free_port()}"
    secrets = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (secrets | {"AWS_ENDPOINT_URL": address}).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-p", address.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(address, process)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urlopen(f"{address}/moto-api/").close()
            return
        except URLError:
            assert process.poll() is None, "the store did not start"
            time.sleep(0.1)
    raise AssertionError("the store does not answer")


@pytest.fixture
def others(store: subprocess.Popen[bytes]) -> Any:
    """The store as another process sees it, with a bucket made in it."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # of a store that is gone
    found = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    found.mkdir("bucket")
    return found


@pytest.fixture
def registry(others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("LORAFLEET_CACHE", str(tmp_path / "cache"))
    return Registry("s3://bucket/adapters", f"sqlite:///{tmp_path}/meta.db", create=True)


def test_an_adapter_comes_back_and_another_is_deleted(registry: Registry, tmp_path: Path) -> None:
    kept = registry.add(adapter_folder(tmp_path / "run"), "reviews")
    registry.promote("reviews:1")
    registry.add(adapter_folder(tmp_path / "other", 1), "reviews")
    assert verify(registry).versions == 2
    assert gc(registry, ["reviews:2"]).versions == ("reviews:2",)
    assert registry.blobs.sizes().keys() == set(kept.files.values())
    assert load_adapter(registry.folder(registry.find("reviews@prod"))).config.r == 2


def test_what_others_delete_is_seen_and_written_again(registry: Registry, others: Any, tmp_path: Path) -> None:
    version = registry.add(adapter_folder(tmp_path / "run"), "reviews")
    weights = version.files["adapter_model.safetensors"]
    assert weights in registry.blobs.sizes()  # a listing that must not be kept
    others.rm_file(f"bucket/adapters/blobs/{weights}")
    assert not registry.blobs.has(weights)
    with pytest.raises(RegistryError, match=r"adapter_model.safetensors of revision .* is missing"):
        verify(registry)
    registry.add(adapter_folder(tmp_path / "run"), "reviews")
    assert verify(registry).versions == 1


def test_a_file_that_was_damaged_is_written_again(registry: Registry, others: Any, tmp_path: Path) -> None:
    version = registry.add(adapter_folder(tmp_path / "run"), "reviews")
    path = f"bucket/adapters/blobs/{version.files['adapter_model.safetensors']}"
    others.pipe_file(path, b"x" + others.cat_file(path)[1:])
    with pytest.raises(RegistryError, match="add the adapter again to mend it"):
        verify(registry)
    registry.add(tmp_path / "run", "reviews")
    verify(registry)


def test_files_of_another_registry_are_left_alone(registry: Registry, tmp_path: Path) -> None:
    version = registry.add(adapter_folder(tmp_path / "run"), "reviews")
    with pytest.raises(RegistryError, match="give the registry_database that goes with the registry"):
        gc(Registry("s3://bucket/adapters", f"sqlite:///{tmp_path}/typo.db", create=True))
    assert registry.blobs.sizes().keys() == set(version.files.values())


def test_what_others_put_is_seen(registry: Registry, others: Any) -> None:
    registry.blobs.put("a" * 64, b"first")
    assert registry.blobs.sizes() == {"a" * 64: 5}
    others.pipe_file(f"bucket/adapters/blobs/{'b' * 64}", b"second")
    assert registry.blobs.has("b" * 64)
    assert registry.blobs.sizes() == {"a" * 64: 5, "b" * 64: 6}


def test_a_store_that_is_gone_is_an_error_of_the_registry(
    registry: Registry, store: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    registry.add(adapter_folder(tmp_path / "run"), "reviews")
    store.kill()
    store.wait()
    with pytest.raises(RegistryError, match="cannot read the registry, bucket/adapters/registry.id"):
        registry.add(adapter_folder(tmp_path / "other", 1), "reviews")
    with pytest.raises(RegistryError, match="cannot list the registry, bucket/adapters/blobs: "):
        verify(registry)
    assert [version.label for version in registry.versions()] == ["reviews:1"]
