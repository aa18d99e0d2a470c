#!/bin/sh
# Run once by the Postgres image, on an empty volume: one role and one database for each user of the server.
set -eu
make_database() {
  psql --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres --set name="$1" --set password="$2" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
}
make_database dagster "$DAGSTER_PASSWORD"
make_database mlflow "$MLFLOW_PASSWORD"
make_database optuna "$OPTUNA_PASSWORD"
make_database feast "$FEAST_PASSWORD"
