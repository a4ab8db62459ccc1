"""TEACH    a pruned network by what it said before it was cut: the pull of distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_mi_prune.errors import PruningError

__all__ = ["logits_of", "pull"]


def pull(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Gradient of the distillation loss with respect to the student's logits.

    The loss is ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in nats, in the mean over
    rows, or over positions that are not padding (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: Logits ``(..., classes)``.
        teacher: Logits of the same shape.
        temperature: How far both are flattened.
        mask: Positions that count, of the shape of ``student`` without its last dimension.

    Example:
        >>> logits, said = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
        >>> log, wanted = (logits / 2).log_softmax(-1), (said / 2).softmax(-1)
        >>> loss = 4 * torch.nn.functional.kl_div(log, wanted, reduction="batchmean")
        >>> loss.backward()
        >>> torch.allclose(logits.grad, pull(logits.detach(), said, 2.0), atol=1e-6)
        True
    """
    t = temperature
    gap = (student.float() / t).softmax(-1) - (teacher.float() / t).softmax(-1)
    if mask is None or mask.shape != gap.shape[:-1]:
        return t * gap / max(1, gap[..., 0].numel())
    live = mask.to(gap).unsqueeze(-1)
    return t * gap * live / live.sum().clamp_min(1)


def logits_of(output: Any) -> dict[str, Tensor]:
    """Logits in what a network returns: the tensor itself, or every field that is named so.

    Raises:
        PruningError: If there are none, or they are of a single class.

    Example:
        >>> list(logits_of({"loss": torch.zeros(()), "logits": torch.zeros(2, 3)}))
        ['logits']
    """
    if isinstance(output, Tensor):
        found = {"output": output}
    else:
        fields = output.items() if isinstance(output, Mapping) else vars(output).items()
        found = dict(_named_logits(fields)) if hasattr(output, "__dict__") or fields else {}
    if not found or any(t.ndim < 2 or t.shape[-1] < 2 for t in found.values()):
        shapes = {name: tuple(t.shape) for name, t in found.items()}
        raise PruningError(
            f"{type(output).__name__} holds {shapes or 'no logits'}; expected logits of two "
            "classes or more, as a tensor or in a field named so. Name the network with module=."
        )
    return found


def _named_logits(fields: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in fields:
        if str(name).endswith("logits") and isinstance(value, Tensor):
            yield str(name), value
