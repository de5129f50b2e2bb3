"""Bytes of a checkpoint file to named tensors on the CPU; code in the file runs only if the user says so."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from s2ap_deploy import files
from s2ap_deploy.errors import CheckpointError, UnsafePickleError
from s2ap_deploy.models.checkpoints import foreign, info, pickle_scan
from s2ap_deploy.models.checkpoints.info import CheckpointInfo

FORMAT = "s2ap-deploy"
METADATA_KEY = "s2ap_deploy"
LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
IMPORTABLE = (
    "put the folder with {} on PYTHONPATH; better, save the weights alone: "
    "torch.save(model.state_dict(), 'model.pt')"
)
SAFE_PROTOCOLS = (2, 3)  # what torch.load(weights_only=True) reads


@dataclass(frozen=True)
class RawCheckpoint:
    """A file's tensors, before any architecture is thought of.

    ``tensors`` are strided, on the CPU, under the names of the file without its wrapper; prefixes such as
    ``module.`` are still there, because only an architecture tells whether they belong.  ``info`` is None
    for a file of somebody else's.  ``locations`` are the devices that the storages were tagged with.
    ``notes`` tell which wrapper was opened and what was left aside.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    info: CheckpointInfo | None
    sha256: str
    format: str
    wrapper: str | None
    locations: tuple[str, ...]
    notes: tuple[str, ...]


def read_tensors(path: Path | str, *, trust_pickle: bool = False) -> RawCheckpoint:
    """Read what torch.save wrote (zip or older) or safetensors; the content decides, not the suffix.

    ``trust_pickle`` lets a pickle that asks for more than tensors run, and only such a one. Raises
    UnsafePickleError, with everything that the pickle asked for, and CheckpointError for a file that is
    missing, a folder, empty, cut off, or something else altogether.
    """
    path = Path(path)
    # Read once: what is hashed is what is judged and loaded, even if the file is replaced meanwhile.
    data = _bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    locations: set[str] = set()
    notes: tuple[str, ...] = ()
    if _looks_like_safetensors(data):
        tensors, own = _safetensors(path, data)
        unwrapped = foreign.Unwrapped(tensors, None, ())
        kind = "safetensors"
    else:
        content, kind, notes = _unpickle(path, data, locations, trust_pickle=trust_pickle)
        own = None
        if isinstance(content, Mapping) and content.get("format") == FORMAT:
            own = _own_info(content.get("info"), path)
        try:
            unwrapped = foreign.unwrap(content)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from None
        if own is not None:
            unwrapped = foreign.Unwrapped(unwrapped.tensors, None, ())
    return RawCheckpoint(
        {name: _plain(name, tensor, path) for name, tensor in unwrapped.tensors.items()},
        own,
        digest,
        f"{FORMAT}, {kind}" if own else kind,
        unwrapped.wrapper,
        tuple(sorted(locations)),
        (*notes, *unwrapped.notes),
    )


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint", hint="name the file inside it")
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not path.is_file():  # a pipe or a device may never end
        raise CheckpointError(f"{path} is not a regular file")
    data = files.read_bytes(path)
    if not data:
        raise CheckpointError(f"{path} is empty")
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself", hint="run git lfs pull")
    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint", hint="the download answered with a page; repeat it"
        )
    return data


def _looks_like_safetensors(data: bytes) -> bool:
    """Eight bytes of header length, then JSON; the start of a zip or a pickle is no such length."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= LARGEST_HEADER


def _safetensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], CheckpointInfo | None]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    return tensors, None if text is None else info.parse(text, str(path))


def _own_info(text: object, path: Path) -> CheckpointInfo:
    if not isinstance(text, str):
        raise CheckpointError(f"the description inside {path} is missing")
    return info.parse(text, str(path))


def _unpickle(
    path: Path, data: bytes, locations: set[str], *, trust_pickle: bool
) -> tuple[object, str, tuple[str, ...]]:
    """The object in a torch.save file, its format, and a note when code of the file could run."""
    kind = "torch zip" if data.startswith(b"PK") else "torch, before 1.6"
    if _is_torchscript(data):
        raise CheckpointError(
            f"{path} is a TorchScript archive", hint="save the original network's state dict"
        )
    try:
        with torch.serialization.safe_globals(pickle_scan.numpy_globals()):
            return _load(data, locations, weights_only=True), kind, ()
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        refusal = _refusal(path, data, error)
        if not (trust_pickle and isinstance(refusal, UnsafePickleError)):
            raise refusal from error
    locations.clear()
    try:
        content = _load(data, locations, weights_only=False)
    except Exception as error:  # the file's own code may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        raise CheckpointError(
            f"{path} cannot be unpickled: {type(error).__name__}: {error}",
            hint=None if missing is None else IMPORTABLE.format(missing.partition(".")[0]),
        ) from error
    return content, kind, (f"trusted, so that its code could run: {refusal.message}",)


def _load(data: bytes, locations: set[str], *, weights_only: bool) -> Any:
    def onto_cpu(storage: Any, location: str) -> Any:
        locations.add(location)
        return storage

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(io.BytesIO(data), map_location=onto_cpu, weights_only=weights_only)


def _refusal(path: Path, data: bytes, error: Exception) -> CheckpointError:
    """Why the weights-only reader gave up on ``data``, in words that tell what to do."""
    again = "copy or download it again"
    # Torch's own text begins with advice to switch the protection off; what went wrong comes last.
    told = [line for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    reason = told[0].strip() if told else type(error).__name__
    try:
        seen = pickle_scan.scan(data)
    except CheckpointError:
        if data.startswith((b"PK", b"\x80")) or not _is_text(data):
            return CheckpointError(f"{path} is damaged, cut off or no checkpoint: {reason}", hint=again)
        return CheckpointError(f"{path} is text, neither a torch.save file nor safetensors")
    if seen.requested:
        whole = any(name.startswith(("torch.nn.modules.", "torch.fx.")) for name in seen.requested)
        return UnsafePickleError(
            f"{path} asks to import and run more than tensors: {', '.join(seen.requested)}",
            hint=(
                "it is a whole pickled module; save its weights: torch.save(model.state_dict(), 'model.pt'), "
                "or, if you trust where the file comes from, add --trust-pickle"
                if whole
                else "if you trust where the file comes from, add --trust-pickle"
            ),
        )
    if not seen.torch_save:
        return CheckpointError(
            f"{path} was not written by torch.save", hint="torch.save(model.state_dict(), 'model.pt')"
        )
    if seen.protocol not in SAFE_PROTOCOLS:
        return UnsafePickleError(
            f"{path} is written in pickle protocol {seen.protocol}, which cannot be read weights-only",
            hint="save it again without pickle_protocol; if you trust its source, add --trust-pickle",
        )
    return CheckpointError(f"{path} is damaged or cut off: {reason}", hint=again)


def _is_torchscript(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False


def _is_text(data: bytes) -> bool:
    try:
        data[:1024].decode("ascii")
    except UnicodeDecodeError:
        return False
    return True


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A strided tensor with values; a checkpoint may also hold sparse, quantized or empty shells."""
    if tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is quantized; give the floating-point checkpoint")
    if tensor.is_meta:
        raise CheckpointError(f"{path}: {name} was saved from the meta device and has no values")
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
