"""What neither a checkpoint nor the code of its network says, and the data do."""

from __future__ import annotations

from pathlib import Path

from s2ap_deploy.data import datasets
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.models.checkpoints import checkpoint
from s2ap_deploy.spec import Preprocessing


def preprocessing(
    path: Path,
    arch: str | None,
    data: str,
    *,
    size: tuple[int, int, int] | None = None,
    root: Path | None = None,
    trust_pickle: bool = False,
) -> Preprocessing | None:
    """The input that ``data`` has, for a foreign checkpoint of the user's own code without an ``input_size``.

    None where the file or the architecture ``arch`` says what goes in. ``size`` (C, H, W) is asked of an
    image folder. Reads no image set, at most the listing of a folder. Raises what ``datasets.spec`` and
    ``registry.resolve`` raise.
    """
    if not input_unsaid(path, arch, trust_pickle=trust_pickle):
        return None
    return datasets.spec(data, root=root, size=size).preprocessing


def input_unsaid(path: Path, arch: str | None, *, trust_pickle: bool = False) -> bool:
    """Whether neither the file at ``path`` nor the code of ``arch`` says what goes into the network."""
    if arch is None or not registry.is_import_path(arch) or registry.resolve(arch).input_size is not None:
        return False
    return checkpoint.read_tensors(path, trust_pickle=trust_pickle).info is None
