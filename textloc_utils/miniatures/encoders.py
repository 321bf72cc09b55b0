"""Configurations of the text encoders that several miniatures share."""

from transformers import CLIPTextConfig, PreTrainedTokenizerFast, T5Config

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
