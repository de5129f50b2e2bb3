#!/usr/bin/env python3
"""Judge every point of a certificate on this device: the program inside a bundle of s2ap-deploy.

    python bundle.pyz                            # judges the points, measures, writes device.json
    python bundle.pyz --threads 4 --name board-4
    python bundle.pyz --images DIR --reader camera.py:read

Needs Python 3.8 or newer, NumPy, and the runtime of the packed file. A C library needs no runtime: it is
built here with CC or cc, or named with --library. Exits 0 where this device gives the certificate's answers
on every point, 1 where an answer differs (with --images also one on the device's pixels), 2 where it cannot
be judged.

With --images, pixels are made here from image files (DIR/test/CLASS/NAME, or those in the bundle) and are
compared with the certified ones: by Pillow, or by --reader FILE:FUNCTION, a function of yours from a path to
uint8 [H, W] or [H, W, C], or to float32 [C, H, W] in [0, 1], of the network's size.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import datetime, timezone
from importlib import metadata

import numpy as np

RECORD = "s2ap-deploy device record"
NAME = "abcdefghijklmnopqrstuvwxyz0123456789._-"
NOT_FINITE = -1  # the class of an answer that holds NaN or infinity
PIECE = 1 << 20


class Unusable(Exception):
    """A bundle, an option or an image that cannot be used."""


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python bundle.pyz",
        description="Judge every point of a certificate on this device.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="device.json", metavar="FILE", help="default: device.json")
    parser.add_argument("--name", default="device", help="name of this device, for s2ap-deploy collect")
    parser.add_argument("--threads", type=int, default=1, help="threads of the runtime; default: 1")
    parser.add_argument("--repeats", type=int, default=200, help="timed inferences; default: 200")
    parser.add_argument("--warmup", type=int, default=20, help="inferences before them; default: 20")
    parser.add_argument("--library", metavar="FILE", help="the C library, built for this device")
    parser.add_argument("--images", nargs="?", const="", metavar="DIR", help="compare pixels made here")
    parser.add_argument("--reader", metavar="FILE:FUNCTION", help="your function that makes the pixels")
    options = parser.parse_args(arguments)
    try:
        check(options)
        with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
            record = judged(os.path.dirname(os.path.abspath(__file__)), options, folder)
        write(options.output, record)
    except Unusable as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a traceback would exit with 1, which means that answers differ
        print(f"bundle: unexpected: {type(error).__name__}: {error}", file=sys.stderr)
        return 70
    return show(record, options.output)


def check(options):
    """Refuse options that cannot be used, before any work."""
    name = options.name
    if not 0 < len(name) <= 64 or not set(name) <= set(NAME) or not name[0].isalnum():
        raise Unusable("--name takes up to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first")
    if not 1 <= options.threads <= 1024 or not 1 <= options.repeats <= 10000:
        raise Unusable("--threads is 1 to 1024, --repeats 1 to 10000")
    if not 0 <= options.warmup <= 10000:
        raise Unusable("--warmup is 0 to 10000")
    if options.reader is not None and (options.images is None or ":" not in options.reader):
        raise Unusable("--reader takes FILE:FUNCTION, and --images beside it")
    folder = os.path.dirname(os.path.abspath(options.output))
    if os.path.isdir(options.output) or not os.path.isdir(folder):
        raise Unusable(f"there is no folder for {options.output}")


def judged(path, options, folder):
    """Return the record of this device: its answers, times, memory, processor and versions."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017 -- Python 3.8
    about, identity = opened(path)
    with zipfile.ZipFile(path) as bundle:
        for name in about["members"]:
            if name.startswith("file/"):
                bundle.extract(name, folder)
        runtime = RUNTIMES.get(about["file"]["runtime"])
        if runtime is None:
            raise Unusable("this program does not know the runtime {}".format(about["file"]["runtime"]))
        # Load: the memory before it is that of Python, NumPy and the imported runtime.
        begun = time.perf_counter()
        try:
            run, versions = runtime(os.path.join(folder, "file"), about, options)
        except (ImportError, RuntimeError, OSError, ValueError) as error:
            raise Unusable(
                f"{about['file']['runtime']} does not open the file: {first_line(error)}"
            ) from None
        loaded = 1000 * (time.perf_counter() - begun)
        answers = Answers(about)
        first = None
        # Judge every clean point, then the attacked points that are other images than the clean ones.
        for index, attacked, image, expected in points(bundle, about):
            first = image.copy() if first is None else first
            answers.add(index, attacked, np.asarray(run(image), np.float32).reshape(-1), expected)
        # Measure one image at a time.
        for _ in range(options.warmup):
            run(first)
        times = []
        for _ in range(options.repeats):
            begun = time.perf_counter()
            run(first)
            times.append(round(1000 * (time.perf_counter() - begun), 6))
        memory = peak_memory()
        camera = None if options.images is None else camera_record(bundle, about, run, options)
    record = {
        "schema_version": 1,
        "kind": RECORD,
        "name": options.name,
        "started": started,
        "bundle_sha256": identity,
        "certificate_sha256": about["certificate"]["sha256"],
        "file": about["file"]["name"],
        "file_sha256": about["file"]["sha256"],
        "runtime": about["file"]["runtime"],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
        "n": about["n"],
        **answers.record(),
        "threads": options.threads,
        "warmup": options.warmup,
        "load_ms": round(loaded, 6),
        "times_ms": times,
        "p50_ms": quantile(times, 0.5),
        "p95_ms": quantile(times, 0.95),
        "peak_memory_bytes": memory,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "features": features(),
        "camera": camera,
    }
    record["content_sha256"] = hashlib.sha256(canonical(record)).hexdigest()
    return record


