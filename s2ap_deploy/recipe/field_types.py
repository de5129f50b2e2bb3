"""The kinds of value that a recipe's keys hold: names, counts and fractions. No torch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from s2ap_deploy import plugins
from s2ap_deploy.recipe.diagnosis import did_you_mean
from s2ap_deploy.recipe.methods import OWN_LOSSES, OWN_NAMES, n_of_m

DATA_SETS = ("digits", "mnist", "cifar10", "cifar100", "svhn", "imagefolder:PATH")

_ITEM = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)?")


def _registered_name(value: str) -> str:
    """A recipe comes from elsewhere, so it may name code that is installed but never point at a file."""
    if ":" in value or value.endswith(".py") or not _ITEM.fullmatch(value):
        raise ValueError(
            "an architecture in a recipe is a registered name such as cifar-resnet18; "
            "import paths are taken only on the command line (--arch)"
        )
    return value


def _data_set(value: str) -> str:
    if value not in DATA_SETS[:-1] and not (value.startswith("imagefolder:") and value != "imagefolder:"):
        raise ValueError(f"must be one of {', '.join(DATA_SETS)}{did_you_mean(value, DATA_SETS)}")
    return value


def _granularity(value: str) -> str:
    if value not in ("weight", "channel") and n_of_m(value) is None:
        raise ValueError(f"{value!r} is no granularity: weight, channel, or n:m with n below m, such as 2:4")
    return value


def _offered(kind: plugins.Kind, own: tuple[str, ...]) -> AfterValidator:
    """Lets a name pass that is one of ``own``, or one that a plug-in of that kind registers."""

    def known(value: str) -> str:
        if value in own or plugins.find(kind, value) is not None:
            return value
        names = (*own, *plugins.names(kind))
        raise ValueError(f"must be {' or '.join(names)}{did_you_mean(value, names)}")

    return AfterValidator(known)


def _enumerated(own: tuple[str, ...]) -> WithJsonSchema:
    """What an editor completes; other names are allowed, since a plug-in may have them."""
    return WithJsonSchema({"anyOf": [{"enum": list(own)}, {"type": "string"}]})


LossName = Annotated[str, _offered("losses", OWN_LOSSES), _enumerated(OWN_LOSSES)]
MethodName = Annotated[str, _offered("methods", OWN_NAMES), _enumerated(OWN_NAMES)]
ArchitectureName = Annotated[str, AfterValidator(_registered_name)]
DataName = Annotated[str, AfterValidator(_data_set)]
Granularity = Annotated[str, AfterValidator(_granularity)]

# Strict, because a coerced value (true as 1 epoch, "0.9" as a number) hides a slip of the pen.
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction01 = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
