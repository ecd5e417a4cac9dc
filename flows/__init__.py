"""When and where the stages of dvc.yaml run: a thin skin of Prefect over DVC."""
