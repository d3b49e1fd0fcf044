"""Representer points (Yeh et al. 2018; equation 4 of TracIn's appendix): which training examples raise one of a query's logits.

    score(z, q) = α_zc (f_z · f_q),  α_z = −(1/2λn) ∂ℓ/∂φ_z

of the last layer trained again with λ‖W‖² until it is stationary (engine/representer.py), f its inputs and c the class that
is asked about: the sum over all z is that class's logit. Positive: the example raises it. It is no loss: these scores are
never added to or compared with those of other methods.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import ForwardSource, QueryState, Rows, ScoreBlock
from engine.methods.tracin import one_checkpoint
from engine.representer import HeadSettings, class_scores


@dataclass(frozen=True)
class Representer:
    """What each training example adds to one logit of the query, under a last layer trained again."""

    penalty: Annotated[float, Gt(0)] = 0.003  # λ, absolute, of λ‖W‖² beside the mean loss
    logit: Literal["label", "predicted"] = (
        "label"  # whose: of the query's own class, or of the retrained layer's answer
    )
    tolerance: Annotated[float, Gt(0)] = 1e-10  # of ‖∇‖, which the retrained layer must reach
    max_iterations: Annotated[int, Ge(1)] = 2000  # of L-BFGS
    checkpoint: int = -1  # position in the list of checkpoints
    reads: ClassVar[str] = "features"
    score_unit: ClassVar[str] = "logit"
    online: ClassVar[bool] = True
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    @property
    def head(self) -> HeadSettings:
        return HeadSettings(self.penalty, self.tolerance, self.max_iterations)

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: ForwardSource) -> QueryState:
        features = torch.cat([source.features(batch) for batch in queries])
        losses = torch.cat([source.losses(batch) for batch in queries])
        weights = source.head()
        logits = features.double() @ weights.T
        classes = logits.argmax(1) if self.logit == "predicted" else torch.cat([source.target(b) for b in queries])
        if int(classes.max()) >= len(weights):
            raise ValueError(
                f"a query has class {int(classes.max())}, but training examples only 0 to {len(weights) - 1}: nothing "
                f"raises its logit. Leave it out, or ask method.logit=predicted."
            )
        return QueryState({"features": features, "class": classes[:, None]}, None, losses, 1.0, ())

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        """`rows.arrays`: features [n, H], alpha [n, K] and target [n, 1] of the training examples."""
        features, alpha, target = (rows.arrays[name] for name in ("features", "alpha", "target"))
        scores = class_scores(alpha, features, state.arrays["features"], state.arrays["class"][:, 0])
        own = alpha.gather(1, target)[:, 0] * features.double().square().sum(1)
        return ScoreBlock(scores, own)

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        raise ValueError("method representer has no vectors that a neighbour index could hold")
