"""Targets: what one device or runtime takes, as data that comes along or lies in a file. No torch.

A target fills in what an export was not told (a flag beats the target, the target beats the recipe), says
what it cannot do without, and may bring budgets. Reading one never runs code.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from s2ap_deploy import files, plugins
from s2ap_deploy.errors import RecipeError, UsageError
from s2ap_deploy.recipe import yaml_document
from s2ap_deploy.recipe.diagnosis import explain
from s2ap_deploy.recipe.methods import n_of_m
from s2ap_deploy.spec import Record

NONE = "none"
"""What takes a target back that a run folder remembers."""

Dtype = Literal["float32", "float16", "int8"]
EncodingName = Literal["auto", "ef", "gaps", "mask", "coo", "dense"]
BudgetName = Literal["bytes", "macs", "latency_ms"]
OPTIONS: Mapping[BudgetName, str] = {
    "bytes": "--max-bytes",
    "macs": "--max-macs",
    "latency_ms": "--max-latency-ms",
}

_Count = Annotated[int, Field(strict=True, ge=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Opset = Annotated[int, Field(strict=True, ge=18, le=25)]
_Flag = Annotated[bool, Field(strict=True)]


def _unit(value: str) -> str:
    if value not in ("weight", "channel") and n_of_m(value) is None:
        raise ValueError("must be weight, channel, or n:m with n below m, such as 2:4")
    return value


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

    bytes: _Count | None = None
    macs: _Count | None = None
    latency_ms: _Positive | None = None


class Requirements(Record):
    """What the target cannot do without; empty means that anything goes.

    ``granularity`` is a pattern that the weights must keep to. ``compact`` false says that dead channels must
    stay where they are. ``budgets`` names those that somebody has to give.
    """

    dtypes: tuple[Dtype, ...] = ()
    encodings: tuple[EncodingName, ...] = ()
    granularity: Annotated[str, AfterValidator(_pattern)] | None = None
    compact: _Flag | None = None
    budgets: tuple[BudgetName, ...] = ()


class Target(Record):
    """One device or runtime.

    ``dtype`` int8 means int8 arithmetic, float16 values that are stored so and computed with in float32.
    ``batch`` is ``dynamic`` or a number of images; ``alignment`` the multiple that channel counts should be;
    ``granularity`` what has to go for the network to become faster there. ``compact`` leaves out channels
    that cannot matter. ``notes`` say what the runtime does with zeros.
    """

    name: Annotated[str, Field(min_length=1, max_length=80)]
    description: Annotated[str, Field(min_length=1)]
    runtime: str = ""
    opset: _Opset = 20
    dtype: Dtype = "float32"
    layout: Literal["NCHW"] = "NCHW"
    encoding: EncodingName = "auto"
    batch: Annotated[Literal["dynamic"] | int, BeforeValidator(_images)] = "dynamic"
    alignment: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    granularity: Annotated[str, AfterValidator(_unit)] = "channel"
    compact: _Flag = True
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
        """Keys of a recipe's export section, with what this target wants there."""
        return {
            "opset": self.opset,
            "encoding": self.encoding,
            "int8": self.dtype == "int8",
            "values": "f16" if self.dtype == "float16" else "f32",
            "batch": self.batch,
            "align": self.alignment,
            "compact": self.compact,
        }


class Found(Record):
    """A target and where it was read; ``sha256`` is the hash of that file."""

    target: Target
    path: str
    sha256: str


