"""What a worker holds between units: open corpora and stores, the loaded checkpoint, its hooks.

One checkpoint at a time is held; a unit that needs another loads it in its place. Nothing here decides anything.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.specs import GradientSpec, ModelSpec
from actors.states import load_state
from engine.batches import Batch
from engine.gradients import GradientBatch, PerExampleGradients
from engine.methods.contract import QueryState
from engine.models import ready_for_scoring
from engine.parameters import Parameter, supported_parameters
from engine.projectors import Dense, Projector, Whole, make_projector
from engine.tasks.contract import BUILT_IN, Task, load_task, measurement, with_model_folder
from storage.checkpoints import fingerprint
from storage.corpus import Corpus
from storage.gradients import GradientStore
from storage.locations import Location
from storage.segments import Segment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class WorkerContext:
    """Caches of one worker."""

    def __init__(self, run: str, device: str = "cpu") -> None:
        self.run = Location.parse(run)
        self.device = torch.device(device)
        self.cache = Path(tempfile.gettempdir()) / "influence-engine"
        self._held: dict[str, tuple[Any, Any]] = {}

    def _keep(self, slot: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return what the slot holds if it was made for this key, else make it and hold it instead."""
        if slot not in self._held or self._held[slot][0] != key:
            self._held.pop(slot, None)  # the old one goes before the new one comes
            self._held[slot] = (key, make())
        return self._held[slot][1]

    def home(self, uri: str | None) -> Location:
        """Return the run that holds corpus and store: another one by URI, or this worker's own."""
        return Location.parse(uri) if uri else self.run

    def corpus(self, home: str | None, name: str) -> Corpus:
        return self._keep(f"corpus {name}", home, lambda: Corpus.open(self.home(home), name))

    def rows(self, home: str | None, name: str, at: dict[str, Any]) -> list[dict]:
        """Return the rows of a unit: segment, start and stop of its payload."""
        return self.corpus(home, name).read(self._segment(home, name, at), at["start"], at["stop"])

    def ids(self, home: str | None, name: str, at: dict[str, Any]) -> np.ndarray:
        """Return the ids of a unit's rows, int64, without reading them."""
        return self._segment(home, name, at).base + np.arange(at["start"], at["stop"], dtype=np.int64)

    def _segment(self, home: str | None, name: str, at: dict[str, Any]) -> Segment:
        return next(s for s in self.corpus(home, name).segments if s.name == at["segment"])

    def store(self, home: str | None) -> GradientStore:
        return self._keep("store", home, lambda: GradientStore.open(self.home(home)))

    def folder(self, model: ModelSpec, checkpoint: str) -> Path:
        """Return the checkpoint's folder on this machine, its content checked against the recorded fingerprint.

        Raises ValueError if the weights are not those that the run was made with.
        """
        spec = model.checkpoint(checkpoint)

        def fetch() -> Path:
            folder = Location.parse(spec.uri).fetch(self.cache)
            if fingerprint(folder) != spec.fingerprint:
                raise ValueError(
                    f"checkpoint {spec.uri} has changed since this run began: restore it, or use another run"
                )
            return folder

        return self._keep(f"folder {checkpoint}", spec, fetch)

    def task(self, model: ModelSpec) -> Task:
        """Return the task. Tokenizer and class names come from the first checkpoint's folder unless set."""
        key = (model.task, repr(model.task_settings), model.attention)
        return self._keep(
            "task", key, lambda: make_task(model, self.folder(model, model.checkpoints[0].name), self.cache)
        )

    def model(self, model: ModelSpec, checkpoint: str) -> nn.Module:
        """Return the model of one checkpoint, frozen, in evaluation mode, on this worker's device."""

        def load() -> nn.Module:
            self._held.pop("gradients", None)
            built = self.task(model).build(self.folder(model, checkpoint))
            return ready_for_scoring(built, self.device, DTYPES[model.compute])

        return self._keep("model", (model.checkpoint(checkpoint), model.compute, model.attention), load)

    def gradients(
        self,
        model: ModelSpec,
        checkpoint: str,
        spec: GradientSpec,
        form: str = "rows",
        blocks: QueryState | None = None,
    ) -> PerExampleGradients:
        """Return the hooks for one checkpoint.

        form "rows": as the store keeps them; "whole": unprojected, of any size; "onto": products with `blocks`.
        """
        network = self.model(model, checkpoint)

        def make() -> PerExampleGradients:
            old = self._held.get("gradients")
            if old:
                old[1].remove()
            parameters = named_parameters(network, spec.parameters)
            projector = self._projector(parameters, spec, form, blocks, network)
            return PerExampleGradients(network, parameters, projector, norms=spec.norms)

        key = (model.checkpoint(checkpoint), spec, form, id(blocks))
        if "gradients" in self._held and self._held["gradients"][0] == key:
            return self._held["gradients"][1]
        made = make()
        self._held["gradients"] = (key, made)
        self._blocks = blocks  # kept as long as its address is in the key
        return made

    def state(self, label: str, checkpoint: str) -> QueryState:
        """Return the query state that `prepare` saved for this checkpoint."""
        return self._keep(f"state {checkpoint}", label, lambda: load_state(self.run, label, checkpoint))

    def _projector(
        self, parameters: list[Parameter], spec: GradientSpec, form: str, blocks: QueryState | None, network: nn.Module
    ) -> Projector:
        if form == "onto":
            assert blocks is not None
            return Dense({name: array.to(self.device) for name, array in blocks.arrays.items()})
        if form == "whole":
            return Whole(parameters, stored=False)
        return make_projector(parameters, spec.projection, self.device, next(network.parameters()).dtype)


class CheckpointSource:
    """The Source that a method's `prepare` sees: one checkpoint with the run's own projection."""

    def __init__(
        self, context: WorkerContext, model: ModelSpec, checkpoint: str, spec: GradientSpec, form: str
    ) -> None:
        self._context, self._model, self._checkpoint = context, model, checkpoint
        self._hooks = context.gradients(model, checkpoint, spec, form)
        self.learning_rate = model.checkpoint(checkpoint).learning_rate
        self.layout = self._hooks.projector.layout
        self.parameters = spec.parameters

    def model(self) -> nn.Module:
        return self._context.model(self._model, self._checkpoint)

    def gradients(self, batch: Batch) -> GradientBatch:
        task = self._context.task(self._model)

        def measure(model: nn.Module, batch: Batch) -> Tensor:
            return measurement(task, model, batch)

        return self._hooks(measure, batch.to(self._context.device))


def make_task(model: ModelSpec, folder: Path | None, cache: Path) -> Task:
    """Return the task with its folders on this machine; built-in ones take tokenizer and classes from `folder`."""
    settings = dict(model.task_settings)
    if folder is not None:
        settings = with_model_folder(model.task, settings, folder)
    for key in ("tokenizer", "model"):
        if isinstance(settings.get(key), str):
            settings[key] = str(Location.parse(settings[key]).fetch(cache))
    if model.task in BUILT_IN:
        settings.setdefault("attention", model.attention)
    return load_task(model.task, settings)


def named_parameters(network: nn.Module, names: tuple[str, ...]) -> list[Parameter]:
    found = {parameter.name: parameter for parameter in supported_parameters(network)[0]}
    return [found[name] for name in names]
