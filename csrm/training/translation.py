"""The translation step: a model learns to translate before it judges relevance."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from csrm.artefacts.manifest import verify_manifest
from csrm.scoring.prompts import Translation
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.packs import TrainingPack, translation_packs
from csrm.training.data.parallel_text import ParallelText
from csrm.training.results import TranslationResult
from csrm.training.settings import TrainConfig, TranslationSettings
from csrm.training.stage import train_stage
from csrm.training.time_limit import TimeLimit
from csrm.training.trained import MODEL_KIND, load_trained
from csrm.training.translation_quality import TranslationQuality, translation_quality


def learn_translation(
    config: TrainConfig, settings: TranslationSettings, tokenizer: PromptTokenizer, limit: TimeLimit | None = None
) -> TranslationResult:
    """Train the base model on parallel text, and measure it on the held-out split.

    Args:
        tokenizer: of the base model.
        limit: when the step must end; None: when its steps are done.

    Raises:
        InputError: parallel_text cannot be read, has problems, or has no text to train on.
    """
    model_dir = config.stages_dir / "translation"
    parallel = ParallelText(settings.parallel_text)
    held_out = parallel.first(settings.held_out_split, config.tuning.seed, settings.num_held_out)
    texts = parallel.translations("train", config.tuning.seed)
    packs: Iterator[TrainingPack] = translation_packs(texts, tokenizer, config.pack_tokens, settings.text_tokens)
    tuning = settings.tuning(config.tuning)
    if tuning.max_steps is not None:
        packs = islice(packs, tuning.max_steps * tuning.packs_per_step)  # the texts are in random order
    train_stage(
        packs,
        config.base_model,
        tuning,
        config.labels,
        config.budgets,
        config.pack_tokens,
        model_dir,
        limit,
        template=config.template,
    )
    for _ in texts:  # so that all are counted
        pass
    why_unmeasured = f"no text is of split {settings.held_out_split} alone" if not held_out else None
    if limit is not None:
        why_unmeasured = "the time is limited"  # translating takes minutes on a CPU
    return TranslationResult(
        model_dir,
        num_texts=parallel.num_kept,
        num_left_out=dict(parallel.num_left_out),
        quality=_quality(held_out, settings, tokenizer, model_dir) if why_unmeasured is None else None,
        why_unmeasured=why_unmeasured,
    )


def _quality(
    held_out: Sequence[Translation], settings: TranslationSettings, tokenizer: PromptTokenizer, model_dir: Path
) -> TranslationQuality:
    """How well the model translates; a file beside its folder keeps it, for translating takes minutes on a CPU."""
    path = model_dir.with_name(model_dir.name + "_quality.json")
    follows_from = [verify_manifest(model_dir, MODEL_KIND), settings.text_tokens, held_out]
    fingerprint = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()
    if (known := _known_quality(path, fingerprint)) is not None:
        return known
    model, _, _ = load_trained(model_dir)
    if torch.cuda.is_available():
        model.to("cuda")
    quality = translation_quality(model, tokenizer, held_out, settings.text_tokens)
    text = json.dumps({"fingerprint": fingerprint, "quality": asdict(quality)}, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    return quality


def _known_quality(path: Path, fingerprint: str) -> TranslationQuality | None:
    """What the file keeps; None where it is not of the same, was cut off, or has other fields."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return TranslationQuality(**known["quality"]) if known["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
