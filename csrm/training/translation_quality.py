"""How well a model translates: loss and chrF on held-out texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from csrm.scoring.prompts import Translation
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.packs import collate, translation_packs
from csrm.training.model.relevance import PackedRelevanceModel


@dataclass(frozen=True)
class TranslationQuality:
    """How well held-out texts are translated."""

    num_texts: int
    loss: float
    """Mean cross-entropy of a target token, nats."""
    loss_without_source: float
    """The same where the source text is left empty: what the source tells is the difference."""
    chrf: float
    """chrF of greedy translations, 0 to 100 (Popović 2015, as in sacrebleu)."""


def translation_quality(
    model: PackedRelevanceModel, tokenizer: PromptTokenizer, texts: Sequence[Translation], text_tokens: int
) -> TranslationQuality:
    """Translate held-out texts.

    Args:
        texts: not trained on.
        text_tokens: most tokens of each text, as in training.
    """
    from sacrebleu.metrics import CHRF

    model.eval()
    blind = [text._replace(source_text="") for text in texts]
    answers = [_greedy(model, tokenizer, text, text_tokens) for text in texts]
    return TranslationQuality(
        num_texts=len(texts),
        loss=_loss(model, tokenizer, texts, text_tokens),
        loss_without_source=_loss(model, tokenizer, blind, text_tokens),
        chrf=float(CHRF().corpus_score(answers, [[text.target_text for text in texts]]).score),
    )


def _loss(
    model: PackedRelevanceModel, tokenizer: PromptTokenizer, texts: Sequence[Translation], text_tokens: int
) -> float:
    total, num_tokens = 0.0, 0
    device = next(model.parameters()).device
    num_labels = len(model.label_ids)
    with torch.inference_mode():
        for pack in translation_packs([texts], tokenizer, max(512, 4 * text_tokens), text_tokens):
            batch = collate([pack], num_labels)
            del batch["keys"]
            count = batch["translation_index"].shape[1]
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
            total, num_tokens = total + float(loss) * count, num_tokens + count
    return total / num_tokens


def _greedy(model: PackedRelevanceModel, tokenizer: PromptTokenizer, text: Translation, text_tokens: int) -> str:
    ((given, _),) = tokenizer.translation_ids([text], text_tokens)
    device = next(model.parameters()).device
    ids = torch.tensor([given], device=device)
    with torch.inference_mode():
        generated = model.language_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=text_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return tokenizer.decode(generated[0, len(given) :].tolist()).partition("\n")[0].strip()
