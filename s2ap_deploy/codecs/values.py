"""Types of stored values: float32, or rounded to float16, or to int8 with scales.

Rounded values are converted back to float32 before anything is computed, so a runtime needs no
low-precision arithmetic. The rounded values make the exported file a different network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from s2ap_deploy.errors import VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ValuesName = Literal["float32", "float16", "int8"]
FLOAT32: ValuesName = "float32"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as it is stored: ``data`` in the weight's shape, and how a reader gets the weight from it.

    ``cast``: first convert to float32. ``scale``: then multiply, float32, one per output channel, with as
    many dimensions as ``data``. Zeros of ``data`` are the zeros of the weight.
    """

    data: NDArray[np.generic]
    cast: bool = False
    scale: NDArray[np.float32] | None = None

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The type of the weight itself."""
        import numpy as np

        return np.dtype(np.float32) if self.cast else self.data.dtype

    @property
    def positions(self) -> NDArray[np.int64]:
        """The flat positions of the non-zero entries, in increasing order."""
        import numpy as np

        return np.flatnonzero(self.data)

    @property
    def nonzeros(self) -> NDArray[np.generic]:
        """The non-zero entries, in the order of :attr:`positions`."""
        flat = self.data.reshape(-1)
        kept: NDArray[np.generic] = flat[flat != 0]
        return kept

    def restored(self) -> NDArray[np.float32]:
        """Return the weight in float32, by the operations that the decode graph uses."""
        import numpy as np

        plain = self.data.astype(np.float32)
        return plain if self.scale is None else plain * self.scale


@dataclass(frozen=True)
class ValueType:
    """A type of stored values.

    Attributes:
        name: its name in options, recipes, targets and reports.
        description: a noun phrase for messages.
        bytes: of one value.
        node_bytes: measured bytes of the nodes that restore float32.
        row_bytes: bytes of the scale of one output channel.
    """

    name: ValuesName
    description: str
    bytes: int
    node_bytes: int = 0
    row_bytes: int = 0

    def store(self, name: str, array: NDArray[np.float32], axis: int) -> StoredWeight:
        """Round the weight ``name``, whose output channels lie along ``axis``.

        Raises VerificationError for a value that the type cannot hold.
        """
        return StoredWeight(array)


class Float16(ValueType):
    """The nearest float16; a value that is not zero never becomes zero."""

    def store(self, name: str, array: NDArray[np.float32], axis: int) -> StoredWeight:
        import numpy as np

        half = np.finfo(np.float16)
        with np.errstate(over="ignore", under="ignore"):
            data = array.astype(np.float16)
        overflows = int(np.count_nonzero(~np.isfinite(data)))
        if overflows:
            raise VerificationError(
                f"{name}: {overflows} values exceed {float(half.max):.0f}, the largest that float16 holds",
                code="values-overflow",
                hint="export with --values float32 or int8",
            )
        # What float16 would flush to zero becomes its smallest number: a kept weight stays kept.
        lost = (data == 0) & (array != 0)
        data[lost] = np.copysign(half.smallest_subnormal, array[lost])
        return StoredWeight(data, cast=True)


class Int8(ValueType):
    """The nearest multiple of a step, 1/127 of the largest magnitude of the output channel."""

    def store(self, name: str, array: NDArray[np.float32], axis: int) -> StoredWeight:
        import numpy as np

        others = tuple(dimension for dimension in range(array.ndim) if dimension != axis)
        largest = np.abs(array).max(axis=others, keepdims=True)
        scale = (largest / np.float32(127)).astype(np.float32)
        # A channel of zeros, or of values next to the smallest float32, gets a step that divides safely.
        scale[scale < np.finfo(np.float32).tiny] = 1.0
        data = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
        return StoredWeight(data, cast=True, scale=scale)


VALUES: Mapping[ValuesName, ValueType] = {
    each.name: each
    for each in (
        ValueType(FLOAT32, "float32", 4),
        Float16("float16", "float16", 2, node_bytes=33),
        Int8("int8", "int8 with a scale per output channel", 1, node_bytes=90, row_bytes=4),
    )
}
