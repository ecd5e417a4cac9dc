"""Compress an image classifier for a phone, by distillation through weighted assistants."""
