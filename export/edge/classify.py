#!/usr/bin/env python3
"""Classify one image with an exported model. Needs Python, NumPy and ONNX Runtime; for JPEG also Pillow.

    python classify.py model.onnx image.png
    python classify.py model.onnx image.png --json

Reads PNG (8 bits per channel, gray or color, not interlaced), PGM and PPM (binary, 8 bits) and .npy:
uint8 [H, W] or [H, W, C] is an image, float32 [C, H, W] is taken as it is; JPEG where Pillow is installed.
The size, the channel order, resize, crop and the class names come from the model's own metadata; pixels are
those of the evaluation, bit for bit. Exits 2 on an input that cannot be used.

``--dump-input FILE`` keeps the tensor that the model got, float32 [C, H, W], as .npy.
cpp/classify.cpp is the same program in C++, with the same answers, messages and exit codes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

# The runtime's own errors, which share no parent.
REFUSALS = (
    states.EPFail,
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
    UnicodeDecodeError,  # a message that quotes a damaged name
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # color type -> samples per pixel
NPY_HEADER = re.compile(
    rb"\{'descr': '([A-Za-z0-9<>|=]{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \((|[0-9]{1,9},|[0-9]{1,9}(?:, [0-9]{1,9})+)\), \}[ \n]*"
)
MAX_PIXELS = 100_000_000
MAX_BATCH = 4096
MAX_THREADS = 1024


class Unusable(Exception):
    """An input that this runner cannot use."""


class Layout(NamedTuple):
    """What a model says about its input: ``size`` is (C, H, W); ``batch`` 1 where any will do."""

    input: str
    output: str
    batch: int
    size: tuple[int, int, int]
    preprocessing: dict[str, Any]
    names: list[str]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Classify one image with an exported ONNX model.", allow_abbrev=False
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="0 takes all cores")
    parser.add_argument("--dump-input", type=Path, metavar="FILE", help="keep the model's input as .npy")
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.threads <= MAX_THREADS:
            raise Unusable(f"--threads is a number from 0 to {MAX_THREADS}")
        model = load(options.model, options.threads)
        try:
            layout = describe(model)
        except UnicodeDecodeError:
            raise Unusable(f"{options.model}: a name in it is not UTF-8") from None
        tensor = prepare(read(options.image), layout.size, layout.preprocessing)
        if options.dump_input is not None:
            dump(tensor, options.dump_input)
        result = classify(model, layout, tensor)
    except Unusable as error:
        print(f"classify: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("classify: there is not enough memory", file=sys.stderr)
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
    options.log_severity_level = 4
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    if not content:
        raise Unusable(f"{path}: the file is empty")
    try:
        # The fallback would try again, and say so on stdout.
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except REFUSALS as error:
        raise Unusable(f"{path}: ONNX Runtime refuses it: {first_line(error)}") from None


def describe(model: ort.InferenceSession) -> Layout:
    """The model's input and the metadata that the exporter left in it."""
    inputs, outputs = model.get_inputs(), model.get_outputs()
    if len(inputs) != 1:
        raise Unusable(f"the model has {len(inputs)} inputs, a classifier of images has one")
    entry = inputs[0]
    if entry.type != "tensor(float)":
        raise Unusable("the model's input is not float32")
    shape = entry.shape
    fixed = len(shape) == 4 and all(isinstance(extent, int) and extent > 0 for extent in shape[1:])
    if not fixed or (isinstance(shape[0], int) and shape[0] > MAX_BATCH):
        raise Unusable("the model's input is not [batch, channels, height, width] of a fixed size")
    if not outputs:
        raise Unusable("the model's output is not float32 [batch, classes]")
    batch = shape[0] if isinstance(shape[0], int) else 1
    try:
        metadata = model.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError:
        raise Unusable("the model's metadata is not understood: it is not UTF-8") from None
    preprocessing = understood(metadata, "s2ap.preprocessing", "{}", valid_preprocessing)
    names = understood(metadata, "s2ap.class_names", "[]", valid_names)
    return Layout(entry.name, outputs[0].name, max(batch, 1), tuple(shape[1:]), preprocessing, names)


def understood(metadata: dict[str, str], key: str, default: str, valid: Any) -> Any:
    """The JSON value under ``key``, if ``valid`` says so."""
    try:
        value = json.loads(metadata.get(key, default), parse_constant=no_constant)
        # Half of a surrogate pair, which JSON can write but nobody can print, fails to encode.
        json.dumps(value, ensure_ascii=False).encode()
        fits = valid(value)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        raise Unusable(f"the model's metadata is not understood: {key}")
    return value


