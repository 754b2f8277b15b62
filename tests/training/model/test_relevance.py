"""Packs give each pair the logits of its own prompt alone; and every way to get that wrong is seen."""

import copy
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Gemma3ForCausalLM

from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import PADDING, Group, Pack, build_packs, lay_out
from csrm.scoring.prompts import Translation
from csrm.scoring.scorer import PairScorer, pair_groups
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.packs import collate, translation_packs
from csrm.training.model.relevance import PackedRelevanceModel, ranking_losses, torch_pack_scorer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def groups(pairs_pdf: pd.DataFrame, prompt_tokenizer: PromptTokenizer) -> list[Group]:
    return pair_groups(pairs_pdf, prompt_tokenizer)[0]


def one_at_a_time(loud_model: PackedRelevanceModel, groups: list[Group]) -> np.ndarray:
    """Logits of each pair's plain prompt through the Hugging Face model, without any of our packing."""
    rows = []
    with torch.inference_mode():
        for prefix_ids, suffixes in groups:
            for suffix_ids in suffixes:
                output = loud_model.language_model(input_ids=torch.tensor([[*prefix_ids, *suffix_ids]]))
                rows.append(output.logits[0, -1, loud_model.label_ids].numpy())
    return np.stack(rows)


def packed(
    loud_model: PackedRelevanceModel,
    groups: list[Group],
    pack_tokens: int,
    change: Callable[[Pack], Pack] = lambda pack: pack,
) -> np.ndarray:
    score = torch_pack_scorer(loud_model)
    return np.concatenate([score(change(pack)) for pack in build_packs(groups, pack_tokens)])


def test_the_fixture_tells_pairs_apart(loud_model: PackedRelevanceModel, groups: list[Group]) -> None:
    logits = one_at_a_time(loud_model, groups)
    assert (logits[:, -1] - logits[:, 0]).std() >= 1


@pytest.mark.parametrize("pack_tokens", [352, 512, 2000, 100_000])
def test_a_pack_equals_one_pair_at_a_time(
    loud_model: PackedRelevanceModel, groups: list[Group], pack_tokens: int
) -> None:
    expected = one_at_a_time(loud_model, groups)
    actual = packed(loud_model, groups, pack_tokens)
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def no_products_apart(pack: Pack) -> Pack:
    """All tokens of a group's products as one product."""
    first_product_token = pack.product_index[0, 0]
    rows = [row[row >= first_product_token] for row in pack.group_index]
    index = np.full((len(rows), max(map(len, rows))), PADDING)
    for row, places in zip(index, rows, strict=True):
        row[: len(places)] = places
    return pack._replace(product_index=index, product_place=np.flatnonzero(index >= 0))


def no_queries_apart(pack: Pack) -> Pack:
    """Each group reads the prefix of the one before."""
    return pack._replace(prefix_index=np.roll(pack.prefix_index, 1, axis=0))


