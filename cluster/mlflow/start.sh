#!/usr/bin/env bash
# One MLflow for several people: records in PostgreSQL, artifacts through the server, a name and a password for everybody.
#
#   export STEMTUNE_MLFLOW_DB=postgresql://mlflow@db.example.org/mlflow     # no password in it, see README.md
#   cluster/mlflow/start.sh
#
# Secrets come from the environment or from files of mode 600 in ~/.stemtune/mlflow, never from a command line, which
# everybody on the machine can read. More options of `mlflow server` may follow.
set -euo pipefail
fail() { echo "stemtune: $*" >&2; exit 2; }

home="${STEMTUNE_MLFLOW_HOME:-$HOME/.stemtune/mlflow}"
python="${STEMTUNE_PYTHON:-python}"
db="${STEMTUNE_MLFLOW_DB:-}"
artifacts="${STEMTUNE_MLFLOW_ARTIFACTS:-${STEMTUNE_SHARED:+$STEMTUNE_SHARED/mlartifacts}}"
(umask 077 && mkdir -p "$home") || fail "cannot write to $home"
chmod 700 "$home"

private() { # a file with a secret: its owner's alone
    case "$(stat -Lc %a "$1")" in *00) ;; *) fail "$2 lies in '$1', which others can read; chmod 600 $1" ;; esac
}

case "$db" in
    postgresql://* | postgresql+psycopg://*) ;;
    "") fail "name the database: export STEMTUNE_MLFLOW_DB=postgresql://USER@HOST:PORT/DATABASE" ;;
    *) fail "STEMTUNE_MLFLOW_DB must begin with postgresql:// (for one user no server is needed: mlflow.db)" ;;
esac
# psycopg by its name: which driver a plain postgresql:// means depends on the version of SQLAlchemy.
db="postgresql+psycopg://${db#*://}"
case "$db" in
    *://*:*@* | *password=*) fail "STEMTUNE_MLFLOW_DB holds a password; put that into ~/.pgpass (mode 600) or PGPASSWORD" ;;
esac
pgpass="${PGPASSFILE:-$HOME/.pgpass}"
[ ! -e "$pgpass" ] || private "$pgpass" "the password of the database"
[ -n "$artifacts" ] || fail "name the folder (or s3://, gs:// address) of the artifacts: export STEMTUNE_MLFLOW_ARTIFACTS=..."

# The administrator's password makes the first user; MLflow looks at it only while the database has no users.
if [ -z "${MLFLOW_AUTH_ADMIN_PASSWORD:-}" ]; then
    file="${STEMTUNE_MLFLOW_ADMIN_FILE:-$home/admin-password}"
    [ -s "$file" ] || fail "give the administrator a password of 12 characters or more: in MLFLOW_AUTH_ADMIN_PASSWORD, or in $file (mode 600)"
    private "$file" "the administrator's password"
    MLFLOW_AUTH_ADMIN_PASSWORD="$(head -n 1 "$file")"
fi
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_AUTH_ADMIN_USERNAME="${MLFLOW_AUTH_ADMIN_USERNAME:-admin}"

# What signs the sign-up page's form: the same for all worker processes and after a restart.
if [ -z "${MLFLOW_FLASK_SERVER_SECRET_KEY:-}" ]; then
    [ -s "$home/secret-key" ] || (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$home/secret-key")
    private "$home/secret-key" "the server's key"
    MLFLOW_FLASK_SERVER_SECRET_KEY="$(cat "$home/secret-key")"
fi
export MLFLOW_FLASK_SERVER_SECRET_KEY

"$python" -c 'import mlflow, psycopg, flask_wtf' 2>/dev/null ||
    fail "$python lacks what the server needs; pip install -c constraints.txt -e '.[server]' in the checkout"

# Everybody may read everything; who makes an experiment may change it, and give others the right to.
(umask 077 && cat >"$home/basic_auth.ini") <<END
[mlflow]
default_permission = ${STEMTUNE_MLFLOW_PERMISSION:-READ}
database_uri = $(printf %s "${STEMTUNE_MLFLOW_USERS_DB:-$db}" | sed 's/%/%%/g')
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
END
export MLFLOW_AUTH_CONFIG_PATH="$home/basic_auth.ini"
export MLFLOW_BACKEND_STORE_URI="$db" MLFLOW_ARTIFACTS_DESTINATION="$artifacts" MLFLOW_SERVE_ARTIFACTS=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
unset MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD
host="${MLFLOW_HOST:-127.0.0.1}"
case "$host" in
    127.* | localhost | ::1) ;;
    *) echo "stemtune: listening on $host: passwords travel readable on that network unless a proxy adds TLS" >&2 ;;
esac
exec "$python" -m mlflow server --app-name basic-auth --host "$host" --port "${MLFLOW_PORT:-5000}" \
    --workers "${MLFLOW_WORKERS:-4}" "$@"
