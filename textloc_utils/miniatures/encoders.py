"""The text encoders of the miniatures: their sizes, and their training on captions alone.

The encoders of the full-size models were trained on text (T5) or on text and pictures (CLIP), but never with the
denoiser. Those of the miniatures are trained only on captions and do not change after that. One attention layer must be
able to read the content of the picture from the embeddings. Each letter's embedding must also say at which position of
the word the letter is. If an encoder does not give this information, the denoiser cannot learn it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from textloc_utils.miniatures import world
from textloc_utils.miniatures.tokenizers import letter_tokenizer
from textloc_utils.models import FIXED_TOKENS
from textloc_utils.prompts import LETTERS

#: Width of the text embeddings that a denoiser reads: those of T5, of LDMBert, or of two CLIPs together.
TEXT_WIDTH = 128
LR = 2e-3
BATCH = 64
#: The values that a caption may name, by factor.
NAMES = {
    "ink": tuple(world.INKS),
    "typeface": tuple(world.TYPEFACES),
    "sign": tuple(world.SIGNS),
    "shape": world.SHAPES,
    "material": world.MATERIALS,
}


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder with 3 layers and half of TEXT_WIDTH as its width."""
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
    """The configuration of a T5 encoder with 2 layers and the width TEXT_WIDTH."""
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