def the_end_of_prefixes_is_lost(pack: Pack) -> Pack:
    return pack._replace(prefix_index=pack.prefix_index[:, : pack.prefix_index.shape[1] // 2])


def positions_not_restarted(pack: Pack) -> Pack:
    return pack._replace(position_ids=np.arange(len(pack.position_ids)))


def wrong_group_place(pack: Pack) -> Pack:
    return pack._replace(group_place=np.roll(pack.group_place, 1))


def wrong_product_place(pack: Pack) -> Pack:
    return pack._replace(product_place=np.roll(pack.product_place, 1))


def wrong_last_index(pack: Pack) -> Pack:
    return pack._replace(last_index=pack.last_index - 1)


MISTAKES = (
    no_products_apart,
    no_queries_apart,
    the_end_of_prefixes_is_lost,
    positions_not_restarted,
    wrong_group_place,
    wrong_product_place,
    wrong_last_index,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_pack_is_seen(
    loud_model: PackedRelevanceModel, groups: list[Group], mistake: Callable[[Pack], Pack]
) -> None:
    expected = one_at_a_time(loud_model, groups)
    actual = packed(loud_model, groups, 2000, change=mistake)
    assert np.abs(actual - expected).max() >= 100 * TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("column", ["title", "query", "brand", "category", "market", "language"])
def test_every_field_counts(
    loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer, pairs_pdf: pd.DataFrame, column: str
) -> None:
    scorer = PairScorer(prompt_tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(loud_model), tokens_per_call=512)
    swapped = pairs_pdf.assign(**{column: "changed " + pairs_pdf[column].fillna("")})
    differences = np.abs(scorer.logits(swapped) - scorer.logits(pairs_pdf)).max(axis=1)
    assert differences.min() >= 100 * TOLERANCE


def test_scores_do_not_depend_on_row_order_or_pack_size(
    loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer, pairs_pdf: pd.DataFrame
) -> None:
    expected = PairScorer(
        prompt_tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(loud_model), tokens_per_call=512
    ).score(pairs_pdf)
    shuffled = pairs_pdf.sample(frac=1.0, random_state=3)
    for tokens_per_call in (1, 352, 700, 100_000):
        scorer = PairScorer(
            prompt_tokenizer,
            ESCI_LABELS,
            pack_scorer=torch_pack_scorer(loud_model),
            tokens_per_call=tokens_per_call,
        )
        actual = scorer.score(shuffled).loc[pairs_pdf.index]
        np.testing.assert_allclose(actual["relevance_score"], expected["relevance_score"], atol=TOLERANCE)
        assert actual["predicted_grade"].tolist() == expected["predicted_grade"].tolist()


def test_loss_and_gradients_equal_those_of_single_prompts(
    loud_model: PackedRelevanceModel, groups: list[Group]
) -> None:
    few = [Group(group.prefix_ids, group.suffixes[:2]) for group in groups[:3]]
    targets = torch.tensor([0, 3, 1, 2, 3, 0])
    one_hot = torch.nn.functional.one_hot(targets, len(ESCI_LABELS)).float()
    in_pack, alone = copy.deepcopy(loud_model), copy.deepcopy(loud_model)
    inputs = {name: torch.from_numpy(array) for name, array in lay_out(few)._asdict().items()}
    loss = in_pack(**inputs, targets=one_hot)["loss"]
    loss.backward()
    rows = [
        alone.language_model(input_ids=torch.tensor([[*prefix_ids, *suffix_ids]])).logits[0, -1, alone.label_ids]
        for prefix_ids, suffixes in few
        for suffix_ids in suffixes
    ]
    expected = torch.nn.functional.cross_entropy(torch.stack(rows), targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(in_pack.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_pairs_without_weight_do_not_count_in_the_loss(loud_model: PackedRelevanceModel, groups: list[Group]) -> None:
    pack = lay_out(groups)
    inputs = {name: torch.from_numpy(array) for name, array in pack._asdict().items()}
    targets = torch.zeros((len(pack.last_index), len(ESCI_LABELS)))
    targets[0, 2] = 0.5
    output = loud_model(**inputs, targets=targets)
    expected = torch.nn.functional.cross_entropy(output["logits"][:1], torch.tensor([2]))
    torch.testing.assert_close(output["loss"], expected)


def test_soft_targets_and_weights_count_in_the_loss(loud_model: PackedRelevanceModel, groups: list[Group]) -> None:
    pack = lay_out(groups)
    inputs = {name: torch.from_numpy(array) for name, array in pack._asdict().items()}
    targets = torch.zeros((len(pack.last_index), len(ESCI_LABELS)))
    targets[0] = 2.0 * torch.tensor([0.1, 0.2, 0.3, 0.4])
    targets[1, 3] = 1.0
    output = loud_model(**inputs, targets=targets)
    losses = torch.nn.functional.cross_entropy(output["logits"][:2], targets[:2], reduction="none")
    torch.testing.assert_close(output["loss"], losses.sum() / 3.0)


def test_a_translation_is_learnt_as_in_plain_text(
    loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer
) -> None:
    texts = [Translation("ko", "en", "무선 마우스", "wireless mouse"), Translation("en", "zh-TW", "towel", "毛巾")]
    (pack,) = translation_packs([texts], prompt_tokenizer, pack_tokens=512, text_tokens=16)
    batch = collate([pack], num_labels=len(ESCI_LABELS))
    assert batch.pop("keys") == ["무선 마우스", "towel"]
    loss = loud_model(**batch)["loss"]

    sums, count = 0.0, 0
    for given, learnt in prompt_tokenizer.translation_ids(texts, 16):
        ids = torch.tensor([[*given, *learnt]])
        logits = loud_model.language_model(input_ids=ids).logits[0, len(given) - 1 : -1]
        sums += torch.nn.functional.cross_entropy(logits, torch.tensor(learnt), reduction="sum")
        count += len(learnt)
    torch.testing.assert_close(loss, sums / count)


@pytest.mark.parametrize("window", [64, 12])
def test_a_model_with_sliding_layers_scores_packs_as_single_prompts(
    gemma: Callable[[int], Gemma3ForCausalLM], window: int
) -> None:
    """Short and long prompts."""
    model = PackedRelevanceModel(gemma(window), [3, 4, 5, 6]).eval()
    ids = np.random.default_rng(0).integers(7, 199, size=(3, 5, 20)).tolist()
    groups = [Group(prefix, [part[: 3 + 4 * n] for n, part in enumerate(parts)]) for prefix, *parts in ids]
    expected = one_at_a_time(model, groups)
    assert (expected[:, -1] - expected[:, 0]).std() >= 1
    assert np.abs(packed(model, groups, 1000) - expected).max() <= TOLERANCE * np.abs(expected).max()


GAINS = torch.tensor([label.gain for label in ESCI_LABELS])


def test_the_ranking_loss_by_hand() -> None:
    # Of the first prefix, expected gains of 0.5 and 0.25, where E and S are right: shares 2/3 and 1/3, wanted 1/1.1 and
    # 0.1/1.1. The second has no gain at all; the third one has a single product, whose share is right whatever it is.
    scores = torch.tensor([0.5, 0.25, 0.5, 0.7, 0.2])
    logits = torch.stack([1 - scores, torch.zeros(5), torch.zeros(5), scores], dim=1).log()
    targets = torch.eye(4)[[3, 2, 0, 0, 3]] * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5])[:, None]
    losses = ranking_losses(logits, targets, GAINS, torch.tensor([0, 0, 1, 1, 2]))
    expected = [-2 / 1.1 * np.log(2 / 3), -2 * 0.1 / 1.1 * np.log(1 / 3), 0, 0, 0]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_scores_that_are_the_gains_have_the_least_ranking_loss() -> None:
    targets = torch.tensor([[0.1, 0.1, 0.2, 0.6], [0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.3, 0.0]])
    logits = targets.clamp(min=1e-30).log().requires_grad_()
    ranking_losses(logits, targets, GAINS, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("size", [0.0, 50.0, 1e4])
def test_the_ranking_loss_of_a_sure_model_is_a_number(size: float) -> None:
    logits = torch.tensor([[1.0, 0, 0, -1], [-1.0, 0, 0, 1], [1.0, 0, 0, -1]]).mul(size).requires_grad_()
    targets = torch.eye(4)[[3, 0, 0]]
    losses = ranking_losses(logits, targets, GAINS, torch.tensor([0, 0, 1]))
    losses.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    assert losses.sum() > 0


def test_a_pack_without_pairs_has_no_ranking_loss() -> None:
    assert not len(ranking_losses(torch.empty(0, 4), torch.empty(0, 4), GAINS, torch.empty(0, dtype=torch.int64)))
