"""Word-level tokenizers for the miniatures: whole words of captions, and quoted text as letters or in pieces."""

import functools
from collections import Counter

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from textloc_utils import prompts
from textloc_utils.miniatures import world
from textloc_utils.prompts import LETTERS

PIECES = 150  #: number of pieces of two or three letters


@functools.cache
def pieces() -> tuple[str, ...]:
    """The PIECES most common pairs and triples of letters in the training words, without words of captions."""
    words = [word.lower() for word in prompts.words("train")]
    found = Counter(word[i : i + n] for word in words for n in (2, 3) for i in range(len(word) - n + 1))
    taken = set(world.vocabulary())
    return tuple([piece for piece, _ in found.most_common() if piece not in taken][:PIECES])


def letter_tokenizer(*, length: int, kind: str, subwords: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer that splits quoted text into letters, and pads and cuts to ``length`` tokens.

    With ``subwords``, it takes the longest of :func:`pieces` from left to right, and single letters if no piece fits.

    Capital and small letters have the same tokens, because a pipeline may change its prompts to small letters
    (DeepFloyd IF). ``kind`` is ``clip`` (start and end token around the prompt, padded with the end token like CLIP) or
    ``t5`` (only an end token, padded with ``<pad>``). A word that no caption uses becomes ``<unk>``.
    """
    special = {"clip": ["<|startoftext|>", "<|endoftext|>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    # Outside the quotes, an even number of quotation marks follows. Inside, an odd number follows. Both articles become
    # "an", which cannot be confused with a quoted letter.
    outside, inside = r'(?=(?:[^"]*"[^"]*")*[^"]*$)', r'(?=[^"]*"(?:[^"]*"[^"]*")*[^"]*$)'
    article = normalizers.Replace(Regex(r"\ba\b" + outside), "an")
    words = [w for w in world.vocabulary() if w != "a"]
    longer = sorted(pieces(), key=len, reverse=True) if subwords else []
    vocabulary = {t: i for i, t in enumerate([*special, *LETTERS.lower(), *words, *longer])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), article])
    # The whole prompt is needed to find the letters in quotes, so they are split off first.
    split = pre_tokenizers.Split(Regex(f"(?:{'|'.join([*longer, '[a-z]'])})" + inside), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    if kind == "clip":
        start, end = special[:2]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
        )
        names = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": "<unk>"}
    else:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **names)
