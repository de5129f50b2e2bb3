"""Operators that move whole channels: concatenation, slices, splits, channel padding, flattening."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from s2ap_deploy.onnx_export.dead_channels.layout import (
    Kept,
    Layout,
    NarrowedNode,
    Operator,
    Span,
    UnsupportedLayout,
    Values,
    attributes,
)

CHANNEL_AXIS = 1


class Concatenation(Operator):
    """``Concat`` along the channels."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if _axis(attributes(node).get("axis"), layout.rank(self.targets[0])) != CHANNEL_AXIS:
            raise UnsupportedLayout("it does not concatenate channels")
        if self.sources != list(node.input):
            raise UnsupportedLayout("it concatenates inputs without channels")

    def ties(self) -> Iterator[tuple[Span, Span]]:
        start = 0
        for name in self.sources:
            end = start + self.width(name)
            yield self.span(name), self.span(self.targets[0], start, end)
            start = end

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        return [np.concatenate([values[name] for name in self.sources])]


class Division(Operator):
    """``Split`` along the channels."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        if _axis(attributes(node).get("axis", 0), layout.rank(node.input[0])) != CHANNEL_AXIS:
            raise UnsupportedLayout("it does not split channels")
        if len(self.targets) != len(node.output):
            raise UnsupportedLayout("it has an unnamed output")
        self.sizes = self.fixed(1)
        self.source = self.sources[0]

    def ties(self) -> Iterator[tuple[Span, Span]]:
        start = 0
        for name in self.targets:
            end = start + self.width(name)
            yield self.span(self.source, start, end), self.span(name)
            start = end

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        ends = np.cumsum([self.width(name) for name in self.targets])
        return np.split(values[self.source], ends[:-1])

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        result = NarrowedNode(self.copy())
        if all(kept[name].all() for name in self.targets):
            return result
        result.arrays[1] = np.array([kept[name].sum() for name in self.targets], np.int64)
        for attribute in list(result.node.attribute):
            if attribute.name == "num_outputs":
                result.node.attribute.remove(attribute)
        return result


class Slicing(Operator):
    """``Slice``: a run of channels, and any part of the image."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.source, self.target = node.input[0], self.targets[0]
        starts, ends, axes, steps = (self.fixed(position) for position in range(1, 5))
        if self.sources != [self.source] or starts is None or ends is None:
            raise UnsupportedLayout("its limits are computed")
        rank, count = layout.rank(self.source), starts.size
        given = np.arange(count) if axes is None else axes.astype(np.int64)
        self.place = next((i for i, axis in enumerate(given) if axis % rank == CHANNEL_AXIS), None)
        self.limits = (starts, ends)
        self.run = slice(0, self.width(self.source))
        if self.place is not None:
            step = 1 if steps is None else int(steps[self.place])
            if step != 1:
                raise UnsupportedLayout("it slices channels with a step or backwards")
            bounds = slice(int(starts[self.place]), int(ends[self.place]))
            self.run = slice(*bounds.indices(self.width(self.source)))
        if any(given % rank == 0):
            raise UnsupportedLayout("it slices the batch")

    def ties(self) -> Iterator[tuple[Span, Span]]:
        yield self.span(self.source, self.run.start, self.run.stop), self.span(self.target)

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        return [values[self.source][self.run]]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        result = NarrowedNode(self.copy())
        if self.place is not None and not kept[self.source].all():
            start = int(kept[self.source][: self.run.start].sum())
            stop = start + int(kept[self.target].sum())
            for position, (array, value) in enumerate(zip(self.limits, (start, stop), strict=True), 1):
                changed = array.copy()
                changed[self.place] = value
                result.arrays[position] = changed
        return result


