"""`make stack`: PostgreSQL, Prefect, MLflow and a worker on one machine, without docker."""
