"""What each token of a training example contributes to its score for a query, computed again from the checkpoints."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actors.context import named_parameters
from engine.batches import Batch
from engine.methods.contract import QueryState
from engine.projection import RowLayout, row_layout, unprojected_layout
from engine.token_scores import TokenLosses, back_projected, tangents, token_derivatives
from launch.collapse import read_records
from launch.online import Setting


@dataclass(frozen=True)
class TokenScores:
    """One example's tokens, in order, and what each contributes; the contributions add up to `score`."""

    id: int
    score: float  # the example's, from the gradients themselves: a stored one is rounded to the store's dtype
    tokens: list[str]
    scores: list[float]


def token_scores(setting: Setting, states: dict[str, QueryState], query: int, ids: list[int]) -> list[TokenScores]:
    """Return the examples' token scores for one query of the prepared states.

    Cost: about three forward passes for each example and checkpoint. ValueError for a task whose loss is no sum over
    tokens, a method whose score is no product of gradients, and an example that is not there or is erased.
    """
    losses = losses_by_token(setting)
    if setting.method.reads != "gradients":
        raise ValueError(f"method {setting.score.method} has no token scores: it compares {setting.method.reads}")
    for example in ids:
        setting.corpus.row(example)  # refuses one that is not there
    rows = read_records(setting.corpus, ids)
    totals: dict[int, Tensor] = {}
    for name, state in states.items():
        network = setting.context.model(setting.model, name)
        own = one_query(state, query)
        along = query_tangents(setting, network, own)
        for example in dict.fromkeys(ids):
            batch = setting.task.collate([rows[example]]).to(setting.context.device)
            part = token_derivatives(losses, network, batch, along)[0].cpu() * factor(setting, name, own, batch)
            totals[example] = totals.get(example, 0.0) + part
    return [
        TokenScores(i, float(totals[i].sum()), pieces(setting.task, rows[i]["input_ids"]), totals[i].tolist())
        for i in ids
    ]


def losses_by_token(setting: Setting) -> TokenLosses:
    """Return the task's loss by token. Raises ValueError for a task without one."""
    losses = getattr(setting.task, "token_losses", None)
    if losses is None:
        raise ValueError(
            f"task {setting.model.task} has no token scores: its loss is one number an example, not a sum over tokens. "
            f"causal-lm and masked-lm have them, and a task of your own with `token_losses`, [B, T], and a `tokenizer`."
        )
    return losses


def one_query(state: QueryState, query: int) -> QueryState:
    """Return the state of one query alone."""
    arrays = {name: array[query : query + 1] for name, array in state.arrays.items()}
    norms = None if state.norms is None else state.norms[query : query + 1]
    return replace(state, arrays=arrays, norms=norms, losses=state.losses[query : query + 1])


def query_tangents(setting: Setting, network: nn.Module, state: QueryState) -> dict[str, Tensor]:
    """Return the direction in the weights along which a loss changes as its gradient row's product with the query's."""
    parameters, spec = named_parameters(network, setting.gradients.parameters), setting.gradients.projection
    whole = spec.kind == "none"
    layout: RowLayout = unprojected_layout(parameters) if whole else row_layout(parameters, spec)
    row = {name: array[0] for name, array in state.arrays.items()}
    like = next(network.parameters())
    return tangents(network, parameters, back_projected(row, layout, parameters, spec, like))


def factor(setting: Setting, checkpoint: str, state: QueryState, batch: Batch) -> float:
    """Return what the method multiplies the product of the two gradients with: a weight, or one over their norms."""
    norms = None
    if setting.method.needs_norms:
        form = "rows" if setting.score.stored or setting.gradients.projection.kind != "none" else "whole"
        hooks = setting.context.gradients(setting.model, checkpoint, setting.gradients, form)
        norms = hooks(setting.task.loss, batch).norms
    scale = torch.as_tensor(setting.method.scale(norms, state), dtype=torch.float64) * setting.method.scale(
        state.norms, state
    )
    return float(scale)


def pieces(task: Any, tokens: list[int]) -> list[str]:
    """Return the text of every token, such that joined they are the example's text."""
    found, before = [], ""
    for position, token in enumerate(tokens):
        window = [int(t) for t in tokens[max(0, position - 1) : position]]
        before = task.tokenizer.decode(window, clean_up_tokenization_spaces=False)
        both = task.tokenizer.decode([*window, int(token)], clean_up_tokenization_spaces=False)
        found.append(both.removeprefix(before))
    return found
