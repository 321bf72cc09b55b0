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

    ``kind`` is ``clip`` (start and end token around the prompt, padded with the end token as CLIP does)
    or ``t5`` (end token only, padded with ``<pad>``). Words outside the templates become ``<unk>``.
    """
    special = {"clip": ["<|startoftext|>", "<|endoftext|>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    vocabulary = {t: i for i, t in enumerate([*special, *LETTERS, *template_words()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # The article at a prompt's start is a word, not the letter A: lower-case it before letters are split off.
    raw.normalizer = normalizers.Replace(Regex(r"^A "), "a ")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split(Regex("[A-Z]"), "isolated")]
    )
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
