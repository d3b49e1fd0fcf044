"""MiniLM fine-tuned on movie reviews as FastIF's subject, and the inverse of its Gauss-Newton matrix without an estimate.

With two classes the loss depends on an example through one number, the margin m = logit₁ − logit₀, whose second derivative
is p(1 − p). The Gauss-Newton matrix of n rows is therefore AᵀA/n, with rows √(p(1 − p)) ∇m, and of rank n, not of the size
of the weights (Woodbury):

    (AᵀA/n + λI)⁻¹ v  =  (v − Aᵀ (nλI + AAᵀ)⁻¹ A v) / λ

What training left, and the Gram matrix AAᵀ, are kept in runs/cache.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates
from engine.counters import derive_key, permutation
from engine.curvature import Curvature, Examples, LocalOperator
from engine.gradients import PerExampleGradients
from engine.parameters import Parameter, select_parameters
from engine.projectors import Dense, Whole
from launch.experiments.kept import kept
from launch.experiments.passes import states_of
from launch.experiments.subjects import Part, Subject, logits, logits_of, loss, reviews, top_layers

GRAM_COLUMNS = 600_000  # of A held at a time
_STEP = 4096  # of them in one float64 product
_ROWS = 16  # whole gradients held at a time


@dataclass(frozen=True)
class MiniLM:
    """The trained classifier and its data; all weights that its top layers hold are looked at."""

    subject: Subject
    model: nn.Module
    coordinates: Coordinates

    @property
    def train(self) -> Part:
        return self.subject.parts["train"]


@lru_cache(maxsize=1)
def _trained(config: str) -> MiniLM:
    settings = json.loads(config)
    parts = parts_of({name: value for name, value in settings.items() if name != "train"})
    subject = Subject(parts, partial(top_layers, settings["base"], settings["top_layers"], 2), 2)

    def fit() -> dict[str, Tensor]:
        return states_of(subject, parts["train"], settings["train"], derive_key(0, "fastif") % 2**31)[-1]

    model = subject.load(kept("minilm", settings, fit))
    return MiniLM(subject, model, chosen_coordinates(model, ["*"]))


def parts_of(settings: dict[str, Any]) -> dict[str, Part]:
    """Return the reviews as the output of the frozen lower layers, which is kept."""

    def make() -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, part in reviews(settings).parts.items():
            out |= {f"{name}.states": torch.cat(list(part.inputs)), f"{name}.labels": part.labels}
            out |= {f"{name}.lengths": torch.from_numpy(part.lengths)}
        return out

    found = kept("states", settings, make)
    return {
        name: Part(list(found[f"{name}.states"].split(found[f"{name}.lengths"].tolist())), found[f"{name}.labels"])
        for name in settings["rows"]
    }


def trained(config: dict[str, Any]) -> MiniLM:
    """Return the subject of an experiment's `minilm` section, trained once per process and kept."""
    return _trained(json.dumps(config, sort_keys=True))


def margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return √(p(1 − p)) m [B], the factor held fixed: its gradient is a row of A."""
    out = logits(model, batch)
    m = out[:, 1] - out[:, 0]
    p = torch.sigmoid(m.detach())
    return (p * (1 - p)).sqrt() * m


@dataclass(frozen=True)
class Reference:
    """The exact inverse of the damped Gauss-Newton matrix of some rows."""

    model: nn.Module
    coordinates: Coordinates
    rows: Part
    gram: Tensor  # AAᵀ, float64 [n, n]

    @property
    def largest(self) -> float:
        """Return λ_max of AᵀA/n."""
        return float(torch.linalg.eigvalsh(self.gram)[-1]) / len(self.gram)

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return (AᵀA/n + λI)⁻¹ b for a block (size, k) float64."""
        n = len(self.gram)
        inner = self.gram + n * damping * torch.eye(n, dtype=torch.float64)
        weights = torch.cholesky_solve(self.times(b), torch.linalg.cholesky(inner))
        return (b - self.transposed_times(weights)) / damping

    def times(self, b: Tensor) -> Tensor:
        """Return A b, (n, k) float64."""
        return products(self.model, margin, self.rows, self.coordinates.split(b))

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return Aᵀ × weights (n, k), (size, k) float64."""
        total: dict[str, Tensor] = {}
        for ids, arrays in whole_gradients(self.model, margin, self.rows, select_parameters(self.model, ["*"])):
            for name, array in arrays.items():
                part = weights[ids].T @ array.double()
                total[name] = total[name] + part if name in total else part
        return self.coordinates.join(total)


def reference(config: dict[str, Any], count: int) -> Reference:
    """Return the exact inverse of `count` randomly chosen training rows of a `minilm` section's model."""
    return _reference(json.dumps(config, sort_keys=True), count)


@lru_cache(maxsize=1)
def _reference(config: str, count: int) -> Reference:
    settings, subject = json.loads(config), _trained(config)
    chosen = torch.from_numpy(permutation(derive_key(0, "curvature"), len(subject.train.labels))[:count].copy())
    rows = subject.train.take(chosen)
    found = kept("gram", settings | {"rows of the curvature": count}, lambda: {"gram": gram(subject.model, rows)})
    return Reference(subject.model, subject.coordinates, rows, found["gram"])


