"""Word-level tokenizers for the miniatures: template words whole, quoted capitals letter by letter."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from textloc_utils.prompts import COLOURS, LETTERS, SHAPES, SIMPLE_TEMPLATE, TEMPLATES


def template_words() -> list[str]:
    """Every word and mark of the templates and colours, lower-cased, in a fixed order."""
    texts = [SIMPLE_TEMPLATE, *(t for group in TEMPLATES.values() for t in group)]
    found = {w for t in texts for w in t.replace("{text}", "").replace('"', "").replace(".", "").lower().split()}
    found = {w for w in found if "{" not in w}
    return sorted(found | set(COLOURS) | set(SHAPES)) + ['"', ".", ","]


def letter_tokenizer(*, length: int, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits capitals into letters, padded and cut to ``length`` tokens.

    ``kind`` is ``clip`` (start and end token around the prompt, padded with the end token as CLIP does), ``t5`` (end
    token only, padded with ``<pad>``) or ``if`` (like ``t5``, for prompts that the pipeline has lower-cased: letters
    are split off inside double quotes). Words outside the templates become ``<unk>``.
    """
    t5 = ["<pad>", "</s>", "<unk>"]
    special = {"clip": ["<|startoftext|>", "<|endoftext|>", "<unk>"], "t5": t5, "if": t5}[kind]
    letters, words = LETTERS, template_words()
    # The article at a prompt's start is a word, not the letter A: lower-case it before letters are split off.
    normalizer = normalizers.Replace(Regex(r"^A "), "a ")
    split = pre_tokenizers.Split(Regex("[A-Z]"), "isolated")
    if kind == "if":
        # Outside the quotes an even number of quotation marks follows, inside an odd one. The article becomes "an",
        # which no quoted letter can be.
        letters, words = LETTERS.lower(), ["an" if w == "a" else w for w in words]
        article = normalizers.Replace(Regex(r'\ba (?=(?:[^"]*"[^"]*")*[^"]*$)'), "an ")
        normalizer = normalizers.Sequence([normalizers.Lowercase(), article])
        split = pre_tokenizers.Split(Regex(r'[a-z](?=[^"]*"(?:[^"]*"[^"]*")*[^"]*$)'), "isolated")
    vocabulary = {t: i for i, t in enumerate([*special, *letters, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizer
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    # Only the whole prompt tells which letters stand in quotes.
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, *steps] if kind == "if" else [*steps, split])
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
