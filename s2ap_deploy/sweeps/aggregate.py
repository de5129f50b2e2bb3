"""Aggregate a sweep: a row per combination, a group per combination over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from s2ap_deploy import files
from s2ap_deploy.errors import RunFolderError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import Share
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.recipe.methods import n_of_m
from s2ap_deploy.recipe.sections import PruneSection
from s2ap_deploy.runs.folder import Run
from s2ap_deploy.spec import Record, ThreatModel
from s2ap_deploy.stages.compare import compare
from s2ap_deploy.sweeps.grid import Combination

FILE = "sweep.json"
Status = Literal["waiting", "finished", "failed", "skipped"]


class Count(Record):
    """``k`` of ``n`` test images, with the exact 95% interval of the share."""

    k: int
    n: int
    interval: tuple[float, float]

    @classmethod
    def of(cls, share: Share) -> Count:
        return cls(k=share.k, n=share.n, interval=share.interval)

    @property
    def value(self) -> float:
        return self.k / self.n


class Figures(Record):
    """Figures of one finished combination. ``sparsity`` is measured; ``bytes`` are whole ONNX files.

    ``latency_ratio`` is the exported file's time over that of its dense counterpart, measured on one
    machine, or None. Hashes are those of the evidence files.
    """

    sparsity: float
    clean_dense: Count
    clean: Count
    robust_dense: Count
    robust: Count
    bytes: int
    dense_bytes: int
    latency_ratio: float | None
    flags: tuple[str, ...]
    verdict: str | None
    dense_certificate_sha256: str
    certificate_sha256: str
    artifact_sha256: str


class Setting(Record):
    """Pruning settings of a combination, the first columns of its row. ``sparsity`` is the requested one."""

    method: str
    s2ap: bool
    granularity: str
    budget: str | None
    sparsity: float | None
    keep_ratio: float | None

    @classmethod
    def of(cls, section: PruneSection) -> Setting:
        pattern = n_of_m(section.granularity)
        return cls(
            method=section.method,
            s2ap=section.perturbs,
            granularity=section.granularity,
            budget=section.layer_budget if pattern is None else None,
            sparsity=section.sparsity if pattern is None else 1 - pattern[0] / pattern[1],
            keep_ratio=section.keep_ratio,
        )

    @property
    def structure(self) -> str:
        """``US``, ``S`` or the pattern: the Adversarial Pruning Benchmark's word for the granularity."""
        return {"weight": "US", "channel": "S"}.get(self.granularity, self.granularity)


class Row(Record):
    """One combination. ``run`` is its folder in the sweep's; ``error`` and ``exit_code`` are a failure's."""

    name: str
    status: Status
    seed: int
    values: dict[str, Any]
    setting: Setting | None = None
    run: str | None = None
    error: str | None = None
    hint: str | None = None
    exit_code: int | None = None
    figures: Figures | None = None

    @classmethod
    def waiting(cls, combination: Combination) -> Row:
        """Return the row before any work; an impossible combination is skipped, with its reason."""
        recipe = combination.recipe
        common: dict[str, Any] = {
            "name": combination.name,
            "seed": combination.seed,
            "values": dict(combination.values),
        }
        if recipe is None or recipe.prune is None:
            return cls(**common, status="skipped", error=combination.reason)
        return cls(
            **common, status="waiting", setting=Setting.of(recipe.prune), run=f"runs/{combination.name}"
        )


