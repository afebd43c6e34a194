"""``lorafleet adapters``: the commands of the registry."""

from functools import partial

from lorafleet.cli.command import Command
from lorafleet.cli.help import Argument
from lorafleet.config import (
    AddConfig,
    AliasConfig,
    CombineConfig,
    ConvertConfig,
    ExportConfig,
    GcConfig,
    ImportConfig,
    ListConfig,
    PromoteConfig,
    RegistryConfig,
)

_VERSION = "NAME, NAME:3, NAME@prod, or sha256: and 8 or more digits of a revision."
_command = partial(Command, home="lorafleet.registry.run", view="lorafleet.cli.show_adapters")

ADAPTERS = (
    _command(
        "add",
        "add",
        "Keep an adapter under a name. The same bytes are kept once.",
        (RegistryConfig, AddConfig),
        Argument("FOLDER", True, "An adapter that lorafleet or PEFT wrote."),
        examples=("lorafleet adapters add runs/first --name reviews --tags film,english",),
    ),
    _command(
        "list",
        "list_versions",
        "List names and their versions.",
        (RegistryConfig, ListConfig),
        Argument("NAME", False, "Only the versions of this name."),
        examples=("lorafleet adapters list", "lorafleet adapters list reviews --json"),
    ),
    _command(
        "show",
        "show",
        "Show a version: scores, lineage, files, which runtimes can serve it, and how its aliases moved.",
        (RegistryConfig,),
        Argument("VERSION", True, _VERSION),
        examples=("lorafleet adapters show reviews:2",),
    ),
    _command(
        "diff",
        "diff",
        "Show what differs between two versions.",
        (RegistryConfig,),
        Argument("VERSION", True, _VERSION, many=True),
        examples=("lorafleet adapters diff reviews:1 reviews:2",),
    ),
    _command(
        "promote",
        "promote",
        "Point an alias at a version: what asks for NAME@prod gets it from now on.",
        (RegistryConfig, AliasConfig, PromoteConfig),
        Argument("VERSION", True, _VERSION),
        examples=("lorafleet adapters promote reviews:2", "lorafleet adapters promote reviews:3 --alias canary"),
    ),
    _command(
        "rollback",
        "rollback",
        "Point an alias at the version that it was promoted from.",
        (RegistryConfig, AliasConfig),
        Argument("NAME", True, "The adapter's name."),
        examples=("lorafleet adapters rollback reviews",),
    ),
    _command(
        "verify",
        "verify",
        "Compare every file and every row with its hash.",
        (RegistryConfig,),
        None,
        examples=("lorafleet adapters verify",),
    ),
    _command(
        "gc",
        "gc",
        "Delete versions that are named or old, and files that nothing needs. What an alias points at stays.",
        (RegistryConfig, GcConfig),
        Argument("VERSION", False, _VERSION, many=True),
        examples=("lorafleet adapters gc --keep 5 --dry-run", "lorafleet adapters gc reviews:1"),
    ),
    _command(
        "export",
        "export_versions",
        "Write versions into one file, to carry them to another machine.",
        (RegistryConfig, ExportConfig),
        Argument("VERSION", True, _VERSION, many=True),
        examples=("lorafleet adapters export reviews:2 --output reviews.tar",),
    ),
    _command(
        "import",
        "import_versions",
        "Add the versions of an exported file.",
        (RegistryConfig, ImportConfig),
        Argument("FILE", True, "What export wrote."),
        examples=("lorafleet adapters import reviews.tar",),
    ),
    Command(
        "combine",
        "combine",
        "Write one adapter that stands for several of one base: weighted sums, SVD, TIES, DARE.",
        (RegistryConfig, CombineConfig),
        Argument("ADAPTER", True, "Folders, or names of the registry.", many=True),
        home="lorafleet.methods.combine",
        view="lorafleet.cli.show_adapters",
        examples=(
            "lorafleet adapters combine reviews topics --output-dir adapters/both",
            "lorafleet adapters combine a b c --weights 0.5,0.3,0.2 --combination ties --density 0.3 "
            "--output-dir adapters/three",
        ),
    ),
    Command(
        "convert",
        "convert",
        "Write an adapter that torch.save pickled as safetensors. Nothing of it is run.",
        (ConvertConfig,),
        Argument("FILE", True, "A .pth, .pt or .bin file of tensors, with PEFT's adapter_config.json beside it."),
        home="lorafleet.files.pickled",
        view="lorafleet.cli.show_adapters",
        examples=("lorafleet adapters convert old/adapter.pth --output-dir adapters/old",),
    ),
)
