"""Models whose activations are as large as those of real ones, with the logits of the quiet models they are made of."""

from collections.abc import Iterable

import torch

from csrm.scoring.packing import Pack
from csrm.training.model.relevance import PackedRelevanceModel


def largest_norm_input(model: PackedRelevanceModel, packs: Iterable[Pack]) -> float:
    """The largest absolute value that any norm reads, from hooks in the torch model."""
    largest = 0.0

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, float(inputs[0].abs().max()))

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.inference_mode():
        for pack in packs:
            model(**{name: torch.from_numpy(array) for name, array in pack._asdict().items()})
    for handle in handles:
        handle.remove()
    return largest


def make_loud(model: PackedRelevanceModel, packs: Iterable[Pack], norm_input: float) -> PackedRelevanceModel:
    """Scale a model's residual stream until its norms read values as large as `norm_input`.

    Norms take the factor out of all that a layer and the head read, so the logits stay what they are, but for the
    epsilon of norms.
    """
    packs = list(packs)
    language_model = model.language_model
    head = language_model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it may be the embedding itself
    language_model.config.tie_word_embeddings = False
    while (found := largest_norm_input(model, packs)) < 0.99 * norm_input:  # q_norm and k_norm read no residual
        _scale_residual(language_model.get_decoder(), norm_input / found)
    return model


def _scale_residual(decoder: torch.nn.Module, factor: float) -> None:
    """Multiply all that is written to the residual stream: embeddings, and what each layer adds."""
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(factor)
        for layer in decoder.layers:
            if hasattr(layer, "post_feedforward_layernorm"):  # Gemma: what a layer adds is normed last, by 1 + weight
                for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                    norm.weight.copy_((1 + norm.weight) * factor - 1)
                continue
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(factor)
                if linear.bias is not None:
                    linear.bias.mul_(factor)
