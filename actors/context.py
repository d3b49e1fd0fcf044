"""What a worker holds between units: open corpora and stores, the loaded checkpoint, its hooks.

One checkpoint at a time is held; a unit that needs another loads it in its place. Only a service, which answers under all
of them again and again, holds all. Nothing here decides anything.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from actors.held_curvature import HeldCurvature
from actors.plan import shard_key
from actors.specs import FOLDERS, CurvatureSpec, GradientSpec, ModelSpec
from actors.states import SavedState, head_figures_key, head_key, in_windows, open_state
from engine.adapters import adapter_base, is_adapter
from engine.batches import Batch
from engine.coordinates import chosen_coordinates
from engine.curvature import Curvature
from engine.features import classes, features
from engine.gradient_batch import GradientBatch
from engine.gradients import PerExampleGradients
from engine.methods.contract import QueryState
from engine.models import ready_for_scoring
from engine.parameters import Parameter, supported_parameters
from engine.projection import RowLayout
from engine.projectors import Dense, Projector, Whole, make_projector
from engine.tasks.contract import BUILT_IN, Task, load_task, measurement, with_model_folder
from engine.turnover import restore
from engine.turnover_scores import Estimator
from storage.checkpoints import fingerprint
from storage.corpus import Corpus
from storage.damage import DamagedObject, read_checked
from storage.gradients import DamagedRows, GradientStore, RowBlock
from storage.locations import Location
from storage.segments import Segment
from storage.zarr_groups import MissingRows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

GRAPHS = 4  # a curvature product's batch holds about so many times the memory of a gradient's

STATE_BYTES = 1 << 30  # of query states that a worker keeps beside the one in use, and of the largest read whole
ROW_BYTES = 1 << 30  # of stored rows that a service keeps


def cache_folder() -> Path:
    """Return where remote checkpoints are copied to on this machine."""
    return Path(tempfile.gettempdir()) / "influence-engine"


class WorkerContext:
    """Caches of one worker."""

    def __init__(
        self,
        run: str,
        device: str = "cpu",
        hold_all: bool = False,  # keep the model of every checkpoint asked for, and rows, as a service wants
    ) -> None:
        self.run = Location.parse(run)
        self.device = torch.device(device)
        self.cache = cache_folder()
        self.hold_all = hold_all
        self._held: dict[str, tuple[Any, Any]] = {}
        # a worker's two units take turns: one reads or writes while the other computes
        self.reading, self.computing = threading.Lock(), threading.Lock()

    def _keep(self, slot: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return what the slot holds if it was made for this key, else make it and hold it instead."""
        if slot not in self._held or self._held[slot][0] != key:
            self._drop(slot)  # the old one goes before the new one comes
            self._held[slot] = (key, make())
        return self._held[slot][1]

    def _drop(self, slot: str) -> None:
        _, old = self._held.pop(slot, (None, None))
        if isinstance(old, Hooked):
            old.hooks.remove()

    def _slot(self, what: str, checkpoint: str) -> str:
        return f"{what} {checkpoint}" if self.hold_all else what

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

    def erased(self, home: str | None, name: str, at: dict[str, Any]) -> np.ndarray:
        """Return which of a unit's rows are erased, bool [n]."""
        return np.isin(self.ids(home, name, at), list(self.corpus(home, name).erased()))

    def rows_of(self, home: str | None, name: str, ids: np.ndarray) -> list[dict]:
        """Return the rows of examples, ids ascending; neighbours are read together."""
        corpus = self.corpus(home, name)
        places = np.searchsorted([s.base for s in corpus.segments], ids, side="right") - 1
        breaks = np.flatnonzero((np.diff(ids) != 1) | (np.diff(places) != 0)) + 1
        rows: list[dict] = []
        for run, place in zip(np.split(ids, breaks), places[np.r_[0, breaks]] if len(ids) else (), strict=False):
            segment = corpus.segments[place]
            rows += corpus.read(segment, int(run[0]) - segment.base, int(run[-1]) - segment.base + 1)
        return rows

    def _segment(self, home: str | None, name: str, at: dict[str, Any]) -> Segment:
        return next(s for s in self.corpus(home, name).segments if s.name == at["segment"])

    def store(self, home: str | None) -> GradientStore:
        return self._keep("store", home, lambda: GradientStore.open(self.home(home)))

    def stored_rows(self, home: str | None, corpus: str, checkpoint: str, at: dict[str, Any]) -> RowBlock:
        """Return the stored rows of a shard: read, or where all is held as much from memory as fits in ROW_BYTES."""
        kept: dict[tuple, RowBlock] = self._keep("rows", (home, corpus), dict)
        place = (checkpoint, at["segment"], at["start"], at["stop"])
        if place in kept:
            return kept[place]
        try:
            block = self.store(home).read(corpus, *place)
        except (MissingRows, DamagedRows) as error:
            unit = f"{checkpoint}-{shard_key(corpus, at)}"
            raise DamagedObject(
                self.home(home), f"collect-{corpus}", unit, str(error).partition(". Run ")[0]
            ) from error
        if self.hold_all and sum(one.nbytes for one in (block, *kept.values())) <= ROW_BYTES:
            kept[place] = block
        return block

    def folder(self, model: ModelSpec, checkpoint: str) -> Path:
        """Return the checkpoint's folder on this machine, its content checked against the recorded fingerprint.

        Raises ValueError if the weights are not those that the run was made with.
        """
        spec = model.checkpoint(checkpoint)

        def fetch() -> Path:
            folder = Location.parse(spec.uri).fetch(self.cache)
            if checkpoint_fingerprint(folder, model.task_settings, self.cache) != spec.fingerprint:
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
            self._drop(self._slot("gradients", checkpoint))
            self._drop("curvature")
            self._drop("masked")
            built = self.task(model).build(self.folder(model, checkpoint))
            return ready_for_scoring(built, self.device, DTYPES[model.compute])

        return self._keep(
            self._slot("model", checkpoint), (model.checkpoint(checkpoint), model.compute, model.attention), load
        )

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
        network, slot = self.model(model, checkpoint), self._slot("gradients", checkpoint)

        def make() -> Hooked:
            parameters = named_parameters(network, spec.parameters)
            projector = self._projector(parameters, spec, form, blocks, network)
            return Hooked(PerExampleGradients(network, parameters, projector, norms=spec.norms), blocks)

        return self._keep(slot, (model.checkpoint(checkpoint), spec, form, id(blocks)), make).hooks

    def curvature(self, model: ModelSpec, gradients: GradientSpec, spec: CurvatureSpec) -> HeldCurvature:
        """Return the curvature over the chosen parameters at one checkpoint, with what is held of its examples."""

        def make() -> HeldCurvature:
            network, task = self.model(model, spec.checkpoint), self.task(model)
            self._drop(self._slot("gradients", spec.checkpoint))  # a copy of the model must not have its hooks
            chosen = chosen_coordinates(network, gradients.parameters)
            curvature = Curvature(network, task.loss, chosen, spec.kind, DTYPES[spec.dtype])
            budget = max(1, gradients.token_budget // GRAPHS)
            read = partial(self.rows_of, spec.home, spec.corpus)
            return HeldCurvature(curvature, task, read, budget, self.device)

        return self._keep("curvature", (model.checkpoint(spec.checkpoint), model.compute, gradients, spec), make)

    def masked(self, model: ModelSpec, checkpoint: str) -> Estimator:
        """Return what runs queries under the masks that this checkpoint was trained with; its model stays as it is."""

        def make() -> Estimator:
            turnover = restore(self.model(model, checkpoint), self.folder(model, checkpoint))
            task = self.task(model)
            return Estimator(turnover, partial(measurement, task))

        return self._keep("masked", (model.checkpoint(checkpoint), model.compute), make)

    def arrays(self, stage: str, unit: str, key: str) -> dict[str, np.ndarray]:
        """Return the arrays that a unit left in a file, from memory where they fit in ROW_BYTES. Raises DamagedObject."""
        kept: dict[str, dict[str, np.ndarray]] = self._keep("arrays", stage, dict)
        if key in kept:
            return kept[key]
        found = safetensors.numpy.load(read_checked(self.run, stage, unit, key))
        held = sum(array.nbytes for one in (found, *kept.values()) for array in one.values())
        if held <= ROW_BYTES:
            kept[key] = found
        return found

    def head(self, label: str) -> tuple[Tensor, dict[str, Any]]:
        """Return the last layer that was trained again for these scores, (K, H) float64, and what is known of it."""

        def read() -> tuple[Tensor, dict[str, Any]]:
            data = read_checked(self.run, f"head-{label}", "head", head_key(label))
            return safetensors.torch.load(data)["weights"], self.run.read_json(head_figures_key(label))

        return self._keep("head", label, read)

    def state(self, label: str, checkpoint: str) -> QueryState:
        """Return the query state that scoring takes of this checkpoint; without its arrays if it exceeds STATE_BYTES."""
        found = self._opened(label, checkpoint)
        return found.rest if isinstance(found, SavedState) else found

    def state_windows(self, label: str, checkpoint: str) -> Iterator[QueryState]:
        """Yield the query state in windows of consecutive queries of at most STATE_BYTES, one after another in memory."""
        yield from in_windows(self._opened(label, checkpoint), STATE_BYTES)

    def _opened(self, label: str, checkpoint: str) -> QueryState | SavedState:
        """Return the query state of this checkpoint; one that is larger than STATE_BYTES stays on disk.

        The one last used is held, and of the label's others as many as fit in STATE_BYTES; the rest are read again for
        each unit. Which stay does not change: units go through all checkpoints in turn, and the one longest unused is
        always the next.
        """

        def find() -> QueryState | SavedState:
            kept: dict[str, QueryState | SavedState] = self._keep("states", label, dict)
            if checkpoint in kept:
                return kept[checkpoint]
            state = open_state(self.run, label, checkpoint, STATE_BYTES)
            if sum(one.nbytes for one in (state, *kept.values())) <= STATE_BYTES:
                kept[checkpoint] = state
            return state

        return self._keep("state", (label, checkpoint), find)

    def _projector(
        self, parameters: list[Parameter], spec: GradientSpec, form: str, blocks: QueryState | None, network: nn.Module
    ) -> Projector:
        if form == "onto":
            assert blocks is not None
            return Dense({name: array.to(self.device) for name, array in blocks.arrays.items()})
        if form == "whole":
            return Whole(parameters, stored=False)
        return make_projector(parameters, spec.projection, self.device, next(network.parameters()).dtype)


@dataclass(frozen=True)
class Hooked:
    """Hooks on a model, with the queries they multiply with: kept as long as their address is in a slot's key."""

    hooks: PerExampleGradients
    blocks: QueryState | None


class CheckpointSource:
    """The Source that a method's `prepare` sees: one checkpoint, and gradients with the run's own projection."""

    def __init__(
        self,
        context: WorkerContext,
        model: ModelSpec,
        checkpoint: str,
        spec: GradientSpec,
        form: str,
        label: str = "",  # of the scores, where the method trains a last layer for them
    ) -> None:
        self._context, self._model, self._checkpoint, self._spec, self._form = context, model, checkpoint, spec, form
        self._label = label
        self.learning_rate = model.checkpoint(checkpoint).learning_rate
        self.parameters = spec.parameters

    @property
    def layout(self) -> RowLayout:
        return self._hooks().projector.layout if self.parameters else RowLayout({})

    def model(self) -> nn.Module:
        return self._context.model(self._model, self._checkpoint)

    def gradients(self, batch: Batch) -> GradientBatch:
        task = self._context.task(self._model)
        return self._hooks()(partial(measurement, task), batch.to(self._context.device))

    def losses(self, batch: Batch) -> Tensor:
        task = self._context.task(self._model)
        with torch.inference_mode():
            return measurement(task, self.model(), batch.to(self._context.device)).double().cpu()

    def features(self, batch: Batch) -> Tensor:
        task = self._context.task(self._model)
        return features(task, self.model(), batch.to(self._context.device), "head").float().cpu()

    def target(self, batch: Batch) -> Tensor:
        return classes(self._context.task(self._model), batch)

    def head(self) -> Tensor:
        return self._context.head(self._label)[0]

    def _hooks(self) -> PerExampleGradients:
        return self._context.gradients(self._model, self._checkpoint, self._spec, self._form)


def make_task(model: ModelSpec, folder: Path | None, cache: Path) -> Task:
    """Return the task with its folders on this machine; built-in ones take tokenizer and classes from `folder`."""
    settings = local_folders(model.task_settings, cache)
    if folder is not None:
        settings = with_model_folder(model.task, settings, folder)
    if model.task in BUILT_IN:
        settings.setdefault("attention", model.attention)
    return load_task(model.task, settings)


def local_folders(task_settings: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Return a task's settings with its folders on this machine."""
    given = {key: task_settings[key] for key in FOLDERS if isinstance(task_settings.get(key), str)}
    return task_settings | {key: str(Location.parse(uri).fetch(cache)) for key, uri in given.items()}


def checkpoint_fingerprint(folder: Path, task_settings: dict[str, Any], cache: Path) -> str:
    """Return the fingerprint of a checkpoint; that of an adapter covers its base model, which may be given by the task."""
    if not is_adapter(folder):
        return fingerprint(folder)
    return fingerprint(folder, adapter_base(folder, local_folders(task_settings, cache).get("base")))


def named_parameters(network: nn.Module, names: tuple[str, ...]) -> list[Parameter]:
    found = {parameter.name: parameter for parameter in supported_parameters(network)[0]}
    return [found[name] for name in names]
