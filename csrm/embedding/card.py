"""The card of an encoder: what it is, how it makes vectors, how near they are to the model's; plain text."""

from csrm.embedding.encoder import read_encoder


def encoder_card(folder: str) -> str:
    """What an encoder is, after its files were found whole.

    Args:
        folder: a path, or the URI of a folder.

    Raises:
        BundleError: see csrm.embedding.load_encoder.
    """
    settings, digest, path = read_encoder(folder)
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    measured = settings.recall
    lines = [
        f"encoder     {path}",
        f"digest      {digest}",
        f"model       {settings.model} ({settings.model_type}); {size:,.1f} MB",
        f"precision   {settings.precision}"
        + ("" if measured is None else f"; {measured.recipe}; recall@10 {measured.value:.4f} on ")
        + ("" if measured is None else f"{measured.num_queries} judged queries, {measured.of_torch:.4f} in torch"),
        f"vectors     {settings.dimensions} dimensions, {settings.pooling} pooling, "
        f"{'length 1' if settings.normalize else 'any length'}",
        f"texts       at most {settings.max_tokens} tokens; prefixes {settings.query_prefix!r} (query), "
        f"{settings.passage_prefix!r} (title)",
        f"parity      cosine to torch at least {settings.smallest_cosine:.7f}; golden texts at least "
        f"{settings.golden_cosine:g}",
        f"made with   {versions}",
    ]
    return "\n".join(lines)
