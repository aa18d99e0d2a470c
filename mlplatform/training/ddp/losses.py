"""What the networks are trained on and judged by.

Belongs here: losses of tensors, metrics of arrays. Does not belong here: the training loop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlplatform.training.trainers.base import Floats


def row_losses(out: Tensor, label: Tensor, quantiles: Sequence[float], unit: float) -> Tensor:
    """(n,): the log loss of log-odds (n, 1), or the pinball loss of quantiles (n, levels), mean over the levels, in `unit`s.

    Pinball: R. Koenker and G. Bassett, "Regression Quantiles", Econometrica 46 (1978).
    """
    if not quantiles:
        return functional.binary_cross_entropy_with_logits(out.squeeze(1), label, reduction="none")
    levels = torch.tensor(quantiles, dtype=out.dtype, device=out.device)
    error = (label.unsqueeze(1) - out) / unit
    return torch.maximum(levels * error, (levels - 1) * error).mean(dim=1)


def measure(metric: str, answers: Floats, label: Floats, quantiles: Sequence[float]) -> float:
    """The metric of answers as `Fitted.predict` gives them: log_loss, auc, or pinball (mean over rows and levels)."""
    if metric == "pinball":
        levels = np.asarray(quantiles)
        error = label[:, None] - answers
        return float(np.maximum(levels * error, (levels - 1) * error).mean())
    if metric == "log_loss":
        kept = np.clip(answers, np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
        return float(-np.where(label == 1, np.log(kept), np.log1p(-kept)).mean())
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(label, answers))
