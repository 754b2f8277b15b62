"""The share of a query's words that a product names."""

import pytest

from csrm.scoring.prompts import Product
from csrm.scoring.vote import named_share

MUG = Product("Mug 0.3 l", "Arkenby", "Kitchen > Mugs", {"color": "Blue", "kind": None})


@pytest.mark.parametrize(
    ("query", "product", "share"),
    [
        ("blue ARKENBY mug", MUG, 1.0),
        ("Blue\u200b mug, mug, red", MUG, 2 / 3),  # each term counts once
        ("color", MUG, 0.0),  # names of attributes are the same for all products of a category
        ("Ｍｕｇ", MUG, 1.0),  # full-width letters
        ("mug 0", MUG, 1.0),
        ("女鞋", Product("Women's Shoes"), 0.5),  # another script says nothing
        ("Arkenby 女鞋", Product("Arkenby Shoes"), 0.75),  # as half each that cannot be compared
        ("sneakers", Product("운동화 250mm / Tavrik"), 0.5),  # its few Latin letters do not make it English
        ("tavrik sneakers", Product("운동화 250mm / Tavrik"), 0.75),
        ("Arkenby 운동화", Product("운동화 250mm / Tavrik"), 2 / 3),  # a query in its script: the brand is another one
        ("佐々木", Product("別の商品"), 0.0),  # the iteration mark is no script of its own
        ("Arkenby 女鞋", Product("아켄비 단화"), 0.5),
        ("女鞋", Product("黑色女鞋"), 1.0),
        ("240", Product("운동화 240"), 1.0),
        ("240", Product("운동화 250"), 0.0),  # digits are of all scripts
        ("шарф", Product("Шарф"), 1.0),
        ("🎁", MUG, 0.5),
        ("", MUG, 0.5),
        (None, MUG, 0.5),
        ("mug", Product(None), 0.5),
        ("mug", Product("\ud83d mug"), 1.0),
        ("mug", Product("x" * 100_000 + " mug"), 0.0),  # a prompt knows no more of a long text either
        ("mug", Product("x " * 9_000, attributes={f"{n:03}": "y " * 9_000 for n in range(500)} | {"z": "mug"}), 0.0),
    ],
)
def test_share_of_the_words_that_a_product_names(query: str | None, product: Product, share: float) -> None:
    assert named_share(query, product) == pytest.approx(share)
