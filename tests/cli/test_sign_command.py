"""What a signature sees and hashes do not: whole folders that were rewritten consistently."""

import base64
import json
import shutil
import subprocess
import sys

import pytest

from s2ap_deploy import files
from s2ap_deploy.runs import manifest
from s2ap_deploy.spec import ThreatModel

pytest.importorskip("model_signing", reason="needs the extra signing")
pytest.importorskip("OpenSSL", reason="needs the extra signing")
EPS = ThreatModel(eps="16/255")
EASY = ["gate", "--min-robust", 0.5, "--max-drop", 0.1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs, as ``NAME.pem`` and ``NAME.pub``."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    for name in ("own", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def signed(make_run, s2ap, keys):
    """A signed run folder."""
    folder = make_run()
    s2ap.ok("sign", folder, "--private-key", keys / "own.pem")
    return folder


def required(keys, name="own"):
    return ["--require-signature", "--public-key", keys / f"{name}.pub"]


def test_a_signed_folder_passes_and_is_left_as_it_was(signed, s2ap, keys, files_in, tmp_path) -> None:
    before = files_in(signed)
    done = s2ap.ok(*EASY, *required(keys), "--output", tmp_path / "verdict.json", "--run", signed)
    assert "every file of the run folder is as the holder of own.pub signed it" in done.out
    assert files_in(signed) == before
    assert json.loads((tmp_path / "verdict.json").read_text())["status"] == "pass"
    assert s2ap(*EASY, *required(keys), "--run", signed).code == 0, "judging does not invalidate it"
    moved = shutil.move(signed, tmp_path / "elsewhere")
    assert s2ap(*EASY, *required(keys), "--run", moved).code == 0


def test_another_key_and_no_signature(signed, s2ap, keys) -> None:
    assert s2ap(*EASY, *required(keys, "other"), "--run", signed).code == 1
    (signed / "signature.json").unlink()
    assert s2ap(*EASY, *required(keys), "--run", signed).code == 3
    (signed / "signature.json").write_text("{}")
    assert s2ap(*EASY, *required(keys), "--run", signed).code == 1


def relist(folder):
    """Make the manifest agree with the files that are there now."""
    text = (folder / "manifest.json").read_text()
    for record in json.loads(text)["stages"].values():
        for output in record["outputs"]:
            text = text.replace(output["sha256"], files.sha256(folder / output["path"]))
    content = json.loads(text)
    for record in content["stages"].values():
        record["inputs_sha256"] = manifest.digest(record["inputs"])
        for output in record["outputs"]:
            output["bytes"] = (folder / output["path"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(content))


def exchanged(folder, make_run, **changes):
    """Put another whole run, made with ``changes``, in place of the folder's files."""
    signature = (folder / "signature.json").read_bytes()
    other = make_run(name="other", **changes)
    shutil.rmtree(folder)
    shutil.move(other, folder)
    (folder / "signature.json").write_bytes(signature)


def another_file(folder, _make_run):
    """Put another exported file there, and let report and manifest name it."""
    model, report = folder / "export" / "model.onnx", folder / "export" / "report.json"
    before = files.sha256(model)
    model.write_bytes(b"y" * 1000)
    report.write_text(report.read_text().replace(before, files.sha256(model)))
    relist(folder)


@pytest.mark.parametrize("change", ["hint", "media type", "log", "second signature", "curve"])
def test_no_part_of_a_signature_can_change(change, signed, s2ap, keys, tmp_path) -> None:
    path, public = signed / "signature.json", tmp_path / "own.pub"
    public.write_bytes((keys / "own.pub").read_bytes())
    bundle = json.loads(path.read_text())
    if change == "hint":
        bundle["verificationMaterial"]["publicKey"]["hint"] = None
    elif change == "media type":
        bundle["mediaType"] = "application/json"
    elif change == "log":
        bundle["verificationMaterial"]["tlogEntries"] = None
    elif change == "second signature":
        bundle["dsseEnvelope"]["signatures"] *= 2
    else:  # an algorithm that no library knows, in the key
        lines = public.read_text().splitlines()
        content = bytearray(base64.b64decode("".join(lines[1:-1])))
        content[7] ^= 1
        public.write_text("\n".join([lines[0], base64.b64encode(content).decode(), lines[-1]]))
    path.write_text(json.dumps(bundle))
    done = s2ap(*EASY, "--public-key", public, "--run", signed)
    assert done.code == (2 if change == "curve" else 1), done.err


REWRITINGS = {
    "raised verdicts": lambda folder, make: exchanged(folder, make, pruned=900),
    "left-out samples": lambda folder, make: exchanged(folder, make, dense=890, pruned=890, n=900),
    "another eps": lambda folder, make: exchanged(
        folder, make, changes={"threat": EPS}, dense_changes={"threat": EPS}
    ),
    "a worse baseline": lambda folder, make: exchanged(folder, make, dense=800),
    "another run's file": another_file,
}


@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_a_consistent_rewriting_of_the_whole_folder_is_refused_when_signed(
    rewriting, signed, make_run, s2ap, keys, tmp_path
) -> None:
    REWRITINGS[rewriting](signed, make_run)
    copy = shutil.copytree(signed, tmp_path / "copy")
    assert s2ap(*EASY, "--run", copy).code == 0, "hashes cannot see it"
    done = s2ap(*EASY, *required(keys), "--run", signed)
    assert done.code == 1
    assert "signature: does not hold" in done.out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--require-signature"], "public-key-missing"),
        (["--require-signature", "--public-key", "nowhere.pub"], "file-not-read"),
        (["--require-signature", "--public-key", "own.pem"], "public-key-invalid"),
    ],
)
def test_options_that_cannot_be_used(options, code, signed, s2ap, keys) -> None:
    done = s2ap(*EASY, *options, "--run", signed, "--json", cwd=keys)
    assert (done.code, json.loads(done.out)["code"]) == (2, code)


@pytest.mark.parametrize(("key", "code"), [("own.pub", "signing-failed"), ("nowhere.pem", "file-not-read")])
def test_keys_that_cannot_sign(key, code, make_run, s2ap, keys) -> None:
    done = s2ap("sign", make_run(), "--private-key", keys / key, "--json")
    assert (done.code, json.loads(done.out)["code"]) == (2, code)


def test_a_link_is_not_signed(make_run, s2ap, keys) -> None:
    folder = make_run()
    (folder / "link").symlink_to("/etc/hostname")
    assert s2ap("sign", folder, "--private-key", keys / "own.pem").code == 2


def test_without_the_library_the_gate_says_what_to_install(make_run, keys) -> None:
    probe = (
        "import sys; sys.modules['model_signing'] = None; from s2ap_deploy.cli.main import run_cli; "
        "sys.exit(run_cli(sys.argv[1:]))"
    )
    arguments = map(str, [*EASY, *required(keys), "--run", make_run(), "--json"])
    done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert (done.returncode, found["code"]) == (2, "signing-not-installed")
    assert "model-signing" in found["hint"]
