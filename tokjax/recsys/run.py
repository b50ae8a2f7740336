"""A recommender from files to a folder: interactions and meanings in, codes and a model out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tokjax
from tokjax.config import resolve, to_dict
from tokjax.errors import CheckpointError, ConfigError, DataError, nearest
from tokjax.files import storage_errors, write_atomically
from tokjax.recsys.codes import ItemCodes
from tokjax.recsys.embeddings import embed_texts, of_items, read_embeddings
from tokjax.recsys.interactions import (
    Interactions,
    Split,
    leave_one_out,
    read_interactions,
    read_texts,
)
from tokjax.recsys.recommender import RecommenderConfig
from tokjax.recsys.rqvae import CodesConfig, train_codes
from tokjax.recsys.training import (
    FitConfig,
    TrainedRecommender,
    evaluate_recommender,
    recommend,
    train_recommender,
)
from tokjax.training.fit_state import read_state, write_state

CONFIG, ITEMS, CODES, MODEL = "config.json", "items.json", "codes.npz", "model.safetensors"


@dataclass(frozen=True)
class RecommendConfig:
    """A recommender: what it is made of and how it is trained."""

    interactions: str  # JSONL or CSV file of interactions, one a record
    user: str = "user"  # its field of the user's name
    item: str = "item"  # its field of the item's name, and that of the files below
    time: str | None = None  # its field of the time; None: records are in order
    fewest: int = 5  # interactions that each user and each item kept has at least
    history: int = 20  # latest items that are looked at
    embeddings: str | None = None  # JSONL file of items with a list of numbers in "embedding"
    texts: str | None = None  # or JSONL or CSV file of items with texts, which `encoder` embeds
    text: str = "text"  # its field of the text
    encoder: str = "smollm2-135m"  # language model whose hidden states embed texts
    codes: CodesConfig = CodesConfig()  # how items get their codes
    model: RecommenderConfig = RecommenderConfig()  # what writes them
    fit: FitConfig = FitConfig()  # how it is trained
    beams: int = 20  # of the search
    at: tuple[int, ...] = (5, 10)  # k of recall@k and ndcg@k

    def __post_init__(self):
        if (self.embeddings is None) == (self.texts is None):
            raise ConfigError("set either embeddings or texts: codes are made of what items mean")
        if self.codes.collaborative:
            raise ConfigError(
                "codes.collaborative needs vectors of interactions: give them to `train_codes` in "
                "Python"
            )
        if not self.at or min(self.at) < 1 or max(self.at) > self.beams:
            raise ConfigError(f"at={self.at} must be numbers from 1 to beams={self.beams}")
        if self.fewest < 1 or self.history < 1:
            raise ConfigError(f"fewest={self.fewest} and history={self.history} must be at least 1")


@dataclass(frozen=True, eq=False)
class RecommenderRun:
    """A finished recommender.

    Attributes:
        config: of it.
        items: names, in the order of their numbers.
        trained: the model.
    """

    config: RecommendConfig
    items: tuple[str, ...]
    trained: TrainedRecommender

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10
    ) -> list[list[tuple[str, float]]]:
        """Returns the k best items for each history of names, each with its log-probability.

        Raises:
            ConfigError: k is more than the beams.
            DataError: a name is not of the catalogue, or a history is empty.
        """
        number = {name: i for i, name in enumerate(self.items)}
        rows = []
        for row, history in enumerate(histories):
            unknown = [name for name in history if name not in number]
            if unknown or not history:
                what = f"names {unknown[0]!r}, which is no item." if unknown else "is empty."
                near = nearest(unknown[0], self.items) if unknown and len(self.items) < 5000 else ""
                raise DataError(f"history {row} {what}{near}")
            rows.append([number[name] for name in history][-self.config.history :])
        filled = np.full((len(rows), self.config.history), -1, np.int32)
        for i, row in enumerate(rows):
            filled[i, self.config.history - len(row) :] = row
        found = recommend(self.trained, filled, k=k, beams=max(self.config.beams, k))
        return [
            [(self.items[i], float(s)) for i, s in zip(own, scores, strict=True) if i >= 0]
            for own, scores in zip(found.items, found.scores, strict=True)
        ]

    def evaluate(self) -> dict[str, float]:
        """Returns recall and NDCG of each user's last item, from the file of interactions."""
        data, split = prepare_interactions(self.config)
        if data.items != self.items:
            raise DataError(
                f"{self.config.interactions} has other items than the recommender was trained on: "
                f"train it anew"
            )
        found = evaluate_recommender(
            self.trained, split.test, at=self.config.at, beams=self.config.beams
        )
        return {name: float(values.mean()) for name, values in found.items()}


