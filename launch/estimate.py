"""From what was measured, or from a model's shape and public figures of devices, to the seconds of a job."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from engine.memory import numbers_put_out
from engine.methods.contract import Method, inverse_of
from launch.footprint import Size
from launch.probe import Probe, StageTime
from launch.solve_time import assumed_solve, measured_solve, part_name, scored_share

DEVICES = Path(__file__).resolve().parents[1] / "configs" / "cluster" / "devices.yaml"
_MODELS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "text-classification": AutoModelForSequenceClassification,
}


def index_rows(rows: int, queries: int, top_k: int) -> int:
    """Return the rows of an index's tables: a query's strongest on either side, both ways round, and every example."""
    return 2 * queries * min(2 * top_k, rows) + rows + queries


def measured_seconds(
    probe: Probe, size: Size, scored: int, top_k: int, workers: int, method: Method
) -> dict[str, float]:
    """Return the seconds of every part of a job by so many workers like the probe's one.

    `scored`: the checkpoints that the method takes. Work grows with tokens or rows, and is spread; what a checkpoint costs
    once every worker pays beside the others. The index is the driver's alone.
    """
    stages, none = probe.stages, StageTime(0.0)
    more_tokens, more_queries = size.tokens / probe.tokens, size.queries / probe.queries
    found = {
        "ingest": stages["ingest"].seconds * (size.rows + size.queries) / (probe.rows + probe.queries),
        "start": stages["start"].seconds,
        "prepare": _spread(stages.get("prepare", none).seconds / probe.checkpoints * more_queries, scored, workers),
        "other": stages["other"].seconds * max(1.0, more_tokens / workers),
    }
    for kind, checkpoints in (("collect", size.checkpoints), ("compute", scored)):
        stage = stages.get(kind, none)
        work = stage.each * stage.units / probe.checkpoints * more_tokens
        work *= scored_share(method, size) if kind == "compute" else 1.0
        found[kind] = checkpoints * (stage.once + _spread(work / len(size.shards), len(size.shards), workers))
    if (inverse := inverse_of(method)) and probe.solve:
        found["features"] = stages["features"].seconds * more_tokens / workers
        found[part_name(inverse)] = measured_solve(inverse, probe.solve, (probe.rows, probe.tokens), size, workers)
    score = stages.get("score", none)
    work = score.each * score.units * (size.rows / probe.rows) * (scored / probe.checkpoints) * more_queries
    found["score"] = score.once + _spread(work / len(size.shards), len(size.shards), workers)
    written = index_rows(size.rows, size.queries, top_k) / index_rows(probe.rows, probe.queries, top_k)
    found["index"] = stages["index"].seconds * written
    return found


def _spread(each: float, units: int, workers: int) -> float:
    """Return the seconds of equal units taken by workers as they come: whole rounds, the last one as long as a full one."""
    return each * -(-units // workers)


@dataclass(frozen=True)
class Shape:
    """A model of which nothing but its shape is known: it is built without weights."""

    model: PreTrainedModel  # on the meta device
    tokens: int  # of an example, at most

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def flops_a_token(self) -> float:
        """Return the operations of a forward and an activation-only backward pass, counted by torch, for one token."""
        start = self.model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        try:
            with FlopCounterMode(display=False) as counter:
                self._logits().float().sum().backward()
        finally:
            start.remove()
        return counter.get_total_flops() / self.tokens

    def numbers_a_token(self) -> float:
        """Return how many numbers the model's modules put out for one token, which a backward pass holds."""
        return numbers_put_out(self.model, self._logits) / self.tokens

    def _logits(self) -> torch.Tensor:
        return self.model(input_ids=torch.zeros(1, self.tokens, dtype=torch.long, device="meta")).logits


def build_shape(task: str, shape: Mapping[str, Any], tokens: int) -> Shape:
    """Return a model of this shape. ValueError for a task whose models have no config.json."""
    if task not in _MODELS:
        raise ValueError(f"plan.model is not allowed with task {task}: only with {', '.join(_MODELS)}.")
    with torch.device("meta"):
        model = _MODELS[task].from_config(AutoConfig.for_model(**shape), attn_implementation="eager")
    return Shape(model.eval().requires_grad_(False), tokens)


def read_devices(names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the figures of these devices, and what is assumed of all. ValueError for one that is not in the table."""
    table = yaml.safe_load(DEVICES.read_text())
    for name in names:
        if name not in table["devices"]:
            raise ValueError(f"plan.devices={name!r} is not known: one of {', '.join(table['devices'])}.")
    return {name: table["devices"][name] for name in names}, table["assumed"]


def assumed_seconds(
    size: Size, scored: int, top_k: int, flops: float, peak: float, row_bytes: float, weights: int,
    assumed: Mapping[str, float], workers: int, method: Method, solved: int,
) -> dict[str, float]:  # fmt: skip
    """Return the seconds of every part of a job on devices that nobody measured.

    `flops`: operations a token, `peak`: of the device, `row_bytes`: of a stored row (0: without a store). Computing and
    writing overlap; without a store the pass is repeated for scoring. `solved`: numbers of a query that a solve has.
    """
    rate, tokens = peak * assumed["efficiency"], size.tokens
    passes = max(flops * tokens / rate, row_bytes * size.rows / assumed["storage"]) / workers
    asked = flops * tokens / size.rows * size.queries / rate
    read = row_bytes * size.rows * scored / assumed["storage"] / workers
    load = weights / assumed["storage"]
    passed = passes if row_bytes else passes * scored_share(method, size)
    return {
        "start": assumed["start"],
        "collect" if row_bytes else "compute": (size.checkpoints if row_bytes else scored) * (passed + load),
        "prepare": (asked + load) * -(-scored // workers),
        "score": read,
        "index": index_rows(size.rows, size.queries, top_k) / assumed["index_rows"],
        **assumed_solve(method, size, flops, rate, solved, workers),
    }
