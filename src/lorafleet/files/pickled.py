"""``lorafleet adapters convert``: an adapter that was saved by ``torch.save(adapter.state_dict())``, as safetensors."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorafleet.config.load import load_sections
from lorafleet.config.use import ConvertConfig
from lorafleet.errors import AdapterError, ConfigError, raise_all
from lorafleet.files.adapter import CONFIG, save_adapter
from lorafleet.files.adapter_tensors import in_order
from lorafleet.files.manifest import read_json
from lorafleet.files.peft_config import from_peft
from lorafleet.lora.targets import PREFIX
from lorafleet.models.digest import sha256_file

_READER = Path(__file__).resolve().with_name("unpickle.py")
_LIMIT_SECONDS = 600
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.(?P<name>[^.]+?))??(\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<name>[^.]+)\.(?P<parameter>.+)")
# What Python and torch need to start and find their files. The reading process gets nothing else, above all no tokens.
_ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "SYSTEMROOT", "APPDATA", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
    *("PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "KMP_DUPLICATE_LIB_OK"),
)


@dataclass(frozen=True)
class ConvertResult:
    """An adapter that was pickled.

    Attributes:
        adapter: The folder to load.
        tensors: Tensors in it.
        left_out: Tensors of the file that are the base's.
    """

    adapter: str
    tensors: int
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """All fields in JSON's types."""
        return asdict(self)


def convert(file: str, /, **knobs: Any) -> ConvertResult:
    """Write a pickled state dict, with PEFT's config beside it, as an adapter's folder.

    Args:
        file: What ``torch.save(model.state_dict())`` or ``torch.save(get_peft_model_state_dict(model))`` wrote.
        knobs: The knobs of :class:`ConvertConfig`.

    Raises:
        ConfigError: A file is missing, or the folder is not empty.
        AdapterError: The file holds more than tensors, or not those of a LoRA adapter as the config describes it.
    """
    (where,) = load_sections((ConvertConfig,), None, knobs)
    source, output_dir = Path(file), Path(where.output_dir)
    config_file = Path(where.adapter_config) if where.adapter_config else source.parent / CONFIG
    faults = [f"there is no file {path}" for path in (source, config_file) if not path.is_file()]
    if output_dir.is_dir() and any(output_dir.iterdir()):
        faults.append(f"{output_dir} is not empty; give another --output-dir")
    raise_all(ConfigError, faults, "the adapter cannot be converted")
    peft = read_json(config_file.parent, config_file.name)
    whole = peft.get("modules_to_save") or ()
    found, left_out = _tensors_of(source, whole)
    tensors = _as_saved(found, whole, peft.get("bias"))
    config, faults = from_peft(peft, tensors)
    if not tensors:
        faults.append(f"{source} has no tensors of LoRA; it has {', '.join([*found, *left_out][:3])} …")
    raise_all(AdapterError, faults, f"{source} cannot be converted")
    assert config is not None  # it is None only with faults
    base = where.base or peft.get("base_model_name_or_path") or ""
    origin = {"converted_from": {"file": source.name, "sha256": sha256_file(source)}}
    save_adapter(output_dir, config, tensors, base_name=base, base_revision=peft.get("revision"), metadata=origin)
    return ConvertResult(str(output_dir), len(tensors), len(found) + len(left_out) - len(tensors))


def _tensors_of(source: Path, whole: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickled file that can be the adapter's, and the names of the others."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        target = Path(folder) / "tensors"
        _read_apart(source, target, whole)
        with safe_open(target, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, json.loads(file.metadata()["left_out"])


def _read_apart(source: Path, target: Path, whole: Collection[str]) -> None:
    """Have another process read the pickled file.

    ``-P`` and an empty current folder keep it from importing modules that lie beside the file.
    """
    command = [sys.executable, "-P", str(_READER), str(source.resolve()), str(target)]
    try:
        done = subprocess.run(
            command,
            cwd=target.parent,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            input=json.dumps(whole),
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterError(f"{source} was not read within {_LIMIT_SECONDS} seconds") from error
    if done.returncode < 0:
        raise AdapterError(
            f"{source} was not read: the reading process ran out of memory or was killed (signal {-done.returncode}); "
            "free memory, or save the adapter without its base where it was made"
        )
    if done.returncode or not target.exists():
        why = done.stderr.strip().splitlines() or [f"the reading process ended with {done.returncode}"]
        reason = "".join(filter(str.isprintable, why[-1]))  # a file's names can hold commands to the terminal
        raise AdapterError(f"{source} is refused, nothing of it was run: {reason}")


def _as_saved(found: dict[str, Tensor], whole: Collection[str], bias: object) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT gives them in files: without the adapter's name.

    Args:
        found: The file's tensors.
        whole: Names of modules that the adapter has whole.
        bias: PEFT's choice of the biases that were trained.
    """
    tensors, names = dict[str, Tensor](), set[str]()
    for name, tensor in found.items():
        if match := _FACTOR.fullmatch(name):
            ending = ".weight" if match["factor"] in ("lora_A", "lora_B") else ""
            key = f"{match['module']}.{match['factor']}{ending}"
        elif match := _SAVED.fullmatch(name):
            key = f"{match['module']}.{match['parameter']}"
        elif ".original_module." not in name and ({*name.split(".")} & {*whole} or _is_trained_bias(name, bias)):
            key = name
        else:
            continue
        if match:
            names.add(match["name"] or "default")
        tensors[key if key.startswith(PREFIX) else PREFIX + key] = tensor
    _check_one(names)
    return in_order(tensors)


def _is_trained_bias(name: str, bias: object) -> bool:
    """Whether PEFT trains and saves a bias: those of the adapted modules, or every one."""
    return (bias == "all" and name.endswith(".bias")) or (bias == "lora_only" and name.endswith(".base_layer.bias"))


def _check_one(names: Iterable[str]) -> None:
    if len(several := sorted(names)) > 1:
        raise AdapterError(f"the file holds {len(several)} adapters ({', '.join(several)}); save them one by one")
