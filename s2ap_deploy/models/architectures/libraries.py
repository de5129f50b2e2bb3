"""Networks of other libraries, each an extra: timm's by name, Hugging Face's image classifiers by folder.

``timm/resnet18`` builds timm's network of that name, never with its pretrained weights.
``transformers:FOLDER`` builds what ``FOLDER/config.json`` describes; the weights are the safetensors file (or
the index of its shards) in the same folder. Code in the folder is never run, nothing is fetched, and the
network returns its logits alone.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2ap_deploy import files
from s2ap_deploy.errors import ArchitectureError
from s2ap_deploy.models.architectures.architecture import Architecture
from s2ap_deploy.plugins import reason
from s2ap_deploy.requirements import extra_missing
from s2ap_deploy.spec import Normalization

TIMM = "timm/"
FOLDER = "transformers:"
LARGEST_TEXT = 1 << 24
OPTIONS = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
"""The whole numbers that may follow a name of timm, as in ``timm/deit_tiny_patch16_224+img_size=32``."""


def from_timm(name: str, options: Mapping[str, int]) -> Architecture:
    """Return timm's network ``name``, without its prefix; ``options`` are some of :data:`OPTIONS`.

    Raises ArchitectureError for a name that timm does not know, and if timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise extra_missing("timm", f"{TIMM}{name}") from error
    if not timm.is_model(name):
        known = timm.list_models(exclude_filters=["*_test*"])
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ArchitectureError(
            f"timm {timm.__version__} has no network {name!r}",
            code="architecture-unknown",
            hint=f"did you mean {' or '.join(TIMM + each for each in near)}?" if near else None,
        )
    facts = timm.get_pretrained_cfg(name)
    size = tuple(facts.input_size) if facts is not None else (3, 224, 224)
    side = options.get("img_size", size[1])
    stated = Normalization(mean=tuple(facts.mean), std=tuple(facts.std)) if facts is not None else None

    def build(num_classes: int) -> nn.Module:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
        return network

    return Architecture(
        TIMM + name,
        build,
        input_size=(options.get("in_chans", size[0]), side, side),
        num_classes=(facts.num_classes if facts is not None else 0) or 1000,
        published=stated,
    )


def from_folder(reference: str) -> Architecture:
    """Return the image classifier that the ``config.json`` of a Hugging Face folder describes.

    The folder's ``preprocessor_config.json``, where there is one, states its normalization.

    Raises ArchitectureError for a folder without a description of an image classifier, for one that needs
    code from elsewhere, and if transformers is not installed.
    """
    folder = Path(reference.removeprefix(FOLDER))
    stated = _json(folder / "config.json")
    if stated is None:
        raise ArchitectureError(
            f"there is no config.json of a Hugging Face network in {folder}", code="architecture-file-missing"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise extra_missing("transformers", reference) from error
    if stated.get("model_type") == "timm_wrapper":
        raise ArchitectureError(
            f"{folder} wraps a network of timm",
            code="architecture-needs-code",
            hint=f"--arch {TIMM}{stated.get('architecture', 'NAME')}",
        )
    try:
        with _offline():
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            _builder(config)(config.num_labels)
    except Exception as error:  # whatever the description makes the library raise
        raise ArchitectureError(
            f"{folder}/config.json describes no image classifier that transformers "
            f"{transformers.__version__} builds without code from elsewhere: {reason(error)}",
            code="architecture-needs-code",
            hint="write a function that builds it, and give --arch file.py:factory",
        ) from error
    shown = _json(folder / "preprocessor_config.json") or {}
    normalization = _normalization(shown)
    return Architecture(
        reference,
        _builder(config),
        input_size=_input_size(stated, shown),
        num_classes=config.num_labels,
        normalization={} if normalization is None else {0: normalization},
        converted=functools.partial(_converted, config),
    )


def _builder(config: Any) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        import transformers

        own = copy.deepcopy(config)
        if own.num_labels != num_classes:
            own.num_labels = num_classes
        # The config may name another implementation of attention, which the library would fetch.
        with _offline():
            network: nn.Module = transformers.AutoModelForImageClassification.from_config(
                own, trust_remote_code=False, attn_implementation="eager"
            )
        names = [name for name in inspect.signature(type(network).forward).parameters if name != "self"]
        if names[:1] != ["pixel_values"]:
            raise ValueError(f"{type(network).__name__} takes {names[0]} first, not images")
        network.register_forward_hook(_logits)
        return network

    return build


def _converted(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of a file under the names of the library's network, as the library reads them."""
    import transformers

    with _offline():
        kind = type(transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False))
        network, found = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True
        )
    missing = [name for name in found["missing_keys"] if not name.endswith("num_batches_tracked")]
    if missing or found["unexpected_keys"] or found["mismatched_keys"] or found["error_msgs"]:
        return None
    state: dict[str, Tensor] = network.state_dict()
    return state


def _logits(network: nn.Module, inputs: Any, output: Any) -> Tensor:
    """Return the logits of what a network of the library returns."""
    found: Tensor = output if isinstance(output, Tensor) else output["logits"]
    return found


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the library from fetching anything, and from writing to the terminal."""
    from huggingface_hub import constants
    from transformers.utils import logging

    before = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        logging.set_verbosity(before[1])
        if before[2]:
            logging.enable_progress_bar()


def _json(path: Path) -> dict[str, Any] | None:
    """Return the object in a small JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        found = files.parse_json(files.read_bytes(path, limit=LARGEST_TEXT))
    except ValueError as error:
        raise ArchitectureError(f"{path} is not JSON: {error}", code="architecture-needs-code") from None
    return found if isinstance(found, dict) else None


def _input_size(config: Mapping[str, Any], shown: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the (C, H, W) that the config or the preprocessor states, None where neither does."""
    channels = config.get("num_channels", 3)
    for size in (config.get("image_size"), shown.get("crop_size"), shown.get("size")):
        if isinstance(size, dict):
            size = (
                size.get("height", size.get("shortest_edge")),
                size.get("width", size.get("shortest_edge")),
            )
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(sides) == 2 and all(isinstance(side, int) for side in sides) and isinstance(channels, int):
            return (channels, *sides)
    return None


def _normalization(shown: Mapping[str, Any]) -> Normalization | None:
    """Return what a preprocessor does to images in [0, 1], None where that is nothing.

    It multiplies bytes by ``rescale_factor``, some subtract 1 then, and normalizes the result.
    """
    mean, std = ([0.0], [1.0]) if shown.get("do_normalize") is False else (None, None)
    mean, std = mean or shown.get("image_mean"), std or shown.get("image_std")
    if mean is None or std is None:
        return None
    scale = 255 * float(shown.get("rescale_factor", 1 / 255)) if shown.get("do_rescale", True) else 255.0
    offset = 1.0 if shown.get("rescale_offset") else 0.0
    means = tuple((float(each) + offset) / scale for each in mean)
    deviations = tuple(float(each) / scale for each in std)
    if all(each == 0 for each in means) and all(each == 1 for each in deviations):
        return None
    return Normalization(mean=means, std=deviations)
