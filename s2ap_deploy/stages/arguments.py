"""Keyword arguments that functions of the Python interface, and options of commands, share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from s2ap_deploy.errors import UsageError

if TYPE_CHECKING:
    from s2ap_deploy.recorder import Recorder


class ExecutionArguments(TypedDict, total=False):
    """Settings of the machine and of reporting, none of which is part of a recipe.

    ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``threads`` are torch's, ``workers`` the attack
    processes. ``data_root``: folder of data sets; ``download`` fetches one that is missing. ``resume``
    continues interrupted work, ``overwrite`` starts over. ``precision`` (``auto``, ``float32``, ``bf16``)
    and ``compiled`` apply to training steps, ``accumulate`` is the pieces of a batch; certifying attacks
    compute in float32. ``trust_pickle`` lets a checkpoint's pickle run code. ``recorder`` receives progress,
    by default a live bar on a terminal or in a notebook, and nothing where ``quiet``;
    ``verbose`` adds the settings, times and hashes, ``track`` also writes metrics for these trackers.
    ``command`` is the text that the run folder's manifest records.
    """

    device: str
    threads: int | None
    workers: int | None
    data_root: Path | str | None
    download: bool
    resume: bool
    overwrite: bool
    precision: str
    compiled: bool
    accumulate: int
    trust_pickle: bool
    recorder: Recorder
    quiet: bool
    verbose: bool
    track: Sequence[str]
    command: str


class SessionArguments(ExecutionArguments, total=False):
    """``arch`` is the import path of a network that a recipe cannot name."""

    arch: str | None


class Settings(SessionArguments, total=False):
    """``settings`` are recipe keys by dotted name, such as ``{"prune.search.epochs": 5}``.

    They take precedence over all other arguments; None is the recipe's null.
    """

    settings: Mapping[str, Any] | None


class NetworkArguments(Settings, total=False):
    """The data that a network was trained on, and its threat model.

    ``eps`` is exact text (``8/255``) for images in [0, 1]. ``mean`` and ``std`` (a number per channel)
    normalize the input of a foreign checkpoint; ``keep`` and ``alpha`` rebuild the masks of a file that holds
    pruning scores; ``key`` is the path to the weights inside the file, ``expect_clean`` its known clean
    accuracy. ``arch`` is a registered name or an import path.
    """

    data: str | None
    eps: str | None
    norm: str | None
    seed: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    keep: float | None
    alpha: float | None
    key: str | None
    expect_clean: float | None


class PretrainArguments(ExecutionArguments, total=False):
    """Keyword arguments of ``pretrain``; see the recipe keys of the same names."""

    settings: Mapping[str, Any] | None
    norm: str | None
    seed: int | None
    epochs: int | None
    learning_rate: float | None
    batch_size: int | None
    loss: str | None


class PruneArguments(NetworkArguments, total=False):
    """Keyword arguments of ``prune``; see the recipe keys of the same names.

    ``preset`` is ``published`` (20 + 100 epochs), ``quick`` (5 + 5), ``published-hydra`` or
    ``published-harp``. ``loss``, ``attack_start``, ``cosine`` and ``batch_size`` apply to the search and to
    fine-tuning; ``distill`` is the weight of distillation in fine-tuning, ``qat`` the number of its last
    epochs that compute as the int8 file will.
    """

    method: str | None
    granularity: str | None
    keep_ratio: float | None
    s2ap: bool | None
    gamma: float | str | None
    flip_target: float | None
    s2ap_ball: str | None
    s2ap_signs: str | None
    s2ap_epochs: str | None
    warmup_epochs: int | None
    budget: str | None
    cover_classes: bool | None
    dense_ends: bool | None
    allow_unpruned: bool | None
    steps: Sequence[float] | None
    scores_from: str | None
    preset: str | None
    loss: str | None
    attack_start: str | None
    score_decay: float | None
    bn_affine: str | None
    cosine: str | None
    recalibration: str | None
    awp_gamma: float | None
    distill: float | None
    qat: int | None
    search_epochs: int | None
    finetune_epochs: int | None
    batch_size: int | None


class ClusterArguments(TypedDict, total=False):
    """Where the work runs: ``on`` is ``ray`` or ``ray://HOST:PORT``, None for this machine.

    ``per_task`` is what one task takes, such as ``cpus=2,gpus=1,memory=8GiB``; one core by default, and a GPU
    where ``device`` is one.
    """

    on: str | None
    per_task: str | None


class SweepArguments(SessionArguments, ClusterArguments, total=False):
    """Keyword arguments of ``sweep``."""


class CertifyArguments(NetworkArguments, ClusterArguments, total=False):
    """Keyword arguments of ``certify``; see the recipe keys of the same names.

    ``first`` takes the first ``n`` test images, ``time_budget`` is in seconds, ``sparse_compute`` whether
    attacks on a CPU skip zeros. With ``min_robust``, ``max_drop`` or ``rule``, attacks stop once that gate is
    decided. ``entry`` is the file of an entry for the Adversarial Pruning Benchmark, with its ``ap_method``,
    ``ap_paper`` and ``ap_pretraining``.
    """

    protocol: str | None
    n: int | None
    first: bool
    sparse_compute: Literal["auto", "on", "off"]
    sample_seed: int | None
    attack_seed: int | None
    time_budget: float | None
    provable: bool | None
    curve: bool | None
    tune_curve: bool | None
    full: bool | None
    min_robust: float | None
    max_drop: float | None
    rule: str | None
    entry: Path | str | None
    ap_method: str | None
    ap_paper: str | None
    ap_pretraining: str | None


class ExportArguments(Settings, total=False):
    """Keyword arguments of ``export``; see the recipe keys of the same names.

    ``onnx`` selects the float32 file even if the run folder remembers another form.
    ``bench`` measures the file against the dense one: milliseconds, ratios with quartiles, peak memory.
    """

    onnx: bool
    bench: bool
    name: str | None
    opset: int | None
    encoding: str | None
    values: str | None
    batch: int | str | None
    int8: bool | None
    calibration: str | None
    calibration_images: int | None
    weight_bits: int | None
    compact: bool | None
    keep_ratio: float | None
    align: int | None
    torch: bool | None
    c: bool | None
    c_positions: str | None
    c_static: bool | None
    convert: str | None
    max_flash: int | None
    max_ram: int | None
    target: str | None
    max_bytes: int | None
    max_macs: int | None
    max_latency_ms: float | None


class PlanArguments(TypedDict, total=False):
    """Keyword arguments of ``plan``; see the recipe keys of the same names."""

    sparsity: float | None
    granularity: str | None
    keep_ratio: float | None
    budget: str | None
    cover_classes: bool | None
    dense_ends: bool | None
    allow_unpruned: bool | None
    align: int | None
    encoding: str | None
    values: str | None
    int8: bool | None
    target: str | None
    max_bytes: int | None
    max_macs: int | None
    max_latency_ms: float | None
    trust_pickle: bool
    keep: float | None
    alpha: float | None
    key: str | None


class ThresholdArguments(TypedDict, total=False):
    """Thresholds of ``gate``: accuracies as fractions, bytes, milliseconds, ratios to the dense file."""

    min_clean: float | None
    min_robust: float | None
    min_proven: float | None
    max_drop: float | None
    max_class_drop: float | None
    max_clean_drop: float | None
    min_sparsity: float | None
    max_bytes: int | None
    max_latency_ms: float | None
    max_latency_ratio: float | None
    max_age: str | None
    require_device: tuple[str, ...]
    rule: Literal["lower", "point"]


def check(given: Mapping[str, Any], kind: Any) -> None:
    """Raise TypeError for a keyword that is not in the TypedDict ``kind``, UsageError for a bad count."""
    if "devices" in given:
        raise UsageError(
            "ranks are processes of a command; a function runs in one process",
            code="devices-in-function",
            hint="run s2ap-deploy prune ... --devices N, which uses the same run folder",
        )
    if unknown := given.keys() - kind.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    for name in ("threads", "workers", "accumulate"):
        count = given.get(name)
        if count is not None and (not isinstance(count, int) or count < 1):
            raise UsageError(
                f"{name} must be a whole number of at least 1, not {count!r}", code="count-invalid"
            )
