#!/usr/bin/env bash
# Builds both images and proves what docker/README.md says of them, without a container engine. Needs root, and from Debian: buildah,
# bubblewrap, debootstrap, util-linux. Ends at the first check that fails, with exit code 1.
#
#   docker/verify.sh [WORK_FOLDER]
#
# WORK_FOLDER keeps the base and the layers for the next time (about 8 GB); without one, a temporary folder is used and removed.
# Environment: PYTHON (with the project's dev packages; default .venv/bin/python), RELEASE (Debian's; default bookworm),
# TORCH and TORCH_ARGS (build arguments of docker/Dockerfile). The host's pip configuration and certificates are used for the build.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
RELEASE="${RELEASE:-bookworm}"
HOST_CA=/etc/ssl/certs/ca-certificates.crt
BASE="localhost/bitwright-base:$RELEASE"
API_MB_AT_MOST=650
declare -A TREE=() SIZE_MB=()       # of each role's image: the folder where it is mounted, and its size
declare -A CONTAINER=() INSIDE=()   # of each role that was started: the process around it, and the image's process 1

fail() {
    printf 'FAILED  %s\n' "$*" >&2
    exit 1
}

# check "what must hold" command...; the command runs in a shell of its own that ends at its first error, which `if` would hide
check() {
    local what="$1" log="$WORK/check.log" start="$SECONDS" code=0
    shift
    set +e
    (set -e && "$@") >"$log" 2>&1
    code=$?
    set -e
    if [ "$code" != 0 ]; then
        tail -n 40 "$log" >&2
        fail "$what"
    fi
    printf 'ok  %-84s %4d s\n' "$what" "$((SECONDS - start))"
}

store() {
    buildah --root "$WORK/storage" --runroot "$WORK/runroot" --storage-driver overlay "$@"
}

# ---------------------------------------------------------------------------------------------------------------- preparing

require_tools() {
    [ "$(id -u)" = 0 ] || fail "must run as root: mounts images and makes devices"
    local tool
    for tool in buildah bwrap debootstrap nsenter setpriv tar "$PYTHON"; do
        command -v "$tool" >/dev/null || fail "$tool is missing; apt-get install buildah bubblewrap debootstrap, and make install"
    done
}

open_work_folder() {
    if [ "$#" -gt 0 ]; then
        mkdir -p "$1"
        WORK="$(cd "$1" && pwd)"
        KEEP=1
    else
        WORK="$(mktemp -d "${TMPDIR:-/var/tmp}/bitwright-images.XXXXXX")"
        KEEP=0
    fi
    chmod 755 "$WORK" # images run as another user, who must reach /data in it
    mkdir -p "$WORK/tmp" "$WORK/config"
    export TMPDIR="$WORK/tmp" # buildah keeps its pip cache there
    trap close_work_folder EXIT
    trap 'exit 130' INT TERM
}

close_work_folder() {
    local process
    for process in "${INSIDE[@]}" "${CONTAINER[@]}"; do
        [ -z "$process" ] || kill -KILL "$process" 2>/dev/null || true
    done
    wait
    store umount --all >/dev/null 2>&1 || true
    store rm --all >/dev/null 2>&1 || true
    if [ "$KEEP" = 0 ]; then
        store rmi --all --force >/dev/null 2>&1 || true
        rm -rf --one-file-system "$WORK"
    fi
}

copy_host_settings() {
    rm -f "$WORK/config/"*
    [ ! -e "$HOST_CA" ] || cp "$HOST_CA" "$WORK/config/ca.crt"
    "$PYTHON" "$ROOT/docker/verify_pip.py" "$WORK/config"
}

# ----------------------------------------------------------------------------------------------------------------- building

lint_dockerfile() {
    "$(dirname "$PYTHON")/hadolint" "$ROOT/docker/Dockerfile"
}

lint_compose() {
    "$(dirname "$PYTHON")/check-jsonschema" --builtin-schema vendor.compose-spec "$ROOT/docker/compose.yaml"
}

