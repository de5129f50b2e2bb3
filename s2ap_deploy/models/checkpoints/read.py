"""Read a checkpoint file into named tensors on the CPU; code in it runs only if the user trusts it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from s2ap_deploy import files, records
from s2ap_deploy.errors import CheckpointError, UnsafePickleError
from s2ap_deploy.models.checkpoints import pickle_scan
from s2ap_deploy.spec import Normalization, Preprocessing, Record, ThreatModel, WeightCount

Stage = Literal["pretrain", "search", "finetune", "foreign"]


class CheckpointInfo(Record):
    """The facts about a network: what it is, what it was trained on and against, and its source.

    Attributes:
        stage: the last one that changed the weights.
        sparsity: the fraction of zeros among the weights that multiply activations; None before pruning.
        weights: what these are, and what is counted apart; None before pruning.
        source_sha256: the hash of the file that this one was made from.
    """

    schema_version: Literal[1] = 1
    arch: str
    num_classes: int
    data: str | None = None
    preprocessing: Preprocessing
    normalization: Normalization | None = None
    threat: ThreatModel | None = None
    class_names: tuple[str, ...] = ()
    stage: Stage
    sparsity: float | None = None
    weights: WeightCount | None = None
    source_sha256: str | None = None
    tool_version: str


FORMAT = "s2ap-deploy"
METADATA_KEY = "s2ap_deploy"
LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
SAFE_PROTOCOLS = (2, 3)  # what torch.load(weights_only=True) reads
# In this order: a file with both `state_dict` and `ema` means the first.
WRAPPERS = (
    *("state_dict", "net", "model_state_dict", "model", "network", "net_state_dict", "module", "params"),
    *("weights", "classifier", "student", "model_best", "best_model", "best_state_dict", "ema"),
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "swa", "swa_state_dict"),
    *("swa_model", "best", "last", "teacher"),
)
DEEPEST = 6
GZIP = b"\x1f\x8b"
LARGEST_CONTENT = 1 << 34  # bytes that a compressed checkpoint may decompress to
# Position and bytes of a file's magic number, what it is, and what to do.
FOREIGN_FORMATS: tuple[tuple[int, bytes, str, str], ...] = (
    (
        0,
        b"\x89HDF",
        "an HDF5 file, such as of Keras",
        "rebuild the network in PyTorch, and save its state dict",
    ),
    (4, b"TFL3", "a TensorFlow Lite model", "give the PyTorch checkpoint that it was made from"),
    (0, b"GGUF", "a GGUF file", "give the PyTorch checkpoint that it was made from"),
    (0, b"\x93NUMPY", "a single numpy array", "save arrays by name: numpy.savez(path, **arrays)"),
    (0, b"\xfd7zXZ", "compressed with xz", "decompress it first: unxz"),
    (0, b"BZh", "compressed with bzip2", "decompress it first: bunzip2"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first: unzstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
)
_BUILT = re.compile(r"(?:but got|instantiate unsupported type|unsupported class) <?(?:class )?'?([\w.]+)")
_OPTIMIZER = re.compile(r".*(optim|sched|scaler|rng|amp$|param_groups).*|opt")
STATE_DICT_HINT = "save it with torch.save(model.state_dict(), 'model.pt')"
SUBCLASSES = ("torch.distributed.tensor.", "torchao.")
SUBCLASS_HINT = "save plain tensors: full_tensor() of a DTensor, dequantize() of a quantized one"
COPY_HINT = "copy or download the file again"

# MadryLab's robustness saves the network twice, the second time inside its attacker.
_COPY = re.compile(r"((?:module\.)*)attacker\.(?:normalize\.|model\.)")


@dataclass(frozen=True)
class RawCheckpoint:
    """A file's tensors, before any architecture is considered.

    Attributes:
        path: the file, as errors name it.
        tensors: strided, on the CPU, under the file's names without its wrapper. Prefixes such as
            ``module.`` remain, because only an architecture shows whether they belong to the names.
        info: the facts of a file of this tool; None for any other.
        locations: devices that the storages were tagged with.
        notes: which wrapper was opened and what was ignored.
        module: the network itself, where a trusted file holds it whole.
    """

    path: str
    tensors: dict[str, Tensor] = field(repr=False)
    info: CheckpointInfo | None
    sha256: str
    format: str
    wrapper: str | None
    locations: tuple[str, ...]
    notes: tuple[str, ...]
    module: nn.Module | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Content:
    """The result of reading one format: an object, and the facts of a file of this tool."""

    value: object
    format: str
    info: CheckpointInfo | None = None
    locations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sha256: str | None = None


def read_info(path: Path | str, *, trust_pickle: bool = False) -> CheckpointInfo | None:
    """Return what a file of this tool states about itself, None for any other; raises as read_tensors."""
    path = Path(path)
    return _content(path, _file_bytes(path), trust_pickle).info


def _content(path: Path, data: bytes, trust_pickle: bool) -> _Content:
    if data.startswith(GZIP):
        found = _content(path, _decompressed(path, data), trust_pickle)
        return dataclasses.replace(found, format=f"{found.format}, gzip")
    if _looks_like_safetensors(data):
        return _read_safetensors(path, data)
    if data.lstrip().startswith(b"{"):
        return _read_index(path, data)
    _refuse_other_formats(path, data)
    if any(name.endswith(".npy") for name in _entries(data)):
        return _read_npz(path, data)
    return _read_torch(path, data, trust_pickle=trust_pickle)


def _decompressed(path: Path, data: bytes) -> bytes:
    """Return the content of a gzip file, at most as much as a checkpoint may hold."""
    reader = zlib.decompressobj(wbits=31)
    try:
        content = reader.decompress(data, LARGEST_CONTENT)
    except zlib.error as error:
        raise CheckpointError(
            f"{path} is damaged or cut off: {error}", code="checkpoint-damaged", hint=COPY_HINT
        ) from None
    if not reader.eof:
        raise CheckpointError(
            f"{path} is cut off, or holds more than {LARGEST_CONTENT:,} bytes",
            code="checkpoint-damaged",
            hint="decompress it with gunzip",
        )
    return content


def _read_index(path: Path, data: bytes) -> _Content:
    """Read the shards that a safetensors index names; they lie beside it.

    Raises CheckpointError for another JSON file, and for shards that are missing or outside of the folder.
    """
    try:
        listed = files.parse_json(data)["weight_map"]
        names = sorted(set(listed.values()))
        shards = [(name, files.within(path.parent, name)) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is JSON, and no index of safetensors shards",
            code="checkpoint-is-text",
            hint="name the file that holds the weights",
        ) from None
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256(data)
    for _, shard in shards:
        content = _file_bytes(shard)
        digest.update(hashlib.sha256(content).digest())
        tensors |= cast("dict[str, Tensor]", _read_safetensors(shard, content).value)
    if missing := sorted(set(listed) - set(tensors)):
        raise CheckpointError(
            f"{path} lists tensors that its shards lack, such as {missing[0]}",
            code="checkpoint-damaged",
            hint=COPY_HINT,
        )
    note = f"{len(shards)} shards read: {', '.join(names[:3])}"
    return _Content(tensors, "safetensors shards", notes=(note,), sha256=digest.hexdigest())


def _read_npz(path: Path, data: bytes) -> _Content:
    """Read an archive of numpy arrays; arrays of objects, which would run code, are refused."""
    tensors = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            for name in archive.files:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(archive[name]))
    except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is an archive of numpy arrays that cannot be read as tensors: {error}",
            code="checkpoint-arrays-unreadable",
            hint="save numeric arrays alone, or the state dict: " + STATE_DICT_HINT,
        ) from None
    return _Content(tensors, "numpy archive")


def _entries(data: bytes) -> list[str]:
    """Return the names inside a zip archive; none of another file."""
    if not data.startswith(b"PK"):
        return []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return []


def _refuse_other_formats(path: Path, data: bytes) -> None:
    """Raise CheckpointError for a file of another tool, by its name and with the next step."""
    for start, magic, kind, hint in FOREIGN_FORMATS:
        if data[start : start + len(magic)] == magic:
            raise CheckpointError(f"{path} is {kind}", code="checkpoint-format-foreign", hint=hint)
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX file, which can be attacked and not pruned",
            code="checkpoint-is-onnx",
            hint=f"s2ap-deploy certify --artifact {path}",
        )
    names = _entries(data)
    if any(
        name.endswith(("/archive_format", "archive_format", "serialized_exported_program.json"))
        for name in names
    ):
        raise CheckpointError(
            f"{path} is a program of torch.export",
            code="checkpoint-torch-export",
            hint=f"save its weights: torch.save(torch.export.load({str(path)!r}).state_dict, 'model.pt')",
        )


def read_tensors(path: Path | str, *, trust_pickle: bool = False, key: str | None = None) -> RawCheckpoint:
    """Read a torch.save file (zip or older) or safetensors; the content decides, not the suffix.

    Args:
        key: the path to the weights inside the file; see :func:`unwrap`.
        trust_pickle: unpickle a file that requests more than tensors, which may run code in it.

    Raises:
        UnsafePickleError: with everything that the pickle requests.
        CheckpointError: for a file that is missing, a folder, empty, cut off, or no checkpoint.
    """
    path = Path(path)
    # Read once: what is hashed is what is checked and loaded, even if the file is replaced meanwhile.
    data = _file_bytes(path)
    content = _content(path, data, trust_pickle)
    try:
        found = unwrap(content.value, key)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", code=error.code, hint=error.hint) from None
    tensors = {name: _plain(name, tensor, path) for name, tensor in found.tensors.items()}
    widened = {str(t.dtype) for n, t in found.tensors.items() if t.dtype != tensors[n].dtype}
    return RawCheckpoint(
        path=str(path),
        tensors=tensors,
        info=content.info,
        sha256=content.sha256 or hashlib.sha256(data).hexdigest(),
        format=content.format if content.info is None else f"{FORMAT}, {content.format}",
        # The layout of this tool's own files needs no note.
        wrapper=found.wrapper if content.info is None else None,
        locations=content.locations,
        notes=(
            *content.notes,
            *(found.notes if content.info is None else ()),
            *(f"weights in {kind.removeprefix('torch.')} are read as float32" for kind in sorted(widened)),
        ),
        module=found.module,
    )


@dataclass(frozen=True)
class StateDict:
    """The tensors of a file under the names it gives them, and where they were found."""

    tensors: dict[str, Tensor]
    wrapper: str | None
    notes: tuple[str, ...]
    module: nn.Module | None = None


def unwrap(content: object, key: str | None = None) -> StateDict:
    """Find the state dict in what a file holds: any mapping with a weight in it, at any depth.

    ``key`` is the path to one, such as ``model.ema`` or ``state_dict.0``. Of several the best known name is
    taken, and a note says so.

    Raises:
        CheckpointError: when there is none, naming what was found instead, and when several compete whose
            names do not tell which is meant.
    """
    found = list(_mappings(content))
    if key is not None:
        chosen = next((each for each in found if ".".join(each[0]) == key), None)
        if chosen is None:
            raise CheckpointError(
                f"it has no weights under {key}",
                code="key-missing",
                hint=f"there are some under {_listed(found)}" if found else STATE_DICT_HINT,
            )
        notes = [f"weights found under {key}, as asked"]
    else:
        if not found:
            raise _without_weights(content)
        chosen, notes = _chosen(found)
    path, mapping = chosen
    module = mapping if isinstance(mapping, nn.Module) else None
    entries: Mapping[Any, Any] = mapping.state_dict() if isinstance(mapping, nn.Module) else mapping
    tensors = {
        name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    inside = {other[len(path)] for other, _ in found if len(other) > len(path) and other[: len(path)] == path}
    dropped = [str(name) for name in entries if name not in tensors and name not in inside]
    if dropped:
        notes.append(f"ignored entries that are not tensors: {', '.join(dropped[:8])}")
    copies = [name for name in tensors if _is_copy(name, tensors)]
    if copies:
        tensors = {name: value for name, value in tensors.items() if name not in copies}
        notes.append(f"ignored: a second copy of the network ({len(copies)} tensors under attacker)")
    return StateDict(tensors, ".".join(path) or None, tuple(notes), module)


Place = tuple[tuple[str, ...], Any]
"""The path to a mapping of tensors, or to a module, and the thing itself."""


def _mappings(content: object, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Yield every mapping that holds a tensor, outermost first; those of optimizers are passed over.

    A mapping of vectors and numbers alone, such as metrics, is one only where nothing holds a weight.
    """
    every = list(_tensor_mappings(content, path))
    weighty = [place for place in every if _has_weight(place[1])]
    yield from weighty or every