def bert_config(tokenizer: PreTrainedTokenizerFast) -> LDMBertConfig:
    """The configuration of an LDMBert with 3 layers and the width TEXT_WIDTH."""
    return LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        d_model=TEXT_WIDTH,
        encoder_layers=3,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        head_dim=32,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor):
    """The outputs that Stable Diffusion XL and 3 read: the last but one layer, and the projected end token."""
    found = encoder(ids, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of text encoder.

    ``tokens`` is the length to which it pads. ``encode`` reads it in the same way as its pipeline. Studies change two
    settings: ``subwords`` (whether tokens hold several letters) and ``learned`` (whether it is trained on captions, or
    keeps its random weights).
    """

    tokenizer: str
    tokens: int
    build: Callable[[PreTrainedTokenizerFast], nn.Module]
    encode: Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    subwords: bool = False
    learned: bool = True

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of this text encoder."""
        return letter_tokenizer(length=self.tokens, kind=self.tokenizer, subwords=self.subwords)


#: LDMTextToImagePipeline and IFPipeline pad to 77 tokens. Only IFPipeline passes the mask to its T5.
KINDS = {
    "clip": Kind(
        tokenizer="clip",
        tokens=world.TOKENS,
        build=lambda tokenizer: CLIPTextModelWithProjection(clip_config(tokenizer)),
        encode=_clip,
    ),
    "t5": Kind(
        tokenizer="t5",
        tokens=world.TOKENS,
        build=lambda tokenizer: T5EncoderModel(t5_config(tokenizer)),
        encode=lambda encoder, ids, mask: (encoder(ids)[0], None),
    ),
    "t5-masked": Kind(
        tokenizer="t5",
        tokens=FIXED_TOKENS,
        build=lambda tokenizer: T5EncoderModel(t5_config(tokenizer)),
        encode=lambda encoder, ids, mask: (encoder(ids, attention_mask=mask)[0], None),
    ),
    "bert": Kind(
        tokenizer="clip",
        tokens=FIXED_TOKENS,
        build=lambda tokenizer: LDMBertModel(bert_config(tokenizer)),
        encode=lambda encoder, ids, mask: (encoder(ids)[0], None),
    ),
}
#: The text encoders of studies, which replace those of the recipe. The recipe's tokens are letters.
TEXTS: dict[str, dict] = {"subwords": {"subwords": True}, "random": {"learned": False}}
KINDS |= {f"{kind}-{name}": replace(KINDS[kind], **what) for name, what in TEXTS.items() for kind in ("clip", "t5")}


class _Reader(nn.Module):
    """Reads every factor and six letters from a caption's embeddings (B, T, width), with one attention layer.

    It reads like a denoiser: each query knows its position in the picture, and keys and values come from all tokens,
    including padding. Class 0 of every output is "none". For a pooled text (B, projection), ``named`` reads the factors
    in the same way, and ``occurs`` says whether each letter occurs.
    """

    def __init__(self, width: int, projection: int | None):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(NAMES) + world.COLUMNS, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.factors = nn.ModuleList(nn.Linear(width, 1 + len(values)) for values in NAMES.values())
        self.letters = nn.Linear(width, 1 + len(LETTERS))
        self.marks = nn.Linear(width, world.COLUMNS + len(LETTERS))
        if projection:
            self.named = nn.ModuleList(nn.Linear(projection, 1 + len(values)) for values in NAMES.values())
            self.occurs = nn.Linear(projection, len(LETTERS))

    def forward(self, embeddings: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        queries = self.queries.expand(len(embeddings), -1, -1)
        found = self.attention(queries, embeddings, embeddings, need_weights=False)[0]
        factors = [head(found[:, i]) for i, head in enumerate(self.factors)]
        return factors, self.letters(found[:, len(factors) :])


def pretrain(kind: Kind, *, seed: int, steps: int, device: torch.device | str = "cpu") -> tuple[nn.Module, float]:
    """Train an encoder on captions alone. Returns it in evaluation mode, with a measure of how well it can be read.

    The measure is the share of letters and factors that were named correctly in the last tenth of the steps, 0..1. It
    is 0 for a kind that is not trained. All random numbers come from ``seed``.
    """
    torch.manual_seed(seed)
    rng, tokenizer, encode = random.Random(f"{seed} captions"), kind.make_tokenizer(), kind.encode
    encoder = kind.build(tokenizer).to(device).train()
    if not kind.learned:
        return encoder.requires_grad_(False).eval().cpu(), 0.0
    with torch.no_grad():
        ids, mask, *_ = _batch(random.Random(0), tokenizer, 2, device)
        embeddings, pooled = encode(encoder, ids, mask)
    reader = _Reader(embeddings.shape[-1], None if pooled is None else pooled.shape[-1]).to(device)
    learned = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=LR)
    first = tokenizer.convert_tokens_to_ids("a")
    right = []
    for step in tqdm(range(steps), desc=f"text encoder {type(encoder).__name__}", mininterval=5):
        ids, mask, factors, letters = _batch(rng, tokenizer, BATCH, device)
        embeddings, pooled = encode(encoder, ids, mask)
        named, spelled = reader(embeddings)
        loss = F.cross_entropy(spelled.flatten(0, 1), letters.flatten())
        loss = loss + sum(F.cross_entropy(n, f) for n, f in zip(named, factors, strict=True))
        if not kind.subwords:
            # Position and letter are also predicted from each letter's token alone. This is learned first, and makes
            # the rest easy to learn.
            quoted = (ids >= first) & (ids < first + len(LETTERS))
            places, letter = (quoted.cumsum(1) - 1)[quoted], ids[quoted] - first
            place_, letter_ = reader.marks(embeddings[quoted]).split([world.COLUMNS, len(LETTERS)], dim=1)
            loss = loss + F.cross_entropy(place_, places) + F.cross_entropy(letter_, letter)
        if pooled is not None:
            there = F.one_hot(letters, 1 + len(LETTERS)).amax(1)[:, 1:].float()
            loss = loss + F.binary_cross_entropy_with_logits(reader.occurs(pooled), there)
            answers = [head(pooled) for head in reader.named]
            loss = loss + sum(F.cross_entropy(n, f) for n, f in zip(answers, factors, strict=True))
        for group in optimiser.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        hits = [(n.argmax(-1) == f).float() for n, f in zip(named, factors, strict=True)]
        hits.append((spelled.argmax(-1) == letters).float().flatten())
        right.append(torch.cat(hits).mean().item())
    encoder.requires_grad_(False).eval()
    last = right[-max(1, steps // 10) :]
    return encoder.cpu(), sum(last) / len(last)


def _batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, n: int, device: torch.device | str):
    """Token ids and mask (n, T), a list of factors (n,) and letters (n, 6) of random captions. Class 0 is "none"."""
    texts, factors, letters = [], [], []
    for _ in range(n):
        scene = world.random_scene(rng, world.EVERYWHERE)
        known = {k for k in NAMES if k != "shape" and rng.random() < 0.5}
        if "sign" in known:
            known.add("shape")
        texts.append(world.sentence(scene.text, rng, **{k: getattr(scene, k) for k in NAMES if k in known}))
        factors.append([1 + v.index(getattr(scene, k)) if k in known else 0 for k, v in NAMES.items()])
        letters.append([1 + LETTERS.find(c) for c in scene.text.ljust(world.COLUMNS)])
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(device)
    columns = torch.tensor(factors, device=device).unbind(1)
    return tokens.input_ids, tokens.attention_mask, columns, torch.tensor(letters, device=device)
