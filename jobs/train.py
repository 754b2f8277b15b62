"""Train a multilingual language model to judge relevance: translation, judgments of source markets, repaired labels.

On several devices: torchrun --nproc-per-node 2 jobs/train.py ...
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator, model_validator

from csrm.cli import job_parser, run_job
from csrm.config import InputSpec, Settings, load_config
from csrm.errors import InputError
from csrm.labels import ESCI_LABELS, Label
from csrm.manifest import check_replaceable, replace_folder, verify_manifest
from csrm.metrics import PAIR_METRICS, QUERY_METRICS, Evaluation, evaluate_scores, format_evaluation
from csrm.prompts import Translation
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.base_model import BaseModel
from csrm.training.data import Fold, JudgedInputs, JudgedPairs, MeasuredQueries
from csrm.training.distillation import (
    DevMetrics,
    Distillation,
    Round,
    RoundSetup,
    TrainStudent,
    best_round,
    check_folds,
    self_distill,
)
from csrm.training.label_quality import Calibration, resampled_auc
from csrm.training.model import TASKS
from csrm.training.packs import (
    TrainingPack,
    judged_packs,
    translation_packs,
    with_dropped_titles,
    with_translations,
)
from csrm.training.phrasebook import Phrasebook, with_switched_languages
from csrm.training.processes import across_processes
from csrm.training.report import RoundRecord, StageRecord, largest_moves, reliability, report_html
from csrm.training.soft_labels import label_issues
from csrm.training.stage import (
    KIND,
    Tuning,
    load_trained,
    one_hot_targets,
    smoothed_targets,
    start_tokenizer_json,
    train_stage,
    trained_scorer,
)
from csrm.training.title_pairs import TitlePairs, title_pairs
from csrm.training.translation import ParallelText, TranslationQuality, translation_quality

logger = logging.getLogger(__name__)

NUM_SAMPLED_TITLES = 500
TRANSLATION_TEMPLATE_TOKENS = 64
"""Room in a pack for what stands around a text and its translation."""
MAX_TOKENS_PER_CHARACTER = 1.0
"""Multilingual tokenizers make 0.2 tokens of a Latin letter and up to 0.8 of a Hangul syllable or a Han character."""


class TranslationSettings(Settings):
    """The translation stage, which activates what the model knows of both languages before it judges relevance."""

    parallel_text: InputSpec
    """Texts with their translations; splits train and held_out_split."""
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    """These three replace those of `tuning` where given; epochs replace max_steps too, also the one given here."""
    text_tokens: int = Field(default=48, ge=1)
    """Most tokens of each text."""
    mixed_share: float = Field(default=0.2, ge=0)
    """Translation packs for each pack of the relevance stage, so that translation is not forgotten."""
    switched_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the prefixes of the relevance stage, those of title pairs and pairs without labels too, that are put
    into another language of the parallel text, phrase by phrase, half of them with their products; see
    csrm.training.phrasebook."""
    held_out_split: str = "dev"
    num_held_out: int = Field(default=100, ge=1, le=1_000)
    """Texts of held_out_split that measure how well is translated, those that split train has too left out; without
    such texts it is not measured."""

    @field_validator("held_out_split")
    @classmethod
    def _is_held_out(cls, split: str) -> str:
        if split == "train":
            raise ValueError("is what is learnt: name a split that is not")
        return split

    def tuning(self, tuning: Tuning) -> Tuning:
        """The tuning of this stage."""
        changes = {"max_steps": self.max_steps, "epochs": self.epochs, "learning_rate": self.learning_rate}
        given = {name: value for name, value in changes.items() if value is not None}
        return tuning.model_copy(update=given | ({"max_steps": None} if self.epochs is not None else {}))


