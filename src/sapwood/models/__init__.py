"""Loading, adapters, heads, roles and the forward that every pass shares."""