def gram(model: nn.Module, rows: Part, columns: int = GRAM_COLUMNS) -> Tensor:
    """Return AAᵀ, float64 [n, n], summed module by module; at most `columns` of A (float32) are held at a time."""
    total = np.zeros((len(rows.labels),) * 2, order="F")
    parameters = select_parameters(model, ["*"])
    for begin in range(0, sum(p.size for p in parameters), columns):
        held = held_columns(model, rows, parameters, begin, begin + columns)
        for part in held.split(_STEP, dim=1):
            total = dsyrk(1.0, np.asfortranarray(part.double().numpy()), beta=1.0, c=total, overwrite_c=1)
    upper = torch.from_numpy(np.ascontiguousarray(np.triu(total)))  # all that dsyrk writes
    return upper + upper.triu(1).T


def held_columns(model: nn.Module, rows: Part, parameters: list[Parameter], begin: int, stop: int) -> Tensor:
    """Return columns begin … stop of A, whose parameters stand side by side, float32 [n, stop − begin] or fewer."""
    stops = np.cumsum([p.size for p in parameters])
    starts = stops - [p.size for p in parameters]
    inside = [i for i in range(len(parameters)) if starts[i] < stop and stops[i] > begin]
    first = int(starts[inside[0]])
    chosen = [parameters[i] for i in inside]
    held = torch.empty(len(rows.labels), min(stop, int(stops[-1])) - begin, dtype=next(model.parameters()).dtype)
    for ids, arrays in whole_gradients(model, margin, rows, chosen):
        held[ids] = torch.cat([arrays[p.name] for p in chosen], 1)[:, begin - first : stop - first]
    return held


def whole_gradients(
    model: nn.Module, function: Callable[[nn.Module, Batch], Tensor], part: Part, parameters: list[Parameter]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield positions in the part and name -> [B, O·I], a few examples at a time."""
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as hooks:
        order = torch.from_numpy(np.argsort(part.lengths, kind="stable"))
        for positions in order.split(_ROWS):
            found = hooks(function, part.batch(positions))
            yield found.ids, found.arrays


def products(
    model: nn.Module, function: Callable[[nn.Module, Batch], Tensor], part: Part, vectors: dict[str, Tensor]
) -> Tensor:
    """Return ∇function(z) · vector of every example and vector (name -> [k, O·I]), float64 [n, k], in the part's order."""
    out = torch.empty(len(part.labels), next(iter(vectors.values())).shape[0], dtype=torch.float64)
    narrow = {name: block.to(next(model.parameters()).dtype) for name, block in vectors.items()}
    with PerExampleGradients(model, select_parameters(model, ["*"]), Dense(narrow)) as hooks:
        for batch in part.batches():
            found = hooks(function, batch)
            out[found.ids] = found.arrays["rows"].double()
    return out


def query_gradients(subject: MiniLM, queries: Part) -> Tensor:
    """Return ∇ℓ(q) of every query, (size, Q) float64."""
    parts = list(whole_gradients(subject.model, loss, queries, select_parameters(subject.model, ["*"])))
    order = torch.cat([ids for ids, _ in parts]).argsort()
    arrays = {name: torch.cat([found[name] for _, found in parts])[order] for name in parts[0][1]}
    return subject.coordinates.join(arrays)


def influence_on(subject: MiniLM, solved: Tensor) -> Tensor:
    """Return the effect of leaving each training example out, [N, Q], for solved queries (size, Q)."""
    found = products(subject.model, loss, subject.train, subject.coordinates.split(solved))
    return found / len(subject.train.labels)


def operator(subject: MiniLM, rows: Part) -> LocalOperator:
    """Return Gauss-Newton products of these rows' mean loss, as the engine takes them; ids are positions in the part."""
    examples = Examples(torch.arange(len(rows.labels)), [list(rows.batches())], lambda ids: [rows.batch(ids)])
    dtype = next(subject.model.parameters()).dtype
    return LocalOperator(Curvature(subject.model, loss, subject.coordinates, dtype=dtype), examples)


def pooled(subject: MiniLM, part: Part) -> np.ndarray:
    """Return the features that neighbours are sought by, float32 [n, H]: what the head is given."""
    return features(subject, part)["pooled"]


def features(subject: MiniLM, part: Part) -> dict[str, np.ndarray]:
    """Return name -> float32 [n, H]: the pooler's output, and what neighbours might be sought by instead."""
    out: dict[str, dict[int, np.ndarray]] = {}
    with torch.inference_mode():
        for batch in part.batches():
            base: Any = subject.model.base_model
            found = base(inputs_embeds=batch["x"], attention_mask=batch["mask"])
            last = found.last_hidden_state
            named = {
                "pooled": found.pooler_output,
                "last hidden state of [CLS]": last[:, 0],
                "last hidden states, mean": mean_of_tokens(last, batch["mask"]),
                "frozen layers' output, mean": mean_of_tokens(batch["x"], batch["mask"]),
            }
            for name, rows in named.items():
                out.setdefault(name, {}).update(zip(batch.ids.tolist(), rows.numpy(), strict=True))
    return {name: np.stack([rows[i] for i in range(len(part.labels))]) for name, rows in out.items()}


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return [B, H]: the mean of [B, T, H] over the tokens that are no padding."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)


def is_right(subject: MiniLM, part: Part) -> Tensor:
    return logits_of(subject.model, part).argmax(1) == part.labels
