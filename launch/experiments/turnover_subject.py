"""What turn-over dropout's experiments train: MiniLM's top layers with adapters and a head, with masks or without.

Everything below the top layers is frozen and is computed once for each text. Adapters, pooler and classifier train; masks lie
on the adapters' bottlenecks and on the classifier's input, so an example's half of the pooler's rows is its own too. A wide
head, where the config asks for one, reads its input unmasked; the pooler is then frozen, not to leak, or left out. Of the last
layer the first token alone is computed. Trainings are kept in runs/cache, and shared by the experiments whose configs agree on
them.
"""

import copy
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from engine.batches import Batch, plan_batches
from engine.bottleneck import PLACE, TRAINED, add_adapters, widen_head
from engine.counters import derive_key, permutation
from engine.masks import MaskSettings
from engine.training import TrainSettings, train
from engine.turnover import Loss, TurnOver, under_own_masks
from engine.turnover_scores import Estimator
from launch.experiments.kept import kept
from launch.experiments.subjects import Part, State, loss, mean_loss, read_records, token_states, top_layers

TRAINABLE = (TRAINED, "classifier.*")
KINDS = ("plain", "masked")
TOKENS = 4096  # of one forward pass of the estimator
_MASKS = 1 << 32


@dataclass(frozen=True)
class Texts:
    """A corpus in its parts: the frozen layers' states with labels as class numbers, and the records they come from."""

    parts: dict[str, Part]
    records: dict[str, list[dict[str, Any]]]
    classes: list[Any]


@dataclass(frozen=True)
class Training:
    """What decides a network's weights beside its data: the first `rows` of the corpus."""

    masked: bool
    rate: float
    rows: int
    seed: int  # of the head, the adapters, the order of the examples, ordinary dropout and the masks
    epochs: int


class Upper(nn.Module):
    """A BERT classifier from given states on, the last layer for the first token alone."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.layers, self.pooler = whole.bert.encoder.layer, whole.bert.pooler
        self.dropout, self.classifier = whole.dropout, whole.classifier

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        states: Any = inputs_embeds
        hidden = (1.0 - attention_mask[:, None, None].to(states)) * torch.finfo(states.dtype).min
        *lower, last = self.layers
        for layer in lower:
            states = layer(states, attention_mask=hidden)
        pooled = self.pooler(first_token(last, states, hidden))
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def first_token(
    layer: Any,  # a BertLayer
    states: Tensor,  # [B, T, H]
    hidden: Tensor,  # [B, 1, 1, T], added to the attention's logits
) -> Tensor:  # [B, 1, H]
    """Return what the layer gives for the first token."""
    own, first = layer.attention.self, states[:, :1]
    heads = (len(states), -1, own.num_attention_heads, own.attention_head_size)
    query, key, value = (
        linear(given).view(heads).transpose(1, 2)
        for linear, given in ((own.query, first), (own.key, states), (own.value, states))
    )
    weights = own.dropout((query @ key.transpose(2, 3) * own.scaling + hidden).softmax(-1))
    attended = layer.attention.output((weights @ value).transpose(1, 2).flatten(2), first)
    return layer.output(layer.intermediate(attended), attended)


@dataclass(frozen=True)
class Network:
    """A model and the masks on it; those of a training without masks are never used."""

    model: nn.Module
    turnover: TurnOver

    def load(self, weights: State) -> "Network":
        """Put trained weights into the model, in place, ready for scoring."""
        self.model.load_state_dict(weights, strict=False)
        self.model.eval()
        return self


class FirstToken(nn.Module):
    """What stands in the pooler's place where the head reads the first token's state itself."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, 0]


def make_network(settings: dict[str, Any], classes: int, seed: int) -> Network:
    """Return the network that training starts from under a seed."""
    model = Upper(copy.deepcopy(pretrained(settings, classes)))
    if not settings.get("pooler", True):
        model.pooler = FirstToken()
    generator = torch.Generator().manual_seed(derive_key(seed, "head") % 2**63)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02, generator=generator)  # as BERT's own heads begin
        model.classifier.bias.zero_()
    add_adapters(model, settings["adapters"], seed=seed)
    if "head" in settings:
        widen_head(model, settings["head"], "classifier", seed)
    masks = MaskSettings(seed=derive_key(seed, "turnover") % _MASKS)
    return Network(model, TurnOver(model, masks, after=[PLACE], before=["classifier"]))


def pretrained(settings: dict[str, Any], classes: int = 2) -> nn.Module:
    """Return the encoder's top layers as they were published, with a new head; not to be changed."""
    return _pretrained(settings["base"], settings["top_layers"], classes)


@lru_cache(maxsize=2)
def _pretrained(base: str, count: int, classes: int) -> nn.Module:
    return top_layers(base, count, classes).eval()


def read_texts(settings: dict[str, Any], source: dict[str, Any]) -> Texts:
    """Return a config's corpus, read once per process.

    `settings`: base, top_layers, max_tokens of the network; `source`: least_score, and for every part its file, from which
    and up to which of the records that are rated at least so clearly.
    """
    return _read_texts(json.dumps([{key: settings[key] for key in ("base", "top_layers", "max_tokens")}, source]))


