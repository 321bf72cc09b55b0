"""Prompt-to-Prompt: the target's picture takes its attention to shared words from the source's picture."""

import contextlib
import functools
from collections.abc import Iterator

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from textloc_utils.models import Model, TextLayer, attention_maps, check_hookable, image_and_text, self_attention
from textloc_utils.patching import Fired
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError

#: Share of the steps. This is the value that Prompt-to-Prompt's authors use for replaced words.
SHARE = 0.8


def shared_columns(model: Model, source: str, target: str) -> tuple[list[int], list[int]]:
    """The positions of the tokens that two prompts share.

    Position ``sources[i]`` of the source's text and position ``targets[i]`` of the target's text have the same token.
    The prompts share their common beginning, their common end, and their padding.
    """
    sources, targets, start = [], [], 0
    for (n, a), (m, b) in zip(model.text_columns(source), model.text_columns(target), strict=True):
        first = next((i for i in range(min(n, m)) if a[i] != b[i]), min(n, m))
        last = next((i for i in range(min(n, m) - first) if a[n - 1 - i] != b[m - 1 - i]), min(n, m) - first)
        padding = len(a) - max(n, m)
        sources += [start + i for i in (*range(first), *range(n - last, n + padding))]
        targets += [start + i for i in (*range(first), *range(m - last, m + padding))]
        start += len(a)
    return sources, targets


@contextlib.contextmanager
def replaced_maps(model: Model, pair: Pair, rows: int, until: int, own: int = 0) -> Iterator["_ReplacedMaps"]:
    """Apply Prompt-to-Prompt to a batch of prompts, in the steps before ``until``. At the end all hooks are removed.

    The first of the ``rows`` is the pair's source, and the last is its target. In the steps before ``own`` (at most
    ``until``), the picture's self-attention maps are also replaced. Raises TextlocError if a layer computes its
    attention in a way in which its maps cannot be replaced.
    """
    own = min(own, until)
    layers: dict = {layer.name: layer for layer in model.layers}
    modules: dict = dict.fromkeys(own_modules(model)) if own else {}
    fired, handles = Fired({n: {(0, until)} for n in layers} | {n: {(0, own)} for n in modules}), []
    maps = _ReplacedMaps(model, shared_columns(model, pair.source, pair.target), rows, fired, own)
    check_hookable(model.denoiser)
    try:
        handles += fired.watch(model.denoiser)
        for name, layer in (layers | modules).items():
            attention = model.denoiser.get_submodule(name)
            handles.append(attention.register_forward_pre_hook(functools.partial(maps.enter, name, layer)))
            handles.append(attention.register_forward_hook(maps.leave, always_call=True))
        with maps:
            yield maps
        fired.close()
    finally:
        for handle in handles:
            handle.remove()


def own_modules(model: Model) -> list[str]:
    """Dotted names of the attention modules that compute only the picture's self-attention."""
    names = [name for name in self_attention(model.denoiser) if name.endswith(".to_q")]
    return [name.removesuffix(".to_q") for name in names]


class _ReplacedMaps(TorchFunctionMode):
    """Give one row of a batch another row's attention maps, in every text layer.

    This is the published method. The weights of the picture's queries on the shared tokens are copied from the source's
    row. Their weights on other tokens are not changed. Only the prompts' half of a guided batch changes, and nothing is
    normalised again. In joint attention, the method changes the text columns of the picture's rows. The authors' code
    also copies the maps of coarse self-attention layers for some of the steps, but their paper does not mention this.
    With ``own`` steps, this class copies the maps of all self-attention layers. If text and picture are in one map, it
    copies the picture's columns.

    The standard processors give queries, keys and values to torch's fused attention, which returns no maps. This mode
    intercepts the call in all of diffusers' processors. It computes the maps of only the two rows, and adds their
    effect to the output. So equal prompts change no bit.
    """

    def __init__(self, model: Model, columns: tuple[list[int], list[int]], rows: int, fired: Fired, own: int):
        super().__init__()
        self.model, self.columns, self.rows, self.fired, self.own = model, columns, rows, fired, own
        self.name, self.bytes = "", 0  # name of the current module, and largest size of its maps so far
        self.layer: TextLayer | None = None

    def enter(self, name, layer, module, args) -> None:
        due = self.fired.due(name, self.fired.clock.step)
        self.name, self.layer = (name, layer) if due else ("", None)

    def leave(self, module, args, output) -> None:
        self.name = ""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not self.name or function is not F.scaled_dot_product_attention:
            return output
        return self._replace(output, *args, **(kwargs or {}))

    def _where(self, queries: int, keys: int) -> tuple[slice, list[int], list[int]]:
        """The picture's queries, and the keys whose columns are replaced, in the source's and in the target's row."""
        if self.layer is None:
            return slice(0, queries), list(range(keys)), list(range(keys))
        pictures, texts = image_and_text(self.model.denoiser, self.layer, queries, keys, self.fired.clock.tokens)
        sources, targets = ([texts.start + i for i in columns] for columns in self.columns)
        if self.fired.clock.step < self.own:
            alike = [i for i in range(keys) if not texts.start <= i < texts.stop]
            sources, targets = sources + alike, targets + alike
        return pictures, sources, targets

    def _replace(self, output, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **other):
        """``output``, (B, heads, queries, d), with the last prompt's row recomputed for the replaced maps."""
        batch, _, queries, _ = query.shape
        if batch not in (self.rows, 2 * self.rows):
            raise TextlocError(
                f"attention maps should be replaced in a batch of {self.rows} rows, but the denoiser got {batch}"
            )
        pictures, sources, targets = self._where(queries, key.shape[2])
        rows = [batch - self.rows, batch - 1]
        maps = attention_maps(query, key, rows, pictures, attn_mask, scale)
        self.bytes = max(self.bytes, 2 * maps.numel() * maps.element_size())
        change = (maps[0][..., sources] - maps[1][..., targets]) @ value[-1][:, targets]
        output = output.clone()
        output[-1, :, pictures] += change
        self.fired.note(self.name, 1)
        return output
