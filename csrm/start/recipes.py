"""Which recipe makes a market's model, by what there is to learn from."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A way to a model."""

    name: str
    conf: str
    """File under conf/ whose settings it has."""
    why: str
    judged: tuple[str, ...]
    """Markets whose labels are learnt."""
    unjudged: tuple[str, ...]
    """Markets that are scored without labels of their own."""
    has_translation: bool = False


def choose_recipe(markets: Collection[str], judged: Collection[str], *, has_parallel_text: bool) -> Recipe:
    """The recipe for some markets; docs/recipes.md says what each is good for.

    Args:
        markets: all markets.
        judged: those that have judgments.
        has_parallel_text: whether there are translations.

    Example:
        >>> choose_recipe(["kr", "tw"], ["kr"], has_parallel_text=True).name
        'labels-elsewhere'
    """
    with_labels = tuple(market for market in markets if market in judged)
    without = tuple(market for market in markets if market not in judged)
    if not with_labels:
        why = "no market has judgments, so nothing is trained: a reranker that others trained judges, as it is"
        return Recipe("no-labels", "export_bundle_reranker.yaml", why, (), without)
    if not without:
        why = "every market has judgments: the model is trained on them, with random products as irrelevant ones"
        return Recipe("own-labels", "train_esci_sample.yaml", why, with_labels, without)
    learnt = "translation, " if has_parallel_text else ""
    judged_ones = ", ".join(with_labels)
    why = f"{', '.join(without)}: no judgments. Training takes {learnt}the labels of {judged_ones} and title pairs"
    if not has_parallel_text:
        why += "; with --parallel-text, it would take translation too, which measured best"
    return Recipe("labels-elsewhere", "train_taxonomy.yaml", why, with_labels, without, has_parallel_text)
