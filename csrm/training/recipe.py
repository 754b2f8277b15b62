"""The training recipe: translation first, then relevance, then distillation in rounds."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from csrm.errors import InputError
from csrm.evaluation.metrics import QUERY_METRICS, Evaluation, evaluate_scores
from csrm.manifest import replace_folder, verify_manifest
from csrm.scoring.prompts import Translation
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.judged import Fold, JudgedPairs, MeasuredQueries
from csrm.training.data.packs import (
    TrainingPack,
    judged_packs,
    translation_packs,
    with_dropped_titles,
    with_translations,
)
from csrm.training.data.parallel_text import ParallelText
from csrm.training.data.phrasebook import Phrasebook, with_switched_languages
from csrm.training.data.title_pairs import title_pairs
from csrm.training.distillation.label_quality import resampled_auc
from csrm.training.distillation.rounds import (
    DevMetrics,
    Distillation,
    Round,
    RoundSetup,
    TrainStudent,
    best_round,
    self_distill,
)
from csrm.training.distillation.soft_labels import label_issues
from csrm.training.model.base import BaseModel
from csrm.training.settings import TrainConfig, TranslationSettings, grade_gains
from csrm.training.stage import train_stage
from csrm.training.summary import format_rounds
from csrm.training.targets import one_hot_targets, smoothed_targets
from csrm.training.trained import MODEL_KIND, load_trained, trained_scorer
from csrm.training.translation_quality import TranslationQuality, translation_quality
from csrm.training.tuning import Tuning

logger = logging.getLogger(__name__)


NUM_SAMPLED_TITLES = 500


MAX_TOKENS_PER_CHARACTER = 1.0
"""Multilingual tokenizers make 0.2 tokens of a Latin letter and up to 0.8 of a Hangul syllable or a Han character."""


def add_unlabelled(pairs: JudgedPairs, config: TrainConfig) -> None:
    """The pairs that teachers judge though nobody did, where these are configured."""
    unlabelled = config.distillation.unlabelled if config.distillation is not None else None
    if unlabelled is None:
        return
    num_pairs = pairs.add_unlabelled(
        unlabelled.inputs, unlabelled.markets, unlabelled.pairs_per_query, config.tuning.seed
    )
    if not num_pairs:
        raise InputError(f"candidates {unlabelled.inputs.candidates.path!r}: no pairs for {dict(unlabelled.markets)}.")


def warn_of_unknown_scripts(pairs: JudgedPairs, tokenizer: PromptTokenizer) -> None:
    """One warning for each language whose text the tokenizer splits into bytes."""
    for language, rows in pairs.read(num_pairs=NUM_SAMPLED_TITLES).groupby("language"):
        rate = tokenizer.tokens_per_character(rows["title"].dropna().tolist())
        if rate > MAX_TOKENS_PER_CHARACTER:
            logger.warning(
                "language %s: the tokenizer makes %.1f tokens of a character, it splits the text into bytes. "
                "Choose a base model that knows this language.",
                language,
                rate,
            )


def learn_translation(
    config: TrainConfig, settings: TranslationSettings, tokenizer: PromptTokenizer, output_dir: Path
) -> str:
    """The translation stage; returns its report."""
    parallel = ParallelText(settings.parallel_text)
    held_out = parallel.first(settings.held_out_split, config.tuning.seed, settings.num_held_out)
    texts = parallel.translations("train", config.tuning.seed)
    packs: Iterator[TrainingPack] = translation_packs(texts, tokenizer, config.pack_tokens, settings.text_tokens)
    tuning = settings.tuning(config.tuning)
    if tuning.max_steps is not None:
        packs = islice(packs, tuning.max_steps * tuning.packs_per_step)  # the texts are in random order
    _train(packs, config.base_model, tuning, config, output_dir)
    for _ in texts:  # so that all are counted
        pass
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(parallel.num_left_out.items())) or "none"
    report = f"translation: {parallel.num_kept:,} pairs of texts to learn from, left out: {left_out}"
    if not held_out:
        return f"{report}; not measured, for no text is of split {settings.held_out_split} alone"
    quality = _measured_translation(held_out, settings, tokenizer, output_dir)
    return (
        f"{report}; {quality.num_texts} held-out texts: loss {quality.loss:.2f} "
        f"({quality.loss_without_source:.2f} without the source), chrF {quality.chrf:.1f}"
    )


def _measured_translation(
    held_out: Sequence[Translation], settings: TranslationSettings, tokenizer: PromptTokenizer, output_dir: Path
) -> TranslationQuality:
    """How well the stage translates; a file beside it keeps it, for translating takes minutes on a CPU."""
    path = output_dir.with_name(output_dir.name + "_quality.json")
    follows_from = [verify_manifest(output_dir, MODEL_KIND), settings.text_tokens, held_out]
    fingerprint = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint:
            return TranslationQuality(**known["quality"])
    model, _, _ = load_trained(output_dir)
    if torch.cuda.is_available():
        model.to("cuda")
    quality = translation_quality(model, tokenizer, held_out, settings.text_tokens)
    text = json.dumps({"fingerprint": fingerprint, "quality": asdict(quality)}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    return quality


def read_phrasebook(config: TrainConfig) -> Phrasebook | None:
    """What puts pairs into other languages, where that is configured; warns of languages that it does not know."""
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


def relevance_packs(
    pairs: JudgedPairs,
    config: TrainConfig,
    tokenizer: PromptTokenizer,
    soft_labels: Path | None,
    without: Fold | None,
    measured: MeasuredQueries,
    phrasebook: Phrasebook | None,
) -> Iterator[TrainingPack]:
    """Packs of the training pairs with their targets; title pairs and translations too, where these are configured.

    Args:
        measured: no title pair is made of these, see JudgedPairs.measured_queries.
        phrasebook: puts a share of the pairs into other languages; None: none.
    """
    tuning, translation = config.tuning, config.translation
    judged = pairs.groups(
        "train", tuning.pairs_per_prefix, tuning.seed, tuning.random_negatives, without=without, soft_labels=soft_labels
    )
    sources = [judged]
    if config.title_pairs is not None:
        sources.append(title_pairs(config.title_pairs, config.labels, tuning.seed, measured, without))

    def packed(groups: Iterator[pd.DataFrame]) -> Iterator[TrainingPack]:
        groups = with_dropped_titles(groups, tuning.drop_all_titles, tuning.drop_title, tuning.seed)
        if translation is not None and phrasebook is not None:
            groups = with_switched_languages(groups, phrasebook, translation.switched_share, tuning.seed)
        return judged_packs((_with_targets(batch, config) for batch in groups), tokenizer, config.pack_tokens)

    packs = chain.from_iterable(map(packed, sources))
    if translation is None or not translation.mixed_share:
        return packs
    texts = ParallelText(translation.parallel_text).translations("train", tuning.seed + 1, repeat=True)
    translations = translation_packs(texts, tokenizer, config.pack_tokens, translation.text_tokens)
    return with_translations(packs, translations, translation.mixed_share)


def distill(
    config: TrainConfig,
    settings: Distillation,
    pairs: JudgedPairs,
    dev_pairs: pd.DataFrame,
    train: TrainStudent,
    stages_dir: Path,
) -> tuple[list[Round], pd.DataFrame]:
    """The rounds of self-distillation; the best one becomes the trained folder. Prints and writes what they found.

    Returns:
        The rounds, and the given labels that look wrong with their texts.
    """

    def targets_of(grades: pd.Series) -> np.ndarray:
        return one_hot_targets(grades, config.labels, config.grade_labels)

    def dev_metrics(scorer: PairScorer) -> DevMetrics:
        scored = _scored(scorer, dev_pairs)
        metrics = _evaluate(scored, config).metrics
        of_model = metrics[(metrics["ranking"] == "relevance_score") & (metrics["metric"] == QUERY_METRICS[0])]
        _, relevant, _ = grade_gains(config)
        queries = scored["market"] + "/" + scored["query_id"]
        is_relevant = scored["grade"].isin(relevant).to_numpy()
        aucs = resampled_auc(scored["relevance_score"].to_numpy(), is_relevant, queries.to_numpy())
        return DevMetrics(float(of_model["value"].iloc[-1]), aucs)  # the last market is all of them

    def train_and_load(
        output_dir: Path,
        soft_labels: Path | None = None,
        without: Fold | None = None,
        epochs: float | None = None,
    ) -> PairScorer:
        train(output_dir, soft_labels, without, epochs)
        # as after a restart: merging adapters changes the last bits of a score
        scorer = trained_scorer(output_dir, config.tuning.precision)
        scorer.digest = verify_manifest(output_dir, MODEL_KIND)
        return scorer

    setup = RoundSetup(
        pairs=pairs,
        settings=settings,
        labels=config.labels,
        train=train_and_load,
        targets_of=targets_of,
        work_dir=stages_dir,
        dev_split=None if dev_pairs.empty else config.dev_split,
        dev_metrics=dev_metrics if settings.choose_by == "dev" else None,
        seed=config.tuning.seed,
    )
    rounds = self_distill(setup)
    best = best_round(rounds, settings.min_gain)
    print(format_rounds(rounds, best))
    assert rounds[-1].soft_labels is not None
    issues = pairs.with_texts(label_issues(rounds[-1].soft_labels, [label.name for label in config.labels]))
    issues.to_parquet(stages_dir / "label_issues.parquet")
    print(f"{len(issues):,} given labels look wrong, the clearest first: {stages_dir / 'label_issues.parquet'}")
    if settings.num_folds == 1 and settings.teacher_scores is None:
        print("  (to a model that has learnt them: with num_folds 2 or more, models judge labels that they never saw)")
    for row in issues.head(3).itertuples():
        print(f"  {row.market}  {row.query}  |  {row.title}: given {row.grade}, rather {row.suggested_label}")
    copy = stages_dir / "best"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(best.model_dir, copy)
    replace_folder(copy, Path(config.model_dir), MODEL_KIND)
    return rounds, issues


def _train(
    packs: Iterator[TrainingPack], start: BaseModel | Path, tuning: Tuning, config: TrainConfig, output_dir: Path
) -> PairScorer:
    return train_stage(packs, start, tuning, config.labels, config.budgets, config.pack_tokens, output_dir)


def _with_targets(batch: pd.DataFrame, config: TrainConfig) -> pd.DataFrame:
    """Pairs with the distribution to learn, the soft label, else the given one, times their weight."""
    one_hot = one_hot_targets(batch["grade"], config.labels, config.grade_labels)
    given = smoothed_targets(one_hot, config.tuning.label_smoothing)
    rows = zip(given, batch["soft_label"], batch["weight"], strict=True)
    return batch.assign(target=[weight * (own if soft is None else soft) for own, soft, weight in rows])


def _scored(scorer: PairScorer, pairs: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([pairs, scorer.score(pairs)], axis=1)


def _evaluate(scored: pd.DataFrame, config: TrainConfig) -> Evaluation:
    gains, relevant, irrelevant = grade_gains(config)
    return evaluate_scores(
        scored, ["relevance_score"], gains=gains, relevant_grades=relevant, irrelevant_grades=irrelevant
    )
