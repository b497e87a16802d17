"""Graph passes, in the order they run.

canonicalize  one view of linears, activations and reshapes, whatever the spelling
match_ffn     down(act(up(x)))                -> Match or Miss
match_glu     down(f(gate(x), up(x)))         -> Match or Miss
insert_moe    Match + operands                -> router, gate, dispatch and expert_mlp nodes
verify        the invariants of a graph, before and after
"""

from .base import Match, Rule, match_all
from .match_ffn import MatchFFN
from .match_glu import MatchGLU

RULES: tuple[Rule, ...] = (
    MatchGLU(),  # first: a gated block also ends in a linear whose input is elementwise
    MatchFFN(),
)

__all__ = ["RULES", "Match", "MatchFFN", "MatchGLU", "Rule", "match_all"]