def _tensor_mappings(content: object, path: tuple[str, ...]) -> Iterator[Place]:
    if len(path) > DEEPEST:
        return
    if isinstance(content, nn.Module):
        yield path, content
        return
    if isinstance(content, list | tuple):
        entries = [(str(number), value) for number, value in enumerate(content)]
        if any(isinstance(value, Tensor) for _, value in entries):
            return
    elif isinstance(content, Mapping):
        if "param_groups" in content:
            return
        if any(isinstance(k, str) and isinstance(value, Tensor) for k, value in content.items()):
            yield path, content
        entries = [(str(name), value) for name, value in content.items()]
    else:
        return
    for name, value in entries:
        if not _OPTIMIZER.fullmatch(name):
            yield from _tensor_mappings(value, (*path, name))


def _has_weight(content: Any) -> bool:
    if isinstance(content, nn.Module):
        return True
    return any(isinstance(value, Tensor) and value.dim() >= 2 for value in content.values())


def _chosen(found: list[Place]) -> tuple[Place, list[str]]:
    """Return the place to read and notes on the choice. Raises CheckpointError where it is unclear."""
    if len(found) == 1:
        path = found[0][0]
        return found[0], [f"weights found under {'.'.join(path)}"] if path else []
    siblings = {path[:-1] for path, _ in found}
    if len(siblings) == 1 and all(path and path[-1].isdigit() for path, _ in found):
        raise CheckpointError(
            f"it holds {len(found)} networks in a list, such as the members of an ensemble or a cascade",
            code="networks-several",
            hint=f"choose one: --key {'.'.join(found[0][0])}",
        )
    ranked = sorted(found, key=lambda place: _rank(place[0]))
    best, second = ranked[0], ranked[1]
    listed = _listed(found)
    if _rank(best[0]) == _rank(second[0]):
        raise CheckpointError(
            f"it holds {len(found)} sets of weights, and their names do not tell which is meant: {listed}",
            code="networks-several",
            hint=f"choose one: --key {'.'.join(best[0])}",
        )
    taken = ".".join(best[0]) or "the top level"
    note = f"the file holds several sets of weights, {listed}; read {taken}, the usual name of the network"
    found_under = [f"weights found under {taken}"] if best[0] else []
    return best, [*found_under, f"{note} (--key chooses another)"]


