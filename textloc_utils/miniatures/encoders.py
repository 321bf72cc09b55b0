"""The text encoders of the miniatures, and what they share."""

import random
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from textloc_utils.miniatures import scenes
from textloc_utils.prompts import COLOURS, LETTERS
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


class _Reader(nn.Module):
    """Asks a caption's embeddings, by one attention layer, for the colours of wall and sign and for six letters.

    It reads as a denoiser does: queries that know their place in the picture, keys and values of all tokens, padding
    included. Answers: colours (B, 2, 1 + colours) and letters (B, 6, 1 + letters), of which class 0 is "none".
    """

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2 + scenes.MAX_LETTERS, TEXT_WIDTH))
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 4, batch_first=True)
        self.colours = nn.Linear(TEXT_WIDTH, 1 + len(COLOURS))
        self.letters = nn.Linear(TEXT_WIDTH, 1 + len(LETTERS))

    def forward(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries = self.queries.expand(len(embeddings), -1, -1)
        found = self.attention(queries, embeddings, embeddings, need_weights=False)[0]
        return self.colours(found[:, :2]), self.letters(found[:, 2:])


def pretrain_to_be_read(t5: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> float:
    """Train a T5 on captions alone, so that one attention layer can read from it what a picture has to show.

    A T5 knows only distances between tokens: as initialised, and in sd3-mini, whose CLIPs tell the rest, its
    embeddings say which letter or colour a token is, not where in the word it stands or whether it is the wall's. A
    full T5 has learned from text what belongs to what; a denoiser that never changes its encoder cannot make up for
    it. Returns the share of letters and colours named rightly in the last tenth of the steps; leaves the encoder out
    of training.
    """
    torch.manual_seed(seed)
    rng, reader = random.Random(f"{seed} captions"), _Reader().to(t5.device)
    marks = nn.Linear(TEXT_WIDTH, scenes.MAX_LETTERS + len(LETTERS) + 2).to(t5.device)
    first = tokenizer.convert_tokens_to_ids("a")
    hues = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLOURS)), device=t5.device)
    learned = [*t5.requires_grad_(True).parameters(), *reader.parameters(), *marks.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=2e-3)
    right = []
    for step in range(steps):
        shown = [scenes.random_scene(rng, (3, 4, 5, 6)) for _ in range(64)]
        captions = [scenes.caption(scene, rng).lower() for scene in shown]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").to(t5.device)
        letters = [[1 + LETTERS.find(c) for c in scene.text.ljust(scenes.MAX_LETTERS)] for scene in shown]
        # One template leaves the colours open.
        colours = [
            [1 + COLOURS.index(c) if c in text else 0 for c in (scene.wall, scene.sign)]
            for scene, text in zip(shown, captions, strict=True)
        ]
        embeddings = t5(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        answers = reader(embeddings)
        wanted = [torch.tensor(rows, device=t5.device) for rows in (colours, letters)]
        loss = sum(F.cross_entropy(a.flatten(0, 1), w.flatten()) for a, w in zip(answers, wanted, strict=True))
        # Said of each token by itself, too, which is learned first and makes the rest easy to find.
        quoted = (tokens.input_ids >= first) & (tokens.input_ids < first + len(LETTERS))
        hue = torch.isin(tokens.input_ids, hues)
        places, letter = (quoted.cumsum(1) - 1)[quoted], tokens.input_ids[quoted] - first
        walls = torch.tensor([c[0] for c in colours], device=t5.device)[:, None]
        of_wall = (tokens.input_ids == F.pad(hues, (1, 0), value=-1)[walls])[hue]
        place_, letter_ = marks(embeddings[quoted])[:, :-2].split([scenes.MAX_LETTERS, len(LETTERS)], dim=1)
        loss = loss + F.cross_entropy(place_, places) + F.cross_entropy(letter_, letter)
        loss = loss + F.cross_entropy(marks(embeddings[hue])[:, -2:], of_wall.long())
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        hits = [(a.argmax(-1) == w).float().flatten() for a, w in zip(answers, wanted, strict=True)]
        right.append(torch.cat(hits).mean().item())
    t5.requires_grad_(False)
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
