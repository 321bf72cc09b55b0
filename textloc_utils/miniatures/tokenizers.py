"""Word-level tokenizers for the miniatures: the captions' words whole, quoted text letter by letter."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from textloc_utils.miniatures import world
from textloc_utils.prompts import LETTERS


def letter_tokenizer(*, length: int, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits quoted text into letters, padded and cut to ``length`` tokens.

    It reads capitals and small letters alike, as a pipeline may lower-case its prompts (DeepFloyd IF). ``kind`` is
    ``clip`` (start and end token around the prompt, padded with the end token as CLIP does) or ``t5`` (end token only,
    padded with ``<pad>``). A word that no caption uses becomes ``<unk>``.
    """
    special = {"clip": ["<|startoftext|>", "<|endoftext|>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    # Outside the quotes an even number of quotation marks follows, inside an odd one. Both articles become "an", which
    # no quoted letter can be.
    outside, inside = r'(?=(?:[^"]*"[^"]*")*[^"]*$)', r'(?=[^"]*"(?:[^"]*"[^"]*")*[^"]*$)'
    article = normalizers.Replace(Regex(r"\ba\b" + outside), "an")
    words = [w for w in world.vocabulary() if w != "a"]
    vocabulary = {t: i for i, t in enumerate([*special, *LETTERS.lower(), *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), article])
    # The whole prompt tells which letters stand in quotes, so that they are split off first.
    split = pre_tokenizers.Split(Regex("[a-z]" + inside), "isolated")
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