def opened(path):
    """Return the facts of the bundle and their SHA-256, after hashing every member."""
    try:
        with zipfile.ZipFile(path) as bundle:
            names = bundle.namelist()
            content = bundle.read("bundle.json")
            about = json.loads(content.decode("utf-8"))
            if about.get("kind") != "s2ap-deploy bundle" or about.get("schema_version") != 1:
                raise Unusable("bundle.json is of another version: use the bundle's own program")
            members = about["members"]
            if sorted(names) != sorted([*members, "bundle.json"]) or len(set(names)) != len(names):
                raise Unusable("the bundle holds other files than it lists")
            for name, expected in members.items():
                found = hashlib.sha256()
                with bundle.open(name) as stream:
                    for piece in iter(lambda: stream.read(PIECE), b""):
                        found.update(piece)
                if found.hexdigest() != expected:
                    raise Unusable(f"{name} in the bundle has changed: make the bundle again")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise Unusable(f"{path} is damaged or not a bundle: {error}") from None
    return about, hashlib.sha256(content).hexdigest()


def points(bundle, about):
    """Yield (index, whether attacked, float32 [C, H, W], expected logits): one image in memory at a time."""
    size, classes = tuple(about["input"]), about["classes"]
    clean = ((index, False) for index in range(about["n"]))
    attacked = ((index, True) for index in about["points"]["attacked"])
    with bundle.open("points/logits.f32") as logits:
        for name, entries in (("clean", clean), ("attacked", attacked)):
            member = "points/{}.{}".format(name, about["points"]["types"][name])
            with bundle.open(member) as stream:
                for index, is_attacked in entries:
                    image = pixels(stream, member, size)
                    expected = np.frombuffer(logits.read(4 * classes), "<f4")
                    yield index, is_attacked, image, expected


def pixels(stream, member, size):
    """Read one image: levels of 1/255 are stored as bytes."""
    count = size[0] * size[1] * size[2]
    if member.endswith(".u8"):
        levels = np.frombuffer(stream.read(count), np.uint8)
        image = levels.astype(np.float32) / np.float32(255)
    else:
        image = np.frombuffer(stream.read(4 * count), "<f4").astype(np.float32)
    return image.reshape(size)


class Answers:
    """The classes on every point, and the points on which they are not the certificate's."""

    def __init__(self, about):
        self.expected = about["expected"]
        self.broken = set(about["points"]["attacked"])
        self.classes = about["classes"]
        self.clean = []
        self.attacked = {}
        self.different = []
        self.largest = 0.0

    def add(self, index, attacked, scores, expected):
        if scores.shape != (self.classes,):
            raise Unusable(f"the file gives {scores.size} logits, not {self.classes}")
        finite = bool(np.isfinite(scores).all())
        found = int(scores.argmax()) if finite else NOT_FINITE
        if attacked:
            self.attacked[index] = found
        else:
            self.clean.append(found)
        if finite:
            self.largest = max(self.largest, float(np.abs(scores - expected).max()))
        # An attacked point that is the clean image has no answer of its own.
        kinds = [attacked] if attacked or index in self.broken else [False, True]
        for kind in kinds:
            wanted = self.expected["attacked" if kind else "clean"][index]
            if found != wanted:
                gap = float(scores[found] - scores[wanted]) if finite else None
                self.different.append({"index": index, "attacked": kind, "gap": gap})

    def record(self):
        attacked = [self.attacked.get(index, found) for index, found in enumerate(self.clean)]
        different = sorted(self.different, key=lambda each: (each["attacked"], each["index"]))
        return {
            "clean": self.clean,
            "attacked": attacked,
            "different": different,
            "max_logit_difference": self.largest,
        }


