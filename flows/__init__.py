"""When and where the stages of dvc.yaml run: a thin layer of Prefect over DVC."""
