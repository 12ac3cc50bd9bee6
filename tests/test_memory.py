"""The memory of a training step, counted by hand and for the unfolding networks."""

import pytest
import torch

from fusionkit.memory import peak_bytes, saved_bytes
from fusionkit.models.frufn import EFRUFN, FRUFN

SMALL = {"width": 8, "heads": 2}
COUNTS = (1, 5, 10, 20)


def test_what_a_product_keeps():
    """x·y keeps x and y; the exponential keeps its result; a view costs nothing more."""
    x, y = (torch.rand(100, requires_grad=True) for _ in "xy")
    assert saved_bytes(lambda: x * y) == 2 * 400
    assert saved_bytes(lambda: (x * y).exp()) == 3 * 400
    assert saved_bytes(lambda: x * x.view(10, 10).flatten()) == 400
    assert saved_bytes(lambda: x + y) == 0


def memory(network: torch.nn.Module) -> int:
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 1, 16, 16)
    return saved_bytes(lambda: network(a, b))


@pytest.mark.filterwarnings("ignore::fusionkit.models.fixed_point.FixedPointWarning")
@pytest.mark.parametrize("solver", ["plain", "anderson", "broyden"])
def test_an_equilibrium_needs_the_same_memory_at_any_number_of_iterations(solver):
    options = {"solver": solver, "tolerance": 0.0, **SMALL}
    found = [memory(EFRUFN(max_evaluations=n, **options)) for n in COUNTS]
    assert max(found) <= 1.05 * min(found)


def test_unfolding_needs_memory_in_proportion_to_its_units():
    found = [memory(FRUFN(units=n, **SMALL)) for n in COUNTS]
    unit = (found[1] - found[0]) / 4
    assert unit > 0.5 * found[0]
    for n, bytes_ in zip(COUNTS, found, strict=True):
        assert bytes_ == pytest.approx(found[0] + (n - 1) * unit, rel=0.05)


def test_the_peak_is_what_exists_at_one_time():
    x = torch.rand(100)
    assert peak_bytes(lambda: x + 1) == 400
    assert peak_bytes(lambda: (x + 1).view(10, 10).T[0]) == 400
    assert peak_bytes(lambda: ((x + 1) * 2).exp() * 3) == 2 * 400  # each is freed after its use
    assert peak_bytes(lambda: (x + 1).exp_().mul_(3)) == 400
    kept = []
    assert peak_bytes(lambda: [kept.append(x * i) for i in range(5)]) == 5 * 400


def test_the_peak_sees_the_backward_pass():
    x = torch.rand(100, requires_grad=True)

    def backward(depth: int) -> torch.Tensor:
        y = x
        for _ in range(depth):
            y = y.exp()
        return torch.autograd.grad(y.sum(), x)[0]

    few, many = (peak_bytes(lambda n=n: backward(n)) for n in (3, 10))
    assert many - few == 7 * 400  # every exponential is kept
    assert few >= 4 * 400