make_base() {
    local archive="$WORK/$RELEASE.tar" container
    if [ ! -e "$archive" ]; then
        rm -rf "$WORK/rootfs"
        debootstrap --variant=minbase "$RELEASE" "$WORK/rootfs"
        rm -rf "$WORK/rootfs/var/cache/apt/archives" "$WORK/rootfs/var/lib/apt/lists"
        tar --numeric-owner -C "$WORK/rootfs" -cf "$archive.part" .
        mv "$archive.part" "$archive"
        rm -rf "$WORK/rootfs"
    fi
    store inspect --type image "$BASE" && return
    container="$(store from scratch)"
    store add "$container" "$archive" /
    store commit --format docker "$container" "$BASE"
    store rm "$container"
}

build() { # role
    local -a options=(--build-arg "BASE_IMAGE=$BASE" --secret "id=pip.conf,src=$WORK/config/pip.conf")
    local folder
    [ -z "${TORCH:-}" ] || options+=(--build-arg "TORCH=$TORCH")
    [ -z "${TORCH_ARGS:-}" ] || options+=(--build-arg "TORCH_ARGS=$TORCH_ARGS")
    [ ! -e "$WORK/config/ca.crt" ] || options+=(--secret "id=ca.crt,src=$WORK/config/ca.crt")
    while read -r folder; do
        options+=(--volume "$folder:$folder:ro")
    done <"$WORK/config/volumes"
    store bud --isolation chroot --format docker --layers --pull-never "${options[@]}" \
        --ignorefile "$ROOT/docker/Dockerfile.dockerignore" --file "$ROOT/docker/Dockerfile" \
        --target "$1" --tag "localhost/bitwright-$1" "$ROOT"
}

mount_image() { # role
    local container
    container="$(store from --pull-never "localhost/bitwright-$1")"
    TREE[$1]="$(store mount "$container")"
}

# ------------------------------------------------------------------------------------------------------------------ running

# What the image says of itself, one word a line: setting ROLE Env|Entrypoint|Cmd|User|StopSignal
setting() {
    local format="{{println .Docker.Config.$2}}"
    case "$2" in
        Env | Entrypoint | Cmd) format="{{range .Docker.Config.$2}}{{println .}}{{end}}" ;;
        Healthcheck) format='{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' ;;
    esac
    store inspect --type image --format "$format" "localhost/bitwright-$1" | sed '/^$/d'
}

UNPRIVILEGED=(setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all --)

# Fills SANDBOX with the command that runs a command in ROLE's image: root read-only, its own network with nothing but loopback, its
# own processes, user 10001 without capabilities, the image's environment; writable are /tmp, and /data if a folder is given for it.
sandbox() { # role [data folder]
    local line
    SANDBOX=(bwrap --unshare-pid --unshare-ipc --unshare-uts --unshare-net --die-with-parent --new-session --as-pid-1
        --ro-bind "${TREE[$1]}" / --dev /dev --proc /proc --tmpfs /tmp --chmod 1777 /tmp --chdir /data --clearenv)
    [ -z "${2:-}" ] || SANDBOX+=(--bind "$2" /data)
    [ -z "${MODELS:-}" ] || SANDBOX+=(--ro-bind "$MODELS" /models)
    while read -r line; do
        SANDBOX+=(--setenv "${line%%=*}" "${line#*=}")
    done < <(setting "$1" Env)
}

new_data() { # name; prints a new empty folder that user 10001 owns
    rm -rf "$WORK/data-$1"
    install --directory --owner 10001 --group 10001 "$WORK/data-$1"
    printf '%s\n' "$WORK/data-$1"
}

run_once() { # role data-folder command...
    local role="$1" data="$2"
    shift 2
    sandbox "$role" "$data"
    "${SANDBOX[@]}" -- "${UNPRIVILEGED[@]}" "$@"
}

# Starts the image as an engine would, with its own entry point and command, as process 1.
start() { # role data-folder
    local -a command
    local info="$WORK/$1.info" last="$((SECONDS + 10))"
    mapfile -t command < <(setting "$1" Entrypoint && setting "$1" Cmd)
    sandbox "$1" "$2"
    : >"$info"
    rm -f "$WORK/$1.exit"
    {
        code=0
        "${SANDBOX[@]}" --info-fd 9 -- "${UNPRIVILEGED[@]}" "${command[@]}" 9>"$info" >"$WORK/$1.log" 2>&1 || code=$?
        echo "$code" >"$WORK/$1.exit"
    } &
    CONTAINER[$1]=$!
    INSIDE[$1]=
    while [ -z "${INSIDE[$1]}" ]; do
        [ "$SECONDS" -lt "$last" ] || fail "$1: did not start: $(tail -n 5 "$WORK/$1.log")"
        sleep 0.1
        INSIDE[$1]="$(sed -n 's/.*"child-pid": *\([0-9]*\).*/\1/p' "$info")"
    done
}