def _rank(path: tuple[str, ...]) -> tuple[int, int]:
    """Order by how usual the names on a path are; unknown names come last and are alike."""
    ranks = [WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS) for name in path]
    return (max(ranks), sum(ranks)) if ranks else (-1, 0)


def _listed(found: Sequence[Place], most: int = 6) -> str:
    names = [".".join(path) or "the top level" for path, _ in found]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _without_weights(content: object) -> CheckpointError:
    """Describe the content of a file without any mapping of tensors."""
    if not isinstance(content, Mapping):
        kind = f"one tensor {list(content.shape)}" if isinstance(content, Tensor) else _kind(content)
        return CheckpointError(
            f"the file holds {kind}, not a dictionary of tensors",
            code="state-dict-missing",
            hint=STATE_DICT_HINT,
        )
    keys = ", ".join(map(str, list(content)[:8])) or "nothing"
    if "param_groups" in content or any(_OPTIMIZER.fullmatch(str(name)) for name in content):
        return CheckpointError(
            f"it is the state of an optimizer, without the network's weights; it holds: {keys}",
            code="checkpoint-is-optimizer",
            hint="take the file of the network from the same folder; " + STATE_DICT_HINT,
        )
    return CheckpointError(
        f"it has no tensors, neither at the top level nor below; it holds: {keys}",
        code="tensors-missing",
        hint=STATE_DICT_HINT,
    )


