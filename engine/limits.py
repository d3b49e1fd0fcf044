"""What a model can read at all: how many positions it has, and how many token ids."""

import json
from dataclasses import dataclass
from pathlib import Path

# Models that count positions from the padding index on: one table of position vectors, whose first padding_idx + 1
# stand for no token. Model types as config.json has them.
_AFTER_PADDING = {
    "camembert", "data2vec-text", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@dataclass(frozen=True)
class InputLimits:
    """The sizes of a transformers model's input tables; None: not known, so nothing is refused."""

    positions: int | None
    vocabulary: int | None

    def check(self, rows: list[dict]) -> list[dict]:
        """Return encoded examples as they are. Raises ValueError for one that the model would fail on."""
        for row in rows:
            tokens = row.get("input_ids")
            if tokens is None:
                continue
            if not len(tokens):
                raise ValueError("the example has no tokens: give it a text, or leave it out")
            if self.positions and len(tokens) > self.positions:
                raise ValueError(
                    f"the example has {len(tokens)} tokens, the model {self.positions} positions: set "
                    f"task.settings.max_tokens={self.positions}, and longer ones are cut or chunked"
                )
            if self.vocabulary and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise ValueError(
                    f"the example has token ids {min(tokens)} to {max(tokens)}, the model knows 0 to "
                    f"{self.vocabulary - 1}: set task.settings.tokenizer to the folder of the model's own"
                )
        return rows


def read_limits(folder: Path) -> InputLimits:
    """Return the limits that a model folder's config.json states.

    A model of RoBERTa's kind reads max_position_embeddings − padding_idx − 1 tokens: 512 of 514.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions and config.get("model_type") in _AFTER_PADDING:
        padding = config.get("pad_token_id")
        positions -= (1 if padding is None else padding) + 1  # 1 is what their tokenizers pad with
    return InputLimits(positions, config.get("vocab_size"))
