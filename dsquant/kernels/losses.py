"""The output error that a weight difference causes, by the Gram matrix of the inputs.

Shape legend: O out features, I in features.
"""

import torch


def gram_losses(difference_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    """Returns each row's dw H dw^T, the row sums of (dW H) * dW with H symmetric: float32 [O], at least 0."""
    if difference_OI.is_cuda:
        from dsquant.kernels import losses_triton

        return losses_triton.gram_losses(difference_OI, gram_II)
    return gram_losses_reference(difference_OI, gram_II)


def gram_losses_reference(difference_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    """`gram_losses` in PyTorch, on any device."""
    return (difference_OI @ gram_II).mul_(difference_OI).sum(1).clamp_(min=0)
