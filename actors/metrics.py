"""What Prometheus can read of a running job, through the exporter that every Ray node has.

    ray_influence_units, ray_influence_units_done                 of a stage: all, and done so far (by whichever driver)
    ray_influence_workers                                         that are up
    ray_influence_{done,rows,tokens,bytes,quarantined}_total      of this driver: units, rows, …, bytes written, rows set aside

Each has the labels `run` and `stage`; the leading `ray_` is Ray's.
"""

from ray.util.metrics import Counter, Gauge

from actors.units import Receipt

_LABELS = ("run", "stage")
_COUNTED = {
    "done": "units of work done",
    "rows": "examples computed",
    "tokens": "tokens computed",
    "bytes": "bytes written",
    "quarantined": "rows set aside as not finite",
}


class JobMetrics:
    """The counters and gauges of one driver. Needs a connected Ray."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._units = Gauge("influence_units", "units of work of the stage", _LABELS)
        self._done = Gauge("influence_units_done", "units of work of the stage that are done", _LABELS)
        self._workers = Gauge("influence_workers", "workers that are up", _LABELS)
        self._counters = {name: Counter(f"influence_{name}", text, _LABELS) for name, text in _COUNTED.items()}

    def state(self, stage: str, units: int, done: int, workers: int) -> None:
        """Say how far a stage is, and how many workers are up."""
        labels = self._labels(stage)
        self._units.set(units, labels)
        self._done.set(done, labels)
        self._workers.set(workers, labels)

    def count(self, stage: str, receipt: Receipt) -> None:
        """Count one unit that was committed."""
        made = {
            "done": 1, "rows": receipt.rows, "tokens": receipt.tokens, "bytes": receipt.bytes,
            "quarantined": len(receipt.quarantined),
        }  # fmt: skip
        for name, number in made.items():
            if number:
                self._counters[name].inc(number, self._labels(stage))

    def _labels(self, stage: str) -> dict[str, str]:
        return {"run": self._run, "stage": stage}
