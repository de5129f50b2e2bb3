"""The facts of a run folder that its report shows, and messages for those that are missing."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from s2ap_deploy import files
from s2ap_deploy.errors import DeployError, RunFolderError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.security_curve import SecurityCurve
from s2ap_deploy.gating.check import Verdict
from s2ap_deploy.gating.devices import Device
from s2ap_deploy.gating.sample_checks import PairRange
from s2ap_deploy.onnx_export.export_report import ExportReport
from s2ap_deploy.reporting.figure_data import Shown, gallery
from s2ap_deploy.runs import manifest
from s2ap_deploy.runs.folder import CERTIFICATE, RECIPE_FILE
from s2ap_deploy.runs.manifest import Manifest, StageName, StageRecord
from s2ap_deploy.stages.certified_files import devices
from s2ap_deploy.stages.gate import findings

Found = TypeVar("Found")


class Reader:
    """Reads files of finished stages if they are as recorded, and collects ``problems``."""

    def __init__(self, folder: Path, contents: Manifest) -> None:
        self.folder, self.contents, self.problems = folder, contents, list[str]()

    def record(self, stage: StageName) -> StageRecord | None:
        """Return the stage, if it is finished."""
        found = self.contents.stages.get(stage)
        return found if found is not None and found.status == "finished" else None

    def recorded(self, stage: StageName, name: str) -> list[str]:
        """Return the hashes under which the manifest lists the file: one, or none."""
        record = self.record(stage)
        listed = record.outputs if record is not None else ()
        return [output.sha256 for output in listed if output.path == f"{stage}/{name}"]

    def path(self, stage: StageName, name: str) -> Path | None:
        """Return the file, if the manifest lists it and its hash is the recorded one."""
        for sha256 in self.recorded(stage, name):
            path = self.attempt(partial(files.within, self.folder, f"{stage}/{name}"))
            if path is None:
                continue
            if path.is_file() and self.attempt(partial(files.sha256, path)) == sha256:
                return path
            what = "has changed since it was recorded" if path.is_file() else "is missing"
            self.problems.append(f"{stage}/{name} {what}")
        return None

    def read(self, stage: StageName, name: str, load: Callable[[Path], Found]) -> Found | None:
        """Return the result of ``load`` for the file, or None."""
        path = self.path(stage, name)
        return self.attempt(lambda: load(path)) if path is not None else None

    def attempt(self, work: Callable[[], Found]) -> Found | None:
        """Return the result of ``work``; a DeployError is recorded as a problem."""
        try:
            return work()
        except DeployError as error:
            self.problems.append(error.message)
            return None


Row = Mapping[str, float | None]

DENSE, PRUNED = "dense", "pruned"
LONGEST_RECIPE = 20_000


@dataclass(frozen=True)
class LayerSparsity:
    """A prunable layer and how many of its weights the mask keeps."""

    name: str
    kept: int
    weights: int


@dataclass(frozen=True)
class Facts:
    """The contents of a run folder. ``missing`` has messages by section, with the command to type.

    ``certificates`` are those of the roles dense and pruned, and of exported files themselves by the stage
    of the certificate, ``hashes`` the SHA-256 of their files; ``exports`` are the reports of the exported
    files by stage. ``problems`` are files that are not as the manifest recorded them, and that the report
    therefore leaves out, ``doubts`` what the gate finds wrong with the files and facts as they are now, which
    leaves no verdict. ``devices`` are the records of devices, judged.
    ``inputs`` are a stage's, by its name. ``origin``: when the last stage finished, and where CI reports.
    """

    name: str
    manifest: Manifest
    recipe_file: str = RECIPE_FILE
    recipe: str | None = None
    verdict: Verdict | None = None
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    pairs: PairRange | None = None
    curves: Mapping[str, SecurityCurve] = field(default_factory=dict)
    histories: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    layers: tuple[LayerSparsity, ...] = ()
    exports: Mapping[StageName, ExportReport] = field(default_factory=dict)
    shown: tuple[Shown, ...] = ()
    problems: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, stage: StageName) -> Mapping[str, Any]:
        """Return the inputs of a stage; empty if there are none."""
        record = self.manifest.stages.get(stage)
        return record.inputs if record is not None else {}

    def results(self, stage: StageName) -> Mapping[str, Any]:
        """Return the results of a finished stage; empty if there are none."""
        record = self.manifest.stages.get(stage)
        return record.results if record is not None and isinstance(record.results, dict) else {}

    def path_of(self, stage: StageName) -> str:
        """Return the path of an exported file, by the stage of its export or of its certificate."""
        report = self.exports.get(manifest.beside("export", stage))
        return f"{manifest.beside('export', stage)}/{report.file}" if report is not None else stage

    @property
    def networks(self) -> Mapping[str, Certificate]:
        """The certificates of the dense and the pruned network."""
        return {role: self.certificates[role] for role in (DENSE, PRUNED) if role in self.certificates}


def collect(folder: Path, *, images: int = 12) -> Facts:
    """Read the run folder without changing it; a later stage may be running in it.

    ``images`` is the most samples of the gallery. Raises RunFolderError if there is no run.
    """
    if not (folder / manifest.FILE_NAME).is_file():
        raise RunFolderError(
            f"there is no run in {folder}", code="run-missing", hint="name a run folder, such as s2ap-run"
        )
    contents = Manifest.load(folder)
    reader = Reader(folder, contents)
    places: dict[str, tuple[StageName, str]] = {
        **{role: ("certify", f"{role}.json") for role in (DENSE, PRUNED)},
        **{stage: (stage, CERTIFICATE) for stage in contents.of_kind("artifact")},
    }
    certificates = {
        role: found
        for role, (stage, name) in places.items()
        if (found := reader.read(stage, name, Certificate.load)) is not None
    }
    networks = {role: each for role, each in certificates.items() if role in (DENSE, PRUNED)}
    search, recipe = reader.record("search"), _recipe(reader)
    doubts = reader.attempt(lambda: findings(folder)) or ()
    exports = {
        stage: report
        for stage in contents.of_kind("export")
        if (report := reader.read(stage, "report.json", ExportReport.load)) is not None
    }
    by_hash = {each.sha256: each for each in certificates.values()}
    facts = Facts(
        name=folder.resolve().name,
        manifest=contents,
        recipe_file=recipe[0],
        recipe=recipe[1],
        verdict=None if doubts else reader.read("gate", "verdict.json", _verdict),
        certificates=certificates,
        hashes={
            role: files.sha256(folder / stage / name)
            for role, (stage, name) in places.items()
            if role in certificates
        },
        pairs=_pairs(networks),
        curves={
            role: curve
            for role in networks
            if (curve := reader.read("certify", f"{role}-curve.json", SecurityCurve.load)) is not None
        },
        histories={
            stage: rows
            for stage in ("pretrain", "search", "finetune")
            if (rows := reader.read(stage, "history.json", _rows))
        },
        layers=_layers(search.results if search is not None else None),
        exports=exports,
        shown=_shown(reader, networks, images),
        doubts=doubts,
        devices=tuple(reader.attempt(lambda: devices(folder, contents, by_hash, exports)) or ()),
        problems=tuple(dict.fromkeys(reader.problems)),
        origin=_origin(contents, os.environ),
    )
    return Facts(**{**vars(facts), "missing": _missing(facts)})


def _origin(contents: Manifest, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the time of the last finished stage; in GitHub's or GitLab's CI also commit and address."""
    finished = [record.finished for record in contents.stages.values() if record.finished]
    last = max(finished, default="").replace("T", " ", 1).replace("+00:00", " UTC")
    rows = {"Finished": last, "s2ap-deploy": contents.tool_version}
    if environment.get("GITHUB_ACTIONS") == "true":
        parts = [environment.get(f"GITHUB_{name}", "") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID")]
        rows["Commit"] = environment.get("GITHUB_SHA", "")
        rows["CI run"] = "{}/{}/actions/runs/{}".format(*parts) if all(parts) else ""
    elif environment.get("GITLAB_CI") == "true":
        rows |= {"Commit": environment.get("CI_COMMIT_SHA", ""), "CI run": environment.get("CI_JOB_URL", "")}
    return {label: value for label, value in rows.items() if value}


def _recipe(reader: Reader) -> tuple[str, str | None]:
    """Name and text of the recipe: as certified, or else the folder's own; None where there is none.

    A recipe too long for a page counts as none.
    """
    certified = reader.path("certify", RECIPE_FILE)
    path = certified or reader.folder / RECIPE_FILE
    name = f"certify/{RECIPE_FILE}" if certified else RECIPE_FILE
    if not path.is_file():
        return name, None
    text = reader.attempt(lambda: files.read_bytes(path, limit=LONGEST_RECIPE).decode(errors="replace"))
    return name, text if text is not None and len(text) <= LONGEST_RECIPE else None


def _verdict(path: Path) -> Verdict:
    try:
        return Verdict.model_validate_json(files.read_bytes(path))
    except ValidationError:
        raise RunFolderError(
            f"{path} is not a verdict", code="file-damaged", hint="judge again: s2ap-deploy gate"
        ) from None


def _rows(path: Path) -> tuple[Row, ...]:
    """Return the rows of a history: finite numbers, everything else None."""
    try:
        content = files.parse_json(files.read_bytes(path))
    except ValueError:
        content = None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise RunFolderError(f"{path} is not a history", code="file-damaged")
    return tuple({str(key): number(value) for key, value in row.items()} for row in content)


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def _layers(results: Any) -> tuple[LayerSparsity, ...]:
    """Return the layers that the search recorded, without inconsistent ones."""
    listed = results.get("layers") if isinstance(results, dict) else None
    return tuple(
        LayerSparsity(str(layer.get("name")), int(kept), int(weights))
        for layer in (listed if isinstance(listed, list) else [])
        if isinstance(layer, dict)
        and (kept := number(layer.get("kept"))) is not None
        and (weights := number(layer.get("weights"))) is not None
        and 0 <= kept <= weights
        and weights > 0
    )


def _pairs(networks: Mapping[str, Certificate]) -> PairRange | None:
    """Count lost and gained samples if both networks saw the same samples under the same threat model."""
    if set(networks) != {DENSE, PRUNED}:
        return None
    dense, pruned = networks[DENSE], networks[PRUNED]
    if (dense.sample_ids_sha256, dense.threat) != (pruned.sample_ids_sha256, pruned.threat):
        return None
    return PairRange.of(dense.robustness, pruned.robustness)


def _shown(reader: Reader, networks: Mapping[str, Certificate], images: int) -> tuple[Shown, ...]:
    points = {
        role: path
        for role, each in networks.items()
        if each.points is not None
        and each.points.sha256 in reader.recorded("certify", each.points.name)
        and (path := reader.path("certify", each.points.name)) is not None
    }
    return (reader.attempt(lambda: gallery(networks, points, images)) or ()) if points else ()


def _missing(facts: Facts) -> dict[str, str]:
    """Return, by section, a message on missing content with the reason and the command to create it."""
    run = f"--run {shlex.quote(facts.name)}"
    certify = f"The networks of this run have not been attacked yet: s2ap-deploy certify {run}"
    export = f"Nothing is exported yet: s2ap-deploy export --onnx {run}"
    bench = f"s2ap-deploy export --bench {run}"
    prune = f"This folder has no finished mask search: s2ap-deploy prune MODEL {run}"
    record = facts.manifest.stages.get("search")
    searched = record is not None and record.status == "finished"
    measured = any(
        each.latency_ratio is not None or each.performance is not None for each in facts.exports.values()
    )
    judged = (
        "No verdict holds for the files as they are now"
        if facts.doubts
        else "The gate has not judged this run"
    )
    there: dict[str, tuple[object, str]] = {
        "verdict": (facts.verdict, f"{judged}: s2ap-deploy gate --min-robust 0.40 {run}"),
        "comparison": (facts.networks, certify),
        "curve": (
            facts.networks and facts.curves,
            f"No security curve was measured: s2ap-deploy certify --curve --overwrite {run}",
        ),
        "classes": (facts.networks, certify),
        "density": (facts.layers, "The search recorded no layers." if searched else prune),
        "search": (
            facts.histories.get("search"),
            "The search recorded no epochs: some methods select their mask in one shot."
            if searched
            else prune,
        ),
        "training": (facts.histories, "No stage of this run recorded a training curve."),
        "sizes": (facts.exports, export),
        "latency": (
            measured,
            f"The latency of this export was not measured: {bench}" if facts.exports else export,
        ),
        "images": (
            facts.shown,
            "No images were requested, or there is no intact file of adversarial points."
            if facts.networks
            else certify,
        ),
    }
    return {section: words for section, (found, words) in there.items() if not found}
