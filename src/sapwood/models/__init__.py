"""Loading, adapters, heads and the forward that every pass shares."""
