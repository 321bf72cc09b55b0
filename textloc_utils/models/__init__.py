"""Models: the table of architectures, the registry, wrapped pipelines, loading, and the denoisers' inputs.

All pipelines are unmodified diffusers pipelines. The differences between them are data: ``architectures.toml`` has a
table for each denoiser class, and ``registry.toml`` has one for each public checkpoint.
"""

from textloc_utils.models.architectures import (
    ADDED,
    ARCHITECTURES,
    CROSS,
    CROSS_TRANSFORMER,
    JOINT,
    PROJECTIONS,
    REFUSED,
    TEXT_FIRST,
    Architecture,
    Site,
    TextLayer,
    architecture,
    family_of,
    key_value_numbers,
    projections,
    self_attention,
    text_layers,
)
from textloc_utils.models.calls import (
    DenoiserCall,
    attention_maps,
    call_rows,
    denoise,
    guided,
    image_and_text,
    join_rows,
    read_call,
    select_rows,
    take_rows,
    with_answer,
)
from textloc_utils.models.loading import check_no_file, load, pick_device
from textloc_utils.models.model import (
    FIXED_TOKENS,
    Model,
    as_indices,
    as_integer,
    check_distinct,
    check_hookable,
    check_layers,
    check_prompts,
    wrap,
)
from textloc_utils.models.registry import (
    FULL_SIZE,
    MINIATURES,
    ModelSpec,
    configuration,
    describe,
    meta_denoiser,
    registry,
    spec,
    training_log,
)