class Spread(Record):
    """Mean of a figure over seeds, and the sample standard deviation (n - 1), None for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            mean=statistics.fmean(values), deviation=statistics.stdev(values) if len(values) > 1 else None
        )


class Difference(Record):
    """Robust accuracy with S2AP minus without, over the seeds that have both, as shares.

    ``interval`` is Student's at 95% over these pairs, None for a single one. ``setting`` is that with S2AP.
    """

    setting: Setting
    seeds: tuple[int, ...]
    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, setting: Setting, on: Mapping[int, float], off: Mapping[int, float]) -> Difference:
        """Compare the accuracies per seed of both, which have a seed in common."""
        seeds = sorted(on.keys() & off.keys())
        pairs = [on[seed] - off[seed] for seed in seeds]
        mean, interval = statistics.fmean(pairs), None
        if len(pairs) > 1:
            from scipy.stats import t

            half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
            interval = (mean - half, mean + half)
        return cls(setting=setting, seeds=tuple(seeds), mean=mean, interval=interval)


class Stability(Record):
    """How much masks differ between seeds, on average over ``pairs`` of them; see ``masks.Likeness``."""

    pairs: int
    hamming: float
    by_chance: float
    replaced: float
    iou: float

    @classmethod
    def of(cls, found: Sequence[Mapping[str, Any] | None]) -> Stability | None:
        measured = [each for each in found if each is not None]
        if not measured:
            return None
        keys = ("hamming", "by_chance", "replaced", "iou")
        means = {key: statistics.fmean(each[key] for each in measured) for key in keys}
        return cls(pairs=len(measured), **means)


class Group(Record):
    """Finished combinations that differ in the seed alone, as shares; ``bytes`` and latency as measured.

    ``masks`` compares the masks of searches with different seeds, ``finetuned`` the weights that are not zero
    after fine-tuning; None for a single seed, and while a sweep runs.
    """

    setting: Setting
    seeds: tuple[int, ...]
    sparsity: Spread
    clean_dense: Spread
    clean: Spread
    robust_dense: Spread
    robust: Spread
    bytes: Spread
    dense_bytes: Spread
    latency_ratio: Spread | None
    masks: Stability | None = None
    finetuned: Stability | None = None


class SweepReport(Record):
    """A sweep; ``status`` is ``started`` while combinations wait. ``statement`` is the certificates'."""

    schema_version: Literal[1] = 1
    kind: Literal["s2ap-deploy sweep"] = "s2ap-deploy sweep"
    status: Literal["started", "finished"]
    recipe: str
    data: str
    arch: str | None
    threat: ThreatModel
    protocol: str
    statement: str | None
    axes: dict[str, Any]
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...] = ()

    def save(self, folder: Path) -> None:
        """Write canonical JSON atomically. Raises StorageError."""
        files.write_json(folder / FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> SweepReport:
        """Read what :meth:`save` wrote. Raises StorageError, and RunFolderError for anything else."""
        path = folder / FILE
        try:
            return cls.model_validate(files.parse_json(files.read_bytes(path)))
        except (ValueError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise RunFolderError(
                f"{path} is damaged: {first}",
                code="file-damaged",
                hint="add --overwrite to start again, or choose another --run",
            ) from None


def figures(run: Run, verdict: str | None) -> tuple[Figures, str]:
    """Return the figures of a finished run folder, and the statement of its certificate.

    Every file is compared with its recorded hash. Raises RunFolderError for a missing or changed one.
    """
    dense, pruned = (Certificate.load(run.output("certify", f"{role}.json")) for role in ("dense", "pruned"))
    report = ExportReport.load(run.output("export", "report.json"))
    for certificate in (dense, pruned):
        if not isinstance(certificate.robust, Share):
            raise RunFolderError(
                f"certify in {run.path} was decided early and holds no figure",
                code="certificate-undecided",
                hint="certify in full: add --overwrite",
            )
    assert isinstance(dense.robust, Share)
    assert isinstance(pruned.robust, Share)
    shown = Figures(
        sparsity=pruned.subject.sparsity or 0.0,
        clean_dense=Count.of(dense.clean),
        clean=Count.of(pruned.clean),
        robust_dense=Count.of(dense.robust),
        robust=Count.of(pruned.robust),
        bytes=report.bytes,
        dense_bytes=report.dense_bytes,
        latency_ratio=report.latency_ratio,
        flags=tuple(dict.fromkeys((*dense.flags, *pruned.flags))),
        verdict=verdict,
        dense_certificate_sha256=dense.sha256,
        certificate_sha256=pruned.sha256,
        artifact_sha256=report.sha256,
    )
    return shown, pruned.statement


def groups(rows: Sequence[Row], folder: Path | None = None) -> tuple[Group, ...]:
    """Compute means and deviations over the seeds of each setting, in the order of the rows.

    With the ``folder`` of a sweep, masks are compared too. Raises RunFolderError for a run that has changed.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.figures is not None and row.setting is not None:
            found.setdefault(row.setting.model_dump_json(), []).append(row)
    return tuple(_group(members, folder) for members in found.values())


def differences(rows: Sequence[Row]) -> tuple[Difference, ...]:
    """Compare every setting with S2AP with the same one without, seed by seed, in the order of the rows."""
    found: dict[tuple[str, bool], tuple[Setting, dict[int, float]]] = {}
    for row in rows:
        if row.figures is not None and row.setting is not None:
            base = row.setting.model_copy(update={"s2ap": False}).model_dump_json()
            found.setdefault((base, row.setting.s2ap), (row.setting, {}))[1][row.seed] = (
                row.figures.robust.value
            )
    pairs = [
        (setting, on, found[base, False][1])
        for (base, s2ap), (setting, on) in found.items()
        if s2ap and (base, False) in found
    ]
    return tuple(Difference.of(setting, on, off) for setting, on, off in pairs if on.keys() & off.keys())


def _group(members: Sequence[Row], folder: Path | None) -> Group:
    shown = [row.figures for row in members if row.figures is not None]
    first = members[0].setting
    assert first is not None
    ratios = [each.latency_ratio for each in shown if each.latency_ratio is not None]
    spreads: Mapping[str, Spread] = {
        "sparsity": Spread.of([each.sparsity for each in shown]),
        "clean_dense": Spread.of([each.clean_dense.value for each in shown]),
        "clean": Spread.of([each.clean.value for each in shown]),
        "robust_dense": Spread.of([each.robust_dense.value for each in shown]),
        "robust": Spread.of([each.robust.value for each in shown]),
        "bytes": Spread.of([each.bytes for each in shown]),
        "dense_bytes": Spread.of([each.dense_bytes for each in shown]),
    }
    runs = [folder / row.run for row in members if folder is not None and row.run is not None]
    pairs = compare(runs)["pairs"] if len(runs) > 1 else []
    return Group(
        setting=first,
        masks=Stability.of(pairs),
        finetuned=Stability.of([pair["finetune"] for pair in pairs]),
        seeds=tuple(row.seed for row in members),
        latency_ratio=Spread.of(ratios) if ratios else None,
        **spreads,
    )
