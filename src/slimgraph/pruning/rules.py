"""How operators relate the axes of what they read and what they make: one literal table."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from slimgraph.pruning import rules_arithmetic, rules_layers, rules_moves, rules_positions
from slimgraph.pruning.trace import Rule

RULES: Mapping[Any, Rule] = MappingProxyType(
    {**rules_arithmetic.RULES, **rules_layers.RULES, **rules_moves.RULES, **rules_positions.RULES}
)
"""Rule by ATen operator."""
