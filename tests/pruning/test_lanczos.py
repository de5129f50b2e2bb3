"""The largest eigenvalue: against dense eigenvalues, for every signature of the matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import InputError, UsageError
from s2ap_deploy.pruning.curvature import lanczos


def symmetric(seed: int, spectrum: torch.Tensor) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    square = torch.randn(len(spectrum), len(spectrum), generator=noise, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    return (basis * spectrum) @ basis.T


def start(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(7), dtype=dtype)


spectra = st.lists(st.floats(-100, 100), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), spectrum=spectra, shift=st.sampled_from([0.0, -300.0, 300.0]))
def test_a_whole_krylov_space_finds_the_algebraic_largest(seed, spectrum, shift) -> None:
    """Also where every eigenvalue is negative, and where the largest in magnitude is the smallest."""
    spectrum = spectrum + shift
    matrix = symmetric(seed, spectrum)
    found = lanczos(lambda v: matrix @ v, start(len(spectrum)), 40)
    assert found.value == pytest.approx(float(spectrum.max()), rel=1e-6, abs=1e-6)
    assert found.residual < 1e-4
    assert found.iterations <= len(spectrum)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), iterations=st.integers(1, 15))
def test_a_small_space_gives_a_bound_and_an_honest_residual(seed, iterations) -> None:
    spectrum = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = symmetric(seed, spectrum)
    found = lanczos(lambda v: matrix @ v, start(60), iterations)
    assert found.value <= float(spectrum.max()) + 1e-9
    assert float((spectrum - found.value).abs().min()) <= found.residual + 1e-9
    assert found.iterations == iterations


def test_twenty_iterations_in_float32_are_enough_for_a_spectrum_with_an_edge() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 400), torch.tensor([5.0])]).double()
    matrix = symmetric(0, spectrum).float()
    found = lanczos(lambda v: matrix @ v, start(401, torch.float32), 20)
    assert found.value == pytest.approx(5.0, rel=1e-5)
    assert found.residual < 1e-3


def test_more_iterations_than_rounding_allows_bring_no_ghosts() -> None:
    """Without reorthogonalisation, 200 steps on this spectrum lose all orthogonality."""
    spectrum = torch.cat([torch.linspace(0, 1e-3, 299), torch.tensor([1e3])]).double()
    matrix = symmetric(1, spectrum).float()
    found = lanczos(lambda v: matrix @ v, start(300, torch.float32), 200)
    assert found.value == pytest.approx(1e3, rel=1e-5)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 0.0), (1.0, 1.0), (-3.0, -3.0), (1e-12, 1e-12)])
def test_multiples_of_the_identity_take_one_iteration(scale, expected) -> None:
    found = lanczos(lambda v: scale * v, start(9), 20)
    assert (found.value, found.iterations) == (pytest.approx(expected, rel=1e-12), 1)
    assert found.residual <= 1e-12


def test_the_operator_may_return_its_own_argument() -> None:
    assert lanczos(lambda v: v, start(5), 20).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("start", "iterations", "code"),
    [
        (torch.zeros(3), 5, "start-vector-invalid"),
        (torch.tensor([float("nan"), 1.0]), 5, "start-vector-invalid"),
        (torch.zeros(0), 5, "start-vector-invalid"),
        (torch.ones(3), 0, "iterations-too-few"),
    ],
)
def test_a_start_that_is_no_direction(start, iterations, code) -> None:
    with pytest.raises((InputError, UsageError), check=lambda error: error.code == code):
        lanczos(lambda v: v, start, iterations)
