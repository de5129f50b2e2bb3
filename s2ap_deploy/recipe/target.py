"""Export targets: the settings, requirements and budgets of one device or runtime, as data.

A target sets values that the command line omits (an option overrides the target, the target overrides the
recipe), states requirements, and may have budgets. Reading one never runs code.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from s2ap_deploy import files, plugins
from s2ap_deploy.codecs.codec import Tradeoff
from s2ap_deploy.codecs.registry import AUTO, EncodingName
from s2ap_deploy.codecs.values import FLOAT32, ValuesName
from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.recipe import yaml_document
from s2ap_deploy.recipe.diagnosis import explain
from s2ap_deploy.recipe.field_types import Count, Granularity, Positive, RuntimeName
from s2ap_deploy.recipe.methods import n_of_m
from s2ap_deploy.spec import Record

NONE = "none"
"""Name that removes the target stored in a run folder."""

BudgetName = Literal["bytes", "macs", "latency_ms"]
OPTIONS: Mapping[BudgetName, str] = {
    "bytes": "--max-bytes",
    "macs": "--max-macs",
    "latency_ms": "--max-latency-ms",
}

_Opset = Annotated[int, Field(strict=True, ge=17, le=25)]
_Flag = Annotated[bool, Field(strict=True)]


def _images(value: Any) -> Any:
    if value != "dynamic" and (type(value) is not int or not 1 <= value <= 1024):
        raise ValueError("must be dynamic or a number of images from 1 to 1024")
    return value


def _pattern(value: str) -> str:
    if n_of_m(value) is None:
        raise ValueError("must be a pattern n:m with n below m, such as 2:4")
    return value


class TargetBudgets(Record):
    """The most that a file may take: its bytes, multiply-accumulates per image, ms per inference."""

    bytes: Count | None = None
    macs: Count | None = None
    latency_ms: Positive | None = None


class Requirements(Record):
    """The requirements of a target; empty means that anything is allowed.

    ``granularity`` is a pattern that the weights must have. ``compact`` false means that dead channels must
    stay in the file. ``budgets`` names those that must be set.
    """

    dtypes: tuple[ValuesName, ...] = ()
    encodings: tuple[EncodingName, ...] = ()
    granularity: Annotated[str, AfterValidator(_pattern)] | None = None
    compact: _Flag | None = None
    budgets: tuple[BudgetName, ...] = ()


class Target(Record):
    """One device or runtime.

    ``dtype`` int8 means int8 arithmetic, float16 values that are stored so and computed with in float32.
    ``batch`` is ``dynamic`` or a number of images; ``alignment`` the multiple that channel counts should be;
    ``granularity`` the unit of pruning that makes a network faster there. ``compact`` removes dead channels.
    ``cost`` is what the encoding ``auto`` weighs; ``processors`` are the int8 instructions of its processors,
    such as avx512_vnni, and ``weight_bits`` 8 is for those that add products of int8 exactly. ``c`` and
    ``c_static`` ask for C sources beside the file, ``convert`` for the file of another runtime.
    ``notes`` describe how the runtime handles zeros.
    """

    name: Annotated[str, Field(min_length=1, max_length=80)]
    description: Annotated[str, Field(min_length=1)]
    runtime: str = ""
    opset: _Opset = 20
    dtype: ValuesName = FLOAT32
    layout: Literal["NCHW"] = "NCHW"
    encoding: EncodingName = AUTO
    cost: Tradeoff = Tradeoff()
    weight_bits: Annotated[int, Field(strict=True, ge=7, le=8)] = 7
    processors: tuple[str, ...] = ()
    batch: Annotated[Literal["dynamic"] | int, BeforeValidator(_images)] = "dynamic"
    alignment: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    granularity: Granularity = "channel"
    compact: _Flag = True
    c: _Flag = False
    c_static: _Flag = False
    convert: RuntimeName | None = None
    budgets: TargetBudgets = TargetBudgets()
    requires: Requirements = Requirements()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _meets_itself(self) -> Self:
        for key, allowed in (("dtype", self.requires.dtypes), ("encoding", self.requires.encodings)):
            if allowed and getattr(self, key) not in allowed:
                raise ValueError(f"{key} {getattr(self, key)} is not among requires.{key}s")
        if self.requires.compact is not None and self.compact != self.requires.compact:
            raise ValueError("compact is not what requires.compact says")
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings of a recipe's export section for this target."""
        return {
            "opset": self.opset,
            "encoding": self.encoding,
            "cost": self.cost.model_dump(),
            "weight_bits": self.weight_bits,
            "int8": self.dtype == "int8",
            "values": FLOAT32 if self.dtype == "int8" else self.dtype,
            "batch": self.batch,
            "align": self.alignment,
            "compact": self.compact,
            "c": self.c,
            "c_static": self.c_static,
            "convert": self.convert,
        }


class Found(Record):
    """A target and where it was read; ``sha256`` is the hash of that file."""

    target: Target
    path: str
    sha256: str


