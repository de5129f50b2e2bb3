"""Recipe keys by dotted name, and the keyword arguments and options that set them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from s2ap_deploy.errors import UsageError

Keywords = Mapping[str, tuple[str, ...]]

NETWORK: Final[Keywords] = {
    "data": ("data.name",),
    "eps": ("threat.eps",),
    "norm": ("threat.norm",),
    "seed": ("seed",),
    "mean": ("model.normalization.mean",),
    "std": ("model.normalization.std",),
    "keep": ("model.keep",),
    "alpha": ("model.alpha",),
    "key": ("model.key",),
    "expect_clean": ("model.expect_clean",),
}
PRETRAIN: Final[Keywords] = {
    "epochs": ("pretrain.epochs",),
    "learning_rate": ("pretrain.learning_rate",),
    "batch_size": ("pretrain.batch_size",),
    "loss": ("pretrain.objective.loss",),
}
PRUNE: Final[Keywords] = {
    "sparsity": ("prune.sparsity",),
    "method": ("prune.method",),
    "granularity": ("prune.granularity",),
    "keep_ratio": ("prune.keep_ratio",),
    "s2ap": ("prune.s2ap",),
    "gamma": ("prune.gamma",),
    "flip_target": ("prune.flip_target",),
    "s2ap_ball": ("prune.s2ap_ball",),
    "s2ap_signs": ("prune.s2ap_signs",),
    "s2ap_epochs": ("prune.s2ap_epochs",),
    "warmup_epochs": ("prune.warmup_epochs",),
    "budget": ("prune.budget",),
    "cover_classes": ("prune.cover_classes",),
    "dense_ends": ("prune.dense_ends",),
    "allow_unpruned": ("prune.allow_unpruned",),
    "steps": ("prune.steps",),
    "scores_from": ("prune.scores_from",),
    "loss": ("prune.search.objective.loss", "prune.finetune.objective.loss"),
    "attack_start": ("prune.search.objective.start", "prune.finetune.objective.start"),
    "score_decay": ("prune.search.weight_decay",),
    "bn_affine": ("prune.search.bn_affine",),
    "cosine": ("prune.search.cosine", "prune.finetune.cosine"),
    "recalibration": ("prune.search.recalibration",),
    "awp_gamma": ("prune.finetune.awp_gamma",),
    "distill": ("prune.finetune.distillation.weight",),
    "qat": ("prune.finetune.qat_epochs",),
    "search_epochs": ("prune.search.epochs",),
    "finetune_epochs": ("prune.finetune.epochs",),
    "batch_size": ("prune.search.batch_size", "prune.finetune.batch_size"),
}
CERTIFY: Final[Keywords] = {
    "protocol": ("certify.version",),
    "n": ("certify.n",),
    "sample_seed": ("certify.sample_seed",),
    "attack_seed": ("certify.attack_seed",),
    "provable": ("certify.provable",),
    "curve": ("certify.curve",),
    "tune_curve": ("certify.tune_curve",),
    "full": ("certify.full",),
}
EXPORT: Final[Keywords] = {
    name: (f"export.{name}",)
    for name in (
        "name",
        "opset",
        "encoding",
        "values",
        "batch",
        "int8",
        "calibration",
        "calibration_images",
        "weight_bits",
        "compact",
        "keep_ratio",
        "align",
        "torch",
        "c",
        "c_positions",
        "c_static",
        "convert",
        "max_flash",
        "max_ram",
        "target",
        "max_bytes",
        "max_macs",
        "max_latency_ms",
    )
}
THRESHOLDS: Final[Keywords] = {
    name: (f"gate.{name}",)
    for name in (
        "min_robust",
        "max_drop",
        "max_class_drop",
        "max_clean_drop",
        "min_clean",
        "min_proven",
        "min_sparsity",
        "max_bytes",
        "max_latency_ms",
        "max_latency_ratio",
        "max_age",
        "require_device",
        "rule",
    )
}


def changes(table: Keywords, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe keys that ``arguments`` set, without those that are None or not in ``table``."""
    return {
        key: arguments[name]
        for name, keys in table.items()
        if arguments.get(name) is not None
        for key in keys
    }


def assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` of a nested mapping and make the sections that are missing on the way.

    Raises UsageError where a part of the key already holds a value.
    """
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UsageError(
                f"{key}: {parent} is a value and has no keys", code="key-unknown", hint=f"leave out .{last}"
            )
    section[last] = value


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model in ``Model`` or ``Model | None``, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a schema by its dotted name, each section before its own keys."""
    for name, info in schema.model_fields.items():
        yield prefix + name, info
        if (section := section_of(info.annotation)) is not None:
            yield from fields(section, f"{prefix}{name}.")


def field(schema: type[BaseModel], key: str) -> FieldInfo:
    """Return the field at a dotted ``key``. Raises KeyError where the schema has none."""
    name, _, rest = key.partition(".")
    info = schema.model_fields[name]
    if not rest:
        return info
    section = section_of(info.annotation)
    if section is None:
        raise KeyError(key)
    return field(section, rest)