def shipped() -> Path:
    """The folder of the targets that come with the tool: inside the wheel, or in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / "export" / "targets"
    return installed if installed.is_dir() else package.parent / "export" / "targets"


def names() -> tuple[str, ...]:
    """Names of the shipped targets."""
    return tuple(sorted(path.stem for path in shipped().glob("*.yaml")))


def find(name: str) -> Found:
    """A target by name (shipped, or a plug-in's), or by path (a slash, or .yaml or .yml at the end).

    Raises RecipeError, which names the file and line, the key and the nearest valid one, and StorageError.
    """
    path = Path(name)
    if not ("/" in name or "\\" in name or path.suffix in (".yaml", ".yml")):
        if name not in names():
            if plugins.find("targets", name) is not None:
                return _installed(name)
            raise RecipeError(
                f"no target {name!r} comes with the tool{_nearest(name)}",
                hint=f"there are {', '.join((*names(), *plugins.names('targets')))}; "
                f"your own file is written with its suffix: {name}.yaml",
            )
        path = shipped() / f"{name}.yaml"
    if not path.exists():
        raise RecipeError(f"there is no target at {path}", hint=f"targets by name: {', '.join(names())}")
    if not path.is_file():
        raise RecipeError(f"{path} is not a file")
    document = yaml_document.read(path)
    if not isinstance(document.content, dict):
        raise RecipeError(f"{path} holds no target: it must be a mapping that starts with name:")
    try:
        target = Target.model_validate(document.content)
    except ValidationError as error:
        raise explain(error, Target, str(path), document.origins) from None
    return Found(target=target, path=str(path), sha256=files.sha256(path))


def _installed(name: str) -> Found:
    """A target that a plug-in offers; its hash is that of its canonical JSON. Raises PluginError."""
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
    """``section`` (keys of an export section to values, None for what nobody said) completed by ``target``.

    ``known`` are the keys that the section can have. int8 and the type of values are one choice: who makes
    one of them has made both. Widths are aligned only where ``granularity`` says that channels went.
    """
    known = set(known) - (set() if granularity == "channel" else {"align"})
    said = {key for key, value in section.items() if value is not None}
    if section.get("compact") is False:
        known -= {"align"}
    if said & {"int8", "values"}:
        said |= {"int8", "values"}
    wanted = {key: value for key, value in target.settings().items() if key in known and key not in said}
    return {**section, **wanted}


def check(target: Target, section: Mapping[str, Any]) -> None:
    """Refuse an export section, all its keys set, that ``target`` cannot take. Raises UsageError."""
    needs = target.requires
    kind = dtype(section)
    if needs.dtypes and kind not in needs.dtypes:
        how = "add --int8" if "int8" in needs.dtypes else f"export as {needs.dtypes[0]}"
        raise UsageError(
            f"{target.name} takes {_listed(needs.dtypes)}, not {kind}",
            hint=f"{how}, or choose another target ({_others(target)})",
        )
    encoding = section["encoding"]
    if needs.encodings and encoding not in needs.encodings:
        raise UsageError(
            f"{target.name} takes the encoding {_listed(needs.encodings)}, not {encoding}",
            hint=f"leave --encoding out, or choose another target ({_others(target)})",
        )
    if needs.compact is not None and section["compact"] != needs.compact:
        wanted = "--compact" if needs.compact else "--no-compact"
        raise UsageError(
            f"{target.name} needs channels that cannot matter to "
            f"{'be left out' if needs.compact else 'stay where they are'}",
            hint=f"leave it out, or say {wanted}",
        )
    for budget in needs.budgets:
        if budgets(target, section)[budget] is None:
            raise UsageError(
                f"{target.name} needs a limit on {WORDS[budget]}, and its profile gives none",
                hint=f"add {OPTIONS[budget]} with what the device has",
            )


WORDS: Mapping[BudgetName, str] = {
    "bytes": "the bytes of the file",
    "macs": "multiply-accumulates per image",
    "latency_ms": "milliseconds per inference",
}


def budgets(target: Target | None, section: Mapping[str, Any]) -> dict[BudgetName, float | None]:
    """The limits that hold for an export: those of the section come before those of the target."""
    given = target.budgets if target is not None else TargetBudgets()
    chosen: dict[BudgetName, float | None] = {}
    for name in OPTIONS:
        own = section.get(f"max_{name}")
        chosen[name] = own if own is not None else getattr(given, name)
    return chosen


def dtype(section: Mapping[str, Any]) -> str:
    """In what an exported file computes or stores its weights: ``int8`` is int8 arithmetic."""
    if section.get("int8"):
        return "int8"
    return {"f32": "float32", "f16": "float16", "int8": "int8 values in float32"}[section["values"]]


def _others(target: Target) -> str:
    return ", ".join(name for name in names() if name != target.name)


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join(words)


def _nearest(name: str) -> str:
    """Part of a name is as common a slip as a misspelt one: ``arm64``, ``tensorrt``."""
    near = [each for each in names() if name and name in each]
    near += [each for each in difflib.get_close_matches(name, names(), 1) if each not in near]
    return f"; did you mean {' or '.join(near)}?" if near else ""