# Runs a command beside the one that was started, as `docker exec` would.
enter() { # role command...
    local role="$1"
    local -a environment
    shift
    mapfile -t environment < <(setting "$role" Env)
    nsenter --target "${INSIDE[$role]}" --mount --net --pid --ipc --uts --root --wd -- \
        /usr/bin/env -i "${environment[@]}" "${UNPRIVILEGED[@]}" "$@"
}

runs() { # role
    [ ! -e "$WORK/$1.exit" ]
}

# Until a command succeeds; if the container ends before or the time is over, shows what it said.
wait_until() { # seconds role command...
    local last="$((SECONDS + $1))" role="$2" said
    shift 2
    until said="$("$@" 2>&1)"; do
        if ! runs "$role" || [ "$SECONDS" -ge "$last" ]; then
            tail -n 5 <<<"$said"
            printf 'and the container of %s said:\n' "$role"
            tail -n 20 "$WORK/$role.log"
            return 1
        fi
        sleep 0.5
    done
}

# Sends the image's own stop signal to process 1, which must end by itself.
stops() { # role
    local code last="$((SECONDS + 15))"
    kill -s "$(setting "$1" StopSignal)" "${INSIDE[$1]}"
    while runs "$1"; do
        [ "$SECONDS" -lt "$last" ] || { echo "still runs after 15 s" && return 1; }
        sleep 0.2
    done
    code="$(cat "$WORK/$1.exit")"
    [ "$code" = 0 ] || [ "$code" = 143 ] || { echo "exit code $code" && tail -n 20 "$WORK/$1.log" && return 1; }
}

# ----------------------------------------------------------------------------------------------------------------- checking

is_user_10001() { # role
    [ "$(setting "$1" User)" = 10001:10001 ] && [ "$(run_once "$1" "" id -u)" = 10001 ]
}

# /data belongs to the user in the image, so only a read-only root can keep it from writing there.
cannot_write_its_root() { # role
    run_once "$1" "" python -c '
import errno, sys
for place in "/x", "/opt/bitwright/x", "/data/x":
    try:
        open(place, "w")
    except OSError as error:
        if error.errno != errno.EROFS:
            sys.exit(f"{place}: {error}")
    else:
        sys.exit(f"{place} could be written")
open("/tmp/x", "w")'
}

owns_nothing_else() { # role
    local found
    found="$(find "${TREE[$1]}" -xdev \( -path "${TREE[$1]}/data" -o -path "${TREE[$1]}/dev" \) -prune -o \
        ! -type l \( -user 10001 -o -group 10001 -o -perm -o+w ! -perm -1000 \) -print)"
    [ -z "$found" ] || { printf 'the user can change:\n%s\n' "$found" && return 1; }
}

holds_no_secret() { # role
    local found
    found="$(find "${TREE[$1]}" -xdev \( -name 'pip.conf' -o -path '*/run/secrets/*' -o -path '*/root/.cache/*' \) -size +0)"
    [ -z "$found" ] || { printf 'left in the image:\n%s\n' "$found" && return 1; }
}