class TrainConfig(Settings):
    """Settings of a training."""

    markets: dict[str, str] = Field(min_length=1)
    """Source markets, each with the language of its text."""
    inputs: JudgedInputs
    base_model: BaseModel
    tuning: Tuning = Tuning()
    labels: tuple[Label, ...] = ESCI_LABELS
    """Answers of the model, least relevant first."""
    grade_labels: dict[str, str] | None = None
    """Grade of a judgment to the name of its label; without it, labels are named as the grades."""
    budgets: Budgets = Budgets()
    pack_tokens: int = 512
    """Most tokens of a pack, in training and scoring."""
    dev_split: str = "dev"
    """Judgments of this split measure the model; those without a split, and of split train, train it."""
    translation: TranslationSettings | None = None
    """Learn to translate first; without it, this stage is left out."""
    title_pairs: TitlePairs | None = None
    """Learn from titles that name their query too, in markets that have no labels; without it, only judged pairs."""
    distillation: Distillation | None = None
    """Repair the labels in rounds; without it, the given labels are learnt once."""
    model_dir: str
    """Where the trained folder goes; replaced when the training has ended. Stages and rounds lie beside it, in
    <model_dir>.stages: what has ended there is not run again while its inputs and settings stay the same."""

    @model_validator(mode="after")
    def _a_prompt_fits_a_pack(self) -> "TrainConfig":
        longest = self.budgets.prefix + self.budgets.suffix
        if self.pack_tokens < longest:
            raise ValueError(
                f"pack_tokens is {self.pack_tokens}, but a prefix with one suffix may take {longest} tokens"
            )
        most = (self.pack_tokens - TRANSLATION_TEMPLATE_TOKENS) // 2
        if self.translation is not None and self.translation.text_tokens > most:
            raise ValueError(
                f"translation.text_tokens is {self.translation.text_tokens}, but two texts fit a pack of "
                f"{self.pack_tokens} tokens, pack_tokens, with at most {most} each"
            )
        return self

    @model_validator(mode="after")
    def _labels_can_be_learnt(self) -> "TrainConfig":
        names = [label.name for label in self.labels]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"labels: expected at least two of different names, got {names}")
        if unknown := sorted(set((self.grade_labels or {}).values()) - set(names)):
            raise ValueError(f"grade_labels name {unknown}; labels are {names}")
        if self.dev_split in ("train", "unlabelled"):
            raise ValueError(f"dev_split is {self.dev_split!r}, what is learnt: name a split that is not")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__ or "", "conf/train.yaml").parse_args(argv)
    config = load_config(args.config, TrainConfig, args.overrides)
    model_dir = Path(config.model_dir)
    stages_dir = model_dir.with_name(model_dir.name + ".stages")
    check_replaceable(model_dir, KIND)
    with JudgedPairs(config.inputs, config.markets) as pairs:
        splits = pairs.splits()
        needs_dev = config.distillation is not None and config.distillation.choose_by == "dev"
        if missing := [split for split in ("train", config.dev_split)[: 1 + needs_dev] if split not in splits]:
            raise InputError(
                f"judgments: no rows of split {' and '.join(missing)}; splits are {sorted(splits)}."
                + (" The dev split chooses the round: set distillation.choose_by to agreement." if needs_dev else "")
            )
        for split in sorted(set(splits) - {"train"}):
            pairs.check_apart("train", split)
        one_hot_targets(pd.Series(pairs.grades(), dtype=object), config.labels, config.grade_labels)
        if config.distillation is not None:
            true_grades = pd.Series(pairs.true_grades(), dtype=object)
            one_hot_targets(true_grades, config.labels, config.grade_labels, column="true_grade")
            check_folds(config.distillation, pairs, config.tuning.seed)
        add_unlabelled(pairs, config)
        dev_pairs = pairs.read(config.dev_split)
        measured = pairs.measured_queries()
        tokenizer = PromptTokenizer.from_json(start_tokenizer_json(config.base_model), config.budgets)
        warn_of_unknown_scripts(pairs, tokenizer)
        start: BaseModel | Path = config.base_model
        if config.translation is not None:
            start = stages_dir / "translation"
            print(learn_translation(config, config.translation, tokenizer, start), flush=True)

        phrasebook = read_phrasebook(config)

        def train(
            output_dir: Path,
            soft_labels: Path | None = None,
            without: Fold | None = None,
            epochs: float | None = None,
        ) -> PairScorer:
            packs = relevance_packs(pairs, config, tokenizer, soft_labels, without, measured, phrasebook)
            length = {"epochs": epochs, "max_steps": None} if epochs is not None else {}
            return _train(packs, start, config.tuning.model_copy(update=length), config, output_dir)

        rounds: list[Round] = []
        issues = None
        if config.distillation is None:
            scorer = train(model_dir)
        else:
            rounds, issues = distill(config, config.distillation, pairs, dev_pairs, train, stages_dir)
            scorer = trained_scorer(model_dir, config.tuning.precision)
        print(f"trained on {splits['train']} pairs: {config.model_dir}")
    if not dev_pairs.empty:
        print(format_evaluation(_evaluate(_scored(scorer, dev_pairs), config)))
    print(f"report: {write_report(config, scorer, dev_pairs, rounds, issues, stages_dir)}")
    return 0


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
    follows_from = [verify_manifest(output_dir, KIND), settings.text_tokens, held_out]
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
        _, relevant, _ = _grade_gains(config)
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
        scorer.digest = verify_manifest(output_dir, KIND)
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
    replace_folder(copy, Path(config.model_dir), KIND)
    return rounds, issues


