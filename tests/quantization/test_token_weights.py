"""What massive tokens count in the statistics of MLPs, and what other texts' correlations hold."""

import pytest
import torch

from dsquant.jobs.ranks import ALONE
from dsquant.model.activations import Activations
from dsquant.presets import Step
from dsquant.quantization.compensate import SHRINKAGE, damping_of, regularized
from dsquant.quantization.mlp_inputs import MlpInputs, mean_squares, token_weights
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid


def _weights_of(hidden_NTH: torch.Tensor) -> torch.Tensor:
    return token_weights([mean_squares(batch_NTH) for batch_NTH in hidden_NTH.split(1)], ALONE, torch.device("cpu"))


def test_a_token_weighs_as_the_root_of_one_over_its_hidden_states_rms() -> None:
    hidden_NTH = torch.ones(2, 3, 8) * torch.tensor([1.0, 1.0, 16.0, 1.0, 1.0, 0.0]).view(2, 3, 1)
    weights_R = _weights_of(hidden_NTH)
    assert weights_R[0] / weights_R[2] == pytest.approx(4)
    assert weights_R.square().mean() == pytest.approx(1)
    assert weights_R.isfinite().all()  # of a token that is zero too


def _inputs_with_massive_tokens() -> tuple[MlpInputs, torch.Tensor]:
    """4 of 2000 tokens are 300 times as large as the others, in one direction; their hidden states are, too."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(128, 128, generator=generator) / 128**0.5
    inputs_RH = torch.randn(2000, 128, generator=generator) @ mixing
    massive_R = torch.arange(2000) % 500 == 7
    inputs_RH[massive_R] = 300 * torch.randn(128, generator=generator)
    weights_R = _weights_of(torch.where(massive_R, 300.0, 1.0).view(4, 500, 1).expand(-1, -1, 8))
    return MlpInputs(Activations(inputs_RH.unsqueeze(0)), torch.arange(2000)).weighted(weights_R), massive_R


@pytest.mark.parametrize("steps", [("compensate",), ("clip", "compensate", "descend")], ids="-".join)
def test_massive_tokens_do_not_decide_alone(steps: tuple[Step, ...]) -> None:
    weighted, massive_R = _inputs_with_massive_tokens()
    alike = MlpInputs(weighted.activations, weighted.rows_R)
    weight_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))

    def error_of_others(inputs: MlpInputs) -> float:
        change_OI = rounded_weight(weight_OI, Grid(3, 64, True), inputs.moments(seed=0), steps).difference(weight_OI)
        squares_R = (inputs.activations.samples(0, 1)[0] @ change_OI.T).square().sum(1)
        return float(squares_R[~massive_R].sum())

    assert error_of_others(weighted) < 0.8 * error_of_others(alike)


def test_an_error_counts_as_its_token_does() -> None:
    weighted, massive_R = _inputs_with_massive_tokens()
    outputs_RH = torch.ones(len(weighted.few()), 4)
    few_R = weighted.rows_R[:: 2000 // 500]
    assert weighted.weights_R is not None
    assert weighted.energy_of_few(outputs_RH) == pytest.approx(4 * float(weighted.weights_R[few_R].square().sum()))
    assert massive_R[few_R].any() == (weighted.weights_R[few_R] < 0.5).any()


def test_correlations_are_lowered_and_the_diagonal_is_damped() -> None:
    inputs_RI = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    gram_II = inputs_RI.T @ inputs_RI / 64
    before_II, off = gram_II.clone(), ~torch.eye(16, dtype=torch.bool)
    found_II = regularized(gram_II, 64)
    torch.testing.assert_close(found_II[off], (1 - SHRINKAGE) * before_II[off])
    raised_I = before_II.diagonal() + damping_of(16, 64) * before_II.diagonal().mean()
    torch.testing.assert_close(found_II.diagonal(), raised_I)
    assert torch.equal(gram_II, before_II)