def _is_copy(name: str, tensors: Mapping[str, Tensor]) -> bool:
    matched = _COPY.match(name)
    if matched is None:
        return False
    rest = name[matched.end() :]
    return any(matched[1] + start + rest in tensors for start in ("model.", "normalizer."))


def _kind(content: Any) -> str:
    kind = type(content)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _file_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder, not a checkpoint",
            code="checkpoint-is-folder",
            hint=_folder_hint(path),
        )
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}", code="checkpoint-missing")
    if not path.is_file():  # a pipe or a device may never end
        raise CheckpointError(f"{path} is not a regular file", code="checkpoint-not-regular")
    data = files.read_bytes(path)
    if not data:
        raise CheckpointError(f"{path} is empty", code="checkpoint-empty")
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself",
            code="checkpoint-lfs-pointer",
            hint="run git lfs pull",
        )
    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint",
            code="checkpoint-web-page",
            hint="the download returned a web page; repeat it",
        )
    return data


def _folder_hint(path: Path) -> str:
    if (path / ".metadata").is_file():
        return (
            "it is a distributed checkpoint: make one file of it with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt"
        )
    usual = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    inside = next((name for name in usual if (path / name).is_file()), None)
    return f"give the file inside it: {path / inside}" if inside else "give the file inside it"


