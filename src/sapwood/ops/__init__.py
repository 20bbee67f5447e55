"""Pure tensor functions: advantages, losses, estimators. No state, no options objects, no I/O."""
