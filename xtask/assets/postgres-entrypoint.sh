#!/bin/sh
# Starts PostgreSQL, making the database cluster first if the volume is empty.
#
# POSTGRES_PASSWORD: password of the user postgres; without it only connections from inside are accepted.
set -eu

if [ "${1:-}" != postgres ]; then
    exec "$@"
fi

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA" /run/postgresql
    chown postgres:postgres "$PGDATA" /run/postgresql
    chmod 0700 "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups -- "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    secret=$(mktemp)
    printf '%s\n' "${POSTGRES_PASSWORD:-}" >"$secret"
    if [ -n "${POSTGRES_PASSWORD:-}" ]; then
        initdb --username=postgres --auth-local=trust --auth-host=scram-sha-256 --pwfile="$secret"
        echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    else
        initdb --username=postgres --auth-local=trust --auth-host=reject
    fi
    rm -f "$secret"
fi

shift
exec postgres -c listen_addresses='*' "$@"
