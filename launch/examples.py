"""Small torch modules that configs refer to by dotted path."""

from torch import Tensor, nn


def digits() -> nn.Module:
    """Return a classifier of 28 × 28 grey images into ten classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class TanhCnn(nn.Module):
    """Two convolutions and a linear layer on 28 × 28 grey images: smooth, so that it can be trained to a minimum."""

    def __init__(self, classes: int, first: int = 4, second: int = 8, kernels: tuple[int, int] = (5, 4)) -> None:
        super().__init__()
        convolutions = nn.Conv2d(1, first, kernels[0], stride=3), nn.Conv2d(first, second, kernels[1], stride=2)
        self.embed = nn.Sequential(convolutions[0], nn.Tanh(), convolutions[1], nn.Tanh(), nn.Flatten())
        side = ((28 - kernels[0]) // 3 + 1 - kernels[1]) // 2 + 1
        self.head = nn.Linear(second * side**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def first_digits() -> nn.Module:
    """Return a classifier of the digits 0 to 3; its `embed` is the one of `other_digits`."""
    return TanhCnn(4)


def other_digits() -> nn.Module:
    """Return a classifier of the digits 4 to 9."""
    return TanhCnn(6)
