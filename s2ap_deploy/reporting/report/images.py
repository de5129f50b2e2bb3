"""Pictures as data URIs: a PNG writer of a few lines, so that a page needs no other file. No torch."""

from __future__ import annotations

import base64
import struct
import zlib

from s2ap_deploy.reporting.figure_data import Picture

_COLOR = {1: 0, 3: 2}  # the PNG specification's color types: grayscale, truecolor


def data_uri(picture: Picture) -> str:
    """``data:image/png;base64,...`` of the picture."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


def png(picture: Picture) -> bytes:
    """The bytes of a PNG (W3C PNG, third edition): header, one stream of unfiltered rows, end.

    Raises ValueError for pixels that do not fill the picture.
    """
    row = picture.width * picture.channels
    if len(picture.pixels) != row * picture.height or picture.channels not in _COLOR or row == 0:
        raise ValueError(f"{len(picture.pixels)} bytes are no {picture.width}x{picture.height} picture")
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, _COLOR[picture.channels], 0, 0, 0)
    rows = b"".join(
        b"\0" + picture.pixels[start : start + row] for start in range(0, len(picture.pixels), row)
    )
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