def open_onnxruntime(folder, about, options):
    """Open an ONNX file in ONNX Runtime."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Unusable(f"ONNX Runtime is missing ({error}): pip install onnxruntime") from None
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    path = os.path.join(folder, about["file"]["main"])
    try:
        session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no parent
        raise Unusable(f"ONNX Runtime refuses the file: {first_line(error)}") from None
    entry = session.get_inputs()[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else 1

    def run(image):
        return session.run(None, {entry.name: np.repeat(image[None], batch, axis=0)})[0][0]

    return run, {"onnxruntime": ort.__version__}


def open_library(folder, about, options):
    """Load the C library: the one of --library, or one that is built from the packed sources."""
    facts = json.loads(read(os.path.join(folder, "model.json")))
    path = options.library
    if path is None:
        path = built(folder)
    elif not os.path.isfile(path):
        raise Unusable(f"there is no library {path}")
    try:
        library = ctypes.CDLL(os.path.abspath(path))
        library.model_weights.restype = ctypes.c_void_p
        library.model_run.argtypes = [ctypes.c_void_p] * 4
        library.model_run.restype = None
        library.model_check.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    except (OSError, AttributeError) as error:
        raise Unusable(f"{path} is not the library for this device: {error}") from None
    stored = None if facts["embedded"] else np.fromfile(os.path.join(folder, "weights.bin"), np.uint8)
    weights = library.model_weights() if stored is None else stored.ctypes.data
    if stored is not None and not library.model_check(weights, stored.size):
        raise Unusable(f"the weights are not those of the library {path}")
    workspace = np.empty(facts["workspace_bytes"] // 4 + 1, np.float32)
    logits = np.empty(about["classes"], np.float32)

    def run(image):
        values = np.ascontiguousarray(image, np.float32)
        library.model_run(weights, values.ctypes.data, logits.ctypes.data, workspace.ctypes.data)
        _ = stored  # the library reads it: it lives as long as this function
        return logits.copy()

    return run, {"library": digest(path)}


def built(folder):
    """Build the packed C sources with CC or cc, for this processor where the compiler can."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise Unusable(f"no C compiler ({command[0]}): build the library and name it with --library")
    path = os.path.join(folder, "libmodel.so")
    rest = ["-shared", "-fPIC", "-o", path, os.path.join(folder, "model.c")]
    for native in (["-march=native"], []):
        done = subprocess.run(
            [*command, "-std=c11", "-O3", *native, *rest], stderr=subprocess.PIPE, check=False
        )
        if done.returncode == 0:
            return path
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["without a message"]
    raise Unusable(f"the C library cannot be built: {lines[-1]}")