@lru_cache(maxsize=2)
def _read_texts(given: str) -> Texts:
    settings, source = json.loads(given)
    records = {
        name: [one for one in read_records(file) if abs(one.get("score", torch.inf)) >= source["least_score"]][
            begin:end
        ]
        for name, (file, begin, end) in source["parts"].items()
    }
    classes = sorted({one["label"] for part in records.values() for one in part})
    numbers = {label: number for number, label in enumerate(classes)}

    def make() -> dict[str, Tensor]:
        texts = tuple(one["text"] for part in records.values() for one in part)
        states = token_states(settings["base"], -settings["top_layers"], texts, settings["max_tokens"])
        token_states.cache_clear()  # they are held here and in the kept file
        return {"states": torch.cat(states), "lengths": torch.tensor([len(one) for one in states])}

    found = kept("turnover-states", [settings, source], make)
    states = iter(found["states"].split(found["lengths"].tolist()))
    parts = {
        name: Part([next(states) for _ in part], torch.tensor([numbers[one["label"]] for one in part]))
        for name, part in records.items()
    }
    return Texts(parts, records, classes)


def fit(settings: dict[str, Any], part: Part, classes: int, training: Training, loss: Loss = loss) -> list[State]:
    """Train on the part's first rows; return the trained weights after every epoch."""
    network = make_network(settings, classes, training.seed)
    torch.manual_seed(training.seed)
    plan = TrainSettings(
        epochs=training.epochs, batch_size=settings["batch_size"], learning_rate=training.rate,
        trainable=TRAINABLE if "head" in settings else (*TRAINABLE, "pooler.*"),
        checkpoints=training.epochs, seed=training.seed,
    )  # fmt: skip
    if training.masked:
        loss = under_own_masks(network.turnover, loss)
    else:
        network.turnover.remove()

    def collate(rows: list[int]) -> Batch:
        return part.batch(torch.tensor(rows))

    return [
        {name: weight.detach().clone() for name, weight in network.model.named_parameters() if weight.requires_grad}
        for step in train(network.model, loss, collate, list(range(training.rows)), plan)
        if step.checkpoint
    ]


def kept_weights(
    settings: dict[str, Any], source: dict[str, Any], training: Training, labels: Tensor | None = None
) -> list[State]:
    """Return the trained weights after every epoch, trained now or kept; `labels`: in the place of the corpus's own."""
    texts = read_texts(settings, source)

    def make() -> dict[str, Tensor]:
        part = texts.parts["train"] if labels is None else Part(texts.parts["train"].inputs, labels)
        epochs = fit(settings, part, len(texts.classes), training)
        return {f"{epoch}:{name}": weight for epoch, state in enumerate(epochs) for name, weight in state.items()}

    given = [settings, source, asdict(training), None if labels is None else labels.tolist()]
    found = kept("turnover-weights", given, make)
    return [
        {name.partition(":")[2]: weight for name, weight in found.items() if name.startswith(f"{epoch}:")}
        for epoch in range(training.epochs)
    ]


def trained(config: dict[str, Any], source: dict[str, Any], masked: bool, rows: int, seed: int) -> Network:
    """Return a network after its last epoch, trained at the rate that is best for its kind."""
    training = Training(masked, chosen_rate(config, source, masked), rows, seed, config["train"]["epochs"])
    return after_training(config["network"], source, training)


def after_training(
    settings: dict[str, Any], source: dict[str, Any], training: Training, labels: Tensor | None = None
) -> Network:
    """Return a network after its last epoch."""
    network = make_network(settings, len(read_texts(settings, source).classes), training.seed)
    return network.load(kept_weights(settings, source, training, labels)[-1])


def chosen_rate(config: dict[str, Any], source: dict[str, Any], masked: bool) -> float:
    """Return the learning rate with the least mean loss on the dev part, trained on few rows under a seed of its own."""
    return min(dev_losses(config, source, masked).items(), key=lambda pair: pair[1])[0]


def dev_losses(config: dict[str, Any], source: dict[str, Any], masked: bool) -> dict[float, float]:
    """Return the mean dev loss of every rate, of the full network."""
    own = {key: config["train"][key] for key in ("epochs", "tuning")}
    own["rates"] = config["train"]["rates"][KINDS[masked]]
    return _dev_losses(json.dumps([config["network"], source, own, masked]))


@lru_cache(maxsize=8)
def _dev_losses(given: str) -> dict[float, float]:
    settings, source, own, masked = json.loads(given)
    dev = read_texts(settings, source).parts["dev"]
    runs = [
        Training(masked, rate, own["tuning"]["rows"], own["tuning"]["seed"], own["epochs"]) for rate in own["rates"]
    ]
    return {run.rate: mean_loss(after_training(settings, source, run).model, dev) for run in runs}


def influences(network: Network, ids: Tensor, queries: Part) -> Tensor:  # int64 [n] -> float64 [n, Q]
    """Return L(f^m̃(z), q) − L(f^m(z), q) for all ids and queries; queries of like length share a forward pass."""
    estimator = Estimator(network.turnover, loss)
    found = torch.empty(len(ids), len(queries.labels), dtype=torch.float64)
    for rows in plan_batches(queries.lengths, TOKENS // 8):
        batch = queries.batch(torch.from_numpy(rows))
        fits = TOKENS // int(queries.lengths[rows].max())
        own, flipped = estimator.losses(ids, batch, ("own", "flipped"), fits)
        found[:, torch.from_numpy(rows)] = flipped - own
    return found


def drawn(count: int, total: int, seed: int, name: str) -> Tensor:
    """Return int64 [count] different numbers below `total`."""
    return torch.from_numpy(permutation(derive_key(seed, name), total)[:count].copy())
