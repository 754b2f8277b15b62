"""Similarities of some products with all queries in float32: by numpy, or by torch on a GPU where that is installed.

Both give the same to the caller up to rounding, and only what is near leaves the device.
"""

from typing import Any, Protocol

import numpy as np


class Blocks(Protocol):
    """What compares a block of products with the queries that it was made of."""

    def compare(self, units: np.ndarray) -> Any:
        """Similarities of products, shape (products, queries), on the device.

        Args:
            units: unit vectors, shape (products, dimensions), float32.
        """

    def largest_of_queries(self, similarities: Any, place: int) -> np.ndarray:
        """The largest value of each query, the second largest, ...: place from 1 to the number of products; float32."""

    def largest_of_products(self, similarities: Any, place: int) -> np.ndarray:
        """The same of each product: place from 1 to the number of queries."""

    def near(self, similarities: Any, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Products, queries and similarities of the pairs that reach a bound, in the order of products and queries.

        Args:
            similarities: of compare.
            bounds: of each query, shape (queries,), or of each product, shape (products, 1), float32.
        """


def blocks_on(device: str, queries: np.ndarray) -> Blocks:
    """What compares on a device.

    Args:
        device: cpu, cuda, or cuda:<number>. Without a torch that sees a GPU, CPU cores compare.
        queries: unit vectors, shape (queries, dimensions), float32.
    """
    if device != "cpu":
        try:
            import torch
        except ImportError:
            return NumpyBlocks(queries)
        if torch.cuda.is_available():
            return TorchBlocks(queries, device)
    return NumpyBlocks(queries)


class NumpyBlocks:
    """On CPU cores."""

    def __init__(self, queries: np.ndarray) -> None:
        self._queries = queries.T

    def compare(self, units: np.ndarray) -> np.ndarray:
        return units @ self._queries

    def largest_of_queries(self, similarities: np.ndarray, place: int) -> np.ndarray:
        row = len(similarities) - place
        found: np.ndarray = np.partition(similarities, row, axis=0)[row]
        return found

    def largest_of_products(self, similarities: np.ndarray, place: int) -> np.ndarray:
        rows, taken = np.arange(len(similarities)), []
        for _ in range(place):  # few, so that passes are faster than a partition of each row
            columns = similarities.argmax(axis=1)
            found = similarities[rows, columns]
            similarities[rows, columns] = -np.inf
            taken.append((columns, found))
        for columns, found_before in taken:
            similarities[rows, columns] = found_before
        return found

    def near(self, similarities: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places = np.flatnonzero(similarities >= bounds)  # np.nonzero takes several times as long
        products, queries = np.divmod(places, similarities.shape[1])
        return products, queries, similarities[products, queries]


class TorchBlocks:
    """On a device of torch, with float32 products in full, whatever the machine's default: TF32 would lose pairs."""

    def __init__(self, queries: np.ndarray, device: str) -> None:
        import torch

        self._torch, self._device = torch, device
        torch.set_float32_matmul_precision("highest")
        self._queries = self._moved(queries).T

    def compare(self, units: np.ndarray) -> Any:
        return self._moved(units) @ self._queries

    def largest_of_queries(self, similarities: Any, place: int) -> np.ndarray:
        return self._taken(similarities.topk(place, dim=0).values[-1])

    def largest_of_products(self, similarities: Any, place: int) -> np.ndarray:
        return self._taken(similarities.topk(place, dim=1).values[:, -1])

    def near(self, similarities: Any, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        products, queries = (similarities >= self._moved(bounds)).nonzero(as_tuple=True)
        return self._taken(products), self._taken(queries), self._taken(similarities[products, queries])

    def _moved(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _taken(self, values: Any) -> np.ndarray:
        return np.asarray(values.cpu().numpy())