def open_litert(folder, about, options):
    """Open a file of LiteRT (TensorFlow Lite)."""
    module, name = imported("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
    run = module.Interpreter(
        model_path=os.path.join(folder, about["file"]["main"]), num_threads=options.threads
    )
    run.allocate_tensors()
    entry, output = run.get_input_details()[0], run.get_output_details()[0]
    scale, zero = output["quantization"]

    def answer(image):
        run.set_tensor(entry["index"], image[None])
        run.invoke()
        found = run.get_tensor(output["index"])[0]
        return scale * (found.astype(np.float32) - zero) if found.dtype == np.int8 else found

    return answer, versions_of("ai-edge-litert" if name.startswith("ai") else "tflite-runtime", about)


def open_executorch(folder, about, options):
    """Open a program of ExecuTorch; it sets its threads itself."""
    import torch

    module, _ = imported("executorch.runtime")
    program = module.Runtime.get().load_program(os.path.join(folder, about["file"]["main"]))
    method = program.load_method("forward")

    def answer(image):
        return method.execute((torch.from_numpy(image[None]),))[0].numpy()[0].copy()

    return answer, versions_of("executorch", about)


def open_ncnn(folder, about, options):
    """Open files of ncnn, without its 16-bit options."""
    ncnn, _ = imported("ncnn")
    network = ncnn.Net()
    network.opt.num_threads = options.threads
    for name in dir(network.opt):
        if name.startswith(("use_fp16", "use_bf16", "use_vulkan", "use_int8")):
            setattr(network.opt, name, False)
    if network.load_param(os.path.join(folder, "model.param")) or network.load_model(
        os.path.join(folder, "model.bin")
    ):
        raise Unusable("ncnn does not load the files")

    def answer(image):
        with network.create_extractor() as run:
            run.input("in0", ncnn.Mat(np.ascontiguousarray(image)).clone())
            return np.array(run.extract("out0")[1], np.float32)

    return answer, versions_of("ncnn", about)


def open_openvino(folder, about, options):
    """Open a graph of OpenVINO in float32 arithmetic, also where bf16 would be its default."""
    openvino, _ = imported("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": options.threads}
    core = openvino.Core()
    model = core.compile_model(core.read_model(os.path.join(folder, about["file"]["main"])), "CPU", settings)
    request = model.create_infer_request()
    first = request.model_inputs[0].partial_shape[0]
    batch = first.get_length() if first.is_static else 1

    def answer(image):
        return request.infer([np.repeat(image[None], batch, axis=0)])[0][0].copy()

    return answer, versions_of("openvino", about)


def open_coreml(folder, about, options):
    """Open a package of Core ML, which predicts on macOS only."""
    ct, _ = imported("coremltools")
    path = os.path.join(folder, about["file"]["main"])
    model = ct.models.MLModel(path, compute_units=ct.ComputeUnit.CPU_ONLY)
    description = model.get_spec().description
    entry, output = description.input[0].name, description.output[0].name

    def answer(image):
        return np.asarray(model.predict({entry: image[None]})[output], np.float32)[0]

    return answer, versions_of("coremltools", about)


def imported(*modules):
    """Return the first of the modules that is there, and its name."""
    for name in modules:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name), name
    raise Unusable(f"{modules[0].split('.')[0]} is missing: pip install it on this device")


def versions_of(distribution, about):
    with contextlib.suppress(metadata.PackageNotFoundError):
        return {about["file"]["runtime"]: metadata.version(distribution)}
    return {}


RUNTIMES = {
    "onnxruntime": open_onnxruntime,
    "c": open_library,
    "litert": open_litert,
    "executorch": open_executorch,
    "ncnn": open_ncnn,
    "openvino": open_openvino,
    "coreml": open_coreml,
}
"""How to open a file, by its runtime: a function of (folder, facts, options) that returns another one, from
float32 [C, H, W] to logits [K], and the versions of what it uses."""


def camera_record(bundle, about, run, options):
    """Compare pixels made on this device with the certified ones, and the classes on both.

    The attacked image is the device's image with the perturbation that the certificate's attack found.
    """
    packed = {name[len("images/") :] for name in about["members"] if name.startswith("images/")}
    make, name = reader(about, options.reader)
    wanted = {}
    for index, sample in enumerate(about["ids"]):
        if options.images:
            path = os.path.join(options.images, *sample.split("/"))
            if os.path.isfile(path):
                wanted[index] = path
        elif sample in packed:
            wanted[index] = sample
    if not wanted:
        where = "{} has none of the certified images, such as {}".format(options.images, about["ids"][0])
        raise Unusable(where if options.images else "this bundle holds no images: name their folder")
    certified = {}
    for index, _, image, _ in points(bundle, about):
        if index in wanted:
            certified.setdefault(index, []).append(image.copy())
    rows = []
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        for index, path in sorted(wanted.items()):
            if not options.images:
                path = bundle.extract("images/" + path, folder)
            here = taken(make, path, tuple(about["input"]))
            clean, attacked = certified[index][0], certified[index][-1]
            moved = np.clip(here + (attacked - clean), 0, 1).astype(np.float32)
            row = {"index": index, "distance": distance(here - clean, about["threat"]["norm"])}
            for kind, image in (("clean", here), ("attacked", moved)):
                scores = np.asarray(run(image), np.float32).reshape(-1)
                row[kind] = int(scores.argmax()) if np.isfinite(scores).all() else NOT_FINITE
            rows.append(row)
    return {"reader": name, "images": rows}


def reader(about, wanted):
    """Return a function from a path to pixels, and its name: Pillow as in the evaluation, or the user's."""
    if wanted is not None:
        path, _, function = wanted.rpartition(":")
        space = {"__name__": "reader", "__file__": path}
        try:
            exec(compile(read(path), path, "exec"), space)  # code that the user of this device names
            return space[function], f"{os.path.basename(wanted)} {digest(path)[:12]}"
        except (OSError, SyntaxError, KeyError) as error:
            raise Unusable(f"--reader {wanted}: {error!r}") from None
    try:
        import PIL
        from PIL import Image
    except ImportError:
        raise Unusable("Pillow is missing: pip install pillow, or name your --reader") from None
    steps = about["preprocessing"]
    mode = steps.get("channel_order", "RGB")

    def make(path):
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise Unusable(f"{path} has more than 8 bits per channel")
            return np.asarray(fitted(image.convert(mode), steps, Image.BILINEAR))

    return make, f"Pillow {PIL.__version__}"


