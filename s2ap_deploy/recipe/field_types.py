"""Types of recipe values: names, counts and fractions."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from s2ap_deploy import plugins
from s2ap_deploy.recipe.diagnosis import did_you_mean
from s2ap_deploy.recipe.methods import OWN_LOSSES, OWN_NAMES, n_of_m
from s2ap_deploy.spec import invalid

DATA_SETS = ("digits", "mnist", "cifar10", "cifar100", "svhn", "imagefolder:PATH")

TEST_IMAGES = {"digits": 500, "mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000, "svhn": 26_032}
"""The number of test images of each published data set."""

_ITEM = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+=-]*)?|[A-Za-z0-9][\w.+=-]*")


def _registered_name(value: str) -> str:
    """Refuse import paths: a recipe is an untrusted file and may only name registered code."""
    if ":" in value or value.endswith(".py") or not _ITEM.fullmatch(value):
        raise invalid(
            "architecture-not-registered",
            "an architecture in a recipe is a registered name such as cifar-resnet18; "
            "import paths are accepted only on the command line (--arch)",
        )
    return value


def _data_set(value: str) -> str:
    if value not in DATA_SETS[:-1] and not (value.startswith("imagefolder:") and value != "imagefolder:"):
        raise invalid(
            "data-unknown", f"must be one of {', '.join(DATA_SETS)}{did_you_mean(value, DATA_SETS)}"
        )
    return value


def _granularity(value: str) -> str:
    if value not in ("weight", "channel") and n_of_m(value) is None:
        raise invalid(
            "granularity-unknown", f"{value!r} must be weight, channel, or n:m with n below m, such as 2:4"
        )
    return value


def _offered(kind: plugins.Kind, own: tuple[str, ...]) -> AfterValidator:
    """Accept a name that is one of ``own`` or that a plug-in of that kind registers."""

    def known(value: str) -> str:
        if value in own or plugins.find(kind, value) is not None:
            return value
        names = (*own, *plugins.names(kind))
        raise invalid("name-unknown", f"must be {' or '.join(names)}{did_you_mean(value, names)}")

    return AfterValidator(known)


def _enumerated(own: tuple[str, ...]) -> WithJsonSchema:
    """Return the JSON schema that lists ``own`` for completion; plug-ins may add other names."""
    return WithJsonSchema({"anyOf": [{"enum": list(own)}, {"type": "string"}]})


LossName = Annotated[str, _offered("losses", OWN_LOSSES), _enumerated(OWN_LOSSES)]
MethodName = Annotated[str, _offered("methods", OWN_NAMES), _enumerated(OWN_NAMES)]
ArchitectureName = Annotated[str, AfterValidator(_registered_name)]
DataName = Annotated[str, AfterValidator(_data_set)]
Granularity = Annotated[str, AfterValidator(_granularity)]

RuntimeName = Literal["coreml", "executorch", "litert", "ncnn", "openvino"]
ArtifactFormat = Literal["onnx", "c"] | RuntimeName

Flag = Annotated[bool, Field(strict=True)]
# Strict, because a coerced value (true as 1 epoch, "0.9" as a number) would hide typos.
Count = Annotated[int, Field(strict=True, ge=1)]
Opset = Annotated[int, Field(strict=True, ge=17, le=25)]
Batch = Literal["dynamic"] | Annotated[int, Field(strict=True, ge=1, le=1024)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction01 = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]
KeepRatio = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Momentum = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
