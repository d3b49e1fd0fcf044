"""Training on several workers: Ray Train starts their processes, joins them for torch.distributed, and starts them again.

What they do is a function of the caller's, the same in all of them; how they share a step is engine/training.py's. A worker
or a node that dies ends the others' step too: all are started again, and the function goes on from its last checkpoint. A
mistake of the caller's is not tried again, as Ray's FailureConfig alone would: it is raised here as it was there.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from actors.cluster import WorkerPlan
from actors.pool import PoolError
from actors.ray_pool import worker_environment
from engine.training import Group

RESTARTS = 3  # after lost workers; pre-empted nodes do not count
MISTAKES = (ValueError, FloatingPointError)  # that trying again does not mend
TIMEOUT = 1800  # seconds that a worker waits for the others in a step
BOOKS = ".ray-train"  # Ray Train's own folder, beside the checkpoints until it ends


Say = Callable[[str], None]


def train_together(
    function: Callable[[Say, Group], None],  # in the worker: what it says is said here
    plan: WorkerPlan,
    folder: Path,  # of the checkpoints; every worker sees it
    say: Say,
) -> None:
    """Run the function in every worker until all are through it. Needs a connected Ray (cluster.connect).

    Raises the function's ValueError or FloatingPointError; PoolError when workers were lost too often or did not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _passed_on(say) as worker_say:
            trainer = _trainer(function, worker_say, plan, folder.resolve())
            for left in reversed(range(RESTARTS + 1)):
                try:
                    return _fit(trainer)
                except WorkerGroupError as error:
                    _raise_mistake(error)
                    if not left:
                        raise _given_up(plan, f"were lost {RESTARTS + 1} times", error) from error
                    say("a training worker was lost: all start again from the last checkpoint")
                except TrainingFailedError as error:
                    raise _given_up(plan, "did not come up", error) from error
    finally:
        shutil.rmtree(folder / BOOKS, ignore_errors=True)


@contextmanager
def _passed_on(say: Say) -> Iterator[Say]:
    """Give what workers on any node may call; `say` is then called here."""
    queue = Queue(actor_options={"num_cpus": 0})

    def listen() -> None:
        while (text := queue.get()) is not None:
            say(text)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield queue.put
    finally:
        queue.put(None)
        listener.join()
        queue.shutdown()


def _trainer(function: Callable[[Say, Group], None], say: Say, plan: WorkerPlan, folder: Path) -> TorchTrainer:
    here = os.getcwd()

    def work() -> None:
        if os.path.isdir(here):  # else what Ray gave the job
            os.chdir(here)
        function(say, Group.joined())

    return TorchTrainer(
        work,
        torch_config=TorchConfig(timeout_s=TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=plan.count,
            use_gpu=plan.gpus > 0,
            resources_per_worker={"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
        ),
        run_config=RunConfig(
            name=BOOKS,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=RESTARTS),
            worker_runtime_env={"env_vars": worker_environment(plan.cpus, plan.gpus)},
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _fit(trainer: TorchTrainer) -> None:
    """Run Ray Train's loop. Ctrl-C ends it as it ends any command: Ray's own handler would exit with status 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _raise_mistake(error: WorkerGroupError) -> None:
    """Raise the function's own error, if a worker ended by one."""
    for cause in error.worker_failures.values():
        if isinstance(cause, MISTAKES):
            raise cause from None


def _given_up(plan: WorkerPlan, what: str, error: TrainingFailedError) -> PoolError:
    asked = f"{plan.cpus:g} CPU" + (f" and {plan.gpus:g} GPU" if plan.gpus else "")
    return PoolError(
        f"the {plan.count} training workers ({asked} each) {what}: {str(error).strip().splitlines()[-1]}. Run the same "
        f"command again to go on from the last checkpoint, or ask for other workers (train.workers)."
    )
