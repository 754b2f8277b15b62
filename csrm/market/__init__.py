"""Invented markets whose relevance is known by construction, for the demo and for tests.

Read lexicon, facts, wording and generator; then parallel, taxonomy, categories and files.
The commands may import it. It imports ground files only.
"""

from csrm.market.generator import Market, generate_market
from csrm.market.lexicon import Lexicon, builtin_lexicon
from csrm.market.parallel import parallel_text
from csrm.market.taxonomy import read_taxonomy_lexicon

__all__ = ["Lexicon", "Market", "builtin_lexicon", "generate_market", "parallel_text", "read_taxonomy_lexicon"]
