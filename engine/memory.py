"""How many padded tokens a batch may hold: a constant on a CPU, what a GPU's memory allows.

On a CPU larger batches only leave the cache: 1,024 tokens were the fastest of 512 to 4,096 on both models of the
benchmark `collect`. A GPU wants as many as it holds.
"""

from collections.abc import Callable

import torch

CPU_TOKENS = 1024
_FIRST, _MOST = 1024, 1 << 17
_SHARE = 0.6  # of the free memory; the rest is for fragments, other budgets' shapes and the rows on their way out


def token_budget(device: torch.device, run: Callable[[int], object]) -> int:
    """Return the token budget for a device; `run` computes one batch of about so many padded tokens."""
    if device.type != "cuda":
        return CPU_TOKENS
    run(_FIRST)  # what is made once (workspaces, kernels) is no part of a batch
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    held = torch.cuda.memory_allocated(device)

    def peak(budget: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        run(budget)
        return torch.cuda.max_memory_allocated(device) - held

    return largest_budget(peak, free - held)


def largest_budget(peak: Callable[[int], int], free: int) -> int:
    """Return the largest power of two whose batch is expected within the share of `free` bytes.

    `peak(budget)` gives the bytes that a batch takes. They grow linearly with the budget, so two sizes tell.
    """
    one, two = peak(_FIRST), peak(2 * _FIRST)
    each = max(1.0, (two - one) / _FIRST)
    fitting = _FIRST + (_SHARE * free - one) / each
    return min(_MOST, 1 << (int(max(1.0, fitting)).bit_length() - 1))
