"""The tables of a run as rows of text, the same for the page and for the card."""

from __future__ import annotations

from dataclasses import dataclass

from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.samples import ClassInterval, ClassRow
from s2ap_deploy.formatting import exact_percent
from s2ap_deploy.onnx_export.export_report import ExportReport, PairedTimes, Performance
from s2ap_deploy.reporting import charts
from s2ap_deploy.reporting.figure_data import sizes, stored_tensors
from s2ap_deploy.reporting.report import words
from s2ap_deploy.reporting.run_facts import DENSE, PRUNED, Facts
from s2ap_deploy.reporting.svg import Drawing
from s2ap_deploy.runs.manifest import STAGES, beside

MOST_CLASSES = 50
RADII = ((0.0, "0"), (0.5, "ε/2"), (1.0, "ε"), (1.5, "1.5 ε"), (2.0, "2 ε"))
NOT_WRITTEN = "not written"
NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Table:
    """A heading, cells under it, and a sentence about omitted rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str | Drawing, ...], ...]
    note: str = ""


def comparison(facts: Facts) -> Table:
    """Return a row per figure, a column per network and per file that was attacked itself."""
    columns = list(facts.certificates.values())
    rows = [
        ("Clean accuracy", *(words.share(each.clean) for each in columns)),
        (words.robust_label(facts), *(words.share(each.robust) for each in columns)),
    ]
    if any(each.proven is not None for each in columns):
        rows.append(("Provably robust (lower bound)", *(words.share(each.proven) for each in columns)))
    rows += [
        ("Test images", *(f"{each.n:,}" for each in columns)),
        ("Sparsity", *(exact_percent(each.subject.sparsity or 0.0) for each in columns)),
        ("Weights that cannot be pruned", *(words.outside(each.subject.weights) for each in columns)),
        *(
            [("Test images also in training", *(str(len(shared)) for _ in columns))]
            if (shared := facts.results("certify").get("duplicates"))
            else []
        ),
        ("Reliability flags", *(", ".join(each.flags) or "none" for each in columns)),
    ]
    return Table(("", *(words.role(role, facts) for role in facts.certificates)), tuple(rows))


def attacks(facts: Facts) -> Table:
    """Return, per attack, how many samples it broke and how many it saw."""
    names = dict.fromkeys(row.name for each in facts.networks.values() for row in each.attacks)
    rows = []
    for name in names:
        cells = []
        for each in facts.networks.values():
            found = next((row for row in each.attacks if row.name == name), None)
            cells.append("not run" if found is None else f"{found.n_broken:,} of {found.n_in:,}")
        rows.append((name, *cells))
    return Table(("Attack: broke", *(words.role(role, facts) for role in facts.networks)), tuple(rows))


def curve(facts: Facts) -> Table:
    """Return accuracy at a few radii around eps, with intervals."""
    if not facts.curves:
        return Table((), ())
    threat = next(iter(facts.networks.values())).threat
    rows = [
        (name, *(words.share(each.share(factor * threat.radius)) for each in facts.curves.values()))
        for factor, name in RADII
    ]
    head = (f"Radius (ε = {threat.eps})", *(words.role(role, facts) for role in facts.curves))
    return Table(head, tuple(rows))


def classes(facts: Facts) -> Table:
    """Return a row per class with clean and robust counts of each network; only the least robust of many."""
    speaks = words.subject(facts)
    if speaks is None:
        return Table((), ())
    by_role = {role: {row.label: row for row in rows_of(each)} for role, each in facts.networks.items()}
    every = rows_of(speaks)
    least = sorted(every, key=lambda row: standing(row)[0] / max(row.n, 1))[:MOST_CLASSES]
    rows: list[tuple[str | Drawing, ...]] = []
    for row in sorted(least, key=lambda row: row.label):
        mine = {role: found[row.label] for role, found in by_role.items() if row.label in found}
        cells = (counted(mine[role]) if role in mine else "no sample" for role in by_role)
        drawn = charts.class_strip(mine)
        rows.append((row.name or f"class {row.label}", f"{row.n:,}", *cells, drawn))
    left = len(every) - len(least)
    note = (
        f"These are the {len(least)} least robust classes; {left} more are in the certificate."
        if left
        else ""
    )
    head = ("Class", "Images", *(f"{role}: clean → robust" for role in by_role), "Robust, 95% interval")
    return Table(head, tuple(rows), note)


def rows_of(certificate: Certificate) -> list[ClassRow | ClassInterval]:
    """Return the certificate's classes, of a full attack or of one that stopped early."""
    return [*certificate.per_class]


