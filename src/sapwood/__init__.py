"""Sapwood: reinforcement post-training of language-model agents on token trees."""
