"""What preference objectives make of log-probabilities: a loss for each example, and what is logged of it.

Legend: P pairs, E single answers. Losses are float32 and differentiable; what is logged has no gradient.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Measured = dict[str, Tensor]  # by name, a value of each example that has one


def dpo_losses(logps: Tensor, reference: Tensor, *, beta: float, smoothing: float) -> tuple[Tensor, Measured]:
    """Direct preference optimization (Rafailov et al. 2023): losses [P] of log-probabilities [P, 2], chosen first.

    smoothing: the probability that a pair is the wrong way round ("conservative" DPO).
    """
    ratios = logps - reference
    delta = beta * (ratios[:, 0] - ratios[:, 1])
    losses = -(1 - smoothing) * logsigmoid(delta) - smoothing * logsigmoid(-delta)
    return losses, _measure_pairs(beta * ratios.detach(), logps.detach())


def orpo_losses(means: Tensor, *, beta: float) -> tuple[Tensor, Measured]:
    """The odds ratio's part of ORPO (Hong et al. 2024): losses [P] of mean log-probabilities a token [P, 2]."""
    chosen, rejected = means.clamp(max=-torch.finfo(means.dtype).eps).unbind(dim=1)
    log_odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
    ratios = logsigmoid(log_odds)
    measured = _measure_pairs(beta * means.detach(), means.detach())
    return -beta * ratios, {**measured, "log_odds_ratio": ratios.detach(), "log_odds_chosen": log_odds.detach()}


def kto_losses(
    logps: Tensor,
    reference: Tensor,
    is_good: Tensor,
    *,
    beta: float,
    moved: float,
    weights: tuple[float, float],
) -> tuple[Tensor, Measured]:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): losses [E] of log-probabilities [E].

    moved: how far the model is from its reference, 0 or more: the mean log-ratio of mismatched answers.
    weights: of good answers, and of bad ones.
    """
    ratios = logps - reference
    signs = torch.where(is_good, 1.0, -1.0)
    losses = torch.where(is_good, *weights) * (1 - torch.sigmoid(beta * signs * (ratios - moved)))
    rewards, own = beta * ratios.detach(), logps.detach()
    return losses, {
        "rewards/chosen": rewards[is_good],
        "rewards/rejected": rewards[~is_good],
        "logps/chosen": own[is_good],
        "logps/rejected": own[~is_good],
    }


def _measure_pairs(rewards: Tensor, logps: Tensor) -> Measured:
    chosen, rejected = rewards.unbind(dim=1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }


def _log_of_rest(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) of x below 0, without cancellation: by one formula near 0 and by another far from it."""
    is_near = logs > -0.6931  # near log 2 both are exact
    near = torch.log(-torch.expm1(torch.where(is_near, logs, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -1.0, logs)))
    return torch.where(is_near, near, far)
