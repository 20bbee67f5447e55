"""Loading, adapters, heads, roles and the forward that every pass shares."""

import logging

# PEFT imports bitsandbytes wherever that is installed, and it warns of casts and of kernels that the dequantised
# product (sapwood.models.quantised) doesn't use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
