"""The card of a bundle: what it is, how good, how big, how fast; plain text."""

from collections.abc import Sequence

from csrm.bundle.contents import Estimate, PrecisionReport, made_with
from csrm.bundle.loading import Bundle


def bundle_card(bundle: Bundle) -> str:
    """What a bundle is, how good, how big, how fast, and for which device; plain text."""
    settings, origin, parity = bundle.settings, bundle.settings.origin, bundle.settings.parity
    labels = ", ".join(f"{label.name} {label.gain:g} ({label.token!r})" for label in settings.labels)
    trained = f", trained model {origin.trained_model[:12]}" if origin.trained_model else ""
    lines = [
        f"bundle      {bundle.folder}",
        f"digest      {bundle.digest}",
        f"model       {origin.base_model}{trained}{', adapters merged' if origin.adapter else ''}",
        f"precision   {settings.precision}, proven on {settings.device}; {bundle.num_bytes / 1e6:,.1f} MB",
        *([f"speed       of a CPU with {', '.join(settings.cpu_features)}"] if settings.cpu_features else []),
        f"labels      {labels}",
        f"prompt      template {settings.template_version}; at most {settings.budgets.prefix} tokens of a query and "
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
