"""Evidence from a device: its record, and the judgment that follows from the answers in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from s2ap_deploy import files, records
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.formatting import LONGEST_PATH, plain
from s2ap_deploy.gating.check import Check, Status, inconclusive
from s2ap_deploy.recipe.thresholds import DEVICE_NAME
from s2ap_deploy.records import SHOWN_POINTS, ChangedPoint, PointsCheck
from s2ap_deploy.spec import Record

RECORD = "device.json"
NO_ANSWER = -1
"""The class of an answer that holds NaN or infinity."""
_HINT = "repeat python bundle.pyz on the device"
_SHORT = Annotated[str, Field(max_length=200)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DifferentAnswer(Record):
    """A point with another class than the certificate's; ``gap`` is by how much its logit is the larger one.

    ``gap`` is None where the answer holds NaN or infinity.
    """

    index: int = Field(ge=0)
    attacked: bool
    gap: float | None = Field(ge=0, allow_inf_nan=False)


class CameraImage(Record):
    """An image file read on the device: its ``distance`` from the certified image in the threat's norm.

    ``clean`` is the class of the device's image, ``attacked`` that with the certificate's perturbation on it.
    """

    index: int = Field(ge=0)
    distance: float = Field(ge=0, allow_inf_nan=False)
    clean: int
    attacked: int


class Camera(Record):
    """Pixels that the device made from image files, by Pillow or by the user's ``reader``."""

    reader: _SHORT
    images: Annotated[tuple[CameraImage, ...], Field(min_length=1)]


class Seen(Record):
    """Images that a device read against the certified ones: distances in the threat's norm.

    ``beyond`` images are farther away than ``radius``; ``classes`` are the indices of those with another
    clean class than on the certified image, ``lost`` of those that are no longer right both clean and
    attacked, ``gained`` of those that are so now.
    """

    reader: str
    images: int
    largest: float
    radius: float
    beyond: int
    classes: tuple[int, ...]
    lost: tuple[int, ...]
    gained: tuple[int, ...]