def fitted(image, steps, bilinear):
    """Resize the shorter side and crop the center, as the evaluation does."""
    resize, crop = steps.get("resize"), steps.get("crop")
    if resize is not None and min(image.size) != resize:
        width, height = image.size
        longer = int(resize * max(image.size) / min(image.size))
        size = (resize, longer) if width <= height else (longer, resize)
        image = image.resize(size, bilinear)
    if crop is not None and image.size != (crop, crop):
        left, top = (round((side - crop) / 2) for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    return image


def taken(make, path, size):
    """Return pixels as float32 [C, H, W] in [0, 1]."""
    try:
        array = np.asarray(make(path))
    except Exception as error:  # of Pillow, or of the user's code
        raise Unusable(f"{path}: {first_line(error)}") from None
    if array.dtype == np.uint8:
        array = array[:, :, None] if array.ndim == 2 else array
        array = array.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if array.dtype != np.float32 or array.shape != size:
        raise Unusable(f"{path}: the pixels are {array.dtype} {list(array.shape)}, not {list(size)}")
    if not np.isfinite(array).all():
        raise Unusable(f"{path}: the pixels are not finite")
    return array


def distance(difference, norm):
    """Return the size of a difference of images, in the norm of the threat model."""
    values = np.abs(difference.astype(np.float64)).reshape(-1)
    if norm == "Linf":
        return float(values.max())
    return float(values.sum() if norm == "L1" else np.sqrt((values**2).sum()))


def quantile(values, share):
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def peak_memory():
    """Return the largest resident memory of this process in bytes, None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in read("/proc/self/status").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    return None


def processor():
    """Return the processor's name as the system states it; None where it states another machine's."""
    arm = platform.machine().lower() in ("aarch64", "arm64", "armv7l", "armv8l", "armv6l")
    lines = []
    with contextlib.suppress(OSError):
        lines = read("/proc/cpuinfo").splitlines()
    found = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if arm and "vendor_id" in found:  # an emulator that shows the machine below it
        return None
    for key in ("model name", "Model", "Hardware", "cpu model"):
        if found.get(key):
            return found[key][:200]
    if "CPU part" in found:
        return "CPU implementer {}, part {}".format(found.get("CPU implementer", "?"), found["CPU part"])
    return platform.processor()[:200] or None


def features():
    """Return the instructions that NumPy found at run time: of an emulated processor, that one's."""
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        with contextlib.suppress(ImportError, AttributeError):
            found = __import__(module, fromlist=["_"]).__cpu_features__
            return sorted(name for name, there in found.items() if there)
    return []


def canonical(record):
    return (json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write(path, record):
    """Write the record beside its place first: a power cut leaves the old file or the new one."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as stream:
            stream.write(canonical(record))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def show(record, output):
    """Print the result in a few lines; return the exit code."""
    different, memory = record["different"], record["peak_memory_bytes"]
    print("{} points, clean and attacked: {} answers differ".format(2 * record["n"], len(different)))
    for each in different[:5]:
        kind = "attacked" if each["attacked"] else "clean"
        print("  {} point {}: class {}".format(kind, each["index"], record[kind][each["index"]]))
    changed = []
    if record["camera"] is not None:
        rows = record["camera"]["images"]
        largest = max(row["distance"] for row in rows)
        changed = [
            row["index"]
            for row in rows
            if any(row[kind] != record[kind][row["index"]] for kind in ("clean", "attacked"))
        ]
        print(f"{len(rows)} images read here by {record['camera']['reader']}: up to {largest:.4f} from")
        print(f"the certified ones; {len(changed)} change a class {changed[:5] or ''}")
    print(
        "one image on {} thread(s): p50 {:.3f} ms, p95 {:.3f} ms".format(
            record["threads"], record["p50_ms"], record["p95_ms"]
        )
    )
    if memory is not None:
        print(f"peak memory: {memory / 2**20:.1f} MiB")
    print(f"wrote {output}: s2ap-deploy collect RUN {output}")
    return 1 if different or changed else 0


def digest(path):
    with open(path, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


def read(path):
    with open(path, encoding="utf-8", errors="replace") as stream:
        return stream.read()


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
