"""The token tree: rows merged into a trie whose shared prefixes are computed once, exactly, in every pass."""

from sapwood.tree.attention import TreeContext
from sapwood.tree.pack import pack
from sapwood.tree.trie import TokenTree, build_trie, distinct_tokens

__all__ = ["TokenTree", "TreeContext", "build_trie", "distinct_tokens", "pack"]
