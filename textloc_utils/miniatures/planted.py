"""Models with planted text layers: only a chosen set of layers can see the letters.

So the correct answer of a search for the layers that hold the text is known. These changes ensure it:

- **Text encoders.** The embeddings of letters come from the caption. All other embeddings, and the pooled text, come
  from the same caption with every letter replaced by the unknown token. So they have no information about the letters.
- **U-Nets.** In every other layer, the letters' embeddings are zero.
- **Joint attention.** In every other layer, no query can attend to the letters' keys. In all layers, the other text
  tokens can attend neither to letters nor to the picture, so the text stream cannot pass letters on.

The last channel of an embedding marks letters, so the denoiser's layers can find them.
"""

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn import functional as F

from textloc_utils.models import Model, ModelSpec
from textloc_utils.prompts import LETTERS
from textloc_utils.settings import TextlocError

MARK = 100.0  #: value of the last channel of a letter's embedding; the values of other tokens are much smaller
MARKED = 50.0


def install(pipe, spec: ModelSpec, layers: Sequence[int]) -> None:
    """Change a pipeline so that its denoiser sees letters only in the text layers ``layers``."""
    model = Model.from_pipeline(pipe, spec)
    seeing = set(layers)
    if not seeing or not seeing <= set(range(len(model.layers))):
        raise TextlocError(
            f"text layers {sorted(seeing)} are out of range; allowed: some of 0 to {len(model.layers) - 1}"
        )
    encoders = [part for name, part in pipe.components.items() if name.startswith(("text_encoder", "bert")) and part]
    tokenizer = pipe.tokenizer
    first = tokenizer.convert_tokens_to_ids("a")
    for encoder in encoders:
        # In all tokenizers of the miniatures, the letters and the unknown token have the same numbers.
        _split_letters(encoder, first, tokenizer.unk_token_id)
    joint = isinstance(model.denoiser, SD3Transformer2DModel)
    for layer in model.layers:
        attention = model.denoiser.get_submodule(layer.name)
        if joint:
            attention.set_processor(_Masked(sees=layer.index in seeing))
        elif layer.index not in seeing:
            attention.register_forward_pre_hook(_hide, with_kwargs=True)
    if joint:
        model.denoiser.register_forward_pre_hook(_tell_letters, with_kwargs=True)


def _split_letters(encoder: nn.Module, first: int, unknown: int) -> None:
    """Change an encoder so that only the embeddings of letters depend on letters, and mark these embeddings."""
    forward = encoder.forward

    def split(input_ids: torch.Tensor, *args, **kwargs):
        letters = (input_ids >= first) & (input_ids < first + len(LETTERS))
        told = forward(input_ids, *args, **kwargs)
        found = forward(input_ids.masked_fill(letters, unknown), *args, **kwargs)

        def joined(blind: torch.Tensor, seeing: torch.Tensor) -> torch.Tensor:
            made = torch.where(letters[..., None], seeing, blind)
            mark = torch.where(letters, MARK, 0.0).to(made.dtype)
            return torch.cat([made[..., :-1], mark[..., None]], dim=-1)

        if getattr(found, "hidden_states", None) is not None:
            pairs = zip(found.hidden_states, told.hidden_states, strict=True)
            found["hidden_states"] = tuple(joined(a, b) for a, b in pairs)
        found["last_hidden_state"] = joined(found.last_hidden_state, told.last_hidden_state)
        return found

    encoder.forward = split


def _hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Set the letters' embeddings to zero before a cross-attention layer."""
    text = kwargs["encoder_hidden_states"]
    return args, kwargs | {"encoder_hidden_states": text.masked_fill(text[..., -1:] > MARKED, 0.0)}


def _tell_letters(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Pass the positions of letters to the attention layers of a joint-attention denoiser."""
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    letters = text[..., -1] > MARKED
    for block in module.transformer_blocks:
        block.attn.processor.letters = letters


class _Masked:
    """Joint attention of Stable Diffusion 3 with hidden letters; see the module's description.

    ``letters`` (B, text tokens) is set before every pass.
    """

    def __init__(self, *, sees: bool):
        self.sees, self.letters = sees, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        batch, pictures = hidden_states.shape[:2]
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        text = encoder_hidden_states
        query = torch.cat([query, attn.add_q_proj(text)], dim=1)
        key = torch.cat([key, attn.add_k_proj(text)], dim=1)
        value = torch.cat([value, attn.add_v_proj(text)], dim=1)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        letters = F.pad(self.letters, (pictures, 0))  # (B, tokens): pictures come first
        is_text = torch.arange(key.shape[2], device=key.device) >= pictures
        other = is_text & ~letters  # text queries that must not see letters or the picture
        visible = torch.ones(batch, key.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        visible &= ~letters[:, None] | letters[:, :, None] | (self.sees & ~other)[:, :, None]
        visible &= ~(other[:, :, None] & ~other[:, None])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        picture, text = out[:, :pictures], out[:, pictures:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](picture)), text
