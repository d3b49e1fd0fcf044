"""The config's section `train.turnover`: where masks go and how they are drawn."""

from typing import Literal

from pydantic import Field, model_validator

from engine.masks import MaskSettings
from launch.sections import Section


class TurnOverSection(Section):
    """Turn-over dropout: every example trains under a mask of its own, whose flip never sees it; `{}`: no layer yet."""

    adapters: int | None = Field(
        None,
        ge=1,
        description="width of bottleneck adapters in a transformer, which with its head are then all that trains",
    )
    head: int | None = Field(
        None,
        ge=1,
        description="units of a hidden layer beside a classification head; six or so for an example tell examples apart",
    )
    layers: Literal["all", "top"] = Field("all", description="which layers take adapters; top: the top third")
    after: list[str] = Field([], description="globs over modules whose output is masked, besides the adapters' own")
    before: list[str] = Field([], description="globs over modules whose input is masked, besides the head's")
    keep: float = Field(0.5, gt=0, lt=1, description="p, probability that a unit is kept")
    flip_scale: Literal["paper", "unbiased"] = Field("paper", description="of the flip: 1/p, or 1/(1 - p)")
    kind: Literal["volatile", "hashed"] = Field("volatile", description="hashed: products of rows of a codebook")
    codebook: int = Field(256, ge=1, description="rows of the codebook, hashed only")
    picks: int = Field(4, ge=1, description="rows that an example multiplies, hashed only")
    seeds: int = Field(1, ge=1, description="trainings under other masks, each a folder seed-<n>; scores are averaged")
    duplicates: bool = Field(False, description="let near-identical texts share a mask")
    curves: int = Field(
        500, ge=0, description="examples of the corpus and of the queries in the learning curves; 0: none"
    )

    @model_validator(mode="after")
    def _possible(self) -> "TurnOverSection":
        if self.picks > self.codebook:
            raise ValueError(
                f"train.turnover.picks={self.picks} is not allowed: at most train.turnover.codebook={self.codebook}."
            )
        if not (self.adapters or self.head or self.after or self.before):
            raise ValueError(
                "train.turnover masks no layer: set train.turnover.adapters for a transformer (48, say), train.turnover.head "
                "for a classifier, or name modules "
                "in train.turnover.after and train.turnover.before."
            )
        return self

    def masks(self, seed: int) -> MaskSettings:
        return MaskSettings(self.keep, self.flip_scale, self.kind, seed, self.codebook, self.picks)
