CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
\connect prefect
CREATE EXTENSION pg_trgm;
