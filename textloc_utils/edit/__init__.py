"""Replace the text in a picture and keep the picture: by the localized layers, and by what else is there to do it.

An edit knows a source prompt, whose picture is to stay, and a target prompt, the same with another quoted text. Each
``Method`` draws the edited picture in one batch with the rows that it needs, from one noise:

- **localized** and **all layers**: the source prompt, its text keys and values copied from the target's row
  (``patching``) in some or all layers, from a step on;
- **Prompt-to-Prompt** (Hertz et al. 2023): the target prompt; in every text layer, up to a share of the steps, the
  picture attends to the words that both prompts share as the source's row does; "own maps" copies for half as long
  how the picture attends to itself, too, as the authors' code does;
- **FlowEdit** (Kulikov et al. 2025), for flow matching: the source's picture moves by the difference of what the two
  prompts ask for;
- **same seed**: the target prompt from the source's noise;
- **plain target**: the target prompt from other noise. It spells as well as the model can and knows nothing of the
  source's picture: the upper bound of the one, and what keeping nothing looks like.

A given picture (a file) is first inverted: the noise is sought from which the source prompt draws it.
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
