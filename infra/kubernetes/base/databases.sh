#!/bin/sh
# Run by the image of PostgreSQL once, on an empty volume: a role and a database each for Prefect and MLflow.
set -eu
for name in prefect mlflow; do
  psql --set=ON_ERROR_STOP=1 --set=name="$name" --set=password="$(cat "/run/secrets/passwords/$name")" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
