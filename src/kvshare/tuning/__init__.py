"""Precision by owner: what each owner's precision costs on a text, and the cheapest assignment that stays within a given divergence."""