def standing(row: ClassRow | ClassInterval) -> tuple[int, int]:
    """Return the least and the most samples of the class that are robust."""
    return (row.settled, row.possible) if isinstance(row, ClassInterval) else (row.robust, row.robust)


def counted(row: ClassRow | ClassInterval) -> str:
    """Return ``6 → 4``, or ``6 → 2 to 5`` if the attack stopped early."""
    low, high = standing(row)
    return f"{row.clean}{NBSP}→{NBSP}{low}" + (f" to {high}" if low != high else "")


def exported(facts: Facts) -> Table:
    """Return a row per exported file, with the accuracy of its own or of the covering certificate."""
    rows = []
    for stage, report in facts.exports.items():
        own = facts.certificates.get(beside("artifact", stage))
        covered = any(
            answers.certificate_sha256 in facts.hashes.values() and answers.explained
            for answers in report.points_checks
        )
        rounded = report.quantization is not None or report.rounding is not None
        size, ratio = words.size(report.bytes), words.ratio(report)
        rows.append(_file_row(facts, facts.path_of(stage), size, ratio, own, covered and not rounded))
        if (device := report.device) is not None:
            own = facts.certificates.get(f"{beside('artifact', stage)}-device")
            covered = any(
                answers.certificate_sha256 in facts.hashes.values() and answers.explained
                for answers in device.points_checks
            )
            path, size = f"{stage}/{device.folder}/{device.main}", words.size(device.bytes)
            rows.append(_file_row(facts, path, size, "", own, covered and not device.rounded))
    head = ("File", "Size", "Latency, of dense", "Clean accuracy", words.robust_label(facts), "Certificate")
    return Table(head, tuple(rows))


def _file_row(
    facts: Facts, path: str, size: str, ratio: str, own: Certificate | None, covered: bool
) -> tuple[str, ...]:
    found = own or (words.subject(facts) if covered else None)
    by = "its own" if own else "the network's, same answers" if found else "none"
    shares = (found.clean, found.robust) if found else ()
    return (path, size, ratio, *(map(words.share, shares) if found else ("not certified",) * 2), by)


def by_encoding(report: ExportReport) -> Table:
    """Return the bytes of all listed weights under every encoding, predicted and measured."""
    rows = [
        (
            each.encoding,
            words.size(each.predicted),
            words.size(each.measured) if each.measured is not None else NOT_WRITTEN,
            each.note,
        )
        for each in sizes(report)
    ]
    return Table(("Encoding", "Predicted", "Measured", ""), tuple(rows))


def by_tensor(report: ExportReport) -> Table:
    """Return the bytes of every weight of the file, predicted and actual."""
    rows = [
        (
            each.name,
            each.encoding,
            f"{each.nonzeros:,} of {each.entries:,}",
            words.size(each.predicted),
            words.size(each.measured),
        )
        for each in stored_tensors(report)
    ]
    return Table(("Tensor", "Stored as", "Not zero", "Predicted", "Measured"), tuple(rows))


def performance(found: Performance) -> Table:
    """Return a row for each number of threads and images, one for loading, two for memory."""
    rows = [
        (f"{_count(row.batch, 'image')}, {_count(row.threads, 'thread')}", *_times(row.times))
        for row in found.inference
    ]
    rows.append(("loading", *_times(found.load)))
    if (memory := found.memory) is not None:
        pairs = (
            ("peak memory, loading", memory.load_bytes, memory.dense_load_bytes),
            (f"peak memory, {_count(memory.batch, 'image')}", memory.run_bytes, memory.dense_run_bytes),
        )
        rows += [
            (words, _mebibytes(mine), _mebibytes(theirs), f"{mine / theirs:.2f}" if theirs else "")
            for words, mine, theirs in pairs
        ]
    note = f"{found.statement} Measured on {found.processor}."
    return Table(("", "File", "Dense file", "Ratio [quartiles]"), tuple(rows), note)