def prepare_interactions(config: RecommendConfig) -> tuple[Interactions, Split]:
    """Returns what a run is about: the interactions kept, and their split."""
    data = read_interactions(
        config.interactions, user=config.user, item=config.item, time=config.time
    ).core(config.fewest)
    return data, leave_one_out(data.sequences, config.history)


def train(config: RecommendConfig, workdir: str | Path, *, progress: bool = True) -> RecommenderRun:
    """Returns a recommender that is trained and written into a folder; called again it goes on.

    Args:
        config: of everything.
        workdir: the folder.
        progress: whether to show it.

    Raises:
        ConfigError: the folder is of another configuration.
        DataError: files cannot be read, or do not fit each other.
        StorageError: the folder cannot be written.
    """
    folder = Path(workdir)
    with storage_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    told = json.loads(json.dumps(to_dict(config)))
    file = folder / CONFIG
    if file.exists() and json.loads(file.read_text()) != told:
        raise ConfigError(
            f"{folder} holds a run of another configuration: choose another --workdir"
        )
    data, split = prepare_interactions(config)
    write_atomically(file, json.dumps(told, indent=1) + "\n")
    write_atomically(folder / ITEMS, json.dumps(data.items, ensure_ascii=False) + "\n")
    if (folder / CODES).exists():
        codes = ItemCodes.load(folder / CODES)
        if len(codes) != len(data.items):
            raise DataError(f"{folder / CODES} has codes of {len(codes)} items: remove it")
    else:
        found = train_codes(
            _embeddings(config, data),
            config.codes,
            checkpoint=folder / "codes.fit",
            progress=progress,
        )
        codes = found.codes
        codes.save(folder / CODES)
    trained = train_recommender(
        config.model,
        codes,
        split.train,
        split.validation,
        config.fit,
        checkpoint=folder / "training.fit",
        progress=progress,
    )
    state = {"params": trained.params, "validation": np.float32(trained.validation)}
    write_state(folder / MODEL, {"model": repr(trained.model)}, state, trained.losses)
    return RecommenderRun(config, data.items, trained)


def load(workdir: str | Path) -> RecommenderRun:
    """Returns the recommender in a folder.

    Raises:
        CheckpointError: there is none, or training has not ended.
    """
    folder = Path(workdir)
    try:
        config = resolve(RecommendConfig, json.loads((folder / CONFIG).read_text()))
        items = tuple(json.loads((folder / ITEMS).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no recommender: {error}") from error
    if not (folder / MODEL).exists():
        raise CheckpointError(f"{folder}: training has not ended; run the same command to go on")
    codes = ItemCodes.load(folder / CODES)
    model = config.model.model(codes)
    template = {
        "params": jax.eval_shape(model.init, jax.random.key(0)),
        "validation": jax.ShapeDtypeStruct((), np.float32),
    }
    found = read_state(folder / MODEL, {"model": repr(model)}, template)
    assert found is not None
    params = jax.tree.map(jnp.asarray, found[0]["params"])
    validation = float(found[0]["validation"])
    trained = TrainedRecommender(model, params, codes, np.array(found[1]), validation)
    return RecommenderRun(config, items, trained)


def _embeddings(config: RecommendConfig, data: Interactions) -> np.ndarray:
    if config.embeddings is not None:
        vectors = read_embeddings(config.embeddings, item=config.item)
        return of_items(data.items, vectors, config.embeddings)
    assert config.texts is not None
    texts = read_texts(config.texts, item=config.item, text=config.text)
    missing = [name for name in data.items if name not in texts]
    if missing:
        raise DataError(
            f"{config.texts} has no text of {len(missing)} of {len(data.items)} items, "
            f"{missing[0]!r} for example"
        )
    return embed_texts(tokjax.load(config.encoder), [texts[name] for name in data.items])
