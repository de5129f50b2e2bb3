"""The error tree: every class has one of the promised exit codes, and 1 belongs to verification alone."""

from __future__ import annotations

import inspect

import pytest

from s2ap_deploy import errors
from s2ap_deploy.errors import DeployError, VerificationError

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, DeployError) and found.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_keeps_message_and_hint_and_has_a_promised_code(kind: type[DeployError]) -> None:
    error = kind("what and where", hint="what to type next")
    assert (str(error), error.message, error.hint) == ("what and where",) * 2 + ("what to type next",)
    assert error.exit_code in {errors.FAILED, errors.UNUSABLE, errors.INCONCLUSIVE, errors.UNFORESEEN}
    assert kind("no hint").hint is None


def test_only_a_failed_verification_shares_its_code_with_a_failed_gate() -> None:
    assert [kind for kind in CLASSES if kind.exit_code == errors.FAILED] == [VerificationError]


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tree_in_the_docstring_is_the_tree(kind: type[DeployError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")
