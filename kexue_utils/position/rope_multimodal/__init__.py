"""Positions of text, images and videos in one sequence: RoPE in several dimensions, RoPE-Tie, RoPE-TV, M-RoPE.

Source: 《Transformer升级之路：17、多模态位置编码的简单思考》, Jianlin Su, https://kexue.fm/archives/10040
"""

from .desiderata import (
    ROWS_AND_COLUMNS,
    Compatibility,
    Desiderata,
    Equivalence,
    Spacing,
    Symmetry,
    check_compatibility,
    check_equivalence,
    check_symmetry,
    collision_free,
    desiderata,
    neighbour_spacing,
    order_preserved,
)
from .flattening import grid_bandwidth
from .layouts import PATCH, SEPARATOR, TEXT, Image, Layout, Text, Video, layout, pad_layouts
from .rotation import axial_frequencies, frequency_partition, rope_nd, rope_nd_tables
from .schemes import SCHEMES, tie_scales, tv_offsets, unified_offsets

__all__ = [
    "PATCH",
    "ROWS_AND_COLUMNS",
    "SCHEMES",
    "SEPARATOR",
    "TEXT",
    "Compatibility",
    "Desiderata",
    "Equivalence",
    "Image",
    "Layout",
    "Spacing",
    "Symmetry",
    "Text",
    "Video",
    "axial_frequencies",
    "check_compatibility",
    "check_equivalence",
    "check_symmetry",
    "collision_free",
    "desiderata",
    "frequency_partition",
    "grid_bandwidth",
    "layout",
    "neighbour_spacing",
    "order_preserved",
    "pad_layouts",
    "rope_nd",
    "rope_nd_tables",
    "tie_scales",
    "tv_offsets",
    "unified_offsets",
]
