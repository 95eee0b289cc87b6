import pytest
import torch

from lirefs.steering.operator_names import IDLE_AT_ZERO, OPERATORS
from lirefs.steering.operators import Operator

H = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
D = torch.randn(16, generator=torch.Generator().manual_seed(2))
V = D / D.norm()


def formula(name, h, a):
    """The operators written out, in float64."""
    h, d, v = h.double(), D.double(), V.double()
    along = (h @ v)[..., None]
    moved = h + a * d
    return {
        "add": moved,
        "ablate": h - along * v,
        "amplify": h + a * along * v,
        "clamp": h + (a - along) * v,
        "norm_preserving_add": moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1)[..., None],
        "ablate_then_add": h - along * v + a * d,
    }[name]


@pytest.mark.parametrize("a", [1.0, -0.7, 0.0])
@pytest.mark.parametrize("name", OPERATORS)
def test_formulas(name, a):
    found = Operator(name, D, a)(H)
    torch.testing.assert_close(found, formula(name, H, a).float(), atol=1e-5, rtol=1e-5)
    if a == 0 and name in IDLE_AT_ZERO:
        torch.testing.assert_close(found, H)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_strength_for_each_token(name):
    strengths = torch.tensor([[1.0, -0.5, 2.0], [0.0, 3.0, 1.0]])
    found = Operator(name, D, 1.0)(H, strengths.unsqueeze(-1))
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        expected = formula(name, H[row, column], strengths[row, column].item())
        torch.testing.assert_close(found[row, column], expected.float(), atol=1e-5, rtol=1e-5)


def test_what_the_words_promise():
    torch.testing.assert_close(Operator("clamp", D, 2.5)(H) @ V, torch.full((2, 3), 2.5))
    torch.testing.assert_close(
        Operator("ablate_then_add", D, 0.5)(H) @ V, (0.5 * D.norm()).expand(2, 3)
    )
    torch.testing.assert_close(
        Operator("norm_preserving_add", D, 4.0)(H).norm(dim=-1), H.norm(dim=-1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes_are_kept_and_rounded_once(name, dtype):
    found = Operator(name, D, 0.7)(H.to(dtype))
    assert found.dtype == dtype
    expected = formula(name, H.to(dtype), 0.7)
    torch.testing.assert_close(
        found, expected.to(dtype), atol=2 * torch.finfo(dtype).eps, rtol=1e-2
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_a_zero_direction_changes_nothing(name):
    torch.testing.assert_close(Operator(name, torch.zeros(16), 3.0)(H), H)
