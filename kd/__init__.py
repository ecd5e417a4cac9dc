"""Compress an image classifier for a phone, by distillation through weighted assistants."""

STAGES = ("data", "teacher", "assistants", "weights", "student", "baselines", "exports", "report")
"""The story's parts in their order; each is a stage of dvc.yaml and a section of params.yaml."""
SETTINGS = ("seed", "tracking", "code", "recipe")
"""The other top-level keys of params.yaml."""
FAMILIES = ("assistants", "baselines", "exports")
"""Those that run once for each key of their section."""
