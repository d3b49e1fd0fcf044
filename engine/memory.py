"""How many padded tokens a batch may hold: a constant on a CPU, what a GPU's memory allows.

On a CPU larger batches only leave the cache: 1,024 tokens were the fastest of 512 to 4,096 on both models of the
benchmark `collect`; fewer where a token's activations are large, as an image's are. A GPU wants as many as it holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # knows transformers' outputs

CPU_TOKENS = 1024
_CPU_BYTES = 2 << 30  # of a batch's activations
_BYTES_A_NUMBER = 12  # float32: the output, its gradient, and what is made in between
_FIRST, _MOST = 1024, 1 << 17
_SHARE = 0.6  # of the free memory; the rest is for fragments, other budgets' shapes and the rows on their way out


def token_budget(
    device: torch.device,
    run: Callable[[int], object],  # computes one batch of about so many padded tokens
    numbers: int,  # that the model's modules put out for one token
) -> int:
    """Return the token budget for a device."""
    if device.type != "cuda":
        return min(CPU_TOKENS, power_below(_CPU_BYTES // (_BYTES_A_NUMBER * max(1, numbers))))
    run(_FIRST)  # what is made once (workspaces, kernels) is no part of a batch
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    held = torch.cuda.memory_allocated(device)

    def peak(budget: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        run(budget)
        return torch.cuda.max_memory_allocated(device) - held

    return largest_budget(peak, free - held)


def numbers_put_out(model: nn.Module, call: Callable[[], object]) -> int:
    """Return how many numbers the model's innermost modules put out in a forward pass."""
    found = 0

    def count(_: nn.Module, __: tuple, output: object) -> None:
        nonlocal found
        found += sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def power_below(number: float) -> int:
    """Return the largest power of two that is not above the number, at least 1."""
    return 1 << (int(max(1.0, number)).bit_length() - 1)


def largest_budget(peak: Callable[[int], int], free: int) -> int:
    """Return the largest power of two whose batch is expected within the share of `free` bytes.

    `peak(budget)` gives the bytes that a batch takes. They grow linearly with the budget, so two sizes tell.
    """
    one, two = peak(_FIRST), peak(2 * _FIRST)
    each = max(1.0, (two - one) / _FIRST)
    fitting = _FIRST + (_SHARE * free - one) / each
    return min(_MOST, power_below(fitting))
