"""The card of a bundle: what it is, how good, how big, how fast; plain text. And bundles beside each other."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from csrm.artefacts.cache import artefact_kind
from csrm.artefacts.manifest import MANIFEST_NAME
from csrm.bundle.contents import BUNDLE_KIND, Estimate, PrecisionReport, made_with
from csrm.bundle.loading import Bundle, load_bundle
from csrm.errors import BundleError, ConfigError
from csrm.scoring.template import BUILT_IN_TEMPLATE
from csrm.scoring.vote import Voter

_VOTERS: dict[Voter, str] = {
    "model": "the model's log-odds",
    "words": "the query's words that the product names",
    "encoder": "the encoder's cosine",
}


def bundle_card(bundle: Bundle) -> str:
    """What a bundle is, how good, how big, how fast, and for which device; plain text."""
    settings, origin, parity = bundle.settings, bundle.settings.origin, bundle.settings.parity
    labels = ", ".join(f"{label.name} {label.gain:g} ({label.token!r})" for label in settings.labels)
    trained = f", trained model {origin.trained_model[:12]}" if origin.trained_model else ", as it is"
    if origin.ensemble is not None:
        shares = (f"{share:g} of bundle {digest[:12]}" for digest, share in origin.ensemble.items())
        trained = f", ensemble: {', '.join(shares)}"
    template = f"template {settings.template_version}"
    if settings.template != BUILT_IN_TEMPLATE:
        template = f"own template, cue {settings.template.cue!r}"
    beside = []
    if (vote := settings.vote) is not None:
        if vote.encoder is not None:
            beside.append(f"encoder     {vote.encoder.model} ({vote.encoder.digest[:12]})")
        weights = ", ".join(f"{weight:.2f} of {_VOTERS[name]}" for name, weight in vote.weights.items())
        found = ", ".join(f"{value:.3f} {name}" for name, value in vote.ndcg.items())
        beside.append(f"vote        {weights}; nDCG@10 on the {vote.num_queries} queries that chose them: {found}")
    lines = [
        f"bundle      {bundle.folder}",
        f"digest      {bundle.digest}",
        f"model       {origin.base_model}{trained}{', adapters merged' if origin.adapter else ''}",
        *beside,
        f"precision   {settings.precision}, proven on {settings.device}; {bundle.num_bytes / 1e6:,.1f} MB",
        *([f"speed       of a CPU with {', '.join(settings.cpu_features)}"] if settings.cpu_features else []),
        f"labels      {labels}",
        *([f"grade costs {settings.grade_costs}"] if settings.grade_costs else []),
        f"prompt      {template}; at most {settings.budgets.prefix} tokens of a query and "
        f"{settings.budgets.suffix} of a product",
        f"parity      fp32 within {parity.largest_score_difference:.1e} of the trained model on {parity.num_pairs} "
        f"pairs, allowed {parity.tolerance:.0e}; margin std {parity.logit_margin_std:.2f}",
        f"tolerance   {settings.pack_tolerance:.1e} between packs; {settings.golden_tolerance:.1e} from golden scores "
        f"({settings.golden_source})",
        f"made with   {made_with(settings)}",
        "",
        *_precision_lines(settings.precisions),
    ]
    return "\n".join(lines)


def _precision_lines(precisions: Sequence[PrecisionReport]) -> list[str]:
    lines = [
        f"{'precision':<10} {'MB':>6} {'pairs/s':>8}  {'pack spread':<11}  {'ROC-AUC (loss, 95 %)':<33}  "
        f"{'nDCG@10 (loss, 95 %)':<33}  {'shift max':<9}  {'mean':<6}  Spearman"
    ]
    for row in precisions:
        spread = "" if row.pack_spread is None else f"{row.pack_spread:.1e}"
        cells = f"{row.precision:<10} {row.num_bytes / 1e6:>6,.1f} {row.pairs_per_s:>8,.1f}  {spread:<11}"
        if row.quality is not None:
            quality = row.quality
            losses = ((quality.auc, quality.auc_loss), (quality.ndcg, quality.ndcg_loss))
            cells += "".join(f"  {_loss_text(value, loss):<33}" for value, loss in losses)
            cells += f"  {quality.largest_shift:<9.4f}  {quality.mean_shift:.4f}  {quality.spearman:.4f}"
        lines.append(cells)
        peak = "" if row.largest_activation is None else f", largest activation {row.largest_activation:,.0f}"
        lines.append(f"{'':<10} {row.recipe}{peak}: {row.verdict}")
    return lines


def _loss_text(value: float, loss: Estimate) -> str:
    return f"{value:.4f} ({loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}])"


def find_bundles(folder: str | Path) -> list[Path]:
    """Folders of the bundles in a folder of this machine and below it, the newest first.

    Raises:
        ConfigError: there is no such folder, or no bundle in it.
    """
    manifests = sorted(Path(folder).rglob(MANIFEST_NAME), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [manifest.parent for manifest in manifests if artefact_kind(manifest.parent) == BUNDLE_KIND]
    if not found:
        raise ConfigError(
            f"{str(folder)!r}: expected a folder of this machine with bundles in it, found none. Name the folder under "
            "which export_bundle.py has written them (bundle_dir)."
        )
    return found


def bundle_rows(folders: Iterable[Path]) -> list[str]:
    """A header, and for each bundle what tells it from others: plain text, one line each.

    A figure is that of the precision that the bundle has. Metrics of two bundles compare only where both were exported
    with the same labelled pairs. A bundle that cannot be opened says why in its line.
    """
    rows = [
        f"{'exported':<16}  {'digest':<12}  {'precision':<9}  {'MB':>7}  {'pairs/s':>7}  {'ROC-AUC':>7}  "
        f"{'nDCG@10':>7}  {'judged pairs':>12}  {'trained model':<13}  folder"
    ]
    for folder in folders:
        exported = datetime.fromtimestamp((folder / MANIFEST_NAME).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M")
        try:
            rows.append(f"{exported}  {_row(load_bundle(folder))}  {folder}")
        except BundleError as error:
            rows.append(f"{exported}  cannot be used: {error}")
    return rows


def _row(bundle: Bundle) -> str:
    settings, report = bundle.settings, bundle.settings.report
    quality = report.quality
    metrics = (
        ("", "", "") if quality is None else (f"{quality.auc:.4f}", f"{quality.ndcg:.4f}", f"{quality.num_pairs:,}")
    )
    return (
        f"{bundle.digest[:12]}  {settings.precision:<9}  {bundle.num_bytes / 1e6:>7,.1f}  {report.pairs_per_s:>7,.1f}  "
        f"{metrics[0]:>7}  {metrics[1]:>7}  {metrics[2]:>12}  {(settings.origin.trained_model or '')[:12]:<13}"
    )
