"""Put a C library together: the frame of its sources, the weights' header, and the files around them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy.c_export.lowering import Shape
from s2ap_deploy.c_export.packing import Packed
from s2ap_deploy.records import SUM_TOLERANCE

Images = NDArray[np.float32]
EMBED_BELOW = 2**20
MAGIC = b"S2APC001"
HEADER = 64
KERNELS = resources.files("s2ap_deploy.c_export") / "kernels"


@dataclass(frozen=True)
class Facts:
    """Texts for the sources: the class names, and one sentence each on inputs and origin."""

    class_names: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sources:
    """The generated files by name, the storage of each layer, and sizes: of an image, of the workspace."""

    files: dict[str, bytes]
    layers: dict[str, Packed]
    weights: bytes
    embedded: bool
    image_shape: Shape
    classes: int
    workspace_bytes: int


@dataclass(frozen=True, eq=False)
class Body:
    """What differs between the sources of two networks, as C: texts in their order in the file.

    ``tensors`` and ``lines`` are the statements of ``model_run``, whose workspace is an array of ``unit``.
    """

    image_shape: Shape
    classes: int
    workspace_bytes: int
    unit: str
    parts: Sequence[str]
    tensors: Sequence[str]
    lines: Sequence[str]


def assemble(
    body: Body, facts: Facts, layers: dict[str, Packed], payload: bytes, embed: bool | None
) -> Sources:
    """Return the sources with packed weights; ``embed``: as constants, by default below 1 MB."""
    payload += bytes(-len(payload) % 64)
    weights = _header(payload) + payload
    embedded = len(weights) < EMBED_BELOW if embed is None else embed
    files = {
        "model.h": _header_file(body, facts, len(weights), embedded).encode(),
        "model.c": _source_file(body, facts, weights, embedded).encode(),
    }
    if not embedded:
        files["weights.bin"] = weights
    sizes = (body.image_shape, body.classes, body.workspace_bytes)
    return Sources(files, layers, weights, embedded, *sizes)


def _header(payload: bytes) -> bytes:
    """Return the header of the weights: magic, bytes in all, checksum of what follows."""
    words = np.frombuffer(payload, np.uint32).astype(np.uint64)
    first = np.cumsum(words, dtype=np.uint64)
    second = np.cumsum(first, dtype=np.uint64)
    sums = (first[-1], second[-1]) if len(words) else (0, 0)
    head = MAGIC + int(HEADER + len(payload)).to_bytes(8, "little")
    head += int(sums[0]).to_bytes(8, "little") + int(sums[1]).to_bytes(8, "little")
    head += zlib.crc32(payload).to_bytes(4, "little")
    return head.ljust(HEADER, b"\0")


def _header_file(body: Body, facts: Facts, weights: int, embedded: bool) -> str:
    channels, height, width = body.image_shape
    return template("model.h").format(
        about=_about(facts),
        channels=channels,
        height=height,
        width=width,
        classes=body.classes,
        workspace=body.workspace_bytes,
        weights=weights,
        embedded=int(embedded),
    )


def _source_file(body: Body, facts: Facts, weights: bytes, embedded: bool) -> str:
    parts = [template("model.c").format(about=_about(facts)), *body.parts, _names(facts, body.classes)]
    if embedded:
        parts.append(_constants(weights))
    run = template("run.c").replace("/*UNIT*/", body.unit)
    statements = "\n".join([*body.tensors, "", *body.lines])
    parts.append(run.replace("/*BODY*/", statements).replace("/*HEAD*/", _bytes(weights[:HEADER])))
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def template(name: str) -> str:
    """Return a file that is filled in."""
    return (KERNELS / f"template_{name}").read_text(encoding="utf-8")


def kernels(name: str) -> str:
    """Return a file of kernels."""
    return (KERNELS / f"{name}.c").read_text(encoding="utf-8")


def struct(kind: str, name: str, fields: dict[str, object]) -> str:
    """Write a constant of a struct, by the names of its fields."""
    listed = ", ".join(f".{field} = {value}" for field, value in fields.items())
    words, lines = listed.split(", "), ["   "]
    for word in words:
        if len(lines[-1]) + len(word) > 106:
            lines.append("   ")
        lines[-1] += f" {word},"
    body = "\n".join(lines).rstrip(",")
    return f"static const {kind} {name} = {{\n{body}}};"


def comment(text: str) -> str:
    """Return a text that is safe inside a comment."""
    return re.sub(r"[^\w .,:;()+-]", "_", text)[:80]


def _names(facts: Facts, classes: int) -> str:
    names = facts.class_names if len(facts.class_names) == classes else tuple(str(i) for i in range(classes))
    listed = ",\n".join(f"    {_string(name)}" for name in names)
    return f"static const char *const names[MODEL_CLASSES] = {{\n{listed}}};"


def _string(text: str) -> str:
    """Quote a text for C, byte by byte where it is not plain ASCII."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{plain}"'


def _about(facts: Facts) -> str:
    return "\n".join(f"   {_comment_line(sentence)}" for sentence in facts.sentences)


def _comment_line(text: str) -> str:
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in text.replace("*/", "* /").replace("/*", "/ *"))


def _constants(weights: bytes) -> str:
    words = np.frombuffer(weights, np.uint32)
    lines = [", ".join(f"0x{word:08x}u" for word in words[i : i + 8]) for i in range(0, len(words), 8)]
    body = ",\n    ".join(lines)
    return f"static const uint32_t constants[{len(words)}] = {{\n    {body}}};"


def _bytes(data: bytes) -> str:
    listed = [", ".join(str(byte) for byte in data[i : i + 16]) for i in range(0, len(data), 16)]
    return ",\n      ".join(listed)


def vectors(images: Images, logits: Images, *, exact: bool) -> bytes:
    """Return the file of test vectors: images [n, C, H, W] and their logits [n, K], to the bit or nearly."""
    tolerance = np.float32(SUM_TOLERANCE * max(1.0, float(np.abs(logits).max(initial=0))))
    head = b"S2APV001" + len(images).to_bytes(4, "little") + int(exact).to_bytes(4, "little")
    pairs = zip(images.astype(np.float32), logits.astype(np.float32), strict=True)
    return head + tolerance.tobytes() + b"".join(x.tobytes() + y.tobytes() for x, y in pairs)


def folder_files(static: bool = False) -> dict[str, bytes]:
    """Return the files around the sources that are the same for every model; ``static``: those of a core."""
    place = resources.files("s2ap_deploy.c_export") / "folder"
    names = {"CMakeLists.txt": "", "Makefile": "", "model.py": "wrapper.txt", "selftest.c": ""}
    if static:
        names = {"Makefile": "cortex-m.mk", "cortex-m.ld": "", "device.c": "", "startup.c": ""}
    return {name: (place / (stored or name)).read_bytes() for name, stored in names.items()}
