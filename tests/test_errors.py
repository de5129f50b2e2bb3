"""The error tree: every class has a promised exit code, and its words are read where a user meets it."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import s2ap_deploy
from s2ap_deploy import errors
from s2ap_deploy.cli import main
from s2ap_deploy.errors import DeployError, VerificationError
from s2ap_deploy.evaluation.workers.worker import RemoteError
from s2ap_deploy.models.architectures.registry import build
from s2ap_deploy.recipe import catalog
from s2ap_deploy.recipe.schema import Recipe
from s2ap_deploy.runs.folder import Run


def below(kind: type[DeployError]) -> set[type[DeployError]]:
    """A class and everything that inherits from it."""
    return {kind}.union(*(below(each) for each in kind.__subclasses__()))


CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, DeployError) and found.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_keeps_message_and_hint_and_has_a_promised_code(kind) -> None:
    error = kind("what and where", hint="what to type next")
    assert (str(error), error.message, error.hint) == ("what and where",) * 2 + ("what to type next",)
    assert error.exit_code in {errors.FAILED, errors.UNUSABLE, errors.INCONCLUSIVE, errors.UNFORESEEN}
    assert kind("no hint").hint is None


def test_only_a_failed_verification_shares_its_code_with_a_failed_gate() -> None:
    assert [kind for kind in CLASSES if kind.exit_code == errors.FAILED] == [VerificationError]


def drawn() -> dict[str, tuple[int, int | None]]:
    """Depth and exit code of every class in the tree that ``errors`` draws."""
    rows = re.findall(r"^    ([│├└─ ]*)(\w+Error) +(\d+)?", errors.__doc__ or "", re.M)
    return {name: (len(branch) // 4, int(code) if code else None) for branch, name, code in rows}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_in_the_docstring_is_the_tree(kind) -> None:
    depth, code = drawn()[kind.__name__]
    assert depth == kind.__mro__.index(DeployError)
    assert code in (kind.exit_code, None)
    assert code is not None or kind.exit_code == kind.__mro__[1].exit_code  # type: ignore[attr-defined]


class Met(NamedTuple):
    """What a user did, in a folder of his own, and what he was told: "..." stands for anything."""

    done: Callable[[Path], object]
    message: str
    hint: str | None


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def empty_run(folder: Path) -> Path:
    with Run.open(folder / "run", create=True, command="test"):
        return folder / "run"


def broken_plugin(folder: Path) -> Recipe:
    """A distribution whose method cannot be imported, and a recipe that names it."""
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[s2ap_deploy.methods]\nacme-method = no_such_module:FOUND\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return catalog.load("demo", overrides=["prune.method=acme-method"])


def too_large(folder: Path) -> object:
    """An export that may take ten bytes, of a network that nobody trained."""
    run = folder / "run"
    network = build("digits-conv")
    s2ap_deploy.certify(run, model=network, arch="digits-conv", data="digits", eps="0.5", n=1, threads=1)
    return s2ap_deploy.export(run, settings={"export.max_bytes": 10}, threads=1)


def hurried(folder: Path) -> object:
    said = {"arch": "digits-conv", "data": "digits", "eps": "0.5", "threads": 1}
    return s2ap_deploy.certify(
        folder / "run", model=build("digits-conv"), n=40, time_budget=0.0, workers=1, **said
    )


MET: dict[type[DeployError], Met] = {
    errors.DeployError: Met(
        lambda folder: RemoteError(ZeroDivisionError("by nothing")).raise_again(),
        "an attack worker failed with ZeroDivisionError: by nothing",
        None,
    ),
    errors.InputError: Met(
        lambda folder: s2ap_deploy.verify(written(folder / "c.json", "{}"), run=empty_run(folder)),
        "FOLDER/c.json is not an s2ap-deploy attack certificate",
        "certify again: s2ap-deploy certify",
    ),
    errors.UsageError: Met(
        lambda folder: s2ap_deploy.prune(nn.Flatten(), 0.5, run=folder / "run", data="digits"),
        "a network in memory does not record its threat model",
        "add --eps (eps=): 8/255, for example, for CIFAR-10 in Linf",
    ),
    errors.CheckpointError: Met(
        lambda folder: s2ap_deploy.load_checkpoint(folder / "absent.pt"),
        "there is no checkpoint FOLDER/absent.pt",
        None,
    ),
    errors.UnsafePickleError: Met(
        lambda folder: s2ap_deploy.load_checkpoint(saved(folder / "whole.pt", nn.Linear(2, 2))),
        "FOLDER/whole.pt asks to import and run more than tensors: ...torch.nn.modules.linear.Linear",
        "it is a whole pickled module; save its weights: torch.save(model.state_dict(), 'model.pt'), or, if "
        "you trust where the file comes from, add --trust-pickle",
    ),
    errors.ArchitectureError: Met(
        lambda folder: s2ap_deploy.load_checkpoint(saved(folder / "odd.pt", {"odd": torch.zeros(3)})),
        "no registered architecture fits the 1 tensors of this checkpoint",
        "give it as --arch NAME, --arch package.module:factory or --arch file.py:factory",
    ),
    errors.DataError: Met(
        lambda folder: s2ap_deploy.pretrain("mnist-conv", "mnist", "0.1", run=folder / "r", data_root=folder),
        "mnist was not found under FOLDER",
        "give its folder with --data-root (or ...), or add --download",
    ),
    errors.RecipeError: Met(
        lambda folder: catalog.load("demo", overrides=["prune.gama=1"]),
        "--set prune.gama=1: unknown key prune.gama; did you mean prune.gamma?",
        None,
    ),
    errors.PluginError: Met(
        broken_plugin,
        "the base method 'acme-method' of acme 1.0 (no_such_module:FOUND) fails while it is imported: "
        "ModuleNotFoundError: No module named 'no_such_module'",
        "report it to the maintainers of acme, or uninstall it",
    ),
    errors.RunFolderError: Met(
        lambda folder: s2ap_deploy.export(folder / "empty"),
        "there is no run in FOLDER/empty",
        "start one with s2ap-deploy prune or s2ap-deploy run, or choose a folder with --run",
    ),
    errors.StorageError: Met(
        lambda folder: s2ap_deploy.report(empty_run(folder), output=written(folder / "file", "") / "pages"),
        "cannot create FOLDER/file/pages: Not a directory",
        "name another output",
    ),
    errors.VerificationError: Met(
        too_large,
        "...: at most 10 allowed, found ...",
        "the file was removed; s2ap-deploy plan shows what would fit, --overwrite exports again",
    ),
    errors.InconclusiveError: Met(
        lambda folder: s2ap_deploy.gate(empty_run(folder), min_robust=0.4),
        "FOLDER/run holds no certificate, so there is nothing to judge",
        "run s2ap-deploy certify --run FOLDER/run first",
    ),
    errors.OutOfTimeError: Met(
        hurried,
        "the time budget ran out while attacking the dense network: of 40 images 0 survived, "
        "... are undecided",
        "run the same command with --resume and more --time-budget",
    ),
}


def test_no_class_is_forgotten() -> None:
    """Also one that another module may define: its words belong into the table above."""
    for module in pkgutil.walk_packages(s2ap_deploy.__path__, "s2ap_deploy."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {each for each in below(DeployError) if each.__module__.startswith("s2ap_deploy.")}
    assert ours == set(MET)
    assert set(CLASSES) <= ours


def fits(pattern: str | None, words: str | None, folder: Path) -> bool:
    if pattern is None or words is None:
        return pattern is words
    parts = pattern.replace("FOLDER", str(folder)).split("...")
    return re.fullmatch(".*".join(map(re.escape, parts)), words) is not None


@pytest.mark.parametrize("kind", MET, ids=lambda kind: kind.__name__)
def test_the_words_of_every_class_where_a_user_meets_it(kind, tmp_path, monkeypatch, s2ap) -> None:
    met = MET[kind]
    with pytest.raises(kind) as caught:
        met.done(tmp_path)
    error = caught.value
    assert type(error) is kind
    assert fits(met.message, error.message, tmp_path), error.message
    assert fits(met.hint, error.hint, tmp_path), error.hint

    def raises(*_arguments: Any, **_options: Any) -> None:
        raise error

    # The same words leave the command line, with the code that the class promises.
    monkeypatch.setattr(main.cli, "main", raises)
    done = s2ap("doctor", "--json")
    hint = [] if error.hint is None else [f"  hint: {error.hint}"]
    assert done.err.splitlines() == [f"error: {error.message}", *hint]
    answer = {"error": error.message, "code": error.code, "hint": error.hint, "exit_code": kind.exit_code}
    assert json.loads(done.out) == answer
    assert done.code == kind.exit_code
