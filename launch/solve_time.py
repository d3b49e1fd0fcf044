"""What solving with the inverse curvature takes, as a plan tells it: by a probe's one block of queries, or by figures alone.

λ_max and the solvers that descend pass over the examples; repetitions of LiSSA and columns of a sketch draw their own, so
that the length of the corpus does not matter to them.
"""

from dataclasses import dataclass
from typing import Any

from engine.methods.contract import Method, inverse_of, nearest_of
from engine.methods.inverse import InverseCurvature
from launch.footprint import Size
from launch.stage_records import unit_seconds
from storage.locations import Location

DEPTH = 50  # iterations that a probe makes of LiSSA and of a sketch
STEPS = 3  # that it makes of a descent, whose end no small job foretells
ROWS = 64  # examples that estimate its curvature
DESCENTS = ("cg", "squared-cg")
POWER = 30  # products that λ_max takes, about
PRODUCT = 2  # a curvature product takes so many times a forward and an activation-only backward pass


@dataclass(frozen=True)
class SolveTime:
    """Seconds of the parts of a probe's solve."""

    largest: float  # λ_max: passes over the examples
    scale: float  # the largest λ_max of random batches
    block: float  # what the driver does for the block of queries: the solver, or the residual of what units found
    unit: float  # one repetition, or the columns that are found together, DEPTH iterations deep
    rest: float  # all else


def part_name(inverse: InverseCurvature) -> str:
    """Return what a plan calls the solve: a descent's time is a bound, as if no query converged before the last
    step, and so is a whole matrix's, as if its eigenvalues took as much longer as its products.
    """
    return "solve, at most" if inverse.solver in (*DESCENTS, "exact") else "solve"


def probe_settings(method: Method) -> dict[str, Any]:
    """Return which of the method's settings a probe takes instead of the job's: few examples and iterations.

    And a large λ, with which no solver fails on few examples that would not on all.
    """
    inverse = inverse_of(method)
    if inverse is None or inverse.solver == "projected":
        return {}
    less: dict[str, dict[str, Any]] = {
        "lissa": {"repetitions": 1, "depth": min(inverse.depth, DEPTH)},
        "sketch": {"columns": min(inverse.columns, inverse.query_block), "depth": min(inverse.depth, DEPTH)},
        **{one: {"max_iterations": min(inverse.max_iterations, STEPS), "tolerance": 1e-12} for one in DESCENTS},
    }
    safe = {"damping": 10.0, "damping_absolute": None} | ({"lissa_scale": None} if inverse.scale else {})
    return less.get(inverse.solver, {}) | safe | {"rows": min(inverse.rows or ROWS, ROWS)}


def read_solve(run: Location, label: str, seconds: float) -> SolveTime:
    """Return how a run's solve of so many seconds was spent."""
    largest, scale, block = (unit_seconds(run, f"solve-{label}", name) for name in ("largest", "scale", "block-"))
    unit = unit_seconds(run, f"lissa-{label}", "") + unit_seconds(run, f"sketch-{label}", "")
    return SolveTime(largest, scale, block, unit, max(0.0, seconds - largest - scale - block - unit))


def measured_solve(
    inverse: InverseCurvature, solve: SolveTime, probe: tuple[int, int], size: Size, workers: int
) -> float:
    """Return the seconds of a job's solve by so many workers; `probe`: the rows and tokens of what `solve` was."""
    rows, tokens = probe
    longer = (size.tokens / size.rows) / (tokens / rows)
    few = rows if inverse.solver == "projected" else min(inverse.rows or ROWS, ROWS, rows)
    more = sampled(inverse, size.rows) / few * longer
    blocks = -(-size.queries // inverse.query_block)
    deeper = longer * inverse.depth / min(inverse.depth, DEPTH)
    units = {"lissa": inverse.repetitions * blocks, "sketch": -(-inverse.columns // inverse.query_block)}
    alone = solve.unit * deeper * -(-units.get(inverse.solver, 0) // workers)
    if inverse.solver == "projected":
        return solve.rest * more / workers  # the sum over all stored rows is nearly all of it
    steps = 1.0
    if inverse.solver in DESCENTS:  # and one product more for the true residual
        steps = (inverse.max_iterations + 1) / (min(inverse.max_iterations, STEPS) + 1)
    return (solve.largest + solve.block * steps * blocks) * more / workers + solve.scale + alone + solve.rest


def assumed_solve(method: Method, size: Size, flops: float, rate: float, solved: int, workers: int) -> dict[str, float]:
    """Return the seconds of a solve on devices that nobody measured, by part.

    `flops`: of a forward and an activation-only backward pass, a token; `rate`: of a device; `solved`: numbers of a query
    that is solved for, columns of a stored row or weights.
    """
    inverse, nearest = inverse_of(method), nearest_of(method)
    if inverse is None:
        return {}
    rows, tokens = sampled(inverse, size.rows), size.tokens / size.rows
    match inverse.solver:  # examples times vectors that products are made with
        case "projected":
            return {"solve": (2 * size.rows * solved**2 / workers + solved**3) / rate}
        case "lissa":
            drawn = inverse.depth * inverse.batch * inverse.repetitions * size.queries
        case "sketch":
            drawn = 2 * inverse.depth * inverse.batch * inverse.columns
        case "exact":  # the whole matrix for every block of queries
            drawn = rows * solved * -(-size.queries // inverse.query_block)
        case _:
            drawn = rows * inverse.max_iterations * size.queries * (2 if inverse.solver == "squared-cg" else 1)
    found = {part_name(inverse): (POWER * rows + drawn) * tokens * PRODUCT * flops / rate / workers}
    return found | ({"features": size.tokens * flops / 2 / rate / workers} if nearest else {})


def scored_share(method: Method, size: Size) -> float:
    """Return which share of the examples is scored at most: all, or the queries' candidates and what is drawn beside."""
    nearest = nearest_of(method)
    if nearest is None:
        return 1.0
    lists = 1 if nearest.anchors else size.queries
    return min(1.0, (nearest.count + nearest.recall_sample) * lists / size.rows)


def sampled(inverse: InverseCurvature, rows: int) -> int:
    """Return how many examples estimate the curvature."""
    return min(inverse.rows or rows, rows)