def no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def valid_preprocessing(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("channel_order", "RGB") not in ("L", "RGB"):
        return False
    for key in ("resize", "crop"):
        pixels = value.get(key)
        if pixels is not None and not (type(pixels) is int and 0 < pixels <= MAX_PIXELS):
            return False
    limits = value.get("value_range", [0.0, 1.0])
    return (
        isinstance(limits, list)
        and len(limits) == 2
        and all(type(limit) in (int, float) and abs(limit) <= 1e6 for limit in limits)
    )


def valid_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def classify(model: ort.InferenceSession, layout: Layout, tensor: np.ndarray) -> dict[str, object]:
    """The model's verdict on the tensor of :func:`prepare`; a fixed batch is filled up with copies."""
    batch = np.repeat(tensor[None], layout.batch, axis=0)
    try:
        output = model.run([layout.output], {layout.input: batch})[0]
    except REFUSALS as error:
        raise Unusable(f"ONNX Runtime cannot run the model: {first_line(error)}") from None
    if getattr(output, "dtype", None) != np.float32 or output.ndim != 2 or 0 in output.shape:
        raise Unusable("the model's output is not float32 [batch, classes]")
    logits = output[0]
    index = int(logits.argmax())
    name = layout.names[index] if index < len(layout.names) else str(index)
    return {"class": name, "index": index, "logits": [float(value) for value in logits]}


def dump(tensor: np.ndarray, path: Path) -> None:
    try:
        with open(path, "wb") as stream:  # np.save would add a suffix to the name
            np.save(stream, tensor)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None


def first_line(error: Exception) -> str:
    """Without the prefix that the Python binding adds."""
    words = str(error)
    if isinstance(error, UnicodeDecodeError):
        words = error.object.decode(errors="replace")
    line = (words.splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)


def prepare(pixels: np.ndarray, size: tuple[int, int, int], preprocessing: dict[str, Any]) -> np.ndarray:
    """float32 [C, H, W] in the model's value range, from uint8 [H, W, C] or a finished tensor."""
    channels, height, width = size
    if pixels.dtype == np.float32:
        if pixels.shape != size:
            raise Unusable(f"the tensor is {list(pixels.shape)}, the model takes {list(size)}")
        return np.ascontiguousarray(pixels)
    pixels = convert(pixels, channels)
    resize, crop = preprocessing.get("resize"), preprocessing.get("crop")
    if resize is not None and min(pixels.shape[:2]) != resize:
        pixels = shorter_side(pixels, resize)
    if crop is not None:
        pixels = center(pixels, crop)
    if pixels.shape != (height, width, channels):
        raise Unusable(f"the image is {pixels.shape[1]}x{pixels.shape[0]}, the model takes {width}x{height}")
    low, high = preprocessing.get("value_range", (0.0, 1.0))
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if (low, high) != (0.0, 1.0):
        scaled = scaled * np.float32(high - low) + np.float32(low)
    return np.ascontiguousarray(scaled)


def convert(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gray to color by repetition; color to gray by ITU-R BT.601 luma in 16-bit fixed point."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3 and pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if channels == 1 and pixels.shape[2] == 3:
        luma = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    raise Unusable(f"the image has {pixels.shape[2]} channels, the model takes {channels}")


def shorter_side(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize the shorter side: bilinear with antialias in 8-bit steps, the bits that Pillow gives.

    Its versions differ in which axis of an image of more than two heights to a width comes first.
    """
    height, width = pixels.shape[:2]
    if side < width and height > 2 * width:
        raise Unusable(f"the image is {width}x{height}; scale its shorter side to {side} pixels first")
    longer = int(side * max(height, width) / min(height, width))
    checked(side, longer)
    rows, columns = (longer, side) if width <= height else (side, longer)
    across = resampled(pixels.transpose(1, 0, 2), columns).transpose(1, 0, 2)
    return resampled(across, rows)


def resampled(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis of uint8 [N, M, C] with weights of 22 bits (Pillow's Resample.c)."""
    if len(pixels) == size:
        return pixels
    scale = len(pixels) / size
    support = max(scale, 1.0)
    result = np.empty((size, *pixels.shape[1:]), np.uint8)
    for index in range(size):
        middle = (index + 0.5) * scale
        first = max(int(middle - support + 0.5), 0)
        last = min(int(middle + support + 0.5), len(pixels))
        places = [(each - middle + 0.5) * (1.0 / support) for each in range(first, last)]
        weights = [max(1.0 - abs(place), 0.0) for place in places]
        total = 0.0
        for weight in weights:
            total += weight
        steps = np.array([int(0.5 + weight / total * (1 << 22)) for weight in weights], np.int64)
        sums = np.tensordot(steps, pixels[first:last].astype(np.int64), 1) + (1 << 21)
        result[index] = np.clip(sums >> 22, 0, 255)
    return result


def center(pixels: np.ndarray, crop: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) < crop:
        raise Unusable(f"the image is {width}x{height}, smaller than the crop of {crop} pixels")
    # round() sends halves to the even neighbor, as the evaluation's crop does.
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
            return decode_npy(data)
        if data.startswith(b"\xff\xd8\xff"):
            return decode_jpeg(data)
    except ValueError as error:
        raise Unusable(f"{path}: damaged: {error}") from None
    raise Unusable(f"{path}: neither PNG, JPEG, PGM, PPM nor .npy")


def decode_npy(data: bytes) -> np.ndarray:
    """What numpy.save wrote: uint8 [H, W] or [H, W, C], or float32 [C, H, W]."""
    width = 2 if data[6:7] == b"\x01" else 4
    length = int.from_bytes(data[8 : 8 + width], "little")
    start = 8 + width + length
    match = NPY_HEADER.fullmatch(data[8 + width : start]) if len(data) >= start else None
    if match is None:
        raise ValueError("the header is not that of one array")
    kind, fortran = match[1].decode(), match[2] == b"True"
    shape = tuple(int(extent) for extent in match[3].split(b",") if extent)
    if (kind, len(shape)) not in (("|u1", 2), ("|u1", 3), ("<f4", 3)):
        raise Unusable(f"the array is {kind} {list(shape)}; it must be uint8 or float32, see --help")
    count = math.prod(shape)
    if len(data) - start < count * int(kind[2]):
        raise ValueError("too few values")
    array = np.frombuffer(data, kind, count, start).reshape(shape, order="F" if fortran else "C")
    if kind == "<f4":
        if not np.isfinite(array).all():
            raise Unusable("the array holds values that are not finite")
        return array.astype(np.float32, copy=False)
    checked(shape[1], shape[0])
    return array.reshape(shape) if len(shape) == 3 else array[:, :, None]


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decode a JPEG file, gray or color, with Pillow; its EXIF rotation is not applied."""
    try:
        from PIL import Image
    except ImportError:
        raise Unusable("JPEG needs Pillow: pip install pillow") from None
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.mode not in ("L", "RGB"):
                raise Unusable("only JPEG in gray or RGB is read")
            checked(*image.size)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("the JPEG data cannot be decoded") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def decode_pnm(data: bytes) -> np.ndarray:
    """Binary PGM (P5) or PPM (P6) with 8 bits per sample."""
    fields: list[bytes] = []
    position = 0
    while len(fields) < 4:
        if data[position : position + 1].isspace():
            position += 1
        elif data[position : position + 1] == b"#":
            position = data.find(b"\n", position) + 1 or len(data)
        else:
            end = position
            while end < len(data) and not data[end : end + 1].isspace():
                end += 1
            if end == position:
                raise ValueError("the header ends early")
            fields.append(data[position:end])
            position = end
    if fields[0] not in (b"P5", b"P6") or not all(each.isdigit() and len(each) < 10 for each in fields[1:]):
        raise ValueError("the header is not that of PGM or PPM")
    width, height, largest = (int(field) for field in fields[1:])
    if largest != 255:
        raise Unusable(f"the largest sample is {largest}, only 255 (8 bits) is read")
    channels = 1 if fields[0] == b"P5" else 3
    count = checked(width, height) * channels
    if len(data) - position - 1 < count:
        raise ValueError("too few pixels")
    return np.frombuffer(data, np.uint8, count, position + 1).reshape(height, width, channels)


def decode_png(data: bytes) -> np.ndarray:
    """A PNG of 8 bits per sample; an alpha channel must be opaque throughout."""
    header, compressed = None, []
    position = len(PNG_SIGNATURE)
    while position < len(data):
        if len(data) - position < 12:
            raise ValueError("the file ends early")
        length, kind = struct.unpack_from(">I4s", data, position)
        if len(data) - position - 12 < length:
            raise ValueError("the file ends early")
        body = data[position + 8 : position + 8 + length]
        (expected,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(kind + body) != expected:
            raise ValueError(f"checksum of the chunk at byte {position}")
        if kind == b"IHDR":
            if length != 13:
                raise ValueError("the header is too long or too short")
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            compressed.append(body)
        elif kind == b"tRNS":
            raise Unusable("transparency is not read; save the image without it")
        elif kind == b"IEND":
            break
        position += 12 + length
    if header is None:
        raise ValueError("no header")
    width, height, depth, color, _, _, interlaced = header
    if depth != 8 or interlaced or color not in PNG_CHANNELS:
        raise Unusable("only PNG of 8 bits per channel, gray or color, not interlaced, is read")
    channels = PNG_CHANNELS[color]
    size = checked(width, height) // width * (width * channels + 1)
    try:
        rows = zlib.decompressobj().decompress(b"".join(compressed), size)
    except zlib.error:
        raise ValueError("the pixels cannot be decompressed") from None
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
