#!/usr/bin/env bash
# Makes the random passwords of docker/compose.yaml, in docker/secrets. Never replaces any: a database keeps its first password.
#
# The files are readable by all, as Compose binds them into containers whose users are strangers to this machine; the folder is not.
set -euo pipefail

FOLDER="${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/secrets}"

random() { # bytes
    od --address-radix=n --format=x1 --read-bytes="$1" --width="$1" /dev/urandom | tr -d ' \n'
}

if [ -e "$FOLDER" ]; then
    printf '%s exists already. To start anew, remove it together with the volumes: docker compose down --volumes\n' "$FOLDER" >&2
    exit 2
fi
part="$FOLDER.part"
rm -rf "$part"
mkdir -p "$(dirname "$FOLDER")"
mkdir --mode 700 "$part"
password="$(random 24)"
access="$(random 10)"
secret="$(random 24)"
printf '%s' "$password" >"$part/postgres_password"
printf 'postgresql+psycopg://bitwright:%s@postgres:5432/bitwright' "$password" >"$part/database_url"
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$access" "$secret" >"$part/s3_credentials"
printf '{"identities": [{"name": "bitwright", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}\n' \
    "$access" "$secret" >"$part/s3_identities.json"
chmod 444 "$part"/*
mv "$part" "$FOLDER"
printf 'written to %s\n' "$FOLDER"