def shipped() -> Path:
    """Return the folder of the shipped targets: inside the wheel, or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / "export" / "targets"
    return installed if installed.is_dir() else package.parent / "export" / "targets"


def names() -> tuple[str, ...]:
    """List the names of the shipped targets."""
    return tuple(sorted(path.stem for path in shipped().glob("*.yaml")))


def find(name: str) -> Found:
    """Find a target by name (shipped, or a plug-in's), or by path (a slash, or .yaml or .yml at the end).

    Raises RecipeError, which names the file and line, the key and the nearest valid one, and StorageError.
    """
    path = Path(name)
    if not ("/" in name or "\\" in name or path.suffix in (".yaml", ".yml")):
        if name not in names():
            if plugins.find("targets", name) is not None:
                return _installed(name)
            raise RecipeError(
                f"there is no target {name!r}{_nearest(name)}",
                code="target-unknown",
                hint=f"there are {', '.join((*names(), *plugins.names('targets')))}; "
                f"your own file is written with its suffix: {name}.yaml",
            )
        path = shipped() / f"{name}.yaml"
    if not path.exists():
        raise RecipeError(
            f"there is no target at {path}",
            code="target-unknown",
            hint=f"targets by name: {', '.join(names())}",
        )
    if not path.is_file():
        raise RecipeError(f"{path} is not a file", code="target-not-file")
    document = yaml_document.read(path)
    if not isinstance(document.content, dict):
        raise RecipeError(
            f"{path} is not a target: it must be a mapping that starts with name:", code="target-not-mapping"
        )
    try:
        target = Target.model_validate(document.content)
    except ValidationError as error:
        raise explain(error, Target, str(path), document.origins) from None
    return Found(target=target, path=str(path), sha256=files.sha256(path))


def _installed(name: str) -> Found:
    """Load a target of a plug-in; its hash is that of its canonical JSON. Raises PluginError."""
    target = plugins.load("targets", name, Target)
    text = files.canonical_json(target.model_dump(mode="json"))
    return Found(
        target=target,
        path=str(plugins.find("targets", name)),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def fill(
    section: Mapping[str, Any], target: Target, known: Iterable[str], granularity: str | None
) -> dict[str, Any]:
    """Complete ``section`` (keys of an export section to values, None for unset ones) by ``target``.

    ``known`` are the keys that the section can have. int8 and the type of values are one choice: setting one
    of them sets both. Widths are aligned only where ``granularity`` is channel.
    """
    known = set(known) - (set() if granularity == "channel" else {"align"})
    given = {key for key, value in section.items() if value is not None}
    if section.get("compact") is False:
        known -= {"align"}
    if given & {"int8", "values"}:
        given |= {"int8", "values"}
    wanted = {key: value for key, value in target.settings().items() if key in known and key not in given}
    return {**section, **wanted}


def check(target: Target, section: Mapping[str, Any]) -> None:
    """Refuse an export section, all its keys set, that ``target`` cannot take. Raises UsageError."""
    needs = target.requires
    kind = dtype(section)
    if needs.dtypes and kind not in needs.dtypes:
        how = "add --int8" if "int8" in needs.dtypes else f"export as {needs.dtypes[0]}"
        raise UsageError(
            f"{target.name} takes {_listed(needs.dtypes)}, not {kind}",
            code="target-dtype-unsupported",
            hint=f"{how}, or choose another target ({_others(target)})",
        )
    encoding = section["encoding"]
    if needs.encodings and encoding not in needs.encodings:
        raise UsageError(
            f"{target.name} takes the encoding {_listed(needs.encodings)}, not {encoding}",
            code="target-encoding-unsupported",
            hint=f"leave --encoding out, or choose another target ({_others(target)})",
        )
    if needs.compact is not None and section["compact"] != needs.compact:
        wanted = "--compact" if needs.compact else "--no-compact"
        raise UsageError(
            f"{target.name} needs dead channels to {'be removed' if needs.compact else 'stay in the file'}",
            code="target-compact-unsupported",
            hint=f"use {wanted}, or leave the option out",
        )
    for budget in needs.budgets:
        if budgets(target, section)[budget] is None:
            raise UsageError(
                f"{target.name} needs a limit on {UNITS[budget]}, and its profile has none",
                code="target-budget-missing",
                hint=f"add {OPTIONS[budget]} with the limit of the device",
            )


UNITS: Mapping[BudgetName, str] = {
    "bytes": "the bytes of the file",
    "macs": "multiply-accumulates per image",
    "latency_ms": "milliseconds per inference",
}


def budgets(target: Target | None, section: Mapping[str, Any]) -> dict[BudgetName, float | None]:
    """Return the limits of an export: those of the section override those of the target."""
    given = target.budgets if target is not None else TargetBudgets()
    chosen: dict[BudgetName, float | None] = {}
    for name in OPTIONS:
        own = section.get(f"max_{name}")
        chosen[name] = own if own is not None else getattr(given, name)
    return chosen


def dtype(section: Mapping[str, Any]) -> str:
    """Return the type in which a file computes or stores its weights: ``int8`` is int8 arithmetic."""
    if section.get("int8"):
        return "int8"
    values: str = section["values"]
    return "int8 values in float32" if values == "int8" else values


def _others(target: Target) -> str:
    return ", ".join(name for name in names() if name != target.name)


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join(words)


def _nearest(name: str) -> str:
    """Suggest targets whose name contains ``name``, such as arm64, or resembles it."""
    near = [each for each in names() if name and name in each]
    near += [each for each in difflib.get_close_matches(name, names(), 1) if each not in near]
    return f"; did you mean {' or '.join(near)}?" if near else ""
