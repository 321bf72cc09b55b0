"""Keep toxic text out of pictures: the guard, and its baselines.

The **guard** wraps a pipeline and is called in the same way. When the detector finds toxic text in a prompt, the
prompt is cleaned: a harmless word replaces the toxic one. The localized layers read the cleaned prompt. All other parts
read the original prompt, in the same pass. A call without toxic prompts goes to the pipeline unchanged. A call can also
mix toxic and harmless prompts. On U-Nets the harmless pictures then stay the same in every bit. In joint attention the
batch is larger, so they may differ by rounding.

**Cost.** On U-Nets, the keys and values of the text depend only on the text embedding. So the localized layers get the
embedding of the cleaned prompt. The text encoders read one more prompt, and the denoiser gets no more rows. In joint
attention, keys and values also depend on the picture. So the denoiser gets one more row per toxic prompt and step. This
row holds the same noisy picture and the cleaned text, and its keys and values are used. In the paper's patching, the
cleaned prompt also draws a whole picture. With guidance this takes two more rows.

**Baselines**, as published, for the same prompts. *Negative prompt*: the toxic text is the negative prompt. *Safe
Latent Diffusion* (Schramowski et al. 2023): it needs one more row per step. *Prompt swap*: the plain picture of the
cleaned prompt.
"""

from textloc_utils.safety.baselines import CONFIGURATIONS, SafeDiffusion, concept
from textloc_utils.safety.disguises import found_rates
from textloc_utils.safety.guards import METHODS, Guard, draw, guard
