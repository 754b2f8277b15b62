"""The relevance step: packs of judged pairs, title pairs and translations, and a model that is trained on them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pandas as pd

from csrm.artefacts.manifest import verify_manifest
from csrm.scoring.phrasebook import Phrasebook
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.best_step import DevSplit
from csrm.training.checks import TrainingData
from csrm.training.data.judged import TAUGHT, Fold
from csrm.training.data.packs import (
    TrainingPack,
    judged_packs,
    translation_packs,
    with_dropped_titles,
    with_translations,
)
from csrm.training.data.parallel_text import ParallelText
from csrm.training.data.phrasebook import with_switched_languages
from csrm.training.data.title_pairs import title_pairs
from csrm.training.data.translated_rows import TRANSLATED
from csrm.training.model.base import BaseModel
from csrm.training.settings import TrainConfig
from csrm.training.stage import train_stage
from csrm.training.targets import smoothed_targets, voted_targets
from csrm.training.time_limit import TimeLimit
from csrm.training.trained import MODEL_KIND, trained_scorer

logger = logging.getLogger(__name__)
TITLE_DROP_PROBABILITY = 0.1
"""Probability that a retrieved title is left out of a prefix that keeps its titles; see Tuning.drop_all_titles."""


@dataclass(frozen=True)
class RelevanceStage:
    """What all relevance models of a training share; each is trained with labels of its own."""

    config: TrainConfig
    data: TrainingData
    tokenizer: PromptTokenizer
    """Tokenizer of the base model."""
    start: BaseModel | Path
    """Model to start from: the base model, or the folder of the translation step."""
    phrasebook: Phrasebook | None
    """Phrases that put a share of the pairs into other languages; None: no pair is."""
    limit: TimeLimit | None = None
    """When a model must be trained; None: when its steps are done."""
    finish: bool = False
    """Do not train, but end with what there is; see train_stage."""
    taught: Path | None = None
    """What a teacher thinks of the pairs of split TAUGHT, see csrm.training.distillation.teacher; None: there are none.
    """

    def train(
        self,
        output_dir: Path,
        soft_labels: Path | None = None,
        without: Fold | None = None,
        epochs: float | None = None,
    ) -> PairScorer:
        """Train one model; see csrm.training.distillation.rounds.TrainStudent and train_stage."""
        config = self.config
        length = {"epochs": epochs, "max_steps": None} if epochs is not None else {}
        tuning = config.tuning.model_copy(update=length)
        packs = self.packs(soft_labels, without)
        return train_stage(
            packs,
            self.start,
            tuning,
            config.labels,
            config.budgets,
            config.pack_tokens,
            output_dir,
            self.limit,
            template=config.template,
            dev=DevSplit.of(self.data.dev_pairs, config) if config.distillation is None else None,
            finish=self.finish,
        )

    def train_and_load(
        self,
        output_dir: Path,
        soft_labels: Path | None = None,
        without: Fold | None = None,
        epochs: float | None = None,
    ) -> PairScorer:
        """Train one model, and load it as after a restart: merging adapters changes the last bits of a score.

        Returns:
            A scorer whose digest names the trained folder.
        """
        self.train(output_dir, soft_labels, without, epochs)
        scorer = trained_scorer(output_dir, self.config.tuning.known_precision)
        scorer.digest = verify_manifest(output_dir, MODEL_KIND)
        return scorer

    def packs(self, soft_labels: Path | None = None, without: Fold | None = None) -> Iterator[TrainingPack]:
        """Packs of judged pairs with their targets, then of other pairs; parallel texts are among them.

        Args:
            soft_labels: see JudgedPairs.groups.
            without: leave out the queries of this fold.
        """
        packs = chain.from_iterable(map(self._packed, self._sources(soft_labels, without)))
        if self.config.translated_rows is not None:
            translated = self._judged(TRANSLATED, soft_labels, without)
            packs = chain(packs, self._packed(translated, may_switch=False))
        translation = self.config.translation
        if translation is None or not translation.mixed_share:
            return packs
        seed = self.config.tuning.seed + 1
        texts = ParallelText(translation.parallel_text).translations("train", seed, repeat=True)
        translations = translation_packs(texts, self.tokenizer, self.config.pack_tokens, translation.text_tokens)
        return with_translations(packs, translations, translation.mixed_share)

    def _sources(self, soft_labels: Path | None, without: Fold | None) -> list[Iterator[pd.DataFrame]]:
        """Groups of judged pairs, and of taught pairs and title pairs where these are configured."""
        config, tuning = self.config, self.config.tuning
        sources = [self._judged("train", soft_labels, without)]
        if self.taught is not None:
            taught = self.data.pairs.groups(
                TAUGHT, tuning.pairs_per_prefix, tuning.seed, without=without, soft_labels=self.taught
            )
            sources.append(taught)
        if config.title_pairs is not None:
            sources.append(title_pairs(config.title_pairs, config.labels, tuning.seed, self.data.measured, without))
        return sources

    def _judged(self, split: str, soft_labels: Path | None, without: Fold | None) -> Iterator[pd.DataFrame]:
        tuning = self.config.tuning
        return self.data.pairs.groups(
            split,
            tuning.pairs_per_prefix,
            tuning.seed,
            tuning.random_negatives,
            without=without,
            soft_labels=soft_labels,
        )

    def _packed(self, groups: Iterator[pd.DataFrame], may_switch: bool = True) -> Iterator[TrainingPack]:
        tuning, translation = self.config.tuning, self.config.translation
        groups = with_dropped_titles(groups, tuning.drop_all_titles, TITLE_DROP_PROBABILITY, tuning.seed)
        if may_switch and translation is not None and self.phrasebook is not None:
            groups = with_switched_languages(groups, self.phrasebook, translation.switched_share, tuning.seed)
        batches = (with_targets(batch, self.config) for batch in groups)
        return judged_packs(batches, self.tokenizer, self.config.pack_tokens)


def with_targets(batch: pd.DataFrame, config: TrainConfig) -> pd.DataFrame:
    """Pairs with column target: the soft label, else the smoothed given one or votes, times the pair's weight."""
    targets = voted_targets(batch["grade"], batch["votes"], config.labels, config.grade_labels)
    given = smoothed_targets(targets, config.tuning.label_smoothing)
    rows = zip(given, batch["soft_label"], batch["weight"], strict=True)
    return batch.assign(target=[weight * (own if soft is None else soft) for own, soft, weight in rows])


def read_phrasebook(config: TrainConfig) -> Phrasebook | None:
    """The phrases that put pairs into other languages, where that is configured.

    Languages of markets that the parallel text lacks are logged as a warning.
    """
    if config.translation is None or not config.translation.switched_share:
        return None
    texts = ParallelText(config.translation.parallel_text)
    phrasebook = Phrasebook(texts.translations("train", config.tuning.seed))
    known = phrasebook.known_languages()
    if unknown := sorted({*config.markets.values()} - known):
        logger.warning(
            "parallel_text: no text of languages %s, the languages of markets, so their pairs are not put into "
            "another; it has %s. Are the languages named alike in both?",
            unknown,
            sorted(known),
        )
    return phrasebook
