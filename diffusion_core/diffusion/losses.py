"""Training objectives, one number for each image."""

from __future__ import annotations

from torch import Tensor


def simple_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image (Ho et al. 2020, eq. 14, averaged over elements).

    Args:
        output, target: (N, ...), any floating dtype; compared in float32 (float64 stays).

    Returns:
        (N,) float32 (float64 if the target is).
    """
    wide = target if target.dtype.itemsize >= 4 else target.float()
    return (output.to(wide.dtype) - wide).square().flatten(1).mean(dim=1)