lacks() { # role package...
    local role="$1"
    shift
    run_once "$role" "" python -c '
import importlib.util, sys
sys.exit(", ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name)) or 0)' "$@"
}

answers() { # path
    enter api python -c 'import sys, urllib.request; urllib.request.urlopen("http://127.0.0.1:8712" + sys.argv[1], timeout=5)' "$1"
}

is_healthy() { # role; by the image's own HEALTHCHECK
    local -a command
    mapfile -t command < <(setting "$1" Healthcheck)
    [ "${command[0]}" = CMD ] && enter "$1" "${command[@]:1}"
}

# What Triton does at its first launch: a module in C, against Python's headers, loaded from the cache folder.
compiles_c() {
    run_once worker "$(new_data compile)" python -c '
import importlib.util, pathlib, subprocess, sysconfig
folder = pathlib.Path("/data/triton")
folder.mkdir()
(folder / "tiny.c").write_text("""#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&module); }
""")
command = ["gcc", "-O3", "-shared", "-fPIC", "-I" + sysconfig.get_path("include"), "tiny.c", "-o", "tiny.so"]
subprocess.run(command, cwd=folder, check=True)
spec = importlib.util.spec_from_file_location("tiny", folder / "tiny.so")
assert importlib.util.module_from_spec(spec).__name__ == "tiny"'
}

make_tiny_model() { # folder
    PYTHONPATH="$ROOT" HF_HUB_OFFLINE=1 "$PYTHON" -c '
import pathlib, sys
from tests.support.tiny_models import save_tiny
save_tiny(pathlib.Path(sys.argv[1]) / "tiny", "llama")' "$1"
    chmod -R a+rX "$1"
}

migrates() { # data-folder
    run_once api "$1" bitwright migrate
}

make_key() { # data-folder; leaves an API key in $WORK/key
    run_once api "$1" bitwright keys create verification --json >"$WORK/key.json"
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["key"])' "$WORK/key.json" >"$WORK/key"
}

job_succeeds() { # base-url key; asked from the container of the api
    enter api python -c "$(cat "$ROOT/docker/verify_job.py")" "$@"
}

has_size() { # role megabytes-at-most
    [ "${SIZE_MB[$1]}" -le "$2" ] || { echo "${SIZE_MB[$1]} MB" && return 1; }
}

# --------------------------------------------------------------------------------------------------------------------- main

verify_common() { # role
    check "$1: runs as user 10001" is_user_10001 "$1"
    check "$1: root is read-only, /tmp is not" cannot_write_its_root "$1"
    check "$1: the user owns nothing but /data" owns_nothing_else "$1"
    check "$1: has no pip" lacks "$1" pip
    check "$1: no secret of the build is left" holds_no_secret "$1"
}

verify_api() {
    check "api: has no torch, triton, transformers or accelerate" lacks api torch triton transformers accelerate
    check "api: has at most $API_MB_AT_MOST MB" has_size api "$API_MB_AT_MOST"
}

verify_worker() {
    check "worker: gcc compiles a module that Python loads" compiles_c
    check "worker: loads torch, triton and transformers" run_once worker "" python -c 'import torch, triton, transformers'
}

# Both images at work on one folder of data, as a service on SQLite.
verify_service() {
    local data
    data="$(new_data service)"
    check "service: bitwright migrate makes the database" migrates "$data"
    check "service: an API key is made" make_key "$data"
    start api "$data"
    check "service: the api answers /healthz" wait_until 60 api answers /healthz
    check "service: the api answers /readyz" wait_until 60 api answers /readyz
    check "service: the api is healthy by its own HEALTHCHECK" is_healthy api
    start worker "$data"
    check "service: the worker is healthy by its own HEALTHCHECK" wait_until 60 worker is_healthy worker
    check "service: a job on a tiny model succeeds, without a network" job_succeeds http://127.0.0.1:8712 "$(cat "$WORK/key")"
    check "service: the worker stops when told to" stops worker
    check "service: the api stops when told to" stops api
}

main() {
    local role
    require_tools
    open_work_folder "$@"
    check "Dockerfile passes hadolint" lint_dockerfile
    check "compose.yaml passes the Compose schema" lint_compose
    check "pip configuration of this host is taken along" copy_host_settings
    check "base: Debian $RELEASE" make_base
    MODELS="$WORK/models"
    mkdir -p "$MODELS"
    check "a tiny model is made" make_tiny_model "$MODELS"
    for role in api worker; do
        check "$role: builds" build "$role"
        mount_image "$role"
        SIZE_MB[$role]="$(du -sxm "${TREE[$role]}" | cut -f 1)"
        verify_common "$role"
        "verify_$role"
    done
    verify_service
    printf 'api %d MB, worker %d MB on disk, of which the base %d MB; all checks passed\n' \
        "${SIZE_MB[api]}" "${SIZE_MB[worker]}" "$(($(stat -c %s "$WORK/$RELEASE.tar") / 1000000))"
}

main "$@"
