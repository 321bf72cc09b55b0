"""Replace the text in a picture and keep the rest of the picture: with the localized layers, and with baselines.

An edit has a source prompt, whose picture should be kept, and a target prompt, which is the same with another quoted
text. Each ``Method`` draws the edited picture from one noise, in one batch with the rows that it needs:

- **localized** and **all layers**: the source prompt is drawn. From some step on, some or all layers take their text
  keys and values from the target's row (``patching``).
- **Prompt-to-Prompt** (Hertz et al. 2023): the target prompt is drawn. In every text layer, up to a share of the steps,
  the picture's attention to the words that both prompts share is copied from the source's row. "own maps" also copies
  the picture's self-attention, for half as many steps, as in the authors' code.
- **FlowEdit** (Kulikov et al. 2025), for flow matching: the source's picture is moved by the difference between the
  velocities for the two prompts.
- **same seed**: the target prompt is drawn from the source's noise.
- **plain target**: the target prompt is drawn from other noise. It spells as well as the model can, which is the upper
  bound of spelling. It keeps nothing of the source's picture, which is the lower bound of keeping.

A given picture (a file) is first inverted. The inversion finds the noise from which the source prompt draws it.
"""

import contextlib
import copy

from textloc_utils.edit.inversion import Inverted, check_picture, invert
from textloc_utils.edit.method import (
    ALL,
    FLOW,
    LOCALIZED,
    P2P,
    P2P_OWN,
    PLAIN,
    SAME_SEED,
    Edit,
    Method,
    all_layers,
    edit,
    flow_edit,
    localized,
    plain_target,
    prompt_to_prompt,
    prompt_to_prompt_own,
    same_seed,
)
from textloc_utils.edit.picture import (
    check_text,
    failure,
    open_picture,
    picture_scores,
    report,
    save,
    side_by_side,
)
from textloc_utils.edit.prompt_to_prompt import SHARE, replaced_maps, shared_columns
from textloc_utils.edit.study import (
    ROUND_TRIP,
    SCORES,
    TABLES,
    best,
    chosen,
    compare,
    compare_pair,
    dial_table,
    dials,
    differences,
    kept,
    pairs_of,
    rendered,
    settings_told,
    summarise,
    table,
)
