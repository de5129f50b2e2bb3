"""The thresholds of a gate: one model for recipes, the command line and Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from s2ap_deploy.errors import UsageError
from s2ap_deploy.recipe.field_types import Count, Fraction01, Positive
from s2ap_deploy.spec import Record, invalid

Rule = Literal["lower", "point"]
AGE: Final = r"^[0-9]{1,6}[hdw]$"
"""The pattern of ``max_age``: hours, days or weeks."""
DEVICE_NAME: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class Evidence:
    """The evidence for a threshold: metadata of each field of :class:`Thresholds`.

    Args:
        source: where the value comes from: the certificate's ``samples``, its ``clean`` predictions alone,
            the exported ``file``, its measured ``latency``, the ``date`` of the certificate, or a ``device``.
        extreme: a bound that no number of samples can show (1 for a floor, 0 for a ceiling of a drop).
        attacked: whether attacks change the value, so that they may stop once the verdict is decided.
        dense: whether the dense network is needed in addition to the pruned one.
    """

    source: Literal["samples", "clean", "file", "latency", "date", "device"]
    extreme: float | None = None
    attacked: bool = False
    dense: bool = False


_FLOOR = Evidence("samples", extreme=1.0)
_DROP = Evidence("samples", extreme=0.0, attacked=True, dense=True)


class Thresholds(Record):
    """Thresholds of the verdict. Drops are against the dense network on the same samples."""

    min_clean: Annotated[
        Fraction01 | None, Field(description="Lowest clean accuracy, as a fraction."), _FLOOR
    ] = None
    min_robust: Annotated[
        Fraction01 | None,
        Field(description="Lowest robust accuracy, as a fraction: 0.40."),
        Evidence("samples", extreme=1.0, attacked=True),
    ] = None
    min_proven: Annotated[
        Fraction01 | None, Field(description="Lowest provably robust accuracy, as a fraction."), _FLOOR
    ] = None
    max_drop: Annotated[
        Fraction01 | None,
        Field(description="Largest loss of robust accuracy by pruning, as a fraction."),
        _DROP,
    ] = None
    max_class_drop: Annotated[
        Fraction01 | None,
        Field(description="Largest loss of robust accuracy of any class, as a fraction."),
        _DROP,
    ] = None
    max_clean_drop: Annotated[
        Fraction01 | None,
        Field(description="Largest loss of clean accuracy by pruning, as a fraction."),
        Evidence("clean", extreme=0.0, dense=True),
    ] = None
    min_sparsity: Annotated[
        Fraction01 | None,
        Field(description="Lowest fraction of zeros in the exported file."),
        Evidence("file"),
    ] = None
    max_bytes: Annotated[
        Count | None, Field(description="Largest exported file in bytes."), Evidence("file")
    ] = None
    max_latency_ms: Annotated[
        Positive | None,
        Field(
            description="Longest inference of the exported file for one image, in milliseconds: on the "
            "required devices, or else as export --bench measured it."
        ),
        Evidence("latency"),
    ] = None
    max_latency_ratio: Annotated[
        Positive | None,
        Field(description="Largest inference time relative to the dense file."),
        Evidence("latency"),
    ] = None
    max_age: Annotated[
        Annotated[str, Field(pattern=AGE)] | None,
        Field(description="Oldest certificate to accept: 36h, 30d or 2w."),
        Evidence("date"),
    ] = None
    require_device: Annotated[
        tuple[Annotated[str, Field(pattern=DEVICE_NAME)], ...],
        Field(description="Devices whose record must be collected and give the certificate's answers."),
        Evidence("device"),
    ] = ()
    rule: Annotated[
        Rule, Field(description="Judge the one-sided 95% bound (lower), or the observed value (point).")
    ] = "lower"

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        if not self.asked and not self.require_device:
            raise invalid(
                "threshold-missing", "a gate needs min_robust, max_drop, min_clean or another threshold"
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate thresholds by name; None counts as not given.

        Raises:
            UsageError: nothing to judge (``threshold-missing``), a value out of range (``value-invalid``) or
                an unknown name (``key-unknown``).
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            from s2ap_deploy.recipe import diagnosis  # late: it imports the YAML reader

            hint = f"thresholds are {', '.join(cls.model_fields)}"
            raise diagnosis.refused(error, cls, hint=hint) from None

    @property
    def asked(self) -> dict[str, float]:
        """The thresholds that are set, by name, without ``rule``, ``max_age`` and ``require_device``."""
        found: dict[str, float] = self.model_dump(
            exclude={"rule", "max_age", "require_device"}, exclude_none=True
        )
        return found

    @property
    def decidable(self) -> Self | None:
        """The thresholds on samples; None where attacks change none of them."""
        on_samples = {name: value for name, value in self.asked.items() if evidence(name).source == "samples"}
        if not any(evidence(name).attacked for name in on_samples):
            return None
        return self.model_validate({**on_samples, "rule": self.rule})

    @property
    def needs_dense(self) -> bool:
        """Whether a threshold compares with the dense network."""
        return any(evidence(name).dense for name in self.asked)

    def refuse_unprovable(self) -> None:
        """Raise UsageError (``threshold-unprovable``) for a bound that no number of samples can show."""
        if self.rule == "point":
            return
        for name, value in self.asked.items():
            if value == evidence(name).extreme:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value:g} cannot be shown by any number of samples "
                    "(rule 'lower')",
                    code="threshold-unprovable",
                    hint="use the rule 'point', or a threshold with some margin",
                )

    def __str__(self) -> str:
        """Return the thresholds as options of ``s2ap-deploy certify``."""
        options = [f"--{name.replace('_', '-')} {value:g}" for name, value in sorted(self.asked.items())]
        return " ".join([*options, f"--gate {self.rule}"])


def evidence(name: str) -> Evidence:
    """Return how the threshold ``name`` is judged."""
    metadata = Thresholds.model_fields[name].metadata
    return next(each for each in metadata if isinstance(each, Evidence))
