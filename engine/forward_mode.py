"""Forward-mode derivatives of losses by a model's weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.batches import Batch

Named = dict[str, Tensor]


class LossModule(nn.Module):
    """A loss as a module, so that functional_call can put other weights into the model it calls."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


def along(function: Callable[[Named], Tensor], point: Named, direction: Named, what: str) -> tuple[Tensor, Tensor]:
    """Return the function's value and its derivative along the direction. Cost: about three forward passes.

    Attention runs unfused: fused kernels have no forward-mode derivative. Raises ValueError, beginning with `what`, for a
    model with another operation that has none; what the model itself raises passes as it is.
    """
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            value, derivative = jvp(function, (point,), (direction,))[:2]
            return value, derivative
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        lacking = str(error).splitlines()[0]
        raise ValueError(f"{what}: torch has no forward-mode derivative of it ({lacking})") from error