def write_report(
    config: TrainConfig,
    scorer: PairScorer,
    dev_pairs: pd.DataFrame,
    rounds: Sequence[Round],
    issues: pd.DataFrame | None,
    stages_dir: Path,
) -> Path:
    """Write the one-page report of the run; returns where it is."""
    model_dir = Path(config.model_dir)
    best = best_round(rounds, config.distillation.min_gain) if config.distillation is not None else None
    trained = [one.model_dir for one in rounds if one is best or one.dev_auc is not None]  # others: teachers alone
    folders = [stages_dir / "translation"] if config.translation is not None else []
    folders += trained or [model_dir]
    calibration = moves = None
    if not dev_pairs.empty:
        scores = scorer.score(dev_pairs)["relevance_score"].to_numpy()
        _, relevant, _ = _grade_gains(config)
        calibration = reliability(scores, dev_pairs["grade"].isin(relevant).to_numpy())
        if best is not None and best.round_index and rounds[0].model_dir in trained:
            first_scorer = trained_scorer(rounds[0].model_dir, config.tuning.precision)
            before = first_scorer.score(dev_pairs)["relevance_score"].to_numpy()
            moves = largest_moves(dev_pairs, before, scores)
    page = report_html(
        f"Training of {model_dir.name}",
        stages=[_stage_record(folder) for folder in folders],
        rounds=[
            RoundRecord(
                one.round_index,
                is_kept=one is best,
                ndcg=one.dev_ndcg,
                auc=one.dev_auc,
                agreement=one.agreement,
                control_auc=one.control_auc,
                gain_error=one.gain_error,
                flipped_share=one.flips.share if one.flips else None,
                flips_right=one.flips.precision if one.flips else None,
                random_flips_right=one.flips.wrong_share if one.flips else None,
            )
            for one in rounds
        ],
        reliability=calibration,
        label_issues=issues,
        moves=moves,
    )
    stages_dir.mkdir(parents=True, exist_ok=True)
    path = stages_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _stage_record(folder: Path) -> StageRecord:
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    losses = {
        task: points
        for task in TASKS
        if (points := [(entry["step"], entry[f"{task}_loss"]) for entry in history if f"{task}_loss" in entry])
    }
    return StageRecord(folder.name, num_packs=card["num_packs"], settings=card["tuning"], losses=losses)


def format_rounds(rounds: Sequence[Round], best: Round) -> str:
    """A table: one line a round. Columns that no round has are left out."""
    columns = {
        "round": [str(one.round_index) for one in rounds],
        f"dev {QUERY_METRICS[0]}": [_number(one.dev_ndcg, ".4f") for one in rounds],
        f"dev {PAIR_METRICS[0]}": [_number(one.dev_auc, ".4f") for one in rounds],
        "control": [_number(one.control_auc, ".4f") for one in rounds],
        "agreement": [_number(one.agreement, ".4f") for one in rounds],
        "error of gain": [_number(one.gain_error, ".4f") for one in rounds],
        "doubted": [_number(one.doubts.share if one.doubts else None, ".1%") for one in rounds],
        "of these wrong": [_number(one.doubts.precision if one.doubts else None, ".1%") for one in rounds],
        "of all wrong": [_number(one.doubts.wrong_share if one.doubts else None, ".1%") for one in rounds],
        "flipped": [_number(one.flips.share if one.flips else None, ".1%") for one in rounds],
        "repaired": [_number(one.flips.repaired if one.flips else None, ".1%") for one in rounds],
        "calibration error": [_calibration_error(one.calibration) for one in rounds],
        "on dev": [_calibration_error(one.dev_calibration) for one in rounds],
        "pseudo-labels": [_number(one.num_unlabelled or None, ",") for one in rounds],
    }
    shown = {name: texts for name, texts in columns.items() if any(texts)}
    widths = [max(map(len, (name, *texts))) for name, texts in shown.items()]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in zip(*([name, *texts] for name, texts in shown.items()), strict=True)
    ]
    lines[1 + best.round_index] += "  kept"
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _calibration_error(calibration: Calibration | None) -> str:
    return "" if calibration is None else f"{calibration.expected_error:.3f}"


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
    gains, relevant, irrelevant = _grade_gains(config)
    return evaluate_scores(scored, ["relevance_score"], gains, relevant_grades=relevant, irrelevant_grades=irrelevant)


def _grade_gains(config: TrainConfig) -> tuple[dict[str, float], set[str], set[str]]:
    """Gain of each grade, and the grades that have the largest and the least one."""
    label_gains = {label.name: label.gain for label in config.labels}
    gains = (
        {grade: label_gains[name] for grade, name in config.grade_labels.items()}
        if config.grade_labels
        else label_gains
    )
    most, least = (
        {grade for grade, gain in gains.items() if gain == end} for end in (max(gains.values()), min(gains.values()))
    )
    return gains, most, least


if __name__ == "__main__":
    sys.exit(run_job(across_processes(main)))