class Padding(Operator):
    """``Pad``: around the image in any mode, around the channels with a constant."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.source, self.target = node.input[0], self.targets[0]
        pads, value, axes = (self.fixed(position) for position in range(1, 4))
        if self.sources != [self.source] or pads is None:
            raise UnsupportedLayout("its amounts are computed")
        rank = layout.rank(self.source)
        given = np.arange(rank) if axes is None else axes.astype(np.int64) % rank
        amounts = pads.astype(np.int64).reshape(2, -1)
        self.amounts = pads
        self.value = 0.0 if value is None else float(value.reshape(-1)[0])
        self.constant = attributes(node).get("mode", "constant") == "constant"
        self.place = next((i for i, axis in enumerate(given) if axis == CHANNEL_AXIS), None)
        self.before, self.after = (0, 0) if self.place is None else map(int, amounts[:, self.place])
        self.around = bool(amounts[:, given >= 2].any())
        if min(self.before, self.after) < 0 or amounts[:, given == 0].any():
            raise UnsupportedLayout("it cuts channels or pads the batch")
        if self.before + self.after and not self.constant:
            raise UnsupportedLayout("it repeats channels")

    def ties(self) -> Iterator[tuple[Span, Span]]:
        width = self.width(self.source)
        yield self.span(self.source), self.span(self.target, self.before, self.before + width)

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        source = values[self.source]
        if self.around and self.constant:
            source = np.where(source == self.value, source, np.nan)
        return [np.pad(source, (self.before, self.after), constant_values=self.value)]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        result = NarrowedNode(self.copy())
        rows = kept[self.target]
        if self.place is not None and not rows.all():
            changed = self.amounts.reshape(2, -1).copy()
            end = len(rows) - self.after
            changed[:, self.place] = rows[: self.before].sum(), rows[end:].sum()
            result.arrays[1] = changed.reshape(-1)
        return result


class Reshaping(Operator):
    """``Reshape`` and ``Flatten`` where the channels of one side are runs of the other side's.

    Channel c of a [N, C, H, W] tensor becomes the features c H W to (c + 1) H W - 1 of the flat one.
    """

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.source, self.target = node.input[0], self.targets[0]
        sizes = [layout.spatial(name) for name in (self.source, self.target)]
        if self.sources != [self.source] or None in sizes:
            raise UnsupportedLayout("its shape is not known")
        self.old, self.new = self.width(self.source), self.width(self.target)
        before, after = (size or 0 for size in sizes)
        if self.old * before != self.new * after or max(self.old, self.new) % min(self.old, self.new):
            raise UnsupportedLayout("it mixes channels with other dimensions")
        self.shape: NDArray[np.int64] | None = None
        if node.op_type == "Reshape":
            shape = self.fixed(1)
            assert shape is not None
            self.shape = shape.astype(np.int64)
            if self.shape[CHANNEL_AXIS] == 0 and self.old != self.new:
                raise UnsupportedLayout("its shape is not known")

    def ties(self) -> Iterator[tuple[Span, Span]]:
        wide = max(self.old, self.new)
        fine = np.arange(wide)
        yield (self.source, fine * self.old // wide), (self.target, fine * self.new // wide)

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        source = values[self.source]
        if self.new >= self.old:
            return [np.repeat(source, self.new // self.old)]
        rows = source.reshape(self.new, -1)
        return [np.where((rows == rows[:, :1]).all(1), rows[:, 0], np.nan)]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        result = NarrowedNode(self.copy())
        rows = kept[self.target]
        if self.shape is not None and self.shape[CHANNEL_AXIS] > 0 and not rows.all():
            changed = self.shape.copy()
            changed[CHANNEL_AXIS] = rows.sum()
            result.arrays[1] = changed
        return result


class Selection(Operator):
    """``Gather`` of channels by a fixed list."""

    def __init__(self, node: NodeProto, layout: Layout) -> None:
        super().__init__(node, layout)
        self.source, self.target = node.input[0], self.targets[0]
        chosen = self.fixed(1)
        if self.sources != [self.source] or chosen is None or chosen.ndim != 1:
            raise UnsupportedLayout("its indices are computed or not a list")
        if _axis(attributes(node).get("axis", 0), layout.rank(self.source)) != CHANNEL_AXIS:
            raise UnsupportedLayout("it does not select channels")
        self.chosen = chosen.astype(np.int64) % self.width(self.source)

    def ties(self) -> Iterator[tuple[Span, Span]]:
        yield (self.source, self.chosen), self.span(self.target)

    def constants(self, values: Mapping[str, Values]) -> list[Values]:
        return [values[self.source][self.chosen]]

    def narrow(self, kept: Mapping[str, Kept]) -> NarrowedNode:
        positions = np.cumsum(kept[self.source]) - 1
        return NarrowedNode(self.copy(), {1: positions[self.chosen[kept[self.target]]]})


def _axis(axis: object, rank: int) -> int | None:
    return axis % rank if isinstance(axis, int) else None


OPERATORS = {
    "Concat": Concatenation,
    "Split": Division,
    "Slice": Slicing,
    "Pad": Padding,
    "Reshape": Reshaping,
    "Flatten": Reshaping,
    "Gather": Selection,
}