def _looks_like_safetensors(data: bytes) -> bool:
    """Return whether the file starts with a header length (8 bytes) and JSON, unlike a zip or a pickle."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= LARGEST_HEADER


def _read_safetensors(path: Path, data: bytes) -> _Content:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off: {error}", code="checkpoint-damaged", hint=COPY_HINT
        ) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    return _Content(tensors, "safetensors", None if text is None else _parse_info(text, path))


def _read_torch(path: Path, data: bytes, *, trust_pickle: bool) -> _Content:
    if _is_torchscript(data):
        raise CheckpointError(
            f"{path} is a TorchScript archive",
            code="checkpoint-torchscript",
            hint=f"save its weights: torch.save(torch.jit.load({str(path)!r}).state_dict(), 'model.pt')",
        )
    kind = "torch zip" if data.startswith(b"PK") else "torch, before 1.6"
    value, locations, notes = _unpickle(path, data, trust_pickle=trust_pickle)
    own = None
    if isinstance(value, Mapping) and value.get("format") == FORMAT:
        text = value.get("info")
        if not isinstance(text, str):
            raise CheckpointError(
                f"the description inside {path} is missing", code="checkpoint-description-missing"
            )
        own = _parse_info(text, path)
    return _Content(value, kind, own, locations, notes)


def _parse_info(text: str, path: Path) -> CheckpointInfo:
    source = f"the description inside {path}"
    return records.parse(text, CheckpointInfo, CheckpointError, source=source)


def _unpickle(
    path: Path, data: bytes, *, trust_pickle: bool
) -> tuple[object, tuple[str, ...], tuple[str, ...]]:
    """Return the object in a torch.save file, its device tags, and a note when code of the file could run."""
    try:
        with torch.serialization.safe_globals(pickle_scan.numpy_globals()):
            return *_torch_load(data, weights_only=True), ()
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        refusal = _refusal(path, data, error)
        plain = refusal.code == "checkpoint-not-torch"
        if not (trust_pickle and (plain or isinstance(refusal, UnsafePickleError))):
            raise refusal from error
    seen_torch = pickle_scan.scan(data).torch_save
    try:
        if seen_torch:
            value, locations = _torch_load(data, weights_only=False)
        else:
            value, locations = _arrays_as_tensors(pickle.loads(data)), ()
    except Exception as error:  # the file's own code may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        raise CheckpointError(
            f"{path} cannot be unpickled: {type(error).__name__}: {error}",
            code="checkpoint-unpickling-failed",
            hint=None
            if missing is None
            else f"put the folder with {missing.partition('.')[0]} on PYTHONPATH; better, save the weights "
            "alone: torch.save(model.state_dict(), 'model.pt')",
        ) from error
    return value, locations, (f"unpickled with --trust-pickle, so its code could run: {refusal.message}",)


def _arrays_as_tensors(value: Any) -> Any:
    """Return the mappings of a plain pickle with tensors in place of numpy arrays of numbers."""
    if isinstance(value, Mapping):
        return {name: _arrays_as_tensors(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def _torch_load(data: bytes, *, weights_only: bool) -> tuple[Any, tuple[str, ...]]:
    locations: set[str] = set()

    def onto_cpu(storage: Any, location: str) -> Any:
        locations.add(location)
        return storage

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            value = torch.load(io.BytesIO(data), map_location=onto_cpu, weights_only=weights_only)
        except RuntimeError as error:
            if "map_location" not in str(error):
                raise
            # Subclasses of Tensor take no function there.
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)
    return value, tuple(sorted(locations))


def _refusal(path: Path, data: bytes, error: Exception) -> CheckpointError:
    """Explain why the weights-only reader failed on ``data``, and what to do."""
    # Torch's own text begins with advice to switch the protection off; what went wrong comes last.
    lines = [
        line for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()
    ]
    reason = lines[0].strip() if lines else type(error).__name__
    try:
        seen = pickle_scan.scan(data)
    except CheckpointError:
        if data.startswith((b"PK", b"\x80")) or not _is_text(data):
            return CheckpointError(
                f"{path} is damaged, truncated or not a checkpoint: {reason}",
                code="checkpoint-damaged",
                hint=COPY_HINT,
            )
        return CheckpointError(
            f"{path} is a text file, neither torch.save nor safetensors", code="checkpoint-is-text"
        )
    if kinds := [name for name in seen.requested if name.startswith(SUBCLASSES)]:
        return CheckpointError(
            f"{path} holds tensors of {', '.join(kinds[:3])}, whose values only its own library knows",
            code="tensor-subclass",
            hint=SUBCLASS_HINT,
        )
    if seen.requested:
        whole = any(name.startswith(("torch.nn.modules.", "torch.fx.")) for name in seen.requested)
        return UnsafePickleError(
            f"{path} asks to import and run more than tensors: {', '.join(seen.requested)}",
            code="pickle-unsafe",
            hint=(
                "it is a whole pickled module; save its weights: torch.save(model.state_dict(), 'model.pt'), "
                "or, if you trust where the file comes from, add --trust-pickle"
                if whole
                else "if you trust where the file comes from, add --trust-pickle"
            ),
        )
    if built := _BUILT.search(str(error)):
        return UnsafePickleError(
            f"{path} asks to build more than tensors: {built[1]}",
            code="pickle-unsafe",
            hint="if you trust where the file comes from, add --trust-pickle",
        )
    if not seen.torch_save:
        return CheckpointError(
            f"{path} is a plain pickle, not written by torch.save",
            code="checkpoint-not-torch",
            hint=f"{STATE_DICT_HINT}; if you trust its source, add --trust-pickle",
        )
    if seen.protocol not in SAFE_PROTOCOLS:
        return UnsafePickleError(
            f"{path} is written in pickle protocol {seen.protocol}, which cannot be read weights-only",
            code="pickle-protocol-unsupported",
            hint="save it again without pickle_protocol or, if you trust its source, add --trust-pickle",
        )
    return CheckpointError(
        f"{path} is damaged or cut off: {reason}", code="checkpoint-damaged", hint=COPY_HINT
    )


def _is_torchscript(data: bytes) -> bool:
    return any(name.endswith("/constants.pkl") for name in _entries(data))


def _is_text(data: bytes) -> bool:
    try:
        data[:1024].decode("ascii")
    except UnicodeDecodeError:
        return False
    return True


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return a strided tensor that can be computed with.

    Sparse tensors become dense, and eight-bit floats float32.

    Raises:
        CheckpointError: by its name, for a kind of tensor that holds no such values.
    """
    if tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is quantized; give the floating-point checkpoint", code="tensor-quantized"
        )
    if tensor.is_nested:
        raise CheckpointError(
            f"{path}: {name} is a nested tensor of rows of several lengths, which no layer has",
            code="tensor-nested",
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(
            f"{path}: {name} is {_kind(tensor)}, whose values only its own library knows",
            code="tensor-subclass",
            hint=SUBCLASS_HINT,
        )
    if tensor.is_meta:
        raise CheckpointError(
            f"{path}: {name} was saved from the meta device and has no values", code="tensor-without-values"
        )
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    if tensor.is_complex():
        raise CheckpointError(
            f"{path}: {name} holds complex numbers, which no layer here computes with", code="tensor-complex"
        )
    try:
        torch.isfinite(tensor.flatten()[:1]) & (tensor.flatten()[:1] == 0)
    except (RuntimeError, NotImplementedError):
        try:
            return tensor.to(torch.float32)
        except (RuntimeError, NotImplementedError):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path}: {name} is stored in {kind}, which cannot be read as numbers",
                code="tensor-dtype-unsupported",
                hint="give the checkpoint in float32, float16 or bfloat16",
            ) from None
    return tensor