class DeviceRecord(Record):
    """What ``python bundle.pyz`` measured on a device: ``device.json``.

    ``clean`` and ``attacked`` are the classes on every point of the certificate, ``times_ms`` single
    inferences of one image on ``threads`` threads, ``features`` the instructions of the processor. The counts
    and quantiles in it follow from those. ``content_sha256`` is the hash of everything else: it finds damage
    and carelessness, while only a signature of the run folder shows an origin.
    """

    schema_version: Literal[1] = 1
    kind: Literal["s2ap-deploy device record"] = "s2ap-deploy device record"
    name: Annotated[str, Field(pattern=DEVICE_NAME)]
    started: _SHORT
    bundle_sha256: _Digest
    certificate_sha256: _Digest
    file: Annotated[str, Field(max_length=1000)]
    file_sha256: _Digest
    runtime: _SHORT
    versions: dict[_SHORT, _SHORT]
    n: int = Field(ge=1)
    clean: tuple[int, ...]
    attacked: tuple[int, ...]
    different: tuple[DifferentAnswer, ...]
    max_logit_difference: float = Field(ge=0, allow_inf_nan=False)
    threads: int = Field(ge=1)
    warmup: int = Field(ge=0)
    load_ms: _Milliseconds
    times_ms: Annotated[tuple[_Milliseconds, ...], Field(min_length=1, max_length=10_000)]
    p50_ms: float
    p95_ms: float
    peak_memory_bytes: int | None = Field(gt=0)
    machine: _SHORT
    system: _SHORT
    processor: _SHORT | None
    cores: int | None
    features: tuple[_SHORT, ...]
    camera: Camera | None
    content_sha256: _Digest

    @model_validator(mode="after")
    def _follows_from_its_measurements(self) -> Self:
        facts = {
            "clean": len(self.clean) == self.n,
            "attacked": len(self.attacked) == self.n,
            "camera": self.camera is None or all(each.index < self.n for each in self.camera.images),
            "p50_ms": self.p50_ms == quantile(self.times_ms, 0.5),
            "p95_ms": self.p95_ms == quantile(self.times_ms, 0.95),
        }
        if wrong := [name for name, holds in facts.items() if not holds]:
            raise ValueError(f"{', '.join(wrong)} does not follow from the measurements")
        return self

    @classmethod
    def load(cls, path: Path) -> DeviceRecord:
        """Read a record from a device.

        Raises:
            StorageError: the file cannot be read.
            InputError: it is no such record, is damaged, was edited, or contradicts itself.
        """
        content = files.read_bytes(path, limit=files.LARGEST_JSON)
        found = records.parse(content, cls, InputError, source=str(path), hint=_HINT)
        rest = {key: value for key, value in files.parse_json(content).items() if key != "content_sha256"}
        if hashlib.sha256(files.canonical_json(rest).encode()).hexdigest() != found.content_sha256:
            raise InputError(
                f"{path} was edited after it was measured", code="device-record-edited", hint=_HINT
            )
        return found

    @property
    def described(self) -> str:
        """The processor and the runtime in a few words."""
        return (
            f"{self.processor or self.machine}, {self.runtime} {self.versions.get(self.runtime, '')}".strip()
        )

    def seen(self, certificate: Certificate) -> Seen | None:
        """Compare the images that the device read with the certified ones; None where it read none."""
        if self.camera is None:
            return None
        classes, lost, gained = [], [], []
        for each in self.camera.images:
            index, label = each.index, certificate.samples[each.index].label
            before, now = (self.clean[index], self.attacked[index]), (each.clean, each.attacked)
            was, is_now = before == (label, label), now == (label, label)
            classes += [index] if now[0] != before[0] else []
            lost += [index] if was and not is_now else []
            gained += [index] if is_now and not was else []
        distances = [each.distance for each in self.camera.images]
        return Seen(
            reader=self.camera.reader,
            images=len(distances),
            largest=max(distances),
            radius=certificate.threat.radius,
            beyond=sum(each > certificate.threat.radius for each in distances),
            classes=tuple(classes),
            lost=tuple(lost),
            gained=tuple(gained),
        )

    def judged(self, certificate: Certificate, largest_logit: float) -> PointsCheck:
        """Compare the answers with the certificate's; ``largest_logit`` of the file decides what is a tie.

        Raises ValueError where the record's list of other answers is not the one that its answers give.
        """
        samples = certificate.samples
        if len(samples) != self.n:
            raise ValueError(f"answers for {self.n} points, where the certificate has {len(samples)}")
        changed = [
            ChangedPoint(index=index, attacked=attacked, label=sample.label, before=before, after=after)
            for attacked, answers in ((False, self.clean), (True, self.attacked))
            for index, (sample, after) in enumerate(zip(samples, answers, strict=True))
            if after != (before := sample.adversarial_prediction if attacked else sample.clean_prediction)
        ]
        if [(each.index, each.attacked) for each in changed] != [
            (each.index, each.attacked) for each in self.different
        ]:
            raise ValueError("its list of other answers does not follow from its answers")
        tie = 2 * records.SUM_TOLERANCE * max(1.0, largest_logit)
        return PointsCheck(
            certificate_sha256=self.certificate_sha256,
            n=self.n,
            clean_correct=sum(
                sample.label == found for sample, found in zip(samples, self.clean, strict=True)
            ),
            survived=sum(
                sample.label == clean == attacked
                for sample, clean, attacked in zip(samples, self.clean, self.attacked, strict=True)
            ),
            clean_disagreements=sum(not each.attacked for each in changed),
            adversarial_disagreements=sum(each.attacked for each in changed),
            ties=sum(each.gap is not None and each.gap <= tie for each in self.different),
            changed=tuple(changed),
        )


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this ``share`` of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Device(Record):
    """A device of a run: its record, and its judgment, None where its certificate is not in the run.

    ``seen`` compares the images that it read itself.
    """

    name: str
    record: DeviceRecord
    judged: PointsCheck | None
    seen: Seen | None = None

    def check(self, required: bool) -> Check:
        """Check that the device gives the certificate's answers on every point, but for ties.

        Another answer of a ``required`` device fails; of another one it is a doubt.
        """
        name, about = f"device {self.name}", plain(self.record.described, LONGEST_PATH)
        if self.judged is None:
            why = "was measured for a certificate that the run does not hold"
            return inconclusive("device", name, why, reason="not-certified", path=self._path)
        status: Status = "pass" if self.judged.explained else "fail" if required else "inconclusive"
        if status == "pass":
            message = f"{name}: the certificate's answers on all {self.judged.n} samples, clean and attacked"
            if self.judged.ties:
                message += f", but for {self.judged.ties} where rounding decides"
        else:
            different = self.judged.disagreements - self.judged.ties
            message = f"{name}: answers {different} points otherwise; {self.judged.changed_text}"
        return Check(
            rule="device",
            name=name,
            status=status,
            message=f"{message} ({about})",
            path=self._path,
            reason=None if status == "pass" else "answers-differ",
        )

    def camera(self, required: bool) -> Check | None:
        """Check that the images which the device reads are the certified ones; None where it read none."""
        if self.seen is None:
            return None
        name, seen = f"images of {self.name}", self.seen
        same = not (seen.beyond or seen.classes or seen.lost or seen.gained)
        shown = ", ".join(map(str, [*seen.lost, *seen.gained][:SHOWN_POINTS]))
        return Check(
            rule="camera",
            name=name,
            status="pass" if same else "fail" if required else "inconclusive",
            message=f"{name}: read by {plain(seen.reader, LONGEST_PATH)}, up to {seen.largest:.4g} from the "
            f"certified ones, where eps is {seen.radius:.4g}; of {seen.images} images {seen.beyond} are "
            f"beyond eps and {len(seen.classes)} change their class; verdicts: {len(seen.lost)} lost, "
            f"{len(seen.gained)} gained" + (f" ({shown})" if shown else ""),
            path=self._path,
            reason=None if same else "pixels-differ",
        )

    def latency(self, limit: float) -> Check:
        """Compare the median time of one image with ``limit``, in milliseconds."""
        name, value = f"latency on {self.name}", self.record.p50_ms
        on = f"{self.record.threads} thread{'s' if self.record.threads > 1 else ''}"
        return Check(
            rule="latency",
            name=name,
            status="pass" if value <= limit else "fail",
            message=f"{name}: {value:g} ms on {on}; allowed {limit:g} ms",
            path=self._path,
            threshold=limit,
            observed=value,
            bound=value,
        )

    @property
    def _path(self) -> str:
        return f"device-{self.name}/{RECORD}"


def checks(devices: Sequence[Device], required: Sequence[str], max_latency_ms: float | None) -> list[Check]:
    """Judge the devices of a run, of which those named ``required`` must be there.

    ``max_latency_ms`` limits the median time of each required device.
    """
    there = {each.name: each for each in devices}
    found = [each.check(each.name in required) for each in devices]
    found += [check for each in devices if (check := each.camera(each.name in required)) is not None]
    for name in dict.fromkeys(required):
        if name not in there:
            why = "has not been collected: python bundle.pyz there, then s2ap-deploy collect"
            found.append(inconclusive("device", f"device {name}", why, reason="missing"))
        elif max_latency_ms is not None:
            found.append(there[name].latency(max_latency_ms))
    return found
