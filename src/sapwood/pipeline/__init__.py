"""HVAC control by self-distillation: stages that read and write files, each usable alone."""
