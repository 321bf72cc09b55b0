"""The text encoders of the miniatures, and what they share."""

from typing import TypeVar

from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerFast, T5Config

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
