"""The text encoders of the miniatures, and what they share."""

import random
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from textloc_utils.miniatures import scenes
from textloc_utils.prompts import LETTERS
from textloc_utils.settings import TextlocError, data_dir

Encoder = TypeVar("Encoder", bound=nn.Module)

#: Width of the text embeddings that a denoiser reads: T5's own, or two CLIPs side by side.
TEXT_WIDTH = 128


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    """A CLIP text encoder of 3 layers, half of TEXT_WIDTH wide."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH // 2,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=TEXT_WIDTH // 2,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """A T5 encoder of 2 layers, TEXT_WIDTH wide."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32,
    )


def trained(encoder: type[Encoder], part: str) -> Encoder:
    """A text encoder of the finished sd3-mini, out of training: ``part`` is the name of its folder.

    The full-size models share their encoders in the same way (both CLIPs of SDXL and Stable Diffusion 3, the T5 of
    DeepFloyd IF and Stable Diffusion 3), and never trained them with the denoiser. With encoders trained along,
    sdxl-mini had not begun to read letters after 100,000 pictures; it did 12,000 pictures after taking these.
    """
    folder = data_dir() / "miniatures" / "sd3-mini" / part
    if not (folder / "config.json").is_file():
        raise TextlocError(f"{folder} is missing; train sd3-mini first, whose text encoders are used")
    found = encoder.from_pretrained(folder, use_safetensors=True)
    # A class that reads another one's file would keep that file's names for its tensors when it is saved.
    own = encoder(found.config)
    own.load_state_dict(found.state_dict())
    return own.requires_grad_(False)


def pretrain_on_places(t5: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> float:
    """Train a T5 on captions alone to say of every quoted letter which one it is and where in the word it stands.

    A T5 knows only distances between tokens: as initialised, and in sd3-mini, whose CLIPs tell the places, its
    embeddings say which letter a token is and nothing of its place, and no denoiser could spell from them. A full T5
    has learned from text what stands where. Returns the share of places named rightly in the last tenth of the steps;
    leaves the encoder out of training.
    """
    rng = random.Random(f"{seed} places")
    first = tokenizer.convert_tokens_to_ids("a")
    head = nn.Linear(TEXT_WIDTH, 6 + len(LETTERS)).to(t5.device)
    optimiser = torch.optim.AdamW([*t5.requires_grad_(True).parameters(), *head.parameters()], lr=2e-3)
    right = []
    for step in range(steps):
        captions = [scenes.caption(scenes.random_scene(rng, (3, 4, 5, 6)), rng).lower() for _ in range(64)]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(t5.device)
        quoted = (tokens.input_ids >= first) & (tokens.input_ids < first + len(LETTERS))
        places, letters = (quoted.cumsum(1) - 1)[quoted], tokens.input_ids[quoted] - first
        answer = head(t5(tokens.input_ids, attention_mask=tokens.attention_mask)[0][quoted])
        loss = F.cross_entropy(answer[:, :6], places) + F.cross_entropy(answer[:, 6:], letters)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right.append((answer[:, :6].argmax(1) == places).float().mean().item())
    t5.requires_grad_(False)
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
