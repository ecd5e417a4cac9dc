"""`make stack`: PostgreSQL, Prefect, MLflow and a worker on one machine, without docker."""

from flows import need

need("stack", "dotenv", "psycopg", "supervisor")
