#!/usr/bin/env python3
"""Classify one image with an exported model. Needs Python, NumPy and ONNX Runtime, nothing else.

    python classify.py model.onnx image.png
    python classify.py model.onnx image.png --json

Reads PNG (8 bits per channel, grey or colour, not interlaced), PGM and PPM (binary, 8 bits) and .npy:
uint8 [H, W] or [H, W, C] is an image, float32 [C, H, W] is taken as it is. The size, the channel order,
the crop and the class names come from the model's own metadata. Exits 2 on an input that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

# The runtime's own errors, which share no parent.
REFUSALS = (
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> samples per pixel
MAX_PIXELS = 100_000_000


class Unusable(Exception):
    """An input that this runner cannot use."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Classify one image with an exported ONNX model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        model = load(options.model, options.threads)
        result = classify(model, read(options.image))
    except Unusable as error:
        print(f"classify: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    else:
        print(f"class {result['index']} ({result['class']})")
        print("logits " + " ".join(f"{value:.6g}" for value in result["logits"]))
    return 0


def load(path: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    except REFUSALS as error:
        raise Unusable(f"{path}: ONNX Runtime refuses it: {str(error).splitlines()[0]}") from None


def classify(model: ort.InferenceSession, pixels: np.ndarray) -> dict[str, object]:
    """The model's verdict on what :func:`read` returned."""
    metadata = model.get_modelmeta().custom_metadata_map
    entry = model.get_inputs()[0]
    try:
        preprocessing = json.loads(metadata.get("s2ap.preprocessing", "{}"))
        names = json.loads(metadata.get("s2ap.class_names", "[]"))
    except ValueError as error:
        raise Unusable(f"the model's metadata is damaged: {error}") from None
    tensor = prepare(pixels, tuple(entry.shape[1:]), preprocessing)
    logits = model.run(None, {entry.name: tensor[None]})[0][0]
    index = int(logits.argmax())
    name = names[index] if index < len(names) else str(index)
    return {"class": name, "index": index, "logits": [float(value) for value in logits]}


def prepare(pixels: np.ndarray, size: tuple[int, int, int], preprocessing: dict[str, object]) -> np.ndarray:
    """float32 [C, H, W] in the model's value range, from uint8 [H, W, C] or a finished tensor."""
    channels, height, width = size
    if pixels.dtype == np.float32:
        if pixels.shape != size:
            raise Unusable(f"the tensor is {list(pixels.shape)}, the model takes {list(size)}")
        return pixels
    pixels = convert(pixels, channels)
    resize, crop = preprocessing.get("resize"), preprocessing.get("crop")
    if resize is not None and min(pixels.shape[:2]) != resize:
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise Unusable(f"the image is {found}; scale its shorter side to {resize} pixels first")
    if crop is not None:
        pixels = centre(pixels, int(crop))
    if pixels.shape != (height, width, channels):
        raise Unusable(f"the image is {pixels.shape[1]}x{pixels.shape[0]}, the model takes {width}x{height}")
    low, high = preprocessing.get("value_range", (0.0, 1.0))
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if (low, high) != (0.0, 1.0):
        scaled = scaled * np.float32(high - low) + np.float32(low)
    return np.ascontiguousarray(scaled)


def convert(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey to colour by repetition; colour to grey by ITU-R BT.601 luma in 16-bit fixed point."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3 and pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        luma = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    raise Unusable(f"the image has {pixels.shape[2]} channels, the model takes {channels}")


def centre(pixels: np.ndarray, crop: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) < crop:
        raise Unusable(f"the image is {width}x{height}, smaller than the crop of {crop} pixels")
    # round() sends halves to the even neighbour, as the evaluation's crop does.
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    return pixels[top : top + crop, left : left + crop]


def read(path: Path) -> np.ndarray:
    """uint8 [H, W, C] for an image, float32 [C, H, W] for a finished tensor."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    try:
        if data.startswith(PNG_SIGNATURE):
            return decode_png(data)
        if data[:2] in (b"P5", b"P6"):
            return decode_pnm(data)
        if data.startswith(b"\x93NUMPY"):
            return check_array(np.load(path, allow_pickle=False))
    except (ValueError, IndexError, EOFError, struct.error, zlib.error) as error:
        raise Unusable(f"{path}: damaged: {error}") from None
    raise Unusable(f"{path}: neither PNG, PGM, PPM nor .npy")


def check_array(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8 and array.ndim == 2:
        return array[:, :, None]
    if array.dtype in (np.uint8, np.float32) and array.ndim == 3:
        if not np.isfinite(array).all():
            raise Unusable("the array holds values that are not finite")
        return array
    raise Unusable(f"the array is {array.dtype} {list(array.shape)}; it must be uint8 or float32, see --help")


def decode_pnm(data: bytes) -> np.ndarray:
    """Binary PGM (P5) or PPM (P6) with 8 bits per sample."""
    fields: list[bytes] = []
    position = 0
    while len(fields) < 4:
        if data[position : position + 1].isspace():
            position += 1
        elif data[position : position + 1] == b"#":
            position = data.index(b"\n", position) + 1
        else:
            end = position
            while end < len(data) and not data[end : end + 1].isspace():
                end += 1
            if end == position:
                raise ValueError("the header ends early")
            fields.append(data[position:end])
            position = end
    width, height, largest = (int(field) for field in fields[1:])
    if largest != 255:
        raise Unusable(f"the largest sample is {largest}, only 255 (8 bits) is read")
    channels = 1 if fields[0] == b"P5" else 3
    count = checked(width, height) * channels
    pixels = np.frombuffer(data, np.uint8, count, position + 1)
    return pixels.reshape(height, width, channels)


def decode_png(data: bytes) -> np.ndarray:
    """A PNG of 8 bits per sample; an alpha channel must be opaque throughout."""
    header, compressed = None, b""
    position = len(PNG_SIGNATURE)
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        (expected,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(kind + body) != expected:
            raise ValueError(f"checksum of the {kind.decode('latin-1')} chunk")
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            compressed += body
        elif kind == b"tRNS":
            raise Unusable("transparency is not read; save the image without it")
        elif kind == b"IEND":
            break
        position += 12 + length
    if header is None:
        raise ValueError("no header")
    width, height, depth, colour, _, _, interlaced = header
    if depth != 8 or interlaced or colour not in PNG_CHANNELS:
        raise Unusable("only PNG of 8 bits per channel, grey or colour, not interlaced, is read")
    channels = PNG_CHANNELS[colour]
    size = checked(width, height) // width * (width * channels + 1)
    inflater = zlib.decompressobj()
    rows = inflater.decompress(compressed, size)
    if len(rows) != size:
        raise ValueError("too few pixels")
    pixels = unfilter(np.frombuffer(rows, np.uint8).reshape(height, -1), channels)
    pixels = pixels.reshape(height, width, channels)
    if channels in (2, 4):
        if (pixels[:, :, -1] != 255).any():
            raise Unusable("transparency is not read; save the image without it")
        pixels = pixels[:, :, :-1]
    return pixels


def unfilter(rows: np.ndarray, channels: int) -> np.ndarray:
    """Undo the per-row prediction of PNG (W3C PNG, section 9): uint8 [H, 1 + W C] -> [H, W C]."""
    result = np.zeros((len(rows), rows.shape[1] - 1), np.uint8)
    above = np.zeros(rows.shape[1] - 1, np.uint8)
    for index, row in enumerate(rows):
        kind, values = int(row[0]), row[1:]
        if kind == 0:
            line = values
        elif kind == 1:
            # Modular sums of uint8 wrap as the format asks.
            line = values.reshape(-1, channels).cumsum(0, dtype=np.uint8).reshape(-1)
        elif kind == 2:
            line = values + above
        elif kind in (3, 4):
            line = predict(kind, values.tolist(), above.tolist(), channels)
        else:
            raise ValueError(f"row filter {kind}")
        result[index] = above = line
    return result


def predict(kind: int, values: list[int], above: list[int], channels: int) -> np.ndarray:
    """The two filters that depend on the pixel to the left: average (3) and Paeth (4)."""
    line = [0] * channels + values
    corner = [0] * channels + above
    for index, up in enumerate(above, start=channels):
        left, diagonal = line[index - channels], corner[index - channels]
        if kind == 3:
            guess = (left + up) // 2
        else:
            to_left, to_up, to_corner = (
                abs(up - diagonal),
                abs(left - diagonal),
                abs(left + up - 2 * diagonal),
            )
            if to_left <= to_up and to_left <= to_corner:
                guess = left
            else:
                guess = up if to_up <= to_corner else diagonal
        line[index] = (line[index] + guess) & 255
    return np.array(line[channels:], np.uint8)


def checked(width: int, height: int) -> int:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise Unusable(f"an image of {width}x{height} pixels is not read")
    return width * height


if __name__ == "__main__":
    sys.exit(main())