def devices(facts: Facts) -> Table:
    """Return a row per device: what it ran, its answers against the certificate's, its time and memory."""
    rows = []
    for each in facts.devices:
        measured, judged = each.record, each.judged
        same = "another certificate"
        if judged is not None:
            wrong = judged.disagreements - judged.ties
            same = f"all {judged.n:,} as certified" if not wrong else f"{wrong} differ; {judged.changed_text}"
        seen = each.seen
        read = "" if seen is None else f"{seen.images}: {seen.beyond} beyond ε, {len(seen.lost)} lost"
        peak = measured.peak_memory_bytes
        times = f"{measured.p50_ms:,.3g}, {measured.p95_ms:,.3g}{NBSP}ms"
        rows.append(
            (
                each.name,
                measured.described,
                measured.file,
                same,
                f"{times} ({_count(measured.threads, 'thread')})",
                "" if peak is None else _mebibytes(peak),
                read,
            )
        )
    head = ("Device", "Processor, runtime", "File", "Answers", "p50, p95", "Peak memory", "Images read there")
    return Table(head, tuple(rows))


def _times(times: PairedTimes) -> tuple[str, str, str]:
    ratio = f"{times.ratio:.2f} [{times.ratio_q1:.2f}, {times.ratio_q3:.2f}]"
    return f"{times.p50_ms:,.3g}{NBSP}ms", f"{times.dense_p50_ms:,.3g}{NBSP}ms", ratio


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}{NBSP}MiB"


def _count(number: int, noun: str) -> str:
    return f"{number:,}{NBSP}{noun}{'' if number == 1 else 's'}"


def hashes(facts: Facts) -> list[tuple[str, str]]:
    """Return the SHA-256 of everything that the certificates and the export name."""
    rows = [(f"certificate, {words.role(role, facts)}", value) for role, value in facts.hashes.items()]
    for role, each in facts.networks.items():
        rows += _of_network(role, each)
    pruned = facts.networks.get(PRUNED)
    if pruned is not None and pruned.mask_sha256:
        rows.append(("masks", pruned.mask_sha256))
    rows += [(f"exported file {facts.path_of(stage)}", each.sha256) for stage, each in facts.exports.items()]
    return rows


def _of_network(role: str, certificate: Certificate) -> list[tuple[str, str]]:
    rows = [(f"weights, {role}", certificate.subject.weights_sha256)]
    if certificate.subject.checkpoint_sha256:
        rows.append((f"checkpoint, {role}", certificate.subject.checkpoint_sha256))
    if certificate.points is not None:
        rows.append((f"adversarial points, {role}", certificate.points.sha256))
    if role == DENSE:
        rows.append(("sample ids", certificate.sample_ids_sha256))
    return rows


def seeds(facts: Facts) -> list[tuple[str, str]]:
    """Return every seed that the run recorded."""
    rows: list[tuple[str, str]] = [
        (stage, str(facts.inputs(stage)["seed"])) for stage in STAGES if "seed" in facts.inputs(stage)
    ]
    speaks = words.subject(facts)
    if speaks is not None:
        rows += [("attacks", str(speaks.attack_seed)), ("choice of test images", str(speaks.sample_seed))]
    return rows


def versions(facts: Facts) -> list[tuple[str, str]]:
    """Return versions and machine of the certificate, or else of the latest stage that records them."""
    speaks = words.subject(facts)
    if speaks is not None:
        found: dict[str, object] = {**speaks.versions, **speaks.environment}
    else:
        sessions = [each.environment for record in facts.manifest.stages.values() for each in record.sessions]
        last = next((each for each in reversed(sessions) if each), {})
        nested = last.get("versions")
        found = {**(nested if isinstance(nested, dict) else {}), **last}
        found.pop("versions", None)
    return [(str(key), str(value)) for key, value in sorted(found.items())]


def stages(facts: Facts) -> Table:
    """Return the finished stages with their times and durations."""
    rows = [
        (
            name,
            record.status,
            f"{record.seconds:,.0f} s" if record.seconds is not None else "",
            (record.finished or "").replace("T", " ")[:16],
        )
        for kind in STAGES
        for name, record in facts.manifest.of_kind(kind).items()
    ]
    return Table(("Stage", "State", "Time", "Finished (UTC)"), tuple(rows))
