"""Compress an image classifier for a phone, by distillation through weighted assistants."""

__version__ = "0.1.0"

STAGES = ("data", "teacher", "assistants", "weights", "student", "baselines", "exports", "report")
"""The pipeline's stages in order; each has an entry in dvc.yaml and a section in params.yaml."""
SETTINGS = ("seed", "tracking", "code", "recipe")
"""The other top-level keys of params.yaml."""
FAMILIES = ("assistants", "baselines", "exports")
"""Stages that run once per key of their section."""
