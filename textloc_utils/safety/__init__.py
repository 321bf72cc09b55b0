"""Keep toxic text out of pictures: the guard, and what it is compared with.

The **guard** stands in for a pipeline. For a prompt in which the detector finds toxic text, the localized
layers read the cleaned prompt, a harmless word in its place, and everything else reads the original, in one pass. A
call without toxic prompts goes to the pipeline as it came. Harmless prompts beside a toxic one in a call keep every bit
on U-Nets; in joint attention the larger batch may round them otherwise.

**What it costs.** On U-Nets the text's keys and values depend on the text embedding alone, so the localized layers are
given the cleaned prompt's embedding: one more prompt for the text encoders, and no row for the denoiser. In joint
attention they depend on the picture, too: one more denoiser row per toxic prompt and step, which sees the prompt's own
noisy picture beside the cleaned text and lends its keys and values. The paper's patching instead lets the cleaned
prompt draw its own picture alongside: two rows with guidance.

**Baselines**, as published, for the same prompts: the toxic text as negative prompt; Safe Latent Diffusion
(Schramowski et al. 2023), one more row per step; and prompt swap, the plain picture of the cleaned prompt.
"""

import contextlib

from textloc_utils.safety.baselines import SLD_MAX, SLD_MEDIUM, SafeDiffusion, concept
from textloc_utils.safety.guards import METHODS, Guard, draw, guard
from textloc_utils.safety.study import PATCHED_RUN, RUNS, SCORES, compare, found_rates, measure, summarise
